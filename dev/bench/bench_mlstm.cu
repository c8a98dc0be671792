// bench_mlstm.cu: the mLSTM cell alone on one GPU: forward, forward + backward, and each of their kernels, in ms.
//
//   make build/bench_mlstm && build/bench_mlstm                      the shapes of the models
//   build/bench_mlstm 8,8,2048,256,512 ...                           B,NH,T,dk,dv
//
// bf16, random inputs that lie as in an mlstm block: q, k, v and the output gate side by side in one matrix; the gates'
// pre-activations in fp32, forget gates mostly open. <dh, h> is given, as in the trainer by the head norm; the time of
// the line that says so, and those of the kernels, are with <dh, h> made by the backward pass. Medians of 30 runs after
// 5 warm-ups, each with a cold L2 cache (a buffer of 256 MiB is cleared before). The kernels are the nodes of the
// captured CUDA graph, timed in their order in the same way; a time
// of some microseconds is mostly the gap between two events.

#include <algorithm>
#include <cxxabi.h>
#include <string>
#include <vector>

#include "../../xlstmc/mlstm.cuh"
#include "../../xlstmc/rng.h"

enum { WARM_UPS = 5, RUNS = 30 };
static const size_t l2_bytes = (size_t)256 << 20;

template <typename F>
static F *random_device(size_t n, uint64_t seed) {  // a pattern that repeats, so that it is quickly made
    const size_t period = std::min(n, (size_t)1000003);
    std::vector<F> host(period);
    for (size_t k = 0; k < period; k++) host[k] = from_float<F>((float)rng_normal(seed, RNG_TEST, 0, k));
    F *device;
    CUDA_CHECK(cudaMalloc((void **)&device, n * sizeof(F)));
    CUDA_CHECK(cudaMemcpy(device, host.data(), period * sizeof(F), cudaMemcpyHostToDevice));
    for (size_t done = period; done < n; done *= 2)
        CUDA_CHECK(cudaMemcpy(device + done, device, std::min(done, n - done) * sizeof(F), cudaMemcpyDeviceToDevice));
    return device;
}

typedef struct {
    MlstmShape s;
    MlstmInput<bf16> in;
    bf16 *dh, *h, *grad;  // [B, T, NH, dv] twice, [B, T, ld_grad]: dq, dk, dv, of the output gate, dgates
    size_t ld_grad;
    float *dh_dot_h, *dbias;
    bool given;  // dh_dot_h is
    MlstmSaved<bf16> saved;
    MlstmScratch<bf16> scratch;
    std::vector<void *> memory;
} Cell;

static void cell_build(Cell *c, const MlstmShape *shape) {
    const MlstmShape s = c->s = *shape;
    const size_t rows = (size_t)s.B * s.T, Dk = (size_t)s.NH * s.dk, Dv = (size_t)s.NH * s.dv, G = 2 * (size_t)s.NH;
    const size_t ld = 2 * Dk + 2 * Dv;
    c->ld_grad = (ld + G + 7) / 8 * 8;
    bf16 *proj = random_device<bf16>(rows * ld, 1);
    float *gates = random_device<float>(rows * G, 2), *bias;
    std::vector<float> bias_host(G, -1.0f);
    for (size_t k = s.NH; k < G; k++) bias_host[k] = 3;
    CUDA_CHECK(cudaMalloc((void **)&bias, G * sizeof(float)));
    CUDA_CHECK(cudaMemcpy(bias, bias_host.data(), G * sizeof(float), cudaMemcpyHostToDevice));
    std::vector<int> none(rows, NO_RESET);
    int *doc_start;
    CUDA_CHECK(cudaMalloc((void **)&doc_start, rows * sizeof(int)));
    CUDA_CHECK(cudaMemcpy(doc_start, none.data(), rows * sizeof(int), cudaMemcpyHostToDevice));
    c->in = MlstmInput<bf16>{proj, proj + Dk, proj + 2 * Dk, ld, gates, G, bias, 15, doc_start};
    c->dh = random_device<bf16>(rows * Dv, 3);
    c->h = random_device<bf16>(rows * Dv, 4);
    c->grad = random_device<bf16>(rows * c->ld_grad, 5);
    c->dh_dot_h = random_device<float>(rows * s.NH, 6);
    c->dbias = random_device<float>(G, 8);
    Arena arena = {NULL, 0};
    mlstm_take_saved(&arena, &s, &c->saved);
    mlstm_take_scratch(&arena, &s, &c->scratch);
    char *base;
    CUDA_CHECK(cudaMalloc((void **)&base, arena.used));
    arena = Arena{base, 0};
    mlstm_take_saved(&arena, &s, &c->saved);
    mlstm_take_scratch(&arena, &s, &c->scratch);
    c->memory = {proj, gates, bias, doc_start, c->dh, c->h, c->grad, c->dh_dot_h, c->dbias, base};
}

