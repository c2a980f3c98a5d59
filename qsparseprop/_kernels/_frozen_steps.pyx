"""Steps of frozen models that are not products: tensors to codes and back, pools, sums, tables."""

import torch

from qsparseprop._kernels._memory import empty

from cython.parallel cimport prange
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport QSP_AFFINE, qsp_coded, qsp_coded_step, qsp_kernels, qsp_pack
from qsparseprop._kernels._frozen cimport CodedBuffer, FrozenStep, own_copy, same_lanes
from qsparseprop._kernels._pack cimport pack_planes
from qsparseprop._kernels._tensor cimport image_pointer, numel, pointer, strides_t

cdef enum:
    # bytes below which starting threads costs more than it gives
    SERIAL_BYTES = 1 << 16
    # columns of windows of maxima, see loops/coded_steps.h
    WIDEST_WINDOW = 256

cdef object _float32 = torch.float32
cdef object _int32 = torch.int32
cdef object _uint8 = torch.uint8


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

    def __cinit__(self, int64_t source, CodedBuffer out not None, inverse):
        self.source, self.out = source, out
        planes = out.layout.planes
        self._held = (own_copy(inverse, _float32, planes, "inverse"),
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
        float32, (channels,): "add" and means of a "pool": multiplier, offset, lower and upper limit; of "add" that of
        the other, too; "unpack": the scale.
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
        held = [own_copy(f, _float32, x.channels, "a factor") for f in factors]
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
            own = own_copy(table, _uint8, channels * 256 if s.table_step else 256, "table")
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
            for one in (self.source, self.out, *([] if self.other is None else [self.other])):
                if not same_lanes(one, self.out):
                    raise ValueError("operands must lie on the same lanes")
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
        if s.mean != (s.offset != NULL):
            raise ValueError("means have factors, maxima have none")
        if s.kernel_y * s.kernel_x > 1 << 22:
            raise ValueError("a window must have at most 2**22 pixels, of which an int32 holds the sum")
        if not s.mean and (s.kernel_x - 1) * s.dilation_x + 1 > WIDEST_WINDOW:
            raise ValueError(f"a window of a maximum must be at most {WIDEST_WINDOW} columns wide")
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
