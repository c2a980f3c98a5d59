"""Quantisation of whole tensors, and back."""

import torch

from cython.parallel cimport prange
from libc.math cimport isfinite
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport (
    QSP_BF16,
    QSP_F32,
    active_kernels,
    qsp_kernels,
    qsp_moments,
    qsp_quantize,
    qsp_range,
    qsp_scheme,
)
from qsparseprop._kernels._statistics cimport find_statistics, read_scheme
from qsparseprop._kernels._tensor cimport numel, pointer, strided_pointer, strides_t

cdef enum:
    # elements of a task, and below which threads cost more than they give
    TASK = 1 << 14
    SERIAL = 1 << 15

cdef extern from "loops/scale.h" nogil:
    float qsp_scale(const qsp_scheme *, const qsp_range *, const qsp_moments *, int32_t *zero, float *inverse)

cdef int64_t MOST = 0x3fffffffffffffff

cdef object _float32 = torch.float32
cdef object _bfloat16 = torch.bfloat16
cdef object _int32 = torch.int32
cdef object _int8 = torch.int8
cdef object _uint8 = torch.uint8


cdef int64_t _lines(qsp_quantize *a, int64_t channels, int64_t inner, int64_t group) except -1:
    """Cut a tensor of a.count elements into lines; returns how many.

    Groups of consecutive elements have a scale each (channels = 0), or channels with `inner` neighbours each, or all
    elements share one (channels = 1).
    """
    if channels == 0:
        a.length, a.own = min(group, max(a.count, 1)), True
        a.scales = (a.count + a.length - 1) // a.length
        return a.scales
    a.scales = channels
    if channels == 1:
        a.length = TASK
    elif inner == 1:
        a.length, a.each = channels, True
    else:
        a.length = inner
    return (a.count + a.length - 1) // a.length


def quantize(x, codes, scale, zero_point, int64_t channels, int64_t inner, int64_t group, str scheme, int bits, options,
             uint64_t seed, int threads):
    """Quantise a contiguous tensor seen as (outer, channels, inner), or as groups of `group` elements (channels = 0).

    `codes` are int8 around 0 or uint8; `scale` and `zero_point` have an element for each channel or group.
    """
    cdef qsp_quantize a
    cdef qsp_range *ranges
    cdef qsp_moments *moments
    cdef strides_t where
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t lines, each, tasks, task, i, around_zero = codes.dtype is _int8
    memset(&a, 0, sizeof(a))
    read_scheme(scheme, options, bits, around_zero, &a.scheme)
    a.count, a.seed = numel(x), seed
    if not x.is_contiguous() or channels < 0 or inner < 1 or (channels == 0 and group < 1):
        raise ValueError(f"x must be contiguous and its sizes positive, got {channels}, {inner}, {group}")
    if channels and (inner > MOST // channels or a.count % (channels * inner)):  # whose product fits into 64 bits
        raise ValueError(f"{a.count} elements are not made of {channels} channels of {inner}")
    a.x = strided_pointer(x, &a.dtype, "x")
    a.codes = pointer(codes, _int8 if around_zero else _uint8, a.count, "codes")
    lines = _lines(&a, channels, inner, group)
    a.scale = <float *> pointer(scale, _float32, a.scales, "scale")
    a.zero_point = <int32_t *> pointer(zero_point, _int32, a.scales, "zero_point")
    threads = max(threads, 1)
    size = sizeof(float) if a.own else sizeof(qsp_moments) + sizeof(qsp_range) + sizeof(float)
    scratch = torch.empty(a.scales * size, dtype=_uint8, device="cpu")
    if a.own:
        a.inverse = <float *> pointer(scratch, _uint8, 0, "scratch")
    else:
        moments = <qsp_moments *> pointer(scratch, _uint8, 0, "scratch")
        ranges = <qsp_range *> (moments + a.scales)
        a.inverse = <float *> (ranges + a.scales)
        where.dims, where.size[0], where.size[1], where.size[2] = 3, a.count // (channels * inner), channels, inner
        where.step[0], where.step[1], where.step[2] = channels * inner, inner, 1
        find_statistics(&where, a.x, a.dtype, channels > 1 and a.count > 0, &a.scheme, ranges, moments, threads)
        for i in range(a.scales):
            # without elements there is one range only
            a.scale[i] = qsp_scale(&a.scheme, &ranges[i if a.count else 0], &moments[i if a.count else 0],
                                   a.zero_point + i, a.inverse + i)
    each = max(1, TASK // max(a.length, 1))
    tasks = (lines + each - 1) // each
    cdef const qsp_quantize *args = &a
    for task in prange(tasks, nogil=True, num_threads=threads, schedule="static",
                       use_threads_if=threads > 1 and a.count > SERIAL):
        kernels.quantize(args, task * each, min(lines, (task + 1) * each))
    if a.each:
        for i in range(a.scales):
            if not isfinite(a.scale[i]):
                codes.view(-1, channels)[:, i] = 0 if around_zero else a.zero_point[i]
    if around_zero:
        memset(a.zero_point, 0, a.scales * sizeof(int32_t))


def dequantize(codes, scale, zero_point, out, int64_t channels, int64_t inner, int64_t group, int threads):
    """out = (codes - zero_point) * scale, with the arguments of `quantize`; `out` is float32 or bfloat16."""
    cdef qsp_quantize a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t lines, each, tasks, task
    memset(&a, 0, sizeof(a))
    a.scheme.around_zero = codes.dtype is _int8
    a.count = numel(codes)
    if channels < 0 or inner < 1 or (channels == 0 and group < 1):
        raise ValueError(f"sizes must be positive, got {channels}, {inner}, {group}")
    if channels and (inner > MOST // channels or a.count % (channels * inner)):  # whose product fits into 64 bits
        raise ValueError(f"{a.count} elements are not made of {channels} channels of {inner}")
    a.codes = pointer(codes, _int8 if a.scheme.around_zero else _uint8, a.count, "codes")
    lines = _lines(&a, channels, inner, group)
    a.scale = <float *> pointer(scale, _float32, a.scales, "scale")
    a.zero_point = <int32_t *> pointer(zero_point, _int32, a.scales, "zero_point")
    a.dtype = QSP_BF16 if out.dtype is _bfloat16 else QSP_F32
    a.out = pointer(out, _bfloat16 if a.dtype == QSP_BF16 else _float32, a.count, "out")
    threads = max(threads, 1)
    each = max(1, TASK // max(a.length, 1))
    tasks = (lines + each - 1) // each
    cdef const qsp_quantize *args = &a
    for task in prange(tasks, nogil=True, num_threads=threads, schedule="static",
                       use_threads_if=threads > 1 and a.count > SERIAL):
        kernels.dequantize(args, task * each, min(lines, (task + 1) * each))
