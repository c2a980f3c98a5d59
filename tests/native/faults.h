/* Faults in what portable C is given: whoever watches the program must report them, or would not report others. */
#ifndef QSPARSEPROP_FAULTS_H
#define QSPARSEPROP_FAULTS_H

#include "products.h"

enum { SOME_SUM = INT32_MAX - 100 };

/* Returns 0 where nobody stops it, 2 for one that there is not. */
static int make_fault(const qsp_kernels *k, const char *fault)
{
    layer l;
    float *out;
    int result = 0;
    make_layer(&l, 6, 18, 64, 0);
    out = allocated((size_t)(l.rows * l.batch) * sizeof *out);
    if (!strcmp(fault, "read")) { /* planes that are too short */
        l.planes = realloc(l.planes, (size_t)(l.pitch));
        spmm(k, &l, 1, 0, 0, 0, out);
    } else if (!strcmp(fault, "write")) { /* a result that is too short */
        out = realloc(out, (size_t)(l.rows * l.batch) * sizeof *out - 1);
        spmm(k, &l, 1, 0, 0, 0, out);
    } else if (!strcmp(fault, "freed")) {
        float *volatile gone = out; /* or the compiler would refuse it */
        free(out);
        spmm(k, &l, 1, 0, 0, 0, gone);
        out = NULL;
    } else if (!strcmp(fault, "overflow")) { /* integers that have a sign */
        volatile int32_t sum = SOME_SUM;
        for (int i = 0; i < 200; i++)
            sum = sum + 1;
    } else if (!strcmp(fault, "shift")) {
        volatile int bits = 32;
        out[0] = (float)(1 << bits);
    } else if (!strcmp(fault, "uninitialised")) { /* weights that nobody has written */
        free(l.slot_weight);
        l.slot_weight = malloc((size_t)(QSP_GROUP * (int64_t)l.group_ptr[l.rows]));
        spmm(k, &l, 1, 0, 0, 0, out);
        for (int64_t i = 0; i < l.rows * l.batch; i++)
            if (out[i] > 0.5f)
                printf("%d", (int)i % 10);
    } else {
        result = 2;
    }
    free(out);
    free_layer(&l);
    return result;
}

#endif
