#include "isa/common.h"

#ifdef QSP_AVXVNNI
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,avxvnni")
#endif

#define ISA_NAME avxvnni
#define ISA_DOT DOT_VEX
#define ISA_PRODUCTS_ONLY /* the rest would be the code of avx2 once more */
#include "isa/names.h"

#include "isa/avx2.h"

#include "loops/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
