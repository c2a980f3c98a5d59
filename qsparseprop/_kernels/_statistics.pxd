from qsparseprop._kernels._dispatch cimport qsp_moments, qsp_range, qsp_scheme
from qsparseprop._kernels._tensor cimport strides_t


cdef class Scheme:
    cdef qsp_scheme c
    cdef readonly str name
    cdef readonly tuple options
    cdef readonly bint per_channel


cdef void read_scheme(str name, object options, int bits, bint around_zero, qsp_scheme *out) except *
cdef void find_statistics(const strides_t *x, const void *data, int dtype, bint per_channel, const qsp_scheme *scheme,
                          qsp_range *ranges, qsp_moments *moments, int threads) except *
cdef void channel_totals(const strides_t *x, const void *data, int dtype, float *out, int threads) except *
