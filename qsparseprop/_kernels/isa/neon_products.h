/* The products on codes in 128-bit vectors, for what neon.h names.
 *
 * Only usdot multiplies codes, which have no sign, by weights and gradients, which have one. Elsewhere both have: a code is
 * taken minus 128, and what that leaves out of a sum of products is 128 times the sum of the weights, or of the gradient,
 * whatever the codes are. It is added once a row (ISA_LEFT_OUT), so that nothing is left out of a result.
 *
 * Without a dot product bytes are multiplied to 16 bits, in which two products are added up before they are widened. Two of
 * (code - 128) * weight would overflow where both are 128 * 128. So the second is subtracted, and its code is taken as 127
 * minus the code: each product then lies in [-128 * 127, 128 * 128], their difference in [-32640, 32640]; what is left out
 * of the second is 127 times the weight. */
#define ISA_LANES 64
#define ISA_SDDMM_UNITS 2
#define ISA_SPMM_ACCS 1 /* sixteen vectors are enough for the latency */
#define ISA_SPMM_TILE 64x4
#define ISA_SDDMM_TILE 128x16

#if ISA_DOT == DOT_NONE
#define ISA_DENSE_ROWS 4
#define ISA_DENSE_GRAD_ROWS 4
#else
#define ISA_DENSE_ROWS 6
#define ISA_DENSE_GRAD_ROWS 6
#endif

#if ISA_DOT != DOT_MIXED
#define ISA_LEFT_OUT
#endif

/* A code with another sign: minus 128; 127 minus the code, of the second of two. */
#define FIRST_CODES 0x80
#define SECOND_CODES (ISA_DOT == DOT_NONE ? 0x7f : 0x80)

QSP_INLINE uint8x16_t u8x16_first(const uint8_t *p)
{
    return ISA_DOT == DOT_MIXED ? vld1q_u8(p) : veorq_u8(vld1q_u8(p), vdupq_n_u8(FIRST_CODES));
}
QSP_INLINE uint8x16_t u8x16_second(const uint8_t *p)
{
    return ISA_DOT == DOT_MIXED ? vld1q_u8(p) : veorq_u8(vld1q_u8(p), vdupq_n_u8(SECOND_CODES));
}
/* Neighbours of a plane: the first eight, and behind them the second of two. */
QSP_INLINE uint8x16_t u8x16_lanes(const uint8_t *p)
{
    const uint8x16_t flip = vcombine_u8(vdup_n_u8(FIRST_CODES), vdup_n_u8(SECOND_CODES));
    return ISA_DOT == DOT_MIXED ? vld1q_u8(p) : veorq_u8(vld1q_u8(p), flip);
}

/* Sixteen lanes of four planes. For a dot product: of each lane the bytes of a group. Without one two lots of pairs: the
 * first two planes, and the other two. */
typedef struct {
    uint8x16_t v[4];
} u8x16x4;

QSP_INLINE u8x16x4 u8x16x4_interleave(const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d)
{
    const uint8x16_t va = u8x16_first(a), vb = u8x16_first(b), vc = u8x16_second(c), vd = u8x16_second(d);
    const u8x16x4 pairs = {{vzip1q_u8(va, vb), vzip2q_u8(va, vb), vzip1q_u8(vc, vd), vzip2q_u8(vc, vd)}};
    if (ISA_DOT == DOT_NONE)
        return pairs;
    const uint16x8_t ab_low = vreinterpretq_u16_u8(pairs.v[0]), ab_high = vreinterpretq_u16_u8(pairs.v[1]);
    const uint16x8_t cd_low = vreinterpretq_u16_u8(pairs.v[2]), cd_high = vreinterpretq_u16_u8(pairs.v[3]);
    const u8x16x4 r = {{vreinterpretq_u8_u16(vzip1q_u16(ab_low, cd_low)), vreinterpretq_u8_u16(vzip2q_u16(ab_low, cd_low)),
                        vreinterpretq_u8_u16(vzip1q_u16(ab_high, cd_high)),
                        vreinterpretq_u8_u16(vzip2q_u16(ab_high, cd_high))}};
    return r;
}

/* ---- dot products of bytes: sums += codes times the weights of a group, and times a gradient ---- */
#if ISA_DOT == DOT_NONE
typedef struct {
    int8x16_t first, second; /* weights of a group: the first two, and the others, over and over */
} group_weights;

