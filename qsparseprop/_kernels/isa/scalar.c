#include "isa/common.h"

/* Unrolling and copies of loops for each constant are for registers; portable C has none to keep values in, and
 * compiles in a fraction of the time without them. */
#undef QSP_UNROLL
#define QSP_UNROLL
#if defined(__GNUC__)
#undef QSP_INLINE
#define QSP_INLINE static inline __attribute__((unused))
#undef QSP_COPIED
#define QSP_COPIED QSP_APART
#endif

#define ISA_NAME scalar
#include "isa/names.h"

#include "isa/scalar.h"

#include "loops/table.h"
