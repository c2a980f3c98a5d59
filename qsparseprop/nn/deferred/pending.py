"""What is still to be computed of a deferred tensor: an affine map of each channel, and an activation."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop._torch_compat import watcher
from qsparseprop.layout.geometry import Geometry
from qsparseprop.nn.deferred import passes
from qsparseprop.nn.deferred.layout import Layout
from qsparseprop.nn.deferred.packed import PackedInput, PackedSource, packs_input
from qsparseprop.nn.deferred.passes import IDENTITY, NO_AFFINE, NOTHING_KEPT, Activation, Affine, Kept
from qsparseprop.nn.deferred.usage import Operation, Usage
from qsparseprop.quantization import QuantConfig


class Codes:
    """What a batch normalisation needs of its input for the backward pass: the input in 8 bits.

    The buffer is there, for autograd to save, before it is filled: that happens on the way when the chain is computed.

    Attributes
    ----------
    codes : Tensor
        uint8, (rows, channels).
    coding : (Tensor, Tensor)
        Scale and shift that make codes of the input, see `ops.epilogue`.
    decoding : (Tensor, Tensor)
        Scale and shift that make the normalised input of codes.
    """

    __slots__ = ("_rows", "codes", "coding", "decoding")

    def __init__(self, rows: Tensor, coding: tuple[Tensor, Tensor], decoding: tuple[Tensor, Tensor]) -> None:
        self._rows: Tensor | None = rows
        self.coding, self.decoding = coding, decoding
        self.codes = ops.codes_like(rows)

    @property
    def wanted(self) -> Kept:
        """The buffer and what fills it, if it is still to be filled."""
        return NOTHING_KEPT if self._rows is None else Kept(*self.coding, self.codes)

    def filled(self) -> None:
        """Somebody has filled it."""
        self._rows = None

    def fill(self) -> None:
        """Fill it now if nobody has."""
        if self._rows is not None:
            passes.apply(self._rows, None, NO_AFFINE, IDENTITY, self.wanted)
            self.filled()


class Slopes:
    """What an activation needs for the backward pass, saved in the same way."""

    __slots__ = ("_source", "saved")

    def __init__(self, rows: Tensor, affine: Affine, activation: Activation) -> None:
        self._source: tuple[Tensor, Affine, Activation] | None = (rows, affine, activation)
        self.saved = passes.saved_like(rows, activation)

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
            rows, affine, activation = self._source
            passes.apply(rows, None, affine, activation, Kept(saved=self.saved))
            self.filled()


class Pending:
    """``activation(rows * scale + shift)``, until somebody wants it: then its values, or its packed form.

    Attributes
    ----------
    layout : Layout
    usage : Usage
        What became of it the last time, and becomes now.
    inference : bool
        Whether its values are a tensor of inference mode.
    watcher : callable or None
        Who saw what autograd saved when it was recorded, see `_torch_compat.watcher`.
    packed : PackedInput or None
        What a sparse layer has made of it.
    """

    def __init__(self, rows: Tensor, layout: Layout, usage: Usage, borrowed: bool = False) -> None:
        self._rows: Tensor | None = rows  # nobody else's, and never changed, unless they are borrowed
        self._borrowed = borrowed
        self._shared = False  # whether other chains read the rows, too
        self._affine = NO_AFFINE
        self._ends: Tensor | None = None  # bounds of what it gives, (channels, 2)
        self._activation = IDENTITY
        self._codes: Codes | None = None
        self._slopes: Slopes | None = None
        self._of_codes: tuple[Codes, Activation] | None = None  # codes and activation, if it is computed of no more
        self._values: Tensor | None = None
        self._lock = threading.RLock()
        self.inference = torch.is_inference_mode_enabled()
        self.watcher = watcher()
        self.layout, self.usage = layout, usage
        self.packed: PackedInput | None = None

    # ---- recording ----

    def _follow(self, operation: Operation) -> Pending:
        """A chain that goes on from here, so far with the same values."""
        self.usage.absorbed = True
        new = Pending(self._rows_now(), self.layout, self.usage.branch(operation))
        self._shared = new._shared = True
        return new

    def settled(self) -> Tensor:
        """The values as rows, for what goes on from here."""
        with self._lock:
            return self._settled()

    def normalised(self, affine: Affine, ends: Tensor | None, codes: Codes | None) -> Pending:
        """With a batch normalisation of what is settled, the bounds of what it gives, and what it saves."""
        new = self._follow("BatchNorm")
        new._affine, new._ends, new._codes = affine, ends, codes
        if codes is not None:
            new._of_codes = codes, IDENTITY
        if self._borrowed:  # they may be changed before the chain is computed
            new.compute()
        return new

    def activated(self, activation: Activation, save: bool) -> tuple[Pending, Slopes | None]:
        """With an activation behind it; what it saves for the gradient, if it saves anything."""
        if self._activation is not IDENTITY:
            self.settled()
        new = self._follow(activation)
        new._affine, new._ends, new._codes = self._affine, self._ends, self._codes
        new._activation = activation
        if self._of_codes is not None and self._of_codes[1] is IDENTITY:
            new._of_codes = self._of_codes[0], activation
        slopes = new._slopes = Slopes(new._rows_now(), self._affine, activation) if save else None
        if self._borrowed:
            new.compute()
        return new, slopes

    def mapped(self, scale: Tensor | None, shift: Tensor | None) -> Pending:
        """With what is settled multiplied, or shifted, by a number for each channel; other tensors' memory is read now.

        One of both, so that it is rounded as often as torch rounds it.
        """
        rows = self.settled()
        new = self._follow("scale" if shift is None else "shift")
        channels = rows.shape[1]
        new._affine = Affine(
            torch.ones(channels, dtype=torch.float32) if scale is None else scale.detach().reshape(-1).clone(),
            torch.zeros(channels, dtype=torch.float32) if shift is None else shift.detach().reshape(-1).clone(),
        )
        if self._borrowed:
            new.compute()
        return new

    @property
    def is_mapped(self) -> bool:
        """Whether an addition would be done in the pass of a map that is still to be computed."""
        return self.open and self._affine is not NO_AFFINE and self._activation is IDENTITY

    def plus(self, other: Tensor) -> Pending:
        """With the rows of another tensor added, at once."""
        with self._lock, self._mode():
            if self._activation is IDENTITY and self._affine is not NO_AFFINE:
                rows = self._apply(other)
            else:
                rows = self._settled() + other
        self.usage.absorbed = True
        return Pending(rows, self.layout, self.usage.branch("add"))

    # ---- computing ----

    def _buffers(self) -> Kept:
        """What is to be filled on the way."""
        codes = NOTHING_KEPT if self._codes is None else self._codes.wanted
        return codes if self._slopes is None else codes._replace(saved=self._slopes.wanted)

    def _apply(self, residual: Tensor | None = None) -> Tensor:
        with self._mode():
            rows = passes.apply(self._rows_now(), residual, self._affine, self._activation, self._buffers())
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
        if self._activation is not IDENTITY:
            self._ends = None
        self._rows, self._affine, self._activation = rows, NO_AFFINE, IDENTITY
        self._codes = self._slopes = None

    def _settle(self) -> None:
        if self._affine is not NO_AFFINE or self._activation is not IDENTITY:
            self._become(self._apply())

    def _settled(self) -> Tensor:
        self._settle()
        return self._rows_now()

    def _rows_now(self) -> Tensor:
        """What affine map and activation are still to be done on."""
        if self._rows is not None:
            return self._rows
        assert self._values is not None  # one of both is there
        return self.layout.rows(self._values).clone()  # another thread has wanted the values meanwhile

    @property
    def open(self) -> bool:
        """Whether it can go on: nobody has seen the values, so that nobody can have changed them."""
        return self._values is None

    def keep_packed(self, packed: PackedInput) -> None:
        """Remember the packed form for others who take the same values."""
        if self.open and not self._borrowed and not packed.parts.planes.is_inference():  # autograd saves them
            self.packed = packed

    def compute(self) -> None:
        """Compute the values now, for this chain only."""
        with self._lock:
            self._settle()

    def rows(self) -> Tensor:
        """The values as rows, for reading, while it is `open`."""
        with self._lock:
            self.usage.summed = True
            return self._settled()

    def plain(self) -> Tensor:
        """The values as an ordinary tensor, which from now on is the only place where they are."""
        with self._lock:
            if self._values is None:
                with self._mode(), torch.no_grad():
                    self.usage.read = True
                    self._settle()
                    rows = self._rows_now()
                    values = self.layout.tensor(rows)
                    shared = self._shared and not self._borrowed and values.data_ptr() == rows.data_ptr()
                    if shared or values.is_inference() is not self.inference:
                        values = values.clone()  # what others have still to read, or made in the other mode
                    self._values = values.detach()  # no view: it may be changed in place
                    self._rows = self.packed = self.watcher = None  # of changes, from now on, nobody need tell
            return self._values

    def pack(self, geometry: Geometry, qconfig: QuantConfig) -> PackedInput | None:
        """The packed form for a layer, made now if need be; None if only the values can serve it."""
        with self._lock:
            self.usage.packed = True
            if self.packed is not None:
                return self.packed if self.packed.fits(geometry, qconfig) else None
            if self._values is not None or not packs_input(qconfig, geometry) or qconfig.check_finite:
                return None
            if self._affine is NO_AFFINE and self._activation is IDENTITY and self._of_codes is None:
                return None  # values: packed as those of any tensor
            # a layer may take it in inference mode, and then another one whose node saves it
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING:
                start = self._rows_now()
                ranges = passes.output_range(start, self._affine, self._activation, self._ends)
                rows, packed = passes.pack(start, self._affine, self._activation, self._buffers(), ranges,
                                           geometry, qconfig, self.usage.keeps_values)  # fmt: skip
            self._filled()
            self.packed = PackedInput(packed, geometry, qconfig.input_scheme, self._source(ranges))
            if rows is not None:
                self._become(rows)
            return self.packed

    def _source(self, ranges: Tensor) -> PackedSource | None:
        if self._of_codes is None:
            return None
        codes, activation = self._of_codes
        return PackedSource(codes.codes, *codes.decoding, ranges, activation)

    def images(self) -> Tensor:
        """The values as channels_last images, for reading, while it is `open`."""
        with self._lock:
            return self.layout.image_view(self._settled())

    def _mode(self) -> Any:
        """The mode in which it was recorded, inference mode or not, wherever it is computed."""
        on = self.inference
        return _NOTHING if torch.is_inference_mode_enabled() is on else torch.inference_mode(on)


_NOTHING = contextlib.nullcontext()
