// test_mlstm_step.cuh: mlstm_step of mlstm_gates.cuh, token after token, against the CPU's recurrent form.
#ifndef DEV_TEST_CUDA_TEST_MLSTM_STEP_CUH
#define DEV_TEST_CUDA_TEST_MLSTM_STEP_CUH

#include "../../../xlstmc/mlstm_gates.cuh"
#include "harness.cuh"

extern "C" void oracle_mlstm_recurrent(float *h, float *C, float *n, float *m, size_t state_row, const float *q,
                                       const float *k, const float *v, size_t ld, const float *gates, const float *bias,
                                       float cap, int B, int T, int NH, int dk, int dv, int sigmoid_gate, float eps);

template <typename F>
static void test_mlstm_step_case(int NH, int dk, int dv, int sigmoid_gate, float cap) {
    const int B = 2, T = 20;
    const float eps = 0.125f;  // large: where q.n nearly cancels, fp32 on the CPU is not exact either
    const size_t ld = (size_t)NH * (2 * dk + dv) + 3, all = B * T * ld, ld_gates = 2 * (size_t)NH;
    const size_t num_gates = B * T * ld_gates, num_h = (size_t)B * T * NH * dv, at_k = (size_t)NH * dk;
    const size_t at_n = (size_t)NH * dk * dv, at_m = at_n + (size_t)NH * dk, row = at_m + NH;
    float *x = fill_random(all, 1, 1), *gates = fill_random(num_gates, 2, 3), *bias = fill_random(ld_gates, 3, 1);
    float *state = fill_random(B * row, 4, 1);
    for (int b = 0; b < B && sigmoid_gate; b++)
        for (int head = 0; head < NH; head++) state[b * row + at_m + head] = 0;  // as always with this gate
    round_to<F>(x, all);
    F *x_gpu = to_device<F>(x, all), *h_gpu = device_poisoned<F>(num_h);
    float *gates_gpu = to_device<float>(gates, num_gates), *bias_gpu = to_device<float>(bias, ld_gates);
    float *state_gpu = to_device<float>(state, B * row);

    const MlstmShape shape = {B, 1, NH, dk, dv, sigmoid_gate, eps};
    const MlstmState state_of = {state_gpu, state_gpu + at_n, state_gpu + at_m, row};
    for (int t = 0; t < T; t++) {  // the sequences lie T tokens apart
        const F *q = x_gpu + t * ld;
        const MlstmInput<F> in = {q,        q + at_k, q + 2 * at_k, T * ld, gates_gpu + t * ld_gates, T * ld_gates,
                                  bias_gpu, cap,      NULL};
        mlstm_step(shape, in, state_of, h_gpu + (size_t)t * B * NH * dv, 0);
    }

    float *h = (float *)xcalloc(num_h, sizeof(float)), *h_by_time = (float *)xcalloc(num_h, sizeof(float));
    oracle_mlstm_recurrent(h, state, state + at_n, state + at_m, row, x, x + at_k, x + 2 * at_k, ld, gates, bias, cap,
                           B, T, NH, dk, dv, sigmoid_gate, eps);
    const size_t width = (size_t)NH * dv;
    for (int t = 0; t < T; t++)
        for (int b = 0; b < B; b++)
            memcpy(h_by_time + (t * B + b) * width, h + (b * T + t) * width, width * sizeof(float));
    char what[128];
    auto check = [&](const char *part, float *got, const float *want, size_t count, double limit) {
        snprintf(what, sizeof what, "mlstm step %s NH%d %dx%d%s%s, %s", format_name<F>(), NH, dk, dv,
                 sigmoid_gate ? " sigmoid" : "", cap > 0 ? " cap" : "", part);
        check_close(what, got, want, count, limit);
    };
    float *got_h = to_host(h_gpu, num_h), *got = to_host(state_gpu, B * row);
    check("h", got_h, h_by_time, num_h, tolerance<F>(2.5e-6, 4e-3));
    for (int b = 0; b < B; b++) {
        const size_t at = b * row;
        check(b ? "C of 1" : "C of 0", got + at, state + at, at_n, 3e-6);
        check(b ? "n of 1" : "n of 0", got + at + at_n, state + at + at_n, at_m - at_n, 3e-6);
        check(b ? "m of 1" : "m of 0", got + at + at_m, state + at + at_m, NH, 7e-7);
    }
    void *device[] = {x_gpu, h_gpu, gates_gpu, bias_gpu, state_gpu};
    for (void *p : device) CUDA_CHECK(cudaFree(p));
    float *host[] = {x, gates, bias, state, h, h_by_time, got_h, got};
    for (float *p : host) free(p);
}

template <typename F>
static void test_mlstm_step_format(void) {
    for (int sigmoid_gate = 0; sigmoid_gate < 2; sigmoid_gate++) {
        test_mlstm_step_case<F>(4, 16, 16, sigmoid_gate, 0);
        test_mlstm_step_case<F>(3, 16, 16, sigmoid_gate, 0);  // rows of states that are not aligned
        test_mlstm_step_case<F>(4, 24, 40, sigmoid_gate, 15);
        test_mlstm_step_case<F>(4, 64, 128, sigmoid_gate, 0);
        test_mlstm_step_case<F>(3, 7, 13, sigmoid_gate, 15);
        test_mlstm_step_case<F>(8, 256, 512, sigmoid_gate, 15);
    }
}

static void test_mlstm_step(void) {
    test_mlstm_step_format<float>();
    test_mlstm_step_format<bf16>();
}

#endif
