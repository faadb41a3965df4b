/* Products in tiles (AMX), for PD_BF16 and PD_INT8.
 *
 * A tile is always 16 rows by 64 bytes, whatever the number of rows, and tiles follow one another
 * along the reduction: what a row is multiplied with, and in what order, does not depend on the
 * rows beside it.  The hardware's order of additions within a tile is its own.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "linear_parts.h"

#if PD_TILES
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { TILE = TILE_ROWS * TILE_BYTES, PANEL_TILES = PANEL / 16, APART = PANEL * 4 };

_Static_assert(PANEL == 64, "a panel is four tiles here");

/* The kernel keeps the tiles' state only for processes that ask. */
int pd_tiles_allowed(void) {
    static _Atomic int known; /* 0 not asked, 1 allowed, 2 refused; asking twice is harmless */
    int state = atomic_load_explicit(&known, memory_order_relaxed);
    if (state == 0) {
        enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
        state = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 ? 1 : 2;
        atomic_store_explicit(&known, state, memory_order_relaxed);
    }
    return state == 1;
}

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* Eight tiles of one shape; the state is the thread's own. */
static void configure(void) {
    tile_shapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = TILE_BYTES;
        shapes.rows[tile] = TILE_ROWS;
    }
    _tile_loadconfig(&shapes);
}

/* The numbers of tiles have to be literal. */
#define MULTIPLY(kind, sum, a, b)                    \
    do {                                             \
        if ((kind) == PD_BF16) _tile_dpbf16ps(sum, a, b); \
        else _tile_dpbssd(sum, a, b);                \
    } while (0)

INLINE void clear_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Memory to ask for while computing: so many lines per tile of the reduction. */
typedef struct {
    const char *at;
    int lines;
} pd_ahead;

INLINE void ask(pd_ahead *ahead) {
    for (int line = 0; line < ahead->lines; line++, ahead->at += 64)
        __builtin_prefetch(ahead->at, 0, 2);
}

/* sums [16][PANEL] = 16 rows . a panel */
INLINE void multiply_one(int kind, const char *x, const char *w, int k_tiles, char *sums,
                         pd_ahead *ahead) {
    clear_sums();
    for (int k = 0; k < k_tiles; k++, x += TILE, w += PANEL_TILES * TILE) {
        ask(ahead);
        _tile_loadd(4, x, TILE_BYTES);
        _tile_loadd(5, w, APART);
        MULTIPLY(kind, 0, 4, 5);
        _tile_loadd(6, w + 64, APART);
        MULTIPLY(kind, 1, 4, 6);
        _tile_loadd(7, w + 128, APART);
        MULTIPLY(kind, 2, 4, 7);
        _tile_loadd(5, w + 192, APART);
        MULTIPLY(kind, 3, 4, 5);
    }
    _tile_stored(0, sums, APART);
    _tile_stored(1, sums + 64, APART);
    _tile_stored(2, sums + 128, APART);
    _tile_stored(3, sums + 192, APART);
}

/* sums [32][PANEL], half a panel at a time: 32 rows . 32 outputs */
INLINE void multiply_two(int kind, const char *x, const char *w, int k_tiles, char *sums,
                         pd_ahead *ahead) {
    const char *below = x + (size_t)k_tiles * TILE;
    clear_sums();
    for (int k = 0; k < k_tiles; k++, x += TILE, below += TILE, w += PANEL_TILES * TILE) {
        ask(ahead);
        _tile_loadd(4, x, TILE_BYTES);
        _tile_loadd(6, w, APART);
        MULTIPLY(kind, 0, 4, 6);
        _tile_loadd(7, w + 64, APART);
        MULTIPLY(kind, 1, 4, 7);
        _tile_loadd(5, below, TILE_BYTES);
        MULTIPLY(kind, 2, 5, 6);
        MULTIPLY(kind, 3, 5, 7);
    }
    _tile_stored(0, sums, APART);
    _tile_stored(1, sums + 64, APART);
    _tile_stored(2, sums + TILE_ROWS * APART, APART);
    _tile_stored(3, sums + TILE_ROWS * APART + 64, APART);
}

INLINE void run_item(int kind, const pd_linear *w, const void *prepared, int rows, pd_item item,
                     float *y, int64_t y_stride, int adds) {
    char sums[2 * TILE_ROWS * APART] __attribute__((aligned(64)));
    int k_tiles = pd_k_tiles(kind, w->in);
    const char *panel =
        (const char *)w->packed + (size_t)item.panel * k_tiles * PANEL_TILES * TILE;
    const float *scales = pd_row_scales(prepared, k_tiles, rows);
    /* the next panel, over all passes */
    int passes = item.row_count > TILE_ROWS ? pd_ceil(item.row_count, TILE_ROWS) : 1;
    int lines = PANEL_TILES * TILE / 64;
    pd_ahead ahead = {panel + (size_t)k_tiles * PANEL_TILES * TILE, pd_ceil(lines, passes)};
    for (int done = 0; done < item.row_count; done += 2 * TILE_ROWS) {
        int row_first = item.row + done;
        int left = item.row_count - done;
        int count = left < 2 * TILE_ROWS ? left : 2 * TILE_ROWS;
        const char *x = pd_tile_row((void *)prepared, k_tiles, row_first);
        if (count > TILE_ROWS) {
            multiply_two(kind, x, panel, k_tiles, sums, &ahead);
            multiply_two(kind, x, panel + 128, k_tiles, sums + 128, &ahead);
        } else {
            multiply_one(kind, x, panel, k_tiles, sums, &ahead);
        }
        for (int row = 0; row < count; row++) {
            float *to = y + (row_first + row) * y_stride;
            const char *from = sums + row * APART;
            if (kind == PD_BF16)
                pd_finish_floats(w, item.panel, (const float *)from, to, adds);
            else
                pd_finish_integers(w, item.panel, (const int32_t *)from, scales[row_first + row],
                                   to, adds);
        }
    }
}

void pd_run_tiles(const pd_linear *w, const void *prepared, int rows, float *y, int64_t y_stride,
                  int adds, int first, int stop) {
    int row_block = pd_row_block(w, rows, 1);
    configure();
    for (int index = first; index < stop; index++) {
        pd_item item = pd_item_at(w, rows, row_block, index);
        if (w->kind == PD_BF16)
            run_item(PD_BF16, w, prepared, rows, item, y, y_stride, adds);
        else
            run_item(PD_INT8, w, prepared, rows, item, y, y_stride, adds);
    }
    _tile_release(); /* or every switch of threads would save eight kilobytes */
}
#else
typedef int pd_no_tiles; /* a file of C is not empty */
#endif
