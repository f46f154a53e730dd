#include "common.h"

INLINE void rotate(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *y, long d) {
    for (long i = 0; i < d / 2; i += 16) {
        __m512 a = load(x + i), b = load(x + d / 2 + i);
        store(y + i, _mm512_fnmadd_ps(b, load(sin + i), _mm512_mul_ps(a, load(cos + i))));
        store(y + d / 2 + i, _mm512_fmadd_ps(a, load(sin + d / 2 + i), _mm512_mul_ps(b, load(cos + d / 2 + i))));
    }
}

/* Rotates the first `heads` heads of every row of qkv [m, width] to its position, in place; cos, sin [m, d]. */
void apply_rope(bf16 *qkv, const bf16 *cos, const bf16 *sin, int m, long width, long heads, long d) {
    #pragma omp parallel for if (m > 8)
    for (long row = 0; row < m; row++)
        for (long h = 0; h < heads; h++)
            rotate(qkv + row * width + h * d, cos + row * d, sin + row * d, qkv + row * width + h * d, d);
}

INLINE const bf16 *cached(const bf16 *cache, const Step *s, long row, long kv, long t) {
    return cache + ((s->table[row * s->table_width + t / s->block] * s->block + t % s->block) * s->kv_heads + kv) * s->d;
}

INLINE void softmax(float *p, long length, float scale) {
    __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
    for (long t = length; t % 16; t++) p[t] = -INFINITY;
    for (long t = 0; t < length; t += 16) largest = _mm512_max_ps(largest, _mm512_loadu_ps(p + t));
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (long t = 0; t < length; t += 16) {
        __m512 e = exponential(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(p + t), top), factor));
        if (t + 16 > length) e = _mm512_maskz_mov_ps((1u << (length - t)) - 1, e);
        _mm512_storeu_ps(p + t, e);
        sum = _mm512_add_ps(sum, e);
    }
    __m512 share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
    for (long t = 0; t < length; t += 16) _mm512_storeu_ps(p + t, _mm512_mul_ps(_mm512_loadu_ps(p + t), share));
}

/* G heads of one group and one sequence; p [G, room] */
INLINE void group(const int G, const bf16 *q, const bf16 *keys, const bf16 *values, const Step *s, long row, long kv,
                  float *p, long room, bf16 *out) {
    long length = s->lengths[row], d = s->d;
    for (long t = 0; t < length; t++) {
        const bf16 *key = cached(keys, s, row, kv, t), *value = cached(values, s, row, kv, t);
        const bf16 *later = cached(keys, s, row, kv, t + 8 < length ? t + 8 : t);
        __m512 dot[G];
        UNROLL for (int g = 0; g < G; g++) dot[g] = _mm512_setzero_ps();
        for (long i = 0; i < d; i += 32) {
            _mm_prefetch(later + i, _MM_HINT_T0);
            _mm_prefetch(value + i, _MM_HINT_T1);       /* read when the shares are known */
            __m512bh part = (__m512bh)_mm512_loadu_si512(key + i);
            UNROLL for (int g = 0; g < G; g++)
                dot[g] = _mm512_dpbf16_ps(dot[g], (__m512bh)_mm512_loadu_si512(q + g * d + i), part);
        }
        UNROLL for (int g = 0; g < G; g++) p[g * room + t] = _mm512_reduce_add_ps(dot[g]);
    }
    for (int g = 0; g < G; g++) softmax(p + g * room, length, 1 / sqrtf(d));
    for (long i = 0; i < d; i += 32) {
        __m512 mixed[G][2];
        UNROLL for (int g = 0; g < G; g++) mixed[g][0] = mixed[g][1] = _mm512_setzero_ps();
        for (long t = 0; t < length; t++) {
            const bf16 *value = cached(values, s, row, kv, t) + i;
            __m512 first = load(value), second = load(value + 16);
            UNROLL for (int g = 0; g < G; g++) {
                __m512 share = _mm512_set1_ps(p[g * room + t]);
                mixed[g][0] = _mm512_fmadd_ps(share, first, mixed[g][0]);
                mixed[g][1] = _mm512_fmadd_ps(share, second, mixed[g][1]);
            }
        }
        UNROLL for (int g = 0; g < G; g++) {
            store(out + g * d + i, mixed[g][0]);
            store(out + g * d + i + 16, mixed[g][1]);
        }
    }
}

typedef struct {
    const Step *s;
    const bf16 *q, *keys, *values;
    float *p;               /* [rows, heads, room]: shares of the tokens */
    long room, tiles;       /* tiles: of up to 4 heads, of each head of keys */
    bf16 *out;
} Attention;

/* by row, head of keys and tile */
static void attend_tiles(void *arguments, long from, long to) {
    const Attention *own = arguments;
    const Step *s = own->s;
    const long d = s->d, per_kv = s->heads / s->kv_heads, tiles = own->tiles, room = own->room;
    for (long task = from; task < to; task++) {
        long row = task / (s->kv_heads * tiles), kv = task / tiles % s->kv_heads, first = task % tiles * 4;
        long at = row * s->heads + kv * per_kv + first;
        #define CALL(G) \
            group(G, own->q + at * d, own->keys, own->values, s, row, kv, own->p + at * room, room, own->out + at * d)
        switch (per_kv - first) {
            case 1: CALL(1); break; case 2: CALL(2); break; case 3: CALL(3); break; default: CALL(4);
        }
        #undef CALL
    }
}

/* One token of each sequence: rotates q and k to their positions, writes k and v into the cache, attends. out [rows, heads, d] */
void attend(const bf16 *qkv, bf16 *keys, bf16 *values, const Step *s, bf16 *out) {
    const long d = s->d, tiles = (s->heads / s->kv_heads + 3) / 4;
    long room = 0;
    for (long row = 0; row < s->rows; row++) if (s->lengths[row] > room) room = s->lengths[row];
    room = (room + 15) / 16 * 16;
    bf16 *q = scratch(ROTATED, s->rows * s->heads * d * sizeof(bf16));
    float *p = scratch(SHARES, s->rows * s->heads * room * sizeof(float));
    for (long row = 0; row < s->rows; row++) {
        const bf16 *own = qkv + row * (s->heads + 2 * s->kv_heads) * d, *cos = s->cos + row * d, *sin = s->sin + row * d;
        for (long h = 0; h < s->heads; h++, own += d) rotate(own, cos, sin, q + (row * s->heads + h) * d, d);
        bf16 *key = keys + s->slots[row] * s->kv_heads * d, *value = values + s->slots[row] * s->kv_heads * d;
        for (long h = 0; h < s->kv_heads; h++, own += d) rotate(own, cos, sin, key + h * d, d);
        memcpy(value, own, s->kv_heads * d * sizeof(bf16));
    }
    Attention own = {s, q, keys, values, p, room, tiles, out};
    share(s->rows * s->kv_heads * tiles, attend_tiles, &own);
}
