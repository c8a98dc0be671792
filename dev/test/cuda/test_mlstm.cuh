// test_mlstm.cuh: the chunkwise mLSTM on the GPU against the CPU trainer run in double: outputs, final states, every
// gradient; one run against two with the states passed on; the same bits again.
#ifndef DEV_TEST_CUDA_TEST_MLSTM_CUH
#define DEV_TEST_CUDA_TEST_MLSTM_CUH

#include "../../../xlstmc/mlstm.cuh"
#include "harness.cuh"

extern "C" void oracle_mlstm(const int size[6], float eps, float cap, const unsigned char *resets,
                             const float *const in[7], float *const out[8]);

typedef struct {
    int B, T, NH, dk, dv, sigmoid;
    int every;    // one token in so many begins a document, and some at the borders of chunks; 0: none
    int carried;  // initial states are given
    int odd;      // rows are not aligned to 16 bytes
    float f_mean, cap;
} MlstmCase;

// h is divided by |q.n| + eps: with a tiny eps the rows where q.n almost cancels would be all that a norm sees.
static const float mlstm_test_eps = 0.5f;

typedef struct {
    size_t rows, Dk, Dv, G, state;  // widths of all heads; state: C, n and m of a sequence
    size_t lead, ld, at_gates;  // row of the kernels' buffers: lead | q | k | v | gap | gates (gradients only) | gap
    float *in[7], *out[8];      // as oracle_mlstm wants them
    unsigned char *resets;
    int *doc_start;
} MlstmHost;

enum { IN_Q, IN_K, IN_V, IN_DH, IN_GATES, IN_BIAS, IN_STATE };
enum { OUT_H, OUT_DOT, OUT_STATE, OUT_DQ, OUT_DK, OUT_DV, OUT_DGATES, OUT_DBIAS };

static void mlstm_test_resets(MlstmHost *x, const MlstmCase *c) {
    x->resets = (unsigned char *)xcalloc(x->rows, 1);
    x->doc_start = (int *)xcalloc(x->rows, sizeof(int));
    for (size_t r = 0; r < x->rows; r++) {
        int b = (int)(r / c->T), t = (int)(r % c->T);
        if (c->every) {
            x->resets[r] = rng_uniform(1, RNG_TEST, 20, r) < 1.0 / c->every;
            if (b == 0) x->resets[r] |= t == 128 || t == 63 || t == 64;  // sequence 0: at borders of chunk and tile
            if (b == 1) x->resets[r] |= t == 0 || t == 127 || t == 255;  // its states are never seen; one token before
        }
        x->doc_start[r] = x->resets[r] ? t : t > 0 ? x->doc_start[r - 1] : NO_RESET;
    }
}

template <typename F>
static MlstmHost mlstm_test_host(const MlstmCase *c) {
    MlstmHost x;
    memset(&x, 0, sizeof x);
    x.rows = (size_t)c->B * c->T, x.Dk = (size_t)c->NH * c->dk, x.Dv = (size_t)c->NH * c->dv, x.G = 2 * (size_t)c->NH;
    x.state = x.Dk * c->dv + x.Dk + c->NH;
    x.lead = c->odd ? 1 : 16;
    x.at_gates = x.lead + 2 * x.Dk + x.Dv + 3;
    x.ld = x.at_gates + x.G + 2;
    if (!c->odd) x.ld = (x.ld + 7) / 8 * 8;
    const size_t in_counts[7] = {x.rows * x.Dk, x.rows * x.Dk, x.rows * x.Dv, x.rows * x.Dv,
                                 x.rows * x.G,  x.G,           c->B * x.state};
    const size_t out_counts[8] = {x.rows * x.Dv, x.rows * c->NH, c->B * x.state, x.rows * x.Dk,
                                  x.rows * x.Dk, x.rows * x.Dv,  x.rows * x.G,   x.G};
    const float scales[7] = {1, 1, 1, 1, 3, 0.5, 0.5};
    for (int k = 0; k < 7; k++) x.in[k] = fill_random(in_counts[k], 1 + k, scales[k]);
    for (int k = IN_Q; k <= IN_DH; k++) round_to<F>(x.in[k], in_counts[k]);
    for (size_t k = 0; k < x.rows * x.G; k++)
        if (k % x.G >= (size_t)c->NH) x.in[IN_GATES][k] += c->f_mean;
    for (size_t b = 0; c->sigmoid && b < (size_t)c->B; b++)  // there the scale stays 0
        memset(x.in[IN_STATE] + (b + 1) * x.state - c->NH, 0, c->NH * sizeof(float));
    if (!c->carried) free(x.in[IN_STATE]), x.in[IN_STATE] = NULL;
    for (int k = 0; k < 7; k++) x.out[k] = (float *)xcalloc(out_counts[k], sizeof(float));
    x.out[OUT_DBIAS] = fill_random(x.G, 9, 1);
    mlstm_test_resets(&x, c);
    const int size[6] = {c->B, c->T, c->NH, c->dk, c->dv, c->sigmoid};
    oracle_mlstm(size, mlstm_test_eps, c->cap, x.resets, x.in, x.out);
    return x;
}

