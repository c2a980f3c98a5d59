/* Dense rows in 256-bit vectors, for what avx2.h names. Sixteen registers hold the sums of a few rows and sixteen lanes,
 * so a unit is walked in four parts. Without VNNI bytes become 16 bits, whose products are summed up in 32. */

/* Two halves of a unit, one after the other. */
QSP_INLINE void dense_interleave(uint8_t *quad, const uint8_t *x, const int32_t *offset)
{
    const uint8_t *a = x + offset[0], *b = x + offset[1], *c = x + offset[2], *d = x + offset[3];
    QSP_UNROLL
    for (int h = 0; h < 2; h++) {
        const u8x32x4 t = u8x32x4_interleave(a + 32 * h, b + 32 * h, c + 32 * h, d + 32 * h);
        QSP_UNROLL
        for (int i = 0; i < QSP_GROUP; i++)
            _mm256_store_si256((__m256i *)(quad + 128 * h + 32 * i), t.v[i]);
    }
}

#if ISA_DOT == DOT_MADDUBS
#define ISA_DENSE_ROWS 4
#define ISA_DENSE_GRAD_ROWS 4

/* Of each four bytes the first and the third, or the second and the fourth, as 16 bits. */
QSP_INLINE __m256i u16x16_even(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi16(0xff)); }
QSP_INLINE __m256i u16x16_odd(__m256i v) { return _mm256_srli_epi16(v, 8); }
#else
#define ISA_DENSE_ROWS 6
#define ISA_DENSE_GRAD_ROWS 6
#endif

#if ISA_DOT == DOT_MADDUBS
/* Weights as 16 bits: of each four the first and the third, then the second and the fourth. */
QSP_INLINE void dense_widen(int16_t *wide, const int8_t *weights, int64_t groups)
{
    for (int64_t k = 0; k < QSP_GROUP * groups; k += QSP_GROUP) {
        wide[k] = weights[k];
        wide[k + 1] = weights[k + 2];
        wide[k + 2] = weights[k + 1];
        wide[k + 3] = weights[k + 3];
    }
}

QSP_INLINE __m256i s16x16_pair(const int16_t *p)
{
    int32_t two;
    memcpy(&two, p, sizeof two);
    return _mm256_set1_epi32(two);
}
#endif

QSP_INLINE void dense_spmm_block(int32_t *sums, const uint8_t *quads, const int8_t *weights, int64_t pitch,
                                 int64_t groups, const int rows)
{
#if ISA_DOT == DOT_MADDUBS
    int16_t wide[ISA_DENSE_ROWS][QSP_DENSE_PLANES];
    for (int r = 0; r < rows; r++)
        dense_widen(wide[r], weights + r * pitch, groups);
#endif
    for (int part = 0; part < 4; part++) {
        __m256i s[ISA_DENSE_ROWS][2];
        QSP_UNROLL
        for (int r = 0; r < rows; r++)
            QSP_UNROLL
            for (int v = 0; v < 2; v++)
                s[r][v] = _mm256_loadu_si256((const __m256i *)(sums + r * QSP_UNIT + 16 * part + 8 * v));
        const uint8_t *q = quads + 64 * part;
        for (int64_t k = 0; k < groups; k++, q += QSP_GROUP * QSP_UNIT) {
            const __m256i x = _mm256_load_si256((const __m256i *)q), y = _mm256_load_si256((const __m256i *)(q + 32));
#if ISA_DOT == DOT_MADDUBS
            const __m256i x_even = u16x16_even(x), x_odd = u16x16_odd(x), y_even = u16x16_even(y), y_odd = u16x16_odd(y);
            QSP_UNROLL
            for (int r = 0; r < rows; r++) {
                const __m256i even = s16x16_pair(wide[r] + QSP_GROUP * k), odd = s16x16_pair(wide[r] + QSP_GROUP * k + 2);
                s[r][0] = _mm256_add_epi32(s[r][0], _mm256_madd_epi16(x_even, even));
                s[r][1] = _mm256_add_epi32(s[r][1], _mm256_madd_epi16(y_even, even));
                s[r][0] = _mm256_add_epi32(s[r][0], _mm256_madd_epi16(x_odd, odd));
                s[r][1] = _mm256_add_epi32(s[r][1], _mm256_madd_epi16(y_odd, odd));
            }
#else
            QSP_UNROLL
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, weights + r * pitch + QSP_GROUP * k, sizeof four);
                const __m256i w = _mm256_set1_epi32(four);
                s[r][0] = i32x8_dot_u8s8(s[r][0], x, w);
                s[r][1] = i32x8_dot_u8s8(s[r][1], y, w);
            }
#endif
        }
        QSP_UNROLL
        for (int r = 0; r < rows; r++)
            QSP_UNROLL
            for (int v = 0; v < 2; v++)
                _mm256_storeu_si256((__m256i *)(sums + r * QSP_UNIT + 16 * part + 8 * v), s[r][v]);
    }
}

/* Entries of a table whose sums with ISA_DENSE_GRAD_ROWS rows stay in registers. */
enum { DENSE_ENTRIES = ISA_DOT == DOT_EVEX ? 4 : 2 };

QSP_INLINE void dense_sddmm_block(int32_t *sums, int64_t pitch, const uint8_t *x, const int64_t *x_lane,
                                  const int32_t *offset, const int8_t *grad, int64_t step, int64_t units,
                                  const int rows)
{
    __m256i total[ISA_DENSE_GRAD_ROWS][4]; /* of row j and entry k */
    for (int k = 0; k < 4; k += DENSE_ENTRIES) {
        __m256i s[ISA_DENSE_GRAD_ROWS][DENSE_ENTRIES];
        QSP_UNROLL
        for (int j = 0; j < rows; j++)
            QSP_UNROLL
            for (int e = 0; e < DENSE_ENTRIES; e++)
                s[j][e] = _mm256_setzero_si256();
        const int8_t *q = grad;
        for (int64_t u = 0; u < units; u++, q += step * QSP_UNIT) {
            const uint8_t *p = x + x_lane[u];
            QSP_UNROLL
            for (int h = 0; h < QSP_UNIT; h += 32) {
                __m256i v[DENSE_ENTRIES];
                QSP_UNROLL
                for (int e = 0; e < DENSE_ENTRIES; e++)
                    v[e] = u8x32_load(p + offset[k + e] + h);
                QSP_UNROLL
                for (int j = 0; j < rows; j++) {
                    const __m256i g = _mm256_load_si256((const __m256i *)(q + j * QSP_UNIT + h));
#if ISA_DOT == DOT_MADDUBS
                    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(g, 8), 8), odd = _mm256_srai_epi16(g, 8);
#endif
                    QSP_UNROLL
                    for (int e = 0; e < DENSE_ENTRIES; e++) {
#if ISA_DOT == DOT_MADDUBS
                        s[j][e] = _mm256_add_epi32(s[j][e], _mm256_madd_epi16(u16x16_even(v[e]), even));
                        s[j][e] = _mm256_add_epi32(s[j][e], _mm256_madd_epi16(u16x16_odd(v[e]), odd));
#else
                        s[j][e] = i32x8_dot_u8s8(s[j][e], v[e], g);
#endif
                    }
                }
            }
        }
        QSP_UNROLL
        for (int j = 0; j < rows; j++)
            QSP_UNROLL
            for (int e = 0; e < DENSE_ENTRIES; e++)
                total[j][k + e] = s[j][e];
    }
    QSP_UNROLL
    for (int j = 0; j < rows; j++) {
        __m128i *to = (__m128i *)(sums + j * pitch);
        _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), i32x8_reduce_four(total[j])));
    }
}
