#include "simd/common.h"

#define ISA_NAME scalar
#include "simd/scalar.h"

#include "simd/isa.h"
