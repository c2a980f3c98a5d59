/* Primitives in 512-bit vectors: AVX-512 F, BW, DQ, VL and VNNI. */
#define ISA_LANES 64
#define ISA_SDDMM_UNITS 4
#define ISA_SPMM_ACCS 2 /* for the latency of a dot product */
#define ISA_SPMM_TILE 64x8
#define ISA_SDDMM_TILE 256x16

/* gcc copies the accumulator of the intrinsic around; as an operand of asm it stays where it is. */
#if defined(__GNUC__)
#define DOT(sum, x, w) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w))
#define KEEP(x) __asm__("" : "+v"(x))
#else
#define DOT(sum, x, w) ((sum) = _mm512_dpbusd_epi32((sum), (x), (w)))
#define KEEP(x) ((void)0)
#endif

/* ---- 16 floats ---- */
typedef __m512 f32x16;

QSP_INLINE __mmask16 mask16_first(int n) { return (__mmask16)((1u << n) - 1u); }
QSP_INLINE f32x16 f32x16_set1(float v) { return _mm512_set1_ps(v); }
QSP_INLINE f32x16 f32x16_zero(void) { return _mm512_setzero_ps(); }
QSP_INLINE f32x16 f32x16_load(const float *p) { return _mm512_loadu_ps(p); }
QSP_INLINE f32x16 f32x16_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(mask16_first(n), p); }
QSP_INLINE f32x16 f32x16_load_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
QSP_INLINE f32x16 f32x16_load_bf16_n(const uint16_t *p, int n)
{
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16_first(n), p)), 16));
}
QSP_INLINE f32x16 f32x16_load_i32(const int32_t *p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
QSP_INLINE void f32x16_store(float *p, f32x16 v) { _mm512_storeu_ps(p, v); }
QSP_INLINE void f32x16_store_n(float *p, f32x16 v, int n) { _mm512_mask_storeu_ps(p, mask16_first(n), v); }
QSP_INLINE __m256i f32x16_to_bf16(f32x16 v)
{
    const __m512i x = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}
QSP_INLINE void f32x16_store_bf16(uint16_t *p, f32x16 v) { _mm256_storeu_si256((__m256i *)p, f32x16_to_bf16(v)); }
QSP_INLINE void f32x16_store_bf16_n(uint16_t *p, f32x16 v, int n)
{
    _mm256_mask_storeu_epi16(p, mask16_first(n), f32x16_to_bf16(v));
}
QSP_INLINE f32x16 f32x16_mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
QSP_INLINE f32x16 f32x16_add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
QSP_INLINE f32x16 f32x16_sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
QSP_INLINE f32x16 f32x16_div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
QSP_INLINE f32x16 f32x16_fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
QSP_INLINE f32x16 f32x16_min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
QSP_INLINE f32x16 f32x16_max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
QSP_INLINE uint32_t f32x16_between(f32x16 v, f32x16 low, f32x16 high)
{
    return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(low, v, _CMP_LT_OQ), v, high, _CMP_LT_OQ);
}
QSP_INLINE f32x16 f32x16_keep(f32x16 v, uint32_t bits)
{
    KEEP(v); /* in a register: gcc makes a masked load of it, which was several times slower out of the cache (Zen 5) */
    return _mm512_maskz_mov_ps((__mmask16)bits, v);
}
QSP_INLINE f32x16 f32x16_mul_spread(const float *p, uint32_t bits, f32x16 factor)
{
    f32x16 v = f32x16_load(p);
    KEEP(v); /* likewise */
    return _mm512_maskz_mul_ps((__mmask16)bits, _mm512_maskz_expand_ps((__mmask16)bits, v), factor);
}
QSP_INLINE void f32x16_store_side(float *p, f32x16 v, uint32_t bits)
{
    f32x16 side = _mm512_maskz_compress_ps((__mmask16)bits, v);
    KEEP(side); /* first: into memory it is microcode (Zen 4) */
    f32x16_store(p, side);
}
QSP_INLINE f32x16 f32x16_load_u8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
QSP_INLINE float f32x16_reduce_add(f32x16 v) { return _mm512_reduce_add_ps(v); }
QSP_INLINE float f32x16_reduce_min(f32x16 v) { return _mm512_reduce_min_ps(v); }
QSP_INLINE float f32x16_reduce_max(f32x16 v) { return _mm512_reduce_max_ps(v); }
QSP_INLINE f32x16 f32x16_copysign(f32x16 v, f32x16 sign)
{
    const __m512i bit = _mm512_set1_epi32(INT32_MIN);
    const __m512i bits = _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(v), 0xCA);
    return _mm512_castsi512_ps(bits); /* bit ? sign : v */
}
QSP_INLINE f32x16 f32x16_abs(f32x16 v) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), v); }
QSP_INLINE f32x16 f32x16_is_nonzero(f32x16 v)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ), _mm512_set1_ps(1.0f));
}

