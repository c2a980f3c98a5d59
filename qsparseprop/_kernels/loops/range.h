/* Ranges and moments of tensors: of all elements together, or of each channel. */

typedef struct {
    u32x16 bits;
    f32x16 low, high;
} range_x16;

QSP_INLINE void range_step(range_x16 *r, f32x16 v, const int whole)
{
    r->bits = u32x16_max_abs(r->bits, v);
    r->low = f32x16_min(r->low, v);
    if (whole)
        r->high = f32x16_max(r->high, v);
}

/* Range of n elements: the absolute maximum over bit patterns, so that a NaN anywhere is the result. The maximum
 * follows from it where no element is negative, and is looked for only where `whole` says so. */
QSP_INLINE void range_of(const void *x, const int dtype, int64_t n, int64_t step, qsp_range *out, const int whole)
{
    enum { SIDE_BY_SIDE = 4 };
    range_x16 r[SIDE_BY_SIDE];
    for (int i = 0; i < SIDE_BY_SIDE; i++) {
        r[i].bits = u32x16_zero();
        r[i].low = f32x16_set1(out->min);
        r[i].high = f32x16_set1(out->max);
    }
    int64_t k = 0;
    for (; step == 1 && k + 16 * SIDE_BY_SIDE <= n; k += 16 * SIDE_BY_SIDE) {
        QSP_UNROLL
        for (int i = 0; i < SIDE_BY_SIDE; i++)
            range_step(&r[i], load_elements(x, dtype, k + 16 * i), whole);
    }
    for (; k < n; k += 16) {
        const int m = (int)qsp_min(16, n - k);
        QSP_ALIGNED(64) float line[16];
        f32x16_store(line, load_elements_n(x, dtype, k * step, step, m));
        for (int i = m; i < 16; i++) /* not zeros, which may lie outside of the range */
            line[i] = line[0];
        range_step(&r[0], f32x16_load(line), whole);
    }
    for (int i = 0; i < SIDE_BY_SIDE; i++) {
        const uint32_t greatest = u32x16_reduce_max(r[i].bits);
        float absmax;
        memcpy(&absmax, &greatest, 4);
        if (!(absmax <= out->absmax) && out->absmax == out->absmax)
            out->absmax = absmax;
        const float least = f32x16_reduce_min(r[i].low), most = f32x16_reduce_max(r[i].high);
        out->min = least < out->min ? least : out->min;
        out->max = most > out->max ? most : out->max;
    }
}

static void range_kernel(const void *x, int dtype, int64_t n, int64_t step, int whole, qsp_range *out)
{
    if (n <= 0)
        return;
    if (dtype == QSP_BF16)
        range_of(x, QSP_BF16, n, step, out, 1);
    else if (whole)
        range_of(x, QSP_F32, n, step, out, 1);
    else
        range_of(x, QSP_F32, n, step, out, 0);
}

/* Range of every channel, zero taken in (which no scheme minds): state[channel][0 .. 2] are sixteen largest
 * magnitudes, minima and maxima each, or where channels are neighbours in memory one of each for every channel. `need`
 * says which of the three are wanted. */
QSP_INLINE void state_step(float *state, int64_t stride, const f32x16 *v, const int n, const int need)
{
    u32x16 bits = u32x16_load_bits(state);
    for (int i = 0; i < n; i++)
        bits = u32x16_max_abs(bits, v[i]);
    u32x16_store_bits(state, bits);
    if (need >= QSP_NEED_MIN) {
        f32x16 low = f32x16_load(state + stride);
        for (int i = 0; i < n; i++)
            low = f32x16_min(low, v[i]);
        f32x16_store(state + stride, low);
    }
    if (need >= QSP_NEED_MAX) {
        f32x16 high = f32x16_load(state + 2 * stride);
        for (int i = 0; i < n; i++)
            high = f32x16_max(high, v[i]);
        f32x16_store(state + 2 * stride, high);
    }
}

enum { RANGE_ROWS = 4 };

/* n elements of one channel, `step` apart. */
QSP_INLINE void range_run(const void *x, const int dtype, int64_t n, int64_t step, float *state, const int need)
{
    f32x16 v[RANGE_ROWS];
    int64_t k = 0;
    for (; step == 1 && k + 16 * RANGE_ROWS <= n; k += 16 * RANGE_ROWS) {
        QSP_UNROLL
        for (int i = 0; i < RANGE_ROWS; i++)
            v[i] = load_elements(x, dtype, k + 16 * i);
        state_step(state, 16, v, RANGE_ROWS, need);
    }
    for (; k < n; k += 16) {
        v[0] = n - k >= 16 && step == 1 ? load_elements(x, dtype, k)
                                        : load_elements_n(x, dtype, k * step, step, (int)qsp_min(16, n - k));
        state_step(state, 16, v, 1, need);
    }
}

