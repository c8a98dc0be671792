// test_math_layers.h: tests of the single layers, part of test_xlstm.c: matrix products, elementary functions, and
// finite differences of every layer function alone (the cells have a file of their own).

// ----------------------------------------------------------------------------------------------------------------
// Matrix products against a triple loop

typedef struct {
    int M, N, K, transpose_a, transpose_b, accumulate, pad;
} GemmCase;

// The elements of a [rows, cols] matrix in memory with `pad` unused elements a line, stored transposed or not; what is
// no element is NaN and must stay out of the result.
static real *padded_matrix(int rows, int cols, int transposed, int pad, const double *x, size_t *row, size_t *col) {
    size_t line = (size_t)(transposed ? rows : cols) + pad, lines = transposed ? cols : rows;
    real *p = reals(lines * line, NAN);
    *row = transposed ? 1 : line;
    *col = transposed ? line : 1;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) p[r * *row + c * *col] = (real)x[(size_t)r * cols + c];
    return p;
}

static double gemm_error(const GemmCase *g, int all_threads) {
    size_t a_row, a_col, b_row, b_col, ldc = (size_t)g->N + g->pad, cells = (size_t)g->M * ldc;
    double *a = normals((size_t)g->M * g->K, 0, 1), *b = normals((size_t)g->K * g->N, 0, 1), worst = 0;
    real *A = padded_matrix(g->M, g->K, g->transpose_a, g->pad, a, &a_row, &a_col);
    real *B = padded_matrix(g->K, g->N, g->transpose_b, g->pad, b, &b_row, &b_col);
    real *C = reals(cells, g->accumulate ? 3 : NAN);
    for (int i = 0; i < g->M; i++)
        for (int j = g->N; j < (int)ldc; j++) C[i * ldc + j] = 7;  // between the lines nothing may be written
    (all_threads ? gemm : gemm_serial)(g->M, g->N, g->K, A, a_row, a_col, B, b_row, b_col, C, ldc, g->accumulate);
    for (int i = 0; i < g->M; i++)
        for (int j = 0; j < (int)ldc; j++) {
            double sum = 0, size = 0;
            for (int k = 0; j < g->N && k < g->K; k++) {
                double product = a[(size_t)i * g->K + k] * b[(size_t)k * g->N + j];
                sum += product;
                size += fabs(product);
            }
            double expected = j >= g->N ? 7 : sum + (g->accumulate ? 3 : 0);
            double error = fabs(C[i * ldc + j] - expected) / (size + 3);
            worst = error <= worst ? worst : error;  // a NaN goes through
        }
    free(a);
    free(b);
    free(A);
    free(B);
    free(C);
    return worst;
}

