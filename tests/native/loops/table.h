/* Found in place of the loops' own table.h when the instruction sets are compiled for tests/test_primitives.py: every
 * isa/<isa>.c as it is, its target switched on by itself, with the products alone (all loops would take a minute) and,
 * behind them, functions of plain memory around each primitive. */
#if !defined(ISA_DENSE_ONLY) && !defined(ISA_TOKENS_ONLY) && !defined(ISA_PRODUCTS_ONLY)
#define ISA_PRODUCTS_ONLY
#endif

#include_next "loops/table.h"

#include "probes.h"
