"""Products that keep the codes of a weight: see ``_kept.pyx``."""

from libc.stdint cimport int64_t

from qsparseprop._kernels._plan cimport ProductRows

cpdef int64_t multiply(object values, ProductRows rows, object scale, object zero_point, object clip, object planes,
                       object bias, object out, int threads, bint trained=*, float least=*, float greatest=*) except -1
