#include "common.h"

/* 4-bit weights, see native.Int4Blocks: a word holds 8 values of one column, table[nibble] is nibble - 8 in bfloat16; sums
 * over each group of 128 are scaled and get their zero times the group's sum of x. */
INLINE void tile_int4(const int M, const int Z, const char *w, const bf16 *scales, const bf16 *x, const float *sums_x, long k,
                      __m512 acc[8][4]) {
    const __m512i table = _mm512_set_epi64(
        0x40e040c040a04080, 0x404040003f800000, 0xbf80c000c040c080, 0xc0a0c0c0c0e0c100,
        0x40e040c040a04080, 0x404040003f800000, 0xbf80c000c040c080, 0xc0a0c0c0c0e0c100);
    const long column = k * 8, groups = k / 128;        /* bytes of 16 columns */
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int z = 0; z < Z; z++) acc[m][z] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512 part[M][Z];
        UNROLL for (int m = 0; m < M; m++) UNROLL for (int z = 0; z < Z; z++) part[m][z] = _mm512_setzero_ps();
        for (int s = 0; s < 16; s++, w += 64) {
            __m512i v[Z];
            UNROLL for (int z = 0; z < Z; z++) {
                v[z] = _mm512_loadu_si512(w + z * column);
                _mm_prefetch(w + z * column + 2048, _MM_HINT_T0);
            }
            UNROLL for (int j = 0; j < 4; j++) {
                __m512bh q[Z];
                UNROLL for (int z = 0; z < Z; z++)
                    q[z] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(v[z], 4 * j), table);
                UNROLL for (int m = 0; m < M; m++) {
                    __m512bh xs = (__m512bh)pair(x + m * k + g * 128 + 32 * j + 2 * s);
                    UNROLL for (int z = 0; z < Z; z++) part[m][z] = _mm512_dpbf16_ps(part[m][z], xs, q[z]);
                }
            }
        }
        UNROLL for (int z = 0; z < Z; z++) {
            const bf16 *own = scales + (z * groups + g) * 32;
            UNROLL for (int m = 0; m < M; m++) {
                __m512 shift = _mm512_mul_ps(load(own + 16), _mm512_set1_ps(sums_x[m * groups + g]));
                acc[m][z] = _mm512_add_ps(acc[m][z], _mm512_fmadd_ps(part[m][z], load(own), shift));
            }
        }
    }
}

/* sums: room for m * k / 128 floats */
void linear_int4(const bf16 *x, const char *w, const bf16 *scales, float *sums, bf16 *y, int m, long n, long k) {
    for (long i = 0; i < m * k / 128; i++) {
        __m512 sum = _mm512_setzero_ps();
        for (int j = 0; j < 128; j += 16) sum = _mm512_add_ps(sum, load(x + 128 * i + j));
        sums[i] = _mm512_reduce_add_ps(sum);
    }
    const int z_count = n % 64 == 0 && m <= 2 ? 4 : n % 32 == 0 && m <= 4 ? 2 : 1;
    #pragma omp parallel for schedule(static)
    for (long b = 0; b < n / 16; b += z_count) {
        const char *from = w + b * k * 8;
        const bf16 *own = scales + b * k / 128 * 32;
        __m512 acc[8][4];
        #define TILE(M, Z) tile_int4(M, Z, from, own, x, sums, k, acc)
        #define CALL(M) WIDTHS(M)
        ROWS(CALL)
        #undef CALL
        #undef TILE
        for (int i = 0; i < m; i++)
            for (int z = 0; z < z_count; z++) store(y + i * n + 16 * (b + z), acc[i][z]);
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
                __m512 even = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, 4 * j), nibble));
                __m512 odd = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, 16 + 4 * j), nibble));
                __m512i low = rounded(_mm512_fmadd_ps(even, scale, zero)), high = rounded(_mm512_fmadd_ps(odd, scale, zero));
                _mm512_storeu_si512(out + row * k + g * 128 + 32 * j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
}

