"""`python -m convert`: checkpoint -> verified ONNX -> .om. The steps stand in pipeline.py."""
