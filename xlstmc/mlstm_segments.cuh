// mlstm_segments.cuh: the states that enter the segments of a long sequence, which are then walked side by side.
//
// A walk takes the state from chunk to chunk: M = decay_c M + sum over the chunk's tokens j of scale_j y_j z_j^T. What
// a segment adds to it from zero is one sum over all its tokens,
//
//     sum of g_c scale_j y_j z_j^T,    g_c = product of decay over the chunks that come after c in the walk,
//
// and needs no chain: mlstm_fwd_segment_kernel and mlstm_bwd_segment_kernel go through the chunks against the walk, so
// that g is a running product, and all products of a segment go into the same accumulators, many chunks on their way at
// once. Where g is next to nothing (below 2^-64, or 0 behind the beginning of a document) they stop.
//
//       use        y     z     scale                vector: the same sum of y alone, with scale
//       forward    K     V     kscale               kscale
//       backward   Q     dH    qscale inv_den       qscale ds
//
// A block has one head's segment and a slice of W columns of z against all of y: bf16, Hopper, dk <= 256. Its first
// warp keeps a ring of chunks filled by TMA, the next three make the share of the vector that falls to the slice, and
// two warpgroups hold the sum, transposed (rows: z), in their accumulators; z is scaled in registers, from where it is
// an operand of wgmma.
//
// Cost: y and z of all but the last segment once from memory where the slices of a head run side by side, 2 (dk + dv)
// bytes a token and head; from L2 2 (A + W) a token and slice; 2 A W / 64 cycles of the tensor cores a chunk and slice.
//
// mlstm_fwd_enter_kernel and mlstm_bwd_enter_kernel then go through the segments once and put the state that enters in
// place of what is added. They serve the kernels of mlstm.cuh, too.
#ifndef XLSTMC_MLSTM_SEGMENTS_CUH
#define XLSTMC_MLSTM_SEGMENTS_CUH

#include "hopper.cuh"
#include "mlstm_gates.cuh"
#include "mma.cuh"

enum { SEGMENT_THREADS = 384, SEGMENT_VECTOR_THREADS = 96, SEGMENT_PARTS = SEGMENT_VECTOR_THREADS / 8 };
enum { SEGMENT_LOAD_REGISTERS = 72, SEGMENT_SUM_REGISTERS = 216 };
#define SEGMENT_NOTHING 0x1p-64f  // a g that is left out

template <int A_, bool REVERSE_>
struct Segment {
    static constexpr int A = A_, W = A == 128 ? 256 : 128;  // columns of y, of z
    static constexpr bool REVERSE = REVERSE_;               // the walk goes back in time
    static constexpr int BLOCKS = W / 128;                  // of 64 rows of the transposed sum a warpgroup
    static constexpr int Y_BYTES = A * PANEL_ROW, STAGE_BYTES = (A + W) * PANEL_ROW;  // of a chunk
    static constexpr int STAGES = 200 * 1024 / STAGE_BYTES;
};

struct SegmentArgs {
    CUtensorMap y, z;
    MlstmShape s;
    const float *scale;         // [B, NH, T]
    const float *inv_den, *ds;  // [B, NH, T] backward
    const float *decay;         // [B, NH, NC]
    float *segments;            // [count][B][NH dk dv + NH dk]
    int segment_chunks;
    bool all;  // the last segment of the walk, too, for which only other ranks ask
};

struct alignas(16) SegmentRows {  // of the tokens of a chunk
    float scale[SCAN_CHUNK], inv_den[SCAN_CHUNK], ds[SCAN_CHUNK];
    float g;  // 0: no chunk, the end
};

template <class S>
struct SegmentShared {
    SegmentRows rows[S::STAGES];
    float vector[SEGMENT_PARTS][S::A];
    uint64_t full[S::STAGES], empty[S::STAGES];
};

template <class S>
constexpr size_t segment_shared_bytes() {
    return 1024 + S::STAGES * S::STAGE_BYTES + sizeof(SegmentShared<S>);
}

struct SegmentPlace {  // what a block does
    int b, head, bh, slice, slices, segment, first_chunk, chunks;
};

