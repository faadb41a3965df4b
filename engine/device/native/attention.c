/* Attention over the paged pool, read in place through block tables.
 *
 * Keys are met in tiles of PD_TILE consecutive positions, counted from the sequence's start, with
 * a running maximum and sum (Milakov and Gimelshein, 2018).  Per query and head, the order is:
 * a score's products by dimension, a tile's scores by lane, values by position, tiles by position.
 * Queries of a span share the reading of a tile and nothing else.
 *
 * Nothing outside a sequence's own tokens is read, and nothing a query may not see is used: not
 * even times zero, which garbage would survive.
 */
#include "step.h"

/* Rows whose sums fit the registers beside a vector of keys. */
#if defined(__AVX512F__)
enum { ROWS = 6 };
#else
enum { ROWS = 1 };
#endif
enum { FEW_ROWS = 6, ROWS_MAX = 192 };

/* One thread's memory.  A lane is one query head of one query, as `rows` counts them;
 * `width` is head_dim, rounded up to whole vectors. */
typedef struct {
    float *queries; /* [row][width], scaled */
    float *scores;  /* [row][PD_TILE] */
    float *mixed;   /* [row][width]: values so far, times their weights */
    float *top;     /* [row]: largest score so far */
    float *total;   /* [row][PD_LANES]: weights so far, by lane */
    int32_t *from, *to; /* [row]: places of this tile that the row sees */
    float *keys;    /* [width][PD_TILE] */
    float *copies;  /* [PD_TILE][width]: values that cannot be used where they are */
    float *nothing; /* [width] zeros */
    int width;
    /* Of each place of a tile, this and the next: keys of the first head; values of the present. */
    const char *keys_at[2][PD_TILE];
    const char **key;
    const float *value[PD_TILE];
} Scratch;

static int width_of(const pd_model *model) {
    return (model->head_dim + PD_LANES - 1) / PD_LANES * PD_LANES;
}

static int rows_max(const pd_model *model) {
    return model->head_count > ROWS_MAX ? model->head_count : ROWS_MAX;
}

int32_t pd_span_tokens(const pd_model *model) {
    int share = model->head_count / model->kv_head_count;
    return share > ROWS_MAX ? 1 : ROWS_MAX / share;
}

size_t pd_attention_scratch_bytes(const pd_model *model) {
    size_t width = (size_t)width_of(model), rows = ((size_t)rows_max(model) + 15) & ~(size_t)15;
    return sizeof(float) *
           (rows * (2 * width + PD_TILE + PD_LANES + 3) + width * (2 * PD_TILE + 1));
}

static void carve(const pd_model *model, void *memory, Scratch *s) {
    size_t rows = ((size_t)rows_max(model) + 15) & ~(size_t)15, width = (size_t)width_of(model);
    s->width = (int)width;
    s->queries = memory;
    s->scores = s->queries + rows * width;
    s->mixed = s->scores + rows * PD_TILE;
    s->keys = s->mixed + rows * width;
    s->copies = s->keys + width * PD_TILE;
    s->nothing = s->copies + width * PD_TILE;
    s->total = s->nothing + width;
    s->top = s->total + rows * PD_LANES;
    s->from = (int32_t *)(s->top + rows);
    s->to = s->from + rows;
    memset(s->nothing, 0, width * sizeof(float));
}

/* --- a tile's keys and values, from the pool --- */

#if defined(__AVX512F__)
static inline __m512 read_lanes(const char *from, int is_half) {
    if (!is_half) return _mm512_loadu_ps(from);
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* to[dim][key] = from[key][dim] of 16 by 16. */
static inline void transpose(const char *const *from, size_t offset, int is_half, float *to) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = read_lanes(from[i] + offset, is_half);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d low = (__m512d)b[i + j], high = (__m512d)b[i + j + 2];
            a[i + 2 * j] = (__m512)_mm512_unpacklo_pd(low, high);
            a[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(low, high);
        }
    for (int i = 0; i < 4; i++) { /* a[4 r + i]: dims i, 4 + i, .. of keys 4 r to 4 r + 3 */
        __m512 low = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
        __m512 high = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
        __m512 low_2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
        __m512 high_2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
        _mm512_storeu_ps(to + (size_t)i * PD_TILE, _mm512_shuffle_f32x4(low, low_2, 0x88));
        _mm512_storeu_ps(to + (size_t)(8 + i) * PD_TILE, _mm512_shuffle_f32x4(low, low_2, 0xdd));
        _mm512_storeu_ps(to + (size_t)(4 + i) * PD_TILE, _mm512_shuffle_f32x4(high, high_2, 0x88));
        _mm512_storeu_ps(to + (size_t)(12 + i) * PD_TILE, _mm512_shuffle_f32x4(high, high_2, 0xdd));
    }
}
#endif

