/* Pages for large results, used again by those that come later. One translation unit includes this.
 *
 * The C library returns the largest blocks to the system at once, whose first use then costs more page faults than the
 * kernels need for their work, and keeps smaller ones for later: those of a training step leave holes between each
 * other, and the process grows to several times what it uses. Here freed blocks are kept for a later one of about the
 * same size, and go when one comes that none fits, as many bytes as it asks for; meanwhile they serve as scratch memory.
 * So blocks in use and kept ones are together never more than those in use were at some time, but for what threads take
 * while another one is at it. */
#ifndef QSPARSEPROP_POOL_H
#define QSPARSEPROP_POOL_H

#include <stdint.h>

#include "memory.h"

#if defined(__linux__)
#include <stdatomic.h>

enum { QSP_KEPT_BLOCKS = 64 };
static const int64_t QSP_KEPT_BYTES = (int64_t)1 << 28; /* more than that goes back to the system */

typedef struct {
    void *start;
    int64_t size;
} qsp_block;

static qsp_block qsp_kept[QSP_KEPT_BLOCKS]; /* the oldest first */
static int qsp_kept_count;
static int64_t qsp_kept_size;
/* Nobody waits: who finds it taken, perhaps for ever in a process that was forked meanwhile, does without kept blocks. */
static atomic_flag qsp_kept_taken = ATOMIC_FLAG_INIT;

static inline int qsp_kept_enter(void) { return !atomic_flag_test_and_set_explicit(&qsp_kept_taken, memory_order_acquire); }
static inline void qsp_kept_leave(void) { atomic_flag_clear_explicit(&qsp_kept_taken, memory_order_release); }

static inline qsp_block qsp_kept_remove(int i)
{
    const qsp_block block = qsp_kept[i];
    qsp_kept_size -= block.size;
    for (qsp_kept_count--; i < qsp_kept_count; i++)
        qsp_kept[i] = qsp_kept[i + 1];
    return block;
}

/* Remove kept blocks of at least so many bytes, the oldest first, into `gone`; how many. */
static inline int qsp_kept_evict(int64_t bytes, qsp_block *gone)
{
    int count = 0;
    for (int64_t size = 0; qsp_kept_count && size < bytes; count++) {
        gone[count] = qsp_kept_remove(0);
        size += gone[count].size;
    }
    return count;
}

static inline void qsp_unmap_all(const qsp_block *blocks, int count)
{
    for (int i = 0; i < count; i++)
        (void)munmap(blocks[i].start, (size_t)blocks[i].size);
}

/* The smallest kept block of at least so many bytes and at most `largest`, the newest of these; -1 where there is none. */
static inline int qsp_kept_find(int64_t bytes, int64_t largest)
{
    int found = -1;
    for (int i = qsp_kept_count - 1; i >= 0; i--)
        if (qsp_kept[i].size >= bytes && qsp_kept[i].size <= largest) {
            found = i;
            largest = qsp_kept[i].size - 1;
        }
    return found;
}

/* A block of at least so many bytes, whatever they contain; its size in *size. NULL where there is none. What is
 * taken `for_now`, and given back before results are wanted, may be a larger block that waits for another use, in place
 * of a new one beside it. */
static inline void *qsp_pool_take(int64_t bytes, int for_now, int64_t *size)
{
    qsp_block gone[QSP_KEPT_BLOCKS], block = {NULL, 0};
    int count = 0;
    if (qsp_kept_enter()) {
        const int i = qsp_kept_find(bytes, for_now ? INT64_MAX : bytes + bytes / 8);
        if (i >= 0)
            block = qsp_kept_remove(i);
        if (!block.start)
            count = qsp_kept_evict(bytes, gone);
        qsp_kept_leave();
    }
    qsp_unmap_all(gone, count);
    if (!block.start) {
        block.size = bytes;
        block.start = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (block.start == MAP_FAILED)
            return NULL;
        qsp_prefer_huge_pages(block.start, bytes);
    }
    *size = block.size;
    return block.start;
}

static inline void qsp_pool_give(void *start, int64_t size)
{
    qsp_block gone[QSP_KEPT_BLOCKS + 1];
    int count = 0;
    const qsp_block block = {start, size};
    if (size <= QSP_KEPT_BYTES && qsp_kept_enter()) {
        if (qsp_kept_count == QSP_KEPT_BLOCKS)
            gone[count++] = qsp_kept_remove(0);
        if (qsp_kept_size + size > QSP_KEPT_BYTES)
            count += qsp_kept_evict(qsp_kept_size + size - QSP_KEPT_BYTES, gone + count);
        qsp_kept[qsp_kept_count++] = block;
        qsp_kept_size += size;
        qsp_kept_leave();
    } else {
        gone[count++] = block;
    }
    qsp_unmap_all(gone, count);
}

/* Give all kept blocks back to the system; their bytes. */
static inline int64_t qsp_pool_release(void)
{
    qsp_block gone[QSP_KEPT_BLOCKS];
    int count = 0;
    int64_t size = 0;
    if (qsp_kept_enter()) {
        size = qsp_kept_size;
        count = qsp_kept_evict(INT64_MAX, gone);
        qsp_kept_leave();
    }
    qsp_unmap_all(gone, count);
    return size;
}

#else /* left to the C library */
static inline void *qsp_pool_take(int64_t bytes, int for_now, int64_t *size)
{
    (void)bytes, (void)for_now, (void)size;
    return NULL;
}
static inline void qsp_pool_give(void *start, int64_t size) { (void)start, (void)size; }
static inline int64_t qsp_pool_release(void) { return 0; }
#endif

#endif