template <class S>
__device__ __forceinline__ unsigned segment_full(SegmentShared<S> *sh, int it) {
    return shared_address(sh->full + it % S::STAGES);
}
template <class S>
__device__ __forceinline__ unsigned segment_empty(SegmentShared<S> *sh, int it) {
    return shared_address(sh->empty + it % S::STAGES);
}
// g of the it-th chunk once it is there, known to be the same in the whole warp
template <class S>
__device__ __forceinline__ float segment_wait(SegmentShared<S> *sh, int it) {
    barrier_wait(segment_full(sh, it), it / S::STAGES & 1);
    return __shfl_sync(0xffffffffu, sh->rows[it % S::STAGES].g, 0);
}

// ----------------------------------------------------------------------------------------------------------------
// The first warp fills the ring

// 4 bytes to shared memory, zeros unless valid
__device__ __forceinline__ void segment_copy(const float *to, const float *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
                 : "memory");
}
// Arrives when all copies that this thread has started have landed
__device__ __forceinline__ void segment_copies_arrive(unsigned bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

template <class S>
__device__ __forceinline__ int segment_chunk(const SegmentPlace &at, int it) {  // against the walk
    return S::REVERSE ? at.first_chunk + it : at.first_chunk + at.chunks - 1 - it;
}

template <class S>
__device__ __forceinline__ void segment_load_chunk(const SegmentArgs &p, const SegmentPlace &at, unsigned base,
                                                   SegmentShared<S> *sh, int it) {
    const unsigned full = segment_full(sh, it), tile = base + it % S::STAGES * S::STAGE_BYTES;
    SegmentRows *rows = &sh->rows[it % S::STAGES];
    const int t0 = segment_chunk<S>(at, it) * SCAN_CHUNK;
    if (threadIdx.x == 0) {
        barrier_arrive_expect(full, S::STAGE_BYTES);
        for (int k = 0; k < S::A / 64; k++) tma_load(tile + k * PANEL_BYTES, &p.y, full, 64 * k, at.head, t0, at.b);
        for (int k = 0; k < S::W / 64; k++)
            tma_load(tile + S::Y_BYTES + k * PANEL_BYTES, &p.z, full, at.slice * S::W + 64 * k, at.head, t0, at.b);
    }
    __syncwarp();
#pragma unroll
    for (int i = threadIdx.x; i < SCAN_CHUNK; i += 32) {
        const bool valid = t0 + i < p.s.T;
        const size_t from = (size_t)at.bh * p.s.T + (valid ? t0 + i : 0);
        segment_copy(&rows->scale[i], p.scale + from, valid);
        if (!S::REVERSE) continue;
        segment_copy(&rows->inv_den[i], p.inv_den + from, valid);
        segment_copy(&rows->ds[i], p.ds + from, valid);
    }
    segment_copies_arrive(full);
}

// The decays of the lane's chunk among 32 are loaded 32 chunks ahead
template <class S>
__device__ __forceinline__ void segment_load(const SegmentArgs &p, const SegmentPlace &at, unsigned base,
                                             SegmentShared<S> *sh) {
    const int lane = threadIdx.x, NC = (p.s.T + SCAN_CHUNK - 1) / SCAN_CHUNK;
    const float *decay = p.decay + (size_t)at.bh * NC;
    float g = 1, mine = 0, next = lane < at.chunks ? decay[segment_chunk<S>(at, lane)] : 0;
    for (int it = 0;; it++) {
        if (it % 32 == 0) {
            mine = next;
            next = it + 32 + lane < at.chunks ? decay[segment_chunk<S>(at, it + 32 + lane)] : 0;
        }
        const bool end = it == at.chunks || g < SEGMENT_NOTHING;
        barrier_wait(segment_empty(sh, it), (it / S::STAGES & 1) ^ 1);
        if (lane == 0) sh->rows[it % S::STAGES].g = end ? 0 : g;
        if (end) {
            if (lane == 0) barrier_arrive(segment_full(sh, it));
            barrier_arrive(segment_full(sh, it));
            break;
        }
        segment_load_chunk(p, at, base, sh, it);
        g *= __shfl_sync(0xffffffffu, mine, it % 32);
    }
}

// ----------------------------------------------------------------------------------------------------------------
// Three warps make the vector: of every slices-th panel of y, so that the slices share the work. A thread has eight
// columns of a panel and every SEGMENT_PARTS-th token.

template <class S>
__device__ __forceinline__ void segment_vector(const SegmentArgs &p, const SegmentPlace &at, unsigned char *smem,
                                               SegmentShared<S> *sh, float *n) {
    const int i = threadIdx.x - 32, piece = i % 8, part = i / 8;
    float sum[S::A / 64][8] = {};
    bool mine[S::A / 64];
#pragma unroll
    for (int panel = 0; panel < S::A / 64; panel++) mine[panel] = panel % at.slices == at.slice;
    for (int it = 0;; it++) {
        const float g = segment_wait(sh, it);
        if (g == 0) break;
        const unsigned char *tile = smem + it % S::STAGES * S::STAGE_BYTES;
        const SegmentRows *rows = &sh->rows[it % S::STAGES];
#pragma unroll
        for (int panel = 0; panel < S::A / 64; panel++) {
            if (!mine[panel]) continue;
#pragma unroll 3
            for (int r = part; r < SCAN_CHUNK; r += SEGMENT_PARTS) {
                const float by = g * rows->scale[r] * (S::REVERSE ? rows->ds[r] : 1);
                const uint4 y = *(const uint4 *)(tile + panel * PANEL_BYTES + panel_piece(r, piece));
                const unsigned pairs[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float2 two = unpack_two(pairs[k]);
                    sum[panel][2 * k] += by * two.x, sum[panel][2 * k + 1] += by * two.y;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < S::A / 8; k++) asm volatile("" : "+f"(sum[k / 8][k % 8]));  // before TMA may go on
        __syncwarp();
        if (i % 32 == 0) barrier_arrive(segment_empty(sh, it));
    }
#pragma unroll
    for (int k = 0; k < S::A / 8; k++) sh->vector[part][k / 8 * 64 + 8 * piece + k % 8] = sum[k / 8][k % 8];
    named_barrier_sync(1, SEGMENT_VECTOR_THREADS);
    for (int k = i; k < p.s.dk; k += SEGMENT_VECTOR_THREADS) {
        if (k / 64 % at.slices != at.slice) continue;
        float whole = 0;
#pragma unroll
        for (int q = 0; q < SEGMENT_PARTS; q++) whole += sh->vector[q][k];
        n[k] = whole;
    }
}

// ----------------------------------------------------------------------------------------------------------------
// Two warpgroups make the sum. A thread's M[b][4j + 2h + e] is element (w, a) of the transposed sum with
// w = 16 warp + g + 8h in the b-th 64 rows of the warpgroup, a = 8j + 2t + e, g = lane / 4, t = lane % 4.

// M += (g scale z)^T y for 64 columns of z, which need not be done when this returns; but those of the last call are,
// and it lets go of the chunk before. False: there was no chunk left.
template <class S>
__device__ __forceinline__ bool segment_add(SegmentShared<S> *sh, unsigned base, float (&M)[S::A / 2],
                                            unsigned (&a)[4][4], int wg, int b, int it) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, t = lane % 4;
    const unsigned y = base + it % S::STAGES * S::STAGE_BYTES;
    const unsigned z = y + S::Y_BYTES + (wg * S::BLOCKS + b) * PANEL_BYTES +
                       panel_piece(lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2);
    const SegmentRows *rows = &sh->rows[it % S::STAGES];
    const float g = segment_wait(sh, it);
    if (g == 0) return false;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        ldmatrix_trans(a[k], z + k * 2048);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int token = 16 * k + r / 2 * 8 + 2 * t;
            float2 by = *(const float2 *)&rows->scale[token];
            if (S::REVERSE) {
                const float2 inv_den = *(const float2 *)&rows->inv_den[token];
                by.x *= inv_den.x, by.y *= inv_den.y;
            }
            const float2 two = unpack_two(a[k][r]);
            a[k][r] = pack_two(two.x * (by.x * g), two.y * (by.y * g));
        }
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_rs<1>(M, a[k], wgmma_operand(y + k * 2048), true);
    wgmma_commit();
    wgmma_wait<1>();
    __syncwarp();
    if (b == 0 && it > 0 && lane == 0) barrier_arrive(segment_empty(sh, it - 1));
    return true;
}

template <class S>
__device__ __forceinline__ void segment_sum(const SegmentArgs &p, const SegmentPlace &at, unsigned base,
                                            SegmentShared<S> *sh, float *C) {
    const int wg = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1, t = threadIdx.x % 4;
    constexpr int LAST = S::BLOCKS - 1;
    float M[S::BLOCKS][S::A / 2];
    unsigned a[2][4][4];  // of two groups of products on their way
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < S::A / 2; i++) M[b][i] = 0;
    for (int it = 0;; it += 2 - LAST) {
        if (!segment_add<S>(sh, base, M[0], a[0], wg, 0, it)) break;
        if (!segment_add<S>(sh, base, M[LAST], a[1], wg, LAST, it + 1 - LAST)) break;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++) {
        const int w = at.slice * S::W + (wg * S::BLOCKS + b) * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        float *to = C + (size_t)(2 * t) * p.s.dv + w;
#pragma unroll
        for (int j = 0; j < S::A / 8; j++, to += 8 * (size_t)p.s.dv) {
            if (8 * j >= p.s.dk) break;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (w + i / 2 * 8 < p.s.dv) to[i % 2 * p.s.dv + i / 2 * 8] = M[b][4 * j + i];
        }
    }
}

