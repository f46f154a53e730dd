"""`python -m convert.verify MODEL_DIR ONNX_DIR`, the child process of `verify`.

Takes the two directories, prints {image: Comparison} as JSON.
"""

import json
import sys
from dataclasses import asdict

from runtime.common.errors import run_command
from runtime.common.processes import die_with_parent

from .verification import measure


def main(argv: list[str]) -> int:
    die_with_parent()
    print(json.dumps(measure(*argv), default=asdict))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
