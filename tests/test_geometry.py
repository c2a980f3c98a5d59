"""A kernel tap is one offset, the same for every lane: shown by looking up what lies at every address it reads."""

import dataclasses
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparseprop.layout.geometry import UNIT, Geometry, Grid, conv_geometry, linear_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import make_plan

from ._helpers import conv_cases, examples

pytestmark = pytest.mark.usefixtures("one_thread")


def _blocks(grid: Grid, images: int) -> torch.Tensor:
    """Lane of the first pixel of each image, planes and front not included."""
    b = torch.arange(images)
    return b // grid.images * grid.block + b % grid.images * grid.lane_b


def _pixels(grid: Grid, rows: int, cols: int) -> torch.Tensor:
    return torch.arange(rows)[:, None] * grid.lane_y + torch.arange(cols) * grid.lane_x


def _nine(views: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return zip(*[iter(views)] * 9, strict=True)


def _owners(grid: Grid, views: tuple[int, ...], shape: tuple[int, int, int, int]) -> torch.Tensor:
    """For each lane of the buffer the flat index of the element that it holds, -1 in gaps."""
    images, channels, height, width = shape
    elements = torch.arange(images * channels * height * width).view(shape)
    owner = torch.full((grid.lanes(images),), -1)
    for plane, count, origin, rows, cols, y0, x0, ystep, xstep in _nine(views):
        assert count == channels
        assert 0 <= plane <= grid.planes - count
        if rows == 0 or cols == 0:
            continue
        assert origin >= 0
        inside = grid.front + origin + min(images, grid.images) * grid.lane_b - grid.lane_b
        inside += (rows - 1) * grid.lane_y + (cols - 1) * grid.lane_x
        assert inside < grid.pitch, "the view leaves its planes"
        ys, xs = y0 + ystep * torch.arange(rows), x0 + xstep * torch.arange(cols)
        assert y0 >= 0
        assert ys[-1] < height
        assert x0 >= 0
        assert xs[-1] < width
        planes = (plane + torch.arange(count)) * grid.pitch + grid.front + origin
        lane = _blocks(grid, images)[:, None, None, None] + planes[:, None, None] + _pixels(grid, rows, cols)
        assert lane.unique().numel() == lane.numel(), "two pixels of a view share a lane"
        assert (owner[lane] == -1).all(), "two views share a lane"
        owner[lane] = elements[:, :, ys[:, None], xs]
    return owner


def _units_end(grid: Grid, views: tuple[int, ...], images: int) -> int:
    """Lanes from an offset to behind the last unit that any view of a block reads or writes."""
    n = min(images, grid.images)
    ends = [0]
    for _, _, origin, rows, cols, *_ in _nine(views):
        if rows and cols:
            span = (n - 1) * grid.lane_b + (rows - 1) * grid.lane_y + (cols - 1) * grid.lane_x + 1
            ends.append(origin + -(-span // UNIT) * UNIT)
    return max(ends)


def _check_grid(grid: Grid) -> None:
    assert grid.front % UNIT == 0
    assert grid.pitch % UNIT == 0
    assert grid.block % UNIT == 0
    assert grid.block >= grid.planes * grid.pitch
    assert grid.pitch > grid.front >= 0
    assert grid.numbers == (grid.images, grid.lane_b, grid.lane_y, grid.lane_x, grid.planes, grid.pitch, grid.front,
                            grid.block)


def _check(g: Geometry, case, batch: int) -> None:
    x, y = g.input_grid, g.output_grid
    _check_grid(x)
    _check_grid(y)
    # one numbering of lanes for both sides
    assert dataclasses.replace(x, planes=y.planes, block=y.block) == y
    out_shape = (batch, case.out_channels, *g.output_size)
    in_shape = (batch, case.in_channels, *case.size)
    x_owner = _owners(x, g.input_views, in_shape)
    y_owner = _owners(y, g.output_views, out_shape)
    assert (y_owner >= 0).sum() == torch.Size(out_shape).numel(), "an output pixel has no lane"
    assert ((x_owner >= 0).sum() == torch.Size(in_shape).numel()) == g.covers_input

    taps = list(itertools.product(range(case.kernel[0]), range(case.kernel[1])))
    assert len(taps) == len(g.tap_shift) == len(g.tap_phase)
    height, width = case.size
    image, channel = torch.arange(batch)[:, None, None, None], torch.arange(case.in_channels)[:, None, None]
    row = torch.arange(case.out_channels)[:, None, None]
    read = torch.zeros_like(x_owner, dtype=torch.bool)
    for (ky, kx), shift, phase in zip(taps, g.tap_shift, g.tap_phase, strict=True):
        # forward: the input pixel that belongs to each output pixel, or a gap where that is padding
        iy = (torch.arange(g.output_size[0]) * case.stride[0] - case.pads[0] + ky * case.dilation[0])[:, None]
        ix = torch.arange(g.output_size[1]) * case.stride[1] - case.pads[2] + kx * case.dilation[1]
        exists = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        wanted = torch.where(exists, ((image * case.in_channels + channel) * height + iy) * width + ix, -1)
        plane = (phase * case.in_channels + channel) * x.pitch + x.front
        lane = _blocks(x, batch)[:, None, None, None] + plane + shift + _pixels(x, *g.output_size)
        assert torch.equal(x_owner[lane], wanted)
        read[lane] = True

        # backward: the output pixel to which each input pixel of the tap's phase contributes, or a gap
        plane, _, origin, rows, cols, y0, x0, ystep, xstep = g.input_views[9 * phase : 9 * phase + 9]
        assert plane == phase * case.in_channels
        if rows == 0 or cols == 0:
            continue
        oy = ((y0 + ystep * torch.arange(rows)) + case.pads[0] - ky * case.dilation[0])[:, None]
        ox = (x0 + xstep * torch.arange(cols)) + case.pads[2] - kx * case.dilation[1]
        assert (oy % case.stride[0] == 0).all(), "the phase holds rows that the tap does not touch"
        assert (ox % case.stride[1] == 0).all(), "the phase holds columns that the tap does not touch"
        oy, ox = oy // case.stride[0], ox // case.stride[1]
        exists = (oy >= 0) & (oy < g.output_size[0]) & (ox >= 0) & (ox < g.output_size[1])
        wanted = ((image * case.out_channels + row) * g.output_size[0] + oy) * g.output_size[1] + ox
        inside = row * y.pitch + y.front - shift + origin + _pixels(y, rows, cols)
        assert (inside >= 0).all(), "a lane before the first plane"
        lane = _blocks(y, batch)[:, None, None, None] + inside
        assert torch.equal(y_owner[lane], torch.where(exists, wanted, -1))
    # a phase that no tap reads would be packed for nothing
    assert set(g.tap_phase) == set(range(len(g.input_views) // 9))

    # whole units are read, also where the view ends within one
    blocks = -(-batch // x.images)
    last = max((phase * case.in_channels + case.in_channels - 1) * x.pitch + x.front + shift
               for shift, phase in zip(g.tap_shift, g.tap_phase, strict=True))
    assert (blocks - 1) * x.block + last + _units_end(x, g.output_views, batch) <= x.lanes(batch)
    last = (case.out_channels - 1) * y.pitch + y.front
    assert (blocks - 1) * y.block + last + _units_end(y, g.input_views, batch) <= y.lanes(batch)
    # the weight gradient multiplies whole units: what follows the view must still be the plane's own gap
    assert y.front + _units_end(y, g.output_views, batch) <= y.pitch
    assert max(x.planes * x.pitch, y.planes * y.pitch) < 2**31


@given(case=conv_cases(most_channels=3), other=st.integers(1, 70))
@examples(250)
def test_every_tap_finds_its_pixel_in_both_directions(case, other):
    g = case.geometry()
    out = [(n + p + q - d * (k - 1) - 1) // s + 1
           for n, p, q, d, k, s in zip(case.size, case.pads[::2], case.pads[1::2], case.dilation, case.kernel,
                                       case.stride, strict=True)]
    assert g.output_size == tuple(out)
    _check(g, case, case.batch)
    _check(g, case, min(other, 2 * case.batch))  # only the magnitude of the batch counts


@given(case=conv_cases(most_channels=2), pads=st.tuples(*[st.integers(0, 4)] * 4))
@examples(100)
def test_padding_may_differ_on_every_side(case, pads):
    padded = SimpleNamespace(**{**vars(case), "pads": pads})
    reach = [d * (k - 1) + 1 for d, k in zip(case.dilation, case.kernel, strict=True)]
    padded.size = tuple(max(n, r - p - q, 1)
                        for n, r, p, q in zip(case.size, reach, pads[::2], pads[1::2], strict=True))
    g = conv_geometry(case.in_channels, case.out_channels, padded.size, case.kernel, case.stride, pads, case.dilation,
                      case.batch, bool(case.batch_innermost))
    _check(g, padded, min(case.batch, 7))


@pytest.mark.parametrize("batch_innermost", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (7, 2)])
def test_strides_larger_than_the_kernel_and_the_image(kernel, batch_innermost):
    case = SimpleNamespace(in_channels=2, out_channels=3, size=(9, 8), kernel=kernel, stride=(5, 11), dilation=(1, 1),
                           pads=(1, 0, 0, 1))
    g = conv_geometry(2, 3, case.size, kernel, case.stride, case.pads, case.dilation, 5, batch_innermost)
    _check(g, case, 5)
    assert not g.covers_input


@pytest.mark.parametrize("features", [(1, 1), (3, 70), (130, 2)])
@pytest.mark.parametrize("batch", [1, 63, 64, 65, 200])
def test_linear_is_a_convolution_of_single_pixels(features, batch):
    one = (1, 1)
    case = SimpleNamespace(in_channels=features[0], out_channels=features[1], size=one, kernel=one, stride=one,
                           dilation=one, pads=(0, 0, 0, 0))
    g = linear_geometry(*features)
    assert g.output_size == (1, 1)
    assert g.input_grid.lane_b == 1, "neighbouring lanes are images"
    _check(g, case, batch)


@given(case=conv_cases(most_channels=3))
@examples(60)
def test_lists_of_a_full_weight_stay_within_the_planes(case):
    g = case.geometry()
    mask = torch.ones(case.out_channels, case.in_channels // case.groups * len(g.tap_shift), dtype=torch.bool)
    plan = make_plan(*dense_pattern(mask)[:2], g, case.groups)
    sides = ((plan.forward, g.input_grid, g.output_views), (plan.backward, g.output_grid, g.input_views))
    for rows, grid, views in sides:
        assert rows.offset.min() >= 0
        assert int(rows.offset.max()) + _units_end(grid, views, grid.images) <= grid.lanes(1)
        inside = rows.offset - rows.plane * grid.pitch
        assert (inside >= 0).all()
        assert (inside < grid.pitch + grid.front).all(), "beyond the gap before the next plane"


def test_batches_of_one_magnitude_share_a_geometry():
    arguments = (3, 4, (8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    assert conv_geometry(*arguments, 100, False) is conv_geometry(*arguments, 128, False)
    assert conv_geometry(*arguments, 64, False) is not conv_geometry(*arguments, 1, False)
    assert linear_geometry(5, 6) is linear_geometry(5, 6)


@pytest.mark.parametrize(
    ("size", "kernel", "pads", "dilation", "given", "wanted"),
    [
        ((2, 9), (3, 3), (0, 0, 0, 0), (1, 1), "2 x 9", "3 x 3"),
        ((9, 4), (3, 3), (0, 0, 0, 0), (1, 2), "9 x 4", "3 x 5"),
        ((3, 3), (7, 1), (1, 2, 0, 0), (1, 1), "6 x 3", "7 x 1"),
        ((0, 5), (1, 1), (0, 0, 0, 0), (1, 1), "0 x 5", "1 x 1"),
    ],
)
def test_a_kernel_that_does_not_fit_is_an_error(size, kernel, pads, dilation, given, wanted):
    with pytest.raises(ValueError, match="smaller than the kernel") as error:
        conv_geometry(2, 2, size, kernel, (1, 1), pads, dilation, 4, False)
    assert given in str(error.value)
    assert wanted in str(error.value)


@pytest.mark.parametrize("channels", [(1, 1), (8, 1), (1, 8)])
def test_planes_beyond_32_bit_offsets_are_an_error(channels):
    side = 50_000 if channels == (1, 1) else 20_000
    with pytest.raises(ValueError, match=f"32-bit.*{side} x {side}"):
        conv_geometry(*channels, (side, side), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, False)


@pytest.mark.parametrize(("sizes", "transposed", "sentence"), [
    (((1 << 40, 4), (1 << 39, 1), (1, 1), (0, 0, 0, 0), (1, 1)), False, "taps or views"),
    (((1 << 12, 1 << 12), (1 << 12, 1 << 12), (1, 1), (0, 0, 0, 0), (1, 1)), False, "taps or views"),
    (((9, 9), (3, 3), (1 << 31, 1), (0, 0, 0, 0), (1, 1)), True, "taps or views"),
    (((1 << 31, 9, 9), (1, 3, 3), (1, 1, 1), (0,) * 6, (1, 1, 1)), False, "taps or views"),
    (((9, 9), (3, 3), (0, 1), (0, 0, 0, 0), (1, 1)), False, "at least 1"),
    (((9, 9), (3, -3), (1, 1), (0, 0, 0, 0), (1, 1)), False, "at least 1"),
    (((4, 1), (1 << 39, 1), (1, 1), (0, 0, 0, 0), (1, 1)), False, "smaller than the kernel"),
])  # fmt: skip
def test_what_is_too_large_is_refused_before_it_is_listed(sizes, transposed, sentence):
    """Operators take these numbers from anybody."""
    with pytest.raises(ValueError, match=sentence):
        conv_geometry(4, 6, *sizes, 3, False, transposed)


def test_strides_beyond_the_kernel_stay_allowed():
    assert conv_geometry(4, 6, (9, 9), (3, 3), (1 << 31, 1), (0, 0, 0, 0), (1, 1), 3, False).output_size == (1, 7)
