"""Checked access to tensors, grids and views; see ``_tensor.pxd``."""

import torch

cdef object _Tensor = torch.Tensor
cdef object _strided = torch.strided

VIEW_NUMBERS = 9
MAX_VIEWS = 64
LIMIT = 1 << 30


cdef int64_t numel(object tensor) except -1:
    return tensor.numel()


cdef void *pointer(object tensor, object dtype, int64_t size, str name) except? NULL:
    """Data of a contiguous CPU tensor of `dtype` with at least `size` elements."""
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
    return <void *> <uintptr_t> tensor.data_ptr()


cdef void *optional_pointer(object tensor, object dtype, int64_t size, str name) except? NULL:
    return NULL if tensor is None else pointer(tensor, dtype, size, name)


cdef void read_grid(object numbers, qsp_grid *grid, str name) except *:
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


cdef int64_t read_views(object numbers, const qsp_grid *grid, object shape, object stride, qsp_view *views,
                        str name) except -1:
    """Views of a (images, channels, height, width) tensor; returns how many.

    Nine numbers each: first plane, channels, origin (lane), rows, columns, first row, first column, row step,
    column step.
    """
    cdef int64_t count = len(numbers) // VIEW_NUMBERS, i
    cdef int64_t channels, height, width, y0, x0, ystep, xstep
    if len(shape) != 4:
        raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(shape)}")
    if count * VIEW_NUMBERS != len(numbers) or not 1 <= count <= MAX_VIEWS:
        raise ValueError(f"the views of {name} must be 1 to {MAX_VIEWS} times {VIEW_NUMBERS} numbers, "
                         f"got {len(numbers)}")
    for size in shape:
        if not 0 <= size < LIMIT:
            raise ValueError(f"{name} has an impossible or too large shape, {tuple(shape)}")
    for value in numbers:
        if not -LIMIT < value < LIMIT:
            raise ValueError(f"the views of {name} have a number out of range: {list(numbers)}")
    channels, height, width = shape[1], shape[2], shape[3]
    cdef int64_t sb = stride[0], sc = stride[1], sy = stride[2], sx = stride[3]
    cdef qsp_view *v
    for i in range(count):
        v = &views[i]
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
    return count


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
