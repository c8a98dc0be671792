// mlstm_ladder.cuh: what the two ladders, mlstm_forward.cu and mlstm_backward.cu, share: a problem on the GPU, the same
// solved in double on the CPU, times, and the table at the end.
#ifndef DEV_CUDA_MLSTM_LADDER_CUH
#define DEV_CUDA_MLSTM_LADDER_CUH

#include <algorithm>
#include <vector>

#include "../../xlstmc/mlstm.cuh"

enum { DK = 128, DV = 256 };  // of a head; constants, so that versions 1 to 3 are short
enum { VERSIONS = 5, WARM_UPS = 2, MAX_RUNS = 30, RUN_MS = 200 };
static const size_t l2_bytes = (size_t)256 << 20;
static const double bandwidth = 3.0e12;  // of a device copy on an H100, bytes read and written a second
static const double bound = 1.5e-2;      // of relative L2 distances: operands and results are bf16

// ----------------------------------------------------------------------------------------------------------------
// A problem: q, k, v side by side in one matrix, as behind a projection; forget gates mostly open

typedef struct {
    MlstmShape s;  // chunk: MLSTM_CHUNK; version 5 takes a copy with SCAN_CHUNK
    MlstmInput<bf16> in;
    bf16 *dh, *h, *grad;      // [B, T, NH, DV] twice, [B, T, ld]: dq, dk, dv
    bf16 *dgates;             // [B, T, 2NH]
    float *dh_dot_h, *dbias;  // [B, T, NH], [2NH]
    MlstmSaved<bf16> saved;   // of the split kernels, versions 2 to 4
    MlstmScratch<bf16> scratch;
    MlstmSaved<bf16> scan_saved;  // version 5
    MlstmScratch<bf16> scan_scratch;
    float *keep, *write, *floor;  // [B, NH, T] version 1: e^(lf + m' - m), e^(i - m), e^-m
    float *states, *vectors;      // [B, NH, NC, DK DV], [B, NH, NC, DV] version 3
    std::vector<void *> memory;
} Problem;

// x[k] = normal numbers; their mean is `mean` in the first `columns` of each row of `width`, then `rest`
template <typename F>
static __global__ void fill_kernel(F *x, size_t n, uint64_t seed, size_t width, size_t columns, float mean,
                                   float rest) {
    for (size_t k = (size_t)blockIdx.x * blockDim.x + threadIdx.x; k < n; k += (size_t)gridDim.x * blockDim.x) {
        uint64_t z = (k + seed * 0x9E3779B97F4A7C15ull) * 0xBF58476D1CE4E5B9ull;  // two rounds of a mixing function
        z = (z ^ z >> 27) * 0x94D049BB133111EBull;
        z = (z ^ z >> 31) * 0xBF58476D1CE4E5B9ull;
        const float radius = sqrtf(-2 * logf(((unsigned)(z >> 40) + 0.5f) / (1 << 24)));
        x[k] = from_float<F>(radius * cospif(2 * (unsigned)(z & 0xffffff) / (float)(1 << 24)) +
                             (k % width < columns ? mean : rest));
    }
}

template <typename F>
static F *problem_take(Problem *p, size_t n) {
    F *x;
    CUDA_CHECK(cudaMalloc((void **)&x, n * sizeof(F)));
    p->memory.push_back(x);
    return x;
}
template <typename F>
static F *problem_random(Problem *p, size_t n, uint64_t seed, size_t width, size_t columns, float mean, float rest) {
    F *x = problem_take<F>(p, n);
    fill_kernel<F><<<1024, 256>>>(x, n, seed, width, columns, mean, rest);
    LAUNCH_CHECK();
    return x;
}

static void problem_workspace(Problem *p, const MlstmShape *s, MlstmSaved<bf16> *saved, MlstmScratch<bf16> *scratch) {
    Arena arena = {NULL, 0};
    for (int pass = 0; pass < 2; pass++) {
        mlstm_take_saved(&arena, s, saved);
        mlstm_take_scratch(&arena, s, scratch);
        if (pass == 0) arena = Arena{problem_take<char>(p, arena.used), 0};
    }
}

