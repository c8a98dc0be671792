// mlstm_gates.cuh: the gates of the chunkwise mLSTM: their running sums and maxima in the forward pass, the factors of
// the rows between the passes, the gradient of the gates, and the recurrent step of generation.
#ifndef XLSTMC_MLSTM_GATES_CUH
#define XLSTMC_MLSTM_GATES_CUH

#include "cuda_util.cuh"
#include "floats.cuh"
#include "hopper.cuh"

enum { MLSTM_CHUNK = 128, SCAN_CHUNK = 64 };  // tokens a chunk: of the kernels of mlstm.cuh, of mlstm_scan.cuh
enum { MLSTM_SPAN = 128 };                    // tokens from one exact sum of the forget gates' gradients to the next

typedef struct {
    int B, T, NH, dk, dv, sigmoid_gate;
    float eps;
    int chunk;  // MLSTM_CHUNK or SCAN_CHUNK: which kernels (mlstm_chunk)
} MlstmShape;

MAYBE_UNUSED
static int mlstm_chunks(const MlstmShape *s) { return ceil_div(s->T, s->chunk); }

template <typename F>
struct MlstmInput {
    const F *q, *k, *v;  // [B, T, NH, dk or dv], row stride ld
    size_t ld;
    const float *gates;  // [B, T, 2NH] row stride ld_gates: igate then fgate of all heads, before bias and cap
    size_t ld_gates;
    const float *bias;     // [2NH]
    float cap;             // the gate is cap * tanh((pre + bias) / cap); 0: pre + bias
    const int *doc_start;  // [B, T]
};

typedef struct {  // [B] rows of stride row: C [NH, dk, dv], n [NH, dk], m [NH]. C == NULL: zeros, or not wanted
    float *C, *n, *m;
    size_t row;
} MlstmState;

typedef struct {    // [B, NH, T] unless said
    float2 *u, *r;  // (hi, lo) in units of log 2: D_lj = exp2f((u.x - r.x) + (u.y - r.y)), u of j, r of l
    float *floor, *qscale, *kscale, *sig;  // e^{-M_l}; s exp(m_c - r_l) or 0; exp(u_j - r_L) or 0; s q_l . n_l
    float *decay;                          // [B, NH, NC] exp(m_c - r_L) or 0
    float *m;                              // [B, NH, NC + 1] m entering chunk c; m[NC] leaves the last
    float2 *summary;                       // [B, NH, NC] scratch of the forward pass
} MlstmGates;

MAYBE_UNUSED
static void mlstm_take_gates(Arena *a, const MlstmShape *s, MlstmGates *g) {
    const size_t heads = (size_t)s->B * s->NH, rows = heads * s->T, chunks = heads * mlstm_chunks(s);
    g->u = take<float2>(a, rows);
    g->r = take<float2>(a, rows);
    g->floor = take<float>(a, rows);
    g->qscale = take<float>(a, rows);
    g->kscale = take<float>(a, rows);
    g->sig = take<float>(a, rows);
    g->decay = take<float>(a, chunks);
    g->m = take<float>(a, chunks + heads);
    g->summary = take<float2>(a, chunks);
}

// ----------------------------------------------------------------------------------------------------------------
// Gate values and their running sums in a chunk. A warp takes one chunk of one head, of GROUPS * 32 tokens: a lane has
// GROUPS neighbours, from t0 + GROUPS * lane on, sums those and then takes part in a scan of all lanes. Sums are in
// double, as on the CPU: what matters later are small differences of long sums.

enum { MLSTM_GATE_WARPS = 4 };

typedef struct {  // as in MlstmInput
    const float *gates;
    size_t ld;
    const float *bias;
    float cap;
    const int *doc_start;
} MlstmGateInput;

__device__ inline float mlstm_log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }

// Gate `column` from its pre-activation: head for an input gate, NH + head for a forget gate
__device__ inline float mlstm_cap_gate(const MlstmGateInput &in, float raw, int column) {
    float g = raw + in.bias[column];
    return in.cap > 0 ? in.cap * tanhf(g / in.cap) : g;
}
__device__ inline float mlstm_gate(const MlstmGateInput &in, size_t token, int column) {
    return mlstm_cap_gate(in, in.gates[token * in.ld + column], column);
}

typedef struct {  // the chunk of a warp
    int b, head, c, t0;
    size_t bh;  // b * NH + head
} MlstmWarpChunk;

// Neighbouring warps take the heads of one chunk, whose gates share sectors of memory. False: nothing left to do.
template <int GROUPS>
__device__ inline bool mlstm_warp_chunk(const MlstmShape &s, int chunks, MlstmWarpChunk *w) {
    const size_t item = (size_t)blockIdx.x * MLSTM_GATE_WARPS + threadIdx.x / 32;
    w->head = (int)(item % s.NH);
    w->c = (int)(item / s.NH % chunks);
    w->b = (int)(item / s.NH / chunks);
    w->t0 = w->c * 32 * GROUPS;
    w->bh = (size_t)w->b * s.NH + w->head;
    return w->b < s.B;
}

template <int GROUPS>
struct MlstmScan {
    int start[GROUPS];  // doc_start
    double b[GROUPS];   // sum of log sig(f) from the document's first token in this chunk on
    double u[GROUPS];   // i - b
    double top;         // max of u over the tokens of the lanes before, from where b of the lane's first token starts
};
// Max of u over the same tokens as b, of token g of the lane; first: the lane's first token; top: that of g - 1
template <int GROUPS>
__device__ inline double mlstm_scan_top(const MlstmScan<GROUPS> &scan, int g, int first, double top) {
    return scan.start[g] < first + g ? fmax(top, scan.u[g]) : scan.u[g];
}

// What a warp loads of its chunk, all of it before the first use
template <int GROUPS>
struct MlstmChunkGates {
    int start[GROUPS];
    float i[GROUPS], f[GROUPS];  // before bias and cap
};
template <int GROUPS>
__device__ inline void mlstm_load_chunk(MlstmChunkGates<GROUPS> *x, const MlstmShape &s, const MlstmGateInput &in,
                                        const MlstmWarpChunk &w) {
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const int l = w.t0 + GROUPS * (int)(threadIdx.x % 32) + g;
        const size_t token = (size_t)w.b * s.T + min(l, s.T - 1);
        x->start[g] = in.doc_start[token];
        x->i[g] = in.gates[token * in.ld + w.head];
        x->f[g] = in.gates[token * in.ld + s.NH + w.head];
    }
}

// Of the tokens of the lanes before this one, from the start of the document that the lane's first token may belong
// to: `all` of each lane combined, nothing for the first lane. all: over the lane's last tokens, from where their
// document starts; start: of that document; l: the lane's last token
template <int GROUPS, typename Combine>
__device__ inline double mlstm_scan_lanes(double all, int start, int l, double nothing, Combine combine) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const double before = __shfl_up_sync(0xffffffffu, all, d);
        if (lane >= d && l - GROUPS * d >= start) all = combine(all, before);
    }
    const double before = __shfl_up_sync(0xffffffffu, all, 1);
    return lane ? before : nothing;
}

