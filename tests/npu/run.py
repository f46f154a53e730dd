"""`make test-npu`: check_launches.py under the real torch_npu wheel, once per chip and kernel set, on
stand-in CANN libraries.

    python tests/npu/run.py [pytest arguments]

The libraries are built when their sources change, beside the environment's packages.
"""

import os
import subprocess
import sys
from pathlib import Path

import stand_in_cann

HERE = Path(__file__).parent
LIBRARIES = Path(sys.prefix) / "stand-in-cann"
RUNS = (("Ascend910B3", "aclnn"), ("Ascend910B3", "atb"), ("Ascend310P3", "atb"))
READY = "libatb.so"  # built last


def environment(chip: str, kernels: str, log: Path) -> dict:
    """TASK_QUEUE_ENABLE=0: kernels are launched, and logged, by the calling thread."""
    ours = {
        "LD_LIBRARY_PATH": str(LIBRARIES),
        "STUB_SOC": chip,
        "STUB_LOG": str(log),
        "TESTED_KERNELS": kernels,
        "TASK_QUEUE_ENABLE": "0",
        "OMP_NUM_THREADS": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    return {
        name: value for name, value in os.environ.items() if not name.startswith("ASCEND_")
    } | ours


def up_to_date() -> bool:
    sources = [*(HERE / "cann").iterdir(), HERE / "stand_in_cann.py"]
    built = LIBRARIES / READY
    return built.is_file() and built.stat().st_mtime > max(
        source.stat().st_mtime for source in sources
    )


def starts() -> bool:
    """Whether torch_npu can be imported. From 2.10 on it does not start beside a torch that was
    built for CUDA: both register the same allocator settings."""
    log = LIBRARIES / "import.log"
    variables = environment(*RUNS[0], log)
    command = [sys.executable, "-c", "import torch_npu"]
    return subprocess.run(command, env=variables, stderr=subprocess.DEVNULL).returncode == 0


def main(arguments) -> int:
    if not up_to_date():
        print(f"building stand-in CANN libraries in {LIBRARIES}")
        stand_in_cann.build(LIBRARIES)
    if not starts():
        print(
            "torch_npu cannot be imported; if torch is a build for CUDA (python -c 'import torch; "
            f"print(torch.version.cuda)'), remove {sys.prefix} and run: make test-npu "
            "TORCH_INDEX=https://download.pytorch.org/whl/cpu",
            file=sys.stderr,
        )
        return 3
    failed = False
    for chip, kernels in RUNS:
        print(f"{chip}, --kernels {kernels}: torch_npu on stand-in CANN libraries", flush=True)
        command = [sys.executable, "-m", "pytest", str(HERE / "check_launches.py"), *arguments]
        variables = environment(chip, kernels, LIBRARIES / f"{chip}.log")
        failed |= subprocess.run(command, env=variables).returncode != 0  # or a signal
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
