"""The two products of every layer, gather-SpMM and gather-SDDMM, and the quantiser of their weights."""

import torch

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.parallel cimport prange
from libc.math cimport INFINITY, isfinite
from libc.stdint cimport int8_t, int32_t, int64_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport (
    QSP_UNIT,
    active_kernels,
    qsp_count_units,
    qsp_cut_rows,
    qsp_grid,
    qsp_kernels,
    qsp_list,
    qsp_sddmm,
    qsp_spmm,
    qsp_view,
    qsp_weight,
)
from qsparseprop._kernels._tensor cimport (
    check_lanes,
    numel,
    optional_pointer,
    pointer,
    read_grid,
    read_views,
    strided_pointer,
)

cdef enum:
    # multiply-adds below which starting threads costs more than it gives
    SERIAL_WORK = 1 << 20
    # units of lanes, and slots of a row, from which bringing a list into another order first pays
    PAIR_UNITS = 4
    PAIR_SLOTS = 16
    # a row of 2**31 - 1 bytes of planes is where int32 offsets end
    MAX_ROWS = 0x7ffffff0

cdef object _float32 = torch.float32
cdef object _int32 = torch.int32
cdef object _int8 = torch.int8
cdef object _uint8 = torch.uint8
cdef object _int64 = torch.int64

cdef extern from "<math.h>" nogil:
    float frexpf(float, int *)
    float ldexpf(float, int)

cdef extern from *:
    """
    static int qsp_ascending(const int32_t *v, int64_t n)
    {
        int ok = 1;
        for (int64_t i = 1; i < n; i++)
            ok &= v[i] >= v[i - 1];
        return ok;
    }
    """
    int qsp_ascending(const int32_t *v, int64_t n) noexcept nogil


cdef int64_t _read_list(object group_ptr, object offset, qsp_list *out, int32_t *low, int32_t *high) except -1:
    """Check a list as a whole, so that the kernels need not; returns its number of slots."""
    cdef int64_t rows = numel(group_ptr) - 1, slots
    if not 0 <= rows < MAX_ROWS:
        raise ValueError(f"group_ptr must have 1 to {MAX_ROWS} elements, got {rows + 1}")
    out.rows = rows
    out.group_ptr = <const int32_t *> pointer(group_ptr, _int32, rows + 1, "group_ptr")
    slots = 4 * <int64_t> out.group_ptr[rows]
    if out.group_ptr[0] != 0 or not qsp_ascending(out.group_ptr, rows + 1):
        raise ValueError("group_ptr must ascend from 0")
    out.offset = <const int32_t *> pointer(offset, _int32, slots, "offset")
    active_kernels().extent(out.offset, slots, low, high)
    if slots and low[0] < 0:
        raise ValueError(f"offset must not be negative, got {low[0]}")
    return slots


cdef void _check_index(const int32_t *v, int64_t n, int64_t low, int64_t high, str name) except *:
    cdef int32_t least = 0, most = 0
    if n == 0:
        return
    active_kernels().extent(v, n, &least, &most)
    if least < low or most >= high:
        raise ValueError(f"{name} must lie in [{low}, {high}), got {least} to {most}")


