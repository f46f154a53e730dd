"""Which linear layers stay float from the start, and how activations are measured: what Ascend
publishes for GLM-4-9B and LLaVA, applied to their relatives.

Takes a family, a scheme and the user's options, returns a recipe and names of linear layers. Layers
that become one in the engines (q, k and v; gate and up) stay float together, because vllm-ascend
refuses mixed ones.
"""

import fnmatch
import math
from dataclasses import dataclass, replace
from itertools import chain

from models.checkpoint.table import WeightTable
from runtime.common.errors import ToolkitError

from .layer_module import LayerModule, linear_groups, release_memory
from .msmodelslim_calls import private_directory, sample_numbers
from .options import RecipeOptions

SHARE = 25 / 160  # disable_level L25 of the 160 linear layers of GLM-4-9B
NUM_MEASURED = 5  # samples on which msmodelslim measures input ranges


@dataclass(frozen=True)
class Recipe:
    """share: of the linear layers, how many stay float because their inputs have the widest ranges.
    float_groups: groups that stay float in every layer. anti: anti-outlier method, None for
    none."""

    act_method: int = 3  # histogram for narrow inputs, min-max for wide ones
    share: float = 0.0
    float_groups: tuple[str, ...] = ()
    anti: str | None = None


RECIPES = {
    ("llava", "w8a8"): Recipe(act_method=2, float_groups=("down",), anti="m2"),
    ("any", "w8a8"): Recipe(share=SHARE),
    # sparse weights: the attention's output alone
    ("any", "w8a8s"): Recipe(act_method=1, float_groups=("qkv", "up", "down")),
    ("any", "w8a8-dynamic"): Recipe(),
    ("any", "w8a16"): Recipe(),
}


def recipe_for(family, scheme: str) -> Recipe:
    """The published recipe, that of the family or else the one for all."""
    return RECIPES.get((family.name, scheme)) or RECIPES["any", scheme]


def chosen_recipe(family, scheme: str, options: RecipeOptions) -> Recipe:
    """The published recipe with what the user sets instead; ToolkitError if that is not possible
    with the scheme."""
    recipe = recipe_for(family, scheme)
    if options.act_method:
        recipe = replace(recipe, act_method=options.act_method)
    if options.anti == "none":
        recipe = replace(recipe, anti=None)
    elif options.anti:
        recipe = replace(recipe, anti=options.anti)
    if scheme == "w8a8s" and recipe.act_method == 3:
        raise ToolkitError("--act-method 3 is not possible with --scheme w8a8s; use 1 or 2")
    return recipe


def num_widest(level: str | None, share: float, family) -> int:
    """How many linear layers with the widest inputs stay float. level: --disable-level, "L25" for
    25; None: by `share`."""
    if level is not None:
        return int(level[1:])
    return round(share * len(linear_groups(family)))


def kept_by_name(family, patterns) -> set[str]:
    """Linear layers whose checkpoint name matches one of `patterns`; ToolkitError for a pattern
    that matches none."""
    names = list(chain.from_iterable(linear_groups(family).values()))
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
    """Linear layers of `groups`, e.g. ("down",), in every layer."""
    kept = set()
    for (_, group), names in linear_groups(family).items():
        if group in groups:
            kept.update(names)
    return kept


def whole_groups(family, names: set[str]) -> set[str]:
    """The linear layers `names` and those that become one with them."""
    whole = set()
    for group in linear_groups(family).values():
        if not names.isdisjoint(group):
            whole.update(group)
    return whole


def check_fraction(family, fraction: float, kept: set[str]):
    """ToolkitError if `fraction` of some sparse layer's columns is less than one column. kept:
    layers that stay float."""
    for row in WeightTable(family.weights()).layers():
        sparse = len(row.shape) == 2 and row.module not in kept
        if sparse and int(row.shape[1] * fraction) < 1:
            least = math.ceil(100 / row.shape[1]) / 100
            raise ToolkitError(
                f"--fraction {fraction:g} of the {row.shape[1]} columns of {row.module} is no column; "
                f"use --fraction {least:g} or more (at most 0.1), or another --scheme"
            )


def kept_by_range(family, ranges: dict[str, float], count: int, kept: set[str]) -> set[str]:
    """The `count` linear layers with the widest inputs (msmodelslim's disable_level) beside those
    `kept` already, and those that become one with them."""
    by_range = sorted(ranges, key=ranges.get, reverse=True)
    widest = [name for name in by_range if name not in kept][:count]
    return whole_groups(family, set(widest))


def input_ranges(family, checkpoint, samples, advance) -> dict[str, float]:
    """max |x| / standard deviation of every linear layer's input in the float model, as msmodelslim
    measures it on the first five samples. advance() is called after each layer."""
    samples = samples[:NUM_MEASURED]
    steps = [sample.step for sample in samples]
    streams = [sample.stream for sample in samples]
    ranges = {}
    for index in range(family.decoder.layers):
        layer = LayerModule(family, checkpoint, index, steps)
        layer.streams = streams
        ranges |= layer_input_ranges(layer)
        streams = [layer.outputs[number] for number in range(len(samples))]
        del layer
        release_memory()
        advance()
    return ranges


def layer_input_ranges(layer: LayerModule) -> dict[str, float]:
    """input_ranges of one layer, on the samples in layer.streams; fills layer.outputs."""
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.quant_tools import get_features

    data = sample_numbers(len(layer.streams))
    with private_directory():
        features = get_features(layer, data, "features.npy", False)
    ranges = {}
    for name, found in features.items():
        largest = max(abs(found["t_max"]), abs(found["t_min"]))
        ranges[name] = (largest / found["std"]).item()
    return ranges