static void mlstm_test_host_free(MlstmHost *x) {
    for (int k = 0; k < 7; k++) free(x->in[k]);
    for (int k = 0; k < 8; k++) free(x->out[k]);
    free(x->resets), free(x->doc_start);
}

// ----------------------------------------------------------------------------------------------------------------
// The GPU's side

template <typename F>
struct MlstmDevice {
    MlstmShape shape;
    MlstmInput<F> in;
    MlstmState initial, final;
    F *qkv, *h, *dh, *wide;  // [rows, ld], [rows, Dv] twice, gradients [rows, ld]
    float *gates, *bias, *states, *state_in, *dh_dot_h, *dbias;
    int *doc_start;
    MlstmSaved<F> saved;
    MlstmScratch<F> scratch;
    char *memory;
    size_t bytes;
};

static MlstmState mlstm_test_state(float *base, const MlstmCase *c, size_t row) {
    MlstmState none = {NULL, NULL, NULL, 0}, s = {base, base + (size_t)c->NH * c->dk * c->dv, base + row - c->NH, row};
    return base ? s : none;
}

// Everything the kernels write is poisoned, or random where they must not write: the gaps of `wide`.
template <typename F>
static MlstmDevice<F> mlstm_test_device(const MlstmCase *c, const MlstmHost *x, int chunk) {
    MlstmDevice<F> d;
    memset((void *)&d, 0, sizeof d);
    d.shape = MlstmShape{c->B, c->T, c->NH, c->dk, c->dv, c->sigmoid, mlstm_test_eps, chunk};
    const size_t ld_gates = x->G + 1;
    float *qkv = fill_random(x->rows * x->ld, 11, 1), *gates = fill_random(x->rows * ld_gates, 12, 1);
    float *wide = fill_random(x->rows * x->ld, 13, 1);
    put_columns(qkv, x->ld, x->lead, x->Dk, x->rows, x->in[IN_Q]);
    put_columns(qkv, x->ld, x->lead + x->Dk, x->Dk, x->rows, x->in[IN_K]);
    put_columns(qkv, x->ld, x->lead + 2 * x->Dk, x->Dv, x->rows, x->in[IN_V]);
    put_columns(gates, ld_gates, 0, x->G, x->rows, x->in[IN_GATES]);
    d.qkv = to_device<F>(qkv, x->rows * x->ld);
    d.wide = to_device<F>(wide, x->rows * x->ld);
    d.gates = to_device<float>(gates, x->rows * ld_gates);
    d.bias = to_device<float>(x->in[IN_BIAS], x->G);
    d.dh = to_device<F>(x->in[IN_DH], x->rows * x->Dv);
    d.dh_dot_h = to_device<float>(x->out[OUT_DOT], x->rows * c->NH);
    d.doc_start = to_device_int(x->doc_start, x->rows);
    d.h = device_poisoned<F>(x->rows * x->Dv);
    float *dbias = fill_random(x->G, 9, 1);
    d.dbias = to_device<float>(dbias, x->G);
    d.states = device_poisoned<float>(c->B * x->state);
    d.state_in = x->in[IN_STATE] ? to_device<float>(x->in[IN_STATE], c->B * x->state) : NULL;
    F *q = d.qkv + x->lead;
    d.in = MlstmInput<F>{q, q + x->Dk, q + 2 * x->Dk, x->ld, d.gates, ld_gates, d.bias, c->cap, d.doc_start};
    d.initial = mlstm_test_state(d.state_in, c, x->state);
    d.final = mlstm_test_state(d.states, c, x->state);
    Arena arena = {NULL, 0};
    mlstm_take_saved(&arena, &d.shape, &d.saved);
    mlstm_take_scratch(&arena, &d.shape, &d.scratch);
    d.bytes = arena.used;
    d.memory = device_poisoned<char>(d.bytes);
    arena = Arena{d.memory, 0};
    mlstm_take_saved(&arena, &d.shape, &d.saved);
    mlstm_take_scratch(&arena, &d.shape, &d.scratch);
    free(qkv), free(gates), free(wide), free(dbias);
    return d;
}

