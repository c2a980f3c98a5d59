"""The operators of `qsparseprop.ops` in plain torch: the oracle of the tests.

Same functions, same arguments, same results: integers bit for bit, floats as well where a formula has one order of
operations. A layer's two operators, which only call these one after the other, are not repeated. Written to be read,
not to be fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MIN_SCALE = 2.0**-111
_MASK = 0xFFFFFFFFFFFFFFFF


def mix_seed(seed: int) -> int:
    """Spread a seed over 64 bits (finaliser of splitmix64)."""
    z = (seed + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def random_bits(seed: int, index: Tensor) -> Tensor:
    """The 16 random bits of elements `index` (int64) of the call with `seed` (64 bits), as int64.

    A multiply-xorshift mixer of two rounds (multipliers: C. Wellons, "lowbias32", public domain), with the seed's
    halves entering before and between them. Elements 2 i and 2 i + 1 share a result, of which they take the low and the
    high half.
    """
    pair = index >> 1
    mask = 0xFFFFFFFF
    x = (((pair & mask) ^ (seed & mask)) * 0x7FEB352D) & mask
    x = x ^ (x >> 15) ^ ((seed >> 32) & mask) ^ (pair >> 32)
    x = (x * 0x846CA68B) & mask
    x = x ^ (x >> 16)
    return torch.where((index & 1).bool(), x >> 16, x & 0xFFFF)


def stochastic_round(value: Tensor, seed: int, index: Tensor) -> Tensor:
    """floor(value + u), u uniform in [0, 1), in fixed point of 16 fractional bits."""
    return ((value * 65536.0).round().to(torch.int64) + random_bits(seed, index)) >> 16


def symmetric_scale(absmax: Tensor, levels: float) -> Tensor:
    """Scale that maps [-absmax, absmax] to [-levels, levels]: at least 2**-111, so that 2**16 / scale is finite."""
    scale = absmax / levels
    return torch.where(scale < MIN_SCALE, MIN_SCALE, scale)


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


def quantize_pack(
    x: Tensor, grid: Sequence[int], views: Sequence[int], lanes: int, scheme: str, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `qsparseprop.ops.quantize_pack`."""
    x = x.to(torch.float32)
    absmax = x.abs().amax() if x.numel() else x.new_zeros(())
    zero_point = 128
    if not torch.isfinite(absmax):  # every element a zero; the scale keeps the result from looking like a number
        return torch.full((lanes,), 128, dtype=torch.uint8), absmax.reshape(1), torch.tensor([128], dtype=torch.int32)
    if scheme == "standard":
        low, high = x.amin().clamp(max=0) if x.numel() else absmax, x.amax().clamp(min=0) if x.numel() else absmax
        scale = symmetric_scale(high / 255 - low / 255, 1)
        inverse = 1 / scale
        zero_point = int((-low * inverse).round().clamp(0, 255))
    elif scheme == "absmax" and (x.numel() == 0 or x.amin() >= 0):
        scale, zero_point = symmetric_scale(absmax, 255), 0
        inverse = 1 / scale
    else:  # "symmetric", "stochastic"
        scale = symmetric_scale(absmax, 127)
        inverse = 1 / scale
    low, high = -zero_point if scheme == "standard" else max(-zero_point, -127), 255 - zero_point
    value = x * inverse
    if scheme == "stochastic":
        channels_innermost = torch.arange(x.numel()).reshape(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        value = stochastic_round(value, mix_seed(int(seed)), channels_innermost).clamp(low, high)
    else:
        value = value.round().clamp(low, high)
    planes = torch.full((lanes,), zero_point, dtype=torch.uint8)
    _fill(planes, (value + zero_point).to(torch.uint8), grid, views)
    return planes, scale.reshape(1), torch.tensor([zero_point], dtype=torch.int32)


def pack(x: Tensor, grid: Sequence[int], views: Sequence[int], lanes: int) -> Tensor:
    """See `qsparseprop.ops.pack`."""
    planes = torch.zeros(lanes, dtype=torch.float32)
    _fill(planes, x.to(torch.float32), grid, views)
    return planes


def _slot_rows(group_ptr: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(group_ptr.numel() - 1), 4 * group_ptr.diff().to(torch.int64))


def quantize_weight(values: Tensor, index: Tensor, group_ptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `qsparseprop.ops.quantize_weight`."""
    rows = group_ptr.numel() - 1
    row = _slot_rows(group_ptr)
    slots = torch.cat([values, values.new_zeros(1)])[index.to(torch.int64)]
    absmax = torch.zeros(rows).scatter_reduce(0, row, slots.abs(), "amax")
    scale = symmetric_scale(absmax, 127)
    inverse = torch.where(torch.isfinite(absmax), 1 / scale, 0.0)
    codes = (slots * inverse[row]).round().clamp(-127, 127)
    codes = torch.where(torch.isfinite(slots), codes, -127.0)
    total = torch.zeros(rows, dtype=torch.int64).index_add(0, row, codes.to(torch.int64))
    return codes.to(torch.int8), scale, total.to(torch.int32)


def spmm(
    planes: Tensor,
    weights: Tensor,
    group_ptr: Tensor,
    offset: Tensor,
    scale: Tensor | None,
    total: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    bias: Tensor | None,
    grid: Sequence[int],
    views: Sequence[int],
    shape: Sequence[int],
    channels_last: bool,
    zeros: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `qsparseprop.ops.spmm`."""
    codes = planes.dtype == torch.uint8
    images, channels = shape[:2]
    out = torch.zeros(tuple(shape), dtype=torch.float32)
    row, offset = _slot_rows(group_ptr), offset.to(torch.int64)
    for view, (ys, xs) in _views(views):
        lanes = _lanes(grid, view, images)
        sums = torch.zeros(channels, lanes.numel(), dtype=torch.int64 if codes else torch.float32)
        for slot in ((row >= view[0]) & (row < view[0] + channels)).nonzero().squeeze(1).split(256):
            x = planes[offset[slot][:, None] + lanes.reshape(1, -1)].to(sums.dtype)
            sums.index_add_(0, row[slot] - view[0], x * weights[slot].to(sums.dtype)[:, None])
        rows = slice(view[0], view[0] + channels)
        if codes:
            sums -= total[rows].to(torch.int64)[:, None] * x_zero_point.to(torch.int64)
            sums = sums.to(torch.float32) * (scale[rows] * x_scale)[:, None]
        if bias is not None:
            sums += bias[rows][:, None]
        out[:, :, ys, xs] = sums.reshape(channels, *lanes.shape).transpose(0, 1)
    out = out.to(dtype)
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def sddmm(
    planes: Tensor,
    dy: Tensor,
    group_ptr: Tensor,
    offset: Tensor,
    index: Tensor,
    plane: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    dy_scale: Tensor | None,
    grid: Sequence[int],
    dy_grid: Sequence[int],
    views: Sequence[int],
    shape: Sequence[int],
    nonzeros: int,
) -> Tensor:
    """See `qsparseprop.ops.sddmm`."""
    codes = planes.dtype == torch.uint8
    out = torch.zeros(nonzeros, dtype=torch.float32)
    ((view, _),) = _views(views)
    x_lanes = _lanes(grid, view, shape[0]).reshape(1, -1)
    dy_lanes = _lanes(dy_grid, view, shape[0]).reshape(1, -1) + dy_grid[6]
    wide = torch.int64 if codes else torch.float64
    row, offset = _slot_rows(group_ptr), offset.to(torch.int64)
    for slot in (index >= 0).nonzero().squeeze(1).split(256):
        g = dy[row[slot][:, None] * dy_grid[5] + dy_lanes].to(wide)
        x = planes[offset[slot][:, None] + x_lanes].to(wide)
        if codes:
            sums = ((g - 128) * (x - x_zero_point.to(wide))).sum(1)
            out[index[slot].to(torch.int64)] = sums.to(torch.float32) * (x_scale * dy_scale)
        else:
            out[index[slot].to(torch.int64)] = (g * x).sum(1).to(torch.float32)
    return out
