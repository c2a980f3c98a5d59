"""Both passes of whole layers against the reference; threads and instruction sets give the same bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparseprop import ops
from qsparseprop._kernels import _dispatch
from qsparseprop.layout.geometry import conv_geometry, linear_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import make_plan
from qsparseprop.ops import reference

from ._helpers import DTYPES, LAYOUTS, VALUES, examples, generator, laid_out, random_values
from ._ops import CASES, assert_same, layer_arguments, operand, sddmm_arguments, sides, spmm_arguments

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- gradients of biases ----


@given(images=st.integers(0, 70), channels=st.sampled_from([1, 2, 15, 16, 17, 64, 67, 130]), height=st.integers(1, 5),
       width=st.integers(1, 5), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES),
       kind=st.sampled_from(VALUES), seed=st.integers(0, 1000))  # fmt: skip
@examples(150)
def test_gradients_of_biases_are_sums_in_float64(isa, images, channels, height, width, layout, dtype, kind, seed):
    for shape in ((images, channels, height, width), (images, channels)):
        dy = laid_out(random_values(shape, kind, seed).to(dtype), layout)
        dims = [d for d in range(dy.ndim) if d != 1]
        exact, magnitude = dy.double().sum(dims), dy.double().abs().sum(dims)
        found = ops.bias_gradient(dy)
        assert found.dtype == torch.float32
        # rounded once
        assert ((found.double() - exact).abs() <= 2**-24 * exact.abs() + 1e-13 * magnitude + 2.0**-150).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_biases_do_not_depend_on_threads(isa, memory_format):
    dy = torch.randn(9, 131, 15, 17, generator=generator(1)).contiguous(memory_format=memory_format)
    dy[3, 7, 2, 1], dy[0, 130, 14, 16] = float("nan"), float("inf")
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.bias_gradient(dy))
        assert_same(found[0], found[-1])
    assert found[0].isfinite().logical_not().nonzero().flatten().tolist() == [7, 130]


# ---- whole layers ----


def both_passes(case, **options):
    """A layer's passes, and those of the reference."""
    forward, dy, backward = layer_arguments(case, **options)
    results = []
    for passes in (ops, reference):
        out, packed = passes.layer_forward(*forward)
        results.append((out, packed, passes.layer_backward(dy, forward[1], packed, *backward)))
    (out, packed, gradients), (wanted, wanted_packed, wanted_gradients) = results
    for found, expected in ((packed, wanted_packed), (gradients, wanted_gradients)):
        assert [t is None for t in found] == [t is None for t in expected]
    there = [[t for t in tensors if t is not None] for tensors in (packed, wanted_packed)]
    return (out, *there[0]), (wanted, *there[1]), gradients, wanted_gradients


def check_gradients(actual, wanted, check):
    """Of those that were wanted."""
    for a, w in zip(actual, wanted, strict=True):
        if w is not None:
            check(a, w)


@given(case=CASES, scheme=st.sampled_from(["absmax", "standard", "stochastic"]),
       grad_scheme=st.sampled_from(["absmax", "symmetric", "stochastic"]), layout=st.sampled_from(LAYOUTS),
       dtype=st.sampled_from(DTYPES), grads=st.tuples(*[st.booleans()] * 3), per_channel=st.booleans())  # fmt: skip
@examples(150)
def test_layers_on_codes_are_made_of_the_reference(isa, case, scheme, grad_scheme, layout, dtype, grads, per_channel):
    forward, wanted, gradients, wanted_gradients = both_passes(
        case, scheme=scheme, grad_scheme=grad_scheme, layout=layout, dtype=dtype, grads=grads, per_channel=per_channel
    )
    assert_same(forward[1:], wanted[1:])
    if case.bias:
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(forward[0], wanted[0], rtol=tolerance, atol=1e-6)
    else:
        assert_same(forward[0], wanted[0])
    check_gradients(gradients[:2], wanted_gradients[:2], assert_same)
    check_gradients(gradients[2:], wanted_gradients[2:],
                    lambda a, w: torch.testing.assert_close(a, w, rtol=1e-5, atol=1e-3))  # fmt: skip


@given(case=CASES, layout=st.sampled_from(LAYOUTS), grads=st.tuples(*[st.booleans()] * 3))
@examples(50)
def test_layers_on_floats_are_made_of_the_reference(isa, case, layout, grads):
    forward, wanted, gradients, wanted_gradients = both_passes(
        case, scheme=None, grad_scheme=None, layout=layout, grads=grads
    )
    assert_same(forward[1:], wanted[1:])

    def close(actual, expected):
        size = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-5 * size)

    check_gradients((forward[0], *gradients), (wanted[0], *wanted_gradients), close)


# ---- threads ----


def _large(kind):
    if kind == "linear":
        shape, outputs, g = (220, 160, 1, 1), 150, linear_geometry(160, 150)
        taps, groups = 1, 1
    else:
        shape, outputs, groups, taps = (9, 16, 19, 17), 48, 2, 9
        g = conv_geometry(16, 48, (19, 17), (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 9, kind == "conv, batch innermost")
    weight = torch.randn(outputs, shape[1] // groups * taps, generator=generator(5))
    weight[3] = 0
    crow, col, flat = dense_pattern(torch.rand(weight.shape, generator=generator(6)) * (weight != 0) > 0.5)
    return SimpleNamespace(shape=shape, out_channels=outputs, seed=7, geometry=lambda: g,
                           plan=lambda: (make_plan(crow, col, g, groups), weight.view(-1)[flat]))


@pytest.mark.parametrize("kind", ["linear", "conv", "conv, batch innermost"])
def test_the_number_of_threads_does_not_change_a_bit(isa, kind):
    case = _large(kind)
    results = []
    x = random_values(case.shape, "normal", 1)
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        all_of = []
        for scheme in ("absmax", "standard", "stochastic", None):
            for layout in ("contiguous", "channels_last", "reversed"):
                all_of += [t for t in operand(laid_out(x, layout), sides(case)[0][0], scheme) if t is not None]
        for scheme in ("absmax", None):
            for backward in (False, True):
                arguments = spmm_arguments(case, scheme, backward)
                all_of += [t for t in arguments[1] if t is not None]
                all_of += [ops.spmm(*arguments), ops.spmm(*arguments, torch.float32, True)]
            all_of.append(ops.sddmm(*sddmm_arguments(case, scheme, scheme and "stochastic")))
        results.append(all_of)
    for other in results[1:]:
        assert_same(other, results[0])


def test_instruction_sets_agree_on_large_tensors():
    """What the small drawn shapes do not reach: many blocks of rows, units and planes."""
    before = _dispatch.active_isa()
    try:
        for kind in ("linear", "conv"):
            case, first = _large(kind), None
            for name in _dispatch.supported_isas():
                _dispatch.set_isa(name)
                results = [ops.spmm(*spmm_arguments(case, "absmax", backward)) for backward in (False, True)]
                results.append(ops.sddmm(*sddmm_arguments(case, "absmax", "stochastic")))
                first = first or results
                assert_same(results, first)
    finally:
        _dispatch.set_isa(before)
