/* Primitives in 128-bit vectors of 64-bit ARM. The dot product of bytes, see neon_products.h, is chosen by ISA_DOT:
 *
 *   DOT_NONE    the baseline, which every such processor has
 *   DOT_SIGNED  sdot, of signed bytes
 *   DOT_MIXED   usdot, of unsigned with signed ones
 */
#define DOT_NONE 0
#define DOT_SIGNED 1
#define DOT_MIXED 2

/* gcc orders instructions before it gives them registers, here and not on x86: it moves so many loads up that sums are
 * spilled, a tenth to half of what the inner loops were. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-schedule-insns")
#endif

/* What is computed with each of the vectors that are sixteen elements. */
#define EACH_QUARTER(type, expression)                                                                                 \
    type r;                                                                                                            \
    QSP_UNROLL                                                                                                         \
    for (int i = 0; i < 4; i++)                                                                                        \
        r.v[i] = (expression);                                                                                         \
    return r

/* ---- 16 floats ---- */
typedef struct {
    float32x4_t v[4];
} f32x16;

QSP_INLINE f32x16 f32x16_set1(float v) { EACH_QUARTER(f32x16, vdupq_n_f32(v)); }
QSP_INLINE f32x16 f32x16_zero(void) { return f32x16_set1(0.0f); }
QSP_INLINE f32x16 f32x16_load(const float *p) { EACH_QUARTER(f32x16, vld1q_f32(p + 4 * i)); }
/* Not inline: they serve ends of rows only, and are long. */
QSP_APART f32x16 f32x16_load_part(const float *p, int n)
{
    float line[16] = {0};
    for (int i = 0; i < n; i++)
        line[i] = p[i];
    return f32x16_load(line);
}
QSP_INLINE f32x16 f32x16_load_n(const float *p, int n) { return n == 16 ? f32x16_load(p) : f32x16_load_part(p, n); }
QSP_INLINE float32x4_t f32x4_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
QSP_INLINE f32x16 f32x16_load_bf16(const uint16_t *p) { EACH_QUARTER(f32x16, f32x4_load_bf16(p + 4 * i)); }
QSP_INLINE f32x16 f32x16_load_i32(const int32_t *p) { EACH_QUARTER(f32x16, vcvtq_f32_s32(vld1q_s32(p + 4 * i))); }
QSP_INLINE void f32x16_store(float *p, f32x16 v)
{
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        vst1q_f32(p + 4 * i, v.v[i]);
}
QSP_APART void f32x16_store_part(float *p, f32x16 v, int n)
{
    float line[16];
    f32x16_store(line, v);
    for (int i = 0; i < n; i++)
        p[i] = line[i];
}
QSP_INLINE void f32x16_store_n(float *p, f32x16 v, int n)
{
    if (n == 16)
        f32x16_store(p, v);
    else
        f32x16_store_part(p, v, n);
}
QSP_INLINE uint16x4_t f32x4_to_bf16(float32x4_t v)
{
    const uint32x4_t x = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(x, vdupq_n_u32(0x7fff)), odd);
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc00000)), 16);
}
QSP_INLINE void f32x16_store_bf16(uint16_t *p, f32x16 v)
{
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        vst1_u16(p + 4 * i, f32x4_to_bf16(v.v[i]));
}
#include "isa/line.h"
QSP_INLINE f32x16 f32x16_mul(f32x16 x, f32x16 y) { EACH_QUARTER(f32x16, vmulq_f32(x.v[i], y.v[i])); }
QSP_INLINE f32x16 f32x16_add(f32x16 x, f32x16 y) { EACH_QUARTER(f32x16, vaddq_f32(x.v[i], y.v[i])); }
QSP_INLINE f32x16 f32x16_sub(f32x16 x, f32x16 y) { EACH_QUARTER(f32x16, vsubq_f32(x.v[i], y.v[i])); }
QSP_INLINE f32x16 f32x16_div(f32x16 x, f32x16 y) { EACH_QUARTER(f32x16, vdivq_f32(x.v[i], y.v[i])); }
QSP_INLINE f32x16 f32x16_fma(f32x16 x, f32x16 y, f32x16 z)
{
    EACH_QUARTER(f32x16, vfmaq_f32(z.v[i], x.v[i], y.v[i]));
}
/* Compared and chosen: fmin and fminnm do otherwise with a NaN, and with two zeros. */
QSP_INLINE f32x16 f32x16_min(f32x16 x, f32x16 y)
{
    EACH_QUARTER(f32x16, vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]));
}
QSP_INLINE f32x16 f32x16_max(f32x16 x, f32x16 y)
{
    EACH_QUARTER(f32x16, vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]));
}
QSP_INLINE uint8x16_t u8x16_narrow(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d)
{
    const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
    const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(c), vreinterpretq_u16_u32(d));
    return vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
}
QSP_INLINE uint32_t f32x16_between(f32x16 v, f32x16 low, f32x16 high)
{
    static const uint8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint32x4_t in[4];
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        in[i] = vandq_u32(vcltq_f32(low.v[i], v.v[i]), vcltq_f32(v.v[i], high.v[i]));
    const uint8x16_t bits = vandq_u8(u8x16_narrow(in[0], in[1], in[2], in[3]), vld1q_u8(bit));
    return (uint32_t)vaddv_u8(vget_low_u8(bits)) | (uint32_t)vaddv_u8(vget_high_u8(bits)) << 8;
}
/* Ones in those of four places from `first` on whose bit is set. */
QSP_INLINE uint32x4_t u32x4_from_bits(uint32_t bits, int first)
{
    static const uint32_t bit[4] = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(bits >> first), vld1q_u32(bit));
}
QSP_INLINE float32x4_t f32x4_keep(float32x4_t v, uint32x4_t places)
{
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), places));
}
QSP_INLINE f32x16 f32x16_keep(f32x16 v, uint32_t bits)
{
    EACH_QUARTER(f32x16, f32x4_keep(v.v[i], u32x4_from_bits(bits, 4 * i)));
}

