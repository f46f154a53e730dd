#include "common.h"

/* 4-bit weights, see native_blocks.Int4Blocks: a group of 128 values of 16 columns is 16 lines of words, each 8 values of a column,
 * and a line of scales and zeros. x [m, k] is rounded to 8 bits, each group of 128 with its own scale; q has it in the order
 * of the words, 64 bytes for their lower nibbles, 64 for their upper ones. */
enum { GROUP = 17 * 64 };

INLINE __m512 zero_of(__m512 scale, __m512 zero) { return _mm512_fnmadd_ps(_mm512_set1_ps(8), scale, zero); }

INLINE void tile_int4(const int M, const char *w, const int8_t *q, const float *x_scales, const float *x_sums, long k,
                      __m512 acc[8]) {
    const __m512i nibbles = _mm512_set1_epi8(15);
    const long groups = k / 128;
    UNROLL for (int m = 0; m < M; m++) acc[m] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++, q += 128, w += 64) {
        __m512i low[8], high[8];
        UNROLL for (int m = 0; m < M; m++) low[m] = high[m] = _mm512_setzero_si512();
        _Pragma("GCC unroll 1") for (int s = 0; s < 64; s += 4, w += 64) {
            __m512i words = _mm512_loadu_si512(w), upper = _mm512_and_si512(_mm512_srli_epi32(words, 4), nibbles);
            _mm_prefetch(w + AHEAD, _MM_HINT_T0);
            words = _mm512_and_si512(words, nibbles);
            UNROLL for (int m = 0; m < M; m++) {
                low[m] = _mm512_dpbusd_epi32(low[m], words, pair(q + m * k + s));
                high[m] = _mm512_dpbusd_epi32(high[m], upper, pair(q + m * k + 64 + s));
            }
        }
        __m512 scale = load((const bf16 *)w), zero = zero_of(scale, load((const bf16 *)w + 16));
        _mm_prefetch(w + AHEAD, _MM_HINT_T0);
        UNROLL for (int m = 0; m < M; m++) {
            __m512 sum = _mm512_mul_ps(zero, _mm512_set1_ps(x_sums[m * groups + g]));
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(low[m], high[m])), scale, sum);
            acc[m] = _mm512_fmadd_ps(sum, _mm512_set1_ps(x_scales[m * groups + g]), acc[m]);
        }
    }
}

/* 128 values of x -> whole numbers in the words' order, their sum; their scale */
static float round_group(const bf16 *x, int8_t *q, float *sum) {
    __m512 largest = _mm512_setzero_ps();
    int16_t pairs[64];
    int total = 0;
    for (int i = 0; i < 128; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(load(x + i)));
    float scale = fmaxf(_mm512_reduce_max_ps(largest), 1e-12f) / 127;
    for (int i = 0; i < 128; i += 16) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps(load(x + i), _mm512_set1_ps(scale)));
        _mm_storeu_si128((__m128i *)(pairs + i / 2), _mm512_cvtepi32_epi8(whole));
        total += _mm512_reduce_add_epi32(whole);
    }
    for (int s = 0; s < 16; s++) {
        memcpy(q + 4 * s, pairs + s, 2);
        memcpy(q + 4 * s + 2, pairs + 16 + s, 2);
        memcpy(q + 64 + 4 * s, pairs + 32 + s, 2);
        memcpy(q + 64 + 4 * s + 2, pairs + 48 + s, 2);
    }
    *sum = total;
    return scale + not_finite(x, 128);
}

typedef struct { const Matmul *p; const int8_t *q; const float *x_scales, *x_sums; bf16 *y; int m; } Product;

/* by 16 columns */
static void columns_int4(void *arguments, long from_column, long to_column) {
    const Product *own = arguments;
    const Matmul *p = own->p;
    const long n = p->n, k = p->k;
    const int m = own->m;
    for (long at = 16 * from_column; at < 16 * to_column; at += 16) {
        const char *from = p->w + at / 16 * (k / 128) * GROUP;
        __m512 acc[8];
        #define CALL(M) tile_int4(M, from, own->q, own->x_scales, own->x_sums, k, acc)
        ROWS(CALL)
        #undef CALL
        for (int i = 0; i < m; i++)
            store(own->y + i * n + at, p->bias ? _mm512_add_ps(acc[i], _mm512_loadu_ps(p->bias + at)) : acc[i]);
    }
}

void matmul_int4(const Matmul *p, const bf16 *x, bf16 *y, int m) {
    const long groups = m * p->k / 128;
    int8_t *q = scratch(ROUNDED, m * p->k);
    float *x_scales = scratch(SCALES, 2 * groups * sizeof(float)), *x_sums = x_scales + groups;
    for (long i = 0; i < groups; i++) x_scales[i] = round_group(x + 128 * i, q + 128 * i, x_sums + i);
    Product own = {p, q, x_scales, x_sums, y, m};
    share((p->n + 15) / 16, columns_int4, &own);
}

INLINE __m512 every_lane(bf16 value) { return _mm512_castsi512_ps(_mm512_set1_epi32((uint32_t)value << 16)); }

INLINE __m512i rounded(__m512 v) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)); }

/* n rows of 4-bit weights -> bfloat16 [n, k], for matmuls of a large batch */
void floats_int4(const char *w, bf16 *out, long n, long k) {
    const __m512i every = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
    const __m512i nibble = _mm512_set1_epi32(15);
    #pragma omp parallel for schedule(static)
    for (long row = 0; row < n; row++)
        for (long g = 0; g < k / 128; g++) {
            const char *from = w + (row / 16 * (k / 128) + g) * GROUP;
            const bf16 *own = (const bf16 *)(from + 16 * 64) + row % 16;
            __m512 scale = every_lane(own[0]), zero = zero_of(scale, every_lane(own[16]));
            __m512i words = _mm512_i32gather_epi32(every, (const int *)from + row % 16, 4);
            for (int j = 0; j < 4; j++) {
                int at = 16 * (j & 1) + 4 * (j >> 1);
                __m512 even = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, at), nibble));
                __m512 odd = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, at + 8), nibble));
                __m512i low = rounded(_mm512_fmadd_ps(even, scale, zero)), high = rounded(_mm512_fmadd_ps(odd, scale, zero));
                _mm512_storeu_si512(out + row * k + g * 128 + 32 * j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
}