static double matmul_error(int rows, int N, int K) {  // matmul_forward and matmul_backward in all their variants
    size_t ld_x = (size_t)K + 1, ld_out = (size_t)N + 2;
    double *x = normals((size_t)rows * K, 0, 1), *w = normals((size_t)N * K, 0, 1),
           *dout = normals((size_t)rows * N, 0, 1);
    Worst worst = {0, ""};
    for (int accumulate = 0; accumulate < 2; accumulate++) {
        real *X = reals(rows * ld_x, NAN), *W = reals((size_t)N * K, 0),
             *OUT = reals(rows * ld_out, accumulate ? 2 : NAN);
        real *DOUT = reals(rows * ld_out, NAN), *DX = reals(rows * ld_x, accumulate ? 2 : NAN),
             *DW = reals((size_t)N * K, 1);
        double *out = zeros((size_t)rows * N), *dx = zeros((size_t)rows * K), *dw = zeros((size_t)N * K);
        double *got_out = zeros((size_t)rows * N), *got_dx = zeros((size_t)rows * K), *got_dw = zeros((size_t)N * K);
        rows_from(X, ld_x, x, (size_t)rows * K, K);
        rows_from(DOUT, ld_out, dout, (size_t)rows * N, N);
        copy_to_real(W, w, (size_t)N * K);
        matmul_forward(OUT, ld_out, X, ld_x, W, rows, N, K, accumulate);
        matmul_backward(DX, ld_x, accumulate, DW, DOUT, ld_out, X, ld_x, W, rows, N, K);
        for (size_t k = 0; k < (size_t)rows * N; k++) out[k] = 2 * accumulate;
        for (size_t k = 0; k < (size_t)rows * K; k++) dx[k] = 2 * accumulate;
        for (size_t k = 0; k < (size_t)N * K; k++) dw[k] = 1;
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < N; n++)
                for (int k = 0; k < K; k++) {
                    out[r * N + n] += x[r * K + k] * w[n * K + k];
                    dx[r * K + k] += dout[r * N + n] * w[n * K + k];
                    dw[n * K + k] += dout[r * N + n] * x[r * K + k];
                }
        rows_to(got_out, OUT, ld_out, (size_t)rows * N, N);
        rows_to(got_dx, DX, ld_x, (size_t)rows * K, K);
        copy_from_real(got_dw, DW, (size_t)N * K);
        worst_of(&worst, max_distance(got_out, out, (size_t)rows * N, 1), "out");
        worst_of(&worst, max_distance(got_dx, dx, (size_t)rows * K, 1), "dx");
        worst_of(&worst, max_distance(got_dw, dw, (size_t)N * K, 1), "dw");
        double *all[] = {out, dx, dw, got_out, got_dx, got_dw};
        real *all_real[] = {X, W, OUT, DOUT, DX, DW};
        for (int k = 0; k < 6; k++) {
            free(all[k]);
            free(all_real[k]);
        }
    }
    free(x);
    free(w);
    free(dout);
    return worst.error;
}

static void test_gemm(void) {
    static const int sizes[] = {1, 2, 3, 5, 7, 13, 17, 31, 33, 130}, inner[] = {1, 2, 3, 8, 17, 64, 255, 256, 257, 600};
    static const int levels[] = {10, 10, 10, 2, 2, 2, 2};
    double tolerance = IS_DOUBLE ? 1e-13 : 2e-6, worst[2] = {0, 0};
    Grid grid = pair_grid(7, levels);
    for (int k = 0; k < grid.count; k++) {
        const int *o = grid.level[k];
        GemmCase g = {sizes[o[0]], sizes[o[1]], inner[o[2]], o[3], o[4], o[5], o[6] ? 5 : 0};
        for (int threads = 0; threads < 2; threads++) worst[threads] = fmax(worst[threads], gemm_error(&g, threads));
    }
    check(worst[0], tolerance, "gemm_serial, %d combinations of odd sizes, strides, transposes, accumulate",
          grid.count);
    check(worst[1], tolerance, "gemm, the same");
    GemmCase big[] = {{301, 1100, 70, 0, 1, 0, 1}, {1030, 45, 515, 1, 0, 1, 0}, {67, 530, 300, 0, 0, 0, 3}};
    for (int k = 0; k < 3; k++)
        for (int threads = 1; threads <= 3; threads++) {
#ifdef _OPENMP
            omp_set_num_threads(threads);
#endif
            check(gemm_error(&big[k], 1), tolerance, "gemm %d x %d x %d, %d threads", big[k].M, big[k].N, big[k].K,
                  threads);
        }
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
    double error = 0;
    for (int rows = 1; rows < 5; rows++)
        for (int k = 1; k < 40; k += 13) error = fmax(error, matmul_error(rows, k + 2, k));
    check(error, IS_DOUBLE ? 1e-13 : 2e-6, "matmul_forward, matmul_backward, few rows and many, accumulate");
}

