"""Rules of the house: who may import whom, and which packages the chat and convert paths leave alone."""

import ast
import subprocess
import sys
from pathlib import Path

import import_graph
import pytest
from paths import ROOT

MODELS = (
    "models",
    "models.errors",
    "models.files",
    "models.side_fields",
    "models.side_files",
    "models.other_kinds",
    "models.config",
    "models.generation_config",
    "models.family",
    "models.network",
    "models.prompt",
    "models.checkpoint",
    "models.families",
    "models.terminal",
)
RUNTIME = (
    "runtime.common",
    "runtime.ascend",
    "runtime.parallel",
    "runtime.ops",
    "runtime.vision",
    "runtime.engine",
)
COMMANDS = ("chat", "serve", "ui", "predict", "bench", "compare", "plan", "doctor")

# room -> the rooms (or single modules) that it may import
ALLOWED = {
    "models.errors": (),
    "models.files": ("models.errors",),
    "models.terminal": (),
    "models.side_fields": ("models.errors",),
    "models.side_files": MODELS[1:4],
    "models.other_kinds": MODELS[1:5],
    "models.config": MODELS[1:6],
    "models.generation_config": MODELS[1:7],
    "models.family": MODELS[1:8],
    "models.network": MODELS[1:9],
    "models.prompt": MODELS[1:9],
    "models.checkpoint": MODELS[1:11],
    "models.families": MODELS[1:12],
    "models": MODELS[1:9],
    "models.synthetic": MODELS,
    "runtime.common": ("models.errors", "models.files", "models.terminal"),
    "runtime.ascend": ("runtime.common",),
    "runtime.parallel": ("runtime.common", *MODELS),
    "runtime.ops": ("runtime.common", "runtime.ascend", *MODELS),
    "runtime.vision": ("runtime.common", "runtime.ascend", "runtime.ops", *MODELS),
    "runtime.engine": (*RUNTIME[:-1], *MODELS),
    "runtime": ("runtime.engine",),
    "runtime.__main__": ("runtime.common",),
    "runtime.console": ("runtime.common",),
    **{f"runtime.{command}": (*RUNTIME, *MODELS) for command in COMMANDS},
    "convert": (
        "runtime.common",
        "runtime.ascend",
        "runtime.vision",
        "runtime.engine.loading.memory",
        *MODELS,
    ),
    "quant": (
        "runtime.common",
        "runtime.parallel.split",
        "runtime.ops",
        "runtime.vision",
        "runtime.engine.loading.weights",
        "runtime.engine.sequence",
        *MODELS,
    ),
}
ALLOWED["runtime.ui"] += ("runtime.serve",)
ALLOWED["runtime.compare"] += ("runtime.predict",)

# Where an import may stand inside a function: `--help` answers before anything heavy is imported,
# and a room that chooses a backend imports the one it chose.
LATE = ("__main__", "command", "chat", "console")
CHOOSERS = ("runtime", "models", "runtime.ops", "runtime.vision")

LONGEST_MODULE = 400
LONGEST_FUNCTION = 50
MOST_MODULES = 16  # in one folder


def room_of(module: str) -> str:
    return max((room for room in ALLOWED if is_in(module, room)), key=len)


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def permitted(importer: str, module: str) -> bool:
    room = room_of(importer)
    if room_of(module) == room:
        return True
    return any(
        is_in(module, other) and room_of(other) in (other, room_of(module))
        for other in ALLOWED[room]
        if other != "models" or module == "models"
    )


def against_the_table(root: Path) -> list[str]:
    return [
        f"{each.importer} imports {each.module}"
        for each in import_graph.imports_of(root)
        if not permitted(each.importer, each.module)
    ]


def test_import_table():
    assert not against_the_table(ROOT)


@pytest.mark.parametrize(
    "file, line",
    [
        ("models/network/linear.py", "from models.prompt import messages"),
        ("models/config.py", "from .family import Family"),
        ("runtime/common/files/output.py", "from models.checkpoint.reader import Checkpoint"),
        ("runtime/ops/reference.py", "def f():\n    import runtime.engine.engine"),
        ("runtime/serve/routes.py", "from runtime.predict.predictor import Predictor"),
        ("runtime/engine/engine.py", "from runtime.chat import main"),
        ("convert/pipeline.py", "from quant import pipeline"),
        ("quant/pipeline.py", "from runtime.engine.scheduler import Scheduler"),
    ],
)
def test_a_planted_import_is_found(file, line, tmp_path):
    copy_sources(tmp_path)
    with open(tmp_path / file, "a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")
    assert len(against_the_table(tmp_path)) == 1


def copy_sources(folder: Path):
    for module in import_graph.modules_of(ROOT).values():
        copy = folder / module.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(module.read_bytes())


def test_no_import_circles():
    assert not import_graph.circles(import_graph.imports_of(ROOT))


def test_a_planted_circle_is_found(tmp_path):
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / f"{name}.py").write_text(f"def f():\n    from . import {other}\n")
    found = import_graph.circles(import_graph.imports_of(tmp_path))
    assert found == [{"models.a", "models.b", "models.c"}]


def test_nobody_takes_a_private_name_of_another_file():
    private = [
        f"{each.importer} takes {each.name} of {each.module}"
        for each in import_graph.imports_of(ROOT)
        if each.name and each.name.startswith("_") and not each.name.startswith("__")
    ]
    assert not private


def test_imports_stand_at_the_top():
    inside = [
        f"{each.importer} imports {each.module} inside a function"
        for each in import_graph.imports_of(ROOT)
        if each.inside_function
        and each.importer.rpartition(".")[2] not in LATE
        and each.importer not in CHOOSERS
    ]
    assert not inside


def test_sizes():
    too_long = []
    for module, path in import_graph.modules_of(ROOT).items():
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > LONGEST_MODULE:
            too_long.append(module)
        for node in ast.walk(ast.parse(text)):
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if is_function and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                too_long.append(f"{module}.{node.name}")
    assert not too_long


@pytest.mark.parametrize(
    "module", ["runtime.chat", "runtime.engine.engine", "convert.pipeline", "convert.export.write"]
)
def test_no_transformers_on_the_main_path(module):
    code = (
        f"import importlib, sys; importlib.import_module({module!r})\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# `--reference transformers`; msmodelslim wants its config class
MAY_IMPORT_TRANSFORMERS = {"runtime/compare/transformers_engine.py", "quant/msmodelslim_calls.py"}


def importers_of_transformers(root: Path) -> set[str]:
    found = set()
    for path in import_graph.modules_of(root).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            if "transformers" in {name.split(".")[0] for name in names}:
                found.add(str(path.relative_to(root)))
    return found


def test_transformers_is_imported_in_two_places_alone():
    assert importers_of_transformers(ROOT) == MAY_IMPORT_TRANSFORMERS


@pytest.mark.parametrize("file", ["runtime/compare/runs.py", "models/family.py"])
def test_a_planted_import_of_transformers_is_found(file, tmp_path):
    copy_sources(tmp_path)
    with open(tmp_path / file, "a", encoding="utf-8") as stream:
        stream.write("\ndef f():\n    from transformers.utils import logging\n")
    assert importers_of_transformers(tmp_path) == MAY_IMPORT_TRANSFORMERS | {file}


def test_no_folder_holds_more_modules_than_one_reads_at_a_glance():
    folders = [path.parent for path in import_graph.modules_of(ROOT).values()]
    crowded = {
        str(each.relative_to(ROOT)) for each in folders if folders.count(each) > MOST_MODULES
    }
    assert not crowded
