"""The imports of a source tree, read as text: nothing is run. Imports inside functions count."""

import ast
from dataclasses import dataclass
from pathlib import Path

TOP = ("models", "runtime", "convert", "quant")


@dataclass(frozen=True)
class Import:
    """`importer` takes `name` (None: the module itself) from `module`; all modules are dotted paths of our own."""

    importer: str
    module: str
    name: str | None
    inside_function: bool


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module below the four top rooms of `root`."""
    found = {}
    for top in TOP:
        for path in sorted((root / top).rglob("*.py")):
            found[module_name(path, root)] = path
    return found


def imports_of(root: Path) -> list[Import]:
    """Every import of one of our modules by another."""
    modules = modules_of(root)
    found = []
    for importer, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = _nodes_in_functions(tree)
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for node in ast.walk(tree):
            for module, name in _imported(node, package, modules):
                found.append(Import(importer, module, name, id(node) in inner))
    return found


def _nodes_in_functions(tree) -> set[int]:
    found = set()
    for outer in ast.walk(tree):
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.update(id(inner) for inner in ast.walk(outer))
    return found


def _imported(node, package: str, modules: dict[str, Path]):
    """(module of ours, name taken from it or None) for each name that an import statement brings in."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(node, package)
        for alias in node.names:
            if f"{base}.{alias.name}" in modules:
                yield f"{base}.{alias.name}", None
            elif base in modules:
                yield base, alias.name


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def circles(imports: list[Import]) -> list[set[str]]:
    """Groups of modules that import each other in a circle."""
    reach = {}
    for each in imports:
        reach.setdefault(each.importer, set()).add(each.module)
    closed = {module: _reachable(module, reach) for module in reach}
    found = []
    for module, others in closed.items():
        group = {other for other in others if module in closed.get(other, ())}
        if module in others and len(group) > 1 and group not in found:
            found.append(group)
    return found


def _reachable(module: str, reach: dict[str, set[str]]) -> set[str]:
    seen = set()
    pending = list(reach.get(module, ()))
    while pending:
        other = pending.pop()
        if other not in seen:
            seen.add(other)
            pending.extend(reach.get(other, ()))
    return seen
