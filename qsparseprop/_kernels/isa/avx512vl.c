#include "isa/common.h"

#ifdef QSP_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512vnni"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512vnni")
#endif

#define ISA_NAME avx512vl
#define ISA_DOT DOT_EVEX
#include "isa/names.h"

#include "isa/avx2.h"

#include "loops/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
