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

/* sums [32][32] = x [a + b, k] times two panels of pairs. `tail`: the last k % 32 columns of x, padded with zeros, [32][32]. */
static void tile_block(const uint16_t *x, int64_t stride, const uint16_t *tail, int64_t k, const char *w0, const char *w1, int b, float *sums) {
    const int64_t bytes = 2 * stride;
    _tile_zero(0);
    _tile_zero(1);
    if (b) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t at = 0; at < k; at += 32) {
        const uint16_t *from = k - at < 32 ? tail : x + at;
        const int64_t step = k - at < 32 ? 64 : bytes;
        _tile_loadd(6, w0 + at * 32, 64);
        _tile_loadd(7, w1 + at * 32, 64);
        _tile_loadd(4, from, step);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (b) {
            _tile_loadd(5, (const char *)from + 16 * step, step);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    if (b) {
        _tile_stored(2, sums + 16 * 32, 128);
        _tile_stored(3, sums + 16 * 32 + 16, 128);
    }
}

/* 32 sums of a row, with 32 bf16 of `add` where there are some, as bf16. */
INLINE void tile_store(vec low, vec high, const char *add, char *y) {
    if (add) {
        const __m512i halves = _mm512_loadu_si512(add);
        low += (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves)), 16);
        high += (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1)), 16);
    }
    _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#else
#define HAS_TILES 0
static int tiles_granted(void) { return 0; }
#endif
