/* Tensors as lines of consecutive elements <-> codes: one scale a line, or one for each element of a line. */

/* Codes of n elements from `first` on. Where `ahead` is not 0, what follows so many bytes later is brought into the
 * cache meanwhile. What the loop needs is in local variables: a store of bytes might change anything else. */
QSP_INLINE void quantize_line(const qsp_quantize *a, int64_t first, int64_t n, int64_t scale, const int dtype,
                              const int rounding, const int64_t ahead)
{
    const void *x = a->x;
    const int each = a->each, around_zero = a->scheme.around_zero;
    const uint64_t seed = a->seed;
    quantizer q = {0};
    if (!each)
        q = quantizer_from(&a->scheme, f32x16_set1(a->inverse[scale]), i32x16_set1(a->zero_point[scale]), rounding);
    uint8_t *out = (uint8_t *)a->codes + first;
    for (int64_t k = 0; k < n; k += 16) {
        const int m = (int)qsp_min(16, n - k);
        const f32x16 v = m == 16 ? load_elements(x, dtype, first + k) : load_elements_n(x, dtype, first + k, 1, m);
        if (ahead)
            QSP_PREFETCH_READ((const char *)x + (first + k) * (dtype == QSP_F32 ? 4 : 2) + ahead);
        if (each)
            q = quantizer_from(&a->scheme, f32x16_load_n(a->inverse + k, m), i32x16_load_n(a->zero_point + k, m),
                               rounding);
        const uint64_t index = (uint64_t)(first + k);
        const i32x16 dither = rounding < RANDOM ? i32x16_set1(0)
                              : index & 3       ? i32x16_random_strided(seed, index, 1)
                                                : i32x16_random_run(seed, index);
        const i32x16 c = quantize_x16(v, &q, rounding, dither);
        const u8x16 bytes = around_zero ? i32x16_to_s8(c) : i32x16_to_code(c);
        if (m == 16)
            u8x16_store(out + k, bytes);
        else
            u8x16_store_n(out + k, bytes, m);
    }
}

/* Range of a line that starts with a whole vector: lines are short, so that the sixteen sums meet in vectors and not in
 * memory one by one. The maximum comes along at no cost that could be seen. */
QSP_INLINE void line_range(const void *x, const int dtype, int64_t first, int64_t n, qsp_range *out)
{
    enum { SIDE_BY_SIDE = 4 };
    u32x16 bits = u32x16_zero();
    f32x16 low[SIDE_BY_SIDE], high[SIDE_BY_SIDE];
    low[0] = high[0] = load_elements(x, dtype, first);
    for (int i = 1; i < SIDE_BY_SIDE; i++)
        low[i] = high[i] = low[0];
    int64_t k = 0;
    for (; k + 16 * SIDE_BY_SIDE <= n; k += 16 * SIDE_BY_SIDE) {
        QSP_UNROLL
        for (int i = 0; i < SIDE_BY_SIDE; i++) {
            const f32x16 v = load_elements(x, dtype, first + k + 16 * i);
            bits = u32x16_max_abs(bits, v);
            low[i] = f32x16_min(low[i], v);
            high[i] = f32x16_max(high[i], v);
        }
    }
    for (; k < n; k += 16) { /* the last vector may overlap the one before */
        const f32x16 v = load_elements(x, dtype, first + qsp_min(k, n - 16));
        bits = u32x16_max_abs(bits, v);
        low[0] = f32x16_min(low[0], v);
        high[0] = f32x16_max(high[0], v);
    }
    for (int i = 1; i < SIDE_BY_SIDE; i++) {
        low[0] = f32x16_min(low[0], low[i]);
        high[0] = f32x16_max(high[0], high[i]);
    }
    const uint32_t greatest = u32x16_reduce_max(bits);
    memcpy(&out->absmax, &greatest, 4);
    out->min = f32x16_reduce_min(low[0]);
    out->max = f32x16_reduce_max(high[0]);
}

/* Range and moments of one line. */
QSP_INLINE void line_statistics(const qsp_quantize *a, int64_t first, int64_t n, const int dtype, qsp_range *r,
                                qsp_moments *m)
{
    const char *x = (const char *)a->x + first * (dtype == QSP_F32 ? 4 : 2);
    if (qsp_wants_moments(&a->scheme)) {
        const qsp_range none = {0.0f, 0.0f, -INFINITY};
        const qsp_moments no_sums = {0.0, 0.0, (double)n, 0.0};
        struct {
            double sums[3][16];
            float range[2][16];
        } state = {0};
        _Static_assert(sizeof state == 16 * QSP_MOMENTS, "the layout that `moments` adds up in");
        *r = none;
        *m = no_sums;
        moments_kernel(x, dtype, n, 1, 0, a->scheme.kind == QSP_SAWB ? QSP_MAGNITUDES : QSP_SUMS, &state);
        qsp_add_moments(&state, 16, 0, 16, r, m);
    } else if (n >= 16)
        line_range(a->x, dtype, first, n, r);
    else {
        const qsp_range none = {0.0f, INFINITY, -INFINITY};
        *r = none;
        range_kernel(x, dtype, n, 1, a->scheme.kind == QSP_AFFINE, r);
    }
}

