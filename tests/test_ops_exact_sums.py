"""Sums that do not fit into 32 bits, and signs that kernels must not take for granted."""

from __future__ import annotations

import pytest
import torch

from qsparseprop import ops
from qsparseprop.layout.geometry import conv_geometry, linear_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import make_plan
from qsparseprop.ops import reference

from ._ops import assert_same, operand

pytestmark = pytest.mark.usefixtures("one_thread")


def _rows_of(counts, columns):
    """A list whose rows read the first `count` planes of a linear layer with `columns` features, and its grid."""
    mask = torch.arange(columns) < torch.tensor(counts)[:, None]
    g = linear_geometry(columns, len(counts))
    return make_plan(*dense_pattern(mask)[:2], g), g


@pytest.mark.parametrize("batch", [1, 70])
def test_spmm_is_exact_beyond_32_bits(isa, batch):
    """255 * 127 * 70,000 = 2.27e9 is more than an int32 holds; also rows at the bound, and short and empty ones."""
    counts = [70_000, 140_000, 5, 0, 65_536, 65_537, 65_540, 66_311, 66_312, 131_072, 131_076]
    plan, g = _rows_of(counts, max(counts))
    rows = plan.forward
    lanes = g.input_grid.lanes(batch)
    planes = {"largest": torch.full((lanes,), 255, dtype=torch.uint8), "zeros": torch.zeros(lanes, dtype=torch.uint8)}
    planes["random"] = torch.randint(256, (lanes,), dtype=torch.uint8)
    sign = torch.randint(2, rows.index.shape) * 2 - 1
    for name, x in planes.items():
        # the lanes that are elements, (feature, image)
        element = x[: -(-batch // 64) * g.input_grid.block].view(-1, g.input_grid.block)[:, : max(counts) * 64]
        element = element.view(-1, max(counts), 64).transpose(0, 1).reshape(max(counts), -1)[:, :batch].double()
        for weights in (torch.full(rows.index.shape, 127), torch.full(rows.index.shape, -127), 127 * sign):
            weights = torch.where(rows.index < 0, 0, weights).to(torch.int8)
            slot_row = torch.repeat_interleave(torch.arange(len(counts)), 4 * rows.group_ptr.diff().long())
            total = torch.zeros(len(counts), dtype=torch.int64).index_add(0, slot_row, weights.long())
            products = torch.zeros(len(counts), batch, dtype=torch.int64)
            for r in range(len(counts)):
                own = weights[4 * rows.group_ptr[r] : 4 * rows.group_ptr[r + 1]][: counts[r]]
                products[r] = (own.double() @ element[: counts[r]]).to(torch.int64)  # exact: below 2**53
            for zero in (0, 128, 255):
                packed = ops.Packed(x, torch.ones(1), torch.tensor([zero], dtype=torch.int32))
                out = ops.spmm(packed, ops.Weights(weights, torch.ones(len(counts)), total), rows, batch)
                expected = (products - zero * total[:, None]).T.to(torch.float32)
                assert torch.equal(out[:, :, 0, 0], expected), (name, zero)


SIGNS = ("both", "positive", "negative", "alternating", "one negative", "small")


def _codes_of(signs, shape):
    """int8 codes in [-127, 127] whose neighbours agree in sign, or do not, and are large or small."""
    if signs == "small":
        return torch.randint(-20, 21, shape, dtype=torch.int8)
    codes = torch.where(torch.rand(shape) < 0.3, 127, torch.randint(1, 128, shape))
    sign = {"both": torch.randint(2, shape) * 2 - 1, "negative": -torch.ones(shape),
            "alternating": 1 - 2 * (torch.arange(codes.numel()) % 2).view(shape),
            "one negative": torch.where(torch.arange(codes.numel()).view(shape) % 37 == 5, -1, 1)}  # fmt: skip
    return (codes * sign.get(signs, 1)).to(torch.int8)


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_signs_of_weights_do_not_matter(isa, signs, threads):
    """Enough lanes that AVX2 reorders the rows by sign; short, long and empty rows, and codes that saturate 16 bits."""
    torch.set_num_threads(threads)
    counts = [3, 0, 1, 4, 17, 64, 1023, 1025, 2050, 5, 100, 7]
    plan, g = _rows_of(counts, max(counts))
    rows, batch = plan.forward, 260
    weights = torch.where(rows.index < 0, 0, _codes_of(signs, rows.index.shape)).to(torch.int8)
    slot_row = torch.repeat_interleave(torch.arange(len(counts)), 4 * rows.group_ptr.diff().long())
    total = torch.zeros(len(counts), dtype=torch.int64).index_add(0, slot_row, weights.long())
    planes = torch.randint(256, (g.input_grid.lanes(batch),), dtype=torch.uint8)
    planes[torch.rand(planes.shape) < 0.5] = 255
    arguments = (ops.Packed(planes, torch.ones(1), torch.tensor([77], dtype=torch.int32)),
                 ops.Weights(weights, torch.ones(len(counts)), total), rows, batch)  # fmt: skip
    assert_same(ops.spmm(*arguments), reference.spmm(*arguments))


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("batch", [64, 200, 460])
def test_the_signs_of_gradients_do_not_matter(isa, signs, batch):
    plan, g = _rows_of([3, 0, 21, 8, 33], 40)
    rows, x_grid, dy_grid = plan.forward, g.input_grid, g.output_grid
    planes = torch.randint(256, (x_grid.lanes(batch),), dtype=torch.uint8)
    planes[torch.rand(planes.shape) < 0.5] = 255
    dy = (_codes_of(signs, (dy_grid.lanes(batch),)).to(torch.int32) + 128).to(torch.uint8)
    if batch % 64:  # images that do not exist have no gradient
        last = dy[(batch // 64) * dy_grid.block :][: 5 * 64].view(5, 64)
        last[:, batch % 64 :] = 128
    one = torch.ones(1)
    arguments = (ops.Packed(planes, one, torch.tensor([77], dtype=torch.int32)), ops.Packed(dy, one), rows, batch, 65)
    assert_same(ops.sddmm(*arguments), reference.sddmm(*arguments))


@pytest.mark.parametrize("layer", ["linear", "conv", "conv, batch innermost"])
def test_sddmm_is_exact_beyond_32_bits(isa, layer):
    """More than 66,311 lanes of the largest codes."""
    if layer == "linear":
        shape, g = (70_001, 3, 1, 1), linear_geometry(3, 2)
    else:
        shape = (2, 3, 280, 251) if layer == "conv" else (300, 3, 17, 15)
        g = conv_geometry(3, 2, shape[2:], (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), shape[0],
                          layer == "conv, batch innermost")
    lanes = shape[0] * shape[2] * shape[3]
    assert lanes > 66_311
    mask = torch.tensor([[True, True, False], [False, True, True]])
    rows = make_plan(*dense_pattern(mask)[:2], g).forward
    # positive inputs have codes 0..255; of the two gradients the first is always the largest, the second the smallest
    x = torch.ones(shape)
    dy = torch.ones(shape[0], 2, *shape[2:])
    dy[:, 1] = -1
    packed = operand(x, g.input_layout, "absmax")
    packed_dy = operand(dy, g.output_layout, "stochastic")
    assert packed.planes.max() == 255
    one = torch.ones(1)
    for zero in (0, 128, 255):
        out = ops.sddmm(ops.Packed(packed.planes, one, torch.tensor([zero], dtype=torch.int32)),
                        ops.Packed(packed_dy.planes, one), rows, shape[0], 4)  # fmt: skip
        exact = 127 * (255 - zero) * lanes
        assert zero or exact > 2**31
        assert torch.equal(out, torch.tensor([exact, exact, -exact, -exact]).to(torch.float32))
