"""Dense rows give the bits of lists, and of the reference, on every instruction set."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparseprop import ops
from qsparseprop.layout.geometry import Geometry, conv_geometry, embedded, linear_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import Plan, make_plan
from qsparseprop.ops import reference

from ._helpers import conv_cases, examples, generator, random_mask

DENSITIES = (0.0, 0.1, 0.5, 0.9, 1.0)


class Case(NamedTuple):
    """A layer, and how many images it has."""

    geometry: Geometry
    rows: int
    groups: int
    batch: int
    density: float
    seed: int

    def plan(self) -> tuple[Plan, torch.Tensor]:
        """The plan, and values of its pattern, of mixed magnitude."""
        g = self.geometry
        shape = self.rows, g.in_channels // self.groups * len(g.tap_shift)
        mask = torch.ones(shape) > 0 if self.density == 1 else random_mask(shape, self.density, self.seed)
        crow, col, _ = dense_pattern(mask)
        plan = make_plan(crow, col, g, self.groups)
        return plan, torch.randn(col.numel(), generator=generator(self.seed)).pow(3)


@st.composite
def linear_cases(draw) -> Case:
    features = st.sampled_from([1, 3, 4, 15, 16, 17, 33, 64, 67, 90])
    g = linear_geometry(draw(features), draw(features), draw(st.booleans()))
    return Case(g, g.output_grid.planes, 1, draw(st.sampled_from([1, 7, 63, 64, 65, 130])),
                draw(st.sampled_from(DENSITIES)), draw(st.integers(0, 1000)))  # fmt: skip


@st.composite
def convolutions(draw) -> Case:
    """Of images and volumes, also transposed ones."""
    case = draw(conv_cases(most_channels=9))
    channels, size, kernel = (case.in_channels, case.out_channels), case.size, case.kernel
    stride, pads, dilation = case.stride, case.pads, case.dilation
    if draw(st.booleans()):
        kernel, stride, pads, dilation = (2, *kernel), (draw(st.integers(1, 2)), *stride), (1, 0, *pads), (2, *dilation)
        size = (4, *size)
    batch = case.batch if len(size) == 2 else min(case.batch, 3)
    g = conv_geometry(*channels, size, kernel, stride, pads, dilation, batch, bool(case.batch_innermost),
                      draw(st.booleans()))  # fmt: skip
    return Case(g, channels[1], case.groups, batch, draw(st.sampled_from(DENSITIES)), case.seed)


@st.composite
def shortcuts(draw) -> Case:
    """Layers on what was packed for another one: not every phase and channel of the planes is read."""
    stride, batch = draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 20]))
    inputs, outputs = draw(st.integers(1, 20)), draw(st.sampled_from([1, 5, 16, 37]))
    size = draw(st.integers(3, 9)), draw(st.integers(3, 9))
    inner, outer = (conv_geometry(inputs, outputs, size, (k, k), (stride, stride), (p,) * 4, (1, 1), batch,
                                  stride == 3) for k, p in ((1, 0), (3, 1)))  # fmt: skip
    return Case(embedded(inner, outer), outputs, 1, batch, draw(st.sampled_from(DENSITIES)), draw(st.integers(0, 99)))


CASES = st.one_of(convolutions(), linear_cases(), shortcuts())


def assert_same(actual, expected, what=""):
    """Bit for bit; NaN may have any."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5)), what
    assert torch.equal(actual.isnan(), expected.isnan()), what


def both(plan: Plan, swapped: bool):
    """The list and the dense rows of a direction."""
    return (plan.backward, plan.dense_backward) if swapped else (plan.forward, plan.dense_forward)


def by_value(slots: torch.Tensor, rows: ops.ProductRows) -> torch.Tensor:
    """What slots have, in the order of the values."""
    out = torch.zeros(int((rows.index >= 0).sum()), dtype=slots.dtype)
    out[rows.index[rows.index >= 0].long()] = slots[rows.index >= 0]
    return out


def packed(shape, layout, scheme, per_channel, seed, kind="normal"):
    x = torch.randn(shape, generator=generator(seed))
    x = x.relu() if kind == "positive" else x
    if kind == "bad":
        x.view(-1)[seed % x.numel()] = float("inf")
    return ops.quantize_pack(x, layout, ops.Scheme(scheme, (), per_channel))


# ---- what the tables say ----


