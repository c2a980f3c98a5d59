/* Primitives in 256-bit vectors. The dot product of bytes, see avx2_products.h, is chosen by ISA_DOT:
 *
 *   DOT_MADDUBS  AVX2 alone, which has none
 *   DOT_VEX      AVX-VNNI
 *   DOT_EVEX     AVX-512 VL + VNNI: for processors on which 512-bit vectors lower the clock
 */
#define DOT_MADDUBS 0
#define DOT_VEX 1
#define DOT_EVEX 2

/* ---- 16 floats ---- */
typedef struct {
    __m256 a, b;
} f32x16;

QSP_INLINE __m256i i32x8_first(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
QSP_INLINE f32x16 f32x16_of(__m256 a, __m256 b)
{
    const f32x16 r = {a, b};
    return r;
}
QSP_INLINE f32x16 f32x16_set1(float v) { return f32x16_of(_mm256_set1_ps(v), _mm256_set1_ps(v)); }
QSP_INLINE f32x16 f32x16_zero(void) { return f32x16_of(_mm256_setzero_ps(), _mm256_setzero_ps()); }
QSP_INLINE f32x16 f32x16_load(const float *p) { return f32x16_of(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
QSP_INLINE f32x16 f32x16_load_n(const float *p, int n)
{
    return f32x16_of(_mm256_maskload_ps(p, i32x8_first(n)), _mm256_maskload_ps(p + 8, i32x8_first(n - 8)));
}
QSP_INLINE __m256 f32x8_load_bf16(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
QSP_INLINE f32x16 f32x16_load_bf16(const uint16_t *p) { return f32x16_of(f32x8_load_bf16(p), f32x8_load_bf16(p + 8)); }
QSP_INLINE __m256 f32x8_load_i32(const int32_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)p));
}
QSP_INLINE f32x16 f32x16_load_i32(const int32_t *p) { return f32x16_of(f32x8_load_i32(p), f32x8_load_i32(p + 8)); }
QSP_INLINE void f32x16_store(float *p, f32x16 v)
{
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
QSP_INLINE void f32x16_store_n(float *p, f32x16 v, int n)
{
    _mm256_maskstore_ps(p, i32x8_first(n), v.a);
    _mm256_maskstore_ps(p + 8, i32x8_first(n - 8), v.b);
}
QSP_INLINE __m256i f32x8_to_bf16(__m256 v)
{
    const __m256i x = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
QSP_INLINE void f32x16_store_bf16(uint16_t *p, f32x16 v)
{
    const __m256i words = _mm256_packus_epi32(f32x8_to_bf16(v.a), f32x8_to_bf16(v.b));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(words, 0xd8));
}
#include "isa/line.h"
QSP_INLINE f32x16 f32x16_mul(f32x16 x, f32x16 y) { return f32x16_of(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
QSP_INLINE f32x16 f32x16_add(f32x16 x, f32x16 y) { return f32x16_of(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
QSP_INLINE f32x16 f32x16_sub(f32x16 x, f32x16 y) { return f32x16_of(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
QSP_INLINE f32x16 f32x16_div(f32x16 x, f32x16 y) { return f32x16_of(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
QSP_INLINE f32x16 f32x16_fma(f32x16 x, f32x16 y, f32x16 z)
{
    return f32x16_of(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
QSP_INLINE f32x16 f32x16_min(f32x16 x, f32x16 y) { return f32x16_of(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
QSP_INLINE f32x16 f32x16_max(f32x16 x, f32x16 y) { return f32x16_of(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
QSP_INLINE uint32_t f32x8_between(__m256 v, __m256 low, __m256 high)
{
    const __m256 in = _mm256_and_ps(_mm256_cmp_ps(low, v, _CMP_LT_OQ), _mm256_cmp_ps(v, high, _CMP_LT_OQ));
    return (uint32_t)_mm256_movemask_ps(in);
}
QSP_INLINE uint32_t f32x16_between(f32x16 v, f32x16 low, f32x16 high)
{
    return f32x8_between(v.a, low.a, high.a) | f32x8_between(v.b, low.b, high.b) << 8;
}
QSP_INLINE __m256 f32x8_keep(__m256 v, uint32_t bits)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i in = _mm256_and_si256(_mm256_set1_epi32((int)bits), bit);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(in, bit)));
}
QSP_INLINE f32x16 f32x16_keep(f32x16 v, uint32_t bits)
{
    return f32x16_of(f32x8_keep(v.a, bits), f32x8_keep(v.b, bits >> 8));
}
#if ISA_DOT == DOT_EVEX
#if defined(__GNUC__)
#define KEEP_BOTH(a, b) __asm__("" : "+v"(a), "+v"(b))
#else
#define KEEP_BOTH(a, b) ((void)0)
#endif
QSP_INLINE __m256 f32x8_mul_spread(const float *p, uint32_t bits, __m256 factor)
{
    const __m256 v = _mm256_maskz_expand_ps((__mmask8)bits, _mm256_loadu_ps(p));
    return _mm256_maskz_mul_ps((__mmask8)bits, v, factor);
}
QSP_INLINE void f32x16_store_side(float *p, f32x16 v, uint32_t bits)
{
    __m256 a = _mm256_maskz_compress_ps((__mmask8)bits, v.a), b = _mm256_maskz_compress_ps((__mmask8)(bits >> 8), v.b);
    KEEP_BOTH(a, b); /* first: into memory it is microcode (Zen 4) */
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + qsp_count_bits(bits & 0xff), b);
}
#else
/* Each place reads the element whose number is how many bits are set before it. */
QSP_INLINE __m256 f32x8_mul_spread(const float *p, uint32_t bits, __m256 factor)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i in = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), bit), bit);
    __m256i sum = _mm256_add_epi32(in, _mm256_slli_si256(in, 4)); /* of each half, minus how many there are up to here */
    sum = _mm256_add_epi32(sum, _mm256_slli_si256(sum, 8));
    const __m256i low = _mm256_permutevar8x32_epi32(sum, _mm256_set1_epi32(3));
    sum = _mm256_add_epi32(sum, _mm256_blend_epi32(_mm256_setzero_si256(), low, 0xf0));
    const __m256i before = _mm256_xor_si256(sum, _mm256_set1_epi32(-1)); /* -sum - 1 */
    const __m256 v = _mm256_mul_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(p), before), factor);
    return _mm256_and_ps(v, _mm256_castsi256_ps(in));
}
QSP_INLINE void f32x16_store_side(float *p, f32x16 v, uint32_t bits)
{
    QSP_ALIGNED(32) float line[16];
    _mm256_store_ps(line, v.a);
    _mm256_store_ps(line + 8, v.b);
    QSP_UNROLL
    for (int i = 0, n = 0; i < 16; i++) { /* all are written, the wrong ones again: a branch would be guessed wrong */
        p[n] = line[i];
        n += (int)(bits >> i & 1);
    }
}
#endif
QSP_INLINE f32x16 f32x16_mul_spread(const float *p, uint32_t bits, f32x16 factor)
{
    const float *upper = p + qsp_count_bits(bits & 0xff);
    return f32x16_of(f32x8_mul_spread(p, bits, factor.a), f32x8_mul_spread(upper, bits >> 8, factor.b));
}
QSP_INLINE __m256 f32x8_load_u8(const uint8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
QSP_INLINE f32x16 f32x16_load_u8(const uint8_t *p) { return f32x16_of(f32x8_load_u8(p), f32x8_load_u8(p + 8)); }
QSP_INLINE float f32x16_reduce_add(f32x16 v)
{
    const __m256 s = _mm256_add_ps(v.a, v.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
QSP_INLINE __m256 f32x8_copysign(__m256 v, __m256 sign)
{
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, v), _mm256_and_ps(bit, sign));
}
QSP_INLINE f32x16 f32x16_copysign(f32x16 v, f32x16 sign)
{
    return f32x16_of(f32x8_copysign(v.a, sign.a), f32x8_copysign(v.b, sign.b));
}
QSP_INLINE f32x16 f32x16_abs(f32x16 v)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return f32x16_of(_mm256_andnot_ps(sign, v.a), _mm256_andnot_ps(sign, v.b));
}
QSP_INLINE f32x16 f32x16_is_nonzero(f32x16 v)
{
    const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1.0f);
    return f32x16_of(_mm256_and_ps(_mm256_cmp_ps(v.a, zero, _CMP_NEQ_UQ), one),
                     _mm256_and_ps(_mm256_cmp_ps(v.b, zero, _CMP_NEQ_UQ), one));
}

/* ---- 16 doubles: sums of floats ---- */
typedef struct {
    __m256d a, b, c, d;
} f64x16;
QSP_INLINE f64x16 f64x16_load(const double *p)
{
    const f64x16 r = {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8), _mm256_loadu_pd(p + 12)};
    return r;
}
QSP_INLINE void f64x16_store(double *p, f64x16 v)
{
    _mm256_storeu_pd(p, v.a);
    _mm256_storeu_pd(p + 4, v.b);
    _mm256_storeu_pd(p + 8, v.c);
    _mm256_storeu_pd(p + 12, v.d);
}
QSP_INLINE f64x16 f64x16_from_f32(f32x16 v)
{
    const f64x16 r = {_mm256_cvtps_pd(_mm256_castps256_ps128(v.a)), _mm256_cvtps_pd(_mm256_extractf128_ps(v.a, 1)),
                      _mm256_cvtps_pd(_mm256_castps256_ps128(v.b)), _mm256_cvtps_pd(_mm256_extractf128_ps(v.b, 1))};
    return r;
}
QSP_INLINE f64x16 f64x16_load_f32(const float *p) /* fewer instructions than taking a vector to pieces */
{
    const f64x16 r = {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4)),
                      _mm256_cvtps_pd(_mm_loadu_ps(p + 8)), _mm256_cvtps_pd(_mm_loadu_ps(p + 12))};
    return r;
}
QSP_INLINE f64x16 f64x16_add(f64x16 x, f64x16 y)
{
    const f64x16 r = {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b), _mm256_add_pd(x.c, y.c),
                      _mm256_add_pd(x.d, y.d)};
    return r;
}
QSP_INLINE f64x16 f64x16_add_square(f64x16 sum, f64x16 v)
{
    const f64x16 r = {_mm256_fmadd_pd(v.a, v.a, sum.a), _mm256_fmadd_pd(v.b, v.b, sum.b),
                      _mm256_fmadd_pd(v.c, v.c, sum.c), _mm256_fmadd_pd(v.d, v.d, sum.d)};
    return r;
}
QSP_INLINE __m256 f32x8_gather(const float *base, const int32_t *index, int n)
{
    const __m256i here = i32x8_first(n), i = _mm256_maskload_epi32(index, here);
    const __m256i used = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_setzero_si256(), i), here);
    return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), base, i, _mm256_castsi256_ps(used), 4);
}
QSP_INLINE f32x16 f32x16_gather(const float *base, const int32_t *index, int n)
{
    return f32x16_of(f32x8_gather(base, index, n), f32x8_gather(base, index + 8, n - 8));
}

