"""ReLU that leaves a bit an element behind, and gradients that such bits let pass."""

import torch

from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint16_t

from qsparseprop._kernels._dispatch cimport QSP_F32, active_kernels, qsp_kernels
from qsparseprop._kernels._tensor cimport numel, pointer, qsp_prefer_huge_pages, strided_pointer

cdef enum:
    # elements of a task, a multiple of 16, and below which threads cost more than they give
    TASK = 1 << 15
    SERIAL = 1 << 16

cdef object _float32 = torch.float32
cdef object _bfloat16 = torch.bfloat16
cdef object _int16 = torch.int16


cdef void *_output(object out, int dtype, int64_t count) except? NULL:
    cdef void *data = pointer(out, _float32 if dtype == QSP_F32 else _bfloat16, count, "out")
    qsp_prefer_huge_pages(data, count * (4 if dtype == QSP_F32 else 2))
    return data


def relu(x, out, mask, int threads):
    """out = max(x, 0), in place where `out` is `x`; bit i % 16 of mask[i / 16] = not (x[i] <= 0).

    `x` and `out` are contiguous and alike, float32 or bfloat16; `mask` is int16 with ceil(elements / 16) words.
    """
    cdef int dtype
    cdef int64_t count = numel(x), task, tasks
    cdef const qsp_kernels *kernels = active_kernels()
    cdef const void *data = strided_pointer(x, &dtype, "x")
    if not x.is_contiguous():
        raise ValueError("x must be contiguous")
    cdef void *to = _output(out, dtype, count)
    cdef uint16_t *words = <uint16_t *> pointer(mask, _int16, (count + 15) // 16, "mask")
    tasks = (count + TASK - 1) // TASK
    for task in prange(tasks, nogil=True, num_threads=max(threads, 1), schedule="static",
                       use_threads_if=threads > 1 and count > SERIAL):
        kernels.relu(data, dtype, task * TASK, min(count, (task + 1) * TASK), to, words)


def keep(x, mask, out, int threads):
    """out = x where the bit of `relu`'s mask is set, 0 elsewhere; arguments as there."""
    cdef int dtype
    cdef int64_t count = numel(x), task, tasks
    cdef const qsp_kernels *kernels = active_kernels()
    cdef const void *data = strided_pointer(x, &dtype, "x")
    if not x.is_contiguous():
        raise ValueError("x must be contiguous")
    cdef void *to = _output(out, dtype, count)
    cdef const uint16_t *words = <const uint16_t *> pointer(mask, _int16, (count + 15) // 16, "mask")
    tasks = (count + TASK - 1) // TASK
    for task in prange(tasks, nogil=True, num_threads=max(threads, 1), schedule="static",
                       use_threads_if=threads > 1 and count > SERIAL):
        kernels.keep(data, dtype, task * TASK, min(count, (task + 1) * TASK), words, to)
