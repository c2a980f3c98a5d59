"""Frozen models: steps on codes, checked once when they are made, and run one after the other in one call.

What steps compute lies in an arena, memory that a call takes and gives back, so that several threads may be in the same
segment at once. All numbers that the kernels walk are of the steps, and nobody can change them.
"""

import torch

from qsparseprop._kernels._dispatch import active_isa
from qsparseprop._kernels._memory import empty

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.parallel cimport prange
from libc.math cimport INFINITY
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t
from libc.string cimport memset

from qsparseprop._kernels._dense_rows cimport DenseRows
from qsparseprop._kernels._dispatch cimport (
    QSP_AFFINE,
    QSP_GROUP,
    QSP_UNIT,
    active_kernels,
    qsp_coded,
    qsp_coded_step,
    qsp_count_units,
    qsp_kernels,
    qsp_pack,
    qsp_requantize,
    qsp_spmm,
    qsp_view,
)
from qsparseprop._kernels._gather_list cimport GatherList
from qsparseprop._kernels._pack cimport pack_planes
from qsparseprop._kernels._plan cimport PlaneLayout, ProductRows
from qsparseprop._kernels._tensor cimport image_pointer, numel, pointer, strides_t
from qsparseprop._kernels._weights cimport give_scratch, take_scratch

cdef enum:
    # multiply-adds, and bytes, below which starting threads costs more than it gives
    SERIAL_WORK = 1 << 18
    SERIAL_BYTES = 1 << 16

cdef object _float32 = torch.float32
cdef object _int8 = torch.int8
cdef object _int32 = torch.int32
cdef object _int64 = torch.int64
cdef object _uint8 = torch.uint8


cdef object _own(object tensor, object dtype, int64_t size, str name):
    """A copy of a tensor of exactly that many elements, which nobody else can write to."""
    pointer(tensor, dtype, size, name)
    if numel(tensor) != size:
        raise ValueError(f"{name} must have {size} elements, got {numel(tensor)}")
    return tensor.clone()


cdef class CodedBuffer:
    """Codes of a view of a layout, at a place of the arena.

    Parameters
    ----------
    layout : PlaneLayout
    start : int
        Its first byte in the arena, a multiple of 64.
    images : int
    zero : int
        The code of 0, which stands in every gap.
    view : int
        Which of the layout's views.
    first, channels : int
        The first of its channels, and how many; without them all.
    """

    def __cinit__(self, PlaneLayout layout not None, int64_t start, int64_t images, int zero, int64_t view=0,
                  int64_t first=0, int64_t channels=-1):
        self.layout, self.start, self.images, self.zero, self.view = layout, start, images, zero, view
        self.first, self.channels = first, layout.channels - first if channels < 0 else channels
        cdef const qsp_view *v
        if first < 0 or self.channels < 1 or first + self.channels > layout.channels:
            raise ValueError("a buffer must have channels of its layout")
        if start < 0 or start % QSP_UNIT or not 0 <= zero <= 255 or not 0 <= view < layout.count or images < 1:
            raise ValueError("a buffer must have images, start at a multiple of 64, and be of a view of the layout")
        layout._check_images(images)
        v = <const qsp_view *> PyBytes_AS_STRING(layout._views) + view
        if v.origin != 0 or v.rows < 1 or v.cols < 1:
            raise ValueError("a buffer's view must have pixels, the first of them at lane 0")
        if layout.grid.lane_x != 1 and (layout.grid.lane_b != 1 or v.rows != 1 or v.cols != 1):
            raise ValueError("pixels of a row must be neighbours, or images of one pixel be")

    cdef void place(self, qsp_coded *to, uint8_t *arena) noexcept:
        cdef const qsp_view *v = <const qsp_view *> PyBytes_AS_STRING(self.layout._views) + self.view
        to.grid, to.planes = self.layout.grid, arena + self.start
        to.plane, to.channels = v.plane + self.first, self.channels
        to.rows, to.cols, to.images, to.zero = v.rows, v.cols, self.images, <uint8_t> self.zero

    cdef int64_t end(self) noexcept:
        """Bytes of the arena up to its end."""
        return self.start + self.layout.lane_count(self.images)

    cdef int64_t fill_tail(self, uint8_t *arena) noexcept:
        """Behind the last plane is what pads its last image."""
        cdef int64_t done = self.layout.blocks(self.images) * self.layout.grid.block
        memset(arena + self.start + done, self.zero, self.layout.grid.front + QSP_UNIT)
        return 0