// A token beyond T counts as one of the last document that adds nothing, so that lane 31 always holds the values of
// the chunk's end.
template <int GROUPS>
__device__ inline void mlstm_scan_chunk(MlstmScan<GROUPS> *scan, const MlstmShape &s, const MlstmGateInput &in,
                                        const MlstmWarpChunk &w, const MlstmChunkGates<GROUPS> &x) {
    const int first = w.t0 + GROUPS * (int)(threadIdx.x % 32), last = first + GROUPS - 1;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        scan->start[g] = x.start[g];
        scan->b[g] = first + g < s.T ? mlstm_log_sigmoid(mlstm_cap_gate(in, x.f[g], s.NH + w.head)) : 0;
        if (g > 0 && x.start[g] < first + g) scan->b[g] += scan->b[g - 1];
    }
    const auto add = [](double x, double y) { return x + y; };
    const double b = mlstm_scan_lanes<GROUPS>(scan->b[GROUPS - 1], x.start[GROUPS - 1], last, 0, add);
    double top = -INFINITY;  // over the lane's tokens
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        if (x.start[g] < first) scan->b[g] += b;
        const float i = mlstm_cap_gate(in, x.i[g], w.head);
        const double log_i = s.sigmoid_gate ? mlstm_log_sigmoid(i) : i;
        scan->u[g] = first + g < s.T ? log_i - scan->b[g] : -INFINITY;
        top = mlstm_scan_top(*scan, g, first, top);
    }
    const auto larger = [](double x, double y) { return fmax(x, y); };
    scan->top = mlstm_scan_lanes<GROUPS>(top, x.start[GROUPS - 1], last, -INFINITY, larger);
}
template <int GROUPS>
__device__ inline void mlstm_scan_chunk(MlstmScan<GROUPS> *scan, const MlstmShape &s, const MlstmGateInput &in,
                                        const MlstmWarpChunk &w) {
    MlstmChunkGates<GROUPS> x;
    mlstm_load_chunk(&x, s, in, w);
    mlstm_scan_chunk(scan, s, in, w, x);
}

// ----------------------------------------------------------------------------------------------------------------
// Forward. With m the scale that enters the chunk (0 for a document that begins in it), doc/math.md:
//   r_l = max(m, top_l)  (sigmoid gate: r_l = -b_l),   scale of row l: M_l = b_l + r_l;  the chunk's last M leaves it
// So a chunk maps m to max(b_L + m, b_L + top_L), or to a constant if a document begins in it. Three steps: these maps,
// their composition over the chunks, the values of every token. Where a cluster of blocks holds all chunks of a head
// they are one kernel, else three. Bytes a token and head: 60 or so, most in L2.

// By a warp: the last lane's
template <typename V>
__device__ inline V mlstm_last_lane(V x) {
    return __shfl_sync(0xffffffffu, x, 31);
}

// m -> max(m + x, y); sigmoid gate: m stays 0
template <int GROUPS>
__device__ inline float2 mlstm_chunk_map(const MlstmScan<GROUPS> &scan, const MlstmShape &s, int t0) {
    double top = scan.top;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) top = mlstm_scan_top(scan, g, t0 + GROUPS * (int)(threadIdx.x % 32), top);
    const int fresh = mlstm_last_lane(scan.start[GROUPS - 1]) >= t0;
    const double b = mlstm_last_lane(scan.b[GROUPS - 1]);
    top = mlstm_last_lane(top);
    const double least = s.sigmoid_gate ? 0 : b + (fresh ? fmax(top, 0.0) : top);
    return make_float2(fresh ? -INFINITY : (float)b, (float)least);
}

template <int GROUPS>
static __global__ void mlstm_fwd_gate_summary_kernel(MlstmShape s, MlstmGateInput in, float2 *summary, int chunks) {
    wait_for_earlier();
    MlstmWarpChunk w;
    MlstmScan<GROUPS> scan;
    if (!mlstm_warp_chunk<GROUPS>(s, chunks, &w)) return;
    mlstm_scan_chunk(&scan, s, in, w);
    const float2 map = mlstm_chunk_map(scan, s, w.t0);
    if (threadIdx.x % 32 == 0) summary[w.bh * chunks + w.c] = map;
}

// m -> max(m + add, least); double, since add may be the sum of a long sequence
struct MlstmMap {
    double add, least;
};
__device__ inline MlstmMap mlstm_after(MlstmMap first, MlstmMap then) {
    return {first.add + then.add, fmax(first.least + then.add, then.least)};
}
// By a warp: this lane's and those of the lanes before, composed
__device__ inline MlstmMap mlstm_compose_lanes(MlstmMap map) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const MlstmMap before = {__shfl_up_sync(0xffffffffu, map.add, d), __shfl_up_sync(0xffffffffu, map.least, d)};
        if (lane >= d) map = mlstm_after(before, map);
    }
    return map;
}
__device__ inline MlstmMap mlstm_last_lane(MlstmMap map) {
    return {mlstm_last_lane(map.add), mlstm_last_lane(map.least)};
}
// The composition of a head's maps by a warp, 32 chunks at a time: m[c + 1] of every chunk c; returns the last m, in
// all lanes. Any m serves as scale if all who use it take the same rounded value: so it is enough to round what is
// stored. SEGMENT: *forget is the sum of the log forget gates.
template <bool SEGMENT>
__device__ inline double mlstm_compose_maps(float *m, const float2 *maps, double carry, int chunks, int sigmoid_gate,
                                            double *forget) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) m[0] = (float)carry;
    for (int c0 = 0; c0 < chunks; c0 += 32) {
        const int c = c0 + lane, inside = c < chunks;
        MlstmMap map = {inside ? maps[c].x : 0, inside ? maps[c].y : -INFINITY};
        if (SEGMENT) {
            double sum = map.add;
#pragma unroll
            for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
            *forget += sum;
        }
        if (sigmoid_gate && inside) map.add = -INFINITY;
        map = mlstm_compose_lanes(map);
        const double next = fmax(carry + map.add, map.least);
        if (inside) m[c + 1] = (float)next;
        carry = __shfl_sync(0xffffffffu, next, 31);
    }
    return carry;
}

// A warp takes one head of one sequence. m0 and m_final [B][NH], m_row from one b to the next. SEGMENT: of a segment
// alone, before which there is nothing, not even m = 0; behind m_final stands G [B][NH], the sum of its log forget
// gates.
template <bool SEGMENT>
static __global__ void mlstm_fwd_gate_scale_kernel(float *m, const float2 *summary, const float *m0, float *m_final,
                                                   size_t m_row, int NH, int chunks, int sigmoid_gate) {
    wait_for_earlier();
    const size_t bh = blockIdx.x, at_state = bh / NH * m_row + bh % NH;
    double forget = 0;
    const double first = SEGMENT ? -INFINITY : m0 ? m0[at_state] : 0;
    const double last =
        mlstm_compose_maps<SEGMENT>(m + bh * (chunks + 1), summary + bh * chunks, first, chunks, sigmoid_gate, &forget);
    if (threadIdx.x == 0 && m_final) m_final[at_state] = (float)last;
    if (threadIdx.x == 0 && SEGMENT) m_final[at_state + NH] = (float)forget;
}

__device__ inline float2 mlstm_split_log2(double x) {
    x *= 1.4426950408889634;
    float high = (float)x;
    return make_float2(high, (float)(x - high));
}

