/* Weights: slots of a list -> int8 codes with one scale a row, and the sum of a row's codes. */

enum { KEPT_SLOTS = 2048 }; /* slots whose values wait on the stack between the two passes */

/* Values of up to sixteen slots, times the factors of the planes that they read. */
QSP_INLINE f32x16 weights_at(const qsp_weight *a, int64_t slot, int n)
{
    const f32x16 v = f32x16_gather(a->values, a->index + slot, n);
    return a->factor ? f32x16_mul(v, f32x16_gather(a->factor, a->plane + slot, n)) : v;
}

static void quantize_rows_kernel(const qsp_weight *a, int64_t first, int64_t last)
{
    QSP_ALIGNED(64) float kept[KEPT_SLOTS];
    for (int64_t row = first; row < last; row++) {
        const int64_t begin = qsp_first_slot(&a->list, row), end = qsp_first_slot(&a->list, row + 1);
        const int keep = end - begin <= KEPT_SLOTS;
        u32x16 bits = u32x16_zero();
        for (int64_t k = begin; k < end; k += 16) {
            const f32x16 v = weights_at(a, k, (int)qsp_min(16, end - k));
            bits = u32x16_max_abs(bits, v);
            if (keep)
                f32x16_store(kept + (k - begin), v);
        }
        const uint32_t greatest = u32x16_reduce_max(bits);
        float absmax;
        memcpy(&absmax, &greatest, 4);
        const float scale = qsp_symmetric_scale(a->clip && isfinite(absmax) ? a->clip : absmax, 127.0f);
        a->scale[row] = scale * a->scale_factor;
        /* codes of a row with NaN or Inf mean nothing; its scale keeps the result from looking like a number */
        const f32x16 inverse = f32x16_set1(isfinite(absmax) ? 1.0f / scale : 0.0f);
        i32x16 total = i32x16_set1(0);
        for (int64_t k = begin; k < end; k += 16) {
            const int n = (int)qsp_min(16, end - k);
            const f32x16 v = keep ? f32x16_load(kept + (k - begin)) : weights_at(a, k, n);
            /* a clipped value may be too large for an integer */
            const f32x16 q =
                f32x16_max(f32x16_min(f32x16_mul(v, inverse), f32x16_set1(1024.0f)), f32x16_set1(-1024.0f));
            i32x16 c = i32x16_nearest(q);
            c = i32x16_max(i32x16_min(c, i32x16_set1(127)), i32x16_set1(-127));
            total = i32x16_add(total, c);
            u8x16_store_n((uint8_t *)a->codes + k, i32x16_to_s8(c), n);
        }
        a->total[row] = i32x16_reduce_add(total) * a->zero_factor;
        if (a->zero_point) {
            int64_t sum = 0;
            for (int64_t k = begin; k < end; k++) /* which the compiler turns into vectors */
                sum += a->codes[k] * a->zero_point[a->plane[k]];
            a->total[row] = sum;
        }
    }
}