// ----------------------------------------------------------------------------------------------------------------
// The kernels: a block a slice (x), segment (y) and head (z)

template <class S>
__device__ __forceinline__ void segment_block(const SegmentArgs &p) {
    extern __shared__ unsigned char shared_raw[];
    unsigned char *smem = shared_raw + (1024 - shared_address(shared_raw) % 1024) % 1024;
    SegmentShared<S> *sh = (SegmentShared<S> *)(smem + S::STAGES * S::STAGE_BYTES);
    const MlstmShape &s = p.s;
    SegmentPlace at;
    at.bh = blockIdx.z, at.b = at.bh / s.NH, at.head = at.bh % s.NH, at.slice = blockIdx.x, at.slices = gridDim.x;
    at.segment = blockIdx.y + (S::REVERSE && !p.all);  // all but the last of the walk
    at.first_chunk = at.segment * p.segment_chunks;
    at.chunks = min(p.segment_chunks, (s.T + SCAN_CHUNK - 1) / SCAN_CHUNK - at.first_chunk);
    const bool makes_vector = at.slice < S::A / 64;
    if (threadIdx.x == 0) {
        for (int k = 0; k < S::STAGES; k++) {
            barrier_init(shared_address(sh->full + k), 33);  // the TMA's announcement, and the copies of 32 lanes
            barrier_init(shared_address(sh->empty + k), 8 + (makes_vector ? 3 : 0));  // warps
        }
        barrier_init_done();
        tensor_map_prefetch(&p.y), tensor_map_prefetch(&p.z);
    }
    __syncthreads();
    wait_for_earlier();
    const size_t matrix = (size_t)s.dk * s.dv, record = s.NH * (matrix + s.dk);
    float *place = p.segments + ((size_t)at.segment * s.B + at.b) * record;
    if (threadIdx.x < 128) {
        registers_shrink<SEGMENT_LOAD_REGISTERS>();
        if (threadIdx.x < 32) segment_load<S>(p, at, shared_address(smem), sh);
        else if (makes_vector) segment_vector<S>(p, at, smem, sh, place + s.NH * matrix + (size_t)at.head * s.dk);
    } else {
        registers_grow<SEGMENT_SUM_REGISTERS>();
        segment_sum<S>(p, at, shared_address(smem), sh, place + at.head * matrix);
    }
}

