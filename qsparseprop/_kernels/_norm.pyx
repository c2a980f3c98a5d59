"""Batch normalisation with its activation, and the gradients of both, on tensors of (rows, channels)."""

import torch

from cython.parallel cimport prange
from libc.math cimport NAN, fabs, isfinite, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport (
    QSP_AFFINE,
    QSP_F32,
    QSP_U8,
    active_kernels,
    qsp_kernels,
    qsp_moments,
    qsp_norm,
    qsp_norm_grad,
    qsp_pack,
    qsp_range,
    qsp_scheme,
)
from qsparseprop._kernels._pack cimport blank_planes, find_scales, pack_planes
from qsparseprop._kernels._statistics cimport read_scheme
from qsparseprop._kernels._tensor cimport numel, pointer, read_grid, strided_pointer

cdef extern from "simd/scale.h" nogil:
    int qsp_wants_moments(const qsp_scheme *)

cdef enum:
    # elements below which starting threads costs more than it gives
    SERIAL_ELEMENTS = 1 << 15
    # elements of a chunk of rows: summed up in single precision, and read twice from the second cache
    CHUNK_ELEMENTS = 1 << 16
    CHUNK_ROWS = 1 << 12

cdef object _float32 = torch.float32
cdef object _float64 = torch.float64
cdef object _uint8 = torch.uint8
cdef object _int16 = torch.int16
cdef object _int32 = torch.int32


cdef void *matrix(object x, int *dtype, int64_t *rows, int64_t *channels, str name) except? NULL:
    """A contiguous (rows, channels) tensor of float32 or bfloat16."""
    return matrix_of(strided_pointer(x, dtype, name), x, rows, channels, name)


cdef void *matrix_of(void *data, object x, int64_t *rows, int64_t *channels, str name) except? NULL:
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous with 2 dimensions (rows, channels), got shape {tuple(x.shape)} "
                         f"with strides {x.stride()}")
    rows[0], channels[0] = x.shape
    return data


cdef void *same_matrix(object x, object like, str name) except? NULL:
    """Data of a tensor that has the shape and dtype of another one; NULL for None."""
    cdef int dtype
    cdef int64_t rows, channels
    if x is None:
        return NULL
    if not isinstance(x, torch.Tensor) or x.shape != like.shape or x.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype} of shape {tuple(like.shape)}")
    return matrix(x, &dtype, &rows, &channels, name)


cdef int64_t chunk_rows(int64_t channels) noexcept:
    return max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // max(channels, 1)))


cdef int team(int threads, int64_t elements) noexcept:
    return threads if threads > 1 and elements > SERIAL_ELEMENTS else 1


