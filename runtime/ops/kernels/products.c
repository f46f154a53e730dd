#include "common.h"

/* y [m, n] = x [m, k] @ w [n, k].T, m 1..8; w in oneDNN's blocks of `block` columns, `each` values of k side by side:
 * [n / block, rounded up][k / each][block][each]. A tile is M rows times Z registers of 16 columns. */

INLINE void tile_bf16(const int M, const int Z, const char *w, long step, const bf16 *x, long k, __m512 sums[4][8]) {
    __m512 acc[M][Z];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int z = 0; z < Z; z++) acc[m][z] = _mm512_setzero_ps();
    for (long i = 0; i < k / 2; i++, w += step) {
        __m512i v[Z];
        UNROLL for (int z = 0; z < Z; z++) {
            v[z] = _mm512_loadu_si512(w + 64 * z);
            _mm_prefetch(w + 64 * z + AHEAD, _MM_HINT_T0);
        }
        UNROLL for (int m = 0; m < M; m++) {
            __m512bh xs = (__m512bh)pair(x + m * k + 2 * i);
            UNROLL for (int z = 0; z < Z; z++) acc[m][z] = _mm512_dpbf16_ps(acc[m][z], xs, (__m512bh)v[z]);
        }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int z = 0; z < Z; z++) sums[z][m] = acc[m][z];
}

INLINE void tile_int8(const int M, const int Z, const char *w, long step, const uint8_t *x, long k, __m512i sums[4][8]) {
    __m512i acc[M][Z];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int z = 0; z < Z; z++) acc[m][z] = _mm512_setzero_si512();
    for (long i = 0; i < k / 4; i++, w += step) {
        __m512i v[Z];
        UNROLL for (int z = 0; z < Z; z++) {
            v[z] = _mm512_loadu_si512(w + 64 * z);
            _mm_prefetch(w + 64 * z + AHEAD, _MM_HINT_T0);
        }
        UNROLL for (int m = 0; m < M; m++) {
            __m512i xs = pair(x + m * k + 4 * i);
            UNROLL for (int z = 0; z < Z; z++) acc[m][z] = _mm512_dpbusd_epi32(acc[m][z], xs, v[z]);
        }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int z = 0; z < Z; z++) sums[z][m] = acc[m][z];
}

void linear_bf16(const bf16 *x, const char *w, const float *bias, bf16 *y, int m, long n, long k, long block) {
    const int amx = AMX && k % 32 == 0 && (block == 32 || block == 64), z_count = amx ? block / 16 : width(block, m);
    #pragma omp parallel
    {
        if (amx) begin_tiles(m);
        #pragma omp for schedule(static)
        for (long b = 0; b < (n + block - 1) / block; b++)
            for (long c = 0; c < block && b * block + c < n; c += 16 * z_count) {
                const char *from = w + (b * block * k + c * 2) * 2;
                __m512 sums[4][8];
                #define TILE(M, Z) tile_bf16(M, Z, from, block * 4, x, k, sums)
                if (amx) AMX_TILE(_tile_dpbf16ps, from, block * 4, x, k * 2, sums);
                else ROWS(WIDTHS)
                #undef TILE
                for (int i = 0; i < m; i++)
                    for (int z = 0; z < z_count && b * block + c + 16 * z < n; z++) {
                        long at = b * block + c + 16 * z;
                        __m512 v = bias ? _mm512_add_ps(sums[z][i], _mm512_loadu_ps(bias + at)) : sums[z][i];
                        store(y + i * n + at, v);
                    }
            }
        if (amx) _tile_release();
    }
}

/* A row of x as whole numbers around 128 -> its scale: `fixed`, which stands for 1, or (0) the largest value is 127. */
static float round_row(const bf16 *x, uint8_t *q, long k, float fixed, float offset) {
    float scale = fixed;
    if (!fixed) {
        __m512 largest = _mm512_setzero_ps();
        for (long i = 0; i < k; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(load(x + i)));
        scale = fmaxf(_mm512_reduce_max_ps(largest), 1e-12f) / 127;
    }
    for (long i = 0; i < k; i += 16) {
        __m512 v = _mm512_add_ps(_mm512_div_ps(load(x + i), _mm512_set1_ps(scale)), _mm512_set1_ps(offset));
        __m512i whole = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-128)), _mm512_set1_ps(127)));
        _mm_storeu_si128((__m128i *)(q + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128))));
    }
    return fixed ? 1 : scale;
}

/* All rows; scales [m]. */
void round_rows(const bf16 *x, uint8_t *q, float *scales, int m, long k, float fixed, float offset) {
    #pragma omp parallel for if (m > 8)
    for (long i = 0; i < m; i++) scales[i] = round_row(x + i * k, q + i * k, k, fixed, offset);
}

/* y = (round(x) @ w + add) * scale * (scale of the row) + bias; q: room for m * k bytes */
void linear_int8(const bf16 *x, const char *w, const int32_t *add, const float *scale, const float *bias, uint8_t *q, bf16 *y,
                 int m, long n, long k, long block, float fixed, float offset) {
    const int amx = AMX && k % 64 == 0 && (block == 32 || block == 64), z_count = amx ? block / 16 : width(block, m);
    float row_scale[8];
    for (int i = 0; i < m; i++) row_scale[i] = round_row(x + i * k, q + i * k, k, fixed, offset);
    #pragma omp parallel
    {
        if (amx) begin_tiles(m);
        #pragma omp for schedule(static)
        for (long b = 0; b < (n + block - 1) / block; b++)
            for (long c = 0; c < block && b * block + c < n; c += 16 * z_count) {
                const char *from = w + b * block * k + c * 4;
                __m512i sums[4][8];
                #define TILE(M, Z) tile_int8(M, Z, from, block * 4, q, k, sums)
                if (amx) AMX_TILE(_tile_dpbusd, from, block * 4, q, k, sums);
                else ROWS(WIDTHS)
                #undef TILE
                for (int i = 0; i < m; i++)
                    for (int z = 0; z < z_count && b * block + c + 16 * z < n; z++) {
                        long at = b * block + c + 16 * z;
                        __m512 v = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[z][i], _mm512_loadu_si512(add + at)));
                        v = _mm512_mul_ps(v, _mm512_mul_ps(_mm512_loadu_ps(scale + at), _mm512_set1_ps(row_scale[i])));
                        store(y + i * n + at, bias ? _mm512_add_ps(v, _mm512_loadu_ps(bias + at)) : v);
                    }
            }
        if (amx) _tile_release();
    }
}
