"""transformers' own implementation as the reference of a comparison, for the families that it knows
natively.

Takes our prompt (ids and images as our family file makes them), returns features, greedy tokens and
teacher-forced logits, computed by none of our code. Nothing else in the toolkit imports
transformers.
"""

import inspect
import time

import numpy as np
import torch

from models import family_of
from models.checkpoint import Checkpoint
from models.config import PatchSpec
from models.family import Prompt
from models.network.vision_blocks import Normalize
from runtime.common.errors import MISSING_COMPONENT, ToolkitError
from runtime.engine.engine import Result
from runtime.engine.options import EngineOptions, SamplingParams

# model_type -> class
NATIVE = {
    "llava": "AutoModelForImageTextToText",
    "glm4v": "AutoModelForImageTextToText",
    "glm46v": "AutoModelForImageTextToText",
    "glm_ocr": "AutoModelForImageTextToText",
    "glm": "AutoModelForCausalLM",
    "glm4": "AutoModelForCausalLM",
}

TOKEN_TYPES = "mm_token_type_ids"  # 1 where a picture is; positions follow from it
ROPE_OF_5 = "rope_parameters"  # rotary settings in config.json, as transformers 5 writes them


class TransformersEngine:
    """The part of Engine's interface that a comparison needs; float32 on the CPU unless `dtype`
    says otherwise."""

    def __init__(self, model_dir, dtype: str = "float32"):
        self.family = family_of(model_dir)
        kind = self.family.config.get("model_type")
        sees = NATIVE.get(kind) == "AutoModelForImageTextToText"
        if kind not in NATIVE or (self.family.vision and not sees):
            raise ToolkitError(
                f"transformers has no implementation of {model_dir} ({self.family.rule}) of its own; "
                "leave --reference out to compare with our plain torch reference"
            )
        self.options = EngineOptions(dtype=dtype)
        self.vision_seconds = 0.0
        self.checkpoint = Checkpoint(self.family.directory)
        check_release(_transformers().__version__, self.family.config, model_dir)
        self.model = _load(NATIVE[kind], model_dir, getattr(torch, self.options.dtype))

    def prompt(self, messages: list[dict], language: str | None = None) -> Prompt:
        return self.family.prompt(messages, language or self.family.languages[0])

    def features(self, prompt: Prompt) -> np.ndarray:
        """float32 [images * rows, hidden]"""
        if not prompt.pixels:
            return np.zeros((0, self.family.decoder.hidden), np.float32)
        start = time.perf_counter()
        with torch.inference_mode():
            found = self.model.get_image_features(**self._image_inputs(prompt))
        self.vision_seconds += time.perf_counter() - start
        # an output object in newer releases, a list of images in others
        found = getattr(found, "pooler_output", found)
        return torch.cat(list(found)).float().numpy()

    def generate(self, prompts: list[Prompt], params: SamplingParams) -> list[Result]:
        """Greedy answers."""
        return [self._generate(prompt, params.max_tokens) for prompt in prompts]

    def _generate(self, prompt: Prompt, max_tokens: int) -> Result:
        with torch.inference_mode():
            ids = self.model.generate(
                **self._inputs(prompt),
                do_sample=False,
                max_new_tokens=max_tokens,
                repetition_penalty=1.0,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=list(self.family.stop_ids),
                pad_token_id=self.family.stop_ids[0],
            )
        tokens = ids[0, len(prompt.ids) :].tolist()
        finish_reason = "length"
        if tokens and tokens[-1] in self.family.stop_ids:
            tokens = tokens[:-1]
            finish_reason = "stop"
        text = self.family.clean(self.family.tokenizer.decode(tokens))
        return Result(tokens, text, finish_reason)

    def score(self, prompt: Prompt, token_ids: list[int]) -> np.ndarray:
        """float32 [n, vocab] of one pass over prompt and tokens; row i predicts token_ids[i]."""
        with torch.inference_mode():
            logits = self.model(**self._inputs(prompt, token_ids[:-1])).logits
        return logits[0, len(prompt.ids) - 1 :].float().numpy()

    def describe(self) -> list[str]:
        model = type(self.model).__name__
        return [
            f"model: {model} of transformers {_transformers().__version__}, "
            f"{self.options.dtype} on cpu"
        ]

    def _inputs(self, prompt: Prompt, more=()) -> dict:
        ids = torch.tensor([[*prompt.ids.tolist(), *more]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.pixels:
            inputs |= self._image_inputs(prompt)
        if TOKEN_TYPES in inspect.signature(self.model.forward).parameters:
            inputs[TOKEN_TYPES] = torch.zeros_like(ids)
            for rows in self.family.image_rows(prompt):
                inputs[TOKEN_TYPES][0, rows] = 1
        return inputs

    def _image_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """As the release's processor returns them."""
        if isinstance(self.family.vision, PatchSpec):
            rows = np.concatenate([picture.rows for picture in prompt.pixels])
            return {
                "pixel_values": torch.from_numpy(rows).to(self.model.dtype),
                "image_grid_thw": torch.tensor([[1, *picture.grid] for picture in prompt.pixels]),
            }
        return {"pixel_values": self._pixels(prompt)}

    def _pixels(self, prompt: Prompt) -> torch.Tensor:
        """Our raw NHWC pixels, normalised as the release's processor does: [n, 3, S, S]."""
        normalize = next(m for m in self._tower().modules() if isinstance(m, Normalize))
        return normalize(torch.from_numpy(np.concatenate(prompt.pixels))).to(self.model.dtype)

    def _tower(self):
        with torch.device("meta"):
            return self.family.vision_encoder()


def check_release(release: str, config: dict, model_dir):
    """ToolkitError where this release of transformers would compute other logits without a word:
    those before 5 take no notice of `rope_parameters`, none reads the first GLM-4.1V files."""
    texts = (config, config.get("text_config") or {})
    if config.get("model_type") == "glm4v" and not texts[1]:
        raise ToolkitError(
            f"transformers does not read {model_dir}/config.json, which has no text_config, and would "
            "compute with another model's sizes; leave --reference out, or take config.json from the "
            "newest release"
        )
    if int(release.split(".")[0]) < 5 and any(ROPE_OF_5 in text for text in texts):
        raise ToolkitError(
            f"transformers {release} does not read the {ROPE_OF_5} of {model_dir}/config.json and would "
            "compute other logits; run: pip install 'transformers>=5'",
            MISSING_COMPONENT,
        )


def _transformers():
    try:
        import transformers
    except ImportError:
        raise ToolkitError(
            "--reference transformers needs the package; pip install 'ascend-vlm[transformers]'",
            MISSING_COMPONENT,
        ) from None
    return transformers


def _load(cls: str, model_dir, dtype: torch.dtype):
    transformers = _transformers()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    make = getattr(transformers, cls).from_pretrained
    return make(str(model_dir), dtype=dtype, local_files_only=True).eval()
