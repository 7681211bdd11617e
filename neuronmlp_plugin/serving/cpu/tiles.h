/* Products on AMX: 32 tokens by 2 panels at a time, in 4 tiles of sums. Only where the processor has it and the system grants it. */
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

/* The kernel lets a process use the tile registers once it has asked: 18 is the state of the tiles' data. */
static int tiles_granted(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; }

/* Tiles 0-3: sums of (rows a, rows b) x (panel 0, panel 1); 4, 5: x of rows a, b; 6, 7: the panels. */
static void configure_tiles(int a, int b) {
    struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    const int rows[8] = {a, a, b, b, a, b, 16, 16};
    for (int i = 0; i < 8; i++) config.rows[i] = rows[i], config.bytes[i] = rows[i] ? 64 : 0;
    _tile_loadconfig(&config);
}

/* Rows of one or two panels' sums, 32 apart, that wait to be scaled, added to and stored as bf16. */
typedef struct {
    const float *sums;
    vec low, high; /* scales */
    const char *add;
    char *y;
    int64_t add_bytes, y_bytes, two, left; /* bytes from row to row; whether both panels; rows that are left */
} Waiting;

INLINE void store_waiting(Waiting *waiting, int64_t rows) {
    const Waiting w = *waiting; /* what is stored could be it, for all that the compiler knows */
    if (rows > w.left) rows = w.left;
    const float *sums = w.sums;
    const char *add = w.add;
    char *y = w.y;
    for (int64_t r = 0; r < rows; r++, sums += 32, y += w.y_bytes, add += w.add_bytes) {
        vec low = load_fp32(sums) * w.low;
        if (w.add_bytes) low += load_halves(add);
        if (!w.two) {
            store_halves(low, y);
            continue;
        }
        vec high = load_fp32(sums + LANES) * w.high;
        if (w.add_bytes) high += load_halves(add + 2 * LANES);
        _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
    waiting->sums = sums, waiting->add = add, waiting->y = y, waiting->left -= rows;
}

/* One block of sums: x [a + b, k] times one panel or two, of pairs or of int8 (`narrow`), which are widened a step ahead. */
typedef struct {
    const uint16_t *x, *tail; /* tail: the last k % 32 columns of x, padded with zeros, [32][32] */
    int64_t stride, k, b;     /* numbers from row to row of x; rows in the second tile of x */
    const char *w;
    int64_t panel;
    float *sums; /* [32][32] */
} Block;

INLINE void load_sums(const float *from, const int two, int64_t b) {
    _tile_loadd(0, from, 128);
    if (two) _tile_loadd(1, from + 16, 128);
    if (b) _tile_loadd(2, from + 16 * 32, 128);
    if (b && two) _tile_loadd(3, from + 16 * 32 + 16, 128);
}

INLINE void store_sums(float *to, const int two, int64_t b) {
    _tile_stored(0, to, 128);
    if (two) _tile_stored(1, to + 16, 128);
    if (b) _tile_stored(2, to + 16 * 32, 128);
    if (b && two) _tile_stored(3, to + 16 * 32 + 16, 128);
}

/* The steps begin .. end of k of a block, added to its sums unless they are the first. What waits is stored meanwhile, as the vectors
 * are idle while tiles multiply. Weights are loaded past the nearest cache (`stream`), where the tokens should stay; `fresh`: from far. */
INLINE void tile_block(Block o, int64_t begin, int64_t end, const int two, const int narrow, const int fresh, Waiting *waiting) {
    const int64_t row = narrow ? LANES : 2 * LANES, part = (end - begin) * row; /* bytes */
    const char *const first = o.w + begin * row;
    const int64_t bytes = 2 * o.stride, each = (32 * 32 + end - begin - 1) / (end - begin); /* rows stored a step */
    char __attribute__((aligned(64))) wide[2][2][1024];
    _tile_zero(0);
    _tile_zero(1);
    if (o.b) {
        _tile_zero(2);
        _tile_zero(3);
    }
    if (begin) load_sums(o.sums, two, o.b);
    for (int64_t i = 0; narrow && i < 1 + two; i++)
        widen_step(first + i * o.panel, o.k - begin, wide[begin / 32 % 2][i], ahead_of(first, 0, part, 1 + two, o.panel) + i * o.panel);
    for (int64_t at = begin; at < end; at += 32) {
        /* The tail of x has rows of its own, 32 numbers long. */
        const int64_t turn = at / 32 % 2, step = o.k - at < 32 ? 64 : bytes;
        const char *from = (const char *)(o.k - at < 32 ? o.tail : o.x + at), *w = o.w + at * 32;
        const char *ahead = ahead_of(first, (at - begin + (narrow ? 32 : 0)) * row, part, 1 + two, o.panel);
        for (int64_t i = 0; fresh && i < 16; i++) {
            __builtin_prefetch(ahead + 64 * i);
            if (two) __builtin_prefetch(ahead + o.panel + 64 * i);
        }
        _tile_stream_loadd(6, narrow ? wide[turn][0] : w, 64);
        if (two) _tile_stream_loadd(7, narrow ? wide[turn][1] : w + o.panel, 64);
        _tile_loadd(4, from, step);
        _tile_dpbf16ps(0, 4, 6);
        if (two) _tile_dpbf16ps(1, 4, 7);
        if (o.b) {
            _tile_loadd(5, from + 16 * step, step);
            _tile_dpbf16ps(2, 5, 6);
            if (two) _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t i = 0; narrow && at + 32 < end && i < 1 + two; i++)
            widen_step(o.w + i * o.panel + (at + 32) * LANES, o.k - at - 32, wide[!turn][i], ahead + i * o.panel);
        store_waiting(waiting, each);
    }
    store_waiting(waiting, 32);
    store_sums(o.sums, two, o.b);
}
#else
#define HAS_TILES 0
static int tiles_granted(void) { return 0; }
#endif
