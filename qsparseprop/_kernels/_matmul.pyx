"""The two products of every layer, gather-SpMM and gather-SDDMM, and the quantiser of their weights."""

import torch

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.parallel cimport prange
from libc.math cimport INFINITY, NAN, isfinite
from libc.stdint cimport int8_t, int32_t, int64_t, uint32_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport (
    QSP_UNIT,
    active_kernels,
    qsp_count_units,
    qsp_cut_rows,
    qsp_grad_blocks,
    qsp_dense,
    qsp_kernels,
    qsp_list,
    qsp_sddmm,
    qsp_spmm,
    qsp_view,
    qsp_weight,
)
from qsparseprop._kernels._dense_rows cimport DenseRows
from qsparseprop._kernels._plan cimport GatherList, PlaneLayout, ProductRows
from qsparseprop._kernels._tensor cimport image_pointer, numel, optional_pointer, pointer, strides_t

cdef enum:
    # multiply-adds below which starting threads costs more than it gives
    SERIAL_WORK = 1 << 20
    # units of lanes, and slots of a row, from which bringing a list into another order first pays
    PAIR_UNITS = 4
    PAIR_SLOTS = 16

cdef object _float32 = torch.float32
cdef object _int32 = torch.int32
cdef object _int8 = torch.int8
cdef object _uint8 = torch.uint8
cdef object _int64 = torch.int64

cdef extern from "<math.h>" nogil:
    float frexpf(float, int *)
    float ldexpf(float, int)


