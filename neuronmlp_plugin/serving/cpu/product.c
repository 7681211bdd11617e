/* Chains of small matrix products y = x W (+ addend), several of them in one call: all of a low-rank projection or of a whole MLP.
 *
 * A library call per product costs about as much as reading the product's weights when a model is small. Here the products run in
 * stages (a later stage reads what an earlier one wrote), with inputs and outputs strided, so that nothing is concatenated or sliced in
 * between. Activations are fp32 or bf16, one dtype a call; weights have that dtype or are int8; sums are fp32, and an int8 column's
 * scale is applied to its sum. Weights lie in panels of 16 output columns:
 *   fp32, int8: [N / 16][K][16];   bf16: [N / 16][K' / 2][16][2], K' = K rounded up to 32 with zeros.
 * One copy serves every number of tokens: few of them are bound by reading it, and many reuse a group of panels from cache. */
#include <omp.h>
#include <stdlib.h>
#include "vectors.h"
#include "tiles.h"
#include "norm.h"

enum { FP32, BF16, INT8, SILU, PAIRS }; /* dtypes of weights; SILU: no product; PAIRS: bf16 times bf16 without widening */

typedef struct {
    int64_t stage, dtype, k, n;                      /* x [tokens, k], y [tokens, n] */
    int64_t x_of, x_at, y_of, y_at, add_of, add_at;  /* buffer and first column; add_of < 0: no addend */
    const void *weight;                              /* packed; null for SILU: y = silu(x) * addend */
    const float *scale;                              /* [n] of an int8 weight, else null */
} Product;

typedef struct {
    char *data;
    int64_t width; /* numbers of a row */
} Buffer;

typedef struct {
    const Product *products; /* ordered by stage */
    int64_t count, half;     /* half: activations are bf16 */
    int64_t widths[3];       /* of the input, the output and scratch */
    Norm norm;               /* of the input, in calls that bring a residual */
} Chain;

typedef struct {
    Buffer buffers[3];
    int64_t tokens, half;
} Call;

static int use_tiles = -1; /* decided at the first call */
#define MOST_PANELS 16 /* of a task, at 16 tokens and more */
#define TILE_TOKENS 4 /* from here on bf16 goes through tiles, or through pairs where there are none */
/* From here on an int8 panel is widened once, into memory, and not for every block of tokens. */
static int64_t widen_tokens(const Call *c) { return c->half && use_tiles ? 33 : 24; }

static int64_t row_bytes(int64_t dtype) { return dtype == FP32 ? 4 * LANES : dtype == INT8 ? LANES : 2 * LANES; }
static int64_t panel_bytes(const Product *p) { return row_bytes(p->dtype) * (p->dtype == BF16 ? (p->k + 31) / 32 * 32 : p->k); }
static int64_t wide_bytes(int64_t k, int half) { return half ? (k + 31) / 32 * 32 * 2 * LANES : k * 4 * LANES; } /* of a panel once widened */
static int64_t float_bytes(int64_t k) { return (12 * 4 * (k + 1) + 63) / 64 * 64; } /* of 12 tokens; whole cache lines */
static const char *place(const Call *c, int64_t of, int64_t at, int64_t token) {
    return c->buffers[of].data + (token * c->buffers[of].width + at) * (c->half ? 2 : 4);
}

