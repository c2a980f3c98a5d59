#include "isa/common.h"

#ifdef QSP_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"))),                 \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")
#endif

#define ISA_NAME avx512vbmi
#define ISA_TOKENS_ONLY /* the rest is the code of avx512vnni */
#include "isa/names.h"

#include "isa/avx512vbmi.h"

#include "loops/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
