"""The weights of products: values -> what the slots of a list, or a matrix with its zeros, hold; and scratch memory."""

import torch

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.parallel cimport prange
from libc.math cimport INFINITY, NAN, isfinite
from libc.stdint cimport int8_t, int32_t, int64_t, uint32_t
from libc.string cimport memset

from qsparseprop._kernels._dense_rows cimport DenseRows
from qsparseprop._kernels._dispatch cimport (
    QSP_GROUP,
    QSP_UNIT,
    active_kernels,
    qsp_cut_rows,
    qsp_dense,
    qsp_kernels,
    qsp_list,
    qsp_nonzeros,
    qsp_weight,
)
from qsparseprop._kernels._gather_list cimport GatherList
from qsparseprop._kernels._memory cimport LARGE
from qsparseprop._kernels._plan cimport ProductRows
from qsparseprop._kernels._tensor cimport numel, pointer

from qsparseprop._kernels._memory import empty

cdef object _float32 = torch.float32
cdef object _int32 = torch.int32
cdef object _int8 = torch.int8
cdef object _int64 = torch.int64

cdef extern from "<math.h>" nogil:
    float frexpf(float, int *)
    float ldexpf(float, int)


cdef bint as_dense(ProductRows rows, bint codes) except -1:
    """Whether rows are dense ones, which only codes can be multiplied with."""
    if isinstance(rows, DenseRows):
        if not codes:
            raise TypeError("dense rows multiply codes, uint8 and int8; products of float32 want a GatherList")
        return True
    if not isinstance(rows, GatherList):
        raise TypeError(f"rows must be a GatherList or DenseRows, got {type(rows).__name__}")
    return False


cdef int64_t parts_of(int64_t slots, int64_t rows, int threads) noexcept nogil:
    """Parts into which rows are cut for a pass over their slots."""
    return 1 if threads == 1 or slots < 1 << 15 else min(4 * <int64_t> threads, rows)


cdef int64_t cut_rows(const qsp_nonzeros *l, int64_t first, int64_t last, int64_t chunk, int64_t chunks) noexcept nogil:
    """The first row of a part of rows [first, last)."""
    cdef qsp_list some
    some.rows, some.group_ptr, some.base, some.offset = last - first, l.group_ptr + first, 0, NULL
    return first + qsp_cut_rows(&some, chunk, chunks)


# Scratch memory of the last calls (sums of weight gradients), kept: fresh memory of this size would cost more in page
# faults than its use. A call takes one out, so that threads never share it. What is large, the codes of dense rows,
# would lie beside values and gradients for ever, and so comes from the pages of results.
_spare_scratch = []


cdef object take_scratch(int64_t size):
    if size >= LARGE // 8:
        return empty((size,), _int64, False, True)
    while _spare_scratch:
        scratch = _spare_scratch.pop()
        if scratch.numel() >= size:
            return scratch
    return torch.empty(size, dtype=_int64, device="cpu")


cdef int64_t give_scratch(object scratch) except -1:
    """Let a later call have it."""
    if scratch.numel() < LARGE // 8:
        _spare_scratch.append(scratch)
    return 0


cdef int64_t per_channel(object tensor, int64_t channels, str name) except -1:
    cdef int64_t n = numel(tensor)
    if n != 1 and n != channels:
        raise ValueError(f"{name} must have 1 or {channels} elements, got {n}")
    return 0 if n == 1 else 1