#ifndef USE_OPENBLAS
// C of one product, the same for every number of threads bit for bit?
static int same_bits(int M, int N, int K) {
    double *a = normals((size_t)M * K, 0, 1), *b = normals((size_t)K * N, 0, 1);
    size_t cells = (size_t)M * N;
    real *A = reals((size_t)M * K, 0), *B = reals((size_t)K * N, 0), *C[2] = {reals(cells, 0), reals(cells, NAN)};
    copy_to_real(A, a, (size_t)M * K);
    copy_to_real(B, b, (size_t)K * N);
    int same = 1;
    for (int threads = 1; threads <= 5; threads++) {
#ifdef _OPENMP
        omp_set_num_threads(threads);
#endif
        gemm(M, N, K, A, K, 1, B, N, 1, C[threads > 1], N, 0);
        same &= threads == 1 || !memcmp(C[0], C[1], cells * sizeof(real));
    }
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
    free(a);
    free(b);
    free(A);
    free(B);
    free(C[0]);
    free(C[1]);
    return same;
}

// A way of the product that is taken from the size *min on
static void test_way(const char *name, int *min) {
    static const int sizes[] = {1, 2, 11, 12, 13, 24, 31, 33, 64, 130}, inner[] = {1, 2, 3, 7, 8, 9, 31, 32, 33, 257};
    static const int levels[] = {10, 10, 10, 2, 2, 2, 2};
    double tolerance = IS_DOUBLE ? 1e-13 : 2e-6, worst = 0;
    int usual = *min;
    *min = 1;
    Grid grid = pair_grid(7, levels);
    for (int k = 0; k < grid.count; k++) {
        const int *o = grid.level[k];
        GemmCase g = {sizes[o[0]], sizes[o[1]], inner[o[2]], o[3], o[4], o[5], o[6] ? 5 : 0};
        worst = fmax(worst, gemm_error(&g, 1));
    }
    check(worst, tolerance, "%s, %d combinations of odd sizes, strides, transposes, accumulate", name, grid.count);
    *min = usual;
    GemmCase big[] = {{usual, usual, usual, 0, 1, 0, 0},   // as forward, from the first size on
                      {521, 577, 721, 0, 0, 0, 3},         // as the gradient of the inputs; two blocks of K
                      {usual, 513, 713, 1, 0, 1, 0},       // as the gradient of the weights
                      {usual - 1, 513, 522, 1, 0, 1, 0},   // one row too few
                      {513, 2118, usual, 1, 1, 1, 1}};     // two blocks of N
    for (int k = 0; k < 5; k++)
        check(gemm_error(&big[k], 1), tolerance, "%s %d x %d x %d", name, big[k].M, big[k].N, big[k].K);
    check(!same_bits(600, 530, 1500), 0.5, "%s: the same bits on 1 to 5 threads", name);
}

static void test_strassen(void) {
#ifdef USE_AMX
    int usual = amx_min;
    amx_min = 1 << 30;  // never
#endif
    test_way("Strassen", &strassen_min);
#ifdef USE_AMX
    amx_min = usual;
#endif
}

#ifdef USE_AMX
// c = a b for one number each, in the corner of zeros: what is lost of the product, relative to it
static double amx_relative_error(float a, float b) {
    enum { N = 64 };
    static float A[N * N], B[N * N], C[N * N];
    A[0] = a;
    B[0] = b;
    gemm(N, N, N, A, N, 1, B, N, 1, C, N, 0);
    return fabs(C[0] - (double)a * b) / fabs((double)a * b);
}

static void test_amx(void) {
    if (!amx_usable()) return;
    test_way("AMX", &amx_min);
    double worst = 0;
    int usual = amx_min;
    amx_min = 1;
    for (int k = 0; k < 1000; k++) {
        double range = exp(20 * rng_normal(3, RNG_TEST, 1, k) / 3);
        worst = fmax(worst, amx_relative_error((float)(range * rng_normal(1, RNG_TEST, 1, k)),
                                               (float)(rng_normal(2, RNG_TEST, 1, k) / range)));
    }
    check(worst, 1.3e-7, "AMX: 1000 products of two numbers, to rounding");
    check(!isnan(amx_relative_error(NAN, 1)), 0.5, "AMX: NaN stays NaN");
    static real nan[64 * 64], c[64 * 64];  // what a product of NaN leaves on the stack must not come into the next one
    GemmCase few = {64, 64, 20, 0, 0, 0, 0};
    for (int k = 0; k < 64 * 64; k++) nan[k] = NAN;
    gemm(64, 64, 64, nan, 64, 1, nan, 64, 1, c, 64, 0);
    check(gemm_error(&few, 1), 2e-6, "AMX: 64 x 64 x 20 after a product of NaN");
    amx_min = usual;
}
#endif
#endif

