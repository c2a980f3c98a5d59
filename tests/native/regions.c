/* Loaded before the OpenMP runtime: notes which parallel regions several threads enter (tests/_regions.py). */
#define _GNU_SOURCE
#include <dlfcn.h>

typedef void region_body(void *);
typedef void enter(region_body *, void *, unsigned, unsigned);

enum { MOST_REGIONS = 4096 };
static void *regions[MOST_REGIONS];
static int count;

/* The library that a region is in, and where in it; 0 behind the last one. */
int seen_region(int i, const char **library, unsigned long *offset)
{
    Dl_info found;
    void *body = i >= 0 && i < count ? regions[i] : 0;
    if (!body || !dladdr(body, &found))
        return 0;
    *library = found.dli_fname;
    *offset = (unsigned long)((char *)body - (char *)found.dli_fbase);
    return 1;
}

/* A region of one thread says so by `threads`; those that Python's threads enter at a time are noted twice, at worst. */
void GOMP_parallel(region_body *body, void *data, unsigned threads, unsigned flags)
{
    static enter *runtimes;
    void *address;
    int i = 0;
    if (!runtimes) {
        address = dlsym(RTLD_NEXT, "GOMP_parallel");
        __builtin_memcpy(&runtimes, &address, sizeof runtimes);
    }
    __builtin_memcpy(&address, &body, sizeof address);
    if (threads > 1) {
        while (i < count && regions[i] != address)
            i++;
        if (i == count && count < MOST_REGIONS)
            regions[count++] = address;
    }
    runtimes(body, data, threads, flags);
}
