#include "isa/common.h"

#ifdef QSP_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma")
#endif

#define ISA_NAME avx2
#define ISA_DOT DOT_MADDUBS
#include "isa/names.h"

#include "isa/avx2.h"

#include "loops/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
