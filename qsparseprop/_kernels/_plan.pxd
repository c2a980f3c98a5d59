"""What the kernels walk, checked once when it is made: see ``_plan.pyx``."""

from libc.stdint cimport int32_t, int64_t, uint16_t, uint64_t

from qsparseprop._kernels._dispatch cimport qsp_grid, qsp_view


cdef class PlaneLayout:
    cdef qsp_grid grid
    cdef readonly tuple numbers
    cdef readonly tuple views
    cdef readonly tuple image
    cdef readonly int64_t channels
    cdef readonly bint complete
    cdef int64_t count  # of views
    cdef int64_t reach  # lanes from an offset to behind the last unit of any view
    cdef bytes _views
    cdef bytes _pixels

    cdef int64_t _read_grid(self) except -1
    cdef int64_t _read_views(self) except -1
    cdef int64_t _check_images(self, int64_t images) except -1
    cdef int64_t blocks(self, int64_t images) noexcept nogil
    cdef int64_t lane_count(self, int64_t images) noexcept nogil
    cdef int64_t check_shape(self, const int64_t *shape, str name) except -1
    cdef bytes place(self, int64_t images, const int64_t *stride)
    cdef int64_t whole_view(self, qsp_view *view) except -1


cdef class ValuePattern:
    cdef const int32_t *ptr
    # how columns are held; without any of them every row has all
    cdef const uint16_t *column
    cdef const int32_t *wide
    cdef const uint64_t *bits
    cdef readonly int64_t rows
    cdef readonly int64_t columns
    cdef readonly int64_t count
    cdef readonly tuple held
    cdef object _room
    cdef object _other  # a weak reference to the form that is not held, while somebody uses it

    cdef object _take_columns(self, object given, bint held)
    cdef object _take_bits(self, object given, bint held)
    cdef int64_t _check_columns(self, object given, uint16_t *out, uint64_t *bits) except -1
    cdef object columns_for_lists(self)
    cdef object bits_for_rows(self)
    cdef int64_t check_layouts(self, int64_t groups, tuple phase, tuple shift, PlaneLayout x, PlaneLayout y) except -1


cdef class ProductRows:
    cdef int32_t last_offset
    cdef readonly int64_t rows
    cdef readonly int64_t slots
    cdef readonly PlaneLayout source
    cdef readonly PlaneLayout target
    cdef object kept  # of `_kept`

    cdef int64_t _take_layouts(self, PlaneLayout source, PlaneLayout target, int64_t rows) except -1
    cdef int64_t _furthest(self) noexcept


cdef int64_t view_end(const qsp_grid *grid, const qsp_view *view, int64_t images) except -1
