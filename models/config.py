"""What a config says. Takes its fields, returns the decoder, rotary and vision settings in them."""

from dataclasses import dataclass

from .errors import ModelError
from .side_fields import shown

RELEASED = "take config.json from the release"
# pictures of any size: pixels along a side of a patch, patches along a side of the block that becomes
# one row of the sequence, equal frames that a picture counts as
PATCH = 14
MERGE = 2
FRAMES = 2
BLOCK_PATCHES = MERGE**2
PATCHES = "patches"  # name of the free dimension N of an encoder's inputs
BLOCKS = "blocks"  # of its output: N / MERGE^2
PATCH_VALUES = 3 * FRAMES * PATCH**2  # of a patch, which is a row of the encoder's input
LARGEST_GRID = 512  # patches along one side of a picture; released models have up to 80


@dataclass(frozen=True)
class Rope:
    """Rotary angles pos / theta^(2j/dim), j < dim/2, in each of `channels` position channels.

    With `sections` the angles are divided among the channels: the first sections[0] of them turn
    with the first channel's position, the next sections[1] with the second's, and so on.

    The row that the kernels take is [c, c] with c [head_dim / 2] = angles of all channels, then
    zeros (no rotation).
    """

    dim: int
    channels: int = 1
    theta: float = 10000.0
    half_rounded: bool = False  # ChatGLM-6B rounds the frequencies to fp16 when they are built
    sections: tuple[int, ...] = ()  # one number per channel, together dim / 2


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
    norm: str = "rms"  # "rms" | "layer"
    activation: str = "swiglu"  # "swiglu" | "gelu_tanh"
    # ChatGLM-6B: x = norm(x) * alpha + branch(norm(x)); None = plain pre-norm
    residual_alpha: float | None = None
    # GLM-4-0414 and later: x += post_norm(branch(norm(x)))
    post_norms: bool = False

    def __post_init__(self):
        """ModelError for sizes that make no attention."""
        if self.heads % self.kv_heads:
            raise ModelError(
                f"config.json has {self.heads} attention heads, which its {self.kv_heads} key/value "
                f"heads do not divide; {RELEASED}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ModelError(
                f"config.json gives every attention head {self.head_dim} dimensions, which must be an "
                f"even number of at least 2; {RELEASED}"
            )
        if self.rope.dim < 2 or self.rope.dim % 2:
            raise ModelError(
                f"config.json rotates {self.rope.dim} of the {self.head_dim} dimensions of a head, "
                f"which must be an even number of at least 2; {RELEASED}"
            )
        sections = self.rope.sections
        if sections and (len(sections), sum(sections)) != (self.rope.channels, self.rope.dim // 2):
            raise ModelError(
                f"config.json divides the rotary angles into {shown(list(sections))}, which must be "
                f"{self.rope.channels} numbers that add up to {self.rope.dim // 2}; {RELEASED}"
            )


@dataclass(frozen=True)
class VisionSpec:
    """The exported encoder's interface: one input, one output, fixed shapes (batch first)."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]  # (1, rows, decoder hidden)
    input_name: str = "input"
    output_name: str = "output"

    @property
    def rows(self) -> int:
        return self.output_shape[1]

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {self.input_name: self.input_shape}


@dataclass(frozen=True)
class PatchSpec:
    """The interface of an exported encoder of pictures of any size: float32 inputs with a row per
    patch, one output with a row per block of them. Free dimensions have names."""

    widths: dict[str, int]  # columns of each input, in the order that the encoder takes them
    hidden: int
    output_name: str = "output"

    @property
    def inputs(self) -> dict[str, tuple[str, int]]:
        return {name: (PATCHES, width) for name, width in self.widths.items()}

    @property
    def output_shape(self) -> tuple[str, int]:
        return BLOCKS, self.hidden


def head_size(hidden: int, heads: int) -> int:
    """Dimensions of a head where a config names only both; ModelError if they do not divide."""
    if hidden % heads:
        raise ModelError(
            f"config.json has hidden_size {hidden}, which its {heads} attention heads do not "
            f"divide; {RELEASED}"
        )
    return hidden // heads


def patch_grid(side: int, patch: int, least: int = 1) -> int:
    """How many patches of `patch` pixels lie along a side of a picture; ModelError below `least`."""
    grid = side // patch
    if not least <= grid <= LARGEST_GRID:
        raise ModelError(
            f"config.json has image_size {side} and patch_size {patch}, which makes {grid} patches "
            f"along a side; it must be {least} to {LARGEST_GRID}; {RELEASED}"
        )
    return grid


def rope_of(config: dict, head_dim: int, factor: float = 1.0) -> Rope:
    """Rotary settings in old (rope_theta) or new (rope_parameters) spelling; where both stand there,
    transformers 5 takes what is in the group of parameters (rope_scaling before rope_parameters).

    factor: the part of head_dim that is rotated when the config does not say. ModelError for scaled
    positions, which this toolkit does not compute.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ModelError(
            f"config.json scales the rotary positions ({shown(kind)}), which this toolkit does not; "
            "use the released config.json"
        )
    theta = first_given(parameters.get("rope_theta"), config.get("rope_theta"), 10000.0)
    factor = first_given(
        parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor"), factor
    )
    return Rope(dim=int(head_dim * factor), theta=float(theta))


def first_given(*values):
    """The first value that is not null."""
    return next((value for value in values if value is not None), None)


def chosen(table: dict, config: dict, key: str, default: str):
    """table[config[key]]; ModelError with the known values when the config names another one."""
    value = config.get(key, default)
    if not isinstance(value, str) or value not in table:
        raise ModelError(
            f"config.json says {key} {shown(value)}, this toolkit knows {', '.join(map(repr, table))}; "
            "use the released config.json"
        )
    return table[value]


def check_fields(config: dict, wanted: dict, sentence: str):
    """ModelError for a field of `config` that is there and is not as `wanted`.

    sentence: the message, with {field}, {given} and {wanted} to fill in.
    """
    for field, value in wanted.items():
        given = config.get(field, value)
        if given != value:
            raise ModelError(sentence.format(field=field, given=shown(given), wanted=value))
