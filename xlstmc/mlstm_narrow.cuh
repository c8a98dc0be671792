// mlstm_narrow.cuh: the gradients of q, k and v of narrow mLSTM heads (dk <= 64, dv <= 128) on Hopper, in bf16, by one
// walk backward in time that reads every input once (formulas: doc/math.md 4).
//
// The scan (mlstm_scan.cuh) makes dv, dk and dq by three walks, each with a state of its own. A state of 64 x 128 fits
// one warpgroup, so here a block has a whole head and does all at once. For each chunk of 64 tokens, with the state C,
// n that enters it and the gradient dC, dn of the state that leaves it:
//
//     P^T  = weights * (K Q^T)            dv = scale (K dC) + P^T dH                 values
//     dS^T = weights * (V dH^T + ds)                                                 values
//     dk   = scale (V dC^T + dn) + dS^T Q                                            keys
//     dq   = factor (dH C^T) + factor ds n + dS K                                    keys
//     dC   = decay dC + (factor Q)^T dH,  dn = decay dn + Q^T (factor ds)            states
//
// The forward scan keeps n at every chunk, but C at even ones alone. An odd chunk asks that of the even chunk before
// it, C', and its keys and values K', V' themselves, for C = decay' C' + K'^T (scale' V'):
//
//     dH C^T = decay' (dH C'^T) + ((dH V'^T) scale') K'                              keys
//
// The walk comes to K', V' next, so they only have to be there a chunk early, in a ring of three places.
// factor = qscale / den, of a query; scale = kscale, of a key; ds from <dh_l, h_l> = sum over j of P_lj <dh_l, v_j> +
// factor_l <C^T q_l, dh_l>, so that nobody need give that or h. A block has four warpgroups:
//
//   states    dC [dk, dv] in 64 accumulators a thread, published in bf16 for the others as soon as it is made; dn;
//             between spans <C, dC> + <n, dn>, a share from each warp
//   values    both scores and their weights; P stays in registers as operand, dS goes to keys; ds and the chunk's part
//             of <k, dk> for the others; dv
//   keys      what C and dC answer, with it the states' part of <dh, h> for values; dk, dq
//   aux       a thread starts the copies by TMA, of Q, dH and n to a ring of two places, of K and V to one of three, of
//             C to a place of its own; two warps make the rows' scalars from the gates
//
// In every chunk values wait for keys (before_full), then keys for values (ds, dS); states only keep ahead of them.
// With the sigmoid gate ds, n and dn are 0, and keys do not wait for dn; without the waits for ds it is no faster. What
// ordinary instructions have read from a place of the ring is fenced off before the place is given back: ldmatrix may
// still be on its way when the signal and then TMA have overtaken it.
//
// Cost of a chunk in cycles of the tensor cores (2,048 multiply-adds): 128 + 256 for the scores, 256 for each of K dC,
// V dC^T, dH C^T, P^T dH, dC, 128 for each of dS^T Q, dS K; of an odd one 256 for dH V'^T and 128 for its product with
// K': 1,920 and 2,304 (sigmoid gate: dC in two parts, 256 more). Bytes a token and head of 64/128: 768 of q, k, v, dh,
// 128 of C, 4 of n, 512 of dq, dk, dv, 44 of scalars: 1,456 (and 940 of H), which take 0.20 ms for 393,216 of them at
// 2.8 TB/s, or 4.4 us a chunk on each of 132 multiprocessors. Registers of a thread: states 128 (dC 64, operand 16),
// values 192 (dv 64, P, dP, weights 32 each), keys 152 (dq, dk, dH V'^T 32 each), aux 40. Shared memory: 217 KB.
#ifndef XLSTMC_MLSTM_NARROW_CUH
#define XLSTMC_MLSTM_NARROW_CUH

#include "mlstm_scan.cuh"

// Places of two rings: of Q, dH, n and the rows' scalars, and of K and V
enum { NARROW_THREADS = 512, NARROW_STAGES = 2, NARROW_KV_STAGES = 3 };
enum {
    NARROW_STATES_REGISTERS = 128,
    NARROW_VALUES_REGISTERS = 192,
    NARROW_KEYS_REGISTERS = 152,
    NARROW_AUX_REGISTERS = 40
};
// Shared memory: the rings, then what is there twice or once
enum {
    NARROW_AT_DH = PANEL_BYTES,  // behind Q
    NARROW_STAGE = 3 * PANEL_BYTES,
    NARROW_AT_KV = NARROW_STAGES * NARROW_STAGE,
    NARROW_AT_V = PANEL_BYTES,  // behind K
    NARROW_KV_STAGE = 3 * PANEL_BYTES,
    NARROW_AT_C = NARROW_AT_KV + NARROW_KV_STAGES * NARROW_KV_STAGE,
    NARROW_AT_DC = NARROW_AT_C + 2 * PANEL_BYTES,      // [2][64, 128]
    NARROW_AT_DS = NARROW_AT_DC + 4 * PANEL_BYTES,     // [2] dS^T, and then dq on its way to memory
    NARROW_AT_OUT_V = NARROW_AT_DS + 2 * PANEL_BYTES,  // dv on its way
    NARROW_AT_OUT_K = NARROW_AT_OUT_V + 2 * PANEL_BYTES,
    NARROW_AT_WEIGHTS = NARROW_AT_OUT_K + PANEL_BYTES,  // [2] of the chunk's queries in dn, see scan_at_weights
    NARROW_AT_SHARED = NARROW_AT_WEIGHTS + 2 * 1024,
};