@given(case=CASES, swapped=st.booleans())
@examples(250)
def test_tables_lead_where_lists_do(case, swapped):
    plan, values = case.plan()
    in_list, dense = both(plan, swapped)
    assert (dense.rows, dense.source, dense.target) == (in_list.rows, in_list.source, in_list.target)
    slot_row = torch.repeat_interleave(torch.arange(in_list.rows), 4 * in_list.group_ptr.diff().long())
    of_list = {"offset": in_list.offset, "plane": in_list.plane, "row": slot_row}
    of_dense = {"offset": dense.offset, "plane": dense.plane,
                "row": torch.arange(dense.rows).repeat_interleave(dense.slots // dense.rows)}  # fmt: skip
    for name, numbers in of_list.items():
        assert torch.equal(by_value(of_dense[name], dense), by_value(numbers, in_list)), name
    assert torch.equal(dense.index[dense.index >= 0].sort().values, torch.arange(values.numel(), dtype=torch.int32))


# ---- weights ----


@given(case=CASES, swapped=st.booleans(), kind=st.sampled_from(["normal", "small", "large", "zero", "bad"]),
       factors=st.sampled_from(["none", "one", "normal", "small", "large", "zero", "bad"]),
       zeros=st.sampled_from(["none", "one", "same", "mixed"]),
       clip=st.sampled_from([None, None, 0.5, 1e-30, 0.0, float("nan")]))  # fmt: skip
@examples(250)
def test_weights(isa, case, swapped, kind, factors, zeros, clip):
    torch.set_num_threads(1)
    plan, values = case.plan()
    values = values * {"small": 1e-41, "large": 1e37, "zero": 0.0}.get(kind, 1.0)
    if kind == "bad" and values.numel():
        place = torch.randint(values.numel(), (3,), generator=generator(case.seed))
        values[place] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    in_list, dense = both(plan, swapped)
    planes = dense.source.planes
    factor = torch.rand(planes, generator=generator(case.seed)) + 0.01
    factor *= {"small": 1e-33, "large": 1e38, "zero": 0.0}.get(factors, 1.0)
    if factors == "bad":
        factor[0], factor[-1] = float("nan"), float("inf")
    factor = {"none": None, "one": factor[:1]}.get(factors, factor)
    zero = torch.tensor([0, 128, 77], dtype=torch.int32).repeat(planes)[:planes]
    zero = {"none": None, "one": zero[:1], "same": zero[:1].expand(planes).contiguous(), "mixed": zero}[zeros]
    rest = factor, zero, None if clip is None else torch.tensor([clip])
    wanted, found = ops.quantize_weight(values, in_list, *rest), ops.quantize_weight(values, dense, *rest)
    assert_same(by_value(found.slots, dense), by_value(wanted.slots, in_list))
    assert_same(found.scale, wanted.scale)
    good = found.scale.isfinite()  # codes of a row with NaN or Inf mean nothing, those of a list's padding neither
    assert torch.equal(found.total[good], wanted.total[good])
    for mine, theirs in zip(found, reference.quantize_weight(values, dense, *rest), strict=True):
        assert_same(mine, theirs)
    assert not found.slots[dense.index < 0].any()


# ---- products ----


@given(case=CASES, swapped=st.booleans(), scheme=st.sampled_from(["absmax", "symmetric", "standard"]),
       per_channel=st.booleans(), kind=st.sampled_from(["normal", "positive", "bad"]), channels_last=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), clip=st.sampled_from([None, 0.5]),
       after=st.sampled_from(["nothing", "bias", "limits"]), bad_value=st.booleans())  # fmt: skip
@examples(250)
def test_products(isa, case, swapped, scheme, per_channel, kind, channels_last, dtype, clip, after, bad_value):
    torch.set_num_threads(1)
    plan, values = case.plan()
    if bad_value and values.numel():
        values[case.seed % values.numel()] = float("nan")
    in_list, dense = both(plan, swapped)
    x = packed(dense.source.shape(case.batch), dense.source, scheme, per_channel, case.seed + 1, kind)
    bias = None if after == "nothing" else torch.randn(dense.rows, generator=generator(3))
    rest = bias, None if clip is None else torch.tensor([clip]), (-0.5, 0.75) if after == "limits" else ()
    wanted, found = (ops.empty_result(rows, case.batch, dtype, channels_last) for rows in (in_list, dense))
    ops.multiply(x, values, in_list, wanted, *rest)
    ops.multiply(x, values, dense, found, *rest)
    assert_same(found, wanted)
    if bias is None:  # whether product and bias are rounded together is the kernels' own business
        assert_same(found, reference.multiply(x, values, dense, torch.empty_like(found), *rest))
    weights = ops.quantize_weight(values, dense, *((x.scale, x.zero_point) if per_channel else ()), clip=rest[1])
    operand = ops.Packed(x.planes) if per_channel else x
    assert_same(ops.spmm(operand, weights, dense, case.batch, bias, dtype, channels_last, rest[2]), found)
    if bias is None:
        assert_same(reference.spmm(operand, weights, dense, case.batch, None, dtype, channels_last), found)


@given(case=CASES, scheme=st.sampled_from(["absmax", "symmetric", "standard"]), per_channel=st.booleans(),
       kind=st.sampled_from(["normal", "positive", "bad"]))  # fmt: skip
@examples(250)
def test_weight_gradients(isa, case, scheme, per_channel, kind):
    torch.set_num_threads(1)
    plan, values = case.plan()
    in_list, dense = both(plan, False)
    x = packed(dense.source.shape(case.batch), dense.source, scheme, per_channel, case.seed + 1, kind)
    dy = packed(dense.target.shape(case.batch), dense.target, "symmetric", per_channel, case.seed + 2)
    rest = case.batch, values.numel()
    found = ops.sddmm(x, dy, dense, *rest)
    assert_same(found, ops.sddmm(x, dy, in_list, *rest))
    assert_same(found, reference.sddmm(x, dy, dense, *rest))


def large(kind: str, density: float) -> Case:
    """Layers of which threads take parts, or whose planes are interleaved, or gradients cut, piece by piece."""
    if kind.startswith("linear"):
        rows, columns = {"linear, 1,030 columns": (71, 1030), "linear, 300 columns": (130, 300)}[kind]
        return Case(linear_geometry(columns, rows), rows, 1, 130, density, 1)
    channels, rows, groups, size, kernel, stride = {
        "conv, 1,035 columns": (115, 21, 1, (6, 7), 3, 1),
        "depthwise": (70, 140, 70, (15, 14), 3, 2),
        "grouped": (40, 66, 2, (16, 9), 3, 1),
        "stride 2": (33, 70, 1, (15, 16), 3, 2),
        "1x1": (70, 70, 1, (13, 12), 1, 1),
    }[kind]
    g = conv_geometry(channels, rows, size, (kernel, kernel), (stride, stride), (kernel // 2,) * 4, (1, 1), 9, False)
    return Case(g, rows, groups, 9, density, 1)


@pytest.mark.parametrize("kind", ["linear, 1,030 columns", "linear, 300 columns", "conv, 1,035 columns", "depthwise",
                                  "grouped", "stride 2", "1x1"])  # fmt: skip
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_large_layers_with_threads(isa, kind, density):
    case, per_channel = large(kind, density), density < 1
    plan, values = case.plan()
    torch.set_num_threads(1)
    x = packed(plan.forward.source.shape(case.batch), plan.forward.source, "standard", per_channel, 1)
    dy = packed(plan.forward.target.shape(case.batch), plan.forward.target, "symmetric", per_channel, 2)

    def run(which, threads):
        torch.set_num_threads(threads)
        rows = both(plan, False)[which], both(plan, True)[which]
        y, dx = (ops.multiply(operand, values, one, ops.empty_result(one, case.batch, torch.float32, last))
                 for operand, one, last in zip((x, dy), rows, (False, True), strict=True))  # fmt: skip
        return y, dx, ops.sddmm(x, dy, rows[0], case.batch, values.numel())

    wanted = run(0, 1)
    for threads in (1, 2) if per_channel or kind == "grouped" else (1,):  # teams are slow on a busy machine
        for mine, theirs in zip(run(1, threads), wanted, strict=True):
            assert_same(mine, theirs, threads)


# ---- sums at the bounds ----


@pytest.mark.parametrize("columns", [4, 1029, 65_535, 65_536])
def test_products_are_exact_up_to_the_longest_rows(isa, columns):
    """255 * 127 * 65,536 is what an int32 just holds; 16 bits hold no two products."""
    batch, rows = 65, 8
    g = linear_geometry(columns, rows)
    plan = make_plan(*dense_pattern(torch.ones(rows, columns) > 0)[:2], g)
    dense = plan.dense_forward
    sign = torch.randint(2, (columns,)) * 2 - 1
    codes = torch.stack([torch.full((columns,), 127), torch.full((columns,), -127), 127 * sign, sign, 0 * sign,
                         torch.randint(-127, 128, (columns,)), 127 * sign.abs() * (torch.arange(columns) % 2),
                         -127 * (torch.arange(columns) == columns - 1)])  # fmt: skip
    weights = torch.zeros(rows, dense.slots // rows, dtype=torch.int8)
    weights[:, :columns] = codes
    total, lanes = codes.sum(1), g.input_grid.lanes(batch)
    for name, x in (("largest", torch.full((lanes,), 255)), ("zeros", torch.zeros(lanes)),
                    ("random", torch.randint(256, (lanes,)))):  # fmt: skip
        planes = x.to(torch.uint8)
        element = planes[: 2 * g.input_grid.block].view(2, -1)[:, : 64 * columns].view(2, columns, 64)
        element = element.transpose(0, 1).reshape(columns, -1)[:, :batch].double()
        products = (codes.double() @ element).to(torch.int64)  # exact: below 2**53
        for zero in (0, 128, 255):
            operand = ops.Packed(planes, torch.ones(1), torch.tensor([zero], dtype=torch.int32))
            out = ops.spmm(operand, ops.Weights(weights.view(-1), torch.ones(rows), total), dense, batch)
            assert torch.equal(out[:, :, 0, 0], (products - zero * total[:, None]).T.float()), (name, zero)


@pytest.mark.parametrize("layer", ["linear", "conv", "conv, batch innermost"])
def test_weight_gradients_are_exact_beyond_32_bits(isa, layer):
    """More lanes than an int32 holds sums of, and of the pattern all, or a part."""
    if layer == "linear":
        shape, g = (70_001, 5, 1, 1), linear_geometry(5, 3)
    else:
        shape = (2, 5, 280, 251) if layer == "conv" else (300, 5, 17, 15)
        g = conv_geometry(5, 3, shape[2:], (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), shape[0], layer != "conv")
    lanes = shape[0] * shape[2] * shape[3]
    assert lanes > 66_311
    x, dy = torch.ones(shape), torch.ones(shape[0], 3, *shape[2:])
    x[:, 1] = 0
    dy[:, 1] = -1
    dy[:, 2] = 0
    planes = ops.quantize_pack(x, g.input_layout, ops.Scheme("absmax")).planes
    gradient = ops.Packed(ops.quantize_pack(dy, g.output_layout, ops.Scheme("symmetric")).planes, torch.ones(1))
    assert planes.max() == 255
    for mask in (torch.ones(3, 5) > 0, torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]) > 0):
        rows = make_plan(*dense_pattern(mask)[:2], g).dense_forward
        for zero in (0, 128, 255):
            operand = ops.Packed(planes, torch.ones(1), torch.tensor([zero], dtype=torch.int32))
            out = ops.sddmm(operand, gradient, rows, shape[0], int(mask.sum()))
            exact = torch.tensor([255, 0, 255, 255, 255]) - zero
            exact = torch.tensor([127, -127, 0])[:, None] * exact * lanes
            assert torch.equal(out, exact[mask].float())


@pytest.mark.parametrize(("batch", "rows"), [(64, 21), (200, 21), (1100, 24), *((70, rows) for rows in range(1, 10)),
                                             (70, 31), (70, 50)])  # fmt: skip
def test_any_bytes_as_gradients(isa, batch, rows):
    """A code of 0, which no scheme gives, is -128; rows of every remainder of a block."""
    columns = 37
    g = linear_geometry(columns, rows)
    dense = make_plan(*dense_pattern(torch.ones(rows, columns) > 0)[:2], g).dense_forward
    planes = torch.randint(256, (g.input_grid.lanes(batch),), dtype=torch.uint8)
    dy = torch.randint(256, (g.output_grid.lanes(batch),), dtype=torch.uint8)
    planes[torch.rand(planes.shape) < 0.3], dy[torch.rand(dy.shape) < 0.3] = 255, 0
    if batch % 64:  # images that do not exist have no gradient
        dy[(batch // 64) * g.output_grid.block :][: rows * 64].view(rows, 64)[:, batch % 64 :] = 128
    one = torch.ones(1)
    operand = ops.Packed(planes, one, torch.tensor([77], dtype=torch.int32))
    found = ops.sddmm(operand, ops.Packed(dy, one), dense, batch, rows * columns)
    assert torch.equal(found, reference.sddmm(operand, ops.Packed(dy, one), dense, batch, rows * columns))
