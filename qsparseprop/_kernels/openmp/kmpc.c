/* What clang makes of `#pragma omp`, on GNU's runtime.
 *
 * Torch's runtime on Linux is GNU's. Code of gcc calls its functions (GOMP_...), which LLVM's runtime has as well; code
 * of clang calls functions that only LLVM's has (__kmpc_...), and would bring that one into the process as a second,
 * with threads of its own. Those that the modules' loops need are here, hidden in each module, so that clang's modules
 * need of a runtime what gcc's do. A loop's bounds are both inclusive, and of 64 bits: Cython's are. For all other
 * compilers and systems this file is empty.
 *
 * The functions are those of openmp/runtime/src/kmp_csupport.cpp, kmp_sched.cpp and kmp_dispatch.cpp of LLVM, as
 * https://openmp.llvm.org/doxygen describes them, and of libgomp.h of GCC. */
#include "omp.h"

#if defined(__clang__) && defined(__linux__) && QSPARSEPROP_OPENMP == 1
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

extern void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
extern void GOMP_barrier(void);
extern bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long *from, long *to);
extern bool GOMP_loop_nonmonotonic_dynamic_next(long *from, long *to);
extern void GOMP_loop_end_nowait(void);

/* The variables of a region are pointers, or values in as many bits; the body is a function of so many of them. What is
 * called is one of QSP_VARIABLES of them: here (x86-64, aarch64) the caller puts arguments into registers and on the
 * stack and takes them away again, and the function reads those that it has. */
enum { QSP_VARIABLES = 32 };
typedef void *variable;
#define FOUR variable, variable, variable, variable
typedef void region_body(int32_t *, int32_t *, FOUR, FOUR, FOUR, FOUR, FOUR, FOUR, FOUR, FOUR);

typedef struct {
    region_body *body;
    variable variables[QSP_VARIABLES];
} region;

/* How many threads the next region is to have (0: as many as usual), whether this thread is in one that has no others,
 * and the loop that its tasks are dealt out of. */
static _Thread_local unsigned next_threads;
static _Thread_local int alone;
static _Thread_local struct {
    int64_t last, step;
    long from, to;
    bool given, begun;
} loop;

static void run_region(void *data)
{
    const region *r = data;
    const variable *v = r->variables;
    int32_t thread = omp_get_thread_num(), zero = 0;
    r->body(&thread, &zero, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13],
            v[14], v[15], v[16], v[17], v[18], v[19], v[20], v[21], v[22], v[23], v[24], v[25], v[26], v[27], v[28],
            v[29], v[30], v[31]);
}

void __kmpc_fork_call(const void *place, int32_t count, region_body *body, ...)
{
    region r = {body, {0}};
    const unsigned threads = next_threads;
    va_list variables;
    (void)place;
    if (count > QSP_VARIABLES) {
        fprintf(stderr, "qsparseprop: a loop has %d variables, QSP_VARIABLES of kmpc.c is %d\n", count, QSP_VARIABLES);
        abort();
    }
    va_start(variables, body);
    for (int32_t i = 0; i < count; i++)
        r.variables[i] = va_arg(variables, variable);
    va_end(variables);
    next_threads = 0;
    GOMP_parallel(run_region, &r, threads, 0);
}

int32_t __kmpc_global_thread_num(const void *place)
{
    (void)place;
    return omp_get_thread_num();
}

void __kmpc_push_num_threads(const void *place, int32_t thread, int32_t threads)
{
    (void)place, (void)thread;
    next_threads = threads > 0 ? (unsigned)threads : 0;
}

void __kmpc_serialized_parallel(const void *place, int32_t thread)
{
    (void)place, (void)thread;
    next_threads = 0;
    alone++;
}

void __kmpc_end_serialized_parallel(const void *place, int32_t thread)
{
    (void)place, (void)thread;
    alone--;
}

void __kmpc_barrier(const void *place, int32_t thread)
{
    (void)place, (void)thread;
    if (!alone)
        GOMP_barrier();
}

/* One run of indices for each thread, as even as can be. */
void __kmpc_for_static_init_8(const void *place, int32_t thread, int32_t schedule, int32_t *is_last, int64_t *lower,
                              int64_t *upper, int64_t *stride, int64_t step, int64_t chunk)
{
    const int64_t threads = alone ? 1 : omp_get_num_threads(), me = alone ? 0 : omp_get_thread_num();
    const int64_t first = *lower, any = step > 0 ? *upper >= first : *upper <= first;
    const int64_t count = any ? (*upper - first) / step + 1 : 0;
    const int64_t share = count / threads, longer = count % threads;
    const int64_t begin = me * share + (me < longer ? me : longer), size = share + (me < longer);
    (void)place, (void)thread, (void)schedule, (void)chunk;
    *lower = first + begin * step;
    *upper = first + (begin + size - 1) * step;
    *stride = count * step;
    if (is_last)
        *is_last = size > 0 && begin + size == count;
}

void __kmpc_for_static_fini(const void *place, int32_t thread) { (void)place, (void)thread; }

/* Chunks of indices for whoever is free; GNU's runtime gives the first of them as the loop begins. */
void __kmpc_dispatch_init_8(const void *place, int32_t thread, int32_t schedule, int64_t lower, int64_t upper,
                            int64_t step, int64_t chunk)
{
    const bool any = step > 0 ? lower <= upper : lower >= upper;
    const int64_t last = any ? lower + (upper - lower) / step * step : lower;
    (void)place, (void)thread, (void)schedule;
    loop.last = last;
    loop.step = step;
    loop.from = lower, loop.to = last + step;
    if (!alone)
        loop.given = GOMP_loop_nonmonotonic_dynamic_start(lower, last + step, step, chunk, &loop.from, &loop.to);
    else
        loop.given = any;
    loop.begun = false;
}

int32_t __kmpc_dispatch_next_8(const void *place, int32_t thread, int32_t *is_last, int64_t *lower, int64_t *upper,
                               int64_t *stride)
{
    (void)place, (void)thread;
    if (loop.begun && loop.given)
        loop.given = !alone && GOMP_loop_nonmonotonic_dynamic_next(&loop.from, &loop.to);
    loop.begun = true;
    if (!loop.given) {
        if (!alone)
            GOMP_loop_end_nowait();
        return 0;
    }
    *lower = loop.from;
    *upper = loop.to - loop.step; /* where GNU's runtime says how far, LLVM's says the last one */
    *stride = loop.step;
    *is_last = *upper == loop.last;
    return 1;
}

/* Since LLVM 20, behind such a loop. */
void __kmpc_dispatch_deinit(const void *place, int32_t thread) { (void)place, (void)thread; }
#endif