/* 8 x 8 floats, in place: r[i] is a row before and a column behind. */
QSP_INLINE void f32_transpose_8x8(__m256 *r)
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
QSP_INLINE void f32_transpose_16x16(f32x16 *r)
{
    __m256 t[8], u[8];
    QSP_UNROLL
    for (int i = 0; i < 8; i++)
        t[i] = r[i].a;
    f32_transpose_8x8(t);
    QSP_UNROLL
    for (int i = 0; i < 8; i++)
        u[i] = r[i + 8].b;
    f32_transpose_8x8(u);
    __m256 right[8], down[8];
    QSP_UNROLL
    for (int i = 0; i < 8; i++) {
        right[i] = r[i].b;
        down[i] = r[i + 8].a;
    }
    f32_transpose_8x8(right);
    f32_transpose_8x8(down);
    QSP_UNROLL
    for (int i = 0; i < 8; i++) {
        r[i] = f32x16_of(t[i], down[i]);
        r[i + 8] = f32x16_of(right[i], u[i]);
    }
}

/* ---- 16 integers, 16 magnitudes as integers, 16 codes ---- */
typedef struct {
    __m256i a, b;
} i32x16;
typedef i32x16 u32x16;
typedef i32x16 u64x8;
typedef __m128i u8x16;

QSP_INLINE i32x16 i32x16_of(__m256i a, __m256i b)
{
    const i32x16 r = {a, b};
    return r;
}
#define EACH_HALF(f, x, y) i32x16_of(f((x).a, (y).a), f((x).b, (y).b))
QSP_INLINE i32x16 i32x16_set1(int32_t v) { return i32x16_of(_mm256_set1_epi32(v), _mm256_set1_epi32(v)); }
QSP_INLINE i32x16 i32x16_load_n(const int32_t *p, int n)
{
    return i32x16_of(_mm256_maskload_epi32(p, i32x8_first(n)), _mm256_maskload_epi32(p + 8, i32x8_first(n - 8)));
}
QSP_INLINE i32x16 i32x16_nearest(f32x16 v) { return i32x16_of(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)); }
QSP_INLINE i32x16 i32x16_truncated(f32x16 v) { return i32x16_of(_mm256_cvttps_epi32(v.a), _mm256_cvttps_epi32(v.b)); }
QSP_INLINE f32x16 f32x16_from_bits(i32x16 v) { return f32x16_of(_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)); }
QSP_INLINE i32x16 i32x16_add(i32x16 x, i32x16 y) { return EACH_HALF(_mm256_add_epi32, x, y); }
QSP_INLINE i32x16 i32x16_sub(i32x16 x, i32x16 y) { return EACH_HALF(_mm256_sub_epi32, x, y); }
QSP_INLINE i32x16 i32x16_min(i32x16 x, i32x16 y) { return EACH_HALF(_mm256_min_epi32, x, y); }
QSP_INLINE i32x16 i32x16_max(i32x16 x, i32x16 y) { return EACH_HALF(_mm256_max_epi32, x, y); }
QSP_INLINE i32x16 i32x16_shift_left(i32x16 v, i32x16 n) { return EACH_HALF(_mm256_sllv_epi32, v, n); }
QSP_INLINE i32x16 i32x16_shift_right(i32x16 v, i32x16 n) { return EACH_HALF(_mm256_srlv_epi32, v, n); }
QSP_INLINE __m256i i32x8_log2(__m256i v)
{
    const __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(v));
    return _mm256_sub_epi32(_mm256_srai_epi32(bits, 23), _mm256_set1_epi32(127));
}
QSP_INLINE i32x16 i32x16_log2(i32x16 v) { return i32x16_of(i32x8_log2(v.a), i32x8_log2(v.b)); }
QSP_INLINE i32x16 i32x16_apply_sign(i32x16 v, i32x16 sign) { return EACH_HALF(_mm256_sign_epi32, v, sign); }
QSP_INLINE i32x16 i32x16_load_u8(const uint8_t *p)
{
    const __m128i v = _mm_loadu_si128((const __m128i *)p);
    return i32x16_of(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}
QSP_INLINE i32x16 i32x16_load_s8(const uint8_t *p)
{
    const __m128i v = _mm_loadu_si128((const __m128i *)p);
    return i32x16_of(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)));
}
QSP_INLINE f32x16 f32x16_from_i32(i32x16 v) { return f32x16_of(_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)); }
QSP_INLINE int32_t i32x8_reduce_add(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
QSP_INLINE int32_t i32x16_reduce_add(i32x16 v) { return i32x8_reduce_add(_mm256_add_epi32(v.a, v.b)); }
QSP_INLINE u64x8 u64x8_zero(void) { return i32x16_set1(0); }
QSP_INLINE u64x8 u64x8_add_pairs(u64x8 sum, i32x16 v) { return EACH_HALF(_mm256_add_epi64, sum, v); }
QSP_INLINE __m256i i32x8_products(__m256i v) { return _mm256_mul_epu32(v, _mm256_srli_epi64(v, 32)); }
QSP_INLINE u64x8 u64x8_add_products(u64x8 sum, i32x16 v)
{
    return i32x16_of(_mm256_add_epi64(sum.a, i32x8_products(v.a)), _mm256_add_epi64(sum.b, i32x8_products(v.b)));
}
QSP_INLINE void u64x8_store(uint64_t *p, u64x8 v)
{
    _mm256_storeu_si256((__m256i *)p, v.a);
    _mm256_storeu_si256((__m256i *)(p + 4), v.b);
}
QSP_INLINE u32x16 u32x16_zero(void) { return i32x16_set1(0); }
QSP_INLINE u32x16 u32x16_load_bits(const float *p)
{
    return i32x16_of(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8)));
}
QSP_INLINE void u32x16_store_bits(float *p, u32x16 v)
{
    _mm256_storeu_si256((__m256i *)p, v.a);
    _mm256_storeu_si256((__m256i *)(p + 8), v.b);
}
QSP_INLINE u32x16 u32x16_max_abs(u32x16 m, f32x16 v)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    return i32x16_of(_mm256_max_epu32(m.a, _mm256_and_si256(_mm256_castps_si256(v.a), magnitude)),
                     _mm256_max_epu32(m.b, _mm256_and_si256(_mm256_castps_si256(v.b), magnitude)));
}
QSP_INLINE uint32_t u32x16_reduce_max(u32x16 v)
{
    uint32_t line[8], s = 0;
    _mm256_storeu_si256((__m256i *)line, _mm256_max_epu32(v.a, v.b));
    for (int i = 0; i < 8; i++)
        s = line[i] > s ? line[i] : s;
    return s;
}