template <typename F>
static void mlstm_test_device_free(MlstmDevice<F> *d) {
    void *all[] = {d->qkv,    d->h,        d->dh,       d->wide,  d->gates,     d->bias,
                   d->states, d->state_in, d->dh_dot_h, d->dbias, d->doc_start, d->memory};
    for (void *p : all) CUDA_CHECK(cudaFree(p));
}

// given: <dh, h> is; else the backward pass makes it from h
template <typename F>
static void mlstm_test_run(MlstmDevice<F> *d, const MlstmHost *x, bool given = true) {
    F *dq = d->wide + x->lead;
    mlstm_forward<F>(d->shape, d->in, d->initial, d->final, d->h, &d->saved, &d->scratch, 0);
    mlstm_backward<F>(d->shape, d->in, d->initial, d->dh, given ? d->dh_dot_h : NULL, dq, dq + x->Dk, dq + 2 * x->Dk,
                      x->ld, d->wide + x->at_gates, x->ld, d->dbias, &d->saved, &d->scratch, 0, d->h);
}

// ----------------------------------------------------------------------------------------------------------------
// Checks

typedef struct {
    char label[160];
} MlstmLabel;

template <typename F>
static MlstmLabel mlstm_test_label(const MlstmCase *c, int chunk) {
    MlstmLabel l;
    format_into(l.label, sizeof l.label, "mlstm%s %s%s B%d T%d NH%d %d/%d f%g%s%s%s%s",
                chunk == SCAN_CHUNK ? "_scan" : "", format_name<F>(), c->sigmoid ? " sig" : "", c->B, c->T, c->NH,
                c->dk, c->dv, c->f_mean, c->cap > 0 ? " cap" : "", c->every ? " resets" : "",
                c->carried ? " carried" : "", c->odd ? " odd" : "");
    return l;
}

static void mlstm_check(const MlstmLabel *l, const char *part, float *got, const float *want, size_t n, double limit) {
    char what[200];
    format_into(what, sizeof what, "%s: %s", l->label, part);
    check_close(what, got, want, n, limit);
    free(got);
}

// C, n and m apart: they differ in size
template <typename F>
static void mlstm_check_states(const MlstmLabel *l, const MlstmCase *c, const MlstmHost *x, const float *got,
                               const float *want) {
    const char *names[3] = {"C", "n", "m"};
    const double limits[3] = {tolerance<F>(1.6e-6, 5e-3), tolerance<F>(1.4e-6, 5e-6), 6e-7};
    const size_t at[4] = {0, x->Dk * c->dv, x->Dk * c->dv + x->Dk, x->state};
    for (int k = 0; k < 3; k++) {
        size_t count = at[k + 1] - at[k];
        float *expected = take_columns(want, x->state, at[k], count, c->B);
        mlstm_check(l, names[k], take_columns(got, x->state, at[k], count, c->B), expected, c->B * count, limits[k]);
        free(expected);
    }
}

// 0 if the forget gates' gradients are next to nothing beside the input gates': differences of equal sums, all rounding
static int mlstm_test_remembers(const MlstmHost *x) {
    double size[2] = {0, 0};
    for (size_t k = 0; k < x->rows * x->G; k++)
        size[k % x->G >= x->G / 2] += (double)x->out[OUT_DGATES][k] * x->out[OUT_DGATES][k];
    return size[1] > 1e-4 * size[0];
}

