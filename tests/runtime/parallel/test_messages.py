"""Messages between ranks, and the secret by which the ranks know each other."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from models.errors import UserError
from runtime.common.errors import ToolkitError
from runtime.parallel import secret
from runtime.parallel.messages import Sealer, decode, encode

KEY = b"k" * 32
CONTENT = {
    "kind": "compute",
    "content": {
        "ids": torch.tensor([5, 7, 11]),
        "images": [[3, torch.randn(2, 4)]],
        "steps": [{"cos": torch.randn(3, 8).bfloat16(), "q_lens": [3], "causal": False}],
        "rows": None,
        "empty": torch.empty(0, 4),
        "one": torch.tensor(2.5, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "share": 0.9,
        "model_dir": "模型",
    },
}


def assert_equal(found, wanted):
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_equal(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted):
            assert_equal(ours, theirs)
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    else:
        assert found == wanted and type(found) is type(wanted)


def test_a_message_comes_back_as_it_was_sent():
    assert_equal(Sealer(KEY).open(Sealer(KEY).seal(CONTENT)), CONTENT)


def test_strided_tensors_paths_and_tuples():
    columns = torch.arange(12).view(3, 4)[:, 1:3]
    found = decode(encode({"columns": columns, "path": Path("/a"), "pair": (1, "b")}))
    assert_equal(found, {"columns": columns, "path": "/a", "pair": [1, "b"]})


def test_objects_are_not_sent():
    with pytest.raises(TypeError, match="cannot hold set"):
        encode({"ids": {1, 2}})


@pytest.mark.parametrize("place", [0, 31, 32, 45, -1])
def test_a_changed_byte_is_found(place):
    sealed = bytearray(Sealer(KEY).seal(CONTENT))
    sealed[place] ^= 1
    with pytest.raises(ToolkitError, match="was not sent by its process 0"):
        Sealer(KEY).open(bytes(sealed))


def test_another_key_a_repeated_message_and_none_at_all():
    sealed = Sealer(KEY).seal(CONTENT)
    reader = Sealer(KEY)
    reader.open(sealed)
    for bad, by in ((sealed, reader), (sealed, Sealer(b"other")), (b"", Sealer(KEY))):
        with pytest.raises(ToolkitError, match="was not sent by its process 0"):
            by.open(bad)


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_a_pickle_is_never_loaded(tmp_path, monkeypatch):
    """Not even from someone who holds the key."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolkitError):
        Sealer(KEY).open(pickle.dumps(Planted()))
    with pytest.raises(ValueError):
        decode(pickle.dumps(Planted()))
    assert not list(tmp_path.iterdir())


def test_a_message_that_says_it_is_longer_than_it_is():
    with pytest.raises(ValueError):
        decode(encode({"ids": torch.arange(9)})[:-8])


# the secret


def test_the_private_folder_is_this_users_alone():
    folder = secret.private_folder()
    try:
        held = folder / secret.SECRET
        assert folder.stat().st_mode & 0o777 == 0o700 and held.stat().st_mode & 0o777 == 0o600
        assert len(secret.read(held)) == secret.SECRET_BYTES
        assert [each.name for each in folder.iterdir()] == [secret.SECRET]
    finally:
        held.unlink()
        folder.rmdir()


def test_the_users_secret_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    first = secret.users_secret()
    assert first == secret.users_secret() and len(set(first)) > 1
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("fault", ["readable", "link", "short", "fifo"])
def test_a_secret_that_others_could_know_is_refused(fault, tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path))
    secret.users_secret()
    held = tmp_path / secret.USERS_SECRET
    if fault == "readable":
        held.chmod(0o640)
    elif fault == "link":
        held.rename(tmp_path / "elsewhere")
        held.symlink_to(tmp_path / "elsewhere")
    elif fault == "short":
        held.write_bytes(b"guess")
    else:
        held.unlink()
        os.mkfifo(held, 0o600)
    with pytest.raises(UserError, match=secret.USERS_SECRET):
        secret.users_secret()


def test_a_rank_with_another_secret_is_named():
    nonces = b"n" * 64
    proofs = [secret.proof(KEY, 0, nonces), secret.proof(b"guess", 1, nonces)]
    with pytest.raises(ToolkitError, match="process 1 of 2 .* does not hold this process's secret"):
        secret.check_proofs(KEY, proofs, nonces)
    stale = [secret.proof(KEY, rank, b"old") for rank in range(2)]
    with pytest.raises(ToolkitError, match="process 0 of 2"):
        secret.check_proofs(KEY, stale, nonces)
    with pytest.raises(ToolkitError, match="process 1 of 2"):  # what rank 0 said, said again
        secret.check_proofs(KEY, proofs[:1] * 2, nonces)
