// mlstm_narrow.cuh: the gradients of q, k and v of narrow mLSTM heads (dk <= 64, dv <= 128) on Hopper, in bf16, by one
// walk backward in time that reads every input once (formulas: doc/math.md 4).
//
// The scan (mlstm_scan.cuh) makes dv, dk and dq by three walks, each with a state of its own. A state of 64 x 128 fits
// one warpgroup, so here a block has a whole head and does all at once. For each chunk of 64 tokens, with the state C,
// n that enters it (kept by the forward scan) and the gradient dC, dn of the state that leaves it:
//
//     P^T  = weights * (K Q^T)            dv = scale (K dC) + P^T dH                 values
//     dS^T = weights * (V dH^T + ds)      dk = scale (V dC^T + dn) + dS^T Q          keys
//     dq   = factor (dH C^T) + factor ds n + dS K                                    states
//     dC   = decay dC + (factor Q)^T dH,  dn = decay dn + Q^T (factor ds)            states
//
// factor = qscale / den, of a query; scale = kscale, of a key; ds from <dh_l, h_l> = sum over j of P_lj <dh_l, v_j> +
// factor_l <C^T q_l, dh_l>, so that nobody need give that or h. A block has four warpgroups:
//
//   states    dC [dk, dv] in 64 accumulators a thread, published in bf16 for the others as soon as it is made; dq, for
//             which dS comes back from shared memory; between spans <C, dC> + <n, dn>, a share from each warp
//   values    both scores, the weights of P, which stays in registers as operand; ds for the others; dv
//   keys      V dH^T once more, the weights of dS; dk
//   aux       a thread starts the copies of Q, K, V, dH, C and n by TMA, two chunks in a ring; two warps make the rows'
//             scalars from the gates
//
// What ordinary instructions have read from a place of the ring is fenced off before the place is given back: ldmatrix
// may still be on its way when the signal and then TMA have overtaken it.
//
// Cost of a chunk in cycles of the tensor cores (2,048 multiply-adds): 128 + 2 x 256 for the scores, 256 for each of
// K dC, V dC^T, dH C^T, P^T dH, dC, 128 for each of dS^T Q, dS K: 2,176. Bytes a token and head of 64/128: 768 of q, k,
// v, dh, 256 of C, 4 of n, 512 of dq, dk, dv, 44 of scalars: 1,584, which take 0.22 ms for 393,216 of them at 2.8 TB/s,
// or 4.8 us a chunk on each of 132 multiprocessors. Registers of a thread: states 160 (dC 64, dq 32, operand 16),
// values 160 (dv 64, scores 32 + 32), keys 152 (dk 32, scores 32, weights 32), aux 40. Shared memory: 208 KB.
#ifndef XLSTMC_MLSTM_NARROW_CUH
#define XLSTMC_MLSTM_NARROW_CUH

#include "mlstm_scan.cuh"

enum { NARROW_THREADS = 512, NARROW_STAGES = 2, NARROW_SPANS = 4 };
enum {
    NARROW_STATES_REGISTERS = 160,
    NARROW_VALUES_REGISTERS = 160,
    NARROW_KEYS_REGISTERS = 144,
    NARROW_AUX_REGISTERS = 48
};
// Shared memory: a stage of the ring, then what is there twice or once
enum {
    NARROW_AT_Q = 0,
    NARROW_AT_K = PANEL_BYTES,
    NARROW_AT_V = 2 * PANEL_BYTES,
    NARROW_AT_DH = 4 * PANEL_BYTES,
    NARROW_AT_C = 6 * PANEL_BYTES,
    NARROW_STAGE = 8 * PANEL_BYTES,
    NARROW_AT_DC = NARROW_STAGES * NARROW_STAGE,       // [2][64, 128]
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
    const char *C;         // [B, NH, NC] the state that enters each chunk, [128 dv, 64 dk] in two panels
    const float *n;        // [B, NH, NC, dk]
    MlstmGateInput gate_input;
    const float *q_dq_exact, *tail;  // as in MlstmGateSums
    MlstmState initial;              // of the forward pass
    void *dgates;                    // [B * T, 2NH] row stride ld_dgates, in bf16 or float
    size_t ld_dgates;
    bool dgates_bf16;
    float *bias_sums;  // [NUM_BIAS_SUMS][NH][B]
};

// What the gates' gradients need of a span of MLSTM_SPAN tokens: row sums, before dq and dk are rounded, and a share of
// each warp of <C, dC> + <n, dn> where the span begins
struct alignas(16) NarrowSpan {
    float q_dq[MLSTM_SPAN], k_dk[MLSTM_SPAN], anchor[4];
};