static inline float read_one(const char *from, int at, int is_half) {
    if (is_half) return pd_widen(((const uint16_t *)(const void *)from)[at]);
    return ((const float *)(const void *)from)[at];
}

/* Where the tile's keys of the first head are.  Behind each are its values, `part_bytes` on. */
static void find_keys(const pd_model *model, const pd_span *span, const char *layer,
                      size_t token_bytes, int base, int from, int to, const char **keys_at) {
    int block_tokens = model->block_tokens;
    int block = (base + from) / block_tokens, offset = (base + from) % block_tokens;
    for (int place = from; place < to; block++, offset = 0) {
        const char *key = layer + ((size_t)span->blocks[block] * 2 * (size_t)block_tokens +
                                   (size_t)offset) * token_bytes;
        for (; offset < block_tokens && place < to; offset++, place++, key += token_bytes)
            keys_at[place] = key;
    }
}

/* Ask for the keys and values of one head.  Pieces as short as a head, in blocks anywhere, are
 * not foreseen by the processor. */
static void prefetch(const char *const *key, size_t offset, size_t part_bytes, size_t size, int from,
                     int to) {
    for (int place = from; place < to; place++)
        for (size_t at = 0; at < size; at += 64) {
            __builtin_prefetch(key[place] + offset + at, 0, 2);
            __builtin_prefetch(key[place] + offset + part_bytes + at, 0, 2);
        }
}

/* Keys of places from..to, to `keys`; of the other places it holds anything. */
static void read_keys(const Scratch *s, size_t offset, int dim, int is_half, int from, int to) {
    int done = 0;
#if defined(__AVX512F__)
    size_t size = is_half ? 2 : 4;
    for (int place = from / PD_LANES * PD_LANES; place < to; place += PD_LANES) {
        const char *key[PD_LANES];
        for (int i = 0; i < PD_LANES; i++) {
            int is_there = place + i >= from && place + i < to;
            key[i] = is_there ? s->key[place + i] + offset : (const char *)s->nothing;
        }
        for (done = 0; done + PD_LANES <= dim; done += PD_LANES)
            transpose(key, (size_t)done * size, is_half,
                      s->keys + (size_t)done * PD_TILE + place);
    }
#endif
    for (int place = from; place < to && done < dim; place++)
        for (int i = done; i < dim; i++)
            s->keys[(size_t)i * PD_TILE + place] = read_one(s->key[place] + offset, i, is_half);
}

/* Values are used in place where a few rows read them as they are, once.  Many rows would find
 * them at distances that a cache cannot hold together. */
static void find_values(Scratch *s, size_t offset, int dim, int is_half, int from, int to,
                        int is_copied) {
    for (int place = from; place < to; place++) {
        const char *head = s->key[place] + offset;
        if (!is_copied) {
            s->value[place] = (const float *)(const void *)head;
            continue;
        }
        float *copy = s->copies + (size_t)place * (size_t)s->width;
        const float *whole = (const float *)(const void *)head;
        const uint16_t *halves = (const uint16_t *)(const void *)head;
        if (is_half)
            for (int i = 0; i < dim; i++) copy[i] = pd_widen(halves[i]);
        else
            for (int i = 0; i < dim; i++) copy[i] = whole[i];
        for (int i = dim; i < s->width; i++) copy[i] = 0;
        s->value[place] = copy;
    }
}

/* --- rows against a tile; `rows` and `vectors` are constants where these are inlined --- */

#define INLINE static inline __attribute__((always_inline))

INLINE void score(const Scratch *s, int row, int dim, const int rows) {
    pd_vector sums[ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++) sums[r][c] = pd_all(0);
    const float *query = s->queries + (size_t)row * (size_t)s->width, *key = s->keys;
    for (int i = 0; i < dim; i++, key += PD_TILE)
        for (int r = 0; r < rows; r++) {
            pd_vector one = pd_all(query[(size_t)r * (size_t)s->width + (size_t)i]);
            for (int c = 0; c < 4; c++)
                sums[r][c] = pd_fma(one, pd_load(key + c * PD_LANES), sums[r][c]);
        }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++)
            pd_store(s->scores + (size_t)(row + r) * PD_TILE + c * PD_LANES, sums[r][c]);
}

