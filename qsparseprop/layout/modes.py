"""How products on codes walk a weight: its nonzeros one by one, or dense rows, zeros included; and what each costs.

Both give the same bits, so the choice is one of time alone. A list costs as much as it has nonzeros; dense rows cost as
much as they have entries, a fraction of a nonzero's time each, since no plane is shuffled and no offset loaded for one
of them. Where the two meet depends on the processor; see `costs`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from qsparseprop._kernels import _dispatch
from qsparseprop._kernels._plan import ValuePattern
from qsparseprop.arguments import shown
from qsparseprop.layout.costs import machine_costs
from qsparseprop.layout.geometry import Geometry

__all__ = ["DENSE", "LIST", "LONGEST_ROW", "Modes", "Shape", "checked_modes", "choose_modes",
           "doubtful_modes", "forced_modes", "shape_of", "usable_modes", "use_modes"]

#: The ways: of a product on codes.
LIST, DENSE = "list", "dense"
#: A row's weights beyond which an int32 does not hold the sum of products, see ``QSP_MAX_EXACT``.
LONGEST_ROW = _dispatch.longest_row


class Modes(NamedTuple):
    """How each of a layer's products on codes walks the weight: "list" or "dense".

    Attributes
    ----------
    forward, backward, gradient : str
        The product with the input, with the output's gradient, and the weight gradient.
    """

    forward: str = LIST
    backward: str = LIST
    gradient: str = LIST

    def __str__(self) -> str:
        return self.forward if len(set(self)) == 1 else "/".join(self)


_forced: Modes | None = None


def checked_modes(modes: Sequence[str]) -> Modes:
    """Three ways as `Modes`.

    Raises
    ------
    ValueError
        If these are not three, each "list" or "dense".
    """
    three = isinstance(modes, tuple | list) and len(modes) == 3
    if not three or not all(isinstance(mode, str) and mode in (LIST, DENSE) for mode in modes):
        raise ValueError(f"modes must be three, each {LIST!r} or {DENSE!r}, got {shown(modes)}")
    return Modes(*modes)


@contextlib.contextmanager
def use_modes(modes: Modes | None) -> Iterator[None]:
    """Let plans that are made inside use these modes where they can; with None as `choose_modes` finds best.

    Parameters
    ----------
    modes : Modes, optional

    Raises
    ------
    ValueError
        If one of them is neither "list" nor "dense".
    """
    modes = None if modes is None else checked_modes(modes)
    global _forced
    before, _forced = _forced, modes
    try:
        yield
    finally:
        _forced = before


def forced_modes() -> Modes | None:
    """Those of `use_modes` or ``QSPARSEPROP_PRODUCTS``, or None; ValueError where that names no way."""
    if _forced is not None:
        return _forced
    wanted = os.environ.get("QSPARSEPROP_PRODUCTS", "").strip().lower()
    if wanted in ("", "auto"):
        return None
    if wanted not in (LIST, DENSE):
        raise ValueError(f"QSPARSEPROP_PRODUCTS must be auto, {LIST} or {DENSE}, got {wanted!r}")
    return Modes(wanted, wanted, wanted)


class Shape(NamedTuple):
    """What the two ways of a weight have to walk.

    Attributes
    ----------
    nonzeros : int
    entries, gradient : int
        Of the dense rows; of the weight gradient, with rows in fours.
    forward_table, backward_table : int
        Entries of their tables.
    """

    nonzeros: int
    entries: int
    gradient: int
    forward_table: int
    backward_table: int


def shape_of(pattern: ValuePattern, geometry: Geometry, groups: int) -> Shape:
    """The shape of a pattern on a geometry."""
    rows, columns = pattern.rows // groups, pattern.columns
    # a table of the input gradient has the taps of one phase: over all of them every weight occurs once, too
    entries = groups * rows * columns
    return Shape(pattern.count, entries, groups * ((rows + 3) // 4 * 4) * columns, groups * columns,
                 groups * rows * len(geometry.tap_phase))  # fmt: skip


def _ratios(pattern: ValuePattern, geometry: Geometry, groups: int) -> tuple[float, float, float]:
    """The time of dense rows over that of lists: of the products from input to output and back, and of the gradient."""
    costs, s = machine_costs(_dispatch.active_isa()), shape_of(pattern, geometry, groups)
    return (
        (s.entries * costs.spmm_dense + s.forward_table * costs.interleave) / (s.nonzeros * costs.spmm_list),
        (s.entries * costs.spmm_dense + s.backward_table * costs.interleave) / (s.nonzeros * costs.spmm_list),
        s.gradient * costs.sddmm_dense / (s.nonzeros * costs.sddmm_list),
    )


def _can_be_dense(pattern: ValuePattern, geometry: Geometry, groups: int) -> tuple[bool, bool, bool]:
    """Which of the three products dense rows can be taken for: their rows are short enough."""
    forward = pattern.count > 0 and pattern.columns <= LONGEST_ROW
    backward = forward and pattern.rows // groups * len(geometry.tap_phase) <= LONGEST_ROW
    return forward, backward, forward


def choose_modes(pattern: ValuePattern, geometry: Geometry, groups: int) -> Modes:
    """The faster modes for a pattern on a geometry.

    Parameters
    ----------
    pattern : ValuePattern
    geometry : Geometry
    groups : int
        Of the convolution.

    Returns
    -------
    Modes

    Raises
    ------
    ValueError
        If ``QSPARSEPROP_PRODUCTS`` is not one of auto, list, dense.
    """
    if not pattern.count:
        return Modes()
    if (modes := forced_modes()) is None:
        modes = Modes(*(DENSE if ratio < 1 else LIST for ratio in _ratios(pattern, geometry, groups)))
        modes = _affordable(modes, pattern)
    return usable_modes(modes, pattern, geometry, groups)


def _affordable(modes: Modes, pattern: ValuePattern) -> Modes:
    """Modes with which a weight takes no more memory than a dense one with its gradient, those given if they do.

    Nonzeros have a value and its gradient, four bytes each, as a dense weight's entries have. The list of the input
    gradient takes six more, that of the forward pass two where the pattern is held as bits; the weight gradient reads
    bits. The largest is given up first: where that happens, with half of the entries there and more, dense rows take
    up to a fifth more time with AVX2; with AVX-512 they are the faster ones.
    """
    columns = pattern.held[1]
    room = 8 * pattern.rows * pattern.columns - 8 * pattern.count - columns.nbytes
    backward = 6 * pattern.count if modes.backward == LIST else 0
    forward = 2 * pattern.count if modes.forward == LIST and columns.dtype == torch.int64 else 0
    if forward + backward > room:
        modes, backward = modes._replace(backward=DENSE), 0
    if forward + backward > room:
        modes = modes._replace(forward=DENSE)
    return modes


def usable_modes(modes: Modes, pattern: ValuePattern, geometry: Geometry, groups: int) -> Modes:
    """Modes that somebody has chosen, or lists where rows are too long for dense ones."""
    can = _can_be_dense(pattern, geometry, groups)
    return Modes(*(mode if free else LIST for mode, free in zip(modes, can, strict=True)))


#: How near the times of both ways must be for a model of five constants to be in doubt.
DOUBT = 1.4


def doubtful_modes(pattern: ValuePattern, geometry: Geometry, groups: int) -> Modes | None:
    """Those that `choose_modes` was near to choosing: with the other way where times are alike, or None.

    Parameters
    ----------
    pattern, geometry, groups
        As for `choose_modes`.

    Returns
    -------
    Modes or None
    """
    if not pattern.count or forced_modes() is not None:
        return None
    ratios = _ratios(pattern, geometry, groups)
    doubted = [1 / DOUBT < ratio < DOUBT for ratio in ratios]
    if not any(doubted):
        return None
    modes = Modes(*(DENSE if (ratio < 1) is not doubt else LIST for ratio, doubt in zip(ratios, doubted, strict=True)))
    modes = usable_modes(_affordable(modes, pattern), pattern, geometry, groups)
    return None if modes == choose_modes(pattern, geometry, groups) else modes
