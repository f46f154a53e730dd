"""Which linear layers stay float from the start, and how activations are measured: what Ascend publishes for GLM-4-9B and
LLaVA, applied to their relatives.

A family, a scheme and the user's wishes flow in; names flow out. Layers that become one in the engines (q, k and v; gate
and up) stay float together, because vllm-ascend refuses mixed ones.
"""

import fnmatch
from dataclasses import dataclass

from runtime.common.errors import ToolkitError

from . import msmodelslim_calls as slim
from .layer_module import LayerModule, linear_groups, release_memory

SHARE = 25 / 160  # disable_level L25 of the 160 linear layers of GLM-4-9B


@dataclass(frozen=True)
class Recipe:
    """share: part of the linear layers kept float because their inputs have the widest range; keep: groups kept float."""

    act_method: int = 3  # histogram for narrow inputs, min-max for wide ones
    share: float = 0.0
    keep: tuple[str, ...] = ()
    anti: str | None = None


RECIPES = {
    ("llava", "w8a8"): Recipe(act_method=2, keep=("down",), anti="m2"),
    ("any", "w8a8"): Recipe(share=SHARE),
    ("any", "w8a8s"): Recipe(
        act_method=1, keep=("qkv", "up", "down")
    ),  # sparse weights: the attention's output alone
    ("any", "w8a8-dynamic"): Recipe(),
    ("any", "w8a16"): Recipe(),
}


def recipe_for(family, scheme: str) -> Recipe:
    return RECIPES.get((family.name, scheme)) or RECIPES["any", scheme]


def kept_by_name(family, patterns) -> set[str]:
    """Linear layers whose checkpoint name matches one of `patterns`; ToolkitError for a pattern that matches none."""
    names = [name for group in linear_groups(family).values() for name in group]
    kept = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ToolkitError(
                f"--keep-float {pattern} names no linear layer; they are called like {names[0]}, and * "
                "stands for anything"
            )
        kept |= set(found)
    return whole_groups(family, kept)


def kept_by_group(family, groups) -> set[str]:
    return {
        name
        for (_, group), names in linear_groups(family).items()
        if group in groups
        for name in names
    }


def whole_groups(family, names: set[str]) -> set[str]:
    return {
        name for group in linear_groups(family).values() if names & set(group) for name in group
    }


def kept_by_range(family, ranges: dict[str, float], level: int, already: set[str]) -> set[str]:
    """The `level` layers with the widest inputs, msmodelslim's disable_level, and those that become one with them."""
    widest = [name for name in sorted(ranges, key=ranges.get, reverse=True) if name not in already][
        :level
    ]
    return whole_groups(family, set(widest))


def input_ranges(family, checkpoint, samples, progress) -> dict[str, float]:
    """max |x| / standard deviation of every linear layer's input, as msmodelslim measures it on the first five samples."""
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.quant_tools import get_features

    samples = samples[:5]
    ranges = {}
    stream = [sample.stream for sample in samples]
    for index in range(family.decoder.layers):
        layer = LayerModule(family, checkpoint, index, [sample.step for sample in samples])
        layer.stream = stream
        with slim.private_directory():
            found = get_features(layer, slim.numbers(len(samples)), "features.npy", False)
        ranges |= {
            name: (max(abs(f["t_max"]), abs(f["t_min"])) / f["std"]).item()
            for name, f in found.items()
        }
        stream = [layer.outputs[i] for i in range(len(samples))]
        del layer
        release_memory()
        progress(index + 1, family.decoder.layers)
    return ranges
