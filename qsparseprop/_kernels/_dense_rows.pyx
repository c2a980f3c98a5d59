"""Rows of weights as a matrix with its zeros, checked once when they are made."""

from operator import index as whole

import torch

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint64_t

from qsparseprop._kernels._dispatch cimport QSP_GROUP, QSP_MAX_EXACT, QSP_UNIT, qsp_band
from qsparseprop._kernels._plan cimport PlaneLayout, ProductRows, ValuePattern
from qsparseprop._kernels._tensor cimport pointer

cdef object _int32 = torch.int32
cdef object _int64 = torch.int64


cdef object _padded(object table, int64_t width):
    """Lines of a table with their last entry repeated up to a width, one after the other."""
    return torch.cat([table, table[:, table.shape[1] - 1:].expand(-1, width - table.shape[1])], 1).flatten()


cdef class DenseRows(ProductRows):
    """Rows of weights as a matrix with its zeros, int8; rows that read the same planes share a table of offsets.

    Parameters are those of `PatternList`.

    Attributes
    ----------
    rows, slots : int
        The latter with all zeros.
    source, target : PlaneLayout
    pattern : ValuePattern
    swapped : bool
    offset, index, plane : Tensor
        Of all slots, as those of a `GatherList`; copies.
    nbytes : int
        Bytes that it holds, without those of the pattern.

    Raises
    ------
    ValueError
        If these do not go together, or rows are longer than what an int32 sums up exactly.
    """

    def __cinit__(self, ValuePattern pattern not None, int64_t groups, tap_phase, tap_shift,
                  PlaneLayout source not None, PlaneLayout target not None, bint swapped):
        cdef PlaneLayout x = target if swapped else source, y = source if swapped else target
        cdef list phase = [whole(p) for p in tap_phase], shift = [whole(s) for s in tap_shift]
        self._given = (pattern, groups, tuple(phase), tuple(shift), source, target, swapped)
        self._take_layouts(source, target, target.grid.planes)
        if pattern.columns > QSP_MAX_EXACT:
            raise ValueError(f"a row has {pattern.columns} weights, of which an int32 holds the sum of {QSP_MAX_EXACT}")
        self.pattern, self.swapped = pattern, swapped
        pattern.check_layouts(groups, tuple(phase), tuple(shift), x, y)
        self.dense.rows, self.dense.groups = self.rows, groups
        self.dense.value_rows, self.dense.columns = pattern.rows, pattern.columns
        self.dense.value_ptr, self._bits = pattern.ptr, pattern.bits_for_rows()
        if self._bits is not None:
            self.dense.bits = <const uint64_t *> pointer(self._bits, _int64, 1, "bits")
        self._make_tables(phase, shift, x.channels)

    cdef int64_t _make_tables(self, list phase, list shift, int64_t channels) except -1:
        """Bands and their tables, of channels of the input; and where the columns of the values are in swapped rows."""
        cdef qsp_dense *d = &self.dense
        taps, groups = len(phase), d.groups
        phases = self.target.grid.planes // channels if self.swapped else 1
        inner, outer = channels // groups, d.value_rows // groups  # of a group
        pitch, front = self.source.grid.pitch, self.source.grid.front
        tap_phase, tap_shift = torch.tensor(phase, device="cpu"), torch.tensor(shift, device="cpu")
        group = torch.arange(groups, device="cpu")[:, None]
        tables = []  # of each phase: planes and offsets of all groups, (groups, entries)
        for p in range(phases):
            if self.swapped:
                own = tap_shift[tap_phase == p]
                plane = (group * outer + torch.arange(outer, device="cpu")).repeat(1, len(own))
                offset = plane * pitch + front - own.repeat_interleave(outer)
            else:
                channel = group * inner + torch.arange(inner, device="cpu")
                plane = (tap_phase * channels + channel[..., None]).flatten(1)
                offset = plane * pitch + front + tap_shift.repeat(inner)
            tables.append((plane, offset))
        size = max(plane.shape[1] for plane, _ in tables)
        if size > QSP_MAX_EXACT:
            raise ValueError(f"a row has {size} weights, of which an int32 holds the sum of {QSP_MAX_EXACT}")
        self._bands = PyBytes_FromStringAndSize(NULL, len(tables) * groups * sizeof(qsp_band))
        cdef qsp_band *to = <qsp_band *> PyBytes_AS_STRING(self._bands)
        cdef int64_t width, first = 0, height = inner if self.swapped else outer, entries = 0
        planes, offsets = [], []
        for plane, offset in tables:
            width = (plane.shape[1] + QSP_GROUP - 1) // QSP_GROUP * QSP_GROUP
            # padding repeats the last entry: memory that is in the cache, times zero
            planes.append(_padded(plane, width))
            offsets.append(_padded(offset, width))
            for _ in range(groups):
                to.first, to.last, to.table, to.size = first, first + height, entries, width
                first, entries, to = first + height, entries + width, to + 1
        d.bands, d.band_count = <const qsp_band *> PyBytes_AS_STRING(self._bands), len(tables) * groups
        d.pitch = (size + QSP_UNIT - 1) // QSP_UNIT * QSP_UNIT
        self.slots = self.rows * d.pitch
        offset, plane = torch.cat(offsets), torch.cat(planes).to(_int32)
        least, most = int(offset.min()), int(offset.max())
        if least < 0 or most > self._furthest():
            raise ValueError(f"offsets must lie in [0, {self._furthest()}], got {least} to {most}")
        offset, self.last_offset = offset.to(_int32), most
        held = [offset, plane]
        d.offset = <const int32_t *> pointer(offset, _int32, entries, "offset")
        d.plane = <const int32_t *> pointer(plane, _int32, entries, "plane")
        if self.swapped:
            place = torch.tensor([phase[:t].count(phase[t]) for t in range(taps)], device="cpu")
            row_of = (tap_phase * channels + torch.arange(inner, device="cpu")[:, None]).flatten().to(_int32)
            entry_of = (place * outer).repeat(inner).to(_int32)
            held += [row_of, entry_of]
            d.row_of = <const int32_t *> pointer(row_of, _int32, d.columns, "row_of")
            d.entry_of = <const int32_t *> pointer(entry_of, _int32, d.columns, "entry_of")
            d.group_rows = inner
        self._held = tuple(held)
        return 0

    cdef object _of_slots(self, object table):
        """What a number of the tables' entries is for every slot; that of the last entry behind a table, of none 0."""
        cdef const qsp_band *b = self.dense.bands
        cdef int64_t i
        out = torch.zeros(self.rows, self.dense.pitch, dtype=_int32, device="cpu")
        for i in range(self.dense.band_count):
            if b[i].size:
                own = table[b[i].table:b[i].table + b[i].size]
                out[b[i].first:b[i].last, :b[i].size] = own
                out[b[i].first:b[i].last, b[i].size:] = own[b[i].size - 1]
        return out.view(-1)

    @property
    def offset(self):
        """Lanes from the start of a block."""
        return self._of_slots(self._held[0])

    @property
    def plane(self):
        """Plane that the offset lies in."""
        return self._of_slots(self._held[1])

    @property
    def index(self):
        """Which value a slot holds, -1 for none."""
        cdef int64_t in_group = self.dense.value_rows // self.dense.groups, count = self.pattern.count
        counts = self.pattern.crow_indices.diff()
        row = torch.arange(self.dense.value_rows, device="cpu").repeat_interleave(counts)
        entry = column = self.pattern.col_indices.to(torch.int64)
        if self.swapped:
            entry = self._held[3][column] + row % in_group
            row = self._held[2][column] + row // in_group * self.dense.group_rows
        out = torch.full((self.slots,), -1, dtype=_int32, device="cpu")
        out[row * self.dense.pitch + entry] = torch.arange(count, dtype=_int32, device="cpu")
        return out

    @property
    def nbytes(self):
        """Bytes that it holds, without those of the pattern."""
        own = 0 if self._bits is None or self._bits is self.pattern.held[1] else self._bits.nbytes
        return len(self._bands) + own + sum([t.nbytes for t in self._held])

    def __repr__(self):
        return f"DenseRows({self.rows} rows, {self.slots} slots)"

    def __reduce__(self):
        return DenseRows, self._given
