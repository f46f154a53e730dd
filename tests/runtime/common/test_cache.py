"""The cache: whose folders are used, and how long what was read is remembered."""

import json
import os
import stat

import pytest

from runtime.common.errors import ToolkitError
from runtime.common.files import (
    CHECKSUMS,
    cache_folder,
    cache_root,
    check_again,
    check_checksums,
    checksum_problems,
    checksums,
    file_entry,
    open_private,
    problem_of,
    write_checksums,
)
from runtime.common.notes import notes_on_stderr

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of the test's own."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("ASCEND_VLM_CACHE", raising=False)
    return home


@pytest.fixture
def named(tmp_path, monkeypatch):
    """The folder in ASCEND_VLM_CACHE."""
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "named"))
    return tmp_path / "named"


# whose folders


def test_folders_are_private(named, home):
    folder = cache_folder("packed", "abc")
    assert folder == named / "packed" / "abc" and cache_root() == named
    for made in (named, named / "packed", folder):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert not list(home.iterdir())


def test_the_default_lies_below_the_home(home):
    assert cache_folder("kernels") == home / ".cache" / "ascend-vlm" / "kernels"


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o720, 0o702])
@pytest.mark.parametrize("place", ["", "kernels"])
def test_a_folder_that_others_may_write_is_not_used(named, home, capsys, mode, place):
    (named / place).mkdir(parents=True)
    (named / place).chmod(mode)
    with notes_on_stderr():
        folder = cache_folder("kernels")
        cache_folder("kernels")
    assert folder == home / ".cache" / "ascend-vlm" / "kernels"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"(mode {mode:o})" in said and str(folder) in said


@as_root
@pytest.mark.parametrize("place", ["", "kernels"])
def test_a_folder_of_somebody_else_is_not_used(named, home, place):
    (named / place).mkdir(parents=True)
    os.chown(named / place, NOBODY, NOBODY)
    assert cache_folder("kernels") == home / ".cache" / "ascend-vlm" / "kernels"


def test_a_link_inside_the_cache_is_not_followed(named, home, tmp_path):
    named.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (named / "kernels").symlink_to(tmp_path / "elsewhere")
    assert cache_folder("kernels") == home / ".cache" / "ascend-vlm" / "kernels"


def test_a_folder_that_everybody_may_rename_is_not_used(tmp_path, monkeypatch, home):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(shared / "mine"))
    assert cache_folder() == home / ".cache" / "ascend-vlm"
    shared.chmod(0o1777)  # as /tmp: only the owner renames
    assert cache_folder() == shared / "mine"


def test_without_a_safe_home_the_cache_lives_as_long_as_the_process(named, home):
    for folder in (named, home / ".cache" / "ascend-vlm"):
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    folder = cache_folder("kernels")
    assert folder == cache_folder("kernels") and named not in folder.parents
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_a_cache_that_cannot_be_made_is_no_reason_to_stop(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "file"))
    assert cache_folder("digests") == tmp_path / "file" / "digests"


def test_files_of_the_cache_are_private_too(tmp_path):
    file = tmp_path / "library.so"
    file.write_bytes(b"code")
    file.chmod(0o644)
    open_private(file).close()
    for mode in (0o664, 0o646):
        file.chmod(mode)
        with pytest.raises(Exception, match="may be written by others"):
            open_private(file)
    file.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(file, NOBODY, NOBODY)
        with pytest.raises(Exception, match=f"belongs to user {NOBODY}"):
            open_private(file)


# what is remembered


@pytest.fixture
def reads(monkeypatch):
    """The files that were read for their sha256."""
    read = []
    real = file_entry
    monkeypatch.setattr(checksums, "file_entry", lambda path: read.append(path.name) or real(path))
    return read


def flip_a_bit(file, at=0):
    """Changes one bit in place; size and inode stay."""
    with open(file, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 0x40]))


def test_a_file_is_read_once_per_state(tmp_path, reads):
    file = tmp_path / "vision.onnx.data"
    file.write_bytes(b"weights")
    entry = file_entry(file)
    assert problem_of(file, entry) is None and problem_of(file, entry) is None
    assert reads == ["vision.onnx.data"]
    flip_a_bit(file)
    assert "is damaged" in problem_of(file, entry)
    flip_a_bit(file)
    assert problem_of(file, entry) is None and len(reads) == 3


def test_a_change_that_hides_its_time_is_seen(tmp_path):
    """Size, inode and mtime as before; ctime cannot be set."""
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    entry = file_entry(file)
    state = file.stat()
    assert problem_of(file, entry) is None
    flip_a_bit(file, 3)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_mtime_ns == state.st_mtime_ns
    assert "is damaged" in problem_of(file, entry)


def test_checking_again_reads_everything(tmp_path, reads):
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    entry = file_entry(file)
    problem_of(file, entry)
    with check_again():
        problem_of(file, entry)
    problem_of(file, entry)
    assert len(reads) == 2


@pytest.mark.parametrize("content", ["", "[]", "null", '{"a": 1}', "[[], 5]", "x", "[" * 100_000])
def test_a_damaged_memo_only_costs_time(tmp_path, named, content):
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    entry = file_entry(file)
    assert problem_of(file, entry) is None
    for memo in (named / "digests").iterdir():
        memo.write_text(content)
    assert problem_of(file, entry) is None


def test_a_memo_that_others_may_write_is_not_believed(tmp_path, named, reads):
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    entry = file_entry(file)
    problem_of(file, entry)
    for memo in (named / "digests").iterdir():
        memo.chmod(0o666)
    problem_of(file, entry)
    assert len(reads) == 2


def test_what_is_wrong_with_a_file(tmp_path):
    entry = {"bytes": 7, "sha256": "0"}
    file = tmp_path / "file"
    assert problem_of(file, entry) == "is missing"
    os.mkfifo(file)
    assert "named pipe" in problem_of(file, entry)
    file.unlink()
    file.write_bytes(b"short")
    assert problem_of(file, entry) == "has 5 bytes, its manifest says 7"


# a folder's checksums.json


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("weights.safetensors", "tokenizer.json"):
        (folder / name).write_text(name)
    write_checksums(folder, ["weights.safetensors", "tokenizer.json"])
    return folder


def test_a_whole_folder_has_no_problem(folder, tmp_path):
    assert checksum_problems(folder) == []
    assert checksum_problems(tmp_path) == []  # one without checksums.json
    check_checksums(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "tokenizer.json"])
def test_a_flipped_bit_is_named(folder, name):
    flip_a_bit(folder / name)
    with pytest.raises(ToolkitError, match=f"{name} is damaged.*remove .*{CHECKSUMS}"):
        check_checksums(folder)


def test_a_missing_file_is_named(folder):
    (folder / "tokenizer.json").unlink()
    assert checksum_problems(folder) == [f"{folder / 'tokenizer.json'} is missing"]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ".hidden", "a/b"])
def test_checksums_name_files_beside_them_only(folder, name):
    entries = {name: {"bytes": 1, "sha256": "0"}}
    (folder / CHECKSUMS).write_text(json.dumps(entries))
    assert checksum_problems(folder) == [f"{folder / CHECKSUMS} cannot be read"]


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"a": 1}', '{"a": {}}', "[" * 10**5])
def test_unreadable_checksums_are_a_problem(folder, text):
    (folder / CHECKSUMS).write_text(text)
    (folder / "a").write_text("a")
    assert checksum_problems(folder) == [f"{folder / CHECKSUMS} cannot be read"]
