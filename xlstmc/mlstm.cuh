// mlstm.cuh: the chunkwise mLSTM on the GPU, forward and backward (TFLA, arXiv 2503.14376; formulas: doc/math.md 3.4,
// 4).
//
// The sequence is cut into chunks of 128 tokens. Three steps, none of which looks at more than one chunk but the
// second:
//   1. gates (mlstm_gates.cuh): all decays and scales are functions of the scalar gates, so they are known before any
//      matrix product; no kernel below needs a running maximum
//   2. states: C and n are carried from chunk to chunk in float registers and saved in format F where a chunk begins
//   3. attend: every chunk at once. A tile of 64 rows asks the state that enters its chunk, then looks at the tiles of
//      its own chunk. Backward is the same kernel three more times, with the roles exchanged:
//
//        output   rows Y   keys Z   values   state               weights P of a pair (l, j), j <= l
//        H_l      Q        K        V        C entering          s D q.k
//        dQ_l     dH       V        K        C entering, ^T      s D (inv_den_l dh.v + ds_l)
//        dK_j     V        dH       Q        dC leaving, ^T      s D (inv_den_l dh.v + ds_l)
//        dV_j     K        Q        dH       dC leaving          s D q.k inv_den_l
//
//      and dC is the states kernel with Q, dH for K, V and time reversed.
// Gate gradients come from row sums <q, dq> and <k, dk>, taken from the float accumulators before they are rounded.
//
// Matrix products: mma.sync m16n8k16 for bf16, FFMA in the same register layout for float. A block has 8 warps.
#ifndef XLSTMC_MLSTM_CUH
#define XLSTMC_MLSTM_CUH

#include <initializer_list>

#include "mlstm_gates.cuh"
#include "mlstm_narrow.cuh"
#include "mlstm_scan.cuh"
#include "mlstm_segments.cuh"
#include "mma.cuh"

// ----------------------------------------------------------------------------------------------------------------
// Tiles in shared memory: panels of 64 columns; the 16-byte pieces of a row change places with the row, so that eight
// rows of a column never share a bank.

enum { TILE_ROWS = 64, MLSTM_THREADS = 256 };

template <typename F, int ROWS>
__device__ inline unsigned tile_at(unsigned r, unsigned c) {
    constexpr int V = VEC<F>;
    return c / 64 * (ROWS * 64) + r * 64 + ((c % 64 / V) ^ (r & 7)) * V + c % V;
}

template <int BYTES>
__device__ inline void copy_async(void *shared, const void *global, bool valid) {  // zeros if not valid
    unsigned dst = (unsigned)__cvta_generic_to_shared(shared), size = valid ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(global), "r"(size));
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(global), "n"(BYTES), "r"(size));
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

// load_tile in copies of fewer bytes; 2: of odd rows in bf16, which no copy takes
template <typename F, int ROWS, int COLS, int BYTES>
__device__ inline void load_tile_in(F *tile, const F *src, size_t ld, int rows, int cols) {
    constexpr int V = BYTES == 2 ? VEC<F> : BYTES / (int)sizeof(F);
#pragma unroll 1  // what is unrolled here takes registers from the sums
    for (int i = threadIdx.x; i < ROWS * COLS / V; i += MLSTM_THREADS) {
        const int r = i / (COLS / V), c = i % (COLS / V) * V;
        const bool valid = r < rows && c < cols;
        const F *from = valid ? src + (size_t)r * ld + c : src;
        F *to = tile + tile_at<F, ROWS>(r, c);
        if constexpr (BYTES > 2) copy_async<BYTES>(to, from, valid);
        else {
            Vec<F> v;
#pragma unroll
            for (int k = 0; k < V; k++) v.x[k] = valid && c + k < cols ? from[k] : from_float<F>(0.0f);
            store_vec(to, v);
        }
    }
}

// tile[ROWS, COLS] = src[rows, cols] with row stride ld, zeros beyond. align: bytes of which everything is a multiple.
template <typename F, int ROWS, int COLS>
__device__ inline void load_tile(F *tile, const F *src, size_t ld, int rows, int cols, int align) {
    constexpr int V = VEC<F>, PIECES = 64 / V, STEP = MLSTM_THREADS / PIECES;
    if (align < 16) {
        if (align == 8) load_tile_in<F, ROWS, COLS, 8>(tile, src, ld, rows, cols);
        else if (align == 4) load_tile_in<F, ROWS, COLS, 4>(tile, src, ld, rows, cols);
        else if constexpr (sizeof(F) == 2) load_tile_in<F, ROWS, COLS, 2>(tile, src, ld, rows, cols);
        return;
    }
    // A thread takes pieces below each other, in every panel the same: one address, to which constants are added.
    const unsigned thread = not_hoisted(threadIdx.x);
    const int r0 = thread / PIECES, c0 = thread % PIECES * V;
    F *to = tile + tile_at<F, ROWS>(r0, c0);
    const F *from = src + (size_t)r0 * ld + c0;
#pragma unroll
    for (int k = 0; k < ROWS / STEP; k++, to += STEP * 64, from += STEP * ld)
#pragma unroll
        for (int panel = 0; panel < (COLS + 63) / 64; panel++) {
            const int c = panel * 64 + c0;
            const bool valid = r0 + k * STEP < rows && c < cols;
            if (c < COLS) copy_async<16>(to + panel * ROWS * 64, valid ? from + panel * 64 : src, valid);
        }
}

// ----------------------------------------------------------------------------------------------------------------
// Products of a warp: 16 rows times NT tiles of 8 columns. A thread holds, for each of these tiles, the elements
// (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1) with g = lane / 4, t = lane % 4.

// The B operand of one k16 step for two neighbouring tiles of 8 columns: b[0], b[1] the first, b[2], b[3] the second.
// By columns (BY_ROWS = false) the tile is stored [n][k], else [k][n].
template <bool BY_ROWS, int B_ROWS>
__device__ inline void load_b(unsigned (&b)[4], const bf16 *tile, int k, int n, unsigned lane) {
    unsigned i = lane / 8, j = lane % 8;
    if (BY_ROWS) ldmatrix_trans(b, tile + tile_at<bf16, B_ROWS>(k + i % 2 * 8 + j, n + i / 2 * 8));
    else ldmatrix(b, tile + tile_at<bf16, B_ROWS>(n + i / 2 * 8 + j, k + i % 2 * 8));
}

// acc += A[m0 .. m0+15, 0 .. 63] B[0 .. 63, columns]; A is a tile of 64 rows, stored [m][k]. The columns are 16 from n0
// on, 16 from n0 + STRIDE on, ...
template <typename F, int NT, bool BY_ROWS, int B_ROWS, int STRIDE>
__device__ inline void multiply(float (&acc)[NT][4], const F *A, int m0, const F *B, int n0) {
    const unsigned lane = not_hoisted(threadIdx.x) % 32;
    if constexpr (sizeof(F) == 2) {
#pragma unroll
        for (int k = 0; k < 64; k += 16) {
            unsigned a[4], b[4];
            ldmatrix(a, A + tile_at<F, TILE_ROWS>(m0 + lane % 16, k + lane / 16 * 8));
#pragma unroll
            for (int nt = 0; nt < NT; nt += 2) {
                load_b<BY_ROWS, B_ROWS>(b, B, k, n0 + nt / 2 * STRIDE, lane);
                mma(acc[nt], a, b[0], b[1]);
                mma(acc[nt + 1], a, b[2], b[3]);
            }
        }
    } else {
        int g = lane / 4, t = lane % 4;
        for (int k = 0; k < 64; k++) {
            float a0 = A[tile_at<F, TILE_ROWS>(m0 + g, k)], a1 = A[tile_at<F, TILE_ROWS>(m0 + g + 8, k)];
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    int n = n0 + nt / 2 * STRIDE + nt % 2 * 8 + 2 * t + c;
                    float b = BY_ROWS ? B[tile_at<F, B_ROWS>(k, n)] : B[tile_at<F, B_ROWS>(n, k)];
                    acc[nt][c] += a0 * b;
                    acc[nt][2 + c] += a1 * b;
                }
        }
    }
}

