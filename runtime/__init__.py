"""Run, measure and compare models: `from runtime import Engine, SamplingParams`."""


def __getattr__(name):      # torch is imported with the first use, so that `--help` of a command answers at once
    if name == "Engine":
        from .engine import Engine
        return Engine
    if name == "SamplingParams":
        from .options import SamplingParams
        return SamplingParams
    raise AttributeError(name)
