"""compare reads every checksummed file, whatever was remembered before."""

import paths
import pytest

from runtime.common.files import checksums, file_entry, problem_of
from runtime.compare import comparison
from runtime.compare.options import CompareOptions
from runtime.engine.options import EngineOptions


class Stop(Exception):
    pass


def test_both_sides_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "vision.onnx.data"
    file.write_bytes(b"weights")
    entry = file_entry(file)
    assert problem_of(file, entry) is None
    read = []
    monkeypatch.setattr(checksums, "file_entry", lambda path: read.append(path) or entry)

    def reference(*arguments):
        assert problem_of(file, entry) is None

    def candidate(*arguments):
        assert problem_of(file, entry) is None
        raise Stop

    monkeypatch.setattr(comparison, "run_reference", reference)
    monkeypatch.setattr(comparison, "run_candidate", candidate)
    options = CompareOptions(model=str(paths.GOLDEN / "visualglm"), out=str(tmp_path))
    with pytest.raises(Stop):
        comparison.compare(options, EngineOptions(), [], tmp_path)
    assert len(read) == 2
    assert problem_of(file, entry) is None and len(read) == 2  # remembered again
