// train_xlstm.c: the CPU reference trainer. Every layer of the model, forward and backward, in one file that is meant
// to be read: plain C11, fp32, OpenMP where it pays, no intrinsics but for a matrix unit (xlstmc/matmul_amx.h). It is
// also the oracle that the CUDA code is checked against. Files, flags, logging and the training loop live in xlstmc/
// and are shared with train_xlstm.cu.
//
//   build:  make train_xlstm             (OpenMP and OpenBLAS are used where they are found)
//   run:    ./train_xlstm --train text.txt --val other.txt --out out/run       (./train_xlstm --help teaches the rest)
//   test:   make test                    (test_xlstm.c includes this file with `real` = double)
//
// The model (doc/math.md): tokens -> embedding -> blocks -> norm -> classifier. A block is one of
//   mlstm     mLSTM with matrix memory and a gated FFN, as in xLSTM 7B      (arXiv 2503.13427)
//   mlstm_v1  the first paper's mLSTM between an up- and a down-projection  (arXiv 2405.04517)
//   slstm     sLSTM with recurrent weights, and a gated FFN                 (arXiv 2405.04517)
// Rows are tokens: an activation [B, T, width] is a matrix of B*T rows. Weights are [out, in], y = x W^T.

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(USE_OPENBLAS) && defined(__AVX512F__) && !defined(TESTING)
#undef USE_OPENBLAS  // with AVX-512, training is faster with the built-in product (doc/results.md)
#endif
#ifdef USE_OPENBLAS
#include <cblas.h>
#undef I  // <complex.h>, which cblas.h brings in, makes it the imaginary unit; here it is a width
#define MATMUL_NAME "OpenBLAS"
#else
#define MATMUL_NAME "built-in"
#endif

#include "xlstmc/trainer.h"  // trainer_main, Backend, Batch, ModelConfig, TensorTable, die, xcalloc

#ifdef REAL_DOUBLE  // gradient tests run the same code in double
typedef double real;
static const CommType comm_real = COMM_F64;
#else
typedef float real;
static const CommType comm_real = COMM_F32;
#endif

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }

// ----------------------------------------------------------------------------------------------------------------
// Elementary functions. In float they are short polynomials without branches, so that the compiler turns the loops
// around them into vector code; a NaN stays a NaN through all of them.

#ifdef REAL_DOUBLE
static inline real exp_real(real x) { return exp(x); }
static inline real tanh_real(real x) { return tanh(x); }
static inline real normal_cdf(real x) { return 0.5 * erfc(-x * 0.70710678118654752); }
static inline real log1p_unit(real x) { return log1p(x); }
static inline real sqrt_real(real x) { return sqrt(x); }
#else
static inline real exp_real(real x) {
    // x = n ln2 + r with |r| <= ln2/2; e^r by its series (the first term left out is below 6e-9), 2^n by its bits.
    union {
        float value;
        uint32_t bits;
    } shifted, scale;
    real y = x < -87.0f ? -87.0f : x;
    y = y > 88.37f ? 88.37f : y;
    shifted.value = y * 1.44269504f + 12582912.0f;  // rounds to the nearest integer n, which is its low bits
    real n = shifted.value - 12582912.0f;
    real r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts, the first exact in few bits
    real p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    scale.bits = (shifted.bits + 127u) << 23;
    real e = p * scale.value;
    e = x < -87.0f ? 0.0f : e;
    return x > 88.37f ? INFINITY : e;  // 2^n would be out of range a little before e^x is
}

static inline real tanh_real(real x) {
    real x2 = x * x;
    real series = x * (1 + x2 * (-1.0f / 3 + x2 * (2.0f / 15 + x2 * (-17.0f / 315 + x2 * (62.0f / 2835)))));
    real direct = 1 - 2 / (exp_real(2 * x) + 1);  // loses digits near 0, where the series is exact
    return x2 < 0.0625f ? series : direct;
}

static inline real normal_cdf(real x) {
    // erfc(z) e^{z^2} as a polynomial in 1/(1 + p z): Abramowitz and Stegun 7.1.26, absolute error 1.5e-7
    real z = (x < 0 ? -x : x) * 0.70710678f, t = 1 / (1 + 0.3275911f * z);
    real tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    tail *= 0.5f * exp_real(-z * z);
    return x < 0 ? tail : 1 - tail;
}

static inline real sqrt_real(real x) { return sqrtf(x); }
static inline real log1p_unit(real x) {  // log(1 + x) for 0 <= x <= 1: 2 atanh(x / (2 + x)) by its series
    real w = x / (2 + x), w2 = w * w;
    return 2 * w *
           (1 + w2 * (1.0f / 3 + w2 * (1.0f / 5 + w2 * (1.0f / 7 + w2 * (1.0f / 9 + w2 * (1.0f / 11 + w2 / 13))))));
}
#endif

static inline real sigmoid(real x) { return 1 / (1 + exp_real(-x)); }
static inline real silu(real x) { return x * sigmoid(x); }
static inline real silu_grad(real x) {
    real s = sigmoid(x);
    return s * (1 + x * (1 - s));
}
static inline real gelu(real x) { return x * normal_cdf(x); }
static inline real gelu_grad(real x) { return normal_cdf(x) + x * (real)0.3989422804014327 * exp_real(-x * x / 2); }
static double log_sigmoid(double x) { return (x < 0 ? x : 0) - log1p(exp(-fabs(x))); }

static real dot(const real *a, const real *b, size_t n) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t k = 0; k < n; k++) sum += a[k] * b[k];
    return sum;
}

// ----------------------------------------------------------------------------------------------------------------
// Matrix product: C[i,j] (+)= sum_k A[i,k] B[k,j]. A and B are given with two strides, so a transpose costs nothing
// to write. As in Goto and van de Geijn (ACM TOMS 34, 2008): blocks of A and B are copied into panels that fit the
// caches, and a micro-kernel keeps a tile of C in registers. Each element of C is summed over k in the same order
// however many threads there are, so the result does not depend on their number.

#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, MR = 12, EMBEDDED = 9 };  // 24 of 32 registers hold the tile of C
#define KEEP_REGISTERS(x, y) __asm__("" : "+v"(x), "+v"(y))  // else GCC moves sums from one to another
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, MR = 6, EMBEDDED = 0 };  // 12 of 16
#else
enum { VECTOR_BYTES = 16, MR = 6, EMBEDDED = 0 };
#endif
#ifndef KEEP_REGISTERS
#define KEEP_REGISTERS(x, y) (void)0
#endif
typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
enum { VLEN = VECTOR_BYTES / sizeof(real), NR = 2 * VLEN };
enum { KC = 512, MC = 4 * MR, NC = 2048 };  // a block KC x MC of A stays in L2, a block KC x NC of B in L3
enum { SUMS_KC = 704 };                     // the same for Strassen's sums: 7 of (KC/2) x MC, 7 of (KC/2) x (NC/2)

// acc[rows, NR] += a[MR] b[NR]; rows is a constant after inlining, so the accumulators become registers.
// An element of a that serves two products costs an instruction that spreads it over a register. AVX-512 can also
// spread it within the product, for a second load. The first EMBEDDED rows do that, the others not: as many as there
// are free loads, two for every two products. On a core that is shared instruction slots are what is short.
static inline __attribute__((always_inline)) void multiply_step(vec acc[MR][2], const int rows, const real *a,
                                                                const real *again, const real *b) {
    vec b0 = *(const vec *)b, b1 = *(const vec *)(b + VLEN);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        acc[r][0] += a[r] * b0;
        acc[r][1] += (r < EMBEDDED ? again : a)[r] * b1;
        KEEP_REGISTERS(acc[r][0], acc[r][1]);
    }
}

// acc[rows, NR] = a[K, MR]^T b[K, NR]. With fetch_next memory from `next` on comes to L2 meanwhile, a line of it every
// next_step elements.
static inline __attribute__((always_inline)) void multiply_tile(vec acc[MR][2], const int rows, int K, const real *a,
                                                                size_t a_step, const real *b, size_t b_step,
                                                                const int fetch_next, const real *next,
                                                                size_t next_step) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = (vec){0};
    const real *again = a;
    __asm__("" : "+r"(again));  // hides that both are the same, or the compiler would load once
    for (int k = K; k > 1; k -= 2, a += 2 * a_step, again += 2 * a_step, b += 2 * b_step) {
        if (fetch_next) {
            __builtin_prefetch(next, 0, 2);
            next += next_step;
        } else {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)  // from L2 in time; past the end it does nothing
                __builtin_prefetch(b + (10 + i / 2) * b_step + i % 2 * VLEN);
        }
        multiply_step(acc, rows, a, again, b);
        multiply_step(acc, rows, a + a_step, again + a_step, b + b_step);
    }
    if (K % 2) multiply_step(acc, rows, a, again, b);
}

// The tile of C will be wanted at the end of the product.
static inline __attribute__((always_inline)) void prefetch_tile(const int rows, const real *c, size_t ldc) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        __builtin_prefetch(c + r * ldc, 1);
        __builtin_prefetch(c + r * ldc + VLEN, 1);
    }
}

// c[rows, cols] = acc (how 0), c + acc (1) or c - acc (-1)
static inline __attribute__((always_inline)) void write_tile(const vec acc[MR][2], const int max_rows, int rows,
                                                             int cols, real *c, size_t ldc, int how) {
    if (rows == max_rows && cols == NR) {
#pragma GCC unroll 16
        for (int r = 0; r < max_rows; r++) {
            vec *out = (vec *)(c + r * ldc);
            for (int v = 0; v < 2; v++)
                if (how == 0) out[v] = acc[r][v];
                else if (how > 0) out[v] += acc[r][v];
                else out[v] -= acc[r][v];
        }
    } else {
        real tile[MR][NR];
#pragma GCC unroll 16
        for (int r = 0; r < max_rows; r++) {
            *(vec *)tile[r] = acc[r][0];
            *(vec *)(tile[r] + VLEN) = acc[r][1];
        }
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < cols; j++)
                c[r * ldc + j] = (how ? c[r * ldc + j] : 0) + (how < 0 ? -tile[r][j] : tile[r][j]);
    }
}

// c[rows, cols] (+)= a[K, MR]^T b[K, NR]
static inline __attribute__((always_inline)) void micro_kernel(const int rows, int cols, int K, const real *a,
                                                               size_t a_step, const real *b, size_t b_step, real *c,
                                                               size_t ldc, int accumulate) {
    vec acc[MR][2];
    prefetch_tile(rows, c, ldc);
    multiply_tile(acc, rows, K, a, a_step, b, b_step, 0, NULL, 0);
    write_tile(acc, rows, rows, cols, c, ldc, accumulate);
}

static void micro_kernel_rows(int rows, int cols, int K, const real *a, size_t a_step, const real *b, size_t b_step,
                              real *c, size_t ldc, int accumulate) {
#define ROWS(n) \
    case n: micro_kernel(n, cols, K, a, a_step, b, b_step, c, ldc, accumulate); break;
    switch (rows) {
        ROWS(1)
        ROWS(2)
        ROWS(3)
        ROWS(4)
        ROWS(5)
        ROWS(6)
#if defined(__AVX512F__)
        ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#endif
    }
#undef ROWS
}

typedef real quad __attribute__((vector_size(4 * sizeof(real)), aligned(sizeof(real)), may_alias));
#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#elif defined(REAL_DOUBLE)
typedef int64_t lanes __attribute__((vector_size(4 * sizeof(int64_t))));
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (lanes){__VA_ARGS__})
#else
typedef int32_t lanes __attribute__((vector_size(4 * sizeof(int32_t))));
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (lanes){__VA_ARGS__})
#endif

// dst[k*width + i] = src[i*step + k] for 4 x 4 elements, transposed in registers
static inline void transpose4(real *dst, size_t width, const real *src, size_t step) {
    quad row0 = *(const quad *)src, row1 = *(const quad *)(src + step);
    quad row2 = *(const quad *)(src + 2 * step), row3 = *(const quad *)(src + 3 * step);
    quad low01 = SHUFFLE(row0, row1, 0, 4, 1, 5), high01 = SHUFFLE(row0, row1, 2, 6, 3, 7);
    quad low23 = SHUFFLE(row2, row3, 0, 4, 1, 5), high23 = SHUFFLE(row2, row3, 2, 6, 3, 7);
    *(quad *)dst = SHUFFLE(low01, low23, 0, 1, 4, 5);
    *(quad *)(dst + width) = SHUFFLE(low01, low23, 2, 3, 6, 7);
    *(quad *)(dst + 2 * width) = SHUFFLE(high01, high23, 0, 1, 4, 5);
    *(quad *)(dst + 3 * width) = SHUFFLE(high01, high23, 2, 3, 6, 7);
}

// Copies src[count, K] (element i, k at i*step + k*k_step) into panels [count/width][K][width], padded with zeros.
// Whole panels go by rows (step 1) or by 4 x 4 transposes (k_step 1): element by element it would take a fifth of the
// time of a product. What lies `ahead` elements further is fetched meanwhile; past the end that does nothing.
static inline __attribute__((always_inline)) void copy_panels(real *dst, const real *src, size_t step, size_t k_step,
                                                              int count, int K, const int width, size_t ahead) {
    int whole = step == 1 || (k_step == 1 && width % 4 == 0) ? count / width : 0;
    int k_whole = step == 1 ? K : K & ~15;
    if (step == 1)
        for (int k = 0; k < K; k++)
            for (int p = 0; p < whole; p++) {
                const real *from = src + k * k_step + (size_t)p * width;
                for (int i = 0; i < width; i += 64 / (int)sizeof(real)) __builtin_prefetch(from + ahead + i);
                memcpy(dst + ((size_t)p * K + k) * width, from, sizeof(real) * width);
            }
    else
        for (int i = 0; i < whole * width; i += width)
            for (int k0 = 0; k0 < k_whole; k0 += 16) {  // a few lines of dst at a time, which then stay in L1
                for (int r = 0; r < width; r++) __builtin_prefetch(src + (i + r) * step + k0 + ahead, 0, 2);
                for (int r = 0; r < width; r += 4)
                    for (int k = k0; k < k0 + 16; k += 4)
                        transpose4(dst + (size_t)i * K + (size_t)k * width + r, width, src + (i + r) * step + k, step);
            }
    for (int i0 = 0; i0 < count; i0 += width) {  // what is left
        int n = imin(width, count - i0);
        real *panel = dst + (size_t)i0 * K;
        if (n < width) memset(panel, 0, sizeof(real) * (size_t)K * width);
        for (int k = i0 < whole * width ? k_whole : 0; k < K; k++)
            for (int i = 0; i < n; i++) panel[(size_t)k * width + i] = src[(i0 + i) * step + k * k_step];
    }
}

// Rows and panels that come next are fetched ahead.
static inline __attribute__((always_inline)) void pack_panels(real *dst, const real *src, size_t step, size_t k_step,
                                                              int count, int K, const int width) {
    copy_panels(dst, src, step, k_step, count, K, width, step == 1 ? 16 * k_step : width * step);
}

// This thread's room for the panels of A.
static real *panels_of_a(void) {
    static _Thread_local real *panels = NULL;
    if (!panels) panels = (real *)xcalloc((size_t)SUMS_KC / 2 * MC * 7, sizeof(real));
    return panels;
}

// c[m, n] (+)= a[m, k] b[k, n] for m <= MC rows and a block of B: rows of it are b_step apart, and the columns from j
// on begin at b + j * b_step_j, as in panels or as in a matrix
static void gemm_rows(int m, int n, int k, const real *a, size_t a_row, size_t a_col, const real *b, size_t b_step,
                      size_t b_step_j, real *c, size_t ldc, int accumulate) {
    real *a_panels = panels_of_a();
    pack_panels(a_panels, a, a_row, a_col, m, k, MR);
    for (int j = 0; j < n; j += NR)
        for (int i = 0; i < m; i += MR)
            micro_kernel_rows(imin(MR, m - i), imin(NR, n - j), k, a_panels + (size_t)i * k, MR, b + j * b_step_j,
                              b_step, c + i * ldc + j, ldc, accumulate);
}

#ifndef USE_OPENBLAS
// One level of Strassen's algorithm (Numerische Mathematik 13, 1969): with A, B and C in quarters 11, 12, 21, 22, seven
// products of sums of quarters do instead of eight. As in Huang, Smith, Henry and van de Geijn (SC16), sums of A and B
// are made while they are packed, and the micro-kernel adds its tile to every quarter of C that wants it, so nothing is
// stored in between. The quarters interleave: of two neighbouring tiles of rows (columns) the first belongs to the
// upper (left) half. So all seven products of a few tiles of C come one after the other while those are in the cache,
// and how rows are shared out changes no bit. An eighth of the multiplications is saved, for half as much packing again
// and three times the traffic with C. Errors stay a small multiple of eps |A| |B|, but with norms of the matrices
// instead of the single rows and columns: a small element of C has fewer right digits if large ones are around it.
static const struct {
    signed char a[4], b[4], c[4];  // signs of the quarters; 2 in C: +, and the first product that is added there
} strassen[7] = {
    {{1, 0, 0, 1}, {1, 0, 0, 1}, {2, 0, 0, 2}},  {{0, 0, 1, 1}, {1, 0, 0, 0}, {0, 0, 2, -1}},
    {{1, 0, 0, 0}, {0, 1, 0, -1}, {0, 2, 0, 1}}, {{0, 0, 0, 1}, {-1, 0, 1, 0}, {1, 0, 1, 0}},
    {{1, 1, 0, 0}, {0, 0, 0, 1}, {-1, 1, 0, 0}}, {{-1, 0, 1, 0}, {1, 1, 0, 0}, {0, 0, 0, 1}},
    {{0, 1, 0, -1}, {0, 0, 1, 1}, {1, 0, 0, 0}},
};
static int strassen_min = 512;  // all of M, N and K: below it does not pay

// Rows of a half of K, padded so that they fill whole vectors in a panel
static int half_length(int K) { return (K + 7) / 8 * 4; }

// Copies src[count, K] as pack_panels does, but as the seven sums of quarters: [count/(2 width)][7][half of K][width]
static inline __attribute__((always_inline)) void pack_sums(real *dst, const real *src, size_t step, size_t k_step,
                                                            int count, int K, const int width, const int of_b) {
    enum { CHUNK = 16 };  // of K; a chunk of all quarters fits L1
    real quarter[4][CHUNK * NR];
    int half = half_length(K), pairs = (count + 2 * width - 1) / (2 * width), chunks = (half + CHUNK - 1) / CHUNK;
    for (int t = 0; t < pairs * chunks; t++) {  // in the order in which src lies in memory
        int pair = step == 1 ? t % pairs : t / chunks, k0 = (step == 1 ? t / pairs : t % chunks) * CHUNK;
        int length = imin(CHUNK, half - k0);
        for (int q = 0; q < 4; q++) {
            int i = pair * 2 * width + (of_b ? q % 2 : q / 2) * width, k = k0 + (of_b ? q / 2 : q % 2) * half;
            int n = imin(width, count - i), filled = imax(0, imin(length, K - k));
            if (n <= 0 || filled < length) memset(quarter[q], 0, sizeof quarter[q]);
            copy_panels(quarter[q], src + i * step + k * k_step, step, k_step, n, filled, width, CHUNK * k_step);
        }
        real *out = dst + ((size_t)pair * 7 * half + k0) * width;
        for (int e = 0; e < length * width; e += VLEN)
#pragma GCC unroll 7
            for (int r = 0; r < 7; r++) {
                const signed char *sign = of_b ? strassen[r].b : strassen[r].a;
                vec sum = {0};
#pragma GCC unroll 4
                for (int q = 0; q < 4; q++)
                    if (sign[q] > 0) sum += *(const vec *)(quarter[q] + e);
                    else if (sign[q] < 0) sum -= *(const vec *)(quarter[q] + e);
                *(vec *)(out + (size_t)r * half * width + e) = sum;
            }
    }
}

