"""What a family fills in: decoder settings, weight table, prompt layout, image rule. No device.

Canonical names of the decoder's tensors, .weight [out, in] and .bias where there is one, which the
decoder and the runtime know; every family maps its checkpoint onto them:

    embed.weight  lm_head.weight  final_norm
    layers.{i}.attention_norm  layers.{i}.qkv  layers.{i}.out
    layers.{i}.mlp_norm        layers.{i}.up   layers.{i}.down
    layers.{i}.attention_post_norm  layers.{i}.mlp_post_norm   (with DecoderConfig.post_norms)

qkv holds the rows [q; k; v], heads in order, q and k rows permuted so that one full-width
half-rotation serves every family. `up` is the fused [gate; up] for SwiGLU. Vision weights keep the
tower module's own names, prefixed "vision.".
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from .config import VisionSpec
from .errors import ModelError
from .generation_config import read_generation_config
from .side_fields import shown


@dataclass
class Layout:
    """Positions and attention of a prompt of T tokens.

    positions [T, channels] int64; the first generated token is at next_position [channels] and
    every later one moves by position_step [channels]. The first `bidirectional` tokens attend to
    each other in both directions (prefix-LM), the rest is causal. image_starts: the row at which
    each image's features begin.
    """

    positions: np.ndarray
    next_position: tuple[int, ...]
    position_step: tuple[int, ...]
    bidirectional: int = 0
    image_starts: tuple[int, ...] = ()


@dataclass
class Prompt:
    """ids int64 [T], with a placeholder for every image row.

    pixels: one array per image, float32 [1, S, S, 3], the vision encoder's input.
    """

    ids: np.ndarray
    pixels: list[np.ndarray]
    layout: Layout
    text: str = ""

    @cached_property
    def image_digests(self) -> list[bytes]:
        """SHA-256 of each image's pixels: images of the same digest have the same features."""
        return [hashlib.sha256(pixels.tobytes()).digest() for pixels in self.pixels]


def id_array(values, name: str = "ids") -> np.ndarray:
    """Ids of tokens or rows, in any number of axes -> int64 [T]; ModelError for what is none."""
    try:
        array = np.asarray(values).reshape(-1)
    except ValueError:  # lists of different lengths
        array = np.empty(1, object)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ModelError(
            f"{name} are whole numbers, not {shown(values)}; give them as a list or an array"
        )
    return array.astype(np.int64)


@dataclass(frozen=True)
class SamplingDefaults:
    """What the release samples with by default; generation_config.json overrides it."""

    max_length: int  # prompt + answer, as the releases count
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None  # of one answer; None = as many as max_length leaves


class Family:
    """One released model family. The file of a subclass holds all that is particular to it.

    To fill in: `name`, `matches`, `decoder`, `weights`, `tokenizer`, `prompt`, `prompt_from_ids`,
    `release_sampling`, `stop_ids`; for a family with images `vision`, `vision_encoder` and `pixels`
    too. `visualglm.py` does all of it without a base class between.
    """

    name: str
    vision: VisionSpec | None = None
    encoder_cosine = 0.999  # of every feature row, below which a compiled encoder is not used
    takes_tools = False  # can call functions; such a family has `tool_call` and `may_be_tool_call`
    prefix_lm = False  # a prompt's tokens, except its last, attend to each other in both directions
    languages = ("zh", "en")  # prompt wordings; the first is the default

    def __init__(self, directory: Path, config: dict):
        self.directory = Path(directory)
        self.config = config

    @classmethod
    def matches(cls, config: dict) -> str | None:
        """The rule by which this family owns the config, as a phrase for the user, or None."""
        raise NotImplementedError

    def sampling(self, with_image: bool) -> SamplingDefaults:
        """What fills the gaps of a request: the release's defaults, overridden by the directory's
        generation_config.json.

        The repetition penalty is that of the file or none: one that nobody names would make
        temperature 0 something else than the most likely token.
        """
        plain = replace(self.release_sampling(with_image), repetition_penalty=1.0)
        return self._as_configured(plain)

    def chat_sampling(self, with_image: bool) -> SamplingDefaults:
        """As `sampling`, with the repetition penalty of the release's own chat program."""
        return self._as_configured(self.release_sampling(with_image))

    def _as_configured(self, defaults: SamplingDefaults) -> SamplingDefaults:
        given = self.generation_config
        known = {name: given[name] for name in defaults.__dataclass_fields__ if name in given}
        if given.get("do_sample") is False:
            known["temperature"] = 0.0
        return replace(defaults, **known)

    @cached_property
    def generation_config(self) -> dict:
        return read_generation_config(self.directory)

    def prepare_prompts(self):
        """Begins to load, beside what this process does, what its prompts will need."""

    def text_ids(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a prompt that is a text and no chat. special: with the special tokens that
        the release's tokenizer puts around every text."""
        return self.tokenizer.encode(text)

    def clean(self, answer: str) -> str:
        """The answer as the release shows it."""
        return answer

    def unstable_tail(self, answer: str) -> int:
        """How many characters at the end of an unfinished answer `clean` may still change."""
        return 0

    def encoder_inputs(self, pictures: list) -> dict[str, np.ndarray]:
        """The vision encoder's inputs for these pictures, each as `pixels` returns it."""
        return {self.vision.input_name: np.concatenate(pictures)}

    def image_rows(self, prompt: Prompt) -> list[slice]:
        """Where the feature rows of each image stand in a prompt."""
        found = []
        for start, picture in zip(prompt.layout.image_starts, prompt.pixels):
            found.append(slice(start, start + self.rows_of(picture)))
        return found

    def rows_of(self, picture) -> int:
        """Feature rows of one image, as `pixels` returns it."""
        return self.vision.rows

    def check_image_count(self, images: int):
        """ModelError if the family does not take so many images in one conversation."""
        if images > 1:
            raise ModelError(
                f"{self.name} takes one picture per conversation, {images} given; send one picture"
            )