// ----------------------------------------------------------------------------------------------------------------
// Elementary functions

static double exact_cdf(double x) { return 0.5 * erfc(-x / sqrt(2.0)); }
static double exact_sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double exact_silu(double x) { return x / (1 + exp(-x)); }
static double exact_silu_grad(double x) {
    double s = 1 / (1 + exp(-x));
    return s + x * s * (1 - s);
}
static double exact_gelu(double x) { return x * exact_cdf(x); }
static double exact_gelu_grad(double x) { return exact_cdf(x) + x * exp(-x * x / 2) / sqrt(2 * acos(-1.0)); }

typedef struct {
    const char *name;
    real (*function)(real);
    double (*exact)(double);
    double from, to;
    double relative, absolute;  // tolerated in float: relative to the value, plus an absolute error
} Elementary;

static void test_elementary(void) {
    const double ulp = IS_DOUBLE ? 2.3e-16 : 1.2e-7;
    const Elementary all[] = {
        {"exp_real", exp_real, exp, -86.9, 88.37, 3 * ulp, 0},
        {"tanh_real", tanh_real, tanh, -20, 20, 5 * ulp, 0},
        {"tanh_real near 0", tanh_real, tanh, -0.3, 0.3, 5 * ulp, 0},
        {"sigmoid", sigmoid, exact_sigmoid, -86, 86, 4 * ulp, 0},
        {"silu", silu, exact_silu, -86, 86, 5 * ulp, 0},
        {"silu_grad", silu_grad, exact_silu_grad, -80, 80, 6 * ulp, 6 * ulp},
        {"log1p_unit", log1p_unit, log1p, 0, 1, 4 * ulp, 0},
        {"sqrt_real", sqrt_real, sqrt, 0, 100, ulp, 0},
        {"normal_cdf", normal_cdf, exact_cdf, -12, 12, ulp, IS_DOUBLE ? ulp : 2.5e-7},
        {"gelu", gelu, exact_gelu, -12, 12, 3 * ulp, IS_DOUBLE ? ulp : 1e-6},
        {"gelu_grad", gelu_grad, exact_gelu_grad, -12, 12, 3 * ulp, IS_DOUBLE ? 10 * ulp : 1e-6},
    };
    for (size_t k = 0; k < sizeof all / sizeof all[0]; k++) {
        const Elementary *e = &all[k];
        double worst = 0, steps = 400000;
        for (double s = 0; s <= steps; s++) {
            real x = (real)(e->from + (e->to - e->from) * s / steps);
            double exact = e->exact(x),
                   error = fabs(e->function(x) - exact) / (e->relative * fabs(exact) + e->absolute + 1e-45);
            worst = error <= worst ? worst : error;
        }
        check(worst, 1, "%s on %g .. %g against libm, in units of the tolerated error (%.1e, absolute %.0e)", e->name,
              e->from, e->to, e->relative, e->absolute);
    }
    real nan = (real)NAN, inf = (real)INFINITY;
    real (*pass_nan[])(real) = {exp_real,   tanh_real, sigmoid,    silu, silu_grad,
                                log1p_unit, sqrt_real, normal_cdf, gelu, gelu_grad};
    for (size_t k = 0; k < sizeof pass_nan / sizeof pass_nan[0]; k++)
        check(!isnan(pass_nan[k](nan)), 0, "NaN stays NaN, function %zu", k);
    struct {
        const char *name;
        real got;
        double expected;
    } ends[] = {{"exp(inf)", exp_real(inf), INFINITY},
                {"exp(-inf)", exp_real(-inf), 0},
                {"exp(1000)", exp_real(1000), INFINITY},
                {"exp(-1000)", exp_real(-1000), 0},
                {"exp(0)", exp_real(0), 1},
                {"tanh(inf)", tanh_real(inf), 1},
                {"tanh(-inf)", tanh_real(-inf), -1},
                {"tanh(0)", tanh_real(0), 0},
                {"sigmoid(1000)", sigmoid(1000), 1},
                {"sigmoid(-1000)", sigmoid(-1000), 0},
                {"sigmoid(0)", sigmoid(0), 0.5},
                {"normal_cdf(40)", normal_cdf(40), 1},
                {"normal_cdf(-40)", normal_cdf(-40), 0},
                {"log1p_unit(0)", log1p_unit(0), 0}};
    for (size_t k = 0; k < sizeof ends / sizeof ends[0]; k++) {
        double tolerated = IS_DOUBLE ? 1e-300 : 1e-12;  // double: exp(-1000) is not quite 0
        check(ends[k].got == ends[k].expected ? 0 : fabs(ends[k].got - ends[k].expected), tolerated, "%s = %g",
              ends[k].name, ends[k].expected);
    }
    double error = 0, between = 0;
    for (double x = 88.37; x < 88.8; x += 1e-4) {  // at the end of float's range: right or infinite, nothing else
        real e = exp_real((real)x);
        between = fmax(between, isinf(e) && !IS_DOUBLE ? 0 : fabs(e / exp((real)x) - 1));
    }
    check(between, 1e-6, "exp_real at the end of float's range");
    for (double x = -1000; x <= 1000; x += 0.37) {
        double expected = x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x));
        error = fmax(error, fabs(log_sigmoid(x) - expected) / fabs(expected + 1e-300));
    }
    check(error, 1e-15, "log_sigmoid on -1000 .. 1000");
}

