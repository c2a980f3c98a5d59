/* What one core of this machine can do at most, for kernels.py: u8 x s8 products, float32 products, reading memory.
 *
 * Every function does `rounds` turns of work and returns how much that was; the caller takes the time. The instruction
 * set is the widest that the processor has, asked for function by function, so this file needs no -march.
 *
 * Accumulators are variables of their own, since gcc keeps arrays of them on the stack, and there are twelve: the
 * instructions take up to five cycles, and a core starts up to two of them in each.
 */
#include <stdint.h>

#define EACH(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)
#define COUNT 12
#define UNROLL(body) do { body body body body } while (0)
#define UNROLLED 4

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define KEEP(i) __asm__ volatile("" : : "v"(a##i));

#define ARITHMETIC(name, isa, vector, zero, instruction, products)                          \
    __attribute__((target(isa))) static int64_t name(int64_t rounds)                       \
    {                                                                                       \
        vector x = zero(), y = zero();                                                      \
        EACH(DECLARE_##vector)                                                              \
        for (int64_t r = 0; r < rounds; r++)                                                \
            UNROLL(EACH(instruction));                                                      \
        EACH(KEEP)                                                                          \
        return rounds * UNROLLED * COUNT * products;                                        \
    }

#define READING(name, isa, vector, instruction)                                             \
    __attribute__((target(isa))) static int64_t name(const void *data, int64_t bytes, int64_t rounds) \
    {                                                                                       \
        const int64_t step = COUNT * sizeof(vector), turns = bytes / step;                  \
        for (int64_t r = 0; r < rounds; r++) {                                              \
            const vector *p = data;                                                         \
            for (int64_t t = 0; t < turns; t++, p += COUNT) {                               \
                vector a;                                                                   \
                EACH(instruction)                                                           \
            }                                                                               \
        }                                                                                   \
        return rounds * turns * step;                                                       \
    }

#define DECLARE___m512i(i) __m512i a##i = _mm512_setzero_si512();
#define DECLARE___m256i(i) __m256i a##i = _mm256_setzero_si256();
#define DECLARE___m512(i) __m512 a##i = _mm512_setzero_ps();
#define DECLARE___m256(i) __m256 a##i = _mm256_setzero_ps();

#define DOT(i) __asm__("vpdpbusd %2, %1, %0" : "+v"(a##i) : "v"(x), "v"(y));
#define DOT_VEX(i) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(a##i) : "x"(x), "x"(y));
#define FMA(i) __asm__("vfmadd231ps %2, %1, %0" : "+v"(a##i) : "v"(x), "v"(y));
#define LOAD(i) __asm__ volatile("vmovups %1, %0" : "=v"(a) : "m"(p[i]));

ARITHMETIC(int8_avx512vnni, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512, DOT, 64)
ARITHMETIC(int8_avxvnni, "avx2", __m256i, _mm256_setzero_si256, DOT_VEX, 32)
ARITHMETIC(float_avx512, "avx512f", __m512, _mm512_setzero_ps, FMA, 16)
ARITHMETIC(float_fma, "avx2,fma", __m256, _mm256_setzero_ps, FMA, 8)
READING(read_avx512, "avx512f", __m512, LOAD)
READING(read_avx, "avx2", __m256, LOAD)

static int has_avxvnni(void)
{
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

/* Dot products of u8 and s8, counted as multiply-adds; 0 where the processor has no instruction for them. */
int64_t peak_int8(int64_t rounds)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni"))
        return int8_avx512vnni(rounds);
    if (has_avxvnni())
        return int8_avxvnni(rounds);
#endif
    (void)rounds;
    return 0;
}

/* Fused multiply-adds of float32; 0 where it is not known how to count them. */
int64_t peak_float(int64_t rounds)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f"))
        return float_avx512(rounds);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return float_fma(rounds);
#endif
    (void)rounds;
    return 0;
}

/* Bytes read from a buffer that is read `rounds` times. */
int64_t peak_read(const void *data, int64_t bytes, int64_t rounds)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f"))
        return read_avx512(data, bytes, rounds);
    if (__builtin_cpu_supports("avx2"))
        return read_avx(data, bytes, rounds);
#endif
    const uint64_t *p = data;
    const int64_t turns = bytes / (COUNT * 8);
#define START(i) uint64_t a##i = 0;
#define TAKE(i) a##i |= p[COUNT * t + i];
#define USE(i) __asm__ volatile("" : : "r"(a##i));
    EACH(START)
    for (int64_t r = 0; r < rounds; r++) {
        for (int64_t t = 0; t < turns; t++) {
            EACH(TAKE)
        }
        __asm__ volatile("" : : : "memory"); /* or one turn would do for all */
    }
    EACH(USE)
    return rounds * turns * COUNT * 8;
}
