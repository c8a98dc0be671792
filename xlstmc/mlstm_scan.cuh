// mlstm_scan.cuh: the chunkwise mLSTM on Hopper, in bf16: one walk, four uses (formulas: doc/math.md 3.4, 4).
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
// H and dQ walk forward, dV and dK backward. The state never leaves the multiprocessor. A block has four warpgroups and
// holds a slice of W columns of one head's state, transposed, in the accumulators of two of them:
//
//   scores    X Y^T (64 x 64), weights, P in bf16 to shared memory, a chunk ahead of the states. H: <q, n>, with n in
//             three parts as further keys, and the n of the next chunk, Y^T times the tokens' weights. dQ: <dh, h> of
//             the rows, if it is not given and one slice has all of a head
//   state 0,1 out^T = M^T X^T with the accumulators themselves, rounded to bf16, as register operand; M^T += (scale *
//             Z)^T Y, fed from registers too; out^T += Z^T P^T. Where W = 64 both share the rows and halve A,
//             exchange their parts of out through shared memory and finish half of the tokens each; else each has
//             its own rows of M^T. dQ, dK: n or dn of these rows, one more product with the same operand
//   aux       a warp starts the copies of X, Y, Z by TMA; two compute the rows' scalars from the gates; dV and
//             dK: one adds up <C, dC> and <n, dn> between spans
//
// X and Y take turns in one ring of tiles, as many as fit; Z has its own, and H and dV write their result over Z, from
// where TMA stores it. Long sequences of few heads are cut into segments (grid.y), whose entering states
// mlstm_segments.cuh makes; dQ finds them among the snapshots of H. A chunk is a chain of waits, so reads of shared
// memory, which take some 190 cycles beside the products, are asked for together and used late.
//
// Cost of a chunk and slice, in cycles of the tensor cores (2,048 multiply-adds): 2 A for the scores, 2 A W / 64 for
// the state's answer, 2 W for P Z, 2 A W / 64 for the update; 2,816 at A = 128, W = 256 and the other way round. Bytes:
// every input and output once from memory where the slices of a head run side by side, and 4 A W / 128 a token for
// snapshots, if there are any. With PATHS the state's answer and update take twice the cycles. Registers of a thread:
// state 128 (M) + 32 (out) + operands, 208 in all; scores 64 or 72, aux 32 or 24. Shared memory: up to 227 KB.
#ifndef XLSTMC_MLSTM_SCAN_CUH
#define XLSTMC_MLSTM_SCAN_CUH

#include "hopper.cuh"
#include "mlstm_pairs.cuh"
#include "mma.cuh"

enum { SCAN_H, SCAN_DQ, SCAN_DK, SCAN_DV };
enum { SCAN_THREADS = 512, SCAN_BORDER = MLSTM_SPAN / SCAN_CHUNK };  // chunks from one snapshot of C to the next

// A of a contracted width, and W that goes with it: the state of a slice fills the registers of two warpgroups
__host__ __device__ constexpr int scan_pad(int width, bool transposed) {
    return width <= 64 && !transposed ? 64
           : width <= 128             ? 128
           : width <= 192             ? 192
           : width <= 256             ? 256
           : width <= 384             ? 384
                                      : 512;
}
__host__ __device__ constexpr int scan_columns(int A, bool transposed) {
    return transposed ? (A == 128 || A >= 384 ? 64 : 128) : A == 128 ? 256 : 128;
}

// dQ and dK ask M rounded to bf16; dK of the sigmoid gate asks a third of it in two parts; for row sums that need no
// anchors both ask and update all of it in two parts (scan_has_paths).
enum { SCAN_ROUNDED, SCAN_THIRDS, SCAN_PATHS };

template <int MODE_, int A_, int W_, int EXACT = SCAN_ROUNDED>
struct Scan {
    static constexpr int MODE = MODE_, A = A_, W = W_;
    static constexpr bool THIRDS = EXACT == SCAN_THIRDS, PATHS = EXACT == SCAN_PATHS;
    static constexpr bool REVERSE = MODE == SCAN_DK || MODE == SCAN_DV;     // in time
    static constexpr bool TRANSPOSED = MODE == SCAN_DQ || MODE == SCAN_DK;  // contracted dv, output dk
    static constexpr bool SPLIT = W == 64;                                  // the state's warpgroups halve A, not W
    static constexpr int BLOCKS = SPLIT ? 1 : W / 128;                      // of 64 rows of M^T a warpgroup
    static constexpr int AW = SPLIT ? A / 2 : A;                            // columns of M^T a warpgroup
    // M takes in scaled rows of Z in two parts, x and what rounding x lost. In H of wider heads a later row gives that
    // back (scan_spread_rows): no more products, but a less exact C where keys have nothing in common, and all
    // gradients of narrow heads start from C.
    static constexpr bool BOTH_PARTS = PATHS || (MODE == SCAN_H && A == 64), SPREADS = MODE == SCAN_H && A > 64;
    // Products on their way in scan_ask_state
    static constexpr int AHEAD = BLOCKS == 2 || PATHS || (MODE == SCAN_DQ && AW > 192) ? 1 : AW > 192 ? 2 : 3;
    static constexpr bool DECAYS_EARLY = BLOCKS == 1 && MODE != SCAN_DV;  // dV still wants M for its snapshots
    static constexpr int TILE = A * PANEL_ROW, Z_BYTES = W * PANEL_ROW;   // X or Y, Z of 64 tokens
    // The normaliser, n = sum of scale y, by the scores (H); the slice's part of n (dQ) or dn (dK) = sum of by scale z,
    // by = 1 or ds / inv_den: by the states, of the rows of M^T that they have
    static constexpr bool NORMALISER = MODE != SCAN_DV;
    static constexpr int WEIGHTS = !NORMALISER ? 0 : MODE == SCAN_H ? A / 64 : 1;  // scan_at_weights
    static constexpr int SHARED = 227 * 1024, MAX_TILES = 10;
    // Of a thread, by setmaxnreg. The scores of H have the normaliser, too
    static constexpr int STATE_REGISTERS = 208, SCORES_REGISTERS = MODE == SCAN_H ? 72 : 64,
                         AUX_REGISTERS = MODE == SCAN_H ? 24 : 32;
    static constexpr int Z_STAGES = !TRANSPOSED ? 3 : A > 384 ? 1 : 2;
    // The operand of the row sums, a chunk ahead where there is room, then out. KEYS: n as the operand of <q, n>
    static constexpr int OUT_STAGES = !TRANSPOSED ? 0 : A > 384 ? 1 : 2;
    static constexpr int OUT_BYTES = W * PANEL_ROW, KEYS_BYTES = MODE == SCAN_H ? A / 64 * 1024 : 0;
    // Snapshots on their way to mlstm_narrow.cuh (scan_keep_panel)
    static constexpr int KEPT_BYTES = MODE == SCAN_H && A == 64 ? 2 * PANEL_BYTES : 0;
    // For ScanShared
    static constexpr int SCALARS = MODE == SCAN_H ? 4096 + 8 * A : TRANSPOSED && !SPLIT ? 9 * 1024 : 7 * 1024;
    static constexpr int ROOM = SHARED - SCALARS - Z_STAGES * Z_BYTES - PANEL_BYTES - OUT_STAGES * OUT_BYTES -
                                KEYS_BYTES - 2 * WEIGHTS * 1024 - KEPT_BYTES;
    static constexpr int TILES = ROOM / TILE < MAX_TILES ? ROOM / TILE : MAX_TILES;  // of X and Y
    static constexpr int AT_Z = TILES * TILE, AT_P = AT_Z + Z_STAGES * Z_BYTES, AT_OUT = AT_P + PANEL_BYTES,
                         AT_KEYS = AT_OUT + OUT_STAGES * OUT_BYTES, AT_WEIGHTS = AT_KEYS + KEYS_BYTES,
                         AT_KEPT = AT_WEIGHTS + 2 * WEIGHTS * 1024, AT_H = AT_KEPT + KEPT_BYTES;
    // dQ with dv up to 256 and one slice makes <dh, h> (scan_make_dots), from rows of h behind all else: two times four
    // of a warp's. With less dv that takes as long as reading dh and h before, with more there are several slices
    static constexpr bool MAKES_DOTS = MODE == SCAN_DQ && A == 256;
    static constexpr int H_STAGES = 2, H_BYTES = 4 * A * 2;
    static constexpr int AT_SHARED = AT_H + (MAKES_DOTS ? 4 * H_STAGES * H_BYTES : 0);
    // Arrivals that free a tile, a stage of Z, P, the scalars of a chunk
    static constexpr int TILE_USERS = 12,
                         Z_USERS = !TRANSPOSED ? 2
                                   : SPLIT     ? 4
                                               : 8,
                         P_USERS = SPLIT ? 4 : 8, ROWS_USERS = 12;
    static_assert(AW % 64 == 0 && BLOCKS * AW <= 256, "the state fits the registers");
    static_assert(TILES >= 3, "X, Y and the next X fit");
    static_assert(AT_SHARED + SCALARS <= SHARED, "all fits");
};

struct ScanArgs {
    CUtensorMap x, y, z, out, dot;  // dot: dQ: Q, dK: K, laid out as out
    MlstmShape s;
    MlstmGates gates;
    float *inv_den, *ds;         // [B, NH, T], backward; made by dQ if it has h, else given
    const bf16 *h;               // [B, T, NH, dv] dQ, where <dh, h> is to be made, else NULL
    const int *doc_start;        // [B, T]
    MlstmState initial, final;   // of the whole sequence; C == NULL: zeros, not wanted
    float *segments;             // states entering each segment (scan_segment_state); NULL: one segment, or dQ
    int segment_chunks, slices;  // chunks a segment, slices a head
    uint32_t *snapshots;  // C where a span begins, in the order of H's registers: H writes, dV and dQ read; NULL: no
    float *n_snapshots;   // [B, NH, borders, dk] n there: H writes, dK and dQ read
    bool panels;          // H for narrow heads: n of every chunk, C of every even one in panels (scan_keep_panel)
    float *anchor;        // [tiles][B, NH, spans] shares of <C, dC> + <n, dn> where a span ends
    int anchor_tile;      // the first one of this kernel
    MlstmState entering;  // dV and dK: the state that entered the sequence in the forward pass, and
    float *anchor_start;  // [tiles][B, NH] the same shares where the sequence begins
    float *dot_out;       // [ceil(width / 64)][B, NH, T] row sums of out * dot, before out is rounded
    int *pace;            // [B, NH, segments][8] chunks that the slices have begun; NULL: nobody waits (scan_keep_pace)
};

struct alignas(16) ScanRows {  // of the 64 tokens of a chunk
    // The weight of query l and key j is exp2f(u_j - r_l) times X Y^T, plus add_l for dQ and dK: the logarithms of s
    // and 1 / den are in r. A bf16 result does without the low halves of u and r: 1e-4 of the weight where gates are at
    // their caps for a whole chunk, else 1e-6.
    float u[64], r[64];
    float factor[64];  // of the row's part from the state
    float scale[64];   // of the row in the update of M; SPREADS: see scan_spread_rows
    union {
        float floor[64];  // H: of the denominator
        float add[64];    // dQ, dK
    };
    union {
        float out_scale[64];  // H: 1 / denominator, by the scores
        float border[64];     // dQ, dK: of the row's part from n; see scan_make_dots
    };
    int start[64];  // of the document, counted from the chunk's first token; not below 0
    float decay;
};

template <class S>
struct alignas(16) ScanShared {
    ScanRows rows[2];
    float dots[S::TRANSPOSED ? (S::SPLIT ? 2 : 4) : 1][4][S::TRANSPOSED ? 64 : 1];  // of a state warpgroup and chunk
    alignas(16) float n[2][S::MODE == SCAN_H ? S::A : 4];                           // of even and odd chunks
    float border[S::REVERSE ? 256 : 4];                                             // dV, dK: see scan_send_border
    uint64_t tile_full[S::TILES], tile_empty[S::TILES], z_full[3], z_empty[3], rows_full[2], rows_empty[2], p_full,
        p_empty, dot_full[2][2], border_full, border_empty, h_full[4][S::H_STAGES];
};

template <class S>
constexpr size_t scan_shared_bytes() {
    static_assert(sizeof(ScanShared<S>) <= S::SCALARS, "what SCALARS keeps free");
    return S::AT_SHARED + sizeof(ScanShared<S>);
}

__device__ __forceinline__ int scan_chunks(const ScanArgs &p) { return (p.s.T + SCAN_CHUNK - 1) / SCAN_CHUNK; }

struct ScanPlace {  // what a block does
    int b, head, bh, slice, first_chunk, chunks;
};

