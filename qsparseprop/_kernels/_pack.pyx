"""The packer: tensors of any strides -> planes of lanes, as int8 codes or as floats."""

import torch

from qsparseprop._kernels._memory import empty

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.parallel cimport prange
from libc.math cimport NAN, isfinite
from libc.stdint cimport int32_t, int64_t, uint64_t
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
from qsparseprop._kernels._plan cimport PlaneLayout
from qsparseprop._kernels._statistics cimport Scheme, find_statistics
from qsparseprop._kernels._tensor cimport image_pointer, pointer, strides_t

cdef enum:
    # planes of a task: channels of a pixel are read together, unless threads would have nothing to do
    MOST_PLANES = 256
    LEAST_PLANES = 64
    TASKS_PER_THREAD = 4
    # elements below which starting threads costs more than it gives
    SERIAL_ELEMENTS = 1 << 15

cdef extern from "loops/scale.h" nogil:
    int qsp_is_random(const qsp_scheme *)
    int qsp_wants_moments(const qsp_scheme *)
    void qsp_raise_quiet(const qsp_scheme *, const qsp_range *, int64_t channels, int64_t planes, float *scale,
                         float *inverse)
    float qsp_scale(const qsp_scheme *, const qsp_range *, const qsp_moments *, int32_t *zero, float *inverse)

cdef object _cpu = torch.device("cpu")
cdef object _float32 = torch.float32
cdef object _int32 = torch.int32
cdef object _int64 = torch.int64
cdef object _uint8 = torch.uint8
cdef object _one_pixel = (1, 1)

cdef void _pack_part(const qsp_kernels *kernels, const qsp_pack *a, const qsp_view *views, int64_t count, int64_t view,
                     int64_t block, int64_t chunk, int64_t size, bint codes) noexcept nogil:
    """Planes of a part of the channels of a view, and of those behind it that have the same planes."""
    cdef int64_t plane = views[view].plane, channels = views[view].channels
    cdef int64_t first = chunk * size, last = min(channels, first + size)
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


cdef int64_t _pack_planes(qsp_pack *a, PlaneLayout layout, const int64_t *stride, object planes, object planes_dtype,
                          bint codes, int threads) except -1:
    """Pack a tensor of those strides; `a` has everything but the planes and the views."""
    a.planes = pointer(planes, planes_dtype, layout.lane_count(a.images), "planes")
    return pack_planes(a, layout, stride, codes, threads)


