// test_conv.cuh: conv.cuh against the CPU trainer.
#ifndef DEV_TEST_CUDA_TEST_CONV_CUH
#define DEV_TEST_CUDA_TEST_CONV_CUH

#include "../../../xlstmc/conv.cuh"
#include "harness.cuh"

extern "C" {
void oracle_conv_forward(float *pre, float *out, const float *x, size_t ld, const float *w, const float *bias,
                         const unsigned char *resets, const float *window, float *window_out, size_t state_row, int B,
                         int T, int C);
void oracle_conv_backward(float *dx, size_t ld_dx, float *dw, float *dbias, float *dpre, const float *pre,
                          const float *x, size_t ld, const float *w, const unsigned char *resets, const float *window,
                          size_t state_row, int B, int T, int C);
}

typedef struct {
    int B, T, C, ld, every;  // a document begins every so many tokens on average; 0: never
    int carried;             // 1: windows are stored
} ConvCase;

template <typename F>
static void test_conv_case(ConvCase s) {
    int B = s.B, T = s.T, C = s.C;
    size_t rows = (size_t)B * T, wide = rows * s.ld, n = rows * C, state_row = 3 * (size_t)C + 5;
    float *x = fill_random(wide, 1, 1), *dx = fill_random(wide, 2, 1), *dout = fill_random(n, 3, 1);
    float *w = fill_random(4 * (size_t)C, 4, 0.5), *bias = fill_random(C, 5, 0.5);
    float *dw = fill_random(4 * (size_t)C, 6, 1), *dbias = fill_random(C, 7, 1);
    float *window = s.carried ? fill_random(B * state_row, 8, 1) : NULL, *final = fill_random(B * state_row, 9, 1);
    float *pre = (float *)xcalloc(n, sizeof(float)), *out = (float *)xcalloc(n, sizeof(float));
    round_to<F>(x, wide), round_to<F>(dx, wide), round_to<F>(dout, n);
    unsigned char *resets = (unsigned char *)xcalloc(rows, 1);
    int *doc_start = (int *)xcalloc(rows, sizeof(int));
    for (size_t r = 0; r < rows; r++) {
        int t = (int)(r % T);
        resets[r] = s.every && fabs(rng_normal(10, RNG_TEST, 0, r)) < 1.25 / s.every;  // density 0.8 at 0
        doc_start[r] = resets[r] ? t : t > 0 ? doc_start[r - 1] : NO_RESET;
    }
    F *d_x = to_device<F>(x, wide), *d_dx = to_device<F>(dx, wide), *d_dout = to_device<F>(dout, n);
    F *d_pre = device_poisoned<F>(n), *d_out = device_poisoned<F>(n);
    float *d_w = to_device<float>(w, 4 * C), *d_bias = to_device<float>(bias, C), *d_dw = to_device<float>(dw, 4 * C);
    float *d_dbias = to_device<float>(dbias, C), *d_final = to_device<float>(final, B * state_row);
    float *d_window = window ? to_device<float>(window, B * state_row) : NULL;
    float *d_partial = device_poisoned<float>(conv_partial_floats(C));
    int *d_start = to_device_int(doc_start, rows);

    oracle_conv_forward(pre, out, x, s.ld, w, bias, resets, window, final, state_row, B, T, C);
    conv_forward(d_pre, d_out, d_x, s.ld, d_w, d_bias, d_start, d_window, d_final, state_row, B, T, C, 0);
    char name[100], what[120];
    snprintf(name, sizeof name, "conv %s B%d T%d C%d%s%s", format_name<F>(), B, T, C, s.every ? " resets" : "",
             s.carried ? " carried" : "");
    auto check = [&](const char *part, const float *got, const float *want, size_t count, double limit) {
        snprintf(what, sizeof what, "%s: %s", name, part);
        check_close(what, got, want, count, limit);
    };
    double rounded = tolerance<F>(1.8e-7, 4e-3);
    check("pre", to_host(d_pre, n), pre, n, rounded);
    check("out", to_host(d_out, n), out, n, rounded);
    check("window", to_host(d_final, B * state_row), final, B * state_row, 0);

    round_to<F>(pre, n);
    d_pre = to_device<F>(pre, n);
    oracle_conv_backward(dx, s.ld, dw, dbias, dout, pre, x, s.ld, w, resets, window, state_row, B, T, C);
    conv_backward(d_dx, s.ld, d_dw, d_dbias, d_dout, d_pre, d_x, s.ld, d_w, d_start, d_window, state_row, B, T, C,
                  d_partial, 0);
    check("dx", to_host(d_dx, wide), dx, wide, rounded);
    check("dw", to_host(d_dw, 4 * C), dw, 4 * C, 7e-7);
    check("dbias", to_host(d_dbias, C), dbias, C, 7e-7);
}

static void test_conv(void) {
    static const ConvCase cases[] = {{1, 1, 5, 7, 0, 1},       {2, 1, 8, 8, 2, 1},     {2, 2, 4, 4, 0, 1},
                                     {3, 3, 12, 16, 4, 0},     {2, 37, 20, 24, 0, 0},  {2, 37, 20, 24, 3, 1},
                                     {3, 64, 132, 264, 9, 1},  {2, 100, 33, 40, 5, 1}, {2, 100, 32, 33, 5, 1},
                                     {5, 999, 260, 520, 20, 1}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        test_conv_case<float>(cases[k]);
        test_conv_case<bf16>(cases[k]);
    }
}

#endif
