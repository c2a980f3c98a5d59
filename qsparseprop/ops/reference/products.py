"""The layout of planes and lanes, what is packed into it, and the two sparse products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qsparseprop._kernels._dense_rows import DenseRows
from qsparseprop._kernels._gather_list import GatherList
from qsparseprop._kernels._plan import PlaneLayout, ProductRows
from qsparseprop._kernels._statistics import Scheme
from qsparseprop.ops import products
from qsparseprop.ops.products import Packed, Weights
from qsparseprop.ops.reference._signature import reference_of
from qsparseprop.ops.reference.quantization import quantize_values
from qsparseprop.ops.schemes import QUIETEST, seed_bits, symmetric_scale

__all__ = ["gather_weight", "multiply", "pack", "pack_codes", "quantize_pack", "quantize_weight", "sddmm", "spmm"]


def _lanes(grid: Sequence[int], view: Sequence[int], images: int) -> Tensor:
    """Lane of each element of one channel, counted from the start of the buffer: (images, rows, columns), int64."""
    per_block, lane_b, lane_y, lane_x, _, _, _, block = grid
    _, _, origin, rows, cols = view[:5]
    b = torch.arange(images)
    y = torch.arange(rows)[:, None] * lane_y
    x = torch.arange(cols)[None, :] * lane_x
    return (b // per_block * block + b % per_block * lane_b)[:, None, None] + origin + y + x


def _views(views: Sequence[int]) -> Iterator[tuple[Sequence[int], tuple[slice, slice]]]:
    """Each view with the part of the tensor's height and width that it maps."""
    for i in range(0, len(views), 9):
        _, _, _, rows, cols, y0, x0, ystep, xstep = view = views[i : i + 9]
        if rows and cols:
            yield view, (slice(y0, y0 + (rows - 1) * ystep + 1, ystep), slice(x0, x0 + (cols - 1) * xstep + 1, xstep))


def _fill(planes: Tensor, values: Tensor, grid: Sequence[int], views: Sequence[int]) -> None:
    pitch, front = grid[5:7]
    for view, (ys, xs) in _views(views):
        plane = (view[0] + torch.arange(view[1])) * pitch + front
        planes[_lanes(grid, view, values.shape[0])[:, None] + plane[:, None, None]] = values[:, :, ys, xs]