// acc += (scale[k] X[k, m0 ..])^T Y[k, n0 ..] over 64 tokens k; X is scaled in float and rounded once
template <typename F, int NT>
__device__ inline void multiply_scaled_transposed(float (&acc)[NT][4], const F *X, int m0, const float *scale,
                                                  const F *Y, int n0) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if constexpr (sizeof(F) == 2) {
#pragma unroll
        for (int k = 0; k < 64; k += 16) {
            unsigned a[4], b[4];
            int i = lane / 8, j = lane % 8;
            ldmatrix_trans(a, X + tile_at<F, TILE_ROWS>(k + i / 2 * 8 + j, m0 + i % 2 * 8));
#pragma unroll
            for (int r = 0; r < 4; r++) {
                __nv_bfloat162 pair = *(__nv_bfloat162 *)&a[r];
                float2 x = __bfloat1622float2(pair), s = *(const float2 *)(scale + k + r / 2 * 8 + 2 * t);
                pair = __floats2bfloat162_rn(x.x * s.x, x.y * s.y);
                a[r] = *(unsigned *)&pair;
            }
#pragma unroll
            for (int nt = 0; nt < NT; nt += 2) {
                load_b<true, TILE_ROWS>(b, Y, k, n0 + 8 * nt, lane);
                mma(acc[nt], a, b[0], b[1]);
                mma(acc[nt + 1], a, b[2], b[3]);
            }
        }
    } else {
        for (int k = 0; k < 64; k++) {
            float a0 = scale[k] * X[tile_at<F, TILE_ROWS>(k, m0 + g)];
            float a1 = scale[k] * X[tile_at<F, TILE_ROWS>(k, m0 + g + 8)];
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float b = Y[tile_at<F, TILE_ROWS>(k, n0 + 8 * nt + 2 * t + c)];
                    acc[nt][c] += a0 * b;
                    acc[nt][2 + c] += a1 * b;
                }
        }
    }
}

// Two neighbouring elements from and to memory; `count` of them exist (<= 0: none). pair: both lie in one word.
template <typename F>
__device__ inline float2 load_two(const F *p, int count, bool pair) {
    if (count >= 2 && pair && sizeof(F) == 2) return __bfloat1622float2(*(const __nv_bfloat162 *)p);
    return make_float2(count > 0 ? to_float(p[0]) : 0.0f, count > 1 ? to_float(p[1]) : 0.0f);
}
template <typename F>
__device__ inline void store_two(F *p, float x, float y, int count, bool pair) {
    if (count >= 2 && pair && sizeof(F) == 2) {
        *(__nv_bfloat162 *)p = __floats2bfloat162_rn(x, y);
        return;
    }
    if (count > 0) p[0] = from_float<F>(x);
    if (count > 1) p[1] = from_float<F>(y);
}

// ----------------------------------------------------------------------------------------------------------------
// States. Forward: C' = decay C + sum_j kscale_j k_j v_j^T, n' = decay n + sum_j kscale_j k_j; saved: those entering.
// Reverse: dC' = decay dC + sum_l qscale_l q_l e_l^T with e = inv_den dh, dn' = decay dn + sum_l qscale_l ds_l q_l;
// saved: those leaving a chunk. A block holds 64 x N of a head's [dk, dv] in registers and walks through the sequence.
// Bytes: X and Y once for each tile of the other one (mostly from L2), 2 dk dv a chunk written.

template <typename F>
struct StatesArgs {
    MlstmShape s;
    const F *x, *y;             // forward K, V; reverse Q, dH: [B, T, NH, dk], [B, T, NH, dv]
    size_t ld_x, ld_y;          // row strides
    int align;                  // see load_tile
    const float *scale;         // [B, NH, T] kscale or qscale
    const float *inv_den, *ds;  // [B, NH, T] reverse only
    const float *decay;         // [B, NH, NC]
    MlstmState initial, final;  // of the whole sequence, forward only; C == NULL: zeros, not wanted
    F *C;                       // [B, NH, NC, dk, pitch] saved
    float *n;                   // [B, NH, NC, dk] saved
    size_t pitch;               // dv up to a multiple of 8
    int segment_chunks;         // the sequence is walked in segments of so many chunks, all at once
    float *segments;            // [P][B][NH dk dv + NH dk] states entering each segment; NULL: one segment
    bool local;                 // the first of two walks: from zero, to learn what each segment adds to the state;
    bool all_segments;          // the last one's, too, which only other ranks ask for
    const F *entering;          // reverse: C and n as the forward pass saved them
    const float *n_entering;
    float *anchor;  // reverse: [tiles][B, NH, NC] this tile's share of <C', dC'> + <n', dn'>, and of the same where the
    float *anchor_start;  // sequence begins: [tiles][B, NH]; NULL: no state enters it
};

template <typename F, int N>
constexpr int STATE_STAGES = sizeof(F) == 4 ? 2
                             : N == 64      ? 4
                                            : 3;  // what 99 KB hold

template <typename F, int N>
constexpr size_t states_shared_bytes() {
    return STATE_STAGES<F, N> * (sizeof(F) * 64 * (64 + N) + sizeof(float) * 3 * 64) + sizeof(float) * 256;
}

template <typename F, int N>
struct StatesBlock {     // what a block works on, and where a thread stands in it
    int b, head, bh;     // bh = b NH + head
    int NC;              // chunks of the sequence
    int a0, v0;          // the block's tile of C: rows from a0 on, columns from v0 on
    int m0, n0;          // the warp's part of that tile
    int row, col;        // a thread's acc[nt][2h], acc[nt][2h+1] are elements of C from (row + 8h, col + 8nt) on
    int n_col, quarter;  // element a0 + n_col of n is summed by four threads, each over a quarter of a tile's tokens
    const F *X, *Y;      // [T, a0 ..], [T, v0 ..] of the sequence and head

    __device__ __forceinline__ explicit StatesBlock(const StatesArgs<F> &p) {
        const MlstmShape &s = p.s;
        int dv_tiles = (s.dv + N - 1) / N, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        a0 = blockIdx.x / dv_tiles * 64, v0 = blockIdx.x % dv_tiles * N;
        bh = blockIdx.y, b = bh / s.NH, head = bh % s.NH, NC = (s.T + MLSTM_CHUNK - 1) / MLSTM_CHUNK;
        m0 = warp % 4 * 16, n0 = warp / 4 * (N / 2);
        row = a0 + m0 + lane / 4, col = v0 + n0 + 2 * (lane % 4);
        X = p.x + (size_t)b * s.T * p.ld_x + (size_t)head * s.dk + a0;
        Y = p.y + (size_t)b * s.T * p.ld_y + (size_t)head * s.dv + v0;
        n_col = threadIdx.x % 64, quarter = threadIdx.x / 64;
    }
};

// The states that a segment begins and ends with; C == NULL: zeros, not wanted.
template <typename F, bool REVERSE>
__device__ __forceinline__ void states_ends(const StatesArgs<F> &p, MlstmState *initial, MlstmState *final) {
    *initial = p.initial, *final = p.final;
    if (!p.segments) return;
    const MlstmShape &s = p.s;
    int segment = blockIdx.z, last_segment = REVERSE ? 0 : (int)gridDim.z - 1;
    size_t matrices = (size_t)s.NH * s.dk * s.dv, record = matrices + (size_t)s.NH * s.dk;
    float *at = p.segments + segment * s.B * record;
    MlstmState stored = {at, at + matrices, NULL, record}, none = {NULL, NULL, NULL, 0};
    *initial = p.local ? none : stored;
    *final = p.local ? stored : segment == last_segment ? *final : none;
}

// Starts the copies of 64 tokens from t0 on: X and Y, and their scales [3][64].
template <typename F, int N, bool REVERSE>
__device__ __forceinline__ void states_load(const StatesArgs<F> &p, const StatesBlock<F, N> &at, F *tile, float *scales,
                                            int t0) {
    int T = p.s.T;
    load_tile<F, 64, 64>(tile, at.X + (size_t)t0 * p.ld_x, p.ld_x, T - t0, p.s.dk - at.a0, p.align);
    load_tile<F, 64, N>(tile + 64 * 64, at.Y + (size_t)t0 * p.ld_y, p.ld_y, T - t0, p.s.dv - at.v0, p.align);
    if (threadIdx.x < (REVERSE ? 192 : 64)) {
        int which = threadIdx.x / 64, l = threadIdx.x % 64;
        const float *from = which == 0 ? p.scale : which == 1 ? p.inv_den : p.ds;
        bool valid = t0 + l < T;
        copy_async<4>(scales + which * 64 + l, from + (size_t)at.bh * T + (valid ? t0 + l : 0), valid);
    }
}