cdef object _moments(const void *x, int dtype, int64_t rows, int64_t channels, int threads):
    """A tensor that starts with mean, sum of squared distances from it, least and greatest element of each channel."""
    cdef int64_t k, c, chunk, chunks, width, n, done
    cdef double mean, step
    cdef const qsp_kernels *kernels = active_kernels()
    cdef const char *data = <const char *> x
    chunk = chunk_rows(channels)
    chunks = (rows + chunk - 1) // chunk
    parts = torch.empty((chunks, channels, 4), dtype=_float64)
    cdef double *part = <double *> pointer(parts, _float64, 0, "parts")
    cdef double *first
    cdef double *other
    width = channels * (4 if dtype == QSP_F32 else 2)
    threads = team(threads, rows * channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.norm_moments(data + k * chunk * width, dtype, min(chunk, rows - k * chunk), channels,
                             part + 4 * k * channels)
    for k in range(1, chunks):
        done, n = k * chunk, min(chunk, rows - k * chunk)
        for c in range(channels):
            first, other = part + 4 * c, part + 4 * (k * channels + c)
            step = other[0] - first[0]
            mean = first[0] + step * n / (done + n)
            first[1] += other[1] + step * step * done * n / (done + n)
            first[0], first[2], first[3] = mean, min(first[2], other[2]), max(first[3], other[3])
    return parts


def moments(x, int threads):
    """Mean, sum of squared distances from it, least and greatest element of each channel: float64, (channels, 4).

    `x` is (rows, channels), float32 or bfloat16, contiguous, with at least one row.
    """
    cdef int dtype
    cdef int64_t channels, rows
    cdef const void *data = matrix(x, &dtype, &rows, &channels, "x")
    if not rows:
        raise ValueError("the moments of no elements are not defined")
    return _moments(data, dtype, rows, channels, threads)[0].clone()


cdef float *_channel_vector(object tensor, int64_t channels, str name) except? NULL:
    """Data of a contiguous float32 tensor of one element a channel; NULL for None."""
    if tensor is None:
        return NULL
    cdef void *data = pointer(tensor, _float32, channels, name)
    if numel(tensor) != channels:
        raise ValueError(f"{name} must have {channels} elements, got {numel(tensor)}")
    return <float *> data


def statistics(x, weight, bias, running_mean, running_var, double momentum, double eps, bint training, bint save,
               int threads):
    """What batch normalisation of `x` (rows, channels) multiplies and adds: see `norm_ops.norm_statistics`."""
    cdef int dtype
    cdef int64_t rows, c, n
    cdef const double *m = NULL
    cdef double mean, variance, rstd, scale, shift, step, least, most
    cdef float low, high
    cdef const void *data = matrix(x, &dtype, &rows, &n, "x")
    cdef const float *gamma = _channel_vector(weight, n, "weight")
    cdef const float *beta = _channel_vector(bias, n, "bias")
    cdef float *known_mean = _channel_vector(running_mean, n, "running_mean")
    cdef float *known_variance = _channel_vector(running_var, n, "running_var")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together, or neither")
    if not training and running_mean is None:
        raise ValueError("without batch statistics running_mean and running_var must be given")
    if not eps >= 0 or (training and eps == 0):
        raise ValueError(f"eps must be positive, or 0 without batch statistics, got {eps}")
    if training and rows == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    if training or save:
        parts = _moments(data, dtype, rows, n, threads) if rows else torch.zeros((1, n, 4), dtype=_float64)
        m = <const double *> pointer(parts, _float64, 4 * n, "parts")
    singles, doubles = torch.empty((6, n), dtype=_float32), torch.empty((7, n), dtype=_float64)
    cdef float *f = <float *> pointer(singles, _float32, 6 * n, "singles")
    cdef double *d = <double *> pointer(doubles, _float64, 7 * n, "doubles")
    with nogil:
        for c in range(n):
            if training:
                mean, variance = m[4 * c], m[4 * c + 1] / max(rows, 1)
                if known_mean != NULL and rows:
                    known_mean[c] = <float> (momentum * mean + (1 - momentum) * known_mean[c])
                    known_variance[c] = <float> (momentum * (m[4 * c + 1] / (rows - 1))
                                                 + (1 - momentum) * known_variance[c])
            else:
                mean, variance = known_mean[c], known_variance[c]
            rstd = 1 / sqrt(variance + eps)
            scale = rstd * gamma[c] if gamma != NULL else rstd
            shift = beta[c] - mean * scale if beta != NULL else -mean * scale
            f[c], f[n + c] = <float> scale, <float> shift
            step = least = low = high = NAN
            if m != NULL:
                least, most = m[4 * c + 2], m[4 * c + 3]
                step = (most - least) / 255
                if not step > 0:
                    step = 1
                # where the kernels put the ends; a mean that is not finite tells of elements that are not
                low, high = <float> least * f[c] + f[n + c], <float> most * f[c] + f[n + c]
                if not isfinite(m[4 * c]) or not isfinite(low) or not isfinite(high):
                    low = high = NAN
            f[2 * n + c], f[3 * n + c] = <float> (1 / step), <float> (-least / step - 128)
            f[4 * n + c], f[5 * n + c] = (high, low) if high < low else (low, high)
            d[c], d[n + c], d[2 * n + c] = mean, variance, rstd
            d[3 * n + c], d[4 * n + c] = step * rstd, (least - mean) * rstd
            d[5 * n + c], d[6 * n + c] = step, least
    return singles, doubles


def factors(sums, statistics, weight, int64_t count, bint batch_statistics):
    """What the gradient of batch normalisation is made of: see `norm_ops.norm_factors`."""
    cdef int64_t c, n
    cdef double total, normalised, k
    cdef float rest, other, bound
    if statistics.ndim != 2 or statistics.shape[0] != 7:
        raise ValueError(f"the statistics must be of shape (7, channels), got {tuple(statistics.shape)}")
    n = statistics.shape[1]
    cdef const double *s = <const double *> pointer(statistics, _float64, 7 * n, "statistics")
    cdef const double *t = <const double *> pointer(sums, _float64, 3 * n, "sums")
    if numel(sums) != 3 * n:
        raise ValueError(f"the sums must be of shape ({n}, 3), got {tuple(sums.shape)}")
    cdef const float *gamma = _channel_vector(weight, n, "weight")
    if count < 0:
        raise ValueError(f"the count must not be negative, got {count}")
    count = max(count, 1)  # without rows all sums are 0
    singles, doubles = torch.empty((4, n), dtype=_float32), torch.empty((3, n), dtype=_float64)
    cdef float *f = <float *> pointer(singles, _float32, 4 * n, "singles")
    cdef double *d = <double *> pointer(doubles, _float64, 3 * n, "doubles")
    with nogil:
        for c in range(n):
            total, k = t[3 * c], s[2 * n + c]
            if gamma != NULL:
                k = k * gamma[c]
            normalised = s[3 * n + c] * t[3 * c + 1] + s[4 * n + c] * total
            f[c] = <float> k
            f[n + c] = f[2 * n + c] = 0
            if batch_statistics:
                f[n + c] = <float> (-k * s[3 * n + c] * normalised / count)
                f[2 * n + c] = <float> (-k * (total + s[4 * n + c] * normalised) / count)
            # in the order of the kernel's roundings; the last term is for what is not finite
            rest, other = fabs(f[2 * n + c]), fabs(<float> 255 * f[n + c] + f[2 * n + c])
            bound = <float> t[3 * c + 2] * <float> fabs(f[c])
            if not other <= rest:
                rest = other
            f[3 * n + c] = bound + rest + <float> 0 * <float> total
            d[c], d[n + c] = normalised, total
            d[2 * n + c] = 0 * (k * total) + 0.0 if batch_statistics else k * total
    return singles, doubles


def norm(x, residual, out, scale, shift, float low, float high, code_scale, code_shift, codes, mask, int threads):
    """out = clamp(x * scale + shift + residual, low, high); codes and mask for the backward pass where they are given.

    `x`, `residual` (or None) and `out` are alike, (rows, channels); scale, shift, code_scale and code_shift float32,
    (channels,); codes uint8 (rows, channels) or None: 128 + round(x * code_scale + code_shift) in 0..255; mask int16
    (rows, ceil(channels / 16)): bit i of a word whether low < element i < high.
    """
    cdef qsp_norm a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t k, chunk, chunks, rows = _read_norm(&a, x, residual, scale, shift, low, high, code_scale, code_shift,
                                                     codes, mask)
    _refuse_codes(&a)
    a.out = same_matrix(out, x, "out")
    if rows * a.channels == 0:
        return
    chunk = chunk_rows(a.channels)
    cdef const qsp_norm *args = &a
    chunks = (rows + chunk - 1) // chunk
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.norm(args, k * chunk, min(rows, (k + 1) * chunk))


cdef int64_t _read_norm(qsp_norm *a, object x, object residual, object scale, object shift, float low, float high,
                        object code_scale, object code_shift, object codes, object mask) except -1:
    cdef int64_t rows
    memset(a, 0, sizeof(a[0]))
    if isinstance(x, torch.Tensor) and x.dtype is _uint8:
        if residual is not None or codes is not None:
            raise TypeError("codes (uint8) as x go neither with a residual nor with codes to be saved")
        a.dtype, a.x = QSP_U8, matrix_of(pointer(x, _uint8, 0, "x"), x, &rows, &a.channels, "x")
    else:
        a.x = matrix(x, &a.dtype, &rows, &a.channels, "x")
    a.residual = same_matrix(residual, x, "residual")
    a.words = (a.channels + 15) // 16
    a.scale = <const float *> pointer(scale, _float32, a.channels, "scale")
    a.shift = <const float *> pointer(shift, _float32, a.channels, "shift")
    a.low, a.high = low, high
    if codes is not None:
        a.codes = <uint8_t *> pointer(codes, _uint8, rows * a.channels, "codes")
        a.code_scale = <const float *> pointer(code_scale, _float32, a.channels, "code_scale")
        a.code_shift = <const float *> pointer(code_shift, _float32, a.channels, "code_shift")
        a.mask = <uint16_t *> pointer(mask, _int16, rows * a.words, "mask")
    return rows


cdef int _refuse_codes(const qsp_norm *a) except -1:
    if a.dtype == QSP_U8:
        raise TypeError("x must be of dtype torch.float32 or torch.bfloat16, got torch.uint8")
    return 0


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
    if a.norm_grad != NULL or a.act_grad != NULL:
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


def norm_range(x, residual, scale, shift, float low, float high, int threads):
    """Least and greatest element of each channel of what `norm` gives: float32, (channels, 2).

    NaN where an element is not finite.
    """
    cdef qsp_norm a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t k, chunk, chunks, rows = _read_norm(&a, x, residual, scale, shift, low, high, None, None, None, None)
    _refuse_codes(&a)
    if not rows:
        raise ValueError("the range of no elements is not defined")
    chunk = chunk_rows(a.channels)
    chunks = (rows + chunk - 1) // chunk
    parts = torch.empty((chunks, a.channels, 2), dtype=_float32)
    cdef float *part = <float *> pointer(parts, _float32, 0, "parts")
    cdef const qsp_norm *args = &a
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.norm_range(args, k * chunk, min(rows, (k + 1) * chunk), part + 2 * k * args.channels)
    return torch.stack([parts[:, :, 0].amin(0), parts[:, :, 1].amax(0)], 1)


def norm_pack(x, residual, out, scale, shift, float low, float high, code_scale, code_shift, codes, mask, images,
              ranges, planes, plane_scale, zero_point, grid, views, str scheme, bint per_channel,
              int threads):
    """What `norm` does, the result packed as `quantize_pack` does; `out` may be None.

    `ranges` are bounds of the result, float32 (channels, 2), or (1, 2) without `per_channel`: least and greatest. `x`
    may be codes (uint8), read as the numbers 0 to 255, where only the packed result is wanted.
    """
    cdef qsp_norm a
    cdef qsp_pack p
    cdef int64_t rows = _read_norm(&a, x, residual, scale, shift, low, high, code_scale, code_shift, codes, mask)
    memset(&p, 0, sizeof(p))
    if out is not None:
        _refuse_codes(&a)
    a.out = same_matrix(out, x, "out")
    p.dtype, p.norm = a.dtype, &a
    pack_ranged(&p, x, rows, a.channels, images, ranges, planes, plane_scale, zero_point, grid, views, scheme, (),
                per_channel, threads)


def norm_grad_pack(dy, codes, mask, factor, dresidual, images, ranges, planes, plane_scale, zero_point, grid, views,
                   str scheme, options, bint per_channel, uint64_t seed, int threads):
    """What `norm_grad` does, dx packed as `quantize_pack` does; for `ranges` see `norm_pack`."""
    cdef qsp_norm_grad a
    cdef qsp_pack p
    cdef int64_t rows = _read_gradient(&a, dy, codes, mask)
    memset(&p, 0, sizeof(p))
    a.factor = <const float *> pointer(factor, _float32, 3 * a.channels, "factor")
    a.dresidual = same_matrix(dresidual, dy, "dresidual")
    p.dtype, p.norm_grad, p.seed = a.dtype, &a, seed
    pack_ranged(&p, dy, rows, a.channels, images, ranges, planes, plane_scale, zero_point, grid, views, scheme, options,
                per_channel, threads)


cdef int64_t _read_gradient(qsp_norm_grad *a, object dy, object codes, object mask) except -1:
    cdef int64_t rows
    memset(a, 0, sizeof(a[0]))
    a.dy = matrix(dy, &a.dtype, &rows, &a.channels, "dy")
    a.words = (a.channels + 15) // 16
    a.codes = <const uint8_t *> pointer(codes, _uint8, rows * a.channels, "codes")
    a.mask = <const uint16_t *> pointer(mask, _int16, rows * a.words, "mask")
    return rows


def norm_sums(dy, codes, mask, int threads):
    """Of each channel the sums of the masked gradient and of gradient * code, and the former's greatest magnitude.

    float64, (channels, 3).
    """
    cdef qsp_norm_grad a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t i, k, chunk, chunks, rows = _read_gradient(&a, dy, codes, mask)
    chunk = chunk_rows(a.channels)
    chunks = (rows + chunk - 1) // chunk
    parts = torch.empty((chunks, a.channels, 3), dtype=_float64)
    cdef double *part = <double *> pointer(parts, _float64, 0, "parts")
    cdef const qsp_norm_grad *args = &a
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.norm_sums(args, k * chunk, min(rows, (k + 1) * chunk), part + 3 * k * args.channels)
    out = torch.zeros((a.channels, 3), dtype=_float64)
    cdef double *total = <double *> pointer(out, _float64, 0, "out")
    for k in range(chunks):  # in this order, whatever the number of threads
        for i in range(3 * a.channels):
            if i % 3 == 2:
                total[i] = max(total[i], part[3 * k * a.channels + i])
            else:
                total[i] += part[3 * k * a.channels + i]
    return out


def norm_grad(dy, codes, mask, factor, dx, dresidual, int threads):
    """dx = g * factor[0] + code * factor[1] + factor[2] with g the masked gradient, which `dresidual` takes (or None).

    `factor` is float32, (3, channels).
    """
    cdef qsp_norm_grad a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t k, chunk, chunks, rows = _read_gradient(&a, dy, codes, mask)
    a.factor = <const float *> pointer(factor, _float32, 3 * a.channels, "factor")
    a.dx, a.dresidual = same_matrix(dx, dy, "dx"), same_matrix(dresidual, dy, "dresidual")
    if rows * a.channels == 0:
        return
    chunk = chunk_rows(a.channels)
    cdef const qsp_norm_grad *args = &a
    chunks = (rows + chunk - 1) // chunk
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.norm_grad(args, k * chunk, min(rows, (k + 1) * chunk))
