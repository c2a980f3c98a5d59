"""New tensors for results, and for what is needed meanwhile: see ``_memory.pyx``."""

cdef enum:
    LARGE = 1 << 21  # bytes: a huge page
