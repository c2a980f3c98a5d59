/* Primitives in 256-bit vectors. The dot product of bytes is chosen by ISA_DOT:
 *
 *   DOT_MADDUBS  AVX2 alone, which has none: see maddubs_spmm.h and maddubs_sddmm.h
 *   DOT_VEX      AVX-VNNI
 *   DOT_EVEX     AVX-512 VL + VNNI: for processors on which 512-bit vectors lower the clock
 */
#define DOT_MADDUBS 0
#define DOT_VEX 1
#define DOT_EVEX 2

#define ISA_UNIT_VECTORS 2 /* vectors of codes in one unit */
#define ISA_SDDMM_UNITS (ISA_DOT == DOT_MADDUBS ? 4 : 2) /* units whose gradient stays in registers */
#define ISA_QUADS 1        /* independent sums of one row: sixteen registers hold no second one */

/* ---- 16 floats ---- */
typedef struct {
    __m256 a, b;
} f16x;

QSP_INLINE __m256i first8(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
QSP_INLINE f16x f16_of(__m256 a, __m256 b)
{
    const f16x r = {a, b};
    return r;
}
QSP_INLINE f16x f16_set1(float v) { return f16_of(_mm256_set1_ps(v), _mm256_set1_ps(v)); }
QSP_INLINE f16x f16_zero(void) { return f16_of(_mm256_setzero_ps(), _mm256_setzero_ps()); }
QSP_INLINE f16x f16_load(const float *p) { return f16_of(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
QSP_INLINE f16x f16_load_n(const float *p, int n)
{
    return f16_of(_mm256_maskload_ps(p, first8(n)), _mm256_maskload_ps(p + 8, first8(n - 8)));
}
QSP_INLINE __m256 bf16_8(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
QSP_INLINE f16x f16_load_bf16(const uint16_t *p) { return f16_of(bf16_8(p), bf16_8(p + 8)); }
QSP_INLINE f16x f16_load_bf16_n(const uint16_t *p, int n)
{
    uint16_t line[16] = {0};
    memcpy(line, p, (size_t)n * sizeof *p);
    return f16_load_bf16(line);
}
QSP_INLINE __m256 sums8(const int32_t *p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)p)); }
QSP_INLINE f16x f16_load_sums(const int32_t *p) { return f16_of(sums8(p), sums8(p + 8)); }
QSP_INLINE void f16_store(float *p, f16x v)
{
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
QSP_INLINE void f16_store_n(float *p, f16x v, int n)
{
    _mm256_maskstore_ps(p, first8(n), v.a);
    _mm256_maskstore_ps(p + 8, first8(n - 8), v.b);
}
/* Nearest even; a NaN stays one. */
QSP_INLINE __m256i bf16_bits8(__m256 v)
{
    const __m256i x = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
QSP_INLINE void f16_store_bf16(uint16_t *p, f16x v)
{
    const __m256i words = _mm256_packus_epi32(bf16_bits8(v.a), bf16_bits8(v.b));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(words, 0xd8));
}
QSP_INLINE void f16_store_bf16_n(uint16_t *p, f16x v, int n)
{
    uint16_t line[16];
    f16_store_bf16(line, v);
    memcpy(p, line, (size_t)n * sizeof *p);
}
QSP_INLINE f16x f16_mul(f16x x, f16x y) { return f16_of(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
QSP_INLINE f16x f16_add(f16x x, f16x y) { return f16_of(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
QSP_INLINE f16x f16_sub(f16x x, f16x y) { return f16_of(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
QSP_INLINE f16x f16_div(f16x x, f16x y) { return f16_of(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
QSP_INLINE f16x f16_fma(f16x x, f16x y, f16x z)
{
    return f16_of(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
QSP_INLINE f16x f16_min(f16x x, f16x y) { return f16_of(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
QSP_INLINE f16x f16_max(f16x x, f16x y) { return f16_of(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
/* Bits of the places where low < v < high, and what is left of v with all others zero. */
QSP_INLINE uint32_t between8(__m256 v, __m256 low, __m256 high)
{
    const __m256 in = _mm256_and_ps(_mm256_cmp_ps(low, v, _CMP_LT_OQ), _mm256_cmp_ps(v, high, _CMP_LT_OQ));
    return (uint32_t)_mm256_movemask_ps(in);
}
QSP_INLINE uint32_t f16_between(f16x v, f16x low, f16x high)
{
    return between8(v.a, low.a, high.a) | between8(v.b, low.b, high.b) << 8;
}
QSP_INLINE __m256 keep8(__m256 v, uint32_t bits)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i in = _mm256_and_si256(_mm256_set1_epi32((int)bits), bit);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(in, bit)));
}
QSP_INLINE f16x f16_keep(f16x v, uint32_t bits) { return f16_of(keep8(v.a, bits), keep8(v.b, bits >> 8)); }
QSP_INLINE __m256 from_codes8(const uint8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
QSP_INLINE f16x f16_from_codes(const uint8_t *p) { return f16_of(from_codes8(p), from_codes8(p + 8)); }
QSP_INLINE float f16_sum(f16x v)
{
    const __m256 s = _mm256_add_ps(v.a, v.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
QSP_INLINE float f16_least(f16x v)
{
    float line[16], s;
    f16_store(line, v);
    s = line[0];
    for (int i = 1; i < 16; i++)
        s = line[i] < s ? line[i] : s;
    return s;
}
QSP_INLINE float f16_greatest(f16x v)
{
    float line[16], s;
    f16_store(line, v);
    s = line[0];
    for (int i = 1; i < 16; i++)
        s = line[i] > s ? line[i] : s;
    return s;
}
/* The magnitude of v, with the sign of another. */
QSP_INLINE __m256 copysign8(__m256 v, __m256 sign)
{
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, v), _mm256_and_ps(bit, sign));
}
QSP_INLINE f16x f16_copysign(f16x v, f16x sign) { return f16_of(copysign8(v.a, sign.a), copysign8(v.b, sign.b)); }
QSP_INLINE f16x f16_abs(f16x v)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return f16_of(_mm256_andnot_ps(sign, v.a), _mm256_andnot_ps(sign, v.b));
}
/* One where v is not zero, otherwise zero. */
QSP_INLINE f16x f16_is_nonzero(f16x v)
{
    const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1.0f);
    return f16_of(_mm256_and_ps(_mm256_cmp_ps(v.a, zero, _CMP_NEQ_UQ), one),
                  _mm256_and_ps(_mm256_cmp_ps(v.b, zero, _CMP_NEQ_UQ), one));
}

/* ---- 16 doubles: sums of floats ---- */
typedef struct {
    __m256d a, b, c, d;
} d16x;
QSP_INLINE d16x d16_load(const double *p)
{
    const d16x r = {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8), _mm256_loadu_pd(p + 12)};
    return r;
}
QSP_INLINE void d16_store(double *p, d16x v)
{
    _mm256_storeu_pd(p, v.a);
    _mm256_storeu_pd(p + 4, v.b);
    _mm256_storeu_pd(p + 8, v.c);
    _mm256_storeu_pd(p + 12, v.d);
}
QSP_INLINE d16x d16_from(f16x v)
{
    const d16x r = {_mm256_cvtps_pd(_mm256_castps256_ps128(v.a)), _mm256_cvtps_pd(_mm256_extractf128_ps(v.a, 1)),
                    _mm256_cvtps_pd(_mm256_castps256_ps128(v.b)), _mm256_cvtps_pd(_mm256_extractf128_ps(v.b, 1))};
    return r;
}
QSP_INLINE d16x d16_load_floats(const float *p) /* fewer instructions than taking a vector to pieces */
{
    const d16x r = {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4)),
                    _mm256_cvtps_pd(_mm_loadu_ps(p + 8)), _mm256_cvtps_pd(_mm_loadu_ps(p + 12))};
    return r;
}
QSP_INLINE d16x d16_add(d16x x, d16x y)
{
    const d16x r = {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b), _mm256_add_pd(x.c, y.c), _mm256_add_pd(x.d, y.d)};
    return r;
}
/* sum + v^2, where the square of a float is exact: fused or not, the result is the same. */
QSP_INLINE d16x d16_add_square(d16x sum, d16x v)
{
    const d16x r = {_mm256_fmadd_pd(v.a, v.a, sum.a), _mm256_fmadd_pd(v.b, v.b, sum.b),
                    _mm256_fmadd_pd(v.c, v.c, sum.c), _mm256_fmadd_pd(v.d, v.d, sum.d)};
    return r;
}
QSP_INLINE __m256 gather8(const float *base, const int32_t *index, int n)
{
    const __m256i here = first8(n), i = _mm256_maskload_epi32(index, here);
    const __m256i used = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_setzero_si256(), i), here);
    return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), base, i, _mm256_castsi256_ps(used), 4);
}
QSP_INLINE f16x f16_gather(const float *base, const int32_t *index, int n)
{
    return f16_of(gather8(base, index, n), gather8(base, index + 8, n - 8));
}

/* 8 x 8 floats: rows 0..7 of r, halves `from`, into t */
QSP_INLINE void transpose8(__m256 *r)
{
    __m256 t[8];
    QSP_UNROLL
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    QSP_UNROLL
    for (int i = 0; i < 2; i++) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    QSP_UNROLL
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    QSP_UNROLL
    for (int i = 0; i < 8; i++)
        r[i] = t[i];
}
QSP_INLINE void f16_transpose(f16x *r)
{
    __m256 t[8], u[8];
    QSP_UNROLL
    for (int i = 0; i < 8; i++)
        t[i] = r[i].a;
    transpose8(t);
    QSP_UNROLL
    for (int i = 0; i < 8; i++)
        u[i] = r[i + 8].b;
    transpose8(u);
    __m256 right[8], down[8];
    QSP_UNROLL
    for (int i = 0; i < 8; i++) {
        right[i] = r[i].b;
        down[i] = r[i + 8].a;
    }
    transpose8(right);
    transpose8(down);
    QSP_UNROLL
    for (int i = 0; i < 8; i++) {
        r[i] = f16_of(t[i], down[i]);
        r[i + 8] = f16_of(right[i], u[i]);
    }
}

/* ---- 16 integers, absolute values as integers, 16 codes ---- */
typedef struct {
    __m256i a, b;
} i32x16;
typedef i32x16 u32x16;
typedef __m128i u8x16;

QSP_INLINE i32x16 i32_of(__m256i a, __m256i b)
{
    const i32x16 r = {a, b};
    return r;
}
#define EACH_HALF(f, x, y) i32_of(f((x).a, (y).a), f((x).b, (y).b))
QSP_INLINE i32x16 i32_set1(int32_t v) { return i32_of(_mm256_set1_epi32(v), _mm256_set1_epi32(v)); }
QSP_INLINE i32x16 i32_load_n(const int32_t *p, int n)
{
    return i32_of(_mm256_maskload_epi32(p, first8(n)), _mm256_maskload_epi32(p + 8, first8(n - 8)));
}
QSP_INLINE i32x16 i32_nearest(f16x v) { return i32_of(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)); }
QSP_INLINE i32x16 i32_truncated(f16x v) { return i32_of(_mm256_cvttps_epi32(v.a), _mm256_cvttps_epi32(v.b)); }
QSP_INLINE f16x f16_from_bits(i32x16 v) { return f16_of(_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)); }
QSP_INLINE i32x16 i32_add(i32x16 x, i32x16 y) { return EACH_HALF(_mm256_add_epi32, x, y); }
QSP_INLINE i32x16 i32_sub(i32x16 x, i32x16 y) { return EACH_HALF(_mm256_sub_epi32, x, y); }
QSP_INLINE i32x16 i32_min(i32x16 x, i32x16 y) { return EACH_HALF(_mm256_min_epi32, x, y); }
QSP_INLINE i32x16 i32_max(i32x16 x, i32x16 y) { return EACH_HALF(_mm256_max_epi32, x, y); }
QSP_INLINE i32x16 i32_shift_left(i32x16 v, i32x16 n) { return EACH_HALF(_mm256_sllv_epi32, v, n); }
QSP_INLINE i32x16 i32_shift_right(i32x16 v, i32x16 n) { return EACH_HALF(_mm256_srlv_epi32, v, n); }
/* Position of the highest bit of 0 < v < 2^24; negative for 0. */
QSP_INLINE __m256i log2_8(__m256i v)
{
    const __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(v));
    return _mm256_sub_epi32(_mm256_srai_epi32(bits, 23), _mm256_set1_epi32(127));
}
QSP_INLINE i32x16 i32_log2(i32x16 v) { return i32_of(log2_8(v.a), log2_8(v.b)); }
/* v, negative where `sign` is, and zero where it is. */
QSP_INLINE i32x16 i32_signed(i32x16 v, i32x16 sign) { return EACH_HALF(_mm256_sign_epi32, v, sign); }
QSP_INLINE i32x16 i32_load_u8(const uint8_t *p)
{
    const __m128i v = _mm_loadu_si128((const __m128i *)p);
    return i32_of(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}
QSP_INLINE i32x16 i32_load_s8(const uint8_t *p)
{
    const __m128i v = _mm_loadu_si128((const __m128i *)p);
    return i32_of(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)));
}
QSP_INLINE f16x f16_from(i32x16 v) { return f16_of(_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)); }
QSP_INLINE int32_t total8(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
QSP_INLINE int32_t i32_sum(i32x16 v) { return total8(_mm256_add_epi32(v.a, v.b)); }
QSP_INLINE u32x16 u32_zero(void) { return i32_set1(0); }
QSP_INLINE u32x16 u32_load(const float *p)
{
    return i32_of(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8)));
}
QSP_INLINE void u32_store(float *p, u32x16 v)
{
    _mm256_storeu_si256((__m256i *)p, v.a);
    _mm256_storeu_si256((__m256i *)(p + 8), v.b);
}
QSP_INLINE u32x16 u32_max_abs(u32x16 m, f16x v)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    return i32_of(_mm256_max_epu32(m.a, _mm256_and_si256(_mm256_castps_si256(v.a), magnitude)),
                  _mm256_max_epu32(m.b, _mm256_and_si256(_mm256_castps_si256(v.b), magnitude)));
}
QSP_INLINE uint32_t u32_greatest(u32x16 v)
{
    uint32_t line[8], s = 0;
    _mm256_storeu_si256((__m256i *)line, _mm256_max_epu32(v.a, v.b));
    for (int i = 0; i < 8; i++)
        s = line[i] > s ? line[i] : s;
    return s;
}