// Product r of a pair of tiles of rows and a pair of tiles of columns, of which C has rows x cols.
static void strassen_tile(int r, int half, const real *a, const real *b, real *c, size_t ldc, int rows, int cols,
                          int accumulate, const real *next, size_t next_step) {
    vec acc[MR][2];
    for (int q = 0; q < 4; q++)
        if (strassen[r].c[q] == 2) prefetch_tile(MR, c + q / 2 * MR * ldc + q % 2 * NR, ldc);
    multiply_tile(acc, MR, half, a, MR, b, NR, 1, next, next_step);
    for (int q = 0; q < 4; q++) {
        int sign = strassen[r].c[q], m = imin(MR, rows - q / 2 * MR), n = imin(NR, cols - q % 2 * NR);
        if (sign && m > 0 && n > 0)
            write_tile(acc, MR, m, n, c + q / 2 * MR * ldc + q % 2 * NR, ldc, sign == 2 ? accumulate : sign);
    }
}

// c[m, n] (+)= a[m, k] b[k, n] for m <= 2 MC rows and sums of B as pack_sums leaves them. A panel of B is used for all
// rows, while the next one comes from L3 to L2: waiting for it would cost half of what is saved.
static void strassen_rows(int m, int n, int k, const real *a, size_t a_row, size_t a_col, const real *b, real *c,
                          size_t ldc, int accumulate) {
    real *a_sums = panels_of_a();
    int half = half_length(k), pairs = (m + 2 * MR - 1) / (2 * MR), next_step = 2 * NR / pairs;
    pack_sums(a_sums, a, a_row, a_col, m, k, MR, 0);
    for (int j = 0; j < n; j += 2 * NR)
        for (int r = 0; r < 7; r++, b += (size_t)half * NR)
            for (int i = 0; i < pairs; i++)
                strassen_tile(r, half, a_sums + ((size_t)i * 7 + r) * half * MR, b, c + i * 2 * MR * ldc + j, ldc,
                              m - i * 2 * MR, n - j, accumulate, b + (size_t)half * (NR + i * NR / pairs), next_step);
}
#endif

#if defined(__AMX_BF16__) && defined(__linux__) && !defined(REAL_DOUBLE) && !defined(USE_OPENBLAS)
#define USE_AMX
#include "xlstmc/matmul_amx.h"  // amx_usable, pack_parts, amx_rows: products on a matrix unit, to a float's rounding
static int amx_min = 256;       // all of M, N and K: below it gains nothing
#endif

// Length of the blocks that K is cut into. They are about equal: a short last one would cost a whole pass over C.
static int block_length(int K, int max_length) {
    int blocks = (K + max_length - 1) / max_length;
    return blocks > 1 ? ((K + blocks - 1) / blocks + 31) / 32 * 32 : imax(K, 1);
}

// The product on one thread.
static void gemm_serial(int M, int N, int K, const real *a, size_t a_row, size_t a_col, const real *b, size_t b_row,
                        size_t b_col, real *c, size_t ldc, int accumulate) {
    static _Thread_local real *b_panels = NULL;
#ifdef USE_OPENBLAS
    if ((double)M * N * K > 32768 && (a_row == 1 || a_col == 1) && (b_row == 1 || b_col == 1)) {
        int trans_a = a_col != 1, trans_b = b_col != 1;
        cblas_sgemm(CblasRowMajor, trans_a ? CblasTrans : CblasNoTrans, trans_b ? CblasTrans : CblasNoTrans, M, N, K, 1,
                    a, (int)imax((int)(trans_a ? a_col : a_row), 1), b, (int)(trans_b ? b_col : b_row), accumulate, c,
                    (int)ldc);
        return;
    }
#endif
    if (!b_panels) b_panels = (real *)xcalloc((size_t)KC * NC, sizeof(real));
    for (int n0 = 0; n0 < N; n0 += NC)
        for (int k0 = 0, length = block_length(K, KC); k0 < K; k0 += length) {
            int n = imin(NC, N - n0), k = imin(length, K - k0);
            const real *block = b + k0 * b_row + n0 * b_col;
            int in_place = M <= MC && b_col == 1 && n % NR == 0;  // few rows read B too seldom to repay a copy
            if (!in_place) pack_panels(b_panels, block, b_col, b_row, n, k, NR);
            for (int m0 = 0; m0 < M; m0 += MC)
                gemm_rows(imin(MC, M - m0), n, k, a + m0 * a_row + k0 * a_col, a_row, a_col,
                          in_place ? block : b_panels, in_place ? b_row : NR, in_place ? 1 : k, c + m0 * ldc + n0, ldc,
                          accumulate || k0 > 0);
        }
}

// The product on all threads.
static void gemm(int M, int N, int K, const real *a, size_t a_row, size_t a_col, const real *b, size_t b_row,
                 size_t b_col, real *c, size_t ldc, int accumulate) {
    int threads = 1;
    enum { DIRECTLY, BY_SUMS, BY_PARTS } way = DIRECTLY;
#ifndef USE_OPENBLAS
    if (imin(M, imin(N, K)) >= strassen_min) way = BY_SUMS;
#endif
#ifdef USE_AMX
    if (imin(M, imin(N, K)) >= amx_min && amx_usable()) way = BY_PARTS;
#endif
#ifdef _OPENMP
    if ((double)M * N * K > 20000) threads = omp_get_max_threads();
#endif
    if (threads == 1 && way == DIRECTLY) {
        gemm_serial(M, N, K, a, a_row, a_col, b, b_row, b_col, c, ldc, accumulate);
        return;
    }
#ifdef USE_OPENBLAS  // a grid of one rectangle of C a thread
    int grid_m = 1, grid_n = 1;
    while (grid_m * grid_n * 2 <= threads)
        if (M / grid_m >= N / grid_n) grid_m *= 2;
        else grid_n *= 2;
    int rows = MR * ((M + MR * grid_m - 1) / (MR * grid_m)), cols = NR * ((N + NR * grid_n - 1) / (NR * grid_n));
#pragma omp parallel for
    for (int task = 0; task < grid_m * grid_n; task++) {
        int i = task / grid_n * rows, j = task % grid_n * cols;
        if (i < M && j < N)
            gemm_serial(imin(rows, M - i), imin(cols, N - j), K, a + i * a_row, a_row, a_col, b + j * b_col, b_row,
                        b_col, c + i * ldc + j, ldc, accumulate);
    }
#else  // The threads take rows of C, one block of B after the other. Who finds no rows left packs panels of the next
       // block into a second buffer, so that the threads wait for each other only once a block.
    static real *b_panels[2];
    int mr = way == BY_SUMS ? 2 * MR : MR, nr = way == BY_SUMS ? 2 * NR : NR, kc = way == BY_SUMS ? SUMS_KC : KC;
#ifdef USE_AMX
    if (way == BY_PARTS) mr = AMX_MN, nr = AMX_NR, kc = AMX_KC;
#endif
    int rows = mr * imax(1, imin(MC / MR, M / (5 * MR * threads)));
    int length = block_length(K, kc), k_blocks = (K + length - 1) / length;
    int blocks = (N + NC - 1) / NC * k_blocks;
    for (int i = 0; i < 2; i++)
        if (!b_panels[i]) b_panels[i] = (real *)xcalloc((size_t)SUMS_KC / 2 * (NC / 2) * 7, sizeof(real));
#pragma omp parallel
    for (int packed = 0; packed <= blocks; packed++) {
        if (packed > 0) {
            int n0 = (packed - 1) / k_blocks * NC, n = imin(NC, N - n0);
            int k0 = (packed - 1) % k_blocks * length, k = imin(length, K - k0);
            const real *panels = b_panels[(packed - 1) % 2];
#pragma omp for schedule(dynamic) nowait
            for (int m0 = 0; m0 < M; m0 += rows) {
                const real *a_rows = a + m0 * a_row + k0 * a_col;
                real *c_rows = c + m0 * ldc + n0;
                int m = imin(rows, M - m0), add = accumulate || k0 > 0;
#ifdef USE_AMX
                if (way == BY_PARTS) {
                    amx_rows(m, n, k, a_rows, a_row, a_col, (uint32_t *)panels_of_a(), (const uint32_t *)panels, c_rows,
                             ldc, add);
                    continue;
                }
#endif
                if (way == BY_SUMS) strassen_rows(m, n, k, a_rows, a_row, a_col, panels, c_rows, ldc, add);
                else gemm_rows(m, n, k, a_rows, a_row, a_col, panels, NR, k, c_rows, ldc, add);
            }
        }
        if (packed < blocks) {
            int n0 = packed / k_blocks * NC, n = imin(NC, N - n0);
            int k0 = packed % k_blocks * length, k = imin(length, K - k0);
            const real *block = b + k0 * b_row + n0 * b_col;
            real *panels = b_panels[packed % 2];
#pragma omp for schedule(dynamic)
            for (int j = 0; j < n; j += nr) {
                const real *columns = block + j * b_col;
                int count = imin(nr, n - j);
#ifdef USE_AMX
                if (way == BY_PARTS) {
                    pack_parts((uint32_t *)panels + (size_t)(j / AMX_MN) * ((k + AMX_K - 1) / AMX_K) * AMX_WORDS,
                               columns, b_col, b_row, count, k, 1);
                    continue;
                }
#endif
                if (way == BY_SUMS)
                    pack_sums(panels + (size_t)(j / nr) * 7 * half_length(k) * NR, columns, b_col, b_row, count, k, NR,
                              1);
                else pack_panels(panels + (size_t)j * k, columns, b_col, b_row, count, k, NR);
            }
        }
    }
#endif
}

// dst = src. One thread alone does not get all that memory gives.
static void copy(real *dst, const real *src, size_t count) {
#pragma omp parallel for if (count > 100000)
    for (size_t i = 0; i < count; i++) dst[i] = src[i];
}

// out[4] = x[K] times four rows of w[4, K]: four streams at once get more out of memory than one.
static void dot4(real *out, const real *x, const real *w, size_t K) {
    const real *w1 = w + K, *w2 = w1 + K, *w3 = w2 + K;
    real s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (size_t k = 0; k < K; k++) {
        s0 += x[k] * w[k];
        s1 += x[k] * w1[k];
        s2 += x[k] * w2[k];
        s3 += x[k] * w3[k];
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

// out[rows, N] (+)= x[rows, K] w[N, K]^T. With one or two rows (generation) the weights are read once, in place.
static void matmul_forward(real *out, size_t ld_out, const real *x, size_t ld_x, const real *w, int rows, int N, int K,
                           int accumulate) {
    if (rows > 2) {
        gemm(rows, N, K, x, ld_x, 1, w, 1, K, out, ld_out, accumulate);
        return;
    }
#pragma omp parallel for if ((double)N * K > 20000)
    for (int j0 = 0; j0 < N; j0 += 4)
        for (int r = 0; r < rows; r++) {
            real sums[4];
            if (j0 + 4 <= N) dot4(sums, x + r * ld_x, w + (size_t)j0 * K, K);
            else
                for (int j = j0; j < N; j++) sums[j - j0] = dot(x + r * ld_x, w + (size_t)j * K, K);
            for (int j = j0; j < imin(j0 + 4, N); j++)
                out[r * ld_out + j] = (accumulate ? out[r * ld_out + j] : 0) + sums[j - j0];
        }
}

// dx[rows, K] (+)= dout[rows, N] w[N, K];  dw[N, K] += dout^T x[rows, K]. Either of dx and dw may be NULL.
static void matmul_backward(real *dx, size_t ld_dx, int accumulate_dx, real *dw, const real *dout, size_t ld_dout,
                            const real *x, size_t ld_x, const real *w, int rows, int N, int K) {
    if (dx) gemm(rows, K, N, dout, ld_dout, 1, w, K, 1, dx, ld_dx, accumulate_dx);
    if (dw) gemm(N, K, rows, dout, 1, ld_dout, x, ld_x, 1, dw, K, 1);
}

// ----------------------------------------------------------------------------------------------------------------
// Sums over rows (gradients of scales and biases). Rows are cut into a number of parts that does not depend on the
// threads; each part has its own partial sums, which are then added in order.

enum { MAX_PARTS = 64 };
static int num_parts(int rows) { return imin(MAX_PARTS, (rows + 15) / 16); }
static int part_begin(int part, int parts, int rows) { return (int)((long long)rows * part / parts); }

// dst[width] += sum over parts of partial[part, width]
static void add_partials(real *dst, const real *partial, int parts, size_t width) {
#pragma omp parallel for
    for (size_t c = 0; c < width; c++) {
        real sum = 0;
        for (int p = 0; p < parts; p++) sum += partial[p * width + c];
        dst[c] += sum;
    }
}

// db[width] += column sums of dout[rows, width]
static void bias_backward(real *db, const real *dout, size_t ld, int rows, int width, real *partial) {
    int parts = num_parts(rows);
#pragma omp parallel for
    for (int p = 0; p < parts; p++) {
        real *sum = partial + (size_t)p * width;
        memset(sum, 0, sizeof(real) * width);
        for (int r = part_begin(p, parts, rows); r < part_begin(p + 1, parts, rows); r++)
            for (int c = 0; c < width; c++) sum[c] += dout[r * ld + c];
    }
    add_partials(db, partial, parts, width);
}

// ----------------------------------------------------------------------------------------------------------------
// Norms. RMSNorm scales by w, LayerNorm subtracts the mean; the first paper's blocks store w with a factor of 1 + w.
// A head-wise norm is the same on `groups` rows a token, each group with its own slice of w.

typedef struct {
    int center;    // 1: LayerNorm, 0: RMSNorm
    int plus_one;  // 1: scale 1 + w, 0: scale w
    int groups;    // rows a token; w is [groups, width]
    int width;
    real eps;
} Norm;

// out = (x - mean) * rstd * scale;  x, out [tokens, groups, width]; stats [tokens, groups, 2]: mean, rstd
static void norm_forward(real *out, real *stats, const real *x, const real *w, const Norm *n, int tokens) {
    int width = n->width;
#pragma omp parallel for
    for (int row = 0; row < tokens * n->groups; row++) {
        const real *in = x + (size_t)row * width, *scale = w + (size_t)(row % n->groups) * width;
        real *o = out + (size_t)row * width, mean = 0, square = 0, one = (real)n->plus_one;
        if (n->center) {
#pragma omp simd reduction(+ : mean)
            for (int c = 0; c < width; c++) mean += in[c];
            mean /= width;
        }
#pragma omp simd reduction(+ : square)
        for (int c = 0; c < width; c++) square += (in[c] - mean) * (in[c] - mean);
        real rstd = 1 / sqrt_real(square / width + n->eps);
        for (int c = 0; c < width; c++) o[c] = (in[c] - mean) * rstd * (one + scale[c]);
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
}

// dx (+)= gradient; dw += its part. With xh = (x - mean) rstd and g = dout * scale:
// dx = rstd (g - [mean(g)] - xh mean(g xh)), the bracket only for LayerNorm.
static void norm_backward(real *dx, int accumulate, real *dw, const real *dout, const real *x, const real *stats,
                          const real *w, const Norm *n, int tokens, real *partial) {
    int width = n->width, groups = n->groups, parts = num_parts(tokens);
    size_t all = (size_t)groups * width;
#pragma omp parallel for
    for (int p = 0; p < parts; p++) {
        memset(partial + p * all, 0, sizeof(real) * all);
        for (int row = part_begin(p, parts, tokens) * groups; row < part_begin(p + 1, parts, tokens) * groups; row++) {
            const real *in = x + (size_t)row * width, *scale = w + (size_t)(row % groups) * width;
            const real *dy = dout + (size_t)row * width;
            real *d = dx + (size_t)row * width, *sum = partial + p * all + (size_t)(row % groups) * width;
            real mean = stats[2 * row], rstd = stats[2 * row + 1], one = (real)n->plus_one, g_mean = 0, gx_mean = 0;
#pragma omp simd reduction(+ : g_mean, gx_mean)
            for (int c = 0; c < width; c++) {
                real xh = (in[c] - mean) * rstd, g = dy[c] * (one + scale[c]);
                g_mean += g;
                gx_mean += g * xh;
                sum[c] += dy[c] * xh;
            }
            g_mean = n->center ? g_mean / width : 0;
            gx_mean /= width;
            for (int c = 0; c < width; c++) {
                real xh = (in[c] - mean) * rstd, g = dy[c] * (one + scale[c]);
                d[c] = (accumulate ? d[c] : 0) + rstd * (g - g_mean - xh * gx_mean);
            }
        }
    }
    add_partials(dw, partial, parts, all);
}

// ----------------------------------------------------------------------------------------------------------------
// Gated FFN activation: out = act(gate) * up;  gate_up [rows, 2U]: gate in columns 0..U-1, up behind it

static void gated_forward(real *out, const real *gate_up, int rows, int width, int use_gelu) {
#pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        const real *g = gate_up + (size_t)r * 2 * width, *up = g + width;
        real *o = out + (size_t)r * width;
        if (use_gelu)
            for (int c = 0; c < width; c++) o[c] = gelu(g[c]) * up[c];
        else
            for (int c = 0; c < width; c++) o[c] = silu(g[c]) * up[c];
    }
}

static void gated_backward(real *dgate_up, const real *dout, const real *gate_up, int rows, int width, int use_gelu) {
#pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        const real *g = gate_up + (size_t)r * 2 * width, *up = g + width, *dy = dout + (size_t)r * width;
        real *dg = dgate_up + (size_t)r * 2 * width, *dup = dg + width;
        if (use_gelu)
            for (int c = 0; c < width; c++) {
                dg[c] = dy[c] * up[c] * gelu_grad(g[c]);
                dup[c] = dy[c] * gelu(g[c]);
            }
        else
            for (int c = 0; c < width; c++) {
                dg[c] = dy[c] * up[c] * silu_grad(g[c]);
                dup[c] = dy[c] * silu(g[c]);
            }
    }
}

// ----------------------------------------------------------------------------------------------------------------
// A batch as the layers see it

typedef struct {
    int B, T;
    const unsigned char *resets;   // [B, T] 1: fresh states before this token; NULL: none
    const unsigned char *history;  // [B, T] how many of the 3 tokens before belong to the same document
    const real *state_in;          // [B][state_row] states before the first token; NULL: fresh
    real *state_out;               // [B][state_row] states after the last; NULL: not wanted
    size_t state_row;
    int recurrent;  // generation: the mLSTM takes its recurrent form
    // Sequence parallelism: the T tokens are this rank's segment of sequences of `whole` tokens, 0: they are all. Each
    // block fills state_in with what the segments before have left, and dstate with the gradient of what this one
    // leaves.
    int whole;
    const real *state_first;            // [B][state_row] states before the whole sequence; NULL: fresh
    real *dstate;                       // [B][state_row]
    const unsigned char *whole_resets;  // [B, whole] or NULL
} Sequence;

// history[b, t]: 3 at the start (a stored window, or zeros, stands in for the tokens before), 0 at a reset.
static void count_history(unsigned char *history, const unsigned char *resets, int B, int T) {
    for (int b = 0; b < B; b++)
        for (int t = 0, n = 3; t < T; t++, n = imin(n + 1, 3)) {
            if (resets && resets[(size_t)b * T + t]) n = 0;
            history[(size_t)b * T + t] = (unsigned char)n;
        }
}

// ----------------------------------------------------------------------------------------------------------------
// Causal depthwise convolution over 4 tokens, then SiLU.
//   pre[t,c] = bias[c] + sum_lag w[c, 3-lag] x[t-lag, c],  out = silu(pre);  lags beyond the document count as zero
// x has row stride ld; window [3, C] holds the inputs before the first token, oldest first (NULL: zeros).

static const real *conv_input(const real *x, size_t ld, const real *window, int C, int b, int t, int T, int lag,
                              size_t state_row) {
    if (t >= lag) return x + ((size_t)b * T + t - lag) * ld;
    return window ? window + b * state_row + (size_t)(3 + t - lag) * C : NULL;
}

// window_out [3, C]: the last inputs, as far as they are of the last token's document
static void conv_window(real *window_out, const real *x, size_t ld, const real *window, int C, const Sequence *s) {
    int B = s->B, T = s->T;
    for (int b = 0; b < B; b++)
        for (int lag = 2; lag >= 0; lag--) {
            const real *in = conv_input(x, ld, window, C, b, T - 1, T, lag, s->state_row);
            real *dst = window_out + b * s->state_row + (size_t)(2 - lag) * C;
            if (in && lag <= s->history[(size_t)b * T + T - 1]) memcpy(dst, in, sizeof(real) * C);
            else memset(dst, 0, sizeof(real) * C);
        }
}

static void conv_forward(real *pre, real *out, const real *x, size_t ld, const real *w, const real *bias,
                         const real *window, real *window_out, int C, const Sequence *s) {
    int B = s->B, T = s->T;
#pragma omp parallel for
    for (int row = 0; row < B * T; row++) {
        int b = row / T, t = row % T;
        real *p = pre + (size_t)row * C, *o = out + (size_t)row * C;
        memcpy(p, bias, sizeof(real) * C);
        for (int lag = 0; lag <= s->history[row]; lag++) {
            const real *in = conv_input(x, ld, window, C, b, t, T, lag, s->state_row);
            if (in)
                for (int c = 0; c < C; c++) p[c] += w[4 * c + 3 - lag] * in[c];
        }
        for (int c = 0; c < C; c++) o[c] = silu(p[c]);
    }
    if (window_out) conv_window(window_out, x, ld, window, C, s);
}

// dx += gradient of the inputs, dw and dbias += theirs. dpre [B, T, C] is overwritten: on entry the gradient of out.
static void conv_backward(real *dx, size_t ld_dx, real *dw, real *dbias, real *dpre, const real *pre, const real *x,
                          size_t ld, const real *w, const real *window, int C, const Sequence *s, real *partial) {
    int B = s->B, T = s->T, parts = num_parts(B * T);
    size_t all = (size_t)5 * C;  // partial sums: w by lag, then bias
#pragma omp parallel for
    for (int p = 0; p < parts; p++) {
        real *sum = partial + p * all;
        memset(sum, 0, sizeof(real) * all);
        for (int row = part_begin(p, parts, B * T); row < part_begin(p + 1, parts, B * T); row++) {
            real *d = dpre + (size_t)row * C;
            const real *pr = pre + (size_t)row * C;
            for (int c = 0; c < C; c++) {
                d[c] *= silu_grad(pr[c]);
                sum[4 * C + c] += d[c];
            }
            for (int lag = 0; lag <= s->history[row]; lag++) {
                const real *in = conv_input(x, ld, window, C, row / T, row % T, T, lag, s->state_row);
                if (in)
                    for (int c = 0; c < C; c++) sum[lag * C + c] += d[c] * in[c];
            }
        }
    }
#pragma omp parallel for
    for (int row = 0; row < B * T; row++)
        for (int lag = 0; lag <= 3 && row % T + lag < T; lag++)
            if (lag <= s->history[row + lag])
                for (int c = 0; c < C; c++)
                    dx[row * ld_dx + c] += dpre[(size_t)(row + lag) * C + c] * w[4 * c + 3 - lag];
#pragma omp parallel for
    for (int c = 0; c < C; c++)
        for (int k = 0; k < 5; k++) {
            real sum = 0;
            for (int p = 0; p < parts; p++) sum += partial[p * all + (size_t)k * C + c];
            if (k < 4) dw[4 * c + 3 - k] += sum;
            else dbias[c] += sum;
        }
}

// Gradient of the window, from what conv_backward left in dpre.
static void conv_backward_window(real *dwindow, const real *dpre, const real *w, int C, const Sequence *s) {
    for (int b = 0; b < s->B; b++)
        for (int k = 0; k < 3; k++) {  // the token at position k - 3
            real *d = dwindow + b * s->state_row + (size_t)k * C;
            memset(d, 0, sizeof(real) * C);
            for (int t = 0; t <= k && t < s->T; t++) {
                size_t row = (size_t)b * s->T + t;
                int lag = t + 3 - k;
                for (int c = 0; lag <= s->history[row] && c < C; c++) d[c] += dpre[row * C + c] * w[4 * c + 3 - lag];
            }
        }
}

// dx of the last tokens += gradient of the window they left to the next segment
static void conv_backward_tail(real *dx, size_t ld_dx, const real *dwindow, int C, const Sequence *s) {
    for (int b = 0; b < s->B; b++)
        for (int lag = 0; lag <= 2; lag++) {
            size_t last = (size_t)b * s->T + s->T - 1;
            const real *d = dwindow + b * s->state_row + (size_t)(2 - lag) * C;
            for (int c = 0; lag <= s->history[last] && c < C; c++) dx[(last - lag) * ld_dx + c] += d[c];
        }
}

// ----------------------------------------------------------------------------------------------------------------
// Block-diagonal linear map of 4 x 4 blocks (q, k, v of mlstm_v1): out[4n+o] = sum_i w[n, o, i] x[4n+i]

static void blocks4_forward(real *out, size_t ld_out, const real *x, size_t ld_x, const real *w, int rows, int width) {
#pragma omp parallel for
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < width; c++) {
            const real *in = x + r * ld_x + (c & ~3), *wc = w + 4 * c;
            out[r * ld_out + c] = wc[0] * in[0] + wc[1] * in[1] + wc[2] * in[2] + wc[3] * in[3];
        }
}

