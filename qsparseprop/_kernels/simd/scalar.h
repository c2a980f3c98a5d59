/* Primitives in portable C: what every other path is compared with, and what runs where nothing better exists. */
#define ISA_UNIT_VECTORS 4 /* vectors of 16 codes in one unit */
#define ISA_SDDMM_UNITS 1
#define ISA_QUADS 1

/* ---- 16 floats ---- */
typedef struct {
    float v[16];
} f16x;

#define EACH16(expression)             \
    f16x r;                            \
    for (int i = 0; i < 16; i++)       \
        r.v[i] = (expression);         \
    return r

QSP_INLINE f16x f16_set1(float v) { EACH16(v); }
QSP_INLINE f16x f16_zero(void) { EACH16(0.0f); }
QSP_INLINE f16x f16_load(const float *p) { EACH16(p[i]); }
QSP_INLINE f16x f16_load_n(const float *p, int n) { EACH16(i < n ? p[i] : 0.0f); }
QSP_INLINE f16x f16_load_bf16(const uint16_t *p) { EACH16(qsp_bf16_to_float(p[i])); }
QSP_INLINE f16x f16_load_bf16_n(const uint16_t *p, int n) { EACH16(i < n ? qsp_bf16_to_float(p[i]) : 0.0f); }
QSP_INLINE f16x f16_load_sums(const int32_t *p) { EACH16((float)p[i]); }
QSP_INLINE f16x f16_mul(f16x a, f16x b) { EACH16(a.v[i] * b.v[i]); }
QSP_INLINE f16x f16_add(f16x a, f16x b) { EACH16(a.v[i] + b.v[i]); }
QSP_INLINE f16x f16_sub(f16x a, f16x b) { EACH16(a.v[i] - b.v[i]); }
QSP_INLINE f16x f16_div(f16x a, f16x b) { EACH16(a.v[i] / b.v[i]); }
QSP_INLINE f16x f16_fma(f16x a, f16x b, f16x c) { EACH16(a.v[i] * b.v[i] + c.v[i]); }
QSP_INLINE f16x f16_min(f16x a, f16x b) { EACH16(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
QSP_INLINE f16x f16_max(f16x a, f16x b) { EACH16(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
QSP_INLINE f16x f16_gather(const float *base, const int32_t *index, int n)
{
    EACH16(i < n && index[i] >= 0 ? base[index[i]] : 0.0f);
}
QSP_INLINE void f16_store(float *p, f16x v) { memcpy(p, v.v, sizeof v.v); }
QSP_INLINE void f16_store_n(float *p, f16x v, int n) { memcpy(p, v.v, (size_t)n * sizeof *p); }
QSP_INLINE void f16_store_bf16_n(uint16_t *p, f16x v, int n)
{
    for (int i = 0; i < n; i++)
        p[i] = qsp_bf16_from_float(v.v[i]);
}
QSP_INLINE void f16_store_bf16(uint16_t *p, f16x v) { f16_store_bf16_n(p, v, 16); }
/* Bits of the places where low < v < high, and what is left of v with all others zero. */
QSP_INLINE uint32_t f16_between(f16x v, f16x low, f16x high)
{
    uint32_t bits = 0;
    for (int i = 0; i < 16; i++)
        bits |= (uint32_t)(low.v[i] < v.v[i] && v.v[i] < high.v[i]) << i;
    return bits;
}
QSP_INLINE f16x f16_keep(f16x v, uint32_t bits) { EACH16(bits >> i & 1 ? v.v[i] : 0.0f); }
QSP_INLINE f16x f16_from_codes(const uint8_t *p) { EACH16((float)p[i]); }
QSP_INLINE float f16_sum(f16x v)
{
    float s = 0.0f;
    for (int i = 0; i < 16; i++)
        s += v.v[i];
    return s;
}
QSP_INLINE float f16_least(f16x v)
{
    float s = v.v[0];
    for (int i = 1; i < 16; i++)
        s = v.v[i] < s ? v.v[i] : s;
    return s;
}
QSP_INLINE float f16_greatest(f16x v)
{
    float s = v.v[0];
    for (int i = 1; i < 16; i++)
        s = v.v[i] > s ? v.v[i] : s;
    return s;
}
QSP_INLINE void f16_transpose(f16x *r)
{
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            const float t = r[i].v[j];
            r[i].v[j] = r[j].v[i];
            r[j].v[i] = t;
        }
}

QSP_INLINE f16x f16_abs(f16x v) { EACH16(fabsf(v.v[i])); }
/* The magnitude of v, with the sign of another. */
QSP_INLINE f16x f16_copysign(f16x v, f16x sign) { EACH16(copysignf(v.v[i], sign.v[i])); }
/* One where v is not zero, otherwise zero. */
QSP_INLINE f16x f16_is_nonzero(f16x v) { EACH16(v.v[i] != 0.0f ? 1.0f : 0.0f); }

/* ---- 16 doubles: sums of floats ---- */
typedef struct {
    double v[16];
} d16x;

#define EACH16D(expression)            \
    d16x r;                            \
    for (int i = 0; i < 16; i++)       \
        r.v[i] = (expression);         \
    return r

QSP_INLINE d16x d16_load(const double *p) { EACH16D(p[i]); }
QSP_INLINE void d16_store(double *p, d16x v) { memcpy(p, v.v, sizeof v.v); }
QSP_INLINE d16x d16_from(f16x v) { EACH16D((double)v.v[i]); }
QSP_INLINE d16x d16_load_floats(const float *p) { EACH16D((double)p[i]); }
QSP_INLINE d16x d16_add(d16x x, d16x y) { EACH16D(x.v[i] + y.v[i]); }
/* sum + v^2, where the square of a float is exact: fused or not, the result is the same. */
QSP_INLINE d16x d16_add_square(d16x sum, d16x v) { EACH16D(sum.v[i] + v.v[i] * v.v[i]); }

/* ---- absolute values as integers, which lets a NaN win every comparison ---- */
typedef struct {
    uint32_t v[16];
} u32x16;
QSP_INLINE u32x16 u32_zero(void)
{
    u32x16 r;
    memset(&r, 0, sizeof r);
    return r;
}
QSP_INLINE u32x16 u32_load(const float *p)
{
    u32x16 r;
    memcpy(&r, p, sizeof r);
    return r;
}
QSP_INLINE void u32_store(float *p, u32x16 v) { memcpy(p, &v, sizeof v); }
QSP_INLINE u32x16 u32_max_abs(u32x16 m, f16x x)
{
    for (int i = 0; i < 16; i++) {
        uint32_t bits;
        memcpy(&bits, &x.v[i], 4);
        bits &= 0x7fffffffU;
        m.v[i] = bits > m.v[i] ? bits : m.v[i];
    }
    return m;
}
QSP_INLINE uint32_t u32_greatest(u32x16 m)
{
    uint32_t s = 0;
    for (int i = 0; i < 16; i++)
        s = m.v[i] > s ? m.v[i] : s;
    return s;
}

/* ---- 16 integers, 16 codes ---- */
typedef struct {
    int32_t v[16];
} i32x16;
typedef struct {
    uint8_t v[16];
} u8x16;

#define EACH16I(expression)            \
    i32x16 r;                          \
    for (int i = 0; i < 16; i++)       \
        r.v[i] = (expression);         \
    return r

/* Nearest even for |v| < 2^31, whatever rounding function the compiler's target has; NaN as x86 converts it. */
QSP_INLINE int32_t nearest(float v)
{
    const double shifted = (double)v + 6755399441055744.0; /* 1.5 * 2^52: no bits are left behind the point */
    return shifted == shifted ? (int32_t)(shifted - 6755399441055744.0) : INT32_MIN;
}
QSP_INLINE i32x16 i32_set1(int32_t v) { EACH16I(v); }
QSP_INLINE i32x16 i32_load_n(const int32_t *p, int n) { EACH16I(i < n ? p[i] : 0); }
QSP_INLINE i32x16 i32_nearest(f16x v) { EACH16I(nearest(v.v[i])); }
QSP_INLINE i32x16 i32_truncated(f16x v) { EACH16I(v.v[i] == v.v[i] ? (int32_t)v.v[i] : INT32_MIN); }
QSP_INLINE f16x f16_from_bits(i32x16 v)
{
    f16x r;
    memcpy(&r, &v, sizeof r);
    return r;
}
/* These wrap around: any zero point may be given to `dequantize`. */
QSP_INLINE i32x16 i32_add(i32x16 a, i32x16 b) { EACH16I((int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i])); }
QSP_INLINE i32x16 i32_sub(i32x16 a, i32x16 b) { EACH16I((int32_t)((uint32_t)a.v[i] - (uint32_t)b.v[i])); }
QSP_INLINE i32x16 i32_min(i32x16 a, i32x16 b) { EACH16I(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
QSP_INLINE i32x16 i32_max(i32x16 a, i32x16 b) { EACH16I(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
QSP_INLINE i32x16 i32_shift_left(i32x16 v, i32x16 n) { EACH16I((int32_t)((uint32_t)v.v[i] << n.v[i])); }
QSP_INLINE i32x16 i32_shift_right(i32x16 v, i32x16 n) { EACH16I((int32_t)((uint32_t)v.v[i] >> n.v[i])); }
/* Position of the highest bit of 0 < v < 2^24; negative for 0. */
QSP_INLINE i32x16 i32_log2(i32x16 v)
{
    i32x16 r;
    for (int i = 0; i < 16; i++) {
        const float f = (float)v.v[i];
        memcpy(&r.v[i], &f, 4);
        r.v[i] = (r.v[i] >> 23) - 127;
    }
    return r;
}
/* v, negative where `sign` is, and zero where it is. */
QSP_INLINE i32x16 i32_signed(i32x16 v, i32x16 sign) { EACH16I(sign.v[i] < 0 ? -v.v[i] : sign.v[i] ? v.v[i] : 0); }
QSP_INLINE i32x16 i32_load_u8(const uint8_t *p) { EACH16I(p[i]); }
QSP_INLINE i32x16 i32_load_s8(const uint8_t *p) { EACH16I((int8_t)p[i]); }
QSP_INLINE f16x f16_from(i32x16 v) { EACH16((float)v.v[i]); }
QSP_INLINE int32_t i32_sum(i32x16 v)
{
    int32_t s = 0;
    for (int i = 0; i < 16; i++)
        s += v.v[i];
    return s;
}
/* Bytes of v in [-128, 127], saturated: weights, and codes minus 128. */
QSP_INLINE u8x16 codes_signed(i32x16 v)
{
    u8x16 r;
    for (int i = 0; i < 16; i++)
        r.v[i] = (uint8_t)(v.v[i] < -128 ? -128 : v.v[i] > 127 ? 127 : v.v[i]);
    return r;
}
QSP_INLINE u8x16 codes_from(i32x16 v)
{
    u8x16 r = codes_signed(v);
    for (int i = 0; i < 16; i++)
        r.v[i] ^= 0x80;
    return r;
}
QSP_INLINE void codes_store(uint8_t *p, u8x16 v) { memcpy(p, v.v, 16); }
QSP_INLINE void codes_copy_n(uint8_t *p, const uint8_t *from, int n)
{
    for (int i = 0; i < n; i++) /* fewer than 16: a call would cost more */
        p[i] = from[i];
}
QSP_INLINE void codes_store_n(uint8_t *p, u8x16 v, int n) { memcpy(p, v.v, (size_t)n); }
QSP_INLINE u8x16 u8_load(const uint8_t *p)
{
    u8x16 r;
    memcpy(r.v, p, 16);
    return r;
}
QSP_INLINE void codes_transpose(u8x16 *r)
{
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            const uint8_t t = r[i].v[j];
            r[i].v[j] = r[j].v[i];
            r[j].v[i] = t;
        }
}

/* ---- random numbers, see qsp_random_bits; all are the bits of 128 + u ---- */

/* Of 16 elements whose indices are `step` apart. Not inline: it serves odd shapes only, and is long. */
static i32x16 random_any(uint64_t seed, uint64_t index, int64_t step)
{
    EACH16I(QSP_DITHER_BITS | (int32_t)qsp_random_bits(seed, index + (uint64_t)(i * step)));
}
/* Of 16 elements whose indices follow each other from a multiple of four on. */
QSP_INLINE i32x16 random_run(uint64_t seed, uint64_t index) { return random_any(seed, index, 1); }

/* Of rows of 16 elements, which start at `index` and then `step` apart, both multiples of four; two at a time. */
typedef struct {
    uint64_t seed, index;
    int64_t step;
} random_rows;

QSP_INLINE random_rows random_rows_from(uint64_t seed, uint64_t index, int64_t step)
{
    const random_rows r = {seed, index, step};
    return r;
}
QSP_INLINE void random_rows_next(random_rows *r, i32x16 *out)
{
    for (int i = 0; i < 2; i++) {
        out[i] = random_run(r->seed, r->index);
        r->index += (uint64_t)r->step;
    }
}
/* Of 16 times four neighbouring elements, which start at `index` and then `step` apart, both multiples of four: out[i]
 * has the sixteen that come as number i. */
QSP_INLINE void random_fours(uint64_t seed, uint64_t index, int64_t step, i32x16 *out)
{
    for (int i = 0; i < 4; i++)
        out[i] = random_any(seed, index + (uint64_t)i, step);
}

/* 16 lanes (rows) x 16 channels of codes minus 128 -> codes, a channel's lanes together. */
QSP_INLINE void codes_tile_store(uint8_t *p, int64_t pitch, const i32x16 *rows)
{
    u8x16 tile[16];
    for (int j = 0; j < 16; j++)
        tile[j] = codes_from(rows[j]);
    codes_transpose(tile);
    for (int j = 0; j < 16; j++)
        codes_store(p + j * pitch, tile[j]);
}

/* ---- gather-SpMM on codes: 16 lanes, four nonzeros a step ---- */
typedef struct {
    int32_t sum[16];
} quad;

QSP_INLINE void quad_set(quad *q, int32_t v)
{
    for (int i = 0; i < 16; i++)
        q->sum[i] = v;
}
QSP_INLINE void quad_dot(quad *q, const uint8_t *x, const int32_t *offset, const int8_t *weight)
{
    for (int k = 0; k < QSP_GROUP; k++) {
        const uint8_t *p = x + offset[k];
        const int32_t w = weight[k];
        for (int i = 0; i < 16; i++)
            q->sum[i] += w * p[i];
    }
}
QSP_INLINE void quad_store(int32_t *p, const quad *even, const quad *odd)
{
    (void)odd; /* ISA_QUADS is 1 */
    for (int i = 0; i < 16; i++)
        p[i] = even->sum[i];
}
QSP_INLINE int quad_lane(int place) { return place; }
QSP_INLINE void quad_unpack(float *out, const int32_t *sums, float scale, float bias)
{
    for (int i = 0; i < QSP_UNIT; i++)
        out[i] = (float)sums[i] * scale + bias;
}

/* ---- gather-SDDMM on codes ---- */
typedef struct {
    int32_t v[16];
} dots;
typedef struct {
    int8_t v[16];
} grad;

QSP_INLINE grad grad_load(const uint8_t *p)
{
    grad g;
    for (int i = 0; i < 16; i++)
        g.v[i] = (int8_t)(p[i] - 128);
    return g;
}
QSP_INLINE dots dots_zero(void)
{
    dots d;
    memset(&d, 0, sizeof d);
    return d;
}
QSP_INLINE dots dots_add(dots a, dots b)
{
    for (int i = 0; i < 16; i++)
        a.v[i] += b.v[i];
    return a;
}
QSP_INLINE dots dots_step(dots sum, const uint8_t *x, grad g)
{
    for (int i = 0; i < 16; i++)
        sum.v[i] += (int32_t)x[i] * g.v[i];
    return sum;
}
QSP_INLINE int32_t dots_total(dots d)
{
    int32_t s = 0;
    for (int i = 0; i < 16; i++)
        s += d.v[i];
    return s;
}
QSP_INLINE dots grad_sum(dots sum, const uint8_t *p)
{
    for (int i = 0; i < 16; i++)
        sum.v[i] += p[i] - 128;
    return sum;
}
QSP_INLINE void dots_flush(int64_t *sums, const dots *d, int n)
{
    for (int j = 0; j < n; j++)
        sums[j] += dots_total(d[j]);
}
