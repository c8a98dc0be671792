// slstm_ladder.cuh: what the two ladders, slstm_forward.cu and slstm_backward.cu, share: a problem on the GPU, the same
// solved in double on the CPU, the time of a step, and the table at the end.
#ifndef DEV_CUDA_SLSTM_LADDER_CUH
#define DEV_CUDA_SLSTM_LADDER_CUH

#include <cooperative_groups.h>

#include "../../xlstmc/slstm.cuh"
#include "../test/cuda/harness.cuh"

enum { B = 16, NH = 4, D = 256, TIMED_T = 1024, CHECKED_T = 40, RUNS = 7, VERSIONS = 5 };

typedef struct {
    int T;
    const bf16 *x;      // [B, T, NH, 4, D]
    const bf16 *R;      // [NH, D from, 4, D to]
    const float *bias;  // [NH, 4, D]
    const bf16 *dy;     // [B, T, NH, D]
    bf16 *y, *dx;       // results: [B, T, NH, D], [B, T, NH, 4, D]
    float *states;      // [B, NH, 3, D] what a step leaves to the next, version 1
    bf16 *handed;       // [2, B NH 4 D] what the blocks hand over in even and odd steps, version 3
    int *doc_start;     // [B, T]
    float *dbias, *partial;
    SlstmSaved<bf16> saved;
    SlstmScratch scratch;
} Problem;

typedef struct {
    const char *name;
    void (*run)(Problem *);
} Version;

// Tokens of one head of one sequence, as doc/math.md 5 has them
typedef struct {
    double I[CHECKED_T][D], F[CHECKED_T][D], z[CHECKED_T][D], o[CHECKED_T][D], sig_minus[CHECKED_T][D];
    double c[CHECKED_T][D], n[CHECKED_T][D];
} Trace;

// From x [T] rows, stride apart, to y [T][D]; y is rounded to bf16 as it enters the next step. R [D from, 4, D to]
static void reference_forward(Trace *a, const float *x, size_t stride, const float *R, const float *bias, float *y,
                              size_t y_stride) {
    static double r[4][D], m[D];
    for (int t = 0; t < CHECKED_T; t++) {
        for (int k = 0; k < 4 * D; k++) r[k / D][k % D] = bias[k] + x[t * stride + k];
        for (int from = 0; from < D && t > 0; from++) {
            const double entered = to_float(from_float<bf16>(y[(t - 1) * y_stride + from]));
            for (int k = 0; k < 4 * D; k++) r[k / D][k % D] += entered * R[(size_t)from * 4 * D + k];
        }
        for (int u = 0; u < D; u++) {
            const double stored = t ? m[u] - log1p(exp(-r[1][u])) : -INFINITY;
            m[u] = fmax(r[0][u], stored);
            a->I[t][u] = exp(r[0][u] - m[u]);
            a->F[t][u] = exp(stored - m[u]);
            a->z[t][u] = tanh(r[2][u]);
            a->o[t][u] = 1 / (1 + exp(-r[3][u]));
            a->sig_minus[t][u] = 1 / (1 + exp(r[1][u]));
            a->c[t][u] = (t ? a->F[t][u] * a->c[t - 1][u] : 0) + a->I[t][u] * a->z[t][u];
            a->n[t][u] = (t ? a->F[t][u] * a->n[t - 1][u] : 0) + a->I[t][u];
            y[t * y_stride + u] = (float)(a->o[t][u] * a->c[t][u] / a->n[t][u]);
        }
    }
}

// From dy [T] rows to dx [T][4][D]
static void reference_backward(const Trace *a, const float *dy, size_t stride, const float *R, float *dx,
                               size_t dx_stride) {
    static double dc[D], dn[D], back[D], dr[4][D];
    for (int u = 0; u < D; u++) dc[u] = dn[u] = back[u] = 0;
    for (int t = CHECKED_T - 1; t >= 0; t--) {
        for (int u = 0; u < D; u++) {
            const double all = dy[t * stride + u] + back[u], n = a->n[t][u], o = a->o[t][u], z = a->z[t][u];
            const double y = o * a->c[t][u] / n, I = a->I[t][u], F = a->F[t][u];
            dc[u] += all * o / n;
            dn[u] -= all * y / n;
            dr[0][u] = I * (z * dc[u] + dn[u]);
            dr[1][u] = t ? F * (a->c[t - 1][u] * dc[u] + a->n[t - 1][u] * dn[u]) * a->sig_minus[t][u] : 0;
            dr[2][u] = I * (1 - z * z) * dc[u];
            dr[3][u] = (1 - o) * y * all;
            for (int g = 0; g < 4; g++) dx[t * dx_stride + g * D + u] = (float)dr[g][u];
            dc[u] *= F;
            dn[u] *= F;
        }
        for (int u = 0; u < D; u++) {
            back[u] = 0;
            for (int k = 0; k < 4 * D; k++) back[u] += R[(size_t)u * 4 * D + k] * dr[k / D][k % D];
        }
    }
}

typedef struct {
    float *x, *dy, *R, *bias;
} Host;

