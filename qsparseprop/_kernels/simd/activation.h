/* Activations of what a linear layer gives, and their gradients, on tensors whose channels are neighbours in memory.
 *
 * Saved for the gradient is whether it passes, one bit an element (CLAMP), or the slope in 8 bits. Products and sums
 * are rounded one after the other (no FMA), so that all instruction sets agree. */

/* A slope as a code: its distance from 1/2 in steps of 1/200, so that 0 and 1 are exact. GELU's is -0.13 to 1.13. */
#define SLOPE_STEPS 200.0f

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

/* GELU of x and the magnitude of its slope's distance from 1/2, which has the sign of x. */
QSP_INLINE f16x gelu(f16x x, const int kind, f16x *distance)
{
    const f16x half = f16_set1(0.5f), one = f16_set1(1.0f), a = f16_abs(x);
    const f16x b = f16_min(a, f16_set1(9.5f)), square = f16_mul(b, b); /* beyond nothing changes */
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
    } else { /* with u = sqrt(2 / pi) (x + 0.044715 x^3): 1 / (1 + e^(-2 u)) */
        const f16x cubic = f16_mul(square, f16_set1(0.0713548163f));
        const f16x e = exp_minus(f16_mul(b, f16_add(f16_set1(1.59576912161f), cubic)));
        const f16x q = f16_div(one, f16_add(one, e));
        above = f16_mul(f16_mul(half, f16_sub(one, e)), q);
        density = f16_mul(f16_mul(f16_mul(q, q), e),
                          f16_add(f16_set1(1.59576912161f), f16_mul(cubic, f16_set1(3.0f))));
    }
    *distance = f16_add(above, f16_mul(b, density));
    return f16_add(f16_mul(half, x), f16_mul(a, above));
}

/* Channels c .. c + n of a row, activated, with what the gradient needs saved. */
QSP_INLINE f16x act_at(const qsp_act *a, int64_t row, int64_t c, const int n, const int dtype)
{
    const int64_t at = row * a->channels + c;
    const f16x x = row_load(a->x, dtype, at, n);
    f16x y;
    if (a->kind == QSP_CLAMP) {
        const f16x low = f16_set1(a->low), high = f16_set1(a->high);
        y = f16_min(high, f16_max(low, x)); /* in this order a NaN stays one */
        if (a->saved)
            ((uint16_t *)a->saved)[row * a->words + c / 16] = (uint16_t)f16_between(x, low, high);
    } else {
        f16x distance;
        y = gelu(x, a->kind, &distance);
        if (a->saved) {
            distance = f16_copysign(f16_mul(distance, f16_set1(SLOPE_STEPS)), x);
            const u8x16 codes = codes_from(i32_nearest(distance));
            if (n == 16)
                codes_store((uint8_t *)a->saved + at, codes);
            else
                codes_store_n((uint8_t *)a->saved + at, codes, n);
        }
    }
    if (a->out)
        row_store(a->out, dtype, at, n, y);
    return y;
}

QSP_INLINE void act_of(const qsp_act *a, int64_t first, int64_t last, const int dtype)
{
    for (int64_t row = first; row < last; row++) {
        int64_t c = 0;
        for (; c + 16 <= a->channels; c += 16)
            act_at(a, row, c, 16, dtype);
        if (c < a->channels)
            act_at(a, row, c, (int)(a->channels - c), dtype);
    }
}

static void act(const qsp_act *a, int64_t first, int64_t last)
{
    if (a->dtype == QSP_F32)
        act_of(a, first, last, QSP_F32);
    else
        act_of(a, first, last, QSP_BF16);
}

/* Channels c .. c + n of a row: the gradient of what was activated. */
QSP_INLINE f16x act_grad_at(const qsp_act_grad *a, int64_t row, int64_t c, const int n, const int dtype)
{
    const int64_t at = row * a->channels + c;
    f16x g = row_load(a->dy, dtype, at, n);
    if (a->kind == QSP_CLAMP)
        g = f16_keep(g, ((const uint16_t *)a->saved)[row * a->words + c / 16]);
    else {
        const f16x code = f16_add(row_load(a->saved, QSP_U8, at, n), f16_set1(0.5f * SLOPE_STEPS - 128.0f));
        g = f16_mul(g, f16_mul(code, f16_set1(1.0f / SLOPE_STEPS)));
    }
    if (a->dx)
        row_store(a->dx, dtype, at, n, g);
    return g;
}

