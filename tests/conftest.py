"""For all tests: hypothesis, where it is installed, draws the same examples in every run."""

from importlib.util import find_spec

if find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("suite", derandomize=True)
    settings.load_profile("suite")
