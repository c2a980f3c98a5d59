/* The two products on codes in 256-bit vectors, for what avx2.h names. */
#define ISA_LANES 32
#if ISA_DOT == DOT_MADDUBS
#define ISA_SDDMM_UNITS 4
#define ISA_SPMM_TILE 64x4
#define ISA_SDDMM_TILE 256x4
#else
#define ISA_SDDMM_UNITS 2
#define ISA_SPMM_TILE 32x4
#define ISA_SDDMM_TILE 128x16
#endif
#define ISA_SPMM_ACCS 1 /* sixteen registers hold no second one */

QSP_INLINE __m256i u8x32_load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
QSP_INLINE __m256i s8x32_load_code(const uint8_t *p)
{
    return _mm256_xor_si256(u8x32_load(p), _mm256_set1_epi8((char)0x80));
}

/* 32 lanes of four planes: groups of 4 bytes in the order of spmm_acc_lane. */
typedef struct {
    __m256i v[QSP_GROUP];
} u8x32x4;

QSP_INLINE u8x32x4 u8x32x4_interleave(const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d)
{
    const __m256i va = u8x32_load(a), vb = u8x32_load(b), vc = u8x32_load(c), vd = u8x32_load(d);
    const __m256i ab_low = _mm256_unpacklo_epi8(va, vb), ab_high = _mm256_unpackhi_epi8(va, vb);
    const __m256i cd_low = _mm256_unpacklo_epi8(vc, vd), cd_high = _mm256_unpackhi_epi8(vc, vd);
    const u8x32x4 r = {{_mm256_unpacklo_epi16(ab_low, cd_low), _mm256_unpackhi_epi16(ab_low, cd_low),
                        _mm256_unpacklo_epi16(ab_high, cd_high), _mm256_unpackhi_epi16(ab_high, cd_high)}};
    return r;
}

/* ---- gather-SpMM on codes ---- */

/* Interleaving leaves lane 16 L + 4 k + i of a vector at place i of 128-bit part L of sum k. */
QSP_INLINE int spmm_acc_lane(int place) { return 16 * (place >> 2 & 1) + 4 * (place >> 3) + (place & 3); }

QSP_INLINE void spmm_unit_to_f32(float *out, const int32_t *sums, float scale, float bias)
{
    const __m256 s = _mm256_set1_ps(scale), b = _mm256_set1_ps(bias);
    for (int h = 0; h < QSP_UNIT; h += 32) {
        __m256 v[4];
        QSP_UNROLL
        for (int i = 0; i < 4; i++)
            v[i] = _mm256_add_ps(_mm256_mul_ps(f32x8_load_i32(sums + h + 8 * i), s), b);
        _mm256_storeu_ps(out + h, _mm256_permute2f128_ps(v[0], v[1], 0x20));
        _mm256_storeu_ps(out + h + 8, _mm256_permute2f128_ps(v[2], v[3], 0x20));
        _mm256_storeu_ps(out + h + 16, _mm256_permute2f128_ps(v[0], v[1], 0x31));
        _mm256_storeu_ps(out + h + 24, _mm256_permute2f128_ps(v[2], v[3], 0x31));
    }
}

/* Packing and unpacking keep to 128-bit parts, as interleaving did: what comes out of one goes into the other. */
QSP_INLINE void spmm_unit_from_codes(i32x16 *v, const uint8_t *codes)
{
    const __m256i zero = _mm256_setzero_si256();
    for (int h = 0; h < 2; h++) {
        const __m256i c = _mm256_loadu_si256((const __m256i *)(codes + 32 * h));
        const __m256i low = _mm256_unpacklo_epi8(c, zero), high = _mm256_unpackhi_epi8(c, zero);
        v[2 * h] = i32x16_of(_mm256_unpacklo_epi16(low, zero), _mm256_unpackhi_epi16(low, zero));
        v[2 * h + 1] = i32x16_of(_mm256_unpacklo_epi16(high, zero), _mm256_unpackhi_epi16(high, zero));
    }
}

QSP_INLINE void spmm_unit_to_codes(uint8_t *codes, const i32x16 *v)
{
    for (int h = 0; h < 2; h++) {
        const __m256i low = _mm256_packus_epi32(v[2 * h].a, v[2 * h].b);
        const __m256i high = _mm256_packus_epi32(v[2 * h + 1].a, v[2 * h + 1].b);
        _mm256_storeu_si256((__m256i *)(codes + 32 * h), _mm256_packus_epi16(low, high));
    }
}

/* Of each sixteenth of the table a shuffle, which gives zero for codes of the others. Single bytes would be written faster
 * than they can be read again as vectors. */