struct NarrowArgs {
    CUtensorMap q, k, v, dh, dq, dk, dv;
    MlstmShape s;
    MlstmGates gates;
    const int *doc_start;  // [B, T]
    MlstmState dfinal;     // gradient of the states that leave; C == NULL: zeros
    const char *C;         // [B, NH, (NC + 1) / 2] what enters every even chunk, [128 dv, 64 dk] in two panels
    const float *n;        // [B, NH, NC, dk]
    float *anchor;         // [4 warps][B, NH, spans] shares of <C, dC> + <n, dn> where a span ends
    float *anchor_start;   // [4 warps][B, NH] the same where the sequence begins
    float *q_dq;           // [B, NH, T] <q, dq>, known from <dh, h> alone
    float *k_dk;           // [B, NH, T] <k, dk>, before dS and dk are rounded
};

struct alignas(16) NarrowShared {
    // factor: of the queries, scale: of the keys; add and border: as for dQ, both once ds_full says so
    ScanRows rows[NARROW_STAGES];
    float n[NARROW_STAGES][64], dn[2][64];
    float inside[4][64], before[64];  // parts of <dh, h>: from the chunk, a warp's keys each, and from C
    float pairs[2][64];               // the chunk's part of <k, dk>
    uint64_t q_full[NARROW_STAGES], dh_full[NARROW_STAGES], rows_full[NARROW_STAGES], ds_full[NARROW_STAGES],
        empty[NARROW_STAGES];  // dh: and n; all of a place is empty at once
    uint64_t k_full[NARROW_KV_STAGES], v_full[NARROW_KV_STAGES], kv_empty[NARROW_KV_STAGES], C_full, C_empty;
    uint64_t dC_full[2], dC_empty[2], dn_full[2], dS_full[2], dS_empty[2], before_full;
};
enum { NARROW_SHARED_BYTES = NARROW_AT_SHARED + sizeof(NarrowShared) };
static_assert(NARROW_SHARED_BYTES <= 227 * 1024, "shared memory of a block");

struct NarrowPlace {  // what a block does
    int b, head, bh, chunks;
};
__device__ __forceinline__ int narrow_chunk(const NarrowPlace &at, int it) { return at.chunks - 1 - it; }
// C of an even chunk serves it and the odd one behind it, with which the walk comes to both: as the j-th pair
__device__ __forceinline__ int narrow_pair(const NarrowPlace &at, int it) {
    return (at.chunks - 1) / 2 - narrow_chunk(at, it) / 2;
}
// Where Q, dH and K, V of a chunk are
__device__ __forceinline__ unsigned narrow_stage(unsigned base, int it) {
    return base + it % NARROW_STAGES * NARROW_STAGE;
}
__device__ __forceinline__ unsigned narrow_kv_stage(unsigned base, int it) {
    return base + NARROW_AT_KV + it % NARROW_KV_STAGES * NARROW_KV_STAGE;
}
// By all lanes of a warp that is done with a chunk's place in both rings
__device__ __forceinline__ void narrow_leave(NarrowShared *sh, int it) {
    __syncwarp();
    if (threadIdx.x % 32) return;
    scan_arrive<NARROW_STAGES>(sh->empty, it);
    scan_arrive<NARROW_KV_STAGES>(sh->kv_empty, it);
}

// ----------------------------------------------------------------------------------------------------------------
// The aux warpgroup

__device__ __forceinline__ void narrow_copy_kv(const NarrowArgs &p, const NarrowPlace &at, unsigned base,
                                               NarrowShared *sh, int it) {
    const int t0 = narrow_chunk(at, it) * SCAN_CHUNK, place = it % NARROW_KV_STAGES;
    const unsigned stage = narrow_kv_stage(base, it), k = shared_address(sh->k_full + place),
                   v = shared_address(sh->v_full + place);
    scan_wait_empty<NARROW_KV_STAGES>(sh->kv_empty, it);
    barrier_arrive_expect(k, PANEL_BYTES);
    tma_load(stage, &p.k, k, 0, at.head, t0, at.b);
    barrier_arrive_expect(v, 2 * PANEL_BYTES);
    for (int i = 0; i < 2; i++) tma_load(stage + NARROW_AT_V + i * PANEL_BYTES, &p.v, v, 64 * i, at.head, t0, at.b);
}
__device__ __forceinline__ void narrow_copy_q(const NarrowArgs &p, const NarrowPlace &at, unsigned base,
                                              NarrowShared *sh, int it) {
    const int c = narrow_chunk(at, it), t0 = c * SCAN_CHUNK, place = it % NARROW_STAGES;
    const unsigned stage = narrow_stage(base, it), q = shared_address(sh->q_full + place),
                   dh = shared_address(sh->dh_full + place),
                   n_bytes = p.s.sigmoid_gate ? 0 : p.s.dk * (int)sizeof(float);
    scan_wait_empty<NARROW_STAGES>(sh->empty, it);
    barrier_arrive_expect(q, PANEL_BYTES);
    tma_load(stage, &p.q, q, 0, at.head, t0, at.b);
    barrier_arrive_expect(dh, 2 * PANEL_BYTES + n_bytes);
    for (int i = 0; i < 2; i++) tma_load(stage + NARROW_AT_DH + i * PANEL_BYTES, &p.dh, dh, 64 * i, at.head, t0, at.b);
    if (n_bytes > 0)
        bulk_load(shared_address(sh->n[place]), p.n + ((size_t)at.bh * at.chunks + c) * p.s.dk, n_bytes, dh);
}

// One thread may wait for all places, since it does so in the order in which they are given back: Q's and K's at the
// end of chunk it - 2, that of C within chunk it - 1. K and V go a chunk ahead, since an odd chunk does not end without
// those of the next one.
__device__ __forceinline__ void narrow_copy(const NarrowArgs &p, const NarrowPlace &at, unsigned base,
                                            NarrowShared *sh) {
    narrow_copy_kv(p, at, base, sh, 0);
    for (int it = 0; it < at.chunks; it++) {
        const int c = narrow_chunk(at, it);
        narrow_copy_q(p, at, base, sh, it);
        if (it + 1 < at.chunks) narrow_copy_kv(p, at, base, sh, it + 1);
        if (it > 0 && c % 2 == 0) continue;  // C is there for the odd chunk
        const size_t state = (size_t)at.bh * ((at.chunks + 1) / 2) + c / 2;
        const unsigned C = shared_address(&sh->C_full);
        scan_wait_empty<1>(&sh->C_empty, narrow_pair(at, it));
        barrier_arrive_expect(C, 2 * PANEL_BYTES);
        bulk_load(base + NARROW_AT_C, p.C + state * (2 * PANEL_BYTES), 2 * PANEL_BYTES, C);
    }
}

