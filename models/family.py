"""What a family fills in: decoder settings, weight table, prompt layout, image rule. Pure data and types, no device.

Canonical decoder names (what `decoder.py` and the runtime know); every family maps its checkpoint onto them:
    embed.weight  layers.{i}.attention_norm  layers.{i}.qkv  layers.{i}.out  layers.{i}.mlp_norm  layers.{i}.up
    layers.{i}.down  final_norm  lm_head.weight                                  (.weight [out, in], .bias where present)
qkv holds the rows [q; k; v], heads in order, q and k rows permuted so that one full-width half-rotation serves every
family. `up` is the fused [gate; up] for SwiGLU. Vision weights keep the tower module's own names, prefixed "vision.".
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from .config import VisionSpec, read_json
from .errors import ModelError


@dataclass
class Layout:
    """How a prompt of T tokens lies in the sequence.

    positions [T, channels] int64; the first generated token is at next_position [channels] and every later one moves by
    position_step [channels]. The first `bidirectional` tokens see each other both ways (prefix-LM), the rest is causal.
    image_starts: row where each image's features are spliced in.
    """

    positions: np.ndarray
    next_position: tuple[int, ...]
    position_step: tuple[int, ...]
    bidirectional: int = 0
    image_starts: tuple[int, ...] = ()


@dataclass
class Prompt:
    """ids int64 [T] after image expansion; pixels: one array per image, in the vision encoder's input layout."""

    ids: np.ndarray
    pixels: list[np.ndarray]
    layout: Layout
    text: str = ""

    @cached_property
    def image_digests(self) -> list[bytes]:
        """SHA-256 of each image's pixels: images of the same digest have the same features."""
        return [hashlib.sha256(pixels.tobytes()).digest() for pixels in self.pixels]


@dataclass(frozen=True)
class SamplingDefaults:
    """What the release samples with when the user says nothing; generation_config.json overrides it."""

    max_length: int  # prompt + answer, as the releases count
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    repetition_penalty: float = 1.0


class Family:
    """One released model family. A subclass file holds all that is particular to it; see `visualglm.py`.

    To fill in: `name`, `matches`, `decoder`, `weights`, `tokenizer`, `prompt`, `prompt_from_ids`, `release_sampling`,
    `stop_ids`; for a family with images `vision`, `vision_encoder` and `pixels` too.
    """

    name: str
    vision: VisionSpec | None = None
    encoder_cosine = 0.999  # of every feature row, below which a compiled encoder is not used
    takes_tools = False  # knows functions to call: has `tool_call` and `may_be_tool_call` beside what is below
    prefix_lm = False  # a prompt's tokens, but for its last, see each other both ways
    languages = ("zh", "en")  # prompt wordings; the first is the default

    def __init__(self, directory: Path, config: dict):
        self.directory = Path(directory)
        self.config = config

    @classmethod
    def matches(cls, config: dict) -> str | None:
        """The rule by which this family owns the config, as a phrase for the user, or None."""
        raise NotImplementedError

    def sampling(self, with_image: bool) -> SamplingDefaults:
        """Release defaults, overridden by the directory's generation_config.json."""
        defaults = self.release_sampling(with_image)
        given = self._generation_config()
        known = {k: given[k] for k in defaults.__dataclass_fields__ if given.get(k) is not None}
        if given.get("do_sample") is False:
            known["temperature"] = 0.0
        return replace(defaults, **known)

    def clean(self, answer: str) -> str:
        """The answer as the release shows it."""
        return answer

    def unstable_tail(self, answer: str) -> int:
        """How many characters at the end of an unfinished answer `clean` may still change when more text follows."""
        return 0

    def check_image_count(self, images: int):
        if images > 1:
            raise ModelError(
                f"{self.name} takes one picture per conversation, {images} given; send one picture"
            )

    def _generation_config(self) -> dict:
        path = self.directory / "generation_config.json"
        return read_json(path) if path.is_file() else {}