/* n rows, `step` apart, of `channels` neighbours; a few rows at a time, in the order of memory. */
QSP_INLINE void range_rows(const void *x, const int dtype, int64_t n, int64_t step, int64_t channels, float *state,
                           const int need)
{
    const int64_t stride = (channels + 15) / 16 * 16;
    for (int64_t row = 0; row < n; row += RANGE_ROWS)
        for (int64_t c = 0; c < channels; c += 16) {
            const int left = (int)qsp_min(16, channels - c);
            f32x16 v[RANGE_ROWS];
            QSP_UNROLL
            for (int i = 0; i < RANGE_ROWS; i++) { /* rows that do not exist repeat the last one */
                const int64_t at = qsp_min(row + i, n - 1) * step + c;
                v[i] = left == 16 ? load_elements(x, dtype, at) : load_elements_n(x, dtype, at, 1, left);
            }
            state_step(state + c, stride, v, RANGE_ROWS, need);
        }
}

QSP_INLINE void range_some(const void *x, const int dtype, int64_t n, int64_t step, int64_t channels, float *state,
                           const int need)
{
    if (channels)
        range_rows(x, dtype, n, step, channels, state, need);
    else
        range_run(x, dtype, n, step, state, need);
}

static void range_channels_kernel(const void *x, int dtype, int64_t n, int64_t step, int64_t channels, int need,
                                  float *state)
{
    if (dtype == QSP_BF16)
        range_some(x, QSP_BF16, n, step, channels, state, QSP_NEED_MAX);
    else if (need == QSP_NEED_ABSMAX)
        range_some(x, QSP_F32, n, step, channels, state, QSP_NEED_ABSMAX);
    else if (need == QSP_NEED_MIN)
        range_some(x, QSP_F32, n, step, channels, state, QSP_NEED_MIN);
    else
        range_some(x, QSP_F32, n, step, channels, state, QSP_NEED_MAX);
}

enum {
    MOMENTS_ROWS = 32, /* that are summed up before the sums go back to memory */
    MOMENTS_STRIP = 4, /* times sixteen channels of a row, neighbours in memory, that are added up together */
};

/* Moments and range of every channel in one pass: sums over the elements in double, sixteen side by side, in one order
 * of additions whatever the instruction set. Of MAGNITUDES zeros are left out of the count. */
typedef struct {
    f64x16 sum, square, nonzeros;
    u32x16 bits;
    f32x16 low;
} moments_x16;

/* Where the places of a channel are in a state: the sums, and the range behind all of those. */
typedef struct {
    double *sum;
    float *range;
} moments_at;

QSP_INLINE moments_at moments_of_channel(void *state, int64_t stride, int64_t channel)
{
    double *sums = state;
    void *behind = sums + 3 * stride;
    float *range = behind;
    const moments_at at = {sums + channel, range + channel};
    return at;
}

QSP_INLINE moments_x16 moments_load(void *state, int64_t stride, int64_t channel, const int what)
{
    const moments_at at = moments_of_channel(state, stride, channel);
    moments_x16 m;
    m.sum = f64x16_load(at.sum);
    if (what >= QSP_SUMS) {
        m.square = f64x16_load(at.sum + stride);
        m.bits = u32x16_load_bits(at.range);
    }
    if (what == QSP_MAGNITUDES) {
        m.nonzeros = f64x16_load(at.sum + 2 * stride);
        m.low = f32x16_load(at.range + stride);
    }
    return m;
}

QSP_INLINE void moments_store(void *state, int64_t stride, int64_t channel, const moments_x16 *m, const int what)
{
    const moments_at at = moments_of_channel(state, stride, channel);
    f64x16_store(at.sum, m->sum);
    if (what >= QSP_SUMS) {
        f64x16_store(at.sum + stride, m->square);
        u32x16_store_bits(at.range, m->bits);
    }
    if (what == QSP_MAGNITUDES) {
        f64x16_store(at.sum + 2 * stride, m->nonzeros);
        f32x16_store(at.range + stride, m->low);
    }
}

