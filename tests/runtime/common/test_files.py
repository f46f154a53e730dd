"""Files of strangers and of ours: names, kinds, links, private names, and what a kill leaves."""

import fcntl
import os
import socket

import pytest

from models.errors import UserError
from models.files import (
    is_plain_name,
    is_private_name,
    new_file,
    open_inside,
    open_own,
    open_regular,
    private_file,
)
from runtime.common.errors import ToolkitError
from runtime.common.files import (
    appended_text,
    fresh_folder,
    locked,
    new_text,
    own_folder,
    prepare,
    remove_folder,
    work_folder,
    write_atomically,
)

# names


@pytest.mark.parametrize("name", ["vision.onnx", "model-00001-of-2.safetensors", "模型.bin", "a b"])
def test_plain_names(name):
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".bashrc",
        "/etc/passwd",
        "../x",
        "a/b",
        "link/.bashrc",
        "a\\b",
        "a\0b",
        "a\nb",
        "\x1b[2J",
        "x" * 256,
        "é" * 128,
        "\ud800",
        None,
        1,
        ["x"],
    ],
)
def test_other_names(name):
    assert not is_plain_name(name)


# kinds


def special_files(folder):
    """Paths of a named pipe, a socket, a device, a folder, by name."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    (folder / "folder").mkdir()
    (folder / "link to a pipe").symlink_to("pipe")
    return {
        "named pipe": folder / "pipe",
        "socket": folder / "socket",
        "device": "/dev/zero",
        "folder": folder / "folder",
        "a named pipe": folder / "link to a pipe",
    }


@pytest.mark.parametrize("opened", [open_regular, open_own])
def test_only_regular_files_are_opened(tmp_path, opened):
    for kind, path in special_files(tmp_path).items():
        if kind == "a named pipe" and opened is open_own:
            continue
        with pytest.raises(UserError, match=kind):
            opened(path)


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as stream:
            assert stream.read() == b"content" and stream.name == str(tmp_path / name)
    with pytest.raises(UserError, match="is a link"):
        open_regular(tmp_path / "link", follow=False)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


def test_a_file_exchanged_after_the_check_is_refused(tmp_path, monkeypatch):
    """stat sees a regular file, open finds a pipe: the open descriptor decides."""
    (tmp_path / "file").write_bytes(b"content")
    os.mkfifo(tmp_path / "pipe")
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: real(tmp_path / "pipe", *rest))
    with pytest.raises(UserError, match="is a named pipe"):
        open_regular(tmp_path / "file")


# a checkpoint's files


def test_files_inside_a_checkpoint(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "real.txt").write_text("inside")
    (model / "link.txt").symlink_to("real.txt")
    for name in ("real.txt", "link.txt"):
        with open_inside(model, name) as stream:
            assert stream.read() == b"inside"


def test_blobs_of_a_hugging_face_cache_are_inside(tmp_path):
    cache = tmp_path / "models--x--y"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "123").write_text("merges")
    (snapshot / "merges.txt").symlink_to("../../blobs/123")
    (tmp_path / "by another way").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "by another way"):
        with open_inside(folder, "merges.txt") as stream:
            assert stream.read() == b"merges"


@pytest.mark.parametrize("target", ["../.ssh/id", "{}/.ssh/id", "folder/id", "../model-2/id"])
def test_a_link_that_leaves_a_checkpoint_is_refused(tmp_path, target):
    for folder in (".ssh", "model", "model-2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "id").write_text("PRIVATE KEY")
    (tmp_path / "model" / "folder").symlink_to("../.ssh")
    (tmp_path / "model" / "merges.txt").symlink_to(target.format(tmp_path))
    with pytest.raises(UserError, match="merges.txt is a link to .*, outside its folder"):
        open_inside(tmp_path / "model", "merges.txt")


def test_blobs_that_are_a_link_are_outside(tmp_path):
    cache = tmp_path / "cache"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id").write_text("PRIVATE KEY")
    (cache / "blobs").symlink_to("../.ssh")
    (cache / "snapshots" / "abc" / "merges.txt").symlink_to("../../blobs/id")
    with pytest.raises(UserError, match="outside its folder"):
        open_inside(cache / "snapshots" / "abc", "merges.txt")


# writing


def thesis(folder):
    """A file outside, to which links lead."""
    file = folder / "thesis.txt"
    file.write_text("the only copy")
    return file


@pytest.mark.parametrize(
    "write",
    [lambda path: write_atomically(path, "new"), lambda path: new_text(path).close()],
)
def test_what_is_written_replaces_a_link(tmp_path, write):
    file = thesis(tmp_path)
    (tmp_path / "result").symlink_to(file)
    write(tmp_path / "result")
    assert file.read_text() == "the only copy"


@pytest.mark.parametrize("opened", [appended_text, open_own])
def test_what_grows_is_not_reached_through_a_link(tmp_path, opened):
    file = thesis(tmp_path)
    (tmp_path / "link").symlink_to(file)
    os.link(file, tmp_path / "second name")
    with pytest.raises(UserError, match="is a link"):
        opened(tmp_path / "link")
    with pytest.raises(UserError, match="is a second name of another file"):
        opened(tmp_path / "second name")
    assert file.read_text() == "the only copy"


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    file = thesis(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").symlink_to("../thesis.txt")
    with pytest.raises(UserError, match=r"\.lock is a link"), locked(out):
        raise AssertionError("locked")
    assert file.read_text() == "the only copy"


def test_a_lock_keeps_what_is_in_it(tmp_path):
    (tmp_path / ".lock").write_text("notes")
    with locked(tmp_path), open(tmp_path / ".lock") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (tmp_path / ".lock").read_text() == "notes"


def test_a_writer_that_dies_leaves_the_old_content(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "file") as stream:
        stream.write(b"half of the n")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_private_names_are_new_and_known(tmp_path):
    with private_file(tmp_path / "a") as first, private_file(tmp_path / "a") as second:
        assert first != second and first.parent == tmp_path
        assert is_private_name(first.name) and not is_private_name(".a.part")
    assert not list(tmp_path.iterdir())


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


# folders


@pytest.mark.parametrize("prepared", [own_folder, fresh_folder, work_folder, remove_folder])
def test_a_folder_that_is_a_link_is_refused(tmp_path, prepared):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = thesis(elsewhere)
    (tmp_path / ".partial").symlink_to(elsewhere)
    with pytest.raises(ToolkitError, match=r"\.partial is a link"):
        prepared(tmp_path / ".partial")
    assert file.read_text() == "the only copy"


def test_folders_are_ours_alone(tmp_path):
    assert fresh_folder(tmp_path / "a").stat().st_mode & 0o777 == 0o700
    (tmp_path / "a" / "file").touch()
    assert list(own_folder(tmp_path / "a").iterdir())
    assert not list(fresh_folder(tmp_path / "a").iterdir())
    remove_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_removing_a_folder_follows_no_link_in_it(tmp_path):
    file = thesis(tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "folder").symlink_to(tmp_path)
    remove_folder(tmp_path / "work")
    assert file.read_text() == "the only copy"


@pytest.mark.parametrize("depth", ["", "layers/"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_work_folder_with_a_link_or_a_pipe_is_not_continued(tmp_path, kind, depth):
    (tmp_path / "work" / "layers").mkdir(parents=True)
    (tmp_path / "work" / "layers" / "layer.safetensors").touch()
    work_folder(tmp_path / "work")
    path = tmp_path / "work" / depth / "piece.onnx"
    if kind == "link":
        path.symlink_to(thesis(tmp_path))
    else:
        os.mkfifo(path)
    with pytest.raises(ToolkitError, match=f"piece.onnx is a .*{kind}, which no earlier run left"):
        work_folder(tmp_path / "work")


def test_out_may_be_a_link_of_the_users(tmp_path):
    (tmp_path / "big disk").mkdir()
    (tmp_path / "out").symlink_to("big disk")
    write_atomically(prepare(str(tmp_path / "out")) / "report.json", "{}")
    assert (tmp_path / "big disk" / "report.json").read_text() == "{}"
