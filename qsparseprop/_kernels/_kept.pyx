"""Products that keep the codes of a weight while it and the scales in them stay the same, and find out by themselves.

What counts is what a weight holds: many write to `data` or through NumPy, and no version counts that. So a digest of
all values is compared before codes are used again, which takes a tenth of the time of quantising them. Versions only
save the digest, and the memory, where a weight is multiplied with once and then stepped.
"""

import torch

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.parallel cimport prange
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from qsparseprop._kernels._dispatch cimport QSP_DIGEST, active_kernels, qsp_kernels
from qsparseprop._kernels._dense_rows cimport DenseRows
from qsparseprop._kernels._gather_list cimport PatternList
from qsparseprop._kernels._memory cimport LARGE
from qsparseprop._kernels._plan cimport ProductRows, ValuePattern
from qsparseprop._kernels._tensor cimport numel, pointer, tensor_version

from qsparseprop._kernels._matmul import quantized_spmm, spmm
from qsparseprop._kernels._memory import empty
from qsparseprop._kernels._weights import quantize_weight

cdef enum:
    # lanes of a product from which quantising a weight is a small part of it
    MANY_LANES = 1 << 9
    # sixteens of values that one thread takes at a time
    DIGEST_PART = 1 << 13
    MOST_PARTS = 64

cdef object _float32 = torch.float32
cdef object _int32 = torch.int32
cdef object _int8 = torch.int8
cdef object _int64 = torch.int64
cdef object _empty = torch.empty
cdef object _cpu = torch.device("cpu")


ctypedef struct weight_t:
    # what a product is given: values, and scales and zero points where they go into the codes
    const void *values
    const void *scale
    const void *zero_point
    int64_t size, version, folded
    float clip


cdef class Codes:
    """The codes of a weight, and what they were made of; never changed, so that threads may share them."""
    cdef tuple parts  # slots, scale, total: see quantize_weight
    cdef bytes digest
    cdef bytes folded
    cdef int64_t size
    cdef float clip


cdef class History:
    """What rows were multiplied with last, and the codes if these are kept."""
    cdef const void *values
    cdef int64_t size, version
    cdef bytes folded
    cdef float clip
    cdef int64_t repeated  # times that the last weight came again
    cdef int64_t patience  # how often it must before its codes are kept
    cdef bint used         # whether the codes have been used
    cdef Codes codes

    def __cinit__(self):
        self.patience, self.folded = 1, b""

    cdef int64_t begin(self, const weight_t *w, bytes folded) except -1:
        """Another weight, or other scales: the guess is that it comes again if the one before did."""
        self.patience = 0 if self.repeated > 0 else 1
        self.values, self.size, self.version, self.clip, self.folded = w.values, w.size, w.version, w.clip, folded
        self.repeated, self.codes = 0, None
        return 0

    cdef int64_t deceived(self) except -1:
        """The weight has changed without its version. Where codes were kept for nothing, the next ones wait longer."""
        self.patience = 1 if self.used else max(1, 2 * self.patience)
        self.repeated, self.codes = 0, None
        return 0


