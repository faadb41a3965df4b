/* Packing weights, preparing activations, and who computes what. */
#include <float.h>

#include "linear_parts.h"

typedef union {
    float value;
    uint32_t bits;
} pd_word;

/* Values times `factor` round to integers in -127..127; `scale` undoes it.  A row with a NaN or an
 * infinity has a scale of NaN, so that it gives NaN whatever its integers, and no other row does;
 * one too small for a factor is zeros. */
typedef struct {
    float factor, scale;
} pd_range;

static pd_range range_of(const float *values, int count) {
    uint32_t most = 0;
    for (int index = 0; index < count; index++) {
        uint32_t bits;
        memcpy(&bits, values + index, 4);
        bits &= 0x7fffffff; /* magnitudes order like their bits, NaN above infinity above all */
        most = bits > most ? bits : most;
    }
    pd_word word = {.bits = most};
    if (most >= 0x7f800000) return (pd_range){0.0f, NAN};
    float factor = 127.0f / word.value;
    if (factor > FLT_MAX) return (pd_range){0.0f, 0.0f};
    return (pd_range){factor, word.value / 127.0f};
}

/* round(value * factor) to even by adding 1.5 * 2^23, which pushes the fraction out. */
INLINE int8_t quantise(float value, float factor) {
    pd_word word = {.value = value * factor + 12582912.0f};
    return (int8_t)(word.bits & 0xff);
}

static size_t k_bytes(int kind, int in) {
    if (kind == PD_F32) return (size_t)in * sizeof(float);
    return (size_t)pd_k_tiles(kind, in) * TILE_BYTES;
}

size_t pd_packed_bytes(int kind, int in, int out) {
    size_t outs = (size_t)pd_ceil(out, PANEL) * PANEL;
    return outs * k_bytes(kind, in) + (kind == PD_INT8 ? outs * sizeof(int32_t) : 0);
}

void pd_pack(int kind, int in, int out, const float *weights, void *packed, float *scales) {
    size_t panel_bytes = k_bytes(kind, in) * PANEL;
    int32_t *surplus =
        (int32_t *)((char *)packed + (size_t)pd_ceil(out, PANEL) * panel_bytes);
    memset(packed, 0, pd_packed_bytes(kind, in, out));
    for (int row = 0; row < out; row++) {
        const float *from = weights + (size_t)row * (size_t)in;
        char *panel = (char *)packed + (size_t)(row / PANEL) * panel_bytes;
        int lane = row % PANEL;
        if (kind == PD_F32) {
            float *to = (float *)panel + lane;
            for (int k = 0; k < in; k++) to[(size_t)k * PANEL] = from[k];
        } else if (kind == PD_BF16) {
            uint16_t *to = (uint16_t *)panel + lane * 2;
            for (int k = 0; k < in; k++)
                to[(size_t)(k / 2) * PANEL * 2 + k % 2] = pd_round_bf16(from[k]);
        } else {
            int8_t *to = (int8_t *)panel + lane * 4;
            pd_range range = range_of(from, in);
            int32_t sum = 0;
            for (int k = 0; k < in; k++) {
                int8_t value = quantise(from[k], range.factor);
                to[(size_t)(k / 4) * PANEL * 4 + k % 4] = value;
                sum += value;
            }
            scales[row] = range.scale;
            surplus[row] = 128 * sum;
        }
    }
}

size_t pd_prepared_bytes(const pd_linear *w, int rows) {
    if (w->kind == PD_F32) return 0;
    if (w->kind == PD_BF16 && !pd_tiles_allowed())
        return (size_t)rows * (size_t)w->in * sizeof(float);
    size_t whole = (size_t)pd_ceil(rows, TILE_ROWS) * TILE_ROWS;
    return whole * (k_bytes(w->kind, w->in) + sizeof(float));
}

/* A tile's part of a row, or what is left of it.  The count is literal for whole tiles: that makes
 * the loops vectors.  Weights are zeros after the last, but zero times NaN is not: what is there
 * must be a number, which every byte is and not every bfloat16. */
INLINE void round_tile(const float *x, int count, uint16_t *to) {
    for (int step = 0; step < count; step++) to[step] = pd_round_bf16(x[step]);
    for (int step = count; step < TILE_BYTES / 2; step++) to[step] = 0;
}

INLINE void quantise_tile(const float *x, int count, float factor, uint8_t offset, uint8_t *to) {
    for (int step = 0; step < count; step++)
        to[step] = (uint8_t)((uint8_t)quantise(x[step], factor) + offset);
}

static void prepare_bf16(const float *x, int in, uint16_t *to) {
    enum { STEPS = TILE_BYTES / 2, APART = TILE_ROWS * TILE_BYTES / 2 };
    for (; in >= STEPS; in -= STEPS, x += STEPS, to += APART) round_tile(x, STEPS, to);
    if (in) round_tile(x, in, to);
}