struct alignas(16) NarrowShared {
    // factor: of the queries, scale: of the keys; add and border: as for dQ, both once ds_full says so
    ScanRows rows[NARROW_STAGES];
    float n[NARROW_STAGES][64], dn[2][64];
    NarrowSpan spans[NARROW_SPANS];
    // Of the gates' warp, for the tokens of a span: the sums, and for a document's first token in the span its last
    // one, counted from the span's start
    alignas(16) float path[MLSTM_SPAN], igate[MLSTM_SPAN], fgate[MLSTM_SPAN];
    int last[MLSTM_SPAN], start[MLSTM_SPAN];
    float inside[4][64], before[64];  // parts of <dh, h>: from the chunk, a warp's keys each, and from C
    uint64_t qk_full[NARROW_STAGES], v_full[NARROW_STAGES], C_full[NARROW_STAGES], rows_full[NARROW_STAGES],
        ds_full[NARROW_STAGES], empty[NARROW_STAGES];  // v: and dH; all places of a stage are empty together
    uint64_t dC_full[2], dC_empty[2], dn_full[2], dS_full[2], dS_empty[2], before_full, span_full[NARROW_SPANS],
        span_empty[NARROW_SPANS];
};
enum { NARROW_SHARED_BYTES = NARROW_AT_SHARED + sizeof(NarrowShared) };
static_assert(NARROW_SHARED_BYTES <= 227 * 1024, "shared memory of a block");

struct NarrowPlace {  // what a block does
    int b, head, bh, chunks;
};
__device__ __forceinline__ int narrow_chunk(const NarrowPlace &at, int it) { return at.chunks - 1 - it; }
// In the order of the walk
__device__ __forceinline__ int narrow_span(const NarrowPlace &at, int c) { return (at.chunks - 1) / 2 - c / 2; }
__device__ __forceinline__ unsigned narrow_stage(unsigned base, int it) {
    return base + it % NARROW_STAGES * NARROW_STAGE;
}

// ----------------------------------------------------------------------------------------------------------------
// The aux warpgroup

__device__ __forceinline__ void narrow_copy(const NarrowArgs &p, const NarrowPlace &at, unsigned base,
                                            NarrowShared *sh) {
    for (int it = 0; it < at.chunks; it++) {
        const int c = narrow_chunk(at, it), t0 = c * SCAN_CHUNK, place = it % NARROW_STAGES;
        const unsigned stage = narrow_stage(base, it), qk = shared_address(sh->qk_full + place),
                       v = shared_address(sh->v_full + place), C = shared_address(sh->C_full + place);
        const size_t state = (size_t)at.bh * at.chunks + c;
        scan_wait_empty<NARROW_STAGES>(sh->empty, it);
        barrier_arrive_expect(qk, 2 * PANEL_BYTES);
        tma_load(stage + NARROW_AT_K, &p.k, qk, 0, at.head, t0, at.b);
        tma_load(stage + NARROW_AT_Q, &p.q, qk, 0, at.head, t0, at.b);
        barrier_arrive_expect(v, 4 * PANEL_BYTES);
        for (int i = 0; i < 2; i++) {
            tma_load(stage + NARROW_AT_V + i * PANEL_BYTES, &p.v, v, 64 * i, at.head, t0, at.b);
            tma_load(stage + NARROW_AT_DH + i * PANEL_BYTES, &p.dh, v, 64 * i, at.head, t0, at.b);
        }
        barrier_arrive_expect(C, 2 * PANEL_BYTES + p.s.dk * (int)sizeof(float));
        bulk_load(stage + NARROW_AT_C, p.C + state * (2 * PANEL_BYTES), 2 * PANEL_BYTES, C);
        bulk_load(shared_address(sh->n[place]), p.n + state * p.s.dk, p.s.dk * sizeof(float), C);
    }
}

