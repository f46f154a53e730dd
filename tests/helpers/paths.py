"""Folders of the repository, for all tests."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
DEMO = ROOT / "examples" / "demo"
# one folder of GOLDEN for every architecture
FAMILIES = (
    "visualglm",
    "glm4",
    "glm4_0414",
    "glm4v",
    "glm_edge",
    "glm_edge_v",
    "llava",
    "glm_ocr",
    "glm41v",
)