// dx += w^T dout, dw += dout x^T
static void blocks4_backward(real *dx, size_t ld_dx, real *dw, const real *dout, size_t ld_dout, const real *x,
                             size_t ld_x, const real *w, int rows, int width, real *partial) {
    int parts = num_parts(rows);
    size_t all = (size_t)4 * width;
#pragma omp parallel for
    for (int p = 0; p < parts; p++) {
        real *sum = partial + p * all;
        memset(sum, 0, sizeof(real) * all);
        for (int r = part_begin(p, parts, rows); r < part_begin(p + 1, parts, rows); r++)
            for (int c = 0; c < width; c++) {
                int n = c & ~3, i = c & 3;
                const real *dy = dout + r * ld_dout + n, *in = x + r * ld_x + n, *wn = w + 4 * n;
                dx[r * ld_dx + c] += wn[i] * dy[0] + wn[4 + i] * dy[1] + wn[8 + i] * dy[2] + wn[12 + i] * dy[3];
                for (int k = 0; k < 4; k++) sum[4 * c + k] += dy[i] * in[k];
            }
    }
    add_partials(dw, partial, parts, all);
}

// ----------------------------------------------------------------------------------------------------------------
// mLSTM cell. A head keeps a matrix C [dk, dv], a vector n [dk] and a scale m, and for every token does
//   m' = max(log sig(f) + m, i)                          (the true states are C e^m and n e^m)
//   C' = exp(log sig(f) + m - m') C + exp(i - m') k v^T,   n' likewise with k alone
//   h  = s C'^T q / (max(|s q.n'|, exp(-m')) + eps)      s = 1/sqrt(dk)
// With the sigmoid gate (mLSTMsig) i is log sig(i), m stays 0 and h = s C'^T q.
// Two forms of it: the recurrent one below, which is also the reference in the tests, and the chunkwise one.

typedef struct {
    int B, T, NH, dk, dv;
    int chunk;  // tokens a chunk (L)
    int sigmoid_gate;
    real eps;
    const unsigned char *resets;  // [B, T] or NULL
} MlstmShape;

typedef struct {
    const real *q, *k;  // [B, T, NH, dk], row stride ld
    const real *v;      // [B, T, NH, dv], row stride ld
    size_t ld;
    const real *igate, *fgate;  // [B, T, NH] pre-activations, row stride ld_gate
    size_t ld_gate;
} MlstmInput;

typedef struct {  // states of B sequences, `row` elements from one to the next; C == NULL: zeros, or not wanted
    real *C;      // [B][NH, dk, dv]
    real *n;      // [B][NH, dk]
    real *m;      // [B][NH]
    size_t row;
} MlstmState;

static int mlstm_num_chunks(const MlstmShape *s) { return (s->T + s->chunk - 1) / s->chunk; }
static size_t mlstm_state_size(const MlstmShape *s) { return (size_t)s->dk * s->dv + s->dk + 1; }

// h [B, T, NH, dv]. `final` may be the same memory as `initial`, but must be given.
static void mlstm_recurrent(const MlstmShape *s, const MlstmInput *in, MlstmState initial, MlstmState final, real *h) {
    int T = s->T, NH = s->NH, dk = s->dk, dv = s->dv;
    real scale = 1 / (real)sqrt(dk);
#pragma omp parallel for
    for (int task = 0; task < s->B * NH; task++) {
        int b = task / NH, head = task % NH;
        real *C = final.C + b * final.row + (size_t)head * dk * dv, *n = final.n + b * final.row + (size_t)head * dk;
        real *m = final.m + b * final.row + head;
        if (!initial.C) {
            memset(C, 0, sizeof(real) * dk * dv);
            memset(n, 0, sizeof(real) * dk);
            *m = 0;
        } else if (initial.C != final.C) {
            memcpy(C, initial.C + b * initial.row + (size_t)head * dk * dv, sizeof(real) * dk * dv);
            memcpy(n, initial.n + b * initial.row + (size_t)head * dk, sizeof(real) * dk);
            *m = initial.m[b * initial.row + head];
        }
        for (int t = 0; t < T; t++) {
            size_t row = (size_t)b * T + t;
            const real *q = in->q + row * in->ld + (size_t)head * dk, *k = in->k + row * in->ld + (size_t)head * dk;
            const real *v = in->v + row * in->ld + (size_t)head * dv;
            real *out = h + (row * NH + head) * dv, q_n = 0;
            double i = in->igate[row * in->ld_gate + head], lf = log_sigmoid(in->fgate[row * in->ld_gate + head]);
            int fresh = s->resets && s->resets[row];
            double m_old = fresh ? 0 : *m, m_new = lf + m_old > i ? lf + m_old : i;
            if (s->sigmoid_gate) {
                i = log_sigmoid(i);
                m_new = 0;
            }
            m_new = (real)m_new;
            real forget = fresh ? 0 : (real)exp(lf + m_old - m_new), input = (real)exp(i - m_new);
            memset(out, 0, sizeof(real) * dv);
            for (int a = 0; a < dk; a++) {
                real ka = input * k[a], qa = scale * q[a], *Ca = C + (size_t)a * dv;
                n[a] = forget * n[a] + ka;
                q_n += qa * n[a];
                for (int c = 0; c < dv; c++) {
                    Ca[c] = forget * Ca[c] + ka * v[c];
                    out[c] += qa * Ca[c];
                }
            }
            *m = (real)m_new;
            if (s->sigmoid_gate) continue;
            real den = (real)fmax(fabs(q_n), exp(-m_new)) + s->eps;
            for (int c = 0; c < dv; c++) out[c] /= den;
        }
    }
}

// Chunkwise form (TFLA, arXiv 2503.14376, at the scale of a CPU's caches). The sequence is cut into chunks of L tokens:
// the states are carried from chunk to chunk, and inside a chunk every token looks back at the others in tiles of
// TILE x TILE, so that any chunk length stays in cache. A document reset starts a chunk of its own with zero states.
// Within a chunk with incoming scale m let b_l = sum of log sig(f) up to l, u_l = i_l - b_l, and
//   r_l = max(m, max_{j<=l} u_j)      (sigmoid gate: u_l = log sig(i_l) - b_l, r_l = -b_l, m = 0)
// Then every factor has an exponent <= 0 that is a difference of these:
//   token j as seen by l:     D_lj = exp(u_j - r_l)         the scale of row l: M_l = b_l + r_l
//   old state as seen by l:   exp(m - r_l)                  the state leaving the chunk of length L has m' = M_L
enum { TILE = 32 };

typedef struct {  // one chunk of one head
    int t0, len;
    int fresh;          // a document begins: states entering count as zero
    int empty;          // backward: no state enters, so the first forget gate has no effect
    double m, m_next;   // scale of the states entering and leaving
    double r_next;      // r_L such that m' = b_L + r_L holds for the rounded m'
    double *u, *r, *b;  // [len]
} Chunk;

static int is_reset(const MlstmShape *s, int b, int t) { return s->resets && s->resets[(size_t)b * s->T + t]; }

// Where the chunk that starts at t0 ends: at the next multiple of L, the next reset, or T.
static int chunk_end(const MlstmShape *s, int b, int t0) {
    int end = imin((t0 / s->chunk + 1) * s->chunk, s->T);
    for (int t = t0 + 1; t < end; t++)
        if (is_reset(s, b, t)) return t;
    return end;
}

static void chunk_gates(Chunk *c, const MlstmShape *s, const MlstmInput *in, int b, int head) {
    double sum = 0, top = c->m;
    for (int l = 0; l < c->len; l++) {
        size_t at = ((size_t)b * s->T + c->t0 + l) * in->ld_gate + head;
        double i = in->igate[at];
        sum += log_sigmoid(in->fgate[at]);
        c->b[l] = sum;
        c->u[l] = (s->sigmoid_gate ? log_sigmoid(i) : i) - sum;
        top = c->u[l] > top ? c->u[l] : top;
        c->r[l] = s->sigmoid_gate ? -sum : top;
    }
    c->m_next = (real)(sum + c->r[c->len - 1]);
    c->r_next = c->m_next - sum;
}

// W[l, j] = D_lj (0 for j > l) for rows l0 .. l0+nl, columns j0 .. j0+nj. Differences are taken against r of the first
// row in double before they become float, so that long sums of gates lose nothing where the weights matter.
static void tile_decay(real *W, const Chunk *c, int l0, int nl, int j0, int nj) {
    real u[TILE];
    for (int j = 0; j < nj; j++) u[j] = (real)(c->u[j0 + j] - c->r[l0]);
    for (int l = 0; l < nl; l++) {
        real r = (real)(c->r[l0 + l] - c->r[l0]), *row = W + l * TILE;
        int seen = imin(nj, l0 + l - j0 + 1);
        for (int j = 0; j < seen; j++) row[j] = exp_real(u[j] - r);
        for (int j = seen; j < nj; j++) row[j] = 0;
    }
}

// den_l = max(|sig_l|, exp(-M_l)) + eps; *through: the gradient reaches sig_l
static real row_denominator(const MlstmShape *s, const Chunk *c, int l, real sig, int *through) {
    double floor = exp(-(c->b[l] + c->r[l]));
    *through = !s->sigmoid_gate && fabs((double)sig) > floor;
    if (s->sigmoid_gate) return 1;
    return (real)fmax(fabs((double)sig), floor) + s->eps;
}

typedef struct {       // one thread's tiles
    real *q, *e;       // [TILE, dk], [TILE, dv]
    real *D, *S, *dS;  // [TILE, TILE]
    real *row;         // [TILE]
    real *dC, *dn;     // [dk, dv], [dk]
    real *wide;        // [TILE, max(dk, dv)]
    real *ds;          // [chunk]
    real *e_all;       // [chunk, dv]
    Chunk chunk;
} MlstmScratch;

static MlstmScratch mlstm_scratch(const MlstmShape *s, int backward) {
    MlstmScratch w;
    size_t dk = s->dk, dv = s->dv, L = imin(s->chunk, s->T);
    memset(&w, 0, sizeof w);
    w.q = (real *)xcalloc(TILE * dk, sizeof(real));
    w.e = (real *)xcalloc(TILE * dv, sizeof(real));
    w.D = (real *)xcalloc(3 * TILE * TILE + TILE, sizeof(real));
    w.S = w.D + TILE * TILE;
    w.dS = w.S + TILE * TILE;
    w.row = w.dS + TILE * TILE;
    w.chunk.u = (double *)xcalloc(3 * L, sizeof(double));
    w.chunk.r = w.chunk.u + L;
    w.chunk.b = w.chunk.r + L;
    if (backward) {
        w.dC = (real *)xcalloc(dk * dv + dk, sizeof(real));
        w.dn = w.dC + dk * dv;
        w.wide = (real *)xcalloc(TILE * (dk > dv ? dk : dv), sizeof(real));
        w.ds = (real *)xcalloc(L, sizeof(real));
        w.e_all = (real *)xcalloc(L * dv, sizeof(real));
    }
    return w;
}

static void mlstm_scratch_free(MlstmScratch *w) {
    free(w->q);
    free(w->e);
    free(w->D);
    free(w->chunk.u);
    free(w->dC);
    free(w->wide);
    free(w->ds);
    free(w->e_all);
}

// One chunk of one head: h and sig of its rows, then the states C, n (in place).
static void mlstm_chunk_forward(const MlstmShape *s, const MlstmInput *in, MlstmScratch *w, int b, int head, real *C,
                                real *n, real *h, real *sig) {
    const Chunk *c = &w->chunk;
    int dk = s->dk, dv = s->dv, NH = s->NH;
    size_t ld = in->ld, row0 = (size_t)b * s->T + c->t0;
    const real *q = in->q + row0 * ld + (size_t)head * dk, *k = in->k + row0 * ld + (size_t)head * dk;
    const real *v = in->v + row0 * ld + (size_t)head * dv;
    real scale = 1 / (real)sqrt(dk);
    for (int l0 = 0; l0 < c->len; l0 += TILE) {
        int nl = imin(TILE, c->len - l0);
        real *out = h + ((row0 + l0) * NH + head) * dv;
        size_t ld_out = (size_t)NH * dv;
        for (int l = 0; l < nl; l++) {  // what the old states contribute
            real factor = c->fresh ? 0 : scale * (real)exp(c->m - c->r[l0 + l]);
            for (int a = 0; a < dk; a++) w->q[l * dk + a] = factor * q[(l0 + l) * ld + a];
            w->row[l] = dot(w->q + l * dk, n, dk);
        }
        if (c->fresh)
            for (int l = 0; l < nl; l++) memset(out + l * ld_out, 0, sizeof(real) * dv);
        else gemm_serial(nl, dv, dk, w->q, dk, 1, C, dv, 1, out, ld_out, 0);
        for (int j0 = 0; j0 <= l0; j0 += TILE) {
            int nj = imin(TILE, c->len - j0);
            tile_decay(w->D, c, l0, nl, j0, nj);
            gemm_serial(nl, nj, dk, q + l0 * ld, ld, 1, k + j0 * ld, 1, ld, w->S, TILE, 0);
            for (int l = 0; l < nl; l++) {
                real sum = 0, *S = w->S + l * TILE, *D = w->D + l * TILE;
#pragma omp simd reduction(+ : sum)
                for (int j = 0; j < nj; j++) {
                    S[j] *= scale * D[j];
                    sum += S[j];
                }
                w->row[l] += sum;
            }
            gemm_serial(nl, dv, nj, w->S, TILE, 1, v + j0 * ld, ld, 1, out, ld_out, 1);
        }
        for (int l = 0; l < nl; l++) {
            int through;
            real den = row_denominator(s, c, l0 + l, w->row[l], &through);
            sig[(row0 + l0 + l) * NH + head] = w->row[l];
            for (int a = 0; a < dv; a++) out[l * ld_out + a] /= den;
        }
    }
    real keep = c->fresh ? 0 : (real)exp(c->m - c->r_next);
    for (size_t a = 0; a < (size_t)dk * dv; a++) C[a] *= keep;
    for (int a = 0; a < dk; a++) n[a] *= keep;
    for (int j0 = 0; j0 < c->len; j0 += TILE) {
        int nj = imin(TILE, c->len - j0);
        for (int j = 0; j < nj; j++) {
            real weight = (real)exp(c->u[j0 + j] - c->r_next);
            for (int a = 0; a < dk; a++) {
                w->q[j * dk + a] = weight * k[(j0 + j) * ld + a];
                n[a] += w->q[j * dk + a];
            }
        }
        gemm_serial(dk, dv, nj, w->q, 1, dk, v + j0 * ld, ld, 1, C, dv, 1);
    }
}

