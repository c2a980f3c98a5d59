"""The packer: tensors of any strides -> planes of lanes, as int8 codes or as floats."""

import torch

from cython.parallel cimport prange
from libc.math cimport INFINITY, isfinite
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from qsparseprop._kernels._dispatch cimport (
    QSP_F32,
    QSP_NEED_ABSMAX,
    QSP_NEED_MAX,
    QSP_NEED_MIN,
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

cdef enum:
    _ABSMAX
    _STOCHASTIC
    _AFFINE
    _SYMMETRIC

ABSMAX, STOCHASTIC, AFFINE, SYMMETRIC = _ABSMAX, _STOCHASTIC, _AFFINE, _SYMMETRIC


cdef int64_t _memory_order(object x, int without, int64_t *size, int64_t *stride) except -1:
    """Dimensions of `x` but `without`, from the smallest stride on; those that follow each other without a gap as one.

    Returns how many, at least one. Dimensions that repeat the same elements are left out.
    """
    cdef int64_t dims = 0
    if without < 0 and x.is_contiguous():  # the common case, without the sorting
        size[0], stride[0] = x.numel(), 1
        return 1
    shape, strides = x.shape, x.stride()
    if len(shape) > 8:
        raise ValueError(f"at most 8 dimensions, got shape {tuple(shape)}")
    kept = (d for d in range(len(shape)) if shape[d] > 1 and strides[d] and d != without)
    for d in sorted(kept, key=strides.__getitem__):
        if dims and stride[dims - 1] * size[dims - 1] == strides[d]:
            size[dims - 1] *= shape[d]
        else:
            size[dims], stride[dims] = shape[d], strides[d]
            dims += 1
    if dims == 0:
        size[0], stride[0], dims = 1, 1, 1
    return dims


cdef void _range_of(object x, const void *data, int dtype, bint whole, qsp_range *out, int threads) except *:
    """Range of all elements of `x`, each read once, in the order of its memory."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t size[8]
    cdef int64_t stride[8]
    cdef int64_t dims, i, part, parts, outer, width = 4 if dtype == QSP_F32 else 2
    cdef qsp_range ranges[MAX_PARTS]
    dims = _memory_order(x, -1, size, stride)
    out.absmax, out.min, out.max = 0, INFINITY, -INFINITY
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


ctypedef struct _channels:
    const char *data
    int64_t width  # of an element, in bytes
    int dtype, need
    int64_t dims
    int64_t size[9]
    int64_t stride[9]
    int64_t channel  # dimension of the channel, 0 where channels are neighbours in memory
    int64_t channels, outer, parts
    int64_t state_size  # floats for one part


cdef void _channels_part(const qsp_kernels *kernels, const _channels *a, int64_t part, float *states) noexcept nogil:
    cdef int64_t first = 0, last = a.size[0], begin = 0, end = a.outer, i, d, rest, place, offset, channel
    cdef float *state = states + part * a.state_size
    if a.outer == 1:
        first, last = a.size[0] * part // a.parts, a.size[0] * (part + 1) // a.parts
    else:
        begin, end = a.outer * part // a.parts, a.outer * (part + 1) // a.parts
    for i in range(begin, end):
        rest, offset, channel = i, first * a.stride[0], 0
        for d in range(1, a.dims):
            place = rest % a.size[d]
            rest //= a.size[d]
            offset += place * a.stride[d]
            if d == a.channel:
                channel = place
        if a.channel == 0:
            kernels.range_channels(a.data + a.width * offset, a.dtype, last - first, a.stride[0], a.channels, a.need,
                                   state)
        else:
            kernels.range_channels(a.data + a.width * offset, a.dtype, last - first, a.stride[0], 0, a.need,
                                   state + 48 * channel)


cdef void _channel_ranges(object x, const void *data, int dtype, int need, qsp_range *out, int threads) except *:
    """Range of each channel (second dimension) of `x`, zero taken in, in one pass in the order of memory."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef _channels a
    cdef int64_t c, d, i, part, step, padded
    cdef uint32_t bits, greatest
    cdef float *states
    cdef const float *state
    cdef const _channels *args = &a
    a.data, a.dtype, a.need, a.width = <const char *> data, dtype, need, 4 if dtype == QSP_F32 else 2
    a.channels = x.shape[1]
    a.dims = _memory_order(x, 1, a.size, a.stride)
    padded = (a.channels + 15) // 16 * 16
    if x.stride(1) == 1 and a.channels > 1:
        a.channel, a.state_size, step = 0, 3 * padded, 1
    else:  # the channel is a loop among those around the innermost one
        d = 1
        while d < a.dims and a.stride[d] < x.stride(1):
            d += 1
        for i in range(a.dims, d, -1):
            a.size[i], a.stride[i] = a.size[i - 1], a.stride[i - 1]
        a.size[d], a.stride[d], a.channel = a.channels, x.stride(1), d
        a.dims += 1
        a.state_size, step, padded = 48 * a.channels, 16, 16
    a.outer = 1
    for i in range(1, a.dims):
        a.outer *= a.size[i]
    a.parts = 1 if x.numel() < SERIAL_ELEMENTS else min(threads, MAX_PARTS)
    states = <float *> calloc(a.parts * a.state_size, sizeof(float))
    if states == NULL:
        raise MemoryError(f"the ranges of {a.channels} channels do not fit into memory")
    for part in prange(a.parts, nogil=True, num_threads=threads, schedule="static", use_threads_if=a.parts > 1):
        _channels_part(kernels, args, part, states)
    for c in range(a.channels):
        greatest = 0
        out[c].min = out[c].max = 0
        for part in range(a.parts):
            # where channels are neighbours each has one place, otherwise sixteen
            state = states + part * a.state_size + (c if step == 1 else 48 * c)
            for i in range(step):
                memcpy(&bits, state + i, sizeof(bits))
                greatest = max(greatest, bits)
                out[c].min = min(out[c].min, state[padded + i])
                out[c].max = max(out[c].max, state[2 * padded + i])
        memcpy(&out[c].absmax, &greatest, sizeof(greatest))
    free(states)


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
        if a.stride and all_views[i].plane % all_views[i].channels:
            raise ValueError(f"view {i} must start at a multiple of {all_views[i].channels} planes, since each of its "
                             f"channels has a scale, got {all_views[i].plane}")
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
    # behind the last plane is what pads its last image
    tail = numel(planes) - blocks * a.grid.block
    memset(<char *> a.planes + size * blocks * a.grid.block,
           a.zero_point[(a.grid.planes - 1) * a.stride] if codes else 0, size * tail)
    return 0


def pack(x, planes, grid, views, int threads):
    """Write `x` (images, channels, height, width), float32 or bfloat16, into `planes` (float32)."""
    cdef qsp_pack a
    memset(&a, 0, sizeof(a))
    a.tensor = strided_pointer(x, &a.dtype, "x")
    _pack(&a, x, planes, grid, views, _float32, False, max(threads, 1))


cdef float _scale_of(const qsp_range *r, int scheme, int32_t *zero, float *inverse) noexcept nogil:
    """Scale of a range, with its reciprocal and zero point.

    Where an element is NaN or Inf all become zeros, and the scale keeps the result from looking like a number.
    """
    cdef float scale
    zero[0] = 128
    if not isfinite(r.absmax):
        inverse[0] = 0
        return r.absmax
    if scheme == _AFFINE:
        scale = qsp_affine_scale(r.min, r.max, zero)
    elif scheme == _ABSMAX and r.min >= 0:
        scale, zero[0] = qsp_symmetric_scale(r.absmax, 255), 0
    else:
        scale = qsp_symmetric_scale(r.absmax, 127)
    inverse[0] = <float> 1 / scale
    return scale


cdef void _blank_planes(const qsp_pack *a, object scale, int64_t blocks) except *:
    """Make every code of the planes whose scale is not finite a zero."""
    cdef int64_t plane, block
    cdef const float *scales = <const float *> <uintptr_t> scale.data_ptr()
    for plane in range(a.grid.planes):
        if not isfinite(scales[plane]):
            for block in range(blocks):
                memset(<char *> a.planes + block * a.grid.block + plane * a.grid.pitch + a.grid.front, 128,
                       a.grid.pitch - a.grid.front)


def quantize_pack(x, planes, scale, zero_point, grid, views, int scheme, bint per_channel, uint64_t seed, int threads):
    """Quantise `x` and write its codes into `planes` (uint8), its scale and zero point into tensors of one element.

    ABSMAX, SYMMETRIC and STOCHASTIC are symmetric around 128; ABSMAX turns to 0..255 around 0 where no element is
    negative. AFFINE maps [min, max] to 0..255. With `per_channel` every channel has its own scale, and `scale` and
    `zero_point` one element for each plane of the grid.
    """
    cdef qsp_pack a
    cdef qsp_range r
    cdef qsp_range *ranges = &r
    cdef int64_t channels, count, i
    cdef float inverse
    cdef bint finite = True
    memset(&a, 0, sizeof(a))
    if not _ABSMAX <= scheme <= _SYMMETRIC:
        raise ValueError(f"unknown scheme {scheme}")
    threads = max(threads, 1)
    a.tensor = strided_pointer(x, &a.dtype, "x")
    read_grid(grid, &a.grid, "grid")
    if x.ndim != 4:
        raise ValueError(f"x must have 4 dimensions, got shape {tuple(x.shape)}")
    channels, count = x.shape[1] if per_channel else 1, a.grid.planes if per_channel else 1
    if channels < 1 or count % channels:
        raise ValueError(f"a scale for each of {channels} channels does not go with {count} planes")
    cdef float *scale_p = <float *> pointer(scale, _float32, count, "scale")
    cdef int32_t *zero_p = <int32_t *> pointer(zero_point, _int32, count, "zero_point")
    cdef int need = QSP_NEED_MAX if scheme == _AFFINE else QSP_NEED_MIN if scheme == _ABSMAX else QSP_NEED_ABSMAX
    if per_channel:
        scratch = torch.empty(count + channels * sizeof(qsp_range) // sizeof(float), dtype=_float32)
        a.inverse = <float *> pointer(scratch, _float32, 1, "scratch")
        ranges = <qsp_range *> (a.inverse + count)
    else:
        a.inverse = &inverse
    if x.numel() == 0:
        memset(ranges, 0, channels * sizeof(qsp_range))
    elif per_channel:
        _channel_ranges(x, a.tensor, a.dtype, need, ranges, threads)
    else:
        _range_of(x, a.tensor, a.dtype, scheme == _AFFINE, &r, threads)
    for i in range(count):
        scale_p[i] = _scale_of(&ranges[i % channels], scheme, zero_p + i, <float *> a.inverse + i)
        finite = finite and isfinite(scale_p[i])
    if not finite and not per_channel:
        pointer(planes, _uint8, 0, "planes")
        planes.fill_(128)
        return
    a.zero_point, a.stride = zero_p, per_channel
    a.stochastic, a.seed = scheme == _STOCHASTIC, seed
    _pack(&a, x, planes, grid, views, _uint8, True, threads)
    if not finite:
        _blank_planes(&a, scale, (a.images + a.grid.images - 1) // a.grid.images)
