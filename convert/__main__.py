"""`python -m convert`. Takes a checkpoint directory, writes an artifact directory with a verified
vision encoder.

Steps (pipeline.py): export, preflight, verify, publish; then, where CANN is installed, atc and the
verification of its .om. Idempotent: a second run does only what is missing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from runtime.common.errors import run_command
from runtime.common.flags import Parser, check_folder, flag
from runtime.common.shared_flags import model_flag, output_flag


@dataclass(kw_only=True)
class ConvertOptions:
    model: str = model_flag()
    out: str | None = output_flag(
        "artifact folder to write, made if missing (default: a folder in the cache); chat, serve, "
        "bench and predict find it without --artifact",
        default=None,
    )
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
    gears: str | None = flag(
        "pictures of any size: compile for so many patches of 14 x 14 pixels, e.g. 256,1024,4096 (default: "
        "chosen from the model's limits)",
        default=None,
        metavar="PATCHES",
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
    no_verify: bool = flag(
        "leave out the comparison with torch; the artifact says so, and so does whoever loads it, "
        "until it is compared: by the same command without this flag, or by runtime.compare",
        default=False,
        kind=bool,
    )
    dry_run: bool = flag(
        "print the atc command and stop; with --out it needs config.json only",
        default=False,
        kind=bool,
    )
    force: bool = flag(
        "replace an artifact in OUT, also one of another checkpoint", default=False, kind=bool
    )

    def __post_init__(self):
        from convert.atc import option_rules

        check_folder("model", self.model)
        option_rules.check_soc(self.soc_version)
        if self.precision_mode != "auto":
            option_rules.precision_option(self.precision_mode)
        self.batch_gears = ()
        if self.dynamic_batch is not None:
            self.batch_gears = option_rules.parse_gears(self.dynamic_batch)
        self.patch_gears = ()
        if self.gears is not None:
            self.patch_gears = option_rules.parse_patch_gears(self.gears)
        self.extra = option_rules.parse_extra(self.atc_arg)

    def om_request(self):
        """What to compile, as an OmRequest."""
        from convert.atc.command import OmRequest

        return OmRequest(
            self.soc_version,
            self.precision_mode,
            self.aipp,
            self.batch_gears,
            self.extra,
            self.patch_gears,
        )


def main(argv: list[str]) -> int:
    parser = Parser(
        "python -m convert",
        "--model DIR [--out DIR] [options]",
        "Exports the vision encoder of a checkpoint to ONNX, verifies it, and compiles it where CANN is "
        "installed.",
        {"conversion": ConvertOptions},
    )
    [options] = parser.parse(argv)
    from convert.atc.option_rules import check_path
    from convert.atc.plan import check_request, dry_run
    from convert.atc.run import find_atc
    from runtime.vision.artifact import cache_directory

    from .pipeline import Work, convert, open_source, vision_family

    family = vision_family(options.model)
    source = None
    if options.out is None or not options.dry_run:
        source = open_source(family)
    artifact_dir = Path(options.out) if options.out else cache_directory(source)
    request = options.om_request()
    installed = None if options.onnx_only else find_atc()
    check_request(family, request, installed)
    if options.dry_run or installed:
        check_path(artifact_dir.resolve())
    if options.dry_run:
        print(dry_run(family, artifact_dir, request, installed))
    else:
        work = Work(options.force, not options.no_verify)
        convert(source, artifact_dir, request, installed, work)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
