// test_xlstm.cu: the CUDA trainer against the CPU trainer, on the GPU. Each kernel alone on random inputs of odd and
// usual sizes, then whole models: loss, logits and every gradient, states, generation, updates, and the same bits
// again.
//
//   make test-gpu                     builds and runs it, and dev/test/cuda/gpu_runs.sh
//   build/test_xlstm_cu WORD...       only the tests whose name holds one of the words
//   build/test_xlstm_cu WORD... small few and small cases of mlstm, slstm and models, for compute-sanitizer, which is a
//                                     hundred times slower: dev/test/cuda/sanitize.sh
//
// The CPU side is train_xlstm.c, compiled as C in dev/test/cuda/oracle_*.c. Prints a line a check with the measured
// relative L2 error, and "N passed, N failed" last.

#define TESTING
#include "train_xlstm.cu"

#include "dev/test/cuda/harness.cuh"

#include "dev/test/cuda/test_adamw.cuh"
#include "dev/test/cuda/test_blocks4.cuh"
#include "dev/test/cuda/test_classifier.cuh"
#include "dev/test/cuda/test_conv.cuh"
#include "dev/test/cuda/test_embedding.cuh"
#include "dev/test/cuda/test_gated.cuh"
#include "dev/test/cuda/test_head_norm.cuh"
#include "dev/test/cuda/test_mlstm.cuh"
#include "dev/test/cuda/test_mlstm_step.cuh"
#include "dev/test/cuda/test_norm.cuh"
#include "dev/test/cuda/test_pairs.cuh"
#include "dev/test/cuda/test_segments.cuh"
#include "dev/test/cuda/test_slstm.cuh"

extern "C" const Backend *oracle_backend(void);

// ----------------------------------------------------------------------------------------------------------------
// Matrix products

template <typename F>
static void test_matmul_format(void) {
    const int shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {64, 24, 40}, {100, 130, 70}, {257, 768, 512}};
    for (size_t k = 0; k < sizeof shapes / sizeof shapes[0]; k++) {
        int rows = shapes[k][0], N = shapes[k][1], K = shapes[k][2];
        size_t nx = (size_t)rows * K, nw = (size_t)N * K, no = (size_t)rows * N;
        float *x = fill_random(nx, 1, 1), *w = fill_random(nw, 2, 1), *r = fill_random(no, 3, 1);
        round_to<F>(x, nx), round_to<F>(w, nw), round_to<F>(r, no);
        float *want = (float *)xcalloc(no, sizeof(float)), *want_dx = (float *)xcalloc(nx, sizeof(float));
        float *want_dw = (float *)xcalloc(nw, sizeof(float));
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < N; j++) {
                double sum = r[(size_t)i * N + j];
                for (int a = 0; a < K; a++) sum += (double)x[(size_t)i * K + a] * w[(size_t)j * K + a];
                want[(size_t)i * N + j] = (float)sum;
                for (int a = 0; a < K; a++) {
                    want_dx[(size_t)i * K + a] += r[(size_t)i * N + j] * w[(size_t)j * K + a];
                    want_dw[(size_t)j * K + a] += r[(size_t)i * N + j] * x[(size_t)i * K + a];
                }
            }
        F *dx_ = to_device<F>(x, nx), *dw_ = to_device<F>(w, nw), *dr = to_device<F>(r, no),
          *out = device_poisoned<F>(no);
        F *gx = device_poisoned<F>(nx);
        float *gw = to_device<float>(want_dw, nw);  // added to: twice the value is expected
        matmul_forward(out, N, dx_, K, dw_, dr, rows, N, K, (cudaStream_t)0);
        matmul_inputs(gx, K, 0, dr, N, dw_, rows, N, K, (cudaStream_t)0);
        matmul_weights(gw, 1, dr, N, dx_, K, rows, N, K, (cudaStream_t)0);
        char what[96];
        for (size_t i = 0; i < nw; i++) want_dw[i] *= 2;
        format_into(what, sizeof what, "matmul %s %d x %d x %d, out", format_name<F>(), rows, N, K);
        check_close(what, to_host(out, no), want, no, tolerance<F>(6e-7, 5e-3));
        format_into(what, sizeof what, "matmul %s %d x %d x %d, dx", format_name<F>(), rows, N, K);
        check_close(what, to_host(gx, nx), want_dx, nx, tolerance<F>(1e-6, 5e-3));
        format_into(what, sizeof what, "matmul %s %d x %d x %d, dw", format_name<F>(), rows, N, K);
        check_close(what, to_host(gw, nw), want_dw, nw, tolerance<F>(2e-7, 3.5e-7));
    }
}