/* ---- 16 doubles: sums of floats ---- */
typedef struct {
    __m512d a, b;
} f64x16;
QSP_INLINE f64x16 f64x16_load(const double *p)
{
    const f64x16 r = {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)};
    return r;
}
QSP_INLINE void f64x16_store(double *p, f64x16 v)
{
    _mm512_storeu_pd(p, v.a);
    _mm512_storeu_pd(p + 8, v.b);
}
QSP_INLINE f64x16 f64x16_from_f32(f32x16 v)
{
    const f64x16 r = {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
    return r;
}
QSP_INLINE f64x16 f64x16_load_f32(const float *p) /* fewer instructions than taking a vector to pieces */
{
    const f64x16 r = {_mm512_cvtps_pd(_mm256_loadu_ps(p)), _mm512_cvtps_pd(_mm256_loadu_ps(p + 8))};
    return r;
}
QSP_INLINE f64x16 f64x16_add(f64x16 x, f64x16 y)
{
    const f64x16 r = {_mm512_add_pd(x.a, y.a), _mm512_add_pd(x.b, y.b)};
    return r;
}
QSP_INLINE f64x16 f64x16_add_square(f64x16 sum, f64x16 v)
{
    const f64x16 r = {_mm512_fmadd_pd(v.a, v.a, sum.a), _mm512_fmadd_pd(v.b, v.b, sum.b)};
    return r;
}
QSP_INLINE f32x16 f32x16_gather(const float *base, const int32_t *index, int n)
{
    const __m512i i = _mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), mask16_first(n), index);
    /* an ascending run of sixteen, as most of the forward list is, needs no gather */
    const __m512i run = _mm512_add_epi32(_mm512_set1_epi32(index[0]),
                                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    if (index[0] >= 0 && _mm512_cmpeq_epi32_mask(i, run) == 0xffff)
        return _mm512_loadu_ps(base + index[0]);
    const __mmask16 used = _mm512_cmpge_epi32_mask(i, _mm512_setzero_si512());
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), used, i, base, 4);
}