def _gap_zeros(zero_point: Tensor, grid: Sequence[int], images: int, lanes: int) -> Tensor:
    """Zero point of each lane of the buffer: what the taps read behind a plane's lanes is the front of the next one."""
    planes, pitch, front, block = grid[4:]
    lane = torch.arange(lanes)
    plane = torch.clamp(lane % block // pitch, max=planes - 1)
    owner = torch.where(lane % block - plane * pitch < front, (plane - 1) % planes, plane)
    return zero_point[torch.where(lane < -(-images // grid[0]) * block, owner, planes - 1)]


@reference_of(products.quantize_pack)
def quantize_pack(x, layout, scheme, seed):
    """See `qsparseprop.ops.quantize_pack`."""
    return pack_codes(x.to(torch.float32), layout, scheme, seed)


def pack_codes(
    x: Tensor, layout: PlaneLayout, scheme: Scheme, seed: Tensor | None, ranges: Tensor | None = None
) -> Packed:
    """`quantize_pack` of float32 values; `ranges` (channels or 1, 2) are bounds in place of their own."""
    grid, lanes, bits = layout.numbers, layout.lanes(len(x)), seed_bits(scheme.name, seed)
    index = torch.arange(x.numel()).reshape(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    parts = [(x, index)]
    if scheme.per_channel:
        parts = list(zip(x.split(1, 1), index.split(1, 1), strict=True))
    bounds = [None] * len(parts) if ranges is None else ranges
    least = 0.0

    def quantized_parts():
        return [quantize_values(part, scheme.name, bits, numbers, scheme.options, bounds=ends, least=least)
                for (part, numbers), ends in zip(parts, bounds, strict=True)]  # fmt: skip

    quantized = quantized_parts()
    if scheme.random and layout.image == (1, 1):  # of a linear layer
        least = QUIETEST * max((float(s) for _, s, _ in quantized if torch.isfinite(s)), default=0.0)
        quantized = quantized_parts()
    codes, scales, zeros = zip(*quantized, strict=True)
    repeats = grid[4] // len(parts) if scheme.per_channel else 1
    scale = torch.stack(scales).repeat(repeats)
    zero_point = torch.tensor(zeros, dtype=torch.int32).repeat(repeats)
    planes = _gap_zeros(zero_point.expand(grid[4]), grid, x.shape[0], lanes).to(torch.uint8)
    if scheme.per_channel or torch.isfinite(scale).all():
        _fill(planes, torch.cat(codes, 1), grid, layout.views)
    return Packed(planes, scale, zero_point)


@reference_of(products.pack)
def pack(x, layout):
    """See `qsparseprop.ops.pack`."""
    planes = torch.zeros(layout.lanes(len(x)), dtype=torch.float32)
    _fill(planes, x.to(torch.float32), layout.numbers, layout.views)
    return Packed(planes)


class _Slots(NamedTuple):
    """What rows of either kind are: for each of their slots a row, an offset, the plane there, and a value or -1."""

    row: Tensor
    offset: Tensor
    plane: Tensor
    value: Tensor


def _slots(rows: ProductRows) -> _Slots:
    assert isinstance(rows, GatherList | DenseRows)
    if isinstance(rows, GatherList):
        each = 4 * rows.group_ptr.diff().to(torch.int64)
    else:
        each = torch.tensor(rows.slots // rows.rows)
    row = torch.arange(rows.rows).repeat_interleave(each)
    return _Slots(row, *(t.to(torch.int64) for t in (rows.offset, rows.plane, rows.index)))


@reference_of(products.quantize_weight)
def quantize_weight(values, rows, factor, zero_point, clip):
    """See `qsparseprop.ops.quantize_weight`."""
    row, _, plane, index = _slots(rows)
    slots = gather_weight(values, rows).slots
    common = torch.ones(())
    if factor is not None and factor.numel() == 1:
        common = factor
    elif factor is not None:
        finite = factor[torch.isfinite(factor)]
        _, exponent = torch.frexp(finite.amax() if finite.numel() else torch.zeros(()))
        exponent = exponent.clamp(-126, 126)
        common = torch.ldexp(common, exponent)
        folded = torch.where(torch.isfinite(factor), factor * torch.ldexp(torch.ones(()), -exponent), torch.nan)
        slots = slots * folded[plane]
        if not isinstance(rows, GatherList):  # the padding of a list stands for a value that is there, zeros for none
            slots = torch.where(index < 0, 0.0, slots)
    absmax = torch.zeros(rows.rows).scatter_reduce(0, row, slots.abs(), "amax")
    if clip is not None and not 0 < clip < torch.inf:
        clip = None
    scale = symmetric_scale(absmax if clip is None else torch.where(torch.isfinite(absmax), clip, absmax), 127)
    inverse = torch.where(torch.isfinite(absmax), 1 / scale, 0.0)
    codes = (slots * inverse[row]).round().clamp(-127, 127)
    codes = torch.where(torch.isfinite(slots), codes, 127.0)
    zeros: int | Tensor = 1
    if zero_point is not None:
        wide = zero_point.to(torch.int64)
        zeros = wide if wide.numel() == 1 else wide[plane]
    total = torch.zeros(rows.rows, dtype=torch.int64).index_add(0, row, codes.to(torch.int64) * zeros)
    return Weights(codes.to(torch.int8), scale * common, total)


@reference_of(products.gather_weight)
def gather_weight(values, rows):
    """See `qsparseprop.ops.gather_weight`."""
    return Weights(torch.cat([values, values.new_zeros(1)])[_slots(rows).value])


@reference_of(products.spmm)
def spmm(operand, weights, rows, images, bias, dtype, channels_last, limits):
    """See `qsparseprop.ops.spmm`."""
    planes, x_scale, x_zero_point = operand
    slots, scale, total = weights
    grid, views, shape = rows.source.numbers, rows.target.views, rows.target.shape(images)
    codes = planes.dtype == torch.uint8
    channels = shape[1]
    out = torch.zeros(tuple(shape), dtype=torch.float32)
    row, offset, *_ = _slots(rows)
    for view, (ys, xs) in _views(views):
        lanes = _lanes(grid, view, images)
        sums = torch.zeros(channels, lanes.numel(), dtype=torch.int64 if codes else torch.float32)
        own_slots = (row >= view[0]) & (row < view[0] + channels)
        if codes:
            own_slots &= slots != 0  # of dense rows most
        for slot in own_slots.nonzero().squeeze(1).split(256):
            x = planes[offset[slot][:, None] + lanes.reshape(1, -1)].to(sums.dtype)
            sums.index_add_(0, row[slot] - view[0], x * slots[slot].to(sums.dtype)[:, None])
        own = slice(view[0], view[0] + channels)
        if scale is not None and total is not None:
            sums -= total[own][:, None] * (1 if x_zero_point is None else x_zero_point.to(torch.int64))
            sums = sums.to(torch.float32) * (scale[own] * (1 if x_scale is None else x_scale))[:, None]
        if bias is not None:
            sums += bias[own][:, None]
        if limits:
            sums = sums.clamp(*limits)
        out[:, :, ys, xs] = sums.reshape(channels, *lanes.shape).transpose(0, 1)
    out = out.to(dtype)
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


@reference_of(products.multiply)
def multiply(operand, values, rows, out, bias, clip, limits):
    """See `qsparseprop.ops.multiply`."""
    values = values.to(torch.float32)
    if operand.scale is None:
        weights = gather_weight(values, rows)
    elif operand.scale.numel() == 1:
        weights = quantize_weight(values, rows, clip=clip)
    else:
        weights = quantize_weight(values, rows, operand.scale, operand.zero_point, clip)
        operand = Packed(operand.planes)
    bias = None if bias is None else bias.to(torch.float32)
    return out.copy_(spmm(operand, weights, rows, len(out), bias, out.dtype, False, limits).view(out.shape))


def _whole_view(layout: PlaneLayout) -> Sequence[int]:
    """All lanes of the planes as one view: slices lie on the same planes with gaps of zeros between them."""
    plane, channels, origin, rows, cols = layout.views[:5]
    if len(layout.views) > 9:
        rows = (layout.views[-7] - origin) // layout.numbers[2] + layout.views[-6]
    return plane, channels, origin, rows, cols


@reference_of(products.sddmm)
def sddmm(operand, gradient, rows, images, nonzeros):
    """See `qsparseprop.ops.sddmm`."""
    planes, dy = operand.planes, gradient.planes
    grid, dy_grid, view = rows.source.numbers, rows.target.numbers, _whole_view(rows.target)
    codes = planes.dtype == torch.uint8
    out = torch.zeros(nonzeros, dtype=torch.float32)
    x_lanes = _lanes(grid, view, images).reshape(1, -1)
    dy_lanes = _lanes(dy_grid, view, images).reshape(1, -1) + dy_grid[6]
    wide = torch.int64 if codes else torch.float64
    row, offset, plane, index = _slots(rows)
    for slot in (index >= 0).nonzero().squeeze(1).split(256):
        g = dy[row[slot][:, None] * dy_grid[5] + dy_lanes].to(wide)
        x = planes[offset[slot][:, None] + x_lanes].to(wide)
        if operand.zero_point is not None and operand.scale is not None and gradient.scale is not None:
            zero, scale = (t.expand(grid[4])[plane[slot]] for t in (operand.zero_point, operand.scale))
            scale = scale * gradient.scale.expand(rows.rows)[row[slot]]
            sums = ((g - 128) * (x - zero.to(wide)[:, None])).sum(1)
            out[index[slot]] = sums.to(torch.float32) * scale
        else:
            out[index[slot]] = (g * x).sum(1).to(torch.float32)
    return out
