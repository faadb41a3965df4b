/* Products of floats, for PD_F32 and for PD_BF16 where there are no tiles.
 *
 * One order for every sum: k from 0 up, one fused multiply-add each.  Sums rest in memory between
 * blocks of k, which keeps their bits; bfloat16 weights are widened block by block.
 */
#include "linear_parts.h"

/* sums [rows][PANEL] += x [rows][steps] . w [steps][PANEL]; `lines` of `ahead` per step are asked
 * for meanwhile. */
INLINE void accumulate(int rows, const float *x, int64_t x_stride, const float *w, int steps,
                       float *sums, const char *ahead, int lines) {
    floats kept[ROWS_MAX][VECTORS];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int part = 0; part < VECTORS; part++)
            kept[row][part] = load_floats(sums + row * PANEL + part * LANES);
    for (int k = 0; k < steps; k++) {
        floats weights[VECTORS];
        for (int line = 0; line < lines; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 8
        for (int part = 0; part < VECTORS; part++)
            weights[part] = load_floats(w + (size_t)k * PANEL + part * LANES);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            floats value = splat(x[row * x_stride + k]);
#pragma GCC unroll 8
            for (int part = 0; part < VECTORS; part++)
                kept[row][part] = multiply_add(value, weights[part], kept[row][part]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int part = 0; part < VECTORS; part++)
            store_floats(sums + row * PANEL + part * LANES, kept[row][part]);
}

static void accumulate_rows(int rows, const float *x, int64_t x_stride, const float *w, int steps,
                            float *sums, const char *ahead, int lines) {
    switch (rows) {
    case 1: accumulate(1, x, x_stride, w, steps, sums, ahead, lines); break;
    case 2: accumulate(2, x, x_stride, w, steps, sums, ahead, lines); break;
    case 3: accumulate(3, x, x_stride, w, steps, sums, ahead, lines); break;
    case 4: accumulate(4, x, x_stride, w, steps, sums, ahead, lines); break;
    case 5: accumulate(5, x, x_stride, w, steps, sums, ahead, lines); break;
    default: accumulate(ROWS_MAX, x, x_stride, w, steps, sums, ahead, lines);
    }
}

/* pairs [steps / 2][PANEL][2] become floats [steps][PANEL]; an odd last step is done whole. */
static void widen(const uint16_t *pairs, int steps, float *block) {
    for (int k = 0; k < steps; k += 2)
#pragma GCC unroll 8
        for (int part = 0; part < VECTORS; part++) {
            integers both = load_integers(pairs + (size_t)k * PANEL + part * LANES * 2);
            store_floats(block + (size_t)k * PANEL + part * LANES, (floats)(both << 16));
            store_floats(block + (size_t)(k + 1) * PANEL + part * LANES,
                         (floats)(both & (int32_t)0xffff0000));
        }
}

void pd_run_floats(const pd_linear *w, const float *x, int64_t x_stride, int rows, float *y,
                   int64_t y_stride, int adds, int first, int stop) {
    float sums[ROW_BLOCK * PANEL] __attribute__((aligned(64)));
    float widened[K_BLOCK * PANEL] __attribute__((aligned(64)));
    size_t k_padded = w->kind == PD_F32 ? (size_t)w->in
                                        : (size_t)pd_k_tiles(PD_BF16, w->in) * (TILE_BYTES / 2);
    int row_block = pd_row_block(w, rows, 0);
    int element = w->kind == PD_F32 ? 4 : 2;
    for (int index = first; index < stop; index++) {
        pd_item item = pd_item_at(w, rows, row_block, index);
        int groups = pd_ceil(item.row_count, ROWS_MAX);
        memset(sums, 0, sizeof(float) * PANEL * (size_t)item.row_count);
        for (int k = 0; k < w->in; k += K_BLOCK) {
            int steps = w->in - k < K_BLOCK ? w->in - k : K_BLOCK;
            size_t at = ((size_t)item.panel * k_padded + (size_t)k) * PANEL;
            const float *block = (const float *)w->packed + at;
            if (w->kind == PD_BF16) {
                widen((const uint16_t *)w->packed + at, steps, widened);
                block = widened;
            }
            /* the next block, over all groups */
            const char *ahead = (const char *)w->packed + (at + (size_t)steps * PANEL) * element;
            int lines = pd_ceil(PANEL * element / 64, groups);
            for (int group = 0; group < groups; group++) {
                int row = item.row_count * group / groups;
                int row_stop = item.row_count * (group + 1) / groups;
                accumulate_rows(row_stop - row, x + (item.row + row) * x_stride + k, x_stride,
                                block, steps, sums + row * PANEL, ahead,
                                group * lines < PANEL * element / 64 ? lines : 0);
                ahead += (size_t)steps * lines * 64;
            }
        }
        for (int row = 0; row < item.row_count; row++)
            pd_finish_floats(w, item.panel, sums + row * PANEL,
                             y + (item.row + row) * y_stride, adds);
    }
}
