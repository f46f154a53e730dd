"""Folders of the repository, for all tests."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
DEMO = ROOT / "examples" / "demo"
