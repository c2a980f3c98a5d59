/* Weights: slots of a list -> int8 codes with one scale a row, and the sum of a row's codes. */

static void quantize_rows(const qsp_list *l, const float *values, const int32_t *index, int64_t first, int64_t last,
                          int8_t *codes, float *scale, int32_t *sum)
{
    for (int64_t row = first; row < last; row++) {
        const int64_t begin = 4 * (int64_t)l->group_ptr[row], end = 4 * (int64_t)l->group_ptr[row + 1];
        u32x16 bits = u32_zero();
        for (int64_t k = begin; k < end; k += 16)
            bits = u32_max_abs(bits, f16_gather(values, index + k, (int)qsp_min(16, end - k)));
        const uint32_t greatest = u32_greatest(bits);
        float absmax;
        memcpy(&absmax, &greatest, 4);
        scale[row] = qsp_symmetric_scale(absmax, 127.0f);
        const f16x inverse = f16_set1(1.0f / scale[row]), high = f16_set1(127.0f), low = f16_set1(-127.0f);
        int32_t total = 0;
        for (int64_t k = begin; k < end; k += 16) {
            const int n = (int)qsp_min(16, end - k);
            const f16x v =
                f16_max(f16_min(f16_mul(f16_gather(values, index + k, n), inverse), high), low);
            total += codes_sum(v);
            codes_store_n((uint8_t *)codes + k, codes_from(v), n);
        }
        sum[row] = total;
    }
}
