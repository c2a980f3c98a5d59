/* What follows a product: activation(x * scale + shift + residual) and its gradient, on tensors whose channels are
 * neighbours in memory, rows of `channels` elements. Every part is optional. Products and sums are rounded one after
 * the other (no FMA) where codes depend on them, so that all instruction sets agree. Sums over rows are taken chunk by
 * chunk, the same ones at every thread count.
 *
 * A pass exists as one function for everything (`*_any`, also for what is left of a row behind the last whole vector),
 * and with constants in place of arguments for what layers use most. */

/* n codes at p. */
QSP_INLINE void row_codes(uint8_t *p, const int n, f32x16 v)
{
    const u8x16 bytes = i32x16_to_code(i32x16_nearest(v));
    if (n == 16)
        u8x16_store(p, bytes);
    else
        u8x16_store_n(p, bytes, n);
}

/* Channels c .. c + n of a row; `affine`, `residual`, `codes` and `saves` say which parts there are. */
QSP_INLINE f32x16 epilogue_at(const qsp_epilogue *a, int64_t row, int64_t c, const int n, const int dtype,
                              const int kind, const int affine, const int residual, const int codes, const int saves)
{
    const int64_t at = row * a->channels + c;
    const f32x16 v = row_load(a->x, dtype, at, n);
    f32x16 x = v, y;
    if (affine)
        x = f32x16_add(f32x16_mul(v, load_params(a->scale, c, n)), load_params(a->shift, c, n));
    if (residual)
        x = f32x16_add(x, row_load(a->residual, dtype, at, n));
    uint16_t *bits = (uint16_t *)a->saved + row * a->words + (c >> 4);
    const uint32_t in_row = 0xffff >> (16 - n);
    if (kind == QSP_CLAMP) {
        const f32x16 low = f32x16_set1(a->low), high = f32x16_set1(a->high);
        y = f32x16_min(high, f32x16_max(low, x)); /* in this order a NaN stays one */
        if (saves)
            *bits = (uint16_t)(f32x16_between(x, low, high) & in_row);
    } else if (kind == QSP_LEAKY) {
        const f32x16 zero = f32x16_zero(), below = f32x16_mul(f32x16_min(zero, x), f32x16_set1(a->low));
        y = f32x16_add(f32x16_max(zero, x), below);
        if (saves) /* infinity is above 0 as well, a NaN is not */
            *bits =
                (uint16_t)(f32x16_between(f32x16_min(f32x16_set1(FLT_MAX), x), zero, f32x16_set1(INFINITY)) & in_row);
    } else {
        f32x16 distance;
        y = curved(x, kind, &distance);
        if (saves)
            row_codes((uint8_t *)a->saved + at, n,
                      f32x16_copysign(f32x16_mul(distance, f32x16_set1(slope_steps(kind))), x));
    }
    if (codes)
        row_codes(a->codes + at, n,
                  f32x16_add(f32x16_mul(v, load_params(a->code_scale, c, n)), load_params(a->code_shift, c, n)));
    if (a->out)
        row_store(a->out, dtype, at, n, y);
    return y;
}

/* The same of any kind, and fewer than 16 channels. */
QSP_APART f32x16 epilogue_any(const qsp_epilogue *a, int64_t row, int64_t c, int n)
{
    return epilogue_at(a, row, c, n, a->dtype, a->kind, a->scale != NULL, a->residual != NULL, a->codes != NULL,
                       a->saved != NULL);
}

/* Channels c .. c + n of a row, any number of them; also into `line` where it is not NULL, sixteen at a time. */
typedef void row_maker(const qsp_epilogue *a, int64_t row, int64_t c, int n, float *line);

QSP_APART void epilogue_row_any(const qsp_epilogue *a, int64_t row, int64_t c, int n, float *line)
{
    for (int i = 0; i < n; i += 16) {
        const f32x16 y = epilogue_any(a, row, c + i, n - i < 16 ? n - i : 16);
        if (line)
            f32x16_store(line + i, y);
    }
}

