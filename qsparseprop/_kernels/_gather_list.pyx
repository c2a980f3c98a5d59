"""Lists of the nonzeros that each row of a product has: where in the planes each reads, and which value goes there.

They are kept in little memory, see `qsp_nonzeros` in ``kernels.h``: two bytes a nonzero, none where nothing is zero,
and four more where the values are not in order. What the kernels want of a slot is made from that in each call, for
some rows at a time.
"""

from operator import index as whole

import torch

from libc.stdint cimport int32_t, int64_t, uint16_t
from libc.string cimport memcpy, memset

from qsparseprop._kernels._dispatch cimport QSP_GROUP, active_kernels, qsp_nonzeros
from qsparseprop._kernels._plan cimport PlaneLayout, ProductRows, ValuePattern
from qsparseprop._kernels._tensor cimport numel, pointer

from qsparseprop._kernels._tensor import check_storage

cdef enum:
    # a row of 2**31 - 1 bytes of planes is where int32 offsets end
    MAX_ROWS = 0x7ffffff0
    MOST = 0x7fffffff
    NARROW = 1 << 16  # places of a table that 16 bits number
    SMALL_LIST = 1 << 14  # slots up to which offsets are kept

cdef object _int16 = torch.int16
cdef object _int32 = torch.int32
cdef object _int64 = torch.int64

cdef extern from *:
    """
    static int qsp_ascending(const int32_t *v, int64_t n)
    {
        int ok = 1;
        for (int64_t i = 1; i < n; i++)
            ok &= v[i] >= v[i - 1];
        return ok;
    }
    """
    int qsp_ascending(const int32_t *v, int64_t n) noexcept nogil


cdef object _copy(object tensor, int64_t size, str name):
    """A tensor of our own, int32, with `size` elements of another one."""
    check_storage(tensor, name)
    cdef const void *given = pointer(tensor, _int32, size, name)
    own = torch.empty(size, dtype=_int32, device="cpu")
    if size:
        memcpy(pointer(own, _int32, size, name), given, size * sizeof(int32_t))
    return own


cdef const int32_t *_checked(object own, int64_t size, int64_t low, int64_t high, str name) except? NULL:
    """The numbers of a tensor of our own, which must lie in [low, high]."""
    cdef int32_t least = 0, greatest = -1
    cdef const int32_t *numbers
    if not size:
        return NULL
    numbers = <const int32_t *> pointer(own, _int32, size, name)
    active_kernels().extent(numbers, size, &least, &greatest)
    if least < low or greatest > high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {least} to {greatest}")
    return numbers


def _slots(group_ptr, offset, index, plane, PlaneLayout source not None, PlaneLayout target not None):
    return group_ptr, offset, index, plane, source, target