static MlstmShape scan_shape(const Problem *p) {
    MlstmShape s = p->s;
    s.chunk = SCAN_CHUNK;
    return s;
}

// T is a multiple of 128. q and k have a mean of 1, so that no row's normaliser comes out near 0, where any rounding is
// the whole result.
static Problem problem_build(int B, int NH, int T) {
    Problem p = {};
    const MlstmShape s = p.s = MlstmShape{B, T, NH, DK, DV, 0, 1e-6f, MLSTM_CHUNK};
    const size_t rows = (size_t)B * T, G = 2 * (size_t)NH, ld = (size_t)NH * (2 * DK + DV), heads = (size_t)B * NH;
    bf16 *qkv = problem_random<bf16>(&p, rows * ld, 1, ld, (size_t)NH * 2 * DK, 1, 0);
    float *gates = problem_random<float>(&p, rows * G, 2, G, NH, -1, 3), *bias = problem_take<float>(&p, G);
    int *doc_start = problem_take<int>(&p, rows);
    const std::vector<int> none(rows, NO_RESET);
    CUDA_CHECK(cudaMemset(bias, 0, G * sizeof(float)));
    CUDA_CHECK(cudaMemcpy(doc_start, none.data(), rows * sizeof(int), cudaMemcpyHostToDevice));
    p.in = MlstmInput<bf16>{qkv, qkv + (size_t)NH * DK, qkv + (size_t)NH * 2 * DK, ld, gates, G, bias, 0, doc_start};
    p.dh = problem_random<bf16>(&p, rows * NH * DV, 3, 1, 0, 0, 0);
    p.h = problem_take<bf16>(&p, rows * NH * DV);
    p.grad = problem_take<bf16>(&p, rows * ld);
    p.dgates = problem_take<bf16>(&p, rows * G);
    p.dh_dot_h = problem_take<float>(&p, rows * NH);
    p.dbias = problem_take<float>(&p, G);
    problem_workspace(&p, &s, &p.saved, &p.scratch);
    if (scan_runs_here()) {
        const MlstmShape scan = scan_shape(&p);
        problem_workspace(&p, &scan, &p.scan_saved, &p.scan_scratch);
    }
    p.keep = problem_take<float>(&p, heads * T);
    p.write = problem_take<float>(&p, heads * T);
    p.floor = problem_take<float>(&p, heads * T);
    p.states = problem_take<float>(&p, heads * mlstm_chunks(&s) * DK * DV);
    p.vectors = problem_take<float>(&p, heads * mlstm_chunks(&s) * DV);
    return p;
}

static void problem_free(Problem *p) {
    for (void *x : p->memory) CUDA_CHECK(cudaFree(x));
}

template <typename F>
static std::vector<float> to_host(const F *device, size_t n) {
    std::vector<F> x(n);
    CUDA_CHECK(cudaMemcpy(x.data(), device, n * sizeof(F), cudaMemcpyDeviceToHost));
    std::vector<float> y(n);
    for (size_t k = 0; k < n; k++) y[k] = to_float(x[k]);
    return y;
}

// ----------------------------------------------------------------------------------------------------------------
// Version 1 of both ladders needs the gates of the recurrent form: m_t = max(lf + m, i) (doc/math.md 3.4, 3.5). A warp
// a head: each lane has a token of 32, and the maximum passes from lane to lane.

static MlstmGateInput gate_input(const MlstmInput<bf16> &in) {
    return MlstmGateInput{in.gates, in.ld_gates, in.bias, in.cap, in.doc_start};
}

static __global__ void recurrent_gates_kernel(MlstmShape s, MlstmGateInput in, float *keep, float *write,
                                              float *floor) {
    const int b = blockIdx.x / s.NH, head = blockIdx.x % s.NH, lane = threadIdx.x;
    float m = 0;
    for (int t0 = 0; t0 < s.T; t0 += 32) {
        const size_t token = (size_t)b * s.T + t0 + lane, at = (size_t)blockIdx.x * s.T + t0 + lane;
        const float i = mlstm_gate(in, token, head), lf = mlstm_log_sigmoid(mlstm_gate(in, token, s.NH + head));
        float before = 0, after = 0;
        for (int k = 0; k < 32; k++) {
            const float next = fmaxf(__shfl_sync(0xffffffffu, lf, k) + m, __shfl_sync(0xffffffffu, i, k));
            if (lane == k) before = m, after = next;
            m = next;
        }
        keep[at] = expf(lf + before - after), write[at] = expf(i - after), floor[at] = expf(-after);
    }
}

