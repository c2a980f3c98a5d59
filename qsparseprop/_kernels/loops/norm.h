/* Moments of channels, for batch normalisation, on tensors whose channels are neighbours in memory. Sums over rows are
 * taken chunk by chunk, the same ones at every thread count. */

enum {
    NORM_BLOCK = 4,   /* vectors of channels that are summed up at a time */
    NORM_AHEAD = 16,  /* rows that are fetched before */
    NORM_ROWS = 256,  /* whose sums are added up in a row: each addition may lose half of a last digit */
    NORM_SAMPLE = 16, /* rows, all over the chunk, whose mean the centre is */
};

/* About the mean of 16 channels (the last of `tail`): of equal elements exactly that. */
QSP_INLINE f32x16 norm_centre(const void *x, const int dtype, int64_t rows, int64_t channels, int64_t at, const int tail)
{
    f32x16 v[NORM_SAMPLE];
    for (int64_t r = 0; r < NORM_SAMPLE; r++)
        v[r] = row_load(x, dtype, r * rows / NORM_SAMPLE * channels + at, tail);
    for (int n = NORM_SAMPLE / 2; n; n /= 2)
        for (int r = 0; r < n; r++)
            v[r] = f32x16_add(v[r], v[r + n]);
    return f32x16_mul(v[0], f32x16_set1(1.0f / NORM_SAMPLE));
}

typedef struct {
    f32x16 centre, sum, far, low, high;
} norm_x16;

/* What has been summed up of `vectors` times 16 channels (the last of `tail`): out[channel] = mean, squared distances,
 * least, greatest. */
QSP_INLINE void norm_finish(const norm_x16 *m, int64_t rows, const int vectors, const int tail, double *out)
{
    QSP_ALIGNED(64) float line[5][16];
    for (int i = 0; i < vectors; i++) {
        f32x16_store(line[0], m[i].sum);
        f32x16_store(line[1], m[i].far);
        f32x16_store(line[2], m[i].low);
        f32x16_store(line[3], m[i].high);
        f32x16_store(line[4], m[i].centre);
        for (int j = 0; j < tail; j++) {
            double *to = out + 4 * (16 * i + j);
            const double off = (double)line[0][j] / (double)rows;
            const double squares = (double)line[1][j] - (double)rows * off * off;
            to[0] = off + (double)line[4][j];
            to[1] = squares < 0 ? 0 : squares;
            to[2] = line[2][j];
            to[3] = line[3][j];
        }
    }
}

/* One look at every element, since a chunk is more than the first cache: sums of distances from a centre lose no digits
 * where the mean is large. */
QSP_INLINE void norm_moments_block(const void *x, const int dtype, int64_t rows, int64_t channels, int64_t channel,
                                   const int vectors, const int tail, double *out)
{
    norm_x16 m[NORM_BLOCK];
    f32x16 sum[NORM_BLOCK], far[NORM_BLOCK];
    const int64_t ahead = channels > 16 * vectors ? NORM_AHEAD * channels : 0; /* otherwise they lie side by side */
    QSP_UNROLL
    for (int i = 0; i < vectors; i++) {
        m[i].centre = norm_centre(x, dtype, rows, channels, channel + 16 * i, tail);
        m[i].sum = m[i].far = f32x16_zero();
        m[i].low = f32x16_set1(INFINITY);
        m[i].high = f32x16_set1(-INFINITY);
    }
    for (int64_t begin = 0; begin < rows; begin += NORM_ROWS) {
        const int64_t end = qsp_min(rows, begin + NORM_ROWS);
        QSP_UNROLL
        for (int i = 0; i < vectors; i++)
            sum[i] = far[i] = f32x16_zero();
        for (int64_t r = begin; r < end; r++) {
            QSP_UNROLL
            for (int i = 0; i < vectors; i++) {
                const int64_t at = r * channels + channel + 16 * i;
                const f32x16 v = row_load(x, dtype, at, tail), d = f32x16_sub(v, m[i].centre);
                QSP_PREFETCH_READ((const char *)x + (dtype == QSP_F32 ? 4 : 2) * (at + ahead));
                sum[i] = f32x16_add(sum[i], d);
                far[i] = f32x16_add(far[i], f32x16_mul(d, d));
                m[i].low = f32x16_min(m[i].low, v);
                m[i].high = f32x16_max(m[i].high, v);
            }
        }
        QSP_UNROLL
        for (int i = 0; i < vectors; i++) {
            m[i].sum = f32x16_add(m[i].sum, sum[i]);
            m[i].far = f32x16_add(m[i].far, far[i]);
        }
    }
    norm_finish(m, rows, vectors, tail, out + 4 * channel);
}

QSP_INLINE void norm_moments_of(const void *x, const int dtype, int64_t rows, int64_t channels, double *out)
{
    int64_t c = 0;
    for (; c + 16 * NORM_BLOCK <= channels; c += 16 * NORM_BLOCK)
        norm_moments_block(x, dtype, rows, channels, c, NORM_BLOCK, 16, out);
    for (; c + 16 <= channels; c += 16)
        norm_moments_block(x, dtype, rows, channels, c, 1, 16, out);
    if (c < channels)
        norm_moments_block(x, dtype, rows, channels, c, 1, (int)(channels - c), out);
}

static void norm_moments_kernel(const void *x, int dtype, int64_t rows, int64_t channels, double *out)
{
    if (dtype == QSP_F32)
        norm_moments_of(x, QSP_F32, rows, channels, out);
    else
        norm_moments_of(x, QSP_BF16, rows, channels, out);
}
