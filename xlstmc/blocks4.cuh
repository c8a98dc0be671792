// blocks4.cuh: q, k and v of mlstm_v1 by block-diagonal maps: each group of 4 channels has a 4x4 matrix of its own.
//   q[4n+o] = sum_i wq[4n+o, i] ca[4n+i],  k likewise from ca, v from the branch before the convolution
// A lane owns one group and keeps its three matrices in registers while it walks down the rows.
#ifndef XLSTMC_BLOCKS4_CUH
#define XLSTMC_BLOCKS4_CUH

#include "floats.cuh"

enum { BLOCKS4_ROWS = 32 };                           // rows of a thread, forward
enum { BLOCKS4_WARPS = 4, BLOCKS4_MAX_PARTS = 128 };  // warps of a block, backward

__device__ inline void map4(float (&y)[4], const float (&w)[16], const float (&x)[4]) {
#pragma unroll
    for (int o = 0; o < 4; o++)
        y[o] = w[4 * o] * x[0] + w[4 * o + 1] * x[1] + w[4 * o + 2] * x[2] + w[4 * o + 3] * x[3];
}
__device__ inline void add_transposed4(float (&dx)[4], const float (&w)[16], const float (&dy)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) dx[i] += w[i] * dy[0] + w[4 + i] * dy[1] + w[8 + i] * dy[2] + w[12 + i] * dy[3];
}
__device__ inline void add_outer4(float (&dw)[16], const float (&dy)[4], const float (&x)[4]) {
#pragma unroll
    for (int k = 0; k < 16; k++) dw[k] += dy[k / 4] * x[k % 4];
}
template <bool VECTOR>
__device__ inline void load_matrix4(float (&w)[16], const float *p) {
#pragma unroll
    for (int o = 0; o < 4; o++) {
        float row[4];
        load_group<VECTOR>(row, p + 4 * o);
#pragma unroll
        for (int i = 0; i < 4; i++) w[4 * o + i] = row[i];
    }
}

// Costs 10 bytes a channel and row in bf16: ca and branch read, q, k, v written.
template <typename F, bool VECTOR>
static __global__ void __launch_bounds__(256, 2)
    blocks4_qkv_forward_kernel(F *__restrict__ qkv, const F *__restrict__ ca, const F *__restrict__ branch,
                               size_t ld_branch, const float *__restrict__ wq, const float *__restrict__ wk,
                               const float *__restrict__ wv, int rows, int I) {
    size_t id = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    int groups = I / 4, n = (int)(id % groups) * 4;
    size_t r0 = id / groups * BLOCKS4_ROWS;
    if (r0 >= (size_t)rows) return;
    float q_map[16], k_map[16], v_map[16];
    load_matrix4<VECTOR>(q_map, wq + 4 * (size_t)n);
    load_matrix4<VECTOR>(k_map, wk + 4 * (size_t)n);
    load_matrix4<VECTOR>(v_map, wv + 4 * (size_t)n);
    size_t r1 = min(r0 + BLOCKS4_ROWS, (size_t)rows);
#pragma unroll 4
    for (size_t r = r0; r < r1; r++) {
        F *out = qkv + r * 3 * I + n;
        float a[4], u[4], q[4], k[4], v[4];
        load_group<VECTOR>(a, ca + r * I + n);
        load_group<VECTOR>(u, branch + r * ld_branch + n);
        map4(q, q_map, a);
        map4(k, k_map, a);
        map4(v, v_map, u);
        store_group<VECTOR>(out, q);
        store_group<VECTOR>(out + I, k);
        store_group<VECTOR>(out + 2 * (size_t)I, v);
    }
}

// qkv [rows, 3I], ca [rows, I], branch [rows, I] with row stride ld_branch, wq, wk, wv [I, 4]; I is a multiple of 4.
template <typename F>
static void blocks4_qkv_forward(F *qkv, const F *ca, const F *branch, size_t ld_branch, const float *wq,
                                const float *wk, const float *wv, int rows, int I, cudaStream_t stream) {
    bool quads = quads_aligned(qkv, I) && quads_aligned(ca, I) && quads_aligned(branch, ld_branch) &&
                 quads_aligned(wq, 4) && quads_aligned(wk, 4) && quads_aligned(wv, 4);
    int blocks = ceil_div((size_t)ceil_div(rows, BLOCKS4_ROWS) * (I / 4), 256);
    auto kernel = quads ? blocks4_qkv_forward_kernel<F, true> : blocks4_qkv_forward_kernel<F, false>;
    kernel<<<blocks, 256, 0, stream>>>(qkv, ca, branch, ld_branch, wq, wk, wv, rows, I);
    LAUNCH_CHECK();
}

// Adds a matrix of each warp over the warps of the block: part[4 channel + i] for the channels of the block.
__device__ inline void blocks4_write_part(float *part, const float (&sum)[16], int I) {
    __shared__ float sums[BLOCKS4_WARPS][16][33];  // 33: so that columns lie in different banks
    int lane = threadIdx.x, warp = threadIdx.y;
    __syncthreads();  // the sums of the last call have been read
#pragma unroll
    for (int k = 0; k < 16; k++) sums[warp][k][lane] = sum[k];
    __syncthreads();
    for (int i = warp * 32 + lane; i < 16 * 32; i += 32 * BLOCKS4_WARPS) {
        int group = blockIdx.x * 32 + i / 16;
        float total = 0;
        for (int k = 0; k < BLOCKS4_WARPS; k++) total += sums[k][i % 16][i / 16];
        if (group < I / 4) part[16 * (size_t)group + i % 16] = total;
    }
}