QSP_INLINE u8x16 i32x16_to_s8(i32x16 v)
{
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
QSP_INLINE u8x16 i32x16_to_code(i32x16 v) { return _mm_xor_si128(i32x16_to_s8(v), _mm_set1_epi8((char)0x80)); }
QSP_INLINE void u8x16_store(uint8_t *p, u8x16 v) { _mm_storeu_si128((__m128i *)p, v); }
QSP_INLINE void u8x16_store_n(uint8_t *p, u8x16 v, int n)
{
    uint8_t line[16];
    u8x16_store(line, v);
    memcpy(p, line, (size_t)n);
}

#include "isa/x86.h"

/* Sixteen rows by sixteen bytes are transposed in each 128-bit part. */
QSP_INLINE void u8_transpose_unit(uint8_t *p, int64_t pitch, const uint8_t *codes, int lanes, int channels)
{
    for (int half = 0; half < lanes; half += 32) {
        __m256i r[16], t[16];
        QSP_UNROLL
        for (int i = 0; i < 16; i++)
            r[i] = _mm256_loadu_si256((const __m256i *)(codes + QSP_UNIT * i + half));
        QSP_UNROLL
        for (int stage = 0; stage < 4; stage++) {
            QSP_UNROLL
            for (int i = 0; i < 8; i++) {
                t[2 * i] = _mm256_unpacklo_epi8(r[i], r[i + 8]);
                t[2 * i + 1] = _mm256_unpackhi_epi8(r[i], r[i + 8]);
            }
            QSP_UNROLL
            for (int i = 0; i < 16; i++)
                r[i] = t[i];
        }
        const int n = lanes - half < 32 ? lanes - half : 32;
        QSP_UNROLL
        for (int i = 0; i < 16; i++) {
            uint8_t line[32], *to = n == 32 ? p + i * pitch + half : line;
            if (i < channels) {
                _mm256_storeu_si256((__m256i *)to, r[i]);
                if (n < 32)
                    memcpy(p + i * pitch + half, line, (size_t)n);
            }
        }
    }
}

QSP_INLINE void u8x32_copy_even(uint8_t *to, const uint8_t *from)
{
    const __m256i low = _mm256_set1_epi16(255);
    const __m256i a = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)from), low);
    const __m256i b = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(from + 32)), low);
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8));
}

