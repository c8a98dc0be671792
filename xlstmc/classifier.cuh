// classifier.cuh: soft-capped cross-entropy of rows of logits, whose gradient takes the logits' place.
//   z = cap tanh(x / cap),  loss = log sum_c exp(z[c]) - z[target],
//   dx = scale (softmax(z) - onehot) (1 - (z / cap)^2)
// One block a row, which reads it twice: first for the maximum and the sum, then for the gradient. The second time it
// comes from L2 (the rows in work, 2 blocks an SM, are 27 MB on an H100 with 50304 tokens in bf16), so the cost in
// memory is 4 bytes a logit.
#ifndef XLSTMC_CLASSIFIER_CUH
#define XLSTMC_CLASSIFIER_CUH

#include "floats.cuh"

enum { CLASSIFIER_THREADS = 512 };

// float: to the last digits. bf16: 1e-7 of the cap, and 1e-6 of e^x near the maximum, are far below its rounding.
template <typename F>
__device__ inline float classifier_exp(float x) {
    return sizeof(F) == 4 ? expf(x) : __expf(x);
}
template <typename F>
__device__ inline float classifier_tanh(float x) {
    return sizeof(F) == 4 ? tanhf(x) : 1.0f - __fdividef(2.0f, __expf(2.0f * x) + 1.0f);
}

// z and dz/dx of one logit
template <typename F, bool CAPPED>
__device__ inline void cap_logit(float *z, float *slope, float x, float cap, float inv_cap) {
    float tanh_x = CAPPED ? classifier_tanh<F>(x * inv_cap) : 0.0f;
    *z = CAPPED ? cap * tanh_x : x;
    *slope = 1.0f - tanh_x * tanh_x;
}

// N logits from c on; those from V on (padding, which may hold anything) become z = -inf, which counts for nothing.
template <typename F, bool CAPPED, int N>
__device__ inline void capped_logits(float (&z)[N], float (&slope)[N], const F *row, int c, int V, float cap,
                                     float inv_cap) {
    float x[N];
    load_group<(N > 1)>(x, row + c);
#pragma unroll
    for (int k = 0; k < N; k++) cap_logit<F, CAPPED>(&z[k], &slope[k], x[k], cap, inv_cap);
    if (c + N <= V) return;
#pragma unroll
    for (int k = 0; k < N; k++)
        if (c + k >= V) {
            z[k] = -INFINITY;
            slope[k] = 0;
        }
}

template <typename F, bool CAPPED, int N>
static __global__ void __launch_bounds__(CLASSIFIER_THREADS, 2)
    classifier_kernel(F *logits, size_t ld, float *losses, const int *targets, float *logits_out, int V, float cap,
                      const float *scale, int with_grad) {
    F *row = logits + blockIdx.x * ld;
    int target = targets ? targets[blockIdx.x] : -1, begin = threadIdx.x * N, step = blockDim.x * N;
    float inv_cap = CAPPED ? 1.0f / cap : 0.0f, z[N], slope[N], top = -INFINITY, sum = 0;
    float z_target = 0, slope_target = 0;
    if (target >= 0) cap_logit<F, CAPPED>(&z_target, &slope_target, to_float(row[target]), cap, inv_cap);
    for (int c = begin; c < V && (target >= 0 || logits_out); c += step) {
        capped_logits<F, CAPPED>(z, slope, row, c, V, cap, inv_cap);
        for (int k = 0; logits_out && k < N && c + k < V; k++) logits_out[blockIdx.x * (size_t)V + c + k] = z[k];
        float before = top;
#pragma unroll
        for (int k = 0; k < N; k++) top = fmaxf(top, z[k]);
        sum *= classifier_exp<F>(before - top);
#pragma unroll
        for (int k = 0; k < N; k++) sum += classifier_exp<F>(z[k] - top);
    }
    if (target < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
#pragma unroll
        for (int k = 0; k < N; k++) z[k] = 0;
        for (size_t c = begin; with_grad && c < ld; c += step) store_group<(N > 1)>(row + c, z);
        return;
    }
    float row_top = block_max(top);  // from here on every thread has read row[target]
    sum = block_sum(sum * classifier_exp<F>(top - row_top));
    if (threadIdx.x == 0) losses[blockIdx.x] = row_top + logf(sum) - z_target;
    if (!with_grad) return;
    float inv_sum = *scale / sum;
    for (size_t c = begin; c < ld; c += step) {
        capped_logits<F, CAPPED>(z, slope, row, (int)c, V, cap, inv_cap);
#pragma unroll
        for (int k = 0; k < N; k++) z[k] = classifier_exp<F>(z[k] - row_top) * inv_sum * slope[k];
        store_group<(N > 1)>(row + c, z);
    }
    __syncthreads();  // row[target] has been written as if it were any other
    if (threadIdx.x == 0)
        row[target] = from_float<F>(*scale * (classifier_exp<F>(z_target - row_top) / sum - 1.0f) * slope_target);
}

// logits [n, V] with row stride ld: in before the cap, out the gradient (0 in columns V .. ld) if with_grad; losses
// [n]; targets [n], -1: ignored, NULL: all are; logits_out [n, V] after the cap, NULL: not wanted; cap 0: none; scale
// is read on the device.
template <typename F>
static void classifier_loss(F *logits, size_t ld, float *losses, const int *targets, float *logits_out, int n, int V,
                            float cap, const float *scale, int with_grad, cudaStream_t stream) {
    bool vectors = vector_aligned(logits, ld);
    int threads = ceil_div(V, 32 * (vectors ? VEC<F> : 1)) * 32;
    if (threads > CLASSIFIER_THREADS) threads = CLASSIFIER_THREADS;
    auto kernel = vectors ? (cap > 0 ? classifier_kernel<F, true, VEC<F>> : classifier_kernel<F, false, VEC<F>>)
                          : (cap > 0 ? classifier_kernel<F, true, 1> : classifier_kernel<F, false, 1>);
    kernel<<<n, threads, 0, stream>>>(logits, ld, losses, targets, logits_out, V, cap, scale, with_grad);
    LAUNCH_CHECK();
}

static __global__ void __launch_bounds__(1024) loss_sum_kernel(double *sum, const float *losses, int n) {
    double mine = 0;
    for (int i = threadIdx.x; i < n; i += 1024) mine += losses[i];
    mine = block_sum_double(mine);
    if (threadIdx.x == 0) *sum = mine;
}
// sum [1] = the sum of losses [n]
MAYBE_UNUSED
static void loss_sum(double *sum, const float *losses, int n, cudaStream_t stream) {
    loss_sum_kernel<<<1, 1024, 0, stream>>>(sum, losses, n);
    LAUNCH_CHECK();
}

#endif
