// mlstm_scan.cuh: the chunkwise mLSTM on Hopper, in bf16: one kernel, four uses (formulas: doc/math.md 3.4, 4).
//
// The cell and its three gradients are the same computation: walk through the chunks of 64 tokens, forward or backward
// in time, and for each, with rows X, Y [64, A] and Z [64, W] and a state M [A, W],
//
//     out = factor * (X M) + P Z,    P = weights * (X Y^T) inside the chunk
//     M   = decay M + Y^T (scale * Z)
//
//       output   X     Y     Z    state        A    whole width    weights of a pair (l, j), j <= l
//       H        Q     K     V    C            dk   dv             s D q.k
//       dV       K     Q     dH   dC           dk   dv             s D q.k inv_den_l
//       dQ       dH    V     K    C^T          dv   dk             s D (inv_den_l dh.v + ds_l)
//       dK       V     dH    Q    dC^T         dv   dk             s D (inv_den_l dh.v + ds_l)
//
// H and dQ walk forward, dV and dK backward. The state never leaves the multiprocessor. A block has three warpgroups
// and holds a slice of W columns of one head's state, transposed, in the accumulators of two of them:
//
//   scores    X Y^T (64 x 64), weights, P in bf16 to shared memory; the normaliser n and its gradient
//   state 0,1 out^T = M^T X^T with the accumulators themselves, rounded to bf16, as register operand; M^T += (scale *
//             Z)^T Y, fed from registers too; out^T += Z^T P^T. Where W = 64 both share the rows and halve A, and the
//             second adds its part of out through shared memory; else each has its own rows of M^T
//
// X, Y, Z come by TMA, two chunks ahead where they fit; results leave by TMA. The scores of the next chunk are made
// while the states work on this one. Long sequences of few heads are cut into segments (grid.y), each of which needs
// the state that enters it: the same kernel as LOCAL makes what each segment adds from zero, mlstm_segments sums
// up.
//
// Cost of a chunk and slice, in cycles of the tensor cores (2,048 multiply-adds): 2 A for the scores, 2 A W / 64 for
// the state's answer, 2 W for P Z, 2 A W / 64 for the update; 2,816 at A = 128, W = 256 and the other way round. Bytes:
// every input and output once from memory where the slices of a head run side by side, and 4 A W / 128 a token for
// snapshots.
#ifndef XLSTMC_MLSTM_SCAN_CUH
#define XLSTMC_MLSTM_SCAN_CUH

#include "hopper.cuh"
#include "mlstm_gates.cuh"
#include "mma.cuh"

enum { SCAN_H, SCAN_DQ, SCAN_DK, SCAN_DV };
enum { SCAN_THREADS = 384, SCAN_BORDER = MLSTM_SPAN / SCAN_CHUNK };  // chunks from one snapshot of C to the next

template <int MODE_, int A_, int W_, bool LOCAL_>
struct Scan {
    static constexpr int MODE = MODE_, A = A_, W = W_;
    static constexpr bool LOCAL = LOCAL_;                                   // the state alone, no output
    static constexpr bool REVERSE = MODE == SCAN_DK || MODE == SCAN_DV;     // in time
    static constexpr bool TRANSPOSED = MODE == SCAN_DQ || MODE == SCAN_DK;  // contracted dv, output dk
    static constexpr bool SPLIT = W == 64;                                  // the state's warpgroups halve A, not W
    static constexpr int BLOCKS = SPLIT ? 1 : W / 128;                      // of 64 rows of M^T a warpgroup
    static constexpr int AW = SPLIT ? A / 2 : A;                            // columns of M^T a warpgroup
    static constexpr int X_BYTES = A * PANEL_ROW, Z_BYTES = W * PANEL_ROW;  // of a tile of 64 tokens
    static constexpr int STAGES = LOCAL || A * 2 + W <= 320 ? 3 : 2;        // what shared memory holds
    static constexpr int X_STAGES = LOCAL ? 0 : A <= 384 ? STAGES : 1, YZ_STAGES = A <= 256 ? STAGES : 1;
    static constexpr int X_AHEAD = X_STAGES > 1 ? X_STAGES - 1 : 1, YZ_AHEAD = YZ_STAGES > 1 ? YZ_STAGES - 1 : 1;
    static constexpr int LIGHT_WARP = REVERSE ? 3 : 0;  // of the scores: its rows see the fewest columns; it also loads
    // The normaliser: n = sum of scale y (H, and dn of a LOCAL walk back), or the slice's part of sum of scale z
    static constexpr bool Y_VECTOR = MODE == SCAN_H || LOCAL, Z_VECTOR = TRANSPOSED;
    static constexpr bool VECTOR = Y_VECTOR || Z_VECTOR;
    static constexpr int V_COLS = Y_VECTOR ? A : W;  // a quarter of them for each warp of the scores
    static constexpr int OUT_BYTES = LOCAL ? 0 : W * PANEL_ROW, P_BYTES = LOCAL ? 0 : PANEL_BYTES;
    static constexpr int RED_BYTES = SPLIT && !LOCAL ? 64 * 64 * 4 : 0;
    static constexpr int AT_YZ = X_STAGES * X_BYTES, AT_P = AT_YZ + YZ_STAGES * (X_BYTES + Z_BYTES),
                         AT_OUT = AT_P + 2 * P_BYTES, AT_RED = AT_OUT + OUT_BYTES, AT_SHARED = AT_RED + RED_BYTES;
    static_assert(AW % 64 == 0 && BLOCKS * AW <= 256, "the state fits the registers");
};

struct ScanArgs {
    CUtensorMap x, y, z, out, dot;  // dot: dQ: Q, dK: K, laid out as out
    MlstmShape s;
    MlstmGates gates;
    const float *inv_den, *ds;  // [B, NH, T], backward
    const int *doc_start;       // [B, T]
    MlstmState initial, final;  // of the whole sequence; C == NULL: zeros, not wanted
    float *segments;            // [P][B][NH dk dv + NH dk] states entering each segment; NULL: one segment
    int segment_chunks;
    uint32_t *snapshots;  // C where a span begins, in the order of the threads' registers: H writes, dV reads
    float *n_snapshots;   // [B, NH, borders, dk] n there: H writes, dK reads
    float *anchor;        // [tiles][B, NH, spans] shares of <C, dC> + <n, dn> where a span ends
    int anchor_tile;      // the first one of this kernel
    MlstmState entering;  // dV and dK: the state that entered the sequence in the forward pass, and
    float *anchor_start;  // [tiles][B, NH] the same shares where the sequence begins
    float *dot_out;       // [ceil(width / 64)][B, NH, T] row sums of out * dot, before out is rounded
};

struct ScanRows {  // of the 64 tokens of a chunk
    // The weight of query l and key j is exp2f(u_j - r_l) times X Y^T, plus add_l for dQ and dK: the logarithms of s
    // and 1 / den are in r. A bf16 result does without the low halves of u and r: 1e-4 of the weight where gates are at
    // their caps for a whole chunk, else 1e-6.
    float u[64], r[64], add[64], floor[64];
    float factor[64], border[64], out_scale[64];  // of the row's part from the state, of n, of the sum (H)
    float scale[64], n_scale[64];                 // of the row in the update of M, of n
    int start[64];                                // of the document, counted from the chunk's first token
};

