#include "isa/common.h"

#ifdef QSP_NEON
#include <arm_neon.h>

#define ISA_NAME neon
#define ISA_DOT DOT_NONE
#include "isa/names.h"

#include "isa/neon.h"

#include "loops/table.h"
#endif
