"""How a layer's input and output lie in planes and lanes, and which offset a kernel tap has there.

Every layer is a convolution here; a linear layer is one over images of a single pixel. The input is laid out as planes
(a channel, or with stride ``s`` one of its ``s * s`` phases) of lanes (batch x height x width). Rows and images share
their padding: what pads a row on its right also pads the next one on its left. With that layout a kernel tap is one
offset, the same for every lane, and input and output share one numbering of lanes::

    out[row, lane] = sum_k value[row, k] * x[plane[row, k], lane + shift[row, k]]

Derivation of the grid's size (one dimension, stride s, padding p before the data, taps t = k * dilation): tap t reads
phase f = t mod s at lane j + m, m = t div s. Phase f holds data at lanes lo_f .. hi_f - 1. The pitch must hold the data
(hi_f) and the output (O), and its gap must cover both what the taps read behind the data (O + m_f - lo_f) and, in the
backward pass, what they read before the output; the last two are the same condition.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

#: Lanes that a kernel works on at a time.
UNIT = 64
#: Lanes of a plane of one block to aim for: enough to amortise its gaps, few enough to stay near the cache. Where one
#: of twice the size has a good deal fewer gaps, see SAVED_LANES, it is that.
BLOCK_LANES = 1024
#: Part of the lanes of a block that must be saved for blocks to be made twice as large.
SAVED_LANES = 0.1


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _pitch(front: int, lanes: int) -> int:
    """Lanes from plane to plane."""
    pitch = front + _round_up(lanes, UNIT)
    # an odd number of cache lines spreads the planes over the cache's sets
    return pitch | UNIT if pitch > UNIT else pitch


def buffer_lanes(grid: Sequence[int], images: int) -> int:
    """Size of the planes' buffer for a batch: whole blocks, and what the kernels read past the last one.

    Parameters
    ----------
    grid : sequence of int
        As `Grid.numbers`.
    images : int

    Raises
    ------
    ValueError
        If the numbers are not those of a grid.
    """
    if len(grid) != 8 or min(grid) < 0 or grid[0] < 1:
        raise ValueError(f"a grid is 8 numbers, of which the first is positive, got {list(grid)}")
    return -(-images // grid[0]) * grid[7] + grid[6] + UNIT


@dataclass(frozen=True)
class Grid:
    """Planes of lanes: strides in lanes, blocks of a few images following each other (see ``kernels.h``)."""

    images: int
    lane_b: int
    lane_y: int
    lane_x: int
    planes: int
    pitch: int
    front: int
    block: int

    @functools.cached_property
    def numbers(self) -> tuple[int, ...]:
        """The grid as the operators take it."""
        return self.images, self.lane_b, self.lane_y, self.lane_x, self.planes, self.pitch, self.front, self.block

    def lanes(self, images: int) -> int:
        """Size of the buffer for a batch, see `buffer_lanes`."""
        return buffer_lanes(self.numbers, images)

    def with_planes(self, planes: int) -> Grid:
        """The same lanes for another number of planes."""
        # an odd number of cache lines from block to block keeps blocks out of each other's cache sets
        block = planes * self.pitch // UNIT
        return Grid(self.images, self.lane_b, self.lane_y, self.lane_x, planes, self.pitch, self.front,
                    (block | 1) * UNIT)


@dataclass(frozen=True)
class _Axis:
    """One spatial dimension: see the module's docstring for the names."""

    size: int
    out: int
    pitch: int
    phases: tuple[int, ...]  # those that a tap reads
    low: tuple[int, ...]
    count: tuple[int, ...]  # elements of each phase
    first: tuple[int, ...]  # coordinate of its first element
    tap_phase: tuple[int, ...]  # per tap: place in `phases`
    tap_shift: tuple[int, ...]
    covered: bool  # whether the phases hold the whole input


