"""Dense rows, checked once when they are made: see ``_dense_rows.pyx``."""

from libc.stdint cimport int64_t

from qsparseprop._kernels._dispatch cimport qsp_dense
from qsparseprop._kernels._plan cimport ProductRows, ValuePattern


cdef class DenseRows(ProductRows):
    cdef qsp_dense dense
    cdef readonly ValuePattern pattern
    cdef readonly bint swapped
    cdef tuple _given
    cdef tuple _held
    cdef bytes _bands
    cdef object _bits

    cdef object _of_slots(self, object table)
    cdef int64_t _make_tables(self, list phase, list shift, int64_t channels) except -1