/* sums [tokens][panels x 16]; all of kind, panels and tokens are constants where this is inlined, so that the sums stay in registers. */
INLINE void block(const int kind, const int panels, const int tokens, int64_t k, const char *w, int64_t panel, const void *x, int64_t stride, float *out) {
    vec sum[SUMS] = {0};
    const int step = kind == BF16 || kind == PAIRS ? 2 : 1, vectors = panels * VECTORS;
    const char *ahead = ahead_of(w, 0, panel, panels, panel);
    int64_t left = panel - (ahead - w) % panel; /* bytes, until it has come to the end of its panel */
    for (int64_t at = 0; at < k; at += step) {
        for (int half = 0; half < (kind == BF16 ? 2 : 1); half++) {
            vec row[4 * VECTORS];
            if (half == 0 && (kind != INT8 || at % 4 == 0)) { /* once a cache line */
                for (int i = 0; i < panels; i++) __builtin_prefetch(ahead + i * panel);
                ahead += 64;
                if ((left -= 64) <= 0) ahead += (panels - 1) * panel, left += panel;
            }
#pragma GCC unroll 16
            for (int i = 0; i < vectors; i++) {
                const char *from = w + (i / VECTORS) * panel;
                const int64_t column = (i % VECTORS) * WIDTH;
                if (kind == FP32) row[i] = load_fp32((const float *)from + at * LANES + column);
                if (kind == INT8) row[i] = load_int8((const int8_t *)from + at * LANES + column);
                if (kind == BF16) row[i] = load_bf16((const uint32_t *)from + at / 2 * LANES + column, half);
                if (kind == PAIRS) row[i] = load_fp32((const uint32_t *)from + at / 2 * LANES + column);
            }
#pragma GCC unroll 16
            for (int t = 0; t < tokens; t++) {
#if defined(__AVX512BF16__)
                if (kind == PAIRS) {
                    uint32_t pair = ((const uint16_t *)x)[t * stride + at];
                    /* The last of an odd k has no neighbour: that number is another's and, be it NaN, the weight's 0 would not silence
                     * it. */
                    if (at + 1 < k) memcpy(&pair, (const uint16_t *)x + t * stride + at, sizeof pair);
#pragma GCC unroll 16
                    for (int i = 0; i < vectors; i++)
                        sum[t * vectors + i] = (vec)_mm512_dpbf16_ps((__m512)sum[t * vectors + i], (__m512bh)row[i], (__m512bh)_mm512_set1_epi32((int)pair));
                    continue;
                }
#endif
                const float value = ((const float *)x)[t * stride + at + half];
#pragma GCC unroll 16
                for (int i = 0; i < vectors; i++) sum[t * vectors + i] += value * row[i];
            }
        }
    }
    memcpy(out, sum, sizeof(vec) * vectors * tokens);
}

/* The widest block of panels whose sums fit the registers, at this number of tokens. */
#define PANELS(TOKENS) (4 * VECTORS * (TOKENS) <= SUMS ? 4 : 2 * VECTORS * (TOKENS) <= SUMS ? 2 : 1)
#define STEP(TOKENS)                                                                                         \
    case TOKENS:                                                                                             \
        if (panels == PANELS(TOKENS)) block(kind, PANELS(TOKENS), TOKENS, k, w, panel, x, stride, out);      \
        else block(kind, 1, TOKENS, k, w, panel, x, stride, out);                                            \
        break;

INLINE void any_block(const int kind, int panels, int tokens, int64_t k, const char *w, int64_t panel, const void *x, int64_t stride, float *out) {
    switch (tokens) {
        STEP(1) STEP(2) STEP(3) STEP(4)
#if SUMS >= 6 * VECTORS
        STEP(6)
#endif
#if SUMS >= 12 * VECTORS
        STEP(8) STEP(12)
#endif
    }
}

static int step_of(int64_t left) {
    static const int sizes[] = {12, 8, 6, 4, 3, 2, 1};
    for (int i = 0;; i++)
        if (sizes[i] <= left && sizes[i] * VECTORS <= SUMS && (sizes[i] != 6 || SUMS >= 6 * VECTORS)) return sizes[i];
}

/* What a panel's sums become: scaled, added to, and stored in the dtype of the activations. */
INLINE void store_panel(const float *sums, const float *scale, const char *add, char *y, const int half) {
    for (int64_t i = 0; i < VECTORS; i++) {
        const int64_t at = i * WIDTH * (half ? 2 : 4);
        vec value = load_fp32(sums + i * WIDTH);
        if (scale) value *= load_fp32(scale + i * WIDTH);
        if (add) value += half ? load_halves(add + at) : load_fp32(add + at);
        store_vec(value, y + at, half);
    }
}

/* The first `live` columns of a panel, by way of a whole one. */
static void store_rest(const float *sums, const float *scale, const char *add, char *y, int64_t live, int half) {
    const int64_t bytes = live * (half ? 2 : 4);
    float scales[LANES] = {0}, whole[LANES] = {0};
    if (scale) memcpy(scales, scale, live * 4);
    if (add) memcpy(whole, add, bytes);
    store_panel(sums, scale ? scales : 0, add ? (const char *)whole : 0, (char *)whole, half);
    memcpy(y, whole, bytes);
}