/* ---- 16 magnitudes as integers ---- */
typedef __m512i u32x16;
QSP_INLINE u32x16 u32x16_zero(void) { return _mm512_setzero_si512(); }
QSP_INLINE u32x16 u32x16_load_bits(const float *p) { return _mm512_loadu_si512(p); }
QSP_INLINE void u32x16_store_bits(float *p, u32x16 v) { _mm512_storeu_si512(p, v); }
QSP_INLINE u32x16 u32x16_max_abs(u32x16 m, f32x16 v)
{
    return _mm512_max_epu32(m, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}
QSP_INLINE uint32_t u32x16_reduce_max(u32x16 v) { return _mm512_reduce_max_epu32(v); }

/* ---- 16 integers, 16 codes ---- */
typedef __m512i i32x16;
typedef __m512i u64x8;
typedef __m128i u8x16;
QSP_INLINE i32x16 i32x16_set1(int32_t v) { return _mm512_set1_epi32(v); }
QSP_INLINE i32x16 i32x16_load_n(const int32_t *p, int n) { return _mm512_maskz_loadu_epi32(mask16_first(n), p); }
QSP_INLINE i32x16 i32x16_nearest(f32x16 v) { return _mm512_cvtps_epi32(v); }
QSP_INLINE i32x16 i32x16_truncated(f32x16 v) { return _mm512_cvttps_epi32(v); }
QSP_INLINE f32x16 f32x16_from_bits(i32x16 v) { return _mm512_castsi512_ps(v); }
QSP_INLINE i32x16 i32x16_add(i32x16 a, i32x16 b) { return _mm512_add_epi32(a, b); }
QSP_INLINE i32x16 i32x16_sub(i32x16 a, i32x16 b) { return _mm512_sub_epi32(a, b); }
QSP_INLINE i32x16 i32x16_min(i32x16 a, i32x16 b) { return _mm512_min_epi32(a, b); }
QSP_INLINE i32x16 i32x16_max(i32x16 a, i32x16 b) { return _mm512_max_epi32(a, b); }
QSP_INLINE i32x16 i32x16_shift_left(i32x16 v, i32x16 n) { return _mm512_sllv_epi32(v, n); }
QSP_INLINE i32x16 i32x16_shift_right(i32x16 v, i32x16 n) { return _mm512_srlv_epi32(v, n); }
QSP_INLINE i32x16 i32x16_log2(i32x16 v)
{
    const __m512i bits = _mm512_castps_si512(_mm512_cvtepi32_ps(v));
    return _mm512_sub_epi32(_mm512_srai_epi32(bits, 23), _mm512_set1_epi32(127));
}
QSP_INLINE i32x16 i32x16_apply_sign(i32x16 v, i32x16 sign)
{
    const __m512i zero = _mm512_setzero_si512();
    const __m512i r = _mm512_mask_sub_epi32(v, _mm512_cmplt_epi32_mask(sign, zero), zero, v);
    return _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(sign, sign), r);
}
QSP_INLINE i32x16 i32x16_load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
QSP_INLINE i32x16 i32x16_load_s8(const uint8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
QSP_INLINE f32x16 f32x16_from_i32(i32x16 v) { return _mm512_cvtepi32_ps(v); }
QSP_INLINE int32_t i32x16_reduce_add(i32x16 v) { return _mm512_reduce_add_epi32(v); }
QSP_INLINE u64x8 u64x8_zero(void) { return _mm512_setzero_si512(); }
QSP_INLINE u64x8 u64x8_add_pairs(u64x8 sum, i32x16 v) { return _mm512_add_epi64(sum, v); }
QSP_INLINE u64x8 u64x8_add_products(u64x8 sum, i32x16 v)
{
    return _mm512_add_epi64(sum, _mm512_mul_epu32(v, _mm512_srli_epi64(v, 32)));
}
QSP_INLINE void u64x8_store(uint64_t *p, u64x8 v) { _mm512_storeu_si512(p, v); }
QSP_INLINE u8x16 i32x16_to_s8(i32x16 v) { return _mm512_cvtsepi32_epi8(v); }
QSP_INLINE u8x16 i32x16_to_code(i32x16 v) { return _mm_xor_si128(i32x16_to_s8(v), _mm_set1_epi8((char)0x80)); }
QSP_INLINE void u8x16_store(uint8_t *p, u8x16 v) { _mm_storeu_si128((__m128i *)p, v); }
QSP_INLINE void u8x16_store_n(uint8_t *p, u8x16 v, int n) { _mm_mask_storeu_epi8(p, mask16_first(n), v); }
#include "isa/x86.h"

QSP_INLINE void u8x32_copy_even(uint8_t *to, const uint8_t *from)
{
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi16_epi8(_mm512_loadu_si512(from)));
}

