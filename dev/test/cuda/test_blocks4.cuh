// test_blocks4.cuh: blocks4.cuh against the CPU trainer.
#ifndef DEV_TEST_CUDA_TEST_BLOCKS4_CUH
#define DEV_TEST_CUDA_TEST_BLOCKS4_CUH

#include "../../../xlstmc/blocks4.cuh"
#include "harness.cuh"

extern "C" {
void oracle_blocks4_forward(float *out, size_t ld_out, const float *x, size_t ld_x, const float *w, int rows,
                            int width);
void oracle_blocks4_backward(float *dx, size_t ld_dx, float *dw, const float *dout, size_t ld_dout, const float *x,
                             size_t ld_x, const float *w, int rows, int width);
}

template <typename F>
static void test_blocks4_case(int rows, int I, int ld) {
    size_t n = (size_t)rows * I, wide = (size_t)rows * ld, all = 4 * (size_t)I, ld_qkv = 3 * (size_t)I;
    float *ca = fill_random(n, 1, 1), *branch = fill_random(wide, 2, 1), *dqkv = fill_random(3 * n, 3, 1);
    float *dca = fill_random(n, 4, 1), *dbranch = fill_random(wide, 5, 1);
    float *qkv = (float *)xcalloc(3 * n, sizeof(float)), *w[3], *dw[3], *d_w[3], *d_dw[3];
    round_to<F>(ca, n), round_to<F>(branch, wide), round_to<F>(dqkv, 3 * n), round_to<F>(dca, n);
    round_to<F>(dbranch, wide);
    for (int k = 0; k < 3; k++) {
        w[k] = fill_random(all, 6 + k, 0.5), dw[k] = fill_random(all, 9 + k, 1);
        d_w[k] = to_device<float>(w[k], all), d_dw[k] = to_device<float>(dw[k], all);
    }
    F *d_ca = to_device<F>(ca, n), *d_branch = to_device<F>(branch, wide), *d_dqkv = to_device<F>(dqkv, 3 * n);
    F *d_dca = to_device<F>(dca, n), *d_dbranch = to_device<F>(dbranch, wide), *d_qkv = device_poisoned<F>(3 * n);
    float *d_partial = device_poisoned<float>(blocks4_partial_floats(I));

    blocks4_qkv_forward(d_qkv, d_ca, d_branch, ld, d_w[0], d_w[1], d_w[2], rows, I, 0);
    blocks4_qkv_backward(d_dca, d_dbranch, ld, d_dw[0], d_dw[1], d_dw[2], d_dqkv, d_ca, d_branch, ld, d_w[0], d_w[1],
                         d_w[2], rows, I, d_partial, 0);
    for (int r = 0; r < rows; r++) memset(dbranch + (size_t)r * ld, 0, sizeof(float) * I);
    for (int k = 0; k < 3; k++) {
        const float *x = k < 2 ? ca : branch;
        size_t ld_x = k < 2 ? I : ld;
        oracle_blocks4_forward(qkv + k * (size_t)I, ld_qkv, x, ld_x, w[k], rows, I);
        oracle_blocks4_backward(k < 2 ? dca : dbranch, ld_x, dw[k], dqkv + k * (size_t)I, ld_qkv, x, ld_x, w[k], rows,
                                I);
    }
    char name[100], what[120];
    snprintf(name, sizeof name, "blocks4 %s rows %d I%d ld %d", format_name<F>(), rows, I, ld);
    auto check = [&](const char *part, const float *got, const float *want, size_t count, double limit) {
        snprintf(what, sizeof what, "%s: %s", name, part);
        check_close(what, got, want, count, limit);
    };
    double rounded = tolerance<F>(1e-7, 4e-3);
    check("qkv", to_host(d_qkv, 3 * n), qkv, 3 * n, rounded);
    check("dca", to_host(d_dca, n), dca, n, rounded);
    check("dbranch", to_host(d_dbranch, wide), dbranch, wide, rounded);
    check("dwq", to_host(d_dw[0], all), dw[0], all, 6e-7);
    check("dwk", to_host(d_dw[1], all), dw[1], all, 5.8e-7);
    check("dwv", to_host(d_dw[2], all), dw[2], all, 6e-7);
}

static void test_blocks4(void) {
    static const int cases[][3] = {{1, 4, 4},       {3, 8, 11},      {33, 20, 40},
                                   {130, 132, 264}, {517, 256, 513}, {5000, 64, 128}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        test_blocks4_case<float>(cases[k][0], cases[k][1], cases[k][2]);
        test_blocks4_case<bf16>(cases[k][0], cases[k][1], cases[k][2]);
    }
}

#endif