static void cell_free(Cell *c) {
    for (void *p : c->memory) CUDA_CHECK(cudaFree(p));
}

static void cell_forward(Cell *c, cudaStream_t stream) {
    const MlstmState none = {NULL, NULL, NULL, 0};
    mlstm_forward<bf16>(c->s, c->in, none, none, c->h, &c->saved, &c->scratch, stream);
}

static void cell_backward(Cell *c, cudaStream_t stream) {
    const MlstmState none = {NULL, NULL, NULL, 0};
    const size_t Dk = (size_t)c->s.NH * c->s.dk, Dv = (size_t)c->s.NH * c->s.dv;
    mlstm_backward<bf16>(c->s, c->in, none, c->dh, c->given ? c->dh_dot_h : NULL, c->grad, c->grad + Dk,
                         c->grad + 2 * Dk, c->ld_grad, c->grad + 2 * Dk + 2 * Dv, c->ld_grad, c->dbias, &c->saved,
                         &c->scratch, stream, c->h);
}

// ----------------------------------------------------------------------------------------------------------------
// Times

static cudaStream_t stream;
static void *l2_buffer;

static double median(std::vector<float> times) {
    std::sort(times.begin(), times.end());
    return (times[times.size() / 2] + times[(times.size() - 1) / 2]) / 2;
}

// Runs `work(k)` for k = 0 .. steps-1 in order, many times; the median time of each step in ms. Events enclose a step.
template <typename Work>
static std::vector<double> time_steps(int steps, Work work) {
    std::vector<std::vector<float>> times(steps);
    std::vector<cudaEvent_t> events(steps + 1);
    for (cudaEvent_t &e : events) CUDA_CHECK(cudaEventCreate(&e));
    for (int run = 0; run < WARM_UPS + RUNS; run++) {
        CUDA_CHECK(cudaMemsetAsync(l2_buffer, 0, l2_bytes, stream));
        CUDA_CHECK(cudaEventRecord(events[0], stream));
        for (int k = 0; k < steps; k++) {
            work(k);
            CUDA_CHECK(cudaEventRecord(events[k + 1], stream));
        }
        CUDA_CHECK(cudaStreamSynchronize(stream));
        for (int k = 0; k < steps && run >= WARM_UPS; k++) {
            float ms;
            CUDA_CHECK(cudaEventElapsedTime(&ms, events[k], events[k + 1]));
            times[k].push_back(ms);
        }
    }
    for (cudaEvent_t e : events) CUDA_CHECK(cudaEventDestroy(e));
    std::vector<double> medians;
    for (const std::vector<float> &t : times) medians.push_back(median(t));
    return medians;
}

