/* The RMS norm in front of a chain: what vLLM's fused_add_rms_norm computes, in place as its kernels for GPUs do it.
 *
 *     sum = x + residual, in fp32;  residual = sum;  x = (sum / sqrt(mean(sum^2) + epsilon)) * weight
 *
 * The sum is normalised as fp32, rounded to the dtype of the activations, and only then multiplied by the weight: vLLM's order. */
#include <math.h>

typedef struct {
    const char *weight; /* [n] of the activations' dtype */
    int64_t n;
    double epsilon;
} Norm;

/* A vector of which only `live` numbers are there, and may be touched; the others are zeros. */
INLINE vec load_some(const char *from, int64_t live, const int half) {
    if (live >= WIDTH) return half ? load_halves(from) : load_fp32(from);
    float some[WIDTH] = {0};
    memcpy(some, from, live * (half ? 2 : 4));
    return half ? load_halves(some) : load_fp32(some);
}

INLINE void store_some(vec value, char *to, int64_t live, const int half) {
    if (live >= WIDTH) {
        store_vec(value, to, half);
        return;
    }
    float some[WIDTH];
    store_vec(value, some, half);
    memcpy(to, some, live * (half ? 2 : 4));
}

/* `sums`: n floats and up to a vector more; half is a constant where this is inlined. */
INLINE void norm_row(const Norm *norm, char *x, char *residual, float *sums, const int half) {
    const int64_t size = half ? 2 : 4, n = norm->n;
    vec squares = {0};
    for (int64_t i = 0; i < n; i += WIDTH) {
        const vec sum = load_some(x + i * size, n - i, half) + load_some(residual + i * size, n - i, half);
        store_some(sum, residual + i * size, n - i, half);
        memcpy(sums + i, &sum, sizeof sum);
        squares += sum * sum;
    }
    float square = 0;
    for (int i = 0; i < WIDTH; i++) square += squares[i];
    const float factor = 1.0f / sqrtf(square / (float)n + (float)norm->epsilon);
    for (int64_t i = 0; i < n; i += WIDTH) {
        vec value = load_fp32(sums + i) * factor;
        if (half) {
            uint16_t rounded[WIDTH];
            store_halves(value, rounded);
            value = load_halves(rounded);
        }
        store_some(value * load_some(norm->weight + i * size, n - i, half), x + i * size, n - i, half);
    }
}

/* Rows of x and residual, both [tokens, n]; every thread of the team comes here. */
static void run_norm(const Norm *norm, char *x, char *residual, int64_t tokens, int64_t half, float *sums) {
    const int64_t bytes = norm->n * (half ? 2 : 4);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        if (half) norm_row(norm, x + t * bytes, residual + t * bytes, sums, 1);
        else norm_row(norm, x + t * bytes, residual + t * bytes, sums, 0);
    }
}
