"""What a model is: released checkpoints of the GLM families, read without their Python code."""
from pathlib import Path

from .base import Family, ModelError, read_json

FAMILIES = {"visualglm": "VisualGLM"}       # module -> class; the module is imported when its turn comes


def families() -> list[type[Family]]:
    from importlib import import_module
    return [getattr(import_module(f"{__name__}.{module}"), cls) for module, cls in FAMILIES.items()]


def family_of(directory) -> Family:
    """The family that owns the checkpoint in `directory`, decided by the structure of its config. ModelError if none."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelError(f"model folder {directory} does not exist; give --model the folder of a downloaded checkpoint")
    sat = directory / "model_config.json"
    config = read_json(sat if sat.is_file() else directory / "config.json")
    for family in families():
        rule = family.matches(config)
        if rule:
            return _build(family, directory, config, rule)
    kind = f"architectures {config.get('architectures')}, model_type {config.get('model_type')!r}"
    raise ModelError(f"{directory} holds no model this toolkit knows ({kind}); known: {', '.join(FAMILIES)}")


def _build(family, directory, config, rule) -> Family:
    try:
        built = family(directory, config)
    except (KeyError, TypeError) as error:
        raise ModelError(f"the config of {directory} looks like {family.name} ({rule}) but lacks {error}") from None
    built.rule = rule
    return built