cdef int64_t pack_planes(qsp_pack *a, PlaneLayout layout, const int64_t *stride, bint codes, int threads) except -1:
    """The same where `a` has memory for all lanes of the planes."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t count = layout.count, blocks = layout.blocks(a.images), chunks, task, tail, part
    cdef int64_t size = 1 if codes else sizeof(float)
    cdef bytes held = layout.place(a.images, stride)
    cdef const qsp_view *each = <const qsp_view *> PyBytes_AS_STRING(held)
    part = MOST_PLANES
    if blocks * ((each[0].channels + MOST_PLANES - 1) // MOST_PLANES) < TASKS_PER_THREAD * threads:
        part = LEAST_PLANES
    chunks = (each[0].channels + part - 1) // part
    for task in prange(blocks * chunks * count, nogil=True, num_threads=threads, schedule="static",
                       use_threads_if=blocks * a.grid.block > SERIAL_ELEMENTS):
        _pack_part(kernels, a, each, count, task % count, task // count // chunks, task // count % chunks, part, codes)
    # behind the last plane is what pads its last image
    tail = layout.lane_count(a.images) - blocks * a.grid.block
    memset(<char *> a.planes + size * blocks * a.grid.block,
           a.zero_point[(a.grid.planes - 1) * a.stride] if codes else 0, size * tail)
    return 0


cdef void *_read_tensor(qsp_pack *a, object x, PlaneLayout layout, strides_t *where) except? NULL:
    """A tensor of that layout, with its images, shape and strides."""
    cdef void *data = image_pointer(x, where, &a.dtype, "x")
    a.images, a.grid = layout.check_shape(where.size, "x"), layout.grid
    return data


def pack(x, PlaneLayout layout not None, int threads):
    """The planes of `x` (images, channels, height, width), float32 or bfloat16: float32."""
    cdef qsp_pack a
    cdef strides_t where
    memset(&a, 0, sizeof(a))
    a.tensor = _read_tensor(&a, x, layout, &where)
    planes = empty((layout.lane_count(a.images),), _float32)
    _pack_planes(&a, layout, where.step, planes, _float32, False, max(threads, 1))
    return planes


cdef uint64_t read_seed(object seed, Scheme scheme) except? 0:
    """A seed, spread over 64 bits (finaliser of splitmix64); 0 where there is none."""
    cdef uint64_t z
    if seed is None:
        if scheme.random:
            raise ValueError(f"the scheme {scheme.name!r} needs a seed")
        return 0
    z = <uint64_t> (<const int64_t *> pointer(seed, _int64, 1, "seed"))[0]
    z += <uint64_t> 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * <uint64_t> 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t> 0x94D049BB133111EB
    return z ^ (z >> 31)


cdef bint find_scales(qsp_pack *a, const qsp_range *ranges, const qsp_moments *moments, int64_t channels,
                      int64_t count, bint pixels, float *scale, int32_t *zero_point) noexcept:
    """Scale, zero point and `a.inverse` of each plane from what is known of its channel; whether all are finite.

    `pixels`: images have several, as those of linear layers have not.
    """
    cdef int64_t i
    cdef bint finite = True
    for i in range(count):
        scale[i] = qsp_scale(&a.scheme, &ranges[i % channels], &moments[i % channels], zero_point + i,
                             <float *> a.inverse + i)
        finite = finite and isfinite(scale[i])
    if qsp_is_random(&a.scheme) and not pixels:
        qsp_raise_quiet(&a.scheme, ranges, channels, count, scale, <float *> a.inverse)
    return finite


cdef void blank_planes(const qsp_pack *a, object planes, const float *scales, bint per_channel) except *:
    """Make every code of the planes whose scale is not finite a zero."""
    cdef int64_t plane, block, blocks = (a.images + a.grid.images - 1) // a.grid.images
    if not per_channel:
        planes.fill_(128)
        return
    for plane in range(a.grid.planes):
        if not isfinite(scales[plane]):
            for block in range(blocks):
                memset(<char *> a.planes + block * a.grid.block + plane * a.grid.pitch + a.grid.front, 128,
                       a.grid.pitch - a.grid.front)


def quantize_pack(x, PlaneLayout layout not None, Scheme scheme not None, seed, int threads):
    """Quantise `x`: its codes in planes (uint8), and scale and zero point, tensors of one element.

    Symmetric schemes are around 128; "absmax" and "sawb" turn to 0..255 around 0 where no element is negative.
    "standard" maps [min, max] to 0..255. With a scale for each channel, scale and zero point have one element for each
    plane. `seed` is None, or an int64 scalar.
    """
    cdef qsp_pack a
    cdef qsp_range r
    cdef qsp_moments m
    cdef qsp_range *ranges = &r
    cdef qsp_moments *moments = &m
    cdef strides_t where
    cdef int64_t channels, count
    cdef float inverse
    cdef bytes scratch
    memset(&a, 0, sizeof(a))
    a.scheme = scheme.c
    threads = max(threads, 1)
    a.tensor = _read_tensor(&a, x, layout, &where)
    a.seed = read_seed(seed, scheme)
    channels, count = 1, 1
    if scheme.per_channel:
        channels, count = layout.channels, a.grid.planes
    planes = empty((layout.lane_count(a.images),), _uint8)
    scale = torch.empty(count, dtype=_float32, device=_cpu)
    zero_point = torch.empty(count, dtype=_int32, device=_cpu)
    cdef float *scale_p = <float *> pointer(scale, _float32, count, "scale")
    cdef int32_t *zero_p = <int32_t *> pointer(zero_point, _int32, count, "zero_point")
    if scheme.per_channel:
        scratch = PyBytes_FromStringAndSize(NULL, channels * (sizeof(qsp_moments) + sizeof(qsp_range))
                                            + count * sizeof(float))  # cheaper than a tensor
        moments = <qsp_moments *> PyBytes_AS_STRING(scratch)
        ranges = <qsp_range *> (moments + channels)
        a.inverse = <float *> (ranges + channels)
    else:
        a.inverse = &inverse
    find_statistics(&where, a.tensor, a.dtype, scheme.per_channel, &a.scheme, ranges, moments, threads)
    a.zero_point, a.stride = zero_p, scheme.per_channel
    finite = find_scales(&a, ranges, moments, channels, count, layout.image != _one_pixel, scale_p, zero_p)
    _pack_planes(&a, layout, where.step, planes, _uint8, True, threads)
    if not finite:
        blank_planes(&a, planes, scale_p, scheme.per_channel)
    return planes, scale, zero_point


cdef tuple pack_ranged(qsp_pack *a, int64_t rows, int64_t channels, object ranges, PlaneLayout layout, Scheme scheme,
                       int threads):
    """Pack what is computed on the way, rows of channels, of known ranges (least, greatest): float32, (channels, 2)."""
    cdef qsp_moments moments
    cdef qsp_range *found
    cdef int64_t stride[4]
    cdef int64_t i, count, pixels, each = channels if scheme.per_channel else 1
    cdef const float *given = <const float *> pointer(ranges, _float32, 2 * each, "ranges")
    a.scheme = scheme.c
    if a.gradient != NULL:
        follows = a.scheme.kind != QSP_AFFINE and not qsp_wants_moments(&a.scheme)
    else:
        follows = scheme.name in ("absmax", "symmetric", "standard")
    if not follows:  # the scale from the range, exactly as without packing on the way
        raise ValueError(f"the scheme {scheme.name!r} cannot be combined with batch normalisation or an activation")
    pixels = layout.image[0] * layout.image[1]
    if channels < 2 or layout.channels != channels or pixels == 0 or rows % pixels:
        raise ValueError(f"rows must be those of whole images of {layout.image[0]} x {layout.image[1]} pixels with "
                         f"{layout.channels} channels, at least 2, got {rows} rows of {channels} channels")
    a.grid, a.images = layout.grid, rows // pixels
    count = a.grid.planes if scheme.per_channel else 1
    planes = empty((layout.lane_count(a.images),), _uint8)
    scale = torch.empty(count, dtype=_float32, device=_cpu)
    zero_point = torch.empty(count, dtype=_int32, device=_cpu)
    cdef float *scale_p = <float *> pointer(scale, _float32, count, "scale")
    cdef int32_t *zero_p = <int32_t *> pointer(zero_point, _int32, count, "zero_point")
    cdef bytes scratch = PyBytes_FromStringAndSize(NULL, each * sizeof(qsp_range) + count * sizeof(float))
    found = <qsp_range *> PyBytes_AS_STRING(scratch)
    a.inverse = <float *> (found + each)
    memset(&moments, 0, sizeof(moments))
    for i in range(each):
        found[i].min, found[i].max = min(<float> 0, given[2 * i]), max(<float> 0, given[2 * i + 1])
        found[i].absmax = max(-found[i].min, found[i].max)
        if not isfinite(given[2 * i]) or not isfinite(given[2 * i + 1]):
            found[i].absmax = NAN
    a.zero_point, a.stride = zero_p, scheme.per_channel
    finite = find_scales(a, found, &moments, each, count, layout.image != _one_pixel, scale_p, zero_p)
    stride[0], stride[1], stride[2], stride[3] = pixels * channels, 1, layout.image[1] * channels, channels
    _pack_planes(a, layout, stride, planes, _uint8, True, max(threads, 1))
    if not finite:
        blank_planes(a, planes, scale_p, scheme.per_channel)
    return planes, scale, zero_point
