"""Frozen models: buffers of codes, and steps that run one after the other in one call.

What steps compute lies in an arena, memory that a call takes and gives back, so that several threads may be in the same
segment at once. All numbers that the kernels walk are of the steps, and nobody can change them.
"""

import torch

from qsparseprop._kernels._dispatch import active_isa

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport QSP_UNIT, active_kernels, qsp_coded, qsp_kernels, qsp_view
from qsparseprop._kernels._plan cimport PlaneLayout
from qsparseprop._kernels._tensor cimport numel, pointer
from qsparseprop._kernels._weights cimport give_scratch, take_scratch

cdef object _int64 = torch.int64


cdef object own_copy(object tensor, object dtype, int64_t size, str name):
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


cdef bint same_lanes(CodedBuffer a, CodedBuffer b) noexcept:
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


def take_arena(int64_t size):
    """Memory of so many bytes for a call, or more, which nobody else has until it is given back."""
    return take_scratch((max(size, 0) + 7) // 8)


def give_arena(arena):
    """Let a later call have it."""
    give_scratch(arena)


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

    def __call__(self, tuple inputs not None, arena, int threads):
        """The outputs, for input tensors of the numbers of images that the steps are for.

        `arena` is of `take_arena`: what segments before have left there is read.
        """
        if len(inputs) != self.inputs:
            raise ValueError(f"{self.inputs} inputs are wanted, got {len(inputs)}")
        if active_kernels() != self.kernels:
            raise RuntimeError(f"this segment was made for {self.isa}, and {active_isa()} is in use now")
        cdef list tensors = [*inputs, *[None] * (self.tensors - self.inputs)]
        cdef uint8_t *memory = <uint8_t *> pointer(arena, _int64, (self.arena + 7) // 8, "arena")
        for step in self.steps:
            (<FrozenStep> step).run(memory, tensors, self.kernels, max(threads, 1))
        return tuple([tensors[i] for i in self.outputs])
