// mlstm_pairs.cuh: the mLSTM over segments of a sequence that lie on different ranks (doc/parallel.md).
//
// What a segment does to the states that enter it is a pair: its own states S = (C, n, m) from an empty beginning, and
// G, the sum of its log forget gates. Neighbours L, R join to
//     m = max(G_R + m_L, m_R),  C = exp(G_R + m_L - m) C_L + exp(m_R - m) C_R,  n likewise,  G = G_L + G_R
// and states before a segment join with it the same way. Backward, a pair is the gradient d of the states that enter,
// as far as the segment's own outputs cause it, and keep, how much of these states reaches its end:
//     d = d_L + keep_L d_R,  keep = keep_L keep_R
// Either is stored as [B] rows of C [NH, dk, dv], n [NH, dk], m [NH], G or keep [NH], in float.
#ifndef XLSTMC_MLSTM_PAIRS_CUH
#define XLSTMC_MLSTM_PAIRS_CUH

#include "mlstm_segments.cuh"

static size_t mlstm_pair_row(const MlstmShape *s) { return (size_t)s->NH * ((size_t)s->dk * s->dv + s->dk + 2); }

static __host__ __device__ inline MlstmState mlstm_pair_state(const MlstmShape &s, float *pair) {
    size_t C = (size_t)s.NH * s.dk * s.dv, n = (size_t)s.NH * s.dk;
    return MlstmState{pair, pair + C, pair + C + n, C + n + 2 * (size_t)s.NH};
}

// Element i of a head: in its C, then in its n
__device__ inline float *mlstm_state_element(const MlstmShape &s, const MlstmState &state, int b, int head, size_t i) {
    size_t matrix = (size_t)s.dk * s.dv;
    return i < matrix ? state.C + b * state.row + head * matrix + i
                      : state.n + b * state.row + (size_t)head * s.dk + i - matrix;
}

static dim3 mlstm_element_grid(const MlstmShape *s) {
    return dim3((unsigned)ceil_div((size_t)s->dk * (s->dv + 1), 256), (unsigned)(s->B * s->NH));
}

// ----------------------------------------------------------------------------------------------------------------
// A pair from what the parts of a segment have added to a zero state (mlstm_segments.cuh), in one place. m and G
// of a forward pair are the gates' (mlstm_gate_values); keep of a backward one is the product of all decays.

template <bool REVERSE>
__device__ __forceinline__ void pair_elements(const MlstmShape &s, const MlstmState &pair, const float *segments,
                                              const float *decay, int num_segments, int segment_chunks) {
    extern __shared__ float kept[];  // [num_segments] how much of the state survives each of the parts
    const int bh = blockIdx.y, b = bh / s.NH, head = bh % s.NH, NC = (s.T + s.chunk - 1) / s.chunk;
    enter_kept(kept, decay + (size_t)bh * NC, NC, num_segments, segment_chunks);
    __syncthreads();
    const size_t matrix = (size_t)s.dk * s.dv, record = s.NH * (matrix + s.dk);
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (REVERSE && i == 0) {
        float keep = 1;
        for (int k = 0; k < num_segments; k++) keep *= kept[k];
        pair.m[b * pair.row + s.NH + head] = keep;
    }
    if (i >= matrix + s.dk) return;
    const size_t at = i >= matrix ? s.NH * matrix + (size_t)head * s.dk + i - matrix : head * matrix + i;
    float state = 0;
#pragma unroll 8
    for (int k = 0; k < num_segments; k++) {
        int segment = REVERSE ? num_segments - 1 - k : k;
        state = kept[segment] * state + segments[((size_t)segment * s.B + b) * record + at];
    }
    *mlstm_state_element(s, pair, b, head, i) = state;
}

