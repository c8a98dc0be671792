// test_gated.cuh: gated.cuh against the CPU.
#ifndef DEV_TEST_CUDA_TEST_GATED_CUH
#define DEV_TEST_CUDA_TEST_GATED_CUH

#include "../../../xlstmc/gated.cuh"
#include "harness.cuh"

extern "C" {
void oracle_gated_forward(float *out, const float *gate_up, int rows, int U, int use_gelu);
void oracle_gated_backward(float *dgate_up, const float *dout, const float *gate_up, int rows, int U, int use_gelu);
}

template <typename F>
static void test_gated_case(int rows, int U, int use_gelu) {
    size_t all = (size_t)rows * U;
    char what[128];
    float *gate_up = fill_random(2 * all, 1, 2), *dout = fill_random(all, 2, 1);
    gate_up[0] = -200;  // e^-x overflows
    if (all > 1) gate_up[2 * all - U - 1] = 30;
    round_to<F>(gate_up, 2 * all);
    round_to<F>(dout, all);
    F *gate_up_gpu = to_device<F>(gate_up, 2 * all), *dout_gpu = to_device<F>(dout, all);
    F *out_gpu = device_poisoned<F>(all), *d_gpu = device_poisoned<F>(2 * all);
    gated_forward(out_gpu, gate_up_gpu, rows, U, use_gelu, 0);
    gated_backward(d_gpu, dout_gpu, gate_up_gpu, rows, U, use_gelu, 0);
    gated_backward(gate_up_gpu, dout_gpu, gate_up_gpu, rows, U, use_gelu, 0);  // in place

    float *out = (float *)xcalloc(all, sizeof(float)), *d = (float *)xcalloc(2 * all, sizeof(float));
    oracle_gated_forward(out, gate_up, rows, U, use_gelu);
    oracle_gated_backward(d, dout, gate_up, rows, U, use_gelu);
    float *got[] = {to_host(out_gpu, all), to_host(d_gpu, 2 * all), to_host(gate_up_gpu, 2 * all)};
    const char *names[] = {"out", "dgate_up", "dgate_up in place"};
    for (int k = 0; k < 3; k++) {
        snprintf(what, sizeof what, "gated %s %s %dx%d %s", format_name<F>(), use_gelu ? "gelu" : "silu", rows, U,
                 names[k]);
        check_close(what, got[k], k < 1 ? out : d, k < 1 ? all : 2 * all, tolerance<F>(2e-7, 4e-3));
        free(got[k]);
    }
    void *device[] = {gate_up_gpu, dout_gpu, out_gpu, d_gpu};
    for (void *p : device) CUDA_CHECK(cudaFree(p));
    float *host[] = {gate_up, dout, out, d};
    for (float *p : host) free(p);
}

template <typename F>
static void test_gated_format(void) {
    for (int use_gelu = 0; use_gelu < 2; use_gelu++) {
        test_gated_case<F>(1, 1, use_gelu);
        test_gated_case<F>(3, 13, use_gelu);
        test_gated_case<F>(7, 64, use_gelu);
        test_gated_case<F>(37, 1030, use_gelu);
        test_gated_case<F>(100, 2752, use_gelu);
    }
}

static void test_gated(void) {
    test_gated_format<float>();
    test_gated_format<bf16>();
}

#endif
