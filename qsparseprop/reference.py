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


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def random_bits(seed: int, index: Tensor) -> Tensor:
    """The 16 random bits of elements `index` (int64) of the call with `seed` (64 bits), as int64.

    Three rounds of ``x ^= low half * multiplier`` on 64 bits (which wrap around in int64 as they do there), halves
    exchanged between them. Elements 4 i to 4 i + 3 share a result, the lowest bits first.
    """
    low = 0xFFFFFFFF
    x = (index >> 2) * _signed(0x9E3779B97F4A7C15) + _signed(seed & _MASK)
    x = x ^ (x & low) * 0xD2511F52
    x = (x >> 32) & low | x << 32
    x = x ^ (x & low) * 0xCD9E8D56
    x = (x >> 32) & low | x << 32
    x = x ^ (x & low) * 0x846CA68A
    return x >> 16 * (index & 3) & 0xFFFF


def stochastic_round(value: Tensor, seed: int, index: Tensor) -> Tensor:
    """floor(value + u), u uniform in [0, 1) with 16 bits, of float32 values in [-127, 127].

    128 + u has 24 bits; what is added to it is positive and rounded to 16 bits behind the point or more.
    """
    dither = 128 + random_bits(seed, index).to(torch.float32) / 65536
    return (value + dither).to(torch.int64) - 128


def limited_inverse(scale: Tensor, absmax: Tensor, most: int) -> Tensor:
    """1 / scale, or less by as little as it takes for absmax times it not to be beyond `most`."""
    inverse = 1 / scale
    while absmax * inverse > most:
        inverse = torch.nextafter(inverse, torch.zeros(()))
    return inverse


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