template <class S>
struct ScanShared {
    ScanRows rows[2];
    float vector[3][S::V_COLS];        // n as it enters the chunk: of this one, and two more that others may still read
    bf16 split[2][2][S::V_COLS];       // the same, high and low half
    float dots[2][2][4][64], sums[8];  // of a state warpgroup, of even and odd chunks
    uint64_t x_full[3], x_empty[3], yz_full[3], yz_empty[3], rows_full[2], p_full[2], p_empty[2], dot_full[2];
};

template <class S>
constexpr size_t scan_shared_bytes() {
    return 1024 + S::AT_SHARED + sizeof(ScanShared<S>);
}

struct ScanPlace {  // what a block does
    int b, head, bh, slice, first_chunk, chunks, all_chunks;
    bool last_segment;  // in the direction of the walk
};

template <class S>
__device__ __forceinline__ int scan_chunk(const ScanPlace &at, int it) {
    return S::REVERSE ? at.first_chunk + at.chunks - 1 - it : at.first_chunk + it;
}
// The barrier of a ring of `stages`: its slot and the parity of its phase for use number k
template <int STAGES>
__device__ __forceinline__ unsigned scan_slot(const uint64_t *bars, int k) {
    return shared_address(bars + k % (STAGES > 0 ? STAGES : 1));
}
template <int STAGES>
__device__ __forceinline__ int scan_parity(int k) {
    return k / (STAGES > 0 ? STAGES : 1) & 1;
}

// Element (w, a) of M^T in a state of the whole model's layout, [dk, dv] a head
template <class S>
__device__ __forceinline__ float *scan_element(float *C, const MlstmShape &s, int w, int a) {
    return C + (S::TRANSPOSED ? w * s.dv + a : a * s.dv + w);
}
__device__ __forceinline__ MlstmState scan_segment_state(const ScanArgs &p, int segment) {
    size_t matrices = (size_t)p.s.NH * p.s.dk * p.s.dv, record = matrices + (size_t)p.s.NH * p.s.dk;
    float *first = p.segments + segment * p.s.B * record;
    return MlstmState{first, first + matrices, NULL, record};
}
template <class S>
__device__ __forceinline__ MlstmState scan_initial(const ScanArgs &p) {
    if (S::LOCAL) return MlstmState{NULL, NULL, NULL, 0};
    return p.segments ? scan_segment_state(p, blockIdx.y) : p.initial;
}
template <class S>
__device__ __forceinline__ MlstmState scan_final(const ScanArgs &p, const ScanPlace &at) {
    if (S::LOCAL) return scan_segment_state(p, blockIdx.y);
    return at.last_segment ? p.final : MlstmState{NULL, NULL, NULL, 0};
}

// ----------------------------------------------------------------------------------------------------------------
// Loads

template <class S>
__device__ __forceinline__ void scan_load_x(const ScanArgs &p, const ScanPlace &at, unsigned base, ScanShared<S> *sh,
                                            int it) {
    if (S::X_STAGES == 0 || it >= at.chunks) return;
    const unsigned full = scan_slot<S::X_STAGES>(sh->x_full, it),
                   tile = base + it % (S::X_STAGES ? S::X_STAGES : 1) * S::X_BYTES;
    barrier_wait(scan_slot<S::X_STAGES>(sh->x_empty, it), scan_parity<S::X_STAGES>(it) ^ 1);
    barrier_arrive_expect(full, S::X_BYTES);
    for (int k = 0; k < S::A / 64; k++)
        tma_load(tile + k * PANEL_BYTES, &p.x, full, 64 * k, at.head, scan_chunk<S>(at, it) * SCAN_CHUNK, at.b);
}

template <class S>
__device__ __forceinline__ void scan_load_yz(const ScanArgs &p, const ScanPlace &at, unsigned base, ScanShared<S> *sh,
                                             int it) {
    if (it >= at.chunks) return;
    const unsigned full = scan_slot<S::YZ_STAGES>(sh->yz_full, it);
    const unsigned tile = base + S::AT_YZ + it % S::YZ_STAGES * (S::X_BYTES + S::Z_BYTES);
    const int t0 = scan_chunk<S>(at, it) * SCAN_CHUNK;
    barrier_wait(scan_slot<S::YZ_STAGES>(sh->yz_empty, it), scan_parity<S::YZ_STAGES>(it) ^ 1);
    barrier_arrive_expect(full, S::X_BYTES + S::Z_BYTES);
    for (int k = 0; k < S::A / 64; k++) tma_load(tile + k * PANEL_BYTES, &p.y, full, 64 * k, at.head, t0, at.b);
    for (int k = 0; k < S::W / 64; k++)
        tma_load(tile + S::X_BYTES + k * PANEL_BYTES, &p.z, full, at.slice * S::W + 64 * k, at.head, t0, at.b);
}

// ----------------------------------------------------------------------------------------------------------------
// The scores' warpgroup

// Of token threadIdx % 64: the first 64 threads hold u and r, the others qscale, kscale, and all of them 1 / den (H:
// the floor of the denominator) and ds. Loaded a chunk ahead, so nothing is computed from them before they are stored.
struct ScanRowValues {
    float2 first, second;
    float inv_den, ds;
    int start;
};

template <class S>
__device__ __forceinline__ ScanRowValues scan_rows_load(const ScanArgs &p, const ScanPlace &at, int it) {
    const int t = scan_chunk<S>(at, it) * SCAN_CHUNK + threadIdx.x % 64;
    const size_t gate = (size_t)at.bh * p.s.T + t;
    ScanRowValues x = {{0, 0}, {0, 0}, 1, 0, 0};
    if (threadIdx.x < 64) x.first.x = -1e30f, x.second.x = 1e30f;  // beyond the end: no weight with any other token
    if (it >= at.chunks || t >= p.s.T) return x;
    if (threadIdx.x < 64) {
        x.first = p.gates.u[gate], x.second = p.gates.r[gate];
        x.start = p.doc_start[(size_t)at.b * p.s.T + t];
    } else {
        x.first.x = p.gates.qscale[gate], x.second.x = p.gates.kscale[gate];
    }
    x.inv_den = S::MODE == SCAN_H ? p.gates.floor[gate] : p.inv_den[gate];
    if (S::MODE != SCAN_H) x.ds = p.ds[gate];
    return x;
}

// True in all threads if a document begins within chunk c, behind its first token. All 128 have stored.
template <class S>
__device__ __forceinline__ bool scan_rows_store(ScanRows *rows, const ScanRowValues &x, float log2_s, int c) {
    const int i = threadIdx.x % 64, start = x.start - c * SCAN_CHUNK;
    const float inv_den = S::MODE == SCAN_H ? 1 : x.inv_den;
    if (threadIdx.x < 64) {
        rows->u[i] = x.first.x + x.first.y;
        rows->r[i] = x.second.x + x.second.y - log2_s - __log2f(inv_den);
        rows->add[i] = __fdividef(x.ds, inv_den);
        rows->start[i] = start;
    } else {
        const float qscale = x.first.x, kscale = x.second.x;
        if (S::MODE == SCAN_H) rows->floor[i] = x.inv_den;
        rows->factor[i] = S::REVERSE ? kscale : qscale * inv_den;
        rows->border[i] = S::REVERSE ? kscale : qscale * x.ds;
        rows->scale[i] = S::REVERSE ? qscale * inv_den : kscale;
        rows->n_scale[i] = S::REVERSE ? qscale * x.ds : kscale;
    }
    return named_barrier_any(1, 128, threadIdx.x < 64 && start > 0);
}