INLINE void store(const Call *c, const Product *p, int64_t token, int64_t column, const float *sums) {
    const char *add = p->add_of < 0 ? 0 : place(c, p->add_of, p->add_at + column, token);
    char *y = (char *)place(c, p->y_of, p->y_at + column, token);
    const float *scale = p->scale ? p->scale + column : 0;
    if (p->n - column < LANES) store_rest(sums, scale, add, y, p->n - column, (int)c->half);
    else if (c->half) store_panel(sums, scale, add, y, 1);
    else store_panel(sums, scale, add, y, 0);
}

/* An int8 panel [K][16] as one of the activations' dtype. */
static void widen(int64_t k, const char *w, int half, char *out) {
    for (int64_t at = 0; half && at < k; at += 32) widen_step(w + at * LANES, k - at, out + at * 2 * LANES, w + at * LANES + AHEAD / 2);
    for (int64_t i = 0; !half && i < k * LANES; i += WIDTH) {
        vec row = load_int8(w + i);
        memcpy(out + i * 4, &row, sizeof row);
    }
}

#if HAS_TILES
/* As `store`, for rows of one or two whole panels, when there is time. */
static Waiting store_later(const Call *c, const Product *p, int64_t token, int64_t column, int64_t two, const float *sums, int64_t rows) {
    const vec one = (vec){0} + 1.0f;
    Waiting w = {.sums = sums, .low = one, .high = one, .y_bytes = 2 * c->buffers[p->y_of].width, .two = two, .left = rows};
    w.y = (char *)place(c, p->y_of, p->y_at + column, token);
    if (p->scale) w.low = load_fp32(p->scale + column), w.high = two ? load_fp32(p->scale + column + LANES) : one;
    if (p->add_of >= 0) w.add = place(c, p->add_of, p->add_at + column, token), w.add_bytes = 2 * c->buffers[p->add_of].width;
    return w;
}

#define TILE_STEP 576 /* numbers of k whose 32 tokens stay in the nearest cache while panels pass */

static void run_tiles(const Call *c, const Product *p, const int kind, const char *w, int64_t panel, int64_t first, int64_t count, int64_t begin, int64_t end) {
    uint16_t __attribute__((aligned(64))) tail[32 * 32];
    float __attribute__((aligned(64))) sums[MOST_PANELS / 2][32 * 32];
    const int64_t stride = c->buffers[p->x_of].width, left = p->k % 32, cuts = count > MOST_PANELS ? 1 : (p->k + TILE_STEP - 1) / TILE_STEP;
    /* Equal parts of k, in whole steps of 32; in one where there are more panels than places for their sums, which are then used in
     * turn. */
    const int64_t part = (p->k + 32 * cuts - 1) / (32 * cuts) * 32;
    int64_t configured = 0;
    Waiting waiting = {0};
    for (int64_t t = begin; t < end; t += 32) {
        const int64_t rows = end - t < 32 ? end - t : 32, a = rows < 16 ? rows : 16;
        if (rows != configured) configure_tiles((int)a, (int)(rows - a)), configured = rows;
        const uint16_t *x = (const uint16_t *)place(c, p->x_of, p->x_at, t);
        for (int64_t r = 0; left && r < rows; r++)
            _mm512_store_si512(tail + r * 32, _mm512_maskz_loadu_epi16((1u << left) - 1, x + r * stride + p->k - left));
        for (int64_t at = 0; at < p->k; at += part)
            for (int64_t i = 0; i < count; i += 2) {
                const int64_t two = i + 1 < count, column = (first + i) * LANES, to = at + part < p->k ? at + part : p->k;
                Block o = {x, tail, stride, p->k, rows - a, w + i * panel, panel, sums[i / 2 % (MOST_PANELS / 2)]};
                if (kind == INT8) tile_block(o, at, to, (int)two, 1, 0, &waiting);
                else if (t == begin) tile_block(o, at, to, (int)two, 0, 1, &waiting);
                else if (two) tile_block(o, at, to, 1, 0, 0, &waiting);
                else tile_block(o, at, to, 0, 0, 0, &waiting);
                /* Stored while the next block multiplies: its place among the sums comes round only MOST_PANELS panels later. */
                if (to < p->k) continue;
                if (column + (1 + two) * LANES <= p->n) waiting = store_later(c, p, t, column, two, o.sums, rows);
                else for (int64_t j = 0; j < 1 + two; j++)
                    for (int64_t r = 0; r < rows; r++) store(c, p, t + r, column + j * LANES, o.sums + r * 32 + j * LANES);
            }
    }
    store_waiting(&waiting, 32);
    _tile_release();
}
#endif