cdef bint _same_lanes(CodedBuffer a, CodedBuffer b) noexcept:
    return (a.layout.grid.images == b.layout.grid.images and a.layout.grid.lane_b == b.layout.grid.lane_b
            and a.layout.grid.lane_y == b.layout.grid.lane_y and a.layout.grid.lane_x == b.layout.grid.lane_x
            and a.images == b.images)


cdef class FrozenStep:
    """One step of a segment."""

    cdef int64_t last_byte(self) noexcept:
        """Bytes of the arena that it uses."""
        return 0

    cdef int64_t run(self, uint8_t *arena, list tensors, const qsp_kernels *kernels, int threads) except -1:
        raise NotImplementedError


cdef class PackStep(FrozenStep):
    """Quantise a tensor into planes.

    Parameters
    ----------
    source : int
        Which tensor.
    out : CodedBuffer
        All views of its layout are packed.
    inverse : Tensor
        float32, (planes of the layout,): one over the scale of each.
    """

    cdef int64_t source
    cdef CodedBuffer out
    cdef object zeros

    def __cinit__(self, int64_t source, CodedBuffer out not None, inverse):
        self.source, self.out = source, out
        planes = out.layout.planes
        self._held = (_own(inverse, _float32, planes, "inverse"),
                      torch.full((planes,), out.zero, dtype=_int32, device="cpu"))

    cdef int64_t last_byte(self) noexcept:
        return self.out.end()

    cdef int64_t run(self, uint8_t *arena, list tensors, const qsp_kernels *kernels, int threads) except -1:
        cdef qsp_pack a
        cdef strides_t where
        memset(&a, 0, sizeof(a))
        a.tensor = image_pointer(tensors[self.source], &where, &a.dtype, "an input")
        a.images, a.grid = self.out.layout.check_shape(where.size, "an input"), self.out.layout.grid
        if a.images != self.out.images:
            raise ValueError(f"an input must have {self.out.images} images, got {a.images}")
        a.scheme.kind, a.scheme.bits, a.scheme.fixed = QSP_AFFINE, 8, 1
        a.inverse = <const float *> pointer(self._held[0], _float32, 0, "inverse")
        a.zero_point = <const int32_t *> pointer(self._held[1], _int32, 0, "zero_point")
        a.stride = 1
        a.planes = arena + self.out.start
        return pack_planes(&a, self.out.layout, where.step, True, threads)


