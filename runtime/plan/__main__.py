"""`python -m runtime.plan`: what a model needs in memory on an Ascend chip, and roughly how fast it
will be.

Takes a config.json (weights are not needed), prints bytes per device, whether they fit, and
estimated times. `Engine` makes the same plan and checks it before anything is loaded.
"""

import json
import sys

from runtime.common.errors import CHECK_FAILED, run_command
from runtime.common.flags import Parser
from runtime.common.machine import gib

from .options import PlanOptions


def parser() -> Parser:
    return Parser(
        "python -m runtime.plan",
        "--model DIR [--soc SOC] [--tp N] [options]",
        "Memory per device and estimated speed of a model on Ascend chips, from its config.json alone. Exit code "
        "0: it fits, 1: it does not. The times are estimates, not measurements: see docs/plan.md.",
        {"options": PlanOptions},
    )


def main(argv: list[str]) -> int:
    [options] = parser().parse(argv)
    from .estimate import estimate, find_family

    found = estimate(find_family(options.model), options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(describe(found))
    return 0 if found["fits"] else CHECK_FAILED


def describe(found: dict) -> str:
    """The estimate as text."""
    return "\n".join(
        [
            f"{found['model']} on {found['devices']} x {found['soc']}, {found['dtype']}, "
            f"{found['batch']} sequences of {found['max_model_len']} tokens",
            "GiB per device:",
            *_memory_lines(found),
            "estimated, not measured:",
            *_time_lines(found),
        ]
    )


def _memory_lines(found: dict) -> list[str]:
    sizes = dict(found["bytes"])
    device = sizes.pop("device")
    total = sizes.pop("total")
    lines = []
    for name, size in sizes.items():
        lines.append(f"  {name.replace('_', ' '):<18}{gib(size):>7}")
    verdict = "fits"
    if not found["fits"]:
        verdict = "DOES NOT FIT: use more devices, a smaller --batch or a smaller --max-model-len"
    lines.append(f"  {'total':<18}{gib(total):>7} of {gib(device)}: {verdict}")
    return lines


def _time_lines(found: dict) -> list[str]:
    batch = found["batch"]
    first = (
        f"  first token of a {found['input_len']}-token prompt: {found['first_token_ms']:.0f} ms"
    )
    host_bound = found["first_token_host_bound_ms"]
    if host_bound > found["first_token_ms"]:
        first += f", up to {host_bound:.0f} ms where the host launches kernels slowly"
    together = found["batch_token_ms"]
    return [
        first,
        f"  per token: {found['token_ms']:.1f} ms alone, {together:.1f} ms for {batch} together "
        f"({batch * 1000 / together:.0f} tokens/s)",
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