/* How many of four bits are set. */
QSP_INLINE int count_four(uint32_t bits) { return (int)(0x4332322132212110U >> 4 * (bits & 15) & 15); }

/* Of four bits, where bytes come from that are spread to the places of those that are set (others are zero), and where
 * those of set places come from when they are put side by side. */
#define FLOAT(n) 4 * (n), 4 * (n) + 1, 4 * (n) + 2, 4 * (n) + 3
#define NO_FLOAT 255, 255, 255, 255
static const uint8_t spread_four[16][16] = {
    {NO_FLOAT, NO_FLOAT, NO_FLOAT, NO_FLOAT}, {FLOAT(0), NO_FLOAT, NO_FLOAT, NO_FLOAT},
    {NO_FLOAT, FLOAT(0), NO_FLOAT, NO_FLOAT}, {FLOAT(0), FLOAT(1), NO_FLOAT, NO_FLOAT},
    {NO_FLOAT, NO_FLOAT, FLOAT(0), NO_FLOAT}, {FLOAT(0), NO_FLOAT, FLOAT(1), NO_FLOAT},
    {NO_FLOAT, FLOAT(0), FLOAT(1), NO_FLOAT}, {FLOAT(0), FLOAT(1), FLOAT(2), NO_FLOAT},
    {NO_FLOAT, NO_FLOAT, NO_FLOAT, FLOAT(0)}, {FLOAT(0), NO_FLOAT, NO_FLOAT, FLOAT(1)},
    {NO_FLOAT, FLOAT(0), NO_FLOAT, FLOAT(1)}, {FLOAT(0), FLOAT(1), NO_FLOAT, FLOAT(2)},
    {NO_FLOAT, NO_FLOAT, FLOAT(0), FLOAT(1)}, {FLOAT(0), NO_FLOAT, FLOAT(1), FLOAT(2)},
    {NO_FLOAT, FLOAT(0), FLOAT(1), FLOAT(2)}, {FLOAT(0), FLOAT(1), FLOAT(2), FLOAT(3)},
};
static const uint8_t side_four[16][16] = {
    {NO_FLOAT, NO_FLOAT, NO_FLOAT, NO_FLOAT}, {FLOAT(0), NO_FLOAT, NO_FLOAT, NO_FLOAT},
    {FLOAT(1), NO_FLOAT, NO_FLOAT, NO_FLOAT}, {FLOAT(0), FLOAT(1), NO_FLOAT, NO_FLOAT},
    {FLOAT(2), NO_FLOAT, NO_FLOAT, NO_FLOAT}, {FLOAT(0), FLOAT(2), NO_FLOAT, NO_FLOAT},
    {FLOAT(1), FLOAT(2), NO_FLOAT, NO_FLOAT}, {FLOAT(0), FLOAT(1), FLOAT(2), NO_FLOAT},
    {FLOAT(3), NO_FLOAT, NO_FLOAT, NO_FLOAT}, {FLOAT(0), FLOAT(3), NO_FLOAT, NO_FLOAT},
    {FLOAT(1), FLOAT(3), NO_FLOAT, NO_FLOAT}, {FLOAT(0), FLOAT(1), FLOAT(3), NO_FLOAT},
    {FLOAT(2), FLOAT(3), NO_FLOAT, NO_FLOAT}, {FLOAT(0), FLOAT(2), FLOAT(3), NO_FLOAT},
    {FLOAT(1), FLOAT(2), FLOAT(3), NO_FLOAT}, {FLOAT(0), FLOAT(1), FLOAT(2), FLOAT(3)},
};
#undef FLOAT
#undef NO_FLOAT
QSP_INLINE float32x4_t f32x4_permute(float32x4_t v, const uint8_t *from)
{
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v), vld1q_u8(from)));
}
QSP_INLINE f32x16 f32x16_mul_spread(const float *p, uint32_t bits, f32x16 factor)
{
    f32x16 r;
    QSP_UNROLL
    for (int i = 0; i < 4; i++, bits >>= 4) {
        const float32x4_t v = vmulq_f32(f32x4_permute(vld1q_f32(p), spread_four[bits & 15]), factor.v[i]);
        r.v[i] = f32x4_keep(v, u32x4_from_bits(bits, 0));
        p += count_four(bits);
    }
    return r;
}
QSP_INLINE void f32x16_store_side(float *p, f32x16 v, uint32_t bits)
{
    QSP_UNROLL
    for (int i = 0; i < 4; i++, bits >>= 4) {
        vst1q_f32(p, f32x4_permute(v.v[i], side_four[bits & 15]));
        p += count_four(bits);
    }
}
QSP_INLINE float f32x16_reduce_add(f32x16 v)
{
    return vaddvq_f32(vaddq_f32(vaddq_f32(v.v[0], v.v[1]), vaddq_f32(v.v[2], v.v[3])));
}
QSP_INLINE f32x16 f32x16_copysign(f32x16 v, f32x16 sign)
{
    EACH_QUARTER(f32x16, vbslq_f32(vdupq_n_u32(0x80000000U), sign.v[i], v.v[i]));
}
QSP_INLINE f32x16 f32x16_abs(f32x16 v) { EACH_QUARTER(f32x16, vabsq_f32(v.v[i])); }
QSP_INLINE f32x16 f32x16_is_nonzero(f32x16 v)
{
    EACH_QUARTER(f32x16, f32x4_keep(vdupq_n_f32(1.0f), vmvnq_u32(vceqzq_f32(v.v[i]))));
}
QSP_INLINE f32x16 f32x16_gather(const float *base, const int32_t *index, int n)
{
    float line[16] = {0};
    for (int i = 0; i < n; i++)
        if (index[i] >= 0)
            line[i] = base[index[i]];
    return f32x16_load(line);
}

