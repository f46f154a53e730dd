/* Read bandwidth of memory: GB/s medians over a buffer much larger than the caches, once with pages as they come and once
 * with huge ones.  cc -O3 -march=native -fopenmp bandwidth.c -o bandwidth; ./bandwidth MIB REPEATS */
#define _GNU_SOURCE
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { LANES = 64, HUGE_PAGE = 2 << 20 };       /* 512 bytes a round: several cache lines under way at once */

static int64_t sum_of(const int64_t *p, size_t n)
{
    int64_t lanes[LANES] = {0}, sum = 0;
    for (size_t i = 0; i < n; i += LANES)
        for (int k = 0; k < LANES; k++)
            lanes[k] += p[i + k];
    for (int k = 0; k < LANES; k++)
        sum += lanes[k];
    return sum;
}

static int64_t read_all(const int64_t *p, size_t n)
{
    int64_t sum = 0;
    #pragma omp parallel reduction(+:sum)
    {
        size_t part = n / omp_get_num_threads() / LANES * LANES;
        sum += sum_of(p + part * omp_get_thread_num(), part);
    }
    return sum;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    size_t bytes = (size_t)(argc > 1 ? atol(argv[1]) : 1024) << 20, n = bytes / sizeof(int64_t);
    int repeats = argc > 2 ? atoi(argv[2]) : 5;
    double *speeds = malloc(repeats * sizeof *speeds);
    int64_t total = 0;
    for (int advice = MADV_NOHUGEPAGE, i = 0; i < 2; advice = MADV_HUGEPAGE, i++) {
        int64_t *p = aligned_alloc(HUGE_PAGE, bytes);
        madvise(p, bytes, advice);
        #pragma omp parallel for schedule(static)
        for (size_t k = 0; k < n; k++)
            p[k] = k;
        for (int r = 0; r < repeats; r++) {
            double start = omp_get_wtime();
            total += read_all(p, n);
            speeds[r] = bytes / (omp_get_wtime() - start) / 1e9;
        }
        qsort(speeds, repeats, sizeof *speeds, by_size);
        printf("%.2f\n", speeds[repeats / 2]);
        free(p);
    }
    return total == 42;         /* the sums must not be optimised away */
}
