/* 16 x 16 bytes transposed in 128-bit registers: shared by every x86 path. */
QSP_INLINE void codes_transpose(u8x16 *r)
{
    u8x16 t[16];
    for (int stage = 0; stage < 4; stage++) {
        QSP_UNROLL
        for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
            t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
        }
        QSP_UNROLL
        for (int i = 0; i < 16; i++)
            r[i] = t[i];
    }
}
