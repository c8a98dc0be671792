// conv.cuh: causal depthwise convolution over 4 tokens, then SiLU.
//   pre[t,c] = bias[c] + sum_lag w[c, 3-lag] x[t-lag, c],  out = silu(pre);  lags beyond the document count as zero
// x is [B, T, C] with row stride ld; a stored window [3, C] holds the inputs before the first token, oldest first.
// A thread walks along the tokens with the last inputs of its channels in registers.
#ifndef XLSTMC_CONV_CUH
#define XLSTMC_CONV_CUH

#include "floats.cuh"

enum { CONV_TILE = 16 };                                           // tokens of a thread, forward
enum { CONV_SEGMENT = 32, CONV_WARPS = 8, CONV_MAX_PARTS = 128 };  // tokens of a warp, warps of a block, backward

// Token t of sequence b, N channels from c on; t = -3 .. -1 are in the window.
template <typename F, int N>
__device__ inline void conv_input(float (&in)[N], const F *x, size_t ld, const float *window, size_t state_row, int b,
                                  int t, int T, int C, int c) {
    if (t >= 0) {
        load_group<N == 4>(in, x + ((size_t)b * T + t) * ld + c);
    } else {
#pragma unroll
        for (int k = 0; k < N; k++) in[k] = window ? window[b * state_row + (size_t)(3 + t) * C + c + k] : 0.0f;
    }
}

template <int N>
__device__ inline void conv_taps(float (&taps)[4][N], const float *w, int c) {  // taps[lag] of N channels from c on
#pragma unroll
    for (int k = 0; k < N; k++) {
        float of_channel[4];
        load_group<N == 4>(of_channel, w + 4 * (size_t)(c + k));
#pragma unroll
        for (int lag = 0; lag < 4; lag++) taps[lag][k] = of_channel[3 - lag];
    }
}

// Costs 6 bytes an element in bf16: x read once (the 3 tokens before a tile come from L2), pre and out written.
template <typename F, int N>
static __global__ void __launch_bounds__(256)
    conv_forward_kernel(F *__restrict__ pre, F *__restrict__ out, const F *__restrict__ x, size_t ld,
                        const float *__restrict__ w, const float *__restrict__ bias, const int *__restrict__ doc_start,
                        const float *__restrict__ window, float *__restrict__ window_out, size_t state_row, int B,
                        int T, int C) {
    size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    int groups = C / N, tiles = (T + CONV_TILE - 1) / CONV_TILE, c = (int)(id % groups) * N;
    size_t tile = id / groups;
    if (tile >= (size_t)B * tiles) return;
    int b = (int)(tile / tiles), t0 = (int)(tile % tiles) * CONV_TILE, t1 = min(t0 + CONV_TILE, T), first = 0;
    float taps[4][N], shift[N], in[4][N];  // in[lag]: x[t-lag]
    conv_taps(taps, w, c);
    load_group<N == 4>(shift, bias + c);
#pragma unroll
    for (int lag = 0; lag < 3; lag++) conv_input(in[lag], x, ld, window, state_row, b, t0 - 1 - lag, T, C, c);
#pragma unroll 4
    for (int t = t0; t < t1; t++) {
        size_t row = (size_t)b * T + t;
        float p[N], o[N];
        first = doc_start[row];
#pragma unroll
        for (int k = 0; k < N; k++) {
            p[k] = shift[k];
            in[3][k] = in[2][k], in[2][k] = in[1][k], in[1][k] = in[0][k];
        }
        load_group<N == 4>(in[0], x + row * ld + c);
#pragma unroll
        for (int lag = 0; lag < 4; lag++)
#pragma unroll
            for (int k = 0; k < N; k++) p[k] += t - lag >= first ? taps[lag][k] * in[lag][k] : 0.0f;
#pragma unroll
        for (int k = 0; k < N; k++) o[k] = siluf(p[k]);
        store_group<N == 4>(pre + row * C + c, p);
        store_group<N == 4>(out + row * C + c, o);
    }
    if (!window_out || t1 < T) return;
#pragma unroll
    for (int lag = 0; lag < 3; lag++)  // the document's last inputs
#pragma unroll
        for (int k = 0; k < N; k++)
            window_out[b * state_row + (size_t)(2 - lag) * C + c + k] = T - 1 - lag >= first ? in[lag][k] : 0.0f;
}