// Two warps, a lane a row; the next chunk's values are loaded while the others work. For the time being, add and
// border are for each unit of <dh, h>: of ds den, 1, 0 or -1; of <q, dq> = <dh, h> + ds sig, 1 or eps / den
__device__ __forceinline__ void narrow_scalars(const NarrowArgs &p, const NarrowPlace &at, unsigned char *smem,
                                               NarrowShared *sh) {
    const float log2_s = -0.5f * __log2f((float)p.s.dk);
    const int i = threadIdx.x % 64;
    for (int it = 0; it < at.chunks; it++) {
        const int c = narrow_chunk(at, it), t = c * SCAN_CHUNK + i;
        const size_t gate = (size_t)at.bh * p.s.T + t;
        ScanRows *rows = &sh->rows[it % NARROW_STAGES];
        const float decay = p.gates.decay[(size_t)at.bh * at.chunks + c];
        float2 u = {-1e30f, 0}, r = {1e30f, 0};  // beyond the end: no weight with any other token
        float q = 0, k = 0, add = 0, inv_den = 1;
        int start = 0;
        if (t < p.s.T) {
            u = p.gates.u[gate], r = p.gates.r[gate], q = p.gates.qscale[gate], k = p.gates.kscale[gate];
            const float2 by = mlstm_row_factor(p.s, p.gates.sig, p.gates.floor, gate);
            inv_den = by.x, add = by.y == 0 ? 0 : copysignf(1, by.y);
            start = p.doc_start[(size_t)at.b * p.s.T + t];
        }
        scan_wait_empty<NARROW_STAGES>(sh->empty, it);
        rows->u[i] = u.x + u.y;
        rows->r[i] = r.x + r.y - log2_s - __log2f(inv_den);
        rows->factor[i] = q * inv_den, rows->scale[i] = k;
        rows->add[i] = add, rows->border[i] = add == 0 ? 1 : p.s.eps * inv_den;
        rows->start[i] = max(start - c * SCAN_CHUNK, 0);
        if (i == 0) rows->decay = decay;
        scan_warp_arrive<NARROW_STAGES>(sh->rows_full, it);
    }
}

// ----------------------------------------------------------------------------------------------------------------
// What the three others share. A thread's x[4j + 2h + e] is element (row, column) of a result with row = narrow_row() +
// 8h, column = 8j + 2 (lane % 4) + e.

__device__ __forceinline__ int narrow_row(void) { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

// 64 x 64 in bf16 into a panel
__device__ __forceinline__ void narrow_store_panel(const float *x, unsigned panel) {
    const int thread = not_hoisted(threadIdx.x), lane = thread % 32, row = thread / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        matrices_store(panel + panel_piece(row, j + lane / 16), pack_two(x[4 * j], x[4 * j + 1]),
                       pack_two(x[4 * j + 2], x[4 * j + 3]), pack_two(x[4 * j + 4], x[4 * j + 5]),
                       pack_two(x[4 * j + 6], x[4 * j + 7]));
}

// Sums of x times what lies in a panel, of the two rows of a thread; <k, dk> of them to memory
__device__ __forceinline__ float2 narrow_row_dots(const float (&x)[32], unsigned panel) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    float2 sum = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        unsigned with[4];
        ldmatrix(with, panel + panel_piece(row, j + lane / 16));
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float2 two = unpack_two(with[k]);
            (k % 2 ? sum.y : sum.x) += x[4 * j + 2 * k] * two.x + x[4 * j + 2 * k + 1] * two.y;
        }
    }
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
        sum.x += __shfl_xor_sync(0xffffffffu, sum.x, d);
        sum.y += __shfl_xor_sync(0xffffffffu, sum.y, d);
    }
    return sum;
}
__device__ __forceinline__ void narrow_store_dots(const NarrowArgs &p, const NarrowPlace &at, float2 sum, int c) {
    const int time = c * SCAN_CHUNK + narrow_row();
    float *to = p.k_dk + (size_t)at.bh * p.s.T + time;
    if (threadIdx.x % 4) return;
    if (time < p.s.T) to[0] = sum.x;
    if (time + 8 < p.s.T) to[8] = sum.y;
}

// x and y, of 64 tokens and 64 columns each, leave for memory through panels of shared memory that only this warpgroup
// uses by now. What left before has been read: tma_store_wait_read by the warpgroup's first thread
__device__ __forceinline__ void narrow_output(const NarrowPlace &at, const CUtensorMap *x_map, const float *x,
                                              unsigned x_panel, const CUtensorMap *y_map, const float *y,
                                              unsigned y_panel, int y_column, int c) {
    const int wg = threadIdx.x / 128;
    named_barrier_sync(1 + wg, 128);
    narrow_store_panel(x, x_panel), narrow_store_panel(y, y_panel);
    fence_async_proxy();
    named_barrier_sync(1 + wg, 128);
    if (threadIdx.x % 128 == 0) {
        tma_store(x_map, x_panel, 0, at.head, c * SCAN_CHUNK, at.b);
        tma_store(y_map, y_panel, y_column, at.head, c * SCAN_CHUNK, at.b);
    }
    __syncwarp();
}

