"""How passes over rows of channels are dealt out."""

from libc.stdint cimport int64_t

cdef enum:
    # elements below which starting threads costs more than it gives
    SERIAL_ELEMENTS = 1 << 15
    # elements of a chunk of rows: summed up in single precision, and read twice from the second cache
    CHUNK_ELEMENTS = 1 << 16
    CHUNK_ROWS = 1 << 12
    # rows of a chunk that is read once: what is found of a chunk must be little beside it
    REDUCED_ROWS = 1 << 8


cdef inline int64_t chunk_rows(int64_t channels) noexcept:
    return max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // max(channels, 1)))


cdef inline int64_t reduced_rows(int64_t channels) noexcept:
    return max(REDUCED_ROWS, chunk_rows(channels))


cdef inline int team(int threads, int64_t elements) noexcept:
    return threads if threads > 1 and elements > SERIAL_ELEMENTS else 1