// w[4j + 2h + e]: scores of rows i = 16 warp + g + 8h and columns k = 8j + 2t + e, to be weighted
template <class S, bool DOCUMENTS>
__device__ __forceinline__ void scan_weights(float (&w)[32], const ScanRows *rows) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), i0 = warp * 16 + lane / 4;
    float mine[2], add[2] = {0, 0};  // forward: of the queries i; else of the keys i
    int start[2] = {0, 0};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        mine[h] = S::REVERSE ? rows->u[i0 + 8 * h] : rows->r[i0 + 8 * h];
        if (S::MODE == SCAN_DQ) add[h] = rows->add[i0 + 8 * h];
        if (DOCUMENTS && !S::REVERSE) start[h] = rows->start[i0 + 8 * h];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int k = 8 * j + 2 * t;
        const bool diagonal = j / 2 == warp, none = S::REVERSE ? j / 2 < warp : j / 2 > warp;
        if (none) {
#pragma unroll
            for (int e = 0; e < 4; e++) w[4 * j + e] = 0;
            continue;
        }
        const float2 other = *(const float2 *)(S::REVERSE ? &rows->r[k] : &rows->u[k]);
        const float2 add_k = S::MODE == SCAN_DK ? *(const float2 *)&rows->add[k] : make_float2(0, 0);
        const int2 start_k = DOCUMENTS && S::REVERSE ? *(const int2 *)&rows->start[k] : make_int2(0, 0);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float x = e ? other.y : other.x, plus = S::MODE == SCAN_DK ? (e ? add_k.y : add_k.x) : add[h];
                const int query = S::REVERSE ? k + e : i0 + 8 * h, key = S::REVERSE ? i0 + 8 * h : k + e;
                float D = exp2_fast(S::REVERSE ? mine[h] - x : x - mine[h]);
                if (diagonal && key > query) D = 0;
                if (DOCUMENTS && (S::REVERSE ? (e ? start_k.y : start_k.x) : start[h]) > key) D = 0;
                float *to = &w[4 * j + 2 * h + e];
                *to = D * (S::TRANSPOSED ? *to + plus : *to);
            }
    }
}

// <x_i, n> of rows i = 16 warp + g and i + 8, in the lanes with t = 0: a product with the halves of n as columns 0 and
// 1
template <class S>
__device__ __forceinline__ float2 scan_rows_dot_n(const unsigned char *x, const bf16 (*split)[S::V_COLS]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = threadIdx.x / 32 * 16 + lane % 16;
    float sum[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};  // two chains
    const bf16 *half = split[g % 2] + 2 * t;
#pragma unroll
    for (int k = 0; k < S::A / 16; k++) {
        unsigned a[4];
        ldmatrix(a, (const bf16 *)(x + k / 4 * PANEL_BYTES + panel_piece(row, k % 4 * 2 + lane / 16)));
        const unsigned b0 = *(const unsigned *)(half + 16 * k), b1 = *(const unsigned *)(half + 16 * k + 8);
        mma(sum[k % 2], a, g < 2 ? b0 : 0, g < 2 ? b1 : 0);
    }
    return make_float2((sum[0][0] + sum[0][1]) + (sum[1][0] + sum[1][1]),
                       (sum[0][2] + sum[0][3]) + (sum[1][2] + sum[1][3]));
}

// Column pair k of the thread, of those that a warp has: lanes 0 to 3 hold all
template <class S>
__device__ __forceinline__ void scan_store_n(ScanShared<S> *sh, int it, int k, float x, float y) {
    const int column = threadIdx.x / 32 * (S::V_COLS / 4) + 8 * k + 2 * (threadIdx.x % 32);
    *(float2 *)&sh->vector[it % 3][column] = make_float2(x, y);
    if (S::MODE != SCAN_H) return;
    const unsigned high = pack_two(x, y);
    const float2 rounded = unpack_two(high);
    *(unsigned *)&sh->split[it % 2][0][column] = high;
    *(unsigned *)&sh->split[it % 2][1][column] = pack_two(x - rounded.x, y - rounded.y);
}

// n of the next chunk: decay n + sum over this one's tokens of scale_r tile_r: a product with the halves of scale as
// rows 0 and 1; warp w has a quarter of the columns
template <class S>
__device__ __forceinline__ void scan_update_n(ScanShared<S> *sh, int it, float decay, const unsigned char *tile,
                                              const float *scale) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = threadIdx.x / 32 * (S::V_COLS / 4);
    unsigned a[4][4];
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            a[k][r] = 0;
            if (r % 2) continue;  // rows 8 to 15
            const float2 x = *(const float2 *)(scale + 16 * k + 4 * r + 2 * t);
            const unsigned high = pack_two(x.x, x.y);
            const float2 rounded = unpack_two(high);
            const unsigned low = pack_two(x.x - rounded.x, x.y - rounded.y);
            a[k][r] = g == 0 ? high : g == 1 ? low : 0;
        }
    float sum[S::V_COLS / 32][4];
#pragma unroll
    for (int i = 0; i < S::V_COLS / 64; i++) {
        const int piece = first / 8 + 2 * i + lane / 16;
        const unsigned char *from = tile + piece / 8 * PANEL_BYTES;
#pragma unroll
        for (int e = 0; e < 4; e++) sum[2 * i][e] = sum[2 * i + 1][e] = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            unsigned b[4];
            ldmatrix_trans(b, (const bf16 *)(from + panel_piece(16 * k + lane % 16, piece % 8)));
            mma(sum[2 * i], a[k], b[0], b[1]);
            mma(sum[2 * i + 1], a[k], b[2], b[3]);
        }
    }
#pragma unroll
    for (int i = 0; i < S::V_COLS / 32; i++) {
        sum[i][0] += __shfl_down_sync(0xffffffffu, sum[i][0], 4);
        sum[i][1] += __shfl_down_sync(0xffffffffu, sum[i][1], 4);
    }
    if (lane >= 4) return;
#pragma unroll
    for (int i = 0; i < S::V_COLS / 32; i++) {
        const float2 n = *(const float2 *)&sh->vector[it % 3][first + 8 * i + 2 * lane];
        scan_store_n<S>(sh, it + 1, i, n.x * decay + sum[i][0], n.y * decay + sum[i][1]);
    }
}

// *to = the sum over a warpgroup; sums: 4 floats, barrier: the warpgroup's own
__device__ __forceinline__ void scan_store_sum(float *to, float sum, float *sums, int barrier) {
    sum = warp_sum(sum);
    named_barrier_sync(barrier, 128);  // the last ones have been read
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32 % 4] = sum;
    named_barrier_sync(barrier, 128);
    if (threadIdx.x % 128 == 0) *to = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Between spans: H keeps n, dK adds its slice's <n, dn>. vector: as it enters (or, walking back, leaves) chunk c
template <class S>
__device__ __forceinline__ void scan_border_n(const ScanArgs &p, const ScanPlace &at, ScanShared<S> *sh,
                                              const float *vector, int c) {
    const int border = (c + S::REVERSE) / SCAN_BORDER - 1, borders = (at.all_chunks - 1) / SCAN_BORDER;
    if ((c + S::REVERSE) % SCAN_BORDER || border < 0 || border >= borders || S::LOCAL) return;
    float *kept = p.n_snapshots + ((size_t)at.bh * borders + border) * p.s.dk;
    if (S::MODE == SCAN_H && at.slice == 0)
        for (int k = threadIdx.x; k < p.s.dk; k += 128) kept[k] = vector[k];
    if (S::MODE != SCAN_DK) return;
    float sum = 0;
    for (int k = threadIdx.x; k < S::W && at.slice * S::W + k < p.s.dk; k += 128)
        sum += vector[k] * kept[at.slice * S::W + k];
    const int blocks = (at.all_chunks + SCAN_BORDER - 1) / SCAN_BORDER;
    scan_store_sum(&p.anchor[((size_t)(p.anchor_tile + at.slice) * gridDim.z + at.bh) * blocks + border], sum, sh->sums,
                   1);
}

