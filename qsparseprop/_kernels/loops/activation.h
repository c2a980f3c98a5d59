/* Formulas of activations. Products and sums are rounded one after the other (no FMA), so that all instruction sets
 * agree. */

/* A slope as a code: its distance from 1/2 in steps so small that 8 bits hold the largest one and 0 and 1 are exact.
 * Slopes of GELU and SiLU are -0.13 to 1.13, of Hardswish -0.5 to 1.5. */
QSP_INLINE float slope_steps(const int kind) { return kind == QSP_HARDSWISH ? 120.0f : 200.0f; }

/* Whether what is saved of an activation are slopes; otherwise it is a bit an element. */
QSP_INLINE int saves_slopes(const int kind) { return kind >= QSP_SILU; }

/* e^-t for t from 0 to 87: 2^-n e^r with |r| <= ln(2) / 2 and the polynomial of Cephes' expf. */
QSP_INLINE f32x16 exp_minus(f32x16 t)
{
    static const float c[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    const i32x16 n = i32x16_nearest(f32x16_mul(t, f32x16_set1(1.44269504088896341f)));
    const f32x16 k = f32x16_from_i32(n);
    f32x16 r = f32x16_sub(f32x16_mul(k, f32x16_set1(0.693359375f)), t);
    r = f32x16_sub(r, f32x16_mul(k, f32x16_set1(2.12194440e-4f)));
    f32x16 p = f32x16_set1(1.9875691500e-4f);
    for (int i = 0; i < 5; i++)
        p = f32x16_add(f32x16_mul(p, r), f32x16_set1(c[i]));
    p = f32x16_add(f32x16_add(f32x16_mul(f32x16_mul(r, r), p), r), f32x16_set1(1.0f));
    return f32x16_mul(p, f32x16_from_bits(i32x16_shift_left(i32x16_sub(i32x16_set1(127), n), i32x16_set1(23))));
}

/* An activation of x that has a slope nearly everywhere, and the magnitude of the slope's distance from 1/2, which has
 * the sign of x. All but Hardswish are x F(x) with a distribution F: what is computed is that at |x|, as its distance
 * from 1/2. */
QSP_INLINE f32x16 curved(f32x16 x, const int kind, f32x16 *distance)
{
    const f32x16 half = f32x16_set1(0.5f), one = f32x16_set1(1.0f), a = f32x16_abs(x);
    if (kind == QSP_HARDSWISH) {
        const f32x16 inside =
            f32x16_min(f32x16_set1(6.0f), f32x16_max(f32x16_zero(), f32x16_add(x, f32x16_set1(3.0f))));
        /* torch's slopes at the ends are 0 and 1 */
        const uint32_t rises = f32x16_between(a, f32x16_set1(-1.0f), f32x16_set1(3.0f));
        *distance = f32x16_add(f32x16_keep(f32x16_sub(f32x16_mul(a, f32x16_set1(1.0f / 3.0f)), half), rises), half);
        return f32x16_mul(x, f32x16_mul(inside, f32x16_set1(1.0f / 6.0f)));
    }
    const f32x16 b = f32x16_min(a, f32x16_set1(kind == QSP_SILU ? 87.0f : 9.5f)); /* beyond nothing changes */
    const f32x16 square = f32x16_mul(b, b);
    f32x16 above, density; /* the distribution's distance from 1/2 at |x|, and its derivative there */
    if (kind == QSP_GELU) { /* erf by Abramowitz and Stegun, 7.1.26 */
        static const float c[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
        const f32x16 e = exp_minus(f32x16_mul(square, half));
        const f32x16 t = f32x16_div(one, f32x16_add(one, f32x16_mul(b, f32x16_set1(0.231641888f))));
        f32x16 p = f32x16_set1(1.061405429f);
        for (int i = 0; i < 4; i++)
            p = f32x16_add(f32x16_mul(p, t), f32x16_set1(c[i]));
        above = f32x16_mul(half, f32x16_sub(one, f32x16_mul(f32x16_mul(p, t), e)));
        density = f32x16_mul(e, f32x16_set1(0.398942280401432678f));
    } else { /* 1 / (1 + e^-u) with u = x, or for GELU_TANH u = 2 sqrt(2 / pi) (x + 0.044715 x^3) */
        f32x16 u = b, slope = one;
        if (kind == QSP_GELU_TANH) {
            const f32x16 cubic = f32x16_mul(square, f32x16_set1(0.0713548163f));
            u = f32x16_mul(b, f32x16_add(f32x16_set1(1.59576912161f), cubic));
            slope = f32x16_add(f32x16_set1(1.59576912161f), f32x16_mul(cubic, f32x16_set1(3.0f)));
        }
        const f32x16 e = exp_minus(u);
        const f32x16 q = f32x16_div(one, f32x16_add(one, e));
        above = f32x16_mul(f32x16_mul(half, f32x16_sub(one, e)), q);
        density = f32x16_mul(f32x16_mul(q, q), e);
        if (kind == QSP_GELU_TANH)
            density = f32x16_mul(density, slope);
    }
    *distance = f32x16_add(above, f32x16_mul(b, density));
    return f32x16_add(f32x16_mul(half, x), f32x16_mul(a, above));
}