// Two warps, a lane a row; the next chunk's values are loaded while the others work. add: for the time being, its part
// for each unit of <dh, h>, 1, 0 or -1
__device__ __forceinline__ void narrow_scalars(const NarrowArgs &p, const NarrowPlace &at, unsigned char *smem,
                                               NarrowShared *sh) {
    const float log2_s = -0.5f * __log2f((float)p.s.dk);
    const int i = threadIdx.x % 64;
    for (int it = 0; it < at.chunks; it++) {
        const int c = narrow_chunk(at, it), t = c * SCAN_CHUNK + i;
        const size_t gate = (size_t)at.bh * p.s.T + t;
        ScanRows *rows = &sh->rows[it % NARROW_STAGES];
        const float decay = p.gates.decay[(size_t)at.bh * at.chunks + c];
        float u = -1e30f, r = 1e30f;  // beyond the end: no weight with any other token
        float q = 0, k = 0, add = 0, inv_den = 1;
        int start = 0;
        if (t < p.s.T) {
            u = p.gates.u_high[gate], r = p.gates.r_high[gate], q = p.gates.qscale[gate], k = p.gates.kscale[gate];
            const float2 by = mlstm_row_factor(p.s, p.gates.sig, p.gates.floor, gate);
            inv_den = by.x, add = by.y == 0 ? 0 : copysignf(1, by.y);
            start = p.doc_start[(size_t)at.b * p.s.T + t];
        }
        scan_wait_empty<NARROW_STAGES>(sh->empty, it);
        rows->u[i] = u;
        rows->r[i] = r - log2_s - __log2f(inv_den);
        rows->factor[i] = q * inv_den, rows->scale[i] = k;
        rows->add[i] = add;
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
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        matrices_store(panel + panel_piece(row, j + lane / 16), pack_two(x[4 * j], x[4 * j + 1]),
                       pack_two(x[4 * j + 2], x[4 * j + 3]), pack_two(x[4 * j + 4], x[4 * j + 5]),
                       pack_two(x[4 * j + 6], x[4 * j + 7]));
}

// Sums of x times what lies in a panel, of the two rows of a thread
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
// to: of a span that chunk c is in
__device__ __forceinline__ void narrow_store_dots(float *to, float2 sum, int c) {
    to += c % 2 * SCAN_CHUNK + narrow_row();
    if (threadIdx.x % 4 == 0) to[0] = sum.x, to[8] = sum.y;
}

// x [64 tokens, 64 PANELS] leaves for memory through panels of shared memory, which the warpgroup alone uses by now
template <int PANELS>
__device__ __forceinline__ void narrow_output(const NarrowPlace &at, const CUtensorMap *map,
                                              const float (&x)[32 * PANELS], unsigned panels, int c) {
    const int wg = threadIdx.x / 128;
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();  // of the chunk before
    named_barrier_sync(1 + wg, 128);
#pragma unroll
    for (int i = 0; i < PANELS; i++) narrow_store_panel(x + 32 * i, panels + i * PANEL_BYTES);
    fence_async_proxy();
    named_barrier_sync(1 + wg, 128);
    if (threadIdx.x % 128 == 0)
        for (int i = 0; i < PANELS; i++)
            tma_store(map, panels + i * PANEL_BYTES, 64 * i, at.head, c * SCAN_CHUNK, at.b);
    __syncwarp();
}

// The weighted scores as operand of 64 x 64
__device__ __forceinline__ void narrow_pack(unsigned (&a)[4][4], const float (&w)[32]) {
#pragma unroll
    for (int k = 0; k < 16; k++) a[k / 4][k % 4] = pack_two(w[2 * k], w[2 * k + 1]);
}

// ----------------------------------------------------------------------------------------------------------------
// Values: ds and dv

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

// ds, by a thread a query, from <dh_l, h_l> = sum over j of P_lj <dh_l, v_j> + factor_l <C^T q_l, dh_l>
__device__ __forceinline__ void narrow_make_ds(unsigned char *smem, NarrowShared *sh, int it) {
    const int i = threadIdx.x % 128;
    named_barrier_sync(1 + threadIdx.x / 128, 128);
    if (i >= 64) return;
    ScanRows *rows = &sh->rows[it % NARROW_STAGES];
    scan_wait_full<1>(&sh->before_full, it);
    const float dot = (sh->inside[0][i] + sh->inside[1][i]) + (sh->inside[2][i] + sh->inside[3][i]) + sh->before[i];
    const float add = rows->add[i] * dot;  // ds den
    const unsigned words = pack_two(add, add - to_float(from_float<bf16>(add)));
    rows->add[i] = add, rows->border[i] = rows->factor[i] * add;
    ((uint4 *)(smem + NARROW_AT_WEIGHTS + it % NARROW_STAGES * 1024))[i] = make_uint4(words, words, words, words);
    fence_async_proxy();
    scan_warp_arrive<NARROW_STAGES>(sh->ds_full, it);
}

__device__ __forceinline__ void narrow_values(const NarrowArgs &p, const NarrowPlace &at, unsigned char *smem,
                                              NarrowShared *sh) {
    const unsigned base = shared_address(smem);
    for (int it = 0; it < at.chunks; it++) {
        const unsigned stage = narrow_stage(base, it), q = stage + NARROW_AT_Q, k = stage + NARROW_AT_K,
                       v = stage + NARROW_AT_V, dh = stage + NARROW_AT_DH,
                       dC = base + NARROW_AT_DC + it % 2 * (2 * PANEL_BYTES);
        const ScanRows *rows = &sh->rows[it % NARROW_STAGES];
        float w[32], dP[32], dv[64];
        unsigned a[4][4];
        scan_wait_full<NARROW_STAGES>(sh->qk_full, it);
#pragma unroll
        for (int i = 0; i < 32; i++) w[i] = dP[i] = 0;
#pragma unroll
        for (int i = 0; i < 64; i++) dv[i] = 0;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_ss<0, 0>(w, wgmma_operand(k, 32 * i), wgmma_operand(q, 32 * i), true);
        wgmma_commit();
        scan_wait_full<NARROW_STAGES>(sh->v_full, it);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at_k = i / 4 * PANEL_BYTES + i % 4 * 32;
            wgmma_ss<0, 0>(dP, wgmma_operand(v, at_k), wgmma_operand(dh, at_k), true);
        }
        wgmma_commit();
        scan_wait_full<NARROW_STAGES>(sh->rows_full, it);
        const float scale[2] = {rows->scale[narrow_row()], rows->scale[narrow_row() + 8]};
        wgmma_wait<1>();
        scan_weights<Scan<SCAN_DV, 64, 128>>(w, rows, not_hoisted(threadIdx.x % 128));
        wgmma_wait<0>();
        narrow_sum_keys(w, dP, sh->inside[threadIdx.x / 32 % 4]);
        narrow_pack(a, w);
        scan_wait_full<2>(sh->dC_full, it);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_ss<0, 1>(dv, wgmma_operand(k, 32 * i), wgmma_operand(dC, 2048 * i), true);
        wgmma_commit();
        narrow_make_ds(smem, sh, it);
        __syncwarp();
        wgmma_wait<0>();
        scan_warp_arrive<2>(sh->dC_empty, it);
#pragma unroll
        for (int i = 0; i < 64; i++) dv[i] *= scale[i / 2 % 2];
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_rs<1>(dv, a[i], wgmma_operand(dh, 2048 * i), true);
        wgmma_commit();
        wgmma_wait<0>();
        scan_warp_arrive<NARROW_STAGES>(sh->empty, it);
        narrow_output<2>(at, &p.dv, dv, base + NARROW_AT_OUT_V, narrow_chunk(at, it));
    }
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
}

