/* Weights: slots of a list -> int8 codes with one scale a row, and the sum of a row's codes. */

/* Least and greatest of n integers; plain loops here and below, which the compiler turns into vectors of the ISA. */
static void extent(const int32_t *v, int64_t n, int32_t *least, int32_t *most)
{
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        low = v[i] < low ? v[i] : low;
        high = v[i] > high ? v[i] : high;
    }
    *least = low;
    *most = high;
}

enum { KEPT_SLOTS = 2048 }; /* slots whose values wait on the stack between the two passes */

/* Values of up to sixteen slots, times the factors of the planes that they read. */
QSP_INLINE f16x weights_at(const qsp_weight *a, int64_t slot, int n)
{
    const f16x v = f16_gather(a->values, a->index + slot, n);
    return a->factor ? f16_mul(v, f16_gather(a->factor, a->plane + slot, n)) : v;
}

static void quantize_rows(const qsp_weight *a, int64_t first, int64_t last)
{
    QSP_ALIGNED(64) float kept[KEPT_SLOTS];
    for (int64_t row = first; row < last; row++) {
        const int64_t begin = 4 * (int64_t)a->list.group_ptr[row], end = 4 * (int64_t)a->list.group_ptr[row + 1];
        const int keep = end - begin <= KEPT_SLOTS;
        u32x16 bits = u32_zero();
        for (int64_t k = begin; k < end; k += 16) {
            const f16x v = weights_at(a, k, (int)qsp_min(16, end - k));
            bits = u32_max_abs(bits, v);
            if (keep)
                f16_store(kept + (k - begin), v);
        }
        const uint32_t greatest = u32_greatest(bits);
        float absmax;
        memcpy(&absmax, &greatest, 4);
        const float scale = qsp_symmetric_scale(a->clip && isfinite(absmax) ? a->clip : absmax, 127.0f);
        a->scale[row] = scale * a->scale_factor;
        /* codes of a row with NaN or Inf mean nothing; its scale keeps the result from looking like a number */
        const f16x inverse = f16_set1(isfinite(absmax) ? 1.0f / scale : 0.0f);
        i32x16 total = i32_set1(0);
        for (int64_t k = begin; k < end; k += 16) {
            const int n = (int)qsp_min(16, end - k);
            const f16x v = keep ? f16_load(kept + (k - begin)) : weights_at(a, k, n);
            /* a clipped value may be too large for an integer */
            const f16x q = f16_max(f16_min(f16_mul(v, inverse), f16_set1(1024.0f)), f16_set1(-1024.0f));
            i32x16 c = i32_nearest(q);
            c = i32_max(i32_min(c, i32_set1(127)), i32_set1(-127));
            total = i32_add(total, c);
            codes_store_n((uint8_t *)a->codes + k, codes_signed(c), n);
        }
        a->total[row] = i32_sum(total) * a->zero_factor;
        if (a->zero_point) {
            int64_t sum = 0;
            for (int64_t k = begin; k < end; k++)
                sum += a->codes[k] * a->zero_point[a->plane[k]];
            a->total[row] = sum;
        }
    }
}
