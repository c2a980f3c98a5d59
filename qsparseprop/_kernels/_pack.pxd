from libc.stdint cimport int32_t, int64_t

from qsparseprop._kernels._dispatch cimport qsp_moments, qsp_pack, qsp_range


cdef bint find_scales(qsp_pack *a, const qsp_range *ranges, const qsp_moments *moments, int64_t channels,
                      int64_t count, float *scale, int32_t *zero_point) noexcept
cdef int64_t pack_planes(qsp_pack *a, object shape, object stride, object planes, object views, object planes_dtype,
                         bint codes, int threads) except -1
cdef void blank_planes(const qsp_pack *a, object planes, object scale, bint per_channel) except *
