"""Measures this toolkit through its public API: answers of Engine as `runtime.bench` times them, features of an image."""

import os
import sys
import time
from pathlib import Path

import job

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image

from models import family_of
from models.checkpoint import Checkpoint
from runtime import Engine
from runtime.bench import workload
from runtime.bench.figures import case_figures
from runtime.vision.torch_session import plain_tower


def build(work, folder):
    """Packs the weights into the variant's folder."""
    if work["variant"] in ("int8", "int4") and not work.get("repeats"):
        open_engine(work, folder)


def open_engine(work, folder, **options):
    os.environ["ASCEND_VLM_CACHE"] = str(folder)
    torch.set_num_threads(work["threads"])
    return Engine(work["checkpoint"], dtype="bfloat16", **options, **language_options(work))


def language_options(work) -> dict:
    if work.get("repeats"):
        return {"max_model_len": 1024, "max_num_seqs": 1}
    options = {
        "max_model_len": work["prompt"] + max(work["new"], job.WARM_UP),
        "max_num_seqs": work["batch"],
        # all answers begin in the same step
        "max_num_batched_tokens": work["batch"] * work["prompt"],
    }
    if work["variant"] != "bfloat16":
        options["cpu_weights"] = work["variant"]
    return options


def run(work, folder):
    measure = encode if work.get("repeats") else generate
    return {"version": f"ascend-vlm, torch {torch.__version__}", **measure(work, folder)}


def generate(work, folder):
    start = time.perf_counter()
    engine = open_engine(work, folder)
    loaded = time.perf_counter() - start
    rng = np.random.default_rng(work["seed"])

    def answer(new):
        prompts = workload.text_prompts(engine, work["batch"], work["prompt"], rng)
        figures = case_figures(workload.run(engine, prompts, new))
        return {
            "first_s": figures["FirstTokenTime(ms)"] / 1000,
            "token_s": figures["TimePerTokens(ms)"] / 1000,
        }

    answer(job.WARM_UP)
    return {"load_s": loaded, "settings": "; ".join(engine.describe()), **answer(work["new"])}


def encode(work, folder):
    """Times images that differ in one pixel, so that each is encoded. eager: the plain module in float32."""
    if work["variant"] == "eager":
        return eager(work)
    options = {} if work["variant"] == "default" else {"vision_precision": work["variant"]}
    engine = open_engine(work, folder, artifact=work["artifact"], **options)
    rng = np.random.default_rng(work["seed"])
    image = Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8))
    prompts = iter(workload.image_prompts(engine, [image], 1 + work["repeats"], rng))
    seconds = job.median_time(lambda: engine.features(next(prompts)), work)
    return {"encode_s": seconds, "settings": "; ".join(engine.describe())}


def eager(work):
    torch.set_num_threads(work["threads"])
    family = family_of(work["checkpoint"])
    tower = plain_tower(family, Checkpoint(family.directory), torch.float32)
    pixels = torch.rand(family.vision.input_shape)
    with torch.inference_mode():
        return {"encode_s": job.median_time(lambda: tower(pixels), work)}


if __name__ == "__main__":
    job.main(build, run)
