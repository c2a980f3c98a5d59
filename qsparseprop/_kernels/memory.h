/* Advice to the operating system about large buffers. */
#ifndef QSPARSEPROP_MEMORY_H
#define QSPARSEPROP_MEMORY_H

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

/* Memory that is written for the first time costs a page fault for every 4 KB, more than the kernels need for their
 * work. Where the system leaves the choice to the program (transparent huge pages on "madvise"), large buffers ask for
 * pages of 2 MB. A hint: nothing depends on its success. */
enum { QSP_HUGE_PAGE = 1 << 21 };

static inline void qsp_prefer_huge_pages(void *start, int64_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t first = ((uintptr_t)start + QSP_HUGE_PAGE - 1) & ~(uintptr_t)(QSP_HUGE_PAGE - 1);
    const uintptr_t last = ((uintptr_t)start + (uintptr_t)bytes) & ~(uintptr_t)(QSP_HUGE_PAGE - 1);
    if (last > first)
        (void)madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

#endif