// The weighted scores as operand of 64 x 64
__device__ __forceinline__ void narrow_pack(unsigned (&a)[4][4], const float (&w)[32]) {
#pragma unroll
    for (int k = 0; k < 16; k++) a[k / 4][k % 4] = pack_two(w[2 * k], w[2 * k + 1]);
}

// ----------------------------------------------------------------------------------------------------------------
// Values: ds, dS and dv

// Sums of P dP over a warp's 16 keys, of the 64 queries: a lane keeps one half of the columns and gives the other,
// until two are left
__device__ __forceinline__ void narrow_sum_keys(const float (&P)[32], const float (&dP)[32], float *to) {
    const int lane = threadIdx.x % 32;
    float2 sum[8];
#pragma unroll
    for (int j = 0; j < 8; j++)
        sum[j] = make_float2(P[4 * j] * dP[4 * j] + P[4 * j + 2] * dP[4 * j + 2],
                             P[4 * j + 1] * dP[4 * j + 1] + P[4 * j + 3] * dP[4 * j + 3]);
#pragma unroll
    for (int d = 16, half = 4; d >= 4; d /= 2, half /= 2)
#pragma unroll
        for (int j = 0; j < half; j++) {
            const float2 keep = lane & d ? sum[half + j] : sum[j], give = lane & d ? sum[j] : sum[half + j];
            sum[j].x = keep.x + __shfl_xor_sync(0xffffffffu, give.x, d);
            sum[j].y = keep.y + __shfl_xor_sync(0xffffffffu, give.y, d);
        }
    const int j = lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2;
    *(float2 *)&to[8 * j + 2 * (lane % 4)] = sum[0];
}

// Sums over the chunk's queries of <q, k> dS = P (dP + ds den), of the two keys of a thread: their part of <k, dk>.
// Made of the same numbers as <dh, h>, so that <q, dq> - <k, dk> keeps nothing of the pairs within a chunk; with dS as
// it is rounded for dk and dq it would keep their errors. First P dP, then the rest.
__device__ __forceinline__ float2 narrow_sum_queries(const float (&P)[32], const float (&dP)[32]) {
    float2 sum = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; j++) {
        sum.x += P[4 * j] * dP[4 * j] + P[4 * j + 1] * dP[4 * j + 1];
        sum.y += P[4 * j + 2] * dP[4 * j + 2] + P[4 * j + 3] * dP[4 * j + 3];
    }
    return sum;
}
// dS^T = D (dP + ds den) for the others, D the weights, and the sums above, of which the first part is there
__device__ __forceinline__ void narrow_make_pairs(unsigned base, NarrowShared *sh, const float (&P)[32],
                                                  const float (&D)[32], float (&dP)[32], float2 sum, int it) {
    const float *add = sh->rows[it % NARROW_STAGES].add + threadIdx.x % 4 * 2;
    float *to = sh->pairs[it % 2] + narrow_row();
    scan_wait_empty<2>(sh->dS_empty, it);
    scan_wait_full<NARROW_STAGES>(sh->ds_full, it);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float2 by = *(const float2 *)&add[8 * j];
        sum.x += P[4 * j] * by.x + P[4 * j + 1] * by.y;
        sum.y += P[4 * j + 2] * by.x + P[4 * j + 3] * by.y;
#pragma unroll
        for (int i = 0; i < 4; i++) dP[4 * j + i] = D[4 * j + i] * (dP[4 * j + i] + (i % 2 ? by.y : by.x));
    }
    narrow_store_panel(dP, base + NARROW_AT_DS + it % 2 * PANEL_BYTES);
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
        sum.x += __shfl_xor_sync(0xffffffffu, sum.x, d);
        sum.y += __shfl_xor_sync(0xffffffffu, sum.y, d);
    }
    if (threadIdx.x % 4 == 0) to[0] = sum.x, to[8] = sum.y;
    fence_async_proxy();
    scan_warp_arrive<2>(sh->dS_full, it);
}

// ds, by a thread a query, from <dh_l, h_l> = sum over j of P_lj <dh_l, v_j> + factor_l <C^T q_l, dh_l>;
// <q, dq> for it to store
__device__ __forceinline__ float narrow_make_ds(unsigned char *smem, NarrowShared *sh, int it) {
    const int i = threadIdx.x % 128;
    named_barrier_sync(1 + threadIdx.x / 128, 128);
    if (i >= 64) return 0;
    ScanRows *rows = &sh->rows[it % NARROW_STAGES];
    scan_wait_full<1>(&sh->before_full, it);
    const float dot = (sh->inside[0][i] + sh->inside[1][i]) + (sh->inside[2][i] + sh->inside[3][i]) + sh->before[i];
    const float add = rows->add[i] * dot, q_dq = rows->border[i] * dot;  // add: ds den
    const unsigned words = pack_two(add, add - to_float(from_float<bf16>(add)));
    rows->add[i] = add, rows->border[i] = rows->factor[i] * add;
    ((uint4 *)(smem + NARROW_AT_WEIGHTS + it % NARROW_STAGES * 1024))[i] = make_uint4(words, words, words, words);
    fence_async_proxy();
    scan_warp_arrive<NARROW_STAGES>(sh->ds_full, it);
    return q_dq;
}