QSP_INLINE int8x16_t s8x16_two(const int8_t *p)
{
    int16_t two;
    memcpy(&two, p, sizeof two);
    return vreinterpretq_s8_s16(vdupq_n_s16(two));
}
QSP_INLINE group_weights group_weights_load(const int8_t *p)
{
    const group_weights w = {s8x16_two(p), s8x16_two(p + 2)};
    return w;
}
QSP_INLINE void i32x16_dot_group(int32x4_t *sum, const uint8x16_t *x, group_weights w)
{
    QSP_UNROLL
    for (int i = 0; i < 2; i++) {
        const int8x16_t ab = vreinterpretq_s8_u8(x[i]), cd = vreinterpretq_s8_u8(x[i + 2]);
        const int16x8_t low = vmlsl_s8(vmull_s8(vget_low_s8(ab), vget_low_s8(w.first)), vget_low_s8(cd),
                                       vget_low_s8(w.second));
        const int16x8_t high = vmlsl_high_s8(vmull_high_s8(ab, w.first), cd, w.second);
        sum[2 * i] = vpadalq_s16(sum[2 * i], low);
        sum[2 * i + 1] = vpadalq_s16(sum[2 * i + 1], high);
    }
}
QSP_INLINE int32x4_t i32x4_dot_lanes(int32x4_t sum, uint8x16_t x, int8x16_t g)
{
    const int8x16_t v = vreinterpretq_s8_u8(x);
    return vpadalq_s16(sum, vmlsl_high_s8(vmull_s8(vget_low_s8(v), vget_low_s8(g)), v, g));
}
QSP_INLINE int32x4_t i32x4_add_bytes(int32x4_t sum, int8x16_t v) { return vpadalq_s16(sum, vpaddlq_s8(v)); }
#else
#if ISA_DOT == DOT_SIGNED
#define DOT "sdot"
#else
#define DOT "usdot" /* the first factor has no sign, the second has one */
#endif
/* The four bytes of a group, loaded as a float's: that needs no instruction but the load. Intrinsics there are only where
 * the whole file is compiled for such a processor (clang before 16). */
typedef float group_weights;

QSP_INLINE group_weights group_weights_load(const int8_t *p)
{
    float four;
    memcpy(&four, p, sizeof four);
    return four;
}
QSP_INLINE void i32x16_dot_group(int32x4_t *sum, const uint8x16_t *x, group_weights w)
{
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        __asm__(DOT " %0.4s, %1.16b, %2.4b[0]" : "+w"(sum[i]) : "w"(x[i]), "w"(w));
}
QSP_INLINE int32x4_t i32x4_dot_lanes(int32x4_t sum, uint8x16_t x, int8x16_t g)
{
    __asm__(DOT " %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(x), "w"(g));
    return sum;
}
QSP_INLINE int32x4_t i32x4_add_bytes(int32x4_t sum, int8x16_t v) { return i32x4_dot_lanes(sum, vdupq_n_u8(1), v); }
#endif

#ifdef ISA_LEFT_OUT
/* What spmm_acc_dot leaves out of the sums of these groups, the same for every lane; modulo 2^32. */
QSP_INLINE int32_t spmm_left_out(const int8_t *weight, int64_t groups)
{
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t g = 0; g < groups; g += 4) {
        int8_t line[16] = {0};
        if (groups - g < 4)
            memcpy(line, weight + QSP_GROUP * g, (size_t)(groups - g) * QSP_GROUP);
        const int8x16_t w = vld1q_s8(groups - g < 4 ? line : weight + QSP_GROUP * g);
#if ISA_DOT == DOT_NONE
        static const int16_t factor[8] = {128, 127, 128, 127, 128, 127, 128, 127};
        const int16x8_t two = vpaddlq_s8(w), by = vld1q_s16(factor);
        sum = vmlal_high_s16(vmlal_s16(sum, vget_low_s16(two), vget_low_s16(by)), two, by);
#else
        sum = i32x4_add_bytes(sum, w);
#endif
    }
    return (int32_t)((uint32_t)vaddvq_s32(sum) * (ISA_DOT == DOT_NONE ? 1 : 128));
}
#endif

/* ---- gather-SpMM on codes ---- */
typedef struct {
    int32x4_t sum[ISA_LANES / 4];
} spmm_acc;

QSP_INLINE void spmm_acc_set1(spmm_acc *q, int32_t v)
{
    QSP_UNROLL
    for (int i = 0; i < ISA_LANES / 4; i++)
        q->sum[i] = vdupq_n_s32(v);
}

QSP_INLINE void spmm_acc_dot(spmm_acc *q, const uint8_t *x, const int32_t *offset, const int8_t *weight)
{
    const group_weights w = group_weights_load(weight);
    const uint8_t *a = x + offset[0], *b = x + offset[1], *c = x + offset[2], *d = x + offset[3];
    QSP_UNROLL
    for (int i = 0; i < ISA_LANES; i += 16) {
        const u8x16x4 t = u8x16x4_interleave(a + i, b + i, c + i, d + i);
        i32x16_dot_group(q->sum + i / 4, t.v, w);
    }
}