enum {
    LINES_AT_ONCE = 8,            /* whose ranges are looked for before the first of them is rounded */
    BYTES_AT_ONCE = 1 << 13,      /* but not more than stays in the first cache */
};

/* Lines that have a scale each. A few at a time: the steps from a range to a scale depend on each other, and those of
 * one line hide behind the next one's. */
QSP_INLINE void quantize_own(const qsp_quantize *a, int64_t first, int64_t last, const int dtype, const int rounding)
{
    const int64_t width = a->length * (dtype == QSP_F32 ? 4 : 2);
    const int64_t fit = BYTES_AT_ONCE / width, at_once = fit < 1 ? 1 : qsp_min(fit, LINES_AT_ONCE);
    const int64_t ahead = width > BYTES_AT_ONCE ? 0 : at_once * width;
    while (first < last) {
        qsp_range r[LINES_AT_ONCE];
        qsp_moments m[LINES_AT_ONCE];
        const int64_t end = qsp_min(last, first + at_once);
        for (int64_t line = first; line < end; line++)
            line_statistics(a, line * a->length, qsp_min(a->length, a->count - line * a->length), dtype,
                            &r[line - first], &m[line - first]);
        for (int64_t line = first; line < end; line++)
            a->scale[line] = qsp_scale(&a->scheme, &r[line - first], &m[line - first], a->zero_point + line,
                                       a->inverse + line);
        for (; first < end; first++) {
            const int64_t begin = first * a->length, n = qsp_min(a->length, a->count - begin);
            if (a->inverse[first] == 0.0f) /* NaN or Inf among the elements */
                memset((uint8_t *)a->codes + begin, a->scheme.around_zero ? 0 : a->zero_point[first], (size_t)n);
            else
                quantize_line(a, begin, n, first, dtype, rounding, ahead);
        }
    }
}

QSP_INLINE void quantize_some(const qsp_quantize *a, int64_t first, int64_t last, const int dtype, const int rounding)
{
    if (a->own) {
        quantize_own(a, first, last, dtype, rounding);
        return;
    }
    for (int64_t line = first; line < last; line++) {
        const int64_t begin = line * a->length, n = qsp_min(a->length, a->count - begin);
        const int64_t scale = a->each ? 0 : line % a->scales;
        if (!a->each && a->inverse[scale] == 0.0f)
            memset((uint8_t *)a->codes + begin, a->scheme.around_zero ? 0 : a->zero_point[scale], (size_t)n);
        else
            quantize_line(a, begin, n, scale, dtype, rounding, 0);
    }
}

static void quantize_kernel(const qsp_quantize *a, int64_t first, int64_t last)
{
    const int rounding = rounding_of(&a->scheme);
    if (rounding != NEAREST)
        quantize_some(a, first, last, a->dtype, rounding);
    else if (a->dtype == QSP_F32)
        quantize_some(a, first, last, QSP_F32, NEAREST);
    else
        quantize_some(a, first, last, QSP_BF16, NEAREST);
}

QSP_INLINE i32x16 load_codes_n(const uint8_t *p, int n, int around_zero)
{
    uint8_t line[16] = {0};
    if (n < 16) {
        memcpy(line, p, (size_t)n);
        p = line;
    }
    return around_zero ? i32x16_load_s8(p) : i32x16_load_u8(p);
}

QSP_INLINE void dequantize_some(const qsp_quantize *a, int64_t first, int64_t last, const int dtype)
{
    const int each = a->each, around_zero = a->scheme.around_zero;
    for (int64_t line = first; line < last; line++) {
        const int64_t begin = line * a->length, n = qsp_min(a->length, a->count - begin), i = line % a->scales;
        const uint8_t *p = (const uint8_t *)a->codes + begin;
        void *out = element_at(a->out, dtype, begin);
        f32x16 scale = f32x16_set1(a->scale[each ? 0 : i]);
        i32x16 zero = i32x16_set1(a->zero_point[each ? 0 : i]);
        for (int64_t k = 0; k < n; k += 16) {
            const int m = (int)qsp_min(16, n - k);
            if (each) {
                scale = f32x16_load_n(a->scale + k, m);
                zero = i32x16_load_n(a->zero_point + k, m);
            }
            const f32x16 v = f32x16_mul(f32x16_from_i32(i32x16_sub(load_codes_n(p + k, m, around_zero), zero)), scale);
            if (m == 16)
                store_elements(element_at(out, dtype, k), dtype, v);
            else
                store_elements_n(element_at(out, dtype, k), dtype, v, m);
        }
    }
}

static void dequantize_kernel(const qsp_quantize *a, int64_t first, int64_t last)
{
    if (a->dtype == QSP_F32)
        dequantize_some(a, first, last, QSP_F32);
    else
        dequantize_some(a, first, last, QSP_BF16);
}
