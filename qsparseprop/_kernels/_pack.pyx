"""The packer: tensors of any strides -> planes of lanes, as int8 codes or as floats."""

import torch

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.parallel cimport prange
from libc.math cimport NAN, isfinite
from libc.stdint cimport int32_t, int64_t, uint64_t, uintptr_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport (
    QSP_AFFINE,
    active_kernels,
    qsp_kernels,
    qsp_moments,
    qsp_pack,
    qsp_range,
    qsp_scheme,
    qsp_view,
)
from qsparseprop._kernels._statistics cimport find_statistics, read_scheme
from qsparseprop._kernels._tensor cimport (
    check_lanes,
    numel,
    pointer,
    read_grid,
    read_views,
    strided_pointer,
)

cdef enum:
    PLANES_PER_TASK = 64
    # elements below which starting threads costs more than it gives
    SERIAL_ELEMENTS = 1 << 15

cdef extern from "loops/scale.h" nogil:
    int qsp_wants_moments(const qsp_scheme *)
    float qsp_scale(const qsp_scheme *, const qsp_range *, const qsp_moments *, int32_t *zero, float *inverse)

cdef object _float32 = torch.float32
cdef object _int32 = torch.int32
cdef object _uint8 = torch.uint8

cdef void _pack_part(const qsp_kernels *kernels, const qsp_pack *a, const qsp_view *views, int64_t count, int64_t view,
                     int64_t block, int64_t chunk, bint codes) noexcept nogil:
    """Planes of a part of the channels of a view, and of those behind it that have the same planes."""
    cdef int64_t plane = views[view].plane, channels = views[view].channels
    cdef int64_t first = chunk * PLANES_PER_TASK, last = min(channels, first + PLANES_PER_TASK)
    cdef qsp_pack one
    if view and views[view - 1].plane == plane:  # done with the first of them, which owns the gaps
        return
    one = a[0]
    while view < count and views[view].plane == plane:
        one.view = views[view]
        if codes:
            kernels.pack_u8(&one, block, first, last)
        else:
            kernels.pack_f32(&one, block, first, last)
        one.filled = 1
        view += 1


