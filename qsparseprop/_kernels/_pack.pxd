from libc.stdint cimport int64_t

from qsparseprop._kernels._dispatch cimport qsp_pack
from qsparseprop._kernels._plan cimport PlaneLayout
from qsparseprop._kernels._statistics cimport Scheme


cdef object pack_ranged(qsp_pack *a, int64_t rows, int64_t channels, object ranges, object planes, object plane_scale,
                        object zero_point, PlaneLayout layout, Scheme scheme, int threads)
