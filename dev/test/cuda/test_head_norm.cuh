// test_head_norm.cuh: head_norm.cuh against the CPU.
#ifndef DEV_TEST_CUDA_TEST_HEAD_NORM_CUH
#define DEV_TEST_CUDA_TEST_HEAD_NORM_CUH

#include "../../../xlstmc/head_norm.cuh"
#include "harness.cuh"

extern "C" {
void oracle_norm_forward(float *out, float *stats, const float *x, const float *w, int center, int plus_one, int groups,
                         int width, float eps, int rows);
void oracle_norm_backward(float *dx, int accumulate, float *dw, const float *dout, const float *x, const float *stats,
                          const float *w, int center, int plus_one, int groups, int width, float eps, int rows);
void oracle_gate_forward(float *y, const float *hn, const float *o, size_t ld, int rows, int width);
void oracle_gate_backward(float *dhn, float *d_o, size_t ld_do, const float *hn, const float *o, size_t ld, int rows,
                          int width);
void oracle_skip_forward(float *y, const float *hn, const float *ca, const float *skip, const float *z, size_t ld,
                         int rows, int width);
void oracle_skip_backward(float *dhn, float *dz, size_t ld_dz, float *dca, float *dskip, const float *hn,
                          const float *ca, const float *skip, const float *z, size_t ld, int rows, int width);
void oracle_dh_dot_h(float *dots, const float *dhn, const float *h, const float *w, int center, int plus_one,
                     int groups, int width, float eps, int rows);
}

// One tensor of a test: the host's copy holds the input and then what is expected, the device's what is computed.
typedef struct {
    const char *name;
    float *host;
    void *device;
    size_t size;
    double tolerance;  // of the result; 0: an input
} HeadNormTensor;

typedef struct {
    HeadNormTensor tensors[20];
    int count;
    uint64_t seed;
} HeadNormTest;

// G: format on the device. The caller fills in what must be there before the kernels run (filled) or nothing.
template <typename G>
static G *head_norm_tensor(HeadNormTest *t, const char *name, float **host, size_t size, int filled, double tol) {
    *host = filled ? fill_random(size, ++t->seed, 1.5f) : (float *)xcalloc(size, sizeof(float));
    round_to<G>(*host, size);
    G *device = filled ? to_device<G>(*host, size) : device_poisoned<G>(size);
    HeadNormTensor tensor = {name, *host, device, size, tol};
    t->tensors[t->count++] = tensor;
    return device;
}