cdef int64_t pack_planes(qsp_pack *a, object shape, object stride, object planes, object views, object planes_dtype,
                         bint codes, int threads) except -1:
    """Pack a tensor of that shape and those strides; `a` has everything but the planes, the views and the images."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t i, count, blocks, chunks, task, tail, size = 1 if codes else sizeof(float)
    cdef bytes held = read_views(views, &a.grid, shape, stride, "x")
    cdef const qsp_view *each = <const qsp_view *> PyBytes_AS_STRING(held)
    count = len(held) // sizeof(qsp_view)
    a.images = shape[0]
    blocks = (a.images + a.grid.images - 1) // a.grid.images
    a.planes = pointer(planes, planes_dtype, blocks * a.grid.block, "planes")
    for i in range(count):
        check_lanes(&a.grid, &each[i], a.images, "x")
        if a.stride and each[i].plane % each[i].channels:
            raise ValueError(f"view {i} must start at a multiple of {each[i].channels} planes, since each of its "
                             f"channels has a scale, got {each[i].plane}")
    chunks = (each[0].channels + PLANES_PER_TASK - 1) // PLANES_PER_TASK
    for task in prange(blocks * chunks * count, nogil=True, num_threads=threads, schedule="static",
                       use_threads_if=blocks * a.grid.block > SERIAL_ELEMENTS):
        _pack_part(kernels, a, each, count, task % count, task // count // chunks, task // count % chunks, codes)
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
    read_grid(grid, &a.grid, "grid")
    pack_planes(&a, x.shape, x.stride(), planes, views, _float32, False, max(threads, 1))


cdef bint find_scales(qsp_pack *a, const qsp_range *ranges, const qsp_moments *moments, int64_t channels,
                      int64_t count, float *scale, int32_t *zero_point) noexcept:
    """Scale, zero point and `a.inverse` of each plane from what is known of its channel; whether all are finite."""
    cdef int64_t i
    cdef bint finite = True
    for i in range(count):
        scale[i] = qsp_scale(&a.scheme, &ranges[i % channels], &moments[i % channels], zero_point + i,
                             <float *> a.inverse + i)
        finite = finite and isfinite(scale[i])
    return finite


cdef void blank_planes(const qsp_pack *a, object planes, object scale, bint per_channel) except *:
    """Make every code of the planes whose scale is not finite a zero."""
    cdef int64_t plane, block, blocks = (a.images + a.grid.images - 1) // a.grid.images
    cdef const float *scales = <const float *> <uintptr_t> scale.data_ptr()
    if not per_channel:
        planes.fill_(128)
        return
    for plane in range(a.grid.planes):
        if not isfinite(scales[plane]):
            for block in range(blocks):
                memset(<char *> a.planes + block * a.grid.block + plane * a.grid.pitch + a.grid.front, 128,
                       a.grid.pitch - a.grid.front)


def quantize_pack(x, planes, scale, zero_point, grid, views, str scheme, options, bint per_channel, uint64_t seed,
                  int threads):
    """Quantise `x` and write its codes into `planes` (uint8), its scale and zero point into tensors of one element.

    Symmetric schemes are around 128; "absmax" and "sawb" turn to 0..255 around 0 where no element is negative.
    "standard" maps [min, max] to 0..255. With `per_channel` every channel has its own scale, and `scale` and
    `zero_point` one element for each plane of the grid.
    """
    cdef qsp_pack a
    cdef qsp_range r
    cdef qsp_moments m
    cdef qsp_range *ranges = &r
    cdef qsp_moments *moments = &m
    cdef int64_t channels, count
    cdef float inverse
    cdef bytes scratch
    memset(&a, 0, sizeof(a))
    read_scheme(scheme, options, 8, False, &a.scheme)
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
    if per_channel:
        scratch = PyBytes_FromStringAndSize(NULL, channels * (sizeof(qsp_moments) + sizeof(qsp_range))
                                            + count * sizeof(float))  # cheaper than a tensor
        moments = <qsp_moments *> PyBytes_AS_STRING(scratch)
        ranges = <qsp_range *> (moments + channels)
        a.inverse = <float *> (ranges + channels)
    else:
        a.inverse = &inverse
    find_statistics(x, a.tensor, a.dtype, per_channel, &a.scheme, ranges, moments, threads)
    a.zero_point, a.stride, a.seed = zero_p, per_channel, seed
    finite = find_scales(&a, ranges, moments, channels, count, scale_p, zero_p)
    pack_planes(&a, x.shape, x.stride(), planes, views, _uint8, True, threads)
    if not finite:
        blank_planes(&a, planes, scale, per_channel)


cdef object pack_ranged(qsp_pack *a, object like, int64_t rows, int64_t channels, object images, object ranges,
                        object planes, object plane_scale, object zero_point, object grid, object views, str scheme,
                        object options, bint per_channel, int threads):
    """Pack what is computed on the way, of known ranges (least, greatest): float32, (channels, 2).

    `images` is the shape, (images, channels, height, width), of the tensor `like`, which is (rows, channels).
    """
    cdef qsp_moments moments
    cdef qsp_range *found
    cdef int64_t i, count, each = channels if per_channel else 1
    cdef const float *given = <const float *> pointer(ranges, _float32, 2 * each, "ranges")
    read_scheme(scheme, options, 8, False, &a.scheme)
    if a.gradient != NULL:
        follows = a.scheme.kind != QSP_AFFINE and not qsp_wants_moments(&a.scheme)
    else:
        follows = scheme in ("absmax", "symmetric", "standard")
    if not follows:  # the scale from the range, exactly as without packing on the way
        raise ValueError(f"the scheme {scheme!r} cannot be combined with batch normalisation or an activation")
    if channels < 2 or len(images) != 4 or images[1] != channels or images[0] * images[2] * images[3] != rows:
        raise ValueError(f"the images must have at least 2 channels and {rows} rows of {channels} channels, got shape "
                         f"{tuple(images)}")
    read_grid(grid, &a.grid, "grid")
    count = a.grid.planes if per_channel else 1
    if count % each:
        raise ValueError(f"a scale for each of {each} channels does not go with {count} planes")
    cdef float *scale_p = <float *> pointer(plane_scale, _float32, count, "plane_scale")
    cdef int32_t *zero_p = <int32_t *> pointer(zero_point, _int32, count, "zero_point")
    scratch = torch.empty(each * sizeof(qsp_range) + count * sizeof(float), dtype=_uint8)
    found = <qsp_range *> pointer(scratch, _uint8, 1, "scratch")
    a.inverse = <float *> (found + each)
    memset(&moments, 0, sizeof(moments))
    for i in range(each):
        found[i].min, found[i].max = min(<float> 0, given[2 * i]), max(<float> 0, given[2 * i + 1])
        found[i].absmax = max(-found[i].min, found[i].max)
        if not isfinite(given[2 * i]) or not isfinite(given[2 * i + 1]):
            found[i].absmax = NAN
    a.zero_point, a.stride = zero_p, per_channel
    finite = find_scales(a, found, &moments, each, count, scale_p, zero_p)
    pack_planes(a, images, like.view(images[0], images[2], images[3], channels).permute(0, 3, 1, 2).stride(), planes,
                views, _uint8, True, max(threads, 1))
    if not finite:
        blank_planes(a, planes, plane_scale, per_channel)
