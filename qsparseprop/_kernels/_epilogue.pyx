"""What follows a product on tensors of (rows, channels): activation(x * scale + shift + residual), and its gradient.

Activations are a name and options: "identity"; "clamp" (least, greatest); "leaky_relu" (slope below 0); "silu",
"hardswish", "gelu" and "gelu_tanh".
"""

import torch

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.parallel cimport prange
from libc.math cimport INFINITY, NAN, isfinite, isnan
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport (
    QSP_CLAMP,
    QSP_F32,
    QSP_GELU,
    QSP_GELU_TANH,
    QSP_HARDSWISH,
    QSP_LEAKY,
    QSP_SILU,
    QSP_U8,
    active_kernels,
    qsp_epilogue,
    qsp_epilogue_grad,
    qsp_kernels,
    qsp_pack,
)
from qsparseprop._kernels._pack cimport pack_ranged, read_seed
from qsparseprop._kernels._plan cimport PlaneLayout
from qsparseprop._kernels._rows cimport chunk_rows, reduced_rows, team
from qsparseprop._kernels._statistics cimport Scheme
from qsparseprop._kernels._tensor cimport exact_pointer, matrix, matrix_of, pointer, same_matrix

cdef object _float32 = torch.float32
cdef object _float64 = torch.float64
cdef object _uint8 = torch.uint8
cdef object _int16 = torch.int16

# number in the kernels, and how many options
cdef dict KINDS = {
    "identity": (QSP_CLAMP, 0),
    "clamp": (QSP_CLAMP, 2),
    "leaky_relu": (QSP_LEAKY, 1),
    "silu": (QSP_SILU, 0),
    "hardswish": (QSP_HARDSWISH, 0),
    "gelu": (QSP_GELU, 0),
    "gelu_tanh": (QSP_GELU_TANH, 0),
}

#: Names of the activations.
ACTIVATIONS = tuple(KINDS)


ctypedef struct activation_t:
    int kind
    float low
    float high
    bint saves  # whether the gradient needs anything
    double least_at  # it falls up to there and rises behind


cdef int _read_activation(str name, object options, activation_t *out) except -1:
    found = KINDS.get(name)
    if found is None:
        raise ValueError(f"the activation must be one of {', '.join(KINDS)}, got {name!r}")
    cdef int count = found[1]
    out.kind, out.low, out.high, out.saves = found[0], -INFINITY, INFINITY, name != "identity"
    if len(options) != count:
        raise ValueError(f"the activation {name!r} has {count} options, got {list(options)}")
    out.least_at = -INFINITY
    if out.kind == QSP_CLAMP and count:
        out.low, out.high = options[0], options[1]
        if not out.low <= out.high:
            raise ValueError(f"the limits of an activation must be two numbers in order, got {list(options)}")
    elif out.kind == QSP_LEAKY:
        out.low = options[0]
        if not isfinite(out.low):
            raise ValueError(f"the slope of an activation must be finite, got {options[0]}")
        if out.low < 0:
            out.least_at = 0
    elif out.kind == QSP_SILU:
        out.least_at = -1.2784645
    elif out.kind == QSP_HARDSWISH:
        out.least_at = -1.5
    elif out.kind == QSP_GELU:
        out.least_at = -0.7517916
    elif out.kind == QSP_GELU_TANH:
        out.least_at = -0.7524614
    return 0


cdef void *_saved(object saved, int kind, int64_t rows, int64_t channels, int64_t words) except? NULL:
    """Bits, int16 (rows, words), or codes of slopes, uint8 (rows, channels)."""
    if kind == QSP_CLAMP or kind == QSP_LEAKY:
        return exact_pointer(saved, _int16, rows * words, "saved")
    return exact_pointer(saved, _uint8, rows * channels, "saved")