// window, window_out: [B][3, C], state_row floats from one sequence to the next; window NULL: zeros; window_out NULL:
// not wanted. They must not overlap. pre and out are [B, T, C] contiguous.
template <typename F>
static void conv_forward(F *pre, F *out, const F *x, size_t ld, const float *w, const float *bias, const int *doc_start,
                         const float *window, float *window_out, size_t state_row, int B, int T, int C,
                         cudaStream_t stream) {
    bool quads = quads_aligned(x, ld) && quads_aligned(pre, C) && quads_aligned(out, C) && quads_aligned(w, 4) &&
                 quads_aligned(bias, C);
    int blocks = ceil_div((size_t)B * ceil_div(T, CONV_TILE) * (quads ? C / 4 : C), 256);
    auto kernel = quads ? conv_forward_kernel<F, 4> : conv_forward_kernel<F, 1>;
    kernel<<<blocks, 256, 0, stream>>>(pre, out, x, ld, w, bias, doc_start, window, window_out, state_row, B, T, C);
    LAUNCH_CHECK();
}

// Tokens t0 .. t1-1 of sequence b. With g[t] = dout[t] silu'(pre[t]):
//   dx[t] += sum_lag g[t+lag] w[3-lag],   sum[lag] += g[t] x[t-lag],   sum[4] += g[t]
// The g of the three tokens after the segment are computed here again, so no g is written to memory.
template <typename F, int N>
__device__ inline void conv_backward_segment(float (&sum)[5][N], const float (&taps)[4][N], F *__restrict__ dx,
                                             size_t ld_dx, const F *__restrict__ dout, const F *__restrict__ pre,
                                             const F *__restrict__ x, size_t ld, const int *__restrict__ doc_start,
                                             const float *__restrict__ window, size_t state_row, int b, int t0, int t1,
                                             int T, int C, int c) {
    float in[4][N], pending[4][N] = {};  // x[t-lag] and what is summed so far of dx[t-lag]
#pragma unroll
    for (int lag = 0; lag < 3; lag++) conv_input(in[lag], x, ld, window, state_row, b, t0 - 1 - lag, T, C, c);
#pragma unroll 4
    for (int t = t0; t < t1 + 3; t++) {
        size_t row = (size_t)b * T + t;
#pragma unroll
        for (int k = 0; k < N; k++) {
            in[3][k] = in[2][k], in[2][k] = in[1][k], in[1][k] = in[0][k];
            pending[3][k] = pending[2][k], pending[2][k] = pending[1][k], pending[1][k] = pending[0][k];
            pending[0][k] = 0;
        }
        if (t < T) {
            float g[N], p[N];
            int first = doc_start[row];
            load_group<N == 4>(g, dout + row * C + c);
            load_group<N == 4>(p, pre + row * C + c);
            if (t < t1) load_group<N == 4>(in[0], x + row * ld + c);
#pragma unroll
            for (int k = 0; k < N; k++) {
                g[k] *= silu_gradf(p[k]);
                if (t < t1) sum[4][k] += g[k];
            }
#pragma unroll
            for (int lag = 0; lag < 4; lag++)
#pragma unroll
                for (int k = 0; k < N; k++)
                    if (t - lag >= first) {
                        pending[lag][k] += g[k] * taps[lag][k];
                        if (t < t1) sum[lag][k] += g[k] * in[lag][k];
                    }
        }
        if (t - 3 >= t0) add_to_group<N == 4>(dx + (row - 3) * ld_dx + c, pending[3]);
    }
}

