"""Checked access to tensors, grids and views; see ``_tensor.pxd``."""

import torch

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_Clear
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from libc.string cimport memcpy

from qsparseprop._kernels._dlpack cimport QSP_DL_CPU, qsp_dl_contiguous, qsp_dlpack_api, qsp_dltensor


cdef object _Tensor = torch.Tensor
cdef object _strided = torch.strided
cdef object _float32 = torch.float32
cdef object _bfloat16 = torch.bfloat16

# What tuples of numbers were found to mean. A layer brings the same ones at every call, and reading them anew would
# take longer than the kernels of a small layer.
cdef dict _grids = {}
# (identity of the tuple, planes, shape, strides) -> the tuple, which keeps its identity from being used again, and what
# was read. Hashing the numbers themselves would take microseconds where a stride of 16 makes 256 views of them.
cdef dict _views = {}
cdef int64_t _views_size = 0
cdef enum:
    KEPT = 512
    KEPT_BYTES = 1 << 23
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
    """Whether tensors, or None, on the CPU are no more than numbers in memory that is there.

    Not plain are subclasses of Tensor, what functorch wraps, negative and conjugate views, tensors that only say that
    they are zero, and those whose storage was made smaller than they are.
    """
    cdef qsp_dltensor t
    for tensor in tensors:
        if tensor is None:
            continue
        if _exchange == NULL:
            if (type(tensor) not in _plain_classes or _dispatch_key_bits(tensor) not in _plain_key_bits
                    or not _storage_reaches(tensor)):
                return False
        elif not (_describe(tensor, &t) and t.dtype.code != COMPLEX and not tensor.is_neg() and _reaches(tensor, &t)):
            return False
    return True


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

VIEW_NUMBERS = 9
LIMIT = 1 << 30


cdef int64_t numel(object tensor) except -1:
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


cdef void read_grid(object numbers, qsp_grid *grid, str name) except *:
    cdef bytes known
    cdef object found
    if type(numbers) is tuple:
        found = _grids.get(numbers)
        if found is not None:
            known = found
            memcpy(grid, <const char *> known, sizeof(qsp_grid))
            return
    _read_grid(numbers, grid, name)
    if type(numbers) is tuple:
        if len(_grids) >= KEPT:
            _grids.clear()
        _grids[numbers] = (<const char *> grid)[:sizeof(qsp_grid)]


cdef void _read_grid(object numbers, qsp_grid *grid, str name) except *:
    if len(numbers) != 8:
        raise ValueError(f"{name} must be 8 numbers, got {len(numbers)}")
    # below: sums of products of two fit into 64 bits, which everything that follows relies on
    for i, value in enumerate(numbers):
        if not 0 <= value < (4 * LIMIT if i == 7 else LIMIT):
            raise ValueError(f"{name} has a number out of range: {list(numbers)}")
    (grid.images, grid.lane_b, grid.lane_y, grid.lane_x, grid.planes, grid.pitch, grid.front, grid.block) = numbers
    if (grid.images < 1 or grid.planes < 1 or grid.lane_b < 1 or grid.lane_y < 1 or grid.lane_x < 1
            or grid.pitch < grid.front + 1 or grid.pitch % QSP_UNIT or grid.block < grid.planes * grid.pitch):
        raise ValueError(f"{name} is not a grid: {list(numbers)}")


cdef bytes read_views(object numbers, const qsp_grid *grid, object shape, object stride, str name):
    """Views of a (images, channels, height, width) tensor: one `qsp_view` after the other.

    Nine numbers each: first plane, channels, origin (lane), rows, columns, first row, first column, row step,
    column step.
    """
    global _views_size
    cdef bytes views
    cdef object key = None, found
    if type(numbers) is tuple:
        key = <uintptr_t> <void *> numbers, grid.planes, tuple(shape), tuple(stride)
        found = _views.get(key)
        if found is not None:
            return (<tuple> found)[1]
    views = _read_views(numbers, grid, shape, stride, name)
    if key is not None:
        if len(_views) >= KEPT or _views_size + len(views) > KEPT_BYTES:
            _views.clear()
            _views_size = 0
        _views[key] = numbers, views
        _views_size += len(views)
    return views