// Values of a lane's tokens to [.., T], from token l on; those beyond T are left out. whole: T is a multiple of GROUPS,
// so that two of them are aligned and inside together
template <typename V>
struct alignas(2 * sizeof(V)) MlstmTwo {
    V first, second;
};
template <int GROUPS, typename V>
__device__ inline void mlstm_store_tokens(V *to, const V (&x)[GROUPS], int l, int T, bool whole) {
    if (l >= T) return;
    if (whole) {
#pragma unroll
        for (int g = 0; g < GROUPS; g += 2) *(MlstmTwo<V> *)(to + g) = {x[g], x[g + 1]};
    } else {
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            if (l + g < T) to[g] = x[g];
    }
}

// The values of a chunk's tokens; m enters it, m_next enters the next one
template <int GROUPS>
__device__ inline void mlstm_store_gates(const MlstmScan<GROUPS> &scan, const MlstmShape &s, const MlstmWarpChunk &w,
                                         const MlstmGates &out, int chunks, double m, double m_next) {
    const int lane = threadIdx.x % 32, start_last = mlstm_last_lane(scan.start[GROUPS - 1]),
              first = w.t0 + GROUPS * lane;
    const double r_next = m_next - mlstm_last_lane(scan.b[GROUPS - 1]);
    const float scale = 1 / sqrtf((float)s.dk);
    const size_t at = w.bh * s.T + first;
    const bool whole = s.T % GROUPS == 0;
    float2 u[GROUPS], r[GROUPS];
    float floor[GROUPS], qscale[GROUPS], kscale[GROUPS];
    double top = scan.top;
    if (lane == 0) out.decay[w.bh * chunks + w.c] = start_last >= w.t0 ? 0 : expf((float)(m - r_next));
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const int fresh = scan.start[g] >= w.t0;
        top = mlstm_scan_top(scan, g, first, top);
        const double row = s.sigmoid_gate ? -scan.b[g] : fmax(fresh ? 0 : m, top);
        u[g] = mlstm_split_log2(scan.u[g]);
        r[g] = mlstm_split_log2(row);
        floor[g] = expf((float)-(scan.b[g] + row));
        qscale[g] = fresh ? 0 : scale * expf((float)(m - row));
        kscale[g] = first + g < start_last ? 0 : expf((float)(scan.u[g] - r_next));
    }
    mlstm_store_tokens(out.u + at, u, first, s.T, whole);
    mlstm_store_tokens(out.r + at, r, first, s.T, whole);
    if (!s.sigmoid_gate) mlstm_store_tokens(out.floor + at, floor, first, s.T, whole);
    mlstm_store_tokens(out.qscale + at, qscale, first, s.T, whole);
    mlstm_store_tokens(out.kscale + at, kscale, first, s.T, whole);
}

template <int GROUPS>
static __global__ void mlstm_fwd_gate_tokens_kernel(MlstmShape s, MlstmGateInput in, MlstmGates out, int chunks) {
    wait_for_earlier();
    MlstmWarpChunk w;
    MlstmScan<GROUPS> scan;
    if (!mlstm_warp_chunk<GROUPS>(s, chunks, &w)) return;
    mlstm_scan_chunk(&scan, s, in, w);
    const float *m = out.m + w.bh * (chunks + 1) + w.c;
    mlstm_store_gates(scan, s, w, out, chunks, m[0], m[1]);
}

// All in one, a cluster of blocks a head of a sequence, a block for GATE_HEAD_WARPS * EACH chunks of SCAN_CHUNK tokens.
// What the warps know of their chunks stays in registers while the maps are composed: in each block from its own first
// chunk on, then, by what the blocks before have composed, from the sequence's. m0, m_final, m_row as above
enum { GATE_HEAD_WARPS = 32, GATE_HEAD_EACH = 2, GATE_CLUSTER = 16 };

// The maps of all blocks of the cluster before this one, composed; by a warp of each block, once all have theirs
__device__ inline MlstmMap mlstm_map_before(const MlstmMap *all, int rank) {
    const int lane = threadIdx.x % 32;
    MlstmMap map = {0, -INFINITY};  // changes nothing
#ifdef HOPPER_CODE
    if (lane < rank) {
        const unsigned peer = peer_address(shared_address(all), lane);
        map.add = peer_double(peer), map.least = peer_double(peer + sizeof(double));
    }
#endif
    return mlstm_last_lane(mlstm_compose_lanes(map));
}

template <int EACH>
static __global__ void __launch_bounds__(32 * GATE_HEAD_WARPS)
    mlstm_fwd_gates_kernel(MlstmShape s, MlstmGateInput in, MlstmGates out, const float *m0, float *m_final,
                           size_t m_row, int chunks, int blocks) {
    wait_for_earlier();
    enum { CHUNKS = GATE_HEAD_WARPS * EACH };  // of a block
    __shared__ MlstmMap maps[CHUNKS], all;     // of each chunk, then composed with those before it in the block; of all
    __shared__ float m[CHUNKS + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % blocks, first = rank * CHUNKS;
    const size_t bh = blockIdx.x / blocks;
    const int b = (int)(bh / s.NH), head = (int)(bh % s.NH);
    const size_t at_state = b * m_row + head;
    MlstmScan<SCAN_CHUNK / 32> scan[EACH];
    MlstmChunkGates<SCAN_CHUNK / 32> x[EACH];
    MlstmWarpChunk w[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) {  // all loads first; chunks behind the last token load that
        const int c = first + warp + k * GATE_HEAD_WARPS;
        w[k] = {b, head, c, c * SCAN_CHUNK, bh};
        mlstm_load_chunk(&x[k], s, in, w[k]);
    }
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        float2 map = {0, -INFINITY};
        if (w[k].c < chunks) {
            mlstm_scan_chunk(&scan[k], s, in, w[k], x[k]);
            map = mlstm_chunk_map(scan[k], s, w[k].t0);
            if (s.sigmoid_gate) map.x = -INFINITY;
        }
        if (lane == 0) maps[warp + k * GATE_HEAD_WARPS] = {map.x, map.y};
    }
    __syncthreads();
    if (warp == 0) {
        MlstmMap before = {0, -INFINITY};
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const MlstmMap map = mlstm_after(before, mlstm_compose_lanes(maps[32 * k + lane]));
            maps[32 * k + lane] = map;
            before = mlstm_last_lane(map);
        }
        if (lane == 0) all = before;
    }
#ifdef HOPPER_CODE
    if (blocks > 1) cluster_barrier();
#endif
    if (warp == 0) {  // any m serves if all who use it take the same rounded value
        const MlstmMap before = blocks > 1 ? mlstm_map_before(&all, rank) : MlstmMap{0, -INFINITY};
        const double entering = fmax((m0 ? m0[at_state] : 0) + before.add, before.least);
        if (lane == 0) m[0] = (float)entering;
        if (lane == 0 && rank == 0) out.m[bh * (chunks + 1)] = (float)entering;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const MlstmMap map = maps[32 * k + lane];
            const int c = 32 * k + lane + 1;
            const float next = (float)fmax(entering + map.add, map.least);
            m[c] = next;
            if (first + c <= chunks) out.m[bh * (chunks + 1) + first + c] = next;
            if (m_final && first + c == chunks) m_final[at_state] = next;
        }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < EACH; k++)
        if (w[k].c < chunks) mlstm_store_gates(scan[k], s, w[k], out, chunks, m[w[k].c - first], m[w[k].c - first + 1]);
