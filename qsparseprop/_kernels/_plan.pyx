"""What the kernels walk, checked once when it is made: where planes lie, which values a weight has, and rows of them.

Nobody can change them afterwards: all numbers are copied, and what Python sees of them are copies again. So the kernels
read them without looking at them anew, and without the GIL.
"""

import weakref

import torch

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint16_t, uint64_t

from qsparseprop._kernels._dispatch cimport QSP_UNIT
from qsparseprop._kernels._tensor cimport numel, pointer

from qsparseprop._kernels._tensor import check_storage

cdef enum:
    VIEW_NUMBERS = 9
    WIDE = 1 << 16  # columns that 16 bits number
    # below: sums of products of two fit into 64 bits, which everything that follows relies on
    LIMIT = 1 << 30

cdef object _int16 = torch.int16
cdef object _int32 = torch.int32
cdef object _int64 = torch.int64


ctypedef struct pixels_t:
    # of a view: the first row and column of the tensor, and the steps from one to the next
    int64_t row, col, row_step, col_step


cdef class PlaneLayout:
    """Where the elements of (images, channels, height, width) tensors lie in planes of lanes.

    Of images of one pixel the tensors may be (images, channels).

    Parameters
    ----------
    grid : sequence of int
        Eight numbers: images of a block; lanes from one image, row and column to the next; planes of a block; lanes
        from plane to plane, before a plane's first one, and from block to block.
    views : sequence of int
        Nine numbers a view: its first plane, channels, lane of the first pixel, rows, columns; of the tensor the first
        row and column, and the steps from one to the next. Views are of all planes, one after the other; those that
        follow each other may be of the same ones.
    image : (int, int)
        Height and width of the tensor.

    Attributes
    ----------
    numbers, views, image : tuple of int
        As given.
    channels : int
        Of the tensor.
    complete : bool
        Whether every pixel of an image lies in some view.

    Raises
    ------
    ValueError
        If the numbers are not those of a layout, or out of range.
    """

    def __cinit__(self, grid, views, image):
        self.numbers, self.views, self.image = tuple(grid), tuple(views), tuple(image)
        self._read_grid()
        self._read_views()

    cdef int64_t _read_grid(self) except -1:
        cdef qsp_grid *grid = &self.grid
        if len(self.numbers) != 8:
            raise ValueError(f"a grid must be 8 numbers, got {len(self.numbers)}")
        for i, value in enumerate(self.numbers):
            if not 0 <= value < (4 * <int64_t> LIMIT if i == 7 else LIMIT):
                raise ValueError(f"a grid has a number out of range: {list(self.numbers)}")
        (grid.images, grid.lane_b, grid.lane_y, grid.lane_x, grid.planes, grid.pitch, grid.front,
         grid.block) = self.numbers
        if (grid.images < 1 or grid.planes < 1 or grid.lane_b < 1 or grid.lane_y < 1 or grid.lane_x < 1
                or grid.pitch < grid.front + 1 or grid.pitch % QSP_UNIT or grid.block < grid.planes * grid.pitch):
            raise ValueError(f"these numbers are not a grid: {list(self.numbers)}")
        return 0

    cdef int64_t _read_views(self) except -1:
        cdef int64_t i, height, width, plane = 0, pixels = 0
        cdef const qsp_grid *grid = &self.grid
        cdef qsp_view *v
        cdef pixels_t *p
        self.count = len(self.views) // VIEW_NUMBERS
        if self.count < 1 or self.count * VIEW_NUMBERS != len(self.views):
            raise ValueError(f"views must be {VIEW_NUMBERS} numbers each, and one or more of them, got "
                             f"{len(self.views)}")
        for value in self.views:
            if not -LIMIT < value < LIMIT:
                raise ValueError(f"the views have a number out of range: {list(self.views)}")
        if len(self.image) != 2 or not (0 <= self.image[0] < LIMIT and 0 <= self.image[1] < LIMIT):
            raise ValueError(f"an image must have height and width, below {LIMIT}, got {list(self.image)}")
        height, width = self.image
        self.channels = self.views[1]
        if self.channels < 1:
            raise ValueError(f"a view must have channels, got {self.channels}")
        self._views = PyBytes_FromStringAndSize(NULL, self.count * sizeof(qsp_view))
        self._pixels = PyBytes_FromStringAndSize(NULL, self.count * sizeof(pixels_t))
        v, p = <qsp_view *> PyBytes_AS_STRING(self._views), <pixels_t *> PyBytes_AS_STRING(self._pixels)
        for i in range(self.count):
            one = self.views[VIEW_NUMBERS * i:VIEW_NUMBERS * (i + 1)]
            (v.plane, v.channels, v.origin, v.rows, v.cols, p.row, p.col, p.row_step, p.col_step) = one
            if v.rows == 0 or v.cols == 0:
                v.rows = v.cols = p.row = p.col = 0
            outside = v.rows > 0 and (p.row + (v.rows - 1) * p.row_step >= height
                                      or p.col + (v.cols - 1) * p.col_step >= width)
            if (outside or v.channels != self.channels or v.origin < 0 or v.rows < 0 or v.cols < 0 or p.row < 0
                    or p.col < 0 or p.row_step < 1 or p.col_step < 1):
                raise ValueError(f"view {list(one)} does not fit images of {height} x {width} with {self.channels} "
                                 "channels")
            if v.plane != plane and not (i and v.plane == plane - self.channels):
                raise ValueError(f"view {list(one)} must start at plane {plane}, or at that of the view before")
            if v.plane == plane:
                plane += self.channels
            elif v.origin < (v - 1).origin + (v - 1).rows * grid.lane_y:
                raise ValueError(f"view {list(one)} has lanes of the view before")
            # elements are numbered as if channels were innermost, whatever the memory format
            v.index_c, v.index_x, v.index_y = 1, self.channels * p.col_step, self.channels * width * p.row_step
            v.index_b = self.channels * width * height
            v.index = (p.row * width + p.col) * self.channels
            self.reach = max(self.reach, view_end(grid, v, grid.images))
            pixels += v.rows * v.cols
            v += 1
            p += 1
        if plane != grid.planes:
            raise ValueError(f"the views have {plane} planes, the grid has {grid.planes}")
        self.complete = pixels >= height * width
        return 0

    cdef int64_t blocks(self, int64_t images) noexcept nogil:
        return (images + self.grid.images - 1) // self.grid.images

    cdef int64_t lane_count(self, int64_t images) noexcept nogil:
        return self.blocks(images) * self.grid.block + self.grid.front + QSP_UNIT

    cdef int64_t check_shape(self, const int64_t *shape, str name) except -1:
        """Check the shape of a tensor; returns its images."""
        if (not 0 <= shape[0] < LIMIT or shape[1] != self.channels or shape[2] != self.image[0]
                or shape[3] != self.image[1]):
            wanted = ", ".join(map(str, (self.channels, *self.image)))
            raise ValueError(f"{name} must be of shape (images, {wanted}), got "
                             f"({shape[0]}, {shape[1]}, {shape[2]}, {shape[3]})")
        return shape[0]

    cdef bytes place(self, int64_t images, const int64_t *stride):
        """The views of a tensor of so many images and these four strides: one `qsp_view` after the other."""
        cdef bytes placed = PyBytes_FromStringAndSize(PyBytes_AS_STRING(self._views), self.count * sizeof(qsp_view))
        cdef qsp_view *v = <qsp_view *> PyBytes_AS_STRING(placed)
        cdef const pixels_t *p = <const pixels_t *> PyBytes_AS_STRING(self._pixels)
        cdef int64_t i
        for i in range(self.count):
            # the stride of a dimension that is not walked may be anything
            v[i].elem_b = stride[0] if images > 1 else 0
            v[i].elem_c = stride[1] if self.channels > 1 else 0
            v[i].elem_y = stride[2] * p[i].row_step if v[i].rows > 1 else 0
            v[i].elem_x = stride[3] * p[i].col_step if v[i].cols > 1 else 0
            v[i].elem = p[i].row * stride[2] + p[i].col * stride[3]
        return placed

    cdef int64_t whole_view(self, qsp_view *view) except -1:
        """All lanes of the planes as a single view, and where it ends, see `view_end`.

        Slices of a volume have a view each, but lie on the same planes with gaps of zeros between them, which add
        nothing to a sum over lanes.
        """
        cdef const qsp_view *first = <const qsp_view *> PyBytes_AS_STRING(self._views)
        cdef const qsp_view *last = first + self.count - 1
        view[0] = first[0]
        if self.count > 1:
            if last.plane != first.plane or last.cols != first.cols or last.origin < first.origin:
                raise ValueError("the planes of a gradient must have one view, or one a slice")
            view.rows = (last.origin - first.origin) // self.grid.lane_y + last.rows
        return view_end(&self.grid, view, self.grid.images)

    cdef int64_t _check_images(self, int64_t images) except -1:
        if not 0 <= images < LIMIT:
            raise ValueError(f"the number of images must lie in [0, {LIMIT}), got {images}")
        return 0

    def lanes(self, int64_t images):
        """Size of the planes' buffer for a batch: whole blocks, and what the kernels read past the last one."""
        self._check_images(images)
        return self.lane_count(images)

    @property
    def planes(self):
        """Planes of a block."""
        return self.grid.planes

    def shape(self, int64_t images):
        """Shape of the tensor for a batch."""
        self._check_images(images)
        return images, self.channels, self.image[0], self.image[1]

    def __eq__(self, other):
        if not isinstance(other, PlaneLayout):
            return NotImplemented
        return self is other or (self.numbers == other.numbers and self.views == other.views
                                 and self.image == other.image)

    def __hash__(self):
        return hash((self.numbers, self.image))

    def __repr__(self):
        return f"PlaneLayout(grid={self.numbers}, {self.count} views of images of {self.image[0]} x {self.image[1]})"

    def __reduce__(self):
        return PlaneLayout, (self.numbers, self.views, self.image)


