"""Rules of the house: who may import whom, and which packages the chat and convert paths leave alone."""
import ast
import subprocess
import sys
from pathlib import Path

import paths
import pytest

ROOT = paths.ROOT
ALLOWED = {"models": set(), "runtime": {"models"}, "convert": {"models", "runtime"}, "quant": {"models", "runtime"}}


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", ALLOWED)
def test_import_rule(room):
    for path in (ROOT / room).rglob("*.py"):
        forbidden = set(imports_of(path)) & set(ALLOWED) - {room} - ALLOWED[room]
        assert not forbidden, f"{path} imports {forbidden}"


@pytest.mark.parametrize("module", ["runtime.chat", "runtime.engine.engine", "convert.__main__", "convert.export.write"])
def test_no_transformers_on_the_main_path(module):
    code = f"import importlib, sys; importlib.import_module({module!r}); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_of_transformers_is_imported_in_product_code():
    # `--reference transformers`; msmodelslim wants its config class
    allowed = {"transformers_engine.py", "msmodelslim_calls.py"}
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            assert "transformers" not in imports_of(path) or path.name in allowed, path