cdef class GatherList(ProductRows):
    """Rows of slots, each row padded to whole groups of four: offsets into packed planes, and which value goes there.

    Parameters
    ----------
    group_ptr : Tensor
        int32, (rows + 1,): first group of each row.
    offset : Tensor
        int32, (slots,): lanes from the start of a block of `source`.
    index : Tensor
        int32, (slots,): which value a slot holds, -1 for padding.
    plane : Tensor
        int32, (slots,): plane of `source` that the offset lies in.
    source, target : PlaneLayout
        What the offsets lead into, and what the rows are the planes of, on the same lanes.

    Attributes
    ----------
    group_ptr, offset, index, plane : Tensor
        Copies.
    rows, slots : int
    source, target : PlaneLayout
    nbytes : int
        Bytes that it holds, without those of a pattern that it shares.

    Raises
    ------
    TypeError, ValueError
        If a tensor is not as said, an offset leads out of the planes, or the layouts do not go together.
    """

    def __cinit__(self, *parts, **named):
        self._held = []
        if isinstance(self, PatternList):  # made from something else
            return
        group_ptr, offset, index, plane, source, target = _slots(*parts, **named)
        self._take_layouts(source, target, numel(group_ptr) - 1)
        self._take_slots(group_ptr, offset, index, plane)

    cdef int32_t *_hold(self, int64_t size) except? NULL:
        """Memory for so many numbers, which goes with the list."""
        own = torch.empty(max(size, 1), dtype=_int32, device="cpu")
        self._held.append(own)
        return <int32_t *> pointer(own, _int32, size, "memory")

    cdef int64_t _take_slots(self, object group_ptr, object offset, object index, object plane) except -1:
        cdef int64_t planes = self.source.grid.planes
        if not 0 <= self.rows < MAX_ROWS or self.rows != self.target.grid.planes:
            raise ValueError(f"group_ptr must have an element for each of the {self.target.grid.planes} planes of the "
                             f"target, and one more, got {self.rows + 1}")
        own = _copy(group_ptr, self.rows + 1, "group_ptr")
        cdef const int32_t *ptr = <const int32_t *> pointer(own, _int32, 0, "group_ptr")
        if ptr[0] != 0 or not qsp_ascending(ptr, self.rows + 1):
            raise ValueError("group_ptr must ascend from 0")
        self._held.append(own)
        self.nonzeros.rows, self.nonzeros.group_ptr = self.rows, ptr
        self.slots = QSP_GROUP * <int64_t> ptr[self.rows]
        offset, index = _copy(offset, self.slots, "offset"), _copy(index, self.slots, "index")
        plane = _copy(plane, self.slots, "plane")
        cdef const int32_t *o = _checked(offset, self.slots, 0, self._furthest(), "offset")
        cdef const int32_t *i = _checked(index, self.slots, -1, MOST, "index")
        cdef const int32_t *p = _checked(plane, self.slots, 0, planes - 1, "plane")
        # the table has each pair of offset and plane once
        distinct, code = torch.unique(offset.to(_int64) * planes + plane, return_inverse=True)
        pairs = [(distinct // planes).to(_int32), (distinct % planes).to(_int32)]
        self._held += pairs
        self.entries = numel(distinct)
        if self.slots:
            self.nonzeros.offset = <const int32_t *> pointer(pairs[0], _int32, 1, "offset")
            self.nonzeros.plane = <const int32_t *> pointer(pairs[1], _int32, numel(pairs[0]), "plane")
        self.last_offset = int(pairs[0].max()) if self.slots else -1
        self._take_nonzeros(o, i, p, code)
        self._find_step()
        return self._keep_offsets()

    cdef int64_t _take_nonzeros(self, const int32_t *offset, const int32_t *index, const int32_t *plane,
                                object code) except -1:
        """What is left of slots without the padding at the end of rows."""
        cdef int64_t size = self.entries, slot, i, n, row, k = 0
        cdef const int32_t *ptr = self.nonzeros.group_ptr
        cdef const int64_t *place = <const int64_t *> pointer(code, _int64, self.slots, "code") if self.slots else NULL
        cdef int32_t *first = self._hold(self.rows + 1)
        cdef int32_t *wide = NULL
        cdef int32_t *value = NULL
        cdef uint16_t *narrow = NULL
        cdef bint in_order = True
        first[0] = 0
        for row in range(self.rows):
            slot, n = QSP_GROUP * <int64_t> ptr[row], QSP_GROUP * (ptr[row + 1] - ptr[row])
            for _ in range(min(n, QSP_GROUP - 1)):  # a row has a nonzero in its last group
                if index[slot + n - 1] >= 0 or place[slot + n - 1] != place[slot + n - 2]:
                    break
                n -= 1
            for i in range(n):
                in_order = in_order and index[slot + i] == k + i
                self.last_index = max(self.last_index, index[slot + i])
            k += n
            if k > MOST:
                raise ValueError("a list must have less than 2**31 nonzeros")
            first[row + 1] = k
        if size > NARROW:
            self.nonzeros.wide = wide = self._hold(k)
        else:
            self._held.append(torch.empty(max(k, 1), dtype=_int16, device="cpu"))
            narrow = <uint16_t *> pointer(self._held[len(self._held) - 1], _int16, k, "code")
            self.nonzeros.code = narrow
        if not in_order:
            self.nonzeros.index = value = self._hold(k)
        self.nonzeros.first = first
        k = 0
        for row in range(self.rows):
            slot = QSP_GROUP * <int64_t> ptr[row]
            for i in range(slot, slot + first[row + 1] - first[row]):
                if not 0 <= place[i] < size:
                    raise RuntimeError("torch.unique has numbered what is not there")
                if narrow != NULL:
                    narrow[k] = <uint16_t> place[i]
                else:
                    wide[k] = <int32_t> place[i]
                if value != NULL:
                    value[k] = index[i]
                k += 1
        return 0

    cdef int64_t _find_step(self) except -1:
        """Where offsets ascend evenly, as of linear layers, they need not be looked up."""
        cdef const int32_t *offset = self.nonzeros.offset
        cdef int64_t i
        if self.entries < 2:
            return 0
        for i in range(2, self.entries):
            if <int64_t> offset[i] - offset[i - 1] != <int64_t> offset[1] - offset[0]:
                return 0
        self.nonzeros.step = max(0, offset[1] - offset[0])
        return 0

    cdef int64_t settle(self) except -1:
        """Make what products read, if there is anything that was not made with the list."""
        return 0

    cdef int64_t _keep_offsets(self) except -1:
        """Those of small lists: to write them out in each call would be felt, to keep them is not."""
        cdef int32_t *offset
        if 0 < self.slots <= SMALL_LIST:
            self.settle()
            offset = self._hold(self.slots)
            active_kernels().offsets(&self.nonzeros, 0, self.rows, offset)
            self.kept_offsets = offset
        return 0

    cdef object _expanded(self, const int32_t *table):
        """What a table has for each slot, or, without one, which value the slot holds."""
        cdef const qsp_nonzeros *n = &self.nonzeros
        cdef int64_t row, k, i, start, code
        self.settle()
        out = torch.empty(self.slots, dtype=_int32, device="cpu")
        cdef int32_t *to = <int32_t *> pointer(out, _int32, self.slots, "out") if self.slots else NULL
        for row in range(self.rows):
            start = 0 if n.table == NULL else n.table[row]
            for k in range(QSP_GROUP * <int64_t> n.group_ptr[row], QSP_GROUP * <int64_t> n.group_ptr[row + 1]):
                i = n.first[row] + k - QSP_GROUP * <int64_t> n.group_ptr[row]
                if table == NULL:
                    to[k] = -1 if i >= n.first[row + 1] else i if n.index == NULL else n.index[i]
                else:
                    i = min(i, n.first[row + 1] - 1)
                    if n.code != NULL:
                        code = n.code[i]
                    else:
                        code = i - n.first[row] if n.wide == NULL else n.wide[i]
                    to[k] = table[start + code]
        return out

    @property
    def group_ptr(self):
        """First group of each row."""
        return self._held[0].clone()

    @property
    def offset(self):
        """Lanes from the start of a block."""
        return self._expanded(self.nonzeros.offset)

    @property
    def index(self):
        """Which value a slot holds."""
        return self._expanded(NULL)

    @property
    def plane(self):
        """Plane that the offset lies in."""
        return self._expanded(self.nonzeros.plane)

    @property
    def nbytes(self):
        """Bytes that it holds, without those of a pattern that it shares."""
        return sum([t.nbytes for t in self._held])

    def __repr__(self):
        return f"GatherList({self.rows} rows, {self.slots} slots)"

    def __reduce__(self):
        return GatherList, (self.group_ptr, self.offset, self.index, self.plane, self.source, self.target)


cdef class PatternList(GatherList):
    """The list of a pattern's nonzeros. From input to output its codes are the pattern's columns themselves.

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
    pattern : ValuePattern
    swapped : bool

    Raises
    ------
    ValueError
        If these do not go together, or an offset leads out of the planes.
    """

    def __cinit__(self, ValuePattern pattern not None, int64_t groups, tap_phase, tap_shift,
                  PlaneLayout source not None, PlaneLayout target not None, bint swapped):
        cdef PlaneLayout x = target if swapped else source, y = source if swapped else target
        cdef int64_t taps, i
        phase, shift = tuple([whole(p) for p in tap_phase]), tuple([whole(s) for s in tap_shift])
        self._take_layouts(source, target, target.grid.planes)
        pattern.check_layouts(groups, phase, shift, x, y)
        self.pattern, self.swapped, self._taps, taps = pattern, swapped, (groups, phase, shift), len(phase)
        cdef int32_t *numbers
        own = torch.empty(2 * taps, dtype=_int32, device="cpu")
        numbers = <int32_t *> pointer(own, _int32, 2 * taps, "taps")
        for i in range(taps):
            numbers[i], numbers[taps + i] = phase[i], shift[i]
        cdef int32_t *ptr = self._hold(self.rows + 1)
        self.nonzeros.rows, self.nonzeros.group_ptr, self.last_index = self.rows, ptr, pattern.count - 1
        if swapped:
            self._sort(groups, numbers, taps, x.channels)
        else:
            self._number_rows()
        ptr[0] = 0
        for i in range(self.rows):
            ptr[i + 1] = ptr[i] + (self.nonzeros.first[i + 1] - self.nonzeros.first[i] + QSP_GROUP - 1) // QSP_GROUP
        self.slots = QSP_GROUP * <int64_t> ptr[self.rows]
        self._make_table(groups, numbers, numbers + taps, taps, x.channels)

    cdef int64_t _number_rows(self) except -1:
        """Nonzeros as the pattern has them, columns as codes."""
        cdef ValuePattern pattern = self.pattern
        self.nonzeros.first, self.nonzeros.wide = pattern.ptr, pattern.wide
        if pattern.column != NULL:
            self.nonzeros.code = pattern.column
        self.bits = pattern.bits
        return 0

    cdef int64_t settle(self) except -1:
        """The columns of bits, from now on: products of small batches would feel it if they were made in each. The
        weight gradient makes them for some rows at a time, so that where only it goes by a list nothing is kept.
        """
        if self.bits != NULL:
            columns = self.pattern.columns_for_lists()
            self._held.append(columns)
            self.nonzeros.code = <const uint16_t *> pointer(columns, _int16, self.pattern.count, "code")
            self.bits = NULL
        return 0

    cdef int64_t _sort(self, int64_t groups, const int32_t *phase, int64_t taps, int64_t channels) except -1:
        """Nonzeros in the order of the planes that they lead to; codes are the channel in its group, and the tap."""
        cdef ValuePattern p = self.pattern
        cdef int64_t outer = p.rows // groups, inner = channels // groups, row, i, c, k, group_row, code
        cdef int32_t *first = self._hold(self.rows + 1)
        cdef int32_t *index = self._hold(p.count)
        cdef int32_t *wide = NULL
        cdef uint16_t *narrow = NULL
        if outer * taps > NARROW:
            self.nonzeros.wide = wide = self._hold(p.count)
        else:
            self._held.append(torch.empty(max(p.count, 1), dtype=_int16, device="cpu"))
            narrow = <uint16_t *> pointer(self._held[len(self._held) - 1], _int16, p.count, "code")
            self.nonzeros.code = narrow
        cdef const uint16_t *narrow_column = NULL
        if p.wide == NULL and p.count:
            columns = p.columns_for_lists()
            narrow_column = <const uint16_t *> pointer(columns, _int16, p.count, "columns")
        # of each column the row of the first group, and the tap
        scratch = torch.empty(2 * p.columns + self.rows, dtype=_int32, device="cpu")
        cdef int32_t *row_of = <int32_t *> pointer(scratch, _int32, 2 * p.columns + self.rows, "scratch")
        cdef int32_t *tap_of = row_of + p.columns
        cdef int32_t *next_one = tap_of + p.columns
        with nogil:
            for c in range(p.columns):
                tap_of[c] = <int32_t> (c % taps)
                row_of[c] = <int32_t> (phase[c % taps] * channels + c // taps)
            memset(first, 0, (self.rows + 1) * sizeof(int32_t))
            for row in range(p.rows):
                group_row = row // outer * inner
                for i in range(p.ptr[row], p.ptr[row + 1]):
                    c = p.wide[i] if narrow_column == NULL else narrow_column[i]
                    first[row_of[c] + group_row + 1] += 1
            for row in range(self.rows):
                first[row + 1] += first[row]
                next_one[row] = first[row]
            for row in range(p.rows):
                group_row, code = row // outer * inner, row % outer * taps
                for i in range(p.ptr[row], p.ptr[row + 1]):
                    c = p.wide[i] if narrow_column == NULL else narrow_column[i]
                    k = next_one[row_of[c] + group_row]
                    next_one[row_of[c] + group_row] += 1
                    index[k] = <int32_t> i
                    if narrow != NULL:
                        narrow[k] = <uint16_t> (code + tap_of[c])
                    else:
                        wide[k] = <int32_t> (code + tap_of[c])
        self.nonzeros.first, self.nonzeros.index = first, index
        return 0

    cdef int64_t _make_table(self, int64_t groups, const int32_t *phase, const int32_t *shift, int64_t taps,
                             int64_t channels) except -1:
        """Offsets and planes of the codes of all groups, one group after the other."""
        cdef int64_t outer = self.pattern.rows // groups, inner = channels // groups
        cdef int64_t entries = groups * (outer if self.swapped else inner) * taps, i, row, group, place, tap, value
        cdef int64_t pitch = self.source.grid.pitch, front = self.source.grid.front, least = MOST, most = -1
        cdef int32_t *offset = self._hold(entries)
        cdef int32_t *plane = self._hold(entries)
        cdef int32_t *table = NULL
        for i in range(entries):
            # the channel of all groups, and the tap: of the output, which is all there is of planes, or of the input
            place, tap = i // taps, i % taps
            plane[i] = <int32_t> (place if self.swapped else phase[tap] * channels + place)
            value = plane[i] * pitch + front + (-shift[tap] if self.swapped else shift[tap])
            least, most = min(least, value), max(most, value)
            offset[i] = <int32_t> value
        if least < 0 or most > min(self._furthest(), MOST):
            raise ValueError(f"offsets must lie in [0, {self._furthest()}], got {least} to {most}")
        self.last_offset = <int32_t> most
        self.nonzeros.offset, self.nonzeros.plane, self.entries = offset, plane, entries
        self._find_step()
        if groups > 1:
            table = self._hold(self.rows)
            for row in range(self.rows):
                group = row % channels // inner if self.swapped else row // outer
                table[row] = <int32_t> (group * (entries // groups))
            self.nonzeros.table = table
        return self._keep_offsets()

    def __reduce__(self):
        return PatternList, (self.pattern, *self._taps, self.source, self.target, self.swapped)
