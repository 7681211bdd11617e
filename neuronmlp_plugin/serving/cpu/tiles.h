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

INLINE void store_waiting(Waiting *w, int64_t rows) {
    for (; rows && w->left; rows--, w->left--, w->sums += 32, w->y += w->y_bytes, w->add += w->add_bytes) {
        vec low = load_fp32(w->sums) * w->low;
        if (w->add_bytes) low += load_halves(w->add);
        if (!w->two) {
            store_halves(low, w->y);
            continue;
        }
        vec high = load_fp32(w->sums + LANES) * w->high;
        if (w->add_bytes) high += load_halves(w->add + 2 * LANES);
        _mm512_storeu_si512(w->y, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
}

/* sums [32][32] = x [a + b, k] times one or two panels of pairs, or of int8 (`narrow`), which are widened a step ahead. `tail`: the last k % 32 columns of x, padded with zeros, [32][32].
 * What waits is stored meanwhile, as the vectors are idle while tiles multiply, and where `next` will be stored is fetched. */
INLINE void tile_block(const uint16_t *x, int64_t stride, const uint16_t *tail, int64_t k, const char *w, int64_t panel, const int two,
                       const int narrow, int b, float *sums, Waiting *waiting, Waiting next) {
    const int64_t bytes = 2 * stride, each = (32 * 32 + k - 1) / k; /* rows stored a step */
    _tile_zero(0);
    _tile_zero(1);
    if (b) {
        _tile_zero(2);
        _tile_zero(3);
    }
    char __attribute__((aligned(64))) wide[2][2][1024];
    for (int64_t i = 0; narrow && i < 1 + two; i++) widen_step(w + i * panel, k, wide[0][i]);
    for (int64_t at = 0; at < k; at += 32) {
        const int64_t turn = at / 32 % 2;
        const uint16_t *from = k - at < 32 ? tail : x + at;
        const int64_t step = k - at < 32 ? 64 : bytes;
        for (int64_t i = 0; !narrow && i < 16; i++) {
            __builtin_prefetch(w + at * 32 + 64 * i + AHEAD);
            if (two) __builtin_prefetch(w + panel + at * 32 + 64 * i + AHEAD);
        }
        _tile_loadd(6, narrow ? wide[turn][0] : w + at * 32, 64);
        if (two) _tile_loadd(7, narrow ? wide[turn][1] : w + panel + at * 32, 64);
        _tile_loadd(4, from, step);
        _tile_dpbf16ps(0, 4, 6);
        if (two) _tile_dpbf16ps(1, 4, 7);
        if (b) {
            _tile_loadd(5, (const char *)from + 16 * step, step);
            _tile_dpbf16ps(2, 5, 6);
            if (two) _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t i = 0; narrow && at + 32 < k && i < 1 + two; i++) widen_step(w + i * panel + (at + 32) * LANES, k - at - 32, wide[!turn][i]);
        for (int64_t r = 0; r < each && next.left; r++, next.left--, next.y += next.y_bytes) __builtin_prefetch(next.y, 1);
        store_waiting(waiting, each);
    }
    store_waiting(waiting, 32);
    _tile_stored(0, sums, 128);
    if (two) _tile_stored(1, sums + 16, 128);
    if (b) {
        _tile_stored(2, sums + 16 * 32, 128);
        if (two) _tile_stored(3, sums + 16 * 32 + 16, 128);
    }
}
#else
#define HAS_TILES 0
static int tiles_granted(void) { return 0; }
#endif
