"""The processes of a model that is split over several devices (tensor parallelism), and what they say to each other.

Rank 0 is the process of the user's command or script: it reads questions, encodes pictures, samples and prints. The other
ranks load their part of the decoder and compute what rank 0 sends: token ids (those it sampled last), picture rows, and
the step. They are started by `Engine` itself, or by torchrun, under which every rank runs the same command and all but
rank 0 end up in `follow`.

Messages go over gloo between the hosts' processors; sums of activations over hccl on NPUs, over gloo on CPUs. Rank 0 ends
everything when a rank dies, and the kernel ends the others when rank 0 dies, in whatever way.
"""

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import termios
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.processes import die_with_parent

PATIENCE = timedelta(days=30)  # a user may think that long before the next question
REPORT_SECONDS = (
    10  # a lost connection waits so long for the thread of rank 0 that knows which one died
)
PORT = "ASCEND_VLM_PORT"  # tells a process we started where rank 0 listens
FOLLOWER = "runtime.engine.follower"  # what a process we start runs

_team = None  # of this process; torch.distributed has one group of processes, too


def rank_and_size() -> tuple[int, int]:
    """What torchrun, or our own start, tells this process; (0, 1) where neither did."""
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
    """`size` processes that compute one decoder; this one is `rank`."""

    def __init__(self, rank: int, size: int, store=None):
        import torch
        import torch.distributed as dist

        self.rank = rank
        self.size = size
        self.free = True
        self._dist = dist
        self._sums = None
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks run on one machine
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
        where = {"store": store} if store else {"init_method": "env://"}
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=PATIENCE, **where)
        self._out_of_step = False
        atexit.register(_leave)

    def connect(self, device: str):
        """Every rank calls this once its device is open: sums on NPUs go from device to device."""
        if device.startswith("npu") and self._sums is None:
            self._sums = self._dist.new_group(backend="hccl", timeout=PATIENCE)

    def wait_for_all(self):
        """Every rank calls this once it has loaded its part."""
        with self._alive():
            self._dist.barrier()

    def send(self, message):
        """Rank 0: tell all others."""
        if self._out_of_step:
            raise ToolkitError(
                "an error interrupted the processes of this model in the middle of a step; run the same "
                "command again",
                CHECK_FAILED,
            )
        with self._alive():
            self._dist.broadcast_object_list([message])

    def receive(self):
        """Other ranks: the next message, or None when rank 0 is gone."""
        message = [None]
        with suppress(ToolkitError), self._alive():
            self._dist.broadcast_object_list(message)
        return message[0]

    def all_reduce(self, x):
        """The sum of x over all ranks, in place."""
        x = x.contiguous()
        with self._alive():
            self._dist.all_reduce(x, group=self._sums)
        return x

    def gather(self, x):
        """[T, n] of every rank -> [T, n * size], on every rank."""
        rows, columns = x.shape
        parts = x.new_empty(self.size * rows, columns)
        with self._alive():
            self._dist.all_gather_single(parts, x.contiguous(), group=self._sums)
        return parts.view(self.size, rows, columns).transpose(0, 1).reshape(rows, -1)

    @contextmanager
    def in_step(self):
        """What all ranks compute together: Ctrl-C waits until it is over; after an error they no longer agree."""
        with deferred_interrupt():
            try:
                yield
            except BaseException:
                self._out_of_step = True
                raise

    @contextmanager
    def _alive(self):
        try:
            yield
        except RuntimeError as error:
            if _workers or PORT in os.environ:  # who watches the process that died ends us
                threading.Event().wait(REPORT_SECONDS)
            raise ToolkitError(
                f"rank {self.rank} lost its connection to another process ({str(error).splitlines()[0]}); "
                "run the same command again",
                CHECK_FAILED,
            ) from error


