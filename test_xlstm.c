// test_xlstm.c: tests of the mathematics in train_xlstm.c, which it includes. Built with `real` = double (the main one:
// finite differences, equality of different ways to compute the same thing), with float, the trainer's own type
// (rounding against references in double, elementary functions, overfitting), and with float and OpenBLAS.
//
//   build:  make tests
//   run:    build/test_xlstm [NAME]              only the tests whose name contains NAME
//           build/test_xlstm_float [NAME]
//           build/test_xlstm_openblas [NAME]
//
// A check is one line with its measured error and the tolerance; the last line is "N passed, N failed". Exit code 1 if
// a check failed. The tests themselves are in dev/test/test_math_*.h.

#ifndef TESTING
#define TESTING
#endif
#include "train_xlstm.c"

#include <unistd.h>  // dup, dup2

// ----------------------------------------------------------------------------------------------------------------
// Checks

#ifdef REAL_DOUBLE
enum { IS_DOUBLE = 1 };
#else
enum { IS_DOUBLE = 0 };
#endif
#ifdef USE_OPENBLAS  // its sums depend on the size of the matrix, so on rows and threads; the built-in matmul's do not
enum { SAME_BITS = 0 };
#else
enum { SAME_BITS = 1 };
#endif

static int num_passed, num_failed;

PRINTF_LIKE(3, 4)
static void check(double error, double tolerance, const char *fmt, ...) {
    char name[200];
    va_list args;
    va_start(args, fmt);
    vsnprintf(name, sizeof name, fmt, args);
    va_end(args);
    int ok = error <= tolerance;  // a NaN fails
    if (ok) num_passed++;
    else num_failed++;
    printf("%s %-92s %8.1e <= %.0e\n", ok ? "ok  " : "FAIL", name, error, tolerance);
    fflush(stdout);
}

// The largest error of several comparisons that make up one check, and where it was.
typedef struct {
    double error;
    char where[120];
} Worst;

static void worst_of(Worst *w, double error, const char *where) {
    if (error <= w->error) return;  // a NaN goes on
    if (w->error != w->error) return;
    w->error = error;
    snprintf(w->where, sizeof w->where, "%s", where);
}

// max|a-b| / max|b|, and relative L2 distance |a-b| / |b|. Infinite if anything is not finite. Below `least` the size
// of b no longer counts: the difference is then measured against `least`.
static double max_distance(const double *a, const double *b, size_t n, double least) {
    double top = 0, size = least;
    for (size_t k = 0; k < n; k++) {
        if (!isfinite(a[k]) || !isfinite(b[k])) return INFINITY;
        top = fmax(top, fabs(a[k] - b[k]));
        size = fmax(size, fabs(b[k]));
    }
    return top == 0 ? 0 : top / size;
}

static double l2_distance(const double *a, const double *b, size_t n, double least) {
    double top = 0, size = 0;
    for (size_t k = 0; k < n; k++) {
        if (!isfinite(a[k]) || !isfinite(b[k])) return INFINITY;
        top += (a[k] - b[k]) * (a[k] - b[k]);
        size += b[k] * b[k];
    }
    return top == 0 ? 0 : sqrt(top) / fmax(sqrt(size), least);
}

// How results of this build are compared with a reference in double: double by the largest error, float by L2. `least`
// is in units of magnitude().
static double magnitude(const double *x, size_t n) {
    double top = 0, square = 0;
    for (size_t k = 0; k < n; k++) {
        top = fmax(top, fabs(x[k]));
        square += x[k] * x[k] / (double)n;
    }
    return IS_DOUBLE ? top : sqrt(square);
}

static double distance_above(const double *a, const double *b, size_t n, double least) {
    return IS_DOUBLE ? max_distance(a, b, n, least) : l2_distance(a, b, n, least * sqrt((double)n));
}

static double distance(const double *a, const double *b, size_t n) { return distance_above(a, b, n, 1e-30); }

