/* Rows of gather-SpMM for AVX2 without VNNI: vpmaddubsw, u8 x s8 with the sums of two neighbours in 16 bits, saturated.
 *
 * Where one weight of two is not negative and the other one not positive, nothing saturates: 255 * 127 < 2^15. `pair`
 * brings most of a row into that order. For the rest weights are split into magnitude and sign, and codes are moved to
 * [-128, 127] and mirrored where the sign is negative: 2 * 127 * 128 < 2^15. What moving adds is known beforehand. */

QSP_INLINE __m256i i32x8_add_pairs(__m256i sum, __m256i pairs)
{
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

QSP_INLINE __m256i s8x32_four_weights(const int8_t *weight)
{
    int32_t four;
    memcpy(&four, weight, sizeof four);
    return _mm256_set1_epi32(four);
}

/* What codes are xored with: that makes x - 128 where s is positive, 127 - x where it is negative. */
QSP_INLINE __m256i u8x32_flip(__m256i s)
{
    return _mm256_xor_si256(_mm256_cmpgt_epi8(_mm256_setzero_si256(), s), _mm256_set1_epi8((char)0x80));
}

/* What moving and mirroring adds to the sum of a row. */
QSP_INLINE int32_t excess_of(const int8_t *weight, int64_t groups)
{
    __m128i sum = _mm_setzero_si128();
    for (int64_t g = 0; g < groups;) {
        __m128i w;
        if (groups - g >= 4) {
            w = _mm_loadu_si128((const __m128i *)(weight + QSP_GROUP * g));
            g += 4;
        } else {
            int32_t four;
            memcpy(&four, weight + QSP_GROUP * g++, sizeof four);
            w = _mm_cvtsi32_si128(four);
        }
        const __m128i flip = _mm_xor_si128(_mm_cmpgt_epi8(_mm_setzero_si128(), w), _mm_set1_epi8((char)0x80));
        sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_maddubs_epi16(_mm_abs_epi8(w), flip), _mm_set1_epi16(1)));
    }
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

/* How many slots before their use codes are fetched: every nonzero reads a line of its own, in no order and mostly from
 * the second-level cache, and waiting took a fifth of the time. */
enum { SPMM_AHEAD = 24, SDDMM_AHEAD = 12 };

/* One step: a group of nonzeros, a unit of lanes. `next`: offsets of a later step. */
QSP_INLINE void spmm_step_u8s8(__m256i *sum, const uint8_t *x, const int32_t *offset, const int32_t *next,
                               const int8_t *weight, const int mirrored)
{
    const __m256i w = s8x32_four_weights(weight), magnitude = _mm256_abs_epi8(w), flip = u8x32_flip(w);
    const uint8_t *a = x + offset[0], *b = x + offset[1], *c = x + offset[2], *d = x + offset[3];
    QSP_UNROLL
    for (int j = 0; j < QSP_GROUP; j++)
        _mm_prefetch((const char *)x + next[j], _MM_HINT_T0);
    QSP_UNROLL
    for (int h = 0; h < 2; h++) {
        const u8x32x4 t = u8x32x4_interleave(a + 32 * h, b + 32 * h, c + 32 * h, d + 32 * h);
        QSP_UNROLL
        for (int i = 0; i < QSP_GROUP; i++)
            sum[QSP_GROUP * h + i] = i32x8_add_pairs(
                sum[QSP_GROUP * h + i], mirrored ? _mm256_maddubs_epi16(magnitude, _mm256_xor_si256(t.v[i], flip))
                                                 : _mm256_maddubs_epi16(t.v[i], w));
    }
}

/* Sums of one row on codes, in the order of spmm_acc_lane; `last`: offsets of the list's last group. */
QSP_INLINE void spmm_row_u8s8(const uint8_t *x, const int32_t *offset, const int32_t *last, const int8_t *weight,
                              int64_t groups, int64_t paired, int32_t start, int32_t *out)
{
    __m256i sum[8];
    const int32_t excess = paired < groups ? excess_of(weight + QSP_GROUP * paired, groups - paired) : 0;
    const __m256i first = _mm256_set1_epi32((int32_t)((uint32_t)start - (uint32_t)excess));
    QSP_UNROLL
    for (int i = 0; i < 8; i++)
        sum[i] = first;
    int64_t g = 0;
    for (; g < paired; g++, offset += QSP_GROUP)
        spmm_step_u8s8(sum, x, offset, last - offset > SPMM_AHEAD ? offset + SPMM_AHEAD : last, weight + QSP_GROUP * g,
                       0);
    for (; g < groups; g++, offset += QSP_GROUP)
        spmm_step_u8s8(sum, x, offset, last - offset > SPMM_AHEAD ? offset + SPMM_AHEAD : last, weight + QSP_GROUP * g,
                       1);
    QSP_UNROLL
    for (int i = 0; i < 8; i++)
        _mm256_storeu_si256((__m256i *)(out + 8 * i), sum[i]);
}

