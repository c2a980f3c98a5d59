/* Products of few tokens by permutations of bytes, AVX512-VBMI; everything else is as in 512-bit vectors without it. */
#include "isa/avx512vnni.h"

#define ISA_TOKENS
#define ISA_MOST_TOKENS 48

/* A block's columns of a token are two vectors, from which one instruction picks 64 codes; another one multiplies them with
 * a step's codes, and adds up the four of each row. */
QSP_INLINE void tokens_dot(int32_t *sums, const qsp_tokens *a, const uint8_t *x, int64_t block, const int tokens)
{
    __m512i sum[8], low[8], high[8];
    QSP_UNROLL
    for (int t = 0; t < tokens; t++)
        sum[t] = _mm512_loadu_si512(sums + t * QSP_TOKEN_ROWS);
    for (int64_t c = 0; c < a->column_blocks; c++) {
        const int64_t first = a->step_ptr[block * a->column_blocks + c];
        const int64_t last = a->step_ptr[block * a->column_blocks + c + 1];
        QSP_UNROLL
        for (int t = 0; t < tokens; t++) {
            low[t] = _mm512_loadu_si512(x + t * a->pitch + c * QSP_TOKEN_COLUMNS);
            high[t] = _mm512_loadu_si512(x + t * a->pitch + c * QSP_TOKEN_COLUMNS + QSP_UNIT);
        }
        for (int64_t s = first; s < last; s++) {
            const __m512i place = _mm512_loadu_si512(a->place + QSP_UNIT * s);
            const __m512i code = _mm512_loadu_si512(a->code + QSP_UNIT * s);
            QSP_UNROLL
            for (int t = 0; t < tokens; t++)
                sum[t] = _mm512_dpbusd_epi32(sum[t], _mm512_permutex2var_epi8(low[t], place, high[t]), code);
        }
    }
    QSP_UNROLL
    for (int t = 0; t < tokens; t++)
        _mm512_storeu_si512(sums + t * QSP_TOKEN_ROWS, sum[t]);
}