// acc, n_part: the state before the first tile. next: C entering chunk c_next, which the walk has left behind.
template <typename F, int N, bool REVERSE>
__device__ __forceinline__ void states_begin(const StatesArgs<F> &p, const StatesBlock<F, N> &at, MlstmState initial,
                                             int c_next, float (&acc)[N / 16][4], float2 (&next)[N / 16][2],
                                             float *n_part) {
    const MlstmShape &s = p.s;
    const F *entering = REVERSE ? p.entering + ((size_t)at.bh * at.NC + c_next) * s.dk * p.pitch : NULL;
#pragma unroll
    for (int nt = 0; nt < N / 16; nt++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = at.row + 8 * h, col = at.col + 8 * nt, count = row < s.dk ? s.dv - col : 0;
            acc[nt][2 * h] = acc[nt][2 * h + 1] = 0;
            if (REVERSE)
                next[nt][h] =
                    c_next < at.NC ? load_two(entering + (size_t)row * p.pitch + col, count, true) : make_float2(0, 0);
            if (initial.C && row < s.dk) {
                const float *from = initial.C + at.b * initial.row + ((size_t)at.head * s.dk + row) * s.dv;
                if (col < s.dv) acc[nt][2 * h] = from[col];
                if (col + 1 < s.dv) acc[nt][2 * h + 1] = from[col + 1];
            }
        }
    *n_part = 0;
    if (initial.C && at.quarter == 0 && at.a0 + at.n_col < s.dk)
        *n_part = initial.n[at.b * initial.row + (size_t)at.head * s.dk + at.a0 + at.n_col];
}

// At the border of chunk c: saves the state unless this is the first of two walks, and lets it decay.
template <typename F, int N, bool REVERSE>
__device__ __forceinline__ void states_save(const StatesArgs<F> &p, const StatesBlock<F, N> &at, int c, float keep,
                                            float (&acc)[N / 16][4], float2 (&next)[N / 16][2], float *n_part,
                                            float *n_sum) {
    const MlstmShape &s = p.s;
    size_t first = ((size_t)at.bh * at.NC + c) * s.dk * p.pitch;
    float share = 0;
#pragma unroll
    for (int nt = 0; nt < N / 16; nt++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = at.row + 8 * h, col = at.col + 8 * nt, count = row < s.dk ? s.dv - col : 0;
            size_t place = (size_t)row * p.pitch + col;
            float *x = &acc[nt][2 * h];
            if (REVERSE && !p.local) {
                share += x[0] * next[nt][h].x + x[1] * next[nt][h].y;
                next[nt][h] = load_two(p.entering + first + place, count, true);
            }
            if (!p.local) store_two(p.C + first + place, x[0], x[1], count, true);
            x[0] *= keep;
            x[1] *= keep;
        }
    bool keeps_n = at.v0 == 0;
    if (keeps_n) n_sum[threadIdx.x] = *n_part;
    *n_part *= keep;
    __syncthreads();
    if (!p.local && keeps_n && threadIdx.x < 64 && at.a0 + at.n_col < s.dk) {
        float n = n_sum[at.n_col] + n_sum[64 + at.n_col] + n_sum[128 + at.n_col] + n_sum[192 + at.n_col];
        size_t place = ((size_t)at.bh * at.NC + c) * s.dk + at.a0 + at.n_col;
        p.n[place] = n;
        if (REVERSE && c + 1 < at.NC) share += n * p.n_entering[place + s.dk];
    }
    if (REVERSE && !p.local) {
        share = block_sum(share);
        if (threadIdx.x == 0)
            p.anchor[(size_t)blockIdx.x * gridDim.y * at.NC + (size_t)at.bh * at.NC + c] = c + 1 < at.NC ? share : 0;
    }
}

// Reverse, after the last tile: what of the state that enters the sequence, `next` and its n, is in the anchor there
template <typename F, int N>
__device__ __forceinline__ void states_anchor_start(const StatesArgs<F> &p, const StatesBlock<F, N> &at,
                                                    const float (&acc)[N / 16][4], const float2 (&next)[N / 16][2],
                                                    float n_part) {
    float share = 0;
#pragma unroll
    for (int nt = 0; nt < N / 16; nt++)
#pragma unroll
        for (int h = 0; h < 2; h++) share += acc[nt][2 * h] * next[nt][h].x + acc[nt][2 * h + 1] * next[nt][h].y;
    if (at.v0 == 0 && at.a0 + at.n_col < p.s.dk)
        share += n_part * p.n_entering[(size_t)at.bh * at.NC * p.s.dk + at.a0 + at.n_col];
    share = block_sum(share);
    if (threadIdx.x == 0) p.anchor_start[(size_t)blockIdx.x * gridDim.y + at.bh] = share;
}

// Writes the state after the last tile.
template <typename F, int N>
__device__ __forceinline__ void states_end(const MlstmShape &s, const StatesBlock<F, N> &at, MlstmState final,
                                           const float (&acc)[N / 16][4], float n_part, float *n_sum) {
#pragma unroll
    for (int nt = 0; nt < N / 16; nt++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = at.row + 8 * h, col = at.col + 8 * nt;
            if (row >= s.dk) continue;
            float *to = final.C + at.b * final.row + ((size_t)at.head * s.dk + row) * s.dv;
            if (col < s.dv) to[col] = acc[nt][2 * h];
            if (col + 1 < s.dv) to[col + 1] = acc[nt][2 * h + 1];
        }
    __syncthreads();
    n_sum[threadIdx.x] = n_part;
    __syncthreads();
    if (at.v0 == 0 && threadIdx.x < 64 && at.a0 + at.n_col < s.dk)
        final.n[at.b * final.row + (size_t)at.head * s.dk + at.a0 + at.n_col] =
            n_sum[at.n_col] + n_sum[64 + at.n_col] + n_sum[128 + at.n_col] + n_sum[192 + at.n_col];
}

template <typename F, int N, bool REVERSE>
__device__ __forceinline__ void walk_states(const StatesArgs<F> &p) {
    constexpr int NT = N / 16, STAGES = STATE_STAGES<F, N>, STAGE = 64 * (64 + N);
    extern __shared__ __align__(128) unsigned char shared[];
    F *tiles = (F *)shared;
    float *scales = (float *)(tiles + STAGES * STAGE);  // [STAGES][3][64]
    float *n_sum = scales + STAGES * 3 * 64;            // [4][64]
    const StatesBlock<F, N> at(p);
    int first_chunk = blockIdx.z * p.segment_chunks, last_chunk = min(first_chunk + p.segment_chunks, at.NC) - 1;
    int first_tile = 2 * first_chunk, last_tile = min(2 * last_chunk + 1, (p.s.T + 63) / 64 - 1);
    int num_tiles = last_tile - first_tile + 1;
    if (p.local && !p.all_segments && blockIdx.z == (REVERSE ? 0 : gridDim.z - 1)) return;  // nobody asks for it
    MlstmState initial, final;
    states_ends<F, REVERSE>(p, &initial, &final);
    const float *decay = p.decay + (size_t)at.bh * at.NC;
    float acc[NT][4], n_part;  // n_part: a thread's share of n
    float2 next[NT][2];        // reverse: C entering the chunk that was done last

    auto tile_of = [&](int step) { return REVERSE ? last_tile - step : first_tile + step; };
    auto load = [&](int step) {
        int slot = step % STAGES;
        if (step < num_tiles)
            states_load<F, N, REVERSE>(p, at, tiles + slot * STAGE, scales + slot * 3 * 64, tile_of(step) * 64);
        copy_commit();
    };

    states_begin<F, N, REVERSE>(p, at, initial, last_chunk + 1, acc, next, &n_part);
    float next_decay = decay[REVERSE ? last_chunk : first_chunk];
    for (int step = 0; step < STAGES - 1; step++) load(step);
    for (int step = 0; step < num_tiles; step++) {
        int tile = tile_of(step), c = tile / 2;
        bool begins = REVERSE ? tile % 2 == 1 || tile == last_tile : tile % 2 == 0;
        copy_wait<STAGES - 2>();
        __syncthreads();
        load(step + STAGES - 1);
        if (begins) {
            float keep = next_decay;
            int c_next = REVERSE ? c - 1 : c + 1;
            if (c_next >= 0 && c_next < at.NC) next_decay = decay[c_next];
            states_save<F, N, REVERSE>(p, at, c, keep, acc, next, &n_part, n_sum);
        }
        const F *x_tile = tiles + step % STAGES * STAGE, *y_tile = x_tile + 64 * 64;
        float *scale = scales + step % STAGES * 3 * 64;
        if (REVERSE) {  // scale becomes qscale inv_den, and where inv_den stood qscale ds
            if (threadIdx.x < 64) {
                float q = scale[threadIdx.x];
                scale[threadIdx.x] = q * scale[64 + threadIdx.x];
                scale[64 + threadIdx.x] = q * scale[128 + threadIdx.x];
            }
            __syncthreads();
        }
        multiply_scaled_transposed<F, NT>(acc, x_tile, at.m0, scale, y_tile, at.n0);
        if (at.v0 == 0) {
            const float *scale_n = REVERSE ? scale + 64 : scale;
            for (int k = at.quarter * 16; k < at.quarter * 16 + 16; k++)
                n_part += scale_n[k] * to_float(x_tile[tile_at<F, 64>(k, at.n_col)]);
        }
    }
    if (REVERSE && !p.local && p.anchor_start && first_chunk == 0) states_anchor_start(p, at, acc, next, n_part);
    if (final.C) states_end(p.s, at, final, acc, n_part, n_sum);
}

