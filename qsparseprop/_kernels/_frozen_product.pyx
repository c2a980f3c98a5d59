"""Products of frozen models: codes to codes, or to floats."""

import torch

from qsparseprop._kernels._memory import empty

from cpython.bytes cimport PyBytes_AS_STRING
from cython.parallel cimport prange
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t

from qsparseprop._kernels._dense_rows cimport DenseRows
from qsparseprop._kernels._dispatch cimport (
    QSP_GROUP,
    QSP_UNIT,
    active_kernels,
    qsp_coded,
    qsp_count_units,
    qsp_kernels,
    qsp_requantize,
    qsp_spmm,
    qsp_view,
)
from qsparseprop._kernels._frozen cimport CodedBuffer, FrozenStep, own_copy, same_lanes
from qsparseprop._kernels._gather_list cimport GatherList
from qsparseprop._kernels._plan cimport ProductRows
from qsparseprop._kernels._tensor cimport image_pointer, numel, pointer, strides_t

cdef enum:
    # multiply-adds below which starting threads costs more than it gives
    SERIAL_WORK = 1 << 18

cdef object _float32 = torch.float32
cdef object _int8 = torch.int8
cdef object _int32 = torch.int32
cdef object _int64 = torch.int64
cdef object _uint8 = torch.uint8


cdef class ProductWeights:
    """Rows of weights with the codes of their slots, as kernels read them: shared by steps for batches of all sizes.

    Parameters
    ----------
    rows : ProductRows
        On the lanes of input and output.
    codes : Tensor
        int8: the weights, one for each value of the rows' pattern.
    """

    cdef readonly ProductRows rows
    cdef const qsp_kernels *kernels  # whose order the weights are in
    cdef bint dense
    cdef qsp_spmm product
    cdef tuple _held

    def __cinit__(self, ProductRows rows not None, codes):
        self.rows, self.dense, self.kernels = rows, isinstance(rows, DenseRows), active_kernels()
        held = []
        self._take_weights(codes, held)
        self._held = tuple(held)

    cdef int64_t _take_weights(self, object codes, list held) except -1:
        """Weights and offsets of all slots, and the sums of the codes of each row."""
        cdef ProductRows rows = self.rows
        cdef GatherList one
        cdef int64_t slots = rows.slots
        index = rows.index.to(_int64)
        own_copy(codes, _int8, rows.pattern.count, "codes")
        weights = torch.where(index >= 0, codes[index.clamp(min=0)] if codes.numel() else 0, 0).to(_int8)
        if slots == 0:
            weights = torch.zeros(QSP_GROUP, dtype=_int8, device="cpu")
        held.append(weights)
        self.product.weights = pointer(weights, _int8, slots, "weights")
        total = torch.zeros(rows.rows, dtype=_int64, device="cpu")
        if self.dense:
            total += weights[:slots].view(rows.rows, -1).sum(1, dtype=_int64) if slots else 0
            self.product.dense = &(<DenseRows> rows).dense
        else:
            one = <GatherList> rows
            counts = one.group_ptr.diff().to(_int64) * QSP_GROUP
            row = torch.arange(rows.rows, device="cpu").repeat_interleave(counts)
            total.index_add_(0, row, weights[:slots].to(_int64))
            self.product.list.rows, self.product.list.group_ptr = one.rows, one.nonzeros.group_ptr
            self._take_offsets(one, weights, held)
        held.append(total)
        self.product.correction = <const int64_t *> pointer(total, _int64, rows.rows, "total")
        return 0

    cdef int64_t _take_offsets(self, GatherList rows, object weights, list held) except -1:
        cdef const qsp_kernels *kernels = self.kernels
        cdef int64_t slots = max(rows.slots, QSP_GROUP)
        offset = torch.zeros(slots, dtype=_int32, device="cpu")
        held.append(offset)
        cdef int32_t *offsets = <int32_t *> pointer(offset, _int32, slots, "offset")
        rows.settle()
        kernels.offsets(&rows.nonzeros, 0, rows.rows, offsets)
        self.product.list.offset = offsets
        if kernels.pair == NULL or rows.slots == 0:
            return 0
        # the order of each row that instructions of pairs want
        paired = torch.zeros(rows.rows, dtype=_int32, device="cpu")
        other, moved = torch.zeros(slots, dtype=_int32, device="cpu"), torch.zeros(slots, dtype=_int8, device="cpu")
        held += [paired, other, moved]
        cdef int32_t *paired_offset = <int32_t *> pointer(other, _int32, slots, "offset")
        cdef int8_t *paired_weight = <int8_t *> pointer(moved, _int8, slots, "weights")
        cdef int32_t *count = <int32_t *> pointer(paired, _int32, rows.rows, "paired")
        kernels.pair(&self.product.list, <const int8_t *> self.product.weights, 0, rows.rows, count, paired_offset,
                     paired_weight)
        self.product.paired, self.product.list.offset, self.product.weights = count, paired_offset, paired_weight
        return 0


