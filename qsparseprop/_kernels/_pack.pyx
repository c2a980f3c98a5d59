"""The packer: tensors of any strides -> planes of lanes, as int8 codes or as floats."""

import torch

from cython.parallel cimport prange
from libc.math cimport INFINITY, isfinite
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport (
    QSP_BF16,
    QSP_F32,
    active_kernels,
    qsp_kernels,
    qsp_pack,
    qsp_range,
    qsp_view,
)
from qsparseprop._kernels._tensor cimport (
    check_lanes,
    numel,
    pointer,
    qsp_prefer_huge_pages,
    read_grid,
    read_views,
    strided_pointer,
)

cdef enum:
    MAX_VIEWS = 64
    MAX_PARTS = 256
    PLANES_PER_TASK = 64
    # elements below which starting threads costs more than it gives
    SERIAL_ELEMENTS = 1 << 15

cdef extern from "simd/common.h" nogil:
    float qsp_symmetric_scale(float absmax, float levels)
    float qsp_affine_scale(float low, float high, int32_t *zero_point)

cdef object _float32 = torch.float32
cdef object _int32 = torch.int32
cdef object _uint8 = torch.uint8

ABSMAX = 0
STOCHASTIC = 1
AFFINE = 2
SYMMETRIC = 3


cdef void _range_of(object x, const void *data, int dtype, bint whole, qsp_range *out, int threads) except *:
    """Range of all elements of `x`, each read once, in the order of its memory."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t size[8]
    cdef int64_t stride[8]
    cdef int64_t dims = 0, i, part, parts, outer, width = 4 if dtype == QSP_F32 else 2
    cdef qsp_range ranges[MAX_PARTS]
    shape, strides = x.shape, x.stride()
    if len(shape) > 8:
        raise ValueError(f"at most 8 dimensions, got shape {tuple(shape)}")
    # dimensions from the smallest stride on, those that follow each other without a gap taken as one
    for d in sorted((d for d in range(len(shape)) if shape[d] > 1 and strides[d]), key=strides.__getitem__):
        if dims and stride[dims - 1] * size[dims - 1] == strides[d]:
            size[dims - 1] *= shape[d]
        else:
            size[dims], stride[dims] = shape[d], strides[d]
            dims += 1
    out.absmax, out.min, out.max = 0, INFINITY, -INFINITY
    if dims == 0:
        size[0], stride[0], dims = 1, 1, 1
    outer = 1
    for i in range(1, dims):
        outer *= size[i]
    # one long run is cut into parts, many short ones are dealt out
    parts = 1 if size[0] * outer < SERIAL_ELEMENTS else min(<int64_t> MAX_PARTS, <int64_t> threads * 2)
    for part in range(parts):
        ranges[part].absmax, ranges[part].min, ranges[part].max = 0, INFINITY, -INFINITY
    for part in prange(parts, nogil=True, num_threads=threads, schedule="static", use_threads_if=parts > 1):
        _range_part(kernels, <const char *> data, dtype, whole, width, dims, size, stride, outer, part, parts,
                    &ranges[part])
    for part in range(parts):
        if not ranges[part].absmax <= out.absmax:
            out.absmax = ranges[part].absmax
            if out.absmax != out.absmax:
                return
        out.min, out.max = min(out.min, ranges[part].min), max(out.max, ranges[part].max)


cdef void _range_part(const qsp_kernels *kernels, const char *data, int dtype, bint whole, int64_t width, int64_t dims,
                      const int64_t *size, const int64_t *stride, int64_t outer, int64_t part, int64_t parts,
                      qsp_range *out) noexcept nogil:
    cdef int64_t first, last, i, rest, offset, d
    if outer == 1:
        first, last = size[0] * part // parts, size[0] * (part + 1) // parts
        kernels.range(data + width * first * stride[0], dtype, last - first, stride[0], whole, out)
        return
    for i in range(outer * part // parts, outer * (part + 1) // parts):
        rest, offset = i, 0
        for d in range(1, dims):
            offset += rest % size[d] * stride[d]
            rest //= size[d]
        kernels.range(data + width * offset, dtype, size[0], stride[0], whole, out)


def tensor_range(x, int threads):
    """Largest magnitude, minimum and maximum of a float32 or bfloat16 tensor of any strides.

    The magnitude is NaN where any element is; minimum and maximum then mean nothing.
    """
    cdef int dtype
    cdef qsp_range r
    cdef const void *data = strided_pointer(x, &dtype, "x")
    if x.numel() == 0:
        return 0.0, 0.0, 0.0
    _range_of(x, data, dtype, True, &r, max(threads, 1))
    return r.absmax, r.min, r.max


cdef int64_t _pack(qsp_pack *a, object x, object planes, object grid, object views, object planes_dtype, bint codes,
                   int threads) except -1:
    cdef qsp_view all_views[MAX_VIEWS]
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t i, count, blocks, chunks, task, tail, size = 1 if codes else sizeof(float)
    cdef const qsp_pack *args
    cdef qsp_pack each[MAX_VIEWS]
    read_grid(grid, &a.grid, "grid")
    count = read_views(views, &a.grid, x.shape, x.stride(), all_views, "x")
    a.images = x.shape[0]
    blocks = (a.images + a.grid.images - 1) // a.grid.images
    a.planes = pointer(planes, planes_dtype, blocks * a.grid.block, "planes")
    qsp_prefer_huge_pages(a.planes, size * numel(planes))
    for i in range(count):
        each[i] = a[0]
        each[i].view = all_views[i]
        check_lanes(&a.grid, &all_views[i], a.images, "x")
        chunks = (all_views[i].channels + PLANES_PER_TASK - 1) // PLANES_PER_TASK
        args = &each[i]
        if codes:
            for task in prange(blocks * chunks, nogil=True, num_threads=threads, schedule="static",
                               use_threads_if=blocks * a.grid.block > SERIAL_ELEMENTS):
                kernels.pack_u8(args, task // chunks, task % chunks * PLANES_PER_TASK,
                                min(args.view.channels, (task % chunks + 1) * PLANES_PER_TASK))
        else:
            for task in prange(blocks * chunks, nogil=True, num_threads=threads, schedule="static",
                               use_threads_if=blocks * a.grid.block > SERIAL_ELEMENTS):
                kernels.pack_f32(args, task // chunks, task % chunks * PLANES_PER_TASK,
                                 min(args.view.channels, (task % chunks + 1) * PLANES_PER_TASK))
    # behind the last plane is what pads the last image
    tail = numel(planes) - blocks * a.grid.block
    memset(<char *> a.planes + size * blocks * a.grid.block,
           a.zero_point[(x.shape[1] - 1) * a.stride] if codes else 0, size * tail)
    return 0


def pack(x, planes, grid, views, int threads):
    """Write `x` (images, channels, height, width), float32 or bfloat16, into `planes` (float32)."""
    cdef qsp_pack a
    memset(&a, 0, sizeof(a))
    a.tensor = strided_pointer(x, &a.dtype, "x")
    _pack(&a, x, planes, grid, views, _float32, False, max(threads, 1))


def quantize_pack(x, planes, scale, zero_point, grid, views, int scheme, uint64_t seed, int threads):
    """Quantise `x` and write its codes into `planes` (uint8), its scale and zero point into one-element tensors.

    ABSMAX, SYMMETRIC and STOCHASTIC are symmetric around 128; ABSMAX turns to 0..255 around 0 where no element is
    negative.
    AFFINE maps [min, max] to 0..255.
    """
    cdef qsp_pack a
    cdef qsp_range r
    cdef float s, inverse
    cdef int32_t zero
    memset(&a, 0, sizeof(a))
    cdef float *scale_p = <float *> pointer(scale, _float32, 1, "scale")
    cdef int32_t *zero_p = <int32_t *> pointer(zero_point, _int32, 1, "zero_point")
    threads = max(threads, 1)
    a.tensor = strided_pointer(x, &a.dtype, "x")
    if x.numel() == 0:
        r.absmax, r.min, r.max = 0, 0, 0
    else:
        _range_of(x, a.tensor, a.dtype, scheme == AFFINE, &r, threads)
    if not isfinite(r.absmax):
        # every element becomes a zero: the scale that is not finite keeps the result from looking like a number
        pointer(planes, _uint8, 0, "planes")
        planes.fill_(128)
        scale_p[0], zero_p[0] = r.absmax, 128
        return
    elif scheme == AFFINE:
        s = qsp_affine_scale(r.min, r.max, &zero)
        inverse = <float> 1 / s
    elif scheme == ABSMAX and r.min >= 0:
        s, zero = qsp_symmetric_scale(r.absmax, 255), 0
        inverse = <float> 1 / s
    elif scheme == ABSMAX or scheme == STOCHASTIC or scheme == SYMMETRIC:
        s, zero = qsp_symmetric_scale(r.absmax, 127), 128
        inverse = <float> 1 / s
    else:
        raise ValueError(f"unknown scheme {scheme}")
    a.inverse, a.zero_point, a.stride = &inverse, &zero, 0
    a.stochastic, a.seed = scheme == STOCHASTIC, seed
    _pack(&a, x, planes, grid, views, _uint8, True, threads)
    scale_p[0], zero_p[0] = s, zero
