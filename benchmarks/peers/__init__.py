"""Workers that run the same random model in other runtimes, each from its PyPI package in an environment of its own.

`run_*.py` are the workers; all but run_ours.py import nothing of ours but `job`, so that they work in any environment.
The other modules belong to `bench_peers.py`.
"""