QSP_COPIED void row_of(const qsp_epilogue *a, int64_t row, int64_t c, int n, float *line, const int dtype,
                       const int kind)
{
    const int affine = a->scale != NULL, residual = a->residual != NULL, codes = a->codes != NULL,
              saves = a->saved != NULL;
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const f32x16 y = epilogue_at(a, row, c + i, 16, dtype, kind, affine, residual, codes, saves);
        if (line)
            f32x16_store(line + i, y);
    }
    if (i < n)
        epilogue_row_any(a, row, c + i, n - i, line ? line + i : NULL);
}

#define ROW_MAKER(name, dtype, kind)                                                            \
    QSP_APART void name(const qsp_epilogue *a, int64_t row, int64_t c, int n, float *line)      \
    {                                                                                           \
        row_of(a, row, c, n, line, dtype, kind);                                                \
    }
ROW_MAKER(epilogue_row_f32_leaky, QSP_F32, QSP_LEAKY)
ROW_MAKER(epilogue_row_f32_silu, QSP_F32, QSP_SILU)
ROW_MAKER(epilogue_row_f32_hardswish, QSP_F32, QSP_HARDSWISH)
ROW_MAKER(epilogue_row_f32_gelu, QSP_F32, QSP_GELU)
ROW_MAKER(epilogue_row_f32_gelu_tanh, QSP_F32, QSP_GELU_TANH)
ROW_MAKER(epilogue_row_bf16_leaky, QSP_BF16, QSP_LEAKY)
ROW_MAKER(epilogue_row_bf16_silu, QSP_BF16, QSP_SILU)
ROW_MAKER(epilogue_row_bf16_hardswish, QSP_BF16, QSP_HARDSWISH)
ROW_MAKER(epilogue_row_bf16_gelu, QSP_BF16, QSP_GELU)
ROW_MAKER(epilogue_row_bf16_gelu_tanh, QSP_BF16, QSP_GELU_TANH)
#undef ROW_MAKER

static row_maker *row_maker_of(const qsp_epilogue *a)
{
    const int wide = a->dtype == QSP_F32;
    if (a->dtype == QSP_U8)
        return epilogue_row_any;
    switch (a->kind) {
    case QSP_LEAKY: return wide ? epilogue_row_f32_leaky : epilogue_row_bf16_leaky;
    case QSP_SILU: return wide ? epilogue_row_f32_silu : epilogue_row_bf16_silu;
    case QSP_HARDSWISH: return wide ? epilogue_row_f32_hardswish : epilogue_row_bf16_hardswish;
    case QSP_GELU: return wide ? epilogue_row_f32_gelu : epilogue_row_bf16_gelu;
    case QSP_GELU_TANH: return wide ? epilogue_row_f32_gelu_tanh : epilogue_row_bf16_gelu_tanh;
    default: return epilogue_row_any;
    }
}

/* Rows of a CLAMP, which is all of batch normalisation with ReLU and no more than a copy: in line. */
QSP_INLINE void clamp_of(const qsp_epilogue *a, int64_t first, int64_t last, const int dtype, const int affine,
                         const int residual, const int codes, const int saves)
{
    for (int64_t row = first; row < last; row++) {
        int64_t c = 0;
        for (; c + 16 <= a->channels; c += 16)
            epilogue_at(a, row, c, 16, dtype, QSP_CLAMP, affine, residual, codes, saves);
        if (c < a->channels)
            epilogue_any(a, row, c, (int)(a->channels - c));
    }
}