/* Four rows of four, from rows and to columns of the tile. */
QSP_INLINE void f32_transpose_4x4(f32x16 *to, int to_column, const f32x16 *from, int from_column)
{
    const float32x4_t a = from[0].v[from_column], b = from[1].v[from_column];
    const float32x4_t c = from[2].v[from_column], d = from[3].v[from_column];
    const float64x2_t ab_low = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab_high = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t cd_low = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd_high = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    to[0].v[to_column] = vreinterpretq_f32_f64(vzip1q_f64(ab_low, cd_low));
    to[1].v[to_column] = vreinterpretq_f32_f64(vzip1q_f64(ab_high, cd_high));
    to[2].v[to_column] = vreinterpretq_f32_f64(vzip2q_f64(ab_low, cd_low));
    to[3].v[to_column] = vreinterpretq_f32_f64(vzip2q_f64(ab_high, cd_high));
}
QSP_INLINE void f32_transpose_16x16(f32x16 *r)
{
    f32x16 t[16];
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        QSP_UNROLL
        for (int j = 0; j < 4; j++)
            f32_transpose_4x4(t + 4 * j, i, r + 4 * i, j);
    QSP_UNROLL
    for (int i = 0; i < 16; i++)
        r[i] = t[i];
}

/* ---- 16 doubles: sums of floats ---- */
typedef struct {
    float64x2_t v[8];
} f64x16;