def _gap_zeros(zero_point: Tensor, grid: Sequence[int], images: int, lanes: int) -> Tensor:
    """Zero point of each lane of the buffer: what the taps read behind a plane's lanes is the front of the next one."""
    planes, pitch, front, block = grid[4:]
    lane = torch.arange(lanes)
    plane = torch.clamp(lane % block // pitch, max=planes - 1)
    owner = torch.where(lane % block - plane * pitch < front, (plane - 1) % planes, plane)
    return zero_point[torch.where(lane < -(-images // grid[0]) * block, owner, planes - 1)]


def round_to_power(value: Tensor, seed: int, index: Tensor) -> Tensor:
    """Round to a neighbouring power of two at random, below 1 to 0 or 1, in fixed point of 16 fractional bits.

    With 2^e <= |value| < 2^(e + 1) the result is sign(value) floor(|value| / 2^e + u) 2^e.
    """
    fixed = (value * 65536.0).round().to(torch.int64)
    magnitude = fixed.abs()
    e = (torch.frexp(magnitude.to(torch.float64)).exponent.to(torch.int64) - 1 - 16).clamp(min=0)
    whole = (magnitude + (random_bits(seed, index) << e)) >> (16 + e)
    return fixed.sign() * (whole << e)


def sawb_clip(x: Tensor, c1: float, c2: float, nonzeros: bool) -> Tensor:
    """Clip of SAWB, c1 sqrt(E x^2) - c2 E|x|: at most max|x|, which it also is where the formula is not positive."""
    absmax = x.abs().amax()
    n = int(x.count_nonzero()) if nonzeros else x.numel()
    wide = x.to(torch.float64)
    clip = c1 * (wide.square().sum() / n).sqrt() - c2 * (wide.abs().sum() / n)
    return torch.where((clip > 0) & (clip < absmax), clip, absmax.to(torch.float64)).to(torch.float32)


def quantize_values(
    x: Tensor,
    scheme: str,
    seed: int,
    index: Tensor,
    options: Sequence[float] = (),
    bits: int = 8,
    around_zero: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """Codes, scale and zero point of some values that share them.

    Parameters
    ----------
    x : Tensor
        float32, any shape.
    scheme : str
    seed : int
        Mixed.
    index : Tensor
        int64, the elements' numbers.
    options
        As `qsparseprop.ops.quantize_pack`.
    bits : int
    around_zero : bool
        Whether codes are int8 around 0, otherwise uint8.
    """
    levels = 2 ** (bits - 1) - 1
    top, zero_point = 2 * levels + 1, 0 if around_zero else levels + 1
    dtype = torch.int8 if around_zero else torch.uint8
    absmax = x.abs().amax() if x.numel() else x.new_zeros(())
    if not torch.isfinite(absmax):  # every element a zero; the scale keeps the result from looking like a number
        return torch.full(x.shape, zero_point, dtype=dtype), absmax, zero_point
    if scheme == "sawb" and x.numel():
        absmax = sawb_clip(x, *(options or (31.76, 35.04, 0)))
    scale = symmetric_scale(absmax, levels)
    if scheme == "standard":
        low, high = x.amin().clamp(max=0) if x.numel() else absmax, x.amax().clamp(min=0) if x.numel() else absmax
        scale = symmetric_scale(high / top - low / top, 1)
        zero_point = int((-low * (1 / scale)).round().clamp(0, top))
    elif scheme in ("absmax", "sawb") and not around_zero and (x.numel() == 0 or x.amin() >= 0):
        scale, zero_point = symmetric_scale(absmax, top), 0
    elif scheme == "luq":
        levels = 2 ** ((int(options[0]) if options else 7) - 1)
        scale = symmetric_scale(absmax, levels)
    elif scheme == "dithered" and x.numel():
        wide = x.to(torch.float64)
        variance = (wide.square().mean() - wide.mean().square()).clamp(min=0)
        step = ((options[0] if options else 1.0) * variance.sqrt()).to(torch.float32)
        scale = torch.where(step > scale, step, scale)
    inverse = 1 / scale
    if scheme in ("stochastic", "dithered", "luq"):
        inverse = limited_inverse(scale, absmax, levels)
    value = x * inverse
    if scheme in ("stochastic", "dithered"):
        value = stochastic_round(value, seed, index)
    else:
        value = round_to_power(value, seed, index) if scheme == "luq" else value.round()
    low, high = (-levels, levels) if around_zero else (max(-zero_point, -levels), top - zero_point)
    if scheme == "standard":
        low = -zero_point
    return (value.clamp(low, high) + zero_point).to(dtype), scale, zero_point


def quantize_pack(
    x: Tensor,
    grid: Sequence[int],
    views: Sequence[int],
    lanes: int,
    scheme: str,
    seed: Tensor | None,
    per_channel: bool = False,
    options: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """See `qsparseprop.ops.quantize_pack`."""
    x = x.to(torch.float32)
    bits = 0 if seed is None else mix_seed(int(seed))
    index = torch.arange(x.numel()).reshape(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    parts = list(zip(x.split(1, 1), index.split(1, 1), strict=True)) if per_channel else [(x, index)]
    codes, scales, zeros = zip(*(quantize_values(part, scheme, bits, numbers, options) for part, numbers in parts),
                               strict=True)
    repeats = grid[4] // len(parts) if per_channel else 1
    scale = torch.stack(scales).repeat(repeats)
    zero_point = torch.tensor(zeros, dtype=torch.int32).repeat(repeats)
    planes = _gap_zeros(zero_point.expand(grid[4]), grid, x.shape[0], lanes).to(torch.uint8)
    if per_channel or torch.isfinite(scale).all():
        _fill(planes, torch.cat(codes, 1), grid, views)
    return planes, scale, zero_point


def _parts(shape: Sequence[int], dim: int | None, group_size: int | None) -> list[Tensor]:
    """Numbers of the elements that share a scale, for each scale."""
    index = torch.arange(torch.Size(shape).numel())
    if group_size is not None:
        return list(index.split(group_size)) if index.numel() else []
    if dim is None:
        return [index]
    return list(index.view(shape).movedim(dim, 0).reshape(shape[dim], index.numel() // max(shape[dim], 1)))


def quantize(
    x: Tensor,
    scheme: str,
    bits: int,
    dim: int | None,
    group_size: int | None,
    around_zero: bool,
    seed: Tensor | None,
    options: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """See `qsparseprop.quantize_ops.quantize`."""
    flat = x.to(torch.float32).reshape(-1)
    parts = _parts(x.shape, dim, group_size)
    mixed = 0 if seed is None else mix_seed(int(seed))
    codes = torch.empty(flat.shape, dtype=torch.int8 if around_zero else torch.uint8)
    scale, zero_point = torch.empty(len(parts)), torch.empty(len(parts), dtype=torch.int32)
    for i, index in enumerate(parts):
        codes[index], scale[i], zero_point[i] = quantize_values(flat[index], scheme, mixed, index, options, bits,
                                                                around_zero)
    return codes.view(x.shape), scale, zero_point


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    dim: int | None,
    group_size: int | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `qsparseprop.quantize_ops.dequantize`."""
    out = torch.empty(codes.numel(), dtype=torch.float32)
    for i, index in enumerate(_parts(codes.shape, dim, group_size)):
        out[index] = (codes.reshape(-1)[index].to(torch.int32) - zero_point[i]).to(torch.float32) * scale[i]
    return out.view(codes.shape).to(dtype)


def _in_memory(x: Tensor) -> Tensor:
    """The elements of a tensor without gaps in the order of memory."""
    return x.as_strided((x.numel(),), (1,))


def relu_mask(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `qsparseprop.mask_ops.relu_mask`."""
    bits = _in_memory(~(x <= 0)).to(torch.int32)
    words = torch.cat([bits, bits.new_zeros(-bits.numel() % 16)]).view(-1, 16) << torch.arange(16, dtype=torch.int32)
    return x.relu(), words.sum(1).to(torch.int16)


def relu_mask_(x: Tensor) -> Tensor:
    """See `qsparseprop.mask_ops.relu_mask_`."""
    y, mask = relu_mask(x)
    x.copy_(y)
    return mask


def keep_masked(x: Tensor, mask: Tensor) -> Tensor:
    """See `qsparseprop.mask_ops.keep_masked`."""
    bits = (mask[:, None].to(torch.int32) >> torch.arange(16, dtype=torch.int32)) & 1
    out = torch.empty_like(x)
    _in_memory(out).copy_(torch.where(bits.reshape(-1)[: x.numel()] == 1, _in_memory(x), 0))
    return out


def pack(x: Tensor, grid: Sequence[int], views: Sequence[int], lanes: int) -> Tensor:
    """See `qsparseprop.ops.pack`."""
    planes = torch.zeros(lanes, dtype=torch.float32)
    _fill(planes, x.to(torch.float32), grid, views)
    return planes


def _slot_rows(group_ptr: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(group_ptr.numel() - 1), 4 * group_ptr.diff().to(torch.int64))


def quantize_weight(
    values: Tensor,
    index: Tensor,
    group_ptr: Tensor,
    plane: Tensor | None = None,
    factor: Tensor | None = None,
    zero_point: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `qsparseprop.ops.quantize_weight`."""
    rows = group_ptr.numel() - 1
    row = _slot_rows(group_ptr)
    slots = torch.cat([values, values.new_zeros(1)])[index.to(torch.int64)]
    common = torch.ones(())
    if factor is not None and factor.numel() == 1:
        common = factor
    elif factor is not None:
        finite = factor[torch.isfinite(factor)]
        _, exponent = torch.frexp(finite.amax() if finite.numel() else torch.zeros(()))
        exponent = exponent.clamp(-126, 126)
        common = torch.ldexp(common, exponent)
        slots = slots * (factor * torch.ldexp(torch.ones(()), -exponent))[plane.to(torch.int64)]
    absmax = torch.zeros(rows).scatter_reduce(0, row, slots.abs(), "amax")
    if clip is not None and not 0 < clip < torch.inf:
        clip = None
    scale = symmetric_scale(absmax if clip is None else torch.where(torch.isfinite(absmax), clip, absmax), 127)
    inverse = torch.where(torch.isfinite(absmax), 1 / scale, 0.0)
    codes = (slots * inverse[row]).round().clamp(-127, 127)
    codes = torch.where(torch.isfinite(slots), codes, 127.0)
    zeros = 1
    if zero_point is not None:
        zeros = zero_point.to(torch.int64)
        zeros = zeros if zeros.numel() == 1 else zeros[plane.to(torch.int64)]
    total = torch.zeros(rows, dtype=torch.int64).index_add(0, row, codes.to(torch.int64) * zeros)
    return codes.to(torch.int8), scale * common, total


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
    limits: Sequence[float] = (),
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
            sums -= total[rows][:, None] * (1 if x_zero_point is None else x_zero_point.to(torch.int64))
            sums = sums.to(torch.float32) * (scale[rows] * (1 if x_scale is None else x_scale))[:, None]
        if bias is not None:
            sums += bias[rows][:, None]
        if limits:
            sums = sums.clamp(*limits)
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
    rows = group_ptr.numel() - 1
    row, offset = _slot_rows(group_ptr), offset.to(torch.int64)
    for slot in (index >= 0).nonzero().squeeze(1).split(256):
        g = dy[row[slot][:, None] * dy_grid[5] + dy_lanes].to(wide)
        x = planes[offset[slot][:, None] + x_lanes].to(wide)
        if codes:
            zero, factor = (t.expand(grid[4])[plane[slot].to(torch.int64)] for t in (x_zero_point, x_scale))
            sums = ((g - 128) * (x - zero.to(wide)[:, None])).sum(1)
            out[index[slot].to(torch.int64)] = sums.to(torch.float32) * (factor * dy_scale.expand(rows)[row[slot]])
        else:
            out[index[slot].to(torch.int64)] = (g * x).sum(1).to(torch.float32)
    return out


def _exp_minus(t: Tensor) -> Tensor:
    n = (t * 1.44269504088896341).round()
    r = n * 0.693359375 - t - n * 2.12194440e-4
    p = torch.full_like(t, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + c
    return torch.ldexp(r * r * p + r + 1.0, -n)


#: Activations whose slopes are kept, and in which steps.
_SLOPE_STEPS = {"silu": 200.0, "hardswish": 120.0, "gelu": 200.0, "gelu_tanh": 200.0}


def _curved(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """An activation that has a slope everywhere, and the magnitude of the slope's distance from 1/2."""
    a = x.abs()
    if activation == "hardswish":
        rises = torch.where(a < 3.0, a * torch.tensor(1 / 3) - 0.5, 0.0)
        return x * ((x + 3.0).clamp(0.0, 6.0) * torch.tensor(1 / 6)), rises + 0.5
    b = a.clamp(max=87.0 if activation == "silu" else 9.5)
    square = b * b
    if activation == "gelu":
        e = _exp_minus(square * 0.5)
        t = 1.0 / (1.0 + b * 0.231641888)
        p = torch.full_like(t, 1.061405429)
        for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            p = p * t + c
        above = 0.5 * (1.0 - p * t * e)
        density = e * 0.398942280401432678
    else:
        cubic = square * 0.0713548163
        e = _exp_minus(b * (cubic + 1.59576912161) if activation == "gelu_tanh" else b)
        q = 1.0 / (1.0 + e)
        above = 0.5 * (1.0 - e) * q
        density = q * q * e
        if activation == "gelu_tanh":
            density = density * (cubic * 3.0 + 1.59576912161)
    return 0.5 * x + a * above, above + b * density


def _words(bits: Tensor) -> Tensor:
    """Bits (rows, channels) in words of 16, from the lowest on."""
    words = -(-bits.shape[1] // 16)
    padded = torch.nn.functional.pad(bits, (0, 16 * words - bits.shape[1])).view(len(bits), words, 16)
    return (padded.to(torch.int32) << torch.arange(16)).sum(2).to(torch.int16)


def epilogue(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    options: Sequence[float],
    code_scale: Tensor | None,
    code_shift: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `qsparseprop.epilogue_ops.epilogue`."""
    nothing = torch.empty(0, dtype=torch.uint8)
    v = x.to(torch.float32)
    codes = nothing
    if code_scale is not None:
        codes = ((v * code_scale + code_shift).round().clamp(-128, 127) + 128).to(torch.uint8)
    if scale is not None:
        v = v * scale + shift
    if residual is not None:
        v = v + residual.to(torch.float32)
    if activation == "identity":
        y, saved = v, nothing
    elif activation == "clamp":
        low, high = options
        y, saved = v.clamp(low, high), _words((v > low) & (v < high))
    elif activation == "leaky_relu":
        y, saved = torch.where(v > 0, v, v * options[0]), _words(v > 0)
    else:
        y, distance = _curved(v, activation)
        saved = (torch.copysign(distance * _SLOPE_STEPS[activation], v).round() + 128).to(torch.uint8)
    return y.to(x.dtype), codes, saved if save else nothing


def activation_range(ranges: Tensor, activation: str, options: Sequence[float]) -> Tensor:
    """See `qsparseprop.epilogue_ops.activation_range`: in float64, where it is least by itself."""
    least_at = {"silu": -1.2784645, "hardswish": -1.5, "gelu": -0.7517916, "gelu_tanh": -0.7524614}
    at = torch.tensor(0.0 if activation == "leaky_relu" and options[0] < 0 else least_at.get(activation, -torch.inf))
    low, high = ranges.double().unbind(1)
    points = torch.stack([low, high, at.double().clamp(low, high)])
    points = epilogue(points.float(), None, None, None, activation, options, None, None, False)[0]
    ends = torch.stack([points.amin(0), points[:2].amax(0)], 1)
    return torch.where((ends.isfinite().all(1) & ~ranges.isnan().any(1))[:, None], ends, torch.nan)


def epilogue_range(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    options: Sequence[float],
) -> Tensor:
    """See `qsparseprop.epilogue_ops.epilogue_range`."""
    first = (activation, options) if activation == "clamp" else ("identity", [])
    residual = None if residual is None else residual.float()
    before = epilogue(x.float(), residual, scale, shift, *first, None, None, False)[0]
    ends = torch.stack([before.amin(0), before.amax(0)], 1)
    return activation_range(torch.where(before.isfinite().all(0)[:, None], ends, torch.nan), activation, options)


def _gradient(dy: Tensor, saved: Tensor | None, activation: str, options: Sequence[float]) -> Tensor:
    """The gradient behind the activation, float32."""
    g = dy.to(torch.float32)
    if activation == "identity":
        return g
    if activation in _SLOPE_STEPS:
        steps = _SLOPE_STEPS[activation]
        return g * ((saved.to(torch.float32) + (steps / 2 - 128)) * torch.tensor(1 / steps))
    passes = (saved.to(torch.int32)[:, :, None] >> torch.arange(16) & 1).reshape(len(dy), -1)[:, : dy.shape[1]].bool()
    return torch.where(passes, g, g * options[0] if activation == "leaky_relu" else 0.0)


def epilogue_sums(
    dy: Tensor, codes: Tensor | None, saved: Tensor | None, activation: str, options: Sequence[float]
) -> Tensor:
    """See `qsparseprop.epilogue_ops.epilogue_sums`."""
    g = _gradient(dy, saved, activation, options).to(torch.float64)
    dot = torch.zeros(g.shape[1], dtype=torch.float64) if codes is None else (g * codes).sum(0)
    most = torch.where(g.isfinite().all(0), g.abs().amax(0), torch.nan)
    return torch.stack([g.sum(0), dot, most], 1)


def epilogue_grad(
    dy: Tensor,
    codes: Tensor | None,
    saved: Tensor | None,
    activation: str,
    options: Sequence[float],
    factor: Tensor | None,
    want_g: bool,
) -> tuple[Tensor, Tensor]:
    """See `qsparseprop.epilogue_ops.epilogue_grad`."""
    g = _gradient(dy, saved, activation, options)
    dx = g
    if factor is not None:
        dx = g * factor[0] + (factor[2] if codes is None else codes.to(torch.float32) * factor[1] + factor[2])
    return dx.to(dy.dtype), g.to(dy.dtype) if want_g else dy.new_empty(0)


#: The activations of `qsparseprop.activation_ops`.
_EPILOGUES = {"relu": ("clamp", [0.0, torch.inf]), "relu6": ("clamp", [0.0, 6.0])}


def act(x: Tensor, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """See `qsparseprop.activation_ops.act`."""
    name, options = _EPILOGUES.get(activation, (activation, []))
    y, _, saved = epilogue(x, None, None, None, name, options, None, None, save)
    return y, saved


def act_grad(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """See `qsparseprop.activation_ops.act_grad`."""
    name, options = _EPILOGUES.get(activation, (activation, []))
    return epilogue_grad(dy, None, saved, name, options, None, False)[0]


def norm_statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    training: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `qsparseprop.norm_ops.norm_statistics`."""
    v, channels = x.to(torch.float64), x.shape[1]
    if training:
        mean, variance = v.mean(0), v.var(0, correction=0)
        for running, found in ((running_mean, mean), (running_var, v.var(0))):
            if running is not None:
                running.copy_((1 - momentum) * running.double() + momentum * found)
    else:
        mean, variance = running_mean.double(), running_var.double()
    rstd = 1 / (variance + eps).sqrt()
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    least = greatest = step = torch.full((channels,), torch.nan, dtype=torch.float64)
    if training or save:
        least, greatest = v.amin(0), v.amax(0)
        step = (greatest - least) / 255
        step = torch.where(step > 0, step, 1.0)
    ends = torch.stack([least, greatest]).float() * scale.float() + shift.float()
    ends = torch.where(ends.isfinite().all(0) & v.isfinite().all(0), ends, torch.nan)
    singles = torch.stack([scale, shift, 1 / step, -least / step - 128, step * scale, least * scale + shift]).float()
    return singles, ends.sort(0)[0].t().contiguous(), torch.stack([mean, variance, rstd, step * rstd, (least - mean) * rstd, step, least])


def norm_factors(
    sums: Tensor, statistics: Tensor, weight: Tensor | None, count: int, batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `qsparseprop.norm_ops.norm_factors`."""
    total, with_codes, greatest = sums.unbind(1)
    _, _, rstd, slope, offset, _, _ = statistics
    normalised = slope * with_codes + offset * total
    k = rstd if weight is None else rstd * weight
    factor = torch.zeros(3, len(k), dtype=torch.float64)
    factor[0] = k
    if batch_statistics:
        factor[1] = -k * slope * normalised / count
        factor[2] = -k * (total + offset * normalised) / count
    factor = factor.float()
    rest = torch.stack([factor[2], 255 * factor[1] + factor[2]]).abs().amax(0)
    bound = greatest.float() * factor[0].abs() + rest + 0 * total.float()
    before = 0 * k * total if batch_statistics else k * total
    return factor, torch.stack([-bound, bound], 1), torch.stack([normalised, total, before]).float()
