/* Rows of gather-SDDMM for AVX2 without VNNI, see avx2_maddubs_spmm.h. Here it is the gradient, whose neighbours are
 * given, that decides whether 16 bits suffice; that is found out for each row and set of units:
 *
 *   SUMS_OF_FOUR   for two vectors' sums of pairs together: nothing is larger than 255 * 128
 *   SUMS_OF_TWO    for the sum of a pair
 *   MIRRORED       for neither: magnitude and sign apart */
enum { MIRRORED, SUMS_OF_TWO, SUMS_OF_FOUR };

/* gcc turns a chain of additions into a tree, whose parts no longer fit into sixteen registers. */
#if defined(__GNUC__) && !defined(__clang__)
#define IN_ORDER(v) __asm__("" : "+x"(v))
#else
#define IN_ORDER(v) ((void)0)
#endif

/* All slots of a row, the gradient of `units` units, a constant at every call as `how` is. */
QSP_INLINE void sddmm_slots_u8s8(const qsp_list *list, int64_t row, const uint8_t *const *from, const __m256i *g,
                                 const __m256i *flip, __m256i first, int64_t *sums, const int units, const int how)
{
    const __m256i ones = _mm256_set1_epi16(1);
    const int64_t last = qsp_first_slot(list, list->rows) - QSP_GROUP, end = qsp_first_slot(list, row + 1);
    for (int64_t k = qsp_first_slot(list, row); k < end; k += QSP_GROUP) {
        const int32_t *next = list->offset + qsp_min(k + SDDMM_AHEAD, last); /* as in avx2_maddubs_spmm.h */
        sddmm_acc d[QSP_GROUP];
        QSP_UNROLL
        for (int j = 0; j < QSP_GROUP; j++) {
            const int64_t o = list->offset[k + j];
            QSP_UNROLL
            for (int i = 0; i < units; i++)
                _mm_prefetch((const char *)from[i] + next[j], _MM_HINT_T0);
            QSP_UNROLL
            for (int i = 0; i < units; i++) {
                __m256i p = u8x32_load(from[i] + o), q = u8x32_load(from[i] + o + 32);
                if (how == MIRRORED) {
                    p = _mm256_maddubs_epi16(g[2 * i], _mm256_xor_si256(p, flip[2 * i]));
                    q = _mm256_maddubs_epi16(g[2 * i + 1], _mm256_xor_si256(q, flip[2 * i + 1]));
                } else {
                    p = _mm256_maddubs_epi16(p, g[2 * i]);
                    q = _mm256_maddubs_epi16(q, g[2 * i + 1]);
                }
                p = _mm256_madd_epi16(how == SUMS_OF_FOUR ? _mm256_add_epi16(p, q) : p, ones);
                d[j] = i ? _mm256_add_epi32(d[j], p) : how == MIRRORED ? _mm256_add_epi32(first, p) : p;
                if (how != SUMS_OF_FOUR)
                    d[j] = i32x8_add_pairs(d[j], q);
                IN_ORDER(d[j]);
            }
        }
        sddmm_acc_flush(sums + k, d, QSP_GROUP);
    }
}

/* Up to two units with magnitude and sign apart. */
QSP_INLINE void sddmm_mirrored(const qsp_sddmm *a, const uint8_t *const *from, const __m256i *g, int64_t row,
                               int64_t *sums, const int units)
{
    __m256i magnitude[4], flip[4], first = _mm256_setzero_si256();
    QSP_UNROLL
    for (int v = 0; v < 2 * units; v++) {
        magnitude[v] = _mm256_abs_epi8(g[v]);
        flip[v] = u8x32_flip(g[v]);
        first = i32x8_add_pairs(first, _mm256_maddubs_epi16(magnitude[v], flip[v]));
    }
    first = _mm256_sub_epi32(_mm256_setzero_si256(), first); /* what moving the codes adds */
    sddmm_slots_u8s8(&a->list, row, from, magnitude, flip, first, sums, units, MIRRORED);
}

QSP_INLINE void sddmm_row_u8s8(const qsp_sddmm *a, const uint8_t *const *x, const uint8_t *const *dy, int64_t row,
                               int64_t *sums, int64_t *dy_sum, const int units)
{
    const int64_t plane = row * a->dy_grid.pitch;
    const __m256i ones = _mm256_set1_epi8(1), none = _mm256_setzero_si256();
    __m256i g[2 * ISA_SDDMM_UNITS], total = none, two = none, four = none;
    /* the positive numbers of a sum, or the negative ones, amount to (sum of magnitudes + |sum|) / 2, or less */
    QSP_UNROLL
    for (int i = 0; i < units; i++) {
        __m256i sum = none, size = none;
        QSP_UNROLL
        for (int v = 2 * i; v < 2 * i + 2; v++) {
            g[v] = s8x32_load_code(dy[i] + plane + 32 * (v & 1));
            const __m256i s = _mm256_maddubs_epi16(ones, g[v]), m = _mm256_maddubs_epi16(_mm256_abs_epi8(g[v]), ones);
            two = _mm256_max_epi16(two, _mm256_add_epi16(m, _mm256_abs_epi16(s)));
            sum = _mm256_add_epi16(sum, s);
            size = _mm256_add_epi16(size, m);
        }
        four = _mm256_max_epi16(four, _mm256_add_epi16(size, _mm256_abs_epi16(sum)));
        total = i32x8_add_pairs(total, sum);
    }
    *dy_sum += sddmm_acc_reduce_add(total);
    const __m256i most = _mm256_set1_epi16(2 * 128);
    if (!_mm256_movemask_epi8(_mm256_cmpgt_epi16(four, most)))
        sddmm_slots_u8s8(&a->list, row, x, g, NULL, none, sums, units, SUMS_OF_FOUR);
    else if (!_mm256_movemask_epi8(_mm256_cmpgt_epi16(two, most)))
        sddmm_slots_u8s8(&a->list, row, x, g, NULL, none, sums, units, SUMS_OF_TWO);
    else
        for (int i = 0; i < units; i += 2)
            sddmm_mirrored(a, x + i, g + 2 * i, row, sums, units < 2 ? 1 : 2);
}