template <class S>
__device__ __forceinline__ int scan_chunk(const ScanPlace &at, int it) {
    return S::REVERSE ? at.first_chunk + at.chunks - 1 - it : at.first_chunk + it;
}
// Whether the block has the first or the last segment, in the direction of the walk
template <class S>
__device__ __forceinline__ bool scan_is_first(const ScanArgs &p, const ScanPlace &at) {
    return S::REVERSE ? (at.first_chunk + at.chunks) * SCAN_CHUNK >= p.s.T : at.first_chunk == 0;
}
template <class S>
__device__ __forceinline__ bool scan_is_last(const ScanArgs &p, const ScanPlace &at) {
    return S::REVERSE ? at.first_chunk == 0 : (at.first_chunk + at.chunks) * SCAN_CHUNK >= p.s.T;
}
// Waits until use k of a ring of `stages` is full, or until its place is free
template <int STAGES>
__device__ __forceinline__ void scan_wait_full(const uint64_t *full, int k) {
    barrier_wait(shared_address(full + k % STAGES), k / STAGES & 1);
}
template <int STAGES>
__device__ __forceinline__ void scan_wait_empty(const uint64_t *empty, int k) {
    barrier_wait(shared_address(empty + k % STAGES), (k / STAGES & 1) ^ 1);
}
template <int STAGES>
__device__ __forceinline__ void scan_arrive(const uint64_t *bars, int k) {
    barrier_arrive(shared_address(bars + k % STAGES));
}
// By all lanes of a warp that is done with something; counts once
template <int STAGES>
__device__ __forceinline__ void scan_warp_arrive(const uint64_t *bars, int k) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) scan_arrive<STAGES>(bars, k);
}
// Where tile k of the ring of X and Y is, and Z of the walk's chunk `it`, from the start of shared memory
template <class S>
__device__ __forceinline__ int scan_at_tile(int k) {
    return k % S::TILES * S::TILE;
}
template <class S>
__device__ __forceinline__ int scan_at_z(int it) {
    return S::AT_Z + it % S::Z_STAGES * S::Z_BYTES;
}

// The weights of the chunk's tokens in the normaliser, to 16 bits, as operands of eight columns: in an even one the
// upper halves in bf16, in the odd one beside it the lower. dQ, dK: in all columns; H: an operand for each 64 columns
// of Y, with the weights in two columns and zeros else, so that the products of all end up beside each other
template <class S>
__device__ __forceinline__ int scan_at_weights(int it) {
    return S::AT_WEIGHTS + it % 2 * (S::WEIGHTS * 1024);
}

// A tile that is none of this warp's business: all places of the ring count the same arrivals
template <class S>
__device__ __forceinline__ void scan_pass_tile(ScanShared<S> *sh, int k) {
    scan_wait_full<S::TILES>(sh->tile_full, k);
    scan_warp_arrive<S::TILES>(sh->tile_empty, k);
}

// Element (w, a) of M^T in a state of the whole model's layout, [dk, dv] a head
template <class S>
__device__ __forceinline__ float *scan_element(float *C, const MlstmShape &s, int w, int a) {
    return C + (S::TRANSPOSED ? w * s.dv + a : a * s.dv + w);
}
__device__ __forceinline__ MlstmState scan_segment_state(const ScanArgs &p, int segment) {
    const size_t matrices = (size_t)p.s.NH * p.s.dk * p.s.dv, record = matrices + (size_t)p.s.NH * p.s.dk;
    float *first = p.segments + segment * p.s.B * record;
    return MlstmState{first, first + matrices, NULL, record};
}
template <class S>
__device__ __forceinline__ MlstmState scan_initial(const ScanArgs &p, const ScanPlace &at) {
    if (p.segments) return scan_segment_state(p, blockIdx.y);
    return scan_is_first<S>(p, at) ? p.initial : MlstmState{NULL, NULL, NULL, 0};
}
template <class S>
__device__ __forceinline__ MlstmState scan_final(const ScanArgs &p, const ScanPlace &at) {
    return scan_is_last<S>(p, at) ? p.final : MlstmState{NULL, NULL, NULL, 0};
}

__device__ __forceinline__ unsigned scan_all_chunks(const ScanArgs &p) {
    return ((unsigned)p.s.T + SCAN_CHUNK - 1) / SCAN_CHUNK;
}
// Snapshots are taken between spans, if at all. The one that belongs to chunk c, where the walk comes to it, or -1
__device__ __forceinline__ unsigned scan_borders(const ScanArgs &p) { return (unsigned)(p.s.T - 1) / MLSTM_SPAN; }
template <class S>
__device__ __forceinline__ int scan_border(const ScanArgs &p, int c) {
    const int next = c + S::REVERSE;
    return p.snapshots && next % SCAN_BORDER == 0 && next * SCAN_CHUNK < p.s.T ? next / SCAN_BORDER - 1 : -1;
}
// Tiles of the ring that chunk c takes: X, Y and, of dV between spans, the snapshot: one for 64 rows of M^T
template <class S>
__device__ __forceinline__ int scan_tiles(const ScanArgs &p, int c) {
    return 2 + (S::MODE == SCAN_DV && scan_border<S>(p, c) >= 0 ? S::W / 64 : 0);
}
// A state warpgroup's part of it, in the order of its registers: H and dV
template <class S>
__device__ __forceinline__ uint32_t *scan_snapshot(const ScanArgs &p, const ScanPlace &at, int border, int wg) {
    const unsigned part = ((at.bh * scan_borders(p) + border) * p.slices + at.slice) * 2 + wg;
    return p.snapshots + (size_t)part * (S::BLOCKS * S::AW / 4 * 128);
}

// ----------------------------------------------------------------------------------------------------------------
// The aux warpgroup: copies, the scalars of the rows, the normaliser

// Blocks of one head share X and Y through L2 as long as none is far ahead: every fourth chunk all meet. Only a hint:
// who waited in vain, since another does not run yet, waits no more. So nobody clears the words: what another launch
// left stands for a block that has not begun, and costs or saves its neighbours a wait.
__device__ __forceinline__ bool scan_keep_pace(int *pace, int it) {
    enum { EVERY = 4, TRIES = 40 };
    if (it % EVERY) return true;
    pace += 8 * (blockIdx.z * gridDim.y + blockIdx.y);
    *(volatile int *)(pace + blockIdx.x) = it + 1;
#pragma unroll 1
    for (int k = 0; k < TRIES; k++) {
        const int4 some = __ldcv((const int4 *)pace), others = __ldcv((const int4 *)pace + 1);
        const int begun[8] = {some.x, some.y, some.z, some.w, others.x, others.y, others.z, others.w};
        bool all = true;
#pragma unroll
        for (int x = 0; x < 8; x++) all &= x >= gridDim.x || begun[x] > it;
        if (all) return true;
        __nanosleep(200);
    }
    return false;
}

// Two threads, since neither may wait for what the other waits for: X and Y, and Z. The operand of the row sums is the
// states' own matter.
template <class S>
__device__ __forceinline__ void scan_copy_tiles(const ScanArgs &p, const ScanPlace &at, unsigned base,
                                                ScanShared<S> *sh) {
    bool together = p.pace;
    for (int it = 0, k = 0; it < at.chunks; it++) {
        const int c = scan_chunk<S>(at, it), tiles = scan_tiles<S>(p, c);
        if (together) together = scan_keep_pace(p.pace, it);
        for (int i = 0; i < tiles; i++, k++) {
            const unsigned full = shared_address(sh->tile_full + k % S::TILES), tile = base + scan_at_tile<S>(k);
            scan_wait_empty<S::TILES>(sh->tile_empty, k);
            barrier_arrive_expect(full, S::TILE);
            for (int j = 0; i < 2 && j < S::A / 64; j++)
                tma_load(tile + j * PANEL_BYTES, i ? &p.y : &p.x, full, 64 * j, at.head, c * SCAN_CHUNK, at.b);
            if (i >= 2)
                bulk_load(tile, (const char *)scan_snapshot<S>(p, at, scan_border<S>(p, c), 0) + (i - 2) * S::TILE,
                          S::TILE, full);
        }
    }
}
template <class S>
__device__ __forceinline__ void scan_copy_z(const ScanArgs &p, const ScanPlace &at, unsigned base, ScanShared<S> *sh) {
    for (int it = 0; it < at.chunks; it++) {
        const int c = scan_chunk<S>(at, it);
        const unsigned full = shared_address(sh->z_full + it % S::Z_STAGES);
        scan_wait_empty<S::Z_STAGES>(sh->z_empty, it);
        barrier_arrive_expect(full, S::Z_BYTES);
        for (int i = 0; i < S::W / 64; i++)
            tma_load(base + scan_at_z<S>(it) + i * PANEL_BYTES, &p.z, full, at.slice * S::W + 64 * i, at.head,
                     c * SCAN_CHUNK, at.b);
    }
}

// H: what rows are scaled by in two halves in bf16, those of two tokens side by side
__device__ __forceinline__ void scan_split_scale(float *scale, int token, float x) {
    const bf16 high = from_float<bf16>(x);
    bf16 *to = (bf16 *)scale + token / 2 * 4 + token % 2;
    to[0] = high, to[2] = from_float<bf16>(x - to_float(high));
}

// Two warps: the scalars of the rows, a lane a row. The next chunk's are loaded while the states work.
template <class S>
__device__ __forceinline__ void scan_scalars(const ScanArgs &p, const ScanPlace &at, unsigned char *smem,
                                             ScanShared<S> *sh) {
    const float log2_s = -0.5f * __log2f((float)p.s.dk);
    const int i = threadIdx.x % 64;
    for (int it = 0; it < at.chunks; it++) {
        const int c = scan_chunk<S>(at, it), t = c * SCAN_CHUNK + i;
        const unsigned gate = (unsigned)at.bh * p.s.T + t;  // [B, NH, T] has less than 2^32 elements
        ScanRows *rows = &sh->rows[it % 2];
        const float decay = p.gates.decay[(unsigned)at.bh * scan_chunks(p) + c];
        float2 u = {-1e30f, 0}, r = {1e30f, 0};   // beyond the end: no weight with any other token
        float q = 0, k = 0, ds = 0, inv_den = 1;  // H: floor in inv_den
        int start = 0;
        if (t < p.s.T) {
            u = p.gates.u[gate], r = p.gates.r[gate], q = p.gates.qscale[gate], k = p.gates.kscale[gate];
            if (S::MAKES_DOTS && p.h) {
                const float2 factor = mlstm_row_factor(p.s, p.gates.sig, p.gates.floor, gate);
                inv_den = factor.x, ds = factor.y;
            } else {
                if (S::MODE != SCAN_H) inv_den = p.inv_den[gate];
                else if (!p.s.sigmoid_gate) inv_den = p.gates.floor[gate];
                if (S::TRANSPOSED) ds = p.ds[gate];
            }
            start = p.doc_start[(unsigned)at.b * p.s.T + t];
        }
        scan_wait_empty<2>(sh->rows_empty, it);
        const float by = S::MODE == SCAN_H ? 1 : inv_den;
        rows->u[i] = u.x + u.y;
        rows->r[i] = r.x + r.y - log2_s - __log2f(by);
        rows->factor[i] = S::REVERSE ? k : q * by;
        if (S::SPREADS) scan_split_scale(rows->scale, i, k);
        else rows->scale[i] = S::REVERSE ? q * by : k;
        if (S::MODE == SCAN_H) rows->floor[i] = inv_den;
        if (S::TRANSPOSED) rows->add[i] = __fdividef(ds, by), rows->border[i] = S::REVERSE ? k : q * ds;
        if (S::MAKES_DOTS && p.h) {
            rows->border[i] = inv_den;
            if (t < p.s.T) p.inv_den[gate] = inv_den;
        }
        rows->start[i] = max(start - c * SCAN_CHUNK, 0);
        if (S::NORMALISER) {
            const float weight = S::MODE == SCAN_H ? k : S::REVERSE ? __fdividef(ds, by) : 1;
            const unsigned words = pack_two(weight, weight - to_float(from_float<bf16>(weight)));
            uint4 *to = (uint4 *)(smem + scan_at_weights<S>(it)) + i;
            if (S::MODE != SCAN_H) *to = make_uint4(words, words, words, words);
#pragma unroll
            for (int k = 0; S::MODE == SCAN_H && k < S::WEIGHTS; k++)
                to[64 * k] = make_uint4(k == 0 ? words : 0, k == 1 ? words : 0, k == 2 ? words : 0, k == 3 ? words : 0);
            fence_async_proxy();
        }
        if (i == 0) rows->decay = decay;
        scan_warp_arrive<2>(sh->rows_full, it);
    }
}