#ifdef HOPPER_CODE
    if (blocks > 1) cluster_barrier();  // what others read of a block stays until they have read it
#endif
}

static inline int mlstm_gate_blocks(const MlstmShape *s, int chunks) {
    return ceil_div((size_t)s->B * s->NH * chunks, MLSTM_GATE_WARPS);
}

MAYBE_UNUSED
static void mlstm_gate_summary(const MlstmShape *s, const MlstmGateInput &in, const MlstmGates *g,
                               cudaStream_t stream) {
    const int chunks = mlstm_chunks(s), blocks = mlstm_gate_blocks(s, chunks), threads = 32 * MLSTM_GATE_WARPS;
    auto summary = s->chunk == SCAN_CHUNK ? mlstm_fwd_gate_summary_kernel<SCAN_CHUNK / 32>
                                          : mlstm_fwd_gate_summary_kernel<MLSTM_CHUNK / 32>;
    launch_early(summary, blocks, threads, 0, stream, *s, in, g->summary, chunks);
}

// From what mlstm_gate_summary has left. m0 [B][NH] (NULL: zeros) and m_final [B][NH] (NULL: not wanted): rows m_row
// apart. segment: see mlstm_fwd_gate_scale_kernel.
MAYBE_UNUSED
static void mlstm_gate_values(const MlstmShape *s, const MlstmGateInput &in, bool segment, const float *m0,
                              size_t m_row, float *m_final, const MlstmGates *g, cudaStream_t stream) {
    const int chunks = mlstm_chunks(s), blocks = mlstm_gate_blocks(s, chunks), threads = 32 * MLSTM_GATE_WARPS;
    auto scale = segment ? mlstm_fwd_gate_scale_kernel<true> : mlstm_fwd_gate_scale_kernel<false>;
    auto tokens = s->chunk == SCAN_CHUNK ? mlstm_fwd_gate_tokens_kernel<SCAN_CHUNK / 32>
                                         : mlstm_fwd_gate_tokens_kernel<MLSTM_CHUNK / 32>;
    launch_early(scale, s->B * s->NH, 32, 0, stream, g->m, g->summary, m0, m_final, m_row, s->NH, chunks,
                 s->sigmoid_gate);
    launch_early(tokens, blocks, threads, 0, stream, *s, in, *g, chunks);
}

// gates, bias, cap, doc_start as in MlstmInput; m0 to m_final as in mlstm_gate_values. Writes all of g but sig and,
// with the sigmoid gate, floor.
MAYBE_UNUSED
static void mlstm_gates_forward(const MlstmShape *s, const float *gates, size_t ld_gates, const float *bias, float cap,
                                const int *doc_start, const float *m0, size_t m0_row, float *m_final,
                                const MlstmGates *g, cudaStream_t stream) {
    const MlstmGateInput in = {gates, ld_gates, bias, cap, doc_start};
    const int chunks = mlstm_chunks(s), each = ceil_div(chunks, GATE_HEAD_WARPS),
              blocks = ceil_div(chunks, GATE_HEAD_WARPS * GATE_HEAD_EACH);
    auto kernel = each == 1 ? mlstm_fwd_gates_kernel<1> : mlstm_fwd_gates_kernel<GATE_HEAD_EACH>;
    if (s->chunk == SCAN_CHUNK && blocks <= GATE_CLUSTER &&
        clusters_fit((const void *)kernel, blocks, 32 * GATE_HEAD_WARPS, 0)) {
        launch_early_clusters(kernel, s->B * s->NH * blocks, blocks, 32 * GATE_HEAD_WARPS, 0, stream, *s, in, *g, m0,
                              m_final, m0_row, chunks, blocks);
        return;
    }
    mlstm_gate_summary(s, in, g, stream);
    mlstm_gate_values(s, in, false, m0, m0_row, m_final, g, stream);
}

// ----------------------------------------------------------------------------------------------------------------
// Between the passes: h = num / den, den = max(|sig|, floor) + eps. The gradient of num is dh / den; sig takes part in
// the gradient only where it is the larger. q_t is in both num and sig, so <q_t, dq_t> = <dh, h> + ds sig: known here
// without the rounding of a product. 24 bytes a token and head.

typedef struct {          // [B, NH, T]
    float *inv_den, *ds;  // 1 / den and the gradient of sig
    float *q_dq;          // <q, dq>; NULL: not wanted, or not known
} MlstmRows;

// Of place `at` of [B, NH, T]: 1 / den, and the gradient of sig for each unit of <dh, h>
__device__ inline float2 mlstm_row_factor(const MlstmShape &s, const float *sig, const float *floor, size_t at) {
    if (s.sigmoid_gate) return make_float2(1, 0);  // sig and floor need not have been written
    const float size = fabsf(sig[at]), least = floor[at], inv = 1 / (fmaxf(size, least) + s.eps);
    return make_float2(inv, size > least ? -copysignf(inv, sig[at]) : 0);
}

// inv_den, ds, q_dq at place `at` of [B, NH, T]; dot: <dh, h>
__device__ inline void mlstm_store_row(const MlstmRows &rows, const MlstmShape &s, float2 factor, float dot,
                                       const float *sig, size_t at) {
    const float ds = factor.y * dot;
    rows.inv_den[at] = factor.x;
    rows.ds[at] = ds;
    if (rows.q_dq) rows.q_dq[at] = s.sigmoid_gate ? dot : dot + ds * sig[at];
}

static __global__ void mlstm_bwd_row_factors_kernel(MlstmShape s, MlstmRows rows, const float *dh_dot_h,
                                                    const float *sig, const float *floor) {
    wait_for_earlier();
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, T = s.T, NH = s.NH;
    if (at >= s.B * NH * T) return;
    const size_t t = at % T, head = at / T % NH, b = at / T / NH;
    mlstm_store_row(rows, s, mlstm_row_factor(s, sig, floor, at), dh_dot_h ? dh_dot_h[(b * T + t) * NH + head] : 0, sig,
                    at);
}

// The same with <dh, h> made here by LANES threads a row, 32 or 16. The last sequences first: of
// dh, what the caches keep is what the next kernels begin with. V: elements of a load, VEC<F> or 1
template <typename F, int V, int LANES>
static __global__ void __launch_bounds__(256)
    mlstm_bwd_row_dots_kernel(MlstmShape s, MlstmRows row_values, const F *dh, const F *h, const float *sig,
                              const float *floor) {
    wait_for_earlier();
    const unsigned rows = (unsigned)s.T * s.NH;  // of a sequence
    const unsigned k = blockIdx.x * (256 / LANES) + threadIdx.x / LANES, b = s.B - 1 - blockIdx.y;
    const bool inside = k < rows;
    const size_t at = inside ? ((size_t)b * s.NH + k % s.NH) * s.T + k / s.NH : 0;
    const float2 factor = inside ? mlstm_row_factor(s, sig, floor, at) : make_float2(0, 0);
    const size_t row = ((size_t)b * rows + k) * s.dv;
    const int lane = threadIdx.x % LANES;
    float sum = 0;
    for (int w = lane * V; inside && w < s.dv; w += LANES * V) {
        float x[V], y[V];
        load_floats<V>(x, dh + row + w);
        load_floats_once<V>(y, h + row + w);
#pragma unroll
        for (int j = 0; j < V; j++) sum += x[j] * y[j];
    }
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (lane || !inside) return;
    mlstm_store_row(row_values, s, factor, sum, sig, at);
}

