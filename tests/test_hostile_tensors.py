"""Tensors that are not what they seem to be: wrappers, those without memory of their own, and any at random.

What is right is what a dense layer does with the same values; what cannot be right is refused by a sentence.
"""

import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from qsparseprop import nn as qnn
from qsparseprop import ops
from qsparseprop.layout.pattern import check_pattern

from ._helpers import KINDS, example, run_fuzzer
from ._hostile import NO_DERIVATIVES, freed, negative, pruned

# ---- which tensors go past the dispatcher ----


def test_plain_tensors():
    x = torch.randn(4, 3)
    with torch.inference_mode():
        inference = torch.randn(3)
    for tensor in (x, x.t(), x[1:], nn.Parameter(x), x.clone().requires_grad_(), inference, x.int(), x > 0, None,
                   x.expand(10**6, 4, 3), torch.empty(0), torch.empty(3, 0, 2), x.bfloat16()):  # fmt: skip
        assert ops.are_plain(tensor)
    assert ops.are_plain(x, None, x)
    assert ops.relu_mask.chosen(x, None) is ops.relu_mask.function


def test_tensors_that_are_not_plain():
    x, z = torch.randn(3), torch.randn(3, dtype=torch.complex64)
    with FakeTensorMode():
        fake = torch.randn(3)
    for tensor in (negative(x), z.conj().imag, z.conj(), torch._efficientzerotensor(3), x.to("meta"), x.to_sparse(),
                   fake, freed(x), freed(x, 8), x.as_subclass(type("Own", (torch.Tensor,), {}))):  # fmt: skip
        assert not ops.are_plain(tensor)
        assert not ops.are_plain(x, tensor)
        assert ops.relu_mask.chosen(x, tensor) is torch.ops.qsparseprop.relu_mask.default


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", [lambda f: torch.func.vmap(f), torch.func.functionalize])
def test_tensors_that_functorch_wraps(transform):
    seen = []
    transform(lambda x: seen.append(ops.are_plain(x)) or x)(torch.randn(2, 3))
    assert seen == [False]


# ---- functorch ----


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch's own jvp
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_functions_are_refused(kind):
    layer, _, x = example(kind)
    for call in (lambda: torch.func.grad(lambda x: layer(x).sum())(x), lambda: torch.func.vmap(layer)(x[None]),
                 lambda: torch.func.functionalize(layer)(x), lambda: torch.func.jvp(layer, (x,), (x,))):  # fmt: skip
        with pytest.raises(NotImplementedError, match=rf"{kind} does not go with the transforms .* to_dense\(\) gives"):
            call()


def test_operators_have_no_derivatives():
    """Torch took them for zero."""
    x = torch.randn(2, 3, requires_grad=True)
    y, _ = torch.ops.qsparseprop.relu_mask(x)
    with pytest.raises(NotImplementedError, match=NO_DERIVATIVES):
        y.sum().backward()


def test_operators_that_write_into_their_arguments_have_no_derivatives():
    """Torch kept the history of what was written over, and gave gradients of 1 in place of those of a ReLU."""
    x = torch.randn(2, 3, requires_grad=True)
    one, codes, saved = torch.ones(3), ops.codes_like(x), ops.saved_like(x, "silu")
    codes.zero_()
    middle = x * 1
    for call in (
        lambda: torch.ops.qsparseprop.relu_mask_(middle),
        lambda: torch.ops.qsparseprop.norm_statistics(x, one, one, one, one, 0.1, 1e-5, True, True),
        lambda: torch.ops.qsparseprop.epilogue(x, None, None, None, "silu", [], one, one, codes, saved),
    ):
        with pytest.raises(NotImplementedError, match=NO_DERIVATIVES):
            call()
    assert torch.equal(middle, x)
    assert torch.equal(one, torch.ones(3))
    assert not codes.any()
    with torch.no_grad():
        mask = torch.ops.qsparseprop.relu_mask_(middle)
    assert torch.equal(middle, x.relu())
    assert mask.shape == (1,)


# ---- patterns ----


class Wrapper(torch.Tensor):
    """Holds another tensor, as DTensor does, and has no memory."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = [a.inner if isinstance(a, Wrapper) else a for a in args]
        result = func(*inner, **(kwargs or {}))
        return Wrapper(result) if isinstance(result, torch.Tensor) else result


def test_patterns_in_tensors_that_have_no_memory():
    """The kernels read the tables that torch had made of one at address 0."""
    layer = qnn.SparseLinear.from_dense(pruned(nn.Linear(8, 5)))
    for name in ("crow_indices", "col_indices"):
        kept = getattr(layer, name)
        setattr(layer, name, Wrapper(kept))
        with pytest.raises(TypeError, match=f"{name} must be a tensor in memory, got Wrapper"):
            layer(torch.randn(3, 8))
        setattr(layer, name, kept)


def test_sizes_of_a_pattern_come_before_its_contents():
    crow, col = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    for bad, message in (
        (col[:1].expand(10**12), r"col_indices: the 1000000000000 elements of .* share 8 bytes of memory"),
        (torch.zeros(7, dtype=torch.int32), r"at most 2 \* 3 elements, got 7"),
        (col.to_sparse(), "expected a dense .* got torch.sparse_coo"), (col.to("meta"), "has no contents"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_pattern(crow, bad, (2, 3))
    with pytest.raises(ValueError, match=r"crow_indices: the 3 elements of .* share 4 bytes of memory"):
        check_pattern(torch.zeros(1, dtype=torch.int32).expand(3), col, (2, 3))


# ---- at random ----


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by calls of Linux")
def test_random_hostile_tensors(tmp_path):
    assert sum(run_fuzzer("_fuzz_tensors", 0, 250, tmp_path).values()) == 250