// Costs 10 bytes an element in bf16: dout, pre, x read once (but for tokens next to a segment), dx read and written.
// Block (32, CONV_WARPS): a lane owns N channels, a warp takes segments; the sums over its warps become one part.
template <typename F, int N>
static __global__ void __launch_bounds__(32 * CONV_WARPS, 2)
    conv_backward_kernel(F *__restrict__ dx, size_t ld_dx, float *__restrict__ partial_w,
                         float *__restrict__ partial_bias, const F *__restrict__ dout, const F *__restrict__ pre,
                         const F *__restrict__ x, size_t ld, const float *__restrict__ w,
                         const int *__restrict__ doc_start, const float *__restrict__ window, size_t state_row, int B,
                         int T, int C) {
    __shared__ float sums[CONV_WARPS][5 * N * 32];
    int lane = threadIdx.x, warp = threadIdx.y, c = (blockIdx.x * 32 + lane) * N;
    int segments = (T + CONV_SEGMENT - 1) / CONV_SEGMENT, part = blockIdx.y;
    float sum[5][N] = {};
    if (c < C) {
        float taps[4][N];
        conv_taps(taps, w, c);
        for (int s = part * CONV_WARPS + warp; s < B * segments; s += gridDim.y * CONV_WARPS) {
            int t0 = s % segments * CONV_SEGMENT, t1 = min(t0 + CONV_SEGMENT, T);
            conv_backward_segment(sum, taps, dx, ld_dx, dout, pre, x, ld, doc_start, window, state_row, s / segments,
                                  t0, t1, T, C, c);
        }
    }
#pragma unroll
    for (int i = 0; i < 5 * N; i++) sums[warp][i * 32 + lane] = sum[i / N][i % N];
    __syncthreads();
    for (int i = warp * 32 + lane; i < 5 * N * 32; i += 32 * CONV_WARPS) {
        int lag = i / 32 / N, channel = (blockIdx.x * 32 + i % 32) * N + i / 32 % N;
        float total = 0;
        for (int k = 0; k < CONV_WARPS; k++) total += sums[k][i];
        if (channel >= C) continue;
        size_t at = (size_t)part * C + channel;
        if (lag < 4) partial_w[4 * at + 3 - lag] = total;
        else partial_bias[at] = total;
    }
}

MAYBE_UNUSED
static size_t conv_partial_floats(int C) { return (size_t)CONV_MAX_PARTS * 5 * C; }

// dx [B, T, C] with row stride ld_dx is added to, and so are dw [C, 4] and dbias [C]; dout [B, T, C] is the gradient of
// out; partial has conv_partial_floats(C) elements.
template <typename F>
static void conv_backward(F *dx, size_t ld_dx, float *dw, float *dbias, const F *dout, const F *pre, const F *x,
                          size_t ld, const float *w, const int *doc_start, const float *window, size_t state_row, int B,
                          int T, int C, float *partial, cudaStream_t stream) {
    bool quads = quads_aligned(x, ld) && quads_aligned(dx, ld_dx) && quads_aligned(dout, C) && quads_aligned(pre, C) &&
                 quads_aligned(w, 4);
    int parts = ceil_div((size_t)B * ceil_div(T, CONV_SEGMENT), CONV_WARPS);
    if (parts > CONV_MAX_PARTS) parts = CONV_MAX_PARTS;
    float *partial_w = partial, *partial_bias = partial + (size_t)parts * 4 * C;
    dim3 blocks(ceil_div(C, quads ? 128 : 32), parts), threads(32, CONV_WARPS);
    auto kernel = quads ? conv_backward_kernel<F, 4> : conv_backward_kernel<F, 1>;
    kernel<<<blocks, threads, 0, stream>>>(dx, ld_dx, partial_w, partial_bias, dout, pre, x, ld, w, doc_start, window,
                                           state_row, B, T, C);
    LAUNCH_CHECK();
    add_partials(dw, partial_w, parts, (size_t)4 * C, stream);
    add_partials(dbias, partial_bias, parts, C, stream);
}