// dh_dot_h [B*T, NH] = <dh, h> of each row; NULL with the sigmoid gate, if q_dq is NULL: not needed
MAYBE_UNUSED
static void mlstm_row_factors(const MlstmShape *s, const float *dh_dot_h, const MlstmGates *g, MlstmRows rows,
                              cudaStream_t stream) {
    const int blocks = ceil_div((size_t)s->B * s->NH * s->T, 256);
    launch_early(mlstm_bwd_row_factors_kernel, blocks, 256, 0, stream, *s, rows, dh_dot_h, g->sig, g->floor);
}

// The same from dh and h [B, T, NH, dv]; 4 dv + 20 bytes a token and head in bf16. With the sigmoid gate h is not read.
template <typename F>
static void mlstm_row_factors_of(const MlstmShape *s, const F *dh, const F *h, const MlstmGates *g, MlstmRows rows,
                                 cudaStream_t stream) {
    if (s->sigmoid_gate) return mlstm_row_factors(s, NULL, g, rows, stream);
    const bool vectors = vector_aligned(dh, s->dv) && vector_aligned(h, s->dv), narrow = s->dv <= 16 * VEC<F>;
    auto kernel = !vectors ? mlstm_bwd_row_dots_kernel<F, 1, 32>
                  : narrow ? mlstm_bwd_row_dots_kernel<F, VEC<F>, 16>
                           : mlstm_bwd_row_dots_kernel<F, VEC<F>, 32>;
    const size_t threads = (size_t)s->NH * s->T * (vectors && narrow ? 16 : 32);
    const dim3 grid((unsigned)ceil_div(threads, 256), (unsigned)s->B);
    launch_early(kernel, grid, 256, 0, stream, *s, rows, dh, h, g->sig, g->floor);
}

// ----------------------------------------------------------------------------------------------------------------
// Gradient of the gates from q, k and their gradients (doc/math.md):
//   di_j = <k_j, dk_j>,   d log f_l = anchor + sum over l <= r in l's document and span of <q_r, dq_r> - <k_r, dk_r>
// anchor = <C', dC'> + <n', dn'> of the states that leave the span: it reaches the span's last document only. A span is
// MLSTM_SPAN tokens. At the first token of a document the sum must arrive at 0, at that of the span at the anchor of
// the span before: by what it misses (bf16 products) it is corrected, in proportion to the tokens summed. The log f of
// a document's first token has no effect. The sum of all <k_j, dk_j> is that of all <q_t, dq_t>, but for the anchors at
// both ends: what it misses goes into the gradient of the bias. Bytes a token and head: 28, 8 a tile of the row sums.

typedef struct {               // `tiles` partial sums of every value, added in order
    const float *q_dq, *k_dk;  // [tiles][B, NH, T]
    int tiles;
    const float *q_dq_exact;  // [B, NH, T], see MlstmRows; NULL: not known
    const float *anchor;      // [anchor_tiles][B, NH, spans]
    int anchor_tiles;
    const float *anchor_start;  // [anchor_tiles][B, NH] the same where the sequence begins; NULL: 0
    const float *tail;          // [B, NH] and where it ends, if it is a segment of a longer one; NULL: 0
} MlstmGateSums;

enum { GATE_WARP_TOKENS = 64, GATE_WARPS = MLSTM_SPAN / GATE_WARP_TOKENS };  // of the backward kernel
enum { GATE_HEADS = 8 };                                                     // of a block, at most

// What reaches the tokens before the end of span c from those behind it, all tiles (ends[0]), and the same of the span
// before (ends[1]); by a warp, half of it each
__device__ inline void mlstm_anchors(const MlstmGateSums &sums, const MlstmShape &s, size_t bh, int c, int spans,
                                     double *ends) {
    const int lane = threadIdx.x % 32, before = lane / 16, at = c - before;
    const size_t heads = (size_t)s.B * s.NH, tile = at < 0 ? heads : heads * spans;
    const float *from = at < 0 ? sums.anchor_start + bh : sums.anchor + bh * spans + at;
    double sum = 0;
    if (at + 1 == spans) {
        sum = sums.tail && lane % 16 == 0 ? sums.tail[bh] : 0;
    } else if (at >= 0 || sums.anchor_start) {
        for (int p = lane % 16; p < sums.anchor_tiles; p += 16) sum += from[p * tile];
    }
#pragma unroll
    for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (lane % 16 == 0) ends[before] = sum;
}

// Of the lane's two tokens, l and l + 1, 0 beyond T; pairs: T is even, so that they lie at a multiple of 8 bytes
__device__ inline float2 mlstm_load_two(const float *row, int l, int T, bool pairs) {
    if (pairs) return l < T ? *(const float2 *)(row + l) : make_float2(0, 0);
    return make_float2(l < T ? row[l] : 0, l + 1 < T ? row[l + 1] : 0);
}

// Suffix sums of <q, dq> - <k, dk> over the warp's tokens, each within its document; k_dk for di. l: the lane's first
// token
__device__ inline void mlstm_warp_sums(const MlstmShape &s, const MlstmGateSums &sums, size_t bh, int l,
                                       const int (&start)[2], double (&sum)[2], float (&k_dk)[2]) {
    const int lane = threadIdx.x % 32;
    const size_t tile = (size_t)s.B * s.NH * s.T;
    const bool pairs = s.T % 2 == 0;
    float q_dq[2] = {0, 0};
    k_dk[0] = k_dk[1] = 0;
#pragma unroll 2
    for (int p = 0; p < sums.tiles; p++) {
        const float2 q = mlstm_load_two(sums.q_dq + p * tile + bh * s.T, l, s.T, pairs),
                     k = mlstm_load_two(sums.k_dk + p * tile + bh * s.T, l, s.T, pairs);
        q_dq[0] += q.x, q_dq[1] += q.y, k_dk[0] += k.x, k_dk[1] += k.y;
    }
    sum[1] = (double)q_dq[1] - k_dk[1];
    sum[0] = (double)q_dq[0] - k_dk[0] + (start[1] <= l ? sum[1] : 0);
    double all = sum[0];  // from the lane's first token on
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const double behind = __shfl_down_sync(0xffffffffu, all, d);
        const int start_behind = __shfl_down_sync(0xffffffffu, start[0], d);
        if (lane + d < 32 && start_behind <= l) all += behind;
    }
    const double behind = __shfl_down_sync(0xffffffffu, all, 1);
    const int start_behind = __shfl_down_sync(0xffffffffu, start[0], 1);
    for (int g = 0; g < 2; g++)
        if (lane < 31 && start_behind <= l + g) sum[g] += behind;
}

