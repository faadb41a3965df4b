/* Products of integers for PD_INT8: exact, so any order gives the same bits.
 *
 * Prepared activations are unsigned, q + 128, as the instruction that multiplies four bytes at
 * once wants them; the packed corrections take the surplus away.  Sums wrap around 2^32 on the
 * way and are right at the end.
 */
#include "linear_parts.h"

/* Lane by lane: sum + four products of the unsigned bytes of x and the signed bytes of w. */
INLINE integers add_products(integers sum, int32_t x, integers w) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__)
    return (integers)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)w);
#elif defined(__AVX512F__) && defined(__AVX512BW__)
    /* in 16 bits without saturation: even and odd bytes apart */
    __m512i values = _mm512_set1_epi32(x), low = _mm512_set1_epi16(0xff);
    __m512i even = _mm512_madd_epi16(_mm512_and_si512(values, low),
                                     _mm512_srai_epi16(_mm512_slli_epi16((__m512i)w, 8), 8));
    __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(values, 8), _mm512_srai_epi16((__m512i)w, 8));
    return (integers)_mm512_add_epi32((__m512i)sum, _mm512_add_epi32(even, odd));
#elif defined(__AVXVNNI__) && defined(__AVX2__) && defined(__FMA__)
    return (integers)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(x), (__m256i)w);
#elif defined(__AVX2__) && defined(__FMA__)
    __m256i values = _mm256_set1_epi32(x), low = _mm256_set1_epi16(0xff);
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(values, low),
                                     _mm256_srai_epi16(_mm256_slli_epi16((__m256i)w, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(values, 8), _mm256_srai_epi16((__m256i)w, 8));
    return (integers)_mm256_add_epi32((__m256i)sum, _mm256_add_epi32(even, odd));
#else
    for (int byte = 0; byte < 4; byte++)
        sum += (w << (24 - 8 * byte) >> 24) * (int32_t)((uint32_t)x >> 8 * byte & 0xff);
    return sum;
#endif
}

/* sums [rows][PANEL] = x . w, over unsigned x in tiles; `at` are the rows' first bytes.  `lines` of
 * `ahead` per step are asked for meanwhile. */
INLINE void multiply(int rows, const char *const *at, const char *w, int k_tiles, int32_t *sums,
                     const char *ahead, int lines) {
    integers kept[ROWS_MAX][VECTORS];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int part = 0; part < VECTORS; part++) kept[row][part] = (integers){0};
    for (int tile = 0; tile < k_tiles; tile++)
        for (int byte = 0; byte < TILE_BYTES; byte += 4) {
            integers weights[VECTORS];
            for (int line = 0; line < lines; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 8
            for (int part = 0; part < VECTORS; part++)
                weights[part] = load_integers(w + part * LANES * 4);
            w += PANEL * 4;
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) {
                int32_t values;
                memcpy(&values, at[row] + (size_t)tile * TILE_ROWS * TILE_BYTES + byte, 4);
#pragma GCC unroll 8
                for (int part = 0; part < VECTORS; part++)
                    kept[row][part] = add_products(kept[row][part], values, weights[part]);
            }
        }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) memcpy(sums + row * PANEL, kept[row], sizeof kept[row]);
}

static void multiply_rows(int rows, const char *const *at, const char *w, int k_tiles,
                          int32_t *sums, const char *ahead, int lines) {
    switch (rows) {
    case 1: multiply(1, at, w, k_tiles, sums, ahead, lines); break;
    case 2: multiply(2, at, w, k_tiles, sums, ahead, lines); break;
    case 3: multiply(3, at, w, k_tiles, sums, ahead, lines); break;
    case 4: multiply(4, at, w, k_tiles, sums, ahead, lines); break;
    case 5: multiply(5, at, w, k_tiles, sums, ahead, lines); break;
    default: multiply(ROWS_MAX, at, w, k_tiles, sums, ahead, lines);
    }
}

void pd_run_integers(const pd_linear *w, const void *prepared, int rows, float *y,
                     int64_t y_stride, int adds, int first, int stop) {
    int32_t sums[ROWS_MAX * PANEL] __attribute__((aligned(64)));
    int k_tiles = pd_k_tiles(PD_INT8, w->in);
    int row_block = pd_row_block(w, rows, 1);
    size_t panel_bytes = (size_t)k_tiles * TILE_BYTES * PANEL;
    const float *scales = pd_row_scales(prepared, k_tiles, rows);
    const int32_t *surplus =
        (const int32_t *)((const char *)w->packed + (size_t)pd_panels(w) * panel_bytes);
    for (int index = first; index < stop; index++) {
        pd_item item = pd_item_at(w, rows, row_block, index);
        const char *panel = (const char *)w->packed + (size_t)item.panel * panel_bytes;
        int groups = pd_ceil(item.row_count, ROWS_MAX);
        /* the next panel, over all groups */
        int lines = pd_ceil(PANEL * 4 / 64, groups);
        const char *ahead = panel + panel_bytes;
        for (int group = 0; group < groups; group++) {
            int row_first = item.row + item.row_count * group / groups;
            int count = item.row + item.row_count * (group + 1) / groups - row_first;
            const char *at[ROWS_MAX];
            for (int row = 0; row < count; row++)
                at[row] = pd_tile_row((void *)prepared, k_tiles, row_first + row);
            multiply_rows(count, at, panel, k_tiles, sums, ahead,
                          group * lines < PANEL * 4 / 64 ? lines : 0);
            ahead += (size_t)k_tiles * TILE_BYTES / 4 * lines * 64;
            for (int row = 0; row < count; row++) {
                for (int out = 0; out < PANEL; out++)
                    sums[row * PANEL + out] -= surplus[item.panel * PANEL + out];
                pd_finish_integers(w, item.panel, sums + row * PANEL, scales[row_first + row],
                                   y + (row_first + row) * y_stride, adds);
            }
        }
    }
}