template <typename F>
static void mlstm_check_all(const MlstmCase *c, const MlstmHost *x, const MlstmDevice<F> *d, double bias_limit) {
    const MlstmLabel l = mlstm_test_label<F>(c, d->shape.chunk);
    const double gates = tolerance<F>(9e-6, 1e-2);
    float *states = to_host(d->states, c->B * x->state), *wide = to_host(d->wide, x->rows * x->ld);
    float *unwritten = fill_random(x->rows * x->ld, 13, 1);
    round_to<F>(unwritten, x->rows * x->ld);
    mlstm_check(&l, "h", to_host(d->h, x->rows * x->Dv), x->out[OUT_H], x->rows * x->Dv, tolerance<F>(4.5e-6, 9e-3));
    mlstm_check_states<F>(&l, c, x, states, x->out[OUT_STATE]);
    const struct {
        const char *name;
        size_t at, count;
        const float *want;  // NULL: as it was
        double limit;
    } parts[] = {{"dq", x->lead, x->Dk, x->out[OUT_DQ], tolerance<F>(8e-6, 8e-3)},
                 {"dk", x->lead + x->Dk, x->Dk, x->out[OUT_DK], tolerance<F>(8e-6, 8e-3)},
                 {"dv", x->lead + 2 * x->Dk, x->Dv, x->out[OUT_DV], tolerance<F>(4.5e-6, 9e-3)},
                 {"dgates", x->at_gates, x->G, NULL, gates},
                 {"dgates, forget", x->at_gates + x->G / 2, x->G / 2, NULL, gates},
                 {"columns before", 0, x->lead, NULL, 0},
                 {"columns between", x->at_gates - 3, 3, NULL, 0},
                 {"columns after", x->at_gates + x->G, x->ld - x->at_gates - x->G, NULL, 0}};
    put_columns(unwritten, x->ld, x->at_gates, x->G, x->rows, x->out[OUT_DGATES]);
    for (auto &p : parts) {
        if (p.want == NULL && p.at == x->at_gates + x->G / 2 && !mlstm_test_remembers(x)) continue;
        float *got = take_columns(wide, x->ld, p.at, p.count, x->rows);
        float *want = p.want ? NULL : take_columns(unwritten, x->ld, p.at, p.count, x->rows);
        mlstm_check(&l, p.name, got, p.want ? p.want : want, x->rows * p.count, p.limit);
        free(want);
    }
    mlstm_check(&l, "dbias", to_host(d->dbias, x->G), x->out[OUT_DBIAS], x->G, bias_limit);
    free(states), free(wide), free(unwritten);
}

// Again in poisoned memory: what the first run left must not matter, and no sum may depend on the order of blocks.
template <typename F>
static void mlstm_check_again(const MlstmCase *c, const MlstmHost *x, MlstmDevice<F> *d) {
    const size_t counts[3] = {x->rows * x->Dv, x->rows * x->ld, c->B * x->state};
    float *runs[2][3];
    for (int run = 0; run < 2; run++) {
        if (run == 1) {
            CUDA_CHECK(cudaMemset(d->memory, 0xff, d->bytes));
            mlstm_test_run(d, x);
        }
        runs[run][0] = to_host(d->h, counts[0]), runs[run][1] = to_host(d->wide, counts[1]);
        runs[run][2] = to_host(d->states, counts[2]);
    }
    float same = 1;
    const float one = 1;
    for (int k = 0; k < 3; k++) {
        if (memcmp(runs[0][k], runs[1][k], counts[k] * sizeof(float)) != 0) same = 0;
        free(runs[0][k]), free(runs[1][k]);
    }
    const MlstmLabel l = mlstm_test_label<F>(c, d->shape.chunk);
    char what[200];
    format_into(what, sizeof what, "%s: the same bits again", l.label);
    check_close(what, &same, &one, 1, 0);
}

