from libc.stdint cimport int64_t

from qsparseprop._kernels._dispatch cimport qsp_pack


cdef void *matrix(object x, int *dtype, int64_t *rows, int64_t *channels, str name) except? NULL
cdef void *same_matrix(object x, object like, str name) except? NULL
cdef int64_t chunk_rows(int64_t channels) noexcept
cdef int team(int threads, int64_t elements) noexcept
cdef object pack_ranged(qsp_pack *a, object like, int64_t rows, int64_t channels, object images, object ranges,
                        object planes, object plane_scale, object zero_point, object grid, object views, str scheme,
                        object options, bint per_channel, int threads)