__device__ __forceinline__ void narrow_values(const NarrowArgs &p, const NarrowPlace &at, unsigned char *smem,
                                              NarrowShared *sh) {
    const unsigned base = shared_address(smem);
    for (int it = 0; it < at.chunks; it++) {
        const unsigned q = narrow_stage(base, it), dh = q + NARROW_AT_DH, k = narrow_kv_stage(base, it),
                       v = k + NARROW_AT_V, dC = base + NARROW_AT_DC + it % 2 * (2 * PANEL_BYTES);
        const ScanRows *rows = &sh->rows[it % NARROW_STAGES];
        float P[32], dP[32], D[32], dv[64];
        unsigned a[4][4];
        scan_wait_full<NARROW_STAGES>(sh->q_full, it);
        scan_wait_full<NARROW_KV_STAGES>(sh->k_full, it);
#pragma unroll
        for (int i = 0; i < 32; i++) P[i] = dP[i] = 0, D[i] = 1;
#pragma unroll
        for (int i = 0; i < 64; i++) dv[i] = 0;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_ss<0, 0>(P, wgmma_operand(k, 32 * i), wgmma_operand(q, 32 * i), true);
        wgmma_commit();
        scan_wait_full<NARROW_STAGES>(sh->dh_full, it);
        scan_wait_full<NARROW_KV_STAGES>(sh->v_full, it);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at_k = i / 4 * PANEL_BYTES + i % 4 * 32;
            wgmma_ss<0, 0>(dP, wgmma_operand(v, at_k), wgmma_operand(dh, at_k), true);
        }
        wgmma_commit();
        scan_wait_full<NARROW_STAGES>(sh->rows_full, it);
        const float scale[2] = {rows->scale[narrow_row()], rows->scale[narrow_row() + 8]};
        scan_weights<Scan<SCAN_DV, 64, 128>>(D, rows, not_hoisted(threadIdx.x % 128));
        scan_wait_full<2>(sh->dC_full, it);
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_ss<0, 1>(dv, wgmma_operand(k, 32 * i), wgmma_operand(dC, 2048 * i), true);
        wgmma_commit();
        wgmma_wait<1>();
#pragma unroll
        for (int i = 0; i < 32; i++) P[i] *= D[i];
        narrow_sum_keys(P, dP, sh->inside[threadIdx.x / 32 % 4]);
        const float2 pairs = narrow_sum_queries(P, dP);
        const float q_dq = narrow_make_ds(smem, sh, it);
        __syncwarp();
        narrow_make_pairs(base, sh, P, D, dP, pairs, it);
        narrow_pack(a, P);
        wgmma_wait<0>();
        scan_warp_arrive<2>(sh->dC_empty, it);
#pragma unroll
        for (int i = 0; i < 64; i++) dv[i] *= scale[i / 2 % 2];
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_rs<1>(dv, a[i], wgmma_operand(dh, 2048 * i), true);
        wgmma_commit();
        if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();  // the last chunk's dv has left
        __syncwarp();
        wgmma_wait<0>();
        narrow_leave(sh, it);
        const unsigned out = base + NARROW_AT_OUT_V;
        narrow_output(at, &p.dv, dv, out, &p.dv, dv + 32, out + PANEL_BYTES, 64, narrow_chunk(at, it));
        const int i = threadIdx.x % 128, t = narrow_chunk(at, it) * SCAN_CHUNK + i;
        if (i < 64 && t < p.s.T) p.q_dq[(size_t)at.bh * p.s.T + t] = q_dq;  // behind the fence, which would wait for it
    }
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
}

// ----------------------------------------------------------------------------------------------------------------
// Keys: dk and dq

// dq = dH C^T and, behind it, dk = V dC^T, on their way. The C that enters an odd chunk is decay C + K^T (scale V) of
// the chunk before it, whose C is at hand: weights dH V^T between chunks, which the gates of that chunk alone make (the
// walk comes to it next). What makes dq is done when this returns.
template <bool ODD>
__device__ __forceinline__ void narrow_ask_states(const NarrowPlace &at, unsigned base, const NarrowShared *sh,
                                                  float (&dq)[32], float (&dk)[32], int it) {
    const unsigned dh = narrow_stage(base, it) + NARROW_AT_DH, C = base + NARROW_AT_C,
                   dC = base + NARROW_AT_DC + it % 2 * (2 * PANEL_BYTES), v = narrow_kv_stage(base, it) + NARROW_AT_V,
                   k_next = narrow_kv_stage(base, it + 1), v_next = k_next + NARROW_AT_V;
    const ScanRows *rows = &sh->rows[(it + 1) % NARROW_STAGES];
    float w[32];
#pragma unroll
    for (int i = 0; i < 32; i++) dq[i] = dk[i] = w[i] = 0;
    scan_wait_full<NARROW_STAGES>(sh->dh_full, it);
    if constexpr (ODD) scan_wait_full<NARROW_KV_STAGES>(sh->v_full, it + 1);
    scan_wait_full<1>(&sh->C_full, narrow_pair(at, it));
    wgmma_fence();
    if constexpr (ODD) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at_k = i / 4 * PANEL_BYTES + i % 4 * 32;
            wgmma_ss<0, 0>(w, wgmma_operand(dh, at_k), wgmma_operand(v_next, at_k), true);
        }
        wgmma_commit();
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        wgmma_ss<0, 1>(dq, wgmma_operand(dh, i / 4 * PANEL_BYTES + i % 4 * 32), wgmma_operand(C, 2048 * i), true);
    wgmma_commit();
    if constexpr (ODD) {
        unsigned a[4][4];
        scan_wait_full<NARROW_STAGES>(sh->rows_full, it + 1);
        const float decay = rows->decay;
        wgmma_wait<1>();
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 scale = *(const float2 *)&rows->scale[8 * j + threadIdx.x % 4 * 2];
#pragma unroll
            for (int i = 0; i < 4; i++) w[4 * j + i] *= i % 2 ? scale.y : scale.x;
        }
        narrow_pack(a, w);
        scan_wait_full<NARROW_KV_STAGES>(sh->k_full, it + 1);
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < 32; i++) dq[i] *= decay;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_rs<1>(dq, a[i], wgmma_operand(k_next, 2048 * i), true);
        wgmma_commit();
    }
    scan_wait_full<NARROW_KV_STAGES>(sh->v_full, it);
    scan_wait_full<2>(sh->dC_full, it);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int at_k = i / 4 * PANEL_BYTES + i % 4 * 32;
        wgmma_ss<0, 0>(dk, wgmma_operand(v, at_k), wgmma_operand(dC, at_k), true);
    }
    wgmma_commit();
    wgmma_wait<1>();
}

