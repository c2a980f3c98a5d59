"""Matrices turned over: rows of channels into planes of pixels and back, image by image.

Nothing is computed, so that this needs no instruction set of its own.
"""

import torch

from cython.parallel cimport prange
from libc.stdint cimport int64_t

from qsparseprop._kernels._rows cimport team
from qsparseprop._kernels._tensor cimport pointer

cdef extern from *:
    """
    /* Tiles of 16 x 16 in a place of their own: a line of memory is read whole and written whole, since those below
       each other may share a set of the cache. */
    #define QSP_TILE 16
    #define QSP_TRANSPOSE(name, type)                                                                                \\
        static void name(const void *from, int64_t rows, int64_t columns, void *to, int64_t first, int64_t last)     \\
        {                                                                                                            \\
            type tile[QSP_TILE][QSP_TILE];                                                                           \\
            for (int64_t r = first; r < last; r += QSP_TILE) {                                                       \\
                const int64_t height = last - r < QSP_TILE ? last - r : QSP_TILE;                                    \\
                for (int64_t c = 0; c < columns; c += QSP_TILE) {                                                    \\
                    const int64_t width = columns - c < QSP_TILE ? columns - c : QSP_TILE;                           \\
                    const type *x = (const type *)from + r * columns + c;                                            \\
                    type *y = (type *)to + c * rows + r;                                                             \\
                    if (height == QSP_TILE && width == QSP_TILE) {                                                   \\
                        for (int64_t j = 0; j < QSP_TILE; j++)                                                       \\
                            for (int64_t i = 0; i < QSP_TILE; i++)                                                   \\
                                tile[i][j] = x[j * columns + i];                                                     \\
                        for (int64_t i = 0; i < QSP_TILE; i++)                                                       \\
                            for (int64_t j = 0; j < QSP_TILE; j++)                                                   \\
                                y[i * rows + j] = tile[i][j];                                                        \\
                    } else {                                                                                         \\
                        for (int64_t i = 0; i < width; i++)                                                          \\
                            for (int64_t j = 0; j < height; j++)                                                     \\
                                y[i * rows + j] = x[j * columns + i];                                                \\
                    }                                                                                                \\
                }                                                                                                    \\
            }                                                                                                        \\
        }
    QSP_TRANSPOSE(qsp_transpose_32, uint32_t)
    QSP_TRANSPOSE(qsp_transpose_16, uint16_t)
    """
    enum:
        QSP_TILE
    void qsp_transpose_32(const void *, int64_t, int64_t, void *, int64_t, int64_t) noexcept nogil
    void qsp_transpose_16(const void *, int64_t, int64_t, void *, int64_t, int64_t) noexcept nogil

cdef object _float32 = torch.float32
cdef object _bfloat16 = torch.bfloat16

cdef enum:
    TASK_ROWS = 256  # a multiple of the tile


def transpose(x, out, int64_t images, int64_t rows, int64_t columns, int threads):
    """out[image, column, row] = x[image, row, column].

    Both are contiguous, of `images` * `rows` * `columns` elements of float32 or bfloat16, in whatever shape, and do not
    overlap.
    """
    dtype = _float32 if x.dtype is _float32 else _bfloat16
    if images < 0 or rows < 0 or columns < 0 or images * rows * columns != x.numel() or out.numel() != x.numel():
        raise ValueError(f"{images} matrices of {rows} x {columns} are not x with {x.numel()} and out with "
                         f"{out.numel()} elements")
    cdef int64_t size = x.numel(), each = rows * columns, task, tasks, image, first
    cdef int64_t width = 4 if dtype is _float32 else 2
    if size == 0:
        return
    cdef const char *source = <const char *> pointer(x, dtype, size, "x")
    cdef char *target = <char *> pointer(out, dtype, size, "out")
    tasks = (rows + TASK_ROWS - 1) // TASK_ROWS
    threads = team(threads, size)
    for task in prange(images * tasks, nogil=True, num_threads=threads, schedule="static", use_threads_if=threads > 1):
        image, first = task // tasks * each * width, task % tasks * TASK_ROWS
        if width == 4:
            qsp_transpose_32(source + image, rows, columns, target + image, first, min(rows, first + TASK_ROWS))
        else:
            qsp_transpose_16(source + image, rows, columns, target + image, first, min(rows, first + TASK_ROWS))
