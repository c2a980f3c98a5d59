"""Steps of frozen models: see ``_frozen.pyx``."""

from libc.stdint cimport int64_t, uint8_t

from qsparseprop._kernels._dispatch cimport qsp_coded, qsp_kernels
from qsparseprop._kernels._plan cimport PlaneLayout


cdef class CodedBuffer:
    cdef readonly PlaneLayout layout
    cdef readonly int64_t start
    cdef readonly int64_t images
    cdef readonly int64_t view
    cdef readonly int64_t first
    cdef readonly int64_t channels
    cdef readonly int zero

    cdef void place(self, qsp_coded *to, uint8_t *arena) noexcept
    cdef int64_t end(self) noexcept
    cdef int64_t fill_tail(self, uint8_t *arena) noexcept


cdef class FrozenStep:
    cdef tuple _held  # what its pointers point into

    cdef int64_t last_byte(self) noexcept
    cdef int64_t run(self, uint8_t *arena, list tensors, const qsp_kernels *kernels, int threads) except -1


cdef object own_copy(object tensor, object dtype, int64_t size, str name)
cdef bint same_lanes(CodedBuffer a, CodedBuffer b) noexcept