/* ---- random numbers ---- */

QSP_INLINE i32x16 i32x16_random_run(uint64_t seed, uint64_t index)
{
    const __m256i x =
        u64x4_random_mix(u64x4_random_counters(qsp_random_counter(seed, index), QSP_RANDOM_STEP, 0, 1, 2, 3));
    return _mm512_or_si512(_mm512_cvtepu16_epi32(x), _mm512_set1_epi32(QSP_DITHER_BITS));
}

/* Eight results of qsp_random_bits from their counters. */
QSP_INLINE __m512i u64x8_random_mix(__m512i x)
{
    x = _mm512_xor_si512(x, _mm512_mul_epu32(x, _mm512_set1_epi64(QSP_RANDOM_1)));
    x = _mm512_shuffle_epi32(x, 0xb1);
    x = _mm512_xor_si512(x, _mm512_mul_epu32(x, _mm512_set1_epi64(QSP_RANDOM_2)));
    x = _mm512_shuffle_epi32(x, 0xb1);
    return _mm512_xor_si512(x, _mm512_mul_epu32(x, _mm512_set1_epi64(QSP_RANDOM_3)));
}
/* Multiples of a step: those of one vector of counters. */
QSP_INLINE __m512i u64x8_multiples(uint64_t by, int a, int b, int c, int d, int e, int f, int g, int h)
{
    return _mm512_mullo_epi64(_mm512_set1_epi64((long long)by), _mm512_setr_epi64(a, b, c, d, e, f, g, h));
}

/* The counters of two rows take turns. */
typedef struct {
    __m512i counters, step;
} random_rows;

QSP_INLINE random_rows random_rows_from(uint64_t seed, uint64_t index, int64_t step)
{
    const uint64_t by = (uint64_t)(step >> 2) * QSP_RANDOM_STEP;
    const __m512i row = _mm512_add_epi64(_mm512_set1_epi64((long long)qsp_random_counter(seed, index)),
                                         u64x8_multiples(QSP_RANDOM_STEP, 0, 0, 1, 1, 2, 2, 3, 3));
    const random_rows r = {_mm512_mask_add_epi64(row, 0xaa, row, _mm512_set1_epi64((long long)by)),
                           _mm512_set1_epi64((long long)(2 * by))};
    return r;
}
QSP_INLINE void random_rows_next(random_rows *r, i32x16 *out)
{
    const __m512i words = u64x8_random_mix(r->counters),
                  above = _mm512_set1_epi32(QSP_DITHER_BITS | QSP_DITHER_BITS >> 16);
    out[0] = _mm512_unpacklo_epi16(words, above);
    out[1] = _mm512_unpackhi_epi16(words, above);
    r->counters = _mm512_add_epi64(r->counters, r->step);
}

QSP_INLINE void i32x16_random_fours(uint64_t seed, uint64_t index, int64_t step, i32x16 *out)
{
    const uint64_t by = (uint64_t)(step >> 2) * QSP_RANDOM_STEP;
    const __m512i above = _mm512_set1_epi32(QSP_DITHER_BITS | QSP_DITHER_BITS >> 16);
    const __m512i start = _mm512_add_epi64(_mm512_set1_epi64((long long)qsp_random_counter(seed, index)),
                                           u64x8_multiples(by, 0, 1, 4, 5, 8, 9, 12, 13));
    const __m512i x = u64x8_random_mix(start),
                  y = u64x8_random_mix(_mm512_add_epi64(start, _mm512_set1_epi64((long long)(2 * by))));
    const __m512i even = _mm512_unpacklo_epi16(x, y), odd = _mm512_unpackhi_epi16(x, y);
    const __m512i first = _mm512_unpacklo_epi16(even, odd), last = _mm512_unpackhi_epi16(even, odd);
    out[0] = _mm512_unpacklo_epi16(first, above);
    out[1] = _mm512_unpackhi_epi16(first, above);
    out[2] = _mm512_unpacklo_epi16(last, above);
    out[3] = _mm512_unpackhi_epi16(last, above);
}

