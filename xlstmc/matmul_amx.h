// matmul_amx.h: products of float matrices on the matrix unit (AMX) that Intel's server processors have since Sapphire
// Rapids. It multiplies tiles of 16 x 32 by 32 x 16 bf16 numbers and sums in float. A float is the sum of three bf16
// numbers, of 8 bits each, and of the nine products of such parts six are computed: the other three are about 2^-26 of
// the whole, less than a float's rounding (Henry, Tang and Heinecke, ARITH 2019). What is summed are exact products of
// parts, in fewer steps than there are elements, so errors are below those of multiply-adds in float. Numbers below
// some 1e-33 lose digits, and infinity becomes NaN.
// This is the one place of the CPU trainer with intrinsics. train_xlstm.c includes it; other processors do without.
#ifndef XLSTMC_MATMUL_AMX_H
#define XLSTMC_MATMUL_AMX_H

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    AMX_TILE = 16,         // a tile register has 16 rows of 16 words: floats of C, or pairs of bf16 of A and B
    AMX_K = 2 * AMX_TILE,  // what one instruction sums over
    AMX_MN = 2 * AMX_TILE, // C is made in squares of this size, which take four of the eight registers
    AMX_WORDS = 3 * AMX_MN * AMX_K / 2,  // the parts of AMX_MN x AMX_K numbers, two a word
    AMX_KC = 512,                        // length of the blocks that K is cut into
    AMX_NR = 256                         // columns of B that a thread packs at a time
};

// Linux gives these registers only to a program that asks for them. 0: there are none
static int amx_usable(void) {
    static int usable = -1;
    const int arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
    if (usable < 0) usable = syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
    return usable;
}

// Once a thread: all tiles have their full size.
static void amx_configure(void) {
    static _Thread_local int done = 0;
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {1, 0, {0}, {0}, {0}};
    if (done) return;
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = AMX_TILE;
    }
    __asm__ volatile("" : : "r"(&config) : "memory");  // GCC 12 believes that only the first bytes are read
    _tile_loadconfig(&config);
    done = 1;
}

// The largest part of x: x rounded to the upper half of its bits. x becomes what is left.
static inline uint32_t take_part(float *x) {
    union {
        float value;
        uint32_t bits;
    } part = {*x};
    part.bits = (part.bits + 0x8000) & 0xffff0000;
    *x -= part.value;
    return part.bits;
}

// Packs src[count, K] (element i, k at i*step + k*k_step) as [count/32][K/32][3 parts][2 tiles][16 rows][16 words],
// padded with zeros. A row of a tile is one i in A, and one k of 16 in B. A word holds the numbers at k and k + 16.
static inline __attribute__((always_inline)) void pack_parts(uint32_t *dst, const float *src, size_t step,
                                                             size_t k_step, int count, int K, const int of_b) {
    float numbers[AMX_TILE * AMX_K];  // [16 i][32 k] of A, [32 k][16 i] of B
    int panels = (count + AMX_MN - 1) / AMX_MN, chunks = (K + AMX_K - 1) / AMX_K;
    for (int t = 0; t < panels * chunks * 2; t++) {  // in the order in which src lies in memory
        int panel = step == 1 ? t / 2 % panels : t / 2 / chunks, chunk = step == 1 ? t / 2 / panels : t / 2 % chunks;
        int i = panel * AMX_MN + t % 2 * AMX_TILE, n = imax(0, imin(AMX_TILE, count - i));
        int k0 = chunk * AMX_K, k = imin(AMX_K, K - k0);
        const float *from = src + i * step + k0 * k_step;
        if (n < AMX_TILE || k < AMX_K) memset(numbers, 0, sizeof numbers);
        if (of_b) copy_panels(numbers, from, step, k_step, n, k, AMX_TILE, AMX_K * k_step);
        else copy_panels(numbers, from, k_step, step, k, n, AMX_K, AMX_K * k_step);
        uint32_t *words = dst + ((size_t)panel * chunks + chunk) * AMX_WORDS + t % 2 * AMX_TILE * AMX_TILE;
        for (int row = 0; row < AMX_TILE; row++, words += AMX_TILE) {
            const float *first = numbers + row * (of_b ? AMX_TILE : AMX_K);
            const float *second = first + (of_b ? AMX_TILE * AMX_TILE : AMX_TILE);
#pragma omp simd
            for (int j = 0; j < AMX_TILE; j++) {
                float x = first[j], y = second[j];
                for (int part = 0; part < 3; part++)
                    words[part * 2 * AMX_TILE * AMX_TILE + j] = take_part(&x) >> 16 | take_part(&y);
            }
        }
    }
}

