"""Matrices turned over between images by channels and rows of channels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparseprop.ops import reference, transpose


@given(st.integers(0, 3), st.integers(0, 70), st.integers(0, 70), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_element_is_where_it_belongs(images, rows, columns, dtype):
    x = torch.arange(images * rows * columns, dtype=torch.float32).to(dtype)
    found = transpose(x, images, rows, columns)
    assert found.is_contiguous()
    assert torch.equal(found, reference.transpose(x, images, rows, columns))


@pytest.mark.parametrize("shape", [(2, 300, 129), (1, 1024, 512), (3, 16, 16), (1, 1, 40000), (40000, 2, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_large_ones_by_several_threads(shape, threads):
    x = torch.randn(shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(transpose(x, *shape), x.transpose(1, 2))
    finally:
        torch.set_num_threads(before)


def test_bits_stay():
    x = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]).view(1, 2, 2)
    assert torch.equal(transpose(x, 1, 2, 2).view(torch.int32), x.transpose(1, 2).contiguous().view(torch.int32))


@pytest.mark.parametrize(("x", "sizes", "error"), [
    (torch.zeros(6), (1, 2, 2), ValueError), (torch.zeros(6), (1, -2, -3), ValueError),
    (torch.zeros(6), (2**40, 2**40, 0), ValueError), (torch.zeros(6, dtype=torch.float64), (1, 2, 3), TypeError),
    (torch.zeros(6, dtype=torch.int16), (1, 2, 3), TypeError), (torch.zeros(4, 3)[:, ::2], (1, 4, 2), ValueError),
])  # fmt: skip
def test_what_does_not_fit_is_refused(x, sizes, error):
    with pytest.raises((error, RuntimeError)):
        transpose(x, *sizes)


def test_it_is_registered_as_torch_wants():
    torch.library.opcheck(transpose.overload, (torch.randn(2, 3, 4), 2, 3, 4))
