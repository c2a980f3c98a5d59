"""Activations behind linear layers, and their gradients, on tensors of (rows, channels)."""

import torch

from cython.parallel cimport prange
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport (
    QSP_CLAMP,
    QSP_GELU,
    QSP_GELU_TANH,
    active_kernels,
    qsp_act,
    qsp_act_grad,
    qsp_kernels,
    qsp_pack,
)
from qsparseprop._kernels._norm cimport chunk_rows, matrix, pack_ranged, same_matrix, team
from qsparseprop._kernels._tensor cimport pointer

cdef object _float32 = torch.float32
cdef object _float64 = torch.float64
cdef object _uint8 = torch.uint8
cdef object _int16 = torch.int16

# kind and limits
cdef dict KINDS = {
    "relu": (QSP_CLAMP, 0.0, INFINITY),
    "relu6": (QSP_CLAMP, 0.0, 6.0),
    "gelu": (QSP_GELU, 0.0, 0.0),
    "gelu_tanh": (QSP_GELU_TANH, 0.0, 0.0),
}


cdef tuple _kind(str activation):
    kind = KINDS.get(activation)
    if kind is None:
        raise ValueError(f"the activation must be one of {', '.join(KINDS)}, got {activation!r}")
    return kind


cdef void *_saved(object saved, int kind, int64_t rows, int64_t channels, int64_t words) except? NULL:
    """Masks, int16 (rows, words), or codes of slopes, uint8 (rows, channels)."""
    if kind == QSP_CLAMP:
        return pointer(saved, _int16, rows * words, "saved")
    return pointer(saved, _uint8, rows * channels, "saved")


cdef int64_t _read(qsp_act *a, object x, object out, str activation, object saved) except -1:
    cdef int64_t rows
    memset(a, 0, sizeof(a[0]))
    a.kind, a.low, a.high = _kind(activation)
    a.x = matrix(x, &a.dtype, &rows, &a.channels, "x")
    a.words = (a.channels + 15) // 16
    a.out = same_matrix(out, x, "out")
    if saved is not None:
        a.saved = _saved(saved, a.kind, rows, a.channels, a.words)
    return rows


cdef int64_t _read_gradient(qsp_act_grad *a, object dy, object saved, str activation) except -1:
    cdef int64_t rows
    memset(a, 0, sizeof(a[0]))
    a.kind = _kind(activation)[0]
    a.dy = matrix(dy, &a.dtype, &rows, &a.channels, "dy")
    a.words = (a.channels + 15) // 16
    a.saved = _saved(saved, a.kind, rows, a.channels, a.words)
    return rows


def act(x, out, str activation, saved, int threads):
    """out = activation(x), alike, (rows, channels), and what the gradient needs in `saved` (or None), see `_saved`."""
    cdef qsp_act a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t k, chunk, chunks, rows = _read(&a, x, out, activation, saved)
    if a.out == NULL and rows * a.channels:
        raise ValueError("out must be a tensor")
    chunk = chunk_rows(a.channels)
    chunks = (rows + chunk - 1) // chunk if a.channels else 0
    cdef const qsp_act *args = &a
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.act(args, k * chunk, min(rows, (k + 1) * chunk))


def act_range(x, str activation, int threads):
    """Least and greatest element of each channel of `x`, limited as by "relu" or "relu6": float32, (channels, 2).

    NaN where an element is not finite.
    """
    cdef qsp_act a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t k, chunk, chunks, rows = _read(&a, x, None, activation, None)
    if not rows:
        raise ValueError("the range of no elements is not defined")
    chunk = chunk_rows(a.channels)
    chunks = (rows + chunk - 1) // chunk
    parts = torch.empty((chunks, a.channels, 2), dtype=_float32)
    cdef float *part = <float *> pointer(parts, _float32, 0, "parts")
    cdef const qsp_act *args = &a
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.act_range(args, k * chunk, min(rows, (k + 1) * chunk), part + 2 * k * args.channels)
    return torch.stack([parts[:, :, 0].amin(0), parts[:, :, 1].amax(0)], 1)


def act_pack(x, out, str activation, saved, images, ranges, planes, plane_scale, zero_point, grid, views, str scheme,
             bint per_channel, int threads):
    """What `act` does, the result packed as `quantize_pack` does; `out` may be None. For `ranges` see `norm_pack`."""
    cdef qsp_act a
    cdef qsp_pack p
    cdef int64_t rows = _read(&a, x, out, activation, saved)
    memset(&p, 0, sizeof(p))
    p.dtype, p.act = a.dtype, &a
    pack_ranged(&p, x, rows, a.channels, images, ranges, planes, plane_scale, zero_point, grid, views, scheme, (),
                per_channel, threads)


def act_sums(dy, saved, str activation, int threads):
    """Of each channel the sum of the gradient and its greatest magnitude: float64, (channels, 2)."""
    cdef qsp_act_grad a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t i, k, chunk, chunks, rows = _read_gradient(&a, dy, saved, activation)
    cdef double most
    chunk = chunk_rows(a.channels)
    chunks = (rows + chunk - 1) // chunk
    parts = torch.empty((chunks, a.channels, 2), dtype=_float64)
    cdef double *part = <double *> pointer(parts, _float64, 0, "parts")
    cdef const qsp_act_grad *args = &a
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.act_sums(args, k * chunk, min(rows, (k + 1) * chunk), part + 2 * k * args.channels)
    out = torch.zeros((a.channels, 2), dtype=_float64)
    cdef double *total = <double *> pointer(out, _float64, 0, "out")
    for k in range(chunks):  # in this order, whatever the number of threads
        for i in range(a.channels):
            total[2 * i] += part[2 * (k * a.channels + i)]
            most = part[2 * (k * a.channels + i) + 1]
            if total[2 * i + 1] == total[2 * i + 1] and not most <= total[2 * i + 1]:  # a NaN counts, and stays
                total[2 * i + 1] = most
    return out


def act_grad(dy, saved, str activation, dx, int threads):
    """dx = dy * slope, alike, (rows, channels)."""
    cdef qsp_act_grad a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t k, chunk, chunks, rows = _read_gradient(&a, dy, saved, activation)
    a.dx = same_matrix(dx, dy, "dx")
    if a.dx == NULL and rows * a.channels:
        raise ValueError("dx must be a tensor")
    chunk = chunk_rows(a.channels)
    chunks = (rows + chunk - 1) // chunk if a.channels else 0
    cdef const qsp_act_grad *args = &a
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.act_grad(args, k * chunk, min(rows, (k + 1) * chunk))


def act_grad_pack(dy, saved, str activation, images, ranges, planes, plane_scale, zero_point, grid, views, str scheme,
                  options, bint per_channel, uint64_t seed, int threads):
    """What `act_grad` does, dx packed as `quantize_pack` does; for `ranges` see `norm_pack`."""
    cdef qsp_act_grad a
    cdef qsp_pack p
    cdef int64_t rows = _read_gradient(&a, dy, saved, activation)
    memset(&p, 0, sizeof(p))
    p.dtype, p.act_grad, p.seed = a.dtype, &a, seed
    pack_ranged(&p, dy, rows, a.channels, images, ranges, planes, plane_scale, zero_point, grid, views, scheme, options,
                per_channel, threads)
