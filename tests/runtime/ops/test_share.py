"""kernels/share.c: threads share the tasks of a loop; each is done once, whoever comes."""

import ctypes
import os
import threading

import pytest
import torch

from runtime.ops.cpu import native_library
from runtime.ops.cpu.packed_weights import FloatWeight

pytestmark = pytest.mark.skipif(
    native_library.kernels() is None, reason="no kernels on this machine"
)
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def parts_of(count: int) -> list[tuple[int, int]]:
    """The parts of 0..count in which `share` had them done."""
    parts = []
    task = TASK(lambda _, start, end: parts.append((start, end)))
    native_library.kernels().share(count, task, None)
    return sorted(parts)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000])
def test_every_task_is_done_once(threads, count):
    torch.set_num_threads(threads)
    for _ in range(20):
        parts = parts_of(count)
        starts = [start for start, _ in parts]
        ends = [end for _, end in parts]
        assert starts == [0, *ends[:-1]] and ends[-1] == count


def test_parts_become_shorter():
    torch.set_num_threads(2)
    lengths = [end - start for start, end in parts_of(1000)]
    assert lengths[0] == 251 and lengths[-1] == 1  # a quarter of what is left, at least one
    assert lengths == sorted(lengths, reverse=True)


@pytest.fixture(scope="module")
def example():
    """(a matmul, its input); the weight is kept, its memory is what the kernels read."""
    generator = torch.Generator().manual_seed(0)
    weight = FloatWeight(torch.randn(1024, 256, generator=generator).bfloat16())
    x = torch.randn(1, 256, generator=generator).bfloat16()
    yield weight.small_batch_matmul(), x
    del weight


def test_a_result_does_not_depend_on_the_threads(example):
    matmul, x = example
    torch.set_num_threads(1)
    expected = matmul(x)
    for threads in (2, 5, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(matmul(x), expected) for _ in range(50))


def test_several_callers_at_a_time(example):
    matmul, x = example
    expected = matmul(x)
    right = []

    def call():
        torch.set_num_threads(3)
        right.extend(torch.equal(matmul(x), expected) for _ in range(50))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(right) == 150 and all(right)


def test_a_forked_process_computes_too(example):
    matmul, x = example
    torch.set_num_threads(3)
    expected = matmul(x)
    process = os.fork()
    if not process:
        os._exit(int(not torch.equal(matmul(x), expected)))
    assert os.waitpid(process, 0)[1] == 0
