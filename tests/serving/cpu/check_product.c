/* product.c against sums in double, for every dtype of weights and activations, ragged sizes and numbers of tokens.
 * Prints the largest error beside the bound and ends with 1 where it is above; test_processors.py compiles it for several processors. */
#include "product.c"
#include <math.h>
#include <stdio.h>

static uint32_t state = 1;
static float draw(void) { /* in [-1, 1], exact in bf16 */
    state = state * 1664525u + 1013904223u;
    return (float)((int)(state >> 24) - 128) / 128.0f;
}

static void put(void *data, int half, int64_t at, float value) { /* what is drawn is exact in bf16, too */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (half) ((uint16_t *)data)[at] = (uint16_t)(bits >> 16);
    else ((float *)data)[at] = value;
}

static float get(const void *data, int half, int64_t at) { return half ? to_float(((const uint16_t *)data)[at]) : ((const float *)data)[at]; }

/* y [tokens, n] = (x [tokens, k] w) scale + addend, then silu of it times the addend; returns the largest error over its bound. */
static double check(int64_t tokens, int64_t k, int64_t n, int half, int int8) {
    const int64_t panels = (n + LANES - 1) / LANES, padded = (k + 31) / 32 * 32, width = k + n + 5;
    float *weight = malloc(n * k * 4), *scale = malloc(n * 4);
    char *packed = calloc(panels * padded * LANES, 4), *input = calloc(tokens * width, 4), *output = calloc(tokens * 2 * n, 4);
    for (int64_t j = 0; j < n; j++) {
        scale[j] = int8 ? 0.5f + (float)j / (float)n : 1.0f;
        for (int64_t i = 0; i < k; i++) {
            const float value = weight[j * k + i] = int8 ? rintf(127 * draw()) : draw();
            const int64_t panel = j / LANES, column = j % LANES;
            if (int8) ((int8_t *)packed)[(panel * k + i) * LANES + column] = (int8_t)value;
            else if (half) put(packed, 1, ((panel * padded / 2 + i / 2) * LANES + column) * 2 + i % 2, value);
            else ((float *)packed)[(panel * k + i) * LANES + column] = value;
        }
    }
    for (int64_t i = 0; i < tokens * width; i++) put(input, half, i, draw());
    const Product products[] = {
        {0, int8 ? INT8 : half ? BF16 : FP32, k, n, 0, 3, 1, 0, 0, k + 4, packed, int8 ? scale : 0},
        {1, SILU, 0, n, 1, 0, 1, n, 0, k + 4, 0, 0},
    };
    const Chain chain = {products, 2, half, {width, 2 * n, 0}, {0}};
    neuronmlp_products(&chain, input, output, 0, 0, tokens);
    double worst = 0;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < n; j++) {
            double sum = 0, size = 1;
            for (int64_t i = 0; i < k; i++) {
                const double term = (double)get(input, half, t * width + 3 + i) * weight[j * k + i];
                sum += term;
                size += fabs(term);
            }
            const double addend = get(input, half, t * width + k + 4 + j), unit = half ? 1.0 / 128 : 1e-6;
            const double linear = sum * scale[j] + addend, bound = 2e-6 * size * scale[j] + unit * (fabs(linear) + 0.01);
            const float stored = get(output, half, t * 2 * n + j);
            const double gated = stored / (1 + exp(-(double)stored)) * addend;
            const double first = fabs(stored - linear) / bound;
            const double second = fabs(get(output, half, t * 2 * n + n + j) - gated) / (unit * (fabs(gated) + 0.01));
            worst = fmax(worst, fmax(first, second));
        }
    free(weight), free(scale), free(packed), free(input), free(output);
    return worst;
}

/* residual = x + residual and x = its norm times a weight, rows of n; returns the largest error over its bound. */
static double check_norm(int64_t tokens, int64_t n, int half) {
    char *x = calloc(tokens * n, 4), *residual = calloc(tokens * n, 4), *weight = calloc(n, 4);
    double *sums = malloc(tokens * n * sizeof *sums), worst = 0;
    for (int64_t i = 0; i < n; i++) put(weight, half, i, draw());
    for (int64_t i = 0; i < tokens * n; i++) {
        put(x, half, i, draw()), put(residual, half, i, draw());
        sums[i] = (double)get(x, half, i) + get(residual, half, i);
    }
    const Chain chain = {0, 0, half, {n, 0, 0}, {weight, n, 1e-3}};
    neuronmlp_products(&chain, x, 0, 0, residual, tokens);
    const double unit = half ? 1.0 / 128 : 1e-6;
    for (int64_t t = 0; t < tokens; t++) {
        double square = 0;
        for (int64_t i = t * n; i < t * n + n; i++) square += sums[i] * sums[i] / n;
        for (int64_t i = t * n; i < t * n + n; i++) {
            const double normed = sums[i] / sqrt(square + 1e-3) * get(weight, half, i - t * n);
            worst = fmax(worst, fabs(get(residual, half, i) - sums[i]) / (unit * (fabs(sums[i]) + 0.01)));
            worst = fmax(worst, fabs(get(x, half, i) - normed) / (unit * (fabs(normed) + 0.01)));
        }
    }
    free(x), free(residual), free(weight), free(sums);
    return worst;
}

int main(void) {
    static const int64_t sizes[][2] = {{1, 1}, {7, 16}, {32, 48}, {33, 65}, {95, 130}, {160, 33}}, counts[] = {1, 2, 3, 4, 5, 7, 8, 13, 24, 33, 70, 300};
    double worst = 0;
    for (int half = 0; half < 2; half++)
        for (int int8 = 0; int8 < 2; int8++)
            for (unsigned s = 0; s < sizeof sizes / sizeof *sizes; s++)
                for (unsigned c = 0; c < sizeof counts / sizeof *counts; c++) worst = fmax(worst, check(counts[c], sizes[s][0], sizes[s][1], half, int8));
    for (int half = 0; half < 2; half++)
        for (unsigned s = 0; s < sizeof sizes / sizeof *sizes; s++)
            for (unsigned c = 0; c < sizeof counts / sizeof *counts; c++) worst = fmax(worst, check_norm(counts[c], sizes[s][1], half));
    printf("vectors of %d floats, tiles %d, largest error %.3f of its bound\n", WIDTH, use_tiles, worst);
    return !(worst <= 1.0);
}
