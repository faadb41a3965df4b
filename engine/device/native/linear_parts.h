/* What the files of the linear layers share; linear.h is for everybody else.
 *
 * Packed weights are panels of PANEL outputs, zeros beyond the last, each read front to back:
 *
 *   PD_F32   [panel][in][PANEL]          float
 *   PD_BF16  [panel][in / 2][PANEL][2]   bfloat16, `in` filled up with zeros to whole tiles
 *   PD_INT8  [panel][in / 4][PANEL][4]   int8, likewise; then [panel][PANEL] int32: what to take
 *            from a sum over unsigned activations, 128 times the sum of an output's weights
 *
 * A tile is 16 rows by TILE_BYTES of the reduction, which suits AMX and costs others nothing.
 */
#ifndef PDSERVE_NATIVE_LINEAR_PARTS_H
#define PDSERVE_NATIVE_LINEAR_PARTS_H

#include "lanes.h"
#include "linear.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define PD_TILES 1
#else
#define PD_TILES 0
#endif

/* A block of rows stays in the second cache while all panels pass by: ROW_BLOCK rows of floats, or
 * ROW_BLOCK_BYTES in tiles.  K_BLOCK steps of a panel stay in the first cache while those rows
 * pass by.  None of them decides an order of additions. */
enum { TILE_ROWS = 16, TILE_BYTES = 64, ROW_BLOCK = 128, ROW_BLOCK_BYTES = 1 << 20, K_BLOCK = 128 };

/* Rows by outputs for one thread to compute. */
typedef struct {
    int row, row_count, panel;
} pd_item;

INLINE int pd_ceil(int value, int unit) { return (value + unit - 1) / unit; }
INLINE int pd_panels(const pd_linear *w) { return pd_ceil(w->out, PANEL); }

/* Tiles along the reduction, for the kinds that have them. */
INLINE int pd_k_tiles(int kind, int in) {
    return pd_ceil(in, kind == PD_INT8 ? TILE_BYTES : TILE_BYTES / 2);
}

/* Rows of a block, whole pairs of tiles; blocks are of one size, but for the last. */
INLINE int pd_row_block(const pd_linear *w, int rows, int in_tiles) {
    int most = ROW_BLOCK;
    if (in_tiles) {
        int pair_bytes = pd_k_tiles(w->kind, w->in) * 2 * TILE_ROWS * TILE_BYTES;
        most = pair_bytes < ROW_BLOCK_BYTES ? ROW_BLOCK_BYTES / pair_bytes * 2 * TILE_ROWS
                                            : 2 * TILE_ROWS;
    }
    int blocks = pd_ceil(rows, most);
    return pd_ceil(pd_ceil(rows, blocks), 2 * TILE_ROWS) * 2 * TILE_ROWS;
}

/* Row blocks by panels, in this order: the items of a layer are shared out among the threads. */
INLINE pd_item pd_item_at(const pd_linear *w, int rows, int row_block, int index) {
    int panels = pd_panels(w);
    int row = index / panels * row_block;
    int left = rows - row;
    return (pd_item){row, left < row_block ? left : row_block, index % panels};
}

/* Where the items of `thread` begin, and those of the thread before end. */
INLINE int pd_item_first(int count, int thread, int threads) {
    return (int)((int64_t)count * thread / threads);
}

/* Prepared rows in tiles: [row / 16][k tile][16][TILE_BYTES], behind them one scale per row. */
INLINE char *pd_tile_row(void *prepared, int k_tiles, int row) {
    return (char *)prepared + (size_t)(row / TILE_ROWS) * k_tiles * TILE_ROWS * TILE_BYTES +
           (size_t)(row % TILE_ROWS) * TILE_BYTES;
}
INLINE const float *pd_row_scales(const void *prepared, int k_tiles, int rows) {
    return (const float *)((const char *)prepared +
                           (size_t)pd_ceil(rows, TILE_ROWS) * k_tiles * TILE_ROWS * TILE_BYTES);
}

INLINE uint16_t pd_round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* sums [PANEL] become a panel's part of a row of y; scale is the row's. */
void pd_finish_floats(const pd_linear *w, int panel, const float *restrict sums,
                      float *restrict y, int adds);
void pd_finish_integers(const pd_linear *w, int panel, const int32_t *restrict sums, float scale,
                        float *restrict y, int adds);

/* Compute items `first` to `stop`, each in its own way. */
void pd_run_floats(const pd_linear *w, const float *x, int64_t x_stride, int rows, float *y,
                   int64_t y_stride, int adds, int first, int stop);
void pd_run_integers(const pd_linear *w, const void *prepared, int rows, float *y,
                     int64_t y_stride, int adds, int first, int stop);
#if PD_TILES
int pd_tiles_allowed(void);
void pd_run_tiles(const pd_linear *w, const void *prepared, int rows, float *y, int64_t y_stride,
                  int adds, int first, int stop);
#else
INLINE int pd_tiles_allowed(void) { return 0; }
#endif

#endif
