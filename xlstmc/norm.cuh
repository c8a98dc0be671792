// norm.cuh: RMSNorm and LayerNorm over the rows of the residual stream.
//
// A warp takes a row, or a block of 8 warps a wide one; either way a thread has N vectors of 16 bytes of it in
// registers, so that every row is read once. Bytes an element in bf16: forward 4 (x, out), backward 6 (dout, x, dx), or
// 8 if it adds to dx. Rows that are not aligned to vectors or are wider than all registers take plain kernels, which
// read a row again for each sum.
#ifndef XLSTMC_NORM_CUH
#define XLSTMC_NORM_CUH

#include "cuda_util.cuh"
#include "floats.cuh"

typedef struct {
    int center;    // 1: LayerNorm, 0: RMSNorm (no mean)
    int plus_one;  // 1: scale 1 + w, 0: scale w
    int width;
    float eps;
} NormShape;

enum { NORM_THREADS = 256, NORM_WARPS = NORM_THREADS / 32, NORM_PARTS = 3 * 132 };

// Blocks of the backward kernel on a multiprocessor: the more vectors a thread has, the more registers it takes.
constexpr int norm_blocks(int N) { return N == 2 ? 3 : N == 4 ? 2 : 1; }

// Sum over the threads of a row: a warp, or a block if WIDE.
template <bool WIDE>
__device__ inline float row_sum(float x) {
    return WIDE ? block_sum(x) : warp_sum(x);
}
template <bool WIDE>
__device__ inline float2 row_sum(float2 x) {
    x = make_float2(warp_sum(x.x), warp_sum(x.y));
    if constexpr (WIDE) {
        __shared__ float2 sums[NORM_WARPS];
        __syncthreads();  // the sums of the last call have been read
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
        __syncthreads();
        x = sums[0];
#pragma unroll
        for (int k = 1; k < NORM_WARPS; k++) x = make_float2(x.x + sums[k].x, x.y + sums[k].y);
    }
    return x;
}

// Makes the compiler take the bits of v as new. Else it keeps what it computed from them, in twice the registers.
template <typename F>
__device__ inline void forget_derived(Vec<F> &v) {
    uint4 *bits = (uint4 *)&v;
    asm volatile("" : "+r"(bits->x), "+r"(bits->y), "+r"(bits->z), "+r"(bits->w));
}

