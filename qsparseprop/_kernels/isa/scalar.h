/* Primitives in portable C: what every other path is compared with, and what runs where nothing better exists. What
 * each has to do, here and in every other header, is written down in primitives.h. */
#define ISA_LANES 16
#define ISA_SDDMM_UNITS 1
#define ISA_SPMM_ACCS 1
#define ISA_SPMM_TILE 16x4
#define ISA_SDDMM_TILE 64x16

/* ---- 16 floats ---- */
typedef struct {
    float v[16];
} f32x16;

#define RETURN_F32X16(expression)     \
    f32x16 r;                         \
    for (int i = 0; i < 16; i++)      \
        r.v[i] = (expression);        \
    return r

QSP_INLINE f32x16 f32x16_set1(float v) { RETURN_F32X16(v); }
QSP_INLINE f32x16 f32x16_zero(void) { RETURN_F32X16(0.0f); }
QSP_INLINE f32x16 f32x16_load(const float *p) { RETURN_F32X16(p[i]); }
QSP_INLINE f32x16 f32x16_load_n(const float *p, int n) { RETURN_F32X16(i < n ? p[i] : 0.0f); }
QSP_INLINE f32x16 f32x16_load_bf16(const uint16_t *p) { RETURN_F32X16(qsp_bf16_to_float(p[i])); }
QSP_INLINE f32x16 f32x16_load_bf16_n(const uint16_t *p, int n)
{
    RETURN_F32X16(i < n ? qsp_bf16_to_float(p[i]) : 0.0f);
}
QSP_INLINE f32x16 f32x16_load_i32(const int32_t *p) { RETURN_F32X16((float)p[i]); }
QSP_INLINE f32x16 f32x16_mul(f32x16 a, f32x16 b) { RETURN_F32X16(a.v[i] * b.v[i]); }
QSP_INLINE f32x16 f32x16_add(f32x16 a, f32x16 b) { RETURN_F32X16(a.v[i] + b.v[i]); }
QSP_INLINE f32x16 f32x16_sub(f32x16 a, f32x16 b) { RETURN_F32X16(a.v[i] - b.v[i]); }
QSP_INLINE f32x16 f32x16_div(f32x16 a, f32x16 b) { RETURN_F32X16(a.v[i] / b.v[i]); }
QSP_INLINE f32x16 f32x16_fma(f32x16 a, f32x16 b, f32x16 c) { RETURN_F32X16(a.v[i] * b.v[i] + c.v[i]); }
QSP_INLINE f32x16 f32x16_min(f32x16 a, f32x16 b) { RETURN_F32X16(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
QSP_INLINE f32x16 f32x16_max(f32x16 a, f32x16 b) { RETURN_F32X16(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
QSP_INLINE f32x16 f32x16_gather(const float *base, const int32_t *index, int n)
{
    RETURN_F32X16(i < n && index[i] >= 0 ? base[index[i]] : 0.0f);
}
QSP_INLINE void f32x16_store(float *p, f32x16 v) { memcpy(p, v.v, sizeof v.v); }
QSP_INLINE void f32x16_store_n(float *p, f32x16 v, int n) { memcpy(p, v.v, (size_t)n * sizeof *p); }
QSP_INLINE void f32x16_store_bf16_n(uint16_t *p, f32x16 v, int n)
{
    for (int i = 0; i < n; i++)
        p[i] = qsp_bf16_from_float(v.v[i]);
}
QSP_INLINE void f32x16_store_bf16(uint16_t *p, f32x16 v) { f32x16_store_bf16_n(p, v, 16); }
QSP_INLINE uint32_t f32x16_between(f32x16 v, f32x16 low, f32x16 high)
{
    uint32_t bits = 0;
    for (int i = 0; i < 16; i++)
        bits |= (uint32_t)(low.v[i] < v.v[i] && v.v[i] < high.v[i]) << i;
    return bits;
}
QSP_INLINE f32x16 f32x16_keep(f32x16 v, uint32_t bits) { RETURN_F32X16(bits >> i & 1 ? v.v[i] : 0.0f); }
QSP_INLINE f32x16 f32x16_mul_spread(const float *p, uint32_t bits, f32x16 factor)
{
    f32x16 r;
    QSP_UNROLL
    for (int i = 0; i < 16; i++) { /* no branch, which patterns would mislead every other time */
        const uint32_t there = bits >> i & 1;
        const float v = *p * factor.v[i];
        uint32_t word;
        memcpy(&word, &v, sizeof word);
        word &= 0U - there;
        memcpy(&r.v[i], &word, sizeof word);
        p += i < 15 ? there : 0;
    }
    return r;
}
QSP_INLINE void f32x16_store_side(float *p, f32x16 v, uint32_t bits)
{
    for (int i = 0, n = 0; i < 16; i++) { /* all are written, the wrong ones again: a branch would be guessed wrong */
        p[n] = v.v[i];
        n += (int)(bits >> i & 1);
    }
}
QSP_INLINE f32x16 f32x16_load_u8(const uint8_t *p) { RETURN_F32X16((float)p[i]); }
QSP_INLINE float f32x16_reduce_add(f32x16 v)
{
    float s = 0.0f;
    for (int i = 0; i < 16; i++)
        s += v.v[i];
    return s;
}
QSP_INLINE float f32x16_reduce_min(f32x16 v)
{
    float s = v.v[0];
    for (int i = 1; i < 16; i++)
        s = v.v[i] < s ? v.v[i] : s;
    return s;
}
QSP_INLINE float f32x16_reduce_max(f32x16 v)
{
    float s = v.v[0];
    for (int i = 1; i < 16; i++)
        s = v.v[i] > s ? v.v[i] : s;
    return s;
}
QSP_INLINE void f32_transpose_16x16(f32x16 *r)
{
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            const float t = r[i].v[j];
            r[i].v[j] = r[j].v[i];
            r[j].v[i] = t;
        }
}

QSP_INLINE f32x16 f32x16_abs(f32x16 v) { RETURN_F32X16(fabsf(v.v[i])); }
QSP_INLINE f32x16 f32x16_copysign(f32x16 v, f32x16 sign) { RETURN_F32X16(copysignf(v.v[i], sign.v[i])); }
QSP_INLINE f32x16 f32x16_is_nonzero(f32x16 v) { RETURN_F32X16(v.v[i] != 0.0f ? 1.0f : 0.0f); }

/* ---- 16 doubles: sums of floats ---- */
typedef struct {
    double v[16];
} f64x16;

#define RETURN_F64X16(expression)     \
    f64x16 r;                         \
    for (int i = 0; i < 16; i++)      \
        r.v[i] = (expression);        \
    return r

QSP_INLINE f64x16 f64x16_load(const double *p) { RETURN_F64X16(p[i]); }
QSP_INLINE void f64x16_store(double *p, f64x16 v) { memcpy(p, v.v, sizeof v.v); }
QSP_INLINE f64x16 f64x16_from_f32(f32x16 v) { RETURN_F64X16((double)v.v[i]); }
QSP_INLINE f64x16 f64x16_load_f32(const float *p) { RETURN_F64X16((double)p[i]); }
QSP_INLINE f64x16 f64x16_add(f64x16 x, f64x16 y) { RETURN_F64X16(x.v[i] + y.v[i]); }
QSP_INLINE f64x16 f64x16_add_square(f64x16 sum, f64x16 v) { RETURN_F64X16(sum.v[i] + v.v[i] * v.v[i]); }

/* ---- 16 magnitudes as integers ---- */
typedef struct {
    uint32_t v[16];
} u32x16;
QSP_INLINE u32x16 u32x16_zero(void)
{
    u32x16 r;
    memset(&r, 0, sizeof r);
    return r;
}
QSP_INLINE u32x16 u32x16_load_bits(const float *p)
{
    u32x16 r;
    memcpy(&r, p, sizeof r);
    return r;
}
QSP_INLINE void u32x16_store_bits(float *p, u32x16 v) { memcpy(p, &v, sizeof v); }
QSP_INLINE u32x16 u32x16_max_abs(u32x16 m, f32x16 x)
{
    for (int i = 0; i < 16; i++) {
        uint32_t bits;
        memcpy(&bits, &x.v[i], 4);
        bits &= 0x7fffffffU;
        m.v[i] = bits > m.v[i] ? bits : m.v[i];
    }
    return m;
}
QSP_INLINE uint32_t u32x16_reduce_max(u32x16 m)
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

#define RETURN_I32X16(expression)     \
    i32x16 r;                         \
    for (int i = 0; i < 16; i++)      \
        r.v[i] = (expression);        \
    return r

/* Nearest even for |v| < 2^31, whatever rounding function the compiler's target has; NaN as x86 converts it. */
QSP_INLINE int32_t nearest(float v)
{
    const double shifted = (double)v + 6755399441055744.0; /* 1.5 * 2^52: no bits are left behind the point */
    return shifted == shifted ? (int32_t)(shifted - 6755399441055744.0) : INT32_MIN;
}
QSP_INLINE i32x16 i32x16_set1(int32_t v) { RETURN_I32X16(v); }
QSP_INLINE i32x16 i32x16_load_n(const int32_t *p, int n) { RETURN_I32X16(i < n ? p[i] : 0); }
QSP_INLINE i32x16 i32x16_nearest(f32x16 v) { RETURN_I32X16(nearest(v.v[i])); }
QSP_INLINE i32x16 i32x16_truncated(f32x16 v) { RETURN_I32X16(v.v[i] == v.v[i] ? (int32_t)v.v[i] : INT32_MIN); }
QSP_INLINE f32x16 f32x16_from_bits(i32x16 v)
{
    f32x16 r;
    memcpy(&r, &v, sizeof r);
    return r;
}
/* Sums start from anything, and what they are in the end fits. */
QSP_INLINE int32_t wrapping_add(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
QSP_INLINE i32x16 i32x16_add(i32x16 a, i32x16 b) { RETURN_I32X16(wrapping_add(a.v[i], b.v[i])); }
QSP_INLINE i32x16 i32x16_sub(i32x16 a, i32x16 b) { RETURN_I32X16((int32_t)((uint32_t)a.v[i] - (uint32_t)b.v[i])); }
QSP_INLINE i32x16 i32x16_min(i32x16 a, i32x16 b) { RETURN_I32X16(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
QSP_INLINE i32x16 i32x16_max(i32x16 a, i32x16 b) { RETURN_I32X16(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
QSP_INLINE i32x16 i32x16_shift_left(i32x16 v, i32x16 n) { RETURN_I32X16((int32_t)((uint32_t)v.v[i] << n.v[i])); }
QSP_INLINE i32x16 i32x16_shift_right(i32x16 v, i32x16 n) { RETURN_I32X16((int32_t)((uint32_t)v.v[i] >> n.v[i])); }
QSP_INLINE i32x16 i32x16_log2(i32x16 v)
{
    i32x16 r;
    for (int i = 0; i < 16; i++) {
        const float f = (float)v.v[i];
        memcpy(&r.v[i], &f, 4);
        r.v[i] = (r.v[i] >> 23) - 127;
    }
    return r;
}
QSP_INLINE i32x16 i32x16_apply_sign(i32x16 v, i32x16 sign)
{
    RETURN_I32X16(sign.v[i] < 0 ? -v.v[i] : sign.v[i] ? v.v[i] : 0);
}
QSP_INLINE i32x16 i32x16_load_u8(const uint8_t *p) { RETURN_I32X16(p[i]); }
QSP_INLINE i32x16 i32x16_load_s8(const uint8_t *p) { RETURN_I32X16((int8_t)p[i]); }
QSP_INLINE f32x16 f32x16_from_i32(i32x16 v) { RETURN_F32X16((float)v.v[i]); }
QSP_INLINE int32_t i32x16_reduce_add(i32x16 v)
{
    int32_t s = 0;
    for (int i = 0; i < 16; i++)
        s += v.v[i];
    return s;
}

typedef struct {
    uint64_t v[8];
} u64x8;
QSP_INLINE u64x8 u64x8_zero(void)
{
    u64x8 r;
    memset(&r, 0, sizeof r);
    return r;
}
QSP_INLINE u64x8 u64x8_add_pairs(u64x8 sum, i32x16 v)
{
    for (int i = 0; i < 8; i++)
        sum.v[i] += (uint32_t)v.v[2 * i] | (uint64_t)(uint32_t)v.v[2 * i + 1] << 32;
    return sum;
}
QSP_INLINE u64x8 u64x8_add_products(u64x8 sum, i32x16 v)
{
    for (int i = 0; i < 8; i++)
        sum.v[i] += (uint64_t)(uint32_t)v.v[2 * i] * (uint32_t)v.v[2 * i + 1];
    return sum;
}
QSP_INLINE void u64x8_store(uint64_t *p, u64x8 v) { memcpy(p, v.v, sizeof v.v); }

QSP_INLINE u8x16 i32x16_to_s8(i32x16 v)
{
    u8x16 r;
    for (int i = 0; i < 16; i++)
        r.v[i] = (uint8_t)(v.v[i] < -128 ? -128 : v.v[i] > 127 ? 127 : v.v[i]);
    return r;
}
QSP_INLINE u8x16 i32x16_to_code(i32x16 v)
{
    u8x16 r = i32x16_to_s8(v);
    for (int i = 0; i < 16; i++)
        r.v[i] ^= 0x80;
    return r;
}
QSP_INLINE void u8x16_store(uint8_t *p, u8x16 v) { memcpy(p, v.v, 16); }
QSP_INLINE void u8x16_store_n(uint8_t *p, u8x16 v, int n) { memcpy(p, v.v, (size_t)n); }
QSP_INLINE void u8_transpose_unit(uint8_t *p, int64_t pitch, const uint8_t *codes, int lanes, int channels)
{
    for (int c = 0; c < channels; c++)
        for (int j = 0; j < lanes; j++)
            p[c * pitch + j] = codes[QSP_UNIT * (j % 16) + 16 * (j / 16) + c];
}

QSP_INLINE void u8x32_copy_even(uint8_t *to, const uint8_t *from)
{
    for (int i = 0; i < 32; i++)
        to[i] = from[2 * i];
}

/* ---- random numbers ---- */

/* Not inline: it serves odd shapes only, and is long. */
static i32x16 i32x16_random_strided(uint64_t seed, uint64_t index, int64_t step)
{
    RETURN_I32X16(QSP_DITHER_BITS | (int32_t)qsp_random_bits(seed, index + (uint64_t)(i * step)));
}
QSP_INLINE i32x16 i32x16_random_run(uint64_t seed, uint64_t index) { return i32x16_random_strided(seed, index, 1); }

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
        out[i] = i32x16_random_run(r->seed, r->index);
        r->index += (uint64_t)r->step;
    }
}
QSP_INLINE void i32x16_random_fours(uint64_t seed, uint64_t index, int64_t step, i32x16 *out)
{
    for (int i = 0; i < 4; i++)
        out[i] = i32x16_random_strided(seed, index + (uint64_t)i, step);
}

/* ---- gather-SpMM on codes ---- */
typedef struct {
    int32_t sum[16];
} spmm_acc;

QSP_INLINE void spmm_acc_set1(spmm_acc *q, int32_t v)
{
    for (int i = 0; i < 16; i++)
        q->sum[i] = v;
}
QSP_INLINE void spmm_acc_dot(spmm_acc *q, const uint8_t *x, const int32_t *offset, const int8_t *weight)
{
    for (int k = 0; k < QSP_GROUP; k++) {
        const uint8_t *p = x + offset[k];
        const int32_t w = weight[k];
        for (int i = 0; i < 16; i++)
            q->sum[i] = wrapping_add(q->sum[i], w * p[i]);
    }
}
QSP_INLINE void spmm_acc_store(int32_t *p, const spmm_acc *even, const spmm_acc *odd)
{
    (void)odd;
    for (int i = 0; i < 16; i++)
        p[i] = even->sum[i];
}
QSP_INLINE int spmm_acc_lane(int place) { return place; }
QSP_INLINE void spmm_unit_to_f32(float *out, const int32_t *sums, float scale, float bias)
{
    for (int i = 0; i < QSP_UNIT; i++)
        out[i] = (float)sums[i] * scale + bias;
}
QSP_INLINE void spmm_unit_from_codes(i32x16 *v, const uint8_t *codes)
{
    for (int i = 0; i < QSP_UNIT; i++)
        v[i / 16].v[i % 16] = codes[i];
}
QSP_INLINE void spmm_unit_to_codes(uint8_t *codes, const i32x16 *v)
{
    for (int i = 0; i < QSP_UNIT; i++)
        codes[i] = (uint8_t)v[i / 16].v[i % 16];
}
QSP_INLINE void spmm_unit_look_up(uint8_t *out, const uint8_t *codes, const uint8_t *table)
{
    for (int i = 0; i < QSP_UNIT; i++)
        out[i] = table[codes[i]];
}

/* ---- gather-SDDMM on codes ---- */
typedef struct {
    int32_t v[16];
} sddmm_acc;
typedef struct {
    int8_t v[16];
} sddmm_grad;

QSP_INLINE sddmm_grad sddmm_grad_load(const uint8_t *p)
{
    sddmm_grad g;
    for (int i = 0; i < 16; i++)
        g.v[i] = (int8_t)(p[i] - 128);
    return g;
}
QSP_INLINE sddmm_acc sddmm_acc_zero(void)
{
    sddmm_acc d;
    memset(&d, 0, sizeof d);
    return d;
}
QSP_INLINE sddmm_acc sddmm_acc_add(sddmm_acc a, sddmm_acc b)
{
    for (int i = 0; i < 16; i++)
        a.v[i] += b.v[i];
    return a;
}
QSP_INLINE sddmm_acc sddmm_acc_dot(sddmm_acc sum, const uint8_t *x, sddmm_grad g)
{
    for (int i = 0; i < 16; i++)
        sum.v[i] += (int32_t)x[i] * g.v[i];
    return sum;
}
QSP_INLINE int32_t sddmm_acc_reduce_add(sddmm_acc d)
{
    int32_t s = 0;
    for (int i = 0; i < 16; i++)
        s += d.v[i];
    return s;
}
QSP_INLINE sddmm_acc sddmm_acc_add_grad(sddmm_acc sum, const uint8_t *p)
{
    for (int i = 0; i < 16; i++)
        sum.v[i] += p[i] - 128;
    return sum;
}
QSP_INLINE void sddmm_acc_flush(int64_t *sums, const sddmm_acc *d, int n)
{
    for (int j = 0; j < n; j++)
        sums[j] += sddmm_acc_reduce_add(d[j]);
}

/* ---- dense rows on codes ---- */
#define ISA_DENSE_ROWS 4
#define ISA_DENSE_GRAD_ROWS 4

QSP_INLINE void dense_interleave(uint8_t *quad, const uint8_t *x, const int32_t *offset)
{
    for (int k = 0; k < QSP_GROUP; k++)
        memcpy(quad + k * QSP_UNIT, x + offset[k], QSP_UNIT);
}
QSP_INLINE void dense_spmm_block(int32_t *sums, const uint8_t *quads, const int8_t *weights, int64_t pitch,
                                 int64_t groups, const int rows)
{
    for (int r = 0; r < rows; r++)
        for (int64_t k = 0; k < QSP_GROUP * groups; k++) {
            const int32_t w = weights[r * pitch + k];
            for (int i = 0; i < QSP_UNIT; i++)
                sums[r * QSP_UNIT + i] = wrapping_add(sums[r * QSP_UNIT + i], w * quads[k * QSP_UNIT + i]);
        }
}
QSP_INLINE void dense_sddmm_block(int32_t *sums, int64_t pitch, const uint8_t *x, const int64_t *x_lane,
                                  const int32_t *offset, const int8_t *grad, int64_t step, int64_t units,
                                  const int rows)
{
    for (int j = 0; j < rows; j++)
        for (int k = 0; k < 4; k++) {
            int32_t sum = 0;
            for (int64_t u = 0; u < units; u++) {
                const uint8_t *p = x + x_lane[u] + offset[k];
                const int8_t *g = grad + (u * step + j) * QSP_UNIT;
                for (int i = 0; i < QSP_UNIT; i++)
                    sum += p[i] * g[i];
            }
            sums[j * pitch + k] += sum;
        }
}
