/* Moments of channels, for batch normalisation, on tensors whose channels are neighbours in memory. Sums over rows are
 * taken chunk by chunk, the same ones at every thread count. */

enum { NORM_BLOCK = 4 }; /* vectors of channels that are summed up at a time */

/* Of `vectors` times 16 channels (the last of `tail`): out[channel] = mean, squared distances, least, greatest. */
QSP_INLINE void norm_moments_block(const void *x, const int dtype, int64_t rows, int64_t channels, int64_t channel,
                                   const int vectors, const int tail, double *out)
{
    QSP_ALIGNED(64) float line[4][16];
    f32x16 sum[NORM_BLOCK], low[NORM_BLOCK], high[NORM_BLOCK], minus[NORM_BLOCK], far[NORM_BLOCK];
    QSP_UNROLL
    for (int i = 0; i < vectors; i++) {
        sum[i] = far[i] = f32x16_zero();
        low[i] = f32x16_set1(INFINITY);
        high[i] = f32x16_set1(-INFINITY);
    }
    for (int64_t r = 0; r < rows; r++) {
        QSP_UNROLL
        for (int i = 0; i < vectors; i++) {
            const f32x16 v = row_load(x, dtype, r * channels + channel + 16 * i, tail);
            sum[i] = f32x16_add(sum[i], v);
            low[i] = f32x16_min(low[i], v);
            high[i] = f32x16_max(high[i], v);
        }
    }
    QSP_UNROLL
    for (int i = 0; i < vectors; i++) {
        minus[i] = f32x16_mul(sum[i], f32x16_set1(-1.0f / (float)rows));
        sum[i] = f32x16_zero();
    }
    for (int64_t r = 0; r < rows; r++) { /* sums of distances from about the chunk's mean lose no digits */
        QSP_UNROLL
        for (int i = 0; i < vectors; i++) {
            const f32x16 d = f32x16_add(row_load(x, dtype, r * channels + channel + 16 * i, tail), minus[i]);
            sum[i] = f32x16_add(sum[i], d);
            far[i] = f32x16_add(far[i], f32x16_mul(d, d));
        }
    }
    for (int i = 0; i < vectors; i++) {
        f32x16_store(line[0], sum[i]);
        f32x16_store(line[1], far[i]);
        f32x16_store(line[2], low[i]);
        f32x16_store(line[3], high[i]);
        QSP_ALIGNED(64) float centre[16];
        f32x16_store(centre, minus[i]);
        for (int j = 0; j < tail; j++) {
            double *to = out + 4 * (channel + 16 * i + j);
            const double off = (double)line[0][j] / (double)rows;
            const double squares = (double)line[1][j] - (double)rows * off * off;
            to[0] = off - (double)centre[j];
            to[1] = squares < 0 ? 0 : squares;
            to[2] = line[2][j];
            to[3] = line[3][j];
        }
    }
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
