/* What the x86 paths share: pieces that 512-bit vectors do not make faster. */

/* 16 x 16 bytes transposed in 128-bit registers. */
QSP_INLINE void codes_transpose(u8x16 *r)
{
    u8x16 t[16];
    for (int stage = 0; stage < 4; stage++) {
        QSP_UNROLL
        for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
            t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
        }
        QSP_UNROLL
        for (int i = 0; i < 16; i++)
            r[i] = t[i];
    }
}

/* The eight results of qsp_random_bits that serve 16 elements, whose indices follow each other from an even one on: in
 * memory, 16 numbers of 16 bits in the order of the elements. */
QSP_INLINE __m256i random_pairs(uint64_t seed, uint64_t index)
{
    const uint64_t pair = index >> 1;
    const __m256i high = _mm256_set1_epi32((int)((uint32_t)(seed >> 32) ^ (uint32_t)(pair >> 32)));
    __m256i x = _mm256_add_epi32(_mm256_set1_epi32((int)(uint32_t)pair), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    x = _mm256_xor_si256(x, _mm256_set1_epi32((int)(uint32_t)seed));
    x = _mm256_mullo_epi32(x, _mm256_set1_epi32(0x7feb352d));
    x = _mm256_xor_si256(_mm256_xor_si256(x, high), _mm256_srli_epi32(x, 15));
    x = _mm256_mullo_epi32(x, _mm256_set1_epi32((int)0x846ca68bU));
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
}