cdef class ProductStep(FrozenStep):
    """The product of rows of weights with codes: to codes, or to a float32 tensor.

    Parameters
    ----------
    weights : ProductWeights
    source : CodedBuffer
        All planes of its layout are those of the rows' source.
    out : CodedBuffer or int
        Of the planes of the rows' target; or which tensor.
    factors : tuple of Tensor
        float32, (rows,) each: multiplier and offset of the sums, lower and upper limit of the result, and what a
        residual is multiplied by.
    residual : CodedBuffer, optional
        On the lanes of the output.
    scales : int
        Where in the arena the images of one pixel, tokens, have scales, float32, whole units of them: multiplied in
        before the offset; below 0 they have none.
    table : Tensor, optional
        uint8, 256 of them, or as many for each row: what becomes of the result's codes.
    """

    cdef ProductWeights weights
    cdef CodedBuffer source, out, residual
    cdef int64_t target, units, scales
    cdef qsp_spmm product
    cdef qsp_requantize requantize

    def __cinit__(self, ProductWeights weights not None, CodedBuffer source not None, out, tuple factors,
                  CodedBuffer residual=None, int64_t scales=-1, table=None):
        cdef ProductRows rows = weights.rows
        cdef int64_t n = rows.rows
        self.weights, self.source, self.residual, self.product = weights, source, residual, weights.product
        self.scales = scales
        if scales >= 0 and (scales % QSP_UNIT or isinstance(out, CodedBuffer) or rows.target.image != (1, 1)):
            raise ValueError("scales start at a multiple of 64, and are for floats of images of one pixel")
        if source.layout != rows.source:
            raise ValueError("the codes that a product reads must lie as its rows say")
        if len(factors) != (4 if residual is None else 5):
            raise ValueError("factors must be multiplier, offset and two limits, and one more for a residual")
        held = [own_copy(f, _float32, n, "a factor") for f in factors]
        self.product.grid, self.product.images = source.layout.grid, source.images
        self.product.scale_factor, self.product.correction_factor = 1, -source.zero
        if isinstance(out, CodedBuffer):
            self.out, self.target = out, -1
            self._take_codes(held)
            if table is not None:
                self.requantize.table_step = 256 if numel(table) > 256 else 0
                held.append(own_copy(table, _uint8, n * 256 if self.requantize.table_step else 256, "table"))
                self.requantize.table = <const uint8_t *> pointer(held[len(held) - 1], _uint8, 256, "table")
        else:
            self.target = out
            self.product.scale = <const float *> pointer(held[0], _float32, n, "scale")
            self.product.bias = <const float *> pointer(held[1], _float32, n, "bias")
            self.product.low, self.product.high = float(held[2].max()), float(held[3].min())
            if residual is not None or table is not None or rows.target.count != 1:
                raise ValueError("floats are of one view, without residual and table")
        self._held = tuple(held)

    cdef int64_t _take_codes(self, list held) except -1:
        """What becomes of the sums where the output is codes."""
        cdef qsp_requantize *q = &self.requantize
        cdef int64_t n = self.weights.rows.rows, lane, lanes
        cdef CodedBuffer out = self.out
        cdef qsp_coded where
        cdef uint8_t *keep
        cdef int64_t b, y, x
        out.place(&where, NULL)
        if (not same_lanes(self.source, out) or where.channels != n or out.layout.count != 1
                or self.source.layout.grid.images != self.weights.rows.target.grid.images
                or where.rows != self.weights.rows.target.image[0] or where.cols != self.weights.rows.target.image[1]):
            raise ValueError("the output must lie on the product's lanes, with a channel for each row")
        q.multiplier = <const float *> pointer(held[0], _float32, n, "multiplier")
        q.offset = <const float *> pointer(held[1], _float32, n, "offset")
        q.low = <const float *> pointer(held[2], _float32, n, "low")
        q.high = <const float *> pointer(held[3], _float32, n, "high")
        if self.residual is not None:
            if (not same_lanes(self.residual, out) or self.residual.layout.grid.planes != n
                    or self.residual.channels != n):
                raise ValueError("a residual must lie on the output's lanes, with as many channels")
            q.residual_multiplier = <const float *> pointer(held[4], _float32, n, "residual multiplier")
            q.residual_pitch = self.residual.layout.grid.pitch
            q.residual_block = self.residual.layout.grid.block
        lane = ((where.grid.images - 1) * where.grid.lane_b + (where.rows - 1) * where.grid.lane_y
                + (where.cols - 1) * where.grid.lane_x + 1)
        lanes = (lane + QSP_UNIT - 1) // QSP_UNIT * QSP_UNIT
        mask = torch.zeros(lanes, dtype=_uint8, device="cpu")
        held.append(mask)
        keep = <uint8_t *> pointer(mask, _uint8, lanes, "keep")
        for b in range(where.grid.images):
            for y in range(where.rows):
                for x in range(where.cols):
                    keep[b * where.grid.lane_b + y * where.grid.lane_y + x * where.grid.lane_x] = 255
        q.keep = keep
        # units of whole blocks, and of the last one
        whole, rest = divmod(out.images, where.grid.images)
        self.units = whole * (lanes // QSP_UNIT)
        if rest:
            self.units += (lane - (where.grid.images - rest) * where.grid.lane_b + QSP_UNIT - 1) // QSP_UNIT
        return 0

    cdef int64_t last_byte(self) noexcept:
        cdef int64_t last = self.source.end(), units = (self.source.images + QSP_UNIT - 1) // QSP_UNIT
        if self.scales >= 0:
            last = max(last, self.scales + units * QSP_UNIT * <int64_t> sizeof(float))
        for buffer in (self.out, self.residual):
            if buffer is not None:
                last = max(last, (<CodedBuffer> buffer).end())
        return last

    cdef int64_t run(self, uint8_t *arena, list tensors, const qsp_kernels *kernels, int threads) except -1:
        cdef qsp_spmm a = self.product
        cdef qsp_requantize q = self.requantize
        cdef strides_t where
        cdef int64_t units = self.units
        cdef bytes held
        if kernels != self.weights.kernels:
            raise RuntimeError("the weights were made for another instruction set")
        a.planes = arena + self.source.start
        if self.target < 0:
            self.out.place(&q.out, arena)
            if self.residual is not None:
                q.residual = arena + self.residual.start + self.residual.layout.grid.front
            a.requantize = &q
            self._run(&a, units, kernels, threads)
            return self.out.fill_tail(arena)
        shape = self.weights.rows.target.shape(a.images)
        if self.scales >= 0:
            a.lane_scale = <const float *> (arena + self.scales)
        out = empty(shape[:2] if self.weights.rows.target.image == (1, 1) else shape, _float32)
        tensors[self.target] = out
        a.out = image_pointer(out, &where, &a.dtype, "out")
        held = self.weights.rows.target.place(a.images, where.step)
        a.view = (<const qsp_view *> PyBytes_AS_STRING(held))[0]
        return self._run(&a, qsp_count_units(&a.grid, &a.view, a.images), kernels, threads)

    cdef int64_t _run(self, qsp_spmm *a, int64_t units, const qsp_kernels *kernels, int threads) except -1:
        cdef int64_t task, chunks = 1, rows = self.weights.rows.rows
        cdef bint dense = self.weights.dense
        if threads > 1 and units < 4 * threads:
            chunks = max(1, min((4 * threads + units - 1) // max(units, 1), rows // 16))
        a.row_chunks = chunks
        if dense:  # the kernel takes the view's rows
            a.view.plane, a.view.channels = 0, rows
        for task in prange(units * chunks, nogil=True, num_threads=threads, schedule="dynamic",
                           use_threads_if=threads > 1 and self.weights.rows.slots * units * QSP_UNIT > SERIAL_WORK):
            if dense:
                kernels.spmm_dense_u8(a, task // chunks, task % chunks)
            else:
                kernels.spmm_u8(a, task // chunks, task % chunks)
        return 0
