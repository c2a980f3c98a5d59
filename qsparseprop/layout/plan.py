"""Plans: a pattern on a geometry, as the lists or the dense rows that the kernels walk; and what keeps them."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from typing import NamedTuple, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qsparseprop._kernels._dense_rows import DenseRows
from qsparseprop._kernels._gather_list import GatherList, PatternList
from qsparseprop._kernels._plan import ProductRows, ValuePattern
from qsparseprop._kernels._tensor import memory_stamp
from qsparseprop.layout.geometry import Geometry
from qsparseprop.layout.modes import Modes, choose_modes, doubtful_modes, usable_modes
from qsparseprop.layout.pattern import checked_pattern, tensor_version

__all__ = ["KEPT_PLANS", "Plan", "PlanCache", "make_plan", "shared_plan_cache"]

#: Input sizes whose offset tables are kept for a pattern: training and evaluation batches, and the last one of each.
KEPT_PLANS = 8

_Rows = TypeVar("_Rows", DenseRows, PatternList)


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
        choose = choose_modes if modes is None else functools.partial(usable_modes, modes)
        self.modes = choose(pattern, geometry, groups)
        self.entries = pattern.rows * pattern.columns

    # What nobody asks for is not made: dense rows need no lists, products of float32 nothing else.

    @functools.cached_property
    def forward(self) -> GatherList:
        """The list of the forward pass and of the weight gradient, from input to output."""
        return self._rows(PatternList, False)

    @functools.cached_property
    def backward(self) -> GatherList:
        """The list of the input gradient, the other way round."""
        return self._rows(PatternList, True)

    @functools.cached_property
    def dense_forward(self) -> DenseRows:
        """What `forward` has, as dense rows."""
        return self._rows(DenseRows, False)

    @functools.cached_property
    def dense_backward(self) -> DenseRows:
        """What `backward` has, as dense rows."""
        return self._rows(DenseRows, True)

    def _rows(self, kind: type[_Rows], swapped: bool) -> _Rows:
        g = self.geometry
        source, target = (g.output_layout, g.input_layout) if swapped else (g.input_layout, g.output_layout)
        return kind(self._pattern, self.groups, g.tap_phase, g.tap_shift, source, target, swapped)

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


def _holds(pattern: ValuePattern, crow: Tensor, col: Tensor) -> bool:
    """Whether a pattern still holds two tensors as it has checked them."""
    held = pattern.held
    return held[0] is crow and held[1] is col and not any(map(tensor_version, held))


class _Kept(NamedTuple):
    """Plans of one pattern, and what tells that it is still the same."""

    stamp: tuple[int, ...]
    tensors: tuple[Tensor, Tensor] | None
    pattern: ValuePattern | None
    plans: OrderedDict[tuple[Geometry, int], Plan]

    def are_of(self, crow: Tensor, col: Tensor) -> bool:
        same = self.tensors is None or (self.tensors[0] is crow and self.tensors[1] is col)
        return same and self.stamp == memory_stamp(crow, col)


class PlanCache:
    """The plans of one pattern, for the input sizes that it was last used at.

    Plans are made anew when the pattern has changed, which is known by its tensors' identity, place and version.

    Parameters
    ----------
    hold : bool
        Hold the tensors, so that no others can take their place in memory; otherwise the caller sees to that, and they
        may be those of a `ValuePattern` that the caller does not have.
    """

    def __init__(self, hold: bool = True) -> None:
        self._hold = hold
        # patterns may change while other threads compute with them: what belongs together is exchanged together
        self._kept = _Kept((), None, None, OrderedDict())
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept.plans)

    def last(self) -> Plan | None:
        """The plan that was made last."""
        with self._lock:
            return next(reversed(self._kept.plans.values()), None)

    def find(self, crow_indices: Tensor, col_indices: Tensor, geometry: Geometry, groups: int) -> Plan | None:
        """The plan of a pattern on a geometry if it is there."""
        kept = self._kept
        return kept.plans.get((geometry, groups)) if kept.are_of(crow_indices, col_indices) else None

    def get(
        self, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int], geometry: Geometry, groups: int,
        modes: Modes | None = None, pattern: ValuePattern | None = None,
    ) -> Plan:
        """Plan of a pattern on a geometry.

        Parameters
        ----------
        crow_indices, col_indices : Tensor
            CSR pattern, int32, or what a `ValuePattern` holds; checked when it has changed.
        shape : (int, int)
            Rows and columns of the weight.
        geometry : Geometry
        groups : int
            Groups of the convolution.
        modes : Modes, optional
            Of a plan that has to be made; without them as it finds best.
        pattern : ValuePattern, optional
            What holds the two tensors: they are read where they lie, rather than copied, if nobody has written to them.

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
                self._kept, stamp = _Kept((), None, None, OrderedDict()), memory_stamp(crow, col)
                if pattern is None or not _holds(pattern, crow, col):
                    pattern = checked_pattern(crow, col, shape, compact=not self._hold)
                # a thread that makes a plan of the pattern before puts it where nobody looks any more
                self._kept = _Kept(stamp, (crow, col) if self._hold else None, pattern, OrderedDict())
            _, _, own, plans = self._kept
        assert own is not None  # of the same tensors
        plan = Plan(own, geometry, groups, modes)
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
