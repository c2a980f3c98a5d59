"""Dense rows, checked once when they are made: see ``_dense_rows.pyx``."""

from libc.stdint cimport int32_t, int64_t, uint16_t

from qsparseprop._kernels._dispatch cimport qsp_dense
from qsparseprop._kernels._plan cimport ProductRows


cdef class ValuePattern:
    cdef const int32_t *ptr
    cdef const uint16_t *column  # NULL where every row has all columns
    cdef readonly int64_t rows
    cdef readonly int64_t columns
    cdef readonly int64_t count
    cdef tuple _held


cdef class DenseRows(ProductRows):
    cdef qsp_dense dense
    cdef readonly ValuePattern pattern
    cdef readonly bint swapped
    cdef tuple _given
    cdef tuple _held
    cdef bytes _bands

    cdef object _of_slots(self, object table)
    cdef int64_t _make_tables(self, list phase, list shift, int64_t channels) except -1
