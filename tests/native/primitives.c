/* Compares every instruction set that this build has and this processor runs with portable C: each primitive on random and
 * extreme operands, and the products. Prints the names of the instruction sets; returns 1 at the first difference.
 * Arguments: rounds of operands, and a fault (faults.h) that is made instead of that. */
#include "isa/common.h"
#include "isa/cpu.h"

#include "faults.h"
#include "products.h"

extern const probe_table probe_table__scalar;
#ifdef QSP_X86
extern const probe_table probe_table__avx2, probe_table__avx512vl, probe_table__avx512vnni, probe_table__avx512vbmi;
#ifdef QSP_AVXVNNI
extern const probe_table probe_table__avxvnni;
#endif
#ifdef QSP_AMX
extern const probe_table probe_table__amx, probe_table__amx_model;
#endif
#endif
#ifdef QSP_NEON
extern const probe_table probe_table__neon;
#ifdef QSP_NEON_DOT
extern const probe_table probe_table__neon_dotprod, probe_table__neon_i8mm;
#endif
#endif

/* In the order of qsp_built. */
static const probe_table *const tables[] = {
    &probe_table__scalar,
#ifdef QSP_X86
    &probe_table__avx2,
#ifdef QSP_AVXVNNI
    &probe_table__avxvnni,
#endif
    &probe_table__avx512vl,
#ifdef QSP_AMX
    &probe_table__amx_model,
#endif
    &probe_table__avx512vnni, &probe_table__avx512vbmi,
#ifdef QSP_AMX
    &probe_table__amx,
#endif
#endif
#ifdef QSP_NEON
    &probe_table__neon,
#ifdef QSP_NEON_DOT
    &probe_table__neon_dotprod, &probe_table__neon_i8mm,
#endif
#endif
};
_Static_assert(sizeof tables / sizeof tables[0] == QSP_BUILT, "each instruction set has its primitives tested");

static void fill(operands *o, uint8_t *given, int round)
{
    const int kind = round % KINDS, weight_kind = round / KINDS % KINDS;
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < 3; k++)
            o->any[k][i] = random_float(), o->plain[k][i] = random_plain();
        for (int k = 0; k < LINES; k++)
            o->rows[k][i] = random_float();
        o->any[2][i] = random_below(2) ? o->any[2][i] : o->any[0][i]; /* equal to a limit */
        o->small[i] = random_small();
        o->sums[i] = (double)random_plain() * 1e3;
        o->integers[0][i] = random_integer(), o->integers[1][i] = random_integer();
        o->shift[i] = random_below(32);
        o->below_2_24[i] = random_below(4) ? random_below(1 << (1 + random_below(24))) : 0;
        o->index[i] = random_below(4) ? random_below(LINES * 16) : -1 - random_below(3);
    }
    for (int i = 0; i < QSP_UNIT; i++)
        o->code[i] = random_below(700) - 350;
    o->more_bits = (uint32_t)random_u64();
    o->bits = random_below(4) ? o->more_bits & 0xffff : random_below(2) ? 0xffff : 0;
    o->n = 1 + random_below(16);
    o->lanes = 1 + random_below(QSP_UNIT), o->channels = 1 + random_below(16);
    o->seed = random_u64(), o->odd_number = random_u64(), o->number = o->odd_number & ~(uint64_t)3;
    o->odd_step = random_below(1 << 20), o->step = o->odd_step & ~(int64_t)3;
    for (int i = 0; i < QSP_GROUP * GROUPS; i++)
        o->weights[i] = (int8_t)random_byte(weight_kind);
    o->groups = random_below(GROUPS + 1);
    for (int i = 0; i < GIVEN; i++)
        given[i] = random_byte(kind);
    o->end = given + GIVEN;
}

static const probe *named(const probe_table *t, const char *name)
{
    for (int i = 0; i < t->count; i++)
        if (!strcmp(t->probes[i].name, name))
            return &t->probes[i];
    return NULL;
}

static int compare_primitives(const probe_table *t, int rounds)
{
    static operands o;
    static result expected, found;
    uint8_t *given = memory_that_ends(GIVEN), *taken = memory_that_ends(GIVEN);
    o.out_end = taken + GIVEN;
    for (int round = 0; round < rounds; round++) {
        fill(&o, given, round);
        for (int i = 0; i < t->count; i++) {
            const probe *p = &t->probes[i], *reference = named(&probe_table__scalar, p->name);
            result *const both[] = {&expected, &found};
            for (int k = 0; k < 2; k++) {
                memset(both[k], 0x5a, sizeof(result));
                memset(taken, 0x5a, GIVEN);
                (k ? p : reference)->call(&o, both[k]);
            }
            if (!same_results(p, &expected, &found)) {
                printf("%s: %s differs from portable C in round %d\n", t->isa, p->name, round);
                for (int b = 0; b < p->size; b += 4)
                    if (memcmp(expected.u8 + b, found.u8 + b, 4))
                        printf("  bytes %d: %08x, not %08x\n", b, (unsigned)found.i32[b / 4], (unsigned)expected.i32[b / 4]);
                return 1;
            }
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    /* rows, entries, batch: less than a group and a unit, and just more; more planes than are interleaved at a time */
    static const int shapes[][3] = {{1, 1, 1}, {3, 5, 63}, {6, 18, 64}, {7, 64, 65}, {13, 100, 130}, {75, 37, 200},
                                    {2, 1030, 64}, {25, 260, 70}, {17, 9, 700}};
    const int rounds = argc > 1 ? atoi(argv[1]) : 200;
    if (argc > 2)
        return make_fault(qsp_built[0], argv[2]);
    for (int i = 0; i < QSP_BUILT; i++) {
        if (strcmp(tables[i]->isa, qsp_built[i]->name)) {
            printf("%s has the probes of %s\n", qsp_built[i]->name, tables[i]->isa);
            return 1;
        }
        if (!qsp_supported(i))
            continue;
        if (compare_primitives(tables[i], rounds))
            return 1;
        for (int s = 0; i > 0 && s < (int)(sizeof shapes / sizeof shapes[0]); s++)
            for (int kind = 0; kind < (s % 3 ? 2 : KINDS); kind++) {
                layer l;
                make_layer(&l, shapes[s][0], shapes[s][1], shapes[s][2], kind);
                const char *wrong = compare_products(qsp_built[0], qsp_table(i), &l);
                if (wrong) {
                    printf("%s: %s differs from portable C, shape %d, bytes %d\n", tables[i]->isa, wrong, s, kind);
                    return 1;
                }
                free_layer(&l);
            }
        printf("%s %d\n", tables[i]->isa, tables[i]->count);
    }
    return 0;
}