def gather_weight(values, ProductRows given not None, out):
    """The values of the slots of a list, float32, zero for padding."""
    as_dense(given, False)
    cdef GatherList rows = <GatherList> given
    cdef const qsp_nonzeros *nz = &rows.nonzeros
    cdef int64_t row, first, n, k
    cdef const float *v
    cdef float *slots
    if numel(values) <= rows.last_index:
        raise ValueError(f"values must have at least {rows.last_index + 1} elements, got {numel(values)}")
    v = <const float *> pointer(values, _float32, 0, "values")
    slots = <float *> pointer(out, _float32, rows.slots, "out")
    with nogil:
        for row in range(rows.rows):
            first, n = nz.first[row], nz.first[row + 1] - nz.first[row]
            if nz.index == NULL:
                for k in range(n):
                    slots[k] = v[first + k]
            else:
                for k in range(n):
                    slots[k] = v[nz.index[first + k]] if nz.index[first + k] >= 0 else 0
            for k in range(n, QSP_GROUP * <int64_t> (nz.group_ptr[row + 1] - nz.group_ptr[row])):
                slots[k] = 0
            slots += QSP_GROUP * <int64_t> (nz.group_ptr[row + 1] - nz.group_ptr[row])


def quantize_weight(values, ProductRows rows not None, factor, zero_point, clip, codes, scale, total, int threads):
    """Symmetric codes of the slots of a list, one scale a row (`scale`, float32), and `total` (int64), the sums of a
    row's codes times the zero points. `factor` and `zero_point` are None or of the planes that slots read, or of all;
    `clip` is None or what the largest code stands for in every row.
    """
    cdef qsp_weight a
    memset(&a, 0, sizeof(a))
    a.codes = <int8_t *> pointer(codes, _int8, rows.slots, "codes") if rows.slots else NULL
    a.scale = <float *> pointer(scale, _float32, rows.rows, "scale") if rows.rows else NULL
    a.total = <int64_t *> pointer(total, _int64, rows.rows, "total") if rows.rows else NULL
    _folded = take_weights(&a, rows, values, factor, zero_point, clip)
    if isinstance(rows, DenseRows):
        quantize_dense(&a, <DenseRows> rows, max(threads, 1))
    else:
        quantize_slots(&a, 0, rows.rows, max(threads, 1))


cdef object take_weights(qsp_weight *a, ProductRows rows, object values, object factor, object zero_point, object clip):
    """What the weights of rows are made from; returns what must be kept until they are."""
    cdef int64_t n = numel(values)
    cdef GatherList slots
    a.values = <const float *> pointer(values, _float32, 0, "values") if n else NULL
    if clip is not None:
        a.clip = (<const float *> pointer(clip, _float32, 1, "clip"))[0]
        if not 0 < a.clip < INFINITY:  # of a weight of zeros, or one with NaN or Inf, whose rows say so themselves
            a.clip = 0
    if as_dense(rows, True):
        a.dense = &(<DenseRows> rows).dense
        if n != (<DenseRows> rows).pattern.count:
            raise ValueError(f"values must have {(<DenseRows> rows).pattern.count} elements, got {n}")
    else:
        slots = <GatherList> rows
        slots.settle()
        a.nonzeros = slots.nonzeros
        if slots.last_index >= n:
            raise ValueError(f"values must have at least {slots.last_index + 1} elements, got {n}")
    return _fold(a, rows, factor, zero_point)


