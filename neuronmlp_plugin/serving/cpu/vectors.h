/* One row of a panel, 16 output columns wide, in the vector registers of this processor: how it is read from each dtype.
 *
 * A vector wider than the processor's would go through memory (gcc lowers it, at a tenth of the speed), so the width is the
 * processor's own: AVX-512 16 floats, AVX2 8, everything else (NEON, SSE) 4. */
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define LANES 16 /* columns of a panel */
#if defined(__AVX512F__)
#define WIDTH 16  /* floats of a vector */
#define SUMS 24   /* vectors that hold sums; the rest holds a row of weights and a number of x */
#elif defined(__AVX2__)
#define WIDTH 8
#define SUMS 12
#elif defined(__aarch64__)
#define WIDTH 4
#define SUMS 24
#else
#define WIDTH 4
#define SUMS 8
#endif
#define VECTORS (LANES / WIDTH) /* of a panel's row */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));

INLINE vec load_fp32(const void *from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* Two rows of bf16 lie in pairs: k in the low half of a word, k + 1 in the high half. Either is a float once the other is gone. */
INLINE vec load_bf16(const void *from, int odd) {
    words w;
    memcpy(&w, from, sizeof w);
    w = odd ? w & 0xffff0000u : w << 16;
    vec v;
    memcpy(&v, &w, sizeof v);
    return v;
}

INLINE vec load_int8(const void *from) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#elif defined(__ARM_NEON)
    int32_t four;
    memcpy(&four, from, sizeof four);
    int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return (vec)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
#else
    vec v;
    for (int i = 0; i < WIDTH; i++) v[i] = ((const int8_t *)from)[i];
    return v;
#endif
}

INLINE float to_float(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, ties to even; a NaN stays one. */
INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* 1 / (1 + e^-x), within 2 units of the last place of fp32: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]. */
INLINE float sigmoid(float x) {
    float clipped = -x < -87.0f ? -87.0f : -x > 87.0f ? 87.0f : -x;
    float n = __builtin_rintf(clipped * 1.44269504f);
    float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x != x ? x : 1.0f / (1.0f + p * power);
}