static void test_matmul(void) {
    test_matmul_format<float>();
    test_matmul_format<bf16>();
}

// ----------------------------------------------------------------------------------------------------------------
// Whole models

typedef struct {
    const char *blocks;
    int D, heads, V, ffn, sigmoid, B, T, resets, states, recompute;
    int tile;  // rows that the classifier works on at once; 0: as planned
} ModelCase;

static const ModelCase model_cases[] = {
    {"mlstm*2", 64, 2, 100, 0, 0, 2, 37, 0, 0, 0},
    {"mlstm*2", 64, 2, 101, 0, 1, 2, 64, 1, 0, 0},
    {"mlstm_v1*2", 48, 2, 64, 0, 0, 2, 37, 0, 0, 0},
    {"mlstm_v1*2", 64, 4, 64, 0, 1, 2, 200, 1, 0, 1},
    {"slstm*2", 48, 2, 64, 0, 0, 3, 37, 0, 0, 0},
    {"slstm*2", 64, 4, 64, 0, 0, 2, 200, 1, 0, 1},
    {"mlstm,mlstm_v1,slstm", 64, 4, 256, 0, 0, 2, 1, 0, 1, 0},
    {"mlstm,mlstm_v1,slstm", 64, 4, 256, 0, 0, 3, 200, 1, 1, 0},
    {"mlstm,slstm,mlstm_v1", 96, 3, 257, 0, 1, 2, 64, 1, 1, 0},
    {"mlstm,slstm", 30, 3, 50, 20, 0, 2, 65, 1, 1, 0},
    {"(mlstm,slstm)*2", 128, 4, 256, 0, 0, 4, 256, 0, 0, 0},
    {"mlstm,mlstm_v1,slstm", 128, 2, 256, 0, 0, 1, 2048, 1, 0, 0},
    {"mlstm,mlstm_v1,slstm", 64, 4, 256, 0, 0, 3, 200, 1, 1, 1},
    {"mlstm,slstm,mlstm_v1", 33, 1, 51, 21, 1, 2, 70, 1, 1, 0},  // odd widths
    {"mlstm", 64, 2, 70001, 0, 0, 2, 37, 0, 0, 0},               // tokens that need more than 16 bits
    {"mlstm,slstm", 64, 2, 300, 0, 0, 3, 150, 1, 0, 0, 128},     // three tiles of logits and a part of one
};

static const ModelCase *const small_model_case = &model_cases[7];  // all block types, documents, states carried on

static void release_models(void) {  // device memory of the last case
    if (model_bf16.memory) CUDA_CHECK(cudaFree(model_bf16.memory));
    if (model_fp32.memory) CUDA_CHECK(cudaFree(model_fp32.memory));
    memset(&model_bf16, 0, sizeof model_bf16);
    memset(&model_fp32, 0, sizeof model_fp32);
}

typedef struct {
    ModelConfig config;
    TensorTable table, states;
    const Backend *backend[2];  // CPU, CUDA
    Batch batch;
    float *logits[2], *values[2];
    size_t num_logits, largest;
} Pair;

static ModelConfig case_config(const ModelCase *c) {
    ModelConfig config;
    char why[200];
    model_defaults(&config);
    config.vocab_size = c->V, config.hidden_size = c->D, config.num_heads = c->heads;
    config.ffn_dim = c->ffn ? c->ffn : model_default_ffn(c->D);
    config.sigmoid_gate = c->sigmoid;
    if (!model_parse_blocks(c->blocks, &config, why, sizeof why) || !model_check(&config, why, sizeof why))
        die(EXIT_USAGE, "%s", why);
    return config;
}