template <int A>
static __global__ void __launch_bounds__(SEGMENT_THREADS, 1)
    mlstm_fwd_segment_kernel(const __grid_constant__ SegmentArgs p) {
#ifdef HOPPER_CODE
    segment_block<Segment<A, false>>(p);
#endif
}
template <int A>
static __global__ void __launch_bounds__(SEGMENT_THREADS, 1)
    mlstm_bwd_segment_kernel(const __grid_constant__ SegmentArgs p) {
#ifdef HOPPER_CODE
    segment_block<Segment<A, true>>(p);
#endif
}

// ----------------------------------------------------------------------------------------------------------------
// The state that enters each segment, from `initial` on: kept * the one that enters the segment before + what that
// segment adds. A thread has ENTER_ELEMENTS of a head's C and n, and ENTER_AT_ONCE segments of each on their way.
// Bytes: what is there is read once, but for the last segment, and written once.

enum { ENTER_THREADS = 256, ENTER_ELEMENTS = 4, ENTER_AT_ONCE = 4 };

// kept [count]: the product of the decays of each segment; a warp a segment
__device__ inline void enter_kept(float *kept, const float *decay, int chunks, int count, int segment_chunks) {
    const int lane = threadIdx.x % 32;
    for (int k = threadIdx.x / 32; k < count; k += ENTER_THREADS / 32) {
        const int end = min((k + 1) * segment_chunks, chunks);
        float product = 1;
#pragma unroll 8
        for (int c = k * segment_chunks + lane; c < end; c += 32) product *= decay[c];
#pragma unroll
        for (int d = 16; d > 0; d /= 2) product *= __shfl_xor_sync(0xffffffffu, product, d);
        if (lane == 0) kept[k] = product;
    }
}

