"""Measures ONNX Runtime on our exported encoder, in float32."""

import job


def build(work, folder):
    """Nothing to build: our ONNX is read as it is."""


def run(work, folder):
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = work["threads"]
    session = onnxruntime.InferenceSession(work["onnx"], options, ["CPUExecutionProvider"])
    wanted = session.get_inputs()[0]
    shape = [n if isinstance(n, int) else 1 for n in wanted.shape]
    pixels = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    return {
        "version": f"onnxruntime {onnxruntime.__version__}",
        "encode_s": job.median_time(lambda: session.run(None, {wanted.name: pixels}), work),
    }


if __name__ == "__main__":
    job.main(build, run)