// dK at the end of its walk: the same where the sequence begins
template <class S>
__device__ __forceinline__ void scan_start_n(const ScanArgs &p, const ScanPlace &at, ScanShared<S> *sh) {
    if (S::MODE != SCAN_DK || !at.last_segment || !p.entering.C) return;
    const float *n = p.entering.n + at.b * p.entering.row + (size_t)at.head * p.s.dk + at.slice * S::W;
    float sum = 0;
    named_barrier_sync(1, 128);
    for (int k = threadIdx.x; k < S::W && at.slice * S::W + k < p.s.dk; k += 128)
        sum += sh->vector[at.chunks % 3][k] * n[k];
    scan_store_sum(&p.anchor_start[(size_t)(p.anchor_tile + at.slice) * gridDim.z + at.bh], sum, sh->sums, 1);
}

// Weights the scores of chunk c and hands P, and for H the scale of the rows, to the state's warpgroups. q_n: see
// scan_rows_dot_n
template <class S>
__device__ __forceinline__ void scan_publish(const ScanArgs &p, float (&w)[32], ScanRows *rows, bool documents,
                                             unsigned panel, float2 q_n, float (&sig)[2]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    if (documents) scan_weights<S, true>(w, rows);
    else scan_weights<S, false>(w, rows);
    if (S::MODE == SCAN_H)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = 16 * warp + g + 8 * h;
            float sum = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) sum += w[4 * j + 2 * h] + w[4 * j + 2 * h + 1];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            if (t) continue;
            sig[h] = sum + rows->factor[row] * (h ? q_n.y : q_n.x);
            rows->out_scale[row] =
                p.s.sigmoid_gate ? 1 : __fdividef(1.0f, fmaxf(fabsf(sig[h]), rows->floor[row]) + p.s.eps);
        }
    const int row = 16 * warp + lane % 16;
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        matrices_store(panel + panel_piece(row, j + lane / 16), pack_two(w[4 * j], w[4 * j + 1]),
                       pack_two(w[4 * j + 2], w[4 * j + 3]), pack_two(w[4 * j + 4], w[4 * j + 5]),
                       pack_two(w[4 * j + 6], w[4 * j + 7]));
    fence_async_proxy();
}

template <class S>
__device__ __forceinline__ void scan_load_n(const ScanArgs &p, const ScanPlace &at, ScanShared<S> *sh) {
    const MlstmState initial = scan_initial<S>(p);
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * (S::V_COLS / 4) + (S::Z_VECTOR ? at.slice * S::W : 0);
    for (int k = 0; k < S::V_COLS / 32 && lane < 4; k++) {
        const int column = first + 8 * k + 2 * lane;
        const bool given = initial.C && column < p.s.dk;  // dk is even
        const float *from = initial.n + at.b * initial.row + (size_t)at.head * p.s.dk + column;
        scan_store_n<S>(sh, 0, k, given ? from[0] : 0, given ? from[1] : 0);
    }
}

template <class S>
__device__ __forceinline__ void scan_scores(const ScanArgs &p, const ScanPlace &at, unsigned char *smem,
                                            ScanShared<S> *sh) {
    const int tid = threadIdx.x, lane = tid % 32, NC = at.all_chunks;
    const unsigned base = shared_address(smem);
    const float *decay = p.gates.decay + (size_t)at.bh * NC, log2_s = -0.5f * __log2f((float)p.s.dk);
    if (S::VECTOR) scan_load_n<S>(p, at, sh);
    const bool loads = tid == 32 * S::LIGHT_WARP;
    for (int it = 0; loads && it < 2; it++) {
        if (it < S::X_AHEAD) scan_load_x<S>(p, at, base, sh, it);
        if (it < S::YZ_AHEAD) scan_load_yz<S>(p, at, base, sh, it);
    }
    __syncwarp();
    ScanRowValues next = scan_rows_load<S>(p, at, 0);
    for (int it = 0; it < at.chunks; it++) {
        const int slot = it % 2, c = scan_chunk<S>(at, it);
        const float keep = decay[c];
        ScanRows *rows = &sh->rows[slot];
        barrier_wait(scan_slot<2>(sh->p_empty, it), scan_parity<2>(it) ^ 1);
        const bool documents = scan_rows_store<S>(rows, next, log2_s, c);
        if (tid == 0) barrier_arrive(scan_slot<2>(sh->rows_full, it));
        next = scan_rows_load<S>(p, at, it + 1);
        if (S::VECTOR) scan_border_n<S>(p, at, sh, sh->vector[it % 3], c);

        const unsigned yz = S::AT_YZ + it % S::YZ_STAGES * (S::X_BYTES + S::Z_BYTES);
        if (!S::LOCAL) {
            const unsigned x = it % (S::X_STAGES ? S::X_STAGES : 1) * S::X_BYTES;
            float w[32];
            float2 q_n = {0, 0};
            float sig[2] = {0, 0};
            barrier_wait(scan_slot<S::X_STAGES>(sh->x_full, it), scan_parity<S::X_STAGES>(it));
            if (S::MODE == SCAN_H) q_n = scan_rows_dot_n<S>(smem + x, sh->split[slot]);
            barrier_wait(scan_slot<S::YZ_STAGES>(sh->yz_full, it), scan_parity<S::YZ_STAGES>(it));
#pragma unroll
            for (int k = 0; k < 32; k++) w[k] = 0;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < S::A / 16; k++) {
                const unsigned at_k = k / 4 * PANEL_BYTES + k % 4 * 32;
                wgmma_ss<0, 0>(w, wgmma_operand(base + x + at_k), wgmma_operand(base + yz + at_k), true);
            }
            wgmma_commit();
            wgmma_wait<0>();
            __syncwarp();
            if (lane == 0) barrier_arrive(scan_slot<S::X_STAGES>(sh->x_empty, it));
            scan_publish<S>(p, w, rows, documents, base + S::AT_P + slot * PANEL_BYTES, q_n, sig);
            __syncwarp();
            if (lane == 0) barrier_arrive(scan_slot<2>(sh->p_full, it));
            for (int h = 0; S::MODE == SCAN_H && h < 2; h++) {  // behind the fence, which would wait for it
                const int time = c * SCAN_CHUNK + tid / 32 * 16 + lane / 4 + 8 * h;
                if (at.slice == 0 && lane % 4 == 0 && time < p.s.T) p.gates.sig[(size_t)at.bh * p.s.T + time] = sig[h];
            }
        } else {
            barrier_wait(scan_slot<S::YZ_STAGES>(sh->yz_full, it), scan_parity<S::YZ_STAGES>(it));
        }
        if (S::VECTOR) scan_update_n<S>(sh, it, keep, smem + yz + (S::Y_VECTOR ? 0 : S::X_BYTES), rows->n_scale);
        __syncwarp();
        if (lane == 0) barrier_arrive(scan_slot<S::YZ_STAGES>(sh->yz_empty, it));
        if (loads) {  // as soon as the chunk that has the slot is done
            scan_load_x<S>(p, at, base, sh, it + S::X_AHEAD);
            scan_load_yz<S>(p, at, base, sh, it + S::YZ_AHEAD);
        }
        __syncwarp();
    }
    scan_start_n<S>(p, at, sh);
    const MlstmState final = scan_final<S>(p, at);
    if (!final.C || !S::Y_VECTOR || at.slice) return;
    named_barrier_sync(1, 128);
    for (int k = tid; k < p.s.dk; k += 128)
        final.n[at.b * final.row + (size_t)at.head * p.s.dk + k] = sh->vector[at.chunks % 3][k];
}