// h [B, T, NH, dv]; saved for the backward pass: sig [B, T, NH] = s q.n, and states [B, NH, chunks + 1, dk*dv + dk +
// 1]: C, n, m entering each multiple of L, last the final ones. `final` may be NULL inside (not wanted).
static void mlstm_forward(const MlstmShape *s, const MlstmInput *in, MlstmState initial, MlstmState final, real *h,
                          real *sig, real *states) {
    int NH = s->NH, dk = s->dk, dv = s->dv, num_chunks = mlstm_num_chunks(s);
    size_t size = mlstm_state_size(s), dkv = (size_t)dk * dv;
#pragma omp parallel
    {
        MlstmScratch w = mlstm_scratch(s, 0);
#pragma omp for schedule(static)
        for (int task = 0; task < s->B * NH; task++) {
            int b = task / NH, head = task % NH;
            real *slot = states + (size_t)task * (num_chunks + 1) * size;
            Chunk *c = &w.chunk;
            memset(slot, 0, sizeof(real) * size);
            if (initial.C) {
                memcpy(slot, initial.C + b * initial.row + head * dkv, sizeof(real) * dkv);
                memcpy(slot + dkv, initial.n + b * initial.row + (size_t)head * dk, sizeof(real) * dk);
                slot[dkv + dk] = initial.m[b * initial.row + head];
            }
            for (c->t0 = 0; c->t0 < s->T; c->t0 += c->len) {
                c->len = chunk_end(s, b, c->t0) - c->t0;
                c->fresh = is_reset(s, b, c->t0);
                if (c->t0 % s->chunk ==
                    0) {  // the chunk works on a copy: the entering states stay for the backward pass
                    memcpy(slot + size, slot, sizeof(real) * size);
                    slot += size;
                }
                c->m = c->fresh ? 0 : slot[dkv + dk];
                chunk_gates(c, s, in, b, head);
                mlstm_chunk_forward(s, in, &w, b, head, slot, slot + dkv, h, sig);
                slot[dkv + dk] = (real)c->m_next;
            }
            if (final.C) {
                memcpy(final.C + b * final.row + head * dkv, slot, sizeof(real) * dkv);
                memcpy(final.n + b * final.row + (size_t)head * dk, slot + dkv, sizeof(real) * dk);
                final.m[b * final.row + head] = slot[dkv + dk];
            }
        }
        mlstm_scratch_free(&w);
    }
}

typedef struct {
    real *dq, *dk, *dv;  // as q, k, v of MlstmInput, row stride ld
    size_t ld;
    real *digate, *dfgate;  // as igate, fgate, row stride ld_gate
    size_t ld_gate;
} MlstmGrad;

// The inside of a chunk, tile by tile: e_l = dh_l / den_l, ds_l = gradient that reaches sig_l through the denominator,
//   dW = e v^T + ds,  dS = s D dW;  dq += dS k,  dk += dS^T q,  dv += W^T e,  and dq's share of the old states.
static void mlstm_chunk_backward_inside(const MlstmShape *s, const MlstmInput *in, const MlstmGrad *g, MlstmScratch *w,
                                        int b, int head, const real *C, const real *n) {
    const Chunk *c = &w->chunk;
    int dk = s->dk, dv = s->dv;
    size_t ld = in->ld, row0 = (size_t)b * s->T + c->t0, at_k = row0 * ld + (size_t)head * dk,
           at_v = row0 * ld + (size_t)head * dv;
    size_t ldg = g->ld, to_k = row0 * ldg + (size_t)head * dk, to_v = row0 * ldg + (size_t)head * dv;
    const real *q = in->q + at_k, *k = in->k + at_k, *v = in->v + at_v;
    real *dq = g->dq + to_k, *dk_ = g->dk + to_k, *dv_ = g->dv + to_v, scale = 1 / (real)sqrt(dk);
    for (int l0 = 0; l0 < c->len; l0 += TILE) {
        int nl = imin(TILE, c->len - l0);
        const real *e = w->e_all + (size_t)l0 * dv;
        if (c->fresh)
            for (int l = 0; l < nl; l++) memset(dq + (l0 + l) * ldg, 0, sizeof(real) * dk);
        else {
            gemm_serial(nl, dk, dv, e, dv, 1, C, 1, dv, dq + l0 * ldg, ldg, 0);
            for (int l = 0; l < nl; l++) {
                real factor = scale * (real)exp(c->m - c->r[l0 + l]), *d = dq + (l0 + l) * ldg;
                for (int a = 0; a < dk; a++) d[a] = factor * (d[a] + w->ds[l0 + l] * n[a]);
            }
        }
        for (int j0 = 0; j0 <= l0; j0 += TILE) {
            int nj = imin(TILE, c->len - j0);
            tile_decay(w->D, c, l0, nl, j0, nj);
            gemm_serial(nl, nj, dk, q + l0 * ld, ld, 1, k + j0 * ld, 1, ld, w->S, TILE, 0);
            gemm_serial(nl, nj, dv, e, dv, 1, v + j0 * ld, 1, ld, w->dS, TILE, 0);
            for (int l = 0; l < nl; l++) {
                real *S = w->S + l * TILE, *dS = w->dS + l * TILE, *D = w->D + l * TILE;
                for (int j = 0; j < nj; j++) {
                    S[j] *= scale * D[j];
                    dS[j] = scale * D[j] * (dS[j] + w->ds[l0 + l]);
                }
            }
            gemm_serial(nl, dk, nj, w->dS, TILE, 1, k + j0 * ld, ld, 1, dq + l0 * ldg, ldg, 1);
            gemm_serial(nj, dk, nl, w->dS, 1, TILE, q + l0 * ld, ld, 1, dk_ + j0 * ldg, ldg, j0 < l0);
            gemm_serial(nj, dv, nl, w->S, 1, TILE, e, dv, 1, dv_ + j0 * ldg, ldg, j0 < l0);
        }
    }
}

// What the gradient dC, dn of the leaving states adds to dk and dv; then dC, dn of the entering ones.
//   dk_j += A_j (dC v_j + dn),  dv_j += A_j dC^T k_j,  A_j = exp(u_j - r_L)
//   dC <- exp(m - r_L) dC + sum_l qb_l e_l^T,  dn <- exp(m - r_L) dn + sum_l ds_l qb_l,  qb_l = s exp(m - r_l) q_l
static void mlstm_chunk_backward_states(const MlstmShape *s, const MlstmInput *in, const MlstmGrad *g, MlstmScratch *w,
                                        int b, int head) {
    const Chunk *c = &w->chunk;
    int dk = s->dk, dv = s->dv;
    size_t ld = in->ld, row0 = (size_t)b * s->T + c->t0, ldg = g->ld;
    const real *q = in->q + row0 * ld + (size_t)head * dk, *k = in->k + row0 * ld + (size_t)head * dk;
    const real *v = in->v + row0 * ld + (size_t)head * dv;
    real *dk_ = g->dk + row0 * ldg + (size_t)head * dk, *dv_ = g->dv + row0 * ldg + (size_t)head * dv;
    real scale = 1 / (real)sqrt(dk);
    for (int j0 = 0; j0 < c->len; j0 += TILE) {
        int nj = imin(TILE, c->len - j0);
        gemm_serial(nj, dk, dv, v + j0 * ld, ld, 1, w->dC, 1, dv, w->wide, dk, 0);
        for (int j = 0; j < nj; j++) {
            real weight = (real)exp(c->u[j0 + j] - c->r_next), *d = dk_ + (j0 + j) * ldg;
            for (int a = 0; a < dk; a++) {
                d[a] += weight * (w->wide[j * dk + a] + w->dn[a]);
                w->q[j * dk + a] = weight * k[(j0 + j) * ld + a];
            }
        }
        gemm_serial(nj, dv, dk, w->q, dk, 1, w->dC, dv, 1, dv_ + j0 * ldg, ldg, 1);
    }
    real keep = c->fresh ? 0 : (real)exp(c->m - c->r_next);              // nothing flows across a reset
    for (size_t a = 0; a < (size_t)dk * dv + dk; a++) w->dC[a] *= keep;  // dn lies behind dC
    for (int l0 = 0; !c->fresh && l0 < c->len; l0 += TILE) {
        int nl = imin(TILE, c->len - l0);
        for (int l = 0; l < nl; l++) {
            real factor = scale * (real)exp(c->m - c->r[l0 + l]);
            for (int a = 0; a < dk; a++) {
                w->q[l * dk + a] = factor * q[(l0 + l) * ld + a];
                w->dn[a] += w->ds[l0 + l] * w->q[l * dk + a];
            }
        }
        gemm_serial(dk, dv, nl, w->q, 1, dk, w->e_all + (size_t)l0 * dv, dv, 1, w->dC, dv, 1);
    }
}

// Gate gradients of a chunk from q, k and their gradients (the reverse sum is anchored at the chunk's end, where
// all that later tokens contribute is <C', dC'> + <n', dn'> of the leaving states: doc/math.md):
//   di_j = <k_j, dk_j>,   d log f_l = anchor + sum_{r >= l} <q_r, dq_r> - <k_r, dk_r>
static void mlstm_chunk_backward_gates(const MlstmShape *s, const MlstmInput *in, const MlstmGrad *g, const Chunk *c,
                                       int b, int head, double anchor) {
    int dk = s->dk;
    double sum = anchor;
    for (int l = c->len - 1; l >= 0; l--) {
        size_t row = (size_t)b * s->T + c->t0 + l, at = row * in->ld + (size_t)head * dk,
               to = row * g->ld + (size_t)head * dk;
        double k_dk = dot(in->k + at, g->dk + to, dk);
        size_t gate = row * in->ld_gate + head;
        double i = in->igate[gate], f = in->fgate[gate];
        sum += dot(in->q + at, g->dq + to, dk) - k_dk;
        g->digate[row * g->ld_gate + head] = (real)(s->sigmoid_gate ? k_dk / (1 + exp(i)) : k_dk);
        g->dfgate[row * g->ld_gate + head] = l == 0 && c->empty ? 0 : (real)(sum / (1 + exp(f)));
    }
}

// Exact backward pass, also through the denominator; m is a constant everywhere, since h does not depend on it but for
// eps. dh [B, T, NH, dv]; h, sig and states as mlstm_forward left them. The gradients of the inputs are written, not
// added. dfinal: gradient of the final states at fixed m; dinitial: of the initial states (either may hold NULL).
static void mlstm_backward(const MlstmShape *s, const MlstmInput *in, const MlstmGrad *g, const real *dh, const real *h,
                           const real *sig, const real *states, MlstmState dfinal, MlstmState dinitial) {
    int NH = s->NH, dk = s->dk, dv = s->dv, T = s->T, num_chunks = mlstm_num_chunks(s);
    size_t size = mlstm_state_size(s), dkv = (size_t)dk * dv;
#pragma omp parallel
    {
        MlstmScratch w = mlstm_scratch(s, 1);
        int *starts = (int *)xcalloc((size_t)T + 1, sizeof(int));
#pragma omp for schedule(static)
        for (int task = 0; task < s->B * NH; task++) {
            int b = task / NH, head = task % NH, count = 0;
            const real *slots = states + (size_t)task * (num_chunks + 1) * size;
            Chunk *c = &w.chunk;
            memset(w.dC, 0, sizeof(real) * (dkv + dk));
            if (dfinal.C) {
                memcpy(w.dC, dfinal.C + b * dfinal.row + head * dkv, sizeof(real) * dkv);
                memcpy(w.dn, dfinal.n + b * dfinal.row + (size_t)head * dk, sizeof(real) * dk);
            }
            for (int t = 0; t < T; t = chunk_end(s, b, t)) starts[count++] = t;
            starts[count] = T;
            while (count-- > 0) {
                int t1 = starts[count + 1];
                c->t0 = starts[count];
                c->len = t1 - c->t0;
                c->fresh = is_reset(s, b, c->t0);
                const real *enter = slots + (size_t)(c->t0 / s->chunk) * size;
                const real *leave = slots + (size_t)((t1 + s->chunk - 1) / s->chunk) * size;
                c->empty = c->fresh || (c->t0 == 0 && dot(enter + dkv, enter + dkv, dk) == 0);
                c->m = c->fresh ? 0 : enter[dkv + dk];
                chunk_gates(c, s, in, b, head);
                for (int l = 0; l < c->len; l++) {
                    size_t row = ((size_t)b * T + c->t0 + l) * NH + head;
                    int through;
                    real den = row_denominator(s, c, l, sig[row], &through), *e = w.e_all + (size_t)l * dv;
                    for (int a = 0; a < dv; a++) e[a] = dh[row * dv + a] / den;
                    w.ds[l] = through ? (sig[row] > 0 ? -1 : 1) * dot(e, h + row * dv, dv) : 0;
                }
                double anchor = dot(leave, w.dC, dkv + dk);  // dC is zero where a document begins at t1
                mlstm_chunk_backward_inside(s, in, g, &w, b, head, enter, enter + dkv);
                mlstm_chunk_backward_states(s, in, g, &w, b, head);
                mlstm_chunk_backward_gates(s, in, g, c, b, head, anchor);
            }
            if (dinitial.C) {
                memcpy(dinitial.C + b * dinitial.row + head * dkv, w.dC, sizeof(real) * dkv);
                memcpy(dinitial.n + b * dinitial.row + (size_t)head * dk, w.dn, sizeof(real) * dk);
                dinitial.m[b * dinitial.row + head] = dot(slots, w.dC, dkv + dk);
            }
        }
        free(starts);
        mlstm_scratch_free(&w);
    }
}

// ----------------------------------------------------------------------------------------------------------------
// The mLSTM cell over segments of a sequence (doc/parallel.md). What a segment does to the states that enter it is a
// pair: its own states S = (C, n, m) from an empty beginning, and G, the sum of its log forget gates. Two neighbours
// make one longer segment, states before a segment are one as well, and the order of joining does not matter:
//   m = max(G_R + m_L, m_R),  C = exp(G_R + m_L - m) C_L + exp(m_R - m) C_R,  n likewise,  G = G_L + G_R
// m becomes exactly what it would be token by token. A reset makes G = -inf: nothing from before remains.
// In the backward pass the pair is the gradient d of the states entering a segment that its own outputs cause, and
// `keep`, the factor by which those states reach its end:  d = d_L + keep_L d_R,  keep = keep_L keep_R.
// Either is stored as [B] rows of C [NH, dk, dv], n [NH, dk], m [NH], G or keep [NH].

static size_t segment_row(const MlstmShape *s) { return (size_t)s->NH * ((size_t)s->dk * s->dv + s->dk + 2); }

static MlstmState segment_state(const MlstmShape *s, real *base) {
    size_t C = (size_t)s->NH * s->dk * s->dv, n = (size_t)s->NH * s->dk;
    MlstmState state = {base, base + C, base + C + n, segment_row(s)};
    return state;
}

// S and G of the tokens given: one weighted product K^T V, since token j adds exp(a_j - m) k_j v_j^T, where
// a_j = i_j + sum of the log forget gates behind j. The sums run from the end, so that -inf and large values stay
// exact.
static void mlstm_segment(const MlstmShape *s, const MlstmInput *in, real *segment) {
    int T = s->T, NH = s->NH, dk = s->dk, dv = s->dv;
    MlstmState end = segment_state(s, segment);
#pragma omp parallel
    {
        MlstmScratch w = mlstm_scratch(s, 0);
        double *a = (double *)xcalloc((size_t)T, sizeof(double));
#pragma omp for schedule(static)
        for (int task = 0; task < s->B * NH; task++) {
            int b = task / NH, head = task % NH, first = 0;
            real *C = end.C + b * end.row + (size_t)head * dk * dv, *n = end.n + b * end.row + (size_t)head * dk;
            double behind = 0, top = s->sigmoid_gate ? 0 : -INFINITY;
            for (int t = T - 1; t >= first; t--) {
                size_t gate = ((size_t)b * T + t) * in->ld_gate + head;
                a[t] = behind + (s->sigmoid_gate ? log_sigmoid(in->igate[gate]) : in->igate[gate]);
                behind += log_sigmoid(in->fgate[gate]);
                if (!s->sigmoid_gate && a[t] > top) top = a[t];
                if (!is_reset(s, b, t)) continue;
                if (!s->sigmoid_gate && behind > top) top = behind;  // a fresh cell begins with m = 0
                behind = -INFINITY;
                first = t;
            }
            real m = (real)top;
            memset(C, 0, sizeof(real) * dk * dv);
            memset(n, 0, sizeof(real) * dk);
            for (int j0 = first; j0 < T; j0 += TILE) {
                int nj = imin(TILE, T - j0);
                size_t row0 = (size_t)b * T + j0;
                for (int j = 0; j < nj; j++) {
                    real weight = (real)exp(a[j0 + j] - m);
                    const real *k = in->k + (row0 + j) * in->ld + (size_t)head * dk;
                    for (int c = 0; c < dk; c++) n[c] += w.q[j * dk + c] = weight * k[c];
                }
                gemm_serial(dk, dv, nj, w.q, 1, dk, in->v + row0 * in->ld + (size_t)head * dv, in->ld, 1, C, dv, 1);
            }
            end.m[b * end.row + head] = m;
            end.m[b * end.row + NH + head] = (real)behind;
        }
        free(a);
        mlstm_scratch_free(&w);
    }
}

// left := left joined with the segment `right` behind it. left_G: 1 if left is a segment, 0 if it is states.
static void mlstm_join(const MlstmShape *s, MlstmState left, int left_G, real *right_segment) {
    MlstmState right = segment_state(s, right_segment);
    int NH = s->NH;
    size_t dkv = (size_t)s->dk * s->dv, dk = (size_t)s->dk;
#pragma omp parallel for
    for (int task = 0; task < s->B * NH; task++) {
        int b = task / NH, head = task % NH;
        real *C = left.C + b * left.row + head * dkv, *n = left.n + b * left.row + head * dk;
        const real *right_C = right.C + b * right.row + head * dkv, *right_n = right.n + b * right.row + head * dk;
        real *m_left = left.m + b * left.row + head, *m_right = right.m + b * right.row + head;
        double G = m_right[NH], m = (real)fmax(G + *m_left, *m_right);
        real x = (real)exp(G + *m_left - m), y = (real)exp(*m_right - m);
        for (size_t k = 0; k < dkv; k++) C[k] = x * C[k] + y * right_C[k];
        for (size_t k = 0; k < dk; k++) n[k] = x * n[k] + y * right_n[k];
        *m_left = (real)m;
        if (left_G) m_left[NH] += (real)G;
    }
}

// d and keep of the tokens given: d = sum_l qb_l e_l^T, where qb_l = s exp(m_in - m_l + sum of log f up to l) q_l,
// until the first reset. h, sig, states: as mlstm_forward left them.
static void mlstm_segment_backward(const MlstmShape *s, const MlstmInput *in, const real *dh, const real *h,
                                   const real *sig, const real *states, real *segment) {
    int T = s->T, NH = s->NH, dk = s->dk, dv = s->dv, num_chunks = mlstm_num_chunks(s);
    size_t size = mlstm_state_size(s), dkv = (size_t)dk * dv;
    MlstmState d = segment_state(s, segment);
#pragma omp parallel
    {
        MlstmScratch w = mlstm_scratch(s, 1);
#pragma omp for schedule(static)
        for (int task = 0; task < s->B * NH; task++) {
            int b = task / NH, head = task % NH;
            real *dC = d.C + b * d.row + head * dkv, *dn = d.n + b * d.row + (size_t)head * dk;
            double keep = 1;
            Chunk *c = &w.chunk;
            memset(dC, 0, sizeof(real) * dkv);
            memset(dn, 0, sizeof(real) * dk);
            for (c->t0 = 0; c->t0 < T && keep > 0; c->t0 += c->len) {
                c->len = chunk_end(s, b, c->t0) - c->t0;
                if (is_reset(s, b, c->t0)) {
                    keep = 0;
                    break;
                }
                c->m = states[((size_t)task * (num_chunks + 1) + (size_t)(c->t0 / s->chunk)) * size + dkv + dk];
                chunk_gates(c, s, in, b, head);
                for (int l0 = 0; l0 < c->len; l0 += TILE) {
                    int nl = imin(TILE, c->len - l0), through;
                    for (int l = 0; l < nl; l++) {
                        size_t token = (size_t)b * T + c->t0 + l0 + l, row = token * NH + head;
                        const real *q = in->q + token * in->ld + (size_t)head * dk;
                        real den = row_denominator(s, c, l0 + l, sig[row], &through), *e = w.e + l * dv;
                        for (int a = 0; a < dv; a++) e[a] = dh[row * dv + a] / den;
                        real ds = through ? (sig[row] > 0 ? -1 : 1) * dot(e, h + row * dv, dv) : 0;
                        real factor = (real)(keep * exp(c->m - c->r[l0 + l]) / sqrt(dk));
                        for (int a = 0; a < dk; a++) {
                            w.q[l * dk + a] = factor * q[a];
                            dn[a] += ds * w.q[l * dk + a];
                        }
                    }
                    gemm_serial(dk, dv, nl, w.q, 1, dk, w.e, dv, 1, dC, dv, 1);
                }
                keep *= exp(c->m - c->r_next);
            }
            d.m[b * d.row + head] = 0;
            d.m[b * d.row + NH + head] = (real)keep;
        }
        mlstm_scratch_free(&w);
    }
}

