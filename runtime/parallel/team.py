"""The processes of a model that is split over several devices (tensor parallelism), and the
messages between them.

Rank 0 is the process of the user's command or script: it reads questions, encodes images, samples
and prints. The other ranks load their part of the decoder and compute what rank 0 sends: token ids
(those it sampled last), image features, and the step. `Engine` starts them itself; or torchrun
does, under which every rank runs the same command and all but rank 0 end up in `follow`.

Messages go over gloo between the hosts' processors; sums of activations go over hccl on NPUs, over
gloo on CPUs. The ranks that we start find each other in a private folder, and gloo listens on the
loopback alone. All ranks prove to each other that they hold one secret (secret.py); messages are
JSON and tensors, sealed with it (messages.py). Rank 0 ends everything when a rank dies. The kernel
ends the others when rank 0 dies, in whatever way.
"""

import atexit
import os
import shutil
import signal
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.files import check_again, checks_again
from runtime.common.processes import die_with_parent

from . import secret as secrets
from .messages import Sealer
from .workers import FOLDER, end_workers, start_workers, workers

TIMEOUT = timedelta(days=30)  # of a message: a user may think that long before the next question
REPORT_SECONDS = 10  # that a lost connection waits for rank 0's thread, which knows which rank died
STORE = "store"  # file name in the private folder of a team
LOOPBACK = "lo"
INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo's variable: the interface that it listens on
LONGEST_MESSAGE = 4 << 30  # bytes

# Of this process. torch.distributed has one group of processes, so there is one team as well.
_team = None


def rank_and_size() -> tuple[int, int]:
    """What torchrun, or our own start, put into the environment; (0, 1) where neither did."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_torchrun(size: int, load):
    """Under torchrun only rank 0 comes back from here; the others `follow` it with `load`.

    ToolkitError when torchrun started another number of processes than --tensor-parallel-size says.
    """
    rank, started = rank_and_size()
    if started not in (1, size):
        raise ToolkitError(
            f"torchrun started {started} processes, --tensor-parallel-size is {size}; give both the same "
            "number"
        )
    if rank:
        sys.exit(follow(load))


class Team:
    """`size` processes that compute one decoder; this one is `rank`.

    secret: bytes that all of them hold. store: where they find each other; None: where torchrun's
    variables say.
    """

    def __init__(self, rank: int, size: int, secret: bytes, store=None):
        import torch
        import torch.distributed as dist

        self.rank = rank
        self.size = size
        self.free = True  # no engine uses it
        self._torch = torch
        self._dist = dist
        # all_gather_single is the name since torch 2.13
        newer = hasattr(dist, "all_gather_single")
        self._gather_into = dist.all_gather_single if newer else dist.all_gather_into_tensor
        self._device_group = None
        self._out_of_step = False
        where = {"store": store} if store else {"init_method": "env://"}
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=TIMEOUT, **where)
        atexit.register(leave)
        self._sealer = Sealer(self._agree(secret))

    def _agree(self, secret: bytes) -> bytes:
        """The key of this team's messages. ToolkitError when a rank does not hold the secret."""
        with self._connected():
            nonces = b"".join(self._all_bytes(os.urandom(secrets.SECRET_BYTES)))
            proofs = self._all_bytes(secrets.proof(secret, self.rank, nonces))
        secrets.check_proofs(secret, proofs, nonces)
        return secrets.session_key(secret, nonces)

    def _all_bytes(self, own: bytes) -> list[bytes]:
        """What each rank gives, in their order; all of one length."""
        tensor = self._torch.frombuffer(bytearray(own), dtype=self._torch.uint8)
        gathered = [self._torch.empty_like(tensor) for _ in range(self.size)]
        self._dist.all_gather(gathered, tensor)
        return [each.numpy().tobytes() for each in gathered]

    def connect(self, device: str):
        """Every rank calls this once its device is open: sums on NPUs go from device to device."""
        if device.startswith("npu") and self._device_group is None:
            self._device_group = self._dist.new_group(backend="hccl", timeout=TIMEOUT)

    def wait_for_all(self):
        """Every rank calls this once it has loaded its part."""
        with self._connected():
            self._dist.barrier()

    def send(self, kind: str, **content):
        """Rank 0: send plain values, lists, dicts and tensors to all others. ToolkitError when an
        error has separated the ranks."""
        if self._out_of_step:
            raise ToolkitError(
                "an error interrupted the processes of this model in the middle of a step; run the same "
                "command again",
                CHECK_FAILED,
            )
        sealed = self._sealer.seal({"kind": kind, "content": content})
        with self._connected():
            self._dist.broadcast(self._torch.tensor([len(sealed)]), 0)
            self._dist.broadcast(
                self._torch.frombuffer(bytearray(sealed), dtype=self._torch.uint8), 0
            )

    def receive(self) -> tuple[str, dict] | None:
        """Other ranks: kind and content of the next message, or None when rank 0 is gone.
        ToolkitError when it is not from rank 0."""
        try:
            with self._connected():
                sealed = self._receive_bytes()
        except ToolkitError:
            return None
        message = self._sealer.open(sealed)
        return message["kind"], message["content"]

    def _receive_bytes(self) -> bytes:
        length = self._torch.zeros(1, dtype=self._torch.int64)
        self._dist.broadcast(length, 0)
        size = min(max(int(length), 0), LONGEST_MESSAGE)
        sealed = self._torch.empty(size, dtype=self._torch.uint8)
        self._dist.broadcast(sealed, 0)
        return sealed.numpy().tobytes()

    def all_reduce(self, x):
        """The sum of x over all ranks, computed in place where x is contiguous."""
        x = x.contiguous()
        with self._connected():
            self._dist.all_reduce(x, group=self._device_group)
        return x

    def gather(self, x):
        """[T, n] of every rank -> [T, n * size], on every rank."""
        rows, columns = x.shape
        parts = x.new_empty(self.size * rows, columns)
        with self._connected():
            self._gather_into(parts, x.contiguous(), group=self._device_group)
        return parts.view(self.size, rows, columns).transpose(0, 1).reshape(rows, -1)

    @contextmanager
    def in_step(self):
        """Around what all ranks compute together: Ctrl-C waits until the block ends, and after an
        error in it the ranks no longer agree about the caches, so that nothing more can be sent."""
        with deferred_interrupt():
            try:
                yield
            except BaseException:
                self._out_of_step = True
                raise

    @contextmanager
    def _connected(self):
        """A lost connection is a ToolkitError, or the end of this process where another rank is to
        blame."""
        try:
            yield
        except RuntimeError as error:
            if workers or FOLDER in os.environ:
                # rank 0's thread that watches the process that died ends us all, with its reason
                threading.Event().wait(REPORT_SECONDS)
            raise ToolkitError(
                f"rank {self.rank} lost its connection to another process ({str(error).splitlines()[0]}); "
                "run the same command again",
                CHECK_FAILED,
            ) from error