// Number of elements whose bits differ; a NaN differs.
static double differing(const double *a, const double *b, size_t n) {
    double count = 0;
    for (size_t k = 0; k < n; k++) count += !(a[k] == b[k]);
    return count;
}

static void use_three_threads(int on) {  // cases are small: on one thread but where threads are tested
#ifdef _OPENMP
    omp_set_num_threads(on ? 3 : 1);
#else
    (void)on;
#endif
}

// ----------------------------------------------------------------------------------------------------------------
// Random test data. All of it is rounded to float, so that both builds compute with the same numbers.

static uint64_t draw;  // each array its own stream; reset for every test, so that a test alone sees the same data

static double random_normal(uint64_t at) { return (float)rng_normal(1, RNG_TEST, draw, at); }
static double random_uniform(uint64_t at) { return rng_uniform(1, RNG_TEST, draw, at); }
static int random_below(uint64_t at, int n) { return (int)(random_uniform(at) * n); }

static double *zeros(size_t n) { return (double *)xcalloc(n, sizeof(double)); }

static double *normals(size_t n, double mean, double std) {
    double *x = zeros(n);
    draw++;
    for (size_t k = 0; k < n; k++) x[k] = (float)(mean + std * random_normal(k));
    return x;
}

static void copy_to_real(real *dst, const double *src, size_t n) {
    for (size_t k = 0; k < n; k++) dst[k] = (real)src[k];
}

static void copy_from_real(double *dst, const real *src, size_t n) {
    for (size_t k = 0; k < n; k++) dst[k] = src[k];
}

// Copies between an array [count / width, width] and columns of rows with stride ld.
static void rows_from(real *rows, size_t ld, const double *x, size_t count, size_t width) {
    for (size_t k = 0; k < count; k++) rows[k / width * ld + k % width] = (real)x[k];
}
static void rows_to(double *x, const real *rows, size_t ld, size_t count, size_t width) {
    for (size_t k = 0; k < count; k++) x[k] = rows[k / width * ld + k % width];
}

static real *reals(size_t n, double value) {
    real *x = (real *)xcalloc(n, sizeof(real));
    for (size_t k = 0; k < n; k++) x[k] = (real)value;
    return x;
}

// Where documents begin inside a sequence.
typedef enum {
    RESET_NONE,
    RESET_FIRST,
    RESET_LAST,
    RESET_BORDERS,   // at multiples of the chunk length
    RESET_ADJACENT,  // runs of 2 and 3 tokens
    RESET_EVERY,
    RESET_RANDOM,
    NUM_RESET_KINDS
} ResetKind;
static const char *const reset_names[] = {"none", "first", "last", "borders", "adjacent", "every", "random"};

// [B, T], NULL for RESET_NONE. The second sequence has other resets than the first.
static unsigned char *make_resets(ResetKind kind, int B, int T, int chunk) {
    if (kind == RESET_NONE) return NULL;
    unsigned char *resets = (unsigned char *)xcalloc((size_t)B * T, 1);
    draw++;
    for (int k = 0; k < B * T; k++) {
        int b = k / T, t = k % T, at = T / 3 + b;
        int adjacent = t == at || t == at + 1 || (t >= 2 * at && t < 2 * at + 3);
        int is[NUM_RESET_KINDS] = {0, t == 0, t == T - 1, t % chunk == 0 && t > 0, adjacent, 1, 0};
        is[RESET_RANDOM] = random_uniform((uint64_t)k) < 0.15;
        resets[k] = (unsigned char)is[b % 2 && kind != RESET_EVERY ? RESET_RANDOM : kind];
    }
    return resets;
}

// Where a sequence of SPLIT_T tokens is cut.
static const int splits[][6] = {
    {1, 100}, {99, 100}, {50, 100}, {16, 100}, {37, 100}, {1, 2, 3, 4, 100}, {5, 20, 33, 64, 97, 100}};
enum { NUM_SPLITS = sizeof splits / sizeof splits[0], SPLIT_T = 100 };

static int split_count(int k) {
    int n = 0;
    while (splits[k][n] != SPLIT_T) n++;
    return n + 1;
}

