// test_adamw.cuh: adamw.cuh against the CPU trainer.
#ifndef DEV_TEST_CUDA_TEST_ADAMW_CUH
#define DEV_TEST_CUDA_TEST_ADAMW_CUH

#include "../../../xlstmc/adamw.cuh"
#include "harness.cuh"

extern "C" {
void oracle_update(float *w, float *m, float *v, float *grads, size_t count, int decay, int step, double lr,
                   double beta1, double beta2, double eps, double weight_decay, double grad_scale);
double oracle_grad_norm(float *grads, size_t total);
}

// Two tensors in one buffer, cut into chunks: the first decays, the second does not.
// The second begins right after the first if `joined`, else at a multiple of 64.
static void test_adamw_case(size_t count0, size_t count1, int joined, int step) {
    const double lr = 1e-2, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, decay = 0.1, grad_scale = 0.7;
    size_t second = joined ? count0 : (count0 + 63) / 64 * 64, total = second + count1;
    float *w = fill_random(total, 1, 1), *m = fill_random(total, 2, 0.1), *v = fill_random(total, 3, 0.1);
    float *grads = fill_random(total, 4, 1);
    for (size_t i = 0; i < total; i++) v[i] *= v[i];
    UpdateChunk *chunks = (UpdateChunk *)xcalloc(total / UPDATE_CHUNK + 2, sizeof(UpdateChunk)), *d_chunks;
    int num_chunks = 0;
    for (int k = 0; k < 2; k++)
        for (size_t i = 0, count = k ? count1 : count0; i < count; i += UPDATE_CHUNK) {
            size_t rest = count - i;
            chunks[num_chunks].offset = chunks[num_chunks].moments = (k ? second : 0) + i;
            chunks[num_chunks].count = rest < UPDATE_CHUNK ? (unsigned)rest : (unsigned)UPDATE_CHUNK;
            chunks[num_chunks++].decay = k ? 0.0f : 1.0f;
        }
    float *d_w = to_device<float>(w, total), *d_m = to_device<float>(m, total), *d_v = to_device<float>(v, total);
    float *d_grads = to_device<float>(grads, total);
    bf16 *d_w16 = to_device<bf16>(w, total), *d_converted = device_poisoned<bf16>(total);
    double *d_norm = device_poisoned<double>(1), *d_partial = device_poisoned<double>(GRAD_NORM_BLOCKS), squared;
    CUDA_CHECK(cudaMalloc((void **)&d_chunks, num_chunks * sizeof(UpdateChunk)));
    CUDA_CHECK(cudaMemcpy(d_chunks, chunks, num_chunks * sizeof(UpdateChunk), cudaMemcpyHostToDevice));

    AdamwArgs args = {(float)lr,
                      (float)beta1,
                      (float)beta2,
                      (float)eps,
                      (float)decay,
                      (float)(1 / (1 - pow(beta1, step))),
                      (float)(1 / (1 - pow(beta2, step))),
                      (float)grad_scale};
    Gradients all = {d_grads, NULL, 0};
    grad_norm_part(d_partial, all, 0, total, GRAD_NORM_BLOCKS, 0);
    grad_norm_squared(d_norm, d_partial, GRAD_NORM_BLOCKS, 0);
    adamw_update(d_w, d_w16, d_m, d_v, all, d_chunks, num_chunks, args, 0);
    to_bf16(d_converted, d_w, second, 0);
    to_bf16(d_converted + second, d_w + second, count1, 0);
    CUDA_CHECK(cudaMemcpy(&squared, d_norm, sizeof squared, cudaMemcpyDeviceToHost));
    float norm = (float)sqrt(squared), want_norm = (float)oracle_grad_norm(grads, total);
    float *weights = (float *)xcalloc(total, sizeof(float));
    memcpy(weights, w, total * sizeof(float));
    oracle_update(w, m, v, grads, count0, 1, step, lr, beta1, beta2, eps, decay, grad_scale);
    oracle_update(w + second, m + second, v + second, grads + second, count1, 0, step, lr, beta1, beta2, eps, decay,
                  grad_scale);
    float *got = to_host(d_w, total), *moved = (float *)xcalloc(total, sizeof(float));
    float *want_moved = (float *)xcalloc(total, sizeof(float));
    for (size_t i = 0; i < total; i++) moved[i] = got[i] - weights[i], want_moved[i] = w[i] - weights[i];
    char name[100], what[120];
    snprintf(name, sizeof name, "adamw %zu + %zu step %d%s", count0, count1, step, joined ? " joined" : "");
    auto check = [&](const char *part, const float *a, const float *b, size_t n, double limit) {
        snprintf(what, sizeof what, "%s: %s", name, part);
        check_close(what, a, b, n, limit);
    };
    check("grad norm", &norm, &want_norm, 1, 1e-7);
    check("w", got, w, total, 6e-9);
    check("change of w", moved, want_moved, total, 3e-7);
    check("m", to_host(d_m, total), m, total, 1e-7);
    check("v", to_host(d_v, total), v, total, 1e-7);
    round_to<bf16>(got, total);
    check("w in bf16", to_host(d_w16, total), got, total, 0);
    check("converted", to_host(d_converted, total), got, total, 0);
}

static void test_adamw(void) {
    test_adamw_case(1, 3, 0, 1);
    test_adamw_case(5, 5, 1, 1);
    test_adamw_case(64, 127, 0, 1);
    test_adamw_case(UPDATE_CHUNK, 5, 0, 2);
    test_adamw_case(UPDATE_CHUNK + 3, UPDATE_CHUNK + 1, 1, 3);
    test_adamw_case(3 * UPDATE_CHUNK + 1, 2 * UPDATE_CHUNK + 1021, 0, 100);
}

#endif