// ----------------------------------------------------------------------------------------------------------------
// The state's warpgroups. A thread's M[b][4j + 2h + e] is element (w, a) of M^T with w = scan_row() + 8h,
// a = first_a + 8j + 2t + e.

template <class S>
__device__ __forceinline__ int scan_row(const ScanPlace &at, int wg, int b) {
    return at.slice * S::W + (S::SPLIT ? 0 : (wg * S::BLOCKS + b) * 64) + threadIdx.x / 32 % 4 * 16 +
           threadIdx.x % 32 / 4;
}

// element(w, a, M element) for all that a thread holds and the head has. 16 at a time: the compiler would rather have
// the addresses of all of them at hand, and spill.
template <class S, typename Element>
__device__ __forceinline__ void scan_each_element(const ScanArgs &p, const ScanPlace &at, int wg,
                                                  float (&M)[S::BLOCKS][S::AW / 2], Element element) {
    const int a_width = S::TRANSPOSED ? p.s.dv : p.s.dk, w_width = S::TRANSPOSED ? p.s.dk : p.s.dv;
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < S::AW / 2; i++) {
            const int w = scan_row<S>(at, wg, b) + i / 2 % 2 * 8;
            const int a = (S::SPLIT ? wg * S::AW : 0) + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
            if (w < w_width && a < a_width) element(w, a, M[b][i]);
            if (i % 16 == 15) asm volatile("" ::: "memory");
        }
}

template <class S>
__device__ __forceinline__ void scan_load_state(const ScanArgs &p, const ScanPlace &at, int wg,
                                                float (&M)[S::BLOCKS][S::AW / 2]) {
    const MlstmState initial = scan_initial<S>(p);
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < S::AW / 2; i++) M[b][i] = 0;
    if (!initial.C) return;
    float *C = initial.C + at.b * initial.row + (size_t)at.head * p.s.dk * p.s.dv;
    scan_each_element<S>(p, at, wg, M, [&](int w, int a, float &x) { x = *scan_element<S>(C, p.s, w, a); });
}

template <class S>
__device__ __forceinline__ void scan_store_state(const ScanArgs &p, const ScanPlace &at, int wg,
                                                 float (&M)[S::BLOCKS][S::AW / 2]) {
    const MlstmState final = scan_final<S>(p, at);
    if (!final.C) return;
    float *C = final.C + at.b * final.row + (size_t)at.head * p.s.dk * p.s.dv;
    scan_each_element<S>(p, at, wg, M, [&](int w, int a, float &x) { *scan_element<S>(C, p.s, w, a) = x; });
}

// Between spans: H keeps its registers in bf16; dV, whose registers lie the same way, adds <C, dC> of its part.
template <class S>
__device__ __forceinline__ void scan_border_state(const ScanArgs &p, const ScanPlace &at, int wg, ScanShared<S> *sh,
                                                  const float (&M)[S::BLOCKS][S::AW / 2], int c) {
    const int border = (c + S::REVERSE) / SCAN_BORDER - 1, borders = (at.all_chunks - 1) / SCAN_BORDER;
    if (S::TRANSPOSED || S::LOCAL || (c + S::REVERSE) % SCAN_BORDER || border < 0 || border >= borders) return;
    constexpr int WORDS = S::BLOCKS * S::AW / 4;
    const size_t part = (((size_t)at.bh * borders + border) * gridDim.x + at.slice) * 2 + wg;
    uint32_t *kept = p.snapshots + part * WORDS * 128 + threadIdx.x % 128;
    float sum = 0;
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < S::AW / 4; i++) {
            uint32_t *word = kept + (b * (S::AW / 4) + i) * 128;
            if (S::MODE == SCAN_H) {
                *word = pack_two(M[b][2 * i], M[b][2 * i + 1]);
            } else {
                const float2 C = unpack_two(*word);
                sum += C.x * M[b][2 * i] + C.y * M[b][2 * i + 1];
            }
        }
    if (S::MODE == SCAN_H) return;
    const int blocks = (at.all_chunks + SCAN_BORDER - 1) / SCAN_BORDER;
    scan_store_sum(&p.anchor[((size_t)(p.anchor_tile + 2 * at.slice + wg) * gridDim.z + at.bh) * blocks + border], sum,
                   sh->sums + 4 * wg, 2 + wg);
}

// dV at the end of its walk: the same where the sequence begins
template <class S>
__device__ __forceinline__ void scan_start_state(const ScanArgs &p, const ScanPlace &at, int wg, ScanShared<S> *sh,
                                                 float (&M)[S::BLOCKS][S::AW / 2]) {
    if (S::MODE != SCAN_DV || S::LOCAL || !at.last_segment || !p.entering.C) return;
    float *C = p.entering.C + at.b * p.entering.row + (size_t)at.head * p.s.dk * p.s.dv, sum = 0;
    scan_each_element<S>(p, at, wg, M, [&](int w, int a, float &x) { sum += x * *scan_element<S>(C, p.s, w, a); });
    scan_store_sum(&p.anchor_start[(size_t)(p.anchor_tile + 2 * at.slice + wg) * gridDim.z + at.bh], sum,
                   sh->sums + 4 * wg, 2 + wg);
}

// out^T [64, 64 tokens] = factor * M^T X^T; M^T rounded to bf16, 32 columns at a time: registers are scarce
template <class S>
__device__ __forceinline__ void scan_ask_state(float (&out)[32], const float (&M)[S::AW / 2], unsigned x,
                                               const float *factor) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int part = 0; part < S::AW / 32; part++) {
        unsigned a[2][4];
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int i = 16 * part + 8 * k + 2 * r;
                a[k][r] = pack_two(M[i], M[i + 1]);
            }
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2; k++)
            wgmma_rs<0>(out, a[k], wgmma_operand(x + part / 2 * PANEL_BYTES + part % 2 * 64 + 32 * k), part + k > 0);
        wgmma_commit();
        if (part) wgmma_wait<1>();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float2 by = *(const float2 *)&factor[8 * j + 2 * t];
        out[4 * j] *= by.x, out[4 * j + 1] *= by.y, out[4 * j + 2] *= by.x, out[4 * j + 3] *= by.y;
    }
}

// M^T = decay M^T + (scale Z)^T Y. z: the panel of these 64 rows of M^T
template <class S>
__device__ __forceinline__ void scan_update_state(float (&M)[S::AW / 2], float decay, const float *scale, unsigned z,
                                                  unsigned y) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, t = lane % 4;
    const unsigned from = z + panel_piece(lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2);
    unsigned a[4][4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        ldmatrix_trans(a[k], from + k * 2048);
        const float2 lo = *(const float2 *)(scale + 16 * k + 2 * t), hi = *(const float2 *)(scale + 16 * k + 8 + 2 * t);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float2 two = unpack_two(a[k][r]), by = r < 2 ? lo : hi;
            a[k][r] = pack_two(two.x * by.x, two.y * by.y);
        }
    }
