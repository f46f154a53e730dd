#include "common.h"

/* sum = x + residual (no residual: x alone, and no sum); y = sum / rms(sum) * weight + bias; y may be x */
void add_rms_norm(const bf16 *x, const bf16 *residual, const Norm *norm, bf16 *sum, bf16 *y, int m, long width, float eps) {
    #pragma omp parallel for if (m > 8)
    for (long row = 0; row < m; row++) {
        const bf16 *from = x + row * width;
        if (residual) {
            for (long i = row * width; i < (row + 1) * width; i += 16)
                store(sum + i, _mm512_add_ps(load(x + i), load(residual + i)));
            from = sum + row * width;
        }
        __m512 squares = _mm512_setzero_ps();
        for (long i = 0; i < width; i += 16) { __m512 v = load(from + i); squares = _mm512_fmadd_ps(v, v, squares); }
        __m512 factor = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / width + eps));
        for (long i = 0; i < width; i += 16) {
            bf16 *to = y + row * width + i;
            store(to, _mm512_mul_ps(_mm512_mul_ps(load(from + i), factor), load(norm->weight + i)));
            if (norm->bias) store(to, _mm512_add_ps(load(to), load(norm->bias + i)));
        }
    }
}

/* x [m, 2 * width], gate first -> y [m, width] */
void swiglu(const bf16 *x, bf16 *y, int m, long width) {
    #pragma omp parallel for if (m > 8)
    for (long row = 0; row < m; row++)
        for (long i = 0; i < width; i += 16) {
            const bf16 *from = x + 2 * row * width + i;
            __m512 gate = load(from), one = _mm512_set1_ps(1);
            __m512 down = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
            store(y + row * width + i, _mm512_mul_ps(_mm512_div_ps(gate, down), load(from + width)));
        }
}

typedef struct {
    Norm attention_norm, mlp_norm;
    Norm attention_post_norm, mlp_post_norm;    /* of a branch's output; weight NULL where there is none */
    Matmul qkv, out, up, down;
    bf16 *keys, *values;            /* its caches */
} Layer;

/* A branch's output [m, width] joins the stream x, normalised by `post` where there is one; y: x normalised by `norm`. */
static void add_branch(bf16 *branch, const Norm *post, const Norm *norm, bf16 *x, bf16 *y, int m, long width, float eps) {
    if (post->weight) add_rms_norm(branch, NULL, post, NULL, branch, m, width, eps);
    add_rms_norm(branch, x, norm, x, y, m, width, eps);
}

/* Pre-norm layers with swiglu, one token of each sequence. x [rows, hidden]: the residual stream, also afterwards;
 * y: normalised by `last`. */
void layers(const Layer *all, long count, const Norm *last, const Step *s, bf16 *x, bf16 *y, float eps) {
    const long m = s->rows, hidden = all->qkv.k, ffn = all->down.k;
    const long widest = all->up.n > all->qkv.n ? all->up.n : all->qkv.n;
    bf16 *normed = scratch(NORMED, m * hidden * sizeof(bf16)), *wide = scratch(WIDE, m * widest * sizeof(bf16));
    bf16 *mixed = scratch(MIXED, m * all->out.k * sizeof(bf16)), *gated = scratch(GATED, m * ffn * sizeof(bf16));
    add_rms_norm(x, NULL, &all->attention_norm, NULL, normed, m, hidden, eps);
    for (const Layer *l = all; l < all + count; l++) {
        matmul(&l->qkv, normed, wide, m);
        attend(wide, l->keys, l->values, s, mixed);
        matmul(&l->out, mixed, wide, m);
        add_branch(wide, &l->attention_post_norm, &l->mlp_norm, x, normed, m, hidden, eps);
        matmul(&l->up, normed, wide, m);
        swiglu(wide, gated, m, ffn);
        matmul(&l->down, gated, wide, m);
        const int ends = l + 1 == all + count;
        const Norm *next = ends ? last : &l[1].attention_norm;
        add_branch(wide, &l->mlp_post_norm, next, x, ends ? y : normed, m, hidden, eps);
    }
}
