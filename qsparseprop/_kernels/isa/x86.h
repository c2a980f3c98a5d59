/* What the x86 paths share: pieces that 512-bit vectors do not make faster. */

/* ---- random numbers ---- */

/* Four results of qsp_random_bits from their counters. */
QSP_INLINE __m256i u64x4_random_mix(__m256i x)
{
    x = _mm256_xor_si256(x, _mm256_mul_epu32(x, _mm256_set1_epi64x(QSP_RANDOM_1)));
    x = _mm256_shuffle_epi32(x, 0xb1);
    x = _mm256_xor_si256(x, _mm256_mul_epu32(x, _mm256_set1_epi64x(QSP_RANDOM_2)));
    x = _mm256_shuffle_epi32(x, 0xb1);
    return _mm256_xor_si256(x, _mm256_mul_epu32(x, _mm256_set1_epi64x(QSP_RANDOM_3)));
}

/* Counters a, b, c, d steps behind that of an element. */
QSP_INLINE __m256i u64x4_random_counters(uint64_t start, uint64_t step, int a, int b, int c, int d)
{
    return _mm256_add_epi64(_mm256_set1_epi64x((long long)start),
                            _mm256_setr_epi64x((long long)(a * step), (long long)(b * step), (long long)(c * step),
                                               (long long)(d * step)));
}

/* Four elements as 64-bit integers whose low 32 bits are the dither: of 64-bit element numbers. */
QSP_INLINE __m256i u64x4_dither(uint64_t seed, __m256i index)
{
    const __m256i four = _mm256_srli_epi64(index, 2), low = _mm256_set1_epi64x((uint32_t)QSP_RANDOM_STEP);
    const __m256i high = _mm256_set1_epi64x((long long)(QSP_RANDOM_STEP >> 32));
    const __m256i cross = _mm256_add_epi64(_mm256_mul_epu32(four, high),
                                           _mm256_mul_epu32(_mm256_srli_epi64(four, 32), low));
    __m256i x = _mm256_add_epi64(_mm256_mul_epu32(four, low), _mm256_slli_epi64(cross, 32));
    x = u64x4_random_mix(_mm256_add_epi64(x, _mm256_set1_epi64x((long long)seed)));
    const __m256i place = _mm256_slli_epi64(_mm256_and_si256(index, _mm256_set1_epi64x(3)), 4);
    return _mm256_blend_epi16(_mm256_srlv_epi64(x, place), _mm256_set1_epi32(QSP_DITHER_BITS), 0xaa);
}

/* Not inline: it serves odd shapes only, and is long. */
QSP_APART i32x16 i32x16_random_strided(uint64_t seed, uint64_t index, int64_t step)
{
    const __m256i by = _mm256_set1_epi64x(4 * step);
    QSP_ALIGNED(32) int32_t line[16];
    __m256i at = u64x4_random_counters(index, (uint64_t)step, 0, 1, 2, 3);
    for (int i = 0; i < 16; i += 4) {
        const __m256i low =
            _mm256_permutevar8x32_epi32(u64x4_dither(seed, at), _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
        _mm_store_si128((__m128i *)(line + i), _mm256_castsi256_si128(low));
        at = _mm256_add_epi64(at, by);
    }
    return i32x16_load_n(line, 16);
}