// ----------------------------------------------------------------------------------------------------------------
// The same on the CPU, in double, one head of one sequence after the other: the recurrent form and its gradient

typedef struct {
    std::vector<float> h, grad;  // as Problem: [B, T, NH, DV], [B, T, ld]
} Solution;

typedef struct {  // a head
    int T;
    size_t ld, ld_h;
    const float *q, *k, *v, *dh;               // rows ld apart; dh: ld_h
    std::vector<double> keep, write, inv, ds;  // [T]
} CpuHead;

// C = keep C + write k v^T, n likewise, in the order of time; each(t, C, n) sees them after token t
template <typename Each>
static void cpu_states(const CpuHead &x, Each each) {
    std::vector<double> C((size_t)DK * DV), n(DK);
    for (int t = 0; t < x.T; t++) {
        const float *k = x.k + t * x.ld, *v = x.v + t * x.ld;
        for (int a = 0; a < DK; a++) {
            n[a] = x.keep[t] * n[a] + x.write[t] * k[a];
            for (int c = 0; c < DV; c++) C[a * DV + c] = x.keep[t] * C[a * DV + c] + x.write[t] * k[a] * v[c];
        }
        each(t, C.data(), n.data());
    }
}

static void cpu_forward(CpuHead *x, float *h, const std::vector<double> &floor, double eps) {
    const double scale = 1 / sqrt((double)DK);
    cpu_states(*x, [&](int t, const double *C, const double *n) {
        const float *q = x->q + t * x->ld, *dh = x->dh + t * x->ld_h;
        std::vector<double> num(DV);
        double sig = 0, dh_dot_h = 0;
        for (int a = 0; a < DK; a++) {
            sig += scale * q[a] * n[a];
            for (int c = 0; c < DV; c++) num[c] += scale * q[a] * C[a * DV + c];
        }
        const double den = std::max(fabs(sig), floor[t]) + eps;
        for (int c = 0; c < DV; c++) {
            h[t * x->ld_h + c] = (float)(num[c] / den);
            dh_dot_h += dh[c] * num[c] / den;
        }
        x->inv[t] = 1 / den;
        x->ds[t] = fabs(sig) > floor[t] ? -copysign(1 / den, sig) * dh_dot_h : 0;
    });
}

static void cpu_backward(const CpuHead &x, float *dq, float *dk, float *dv) {
    const double scale = 1 / sqrt((double)DK);
    cpu_states(x, [&](int t, const double *C, const double *n) {
        const float *dh = x.dh + t * x.ld_h;
        for (int a = 0; a < DK; a++) {
            double sum = x.ds[t] * n[a];
            for (int c = 0; c < DV; c++) sum += x.inv[t] * dh[c] * C[a * DV + c];
            dq[t * x.ld + a] = (float)(scale * sum);
        }
    });
    std::vector<double> dC((size_t)DK * DV), dn(DK);
    for (int t = x.T - 1; t >= 0; t--) {
        const float *q = x.q + t * x.ld, *k = x.k + t * x.ld, *v = x.v + t * x.ld, *dh = x.dh + t * x.ld_h;
        const double keep = t + 1 < x.T ? x.keep[t + 1] : 0;
        std::vector<double> out(DV);
        for (int a = 0; a < DK; a++) {
            double sum = dn[a] = keep * dn[a] + scale * x.ds[t] * q[a];
            for (int c = 0; c < DV; c++) {
                double *cell = &dC[a * DV + c];
                *cell = keep * *cell + scale * q[a] * x.inv[t] * dh[c];
                sum += *cell * v[c];
                out[c] += x.write[t] * *cell * k[a];
            }
            dk[t * x.ld + a] = (float)(x.write[t] * sum);
        }
        for (int c = 0; c < DV; c++) dv[t * x.ld + c] = (float)out[c];
    }
}

