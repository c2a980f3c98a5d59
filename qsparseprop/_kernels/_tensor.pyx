"""Checked access to tensors; see ``_tensor.pxd``."""

import torch

from cpython.exc cimport PyErr_Clear
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from qsparseprop._kernels._dlpack cimport QSP_DL_CPU, qsp_dl_contiguous, qsp_dlpack_api, qsp_dltensor


cdef object _Tensor = torch.Tensor
cdef object _strided = torch.strided
cdef object _float32 = torch.float32
cdef object _bfloat16 = torch.bfloat16


cdef enum:
    FLOAT32_CODE = 2 << 8 | 32
    BFLOAT16_CODE = 4 << 8 | 16
    COMPLEX = 5  # DLPack's code


cdef const qsp_dlpack_api *_find_exchange():
    """torch's way to describe a tensor to C code, NULL in versions without one."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or not PyCapsule_IsValid(capsule, "dlpack_exchange_api"):
        return NULL
    cdef const qsp_dlpack_api *api = <const qsp_dlpack_api *> PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    return api if api.version.major == 1 and api.describe != NULL else NULL


cdef const qsp_dlpack_api *_exchange = _find_exchange()
# Subclasses of Tensor that are tensors to the kernels.
cdef set _plain_classes = {torch.Tensor, torch.nn.Parameter}
# DLPack's (code, bits) of a dtype as one number
cdef dict _dtype_codes = {
    torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64, torch.uint8: 1 << 8 | 8,
    torch.float32: FLOAT32_CODE, torch.float64: 2 << 8 | 64, torch.bfloat16: BFLOAT16_CODE,
}


# what operators take besides tensors
cdef object _no_tensors = frozenset((bool, int, float, str, list, tuple, torch.dtype))


def treat_as_tensor(kind):
    """Let the kernels read tensors of a subclass that differs from Tensor in Python only."""
    _plain_classes.add(kind)


cdef bint _describe(object tensor, qsp_dltensor *out):
    """Description of a tensor on the CPU; False where it takes the long way, which also knows what is wrong."""
    cdef int i
    if _exchange == NULL or type(tensor) not in _plain_classes:
        return False
    if _exchange.describe(<void *> tensor, out) != 0:
        PyErr_Clear()
        return False
    if out.data == NULL:  # right if there are no elements; otherwise somebody has freed them
        for i in range(out.ndim):
            if out.shape[i] == 0:
                break
        else:
            return False
    return out.device.type == QSP_DL_CPU and out.dtype.lanes == 1


cdef bint _reaches(object tensor, const qsp_dltensor *t) except -1:
    """Whether the memory of a tensor reaches as far as its elements."""
    cdef int64_t last = 0, step = 1
    cdef int i
    for i in range(t.ndim - 1, -1, -1):
        if t.shape[i] == 0:
            return True
        last += (t.shape[i] - 1) * (t.strides[i] if t.strides != NULL else step)
        step *= t.shape[i]
    cdef int64_t offset = tensor.storage_offset(), size = len(tensor.untyped_storage())
    return (offset + last + 1) * (t.dtype.bits // 8) <= size


def are_plain(*tensors):
    """Whether tensors on the CPU are no more than numbers in memory that is there; None and what is no tensor is.

    Not plain are subclasses of Tensor, what functorch wraps, negative and conjugate views, tensors that only say that
    they are zero, and those whose storage was made smaller than they are.
    """
    cdef qsp_dltensor t
    for tensor in tensors:
        if tensor is None or type(tensor) in _no_tensors:
            continue
        if _exchange == NULL:
            if (type(tensor) not in _plain_classes or _dispatch_key_bits(tensor) not in _plain_key_bits
                    or not _storage_reaches(tensor)):
                return False
        elif not (_describe(tensor, &t) and t.dtype.code != COMPLEX and not tensor.is_neg() and _reaches(tensor, &t)):
            return False
    return True


cpdef int64_t tensor_version(object tensor) except -1:
    """Number of in-place changes of a tensor; tensors of inference mode do not count them."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def memory_stamp(*tensors):
    """What changes with the places of tensors, their sizes and, as far as versions count it, their contents."""
    cdef qsp_dltensor t
    cdef int64_t size
    cdef int i
    stamp = []
    for tensor in tensors:
        version = tensor_version(tensor)
        if _describe(tensor, &t):
            size = 1
            for i in range(t.ndim):
                size *= t.shape[i]
            stamp += (<uintptr_t> t.data + t.byte_offset, version, size)
        else:
            place = tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)
            stamp += (place, version, tensor.numel())
    return tuple(stamp)


