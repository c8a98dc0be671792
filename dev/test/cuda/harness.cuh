// harness.cuh: what the tests of CUDA kernels share: random inputs, device copies, poisoned outputs, comparison.
#ifndef DEV_TEST_CUDA_HARNESS_CUH
#define DEV_TEST_CUDA_HARNESS_CUH

#include <math.h>
#include <stdio.h>

#include "../../../xlstmc/cuda_util.cuh"
#include "../../../xlstmc/rng.h"

static int tests_passed, tests_failed;
static int small_tests;  // 1: only a few small cases

MAYBE_UNUSED
static double norm_of(const float *x, size_t n) {
    double size = 0;
    for (size_t k = 0; k < n; k++) size += (double)x[k] * x[k];
    return sqrt(size);
}

static float *fill_random(size_t n, uint64_t seed, float scale) {
    float *x = (float *)xcalloc(n, sizeof(float));
    for (size_t k = 0; k < n; k++) x[k] = scale * (float)rng_normal(seed, RNG_TEST, 0, k);
    return x;
}

template <typename F>
static void round_to(float *x, size_t n) {
    for (size_t k = 0; k < n; k++) x[k] = to_float(from_float<F>(x[k]));
}

template <typename F>
static F *to_device(const float *host, size_t n) {
    F *staged = (F *)xcalloc(n, sizeof(F)), *device;
    for (size_t k = 0; k < n; k++) staged[k] = from_float<F>(host[k]);
    CUDA_CHECK(cudaMalloc((void **)&device, n * sizeof(F) + 16));
    CUDA_CHECK(cudaMemcpy(device, staged, n * sizeof(F), cudaMemcpyHostToDevice));
    free(staged);
    return device;
}

MAYBE_UNUSED
static int *to_device_int(const int *host, size_t n) {
    int *device;
    CUDA_CHECK(cudaMalloc((void **)&device, n * sizeof(int) + 16));
    CUDA_CHECK(cudaMemcpy(device, host, n * sizeof(int), cudaMemcpyHostToDevice));
    return device;
}

template <typename F>
static F *device_poisoned(size_t n) {  // every bit set: NaN in both formats
    F *device;
    CUDA_CHECK(cudaMalloc((void **)&device, n * sizeof(F) + 16));
    CUDA_CHECK(cudaMemset(device, 0xff, n * sizeof(F)));
    return device;
}

template <typename F>
static float *to_host(const F *device, size_t n) {
    F *staged = (F *)xcalloc(n, sizeof(F));
    float *host = (float *)xcalloc(n, sizeof(float));
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(staged, device, n * sizeof(F), cudaMemcpyDeviceToHost));
    for (size_t k = 0; k < n; k++) host[k] = to_float(staged[k]);
    free(staged);
    return host;
}

// Columns at .. at + count of a buffer [rows, ld], and back
MAYBE_UNUSED
static float *take_columns(const float *wide, size_t ld, size_t at, size_t count, size_t rows) {
    float *out = (float *)xcalloc(rows * count, sizeof(float));
    for (size_t r = 0; r < rows; r++) memcpy(out + r * count, wide + r * ld + at, count * sizeof(float));
    return out;
}
MAYBE_UNUSED
static void put_columns(float *wide, size_t ld, size_t at, size_t count, size_t rows, const float *in) {
    for (size_t r = 0; r < rows; r++) memcpy(wide + r * ld + at, in + r * count, count * sizeof(float));
}

// Relative L2 distance; NaN and Inf fail. Prints a line a check, FAIL first if it is one.
static double check_close(const char *what, const float *got, const float *want, size_t n, double tolerance) {
    double error = 0, size = 0;
    for (size_t k = 0; k < n; k++) {
        error += ((double)got[k] - want[k]) * ((double)got[k] - want[k]);
        size += (double)want[k] * want[k];
    }
    double relative = size > 0 ? sqrt(error / size) : sqrt(error);
    int good = relative <= tolerance;  // false for NaN
    if (good) tests_passed++;
    else tests_failed++;
    printf("%s %-66s %.2e (at most %.1e)\n", good ? "  ok" : "FAIL", what, relative, tolerance);
    return relative;
}

template <typename F>
static const char *format_name(void) {
    return sizeof(F) == 4 ? "fp32" : "bf16";
}
template <typename F>
static double tolerance(double fp32, double bf16_tolerance) {
    return sizeof(F) == 4 ? fp32 : bf16_tolerance;
}

#endif