QSP_INLINE void clamp_rows(const qsp_epilogue *a, int64_t first, int64_t last, const int dtype)
{
    const int residual = a->residual != NULL, codes = a->codes != NULL, saves = a->saved != NULL;
    if (!a->scale || codes != saves) {
        clamp_of(a, first, last, dtype, a->scale != NULL, residual, codes, saves);
        return;
    }
    switch (residual << 1 | codes) { /* constants that the compiler sees */
    case 0: clamp_of(a, first, last, dtype, 1, 0, 0, 0); break;
    case 1: clamp_of(a, first, last, dtype, 1, 0, 1, 1); break;
    case 2: clamp_of(a, first, last, dtype, 1, 1, 0, 0); break;
    default: clamp_of(a, first, last, dtype, 1, 1, 1, 1); break;
    }
}

static void make_row(row_maker *make, const qsp_epilogue *a, int64_t row, int64_t first, int64_t last)
{
    for (int64_t c = first; c < last; c += 1 << 16)
        make(a, row, c, (int)qsp_min(1 << 16, last - c), NULL);
}

static void epilogue_kernel(const qsp_epilogue *a, int64_t first, int64_t last)
{
    if (a->kind == QSP_CLAMP) {
        if (a->dtype == QSP_F32)
            clamp_rows(a, first, last, QSP_F32);
        else
            clamp_rows(a, first, last, QSP_BF16);
        return;
    }
    row_maker *make = row_maker_of(a);
    if (!a->scale && !a->codes && a->channels % 16 == 0) { /* nothing belongs to a channel: rows are one long row */
        make_row(make, a, 0, first * a->channels, last * a->channels);
        return;
    }
    for (int64_t row = first; row < last; row++)
        make_row(make, a, row, 0, a->channels);
}

/* Channels c .. c + n of a row: the gradient of what was activated; `bits`: some do not pass, in a CLAMP. */
QSP_INLINE f32x16 slope_at(const qsp_epilogue_grad *a, int64_t row, int64_t c, const int n, const int dtype,
                           const int kind, const int bits)
{
    const int64_t at = row * a->channels + c;
    const f32x16 dy = row_load(a->dy, dtype, at, n);
    if (saves_slopes(kind)) {
        const float steps = slope_steps(kind);
        const f32x16 code = f32x16_add(row_load(a->saved, QSP_U8, at, n), f32x16_set1(0.5f * steps - 128.0f));
        return f32x16_mul(dy, f32x16_mul(code, f32x16_set1(kind == QSP_HARDSWISH ? 1.0f / 120.0f : 1.0f / 200.0f)));
    }
    if (!bits)
        return dy;
    const uint32_t passes = ((const uint16_t *)a->saved)[row * a->words + (c >> 4)];
    if (kind == QSP_CLAMP)
        return f32x16_keep(dy, passes);
    return f32x16_add(f32x16_keep(dy, passes), f32x16_keep(f32x16_mul(dy, f32x16_set1(a->slope)), ~passes));
}

/* The same, and the gradient of x. */
QSP_INLINE f32x16 epilogue_grad_at(const qsp_epilogue_grad *a, int64_t row, int64_t c, const int n, const int dtype,
                                   const int kind, const int bits, const int factor, const int codes)
{
    const int64_t at = row * a->channels + c;
    const f32x16 g = slope_at(a, row, c, n, dtype, kind, bits);
    f32x16 dx = g;
    if (a->g)
        row_store(a->g, dtype, at, n, g);
    if (factor) {
        f32x16 rest = load_params(a->factor + 2 * a->channels, c, n);
        if (codes)
            rest = f32x16_add(f32x16_mul(row_load(a->codes, QSP_U8, at, n), load_params(a->factor + a->channels, c, n)),
                              rest);
        dx = f32x16_add(f32x16_mul(g, load_params(a->factor, c, n)), rest);
    }
    if (a->dx)
        row_store(a->dx, dtype, at, n, dx);
    return dx;
}

QSP_APART f32x16 epilogue_slope_any(const qsp_epilogue_grad *a, int64_t row, int64_t c, int n)
{
    return slope_at(a, row, c, n, a->dtype, a->kind, a->saved != NULL);
}