// calm: no gradient is a sum that all but cancels whatever the weights are. Otherwise the norm of each head takes back
// what a common shift of the input gates does to h, and divisors come near to zero. draw: which random numbers.
static Pair build_pair(const ModelCase *c, int in_bf16, int calm, int draw) {
    Pair p;
    memset(&p, 0, sizeof p);
    release_models();
    p.config = case_config(c);
    if (calm) p.config.eps = 0.5, p.config.norm_eps = 0.1;
    p.table = model_table(&p.config);
    p.states = model_state_table(&p.config);
    RunConfig run = {c->B, c->T, c->states ? c->B : 0, 1, c->recompute, in_bf16, 4, 64};
    p.backend[0] = oracle_backend();
    p.backend[1] = &cuda_backend;
    for (int k = 0; k < p.table.num_tensors; k++)
        if (p.table.tensors[k].count > p.largest) p.largest = p.table.tensors[k].count;
    if (p.states.total > p.largest) p.largest = p.states.total;
    for (int side = 0; side < 2; side++) {
        p.backend[side]->build(&p.config, &p.table, &run);
        if (side && c->tile) (in_bf16 ? model_bf16.logit_rows : model_fp32.logit_rows) = c->tile;  // less than planned
        p.values[side] = (float *)xcalloc(p.largest, sizeof(float));
    }
    for (int k = 0; k < p.table.num_tensors; k++) {  // zeros would hide errors: noise on everything
        tensor_init(&p.config, &p.table, k, 7 + draw, p.values[0]);
        for (size_t i = 0; i < p.table.tensors[k].count; i++) {
            p.values[0][i] += 0.05f * (float)rng_normal(8 + draw, RNG_TEST, (uint64_t)k, i);
            // Open input gates, in fp32 far enough for |q.n| to be the divisor of every fourth row or so. If not calm,
            // not in bf16 and not for a single token: |q.n| cancels there and makes rounding larger without limit.
            if (p.table.tensors[k].init == INIT_IGATE_10 && (calm || (!in_bf16 && c->T > 1)))
                p.values[0][i] += calm ? 6 : 9;
            if (in_bf16 && p.table.tensors[k].ndim > 1) p.values[0][i] = to_float(from_float<bf16>(p.values[0][i]));
        }
        for (int side = 0; side < 2; side++) p.backend[side]->write_tensor(KIND_WEIGHT, k, p.values[0]);
    }
    const size_t rows = (size_t)c->B * c->T;
    const uint64_t seed = 1 + (uint64_t)draw;
    int *inputs = (int *)xcalloc(rows, sizeof(int)), *targets = (int *)xcalloc(rows, sizeof(int));
    unsigned char *resets = (unsigned char *)xcalloc(rows, 1);
    for (size_t r = 0; r < rows; r++) {
        inputs[r] = (int)(rng_uniform(seed, RNG_TEST, 1, r) * c->V);
        targets[r] = rng_uniform(seed, RNG_TEST, 2, r) < 0.1 ? -1 : (int)(rng_uniform(seed, RNG_TEST, 3, r) * c->V);
        resets[r] = rng_uniform(seed, RNG_TEST, 4, r) < 0.04;
    }
    p.num_logits = rows * (size_t)c->V;
    for (int side = 0; side < 2; side++) p.logits[side] = (float *)xcalloc(p.num_logits, sizeof(float));
    Batch batch = {c->B, c->T, inputs, targets, c->resets ? resets : NULL, c->states ? 0 : -1, NULL, NULL, NULL, 0, 1};
    p.batch = batch;
    return p;
}

// Squares of errors, and of what is right, tensor by tensor, summed over draws
enum { DRAWS = 4, MAX_TENSORS = 256 };
typedef struct {
    const char *name[MAX_TENSORS];
    double error[MAX_TENSORS], size[MAX_TENSORS];
    int count;
} TensorErrors;

static void add_tensor_errors(TensorErrors *e, const Pair *p, int kind) {
    e->count = p->table.num_tensors;
    assert(e->count <= MAX_TENSORS);
    for (int k = 0; k < e->count; k++) {
        const size_t n = p->table.tensors[k].count;
        for (int side = 0; side < 2; side++) p->backend[side]->read_tensor(kind, k, p->values[side]);
        for (size_t i = 0; i < n; i++) {
            const double want = p->values[0][i], error = p->values[1][i] - want;
            e->error[k] += error * error, e->size[k] += want * want;
        }
        e->name[k] = p->table.tensors[k].name;
    }
}