cdef bytes digest_of(const void *values, int64_t size, int threads):
    """Sums that tell whether so many words of 32 bits have changed."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef uint64_t sums[MOST_PARTS * QSP_DIGEST]
    cdef uint64_t *each = sums
    cdef int64_t sixteens = (size + 15) // 16, part, i
    cdef int64_t parts = 1 if threads == 1 else max(1, min(<int64_t> MOST_PARTS, sixteens // DIGEST_PART))
    for part in prange(parts, nogil=True, num_threads=threads, schedule="static", use_threads_if=parts > 1):
        kernels.digest(values, size, sixteens * part // parts, sixteens * (part + 1) // parts, each + part * QSP_DIGEST)
    for part in range(1, parts):
        for i in range(QSP_DIGEST):
            sums[i] += sums[part * QSP_DIGEST + i]
    return PyBytes_FromStringAndSize(<const char *> each, QSP_DIGEST * sizeof(uint64_t))


def digest(values, int threads):
    """The digest of float32 values, as bytes."""
    cdef int64_t size = numel(values)
    return digest_of(pointer(values, _float32, size, "values") if size else NULL, size, max(threads, 1))


def kept_bytes(ProductRows rows not None):
    """Bytes of the codes that are kept for rows."""
    cdef History history = <History> rows.kept
    codes = None if history is None else history.codes
    return 0 if codes is None else sum([part.nbytes for part in (<Codes> codes).parts])


cdef bytes _together(const void *scale, const void *zero_point, int64_t size):
    cdef bytes folded = PyBytes_FromStringAndSize(NULL, 8 * size)
    cdef char *to = PyBytes_AS_STRING(folded)
    if size:
        memcpy(to, scale, 4 * size)
        memcpy(to + 4 * size, zero_point, 4 * size)
    return folded


cdef bint _are_alike(const weight_t *w, int64_t size, float clip, bytes folded):
    """Whether a weight has so many values, that clip, and those scales and zero points in its codes."""
    cdef const char *held = PyBytes_AS_STRING(folded)
    cdef int64_t n = w.folded
    if w.size != size or w.clip != clip or len(folded) != 8 * n:
        return False
    return n == 0 or (memcmp(held, w.scale, 4 * n) == 0 and memcmp(held + 4 * n, w.zero_point, 4 * n) == 0)


cdef Codes _made_codes(const weight_t *w, object values, ProductRows rows, object scale, object zero_point, object clip,
                       int threads):
    """Codes of a weight, to be kept; None in place of their digest if it has changed meanwhile."""
    cdef Codes codes = Codes.__new__(Codes)
    before = digest_of(w.values, w.size, threads)
    codes.size, codes.clip, codes.folded = w.size, w.clip, _together(w.scale, w.zero_point, w.folded)
    codes.parts = (empty((rows.slots,), _int8), _empty(rows.rows, dtype=_float32, device=_cpu),
                   _empty(rows.rows, dtype=_int64, device=_cpu))
    quantize_weight(values, rows, scale if w.folded else None, zero_point if w.folded else None, clip, *codes.parts,
                    threads)
    codes.digest = before if digest_of(w.values, w.size, threads) == before else None
    return codes


cdef bint _may_keep(ProductRows rows, bint trained):
    """Whether codes may lie beside a weight: where it is trained, only if it takes no more than a dense one with them.

    That is a value and its gradient for each entry, here for each that is there, beside the pattern and codes of both
    directions. Of small weights nobody counts them.
    """
    cdef ValuePattern pattern
    if not trained or rows.slots < LARGE:
        return True
    if isinstance(rows, DenseRows):
        pattern = (<DenseRows> rows).pattern
    elif isinstance(rows, PatternList):
        pattern = (<PatternList> rows).pattern
    else:
        return True
    return 8 * pattern.count + pattern.nbytes + rows.nbytes + 2 * rows.slots <= 8 * pattern.rows * pattern.columns


cdef Codes _codes_of(object values, ProductRows rows, object scale, object zero_point, object clip, int threads):
    """The codes of a weight if they are kept; None otherwise."""
    cdef History history
    cdef Codes codes
    cdef weight_t w
    memset(&w, 0, sizeof(w))
    w.size, w.folded = numel(values), numel(scale)
    w.values = pointer(values, _float32, w.size, "values")
    if w.folded > 1:  # scales of planes are in the codes
        w.scale = pointer(scale, _float32, w.folded, "scale")
        w.zero_point = pointer(zero_point, _int32, w.folded, "zero_point")
    else:
        w.folded = 0
    if clip is not None:
        w.clip = (<const float *> pointer(clip, _float32, 1, "clip"))[0]
    w.version = tensor_version(values)
    if rows.kept is None:
        rows.kept = History.__new__(History)
    history = <History> rows.kept
    if (history.values == w.values and history.version == w.version
            and _are_alike(&w, history.size, history.clip, history.folded)):
        history.repeated += 1
    else:
        history.begin(&w, _together(w.scale, w.zero_point, w.folded))
    codes = history.codes
    if codes is not None:
        # alike, since of threads that share the rows another one may have kept them
        if _are_alike(&w, codes.size, codes.clip, codes.folded) and (
                codes.digest == digest_of(w.values, w.size, threads)):
            history.used = True
            return codes
        history.deceived()
    if history.repeated < history.patience:
        return None
    codes = _made_codes(&w, values, rows, scale, zero_point, clip, threads)
    if codes.digest is not None:
        history.codes, history.used = codes, False
    return codes


cpdef int64_t multiply(object values, ProductRows rows, object scale, object zero_point, object clip, object planes,
                       object bias, object out, int threads, bint trained=True,
                       float least=-INFINITY, float greatest=INFINITY) except -1:
    """`quantized_spmm` of floats of any width, which keeps the codes of the weight where it comes again and again.

    `trained` says that the weight has a gradient, or may have, see `_may_keep`.
    """
    cdef Codes codes = None
    cdef bint may_keep = _may_keep(rows, trained)
    threads = max(threads, 1)
    if not may_keep:
        rows.kept = None  # also what was kept before the weight was trained
    if bias is not None and bias.dtype is not _float32:
        bias = bias.to(_float32)
    if values.dtype is not _float32:
        values = values.to(_float32)  # which is another one each time
    elif (may_keep and zero_point is not None and numel(planes) <= MANY_LANES * rows.source.grid.planes
            and numel(values) > 0 and numel(zero_point) == numel(scale)):
        codes = _codes_of(values, rows, scale, zero_point, clip, threads)
    if codes is None:
        quantized_spmm(values, rows, scale, zero_point, clip, planes, bias, out, threads, least, greatest)
    elif len(codes.folded):
        spmm(planes, *codes.parts, None, None, rows, bias, out, threads, least, greatest)
    else:
        spmm(planes, *codes.parts, scale, zero_point, rows, bias, out, threads, least, greatest)
    return 0
