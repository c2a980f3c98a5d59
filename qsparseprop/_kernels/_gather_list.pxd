"""Lists of nonzeros, checked once when they are made: see ``_gather_list.pyx``."""

from libc.stdint cimport int32_t, int64_t, uint64_t

from qsparseprop._kernels._dispatch cimport qsp_nonzeros
from qsparseprop._kernels._plan cimport PlaneLayout, ProductRows, ValuePattern


cdef class GatherList(ProductRows):
    cdef qsp_nonzeros nonzeros
    cdef int64_t last_index
    cdef int64_t entries  # of the tables
    cdef const int32_t *kept_offsets  # of all slots, or NULL
    cdef const uint64_t *bits  # of a pattern: the columns, as long as nobody has settled the list; or NULL
    cdef list _held

    cdef int32_t *_hold(self, int64_t size) except? NULL
    cdef int64_t _take_slots(self, object group_ptr, object offset, object index, object plane) except -1
    cdef int64_t _take_nonzeros(self, const int32_t *offset, const int32_t *index, const int32_t *plane,
                                object code) except -1
    cdef int64_t _find_step(self) except -1
    cdef int64_t settle(self) except -1
    cdef int64_t _keep_offsets(self) except -1
    cdef object _expanded(self, const int32_t *table)


cdef class PatternList(GatherList):
    cdef readonly ValuePattern pattern
    cdef readonly bint swapped
    cdef tuple _taps

    cdef int64_t _number_rows(self) except -1
    cdef int64_t _make_table(self, int64_t groups, const int32_t *phase, const int32_t *shift, int64_t taps,
                             int64_t channels) except -1
    cdef int64_t _sort(self, int64_t groups, const int32_t *phase, int64_t taps, int64_t channels) except -1
