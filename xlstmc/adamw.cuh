// adamw.cuh: what happens to all parameters at once: AdamW, the norm of the gradients, the copy in bf16.
#ifndef XLSTMC_ADAMW_CUH
#define XLSTMC_ADAMW_CUH

#include "floats.cuh"

// The update of one tensor is cut into pieces of at most UPDATE_CHUNK elements, a block each.
enum { UPDATE_CHUNK = 16384, UPDATE_THREADS = 256 };
enum { GRAD_NORM_THREADS = 256, GRAD_NORM_BLOCKS = 1024, GRAD_NORM_PIECE_BLOCKS = 128 };  // for all, for a rank's piece

typedef struct {
    size_t offset;   // of the first element in the flat buffers of weights and gradients
    size_t moments;  // of its moments in theirs; both are multiples of 4, or neither is
    unsigned count;  // elements
    float decay;     // 1: weight decay applies, 0: it does not
} UpdateChunk;

// Gradients of all parameters. Several ranks may sum them in bf16: then those from element `begin` on lie in `rounded`,
// a multiple of 4; NULL: all are in float.
typedef struct {
    const float *values;
    const bf16 *rounded;
    size_t begin;
} Gradients;

template <int N>
__device__ inline void load_gradients(float (&g)[N], const Gradients &from, size_t i) {
    if (from.rounded && i >= from.begin) load_group<N == 4>(g, from.rounded + i);
    else load_group<N == 4>(g, from.values + i);
}

typedef struct {
    float lr, beta1, beta2, eps, weight_decay;
    float correct1, correct2;  // 1 / (1 - beta^step)
    float grad_scale;          // gradients are multiplied by this first
} AdamwArgs;

__device__ inline void adamw(float &w, float &m, float &v, float g, float decay, const AdamwArgs &a) {
    g *= a.grad_scale;
    m = a.beta1 * m + (1 - a.beta1) * g;
    v = a.beta2 * v + (1 - a.beta2) * g * g;
    w -= a.lr * (m * a.correct1 / (sqrtf(v * a.correct2) + a.eps) + decay * w);
}

// N elements from i on, whose moments begin at j
template <int N>
__device__ inline void adamw_elements(float *w, bf16 *w16, float *m, float *v, const Gradients &grads, size_t i,
                                      size_t j, float decay, const AdamwArgs &args) {
    float we[N], me[N], ve[N], ge[N];
    load_gradients(ge, grads, i);
    load_group<N == 4>(me, m + j);
    load_group<N == 4>(ve, v + j);
    load_group<N == 4>(we, w + i);
#pragma unroll
    for (int k = 0; k < N; k++) adamw(we[k], me[k], ve[k], ge[k], decay, args);
    store_group<N == 4>(m + j, me);
    store_group<N == 4>(v + j, ve);
    store_group<N == 4>(w + i, we);
    if (w16) store_group<N == 4>(w16 + i, we);
}

// Costs 28 bytes a parameter, 30 with the copy in bf16; 2 less with gradients in bf16.
static __global__ void __launch_bounds__(UPDATE_THREADS)
    adamw_kernel(float *__restrict__ w, bf16 *__restrict__ w16, float *__restrict__ m, float *__restrict__ v,
                 Gradients grads, const UpdateChunk *__restrict__ chunks, AdamwArgs args) {
    UpdateChunk chunk = chunks[blockIdx.x];
    unsigned quads = chunk.offset % 4 == 0 ? chunk.count / 4 : 0;  // only small tensors have other offsets
    float decay = chunk.decay * args.weight_decay;
#pragma unroll 2
    for (unsigned k = threadIdx.x; k < quads; k += UPDATE_THREADS)
        adamw_elements<4>(w, w16, m, v, grads, chunk.offset + 4 * k, chunk.moments + 4 * k, decay, args);
    for (unsigned k = 4 * quads + threadIdx.x; k < chunk.count; k += UPDATE_THREADS)
        adamw_elements<1>(w, w16, m, v, grads, chunk.offset + k, chunk.moments + k, decay, args);
}