@contextmanager
def deferred_interrupt():
    """Ctrl-C takes effect at the end of the block (in the main thread, the only one that gets
    signals)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts = []
    before = signal.signal(signal.SIGINT, lambda *event: interrupts.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupts:
            signal.raise_signal(signal.SIGINT)


# rank 0


def open_team(model_dir, options, load) -> Team | None:
    """The team of an Engine with these options: None for one device, else with every other rank
    loading the model too.

    Ranks of torchrun other than 0 call `load(model_dir, options)` and do not come back.
    ToolkitError when this process has a split model already.
    """
    global _team
    rank, started = rank_and_size()
    if _team and rank:  # a follower, loading what rank 0 loads
        return _team
    if options.tensor_parallel_size == 1:
        return None
    if _team and not _team.free:
        raise ToolkitError(
            "this process has a model that is split over several devices already; close() that Engine first"
        )
    join_torchrun(options.tensor_parallel_size, load)
    if _team is None:
        _team = _join() if started > 1 else _start(options.tensor_parallel_size)
    _team.free = False
    _team.send("load", model_dir=str(model_dir), options=vars(options), check_again=checks_again())
    return _team


def _start(size: int) -> Team:
    """Start the other ranks on this machine and wait for them."""
    folder = secrets.private_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    start_workers(size, folder)
    return _meet(0, size, folder)


def _meet(rank: int, size: int, folder: Path) -> Team:
    """The team of the processes that know this private folder, all on this machine."""
    from torch.distributed import FileStore

    secret = secrets.read(folder / secrets.SECRET)
    os.environ[INTERFACE] = LOOPBACK
    return Team(rank, size, secret, FileStore(str(folder / STORE), size))


def close_team():
    """End the ranks we started; those of torchrun wait for another model."""
    if workers:
        leave()
    elif _team:
        _team.free = True


def leave():
    """End the ranks we started and give up the connection.

    Also called at exit: torch aborts a process that still has its connections then.
    """
    global _team
    import torch.distributed as dist

    end_workers()
    if dist.is_initialized():
        dist.destroy_process_group()
    _team = None


# the other ranks


def _join() -> Team:
    """The team that the environment describes."""
    rank, size = rank_and_size()
    folder = os.environ.get(FOLDER)
    if folder:
        return _meet(rank, size, Path(folder))
    os.environ.setdefault(INTERFACE, LOOPBACK)  # on several machines the user names another
    return Team(rank, size, secrets.users_secret())  # torchrun's own variables say where


def follow(load) -> int:
    """`load(model_dir, options)` the model that rank 0 loads and compute what it sends, until it is
    gone. options: a dict, with this rank's own device."""
    global _team
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what Ctrl-C ends
    die_with_parent()
    _team = _join()
    engine = None
    while message := _team.receive():
        kind, content = message
        if kind == "load":
            engine = None  # its memory first
            options = content["options"]
            options["device"] = _own_device(options["device"], _team.rank)
            with check_again(content["check_again"]):
                engine = load(content["model_dir"], options)
        else:
            engine.follow(content)
    return 0


def _own_device(device: str, rank: int) -> str:
    """The device of a rank, where rank 0 has `device`."""
    kind, _, first = device.partition(":")
    if kind == "cpu":
        return device
    return f"{kind}:{int(first or 0) + int(os.environ.get('LOCAL_RANK', rank))}"