// On a multiprocessor of an H100 shared memory has room for 3 blocks with N = 64, and 2 with N = 128.
template <typename F, int N>
static __global__ void __launch_bounds__(MLSTM_THREADS, N == 64 ? 3 : 2)
    mlstm_fwd_states_kernel(const __grid_constant__ StatesArgs<F> p) {
    walk_states<F, N, false>(p);
}
template <typename F, int N>
static __global__ void __launch_bounds__(MLSTM_THREADS, N == 64 ? 3 : 2)
    mlstm_bwd_states_kernel(const __grid_constant__ StatesArgs<F> p) {
    walk_states<F, N, true>(p);
}

enum { STATES_BLOCKS = 264 };  // two for each multiprocessor of an H100

template <typename F, int N, bool REVERSE>
static void launch_states(const StatesArgs<F> &p, cudaStream_t stream) {
    constexpr size_t bytes = states_shared_bytes<F, N>();
    dim3 grid((unsigned)(ceil_div(p.s.dk, 64) * ceil_div(p.s.dv, N)), (unsigned)(p.s.B * p.s.NH),
              (unsigned)ceil_div(mlstm_chunks(&p.s), p.segment_chunks));
    void (*kernel)(StatesArgs<F>);
    if constexpr (REVERSE) kernel = mlstm_bwd_states_kernel<F, N>;
    else kernel = mlstm_fwd_states_kernel<F, N>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    kernel<<<grid, MLSTM_THREADS, bytes, stream>>>(p);
    LAUNCH_CHECK();
}

// Columns of a block's tile: narrow ones where wide ones would leave multiprocessors idle, and in reverse, which needs
// more registers an element.
template <typename F, bool REVERSE>
static int states_columns(const MlstmShape *s) {
    int wide = ceil_div(s->dk, 64) * ceil_div(s->dv, 128) * s->B * s->NH;
    return REVERSE || sizeof(F) == 4 || s->dv <= 64 || wide < STATES_BLOCKS / 2 ? 64 : 128;
}
template <typename F, bool REVERSE>
static int states_tiles(const MlstmShape *s) {
    return ceil_div(s->dk, 64) * ceil_div(s->dv, states_columns<F, REVERSE>(s));
}

template <typename F, bool REVERSE>
static void launch_states(const StatesArgs<F> &p, cudaStream_t stream) {
    if constexpr (sizeof(F) == 2 && !REVERSE)
        if (states_columns<F, REVERSE>(&p.s) == 128) {
            launch_states<F, 128, REVERSE>(p, stream);
            return;
        }
    launch_states<F, 64, REVERSE>(p, stream);
}

// Chunks a segment. A few long sequences would occupy a few multiprocessors: then each is cut into segments that are
// walked twice, first from zero and then, with what all the ones before have added, from the true state.
template <typename F, bool REVERSE>
static int states_segment_chunks(const MlstmShape *s) {
    int blocks = states_tiles<F, REVERSE>(s) * s->B * s->NH, chunks = mlstm_chunks(s), segments = 1;
    if (blocks < STATES_BLOCKS / 2) segments = imin(ceil_div(STATES_BLOCKS, blocks), chunks / 4);
    return ceil_div(chunks, segments > 1 ? segments : 1);
}

// What each segment adds to the states. all: the last one, too, even if it is the only one
template <typename F, bool REVERSE>
static void mlstm_walk_segments(StatesArgs<F> p, float *segments, bool all, cudaStream_t stream) {
    p.segment_chunks = states_segment_chunks<F, REVERSE>(&p.s);
    p.segments = segments;
    p.local = true;
    p.all_segments = all;
    if (all || p.segment_chunks < mlstm_chunks(&p.s)) launch_states<F, REVERSE>(p, stream);
}

// walked: mlstm_walk_segments has been here; m_walk: with these scales, if not with m, those of the states
template <typename F, bool REVERSE>
static void mlstm_states(StatesArgs<F> p, float *segments, bool walked, const float *m_walk, const float *m,
                         cudaStream_t stream) {
    if (!walked) mlstm_walk_segments<F, REVERSE>(p, segments, false, stream);
    p.segment_chunks = states_segment_chunks<F, REVERSE>(&p.s);
    int num_segments = ceil_div(mlstm_chunks(&p.s), p.segment_chunks);
    if (num_segments > 1) {
        p.segments = segments;
        segments_enter<REVERSE>(p.s, p.decay, p.initial, segments, num_segments, p.segment_chunks, m_walk, m, stream);
    }
    launch_states<F, REVERSE>(p, stream);
}

// ----------------------------------------------------------------------------------------------------------------
// Attend: see the table at the top of the file. A block computes 64 rows times COLS columns of one head's output.
// Bytes: Y, Z, values and state once for each block that needs them (from L2 but the first time), the output once.

enum { ATTEND_H, ATTEND_DQ, ATTEND_DK, ATTEND_DV };

template <typename F>
struct AttendArgs {
    MlstmShape s;
    const F *y, *z, *val;  // [B, T, NH, contracted], the same, [B, T, NH, out]
    size_t ld_y, ld_z, ld_val;
    int align;       // see load_tile
    const F *state;  // [B, NH, NC, dk, pitch]
    const float *n;  // [B, NH, NC, dk]
    size_t pitch;
    int zero_chunk;  // the chunk whose state is zero, -1: none
    MlstmGates gates;
    const float *inv_den, *ds;  // [B, NH, T], backward
    const int *doc_start;       // [B, T]
    F *out;                     // [B, T, NH, out]
    size_t ld_out;
    const F *dot;  // dQ: Q, dK: K, as laid out there; the row sums of their products with the output:
    size_t ld_dot;
    float *dot_out;  // [column tiles][B, NH, T]
};

struct ChunkGates {  // of the 128 tokens of a chunk
    float2 u[MLSTM_CHUNK], r[MLSTM_CHUNK];
    float inv_den[MLSTM_CHUNK], ds[MLSTM_CHUNK];
    int doc_start[MLSTM_CHUNK];
};

// The weight of the pair of tokens l (looks back) and j in the chunk that begins at t0, times what S holds for it.
template <int MODE>
__device__ inline float attend_weight(const ChunkGates &c, float S, int l, int j, int t0, int T, float scale) {
    if (j > l || t0 + l >= T || c.doc_start[l] > t0 + j) return 0;
    float D = scale * exp2f((c.u[j].x - c.r[l].x) + (c.u[j].y - c.r[l].y));
    if (MODE == ATTEND_H) return D * S;
    if (MODE == ATTEND_DV) return D * S * c.inv_den[l];
    return D * (c.inv_den[l] * S + c.ds[l]);
}

template <typename F, int COLS>
constexpr size_t attend_shared_bytes() {
    return sizeof(F) * (2 * (64 * 64 + 64 * 64 * ((COLS + 63) / 64)) + 64 * 64);
}

struct AttendStep {  // what is multiplied next: piece 0 .. K - 1 of Y with the state (key < 0) or with a tile of keys;
    int key, piece;  // piece K: the weights of these keys with their values
};

// What a block works on. It lies in shared memory, so that the sums have the registers.
template <typename F, int MODE, int COLS>
struct AttendBlock {
    static constexpr bool FORWARD = MODE == ATTEND_H || MODE == ATTEND_DQ;      // rows look back
    static constexpr bool TRANSPOSED = MODE == ATTEND_DQ || MODE == ATTEND_DK;  // contracted dv, output dk
    static constexpr int NT = COLS / 16, STAGE = 64 * 64 + 64 * 64 * ((COLS + 63) / 64);
    int head, T, contracted, out_width;  // the widths of a head
    int t0, row0, col0, mine;   // the chunk's first token; the block's first row, column; its tile of the chunk
    int K, cols;                // pieces of 64 of the contracted width; columns from col0 on
    int first_key, end_key;     // tiles of keys
    bool has_state;             // it is not zero
    size_t token, gate, chunk;  // the sequence's first in [B, T], the head's in [B, NH, T]; in [B, NH, NC]

