"""Checked access to the memory of a tensor.

A typed memoryview of a tensor costs about a microsecond (NumPy array, buffer request) and does not exist for bfloat16;
a layer's forward and backward pass would spend some forty of them. So the kernels take the tensor, check its type,
dtype, device, contiguity and size here, and read its pointer.
"""

from libc.stdint cimport int64_t, uintptr_t

from qsparseprop._kernels._dispatch cimport QSP_BF16, QSP_F32


cdef enum:
    MOST_DIMS = 8

ctypedef struct strides_t:
    # shape and strides of a tensor
    int64_t dims
    int64_t size[MOST_DIMS]
    int64_t step[MOST_DIMS]


cdef extern from "memory.h" nogil:
    void qsp_prefer_huge_pages(void *start, int64_t size)


cdef void *pointer(object tensor, object dtype, int64_t size, str name) except? NULL
cdef void *optional_pointer(object tensor, object dtype, int64_t size, str name) except? NULL
cdef void *strided_pointer(object tensor, int *dtype, str name) except? NULL
cdef void *image_pointer(object tensor, strides_t *where, int *dtype, str name) except? NULL
cdef int64_t read_strides(object tensor, strides_t *where) except -1
cdef void *exact_pointer(object tensor, object dtype, int64_t size, str name) except? NULL
cdef void *matrix(object x, int *dtype, int64_t *rows, int64_t *channels, str name) except? NULL
cdef void *matrix_of(void *data, object x, int64_t *rows, int64_t *channels, str name) except? NULL
cdef void *same_matrix(object x, object like, str name) except? NULL
cdef int64_t numel(object tensor) except -1
cpdef int64_t tensor_version(object tensor) except -1
