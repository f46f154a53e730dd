"""A short run of benchmarks/hostile.py and benchmarks/overload.py, against the service in this process."""

import asyncio
import itertools

import pytest
import storm
from hostile import Canary, Report, send
from hostile_bodies import BOMBS, bodies
from http_service import Server
from overload import SEQUENCES, measure
from service import MODEL, growth

LIMITS = ["--model", str(MODEL), "--max-num-seqs", str(SEQUENCES)]


@pytest.fixture
def canary():
    listening = Canary()
    yield listening
    listening.close()


def test_200_hostile_bodies(canary):
    server = Server(
        *LIMITS,
        "--max-model-len",
        "128",
        "--max-image-pixels",
        "1000000",
        "--max-image-bytes",
        "500000",
        "--max-body-bytes",
        "2000000",
        "--allowed-local-media-path",
        str(MODEL),
        *canary.allowed,
    )
    report = Report()
    try:
        send(server.url, itertools.islice(bodies(1, canary.port, str(MODEL)), 200), report)
        assert server.gauge("num_requests_running") == server.gauge("num_requests_waiting") == 0
    finally:
        server.stop()
    assert report.count == 200 and canary.visits == 0 and not report.wrong, report.wrong
    assert (
        report.statuses[200] >= 15
        and report.statuses[400] >= 80
        and report.statuses[413] + report.statuses[422] >= 10
    )


def test_bodies_repeat_and_hold_every_kind(canary):
    first, again = ([*itertools.islice(bodies(3, 1, "/x"), 80)] for _ in range(2))
    assert first == again and len({kind for kind, *_ in first}) == 14 and len(BOMBS) > 10


def test_the_canary_sings(canary):
    import socket
    import time

    socket.create_connection(("127.0.0.1", canary.port)).close()
    end = time.monotonic() + 10
    while not canary.visits:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_overload():
    server = Server(*LIMITS, "--max-model-len", "512", "--max-queue", "2")
    try:
        line, fine = asyncio.run(measure(server, 1, 2, 0, queue=2, factor=4))
    finally:
        server.stop()
    assert fine, line


def test_a_short_storm_leaves_nothing_over():
    server = Server(*LIMITS, "--max-model-len", "512")
    samples = []
    try:
        port = int(server.url.rpartition(":")[2])
        look = lambda: samples.append(server.gauge("num_requests_running"))  # noqa: E731
        assert asyncio.run(storm.storm(port, 3, 0, look, clients=6)) > 5
        server.until("num_requests_running", 0)
        server.until("num_requests_waiting", 0)
        server.until("kv_cache_usage_perc", 0)
    finally:
        server.stop()
    assert samples


def test_growth_is_that_from_the_second_tenth_to_the_last():
    assert growth([1, *[100] * 8, 110]) == pytest.approx(0.1)