    __device__ void set(const AttendArgs<F> &p) {
        const MlstmShape &s = p.s;
        const int bh = blockIdx.z, c = blockIdx.x / 2, NC = (s.T + MLSTM_CHUNK - 1) / MLSTM_CHUNK;
        T = s.T, contracted = TRANSPOSED ? s.dv : s.dk, out_width = TRANSPOSED ? s.dk : s.dv;
        head = bh % s.NH, mine = blockIdx.x % 2;
        t0 = c * MLSTM_CHUNK, row0 = blockIdx.x * 64, col0 = blockIdx.y * COLS;
        K = (contracted + 63) / 64, cols = out_width - col0;
        token = (size_t)(bh / s.NH) * T, gate = (size_t)bh * T, chunk = (size_t)bh * NC + c;
        const int tiles_here = min(2, (T - t0 + 63) / 64), keys = FORWARD ? mine + 1 : tiles_here - mine;
        first_key = FORWARD ? 0 : mine, end_key = first_key + keys;
        has_state = c != p.zero_chunk;
    }
    __device__ AttendStep first_step() const { return {has_state ? -1 : first_key, 0}; }
    __device__ AttendStep step_after(AttendStep s) const {
        if (++s.piece < K + (s.key >= 0)) return s;
        return {s.key < 0 ? first_key : s.key + 1, 0};
    }
    // Where a warp stands: its 16 rows; its half of the columns, of the weights 32, of the output 16 of every 32
    static __device__ int m0() { return threadIdx.x / 32 % 4 * 16; }
    static __device__ int half() { return threadIdx.x / 128 % 2; }
    // Where rows g (h = 0) and g + 8 (h = 1) of the warp's 16 lie in the chunk
    __device__ int row_local(int h, int lane) const { return mine * 64 + m0() + lane / 4 + 8 * h; }
};

template <typename F, int MODE, int COLS>
__device__ __forceinline__ void attend_load_gates(ChunkGates &gates, const AttendArgs<F> &p,
                                                  const AttendBlock<F, MODE, COLS> &at) {
    for (int i = threadIdx.x; i < MLSTM_CHUNK; i += MLSTM_THREADS) {
        bool valid = at.t0 + i < at.T;
        size_t place = at.gate + (valid ? at.t0 + i : 0);
        gates.u[i] = valid ? p.gates.u[place] : make_float2(0, 0);
        gates.r[i] = valid ? p.gates.r[place] : make_float2(0, 0);
        gates.inv_den[i] = valid && MODE != ATTEND_H ? p.inv_den[place] : 0;
        gates.ds[i] = valid && MODE != ATTEND_H ? p.ds[place] : 0;
        gates.doc_start[i] = valid ? p.doc_start[at.token + at.t0 + i] : 0;
    }
}

// Starts the copies of a step.
template <typename F, int MODE, int COLS>
__device__ __forceinline__ void attend_load(F *A, AttendStep step, const AttendArgs<F> &p,
                                            const AttendBlock<F, MODE, COLS> &at) {
    const int k = step.piece * 64, left = at.contracted - k, row0 = at.t0 + step.key * 64;  // row0: of the keys
    const size_t from = (size_t)at.head * at.contracted + k;                                // column of Y and Z
    F *B = A + 64 * 64;
    if (step.piece < at.K)
        load_tile<F, 64, 64>(A, p.y + (at.token + at.row0) * p.ld_y + from, p.ld_y, at.T - at.row0, left, p.align);
    if (step.key < 0) {
        const F *state = p.state + at.chunk * p.s.dk * p.pitch;
        if (at.TRANSPOSED)
            load_tile<F, COLS, 64>(B, state + (size_t)at.col0 * p.pitch + k, p.pitch, at.cols, left, p.align);
        else load_tile<F, 64, COLS>(B, state + (size_t)k * p.pitch + at.col0, p.pitch, left, at.cols, p.align);
    } else if (step.piece < at.K) {
        load_tile<F, 64, 64>(B, p.z + (at.token + row0) * p.ld_z + from, p.ld_z, at.T - row0, left, p.align);
    } else {
        const F *values = p.val + (at.token + row0) * p.ld_val + (size_t)at.head * at.out_width + at.col0;
        load_tile<F, 64, COLS>(B, values, p.ld_val, at.T - row0, at.cols, p.align);
    }
}

// acc: the rows' products with the state; they get the rows' scales.
template <typename F, int MODE, int COLS>
__device__ __forceinline__ void attend_scale_state(float (&acc)[COLS / 16][4], const ChunkGates &gates,
                                                   const AttendArgs<F> &p, const AttendBlock<F, MODE, COLS> &at) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int i = at.row_local(h, threadIdx.x % 32), t = at.t0 + i;
        float factor = t >= at.T ? 0 : (at.FORWARD ? p.gates.qscale : p.gates.kscale)[at.gate + t];
        if (MODE == ATTEND_DQ) factor *= gates.inv_den[i];
#pragma unroll
        for (int nt = 0; nt < COLS / 16; nt++) {
            acc[nt][2 * h] *= factor;
            acc[nt][2 * h + 1] *= factor;
        }
    }
}

// P[64, 64] = the weights of rows and keys, from their products S; row_sum: of rows g and g + 8.
template <typename F, int MODE, int COLS>
__device__ __forceinline__ void attend_weigh(F *P, float (&row_sum)[2], const float (&S)[4][4], int key, float scale,
                                             const ChunkGates &gates, const AttendBlock<F, MODE, COLS> &at) {
    const unsigned lane = not_hoisted(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int nt = 0; nt < 4; nt++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int i = at.row_local(h, lane), col = at.half() * 32 + 8 * nt + 2 * t, j = key * 64 + col;
            float w[2];
#pragma unroll
            for (int k = 0; k < 2; k++)
                w[k] = attend_weight<MODE>(gates, S[nt][2 * h + k], at.FORWARD ? i : j + k, at.FORWARD ? j + k : i,
                                           at.t0, at.T, scale);
            row_sum[h] += w[0] + w[1];
            store_two(P + tile_at<F, 64>(at.m0() + g + 8 * h, col), w[0], w[1], 2, true);
        }
}

// row_sums[half][row] = sum over the four threads that share a row; sum: of rows g and g + 8
__device__ __forceinline__ void attend_add_rows(float (&row_sums)[2][64], float (&sum)[2], int m0) {
    const int lane = threadIdx.x % 32, g = lane / 4, half = threadIdx.x / 128;
#pragma unroll
    for (int k = 1; k < 4; k *= 2) {
        sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], k);
        sum[1] += __shfl_xor_sync(0xffffffffu, sum[1], k);
    }
    if (lane % 4 == 0) {
        row_sums[half][m0 + g] = sum[0];
        row_sums[half][m0 + g + 8] = sum[1];
    }
}

// Divides, adds what comes from n or dn, and writes the output; dot_sum: of rows g and g + 8, what a thread has of
// their products with p.dot.
template <typename F, int MODE, int COLS>
__device__ __forceinline__ void attend_store(const float (&acc)[COLS / 16][4], float (&dot_sum)[2],
                                             const float (&row_sums)[2][64], const float (&q_n)[64],
                                             const AttendArgs<F> &p, const AttendBlock<F, MODE, COLS> &at) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float *n = p.n + at.chunk * p.s.dk;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = at.m0() + g + 8 * h, time = at.row0 + row;
        if (time >= at.T) continue;
        size_t gate = at.gate + time, token = at.token + time;
        float factor = 1, border = 0;  // border: what multiplies n or dn
        if (MODE == ATTEND_H) {
            float sig = row_sums[0][row] + row_sums[1][row] + p.gates.qscale[gate] * q_n[row];
            if (!p.s.sigmoid_gate) factor = 1 / (fmaxf(fabsf(sig), p.gates.floor[gate]) + p.s.eps);
            if (at.col0 == 0 && at.half() == 0 && t == 0) p.gates.sig[gate] = sig;
        }
        if (MODE == ATTEND_DQ && at.has_state) border = p.gates.qscale[gate] * p.ds[gate];
        if (MODE == ATTEND_DK && at.has_state) border = p.gates.kscale[gate];
        F *out = p.out + token * p.ld_out + (size_t)at.head * at.out_width + at.col0;
        const F *dot = at.TRANSPOSED ? p.dot + token * p.ld_dot + (size_t)at.head * at.out_width + at.col0 : NULL;