QSP_INLINE void moments_add(moments_x16 *m, f32x16 v, f64x16 wide, const int what)
{
    if (what >= QSP_SUMS) {
        m->bits = u32x16_max_abs(m->bits, v);
        m->square = f64x16_add_square(m->square, wide);
    }
    if (what == QSP_MAGNITUDES) {
        m->sum = f64x16_add(m->sum, f64x16_from_f32(f32x16_abs(v)));
        m->nonzeros = f64x16_add(m->nonzeros, f64x16_from_f32(f32x16_is_nonzero(v)));
        m->low = f32x16_min(m->low, v);
    } else
        m->sum = f64x16_add(m->sum, wide);
}
QSP_INLINE void moments_step(moments_x16 *m, const void *x, const int dtype, int64_t at, const int what)
{
    const f32x16 v = load_elements(x, dtype, at);
    moments_add(m, v, dtype == QSP_F32 ? f64x16_load_f32((const float *)x + at) : f64x16_from_f32(v), what);
}
QSP_INLINE void moments_rest(moments_x16 *m, const void *x, const int dtype, int64_t at, int64_t step, int64_t n,
                             const int what)
{
    const f32x16 v = load_elements_n(x, dtype, at, step, (int)qsp_min(16, n));
    moments_add(m, v, f64x16_from_f32(v), what);
}

/* `sixteens` times sixteen channels from c on of some rows, the first of which starts at element `at`. */
QSP_INLINE void moments_strip(const void *x, const int dtype, int64_t at, int64_t rows, int64_t step, int64_t c,
                              int64_t stride, const int sixteens, const int what, void *state)
{
    moments_x16 m[MOMENTS_STRIP];
    for (int v = 0; v < sixteens; v++)
        m[v] = moments_load(state, stride, c + 16 * v, what);
    for (int64_t i = 0; i < rows; i++) { /* not unrolled: the sums would not stay in registers */
        QSP_UNROLL
        for (int v = 0; v < sixteens; v++)
            moments_step(&m[v], x, dtype, at + i * step + c + 16 * v, what);
    }
    for (int v = 0; v < sixteens; v++)
        moments_store(state, stride, c + 16 * v, &m[v], what);
}

QSP_INLINE void moments_of(const void *x, const int dtype, int64_t n, int64_t step, int64_t channels, const int what,
                           void *state)
{
    if (channels == 0) {
        moments_x16 m = moments_load(state, 16, 0, what);
        int64_t k = 0;
        for (; step == 1 && k + 16 <= n; k += 16)
            moments_step(&m, x, dtype, k, what);
        for (; k < n; k += 16)
            moments_rest(&m, x, dtype, k * step, step, n - k, what);
        moments_store(state, 16, 0, &m, what);
        return;
    }
    const int64_t stride = (channels + 15) / 16 * 16;
    for (int64_t row = 0; row < n; row += MOMENTS_ROWS) {
        const int64_t rows = qsp_min(MOMENTS_ROWS, n - row), at = row * step;
        int64_t c = 0;
        for (; c + 16 * MOMENTS_STRIP <= channels; c += 16 * MOMENTS_STRIP)
            moments_strip(x, dtype, at, rows, step, c, stride, MOMENTS_STRIP, what, state);
        for (; c + 16 <= channels; c += 16)
            moments_strip(x, dtype, at, rows, step, c, stride, 1, what, state);
        if (c == channels)
            continue;
        moments_x16 m = moments_load(state, stride, c, what);
        for (int64_t i = 0; i < rows; i++)
            moments_rest(&m, x, dtype, at + i * step + c, 1, channels - c, what);
        moments_store(state, stride, c, &m, what);
    }
}

static void moments_kernel(const void *x, int dtype, int64_t n, int64_t step, int64_t channels, int what, void *state)
{
    if (what == QSP_MAGNITUDES)
        moments_of(x, dtype, n, step, channels, QSP_MAGNITUDES, state);
    else if (what == QSP_TOTALS && dtype == QSP_F32)
        moments_of(x, QSP_F32, n, step, channels, QSP_TOTALS, state);
    else if (what == QSP_TOTALS)
        moments_of(x, QSP_BF16, n, step, channels, QSP_TOTALS, state);
    else if (dtype == QSP_F32)
        moments_of(x, QSP_F32, n, step, channels, QSP_SUMS, state);
    else
        moments_of(x, QSP_BF16, n, step, channels, QSP_SUMS, state);
}

/* Least and greatest of n integers; a plain loop, which the compiler turns into vectors of the ISA. */
static void extent_kernel(const int32_t *v, int64_t n, int32_t *least, int32_t *most)
{
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        low = v[i] < low ? v[i] : low;
        high = v[i] > high ? v[i] : high;
    }
    *least = low;
    *most = high;
}