// dV and dK between spans, and at the end of the walk where the sequence begins: the shares of <C, dC> and <n, dn>. The
// states leave 256 partial sums or the slice's dn (scan_send_border), a warp does the rest. k: its number, from 0
template <class S>
__device__ __forceinline__ void scan_add_border(const ScanPlace &at, ScanShared<S> *sh, const float *n, int dk,
                                                float *to, int k) {
    constexpr int EACH = (S::MODE == SCAN_DV ? 256 : S::W) / 32;
    const int lane = threadIdx.x % 32;
    float by[EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int w = at.slice * S::W + lane + 32 * i;
        by[i] = S::MODE == SCAN_DV ? 1 : w < dk ? n[w] : 0;
    }
    scan_wait_full<1>(&sh->border_full, k);
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += by[i] * sh->border[lane + 32 * i];
    scan_warp_arrive<1>(&sh->border_empty, k);
    sum = warp_sum(sum);
    if (lane == 0) *to = sum;
}
template <class S>
__device__ __forceinline__ void scan_add_borders(const ScanArgs &p, const ScanPlace &at, ScanShared<S> *sh) {
    const size_t tile = (size_t)(p.anchor_tile + at.slice) * gridDim.z + at.bh;
    const int borders = (int)scan_borders(p);
    int k = 0;
    for (int it = 0; it < at.chunks; it++) {
        const int border = scan_border<S>(p, scan_chunk<S>(at, it));
        if (border < 0) continue;
        scan_add_border<S>(at, sh, p.n_snapshots + (size_t)(at.bh * (unsigned)borders + border) * p.s.dk, p.s.dk,
                           &p.anchor[tile * (borders + 1) + border], k++);
    }
    if (scan_is_last<S>(p, at) && p.entering.C)
        scan_add_border<S>(at, sh, p.entering.n + at.b * p.entering.row + (size_t)at.head * p.s.dk, p.s.dk,
                           &p.anchor_start[tile], k);
}

// n where the block begins: of column `column` of it
template <class S>
__device__ __forceinline__ float scan_entering_n(const ScanArgs &p, const ScanPlace &at, int column) {
    if (column >= p.s.dk) return 0;
    if (S::MODE == SCAN_DQ && !scan_is_first<S>(p, at))
        return p.n_snapshots[(size_t)(at.bh * scan_borders(p) + at.first_chunk / SCAN_BORDER - 1) * p.s.dk + column];
    const MlstmState initial = scan_initial<S>(p, at);
    return initial.C ? initial.n[at.b * initial.row + (size_t)at.head * p.s.dk + column] : 0;
}

// ----------------------------------------------------------------------------------------------------------------
// The scores' warpgroup

// w[4j + 2h + e]: scores of rows i = 16 warp + g + 8h and columns k = 8j + 2t + e, to be weighted. What is read from
// shared memory takes long beside the products (some 190 cycles), so a few reads go together, and all weights are made,
// those that are then taken for zero, too. A query sees the keys from its document's start to its own place. thread: of
// the warpgroup, not_hoisted()
template <class S>
__device__ __forceinline__ void scan_weights(float (&w)[32], const ScanRows *rows, int thread) {
    constexpr int GROUP = 2;  // columns' pieces whose reads go together
    const unsigned t = thread % 4, i0 = thread / 32 * 16 + thread % 32 / 4;
    const float *of_k = S::REVERSE ? rows->r : rows->u, *of_i = S::REVERSE ? rows->u : rows->r;
    float mine[2], add[2] = {0, 0};  // forward: of the queries i; else of the keys i
    int start[2] = {0, 0};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        mine[h] = of_i[i0 + 8 * h];
        if (!S::REVERSE) start[h] = rows->start[i0 + 8 * h];
        if (S::MODE == SCAN_DQ) add[h] = rows->add[i0 + 8 * h];
    }
#pragma unroll
    for (int j0 = 0; j0 < 8; j0 += GROUP) {
        float2 other[GROUP], add_k[GROUP];
        int2 start_k[GROUP];
#pragma unroll
        for (int j = 0; j < GROUP; j++) {
            const int k = 8 * (j0 + j) + 2 * t;
            other[j] = *(const float2 *)&of_k[k];
            if (S::REVERSE) start_k[j] = *(const int2 *)&rows->start[k];
            if (S::MODE == SCAN_DK) add_k[j] = *(const float2 *)&rows->add[k];
        }
#pragma unroll
        for (int j = 0; j < GROUP; j++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int h = n / 2, e = n % 2, k = 8 * (j0 + j) + 2 * t + e, i = i0 + 8 * h;
                const int query = S::REVERSE ? k : i, key = S::REVERSE ? i : k;
                const int from = !S::REVERSE ? start[h] : e ? start_k[j].y : start_k[j].x;
                const float x = e ? other[j].y : other[j].x;
                const float plus = S::MODE == SCAN_DK ? (e ? add_k[j].y : add_k[j].x) : add[h];
                const float D = exp2_fast(S::REVERSE ? mine[h] - x : x - mine[h]);
                float *to = &w[4 * (j0 + j) + n];
                *to = (unsigned)(key - from) <= (unsigned)(query - from) ? D * (S::TRANSPOSED ? *to + plus : *to) : 0;
            }
        asm volatile("" ::: "memory");  // not all reads at once: registers
    }
}

// dQ, where <dh, h> is not given: a warp makes it for its 16 rows from X, which is dH, and from h, of which a group of
// four rows after the other comes by bulk copies, the first two a chunk ahead. Eight lanes take a row. The scalars'
// warps leave the sign of ds in rows->add and inv_den in rows->border, for ds = sign inv_den <dh, h>.

// The copy of group j of the walk's chunk `it`; its place must be free
template <class S>
__device__ __forceinline__ void scan_load_h(const ScanArgs &p, const ScanPlace &at, unsigned base, ScanShared<S> *sh,
                                            int it, int j) {
    const unsigned thread = not_hoisted(threadIdx.x), row = thread % 32, warp = thread / 32, place = j % S::H_STAGES;
    const int t = scan_chunk<S>(at, it) * SCAN_CHUNK + 16 * warp + 4 * j + row, bytes = p.s.dv * (int)sizeof(bf16);
    const unsigned full = shared_address(&sh->h_full[warp][place]);
    if (row >= 4 || it >= at.chunks) return;
    if (t >= p.s.T) return barrier_arrive(full);
    barrier_arrive_expect(full, bytes);
    bulk_load(base + S::AT_H + (warp * S::H_STAGES + place) * S::H_BYTES + row * (S::H_BYTES / 4),
              p.h + (((size_t)at.b * p.s.T + t) * p.s.NH + at.head) * p.s.dv, bytes, full);
}
template <class S>
__device__ __forceinline__ void scan_begin_dots(const ScanArgs &p, const ScanPlace &at, unsigned char *smem,
                                                ScanShared<S> *sh) {
    uint4 *rows = (uint4 *)(smem + S::AT_H + threadIdx.x / 32 * (S::H_STAGES * S::H_BYTES));
    for (int k = threadIdx.x % 32; k < S::H_STAGES * S::H_BYTES / 16; k += 32)
        rows[k] = make_uint4(0, 0, 0, 0);  // what lies beyond dv stays so
    fence_async_proxy();
    __syncwarp();
    for (int j = 0; j < S::H_STAGES; j++) scan_load_h<S>(p, at, shared_address(smem), sh, 0, j);
}
// A lane's part of <x, h> of a row of A columns: pieces lane % 8 of all panels
template <class S>
__device__ __forceinline__ float scan_dot_pieces(const unsigned char *x, const unsigned char *h) {
    float sum[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < S::A / 64; k++) {
        const uint4 a = *(const uint4 *)(x + k * PANEL_BYTES), b = *(const uint4 *)(h + k * PANEL_ROW);
        const unsigned of_a[4] = {a.x, a.y, a.z, a.w}, of_b[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 u = unpack_two(of_a[i]), v = unpack_two(of_b[i]);
            sum[0] += u.x * v.x, sum[1] += u.y * v.y;
        }
    }
    return sum[0] + sum[1];
}
// Returns ds of row 16 warp + scan_dot_row(), whose scalars it completes
__device__ __forceinline__ int scan_dot_row() { return threadIdx.x % 4 * 4 + threadIdx.x % 32 / 8; }
template <class S>
__device__ __forceinline__ float scan_make_dots(const ScanArgs &p, const ScanPlace &at, unsigned char *smem,
                                                ScanShared<S> *sh, const unsigned char *x, int it) {
    const unsigned thread = not_hoisted(threadIdx.x), lane = thread % 32, warp = thread / 32;
    float sum[4], two[2];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int place = j % S::H_STAGES, row = 16 * warp + 4 * j + lane / 8;
        barrier_wait(shared_address(&sh->h_full[warp][place]), j / S::H_STAGES);
        sum[j] = scan_dot_pieces<S>(
            x + panel_piece(row, lane % 8),
            smem + S::AT_H + (warp * S::H_STAGES + place) * S::H_BYTES + lane / 8 * (S::H_BYTES / 4) + lane % 8 * 16);
        __syncwarp();
        scan_load_h<S>(p, at, shared_address(smem), sh, it + j / S::H_STAGES, (j + S::H_STAGES) % 4);
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {  // a lane keeps every second group, and then one
        const float keep = lane & 1 ? sum[2 * k + 1] : sum[2 * k], give = lane & 1 ? sum[2 * k] : sum[2 * k + 1];
        two[k] = keep + __shfl_xor_sync(0xffffffffu, give, 1);
    }
    float dot = (lane & 2 ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, lane & 2 ? two[0] : two[1], 2);
    dot += __shfl_xor_sync(0xffffffffu, dot, 4);
    ScanRows *rows = &sh->rows[it % 2];
    const int row = 16 * warp + scan_dot_row();
    const float sign = rows->add[row], inv_den = rows->border[row], add = sign != 0 ? sign * dot : 0;
    __syncwarp();
    rows->add[row] = add, rows->border[row] = rows->factor[row] * add;
    __syncwarp();
    return inv_den * add;
}
template <class S>
__device__ __forceinline__ void scan_store_ds(const ScanArgs &p, const ScanPlace &at, float ds, int c) {
    const int t = c * SCAN_CHUNK + threadIdx.x / 32 * 16 + scan_dot_row();
    if (threadIdx.x % 8 < 4 && t < p.s.T) p.ds[(unsigned)at.bh * p.s.T + t] = ds;
}

// H: packs the weighted scores w to bf16 words and leaves the denominators for the state's warpgroups; returns sig for
// backward, of the rows 16 warp + lane / 4 and 8 further on. q_n: a lane's part of <q, n>. out is a sum with rounded
// weights, so it is divided by their sum: where one token outweighs all others, h is its v, whatever the rounding, and
// the two parts of dh.v + ds cancel as they should.
template <class S>
__device__ __forceinline__ float2 scan_denominators(const ScanArgs &p, const float (&w)[32], unsigned (&words)[16],
                                                    ScanRows *rows, const float (&q_n)[4]) {
    const unsigned thread = not_hoisted(threadIdx.x), row = thread / 32 * 16 + thread % 32 / 4;
    float sum[2], rounded[2];
#pragma unroll
    for (int h = 0; h < 2; h++) rounded[h] = sum[h] = rows->factor[row + 8 * h] * (q_n[2 * h] + q_n[2 * h + 1]);
#pragma unroll
    for (int k = 0; k < 16; k++) {
        words[k] = pack_two(w[2 * k], w[2 * k + 1]);
        const float2 two = unpack_two(words[k]);
        sum[k % 2] += w[2 * k] + w[2 * k + 1], rounded[k % 2] += two.x + two.y;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], d);
            rounded[h] += __shfl_xor_sync(0xffffffffu, rounded[h], d);
        }
        const float denominator = fmaxf(fabsf(rounded[h]), rows->floor[row + 8 * h]) + p.s.eps;
        if (thread % 4 == 0) rows->out_scale[row + 8 * h] = p.s.sigmoid_gate ? 1 : __fdividef(1.0f, denominator);
    }
    return make_float2(sum[0], sum[1]);
}
template <class S>
__device__ __forceinline__ void scan_store_sig(const ScanArgs &p, const ScanPlace &at, float2 sig, int c) {
    const unsigned thread = not_hoisted(threadIdx.x);
    const int time = c * SCAN_CHUNK + thread / 32 * 16 + thread % 32 / 4;
    if (thread % 4 || at.slice || p.s.sigmoid_gate) return;
    float *to = p.gates.sig + ((unsigned)at.bh * p.s.T + time);
    if (time < p.s.T) to[0] = sig.x;
    if (time + 8 < p.s.T) to[8] = sig.y;
}