QSP_INLINE void spmm_unit_look_up(uint8_t *out, const uint8_t *codes, const uint8_t *table)
{
    const __m256i beyond = _mm256_set1_epi8(0x70); /* from 16 on to 128 and more */
    const __m256i a = _mm256_loadu_si256((const __m256i *)codes), b = _mm256_loadu_si256((const __m256i *)(codes + 32));
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int i = 0; i < 16; i++) {
        const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table + 16 * i)));
        const __m256i first = _mm256_set1_epi8((char)(16 * i));
        low = _mm256_or_si256(low, _mm256_shuffle_epi8(t, _mm256_adds_epu8(_mm256_xor_si256(a, first), beyond)));
        high = _mm256_or_si256(high, _mm256_shuffle_epi8(t, _mm256_adds_epu8(_mm256_xor_si256(b, first), beyond)));
    }
    _mm256_storeu_si256((__m256i *)out, low);
    _mm256_storeu_si256((__m256i *)(out + 32), high);
}

/* ---- gather-SDDMM on codes ---- */
typedef __m256i sddmm_acc;

QSP_INLINE sddmm_acc sddmm_acc_zero(void) { return _mm256_setzero_si256(); }
QSP_INLINE sddmm_acc sddmm_acc_add(sddmm_acc a, sddmm_acc b) { return _mm256_add_epi32(a, b); }
QSP_INLINE int32_t sddmm_acc_reduce_add(sddmm_acc v) { return i32x8_reduce_add(v); }
QSP_INLINE sddmm_acc sddmm_acc_add_grad(sddmm_acc sum, const uint8_t *p)
{
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), s8x32_load_code(p));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* The totals of four vectors. */
QSP_INLINE __m128i i32x8_reduce_four(const __m256i *d)
{
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(d[0], d[1]), _mm256_unpackhi_epi32(d[0], d[1]));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(d[2], d[3]), _mm256_unpackhi_epi32(d[2], d[3]));
    const __m256i h = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    return _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}

QSP_INLINE void sddmm_acc_flush(int64_t *sums, const sddmm_acc *d, int n)
{
    QSP_UNROLL
    for (int j = 0; j < n; j += QSP_GROUP) {
        __m256i *p = (__m256i *)(sums + j);
        _mm256_storeu_si256(p, _mm256_add_epi64(_mm256_loadu_si256(p), _mm256_cvtepi32_epi64(i32x8_reduce_four(d + j))));
    }
}

/* ---- dot products of bytes ---- */
#if ISA_DOT == DOT_MADDUBS
/* Whole rows in place of the primitives that follow. They are written in this instruction set's intrinsics and for its
 * one instruction that multiplies bytes, so they lie here and not with the loops, which have none. */
#define ISA_OWN_ROWS
#include "isa/avx2_maddubs_spmm.h"

#include "isa/avx2_maddubs_sddmm.h"
#else
QSP_INLINE __m256i i32x8_dot_u8s8(__m256i sum, __m256i x, __m256i s)
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

typedef struct {
    __m256i sum[QSP_GROUP];
} spmm_acc;

QSP_INLINE void spmm_acc_set1(spmm_acc *q, int32_t v)
{
    q->sum[0] = q->sum[1] = q->sum[2] = q->sum[3] = _mm256_set1_epi32(v);
}

QSP_INLINE void spmm_acc_dot(spmm_acc *q, const uint8_t *x, const int32_t *offset, const int8_t *weight)
{
    int32_t four;
    memcpy(&four, weight, sizeof four);
    const __m256i w = _mm256_set1_epi32(four);
    const u8x32x4 t = u8x32x4_interleave(x + offset[0], x + offset[1], x + offset[2], x + offset[3]);
    QSP_UNROLL
    for (int i = 0; i < QSP_GROUP; i++)
        q->sum[i] = i32x8_dot_u8s8(q->sum[i], t.v[i], w);
}

QSP_INLINE void spmm_acc_store(int32_t *p, const spmm_acc *even, const spmm_acc *odd)
{
    (void)odd;
    QSP_UNROLL
    for (int i = 0; i < QSP_GROUP; i++)
        _mm256_storeu_si256((__m256i *)(p + 8 * i), even->sum[i]);
}

typedef __m256i sddmm_grad;

QSP_INLINE sddmm_grad sddmm_grad_load(const uint8_t *p) { return s8x32_load_code(p); }
QSP_INLINE sddmm_acc sddmm_acc_dot(sddmm_acc sum, const uint8_t *x, sddmm_grad g)
{
    return i32x8_dot_u8s8(sum, u8x32_load(x), g);
}
#endif

#include "isa/avx2_dense.h"