// The relative error of the tensor that comes nearest to its limit, or misses it by most. What is zero in exact
// arithmetic, as the gradient of a weight that only an earlier token would use, must be no more than `zero` of all
// tensors together. gate_limit: of the parameters of gates, whose gradients are sums in which most cancels: the norm of
// each head takes back what scaling h does, so what a gate does to the scale of h is in every term and not in the sum.
// Its rounding is left.
static void check_tensor_errors(const TensorErrors *e, const char *what, double zero, double limit, double gate_limit) {
    double all = 0, worst = -1, error = 0, error_limit = limit;
    const char *name = "";
    for (int k = 0; k < e->count; k++) all += e->size[k];
    for (int k = 0; k < e->count; k++) {
        const bool is_zero = e->size[k] < 1e-24 * all;
        const double own = sqrt(e->error[k] / (is_zero ? all : e->size[k]));
        const double allowed = is_zero ? zero : strstr(e->name[k], "gate") ? gate_limit : limit;
        if (!(own <= limit) && !is_zero)
            printf("     %-60s %.2e, norm %.1e of the whole\n", e->name[k], own, sqrt(e->size[k] / all));
        if (!(own / allowed <= worst)) worst = own / allowed, error = own, error_limit = allowed, name = e->name[k];
    }
    char line[200];
    format_into(line, sizeof line, "%s (%s)", what, name);
    const float none = 0, got = (float)error;  // the distance from 0 is absolute
    check_close(line, &got, &none, 1, error_limit);
}

static void check_values(const char *label, const char *what, const float *got, const float *want, size_t n,
                         double limit) {
    char line[200];
    format_into(line, sizeof line, "%s: %s", label, what);
    check_close(line, got, want, n, limit);
}

// A batch with fewer sequences than planned, as the last one of an evaluation may be: like the CPU; and with its graph
// captured and replayed.
static void check_fewer_rows(const Pair *p, const char *label, double loss_limit, double limit) {
    Batch fewer = p->batch;
    float loss[2];
    double losses[3];
    fewer.B--;
    fewer.state_row = -1;
    if (fewer.B == 0) return;
    for (int side = 0; side < 2; side++) {
        fewer.logits = p->logits[side];
        loss[side] = (float)p->backend[side]->evaluate(&fewer);
    }
    check_values(label, "loss of fewer rows", &loss[1], &loss[0], 1, loss_limit);
    check_values(label, "logits of fewer rows", p->logits[1], p->logits[0], p->num_logits / p->batch.B * fewer.B,
                 limit);
    fewer.logits = NULL;
    for (int round = 0; round < 3; round++) losses[round] = cuda_backend.evaluate(&fewer);
    const float one = 1, equal = losses[0] == losses[1] && losses[1] == losses[2] && (float)losses[0] == loss[1];
    check_values(label, "graph replays of fewer rows give the same bits", &equal, &one, 1, 0);
}

static void case_label(const ModelCase *c, int in_bf16, int calm, char *label, size_t size) {
    format_into(label, size, "%s%s %s%s D%d V%d B%d T%d%s%s%s%s", in_bf16 ? "bf16" : "fp32", calm ? " calm" : "",
                c->blocks, c->sigmoid ? " sig" : "", c->D, c->V, c->B, c->T, c->resets ? " resets" : "",
                c->states ? " carried" : "", c->recompute ? " recompute" : "", c->tile ? " tiles" : "");
}