QSP_APART f32x16 epilogue_grad_any(const qsp_epilogue_grad *a, int64_t row, int64_t c, int n)
{
    return epilogue_grad_at(a, row, c, n, a->dtype, a->kind, a->saved != NULL, a->factor != NULL, a->codes != NULL);
}

/* Of what there are copies: batch normalisation with a CLAMP, and an activation alone. */
enum { GRAD_ANY, GRAD_NORMED, GRAD_BARE };

QSP_INLINE int variant_of(const qsp_epilogue_grad *a)
{
    if (a->kind == QSP_CLAMP && a->saved && a->factor && a->codes)
        return GRAD_NORMED;
    return a->saved && !a->factor && !a->codes ? GRAD_BARE : GRAD_ANY;
}

QSP_INLINE f32x16 epilogue_grad_16(const qsp_epilogue_grad *a, int64_t row, int64_t c, const int dtype,
                                   const int variant)
{
    if (variant == GRAD_NORMED)
        return epilogue_grad_at(a, row, c, 16, dtype, QSP_CLAMP, 1, 1, 1);
    if (variant == GRAD_BARE)
        return epilogue_grad_at(a, row, c, 16, dtype, a->kind, 1, 0, 0);
    return epilogue_grad_at(a, row, c, 16, dtype, a->kind, a->saved != NULL, a->factor != NULL, a->codes != NULL);
}

/* Elements [first, last) of an activation's gradient: where nothing belongs to a channel, rows are one long row. */
QSP_INLINE void bare_grad_of(const qsp_epilogue_grad *a, int64_t first, int64_t last, const int dtype, const int kind)
{
    for (int64_t c = first; c < last; c += 16)
        epilogue_grad_at(a, 0, c, 16, dtype, kind, 1, 0, 0);
}

QSP_INLINE void bare_grad(const qsp_epilogue_grad *a, int64_t first, int64_t last, const int dtype)
{
    switch (a->kind) { /* constants that the compiler sees */
    case QSP_CLAMP: bare_grad_of(a, first, last, dtype, QSP_CLAMP); break;
    case QSP_LEAKY: bare_grad_of(a, first, last, dtype, QSP_LEAKY); break;
    case QSP_HARDSWISH: bare_grad_of(a, first, last, dtype, QSP_HARDSWISH); break;
    default: bare_grad_of(a, first, last, dtype, QSP_GELU); break; /* the others have the same codes */
    }
}

QSP_INLINE void epilogue_grad_of(const qsp_epilogue_grad *a, int64_t first, int64_t last, const int dtype,
                                 const int variant)
{
    if (variant == GRAD_BARE && a->channels % 16 == 0) {
        bare_grad(a, first * a->channels, last * a->channels, dtype);
        return;
    }
    for (int64_t row = first; row < last; row++) {
        int64_t c = 0;
        for (; c + 16 <= a->channels; c += 16)
            epilogue_grad_16(a, row, c, dtype, variant);
        if (c < a->channels)
            epilogue_grad_any(a, row, c, (int)(a->channels - c));
    }
}

static void epilogue_grad_kernel(const qsp_epilogue_grad *a, int64_t first, int64_t last)
{
    switch (variant_of(a) << 1 | (a->dtype == QSP_F32)) {
    case GRAD_NORMED << 1: epilogue_grad_of(a, first, last, QSP_BF16, GRAD_NORMED); break;
    case GRAD_NORMED << 1 | 1: epilogue_grad_of(a, first, last, QSP_F32, GRAD_NORMED); break;
    case GRAD_BARE << 1: epilogue_grad_of(a, first, last, QSP_BF16, GRAD_BARE); break;
    case GRAD_BARE << 1 | 1: epilogue_grad_of(a, first, last, QSP_F32, GRAD_BARE); break;
    case GRAD_ANY << 1: epilogue_grad_of(a, first, last, QSP_BF16, GRAD_ANY); break;
    default: epilogue_grad_of(a, first, last, QSP_F32, GRAD_ANY); break;
    }
}
