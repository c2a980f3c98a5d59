"""Linear layers of frozen models on few rows of features, tokens."""

import torch

from qsparseprop._kernels._memory import empty

from cython.parallel cimport prange
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport (
    QSP_AFFINE,
    QSP_MAX_EXACT,
    QSP_TOKEN_COLUMNS,
    QSP_TOKEN_ROWS,
    QSP_UNIT,
    active_kernels,
    qsp_coded,
    qsp_kernels,
    qsp_pack,
    qsp_token_codes,
    qsp_tokens,
)
from qsparseprop._kernels._frozen cimport CodedBuffer, FrozenStep, own_copy
from qsparseprop._kernels._pack cimport pack_planes
from qsparseprop._kernels._tensor cimport numel, pointer
from qsparseprop._kernels._weights cimport give_scratch, take_scratch

cdef enum:
    # codes of tokens that are multiplied, below which starting threads costs more than it gives
    SERIAL_SLOTS = 1 << 17
    # elements of a pass
    SERIAL_ELEMENTS = 1 << 15

cdef object _float32 = torch.float32
cdef object _int8 = torch.int8
cdef object _int32 = torch.int32
cdef object _int64 = torch.int64
cdef object _uint8 = torch.uint8


def most_tokens():
    """Up to how many tokens these steps are faster than planes, on the instruction set in use."""
    return active_kernels().most_tokens


def block_shape():
    """Rows and columns of a block of a weight."""
    return QSP_TOKEN_ROWS, QSP_TOKEN_COLUMNS


cdef class TokenBuffer:
    """Codes of tokens one behind the other, each in whole blocks of columns, at a place of the arena.

    Parameters
    ----------
    tokens, columns : int
    start : int
        Its first byte, a multiple of 64.
    zero : int
        The code of 0.
    """

    cdef readonly int64_t tokens, columns, start, pitch
    cdef readonly int zero

    def __cinit__(self, int64_t tokens, int64_t columns, int64_t start, int zero):
        if not (1 <= tokens < 1 << 30 and 1 <= columns < 1 << 30 and start >= 0 and start % QSP_UNIT == 0
                and 0 <= zero <= 255):
            raise ValueError("a buffer must have tokens and columns, and start at a multiple of 64")
        self.tokens, self.columns, self.start, self.zero = tokens, columns, start, zero
        self.pitch = (columns + QSP_TOKEN_COLUMNS - 1) // QSP_TOKEN_COLUMNS * QSP_TOKEN_COLUMNS

    @property
    def size(self):
        """Bytes that it takes."""
        return self.tokens * self.pitch


