/* Linear layers on few rows of features, tokens: a nonzero is a byte that picks one of QSP_TOKEN_COLUMNS codes, and a code. */

enum { TOKENS_AT_A_TIME = 8 };

#ifndef ISA_TOKENS
#define ISA_MOST_TOKENS 1
/* sums[t * QSP_TOKEN_ROWS + r] += products of the rows of a block with token t, for a constant number of tokens. */
QSP_INLINE void tokens_dot(int32_t *sums, const qsp_tokens *a, const uint8_t *x, int64_t block, const int tokens)
{
    for (int64_t c = 0; c < a->column_blocks; c++) {
        const int64_t first = a->step_ptr[block * a->column_blocks + c];
        const int64_t last = a->step_ptr[block * a->column_blocks + c + 1];
        for (int64_t s = first; s < last; s++)
            for (int t = 0; t < tokens; t++) {
                const uint8_t *column = x + t * a->pitch + c * QSP_TOKEN_COLUMNS, *place = a->place + QSP_UNIT * s;
                const int8_t *code = a->code + QSP_UNIT * s;
                for (int k = 0; k < QSP_UNIT; k++)
                    sums[t * QSP_TOKEN_ROWS + k / QSP_GROUP] += column[place[k]] * code[k];
            }
    }
}
#endif

/* Sums of the rows of a block and one token, sixteen of each at a time -> what is wanted of them. */
QSP_INLINE void tokens_finish(const qsp_tokens *a, int64_t row, int64_t token, const int32_t *sums)
{
    const int n = (int)qsp_min(QSP_TOKEN_ROWS, a->rows - row);
    f32x16 product = f32x16_mul(f32x16_load_i32(sums), f32x16_load(a->multiplier + row));
    if (a->scale)
        product = f32x16_mul(product, f32x16_set1(a->scale[token]));
    const f32x16 offset = f32x16_load(a->offset + row);
    f32x16 more = offset;
    const f32x16 low = f32x16_load(a->low + row), high = f32x16_load(a->high + row);
    uint8_t codes[QSP_TOKEN_ROWS] = {0};
    if (a->residual) {
        for (int i = 0; i < n; i++)
            codes[i] = *coded_row(a->residual, token, row + i, 0);
        more = f32x16_mul(f32x16_load_u8(codes), f32x16_load(a->residual_multiplier + row));
    }
    const f32x16 v = coded_result(product, offset, a->residual ? &more : NULL, low, high);
    if (a->out) {
        f32x16_store_n(a->out + token * a->rows + row, v, n);
        return;
    }
    u8x16_store(codes, i32x16_to_code(i32x16_sub(i32x16_nearest(v), i32x16_set1(128))));
    for (int i = 0; i < n; i++)
        *coded_row(&a->codes, token, row + i, 0) = codes[i];
}

QSP_INLINE void tokens_part(const qsp_tokens *a, int64_t block, int64_t token, const int tokens)
{
    QSP_ALIGNED(64) int32_t sums[TOKENS_AT_A_TIME * QSP_TOKEN_ROWS];
    const int64_t row = block * QSP_TOKEN_ROWS;
    for (int t = 0; t < tokens; t++)
        memcpy(sums + t * QSP_TOKEN_ROWS, a->start + row, QSP_TOKEN_ROWS * sizeof *sums);
    tokens_dot(sums, a, a->x + token * a->pitch, block, tokens);
    for (int t = 0; t < tokens; t++)
        tokens_finish(a, row, token + t, sums + t * QSP_TOKEN_ROWS);
}

static void tokens_product_kernel(const qsp_tokens *a, int64_t block)
{
    int64_t token = 0;
    if (!a->out) /* planes have lanes without tokens, too */
        for (int64_t row = block * QSP_TOKEN_ROWS; row < qsp_min(a->rows, (block + 1) * QSP_TOKEN_ROWS); row++)
            for (int64_t b = 0; b * a->codes.grid.images < a->codes.images; b++)
                coded_clear(&a->codes, b, row);
    for (; token + 8 <= a->tokens; token += 8)
        tokens_part(a, block, token, 8);
    for (; token + 4 <= a->tokens; token += 4)
        tokens_part(a, block, token, 4);
    for (; token < a->tokens; token++)
        tokens_part(a, block, token, 1);
}