/* x [tokens, k] in fp32, where it is not that already. */
static const float *as_float(const Call *c, const Product *p, int64_t token, int64_t tokens, float *memory) {
    for (int64_t t = 0; t < tokens; t++) {
        const uint16_t *x = (const uint16_t *)place(c, p->x_of, p->x_at, token + t);
        for (int64_t k = 0; k < p->k; k++) memory[t * (p->k + 1) + k] = to_float(x[k]);
        /* bf16 weights come in pairs of k: the second of the last pair of an odd k meets this zero. */
        memory[t * (p->k + 1) + p->k] = 0.0f;
    }
    return memory;
}

static void run_vectors(const Call *c, const Product *p, int kind, const char *w, int64_t panel, int64_t first, int64_t count,
                        int64_t begin, int64_t end, float *memory) {
    const int direct = !c->half || kind == PAIRS;
    const int64_t stride = direct ? c->buffers[p->x_of].width : p->k + 1;
    float sums[SUMS * WIDTH];
    for (int64_t t = begin, step; t < end; t += step) {
        step = step_of(end - t);
        const void *x = direct ? (const void *)place(c, p->x_of, p->x_at, t) : as_float(c, p, t, step, memory);
        for (int64_t i = 0, panels; i < count; i += panels) {
            panels = PANELS(step) <= count - i ? PANELS(step) : 1;
            const char *from = w + i * panel;
            if (kind == FP32) any_block(FP32, panels, step, p->k, from, panel, x, stride, sums);
            if (kind == BF16) any_block(BF16, panels, step, p->k, from, panel, x, stride, sums);
            if (kind == INT8) any_block(INT8, panels, step, p->k, from, panel, x, stride, sums);
#if defined(__AVX512BF16__)
            if (kind == PAIRS) any_block(PAIRS, panels, step, p->k, from, panel, x, stride, sums);
#endif
            for (int64_t s = 0; s < step; s++)
                for (int64_t j = 0; j < panels; j++)
                    store(c, p, t + s, (first + i + j) * LANES, sums + (s * panels + j) * LANES);
        }
    }
}

/* y = silu(x) * factor of so many numbers, a multiple of LANES; half is a constant where this is inlined. */
INLINE void silu_row(const char *x, const char *factor, char *y, int64_t count, const int half) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        const int64_t at = i * (half ? 2 : 4);
        vec value = half ? load_halves(x + at) : load_fp32(x + at);
        value *= sigmoid(value, half) * (half ? load_halves(factor + at) : load_fp32(factor + at));
        store_vec(value, y + at, half);
    }
}

/* Less than a panel, by way of a whole one. */
static void silu_rest(const char *x, const char *factor, char *y, int64_t live, int half) {
    float value[LANES] = {0}, times[LANES] = {0};
    memcpy(value, x, live * (half ? 2 : 4));
    memcpy(times, factor, live * (half ? 2 : 4));
    if (half) silu_row((const char *)value, (const char *)times, (char *)value, LANES, 1);
    else silu_row((const char *)value, (const char *)times, (char *)value, LANES, 0);
    memcpy(y, value, live * (half ? 2 : 4));
}

static void run_silu(const Call *c, const Product *p, int64_t first, int64_t count, int64_t begin, int64_t end) {
    const int64_t at = first * LANES, live = p->n - at < count * LANES ? p->n - at : count * LANES, rest = live % LANES, whole = live - rest;
    for (int64_t t = begin; t < end; t++) {
        const char *x = place(c, p->x_of, p->x_at + at, t), *factor = place(c, p->add_of, p->add_at + at, t);
        char *y = (char *)place(c, p->y_of, p->y_at + at, t);
        const int64_t bytes = whole * (c->half ? 2 : 4);
        if (c->half) silu_row(x, factor, y, whole, 1);
        else silu_row(x, factor, y, whole, 0);
        if (rest) silu_rest(x + bytes, factor + bytes, y + bytes, rest, (int)c->half);
    }
}

