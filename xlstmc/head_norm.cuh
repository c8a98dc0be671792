// head_norm.cuh: LayerNorm of each head's slice, fused with what follows it in the three blocks:
//
//   HEAD_GATE  mlstm      y = hn * sigmoid(o)                  hn = (h - mean) * rstd * scale
//   HEAD_SKIP  mlstm_v1   y = (hn + skip * ca) * silu(z)
//   HEAD_ADD   slstm      y = hn + x                           x: the residual stream
//
// hn is not stored; the backward pass computes it again. A warp takes one head of a row and reads h once from memory
// and then, for the second sum and the result, from L1, where its few KB stay; so any width goes. Bytes an element in
// bf16: forward GATE 6, SKIP 8, ADD 6; backward GATE 10, SKIP 14, ADD 6.
#ifndef XLSTMC_HEAD_NORM_CUH
#define XLSTMC_HEAD_NORM_CUH

#include "cuda_util.cuh"
#include "floats.cuh"

typedef struct {
    int center;    // 1: LayerNorm, 0: RMSNorm
    int plus_one;  // 1: scale 1 + w, 0: scale w
    int heads;
    int width;  // of a head; w is [heads * width]
    float eps;
} HeadNormShape;

typedef enum { HEAD_GATE, HEAD_SKIP, HEAD_ADD } HeadNormMode;

template <typename F>
struct HeadNormSide {  // what h meets after the norm
    const F *x;        // [rows, heads * width], row stride ld: o, z or the residual stream
    size_t ld;
    const F *ca;        // HEAD_SKIP: [rows, heads * width]
    const float *skip;  // HEAD_SKIP: [heads * width]
};

template <typename F, int V, HeadNormMode MODE>
static __global__ void __launch_bounds__(256)
    head_norm_forward_kernel(F *y, float *stats, const F *h, const float *w, HeadNormSide<F> side, HeadNormShape n,
                             int rows) {
    const int lane = threadIdx.x % 32, width = n.width;
    const size_t item = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (item >= (size_t)rows * n.heads) return;  // whole warps
    const size_t row = item / n.heads, first = item % n.heads * width;
    const F *in = h + item * width, *beside = side.x + row * side.ld + first;
    float mean = 0, square = 0, one = n.plus_one, x[V], scale[V], s[V], ca[V], skip[V];
    if (n.center) {
        for (int c = lane * V; c < width; c += 32 * V) {
            load_floats<V>(x, in + c);
#pragma unroll
            for (int j = 0; j < V; j++) mean += x[j];
        }
        mean = warp_sum(mean) / width;
    }
    for (int c = lane * V; c < width; c += 32 * V) {
        load_floats<V>(x, in + c);
#pragma unroll
        for (int j = 0; j < V; j++) square += (x[j] - mean) * (x[j] - mean);
    }
    float rstd = 1 / sqrtf(warp_sum(square) / width + n.eps);
    for (int c = lane * V; c < width; c += 32 * V) {
        load_floats<V>(x, in + c);
        load_floats<V>(scale, w + first + c);
        load_floats<V>(s, beside + c);
        if (MODE == HEAD_SKIP) {
            load_floats<V>(ca, side.ca + item * width + c);
            load_floats<V>(skip, side.skip + first + c);
        }
#pragma unroll
        for (int j = 0; j < V; j++) {
            float hn = (x[j] - mean) * rstd * (one + scale[j]);
            if (MODE == HEAD_GATE) x[j] = hn * sigmoidf(s[j]);
            if (MODE == HEAD_SKIP) x[j] = (hn + skip[j] * ca[j]) * siluf(s[j]);
            if (MODE == HEAD_ADD) x[j] = hn + s[j];
        }
        store_floats<V>(y + item * width + c, x);
    }
    if (lane == 0) {
        stats[2 * item] = mean;
        stats[2 * item + 1] = rstd;
    }
}

// 1 if all of a head's slices can be read in vectors.
template <typename F>
static bool head_norm_aligned(const HeadNormShape &n, const F *h, const F *y, const float *w,
                              const HeadNormSide<F> &side) {
    return vector_aligned(h, n.width) && vector_aligned(y, n.width) && vector_aligned(w, n.width) &&
           vector_aligned(side.x, side.ld) && vector_aligned(side.ca, n.width) && vector_aligned(side.skip, n.width);
}

