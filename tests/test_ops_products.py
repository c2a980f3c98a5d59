"""Quantised weights and both sparse products, on every instruction set, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparseprop import ops
from qsparseprop._kernels import _matmul
from qsparseprop.layout.geometry import linear_geometry
from qsparseprop.ops import reference

from ._helpers import DTYPES, examples, generator
from ._ops import CASES, SCHEMES, assert_same, sddmm_arguments, spmm_arguments

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- weights ----


@given(case=CASES, kind=st.sampled_from(["normal", "small", "large", "zero", "bad"]),
       factors=st.sampled_from(["one", "normal", "small", "large", "zero", "bad"]),
       zeros=st.sampled_from(["none", "one", "same", "mixed"]))  # fmt: skip
@examples(150)
def test_weights_with_folded_scales_are_the_reference(isa, case, kind, factors, zeros):
    plan, values = case.plan()
    values = values * {"small": 1e-41, "large": 1e37, "zero": 0.0, "bad": float("nan")}.get(kind, 1.0)
    for rows in (plan.forward, plan.backward):
        planes = rows.source.planes
        factor = torch.rand(planes, generator=generator(case.seed)) + 0.01
        factor *= {"small": 1e-33, "large": 1e38, "zero": 0.0}.get(factors, 1.0)
        if factors == "bad":
            factor[0], factor[-1] = float("nan"), float("inf")
        zero = torch.tensor([0, 128, 77], dtype=torch.int32).repeat(planes)[:planes]
        zero = {"none": None, "one": zero[:1], "same": zero[:1].expand(planes).contiguous(), "mixed": zero}[zeros]
        factor = factor[:1] if factors == "one" else factor
        arguments = (values, rows, factor, zero)
        codes, scale, total = ops.quantize_weight(*arguments)
        assert_same((codes, scale, total), reference.quantize_weight(*arguments))
        assert codes.numel() == 0 or codes.min() >= -127
        if kind in ("normal", "zero") and factors not in ("bad", "zero"):  # products that keep their digits
            slot_row = torch.repeat_interleave(torch.arange(scale.numel()), 4 * rows.group_ptr.diff().long())
            wanted = torch.cat([values, torch.zeros(1)])[rows.index.long()].double()
            wanted *= factor.double().expand(planes)[rows.plane.long()]
            error = (codes * scale[slot_row].double() - wanted).abs()
            assert error.le(0.5001 * scale[slot_row].double() + 1e-45).all()


@given(case=CASES, kind=st.sampled_from(["normal", "small", "large", "zero", "bad"]))
@examples(100)
def test_quantize_weight_is_the_reference(isa, case, kind):
    plan, values = case.plan()
    if kind == "bad" and values.numel():
        place = torch.randint(values.numel(), (3,), generator=generator(case.seed))
        values[place] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    else:
        values = values * {"small": 1e-41, "large": 1e37, "zero": 0.0}.get(kind, 1.0)
    for rows in (plan.forward, plan.backward):
        arguments = (values, rows)
        codes, scale, total = ops.quantize_weight(*arguments)
        assert_same((codes, scale, total), reference.quantize_weight(*arguments))
        assert codes.numel() == 0 or codes.min() >= -127
        assert (codes[rows.index < 0] == 0).all()
        slot_row = torch.repeat_interleave(torch.arange(scale.numel()), 4 * rows.group_ptr.diff().long())
        sums = torch.zeros(scale.numel(), dtype=torch.int64).index_add(0, slot_row, codes.long())
        assert torch.equal(sums, total.long())
        slots = torch.cat([values, torch.zeros(1)])[rows.index.long()]
        finite = torch.ones(scale.numel(), dtype=torch.bool)
        finite[slot_row[~slots.isfinite()]] = False
        assert torch.equal(scale.isfinite(), finite)  # a bad value spoils its own row, and no other
        slot_row, codes, slots = (t[finite[slot_row]] for t in (slot_row, codes, slots))
        assert (codes * scale[slot_row].double() - slots).abs().le(0.50001 * scale[slot_row].double()).all()


def test_long_rows_of_weights(isa):
    """More nonzeros than fit into any buffer of a row, in one row and as one of many."""
    counts = [0, 3, 300_001, 17]
    ptr = torch.tensor([0, *counts]).cumsum(0).add(3).div(4, rounding_mode="floor").tolist()
    groups = [(n + 3) // 4 for n in counts]
    ptr = torch.tensor([0, *groups]).cumsum(0).to(torch.int32)
    index = torch.full((int(ptr[-1]) * 4,), -1, dtype=torch.int32)
    start = 0
    for r, n in enumerate(counts):
        index[4 * ptr[r] : 4 * ptr[r] + n] = torch.arange(start, start + n, dtype=torch.int32)
        start += n
    values, g = torch.randn(start), linear_geometry(1, len(counts))
    rows = ops.GatherList(ptr, torch.zeros_like(index), index, torch.zeros_like(index), g.input_layout, g.output_layout)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_same(ops.quantize_weight(values, rows), reference.quantize_weight(values, rows))


# ---- products ----


@given(case=CASES, backward=st.booleans(), scheme=st.sampled_from(SCHEMES), channels_last=st.booleans(),
       kind=st.sampled_from(["normal", "positive", "skewed"]), dtype=st.sampled_from(DTYPES))  # fmt: skip
@examples(150)
def test_spmm_on_codes_is_the_reference(isa, case, backward, scheme, channels_last, kind, dtype):
    bias = torch.randn(case.out_channels) if case.bias and not backward else None
    arguments = (*spmm_arguments(case, scheme, backward, bias, kind), dtype, channels_last)
    out = ops.spmm(*arguments)
    assert out.dtype == dtype
    if bias is None:
        assert_same(out, reference.spmm(*arguments))
    else:  # whether product and bias are rounded together is the kernels' own business
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(out, reference.spmm(*arguments), rtol=tolerance, atol=1e-6)
        without = (*arguments[:4], None, *arguments[5:])
        assert_same(ops.spmm(*without), reference.spmm(*without))
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@given(case=CASES, scheme=st.sampled_from([None, "absmax", "standard"]), order=st.permutations(range(4)),
       beside=st.integers(0, 17), dtype=st.sampled_from(DTYPES))  # fmt: skip
@examples(100)
def test_a_product_writes_its_result_and_nothing_beside(isa, case, scheme, order, beside, dtype):
    """Lanes between rows and images are no elements, whatever the strides of the result."""
    bias = torch.randn(case.out_channels) if case.bias else None
    operand, weights, rows, images, *_ = spmm_arguments(case, scheme, False, bias)
    expected = ops.spmm(operand, weights, rows, images, bias, dtype)
    size, back = [expected.shape[d] for d in order], [order.index(d) for d in range(4)]
    around = torch.full([n + beside for n in size], 7.0, dtype=dtype)
    part = around[tuple(slice(beside // 2, beside // 2 + n) for n in size)]
    _matmul.spmm(operand.planes, *weights, *operand[1:], rows, bias, part.permute(back), 1)
    found = part.permute(back).clone()
    part.fill_(7.0)
    assert torch.equal(around, torch.full_like(around, 7.0))
    if scheme is None or bias is not None:  # whose roundings may depend on the order in memory
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-5)
    else:
        assert_same(found, expected)


@given(case=CASES, backward=st.booleans(), channels_last=st.booleans())
@examples(80)
def test_spmm_on_floats_is_close_to_float64(isa, case, backward, channels_last):
    bias = torch.randn(case.out_channels) if case.bias and not backward else None
    arguments = (*spmm_arguments(case, None, backward, bias), torch.float32, channels_last)
    out = ops.spmm(*arguments)
    (planes, *_), (slots, *_), rows, images, *_ = arguments
    magnitude = reference.spmm(ops.Packed(planes.abs()), ops.Weights(slots.abs()), rows, images).double()
    assert ((out.double() - reference.spmm(*arguments)).abs() <= 3e-6 * magnitude + 1e-6).all()


@given(case=CASES, scheme=st.sampled_from(SCHEMES), kind=st.sampled_from(["normal", "positive", "skewed"]))
@examples(150)
def test_sddmm_on_codes_is_the_reference(isa, case, scheme, kind):
    arguments = sddmm_arguments(case, scheme, "stochastic", kind)
    assert_same(ops.sddmm(*arguments), reference.sddmm(*arguments))


@given(case=CASES)
@examples(80)
def test_sddmm_on_floats_is_close_to_float64(isa, case):
    arguments = sddmm_arguments(case, None, None)
    (planes, *_), (dy, *_), *rest = arguments
    magnitude = reference.sddmm(ops.Packed(planes.abs()), ops.Packed(dy.abs()), *rest).double()
    difference = ops.sddmm(*arguments).double() - reference.sddmm(*arguments)
    assert (difference.abs() <= 1e-6 * magnitude).all()


def test_a_gradient_without_negative_values(isa):
    """The packed gradient is signed around 128; nothing may turn it into codes around 0."""
    from qsparseprop.nn import QuantizedSparseLinear

    layer = QuantizedSparseLinear.from_dense(torch.nn.Linear(6, 5))
    x = torch.randn(9, 6)
    layer(x).sum().backward()
    expected = x.sum(0).expand(5, 6).reshape(-1)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0.0, atol=9 * x.abs().max().item() / 127)
