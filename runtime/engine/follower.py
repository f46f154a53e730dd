"""`python -m runtime.engine.follower PID`: one rank of a split model, started by rank 0, whose
process id is PID."""

import os
import sys

from runtime.common.errors import USER_MISTAKE, run_command
from runtime.common.processes import die_with_parent
from runtime.parallel.team import follow

from .engine import Engine


def main(argv) -> int:
    die_with_parent()
    if os.getppid() != int(argv[0]):  # it died before we could ask
        return USER_MISTAKE
    return follow(Engine.of_rank)


if __name__ == "__main__":
    sys.exit(run_command(main))
