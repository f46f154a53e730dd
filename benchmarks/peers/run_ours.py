"""This toolkit through its public API: answers of Engine as `runtime.bench` times them, features of a picture."""

import os
import sys
import time
from pathlib import Path

import job

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def build(work, folder):
    """Packed weights belong into the variant's folder."""
    if work["variant"] in ("int8", "int4") and not work.get("repeats"):
        open_engine(work, folder)


def open_engine(work, folder, **options):
    os.environ["ASCEND_VLM_CACHE"] = str(folder)
    import torch

    from runtime import Engine

    torch.set_num_threads(work["threads"])
    return Engine(work["checkpoint"], dtype="bfloat16", **options, **language_options(work))


def language_options(work) -> dict:
    if work.get("repeats"):
        return {"max_model_len": 1024, "max_num_seqs": 1}
    packed = {"cpu_weights": work["variant"]} if work["variant"] != "bfloat16" else {}
    return packed | {
        "max_model_len": work["prompt"] + max(work["new"], job.WARM_UP),
        "max_num_seqs": work["batch"],
        "max_num_batched_tokens": work["batch"] * work["prompt"],
    }  # all answers begin in the same step


def run(work, folder):
    import torch

    found = {"version": f"ascend-vlm, torch {torch.__version__}"}
    return found | (encode if work.get("repeats") else generate)(work, folder)


def generate(work, folder):
    import numpy as np

    start = time.perf_counter()
    engine = open_engine(work, folder)
    loaded = time.perf_counter() - start
    from runtime.bench import workload as load

    dice = np.random.default_rng(work["seed"])

    def answer(new):
        lines = load.run(
            engine, load.text_prompts(engine, work["batch"], work["prompt"], dice), new
        )
        from runtime.bench.figures import case_figures

        found = case_figures(lines)
        return {
            "first_s": found["FirstTokenTime(ms)"] / 1000,
            "token_s": found["TimePerTokens(ms)"] / 1000,
        }

    answer(job.WARM_UP)
    return {"load_s": loaded, "settings": "; ".join(engine.describe()), **answer(work["new"])}


def encode(work, folder):
    """Every picture differs in one pixel, so that each is encoded. eager: the plain module in float32, for comparison."""
    if work["variant"] == "eager":
        return eager(work)
    import numpy as np
    from PIL import Image

    options = {} if work["variant"] == "default" else {"vision_precision": work["variant"]}
    engine = open_engine(work, folder, artifact=work["artifact"], **options)
    from runtime.bench import workload as load

    dice = np.random.default_rng(work["seed"])
    picture = Image.fromarray(dice.integers(0, 256, (224, 224, 3), dtype=np.uint8))
    prompts = iter(load.picture_prompts(engine, [picture], 1 + work["repeats"], dice))
    seconds = job.median_time(lambda: engine.features(next(prompts)), work)
    return {"encode_s": seconds, "settings": "; ".join(engine.describe())}


def eager(work):
    import torch

    from models import family_of
    from models.checkpoint.reader import Checkpoint
    from runtime.vision.torch_session import plain_tower

    torch.set_num_threads(work["threads"])
    family = family_of(work["checkpoint"])
    tower = plain_tower(family, Checkpoint(family.directory), torch.float32)
    pixels = torch.rand(family.vision.input_shape)
    with torch.inference_mode():
        return {"encode_s": job.median_time(lambda: tower(pixels), work)}


if __name__ == "__main__":
    job.main(build, run)