static __host__ __device__ inline int enter_blocks(size_t elements) {
    return (int)((elements + ENTER_THREADS * ENTER_ELEMENTS - 1) / (ENTER_THREADS * ENTER_ELEMENTS));
}

template <bool REVERSE>
__device__ __forceinline__ void enter_segments(const MlstmShape &s, float *segments, const float *decay,
                                               const MlstmState &initial, int count, int segment_chunks,
                                               const float *m_walk, const float *m) {
    extern __shared__ float kept[];  // [count]
    float *scale = kept + count;     // [count] of what segments add
    wait_for_earlier();
    const int bh = blockIdx.y, b = bh / s.NH, head = bh % s.NH, chunks = (s.T + s.chunk - 1) / s.chunk;
    const size_t matrix = (size_t)s.dk * s.dv, record = s.NH * (matrix + s.dk), step = s.B * record;
    const int C_blocks = enter_blocks(matrix);
    const bool in_n = (int)blockIdx.x >= C_blocks;
    const size_t first = (size_t)(blockIdx.x - (in_n ? C_blocks : 0)) * (ENTER_THREADS * ENTER_ELEMENTS) + threadIdx.x;
    const size_t size = in_n ? s.dk : matrix, at = head * size + first;
    const int left =
        first < size ? (int)((size - first + ENTER_THREADS - 1) / ENTER_THREADS) : 0;  // elements of this thread
    float *place = segments + b * record + (in_n ? s.NH * matrix : 0) + at;            // in segment 0
    float state[ENTER_ELEMENTS] = {}, adds[ENTER_AT_ONCE][ENTER_ELEMENTS];
    if (initial.C)
#pragma unroll
        for (int e = 0; e < ENTER_ELEMENTS; e++)
            if (e < left) state[e] = (in_n ? initial.n : initial.C)[b * initial.row + at + e * ENTER_THREADS];
    for (int k0 = 0; k0 < count; k0 += ENTER_AT_ONCE) {
#pragma unroll
        for (int k = 0; k < ENTER_AT_ONCE; k++)
#pragma unroll
            for (int e = 0; e < ENTER_ELEMENTS; e++) {
                const int segment = REVERSE ? count - 1 - k0 - k : k0 + k;
                adds[k][e] = e < left && k0 + k + 1 < count ? place[segment * step + e * ENTER_THREADS] : 0;
            }
        if (k0 == 0) {
            enter_kept(kept, decay + (size_t)bh * chunks, chunks, count, segment_chunks);
            for (int k = threadIdx.x; k < count; k += ENTER_THREADS) {
                const size_t end = (size_t)bh * (chunks + 1) + min((k + 1) * segment_chunks, chunks);
                scale[k] = m_walk ? expf(m_walk[end] - m[end]) : 1;
            }
            __syncthreads();
        }
#pragma unroll
        for (int k = 0; k < ENTER_AT_ONCE; k++) {
            const int segment = REVERSE ? count - 1 - k0 - k : k0 + k;
            if (k0 + k >= count) break;
#pragma unroll
            for (int e = 0; e < ENTER_ELEMENTS; e++) {
                if (e < left) place[segment * step + e * ENTER_THREADS] = state[e];
                state[e] = kept[segment] * state[e] + scale[segment] * adds[k][e];
            }
        }
    }
}