template <HeadNormMode MODE, typename F>
static void head_norm_forward(F *y, float *stats, const F *h, const float *w, HeadNormSide<F> side, HeadNormShape n,
                              int rows, cudaStream_t stream) {
    auto kernel = head_norm_aligned(n, h, y, w, side) ? head_norm_forward_kernel<F, VEC<F>, MODE>
                                                      : head_norm_forward_kernel<F, 1, MODE>;
    kernel<<<ceil_div((size_t)rows * n.heads, 8), 256, 0, stream>>>(y, stats, h, w, side, n, rows);
    LAUNCH_CHECK();
}

// In all of them h, y, ca [rows, heads * width]; stats [rows, heads, 2]: mean, rstd; w, skip [heads * width].

// o [rows, heads * width], row stride ld_o
template <typename F>
static void head_norm_gate_forward(F *y, float *stats, const F *h, const float *w, const F *o, size_t ld_o,
                                   HeadNormShape n, int rows, cudaStream_t stream) {
    HeadNormSide<F> side = {o, ld_o, NULL, NULL};
    head_norm_forward<HEAD_GATE>(y, stats, h, w, side, n, rows, stream);
}

// z [rows, heads * width], row stride ld_z
template <typename F>
static void head_norm_skip_forward(F *y, float *stats, const F *h, const float *w, const F *ca, const float *skip,
                                   const F *z, size_t ld_z, HeadNormShape n, int rows, cudaStream_t stream) {
    HeadNormSide<F> side = {z, ld_z, ca, skip};
    head_norm_forward<HEAD_SKIP>(y, stats, h, w, side, n, rows, stream);
}

// x [rows, heads * width]
template <typename F>
static void head_norm_add_forward(F *y, float *stats, const F *h, const float *w, const F *x, HeadNormShape n, int rows,
                                  cudaStream_t stream) {
    HeadNormSide<F> side = {x, (size_t)n.heads * n.width, NULL, NULL};
    head_norm_forward<HEAD_ADD>(y, stats, h, w, side, n, rows, stream);
}

// ----------------------------------------------------------------------------------------------------------------
// Backward

enum { HEAD_NORM_PARTS = 3 * 132 };  // blocks that an H100 has room for at once; the heads share them

template <typename F>
struct HeadNormGrad {
    F *dh;  // [rows, heads * width]; may be dy
    F *dx;  // [rows, heads * width], row stride ld: gradient of o or z
    size_t ld;
    F *dca;           // HEAD_SKIP: [rows, heads * width]
    float *dh_dot_h;  // [rows, heads] or NULL
};

// d: in dy, out dhn = dy * what hn is multiplied by
template <HeadNormMode MODE, int V>
__device__ inline void head_norm_into(float (&d)[V], const float (&s)[V]) {
#pragma unroll
    for (int j = 0; j < V; j++) {
        if (MODE == HEAD_GATE) d[j] *= sigmoidf(s[j]);
        if (MODE == HEAD_SKIP) d[j] *= siluf(s[j]);
    }
}

// The gradients of what h meets, and of skip, from d = dy and hn. `at` is the place in [rows, heads * width], `column`
// in a row; sum_skip [V].
template <HeadNormMode MODE, int V, typename F>
__device__ inline void head_norm_side_backward(const HeadNormGrad<F> &grad, float *sum_skip, const float (&d)[V],
                                               const float (&hn)[V], const float (&s)[V], const HeadNormSide<F> &side,
                                               size_t row, size_t at, size_t column) {
    float ds[V];
    if constexpr (MODE == HEAD_GATE) {
#pragma unroll
        for (int j = 0; j < V; j++) {
            float gate = sigmoidf(s[j]);
            ds[j] = d[j] * hn[j] * gate * (1.0f - gate);
        }
    } else {
        float ca[V], skip[V], sum[V];
        load_floats<V>(ca, side.ca + at);
        load_floats<V>(skip, side.skip + column);
        load_floats<V>(sum, sum_skip);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float dht = d[j] * siluf(s[j]);
            ds[j] = d[j] * (hn[j] + skip[j] * ca[j]) * silu_gradf(s[j]);
            sum[j] += dht * ca[j];
            ca[j] = dht * skip[j];
        }
        store_floats<V>(sum_skip, sum);
        store_floats<V>(grad.dca + at, ca);
    }
    store_floats<V>(grad.dx + row * grad.ld + column, ds);
}