/* Sixteen rows by sixteen bytes are transposed in each 128-bit part. */
QSP_INLINE void u8_transpose_unit(uint8_t *p, int64_t pitch, const uint8_t *codes, int lanes, int channels)
{
    __m512i r[16], t[16];
    QSP_UNROLL
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_loadu_si512(codes + QSP_UNIT * i);
    QSP_UNROLL
    for (int stage = 0; stage < 4; stage++) {
        QSP_UNROLL
        for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm512_unpacklo_epi8(r[i], r[i + 8]);
            t[2 * i + 1] = _mm512_unpackhi_epi8(r[i], r[i + 8]);
        }
        QSP_UNROLL
        for (int i = 0; i < 16; i++)
            r[i] = t[i];
    }
    if (lanes == QSP_UNIT && channels == 16) {
        QSP_UNROLL
        for (int i = 0; i < 16; i++)
            _mm512_storeu_si512(p + i * pitch, r[i]);
        return;
    }
    const __mmask64 used = ~(__mmask64)0 >> (QSP_UNIT - lanes);
    QSP_UNROLL
    for (int i = 0; i < 16; i++)
        if (i < channels)
            _mm512_mask_storeu_epi8(p + i * pitch, used, r[i]);
}

QSP_INLINE void f32_transpose_16x16(f32x16 *r)
{
    f32x16 t[16];
    QSP_UNROLL
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    QSP_UNROLL
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[4 * i]), _mm512_castps_pd(t[4 * i + 2])));
        r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[4 * i]), _mm512_castps_pd(t[4 * i + 2])));
        r[4 * i + 2] =
            _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[4 * i + 1]), _mm512_castps_pd(t[4 * i + 3])));
        r[4 * i + 3] =
            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[4 * i + 1]), _mm512_castps_pd(t[4 * i + 3])));
    }
    QSP_UNROLL
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    QSP_UNROLL
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* ---- gather-SpMM on codes ---- */
typedef struct {
    __m512i sum[QSP_GROUP];
} spmm_acc;

QSP_INLINE void spmm_acc_set1(spmm_acc *q, int32_t v)
{
    q->sum[0] = q->sum[1] = q->sum[2] = q->sum[3] = _mm512_set1_epi32(v);
}

/* 64 lanes of four planes: groups of 4 bytes in the order of spmm_acc_lane. */
typedef struct {
    __m512i v[QSP_GROUP];
} u8x64x4;

QSP_INLINE u8x64x4 u8x64x4_interleave(const uint8_t *x, const int32_t *offset)
{
    __m512i a = _mm512_loadu_si512(x + offset[0]), b = _mm512_loadu_si512(x + offset[1]);
    __m512i c = _mm512_loadu_si512(x + offset[2]), d = _mm512_loadu_si512(x + offset[3]);
    KEEP(a);
    KEEP(c);
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    const u8x64x4 r = {{_mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
                        _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)}};
    return r;
}

QSP_INLINE void spmm_acc_dot(spmm_acc *q, const uint8_t *x, const int32_t *offset, const int8_t *weight)
{
    int32_t four;
    memcpy(&four, weight, sizeof four);
    const __m512i w = _mm512_set1_epi32(four);
    const u8x64x4 t = u8x64x4_interleave(x, offset);
    QSP_UNROLL
    for (int i = 0; i < QSP_GROUP; i++)
        DOT(q->sum[i], t.v[i], w);
}

QSP_INLINE void spmm_acc_store(int32_t *p, const spmm_acc *even, const spmm_acc *odd)
{
    QSP_UNROLL
    for (int i = 0; i < QSP_GROUP; i++)
        _mm512_storeu_si512(p + 16 * i, _mm512_add_epi32(even->sum[i], odd->sum[i]));
}

