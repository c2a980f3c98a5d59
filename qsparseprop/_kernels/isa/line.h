/* Primitives that go by a line in memory, for vectors that have no instruction for them: the ends of rows, and what is done
 * once for many elements. Included by headers behind their loads and stores. */

QSP_INLINE f32x16 f32x16_load_bf16_n(const uint16_t *p, int n)
{
    uint16_t line[16] = {0};
    memcpy(line, p, (size_t)n * sizeof *p);
    return f32x16_load_bf16(line);
}
QSP_INLINE void f32x16_store_bf16_n(uint16_t *p, f32x16 v, int n)
{
    uint16_t line[16];
    f32x16_store_bf16(line, v);
    memcpy(p, line, (size_t)n * sizeof *p);
}
QSP_INLINE float f32x16_reduce_min(f32x16 v)
{
    float line[16], s;
    f32x16_store(line, v);
    s = line[0];
    for (int i = 1; i < 16; i++)
        s = line[i] < s ? line[i] : s;
    return s;
}
QSP_INLINE float f32x16_reduce_max(f32x16 v)
{
    float line[16], s;
    f32x16_store(line, v);
    s = line[0];
    for (int i = 1; i < 16; i++)
        s = line[i] > s ? line[i] : s;
    return s;
}