// ----------------------------------------------------------------------------------------------------------------
// Keys: dS and dk

__device__ __forceinline__ void narrow_keys(const NarrowArgs &p, const NarrowPlace &at, unsigned base,
                                            NarrowShared *sh) {
    for (int it = 0; it < at.chunks; it++) {
        const unsigned stage = narrow_stage(base, it), v = stage + NARROW_AT_V, dh = stage + NARROW_AT_DH,
                       dC = base + NARROW_AT_DC + it % 2 * (2 * PANEL_BYTES);
        const int c = narrow_chunk(at, it), span = narrow_span(at, c);
        const ScanRows *rows = &sh->rows[it % NARROW_STAGES];
        float w[32], D[32], dk[32];  // D: the weights of pairs alone, made while ds is not there
        unsigned a[4][4];
        scan_wait_full<NARROW_STAGES>(sh->v_full, it);
#pragma unroll
        for (int i = 0; i < 32; i++) w[i] = dk[i] = 0, D[i] = 1;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at_k = i / 4 * PANEL_BYTES + i % 4 * 32;
            wgmma_ss<0, 0>(w, wgmma_operand(v, at_k), wgmma_operand(dh, at_k), true);
        }
        wgmma_commit();
        if (it == 0 || c % 2) scan_wait_empty<NARROW_SPANS>(sh->span_empty, span);
        scan_wait_full<2>(sh->dC_full, it);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at_k = i / 4 * PANEL_BYTES + i % 4 * 32;
            wgmma_ss<0, 0>(dk, wgmma_operand(v, at_k), wgmma_operand(dC, at_k), true);
        }
        wgmma_commit();
        scan_wait_full<NARROW_STAGES>(sh->rows_full, it);
        const float scale[2] = {rows->scale[narrow_row()], rows->scale[narrow_row() + 8]};
        scan_weights<Scan<SCAN_DV, 64, 128>>(D, rows, not_hoisted(threadIdx.x % 128));
        scan_wait_full<NARROW_STAGES>(sh->ds_full, it);
        wgmma_wait<1>();
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 add = *(const float2 *)&rows->add[8 * j + threadIdx.x % 4 * 2];
#pragma unroll
            for (int i = 0; i < 4; i++) w[4 * j + i] = D[4 * j + i] * (w[4 * j + i] + (i % 2 ? add.y : add.x));
        }
        scan_wait_empty<2>(sh->dS_empty, it);
        narrow_store_panel(w, base + NARROW_AT_DS + it % 2 * PANEL_BYTES);
        fence_async_proxy();
        scan_warp_arrive<2>(sh->dS_full, it);
        narrow_pack(a, w);
        scan_wait_full<2>(sh->dn_full, it);
        float2 dn[8];