/* ---- random numbers ---- */

/* Words that follow each other, as the dither of 16 elements: in the low half of each vector come the first four words,
 * in its high half the third four. */
QSP_INLINE i32x16 dither_from_words(__m256i words)
{
    const __m256i above = _mm256_set1_epi16(QSP_DITHER_BITS >> 16);
    return i32x16_of(_mm256_unpacklo_epi16(words, above), _mm256_unpackhi_epi16(words, above));
}

QSP_INLINE i32x16 i32x16_random_run(uint64_t seed, uint64_t index)
{
    return dither_from_words(
        u64x4_random_mix(u64x4_random_counters(qsp_random_counter(seed, index), QSP_RANDOM_STEP, 0, 2, 1, 3)));
}

typedef struct {
    __m256i counters, step;
} random_rows;

QSP_INLINE random_rows random_rows_from(uint64_t seed, uint64_t index, int64_t step)
{
    const uint64_t by = (uint64_t)(step >> 2) * QSP_RANDOM_STEP;
    const random_rows r = {u64x4_random_counters(qsp_random_counter(seed, index), QSP_RANDOM_STEP, 0, 2, 1, 3),
                           _mm256_set1_epi64x((long long)by)};
    return r;
}
QSP_INLINE void random_rows_next(random_rows *r, i32x16 *out)
{
    QSP_UNROLL
    for (int i = 0; i < 2; i++) {
        out[i] = dither_from_words(u64x4_random_mix(r->counters));
        r->counters = _mm256_add_epi64(r->counters, r->step);
    }
}

