"""Options of `runtime.predict`."""

from dataclasses import dataclass
from pathlib import Path

from runtime.common.devices import device_name
from runtime.common.errors import ToolkitError
from runtime.common.flags import check_choices, check_folder, flag, require
from runtime.common.shared_flags import language_flag, media_path, media_path_flag, model_flag


@dataclass(kw_only=True)
class PredictOptions:
    model: str = model_flag()
    input: str | None = flag(
        "questions: a jsonl file with prompt, image, history, language per line",
        default=None,
        metavar="FILE",
    )
    out: str | None = flag(
        "answers: the jsonl file to be written; run again to continue after a kill",
        default=None,
        metavar="FILE",
    )
    examples: bool = flag(
        "instead of --input: the three pictures in the checkpoint's examples/ (or three drawn "
        "ones), with a question and its time each",
        default=False,
        kind=bool,
    )
    batch_size: int = flag("questions decoded together", default=1, kind=int, metavar="N")
    engine: str = flag(
        "what computes the batches: local one after another, ray over the devices of a cluster, "
        "or of this machine",
        default="local",
        choices=("local", "ray"),
    )
    actors: int | None = flag(
        "ray: how many engines (default: one per NPU; on the CPU one per machine)",
        default=None,
        kind=int,
        metavar="N",
    )
    against: str | None = flag(
        "answer on this device too (cpu, npu:N, cuda:N), or take the answers of a file that this "
        "command wrote, and show both side by side",
        default=None,
        metavar="DEVICE|FILE",
    )
    report: str = flag(
        "--against: the html page that is written", default="predict_report.html", metavar="FILE"
    )
    language: str | None = language_flag()
    allowed_local_media_path: str | None = media_path_flag()

    def __post_init__(self):
        check_choices(self)
        check_folder("model", self.model)
        media_path(self)
        require(self, "batch_size", self.batch_size >= 1, "1 or more is needed, e.g. 8")
        require(
            self,
            "actors",
            self.actors is None or (self.actors >= 1 and self.engine == "ray"),
            "1 or more is needed, and --engine ray",
        )
        if self.examples == bool(self.input):
            raise ToolkitError("give either --input FILE --out FILE, or --examples")
        self._check_against()
        if self.input and not self.against:
            require(
                self, "out", bool(self.out), "the answers need a file, e.g. --out answers.jsonl"
            )
            require(self, "input", Path(self.input).is_file(), "there is no such file")
            require(
                self,
                "out",
                Path(self.out).parent.is_dir(),
                "its folder does not exist; make it first",
            )

    def _check_against(self):
        """Sets `against_file` where the other side is a file, else the device's name."""
        self.against_file = None
        if self.against is None:
            return
        require(self, "engine", self.engine == "local", "--against compares in one process")
        if self.input:
            require(self, "input", Path(self.input).is_file(), "there is no such file")
        if Path(self.against).is_file():
            require(self, "against", bool(self.input), "answers of a file need --input")
            self.against_file = Path(self.against)
            return
        is_file_name = "." in self.against or "/" in self.against
        require(self, "against", not is_file_name, "there is no such file")
        self.against = device_name(self.against, "--against")
