/* Rounding to codes: the last step of every scheme, sixteen elements at a time. */

/* Rounding of fixed-point numbers, for powers of two: floor(x / scale * 2^16 + random) / 2^16. */
#define QSP_FIXED_BITS 16
#define QSP_FIXED_ONE 65536.0f

/* LIMITED is nearest even with codes that may leave their range. */
enum { NEAREST, LIMITED, RANDOM, LOGARITHMIC };

QSP_INLINE int rounding_of(const qsp_scheme *s)
{
    return s->kind == QSP_LUQ ? LOGARITHMIC : qsp_is_random(s) ? RANDOM : qsp_is_limited(s) ? LIMITED : NEAREST;
}

typedef struct {
    f32x16 inverse;
    i32x16 zero, least, most; /* minus 128; zero by another 128 less where the dither brings them along */
} quantizer;

QSP_INLINE quantizer quantizer_from(const qsp_scheme *s, f32x16 inverse, i32x16 zero_point, const int rounding)
{
    const int32_t levels = qsp_levels(s);
    quantizer q;
    q.inverse = rounding == LOGARITHMIC ? f32x16_mul(inverse, f32x16_set1(QSP_FIXED_ONE)) : inverse;
    q.zero = i32x16_sub(zero_point, i32x16_set1(rounding == RANDOM ? 256 : 128));
    q.least = s->kind == QSP_AFFINE ? i32x16_set1(-128)
                                    : i32x16_max(i32x16_sub(q.zero, i32x16_set1(levels)), i32x16_set1(-128));
    q.most = i32x16_set1(s->around_zero ? levels : 2 * levels + 1 - 128);
    return q;
}

/* Between neighbouring powers of two at random, below 1 between 0 and 1; v and the result's fraction are in fixed
 * point. With 2^e <= |v| < 2^(e + 1) it is floor(|v| / 2^e + u) 2^e. */
QSP_INLINE i32x16 round_to_power(i32x16 v, i32x16 random)
{
    const i32x16 a = i32x16_max(v, i32x16_sub(i32x16_set1(0), v)), fixed = i32x16_set1(QSP_FIXED_BITS);
    const i32x16 e = i32x16_max(i32x16_sub(i32x16_log2(a), fixed), i32x16_set1(0));
    const i32x16 whole = i32x16_shift_right(i32x16_add(a, i32x16_shift_left(random, e)), i32x16_add(e, fixed));
    return i32x16_apply_sign(i32x16_shift_left(whole, e), v);
}

/* Codes minus 128, to be saturated when they become bytes. `dither` are the bits of 128 + u: with them added everything
 * is positive, and the fraction is cut off. qsp_scale sees to it that no product is beyond the last code. */
QSP_INLINE i32x16 quantize_x16(f32x16 x, const quantizer *q, const int rounding, i32x16 dither)
{
    f32x16 v = f32x16_mul(x, q->inverse);
    if (rounding == RANDOM)
        return i32x16_add(i32x16_truncated(f32x16_add(v, f32x16_from_bits(dither))), q->zero);
    if (rounding == LIMITED) /* what does not fit into an integer would change its sign */
        v = f32x16_max(f32x16_min(v, f32x16_set1(1024.0f)), f32x16_set1(-1024.0f));
    i32x16 c = i32x16_nearest(v);
    if (rounding == LOGARITHMIC)
        return i32x16_add(round_to_power(c, i32x16_sub(dither, i32x16_set1(QSP_DITHER_BITS))), q->zero);
    c = i32x16_add(c, q->zero);
    return rounding == NEAREST ? c : i32x16_min(i32x16_max(c, q->least), q->most);
}