// ----------------------------------------------------------------------------------------------------------------
// Finite differences of single layers: a layer reads some arrays and writes one; the loss is <dout, out>.

#ifdef REAL_DOUBLE
enum { MAX_ARRAYS = 4 };
typedef struct Layer {
    const char *arrays[MAX_ARRAYS];  // names of the inputs
    real *x[MAX_ARRAYS], *dx[MAX_ARRAYS];
    size_t count[MAX_ARRAYS];
    real *out, *dout;
    size_t outputs;
    void (*forward)(struct Layer *);
    void (*backward)(struct Layer *);
    // what the layers need
    int rows, width, flag;
    Norm norm;
    Sequence sequence;
    real *stats, *pre, *partial, *window, cap;
    const int *targets;
} Layer;

static Layer layer(int rows, int width, size_t outputs, void (*forward)(Layer *), void (*backward)(Layer *)) {
    Layer l;
    memset(&l, 0, sizeof l);
    l.rows = rows;
    l.width = width;
    l.outputs = outputs;
    l.forward = forward;
    l.backward = backward;
    l.out = reals(outputs, NAN);
    l.dout = normals(outputs, 0, 1);
    l.stats = reals(2 * outputs, NAN);
    l.pre = reals(outputs, NAN);
    l.partial = reals(MAX_PARTS * 64 * 8, NAN);
    return l;
}

// initial: what dx holds before the backward pass (0: it is written, not added to, and starts as NaN)
static void layer_input(Layer *l, int slot, const char *name, size_t count, double mean, double std, double initial) {
    l->arrays[slot] = name;
    l->count[slot] = count;
    l->x[slot] = normals(count, mean, std);
    l->dx[slot] = reals(count, initial == 0 ? NAN : initial);
}

static double layer_loss(void *context, uint64_t *branches) {
    Layer *l = (Layer *)context;
    long double sum = 0;
    *branches = 0;
    l->forward(l);
    for (size_t k = 0; k < l->outputs; k++) sum += (long double)l->dout[k] * l->out[k];
    return (double)sum;
}

