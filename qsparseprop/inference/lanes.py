"""Where the codes of a program lie: one set of lanes for each size of images.

All values with images of one size lie on the same lanes, and so do the outputs of products. A product of stride 1 then
reads what the one before has written, where it was written, and a residual is read lane by lane. Gaps between rows and
images are as wide as the widest window asks for; they hold the code of zero. For other strides the input is copied into
phases, on the lanes of the output.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from qsparseprop._kernels._plan import PlaneLayout
from qsparseprop.inference.program import Program
from qsparseprop.inference.steps import Product, Window
from qsparseprop.layout.geometry import BLOCK_LANES, UNIT, Grid, batch_magnitude, plane_pitch

__all__ = ["Lanes", "Taps", "find_lanes", "taps_of"]


class _Reach(NamedTuple):
    """Of one dimension: where each tap of a kernel reads, and which taps read nothing but padding."""

    size: int
    out: int
    stride: int
    #: Of each tap: which element of every `stride` ones, and how many of these the first output is away.
    phase: tuple[int, ...]
    shift: tuple[int, ...]

    def count(self, phase: int) -> int:
        """Elements of a phase."""
        return max(0, -(-(self.size - phase) // self.stride))

    def pitch(self) -> int:
        """Lanes from row to row, or rows from image to image, with which no tap reads a neighbour's elements."""
        least = max(self.size if self.stride == 1 else 1, self.out)
        for phase, shift in zip(self.phase, self.shift, strict=True):
            count = self.count(phase)
            least = max(least, count + max(0, -shift), self.out + max(0, shift), count)
        return least

    def reads(self, tap: int) -> bool:
        """Whether a tap reads an element for any output."""
        first = self.shift[tap]
        return max(first, 0) < min(first + self.out, self.count(self.phase[tap]))