cdef int64_t view_end(const qsp_grid *grid, const qsp_view *view, int64_t images) except -1:
    """Check that a view lies inside its planes; returns the end of its last unit, counted from a plane's first lane."""
    cdef int64_t end
    if images < 1 or view.rows < 1 or view.cols < 1:
        return 0
    # a lane has one owner: the three strides must nest
    if grid.lane_b < grid.lane_x:
        nests = grid.lane_b == 1 and images <= grid.lane_x and view.cols * grid.lane_x <= grid.lane_y
    else:
        nests = grid.lane_x == 1 and view.cols <= grid.lane_y and view.rows * grid.lane_y <= grid.lane_b
    if not nests or (grid.lane_y % grid.lane_x if grid.lane_b < grid.lane_x else grid.lane_b % grid.lane_y):
        raise ValueError(f"the lanes overlap: strides {grid.lane_b}, {grid.lane_y}, {grid.lane_x} for {images} images "
                         f"of {view.rows} x {view.cols}")
    end = view.origin + 1
    end += (images - 1) * grid.lane_b + (view.rows - 1) * grid.lane_y + (view.cols - 1) * grid.lane_x
    if grid.front + end > grid.pitch:
        raise ValueError(f"a view has lanes up to {grid.front + end}, its planes only {grid.pitch}")
    return end + QSP_UNIT


