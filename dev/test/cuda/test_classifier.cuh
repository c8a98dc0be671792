// test_classifier.cuh: classifier.cuh against the CPU trainer.
#ifndef DEV_TEST_CUDA_TEST_CLASSIFIER_CUH
#define DEV_TEST_CUDA_TEST_CLASSIFIER_CUH

#include "../../../xlstmc/classifier.cuh"
#include "harness.cuh"

extern "C" {
float oracle_cross_entropy_row(float *logits, int V, int target, float cap, float scale, int with_grad,
                               float *logits_out);
}

template <typename F>
static void test_classifier_case(int n, int V, int ld, float cap, int with_targets, int with_grad) {
    size_t wide = (size_t)n * ld, all = (size_t)n * V;
    float *logits = fill_random(wide, 1, 4), *capped = (float *)xcalloc(all, sizeof(float));
    float *losses = (float *)xcalloc(n, sizeof(float)), *poisoned = (float *)xcalloc(wide, sizeof(float)),
          scale = 0.37f;
    int *targets = (int *)xcalloc(n, sizeof(int));
    round_to<F>(logits, wide);
    for (size_t k = 0; k < wide; k++) poisoned[k] = (int)(k % ld) < V ? logits[k] : NAN;  // whatever is in the padding
    for (int r = 0; r < n; r++) targets[r] = r % 5 == 3 ? -1 : (int)((size_t)r * 7919 % V);
    targets[0] = V - 1;
    F *d_logits = to_device<F>(poisoned, wide);
    float *d_losses = device_poisoned<float>(n), *d_capped = device_poisoned<float>(all);
    float *d_scale = to_device<float>(&scale, 1);
    double *d_sum = device_poisoned<double>(1), sum, want_sum = 0;
    int *d_targets = with_targets ? to_device_int(targets, n) : NULL;

    classifier_loss(d_logits, ld, d_losses, d_targets, d_capped, n, V, cap, d_scale, with_grad, 0);
    loss_sum(d_sum, d_losses, n, 0);
    for (int r = 0; r < n; r++) {
        float *row = logits + (size_t)r * ld;
        losses[r] = oracle_cross_entropy_row(row, V, with_targets ? targets[r] : -1, cap, scale, with_grad,
                                             capped + (size_t)r * V);
        for (int c = V; c < ld; c++) row[c] = 0;
        want_sum += losses[r];
    }
    CUDA_CHECK(cudaMemcpy(&sum, d_sum, sizeof sum, cudaMemcpyDeviceToHost));
    char name[100], what[120];
    snprintf(name, sizeof name, "classifier %s n%d V%d ld %d cap %g%s", format_name<F>(), n, V, ld, cap,
             with_targets ? "" : " no targets");
    auto check = [&](const char *part, const float *got, const float *want, size_t count, double limit) {
        snprintf(what, sizeof what, "%s: %s", name, part);
        check_close(what, got, want, count, limit);
    };
    float got_sum = (float)sum, expected_sum = (float)want_sum;
    check("losses", to_host(d_losses, n), losses, n, tolerance<F>(7e-7, 1e-6));
    check("sum", &got_sum, &expected_sum, 1, 8e-7);
    check("logits", to_host(d_capped, all), capped, all, tolerance<F>(5e-7, 1.5e-6));
    if (with_grad) check("gradient", to_host(d_logits, wide), logits, wide, tolerance<F>(3.9e-6, 4e-3));
}

static void test_classifier(void) {
    static const int cases[][3] = {{1, 1, 1},     {7, 5, 8},       {9, 256, 256},
                                   {6, 257, 257}, {8, 1003, 1008}, {11, 50304, 50304}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++)
        for (int mode = 0; mode < 4; mode++) {  // capped, not capped, no targets, no gradient
            float cap = mode == 1 ? 0.0f : 30.0f;
            test_classifier_case<float>(cases[k][0], cases[k][1], cases[k][2], cap, mode != 2, mode != 3);
            test_classifier_case<bf16>(cases[k][0], cases[k][1], cases[k][2], cap, mode != 2, mode != 3);
        }
}

#endif