// Where no states were kept for anchors: what they are by the row sums alone, with what the sum over a document misses
// spread over all of it (doc/math.md 4.9). A block takes a head. anchor [B, NH, spans] and behind it [B, NH], the sum
// of anchor_start, are written; of sums the anchors between spans are not read.
enum { GATE_PATH_SPANS = 1024 };  // at most
static __global__ void __launch_bounds__(1024)
    mlstm_bwd_gate_anchors_kernel(MlstmShape s, const int *doc_start, MlstmGateSums sums, float *anchor, int spans) {
    wait_for_earlier();
    // Of each span: the sum and the number of the tokens whose document began before it, then what reaches the span
    // from that document's tokens in it and behind it; the sum over the document of its last token, and where that
    // starts
    __shared__ double first[GATE_PATH_SPANS], last[GATE_PATH_SPANS];
    __shared__ int tokens[GATE_PATH_SPANS], last_start[GATE_PATH_SPANS];
    const int lane = threadIdx.x % 32, b = blockIdx.x / s.NH;
    const size_t bh = blockIdx.x, heads = (size_t)s.B * s.NH, tile = heads * s.T;
    doc_start += (size_t)b * s.T;
    for (int c = threadIdx.x / 32; c < spans; c += blockDim.x / 32) {
        const int begin = c * MLSTM_SPAN, end = min(begin + MLSTM_SPAN, s.T), start_last = doc_start[end - 1];
        double step[MLSTM_SPAN / 32] = {}, of_first = 0, of_last = 0;
        int start[MLSTM_SPAN / 32], count = 0;
#pragma unroll
        for (int g = 0; g < MLSTM_SPAN / 32; g++) start[g] = doc_start[min(begin + 32 * g + lane, end - 1)];
        for (int p = 0; p < sums.tiles; p++)  // loads of all tokens together
#pragma unroll
            for (int g = 0; g < MLSTM_SPAN / 32; g++) {
                const int l = begin + 32 * g + lane;
                const size_t at = p * tile + bh * s.T + min(l, end - 1);
                const float q = sums.q_dq[at], k = sums.k_dk[at];
                if (l < end) step[g] += (double)q - k;
            }
#pragma unroll
        for (int g = 0; g < MLSTM_SPAN / 32; g++) {
            const int l = begin + 32 * g + lane;
            const bool in_first = l < end && start[g] < begin;
            count += in_first, of_first += in_first ? step[g] : 0, of_last += l >= start_last ? step[g] : 0;
        }
#pragma unroll
        for (int d = 16; d > 0; d /= 2) {
            of_first += __shfl_xor_sync(0xffffffffu, of_first, d), of_last += __shfl_xor_sync(0xffffffffu, of_last, d);
            count += __shfl_xor_sync(0xffffffffu, count, d);
        }
        if (lane == 0) first[c] = of_first, last[c] = of_last, tokens[c] = count, last_start[c] = start_last;
    }
    __syncthreads();
    if (threadIdx.x) return;
    double before = 0;
    for (int p = 0; sums.anchor_start && p < sums.anchor_tiles; p++) before += sums.anchor_start[p * heads + bh];
    anchor[heads * spans + bh] = (float)before;
    anchor += bh * spans;
    for (int c = spans - 1; c > 0;) {
        if (tokens[c] == 0) {  // no document crosses the border in front of c
            anchor[--c] = 0;
            continue;
        }
        const int end = c;  // the last span of one that does; to the span where it starts
        if (end + 1 == spans && sums.tail && last_start[end] < end * MLSTM_SPAN) first[end] += sums.tail[bh];
        for (; c > 1 && tokens[c - 1] == MLSTM_SPAN; c--) first[c - 1] += first[c], tokens[c - 1] += tokens[c];
        const int from = max(last_start[c - 1], (c - 1) * MLSTM_SPAN), length = tokens[c] + c * MLSTM_SPAN - from;
        const double missing = (last_start[0] < 0 && c == 1 ? before : 0) - (first[c] + last[c - 1]);
        for (int k = c; k <= end; k++) anchor[k - 1] = (float)(first[k] + missing * tokens[k] / length);
        c--;
    }
}

// A warp's sums for the gradient of the bias. INPUT, FORGET: of di, df. SURPLUS: of <q, dq> - <k, dk>, with the anchors
// at both ends of the sequence; TERMS, SLOPES: of |<k, dk>| and |di|
enum { BIAS_INPUT, BIAS_FORGET, BIAS_SURPLUS, BIAS_TERMS, BIAS_SLOPES, NUM_BIAS_SUMS };

