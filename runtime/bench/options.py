"""Options of `runtime.bench`."""

from dataclasses import dataclass

from runtime.common.errors import ToolkitError
from runtime.common.flags import flag, require
from runtime.engine.options import InputOptions

LENGTHS = "32,64,128,256,512,1024"


@dataclass(kw_only=True)
class BenchOptions(InputOptions):
    batch_size: str = flag(
        "sequences together, one or several numbers", "--batch", default="1", metavar="N,N,..."
    )
    input_len: str = flag("tokens of the prompts", default=LENGTHS, metavar="N,N,...")
    output_len: str = flag(
        "tokens of the answers", "--max-tokens", default=LENGTHS, metavar="N,N,..."
    )
    out: str = flag("folder that receives the tables", default=".", metavar="DIR")
    perf: bool = flag(
        "one case: print ***Perf Info*** and write it as csv", default=False, kind=bool
    )
    num_prompts: int = flag("--perf: requests", default=1, kind=int, metavar="N")
    demo: bool = flag(
        "print the answer to --prompt, about --image where given", default=False, kind=bool
    )
    prompt: str = flag("--demo: the question", default="Describe the picture.", metavar="TEXT")
    model_type: str | None = flag(
        "accepted and ignored: the checkpoint says what it is", default=None, metavar="NAME"
    )
    seed: int = flag("of the prompts' words", default=0, kind=int, metavar="N")

    def __post_init__(self):
        super().__post_init__()
        self.batches = self._numbers("batch_size")
        self.inputs = self._numbers("input_len")
        self.outputs = self._numbers("output_len")
        require(self, "num_prompts", self.num_prompts >= 1, "1 or more is needed")
        if self.perf and max(map(len, (self.batches, self.inputs, self.outputs))) > 1:
            raise ToolkitError(
                "--perf measures one case: give one --batch-size, --input-len and --output-len"
            )

    def _numbers(self, name: str) -> list[int]:
        numbers = []
        for part in str(getattr(self, name)).split(","):
            positive = part.strip().isdigit() and int(part) > 0
            require(self, name, positive, "give numbers from 1 up, e.g. 1,2,4,8")
            numbers.append(int(part))
        return numbers
