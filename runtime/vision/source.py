"""What a vision encoder is made from.

Takes a family and its checkpoint, returns the hash that identifies the encoder.
"""

import hashlib
import json
from dataclasses import asdict
from functools import cached_property

import torch
from torch import nn

from models.checkpoint import Checkpoint
from models.checkpoint.table import Weight, WeightTable
from models.family import Family
from runtime.common.errors import MISSING_COMPONENT, ToolkitError
from runtime.common.files import tensors_digest

# raise it when the exported graph changes: artifacts of older exporters are made again
EXPORTER = 1
EXPORT_TORCH = "2.13"  # the release whose graphs are tested


def exports_here() -> bool:
    """Whether this torch is of the release that exports encoders."""
    return torch.__version__.split(".")[:2] == EXPORT_TORCH.split(".")


def check_exporter():
    """ToolkitError where it is another."""
    if not exports_here():
        raise ToolkitError(
            f"the vision encoder is exported with torch {EXPORT_TORCH}, here is {torch.__version__}; "
            f"convert where `pip install 'torch=={EXPORT_TORCH}.*'` was run and give the folder with "
            "--artifact, or use --vision torch",
            MISSING_COMPONENT,
        )


class Source:
    """A vision encoder's family and checkpoint. Both digests are computed when first asked for, and
    once.

    The slow one reads all vision tensors; the cache remembers it while the weight files are
    untouched.
    """

    def __init__(self, family: Family, checkpoint: Checkpoint):
        self.family = family
        self.checkpoint = checkpoint

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of all that decides what the encoder computes: vision tensors, their table,
        the tower's settings."""
        rows = []
        for weight in self._vision_weights:
            rows.append([weight.source, [[str(p.target), p.take, p.at] for p in weight.parts]])
        with torch.device("meta"):
            tower = self.family.vision_encoder()
        identity = [
            EXPORTER,
            self.family.name,
            asdict(self.family.vision),
            _module_settings(tower),
            rows,
            self.weights_digest,
        ]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def weights_digest(self) -> str:
        """Digest of the checkpoint's vision tensors; may take a minute."""
        stored = self.checkpoint.shapes
        names = [w.source for w in self._vision_weights if w.source in stored]
        return tensors_digest(self.checkpoint, names)

    @cached_property
    def _vision_weights(self) -> list[Weight]:
        return WeightTable(self.family.weights()).vision()


def _module_settings(tower: nn.Module) -> list:
    """[path, class, public attributes (eps, heads, activation, ...)] of every module."""
    settings = []
    for path, module in tower.named_modules():
        public = {}
        for name, value in vars(module).items():
            if not name.startswith("_"):
                public[name] = _as_json(value)
        settings.append([path, type(module).__name__, public])
    return settings


def _as_json(value):
    """A function or class by its name, a number or text as it is, anything else by its repr."""
    plain = value if isinstance(value, (int, float, str)) else repr(value)
    return getattr(value, "__qualname__", plain)