cdef object _dispatch_key_bits(object tensor):
    return _dispatch_keys(tensor).raw_repr()


cdef object _dispatch_keys = torch._C._dispatch_keys
with torch.inference_mode():
    _inference_tensor = torch.empty(0)
# of tensors made by torch.empty, outside of inference mode and in it
cdef object _plain_key_bits = frozenset(_dispatch_key_bits(t) for t in (torch.empty(0), _inference_tensor))
del _inference_tensor


cdef bint _storage_reaches(object tensor) except -1:
    """The same as `_reaches` for any tensor; True where there is no storage that could be too small."""
    if (not tensor.is_cpu or tensor.layout is not _strided or tensor.is_nested or tensor._is_zerotensor()
            or type(tensor).__torch_dispatch__ is not _Tensor.__torch_dispatch__ or torch._is_functional_tensor(tensor)
            or torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.numel() == 0):
        return True
    last = sum([(n - 1) * step for n, step in zip(tensor.shape, tensor.stride())])
    return (tensor.storage_offset() + last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes()


cdef void *_checked_data(object tensor, str name) except? NULL:
    """Data of a tensor that took the long way."""
    check_storage(tensor, name)
    cdef uintptr_t data = tensor.data_ptr()
    if data == 0 and tensor.numel():
        raise ValueError(f"{name} has no memory of its own, it is a {type(tensor).__name__}")
    return <void *> data


def check_storage(tensor, str name):
    """Refuse a tensor whose storage was made smaller than it is; None and what has no storage pass."""
    cdef qsp_dltensor t
    if tensor is None or (_describe(tensor, &t) and _reaches(tensor, &t)):
        return
    if not _storage_reaches(tensor):
        raise ValueError(f"{name} has no memory: the storage of a tensor of shape {tuple(tensor.shape)} and dtype "
                         f"{tensor.dtype} has {tensor.untyped_storage().nbytes()} bytes; whoever has resized it (FSDP "
                         f"and offloading do) must restore it first")


cdef int64_t _dtype_code(const qsp_dltensor *t) noexcept:
    return t.dtype.code << 8 | t.dtype.bits


cdef int64_t numel(object tensor) except -1:
    if not isinstance(tensor, _Tensor):
        raise TypeError(f"expected a tensor, got {type(tensor).__name__}")
    return tensor.numel()


cdef void *pointer(object tensor, object dtype, int64_t size, str name) except? NULL:
    """Data of a contiguous CPU tensor of `dtype` with at least `size` elements."""
    cdef qsp_dltensor t
    cdef int64_t n
    if _describe(tensor, &t) and qsp_dl_contiguous(&t, &n) and n >= size and _dtype_codes.get(dtype) == _dtype_code(&t):
        return <char *> t.data + t.byte_offset
    if not isinstance(tensor, _Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must be of dtype {dtype}, got {tensor.dtype}")
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got device {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}")
    if tensor.numel() < size:
        raise ValueError(f"{name} must have at least {size} elements, got {tensor.numel()}")
    return _checked_data(tensor, name)


cdef void *optional_pointer(object tensor, object dtype, int64_t size, str name) except? NULL:
    return NULL if tensor is None else pointer(tensor, dtype, size, name)


cdef void *strided_pointer(object tensor, int *dtype, str name) except? NULL:
    """First element of a strided CPU tensor of float32 or bfloat16; its strides stay within its storage."""
    cdef qsp_dltensor t
    if _describe(tensor, &t) and (_dtype_code(&t) == FLOAT32_CODE or _dtype_code(&t) == BFLOAT16_CODE):
        dtype[0] = QSP_F32 if _dtype_code(&t) == FLOAT32_CODE else QSP_BF16
        return <char *> t.data + t.byte_offset
    if not isinstance(tensor, _Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype is _float32:
        dtype[0] = QSP_F32
    elif tensor.dtype is _bfloat16:
        dtype[0] = QSP_BF16
    else:
        raise TypeError(f"{name} must be of dtype torch.float32 or torch.bfloat16, got {tensor.dtype}")
    if not tensor.is_cpu or tensor.layout is not _strided:
        raise ValueError(f"{name} must be a strided tensor on the CPU, got {tensor.layout} on device {tensor.device}")
    return _checked_data(tensor, name)


cdef void *image_pointer(object tensor, strides_t *where, int *dtype, str name) except? NULL:
    """The same of a tensor of four dimensions, with its shape and strides; one of two is seen as images of a pixel."""
    cdef qsp_dltensor t
    cdef int64_t i, step = 1
    cdef void *data
    if (_describe(tensor, &t) and (t.ndim == 4 or t.ndim == 2)
            and (_dtype_code(&t) == FLOAT32_CODE or _dtype_code(&t) == BFLOAT16_CODE)):
        dtype[0] = QSP_F32 if _dtype_code(&t) == FLOAT32_CODE else QSP_BF16
        where.dims = t.ndim
        for i in range(t.ndim - 1, -1, -1):
            where.size[i], where.step[i] = t.shape[i], t.strides[i] if t.strides != NULL else step
            step *= t.shape[i]
        data = <char *> t.data + t.byte_offset
    else:
        data = strided_pointer(tensor, dtype, name)
        read_strides(tensor, where)
        if where.dims != 4 and where.dims != 2:
            raise ValueError(f"{name} must have 4 dimensions, or 2, got shape {tuple(tensor.shape)}")
    if where.dims == 2:
        where.dims = 4
        where.size[2] = where.size[3] = where.step[2] = where.step[3] = 1
    return data


cdef int64_t read_strides(object tensor, strides_t *where) except -1:
    """Shape and strides of a tensor."""
    cdef int64_t i
    sizes, steps = tensor.shape, tensor.stride()
    if len(sizes) > MOST_DIMS:
        raise ValueError(f"at most {MOST_DIMS} dimensions, got shape {tuple(sizes)}")
    where.dims = len(sizes)
    for i in range(where.dims):
        where.size[i], where.step[i] = sizes[i], steps[i]
    return 0


cdef void *exact_pointer(object tensor, object dtype, int64_t size, str name) except? NULL:
    """The same as `pointer` of a tensor that has so many elements and no more; NULL for None."""
    if tensor is None:
        return NULL
    cdef void *data = pointer(tensor, dtype, size, name)
    if numel(tensor) != size:
        raise ValueError(f"{name} must have {size} elements, got {numel(tensor)}")
    return data


cdef void *matrix(object x, int *dtype, int64_t *rows, int64_t *channels, str name) except? NULL:
    """A contiguous (rows, channels) tensor of float32 or bfloat16."""
    return matrix_of(strided_pointer(x, dtype, name), x, rows, channels, name)


cdef void *matrix_of(void *data, object x, int64_t *rows, int64_t *channels, str name) except? NULL:
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous with 2 dimensions (rows, channels), got shape {tuple(x.shape)} "
                         f"with strides {x.stride()}")
    rows[0], channels[0] = x.shape
    return data


cdef void *same_matrix(object x, object like, str name) except? NULL:
    """Data of a tensor that has the shape and dtype of another one; NULL for None."""
    cdef int dtype
    cdef int64_t rows, channels
    if x is None:
        return NULL
    if not isinstance(x, _Tensor) or x.shape != like.shape or x.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype} of shape {tuple(like.shape)}")
    return matrix(x, &dtype, &rows, &channels, name)
