/* Features of tokens as rows of codes: of floats, and of codes that lie in planes. */

/* Scale of a token: its largest magnitude, NaN if any element is one, over 127. */
QSP_INLINE float token_scale(const qsp_token_codes *a, const float *x)
{
    u32x16 most = u32x16_zero();
    float largest;
    for (int64_t i = 0; i < a->columns; i += 16) {
        const int n = (int)qsp_min(16, a->columns - i);
        most = u32x16_max_abs(most, f32x16_mul(f32x16_load_n(x + i, n), f32x16_load_n(a->inverse + i, n)));
    }
    const uint32_t bits = u32x16_reduce_max(most);
    memcpy(&largest, &bits, sizeof largest);
    largest /= 127.0f;
    return largest < QSP_MIN_SCALE ? QSP_MIN_SCALE : largest;
}

static void tokens_quantize_kernel(const qsp_token_codes *a, int64_t token)
{
    const qsp_scheme fixed = {.kind = QSP_AFFINE, .bits = 8, .fixed = 1};
    const float *x = a->x + token * a->columns;
    uint8_t *codes = a->scaled ? NULL : a->codes + token * a->pitch;
    float scale = 1.0f;
    if (a->scale)
        a->scale[token] = scale = token_scale(a, x);
    const quantizer q = quantizer_from(&fixed, f32x16_set1(1.0f / scale), i32x16_set1(a->zero), LIMITED);
    for (int64_t i = 0; i < a->columns; i += 16) {
        const int n = (int)qsp_min(16, a->columns - i);
        const f32x16 v = f32x16_mul(f32x16_load_n(x + i, n), f32x16_load_n(a->inverse + i, n));
        if (a->scaled)
            f32x16_store_n(a->scaled + token * a->columns + i, f32x16_mul(v, q.inverse), n);
        else /* without scales of tokens times one */
            u8x16_store_n(codes + i, i32x16_to_code(quantize_x16(v, &q, LIMITED, q.zero)), n);
    }
    if (codes)
        memset(codes + a->columns, a->zero, (size_t)(a->pitch - a->columns));
}

static void tokens_gather_kernel(const qsp_coded *c, int64_t token, uint8_t *codes, int64_t pitch)
{
    const uint8_t *plane = coded_row(c, token, 0, 0);
    for (int64_t i = 0; i < c->channels; i++)
        codes[i] = plane[i * c->grid.pitch];
    memset(codes + c->channels, c->zero, (size_t)(pitch - c->channels));
}
