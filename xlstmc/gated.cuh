// gated.cuh: activation of the gated FFN, out = act(gate) * up with act = SiLU or GELU. Elementwise: a thread has a
// vector of 16 bytes of each tensor. Bytes an element of out in bf16: forward 6 (gate, up, out), backward 10 (dout,
// gate, up and their gradients) and 2 for out once more if it is wanted.
#ifndef XLSTMC_GATED_CUH
#define XLSTMC_GATED_CUH

#include "cuda_util.cuh"
#include "floats.cuh"

enum { GATED_THREADS = 128 };

// act(x) and its derivative
__device__ inline float2 gated_act(float x, int use_gelu) {
    if (use_gelu) {
        float cdf = 0.5f * (1.0f + erff(x * 0.70710678f));
        return make_float2(x * cdf, cdf + x * 0.39894228f * __expf(-0.5f * x * x));
    }
    float s = sigmoidf(x);
    return make_float2(x * s, s * (1.0f + x * (1.0f - s)));
}

template <typename F, int V>
static __global__ void __launch_bounds__(GATED_THREADS)
    gated_forward_kernel(F *out, const F *gate_up, int U, int use_gelu) {
    const size_t row = blockIdx.x, c = ((size_t)blockIdx.y * GATED_THREADS + threadIdx.x) * V;
    if (c >= (size_t)U) return;
    const F *in = gate_up + row * 2 * U + c;
    float gate[V], up[V];
    load_floats<V>(gate, in);
    load_floats<V>(up, in + U);
#pragma unroll
    for (int j = 0; j < V; j++) up[j] *= gated_act(gate[j], use_gelu).x;
    store_floats<V>(out + row * U + c, up);
}

// gate_up [rows, 2U]: gate in columns 0..U-1, up behind it; out [rows, U]
template <typename F>
static void gated_forward(F *out, const F *gate_up, int rows, int U, int use_gelu, cudaStream_t stream) {
    const int aligned = vector_aligned(gate_up, U) && vector_aligned(out, U), V = aligned ? VEC<F> : 1;
    dim3 grid(rows, ceil_div(U, GATED_THREADS * V));
    auto kernel = aligned ? gated_forward_kernel<F, VEC<F>> : gated_forward_kernel<F, 1>;
    kernel<<<grid, GATED_THREADS, 0, stream>>>(out, gate_up, U, use_gelu);
    LAUNCH_CHECK();
}

template <typename F, int V>
static __global__ void __launch_bounds__(GATED_THREADS)
    gated_backward_kernel(F *dgate_up, const F *dout, const F *gate_up, int U, int use_gelu) {
    const size_t row = blockIdx.x, c = ((size_t)blockIdx.y * GATED_THREADS + threadIdx.x) * V;
    if (c >= (size_t)U) return;
    const size_t at = row * 2 * U + c;
    float gate[V], up[V], dy[V];
    load_floats<V>(gate, gate_up + at);
    load_floats<V>(up, gate_up + at + U);
    load_floats<V>(dy, dout + row * U + c);
#pragma unroll
    for (int j = 0; j < V; j++) {
        float2 a = gated_act(gate[j], use_gelu);
        gate[j] = dy[j] * up[j] * a.y;
        up[j] = dy[j] * a.x;
    }
    store_floats<V>(dgate_up + at, gate);
    store_floats<V>(dgate_up + at + U, up);
}

// dgate_up, gate_up [rows, 2U] (they may be the same); dout [rows, U]
template <typename F>
static void gated_backward(F *dgate_up, const F *dout, const F *gate_up, int rows, int U, int use_gelu,
                           cudaStream_t stream) {
    const int aligned = vector_aligned(gate_up, U) && vector_aligned(dgate_up, U) && vector_aligned(dout, U),
              V = aligned ? VEC<F> : 1;
    dim3 grid(rows, ceil_div(U, GATED_THREADS * V));
    auto kernel = aligned ? gated_backward_kernel<F, VEC<F>> : gated_backward_kernel<F, 1>;
    kernel<<<grid, GATED_THREADS, 0, stream>>>(dgate_up, dout, gate_up, U, use_gelu);
    LAUNCH_CHECK();
}

#endif