cdef int64_t _read(qsp_epilogue *a, object x, object residual, object scale, object shift, str name, object options,
                   activation_t *activation) except -1:
    cdef int64_t rows
    memset(a, 0, sizeof(a[0]))
    _read_activation(name, options, activation)
    a.kind, a.low, a.high = activation.kind, activation.low, activation.high
    if isinstance(x, torch.Tensor) and x.dtype is _uint8:
        if residual is not None:
            raise TypeError("codes (uint8) as x go neither with a residual nor with codes to be saved")
        a.dtype, a.x = QSP_U8, matrix_of(pointer(x, _uint8, 0, "x"), x, &rows, &a.channels, "x")
    else:
        a.x = matrix(x, &a.dtype, &rows, &a.channels, "x")
    a.words = (a.channels + 15) // 16
    a.residual = same_matrix(residual, x, "residual")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, or neither")
    a.scale = <const float *> exact_pointer(scale, _float32, a.channels, "scale")
    a.shift = <const float *> exact_pointer(shift, _float32, a.channels, "shift")
    return rows


cdef int _read_results(qsp_epilogue *a, int64_t rows, object x, object out, object code_scale, object code_shift,
                       object codes, object saved, const activation_t *activation) except -1:
    if a.dtype == QSP_U8 and (codes is not None or saved is not None):
        raise TypeError("codes (uint8) as x go neither with a residual nor with codes to be saved")
    if out is not None:
        _refuse_codes(a)
        a.out = same_matrix(out, x, "out")
    if (code_scale is None) != (codes is None) or (code_shift is None) != (codes is None):
        raise ValueError("code_scale, code_shift and codes must be given together, or none of them")
    if codes is not None:
        a.code_scale = <const float *> exact_pointer(code_scale, _float32, a.channels, "code_scale")
        a.code_shift = <const float *> exact_pointer(code_shift, _float32, a.channels, "code_shift")
        a.codes = <uint8_t *> exact_pointer(codes, _uint8, rows * a.channels, "codes")
    if saved is not None:
        if not activation.saves:
            raise ValueError("the gradient of the activation 'identity' needs nothing to be saved")
        a.saved = _saved(saved, a.kind, rows, a.channels, a.words)
    return 0


cdef int _refuse_codes(const qsp_epilogue *a) except -1:
    if a.dtype == QSP_U8:
        raise TypeError("x must be of dtype torch.float32 or torch.bfloat16, got torch.uint8")
    return 0


def epilogue(x, residual, out, scale, shift, str activation, options, code_scale, code_shift, codes, saved,
             int threads):
    """out = activation(x * scale + shift + residual); `codes` and `saved`, or None, take what the gradient needs."""
    cdef qsp_epilogue a
    cdef activation_t act
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t k, chunk, chunks, rows = _read(&a, x, residual, scale, shift, activation, options, &act)
    _refuse_codes(&a)
    _read_results(&a, rows, x, out, code_scale, code_shift, codes, saved, &act)
    if rows * a.channels == 0:
        return
    if a.out == NULL:
        raise ValueError("out must be a tensor")
    chunk = chunk_rows(a.channels)
    chunks = (rows + chunk - 1) // chunk
    cdef const qsp_epilogue *args = &a
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.epilogue(args, k * chunk, min(rows, (k + 1) * chunk))


def epilogue_range(x, residual, scale, shift, str activation, options, int threads):
    """Bounds of each channel of what `epilogue` gives: float32, (channels, 2); NaN where an element is not finite."""
    cdef qsp_epilogue a
    cdef activation_t act
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t i, k, chunk, chunks, rows = _read(&a, x, residual, scale, shift, activation, options, &act)
    _refuse_codes(&a)
    if not rows:
        raise ValueError("the range of no elements is not defined")
    chunk = reduced_rows(a.channels)
    chunks = (rows + chunk - 1) // chunk
    parts = torch.empty((chunks, a.channels, 2), dtype=_float32, device="cpu")
    out = torch.empty((a.channels, 2), dtype=_float32, device="cpu")
    cdef float *part = <float *> pointer(parts, _float32, 0, "parts")
    cdef float *ends = <float *> pointer(out, _float32, 0, "out")
    cdef const qsp_epilogue *args = &a
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.epilogue_range(args, k * chunk, min(rows, (k + 1) * chunk), part + 2 * k * args.channels)
    for i in range(2 * a.channels):
        ends[i] = part[i]
        for k in range(1, chunks):
            _widen(ends + i, part[2 * k * a.channels + i], i % 2)
    if act.kind != QSP_CLAMP:
        _activate_ranges(ends, a.channels, &act)
    return out