static void check_layer(Layer *l, double initial, const char *name) {
    Worst w = {0, ""};
    double *dout = (double *)memcpy(zeros(l->outputs), l->dout, sizeof(double) * l->outputs);
    l->forward(l);
    l->backward(l);
    memcpy(l->dout, dout, sizeof(double) * l->outputs);  // some layers work in place
    for (int k = 0; k < MAX_ARRAYS && l->x[k]; k++) {
        for (size_t at = 0; at < l->count[k]; at++) l->dx[k][at] -= initial;
        worst_of(&w, gradient_error(layer_loss, l, l->x[k], l->dx[k], l->count[k], 200, 1e-6), l->arrays[k]);
    }
    check(w.error, 1e-6, "%s: finite differences (%s)", name, w.where);
    void *all[] = {l->out, l->dout, l->stats, l->pre, l->partial, l->window, dout};
    for (int k = 0; k < 7; k++) free(all[k]);
    for (int k = 0; k < MAX_ARRAYS; k++) {
        free(l->x[k]);
        free(l->dx[k]);
    }
}

static void norm_layer_forward(Layer *l) { norm_forward(l->out, l->stats, l->x[0], l->x[1], &l->norm, l->rows); }
static void norm_layer_backward(Layer *l) {  // flag: dx is added to, else written
    for (size_t k = 0; k < l->outputs && !l->flag; k++) l->dx[0][k] = NAN;
    norm_backward(l->dx[0], l->flag, l->dx[1], l->dout, l->x[0], l->stats, l->x[1], &l->norm, l->rows, l->partial);
    for (size_t k = 0; k < l->outputs && !l->flag; k++) l->dx[0][k] += 0.5;
}

static void test_norms(void) {
    for (int k = 0; k < 16; k++) {
        int center = k & 1, plus_one = k >> 1 & 1, groups = k & 4 ? 3 : 1, rows = 37, width = k % 3 ? 5 : 18;
        char name[100];
        size_t n = (size_t)rows * groups * width;
        Layer l = layer(rows, width, n, norm_layer_forward, norm_layer_backward);
        Norm norm = {center, plus_one, groups, width, 1e-3};
        l.norm = norm;
        l.flag = k >> 3;
        layer_input(&l, 0, "dx", n, 0.3, 1, 0.5);
        layer_input(&l, 1, "dw", (size_t)groups * width, plus_one ? 0 : 1, 0.4, 0.5);
        snprintf(name, sizeof name, "%s, scale %s, groups %d, width %d%s", center ? "LayerNorm" : "RMSNorm",
                 plus_one ? "1+w" : "w", groups, width, l.flag ? ", dx added to" : "");
        check_layer(&l, 0.5, name);
    }
}

static void gated_layer_forward(Layer *l) { gated_forward(l->out, l->x[0], l->rows, l->width, l->flag); }
static void gated_layer_backward(Layer *l) { gated_backward(l->dx[0], l->dout, l->x[0], l->rows, l->width, l->flag); }

static void blocks4_layer_forward(Layer *l) {
    blocks4_forward(l->out, l->width, l->x[0], (size_t)l->width + 3, l->x[1], l->rows, l->width);
}
static void blocks4_layer_backward(Layer *l) {
    blocks4_backward(l->dx[0], (size_t)l->width + 3, l->dx[1], l->dout, l->width, l->x[0], (size_t)l->width + 3,
                     l->x[1], l->rows, l->width, l->partial);
}

static void gates_layer_forward(Layer *l) {
    gates_forward(l->out, l->x[0], l->width, l->x[1], l->rows, l->width, l->cap);
}
static void gates_layer_backward(Layer *l) {
    memcpy(l->dx[0], l->dout, sizeof(real) * l->outputs);
    gates_backward(l->dx[0], l->width, l->out, l->rows, l->width, l->cap);
    bias_backward(l->dx[1], l->dx[0], l->width, l->rows, l->width, l->partial);
    for (size_t k = 0; k < l->outputs; k++) l->dx[0][k] += 0.5;
}