#pragma unroll
        for (int j = 0; j < 8; j++) dn[j] = *(const float2 *)&sh->dn[it % 2][8 * j + threadIdx.x % 4 * 2];
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < 32; i++) dk[i] = scale[i / 2 % 2] * (dk[i] + (i % 2 ? dn[i / 4].y : dn[i / 4].x));
        scan_warp_arrive<2>(sh->dC_empty, it);
        scan_wait_full<NARROW_STAGES>(sh->qk_full, it);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_rs<1>(dk, a[i], wgmma_operand(stage, NARROW_AT_Q + 2048 * i), true);
        wgmma_commit();
        wgmma_wait<0>();
        const float2 dots = narrow_row_dots(dk, stage + NARROW_AT_K);
        fence_async_proxy();  // K has been read before TMA writes to its place
        scan_warp_arrive<NARROW_STAGES>(sh->empty, it);
        narrow_output<1>(at, &p.dk, dk, base + NARROW_AT_OUT_K, narrow_chunk(at, it));
        narrow_store_dots(sh->spans[span % NARROW_SPANS].k_dk, dots, c);
        if (c % 2 == 0) scan_warp_arrive<NARROW_SPANS>(sh->span_full, span);
    }
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
}

// ----------------------------------------------------------------------------------------------------------------
// States: dC, dn and dq. N[0] + N[1] is dn of row narrow_row(), N[2] + N[3] of 8 rows further on.

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

// A warp's share of <C, dC> + <n, dn>, for C as it lies in its panels
__device__ __forceinline__ float narrow_dot_state(const float (&dC)[64], const float (&N)[4], unsigned C,
                                                  const float *n) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row = narrow_row();
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
    if (lane % 4 == 0) sum[0] += n[row] * (N[0] + N[1]), sum[1] += n[row + 8] * (N[2] + N[3]);
    return warp_sum(sum[0] + sum[1]);
}