#pragma unroll
    for (int i = 0; i < S::AW / 2; i++) M[i] *= decay;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_rs<1>(M, a[k], wgmma_operand(y + k * 2048), true);
    wgmma_commit();
}

// out += the other warpgroup's half of the contraction (W = 64)
template <class S>
__device__ __forceinline__ void scan_add_halves(float (&out)[32], float *red, int wg, int it, int chunks) {
    const int tid = threadIdx.x % 128;
    if (wg == 1) {
        if (it > 0) named_barrier_sync(5, 256);  // the last one has been read
#pragma unroll
        for (int i = 0; i < 32; i++) red[i * 128 + tid] = out[i];
        named_barrier_arrive(4, 256);
    } else {
        named_barrier_sync(4, 256);
#pragma unroll
        for (int i = 0; i < 32; i++) out[i] += red[i * 128 + tid];
        if (it + 1 < chunks) named_barrier_arrive(5, 256);
    }
}

// Row sums of out * dot over these 64 rows of out^T, for the 64 tokens; the dot operand lies where out will be stored
template <class S>
__device__ __forceinline__ void scan_row_dots(const float (&out)[32], unsigned panel, float (*sums)[64]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, t = lane % 4;
    const unsigned piece = 2 * warp + lane / 8 % 2;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        unsigned with[4];
        ldmatrix_trans(with, panel + panel_piece(8 * (j + lane / 16) + lane % 8, piece));
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float2 top = unpack_two(with[2 * k]), low = unpack_two(with[2 * k + 1]);
            const float *x = out + 4 * (j + k);
            float2 sum = {x[0] * top.x + x[2] * low.x, x[1] * top.y + x[3] * low.y};
#pragma unroll
            for (int d = 4; d < 32; d *= 2) {
                sum.x += __shfl_xor_sync(0xffffffffu, sum.x, d);
                sum.y += __shfl_xor_sync(0xffffffffu, sum.y, d);
            }
            if (lane < 4) *(float2 *)&sums[warp][8 * (j + k) + 2 * t] = sum;
        }
    }
}

// The sums of the four warps to memory: after a barrier of the warpgroup
template <class S>
__device__ __forceinline__ void scan_store_dots(const ScanArgs &p, const ScanPlace &at, const float (*sums)[64], int wg,
                                                int c) {
    const int i = threadIdx.x % 128, time = c * SCAN_CHUNK + i;
    const int tile = at.slice * (S::W / 64) + (S::SPLIT ? 0 : wg);
    if (i < 64 && time < p.s.T)
        p.dot_out[((size_t)tile * gridDim.z + at.bh) * p.s.T + time] =
            (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
}

// Scales out^T, transposes it into its panel of shared memory and sends it off.
template <class S>
__device__ __forceinline__ void scan_output(const ScanArgs &p, const ScanPlace &at, float (&out)[32], unsigned panel,
                                            ScanShared<S> *sh, int wg, int b, int it) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, t = lane % 4, c = scan_chunk<S>(at, it);
    const ScanRows *rows = &sh->rows[it % 2];
    const bool elected = threadIdx.x % 128 == 0;
    if (S::MODE == SCAN_H)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 by = *(const float2 *)&rows->out_scale[8 * j + 2 * t];
            out[4 * j] *= by.x, out[4 * j + 1] *= by.y, out[4 * j + 2] *= by.x, out[4 * j + 3] *= by.y;
        }
    if (S::TRANSPOSED) {
        const int w = 16 * warp + lane / 4 + (S::SPLIT ? 0 : wg * 64);
        const float n0 = sh->vector[it % 3][w], n1 = sh->vector[it % 3][w + 8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 by = *(const float2 *)&rows->border[8 * j + 2 * t];
            out[4 * j] += by.x * n0, out[4 * j + 1] += by.y * n0;
            out[4 * j + 2] += by.x * n1, out[4 * j + 3] += by.y * n1;
        }
        barrier_wait(shared_address(sh->dot_full + wg), it & 1);
        scan_row_dots<S>(out, panel, sh->dots[wg][it % 2]);
    } else {
        if (elected) tma_store_wait_read<S::BLOCKS - 1>();
        named_barrier_sync(2 + wg, 128);
    }
    const unsigned piece = 2 * warp + lane / 8 % 2;
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        matrices_store_transposed(panel + panel_piece(8 * (j + lane / 16) + lane % 8, piece),
                                  pack_two(out[4 * j], out[4 * j + 1]), pack_two(out[4 * j + 2], out[4 * j + 3]),
                                  pack_two(out[4 * j + 4], out[4 * j + 5]), pack_two(out[4 * j + 6], out[4 * j + 7]));
    fence_async_proxy();
    named_barrier_sync(2 + wg, 128);
    if (elected)
        tma_store(&p.out, panel, at.slice * S::W + (S::SPLIT ? 0 : (wg * S::BLOCKS + b) * 64), at.head, c * SCAN_CHUNK,
                  at.b);
    if (S::TRANSPOSED)
        scan_store_dots<S>(p, at, sh->dots[wg][it % 2], wg, c);  // behind the fence, which would wait for it
}

// The operand of the row sums comes into the panel that out leaves from
template <class S>
__device__ __forceinline__ void scan_load_dot(const ScanArgs &p, const ScanPlace &at, unsigned panel, ScanShared<S> *sh,
                                              int wg, int it) {
    const unsigned full = shared_address(sh->dot_full + wg);
    tma_store_wait_read<0>();
    barrier_arrive_expect(full, PANEL_BYTES);
    tma_load(panel, &p.dot, full, at.slice * S::W + (S::SPLIT ? 0 : wg * 64), at.head,
             scan_chunk<S>(at, it) * SCAN_CHUNK, at.b);
}

// One chunk: of block b of 64 rows of M^T
template <class S>
__device__ __forceinline__ void scan_step(const ScanArgs &p, const ScanPlace &at, unsigned char *smem,
                                          ScanShared<S> *sh, float (&M)[S::AW / 2], float decay, int wg, int b,
                                          int it) {
    const unsigned base = shared_address(smem), half = S::SPLIT ? wg * (S::AW / 64) * PANEL_BYTES : 0;
    const unsigned yz = base + S::AT_YZ + it % S::YZ_STAGES * (S::X_BYTES + S::Z_BYTES);
    const int rows_panel = S::SPLIT ? 0 : wg * S::BLOCKS + b;
    const unsigned z = yz + S::X_BYTES + rows_panel * PANEL_BYTES, panel = base + S::AT_OUT + rows_panel * PANEL_BYTES;
    const ScanRows *rows = &sh->rows[it % 2];
    const bool last = b == S::BLOCKS - 1, writes = !S::SPLIT || wg == 0;
    float out[32];
    barrier_wait(scan_slot<2>(sh->rows_full, it), scan_parity<2>(it));
    if (!S::LOCAL) {
        barrier_wait(scan_slot<S::X_STAGES>(sh->x_full, it), scan_parity<S::X_STAGES>(it));
        scan_ask_state<S>(out, M, base + it % (S::X_STAGES ? S::X_STAGES : 1) * S::X_BYTES + half, rows->factor);
        if (last && threadIdx.x % 32 == 0) barrier_arrive(scan_slot<S::X_STAGES>(sh->x_empty, it));
        __syncwarp();
    }
    barrier_wait(scan_slot<S::YZ_STAGES>(sh->yz_full, it), scan_parity<S::YZ_STAGES>(it));
    scan_update_state<S>(M, decay, rows->scale, z, yz + half);
    if (!S::LOCAL) {
        constexpr int STEPS = S::SPLIT ? 2 : 4;  // of 16 tokens; two warpgroups of one output take half of them each
        const int first = S::SPLIT ? wg * STEPS : 0;
        const unsigned scores = base + S::AT_P + it % 2 * PANEL_BYTES;
        barrier_wait(scan_slot<2>(sh->p_full, it), scan_parity<2>(it));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < STEPS; k++)
            wgmma_ss<1, 0>(out, wgmma_operand(z + (first + k) * 2048), wgmma_operand(scores + 32 * (first + k)), true);
        wgmma_commit();
    }
    wgmma_wait<0>();
    if (last) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(scan_slot<S::YZ_STAGES>(sh->yz_empty, it));
    }
    if (S::LOCAL) return;
    if (S::SPLIT) scan_add_halves<S>(out, (float *)(smem + S::AT_RED), wg, it, at.chunks);
    if (writes) scan_output<S>(p, at, out, panel, sh, wg, b, it);
}

