// test_norm.cuh: norm.cuh against the CPU.
#ifndef DEV_TEST_CUDA_TEST_NORM_CUH
#define DEV_TEST_CUDA_TEST_NORM_CUH

#include "../../../xlstmc/norm.cuh"
#include "harness.cuh"

extern "C" {
void oracle_norm_forward(float *out, float *stats, const float *x, const float *w, int center, int plus_one, int groups,
                         int width, float eps, int rows);
void oracle_norm_backward(float *dx, int accumulate, float *dw, const float *dout, const float *x, const float *stats,
                          const float *w, int center, int plus_one, int groups, int width, float eps, int rows);
}

// offset: the tensors begin that many elements behind an aligned address
template <typename F>
static void test_norm_case(int rows, int width, int center, int plus_one, int accumulate, int offset) {
    NormShape n = {center, plus_one, width, 1e-5f};
    size_t all = (size_t)rows * width, padded = all + offset;
    char what[128];
    float *x = fill_random(padded, 1, 2), *dout = fill_random(padded, 2, 1), *dx = fill_random(padded, 3, 1);
    float *w = fill_random(width, 4, 1), *dw = fill_random(width, 5, 1);
    for (size_t k = 0; k < padded; k++) x[k] += 0.5f;  // a mean that counts
    round_to<F>(x, padded);
    round_to<F>(dout, padded);
    round_to<F>(dx, padded);
    F *x_gpu = to_device<F>(x, padded), *dout_gpu = to_device<F>(dout, padded), *out_gpu = device_poisoned<F>(padded);
    F *dx_gpu = accumulate ? to_device<F>(dx, padded) : device_poisoned<F>(padded);
    float *w_gpu = to_device<float>(w, width), *dw_gpu = to_device<float>(dw, width);
    float *stats_gpu = device_poisoned<float>(2 * (size_t)rows);
    float *partial = device_poisoned<float>((size_t)NORM_PARTS * width);
    norm_forward(out_gpu + offset, stats_gpu, x_gpu + offset, w_gpu, n, rows, 0);
    norm_backward(dx_gpu + offset, accumulate, dw_gpu, dout_gpu + offset, x_gpu + offset, stats_gpu, w_gpu, n, rows,
                  partial, 0);

    float *out = (float *)xcalloc(all, sizeof(float)), *stats = (float *)xcalloc(2 * (size_t)rows, sizeof(float));
    oracle_norm_forward(out, stats, x + offset, w, center, plus_one, 1, width, n.eps, rows);
    oracle_norm_backward(dx + offset, accumulate, dw, dout + offset, x + offset, stats, w, center, plus_one, 1, width,
                         n.eps, rows);
    float *got[] = {to_host(out_gpu, padded), to_host(stats_gpu, 2 * (size_t)rows), to_host(dx_gpu, padded),
                    to_host(dw_gpu, width)};
    const char *names[] = {"out", "stats", "dx", "dw"};
    const float *want[] = {out, stats, dx + offset, dw};
    const double limits[] = {tolerance<F>(2.8e-7, 4e-3), tolerance<F>(2.6e-7, 3.3e-6), tolerance<F>(2e-7, 4e-3),
                             tolerance<F>(7e-7, 2.8e-6)};
    size_t sizes[] = {all, 2 * (size_t)rows, all, (size_t)width}, starts[] = {(size_t)offset, 0, (size_t)offset, 0};
    for (int k = 0; k < 4; k++) {
        snprintf(what, sizeof what, "norm %s %dx%d%s%s%s%s %s", format_name<F>(), rows, width, center ? " center" : "",
                 plus_one ? " 1+w" : "", accumulate ? " add" : "", offset ? " unaligned" : "", names[k]);
        check_close(what, got[k] + starts[k], want[k], sizes[k], limits[k]);
        free(got[k]);
    }
    void *device[] = {x_gpu, dout_gpu, out_gpu, dx_gpu, w_gpu, dw_gpu, stats_gpu, partial};
    for (void *p : device) CUDA_CHECK(cudaFree(p));
    float *host[] = {x, dout, dx, w, dw, out, stats};
    for (float *p : host) free(p);
}

template <typename F>
static void test_norm_format(void) {
    test_norm_case<F>(1, 1, 0, 0, 1, 0);  // the gradient is all but zero: only with something to add it to
    test_norm_case<F>(3, 7, 1, 1, 0, 0);
    test_norm_case<F>(5, 8, 1, 0, 1, 0);
    test_norm_case<F>(37, 100, 1, 1, 1, 0);
    test_norm_case<F>(5000, 128, 1, 1, 1, 0);  // more rows than all warps take at once
    test_norm_case<F>(1200, 768, 1, 1, 1, 0);
    test_norm_case<F>(300, 768, 0, 0, 0, 0);
    test_norm_case<F>(300, 768, 0, 0, 1, 1);
    test_norm_case<F>(1200, 1032, 0, 0, 1, 0);  // one vector beyond a kind of kernel, and the last it takes
    test_norm_case<F>(500, 2048, 1, 1, 0, 0);
    test_norm_case<F>(500, 2056, 1, 1, 1, 0);
    test_norm_case<F>(500, 4096, 0, 0, 1, 0);
    test_norm_case<F>(150, 8192, 1, 0, 1, 0);
    test_norm_case<F>(9, 8199, 1, 1, 1, 0);
    test_norm_case<F>(3, 20000, 0, 0, 1, 0);
}

static void test_norm(void) {
    test_norm_format<float>();
    test_norm_format<bf16>();
}

#endif