QSP_INLINE void act_grad_of(const qsp_act_grad *a, int64_t first, int64_t last, const int dtype)
{
    for (int64_t row = first; row < last; row++) {
        int64_t c = 0;
        for (; c + 16 <= a->channels; c += 16)
            act_grad_at(a, row, c, 16, dtype);
        if (c < a->channels)
            act_grad_at(a, row, c, (int)(a->channels - c), dtype);
    }
}

static void act_grad(const qsp_act_grad *a, int64_t first, int64_t last)
{
    if (a->dtype == QSP_F32)
        act_grad_of(a, first, last, QSP_F32);
    else
        act_grad_of(a, first, last, QSP_BF16);
}

enum { REDUCED = 512 }; /* channels that are reduced at a time: rows of linear layers are long, and read as they lie */

/* Of rows [first, last) and channels c .. c + n: into the pairs at `out` the sum and the greatest magnitude. */
QSP_INLINE void act_sums_of(const qsp_act_grad *a, int64_t first, int64_t last, int64_t c, int n, const int dtype,
                            double *out)
{
    QSP_ALIGNED(64) float sum[REDUCED] = {0}, most[REDUCED] = {0}, bad[REDUCED] = {0};
    for (int64_t row = first; row < last; row++)
        for (int i = 0; i < n; i += 16) {
            const f16x g = n - i >= 16 ? act_grad_at(a, row, c + i, 16, dtype) : act_grad_at(a, row, c + i, n - i, dtype);
            f16_store(sum + i, f16_add(f16_load(sum + i), g));
            f16_store(most + i, f16_max(f16_load(most + i), f16_abs(g)));
            f16_store(bad + i, f16_add(f16_load(bad + i), f16_mul(g, f16_zero()))); /* NaN where g is NaN or Inf */
        }
    for (int i = 0; i < n; i++) {
        out[2 * (c + i)] = sum[i];
        out[2 * (c + i) + 1] = most[i] + bad[i];
    }
}

static void act_sums(const qsp_act_grad *a, int64_t first, int64_t last, double *out)
{
    for (int64_t c = 0; c < a->channels; c += REDUCED) {
        const int n = (int)qsp_min(REDUCED, a->channels - c);
        if (a->dtype == QSP_F32)
            act_sums_of(a, first, last, c, n, QSP_F32, out);
        else
            act_sums_of(a, first, last, c, n, QSP_BF16, out);
    }
}

/* The same: the least and the greatest element before the activation, a CLAMP's limited. */
QSP_INLINE void act_range_of(const qsp_act *a, int64_t first, int64_t last, int64_t c, int n, const int dtype, float *out)
{
    QSP_ALIGNED(64) float least[REDUCED], most[REDUCED], bad[REDUCED] = {0};
    const f16x low = f16_set1(a->kind == QSP_CLAMP ? a->low : -INFINITY),
               high = f16_set1(a->kind == QSP_CLAMP ? a->high : INFINITY);
    for (int i = 0; i < n; i += 16) {
        f16_store(least + i, f16_set1(INFINITY));
        f16_store(most + i, f16_set1(-INFINITY));
    }
    for (int64_t row = first; row < last; row++)
        for (int i = 0; i < n; i += 16) {
            const int64_t at = row * a->channels + c + i;
            const f16x x = n - i >= 16 ? row_load(a->x, dtype, at, 16) : row_load(a->x, dtype, at, n - i);
            const f16x y = f16_min(high, f16_max(low, x)); /* in this order a NaN stays one */
            f16_store(least + i, f16_min(f16_load(least + i), y));
            f16_store(most + i, f16_max(f16_load(most + i), y));
            f16_store(bad + i, f16_add(f16_load(bad + i), f16_mul(y, f16_zero())));
        }
    for (int i = 0; i < n; i++) {
        out[2 * (c + i)] = least[i] + bad[i];
        out[2 * (c + i) + 1] = most[i] + bad[i];
    }
}

static void act_range(const qsp_act *a, int64_t first, int64_t last, float *out)
{
    for (int64_t c = 0; c < a->channels; c += REDUCED) {
        const int n = (int)qsp_min(REDUCED, a->channels - c);
        if (a->dtype == QSP_F32)
            act_range_of(a, first, last, c, n, QSP_F32, out);
        else
            act_range_of(a, first, last, c, n, QSP_BF16, out);
    }
}
