"""Sends hostile requests to a service of its own and reports what came back.

`python benchmarks/hostile.py --bodies 20000` fails on a crash, a status 500, a fetched URL, or memory that grows by
more than 5 %. Everything stays on this machine: the URLs point to loopback, where a canary listens that the service
must never reach.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import socket
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field

import httpx
from hostile_bodies import bodies
from service import MODEL, MOST_GROWTH, Process, growth

LIMITS = {
    "--max-model-len": "128",
    "--max-num-seqs": "4",
    "--max-image-pixels": "1000000",
    "--max-image-bytes": "500000",
    "--max-body-bytes": "2000000",
    "--allowed-local-media-path": str(MODEL),
}
ALLOWED = (  # {p} is the canary's port
    "127.0.0.1:{p}",
    "localhost:{p}",
    "[::1]:{p}",
    "[::ffff:127.0.0.1]:{p}",
    "ip6-localhost:{p}",
    "0.0.0.0:{p}",
    "127.0.0.1",
)


class Canary:
    """A server on loopback, IPv4 and IPv6, that counts connections in `visits`; 0 is right."""

    def __init__(self):
        self.visits = 0
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port = self._sockets[0].getsockname()[1]
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # a machine without IPv6 loopback
                self._sockets.append(
                    socket.create_server(("::1", self.port), family=socket.AF_INET6)
                )
        for listening in self._sockets:
            threading.Thread(target=self._listen, args=(listening,), daemon=True).start()

    def _listen(self, listening):
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            self.visits += 1
            connection.close()

    def close(self):
        for listening in self._sockets:
            listening.close()

    @property
    def allowed(self) -> list[str]:
        """Flags that allow fetching from the canary: only the check of addresses then keeps the service away from it."""
        flags = []
        for host in ALLOWED:
            flags += ["--allowed-media-domains", host.format(p=self.port)]
        return flags


@dataclass
class Report:
    """Counts the answers. `wrong`: those with a status 500, without an error message, or that did not arrive. `memory`:
    samples in bytes."""

    count: int = 0
    statuses: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def add(self, kind, path, body, answer):
        self.count += 1
        status = answer.status_code
        self.statuses[status] += 1
        if status >= 500 or (status >= 400 and not answer.json()["error"]["message"]):
            self.wrong.append(f"{kind} {path} {body[:300]!r} -> {status} {answer.text[:300]}")

    def add_lost(self, kind, path, body, error: Exception):
        self.count += 1
        self.wrong.append(f"{kind} {path} {body[:300]!r} -> {error!r}")


def send(url: str, requests, report: Report, memory=None, clients=4):
    """Sends all `requests` to the service at `url`, from `clients` at once; samples memory() after every 50th."""
    lock = threading.Lock()

    def work():
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            while True:
                with lock:
                    request = next(requests, None)
                if request is None:
                    return
                kind, path, body, headers = request
                try:
                    answer = client.post(path, content=body, headers=headers)
                except httpx.TransportError as error:
                    with lock:
                        report.add_lost(kind, path, body, error)
                    continue
                with lock:
                    report.add(kind, path, body, answer)
                    if memory and report.count % 50 == 0:
                        report.memory.append(memory())

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(work) for _ in range(clients)]:
            done.result()


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bodies", type=int, default=20_000, help="how many (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    return parser.parse_args()


def main() -> int:
    options = parse()
    canary = Canary()
    report = Report()
    service = Process("--model", str(MODEL), *itertools.chain(*LIMITS.items()), *canary.allowed)
    endless = bodies(options.seed, canary.port, str(MODEL))
    try:
        service.wait()
        requests = itertools.islice(endless, options.bodies)
        send(service.url, requests, report, lambda: service.resident)
        left = 0 if service.ended() else service.num_requests
    finally:
        code = service.stop()
    print(
        f"{report.count} bodies, statuses {dict(sorted(report.statuses.items()))}, "
        f"{canary.visits} fetched, memory {report.memory[0] >> 20} MiB, then {growth(report.memory):+.1%}, "
        f"{left} requests left over, exit code {code}"
    )
    print("\n".join(report.wrong[:20]))
    grown = growth(report.memory) > MOST_GROWTH
    return int(bool(report.wrong or canary.visits or left or code or grown))


if __name__ == "__main__":
    sys.exit(main())
