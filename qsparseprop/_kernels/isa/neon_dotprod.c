#include "isa/common.h"

#ifdef QSP_NEON_DOT
#include <arm_neon.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define ISA_NAME neon_dotprod
#define ISA_DOT DOT_SIGNED
#define ISA_PRODUCTS_ONLY /* the rest would be the code of neon once more */
#include "isa/names.h"

#include "isa/neon.h"

#include "loops/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
