"""The secret by which the processes of a split model know each other: takes a file of this user's,
returns bytes, and what two sides prove with them.

Processes that rank 0 starts share a private folder, which goes with them. Under torchrun every rank
reads the user's own file in the cache; on several machines it must be the same one.
"""

import hashlib
import hmac
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from models.files import open_regular
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.files import cache_root

SECRET_BYTES = 32
SECRET = "secret"  # file name in the private folder of a team
USERS_SECRET = "team.secret"  # file name in the cache
OTHERS = 0o077  # what group and others may do


def private_folder() -> Path:
    """A new folder of this user alone, with a secret in it."""
    folder = Path(tempfile.mkdtemp(prefix="ascend-vlm-team-"))
    _create(folder / SECRET)
    return folder


def users_secret() -> bytes:
    """The secret in this user's cache, made by whoever asks first."""
    path = cache_root() / USERS_SECRET
    try:
        if not path.exists():
            _create(path)
        return read(path)
    except OSError as error:
        raise ToolkitError(
            f"the secret that the processes of a split model share cannot be kept in {path} "
            f"({error.strerror}); set ASCEND_VLM_CACHE to a folder of yours"
        ) from error


def _create(path: Path):
    """The file appears whole, and only once, whoever else makes it at the same time."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(os.urandom(SECRET_BYTES))
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


def read(path: Path) -> bytes:
    """The secret in a file. ToolkitError or ModelError when others could have read or
    written it; OSError."""
    with open_regular(path, follow=False) as stream:
        state = os.fstat(stream.fileno())
        own = state.st_uid == os.geteuid() and not state.st_mode & OTHERS
        if not own or state.st_size != SECRET_BYTES:
            raise ToolkitError(
                f"{path} is no secret of {SECRET_BYTES} bytes that this user alone can read; remove the file, "
                "it is made again"
            )
        return stream.read()


def proof(secret: bytes, rank: int, nonces: bytes) -> bytes:
    """What only a process that holds the secret can say of these nonces."""
    return hmac.digest(secret, b"rank %d of " % rank + nonces, hashlib.sha256)


def check_proofs(secret: bytes, proofs: list[bytes], nonces: bytes):
    """ToolkitError when a rank holds another secret than this process."""
    for rank, given in enumerate(proofs):
        if not hmac.compare_digest(given, proof(secret, rank, nonces)):
            raise ToolkitError(
                f"process {rank} of {len(proofs)} (tensor parallel) does not hold this process's secret; on "
                f"several machines copy {cache_root() / USERS_SECRET} from one to the others",
                CHECK_FAILED,
            )


def session_key(secret: bytes, nonces: bytes) -> bytes:
    """The key of the messages between processes that proved themselves by these nonces."""
    return hmac.digest(secret, b"messages of " + nonces, hashlib.sha256)