// All but gradients
static void test_model_case(const ModelCase *c, int in_bf16, int calm) {
    Pair p = build_pair(c, in_bf16, calm, 0);
    char label[120], line[200];
    const double limit = in_bf16 ? 3e-2 : 1e-4, scale = 1.0 / ((double)c->B * c->T);
    case_label(c, in_bf16, calm, label, sizeof label);
    for (int step = 0; step < (c->states ? 2 : 1); step++) {  // the second one starts from the states of the first
        float loss[2];
        for (int side = 0; side < 2; side++) {
            Batch batch = p.batch;
            batch.logits = p.logits[side];
            p.backend[side]->zero_grad();
            loss[side] = (float)(p.backend[side]->forward_backward(&batch, scale) * scale);
        }
        check_values(label, "loss", &loss[1], &loss[0], 1, in_bf16 ? 5e-3 : 1e-5);
        check_values(label, "logits", p.logits[1], p.logits[0], p.num_logits, limit);
    }
    for (int row = 0; c->states && row < c->B; row++) {
        for (int side = 0; side < 2; side++) p.backend[side]->read_state(row, p.values[side]);
        check_values(label, "states", p.values[1], p.values[0], p.states.total, limit);
    }
    check_fewer_rows(&p, label, in_bf16 ? 5e-3 : 1e-5, limit);
    // The same bits: an ordinary run, then captured, then replayed.
    float *first = (float *)xcalloc(p.largest, sizeof(float));
    int same = 1;
    double losses[3];
    Batch plain = p.batch;
    plain.state_row = -1;
    for (int round = 0; round < 3; round++) {
        cuda_backend.zero_grad();
        losses[round] = cuda_backend.forward_backward(&plain, scale);
        cuda_backend.read_tensor(KIND_GRAD, 0, round ? p.values[1] : first);
        if (round) same &= memcmp(first, p.values[1], p.table.tensors[0].count * sizeof(float)) == 0;
        same &= losses[round] == losses[0];
    }
    const float one = 1, equal = (float)same;
    check_values(label, "graph replays give the same bits", &equal, &one, 1, 0);
    // Generation
    size_t V = (size_t)c->V;
    for (int side = 0; side < 2; side++) {
        p.backend[side]->decode_start();
        for (int t = 0; t < 5; t++) p.backend[side]->decode_step(p.batch.inputs[t % c->T], p.values[side]);
    }
    check_values(label, "generation", p.values[1], p.values[0], V, limit);
    // Updates
    UpdateConfig update = {1, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5};
    double norms[2];
    for (int side = 0; side < 2; side++) {
        p.backend[side]->zero_grad();
        p.backend[side]->forward_backward(&plain, scale);
        norms[side] = p.backend[side]->grad_norm();
        p.backend[side]->update(&update);
    }
    const float got = (float)norms[1], want = (float)norms[0];
    check_values(label, "gradient norm", &got, &want, 1, limit);
    static TensorErrors errors;
    memset(&errors, 0, sizeof errors);
    add_tensor_errors(&errors, &p, KIND_WEIGHT);
    const double weight_limit = in_bf16 ? 3e-2 : 1e-3;  // signs of tiny gradients decide at the first update
    format_into(line, sizeof line, "%s: weights after an update", label);
    check_tensor_errors(&errors, line, 0, weight_limit, weight_limit);
}

// Gradients of several models that differ in their random numbers, each tensor over all of them and by its own norm: a
// sum over a few tokens may cancel by chance in one of them.
static void test_gradients_case(const ModelCase *c, int in_bf16, int calm) {
    static TensorErrors errors[2];  // of the first segment; of another that starts from the states of the first
    char label[120], line[200];
    memset(errors, 0, sizeof errors);
    for (int draw = 0; draw < DRAWS; draw++) {
        const Pair p = build_pair(c, in_bf16, calm, draw);
        for (int step = 0; step <= c->states; step++) {
            for (int side = 0; side < 2; side++) {
                p.backend[side]->zero_grad();
                p.backend[side]->forward_backward(&p.batch, 1.0 / ((double)c->B * c->T));
            }
            add_tensor_errors(&errors[step], &p, KIND_GRAD);
        }
    }
    case_label(c, in_bf16, calm, label, sizeof label);
    const double limit = in_bf16 ? 3e-2 : calm ? 1e-4 : 1.5e-4, gate_limit = in_bf16 ? 6e-2 : calm ? limit : 5e-4;
    for (int step = 0; step <= c->states; step++) {
        format_into(line, sizeof line, "%s: gradients of %d draws%s", label, DRAWS, step ? ", carried on" : "");
        check_tensor_errors(&errors[step], line, in_bf16 ? 1e-4 : 1e-7, limit, gate_limit);
    }
}

static void for_model_cases(void (*test)(const ModelCase *, int, int), int in_bf16, int calm) {
    for (size_t k = 0; k < sizeof model_cases / sizeof model_cases[0]; k++)
        if (!small_tests || &model_cases[k] == small_model_case) test(&model_cases[k], in_bf16, calm);
}
static void test_models_fp32(void) { for_model_cases(test_model_case, 0, 0); }
static void test_models_bf16(void) { for_model_cases(test_model_case, 1, 0); }
static void test_models_gradients(void) {
    for (int calm = 0; calm < (small_tests ? 1 : 2); calm++)
        for (int in_bf16 = 0; in_bf16 < 2; in_bf16++) for_model_cases(test_gradients_case, in_bf16, calm);
}