/* Bytes of v in [-128, 127], saturated: weights, and codes minus 128. */
QSP_INLINE u8x16 codes_signed(i32x16 v)
{
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
QSP_INLINE u8x16 codes_from(i32x16 v) { return _mm_xor_si128(codes_signed(v), _mm_set1_epi8((char)0x80)); }
QSP_INLINE void codes_store(uint8_t *p, u8x16 v) { _mm_storeu_si128((__m128i *)p, v); }
QSP_INLINE void codes_copy_n(uint8_t *p, const uint8_t *from, int n)
{
    for (int i = 0; i < n; i++) /* fewer than 16: a call would cost more */
        p[i] = from[i];
}
QSP_INLINE void codes_store_n(uint8_t *p, u8x16 v, int n)
{
    uint8_t line[16];
    codes_store(line, v);
    memcpy(p, line, (size_t)n);
}

#include "x86.h"

/* 16 lanes (rows) x 16 channels of codes minus 128 -> codes, a channel's lanes together. */
QSP_INLINE void codes_tile_store(uint8_t *p, int64_t pitch, const i32x16 *rows)
{
    u8x16 tile[16];
    QSP_UNROLL
    for (int j = 0; j < 16; j++)
        tile[j] = codes_from(rows[j]);
    codes_transpose(tile);
    QSP_UNROLL
    for (int j = 0; j < 16; j++)
        codes_store(p + j * pitch, tile[j]);
}

/* ---- random numbers, see x86.h ---- */

/* Words that follow each other, as the dither of 16 elements: in the low half of each vector come the first four words,
 * in its high half the third four. */
QSP_INLINE i32x16 dither_from(__m256i words)
{
    const __m256i above = _mm256_set1_epi16(QSP_DITHER_BITS >> 16);
    return i32_of(_mm256_unpacklo_epi16(words, above), _mm256_unpackhi_epi16(words, above));
}

/* Of 16 elements whose indices follow each other from a multiple of four on. */
QSP_INLINE i32x16 random_run(uint64_t seed, uint64_t index)
{
    return dither_from(random_mix(random_counters(qsp_random_counter(seed, index), QSP_RANDOM_STEP, 0, 2, 1, 3)));
}

/* Of rows of 16 elements, which start at `index` and then `step` apart, both multiples of four; two at a time. */
typedef struct {
    __m256i counters, step;
} random_rows;

QSP_INLINE random_rows random_rows_from(uint64_t seed, uint64_t index, int64_t step)
{
    const uint64_t by = (uint64_t)(step >> 2) * QSP_RANDOM_STEP;
    const random_rows r = {random_counters(qsp_random_counter(seed, index), QSP_RANDOM_STEP, 0, 2, 1, 3),
                           _mm256_set1_epi64x((long long)by)};
    return r;
}
QSP_INLINE void random_rows_next(random_rows *r, i32x16 *out)
{
    QSP_UNROLL
    for (int i = 0; i < 2; i++) {
        out[i] = dither_from(random_mix(r->counters));
        r->counters = _mm256_add_epi64(r->counters, r->step);
    }
}

/* Of 16 times four neighbouring elements, which start at `index` and then `step` apart, both multiples of four: out[i]
 * has the sixteen that come as number i. */
QSP_INLINE void fours8(__m256i x, __m256i y, __m256i *out)
{
    const __m256i even = _mm256_unpacklo_epi16(x, y), odd = _mm256_unpackhi_epi16(x, y);
    const i32x16 first = dither_from(_mm256_unpacklo_epi16(even, odd));
    const i32x16 last = dither_from(_mm256_unpackhi_epi16(even, odd));
    out[0] = first.a;
    out[1] = first.b;
    out[2] = last.a;
    out[3] = last.b;
}
QSP_INLINE void random_fours(uint64_t seed, uint64_t index, int64_t step, i32x16 *out)
{
    const uint64_t by = (uint64_t)(step >> 2) * QSP_RANDOM_STEP;
    const __m256i first = random_counters(qsp_random_counter(seed, index), by, 0, 1, 4, 5);
    const __m256i two = _mm256_set1_epi64x((long long)(2 * by)), eight = _mm256_slli_epi64(two, 2);
    const __m256i second = _mm256_add_epi64(first, two);
    __m256i a[4], b[4];
    fours8(random_mix(first), random_mix(second), a);
    fours8(random_mix(_mm256_add_epi64(first, eight)), random_mix(_mm256_add_epi64(second, eight)), b);
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        out[i] = i32_of(a[i], b[i]);
}

QSP_INLINE __m256i codes_load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
QSP_INLINE __m256i grad_bytes(const uint8_t *p)
{
    return _mm256_xor_si256(codes_load(p), _mm256_set1_epi8((char)0x80));
}

/* ---- gather-SpMM on codes ---- */

/* Interleaving leaves lane 16 L + 4 k + i of a vector at place i of 128-bit part L of sum k. */
QSP_INLINE int quad_lane(int place) { return 16 * (place >> 2 & 1) + 4 * (place >> 3) + (place & 3); }

/* The sums of one row as floats in the order of their lanes, times scale plus bias. */
QSP_INLINE void quad_unpack(float *out, const int32_t *sums, float scale, float bias)
{
    const __m256 s = _mm256_set1_ps(scale), b = _mm256_set1_ps(bias);
    for (int h = 0; h < QSP_UNIT; h += 32) {
        __m256 v[4];
        QSP_UNROLL
        for (int i = 0; i < 4; i++)
            v[i] = _mm256_add_ps(_mm256_mul_ps(sums8(sums + h + 8 * i), s), b);
        _mm256_storeu_ps(out + h, _mm256_permute2f128_ps(v[0], v[1], 0x20));
        _mm256_storeu_ps(out + h + 8, _mm256_permute2f128_ps(v[2], v[3], 0x20));
        _mm256_storeu_ps(out + h + 16, _mm256_permute2f128_ps(v[0], v[1], 0x31));
        _mm256_storeu_ps(out + h + 24, _mm256_permute2f128_ps(v[2], v[3], 0x31));
    }
}

/* ---- gather-SDDMM on codes ---- */
typedef __m256i dots; /* partial sums of one dot product */

QSP_INLINE dots dots_zero(void) { return _mm256_setzero_si256(); }
QSP_INLINE dots dots_add(dots a, dots b) { return _mm256_add_epi32(a, b); }
QSP_INLINE int32_t dots_total(dots v) { return total8(v); }
/* Sum of a vector of the gradient. */
QSP_INLINE dots grad_sum(dots sum, const uint8_t *p)
{
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), grad_bytes(p));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* sums[j] += total of d[j], j < n, n a multiple of 4 */
QSP_INLINE void dots_flush(int64_t *sums, const dots *d, int n)
{
    QSP_UNROLL
    for (int j = 0; j < n; j += 4) {
        const __m256i ab =
            _mm256_add_epi32(_mm256_unpacklo_epi32(d[j], d[j + 1]), _mm256_unpackhi_epi32(d[j], d[j + 1]));
        const __m256i cd =
            _mm256_add_epi32(_mm256_unpacklo_epi32(d[j + 2], d[j + 3]), _mm256_unpackhi_epi32(d[j + 2], d[j + 3]));
        const __m256i h = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
        const __m128i r = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
        __m256i *p = (__m256i *)(sums + j);
        _mm256_storeu_si256(p, _mm256_add_epi64(_mm256_loadu_si256(p), _mm256_cvtepi32_epi64(r)));
    }
}