QSP_INLINE void spmm_acc_store(int32_t *p, const spmm_acc *even, const spmm_acc *odd)
{
    (void)odd;
    QSP_UNROLL
    for (int i = 0; i < ISA_LANES / 4; i++)
        vst1q_s32(p + 4 * i, even->sum[i]);
}

/* Interleaved whole vectors follow each other. */
QSP_INLINE int spmm_acc_lane(int place) { return place; }

QSP_INLINE void spmm_unit_to_f32(float *out, const int32_t *sums, float scale, float bias)
{
    const float32x4_t s = vdupq_n_f32(scale), b = vdupq_n_f32(bias);
    QSP_UNROLL
    for (int i = 0; i < QSP_UNIT; i += 4)
        vst1q_f32(out + i, vaddq_f32(vmulq_f32(vcvtq_f32_s32(vld1q_s32(sums + i)), s), b));
}
QSP_INLINE void spmm_unit_from_codes(i32x16 *v, const uint8_t *codes)
{
    QSP_UNROLL
    for (int i = 0; i < QSP_UNIT / 16; i++)
        v[i] = i32x16_load_u8(codes + 16 * i);
}
QSP_INLINE void spmm_unit_to_codes(uint8_t *codes, const i32x16 *v)
{
    QSP_UNROLL
    for (int i = 0; i < QSP_UNIT / 16; i++)
        vst1q_u8(codes + 16 * i, u8x16_narrow(vreinterpretq_u32_s32(v[i].v[0]), vreinterpretq_u32_s32(v[i].v[1]),
                                              vreinterpretq_u32_s32(v[i].v[2]), vreinterpretq_u32_s32(v[i].v[3])));
}

/* A quarter of the table at a time: what lies outside of it stays as it is. */
QSP_INLINE void spmm_unit_look_up(uint8_t *out, const uint8_t *codes, const uint8_t *table)
{
    uint8x16x4_t t[4];
    QSP_UNROLL
    for (int k = 0; k < 16; k++)
        t[k / 4].val[k % 4] = vld1q_u8(table + 16 * k);
    QSP_UNROLL
    for (int i = 0; i < QSP_UNIT; i += 16) {
        const uint8x16_t c = vld1q_u8(codes + i);
        uint8x16_t v = vqtbl4q_u8(t[0], c);
        QSP_UNROLL
        for (int k = 1; k < 4; k++)
            v = vqtbx4q_u8(v, t[k], vsubq_u8(c, vdupq_n_u8((uint8_t)(64 * k))));
        vst1q_u8(out + i, v);
    }
}

/* ---- gather-SDDMM on codes ---- */
typedef int32x4_t sddmm_acc;
typedef struct {
    int8x16_t v[ISA_LANES / 16];
} sddmm_grad;

QSP_INLINE int8x16_t s8x16_load_code(const uint8_t *p)
{
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80)));
}
QSP_INLINE sddmm_grad sddmm_grad_load(const uint8_t *p)
{
    sddmm_grad g;
    QSP_UNROLL
    for (int i = 0; i < ISA_LANES / 16; i++)
        g.v[i] = s8x16_load_code(p + 16 * i);
    return g;
}
QSP_INLINE sddmm_acc sddmm_acc_zero(void) { return vdupq_n_s32(0); }
QSP_INLINE sddmm_acc sddmm_acc_add(sddmm_acc a, sddmm_acc b) { return i32x4_add(a, b); }
QSP_INLINE int32_t sddmm_acc_reduce_add(sddmm_acc v) { return vaddvq_s32(v); }
QSP_INLINE sddmm_acc sddmm_acc_add_grad(sddmm_acc sum, const uint8_t *p)
{
    QSP_UNROLL
    for (int i = 0; i < ISA_LANES; i += 16)
        sum = i32x4_add_bytes(sum, s8x16_load_code(p + i));
    return sum;
}
QSP_INLINE sddmm_acc sddmm_acc_dot(sddmm_acc sum, const uint8_t *x, sddmm_grad g)
{
    QSP_UNROLL
    for (int i = 0; i < ISA_LANES / 16; i++)
        sum = i32x4_dot_lanes(sum, u8x16_lanes(x + 16 * i), g.v[i]);
    return sum;
}
#ifdef ISA_LEFT_OUT
/* Plus what sddmm_acc_dot, and dense_sddmm_block, leave out of the products with the ISA_LANES codes of a gradient at p. */
QSP_INLINE sddmm_acc sddmm_acc_add_left_out(sddmm_acc sum, const uint8_t *p)
{
    QSP_UNROLL
    for (int i = 0; i < ISA_LANES; i += 16) {
        const int16x8_t two = vpaddlq_s8(s8x16_load_code(p + i));
        sum = vmlal_n_s16(sum, vget_low_s16(two), 128);
        sum = vmlal_high_n_s16(sum, two, ISA_DOT == DOT_NONE ? 127 : 128);
    }
    return sum;
}
#endif