def _reach(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> _Reach:
    places = [k * dilation - padding for k in range(kernel)]
    return _Reach(size, out, stride, tuple(p % stride for p in places), tuple(p // stride for p in places))


def _reaches(window: Window, image: tuple[int, int]) -> tuple[_Reach, _Reach]:
    out = window.output_size(image)
    before = window.padding[0], window.padding[2]
    down, across = (_reach(image[i], out[i], window.kernel[i], window.stride[i], before[i], window.dilation[i])
                    for i in range(2))  # fmt: skip
    return down, across


class Taps(NamedTuple):
    """How a convolution's window reads an input on the lanes of its output.

    Attributes
    ----------
    phases : tuple of (int, int)
        The phases that it reads, row and column of the first pixel; empty where it reads the input as it lies.
    kept : tuple of int
        The taps that read more than padding.
    phase, shift : tuple of int
        Of each of these.
    """

    phases: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]
    phase: tuple[int, ...]
    shift: tuple[int, ...]


@dataclass(frozen=True)
class Lanes:
    """Lanes of all images of one size.

    Parameters
    ----------
    image : (int, int)
        Height and width.
    rows, row : int
        Rows from image to image, and lanes from row to row.
    front : int
        Lanes before a plane's first one.
    images : int
        Of a block. Of images of one pixel those of a block are neighbours.
    """

    image: tuple[int, int]
    rows: int
    row: int
    front: int
    images: int

    def grid(self, planes: int) -> Grid:
        """The grid of so many planes."""
        if self.image == (1, 1):
            base = Grid(UNIT, 1, UNIT, UNIT, 1, UNIT, 0, UNIT)
        else:
            lanes = self.images * self.rows * self.row
            pitch = plane_pitch(self.front, lanes)
            base = Grid(self.images, self.rows * self.row, self.row, 1, 1, pitch, self.front, pitch)
        return base.with_planes(planes)

    def layout(self, channels: int) -> PlaneLayout:
        """Where values with images of this size lie."""
        height, width = self.image
        return PlaneLayout(self.grid(channels).numbers, (0, channels, 0, height, width, 0, 0, 1, 1), self.image)

    def phase_layout(self, channels: int, image: tuple[int, int], stride: tuple[int, int],
                     phases: Iterable[tuple[int, int]]) -> PlaneLayout:  # fmt: skip
        """Where phases of images of another size lie, one behind the other, on these lanes."""
        views: list[int] = []
        phases = tuple(phases)
        for i, (row, col) in enumerate(phases):
            rows, cols = (-(-(image[k] - first) // stride[k]) for k, first in ((0, row), (1, col)))
            views += [i * channels, channels, 0, rows, cols, row, col, *stride]
        return PlaneLayout(self.grid(channels * len(phases)).numbers, tuple(views), image)


def taps_of(
    window: Window, image: tuple[int, int], lanes: Lanes, shared: Iterable[tuple[int, int]] = ()
) -> Taps:
    """How a window reads images of a size, on the lanes of the output.

    Parameters
    ----------
    window : Window
    image : (int, int)
        Of the input.
    lanes : Lanes
        Of the output.
    shared : iterable of (int, int)
        Phases that are there anyway, for other windows.

    Returns
    -------
    Taps
    """
    down, across = _reaches(window, image)
    taps = list(itertools.product(range(window.kernel[0]), range(window.kernel[1])))
    kept = tuple(i for i, (y, x) in enumerate(taps) if down.reads(y) and across.reads(x))
    where = [(down.phase[taps[i][0]], across.phase[taps[i][1]]) for i in kept]
    shift = tuple(down.shift[taps[i][0]] * lanes.row + across.shift[taps[i][1]] for i in kept)
    direct = window.stride == (1, 1) and image == lanes.image
    # of a window that sees nothing but padding one tap is left, without weights
    phases = tuple(sorted({*where, *shared})) or ((0, 0),)
    return Taps(() if direct else phases, kept, tuple(phases.index(p) for p in where) or (0,), shift or (0,))


def find_lanes(program: Program, batch: int) -> dict[tuple[int, int], Lanes]:
    """The lanes of each size of images that codes of a program have.

    Parameters
    ----------
    program : Program
    batch : int
        Images of a call.

    Returns
    -------
    dict
        By height and width.

    Raises
    ------
    ValueError
        If images are too large for offsets of 32 bits.
    """
    pitches: dict[tuple[int, int], tuple[int, int]] = {}
    shifts: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def widen(image: tuple[int, int], rows: int, row: int) -> None:
        had = pitches.get(image, (1, 1))
        pitches[image] = max(had[0], rows), max(had[1], row)

    for value in program.values.values():
        if value.codes is not None:
            widen(value.image, *value.image)
    for step in program.steps:
        if isinstance(step, Product):
            image = program.values[step.inputs[0]].image
            down, across = _reaches(step.window, image)
            out = down.out, across.out
            widen(out, down.pitch(), across.pitch())
            shifts.setdefault(out, []).extend(itertools.product(down.shift, across.shift))
    found = {}
    for image, (rows, row) in pitches.items():
        reach = max((abs(y * row + x) for y, x in shifts.get(image, ())), default=0)
        front = -(-reach // UNIT) * UNIT
        # by magnitudes, so that batches of many sizes have the same lanes
        most = batch * max(v.rows for v in program.values.values() if v.codes is not None)
        images = max(1, min(BLOCK_LANES // (rows * row), batch_magnitude(most)))
        lanes = Lanes(image, rows, row, front, images)
        channels = max(v.shape[0] for v in program.values.values() if v.codes is not None)
        if lanes.grid(1).pitch * channels * math.prod(_most_phases(program)) >= 2**31:
            raise ValueError(f"images of {image[0]} x {image[1]} with {channels} channels are more than offsets of 32 "
                             "bits reach")
        found[image] = lanes
    return found


def _most_phases(program: Program) -> tuple[int, int]:
    """The largest stride of a product."""
    strides = [step.window.stride for step in program.steps if isinstance(step, Product)]
    return max((s[0] for s in strides), default=1), max((s[1] for s in strides), default=1)