#pragma unroll
        for (int nt = 0; nt < COLS / 16; nt++) {
            int col = at.half() * 16 + nt / 2 * 32 + nt % 2 * 8 + 2 * t, count = at.cols - col;
            float x = acc[nt][2 * h] * factor, y = acc[nt][2 * h + 1] * factor;
            if (at.TRANSPOSED) {
                if (border != 0 && count > 0) x += border * n[at.col0 + col];
                if (border != 0 && count > 1) y += border * n[at.col0 + col + 1];
                float2 with = load_two(dot + col, count, p.align >= 4);
                dot_sum[h] += with.x * x + with.y * y;
            }
            store_two(out + col, x, y, count, p.align >= 4);
        }
    }
}

template <typename F, int MODE, int COLS>
__device__ __forceinline__ void attend(const AttendArgs<F> &p) {
    typedef AttendBlock<F, MODE, COLS> Block;
    constexpr int NT = Block::NT;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ Block at;
    __shared__ ChunkGates gates;
    __shared__ float row_sums[2][64], q_n[64];
    F *stages = (F *)shared, *P = stages + 2 * Block::STAGE;
    const float scale = rsqrtf((float)p.s.dk);
    if (threadIdx.x == 0) at.set(p);
    __syncthreads();
    attend_load_gates(gates, p, at);
    auto load = [&](AttendStep step, int stage) {
        if (step.key < at.end_key) attend_load(stages + stage * Block::STAGE, step, p, at);
        copy_commit();
    };

    float acc[NT][4], S[4][4], row_sum[2] = {0, 0}, q_n_part = 0;
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
#pragma unroll
        for (int k = 0; k < 4; k++) acc[nt][k] = 0;
    AttendStep step = at.first_step();
    load(step, 0);
    for (int stage = 0; step.key < at.end_key; stage ^= 1) {
        const AttendStep next = at.step_after(step);
        load(next, stage ^ 1);
        copy_wait<1>();
        __syncthreads();
        const F *A = stages + stage * Block::STAGE, *B = A + 64 * 64;
        if (step.key < 0) {
            multiply<F, NT, !Block::TRANSPOSED, Block::TRANSPOSED ? COLS : 64, 32>(acc, A, at.m0(), B, at.half() * 16);
            if (MODE == ATTEND_H) {  // <q, n>: four threads a row
                const unsigned thread = not_hoisted(threadIdx.x), row = thread / 4, k0 = thread % 4 * 16;
                const float *n = p.n + at.chunk * p.s.dk + step.piece * 64;
#pragma unroll 4
                for (unsigned k = k0; k < k0 + 16; k++)
                    if (step.piece * 64 + k < p.s.dk) q_n_part += to_float(A[tile_at<F, 64>(row, k)]) * n[k];
            }
            if (step.piece == at.K - 1) attend_scale_state(acc, gates, p, at);
        } else if (step.piece < at.K) {
            if (step.piece == 0)
#pragma unroll
                for (int nt = 0; nt < 4; nt++)
#pragma unroll
                    for (int k = 0; k < 4; k++) S[nt][k] = 0;
            multiply<F, 4, false, 64, 16>(S, A, at.m0(), B, at.half() * 32);
            if (step.piece == at.K - 1) attend_weigh(P, row_sum, S, step.key, scale, gates, at);
        } else {
            multiply<F, NT, true, 64, 32>(acc, P, at.m0(), B, at.half() * 16);
        }
        __syncthreads();
        step = next;
    }

    if (MODE == ATTEND_H) {  // the denominator
#pragma unroll
        for (int k = 1; k < 4; k *= 2) q_n_part += __shfl_xor_sync(0xffffffffu, q_n_part, k);
        if (threadIdx.x % 4 == 0) q_n[threadIdx.x / 4] = q_n_part;
        attend_add_rows(row_sums, row_sum, at.m0());
        __syncthreads();
    }
    float dot_sum[2] = {0, 0};
    attend_store(acc, dot_sum, row_sums, q_n, p, at);
    if (Block::TRANSPOSED) {
        attend_add_rows(row_sums, dot_sum, at.m0());
        __syncthreads();
        if (threadIdx.x < 64 && at.row0 + threadIdx.x < at.T)
            p.dot_out[(size_t)blockIdx.y * gridDim.z * at.T + at.gate + at.row0 + threadIdx.x] =
                row_sums[0][threadIdx.x] + row_sums[1][threadIdx.x];
    }
}

template <typename F, int COLS>
static __global__ void __launch_bounds__(MLSTM_THREADS, sizeof(F) == 2 ? 2 : 1)
    mlstm_fwd_attend_kernel(const __grid_constant__ AttendArgs<F> p) {
    attend<F, ATTEND_H, COLS>(p);
}
template <typename F, int MODE, int COLS>
static __global__ void __launch_bounds__(MLSTM_THREADS, sizeof(F) == 2 ? 2 : 1)
    mlstm_bwd_attend_kernel(const __grid_constant__ AttendArgs<F> p) {
    attend<F, MODE, COLS>(p);
}

template <typename F, int MODE, int COLS>
static void launch_attend(const AttendArgs<F> &p, int width, cudaStream_t stream) {
    constexpr size_t bytes = attend_shared_bytes<F, COLS>();
    dim3 grid((unsigned)ceil_div(p.s.T, 64), (unsigned)ceil_div(width, COLS), (unsigned)(p.s.B * p.s.NH));
    void (*kernel)(AttendArgs<F>);
    if constexpr (MODE == ATTEND_H) kernel = mlstm_fwd_attend_kernel<F, COLS>;
    else kernel = mlstm_bwd_attend_kernel<F, MODE, COLS>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    kernel<<<grid, MLSTM_THREADS, bytes, stream>>>(p);
    LAUNCH_CHECK();
}

// Columns of a block's output: all of a head's where they fit, since each block computes S again.
template <typename F>
static int attend_columns(int width) {
    if (sizeof(F) == 4 || width <= 64) return 64;
    const int choices[] = {96, 128, 192, 256};
    for (int k = 0; k < 4; k++)
        if (width <= choices[k]) return choices[k];
    return width <= 384 ? 192 : 256;
}

template <typename F, int MODE>
static void mlstm_attend(const AttendArgs<F> &p, cudaStream_t stream) {
    int width = MODE == ATTEND_DQ || MODE == ATTEND_DK ? p.s.dk : p.s.dv;
    if constexpr (sizeof(F) == 2) {
        switch (attend_columns<F>(width)) {
            case 96: launch_attend<F, MODE, 96>(p, width, stream); return;
            case 128: launch_attend<F, MODE, 128>(p, width, stream); return;
            case 192: launch_attend<F, MODE, 192>(p, width, stream); return;
            case 256: launch_attend<F, MODE, 256>(p, width, stream); return;
        }
    }
    launch_attend<F, MODE, 64>(p, width, stream);
}

// ----------------------------------------------------------------------------------------------------------------
// The cell

template <typename F>
struct MlstmSaved {  // what forward keeps for backward
    MlstmGates gates;
    F *C;            // [B, NH, NC, dk, pitch] entering each chunk
    float *n;        // [B, NH, NC, dk]
    ScanSaved scan;  // instead of C and n
};

template <typename F>
struct MlstmScratch {  // of backward
    F *dC;             // [B, NH, NC, dk, pitch] leaving each chunk
    float *dn;         // [B, NH, NC, dk]
    MlstmRows rows;
    float *q_dq, *k_dk;   // [column tiles][B, NH, T]
    float *anchor;        // [state tiles][B, NH, NC]
    float *anchor_start;  // [state tiles][B, NH]
    float *segments;      // see StatesArgs; forward uses it, too
    float *partial;       // sums of the bias gradient
    float *m_walk;        // [B, NH, NC + 1] scales of a segment alone (mlstm_pair_forward)
    float *tail;          // [B, NH] see mlstm_tail
};

static size_t mlstm_pitch(const MlstmShape *s) { return (size_t)(s->dv + 7) / 8 * 8; }
static size_t mlstm_states_elements(const MlstmShape *s) {
    return (size_t)s->B * s->NH * mlstm_chunks(s) * s->dk * mlstm_pitch(s);
}

// Partial row sums <q, dq> of a token: a kernel's blocks along dk
template <typename F>
static int mlstm_dot_tiles(const MlstmShape *s) {
    if (s->chunk != SCAN_CHUNK) return ceil_div(s->dk, attend_columns<F>(s->dk));
    return scan_slices(s, true) * scan_columns(scan_pad(s->dv, true), true) / 64;
}

