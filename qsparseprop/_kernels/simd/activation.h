/* Formulas of activations. Products and sums are rounded one after the other (no FMA), so that all instruction sets
 * agree. */

/* A slope as a code: its distance from 1/2 in steps so small that 8 bits hold the largest one and 0 and 1 are exact.
 * Slopes of GELU and SiLU are -0.13 to 1.13, of Hardswish -0.5 to 1.5. */
QSP_INLINE float slope_steps(const int kind) { return kind == QSP_HARDSWISH ? 120.0f : 200.0f; }

/* Whether what is saved of an activation are slopes; otherwise it is a bit an element. */
QSP_INLINE int saves_slopes(const int kind) { return kind >= QSP_SILU; }

/* e^-t for t from 0 to 87: 2^-n e^r with |r| <= ln(2) / 2 and the polynomial of Cephes' expf. */
QSP_INLINE f16x exp_minus(f16x t)
{
    static const float c[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    const i32x16 n = i32_nearest(f16_mul(t, f16_set1(1.44269504088896341f)));
    const f16x k = f16_from(n);
    f16x r = f16_sub(f16_mul(k, f16_set1(0.693359375f)), t);
    r = f16_sub(r, f16_mul(k, f16_set1(2.12194440e-4f)));
    f16x p = f16_set1(1.9875691500e-4f);
    for (int i = 0; i < 5; i++)
        p = f16_add(f16_mul(p, r), f16_set1(c[i]));
    p = f16_add(f16_add(f16_mul(f16_mul(r, r), p), r), f16_set1(1.0f));
    return f16_mul(p, f16_from_bits(i32_shift_left(i32_sub(i32_set1(127), n), i32_set1(23))));
}

/* An activation of x that has a slope nearly everywhere, and the magnitude of the slope's distance from 1/2, which has
 * the sign of x. All but Hardswish are x F(x) with a distribution F: what is computed is that at |x|, as its distance
 * from 1/2. */
QSP_INLINE f16x curved(f16x x, const int kind, f16x *distance)
{
    const f16x half = f16_set1(0.5f), one = f16_set1(1.0f), a = f16_abs(x);
    if (kind == QSP_HARDSWISH) {
        const f16x inside = f16_min(f16_set1(6.0f), f16_max(f16_zero(), f16_add(x, f16_set1(3.0f))));
        /* torch's slopes at the ends are 0 and 1 */
        const uint32_t rises = f16_between(a, f16_set1(-1.0f), f16_set1(3.0f));
        *distance = f16_add(f16_keep(f16_sub(f16_mul(a, f16_set1(1.0f / 3.0f)), half), rises), half);
        return f16_mul(x, f16_mul(inside, f16_set1(1.0f / 6.0f)));
    }
    const f16x b = f16_min(a, f16_set1(kind == QSP_SILU ? 87.0f : 9.5f)); /* beyond nothing changes */
    const f16x square = f16_mul(b, b);
    f16x above, density; /* the distribution's distance from 1/2 at |x|, and its derivative there */
    if (kind == QSP_GELU) { /* erf by Abramowitz and Stegun, 7.1.26 */
        static const float c[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
        const f16x e = exp_minus(f16_mul(square, half));
        const f16x t = f16_div(one, f16_add(one, f16_mul(b, f16_set1(0.231641888f))));
        f16x p = f16_set1(1.061405429f);
        for (int i = 0; i < 4; i++)
            p = f16_add(f16_mul(p, t), f16_set1(c[i]));
        above = f16_mul(half, f16_sub(one, f16_mul(f16_mul(p, t), e)));
        density = f16_mul(e, f16_set1(0.398942280401432678f));
    } else { /* 1 / (1 + e^-u) with u = x, or for GELU_TANH u = 2 sqrt(2 / pi) (x + 0.044715 x^3) */
        f16x u = b, slope = one;
        if (kind == QSP_GELU_TANH) {
            const f16x cubic = f16_mul(square, f16_set1(0.0713548163f));
            u = f16_mul(b, f16_add(f16_set1(1.59576912161f), cubic));
            slope = f16_add(f16_set1(1.59576912161f), f16_mul(cubic, f16_set1(3.0f)));
        }
        const f16x e = exp_minus(u);
        const f16x q = f16_div(one, f16_add(one, e));
        above = f16_mul(f16_mul(half, f16_sub(one, e)), q);
        density = f16_mul(f16_mul(q, q), e);
        if (kind == QSP_GELU_TANH)
            density = f16_mul(density, slope);
    }
    *distance = f16_add(above, f16_mul(b, density));
    return f16_add(f16_mul(half, x), f16_mul(a, above));
}