/* Shuffles of four integers, and of four bytes, that bring those whose bit is set to the front. */
#define FRONT_4(a, b, c, d) {4 * a, 4 * a + 1, 4 * a + 2, 4 * a + 3, 4 * b, 4 * b + 1, 4 * b + 2, 4 * b + 3, \
                             4 * c, 4 * c + 1, 4 * c + 2, 4 * c + 3, 4 * d, 4 * d + 1, 4 * d + 2, 4 * d + 3}
static const uint8_t front[16][16] = {
    FRONT_4(0, 1, 2, 3), FRONT_4(0, 1, 2, 3), FRONT_4(1, 0, 2, 3), FRONT_4(0, 1, 2, 3),
    FRONT_4(2, 0, 1, 3), FRONT_4(0, 2, 1, 3), FRONT_4(1, 2, 0, 3), FRONT_4(0, 1, 2, 3),
    FRONT_4(3, 0, 1, 2), FRONT_4(0, 3, 1, 2), FRONT_4(1, 3, 0, 2), FRONT_4(0, 1, 3, 2),
    FRONT_4(2, 3, 0, 1), FRONT_4(0, 2, 3, 1), FRONT_4(1, 2, 3, 0), FRONT_4(0, 1, 2, 3),
};
#undef FRONT_4

enum { PAIRED_SLOTS = 1024 }; /* of a row that are brought into order together */

/* Whether neither pair of a group saturates. */
QSP_INLINE int is_paired(const int8_t *w)
{
    int ok = 1;
    for (int i = 0; i < QSP_GROUP; i += 2)
        ok &= (w[i] < 0) != (w[i + 1] < 0) || (w[i] + w[i + 1] <= 128 && w[i] + w[i + 1] >= -128);
    return ok;
}

static void pair_kernel(const qsp_list *list, const int8_t *weights, int64_t first, int64_t last, int32_t *paired,
                        int32_t *offset_out, int8_t *weights_out)
{
    /* the nonzeros of one sign each, weights as integers */
    int32_t offset[2][PAIRED_SLOTS + QSP_GROUP], weight[2][PAIRED_SLOTS + QSP_GROUP];
    for (int64_t row = first; row < last; row++) {
        const int64_t begin = qsp_first_slot(list, row), end = qsp_first_slot(list, row + 1);
        int64_t to = begin, rest = end; /* pairs are written from the front, what is left over from the end */
        for (int64_t from = begin; from < end; from += PAIRED_SLOTS) {
            const int64_t n = qsp_min(PAIRED_SLOTS, end - from);
            int64_t count[2] = {0, 0};
            for (int64_t k = from; k < from + n; k += QSP_GROUP) {
                int32_t four;
                memcpy(&four, weights + k, sizeof four);
                const __m128i w = _mm_cvtepi8_epi32(_mm_cvtsi32_si128(four));
                const __m128i o = _mm_loadu_si128((const __m128i *)(list->offset + k));
                const int negative = _mm_movemask_ps(_mm_castsi128_ps(w));
                QSP_UNROLL
                for (int s = 0; s < 2; s++) {
                    const int here = s ? negative : negative ^ 15;
                    const __m128i order = _mm_loadu_si128((const __m128i *)front[here]);
                    _mm_storeu_si128((__m128i *)(offset[s] + count[s]), _mm_shuffle_epi8(o, order));
                    _mm_storeu_si128((__m128i *)(weight[s] + count[s]), _mm_shuffle_epi8(w, order));
                    count[s] += (0x4332322132212110 >> 4 * here) & 15;
                }
            }
            const int64_t pairs = qsp_min(count[0], count[1]);
            int64_t i = 0;
            for (; i + 4 <= pairs; i += 4, to += 8) {
                const __m128i o = _mm_loadu_si128((const __m128i *)(offset[0] + i));
                const __m128i p = _mm_loadu_si128((const __m128i *)(offset[1] + i));
                _mm_storeu_si128((__m128i *)(offset_out + to), _mm_unpacklo_epi32(o, p));
                _mm_storeu_si128((__m128i *)(offset_out + to + 4), _mm_unpackhi_epi32(o, p));
                const __m128i u = _mm_loadu_si128((const __m128i *)(weight[0] + i));
                const __m128i v = _mm_loadu_si128((const __m128i *)(weight[1] + i));
                const __m128i words = _mm_packs_epi32(_mm_unpacklo_epi32(u, v), _mm_unpackhi_epi32(u, v));
                _mm_storel_epi64((__m128i *)(weights_out + to), _mm_packs_epi16(words, words));
            }
            for (; i < pairs; i++)
                for (int s = 0; s < 2; s++, to++) {
                    offset_out[to] = offset[s][i];
                    weights_out[to] = (int8_t)weight[s][i];
                }
            const int more = count[1] > pairs;
            for (; i < count[more]; i++) {
                offset_out[--rest] = offset[more][i];
                weights_out[rest] = (int8_t)weight[more][i];
            }
        }
        /* of what is left over small weights come into question as well */
        int64_t k = to & ~(int64_t)(QSP_GROUP - 1);
        while (k < end && is_paired(weights_out + k))
            k += QSP_GROUP;
        paired[row] = (int32_t)((k - begin) / QSP_GROUP);
    }
}