#define EACH_EIGHTH(expression)                                                                                        \
    f64x16 r;                                                                                                          \
    QSP_UNROLL                                                                                                         \
    for (int i = 0; i < 8; i++)                                                                                        \
        r.v[i] = (expression);                                                                                         \
    return r
QSP_INLINE f64x16 f64x16_load(const double *p) { EACH_EIGHTH(vld1q_f64(p + 2 * i)); }
QSP_INLINE void f64x16_store(double *p, f64x16 v)
{
    QSP_UNROLL
    for (int i = 0; i < 8; i++)
        vst1q_f64(p + 2 * i, v.v[i]);
}
QSP_INLINE f64x16 f64x16_from_f32(f32x16 v)
{
    EACH_EIGHTH(i % 2 ? vcvt_high_f64_f32(v.v[i / 2]) : vcvt_f64_f32(vget_low_f32(v.v[i / 2])));
}
QSP_INLINE f64x16 f64x16_load_f32(const float *p) { EACH_EIGHTH(vcvt_f64_f32(vld1_f32(p + 2 * i))); }
QSP_INLINE f64x16 f64x16_add(f64x16 x, f64x16 y) { EACH_EIGHTH(vaddq_f64(x.v[i], y.v[i])); }
QSP_INLINE f64x16 f64x16_add_square(f64x16 sum, f64x16 v) { EACH_EIGHTH(vfmaq_f64(sum.v[i], v.v[i], v.v[i])); }

/* ---- 16 integers, 16 magnitudes as integers, 16 codes ---- */
typedef struct {
    int32x4_t v[4];
} i32x16;
typedef struct {
    uint32x4_t v[4];
} u32x16;
typedef struct {
    uint64x2_t v[4];
} u64x8;
typedef uint8x16_t u8x16;