/* The totals of four vectors. */
QSP_INLINE int32x4_t i32x4_reduce_four(const int32x4_t *d)
{
    return vpaddq_s32(vpaddq_s32(d[0], d[1]), vpaddq_s32(d[2], d[3]));
}

QSP_INLINE void sddmm_acc_flush(int64_t *sums, const sddmm_acc *d, int n)
{
    QSP_UNROLL
    for (int j = 0; j < n; j += QSP_GROUP) {
        const int32x4_t total = i32x4_reduce_four(d + j);
        vst1q_s64(sums + j, vaddw_s32(vld1q_s64(sums + j), vget_low_s32(total)));
        vst1q_s64(sums + j + 2, vaddw_high_s32(vld1q_s64(sums + j + 2), total));
    }
}

/* ---- dense rows on codes ---- */

/* Sixteen lanes after the other. */
QSP_INLINE void dense_interleave(uint8_t *quad, const uint8_t *x, const int32_t *offset)
{
    const uint8_t *a = x + offset[0], *b = x + offset[1], *c = x + offset[2], *d = x + offset[3];
    QSP_UNROLL
    for (int h = 0; h < QSP_UNIT; h += 16) {
        const u8x16x4 t = u8x16x4_interleave(a + h, b + h, c + h, d + h);
        QSP_UNROLL
        for (int i = 0; i < 4; i++)
            vst1q_u8(quad + QSP_GROUP * h + 16 * i, t.v[i]);
    }
}

QSP_INLINE void dense_spmm_block(int32_t *sums, const uint8_t *quads, const int8_t *weights, int64_t pitch,
                                 int64_t groups, const int rows)
{
    int32_t left_out[ISA_DENSE_ROWS] = {0};
#ifdef ISA_LEFT_OUT
    for (int r = 0; r < rows; r++)
        left_out[r] = spmm_left_out(weights + r * pitch, groups);
#endif
    for (int part = 0; part < QSP_UNIT; part += 16) {
        int32x4_t s[ISA_DENSE_ROWS][4];
        QSP_UNROLL
        for (int r = 0; r < rows; r++)
            QSP_UNROLL
            for (int v = 0; v < 4; v++)
                s[r][v] = i32x4_add(vld1q_s32(sums + r * QSP_UNIT + part + 4 * v), vdupq_n_s32(left_out[r]));
        const uint8_t *q = quads + QSP_GROUP * part;
        const int8_t *w = weights;
        for (int64_t k = 0; k < groups; k++, q += QSP_GROUP * QSP_UNIT, w += QSP_GROUP) {
            uint8x16_t x[4];
            QSP_UNROLL
            for (int v = 0; v < 4; v++)
                x[v] = vld1q_u8(q + 16 * v);
            QSP_UNROLL
            for (int r = 0; r < rows; r++)
                i32x16_dot_group(s[r], x, group_weights_load(w + r * pitch));
        }
        QSP_UNROLL
        for (int r = 0; r < rows; r++)
            QSP_UNROLL
            for (int v = 0; v < 4; v++)
                vst1q_s32(sums + r * QSP_UNIT + part + 4 * v, s[r][v]);
    }
}

QSP_INLINE void dense_sddmm_block(int32_t *sums, int64_t pitch, const uint8_t *x, const int64_t *x_lane,
                                  const int32_t *offset, const int8_t *grad, int64_t step, int64_t units,
                                  const int rows)
{
    int32x4_t s[ISA_DENSE_GRAD_ROWS][4]; /* of row j and entry k */
    QSP_UNROLL
    for (int j = 0; j < rows; j++)
        QSP_UNROLL
        for (int k = 0; k < 4; k++)
            s[j][k] = vdupq_n_s32(0);
    for (int64_t u = 0; u < units; u++, grad += step * QSP_UNIT) {
        const uint8_t *p = x + x_lane[u];
        QSP_UNROLL
        for (int h = 0; h < QSP_UNIT; h += 16) {
            uint8x16_t v[4];
            QSP_UNROLL
            for (int k = 0; k < 4; k++)
                v[k] = u8x16_lanes(p + offset[k] + h);
            QSP_UNROLL
            for (int j = 0; j < rows; j++) {
                const int8x16_t g = vld1q_s8(grad + j * QSP_UNIT + h);
                QSP_UNROLL
                for (int k = 0; k < 4; k++)
                    s[j][k] = i32x4_dot_lanes(s[j][k], v[k], g);
            }
        }
    }
    QSP_UNROLL
    for (int j = 0; j < rows; j++) {
        int32_t *to = sums + j * pitch;
        vst1q_s32(to, i32x4_add(vld1q_s32(to), i32x4_reduce_four(s[j])));
    }
}