__device__ __forceinline__ void narrow_states(const NarrowArgs &p, const NarrowPlace &at, unsigned base,
                                              NarrowShared *sh) {
    float dC[64], N[4], dq[32];
    unsigned a[2][2][4];  // of 32 tokens each
    narrow_load_state(p, at, dC, N);
    narrow_publish(base, sh, dC, 0);
    narrow_publish_n(sh, N, 0);
    for (int it = 0; it < at.chunks; it++) {
        const int c = narrow_chunk(at, it), row = narrow_row(), span = narrow_span(at, c);
        const unsigned stage = narrow_stage(base, it), dh = stage + NARROW_AT_DH, C = stage + NARROW_AT_C;
        const ScanRows *rows = &sh->rows[it % NARROW_STAGES];
#pragma unroll
        for (int i = 0; i < 32; i++) dq[i] = 0;
        scan_wait_full<NARROW_STAGES>(sh->v_full, it);
        scan_wait_full<NARROW_STAGES>(sh->C_full, it);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 8; i++)
            wgmma_ss<0, 1>(dq, wgmma_operand(dh, i / 4 * PANEL_BYTES + i % 4 * 32), wgmma_operand(C, 2048 * i), true);
        wgmma_commit();
        if (it == 0 || c % 2) scan_wait_empty<NARROW_SPANS>(sh->span_empty, span);
        scan_wait_full<NARROW_STAGES>(sh->rows_full, it);
        scan_wait_full<NARROW_STAGES>(sh->qk_full, it);
        const float decay = rows->decay, factor[2] = {rows->factor[row], rows->factor[row + 8]};
        scan_scale_rows(a[0], stage + NARROW_AT_Q, rows->factor);
        scan_scale_rows(a[1], stage + NARROW_AT_Q + 2 * 2048, rows->factor + 32);
#pragma unroll
        for (int i = 0; i < 64; i++) dC[i] *= decay;
#pragma unroll
        for (int i = 0; i < 4; i++) N[i] *= decay;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_rs<1>(dC, a[i / 2][i % 2], wgmma_operand(dh, 2048 * i), true);
        wgmma_commit();
        wgmma_wait<1>();
        const float2 before = narrow_row_dots(dq, stage + NARROW_AT_Q);
        if (threadIdx.x % 4 == 0) sh->before[row] = factor[0] * before.x, sh->before[row + 8] = factor[1] * before.y;
        scan_warp_arrive<1>(&sh->before_full, it);
        wgmma_wait<0>();
        if (it + 1 < at.chunks) narrow_publish(base, sh, dC, it + 1);
        if (it > 0 && threadIdx.x % 128 == 0) {
            tma_store_wait_read<0>();  // the last chunk's dq has left
            scan_arrive<2>(sh->dS_empty, it - 1);
        }
        __syncwarp();
        scan_wait_full<NARROW_STAGES>(sh->ds_full, it);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++)
            wgmma_rs<1>(N, a[i / 2][i % 2],
                        wgmma_narrow_operand(base, NARROW_AT_WEIGHTS + it % NARROW_STAGES * 1024 + 256 * i), true);
        wgmma_commit();
        const float border[2] = {rows->border[row], rows->border[row + 8]};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 n = *(const float2 *)&sh->n[it % NARROW_STAGES][8 * j + threadIdx.x % 4 * 2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                dq[4 * j + 2 * h] = factor[h] * dq[4 * j + 2 * h] + border[h] * n.x;
                dq[4 * j + 2 * h + 1] = factor[h] * dq[4 * j + 2 * h + 1] + border[h] * n.y;
            }
        }
        wgmma_wait<0>();
        if (it + 1 < at.chunks) narrow_publish_n(sh, N, it + 1);
        if (c % 2 == 0) {
            const float share = narrow_dot_state(dC, N, C, sh->n[it % NARROW_STAGES]);
            if (threadIdx.x % 32 == 0) sh->spans[span % NARROW_SPANS].anchor[threadIdx.x / 32] = share;
        }
        scan_wait_full<2>(sh->dS_full, it);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++)
            wgmma_ss<1, 1>(dq, wgmma_operand(base, NARROW_AT_DS + it % 2 * PANEL_BYTES + 2048 * i),
                           wgmma_operand(stage, NARROW_AT_K + 2048 * i), true);
        wgmma_commit();
        wgmma_wait<0>();
        const float2 dots = narrow_row_dots(dq, stage + NARROW_AT_Q);
        fence_async_proxy();
        scan_warp_arrive<NARROW_STAGES>(sh->empty, it);
        narrow_output<1>(at, &p.dq, dq, base + NARROW_AT_DS + it % 2 * PANEL_BYTES, c);
        narrow_store_dots(sh->spans[span % NARROW_SPANS].q_dq, dots, c);
        if (c % 2 == 0) scan_warp_arrive<NARROW_SPANS>(sh->span_full, span);
    }
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
}

// ----------------------------------------------------------------------------------------------------------------
// The gates' gradients, by one warp, a span behind the others: as mlstm_bwd_gates_kernel, whose comment says what they
// are; in float, since the sums are of bf16 products. A shuffle takes some 190 cycles beside the products, so a lane
// has four tokens side by side, 4 lane to 4 lane + 3 of the span.

enum { NARROW_LANE_TOKENS = MLSTM_SPAN / 32 };

struct NarrowGates {  // of a lane's tokens
    int start[NARROW_LANE_TOKENS];
    float i[NARROW_LANE_TOKENS], f[NARROW_LANE_TOKENS];  // before bias and cap
};
__device__ __forceinline__ void narrow_load_gates(NarrowGates *x, const NarrowArgs &p, const NarrowPlace &at,
                                                  int begin) {
#pragma unroll
    for (int e = 0; e < NARROW_LANE_TOKENS; e++) {
        const int l = min(begin + NARROW_LANE_TOKENS * ((int)threadIdx.x % 32) + e, p.s.T - 1);
        const size_t token = (size_t)at.b * p.s.T + l;
        const float *gates = p.gate_input.gates + token * p.gate_input.ld + at.head;
        x->start[e] = p.gate_input.doc_start[token], x->i[e] = gates[0], x->f[e] = gates[p.s.NH];
    }
}

