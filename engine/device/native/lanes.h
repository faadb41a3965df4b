/* Vectors as wide as this build has, and the shape of the blocks they work on.
 *
 * Arithmetic on them is per lane and rounds once per operation, as scalar C does: the width
 * changes the speed and never a bit.
 */
#ifndef PDSERVE_NATIVE_LANES_H
#define PDSERVE_NATIVE_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

/* A block of ROWS_MAX rows by PANEL outputs has its sums in registers: 24 of 32, or 12 of 16. */
#if defined(__AVX512F__) && defined(__AVX512BW__)
enum { LANES = 16, VECTORS = 4 };
#elif defined(__AVX2__) && defined(__FMA__)
enum { LANES = 8, VECTORS = 2 };
#else
enum { LANES = 4, VECTORS = 4 };
#endif
enum { PANEL = LANES * VECTORS, ROWS_MAX = 6 };

/* The unaligned types are for loads and stores only. */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef floats floats_at __attribute__((aligned(4), may_alias));
typedef integers integers_at __attribute__((aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE floats load_floats(const float *from) { return *(const floats_at *)from; }
INLINE void store_floats(float *to, floats values) { *(floats_at *)to = values; }
INLINE integers load_integers(const void *from) { return *(const integers_at *)from; }

INLINE floats splat(float value) {
    return value - (floats){0}; /* exact, NaN and minus zero included */
}

/* a * b + c, rounded once. */
INLINE floats multiply_add(floats a, floats b, floats c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    for (int lane = 0; lane < LANES; lane++) c[lane] = fmaf(a[lane], b[lane], c[lane]);
    return c;
#endif
}

#endif
