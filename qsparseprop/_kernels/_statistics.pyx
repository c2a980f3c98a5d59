"""What the quantisers find out first: range and moments of a tensor of any strides, or of each of its channels."""

from cython.parallel cimport prange
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from qsparseprop._kernels._dispatch cimport (
    QSP_ABSMAX,
    QSP_AFFINE,
    QSP_DITHERED,
    QSP_F32,
    QSP_LUQ,
    QSP_MAGNITUDES,
    QSP_MOMENTS,
    QSP_NEED_ABSMAX,
    QSP_NEED_MAX,
    QSP_NEED_MIN,
    QSP_SAWB,
    QSP_STOCHASTIC,
    QSP_SUMS,
    QSP_SYMMETRIC,
    QSP_TOTALS,
    active_kernels,
    qsp_kernels,
    qsp_moments,
    qsp_range,
    qsp_scheme,
)
from qsparseprop._kernels._tensor cimport MOST_DIMS, read_strides, strided_pointer, strides_t

cdef enum:
    MAX_PARTS = 256
    # in place of what of moments is wanted
    NO_MOMENTS = -1
    # elements below which starting threads costs more than it gives
    SERIAL_ELEMENTS = 1 << 15
    PART_ROWS = 128

cdef extern from "loops/scale.h" nogil:
    int qsp_wants_moments(const qsp_scheme *)
    void qsp_add_moments(const void *, int64_t, int64_t, int64_t, qsp_range *, qsp_moments *)

#: Names of the schemes and their numbers in the kernels.
SCHEMES = {
    "absmax": QSP_ABSMAX,
    "symmetric": QSP_SYMMETRIC,
    "standard": QSP_AFFINE,
    "sawb": QSP_SAWB,
    "stochastic": QSP_STOCHASTIC,
    "dithered": QSP_DITHERED,
    "luq": QSP_LUQ,
}


cdef void read_scheme(str name, object options, int bits, bint around_zero, qsp_scheme *out) except *:
    """A scheme with its options: SAWB's two constants and whether it looks at nonzeros only, the step of the dither in
    standard deviations, the number of LUQ's powers of two. None are those that the field uses for 8 bits.
    """
    if name not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {name!r}")
    memset(out, 0, sizeof(out[0]))
    out.kind, out.bits, out.around_zero = SCHEMES[name], bits, around_zero
    out.c1, out.c2, out.step, out.levels = 31.76, 35.04, 1, 7
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if not options:
        return
    expected = {QSP_SAWB: 3, QSP_DITHERED: 1, QSP_LUQ: 1}.get(out.kind, 0)
    if len(options) != expected:
        raise ValueError(f"the scheme {name!r} has {expected} options, got {list(options)}")
    if out.kind == QSP_SAWB:
        out.c1, out.c2, out.nonzeros = options[0], options[1], options[2] != 0
    elif out.kind == QSP_DITHERED:
        out.step = options[0]
        if not 0 < out.step < INFINITY:
            raise ValueError(f"the step of the dither must be positive and finite, got {options[0]}")
    elif out.kind == QSP_LUQ:
        if options[0] not in (1, 2, 3, 4, 5, 6, 7):
            raise ValueError(f"luq must have 1 to 7 powers of two, got {options[0]}")
        out.levels = options[0]


cdef class Scheme:
    """How a tensor is quantised to 8 bits, checked once.

    Parameters
    ----------
    name : {"absmax", "symmetric", "standard", "sawb", "stochastic", "dithered", "luq"}
        "absmax" is "symmetric" (around 128), or unsigned (around 0) where no element is negative; so is "sawb".
    options : sequence of float
        None, or for "sawb" its two constants and whether (1 or 0) to look at nonzeros only, for "dithered" the step in
        standard deviations, for "luq" the number of powers of two.
    per_channel : bool
        One scale and zero point for each channel.

    Raises
    ------
    ValueError
        For another name, or options that do not go with it.
    """

    def __cinit__(self, str name not None, options=(), bint per_channel=False):
        self.name, self.options, self.per_channel = name, tuple(options), per_channel
        read_scheme(name, self.options, 8, False, &self.c)

    @property
    def random(self):
        """Whether it rounds at random, and wants a seed."""
        return self.c.kind in (QSP_STOCHASTIC, QSP_DITHERED, QSP_LUQ)

    def __eq__(self, other):
        if not isinstance(other, Scheme):
            return NotImplemented
        return (self.name, self.options, self.per_channel) == (other.name, other.options, other.per_channel)

    def __hash__(self):
        return hash((self.name, self.options, self.per_channel))

    def __repr__(self):
        return f"Scheme({self.name!r}, {self.options}, per_channel={self.per_channel})"

    def __reduce__(self):
        return Scheme, (self.name, self.options, self.per_channel)


