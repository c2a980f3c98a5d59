/* What is reduced over the rows of what epilogue.h computes: the range of each channel, and sums of its gradient.
 *
 * Three numbers a channel are kept meanwhile: in registers where rows are short (WIDE channels at a time), otherwise in
 * memory (REDUCED channels at a time): rows of linear layers are long, and read as they lie. Rows of 16 or 32 channels are
 * read some at a time, as one of WIDE channels: all that belongs to them lies side by side. */
enum { REDUCED = 512, NARROW = 256, WIDE_VECTORS = 4, WIDE = 16 * WIDE_VECTORS, KEPT = 3 };

typedef struct {
    QSP_ALIGNED(64) float of[KEPT][REDUCED];
} reduced;

typedef struct {
    f32x16 of[KEPT];
} reduced_x16;

QSP_INLINE reduced_x16 reduced_load(const reduced *r, int64_t at)
{
    const reduced_x16 v = {{f32x16_load(r->of[0] + at), f32x16_load(r->of[1] + at), f32x16_load(r->of[2] + at)}};
    return v;
}

QSP_INLINE void reduced_store(reduced *r, int64_t at, reduced_x16 v)
{
    for (int k = 0; k < KEPT; k++)
        f32x16_store(r->of[k] + at, v.of[k]);
}

static void reduced_start(reduced *r, int64_t n, float first, float second)
{
    for (int64_t i = 0; i < n; i++) {
        r->of[0][i] = first;
        r->of[1][i] = second;
        r->of[2][i] = 0.0f;
    }
}

/* Whether some rows are read as one. */
QSP_INLINE int makes_wide(int64_t channels) { return channels < WIDE && channels % 16 == 0 && WIDE % channels == 0; }

/* Where element `at` of a tensor is that is only read; NULL of none. */
QSP_INLINE const void *read_at(const void *tensor, const int dtype, int64_t at)
{
    return tensor ? (const char *)tensor + (dtype == QSP_F32 ? 4 : 2) * at : NULL;
}

/* Fetch WIDE channels of a row that comes later, where there are more of them: the processor sees that rows follow each
 * other, not what lies between them. */
QSP_INLINE void fetch_wide(const void *x, const int dtype, int64_t row, int64_t channels, int64_t c)
{
    enum { AHEAD = 16, LINE = 64 };
    const int size = dtype == QSP_U8 ? 1 : dtype == QSP_BF16 ? 2 : 4;
    if (channels == WIDE)
        return;
    for (int i = 0; i < WIDE * size; i += LINE)
        QSP_PREFETCH_READ((const char *)x + ((row + AHEAD) * channels + c) * size + i);
}

/* ---- ranges: least, greatest, and a NaN where an element is not finite ---- */
QSP_INLINE void range_take(reduced_x16 *v, f32x16 y)
{
    v->of[0] = f32x16_min(v->of[0], y);
    v->of[1] = f32x16_max(v->of[1], y);
    v->of[2] = f32x16_add(v->of[2], f32x16_mul(y, f32x16_zero())); /* NaN where y is NaN or Inf */
}

/* Of rows [first, last) and channels c .. c + n, kept from place `at` on. */
QSP_INLINE void range_of_rows(const qsp_epilogue *a, int64_t first, int64_t last, int64_t c, int64_t n, const int dtype,
                              const int affine, const int residual, reduced *r, int64_t at)
{
    for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < n; i += 16) {
            reduced_x16 v = reduced_load(r, at + i);
            range_take(&v, n - i >= 16 ? epilogue_at(a, row, c + i, 16, dtype, QSP_CLAMP, affine, residual, 0, 0)
                                       : epilogue_any(a, row, c + i, (int)(n - i)));
            reduced_store(r, at + i, v);
        }
}

/* The same of WIDE channels. */
QSP_INLINE void range_of_wide(const qsp_epilogue *a, int64_t first, int64_t last, int64_t c, const int dtype,
                              const int affine, const int residual, reduced *r, int64_t at)
{
    reduced_x16 v[WIDE_VECTORS];
    QSP_UNROLL
    for (int i = 0; i < WIDE_VECTORS; i++)
        v[i] = reduced_load(r, at + 16 * i);
    for (int64_t row = first; row < last; row++) {
        fetch_wide(a->x, dtype, row, a->channels, c);
        if (residual)
            fetch_wide(a->residual, dtype, row, a->channels, c);
        QSP_UNROLL
        for (int i = 0; i < WIDE_VECTORS; i++)
            range_take(&v[i], epilogue_at(a, row, c + 16 * i, 16, dtype, QSP_CLAMP, affine, residual, 0, 0));
    }
    QSP_UNROLL
    for (int i = 0; i < WIDE_VECTORS; i++)
        reduced_store(r, at + 16 * i, v[i]);
}

