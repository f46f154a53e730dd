#include "common.h"

/* Weights [n, k] in oneDNN's blocks of `block` columns, 4 bytes of k side by side: [n / block, rounded up][k / each][block][each].
 * A tile is M rows times Z registers of 16 columns.
 *
 * One load instruction walks the weights in the order of memory and the sums alternate: the CPU prefetches per instruction,
 * and with four that walk side by side less arrives in time. row: bytes of a row of x; step: bytes of w from 4 of them to the
 * next 4. */
INLINE void tile(const int KIND, const int M, const int Z, const char *w, long step, const char *x, long row,
                 __m512i sums[4][8]) {
    __m512i acc[8][4];
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int z = 0; z < Z; z++) acc[m][z] = _mm512_setzero_si512();
    for (long at = 0; at < row; at += 4, w += step)
        _Pragma("GCC unroll 1") for (int z = 0; z < Z; z++) {
            __m512i columns = _mm512_loadu_si512(w + 64 * z);
            _mm_prefetch(w + 64 * z + AHEAD, _MM_HINT_T0);
            UNROLL for (int m = 0; m < M; m++) {
                __m512i xs = pair(x + m * row + at), first = acc[m][0];
                UNROLL for (int i = 1; i < Z; i++) acc[m][i - 1] = acc[m][i];
                acc[m][Z - 1] = KIND == INT8 ? _mm512_dpbusd_epi32(first, xs, columns)
                    : _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(first), (__m512bh)xs, (__m512bh)columns));
            }
        }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int z = 0; z < Z; z++) sums[z][m] = acc[m][z];
}

/* A row of x as whole numbers around 128 -> its scale: `fixed`, which stands for 1, or (0) the largest value is 127; NaN for
 * a row with NaN or Inf. */
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
    return (fixed ? 1 : scale) + not_finite(x, k);
}

/* All rows; scales [m]. */
void round_rows(const bf16 *x, uint8_t *q, float *scales, int m, long k, float fixed, float offset) {
    #pragma omp parallel for if (m > 8)
    for (long i = 0; i < m; i++) scales[i] = round_row(x + i * k, q + i * k, k, fixed, offset);
}

INLINE __m512 summed(const int KIND, const Matmul *p, __m512i sums, float x_scale, long at) {
    __m512 v = _mm512_castsi512_ps(sums);
    if (KIND == INT8) {
        v = _mm512_cvtepi32_ps(_mm512_add_epi32(sums, _mm512_loadu_si512(p->add + at)));
        v = _mm512_mul_ps(v, _mm512_mul_ps(_mm512_loadu_ps(p->scale + at), _mm512_set1_ps(x_scale)));
    }
    return p->bias ? _mm512_add_ps(v, _mm512_loadu_ps(p->bias + at)) : v;
}

/* row: bytes of a row of x; x_scales [m]: INT8 alone */
typedef struct { const Matmul *p; const char *x; long row; const float *x_scales; bf16 *y; int m; } Product;

INLINE void blocks(const int KIND, const Product *own, long from_block, long to_block) {
    const Matmul *p = own->p;
    const char *x = own->x;
    const long n = p->n, block = p->block, row = own->row;
    const int m = own->m, amx = AMX && m > VECTORS && row % 64 == 0 && (block == 32 || block == 64);
    const int z_count = amx ? block / 16 : width(block, m);
    if (amx) begin_tiles(m);
    for (long b = from_block; b < to_block; b++)
        for (long c = 0; c < block && b * block + c < n; c += 16 * z_count) {
            const char *from = p->w + b * block * row + c * 4;
            __m512i sums[4][8];
            #define TILE(M, Z) tile(KIND, M, Z, from, block * 4, x, row, sums)
            if (!amx) ROWS(WIDTHS)
            else if (KIND == INT8) AMX_TILE(_tile_dpbusd, from, block * 4, x, row, sums);
            else AMX_TILE(_tile_dpbf16ps, from, block * 4, x, row, sums);
            #undef TILE
            for (int i = 0; i < m; i++)
                for (int z = 0; z < z_count && b * block + c + 16 * z < n; z++) {
                    long at = b * block + c + 16 * z;
                    store(own->y + i * n + at, summed(KIND, p, sums[z][i], KIND == INT8 ? own->x_scales[i] : 1, at));
                }
        }
    if (amx) _tile_release();
}

static void blocks_bf16(void *own, long from, long to) { blocks(BF16, own, from, to); }

static void blocks_int8(void *own, long from, long to) { blocks(INT8, own, from, to); }

static void matmul_int8(const Matmul *p, const bf16 *x, bf16 *y, int m) {
    uint8_t *q = scratch(ROUNDED, m * p->k);
    float scales[8];
    for (int i = 0; i < m; i++) scales[i] = round_row(x + i * p->k, q + i * p->k, p->k, p->fixed, p->offset);
    Product own = {p, (const char *)q, p->k, scales, y, m};
    share((p->n + p->block - 1) / p->block, blocks_int8, &own);
}

static void matmul_bf16(const Matmul *p, const bf16 *x, bf16 *y, int m) {
    Product own = {p, (const char *)x, 2 * p->k, NULL, y, m};
    share((p->n + p->block - 1) / p->block, blocks_bf16, &own);
}

/* x [m, k] -> y [m, n], m 1..8 */
void matmul(const Matmul *p, const bf16 *x, bf16 *y, int m) {
    if (p->kind == BF16) matmul_bf16(p, x, y, m);
    else if (p->kind == INT8) matmul_int8(p, x, y, m);
    else matmul_int4(p, x, y, m);
}
