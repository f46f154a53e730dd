"""One way to write a file: through models/files.py and runtime/common/files, which follow no link and
empty no file."""

import ast
from pathlib import Path

import import_graph
import pytest
from paths import ROOT

PRODUCT = ("models", "runtime", "convert", "quant")
ALLOWED = {
    "models/files.py",
    "runtime/common/files/output.py",
    "quant/output/weights.py",  # into a new folder that only this user can reach
    "runtime/plan/estimate.py",  # into a temporary folder
}
WRITING_METHODS = {"write_text", "write_bytes", "touch"}
COPIES = {"copyfile", "copy", "copy2", "copytree"}


def writes(text: str) -> list[int]:
    """Lines that write a file in a way of their own."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and _is_write(node):
            found.append(node.lineno)
    return found


def _is_write(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if name in WRITING_METHODS or (owner == "shutil" and name in COPIES):
        return True
    return name == "open" and owner != "os" and any(map(_is_writing_mode, _arguments(call)))


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]


def _is_writing_mode(node: ast.expr) -> bool:
    """Whether "w", "ab" or the like is in the expression, which may choose between modes."""
    texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
    return any(
        isinstance(text, str)
        and 0 < len(text) <= 3
        and set(text) <= set("rwxabt+")
        and set(text) & set("wxa+")
        for text in texts
    )


def product_files() -> list[Path]:
    return [
        path
        for path in import_graph.modules_of(ROOT).values()
        if path.relative_to(ROOT).parts[0] in PRODUCT
    ]


def test_files_are_written_in_one_way():
    found = []
    for path in product_files():
        name = str(path.relative_to(ROOT))
        if name not in ALLOWED:
            lines = writes(path.read_text(encoding="utf-8"))
            found += [f"{name}:{line}" for line in lines]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('w' if fresh else 'a', newline='')",
        "(folder / 'x').write_text('')",
        "path.write_bytes(b'')",
        "path.touch()",
        "shutil.copyfile(a, b)",
    ],
)
def test_a_planted_write_is_found(line):
    assert writes(line) == [1]


@pytest.mark.parametrize(
    "line", ["open(path)", "open(path, 'rb')", "path.open('r')", "os.open(p, 1)"]
)
def test_reading_is_no_write(line):
    assert writes(line) == []