// H: the normaliser, in fp32 and, as the operand of <q, n>, as eight keys: its first 24 bits in three of them, and
// zeros. A thread has the columns scan_n_column() and 8 further on; where A is less than 256, some have none.
__device__ __forceinline__ int scan_n_column(unsigned thread) {
    return thread % 4 * 64 + thread / 32 * 16 + thread % 32 / 4;
}
template <class S>
__device__ __forceinline__ void scan_publish_n(unsigned char *smem, float *to, float n0, float n1) {
    const unsigned thread = not_hoisted(threadIdx.x), column = scan_n_column(thread);
    unsigned char *keys = smem + S::AT_KEYS + column / 64 * 1024 + column % 8 * 2;
    if (column < S::A) {
        to[column] = n0, to[column + 8] = n1;
#pragma unroll
        for (int part = 0; part < 3; part++) {
            const unsigned two = pack_two(n0, n1);
            n0 -= unpack_two(two).x, n1 -= unpack_two(two).y;
            *(unsigned short *)(keys + panel_piece(part, column % 64 / 8)) = (unsigned short)two;
            *(unsigned short *)(keys + panel_piece(part, column % 64 / 8 + 1)) = (unsigned short)(two >> 16);
        }
    }
    fence_async_proxy();
    if (threadIdx.x == 0) tma_store_wait_read<0>();  // of scan_keep_n, whose n is the next to be overwritten
    named_barrier_sync(1, 128);
}
template <class S>
__device__ __forceinline__ void scan_begin_n(const ScanArgs &p, const ScanPlace &at, unsigned char *smem,
                                             ScanShared<S> *sh) {
    const int column = scan_n_column(threadIdx.x);
    for (int k = threadIdx.x; k < S::KEYS_BYTES / 4; k += 128) ((unsigned *)(smem + S::AT_KEYS))[k] = 0;
    named_barrier_sync(1, 128);
    scan_publish_n<S>(smem, sh->n[0], scan_entering_n<S>(p, at, column), scan_entering_n<S>(p, at, column + 8));
}
// The sum of scale y over the chunk, whose Y is at y, begins: sums[0] + sums[1] of column scan_n_column(), then of the
// other
template <class S>
__device__ __forceinline__ void scan_begin_sums(float (&sums)[4], unsigned y, unsigned weights) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < S::A / 64; k++)
#pragma unroll
        for (int step = 0; step < 4; step++)
            wgmma_ss<1, 1>(sums, wgmma_operand(y, k * PANEL_BYTES + step * 2048),
                           wgmma_narrow_operand(weights, k * 1024 + 256 * step), true);
    wgmma_commit();
}
// n = decay n + the sum
template <class S>
__device__ __forceinline__ void scan_advance_n(unsigned char *smem, ScanShared<S> *sh, const float (&sums)[4], int it) {
    const unsigned column = scan_n_column(not_hoisted(threadIdx.x));
    const float decay = sh->rows[it % 2].decay;
    float n[2] = {0, 0};
    if (column < S::A) n[0] = sh->n[it % 2][column], n[1] = sh->n[it % 2][column + 8];
    scan_publish_n<S>(smem, sh->n[(it + 1) % 2], decay * n[0] + sums[0] + sums[1], decay * n[1] + sums[2] + sums[3]);
}

// H between spans: n, [dk], to memory. Not by ordinary stores, which stand in line behind those of the states' snapshot
template <class S>
__device__ __forceinline__ void scan_keep_n(const ScanArgs &p, const ScanPlace &at, ScanShared<S> *sh, int it) {
    if (threadIdx.x || at.slice || !p.n_snapshots || (p.panels && p.s.sigmoid_gate)) return;
    const int c = scan_chunk<S>(at, it), place = p.panels ? c : scan_border<S>(p, c);
    if (place < 0) return;
    const size_t first = (size_t)at.bh * (p.panels ? scan_all_chunks(p) : scan_borders(p));
    bulk_store(p.n_snapshots + (first + place) * p.s.dk, shared_address(sh->n[it % 2]), p.s.dk * sizeof(float));
}

template <class S>
__device__ __forceinline__ void scan_scores(const ScanArgs &p, const ScanPlace &at, unsigned char *smem,
                                            ScanShared<S> *sh) {
    const unsigned base = shared_address(smem);
    if constexpr (S::MODE == SCAN_H) scan_begin_n<S>(p, at, smem, sh);
    if constexpr (S::MAKES_DOTS)
        if (p.h) scan_begin_dots<S>(p, at, smem, sh);
    for (int it = 0, k0 = 0; it < at.chunks; it++) {
        ScanRows *rows = &sh->rows[it % 2];
        const unsigned x = base + scan_at_tile<S>(k0), y = base + scan_at_tile<S>(k0 + 1), panel = base + S::AT_P;
        if constexpr (S::MODE == SCAN_H) scan_keep_n<S>(p, at, sh, it);
        __syncwarp();
        float w[32], ds = 0;
        scan_wait_full<S::TILES>(sh->tile_full, k0);
        if constexpr (S::MAKES_DOTS)
            if (p.h) {
                scan_wait_full<2>(sh->rows_full, it);
                ds = scan_make_dots<S>(p, at, smem, sh, smem + scan_at_tile<S>(k0), it);
            }
        scan_wait_full<S::TILES>(sh->tile_full, k0 + 1);
        scan_wait_full<2>(sh->rows_full, it);
#pragma unroll
        for (int k = 0; k < 32; k++) w[k] = 0;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < S::A / 16; k++) {
            const unsigned at_k = k / 4 * PANEL_BYTES + k % 4 * 32;
            wgmma_ss<0, 0>(w, wgmma_operand(x, at_k), wgmma_operand(y, at_k), true);
        }
        wgmma_commit();
        float q_n[4] = {0, 0, 0, 0}, sums[4] = {0, 0, 0, 0};
        if (S::MODE == SCAN_H) {
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < S::A / 16; k++)
                wgmma_ss<0, 0>(q_n, wgmma_operand(x, k / 4 * PANEL_BYTES + k % 4 * 32),
                               wgmma_operand(base, S::AT_KEYS + k / 4 * 1024 + k % 4 * 32), true);
            wgmma_commit();
        }
        if constexpr (S::MODE == SCAN_H) scan_begin_sums<S>(sums, y, base + scan_at_weights<S>(it));
        wgmma_wait<0>();
        scan_warp_arrive<S::TILES>(sh->tile_empty, k0);
        scan_warp_arrive<S::TILES>(sh->tile_empty, k0 + 1);
        scan_weights<S>(w, rows, not_hoisted(threadIdx.x));
        unsigned words[16];
        float2 sig = {0, 0};
        if (S::MODE == SCAN_H) {
            sig = scan_denominators<S>(p, w, words, rows, q_n);
        } else {
#pragma unroll
            for (int k = 0; k < 16; k++) words[k] = pack_two(w[2 * k], w[2 * k + 1]);
        }
        scan_wait_empty<1>(&sh->p_empty, it);
        const unsigned thread = not_hoisted(threadIdx.x), lane = thread % 32, row = thread / 32 * 16 + lane % 16;
#pragma unroll
        for (int j = 0; j < 8; j += 2)
            matrices_store(panel + panel_piece(row, j + lane / 16), words[2 * j], words[2 * j + 1], words[2 * j + 2],
                           words[2 * j + 3]);
        fence_async_proxy();
        scan_warp_arrive<1>(&sh->p_full, it);
        if constexpr (S::MODE == SCAN_H) {
            scan_advance_n<S>(smem, sh, sums, it);
            scan_store_sig<S>(p, at, sig, scan_chunk<S>(at, it));  // behind the fences, which would wait for it
        }
        if (S::MAKES_DOTS && p.h) scan_store_ds<S>(p, at, ds, scan_chunk<S>(at, it));  // behind the fence
        scan_warp_arrive<2>(sh->rows_empty, it);
        const int tiles = scan_tiles<S>(p, scan_chunk<S>(at, it));
        for (int k = 2; k < tiles; k++) scan_pass_tile<S>(sh, k0 + k);
        k0 += tiles;
    }
    if constexpr (S::MODE == SCAN_H) {
        const MlstmState final = scan_final<S>(p, at);
        if (!final.C || at.slice) return;
        float *to = final.n + at.b * final.row + (size_t)at.head * p.s.dk;
        for (int k = threadIdx.x; k < p.s.dk; k += 128) to[k] = sh->n[at.chunks % 2][k];
    }
}

// ----------------------------------------------------------------------------------------------------------------
// The state's warpgroups. A thread's M[b][4j + 2h + e] is element (w, a) of M^T with w = scan_row() + 8h,
// a = first_a + 8j + 2t + e.

// 0 or 1, known to be the same in the whole warp; asked for anew rather than kept
__device__ __forceinline__ int scan_warpgroup() {
    return __shfl_sync(0xffffffffu, not_hoisted(threadIdx.x) / 128, 0) - 1;
}
template <class S>
__device__ __forceinline__ int scan_row(const ScanPlace &at, int wg, int b) {
    return at.slice * S::W + (S::SPLIT ? 0 : (wg * S::BLOCKS + b) * 64) + threadIdx.x / 32 % 4 * 16 +
           threadIdx.x % 32 / 4;
}

// element(C's element, M's) for the four that a thread holds of block b and column j, as far as the head has them: dk
// and dv are multiples of 8, so all threads of a warp have the same.
template <class S, typename Element>
__device__ __forceinline__ void scan_four_elements(const ScanArgs &p, const ScanPlace &at, int wg, float *C, float *M,
                                                   int b, int j, Element element) {
    const int a_width = S::TRANSPOSED ? p.s.dv : p.s.dk, w_width = S::TRANSPOSED ? p.s.dk : p.s.dv;
    const int a = (S::SPLIT ? wg * S::AW : 0) + 8 * j, w = scan_row<S>(at, wg, b);
    C = scan_element<S>(C, p.s, w, a + threadIdx.x % 4 * 2);
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (w + 8 * h < w_width && a < a_width) {
            element(C[S::TRANSPOSED ? h * 8 * p.s.dv : h * 8], M[2 * h]);
            element(C[S::TRANSPOSED ? h * 8 * p.s.dv + 1 : p.s.dv + h * 8], M[2 * h + 1]);
        }
    asm volatile("" ::: "memory");  // the compiler would rather have all addresses at hand, and spill
}

// C where a segment begins, for dQ, from the snapshots of H, which have zeros beyond dk and dv. Element (w, v) of C is
// where a thread of H has it (scan_keep_state): by v / 64, then w / 16, v / 16 % 4, v % 8, w % 8 / 2, w / 8 % 2,
// v / 8 % 2, w % 2.
template <class S>
__device__ __forceinline__ void scan_load_snapshot(const ScanArgs &p, const ScanPlace &at, int wg,
                                                   float (&M)[S::BLOCKS][S::AW / 2]) {
    const int A = scan_pad(p.s.dk, false), W = scan_columns(A, false), border = at.first_chunk / SCAN_BORDER - 1;
    const size_t head = (size_t)A * W * ((p.s.dv + W - 1) / W);
    const bf16 *C = (const bf16 *)p.snapshots + (size_t)(at.bh * scan_borders(p) + border) * head;
    if (S::SPLIT) C += wg * (S::AW / 64) * A * 64;
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++) {
        const unsigned w = scan_row<S>(at, wg, b);
        if (w >= A) continue;
        const bf16 *from = C + w / 8 * 512 + threadIdx.x % 4 * 64 + w % 8 / 2 * 8 + w % 2;
#pragma unroll
        for (int i = 0; i < S::AW / 2; i += 16) {  // 16 loads on their way at a time
            bf16 x[16];
#pragma unroll
            for (int k = 0; k < 16; k++) {
                const int j = (i + k) / 4 % 8;  // of eight columns v
                x[k] = from[j / 2 * 256 + k % 2 * 32 + k / 2 % 2 * 4 + j % 2 * 2];
            }
#pragma unroll
            for (int k = 0; k < 16; k++) M[b][i + k] = to_float(x[k]);
            if (i % 32) from += A * 64;
            asm volatile("" ::: "memory");
        }
    }
}

template <class S>
__device__ __forceinline__ void scan_load_state(const ScanArgs &p, const ScanPlace &at, int wg,
                                                float (&M)[S::BLOCKS][S::AW / 2]) {
    const MlstmState initial = scan_initial<S>(p, at);
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < S::AW / 2; i++) M[b][i] = 0;
    if (S::MODE == SCAN_DQ && !scan_is_first<S>(p, at)) scan_load_snapshot<S>(p, at, wg, M);
    if (!initial.C) return;
    float *C = initial.C + at.b * initial.row + (size_t)at.head * p.s.dk * p.s.dv;
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++)
#pragma unroll
        for (int j = 0; j < S::AW / 8; j++)
            scan_four_elements<S>(p, at, wg, C, M[b] + 4 * j, b, j, [](float &c, float &x) { x = c; });
}

template <class S>
__device__ __forceinline__ void scan_store_state(const ScanArgs &p, const ScanPlace &at, int wg,
                                                 float (&M)[S::BLOCKS][S::AW / 2]) {
    const MlstmState final = scan_final<S>(p, at);
    if (!final.C) return;
    float *C = final.C + at.b * final.row + (size_t)at.head * p.s.dk * p.s.dv;
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++)
#pragma unroll
        for (int j = 0; j < S::AW / 8; j++)
            scan_four_elements<S>(p, at, wg, C, M[b] + 4 * j, b, j, [](float &c, float &x) { c = x; });
}