// Many runs, all with the same bits: where one role of a kernel reads what another overwrites too early, few differ
static void test_mlstm_repeated(const MlstmCase *c, int runs) {
    MlstmHost x = mlstm_test_host<bf16>(c);
    const int chunk = mlstm_chunk<bf16>(c->dk, c->dv, x.ld);
    MlstmDevice<bf16> d = mlstm_test_device<bf16>(c, &x, chunk);
    const size_t bytes = x.rows * x.ld * sizeof(bf16);
    char *first = (char *)xcalloc(bytes, 1), *other = (char *)xcalloc(bytes, 1);
    float differ = 0;
    const float none = 0;
    for (int run = 0; run < runs; run++) {
        mlstm_test_run(&d, &x);
        CUDA_CHECK(cudaMemcpy(run ? other : first, d.wide, bytes, cudaMemcpyDeviceToHost));
        differ += run && memcmp(first, other, bytes) != 0;
    }
    const MlstmLabel l = mlstm_test_label<bf16>(c, chunk);
    char what[200];
    format_into(what, sizeof what, "%s: runs of %d that differ", l.label, runs);
    check_close(what, &differ, &none, 1, 0);
    free(first), free(other);
    mlstm_test_device_free(&d);
    mlstm_test_host_free(&x);
}

// <dh, h> made by the backward pass against <dh, h> of the same h given to it, and the same bits again. Gradients in
// bf16 differ where a float is about half way between two.
template <typename F>
static void mlstm_check_dots(const MlstmCase *c, const MlstmHost *x, MlstmDevice<F> *d) {
    float *h = to_host(d->h, x->rows * x->Dv), *dots = (float *)xcalloc(x->rows * c->NH, sizeof(float)), *runs[3];
    for (size_t k = 0; k < x->rows * c->NH; k++) {
        double sum = 0;
        for (int j = 0; j < c->dv; j++) sum += (double)h[k * c->dv + j] * x->in[IN_DH][k * c->dv + j];
        dots[k] = (float)sum;
    }
    CUDA_CHECK(cudaMemcpy(d->dh_dot_h, dots, x->rows * c->NH * sizeof(float), cudaMemcpyHostToDevice));
    for (int run = 0; run < 3; run++) {
        CUDA_CHECK(cudaMemset(d->memory, 0xff, d->bytes));
        mlstm_test_run(d, x, run == 0);
        runs[run] = to_host(d->wide, x->rows * x->ld);
    }
    const MlstmLabel l = mlstm_test_label<F>(c, d->shape.chunk);
    const struct {
        const char *name;
        size_t at, count;
    } parts[] = {{"dq", x->lead, x->Dk},
                 {"dk", x->lead + x->Dk, x->Dk},
                 {"dv", x->lead + 2 * x->Dk, x->Dv},
                 {"dgates", x->at_gates, x->G}};
    for (auto &p : parts) {
        char what[40];
        format_into(what, sizeof what, "%s, <dh, h> made", p.name);
        float *want = take_columns(runs[0], x->ld, p.at, p.count, x->rows);
        mlstm_check(&l, what, take_columns(runs[1], x->ld, p.at, p.count, x->rows), want, x->rows * p.count,
                    tolerance<F>(9e-7, 3.4e-4));
        free(want);
    }
    float same = memcmp(runs[1], runs[2], x->rows * x->ld * sizeof(float)) == 0;
    const float one = 1;
    char what[200];
    format_into(what, sizeof what, "%s: the same bits again, <dh, h> made", l.label);
    check_close(what, &same, &one, 1, 0);
    for (float *run : runs) free(run);
    free(h), free(dots);
}

// Both sets of kernels, where both take the shape. dots: mlstm_check_dots as well
template <typename F>
static void test_mlstm_case(const MlstmCase *c, bool dots) {
    MlstmHost x = mlstm_test_host<F>(c);
    for (int chunk : {(int)MLSTM_CHUNK, (int)SCAN_CHUNK}) {
        if (chunk == SCAN_CHUNK && (c->odd || mlstm_chunk<F>(c->dk, c->dv, x.ld) != chunk)) continue;
        MlstmDevice<F> d = mlstm_test_device<F>(c, &x, chunk);
        mlstm_test_run(&d, &x);
        mlstm_check_all(c, &x, &d, tolerance<F>(1e-5, 1e-2));
        if (!small_tests) mlstm_check_again(c, &x, &d);
        if (dots) mlstm_check_dots(c, &x, &d);
        mlstm_test_device_free(&d);
    }
    mlstm_test_host_free(&x);
}