cdef inline void _widen(float *end, float value, bint upwards) noexcept:
    """Move an end to a value beyond it; a NaN counts as that, and stays."""
    if not isnan(end[0]) and not (value <= end[0] if upwards else value >= end[0]):
        end[0] = value


cdef int _activate_ranges(float *ranges, int64_t count, const activation_t *act) except -1:
    """What becomes of numbers in these ranges: by the kernels, so that no element is beyond by their roundings."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef qsp_epilogue a
    cdef int64_t i
    cdef float low, high
    cdef bytes held = PyBytes_FromStringAndSize(NULL, 3 * count * sizeof(float))
    cdef float *points = <float *> PyBytes_AS_STRING(held)
    for i in range(count):  # both ends, and where it is least of what lies between
        low, high = ranges[2 * i], ranges[2 * i + 1]
        points[3 * i], points[3 * i + 1], points[3 * i + 2] = low, high, min(max(low, <float> act.least_at), high)
    memset(&a, 0, sizeof(a))
    a.channels, a.dtype, a.x, a.out = 3 * count, QSP_F32, points, points
    a.kind, a.low, a.high = act.kind, act.low, act.high
    if count:
        kernels.epilogue(&a, 0, 1)
    for i in range(count):
        if isnan(ranges[2 * i]) or isnan(ranges[2 * i + 1]):
            ranges[2 * i] = ranges[2 * i + 1] = NAN
            continue
        low = high = points[3 * i]
        _widen(&low, points[3 * i + 1], False)
        _widen(&low, points[3 * i + 2], False)
        _widen(&high, points[3 * i + 1], True)
        if not isfinite(low) or not isfinite(high):
            low = high = NAN
        ranges[2 * i], ranges[2 * i + 1] = low, high
    return 0


def activation_range(ranges, str activation, options):
    """Bounds of what an activation makes of numbers in these ranges, float32, (channels, 2): a new tensor."""
    cdef activation_t act
    _read_activation(activation, options, &act)
    pointer(ranges, _float32, 0, "ranges")
    if ranges.ndim != 2 or ranges.shape[1] != 2:
        raise ValueError(f"ranges must be of shape (channels, 2), got {tuple(ranges.shape)}")
    out = torch.empty(tuple(ranges.shape), dtype=_float32, device="cpu")
    out.copy_(ranges)
    _activate_ranges(<float *> pointer(out, _float32, 0, "out"), ranges.shape[0], &act)
    return out


def epilogue_pack(x, residual, out, scale, shift, str activation, options, code_scale, code_shift, codes, saved, ranges,
                  PlaneLayout layout not None, Scheme scheme not None, int threads):
    """What `epilogue` does, the result packed as `quantize_pack` does; `out` may be None.

    `ranges` are bounds of the result, float32 (channels, 2), or (1, 2) where the channels share a scale: least and
    greatest. `x` may be codes (uint8), read as the numbers 0 to 255, where only the packed result is wanted.
    """
    cdef qsp_epilogue a
    cdef activation_t act
    cdef qsp_pack p
    cdef int64_t rows = _read(&a, x, residual, scale, shift, activation, options, &act)
    _read_results(&a, rows, x, out, code_scale, code_shift, codes, saved, &act)
    memset(&p, 0, sizeof(p))
    p.dtype, p.epilogue = a.dtype, &a
    return pack_ranged(&p, rows, a.channels, ranges, layout, scheme, threads)


cdef int64_t _read_gradient(qsp_epilogue_grad *a, object dy, object codes, object saved, str name,
                            object options) except -1:
    cdef int64_t rows
    cdef activation_t activation
    memset(a, 0, sizeof(a[0]))
    _read_activation(name, options, &activation)
    a.kind, a.slope = activation.kind, activation.low
    a.dy = matrix(dy, &a.dtype, &rows, &a.channels, "dy")
    a.words = (a.channels + 15) // 16
    a.codes = <const uint8_t *> exact_pointer(codes, _uint8, rows * a.channels, "codes")
    if activation.saves:
        if saved is None:
            raise ValueError(f"the gradient of the activation {name!r} needs what was saved")
        a.saved = _saved(saved, a.kind, rows, a.channels, a.words)
    return rows


def epilogue_sums(dy, codes, saved, str activation, options, int threads):
    """Of each channel the sums of g and of g * code, and g's greatest magnitude: float64, (channels, 3)."""
    cdef qsp_epilogue_grad a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t i, k, chunk, chunks, rows = _read_gradient(&a, dy, codes, saved, activation, options)
    cdef double most
    chunk = reduced_rows(a.channels)
    chunks = (rows + chunk - 1) // chunk
    parts = torch.empty((chunks, a.channels, 3), dtype=_float64, device="cpu")
    out = torch.zeros((a.channels, 3), dtype=_float64, device="cpu")
    cdef double *part = <double *> pointer(parts, _float64, 0, "parts")
    cdef double *total = <double *> pointer(out, _float64, 0, "out")
    cdef const qsp_epilogue_grad *args = &a
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.epilogue_sums(args, k * chunk, min(rows, (k + 1) * chunk), part + 3 * k * args.channels)
    for k in range(chunks):  # in this order, whatever the number of threads
        for i in range(a.channels):
            total[3 * i] += part[3 * (k * a.channels + i)]
            total[3 * i + 1] += part[3 * (k * a.channels + i) + 1]
            most = part[3 * (k * a.channels + i) + 2]
            if not isnan(total[3 * i + 2]) and not most <= total[3 * i + 2]:  # a NaN counts, and stays
                total[3 * i + 2] = most
    return out


