"""The steps of a conversion: export, check the graph, verify it, publish."""

import errno
import json
import shutil
import time
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from threading import Thread

from runtime.common.errors import CHECK_FAILED, ToolkitError

WORK, EXPORTED = ".partial", "exported.json"
SHOWN = 10  # findings of the graph check on screen


def is_current(family, checkpoint, out: Path) -> bool:
    """Whether `out` holds this checkpoint's artifact already; ToolkitError if it holds another one's."""
    from runtime.vision.artifact import load
    from runtime.vision.source import EXPORTER, Source

    try:
        manifest = load(out)
    except ToolkitError:
        return False
    if manifest.source == Source(family, checkpoint).hash:
        print(f"{out} already holds the verified encoder of this checkpoint; nothing to do")
        return True
    if manifest.exporter == EXPORTER:
        raise ToolkitError(
            f"{out} holds the encoder of another checkpoint; give another --out, or --force to replace "
            "it"
        )
    return False


def convert(family, checkpoint, out: Path):
    """Export into a work folder inside `out` (same file system), prove it there, then publish it."""
    from convert.export.trace import OPSET
    from runtime.vision.artifact import Manifest, publish

    work = out / WORK
    source, files = left_over(family, checkpoint, work) or fresh(family, checkpoint, work)
    try:
        errors = prove(family, checkpoint, work)
    except ToolkitError as error:
        if error.exit_code == CHECK_FAILED:
            shutil.rmtree(work)
        raise
    spec = family.vision
    publish(
        work,
        out,
        Manifest(
            source,
            family.name,
            OPSET,
            _interface(spec.input_name, spec.input_shape),
            _interface(spec.output_name, spec.output_shape),
            files,
            errors,
            _versions(),
        ),
    )
    shutil.rmtree(work)


def left_over(family, checkpoint, work: Path) -> tuple[str, dict] | None:
    """(source, files) of an export that an interrupted run of the same checkpoint completed, else None."""
    from runtime.vision.source import Source

    note = work / EXPORTED
    if not note.is_file():
        return None
    source, files = json.loads(note.read_text(encoding="utf-8"))
    if source != Source(family, checkpoint).hash:
        return None
    print("continuing after the export that an interrupted run completed")
    return source, files


def fresh(family, checkpoint, work: Path) -> tuple[str, dict]:
    """(source, files): {file: {bytes, sha256}} of a new export in `work`, which holds nothing else."""
    from convert.export.write import check_space, export, reuse_memory
    from runtime.common.files import write_atomically
    from runtime.common.progress import spinner
    from runtime.vision.source import Source

    start = time.perf_counter()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        print(check_space(family, work.parent), flush=True)
        reuse_memory()
        digest = in_background(lambda: Source(family, checkpoint).weights_digest)
        with spinner("tracing the vision encoder"):
            from convert.export.trace import trace

            model = trace(family.vision_encoder, family.vision)
            digest.result()
        files = export(model, family, checkpoint, work)
        source = Source(family, checkpoint).hash
        write_atomically(work / EXPORTED, json.dumps([source, files]))
    except BaseException as error:
        shutil.rmtree(work)
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise ToolkitError(
                f"the disk of {work.parent} became full during the export, nothing was kept; free some "
                "space or choose another --out"
            ) from None
        raise
    print(f"exported in {time.perf_counter() - start:.1f} s")
    return source, files


def in_background(function, *arguments) -> Future:
    """Result of function(*arguments), computed in a thread that does not keep an interrupted program alive."""
    future = Future()

    def run():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def prove(family, checkpoint, work: Path) -> dict:
    """Graph check and verification of the export in `work`; measured errors per picture, or ToolkitError (exit 1)."""
    from convert.export.trace import OPSET
    from convert.verify.__main__ import verify
    from convert.verify.preflight import preflight
    from runtime.vision.artifact import ONNX

    findings, operators = preflight(work / ONNX, family.vision, OPSET)
    print(
        f"graph: {sum(operators.values())} nodes, "
        + ", ".join(f"{n} {op}" for op, n in operators.most_common())
    )
    if findings:
        listed = [f"\n  {finding}" for finding in findings[:SHOWN]] + ["\n  ..."] * (
            len(findings) > SHOWN
        )
        raise ToolkitError(
            f"the graph is not fit for ATC, {len(findings)} findings:" + "".join(listed),
            CHECK_FAILED,
        )
    start = time.perf_counter()
    results = verify(family, checkpoint.directory, work)
    for name, result in results.items():
        print(f"verify {name}: {result}: {'pass' if result.passed else 'FAIL'}")
    if not results or not all(result.passed for result in results.values()):
        raise ToolkitError(
            "ONNX Runtime and torch disagree, no artifact was written; report this with the lines above",
            CHECK_FAILED,
        )
    print(f"verified in {time.perf_counter() - start:.1f} s")
    return {name: asdict(result) for name, result in results.items()}


def _interface(name: str, shape: tuple) -> dict:
    return {"name": name, "shape": list(shape), "dtype": "float32"}


def _versions() -> dict:
    from importlib.metadata import version

    return {
        package: version(package)
        for package in ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    }


def prepare(out: str) -> Path:
    """The artifact folder, made if missing; ToolkitError if nothing can be written there."""
    from runtime.common.files import LOCK

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ToolkitError(f"--out {out} is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / LOCK).touch()
    except OSError as error:
        raise ToolkitError(
            f"--out {out} cannot be written ({error.strerror}); give another folder"
        ) from None
    return out
