/* Tensors as lines of consecutive elements <-> codes: one scale a line, or one for each element of a line. */

/* Codes of n elements from `first` on. */
QSP_INLINE void quantize_line(const qsp_quantize *a, int64_t first, int64_t n, int64_t scale, const int dtype,
                              const int rounding)
{
    quantizer q = {0};
    if (!a->each)
        q = quantizer_from(&a->scheme, f16_set1(a->inverse[scale]), i32_set1(a->zero_point[scale]), rounding);
    uint8_t *out = (uint8_t *)a->codes + first;
    for (int64_t k = 0; k < n; k += 16) {
        const int m = (int)qsp_min(16, n - k);
        const f16x x = m == 16 ? load16(a->x, dtype, first + k) : load_n(a->x, dtype, first + k, 1, m);
        if (a->each)
            q = quantizer_from(&a->scheme, f16_load_n(a->inverse + k, m), i32_load_n(a->zero_point + k, m), rounding);
        const uint64_t index = (uint64_t)(first + k);
        const i32x16 dither = rounding < RANDOM ? i32_set1(0)
                              : index & 3       ? random_any(a->seed, index, 1)
                                                : random_run(a->seed, index);
        const i32x16 c = quantize16(x, &q, rounding, dither);
        const u8x16 bytes = a->scheme.around_zero ? codes_signed(c) : codes_from(c);
        if (m == 16)
            codes_store(out + k, bytes);
        else
            codes_store_n(out + k, bytes, m);
    }
}

/* Scale and zero point of one line. */
static void scale_line(const qsp_quantize *a, int64_t first, int64_t n, int64_t line)
{
    const char *x = (const char *)a->x + first * (a->dtype == QSP_F32 ? 4 : 2);
    qsp_range r = {0.0f, INFINITY, -INFINITY};
    qsp_moments m = {0.0, 0.0, (double)n, 0.0};
    if (qsp_wants_moments(&a->scheme)) {
        double state[QSP_MOMENTS * 16 / sizeof(double)] = {0};
        moments(x, a->dtype, n, 1, 0, a->scheme.kind == QSP_SAWB, state);
        r.min = 0.0f;
        qsp_add_moments(state, 16, 0, 16, &r, &m);
    } else
        range(x, a->dtype, n, 1, a->scheme.kind == QSP_AFFINE, &r);
    a->scale[line] = qsp_scale(&a->scheme, &r, &m, a->zero_point + line, a->inverse + line);
}

QSP_INLINE void quantize_some(const qsp_quantize *a, int64_t first, int64_t last, const int dtype, const int rounding)
{
    for (int64_t line = first; line < last; line++) {
        const int64_t begin = line * a->length, n = qsp_min(a->length, a->count - begin);
        if (a->each) {
            quantize_line(a, begin, n, 0, dtype, rounding);
            continue;
        }
        const int64_t scale = line % a->scales;
        if (a->own)
            scale_line(a, begin, n, scale);
        if (a->inverse[scale] == 0.0f) /* NaN or Inf among the elements */
            memset((uint8_t *)a->codes + begin, a->scheme.around_zero ? 0 : a->zero_point[scale], (size_t)n);
        else
            quantize_line(a, begin, n, scale, dtype, rounding);
    }
}

static void quantize(const qsp_quantize *a, int64_t first, int64_t last)
{
    const int rounding = rounding_of(&a->scheme);
    if (rounding != NEAREST)
        quantize_some(a, first, last, a->dtype, rounding);
    else if (a->dtype == QSP_F32)
        quantize_some(a, first, last, QSP_F32, NEAREST);
    else
        quantize_some(a, first, last, QSP_BF16, NEAREST);
}

QSP_INLINE i32x16 codes_load_n(const uint8_t *p, int n, int around_zero)
{
    uint8_t line[16] = {0};
    if (n < 16) {
        memcpy(line, p, (size_t)n);
        p = line;
    }
    return around_zero ? i32_load_s8(p) : i32_load_u8(p);
}

static void dequantize(const qsp_quantize *a, int64_t first, int64_t last)
{
    for (int64_t line = first; line < last; line++) {
        const int64_t begin = line * a->length, n = qsp_min(a->length, a->count - begin), i = line % a->scales;
        const uint8_t *p = (const uint8_t *)a->codes + begin;
        f16x scale = f16_set1(a->scale[a->each ? 0 : i]);
        i32x16 zero = i32_set1(a->zero_point[a->each ? 0 : i]);
        for (int64_t k = 0; k < n; k += 16) {
            const int m = (int)qsp_min(16, n - k);
            if (a->each) {
                scale = f16_load_n(a->scale + k, m);
                zero = i32_load_n(a->zero_point + k, m);
            }
            const f16x v = f16_mul(f16_from(i32_sub(codes_load_n(p + k, m, a->scheme.around_zero), zero)), scale);
            if (a->dtype == QSP_F32 && m == 16)
                f16_store((float *)a->out + begin + k, v);
            else if (a->dtype == QSP_F32)
                f16_store_n((float *)a->out + begin + k, v, m);
            else if (m == 16)
                f16_store_bf16((uint16_t *)a->out + begin + k, v);
            else
                f16_store_bf16_n((uint16_t *)a->out + begin + k, v, m);
        }
    }
}