/* `count` panels at `w`, the first of them panel `first` of the product, for tokens begin .. end. */
static void run_panels(const Call *c, const Product *p, int kind, const char *w, int64_t panel, int64_t first, int64_t count,
                       int64_t begin, int64_t end, float *memory) {
#if HAS_TILES
    if (kind != FP32 && c->half && use_tiles && c->tokens >= TILE_TOKENS) return run_tiles(c, p, kind, w, panel, first, count, begin, end);
#endif
#if defined(__AVX512BF16__)
    if (kind == BF16 && c->tokens >= TILE_TOKENS) kind = PAIRS;
#endif
    run_vectors(c, p, kind, w, panel, first, count, begin, end, memory);
}

#define CACHE (512 << 10) /* bytes of panels that a core's cache holds beside the tokens */
static int64_t widened_at_once(int64_t bytes) { return CACHE / bytes < 4 ? 4 : CACHE / bytes > 16 ? 16 : CACHE / bytes; }

/* Panels first .. first + count of one product for tokens begin .. end. */
static void run_task(const Call *c, const Product *p, int64_t first, int64_t count, int64_t begin, int64_t end, char *memory) {
    if (p->dtype == SILU) return run_silu(c, p, first, count, begin, end);
    const int64_t panel = panel_bytes(p);
    const char *w = (const char *)p->weight + first * panel;
    if (p->dtype != INT8 || c->tokens < widen_tokens(c)) return run_panels(c, p, (int)p->dtype, w, panel, first, count, begin, end, (float *)memory);
    char *wide = memory + float_bytes(p->k);
    const int64_t bytes = wide_bytes(p->k, (int)c->half), most = widened_at_once(bytes);
    for (int64_t i = 0; i < count; i += most) {
        const int64_t some = count - i < most ? count - i : most;
        for (int64_t j = 0; j < some; j++) widen(p->k, w + (i + j) * panel, (int)c->half, wide + j * bytes);
        run_panels(c, p, c->half ? BF16 : FP32, wide, bytes, first + i, some, begin, end, (float *)memory);
    }
}

/* How a product is cut: about equal bytes for few tokens, blocks of panels and tokens that fit a core's cache for many. */
typedef struct { int64_t panels, tokens, across, down; } Cut;
static int64_t count_of(Cut cut) { return cut.across * cut.down; }
#define SILU_WORK 64 /* a panel's silu costs about as much as so many of its products */
static Cut cut_of(const Product *p, int64_t tokens, int64_t stage_work, int threads) {
    int64_t all = (p->n + LANES - 1) / LANES, k = p->dtype == SILU ? SILU_WORK : p->k;
    int64_t share = stage_work / (4 * threads) + 1, panels = share / k;
    int64_t least = tokens < 16 ? 1 : 4, most = tokens < 16 ? all : MOST_PANELS;
    panels = panels < least ? least : panels > most ? most : panels;
    /* Whole blocks of four panels, the widest that `block` takes. */
    panels = (panels + 3) / 4 * 4;
    /* An int8 task widens its panels once: the more tokens it has, the less that costs. */
    int64_t block = p->dtype == INT8 ? 1024 : 192;
    if (p->dtype == SILU && tokens >= 16) panels = all, block = 16;
    if (block > tokens) block = tokens;
    return (Cut){panels, block, (all + panels - 1) / panels, (tokens + block - 1) / block};
}

static char *thread_memory(int64_t bytes) {
    static __thread char *memory = 0;
    static __thread int64_t size = 0;
    if (size < bytes) {
        free(memory);
        /* Kept for the next call: OpenMP's threads live as long as the process. */
        memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
        size = bytes;
    }
    return memory;
}

static int64_t panels_of(const Product *p) { return (p->n + LANES - 1) / LANES; }
static int64_t work_of(const Product *p) { return panels_of(p) * (p->dtype == SILU ? SILU_WORK : p->k); }