/* As many of the rows [first, last) as can be read as rows of WIDE channels; where the next one is. */
QSP_INLINE int64_t range_of_narrow(const qsp_epilogue *a, int64_t first, int64_t last, const int dtype,
                                   const int affine, const int residual, reduced *r)
{
    QSP_ALIGNED(64) float scale[WIDE], shift[WIDE];
    reduced all;
    qsp_epilogue one = *a;
    const int64_t together = WIDE / a->channels, wide = (last - first) / together;
    for (int k = 0; affine && k < WIDE; k++) {
        scale[k] = a->scale[k % a->channels];
        shift[k] = a->shift[k % a->channels];
    }
    one.x = read_at(a->x, dtype, first * a->channels);
    one.residual = read_at(a->residual, dtype, first * a->channels);
    one.scale = affine ? scale : NULL;
    one.shift = affine ? shift : NULL;
    one.channels = WIDE;
    reduced_start(&all, WIDE, INFINITY, -INFINITY);
    range_of_wide(&one, 0, wide, 0, dtype, affine, residual, &all, 0);
    for (int k = 0; k < WIDE; k++) {
        const int64_t c = k % a->channels;
        r->of[0][c] = all.of[0][k] < r->of[0][c] ? all.of[0][k] : r->of[0][c];
        r->of[1][c] = all.of[1][k] > r->of[1][c] ? all.of[1][k] : r->of[1][c];
        r->of[2][c] += all.of[2][k];
    }
    return first + wide * together;
}

/* Of rows [first, last) and channels c .. c + n, at most REDUCED. */
QSP_INLINE void range_of_part(const qsp_epilogue *a, int64_t first, int64_t last, int64_t c, int64_t n, const int dtype,
                              const int affine, const int residual, float *out)
{
    reduced r;
    int64_t i = 0;
    reduced_start(&r, (n + 15) / 16 * 16, INFINITY, -INFINITY);
    if (makes_wide(a->channels))
        first = range_of_narrow(a, first, last, dtype, affine, residual, &r);
    else
        for (; a->channels <= NARROW && i + WIDE <= n; i += WIDE)
            range_of_wide(a, first, last, c + i, dtype, affine, residual, &r, i);
    range_of_rows(a, first, last, c + i, n - i, dtype, affine, residual, &r, i);
    for (i = 0; i < n; i++) {
        out[2 * (c + i)] = r.of[0][i] + r.of[2][i];
        out[2 * (c + i) + 1] = r.of[1][i] + r.of[2][i];
    }
}

/* Before the activation, but a CLAMP's. */
static void epilogue_range_kernel(const qsp_epilogue *args, int64_t first, int64_t last, float *out)
{
    qsp_epilogue one = *args;
    const qsp_epilogue *a = &one;
    if (one.kind != QSP_CLAMP) {
        one.low = -INFINITY;
        one.high = INFINITY;
    }
    one.kind = QSP_CLAMP;
    one.out = one.saved = NULL;
    one.codes = NULL;
    for (int64_t c = 0; c < a->channels; c += REDUCED) {
        const int64_t n = qsp_min(REDUCED, a->channels - c);
        const int affine = a->scale != NULL, residual = a->residual != NULL;
        const int bare = !affine && !residual;
        if (bare && a->dtype == QSP_F32)
            range_of_part(a, first, last, c, n, QSP_F32, 0, 0, out);
        else if (bare)
            range_of_part(a, first, last, c, n, QSP_BF16, 0, 0, out);
        else if (a->dtype == QSP_F32)
            range_of_part(a, first, last, c, n, QSP_F32, affine, residual, out);
        else
            range_of_part(a, first, last, c, n, QSP_BF16, affine, residual, out);
    }
}

/* ---- sums: of the gradient behind the activation, of that times the code, and its greatest magnitude ---- */
QSP_INLINE void sums_take(reduced_x16 *v, f32x16 g, f32x16 code, const int codes)
{
    v->of[0] = f32x16_add(v->of[0], g);
    if (codes)
        v->of[1] = f32x16_add(v->of[1], f32x16_mul(g, code));
    v->of[2] = f32x16_max(v->of[2], f32x16_abs(g));
}

/* Of rows [first, last) and channels c .. c + n, kept from place `at` on. */
QSP_INLINE void sums_of_rows(const qsp_epilogue_grad *a, int64_t first, int64_t last, int64_t c, int64_t n,
                             const int dtype, const int kind, const int bits, const int codes, reduced *r, int64_t at)
{
    for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < n; i += 16) {
            const int m = (int)qsp_min(16, n - i);
            reduced_x16 v = reduced_load(r, at + i);
            const f32x16 g =
                m == 16 ? slope_at(a, row, c + i, 16, dtype, kind, bits) : epilogue_slope_any(a, row, c + i, m);
            const f32x16 code = codes ? row_load(a->codes, QSP_U8, row * a->channels + c + i, m) : f32x16_zero();
            sums_take(&v, g, code, codes);
            reduced_store(r, at + i, v);
        }
}

