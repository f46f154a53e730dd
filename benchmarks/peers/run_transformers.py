"""Measures transformers: generate() as its users run it (sdpa attention), in the variant's dtype.

Encoders: CLIP's tower.
"""

import json
import time
from pathlib import Path

import job


def build(work, folder):
    """Nothing to build: the checkpoint is read as it is."""


def run(work, folder):
    import torch
    import transformers

    torch.set_num_threads(work["threads"])
    measure = tower if work.get("repeats") else generate
    return {
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        **measure(work, torch, transformers),
    }


def generate(work, torch, transformers):
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        work["checkpoint"], dtype=getattr(torch, work["variant"]), attn_implementation="sdpa"
    ).eval()
    loaded = time.perf_counter() - start
    stamps = []

    class Clock(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            stamps.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def answer(turn, new):
        stamps.clear()
        ids = torch.tensor(job.prompts(work, turn))
        settings = transformers.GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                stopping_criteria=[Clock()],
            )
        return job.means(stamps, start)

    answer(0, job.WARM_UP)
    return {"load_s": loaded, **answer(1, work["new"])}


def tower(work, torch, transformers):
    """Times CLIP's tower without the projector, with random weights: their values do not matter to the time."""
    stored = json.loads((Path(work["checkpoint"]) / "config.json").read_text())
    config = transformers.CLIPVisionConfig.from_dict(stored["vision_config"])
    model = transformers.CLIPVisionModel(config).to(getattr(torch, work["variant"])).eval()
    pixels = torch.rand(1, 3, config.image_size, config.image_size).to(model.dtype)
    with torch.inference_mode():
        return {"encode_s": job.median_time(lambda: model(pixels, output_hidden_states=True), work)}


if __name__ == "__main__":
    job.main(build, run)
