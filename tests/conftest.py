"""For all tests: hypothesis draws the same examples in every run."""

from hypothesis import settings

settings.register_profile("suite", derandomize=True)
settings.load_profile("suite")
