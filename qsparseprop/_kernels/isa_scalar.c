#include "simd/common.h"

/* Unrolling is for registers; portable C has none to keep values in, and compiles in a tenth of the time without it. */
#undef QSP_UNROLL
#define QSP_UNROLL

#define ISA_NAME scalar
#include "simd/scalar.h"

#include "simd/isa.h"
