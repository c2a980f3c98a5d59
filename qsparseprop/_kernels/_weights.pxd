"""The weights of products, and scratch memory: see ``_weights.pyx``."""

from libc.stdint cimport int64_t

from qsparseprop._kernels._dense_rows cimport DenseRows
from qsparseprop._kernels._dispatch cimport qsp_nonzeros, qsp_weight
from qsparseprop._kernels._plan cimport ProductRows

cdef bint as_dense(ProductRows rows, bint codes) except -1
cdef int64_t parts_of(int64_t slots, int64_t rows, int threads) noexcept nogil
cdef int64_t cut_rows(const qsp_nonzeros *l, int64_t first, int64_t last, int64_t chunk, int64_t chunks) noexcept nogil
cdef object take_scratch(int64_t size)
cdef int64_t give_scratch(object scratch) except -1
cdef int64_t per_channel(object tensor, int64_t channels, str name) except -1
cdef object take_weights(qsp_weight *a, ProductRows rows, object values, object factor, object zero_point, object clip)
cdef int64_t quantize_slots(const qsp_weight *a, int64_t first, int64_t last, int threads) except -1
cdef int64_t quantize_dense(const qsp_weight *a, DenseRows rows, int threads) except -1