// right := left joined with right behind it. right_keep: 1 if right is a segment, 0 if it is gradients of states.
static void mlstm_join_backward(const MlstmShape *s, real *left_segment, MlstmState right, int right_keep) {
    MlstmState left = segment_state(s, left_segment);
    int NH = s->NH;
    size_t dkv = (size_t)s->dk * s->dv, dk = (size_t)s->dk;
#pragma omp parallel for
    for (int task = 0; task < s->B * NH; task++) {
        int b = task / NH, head = task % NH;
        real *C = right.C + b * right.row + head * dkv, *n = right.n + b * right.row + head * dk;
        const real *left_C = left.C + b * left.row + head * dkv, *left_n = left.n + b * left.row + head * dk;
        real keep = left.m[b * left.row + NH + head];
        for (size_t k = 0; k < dkv; k++) C[k] = left_C[k] + keep * C[k];
        for (size_t k = 0; k < dk; k++) n[k] = left_n[k] + keep * n[k];
        if (right_keep) right.m[b * right.row + NH + head] *= keep;
    }
}

// ----------------------------------------------------------------------------------------------------------------
// sLSTM cell. Scalar memories with recurrent weights: every unit of a head sees the head's previous output y.
//   r = x + y R + bias                      four gates i, f, z, o of d units each; R [d, 4d] a head
//   m' = max(log sig(r_f) + m, r_i)         (r_i where n = 0: nothing is stored yet)
//   I = exp(r_i - m'),  F = exp(log sig(r_f) + m - m'),  z = tanh(r_z),  o = sig(r_o)
//   c' = F c + I z,   n' = F n + I,   y' = o c' / n'
// Rows are independent, so a thread takes one head of a few rows through the whole sequence.

typedef struct {
    int B, T, NH, d;
    const unsigned char *resets;  // [B, T] or NULL
} SlstmShape;

typedef struct {          // states of B sequences, `row` elements apart; y == NULL: zeros, or not wanted
    real *y, *c, *n, *m;  // [B][NH * d]
    size_t row;
} SlstmState;

typedef struct {   // what the backward pass needs
    real *gates;   // [B, T, NH, 4, d]: I, F, z, o
    real *fgrad;   // [B, T, NH, d]: sig(-r_f)
    real *c, *n;   // [B, T, NH, d]
    real *y_prev;  // [B, T, NH, d]: the output that entered each step
} SlstmSaved;

enum { SLSTM_ROWS = 4 };  // rows a task: enough to reuse R from cache, few enough to occupy all threads

// The state of row b, head `head` in `from` is copied to the working set [4][rows, d]; zeros if there is none.
static void slstm_load_state(real *y, real *c, real *n, real *m, SlstmState from, int b, size_t at, int d) {
    real *dst[4] = {y, c, n, m}, *src[4] = {from.y, from.c, from.n, from.m};
    for (int k = 0; k < 4; k++)
        if (from.y) memcpy(dst[k], src[k] + b * from.row + at, sizeof(real) * d);
        else memset(dst[k], 0, sizeof(real) * d);
}

// One unit-wise step for one row of a head: r [4, d] holds the pre-activations.
static void slstm_pointwise(const real *r, real *y, real *c, real *n, real *m, real *gates, real *fgrad, int d) {
    const real *ri = r, *rf = r + d, *rz = r + 2 * d, *ro = r + 3 * d;
#pragma omp simd
    for (int j = 0; j < d; j++) {
        real e = exp_real(rf[j] < 0 ? rf[j] : -rf[j]);      // e^{-|r_f|}
        real sig_minus = (rf[j] < 0 ? 1 : e) / (1 + e);     // sig(-r_f)
        real lf = (rf[j] < 0 ? rf[j] : 0) - log1p_unit(e);  // log sig(r_f)
        real lfm = m[j] + lf;
        real m_new = n[j] == 0 ? ri[j] : (ri[j] > lfm ? ri[j] : lfm);
        real I = exp_real(ri[j] - m_new), F = n[j] == 0 ? 0 : exp_real((m[j] - m_new) + lf);
        real z = tanh_real(rz[j]), o = sigmoid(ro[j]);
        c[j] = F * c[j] + I * z;
        n[j] = F * n[j] + I;
        m[j] = m_new;
        y[j] = o * c[j] / n[j];
        gates[j] = I;
        gates[d + j] = F;
        gates[2 * d + j] = z;
        gates[3 * d + j] = o;
        fgrad[j] = sig_minus;
    }
}

// c[rows, N] (+)= a[rows, K] b[K, N] with both operands packed before: a [K][rows], b panels of NR columns. rows <= MR
static void packed_matmul(int rows, int N, int K, const real *a, const real *b, real *c, size_t ldc, int accumulate) {
    for (int j = 0; j < N; j += NR)
        micro_kernel_rows(rows, imin(NR, N - j), K, a, rows, b + (size_t)j * K, NR, c + j, ldc, accumulate);
}

// x [B, T, NH, 4, d] pre-activations from the input; y [B, T, NH, d] out. saved->gates may be the same memory as x.
static void slstm_forward(const SlstmShape *s, const real *x, const real *R, const real *bias, SlstmState initial,
                          SlstmState final, real *y, const SlstmSaved *saved) {
    int T = s->T, NH = s->NH, d = s->d, groups = (s->B + SLSTM_ROWS - 1) / SLSTM_ROWS;
    size_t width = (size_t)NH * d, block = (size_t)SLSTM_ROWS * d;
#pragma omp parallel
    {
        real *panels = (real *)xcalloc((size_t)d * (4 * d + NR), sizeof(real));
        real *work = (real *)xcalloc(9 * block, sizeof(real));
        real *yw = work, *cw = yw + block, *nw = cw + block, *mw = nw + block, *yt = mw + block, *r = yt + block;
#pragma omp for schedule(static)
        for (int task = 0; task < NH * groups; task++) {
            int head = task / groups, b0 = task % groups * SLSTM_ROWS, rows = imin(SLSTM_ROWS, s->B - b0);
            size_t at = (size_t)head * d;
            pack_panels(panels, R + 4 * at * d, 1, 4 * (size_t)d, 4 * d, d, NR);
            for (int i = 0; i < rows; i++)
                slstm_load_state(yw + i * d, cw + i * d, nw + i * d, mw + i * d, initial, b0 + i, at, d);
            for (int t = 0; t < T; t++) {
                for (int i = 0; i < rows; i++) {
                    size_t row = (size_t)(b0 + i) * T + t;
                    if (s->resets && s->resets[row])
                        slstm_load_state(yw + i * d, cw + i * d, nw + i * d, mw + i * d, (SlstmState){0}, 0, 0, d);
                    memcpy(saved->y_prev + row * width + at, yw + i * d, sizeof(real) * d);
                    for (int j = 0; j < 4 * d; j++) r[i * 4 * d + j] = x[(row * width + at) * 4 + j] + bias[4 * at + j];
                }
                pack_panels(yt, yw, d, 1, rows, d, rows);
                packed_matmul(rows, 4 * d, d, yt, panels, r, 4 * (size_t)d, 1);
                for (int i = 0; i < rows; i++) {
                    size_t out = ((size_t)(b0 + i) * T + t) * width + at;
                    slstm_pointwise(r + i * 4 * d, yw + i * d, cw + i * d, nw + i * d, mw + i * d,
                                    saved->gates + 4 * out, saved->fgrad + out, d);
                    memcpy(y + out, yw + i * d, sizeof(real) * d);
                    memcpy(saved->c + out, cw + i * d, sizeof(real) * d);
                    memcpy(saved->n + out, nw + i * d, sizeof(real) * d);
                }
            }
            for (int i = 0; final.y && i < rows; i++) {
                real *dst[4] = {final.y, final.c, final.n, final.m}, *src[4] = {yw, cw, nw, mw};
                for (int k = 0; k < 4; k++)
                    memcpy(dst[k] + (b0 + i) * final.row + at, src[k] + i * d, sizeof(real) * d);
            }
        }
        free(panels);
        free(work);
    }
}

// One step back for one row of a head. dy: gradient of y_t in all; dc, dn: of the states leaving the step on entry, of
// those entering it on return. m is a constant, which is exact: y does not depend on it.
static void slstm_pointwise_backward(real *dr, real *dc, real *dn, const real *dy, const real *gates, const real *fgrad,
                                     const real *c, const real *n, const real *c_prev, const real *n_prev, int d) {
    const real *gi = gates, *gf = gates + d, *gz = gates + 2 * d, *go = gates + 3 * d;
#pragma omp simd
    for (int j = 0; j < d; j++) {
        real y = go[j] * c[j] / n[j], dy_n = dy[j] / n[j];
        real dc_t = dc[j] + dy_n * go[j], dn_t = dn[j] - dy_n * y;
        dr[j] = gi[j] * (gz[j] * dc_t + dn_t);
        dr[d + j] = gf[j] * (c_prev[j] * dc_t + n_prev[j] * dn_t) * fgrad[j];
        dr[2 * d + j] = gi[j] * (1 - gz[j] * gz[j]) * dc_t;
        dr[3 * d + j] = (1 - go[j]) * y * dy[j];
        dc[j] = gf[j] * dc_t;
        dn[j] = gf[j] * dn_t;
    }
}

// dx [B, T, NH, 4, d] is written; dR, dbias are added to. dfinal, dinitial as in mlstm_backward (dinitial.m: exact
// too).
static void slstm_backward(const SlstmShape *s, const real *R, const SlstmSaved *saved, const real *dy,
                           SlstmState initial, SlstmState dfinal, SlstmState dinitial, real *dx, real *dR, real *dbias,
                           real *partial) {
    int T = s->T, NH = s->NH, d = s->d, groups = (s->B + SLSTM_ROWS - 1) / SLSTM_ROWS;
    size_t width = (size_t)NH * d, block = (size_t)SLSTM_ROWS * d;
#pragma omp parallel
    {
        real *panels = (real *)xcalloc((size_t)4 * d * (d + NR), sizeof(real));
        real *work = (real *)xcalloc(8 * block, sizeof(real));
        real *dyw = work, *dcw = dyw + block, *dnw = dcw + block, *dmw = dnw + block, *dr = dmw + block;
        real *zeros = (real *)xcalloc((size_t)d, sizeof(real)), *dr_packed = (real *)xcalloc(4 * block, sizeof(real));
#pragma omp for schedule(static)
        for (int task = 0; task < NH * groups; task++) {
            int head = task / groups, b0 = task % groups * SLSTM_ROWS, rows = imin(SLSTM_ROWS, s->B - b0);
            size_t at = (size_t)head * d;
            pack_panels(panels, R + 4 * at * d, 4 * (size_t)d, 1, d, 4 * d, NR);
            for (int i = 0; i < rows; i++)
                slstm_load_state(dyw + i * d, dcw + i * d, dnw + i * d, dmw + i * d, dfinal, b0 + i, at, d);
            for (int t = T - 1; t >= 0; t--) {
                for (int i = 0; i < rows; i++) {
                    size_t row = (size_t)(b0 + i) * T + t, here = row * width + at;
                    int fresh = s->resets && s->resets[row];
                    const real *c_prev = zeros, *n_prev = zeros;
                    if (!fresh && t > 0) {
                        c_prev = saved->c + here - width;
                        n_prev = saved->n + here - width;
                    } else if (!fresh && initial.y) {
                        c_prev = initial.c + (b0 + i) * initial.row + at;
                        n_prev = initial.n + (b0 + i) * initial.row + at;
                    }
                    for (int j = 0; j < d; j++) dyw[i * d + j] += dy[here + j];
                    slstm_pointwise_backward(dr + i * 4 * d, dcw + i * d, dnw + i * d, dyw + i * d,
                                             saved->gates + 4 * here, saved->fgrad + here, saved->c + here,
                                             saved->n + here, c_prev, n_prev, d);
                    memcpy(dx + 4 * here, dr + i * 4 * d, sizeof(real) * 4 * d);
                }
                pack_panels(dr_packed, dr, 4 * (size_t)d, 1, rows, 4 * d, rows);
                packed_matmul(rows, d, 4 * d, dr_packed, panels, dyw, d, 0);
                for (int i = 0; s->resets && i < rows; i++)  // nothing flows across a reset (dc, dn: F = 0 there)
                    if (s->resets[(size_t)(b0 + i) * T + t]) memset(dyw + i * d, 0, sizeof(real) * d);
            }
            for (int i = 0; dinitial.y && i < rows; i++) {
                size_t to = (b0 + i) * dinitial.row + at, from = (b0 + i) * initial.row + at;
                memcpy(dinitial.y + to, dyw + i * d, sizeof(real) * d);
                memcpy(dinitial.c + to, dcw + i * d, sizeof(real) * d);
                memcpy(dinitial.n + to, dnw + i * d, sizeof(real) * d);
                for (int j = 0; j < d; j++)
                    dinitial.m[to + j] =
                        initial.y ? initial.c[from + j] * dcw[i * d + j] + initial.n[from + j] * dnw[i * d + j] : 0;
            }
        }
        free(panels);
        free(work);
        free(zeros);
        free(dr_packed);
    }
    for (int head = 0; head < NH; head++)  // dR = sum over tokens of y_prev^T dr
        gemm(d, 4 * d, s->B * T, saved->y_prev + (size_t)head * d, 1, width, dx + (size_t)head * 4 * d, 4 * width, 1,
             dR + (size_t)head * d * 4 * d, 4 * (size_t)d, 1);
    bias_backward(dbias, dx, 4 * width, s->B * T, (int)(4 * width), partial);
}

// ----------------------------------------------------------------------------------------------------------------
// The model: one allocation for parameters, gradients and the two moments, one for activations and scratch

typedef struct {
    real *u, *stats, *gate_up, *act;
} FfnActs;  // [BT, D], [BT, 2], [BT, 2U], [BT, U]

typedef struct {          // what a block keeps for its backward pass; BT = B*T tokens
    real *u, *stats;      // [BT, D] normed input; [BT, 2]
    real *proj;           // mlstm [BT, 2Dk+2Dv+2NH]: q k v ogate igate fgate;  mlstm_v1 [BT, 2I]: branch, z
    real *conv, *ca;      // [BT, I or D] convolution before and after SiLU
    real *qkv;            // mlstm_v1 [BT, 3I]
    real *gates;          // [BT, 2NH] igate, fgate pre-activations after bias and cap
    real *h;              // [BT, Dv or I] cell output; slstm y [BT, D]
    real *sig, *states;   // mLSTM: see mlstm_forward
    real *hn, *hn_stats;  // [BT, Dv or I or D] after the head norm; [BT, NH, 2]
    real *ht, *y;         // mlstm_v1 [BT, I] with the skip; [BT, Dv or I] gated, input of the last projection
    SlstmSaved slstm;
    real *x_mid;  // [BT, D] residual stream between the cell and the FFN
    FfnActs ffn;
} BlockActs;

typedef struct {
    ModelConfig config;
    TensorTable table, states;
    RunConfig run;
    real *params, *grads, *m, *v;  // [table.total]
    real *stored, *state_in;       // [num_state_rows][states.total], [max_batch][states.total]
    real *decode_state;            // [states.total]
    real **x;                      // [N+1][BT, D] input of each block, and the last one's output
    BlockActs *acts;               // [N]; with recomputation all share the same memory
    real *out, *out_stats;         // [BT, D], [BT, 2] final norm
    real *losses;                  // [BT]
    real *logits;                  // [logit_rows, V] one tile of the classifier
    int logit_rows;
    real *dx;                                // [BT, D] gradient of the residual stream
    real *d_wide, *d_mid, *d_mid2, *d_mid3;  // scratch of the backward pass, [BT, widest]
    real *partial;                           // [MAX_PARTS, widest]
    unsigned char *history;                  // [BT]
    // Several ranks
    Shards shards;                       // of params and grads, which are [shards_padded]; with --zero 1 m and v are
    int own_moments;                     // 1: m, v hold this rank's pieces only, [shards_owned]
    real *entering, *leaving, *dstate;   // [max_batch][states.total] of this rank's segments: see Sequence
    real *exchange;                      // [exchange_size] what is sent and received
    unsigned char *resets, *all_resets;  // [max_batch, longest segment], [ranks of a sequence][the same]
} Model;

static Model model;

static real *param(const Model *m, int block, int slot) {
    return m->params + m->table.tensors[m->table.block_first[block] + slot].offset;
}
static real *grad(const Model *m, int block, int slot) {
    return m->grads + m->table.tensors[m->table.block_first[block] + slot].offset;
}
static real *state_at(const Model *m, int block, int slot, const real *base) {  // NULL stays NULL
    return base ? (real *)base + m->states.tensors[m->states.block_first[block] + slot].offset : NULL;
}
static int dim(const Model *m, Dim d) { return model_dim(&m->config, d); }

static Norm layernorm_v1(const Model *m) {
    Norm n = {1, 1, 1, dim(m, DIM_D), (real)1e-5};
    return n;
}
static Norm rmsnorm(const Model *m) {
    Norm n = {0, 0, 1, dim(m, DIM_D), (real)m->config.norm_eps};
    return n;
}
static Norm head_norm(const Model *m, int width, int v1) {
    Norm n = {1, v1, dim(m, DIM_NH), width / dim(m, DIM_NH), v1 ? (real)1e-5 : (real)m->config.norm_eps};
    return n;
}

// ----------------------------------------------------------------------------------------------------------------
// Between the ranks that share a sequence

static int fold_by_gather = 8;  // up to as many ranks all pairs (S, G) are gathered at once, which then costs least

// States first .. end-1 of block b in rows `from` go to the next rank (direction 1) or the one before (-1), and those
// of the other neighbour arrive in `to`. from, to NULL: only receives, only sends.
static void pass_states(const Model *m, int b, int first, int end, const Sequence *s, const real *from, real *to,
                        int direction, const char *what) {
    const TensorSpec *specs = m->states.tensors + m->states.block_first[b];
    size_t count = specs[end - 1].offset + specs[end - 1].count - specs[first].offset, row = s->state_row;
    int next = comm.sp_rank + direction, before = comm.sp_rank - direction;
    if (!from || next < 0 || next >= comm.sp_size) next = -1;
    if (!to || before < 0 || before >= comm.sp_size) before = -1;
    real *sent = m->exchange, *received = sent + (size_t)s->B * count;
    for (int k = 0; next >= 0 && k < s->B; k++)
        memcpy(sent + k * count, from + k * row + specs[first].offset, sizeof(real) * count);
    comm.data->send_recv(COMM_SP, sent, next, received, before, sizeof(real) * count * (size_t)s->B, what, NULL);
    for (int k = 0; before >= 0 && k < s->B; k++)
        memcpy(to + k * row + specs[first].offset, received + k * count, sizeof(real) * count);
}

// The convolution reads up to 3 inputs of the segment before: its halo.
static void conv_enter(const Model *m, int b, int slot, const Sequence *s, const real *x, size_t ld, int C) {
    if (!s->whole) return;
    conv_window(state_at(m, b, slot, s->state_out), x, ld, NULL, C, s);
    pass_states(m, b, slot, slot + 1, s, s->state_out, (real *)s->state_in, 1, "halo of the convolution");
}

// dx += what the next segment's use of the last inputs gives; dpre: as conv_backward left it.
static void conv_leave(const Model *m, int b, int slot, const Sequence *s, real *dx, size_t ld_dx, const real *dpre,
                       const real *w, int C) {
    if (!s->whole) return;
    real *dwindow = state_at(m, b, slot, s->dstate);
    conv_backward_window(dwindow, dpre, w, C, s);
    pass_states(m, b, slot, slot + 1, s, s->dstate, s->dstate, -1, "gradient of the convolution's halo");
    if (comm.sp_rank < comm.sp_size - 1) conv_backward_tail(dx, ld_dx, dwindow, C, s);
}

static void swap(real **a, real **b) {
    real *t = *a;
    *a = *b;
    *b = t;
}