// The first tokens of one sequence and then the rest, from the states that the first left
template <typename F>
static void test_mlstm_split(const MlstmCase *c, int first, int chunk) {
    MlstmHost x = mlstm_test_host<F>(c);
    for (int t = first; t < c->T; t++)  // doc_start as the second window sees it
        x.doc_start[t] = x.resets[t] ? t - first : t > first ? x.doc_start[t - 1] : NO_RESET;
    MlstmDevice<F> d = mlstm_test_device<F>(c, &x, chunk);
    MlstmShape head = d.shape, tail = d.shape;
    head.T = first, tail.T = c->T - first;
    MlstmInput<F> rest = d.in;
    rest.q += first * x.ld, rest.k += first * x.ld, rest.v += first * x.ld;
    rest.gates += first * rest.ld_gates, rest.doc_start += first;
    float *between = device_poisoned<float>(x.state);
    MlstmState passed = mlstm_test_state(between, c, x.state);
    mlstm_forward<F>(head, d.in, d.initial, passed, d.h, &d.saved, &d.scratch, 0);
    mlstm_forward<F>(tail, rest, passed, d.final, d.h + first * x.Dv, &d.saved, &d.scratch, 0);

    MlstmLabel l = mlstm_test_label<F>(c, chunk);
    const size_t end = strlen(l.label);
    format_into(l.label + end, sizeof l.label - end, " cut at %d", first);
    float *states = to_host(d.states, x.state);
    mlstm_check(&l, "h", to_host(d.h, x.rows * x.Dv), x.out[OUT_H], x.rows * x.Dv, tolerance<F>(4.5e-6, 9e-3));
    mlstm_check_states<F>(&l, c, &x, states, x.out[OUT_STATE]);
    free(states);
    CUDA_CHECK(cudaFree(between));
    mlstm_test_device_free(&d);
    mlstm_test_host_free(&x);
}

static const MlstmCase mlstm_cases[] = {
    // B, T, NH, dk, dv, sigmoid, every, carried, odd, f_mean, cap
    {2, 1, 3, 16, 16, 0, 0, 1, 0, 0, 0},
    {3, 1, 2, 24, 40, 1, 0, 0, 1, 0, 15},
    {2, 37, 3, 7, 13, 0, 0, 0, 1, 0, 0},
    {2, 37, 2, 20, 36, 1, 9, 1, 0, 3, 15},
    {2, 64, 2, 24, 40, 0, 0, 1, 0, 6, 15},
    {1, 65, 2, 64, 128, 0, 0, 0, 0, 0, 0},
    {2, 65, 2, 16, 16, 1, 30, 1, 0, 6, 0},
    {2, 128, 2, 64, 64, 0, 0, 1, 0, 6, 15},
    {2, 129, 2, 16, 48, 0, 100, 0, 0, 6, 0},
    {3, 200, 2, 64, 128, 0, 50, 1, 0, 5, 15},
    {2, 200, 2, 96, 192, 1, 0, 1, 0, 6, 15},
    {2, 300, 2, 128, 256, 0, 0, 1, 0, 6, 15},
    {2, 300, 1, 128, 256, 1, 60, 0, 1, 6, 0},
    {3, 300, 3, 20, 36, 0, 20, 1, 0, 4, 0},
    {3, 300, 2, 7, 13, 0, 90, 1, 1, 6, 15},
    {1, 300, 2, 24, 40, 0, 0, 1, 0, -20, 0},  // gates sum to -6000: differences must not lose their digits
    {1, 600, 2, 16, 16, 0, 0, 1, 0, 9, 15},   // and states that live through all chunks
    {1, 200, 2, 72, 80, 0, 70, 1, 0, 6, 15},
    {1, 150, 2, 256, 512, 0, 0, 1, 0, 6, 15},
    {1, 140, 1, 1024, 1024, 0, 70, 1, 0, 6, 15},
    {1, 2500, 2, 64, 128, 0, 400, 1, 0, 6, 15},  // walked in segments
    {1, 2500, 1, 24, 40, 1, 0, 0, 0, 6, 0},
    {1, 1100, 2, 64, 128, 0, 0, 1, 0, 6, 15},  // H in segments, the gradients in one walk
    {2, 900, 2, 56, 120, 0, 100, 1, 0, 5, 15},
    {1, 1500, 1, 128, 256, 0, 0, 1, 0, 6, 15},
    {1, 1300, 1, 192, 384, 1, 0, 0, 0, 6, 15},
    {1, 1111, 1, 192, 384, 0, 300, 1, 0, 6, 15},
    {1, 1111, 2, 104, 200, 0, 0, 1, 0, 6, 15},
    {1, 777, 1, 64, 512, 0, 0, 1, 0, 6, 15},
    {1, 130, 1, 256, 64, 0, 0, 1, 0, 6, 15},
    {34, 200, 4, 24, 136, 0, 60, 1, 0, 6, 15},  // enough heads for wide tiles of C
    {34, 70, 4, 64, 128, 0, 60, 1, 0, 6, 15},   // and for dV and dK side by side
    {30, 130, 4, 128, 256, 1, 0, 0, 0, 6, 15},
    {2, 700, 2, 104, 200, 0, 300, 1, 0, 5, 15},  // without states for the gates, in documents of several spans
    {1, 900, 1, 128, 256, 1, 0, 1, 0, 6, 15},
    {4369, 2, 15, 8, 8, 0, 0, 1, 0, 6, 15},  // 65535 sequences and heads, as many as a grid takes
};