static Solution solve(const Problem *p) {
    const MlstmShape s = p->s;
    const size_t rows = (size_t)s.B * s.T, ld = p->in.ld, ld_h = (size_t)s.NH * DV;
    const std::vector<float> qkv = to_host(p->in.q, rows * ld), gates = to_host(p->in.gates, rows * 2 * s.NH),
                             dh = to_host(p->dh, rows * ld_h);
    Solution to = {std::vector<float>(rows * ld_h), std::vector<float>(rows * ld)};
    for (int b = 0; b < s.B; b++)
        for (int head = 0; head < s.NH; head++) {
            const size_t row = (size_t)b * s.T, q = row * ld + (size_t)head * DK, k = q + (size_t)s.NH * DK,
                         v = row * ld + (size_t)s.NH * 2 * DK + (size_t)head * DV,
                         at_h = row * ld_h + (size_t)head * DV;
            const std::vector<double> zeros(s.T);
            CpuHead x = {s.T, ld, ld_h, &qkv[q], &qkv[k], &qkv[v], &dh[at_h], zeros, zeros, zeros, zeros};
            std::vector<double> floor(s.T);
            double m = 0;
            for (int t = 0; t < s.T; t++) {
                const double i = gates[(row + t) * 2 * s.NH + head], f = gates[(row + t) * 2 * s.NH + s.NH + head],
                             lf = -log1p(exp(-f)), next = std::max(lf + m, i);
                x.keep[t] = exp(lf + m - next), x.write[t] = exp(i - next), floor[t] = exp(-next);
                m = next;
            }
            cpu_forward(&x, &to.h[at_h], floor, s.eps);
            cpu_backward(x, &to.grad[q], &to.grad[k], &to.grad[v]);
        }
    return to;
}

// Of `columns` of rows of `ld`
static double distance(const std::vector<float> &x, const std::vector<float> &y, size_t ld, size_t first,
                       size_t columns) {
    double difference = 0, size = 0;
    for (size_t at = first; at < x.size(); at += ld)
        for (size_t k = at; k < at + columns; k++) {
            difference += ((double)x[k] - y[k]) * ((double)x[k] - y[k]);
            size += (double)y[k] * y[k];
        }
    return sqrt(difference / size);  // not a number if x has one
}

// ----------------------------------------------------------------------------------------------------------------
// Times

