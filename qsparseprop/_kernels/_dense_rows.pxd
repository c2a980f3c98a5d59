"""Dense rows, checked once when they are made: see ``_dense_rows.pyx``."""

from libc.stdint cimport int32_t, int64_t, uint16_t

from qsparseprop._kernels._dispatch cimport qsp_dense
from qsparseprop._kernels._plan cimport PlaneLayout, ProductRows


cdef class ValuePattern:
    cdef const int32_t *ptr
    cdef const uint16_t *column  # NULL where every row has all columns, or where they want 32 bits
    cdef const int32_t *wide
    cdef readonly int64_t rows
    cdef readonly int64_t columns
    cdef readonly int64_t count
    cdef tuple _held

    cdef inline int64_t column_of(self, int64_t row, int64_t value) noexcept nogil:
        if self.column != NULL:
            return self.column[value]
        return value - self.ptr[row] if self.wide == NULL else self.wide[value]

    cdef int64_t check_layouts(self, int64_t groups, tuple phase, tuple shift, PlaneLayout x, PlaneLayout y) except -1


cdef class DenseRows(ProductRows):
    cdef qsp_dense dense
    cdef readonly ValuePattern pattern
    cdef readonly bint swapped
    cdef tuple _given
    cdef tuple _held
    cdef bytes _bands

    cdef object _of_slots(self, object table)
    cdef int64_t _make_tables(self, list phase, list shift, int64_t channels) except -1