// backward: false if no backward pass follows; the scan then keeps nothing of its states
template <typename F>
static void mlstm_take_saved(Arena *a, const MlstmShape *s, MlstmSaved<F> *saved, bool backward = true) {
    memset((void *)saved, 0, sizeof *saved);
    mlstm_take_gates(a, s, &saved->gates);
    if (s->chunk == SCAN_CHUNK) {
        if (!backward || scan_snapshots(s) == 0) return;
        saved->scan.snapshots = take<uint32_t>(a, scan_snapshot_words(s));
        saved->scan.n_snapshots = take<float>(a, (size_t)s->B * s->NH * scan_n_snapshots(s) * s->dk);
        return;
    }
    saved->C = take<F>(a, mlstm_states_elements(s));
    saved->n = take<float>(a, (size_t)s->B * s->NH * mlstm_chunks(s) * s->dk);
}

template <typename F>
static void mlstm_take_scratch(Arena *a, const MlstmShape *s, MlstmScratch<F> *scratch) {
    size_t tokens = (size_t)s->B * s->NH * s->T, chunks = (size_t)s->B * s->NH * mlstm_chunks(s);
    const bool scan = s->chunk == SCAN_CHUNK;
    size_t tiles = (size_t)mlstm_dot_tiles<F>(s);
    memset((void *)scratch, 0, sizeof *scratch);
    scratch->rows = MlstmRows{take<float>(a, tokens), take<float>(a, tokens), take<float>(a, tokens)};
    scratch->q_dq = take<float>(a, tiles * tokens);
    scratch->k_dk = take<float>(a, tiles * tokens);
    scratch->partial = take<float>(a, mlstm_gates_partial_floats(s));
    scratch->m_walk = take<float>(a, chunks + (size_t)s->B * s->NH);
    scratch->tail = take<float>(a, (size_t)s->B * s->NH);
    if (scan) {
        scratch->anchor = take<float>(a, (size_t)scan_anchor_tiles(s) * s->B * s->NH * ceil_div(s->T, MLSTM_SPAN));
        scratch->anchor_start = take<float>(a, (size_t)scan_anchor_tiles(s) * s->B * s->NH);
        scratch->segments = take<float>(a, scan_segments_floats(s));
        return;
    }
    scratch->dC = take<F>(a, mlstm_states_elements(s));
    scratch->dn = take<float>(a, chunks * s->dk);
    const size_t tiles_of_states = (size_t)ceil_div(s->dk, 64) * ceil_div(s->dv, 64);
    scratch->anchor = take<float>(a, tiles_of_states * chunks);
    scratch->anchor_start = take<float>(a, tiles_of_states * s->B * s->NH);
    // Segments x sequences x heads x tiles stay below STATES_BLOCKS + STATES_BLOCKS / 2 where there are several.
    const int several = ceil_div(2 * STATES_BLOCKS, ceil_div(s->dk, 64) * ceil_div(s->dv, 64));
    scratch->segments = take<float>(a, (size_t)(several + s->B * s->NH) * s->dk * (s->dv + 1));
}

// The most bytes, 16 at most, of which all addresses and lengths of rows are multiples
template <typename F>
static int mlstm_alignment(const MlstmShape *s, const MlstmInput<F> *in, std::initializer_list<const F *> others,
                           size_t ld_others) {
    uintptr_t bits = (uintptr_t)in->q | (uintptr_t)in->k | (uintptr_t)in->v |
                     sizeof(F) * (in->ld | ld_others | (size_t)s->dk | (size_t)s->dv);
    for (const F *p : others) bits |= (uintptr_t)p;
    return bits % 16 == 0 ? 16 : (int)(bits & (~bits + 1));  // the lowest bit that is set
}

template <typename F>
static MlstmGateInput mlstm_gate_input(const MlstmInput<F> &in) {
    return MlstmGateInput{in.gates, in.ld_gates, in.bias, in.cap, in.doc_start};
}

template <typename F>
static StatesArgs<F> mlstm_states_args(const MlstmShape &s, const MlstmInput<F> &in, int align,
                                       const MlstmGates &gates) {
    StatesArgs<F> p = {};
    p.s = s, p.pitch = mlstm_pitch(&s), p.align = align;
    p.x = in.k, p.ld_x = in.ld;
    p.y = in.v, p.ld_y = in.ld;
    p.scale = gates.kscale, p.decay = gates.decay;
    return p;
}

// h, and the final states, once the gates are known. walked: mlstm_pair_forward has been here
template <typename F>
static void mlstm_cell_forward(MlstmShape s, MlstmInput<F> in, MlstmState initial, MlstmState final, bool walked, F *h,
                               const MlstmSaved<F> *saved, const MlstmScratch<F> *scratch, cudaStream_t stream) {
    size_t ld_h = (size_t)s.NH * s.dv;
    const int align = mlstm_alignment(&s, &in, {h}, ld_h);
    const float *m_walk = walked ? scratch->m_walk : NULL;
    if constexpr (sizeof(F) == 2)
        if (s.chunk == SCAN_CHUNK) {
            mlstm_scan_forward(s, in, initial, final, h, saved->gates, saved->scan, scratch->segments, walked, m_walk,
                               stream);
            return;
        }
    StatesArgs<F> states = mlstm_states_args(s, in, align, saved->gates);
    states.initial = initial, states.final = final;
    states.C = saved->C, states.n = saved->n;
    mlstm_states<F, false>(states, scratch->segments, walked, m_walk, saved->gates.m, stream);
    AttendArgs<F> attend = {};
    attend.s = s, attend.pitch = mlstm_pitch(&s), attend.align = align;
    attend.gates = saved->gates, attend.doc_start = in.doc_start;
    attend.y = in.q, attend.ld_y = in.ld;
    attend.z = in.k, attend.ld_z = in.ld;
    attend.val = in.v, attend.ld_val = in.ld;
    attend.state = saved->C, attend.n = saved->n, attend.zero_chunk = initial.C ? -1 : 0;
    attend.out = h, attend.ld_out = ld_h;
    mlstm_attend<F, ATTEND_H>(attend, stream);
}

// h [B, T, NH, dv]. Initial and final states in float, C == NULL: zeros, not wanted; they must not overlap.
template <typename F>
static void mlstm_forward(MlstmShape s, MlstmInput<F> in, MlstmState initial, MlstmState final, F *h,
                          const MlstmSaved<F> *saved, const MlstmScratch<F> *scratch, cudaStream_t stream) {
    mlstm_gates_forward(&s, in.gates, in.ld_gates, in.bias, in.cap, in.doc_start, initial.C ? initial.m : NULL,
                        initial.C ? initial.row : final.row, final.C ? final.m : NULL, &saved->gates, stream);
    mlstm_cell_forward(s, in, initial, final, false, h, saved, scratch, stream);
}

// A segment of a sequence, in two steps: the pair (mlstm_pairs.cuh) of these tokens, for which q is not needed; then,
// with the states that enter, all that mlstm_forward does.
template <typename F>
static void mlstm_pair_forward(MlstmShape s, MlstmInput<F> in, MlstmState pair, const MlstmSaved<F> *saved,
                               const MlstmScratch<F> *scratch, cudaStream_t stream) {
    MlstmGates gates = saved->gates;  // of the segment alone, for the time being
    gates.m = scratch->m_walk;
    mlstm_gate_summary(&s, mlstm_gate_input(in), &gates, stream);
    mlstm_gate_values(&s, mlstm_gate_input(in), true, NULL, pair.row, pair.m, &gates, stream);
    if constexpr (sizeof(F) == 2)
        if (s.chunk == SCAN_CHUNK) {
            mlstm_scan_pair(s, in, pair, gates, saved->scan, scratch->segments, stream);
            return;
        }
    StatesArgs<F> states = mlstm_states_args(s, in, mlstm_alignment<F>(&s, &in, {}, 0), gates);
    mlstm_walk_segments<F, false>(states, scratch->segments, true, stream);
    mlstm_pair<false>(&s, pair, scratch->segments, gates.decay, states_segment_chunks<F, false>(&s), stream);
}
template <typename F>
static void mlstm_segment_forward(MlstmShape s, MlstmInput<F> in, MlstmState initial, MlstmState final, F *h,
                                  const MlstmSaved<F> *saved, const MlstmScratch<F> *scratch, cudaStream_t stream) {
    mlstm_gate_values(&s, mlstm_gate_input(in), false, initial.m, initial.C ? initial.row : final.row, final.m,
                      &saved->gates, stream);
    mlstm_cell_forward(s, in, initial, final, true, h, saved, scratch, stream);
}

template <typename F>
static StatesArgs<F> mlstm_reverse_args(const MlstmShape &s, const MlstmInput<F> &in, int align, const F *dh,
                                        const MlstmSaved<F> *saved, const MlstmScratch<F> *scratch) {
    StatesArgs<F> p = {};
    p.s = s, p.pitch = mlstm_pitch(&s), p.align = align;
    p.x = in.q, p.ld_x = in.ld;
    p.y = dh, p.ld_y = (size_t)s.NH * s.dv;
    p.scale = saved->gates.qscale, p.inv_den = scratch->rows.inv_den, p.ds = scratch->rows.ds;
    p.decay = saved->gates.decay;
    p.C = scratch->dC, p.n = scratch->dn;
    p.entering = saved->C, p.n_entering = saved->n, p.anchor = scratch->anchor;
    return p;
}