@contextmanager
def deferred_interrupt():
    """Ctrl-C takes effect at the end of the block (in the main thread, which is the one that hears it)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = []
    before = signal.signal(signal.SIGINT, lambda *event: heard.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            signal.raise_signal(signal.SIGINT)


# rank 0


def open_team(model_dir, options, load) -> Team | None:
    """The team of an Engine with these options: None for one device, else with every other rank loading the model too.

    Ranks of torchrun other than 0 call `load(model_dir, options)` and do not come back.
    ToolkitError when this process has a split model already.
    """
    global _team
    rank, started = rank_and_size()
    if options.tensor_parallel_size == 1 or (_team and rank):
        return _team if rank else None
    if _team and not _team.free:
        raise ToolkitError(
            "this process has a model that is split over several devices already; close() that Engine first"
        )
    join_torchrun(options.tensor_parallel_size, load)
    if _team is None:
        _team = _join() if started > 1 else _start(options.tensor_parallel_size)
    _team.free = False
    _team.send(("load", (str(model_dir), options)))
    return _team


def _start(size: int) -> Team:
    """Start the other ranks on this machine and wait for them."""
    from torch.distributed import TCPStore

    store = TCPStore(
        "127.0.0.1", 0, world_size=size, is_master=True, wait_for_workers=False, timeout=PATIENCE
    )
    for rank in range(1, size):
        threading.Thread(
            target=_watch, args=(rank, size, store.port, _terminal()), daemon=True
        ).start()
    return Team(0, size, store)


_workers: list[subprocess.Popen] = []
_ending = threading.Lock()


def _watch(rank: int, size: int, port: int, terminal):
    """Start one rank and wait for its end, which is the end of us all. The thread lives as long as the process it started,
    because the kernel kills that process (child.die_with_parent) when this thread ends."""
    path = os.pathsep.join(
        filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
    )
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        PORT: str(port),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size)),
        "PYTHONPATH": path,
    }
    with tempfile.TemporaryFile() as said:
        try:
            worker = subprocess.Popen(
                [sys.executable, "-m", FOLLOWER, str(os.getpid())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        except OSError as error:  # rank 0 would wait for it
            _end_all(rank, size, CHECK_FAILED, str(error), terminal)
        _workers.append(worker)
        code = worker.wait()
        if worker in _workers:  # not closed by us
            said.seek(0)
            _end_all(rank, size, code, said.read().decode(errors="replace").strip(), terminal)


def _end_all(rank: int, size: int, code: int, said: str, terminal):
    _ending.acquire()  # for good: one message is enough
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    if said and code > 0:
        how = f"failed: {said if '--debug' in sys.argv else said.splitlines()[-1].removeprefix('error: ')}"
    print(
        f"error: process {rank} of {size} (tensor parallel) {how}; all were ended, run the same command again",
        file=sys.stderr,
        flush=True,
    )
    if terminal:  # the prompt's line editing changed it
        termios.tcsetattr(sys.stdin, termios.TCSANOW, terminal)
    os._exit(code if CHECK_FAILED <= code <= 3 else CHECK_FAILED)


def _terminal():
    with suppress(OSError, ValueError, AttributeError, termios.error):
        return termios.tcgetattr(sys.stdin)


def close_team():
    """End the ranks we started; those of torchrun wait for another model."""
    if _workers:
        _leave()
    elif _team:
        _team.free = True


def _leave():
    """Also at exit: torch aborts a process that still has its connections then."""
    global _team
    import torch.distributed as dist

    ended = _workers[:]
    _workers[:] = []
    for worker in ended:
        worker.kill()
        worker.wait()
    if dist.is_initialized():
        dist.destroy_process_group()
    _team = None


# the other ranks


def _join() -> Team:
    """The team that the environment describes."""
    from torch.distributed import TCPStore

    rank, size = rank_and_size()
    port = os.environ.get(PORT)
    return Team(
        rank,
        size,
        port
        and TCPStore("127.0.0.1", int(port), world_size=size, is_master=False, timeout=PATIENCE),
    )


def follow(load) -> int:
    """`load` the model that rank 0 loads and compute what it sends, until it is gone."""
    global _team
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what Ctrl-C ends
    die_with_parent()
    _team = _join()
    engine = None
    while message := _team.receive():
        kind, content = message
        if kind == "load":
            engine = None  # its memory first
            model_dir, options = content
            engine = load(model_dir, replace(options, device=_own_device(options.device)))
        else:
            engine.follow(*content)
    return 0


def _own_device(device: str) -> str:
    """The device of this rank, where rank 0 has `device`."""
    kind, _, first = device.partition(":")
    if kind == "cpu":
        return device
    return f"{kind}:{int(first or 0) + int(os.environ.get('LOCAL_RANK', _team.rank))}"