INLINE void mix_part(const Scratch *s, int row, int from, int to, int at, const int rows,
                     const int vectors) {
    pd_vector sums[ROWS][4];
    size_t width = (size_t)s->width;
    float *mixed = s->mixed + (size_t)row * width + at;
    const float *weights = s->scores + (size_t)row * PD_TILE;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++)
            sums[r][c] = pd_load(mixed + (size_t)r * width + c * PD_LANES);
    for (int place = from; place < to; place++) {
        const float *value = s->value[place] + at;
        for (int r = 0; r < rows; r++) {
            pd_vector weight = pd_all(weights[r * PD_TILE + place]);
            for (int c = 0; c < vectors; c++)
                sums[r][c] = pd_fma(weight, pd_load(value + c * PD_LANES), sums[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++)
            pd_store(mixed + (size_t)r * width + c * PD_LANES, sums[r][c]);
}

INLINE void mix(const Scratch *s, int row, int from, int to, const int rows) {
    int at = 0;
    for (; at + 4 * PD_LANES <= s->width; at += 4 * PD_LANES)
        mix_part(s, row, from, to, at, rows, 4);
    if (at + 2 * PD_LANES <= s->width) {
        mix_part(s, row, from, to, at, rows, 2);
        at += 2 * PD_LANES;
    }
    if (at < s->width) mix_part(s, row, from, to, at, rows, 1);
}

/* Weights of one row's scores, and its running maximum and sum.  What it does not see weighs 0. */
INLINE void weigh(const Scratch *s, int row) {
    static const pd_integers lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float *scores = s->scores + (size_t)row * PD_TILE, *total = s->total + (size_t)row * PD_LANES;
    pd_vector part[4], largest = pd_all(-INFINITY), sum = pd_all(0);
    for (int c = 0; c < 4; c++) part[c] = pd_load(scores + c * PD_LANES);
    if (s->from[row] > 0 || s->to[row] < PD_TILE)
        for (int c = 0; c < 4; c++) {
            pd_integers place = lanes + c * PD_LANES;
            pd_integers sees = (place >= s->from[row]) & (place < s->to[row]);
            part[c] = pd_select(sees, part[c], pd_all(-INFINITY));
        }
    for (int c = 0; c < 4; c++) largest = pd_larger(part[c], largest);
    float before = s->top[row], top = pd_largest(largest);
    if (before > top) top = before;
    for (int c = 0; c < 4; c++) {
        part[c] = pd_exp2(part[c] - pd_all(top));
        sum = sum + part[c];
        pd_store(scores + c * PD_LANES, part[c]);
    }
    if (before == top) { /* as below, for a factor of 1 */
        pd_store(total, pd_load(total) + sum);
        return;
    }
    s->top[row] = top;
    pd_vector shrink = pd_exp2(pd_all(before - top));
    pd_store(total, pd_fma(pd_load(total), shrink, sum));
    float *mixed = s->mixed + (size_t)row * (size_t)s->width;
    for (int i = 0; i < s->width; i += PD_LANES)
        pd_store(mixed + i, pd_load(mixed + i) * shrink);
}

/* Rows that see different places take those alone that not all of them see. */
INLINE void attend_rows(const Scratch *s, int row, int dim, const int rows) {
    int seeing = 0;
    for (int r = row; r < row + rows; r++) seeing += s->from[r] < s->to[r];
    if (seeing == 0) return;
    score(s, row, dim, rows);
    int from = 0, to = PD_TILE;
    for (int r = row; r < row + rows; r++) {
        if (s->from[r] < s->to[r]) weigh(s, r);
        if (s->from[r] > from) from = s->from[r];
        if (s->to[r] < to) to = s->to[r];
    }
    if (from >= to) {
        for (int r = row; r < row + rows; r++) mix(s, r, s->from[r], s->to[r], 1);
        return;
    }
    for (int r = row; r < row + rows; r++)
        if (s->from[r] < from) mix(s, r, s->from[r], from, 1);
    mix(s, row, from, to, rows);
    for (int r = row; r < row + rows; r++)
        if (to < s->to[r]) mix(s, r, to, s->to[r], 1);
}

static void attend_tile(const Scratch *s, int row, int row_stop, int dim) {
    while (row < row_stop) {
        int rows = row_stop - row < ROWS ? row_stop - row : ROWS;
        switch (rows) {
#if defined(__AVX512F__)
        case 6: attend_rows(s, row, dim, 6); break;
        case 5: attend_rows(s, row, dim, 5); break;
        case 4: attend_rows(s, row, dim, 4); break;
        case 3: attend_rows(s, row, dim, 3); break;
        case 2: attend_rows(s, row, dim, 2); break;
#endif
        default: attend_rows(s, row, dim, 1);
        }
        row += rows;
    }
}

/* --- a span --- */

static void open_rows(const pd_model *model, const pd_span *span, const float *qkv, Scratch *s) {
    int dim = model->head_dim, share = model->head_count / model->kv_head_count, row = 0;
    int64_t stride = (int64_t)(model->head_count + 2 * model->kv_head_count) * dim;
    /* In powers of two: one multiplication less per score. */
    float scale = (float)(1.4426950408889634 / sqrt((double)dim));
    for (int head = span->head; head < span->head_stop; head++)
        for (int token = 0; token < span->count; token++)
            for (int lane = 0; lane < share; lane++, row++) {
                const float *query =
                    qkv + (span->query + token) * stride + (size_t)(head * share + lane) * dim;
                float *scaled = s->queries + (size_t)row * (size_t)s->width;
                for (int i = 0; i < dim; i++) scaled[i] = query[i] * scale;
                s->top[row] = -INFINITY;
                pd_store(s->total + (size_t)row * PD_LANES, pd_all(0));
                memset(s->mixed + (size_t)row * (size_t)s->width, 0,
                       (size_t)s->width * sizeof(float));
            }
}

static void close_rows(const pd_model *model, const pd_span *span, const Scratch *s,
                       float *result) {
    int dim = model->head_dim, share = model->head_count / model->kv_head_count, row = 0;
    int64_t stride = (int64_t)model->head_count * dim;
    for (int head = span->head; head < span->head_stop; head++)
        for (int token = 0; token < span->count; token++)
            for (int lane = 0; lane < share; lane++, row++) {
                float *to =
                    result + (span->result + token) * stride + (size_t)(head * share + lane) * dim;
                const float *mixed = s->mixed + (size_t)row * (size_t)s->width;
                float total = pd_sum(pd_load(s->total + (size_t)row * PD_LANES));
                for (int i = 0; i < dim; i++) to[i] = mixed[i] / total;
            }
}

/* Say which places of the tile from position `base` on each row of one head sees. */
static void bound_rows(const pd_span *span, int share, int window, int base, int row, Scratch *s) {
    for (int token = 0; token < span->count; token++) {
        int position = span->start + token;
        int from = window && position - window + 1 > base ? position - window + 1 - base : 0;
        int to = position + 1 - base < PD_TILE ? position + 1 - base : PD_TILE;
        if (from >= to) from = to = 0;
        for (int lane = 0; lane < share; lane++, row++) s->from[row] = from, s->to[row] = to;
    }
}

void pd_attend(const pd_model *model, const pd_span *span, int32_t window, const char *layer,
               const float *qkv, float *result, void *scratch) {
    Scratch s;
    carve(model, scratch, &s);
    int dim = model->head_dim, share = model->head_count / model->kv_head_count;
    int is_half = model->keeps_half;
    size_t head_bytes = (size_t)dim * (is_half ? 2 : 4);
    size_t token_bytes = head_bytes * (size_t)model->kv_head_count;
    size_t part_bytes = token_bytes * (size_t)model->block_tokens;
    int stop = span->start + span->count, rows = span->count * share;
    int first = window && span->start - window + 1 > 0 ? span->start - window + 1 : 0;
    int is_copied = is_half || dim != s.width || rows > FEW_ROWS;
    open_rows(model, span, qkv, &s);
    int base = first / PD_TILE * PD_TILE, from = first - base, turn = 0;
    int to = stop - base < PD_TILE ? stop - base : PD_TILE;
    find_keys(model, span, layer, token_bytes, base, from, to, s.keys_at[0]);
    for (; base < stop; base += PD_TILE, turn = 1 - turn) {
        int next_to = stop - base - PD_TILE < PD_TILE ? stop - base - PD_TILE : PD_TILE;
        s.key = s.keys_at[turn];
        if (next_to > 0)
            find_keys(model, span, layer, token_bytes, base + PD_TILE, 0, next_to,
                      s.keys_at[1 - turn]);
        for (int head = span->head, row = 0; head < span->head_stop; head++, row += rows) {
            size_t offset = (size_t)head * head_bytes;
            if (rows <= FEW_ROWS) {
                if (head + 1 < span->head_stop)
                    prefetch(s.key, offset + head_bytes, part_bytes, head_bytes, from, to);
                else if (next_to > 0)
                    prefetch(s.keys_at[1 - turn], (size_t)span->head * head_bytes, part_bytes,
                             head_bytes, 0, next_to);
            }
            read_keys(&s, offset, dim, is_half, from, to);
            find_values(&s, offset + part_bytes, dim, is_half, from, to, is_copied);
            bound_rows(span, share, window, base, row, &s);
            attend_tile(&s, row, row + rows, dim);
        }
        from = 0, to = next_to;
    }
    close_rows(model, span, &s, result);
}