// Suffix sums of <q, dq> - <k, dk>, each within its document, into path; into last the last token of each
// document, at its first one in the span. behind: what reaches the span's last document from the tokens behind
__device__ __forceinline__ void narrow_sum_span(const NarrowGates &x, const NarrowSpan &span, NarrowShared *sh,
                                                float behind, int begin, int end) {
    float sum[NARROW_LANE_TOKENS];
    const int lane = threadIdx.x % 32, first = NARROW_LANE_TOKENS * lane, tokens = end - begin;
    const float4 q = *(const float4 *)&span.q_dq[first], k = *(const float4 *)&span.k_dk[first];
    const int next_start = __shfl_down_sync(0xffffffffu, x.start[0], 1),  // of the next lane's first token
        last_start = __shfl_sync(0xffffffffu, x.start[3], 31);
    sum[0] = q.x - k.x, sum[1] = q.y - k.y, sum[2] = q.z - k.z, sum[3] = q.w - k.w;
#pragma unroll
    for (int e = NARROW_LANE_TOKENS - 1; e >= 0; e--) {
        if (first + e >= tokens) sum[e] = 0;
        if (e < 3 && x.start[e + 1] <= begin + first + e) sum[e] += sum[e + 1];
    }
    float all = sum[0];  // then of the lanes behind, too
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const float add = __shfl_down_sync(0xffffffffu, all, d);
        const int start = __shfl_down_sync(0xffffffffu, x.start[0], d);
        if (lane + d < 32 && start <= begin + first) all += add;
    }
    const float next = __shfl_down_sync(0xffffffffu, all, 1);
#pragma unroll
    for (int e = 0; e < NARROW_LANE_TOKENS; e++) {
        const int l = begin + first + e, start_behind = e < 3 ? x.start[e + 1] : next_start;
        if (lane < 31 && next_start <= l) sum[e] += next;
        if (last_start <= l) sum[e] += behind;
        if (l < end && (l + 1 == end || start_behind == l + 1)) sh->last[max(x.start[e] - begin, 0)] = first + e;
    }
    *(float4 *)&sh->path[first] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    __syncwarp();
}

// anchor: what reaches the tokens before the span; empty: the forget gate of the sequence's first token has no effect
__device__ __forceinline__ void narrow_finish_span(const NarrowSpan &span, const NarrowArgs &p, const NarrowPlace &at,
                                                   NarrowShared *sh, float anchor, bool empty, int begin,
                                                   float (&part)[NUM_BIAS_SUMS]) {
#pragma unroll 1
    for (int e = 0; e < NARROW_LANE_TOKENS; e++) {
        const int i = NARROW_LANE_TOKENS * (threadIdx.x % 32) + e, l = begin + i, start = sh->start[i];
        if (l >= p.s.T) break;
        const int first = max(start - begin, 0), last = sh->last[first];
        const float missing = (start < begin ? anchor : 0) - sh->path[first], k_dk = span.k_dk[i];
        const float d_log_f = sh->path[i] + missing * __fdividef(last + 1 - i, last + 1 - first);
        const float igate = mlstm_cap_gate(p.gate_input, sh->igate[i], at.head),
                    fgate = mlstm_cap_gate(p.gate_input, sh->fgate[i], p.s.NH + at.head);
        const bool no_effect = start == l || (empty && l == 0);
        const float2 d = mlstm_gate_gradients(p.s, p.gate_input.cap, igate, fgate, k_dk, no_effect ? 0 : d_log_f);
        mlstm_add_bias_sums(part, d, k_dk, p.q_dq_exact, (size_t)at.bh * p.s.T + l);
        const size_t to = ((size_t)at.b * p.s.T + l) * p.ld_dgates + at.head;
        if (p.dgates_bf16) {
            ((bf16 *)p.dgates)[to] = from_float<bf16>(d.x), ((bf16 *)p.dgates)[to + p.s.NH] = from_float<bf16>(d.y);
        } else {
            ((float *)p.dgates)[to] = d.x, ((float *)p.dgates)[to + p.s.NH] = d.y;
        }
    }
}

// Whether no state enters the sequence
__device__ __forceinline__ bool narrow_is_empty(const NarrowArgs &p, const NarrowPlace &at) {
    const int lane = threadIdx.x % 32;
    const float *n = p.initial.n + at.b * p.initial.row + (size_t)at.head * p.s.dk;
    bool empty = true;
    for (int a = lane; p.initial.C && a < p.s.dk; a += 32) empty &= n[a] == 0;
    return __all_sync(0xffffffffu, empty);
}