cdef int64_t _chunks(const qsp_list *rows, int64_t units, int threads):
    """Parts into which the rows are cut, so that every thread has some four tasks."""
    if threads == 1 or units >= 4 * threads:
        return 1
    return max(1, min((4 * threads + units - 1) // max(units, 1), rows.rows // 16))


def spmm(planes, weights, group_ptr, offset, scale, correction, x_scale, x_zero_point, bias, out, grid, views,
         int threads, float least=-INFINITY, float greatest=INFINITY):
    """out[row, lane] = sum_k weights[row, k] * planes[offset[row, k] + lane], unpacked into `out`.

    `planes` and `weights` are uint8 and int8 (then `scale` and `correction`, the sums of a row's codes, are given, and
    `x_scale` and `x_zero_point` unless these two have them in) or both float32. `out` is float32 or bfloat16, (images,
    channels, height, width) of any strides that do not overlap; rows are the channels of all views, one view after the
    other. `least` and `greatest` limit the result; without a bias it has no limits.
    """
    cdef bint codes = planes.dtype is _uint8
    cdef qsp_spmm a
    cdef int32_t low = 0, high = 0
    cdef int64_t slots
    memset(&a, 0, sizeof(a))
    slots = _read_list(group_ptr, offset, &a.list, &low, &high)
    a.weights = pointer(weights, _int8 if codes else _float32, slots, "weights")
    a.scale_factor, a.low, a.high = 1, least, greatest
    if codes:
        a.scale = <const float *> pointer(scale, _float32, a.list.rows, "scale")
        a.correction = <const int64_t *> pointer(correction, _int64, a.list.rows, "correction")
        if x_scale is not None:
            a.scale_factor = (<const float *> pointer(x_scale, _float32, 1, "x_scale"))[0]
        a.correction_factor = -1
        if x_zero_point is not None:
            a.correction_factor = -(<const int32_t *> pointer(x_zero_point, _int32, 1, "x_zero_point"))[0]
    _multiply(&a, slots, high, codes, planes, bias, out, grid, views, max(threads, 1))


def quantized_spmm(values, index, group_ptr, offset, plane, x_scale, x_zero_point, clip, planes, bias, out, grid, views,
                   int threads, factor=None, float least=-INFINITY, float greatest=INFINITY):
    """`quantize_weight` and `spmm` in one call, for codes: the weight's are kept nowhere.

    `x_scale` and `x_zero_point` have one element or one for each plane, which the weights then are quantised with.
    `factor`, float32 (rows,) or None, is multiplied into the rows of the product before the bias.
    """
    cdef int64_t row
    cdef const float *factors = NULL
    cdef qsp_spmm a
    cdef qsp_weight w
    cdef int32_t low = 0, high = 0
    cdef int64_t slots, size
    cdef bint one = numel(x_scale) == 1
    memset(&a, 0, sizeof(a))
    memset(&w, 0, sizeof(w))
    threads = max(threads, 1)
    slots = _read_list(group_ptr, offset, &a.list, &low, &high)
    size = a.list.rows + (4 * a.list.rows + slots + 7) // 8
    scratch = _take_scratch(size)
    w.list = a.list
    w.total = <int64_t *> pointer(scratch, _int64, size, "scratch")
    w.scale = <float *> (w.total + a.list.rows)
    w.codes = <int8_t *> (w.scale + a.list.rows)
    _quantize(&w, slots, values, index, plane, None if one else x_scale, None if one else x_zero_point, clip, threads)
    if factor is not None:
        factors = <const float *> pointer(factor, _float32, a.list.rows, "factor")
        for row in range(a.list.rows):
            w.scale[row] *= factors[row]
    a.weights, a.scale, a.correction = w.codes, w.scale, w.total
    a.scale_factor, a.correction_factor, a.low, a.high = 1, -1, least, greatest
    if one:
        a.scale_factor = (<const float *> pointer(x_scale, _float32, 1, "x_scale"))[0]
        a.correction_factor = -(<const int32_t *> pointer(x_zero_point, _int32, 1, "x_zero_point"))[0]
    _multiply(&a, slots, high, True, planes, bias, out, grid, views, threads)
    _spare_scratch.append(scratch)


cdef void _multiply_part(const qsp_kernels *kernels, const qsp_spmm *a, const qsp_view *view, int64_t units,
                         int64_t task, bint codes) noexcept nogil:
    """One unit of a view and one part of its rows; views of fewer than `units` units have tasks without work."""
    cdef int64_t unit = task // a.row_chunks, row = view.plane
    cdef qsp_spmm one
    if unit >= units:
        return
    one = a[0]
    one.view = view[0]
    one.list.rows = view.channels
    one.list.group_ptr += row
    if a.scale != NULL:
        one.scale += row
        one.correction += row
    if a.paired != NULL:
        one.paired += row
    if a.bias != NULL:
        one.bias += row
    if codes:
        kernels.spmm_u8(&one, unit, task % a.row_chunks)
    else:
        kernels.spmm_f32(&one, unit, task % a.row_chunks)


cdef int64_t _multiply(qsp_spmm *given, int64_t slots, int32_t high, bint codes, object planes, object bias, object out,
                       object grid, object views, int threads) except -1:
    """The product of a list with its weights and scales, which `given` has, and planes."""
    cdef qsp_spmm a = given[0]
    cdef const qsp_spmm *args = &a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t count, i, row = 0, blocks, units = 0, work = 0, tasks, end, task
    cdef object scratch = None
    cdef qsp_list part
    read_grid(grid, &a.grid, "grid")
    a.planes = pointer(planes, _uint8 if codes else _float32, 1, "planes")
    a.bias = <const float *> optional_pointer(bias, _float32, a.list.rows, "bias")
    a.out = strided_pointer(out, &a.dtype, "out")
    # planes of the output are numbered by the rows of the list
    cdef qsp_grid rows_grid = a.grid
    rows_grid.planes = a.list.rows if a.list.rows > 0 else 1
    cdef bytes held = read_views(views, &rows_grid, out.shape, out.stride(), "out")
    cdef const qsp_view *each = <const qsp_view *> PyBytes_AS_STRING(held)
    count = len(held) // sizeof(qsp_view)
    a.images = out.shape[0]
    if numel(out) == 0:
        return 0
    blocks = (a.images + a.grid.images - 1) // a.grid.images
    for i in range(count):
        if i == 0 or each[i].plane != each[i - 1].plane:  # not the same rows once more
            row += each[i].channels
        end = check_lanes(&a.grid, &each[i], a.images, "out")
        if slots and (blocks - 1) * a.grid.block + end + high > numel(planes):
            raise ValueError(f"offset {high} leads past the end of planes, which has {numel(planes)} lanes")
        units = max(units, qsp_count_units(&a.grid, &each[i], a.images))
    if row != a.list.rows:
        raise ValueError(f"the views of out have {row} channels, group_ptr has {a.list.rows} rows")
    if codes and kernels.pair != NULL and slots >= PAIR_SLOTS * a.list.rows:
        if units >= PAIR_UNITS:
            scratch = _pair(&a, slots, threads)
    part = a.list
    part.rows = each[0].channels
    a.row_chunks = _chunks(&part, units * count, threads)
    tasks = units * a.row_chunks
    # each view has its share of the slots, or, where several have the same rows, all of them
    work = slots * units * QSP_UNIT * max(1, count * each[0].channels // max(row, 1))
    for task in prange(count * tasks, nogil=True, num_threads=threads, schedule="dynamic",
                       use_threads_if=threads > 1 and work > SERIAL_WORK):
        _multiply_part(kernels, args, each + task // tasks,
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


def sddmm(planes, dy, group_ptr, offset, index, plane, x_scale, x_zero_point, dy_scale, out, grid, dy_grid, views,
          shape, int threads):
    """out[index[slot]] = sum_lane dy[row, lane] * planes[offset[slot] + lane] for the slots of every row.

    `planes` and `dy` are both uint8 (`dy` around 128, scales given) or both float32; `shape` is that of dy's tensor
    (images, rows, height, width), `views` its single view, `plane` the plane of x that a slot reads.
    """
    cdef bint codes = planes.dtype is _uint8
    cdef qsp_sddmm a
    cdef bytes view
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int32_t low = 0, high = 0
    cdef int64_t slots, blocks, units, end, values, chunks, chunk, lanes
    memset(&a, 0, sizeof(a))
    threads = max(threads, 1)
    read_grid(grid, &a.grid, "grid")
    read_grid(dy_grid, &a.dy_grid, "dy_grid")
    slots = _read_list(group_ptr, offset, &a.list, &low, &high)
    values = numel(out)
    a.out = <float *> pointer(out, _float32, 0, "out") if values else NULL
    a.index = <const int32_t *> pointer(index, _int32, slots, "index")
    a.plane = <const int32_t *> pointer(plane, _int32, slots, "plane")
    _check_index(a.index, slots, -1, values, "index")
    _check_index(a.plane, slots, 0, a.grid.planes, "plane")
    view = read_views(views, &a.dy_grid, shape, (0, 0, 0, 0), "dy")
    if len(view) != sizeof(qsp_view):
        raise ValueError("dy must have one view")
    a.view = (<const qsp_view *> PyBytes_AS_STRING(view))[0]
    if a.list.rows != a.view.channels or a.view.plane != 0:
        raise ValueError(f"dy has {a.view.channels} channels, group_ptr has {a.list.rows} rows")
    if (a.grid.lane_b != a.dy_grid.lane_b or a.grid.lane_y != a.dy_grid.lane_y or a.grid.lane_x != a.dy_grid.lane_x
            or a.grid.images != a.dy_grid.images):
        raise ValueError("grid and dy_grid must have the same lanes")
    a.images = shape[0]
    if values:
        memset(a.out, 0, values * sizeof(float))  # also what no slot names
    if slots == 0 or a.images == 0:
        return
    blocks = (a.images + a.grid.images - 1) // a.grid.images
    end = check_lanes(&a.dy_grid, &a.view, a.images, "dy")
    a.planes = pointer(planes, _uint8 if codes else _float32, 1, "planes")
    a.dy = pointer(dy, _uint8 if codes else _float32, blocks * a.dy_grid.block, "dy")
    if (blocks - 1) * a.grid.block + end + high > numel(planes):
        raise ValueError(f"offset {high} leads past the end of planes, which has {numel(planes)} lanes")
    # the last unit of a plane must not see the next plane
    lanes = (end - QSP_UNIT - a.view.origin + QSP_UNIT - 1) // QSP_UNIT * QSP_UNIT
    if a.dy_grid.front + a.view.origin + lanes > a.dy_grid.pitch:
        raise ValueError(f"planes of dy must hold {a.dy_grid.front + a.view.origin + lanes} lanes, "
                         f"got {a.dy_grid.pitch}")
    if codes:
        a.scale_x = <const float *> pointer(x_scale, _float32, 1, "x_scale")
        a.zero_point = <const int32_t *> pointer(x_zero_point, _int32, 1, "x_zero_point")
        a.scale_dy = <const float *> pointer(dy_scale, _float32, 1, "dy_scale")
        a.scale_x_stride = _per_channel(x_scale, a.grid.planes, "x_scale")
        a.zero_stride = _per_channel(x_zero_point, a.grid.planes, "x_zero_point")
        a.scale_dy_stride = _per_channel(dy_scale, a.list.rows, "dy_scale")
    scratch = _take_scratch(slots + a.list.rows)
    a.sums = pointer(scratch, _int64, slots + a.list.rows, "scratch")
    units = qsp_count_units(&a.dy_grid, &a.view, a.images)
    if threads == 1 or slots * units * QSP_UNIT <= SERIAL_WORK:
        threads = 1
    chunks = 1 if threads == 1 else max(1, min(4 * threads, a.list.rows))
    a.row_chunks = chunks
    cdef const qsp_sddmm *args = &a
    if codes:
        for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="dynamic", use_threads_if=threads > 1):
            kernels.sddmm_u8(args, chunk)
    else:
        for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="dynamic", use_threads_if=threads > 1):
            kernels.sddmm_f32(args, chunk)
    _spare_scratch.append(scratch)


cdef int64_t _per_channel(object tensor, int64_t channels, str name) except -1:
    cdef int64_t n = numel(tensor)
    if n != 1 and n != channels:
        raise ValueError(f"{name} must have 1 or {channels} elements, got {n}")
    return 0 if n == 1 else 1


def quantize_weight(values, index, group_ptr, plane, factor, zero_point, clip, codes, scale, total, int threads):
    """Symmetric codes of the slots of a list, one scale a row (`scale`, float32), and `total` (int64), the sums of a
    row's codes times the zero points. `factor` and `zero_point` are None or of the planes that slots read, or of all;
    `clip` is None or what the largest code stands for in every row.
    """
    cdef qsp_weight a
    cdef int64_t count = numel(group_ptr) - 1, slots
    if not 0 <= count < MAX_ROWS:
        raise ValueError(f"group_ptr must have 1 to {MAX_ROWS} elements, got {count + 1}")
    memset(&a, 0, sizeof(a))
    a.list.rows = count
    a.list.group_ptr = <const int32_t *> pointer(group_ptr, _int32, count + 1, "group_ptr")
    slots = 4 * <int64_t> a.list.group_ptr[count]
    if a.list.group_ptr[0] != 0 or not qsp_ascending(a.list.group_ptr, count + 1):
        raise ValueError("group_ptr must ascend from 0")
    a.codes = <int8_t *> pointer(codes, _int8, slots, "codes") if slots else NULL
    a.scale = <float *> pointer(scale, _float32, count, "scale") if count else NULL
    a.total = <int64_t *> pointer(total, _int64, count, "total") if count else NULL
    _quantize(&a, slots, values, index, plane, factor, zero_point, clip, max(threads, 1))


cdef int64_t _quantize(qsp_weight *a, int64_t slots, object values, object index, object plane, object factor,
                       object zero_point, object clip, int threads) except -1:
    """Quantise a list; `a` has it and where the results go."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t n = numel(values), count = a.list.rows, chunk, chunks
    cdef const qsp_weight *args = a
    a.values = <const float *> pointer(values, _float32, 0, "values") if n else NULL
    a.index = <const int32_t *> pointer(index, _int32, slots, "index") if slots else NULL
    _check_index(a.index, slots, -1, n, "index")
    if clip is not None:
        a.clip = (<const float *> pointer(clip, _float32, 1, "clip"))[0]
        if not 0 < a.clip < INFINITY:  # of a weight of zeros, or one with NaN or Inf, whose rows say so themselves
            a.clip = 0
    _folded = _fold(a, slots, plane, factor, zero_point)  # kept until the end: `a` points into it
    chunks = 1 if threads == 1 or slots < 1 << 15 else min(4 * threads, count)
    for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
        kernels.quantize_rows(args, qsp_cut_rows(&args.list, chunk, chunks),
                              qsp_cut_rows(&args.list, chunk + 1, chunks))
    return 0


cdef object _fold(qsp_weight *a, int64_t slots, object plane, object factor, object zero_point):
    """Factors and zero points of the planes; returns what holds the former.

    The factors are divided by a power of two near the largest, which the scale gets back, so that no product becomes so
    small that it loses digits.
    """
    cdef int64_t planes = 1, i
    cdef const float *given
    cdef const int32_t *zeros
    cdef float *folded
    cdef float largest = 0
    cdef int exponent = 0
    a.scale_factor = a.zero_factor = 1
    for tensor, name in ((factor, "factor"), (zero_point, "zero_point")):
        if tensor is not None and numel(tensor) != 1:
            if planes != 1 and planes != numel(tensor):
                raise ValueError(f"{name} must have 1 or {planes} elements, got {numel(tensor)}")
            planes = numel(tensor)
    if planes != 1:
        a.plane = <const int32_t *> pointer(plane, _int32, slots, "plane")
        _check_index(a.plane, slots, 0, planes, "plane")
    if zero_point is not None and numel(zero_point):
        zeros = <const int32_t *> pointer(zero_point, _int32, 1, "zero_point")
        a.zero_factor = zeros[0]
        for i in range(numel(zero_point)):
            if zeros[i] != zeros[0]:
                a.zero_point = zeros
                break
    if factor is None or numel(factor) == 0:
        return None
    given = <const float *> pointer(factor, _float32, 1, "factor")
    if numel(factor) == 1:
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
        folded[i] = given[i] * ldexpf(1, -exponent)
    a.factor = folded
    return out