// ----------------------------------------------------------------------------------------------------------------
// Memory that a run takes beyond its plan: code, graphs of as many shapes as are kept, what cuBLASLt and the driver
// allocate. It must fit into what the plan leaves free. Kernels are loaded when they first run, so the figure is that
// of a run only if no other test ran before.

template <typename F>
static void test_memory_format(Model<F> *m) {
    const ModelCase c = {"(mlstm,mlstm_v1,slstm)*8", 256, 4, 50304, 0, 0, 8, 1024, 0, 1, 0};
    const ModelConfig config = case_config(&c);
    const TensorTable table = model_table(&config);
    const RunConfig run = {c.B, c.T, c.B, 1, 0, sizeof(F) == 2, 4, 64};
    size_t before, after, all, rows = (size_t)c.B * c.T;
    int *tokens = (int *)xcalloc(rows, sizeof(int));
    float *logits = (float *)xcalloc((size_t)c.V, sizeof(float));
    release_models();
    CUDA_CHECK(cudaMemGetInfo(&before, &all));
    cuda_backend.build(&config, &table, &run);
    for (int B = 1; B <= c.B; B++)
        for (int round = 0; round < 3; round++) {  // plain, captured, replayed
            Batch batch = {B, c.T, tokens, tokens, NULL, 0, NULL, NULL, NULL, 0, 1};
            cuda_backend.evaluate(&batch);
            cuda_backend.zero_grad();
            cuda_backend.forward_backward(&batch, 1.0 / (double)rows);
        }
    const UpdateConfig update = {1, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1};
    cuda_backend.grad_norm();
    cuda_backend.update(&update);
    cuda_backend.decode_start();
    for (int t = 0; t < 3; t++) cuda_backend.decode_step(0, logits);
    CUDA_CHECK(cudaMemGetInfo(&after, &all));
    const double beyond = (double)before - (double)after - (double)planned_bytes(m, NULL);
    printf("     %s: %.1f MiB beyond the plan\n", format_name<F>(), beyond / 1048576);
    const float fits = beyond <= slack_bytes(), one = 1;
    check_close("memory beyond the plan", &fits, &one, 1, 0);
    free(tokens), free(logits);
}
static void test_memory(void) {
    test_memory_format(&model_bf16);
    test_memory_format(&model_fp32);
}

static int is_wanted(const char *name, char *const *words, int count) {
    for (int k = 0; k < count; k++)
        if (strstr(name, words[k])) return 1;
    return count == 0;
}

int main(int argc, char **argv) {
    const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {{"memory", test_memory},
                 {"matmul", test_matmul},
                 {"norm", test_norm},
                 {"head_norm", test_head_norm},
                 {"gated", test_gated},
                 {"conv", test_conv},
                 {"blocks4", test_blocks4},
                 {"embedding", test_embedding},
                 {"classifier", test_classifier},
                 {"adamw", test_adamw},
                 {"mlstm_cell", test_mlstm},
                 {"mlstm_pairs", test_pairs},
                 {"mlstm_step", test_mlstm_step},
                 {"mlstm_segments", test_segments},
                 {"slstm_block", test_slstm_block},
                 {"slstm_team", test_slstm_team},
                 {"models_fp32", test_models_fp32},
                 {"models_bf16", test_models_bf16},
                 {"models_gradients", test_models_gradients}};
    small_tests = argc > 1 && strcmp(argv[argc - 1], "small") == 0;
    use_bf16 = 0;
    choose_device();
    void *workspace;
    CUDA_CHECK(cudaMalloc(&workspace, matmul_workspace_bytes(1)));
    matmul_init(workspace, NULL);
    for (size_t k = 0; k < sizeof tests / sizeof tests[0]; k++) {
        if (!is_wanted(tests[k].name, argv + 1, argc - 1 - small_tests)) continue;
        double start = now_seconds();
        tests[k].run();
        printf("%s: %.1f s\n", tests[k].name, now_seconds() - start);
        fflush(stdout);
    }
    printf("%d passed, %d failed\n", tests_passed, tests_failed);
    return tests_failed != 0;
}
