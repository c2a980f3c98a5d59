/* Batch normalisation, activation and their gradients, on tensors whose channels are neighbours in memory: rows of
 * `channels` elements. Products and sums are rounded one after the other (no FMA) where codes depend on them, so that
 * all instruction sets agree. Sums over rows are taken chunk by chunk, the same ones at every thread count. */

enum { NORM_BLOCK = 4 }; /* vectors of channels that are summed up at a time */

/* Element k of a row and the following ones, at most 16, zeros behind the row's end. */
QSP_INLINE f16x row_load(const void *p, const int dtype, int64_t at, int n)
{
    return n == 16 ? load16(p, dtype, at) : load_n(p, dtype, at, 1, n);
}
QSP_INLINE void row_store(void *p, const int dtype, int64_t at, int n, f16x v)
{
    if (n == 16)
        store16(element_at(p, dtype, at), dtype, v);
    else
        store_n(element_at(p, dtype, at), dtype, v, n);
}
QSP_INLINE f16x params(const float *p, int64_t channel, int n)
{
    return n == 16 ? f16_load(p + channel) : f16_load_n(p + channel, n);
}

/* Of `vectors` times 16 channels (the last of `tail`): out[channel] = mean, squared distances, least, greatest. */
QSP_INLINE void norm_moments_block(const void *x, const int dtype, int64_t rows, int64_t channels, int64_t channel,
                              const int vectors, const int tail, double *out)
{
    QSP_ALIGNED(64) float line[4][16];
    f16x sum[NORM_BLOCK], low[NORM_BLOCK], high[NORM_BLOCK], minus[NORM_BLOCK], far[NORM_BLOCK];
    QSP_UNROLL
    for (int i = 0; i < vectors; i++) {
        sum[i] = far[i] = f16_zero();
        low[i] = f16_set1(INFINITY);
        high[i] = f16_set1(-INFINITY);
    }
    for (int64_t r = 0; r < rows; r++) {
        QSP_UNROLL
        for (int i = 0; i < vectors; i++) {
            const f16x v = row_load(x, dtype, r * channels + channel + 16 * i, tail);
            sum[i] = f16_add(sum[i], v);
            low[i] = f16_min(low[i], v);
            high[i] = f16_max(high[i], v);
        }
    }
    QSP_UNROLL
    for (int i = 0; i < vectors; i++) {
        minus[i] = f16_mul(sum[i], f16_set1(-1.0f / (float)rows));
        sum[i] = f16_zero();
    }
    for (int64_t r = 0; r < rows; r++) { /* sums of distances from about the chunk's mean lose no digits */
        QSP_UNROLL
        for (int i = 0; i < vectors; i++) {
            const f16x d = f16_add(row_load(x, dtype, r * channels + channel + 16 * i, tail), minus[i]);
            sum[i] = f16_add(sum[i], d);
            far[i] = f16_add(far[i], f16_mul(d, d));
        }
    }
    for (int i = 0; i < vectors; i++) {
        f16_store(line[0], sum[i]);
        f16_store(line[1], far[i]);
        f16_store(line[2], low[i]);
        f16_store(line[3], high[i]);
        QSP_ALIGNED(64) float centre[16];
        f16_store(centre, minus[i]);
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

static void norm_moments(const void *x, int dtype, int64_t rows, int64_t channels, double *out)
{
    if (dtype == QSP_F32)
        norm_moments_of(x, QSP_F32, rows, channels, out);
    else
        norm_moments_of(x, QSP_BF16, rows, channels, out);
}

/* Channels c .. c + n of a row: normalised, with the residual, before the activation. */
QSP_INLINE f16x norm_value(const qsp_norm *a, f16x v, int64_t row, int64_t c, const int n, const int dtype,
                           const int residual)
{
    const f16x y = f16_add(f16_mul(v, params(a->scale, c, n)), params(a->shift, c, n));
    return residual ? f16_add(y, row_load(a->residual, dtype, row * a->channels + c, n)) : y;
}

/* The activation; in this order a NaN stays one. */
QSP_INLINE f16x norm_limited(const qsp_norm *a, f16x y)
{
    return f16_min(f16_set1(a->high), f16_max(f16_set1(a->low), y));
}

/* The same after the activation, with what the backward pass needs saved. */
QSP_INLINE f16x norm_at(const qsp_norm *a, int64_t row, int64_t c, const int n, const int dtype, const int residual,
                        const int codes)
{
    const int64_t at = row * a->channels + c;
    const f16x v = row_load(a->x, dtype, at, n), before = norm_value(a, v, row, c, n, dtype, residual);
    const f16x y = norm_limited(a, before);
    if (codes) {
        a->mask[row * a->words + c / 16] = (uint16_t)f16_between(before, f16_set1(a->low), f16_set1(a->high));
        const f16x code = f16_add(f16_mul(v, params(a->code_scale, c, n)), params(a->code_shift, c, n));
        const u8x16 bytes = codes_from(i32_nearest(code));
        if (n == 16)
            codes_store(a->codes + at, bytes);
        else
            codes_store_n(a->codes + at, bytes, n);
    }
    if (a->out)
        row_store(a->out, dtype, at, n, y);
    return y;
}

QSP_INLINE void norm_of(const qsp_norm *a, int64_t first, int64_t last, const int dtype, const int residual,
                        const int codes)
{
    for (int64_t row = first; row < last; row++) {
        int64_t c = 0;
        for (; c + 16 <= a->channels; c += 16)
            norm_at(a, row, c, 16, dtype, residual, codes);
        if (c < a->channels)
            norm_at(a, row, c, (int)(a->channels - c), dtype, residual, codes);
    }
}

static void norm(const qsp_norm *a, int64_t first, int64_t last)
{
    const int kind = (a->dtype == QSP_BF16) << 2 | (a->residual != NULL) << 1 | (a->codes != NULL);
    switch (kind) { /* constants that the compiler sees */
    case 0: norm_of(a, first, last, QSP_F32, 0, 0); break;
    case 1: norm_of(a, first, last, QSP_F32, 0, 1); break;
    case 2: norm_of(a, first, last, QSP_F32, 1, 0); break;
    case 3: norm_of(a, first, last, QSP_F32, 1, 1); break;
    case 4: norm_of(a, first, last, QSP_BF16, 0, 0); break;
    case 5: norm_of(a, first, last, QSP_BF16, 0, 1); break;
    case 6: norm_of(a, first, last, QSP_BF16, 1, 0); break;
    default: norm_of(a, first, last, QSP_BF16, 1, 1); break;
    }
}

QSP_INLINE void norm_range_block(const qsp_norm *a, int64_t first, int64_t last, int64_t c, const int n,
                                 const int dtype, float *out)
{
    QSP_ALIGNED(64) float line[2][16];
    f16x low = f16_set1(INFINITY), high = f16_set1(-INFINITY), bad = f16_zero();
    for (int64_t row = first; row < last; row++) {
        const f16x v = row_load(a->x, dtype, row * a->channels + c, n);
        const f16x y = norm_limited(a, norm_value(a, v, row, c, n, dtype, a->residual != NULL));
        low = f16_min(low, y);
        high = f16_max(high, y);
        bad = f16_add(bad, f16_mul(y, f16_zero())); /* a NaN where an element is NaN or Inf */
    }
    f16_store(line[0], f16_add(low, bad));
    f16_store(line[1], f16_add(high, bad));
    for (int j = 0; j < n; j++) {
        out[2 * (c + j)] = line[0][j];
        out[2 * (c + j) + 1] = line[1][j];
    }
}

QSP_INLINE void norm_range_of(const qsp_norm *a, int64_t first, int64_t last, const int dtype, float *out)
{
    int64_t c = 0;
    for (; c + 16 <= a->channels; c += 16)
        norm_range_block(a, first, last, c, 16, dtype, out);
    if (c < a->channels)
        norm_range_block(a, first, last, c, (int)(a->channels - c), dtype, out);
}

static void norm_range(const qsp_norm *a, int64_t first, int64_t last, float *out)
{
    if (a->dtype == QSP_F32)
        norm_range_of(a, first, last, QSP_F32, out);
    else
        norm_range_of(a, first, last, QSP_BF16, out);
}

QSP_INLINE f16x gradient_at(const qsp_norm_grad *a, int64_t row, int64_t c, const int n, const int dtype)
{
    return f16_keep(row_load(a->dy, dtype, row * a->channels + c, n), a->mask[row * a->words + c / 16]);
}

QSP_INLINE void sums_block(const qsp_norm_grad *a, int64_t first, int64_t last, int64_t c, const int vectors,
                           const int tail, const int dtype, double *out)
{
    f16x sum[NORM_BLOCK], dot[NORM_BLOCK], high[NORM_BLOCK], low[NORM_BLOCK];
    QSP_UNROLL
    for (int i = 0; i < vectors; i++)
        sum[i] = dot[i] = high[i] = low[i] = f16_zero();
    for (int64_t row = first; row < last; row++) {
        QSP_UNROLL
        for (int i = 0; i < vectors; i++) {
            const f16x g = gradient_at(a, row, c + 16 * i, tail, dtype);
            sum[i] = f16_add(sum[i], g);
            dot[i] = f16_add(dot[i], f16_mul(g, row_load(a->codes, QSP_U8, row * a->channels + c + 16 * i, tail)));
            high[i] = f16_max(high[i], g);
            low[i] = f16_min(low[i], g);
        }
    }
    for (int i = 0; i < vectors; i++) {
        QSP_ALIGNED(64) float line[4][16];
        f16_store(line[0], sum[i]);
        f16_store(line[1], dot[i]);
        f16_store(line[2], high[i]);
        f16_store(line[3], low[i]);
        for (int j = 0; j < tail; j++) {
            double *to = out + 3 * (c + 16 * i + j);
            to[0] = line[0][j];
            to[1] = line[1][j];
            to[2] = line[2][j] > -line[3][j] ? line[2][j] : -line[3][j];
        }
    }
}

QSP_INLINE void norm_sums_of(const qsp_norm_grad *a, int64_t first, int64_t last, const int dtype, double *out)
{
    int64_t c = 0;
    for (; c + 16 * NORM_BLOCK <= a->channels; c += 16 * NORM_BLOCK)
        sums_block(a, first, last, c, NORM_BLOCK, 16, dtype, out);
    for (; c + 16 <= a->channels; c += 16)
        sums_block(a, first, last, c, 1, 16, dtype, out);
    if (c < a->channels)
        sums_block(a, first, last, c, 1, (int)(a->channels - c), dtype, out);
}

static void norm_sums(const qsp_norm_grad *a, int64_t first, int64_t last, double *out)
{
    if (a->dtype == QSP_F32)
        norm_sums_of(a, first, last, QSP_F32, out);
    else
        norm_sums_of(a, first, last, QSP_BF16, out);
}

/* Channels c .. c + n of a row: the gradient of what was normalised. */
QSP_INLINE f16x norm_grad_at(const qsp_norm_grad *a, int64_t row, int64_t c, const int n, const int dtype)
{
    const int64_t at = row * a->channels + c;
    const f16x g = gradient_at(a, row, c, n, dtype), code = row_load(a->codes, QSP_U8, at, n);
    if (a->dresidual)
        row_store(a->dresidual, dtype, at, n, g);
    const f16x rest = f16_add(f16_mul(code, params(a->factor + a->channels, c, n)),
                              params(a->factor + 2 * a->channels, c, n));
    const f16x dx = f16_add(f16_mul(g, params(a->factor, c, n)), rest);
    if (a->dx)
        row_store(a->dx, dtype, at, n, dx);
    return dx;
}

QSP_INLINE void norm_grad_of(const qsp_norm_grad *a, int64_t first, int64_t last, const int dtype)
{
    for (int64_t row = first; row < last; row++) {
        int64_t c = 0;
        for (; c + 16 <= a->channels; c += 16)
            norm_grad_at(a, row, c, 16, dtype);
        if (c < a->channels)
            norm_grad_at(a, row, c, (int)(a->channels - c), dtype);
    }
}

static void norm_grad(const qsp_norm_grad *a, int64_t first, int64_t last)
{
    if (a->dtype == QSP_F32)
        norm_grad_of(a, first, last, QSP_F32);
    else
        norm_grad_of(a, first, last, QSP_BF16);
}
