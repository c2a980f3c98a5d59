"""What is still to be computed of a deferred tensor: an affine map of each channel, and an activation."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch import Tensor

from qsparseprop.geometry import Geometry
from qsparseprop.nn.deferred import passes
from qsparseprop.nn.deferred.layout import Layout
from qsparseprop.nn.deferred.packed import PackedInput, PackedSource, packs_input
from qsparseprop.nn.deferred.passes import IDENTITY, Activation
from qsparseprop.nn.deferred.usage import Operation, Usage
from qsparseprop.quantization import QuantConfig


class Codes:
    """What a batch normalisation needs of its input for the backward pass: the input in 8 bits.

    The buffer is there, for autograd to save, before it is filled: that happens on the way when the chain is computed.

    Attributes
    ----------
    codes : Tensor
        uint8, (rows, channels).
    statistics : Tensor
        float64, of `norm_ops.norm_statistics`.
    """

    __slots__ = ("_rows", "affine", "codes", "statistics")

    def __init__(self, rows: Tensor, affine: tuple[Tensor, Tensor], statistics: Tensor) -> None:
        self._rows: Tensor | None = rows
        self.affine, self.statistics = affine, statistics
        self.codes = passes.empty(tuple(rows.shape), torch.uint8)

    @property
    def wanted(self) -> Tensor | None:
        """The buffer, if it is still to be filled."""
        return None if self._rows is None else self.codes

    def filled(self) -> None:
        """Somebody has filled it."""
        self._rows = None

    def fill(self) -> None:
        """Fill it now if nobody has."""
        rows = self._rows
        if rows is not None:
            one = torch.ones(rows.shape[1])
            passes.apply(rows, None, one, 0 * one, IDENTITY, self.affine, self.codes, None)
            self.filled()


class Slopes:
    """What an activation needs for the backward pass, saved in the same way."""

    __slots__ = ("_source", "saved")

    def __init__(self, rows: Tensor, scale: Tensor | None, shift: Tensor | None, activation: Activation) -> None:
        self._source: tuple[Any, ...] | None = (rows, None, scale, shift, activation, None, None)
        self.saved = passes.saved_like(*rows.shape, activation)

    @property
    def wanted(self) -> Tensor | None:
        """The buffer, if it is still to be filled."""
        return None if self._source is None else self.saved

    def filled(self) -> None:
        """Somebody has filled it."""
        self._source = None

    def fill(self) -> None:
        """Fill it now if nobody has."""
        if self._source is not None:
            passes.apply(*self._source, self.saved)
            self.filled()


class Pending:
    """``activation(rows * scale + shift)``, until somebody wants it: then its values, or its packed form.

    Attributes
    ----------
    layout : Layout
    usage : Usage
        What became of it the last time, and becomes now.
    packed : PackedInput or None
        What a sparse layer has made of it.
    """

    def __init__(self, rows: Tensor, layout: Layout, usage: Usage, borrowed: bool = False) -> None:
        self._rows: Tensor | None = rows  # nobody else's, and never changed, unless they are borrowed
        self._borrowed = borrowed
        self._shared = False  # whether other chains read the rows, too
        self._scale: Tensor | None = None
        self._shift: Tensor | None = None
        self._ends: Tensor | None = None  # of the affine map, (2, channels)
        self._activation = IDENTITY
        self._codes: Codes | None = None
        self._slopes: Slopes | None = None
        self._of_codes: tuple[Any, ...] | None = None  # codes, scale, shift, activation, if it is computed of no more
        self._values: Tensor | None = None
        self._lock = threading.RLock()
        self.layout, self.usage = layout, usage
        self.packed: PackedInput | None = None

    # ---- recording ----

    def _follow(self, operation: Operation) -> Pending:
        """A chain that goes on from here, so far with the same values."""
        self.usage.absorbed = True
        new = Pending(self._rows, self.layout, self.usage.branch(operation))
        self._shared = new._shared = True
        return new

    def settled(self) -> Tensor:
        """The values as rows, for what goes on from here."""
        with self._lock:
            return self._settled()

    def normalised(self, fused: Tensor, codes: Codes | None, bounded: bool) -> Pending:
        """With a batch normalisation of what is settled.

        Its vectors are rows of `fused`, see `norm_ops.norm_statistics`; the last two only where it is `bounded`.
        """
        new = self._follow("BatchNorm")
        new._scale, new._shift, new._ends = fused[0], fused[1], fused[4:6] if bounded else None
        new._codes = codes
        if codes is not None:
            new._of_codes = codes, new._scale, new._shift, IDENTITY
        if self._borrowed:  # they may be changed before the chain is computed
            new.compute()
        return new

    def activated(self, activation: Activation, save: bool) -> tuple[Pending, Slopes | None]:
        """With an activation behind it; what it saves for the gradient, if it saves anything."""
        if self._activation is not IDENTITY:
            self.settled()
        new = self._follow(activation)
        new._scale, new._shift, new._ends, new._codes = self._scale, self._shift, self._ends, self._codes
        new._activation = activation
        if self._of_codes is not None and self._of_codes[3] is IDENTITY:
            new._of_codes = *self._of_codes[:3], activation
        if save:
            new._slopes = Slopes(self._rows, self._scale, self._shift, activation)
        if self._borrowed:
            new.compute()
        return new, new._slopes

    def mapped(self, scale: Tensor | None, shift: Tensor | None) -> Pending:
        """With what is settled multiplied, or shifted, by a number for each channel; other tensors' memory is read now.

        One of both, so that it is rounded as often as torch rounds it.
        """
        rows = self.settled()
        new = self._follow("scale" if shift is None else "shift")
        channels = rows.shape[1]
        new._scale = torch.ones(channels) if scale is None else scale.detach().reshape(-1).clone()
        new._shift = torch.zeros(channels) if shift is None else shift.detach().reshape(-1).clone()
        if self._borrowed:
            new.compute()
        return new

    @property
    def is_mapped(self) -> bool:
        """Whether an addition would be done in the pass of a map that is still to be computed."""
        return self.open and self._scale is not None and self._activation is IDENTITY

    def plus(self, other: Tensor) -> Pending:
        """With the rows of another tensor added, at once."""
        with self._lock, _ordinary_tensors():
            if self._activation is IDENTITY and self._scale is not None:
                rows = self._apply(other)
            else:
                rows = self._settled() + other
        self.usage.absorbed = True
        return Pending(rows, self.layout, self.usage.branch("add"))

    # ---- computing ----

    def _apply(self, residual: Tensor | None = None) -> Tensor:
        codes = None if self._codes is None else self._codes.wanted
        saved = None if self._slopes is None else self._slopes.wanted
        affine = None if codes is None else self._codes.affine
        with _ordinary_tensors():
            rows = passes.apply(self._rows, residual, self._scale, self._shift, self._activation, affine, codes, saved)
        self._filled()
        return rows

    def _filled(self) -> None:
        if self._codes is not None:
            self._codes.filled()
        if self._slopes is not None:
            self._slopes.filled()

    def _become(self, rows: Tensor) -> None:
        """The values are known: nothing is left to be done."""
        self._shared = self._shared and rows is self._rows
        self._rows, self._scale, self._shift, self._ends, self._activation = rows, None, None, None, IDENTITY
        self._codes = self._slopes = None

    def _settle(self) -> None:
        if self._scale is not None or self._activation is not IDENTITY:
            self._become(self._apply())

    def _settled(self) -> Tensor:
        if self._rows is None:
            return self.layout.rows(self._values)
        self._settle()
        return self._rows

    @property
    def open(self) -> bool:
        """Whether it can go on: nobody has seen the values, so that nobody can have changed them."""
        return self._values is None

    def keep_packed(self, packed: PackedInput) -> None:
        """Remember the packed form for others who take the same values."""
        if self.open and not self._borrowed:
            self.packed = packed

    def compute(self) -> None:
        """Compute the values now, for this chain only."""
        with self._lock:
            self._settle()

    def rows(self) -> Tensor:
        """The values as rows, for reading."""
        with self._lock:
            self.usage.summed = True
            return self._settled()

    def plain(self) -> Tensor:
        """The values as an ordinary tensor, which from now on is the only place where they are."""
        with self._lock:
            if self._values is None:
                with _ordinary_tensors(), torch.no_grad():
                    self.usage.read = True
                    self._settle()
                    rows = self._rows
                    values = self.layout.tensor(rows)
                    if self._shared and not self._borrowed and values.data_ptr() == rows.data_ptr():
                        values = values.clone()  # what others have still to read
                    self._values = values.detach()  # no view: it may be changed in place
                    self._rows = self.packed = None  # of changes, from now on, nobody need tell
            return self._values

    def pack(self, geometry: Geometry, qconfig: QuantConfig) -> PackedInput | None:
        """The packed form for a layer, made now if need be; None if only the values can serve it."""
        with self._lock:
            self.usage.packed = True
            if self.packed is not None:
                return self.packed if self.packed.fits(geometry, qconfig) else None
            if self._values is not None or not packs_input(qconfig, geometry) or qconfig.check_finite:
                return None
            if self._activation is IDENTITY and self._scale is None and self._of_codes is None:
                return None  # values: packed as those of any tensor
            ranges = passes.output_range(self._rows, self._scale, self._shift, self._activation, self._ends)
            codes = None if self._codes is None else self._codes.wanted
            saved = None if self._slopes is None else self._slopes.wanted
            affine = None if codes is None else self._codes.affine
            with _ordinary_tensors():
                rows, *packed = passes.pack(
                    self._rows, self._scale, self._shift, self._activation, affine, codes, saved, self.layout.images,
                    ranges, geometry, qconfig, self.usage.keeps_values,
                )  # fmt: skip
            self._filled()
            self.packed = PackedInput(*packed, geometry, qconfig.input, qconfig.granularity, self._source(ranges))
            if rows is not None:
                self._become(rows)
            return self.packed

    def _source(self, ranges: Tensor) -> PackedSource | None:
        if self._of_codes is None:
            return None
        codes, scale, shift, activation = self._of_codes
        step, least = codes.statistics[5], codes.statistics[6]
        return PackedSource(codes.codes, (step * scale).float(), (least * scale + shift).float(), ranges, activation,
                            self.layout.images)

    def images(self) -> Tensor:
        """The values as channels_last images, for reading."""
        with self._lock:
            return self.layout.image_view(self._settled())


def _ordinary_tensors() -> Any:
    """What makes tensors that autograd can use later on, wherever they are made."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
