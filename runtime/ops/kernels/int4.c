#include "common.h"

/* 4-bit weights, see native.Int4Blocks: a word holds 8 values of one column. x [m, k] is rounded to 8 bits, each group of 128
 * with its own scale; q has it in the order of the words, 64 bytes for their lower nibbles, 64 for their upper ones. */
INLINE void tile_int4(const int M, const int Z, const char *w, const bf16 *scales, const int8_t *q, const float *x_scales,
                      const float *x_sums, long k, __m512 acc[4][8]) {
    const __m512i nibbles = _mm512_set1_epi8(15);
    const long column = k * 8, groups = k / 128;        /* bytes of 16 columns */
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int z = 0; z < Z; z++) acc[z][m] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++, q += 128) {
        __m512i part[M][Z];
        UNROLL for (int m = 0; m < M; m++) UNROLL for (int z = 0; z < Z; z++) part[m][z] = _mm512_setzero_si512();
        for (int s = 0; s < 16; s++, w += 64) {
            __m512i low[Z], high[Z];
            UNROLL for (int z = 0; z < Z; z++) {
                __m512i words = _mm512_loadu_si512(w + z * column);
                _mm_prefetch(w + z * column + AHEAD / 4, _MM_HINT_T0);
                low[z] = _mm512_and_si512(words, nibbles);
                high[z] = _mm512_and_si512(_mm512_srli_epi32(words, 4), nibbles);
            }
            UNROLL for (int m = 0; m < M; m++) {
                __m512i x_low = pair(q + m * k + 4 * s), x_high = pair(q + m * k + 64 + 4 * s);
                UNROLL for (int z = 0; z < Z; z++) {
                    part[m][z] = _mm512_dpbusd_epi32(part[m][z], low[z], x_low);
                    part[m][z] = _mm512_dpbusd_epi32(part[m][z], high[z], x_high);
                }
            }
        }
        UNROLL for (int z = 0; z < Z; z++) {
            const bf16 *own = scales + (z * groups + g) * 32;
            __m512 scale = load(own), zero = _mm512_fnmadd_ps(_mm512_set1_ps(8), scale, load(own + 16));
            UNROLL for (int m = 0; m < M; m++) {
                __m512 sum = _mm512_mul_ps(zero, _mm512_set1_ps(x_sums[m * groups + g]));
                sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[m][z]), scale, sum);
                acc[z][m] = _mm512_fmadd_ps(sum, _mm512_set1_ps(x_scales[m * groups + g]), acc[z][m]);
            }
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
    return scale;
}

/* scratch: q m * k bytes, x_scales and x_sums m * k / 128 floats each */
void linear_int4(const bf16 *x, const char *w, const bf16 *scales, int8_t *q, float *x_scales, float *x_sums, bf16 *y, int m,
                 long n, long k) {
    for (long i = 0; i < m * k / 128; i++) x_scales[i] = round_group(x + 128 * i, q + 128 * i, x_sums + i);
    const int z_count = n % 64 == 0 && m <= 2 ? 4 : n % 32 == 0 && m <= 4 ? 2 : 1;
    #pragma omp parallel for schedule(static)
    for (long b = 0; b < n / 16; b += z_count) {
        const char *from = w + b * k * 8;
        const bf16 *own = scales + b * k / 128 * 32;
        __m512 acc[4][8];
        #define TILE(M, Z) tile_int4(M, Z, from, own, q, x_scales, x_sums, k, acc)
        ROWS(WIDTHS)
        #undef TILE
        for (int i = 0; i < m; i++)
            for (int z = 0; z < z_count; z++) store(y + i * n + 16 * (b + z), acc[z][i]);
    }
}

INLINE __m512 every_lane(bf16 value) { return _mm512_castsi512_ps(_mm512_set1_epi32((uint32_t)value << 16)); }

INLINE __m512i rounded(__m512 v) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)); }

/* n rows of 4-bit weights -> bfloat16 [n, k], for products of many rows */
void floats_int4(const char *w, const bf16 *scales, bf16 *out, long n, long k) {
    const __m512i every = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
    const __m512i nibble = _mm512_set1_epi32(15);
    #pragma omp parallel for schedule(static)
    for (long row = 0; row < n; row++)
        for (long g = 0; g < k / 128; g++) {
            const bf16 *own = scales + (row / 16 * (k / 128) + g) * 32 + row % 16;
            __m512 scale = every_lane(own[0]), zero = _mm512_fnmadd_ps(_mm512_set1_ps(8), scale, every_lane(own[16]));
            __m512i words = _mm512_i32gather_epi32(every, (const int *)(w + row / 16 * k * 8 + g * 1024) + row % 16, 4);
            for (int j = 0; j < 4; j++) {
                int at = 16 * (j & 1) + 4 * (j >> 1);
                __m512 even = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, at), nibble));
                __m512 odd = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, at + 8), nibble));
                __m512i low = rounded(_mm512_fmadd_ps(even, scale, zero)), high = rounded(_mm512_fmadd_ps(odd, scale, zero));
                _mm512_storeu_si512(out + row * k + g * 128 + 32 * j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
}

