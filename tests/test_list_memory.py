"""Lists are kept in little memory, whatever they are made from, and say the same as if every slot were there."""

from __future__ import annotations

import copy

import pytest
import torch

from qsparseprop import ops
from qsparseprop._kernels._dense_rows import DenseRows
from qsparseprop._kernels._gather_list import PatternList
from qsparseprop._kernels._plan import ValuePattern
from qsparseprop.layout.geometry import conv_geometry, linear_geometry
from qsparseprop.layout.modes import Modes
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import Plan, make_plan

from ._helpers import generator

PARTS = ("group_ptr", "offset", "index", "plane")
LISTS, DENSE = Modes("list", "list", "list"), Modes("dense", "dense", "dense")


def plan_of(rows, columns, density, geometry, groups=1):
    mask = torch.rand(rows, columns, generator=generator(3)) < density
    return make_plan(*dense_pattern(mask)[:2], geometry, groups, LISTS), int(mask.sum())


def again(rows):
    """The same list, made from its slots."""
    return ops.GatherList(*(getattr(rows, name) for name in PARTS), rows.source, rows.target)


def products(rows, count, batch=70):
    """Of codes, of float32 and the weight gradient."""
    values = torch.randn(count, generator=generator(1))
    x = torch.randn(rows.source.shape(batch), generator=generator(2))
    dy = torch.randn(rows.target.shape(batch), generator=generator(4))
    for channels in (False, True):
        packed = ops.quantize_pack(x, rows.source, ops.Scheme("standard", (), channels))
        gradient = ops.quantize_pack(dy, rows.target, ops.Scheme("symmetric", (), False))
        weights = ops.quantize_weight(values, rows, packed.scale, packed.zero_point)
        yield from weights
        yield ops.spmm(packed if not channels else ops.Packed(packed.planes), weights, rows, batch)
        if rows.target.planes == rows.target.channels:  # of which it is the gradient
            yield ops.sddmm(packed, gradient, rows, batch, count)
    packed, gradient = ops.pack(x, rows.source), ops.pack(dy, rows.target)
    yield ops.spmm(packed, ops.gather_weight(values, rows), rows, batch)
    if rows.target.planes == rows.target.channels:
        yield ops.sddmm(packed, gradient, rows, batch, count)


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert (a is b is None) or torch.equal(a, b)