/* ---- dot products of bytes ---- */
#if ISA_DOT == DOT_MADDUBS
/* whole rows instead of primitives */
#define ISA_OWN_SPMM "maddubs_spmm.h"
#define ISA_OWN_SDDMM "maddubs_sddmm.h"
#else
QSP_INLINE __m256i dot(__m256i sum, __m256i x, __m256i s)
{
#if ISA_DOT == DOT_EVEX && defined(__GNUC__)
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(s));
    return sum;
#elif ISA_DOT == DOT_EVEX
    return _mm256_dpbusd_epi32(sum, x, s);
#elif defined(__GNUC__)
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(s));
    return sum;
#else
    return _mm256_dpbusd_avx_epi32(sum, x, s);
#endif
}

/* 32 lanes, four nonzeros a step */
typedef struct {
    __m256i sum[4];
} quad;

QSP_INLINE void quad_set(quad *q, int32_t v)
{
    q->sum[0] = q->sum[1] = q->sum[2] = q->sum[3] = _mm256_set1_epi32(v);
}

QSP_INLINE void quad_dot(quad *q, const uint8_t *x, const int32_t *offset, const int8_t *weight)
{
    int32_t four;
    memcpy(&four, weight, 4);
    const __m256i w = _mm256_set1_epi32(four);
    const __m256i a = codes_load(x + offset[0]), b = codes_load(x + offset[1]);
    const __m256i c = codes_load(x + offset[2]), d = codes_load(x + offset[3]);
    const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
    q->sum[0] = dot(q->sum[0], _mm256_unpacklo_epi16(ab_low, cd_low), w);
    q->sum[1] = dot(q->sum[1], _mm256_unpackhi_epi16(ab_low, cd_low), w);
    q->sum[2] = dot(q->sum[2], _mm256_unpacklo_epi16(ab_high, cd_high), w);
    q->sum[3] = dot(q->sum[3], _mm256_unpackhi_epi16(ab_high, cd_high), w);
}

QSP_INLINE void quad_store(int32_t *p, const quad *even, const quad *odd)
{
    (void)odd; /* ISA_QUADS is 1 */
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        _mm256_storeu_si256((__m256i *)(p + 8 * i), even->sum[i]);
}

typedef __m256i grad; /* one vector of the gradient, signed */

QSP_INLINE grad grad_load(const uint8_t *p) { return grad_bytes(p); }
QSP_INLINE dots dots_step(dots sum, const uint8_t *x, grad g) { return dot(sum, codes_load(x), g); }
#endif