/* They wrap around; gcc's intrinsics of signed vectors are a + b and a - b, which need not. */
QSP_INLINE int32x4_t i32x4_add(int32x4_t a, int32x4_t b)
{
    return vreinterpretq_s32_u32(vaddq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
}
QSP_INLINE int32x4_t i32x4_sub(int32x4_t a, int32x4_t b)
{
    return vreinterpretq_s32_u32(vsubq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
}
QSP_INLINE i32x16 i32x16_set1(int32_t v) { EACH_QUARTER(i32x16, vdupq_n_s32(v)); }
QSP_INLINE i32x16 i32x16_load_n(const int32_t *p, int n)
{
    int32_t line[16] = {0};
    if (n < 16)
        p = memcpy(line, p, (size_t)n * sizeof *p);
    EACH_QUARTER(i32x16, vld1q_s32(p + 4 * i));
}
/* Conversions of this architecture make a zero of a NaN. */
QSP_INLINE int32x4_t i32x4_or_nan(int32x4_t v, float32x4_t from)
{
    return vbslq_s32(vceqq_f32(from, from), v, vdupq_n_s32(INT32_MIN));
}
QSP_INLINE i32x16 i32x16_nearest(f32x16 v) { EACH_QUARTER(i32x16, i32x4_or_nan(vcvtnq_s32_f32(v.v[i]), v.v[i])); }
QSP_INLINE i32x16 i32x16_truncated(f32x16 v) { EACH_QUARTER(i32x16, i32x4_or_nan(vcvtq_s32_f32(v.v[i]), v.v[i])); }
QSP_INLINE f32x16 f32x16_from_bits(i32x16 v) { EACH_QUARTER(f32x16, vreinterpretq_f32_s32(v.v[i])); }
QSP_INLINE i32x16 i32x16_add(i32x16 x, i32x16 y) { EACH_QUARTER(i32x16, i32x4_add(x.v[i], y.v[i])); }
QSP_INLINE i32x16 i32x16_sub(i32x16 x, i32x16 y) { EACH_QUARTER(i32x16, i32x4_sub(x.v[i], y.v[i])); }
QSP_INLINE i32x16 i32x16_min(i32x16 x, i32x16 y) { EACH_QUARTER(i32x16, vminq_s32(x.v[i], y.v[i])); }
QSP_INLINE i32x16 i32x16_max(i32x16 x, i32x16 y) { EACH_QUARTER(i32x16, vmaxq_s32(x.v[i], y.v[i])); }
QSP_INLINE i32x16 i32x16_shift_left(i32x16 v, i32x16 n) { EACH_QUARTER(i32x16, vshlq_s32(v.v[i], n.v[i])); }
QSP_INLINE i32x16 i32x16_shift_right(i32x16 v, i32x16 n)
{
    EACH_QUARTER(i32x16, vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v.v[i]), vnegq_s32(n.v[i]))));
}
QSP_INLINE i32x16 i32x16_log2(i32x16 v)
{
    EACH_QUARTER(i32x16,
                 i32x4_sub(vshrq_n_s32(vreinterpretq_s32_f32(vcvtq_f32_s32(v.v[i])), 23), vdupq_n_s32(127)));
}
QSP_INLINE int32x4_t i32x4_apply_sign(int32x4_t v, int32x4_t sign)
{
    const int32x4_t negative = vshrq_n_s32(sign, 31);
    return vandq_s32(i32x4_sub(veorq_s32(v, negative), negative), vreinterpretq_s32_u32(vtstq_s32(sign, sign)));
}
QSP_INLINE i32x16 i32x16_apply_sign(i32x16 v, i32x16 sign)
{
    EACH_QUARTER(i32x16, i32x4_apply_sign(v.v[i], sign.v[i]));
}
QSP_INLINE u32x16 u32x16_widen(uint8x16_t v)
{
    const uint16x8_t low = vmovl_u8(vget_low_u8(v)), high = vmovl_high_u8(v);
    const u32x16 r = {
        {vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high)}};
    return r;
}
QSP_INLINE i32x16 i32x16_load_u8(const uint8_t *p)
{
    const u32x16 v = u32x16_widen(vld1q_u8(p));
    EACH_QUARTER(i32x16, vreinterpretq_s32_u32(v.v[i]));
}
QSP_INLINE i32x16 i32x16_load_s8(const uint8_t *p)
{
    const int8x16_t v = vreinterpretq_s8_u8(vld1q_u8(p));
    const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_high_s8(v);
    const i32x16 r = {
        {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
    return r;
}
QSP_INLINE f32x16 f32x16_load_u8(const uint8_t *p)
{
    const u32x16 v = u32x16_widen(vld1q_u8(p));
    EACH_QUARTER(f32x16, vcvtq_f32_u32(v.v[i]));
}
QSP_INLINE f32x16 f32x16_from_i32(i32x16 v) { EACH_QUARTER(f32x16, vcvtq_f32_s32(v.v[i])); }
QSP_INLINE int32_t i32x16_reduce_add(i32x16 v)
{
    return vaddvq_s32(i32x4_add(i32x4_add(v.v[0], v.v[1]), i32x4_add(v.v[2], v.v[3])));
}
QSP_INLINE u64x8 u64x8_zero(void) { EACH_QUARTER(u64x8, vdupq_n_u64(0)); }
QSP_INLINE u64x8 u64x8_add_pairs(u64x8 sum, i32x16 v)
{
    EACH_QUARTER(u64x8, vaddq_u64(sum.v[i], vreinterpretq_u64_s32(v.v[i])));
}
QSP_INLINE uint64x2_t u64x2_add_products(uint64x2_t sum, uint64x2_t v)
{
    return vmlal_u32(sum, vmovn_u64(v), vshrn_n_u64(v, 32));
}
QSP_INLINE u64x8 u64x8_add_products(u64x8 sum, i32x16 v)
{
    EACH_QUARTER(u64x8, u64x2_add_products(sum.v[i], vreinterpretq_u64_s32(v.v[i])));
}
QSP_INLINE void u64x8_store(uint64_t *p, u64x8 v)
{
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        vst1q_u64(p + 2 * i, v.v[i]);
}
QSP_INLINE u32x16 u32x16_zero(void) { EACH_QUARTER(u32x16, vdupq_n_u32(0)); }
QSP_INLINE u32x16 u32x16_load_bits(const float *p)
{
    EACH_QUARTER(u32x16, vreinterpretq_u32_f32(vld1q_f32(p + 4 * i)));
}
QSP_INLINE void u32x16_store_bits(float *p, u32x16 v)
{
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        vst1q_f32(p + 4 * i, vreinterpretq_f32_u32(v.v[i]));
}
QSP_INLINE u32x16 u32x16_max_abs(u32x16 m, f32x16 v)
{
    EACH_QUARTER(u32x16, vmaxq_u32(m.v[i], vreinterpretq_u32_f32(vabsq_f32(v.v[i]))));
}
QSP_INLINE uint32_t u32x16_reduce_max(u32x16 v)
{
    return vmaxvq_u32(vmaxq_u32(vmaxq_u32(v.v[0], v.v[1]), vmaxq_u32(v.v[2], v.v[3])));
}

QSP_INLINE u8x16 i32x16_to_s8(i32x16 v)
{
    const int16x8_t low = vqmovn_high_s32(vqmovn_s32(v.v[0]), v.v[1]), high = vqmovn_high_s32(vqmovn_s32(v.v[2]), v.v[3]);
    return vreinterpretq_u8_s8(vqmovn_high_s16(vqmovn_s16(low), high));
}
QSP_INLINE u8x16 i32x16_to_code(i32x16 v) { return veorq_u8(i32x16_to_s8(v), vdupq_n_u8(0x80)); }
QSP_INLINE void u8x16_store(uint8_t *p, u8x16 v) { vst1q_u8(p, v); }
QSP_INLINE void u8x16_store_n(uint8_t *p, u8x16 v, int n)
{
    uint8_t line[16];
    vst1q_u8(line, v);
    memcpy(p, line, (size_t)n);
}
QSP_INLINE void u8_transpose_unit(uint8_t *p, int64_t pitch, const uint8_t *codes, int lanes, int channels)
{
    for (int part = 0; part < lanes; part += 16) {
        uint8x16_t r[16], t[16];
        QSP_UNROLL
        for (int i = 0; i < 16; i++)
            r[i] = vld1q_u8(codes + QSP_UNIT * i + part);
        QSP_UNROLL
        for (int stage = 0; stage < 4; stage++) {
            QSP_UNROLL
            for (int i = 0; i < 8; i++) {
                t[2 * i] = vzip1q_u8(r[i], r[i + 8]);
                t[2 * i + 1] = vzip2q_u8(r[i], r[i + 8]);
            }
            QSP_UNROLL
            for (int i = 0; i < 16; i++)
                r[i] = t[i];
        }
        const int n = lanes - part < 16 ? lanes - part : 16;
        QSP_UNROLL
        for (int i = 0; i < 16; i++)
            if (i < channels) {
                if (n == 16)
                    vst1q_u8(p + i * pitch + part, r[i]);
                else
                    u8x16_store_n(p + i * pitch + part, r[i], n);
            }
    }
}

QSP_INLINE void u8x32_copy_even(uint8_t *to, const uint8_t *from)
{
    vst1q_u8(to, vuzp1q_u8(vld1q_u8(from), vld1q_u8(from + 16)));
    vst1q_u8(to + 16, vuzp1q_u8(vld1q_u8(from + 32), vld1q_u8(from + 48)));
}

/* ---- random numbers ---- */

/* Four results of qsp_random_bits, from their counters. */
typedef struct {
    uint64x2_t low, high;
} u64x4;

QSP_INLINE u64x4 u64x4_random_round(u64x4 x, uint32_t multiplier)
{
    const uint32x4_t halves = vuzp1q_u32(vreinterpretq_u32_u64(x.low), vreinterpretq_u32_u64(x.high));
    const u64x4 r = {veorq_u64(x.low, vmull_n_u32(vget_low_u32(halves), multiplier)),
                     veorq_u64(x.high, vmull_high_n_u32(halves, multiplier))};
    return r;
}
QSP_INLINE u64x4 u64x4_exchange_halves(u64x4 x)
{
    const u64x4 r = {vreinterpretq_u64_u32(vrev64q_u32(vreinterpretq_u32_u64(x.low))),
                     vreinterpretq_u64_u32(vrev64q_u32(vreinterpretq_u32_u64(x.high)))};
    return r;
}
QSP_INLINE u64x4 u64x4_random_mix(u64x4 x)
{
    x = u64x4_exchange_halves(u64x4_random_round(x, QSP_RANDOM_1));
    x = u64x4_exchange_halves(u64x4_random_round(x, QSP_RANDOM_2));
    return u64x4_random_round(x, QSP_RANDOM_3);
}

/* Counters of four that are `step` apart. */
QSP_INLINE u64x4 u64x4_random_counters(uint64_t start, uint64_t step)
{
    const u64x4 r = {vcombine_u64(vcreate_u64(start), vcreate_u64(start + step)),
                     vcombine_u64(vcreate_u64(start + 2 * step), vcreate_u64(start + 3 * step))};
    return r;
}
QSP_INLINE u64x4 u64x4_advance(u64x4 x, uint64_t by)
{
    const u64x4 r = {vaddq_u64(x.low, vdupq_n_u64(by)), vaddq_u64(x.high, vdupq_n_u64(by))};
    return r;
}

/* Sixteen words of 16 bits as dither. */
QSP_INLINE i32x16 dither_from_words(uint16x8_t low, uint16x8_t high)
{
    const uint16x8_t above = vdupq_n_u16(QSP_DITHER_BITS >> 16);
    const i32x16 r = {
        {vreinterpretq_s32_u16(vzip1q_u16(low, above)), vreinterpretq_s32_u16(vzip2q_u16(low, above)),
         vreinterpretq_s32_u16(vzip1q_u16(high, above)), vreinterpretq_s32_u16(vzip2q_u16(high, above))}};
    return r;
}
QSP_INLINE i32x16 dither_from_counters(u64x4 counters)
{
    const u64x4 x = u64x4_random_mix(counters);
    return dither_from_words(vreinterpretq_u16_u64(x.low), vreinterpretq_u16_u64(x.high));
}

/* Not inline: it serves odd shapes only, and is long. */
QSP_APART i32x16 i32x16_random_strided(uint64_t seed, uint64_t index, int64_t step)
{
    int32_t line[16];
    for (int i = 0; i < 16; i++)
        line[i] = QSP_DITHER_BITS | (int32_t)qsp_random_bits(seed, index + (uint64_t)(i * step));
    return i32x16_load_n(line, 16);
}
QSP_INLINE i32x16 i32x16_random_run(uint64_t seed, uint64_t index)
{
    return dither_from_counters(u64x4_random_counters(qsp_random_counter(seed, index), QSP_RANDOM_STEP));
}

typedef struct {
    u64x4 counters;
    uint64_t step;
} random_rows;

QSP_INLINE random_rows random_rows_from(uint64_t seed, uint64_t index, int64_t step)
{
    const random_rows r = {u64x4_random_counters(qsp_random_counter(seed, index), QSP_RANDOM_STEP),
                           (uint64_t)(step >> 2) * QSP_RANDOM_STEP};
    return r;
}
QSP_INLINE void random_rows_next(random_rows *r, i32x16 *out)
{
    QSP_UNROLL
    for (int i = 0; i < 2; i++) {
        out[i] = dither_from_counters(r->counters);
        r->counters = u64x4_advance(r->counters, r->step);
    }
}

/* The words of two vectors with even numbers, and those with odd ones. */
QSP_INLINE uint16x8_t u16x8_even(uint16x8_t a, uint16x8_t b) { return vuzp1q_u16(a, b); }
QSP_INLINE uint16x8_t u16x8_odd(uint16x8_t a, uint16x8_t b) { return vuzp2q_u16(a, b); }

QSP_INLINE void i32x16_random_fours(uint64_t seed, uint64_t index, int64_t step, i32x16 *out)
{
    const uint64_t by = (uint64_t)(step >> 2) * QSP_RANDOM_STEP;
    u64x4 counters = u64x4_random_counters(qsp_random_counter(seed, index), by);
    uint16x8_t even[4], odd[4]; /* words 0 and 2, and 1 and 3, of four numbers each */
    QSP_UNROLL
    for (int i = 0; i < 4; i++) {
        const u64x4 x = u64x4_random_mix(counters);
        even[i] = u16x8_even(vreinterpretq_u16_u64(x.low), vreinterpretq_u16_u64(x.high));
        odd[i] = u16x8_odd(vreinterpretq_u16_u64(x.low), vreinterpretq_u16_u64(x.high));
        counters = u64x4_advance(counters, 4 * by);
    }
    out[0] = dither_from_words(u16x8_even(even[0], even[1]), u16x8_even(even[2], even[3]));
    out[1] = dither_from_words(u16x8_even(odd[0], odd[1]), u16x8_even(odd[2], odd[3]));
    out[2] = dither_from_words(u16x8_odd(even[0], even[1]), u16x8_odd(even[2], even[3]));
    out[3] = dither_from_words(u16x8_odd(odd[0], odd[1]), u16x8_odd(odd[2], odd[3]));
}

#include "isa/neon_products.h"