// A block takes a span of `heads` heads, whose gates lie side by side: they come and go by rows, through shared memory.
// bias_sums [NUM_BIAS_SUMS][NH][B * spans * GATE_WARPS]; n0 [B][NH, dk] enters the sequence, NULL: zeros
template <typename F>
static __global__ void __launch_bounds__(32 * GATE_WARPS * GATE_HEADS, 2)
    mlstm_bwd_gates_kernel(MlstmShape s, MlstmGateInput in, MlstmGateSums sums, const float *n0, size_t n0_row,
                           F *dgates, size_t ld_dgates, float *bias_sums, int spans, int heads) {
    wait_for_earlier();
    __shared__ double anchors[GATE_HEADS][2], first_sums[GATE_HEADS][GATE_WARPS];  // see above; of each warp's first
    __shared__ int first_starts[GATE_HEADS][GATE_WARPS];
    __shared__ double paths[GATE_HEADS][MLSTM_SPAN];  // the sums of all tokens
    __shared__ int lasts[GATE_HEADS][MLSTM_SPAN];  // of a document whose first token in the span this is: its last one
    __shared__ float gates[MLSTM_SPAN * (2 * GATE_HEADS + 1)];  // [tokens][2 heads], then their gradients
    enum { LOADS = 4, EVERY = MLSTM_SPAN / LOADS };  // a thread has a column of 2 * heads and every so many-th token
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % GATE_WARPS, mine = threadIdx.x / 32 / GATE_WARPS,
              NH = s.NH, groups = (NH + heads - 1) / heads, head0 = blockIdx.x % groups * heads,
              head = min(head0 + mine, NH - 1), c = blockIdx.x / groups % spans, b = blockIdx.x / groups / spans,
              begin = c * MLSTM_SPAN, end = min(begin + MLSTM_SPAN, s.T), pitch = 2 * heads + 1;
    const bool present = head0 + mine < NH;  // else its warps do what those of the last head do, for nothing
    const size_t bh = (size_t)b * NH + head;
    const int first = begin + warp * GATE_WARP_TOKENS + 2 * lane;  // of the lane's two tokens
    double *first_sum = first_sums[mine], *path = paths[mine], sum[2];
    int *first_start = first_starts[mine], *last = lasts[mine];
    int start[2], ends[2];  // of the token's document; the document ends here
    float raw[LOADS], k_dk[2];
    const int *doc_start = in.doc_start + (size_t)b * s.T;
    const int row = threadIdx.x / (2 * heads), column = threadIdx.x % (2 * heads),
              its_head = head0 + (column < heads ? column : column - heads),
              gate = min(its_head, NH - 1) + (column < heads ? 0 : NH),
              rows = its_head < NH ? min(MLSTM_SPAN, s.T - begin) : 0;
    const size_t token = (size_t)b * s.T + begin + row;
#pragma unroll
    for (int k = 0; k < LOADS; k++) raw[k] = row + k * EVERY < rows ? in.gates[(token + k * EVERY) * in.ld + gate] : 0;
    for (int g = 0; g < 2; g++) {
        const int l = min(first + g, s.T - 1);
        start[g] = doc_start[l], ends[g] = l + 1 == end || doc_start[l + 1] == l + 1;
    }
    mlstm_warp_sums(s, sums, bh, first, start, sum, k_dk);
    if (lane == 0) first_sum[warp] = sum[0], first_start[warp] = start[0];
#pragma unroll
    for (int k = 0; k < LOADS; k++) gates[(row + k * EVERY) * pitch + column] = mlstm_cap_gate(in, raw[k], gate);
    if (warp == 0) mlstm_anchors(sums, s, bh, c, spans, anchors[mine]);
    const int last_start = doc_start[end - 1];
    int empty = c == 0;  // no state enters: the first forget gate has no effect, as at a reset
    for (int a0 = 0; empty && n0 && a0 < s.dk; a0 += 32)
        empty = __all_sync(0xffffffffu, a0 + lane >= s.dk || n0[b * n0_row + (size_t)head * s.dk + a0 + lane] == 0);
    __syncthreads();

    double carry = anchors[mine][0];  // what the tokens behind a warp add to those of the same document: it begins at
    int carry_start = last_start;     // carry_start
    for (int w = GATE_WARPS - 1; w >= 0; w--) {
        for (int g = 0; g < 2 && w == warp; g++)
            if (carry_start <= first + g) sum[g] += carry;
        carry = first_sum[w] + (carry_start <= begin + w * GATE_WARP_TOKENS ? carry : 0);
        carry_start = first_start[w];
    }
    for (int g = 0; g < 2; g++) {
        const int l = first + g;
        if (l >= end) continue;
        path[l - begin] = sum[g];
        if (ends[g]) last[max(start[g] - begin, 0)] = l;
    }
    __syncthreads();
    float part[NUM_BIAS_SUMS] = {};
    for (int g = 0; g < 2; g++) {
        const int l = first + g;
        if (l >= s.T) continue;
        float *igate = gates + (l - begin) * pitch + mine, *fgate = igate + heads;
        const float i = *igate, f = *fgate;
        const int from = max(start[g], begin), tokens = last[from - begin] - from + 1;
        const double missing = (start[g] < begin ? anchors[mine][1] : 0) - path[from - begin];
        const float d_log_f = (float)(sum[g] + missing * (from + tokens - l) / tokens);
        float di = s.sigmoid_gate ? k_dk[g] / (1 + expf(i)) : k_dk[g];
        float df = start[g] == l || (empty && l == 0) ? 0 : d_log_f / (1 + expf(f));
        if (in.cap > 0) {
            di *= 1 - (i / in.cap) * (i / in.cap);
            df *= 1 - (f / in.cap) * (f / in.cap);
        }
        part[BIAS_INPUT] += di, part[BIAS_FORGET] += df;
        part[BIAS_TERMS] += fabsf(k_dk[g]), part[BIAS_SLOPES] += fabsf(di);
        if (sums.q_dq_exact) part[BIAS_SURPLUS] += (float)((double)sums.q_dq_exact[bh * s.T + l] - k_dk[g]);
        *igate = di, *fgate = df;
    }
    if (lane == 0 && warp == 0 && c == 0) part[BIAS_SURPLUS] -= (float)anchors[mine][1];
    if (lane == 0 && warp == 0 && c + 1 == spans) part[BIAS_SURPLUS] += (float)anchors[mine][0];
    const size_t parts = (size_t)s.B * spans * GATE_WARPS, place = ((size_t)b * spans + c) * GATE_WARPS + warp;
    for (int k = 0; k < NUM_BIAS_SUMS; k++) part[k] = warp_sum(part[k]);
    for (int k = 0; k < NUM_BIAS_SUMS && lane == 0 && present; k++)
        bias_sums[((size_t)k * NH + head) * parts + place] = part[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < LOADS; k++)
        if (row + k * EVERY < rows)
            dgates[(token + k * EVERY) * ld_dgates + gate] = from_float<F>(gates[(row + k * EVERY) * pitch + column]);
}

// dbias [2NH] += the sums of bias_sums [NUM_BIAS_SUMS][NH][parts]; a block a head. exact: <q, dq> was known
static __global__ void mlstm_bwd_gate_bias_kernel(float *dbias, const float *bias_sums, int parts, bool exact) {
    wait_for_earlier();
    const int head = blockIdx.x, NH = gridDim.x;
    float sum[NUM_BIAS_SUMS] = {};
    for (int p = threadIdx.x; p < parts; p += blockDim.x)
#pragma unroll
        for (int k = 0; k < NUM_BIAS_SUMS; k++) sum[k] += bias_sums[((size_t)k * NH + head) * parts + p];
#pragma unroll
    for (int k = 0; k < NUM_BIAS_SUMS; k++) sum[k] = block_sum(sum[k]);
    if (threadIdx.x) return;
    if (exact && sum[BIAS_TERMS] > 0) sum[BIAS_INPUT] += sum[BIAS_SURPLUS] / sum[BIAS_TERMS] * sum[BIAS_SLOPES];
    dbias[head] += sum[BIAS_INPUT];
    dbias[NH + head] += sum[BIAS_FORGET];
}

MAYBE_UNUSED
static size_t mlstm_gates_partial_floats(const MlstmShape *s) {
    return (size_t)NUM_BIAS_SUMS * s->NH * s->B * ceil_div(s->T, MLSTM_SPAN) * GATE_WARPS;
}

// gates, bias, cap, doc_start as in MlstmInput. q_dq, k_dk [tiles][B, NH, T] and anchor [anchor_tiles][B, NH, spans]:
// partial sums, to be added in order (the last span's anchor is not read), anchor_start [anchor_tiles][B, NH], read if
// there are initial states, tail [B, NH] or NULL, exact [B, NH, T]: q_dq of MlstmRows, or NULL. initial: of the forward
// pass. paths: NULL, or anchor is not known between spans, and this is where it may be made, with [B, NH] places more.
// dgates [B*T, 2NH] row stride ld_dgates, gradient of the gates before bias and cap; dbias [2NH] is added to; partial
// [mlstm_gates_partial_floats].
template <typename F>
static void mlstm_gates_backward(const MlstmShape *s, const float *gates, size_t ld_gates, const float *bias, float cap,
                                 const int *doc_start, const float *q_dq, const float *k_dk, int tiles,
                                 const float *anchor, int anchor_tiles, const float *anchor_start, const float *tail,
                                 const float *exact, float *paths, MlstmState initial, F *dgates, size_t ld_dgates,
                                 float *dbias, float *partial, cudaStream_t stream) {
    const MlstmGateInput in = {gates, ld_gates, bias, cap, doc_start};
    MlstmGateSums sums = {q_dq, k_dk, tiles, exact, anchor, anchor_tiles, initial.C ? anchor_start : NULL, tail};
    const int spans = ceil_div(s->T, MLSTM_SPAN);
    if (paths) {
        launch_early(mlstm_bwd_gate_anchors_kernel, s->B * s->NH, spans > 16 ? 1024 : 512, 0, stream, *s, doc_start,
                     sums, paths, spans);
        sums.anchor = paths, sums.anchor_tiles = 1;
        if (sums.anchor_start) sums.anchor_start = paths + (size_t)s->B * s->NH * spans;
    }
    const int groups = ceil_div(s->NH, GATE_HEADS), heads = ceil_div(s->NH, groups);
    const unsigned blocks = (unsigned)((size_t)s->B * spans * ceil_div(s->NH, heads));
    launch_early(mlstm_bwd_gates_kernel<F>, blocks, 32 * GATE_WARPS * heads, 0, stream, *s, in, sums,
                 initial.C ? initial.n : NULL, initial.row, dgates, ld_dgates, partial, spans, heads);
    launch_early(mlstm_bwd_gate_bias_kernel, s->NH, 256, 0, stream, dbias, partial, s->B * spans * GATE_WARPS,
                 exact != NULL);
}