// Block (head, part) takes rows of one head, a warp a row. Each warp sums dhn * xh (for dw) and, with a skip, dht * ca
// in its own SMEM, where a lane only touches its own columns: [warps, kinds, width]. The block's sums go to partial
// [kinds, parts, heads * width].
template <typename F, int V, HeadNormMode MODE>
static __global__ void __launch_bounds__(256, 3)
    head_norm_backward_kernel(HeadNormGrad<F> grad, float *partial, const F *dy, const F *h, const float *stats,
                              const float *w, HeadNormSide<F> side, HeadNormShape n, int rows) {
    extern __shared__ __align__(16) float head_norm_sums[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, width = n.width;
    const int kinds = MODE == HEAD_SKIP ? 2 : 1, parts = gridDim.y;
    const size_t first = (size_t)blockIdx.x * width;
    const float one = n.plus_one;
    float *sum = head_norm_sums + warp * kinds * width, *sum_skip = sum + width;
    float x[V], d[V], scale[V], s[V], hn[V], acc[V];
    for (int c = lane; c < kinds * width; c += 32) sum[c] = 0;
    __syncwarp();
    for (size_t row = (size_t)blockIdx.y * warps + warp; row < (size_t)rows; row += (size_t)parts * warps) {
        const size_t item = row * n.heads + blockIdx.x, at = item * width;
        const float mean = stats[2 * item], rstd = stats[2 * item + 1];
        float g_sum = 0, gx_sum = 0;  // of g = dhn * scale, of g xh
        // other warps hide the time of the loads, and unrolled loops would take registers from them
#pragma unroll 1
        for (int c = lane * V; c < width; c += 32 * V) {
            load_floats<V>(x, h + at + c);
            load_floats<V>(d, dy + at + c);
            load_floats<V>(scale, w + first + c);
            if constexpr (MODE != HEAD_ADD) {
                load_floats<V>(s, side.x + row * side.ld + first + c);
#pragma unroll
                for (int j = 0; j < V; j++) hn[j] = (x[j] - mean) * rstd * (one + scale[j]);
                head_norm_side_backward<MODE, V>(grad, sum_skip + c, d, hn, s, side, row, at + c, first + c);
                head_norm_into<MODE, V>(d, s);
            }
            load_floats<V>(acc, sum + c);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float xh = (x[j] - mean) * rstd, g = d[j] * (one + scale[j]);
                g_sum += g;
                gx_sum += g * xh;
                acc[j] += d[j] * xh;
            }
            store_floats<V>(sum + c, acc);
        }
        g_sum = warp_sum(g_sum);
        gx_sum = warp_sum(gx_sum);
        const float g_mean = n.center ? g_sum / width : 0, gx_mean = gx_sum / width;
#pragma unroll 1
        for (int c = lane * V; c < width; c += 32 * V) {
            load_floats<V>(x, h + at + c);
            load_floats<V>(d, dy + at + c);
            load_floats<V>(scale, w + first + c);
            if constexpr (MODE != HEAD_ADD) {
                load_floats<V>(s, side.x + row * side.ld + first + c);
                head_norm_into<MODE, V>(d, s);
            }
#pragma unroll
            for (int j = 0; j < V; j++)
                d[j] = rstd * (d[j] * (one + scale[j]) - g_mean - (x[j] - mean) * rstd * gx_mean);
            store_floats<V>(grad.dh + at + c, d);
        }
        // The norm hides the length of h from what follows, but for eps: of the sum of dh * h only this is left. Summed
        // term by term it would drown in rounding errors.
        if (grad.dh_dot_h && lane == 0) grad.dh_dot_h[item] = gx_sum * n.eps * rstd * rstd;
    }
    __syncthreads();
    for (int kind = 0; kind < kinds; kind++)
        for (int c = threadIdx.x; c < width; c += blockDim.x) {
            float total = 0;
            for (int k = 0; k < warps; k++) total += head_norm_sums[(k * kinds + kind) * width + c];
            partial[((size_t)kind * parts + blockIdx.y) * n.heads * width + first + c] = total;
        }
}

