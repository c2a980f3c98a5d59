"""The two products of every layer, gather-SpMM and gather-SDDMM, on lists and on dense rows."""

import torch

from qsparseprop._kernels._memory import empty

from cpython.bytes cimport PyBytes_AS_STRING
from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY
from libc.stdint cimport int8_t, int32_t, int64_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport (
    QSP_GROUP,
    QSP_ROW_BLOCK,
    QSP_UNIT,
    active_kernels,
    qsp_count_units,
    qsp_cut_rows,
    qsp_grad_blocks,
    qsp_kernels,
    qsp_list,
    qsp_nonzeros,
    qsp_sddmm,
    qsp_spmm,
    qsp_view,
    qsp_weight,
)
from qsparseprop._kernels._dense_rows cimport DenseRows
from qsparseprop._kernels._gather_list cimport GatherList, PatternList
from qsparseprop._kernels._plan cimport PlaneLayout, ProductRows
from qsparseprop._kernels._tensor cimport image_pointer, numel, optional_pointer, pointer, strides_t
from qsparseprop._kernels._weights cimport (
    as_dense,
    cut_rows,
    give_scratch,
    parts_of,
    per_channel,
    quantize_dense,
    quantize_slots,
    take_scratch,
    take_weights,
)

cdef enum:
    # multiply-adds below which starting threads costs more than it gives
    SERIAL_WORK = 1 << 20
    # units of lanes, and slots of a row, from which bringing a list into another order first pays
    PAIR_UNITS = 4
    PAIR_SLOTS = 16
    # slots of a list for which offsets and weights, or sums, are written out at a time: of each thread
    PART_SLOTS = 1 << 17
    SUM_SLOTS = 1 << 16

cdef object _float32 = torch.float32
cdef object _int32 = torch.int32
cdef object _int8 = torch.int8
cdef object _uint8 = torch.uint8
cdef object _int64 = torch.int64