// For narrow heads H keeps what enters every even chunk, M^T in bf16 in panels [64 dv, 64 dk] as mlstm_narrow.cuh wants
// it. The last snapshot has left its place: scan_step waits for that.
template <class S>
__device__ __forceinline__ void scan_keep_panel(const ScanArgs &p, const ScanPlace &at, unsigned base, int wg,
                                                const float *m, int c) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const unsigned panel = base + S::AT_KEPT + wg * PANEL_BYTES, kept = (scan_all_chunks(p) + 1) / 2;  // of a head
    if (c % 2) return;
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        matrices_store(panel + panel_piece(row, j + lane / 16), pack_two(m[4 * j], m[4 * j + 1]),
                       pack_two(m[4 * j + 2], m[4 * j + 3]), pack_two(m[4 * j + 4], m[4 * j + 5]),
                       pack_two(m[4 * j + 6], m[4 * j + 7]));
    fence_async_proxy();
    named_barrier_sync(2 + wg, 128);
    if (threadIdx.x % 128 == 0)
        bulk_store((char *)p.snapshots + (((size_t)at.bh * kept + c / 2) * 2 + wg) * PANEL_BYTES, panel, PANEL_BYTES);
    __syncwarp();
}

// Between spans: H keeps its registers in bf16, a thread's words four by four.
template <class S>
__device__ __forceinline__ void scan_keep_state(const ScanArgs &p, const ScanPlace &at, unsigned base, int wg,
                                                const float (&M)[S::BLOCKS][S::AW / 2], int c) {
    if (S::MODE != SCAN_H || !p.snapshots) return;
    if constexpr (S::KEPT_BYTES > 0)
        if (p.panels) return scan_keep_panel<S>(p, at, base, wg, M[0], c);
    if (scan_border<S>(p, c) < 0) return;
    uint4 *kept = (uint4 *)scan_snapshot<S>(p, at, scan_border<S>(p, c), wg) + threadIdx.x % 128;
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++)
#pragma unroll
        for (int k = 0; k < S::AW / 16; k++) {
            const float *m = M[b] + 8 * k;
            kept[(b * (S::AW / 16) + k) * 128] =
                make_uint4(pack_two(m[0], m[1]), pack_two(m[2], m[3]), pack_two(m[4], m[5]), pack_two(m[6], m[7]));
        }
}

// dV, whose registers lie the same way: <C, dC> of block b, whose part of the snapshot is in tile k
template <class S>
__device__ __forceinline__ float scan_dot_snapshot(const float (&M)[S::AW / 2], const unsigned char *smem,
                                                   ScanShared<S> *sh, int k) {
    const uint4 *kept = (const uint4 *)(smem + scan_at_tile<S>(k)) + threadIdx.x % 128;
    float sum[2] = {0, 0};
    scan_wait_full<S::TILES>(sh->tile_full, k);
#pragma unroll
    for (int i = 0; i < S::AW / 16; i++) {
        const uint4 words = kept[i * 128];
        const float2 x = unpack_two(words.x), y = unpack_two(words.y), z = unpack_two(words.z), w = unpack_two(words.w);
        const float *m = M + 8 * i;
        sum[0] += x.x * m[0] + x.y * m[1] + y.x * m[2] + y.y * m[3];
        sum[1] += z.x * m[4] + z.y * m[5] + w.x * m[6] + w.y * m[7];
    }
    asm volatile("" : "+f"(sum[0]), "+f"(sum[1]));  // all has come before its place is given back to TMA
    scan_warp_arrive<S::TILES>(sh->tile_empty, k);
    return sum[0] + sum[1];
}

// To scan_add_border, as its k-th: dV: a thread's sum; dK: dn of row scan_row() and 8 further on, of one thread in four
template <class S>
__device__ __forceinline__ void scan_send_border(ScanShared<S> *sh, int wg, float first, float second, int k) {
    scan_wait_empty<1>(&sh->border_empty, k);
    if (S::MODE == SCAN_DV) {
        sh->border[threadIdx.x - 128] = first;
    } else if (threadIdx.x % 4 == 0 && !(S::SPLIT && wg)) {
        float *to = sh->border + wg * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        to[0] = first, to[8] = second;
    }
    scan_warp_arrive<1>(&sh->border_full, k);
}

// dV at the end of its walk: <C, dC> where the sequence begins
template <class S>
__device__ __forceinline__ float scan_dot_entering(const ScanArgs &p, const ScanPlace &at, int wg,
                                                   float (&M)[S::BLOCKS][S::AW / 2]) {
    float *C = p.entering.C + at.b * p.entering.row + (size_t)at.head * p.s.dk * p.s.dv, sum = 0;
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++)
#pragma unroll
        for (int j0 = 0; j0 < S::AW / 8; j0 += 4) {
            float entering[4][4] = {};
            if (8 * j0 >= p.s.dk) break;  // a branch, behind which the compiler may not begin
#pragma unroll
            for (int j = 0; j < 4; j++)
                scan_four_elements<S>(p, at, wg, C, entering[j], b, j0 + j, [](float &c, float &x) { x = c; });
#pragma unroll
            for (int k = 0; k < 16; k++) sum += entering[k / 4][k % 4] * M[b][4 * j0 + k];
        }
    return sum;
}

// What rounding two numbers to bf16 takes from them, in bf16
__device__ __forceinline__ unsigned scan_pack_rest(float x, float y) {
    const float2 two = unpack_two(pack_two(x, y));
    return pack_two(x - two.x, y - two.y);
}

// out^T [64, 64 tokens] = M^T X^T; M^T rounded to bf16, a few times 16 columns ahead: registers are scarce. REST: of
// one in so many times 16 columns (0: of none) what is lost by that is multiplied, too. While the products run, M^T
// decays, if there are registers for that.
template <class S, int REST>
__device__ __forceinline__ void scan_ask_state(float (&out)[32], float (&M)[S::AW / 2], unsigned x, float decay) {
    constexpr int AHEAD = REST && S::AW > 192 ? 1 : S::AHEAD;
    int on_their_way = 0;
#pragma unroll
    for (int k = 0; k < S::AW / 16; k++) {
        const bool both = REST && k % (REST ? REST : 1) == 0;
#pragma unroll
        for (int part = 0; part < (both ? 2 : 1); part++) {
            unsigned a[4];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                float *m = M + 8 * k + 2 * r;
                a[r] = part ? scan_pack_rest(m[0], m[1]) : pack_two(m[0], m[1]);
                if (S::DECAYS_EARLY && part == both) m[0] *= decay, m[1] *= decay;
            }
            wgmma_fence();
            wgmma_rs<0>(out, a, wgmma_operand(x, k / 4 * PANEL_BYTES + k % 4 * 32), k + part > 0);
            wgmma_commit();
            if (on_their_way++ >= AHEAD) wgmma_wait<AHEAD>();
        }
    }
    wgmma_wait<0>();
}

// (scale Z)^T as register operand: 64 columns of Z, which are rows of M^T, of 32 tokens. z: their part of the panel
__device__ __forceinline__ void scan_scale_rows(unsigned (&a)[2][4], unsigned z, const float *scale) {
    const unsigned thread = not_hoisted(threadIdx.x), lane = thread % 32, warp = thread / 32 % 4, t = lane % 4;
    const unsigned from = z + panel_piece(lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        ldmatrix_trans(a[k], from + k * 2048);
        const float2 lo = *(const float2 *)(scale + 16 * k + 2 * t), hi = *(const float2 *)(scale + 16 * k + 8 + 2 * t);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float2 two = unpack_two(a[k][r]), by = r < 2 ? lo : hi;
            a[k][r] = pack_two(two.x * by.x, two.y * by.y);
        }
    }
}

// The same of 16 tokens in two parts: a[0] rounded, a[1] what that loses
__device__ __forceinline__ void scan_scale_rows_both(unsigned (&a)[2][4], unsigned z, const float *scale) {
    const unsigned thread = not_hoisted(threadIdx.x), lane = thread % 32, warp = thread / 32 % 4, t = lane % 4;
    ldmatrix_trans(a[0], z + panel_piece(lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2));
    const float2 lo = *(const float2 *)(scale + 2 * t), hi = *(const float2 *)(scale + 8 + 2 * t);
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const float2 two = unpack_two(a[0][r]), by = r < 2 ? lo : hi;
        a[0][r] = pack_two(two.x * by.x, two.y * by.y);
        a[1][r] = scan_pack_rest(two.x * by.x, two.y * by.y);
    }
}

// The same with scales from scan_split_scale. What rounding takes from eight tokens the next eight give back:
// the output is a mean of v, and where keys have much in common what is lost would add up in it. In pairs of bf16: z
// high + z low is rounded once, and what that loses is a bf16 number but for its last bits. lost: of the last eight;
// spread: 1, or 0 for nothing to be given back
__device__ __forceinline__ void scan_spread_rows(unsigned (&a)[2][4], __nv_bfloat162 (&lost)[2], __nv_bfloat162 spread,
                                                 unsigned z, const float *scale) {
    const unsigned thread = not_hoisted(threadIdx.x), lane = thread % 32, warp = thread / 32 % 4, t = lane % 4;
    const unsigned from = z + panel_piece(lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        ldmatrix_trans(a[k], from + k * 2048);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const uint2 by = *(const uint2 *)(scale + 16 * k + r / 2 * 8 + 2 * t);  // of tokens 2t and 2t + 1
            const __nv_bfloat162 two = *(const __nv_bfloat162 *)&a[k][r], high = *(const __nv_bfloat162 *)&by.x,
                                 low = *(const __nv_bfloat162 *)&by.y;
            const __nv_bfloat162 rest = __hfma2(two, low, lost[r % 2]), sum = __hfma2(two, high, rest);
            lost[r % 2] = __hmul2(spread, __hadd2(__hfma2(two, high, __hneg2(sum)), rest));
            a[k][r] = *(const unsigned *)&sum;
        }
    }
}

// M^T += a Y, the k-th 16 tokens. A product 256 columns wide would want more registers than a thread has at the start.
template <class S>
__device__ __forceinline__ void scan_add_product(float (&M)[S::AW / 2], const unsigned (&a)[4], unsigned y, int k) {
    if constexpr (S::AW == 256) {
        float(&left)[64] = *(float(*)[64])M, (&right)[64] = *(float(*)[64])(M + 64);
        wgmma_rs<1>(left, a, wgmma_operand(y, k * 2048), true);
        wgmma_rs<1>(right, a, wgmma_operand(y, 2 * PANEL_BYTES + k * 2048), true);
    } else {
        wgmma_rs<1>(M, a, wgmma_operand(y, k * 2048), true);
    }
}

// The states' part of the normaliser, dQ and dK: N[0] + N[1] of row scan_row() of M^T, N[2] + N[3] of 8 rows further on
template <class S>
__device__ __forceinline__ void scan_load_n(const ScanArgs &p, const ScanPlace &at, int wg, float (&N)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        N[i] = S::TRANSPOSED && i % 2 == 0 ? scan_entering_n<S>(p, at, scan_row<S>(at, wg, 0) + i / 2 * 8) : 0;
}

// out^T times a factor a token, plus n0 and n1 of its rows times another
__device__ __forceinline__ void scan_add_n(float (&out)[32], const float *factor, const float *border, float n0,
                                           float n1) {
    const unsigned t = not_hoisted(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int token = 8 * j + t;
        const float2 by = *(const float2 *)&factor[token], with = *(const float2 *)&border[token];
        out[4 * j] = out[4 * j] * by.x + n0 * with.x, out[4 * j + 1] = out[4 * j + 1] * by.y + n0 * with.y;
        out[4 * j + 2] = out[4 * j + 2] * by.x + n1 * with.x, out[4 * j + 3] = out[4 * j + 3] * by.y + n1 * with.y;
    }
}

// out^T times a factor a token
__device__ __forceinline__ void scan_scale_tokens(float (&out)[32], const float *factor) {
    factor += not_hoisted(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float2 by = *(const float2 *)&factor[8 * j];
        out[4 * j] *= by.x, out[4 * j + 1] *= by.y, out[4 * j + 2] *= by.x, out[4 * j + 3] *= by.y;
    }
}

// W = 64: each warpgroup has the sums over its half of A. They exchange them through the chunk's Z and P, which all are
// done with then: whole sums of the tokens 32 wg .. 32 wg + 31 are left.
__device__ __forceinline__ void scan_add_halves(const float (&half)[32], float (&out)[16], float *z, float *scores,
                                                int wg) {
    const int tid = not_hoisted(threadIdx.x) % 128;
    float *to = wg ? scores : z, *from = wg ? z : scores;
    named_barrier_sync(4, 256);
#pragma unroll
    for (int i = 0; i < 16; i++) to[i * 128 + tid] = wg ? half[i] : half[16 + i];
    fence_async_proxy();
    named_barrier_sync(4, 256);
#pragma unroll
    for (int i = 0; i < 16; i++) out[i] = (wg ? half[16 + i] : half[i]) + from[i * 128 + tid];
}

