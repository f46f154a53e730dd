"""`python -m convert.nodes` finds the first node of an encoder that deviates (exit 1) or none (0).

Takes one image and one of three candidates, writes a table under msit's columns. An exported graph:
the ONNX node that ends a torch module against that module (graph.py). Another checkpoint's tower:
module against module (modules.py). The dump of an .om: every dumped operator against its ONNX node
(om_dump.py). torch runs block by block and leaves its results in files, the graph runs in pieces;
all elements are compared.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from runtime.common.errors import CHECK_FAILED, run_command
from runtime.common.flags import Parser, check_folder, flag, require
from runtime.common.shared_flags import model_flag

NAMED = 5  # operators that could not be compared, named on the screen; the table has all


@dataclass(kw_only=True)
class NodesOptions:
    model: str = model_flag("folder of the checkpoint, the reference")
    artifact: str | None = flag(
        "folder with vision.onnx, written by `python -m convert`", default=None, metavar="DIR"
    )
    candidate: str | None = flag(
        "another checkpoint, in place of --artifact: its tower against the reference's, module by "
        "module",
        default=None,
        metavar="DIR",
    )
    dump: str | None = flag(
        "dump of the .om made from --artifact, as npy or bin files of msaccucmp.py convert: its operators "
        "against the ONNX nodes",
        default=None,
        metavar="DIR",
    )
    out: str = flag("table of all compared nodes", metavar="FILE.csv")
    image: str | None = flag(
        "picture (default: a drawn one)", "--input-image", default=None, metavar="FILE"
    )
    save_input: str | None = flag(
        "also write what the encoder is fed, for ais_bench --input",
        default=None,
        metavar="FILE.npy",
    )
    limit: tuple[str, ...] = flag(
        "another limit, e.g. relative_euclidean=0.01 (default: 3e-5 and gain 5e-7; for a dump "
        "msit's: cosine_min 0.99, relative_euclidean 0.05, kl 0.005, rmse 1, mean_relative 1); may "
        "be repeated",
        default=(),
        metavar="MEASURE=X",
        many=True,
    )

    def __post_init__(self):
        from .limits import FP32, MSIT, read_limits

        check_folder("model", self.model)
        require(
            self,
            "artifact",
            bool(self.artifact) != bool(self.candidate),
            "give either --artifact or --candidate",
        )
        require(
            self,
            "artifact",
            not self.artifact or (Path(self.artifact) / "vision.onnx").is_file(),
            "there is no vision.onnx in it; give the --out folder of python -m convert",
        )
        for name in ("candidate", "dump"):
            if getattr(self, name):
                check_folder(name, getattr(self, name))
        require(
            self,
            "dump",
            not (self.dump and self.candidate),
            "it is compared with a graph; give --artifact",
        )
        for name in ("out", "save_input"):
            path = getattr(self, name)
            require(
                self,
                name,
                not path or Path(path).parent.is_dir(),
                "its folder does not exist; make it first",
            )
        self.limits = read_limits(self.limit, MSIT if self.dump else FP32)


def main(argv: list[str]) -> int:
    parser = Parser(
        "python -m convert.nodes",
        "--model DIR --artifact DIR --out FILE.csv [options]",
        "Compare the inside of a vision encoder with the reference, node by node. Exit code 0: all are within "
        "the limits, 1: the first that is not is named.",
        {"what to compare": NodesOptions},
    )
    [options] = parser.parse(argv)
    from runtime.common.files import write_atomically

    from .compare import compare_nodes
    from .msit_table import msit_table

    nodes = compare_nodes(options)
    write_atomically(Path(options.out), msit_table(nodes, options.limits))
    return print_results(nodes, options)


def print_results(nodes: list, options: NodesOptions) -> int:
    """Counts, what could not be compared, and the verdict; the exit code."""
    from .limits import describe_failure, passes

    compared = [node for node in nodes if node.measures]
    failed = [node for node in compared if not passes(node, options.limits)]
    print(f"{len(compared)} nodes compared, {len(failed)} depart; {options.out}")
    print_not_compared(nodes)
    if failed:
        golden_kind = "ONNX node" if options.dump else "torch module"
        print(f"FAILED: {describe_failure(failed[0], options.limits, golden_kind)}")
        return CHECK_FAILED
    worst = max(compared, key=lambda node: node.measures["relative_euclidean"])
    print(
        f"PASSED: the largest relative Euclidean distance, {worst.measures['relative_euclidean']:.2e}, is at "
        f"{worst.candidate}"
    )
    return 0


def print_not_compared(nodes: list):
    """One line per reason, with the first names."""
    reasons = Counter(node.reason for node in nodes if node.reason)
    for reason, count in reasons.items():
        names = []
        for node in nodes:
            if node.reason == reason:
                names.append(node.golden if node.candidate == "*" else node.candidate)
        more = " ..." if count > NAMED else ""
        print(f"{count} not compared, {reason}: {', '.join(names[:NAMED])}{more}")


if __name__ == "__main__":
    sys.exit(run_command(main))
