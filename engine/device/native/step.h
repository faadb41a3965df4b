/* A whole forward pass of a decoder in one call, and what its parts share.
 *
 * The rule that makes it hard: a token's logits, keys and values are bit-equal alone, in a batch,
 * in a chunk of any size, with any number of threads and in any blocks.  So every sum over a row
 * has one order, fixed by the row itself; threads share rows, heads and outputs, never a sum.
 * Vectors have 16 lanes on every processor, and products are added with one rounding, so that the
 * results are the same bits whether the compiler has AVX-512, AVX2 or neither.
 */
#ifndef PDSERVE_NATIVE_STEP_H
#define PDSERVE_NATIVE_STEP_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "linear.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

enum { PD_LANES = 16, PD_TILE = 64 };

typedef struct {
    const pd_linear *qkv, *output, *gate_up, *down;
    const float *input_norm, *mlp_norm;
    const float *q_norm, *k_norm; /* over a head, or both NULL */
    int32_t window;               /* positions a query sees, its own included; 0: all before it */
} pd_layer;

typedef struct {
    int32_t layer_count, hidden, middle, head_count, kv_head_count, head_dim, vocab;
    int32_t block_tokens;
    int32_t embeds_half; /* the embedding's elements are bfloat16, else float32 */
    int32_t keeps_half;  /* the pool's are */
    float epsilon;
    const pd_layer *layers;
    const void *embedding; /* [vocab][hidden] */
    const float *norm;
    const pd_linear *head;
} pd_model;

/* Tokens [start, start + count) of one sequence; its blocks cover them, from the first token on. */
typedef struct {
    int32_t start, count, block_count;
    int32_t logit_count; /* of its last tokens */
} pd_row;

/* One step's input.  tokens and blocks: those of all rows, one after the other. */
typedef struct {
    const pd_model *model;
    char *pool; /* [layer][block][K,V][block_tokens][kv_head][head_dim] */
    int64_t pool_blocks;
    int32_t row_count;
    int32_t position_count; /* rows of the tables */
    const pd_row *rows;
    const int32_t *tokens, *blocks;
    const float *cosine, *sine;  /* [position][head_dim / 2] */
    int32_t (*on_layer)(int32_t); /* or NULL; not 0: stop */
    float *logits;               /* [sum of logit_count][vocab] */
} pd_step_input;

enum { PD_DONE = 0, PD_NO_MEMORY = 1, PD_STOPPED = 2, PD_OUT_OF_RANGE = 3 };

/* Threads that compute together, and their memory.  The helpers run where the first step's caller
 * may run.  One caller at a time. */
typedef struct pd_team pd_team;
pd_team *pd_team_new(int32_t threads); /* NULL: no memory, or no thread to be had */
void pd_team_free(pd_team *team);

int32_t pd_step(pd_team *team, const pd_step_input *input);

/* --- shared by the parts --- */

typedef float pd_vector __attribute__((vector_size(64)));
typedef int32_t pd_integers __attribute__((vector_size(64)));

/* Some queries of one sequence, and the KV heads for which one thread computes them. */
typedef struct {
    int32_t start, count; /* positions */
    int32_t head, head_stop;
    int64_t query;         /* row of the first in qkv */
    int64_t result;        /* and in the result */
    const int32_t *blocks; /* the sequence's */
} pd_span;

size_t pd_attention_scratch_bytes(const pd_model *model);
int32_t pd_span_tokens(const pd_model *model);

/* Attend with a span's queries.  qkv: rows of q, k, v heads, turned; layer: that of the pool;
 * result: rows [head * head_dim]; scratch: one thread's own, aligned to 64 bytes. */
void pd_attend(const pd_model *model, const pd_span *span, int32_t window, const char *layer,
               const float *qkv, float *result, void *scratch);