/* Interleaving leaves lane 16 L + 4 k + i of a vector at place i of 128-bit part L of sum k. */
QSP_INLINE int spmm_acc_lane(int place) { return 16 * (place >> 2 & 3) + 4 * (place >> 4) + (place & 3); }

QSP_INLINE void spmm_unit_to_f32(float *out, const int32_t *sums, float scale, float bias)
{
    const __m512 s = _mm512_set1_ps(scale), b = _mm512_set1_ps(bias);
    __m512 v[4];
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        v[i] = _mm512_add_ps(_mm512_mul_ps(f32x16_load_i32(sums + 16 * i), s), b);
    const __m512 t0 = _mm512_shuffle_f32x4(v[0], v[1], 0x44), t1 = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
    const __m512 t2 = _mm512_shuffle_f32x4(v[0], v[1], 0xee), t3 = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    _mm512_storeu_ps(out, _mm512_shuffle_f32x4(t0, t1, 0x88));
    _mm512_storeu_ps(out + 16, _mm512_shuffle_f32x4(t0, t1, 0xdd));
    _mm512_storeu_ps(out + 32, _mm512_shuffle_f32x4(t2, t3, 0x88));
    _mm512_storeu_ps(out + 48, _mm512_shuffle_f32x4(t2, t3, 0xdd));
}

/* Packing and unpacking keep to 128-bit parts, as interleaving did: what comes out of one goes into the other. */
QSP_INLINE void spmm_unit_from_codes(i32x16 *v, const uint8_t *codes)
{
    const __m512i c = _mm512_loadu_si512(codes), zero = _mm512_setzero_si512();
    const __m512i low = _mm512_unpacklo_epi8(c, zero), high = _mm512_unpackhi_epi8(c, zero);
    v[0] = _mm512_unpacklo_epi16(low, zero);
    v[1] = _mm512_unpackhi_epi16(low, zero);
    v[2] = _mm512_unpacklo_epi16(high, zero);
    v[3] = _mm512_unpackhi_epi16(high, zero);
}

QSP_INLINE void spmm_unit_to_codes(uint8_t *codes, const i32x16 *v)
{
    _mm512_storeu_si512(codes, _mm512_packus_epi16(_mm512_packus_epi32(v[0], v[1]), _mm512_packus_epi32(v[2], v[3])));
}

/* 32 codes, in the low halves of words: the table as 128 words, of which each has the bytes of two codes. */
QSP_INLINE __m512i u16x32_look_up(__m512i codes, const __m512i *t)
{
    const __m512i word = _mm512_srli_epi16(codes, 1);
    const __m512i low = _mm512_permutex2var_epi16(t[0], word, t[1]), high = _mm512_permutex2var_epi16(t[2], word, t[3]);
    const __mmask32 upper = _mm512_movepi16_mask(_mm512_slli_epi16(codes, 8)); /* codes from 128 on */
    const __m512i place = _mm512_and_si512(_mm512_slli_epi16(codes, 3), _mm512_set1_epi16(8));
    return _mm512_srlv_epi16(_mm512_mask_blend_epi16(upper, low, high), place);
}
QSP_INLINE void spmm_unit_look_up(uint8_t *out, const uint8_t *codes, const uint8_t *table)
{
    const __m512i c = _mm512_loadu_si512(codes), low = _mm512_set1_epi16(0xff);
    __m512i t[4];
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        t[i] = _mm512_loadu_si512(table + 64 * i);
    const __m512i even = u16x32_look_up(_mm512_and_si512(c, low), t), odd = u16x32_look_up(_mm512_srli_epi16(c, 8), t);
    _mm512_storeu_si512(out, _mm512_or_si512(_mm512_and_si512(even, low), _mm512_slli_epi16(odd, 8)));
}

/* ---- gather-SDDMM on codes ---- */
typedef __m512i sddmm_acc;
typedef __m512i sddmm_grad;

