"""Batch normalisation of tensors of (rows, channels): statistics, and what its gradient is made of."""

import torch

from cython.parallel cimport prange
from libc.math cimport NAN, fabs, isfinite, sqrt
from libc.stdint cimport int64_t

from qsparseprop._kernels._dispatch cimport QSP_F32, active_kernels, qsp_kernels
from qsparseprop._kernels._rows cimport chunk_rows, team
from qsparseprop._kernels._tensor cimport exact_pointer, matrix, pointer

cdef object _cpu = torch.device("cpu")
cdef object _float32 = torch.float32
cdef object _float64 = torch.float64


cdef object _moments(const void *x, int dtype, int64_t rows, int64_t channels, int threads):
    """A tensor that starts with mean, sum of squared distances from it, least and greatest element of each channel.

    Parts of the rows are joined by the formula of Chan, Golub and LeVeque (1979), which loses no digits where the mean
    is large.
    """
    cdef int64_t k, c, chunk, chunks, width, n, done
    cdef double mean, step
    cdef const qsp_kernels *kernels = active_kernels()
    cdef const char *data = <const char *> x
    chunk = chunk_rows(channels)
    chunks = (rows + chunk - 1) // chunk
    parts = torch.empty((chunks, channels, 4), dtype=_float64, device=_cpu)
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


def statistics(x, weight, bias, running_mean, running_var, double momentum, double eps, bint training, bint save,
               int threads):
    """What batch normalisation of `x` (rows, channels) multiplies and adds: see `ops.norm_statistics`."""
    cdef int dtype
    cdef int64_t rows, c, n
    cdef const double *m = NULL
    cdef double mean, variance, rstd, scale, shift, step, least, most
    cdef float low, high
    cdef const void *data = matrix(x, &dtype, &rows, &n, "x")
    cdef const float *gamma = <const float *> exact_pointer(weight, _float32, n, "weight")
    cdef const float *beta = <const float *> exact_pointer(bias, _float32, n, "bias")
    cdef float *known_mean = <float *> exact_pointer(running_mean, _float32, n, "running_mean")
    cdef float *known_variance = <float *> exact_pointer(running_var, _float32, n, "running_var")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together, or neither")
    if not training and running_mean is None:
        raise ValueError("without batch statistics running_mean and running_var must be given")
    if not eps >= 0 or (training and eps == 0):
        raise ValueError(f"eps must be positive, or 0 without batch statistics, got {eps}")
    if training and rows == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    if training or save:
        parts = _moments(data, dtype, rows, n, threads) if rows else torch.zeros((1, n, 4), dtype=_float64, device=_cpu)
        m = <const double *> pointer(parts, _float64, 4 * n, "parts")
    singles = torch.empty((6, n), dtype=_float32, device=_cpu)
    doubles = torch.empty((7, n), dtype=_float64, device=_cpu)
    ends = torch.empty((n, 2), dtype=_float32, device=_cpu)
    cdef float *f = <float *> pointer(singles, _float32, 6 * n, "singles")
    cdef float *e = <float *> pointer(ends, _float32, 2 * n, "ends")
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
            f[4 * n + c], f[5 * n + c] = <float> (step * scale), <float> (least * scale + shift)
            e[2 * c], e[2 * c + 1] = (high, low) if high < low else (low, high)
            d[c], d[n + c], d[2 * n + c] = mean, variance, rstd
            d[3 * n + c], d[4 * n + c] = step * rstd, (least - mean) * rstd
            d[5 * n + c], d[6 * n + c] = step, least
    return singles, ends, doubles


def factors(sums, statistics, weight, int64_t count, bint batch_statistics):
    """What the gradient of batch normalisation is made of: see `ops.norm_factors`."""
    cdef int64_t c, n
    cdef double total, normalised, k
    cdef float rest, other, bound
    if statistics.ndim != 2 or statistics.shape[0] != 7:
        raise ValueError(f"the statistics must be of shape (7, channels), got {tuple(statistics.shape)}")
    n = statistics.shape[1]
    cdef const double *s = <const double *> pointer(statistics, _float64, 7 * n, "statistics")
    if sums is None:
        raise TypeError("sums must be a tensor, got NoneType")
    cdef const double *t = <const double *> exact_pointer(sums, _float64, 3 * n, "sums")
    cdef const float *gamma = <const float *> exact_pointer(weight, _float32, n, "weight")
    if count < 0:
        raise ValueError(f"the count must not be negative, got {count}")
    count = max(count, 1)  # without rows all sums are 0
    factor, ranges = torch.empty((3, n), dtype=_float32, device=_cpu), torch.empty((n, 2), dtype=_float32, device=_cpu)
    gradients = torch.empty((3, n), dtype=_float32, device=_cpu)
    cdef float *f = <float *> pointer(factor, _float32, 3 * n, "factor")
    cdef float *e = <float *> pointer(ranges, _float32, 2 * n, "ranges")
    cdef float *d = <float *> pointer(gradients, _float32, 3 * n, "gradients")
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
            e[2 * c + 1] = bound + rest + <float> 0 * <float> total
            e[2 * c] = -e[2 * c + 1]
            d[c], d[n + c] = <float> normalised, <float> total
            d[2 * n + c] = <float> (0 * (k * total) + 0.0) if batch_statistics else <float> (k * total)
    return factor, ranges, gradients
