"""What a family fills in: decoder settings, weight table, prompt layout, image rule. Pure data and types, no device.

Canonical decoder names (what `decoder.py` and the runtime know); every family maps its checkpoint onto them:
    embed.weight  layers.{i}.attention_norm  layers.{i}.qkv  layers.{i}.out  layers.{i}.mlp_norm  layers.{i}.up
    layers.{i}.down  final_norm  lm_head.weight                                  (.weight [out, in], .bias where present)
qkv holds the rows [q; k; v], heads in order, q and k rows permuted so that one full-width half-rotation serves every
family. `up` is the fused [gate; up] for SwiGLU. Vision weights keep the tower module's own names, prefixed "vision.".
"""
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


class ModelError(Exception):
    """A checkpoint, picture or prompt that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class Rope:
    """Rotary angles: `channels` position channels, each with angles pos / theta^(2j/dim), j < dim/2.

    The row handed to the kernels is [c, c], c = angles of all channels, then zeros (no rotation) up to head_dim/2.
    """
    dim: int
    channels: int = 1
    theta: float = 10000.0
    half_rounded: bool = False      # ChatGLM-6B rounds the frequencies to fp16 when they are built


@dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope: Rope
    eps: float
    max_length: int
    norm: str = "rms"                       # "rms" | "layer"
    activation: str = "swiglu"              # "swiglu" | "gelu_tanh"
    residual_alpha: float | None = None     # ChatGLM-6B: x = norm(x) * alpha + branch(norm(x)); None = plain pre-norm


@dataclass(frozen=True)
class VisionSpec:
    """The exported encoder's interface: one input, one output, fixed shapes (batch first)."""
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]           # (1, rows, decoder hidden)
    input_name: str = "input"
    output_name: str = "output"

    @property
    def rows(self) -> int:
        return self.output_shape[1]


@dataclass(frozen=True)
class Part:
    """Where (a piece of) a checkpoint tensor goes. `take` = rows of the source, `at` = (row offset, total rows) in the target.

    `transform` is applied to the piece (fp tensors of any dtype) before it is stored; one on q rows alone, or on k rows
    alone, works head by head, so that it also serves for some of the heads.
    """
    target: str
    take: tuple[int, int] | None = None
    at: tuple[int, int] | None = None
    transform: Callable | None = None


@dataclass(frozen=True)
class Weight:
    """One row of a weight table: checkpoint name, its exact shape, and where its parts go (none = known and dropped)."""
    source: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    optional: bool = False


def pair(source: str, shape: tuple[int, ...], target: str, transform=None, bias: bool = True):
    """Table rows of a layer's weight and bias; the bias has the weight's first dimension and the same transform."""
    yield Weight(source + ".weight", shape, (Part(target + ".weight", transform=transform),))
    if bias:
        yield Weight(source + ".bias", shape[:1], (Part(target + ".bias", transform=transform),))


def transposed(weight):
    return weight.t()


def dense(source: str, outputs: int, inputs: int, target: str, bias: bool = True):
    """Table rows of a tower's linear layer, whose weight we keep as [in, out]."""
    yield Weight(source + ".weight", (outputs, inputs), (Part(target + ".weight", transform=transposed),))
    if bias:
        yield Weight(source + ".bias", (outputs,), (Part(target + ".bias"),))


def fused_dense(source: str, outputs: int, inputs: int, targets: list[str]):
    """Table rows of a tower's fused projection (row blocks of `outputs` each), split into one linear layer per target."""
    def parts(suffix, transform=None):
        return tuple(Part(t + suffix, take=(i * outputs, (i + 1) * outputs), transform=transform)
                     for i, t in enumerate(targets))
    total = outputs * len(targets)
    yield Weight(source + ".weight", (total, inputs), parts(".weight", transposed))
    yield Weight(source + ".bias", (total,), parts(".bias"))


@dataclass
class Layout:
    """How a prompt of T tokens lies in the sequence.

    positions [T, channels] int64; the first generated token is at next_position [channels] and every later one moves by
    position_step [channels]. The first `bidirectional` tokens see each other both ways (prefix-LM), the rest is causal.
    image_starts: row where each picture's features are spliced in.
    """
    positions: np.ndarray
    next_position: tuple[int, ...]
    position_step: tuple[int, ...]
    bidirectional: int = 0
    image_starts: tuple[int, ...] = ()


@dataclass
class Prompt:
    """ids int64 [T] after image expansion; pixels: one array per picture, in the vision encoder's input layout."""
    ids: np.ndarray
    pixels: list[np.ndarray]
    layout: Layout
    text: str = ""


@dataclass(frozen=True)
class SamplingDefaults:
    """What the release samples with when the user says nothing; generation_config.json overrides it."""
    max_length: int                     # prompt + answer, as the releases count
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0                      # 0 = off
    repetition_penalty: float = 1.0


class Family:
    """One released model family. A subclass file holds all that is particular to it; see `visualglm.py`.

    To fill in: `name`, `matches`, `decoder`, `weights`, `tokenizer`, `prompt`, `prompt_from_ids`, `release_sampling`,
    `stop_ids`; for a family with pictures `vision`, `vision_encoder` and `pixels` too.
    """
    name: str
    vision: VisionSpec | None = None
    encoder_cosine = 0.999              # of every feature row, below which a compiled encoder is not used
    takes_tools = False                 # knows functions to call: has `called` and `may_call` beside what is below
    prefix_lm = False                   # a prompt's tokens, but for its last, see each other both ways
    languages = ("zh", "en")            # prompt wordings; the first is the default

    def __init__(self, directory: Path, config: dict):
        self.directory, self.config = Path(directory), config

    @classmethod
    def matches(cls, config: dict) -> str | None:
        """The rule by which this family owns the config, as a phrase for the user, or None."""
        raise NotImplementedError

    def sampling(self, with_picture: bool) -> SamplingDefaults:
        """Release defaults, overridden by the directory's generation_config.json."""
        defaults, given = self.release_sampling(with_picture), self._generation_config()
        known = {k: given[k] for k in defaults.__dataclass_fields__ if given.get(k) is not None}
        if given.get("do_sample") is False:
            known["temperature"] = 0.0
        return replace(defaults, **known)

    def clean(self, answer: str) -> str:
        """The answer as the release shows it."""
        return answer

    def unsettled(self, answer: str) -> int:
        """How many characters at the end of an unfinished answer `clean` may still change when more text follows."""
        return 0

    def one_picture_at_most(self, pictures: int):
        if pictures > 1:
            raise ModelError(f"{self.name} takes one picture per conversation, {pictures} given; send one picture")

    def _generation_config(self) -> dict:
        path = self.directory / "generation_config.json"
        return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; give --model the folder of a downloaded checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); download it again") from None


def split_content(content) -> tuple[list, str]:
    """A message's content (text, or OpenAI-style parts) -> (pictures, text)."""
    if isinstance(content, str):
        return [], content
    pictures, texts = [], []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            texts.append(part["text"])
        elif kind == "image":
            pictures.append(part["image"])
        else:
            raise ModelError(f"content part of type {kind!r} is not known; use 'text' or 'image'")
    return pictures, "".join(texts)