QSP_INLINE void dither_fours(__m256i x, __m256i y, __m256i *out)
{
    const __m256i even = _mm256_unpacklo_epi16(x, y), odd = _mm256_unpackhi_epi16(x, y);
    const i32x16 first = dither_from_words(_mm256_unpacklo_epi16(even, odd));
    const i32x16 last = dither_from_words(_mm256_unpackhi_epi16(even, odd));
    out[0] = first.a;
    out[1] = first.b;
    out[2] = last.a;
    out[3] = last.b;
}
QSP_INLINE void i32x16_random_fours(uint64_t seed, uint64_t index, int64_t step, i32x16 *out)
{
    const uint64_t by = (uint64_t)(step >> 2) * QSP_RANDOM_STEP;
    const __m256i first = u64x4_random_counters(qsp_random_counter(seed, index), by, 0, 1, 4, 5);
    const __m256i two = _mm256_set1_epi64x((long long)(2 * by)), eight = _mm256_slli_epi64(two, 2);
    const __m256i second = _mm256_add_epi64(first, two);
    __m256i a[4], b[4];
    dither_fours(u64x4_random_mix(first), u64x4_random_mix(second), a);
    dither_fours(u64x4_random_mix(_mm256_add_epi64(first, eight)), u64x4_random_mix(_mm256_add_epi64(second, eight)),
                 b);
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        out[i] = i32x16_of(a[i], b[i]);
}

#include "isa/avx2_products.h"
