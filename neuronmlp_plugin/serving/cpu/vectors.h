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
#define VECTOR_NAME "AVX-512"
#define WIDTH 16  /* floats of a vector */
#define SUMS 24   /* vectors that hold sums; the rest holds a row of weights and a number of x */
#elif defined(__AVX2__)
#define VECTOR_NAME "AVX2"
#define WIDTH 8
#define SUMS 12
#elif defined(__aarch64__)
#define VECTOR_NAME "NEON"
#define WIDTH 4
#define SUMS 24
#else
#define VECTOR_NAME "vectors of 4 floats"
#define WIDTH 4
#define SUMS 8
#endif
#define VECTORS (LANES / WIDTH) /* of a panel's row */
#define AHEAD 8192 /* bytes of weights that are asked for before they are read: the hardware's own prefetch stops at pages */
#define INLINE static inline __attribute__((always_inline))

/* Where reading will be AHEAD bytes after byte `at` of the first of some panels that lie `panel` apart, if `bytes` of each of them are
 * read side by side, and then as much of those behind them. (Asking for what lies behind each panel misses most of its beginning.) */
INLINE const char *ahead_of(const char *w, int64_t at, int64_t bytes, int64_t panels, int64_t panel) {
    at += AHEAD / panels;
    return w + at % bytes + at / bytes * panels * panel;
}

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

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

/* Two rows of a panel, k and k + 1, as pairs of bf16. */
INLINE void store_pairs(char *out, const char *even, const char *odd) {
    for (int64_t at = 0; at < LANES; at += WIDTH) {
        vec row = load_int8(even + at), next = {0};
        if (odd) next = load_int8(odd + at);
        words low, high;
        memcpy(&low, &row, sizeof low);
        memcpy(&high, &next, sizeof high);
        low = low >> 16 | high; /* 8 bits fit the 16 of a bf16: the lower half of `high` is zero */
        memcpy(out + at * 4, &low, sizeof low);
    }
}

/* 32 rows of an int8 panel, or those that are left of them, as 16 rows of pairs; `ahead`: what will be read later. */
INLINE void widen_step(const char *w, int64_t left, char *out, const char *ahead) {
    if (left >= 32) {
        for (int64_t i = 0; i < 8; i++) __builtin_prefetch(ahead + 64 * i);
#pragma GCC unroll 4
        for (int64_t i = 0; i < 16; i++) store_pairs(out + i * 64, w + 32 * i, w + 32 * i + 16);
        return;
    }
    memset(out, 0, 1024);
    for (int64_t i = 0; 2 * i < left; i++) store_pairs(out + i * 64, w + 32 * i, 2 * i + 1 < left ? w + 32 * i + 16 : 0);
}

INLINE float to_float(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* x, no nearer to infinity than +-most; a NaN stays one, which is why x is the second operand of each. */
INLINE vec clip(vec x, float most) {
    const vec above = (vec){0} + most, below = -above;
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)above, _mm512_max_ps((__m512)below, (__m512)x));
#elif defined(__AVX2__)
    return (vec)_mm256_min_ps((__m256)above, _mm256_max_ps((__m256)below, (__m256)x));
#else
    const words high = (words)(x > above), low = (words)(x < below);
    return (vec)(((words)x & ~(high | low)) | ((words)above & high) | ((words)below & low));
#endif
}

/* So many bf16 as floats. */
INLINE vec load_halves(const void *from) {
    halves v;
    memcpy(&v, from, sizeof v);
#if defined(__AVX512F__) /* gcc would widen its two halves one by one */
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
#else
    return (vec)(__builtin_convertvector(v, words) << 16);
#endif
}

/* To the nearest, ties to even; a NaN stays one. */
INLINE void store_halves(vec value, void *to) {
#if defined(__AVX512BF16__)
    __m256bh v = _mm512_cvtneps_pbh((__m512)value);
#else
    words bits = (words)value, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    words nan = (words)(value != value);
    halves v = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), halves);
#endif
    memcpy(to, &v, sizeof v);
}

INLINE void store_vec(vec value, void *to, int half) {
    if (half) store_halves(value, to);
    else memcpy(to, &value, sizeof value);
}

/* 1 / v; where 13 bits are enough (`rough`), by the processor's own estimate. */
INLINE vec reciprocal(vec v, const int rough) {
#if defined(__AVX512F__)
    return rough ? (vec)_mm512_rcp14_ps((__m512)v) : 1.0f / v;
#else
    (void)rough;
    return 1.0f / v;
#endif
}

/* 1 / (1 + e^-x), within 2 units of the last place of fp32, or of 1 part in 2^12 where it is stored as bf16 (`rough`): 2^n times a
 * Taylor polynomial of degree 6 or 4 on [-ln 2 / 2, ln 2 / 2]. The sum with 1.5 x 2^23 rounds to a whole number, which its low bits
 * then hold. */
INLINE vec sigmoid(vec x, const int rough) {
    const vec zero = {0}, round = zero + 12582912.0f, clipped = clip(-x, 87.0f);
    vec shifted = clipped * 1.44269504f + round, n = shifted - round;
    vec r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = zero + 4.16666667e-2f;
    if (!rough) p += r * (8.33333333e-3f + r * 1.38888889e-3f);
    p = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * p)));
    words power = ((words)shifted << 23) + (127u << 23);
    return reciprocal(1.0f + p * (vec)power, rough);
}
