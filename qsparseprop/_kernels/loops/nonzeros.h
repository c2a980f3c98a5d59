/* Nonzeros of a list, as they are kept -> what belongs to its slots. */

QSP_INLINE int64_t nonzeros_of_row(const qsp_nonzeros *l, int64_t row) { return l->first[row + 1] - l->first[row]; }

QSP_INLINE int64_t slots_of_row(const qsp_nonzeros *l, int64_t row)
{
    return QSP_GROUP * (int64_t)(l->group_ptr[row + 1] - l->group_ptr[row]);
}

/* Slots [from, from + n) of a row: what its table, `offset` or `plane` of the list, has for them. */
QSP_INLINE void look_up(const qsp_nonzeros *l, int64_t row, const int32_t *table, int64_t from, int64_t n, int32_t *out)
{
    const int64_t first = l->first[row] + from, there = qsp_min(n, nonzeros_of_row(l, row) - from);
    if (l->table)
        table += l->table[row];
    if (l->code) {
        const uint16_t *code = l->code + first;
        for (int64_t k = 0; k < there; k++)
            out[k] = table[code[k]];
    } else if (!l->wide) {
        for (int64_t k = 0; k < there; k++)
            out[k] = table[from + k];
    } else {
        const int32_t *code = l->wide + first;
        for (int64_t k = 0; k < there; k++)
            out[k] = table[code[k]];
    }
    for (int64_t k = there; k < n; k++) /* memory that is in the cache, times zero */
        out[k] = out[there - 1];
}

/* Offsets of all slots of a row; of linear layers they are multiples of the codes, which needs no table. */
QSP_INLINE void row_offsets(const qsp_nonzeros *l, int64_t row, int32_t *out)
{
    const int64_t n = nonzeros_of_row(l, row), slots = slots_of_row(l, row);
    if (!l->step || l->wide) {
        look_up(l, row, l->offset, 0, slots, out);
        return;
    }
    const int32_t start = l->offset[l->table ? l->table[row] : 0], step = l->step;
    if (l->code) {
        const uint16_t *code = l->code + l->first[row];
        for (int64_t k = 0; k < n; k++)
            out[k] = start + code[k] * step;
    } else {
        for (int64_t k = 0; k < n; k++)
            out[k] = start + (int32_t)k * step;
    }
    for (int64_t k = n; k < slots; k++)
        out[k] = out[n - 1];
}

static void offsets_kernel(const qsp_nonzeros *l, int64_t first, int64_t last, int32_t *out)
{
    for (int64_t row = first; row < last; row++) {
        row_offsets(l, row, out);
        out += slots_of_row(l, row);
    }
}