/* The same of WIDE channels with codes and a CLAMP. */
QSP_INLINE void sums_of_wide(const qsp_epilogue_grad *a, int64_t first, int64_t last, int64_t c, const int dtype,
                             reduced *r, int64_t at)
{
    reduced_x16 v[WIDE_VECTORS];
    QSP_UNROLL
    for (int i = 0; i < WIDE_VECTORS; i++)
        v[i] = reduced_load(r, at + 16 * i);
    for (int64_t row = first; row < last; row++) {
        fetch_wide(a->dy, dtype, row, a->channels, c);
        fetch_wide(a->codes, QSP_U8, row, a->channels, c);
        QSP_UNROLL
        for (int i = 0; i < WIDE_VECTORS; i++)
            sums_take(&v[i], slope_at(a, row, c + 16 * i, 16, dtype, QSP_CLAMP, 1),
                      load_elements(a->codes, QSP_U8, row * a->channels + c + 16 * i), 1);
    }
    QSP_UNROLL
    for (int i = 0; i < WIDE_VECTORS; i++)
        reduced_store(r, at + 16 * i, v[i]);
}

/* As many of the rows [first, last) as can be read as rows of WIDE channels; where the next one is. */
QSP_INLINE int64_t sums_of_narrow(const qsp_epilogue_grad *a, int64_t first, int64_t last, const int dtype, reduced *r)
{
    reduced all;
    qsp_epilogue_grad one = *a;
    const int64_t together = WIDE / a->channels, wide = (last - first) / together;
    one.dy = read_at(a->dy, dtype, first * a->channels);
    one.codes = a->codes + first * a->channels;
    one.saved = (const uint16_t *)a->saved + first * a->words;
    one.channels = WIDE;
    one.words = WIDE_VECTORS;
    reduced_start(&all, WIDE, 0.0f, 0.0f);
    sums_of_wide(&one, 0, wide, 0, dtype, &all, 0);
    for (int k = 0; k < WIDE; k++) {
        const int64_t c = k % a->channels;
        r->of[0][c] += all.of[0][k];
        r->of[1][c] += all.of[1][k];
        r->of[2][c] = all.of[2][k] > r->of[2][c] ? all.of[2][k] : r->of[2][c];
    }
    return first + wide * together;
}

/* Of rows [first, last) and channels c .. c + n, at most REDUCED, three numbers each at `out`; the greatest magnitude is
 * NaN where one is not finite. `normed`: codes and a CLAMP. */
QSP_INLINE void sums_of_part(const qsp_epilogue_grad *a, int64_t first, int64_t last, int64_t c, int64_t n,
                             const int dtype, const int normed, double *out)
{
    reduced r;
    int64_t i = 0;
    reduced_start(&r, (n + 15) / 16 * 16, 0.0f, 0.0f);
    if (normed && makes_wide(a->channels))
        first = sums_of_narrow(a, first, last, dtype, &r);
    else
        for (; normed && a->channels <= NARROW && i + WIDE <= n; i += WIDE)
            sums_of_wide(a, first, last, c + i, dtype, &r, i);
    if (normed)
        sums_of_rows(a, first, last, c + i, n - i, dtype, QSP_CLAMP, 1, 1, &r, i);
    else
        sums_of_rows(a, first, last, c + i, n - i, dtype, a->kind, a->saved != NULL, a->codes != NULL, &r, i);
    for (i = 0; i < n; i++) {
        const float sum = r.of[0][i], most = r.of[2][i];
        double *to = out + 3 * (c + i);
        to[0] = sum;
        to[1] = r.of[1][i];
        to[2] = isfinite(most) && sum == sum ? most : NAN; /* a maximum may have lost a NaN, which a sum keeps */
    }
}

static void epilogue_sums_kernel(const qsp_epilogue_grad *a, int64_t first, int64_t last, double *out)
{
    const int normed = a->kind == QSP_CLAMP && a->saved && a->codes;
    for (int64_t c = 0; c < a->channels; c += REDUCED) {
        const int64_t n = qsp_min(REDUCED, a->channels - c);
        if (normed && a->dtype == QSP_F32)
            sums_of_part(a, first, last, c, n, QSP_F32, 1, out);
        else if (normed)
            sums_of_part(a, first, last, c, n, QSP_BF16, 1, out);
        else if (a->dtype == QSP_F32)
            sums_of_part(a, first, last, c, n, QSP_F32, 0, out);
        else
            sums_of_part(a, first, last, c, n, QSP_BF16, 0, out);
    }
}