// Median ms of work(), each time with an empty L2
template <typename Work>
static double median_ms(Work work) {
    void *l2;
    cudaEvent_t begin, end;
    std::vector<float> times;
    float total = 0;
    CUDA_CHECK(cudaMalloc(&l2, l2_bytes));
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (int run = 0; run < WARM_UPS + MAX_RUNS && (run < WARM_UPS + 3 || total < RUN_MS); run++) {
        CUDA_CHECK(cudaMemsetAsync(l2, 0, l2_bytes, 0));
        CUDA_CHECK(cudaEventRecord(begin, 0));
        work();
        CUDA_CHECK(cudaEventRecord(end, 0));
        CUDA_CHECK(cudaEventSynchronize(end));
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (run >= WARM_UPS) times.push_back(ms), total += ms;
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    CUDA_CHECK(cudaFree(l2));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

// ----------------------------------------------------------------------------------------------------------------
// main() of both: every version on a small problem against the CPU, then on a large one against version 1 and the clock

typedef struct {
    const char *what[VERSIONS];
    void (*run)(Problem *p, int version);
    void (*prepare)(Problem *p);  // what is not timed
    bool gradients;               // results are p->grad, else p->h
    double bytes;                 // a token and head: every input and output once
} Ladder;

static std::vector<float> ladder_result(const Ladder *l, const Problem *p) {
    const size_t rows = (size_t)p->s.B * p->s.T;
    return l->gradients ? to_host(p->grad, rows * p->in.ld) : to_host(p->h, rows * p->s.NH * DV);
}

// Prints the distances; false if one is above the bound or not a number
static bool ladder_compare(const Ladder *l, const Problem *p, const std::vector<float> &expected) {
    const std::vector<float> got = ladder_result(l, p);
    const size_t NH = p->s.NH, ld = p->in.ld;
    if (!l->gradients) {
        const double h = distance(got, expected, NH * DV, 0, NH * DV);
        printf("  h %.1e", h);
        return h <= bound;
    }
    const double dq = distance(got, expected, ld, 0, NH * DK), dk = distance(got, expected, ld, NH * DK, NH * DK),
                 dv = distance(got, expected, ld, 2 * NH * DK, NH * DV);
    printf("  dq %.1e  dk %.1e  dv %.1e", dq, dk, dv);
    return dq <= bound && dk <= bound && dv <= bound;
}

// Runs a version from clean results on; false if it is not right
static bool ladder_check(const Ladder *l, Problem *p, int version, const std::vector<float> &expected, const char *of) {
    CUDA_CHECK(cudaMemset(p->h, 0xff, (size_t)p->s.B * p->s.T * p->s.NH * DV * sizeof(bf16)));  // not numbers
    CUDA_CHECK(cudaMemset(p->grad, 0xff, (size_t)p->s.B * p->s.T * p->in.ld * sizeof(bf16)));
    l->prepare(p);
    l->run(p, version);
    CUDA_CHECK(cudaDeviceSynchronize());
    printf("version %d, distance to %s:", version, of);
    const bool right = ladder_compare(l, p, expected);
    printf("%s\n", right ? "" : "  WRONG");
    fflush(stdout);
    return right;
}

static int ladder_main(const Ladder *l, int argc, char **argv) {
    const int only = argc > 1 ? atoi(argv[1]) : 0, B = 32, NH = 4, T = 2048;
    if (argc > 2 || (argc > 1 && (only < 1 || only > VERSIONS)))
        die(EXIT_USAGE, "usage: %s [version, 1 to %d]", argv[0], VERSIONS);
    const int last = scan_runs_here() ? VERSIONS : VERSIONS - 1;
    if (only > last) die(EXIT_USAGE, "version %d needs a Hopper GPU and code built for sm_90a", only);
    Problem small = problem_build(2, 2, 384);
    const Solution solution = solve(&small);
    int wrong = 0;
    for (int version = 1; version <= last; version++)
        if (!only || version == only)
            wrong += !ladder_check(l, &small, version, l->gradients ? solution.grad : solution.h, "the CPU");
    problem_free(&small);

    Problem p = problem_build(B, NH, T);
    l->prepare(&p);
    l->run(&p, 1);
    const std::vector<float> expected = ladder_result(l, &p);
    double ms[VERSIONS + 1] = {0};
    for (int version = 1; version <= last; version++) {
        if (only && version != only) continue;
        wrong += !ladder_check(l, &p, version, expected, "version 1");
        ms[version] = median_ms([&] { l->run(&p, version); });
    }
    problem_free(&p);
    const double floor_ms = 1e3 * l->bytes * B * NH * T / bandwidth;
    printf("\nB%d NH%d T%d %d/%d, floor %.3f ms: every input and output once at %.1f TB/s\n", B, NH, T, DK, DV,
           floor_ms, bandwidth / 1e12);
    printf("%-40s %9s %12s %16s\n", "version", "ms", "of the floor", "the one before /");
    for (int version = 1; version <= last; version++) {
        if (!ms[version]) continue;
        printf("%d  %-37s %9.3f %10.1f %%", version, l->what[version - 1], ms[version], 100 * floor_ms / ms[version]);
        if (version > 1 && ms[version - 1]) printf(" %15.2fx", ms[version - 1] / ms[version]);
        printf("\n");
    }
    return wrong > 0;
}

// (3.11) times s. Inside a chunk from u and r; from an earlier chunk the way leads through the state, and `between` is
// what the chunks in between keep of it.
__device__ static float pair_weight(const MlstmGates &g, size_t gates, int query, int key, bool same, float between,
                                    float scale) {
    if (key > query) return 0;
    if (!same) return g.qscale[gates + query] * between * g.kscale[gates + key];
    const float2 u = g.u[gates + key], r = g.r[gates + query];
    return scale * exp2f((u.x - r.x) + (u.y - r.y));
}

#endif
