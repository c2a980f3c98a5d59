"""Weights of programs as the kernels walk them, made once for all batch sizes on whose lanes they are the same."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from qsparseprop._kernels import _dispatch
from qsparseprop._kernels._dense_rows import DenseRows
from qsparseprop._kernels._frozen_product import ProductWeights
from qsparseprop._kernels._frozen_tokens import TokenWeights, block_shape
from qsparseprop._kernels._gather_list import PatternList
from qsparseprop._kernels._plan import PlaneLayout, ProductRows, ValuePattern
from qsparseprop.inference.lanes import Taps
from qsparseprop.inference.steps import Product, Value, Weight
from qsparseprop.layout.costs import machine_costs
from qsparseprop.layout.modes import forced_modes

__all__ = ["WeightStore", "token_slots"]

#: Slots of a row in a step of a product with few tokens.
_SLOTS = _dispatch.group


class _Weight(NamedTuple):
    """A weight as its product reads it."""

    crow: Tensor
    col: Tensor
    codes: Tensor
    columns: int


def _selected(step: Product, column: Tensor, kept: Tensor, columns: int) -> _Weight:
    """The nonzeros that are kept, in other columns; these ascend as before in each row."""
    counts = step.weight.crow_indices.diff().long()
    row = torch.arange(step.weight.rows).repeat_interleave(counts)[kept]
    crow = torch.zeros(step.weight.rows + 1, dtype=torch.int32)
    crow[1:] = torch.bincount(row, minlength=step.weight.rows).cumsum(0)
    return _Weight(crow, column[kept].to(torch.int32), step.weight.codes[kept], columns)


def _kept_weight(step: Product, taps: Taps) -> _Weight:
    """Without the taps that read nothing but padding."""
    size = math.prod(step.window.kernel)
    weight = step.weight
    if len(taps.kept) == size:
        return _Weight(weight.crow_indices, weight.col_indices, weight.codes, weight.columns)
    place = torch.full((size,), -1)
    place[list(taps.kept)] = torch.arange(len(taps.kept))
    col = weight.col_indices.long()
    tap = place[col % size]
    return _selected(step, col // size * len(taps.shift) + tap, tap >= 0, weight.columns // size * len(taps.shift))


def _flat_weight(step: Product, source: Value) -> _Weight:
    """Of a window with one output pixel, over the pixels of an image one behind the other."""
    (height, width), window, weight = source.image, step.window, step.weight
    size = math.prod(window.kernel)
    col = weight.col_indices.long()
    tap = col % size
    y = tap // window.kernel[1] * window.dilation[0] - window.padding[0]
    x = tap % window.kernel[1] * window.dilation[1] - window.padding[2]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return _selected(step, (col // size * height + y) * width + x, inside, weight.columns // size * height * width)


def _rows(weight: _Weight, step: Product, taps: Taps | None, source: PlaneLayout, target: PlaneLayout) -> ProductRows:
    """A weight as the list or the dense rows that the kernels walk, whichever is faster."""
    pattern = ValuePattern(weight.crow, weight.col, weight.columns)
    phase, shift = ((0,), (0,)) if taps is None else (taps.phase, taps.shift)
    kind: type[PatternList] | type[DenseRows] = DenseRows if _is_dense(pattern, step.groups) else PatternList
    return kind(pattern, step.groups, phase, shift, source, target, False)


def _is_dense(pattern: ValuePattern, groups: int) -> bool:
    forced = forced_modes()
    if not pattern.count:
        return False
    if forced is not None:
        return forced.forward == "dense"
    costs = machine_costs(_dispatch.active_isa())
    dense = pattern.rows * pattern.columns * costs.spmm_dense + groups * pattern.columns * costs.interleave
    return dense < pattern.count * costs.spmm_list


def token_slots(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """A weight as `TokenProductStep` walks it.

    Parameters
    ----------
    weight : Weight

    Returns
    -------
    step_ptr, place, code : Tensor
        int32, (blocks of rows * blocks of columns + 1,); uint8 and int8, (steps * 64,).
    """
    height, width = block_shape()
    blocks, across = -(-weight.rows // height), -(-weight.columns // width)
    row = torch.arange(weight.rows).repeat_interleave(weight.crow_indices.diff().long())
    col = weight.col_indices.long()
    # nonzeros of a row in a block follow each other
    place = row * across + col // width
    counts = torch.bincount(place, minlength=blocks * height * across)
    first = counts.cumsum(0) - counts
    number = torch.arange(len(col)) - first[place]
    steps = -(-counts.view(blocks, height, across).amax(1) // _SLOTS)
    step_ptr = torch.zeros(blocks * across + 1, dtype=torch.int64)
    step_ptr[1:] = steps.view(-1).cumsum(0)
    step = step_ptr[row // height * across + col // width] + number // _SLOTS
    slot = (step * height + row % height) * _SLOTS + number % _SLOTS
    places = torch.zeros(int(step_ptr[-1]) * height * _SLOTS, dtype=torch.uint8)
    codes = torch.zeros_like(places, dtype=torch.int8)
    places[slot], codes[slot] = (col % width).to(torch.uint8), weight.codes
    return step_ptr.to(torch.int32), places, codes


class WeightStore:
    """The weights of a program's products in the forms that were asked for."""

    def __init__(self) -> None:
        self._planes: dict[tuple[int, str, PlaneLayout, PlaneLayout], ProductWeights] = {}
        self._tokens: dict[int, TokenWeights] = {}
        self._lock = threading.Lock()

    def of_planes(
        self, step: Product, source: Value, taps: Taps | None, layouts: tuple[PlaneLayout, PlaneLayout]
    ) -> ProductWeights:
        """The weight of a product from planes to planes.

        Parameters
        ----------
        step : Product
        source : Value
            That it reads.
        taps : Taps, optional
            How its window reads; None of features.
        layouts : (PlaneLayout, PlaneLayout)
            Of input and output.

        Returns
        -------
        ProductWeights
        """
        key = id(step), _dispatch.active_isa(), *layouts
        with self._lock:
            if key not in self._planes:
                weight = _flat_weight(step, source) if taps is None else _kept_weight(step, taps)
                self._planes[key] = ProductWeights(_rows(weight, step, taps, *layouts), weight.codes)
            return self._planes[key]

    def of_tokens(self, step: Product, zero: int) -> TokenWeights:
        """The weight of a product with few tokens, whose code of 0 is `zero`."""
        with self._lock:
            if id(step) not in self._tokens:
                weight = step.weight
                self._tokens[id(step)] = TokenWeights(weight.rows, weight.columns, *token_slots(weight), zero)
            return self._tokens[id(step)]