// w, m, v, grads: flat buffers of all parameters, aligned to 16 bytes; w16: the weights in bf16, or NULL;
// chunks [num_chunks] on the device.
MAYBE_UNUSED
static void adamw_update(float *w, bf16 *w16, float *m, float *v, Gradients grads, const UpdateChunk *chunks,
                         int num_chunks, AdamwArgs args, cudaStream_t stream) {
    if (num_chunks == 0) return;
    adamw_kernel<<<num_chunks, UPDATE_THREADS, 0, stream>>>(w, w16, m, v, grads, chunks, args);
    LAUNCH_CHECK();
}

// Costs 4 bytes an element, 2 in bf16. The number of blocks is fixed, so the order of the sum is too, on every device.
static __global__ void __launch_bounds__(GRAD_NORM_THREADS)
    grad_norm_kernel(double *partial, Gradients grads, size_t first, size_t count) {
    const size_t quads = count / 4, step = (size_t)gridDim.x * GRAD_NORM_THREADS;
    const size_t mine = (size_t)blockIdx.x * GRAD_NORM_THREADS + threadIdx.x;
    double sum = 0;
#pragma unroll 4
    for (size_t k = mine; k < quads; k += step) {
        float g[4];
        load_gradients(g, grads, first + 4 * k);
        sum += (double)g[0] * g[0] + (double)g[1] * g[1] + (double)g[2] * g[2] + (double)g[3] * g[3];
    }
    if (4 * quads + mine < count) {  // of one rank, whose elements are not cut into pieces
        const float g = grads.values[first + 4 * quads + mine];
        sum += (double)g * g;
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
static __global__ void __launch_bounds__(1024) grad_norm_add_kernel(double *result, const double *partial, int count) {
    double sum = 0;
    for (int k = threadIdx.x; k < count; k += 1024) sum += partial[k];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) *result = sum;
}
// partial [blocks] = sums of squares of `count` elements of grads from `first` on, which is a multiple of 4
MAYBE_UNUSED
static void grad_norm_part(double *partial, Gradients grads, size_t first, size_t count, int blocks,
                           cudaStream_t stream) {
    grad_norm_kernel<<<blocks, GRAD_NORM_THREADS, 0, stream>>>(partial, grads, first, count);
    LAUNCH_CHECK();
}
// result [1] = the sum of partial [count]
MAYBE_UNUSED
static void grad_norm_squared(double *result, const double *partial, int count, cudaStream_t stream) {
    grad_norm_add_kernel<<<1, 1024, 0, stream>>>(result, partial, count);
    LAUNCH_CHECK();
}

// Costs 6 bytes an element.
static __global__ void __launch_bounds__(256)
    to_bf16_kernel(bf16 *__restrict__ dst, const float *__restrict__ src, size_t n, bool quads) {
    size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * 4, end = min(i + 4, n);
    if (quads && i + 4 <= n) {
        float x[4];
        load_group<true>(x, src + i);
        store_group<true>(dst + i, x);
    } else {
        for (; i < end; i++) dst[i] = from_float<bf16>(src[i]);
    }
}
// dst [n] = src [n] rounded
MAYBE_UNUSED
static void to_bf16(bf16 *dst, const float *src, size_t n, cudaStream_t stream) {
    bool quads = quads_aligned(dst, 4) && quads_aligned(src, 4);
    to_bf16_kernel<<<ceil_div(n, 1024), 256, 0, stream>>>(dst, src, n, quads);
    LAUNCH_CHECK();
}

static __global__ void __launch_bounds__(256) widen_gradients_kernel(float *dst, const bf16 *src, size_t n) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) dst[i] = to_float(src[i]);
}
// dst [n] = src [n]
MAYBE_UNUSED
static void widen_gradients(float *dst, const bf16 *src, size_t n, cudaStream_t stream) {
    widen_gradients_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(dst, src, n);
    LAUNCH_CHECK();
}

#endif