// c[32, 32] (+)= panel a of A times panel b of B, `chunks` times 32 of k. Memory from `later` on comes to L2 meanwhile,
// 24 lines a chunk. On a core that is shared, tile instructions close behind each other take half as long again as with
// a dozen others in between: fetches of the next chunk to L1, and where there are none, instructions that do nothing.
static void amx_square(int chunks, const uint32_t *a, const uint32_t *b, const uint32_t *later, float *c, size_t ldc,
                       int accumulate) {
    enum { TILE_WORDS = AMX_TILE * AMX_TILE, LINE = 16 };
    const size_t row_bytes = sizeof(float) * ldc;
    __asm__ volatile("" : : : "memory");  // GCC 12 does not know that tile loads read memory
    if (accumulate) {
        _tile_loadd(0, c, row_bytes);
        _tile_loadd(1, c + AMX_TILE, row_bytes);
        _tile_loadd(2, c + AMX_TILE * ldc, row_bytes);
        _tile_loadd(3, c + AMX_TILE * ldc + AMX_TILE, row_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int t = 0; t < chunks; t++) {
        const uint32_t *next_a = a + AMX_WORDS, *next_b = b + AMX_WORDS;
#define REST() __asm__ volatile(".rept 12\n nop\n .endr")
#define LOAD(first, second, panel, part)                            \
    _tile_loadd(first, panel + 2 * (part) * TILE_WORDS, 64);        \
    REST();                                                         \
    _tile_loadd(second, panel + (2 * (part) + 1) * TILE_WORDS, 64); \
    REST()
#define MULTIPLY_ONE(into, of_a, of_b)                                                             \
    _tile_dpbf16ps(into, of_a, of_b);                                                              \
    __builtin_prefetch(later, 0, 2);                                                               \
    for (int line = 0; line < 4; line++, next_a += LINE, next_b += LINE) __builtin_prefetch(next_a), \
        __builtin_prefetch(next_b);                                                                \
    later += LINE
#define MULTIPLY()         \
    MULTIPLY_ONE(0, 4, 6); \
    MULTIPLY_ONE(1, 4, 7); \
    MULTIPLY_ONE(2, 5, 6); \
    MULTIPLY_ONE(3, 5, 7)
        LOAD(4, 5, a, 0);
        LOAD(6, 7, b, 2);
        MULTIPLY();
        LOAD(6, 7, b, 1);
        MULTIPLY();
        LOAD(4, 5, a, 1);
        MULTIPLY();
        LOAD(6, 7, b, 0);
        MULTIPLY();
        LOAD(4, 5, a, 2);
        MULTIPLY();
        LOAD(4, 5, a, 0);
        MULTIPLY();
        a += AMX_WORDS;
        b += AMX_WORDS;
#undef REST
#undef LOAD
#undef MULTIPLY_ONE
#undef MULTIPLY
    }
    _tile_stored(0, c, row_bytes);
    _tile_stored(1, c + AMX_TILE, row_bytes);
    _tile_stored(2, c + AMX_TILE * ldc, row_bytes);
    _tile_stored(3, c + AMX_TILE * ldc + AMX_TILE, row_bytes);
}

// c[m, n] (+)= a[m, k] b[k, n] for a few panels of rows and b as pack_parts leaves it; a_parts: room for the parts of
// a. A panel of B serves all rows while the next one comes to L2.
static void amx_rows(int m, int n, int k, const float *a, size_t a_row, size_t a_col, uint32_t *a_parts,
                     const uint32_t *b, float *c, size_t ldc, int accumulate) {
    int chunks = (k + AMX_K - 1) / AMX_K;
    size_t panel = (size_t)chunks * AMX_WORDS;
    amx_configure();
    pack_parts(a_parts, a, a_row, a_col, m, k, 0);
    for (int j = 0; j < n; j += AMX_MN, b += panel)
        for (int i = 0; i < m; i += AMX_MN) {
            float edge[AMX_MN * AMX_MN], *out = c + i * ldc + j;
            int rows = imin(AMX_MN, m - i), cols = imin(AMX_MN, n - j), whole = rows == AMX_MN && cols == AMX_MN;
            for (int r = 0; !whole && accumulate && r < rows; r++)
                memcpy(edge + r * AMX_MN, out + r * ldc, sizeof(float) * cols);
            amx_square(chunks, a_parts + i / AMX_MN * panel, b, b + panel + i / AMX_MN * panel / 4, whole ? out : edge,
                       whole ? ldc : AMX_MN, accumulate);
            for (int r = 0; !whole && r < rows; r++)
                memcpy(out + r * ldc, edge + r * AMX_MN, sizeof(float) * cols);
        }
}

#endif
