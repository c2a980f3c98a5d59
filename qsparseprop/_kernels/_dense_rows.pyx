"""Rows of weights as a matrix with its zeros: what dense rows and their weights are made from, checked once."""

from operator import index as whole

import torch

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint16_t

from qsparseprop._kernels._dispatch cimport QSP_GROUP, QSP_MAX_EXACT, QSP_UNIT, qsp_band
from qsparseprop._kernels._plan cimport PlaneLayout, ProductRows
from qsparseprop._kernels._tensor cimport numel, pointer

from qsparseprop._kernels._tensor import check_storage

cdef enum:
    WIDE = 1 << 16  # columns that 16 bits number

cdef object _int16 = torch.int16
cdef object _int32 = torch.int32

cdef extern from *:
    """
    /* Columns as 16 bits, those of a row ascending and below `columns`; returns the first bad one, or n. */
    static int64_t qsp_narrow(const int32_t *column, const int32_t *ptr, int64_t rows, int64_t columns, uint16_t *out)
    {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = ptr[r], least = 0; i < ptr[r + 1]; i++) {
                const int32_t c = *(const volatile int32_t *)(column + i); /* once: others may be writing there */
                if (c < least || c >= columns)
                    return i;
                least = (int64_t)c + 1;
                if (out)
                    out[i] = (uint16_t)c;
            }
        return ptr[rows];
    }
    """
    int64_t qsp_narrow(const int32_t *, const int32_t *, int64_t, int64_t, uint16_t *) noexcept nogil