static void loss_layer_forward(Layer *l) {  // the losses of rows of logits
    real *row = (real *)xcalloc((size_t)l->width, sizeof(real));
    for (int r = 0; r < l->rows; r++) {
        memcpy(row, l->x[0] + (size_t)r * l->width, sizeof(real) * l->width);
        l->out[r] = cross_entropy_row(row, l->width, l->targets[r], l->cap, 0, 0, NULL);
    }
    free(row);
}
static void loss_layer_backward(Layer *l) {
    for (int r = 0; r < l->rows; r++) {
        real *row = l->dx[0] + (size_t)r * l->width;
        memcpy(row, l->x[0] + (size_t)r * l->width, sizeof(real) * l->width);
        cross_entropy_row(row, l->width, l->targets[r], l->cap, l->dout[r], 1, NULL);
        for (int c = 0; c < l->width; c++) row[c] += 0.5;
    }
}

static void conv_layer_forward(Layer *l) {
    conv_forward(l->pre, l->out, l->x[0], (size_t)l->width + 2, l->x[1], l->x[2], l->window, NULL, l->width,
                 &l->sequence);
}
static void conv_layer_backward(Layer *l) {
    conv_backward(l->dx[0], (size_t)l->width + 2, l->dx[1], l->dx[2], l->dout, l->pre, l->x[0], (size_t)l->width + 2,
                  l->x[1], l->window, l->width, &l->sequence, l->partial);
}

static void test_conv(void) {
    static const int Ts[] = {1, 2, 3, 4, 5, 40};
    for (int k = 0; k < 6 * NUM_RESET_KINDS; k++) {
        int T = Ts[k % 6], B = 2, C = 5, carried = k / 6 % 2;
        ResetKind kind = (ResetKind)(k / 6);
        char name[100];
        Layer l = layer(B * T, C, (size_t)B * T * C, conv_layer_forward, conv_layer_backward);
        unsigned char *resets = make_resets(kind, B, T, 4), *history = (unsigned char *)xcalloc((size_t)B * T, 1);
        count_history(history, resets, B, T);
        Sequence s = {B, T, resets, history, NULL, NULL, 3 * (size_t)C + 1, 0, 0, NULL, NULL, NULL};
        l.sequence = s;
        l.window = carried ? normals(B * (3 * (size_t)C + 1), 0, 1) : NULL;
        layer_input(&l, 0, "dx", (size_t)B * T * (C + 2), 0, 1, 0.5);
        layer_input(&l, 1, "dw", (size_t)4 * C, 0, 1, 0.5);
        layer_input(&l, 2, "dbias", C, 0, 1, 0.5);
        snprintf(name, sizeof name, "conv T%d resets %s%s", T, reset_names[kind], carried ? " carried" : "");
        check_layer(&l, 0.5, name);
        free(resets);
        free(history);
    }
}
#endif

