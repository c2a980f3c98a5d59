/* A loop whose threads write to what is theirs, or to each other's: whoever looks for races must tell them apart. */
#include <stdio.h>
#include <string.h>

enum { SIZE = 4096 };
static int cells[SIZE];

int main(int argc, char **argv)
{
    const int step = argc > 1 && !strcmp(argv[1], "race") ? SIZE : 1;
    long sum = 0;
    for (int round = 0; round < 20; round++) {
        /* what one region has written the next one reads, and others in between */
        #pragma omp parallel for num_threads(3) schedule(dynamic)
        for (int i = 0; i < SIZE; i++)
            cells[i / step] += i + round;
        for (int i = 0; i < SIZE; i++)
            sum += cells[i];
        #pragma omp parallel for num_threads(3) schedule(static)
        for (int i = 0; i < SIZE; i++)
            cells[(SIZE - 1 - i) / step] -= round;
    }
    printf("%ld\n", sum);
    return 0;
}