// dskip: HEAD_SKIP only. Widths up to 6144 fit the SMEM that needs no asking for.
template <HeadNormMode MODE, typename F>
static void head_norm_backward_mode(HeadNormGrad<F> grad, float *dw, float *dskip, const F *dy, const F *h,
                                    const float *stats, const float *w, HeadNormSide<F> side, HeadNormShape n, int rows,
                                    float *partial, cudaStream_t stream) {
    const size_t all = (size_t)n.heads * n.width, bytes = n.width * sizeof(float) * (MODE == HEAD_SKIP ? 2 : 1);
    const int aligned = head_norm_aligned(n, h, dy, w, side) && vector_aligned(grad.dh, n.width) &&
                        vector_aligned(grad.dx, grad.ld) && vector_aligned(grad.dca, n.width);
    int warps = 8, parts = n.heads < HEAD_NORM_PARTS ? HEAD_NORM_PARTS / n.heads : 1;
    while (warps > 1 && warps * bytes > 48 * 1024) warps /= 2;
    if (parts > ceil_div(rows, warps)) parts = ceil_div(rows, warps);
    auto kernel = aligned ? head_norm_backward_kernel<F, VEC<F>, MODE> : head_norm_backward_kernel<F, 1, MODE>;
    kernel<<<dim3(n.heads, parts), 32 * warps, warps * bytes, stream>>>(grad, partial, dy, h, stats, w, side, n, rows);
    LAUNCH_CHECK();
    add_partials(dw, partial, parts, all, stream);
    if (MODE == HEAD_SKIP) add_partials(dskip, partial + parts * all, parts, all, stream);
}

// In all of them dh [rows, heads * width] is written (it may be dy), dw [heads * width] is added to, and dh_dot_h
// [rows, heads], if not NULL, is the sum of dh * h over each head, which the mLSTM's backward pass starts from. partial
// is scratch: max(HEAD_NORM_PARTS, heads) * width floats, with a skip twice that.

// d_o: row stride ld_do
template <typename F>
static void head_norm_gate_backward(F *dh, F *d_o, size_t ld_do, float *dw, float *dh_dot_h, const F *dy, const F *h,
                                    const float *stats, const float *w, const F *o, size_t ld_o, HeadNormShape n,
                                    int rows, float *partial, cudaStream_t stream) {
    HeadNormGrad<F> grad = {dh, d_o, ld_do, NULL, dh_dot_h};
    HeadNormSide<F> side = {o, ld_o, NULL, NULL};
    head_norm_backward_mode<HEAD_GATE>(grad, dw, NULL, dy, h, stats, w, side, n, rows, partial, stream);
}

// dz: row stride ld_dz; dca [rows, heads * width] is written, dskip [heads * width] added to
template <typename F>
static void head_norm_skip_backward(F *dh, F *dz, size_t ld_dz, F *dca, float *dw, float *dskip, float *dh_dot_h,
                                    const F *dy, const F *h, const float *stats, const float *w, const F *ca,
                                    const float *skip, const F *z, size_t ld_z, HeadNormShape n, int rows,
                                    float *partial, cudaStream_t stream) {
    HeadNormGrad<F> grad = {dh, dz, ld_dz, dca, dh_dot_h};
    HeadNormSide<F> side = {z, ld_z, ca, skip};
    head_norm_backward_mode<HEAD_SKIP>(grad, dw, dskip, dy, h, stats, w, side, n, rows, partial, stream);
}

// After HEAD_ADD dout is the gradient of the residual stream too, which is left as it is, so here dh must not be dout.
template <typename F>
static void head_norm_backward(F *dh, float *dw, const F *dout, const F *h, const float *stats, const float *w,
                               HeadNormShape n, int rows, float *partial, cudaStream_t stream) {
    HeadNormGrad<F> grad = {dh, NULL, 0, NULL, NULL};
    HeadNormSide<F> side = {NULL, 0, NULL, NULL};
    head_norm_backward_mode<HEAD_ADD>(grad, dw, NULL, dout, h, stats, w, side, n, rows, partial, stream);
}

#endif