cdef int64_t quantize_slots(const qsp_weight *a, int64_t first, int64_t last, int threads) except -1:
    """Of rows [first, last) of a list."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef const qsp_nonzeros *nz = &a.nonzeros
    cdef int64_t slots = QSP_GROUP * <int64_t> (nz.group_ptr[last] - nz.group_ptr[first])
    cdef int64_t chunk, chunks = parts_of(slots, last - first, threads)
    for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
        kernels.quantize_rows(a, cut_rows(nz, first, last, chunk, chunks), cut_rows(nz, first, last, chunk + 1, chunks))
    return 0


cdef int64_t quantize_dense(const qsp_weight *a, DenseRows rows, int threads) except -1:
    """Of dense rows; where these are not the values' rows, scales come first."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef const qsp_dense *d = &rows.dense
    cdef int64_t line = (d.columns + 15) // 16 * 16, all_columns = d.groups * d.columns, chunk, i, tile
    cdef int64_t tiles = d.groups * ((d.value_rows // d.groups + QSP_UNIT - 1) // QSP_UNIT)
    cdef int64_t chunks = 1 if threads == 1 or rows.slots < 1 << 15 else min(<int64_t> threads, d.value_rows)
    # lines of floats that a chunk needs: a matrix without zeros is read where it is
    cdef int64_t each = 2 if not rows.swapped else 0 if d.bits == NULL else QSP_UNIT
    cdef int64_t lines = chunks * line * each, size
    cdef float *space
    cdef uint32_t *most
    size = (lines + (chunks * all_columns if rows.swapped else 0)) // 2 + 1
    scratch = take_scratch(size)
    space = <float *> pointer(scratch, _int64, size, "scratch")
    most = <uint32_t *> (space + lines)
    if not rows.swapped:
        for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
            kernels.dense_rows(a, d.rows * chunk // chunks, d.rows * (chunk + 1) // chunks, space + each * chunk * line)
    else:
        memset(most, 0, chunks * all_columns * sizeof(uint32_t))
        if rows.slots != d.value_rows * d.columns:  # some are not written
            memset(a.codes, 0, rows.slots)
        for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
            kernels.dense_column_max(a, d.value_rows * chunk // chunks, d.value_rows * (chunk + 1) // chunks,
                                     <float *> most + chunk * all_columns)
        for chunk in range(1, chunks):
            for i in range(all_columns):
                most[i] = max(most[i], most[chunk * all_columns + i])
        kernels.dense_scales(a, <float *> most)
        for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
            for tile in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
                kernels.dense_columns(a, tile, <const float *> most, space + each * chunk * line)
    for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
        kernels.dense_totals(a, d.rows * chunk // chunks, d.rows * (chunk + 1) // chunks)
    give_scratch(scratch)
    return 0


cdef object _fold(qsp_weight *a, ProductRows rows, object factor, object zero_point):
    """Factors and zero points of the planes, of a list's tables where there is one; returns what holds them.

    The factors are divided by a power of two near the largest, which the scale gets back, so that no product becomes so
    small that it loses digits. Those that are not finite become NaN: zero times Inf, as padding has it, would be NaN
    where a row's weights are Inf.
    """
    cdef int64_t planes = rows.source.grid.planes, i
    cdef int64_t size = planes if a.dense != NULL else (<GatherList> rows).entries
    cdef const int32_t *plane = NULL
    cdef const float *given = NULL
    cdef const int32_t *zeros = NULL
    cdef int32_t *own_zeros
    cdef float *folded
    cdef float largest = 0, value
    cdef int exponent = 0
    cdef bint apart = False
    if a.dense == NULL:
        plane = a.nonzeros.plane
    a.scale_factor = a.zero_factor = 1
    if zero_point is not None:
        zeros = <const int32_t *> pointer(zero_point, _int32, 1, "zero_point")
        a.zero_factor = zeros[0]
        if per_channel(zero_point, planes, "zero_point"):
            for i in range(planes):
                apart = apart or zeros[i] != zeros[0]
    if factor is not None:
        given = <const float *> pointer(factor, _float32, 1, "factor")
        if not per_channel(factor, planes, "factor"):
            a.scale_factor = given[0]
            factor = None
    if factor is None and not apart:
        return None
    cdef bytes out = PyBytes_FromStringAndSize(NULL, 2 * size * sizeof(float))  # cheaper than tensors
    folded, own_zeros = <float *> PyBytes_AS_STRING(out), <int32_t *> PyBytes_AS_STRING(out) + size
    if apart:
        for i in range(size):
            own_zeros[i] = zeros[i if plane == NULL else plane[i]]
        a.zero_point = own_zeros
    if factor is None:
        return out
    for i in range(planes):
        if isfinite(given[i]):
            largest = max(largest, given[i])
    if largest > 0:
        frexpf(largest, &exponent)
    exponent = max(-126, min(126, exponent))
    a.scale_factor = ldexpf(1, exponent)
    for i in range(size):
        value = given[i if plane == NULL else plane[i]]
        folded[i] = value * ldexpf(1, -exponent) if isfinite(value) else NAN
    a.factor = folded
    return out