template <class S>
__device__ __forceinline__ void scan_states(const ScanArgs &p, const ScanPlace &at, unsigned char *smem,
                                            ScanShared<S> *sh) {
    const int wg = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1;  // known to be the same in the whole warp
    const unsigned base = shared_address(smem);
    const bool elected = threadIdx.x % 128 == 0;
    const float *decay = p.gates.decay + (size_t)at.bh * at.all_chunks;
    float M[S::BLOCKS][S::AW / 2];
    scan_load_state<S>(p, at, wg, M);
    float next_decay = decay[scan_chunk<S>(at, 0)];
    for (int it = 0; it < at.chunks; it++) {
        const int c = scan_chunk<S>(at, it);
        const float keep = next_decay;
        if (it + 1 < at.chunks) next_decay = decay[scan_chunk<S>(at, it + 1)];
        if (S::TRANSPOSED && elected && (!S::SPLIT || wg == 0))
            scan_load_dot<S>(p, at, base + S::AT_OUT + wg * PANEL_BYTES, sh, wg, it);
        __syncwarp();
        scan_border_state<S>(p, at, wg, sh, M, c);
#pragma unroll
        for (int b = 0; b < S::BLOCKS; b++) scan_step<S>(p, at, smem, sh, M[b], keep, wg, b, it);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(scan_slot<2>(sh->p_empty, it));
    }
    scan_start_state<S>(p, at, wg, sh, M);
    scan_store_state<S>(p, at, wg, M);
    if (elected) tma_store_wait_read<0>();
}

// ----------------------------------------------------------------------------------------------------------------
// The kernel: a block a slice (x), segment (y) and head (z)

enum { SCAN_SCORES_REGISTERS = 72, SCAN_STATE_REGISTERS = 216 };