cdef class ValuePattern:
    """Which entries of a weight, (rows, columns), its values are: in two bytes a value, none where they are all.

    Parameters
    ----------
    crow_indices, col_indices : Tensor
        CSR, int32; columns ascend in each row. They are copied.
    columns : int
        Above 65,536 they take four bytes.

    Attributes
    ----------
    rows, columns, count : int
        The latter of values.
    nbytes : int
        Bytes that it holds.

    Raises
    ------
    TypeError, ValueError
        If a tensor is not as said.
    """

    def __cinit__(self, crow_indices, col_indices, int64_t columns):
        cdef int64_t i
        for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        self.rows, self.columns, self.count = numel(crow_indices) - 1, columns, numel(col_indices)
        if self.rows < 1 or not 1 <= columns < <int64_t> 1 << 31:
            raise ValueError(f"a pattern must have rows and columns, got {self.rows} and {columns}")
        check_storage(crow_indices, "crow_indices")
        check_storage(col_indices, "col_indices")
        own, col_indices = crow_indices.clone(), col_indices.resolve_neg()
        cdef int32_t *ptr = <int32_t *> pointer(own, _int32, self.rows + 1, "crow_indices")
        for i in range(self.rows):
            if ptr[i + 1] < ptr[i] or <int64_t> ptr[i + 1] - ptr[i] > columns:
                raise ValueError(f"crow_indices must ascend, by at most {columns}")
        if ptr[0] != 0 or ptr[self.rows] != self.count:
            raise ValueError(f"crow_indices must ascend from 0 to {self.count}")
        cdef const int32_t *given = NULL
        if self.count:
            given = <const int32_t *> pointer(col_indices, _int32, self.count, "col_indices")
        cdef uint16_t *out = NULL
        columns_held = None
        if columns > WIDE:
            columns_held = col_indices.clone()
        elif self.count != self.rows * columns:
            columns_held = torch.empty(max(self.count, 1), dtype=_int16)
            out = <uint16_t *> pointer(columns_held, _int16, self.count, "col_indices")
        cdef int64_t bad
        with nogil:
            bad = qsp_narrow(given, ptr, self.rows, columns, out)
        if bad != self.count:
            raise ValueError(f"col_indices must ascend in each row and lie in [0, {columns}), got {given[bad]} at "
                             f"{bad}")
        self.ptr, self.column, self._held = ptr, out, (own, columns_held)
        if columns > WIDE and self.count:
            self.wide = <const int32_t *> pointer(columns_held, _int32, self.count, "col_indices")

    cdef int64_t check_layouts(self, int64_t groups, tuple phase, tuple shift, PlaneLayout x, PlaneLayout y) except -1:
        """Check that groups and taps make a convolution of this weight from planes x to y."""
        if groups < 1 or self.rows % groups or x.channels % groups or self.rows != y.grid.planes:
            raise ValueError(f"a pattern of {self.rows} rows in {groups} groups does not go with {y.grid.planes} "
                             f"planes of the output and {x.channels} channels of the input")
        if not phase or len(phase) != len(shift) or len(phase) * (x.channels // groups) != self.columns:
            raise ValueError(f"{len(phase)} taps, shifts of {len(shift)} and {x.channels // groups} channels of a "
                             f"group do not make {self.columns} columns")
        if not all([0 <= p < x.grid.planes // x.channels for p in phase]):
            raise ValueError(f"tap_phase must lie in [0, {x.grid.planes // x.channels}), got {list(phase)}")
        return 0

    @property
    def crow_indices(self):
        """First value of each row, int32."""
        return self._held[0].clone()

    @property
    def col_indices(self):
        """Column of each value, int32."""
        if self._held[1] is None:
            return torch.arange(self.columns, dtype=_int32).repeat(self.rows)
        if self.column == NULL:
            return self._held[1].clone()
        return self._held[1][:self.count].to(_int32) & 0xffff

    @property
    def nbytes(self):
        """Bytes that it holds."""
        return sum([t.nbytes for t in self._held if t is not None])

    def __repr__(self):
        return f"ValuePattern({self.rows} x {self.columns}, {self.count} values)"

    def __reduce__(self):
        return ValuePattern, (self.crow_indices, self.col_indices, self.columns)


cdef class DenseRows(ProductRows):
    """Rows of weights as a matrix with its zeros, int8; rows that read the same planes share a table of offsets.

    Parameters
    ----------
    pattern : ValuePattern
        (out_channels, in_channels / groups * taps).
    groups : int
        Of the convolution.
    tap_phase, tap_shift : sequence of int
        Of each tap the phase of the input that it reads, and by how many lanes it is further on there.
    source, target : PlaneLayout
        Of the input and the output, or with `swapped` of the output and the input.
    swapped : bool
        Whether rows are planes of the input, as its gradient wants it.

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
        if not all([-x.grid.pitch <= s <= x.grid.pitch for s in shift]):
            raise ValueError(f"tap_shift must lie within the {x.grid.pitch} lanes of a plane, got {shift}")
        self.dense.rows, self.dense.groups = self.rows, groups
        self.dense.value_rows, self.dense.columns = pattern.rows, pattern.columns
        self.dense.value_ptr, self.dense.column = pattern.ptr, pattern.column
        self._make_tables(phase, shift, x.channels)

    cdef int64_t _make_tables(self, list phase, list shift, int64_t channels) except -1:
        """Bands and their tables, of channels of the input; and where the columns of the values are in swapped rows."""
        cdef qsp_dense *d = &self.dense
        taps, groups = len(phase), d.groups
        phases = self.target.grid.planes // channels if self.swapped else 1
        inner, outer = channels // groups, d.value_rows // groups  # of a group
        pitch, front = self.source.grid.pitch, self.source.grid.front
        # of each band: rows, and the planes and offsets of its table
        bands = []
        tap = torch.arange(taps)
        tap_phase, tap_shift = torch.tensor(phase), torch.tensor(shift)
        for p in range(phases):
            for g in range(groups):
                if self.swapped:
                    own = tap[tap_phase == p]
                    plane = (g * outer + torch.arange(outer)).repeat(len(own))
                    offset = plane * pitch + front - tap_shift[own].repeat_interleave(outer)
                    first, last = p * channels + g * inner, p * channels + (g + 1) * inner
                else:
                    channel = g * inner + torch.arange(inner)
                    plane = (tap_phase * channels + channel[:, None]).flatten()
                    offset = plane * pitch + front + tap_shift.repeat(inner)
                    first, last = g * outer, (g + 1) * outer
                bands.append((first, last, plane, offset))
        size = max(plane.numel() for _, _, plane, _ in bands)
        if size > QSP_MAX_EXACT:
            raise ValueError(f"a row has {size} weights, of which an int32 holds the sum of {QSP_MAX_EXACT}")
        self._bands = PyBytes_FromStringAndSize(NULL, len(bands) * sizeof(qsp_band))
        cdef qsp_band *to = <qsp_band *> PyBytes_AS_STRING(self._bands)
        planes, offsets, entries = [], [], 0
        for first, last, plane, offset in bands:
            # padding repeats the last entry: memory that is in the cache, times zero
            rest = (QSP_GROUP - plane.numel() % QSP_GROUP) % QSP_GROUP
            planes += [plane, plane[plane.numel() - 1:].expand(rest)]
            offsets += [offset, offset[offset.numel() - 1:].expand(rest)]
            to.first, to.last, to.table, to.size = first, last, entries, plane.numel() + rest
            entries += plane.numel() + rest
            to += 1
        d.bands, d.band_count = <const qsp_band *> PyBytes_AS_STRING(self._bands), len(bands)
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
            place = torch.tensor([phase[:t].count(phase[t]) for t in range(taps)])
            row_of = (tap_phase * channels + torch.arange(inner)[:, None]).flatten().to(_int32)
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
        return len(self._bands) + sum([t.nbytes for t in self._held])

    def __repr__(self):
        return f"DenseRows({self.rows} rows, {self.slots} slots)"

    def __reduce__(self):
        return DenseRows, self._given