cdef bytes _read_views(object numbers, const qsp_grid *grid, object shape, object stride, str name):
    cdef int64_t count = len(numbers) // VIEW_NUMBERS, i
    cdef int64_t channels, height, width, y0, x0, ystep, xstep
    if len(shape) != 4:
        raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(shape)}")
    if count < 1 or count * VIEW_NUMBERS != len(numbers):
        raise ValueError(f"the views of {name} must be {VIEW_NUMBERS} numbers each, and one or more of them, got "
                         f"{len(numbers)}")
    for size in shape:
        if not 0 <= size < LIMIT:
            raise ValueError(f"{name} has an impossible or too large shape, {tuple(shape)}")
    for value in numbers:
        if not -LIMIT < value < LIMIT:
            raise ValueError(f"the views of {name} have a number out of range: {list(numbers)}")
    channels, height, width = shape[1], shape[2], shape[3]
    cdef int64_t sb = stride[0], sc = stride[1], sy = stride[2], sx = stride[3]
    cdef bytes views = PyBytes_FromStringAndSize(NULL, count * sizeof(qsp_view))
    cdef qsp_view *v
    for i in range(count):
        v = <qsp_view *> PyBytes_AS_STRING(views) + i
        one = numbers[9 * i:9 * i + 9]
        (v.plane, v.channels, v.origin, v.rows, v.cols, y0, x0, ystep, xstep) = one
        if v.rows == 0 or v.cols == 0:
            v.rows = v.cols = 0
            y0 = x0 = 0
        if (v.plane < 0 or v.channels != channels or v.plane + v.channels > grid.planes or v.origin < 0
                or y0 < 0 or x0 < 0 or ystep < 1 or xstep < 1 or v.rows < 0 or v.cols < 0
                or (v.rows > 0 and (y0 + (v.rows - 1) * ystep >= height or x0 + (v.cols - 1) * xstep >= width))):
            raise ValueError(f"view {list(one)} does not fit {name} of shape {tuple(shape)} "
                             f"on {grid.planes} planes")
        # the stride of a dimension that is not walked may be anything
        v.elem_b = sb if shape[0] > 1 else 0
        v.elem_c = sc if channels > 1 else 0
        v.elem_y = sy * ystep if v.rows > 1 else 0
        v.elem_x = sx * xstep if v.cols > 1 else 0
        v.elem = y0 * sy + x0 * sx
        # elements are numbered as if channels were innermost, whatever the memory format
        v.index_c, v.index_x, v.index_y = 1, channels * xstep, channels * width * ystep
        v.index_b = channels * width * height
        v.index = (y0 * width + x0) * channels
    return views


cdef int64_t check_lanes(const qsp_grid *grid, const qsp_view *view, int64_t images, str name) except -1:
    """Check that a view lies inside its planes; returns the end of its last unit, counted from a plane's first lane."""
    cdef int64_t n = min(images, grid.images), b, end
    if n < 1 or view.rows < 1 or view.cols < 1:
        return 0
    # a lane has one owner: the three strides must nest
    if grid.lane_b < grid.lane_x:
        nests = grid.lane_b == 1 and n <= grid.lane_x and view.cols * grid.lane_x <= grid.lane_y
    else:
        nests = grid.lane_x == 1 and view.cols <= grid.lane_y and view.rows * grid.lane_y <= grid.lane_b
    if not nests or (grid.lane_y % grid.lane_x if grid.lane_b < grid.lane_x else grid.lane_b % grid.lane_y):
        raise ValueError(f"the lanes of {name} overlap: strides {grid.lane_b}, {grid.lane_y}, {grid.lane_x} for "
                         f"{n} images of {view.rows} x {view.cols}")
    b = (n - 1) * grid.lane_b + (view.rows - 1) * grid.lane_y + (view.cols - 1) * grid.lane_x + 1
    end = grid.front + view.origin + b
    if end > grid.pitch:
        raise ValueError(f"{name} has lanes up to {end}, its planes only {grid.pitch}")
    return view.origin + b + QSP_UNIT
