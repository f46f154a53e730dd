"""Measures OpenVINO GenAI on optimum-intel's export (int8 per channel, int4 in groups of 128).

Encoders: OpenVINO on our ONNX.
"""

import time
from pathlib import Path

import job


def build(work, folder):
    if work.get("repeats"):
        return
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    wanted = {
        "int8": OVWeightQuantizationConfig(bits=8),
        "int4": OVWeightQuantizationConfig(bits=4, sym=True, group_size=128, ratio=1.0),
    }[work["variant"]]
    model = OVModelForCausalLM.from_pretrained(
        work["checkpoint"], export=True, compile=False, stateful=True, quantization_config=wanted
    )
    model.save_pretrained(folder)
    save_tokenizer(folder, work["checkpoint"])


def save_tokenizer(folder, checkpoint):
    """GenAI opens no model without a tokenizer, although prompts are given as ids."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    parts = convert_tokenizer(AutoTokenizer.from_pretrained(checkpoint), with_detokenizer=True)
    for name, part in zip(("tokenizer", "detokenizer"), parts):
        openvino.save_model(part, folder / f"openvino_{name}.xml")


def run(work, folder):
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": work["threads"],
        "ENABLE_CPU_PINNING": True,
        "PERFORMANCE_HINT": "LATENCY",
    }
    measure = encode if work.get("repeats") else generate
    return {
        "version": f"openvino {openvino.__version__}",
        **measure(work, folder, openvino, settings),
    }


def generate(work, folder, openvino, settings):
    import numpy as np
    import openvino_genai

    start = time.perf_counter()
    pipe = openvino_genai.LLMPipeline(folder, "CPU", **settings)
    loaded = time.perf_counter() - start

    def answer(turn, new):
        ids = np.array(job.prompts(work, turn), dtype=np.int64)
        config = openvino_genai.GenerationConfig(
            max_new_tokens=new,
            min_new_tokens=new,
            ignore_eos=True,
            do_sample=False,
            apply_chat_template=False,
        )
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        metrics = pipe.generate(inputs, config).perf_metrics
        first_ms = metrics.get_ttft().mean
        token_ms = metrics.get_tpot().mean
        return {"first_s": first_ms / 1000, "token_s": token_ms / 1000}

    answer(0, job.WARM_UP)
    return {"load_s": loaded, **answer(1, work["new"])}


def encode(work, folder, openvino, settings):
    import numpy as np

    core = openvino.Core()
    model = core.compile_model(
        Path(work["onnx"]), "CPU", settings | {"INFERENCE_PRECISION_HINT": work["precision"]}
    )
    shape = [d.get_length() if d.is_static else 1 for d in model.input(0).partial_shape]
    pixels = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    return {"encode_s": job.median_time(lambda: model([pixels]), work)}


if __name__ == "__main__":
    job.main(build, run)