template <typename F>
static void test_head_norm_case(HeadNormMode mode, int rows, int heads, int width, int center, int plus_one, int pad) {
    const char *modes[] = {"gate", "skip", "add"};
    HeadNormShape n = {center, plus_one, heads, width, 1e-4f};
    HeadNormTest t = {};
    const int W = heads * width;
    const size_t all = (size_t)rows * W, ld = mode == HEAD_ADD ? W : 2 * (size_t)W + pad, items = (size_t)rows * heads;
    const double tol = tolerance<F>(2.3e-7, 4e-3);
    const double dots_tol = mode == HEAD_ADD ? 0 : tolerance<F>(1e-6, 7e-7);
    float *h, *side, *ca, *dy, *w, *skip, *y, *stats, *dh, *dside, *dca, *dw, *dskip, *dots;
    F *h_gpu = head_norm_tensor<F>(&t, "h", &h, all, 1, 0);
    F *side_gpu = head_norm_tensor<F>(&t, "side", &side, rows * ld, 1, 0);
    F *ca_gpu = head_norm_tensor<F>(&t, "ca", &ca, all, 1, 0);
    F *dy_gpu = head_norm_tensor<F>(&t, "dy", &dy, all, 1, 0);
    float *w_gpu = head_norm_tensor<float>(&t, "w", &w, W, 1, 0);
    float *skip_gpu = head_norm_tensor<float>(&t, "skip", &skip, W, 1, 0);
    F *y_gpu = head_norm_tensor<F>(&t, "y", &y, all, 0, tol);
    float *stats_gpu = head_norm_tensor<float>(&t, "stats", &stats, 2 * items, 0, tolerance<F>(1.9e-7, 1.5e-7));
    F *dh_gpu = head_norm_tensor<F>(&t, "dh", &dh, all, 0, tolerance<F>(4e-7, 4e-3));
    float *dw_gpu = head_norm_tensor<float>(&t, "dw", &dw, W, 1, 7e-7);
    // filled, as what lies between the rows must stay
    F *dside_gpu = head_norm_tensor<F>(&t, "gradient of o or z", &dside, rows * ld, 1, mode == HEAD_ADD ? 0 : tol);
    float *dots_gpu = head_norm_tensor<float>(&t, "dh . h", &dots, items, 0, dots_tol);
    F *dca_gpu = head_norm_tensor<F>(&t, "dca", &dca, all, 0, mode == HEAD_SKIP ? tolerance<F>(1.4e-7, 4e-3) : 0);
    float *dskip_gpu = head_norm_tensor<float>(&t, "dskip", &dskip, W, 1, mode == HEAD_SKIP ? 3.9e-7 : 0);
    float *partial = device_poisoned<float>((size_t)2 * (heads < HEAD_NORM_PARTS ? HEAD_NORM_PARTS : heads) * width),
          *hn = (float *)xcalloc(all, sizeof(float));

    oracle_norm_forward(hn, stats, h, w, center, plus_one, heads, width, n.eps, rows);
    if (mode == HEAD_GATE) {
        head_norm_gate_forward(y_gpu, stats_gpu, h_gpu, w_gpu, side_gpu, ld, n, rows, 0);
        head_norm_gate_backward(dh_gpu, dside_gpu, ld, dw_gpu, dots_gpu, dy_gpu, h_gpu, stats_gpu, w_gpu, side_gpu, ld,
                                n, rows, partial, 0);
        oracle_gate_forward(y, hn, side, ld, rows, W);
        oracle_gate_backward(dy, dside, ld, hn, side, ld, rows, W);
    } else if (mode == HEAD_SKIP) {
        head_norm_skip_forward(y_gpu, stats_gpu, h_gpu, w_gpu, ca_gpu, skip_gpu, side_gpu, ld, n, rows, 0);
        head_norm_skip_backward(dh_gpu, dside_gpu, ld, dca_gpu, dw_gpu, dskip_gpu, dots_gpu, dy_gpu, h_gpu, stats_gpu,
                                w_gpu, ca_gpu, skip_gpu, side_gpu, ld, n, rows, partial, 0);
        oracle_skip_forward(y, hn, ca, skip, side, ld, rows, W);
        oracle_skip_backward(dy, dside, ld, dca, dskip, hn, ca, skip, side, ld, rows, W);
    } else {
        head_norm_add_forward(y_gpu, stats_gpu, h_gpu, w_gpu, side_gpu, n, rows, 0);
        head_norm_backward(dh_gpu, dw_gpu, dy_gpu, h_gpu, stats_gpu, w_gpu, n, rows, partial, 0);
        for (size_t k = 0; k < all; k++) y[k] = hn[k] + side[k];
    }
    oracle_norm_backward(dh, 0, dw, dy, h, stats, w, center, plus_one, heads, width, n.eps, rows);
    oracle_dh_dot_h(dots, dy, h, w, center, plus_one, heads, width, n.eps, rows);

    for (int k = 0; k < t.count; k++) {
        HeadNormTensor *x = &t.tensors[k];
        if (x->tolerance > 0) {
            int fp32 = x->device == stats_gpu || x->device == dw_gpu || x->device == dots_gpu || x->device == dskip_gpu;
            float *got = fp32 ? to_host((float *)x->device, x->size) : to_host((F *)x->device, x->size);
            char what[128];
            snprintf(what, sizeof what, "head norm %s %s %dx%dx%d%s%s%s %s", modes[mode], format_name<F>(), rows, heads,
                     width, center ? " center" : "", plus_one ? " 1+w" : "", pad ? " padded" : "", x->name);
            check_close(what, got, x->host, x->size, x->tolerance);
            free(got);
        }
        free(x->host);
        CUDA_CHECK(cudaFree(x->device));
    }
    CUDA_CHECK(cudaFree(partial));
    free(hn);
}

template <typename F>
static void test_head_norm_format(void) {
    for (int m = HEAD_GATE; m <= HEAD_ADD; m++) {
        HeadNormMode mode = (HeadNormMode)m;
        test_head_norm_case<F>(mode, 3, 2, 8, 1, 0, 0);
        test_head_norm_case<F>(mode, 37, 3, 13, 1, 1, 1);
        test_head_norm_case<F>(mode, 100, 4, 192, 1, 1, 0);
        test_head_norm_case<F>(mode, 100, 4, 256, 1, 0, 3);  // the width is aligned, the row stride is not
        test_head_norm_case<F>(mode, 3000, 4, 64, 1, 0, 8);  // more rows than all warps take at once
        test_head_norm_case<F>(mode, 20, 1, 2048, 1, 1, 0);
        test_head_norm_case<F>(mode, 5, 400, 16, 1, 1, 0);  // more heads than parts
        test_head_norm_case<F>(mode, 20, 2, 1027, 0, 1, 0);
    }
}

static void test_head_norm(void) {
    test_head_norm_format<float>();
    test_head_norm_format<bf16>();
}

#endif
