/* Sums that tell whether values are still the same: of all their bits, each at its place.
 *
 * Values are words of 32 bits, sixteen of which are eight pairs of neighbours, one for each lane. Lanes add up three
 * numbers of 64 bits: the pairs as they are, by which the change of a single word is always found; and twice, with
 * different keys, the products (low + key) * (high + key') of the hash NH (Black et al., UMAC, CRYPTO 1999), for which two
 * sequences that differ have equal sums for one in 2^32 keys. Keys grow from one sixteen to the next by a step each, so
 * that sums of parts add up to that of the whole. */

/* Sixteens that are fetched ahead: large weights come from memory, at a third of the speed without. */
#define DIGEST_AHEAD 64

/* A number as good as random (the finaliser of MurmurHash3): a key, or what it grows by. */
QSP_INLINE uint32_t digest_key(uint32_t place)
{
    place = (place + 1) * 0x9e3779b1U;
    place = (place ^ place >> 16) * 0x85ebca6bU;
    place = (place ^ place >> 13) * 0xc2b2ae35U;
    return place ^ place >> 16;
}

/* Keys of a sum of products for sixteen number `first`, and their steps. */
QSP_INLINE void digest_keys(uint32_t sum, int64_t first, i32x16 *keys, i32x16 *steps)
{
    int32_t key[16], step[16];
    for (uint32_t word = 0; word < 16; word++) {
        const uint32_t grows = digest_key(32 * sum + 2 * word) | 1;
        step[word] = (int32_t)grows;
        key[word] = (int32_t)(digest_key(32 * sum + 2 * word + 1) + (uint32_t)first * grows);
    }
    *keys = i32x16_load_n(key, 16);
    *steps = i32x16_load_n(step, 16);
}

static void digest_kernel(const void *data, int64_t size, int64_t first, int64_t last, uint64_t *out)
{
    const int32_t *const words = data;
    u64x8 pairs = u64x8_zero(), products = pairs, others = pairs;
    i32x16 key, step, other_key, other_step;
    digest_keys(0, first, &key, &step);
    digest_keys(1, first, &other_key, &other_step);
    for (int64_t i = first; i < last; i++) {
        QSP_PREFETCH_READ(words + qsp_min(16 * (i + DIGEST_AHEAD), size - 1));
        const i32x16 v = i32x16_load_n(words + 16 * i, (int)qsp_min(16, size - 16 * i));
        pairs = u64x8_add_pairs(pairs, v);
        products = u64x8_add_products(products, i32x16_add(v, key));
        others = u64x8_add_products(others, i32x16_add(v, other_key));
        key = i32x16_add(key, step);
        other_key = i32x16_add(other_key, other_step);
    }
    u64x8_store(out, pairs);
    u64x8_store(out + 8, products);
    u64x8_store(out + 16, others);
}
