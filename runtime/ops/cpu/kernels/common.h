/* The decode step's kernels in bfloat16: matmuls of a small batch, norms, gates, attention. For CPUs with AVX-512 BF16 and
 * VNNI.
 *
 * With one token at a time every weight is used once: a matmul is memory-bound, and what happens between two matmuls counts.
 * Built by native_library.py, called by native.py, which has the same structures and checks shapes and layouts.
 */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

enum { BF16, INT8, INT4 };
typedef struct {                    /* y = x @ w.T * scale + bias, w [n, k]; see matmul.c and int4.c */
    const char *w;
    const int32_t *add;             /* [n], INT8: joins the sums of whole numbers */
    const float *scale, *bias;      /* [n]; scale: INT8 alone; bias: NULL where there is none */
    long kind, n, k, block;
    float fixed, offset;            /* INT8: the scale of x and what is added to x / scale; 0: each row has a scale of its own */
} Matmul;

typedef struct { const bf16 *weight, *bias; } Norm;        /* bias: NULL where there is none */

typedef struct {
    const bf16 *cos, *sin;                  /* [rows, d] */
    const int64_t *slots, *lengths;         /* [rows]: where its key goes; tokens in the cache with it */
    const int32_t *table;                   /* [rows, table_width]: blocks of the cache */
    long rows, table_width, block, heads, kv_heads, d;
} Step;

void matmul(const Matmul *p, const bf16 *x, bf16 *y, int m);
void matmul_int4(const Matmul *p, const bf16 *x, bf16 *y, int m);
void attend(const bf16 *qkv, bf16 *keys, bf16 *values, const Step *s, bf16 *out);

enum { ROUNDED, SCALES, ROTATED, SHARES, NORMED, WIDE, GATED, MIXED, USES };
void *scratch(int use, long bytes);         /* memory of the calling thread for one use, kept from call to call */

typedef void (*Task)(void *arguments, long from, long to);
void share(uint32_t count, Task task, void *arguments);     /* 0..count in parts, on all threads */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define AHEAD 2048      /* bytes fetched before they are needed; more than half a page makes it slower than none */
#define VECTORS 2       /* rows up to which vectors are quicker than AMX */

INLINE __m512 load(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

INLINE void store(bf16 *p, __m512 v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v)); }

INLINE __m512i pair(const void *p) {        /* 4 bytes in every lane */
    int32_t bits;
    memcpy(&bits, p, 4);
    return _mm512_set1_epi32(bits);
}

/* 0, or NaN if one of the n values of x is NaN or Inf: whole numbers cannot say so */
INLINE float not_finite(const bf16 *x, long n) {
    __m512 mark = _mm512_setzero_ps();
    for (long i = 0; i < n; i += 16) mark = _mm512_fmadd_ps(load(x + i), _mm512_setzero_ps(), mark);
    return _mm512_reduce_add_ps(mark);
}

INLINE __m512 exponential(__m512 x) {       /* 2^n * e^r, |r| <= ln 2 / 2, Taylor's polynomial: 2e-7 relative */
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);       /* in this order: NaN stays NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1 / 720.0f);
    const float factors[] = {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1, 1};
    UNROLL for (int i = 0; i < 6; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(p, n);
}

/* with m and z_count as constants: CALL(M) for m rows, TILE(M, Z) for z_count registers */
#define WIDTHS(M) (z_count == 4 ? TILE(M, 4) : z_count == 2 ? TILE(M, 2) : TILE(M, 1))
#define ROWS(CALL) switch (m) { \
    case 1: CALL(1); break; case 2: CALL(2); break; case 3: CALL(3); break; case 4: CALL(4); break; \
    case 5: CALL(5); break; case 6: CALL(6); break; case 7: CALL(7); break; default: CALL(8); }

/* registers of a tile: as many as a block has and 32 registers allow */
INLINE int width(long block, int m) { return block % 64 == 0 && m <= 4 ? 4 : block % 32 == 0 ? 2 : 1; }

/* AMX: 8 rows for the price of one. tmm0..3: sums of 16 columns each, 4: 64 bytes of k of the rows of x, 5: of the columns. */
#ifdef __AMX_INT8__
#define AMX 1

INLINE void begin_tiles(int m) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {.palette = 1};
    for (int i = 0; i < 6; i++) { tiles.bytes[i] = 64; tiles.rows[i] = i < 5 ? m : 16; }
    __asm__ volatile("ldtilecfg %0" :: "m"(tiles));     /* GCC 12's intrinsic says that it reads 8 of the 64 bytes */
}

#define AMX_COLUMNS(DOT, T) _tile_loadd(5, tile + 64 * T, step_); DOT(T, 4, 5)

/* sums [4][8][16] of 32 or 64 columns; step: bytes from 4 bytes of k to the next, row: of a row of x, a multiple of 64 */
#define AMX_TILE(DOT, w, step, x, row, sums) do { \
    const long step_ = step; \
    const int wide = step_ == 256; \
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); \
    for (long at = 0; at < (row); at += 64) { \
        const char *tile = (w) + at / 4 * step_; \
        for (long i = 0; i < 16 * step_; i += 64) _mm_prefetch(tile + i + AHEAD, _MM_HINT_T0); \
        _tile_loadd(4, (const char *)(x) + at, row); \
        AMX_COLUMNS(DOT, 0); AMX_COLUMNS(DOT, 1); \
        if (wide) { AMX_COLUMNS(DOT, 2); AMX_COLUMNS(DOT, 3); } \
    } \
    _tile_stored(0, sums[0], 64); _tile_stored(1, sums[1], 64); \
    if (wide) { _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64); } \
} while (0)
#else
#define AMX 0
#define begin_tiles(m) ((void)(m))
#define _tile_release() ((void)0)
#define AMX_TILE(...) ((void)0)
#endif