/* Gives the row's scale.  offset: 128 where the products want unsigned bytes. */
static float prepare_int8(const float *x, int in, uint8_t *to, uint8_t offset) {
    enum { STEPS = TILE_BYTES, APART = TILE_ROWS * TILE_BYTES };
    pd_range range = range_of(x, in);
    for (; in >= STEPS; in -= STEPS, x += STEPS, to += APART)
        quantise_tile(x, STEPS, range.factor, offset, to);
    if (in) quantise_tile(x, in, range.factor, offset, to);
    return range.scale;
}

void pd_prepare(const pd_linear *w, const float *x, int64_t x_stride, int rows, void *prepared,
                int thread, int threads) {
    if (w->kind == PD_F32) return;
    int tiled = pd_tiles_allowed();
    int k_tiles = pd_k_tiles(w->kind, w->in);
    int stop = pd_item_first(rows, thread + 1, threads);
    for (int row = pd_item_first(rows, thread, threads); row < stop; row++) {
        const float *from = x + row * x_stride;
        char *to = pd_tile_row(prepared, k_tiles, row);
        if (w->kind == PD_INT8) {
            float scale = prepare_int8(from, w->in, (uint8_t *)to, tiled ? 0 : 128);
            ((float *)pd_row_scales(prepared, k_tiles, rows))[row] = scale;
        } else if (tiled) {
            prepare_bf16(from, w->in, (uint16_t *)to);
        } else {
            float *rounded = (float *)prepared + (size_t)row * (size_t)w->in;
            for (int k = 0; k < w->in; k++) {
                pd_word word = {.bits = (uint32_t)pd_round_bf16(from[k]) << 16};
                rounded[k] = word.value;
            }
        }
    }
    /* A last tile's missing rows stay what they were: they are multiplied with the others, each
     * for itself, and thrown away. */
}

void pd_linear_run(const pd_linear *w, const void *prepared, const float *x, int64_t x_stride,
                   int rows, float *y, int64_t y_stride, int adds, int thread, int threads) {
    int in_tiles = w->kind == PD_INT8 || (w->kind == PD_BF16 && pd_tiles_allowed());
    int count = pd_ceil(rows, pd_row_block(w, rows, in_tiles)) * pd_panels(w);
    int first = pd_item_first(count, thread, threads);
    int stop = pd_item_first(count, thread + 1, threads);
    if (first == stop) return;
    if (w->kind == PD_F32) {
        pd_run_floats(w, x, x_stride, rows, y, y_stride, adds, first, stop);
#if PD_TILES
    } else if (pd_tiles_allowed()) {
        pd_run_tiles(w, prepared, rows, y, y_stride, adds, first, stop);
#endif
    } else if (w->kind == PD_BF16) {
        pd_run_floats(w, prepared, w->in, rows, y, y_stride, adds, first, stop);
    } else {
        pd_run_integers(w, prepared, rows, y, y_stride, adds, first, stop);
    }
}

/* y = (adds ? y : 0) + (bias + sum), each + rounding once. */
INLINE void finish(int count, const float *sums, const float *bias, float *y, int adds) {
    if (bias && adds)
        for (int lane = 0; lane < count; lane++) y[lane] += bias[lane] + sums[lane];
    else if (bias)
        for (int lane = 0; lane < count; lane++) y[lane] = bias[lane] + sums[lane];
    else if (adds)
        for (int lane = 0; lane < count; lane++) y[lane] += sums[lane];
    else
        memcpy(y, sums, (size_t)count * sizeof(float));
}

void pd_finish_floats(const pd_linear *w, int panel, const float *restrict sums,
                      float *restrict y, int adds) {
    int out = panel * PANEL;
    const float *restrict bias = w->bias ? w->bias + out : NULL;
    if (w->out - out >= PANEL)
        finish(PANEL, sums, bias, y + out, adds);
    else
        finish(w->out - out, sums, bias, y + out, adds);
}

void pd_finish_integers(const pd_linear *w, int panel, const int32_t *restrict sums, float scale,
                        float *restrict y, int adds) {
    float scaled[PANEL] __attribute__((aligned(64)));
    int out = panel * PANEL;
    if (w->out - out >= PANEL) {
        const float *restrict scales = w->scales + out;
        for (int lane = 0; lane < PANEL; lane++)
            scaled[lane] = (float)sums[lane] * scale * scales[lane];
    } else {
        for (int lane = 0; lane < w->out - out; lane++)
            scaled[lane] = (float)sums[lane] * scale * w->scales[out + lane];
    }
    pd_finish_floats(w, panel, scaled, y, adds);
}

const char *pd_linear_path(int kind) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
#if defined(__AVX512VNNI__)
    const char *integers_path = "vnni";
#else
    const char *integers_path = "avx512";
#endif
    const char *floats_path = "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
#if defined(__AVXVNNI__)
    const char *integers_path = "vnni";
#else
    const char *integers_path = "avx2";
#endif
    const char *floats_path = "avx2";
#elif defined(__ARM_NEON) && defined(__aarch64__)
    const char *integers_path = "portable", *floats_path = "neon";
#else
    const char *integers_path = "portable", *floats_path = "portable";
#endif
    if (kind == PD_F32) return floats_path;
    if (pd_tiles_allowed()) return "amx";
    return kind == PD_INT8 ? integers_path : floats_path;
}