// Row sums of out * dot over these 64 rows of out^T, for 2 COUNT tokens; the dot operand lies where out will be stored
template <int COUNT>
__device__ __forceinline__ void scan_row_dots(const float (&out)[COUNT], unsigned panel, float *sums) {
    constexpr int HALF = COUNT / 8;  // of the pieces of 8 tokens
    const unsigned thread = not_hoisted(threadIdx.x), lane = thread % 32, warp = thread / 32 % 4, t = lane % 4;
    const unsigned piece = 2 * warp + lane / 8 % 2;
    float2 sum[HALF];  // of the two tokens 2t, 2t + 1 of a piece: a lane keeps one half of the pieces, gives the other
#pragma unroll
    for (int j = 0; j < HALF; j++) {
        unsigned with[4];
        float2 both[2];
        ldmatrix_trans(with, panel + panel_piece(8 * (j + lane / 16 * HALF) + lane % 8, piece));
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float2 top = unpack_two(with[2 * k]), low = unpack_two(with[2 * k + 1]);
            const float *x = out + 4 * (j + k * HALF);
            both[k] = make_float2(x[0] * top.x + x[2] * low.x, x[1] * top.y + x[3] * low.y);
        }
        const float2 keep = lane & 16 ? both[1] : both[0], give = lane & 16 ? both[0] : both[1];
        sum[j].x = keep.x + __shfl_xor_sync(0xffffffffu, give.x, 16);
        sum[j].y = keep.y + __shfl_xor_sync(0xffffffffu, give.y, 16);
    }
#pragma unroll
    for (int d = 8, half = HALF / 2; d >= 4; d /= 2, half /= 2)
#pragma unroll
        for (int j = 0; j < (half ? half : 1); j++) {
            const int second = half ? half + j : 0;
            const float2 keep = lane & d ? sum[second] : sum[j], give = lane & d ? sum[j] : sum[second];
            sum[j].x = keep.x + __shfl_xor_sync(0xffffffffu, give.x, d);
            sum[j].y = keep.y + __shfl_xor_sync(0xffffffffu, give.y, d);
        }
    // which piece a lane ends with: its bits, highest first; of 4 pieces two lanes have the same
    const int j = HALF == 4 ? lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2 : lane / 16 * 2 + lane / 8 % 2;
    *(float2 *)&sums[64 * warp + 8 * j + 2 * t] = sum[0];
}

// The sums of the four warps to memory, by a warpgroup, after a barrier
template <class S>
__device__ __forceinline__ void scan_store_dots(const ScanArgs &p, const ScanPlace &at, const float *sums, int wg,
                                                int c) {
    const int i = (int)(not_hoisted(threadIdx.x) % 128), time = c * SCAN_CHUNK + i;
    const int tile = at.slice * (S::W / 64) + (S::SPLIT ? 0 : wg);
    if (i < 64 && time < p.s.T)
        p.dot_out[((unsigned)tile * gridDim.z + at.bh) * p.s.T + time] =  // less than 2^32: tiles are of 64 columns
            (sums[i] + sums[64 + i]) + (sums[128 + i] + sums[192 + i]);
}

// Finishes out^T, of all tokens or, if the warpgroups share them, of 32; transposes it into its panel and sends it off.
template <class S, int COUNT>
__device__ __forceinline__ void scan_output(const ScanArgs &p, const ScanPlace &at, float (&out)[COUNT], unsigned panel,
                                            ScanShared<S> *sh, int wg, int b, int it) {
    constexpr int PIECES = COUNT / 4;  // of 8 tokens
    const unsigned thread = not_hoisted(threadIdx.x), lane = thread % 32, warp = thread / 32 % 4;
    const int c = scan_chunk<S>(at, it);
    const int first = S::SPLIT ? 32 * wg : 0;  // token
    float *dots = sh->dots[S::SPLIT ? it % 2 : 2 * wg + it % 2][0];
    if constexpr (S::MODE == SCAN_H) scan_scale_tokens(out, sh->rows[it % 2].out_scale);
    if constexpr (S::TRANSPOSED) {
        barrier_wait(shared_address(&sh->dot_full[it % S::OUT_STAGES][S::SPLIT ? 0 : wg]), it / S::OUT_STAGES & 1);
        scan_row_dots(out, panel + first * PANEL_ROW, dots + first);
    } else {
        named_barrier_sync(2 + wg, 128);  // all are done with Z
    }
    const unsigned piece = 2 * warp + lane / 8 % 2;
#pragma unroll
    for (int j = 0; j < PIECES; j += 2)
        matrices_store_transposed(panel + panel_piece(first + 8 * (j + lane / 16) + lane % 8, piece),
                                  pack_two(out[4 * j], out[4 * j + 1]), pack_two(out[4 * j + 2], out[4 * j + 3]),
                                  pack_two(out[4 * j + 4], out[4 * j + 5]), pack_two(out[4 * j + 6], out[4 * j + 7]));
    fence_async_proxy();
    if (S::SPLIT) named_barrier_sync(5, 256);
    else named_barrier_sync(2 + wg, 128);
    if (S::SPLIT && wg) return;
    if (threadIdx.x % 128 == 0)
        tma_store(&p.out, panel, at.slice * S::W + (S::SPLIT ? 0 : (wg * S::BLOCKS + b) * 64), at.head, c * SCAN_CHUNK,
                  at.b);
    if (S::TRANSPOSED) scan_store_dots<S>(p, at, dots, wg, c);  // behind the fence, which would wait for it
}

// The operand of the row sums of chunk `it` comes into the panel that out will leave from; by one thread of each
// warpgroup that has a panel
template <class S>
__device__ __forceinline__ void scan_load_dot(const ScanArgs &p, const ScanPlace &at, unsigned base, ScanShared<S> *sh,
                                              int wg, int it) {
    if constexpr (S::TRANSPOSED) {
        if (threadIdx.x % 128 || (S::SPLIT && wg) || it >= at.chunks) return;
        const unsigned full = shared_address(&sh->dot_full[it % S::OUT_STAGES][wg]);
        tma_store_wait_read<0>();
        barrier_arrive_expect(full, PANEL_BYTES);
        tma_load(base + S::AT_OUT + it % S::OUT_STAGES * S::OUT_BYTES + wg * PANEL_BYTES, &p.dot, full,
                 at.slice * S::W + wg * 64, at.head, scan_chunk<S>(at, it) * SCAN_CHUNK, at.b);
    }
}

// One chunk: of block b of 64 rows of M^T
template <class S>
__device__ __forceinline__ void scan_step(const ScanArgs &p, const ScanPlace &at, unsigned char *smem,
                                          ScanShared<S> *sh, float (&M)[S::AW / 2], float (&N)[4], int wg, int b,
                                          int it, int k0, bool at_border, float &border, int borders) {
    const unsigned base = shared_address(smem), half = S::SPLIT ? wg * (S::AW / 64) * PANEL_BYTES : 0;
    const int block = S::SPLIT ? 0 : wg * S::BLOCKS + b;  // of 64 rows of the slice
    const unsigned z = base + scan_at_z<S>(it) + block * PANEL_BYTES, y = base + scan_at_tile<S>(k0 + 1) + half;
    const ScanRows *rows = &sh->rows[it % 2];
    const bool last = b == S::BLOCKS - 1;
    float out[32];
    unsigned a[2][2][4];
    scan_wait_full<S::TILES>(sh->tile_full, k0);
    const unsigned x = base + scan_at_tile<S>(k0) + half;
    // dQ and dK with the sigmoid gate: states are asked by more of the pairs than with chunks of 128, and each answer
    // is rounded twice; for dk it is enough if a third of the states is asked in two parts. With the exponential gate
    // dq and dk err more by ds than by that.
    constexpr int REST = S::PATHS || S::MODE == SCAN_DQ ? 1 : S::THIRDS ? 3 : 0;
    if (S::PATHS || S::THIRDS || (S::MODE == SCAN_DQ && p.s.sigmoid_gate))
        scan_ask_state<S, REST>(out, M, not_hoisted(x), rows->decay);
    else scan_ask_state<S, 0>(out, M, not_hoisted(x), rows->decay);
    if (last) scan_warp_arrive<S::TILES>(sh->tile_empty, k0);
    if (b == 0) scan_load_dot<S>(p, at, base, sh, wg, it + S::OUT_STAGES - 1);
    __syncwarp();
    if (at_border) border += scan_dot_snapshot<S>(M, smem, sh, k0 + 2 + block);
    scan_wait_full<S::Z_STAGES>(sh->z_full, it);
    __nv_bfloat162 lost[2] = {}, spread = __float2bfloat162_rn(p.s.sigmoid_gate ? 0 : 1);
    if (S::BOTH_PARTS) scan_scale_rows_both(a[0], z, rows->scale);
    else if (S::SPREADS) scan_spread_rows(a[0], lost, spread, z, rows->scale);
    else scan_scale_rows(a[0], z, rows->scale);
#pragma unroll
    for (int i = 0; i < S::AW / 2 && !S::DECAYS_EARLY; i++) M[i] *= rows->decay;
    float n0 = 0, n1 = 0;
    if (S::TRANSPOSED) {
        n0 = N[0] + N[1], n1 = N[2] + N[3];
        asm volatile("" : "+f"(n0), "+f"(n1));  // here and not after the product, which changes N
#pragma unroll
        for (int i = 0; i < 4; i++) N[i] *= rows->decay;
    }
    scan_wait_full<S::TILES>(sh->tile_full, k0 + 1);
#pragma unroll
    for (int k = 0; k < 4; k++) {  // what follows the first ones is made while these are multiplied
        if (k > 0 && S::BOTH_PARTS) {
            if (k > 1) wgmma_wait<1>();
            scan_scale_rows_both(a[k % 2], z + k * 2048, rows->scale + 16 * k);
        } else if (k == 2) {
            if (S::SPREADS) scan_spread_rows(a[1], lost, spread, z + 2 * 2048, rows->scale + 32);
            else scan_scale_rows(a[1], z + 2 * 2048, rows->scale + 32);
        }
        if (k % 2 == 0 || S::BOTH_PARTS) wgmma_fence();
#pragma unroll
        for (int part = 0; part < (S::BOTH_PARTS ? 2 : 1); part++) {
            const unsigned(&of)[4] = S::BOTH_PARTS ? a[k % 2][part] : a[k / 2][k % 2];
            scan_add_product<S>(M, of, y, k);
            if (S::TRANSPOSED) wgmma_rs<1>(N, of, wgmma_narrow_operand(base + scan_at_weights<S>(it), 256 * k), true);
        }
        if (k % 2 || S::BOTH_PARTS) wgmma_commit();
    }
    if (S::MAKES_DOTS) scan_wait_full<1>(&sh->p_full, it);  // and what scan_make_dots has left
    if (S::TRANSPOSED && !(S::SPLIT && wg)) scan_add_n(out, rows->factor, rows->border, n0, n1);
    else scan_scale_tokens(out, rows->factor);
    if (at_border && last) {
        scan_send_border<S>(sh, wg, border, 0, borders);
        for (int k = 0; k < S::BLOCKS; k++) scan_pass_tile<S>(sh, k0 + 2 + (1 - wg) * S::BLOCKS + k);  // the other's
    }
    constexpr int STEPS = S::SPLIT ? 2 : 4;  // of 16 tokens; two warpgroups of one output take half of them each
    const int first = S::SPLIT ? wg * STEPS : 0;
    scan_wait_full<1>(&sh->p_full, it);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        wgmma_ss<1, 0>(out, wgmma_operand(z + first * 2048, k * 2048),
                       wgmma_operand(base + S::AT_P + 32 * first, 32 * k), true);
    wgmma_commit();
    if (!S::TRANSPOSED && b == 0 && threadIdx.x % 128 == 0) {
        tma_store_wait_read<0>();  // the last chunk's results have left Z, the snapshot its place
        if (it > 0) scan_arrive<S::Z_STAGES>(sh->z_empty, it - 1);
    }
    __syncwarp();
    wgmma_wait<0>();
    if (last) scan_warp_arrive<S::TILES>(sh->tile_empty, k0 + 1);
    const unsigned place = S::AT_OUT + it % (S::TRANSPOSED ? S::OUT_STAGES : 1) * S::OUT_BYTES + block * PANEL_BYTES;
    const unsigned panel = S::TRANSPOSED ? base + place : z;
    if constexpr (S::SPLIT) {
        float whole[16];
        scan_add_halves(out, whole, (float *)(smem + scan_at_z<S>(it)), (float *)(smem + S::AT_P), wg);
        if (wg == 0) scan_warp_arrive<1>(&sh->p_empty, it);
        else scan_warp_arrive<S::Z_STAGES>(sh->z_empty, it);
        scan_output<S>(p, at, whole, panel, sh, wg, b, it);
    } else {
        if (last) scan_warp_arrive<1>(&sh->p_empty, it);
        if (S::TRANSPOSED) scan_warp_arrive<S::Z_STAGES>(sh->z_empty, it);
        scan_output<S>(p, at, out, panel, sh, wg, b, it);
    }
}

