/* Weights: slots of a list -> int8 codes with one scale a row, and the sum of a row's codes. */

enum { KEPT_SLOTS = 2048 }; /* slots whose values wait on the stack between the two passes */

/* Places in the row's table of slots [from, from + n): the codes. */
QSP_INLINE void places_at(const qsp_nonzeros *l, int64_t row, int64_t from, int64_t n, int32_t *place)
{
    const int64_t first = l->first[row] + from, there = qsp_min(n, nonzeros_of_row(l, row) - from);
    if (l->code)
        for (int64_t i = 0; i < there; i++)
            place[i] = l->code[first + i];
    else if (!l->wide)
        for (int64_t i = 0; i < there; i++)
            place[i] = (int32_t)(from + i);
    else
        for (int64_t i = 0; i < there; i++)
            place[i] = l->wide[first + i];
    for (int64_t i = there; i < n; i++)
        place[i] = place[there - 1];
}

/* Values of up to sixteen slots of a row from `from` on, times the factors at these places, if there are any. */
QSP_INLINE f32x16 weights_at(const qsp_weight *a, int64_t row, int64_t from, int n, const float *factor,
                             const int32_t *place)
{
    const qsp_nonzeros *l = &a->nonzeros;
    const int64_t first = l->first[row] + from;
    const int there = (int)qsp_min(n, nonzeros_of_row(l, row) - from);
    const f32x16 v = l->index ? f32x16_gather(a->values, l->index + first, there)
                              : f32x16_load_n(a->values + first, there);
    return factor ? f32x16_mul(v, f32x16_gather(factor, place, n)) : v;
}

/* The scale of weights whose largest magnitude has these bits, and what they are multiplied by: codes of a row with NaN or
 * Inf mean nothing, its scale keeps the result from looking like a number. */
QSP_INLINE float weight_scale(const qsp_weight *a, uint32_t bits, float *inverse)
{
    float absmax;
    memcpy(&absmax, &bits, sizeof absmax);
    const float scale = qsp_symmetric_scale(a->clip && isfinite(absmax) ? a->clip : absmax, 127.0f);
    *inverse = isfinite(absmax) ? 1.0f / scale : 0.0f;
    return scale;
}

QSP_INLINE i32x16 weight_codes(f32x16 v, f32x16 inverse)
{
    /* a clipped value may be too large for an integer */
    const f32x16 q = f32x16_max(f32x16_min(f32x16_mul(v, inverse), f32x16_set1(1024.0f)), f32x16_set1(-1024.0f));
    return i32x16_max(i32x16_min(i32x16_nearest(q), i32x16_set1(127)), i32x16_set1(-127));
}

static void quantize_rows_kernel(const qsp_weight *a, int64_t first, int64_t last)
{
    QSP_ALIGNED(64) float kept[KEPT_SLOTS];
    int32_t place[KEPT_SLOTS];
    const qsp_nonzeros *l = &a->nonzeros;
    for (int64_t row = first; row < last; row++) {
        const int64_t slots = slots_of_row(l, row), begin = QSP_GROUP * (l->group_ptr[row] - a->base);
        const int64_t table = l->table ? l->table[row] : 0;
        const int keep = slots <= KEPT_SLOTS;
        const float *factor = a->factor ? a->factor + table : NULL;
        int8_t *codes = a->codes + begin;
        u32x16 bits = u32x16_zero();
        if (keep && (factor || a->zero_point))
            places_at(l, row, 0, slots, place);
        for (int64_t k = 0; k < slots; k += 16) {
            const int n = (int)qsp_min(16, slots - k);
            if (!keep && factor)
                places_at(l, row, k, n, place);
            const f32x16 v = weights_at(a, row, k, n, factor, keep ? place + k : place);
            bits = u32x16_max_abs(bits, v);
            if (keep)
                f32x16_store(kept + k, v);
        }
        if (a->offset)
            row_offsets(l, row, a->offset + begin);
        float per_step;
        a->scale[row] = weight_scale(a, u32x16_reduce_max(bits), &per_step) * a->scale_factor;
        const f32x16 inverse = f32x16_set1(per_step);
        i32x16 total = i32x16_set1(0);
        for (int64_t k = 0; k < slots; k += 16) {
            const int n = (int)qsp_min(16, slots - k);
            if (!keep && factor)
                places_at(l, row, k, n, place);
            const f32x16 v = keep ? f32x16_load(kept + k) : weights_at(a, row, k, n, factor, place);
            const i32x16 c = weight_codes(v, inverse);
            total = i32x16_add(total, c);
            u8x16_store_n((uint8_t *)codes + k, i32x16_to_s8(c), n);
        }
        a->total[row] = i32x16_reduce_add(total) * a->zero_factor;
        if (!a->zero_point)
            continue;
        const int32_t *zero = a->zero_point + table;
        int64_t sum = 0;
        for (int64_t k = 0; k < slots; k += KEPT_SLOTS) {
            const int64_t n = qsp_min(KEPT_SLOTS, slots - k);
            if (!keep)
                places_at(l, row, k, n, place);
            for (int64_t i = 0; i < n; i++) /* which the compiler turns into vectors */
                sum += codes[k + i] * zero[place[i]];
        }
        a->total[row] = sum;
    }
}