cdef int64_t _chunks(int64_t rows, int64_t units, int threads):
    """Parts into which the rows are cut, so that every thread has some four tasks."""
    if threads == 1 or units >= 4 * threads:
        return 1
    return max(1, min((4 * threads + units - 1) // max(units, 1), rows // 16))


cdef bint _are_codes(object planes) except -1:
    if not isinstance(planes, torch.Tensor):
        raise TypeError(f"planes must be a tensor, got {type(planes).__name__}")
    return planes.dtype is _uint8


def spmm(planes, weights, scale, correction, x_scale, x_zero_point, ProductRows rows not None, bias, out, int threads,
         float least=-INFINITY, float greatest=INFINITY):
    """out[row, lane] = sum_k weights[row, k] * planes[offset[row, k] + lane], unpacked into `out`.

    `planes` and `weights` are uint8 and int8 (then `scale` and `correction`, the sums of a row's codes, are given, and
    `x_scale` and `x_zero_point` unless these two have them in) or both float32. `out` is a tensor of the list's target,
    float32 or bfloat16, of any strides that do not overlap. `least` and `greatest` limit the result; without a bias it
    has no limits.
    """
    cdef bint codes = _are_codes(planes)
    cdef qsp_spmm a
    memset(&a, 0, sizeof(a))
    as_dense(rows, codes)
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
    _run_spmm(&a, NULL, rows, codes, planes, bias, out, max(threads, 1))


def quantized_spmm(values, ProductRows rows not None, x_scale, x_zero_point, clip, planes, bias, out, int threads,
                   float least=-INFINITY, float greatest=INFINITY):
    """`quantize_weight` and `spmm` in one call, for codes: the weight's are kept nowhere.

    `x_scale` and `x_zero_point` have one element or one for each plane, which the weights then are quantised with.
    """
    cdef qsp_spmm a
    cdef qsp_weight w
    cdef int64_t size, lines = (rows.rows + 15) // 16 * 16  # so that codes begin a line of the cache
    cdef bint one = numel(x_scale) == 1, dense = as_dense(rows, True)
    memset(&a, 0, sizeof(a))
    memset(&w, 0, sizeof(w))
    threads = max(threads, 1)
    size = lines + (4 * lines + (rows.slots if dense else 0) + 7) // 8
    scratch = take_scratch(size)
    w.total = <int64_t *> pointer(scratch, _int64, size, "scratch")
    w.scale = <float *> (w.total + lines)
    w.codes = <int8_t *> (w.scale + lines)
    a.weights, a.scale, a.correction = w.codes, w.scale, w.total
    a.scale_factor, a.correction_factor, a.low, a.high = 1, -1, least, greatest
    if one:
        a.scale_factor = (<const float *> pointer(x_scale, _float32, 1, "x_scale"))[0]
        a.correction_factor = -(<const int32_t *> pointer(x_zero_point, _int32, 1, "x_zero_point"))[0]
    _folded = take_weights(&w, rows, values, None if one else x_scale, None if one else x_zero_point, clip)
    if dense:
        quantize_dense(&w, <DenseRows> rows, threads)
        _run_spmm(&a, NULL, rows, True, planes, bias, out, threads)
    else:
        _run_spmm(&a, &w, rows, True, planes, bias, out, threads)
    give_scratch(scratch)


cdef void _spmm_part(const qsp_kernels *kernels, const qsp_spmm *a, const qsp_view *view, int64_t units, int64_t first,
                     int64_t last, int64_t task, bint codes) noexcept nogil:
    """One unit of a view and one part of those of its rows that lie in [first, last); views of fewer than `units`
    units have tasks without work."""
    cdef int64_t unit = task // a.row_chunks, row = max(view.plane, first), end = min(view.plane + view.channels, last)
    cdef qsp_spmm one
    if unit >= units or row >= end:
        return
    one = a[0]
    one.view = view[0]
    one.view.elem += (row - view.plane) * view.elem_c
    one.view.index += (row - view.plane) * view.index_c
    one.view.plane, one.view.channels = row, end - row
    if a.dense == NULL:
        one.list.rows = end - row
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


cdef int64_t _run_spmm(qsp_spmm *given, qsp_weight *weights, ProductRows rows, bint codes, object planes, object bias,
                       object out, int threads) except -1:
    """The product of rows with planes, and with their weights and scales, which `given` has, or `weights` makes."""
    cdef qsp_spmm a = given[0]
    cdef strides_t where
    cdef int64_t count = rows.target.count, i, units = 0
    cdef bint dense = as_dense(rows, codes)
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
    if dense:
        a.dense = &(<DenseRows> rows).dense
        return _spmm_rows(&a, each, count, units, 0, rows.rows, rows.slots, codes, threads)
    return _spmm_list(&a, weights, <GatherList> rows, each, count, units, codes, threads)


cdef int64_t _spmm_rows(const qsp_spmm *given, const qsp_view *each, int64_t count, int64_t units, int64_t first,
                        int64_t last, int64_t slots, bint codes, int threads) except -1:
    """All units of all views, of rows [first, last), which have so many slots."""
    cdef qsp_spmm a = given[0]
    cdef const qsp_spmm *args = &a
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t work, tasks, task
    a.row_chunks = _chunks(min(each[0].channels, last - first), units * count, threads)
    tasks = units * a.row_chunks
    # each view has its share of the slots, or, where several have the same rows, all of them
    work = slots * units * QSP_UNIT * max(1, count * each[0].channels // max(last - first, 1))
    for task in prange(count * tasks, nogil=True, num_threads=threads, schedule="dynamic",
                       use_threads_if=threads > 1 and work > SERIAL_WORK):
        _spmm_part(kernels, args, each + task // tasks,
                   units if count == 1 else qsp_count_units(&args.grid, each + task // tasks, args.images),
                   first, last, task % tasks, codes)
    return 0


cdef int64_t _part_end(const qsp_nonzeros *l, int64_t first, int64_t slots) noexcept nogil:
    """The end of the rows from `first` on that have about so many slots: whole blocks of rows, at least one."""
    cdef int64_t last = min(first + QSP_ROW_BLOCK, l.rows), after = last
    while after < l.rows and QSP_GROUP * <int64_t> (l.group_ptr[after] - l.group_ptr[first]) <= slots:
        last, after = after, min(after + QSP_ROW_BLOCK, l.rows)
    if QSP_GROUP * <int64_t> (l.group_ptr[after] - l.group_ptr[first]) <= slots:
        last = after
    return last


cdef int64_t _spmm_list(qsp_spmm *a, qsp_weight *w, GatherList rows, const qsp_view *each, int64_t count, int64_t units,
                        bint codes, int threads) except -1:
    """Some rows after the other, for which offsets, and weights where they are not given, are written out."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef const qsp_nonzeros *n = &rows.nonzeros
    cdef const char *given = <const char *> a.weights
    cdef int64_t first = 0, last, most = 0, slots, size, limit = PART_SLOTS * <int64_t> threads, chunk, chunks, begin
    cdef bint pair = (codes and kernels.pair != NULL and rows.slots >= PAIR_SLOTS * rows.rows and units >= PAIR_UNITS)
    while first < n.rows:
        last = _part_end(n, first, limit)
        most, first = max(most, QSP_GROUP * <int64_t> (n.group_ptr[last] - n.group_ptr[first])), last
    size = (4 * (most + (most + rows.rows if pair else 0)) + most * (pair + (w != NULL)) + 7) // 8
    scratch = take_scratch(size)
    cdef int32_t *offset = <int32_t *> pointer(scratch, _int64, size, "scratch")
    cdef int32_t *paired_offset = offset + most
    cdef int32_t *paired = paired_offset + most
    cdef int8_t *made = <int8_t *> (paired + rows.rows if pair else paired_offset)
    cdef int8_t *paired_weights = made + (most if w != NULL else 0)
    cdef const qsp_list *part = &a.list
    cdef const int8_t *unpaired
    rows.settle()
    a.list.group_ptr = n.group_ptr
    first = 0
    while first < n.rows:
        last = _part_end(n, first, limit)
        a.list.rows, a.list.base, a.list.offset = last, n.group_ptr[first], offset
        slots = QSP_GROUP * <int64_t> (n.group_ptr[last] - n.group_ptr[first])
        if rows.kept_offsets != NULL:
            a.list.offset = rows.kept_offsets + QSP_GROUP * a.list.base
        if w != NULL:
            w.base, w.codes, w.offset = a.list.base, made, NULL if rows.kept_offsets != NULL else offset
            quantize_slots(w, first, last, threads)
            a.weights = made
        elif rows.kept_offsets == NULL:
            chunks = parts_of(slots, last - first, threads)
            for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
                begin = first + (last - first) * chunk // chunks
                kernels.offsets(n, begin, first + (last - first) * (chunk + 1) // chunks,
                                offset + QSP_GROUP * (n.group_ptr[begin] - part.base))
        if w == NULL:
            a.weights = given + QSP_GROUP * a.list.base * (1 if codes else sizeof(float))
        if pair:
            unpaired = <const int8_t *> a.weights
            chunks = parts_of(slots, last - first, threads)
            for chunk in prange(chunks, nogil=True, num_threads=threads, schedule="static", use_threads_if=chunks > 1):
                kernels.pair(part, unpaired, cut_rows(n, first, last, chunk, chunks),
                             cut_rows(n, first, last, chunk + 1, chunks), paired, paired_offset, paired_weights)
            a.paired, a.list.offset, a.weights = paired, paired_offset, paired_weights
        _spmm_rows(a, each, count, units, first, last, slots, codes, threads)
        first = last
    give_scratch(scratch)
    return 0


def sddmm(planes, dy, x_scale, x_zero_point, dy_scale, ProductRows rows not None, int64_t images, int64_t values,
          int threads):
    """out[index[slot]] = sum_lane dy[row, lane] * planes[offset[slot] + lane] for the slots of every row: float32, with
    so many values.

    `planes` and `dy` are both uint8 (`dy` around 128, scales given) or both float32: packed in the source and the
    target of the list, of so many images.
    """
    cdef bint codes = _are_codes(planes)
    cdef qsp_sddmm a
    cdef PlaneLayout target = rows.target
    cdef int64_t units, end, lanes
    cdef bint dense = as_dense(rows, codes)
    memset(&a, 0, sizeof(a))
    threads = max(threads, 1)
    a.grid, a.dy_grid, a.images = rows.source.grid, target.grid, images
    if dense:
        _take_dense(&a, <DenseRows> rows, values)
    else:
        _take_list(&a, <GatherList> rows, values)
    out = empty((values,), _float32)
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
        a.scale_x_stride = per_channel(x_scale, a.grid.planes, "x_scale")
        a.zero_stride = per_channel(x_zero_point, a.grid.planes, "x_zero_point")
        a.scale_dy_stride = per_channel(dy_scale, rows.rows, "dy_scale")
    # what no slot names is zero; of a pattern each value has one, and so is written by the kernels if they run
    runs = rows.slots > 0 and images > 0
    if values and not (runs and (dense or (isinstance(rows, PatternList)
                                           and values == (<PatternList> rows).pattern.count))):
        memset(a.out, 0, values * sizeof(float))
    if not runs:
        return out
    units = qsp_count_units(&a.dy_grid, &a.view, a.images)
    if threads == 1 or rows.slots * units * QSP_UNIT <= SERIAL_WORK:
        threads = 1
    if dense:
        _sddmm_dense(&a, units, threads)
    else:
        _sddmm_list(&a, rows.slots, codes, threads)
    return out


cdef int64_t _sddmm_dense(qsp_sddmm *a, int64_t units, int threads) except -1:
    cdef const qsp_kernels *kernels = active_kernels()
    cdef const qsp_sddmm *args = a
    cdef int64_t block, blocks = 0
    for block in range(a.dense.band_count):
        blocks += qsp_grad_blocks(&a.dense.bands[block], kernels.grad_rows)
    scratch = take_scratch(2 * units)
    a.sums = pointer(scratch, _int64, 2 * units, "scratch")
    kernels.sddmm_dense_units(args)
    for block in prange(blocks, nogil=True, num_threads=threads, schedule="dynamic", use_threads_if=threads > 1):
        kernels.sddmm_dense_u8(args, block)
    give_scratch(scratch)
    return 0


cdef void _sddmm_part(const qsp_kernels *kernels, const qsp_sddmm *a, int64_t size, int thread, int64_t chunk,
                      bint codes) noexcept nogil:
    """One task, with a thread's share of the scratch."""
    cdef qsp_sddmm one = a[0]
    one.sums = <int64_t *> a.sums + thread * size
    if codes:
        kernels.sddmm_u8(&one, chunk)
    else:
        kernels.sddmm_f32(&one, chunk)


cdef int64_t _sddmm_list(qsp_sddmm *a, int64_t slots, bint codes, int threads) except -1:
    """Rows in so many parts that what waits of one, sums and offsets, is small."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef const qsp_sddmm *args = a
    cdef int64_t chunk, first, last = 0, size = 0
    a.row_chunks = min(a.list.rows, max(1 if threads == 1 else 4 * threads, (slots + SUM_SLOTS - 1) // SUM_SLOTS))
    for chunk in range(a.row_chunks):
        first, last = last, qsp_cut_rows(&a.list, chunk + 1, a.row_chunks)
        # a sum, half of an integer and, of bits, a quarter for each slot, and the gradient's sum for each row
        size = max(size, (6 + (a.bits != NULL)) * (a.list.group_ptr[last] - a.list.group_ptr[first]) + last - first)
    scratch = take_scratch(threads * size)
    a.sums = pointer(scratch, _int64, threads * size, "scratch")
    for chunk in prange(args.row_chunks, nogil=True, num_threads=threads, schedule="dynamic",
                        use_threads_if=threads > 1):
        _sddmm_part(kernels, args, size, threadid(), chunk, codes)
    give_scratch(scratch)
    return 0


cdef int64_t _take_list(qsp_sddmm *a, GatherList rows, int64_t values) except -1:
    a.nonzeros = rows.nonzeros
    if rows.bits != NULL:
        a.bits, a.columns = rows.bits, (<PatternList> rows).pattern.columns
    a.list.rows, a.list.group_ptr, a.list.offset = rows.rows, rows.nonzeros.group_ptr, rows.kept_offsets
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
