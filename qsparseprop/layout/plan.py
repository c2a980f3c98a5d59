"""Plans: a pattern on a geometry, as the lists or the dense rows that the kernels walk; and what keeps them."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qsparseprop._kernels._dense_rows import DenseRows, ValuePattern
from qsparseprop._kernels._plan import GatherList, PlaneLayout, ProductRows
from qsparseprop.layout.geometry import GROUP, Geometry
from qsparseprop.layout.modes import Modes, choose_modes, doubtful_modes
from qsparseprop.layout.pattern import check_pattern, row_indices, tensor_version

__all__ = ["KEPT_PLANS", "Plan", "PlanCache", "make_plan", "shared_plan_cache"]

#: Input sizes whose offset tables are kept for a pattern: training and evaluation batches, and the last one of each.
KEPT_PLANS = 8


class Plan:
    """A pattern on a geometry: all that a layer's kernels have to know besides its tensors.

    Parameters
    ----------
    pattern : ValuePattern
    geometry : Geometry
    groups : int
        Of the convolution.
    modes : Modes, optional
        How products on codes walk the weight; without them as `choose_modes` finds best. They give the same bits.

    Attributes
    ----------
    geometry, groups, modes
        As given.
    entries : int
        Of the dense weight.
    """

    def __init__(self, pattern: ValuePattern, geometry: Geometry, groups: int, modes: Modes | None = None) -> None:
        self._pattern, self.geometry, self.groups = pattern, geometry, groups
        self.modes = choose_modes(pattern, geometry, groups) if modes is None else modes
        self.entries = pattern.rows * pattern.columns

    # What nobody asks for is not made: dense rows need no lists, products of float32 nothing else.

    @functools.cached_property
    def forward(self) -> GatherList:
        """The list of the forward pass and of the weight gradient, from input to output."""
        return _gather_lists(self._pattern, self.geometry, self.groups)[0]()

    @functools.cached_property
    def backward(self) -> GatherList:
        """The list of the input gradient, the other way round."""
        return _gather_lists(self._pattern, self.geometry, self.groups)[1]()

    @functools.cached_property
    def dense_forward(self) -> DenseRows:
        """What `forward` has, as dense rows."""
        return self._dense_rows(False)

    @functools.cached_property
    def dense_backward(self) -> DenseRows:
        """What `backward` has, as dense rows."""
        return self._dense_rows(True)

    def _dense_rows(self, swapped: bool) -> DenseRows:
        g = self.geometry
        source, target = (g.output_layout, g.input_layout) if swapped else (g.input_layout, g.output_layout)
        return DenseRows(self._pattern, self.groups, g.tap_phase, g.tap_shift, source, target, swapped)

    def other_modes(self) -> Modes | None:
        """Modes that may be faster where the costs of both ways are too near for a model to tell; None elsewhere."""
        return doubtful_modes(self._pattern, self.geometry, self.groups)

    def multiplied(self, codes: bool, swapped: bool = False) -> ProductRows:
        """The rows of a product of the weight: from input to output, or with `swapped` the other way round.

        Parameters
        ----------
        codes : bool
            Whether it is one of codes, not of float32.
        swapped : bool

        Returns
        -------
        ProductRows
        """
        if swapped:
            return self.dense_backward if codes and self.modes.backward == "dense" else self.backward
        return self.dense_forward if codes and self.modes.forward == "dense" else self.forward

    def differentiated(self, codes: bool) -> ProductRows:
        """The rows of the weight gradient, as `multiplied`."""
        return self.dense_forward if codes and self.modes.gradient == "dense" else self.forward


def _gather_list(
    row: Tensor, plane: Tensor, offset: Tensor, order: Tensor, source: PlaneLayout, target: PlaneLayout
) -> GatherList:
    """List whose row r holds, padded, the nonzeros `order[row == r]`; `row` ascends."""
    rows = target.planes
    count = torch.bincount(row, minlength=rows)
    groups = (count + GROUP - 1) // GROUP
    group_ptr = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(groups, 0, out=group_ptr[1:])
    slot_row = torch.repeat_interleave(torch.arange(rows), GROUP * groups)
    place = torch.arange(slot_row.numel()) - GROUP * group_ptr[slot_row]
    start = count.cumsum(0) - count
    # padding reads where the row's last nonzero reads: memory that is in the cache, times zero
    slot = order[start[slot_row] + torch.minimum(place, count[slot_row] - 1)]
    index = torch.where(place < count[slot_row], slot, -1)
    kept = torch.int32
    return GatherList(group_ptr.to(kept), offset[slot].to(kept), index.to(kept), plane[slot].to(kept), source, target)


def _gather_lists(
    pattern: ValuePattern, geometry: Geometry, groups: int
) -> tuple[Callable[[], GatherList], Callable[[], GatherList]]:
    """What makes the lists of a pattern, from input to output and the other way round."""
    row, col = row_indices(pattern.crow_indices), pattern.col_indices.to(torch.int64)
    taps = len(geometry.tap_shift)
    tap = col % taps
    channel = col // taps + row // max(pattern.rows // groups, 1) * (geometry.in_channels // groups)
    shift = torch.tensor(geometry.tap_shift)[tap]
    plane = torch.tensor(geometry.tap_phase)[tap] * geometry.in_channels + channel
    x, y, layouts = geometry.input_grid, geometry.output_grid, (geometry.input_layout, geometry.output_layout)

    def forward() -> GatherList:
        nonzeros = torch.arange(col.numel())
        return _gather_list(row, plane, plane * x.pitch + x.front + shift, nonzeros, *layouts)

    def backward() -> GatherList:
        order = torch.argsort(plane, stable=True)
        return _gather_list(plane[order], row, row * y.pitch + y.front - shift, order, *layouts[::-1])

    return forward, backward


def make_plan(
    crow_indices: Tensor, col_indices: Tensor, geometry: Geometry, groups: int = 1, modes: Modes | None = None
) -> Plan:
    """Plan of a pattern on a geometry.

    Parameters
    ----------
    crow_indices, col_indices : Tensor
        CSR pattern of the weight seen as (out_channels, in_channels / groups * taps), int32.
    geometry : Geometry
    groups : int
        Groups of the convolution.
    modes : Modes, optional
        As for `Plan`.

    Returns
    -------
    Plan
    """
    columns = geometry.in_channels // groups * len(geometry.tap_shift)
    return Plan(ValuePattern(crow_indices, col_indices, columns), geometry, groups, modes)


def _stamp(crow: Tensor, col: Tensor) -> tuple[int, ...]:
    """What changes with a pattern's place in memory or its contents."""
    return (crow.data_ptr(), tensor_version(crow), crow.numel(), col.data_ptr(), tensor_version(col), col.numel())


