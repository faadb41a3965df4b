/* Linear layers on the host processor whose rows do not depend on who shares the batch.
 *
 * The rule that makes it hard: a row's result is bit-equal whatever the number of rows, its place
 * among them, the number of threads and the block of outputs it is computed in.  So every output
 * has one order of additions, and nothing here chooses an order by `rows` or `threads`:
 *
 *   PD_F32   for k in 0..in: sum = fma(x[k], w[k], sum), from 0; then + bias
 *   PD_BF16  x rounded to bfloat16; the order is that of the path (pd_linear_path)
 *   PD_INT8  x and w are integers times one scale per row and per output; the sum is exact
 */
#ifndef PDSERVE_NATIVE_LINEAR_H
#define PDSERVE_NATIVE_LINEAR_H

#include <stddef.h>
#include <stdint.h>

enum { PD_F32 = 0, PD_BF16 = 1, PD_INT8 = 2 }; /* how weights are kept */

typedef struct {
    int32_t kind;
    int32_t in;
    int32_t out;
    const void *packed;  /* aligned to 64 bytes */
    const float *scales; /* PD_INT8: [out]; else unused */
    const float *bias;   /* [out] or NULL */
} pd_linear;

size_t pd_packed_bytes(int kind, int in, int out);

/* weights [out][in], finite.  scales [out] are written for PD_INT8 only, may be NULL else. */
void pd_pack(int kind, int in, int out, const float *weights, void *packed, float *scales);

/* Room for `rows` rows of x in the form that pd_linear_run reads; aligned to 64 bytes by the
 * caller.  Depends on w->kind, w->in and rows only, grows with rows, and may be 0: then
 * pd_prepare does nothing and pd_linear_run reads x itself. */
size_t pd_prepared_bytes(const pd_linear *w, int rows);

/* All threads call it, each does its own rows; a barrier has to follow.  Layers of one kind and
 * one `in` may share what was prepared for one of them. */
void pd_prepare(const pd_linear *w, const float *x, int64_t x_stride, int rows, void *prepared,
                int thread, int threads);

/* y[row][o] = (adds ? y[row][o] : 0) + (bias[o] + x[row] . w[o]), for the outputs of `thread`.
 * Strides count floats.  All threads call it, each writes its own outputs; no barrier inside. */
void pd_linear_run(const pd_linear *w, const void *prepared, const float *x, int64_t x_stride,
                   int rows, float *y, int64_t y_stride, int adds, int thread, int threads);

/* What this build and processor use: "amx", "vnni", "avx512", "avx2", "neon" or "portable".  All
 * paths of PD_F32 give the same bits, and all of PD_INT8; those of PD_BF16 too, but for "amx". */
const char *pd_linear_path(int kind);

#endif
