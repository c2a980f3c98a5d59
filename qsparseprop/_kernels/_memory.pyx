"""New tensors for results: large ones in pages of their own, see ``pool.h``."""

import torch

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc

from qsparseprop._kernels._dlpack cimport QSP_DL_CPU, qsp_dlmanaged

cdef enum:
    MOST_DIMS = 4


cdef extern from "pool.h" nogil:
    void *qsp_pool_take(int64_t size, int for_now, int64_t *given)
    void qsp_pool_give(void *start, int64_t size)
    int64_t qsp_pool_release()


ctypedef struct mapped:
    qsp_dlmanaged managed  # first: the deleter gets its address
    int64_t size
    int64_t shape[MOST_DIMS]
    int64_t strides[MOST_DIMS]

cdef dict _codes = {  # DLPack's code and bits
    torch.uint8: (1, 8), torch.int8: (0, 8), torch.int16: (0, 16), torch.int64: (0, 64), torch.float32: (2, 32),
    torch.bfloat16: (4, 16),
}
cdef object _contiguous = torch.contiguous_format
cdef object _channels_last = torch.channels_last
cdef object _empty = torch.empty
cdef object _cpu = torch.device("cpu")  # whatever device is the default
cdef object _from_dlpack = torch.utils.dlpack.from_dlpack


cdef void _delete(qsp_dlmanaged *managed) noexcept nogil:
    qsp_pool_give(managed.tensor.data, (<mapped *> managed).size)
    free(managed)


cdef void _delete_unused(object capsule) noexcept:
    if PyCapsule_IsValid(capsule, "dltensor"):  # torch renames those that it takes
        _delete(<qsp_dlmanaged *> PyCapsule_GetPointer(capsule, "dltensor"))


def empty(tuple shape, dtype, bint channels_last=False, bint for_now=False):
    """A tensor on the CPU whose elements are not set, as from torch.empty; channels_last ones have 4 dimensions.

    The storage of a large one cannot be resized. One that is wanted `for_now`, and is gone before others are made, may
    take the pages that a larger one has left.
    """
    cdef int64_t elements = 1, n, i, dims = len(shape)
    cdef mapped *m
    cdef void *data
    cdef bint regular = 0 < dims <= MOST_DIMS
    for size in shape:
        n = size
        regular = regular and n > 0 and elements < (<int64_t> 1 << 60) // n
        if not regular:
            break
        elements *= n
    code = _codes.get(dtype) if regular and elements >= LARGE // 4 else None
    if code is None or elements * (code[1] // 8) < LARGE or (channels_last and dims != 4):
        if not channels_last:
            return _empty(shape, dtype=dtype, device=_cpu)
        return _empty(shape, dtype=dtype, memory_format=_channels_last if channels_last else _contiguous, device=_cpu)
    m = <mapped *> malloc(sizeof(mapped))
    if m == NULL:
        raise MemoryError()
    data = qsp_pool_take(elements * (code[1] // 8), for_now, &m.size)
    if data == NULL:
        free(m)
        return _empty(shape, dtype=dtype, memory_format=_channels_last if channels_last else _contiguous, device=_cpu)
    n = 1
    for i in range(dims - 1, -1, -1):
        m.shape[i], m.strides[i] = shape[i], n
        n *= m.shape[i]
    if channels_last:
        m.strides[1], m.strides[3] = 1, m.shape[1]
        m.strides[2] = m.strides[3] * m.shape[3]
    m.managed.tensor.data, m.managed.tensor.byte_offset = data, 0
    m.managed.tensor.device.type, m.managed.tensor.device.id = QSP_DL_CPU, 0
    m.managed.tensor.ndim, m.managed.tensor.shape, m.managed.tensor.strides = dims, m.shape, m.strides
    m.managed.tensor.dtype.code, m.managed.tensor.dtype.bits = code[0], code[1]
    m.managed.tensor.dtype.lanes = 1
    m.managed.context, m.managed.deleter = NULL, _delete
    try:
        capsule = PyCapsule_New(m, "dltensor", _delete_unused)
    except BaseException:
        _delete(&m.managed)
        raise
    return _from_dlpack(capsule)


def release_pages():
    """Give the pages of results that are no more back to the system; returns their bytes."""
    return qsp_pool_release()