template <class S>
__device__ __forceinline__ void scan_states(const ScanArgs &p, const ScanPlace &at, unsigned char *smem,
                                            ScanShared<S> *sh) {
    float M[S::BLOCKS][S::AW / 2], N[4];
    scan_load_state<S>(p, at, scan_warpgroup(), M);
    scan_load_n<S>(p, at, scan_warpgroup(), N);
    const int wg = scan_warpgroup();
    if (S::OUT_STAGES == 2) scan_load_dot<S>(p, at, shared_address(smem), sh, wg, 0);
    __syncwarp();
    int borders = 0;
    for (int it = 0, k0 = 0; it < at.chunks; it++) {
        const int c = scan_chunk<S>(at, it), tiles = scan_tiles<S>(p, c);
        scan_keep_state<S>(p, at, shared_address(smem), wg, M, c);
        if (S::MODE == SCAN_DK && scan_border<S>(p, c) >= 0)
            scan_send_border<S>(sh, wg, N[0] + N[1], N[2] + N[3], borders++);
        scan_wait_full<2>(sh->rows_full, it);
        float border = 0;
#pragma unroll
        for (int b = 0; b < S::BLOCKS; b++)
            scan_step<S>(p, at, smem, sh, M[b], N, wg, b, it, k0, tiles > 2, border, borders);
        if (tiles > 2) borders++;
        scan_warp_arrive<2>(sh->rows_empty, it);
        k0 += tiles;
    }
    if (S::REVERSE && scan_is_last<S>(p, at) && p.entering.C) {
        if (S::MODE == SCAN_DV)
            scan_send_border<S>(sh, wg, scan_dot_entering<S>(p, at, scan_warpgroup(), M), 0, borders);
        else scan_send_border<S>(sh, wg, N[0] + N[1], N[2] + N[3], borders);
    }
    if (S::MODE == SCAN_H) scan_store_state<S>(p, at, scan_warpgroup(), M);
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
}

// ----------------------------------------------------------------------------------------------------------------
// The kernels: a block a slice (x), segment (y) and head (z)

template <class S>
__device__ __forceinline__ void scan_barriers(ScanShared<S> *sh) {
    for (int k = 0; k < S::TILES; k++) {
        barrier_init(shared_address(sh->tile_full + k), 1);
        barrier_init(shared_address(sh->tile_empty + k), S::TILE_USERS);
    }
    for (int k = 0; k < S::Z_STAGES; k++) {
        barrier_init(shared_address(sh->z_full + k), 1);
        barrier_init(shared_address(sh->z_empty + k), S::Z_USERS);
    }
    for (int k = 0; k < 2; k++) {
        barrier_init(shared_address(sh->rows_full + k), 2);
        barrier_init(shared_address(sh->rows_empty + k), S::ROWS_USERS);
        barrier_init(shared_address(sh->dot_full[k]), 1), barrier_init(shared_address(sh->dot_full[k] + 1), 1);
    }
    for (int k = 0; S::MAKES_DOTS && k < 4 * S::H_STAGES; k++) barrier_init(shared_address(sh->h_full[0] + k), 4);
    barrier_init(shared_address(&sh->p_full), 4);
    barrier_init(shared_address(&sh->p_empty), S::P_USERS);
    barrier_init(shared_address(&sh->border_full), 8);
    barrier_init(shared_address(&sh->border_empty), 1);
    barrier_init_done();
}

template <class S>
__device__ __forceinline__ void scan_prefetch(const ScanArgs &p) {
    tensor_map_prefetch(&p.x), tensor_map_prefetch(&p.y), tensor_map_prefetch(&p.z), tensor_map_prefetch(&p.out);
    if (S::TRANSPOSED) tensor_map_prefetch(&p.dot);
}

template <class S>
__device__ __forceinline__ void scan_block(const ScanArgs &p, int slice) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(1024) unsigned char scan_memory[];
    unsigned char *smem = scan_memory;
    ScanShared<S> *sh = (ScanShared<S> *)(smem + S::AT_SHARED);
    ScanPlace at;
    at.bh = blockIdx.z, at.b = at.bh / p.s.NH, at.head = at.bh % p.s.NH, at.slice = slice;
    at.first_chunk = blockIdx.y * p.segment_chunks;
    at.chunks = min(p.segment_chunks, scan_chunks(p) - at.first_chunk);
    if (threadIdx.x == 0) scan_barriers<S>(sh);
    if (threadIdx.x == 384) scan_prefetch<S>(p);
    __syncthreads();
    wait_for_earlier();
    if (threadIdx.x < 128) {
        registers_shrink<S::SCORES_REGISTERS>();
        scan_scores<S>(p, at, smem, sh);
    } else if (threadIdx.x < 384) {
        registers_grow<S::STATE_REGISTERS>();
        scan_states<S>(p, at, smem, sh);
    } else {
        registers_shrink<S::AUX_REGISTERS>();
        if (threadIdx.x == 384) scan_copy_tiles<S>(p, at, shared_address(smem), sh);
        if (threadIdx.x == 385) scan_copy_z<S>(p, at, shared_address(smem), sh);
        if (S::REVERSE && threadIdx.x / 32 == 13) scan_add_borders<S>(p, at, sh);
        if (threadIdx.x >= 448) scan_scalars<S>(p, at, smem, sh);
    }
#endif
}

template <class S>
static __global__ void __launch_bounds__(SCAN_THREADS, 1) mlstm_fwd_scan_kernel(const __grid_constant__ ScanArgs p) {
    scan_block<S>(p, blockIdx.x);
}
template <class S>
static __global__ void __launch_bounds__(SCAN_THREADS, 1) mlstm_bwd_scan_kernel(const __grid_constant__ ScanArgs p) {
    scan_block<S>(p, blockIdx.x);
}
// dV and dK of a head side by side: both walk back through Q, K and dH, so one finds in L2 what the other has fetched
template <class V, class K>
static __global__ void __launch_bounds__(SCAN_THREADS, 1)
    mlstm_bwd_scan_pair_kernel(const __grid_constant__ ScanArgs v, const __grid_constant__ ScanArgs k) {
    if (blockIdx.x < v.slices) scan_block<V>(v, blockIdx.x);
    else scan_block<K>(k, blockIdx.x - v.slices);
}

// ----------------------------------------------------------------------------------------------------------------
// Which shapes, and the launches

enum { SCAN_BLOCKS = 132, SCAN_DQ_SEGMENTS = 32 };  // multiprocessors of an H100: one block each; dQ: at most

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

static int scan_slices(const MlstmShape *s, bool transposed) {
    return transposed ? ceil_div(s->dk, scan_columns(scan_pad(s->dv, true), true))
                      : ceil_div(s->dv, scan_columns(scan_pad(s->dk, false), false));
}

// Chunks a segment of H, dV and dK: as many segments as fill the multiprocessors where there are fewer blocks than half
// of them, since each needs a pass over what comes before it
static int scan_segment_chunks(const MlstmShape *s) {
    const int blocks = scan_slices(s, false) * s->B * s->NH, chunks = mlstm_chunks(s);
    const int segments = imin(SCAN_BLOCKS / blocks, chunks / 8);
    return ceil_div(chunks, segments > 1 ? segments : 1);
}
// Narrow heads: the gradients by mlstm_narrow.cuh, for which H keeps states (scan_keep_panel). It has no segments, but
// does the work of three walks, so it may leave as many multiprocessors idle as the scan with three segments would.
static bool scan_narrow(const MlstmShape *s) {
    return s->dk <= 64 && s->dv <= 128 && 3 * scan_segment_chunks(s) >= mlstm_chunks(s);
}
// Of dQ, whose segments begin with a snapshot of H: the number of rounds times the chunks of one, and eight to start,
// is least
static int scan_dq_segment_chunks(const MlstmShape *s) {
    const int slices = scan_slices(s, true), chunks = mlstm_chunks(s), blocks = slices * s->B * s->NH;
    int best = chunks;
    long long least = -1;
    for (int segments = 1; segments <= imax(1, imin(SCAN_DQ_SEGMENTS, chunks / 8)); segments++) {
        const int length = ceil_div(ceil_div(chunks, segments), SCAN_BORDER) * SCAN_BORDER;
        const long long rounds = ceil_div((size_t)blocks * ceil_div(chunks, length), SCAN_BLOCKS);
        const long long cost = rounds * (length + 8);
        if (least < 0 || cost < least) least = cost, best = length;
    }
    return best;
}
// Segments x sequences x heads x slices are at most SCAN_BLOCKS where there is more than one segment.
static size_t scan_pace_words(const MlstmShape *s) {  // eight for each head and segment
    return 8 * ((size_t)s->B * s->NH * SCAN_DQ_SEGMENTS + SCAN_BLOCKS);
}
static size_t scan_segments_floats(const MlstmShape *s) {
    return (size_t)(SCAN_BLOCKS / scan_slices(s, false) + s->B * s->NH) * s->dk * (s->dv + 1) + scan_pace_words(s);
}
// Whether the gates' gradients need no anchors between spans, and dQ no state to begin with: then H keeps no snapshots.
// Row sums of products in two parts (PATHS) are exact enough to be added up over all of a sequence (doc/math.md 4.9).
static bool scan_has_paths(const MlstmShape *s) {
    return scan_pad(s->dk, false) == 128 && scan_pad(s->dv, true) == 256 && s->T <= GATE_PATH_SPANS * MLSTM_SPAN &&
           scan_segment_chunks(s) >= mlstm_chunks(s) && scan_dq_segment_chunks(s) >= mlstm_chunks(s);
}
// Snapshots of a head, of C and of n: no fewer than there are borders
static int scan_snapshots(const MlstmShape *s) {
    return scan_narrow(s) ? ceil_div(mlstm_chunks(s), 2) : scan_has_paths(s) ? 0 : mlstm_chunks(s) / SCAN_BORDER;
}
static int scan_n_snapshots(const MlstmShape *s) { return scan_narrow(s) ? mlstm_chunks(s) : scan_snapshots(s); }
static size_t scan_snapshot_words(const MlstmShape *s) {
    const int A = scan_pad(s->dk, false);
    return (size_t)s->B * s->NH * scan_snapshots(s) * scan_slices(s, false) * A * scan_columns(A, false) / 2;
}
static int scan_anchor_tiles(const MlstmShape *s) {  // narrow: a warp each
    return scan_narrow(s) ? 4 : scan_slices(s, false) + scan_slices(s, true);
}

constexpr bool scan_transposed(int mode) { return mode == SCAN_DQ || mode == SCAN_DK; }
template <int MODE, int A, int EXACT = SCAN_ROUNDED>
using ScanOf = Scan<MODE, A, scan_columns(A, scan_transposed(MODE)), EXACT>;

template <typename Kernel, typename... Args>
static void scan_start(Kernel kernel, size_t bytes, int slices, const ScanArgs &p, cudaStream_t stream,
                       const Args &...args) {
    const dim3 grid((unsigned)slices, (unsigned)ceil_div(mlstm_chunks(&p.s), p.segment_chunks),
                    (unsigned)(p.s.B * p.s.NH));
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    launch_early(kernel, grid, SCAN_THREADS, bytes, stream, args...);
}

template <int MODE, int A, int EXACT = SCAN_ROUNDED>
static void scan_launch(const ScanArgs &p, cudaStream_t stream) {
    if constexpr (MODE == SCAN_DK && EXACT == SCAN_ROUNDED)
        if (p.s.sigmoid_gate) return scan_launch<MODE, A, SCAN_THIRDS>(p, stream);
    typedef ScanOf<MODE, A, EXACT> S;
    void (*kernel)(ScanArgs);
    if constexpr (MODE == SCAN_H) kernel = mlstm_fwd_scan_kernel<S>;
    else kernel = mlstm_bwd_scan_kernel<S>;
    scan_start(kernel, scan_shared_bytes<S>(), p.slices, p, stream, p);
}

// Blocks of a head that walk far keep pace, as do two that read much a chunk. Elsewhere meeting costs more than it
// saves.
static int *scan_pace(const ScanArgs &p, int blocks, float *segments) {
    if (blocks < 2 || blocks > 8 || (p.segment_chunks < 64 && (blocks > 2 || p.s.dk <= 64))) return NULL;
    return (int *)(segments + scan_segments_floats(&p.s)) - scan_pace_words(&p.s);
}