static __global__ void mlstm_fwd_pair_kernel(MlstmShape s, MlstmState pair, const float *segments, const float *decay,
                                             int num_segments, int segment_chunks) {
    pair_elements<false>(s, pair, segments, decay, num_segments, segment_chunks);
}
static __global__ void mlstm_bwd_pair_kernel(MlstmShape s, MlstmState pair, const float *segments, const float *decay,
                                             int num_segments, int segment_chunks) {
    pair_elements<true>(s, pair, segments, decay, num_segments, segment_chunks);
}

template <bool REVERSE>
static void mlstm_pair(const MlstmShape *s, MlstmState pair, const float *segments, const float *decay,
                       int segment_chunks, cudaStream_t stream) {
    int count = ceil_div(mlstm_chunks(s), segment_chunks);
    auto kernel = REVERSE ? mlstm_bwd_pair_kernel : mlstm_fwd_pair_kernel;
    kernel<<<mlstm_element_grid(s), 256, count * sizeof(float), stream>>>(*s, pair, segments, decay, count,
                                                                          segment_chunks);
    LAUNCH_CHECK();
}

// ----------------------------------------------------------------------------------------------------------------
// Folds

// Of pairs (first and enter are such, too) also the sum of their G
static __global__ void mlstm_fwd_fold_kernel(MlstmShape s, MlstmState enter, MlstmState first, float *pairs, int count,
                                             bool of_pairs) {
    extern __shared__ float factors[];  // [count][2] of what is there already, and of the pair
    const int bh = blockIdx.y, b = bh / s.NH, head = bh % s.NH;
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, record = s.NH * ((size_t)s.dk * s.dv + s.dk + 2);
    if (threadIdx.x == 0) {
        double m = first.C ? first.m[b * first.row + head] : 0;
        float sum = of_pairs ? first.m[b * first.row + s.NH + head] : 0;
        for (int p = 0; p < count; p++) {
            const float *of_pair = mlstm_pair_state(s, pairs + p * s.B * record).m + b * record + head;
            double G = of_pair[s.NH], right = of_pair[0], next = (float)fmax(G + m, right);
            factors[2 * p] = (float)exp(G + m - next);
            factors[2 * p + 1] = (float)exp(right - next);
            m = next;
            sum += of_pair[s.NH];
        }
        if (blockIdx.x == 0) enter.m[b * enter.row + head] = (float)m;
        if (blockIdx.x == 0 && of_pairs) enter.m[b * enter.row + s.NH + head] = sum;
    }
    __syncthreads();
    if (i >= (size_t)s.dk * s.dv + s.dk) return;
    float state = first.C ? *mlstm_state_element(s, first, b, head, i) : 0;
    for (int p = 0; p < count; p++)
        state = factors[2 * p] * state +
                factors[2 * p + 1] * *mlstm_state_element(s, mlstm_pair_state(s, pairs + p * s.B * record), b, head, i);
    *mlstm_state_element(s, enter, b, head, i) = state;
}

// enter := `first` (C == NULL: fresh states) joined with the `count` pairs [count][B][mlstm_pair_row], in order
MAYBE_UNUSED
static void mlstm_fold(const MlstmShape *s, MlstmState enter, MlstmState first, float *pairs, int count,
                       cudaStream_t stream) {
    mlstm_fwd_fold_kernel<<<mlstm_element_grid(s), 256, 2 * (size_t)count * sizeof(float), stream>>>(
        *s, enter, first, pairs, count, false);
    LAUNCH_CHECK();
}

// last: the pair behind all others, then dfinal is a pair, too; last.C == NULL: dfinal is a gradient of states
static __global__ void mlstm_bwd_fold_kernel(MlstmShape s, MlstmState dfinal, float *pairs, int count,
                                             MlstmState last) {
    const int bh = blockIdx.y, b = bh / s.NH, head = bh % s.NH;
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, record = s.NH * ((size_t)s.dk * s.dv + s.dk + 2);
    if (i >= (size_t)s.dk * s.dv + s.dk) return;
    float d = last.C ? *mlstm_state_element(s, last, b, head, i) : 0;
    float keep = last.C ? last.m[b * last.row + s.NH + head] : 0;
    for (int p = count - 1; p >= 0; p--) {
        MlstmState pair = mlstm_pair_state(s, pairs + p * s.B * record);
        d = *mlstm_state_element(s, pair, b, head, i) + pair.m[b * pair.row + s.NH + head] * d;
        keep *= pair.m[b * pair.row + s.NH + head];
    }
    *mlstm_state_element(s, dfinal, b, head, i) = d;
    if (i == 0 && last.C) dfinal.m[b * dfinal.row + s.NH + head] = keep;
}

