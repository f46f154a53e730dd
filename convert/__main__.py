"""`python -m convert`: a checkpoint directory in, an artifact directory with a verified vision encoder out.

Steps: identify, export, graph check, verify, publish; then, where CANN is installed, atc and the proof of its .om.
Idempotent; a killed run leaves nothing that looks whole, and the next run continues after the last completed step.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from runtime.common.errors import ToolkitError, run_command
from runtime.common.flags import Parser, check_folder, flag
from runtime.common.shared_flags import model_flag, output_flag

from .pipeline import convert, is_current, prepare


@dataclass(kw_only=True)
class ConvertOptions:
    model: str = model_flag()
    out: str = output_flag("artifact folder to write (made if missing)")
    soc_version: str = flag(
        "chip to compile for: Ascend and the name that `npu-smi info` shows",
        default="Ascend910B3",
        metavar="NAME",
    )
    precision_mode: str = flag(
        "precision mode of atc; auto takes fp16 and, where an NPU shows that it is not close "
        "enough, mixed_float16, then origin (fp32)",
        default="auto",
        metavar="MODE",
    )
    dynamic_batch: str | None = flag(
        "compile for several batch sizes, e.g. 1,2,4,8 (default: one picture)",
        default=None,
        metavar="SIZES",
    )
    aipp: bool = flag(
        "take uint8 pictures and normalise them in the NPU's AIPP unit", default=False, kind=bool
    )
    atc_arg: tuple[str, ...] = flag(
        "further option of atc, repeatable: --atc-arg log=info",
        default=(),
        metavar="KEY=VALUE",
        many=True,
    )
    onnx_only: bool = flag(
        "stop at the verified ONNX, also where atc is installed", default=False, kind=bool
    )
    dry_run: bool = flag(
        "print the atc command and stop; needs config.json only", default=False, kind=bool
    )
    force: bool = flag(
        "replace an artifact in OUT, also one of another checkpoint", default=False, kind=bool
    )

    def __post_init__(self):
        from convert.atc.option_rules import check_soc, parse_extra, parse_gears, precision_option

        check_folder("model", self.model)
        check_soc(self.soc_version)
        if self.precision_mode != "auto":
            precision_option(self.precision_mode)
        self.gears = parse_gears(self.dynamic_batch) if self.dynamic_batch is not None else ()
        self.extra = parse_extra(self.atc_arg)

    def request(self):
        from convert.atc.command import Request

        return Request(self.soc_version, self.precision_mode, self.aipp, self.gears, self.extra)


def main(argv: list[str]) -> int:
    parser = Parser(
        "python -m convert",
        "--model DIR --out DIR [options]",
        "Exports the vision encoder of a checkpoint to ONNX, verifies it, and compiles it where CANN is "
        "installed.",
        {"conversion": ConvertOptions},
    )
    [options] = parser.parse(argv)
    from convert.atc.option_rules import check_path
    from models import family_of
    from models.checkpoint.quantized import stored_weights
    from models.checkpoint.reader import Checkpoint
    from runtime.common.files import locked
    from runtime.vision.artifact import ONNX

    from .atc import build as om
    from .atc import run as atc_run

    family = family_of(options.model)
    if family.vision is None:
        raise ToolkitError(
            f"{options.model} is a {family.name} model without a vision encoder: nothing to convert"
        )
    request = options.request()
    toolkit = None if options.onnx_only else atc_run.find()
    om.check(family, request, toolkit)
    if options.dry_run or toolkit:
        check_path(Path(options.out).resolve())
    if options.dry_run:
        print(om.plan(family, Path(options.out), request, toolkit))
        return 0
    checkpoint = Checkpoint(options.model)
    checkpoint.check(stored_weights(family))
    out = prepare(options.out)
    with locked(out):
        if options.force or not is_current(family, checkpoint, out):
            convert(family, checkpoint, out)
        print(f"ONNX verified: {out / ONNX}", flush=True)
        om.prepare(family, out, request)
        if toolkit:
            om.Build(family, out, request, toolkit).run()
        else:
            print(om.next_step(family, out, request))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
