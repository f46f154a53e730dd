"""Who can load a quantised directory? Every check that MindIE-LLM and vllm-ascend (910B and 310P) make on their own, or
fail to make and then compute nonsense.

A folder flows in; findings flow out, each with the consumers it stops. Headers are read first, then one tensor at a time.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models import family_of
from models.checkpoint.quantized import (
    FILE,
    KINDS,
    STATIC,
    TENSORS,
    Description,
    find_description,
    float_scale,
    stored_weights,
)
from models.checkpoint.reader import Checkpoint
from models.config import read_json
from models.errors import ModelError
from runtime.common.errors import CHECK_FAILED
from runtime.parallel.split import Split

from .rank_shares import check_parts, find_parts

MINDIE = "MindIE-LLM"
A2 = "vllm-ascend on 910B"
P310 = "vllm-ascend on 310P"
CONSUMERS = (MINDIE, A2, P310)
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
NEEDED = {kind: set(k.needed) for kind, k in KINDS.items()}
NEEDED |= {
    "W8A8SC": {*NEEDED["W8A8S"], "index", "info"},
    "W8A8_MIX": NEEDED["W8A8"] | NEEDED["W8A16"],
}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FEW_SCALES = 0.05  # distinct deq_scale values per row: below, half precision has eaten them
SHOWN = 12


@dataclass
class Finding:
    """One sentence; `stops`: consumers that cannot load the directory because of it."""

    text: str
    stops: tuple[str, ...] = CONSUMERS


@dataclass
class Findings:
    found: list[Finding] = field(default_factory=list)

    def loads(self, consumer: str) -> bool:
        return not any(consumer in finding.stops for finding in self.found)

    @property
    def problems(self) -> list[str]:
        """What stops every consumer; a directory that none of them loads is damaged too."""
        damage = [f.text for f in self.found if f.stops == CONSUMERS]
        return damage or (
            [f.text for f in self.found] if not any(map(self.loads, CONSUMERS)) else []
        )


def report(folder: str, as_json: bool) -> int:
    """Print the findings; exit code 0 if some consumer loads the folder, else 1."""
    findings = validate(Path(folder))
    loads = {consumer: findings.loads(consumer) for consumer in CONSUMERS}
    if as_json:
        print(json.dumps({"loads": loads, "findings": [vars(f) for f in findings.found]}, indent=2))
    else:
        for finding in findings.found[:SHOWN]:
            print(
                f"{'problem' if finding.stops else 'note'}: {finding.text}"
                + (
                    f" (stops {', '.join(finding.stops)})"
                    if 0 < len(finding.stops) < len(CONSUMERS)
                    else ""
                )
            )
        if len(findings.found) > SHOWN:
            print(f"and {len(findings.found) - SHOWN} more; --json lists them")
        for consumer, yes in loads.items():
            print(f"{consumer}: {'files fit' if yes else 'files do not fit'}")
    return 0 if any(loads.values()) and not findings.problems else CHECK_FAILED


def validate(folder: Path) -> Findings:
    """Findings of a folder. Damage that hides the rest ends the search."""
    findings = []
    try:
        for finding in _findings(Path(folder)):
            findings.append(finding)
    except ModelError as error:
        findings.append(Finding(str(error)))
    return Findings(findings)


def _findings(folder: Path) -> Iterator[Finding]:
    """Of a folder, or of the folders of every rank in it, which share its config.json."""
    parts = find_parts(folder)
    for rank, part in enumerate(parts):
        for finding in _findings_of(part, folder, len(parts), rank):
            yield Finding(f"{part.name}: {finding.text}", finding.stops)
    if not parts:
        yield from _findings_of(folder, folder, 1, 0)


def _findings_of(folder: Path, top: Path, size: int, rank: int) -> Iterator[Finding]:
    """config.json lies in `top`; the weights in `folder` are those of `rank` of `size`."""
    description = find_description(folder)
    if description is None:
        raise ModelError(
            f"{folder} has no quant_model_description.json; it is no quantised directory"
        )
    config = read_json(top / "config.json")
    dtype = _dtype(config)
    yield from _files(folder, description)
    yield from _config(config, description, dtype)
    checkpoint = Checkpoint(folder)
    yield from _names(description, checkpoint, top, size, rank)
    yield from _kinds(description, dtype)
    yield from _fused(description)
    for layer in _quantised_layers(description):
        yield from _layer(layer, description.kind(layer), checkpoint, dtype)


def _dtype(config: dict) -> str | None:
    for settings in (config, config.get("text_config") or {}):
        if found := settings.get("torch_dtype") or settings.get("dtype"):
            return found
    return None


def _files(folder: Path, description: Description) -> Iterator[Finding]:
    stray = sorted(
        f.name for f in folder.glob("*.safetensors") if not f.name.startswith("quant_model_weight")
    )
    if stray:
        yield Finding(
            f"{stray[0]} lies beside the quantised weights: engines load every *.safetensors; move it away"
        )
    for file in folder.glob("*.safetensors"):
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


def _config(config: dict, description: Description, dtype) -> Iterator[Finding]:
    quantize = config.get("quantize")
    kind = description.type.lower()
    if quantize is not None and quantize != kind:
        yield Finding(
            f"config.json says quantize {quantize!r}, the description {kind!r}", (MINDIE,)
        )
    if quantize is None:
        old = description.file.name != FILE
        yield Finding(
            "config.json has no quantize"
            + (
                ", from which MindIE makes the description's old name"
                if old
                else "; MindIE takes the description's type"
            ),
            (MINDIE,) if old else (),
        )
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
        yield Finding(
            "bfloat16 is not computed by the 310P; quantise with --dtype float16", (P310,)
        )


def _names(
    description: Description, checkpoint: Checkpoint, top: Path, size: int, rank: int
) -> Iterator[Finding]:
    described = set(description.kinds)
    stored = set(checkpoint.names)
    for names, what in (
        (described - stored, "described but not stored"),
        (stored - described, "stored but not described"),
    ):
        if names:
            yield Finding(f"{len(names)} tensors are {what}, e.g. {min(names)}")
    try:
        family = family_of(top)
        if size > 1 or "W8A8SC" in description.kinds.values():
            check_parts(family, description, checkpoint, Split(family.decoder, size, rank))
        else:
            checkpoint.check(stored_weights(family))
    except ModelError as error:
        known = "does not fit" in str(error) or "do not fit" in str(error)
        yield Finding(str(error), CONSUMERS if known else ())


def _kinds(description: Description, dtype) -> Iterator[Finding]:
    for kind in sorted(set(description.kinds.values())):
        if kind not in LOADED_BY:
            yield Finding(f"tensors of kind {kind} are known to no engine")
        elif missing := tuple(c for c in CONSUMERS if c not in LOADED_BY[kind]):
            yield Finding(
                f"{kind} layers are not loaded by everyone"
                + (
                    " (vllm-ascend: only as its own save_sharded_state_310.py writes them)"
                    if kind == "W8A8SC"
                    else ""
                ),
                missing,
            )
        if kind in SPARSE and dtype == "bfloat16":
            yield Finding(f"{kind} is for the 310P, which computes float16 only")
    if description.type in NEEDED and not any(True for _ in _quantised_layers(description)):
        yield Finding(f"the type is {description.type}, but no layer is quantised")


def _fused(description: Description) -> Iterator[Finding]:
    for name in description.kinds:
        for members in FUSED:
            if name.endswith(f".{members[0]}.weight"):
                root = name.removesuffix(f"{members[0]}.weight")
                kinds = {description.kinds.get(f"{root}{member}.weight") for member in members} - {
                    None
                }
                if len(kinds) > 1:
                    yield Finding(
                        f"{root}{{{', '.join(members)}}} differ in kind ({', '.join(sorted(kinds))}); vllm-ascend "
                        "makes them one layer",
                        (A2, P310),
                    )


def _quantised_layers(description: Description) -> Iterator[str]:
    for name, kind in description.kinds.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and kind in NEEDED and not layer.endswith(".module"):
            yield layer


def _layer(layer: str, kind: str, checkpoint: Checkpoint, dtype) -> Iterator[Finding]:
    missing = sorted(t for t in NEEDED.get(kind, ()) if f"{layer}.{t}" not in checkpoint.shapes)
    if missing:
        yield Finding(f"{layer} ({kind}) lacks {', '.join(missing)}")
        return
    wrong = [
        f"{layer}.{t} is {checkpoint.dtype(f'{layer}.{t}')}"
        for t in sorted(NEEDED.get(kind, set()) & TENSORS.keys())
        if checkpoint.dtype(f"{layer}.{t}") not in TENSORS[t][1]
    ]
    yield from map(Finding, wrong)
    if not wrong and "weight_scale" in NEEDED.get(kind, ()):
        yield from _rows(
            layer,
            kind,
            *(checkpoint.tensor(f"{layer}.{t}").float() for t in ("weight_scale", "weight_offset")),
        )
    if wrong or kind not in (*STATIC, "W8A8SC", "W8A8_MIX"):
        return
    read = {t: checkpoint.tensor(f"{layer}.{t}") for t in NEEDED[kind]}
    if kind == "W8A8SC":
        yield from _compressed(layer, read)
    yield from _scales(layer, read, dtype, rows=len(read["quant_bias"]))
    if kind != "W8A8SC":
        yield from _sums(layer, read)


def _rows(layer: str, kind: str, scale: torch.Tensor, offset: torch.Tensor) -> Iterator[Finding]:
    if not torch.isfinite(scale).all() or (scale <= 0).any():
        yield Finding(f"{layer}.weight_scale has values that are zero, negative or not finite")
    if kind == "W8A8_DYNAMIC" and offset.any():
        yield Finding(
            f"{layer}.weight_offset is not zero, and int8 products have no place for it (w_sym=True)"
        )


def _scales(layer: str, t: dict, dtype, rows: int) -> Iterator[Finding]:
    stored = t["deq_scale"]
    scale = float_scale(t["deq_scale"])
    if stored.dtype == torch.int64 and dtype == "bfloat16":
        yield Finding(
            f"{layer}.deq_scale is int64 in a bfloat16 model: it would be read as numbers around 1e9"
        )
    if stored.dtype == torch.float32 and dtype == "float16":
        yield Finding(
            f"{layer}.deq_scale is float32 in a float16 model, which takes int64", (A2, P310)
        )
    if scale.numel() != rows:
        yield Finding(
            f"{layer}.deq_scale has {scale.numel()} values for {rows} rows (made with mm_tensor=True)"
        )
    if not torch.isfinite(scale).all() or (scale <= 0).any():
        yield Finding(
            f"{layer}.deq_scale has values that are zero, negative or not finite (float16 underflow)"
        )
    elif (
        dtype == "float16"
        and scale.numel() > 16
        and scale.unique().numel() < FEW_SCALES * scale.numel()
    ):
        yield Finding(
            f"{layer}.deq_scale has only {scale.unique().numel()} different values (float16 rounding, "
            "if the float weights were no coarser)",
            (),
        )
    scale = t["input_scale"].float()
    offset = t["input_offset"].float()
    if (
        scale.numel() != 1
        or offset.numel() != 1
        or not (scale > 0).all()
        or not torch.isfinite(scale).all()
    ):
        yield Finding(f"{layer}.input_scale is not one positive number")
    elif offset != offset.round() or not -128 <= offset <= 127:
        yield Finding(
            f"{layer}.input_offset is {offset.item():g}, no whole number from -128 to 127"
        )


def _sums(layer: str, t: dict) -> Iterator[Finding]:
    bias = t["quant_bias"].long().abs()
    if (bias >= 2**30).any():
        yield Finding(f"{layer}.quant_bias is saturated (float16 underflow of deq_scale)")
    elif len(bias) != len(t["weight"]):
        yield Finding(f"{layer}.quant_bias has {len(bias)} values for {len(t['weight'])} rows")
    elif (128 * t["weight"].float().abs_().sum(1).long() + bias >= 2**31).any():
        yield Finding(f"{layer}: sums may overflow int32")


def _compressed(layer: str, t: dict) -> Iterator[Finding]:
    """info = (tiling k, tiling n, k, n, 1); index: 8 bytes for every 256 x 128 tile."""
    info = t["info"]
    index = t["index"]
    if info.dtype != torch.int64 or info.numel() != 5:
        yield Finding(f"{layer}.info is no list of five int64")
        return
    k = info[2].item()
    n = info[3].item()
    wanted = -(-k // 256) * -(-n // 128) * 8
    if index.dtype != torch.int8 or index.numel() != wanted:
        yield Finding(
            f"{layer}.index has {index.numel()} values of {index.dtype}, {n} x {k} need {wanted} of int8"
        )
    if t["weight"].numel() > n * k or len(t["quant_bias"]) != n:
        yield Finding(f"{layer}: the compressed weight does not fit {n} x {k}")
