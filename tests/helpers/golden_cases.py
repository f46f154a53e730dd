"""Golden directories with many cases in one golden.npz: arrays are called <case>__<field> and, of the
pictures, <picture>__<field>; cases.json tells the cases."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import paths

from models.side_files import read_json


class Golden:
    """One directory of tests/golden."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_json(directory / "config.json")
        told = json.loads((directory / "cases.json").read_text(encoding="utf-8"))
        self.told = told
        self.cases = {case["name"]: case for case in told["cases"]}
        self.atol = told["tolerance"]["logits_atol"]
        self._arrays = np.load(directory / "golden.npz")

    def has(self, case: str, field: str) -> bool:
        return f"{case}__{field}" in self._arrays

    def of(self, case: str, field: str) -> np.ndarray:
        return self._arrays[f"{case}__{field}"]

    def ids(self, case: str) -> np.ndarray:
        return self.of(case, "input_ids").astype(np.int64)

    def greedy(self, case: str) -> list[int]:
        return self.of(case, "greedy").tolist()

    def pictures(self, case: str) -> list[str]:
        return [name.removesuffix(".png") for name in self.cases[case]["images"]]

    def features(self, case: str) -> list[np.ndarray]:
        """Of each picture of the case, float32 [rows, hidden]."""
        return [self.of(picture, "image_features") for picture in self.pictures(case)]


@cache
def golden(name: str) -> Golden:
    return Golden(paths.GOLDEN / name)
