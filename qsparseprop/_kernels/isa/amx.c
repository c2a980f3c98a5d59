#include "isa/common.h"

#ifdef QSP_AMX
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))),                 \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#define ISA_NAME amx
#define ISA_DENSE_ONLY /* the rest is the code of avx512vnni */
#include "isa/names.h"

#include "isa/amx.h"

#include "loops/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