// from.C == NULL: zeros
static void mlstm_copy_state(const MlstmShape *s, MlstmState to, MlstmState from) {
    real *dst[3] = {to.C, to.n, to.m}, *src[3] = {from.C, from.n, from.m};
    size_t count[3] = {(size_t)s->NH * s->dk * s->dv, (size_t)s->NH * s->dk, (size_t)s->NH};
    for (int b = 0; b < s->B; b++)
        for (int k = 0; k < 3; k++)
            if (from.C) memcpy(dst[k] + b * to.row, src[k] + b * from.row, sizeof(real) * count[k]);
            else memset(dst[k] + b * to.row, 0, sizeof(real) * count[k]);
}

// The states that enter this segment: those before the sequence (`first`), joined with all segments in between. Few
// ranks get all of these and join them in order. Many ranks double the distance from step to step (Hillis and
// Steele 1986): `own` then covers 1, 2, 4, ... segments up to this one, `before` the same without this one.
static void mlstm_enter(const Model *m, const Sequence *s, const MlstmShape *shape, const MlstmInput *in,
                        MlstmState enter, MlstmState first) {
    int P = comm.sp_size, me = comm.sp_rank, joined = 0;
    size_t size = (size_t)s->B * segment_row(shape), bytes = size * sizeof(real);
    if (me > 0) mlstm_copy_state(shape, enter, first);
    if (P <= fold_by_gather) {
        real *all = m->exchange;
        mlstm_segment(shape, in, all + me * size);
        comm.data->pass_on(COMM_SP, all, bytes, 1, "mLSTM states", NULL);
        for (int p = 0; p < me; p++) mlstm_join(shape, enter, 0, all + p * size);
        return;
    }
    real *own = m->exchange, *got = own + size, *before = got + size, *copy = before + size;
    mlstm_segment(shape, in, own);
    for (int away = 1; away < P; away *= 2) {
        int to = me + away < P ? me + away : -1, from = me - away;
        comm.data->send_recv(COMM_SP, own, to, got, from < 0 ? -1 : from, bytes, "scan of mLSTM states", NULL);
        if (from < 0) continue;
        memcpy(copy, got, bytes);
        mlstm_join(shape, segment_state(shape, copy), 1, own);
        swap(&own, &copy);
        if (joined++) mlstm_join(shape, segment_state(shape, got), 1, before);
        swap(&before, &got);
    }
    if (joined) mlstm_join(shape, enter, 0, before);
}

// dfinal: the gradient of the states that leave this segment, the same from the other end.
static void mlstm_leave(const Model *m, const MlstmShape *shape, const MlstmInput *in, const real *dh,
                        const BlockActs *a, MlstmState dfinal) {
    int P = comm.sp_size, me = comm.sp_rank, joined = 0;
    size_t size = (size_t)shape->B * segment_row(shape), bytes = size * sizeof(real);
    mlstm_copy_state(shape, dfinal, (MlstmState){0});
    if (P <= fold_by_gather) {
        real *all = m->exchange;
        mlstm_segment_backward(shape, in, dh, a->h, a->sig, a->states, all + me * size);
        comm.data->pass_on(COMM_SP, all, bytes, -1, "mLSTM gradients", NULL);
        for (int p = P - 1; p > me; p--) mlstm_join_backward(shape, all + p * size, dfinal, 0);
        return;
    }
    real *own = m->exchange, *got = own + size, *behind = got + size, *copy = behind + size;
    mlstm_segment_backward(shape, in, dh, a->h, a->sig, a->states, own);
    for (int away = 1; away < P; away *= 2) {
        int from = me + away < P ? me + away : -1, to = me - away;
        comm.data->send_recv(COMM_SP, own, to < 0 ? -1 : to, got, from, bytes, "scan of mLSTM gradients", NULL);
        if (from < 0) continue;
        memcpy(copy, got, bytes);
        mlstm_join_backward(shape, own, segment_state(shape, copy), 1);
        swap(&own, &copy);
        if (joined++) mlstm_join_backward(shape, behind, segment_state(shape, got), 1);
        swap(&behind, &got);
    }
    if (joined) mlstm_join_backward(shape, behind, dfinal, 0);
}

// ----------------------------------------------------------------------------------------------------------------
// Gated FFN with its norm and residual: out = x + down(act(gate(u)) * up(u)), u = norm(x)

static void ffn_forward(real *out, const real *x, const FfnActs *a, const Norm *norm, const real *w_norm,
                        const real *w_up, const real *w_down, int rows, int width, int U, int use_gelu) {
    norm_forward(a->u, a->stats, x, w_norm, norm, rows);
    matmul_forward(a->gate_up, 2 * (size_t)U, a->u, width, w_up, rows, 2 * U, width, 0);
    gated_forward(a->act, a->gate_up, rows, U, use_gelu);
    copy(out, x, (size_t)rows * width);
    matmul_forward(out, width, a->act, U, w_down, rows, width, U, 1);
}

// dx: on entry the gradient of out, on return that of x
static void ffn_backward(Model *m, real *dx, const real *x, const FfnActs *a, const Norm *norm, const real *w_norm,
                         real *dw_norm, const real *w_up, real *dw_up, const real *w_down, real *dw_down, int rows,
                         int U, int use_gelu) {
    int width = norm->width;
    matmul_backward(m->d_mid, U, 0, dw_down, dx, width, a->act, U, w_down, rows, width, U);
    gated_backward(m->d_wide, m->d_mid, a->gate_up, rows, U, use_gelu);
    matmul_backward(m->d_mid2, width, 0, dw_up, m->d_wide, 2 * (size_t)U, a->u, width, w_up, rows, 2 * U, width);
    norm_backward(dx, 1, dw_norm, m->d_mid2, x, a->stats, w_norm, norm, rows, m->partial);
}

// ----------------------------------------------------------------------------------------------------------------
// Block: mlstm (xLSTM 7B)
//   u = rmsnorm(x);  q k v o = u W^T;  i f = cap(u W^T + b);  h = mLSTM(q, k, v, i, f)
//   x_mid = x + (sig(o) * headnorm(h)) Wout^T;   out = x_mid + swiglu FFN(rmsnorm(x_mid))

static MlstmShape mlstm_shape(const Model *m, const Sequence *s, int v1) {
    MlstmShape shape = {s->B,     s->T, dim(m, DIM_NH), 0, 0, m->run.chunk, m->config.sigmoid_gate, (real)m->config.eps,
                        s->resets};
    shape.dk = dim(m, v1 ? DIM_I : DIM_DK) / shape.NH;
    shape.dv = dim(m, v1 ? DIM_I : DIM_DV) / shape.NH;
    return shape;
}

static MlstmState mlstm_state(const Model *m, int b, const Sequence *s, const real *base) {
    MlstmState state = {state_at(m, b, STATE_C, base), state_at(m, b, STATE_N, base), state_at(m, b, STATE_M, base),
                        s->state_row};
    return state;
}

static MlstmInput mlstm_input(const Model *m, const BlockActs *a) {
    int Dk = dim(m, DIM_DK), Dv = dim(m, DIM_DV), NH = dim(m, DIM_NH);
    MlstmInput in = {a->proj,  a->proj + Dk,  a->proj + 2 * Dk, (size_t)(2 * Dk + 2 * Dv + 2 * NH),
                     a->gates, a->gates + NH, 2 * (size_t)NH};
    return in;
}

static void mlstm_cell_forward(const Model *m, int b, const Sequence *s, const MlstmInput *in, const BlockActs *a,
                               int v1) {
    MlstmShape shape = mlstm_shape(m, s, v1);
    MlstmState initial = mlstm_state(m, b, s, s->state_in), final = mlstm_state(m, b, s, s->state_out);
    if (s->whole) mlstm_enter(m, s, &shape, in, initial, mlstm_state(m, b, s, s->state_first));
    if (s->recurrent) mlstm_recurrent(&shape, in, initial, final, a->h);
    else mlstm_forward(&shape, in, initial, final, a->h, a->sig, a->states);
}

// dh [B, T, NH, dv]: gradient of a->h
static void mlstm_cell_backward(const Model *m, int b, const Sequence *s, const MlstmInput *in, const MlstmGrad *g,
                                const real *dh, const BlockActs *a, int v1) {
    MlstmShape shape = mlstm_shape(m, s, v1);
    MlstmState dfinal = mlstm_state(m, b, s, s->dstate), none = {0};
    if (s->whole) mlstm_leave(m, &shape, in, dh, a, dfinal);
    mlstm_backward(&shape, in, g, dh, a->h, a->sig, a->states, dfinal, none);
}

// gates = cap(pre + bias), both [rows, count]; pre has row stride ld
static void gates_forward(real *gates, const real *pre, size_t ld, const real *bias, int rows, int count, real cap) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < count; c++) {
            real g = pre[r * ld + c] + bias[c];
            gates[(size_t)r * count + c] = cap > 0 ? cap * tanh_real(g / cap) : g;
        }
}

static void gates_backward(real *dpre, size_t ld, const real *gates, int rows, int count, real cap) {  // in place
    for (int r = 0; cap > 0 && r < rows; r++)
        for (int c = 0; c < count; c++) {
            real g = gates[(size_t)r * count + c] / cap;
            dpre[r * ld + c] *= 1 - g * g;
        }
}

static void mlstm_block_forward(Model *m, int b, const Sequence *s, const real *x, real *out, const BlockActs *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), Dv = dim(m, DIM_DV), NH = dim(m, DIM_NH);
    Norm norm = rmsnorm(m), heads = head_norm(m, Dv, 0);
    MlstmInput in = mlstm_input(m, a);
    const real *ogate = in.v + Dv, *gates = ogate + Dv;
    norm_forward(a->u, a->stats, x, param(m, b, M_NORM), &norm, rows);
    matmul_forward(a->proj, in.ld, a->u, D, param(m, b, M_Q), rows, (int)in.ld, D, 0);
    gates_forward(a->gates, gates, in.ld, param(m, b, M_IGATE_BIAS), rows, 2 * NH, (real)m->config.gate_soft_cap);
    mlstm_cell_forward(m, b, s, &in, a, 0);
    norm_forward(a->hn, a->hn_stats, a->h, param(m, b, M_HEAD_NORM), &heads, rows);
#pragma omp parallel for
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < Dv; c++)
            a->y[(size_t)r * Dv + c] = sigmoid(ogate[r * in.ld + c]) * a->hn[(size_t)r * Dv + c];
    copy(a->x_mid, x, (size_t)rows * D);
    matmul_forward(a->x_mid, D, a->y, Dv, param(m, b, M_OUT_PROJ), rows, D, Dv, 1);
    ffn_forward(out, a->x_mid, &a->ffn, &norm, param(m, b, M_NORM_FFN), param(m, b, M_FFN_GATE),
                param(m, b, M_FFN_DOWN), rows, D, dim(m, DIM_U), 0);
}

static void mlstm_block_backward(Model *m, int b, const Sequence *s, const real *x, real *dx, const BlockActs *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), Dk = dim(m, DIM_DK), Dv = dim(m, DIM_DV), NH = dim(m, DIM_NH);
    Norm norm = rmsnorm(m), heads = head_norm(m, Dv, 0);
    MlstmInput in = mlstm_input(m, a);
    const real *ogate = in.v + Dv;
    ffn_backward(m, dx, a->x_mid, &a->ffn, &norm, param(m, b, M_NORM_FFN), grad(m, b, M_NORM_FFN),
                 param(m, b, M_FFN_GATE), grad(m, b, M_FFN_GATE), param(m, b, M_FFN_DOWN), grad(m, b, M_FFN_DOWN), rows,
                 dim(m, DIM_U), 0);
    matmul_backward(m->d_mid, Dv, 0, grad(m, b, M_OUT_PROJ), dx, D, a->y, Dv, param(m, b, M_OUT_PROJ), rows, D, Dv);
    real *dproj = m->d_wide, *dogate = dproj + 2 * Dk + Dv, *dgates = dogate + Dv;
#pragma omp parallel for
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < Dv; c++) {
            real gate = sigmoid(ogate[r * in.ld + c]), *dy = &m->d_mid[(size_t)r * Dv + c];
            dogate[r * in.ld + c] = *dy * a->hn[(size_t)r * Dv + c] * gate * (1 - gate);
            *dy *= gate;
        }
    norm_backward(m->d_mid2, 0, grad(m, b, M_HEAD_NORM), m->d_mid, a->h, a->hn_stats, param(m, b, M_HEAD_NORM), &heads,
                  rows, m->partial);
    MlstmGrad g = {dproj, dproj + Dk, dproj + 2 * Dk, in.ld, dgates, dgates + NH, in.ld};
    mlstm_cell_backward(m, b, s, &in, &g, m->d_mid2, a, 0);
    gates_backward(dgates, in.ld, a->gates, rows, 2 * NH, (real)m->config.gate_soft_cap);
    bias_backward(grad(m, b, M_IGATE_BIAS), dgates, in.ld, rows, 2 * NH, m->partial);
    matmul_backward(m->d_mid, D, 0, grad(m, b, M_Q), dproj, in.ld, a->u, D, param(m, b, M_Q), rows, (int)in.ld, D);
    norm_backward(dx, 1, grad(m, b, M_NORM), m->d_mid, x, a->stats, param(m, b, M_NORM), &norm, rows, m->partial);
}

// ----------------------------------------------------------------------------------------------------------------
// Block: mlstm_v1 (first paper)
//   u = layernorm(x);  [branch | z] = u Wup^T;  ca = silu(conv(branch));  q = Bq ca, k = Bk ca, v = Bv branch
//   i f = [q k v] W^T + b;  h = mLSTM(q, k, v, i, f);  ht = headnorm(h) + skip * ca;  out = x + (ht * silu(z)) Wdown^T

static MlstmInput mlstm_v1_input(const Model *m, const BlockActs *a) {
    int I = dim(m, DIM_I), NH = dim(m, DIM_NH);
    MlstmInput in = {a->qkv, a->qkv + I, a->qkv + 2 * I, 3 * (size_t)I, a->gates, a->gates + NH, 2 * (size_t)NH};
    return in;
}

static void mlstm_v1_block_forward(Model *m, int b, const Sequence *s, const real *x, real *out, const BlockActs *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), I = dim(m, DIM_I), NH = dim(m, DIM_NH);
    Norm norm = layernorm_v1(m), heads = head_norm(m, I, 1);
    MlstmInput in = mlstm_v1_input(m, a);
    const real *branch = a->proj, *z = a->proj + I, *skip = param(m, b, V1_SKIP);
    norm_forward(a->u, a->stats, x, param(m, b, V1_NORM), &norm, rows);
    matmul_forward(a->proj, 2 * (size_t)I, a->u, D, param(m, b, V1_UP), rows, 2 * I, D, 0);
    conv_enter(m, b, STATE_CONV, s, branch, 2 * (size_t)I, I);
    conv_forward(a->conv, a->ca, branch, 2 * (size_t)I, param(m, b, V1_CONV), param(m, b, V1_CONV_BIAS),
                 state_at(m, b, STATE_CONV, s->state_in), state_at(m, b, STATE_CONV, s->state_out), I, s);
    blocks4_forward(a->qkv, in.ld, a->ca, I, param(m, b, V1_Q), rows, I);
    blocks4_forward(a->qkv + I, in.ld, a->ca, I, param(m, b, V1_K), rows, I);
    blocks4_forward(a->qkv + 2 * I, in.ld, branch, 2 * (size_t)I, param(m, b, V1_V), rows, I);
    matmul_forward(a->gates, 2 * (size_t)NH, a->qkv, in.ld, param(m, b, V1_IGATE), rows, 2 * NH, 3 * I, 0);
    gates_forward(a->gates, a->gates, 2 * (size_t)NH, param(m, b, V1_IGATE_BIAS), rows, 2 * NH, 0);
    mlstm_cell_forward(m, b, s, &in, a, 1);
    norm_forward(a->hn, a->hn_stats, a->h, param(m, b, V1_HEAD_NORM), &heads, rows);
#pragma omp parallel for
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < I; c++) {
            size_t at = (size_t)r * I + c;
            a->ht[at] = a->hn[at] + skip[c] * a->ca[at];
            a->y[at] = a->ht[at] * silu(z[(size_t)r * 2 * I + c]);
        }
    copy(out, x, (size_t)rows * D);
    matmul_forward(out, D, a->y, I, param(m, b, V1_DOWN), rows, D, I, 1);
}

static void mlstm_v1_block_backward(Model *m, int b, const Sequence *s, const real *x, real *dx, const BlockActs *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), I = dim(m, DIM_I), NH = dim(m, DIM_NH), parts = num_parts(rows);
    size_t ld_up = 2 * (size_t)I;
    Norm norm = layernorm_v1(m), heads = head_norm(m, I, 1);
    MlstmInput in = mlstm_v1_input(m, a);
    const real *branch = a->proj, *z = a->proj + I, *skip = param(m, b, V1_SKIP);
    // Scratch: d_wide holds dproj [rows, 2I] and then dqkv [rows, 3I]; d_mid, d_mid2, d_mid3 are [rows, I].
    real *dup = m->d_wide, *dbranch = dup, *dz = dup + I, *dqkv = m->d_wide + (size_t)rows * ld_up;
    real *dgates = dqkv + (size_t)rows * in.ld, *dht = m->d_mid, *dh = m->d_mid2, *dca = m->d_mid3;
    matmul_backward(dht, I, 0, grad(m, b, V1_DOWN), dx, D, a->y, I, param(m, b, V1_DOWN), rows, D, I);
#pragma omp parallel for
    for (int p = 0; p < parts; p++) {
        real *sum = m->partial + (size_t)p * I;
        memset(sum, 0, sizeof(real) * I);
        for (int r = part_begin(p, parts, rows); r < part_begin(p + 1, parts, rows); r++)
            for (int c = 0; c < I; c++) {
                size_t at = (size_t)r * I + c, up = r * ld_up + c;
                real dy = dht[at];
                dht[at] = dy * silu(z[up]);
                dz[up] = dy * a->ht[at] * silu_grad(z[up]);
                dca[at] = dht[at] * skip[c];
                dbranch[up] = 0;
                sum[c] += dht[at] * a->ca[at];
            }
    }
    add_partials(grad(m, b, V1_SKIP), m->partial, parts, I);
    norm_backward(dh, 0, grad(m, b, V1_HEAD_NORM), dht, a->h, a->hn_stats, param(m, b, V1_HEAD_NORM), &heads, rows,
                  m->partial);
    MlstmGrad g = {dqkv, dqkv + I, dqkv + 2 * I, in.ld, dgates, dgates + NH, 2 * (size_t)NH};
    mlstm_cell_backward(m, b, s, &in, &g, dh, a, 1);
    bias_backward(grad(m, b, V1_IGATE_BIAS), dgates, 2 * (size_t)NH, rows, 2 * NH, m->partial);
    matmul_backward(dqkv, in.ld, 1, grad(m, b, V1_IGATE), dgates, 2 * (size_t)NH, a->qkv, in.ld, param(m, b, V1_IGATE),
                    rows, 2 * NH, 3 * I);
    blocks4_backward(dca, I, grad(m, b, V1_Q), dqkv, in.ld, a->ca, I, param(m, b, V1_Q), rows, I, m->partial);
    blocks4_backward(dca, I, grad(m, b, V1_K), dqkv + I, in.ld, a->ca, I, param(m, b, V1_K), rows, I, m->partial);
    blocks4_backward(dbranch, ld_up, grad(m, b, V1_V), dqkv + 2 * I, in.ld, branch, ld_up, param(m, b, V1_V), rows, I,
                     m->partial);
    conv_backward(dbranch, ld_up, grad(m, b, V1_CONV), grad(m, b, V1_CONV_BIAS), dca, a->conv, branch, ld_up,
                  param(m, b, V1_CONV), state_at(m, b, STATE_CONV, s->state_in), I, s, m->partial);
    conv_leave(m, b, STATE_CONV, s, dbranch, ld_up, dca, param(m, b, V1_CONV), I);
    matmul_backward(m->d_mid, D, 0, grad(m, b, V1_UP), dup, ld_up, a->u, D, param(m, b, V1_UP), rows, 2 * I, D);
    norm_backward(dx, 1, grad(m, b, V1_NORM), m->d_mid, x, a->stats, param(m, b, V1_NORM), &norm, rows, m->partial);
}

// ----------------------------------------------------------------------------------------------------------------
// Block: slstm (first paper)
//   u = layernorm(x);  ca = silu(conv(u));  pre-activations: i, f from ca, z, o from u, a d x d matrix a head each
//   x_mid = x + groupnorm(sLSTM(...));   out = x_mid + geglu FFN(layernorm(x_mid))