static Problem problem(int T, Host *h) {
    Problem p = {};
    const size_t cells = (size_t)B * T * NH * D;
    const SlstmShape shape = {B, T, NH, D};
    Arena arena = {NULL, 0};
    p.T = T;
    h->x = fill_random(4 * cells, 1, 1.0f);
    h->dy = fill_random(cells, 4, 1.0f);
    round_to<bf16>(h->x, 4 * cells);
    round_to<bf16>(h->dy, cells);
    p.x = to_device<bf16>(h->x, 4 * cells);
    p.dy = to_device<bf16>(h->dy, cells);
    p.R = to_device<bf16>(h->R, (size_t)NH * D * 4 * D);
    p.bias = to_device<float>(h->bias, NH * 4 * D);
    p.y = device_poisoned<bf16>(cells);
    p.dx = device_poisoned<bf16>(4 * cells);
    p.states = device_poisoned<float>((size_t)B * NH * 3 * D);
    p.handed = device_poisoned<bf16>((size_t)2 * B * NH * 4 * D);
    p.dbias = device_poisoned<float>(NH * 4 * D);
    p.partial = device_poisoned<float>(slstm_partial_size(&shape));
    CUDA_CHECK(cudaMalloc((void **)&p.doc_start, (size_t)B * T * sizeof(int)));
    CUDA_CHECK(cudaMemset(p.doc_start, 0, (size_t)B * T * sizeof(int)));  // every sequence is one document
    for (int pass = 0; pass < 2; pass++) {
        arena.used = 0;
        slstm_take_saved(&arena, &shape, &p.saved);
        slstm_take_scratch<bf16>(&arena, &shape, &p.scratch);
        if (pass == 0) arena.base = (char *)device_poisoned<char>(arena.used);
    }
    return p;
}

static void shipped_forward(Problem *p, int choice) {
    const SlstmShape shape = {B, p->T, NH, D};
    const SlstmState none = {};
    slstm_cluster_choice = choice;
    slstm_forward<bf16>(&shape, p->x, p->R, p->bias, p->doc_start, none, none, p->y, &p->saved, &p->scratch, 0);
}

static int compare_floats(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static float microseconds(Problem *p, void (*run)(Problem *)) {  // a step, median
    float times[RUNS];
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (int k = -1; k < RUNS; k++) {
        CUDA_CHECK(cudaEventRecord(begin, 0));
        run(p);
        CUDA_CHECK(cudaEventRecord(end, 0));
        CUDA_CHECK(cudaEventSynchronize(end));
        if (k >= 0) CUDA_CHECK(cudaEventElapsedTime(&times[k], begin, end));
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    qsort(times, RUNS, sizeof(float), compare_floats);
    return 1000 * times[RUNS / 2] / p->T;
}

// Checks and times all versions, or the one that is asked for; exit code 1 if one is wrong.
static int ladder(int argc, char **argv, const Version *versions, int backward) {
    const int only = argc > 1 ? atoi(argv[1]) : 0;
    const size_t heads = NH * D, cells = (size_t)B * CHECKED_T * heads, count = backward ? 4 * cells : cells;
    float took[VERSIONS] = {0}, *y = (float *)xcalloc(cells, sizeof(float));
    float *dx = (float *)xcalloc(4 * cells, sizeof(float));
    Host h = {NULL, NULL, fill_random(heads * 4 * D, 2, 0.7f / sqrtf((float)D)), fill_random(4 * heads, 3, 0.5f)}, t;
    round_to<bf16>(h.R, heads * 4 * D);
    t = h;
    Problem checked = problem(CHECKED_T, &h), timed = problem(TIMED_T, &t);
    static Trace trace;
    for (int b = 0; b < B; b++)
        for (int head = 0; head < NH; head++) {
            const size_t at = (size_t)b * CHECKED_T * heads + head * D;
            const float *R = h.R + (size_t)head * D * 4 * D;
            reference_forward(&trace, h.x + 4 * at, 4 * heads, R, h.bias + head * 4 * D, y + at, heads);
            if (backward) reference_backward(&trace, h.dy + at, heads, R, dx + 4 * at, 4 * heads);
        }
    if (backward) shipped_forward(&checked, SLSTM_ANY), shipped_forward(&timed, SLSTM_ANY);
    for (int k = 0; k < VERSIONS; k++) {
        if (only && only != k + 1) continue;
        bf16 *result = backward ? checked.dx : checked.y;
        CUDA_CHECK(cudaMemset(result, 0xff, count * sizeof(bf16)));
        versions[k].run(&checked);
        float *got = to_host(result, count);
        check_close(versions[k].name, got, backward ? dx : y, count, backward ? 1e-2 : 5e-3);
        free(got);
        took[k] = microseconds(&timed, versions[k].run);
    }
    printf("\n| version | us a step |\n|---|---|\n");
    for (int k = 0; k < VERSIONS; k++)
        if (took[k] > 0) printf("| %d %s | %.2f |\n", k + 1, versions[k].name, took[k]);
    return tests_failed > 0;
}

#endif