// Costs 16 bytes a channel and row in bf16: dqkv, ca, branch read, dca read and written, dbranch written.
// Block (32, BLOCKS4_WARPS): a lane owns one group, a warp takes rows; partial is [3][parts, 4I].
template <typename F, bool VECTOR>
static __global__ void __launch_bounds__(32 * BLOCKS4_WARPS, 3)
    blocks4_qkv_backward_kernel(F *__restrict__ dca, F *__restrict__ dbranch, size_t ld_dbranch,
                                float *__restrict__ partial, const F *__restrict__ dqkv, const F *__restrict__ ca,
                                const F *__restrict__ branch, size_t ld_branch, const float *__restrict__ wq,
                                const float *__restrict__ wk, const float *__restrict__ wv, int rows, int I) {
    int n = (blockIdx.x * 32 + threadIdx.x) * 4, parts = gridDim.y;
    float q_sum[16] = {}, k_sum[16] = {}, v_sum[16] = {};
    if (n < I) {
        float q_map[16], k_map[16], v_map[16];
        load_matrix4<VECTOR>(q_map, wq + 4 * (size_t)n);
        load_matrix4<VECTOR>(k_map, wk + 4 * (size_t)n);
        load_matrix4<VECTOR>(v_map, wv + 4 * (size_t)n);
#pragma unroll 2
        for (int row = blockIdx.y * BLOCKS4_WARPS + threadIdx.y; row < rows; row += parts * BLOCKS4_WARPS) {
            size_t r = (size_t)row;
            const F *dout = dqkv + r * 3 * I + n;
            float dq[4], dk[4], dv[4], a[4], u[4], da[4], du[4] = {};
            load_group<VECTOR>(dq, dout);
            load_group<VECTOR>(dk, dout + I);
            load_group<VECTOR>(dv, dout + 2 * (size_t)I);
            load_group<VECTOR>(a, ca + r * I + n);
            load_group<VECTOR>(u, branch + r * ld_branch + n);
            load_group<VECTOR>(da, dca + r * I + n);
            add_transposed4(da, q_map, dq);
            add_transposed4(da, k_map, dk);
            add_transposed4(du, v_map, dv);
            store_group<VECTOR>(dca + r * I + n, da);
            store_group<VECTOR>(dbranch + r * ld_dbranch + n, du);
            add_outer4(q_sum, dq, a);
            add_outer4(k_sum, dk, a);
            add_outer4(v_sum, dv, u);
        }
    }
    size_t width = 4 * (size_t)I;
    blocks4_write_part(partial + blockIdx.y * width, q_sum, I);
    blocks4_write_part(partial + (parts + blockIdx.y) * width, k_sum, I);
    blocks4_write_part(partial + (2 * parts + blockIdx.y) * width, v_sum, I);
}

MAYBE_UNUSED
static size_t blocks4_partial_floats(int I) { return (size_t)BLOCKS4_MAX_PARTS * 12 * I; }

// dca [rows, I] is added to, dbranch [rows, I] with row stride ld_dbranch is written, dwq, dwk, dwv [I, 4] are added
// to; partial has blocks4_partial_floats(I) elements.
template <typename F>
static void blocks4_qkv_backward(F *dca, F *dbranch, size_t ld_dbranch, float *dwq, float *dwk, float *dwv,
                                 const F *dqkv, const F *ca, const F *branch, size_t ld_branch, const float *wq,
                                 const float *wk, const float *wv, int rows, int I, float *partial,
                                 cudaStream_t stream) {
    bool quads = quads_aligned(dca, I) && quads_aligned(dbranch, ld_dbranch) && quads_aligned(dqkv, I) &&
                 quads_aligned(ca, I) && quads_aligned(branch, ld_branch) && quads_aligned(wq, 4) &&
                 quads_aligned(wk, 4) && quads_aligned(wv, 4);
    int parts = ceil_div(rows, 32 * BLOCKS4_WARPS);  // 32 rows a warp, so that writing the sums costs little
    if (parts > BLOCKS4_MAX_PARTS) parts = BLOCKS4_MAX_PARTS;
    dim3 blocks(ceil_div(I, 128), parts), threads(32, BLOCKS4_WARPS);
    auto kernel = quads ? blocks4_qkv_backward_kernel<F, true> : blocks4_qkv_backward_kernel<F, false>;
    kernel<<<blocks, threads, 0, stream>>>(dca, dbranch, ld_dbranch, partial, dqkv, ca, branch, ld_branch, wq, wk, wv,
                                           rows, I);
    LAUNCH_CHECK();
    size_t width = 4 * (size_t)I;
    add_partials(dwq, partial, parts, width, stream);
    add_partials(dwk, partial + parts * width, parts, width, stream);
    add_partials(dwv, partial + 2 * parts * width, parts, width, stream);
}

#endif