// y[t] = silu(bias + sum_j w[j] x[t-3+j]): the taps' order, windows over borders and resets, written out once more
static void test_conv_values(void) {
    enum { B = 2, T = 9, C = 3 };
    Worst w = {0, ""};
    for (int k = 0; k < NUM_RESET_KINDS; k++) {
        unsigned char *resets = make_resets((ResetKind)k, B, T, 4), history[B * T];
        double *x = normals(B * T * C, 0, 1), *taps = normals(4 * C, 0, 1), *bias = normals(C, 0, 1);
        double *window = normals(B * 3 * C, 0, 1), *expected = zeros(B * T * C), *got = zeros(B * T * C);
        double *expected_window = zeros(B * 3 * C), *got_window = zeros(B * 3 * C);
        real *X = reals(B * T * C, 0), *W = reals(4 * C, 0), *BIAS = reals(C, 0), *IN = reals(B * 3 * C, 0);
        real *PRE = reals(B * T * C, NAN), *OUT = reals(B * T * C, NAN), *WINDOW = reals(B * 3 * C, NAN);
        copy_to_real(X, x, B * T * C);
        copy_to_real(W, taps, 4 * C);
        copy_to_real(BIAS, bias, C);
        copy_to_real(IN, window, B * 3 * C);
        count_history(history, resets, B, T);
        Sequence s = {B, T, resets, history, NULL, NULL, 3 * C, 0, 0, NULL, NULL, NULL};
        conv_forward(PRE, OUT, X, C, W, BIAS, IN, WINDOW, C, &s);
        for (int b = 0; b < B; b++)
            for (int c = 0; c < C; c++) {
                double past[3] = {0};  // oldest first
                for (int j = 0; j < 3; j++) past[j] = window[(b * 3 + j) * C + c];
                for (int t = 0; t < T; t++) {
                    double now = x[(b * T + t) * C + c], pre = bias[c];
                    if (resets && resets[b * T + t]) past[0] = past[1] = past[2] = 0;
                    for (int j = 0; j < 3; j++) pre += taps[4 * c + j] * past[j];
                    pre += taps[4 * c + 3] * now;
                    expected[(b * T + t) * C + c] = pre / (1 + exp(-pre));
                    past[0] = past[1];
                    past[1] = past[2];
                    past[2] = now;
                }
                for (int j = 0; j < 3; j++) expected_window[(b * 3 + j) * C + c] = past[j];
            }
        copy_from_real(got, OUT, B * T * C);
        copy_from_real(got_window, WINDOW, B * 3 * C);
        worst_of(&w, max_distance(got, expected, B * T * C, 1), reset_names[k]);
        worst_of(&w, max_distance(got_window, expected_window, B * 3 * C, 1), "window");
        double *all[] = {x, taps, bias, window, expected, got, expected_window, got_window};
        real *all_real[] = {X, W, BIAS, IN, PRE, OUT, WINDOW};
        for (int a = 0; a < 8; a++) free(all[a]);
        for (int a = 0; a < 7; a++) free(all_real[a]);
        free(resets);
    }
    check(w.error, IS_DOUBLE ? 1e-14 : 1e-6, "conv: taps, windows and resets written out (%s)", w.where);
}

static void test_layers(void) {
    test_conv_values();
#ifdef REAL_DOUBLE
    test_norms();
    for (int use_gelu = 0; use_gelu < 2; use_gelu++) {
        Layer l = layer(7, 5, 35, gated_layer_forward, gated_layer_backward);
        l.flag = use_gelu;
        layer_input(&l, 0, "dgate_up", 70, 0, 1.5, 0);
        check_layer(&l, 0, use_gelu ? "gated FFN, GELU" : "gated FFN, SiLU");
    }
    Layer l = layer(33, 12, 33 * 12, blocks4_layer_forward, blocks4_layer_backward);
    layer_input(&l, 0, "dx", 33 * 15, 0, 1, 0.5);
    layer_input(&l, 1, "dw", 48, 0, 1, 0.5);
    check_layer(&l, 0.5, "4x4 blocks");
    for (int capped = 0; capped < 2; capped++) {
        l = layer(20, 6, 120, gates_layer_forward, gates_layer_backward);
        l.cap = capped ? 1.5 : 0;
        layer_input(&l, 0, "dpre", 120, 0, 1, 0.5);
        layer_input(&l, 1, "dbias", 6, 0, 1, 0.5);
        check_layer(&l, 0.5, capped ? "gates with cap 1.5 and bias" : "gates with bias, no cap");
    }
    static const int targets[8] = {3, 0, -1, 10, 5, -1, 7, 7};
    static const double caps[] = {0, 2, 30};
    for (int k = 0; k < 3; k++) {
        char name[60];
        l = layer(8, 11, 8, loss_layer_forward, loss_layer_backward);
        l.cap = caps[k];
        l.targets = targets;
        layer_input(&l, 0, "dlogits", 88, 0, 3, 0.5);
        snprintf(name, sizeof name, "cross-entropy, cap %g, ignored targets", caps[k]);
        check_layer(&l, 0.5, name);
    }
    test_conv();
#endif
}
