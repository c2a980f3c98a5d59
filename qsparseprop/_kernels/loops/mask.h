/* ReLU that leaves a bit an element, and gradients of which the bits say what is kept; elements in the order of memory,
 * element i as bit i % 16 of word i / 16. */

QSP_INLINE void relu_16(const void *x, const int dtype, int64_t at, const int n, void *out, uint16_t *mask)
{
    const f32x16 zero = f32x16_zero(), infinite = f32x16_set1(INFINITY);
    /* in this order a NaN stays one */
    const f32x16 y = f32x16_max(zero, n == 16 ? load_elements(x, dtype, at) : load_elements_n(x, dtype, at, 1, n));
    /* not (y <= 0), which lets the gradient of a NaN pass as torch does: above zero, or neither zero nor a number below
     * infinity */
    mask[at / 16] = (uint16_t)(f32x16_between(y, zero, infinite) | ~f32x16_between(y, f32x16_set1(-1.0f), infinite));
    if (n == 16)
        store_elements(element_at(out, dtype, at), dtype, y);
    else
        store_elements_n(element_at(out, dtype, at), dtype, y, n);
}

QSP_INLINE void relu_of(const void *x, const int dtype, int64_t first, int64_t last, void *out, uint16_t *mask)
{
    for (; first + 16 <= last; first += 16)
        relu_16(x, dtype, first, 16, out, mask);
    if (first < last)
        relu_16(x, dtype, first, (int)(last - first), out, mask);
}

static void relu_kernel(const void *x, int dtype, int64_t first, int64_t last, void *out, uint16_t *mask)
{
    if (dtype == QSP_F32)
        relu_of(x, QSP_F32, first, last, out, mask);
    else
        relu_of(x, QSP_BF16, first, last, out, mask);
}

QSP_INLINE void keep_of(const void *x, const int dtype, int64_t first, int64_t last, const uint16_t *mask, void *out)
{
    for (; first + 16 <= last; first += 16)
        store_elements(element_at(out, dtype, first), dtype,
                       f32x16_keep(load_elements(x, dtype, first), mask[first / 16]));
    if (first < last) {
        const int n = (int)(last - first);
        store_elements_n(element_at(out, dtype, first), dtype,
                         f32x16_keep(load_elements_n(x, dtype, first, 1, n), mask[first / 16]), n);
    }
}

static void keep_kernel(const void *x, int dtype, int64_t first, int64_t last, const uint16_t *mask, void *out)
{
    if (dtype == QSP_F32)
        keep_of(x, QSP_F32, first, last, mask, out);
    else
        keep_of(x, QSP_BF16, first, last, mask, out);
}