static SlstmShape slstm_shape(const Model *m, const Sequence *s) {
    SlstmShape shape = {s->B, s->T, dim(m, DIM_NH), dim(m, DIM_HEAD), s->resets};
    return shape;
}

static SlstmState slstm_state(const Model *m, int b, const Sequence *s, const real *base) {
    SlstmState state = {state_at(m, b, STATE_SY, base), state_at(m, b, STATE_SC, base), state_at(m, b, STATE_SN, base),
                        state_at(m, b, STATE_SM, base), s->state_row};
    return state;
}

// Over segments: where the ranks of a sequence divide rows x heads, each takes all tokens of some rows and heads, since
// the cell must go token by token anyway; else the segments wait for each other in turn.

// rows, heads: what each rank takes, rank r from row r / ways * rows and head r % ways * heads on. 0: it does not
// divide.
static int slstm_share(const Model *m, const Sequence *s, int *rows, int *heads, int *ways) {
    int P = comm.sp_size, NH = dim(m, DIM_NH);
    *ways = P;
    for (int rest = NH, t; rest; t = *ways % rest, *ways = rest, rest = t) {}  // greatest common divisor of P and NH
    *heads = NH / *ways;
    *rows = s->B / (P / *ways);
    return s->B % (P / *ways) == 0;
}

// In place, [B, T, NH, width] of this rank's segment <-> [rows, whole, heads, width] of its rows and heads.
static void slstm_reshard(const Model *m, const Sequence *s, real *x, size_t width, int to_heads) {
    int rows, heads, ways, P = comm.sp_size, NH = dim(m, DIM_NH);
    size_t *sizes = (size_t *)xcalloc(2 * (size_t)P, sizeof(size_t)), at[2] = {0, 0};
    slstm_share(m, s, &rows, &heads, &ways);
    size_t run = (size_t)heads * width;  // elements that lie together in both
    real *ours = m->exchange, *theirs = ours + (size_t)m->run.max_batch * m->run.max_len * NH * width;
    for (int pass = 0; pass < 2; pass++) {  // packs; sends, and unpacks
        for (int r = 0; r < P; r++) {
            int begin = segment_begin(s->whole, P, r), len = segment_begin(s->whole, P, r + 1) - begin;
            int by_heads = pass == to_heads;  // the side of the copy that has all tokens
            int tokens = by_heads ? len : s->T;
            for (int row = 0; row < rows; row++)
                for (int t = 0; t < tokens; t++, at[pass] += run) {
                    size_t token =
                        by_heads ? (size_t)row * s->whole + begin + t : (size_t)(r / ways * rows + row) * s->T + t;
                    real *in_x = by_heads ? x + token * run : x + (token * NH + (size_t)(r % ways) * heads) * width;
                    if (pass == 0) memcpy(ours + at[0], in_x, sizeof(real) * run);
                    else memcpy(in_x, theirs + at[1], sizeof(real) * run);
                }
            if (pass == 0) {
                sizes[r] = sizeof(real) * run * rows * tokens;
                sizes[P + r] = sizeof(real) * run * rows * (by_heads ? s->T : len);
            }
        }
        if (pass == 0)
            comm.data->all_to_all(COMM_SP, ours, sizes, theirs, sizes + P, "all-to-all of sLSTM heads", NULL);
    }
    free(sizes);
}

// All ranks of a sequence get the final states of all rows and heads; y, c, n, m lie behind each other.
static void slstm_gather_final(const Model *m, const Sequence *s, SlstmState final) {
    int rows, heads, ways, P = comm.sp_size, d = dim(m, DIM_HEAD), D = dim(m, DIM_D);
    slstm_share(m, s, &rows, &heads, &ways);
    size_t run = (size_t)heads * d, count = 4 * run * rows;
    real *ours = m->exchange, *all = ours + count;
    for (int r = -1; r < P; r++) {  // -1: packs
        int from = r < 0 ? comm.sp_rank : r;
        for (int k = 0; k < 4 * rows; k++) {
            real *state = final.y + (from / ways * rows + k / 4) * final.row + (size_t)(k % 4) * D + from % ways * run;
            if (r < 0) memcpy(ours + k * run, state, sizeof(real) * run);
            else memcpy(state, all + r * count + k * run, sizeof(real) * run);
        }
        if (r < 0) comm.data->all_gather(COMM_SP, ours, all, count * sizeof(real), "final sLSTM states", NULL);
    }
}

static SlstmState slstm_state_from(SlstmState s, int row, size_t at) {  // from a row and an element of it on
    size_t skip = row * s.row + at;
    SlstmState part = {s.y + skip, s.c + skip, s.n + skip, s.m + skip, s.row};
    return s.y ? part : s;
}

// a->slstm.gates: on entry the pre-activations. With resharding the cell's own buffers hold this rank's rows and heads.
static void slstm_cell_forward(const Model *m, int b, const Sequence *s, const BlockActs *a) {
    SlstmShape shape = slstm_shape(m, s);
    SlstmState initial = slstm_state(m, b, s, s->state_in), final = slstm_state(m, b, s, s->state_out);
    const real *R = param(m, b, S_RECURRENT), *bias = param(m, b, S_BIAS);
    int rows, heads, ways, d = shape.d;
    if (!s->whole) {
        slstm_forward(&shape, a->slstm.gates, R, bias, initial, final, a->h, &a->slstm);
    } else if (slstm_share(m, s, &rows, &heads, &ways)) {
        int row = comm.sp_rank / ways * rows, head = comm.sp_rank % ways * heads;
        SlstmShape mine = {rows, s->whole, heads, d, s->whole_resets ? s->whole_resets + (size_t)row * s->whole : NULL};
        SlstmState first = slstm_state_from(slstm_state(m, b, s, s->state_first), row, (size_t)head * d);
        slstm_reshard(m, s, a->slstm.gates, 4 * (size_t)d, 1);
        slstm_forward(&mine, a->slstm.gates, R + (size_t)head * d * 4 * d, bias + (size_t)head * 4 * d, first,
                      slstm_state_from(final, row, (size_t)head * d), a->h, &a->slstm);
        slstm_reshard(m, s, a->h, d, 0);
        if (s->state_out != m->leaving) slstm_gather_final(m, s, final);
    } else {
        pass_states(m, b, STATE_SY, STATE_SCONV, s, NULL, (real *)s->state_in, 1, "hand-off of sLSTM states");
        slstm_forward(&shape, a->slstm.gates, R, bias, initial, final, a->h, &a->slstm);
        pass_states(m, b, STATE_SY, STATE_SCONV, s, s->state_out, NULL, 1, "hand-off of sLSTM states");
    }
}

// dgates [B, T, NH, 4, d] is written; dh [B, T, NH, d]: gradient of a->h, which is lost
static void slstm_cell_backward(const Model *m, int b, const Sequence *s, const BlockActs *a, real *dgates, real *dh) {
    SlstmShape shape = slstm_shape(m, s);
    SlstmState initial = slstm_state(m, b, s, s->state_in), dstate = slstm_state(m, b, s, s->dstate), none = {0};
    const real *R = param(m, b, S_RECURRENT);
    real *dR = grad(m, b, S_RECURRENT), *dbias = grad(m, b, S_BIAS);
    int rows, heads, ways, d = shape.d;
    if (!s->whole) {
        slstm_backward(&shape, R, &a->slstm, dh, initial, none, none, dgates, dR, dbias, m->partial);
    } else if (slstm_share(m, s, &rows, &heads, &ways)) {
        int row = comm.sp_rank / ways * rows, head = comm.sp_rank % ways * heads;
        SlstmShape mine = {rows, s->whole, heads, d, s->whole_resets ? s->whole_resets + (size_t)row * s->whole : NULL};
        SlstmState first = slstm_state_from(slstm_state(m, b, s, s->state_first), row, (size_t)head * d);
        slstm_reshard(m, s, dh, d, 1);
        slstm_backward(&mine, R + (size_t)head * d * 4 * d, &a->slstm, dh, first, none, none, dgates,
                       dR + (size_t)head * d * 4 * d, dbias + (size_t)head * 4 * d, m->partial);
        slstm_reshard(m, s, dgates, 4 * (size_t)d, 0);
    } else {
        pass_states(m, b, STATE_SY, STATE_SCONV, s, NULL, s->dstate, -1, "hand-off of sLSTM gradients");
        slstm_backward(&shape, R, &a->slstm, dh, initial, dstate, dstate, dgates, dR, dbias, m->partial);
        pass_states(m, b, STATE_SY, STATE_SCONV, s, s->dstate, NULL, -1, "hand-off of sLSTM gradients");
    }
}

static void slstm_block_forward(Model *m, int b, const Sequence *s, const real *x, real *out, const BlockActs *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), NH = dim(m, DIM_NH), d = dim(m, DIM_HEAD);
    Norm norm = layernorm_v1(m), heads = head_norm(m, D, 1);
    norm_forward(a->u, a->stats, x, param(m, b, S_NORM), &norm, rows);
    conv_enter(m, b, STATE_SCONV, s, a->u, D, D);
    conv_forward(a->conv, a->ca, a->u, D, param(m, b, S_CONV), param(m, b, S_CONV_BIAS),
                 state_at(m, b, STATE_SCONV, s->state_in), state_at(m, b, STATE_SCONV, s->state_out), D, s);
    for (int gate = 0; gate < 4; gate++)
        for (int head = 0; head < NH; head++)
            matmul_forward(a->slstm.gates + (size_t)(4 * head + gate) * d, 4 * (size_t)D,
                           (gate < 2 ? a->ca : a->u) + (size_t)head * d, D,
                           param(m, b, S_IGATE + gate) + (size_t)head * d * d, rows, d, d, 0);
    slstm_cell_forward(m, b, s, a);
    norm_forward(a->hn, a->hn_stats, a->h, param(m, b, S_GROUP_NORM), &heads, rows);
#pragma omp parallel for
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < D; c++) a->x_mid[(size_t)r * D + c] = x[(size_t)r * D + c] + a->hn[(size_t)r * D + c];
    ffn_forward(out, a->x_mid, &a->ffn, &norm, param(m, b, S_NORM_FFN), param(m, b, S_FFN_UP), param(m, b, S_FFN_DOWN),
                rows, D, dim(m, DIM_US), 1);
}

static void slstm_block_backward(Model *m, int b, const Sequence *s, const real *x, real *dx, const BlockActs *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), NH = dim(m, DIM_NH), d = dim(m, DIM_HEAD);
    Norm norm = layernorm_v1(m), heads = head_norm(m, D, 1);
    real *dgates = m->d_wide, *dh = m->d_mid, *dca = m->d_mid2, *du = m->d_mid3;
    ffn_backward(m, dx, a->x_mid, &a->ffn, &norm, param(m, b, S_NORM_FFN), grad(m, b, S_NORM_FFN),
                 param(m, b, S_FFN_UP), grad(m, b, S_FFN_UP), param(m, b, S_FFN_DOWN), grad(m, b, S_FFN_DOWN), rows,
                 dim(m, DIM_US), 1);
    norm_backward(dh, 0, grad(m, b, S_GROUP_NORM), dx, a->h, a->hn_stats, param(m, b, S_GROUP_NORM), &heads, rows,
                  m->partial);
    slstm_cell_backward(m, b, s, a, dgates, dh);
    for (int gate = 0; gate < 4; gate++)
        for (int head = 0; head < NH; head++) {
            size_t at = (size_t)head * d;
            matmul_backward((gate < 2 ? dca : du) + at, D, gate % 2, grad(m, b, S_IGATE + gate) + at * d,
                            dgates + 4 * at + (size_t)gate * d, 4 * (size_t)D, (gate < 2 ? a->ca : a->u) + at, D,
                            param(m, b, S_IGATE + gate) + at * d, rows, d, d);
        }
    conv_backward(du, D, grad(m, b, S_CONV), grad(m, b, S_CONV_BIAS), dca, a->conv, a->u, D, param(m, b, S_CONV),
                  state_at(m, b, STATE_SCONV, s->state_in), D, s, m->partial);
    conv_leave(m, b, STATE_SCONV, s, du, D, dca, param(m, b, S_CONV), D);
    norm_backward(dx, 1, grad(m, b, S_NORM), du, x, a->stats, param(m, b, S_NORM), &norm, rows, m->partial);
}

static void block_forward(Model *m, int b, const Sequence *s) {
    void (*forward[])(Model *, int, const Sequence *, const real *, real *, const BlockActs *) = {
        mlstm_block_forward, mlstm_v1_block_forward, slstm_block_forward};
    forward[m->config.block_types[b]](m, b, s, m->x[b], m->x[b + 1], &m->acts[b]);
}

static void block_backward(Model *m, int b, const Sequence *s) {
    void (*backward[])(Model *, int, const Sequence *, const real *, real *, const BlockActs *) = {
        mlstm_block_backward, mlstm_v1_block_backward, slstm_block_backward};
    if (m->run.recompute) block_forward(m, b, s);
    backward[m->config.block_types[b]](m, b, s, m->x[b], m->dx, &m->acts[b]);
}

// ----------------------------------------------------------------------------------------------------------------
// Embedding and classifier

static void embedding_forward(const Model *m, const int *tokens, int rows) {
    int D = dim(m, DIM_D);
    const real *w = m->params + m->table.tensors[m->table.shell[SHELL_EMBEDDING]].offset;
    for (int r = 0; r < rows; r++) memcpy(m->x[0] + (size_t)r * D, w + (size_t)tokens[r] * D, sizeof(real) * D);
}

static void embedding_backward(const Model *m, const int *tokens, int rows) {  // each thread owns some columns
    int D = dim(m, DIM_D);
    real *dw = m->grads + m->table.tensors[m->table.shell[SHELL_EMBEDDING]].offset;
#pragma omp parallel for
    for (int c0 = 0; c0 < D; c0 += 16)
        for (int r = 0; r < rows; r++)
            for (int c = c0; c < imin(c0 + 16, D); c++) dw[(size_t)tokens[r] * D + c] += m->dx[(size_t)r * D + c];
}

// Cross-entropy of one row of logits (before the cap); the row becomes scale * d loss / d logits if with_grad.
// With z = cap tanh(x / cap): d loss / dx = (softmax(z) - onehot) (1 - (z / cap)^2). A target of -1 costs nothing.
static real cross_entropy_row(real *logits, int V, int target, real cap, real scale, int with_grad, float *logits_out) {
    real top = -INFINITY, sum = 0;
    if (cap > 0)
        for (int c = 0; c < V; c++) logits[c] = cap * tanh_real(logits[c] / cap);
    for (int c = 0; logits_out && c < V; c++) logits_out[c] = (float)logits[c];
#pragma omp simd reduction(max : top)
    for (int c = 0; c < V; c++) top = logits[c] > top ? logits[c] : top;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < V; c++) sum += exp_real(logits[c] - top);
    real loss = target < 0 ? 0 : top + (real)log(sum) - logits[target];
    if (!with_grad) return loss;
    if (target < 0) {
        memset(logits, 0, sizeof(real) * V);
        return loss;
    }
    real inv_sum = scale / sum, inv_cap = cap > 0 ? 1 / cap : 0, z = logits[target] * inv_cap;
    real at_target = scale * (exp_real(logits[target] - top) / sum - 1) * (1 - z * z);
    for (int c = 0; c < V; c++) {
        real zc = logits[c] * inv_cap;
        logits[c] = exp_real(logits[c] - top) * inv_sum * (1 - zc * zc);
    }
    logits[target] = at_target;
    return loss;
}

// Sum of the token losses. With gradients: m->d_mid becomes the gradient of the final norm's output. The logits exist
// only a tile of rows at a time, so a large vocabulary costs no memory.
static double classifier(Model *m, const Batch *batch, int with_grad, double scale) {
    int rows = batch->B * batch->T, D = dim(m, DIM_D), V = dim(m, DIM_V);
    size_t head = m->table.tensors[m->table.shell[SHELL_HEAD]].offset;
    for (int r0 = 0; r0 < rows; r0 += m->logit_rows) {
        int n = imin(m->logit_rows, rows - r0);
        matmul_forward(m->logits, V, m->out + (size_t)r0 * D, D, m->params + head, n, V, D, 0);
#pragma omp parallel for
        for (int r = 0; r < n; r++)
            m->losses[r0 + r] =
                cross_entropy_row(m->logits + (size_t)r * V, V, batch->targets ? batch->targets[r0 + r] : -1,
                                  (real)m->config.logit_soft_cap, (real)scale, with_grad,
                                  batch->logits ? batch->logits + (size_t)(r0 + r) * V : NULL);
        if (with_grad)
            matmul_backward(m->d_mid + (size_t)r0 * D, D, 0, m->grads + head, m->logits, V, m->out + (size_t)r0 * D, D,
                            m->params + head, n, V, D);
    }
    double sum = 0;
    for (int r = 0; r < rows; r++) sum += m->losses[r];
    return sum;
}

// ----------------------------------------------------------------------------------------------------------------
// Forward and backward through the model

static Norm out_norm(const Model *m) { return m->config.layernorm_out ? layernorm_v1(m) : rmsnorm(m); }

static void model_forward(Model *m, const Sequence *s, const int *tokens) {
    Norm norm = out_norm(m);
    size_t w = m->table.tensors[m->table.shell[SHELL_OUT_NORM]].offset;
    embedding_forward(m, tokens, s->B * s->T);
    for (int b = 0; b < m->config.num_blocks; b++) block_forward(m, b, s);
    norm_forward(m->out, m->out_stats, m->x[m->config.num_blocks], m->params + w, &norm, s->B * s->T);
}

static void model_backward(Model *m, const Sequence *s, const int *tokens) {
    Norm norm = out_norm(m);
    size_t w = m->table.tensors[m->table.shell[SHELL_OUT_NORM]].offset;
    norm_backward(m->dx, 0, m->grads + w, m->d_mid, m->x[m->config.num_blocks], m->out_stats, m->params + w, &norm,
                  s->B * s->T, m->partial);
    for (int b = m->config.num_blocks - 1; b >= 0; b--) block_backward(m, b, s);
    embedding_backward(m, tokens, s->B * s->T);
}

// This rank's segment of the batch's sequences. On the first rank the states before the sequence enter, on the others
// each block puts what enters in their place. The sLSTM, which may take all tokens of some rows, needs all resets.
static void share_sequence(Model *m, Sequence *s, const Batch *batch) {
    size_t states = sizeof(real) * (size_t)s->B * s->state_row;
    int P = comm.sp_size, longest = m->run.max_len;
    s->whole = batch->whole;
    s->state_first = s->state_in;
    if (s->state_in) memcpy(m->entering, s->state_in, states);
    else memset(m->entering, 0, states);
    memset(m->dstate, 0, states);
    s->state_in = m->entering;
    s->dstate = m->dstate;
    if (!s->state_out) s->state_out = m->leaving;
    if (!batch->resets || !model_has(&m->config, BLOCK_SLSTM)) return;
    size_t count = (size_t)s->B * (size_t)longest;
    unsigned char *gathered = m->all_resets, *whole = gathered + P * count;
    for (int b = 0; b < s->B; b++)
        memcpy(m->resets + (size_t)b * longest, batch->resets + (size_t)b * s->T, (size_t)s->T);
    comm.data->all_gather(COMM_SP, m->resets, gathered, count, "all-gather of document resets", NULL);
    for (int r = 0; r < P; r++)
        for (int b = 0; b < s->B; b++) {
            int begin = segment_begin(s->whole, P, r), len = segment_begin(s->whole, P, r + 1) - begin;
            memcpy(whole + (size_t)b * s->whole + begin, gathered + r * count + (size_t)b * longest, (size_t)len);
        }
    s->whole_resets = whole;
}

// The layers' view of a batch. Stored states are read through a copy, because their place receives the final ones
// and a recomputed forward pass must see the first ones again.
static Sequence batch_sequence(Model *m, const Batch *batch) {
    Sequence s = {batch->B, batch->T, batch->resets, m->history, NULL, NULL, m->states.total, 0, 0, NULL, NULL, NULL};
    count_history(m->history, batch->resets, batch->B, batch->T);
    if (batch->state_row >= 0 && m->run.num_state_rows > 0) {
        s.state_out = m->stored + (size_t)batch->state_row * m->states.total;
        memcpy(m->state_in, s.state_out, sizeof(real) * (size_t)batch->B * m->states.total);
        s.state_in = m->state_in;
    }
    if (batch->whole) share_sequence(m, &s, batch);
    return s;
}