static double ref_log_sigmoid(double x) { return x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x)); }

// ----------------------------------------------------------------------------------------------------------------
// A grid of cases in which every pair of options occurs: full products are out of reach. Greedy: of all combinations
// the one that covers most of the pairs that are still missing, until none is.

enum { MAX_OPTIONS = 10, MAX_LEVELS = 10, MAX_CASES = 200 };
typedef struct {
    int count;
    int level[MAX_CASES][MAX_OPTIONS];
} Grid;

static Grid pair_grid(int options, const int *levels) {
    static unsigned char covered[MAX_OPTIONS][MAX_LEVELS][MAX_OPTIONS][MAX_LEVELS];
    Grid grid;
    long all = 1;
    memset(&grid, 0, sizeof grid);
    memset(covered, 0, sizeof covered);
    for (int o = 0; o < options; o++) all *= levels[o];
    for (;;) {
        int best = 0, best_level[MAX_OPTIONS] = {0}, level[MAX_OPTIONS];
        for (long combination = 0; combination < all; combination++) {
            long rest = (combination + 7919 * grid.count) % all;  // ties: not always the first levels
            int fresh = 0;
            for (int o = 0; o < options; o++) {
                level[o] = (int)(rest % levels[o]);
                rest /= levels[o];
            }
            for (int a = 0; a < options; a++)
                for (int b = a + 1; b < options; b++) fresh += !covered[a][level[a]][b][level[b]];
            if (fresh <= best) continue;
            best = fresh;
            memcpy(best_level, level, sizeof level);
        }
        if (best == 0 || grid.count == MAX_CASES) return grid;
        memcpy(grid.level[grid.count++], best_level, sizeof best_level);
        for (int a = 0; a < options; a++)
            for (int b = a + 1; b < options; b++) covered[a][best_level[a]][b][best_level[b]] = 1;
    }
}

// ----------------------------------------------------------------------------------------------------------------
// Finite differences

#ifdef REAL_DOUBLE
// A function of numbers in memory. *branches identifies the branch that each row of the computation takes (|q.n| or
// e^-m as denominator): across a change of it there is no derivative.
typedef double (*LossFunction)(void *context, uint64_t *branches);

// Central difference of 4th order in *x; NAN if the step leaves a branch.
static double difference(LossFunction loss, void *context, uint64_t branches, double *x, double step) {
    static const double at[4] = {-2, -1, 1, 2};
    double x0 = *x, f[4];
    int same = 1;
    for (int k = 0; k < 4; k++) {
        uint64_t b = branches;
        *x = x0 + at[k] * step;
        f[k] = loss(context, &b);
        same = same && b == branches;
    }
    *x = x0;
    return same ? (8 * (f[2] - f[1]) - (f[3] - f[0])) / (12 * step) : NAN;
}

// Derivative in *x. A large step errs by curvature, a small one by rounding: if the first difference is not close to
// `guess`, then of several steps those two count that agree best (whatever the guess is). NAN near a kink.
static double derivative(LossFunction loss, void *context, uint64_t branches, double *x, double guess, double close) {
    double step = 4e-4, d = difference(loss, context, branches, x, step), least = INFINITY;
    while (isnan(d) && step > 1e-7) d = difference(loss, context, branches, x, step /= 8);
    if (isnan(d) || fabs(d - guess) <= close) return d;
    double wide = difference(loss, context, branches, x, 32 * step);
    for (double factor = 8; factor > 0.1; factor /= 4) {
        double narrow = difference(loss, context, branches, x, factor * step);
        if (fabs(wide - narrow) < least) {
            least = fabs(wide - narrow);
            d = (wide + narrow) / 2;
        }
        wide = narrow;
    }
    return d;
}