def _axis(size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> _Axis:
    before, after = padding
    out = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    taps = [k * dilation for k in range(kernel)]
    phases = tuple(sorted({t % stride for t in taps}))
    low, count, first = [], [], []
    pitch = max(out, 1)
    for f in phases:
        lo = max(0, -((f - before) // stride))
        hi = max(lo, -((f - before - size) // stride))
        reach = max(t // stride for t in taps if t % stride == f)
        low.append(lo)
        count.append(hi - lo)
        first.append(f + stride * lo - before)
        pitch = max(pitch, hi, out + reach - lo)
    return _Axis(size, out, pitch, phases, tuple(low), tuple(count), tuple(first),
                 tuple(phases.index(t % stride) for t in taps), tuple(t // stride for t in taps), sum(count) == size)


@dataclass(frozen=True, eq=False)  # compared by identity: conv_geometry returns the same one for the same arguments
class Geometry:
    """Where everything of one layer lies for one input size.

    Attributes
    ----------
    input_grid, output_grid : Grid
        The same lanes, for the planes of the input (channels x phases) and of the output (channels).
    input_views, output_views : tuple of int
        Nine numbers a view, as the operators take them.
    output_size : tuple of int
        Height and width of the output.
    covers_input : bool
        Whether every input pixel lies in some view; the gradient of the others is zero.
    """

    input_grid: Grid
    output_grid: Grid
    input_views: tuple[int, ...]
    output_views: tuple[int, ...]
    output_size: tuple[int, int]
    covers_input: bool
    in_channels: int
    tap_phase: tuple[int, ...]
    tap_shift: tuple[int, ...]
    input_size: tuple[int, int]
    stride: tuple[int, int]
    #: Row and column of the input that a tap reads for the output's first pixel; negative in the padding.
    tap_offset: tuple[tuple[int, int], ...]


def prefer_batch_innermost(batch: int, input_size: tuple[int, int], channels_last: bool) -> bool:
    """Whether neighbouring lanes had better be images than pixels.

    Images side by side waste no lanes on padding and keep every load aligned, which counts for small images. But a run
    of them is far apart in memory: where neighbours in memory are the pixels of a row, collecting it is slow; where
    they are channels it makes no difference, unless images are so large that a power of two of bytes lies between two,
    of which the caches hold only a few.
    """
    pixels = input_size[0] * input_size[1]
    if channels_last:
        return (batch >= UNIT and pixels <= 256) or (batch >= 16 and pixels <= 64)
    return batch >= UNIT and pixels <= 64


def conv_geometry(
    in_channels: int,
    out_channels: int,
    input_size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    batch: int,
    batch_innermost: bool,
) -> Geometry:
    """Geometry of a convolution.

    Parameters
    ----------
    in_channels, out_channels : int
    input_size, kernel_size, stride, dilation : (int, int)
        Height and width.
    padding : (int, int, int, int)
        Zeros above, below, left and right.
    batch : int
        Only its magnitude counts (powers of two up to the block's size): batches of 100 and 128 share a geometry.
    batch_innermost : bool
        Whether neighbouring lanes are images, not pixels of a row.

    Raises
    ------
    ValueError
        If the kernel does not fit into the padded input, or the planes are too large for 32-bit offsets.
    """
    return _conv_geometry(in_channels, out_channels, input_size, kernel_size, stride, padding, dilation,
                          batch_magnitude(batch), batch_innermost)


def batch_magnitude(batch: int) -> int:
    """The power of two up to the block's size that stands for a batch size in a geometry."""
    # by comparisons: under torch.compile they leave a variable batch size variable
    magnitude = 1
    while magnitude < batch and magnitude < BLOCK_LANES:
        magnitude *= 2
    return magnitude


@functools.lru_cache(maxsize=1024)
def _conv_geometry(
    in_channels: int,
    out_channels: int,
    input_size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    batch: int,
    batch_innermost: bool,
) -> Geometry:
    ys = _axis(input_size[0], kernel_size[0], stride[0], padding[:2], dilation[0])
    xs = _axis(input_size[1], kernel_size[1], stride[1], padding[2:], dilation[1])
    if ys.out < 1 or xs.out < 1:
        padded = (input_size[0] + padding[0] + padding[1], input_size[1] + padding[2] + padding[3])
        reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True))
        raise ValueError(f"the padded input ({padded[0]} x {padded[1]}) is smaller than the kernel "
                         f"({reach[0]} x {reach[1]}, dilation included)")
    pixels = ys.pitch * xs.pitch
    if batch_innermost:
        images = min(UNIT, max(16, batch))
        lane_b, lane_x, lane_y = 1, images, xs.pitch * images
    else:
        images = max(1, BLOCK_LANES // pixels)
        lane_b, lane_x, lane_y = pixels, 1, xs.pitch
    tap_shift = tuple(y * lane_y + x * lane_x for y in ys.tap_shift for x in xs.tap_shift)
    front = _round_up(max(tap_shift), UNIT)
    if not batch_innermost:
        # a block of twice the size where that saves a good part of the lanes
        if _pitch(front, 2 * images * pixels) < (2 - SAVED_LANES) * _pitch(front, images * pixels):
            images *= 2
        images = min(images, batch)
    pitch = _pitch(front, images * pixels)
    base = Grid(images, lane_b, lane_y, lane_x, 1, pitch, front, pitch)
    phases = len(ys.phases) * len(xs.phases)
    if max(in_channels * phases, out_channels) * pitch >= 2**31:
        raise ValueError(f"{max(in_channels * phases, out_channels)} planes of {pitch} lanes are more than 32-bit "
                         f"offsets reach; images of {input_size[0]} x {input_size[1]} are too large")
    views = []
    for i in range(len(ys.phases)):
        for j in range(len(xs.phases)):
            views += [(i * len(xs.phases) + j) * in_channels, in_channels,
                      ys.low[i] * lane_y + xs.low[j] * lane_x, ys.count[i], xs.count[j],
                      ys.first[i], xs.first[j], stride[0], stride[1]]
    return Geometry(
        input_grid=base.with_planes(in_channels * phases),
        output_grid=base.with_planes(out_channels),
        input_views=tuple(views),
        output_views=(0, out_channels, 0, ys.out, xs.out, 0, 0, 1, 1),
        output_size=(ys.out, xs.out),
        covers_input=ys.covered and xs.covered,
        in_channels=in_channels,
        tap_phase=tuple(y * len(xs.phases) + x for y in ys.tap_phase for x in xs.tap_phase),
        tap_shift=tap_shift,
        input_size=input_size,
        stride=stride,
        tap_offset=tuple((y * dilation[0] - padding[0], x * dilation[1] - padding[2])
                         for y in range(kernel_size[0]) for x in range(kernel_size[1])),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def embedded(inner: Geometry, outer: Geometry) -> Geometry | None:
    """A convolution's geometry on the packed input of another one, where each of its taps is one of the other's too.

    So a residual block's 1x1 convolution reads the input that was packed for the 3x3 one beside it.

    Parameters
    ----------
    inner, outer : Geometry

    Returns
    -------
    Geometry or None
        None where the other's input does not serve.
    """
    same = all(getattr(inner, name) == getattr(outer, name)
               for name in ("in_channels", "input_size", "stride", "output_size"))  # fmt: skip
    if inner is outer or not same or not set(inner.tap_offset) <= set(outer.tap_offset):
        return inner if inner is outer else None
    if inner.output_grid.planes * outer.output_grid.pitch >= 2**31:  # more than offsets reach
        return None
    taps = [outer.tap_offset.index(offset) for offset in inner.tap_offset]
    return replace(
        outer,
        output_grid=outer.output_grid.with_planes(inner.output_grid.planes),
        output_views=inner.output_views,
        tap_phase=tuple(outer.tap_phase[t] for t in taps),
        tap_shift=tuple(outer.tap_shift[t] for t in taps),
        tap_offset=inner.tap_offset,
    )


def linear_numbers(in_features: int, out_features: int) -> list[int]:
    """The arguments of `conv_geometry` for a linear layer, one after the other."""
    return [in_features, out_features, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, UNIT, 1]


@functools.lru_cache(maxsize=1024)
def linear_geometry(in_features: int, out_features: int) -> Geometry:
    """Geometry of a linear layer: images of one pixel, a block of 64 of them side by side."""
    return conv_geometry(in_features, out_features, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), UNIT, True)