// ----------------------------------------------------------------------------------------------------------------
// Generation: one token in the recurrent form. A block takes 128 bytes of columns of one head's C, all dk rows, and
// reads and writes them once: 8 bytes an element of C, nothing else matters. Every block of a head needs the old n and
// m, so a second kernel updates these.

enum { STEP_THREADS = 256, STEP_LANES = 8, STEP_ROWS = STEP_THREADS / STEP_LANES, STEP_BATCH = 8 };

typedef struct {
    float forget, input, m;  // the factors of the old states and of k v^T, and the new scale
} MlstmStepGates;

template <typename F>
__device__ inline MlstmStepGates mlstm_step_gates(const MlstmShape &s, const MlstmInput<F> &in, const MlstmState &state,
                                                  int b, int head) {
    const MlstmGateInput gates = {in.gates, in.ld_gates, in.bias, in.cap, in.doc_start};
    const float i = mlstm_gate(gates, b, head), f = mlstm_gate(gates, b, s.NH + head);
    const double lf = mlstm_log_sigmoid(f), old = lf + state.m[b * state.row + head];
    if (s.sigmoid_gate) return {expf((float)old), expf(mlstm_log_sigmoid(i)), 0};
    const float m = (float)fmax(old, (double)i);
    return {expf((float)(old - m)), expf(i - m), m};
}

template <typename F, int V>
static __global__ void __launch_bounds__(STEP_THREADS)
    mlstm_fwd_step_kernel(MlstmShape s, MlstmInput<F> in, MlstmState state, F *h) {
    extern __shared__ float smem[];
    __shared__ float sums[STEP_THREADS / 32][STEP_LANES * V];
    const int dk = s.dk, dv = s.dv, head = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % STEP_LANES;
    const int column0 = blockIdx.x * STEP_LANES * V, column = column0 + lane * V;
    const MlstmStepGates g = mlstm_step_gates(s, in, state, b, head);
    float *q = smem, *k = smem + dk;  // s q and the input gate times k
    const float *n = state.n + b * state.row + (size_t)head * dk, scale = 1 / sqrtf((float)dk);
    float q_n = 0;
    for (int a = threadIdx.x; a < dk; a += STEP_THREADS) {
        const size_t at = b * in.ld + (size_t)head * dk + a;
        q[a] = scale * to_float(in.q[at]);
        k[a] = g.input * to_float(in.k[at]);
        q_n += q[a] * (g.forget * n[a] + k[a]);
    }
    q_n = block_sum(q_n);  // q and k are there, too

    float v[V], out[V] = {0};
    if (column < dv) {  // with V > 1 a multiple of V
        float *C = state.C + b * state.row + (size_t)head * dk * dv + column;
        const F *values = in.v + b * in.ld + (size_t)head * dv + column;
#pragma unroll
        for (int j = 0; j < V; j++) v[j] = to_float(values[j]);
        for (int a0 = threadIdx.x / STEP_LANES; a0 < dk; a0 += STEP_ROWS * STEP_BATCH) {
            float x[STEP_BATCH][V];
#pragma unroll
            for (int r = 0; r < STEP_BATCH; r++) {  // all loads before the first store
                const int a = a0 + r * STEP_ROWS;
                if (a < dk) load_floats<V>(x[r], C + (size_t)a * dv);
            }
#pragma unroll
            for (int r = 0; r < STEP_BATCH; r++) {
                const int a = a0 + r * STEP_ROWS;
                if (a >= dk) break;
#pragma unroll
                for (int j = 0; j < V; j++) {
                    x[r][j] = g.forget * x[r][j] + k[a] * v[j];
                    out[j] += q[a] * x[r][j];
                }
                store_floats<V>(C + (size_t)a * dv, x[r]);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < V; j++) {  // the four rows of a warp, then the warps
        out[j] += __shfl_xor_sync(0xffffffffu, out[j], 8);
        out[j] += __shfl_xor_sync(0xffffffffu, out[j], 16);
        if (threadIdx.x % 32 < STEP_LANES) sums[threadIdx.x / 32][lane * V + j] = out[j];
    }
    __syncthreads();
    const int c = column0 + threadIdx.x;
    if (threadIdx.x >= STEP_LANES * V || c >= dv) return;
    const float den = s.sigmoid_gate ? 1 : fmaxf(fabsf(q_n), expf(-g.m)) + s.eps;
    float sum = 0;
    for (int w = 0; w < STEP_THREADS / 32; w++) sum += sums[w][threadIdx.x];
    h[((size_t)b * s.NH + head) * dv + c] = from_float<F>(sum / den);
}

template <typename F>
static __global__ void mlstm_fwd_step_vectors_kernel(MlstmShape s, MlstmInput<F> in, MlstmState state) {
    const int head = blockIdx.x, b = blockIdx.y;
    const MlstmStepGates g = mlstm_step_gates(s, in, state, b, head);
    float *n = state.n + b * state.row + (size_t)head * s.dk;
    const F *k = in.k + b * in.ld + (size_t)head * s.dk;
    for (int a = threadIdx.x; a < s.dk; a += blockDim.x) n[a] = g.forget * n[a] + g.input * to_float(k[a]);
    __syncthreads();  // all have read m
    if (threadIdx.x == 0) state.m[b * state.row + head] = g.m;
}

// s.T = 1. The state is updated in place; h [B, NH, dv]. in.doc_start is not used.
template <typename F>
static void mlstm_step(MlstmShape s, MlstmInput<F> in, MlstmState state, F *h, cudaStream_t stream) {
    const int aligned = vector_aligned(state.C, state.row) && s.dv % 4 == 0, V = aligned ? 4 : 1;
    const dim3 grid(ceil_div(s.dv, STEP_LANES * V), s.NH, s.B);
    auto kernel = aligned ? mlstm_fwd_step_kernel<F, 4> : mlstm_fwd_step_kernel<F, 1>;
    kernel<<<grid, STEP_THREADS, 2 * s.dk * sizeof(float), stream>>>(s, in, state, h);
    LAUNCH_CHECK();
    mlstm_fwd_step_vectors_kernel<<<dim3(s.NH, s.B), 128, 0, stream>>>(s, in, state);
    LAUNCH_CHECK();
}

#endif
