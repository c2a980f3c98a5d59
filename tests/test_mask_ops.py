"""Masks of a bit an element: the kernels against plain torch."""

import pytest
import torch

from qsparseprop import ops
from qsparseprop.ops import reference

from ._helpers import generator, laid_out

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, float("inf"), -float("inf"), float("nan"), -float("nan")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed", "offset"])
@pytest.mark.parametrize("shape", [(0,), (1,), (15,), (3, 5, 7, 11), (2, 64, 50, 50)])
def test_they_are_the_reference(isa, shape, layout, dtype):
    x = torch.randn(shape, generator=generator(1))
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL[: x.numel()])
    x = laid_out(x.to(dtype), layout)
    dy = laid_out(torch.randn(shape, generator=generator(2)).to(dtype), layout)
    y, mask = reference.relu_mask(x)
    kept = reference.keep_masked(dy, mask)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(leaf.relu(), leaf, dy)
    assert torch.equal(kept, expected)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ours, bits = ops.relu_mask(x)
        assert torch.equal(bits, mask)
        assert ours.stride() == torch.empty_like(x).stride()
        torch.testing.assert_close(ours, y, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(ops.keep_masked(dy, bits), kept)
        changed = x.clone()
        assert torch.equal(ops.relu_mask_(changed), mask)
        torch.testing.assert_close(changed, y, rtol=0, atol=0, equal_nan=True)


def test_nonsense_is_refused():
    x = torch.randn(40)
    with pytest.raises(ValueError, match="neither gaps nor overlaps"):
        ops.relu_mask(x[::2])
    with pytest.raises(TypeError, match=r"float32 or torch\.bfloat16"):
        ops.relu_mask(x.double())
    with pytest.raises(ValueError, match="mask must have at least 3 elements"):
        ops.keep_masked(x, torch.zeros(2, dtype=torch.int16))
    with pytest.raises(TypeError, match="mask must be of dtype"):
        ops.keep_masked(x, torch.zeros(3, dtype=torch.int32))
