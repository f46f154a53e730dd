"""The processes of a model that is split over several devices (tensor parallelism), and the
messages between them.

Rank 0 is the process of the user's command or script: it reads questions, encodes images, samples
and prints. The other ranks load their part of the decoder and compute what rank 0 sends: token ids
(those it sampled last), image features, and the step. `Engine` starts them itself; or torchrun
does, under which every rank runs the same command and all but rank 0 end up in `follow`.

Messages go over gloo between the hosts' processors; sums of activations go over hccl on NPUs, over
gloo on CPUs. Rank 0 ends everything when a rank dies. The kernel ends the others when rank 0 dies,
in whatever way.
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
from dataclasses import dataclass, replace
from datetime import timedelta

from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError
from runtime.common.processes import ROOT, die_with_parent

TIMEOUT = timedelta(days=30)  # of a message: a user may think that long before the next question
REPORT_SECONDS = 10  # that a lost connection waits for rank 0's thread, which knows which rank died
HOST = "127.0.0.1"  # all ranks run on one machine
PORT = "ASCEND_VLM_PORT"  # names the port of rank 0 to a process that we started
FOLLOWER = "runtime.engine.follower"  # module of a process that we start

# Of this process. torch.distributed has one group of processes, so there is one team as well.
_team = None
_workers: list[subprocess.Popen] = []  # that this process started
_ending = threading.Lock()


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
    """`size` processes that compute one decoder; this one is `rank`."""

    def __init__(self, rank: int, size: int, store=None):
        import torch
        import torch.distributed as dist

        self.rank = rank
        self.size = size
        self.free = True  # no engine uses it
        self._dist = dist
        self._device_group = None
        self._out_of_step = False
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks run on one machine
        torch.set_num_threads(threads_of(size))
        where = {"store": store} if store else {"init_method": "env://"}
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=TIMEOUT, **where)
        atexit.register(leave)

    def connect(self, device: str):
        """Every rank calls this once its device is open: sums on NPUs go from device to device."""
        if device.startswith("npu") and self._device_group is None:
            self._device_group = self._dist.new_group(backend="hccl", timeout=TIMEOUT)

    def wait_for_all(self):
        """Every rank calls this once it has loaded its part."""
        with self._connected():
            self._dist.barrier()

    def send(self, message):
        """Rank 0: send to all others. ToolkitError when an error has separated the ranks."""
        if self._out_of_step:
            raise ToolkitError(
                "an error interrupted the processes of this model in the middle of a step; run the same "
                "command again",
                CHECK_FAILED,
            )
        with self._connected():
            self._dist.broadcast_object_list([message])

    def receive(self):
        """Other ranks: the next message, or None when rank 0 is gone."""
        message = [None]
        with suppress(ToolkitError), self._connected():
            self._dist.broadcast_object_list(message)
        return message[0]

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
            self._dist.all_gather_single(parts, x.contiguous(), group=self._device_group)
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
            if _workers or PORT in os.environ:
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
    _team.send(("load", (str(model_dir), options)))
    return _team


def _start(size: int) -> Team:
    """Start the other ranks on this machine and wait for them."""
    from torch.distributed import TCPStore

    store = TCPStore(
        HOST, 0, world_size=size, is_master=True, wait_for_workers=False, timeout=TIMEOUT
    )
    terminal = _terminal_settings()
    for rank in range(1, size):
        watcher = Watcher(rank, size, store.port, terminal)
        threading.Thread(target=watcher.run, daemon=True).start()
    return Team(0, size, store)


@dataclass
class Watcher:
    """Starts rank `rank` of `size` and waits for its end. port: of rank 0's store; terminal:
    settings to restore."""

    rank: int
    size: int
    port: int
    terminal: list | None

    def run(self):
        """Starts one rank and waits; when it exits, all ranks are terminated.

        The thread lives as long as the process that it started, because the kernel kills that
        process (processes.die_with_parent) when this thread ends.
        """
        with tempfile.TemporaryFile() as output:
            try:
                worker = self._start(output)
            except OSError as error:  # rank 0 would wait for it
                self._end_all(CHECK_FAILED, str(error))
            _workers.append(worker)
            code = worker.wait()
            if worker in _workers:  # not closed by us
                output.seek(0)
                self._end_all(code, output.read().decode(errors="replace").strip())

    def _start(self, output) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", FOLLOWER, str(os.getpid())],
            env={**os.environ, **self._environment()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def _environment(self) -> dict[str, str]:
        path = [str(ROOT)]
        if os.environ.get("PYTHONPATH"):
            path.append(os.environ["PYTHONPATH"])
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.rank),
            PORT: str(self.port),
            "OMP_NUM_THREADS": str(threads_of(self.size)),
            "PYTHONPATH": os.pathsep.join(path),
        }

    def _end_all(self, code: int, stderr_text: str):
        """Says once why the rank ended, and ends this process, and so the others."""
        _ending.acquire()  # and never released: one message is enough
        print(
            f"error: process {self.rank} of {self.size} (tensor parallel) {_reason(code, stderr_text)}; all were "
            "ended, run the same command again",
            file=sys.stderr,
            flush=True,
        )
        if self.terminal:  # the prompt's line editing changed it
            termios.tcsetattr(sys.stdin, termios.TCSANOW, self.terminal)
        os._exit(code if CHECK_FAILED <= code <= MISSING_COMPONENT else CHECK_FAILED)


def _reason(code: int, stderr_text: str) -> str:
    """How a process ended, in its own words where it has left some; with --debug in all of them."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code == 0 or not stderr_text:
        return f"ended with code {code}"
    if "--debug" in sys.argv:
        return f"failed: {stderr_text}"
    return f"failed: {stderr_text.splitlines()[-1].removeprefix('error: ')}"


def threads_of(size: int) -> int:
    """Threads of each of `size` processes that share this machine's processors."""
    return max(1, (os.cpu_count() or 1) // size)


def _terminal_settings():
    with suppress(OSError, ValueError, AttributeError, termios.error):
        return termios.tcgetattr(sys.stdin)


def close_team():
    """End the ranks we started; those of torchrun wait for another model."""
    if _workers:
        leave()
    elif _team:
        _team.free = True


def leave():
    """End the ranks we started and give up the connection.

    Also called at exit: torch aborts a process that still has its connections then.
    """
    global _team
    import torch.distributed as dist

    ended = _workers[:]
    _workers.clear()  # first: their watchers see that this is no failure
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
    if not port:  # torchrun's own variables say where
        return Team(rank, size)
    store = TCPStore(HOST, int(port), world_size=size, is_master=False, timeout=TIMEOUT)
    return Team(rank, size, store)


def follow(load) -> int:
    """`load(model_dir, options)` the model that rank 0 loads and compute what it sends, until it is
    gone."""
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
            device = _own_device(options.device, _team.rank)
            engine = load(model_dir, replace(options, device=device))
        else:
            engine.follow(*content)
    return 0


def _own_device(device: str, rank: int) -> str:
    """The device of a rank, where rank 0 has `device`."""
    kind, _, first = device.partition(":")
    if kind == "cpu":
        return device
    return f"{kind}:{int(first or 0) + int(os.environ.get('LOCAL_RANK', rank))}"
