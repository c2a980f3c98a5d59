/* Elements of a tensor, sixteen at a time: floats or bfloat16s, or codes to be read as the numbers 0 to 255. */

/* 16 neighbouring elements. */
QSP_INLINE f32x16 load_elements(const void *tensor, const int dtype, int64_t element)
{
    if (dtype == QSP_U8)
        return f32x16_load_u8((const uint8_t *)tensor + element);
    return dtype == QSP_F32 ? f32x16_load((const float *)tensor + element)
                            : f32x16_load_bf16((const uint16_t *)tensor + element);
}

/* n elements, `step` apart; zeros behind them. */
QSP_INLINE f32x16 load_elements_n(const void *tensor, const int dtype, int64_t element, int64_t step, int n)
{
    QSP_ALIGNED(64) float line[16] = {0};
    if (dtype == QSP_U8) {
        for (int i = 0; i < n; i++)
            line[i] = ((const uint8_t *)tensor)[element + i * step];
    } else if (dtype == QSP_F32) {
        const float *p = (const float *)tensor + element;
        if (step == 1)
            return f32x16_load_n(p, n);
        for (int i = 0; i < n; i++)
            line[i] = p[i * step];
    } else {
        const uint16_t *p = (const uint16_t *)tensor + element;
        if (step == 1)
            return f32x16_load_bf16_n(p, n);
        for (int i = 0; i < n; i++)
            line[i] = qsp_bf16_to_float(p[i * step]);
    }
    return f32x16_load(line);
}

QSP_INLINE void *element_at(void *tensor, const int dtype, int64_t element)
{
    return (char *)tensor + (dtype == QSP_F32 ? 4 : 2) * element;
}

QSP_INLINE void store_elements(void *p, const int dtype, f32x16 v)
{
    if (dtype == QSP_F32)
        f32x16_store((float *)p, v);
    else
        f32x16_store_bf16((uint16_t *)p, v);
}
QSP_INLINE void store_elements_n(void *p, const int dtype, f32x16 v, int n)
{
    if (dtype == QSP_F32)
        f32x16_store_n((float *)p, v, n);
    else
        f32x16_store_bf16_n((uint16_t *)p, v, n);
}

/* Up to 16 neighbours of a row, zeros behind them; and of what belongs to its channels. */
QSP_INLINE f32x16 row_load(const void *p, const int dtype, int64_t at, int n)
{
    return n == 16 ? load_elements(p, dtype, at) : load_elements_n(p, dtype, at, 1, n);
}
QSP_INLINE void row_store(void *p, const int dtype, int64_t at, int n, f32x16 v)
{
    if (n == 16)
        store_elements(element_at(p, dtype, at), dtype, v);
    else
        store_elements_n(element_at(p, dtype, at), dtype, v, n);
}
QSP_INLINE f32x16 load_params(const float *p, int64_t channel, int n)
{
    return n == 16 ? f32x16_load(p + channel) : f32x16_load_n(p + channel, n);
}