template <int DK, int DV, int EXACT = SCAN_ROUNDED>
static void scan_launch_pair(const ScanArgs &v, const ScanArgs &k, cudaStream_t stream) {
    if constexpr (EXACT == SCAN_ROUNDED)
        if (k.s.sigmoid_gate) return scan_launch_pair<DK, DV, SCAN_THIRDS>(v, k, stream);
    typedef ScanOf<SCAN_DV, DK> V;
    typedef ScanOf<SCAN_DK, DV, EXACT> K;
    const size_t bytes =
        scan_shared_bytes<V>() > scan_shared_bytes<K>() ? scan_shared_bytes<V>() : scan_shared_bytes<K>();
    scan_start(mlstm_bwd_scan_pair_kernel<V, K>, bytes, v.slices + k.slices, k, stream, v, k);
}

template <int MODE>
static void scan_run(ScanArgs p, float *segments, cudaStream_t stream) {
    constexpr bool TRANSPOSED = scan_transposed(MODE);
    const int A = scan_pad(TRANSPOSED ? p.s.dv : p.s.dk, TRANSPOSED);
    p.slices = scan_slices(&p.s, TRANSPOSED), p.pace = scan_pace(p, p.slices, segments);
    if constexpr (TRANSPOSED) {
        if (A == 384) return scan_launch<MODE, 384>(p, stream);
        if (A == 512) return scan_launch<MODE, 512>(p, stream);
    } else if (A == 64) {
        return scan_launch<MODE, 64>(p, stream);
    }
    if (A == 128) return scan_launch<MODE, 128>(p, stream);
    if (A == 192) return scan_launch<MODE, 192>(p, stream);
    if constexpr (MODE == SCAN_DQ)
        if (scan_has_paths(&p.s)) return scan_launch<MODE, 256, SCAN_PATHS>(p, stream);
    if constexpr (MODE == SCAN_DK)
        if (scan_has_paths(&p.s)) {  // as half of a pair, in which it needs fewer registers than alone
            ScanArgs nothing = p;
            nothing.slices = 0;
            return scan_launch_pair<128, 256, SCAN_PATHS>(nothing, p, stream);
        }
    scan_launch<MODE, 256>(p, stream);
}

// Together dV and dK take fewer rounds of the multiprocessors, or as many and all of them are busy anyway
static bool scan_pair_pays(const ScanArgs &v, const ScanArgs &k) {
    const size_t heads = (size_t)v.s.B * v.s.NH * ceil_div(mlstm_chunks(&v.s), v.segment_chunks);
    const size_t of_v = heads * v.slices, of_k = heads * k.slices, left = (of_v - 1) % SCAN_BLOCKS + 1;
    const int apart = ceil_div(of_v, SCAN_BLOCKS) + ceil_div(of_k, SCAN_BLOCKS);
    return ceil_div(of_v + of_k, SCAN_BLOCKS) < apart || 10 * left > 9 * SCAN_BLOCKS;
}

// dV and dK: together where heads are 2 : 1 and it pays, else one after the other
static void scan_run_pair(ScanArgs v, ScanArgs k, float *segments, cudaStream_t stream) {
    const int dk = scan_pad(v.s.dk, false), dv = scan_pad(v.s.dv, true);
    v.slices = scan_slices(&v.s, false), k.slices = scan_slices(&v.s, true);
    if (!scan_pair_pays(v, k)) {
        scan_run<SCAN_DV>(v, segments, stream);
        return scan_run<SCAN_DK>(k, segments, stream);
    }
    v.pace = k.pace = scan_pace(v, v.slices + k.slices, segments);
    if (dk == 64 && dv == 128) return scan_launch_pair<64, 128>(v, k, stream);
    if (dk == 128 && dv == 192) return scan_launch_pair<128, 192>(v, k, stream);
    if (scan_has_paths(&v.s)) return scan_launch_pair<128, 256, SCAN_PATHS>(v, k, stream);
    if (dk == 128 && dv == 256) return scan_launch_pair<128, 256>(v, k, stream);
    if (dk == 192 && dv == 384) return scan_launch_pair<192, 384>(v, k, stream);
    if (dk == 256 && dv == 512) return scan_launch_pair<256, 512>(v, k, stream);
    scan_run<SCAN_DV>(v, segments, stream);
    scan_run<SCAN_DK>(k, segments, stream);
}

// What each segment adds to the states; p as for the scan itself. all: the last one, too, even if it is the only one
template <bool REVERSE>
static void scan_walk_segments(ScanArgs *p, float *segments, bool all, cudaStream_t stream) {
    p->segment_chunks = scan_segment_chunks(&p->s);
    const int count = ceil_div(mlstm_chunks(&p->s), p->segment_chunks);
    if (all || count > 1)
        segment_sums<REVERSE>(p->s, p->y, p->z, p->gates, p->inv_den, p->ds, segments, count, p->segment_chunks, all,
                              stream);
}

// The states that enter the segments, if there are several. walked: scan_walk_segments has been here; m_walk: with
// these scales, if not with those of the states
template <bool REVERSE>
static void scan_segments(ScanArgs *p, float *segments, bool walked, const float *m_walk, cudaStream_t stream) {
    const MlstmShape *s = &p->s;
    if (!walked) scan_walk_segments<REVERSE>(p, segments, false, stream);
    p->segment_chunks = scan_segment_chunks(s);
    const int count = ceil_div(mlstm_chunks(s), p->segment_chunks);
    p->segments = count > 1 ? segments : NULL;
    if (count == 1) return;
    segments_enter<REVERSE>(*s, p->gates.decay, p->initial, segments, count, p->segment_chunks, m_walk, p->gates.m,
                            stream);
}

typedef struct {          // what H leaves for the backward pass; NULL: there will be none
    uint32_t *snapshots;  // [scan_snapshot_words]
    float *n_snapshots;   // [B, NH, scan_n_snapshots, dk]
} ScanSaved;

static ScanArgs scan_args(const MlstmShape &s, const MlstmInput<bf16> &in, const MlstmGates &gates,
                          const ScanSaved &saved) {
    ScanArgs p;
    memset((void *)&p, 0, sizeof p);
    p.s = s, p.gates = gates, p.doc_start = in.doc_start;
    p.snapshots = saved.snapshots, p.n_snapshots = saved.n_snapshots;
    return p;
}

static void scan_forward_maps(ScanArgs *p, const MlstmInput<bf16> &in) {
    const MlstmShape &s = p->s;
    p->x = head_tensor_map(in.q, s.B, s.T, s.NH, s.dk, in.ld);
    p->y = head_tensor_map(in.k, s.B, s.T, s.NH, s.dk, in.ld);
    p->z = head_tensor_map(in.v, s.B, s.T, s.NH, s.dv, in.ld);
}

// h [B, T, NH, dv]; see mlstm_forward. segments [scan_segments_floats]; walked, m_walk: see scan_segments.
static void mlstm_scan_forward(const MlstmShape &s, const MlstmInput<bf16> &in, MlstmState initial, MlstmState final,
                               bf16 *h, const MlstmGates &gates, const ScanSaved &saved, float *segments, bool walked,
                               const float *m_walk, cudaStream_t stream) {
    ScanArgs p = scan_args(s, in, gates, saved);
    p.initial = initial, p.final = final, p.panels = scan_narrow(&s);
    scan_forward_maps(&p, in);
    p.out = head_tensor_map(h, s.B, s.T, s.NH, s.dv, (size_t)s.NH * s.dv);
    scan_segments<false>(&p, segments, walked, m_walk, stream);
    scan_run<SCAN_H>(p, segments, stream);
}

// The pair of this rank's tokens: all but m and G. gates: of the segment alone
static void mlstm_scan_pair(const MlstmShape &s, const MlstmInput<bf16> &in, MlstmState pair, const MlstmGates &gates,
                            const ScanSaved &saved, float *segments, cudaStream_t stream) {
    ScanArgs p = scan_args(s, in, gates, saved);
    scan_forward_maps(&p, in);
    scan_walk_segments<false>(&p, segments, true, stream);
    mlstm_pair<false>(&s, pair, segments, gates.decay, p.segment_chunks, stream);
}

typedef struct {          // of the backward pass
    float *inv_den, *ds;  // [B, NH, T]
    float *q_dq, *k_dk;   // [ceil(dk / 64)][B, NH, T]
    float *anchor;        // [scan_anchor_tiles][B, NH, spans]
    float *anchor_start;  // [scan_anchor_tiles][B, NH]
    float *segments;      // [scan_segments_floats]
} ScanScratch;

static ScanArgs scan_backward_args(const MlstmShape &s, const MlstmInput<bf16> &in, const bf16 *dh,
                                   const MlstmGates &gates, const ScanSaved &saved, const ScanScratch &scratch) {
    ScanArgs p = scan_args(s, in, gates, saved);
    p.inv_den = scratch.inv_den, p.ds = scratch.ds, p.anchor = scratch.anchor;
    p.x = head_tensor_map(in.k, s.B, s.T, s.NH, s.dk, in.ld);
    p.y = head_tensor_map(in.q, s.B, s.T, s.NH, s.dk, in.ld);
    p.z = head_tensor_map(dh, s.B, s.T, s.NH, s.dv, (size_t)s.NH * s.dv);
    return p;
}

// The backward pair of this rank's tokens
static void mlstm_scan_backward_pair(const MlstmShape &s, const MlstmInput<bf16> &in, const bf16 *dh, MlstmState pair,
                                     const MlstmGates &gates, const ScanSaved &saved, const ScanScratch &scratch,
                                     cudaStream_t stream) {
    ScanArgs p = scan_backward_args(s, in, dh, gates, saved, scratch);
    scan_walk_segments<true>(&p, scratch.segments, pair.C != NULL, stream);
    if (pair.C) mlstm_pair<true>(&s, pair, scratch.segments, gates.decay, p.segment_chunks, stream);
}

// Whether dQ makes <dh, h>, and with it inv_den and ds (MAKES_DOTS)
static bool scan_makes_dots(const MlstmShape *s, const bf16 *h) {
    return scan_pad(s->dv, true) == 256 && scan_slices(s, true) == 1 && !s->sigmoid_gate && (uintptr_t)h % 16 == 0;
}

// dq, dk, dv: rows ld_grad apart; dh [B, T, NH, dv]; see mlstm_backward. dfinal: gradient of the states that leave,
// C == NULL: zeros; walked: mlstm_scan_backward_pair has been here; h: if scan_makes_dots(), else NULL
static void mlstm_scan_backward(const MlstmShape &s, const MlstmInput<bf16> &in, MlstmState initial, MlstmState dfinal,
                                bool walked, const bf16 *dh, const bf16 *h, bf16 *dq, bf16 *dk, bf16 *dv,
                                size_t ld_grad, const MlstmGates &gates, const ScanSaved &saved,
                                const ScanScratch &scratch, cudaStream_t stream) {
    ScanArgs p = scan_backward_args(s, in, dh, gates, saved, scratch);
    const CUtensorMap q_map = p.y, k_map = p.x, dh_map = p.z;
    const CUtensorMap v_map = head_tensor_map(in.v, s.B, s.T, s.NH, s.dv, in.ld);
    const CUtensorMap dk_map = head_tensor_map(dk, s.B, s.T, s.NH, s.dk, ld_grad);
    const CUtensorMap dv_map = head_tensor_map(dv, s.B, s.T, s.NH, s.dv, ld_grad);

    ScanArgs for_dq = p;
    for_dq.x = dh_map, for_dq.y = v_map, for_dq.z = k_map, for_dq.dot = q_map, for_dq.h = h;
    for_dq.out = head_tensor_map(dq, s.B, s.T, s.NH, s.dk, ld_grad);
    for_dq.initial = initial, for_dq.segment_chunks = scan_dq_segment_chunks(&s), for_dq.dot_out = scratch.q_dq;
    if (h) scan_run<SCAN_DQ>(for_dq, scratch.segments, stream);  // the others, and the segments, want its ds

    p.entering = initial, p.anchor_start = scratch.anchor_start;
    p.initial = dfinal;
    scan_segments<true>(&p, scratch.segments, walked, NULL, stream);
    ScanArgs for_dv = p, for_dk = p;
    for_dv.out = dv_map;
    for_dk.x = v_map, for_dk.y = dh_map, for_dk.z = q_map, for_dk.dot = k_map, for_dk.out = dk_map;
    for_dk.anchor_tile = scan_slices(&s, false), for_dk.dot_out = scratch.k_dk;
    scan_run_pair(for_dv, for_dk, scratch.segments, stream);
    // else last: it begins where the others have ended, with what the caches keep
    if (!h) scan_run<SCAN_DQ>(for_dq, scratch.segments, stream);
}

#endif
