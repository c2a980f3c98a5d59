from libc.stdint cimport int64_t, uint64_t

from qsparseprop._kernels._dispatch cimport qsp_pack
from qsparseprop._kernels._plan cimport PlaneLayout
from qsparseprop._kernels._statistics cimport Scheme


cdef tuple pack_ranged(qsp_pack *a, int64_t rows, int64_t channels, object ranges, PlaneLayout layout, Scheme scheme,
                       int threads)
cdef int64_t pack_planes(qsp_pack *a, PlaneLayout layout, const int64_t *stride, bint codes, int threads) except -1
cdef uint64_t read_seed(object seed, Scheme scheme) except? 0