template <class S>
static __global__ void __launch_bounds__(SCAN_THREADS, 1) mlstm_scan_kernel(const __grid_constant__ ScanArgs p) {
#ifdef HOPPER_CODE
    extern __shared__ unsigned char shared_raw[];
    unsigned char *smem = shared_raw + (1024 - shared_address(shared_raw) % 1024) % 1024;
    ScanShared<S> *sh = (ScanShared<S> *)(smem + S::AT_SHARED);
    ScanPlace at;
    at.all_chunks = (p.s.T + SCAN_CHUNK - 1) / SCAN_CHUNK;
    at.bh = blockIdx.z, at.b = at.bh / p.s.NH, at.head = at.bh % p.s.NH, at.slice = blockIdx.x;
    at.first_chunk = blockIdx.y * p.segment_chunks;
    at.chunks = min(p.segment_chunks, at.all_chunks - at.first_chunk);
    at.last_segment = blockIdx.y == (S::REVERSE ? 0 : gridDim.y - 1);
    if (S::LOCAL && at.last_segment) return;  // nobody asks for what it adds
    if (threadIdx.x == 0) {
        for (int k = 0; k < 3; k++) {
            barrier_init(shared_address(sh->x_full + k), 1);
            barrier_init(shared_address(sh->yz_full + k), 1);
            barrier_init(shared_address(sh->x_empty + k), 12);  // warps
            barrier_init(shared_address(sh->yz_empty + k), 12);
        }
        for (int k = 0; k < 2; k++) {
            barrier_init(shared_address(sh->rows_full + k), 1);
            barrier_init(shared_address(sh->dot_full + k), 1);
            barrier_init(shared_address(sh->p_full + k), 4);
            barrier_init(shared_address(sh->p_empty + k), 8);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<SCAN_SCORES_REGISTERS>();
        scan_scores<S>(p, at, smem, sh);
    } else {
        registers_grow<SCAN_STATE_REGISTERS>();
        scan_states<S>(p, at, smem, sh);
    }
#endif
}

// ----------------------------------------------------------------------------------------------------------------
// Which shapes, and the launches

enum { SCAN_BLOCKS = 132 };  // multiprocessors of an H100: one block each

static __device__ int scan_code =
#ifdef HOPPER_CODE
    1;
#else
    0;
#endif

// 1 if this GPU is a Hopper and the program was built for it (sm_90a). Not while a graph is captured.
MAYBE_UNUSED
static int scan_runs_here(void) {
    static int known = -1;
    if (known >= 0) return known;
    int device, major;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    known = 0;
    if (major == 9) CUDA_CHECK(cudaMemcpyFromSymbol(&known, scan_code, sizeof known));
    return known;
}

// The chunk that goes with the kernels for this shape: SCAN_CHUNK for those of this file. ld: of q, k, v and gradients.
template <typename F>
static int mlstm_chunk(int dk, int dv, size_t ld) {
    const bool fits = sizeof(F) == 2 && dk % 8 == 0 && dv % 8 == 0 && ld % 8 == 0 && dk <= 256 && dv <= 512;
    return fits && scan_runs_here() ? SCAN_CHUNK : MLSTM_CHUNK;
}

// A of a contracted width, and W that goes with it: the state of a slice fills the registers of two warpgroups
constexpr int scan_pad(int width, bool transposed) {
    return width <= 64 && !transposed ? 64
           : width <= 128             ? 128
           : width <= 192             ? 192
           : width <= 256             ? 256
           : width <= 384             ? 384
                                      : 512;
}
constexpr int scan_columns(int A, bool transposed) {
    return transposed ? (A == 128 || A >= 384 ? 64 : 128) : A == 128 ? 256 : 128;
}
static int scan_slices(const MlstmShape *s, bool transposed) {
    return transposed ? ceil_div(s->dk, scan_columns(scan_pad(s->dv, true), true))
                      : ceil_div(s->dv, scan_columns(scan_pad(s->dk, false), false));
}

// Chunks a segment: as many segments as fill the multiprocessors where there are fewer blocks than half of them
static int scan_segment_chunks(const MlstmShape *s) {
    const int blocks = scan_slices(s, false) * s->B * s->NH, chunks = mlstm_chunks(s);
    const int segments = imin(SCAN_BLOCKS / blocks, chunks / 8);
    return ceil_div(chunks, segments > 1 ? segments : 1);
}
// Segments x sequences x heads x slices are at most SCAN_BLOCKS where there are segments at all.
static size_t scan_segments_floats(const MlstmShape *s) {
    return (size_t)(SCAN_BLOCKS / scan_slices(s, false) + 1) * s->dk * (s->dv + 1);
}
static size_t scan_snapshot_words(const MlstmShape *s) {
    const int A = scan_pad(s->dk, false);
    return (size_t)s->B * s->NH * (mlstm_chunks(s) / SCAN_BORDER) * scan_slices(s, false) * A * scan_columns(A, false) /
           2;
}
static int scan_anchor_tiles(const MlstmShape *s) { return 2 * scan_slices(s, false) + scan_slices(s, true); }

template <int MODE, int A, bool LOCAL>
static void scan_launch(const ScanArgs &p, cudaStream_t stream) {
    constexpr bool TRANSPOSED = MODE == SCAN_DQ || MODE == SCAN_DK;
    typedef Scan<MODE, A, scan_columns(A, TRANSPOSED), LOCAL> S;
    constexpr size_t bytes = scan_shared_bytes<S>();
    static_assert(bytes <= 227 * 1024, "shared memory of a block");
    dim3 grid((unsigned)scan_slices(&p.s, TRANSPOSED), (unsigned)ceil_div(mlstm_chunks(&p.s), p.segment_chunks),
              (unsigned)(p.s.B * p.s.NH));
    CUDA_CHECK(cudaFuncSetAttribute(mlstm_scan_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    mlstm_scan_kernel<S><<<grid, SCAN_THREADS, bytes, stream>>>(p);
    LAUNCH_CHECK();
}

template <int MODE, bool LOCAL>
static void scan_run(const ScanArgs &p, cudaStream_t stream) {
    constexpr bool TRANSPOSED = MODE == SCAN_DQ || MODE == SCAN_DK;
    const int A = scan_pad(TRANSPOSED ? p.s.dv : p.s.dk, TRANSPOSED);
    if constexpr (TRANSPOSED) {
        if (A == 384) return scan_launch<MODE, 384, LOCAL>(p, stream);
        if (A == 512) return scan_launch<MODE, 512, LOCAL>(p, stream);
    } else if (A == 64) {
        return scan_launch<MODE, 64, LOCAL>(p, stream);
    }
    if (A == 128) return scan_launch<MODE, 128, LOCAL>(p, stream);
    if (A == 192) return scan_launch<MODE, 192, LOCAL>(p, stream);
    scan_launch<MODE, 256, LOCAL>(p, stream);
}

// The states that enter the segments, if there are any; p as for the scan itself
template <int MODE>
static void scan_segments(ScanArgs *p, float *segments, cudaStream_t stream) {
    constexpr bool REVERSE = MODE == SCAN_DV;
    const MlstmShape *s = &p->s;
    p->segment_chunks = scan_segment_chunks(s);
    const int count = ceil_div(mlstm_chunks(s), p->segment_chunks);
    p->segments = count > 1 ? segments : NULL;
    if (count == 1) return;
    scan_run<MODE, true>(*p, stream);
    mlstm_segments<REVERSE>(s, segments, p->gates.decay, p->initial, count, p->segment_chunks, stream);
}

typedef struct {          // what H leaves for dV and dK
    uint32_t *snapshots;  // [scan_snapshot_words]
    float *n_snapshots;   // [B, NH, borders, dk]
} ScanSaved;

static ScanArgs scan_args(const MlstmShape &s, const MlstmInput<bf16> &in, const MlstmGates &gates,
                          const ScanSaved &saved) {
    ScanArgs p;
    memset((void *)&p, 0, sizeof p);
    p.s = s, p.gates = gates, p.doc_start = in.doc_start;
    p.snapshots = saved.snapshots, p.n_snapshots = saved.n_snapshots;
    return p;
}

// h [B, T, NH, dv]; see mlstm_forward. segments [scan_segments_floats].
static void mlstm_scan_forward(const MlstmShape &s, const MlstmInput<bf16> &in, MlstmState initial, MlstmState final,
                               bf16 *h, const MlstmGates &gates, const ScanSaved &saved, float *segments,
                               cudaStream_t stream) {
    ScanArgs p = scan_args(s, in, gates, saved);
    p.initial = initial, p.final = final;
    p.x = head_tensor_map(in.q, s.B, s.T, s.NH, s.dk, in.ld);
    p.y = head_tensor_map(in.k, s.B, s.T, s.NH, s.dk, in.ld);
    p.z = head_tensor_map(in.v, s.B, s.T, s.NH, s.dv, in.ld);
    p.out = head_tensor_map(h, s.B, s.T, s.NH, s.dv, (size_t)s.NH * s.dv);
    scan_segments<SCAN_H>(&p, segments, stream);
    scan_run<SCAN_H, false>(p, stream);
}

typedef struct {                // of the backward pass
    const float *inv_den, *ds;  // [B, NH, T]
    float *q_dq, *k_dk;         // [ceil(dk / 64)][B, NH, T]
    float *anchor;              // [scan_anchor_tiles][B, NH, spans]
    float *anchor_start;        // [scan_anchor_tiles][B, NH]
    float *segments, *segments_back;
} ScanScratch;

// dq, dk, dv: rows ld_grad apart; dh [B, T, NH, dv]; see mlstm_backward
static void mlstm_scan_backward(const MlstmShape &s, const MlstmInput<bf16> &in, MlstmState initial, const bf16 *dh,
                                bf16 *dq, bf16 *dk, bf16 *dv, size_t ld_grad, const MlstmGates &gates,
                                const ScanSaved &saved, const ScanScratch &scratch, cudaStream_t stream) {
    ScanArgs p = scan_args(s, in, gates, saved);
    p.inv_den = scratch.inv_den, p.ds = scratch.ds, p.anchor = scratch.anchor;
    p.entering = initial, p.anchor_start = scratch.anchor_start;
    const CUtensorMap q_map = head_tensor_map(in.q, s.B, s.T, s.NH, s.dk, in.ld);
    const CUtensorMap k_map = head_tensor_map(in.k, s.B, s.T, s.NH, s.dk, in.ld);
    const CUtensorMap v_map = head_tensor_map(in.v, s.B, s.T, s.NH, s.dv, in.ld);
    const CUtensorMap dh_map = head_tensor_map(dh, s.B, s.T, s.NH, s.dv, (size_t)s.NH * s.dv);

    p.x = k_map, p.y = q_map, p.z = dh_map;
    p.out = head_tensor_map(dv, s.B, s.T, s.NH, s.dv, ld_grad);
    scan_segments<SCAN_DV>(&p, scratch.segments_back, stream);
    scan_run<SCAN_DV, false>(p, stream);

    p.x = v_map, p.y = dh_map, p.z = q_map, p.dot = k_map;
    p.out = head_tensor_map(dk, s.B, s.T, s.NH, s.dk, ld_grad);
    p.anchor_tile = 2 * scan_slices(&s, false), p.dot_out = scratch.k_dk;
    scan_run<SCAN_DK, false>(p, stream);

    p.x = k_map, p.y = k_map, p.z = v_map, p.initial = initial;  // what each segment adds to C, once more
    scan_segments<SCAN_H>(&p, scratch.segments, stream);
    p.x = dh_map, p.y = v_map, p.z = k_map, p.dot = q_map;
    p.out = head_tensor_map(dq, s.B, s.T, s.NH, s.dk, ld_grad);
    p.dot_out = scratch.q_dq;
    scan_run<SCAN_DQ, false>(p, stream);
}

#endif