QSP_INLINE sddmm_grad sddmm_grad_load(const uint8_t *p)
{
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8((char)0x80));
}
QSP_INLINE sddmm_acc sddmm_acc_zero(void) { return _mm512_setzero_si512(); }
QSP_INLINE sddmm_acc sddmm_acc_add(sddmm_acc a, sddmm_acc b) { return _mm512_add_epi32(a, b); }
QSP_INLINE sddmm_acc sddmm_acc_dot(sddmm_acc sum, const uint8_t *x, sddmm_grad g)
{
    const __m512i v = _mm512_loadu_si512(x);
    DOT(sum, v, g);
    return sum;
}
QSP_INLINE int32_t sddmm_acc_reduce_add(sddmm_acc v) { return _mm512_reduce_add_epi32(v); }
QSP_INLINE sddmm_acc sddmm_acc_add_grad(sddmm_acc sum, const uint8_t *p)
{
    const __m512i ones = _mm512_set1_epi8(1), g = sddmm_grad_load(p);
    DOT(sum, ones, g);
    return sum;
}
QSP_INLINE void sddmm_acc_flush(int64_t *sums, const sddmm_acc *d, int n)
{
    sddmm_acc s[4];
    QSP_UNROLL
    for (int k = 0; k < 4; k++) {
        if (QSP_GROUP * k < n) {
            const sddmm_acc *c = d + QSP_GROUP * k;
            const sddmm_acc x = _mm512_add_epi32(_mm512_unpacklo_epi32(c[0], c[1]), _mm512_unpackhi_epi32(c[0], c[1]));
            const sddmm_acc y = _mm512_add_epi32(_mm512_unpacklo_epi32(c[2], c[3]), _mm512_unpackhi_epi32(c[2], c[3]));
            s[k] = _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
        } else {
            s[k] = _mm512_setzero_si512();
        }
    }
    const sddmm_acc p =
        _mm512_add_epi32(_mm512_shuffle_i32x4(s[0], s[1], 0x88), _mm512_shuffle_i32x4(s[0], s[1], 0xdd));
    const sddmm_acc q =
        _mm512_add_epi32(_mm512_shuffle_i32x4(s[2], s[3], 0x88), _mm512_shuffle_i32x4(s[2], s[3], 0xdd));
    const sddmm_acc r = _mm512_add_epi32(_mm512_shuffle_i32x4(p, q, 0x88), _mm512_shuffle_i32x4(p, q, 0xdd));
    const __mmask16 used = mask16_first(n);
    const __mmask8 low = (__mmask8)used, high = (__mmask8)(used >> 8);
    _mm512_mask_storeu_epi64(
        sums, low,
        _mm512_add_epi64(_mm512_maskz_loadu_epi64(low, sums), _mm512_cvtepi32_epi64(_mm512_castsi512_si256(r))));
    if (n > 8)
        _mm512_mask_storeu_epi64(sums + 8, high,
                                 _mm512_add_epi64(_mm512_maskz_loadu_epi64(high, sums + 8),
                                                  _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(r, 1))));
}

/* ---- dense rows on codes ---- */
#define ISA_DENSE_ROWS 6
#define ISA_DENSE_GRAD_ROWS 6

QSP_INLINE void dense_interleave(uint8_t *quad, const uint8_t *x, const int32_t *offset)
{
    const u8x64x4 t = u8x64x4_interleave(x, offset);
    QSP_UNROLL
    for (int i = 0; i < QSP_GROUP; i++)
        _mm512_store_si512(quad + QSP_UNIT * i, t.v[i]);
}