// dfinal := the gradient of the states that leave a segment, from the pairs of the `count` segments behind it
MAYBE_UNUSED
static void mlstm_fold_backward(const MlstmShape *s, MlstmState dfinal, float *pairs, int count, cudaStream_t stream) {
    const MlstmState none = {NULL, NULL, NULL, 0};
    mlstm_bwd_fold_kernel<<<mlstm_element_grid(s), 256, 0, stream>>>(*s, dfinal, pairs, count, none);
    LAUNCH_CHECK();
}

// joined := two neighbouring pairs [B][mlstm_pair_row] as one: `far`, then `near`, of forward pairs; of backward pairs
// (REVERSE) `near`, then `far`. joined must be neither.
template <bool REVERSE>
static void mlstm_join(const MlstmShape *s, float *joined, float *far, float *near, cudaStream_t stream) {
    const dim3 grid = mlstm_element_grid(s);
    MlstmState to = mlstm_pair_state(*s, joined), from = mlstm_pair_state(*s, far);
    if (REVERSE) mlstm_bwd_fold_kernel<<<grid, 256, 0, stream>>>(*s, to, near, 1, from);
    else mlstm_fwd_fold_kernel<<<grid, 256, 2 * sizeof(float), stream>>>(*s, to, from, near, 1, true);
    LAUNCH_CHECK();
}

// ----------------------------------------------------------------------------------------------------------------
// tail [B, NH] = <C, dC> + <n, dn> of the states that leave: what the later tokens' sums of <q, dq> - <k, dk> amount
// to. Added up in double: an error of it is one of all the segment's forget gates, and adds up in their bias.

static __global__ void __launch_bounds__(1024)
    mlstm_bwd_tail_kernel(MlstmShape s, float *tail, MlstmState final, MlstmState dfinal) {
    const int b = blockIdx.x / s.NH, head = blockIdx.x % s.NH;
    const size_t matrix = (size_t)s.dk * s.dv;
    const float *C = mlstm_state_element(s, final, b, head, 0), *dC = mlstm_state_element(s, dfinal, b, head, 0);
    const float *n = mlstm_state_element(s, final, b, head, matrix),
                *dn = mlstm_state_element(s, dfinal, b, head, matrix);
    const size_t quads = matrix % 4 == 0 && ((size_t)C | (size_t)dC) % 16 == 0 ? matrix / 4 : 0;
    double sum = 0;
#pragma unroll 8
    for (size_t i = threadIdx.x; i < quads; i += blockDim.x) {
        const float4 x = ((const float4 *)C)[i], y = ((const float4 *)dC)[i];
        sum += (double)x.x * y.x + (double)x.y * y.y + (double)x.z * y.z + (double)x.w * y.w;
    }
    for (size_t i = 4 * quads + threadIdx.x; i < matrix; i += blockDim.x) sum += (double)C[i] * dC[i];
    for (size_t i = threadIdx.x; i < (size_t)s.dk; i += blockDim.x) sum += (double)n[i] * dn[i];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) tail[blockIdx.x] = (float)sum;
}
MAYBE_UNUSED
static void mlstm_tail(const MlstmShape *s, float *tail, MlstmState final, MlstmState dfinal, cudaStream_t stream) {
    mlstm_bwd_tail_kernel<<<s->B * s->NH, 1024, 0, stream>>>(*s, tail, final, dfinal);
    LAUNCH_CHECK();
}

#endif