/* All tasks of the products begin .. end, which are of one stage; every thread of the team comes here. */
static void run_stage(const Call *call, const Product *begin, const Product *end, int threads, char *memory) {
    int64_t work = 0, tasks = 0;
    for (const Product *p = begin; p < end; p++) work += work_of(p);
    for (const Product *p = begin; p < end; p++) tasks += count_of(cut_of(p, call->tokens, work, threads));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
        const Product *p = begin;
        int64_t local = task;
        Cut cut = cut_of(p, call->tokens, work, threads);
        for (; local >= count_of(cut); cut = cut_of(++p, call->tokens, work, threads)) local -= count_of(cut);
        /* Tokens inside, panels outside: neighbouring tasks read the same panels. */
        const int64_t first = local / cut.down * cut.panels, left = panels_of(p) - first, t = local % cut.down * cut.tokens;
        const int64_t last = t + cut.tokens < call->tokens ? t + cut.tokens : call->tokens;
        run_task(call, p, first, left < cut.panels ? left : cut.panels, t, last, memory);
    }
}

/* Stages whose weights fit a core's cache beside LOCAL_TOKENS rows: with many tokens a task takes some of them through all such stages,
 * so that no stage but the first reads its rows from far. */
#define LOCAL_TOKENS 64
#define LOCAL_BYTES (768 << 10)
static const Product *end_of_stage(const Product *begin, const Product *end) {
    const Product *p = begin;
    while (p < end && p->stage == begin->stage) p++;
    return p;
}

/* The end of the stages from `begin` on that run like that; `begin` where it is less than two. */
static const Product *end_of_local(const Call *call, const Product *begin, const Product *end, int threads) {
    const Product *last = begin;
    int64_t bytes = 0, stages = 0;
    /* At least two tasks a thread, or some would have none at the end. */
    while (last < end && call->tokens >= 2 * threads * LOCAL_TOKENS) {
        const Product *next = end_of_stage(last, end);
        for (const Product *p = last; p < next; p++) bytes += p->dtype == SILU ? 0 : panels_of(p) * panel_bytes(p);
        if (bytes > LOCAL_BYTES) break;
        last = next, stages++;
    }
    return stages < 2 ? begin : last;
}

static void run_local(const Call *call, const Product *begin, const Product *end, char *memory) {
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < call->tokens; t += LOCAL_TOKENS)
        for (const Product *p = begin; p < end; p++)
            for (int64_t first = 0, all = panels_of(p), most = p->dtype == SILU ? all : MOST_PANELS; first < all; first += most)
                run_task(call, p, first, all - first < most ? all - first : most, t, t + LOCAL_TOKENS < call->tokens ? t + LOCAL_TOKENS : call->tokens, memory);
}

/* With a residual [tokens, widths[0]], it and the input are written over by the chain's norm; null: it does not run. */
void neuronmlp_products(const Chain *chain, void *input, void *output, void *scratch, void *residual, int64_t tokens) {
    const Call call = {{{input, chain->widths[0]}, {output, chain->widths[1]}, {scratch, chain->widths[2]}}, tokens, chain->half};
    const Product *const end = chain->products + chain->count;
    int64_t longest = chain->norm.n, wide = 0;
    for (const Product *p = chain->products; p < end; p++) {
        const int64_t bytes = wide_bytes(p->k, (int)chain->half), all = p->dtype == INT8 ? widened_at_once(bytes) * bytes : 0;
        longest = p->k > longest ? p->k : longest;
        wide = all > wide ? all : wide;
    }
    if (use_tiles < 0) use_tiles = HAS_TILES && tiles_granted();
#pragma omp parallel
    {
        char *memory = thread_memory(float_bytes(longest) + wide);
        if (residual) run_norm(&chain->norm, input, residual, tokens, chain->half, (float *)memory);
        for (const Product *stage = chain->products, *next; stage < end; stage = next) {
            next = end_of_local(&call, stage, end, omp_get_num_threads());
            if (next > stage) run_local(&call, stage, next, memory);
            else run_stage(&call, stage, next = end_of_stage(stage, end), omp_get_num_threads(), memory);
            /* either loop ended with a barrier: the next stage may read what this one wrote */
        }
    }
}

/* Which kernels run on this processor, in words. */
const char *neuronmlp_kernels(void) {
    if (HAS_TILES && tiles_granted()) return VECTOR_NAME "; bf16 of 4 tokens and more in AMX tiles";
#if defined(__AVX512BF16__)
    return VECTOR_NAME "; bf16 of 4 tokens and more in pairs (AVX-512 BF16)";
#else
    return VECTOR_NAME;
#endif
}
