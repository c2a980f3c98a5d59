from libc.stdint cimport int64_t

from qsparseprop._kernels._dispatch cimport qsp_pack


cdef object pack_ranged(qsp_pack *a, object like, int64_t rows, int64_t channels, object images, object ranges,
                        object planes, object plane_scale, object zero_point, object grid, object views, str scheme,
                        object options, bint per_channel, int threads)