// The name of a kernel without its arguments
static std::string kernel_name(const void *kernel) {
#if CUDART_VERSION >= 12030
    const char *mangled;
    int status;
    CUDA_CHECK(cudaFuncGetName(&mangled, kernel));
    char *full = abi::__cxa_demangle(mangled, NULL, NULL, &status);
    std::string name = full ? full : mangled;
    free(full);
    if (name.compare(0, 5, "void ") == 0) name = name.substr(5);
    int depth = 0;  // arguments begin at the first parenthesis outside of <>: template values are written (int)128
    for (size_t k = 0; k < name.size(); k++) {
        depth += (name[k] == '<') - (name[k] == '>');
        if (name[k] == '(' && depth == 0) return name.substr(0, k);
    }
    return name;
#else
    return "kernel";
#endif
}

static void print_kernels(Cell *c) {
    cudaGraph_t graph;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    cell_forward(c, stream);
    cell_backward(c, stream);
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    size_t count = 0;
    CUDA_CHECK(cudaGraphGetNodes(graph, NULL, &count));
    std::vector<cudaGraphNode_t> nodes(count);  // in the order of the launches
    CUDA_CHECK(cudaGraphGetNodes(graph, nodes.data(), &count));
    std::vector<cudaKernelNodeParams> kernels;
    for (cudaGraphNode_t node : nodes) {
        cudaGraphNodeType type;
        CUDA_CHECK(cudaGraphNodeGetType(node, &type));
        if (type != cudaGraphNodeTypeKernel) continue;
        cudaKernelNodeParams p;
        CUDA_CHECK(cudaGraphKernelNodeGetParams(node, &p));
        kernels.push_back(p);
    }
    std::vector<double> ms = time_steps((int)kernels.size(), [&](int k) {
        const cudaKernelNodeParams &p = kernels[k];
        CUDA_CHECK(cudaLaunchKernel(p.func, p.gridDim, p.blockDim, p.kernelParams, p.sharedMemBytes, stream));
    });
    for (size_t k = 0; k < kernels.size(); k++) {
        const dim3 g = kernels[k].gridDim;
        printf("    %8.3f ms  %s  %u x %u x %u\n", ms[k], kernel_name(kernels[k].func).c_str(), g.x, g.y, g.z);
    }
    CUDA_CHECK(cudaGraphDestroy(graph));
}

int main(int argc, char **argv) {
    const char *const defaults[] = {"32,4,2048,128,256", "16,6,2048,64,128", "8,4,2048,128,256", "1,8,65536,256,512"};
    const int count = argc > 1 ? argc - 1 : (int)(sizeof defaults / sizeof *defaults);
    CUDA_CHECK(cudaStreamCreate(&stream));
    CUDA_CHECK(cudaMalloc(&l2_buffer, l2_bytes));
    for (int k = 0; k < count; k++) {
        const char *text = argc > 1 ? argv[k + 1] : defaults[k];
        MlstmShape s = {0, 0, 0, 0, 0, 0, 1e-6f};
        int end = 0;
        if (sscanf(text, "%d,%d,%d,%d,%d%n", &s.B, &s.NH, &s.T, &s.dk, &s.dv, &end) != 5 || text[end] || s.B < 1 ||
            s.NH < 1 || s.T < 1 || s.dk < 1 || s.dv < 1)
            die(EXIT_USAGE, "%s is not B,NH,T,dk,dv", text);
        s.chunk = mlstm_chunk<bf16>(s.dk, s.dv, (size_t)2 * s.NH * (s.dk + s.dv));
        Cell c;
        cell_build(&c, &s);
        double forward = time_steps(1, [&](int) { cell_forward(&c, stream); })[0];
        double both[2];
        for (bool given : {true, false}) {
            c.given = given;
            both[!given] = time_steps(1, [&](int) { cell_forward(&c, stream), cell_backward(&c, stream); })[0];
        }
        printf("%s fwd %.3f ms fwd+bwd %.3f ms, <dh, h> made %.3f ms\n", text, forward, both[0], both[1]);
        print_kernels(&c);
        fflush(stdout);
        cell_free(&c);
    }
    return 0;
}
