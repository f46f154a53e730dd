"""Options of `runtime.bench`."""

import re
from dataclasses import dataclass
from pathlib import Path

from models import family_of
from runtime.common.errors import ToolkitError
from runtime.common.flags import flag, require
from runtime.common.notes import note
from runtime.engine.options import InputOptions

LARGEST_SIDE = 8192  # of a drawn picture
LENGTHS = "32,64,128,256,512,1024"
# special tokens and the words of LLaVA that say who speaks
FRAME = re.compile(r"<\|\w+\|>|</?\w+>|\[g?MASK\]|^\s*USER:|ASSISTANT:\s*$")


@dataclass(kw_only=True)
class BenchOptions(InputOptions):
    batch_size: str | None = flag(
        "sequences together, one or several numbers (default: 1; with --perf all prompts)",
        "--batch",
        default=None,
        metavar="N,N,...",
    )
    input_len: str = flag("tokens of the prompts", default=LENGTHS, metavar="N,N,...")
    output_len: str = flag(
        "tokens of the answers",
        "--max-tokens",
        "--max-output-len",
        default=LENGTHS,
        metavar="N,N,...",
    )
    out: str = flag("folder that receives the tables", default=".", metavar="DIR")
    perf: bool = flag(
        "one case: print ***Perf Info*** and write it as csv", default=False, kind=bool
    )
    input_vision_shape: str | None = flag(
        "a black picture of this size in place of --image", default=None, metavar="HEIGHT,WIDTH"
    )
    num_prompts: int = flag("--perf: requests", default=1, kind=int, metavar="N")
    demo: bool = flag(
        "print the answer to --prompt, about --image where given", default=False, kind=bool
    )
    prompt: str = flag("--demo: the question", default="Describe the picture.", metavar="TEXT")
    prompt_template: str | None = flag(
        "--demo: words around the question, which stands for {}; the model's own frame goes around "
        "both",
        default=None,
        metavar="TEXT",
    )
    tokenizer: str | None = flag(
        "the folder of --model, as vllm_utils spells it; no other is read",
        default=None,
        metavar="DIR",
    )
    model_type: str | None = flag(
        "what the checkpoint should be, e.g. llava or glm-4v; another one is refused",
        default=None,
        metavar="NAME",
    )
    seed: int = flag("of the prompts' words", default=0, kind=int, metavar="N")

    def __post_init__(self):
        super().__post_init__()
        require(self, "num_prompts", self.num_prompts >= 1, "1 or more is needed")
        if self.batch_size is None:
            self.batch_size = str(self.num_prompts if self.perf else 1)
        self.batches = self._numbers("batch_size")
        self.inputs = self._numbers("input_len")
        self.outputs = self._numbers("output_len")
        self.shape = self._shape()
        self._check_one_case()
        check_model_type(self)
        check_tokenizer(self)
        self.question = worded(self.prompt, self.prompt_template)

    def _check_one_case(self):
        lengths = [self.batches, self.outputs]
        if not self.image and not self.shape:  # a question about a picture has a length of its own
            lengths.append(self.inputs)
        if self.perf and max(map(len, lengths)) > 1:
            raise ToolkitError(
                "--perf measures one case: give one --batch-size, --input-len and --output-len"
            )

    @property
    def pictures(self) -> tuple:
        """Files of --image, or the black picture of --input-vision-shape."""
        if self.image or not self.shape:
            return self.image
        from PIL import Image

        height, width = self.shape
        return (Image.new("RGB", (width, height)),)

    def _shape(self) -> tuple[int, ...]:
        """(height, width) of --input-vision-shape; empty without one."""
        if self.input_vision_shape is None:
            return ()
        sides = self._numbers("input_vision_shape")
        fits = len(sides) == 2 and max(sides) <= LARGEST_SIDE
        rule = f"give height and width, each at most {LARGEST_SIDE}, e.g. 1120,1120"
        require(self, "input_vision_shape", fits, rule)
        return tuple(sides)

    def _numbers(self, name: str) -> list[int]:
        numbers = []
        for part in str(getattr(self, name)).split(","):
            positive = part.strip().isdigit() and int(part) > 0
            require(self, name, positive, "give numbers from 1 up, e.g. 1,2,4,8")
            numbers.append(int(part))
        return numbers


def check_model_type(options: BenchOptions):
    """ToolkitError for a --model-type that the checkpoint is not."""
    if options.model_type is None:
        return
    family = family_of(options.model)
    known = (family.name, str(family.config.get("model_type", "")))
    given = plain_name(options.model_type)
    names = [plain_name(name) for name in known]
    base = plain_name(family.name.partition("-1.")[0])  # llava is the guide's name of llava-1.5
    require(
        options,
        "model_type",
        given in (*names, base) and given != "",
        f"{options.model} is {family.name}; leave --model-type out, the checkpoint says what it is",
    )


def plain_name(name: str) -> str:
    """ "GLM-4V" -> "glm4v"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def check_tokenizer(options: BenchOptions):
    """ToolkitError for a --tokenizer that is not the model's own."""
    if options.tokenizer is None:
        return
    own = Path(options.tokenizer).resolve() == Path(options.model).resolve()
    require(
        options,
        "tokenizer",
        own,
        f"the tokenizer beside the weights is used; leave it out, or give {options.model}",
    )


def worded(question: str, template: str | None) -> str:
    """The question in the words of --prompt-template; what marks roles and pictures in either is
    left out, because the model's own frame has it. ToolkitError for a template without a place."""
    question = without_frame("--prompt", question)
    if template is None:
        return question
    words = without_frame("--prompt-template", template)
    try:
        text = words.format(question)
        other = words.format(question + "?")
    except (IndexError, KeyError, ValueError, AttributeError):
        text = other = ""
    if text == other:
        raise ToolkitError(
            f"--prompt-template is {template!r}: it needs exactly one {{}} where the question goes, "
            "e.g. 'Question: {} Answer briefly.'"
        )
    return text


def without_frame(name: str, text: str) -> str:
    """The text of a flag without marks of roles and pictures, after a note; \\n, as a shell leaves
    it, is a new line."""
    lines = text.replace("\\n", "\n")
    words = FRAME.sub("", lines)
    if words != lines:
        note(f"{name}: its marks of roles and pictures are left out, the model's frame has them")
    return words.strip()