// max|gradient - difference| / max|difference| over `entries` elements of x[count] (all, if there are few more).
// Differences carry an absolute error of about 1e-12: a gradient smaller than `least` is measured against that.
static double gradient_error(LossFunction loss, void *context, double *x, const double *gradient, size_t count,
                             size_t entries, double least) {
    uint64_t branches = 0;
    double top = 0, size = least;
    size_t n = count <= entries + 4 ? count : entries, skipped = 0;
    loss(context, &branches);
    draw++;
    for (size_t e = 0; e < n; e++) {
        size_t k = n == count ? e : (size_t)(random_uniform(e) * (double)count);
        if (!isfinite(gradient[k])) return INFINITY;
        double d = derivative(loss, context, branches, &x[k], gradient[k], 1e-7 * fmax(size, fabs(gradient[k])));
        if (isnan(d)) {
            skipped++;
            continue;
        }
        top = fmax(top, fabs(d - gradient[k]));
        size = fmax(size, fabs(d));
        if (top > 0.01 * size) break;  // simply wrong
    }
    return skipped * 4 > n ? INFINITY : top / size;
}
#endif

// ----------------------------------------------------------------------------------------------------------------

#include "dev/test/test_math_tables.h"  // presets, tensors, initial values, random numbers
#include "dev/test/test_math_layers.h"  // gemm, elementary functions, norms, conv: one layer at a time
#include "dev/test/test_math_mlstm.h"   // mLSTM cell
#include "dev/test/test_math_slstm.h"   // sLSTM cell
#include "dev/test/test_math_model.h"   // whole models, AdamW
#include "dev/test/test_math_ranks.h"   // several ranks against one

typedef struct {
    const char *name;
    void (*run)(void);
} Test;

static const Test tests[] = {
    {"rng", test_rng},
    {"presets", test_presets},
    {"tensors", test_tensors},
    {"init", test_init},
    {"blocks", test_blocks},
    {"gemm", test_gemm},
#ifndef USE_OPENBLAS
    {"strassen", test_strassen},
#endif
#ifdef USE_AMX
    {"amx", test_amx},
#endif
    {"elementary", test_elementary},
    {"layers", test_layers},
    {"mlstm_forms", test_mlstm_forms},
    {"mlstm_extreme", test_mlstm_extreme},
    {"mlstm_long", test_mlstm_long},
    {"mlstm_split", test_mlstm_split},
    {"slstm_forms", test_slstm_forms},
    {"slstm_extreme", test_slstm_extreme},
    {"slstm_long", test_slstm_long},
    {"slstm_split", test_slstm_split},
    {"model_rows", test_model_rows},
    {"model_chunks", test_model_chunks},
    {"model_bits", test_model_bits},
    {"model_split", test_model_split},
    {"model_packed", test_model_packed},
    {"model_decode", test_model_decode},
    {"model_extreme", test_model_extreme},
    {"model_backend", test_model_backend},
    {"adamw", test_adamw},
#ifdef REAL_DOUBLE
    {"mlstm_gradient", test_mlstm_gradient},
    {"slstm_gradient", test_slstm_gradient},
    {"model_gradient", test_model_gradient},
#else
    {"overfit", test_overfit},
#endif
};

// With mpirun: those for several ranks.
static const Test rank_tests[] = {{"ranks_plain", test_ranks_plain}, {"ranks_grid", test_ranks_grid}};

int main(int argc, char **argv) {
    comm_start();
    const Test *list = comm.size > 1 ? rank_tests : tests;
    size_t count = comm.size > 1 ? sizeof rank_tests / sizeof rank_tests[0] : sizeof tests / sizeof tests[0];
    double start = now_seconds();
    for (size_t k = 0; k < count; k++) {
        if (argc > 1 && !strstr(list[k].name, argv[1])) continue;
        double test_start = now_seconds();
        draw = 0;
        for (const char *c = list[k].name; *c; c++) draw = (draw * 31 + (uint64_t)*c) << 16 >> 16;
        use_three_threads(0);
        list[k].run();
        printf("     %s: %.1f s\n", list[k].name, now_seconds() - test_start);
    }
    printf("%s, %.1f s\n%d passed, %d failed\n", IS_DOUBLE ? "double" : "float", now_seconds() - start, num_passed,
           num_failed);
    comm_finish();
    return num_failed > 0 || num_passed == 0;
}