template <bool ODD>
__device__ __forceinline__ void narrow_keys_chunk(const NarrowArgs &p, const NarrowPlace &at, unsigned base,
                                                  NarrowShared *sh, int it) {
    const bool sigmoid = p.s.sigmoid_gate;  // then ds, n and dn are 0
    const int row = narrow_row();
    const unsigned q = narrow_stage(base, it), k = narrow_kv_stage(base, it),
                   dS = base + NARROW_AT_DS + it % 2 * PANEL_BYTES;
    const ScanRows *rows = &sh->rows[it % NARROW_STAGES];
    float dq[32], dk[32];
    narrow_ask_states<ODD>(at, base, sh, dq, dk, it);
    scan_wait_full<NARROW_STAGES>(sh->rows_full, it);
    scan_wait_full<NARROW_STAGES>(sh->q_full, it);
    const float factor[2] = {rows->factor[row], rows->factor[row + 8]},
                scale[2] = {rows->scale[row], rows->scale[row + 8]};
#pragma unroll
    for (int i = 0; i < 32; i++) dq[i] *= factor[i / 2 % 2];
    const float2 before = narrow_row_dots(dq, q);
    if (threadIdx.x % 4 == 0) sh->before[row] = before.x, sh->before[row + 8] = before.y;
    scan_warp_arrive<1>(&sh->before_full, it);
    if (!ODD) scan_warp_arrive<1>(&sh->C_empty, narrow_pair(at, it));
    if (threadIdx.x % 128 == 0) {
        tma_store_wait_read<0>();  // the last chunk's dq and dk have left
        if (it > 0) scan_arrive<2>(sh->dS_empty, it - 1);
    }
    __syncwarp();
    if (!sigmoid) scan_wait_full<2>(sh->dn_full, it);
    scan_wait_full<NARROW_KV_STAGES>(sh->k_full, it);
    wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float2 dn = {0, 0};
        if (!sigmoid) dn = *(const float2 *)&sh->dn[it % 2][8 * j + threadIdx.x % 4 * 2];
#pragma unroll
        for (int i = 0; i < 4; i++) dk[4 * j + i] = scale[i / 2] * (dk[4 * j + i] + (i % 2 ? dn.y : dn.x));
    }
    scan_warp_arrive<2>(sh->dC_empty, it);
    float2 dots = narrow_row_dots(dk, k);
    scan_wait_full<NARROW_STAGES>(sh->ds_full, it);  // `before` has been read, too
    if (!sigmoid) {
        const float border[2] = {rows->border[row], rows->border[row + 8]};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 n = *(const float2 *)&sh->n[it % NARROW_STAGES][8 * j + threadIdx.x % 4 * 2];
#pragma unroll
            for (int i = 0; i < 4; i++) dq[4 * j + i] += border[i / 2] * (i % 2 ? n.y : n.x);
        }
    }
    fence_async_proxy();  // Q, K and n have been read before TMA writes to their places; here nobody waits for it
    scan_wait_full<2>(sh->dS_full, it);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        wgmma_ss<0, 1>(dk, wgmma_operand(dS, 32 * i), wgmma_operand(q, 2048 * i), true);
        wgmma_ss<1, 1>(dq, wgmma_operand(dS, 2048 * i), wgmma_operand(k, 2048 * i), true);
    }
    wgmma_commit();
    const float *pairs = sh->pairs[it % 2] + row;
    dots.x += pairs[0], dots.y += pairs[8];
    wgmma_wait<0>();
    narrow_leave(sh, it);
    narrow_output(at, &p.dk, dk, base + NARROW_AT_OUT_K, &p.dq, dq, dS, 0, narrow_chunk(at, it));
    narrow_store_dots(p, at, dots, narrow_chunk(at, it));  // behind the fence, which would wait for it
}

__device__ __forceinline__ void narrow_keys(const NarrowArgs &p, const NarrowPlace &at, unsigned base,
                                            NarrowShared *sh) {
    for (int it = 0; it < at.chunks; it++) {
        if (narrow_chunk(at, it) % 2) narrow_keys_chunk<true>(p, at, base, sh, it);
        else narrow_keys_chunk<false>(p, at, base, sh, it);
    }
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
}

// ----------------------------------------------------------------------------------------------------------------
// States: dC and dn. N[0] + N[1] is dn of row narrow_row(), N[2] + N[3] of 8 rows further on.

__device__ __forceinline__ void narrow_load_state(const NarrowArgs &p, const NarrowPlace &at, float (&dC)[64],
                                                  float (&N)[4]) {
#pragma unroll
    for (int i = 0; i < 64; i++) dC[i] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) N[i] = 0;
    if (!p.dfinal.C) return;
    const float *C = p.dfinal.C + at.b * p.dfinal.row + (size_t)at.head * p.s.dk * p.s.dv,
                *n = p.dfinal.n + at.b * p.dfinal.row + (size_t)at.head * p.s.dk;
    const int row = narrow_row(), column = threadIdx.x % 4 * 2;
    if (row < p.s.dk) N[0] = n[row];
    if (row + 8 < p.s.dk) N[2] = n[row + 8];
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int a = row + i / 2 % 2 * 8, w = column + i / 4 * 8 + i % 2;
        if (a < p.s.dk && w < p.s.dv) dC[i] = C[a * p.s.dv + w];
        if (i % 16 == 15) asm volatile("" ::: "memory");  // not all addresses at once: registers
    }
}