cdef int64_t _count(const strides_t *x) noexcept:
    """Elements of a tensor."""
    cdef int64_t d, n = 1
    for d in range(x.dims):
        n *= x.size[d]
    return n


cdef int64_t _memory_order(const strides_t *x, int64_t without, int64_t *size, int64_t *stride) noexcept:
    """Dimensions of `x` but `without`, from the smallest stride on; those that follow each other without a gap as one.

    Returns how many, at least one. Dimensions that repeat the same elements are left out.
    """
    cdef int64_t order[MOST_DIMS]
    cdef int64_t dims = 0, kept = 0, d, i
    for d in range(x.dims):
        if x.size[d] > 1 and x.step[d] and d != without:
            i = kept
            while i and x.step[order[i - 1]] > x.step[d]:
                order[i] = order[i - 1]
                i -= 1
            order[i] = d
            kept += 1
    for i in range(kept):
        d = order[i]
        if dims and stride[dims - 1] * size[dims - 1] == x.step[d]:
            size[dims - 1] *= x.size[d]
        else:
            size[dims], stride[dims] = x.size[d], x.step[d]
            dims += 1
    if dims == 0:
        size[0], stride[0], dims = 1, 1, 1
    return dims


cdef void range_of(const strides_t *x, const void *data, int dtype, bint whole, qsp_range *out, int threads) except *:
    """Range of all elements of `x`, each read once, in the order of its memory."""
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t size[8]
    cdef int64_t stride[8]
    cdef int64_t dims, i, part, parts, outer, width = 4 if dtype == QSP_F32 else 2
    cdef qsp_range ranges[MAX_PARTS]
    dims = _memory_order(x, -1, size, stride)
    out.absmax, out.min, out.max = 0, INFINITY, -INFINITY
    outer = 1
    for i in range(1, dims):
        outer *= size[i]
    # one long run is cut into parts, many short ones are dealt out
    parts = 1 if size[0] * outer < SERIAL_ELEMENTS else min(<int64_t> MAX_PARTS, <int64_t> threads * 2)
    for part in range(parts):
        ranges[part].absmax, ranges[part].min, ranges[part].max = 0, INFINITY, -INFINITY
    for part in prange(parts, nogil=True, num_threads=threads, schedule="static", use_threads_if=parts > 1):
        _range_part(kernels, <const char *> data, dtype, whole, width, dims, size, stride, outer, part, parts,
                    &ranges[part])
    for part in range(parts):
        if not ranges[part].absmax <= out.absmax:
            out.absmax = ranges[part].absmax
            if out.absmax != out.absmax:
                return
        out.min, out.max = min(out.min, ranges[part].min), max(out.max, ranges[part].max)


