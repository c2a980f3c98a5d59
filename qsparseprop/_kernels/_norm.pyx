"""Batch normalisation with its activation, and the gradients of both, on tensors of (rows, channels)."""

import torch

from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint8_t, uint16_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport (
    QSP_F32,
    active_kernels,
    qsp_kernels,
    qsp_norm,
    qsp_norm_grad,
)
from qsparseprop._kernels._tensor cimport pointer, qsp_prefer_huge_pages, strided_pointer

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


cdef void *_matrix(object x, int *dtype, int64_t *rows, int64_t *channels, str name) except? NULL:
    """A contiguous (rows, channels) tensor of float32 or bfloat16."""
    cdef void *data = strided_pointer(x, dtype, name)
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous with 2 dimensions (rows, channels), got shape {tuple(x.shape)} "
                         f"with strides {x.stride()}")
    rows[0], channels[0] = x.shape
    return data


cdef void *_same(object x, object like, str name) except? NULL:
    """Data of a tensor that has the shape and dtype of another one; NULL for None."""
    cdef int dtype
    cdef int64_t rows, channels
    if x is None:
        return NULL
    if not isinstance(x, torch.Tensor) or x.shape != like.shape or x.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype} of shape {tuple(like.shape)}")
    return _matrix(x, &dtype, &rows, &channels, name)


cdef int64_t _chunk_rows(int64_t channels) noexcept:
    return max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // max(channels, 1)))


cdef int _team(int threads, int64_t elements) noexcept:
    return threads if threads > 1 and elements > SERIAL_ELEMENTS else 1


def moments(x, int threads):
    """Mean, sum of squared distances from it, least and greatest element of each channel: float64, (channels, 4).

    `x` is (rows, channels), float32 or bfloat16, contiguous, with at least one row.
    """
    cdef int dtype
    cdef int64_t channels, rows, k, c, chunk, chunks, width, n, done
    cdef double mean, step
    cdef const qsp_kernels *kernels = active_kernels()
    cdef const char *data = <const char *> _matrix(x, &dtype, &rows, &channels, "x")
    if not rows:
        raise ValueError("the moments of no elements are not defined")
    chunk = _chunk_rows(channels)
    chunks = (rows + chunk - 1) // chunk
    parts = torch.empty((chunks, channels, 4), dtype=_float64)
    cdef double *part = <double *> pointer(parts, _float64, 0, "parts")
    cdef double *first
    cdef double *other
    width = channels * (4 if dtype == QSP_F32 else 2)
    threads = _team(threads, rows * channels)
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
    return parts[0].clone()


def norm(x, residual, out, scale, shift, float low, float high, code_scale, code_shift, codes, mask, int threads):
    """out = clamp(x * scale + shift + residual, low, high); codes and mask for the backward pass where they are given.

    `x`, `residual` (or None) and `out` are alike, (rows, channels); scale, shift, code_scale and code_shift float32,
    (channels,); codes uint8 (rows, channels) or None: 128 + round(x * code_scale + code_shift) in 0..255; mask int16
    (rows, ceil(channels / 16)): bit i of a word whether low < element i < high.
    """
    cdef qsp_norm a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t k, rows, chunk, chunks
    memset(&a, 0, sizeof(a))
    a.x = _matrix(x, &a.dtype, &rows, &a.channels, "x")
    a.residual = _same(residual, x, "residual")
    a.out = _same(out, x, "out")
    a.words = (a.channels + 15) // 16
    a.scale = <const float *> pointer(scale, _float32, a.channels, "scale")
    a.shift = <const float *> pointer(shift, _float32, a.channels, "shift")
    a.low, a.high = low, high
    if codes is not None:
        a.codes = <uint8_t *> pointer(codes, _uint8, rows * a.channels, "codes")
        a.code_scale = <const float *> pointer(code_scale, _float32, a.channels, "code_scale")
        a.code_shift = <const float *> pointer(code_shift, _float32, a.channels, "code_shift")
        a.mask = <uint16_t *> pointer(mask, _int16, rows * a.words, "mask")
    if rows * a.channels == 0:
        return
    qsp_prefer_huge_pages(a.out, rows * a.channels * (4 if a.dtype == QSP_F32 else 2))
    chunk = _chunk_rows(a.channels)
    cdef const qsp_norm *args = &a
    chunks = (rows + chunk - 1) // chunk
    threads = _team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.norm(args, k * chunk, min(rows, (k + 1) * chunk))


cdef int64_t _read_gradient(qsp_norm_grad *a, object dy, object codes, object mask) except -1:
    cdef int64_t rows
    memset(a, 0, sizeof(a[0]))
    a.dy = _matrix(dy, &a.dtype, &rows, &a.channels, "dy")
    a.words = (a.channels + 15) // 16
    a.codes = <const uint8_t *> pointer(codes, _uint8, rows * a.channels, "codes")
    a.mask = <const uint16_t *> pointer(mask, _int16, rows * a.words, "mask")
    return rows


def norm_sums(dy, codes, mask, int threads):
    """Sums over each channel of the masked gradient and of gradient * code: float64, (channels, 2)."""
    cdef qsp_norm_grad a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t i, k, chunk, chunks, rows = _read_gradient(&a, dy, codes, mask)
    chunk = _chunk_rows(a.channels)
    chunks = (rows + chunk - 1) // chunk
    parts = torch.empty((chunks, a.channels, 2), dtype=_float64)
    cdef double *part = <double *> pointer(parts, _float64, 0, "parts")
    cdef const qsp_norm_grad *args = &a
    threads = _team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.norm_sums(args, k * chunk, min(rows, (k + 1) * chunk), part + 2 * k * args.channels)
    out = torch.zeros((a.channels, 2), dtype=_float64)
    cdef double *total = <double *> pointer(out, _float64, 0, "out")
    for k in range(chunks):  # in this order, whatever the number of threads
        for i in range(2 * a.channels):
            total[i] += part[2 * k * a.channels + i]
    return out


def norm_grad(dy, codes, mask, factor, dx, dresidual, int threads):
    """dx = g * factor[0] + code * factor[1] + factor[2] with g the masked gradient, which `dresidual` takes (or None).

    `factor` is float32, (3, channels).
    """
    cdef qsp_norm_grad a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t k, chunk, chunks, size, rows = _read_gradient(&a, dy, codes, mask)
    a.factor = <const float *> pointer(factor, _float32, 3 * a.channels, "factor")
    a.dx, a.dresidual = _same(dx, dy, "dx"), _same(dresidual, dy, "dresidual")
    if rows * a.channels == 0:
        return
    size = rows * a.channels * (4 if a.dtype == QSP_F32 else 2)
    qsp_prefer_huge_pages(a.dx, size)
    if a.dresidual != NULL:
        qsp_prefer_huge_pages(a.dresidual, size)
    chunk = _chunk_rows(a.channels)
    cdef const qsp_norm_grad *args = &a
    chunks = (rows + chunk - 1) // chunk
    threads = _team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.norm_grad(args, k * chunk, min(rows, (k + 1) * chunk))