static inline pd_vector pd_load(const float *from) {
    pd_vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

static inline void pd_store(float *to, pd_vector vector) { memcpy(to, &vector, sizeof vector); }

static inline pd_vector pd_all(float value) {
    return (pd_vector){value, value, value, value, value, value, value, value,
                       value, value, value, value, value, value, value, value};
}

/* The first `count` lanes, zero in the others; reads nothing behind them. */
static inline pd_vector pd_load_some(const float *from, int count) {
    pd_vector vector = pd_all(0);
    memcpy(&vector, from, (size_t)count * sizeof(float));
    return vector;
}

/* a * b + c, rounded once. */
static inline pd_vector pd_fma(pd_vector a, pd_vector b, pd_vector c) {
#if defined(__AVX512F__)
    return (pd_vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    union { pd_vector whole; __m256 half[2]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
    return z.whole;
#else
    for (int i = 0; i < PD_LANES; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

static inline pd_vector pd_select(pd_integers mask, pd_vector yes, pd_vector no) {
    return (pd_vector)((mask & (pd_integers)yes) | (~mask & (pd_integers)no));
}

/* b where either is not a number. */
static inline pd_vector pd_larger(pd_vector a, pd_vector b) {
#if defined(__AVX512F__)
    return (pd_vector)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return pd_select(a > b, a, b);
#endif
}

#define PD_FOLD(vector, combine)                                                                  \
    do {                                                                                          \
        vector = combine(vector, __builtin_shuffle(vector, (pd_integers){8, 9, 10, 11, 12, 13,    \
                                     14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));                           \
        vector = combine(vector, __builtin_shuffle(vector, (pd_integers){4, 5, 6, 7, 0, 1, 2, 3,  \
                                     12, 13, 14, 15, 8, 9, 10, 11}));                             \
        vector = combine(vector, __builtin_shuffle(vector, (pd_integers){2, 3, 0, 1, 6, 7, 4, 5,  \
                                     10, 11, 8, 9, 14, 15, 12, 13}));                             \
        vector = combine(vector, __builtin_shuffle(vector, (pd_integers){1, 0, 3, 2, 5, 4, 7, 6,  \
                                     9, 8, 11, 10, 13, 12, 15, 14}));                             \
    } while (0)

static inline pd_vector pd_plus(pd_vector a, pd_vector b) { return a + b; }

static inline float pd_sum(pd_vector vector) {
    PD_FOLD(vector, pd_plus);
    return vector[0];
}

static inline float pd_largest(pd_vector vector) {
    PD_FOLD(vector, pd_larger);
    return vector[0];
}

/* Two to the power of x <= 127: 0 below -126, else with a relative error below 1e-7.
 * The polynomial is a minimax fit of (2^f - 1) / f on [-1/2, 1/2]. */
static inline pd_vector pd_exp2(pd_vector x) {
    const pd_vector shift = pd_all(12582912.0f); /* its last bit is worth 1 */
    pd_vector shifted = x + shift;
    pd_vector f = x - (shifted - shift);
    pd_vector sum = pd_all(0x1.41fbbap-13f);
    sum = pd_fma(sum, f, pd_all(0x1.5f3e54p-10f));
    sum = pd_fma(sum, f, pd_all(0x1.3b2d4cp-7f));
    sum = pd_fma(sum, f, pd_all(0x1.c6aee8p-5f));
    sum = pd_fma(sum, f, pd_all(0x1.ebfbdcp-3f));
    sum = pd_fma(sum, f, pd_all(0x1.62e430p-1f));
    sum = pd_fma(sum, f, pd_all(1.0f));
    pd_integers power = ((pd_integers)shifted - (pd_integers)shift + 127) << 23;
    return pd_select(x < pd_all(-126.0f), pd_all(0), sum * (pd_vector)power);
}

static inline float pd_widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To bfloat16, ties to even; what is not a number stays so. */
static inline uint16_t pd_narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(value != value ? (bits >> 16) | 0x40 : rounded);
}

#endif