// Stored states: every rank of a sequence gets those that the last one's segment has left.
static void share_final_states(const Model *m, const Sequence *s) {
    int last = comm.sp_size - 1;
    if (!s->whole || s->state_out == m->leaving) return;
    for (int r = 0; r < last; r++)
        comm.data->send_recv(COMM_SP, s->state_out, comm.sp_rank == last ? r : -1, s->state_out,
                             comm.sp_rank == r ? last : -1, sizeof(real) * (size_t)s->B * s->state_row, "stored states",
                             NULL);
}

// A small job is done before a second thread has woken up; results do not depend on the choice.
static void use_threads(size_t tokens) {
#ifdef _OPENMP
    omp_set_num_threads(tokens * model.table.total < 4000000 ? 1 : model.run.threads);
#else
    (void)tokens;
#endif
}

static double cpu_forward_backward(const Batch *batch, double scale) {
    use_threads((size_t)batch->B * batch->T);
    Sequence s = batch_sequence(&model, batch);
    model_forward(&model, &s, batch->inputs);
    double loss = classifier(&model, batch, 1, scale);
    model_backward(&model, &s, batch->inputs);
    share_final_states(&model, &s);
    return loss;
}

static double cpu_evaluate(const Batch *batch) {
    use_threads((size_t)batch->B * batch->T);
    Sequence s = batch_sequence(&model, batch);
    model_forward(&model, &s, batch->inputs);
    share_final_states(&model, &s);
    return classifier(&model, batch, 0, 0);
}

static void cpu_decode_start(void) { memset(model.decode_state, 0, sizeof(real) * model.states.total); }

static void cpu_decode_step(int token, float *logits) {
    static const unsigned char history[1] = {3};
    Sequence s = {1, 1,    NULL, history, model.decode_state, model.decode_state, model.states.total, 1,
                  0, NULL, NULL, NULL};
    Batch batch = {1, 1, &token, NULL, NULL, -1, logits, NULL, NULL, 0, 0};
    use_threads(1);
    model_forward(&model, &s, &token);
    classifier(&model, &batch, 0, 0);
}

// ----------------------------------------------------------------------------------------------------------------
// AdamW

static void cpu_zero_grad(void) {
    use_threads(4);
#pragma omp parallel for
    for (size_t i = 0; i < shards_padded(&model.shards); i++) model.grads[i] = 0;
}

// Blocks of fixed size, added in order: the same bits for any number of threads.
static double square_sum(const real *x, size_t total) {
    enum { BLOCK = 16384 };
    int blocks = (int)((total + BLOCK - 1) / BLOCK);
    double *sums = (double *)xcalloc((size_t)blocks, sizeof(double)), sum = 0;
#pragma omp parallel for
    for (int k = 0; k < blocks; k++) {
        size_t end = (size_t)(k + 1) * BLOCK < total ? (size_t)(k + 1) * BLOCK : total;
        double block = 0;
#pragma omp simd reduction(+ : block)
        for (size_t i = (size_t)k * BLOCK; i < end; i++) block += (double)x[i] * x[i];
        sums[k] = block;
    }
    for (int k = 0; k < blocks; k++) sum += sums[k];
    free(sums);
    return sum;
}

static double cpu_grad_norm(void) {  // each rank its own pieces, whoever else has them
    const Shards *s = &model.shards;
    double sum = 0;
    use_threads(4);
    for (size_t k = 0; k < s->num_buckets; k++)
        sum += square_sum(model.grads + k * shards_bucket(s) + s->piece * (size_t)s->rank, s->piece);
    comm_sum(&sum, 1, "sum of the gradient's norm");
    return sqrt(sum);
}

static real *kind_base(int kind) {
    real *bases[] = {model.params, model.grads, model.m, model.v};
    return bases[kind];
}

// Pieces from their owners to all.
static void cpu_collect(int kind) {
    const Shards *s = &model.shards;
    if (model.own_moments && (kind == KIND_M || kind == KIND_V)) return;
    const char *const what[] = {"all-gather of weights", "all-gather of gradients", "all-gather of moments",
                                "all-gather of moments"};
    for (size_t k = 0; k < s->num_buckets; k++) {
        real *bucket = kind_base(kind) + k * shards_bucket(s);
        comm.data->all_gather(COMM_WORLD, bucket + s->piece * (size_t)s->rank, bucket, sizeof(real) * s->piece,
                              what[kind], NULL);
    }
}

// Sums over the world: the owner of a piece gets its sum, and without --zero 1 all ranks get all.
static void cpu_reduce_grads(void) {
    const Shards *s = &model.shards;
    for (size_t k = s->num_buckets; k-- > 0;) {  // in the order in which the backward pass completes them
        real *bucket = model.grads + k * shards_bucket(s);
        comm.data->reduce_scatter(COMM_WORLD, bucket, bucket + s->piece * (size_t)s->rank, s->piece, comm_real,
                                  "reduce-scatter of gradients", NULL);
    }
    if (!model.run.zero) cpu_collect(KIND_GRAD);
}

// The elements of tensor t from `at` on, at most up to `end`, whose moments lie together: their number, 0 where this
// rank has none of them (*skip: how many). *place: where they stand in m and v.
static size_t moments_run(const TensorSpec *t, size_t at, size_t end, size_t *place, size_t *skip) {
    int owner;
    *place = t->offset + at;
    if (!model.own_moments) return end - at;
    size_t n = shards_run(&model.shards, t->offset + at, end - at, &owner, place);
    *skip = n;
    return owner == model.shards.rank ? n : 0;
}

static void cpu_update(const UpdateConfig *u) {
    use_threads(16);
    real beta1 = (real)u->beta1, beta2 = (real)u->beta2, eps = (real)u->eps, lr = (real)u->lr,
         scale = (real)u->grad_scale;
    real correct1 = (real)(1 / (1 - pow(u->beta1, u->step))), correct2 = (real)(1 / (1 - pow(u->beta2, u->step)));
    for (int k = 0; k < model.table.num_tensors; k++) {
        const TensorSpec *t = &model.table.tensors[k];
        real decay = t->decay ? (real)u->weight_decay : 0;
        for (size_t at = 0, place, skip = 0; at < t->count;) {
            size_t count = moments_run(t, at, t->count, &place, &skip);
            real *w = model.params + t->offset + at, *m = model.m + place, *v = model.v + place;
            const real *g = model.grads + t->offset + at;
#pragma omp parallel for simd if (count > 16384)
            for (size_t i = 0; i < count; i++) {
                real gi = g[i] * scale;
                m[i] = beta1 * m[i] + (1 - beta1) * gi;
                v[i] = beta2 * v[i] + (1 - beta2) * gi * gi;
                w[i] -= lr * (m[i] * correct1 / (sqrt_real(v[i] * correct2) + eps) + decay * w[i]);
            }
            at += count ? count : skip;
        }
    }
    if (model.own_moments) cpu_collect(KIND_WEIGHT);
}

// ----------------------------------------------------------------------------------------------------------------
// Memory: every buffer is taken from one arena, first with no memory behind it to learn the size, then for real

// Elements left free between buffers. Most sizes are multiples of large powers of two, so that without the gap all that
// a loop reads and writes at a time would lie at the same place of its page. AdamW, on weights, gradients and moments,
// then takes three times as long, probably since all four fall into the same sets of the caches.
enum { STAGGER = 65 * 64 / (int)sizeof(real) };

typedef struct {
    real *base;
    size_t used;
} Arena;

static real *take(Arena *a, size_t count) {
    real *p = a->base ? a->base + a->used : NULL;
    a->used += (count + 15) / 16 * 16 + STAGGER;
    return p;
}

static void take_ffn(Arena *a, FfnActs *f, size_t rows, size_t D, size_t U) {
    f->u = take(a, rows * D);
    f->stats = take(a, rows * 2);
    f->gate_up = take(a, rows * 2 * U);
    f->act = take(a, rows * U);
}

static void take_block(Arena *a, const Model *m, int b, BlockActs *acts) {
    size_t rows = (size_t)m->run.max_batch * m->run.max_len, D = dim(m, DIM_D), I = dim(m, DIM_I), NH = dim(m, DIM_NH);
    size_t Dk = dim(m, DIM_DK), Dv = dim(m, DIM_DV);
    int type = m->config.block_types[b], v1 = type == BLOCK_MLSTM_V1;
    size_t inner = type == BLOCK_MLSTM ? Dv : v1 ? I : D;
    acts->u = take(a, rows * D);
    acts->stats = take(a, rows * 2);
    acts->h = take(a, rows * inner);
    acts->hn = take(a, rows * inner);
    acts->hn_stats = take(a, rows * NH * 2);
    if (type != BLOCK_SLSTM) {
        Sequence s = {m->run.max_batch, m->run.max_len, NULL, NULL, NULL, NULL, 0, 0, 0, NULL, NULL, NULL};
        MlstmShape shape = mlstm_shape(m, &s, v1);
        acts->proj = take(a, rows * (v1 ? 2 * I : 2 * Dk + 2 * Dv + 2 * NH));
        acts->gates = take(a, rows * 2 * NH);
        acts->sig = take(a, rows * NH);
        acts->states = take(a, (size_t)s.B * NH * (mlstm_num_chunks(&shape) + 1) * mlstm_state_size(&shape));
        acts->y = take(a, rows * inner);
    }
    if (type != BLOCK_MLSTM) {
        acts->conv = take(a, rows * inner);
        acts->ca = take(a, rows * inner);
    }
    if (v1) {
        acts->qkv = take(a, rows * 3 * I);
        acts->ht = take(a, rows * I);
        return;  // no FFN
    }
    acts->x_mid = take(a, rows * D);
    take_ffn(a, &acts->ffn, rows, D, dim(m, type == BLOCK_MLSTM ? DIM_U : DIM_US));
    if (type == BLOCK_SLSTM) {
        acts->slstm.gates = take(a, rows * 4 * D);
        acts->slstm.fgrad = take(a, rows * D);
        acts->slstm.c = take(a, rows * D);
        acts->slstm.n = take(a, rows * D);
        acts->slstm.y_prev = take(a, rows * D);
    }
}

// Widths of the backward pass's scratch: of d_wide, and of d_mid and its siblings.
static void scratch_widths(const Model *m, size_t *wide, size_t *mid) {
    size_t D = dim(m, DIM_D), I = dim(m, DIM_I), NH = dim(m, DIM_NH), U = dim(m, DIM_U), Us = dim(m, DIM_US);
    size_t Dk = dim(m, DIM_DK), Dv = dim(m, DIM_DV);
    size_t wides[NUM_BLOCK_TYPES] = {2 * Dk + 2 * Dv + 2 * NH > 2 * U ? 2 * Dk + 2 * Dv + 2 * NH : 2 * U,
                                     5 * I + 2 * NH, 4 * D > 2 * Us ? 4 * D : 2 * Us};
    size_t mids[NUM_BLOCK_TYPES] = {U > Dv ? U : Dv, I, Us};
    *wide = 0;
    *mid = D;
    for (int type = 0; type < NUM_BLOCK_TYPES; type++) {
        if (!model_has(&m->config, (BlockType)type)) continue;
        if (wides[type] > *wide) *wide = wides[type];
        if (mids[type] > *mid) *mid = mids[type];
    }
}

// Of what the ranks of a sequence exchange: a block's small states both ways, resharded sLSTM pre-activations both ways
// and its final states twice, and for an mLSTM the pairs (S, G) of all ranks, or four in a scan.
static size_t exchange_size(const Model *m) {
    Sequence s = {m->run.max_batch, m->run.max_len, NULL, NULL, NULL, NULL, 0, 0, 0, NULL, NULL, NULL};
    size_t B = (size_t)s.B, D = dim(m, DIM_D), I = dim(m, DIM_I), size = 0;
    size_t pairs = comm.sp_size <= fold_by_gather ? (size_t)comm.sp_size : 4;
    for (int type = 0; type < NUM_BLOCK_TYPES; type++) {
        if (!model_has(&m->config, (BlockType)type)) continue;
        MlstmShape shape = mlstm_shape(m, &s, type == BLOCK_MLSTM_V1);
        size_t wants = type == BLOCK_SLSTM ? 8 * B * m->run.max_len * D + 8 * B * D : pairs * B * segment_row(&shape);
        if (type == BLOCK_MLSTM_V1 && wants < 6 * B * I) wants = 6 * B * I;
        if (wants > size) size = wants;
    }
    return size;
}

static void take_activations(Arena *a, Model *m) {
    int N = m->config.num_blocks;
    size_t rows = (size_t)m->run.max_batch * m->run.max_len, D = dim(m, DIM_D), wide, mid, shared = a->used,
           end = a->used;
    for (int b = 0; b < N; b++) {
        if (m->run.recompute) a->used = shared;
        take_block(a, m, b, &m->acts[b]);
        if (a->used > end) end = a->used;
    }
    a->used = end;
    for (int b = 0; b <= N; b++) m->x[b] = take(a, rows * D);
    m->out = take(a, rows * D);
    m->out_stats = take(a, rows * 2);
    m->losses = take(a, rows);
    m->logits = take(a, (size_t)m->logit_rows * dim(m, DIM_V));
    if (!m->run.training) return;
    scratch_widths(m, &wide, &mid);
    m->dx = take(a, rows * D);
    m->d_wide = take(a, rows * wide);
    m->d_mid = take(a, rows * mid);
    m->d_mid2 = take(a, rows * mid);
    m->d_mid3 = take(a, rows * mid);
    // widest row of partial sums: bias of slstm 4D, conv 5I or 5D, 4x4 blocks 4I
    m->partial = take(a, MAX_PARTS * (5 * (size_t)imax(dim(m, DIM_I), dim(m, DIM_D)) + mid));
    if (comm.sp_size > 1) m->exchange = take(a, exchange_size(m));
}

static char cpu_device[96];

static void cpu_build(const ModelConfig *config, const TensorTable *table, const RunConfig *run) {
    Model *m = &model;
    const double mib = 1048576.0 / sizeof(real);
    m->config = *config;
    m->table = *table;
    m->states = model_state_table(config);
    m->run = *run;
    int threads = 1, V = dim(m, DIM_V);
#ifdef _OPENMP
    threads = run->threads;
    omp_set_num_threads(threads);
#endif
#ifdef USE_OPENBLAS
    openblas_set_num_threads(1);  // our threads share out the work; each calls it for its part
#endif
    format_into(cpu_device, sizeof cpu_device, "CPU, %d thread%s, %s matmul", threads, threads > 1 ? "s" : "",
                MATMUL_NAME);
    m->logit_rows = imin(run->max_batch * run->max_len, imax(64, (1 << 24) / V));
    m->x = (real **)xcalloc((size_t)config->num_blocks + 1, sizeof(real *));
    m->acts = (BlockActs *)xcalloc((size_t)config->num_blocks, sizeof(BlockActs));
    Arena arena = {NULL, 0};
    take_activations(&arena, m);
    int shared = comm.sp_size > 1 && run->training;
    size_t own = m->states.total * (size_t)(run->num_state_rows + (run->num_state_rows ? run->max_batch : 0) + 1);
    size_t segment = shared ? m->states.total * (size_t)run->max_batch : 0, states = own + 3 * segment;
    m->shards = shards_make(table->total, comm.size, comm.rank);
    m->own_moments = run->zero && comm.size > 1;
    size_t padded = shards_padded(&m->shards), moments = m->own_moments ? shards_owned(&m->shards) : padded;
    size_t all = padded + (run->training ? padded + 2 * moments : 0);
    fprintf(run->training ? stdout : stderr, "memory      weights%s %.1f MiB, activations %.1f MiB, states %.1f MiB\n",
            run->training ? ", gradients and moments" : "",
            (double)all / mib, (double)arena.used / mib, (double)states / mib);
    Arena weights = {(real *)xcalloc(all + 4 * (STAGGER + 16), sizeof(real)), 0};
    m->params = take(&weights, padded);
    if (run->training) {
        m->grads = take(&weights, padded);
        m->m = take(&weights, moments);
        m->v = take(&weights, moments);
    }
    m->stored = (real *)xcalloc(states, sizeof(real));
    m->state_in = m->stored + (size_t)run->num_state_rows * m->states.total;
    m->decode_state = m->stored + own - m->states.total;
    if (shared) {
        size_t tokens = (size_t)run->max_batch * run->max_len;
        m->entering = m->stored + own;
        m->leaving = m->entering + segment;
        m->dstate = m->leaving + segment;
        m->resets = (unsigned char *)xcalloc((2 * (size_t)comm.sp_size + 1) * tokens, 1);
        m->all_resets = m->resets + tokens;
    }
    m->history = (unsigned char *)xcalloc((size_t)run->max_batch * run->max_len, 1);
    arena.base = (real *)xcalloc(arena.used, sizeof(real));
    arena.used = 0;
    take_activations(&arena, m);
}

// ----------------------------------------------------------------------------------------------------------------
// The rest of the backend: tensors and states cross its border as float

// Elements first .. first+count-1 of a tensor, one way or the other: src or dst is given. Of moments only those that
// this rank has.
static void move_part(int kind, int index, size_t first, size_t count, const float *src, float *dst) {
    const TensorSpec *t = &model.table.tensors[index];
    int moments = kind == KIND_M || kind == KIND_V;
    for (size_t at = first, end = first + count, place, skip = 0, n; at < end; at += n ? n : skip) {
        place = t->offset + at;
        n = moments ? moments_run(t, at, end, &place, &skip) : end - at;
        real *x = kind_base(kind) + place;
        for (size_t k = 0; k < n; k++)
            if (src) x[k] = src[at - first + k];
            else dst[at - first + k] = (float)x[k];
    }
}

static void cpu_read_part(int kind, int index, size_t first, size_t count, float *dst) {
    move_part(kind, index, first, count, NULL, dst);
}

static void cpu_write_part(int kind, int index, size_t first, size_t count, const float *src) {
    move_part(kind, index, first, count, src, NULL);
}

static void cpu_read_tensor(int kind, int index, float *dst) {
    cpu_read_part(kind, index, 0, model.table.tensors[index].count, dst);
}

static void cpu_write_tensor(int kind, int index, const float *src) {
    cpu_write_part(kind, index, 0, model.table.tensors[index].count, src);
}

static const Shards *cpu_shards(void) { return &model.shards; }
static size_t cpu_place(int index) { return model.table.tensors[index].offset; }

static void cpu_read_state(int row, float *dst) {
    for (size_t k = 0; k < model.states.total; k++) dst[k] = (float)model.stored[(size_t)row * model.states.total + k];
}

static void cpu_write_state(int row, const float *src) {
    for (size_t k = 0; k < model.states.total; k++)
        model.stored[(size_t)row * model.states.total + k] = src ? src[k] : 0;
}

static const Backend cpu_backend = {
    "cpu",           cpu_device,       cpu_build,      cpu_forward_backward, cpu_evaluate,
    cpu_zero_grad,   cpu_grad_norm,    cpu_update,     cpu_decode_start,     cpu_decode_step,
    cpu_read_tensor, cpu_write_tensor, cpu_read_state, cpu_write_state,      cpu_reduce_grads,
    cpu_collect,     cpu_shards,       cpu_place,      cpu_read_part,        cpu_write_part};

#ifndef TESTING  // the tests include this file and bring their own main
// Threads that wait for others spin for some 20 ms by libgomp's default. Where another program wants the core, that
// time is taken from the very thread they wait for, and a step takes ten times as long. The library reads its settings
// when the program is loaded, so the program starts over once with a short wait; a setting of the user's own stays.
static void shorten_waits(char **argv) {
#if defined(_OPENMP) && defined(__linux__)
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    if (setenv("GOMP_SPINCOUNT", "2000", 1) == 0) execv("/proc/self/exe", argv);  // if that fails, long waits it is
#else
    (void)argv;
#endif
}

int main(int argc, char **argv) {
    shorten_waits(argv);
    return trainer_main(argc, argv, &cpu_backend);
}
#endif