cdef int64_t _chunks(int64_t rows, int64_t units, int threads):
    """Parts into which the rows are cut, so that every thread has some four tasks."""
    if threads == 1 or units >= 4 * threads:
        return 1
    return max(1, min((4 * threads + units - 1) // max(units, 1), rows // 16))


cdef bint _as_dense(ProductRows rows, bint codes) except -1:
    """Whether rows are dense ones, which only codes can be multiplied with."""
    if isinstance(rows, DenseRows):
        if not codes:
            raise TypeError("dense rows multiply codes, uint8 and int8; products of float32 want a GatherList")
        return True
    if not isinstance(rows, GatherList):
        raise TypeError(f"rows must be a GatherList or DenseRows, got {type(rows).__name__}")
    return False


def spmm(planes, weights, scale, correction, x_scale, x_zero_point, ProductRows rows not None, bias, out, int threads,
         float least=-INFINITY, float greatest=INFINITY):
    """out[row, lane] = sum_k weights[row, k] * planes[offset[row, k] + lane], unpacked into `out`.

    `planes` and `weights` are uint8 and int8 (then `scale` and `correction`, the sums of a row's codes, are given, and
    `x_scale` and `x_zero_point` unless these two have them in) or both float32. `out` is a tensor of the list's target,
    float32 or bfloat16, of any strides that do not overlap. `least` and `greatest` limit the result; without a bias it
    has no limits.
    """
    cdef bint codes = planes.dtype is _uint8
    cdef qsp_spmm a
    memset(&a, 0, sizeof(a))
    _as_dense(rows, codes)
    a.weights = pointer(weights, _int8 if codes else _float32, rows.slots, "weights")
    a.scale_factor, a.low, a.high = 1, least, greatest
    if codes:
        a.scale = <const float *> pointer(scale, _float32, rows.rows, "scale")
        a.correction = <const int64_t *> pointer(correction, _int64, rows.rows, "correction")
        if x_scale is not None:
            a.scale_factor = (<const float *> pointer(x_scale, _float32, 1, "x_scale"))[0]
        a.correction_factor = -1
        if x_zero_point is not None:
            a.correction_factor = -(<const int32_t *> pointer(x_zero_point, _int32, 1, "x_zero_point"))[0]
    _run_spmm(&a, rows, codes, planes, bias, out, max(threads, 1))


def quantized_spmm(values, ProductRows rows not None, x_scale, x_zero_point, clip, planes, bias, out, int threads,
                   float least=-INFINITY, float greatest=INFINITY):
    """`quantize_weight` and `spmm` in one call, for codes: the weight's are kept nowhere.

    `x_scale` and `x_zero_point` have one element or one for each plane, which the weights then are quantised with.
    """
    cdef qsp_spmm a
    cdef qsp_weight w
    cdef int64_t size, lines = (rows.rows + 15) // 16 * 16  # so that codes begin a line of the cache
    cdef bint one = numel(x_scale) == 1
    memset(&a, 0, sizeof(a))
    memset(&w, 0, sizeof(w))
    threads = max(threads, 1)
    size = lines + (4 * lines + rows.slots + 7) // 8
    scratch = _take_scratch(size)
    w.total = <int64_t *> pointer(scratch, _int64, size, "scratch")
    w.scale = <float *> (w.total + lines)
    w.codes = <int8_t *> (w.scale + lines)
    _run_quantize(&w, rows, values, None if one else x_scale, None if one else x_zero_point, clip, threads)
    a.weights, a.scale, a.correction = w.codes, w.scale, w.total
    a.scale_factor, a.correction_factor, a.low, a.high = 1, -1, least, greatest
    if one:
        a.scale_factor = (<const float *> pointer(x_scale, _float32, 1, "x_scale"))[0]
        a.correction_factor = -(<const int32_t *> pointer(x_zero_point, _int32, 1, "x_zero_point"))[0]
    _run_spmm(&a, rows, True, planes, bias, out, threads)
    _spare_scratch.append(scratch)


cdef void _spmm_part(const qsp_kernels *kernels, const qsp_spmm *a, const qsp_view *view, int64_t units,
                     int64_t task, bint codes) noexcept nogil:
    """One unit of a view and one part of its rows; views of fewer than `units` units have tasks without work."""
    cdef int64_t unit = task // a.row_chunks, row = view.plane
    cdef qsp_spmm one
    if unit >= units:
        return
    one = a[0]
    one.view = view[0]
    if a.dense == NULL:
        one.list.rows = view.channels
        one.list.group_ptr += row
    if a.scale != NULL:
        one.scale += row
        one.correction += row
    if a.paired != NULL:
        one.paired += row
    if a.bias != NULL:
        one.bias += row
    if a.dense != NULL:
        kernels.spmm_dense_u8(&one, unit, task % a.row_chunks)
    elif codes:
        kernels.spmm_u8(&one, unit, task % a.row_chunks)
    else:
        kernels.spmm_f32(&one, unit, task % a.row_chunks)


cdef int64_t _run_spmm(qsp_spmm *given, ProductRows rows, bint codes, object planes, object bias, object out,
                       int threads) except -1:
    """The product of rows with their weights and scales, which `given` has, and planes."""
    cdef qsp_spmm a = given[0]
    cdef const qsp_spmm *args = &a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef strides_t where
    cdef int64_t count = rows.target.count, i, units = 0, work = 0, tasks, task
    cdef object scratch = None
    if _as_dense(rows, codes):
        a.dense = &(<DenseRows> rows).dense
    else:
        a.list = (<GatherList> rows).list
    a.grid = rows.source.grid
    a.out = image_pointer(out, &where, &a.dtype, "out")
    a.images = rows.target.check_shape(where.size, "out")
    a.bias = <const float *> optional_pointer(bias, _float32, rows.rows, "bias")
    a.planes = pointer(planes, _uint8 if codes else _float32, rows.source.lane_count(a.images), "planes")
    if a.images * where.size[2] * where.size[3] == 0:
        return 0
    cdef bytes held = rows.target.place(a.images, where.step)
    cdef const qsp_view *each = <const qsp_view *> PyBytes_AS_STRING(held)
    for i in range(count):
        units = max(units, qsp_count_units(&a.grid, &each[i], a.images))
    if codes and a.dense == NULL and kernels.pair != NULL and rows.slots >= PAIR_SLOTS * rows.rows:
        if units >= PAIR_UNITS:
            scratch = _pair(&a, rows.slots, threads)
    a.row_chunks = _chunks(each[0].channels, units * count, threads)
    tasks = units * a.row_chunks
    # each view has its share of the slots, or, where several have the same rows, all of them
    work = rows.slots * units * QSP_UNIT * max(1, count * each[0].channels // max(rows.rows, 1))
    for task in prange(count * tasks, nogil=True, num_threads=threads, schedule="dynamic",
                       use_threads_if=threads > 1 and work > SERIAL_WORK):
        _spmm_part(kernels, args, each + task // tasks,
                   units if count == 1 else qsp_count_units(&args.grid, each + task // tasks, args.images),
                   task % tasks, codes)
    if scratch is not None:
        _spare_scratch.append(scratch)
    return 0


cdef object _pair(qsp_spmm *a, int64_t slots, int threads):
    """Let `a` refer to a copy of its list in the order of `qsp_kernels.pair`; returns the tensor that holds it."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t rows = a.list.rows, size = (4 * (rows + slots) + slots + 7) // 8, chunk, chunks
    scratch = _take_scratch(size)
    cdef int32_t *paired = <int32_t *> pointer(scratch, _int64, size, "scratch")
    cdef int32_t *offset = paired + rows
    cdef int8_t *weights = <int8_t *> (offset + slots)
    cdef const qsp_list *all_rows = &a.list
    cdef const int8_t *given = <const int8_t *> a.weights
    chunks = 1 if threads == 1 or slots < 1 << 15 else min(4 * threads, rows)
    for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
        kernels.pair(all_rows, given, qsp_cut_rows(all_rows, chunk, chunks), qsp_cut_rows(all_rows, chunk + 1, chunks),
                     paired, offset, weights)
    a.paired, a.list.offset, a.weights = paired, offset, weights
    return scratch


# Scratch memory of the last calls (sums of weight gradients), kept: fresh memory of this size would cost more in page
# faults than its use. A call takes one out, so that threads never share it.
_spare_scratch = []


cdef object _take_scratch(int64_t size):
    while _spare_scratch:
        scratch = _spare_scratch.pop()
        if scratch.numel() >= size:
            return scratch
    return torch.empty(size, dtype=_int64)


def sddmm(planes, dy, x_scale, x_zero_point, dy_scale, ProductRows rows not None, int64_t images, int64_t values,
          int threads):
    """out[index[slot]] = sum_lane dy[row, lane] * planes[offset[slot] + lane] for the slots of every row: float32, with
    so many values.

    `planes` and `dy` are both uint8 (`dy` around 128, scales given) or both float32: packed in the source and the
    target of the list, of so many images.
    """
    cdef bint codes = planes.dtype is _uint8
    cdef qsp_sddmm a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef PlaneLayout target = rows.target
    cdef int64_t units, end, chunks, chunk, lanes
    cdef bint dense = _as_dense(rows, codes)
    memset(&a, 0, sizeof(a))
    threads = max(threads, 1)
    a.grid, a.dy_grid, a.images = rows.source.grid, target.grid, images
    if dense:
        _take_dense(&a, <DenseRows> rows, values)
    else:
        _take_list(&a, <GatherList> rows, values)
    out = torch.empty(values, dtype=_float32)
    a.out = <float *> pointer(out, _float32, values, "out") if values else NULL
    lanes = target.lanes(images)  # which refuses numbers that are too large
    end = target.whole_view(&a.view)
    if a.view.channels != rows.rows:
        raise ValueError(f"the gradient has {a.view.channels} channels, group_ptr has {rows.rows} rows")
    if rows.last_offset + end > a.grid.block + a.grid.front + QSP_UNIT:
        raise ValueError(f"offset {rows.last_offset} leads past the end of planes")
    a.dy = pointer(dy, _uint8 if codes else _float32, lanes, "dy")
    a.planes = pointer(planes, _uint8 if codes else _float32, rows.source.lane_count(images), "planes")
    # the last unit of a plane must not see the next plane
    lanes = (end - a.view.origin - 1) // QSP_UNIT * QSP_UNIT
    if a.dy_grid.front + a.view.origin + lanes > a.dy_grid.pitch:
        raise ValueError(f"planes of dy must hold {a.dy_grid.front + a.view.origin + lanes} lanes, "
                         f"got {a.dy_grid.pitch}")
    if codes:
        a.scale_x = <const float *> pointer(x_scale, _float32, 1, "x_scale")
        a.zero_point = <const int32_t *> pointer(x_zero_point, _int32, 1, "x_zero_point")
        a.scale_dy = <const float *> pointer(dy_scale, _float32, 1, "dy_scale")
        a.scale_x_stride = _per_channel(x_scale, a.grid.planes, "x_scale")
        a.zero_stride = _per_channel(x_zero_point, a.grid.planes, "x_zero_point")
        a.scale_dy_stride = _per_channel(dy_scale, rows.rows, "dy_scale")
    if values:
        memset(a.out, 0, values * sizeof(float))  # also what no slot names
    if rows.slots == 0 or images == 0:
        return out
    units = qsp_count_units(&a.dy_grid, &a.view, a.images)
    chunk = 2 * units if dense else rows.slots + rows.rows
    scratch = _take_scratch(chunk)
    a.sums = pointer(scratch, _int64, chunk, "scratch")
    if threads == 1 or rows.slots * units * QSP_UNIT <= SERIAL_WORK:
        threads = 1
    chunks = 1 if threads == 1 else max(1, min(4 * threads, rows.rows))
    a.row_chunks = chunks
    cdef const qsp_sddmm *args = &a
    if dense:
        kernels.sddmm_dense_units(args)
        chunks = 0
        for chunk in range(a.dense.band_count):
            chunks += qsp_grad_blocks(&a.dense.bands[chunk], kernels.grad_rows)
        for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="dynamic", use_threads_if=threads > 1):
            kernels.sddmm_dense_u8(args, chunk)
    elif codes:
        for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="dynamic", use_threads_if=threads > 1):
            kernels.sddmm_u8(args, chunk)
    else:
        for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="dynamic", use_threads_if=threads > 1):
            kernels.sddmm_f32(args, chunk)
    _spare_scratch.append(scratch)
    return out


cdef int64_t _take_list(qsp_sddmm *a, GatherList rows, int64_t values) except -1:
    a.list, a.index, a.plane = rows.list, rows.index, rows.plane
    if rows.last_index >= values:
        raise ValueError(f"index must lie in [-1, {values}), got {rows.last_index}")
    return 0


cdef int64_t _take_dense(qsp_sddmm *a, DenseRows rows, int64_t values) except -1:
    a.dense = &rows.dense
    if rows.swapped:
        raise ValueError("the weight gradient wants rows that are planes of the output, got those of the input "
                         "gradient")
    if rows.pattern.count != values:
        raise ValueError(f"values must be {rows.pattern.count}, those of the pattern, got {values}")
    return 0


cdef int64_t _per_channel(object tensor, int64_t channels, str name) except -1:
    cdef int64_t n = numel(tensor)
    if n != 1 and n != channels:
        raise ValueError(f"{name} must have 1 or {channels} elements, got {n}")
    return 0 if n == 1 else 1


def gather_weight(values, ProductRows given not None, out):
    """The values of the slots of a list, float32, zero for padding."""
    _as_dense(given, False)
    cdef GatherList rows = <GatherList> given
    cdef int64_t i
    cdef const float *v
    cdef float *slots
    if numel(values) <= rows.last_index:
        raise ValueError(f"values must have at least {rows.last_index + 1} elements, got {numel(values)}")
    v = <const float *> pointer(values, _float32, 0, "values")
    slots = <float *> pointer(out, _float32, rows.slots, "out")
    with nogil:
        for i in range(rows.slots):
            slots[i] = v[rows.index[i]] if rows.index[i] >= 0 else 0


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
    _run_quantize(&a, rows, values, factor, zero_point, clip, max(threads, 1))


cdef int64_t _run_quantize(qsp_weight *a, ProductRows rows, object values, object factor, object zero_point,
                           object clip, int threads) except -1:
    """Quantise the weights of rows; `a` has where the results go."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t n = numel(values), chunk, chunks
    cdef const qsp_weight *args = a
    cdef GatherList slots
    a.values = <const float *> pointer(values, _float32, 0, "values") if n else NULL
    if clip is not None:
        a.clip = (<const float *> pointer(clip, _float32, 1, "clip"))[0]
        if not 0 < a.clip < INFINITY:  # of a weight of zeros, or one with NaN or Inf, whose rows say so themselves
            a.clip = 0
    _folded = _fold(a, rows, factor, zero_point)  # kept until the end: `a` points into it
    if _as_dense(rows, True):
        return _run_quantize_dense(a, <DenseRows> rows, n, threads)
    slots = <GatherList> rows
    a.list, a.index, a.plane = slots.list, slots.index, slots.plane
    if slots.last_index >= n:
        raise ValueError(f"values must have at least {slots.last_index + 1} elements, got {n}")
    chunks = 1 if threads == 1 or rows.slots < 1 << 15 else min(4 * threads, rows.rows)
    for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
        kernels.quantize_rows(args, qsp_cut_rows(&args.list, chunk, chunks),
                              qsp_cut_rows(&args.list, chunk + 1, chunks))
    return 0


cdef int64_t _run_quantize_dense(qsp_weight *a, DenseRows rows, int64_t n, int threads) except -1:
    """The same of dense rows; where these are not the values' rows, scales come first."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef const qsp_weight *args = a
    cdef const qsp_dense *d = &rows.dense
    cdef int64_t line = (d.columns + 15) // 16 * 16, all_columns = d.groups * d.columns, chunk, i, tile
    cdef int64_t tiles = d.groups * ((d.value_rows // d.groups + 15) // 16)
    cdef int64_t chunks = 1 if threads == 1 or rows.slots < 1 << 15 else min(<int64_t> threads, d.value_rows)
    cdef int64_t lines = chunks * line * (16 if rows.swapped else 2), size
    cdef float *space
    cdef uint32_t *most
    a.dense = d
    if n != rows.pattern.count:
        raise ValueError(f"values must have {rows.pattern.count} elements, got {n}")
    size = (lines + (chunks * all_columns if rows.swapped else 0)) // 2 + 1
    scratch = _take_scratch(size)
    space = <float *> pointer(scratch, _int64, size, "scratch")
    most = <uint32_t *> (space + lines)
    if not rows.swapped:
        for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
            kernels.dense_rows(args, d.rows * chunk // chunks, d.rows * (chunk + 1) // chunks, space + 2 * chunk * line)
    else:
        memset(most, 0, chunks * all_columns * sizeof(uint32_t))
        memset(a.codes, 0, rows.slots)
        for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
            kernels.dense_column_max(args, d.value_rows * chunk // chunks, d.value_rows * (chunk + 1) // chunks,
                                     most + chunk * all_columns)
        for chunk in range(1, chunks):
            for i in range(all_columns):
                most[i] = max(most[i], most[chunk * all_columns + i])
        kernels.dense_scales(args, most)
        for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
            for tile in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
                kernels.dense_columns(args, tile, <const float *> most, space + 16 * chunk * line)
    for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
        kernels.dense_totals(args, d.rows * chunk // chunks, d.rows * (chunk + 1) // chunks)
    _spare_scratch.append(scratch)
    return 0


cdef object _fold(qsp_weight *a, ProductRows rows, object factor, object zero_point):
    """Factors and zero points of the planes; returns what holds the former.

    The factors are divided by a power of two near the largest, which the scale gets back, so that no product becomes so
    small that it loses digits. Those that are not finite become NaN: zero times Inf, as padding has it, would be NaN
    where a row's weights are Inf.
    """
    cdef int64_t planes = rows.source.grid.planes, i
    cdef const float *given
    cdef const int32_t *zeros
    cdef float *folded
    cdef float largest = 0
    cdef int exponent = 0
    a.scale_factor = a.zero_factor = 1
    if zero_point is not None:
        zeros = <const int32_t *> pointer(zero_point, _int32, 1, "zero_point")
        a.zero_factor = zeros[0]
        if _per_channel(zero_point, planes, "zero_point"):
            for i in range(planes):
                if zeros[i] != zeros[0]:
                    a.zero_point = zeros
                    break
    if factor is None:
        return None
    given = <const float *> pointer(factor, _float32, 1, "factor")
    if not _per_channel(factor, planes, "factor"):
        a.scale_factor = given[0]
        return None
    cdef bytes out = PyBytes_FromStringAndSize(NULL, planes * sizeof(float))  # cheaper than a tensor
    folded = <float *> PyBytes_AS_STRING(out)
    for i in range(planes):
        if isfinite(given[i]):
            largest = max(largest, given[i])
    if largest > 0:
        frexpf(largest, &exponent)
    exponent = max(-126, min(126, exponent))
    a.scale_factor = ldexpf(1, exponent)
    for i in range(planes):
        folded[i] = given[i] * ldexpf(1, -exponent) if isfinite(given[i]) else NAN
    a.factor = folded
    return out