def epilogue_grad(dy, codes, saved, str activation, options, factor, dx, g, int threads):
    """dx = g * factor[0] + code * factor[1] + factor[2], without `factor` g; `g` takes g itself (or None)."""
    cdef qsp_epilogue_grad a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t k, chunk, chunks, rows = _read_gradient(&a, dy, codes, saved, activation, options)
    a.factor = <const float *> exact_pointer(factor, _float32, 3 * a.channels, "factor")
    a.dx, a.g = same_matrix(dx, dy, "dx"), same_matrix(g, dy, "g")
    if rows * a.channels == 0:
        return
    if a.dx == NULL:
        raise ValueError("dx must be a tensor")
    chunk = chunk_rows(a.channels)
    chunks = (rows + chunk - 1) // chunk
    cdef const qsp_epilogue_grad *args = &a
    threads = team(threads, rows * a.channels)
    for k in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        kernels.epilogue_grad(args, k * chunk, min(rows, (k + 1) * chunk))


def epilogue_grad_pack(dy, codes, saved, str activation, options, factor, g, ranges, PlaneLayout layout not None,
                       Scheme scheme not None, seed, int threads):
    """What `epilogue_grad` does, dx packed as `quantize_pack` does; for `ranges` see `epilogue_pack`."""
    cdef qsp_epilogue_grad a
    cdef qsp_pack p
    cdef int64_t rows = _read_gradient(&a, dy, codes, saved, activation, options)
    a.factor = <const float *> exact_pointer(factor, _float32, 3 * a.channels, "factor")
    a.g = same_matrix(g, dy, "g")
    memset(&p, 0, sizeof(p))
    p.dtype, p.gradient, p.seed = a.dtype, &a, read_seed(seed, scheme)
    return pack_ranged(&p, rows, a.channels, ranges, layout, scheme, threads)