cdef class ProductStep(FrozenStep):
    """The product of rows of weights with codes: to codes, or to a float32 tensor.

    Parameters
    ----------
    rows : ProductRows
        On the lanes of input and output.
    codes : Tensor
        int8: the weights, one for each value of the rows' pattern.
    source : CodedBuffer
        All planes of its layout are those of `rows.source`.
    out : CodedBuffer or int
        Of the planes of `rows.target`; or which tensor.
    factors : tuple of Tensor
        float32, (rows,) each: multiplier and offset of the sums, lower and upper limit of the result, and what a residual
        is multiplied by.
    residual : CodedBuffer, optional
        On the lanes of the output.
    table : Tensor, optional
        uint8, (256,) or (rows * 256,): what becomes of the output's codes.
    """

    cdef ProductRows rows
    cdef CodedBuffer source, out, residual
    cdef int64_t target, units, table_step
    cdef bint dense
    cdef qsp_spmm product
    cdef qsp_requantize requantize

    def __cinit__(self, ProductRows rows not None, codes, CodedBuffer source not None, out, tuple factors,
                  CodedBuffer residual=None, table=None):
        cdef int64_t n = rows.rows
        self.rows, self.source, self.residual = rows, source, residual
        self.dense = isinstance(rows, DenseRows)
        if source.layout != rows.source:
            raise ValueError("the codes that a product reads must lie as its rows say")
        if len(factors) != (4 if residual is None else 5):
            raise ValueError("factors must be multiplier, offset and two limits, and one more for a residual")
        held = [_own(f, _float32, n, "a factor") for f in factors]
        self._take_weights(codes, held)
        self.product.grid, self.product.images = source.layout.grid, source.images
        self.product.scale_factor, self.product.correction_factor = 1, -source.zero
        if isinstance(out, CodedBuffer):
            self.out, self.target = out, -1
            self._take_codes(held, table)
        else:
            self.target = out
            self.product.scale = <const float *> pointer(held[0], _float32, n, "scale")
            self.product.bias = <const float *> pointer(held[1], _float32, n, "bias")
            self.product.low, self.product.high = float(held[2].max()), float(held[3].min())
            if residual is not None or table is not None or rows.target.count != 1:
                raise ValueError("floats are of one view, without residual and table")
        self._held = tuple(held)

    cdef int64_t _take_weights(self, object codes, list held) except -1:
        """Weights and offsets of all slots, and the sums of the codes of each row."""
        cdef ProductRows rows = self.rows
        cdef GatherList one
        cdef int64_t slots = rows.slots
        cdef const qsp_kernels *kernels = active_kernels()
        index = rows.index.to(_int64)
        _own(codes, _int8, rows.pattern.count, "codes")
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
            self._take_offsets(one, weights, held, kernels)
        held.append(total)
        self.product.correction = <const int64_t *> pointer(total, _int64, rows.rows, "total")
        return 0

    cdef int64_t _take_offsets(self, GatherList rows, object weights, list held, const qsp_kernels *kernels) except -1:
        cdef int64_t slots = max(rows.slots, QSP_GROUP)
        offset = torch.zeros(slots, dtype=_int32, device="cpu")
        held.append(offset)
        cdef int32_t *offsets = <int32_t *> pointer(offset, _int32, slots, "offset")
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

    cdef int64_t _take_codes(self, list held, object table) except -1:
        """What becomes of the sums where the output is codes."""
        cdef qsp_requantize *q = &self.requantize
        cdef int64_t n = self.rows.rows, lane, lanes
        cdef CodedBuffer out = self.out
        cdef qsp_coded where
        cdef uint8_t *keep
        cdef int64_t b, y, x
        out.place(&where, NULL)
        if (not _same_lanes(self.source, out) or where.channels != n or out.layout.count != 1
                or self.source.layout.grid.images != self.rows.target.grid.images
                or where.rows != self.rows.target.image[0] or where.cols != self.rows.target.image[1]):
            raise ValueError("the output must lie on the product's lanes, with a channel for each row")
        q.multiplier = <const float *> pointer(held[0], _float32, n, "multiplier")
        q.offset = <const float *> pointer(held[1], _float32, n, "offset")
        q.low = <const float *> pointer(held[2], _float32, n, "low")
        q.high = <const float *> pointer(held[3], _float32, n, "high")
        if self.residual is not None:
            if not _same_lanes(self.residual, out) or self.residual.layout.grid.planes != n:
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
        if table is not None:
            self.table_step = 256 if numel(table) > 256 else 0
            own = _own(table, _uint8, n * 256 if self.table_step else 256, "table")
            held.append(own)
            q.table, q.table_step = <const uint8_t *> pointer(own, _uint8, 256, "table"), self.table_step
        return 0

    cdef int64_t last_byte(self) noexcept:
        cdef int64_t last = self.source.end()
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
        a.planes = arena + self.source.start
        if self.target < 0:
            self.out.place(&q.out, arena)
            if self.residual is not None:
                q.residual = arena + self.residual.start + self.residual.layout.grid.front
            a.requantize = &q
            self._run(&a, units, kernels, threads)
            return self.out.fill_tail(arena)
        shape = self.rows.target.shape(a.images)
        out = empty(shape[:2] if self.rows.target.image == (1, 1) else shape, _float32)
        tensors[self.target] = out
        a.out = image_pointer(out, &where, &a.dtype, "out")
        held = self.rows.target.place(a.images, where.step)
        a.view = (<const qsp_view *> PyBytes_AS_STRING(held))[0]
        return self._run(&a, qsp_count_units(&a.grid, &a.view, a.images), kernels, threads)

    cdef int64_t _run(self, qsp_spmm *a, int64_t units, const qsp_kernels *kernels, int threads) except -1:
        cdef int64_t task, chunks = 1, rows = self.rows.rows
        cdef bint dense = self.dense
        if threads > 1 and units < 4 * threads:
            chunks = max(1, min((4 * threads + units - 1) // max(units, 1), rows // 16))
        a.row_chunks = chunks
        if dense:  # the kernel takes the view's rows
            a.view.plane, a.view.channels = 0, rows
        for task in prange(units * chunks, nogil=True, num_threads=threads, schedule="dynamic",
                           use_threads_if=threads > 1 and self.rows.slots * units * QSP_UNIT > SERIAL_WORK):
            if dense:
                kernels.spmm_dense_u8(a, task // chunks, task % chunks)
            else:
                kernels.spmm_u8(a, task // chunks, task % chunks)
        return 0


cdef enum:
    COPY, FLATTEN, POOL, ADD, TABLE, UNPACK

cdef dict _KINDS = {"copy": COPY, "flatten": FLATTEN, "pool": POOL, "add": ADD, "table": TABLE, "unpack": UNPACK}


cdef class CodedStep(FrozenStep):
    """A step on codes that is not a product.

    Parameters
    ----------
    kind : {"copy", "flatten", "pool", "add", "table", "unpack"}
    source : CodedBuffer
    out : CodedBuffer or int
        Which tensor, for "unpack".
    numbers : tuple of int
        "copy": first row and column, and the steps from one to the next; "pool": kernel, stride and dilation, each down
        and across, what is above and to the left, whether means are taken, and whether the padding counts.
    factors : tuple of Tensor
        float32, (channels,): "add" and means of a "pool": multiplier, offset, lower and upper limit; of "add" the other's
        multiplier; "unpack": the scale.
    other : CodedBuffer, optional
        The other summand.
    table : Tensor, optional
        uint8, (256,) or (channels * 256,).
    """

    cdef int kind
    cdef CodedBuffer source, out, other
    cdef int64_t target
    cdef qsp_coded_step step

    def __cinit__(self, str kind not None, CodedBuffer source not None, out, tuple numbers=(), tuple factors=(),
                  CodedBuffer other=None, table=None):
        cdef qsp_coded x, y
        self.kind, self.source, self.other, self.target = _KINDS[kind], source, other, -1
        source.place(&x, NULL)
        if self.kind == UNPACK:
            self.target = out
        else:
            self.out = out
            self.out.place(&y, NULL)
            if self.out.images != source.images:
                raise ValueError("a step must not change the number of images")
        held = [_own(f, _float32, x.channels, "a factor") for f in factors]
        self._take_factors(held, table, x.channels)
        self._take_numbers(numbers, &x, &y)
        self._held = tuple(held)

    cdef int64_t _take_factors(self, list held, object table, int64_t channels) except -1:
        cdef qsp_coded_step *s = &self.step
        wanted = {ADD: (5,), POOL: (0, 4), UNPACK: (1,)}.get(self.kind, (0,))
        if len(held) not in wanted:
            raise ValueError(f"this step takes {wanted} factors, got {len(held)}")
        if held:
            s.multiplier = <const float *> pointer(held[0], _float32, channels, "factor")
        if len(held) > 1:
            s.offset = <const float *> pointer(held[1], _float32, channels, "factor")
            s.low = <const float *> pointer(held[2], _float32, channels, "factor")
            s.high = <const float *> pointer(held[3], _float32, channels, "factor")
        if len(held) > 4:
            s.other_multiplier = <const float *> pointer(held[4], _float32, channels, "factor")
        if (table is not None) != (self.kind == TABLE):
            raise ValueError("a table is for steps by a table")
        if table is not None:
            s.table_step = 256 if numel(table) > 256 else 0
            own = _own(table, _uint8, channels * 256 if s.table_step else 256, "table")
            held.append(own)
            s.table = <const uint8_t *> pointer(own, _uint8, 256, "table")
        return 0

    cdef int64_t _take_numbers(self, tuple numbers, const qsp_coded *x, const qsp_coded *y) except -1:
        cdef qsp_coded_step *s = &self.step
        if self.kind == COPY:
            s.row, s.col, s.row_step, s.col_step = numbers
            if (x.channels != y.channels or min(numbers) < 0 or s.row + (y.rows - 1) * s.row_step >= x.rows
                    or s.col + (y.cols - 1) * s.col_step >= x.cols):
                raise ValueError("a copy must stay inside of its source")
        elif self.kind == FLATTEN:
            if y.channels != x.channels * x.rows * x.cols or y.grid.lane_b != 1:
                raise ValueError("flattened images have a channel for each pixel")
        elif self.kind == POOL:
            self._take_window(numbers, x, y)
        elif self.kind in (ADD, TABLE):
            if not _same_lanes(self.source, self.out) or (self.other is not None
                                                          and not _same_lanes(self.other, self.out)):
                raise ValueError("operands must lie on the same lanes")
            for one in (self.source, self.out, *([] if self.other is None else [self.other])):
                if (<CodedBuffer> one).layout.image != self.out.layout.image or (
                        <CodedBuffer> one).layout.grid.planes != x.channels or (<CodedBuffer> one).layout.count != 1:
                    raise ValueError("operands must have the same shape")
            if (self.other is None) == (self.kind == ADD):
                raise ValueError("sums have two summands")
        return 0

    cdef int64_t _take_window(self, tuple numbers, const qsp_coded *x, const qsp_coded *y) except -1:
        cdef qsp_coded_step *s = &self.step
        (s.kernel_y, s.kernel_x, s.row_step, s.col_step, s.dilation_y, s.dilation_x, s.top, s.left, s.mean,
         s.count_padding) = numbers
        if min(numbers[:6]) < 1 or s.top < 0 or s.left < 0 or x.channels != y.channels:
            raise ValueError("a window must have a size")
        if x.grid.lane_x != 1 and (x.rows != 1 or x.cols != 1):
            raise ValueError("pixels of a row must be neighbours")
        if s.mean != (s.offset != NULL) or (not s.mean and self.source.zero and (s.top or s.left)):
            raise ValueError("means have factors; padded images of a maximum have their zero at code 0")
        if s.kernel_y * s.kernel_x > 1 << 22:
            raise ValueError("a window must have at most 2**22 pixels, of which an int32 holds the sum")
        return 0

    cdef int64_t last_byte(self) noexcept:
        cdef int64_t last = self.source.end()
        for buffer in (self.out, self.other):
            if buffer is not None:
                last = max(last, (<CodedBuffer> buffer).end())
        return last

    cdef int64_t run(self, uint8_t *arena, list tensors, const qsp_kernels *kernels, int threads) except -1:
        cdef qsp_coded_step s = self.step
        cdef strides_t where
        cdef int dtype, kind = self.kind
        cdef CodedBuffer walked = self.source if kind == UNPACK else self.out
        self.source.place(&s.input, arena)
        if self.other is not None:
            self.other.place(&s.other, arena)
        if kind == UNPACK:
            shape = self.source.layout.shape(self.source.images)
            out = empty(shape[:2] if self.source.layout.image == (1, 1) else shape, _float32)
            tensors[self.target] = out
            s.to = <float *> image_pointer(out, &where, &dtype, "out")
            s.to_b, s.to_c, s.to_y, s.to_x = where.step[0], where.step[1], where.step[2], where.step[3]
        else:
            self.out.place(&s.out, arena)
        cdef int64_t blocks = walked.layout.blocks(walked.images), channels = s.input.channels, task
        cdef int64_t bytes_ = walked.layout.lane_count(walked.images)
        cdef int64_t size = max(1, min(channels, 16 if kind != FLATTEN else 1)), parts = (channels + size - 1) // size
        if kind == FLATTEN:
            blocks = self.out.layout.blocks(self.out.images)
        for task in prange(blocks * parts, nogil=True, num_threads=threads, schedule="dynamic",
                           use_threads_if=threads > 1 and bytes_ > SERIAL_BYTES):
            _coded_part(kernels, &s, kind, task // parts, task % parts * size, channels, size)
        if self.out is not None:
            self.out.fill_tail(arena)
        return 0


cdef void _coded_part(const qsp_kernels *kernels, const qsp_coded_step *s, int kind, int64_t block, int64_t first,
                      int64_t channels, int64_t size) noexcept nogil:
    cdef int64_t last = min(first + size, channels)
    if kind == COPY:
        kernels.coded_copy(s, block, first, last)
    elif kind == FLATTEN:
        kernels.coded_flatten(s, block, first, last)
    elif kind == POOL:
        kernels.coded_pool(s, block, first, last)
    elif kind == ADD:
        kernels.coded_add(s, block, first, last)
    elif kind == TABLE:
        kernels.coded_table(s, block, first, last)
    else:
        kernels.coded_unpack(s, block, first, last)


cdef class Segment:
    """Steps that run one after the other in one call.

    Parameters
    ----------
    steps : tuple of FrozenStep
    arena : int
        Bytes that they share.
    tensors : int
        How many tensors there are: inputs, then what steps compute.
    inputs : int
    outputs : tuple of int
        Which of them a call gives.

    Raises
    ------
    ValueError
        If a step leads out of the arena.
    """

    cdef readonly tuple steps
    cdef readonly int64_t arena
    cdef int64_t tensors, inputs
    cdef readonly tuple outputs
    cdef readonly str isa
    cdef const qsp_kernels *kernels

    def __cinit__(self, tuple steps not None, int64_t arena, int64_t tensors, int64_t inputs, tuple outputs not None):
        for step in steps:
            if not isinstance(step, FrozenStep):
                raise TypeError(f"steps must be FrozenStep, got {type(step).__name__}")
            if (<FrozenStep> step).last_byte() > arena:
                raise ValueError("a step leads out of the arena")
        if not 0 <= inputs <= tensors or not all([0 <= i < tensors for i in outputs]):
            raise ValueError("tensors are inputs, and those that steps compute")
        self.steps, self.arena, self.tensors, self.inputs, self.outputs = steps, arena, tensors, inputs, outputs
        self.isa, self.kernels = active_isa(), active_kernels()

    def __call__(self, tuple inputs not None, int threads):
        """The outputs, for input tensors of the number of images that the steps are for."""
        if len(inputs) != self.inputs:
            raise ValueError(f"{self.inputs} inputs are wanted, got {len(inputs)}")
        if active_kernels() != self.kernels:
            raise RuntimeError(f"this segment was made for {self.isa}, and {active_isa()} is in use now")
        cdef list tensors = [*inputs, *[None] * (self.tensors - self.inputs)]
        scratch = take_scratch((self.arena + 7) // 8)
        cdef uint8_t *arena = <uint8_t *> pointer(scratch, _int64, (self.arena + 7) // 8, "arena")
        for step in self.steps:
            (<FrozenStep> step).run(arena, tensors, self.kernels, max(threads, 1))
        give_scratch(scratch)
        return tuple([tensors[i] for i in self.outputs])
