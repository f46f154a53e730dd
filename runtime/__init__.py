"""Run, measure and compare models: `from runtime import Engine, SamplingParams`."""

import os

# Large tensors in pages of 2 MB: weights are read through once per token, and with pages of 4 KB the
# lookup of addresses can cost more than reading. torch reads this with its first tensor; 0 switches
# it off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Threads that wait for each other spin for some 10 microseconds and then sleep. OpenMP's own 10
# milliseconds are lost for whoever needs the processor: beside other work answers come a hundred
# times slower. OpenMP reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "500")


def __getattr__(name):
    # torch is imported with the first use, so that `--help` of a command answers at once
    if name == "Engine":
        from runtime.engine.engine import Engine

        return Engine
    if name == "SamplingParams":
        from runtime.engine.options import SamplingParams

        return SamplingParams
    raise AttributeError(name)
