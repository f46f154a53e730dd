"""transformers' own implementation as the reference of a comparison, for the families that it knows natively.

The same prompt (ids and pictures as our family file makes them) flows in; features, greedy tokens and teacher-forced
logits flow out, computed by none of our code. Nothing else in the toolkit imports transformers.
"""

import numpy as np

from models import family_of
from models.checkpoint.reader import Checkpoint
from runtime.common.errors import MISSING_COMPONENT, ToolkitError
from runtime.engine.engine import Result
from runtime.engine.options import EngineOptions

NATIVE = {
    "llava": "AutoModelForImageTextToText",
    "glm": "AutoModelForCausalLM",
}  # model_type -> class


class TransformersEngine:
    """The part of Engine's interface that a comparison needs; float32 on the CPU unless `dtype` says otherwise."""

    def __init__(self, model_dir, dtype: str = "float32"):
        import torch

        self.family = family_of(model_dir)
        kind = self.family.config.get("model_type")
        if kind not in NATIVE or (self.family.vision and kind != "llava"):
            raise ToolkitError(
                f"transformers has no implementation of {model_dir} ({self.family.rule}) of its own; "
                "leave --reference out to compare with our plain torch reference"
            )
        self.options = EngineOptions(dtype=dtype)
        self.checkpoint = Checkpoint(self.family.directory)
        self.model = _load(NATIVE[kind], model_dir, getattr(torch, self.options.dtype))

    def prompt(self, messages, language=None):
        return self.family.prompt(messages, language or self.family.languages[0])

    def features(self, prompt) -> np.ndarray:
        """float32 [pictures * rows, hidden]"""
        import torch

        if not prompt.pixels:
            return np.zeros((0, self.family.decoder.hidden), np.float32)
        with torch.inference_mode():
            found = self.model.get_image_features(pixel_values=self._pictures(prompt))
        found = getattr(
            found, "pooler_output", found
        )  # an output object in newer releases, a list of pictures in others
        return torch.cat(list(found)).float().numpy()

    def generate(self, prompts, params) -> list[Result]:
        """Greedy answers."""
        import torch

        results = []
        for prompt in prompts:
            with torch.inference_mode():
                ids = self.model.generate(
                    **self._inputs(prompt),
                    do_sample=False,
                    max_new_tokens=params.max_tokens,
                    repetition_penalty=1.0,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=list(self.family.stop_ids),
                    pad_token_id=self.family.stop_ids[0],
                )
            tokens = ids[0, len(prompt.ids) :].tolist()
            stopped = bool(tokens) and tokens[-1] in self.family.stop_ids
            tokens = tokens[:-1] if stopped else tokens
            text = self.family.clean(self.family.tokenizer.decode(tokens))
            results.append(Result(tokens, text, "stop" if stopped else "length"))
        return results

    def score(self, prompt, token_ids) -> np.ndarray:
        """float32 [n, vocab]: one forward pass over prompt and tokens; row i predicts token_ids[i]."""
        import torch

        with torch.inference_mode():
            logits = self.model(**self._inputs(prompt, token_ids[:-1])).logits
        return logits[0, len(prompt.ids) - 1 :].float().numpy()

    def describe(self) -> list[str]:
        import transformers

        return [
            f"model: {type(self.model).__name__} of transformers {transformers.__version__}, {self.options.dtype} on cpu"
        ]

    def _inputs(self, prompt, more=()):
        import torch

        ids = torch.tensor([[*prompt.ids.tolist(), *more]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**inputs, "pixel_values": self._pictures(prompt)} if prompt.pixels else inputs

    def _pictures(self, prompt):
        """Our raw NHWC pixels, normalised as the release's processor does: [n, 3, S, S]."""
        import torch

        from models.network.vision_blocks import Normalize

        normalize = next(m for m in self._tower().modules() if isinstance(m, Normalize))
        return normalize(torch.from_numpy(np.concatenate(prompt.pixels))).to(self.model.dtype)

    def _tower(self):
        import torch

        with torch.device("meta"):
            return self.family.vision_encoder()


def _load(cls: str, model_dir, dtype):
    try:
        import transformers
    except ImportError:
        raise ToolkitError(
            "--reference transformers needs the package; pip install 'ascend-vlm[transformers]'",
            MISSING_COMPONENT,
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return (
        getattr(transformers, cls)
        .from_pretrained(str(model_dir), dtype=dtype, local_files_only=True)
        .eval()
    )
