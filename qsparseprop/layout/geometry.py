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

Volumes (depth, height, width) are images whose slices lie below each other, in memory and, with gaps between them, in
the lanes: depth is only another shift of the taps, and a view is one slice. A transposed convolution is the convolution
with the same weight the other way round; see `Geometry.transposed`.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

from qsparseprop._kernels._plan import PlaneLayout

__all__ = ["BLOCK_LANES", "SAVED_LANES", "UNIT", "ConvSizes", "Geometry", "Grid", "batch_magnitude", "conv_geometry",
           "embedded", "linear_geometry", "linear_numbers", "prefer_batch_innermost"]  # fmt: skip

_Size = tuple[int, ...]
#: Channels of the input and of the output, the input's size, that of the kernel, stride, padding and dilation.
ConvSizes = tuple[int, int, _Size, _Size, _Size, _Size, _Size]

#: Lanes that a kernel works on at a time.
UNIT = 64
#: Nonzeros that the kernels take at a time; rows of lists are padded to it.
GROUP = 4
#: Lanes of a plane of one block to aim for: enough to amortise its gaps, few enough to stay near the cache. Where one
#: of twice the size has a good deal fewer gaps, see SAVED_LANES, it is that.
BLOCK_LANES = 1024
#: Part of the lanes of a block that must be saved for blocks to be made twice as large.
SAVED_LANES = 0.1
#: Taps of a kernel and views of an image that are listed one by one, at most: what has more asks for gigabytes and
#: minutes before anybody can say that it fits nothing.
MOST_LISTED = 1 << 22


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def plane_pitch(front: int, lanes: int) -> int:
    """Lanes from plane to plane, for planes of so many with so many before the first one."""
    pitch = front + _round_up(lanes, UNIT)
    # an odd number of cache lines spreads the planes over the cache's sets
    return pitch | UNIT if pitch > UNIT else pitch


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
        """The grid as `PlaneLayout` takes it."""
        return self.images, self.lane_b, self.lane_y, self.lane_x, self.planes, self.pitch, self.front, self.block

    def lanes(self, images: int) -> int:
        """Size of the buffer for a batch: whole blocks, and what the kernels read past the last one."""
        return -(-images // self.images) * self.block + self.front + UNIT

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
    stride: int
    pitch: int
    phases: tuple[int, ...]  # those that a tap reads
    low: tuple[int, ...]
    count: tuple[int, ...]  # elements of each phase
    first: tuple[int, ...]  # coordinate of its first element
    tap_phase: tuple[int, ...]  # per tap: place in `phases`
    tap_shift: tuple[int, ...]
    covered: bool  # whether the phases hold the whole input


def _axis(size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int, complete: bool) -> _Axis:
    """One dimension; `complete`: also with the phases that no tap reads."""
    before, after = padding
    out = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    taps = [k * dilation for k in range(kernel)]
    phases = tuple(range(stride)) if complete else tuple(sorted({t % stride for t in taps}))
    low, count, first = [], [], []
    pitch = max(out, 1)
    for f in phases:
        lo = max(0, -((f - before) // stride))
        hi = max(lo, -((f - before - size) // stride))
        reach = max((t // stride for t in taps if t % stride == f), default=0)
        low.append(lo)
        count.append(hi - lo)
        first.append(f + stride * lo - before)
        pitch = max(pitch, hi, out + reach - lo)
    return _Axis(size, out, stride, pitch, phases, tuple(low), tuple(count), tuple(first),
                 tuple(phases.index(t % stride) for t in taps), tuple(t // stride for t in taps), sum(count) == size)


@dataclass(frozen=True, eq=False)  # compared by identity: conv_geometry returns the same one for the same arguments
class Geometry:
    """Where everything of one layer lies for one input size.

    Attributes
    ----------
    input_grid, output_grid : Grid
        The same lanes, for the planes of the input (channels x phases) and of the output (channels).
    input_views, output_views : tuple of int
        Nine numbers a view, as `PlaneLayout` takes them.
    output_size : tuple of int
        Height and width of the output, or depth, height and width.
    covers_input : bool
        Whether every input pixel lies in some view; the gradient of the others is zero.
    numbers : tuple of int
        The arguments of `conv_geometry`, one after the other; the last one only where it is true.
    transposed : bool
        Whether the layer is the transposed convolution: its input is what is called the output here, and the other
        way round. All phases have views, since pixels that no tap reaches get the bias.
    """

    input_grid: Grid
    output_grid: Grid
    input_views: tuple[int, ...]
    output_views: tuple[int, ...]
    output_size: tuple[int, ...]
    covers_input: bool
    in_channels: int
    tap_phase: tuple[int, ...]
    tap_shift: tuple[int, ...]
    input_size: tuple[int, ...]
    stride: tuple[int, ...]
    #: Row and column of the input that a tap reads for the output's first pixel; negative in the padding.
    tap_offset: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]
    transposed: bool = False

    @functools.cached_property
    def input_image(self) -> tuple[int, int]:
        """Height and width of the input's tensor, in which the slices of a volume lie below each other."""
        return math.prod(self.input_size[:-1]), self.input_size[-1]

    @functools.cached_property
    def output_image(self) -> tuple[int, int]:
        """The same of the output."""
        return math.prod(self.output_size[:-1]), self.output_size[-1]

    @functools.cached_property
    def input_layout(self) -> PlaneLayout:
        """Where the elements of the input lie, as the kernels take it."""
        return PlaneLayout(self.input_grid.numbers, self.input_views, self.input_image)

    @functools.cached_property
    def output_layout(self) -> PlaneLayout:
        """The same of the output."""
        return PlaneLayout(self.output_grid.numbers, self.output_views, self.output_image)


def prefer_batch_innermost(batch: int, input_size: tuple[int, ...], channels_last: bool) -> bool:
    """Whether neighbouring lanes had better be images than pixels.

    Images side by side waste no lanes on padding and keep every load aligned, which counts for small images. But a run
    of them is far apart in memory: where neighbours in memory are the pixels of a row, collecting it is slow; where
    they are channels it makes no difference, unless images are so large that a power of two of bytes lies between two,
    of which the caches hold only a few.
    """
    pixels = math.prod(input_size)
    if channels_last:
        return (batch >= UNIT and pixels <= 256) or (batch >= 16 and pixels <= 64)
    return batch >= UNIT and pixels <= 64


def conv_geometry(
    in_channels: int,
    out_channels: int,
    input_size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    batch: int,
    batch_innermost: bool,
    transposed: bool = False,
) -> Geometry:
    """Geometry of a convolution.

    Parameters
    ----------
    in_channels, out_channels : int
    input_size, kernel_size, stride, dilation : tuple of int
        Height and width, or depth, height and width.
    padding : tuple of int
        Zeros above, below, left and right; those before and behind come first. Fewer than none cut off.
    batch : int
        Only its magnitude counts (powers of two up to the block's size): batches of 100 and 128 share a geometry.
    batch_innermost : bool
        Whether neighbouring lanes are images, not pixels of a row.
    transposed : bool
        For the transposed convolution; everything else is said of the convolution that it transposes.

    Raises
    ------
    ValueError
        If the kernel does not fit into the padded input, the planes are too large for 32-bit offsets, or there are more
        taps or views than are listed.
    """
    sizes = in_channels, out_channels, input_size, kernel_size, stride, padding, dilation
    return _conv_geometry(sizes, batch_magnitude(batch), batch_innermost, transposed)


def batch_magnitude(batch: int) -> int:
    """The power of two up to the block's size that stands for a batch size in a geometry."""
    # by comparisons: under torch.compile they leave a variable batch size variable
    magnitude = 1
    while magnitude < batch and magnitude < BLOCK_LANES:
        magnitude *= 2
    return magnitude


def _too_small(
    input_size: tuple[int, ...], kernel_size: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> ValueError:
    padded = (n + p + q for n, p, q in zip(input_size, padding[::2], padding[1::2], strict=True))
    reach = (d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True))
    return ValueError(f"the padded input ({' x '.join(map(str, padded))}) is smaller than the kernel "
                      f"({' x '.join(map(str, reach))}, dilation included)")


def _check_sizes(sizes: ConvSizes, transposed: bool) -> None:
    """Refuse what has no geometry, before anything is made that is as large as these numbers."""
    _, _, input_size, kernel_size, stride, padding, dilation = sizes
    if min(*kernel_size, *stride, *dilation) < 1:
        raise ValueError("kernel size, stride and dilation must be at least 1, got "
                         f"{kernel_size}, {stride} and {dilation}")  # fmt: skip
    padded = [n + p + q for n, p, q in zip(input_size, padding[::2], padding[1::2], strict=True)]
    if any(n <= d * (k - 1) for n, d, k in zip(padded, dilation, kernel_size, strict=True)):
        raise _too_small(input_size, kernel_size, padding, dilation)
    views = math.prod(stride if transposed else map(min, stride, kernel_size)) * math.prod(padded[:-2])
    if max(math.prod(kernel_size), views) > MOST_LISTED:
        kernel, step, image = (" x ".join(map(str, numbers)) for numbers in (kernel_size, stride, input_size))
        raise ValueError(f"a kernel of {kernel} with stride {step} on an input of {image} has more than {MOST_LISTED} "
                         "taps or views")  # fmt: skip


def _input_views(channels: int, axes: tuple[_Axis, _Axis, _Axis], lanes: tuple[int, int, int]) -> tuple[int, ...]:
    """Where the phases lie in the input: a view for each, and each of its slices."""
    (zs, ys, xs), (lane_z, lane_y, lane_x) = axes, lanes
    views: list[int] = []
    plane = 0
    for h, i, j in itertools.product(range(len(zs.phases)), range(len(ys.phases)), range(len(xs.phases))):
        for k in range(max(zs.count[h], 1)):  # without slices an empty view stands for the planes
            rows = ys.count[i] if zs.count[h] else 0
            first = (zs.first[h] + k * zs.stride) * ys.size if rows else 0
            views += [plane, channels, (zs.low[h] + k) * lane_z + ys.low[i] * lane_y + xs.low[j] * lane_x,
                      rows, xs.count[j], first + ys.first[i], xs.first[j], ys.stride, xs.stride]  # fmt: skip
        plane += channels
    return tuple(views)


@functools.lru_cache(maxsize=1024)
def _conv_geometry(sizes: ConvSizes, batch: int, batch_innermost: bool, transposed: bool) -> Geometry:
    """`conv_geometry` for the magnitude of a batch."""
    _check_sizes(sizes, transposed)
    in_channels, out_channels, input_size, kernel_size, stride, padding, dilation = sizes
    axes = [_axis(n, k, s, (p, q), d, transposed) for n, k, s, p, q, d in
            zip(input_size, kernel_size, stride, padding[::2], padding[1::2], dilation, strict=True)]  # fmt: skip
    output_size = tuple(axis.out for axis in axes)
    zs, ys, xs = axes if len(axes) == 3 else (_axis(1, 1, 1, (0, 0), 1, False), *axes)
    pixels = zs.pitch * ys.pitch * xs.pitch
    images = min(UNIT, max(16, batch)) if batch_innermost else max(1, BLOCK_LANES // pixels)
    lane_b, lane_x = (1, images) if batch_innermost else (pixels, 1)
    lane_y = xs.pitch * lane_x
    lane_z = ys.pitch * lane_y
    tap_shift = tuple(z * lane_z + y * lane_y + x * lane_x
                      for z in zs.tap_shift for y in ys.tap_shift for x in xs.tap_shift)  # fmt: skip
    front = _round_up(max(tap_shift), UNIT)
    if not batch_innermost:
        # a block of twice the size where that saves a good part of the lanes
        if plane_pitch(front, 2 * images * pixels) < (2 - SAVED_LANES) * plane_pitch(front, images * pixels):
            images *= 2
        images = min(images, batch)
    pitch = plane_pitch(front, images * pixels)
    base = Grid(images, lane_b, lane_y, lane_x, 1, pitch, front, pitch)
    phases = len(zs.phases) * len(ys.phases) * len(xs.phases)
    if max(in_channels * phases, out_channels) * pitch >= 2**31:
        raise ValueError(f"{max(in_channels * phases, out_channels)} planes of {pitch} lanes are more than 32-bit "
                         f"offsets reach; images of {' x '.join(map(str, input_size))} are too large")
    output_views = [n for k in range(zs.out)
                    for n in (0, out_channels, k * lane_z, ys.out, xs.out, k * ys.out, 0, 1, 1)]  # fmt: skip
    return Geometry(
        input_grid=base.with_planes(in_channels * phases),
        output_grid=base.with_planes(out_channels),
        input_views=_input_views(in_channels, (zs, ys, xs), (lane_z, lane_y, lane_x)),
        output_views=tuple(output_views),
        output_size=output_size,
        covers_input=all(axis.covered for axis in axes),
        in_channels=in_channels,
        tap_phase=tuple((z * len(ys.phases) + y) * len(xs.phases) + x
                        for z in zs.tap_phase for y in ys.tap_phase for x in xs.tap_phase),
        tap_shift=tap_shift,
        input_size=input_size,
        stride=stride,
        tap_offset=tuple(itertools.product(*([k * d - p for k in range(n)] for n, d, p in
                                             zip(kernel_size, dilation, padding[::2], strict=True)))),
        numbers=(in_channels, out_channels, *input_size, *kernel_size, *stride, *padding, *dilation, batch,
                 int(batch_innermost), *[1] * transposed),
        transposed=transposed,
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
        numbers=inner.numbers,
        tap_phase=tuple(outer.tap_phase[t] for t in taps),
        tap_shift=tuple(outer.tap_shift[t] for t in taps),
        tap_offset=inner.tap_offset,
    )


def linear_numbers(in_features: int, out_features: int) -> list[int]:
    """The arguments of `conv_geometry` for a linear layer, one after the other."""
    return [in_features, out_features, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, UNIT, 1]


@functools.lru_cache(maxsize=1024)
def linear_geometry(in_features: int, out_features: int, transposed: bool = False) -> Geometry:
    """Geometry of a linear layer: images of one pixel, a block of 64 of them side by side.

    `transposed` is one whose weight is stored the other way round, (in_features, out_features); the arguments then are
    those of the layer that it transposes.
    """
    return conv_geometry(in_features, out_features, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), UNIT, True,
                         transposed)
