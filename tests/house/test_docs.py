"""What the pages say about this repository: every file, link and function that they name exists."""

import ast
import re
from pathlib import Path

import pytest
from paths import ROOT

TOP = ("models", "runtime", "convert", "quant", "tests", "benchmarks", "docs", "examples")
OF_OTHERS = {
    "examples/1.jpeg",  # of the VisualGLM guide
    "examples/save_sharded_state_310.py",  # of vllm-ascend
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NAMED_FILE = re.compile(rf"(?<![\w./-])((?:{'|'.join(TOP)})/[\w./*-]*(?:\.\w+|/))(?![\w*])")
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)(?:#[^)\s]*)?\)")
NAMED_FUNCTION = re.compile(r"`([\w/]+\.py): ([\w., ]+)`")


def pages() -> list[Path]:
    folders = ("docs", "examples", "tests")
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in folders:
        found += sorted((ROOT / folder).rglob("*.md"))
    return found


def named_files(text: str) -> set[str]:
    """Paths that begin in a top folder of ours and end in a suffix or a slash."""
    return set(NAMED_FILE.findall(text)) - OF_OTHERS


def missing_files(text: str) -> list[str]:
    return sorted(name for name in named_files(text) if not any(ROOT.glob(name)))


def broken_links(text: str, folder: Path) -> list[str]:
    return [target for target in LINK.findall(text) if not (folder / target).exists()]


def missing_functions(text: str) -> list[str]:
    """Of every `path.py: name, Class.method`, the names that the file does not define."""
    missing = []
    one_line = " ".join(text.split())
    for path, names in NAMED_FUNCTION.findall(one_line):
        defined = definitions(ROOT / path) if (ROOT / path).is_file() else set()
        missing += [f"{path}: {name}" for name in names.split(", ") if name not in defined]
    return missing


def definitions(path: Path) -> set[str]:
    """Functions and classes of a module, and the methods of its classes as `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (inner for inner in node.body if isinstance(inner, FUNCTIONS))
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_names_on_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    assert not missing_files(text)
    assert not broken_links(text, page.parent)
    assert not missing_functions(text)


def test_a_wrong_name_is_found():
    assert missing_files("see runtime/nowhere.py, models/family.py and tests/*/") == [
        "runtime/nowhere.py"
    ]
    assert broken_links("[a](nowhere.md) [b](README.md#use) [c](https://x.y/z)", ROOT) == [
        "nowhere.md"
    ]
    assert missing_functions("`models/family.py: Family, Family.sampling, none`, `no.py: f`") == [
        "models/family.py: none",
        "no.py: f",
    ]