cdef void _range_part(const qsp_kernels *kernels, const char *data, int dtype, bint whole, int64_t width, int64_t dims,
                      const int64_t *size, const int64_t *stride, int64_t outer, int64_t part, int64_t parts,
                      qsp_range *out) noexcept nogil:
    cdef int64_t first, last, i, rest, offset, d
    if outer == 1:
        first, last = size[0] * part // parts, size[0] * (part + 1) // parts
        kernels.range(data + width * first * stride[0], dtype, last - first, stride[0], whole, out)
        return
    for i in range(outer * part // parts, outer * (part + 1) // parts):
        rest, offset = i, 0
        for d in range(1, dims):
            offset += rest % size[d] * stride[d]
            rest //= size[d]
        kernels.range(data + width * offset, dtype, size[0], stride[0], whole, out)


ctypedef struct _channels:
    const char *data
    int64_t width  # of an element, in bytes
    int dtype
    int need  # of the range
    int what  # of the moments, or NO_MOMENTS
    int64_t dims
    int64_t size[9]
    int64_t stride[9]
    int64_t channel  # dimension of the channel, 0 where channels are neighbours in memory, -1 where there is one
    int64_t channels, outer, parts
    int64_t places  # of one statistic
    int64_t channel_size, state_size  # bytes for one channel (or those that are neighbours), for one part


cdef void _channels_part(const qsp_kernels *kernels, const _channels *a, int64_t part, char *states) noexcept nogil:
    cdef int64_t first = 0, last = a.size[0], begin = 0, end = a.outer, i, d, rest, place, offset, channel
    cdef char *state = states + part * a.state_size
    if a.outer == 1:
        first, last = a.size[0] * part // a.parts, a.size[0] * (part + 1) // a.parts
    else:
        begin, end = a.outer * part // a.parts, a.outer * (part + 1) // a.parts
    for i in range(begin, end):
        rest, offset, channel = i, first * a.stride[0], 0
        for d in range(1, a.dims):
            place = rest % a.size[d]
            rest //= a.size[d]
            offset += place * a.stride[d]
            if d == a.channel:
                channel = place
        if a.what != NO_MOMENTS:
            kernels.moments(a.data + a.width * offset, a.dtype, last - first, a.stride[0],
                            0 if a.channel else a.channels, a.what,
                            <double *> (state + a.channel_size * channel))
        else:
            kernels.range_channels(a.data + a.width * offset, a.dtype, last - first, a.stride[0],
                                   0 if a.channel else a.channels, a.need,
                                   <float *> (state + a.channel_size * channel))


cdef char *_channel_states(_channels *a, const strides_t *x, bint per_channel, int threads) except NULL:
    """Statistics of each channel (second dimension) of `x`, or of all of it, in one pass in the order of memory.

    Ranges do not depend on the order, moments do: their parts are as many on any number of threads. The result is to be
    freed.
    """
    cdef const qsp_kernels *kernels = active_kernels()
    cdef int64_t d, i, part, elements = _count(x)
    cdef const _channels *args = a
    cdef char *states
    a.width, a.channels = 4 if a.dtype == QSP_F32 else 2, x.size[1] if per_channel else 1
    a.dims = _memory_order(x, 1 if per_channel else -1, a.size, a.stride)
    a.places = (a.channels + 15) // 16 * 16
    if not per_channel:
        a.channel = -1
    elif x.step[1] == 1 and a.channels > 1:
        a.channel = 0
    else:  # the channel is a loop among those around the innermost one
        d = 1
        while d < a.dims and a.stride[d] < x.step[1]:
            d += 1
        for i in range(a.dims, d, -1):
            a.size[i], a.stride[i] = a.size[i - 1], a.stride[i - 1]
        a.size[d], a.stride[d], a.channel = a.channels, x.step[1], d
        a.dims += 1
        a.places = 16
    if a.what == NO_MOMENTS:
        a.channel_size = a.places * 3 * sizeof(float)
    else:
        a.channel_size = a.places * (sizeof(double) if a.what == QSP_TOTALS else QSP_MOMENTS)
    a.state_size = a.channel_size * (1 if a.channel == 0 else a.channels)
    a.outer = 1
    for i in range(1, a.dims):
        a.outer *= a.size[i]
    if a.what != NO_MOMENTS:
        # not more than pay for the sums of each channel that a part begins with and ends in
        a.parts = max(1, min(16, elements // max(<int64_t> SERIAL_ELEMENTS, PART_ROWS * a.channels)))
    else:
        a.parts = 1 if elements < SERIAL_ELEMENTS else min(threads, MAX_PARTS)
    states = <char *> calloc(a.parts, a.state_size)
    if states == NULL:
        raise MemoryError(f"the statistics of {a.channels} channels do not fit into memory")
    for part in prange(a.parts, nogil=True, num_threads=threads, schedule="static", use_threads_if=a.parts > 1):
        _channels_part(kernels, args, part, states)
    return states


cdef void channel_ranges(const strides_t *x, const void *data, int dtype, int need, qsp_range *out,
                         int threads) except *:
    """Range of each channel of `x`, zero taken in."""
    cdef _channels a
    cdef int64_t c, i, part, places
    cdef uint32_t bits, greatest
    cdef const float *state
    a.data, a.dtype, a.need, a.what = <const char *> data, dtype, need, NO_MOMENTS
    cdef char *states = _channel_states(&a, x, True, threads)
    places = 1 if a.channel == 0 else 16
    for c in range(a.channels):
        greatest = 0
        out[c].min = out[c].max = 0
        for part in range(a.parts):
            state = <const float *> (states + part * a.state_size) + (c if a.channel == 0 else 48 * c)
            for i in range(places):
                memcpy(&bits, state + i, sizeof(bits))
                greatest = max(greatest, bits)
                out[c].min = min(out[c].min, state[a.places + i])
                out[c].max = max(out[c].max, state[2 * a.places + i])
        memcpy(&out[c].absmax, &greatest, sizeof(greatest))
    free(states)


cdef void channel_moments(const strides_t *x, const void *data, int dtype, bint per_channel, int what,
                          qsp_range *ranges, qsp_moments *moments, int threads) except *:
    """Moments and ranges (zero taken in, without the maxima) of `x` or of its channels."""
    cdef _channels a
    cdef int64_t c, part, first
    a.data, a.dtype, a.what = <const char *> data, dtype, what
    cdef char *states = _channel_states(&a, x, per_channel, threads)
    # what an expanded tensor repeats is counted once, which leaves all means as they are
    cdef double count = a.size[0] * a.outer / (a.channels if a.channel > 0 else 1)
    cdef double *state
    for c in range(a.channels):
        moments[c].count = count
    for part in range(a.parts):
        for c in range(a.channels):
            state = <double *> (states + part * a.state_size + (0 if a.channel == 0 else c * a.channel_size))
            first = c if a.channel == 0 else 0
            qsp_add_moments(state, a.places, first, first + (1 if a.channel == 0 else 16), &ranges[c], &moments[c])
    free(states)


cdef void channel_totals(const strides_t *x, const void *data, int dtype, float *out, int threads) except *:
    """Sums of the channels of `x`, added up in double, the same on any number of threads."""
    cdef _channels a
    cdef int64_t c, i, part, places
    cdef double total, repeats
    cdef const double *state
    a.data, a.dtype, a.what = <const char *> data, dtype, QSP_TOTALS
    cdef char *states = _channel_states(&a, x, True, threads)
    # an expanded tensor repeats what was added once
    repeats = _count(x) // (a.size[0] * a.outer * (a.channels if a.channel == 0 else 1))
    places = 1 if a.channel == 0 else 16
    for c in range(a.channels):
        total = 0
        for part in range(a.parts):
            state = <const double *> (states + part * a.state_size + (0 if a.channel == 0 else c * a.channel_size))
            for i in range(places):
                total += state[c + i if a.channel == 0 else i]
        out[c] = <float> (total * repeats)
    free(states)


def tensor_range(x, int threads):
    """Largest magnitude, minimum and maximum of a float32 or bfloat16 tensor of any strides.

    The magnitude is NaN where any element is; minimum and maximum then mean nothing.
    """
    cdef int dtype
    cdef qsp_range r
    cdef strides_t where
    cdef const void *data = strided_pointer(x, &dtype, "x")
    if x.numel() == 0:
        return 0.0, 0.0, 0.0
    read_strides(x, &where)
    range_of(&where, data, dtype, True, &r, max(threads, 1))
    return r.absmax, r.min, r.max


cdef void find_statistics(const strides_t *x, const void *data, int dtype, bint per_channel, const qsp_scheme *scheme,
                          qsp_range *ranges, qsp_moments *moments, int threads) except *:
    """What a scheme wants to know of a tensor, or of each channel (second dimension)."""
    cdef int64_t channels = x.size[1] if per_channel else 1
    cdef int need = QSP_NEED_ABSMAX
    if scheme.kind == QSP_AFFINE:
        need = QSP_NEED_MAX
    elif scheme.kind == QSP_ABSMAX:
        need = QSP_NEED_MIN
    memset(ranges, 0, channels * sizeof(qsp_range))
    memset(moments, 0, channels * sizeof(qsp_moments))
    if _count(x) == 0:
        return
    if qsp_wants_moments(scheme):
        channel_moments(x, data, dtype, per_channel,
                        QSP_MAGNITUDES if scheme.kind == QSP_SAWB else QSP_SUMS, ranges, moments, threads)
    elif per_channel:
        channel_ranges(x, data, dtype, need, ranges, threads)
    else:
        range_of(x, data, dtype, need == QSP_NEED_MAX, ranges, threads)