cdef class TokenQuantizeStep(FrozenStep):
    """Quantise a tensor, (tokens, columns).

    Parameters
    ----------
    source : int
        Which tensor.
    out : TokenBuffer or CodedBuffer
        The latter of images of one pixel.
    inverse : Tensor
        float32, (columns,): one over the scale of each.
    scales : int
        Where scales of tokens go, float32; below 0 they have none.
    """

    cdef int64_t source, scales, tokens, columns
    cdef TokenBuffer out
    cdef CodedBuffer planes

    def __cinit__(self, int64_t source, out, inverse, int64_t scales=-1):
        self.source, self.scales = source, scales
        if isinstance(out, CodedBuffer):
            self.planes = out
            self.tokens, self.columns = self.planes.images, self.planes.channels
            if self.planes.layout.image != (1, 1) or self.planes.layout.channels != self.columns:
                raise ValueError("tokens are images of one pixel")
        else:
            self.out = out
            self.tokens, self.columns = self.out.tokens, self.out.columns
        if scales % QSP_UNIT and scales >= 0:
            raise ValueError("scales must start at a multiple of 64")
        self._held = (own_copy(inverse, _float32, self.columns, "inverse"),)

    cdef int64_t last_byte(self) noexcept:
        cdef int64_t last = self.out.start + self.tokens * self.out.pitch if self.planes is None else self.planes.end()
        return max(last, 0 if self.scales < 0 else self.scales + self.tokens * <int64_t> sizeof(float))

    cdef int64_t run(self, uint8_t *arena, list tensors, const qsp_kernels *kernels, int threads) except -1:
        cdef qsp_token_codes a
        cdef int64_t token, size = self.tokens * self.columns
        memset(&a, 0, sizeof(a))
        x = tensors[self.source]
        if x.ndim < 2 or x.shape[0] != self.tokens or numel(x) != size:
            raise ValueError(f"an input must be of shape ({self.tokens}, {self.columns}), got {tuple(x.shape)}")
        x = x.to(_float32).reshape(self.tokens, self.columns).contiguous()
        a.x = <const float *> pointer(x, _float32, size, "an input")
        a.columns = self.columns
        a.inverse = <const float *> pointer(self._held[0], _float32, self.columns, "inverse")
        if self.scales >= 0:
            a.scale = <float *> (arena + self.scales)
        if self.planes is None:
            a.pitch, a.zero, a.codes = self.out.pitch, self.out.zero, arena + self.out.start
        else:
            scaled = take_scratch((size + 1) // 2)
            a.scaled = <float *> pointer(scaled, _int64, (size + 1) // 2, "scratch")
        for token in prange(self.tokens, nogil=True, num_threads=threads, schedule="static",
                            use_threads_if=threads > 1 and size > SERIAL_ELEMENTS):
            kernels.tokens_quantize(&a, token)
        if self.planes is not None:
            self._pack(&a, arena, threads)
            give_scratch(scaled)
        return 0

    cdef int64_t _pack(self, const qsp_token_codes *a, uint8_t *arena, int threads) except -1:
        """Codes of what is only to be rounded."""
        cdef qsp_pack p
        cdef int64_t stride[4]
        cdef float one = 1
        cdef int32_t zero = self.planes.zero
        memset(&p, 0, sizeof(p))
        p.tensor, p.images, p.grid = a.scaled, self.tokens, self.planes.layout.grid
        p.scheme.kind, p.scheme.bits, p.scheme.fixed = QSP_AFFINE, 8, 1
        p.inverse, p.zero_point, p.planes = &one, &zero, arena + self.planes.start
        stride[0], stride[1], stride[2], stride[3] = self.columns, 1, 1, 1
        return pack_planes(&p, self.planes.layout, stride, True, threads)


cdef class TokenGatherStep(FrozenStep):
    """Codes of images of one pixel as tokens.

    Parameters
    ----------
    source : CodedBuffer
    out : TokenBuffer
    """

    cdef CodedBuffer source
    cdef TokenBuffer out

    def __cinit__(self, CodedBuffer source not None, TokenBuffer out not None):
        self.source, self.out = source, out
        if (source.layout.image != (1, 1) or source.images != out.tokens or source.channels != out.columns
                or source.zero != out.zero):
            raise ValueError("tokens are images of one pixel, with a column for each channel")

    cdef int64_t last_byte(self) noexcept:
        return max(self.source.end(), self.out.start + self.out.tokens * self.out.pitch)

    cdef int64_t run(self, uint8_t *arena, list tensors, const qsp_kernels *kernels, int threads) except -1:
        cdef qsp_coded c
        cdef int64_t token
        self.source.place(&c, arena)
        for token in range(self.out.tokens):
            kernels.tokens_gather(&c, token, arena + self.out.start + token * self.out.pitch, self.out.pitch)
        return 0


cdef class TokenWeights:
    """A weight in slots, as kernels read it: shared by steps for all numbers of tokens.

    Parameters
    ----------
    rows, columns : int
    step_ptr : Tensor
        int32, (blocks of rows * blocks of columns + 1,): the first step of each pair of blocks.
    place, code : Tensor
        uint8 and int8, (steps * 64,): of QSP_TOKEN_ROWS rows four slots each, a column within the block, and a code.
    zero : int
        The code of 0 in the input.
    """

    cdef readonly int64_t rows, columns
    cdef readonly int zero
    cdef int64_t slots
    cdef qsp_tokens product
    cdef tuple _held

    def __cinit__(self, int64_t rows, int64_t columns, step_ptr, place, code, int zero):
        cdef qsp_tokens *p = &self.product
        if not 1 <= rows < 1 << 30 or not 1 <= columns <= QSP_MAX_EXACT or not 0 <= zero <= 255:
            raise ValueError(f"a weight must have rows, and 1 to {QSP_MAX_EXACT} columns, whose sums an int32 holds")
        cdef int64_t blocks = (rows + QSP_TOKEN_ROWS - 1) // QSP_TOKEN_ROWS
        cdef int64_t across = (columns + QSP_TOKEN_COLUMNS - 1) // QSP_TOKEN_COLUMNS
        self.rows, self.columns, self.zero, self.slots = rows, columns, zero, numel(place)
        ptr = own_copy(step_ptr, _int32, blocks * across + 1, "step_ptr")
        steps = int(ptr[blocks * across])
        if int(ptr[0]) != 0 or bool((ptr.diff() < 0).any()):
            raise ValueError("step_ptr must ascend from 0")
        own_place = own_copy(place, _uint8, steps * QSP_UNIT, "place")
        own_code = own_copy(code, _int8, steps * QSP_UNIT, "code")
        if steps and int(own_place.max()) >= QSP_TOKEN_COLUMNS:
            raise ValueError(f"places must lie in [0, {QSP_TOKEN_COLUMNS})")
        start = self._starts(ptr, own_code, blocks, across)
        p.rows, p.row_blocks, p.column_blocks = rows, blocks, across
        p.step_ptr = <const int32_t *> pointer(ptr, _int32, 1, "step_ptr")
        p.place = <const uint8_t *> pointer(own_place, _uint8, 0, "place") if steps else NULL
        p.code = <const int8_t *> pointer(own_code, _int8, 0, "code") if steps else NULL
        p.start = <const int32_t *> pointer(start, _int32, blocks * QSP_TOKEN_ROWS, "start")
        self._held = (ptr, own_place, own_code, start)

    cdef object _starts(self, object ptr, object code, int64_t blocks, int64_t across):
        """What the sums of rows start from: minus the zero point times the sum of the row's codes."""
        block = torch.arange(blocks, device="cpu").repeat_interleave(ptr[::across].diff().to(torch.int64))
        sums = torch.zeros(blocks, QSP_TOKEN_ROWS, dtype=torch.int64, device="cpu")
        sums.index_add_(0, block, code.view(-1, QSP_TOKEN_ROWS, 4).sum(2, dtype=torch.int64))
        return (sums * -self.zero).to(_int32).view(-1)


cdef class TokenProductStep(FrozenStep):
    """The product of a weight with tokens: to codes in planes, or to a float32 tensor.

    Parameters
    ----------
    weights : TokenWeights
    source : TokenBuffer
    out : CodedBuffer or int
        Images of one pixel; or which tensor.
    factors : tuple of Tensor
        As for `ProductStep`.
    residual : CodedBuffer, optional
    scales : int
        Where scales of tokens are; below 0 they have none.
    """

    cdef TokenWeights weights
    cdef TokenBuffer source
    cdef CodedBuffer out, residual
    cdef int64_t target, scales
    cdef qsp_tokens product

    def __cinit__(self, TokenWeights weights not None, TokenBuffer source not None, out, tuple factors,
                  CodedBuffer residual=None, int64_t scales=-1):
        cdef qsp_tokens *p = &self.product
        cdef int64_t rows = weights.rows, whole
        self.product, self.scales = weights.product, scales
        if scales >= 0 and (scales % QSP_UNIT or isinstance(out, CodedBuffer)):
            raise ValueError("scales of tokens start at a multiple of 64, and are for floats")
        whole = p.row_blocks * QSP_TOKEN_ROWS
        if len(factors) != (4 if residual is None else 5):
            raise ValueError("factors must be multiplier, offset and two limits, and one more for a residual")
        if source.columns != weights.columns or source.zero != weights.zero:
            raise ValueError("tokens must have the weight's columns and zero")
        self.weights, self.source, self.residual, self.target = weights, source, residual, -1
        held = [torch.nn.functional.pad(own_copy(f, _float32, rows, "a factor"), (0, whole - rows)) for f in factors]
        p.multiplier = <const float *> pointer(held[0], _float32, whole, "factor")
        p.offset = <const float *> pointer(held[1], _float32, whole, "factor")
        p.low = <const float *> pointer(held[2], _float32, whole, "factor")
        p.high = <const float *> pointer(held[3], _float32, whole, "factor")
        if residual is not None:
            p.residual_multiplier = <const float *> pointer(held[4], _float32, whole, "factor")
        p.tokens, p.pitch = source.tokens, source.pitch
        if isinstance(out, CodedBuffer):
            self.out = out
        else:
            self.target = out
        for one in (self.out, residual):
            if one is not None and ((<CodedBuffer> one).layout.image != (1, 1) or (<CodedBuffer> one).channels != rows
                                    or (<CodedBuffer> one).images != source.tokens):
                raise ValueError("codes must be of images of one pixel, with a channel for each row")
        if residual is not None and self.out is None:
            raise ValueError("floats are without residual")
        self._held = tuple(held)

    cdef int64_t last_byte(self) noexcept:
        cdef int64_t last = self.source.start + self.source.tokens * self.source.pitch
        if self.scales >= 0:
            last = max(last, self.scales + self.source.tokens * <int64_t> sizeof(float))
        for buffer in (self.out, self.residual):
            if buffer is not None:
                last = max(last, (<CodedBuffer> buffer).end())
        return last

    cdef int64_t run(self, uint8_t *arena, list tensors, const qsp_kernels *kernels, int threads) except -1:
        cdef qsp_tokens a = self.product
        cdef qsp_coded residual
        cdef int64_t block
        a.x = arena + self.source.start
        if self.scales >= 0:
            a.scale = <const float *> (arena + self.scales)
        if self.residual is not None:
            self.residual.place(&residual, arena)
            a.residual = &residual
        if self.target < 0:
            self.out.place(&a.codes, arena)
        else:
            out = empty((a.tokens, a.rows), _float32)
            tensors[self.target] = out
            a.out = <float *> pointer(out, _float32, a.tokens * a.rows, "out")
        for block in prange(a.row_blocks, nogil=True, num_threads=threads, schedule="static",
                            use_threads_if=threads > 1 and self.weights.slots * a.tokens > SERIAL_SLOTS):
            kernels.tokens_product(&a, block)
        if self.out is not None:
            self.out.fill_tail(arena)
        return 0