QSP_INLINE void dense_spmm_block(int32_t *sums, const uint8_t *quads, const int8_t *weights, int64_t pitch,
                                 int64_t groups, const int rows)
{
    __m512i s[ISA_DENSE_ROWS][4];
    QSP_UNROLL
    for (int r = 0; r < rows; r++)
        QSP_UNROLL
        for (int v = 0; v < 4; v++)
            s[r][v] = _mm512_loadu_si512(sums + r * QSP_UNIT + 16 * v);
    for (int64_t k = 0; k < groups; k++) {
        const uint8_t *q = quads + QSP_GROUP * QSP_UNIT * k;
        const __m512i x0 = _mm512_load_si512(q), x1 = _mm512_load_si512(q + 64);
        const __m512i x2 = _mm512_load_si512(q + 128), x3 = _mm512_load_si512(q + 192);
        QSP_UNROLL
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, weights + r * pitch + QSP_GROUP * k, sizeof four);
            const __m512i w = _mm512_set1_epi32(four);
            DOT(s[r][0], x0, w);
            DOT(s[r][1], x1, w);
            DOT(s[r][2], x2, w);
            DOT(s[r][3], x3, w);
        }
    }
    QSP_UNROLL
    for (int r = 0; r < rows; r++)
        QSP_UNROLL
        for (int v = 0; v < 4; v++)
            _mm512_storeu_si512(sums + r * QSP_UNIT + 16 * v, s[r][v]);
}

/* sums[0..3] and those `pitch` behind += the totals of two rows of four vectors. */
QSP_INLINE void dense_sddmm_flush(int32_t *sums, int64_t pitch, __m512i (*s)[4])
{
    __m512i h[2];
    QSP_UNROLL
    for (int j = 0; j < 2; j++) {
        const __m512i a =
            _mm512_add_epi32(_mm512_unpacklo_epi32(s[j][0], s[j][1]), _mm512_unpackhi_epi32(s[j][0], s[j][1]));
        const __m512i b =
            _mm512_add_epi32(_mm512_unpacklo_epi32(s[j][2], s[j][3]), _mm512_unpackhi_epi32(s[j][2], s[j][3]));
        h[j] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    const __m512i e =
        _mm512_add_epi32(_mm512_shuffle_i32x4(h[0], h[1], 0x88), _mm512_shuffle_i32x4(h[0], h[1], 0xdd));
    const __m512i total = _mm512_add_epi32(_mm512_shuffle_i32x4(e, e, 0x88), _mm512_shuffle_i32x4(e, e, 0xdd));
    __m128i *first = (__m128i *)sums, *second = (__m128i *)(sums + pitch);
    _mm_storeu_si128(first, _mm_add_epi32(_mm_loadu_si128(first), _mm512_castsi512_si128(total)));
    _mm_storeu_si128(second, _mm_add_epi32(_mm_loadu_si128(second), _mm512_extracti32x4_epi32(total, 1)));
}

QSP_INLINE void dense_sddmm_block(int32_t *sums, int64_t pitch, const uint8_t *x, const int64_t *x_lane,
                                  const int32_t *offset, const int8_t *grad, int64_t step, int64_t units,
                                  const int rows)
{
    __m512i s[ISA_DENSE_GRAD_ROWS][4]; /* of row j and entry k */
    QSP_UNROLL
    for (int j = 0; j < rows; j++)
        QSP_UNROLL
        for (int k = 0; k < 4; k++)
            s[j][k] = _mm512_setzero_si512();
    for (int64_t u = 0; u < units; u++, grad += step * QSP_UNIT) {
        const uint8_t *p = x + x_lane[u];
        __m512i g[ISA_DENSE_GRAD_ROWS];
        QSP_UNROLL
        for (int j = 0; j < rows; j++)
            g[j] = _mm512_load_si512(grad + j * QSP_UNIT);
        QSP_UNROLL
        for (int k = 0; k < 4; k++) {
            const __m512i v = _mm512_loadu_si512(p + offset[k]);
            QSP_UNROLL
            for (int j = 0; j < rows; j++)
                DOT(s[j][k], v, g[j]);
        }
    }
    QSP_UNROLL
    for (int j = 0; j < rows; j += 2)
        dense_sddmm_flush(sums + j * pitch, pitch, s + j);
}