static __global__ void __launch_bounds__(ENTER_THREADS, 4)
    mlstm_fwd_enter_kernel(MlstmShape s, float *segments, const float *decay, MlstmState initial, int count,
                           int segment_chunks, const float *m_walk, const float *m) {
    enter_segments<false>(s, segments, decay, initial, count, segment_chunks, m_walk, m);
}
static __global__ void __launch_bounds__(ENTER_THREADS, 4)
    mlstm_bwd_enter_kernel(MlstmShape s, float *segments, const float *decay, MlstmState initial, int count,
                           int segment_chunks, const float *m_walk, const float *m) {
    enter_segments<true>(s, segments, decay, initial, count, segment_chunks, m_walk, m);
}

// ----------------------------------------------------------------------------------------------------------------
// Launches

// segments [count][B][NH dk dv + NH dk]: what each segment but the last of the walk adds becomes the state that enters
// each. decay [B, NH, NC]. m_walk: the scales [B, NH, NC + 1] of what segments add, where they are not m, those of the
// states; else NULL
template <bool REVERSE>
static void segments_enter(const MlstmShape &s, const float *decay, MlstmState initial, float *segments, int count,
                           int segment_chunks, const float *m_walk, const float *m, cudaStream_t stream) {
    const dim3 grid((unsigned)(enter_blocks((size_t)s.dk * s.dv) + enter_blocks(s.dk)), (unsigned)(s.B * s.NH));
    auto kernel = REVERSE ? mlstm_bwd_enter_kernel : mlstm_fwd_enter_kernel;
    launch_early(kernel, grid, ENTER_THREADS, 2 * count * sizeof(float), stream, s, segments, decay, initial, count,
                 segment_chunks, m_walk, m);
}

template <int A, bool REVERSE>
static void segments_add(const SegmentArgs &p, int count, cudaStream_t stream) {
    typedef Segment<A, REVERSE> S;
    constexpr size_t bytes = segment_shared_bytes<S>();
    static_assert(bytes <= 227 * 1024, "shared memory of a block");
    const dim3 grid((unsigned)ceil_div(p.s.dv, S::W), (unsigned)(p.all ? count : count - 1),
                    (unsigned)(p.s.B * p.s.NH));
    auto kernel = REVERSE ? mlstm_bwd_segment_kernel<A> : mlstm_fwd_segment_kernel<A>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    launch_early(kernel, grid, SEGMENT_THREADS, bytes, stream, p);
}

// segments [count][B][NH dk dv + NH dk]: what each of the `count` segments, of segment_chunks chunks but the last in
// time, adds to the state; all: the last one of the walk, too. y, z: K and V; REVERSE: Q and dH, with inv_den and ds
// [B, NH, T]. dk <= 256
template <bool REVERSE>
static void segment_sums(const MlstmShape &s, CUtensorMap y, CUtensorMap z, const MlstmGates &gates,
                         const float *inv_den, const float *ds, float *segments, int count, int segment_chunks,
                         bool all, cudaStream_t stream) {
    const SegmentArgs p = {
        y, z, s, REVERSE ? gates.qscale : gates.kscale, inv_den, ds, gates.decay, segments, segment_chunks, all};
    if (s.dk <= 64) segments_add<64, REVERSE>(p, count, stream);
    else if (s.dk <= 128) segments_add<128, REVERSE>(p, count, stream);
    else if (s.dk <= 192) segments_add<192, REVERSE>(p, count, stream);
    else segments_add<256, REVERSE>(p, count, stream);
}

#endif