__device__ __forceinline__ void narrow_gates(const NarrowArgs &p, const NarrowPlace &at, NarrowShared *sh) {
    const int lane = threadIdx.x % 32, spans = (at.chunks + 1) / 2;
    const bool empty = narrow_is_empty(p, at);
    float behind = p.tail ? p.tail[at.bh] : 0, part[NUM_BIAS_SUMS] = {};
    part[BIAS_SURPLUS] = lane == 0 ? behind : 0;
    for (int k = 0; k < spans; k++) {
        const int begin = (spans - 1 - k) * MLSTM_SPAN, end = min(begin + MLSTM_SPAN, p.s.T);
        const NarrowSpan &span = sh->spans[k % NARROW_SPANS];
        NarrowGates x;
        narrow_load_gates(&x, p, at, begin);
        const int first = NARROW_LANE_TOKENS * lane;
        *(float4 *)&sh->igate[first] = make_float4(x.i[0], x.i[1], x.i[2], x.i[3]);
        *(float4 *)&sh->fgate[first] = make_float4(x.f[0], x.f[1], x.f[2], x.f[3]);
        *(int4 *)&sh->start[first] = make_int4(x.start[0], x.start[1], x.start[2], x.start[3]);
        scan_wait_full<NARROW_SPANS>(sh->span_full, k);
        const float anchor = (span.anchor[0] + span.anchor[1]) + (span.anchor[2] + span.anchor[3]);
        narrow_sum_span(x, span, sh, behind, begin, end);
        narrow_finish_span(span, p, at, sh, anchor, empty, begin, part);
        behind = anchor;
        scan_warp_arrive<NARROW_SPANS>(sh->span_empty, k);
    }
    part[BIAS_SURPLUS] -= lane == 0 ? behind : 0;
#pragma unroll
    for (int k = 0; k < NUM_BIAS_SUMS; k++) {
        const float sum = warp_sum(part[k]);
        if (lane == 0) p.bias_sums[((size_t)k * p.s.NH + at.head) * p.s.B + at.b] = sum;
    }
}

// ----------------------------------------------------------------------------------------------------------------
// The kernel: a block a head

__device__ __forceinline__ void narrow_barriers(NarrowShared *sh) {
    for (int k = 0; k < NARROW_STAGES; k++) {
        barrier_init(shared_address(sh->qk_full + k), 1), barrier_init(shared_address(sh->v_full + k), 1);
        barrier_init(shared_address(sh->C_full + k), 1), barrier_init(shared_address(sh->rows_full + k), 2);
        barrier_init(shared_address(sh->ds_full + k), 2), barrier_init(shared_address(sh->empty + k), 12);
    }
    for (int k = 0; k < 2; k++) {
        barrier_init(shared_address(sh->dC_full + k), 4), barrier_init(shared_address(sh->dC_empty + k), 8);
        barrier_init(shared_address(sh->dS_full + k), 4), barrier_init(shared_address(sh->dS_empty + k), 1);
    }
    barrier_init(shared_address(sh->dn_full), 4), barrier_init(shared_address(sh->dn_full + 1), 4);
    barrier_init(shared_address(&sh->before_full), 4);
    for (int k = 0; k < NARROW_SPANS; k++)
        barrier_init(shared_address(sh->span_full + k), 8), barrier_init(shared_address(sh->span_empty + k), 1);
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
        if (warp == 13) narrow_gates(p, at, sh);
        if (warp >= 14) narrow_scalars(p, at, scan_memory, sh);
    }
#endif
}

// dq, dk, dv: rows ld_grad apart; dh [B, T, NH, dv]; see mlstm_scan_backward. Only where scan_narrow(). initial,
// dfinal: as there; tail, exact, dgates to partial: see mlstm_gates_backward
template <typename Gates>
static void mlstm_narrow_backward(const MlstmShape &s, const MlstmInput<bf16> &in, MlstmState initial,
                                  MlstmState dfinal, const bf16 *dh, bf16 *dq, bf16 *dk, bf16 *dv, size_t ld_grad,
                                  const MlstmGates &gates, const ScanSaved &saved, const float *tail,
                                  const float *exact, Gates *dgates, size_t ld_dgates, float *dbias, float *partial,
                                  cudaStream_t stream) {
    NarrowArgs p;
    memset((void *)&p, 0, sizeof p);
    p.s = s, p.gates = gates, p.doc_start = in.doc_start, p.initial = initial, p.dfinal = dfinal;
    p.C = (const char *)saved.snapshots, p.n = saved.n_snapshots;
    p.gate_input = {in.gates, in.ld_gates, in.bias, in.cap, in.doc_start};
    p.tail = tail, p.q_dq_exact = exact, p.bias_sums = partial;
    p.dgates = dgates, p.ld_dgates = ld_dgates, p.dgates_bf16 = sizeof(Gates) == sizeof(bf16);
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
    launch_early(mlstm_bwd_gate_bias_kernel, s.NH, 256, 0, stream, dbias, partial, s.B, exact != NULL);
}

#endif
