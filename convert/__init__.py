"""Checkpoint -> verified ONNX -> the atc command; `python -m convert` is the command, `__main__.py` has its steps."""
