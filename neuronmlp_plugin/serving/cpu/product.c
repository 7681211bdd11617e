/* Chains of small matrix products y = x W (+ addend), several of them in one call, for the MLPs of a decoding batch.
 *
 * A library call per product costs about as much as reading the product's weights when a model is small: one call here runs all
 * products of a low-rank projection, in stages (a later stage reads what an earlier one wrote), with inputs and outputs strided, so that
 * nothing is concatenated or sliced in between. Weights are packed in panels of 16 output columns, [N / 16][K][16], in fp32, bf16 or int8;
 * sums are fp32, and an int8 column's scale is applied to its sum. A group of panels stays in cache while 4 tokens at a time go by, which makes it a decent product for prefill as well.
 */
#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float vec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint16_t half __attribute__((vector_size(32)));
typedef int16_t ihalf __attribute__((vector_size(32)));
typedef int8_t quarter __attribute__((vector_size(16)));

typedef struct {
    int64_t stage, k, n;          /* x [tokens, k], y [tokens, n] */
    int64_t x_at, x_width;        /* column of the first input, and the row length, in buffer `x_of` */
    int64_t y_at, y_width;
    int64_t add_at, add_width;    /* addend [tokens, n]; add_of < 0: none */
    int64_t x_of, y_of, add_of;   /* 0: the call's input, 1: its output, 2: scratch */
    int64_t dtype;                /* of the weight. 0: fp32, 1: bf16, 2: int8 */
    const void *weight;           /* packed */
    const float *scale;           /* [n] of an int8 weight, else null */
} Product;

static const int64_t WEIGHT_BYTES[] = {4, 2, 1};

static inline vec load_fp32(const void *panel, int64_t k) {
    vec v;
    memcpy(&v, (const float *)panel + k * LANES, sizeof v);
    return v;
}

static inline vec load_bf16(const void *panel, int64_t k) {
    half h;
    memcpy(&h, (const uint16_t *)panel + k * LANES, sizeof h);
    uvec wide = __builtin_convertvector(h, uvec) << 16;
    vec v;
    memcpy(&v, &wide, sizeof v);
    return v;
}

static inline vec load_int8(const void *panel, int64_t k) {
    quarter q;
    memcpy(&q, (const int8_t *)panel + k * LANES, sizeof q);
    /* Step by step: gcc 12 widens from one size to the next in registers, and takes a leap from 8 to 32 bits one number at a time. */
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(q, ihalf), ivec), vec);
}

/* PANELS x TOKENS accumulators, which the compiler keeps in registers since both are constants. */
#define BLOCK(PANELS, TOKENS, DTYPE)                                                                                       \
    static void block_##PANELS##_##TOKENS##_##DTYPE(const Product *p, const char *w, int64_t panel_bytes, const float *x, vec *out) { \
        vec sum[PANELS][TOKENS];                                                                                           \
        memset(sum, 0, sizeof sum);                                                                                        \
        for (int64_t k = 0; k < p->k; k++) {                                                                               \
            vec row[PANELS];                                                                                               \
            _Pragma("GCC unroll 8") for (int i = 0; i < PANELS; i++) row[i] = load_##DTYPE(w + i * panel_bytes, k);        \
            _Pragma("GCC unroll 8") for (int t = 0; t < TOKENS; t++) {                                                     \
                float value = x[t * p->x_width + k];                                                                       \
                _Pragma("GCC unroll 8") for (int i = 0; i < PANELS; i++) sum[i][t] += value * row[i];                      \
            }                                                                                                              \
        }                                                                                                                  \
        memcpy(out, sum, sizeof sum);                                                                                      \
    }
#define BLOCKS(DTYPE) BLOCK(1, 1, DTYPE) BLOCK(1, 2, DTYPE) BLOCK(1, 4, DTYPE) BLOCK(4, 1, DTYPE) BLOCK(4, 2, DTYPE) BLOCK(4, 4, DTYPE)
BLOCKS(fp32) BLOCKS(bf16) BLOCKS(int8)

typedef void (*Block)(const Product *, const char *, int64_t, const float *, vec *);
#define TABLE(DTYPE) \
    {{block_1_1_##DTYPE, block_1_2_##DTYPE, block_1_4_##DTYPE}, {block_4_1_##DTYPE, block_4_2_##DTYPE, block_4_4_##DTYPE}}
static const Block BLOCK_OF[3][2][3] = {TABLE(fp32), TABLE(bf16), TABLE(int8)}; /* dtype; 1 or 4 panels; 1, 2 or 4 tokens */

/* One group of panels for all tokens, 4, 2 or 1 at a time (2 panels x 8 tokens ran at two thirds of the speed of 4 x 4). */
static void run_group(const Product *p, int64_t first, int64_t count, float *const *buffers, int64_t tokens) {
    int64_t panel_bytes = p->k * LANES * WEIGHT_BYTES[p->dtype];
    for (int64_t t = 0; t < tokens;) {
        int64_t left = tokens - t, step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        for (int64_t i = 0; i < count;) {
            int64_t panels = count - i >= 4 ? 4 : 1;
            Block block = BLOCK_OF[p->dtype][panels / 4][step / 2];
            vec out[16];
            const char *w = (const char *)p->weight + (first + i) * panel_bytes;
            block(p, w, panel_bytes, buffers[p->x_of] + t * p->x_width + p->x_at, out);
            for (int64_t panel = 0; panel < panels; panel++) {
                int64_t column = (first + i + panel) * LANES, rest = p->n - column, live = rest < LANES ? rest : LANES;
                for (int64_t s = 0; s < step; s++) {
                    float sum[LANES];
                    memcpy(sum, &out[panel * step + s], sizeof sum);
                    float *y = buffers[p->y_of] + (t + s) * p->y_width + p->y_at + column;
                    const float *add = p->add_of < 0 ? 0 : buffers[p->add_of] + (t + s) * p->add_width + p->add_at + column;
                    for (int64_t j = 0; j < live; j++) y[j] = sum[j] * (p->scale ? p->scale[column + j] : 1.0f) + (add ? add[j] : 0.0f);
                }
            }
            i += panels;
        }
        t += step;
    }
}

#define GROUP 4 /* panels that one thread takes at a time */

void neuronmlp_products(const Product *products, int64_t count, float *input, float *output, float *scratch, int64_t tokens) {
    float *buffers[3] = {input, output, scratch};
#pragma omp parallel
    for (int64_t begin = 0; begin < count;) {
        int64_t end = begin, groups = 0;
        for (; end < count && products[end].stage == products[begin].stage; end++) groups += (products[end].n + LANES * GROUP - 1) / (LANES * GROUP);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; g++) {
            const Product *p = products + begin;
            int64_t local = g, own;
            while (local >= (own = (p->n + LANES * GROUP - 1) / (LANES * GROUP))) local -= own, p++;
            int64_t panels = (p->n + LANES - 1) / LANES, first = local * GROUP;
            run_group(p, first, panels - first < GROUP ? panels - first : GROUP, buffers, tokens);
        }
        begin = end; /* the loop above ends with a barrier: the next stage may read what this one wrote */
    }
}
