"""Every check that MindIE-LLM and vllm-ascend (910B and 310P) make on their own, or fail to make
and then compute nonsense.

Takes a quantised folder, returns findings, each with the consumers it stops. Headers are read
first, then one tensor at a time.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import (
    FILE,
    TENSORS,
    Description,
    find_description,
    halves_of,
    stored_weights,
)
from models.errors import ModelError
from models.side_files import read_json
from quant.rank_shares import check_parts, find_parts
from runtime.common.files import checksum_problems
from runtime.parallel.split import Split

from .findings import A2, CONSUMERS, MINDIE, P310, Finding, Findings
from .layers import NEEDED, layer_findings

LOADED_BY = {
    "W8A8": CONSUMERS,
    "W8A8S": (MINDIE, P310),
    "W8A8SC": (MINDIE,),
    "W8A8_DYNAMIC": (MINDIE, A2),
    "W8A16": (MINDIE, A2),
    "W8A8_MIX": (MINDIE, A2),
    "W16A16S": (MINDIE,),
    "FLOAT": CONSUMERS,
    "C8": CONSUMERS,
}
SPARSE = ("W8A8S", "W8A8SC")
SCALES = TENSORS.keys() - {"weight"}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def validate(folder: Path) -> Findings:
    """Findings of a folder. Damage that hides the rest ends the search."""
    findings = Findings()
    try:
        for finding in _findings(Path(folder)):
            findings.found.append(finding)
    except ModelError as error:
        findings.found.append(Finding(str(error)))
    return findings


def _findings(folder: Path) -> Iterator[Finding]:
    """Of a folder, or of the folder of each rank in it; the ranks share its config.json."""
    parts = find_parts(folder)
    for problem in checksum_problems(folder):
        yield Finding(problem)
    for rank, part in enumerate(parts):
        for problem in checksum_problems(part):
            yield Finding(problem)
        for finding in _findings_of(part, folder, len(parts), rank):
            yield Finding(f"{part.name}: {finding.text}", finding.stops)
    if not parts:
        yield from _findings_of(folder, folder, 1, 0)


def _findings_of(folder: Path, top: Path, size: int, rank: int) -> Iterator[Finding]:
    """Of the weights in `folder`, which are those of `rank` of `size`; config.json is in `top`."""
    description = _description(folder)
    config = read_json(top / "config.json")
    dtype = _dtype(config)
    yield from _file_findings(folder, description)
    yield from _quantize_findings(config, description)
    yield from _dtype_findings(config, dtype)
    checkpoint = Checkpoint(folder)
    yield from _name_findings(description, checkpoint)
    yield from _table_findings(description, checkpoint, top, size, rank)
    yield from _kind_findings(description, dtype)
    yield from _fused_findings(description)
    yield from _half_findings(description)
    for layer in _quantised_layers(description):
        yield from layer_findings(layer, description.kind(layer), checkpoint, dtype)


def _description(folder: Path) -> Description:
    description = find_description(folder)
    if description is None:
        raise ModelError(
            f"{folder} has no quant_model_description.json; it is no quantised directory"
        )
    return description


def _dtype(config: dict) -> str | None:
    """Float type in config.json, under its old or new name, of the model or of its language
    model."""
    for settings in (config, config.get("text_config") or {}):
        if found := settings.get("torch_dtype") or settings.get("dtype"):
            return found
    return None


def _file_findings(folder: Path, description: Description) -> Iterator[Finding]:
    files = list(folder.glob("*.safetensors"))
    stray = [file.name for file in files if not file.name.startswith("quant_model_weight")]
    if stray:
        yield Finding(
            f"{min(stray)} lies beside the quantised weights: engines load every *.safetensors; move it away"
        )
    for file in files:
        if not os.access(file, os.R_OK) or not file.stat().st_mode & 0o044:
            yield Finding(
                f"{file.name} may be read by its owner only (msmodelslim writes it so); chmod 644",
                (),
            )
    if description.file.name != FILE:
        yield Finding(
            f"the description is called {description.file.name}; vllm-ascend looks for {FILE}: rename it",
            (A2, P310),
        )


def _quantize_findings(config: dict, description: Description) -> Iterator[Finding]:
    quantize = config.get("quantize")
    kind = description.type.lower()
    if quantize is None and description.file.name != FILE:
        yield Finding(
            "config.json has no quantize, from which MindIE makes the description's old name",
            (MINDIE,),
        )
    elif quantize is None:
        yield Finding("config.json has no quantize; MindIE takes the description's type", ())
    elif quantize != kind:
        yield Finding(
            f"config.json says quantize {quantize!r}, the description {kind!r}", (MINDIE,)
        )


def _dtype_findings(config: dict, dtype: str | None) -> Iterator[Finding]:
    if dtype not in ("float16", "bfloat16"):
        yield Finding(
            f"config.json gives {dtype} as torch_dtype; int8 layers are defined for float16 and bfloat16"
        )
    elif "torch_dtype" not in config or "dtype" not in config:
        yield Finding(
            "config.json has only one of torch_dtype and dtype; older and newer transformers read one each",
            (),
        )
    if dtype == "bfloat16":
        yield Finding("the 310P does not support bfloat16; quantise with --dtype float16", (P310,))


def _name_findings(description: Description, checkpoint: Checkpoint) -> Iterator[Finding]:
    described = set(description.kinds)
    stored = set(checkpoint.names)
    if names := described - stored:
        yield Finding(f"{len(names)} tensors are described but not stored, e.g. {min(names)}")
    if names := stored - described:
        yield Finding(f"{len(names)} tensors are stored but not described, e.g. {min(names)}")
    layers = {name.rpartition(".")[0] for name in stored if name.rpartition(".")[2] in SCALES}
    for layer in sorted(layers):
        if f"{layer}.weight" not in stored:
            yield Finding(f"{layer} has scales but no weight")


def _table_findings(
    description: Description, checkpoint: Checkpoint, top: Path, size: int, rank: int
) -> Iterator[Finding]:
    """Do names and shapes fit the model that config.json describes?"""
    compressed = size > 1 or "W8A8SC" in description.kinds.values()
    try:
        family = family_of(top)
        family = type(family)(checkpoint.directory, family.config)  # some know it by the names
        table = [] if compressed else list(stored_weights(family))
    except ModelError as error:  # perhaps a model that other engines know
        known = "does not fit" in str(error) or "do not fit" in str(error)
        yield Finding(str(error), CONSUMERS if known else ())
        return
    try:
        if compressed:
            check_parts(family, description, checkpoint, Split(family.decoder, size, rank))
        else:
            checkpoint.check(table)
    except ModelError as error:
        yield Finding(str(error))


def _kind_findings(description: Description, dtype) -> Iterator[Finding]:
    for kind in sorted(set(description.kinds.values())):
        if kind not in LOADED_BY:
            yield Finding(f"tensors of kind {kind} are known to no engine")
        elif missing := tuple(c for c in CONSUMERS if c not in LOADED_BY[kind]):
            remark = ""
            if kind == "W8A8SC":
                remark = " (vllm-ascend: only as its own save_sharded_state_310.py writes them)"
            yield Finding(f"{kind} layers are not loaded by everyone{remark}", missing)
        if kind in SPARSE and dtype == "bfloat16":
            yield Finding(f"{kind} is for the 310P, which computes float16 only")
    if description.type in NEEDED and not list(_quantised_layers(description)):
        yield Finding(f"the type is {description.type}, but no layer is quantised")


def _fused_findings(description: Description) -> Iterator[Finding]:
    """Linear layers that vllm-ascend fuses must be of one kind."""
    for name in description.kinds:
        for members in FUSED:
            first = f"{members[0]}.weight"
            if not name.endswith(f".{first}"):
                continue
            prefix = name.removesuffix(first)
            kinds = {description.kinds.get(f"{prefix}{member}.weight") for member in members}
            kinds.discard(None)
            if len(kinds) > 1:
                yield Finding(
                    f"{prefix}{{{', '.join(members)}}} differ in kind ({', '.join(sorted(kinds))}); "
                    "vllm-ascend makes them one layer",
                    (A2, P310),
                )


def _half_findings(description: Description) -> Iterator[Finding]:
    """vllm-ascend expands gate_up_proj and looks up the kinds of both names."""
    wanted = halves_of(description.kinds)
    wrong = sorted(name for name, kind in wanted.items() if description.halves.get(name) != kind)
    if wrong:
        name = wrong[0]
        yield Finding(
            f"{len(wrong)} names of halves are not described as their gate_up_proj is, e.g. {name}: "
            f"vllm-ascend looks them up; write them into {description.file.name}, this one as "
            f"{wanted[name]}",
            (A2, P310),
        )
    if wanted:
        yield Finding(
            "MindIE-LLM (2026-04) has no class that reads this layout of GLM; quantise the chatglm layout for "
            "it",
            (),
        )


def _quantised_layers(description: Description) -> Iterator[str]:
    for name, kind in description.kinds.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and kind in NEEDED and not layer.endswith(".module"):
            yield layer