cdef extern from "pattern.h" nogil:
    int64_t qsp_words(int64_t)
    int64_t qsp_narrow(const int32_t *, const int32_t *, int64_t, int64_t, uint16_t *)
    int64_t qsp_set_bits(const int32_t *, const uint16_t *, const int32_t *, int64_t, int64_t, uint64_t *)
    int64_t qsp_check_bits(const uint64_t *, const int32_t *, int64_t, int64_t)
    void qsp_columns_of(const uint64_t *, int64_t, int64_t, uint16_t *, int64_t)


cdef class ValuePattern:
    """Which entries of a weight, (rows, columns), its values are: as columns or as a bitmap.

    What it holds is two bytes a value, or a bit an entry where that is less and a third or more of the entries are
    there, or nothing where all are. Below, products go by lists, which read columns.

    Parameters
    ----------
    crow_indices, col_indices : Tensor
        CSR, int32; columns ascend in each row. Or those that another pattern holds. They are copied.
    columns : int
        Above 65,536 they take four bytes.

    Attributes
    ----------
    rows, columns, count : int
        The latter of values.
    held : tuple of Tensor
        What it holds, not to be written to: row pointers as given, and columns: as int32 above 65,536 of them; else
        int16, the bits of 16 without a sign, and none where every row has all; or int64, words of the rows' bitmaps.
    nbytes : int
        Bytes that it holds.

    Raises
    ------
    TypeError, ValueError
        If a tensor is not as said.
    """

    def __cinit__(self, crow_indices, col_indices, int64_t columns):
        cdef int64_t i
        for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        self.rows, self.columns, self.count = numel(crow_indices) - 1, columns, numel(col_indices)
        if self.rows < 1 or not 1 <= columns < <int64_t> 1 << 31:
            raise ValueError(f"a pattern must have rows and columns, got {self.rows} and {columns}")
        check_storage(crow_indices, "crow_indices")
        check_storage(col_indices, "col_indices")
        own, col_indices = crow_indices.clone(), col_indices.resolve_neg()
        cdef int32_t *ptr = <int32_t *> pointer(own, _int32, self.rows + 1, "crow_indices")
        cdef bint held = columns <= WIDE and (col_indices.dtype is _int64 or col_indices.dtype is _int16)
        if held and (col_indices.dtype is _int64 or (self.count == 0 and ptr[self.rows] == self.rows * columns)):
            self.count = ptr[self.rows]
        for i in range(self.rows):
            if ptr[i + 1] < ptr[i] or <int64_t> ptr[i + 1] - ptr[i] > columns:
                raise ValueError(f"crow_indices must ascend, by at most {columns}")
        if ptr[0] != 0 or ptr[self.rows] != self.count:
            raise ValueError(f"crow_indices must ascend from 0 to {self.count}")
        self.ptr = ptr
        self.held = (own, self._take_columns(col_indices, held))

    cdef object _take_columns(self, object given, bint held):
        """Columns as they are to be held, of CSR or, where they are `held`, of another pattern's."""
        cdef int64_t bytes_of_bits = 8 * self.rows * qsp_words(self.columns)
        if self.columns > WIDE:
            own = given.clone() if given.is_contiguous() else given
            self._check_columns(own, NULL, NULL)
            if self.count:
                self.wide = <const int32_t *> pointer(own, _int32, self.count, "col_indices")
            return own
        if self.count == self.rows * self.columns:
            if not (held and numel(given) == 0):
                self._check_columns(given, NULL, NULL)
            return torch.empty(0, dtype=_int16, device="cpu")
        if 3 * self.count >= self.rows * self.columns and bytes_of_bits < 2 * self.count:
            return self._take_bits(given, held)
        # of no columns, `column` points to memory all the same
        room = self._room = torch.empty(max(self.count, 1), dtype=_int16, device="cpu")
        cdef uint16_t *out = <uint16_t *> pointer(room, _int16, self.count, "col_indices")
        own = room if self.count else room.new_empty(0)
        if held and given.dtype is _int16:
            own.copy_(given)
            given = None
        self._check_columns(given, out, NULL)
        self.column = out
        return own

    cdef object _take_bits(self, object given, bint held):
        cdef int64_t words = self.rows * qsp_words(self.columns), bad
        cdef uint64_t *out
        if held and given.dtype is _int64:
            if numel(given) != words:
                raise ValueError(f"col_indices must be {words} words of bits, got {numel(given)}")
            own = given.clone()
            out = <uint64_t *> pointer(own, _int64, words, "col_indices")
            bad = qsp_check_bits(out, self.ptr, self.rows, self.columns)
            if bad != self.rows:
                raise ValueError(f"col_indices must have {self.ptr[bad + 1] - self.ptr[bad]} bits below "
                                 f"{self.columns} in row {bad}")
        else:
            own = torch.empty(words, dtype=_int64, device="cpu")
            out = <uint64_t *> pointer(own, _int64, words, "col_indices")
            self._check_columns(given, NULL, out)
        self.bits = out
        return own

    cdef int64_t _check_columns(self, object given, uint16_t *out, uint64_t *bits) except -1:
        """Check columns of CSR, or without them those in `out`, and leave them there or as bits."""
        cdef int64_t bad
        cdef const int32_t *column = NULL
        if given is not None and (self.count or numel(given)):
            column = <const int32_t *> pointer(given, _int32, self.count, "col_indices")
        with nogil:
            if bits != NULL:
                bad = qsp_set_bits(column, NULL, self.ptr, self.rows, self.columns, bits)
            else:
                bad = qsp_narrow(column, self.ptr, self.rows, self.columns, out)
        if bad != self.count:
            raise ValueError(f"col_indices must ascend in each row and lie in [0, {self.columns}), got "
                             f"{out[bad] if column == NULL else column[bad]} at {bad}")
        return 0

    cdef object columns_for_lists(self):
        """Columns as 16 bits, which whoever uses them is to hold: those that are held, or made once for all users."""
        if self.column != NULL:
            return self._room
        made = None if self._other is None else self._other()
        if made is None:
            made = torch.empty(max(self.count, 1), dtype=_int16, device="cpu")
            qsp_columns_of(self.bits, self.rows, self.columns,
                           <uint16_t *> pointer(made, _int16, self.count, "col_indices"), self.count)
            self._other = weakref.ref(made)
        return made

    cdef object bits_for_rows(self):
        """The bitmap in the same way; None where every row has all."""
        cdef int64_t words = self.rows * qsp_words(self.columns)
        if self.bits != NULL:
            return self.held[1]
        if self.column == NULL:
            return None
        made = None if self._other is None else self._other()
        if made is None:
            made = torch.empty(words, dtype=_int64, device="cpu")
            qsp_set_bits(NULL, self.column, self.ptr, self.rows, self.columns,
                         <uint64_t *> pointer(made, _int64, words, "col_indices"))
            self._other = weakref.ref(made)
        return made

    cdef int64_t check_layouts(self, int64_t groups, tuple phase, tuple shift, PlaneLayout x, PlaneLayout y) except -1:
        """Check that groups and taps make a convolution of this weight from planes x to y."""
        if groups < 1 or self.rows % groups or x.channels % groups or self.rows != y.grid.planes:
            raise ValueError(f"a pattern of {self.rows} rows in {groups} groups does not go with {y.grid.planes} "
                             f"planes of the output and {x.channels} channels of the input")
        if not phase or len(phase) != len(shift) or len(phase) * (x.channels // groups) != self.columns:
            raise ValueError(f"{len(phase)} taps, shifts of {len(shift)} and {x.channels // groups} channels of a "
                             f"group do not make {self.columns} columns")
        if not all([0 <= p < x.grid.planes // x.channels for p in phase]):
            raise ValueError(f"tap_phase must lie in [0, {x.grid.planes // x.channels}), got {list(phase)}")
        if not all([-LIMIT < s < LIMIT for s in shift]):
            raise ValueError(f"tap_shift must lie within {LIMIT} lanes, got {list(shift)}")
        return 0

    @property
    def crow_indices(self):
        """First value of each row, int32."""
        return self.held[0].clone()

    @property
    def col_indices(self):
        """Column of each value, int32."""
        if self.columns > WIDE:
            return self.held[1].clone()
        return self.columns_for_lists()[:self.count].view(torch.uint16).to(_int32)

    @property
    def nbytes(self):
        """Bytes that it holds."""
        return sum([t.nbytes for t in self.held])

    def __repr__(self):
        return f"ValuePattern({self.rows} x {self.columns}, {self.count} values)"

    def __reduce__(self):
        return ValuePattern, (self.crow_indices, self.col_indices, self.columns)


cdef class ProductRows:
    """Rows of weights that a product multiplies planes of `source` with, for planes of `target`, on the same lanes.

    How the weights lie there is what the classes differ in: `GatherList`, `DenseRows`. The products are the same bits.

    Attributes
    ----------
    rows, slots : int
        How many, and how many weights in all, those included that are always zero.
    source, target : PlaneLayout
    """

    cdef int64_t _take_layouts(self, PlaneLayout source, PlaneLayout target, int64_t rows) except -1:
        cdef const qsp_grid *x = &source.grid
        cdef const qsp_grid *y = &target.grid
        if x.images != y.images or x.lane_b != y.lane_b or x.lane_y != y.lane_y or x.lane_x != y.lane_x:
            raise ValueError(f"source and target must have the same lanes, got {source!r} and {target!r}")
        self.source, self.target, self.rows = source, target, rows
        return 0

    cdef int64_t _furthest(self) noexcept:
        """The last offset from which a unit reads no further than what is allocated behind the last block."""
        return self.source.grid.block + self.source.grid.front + QSP_UNIT - self.target.reach