// dC, of the state that leaves the it-th chunk, for the others
__device__ __forceinline__ void narrow_publish(unsigned base, NarrowShared *sh, const float (&dC)[64], int it) {
    const unsigned to = base + NARROW_AT_DC + it % 2 * (2 * PANEL_BYTES);
    scan_wait_empty<2>(sh->dC_empty, it);
#pragma unroll
    for (int i = 0; i < 2; i++) narrow_store_panel(dC + 32 * i, to + i * PANEL_BYTES);
    fence_async_proxy();
    scan_warp_arrive<2>(sh->dC_full, it);
}
// And dn, after dC
__device__ __forceinline__ void narrow_publish_n(NarrowShared *sh, const float (&N)[4], int it) {
    float *dn = sh->dn[it % 2] + narrow_row();
    if (threadIdx.x % 4 == 0) dn[0] = N[0] + N[1], dn[8] = N[2] + N[3];
    scan_warp_arrive<2>(sh->dn_full, it);
}

// A thread's share of <C, dC>, for C as it lies in its panels
__device__ __forceinline__ float narrow_dot_state(const float (&dC)[64], unsigned C) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const unsigned from = C + panel_piece(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
    float sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
        unsigned with[4];
        ldmatrix_trans(with, from + j * 1024);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float2 two = unpack_two(with[k]);
            sum[k % 2] += dC[4 * j + 2 * k] * two.x + dC[4 * j + 2 * k + 1] * two.y;
        }
    }
    return sum[0] + sum[1];
}
// And of <n, dn>
__device__ __forceinline__ float narrow_dot_n(const float (&N)[4], const float *n) {
    const int row = narrow_row();
    return threadIdx.x % 4 ? 0 : n[row] * (N[0] + N[1]) + n[row + 8] * (N[2] + N[3]);
}
// Where a span ends before chunk c, or the sequence begins with it
__device__ __forceinline__ void narrow_store_anchor(const NarrowArgs &p, const NarrowPlace &at, float share, int c) {
    const float sum = warp_sum(share);
    const unsigned thread = not_hoisted(threadIdx.x);
    const size_t tile = (size_t)(thread / 32) * gridDim.x + at.bh;
    const int spans = (at.chunks + 1) / 2;
    if (thread % 32) return;
    if (c == 0) p.anchor_start[tile] = sum;
    else p.anchor[tile * spans + c / 2 - 1] = sum;
}

// dC = decay dC + (factor Q)^T dH. a: (factor Q)^T of 32 tokens each, then dn is made of it, too
__device__ __forceinline__ void narrow_add_queries(float (&dC)[64], unsigned (&a)[2][2][4], unsigned q, unsigned dh,
                                                   const ScanRows *rows) {
    const float decay = rows->decay;
    scan_scale_rows(a[0], q, rows->factor);
    scan_scale_rows(a[1], q + 2 * 2048, rows->factor + 32);
#pragma unroll
    for (int i = 0; i < 64; i++) dC[i] *= decay;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) wgmma_rs<1>(dC, a[i / 2][i % 2], wgmma_operand(dh, 2048 * i), true);
    wgmma_commit();
    wgmma_wait<0>();
}
// The same with factor Q in two parts, for the sigmoid gate: without a normaliser dk errs most by what rounding loses
// here, and no dn has to be made
__device__ __forceinline__ void narrow_add_queries_both(float (&dC)[64], unsigned q, unsigned dh,
                                                        const ScanRows *rows) {
    const float decay = rows->decay;
    unsigned a[2][2][4];
#pragma unroll
    for (int i = 0; i < 64; i++) dC[i] *= decay;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        scan_scale_rows_both(a[0], q + 2048 * i, rows->factor + 16 * i);
        scan_scale_rows_both(a[1], q + 2048 * (i + 1), rows->factor + 16 * (i + 1));
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < 4; part++)
            wgmma_rs<1>(dC, a[part / 2][part % 2], wgmma_operand(dh, 2048 * (i + part / 2)), true);
        wgmma_commit();
        wgmma_wait<0>();
    }
}

__device__ __forceinline__ void narrow_states(const NarrowArgs &p, const NarrowPlace &at, unsigned base,
                                              NarrowShared *sh) {
    const bool sigmoid = p.s.sigmoid_gate;
    float dC[64], N[4];
    narrow_load_state(p, at, dC, N);
    narrow_publish(base, sh, dC, 0);
    narrow_publish_n(sh, N, 0);
    for (int it = 0; it < at.chunks; it++) {
        const int c = narrow_chunk(at, it);
        const unsigned q = narrow_stage(base, it), dh = q + NARROW_AT_DH;
        const ScanRows *rows = &sh->rows[it % NARROW_STAGES];
        float share = 0;
        unsigned a[2][2][4];
        scan_wait_full<NARROW_STAGES>(sh->rows_full, it);
        scan_wait_full<NARROW_STAGES>(sh->q_full, it);
        scan_wait_full<NARROW_STAGES>(sh->dh_full, it);
        if (sigmoid) narrow_add_queries_both(dC, q, dh, rows);
        else narrow_add_queries(dC, a, q, dh, rows);
#pragma unroll
        for (int i = 0; i < 4; i++) N[i] *= rows->decay;
        if (it + 1 < at.chunks) narrow_publish(base, sh, dC, it + 1);
        if (c % 2 == 0) {  // early, since the next C needs the place
            scan_wait_full<1>(&sh->C_full, narrow_pair(at, it));
            share = narrow_dot_state(dC, base + NARROW_AT_C);
            fence_async_proxy();
            scan_warp_arrive<1>(&sh->C_empty, narrow_pair(at, it));
        }
        if (!sigmoid) {
            scan_wait_full<NARROW_STAGES>(sh->ds_full, it);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; i++)
                wgmma_rs<1>(N, a[i / 2][i % 2],
                            wgmma_narrow_operand(base, NARROW_AT_WEIGHTS + it % NARROW_STAGES * 1024 + 256 * i), true);
            wgmma_commit();
            wgmma_wait<0>();
            if (it + 1 < at.chunks) narrow_publish_n(sh, N, it + 1);
            if (c % 2 == 0) share += narrow_dot_n(N, sh->n[it % NARROW_STAGES]);
        }
        fence_async_proxy();  // Q and n have been read before TMA writes to their places
        narrow_leave(sh, it);
        if (c % 2 == 0) narrow_store_anchor(p, at, share, c);
    }
}