class _Kept(NamedTuple):
    """Plans of one pattern, and what tells that it is still the same."""

    stamp: tuple[int, ...]
    tensors: tuple[Tensor, Tensor] | None
    plans: OrderedDict[tuple[Geometry, int], Plan]

    def are_of(self, crow: Tensor, col: Tensor) -> bool:
        same = self.tensors is None or (self.tensors[0] is crow and self.tensors[1] is col)
        return same and self.stamp == _stamp(crow, col)


class PlanCache:
    """The plans of one pattern, for the input sizes that it was last used at.

    Plans are made anew when the pattern has changed, which is known by its tensors' identity, place and version.

    Parameters
    ----------
    hold : bool
        Hold the tensors, so that no others can take their place in memory; otherwise the caller sees to that.
    modes : Modes, optional
        Of the plans; without them as each finds best.
    """

    def __init__(self, hold: bool = True, modes: Modes | None = None) -> None:
        self._hold, self._modes = hold, modes
        # patterns may change while other threads compute with them: what belongs together is exchanged together
        self._kept = _Kept((), None, OrderedDict())
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept.plans)

    def last(self) -> Plan | None:
        """The plan that was made last."""
        return next(reversed(self._kept.plans.values()), None)

    def find(self, crow_indices: Tensor, col_indices: Tensor, geometry: Geometry, groups: int) -> Plan | None:
        """The plan of a pattern on a geometry if it is there."""
        kept = self._kept
        return kept.plans.get((geometry, groups)) if kept.are_of(crow_indices, col_indices) else None

    def get(
        self, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int], geometry: Geometry, groups: int
    ) -> Plan:
        """Plan of a pattern on a geometry.

        Parameters
        ----------
        crow_indices, col_indices : Tensor
            CSR pattern, int32; checked when it has changed.
        shape : (int, int)
            Rows and columns of the weight.
        geometry : Geometry
        groups : int
            Groups of the convolution.

        Raises
        ------
        TypeError, ValueError
            See `check_pattern`.
        """
        crow, col = crow_indices, col_indices
        with self._lock:
            plan = self.find(crow, col, geometry, groups)
            if plan is not None:
                return plan
            if not self._kept.are_of(crow, col):
                self._kept, stamp = _Kept((), None, OrderedDict()), _stamp(crow, col)
                check_pattern(crow, col, shape)
                # a thread that makes a plan of the pattern before puts it where nobody looks any more
                self._kept = _Kept(stamp, (crow, col) if self._hold else None, OrderedDict())
            plans = self._kept.plans
        plan = make_plan(crow, col, geometry, groups, self._modes)
        with self._lock:
            plans[geometry, groups] = plan
            if len(plans) > KEPT_PLANS:
                plans.popitem(last=False)
        return plan


#: (storage of crow_indices, of col_indices) -> references to both, plans. The references do not keep the memory, but
#: keep the storages' identities from being used again.
_shared_caches: dict[tuple[int, int], tuple[StorageWeakRef, StorageWeakRef, PlanCache]] = {}


def shared_plan_cache(crow_indices: Tensor, col_indices: Tensor) -> PlanCache:
    """The cache of plans that belongs to a pattern, for those who get the pattern without the module that holds it.

    It lives as long as the memory of the pattern.
    """
    storages = crow_indices.untyped_storage(), col_indices.untyped_storage()
    key = storages[0]._cdata, storages[1]._cdata
    found = _shared_caches.get(key)
    if found is None:
        for old in [k for k, (crow, col, _) in list(_shared_caches.items()) if crow.expired() or col.expired()]:
            _shared_caches.pop(old, None)
        found = _shared_caches[key] = (StorageWeakRef(storages[0]), StorageWeakRef(storages[1]), PlanCache(hold=False))
    return found[2]