// dq, dk, dv by the kernels of this file
template <typename F>
static void mlstm_split_backward(MlstmShape s, MlstmInput<F> in, MlstmState initial, MlstmState dfinal, bool walked,
                                 const F *dh, F *dq, F *dk, F *dv, size_t ld_grad, const MlstmSaved<F> *saved,
                                 const MlstmScratch<F> *scratch, cudaStream_t stream) {
    size_t ld_h = (size_t)s.NH * s.dv;
    const int align = mlstm_alignment(&s, &in, {dh, (const F *)dq, (const F *)dk, (const F *)dv}, ld_h | ld_grad);
    const MlstmGates *gates = &saved->gates;
    StatesArgs<F> states = mlstm_reverse_args(s, in, align, dh, saved, scratch);
    states.initial = dfinal;
    states.anchor_start = initial.C ? scratch->anchor_start : NULL;
    mlstm_states<F, true>(states, scratch->segments, walked, NULL, NULL, stream);

    AttendArgs<F> attend = {};
    attend.s = s, attend.pitch = mlstm_pitch(&s), attend.align = align;
    attend.gates = *gates, attend.doc_start = in.doc_start;
    attend.inv_den = scratch->rows.inv_den, attend.ds = scratch->rows.ds;
    attend.ld_out = ld_grad, attend.ld_dot = in.ld;

    attend.y = dh, attend.ld_y = ld_h;
    attend.z = in.v, attend.ld_z = in.ld;
    attend.val = in.k, attend.ld_val = in.ld;
    attend.state = saved->C, attend.n = saved->n, attend.zero_chunk = initial.C ? -1 : 0;
    attend.out = dq, attend.dot = in.q, attend.dot_out = scratch->q_dq;
    mlstm_attend<F, ATTEND_DQ>(attend, stream);

    attend.state = scratch->dC, attend.n = scratch->dn, attend.zero_chunk = dfinal.C ? -1 : mlstm_chunks(&s) - 1;
    attend.y = in.v, attend.ld_y = in.ld;
    attend.z = dh, attend.ld_z = ld_h;
    attend.val = in.q, attend.ld_val = in.ld;
    attend.out = dk, attend.dot = in.k, attend.dot_out = scratch->k_dk;
    mlstm_attend<F, ATTEND_DK>(attend, stream);

    attend.y = in.k, attend.ld_y = in.ld;
    attend.z = in.q, attend.ld_z = in.ld;
    attend.val = dh, attend.ld_val = ld_h;
    attend.out = dv;
    mlstm_attend<F, ATTEND_DV>(attend, stream);
}

template <typename F>
static ScanScratch mlstm_scan_scratch(const MlstmScratch<F> *scratch) {
    return ScanScratch{scratch->rows.inv_den, scratch->rows.ds,      scratch->q_dq,    scratch->k_dk,
                       scratch->anchor,       scratch->anchor_start, scratch->segments};
}

// The gradients of the inputs once the factors of the rows are known. dfinal: the gradient of the final states `final`;
// C == NULL: none comes in. walked: mlstm_pair_backward has been here. h: if they are to be made here
// (scan_makes_dots), else NULL
template <typename F, typename Gates>
static void mlstm_cell_backward(MlstmShape s, MlstmInput<F> in, MlstmState initial, MlstmState final, MlstmState dfinal,
                                bool walked, const F *dh, F *dq, F *dk, F *dv, size_t ld_grad, Gates *dgates,
                                size_t ld_dgates, float *dbias, const MlstmSaved<F> *saved,
                                const MlstmScratch<F> *scratch, cudaStream_t stream, const F *h = NULL) {
    bool scanned = false;
    if (dfinal.C) mlstm_tail(&s, scratch->tail, final, dfinal, stream);
    if constexpr (sizeof(F) == 2)
        if (s.chunk == SCAN_CHUNK) {
            if (scan_narrow(&s))
                mlstm_narrow_backward(s, in, dfinal, dh, dq, dk, dv, ld_grad, saved->gates, saved->scan,
                                      mlstm_scan_scratch(scratch), stream);
            else
                mlstm_scan_backward(s, in, initial, dfinal, walked, dh, h, dq, dk, dv, ld_grad, saved->gates,
                                    saved->scan, mlstm_scan_scratch(scratch), stream);
            scanned = true;
        }
    if (!scanned) mlstm_split_backward(s, in, initial, dfinal, walked, dh, dq, dk, dv, ld_grad, saved, scratch, stream);
    const float *exact = sizeof(F) == 2 ? scratch->rows.q_dq : NULL;  // in float, <k, dk> is as exact
    mlstm_gates_backward(&s, in.gates, in.ld_gates, in.bias, in.cap, in.doc_start, scratch->q_dq, scratch->k_dk,
                         mlstm_dot_tiles<F>(&s), scratch->anchor,
                         scanned ? scan_anchor_tiles(&s) : states_tiles<F, true>(&s), scratch->anchor_start,
                         dfinal.C ? scratch->tail : NULL, exact, scanned && scan_has_paths(&s) ? scratch->anchor : NULL,
                         initial, dgates, ld_dgates, dbias, scratch->partial, stream);
}

// Exact gradients of the inputs (written, not added; dbias [2NH] is added to), also through the denominator; m is a
// constant everywhere, since h does not depend on it but for eps. No gradient comes in through the final states.
// dh, h [B, T, NH, dv]; dh_dot_h [B, T, NH] = <dh, h> of a row, NULL: it is made from h, which is not needed else, or
// from neither (narrow heads); dgates [B, T, 2NH]: of the raw pre-activations, in F or float.
template <typename F, typename Gates>
static void mlstm_backward(MlstmShape s, MlstmInput<F> in, MlstmState initial, const F *dh, const float *dh_dot_h,
                           F *dq, F *dk, F *dv, size_t ld_grad, Gates *dgates, size_t ld_dgates, float *dbias,
                           const MlstmSaved<F> *saved, const MlstmScratch<F> *scratch, cudaStream_t stream,
                           const F *h = NULL) {
    const MlstmState none = {NULL, NULL, NULL, 0};
    const bool scan = sizeof(F) == 2 && s.chunk == SCAN_CHUNK, narrow = scan && scan_narrow(&s);
    const bool by_scan = !dh_dot_h && !narrow && scan && scan_makes_dots(&s, (const bf16 *)h);
    MlstmScratch<F> known = *scratch;
    if (!dh_dot_h && (narrow || by_scan || s.sigmoid_gate)) known.rows.q_dq = NULL;
    // of narrow heads only q_dq is used: their walk makes inv_den and ds itself
    if (dh_dot_h) mlstm_row_factors(&s, dh_dot_h, &saved->gates, known.rows, stream);
    else if (!narrow && !by_scan) mlstm_row_factors_of(&s, dh, h, &saved->gates, known.rows, stream);
    mlstm_cell_backward(s, in, initial, none, none, false, dh, dq, dk, dv, ld_grad, dgates, ld_dgates, dbias, saved,
                        &known, stream, by_scan ? h : NULL);
}

// The backward pair of a segment, pair.C == NULL: all but that; mlstm_cell_backward follows with the gradient of the
// states that the segment leaves.
template <typename F>
static void mlstm_pair_backward(MlstmShape s, MlstmInput<F> in, const F *dh, const float *dh_dot_h, MlstmState pair,
                                const MlstmSaved<F> *saved, const MlstmScratch<F> *scratch, cudaStream_t stream) {
    mlstm_row_factors(&s, dh_dot_h, &saved->gates, scratch->rows, stream);
    if constexpr (sizeof(F) == 2)
        if (s.chunk == SCAN_CHUNK) {
            mlstm_scan_backward_pair(s, in, dh, pair, saved->gates, saved->scan, mlstm_scan_scratch(scratch), stream);
            return;
        }
    const int align = mlstm_alignment(&s, &in, {dh}, (size_t)s.NH * s.dv);
    StatesArgs<F> states = mlstm_reverse_args(s, in, align, dh, saved, scratch);
    mlstm_walk_segments<F, true>(states, scratch->segments, pair.C != NULL, stream);
    if (pair.C)
        mlstm_pair<true>(&s, pair, scratch->segments, saved->gates.decay, states_segment_chunks<F, true>(&s), stream);
}

#endif