// ----------------------------------------------------------------------------------------------------------------
// The kernel: a block a head

__device__ __forceinline__ void narrow_barriers(NarrowShared *sh) {
    for (int k = 0; k < NARROW_STAGES; k++) {
        barrier_init(shared_address(sh->q_full + k), 1), barrier_init(shared_address(sh->dh_full + k), 1);
        barrier_init(shared_address(sh->rows_full + k), 2), barrier_init(shared_address(sh->ds_full + k), 2);
        barrier_init(shared_address(sh->empty + k), 12);
    }
    for (int k = 0; k < NARROW_KV_STAGES; k++) {
        barrier_init(shared_address(sh->k_full + k), 1), barrier_init(shared_address(sh->v_full + k), 1);
        barrier_init(shared_address(sh->kv_empty + k), 12);
    }
    barrier_init(shared_address(&sh->C_full), 1), barrier_init(shared_address(&sh->C_empty), 8);
    for (int k = 0; k < 2; k++) {
        barrier_init(shared_address(sh->dC_full + k), 4), barrier_init(shared_address(sh->dC_empty + k), 8);
        barrier_init(shared_address(sh->dS_full + k), 4), barrier_init(shared_address(sh->dS_empty + k), 1);
    }
    barrier_init(shared_address(sh->dn_full), 4), barrier_init(shared_address(sh->dn_full + 1), 4);
    barrier_init(shared_address(&sh->before_full), 4);
    barrier_init_done();
}

__device__ __forceinline__ void narrow_prefetch(const NarrowArgs &p) {
    const CUtensorMap *const maps[] = {&p.k, &p.q, &p.v, &p.dh, &p.dq, &p.dk, &p.dv};
#pragma unroll
    for (const CUtensorMap *map : maps) tensor_map_prefetch(map);
}

static __global__ void __launch_bounds__(NARROW_THREADS, 1)
    mlstm_bwd_narrow_scan_kernel(const __grid_constant__ NarrowArgs p) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(1024) unsigned char scan_memory[];
    NarrowShared *sh = (NarrowShared *)(scan_memory + NARROW_AT_SHARED);
    const unsigned base = shared_address(scan_memory);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    NarrowPlace at;
    at.bh = blockIdx.x, at.b = at.bh / p.s.NH, at.head = at.bh % p.s.NH;
    at.chunks = (p.s.T + SCAN_CHUNK - 1) / SCAN_CHUNK;
    if (threadIdx.x == 0) narrow_barriers(sh);
    if (threadIdx.x == 384) narrow_prefetch(p);
    if (threadIdx.x < NARROW_STAGES * 64) sh->n[threadIdx.x / 64][threadIdx.x % 64] = 0;  // so it stays behind dk
    fence_async_proxy();
    __syncthreads();
    wait_for_earlier();
    if (warp < 4) {
        registers_grow<NARROW_STATES_REGISTERS>();
        narrow_states(p, at, base, sh);
    } else if (warp < 8) {
        registers_grow<NARROW_VALUES_REGISTERS>();
        narrow_values(p, at, scan_memory, sh);
    } else if (warp < 12) {
        registers_grow<NARROW_KEYS_REGISTERS>();
        narrow_keys(p, at, base, sh);
    } else {
        registers_shrink<NARROW_AUX_REGISTERS>();
        if (threadIdx.x == 384) narrow_copy(p, at, base, sh);
        if (warp >= 14) narrow_scalars(p, at, scan_memory, sh);
    }
#endif
}

// dq, dk, dv: rows ld_grad apart; dh [B, T, NH, dv]; see mlstm_scan_backward. Only where scan_narrow(). Of the scratch
// the factors of the rows are not read.
static void mlstm_narrow_backward(const MlstmShape &s, const MlstmInput<bf16> &in, MlstmState dfinal, const bf16 *dh,
                                  bf16 *dq, bf16 *dk, bf16 *dv, size_t ld_grad, const MlstmGates &gates,
                                  const ScanSaved &saved, const ScanScratch &scratch, cudaStream_t stream) {
    NarrowArgs p;
    memset((void *)&p, 0, sizeof p);
    p.s = s, p.gates = gates, p.doc_start = in.doc_start, p.dfinal = dfinal;
    p.C = (const char *)saved.snapshots, p.n = saved.n_snapshots;
    p.anchor = scratch.anchor, p.anchor_start = scratch.anchor_start;
    p.q_dq = scratch.q_dq, p.k_dk = scratch.k_dk;
    p.q = head_tensor_map(in.q, s.B, s.T, s.NH, s.dk, in.ld);
    p.k = head_tensor_map(in.k, s.B, s.T, s.NH, s.dk, in.ld);
    p.v = head_tensor_map(in.v, s.B, s.T, s.NH, s.dv, in.ld);
    p.dh = head_tensor_map(dh, s.B, s.T, s.NH, s.dv, (size_t)s.NH * s.dv);
    p.dq = head_tensor_map(dq, s.B, s.T, s.NH, s.dk, ld_grad);
    p.dk = head_tensor_map(dk, s.B, s.T, s.NH, s.dk, ld_grad);
    p.dv = head_tensor_map(dv, s.B, s.T, s.NH, s.dv, ld_grad);
    CUDA_CHECK(cudaFuncSetAttribute(mlstm_bwd_narrow_scan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)NARROW_SHARED_BYTES));
    launch_early(mlstm_bwd_narrow_scan_kernel, s.B * s.NH, NARROW_THREADS, NARROW_SHARED_BYTES, stream, p);
}

#endif