CASES = {
    "linear": (40, 90, 0.4, lambda: linear_geometry(90, 40), 1),
    "full": (12, 20, 1.1, lambda: linear_geometry(20, 12), 1),
    "grouped, strides": (
        24, 27, 0.5, lambda: conv_geometry(12, 24, (9, 9), (3, 3), (2, 2), (1,) * 4, (1, 1), 2, False), 4,
    ),
    "columns of 32 bits": (6, 70_000, 0.01, lambda: linear_geometry(70_000, 6), 1),
    "rows of 32 bits": (70_000, 6, 0.01, lambda: linear_geometry(6, 70_000), 1),
    "several parts": (3000, 90, 0.6, lambda: linear_geometry(90, 3000), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [1, 2])
def test_lists_of_patterns_are_those_of_their_slots(name, threads):
    rows, columns, density, geometry, groups = CASES[name]
    plan, count = plan_of(rows, columns, density, geometry(), groups)
    torch.set_num_threads(threads)
    for made in (plan.forward, plan.backward):
        given = again(made)
        assert type(given) is ops.GatherList
        for part in PARTS:
            assert torch.equal(getattr(given, part), getattr(made, part))
        assert_same(products(made, count), products(given, count))
        copied = copy.deepcopy(made)
        assert type(copied) is PatternList
        for part in PARTS:
            assert torch.equal(getattr(copied, part), getattr(made, part))


def test_slots_in_any_order():
    """Values anywhere, offsets that repeat with another plane, padding in the middle and some that reads elsewhere."""
    g = linear_geometry(5, 3)
    offset = torch.tensor([64, 64, 0, 128, 192, 0, 0, 0, 128, 128, 128, 64], dtype=torch.int32)
    index = torch.tensor([4, -1, 2, 0, 1, -1, -1, -1, -1, 3, 3, -1], dtype=torch.int32)
    plane = torch.tensor([1, 1, 0, 2, 3, 0, 0, 0, 2, 2, 3, 1], dtype=torch.int32)
    ptr = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    rows = ops.GatherList(ptr, offset, index, plane, g.input_layout, g.output_layout)
    assert_same([rows.group_ptr, rows.offset, rows.index, rows.plane], [ptr, offset, index, plane])
    values, x = torch.randn(5, generator=generator(1)), torch.randn(7, 5, 1, 1, generator=generator(2))
    weights = ops.gather_weight(values, rows)
    assert torch.equal(weights.slots, torch.cat([values, torch.zeros(1)])[index.long()])
    y = ops.spmm(ops.pack(x, g.input_layout), weights, rows, 7)
    wanted = (x[:, offset.long() // 64, 0, 0] * weights.slots).view(7, 3, 4).sum(2)
    torch.testing.assert_close(y[:, :, 0, 0], wanted)


def test_bytes():
    plan, count = plan_of(512, 640, 0.3, linear_geometry(640, 512))
    pattern = plan.forward.pattern
    assert pattern is plan.backward.pattern
    assert pattern.nbytes == 2 * count + 4 * 513
    assert plan.forward.nbytes == 4 * 513 + 2 * 4 * 640  # first groups and the table
    assert plan.backward.nbytes == 6 * count + 2 * 4 * 641 + 2 * 4 * 512
    given = again(plan.forward)
    assert given.nbytes == 2 * count + 2 * 4 * 513 + 2 * 4 * 640
    assert again(plan.backward).nbytes == plan.backward.nbytes
    dense = make_plan(pattern.crow_indices, pattern.col_indices, plan.geometry, 1, DENSE).dense_forward
    assert isinstance(dense, DenseRows)
    assert dense.nbytes < 16 * 640 + 8 * 512 * 10  # a bitmap, since the pattern has columns


def test_without_a_zero_there_are_no_columns():
    plan, count = plan_of(512, 640, 1.1, linear_geometry(640, 512))
    assert plan.forward.pattern.nbytes == 4 * 513
    assert plan.forward.nbytes == 4 * 513 + 2 * 4 * 640
    assert plan.backward.nbytes == 6 * count + 2 * 4 * 641 + 2 * 4 * 512


def test_what_is_made_of_a_pattern_is_shared():
    """Plans for several sizes have the other form of its columns once, as long as one of them uses it."""
    given = dense_pattern(torch.rand(512, 640, generator=generator(3)) < 0.5)[:2]
    pattern, geometry = ValuePattern(*given, 640), linear_geometry(640, 512)
    assert pattern.nbytes == 4 * 513 + 512 * 640 // 8
    plans = [Plan(pattern, geometry, 1, modes) for modes in (LISTS, LISTS, DENSE)]
    first, second = (plan.forward for plan in plans[:2])
    values = torch.randn(pattern.count, generator=generator(1))
    for rows in (first, second):
        ops.quantize_weight(values, rows, torch.ones(1), torch.zeros(1, dtype=torch.int32))
    assert first.nbytes == second.nbytes == 2 * pattern.count + 4 * 513 + 2 * 4 * 640
    assert pattern.nbytes == 4 * 513 + 512 * 640 // 8
    assert plans[2].dense_forward.nbytes < 16 * 640  # the bitmap is the pattern's
    few = ValuePattern(*dense_pattern(torch.rand(64, 70, generator=generator(3)) < 0.2)[:2], 70)
    rows = [Plan(few, linear_geometry(70, 64), 1, DENSE).dense_forward for _ in range(2)]
    assert few.nbytes == 4 * 65 + 2 * few.count
    assert_same([rows[0].index], [rows[1].index])


@pytest.mark.parametrize("shape", [(512, 640), (300, 4097), (2000, 70)])
@pytest.mark.parametrize("density", [0.35, 0.6, 0.98])
@pytest.mark.parametrize("channels", [False, True])
def test_a_weight_gradient_reads_bits_as_they_are(shape, density, channels):
    """Where only it goes by a list that list holds no columns, and the gradient has the same bits."""
    g = linear_geometry(shape[1], shape[0])
    mask = torch.rand(shape, generator=generator(3)) < density
    plan, count = make_plan(*dense_pattern(mask)[:2], g, 1, LISTS), int(mask.sum())
    x, dy = (torch.randn(70, size, 1, 1, generator=generator(size)) for size in reversed(shape))
    packed = ops.quantize_pack(x, g.input_layout, ops.Scheme("standard", (), channels))
    gradient = ops.quantize_pack(dy, g.output_layout, ops.Scheme("symmetric", (), False))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(ops.sddmm(packed, gradient, plan.forward, 70, count))
    floats = ops.sddmm(ops.pack(x, g.input_layout), ops.pack(dy, g.output_layout), plan.forward, 70, count)
    before, settled = plan.forward.nbytes, again(plan.forward)
    assert plan.forward.nbytes == before + 2 * count  # which had to read them
    found += [ops.sddmm(packed, gradient, rows, 70, count) for rows in (plan.forward, settled, plan.dense_forward)]
    assert_same(found, found[-1:] * 5)
    wanted = dy[:, :, 0, 0].double().T @ x[:, :, 0, 0].double()
    torch.testing.assert_close(floats, wanted[mask].float(), rtol=1e-4, atol=1e-4)


def test_codes_of_32_bits():
    for shape in ((4, 70_000), (70_000, 4)):
        plan, count = plan_of(*shape, 0.01, linear_geometry(shape[1], shape[0]))
        wide = plan.forward if shape[1] > 65_536 else plan.backward
        assert wide.plane.max() > 65_536
        assert (8 if wide is plan.backward else 6) * count <= plan.backward.nbytes


def test_what_nobody_asks_for_is_not_made():
    pattern = dense_pattern(torch.rand(64, 64, generator=generator(1)) < 0.5)[:2]
    plan = make_plan(*pattern, linear_geometry(64, 64), 1, DENSE)
    for swapped in (False, True):
        assert isinstance(plan.multiplied(True, swapped), DenseRows)
    assert isinstance(plan.differentiated(True), DenseRows)
    assert not {"forward", "backward"} & set(vars(plan))


def test_a_pattern_that_is_not_of_the_layouts():
    g, pattern = linear_geometry(8, 6), ValuePattern(*dense_pattern(torch.ones(6, 8) > 0)[:2], 8)
    assert PatternList(pattern, 1, (0,), (0,), g.input_layout, g.output_layout, False).slots == 48
    for arguments, message in (
        ((pattern, 4, (0,), (0,)), "in 4 groups does not go with"),
        ((pattern, 1, (0, 0), (0, 0)), "do not make 8 columns"),
        ((pattern, 1, (0,), (0, 0)), "do not make 8 columns"),
        ((pattern, 1, (1,), (0,)), "tap_phase must lie in"),
        ((pattern, 1, (0,), (-65,)), "offsets must lie in"),
        ((pattern, 1, (0,), (1 << 20,)), "offsets must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            PatternList(*arguments, g.input_layout, g.output_layout, False)
    with pytest.raises(TypeError):
        PatternList(None, 1, (0,), (0,), g.input_layout, g.output_layout, False)
    with pytest.raises(TypeError):
        PatternList()