// out = (x - mean) * rstd * scale
template <typename F, int N, bool WIDE>
static __global__ void __launch_bounds__(NORM_THREADS)
    norm_forward_kernel(F *out, float *stats, const F *x, const float *w, NormShape n, int rows) {
    const int V = VEC<F>, threads = WIDE ? NORM_THREADS : 32;
    const int lane = threadIdx.x % threads;
    const size_t row = (size_t)blockIdx.x * (NORM_THREADS / threads) + threadIdx.x / threads;
    if (row >= (size_t)rows) return;  // whole warps only, and none if WIDE
    const F *in = x + row * n.width;
    Vec<F> v[N];
#pragma unroll
    for (int k = 0; k < N; k++) {
        int c = (k * threads + lane) * V;
        if (c < n.width) v[k] = load_vec(in + c);
    }
    float mean = 0, square = 0, one = n.plus_one;
    if (n.center) {
#pragma unroll
        for (int k = 0; k < N; k++)
            if ((k * threads + lane) * V < n.width)
#pragma unroll
                for (int j = 0; j < V; j++) mean += v[k][j];
        mean = row_sum<WIDE>(mean) / n.width;
    }
#pragma unroll
    for (int k = 0; k < N; k++)
        if ((k * threads + lane) * V < n.width)
#pragma unroll
            for (int j = 0; j < V; j++) square += (v[k][j] - mean) * (v[k][j] - mean);
    float rstd = 1 / sqrtf(row_sum<WIDE>(square) / n.width + n.eps);
#pragma unroll
    for (int k = 0; k < N; k++) {
        int c = (k * threads + lane) * V;
        if (c < n.width) {
            float scale[V];
            load_floats<V>(scale, w + c);
#pragma unroll
            for (int j = 0; j < V; j++) v[k].set(j, (v[k][j] - mean) * rstd * (one + scale[j]));
            store_vec(out + row * n.width + c, v[k]);
        }
    }
    if (lane == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
}

// The same for any width and alignment, a block a row.
template <typename F>
static __global__ void __launch_bounds__(NORM_THREADS)
    norm_forward_plain_kernel(F *out, float *stats, const F *x, const float *w, NormShape n) {
    const size_t row = blockIdx.x;
    const F *in = x + row * n.width;
    float mean = 0, square = 0, one = n.plus_one;
    if (n.center) {
        for (int c = threadIdx.x; c < n.width; c += NORM_THREADS) mean += to_float(in[c]);
        mean = block_sum(mean) / n.width;
    }
    for (int c = threadIdx.x; c < n.width; c += NORM_THREADS) {
        float d = to_float(in[c]) - mean;
        square += d * d;
    }
    float rstd = 1 / sqrtf(block_sum(square) / n.width + n.eps);
    for (int c = threadIdx.x; c < n.width; c += NORM_THREADS)
        out[row * n.width + c] = from_float<F>((to_float(in[c]) - mean) * rstd * (one + w[c]));
    if (threadIdx.x == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
}

// out, x [rows, width]; stats [rows, 2]: mean, rstd; w [width]
template <typename F>
static void norm_forward(F *out, float *stats, const F *x, const float *w, NormShape n, int rows, cudaStream_t stream) {
    auto launch = [&](auto kernel, int rows_a_block) {
        kernel<<<ceil_div(rows, rows_a_block), NORM_THREADS, 0, stream>>>(out, stats, x, w, n, rows);
    };
    int aligned = vector_aligned(x, n.width) && vector_aligned(out, n.width) && vector_aligned(w, 0);
    int vectors = n.width / VEC<F>;
    if (aligned && vectors <= 4 * 32) launch(norm_forward_kernel<F, 4, false>, NORM_WARPS);
    else if (aligned && vectors <= 8 * 32) launch(norm_forward_kernel<F, 8, false>, NORM_WARPS);
    else if (aligned && vectors <= 2 * NORM_THREADS) launch(norm_forward_kernel<F, 2, true>, 1);
    else if (aligned && vectors <= 8 * NORM_THREADS) launch(norm_forward_kernel<F, 8, true>, 1);
    else norm_forward_plain_kernel<F><<<rows, NORM_THREADS, 0, stream>>>(out, stats, x, w, n);
    LAUNCH_CHECK();
}

// dx (+)= rstd (g - [mean(g)] - xh mean(g xh)) with xh = (x - mean) rstd, g = dout * scale, the bracket only for
// LayerNorm. A block takes every gridDim.x-th row or group of rows and keeps the sums of dout * xh over them, a column
// each, in registers; the warps of a block that is not WIDE then add theirs in turn.
template <typename F, int N, bool WIDE>
static __global__ void __launch_bounds__(NORM_THREADS, norm_blocks(N))
    norm_backward_kernel(F *dx, int accumulate, float *partial, const F *dout, const F *x, const float *stats,
                         const float *w, NormShape n, int rows) {
    const int V = VEC<F>, threads = WIDE ? NORM_THREADS : 32, rows_a_block = NORM_THREADS / threads;
    const int lane = threadIdx.x % threads, width = n.width;
    const float one = n.plus_one;
    float sums[N][V] = {};
    for (size_t row = (size_t)blockIdx.x * rows_a_block + threadIdx.x / threads; row < (size_t)rows;
         row += (size_t)gridDim.x * rows_a_block) {
        Vec<F> in[N], dy[N], old[N];  // all loads first: the time they take passes once
#pragma unroll
        for (int k = 0; k < N; k++) {
            int c = (k * threads + lane) * V;
            if (c < width) {
                in[k] = load_vec(x + row * width + c);
                dy[k] = load_vec(dout + row * width + c);
                if (accumulate) old[k] = load_vec(dx + row * width + c);
            }
        }
        float mean = stats[2 * row], rstd = stats[2 * row + 1];
        float2 g_mean = make_float2(0, 0);  // of g, of g xh
#pragma unroll
        for (int k = 0; k < N; k++) {
            int c = (k * threads + lane) * V;
            if (c < width) {
                float scale[V];
                load_floats<V>(scale, w + c);
#pragma unroll
                for (int j = 0; j < V; j++) {
                    float xh = (in[k][j] - mean) * rstd, g = dy[k][j] * (one + scale[j]);
                    g_mean.x += g;
                    g_mean.y += g * xh;
                    sums[k][j] += dy[k][j] * xh;
                }
            }
        }
        g_mean = row_sum<WIDE>(g_mean);
        g_mean.x = n.center ? g_mean.x / width : 0;
        g_mean.y /= width;
#pragma unroll
        for (int k = 0; k < N; k++) {
            int c = (k * threads + lane) * V;
            forget_derived(in[k]);
            forget_derived(dy[k]);
            if (c < width) {
                float scale[V];
                load_floats<V>(scale, w + c);
#pragma unroll
                for (int j = 0; j < V; j++) {
                    float xh = (in[k][j] - mean) * rstd, g = dy[k][j] * (one + scale[j]);
                    in[k].set(j, (accumulate ? old[k][j] : 0.0f) + rstd * (g - g_mean.x - xh * g_mean.y));
                }
                store_vec(dx + row * width + c, in[k]);
            }
        }
    }
    float *part = partial + (size_t)blockIdx.x * width;
    if constexpr (WIDE) {
#pragma unroll
        for (int k = 0; k < N; k++) {
            int c = (k * threads + lane) * V;
            if (c < width)
#pragma unroll
                for (int j = 0; j < V; j++) part[c + j] = sums[k][j];
        }
    } else {
        __shared__ float total[32 * N * V];
        for (int turn = 0; turn < NORM_WARPS; turn++) {
            if (threadIdx.x / 32 == turn)
#pragma unroll
                for (int k = 0; k < N; k++)
#pragma unroll
                    for (int j = 0; j < V; j++) {
                        float *sum = &total[(k * V + j) * 32 + lane];  // neighbours in different banks
                        *sum = (turn ? *sum : 0.0f) + sums[k][j];
                    }
            __syncthreads();
        }
        for (int c = threadIdx.x; c < width; c += NORM_THREADS)
            part[c] = total[(c / (32 * V) * V + c % V) * 32 + c / V % 32];
    }
}

// The same for any width and alignment, a block a row; the sums are kept in `partial`.
template <typename F>
static __global__ void __launch_bounds__(NORM_THREADS)
    norm_backward_plain_kernel(F *dx, int accumulate, float *partial, const F *dout, const F *x, const float *stats,
                               const float *w, NormShape n, int rows) {
    const int width = n.width;
    const float one = n.plus_one;
    float *part = partial + (size_t)blockIdx.x * width;
    for (int c = threadIdx.x; c < width; c += NORM_THREADS) part[c] = 0;
    for (size_t row = blockIdx.x; row < (size_t)rows; row += gridDim.x) {
        const F *in = x + row * width, *dy = dout + row * width;
        float mean = stats[2 * row], rstd = stats[2 * row + 1];
        float2 g_mean = make_float2(0, 0);
        for (int c = threadIdx.x; c < width; c += NORM_THREADS) {
            float xh = (to_float(in[c]) - mean) * rstd, g = to_float(dy[c]) * (one + w[c]);
            g_mean.x += g;
            g_mean.y += g * xh;
            part[c] += to_float(dy[c]) * xh;
        }
        g_mean = row_sum<true>(g_mean);
        g_mean.x = n.center ? g_mean.x / width : 0;
        g_mean.y /= width;
        for (int c = threadIdx.x; c < width; c += NORM_THREADS) {
            float xh = (to_float(in[c]) - mean) * rstd, g = to_float(dy[c]) * (one + w[c]);
            F *d = dx + row * width + c;
            *d = from_float<F>((accumulate ? to_float(*d) : 0.0f) + rstd * (g - g_mean.x - xh * g_mean.y));
        }
    }
}

// dx, dout, x [rows, width]; dx is added to if accumulate, else written; dw [width] is added to; stats from the forward
// pass; partial [NORM_PARTS, width]
template <typename F>
static void norm_backward(F *dx, int accumulate, float *dw, const F *dout, const F *x, const float *stats,
                          const float *w, NormShape n, int rows, float *partial, cudaStream_t stream) {
    auto launch = [&](auto kernel, int rows_a_block, int most_parts) {
        int parts = ceil_div(rows, rows_a_block);
        if (parts > most_parts) parts = most_parts;
        kernel<<<parts, NORM_THREADS, 0, stream>>>(dx, accumulate, partial, dout, x, stats, w, n, rows);
        LAUNCH_CHECK();
        add_partials(dw, partial, parts, n.width, stream);
    };
    int aligned = vector_aligned(x, n.width) && vector_aligned(dout, n.width) && vector_aligned(dx, n.width) &&
                  vector_aligned(w, 0);
    int vectors = n.width / VEC<F>;
    // as many blocks as an H100, with its 132 multiprocessors, has room for
    if (aligned && vectors <= 4 * 32) launch(norm_backward_kernel<F, 4, false>, NORM_WARPS, 132 * norm_blocks(4));
    else if (aligned && vectors <= 8 * 32) launch(norm_backward_kernel<F, 8, false>, NORM_WARPS, 132 * norm_blocks(8));
    else if (aligned && vectors <= 2 * NORM_THREADS) launch(norm_backward_kernel<F, 2, true>, 1, 132 * norm_blocks(2));
    else if (aligned && vectors <= 8 * NORM_THREADS) launch(norm_backward_kernel<F, 8, true>, 1, 132 * norm_blocks(8));
    else launch(norm_backward_plain_kernel<F>, 1, NORM_PARTS);
}

#endif