// Every kernel once, in bf16: each width of attend, both widths of states, with more tiles than they have stages, rows
// that are not aligned, segments. fp32 has one width.
static const MlstmCase mlstm_small_cases[] = {
    {1, 330, 1, 24, 40, 0, 50, 1, 0, 6, 15},  {1, 200, 1, 7, 13, 1, 50, 1, 1, 6, 0},
    {1, 140, 1, 96, 192, 0, 70, 1, 0, 6, 15}, {1, 140, 1, 192, 96, 1, 70, 0, 0, 6, 15},
    {1, 140, 1, 128, 256, 0, 0, 1, 0, 6, 15}, {1, 140, 1, 256, 128, 0, 0, 1, 0, 6, 15},
    {34, 260, 4, 16, 72, 0, 0, 1, 0, 6, 15},  {1, 1100, 1, 16, 24, 0, 400, 1, 0, 6, 0},
};
enum { MLSTM_SMALL_FP32 = 2 };  // so many of them in fp32, too

static void test_mlstm(void) {
    for (size_t k = 0; small_tests && k < sizeof mlstm_small_cases / sizeof *mlstm_small_cases; k++) {
        if (k < MLSTM_SMALL_FP32) test_mlstm_case<float>(&mlstm_small_cases[k], k == 0);
        test_mlstm_case<bf16>(&mlstm_small_cases[k], k == 0);
    }
    if (small_tests) return;
    for (size_t k = 0; k < sizeof mlstm_cases / sizeof *mlstm_cases; k++) {
        test_mlstm_case<float>(&mlstm_cases[k], true);
        test_mlstm_case<bf16>(&mlstm_cases[k], true);
    }
    static const MlstmCase repeated[] = {{3, 200, 2, 64, 128, 0, 0, 0, 0, 5, 15},
                                         {2, 900, 3, 64, 128, 0, 50, 1, 0, 5, 15},
                                         {1, 1500, 1, 128, 256, 0, 0, 1, 0, 6, 15},
                                         {1, 1300, 1, 192, 384, 0, 0, 0, 0, 6, 15},
                                         {1, 900, 2, 256, 512, 0, 300, 1, 0, 6, 15}};
    for (const MlstmCase &c : repeated) test_mlstm_repeated(&c, 200);
    static const MlstmCase whole[] = {{1, 300, 3, 24, 40, 0, 0, 1, 0, 6, 15}, {1, 300, 2, 64, 128, 1, 40, 0, 0, 6, 15}};
    for (int k = 0; k < 2; k++)
        for (int first : {128, 1, 130}) {
            test_mlstm_split<float>(&whole[k], first, MLSTM_CHUNK);
            test_mlstm_split<bf16>(&whole[k], first, MLSTM_CHUNK);
            test_mlstm_split<bf16>(&whole[k], first, mlstm_chunk<bf16>(whole[k].dk, whole[k].dv, 8));
        }
}

#endif
