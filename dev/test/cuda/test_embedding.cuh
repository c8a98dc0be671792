// test_embedding.cuh: embedding.cuh against the CPU trainer.
#ifndef DEV_TEST_CUDA_TEST_EMBEDDING_CUH
#define DEV_TEST_CUDA_TEST_EMBEDDING_CUH

#include "../../../xlstmc/embedding.cuh"
#include "harness.cuh"

extern "C" {
void oracle_embedding_forward(float *x, const int *tokens, const float *w, int rows, int D);
void oracle_embedding_backward(float *dw, const float *dx, const int *tokens, int rows, int D);
}

// favourite: this share of the rows, in percent, has one and the same token.
template <typename F>
static void test_embedding_case(int rows, int D, int V, int favourite) {
    size_t n = (size_t)rows * D, all = (size_t)V * D;
    float *w = fill_random(all, 1, 1), *dw = fill_random(all, 2, 1), *dx = fill_random(n, 3, 1);
    float *x = (float *)xcalloc(n, sizeof(float));
    int *tokens = (int *)xcalloc(rows, sizeof(int));
    for (int r = 0; r < rows; r++) {
        uint64_t random = (uint64_t)(fabs(rng_normal(4, RNG_TEST, 0, r)) * 1e9);
        tokens[r] = (int)(random % 100) < favourite ? V / 2 : (int)(random / 100 % V);
    }
    round_to<F>(dx, n);
    F *d_x = device_poisoned<F>(n), *d_dx = to_device<F>(dx, n);
    float *d_w = to_device<float>(w, all), *d_dw = to_device<float>(dw, all), *d_again = to_device<float>(dw, all);
    int *d_tokens = to_device_int(tokens, rows), *d_scratch = device_poisoned<int>(embedding_scratch_size(rows, D));

    oracle_embedding_forward(x, tokens, w, rows, D);
    oracle_embedding_backward(dw, dx, tokens, rows, D);
    embedding_forward(d_x, d_tokens, d_w, rows, D, 0);
    embedding_backward(d_dw, d_dx, d_tokens, rows, D, V, d_scratch, 0);
    embedding_backward(d_again, d_dx, d_tokens, rows, D, V, d_scratch, 0);
    char name[100], what[120];
    snprintf(name, sizeof name, "embedding %s rows %d D%d V%d favourite %d%%", format_name<F>(), rows, D, V, favourite);
    auto check = [&](const char *part, const float *got, const float *want, size_t count, double limit) {
        snprintf(what, sizeof what, "%s: %s", name, part);
        check_close(what, got, want, count, limit);
    };
    float *got = to_host(d_dw, all);
    check("x", to_host(d_x, n), x, n, tolerance<F>(0, 4e-3));
    check("dw", got, dw, all, tolerance<F>(3e-6, 4e-7));
    check("dw again", to_host(d_again, all), got, all, 0);
}

static void test_embedding(void) {
    static const int cases[][4] = {{1, 3, 2, 0},        {64, 4, 256, 100},     {65, 8, 1, 0},
                                   {200, 33, 5, 50},    {2000, 132, 256, 20},  {9000, 20, 300, 95},
                                   {1500, 516, 700, 3}, {3000, 64, 50304, 10}, {700, 24, 70001, 5}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        test_embedding_case<float>(cases[k][0], cases[k][1], cases[k][2], cases[k][3]);
        test_embedding_case<bf16>(cases[k][0], cases[k][1], cases[k][2], cases[k][3]);
    }
}

#endif