// ----------------------------------------------------------------------------------------------------------------
// Between neighbouring segments of a sequence (doc/parallel.md): a thread a channel of a sequence

// The last inputs, as far as they are of the last token's document, as conv_forward leaves them in window_out
template <typename F>
static __global__ void conv_window_kernel(float *window_out, const F *x, size_t ld, const int *doc_start,
                                          size_t state_row, int B, int T, int C) {
    const size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int b = (int)(id / C), c = (int)(id % C);
    if (b >= B) return;
    const int first = doc_start[(size_t)b * T + T - 1];
    for (int lag = 0; lag < 3; lag++) {
        const int t = T - 1 - lag;
        window_out[b * state_row + (size_t)(2 - lag) * C + c] =
            t >= 0 && t >= first ? to_float(x[((size_t)b * T + t) * ld + c]) : 0.0f;
    }
}
template <typename F>
static void conv_window(float *window_out, const F *x, size_t ld, const int *doc_start, size_t state_row, int B, int T,
                        int C, cudaStream_t stream) {
    conv_window_kernel<<<ceil_div((size_t)B * C, 256), 256, 0, stream>>>(window_out, x, ld, doc_start, state_row, B, T,
                                                                         C);
    LAUNCH_CHECK();
}

// dwindow [B][3, C]: gradient of the window that entered; dout, pre, w, doc_start as for conv_backward
template <typename F>
static __global__ void conv_backward_window_kernel(float *dwindow, const F *dout, const F *pre, const float *w,
                                                   const int *doc_start, size_t state_row, int B, int T, int C) {
    const size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int b = (int)(id / C), c = (int)(id % C);
    if (b >= B) return;
    for (int k = 0; k < 3; k++) {  // the token at position k - 3
        float sum = 0;
        for (int t = 0; t <= k && t < T; t++) {
            const size_t row = (size_t)b * T + t;
            const int lag = t + 3 - k;
            if (k - 3 >= doc_start[row])
                sum += to_float(dout[row * C + c]) * silu_gradf(to_float(pre[row * C + c])) * w[4 * c + 3 - lag];
        }
        dwindow[b * state_row + (size_t)k * C + c] = sum;
    }
}
template <typename F>
static void conv_backward_window(float *dwindow, const F *dout, const F *pre, const float *w, const int *doc_start,
                                 size_t state_row, int B, int T, int C, cudaStream_t stream) {
    conv_backward_window_kernel<<<ceil_div((size_t)B * C, 256), 256, 0, stream>>>(dwindow, dout, pre, w, doc_start,
                                                                                  state_row, B, T, C);
    LAUNCH_CHECK();
}

// dx of the last tokens += the gradient of the window that they left
template <typename F>
static __global__ void conv_backward_tail_kernel(F *dx, size_t ld_dx, const float *dwindow, const int *doc_start,
                                                 size_t state_row, int B, int T, int C) {
    const size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int b = (int)(id / C), c = (int)(id % C);
    if (b >= B) return;
    const int first = doc_start[(size_t)b * T + T - 1];
    for (int lag = 0; lag < 3; lag++) {
        const int t = T - 1 - lag;
        if (t < 0 || t < first) continue;
        F *to = dx + ((size_t)b * T + t) * ld_dx + c;
        *to = from_float<F>(to_float(*to) + dwindow[b * state_row + (size_t)(2 - lag) * C + c]);
    }
}
template <typename F>
static void conv_backward_tail(F *dx, size_t ld_dx, const float *dwindow, const int *doc_start, size_t state_row, int B,
                               int T, int C, cudaStream_t stream) {
    conv_backward_tail_kernel<<<ceil_div((size_t)B * C, 256), 256, 0, stream>>>(dx, ld_dx, dwindow, doc_start,
                                                                                state_row, B, T, C);
    LAUNCH_CHECK();
}

#endif
