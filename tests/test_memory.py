"""Tensors that kernels write their results into."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparseprop._kernels._memory import empty, release_pages
from qsparseprop.utils.measurement_utils import current_rss_mb, release_free_memory

MB = 1 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="left to the C library elsewhere")


DTYPES = (torch.uint8, torch.int8, torch.int16, torch.float32, torch.bfloat16, torch.float64)


@given(shape=st.lists(st.integers(0, 300), max_size=5).filter(lambda s: torch.Size(s).numel() < 30 * MB),
       dtype=st.sampled_from(DTYPES))  # fmt: skip
def test_it_is_what_torch_gives(shape, dtype):
    for channels_last in (False, True) if len(shape) == 4 else (False,):
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        expected = torch.empty(shape, dtype=dtype, memory_format=memory_format, device="meta")
        tensor = empty(tuple(shape), dtype, channels_last)
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (expected.shape, expected.dtype, expected.stride())
        assert tensor.untyped_storage().nbytes() == expected.numel() * expected.element_size()
        assert not tensor.requires_grad
        tensor.fill_(3)
        assert tensor.numel() == 0 or (tensor.min() == 3 and tensor.max() == 3)


def test_impossible_shapes_raise_as_in_torch():
    for shape in ((-1, 3), (1 << 40, 1 << 40), (1 << 62,)):
        with pytest.raises(RuntimeError):
            empty(shape, torch.uint8)
    with pytest.raises(RuntimeError):
        empty((2, 3), torch.uint8, True)
    with pytest.raises(TypeError):
        empty((2.5,), torch.uint8)
    with pytest.raises(OverflowError):
        empty((1 << 70,), torch.uint8)


@linux
def test_pages_are_used_again_and_given_back():
    release_pages()
    first = empty((8 * MB,), torch.uint8)
    place = first.data_ptr()
    view = first[5:]
    del first
    assert release_pages() == 0  # a view keeps them
    del view
    again = empty((2 * MB - 5,), torch.float32)  # a little less
    assert again.data_ptr() == place
    del again
    small = empty((4 * MB,), torch.uint8)  # which they are too large for, so that they go
    assert release_pages() == 0
    del small
    assert release_pages() == 4 * MB
    assert release_pages() == 0


@linux
def test_what_is_needed_for_now_takes_pages_that_are_there():
    """However much larger they are, the smallest that are large enough; and they serve results again."""
    release_pages()
    first, second = (empty((size * MB,), torch.uint8) for size in (40, 16))
    places = first.data_ptr(), second.data_ptr()
    del first, second
    scratch = empty((5 * MB,), torch.uint8, for_now=True)
    other = empty((5 * MB,), torch.uint8, for_now=True)
    assert (other.data_ptr(), scratch.data_ptr()) == places
    scratch.fill_(1)
    del scratch, other
    again = [empty((size * MB,), torch.uint8) for size in (16, 40)]
    assert (again[1].data_ptr(), again[0].data_ptr()) == places
    alone = empty((3 * MB,), torch.uint8, for_now=True)  # there are none
    assert release_pages() == 0
    del alone, again
    assert release_pages() == 59 * MB


@linux
def test_blocks_in_use_and_kept_ones_are_no_more_than_were_in_use():
    release_free_memory()
    before = current_rss_mb()
    for size in range(3, 40):  # every one of another size
        empty((size * MB,), torch.uint8).fill_(1)
    assert current_rss_mb() - before < 60
    many = [empty((16 * MB,), torch.uint8).fill_(1) for _ in range(20)]
    del many
    assert release_pages() <= 256 * MB


def test_threads_get_memory_of_their_own():
    wrong = []

    def work(number: int) -> None:
        for turn in range(60):
            tensors = [empty(((2 + (turn + i) % 5) * MB,), torch.uint8).fill_(number) for i in range(3)]
            if any((t != number).any() for t in tensors):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong


def _child(tensor, queue) -> None:
    # by NumPy: OpenMP has no threads in a process that was forked from one that used them
    own = empty((4 * MB,), torch.uint8).numpy()
    own[:] = 7
    tensor.numpy()[:] = 9
    queue.put(int(own.sum(dtype="int64")))


@linux
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_its_own():
    kept, tensor = empty((4 * MB,), torch.uint8).fill_(5), empty((4 * MB,), torch.uint8).fill_(3)
    del kept
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(tensor, queue))
    process.start()
    again = empty((4 * MB,), torch.uint8).fill_(5)  # what the child has found kept, too
    assert queue.get(timeout=60) == 7 * 4 * MB
    process.join()
    assert (again == 5).all()
    assert (tensor == 3).all()
