// slstm_hopper.cuh: the sLSTM cell in bf16 on chips that have clusters of thread blocks (compute capability 9.0 and
// newer). One cluster carries one head of a group of sequences through all time steps.
//
// A warp owns 8 hidden units with all four gates, of a tile of 8 sequences: the states of a unit of a sequence stay in
// one thread, and the part of R that the warp multiplies with in its registers (what does not fit, in shared memory) as
// left operands of mma.sync; the sequences are the 8 columns of the right operand. What a step hands over goes from
// registers straight into the shared memory of the blocks that need it (st.async), and each message counts its bytes at
// a barrier (mbarrier) that the receiver waits for. There is no barrier of the cluster in the loop.
//
// Forward, every block needs the outputs y of all units: an all-gather of bf16. A block begins to multiply with its own
// outputs while those of its peers are on their way. Backward, a block multiplies its part of R^T with its own dr and
// sends fp32 sums to the blocks that own the units; these add them in a fixed order.
//
// A cluster of several tiles divides the work among its warps: R is in the registers of some, which multiply for one
// tile after the other, and every tile has warps of its own for gates and states. While what one tile has handed over
// is on its way, the others are worked for. The tiles know nothing of each other.
//
// In a cluster of 16, R is larger than a block's registers. So that all of these are used, and all four schedulers of
// the tensor cores alike, eight warps multiply, though only six or four have units. Forward, four of them share the
// sums of half of the units, each over every fourth group of outputs, and those that have the units add them up.
//
// Each tile has its buffers and barriers of the exchange twice, for even and odd steps. That is enough: what a block
// sends in step s + 2 depends on everything that its peers sent in step s + 1, and every warp of a peer sent that only
// after it had read all it was sent in step s.
#ifndef XLSTMC_SLSTM_HOPPER_CUH
#define XLSTMC_SLSTM_HOPPER_CUH

#include "hopper.cuh"
#include "mma.cuh"
#include "slstm_cell.cuh"

// ----------------------------------------------------------------------------------------------------------------
// The parts of PTX that only these kernels need

// 16 bytes to a peer, counted by the barrier of that peer.
__device__ __forceinline__ void send_vector(unsigned to, uint4 v, unsigned bar) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
        "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(bar)
        : "memory");
}
__device__ __forceinline__ void send_two(unsigned to, uint2 v, unsigned bar) {  // 8 bytes
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
        "r"(v.x), "r"(v.y), "r"(bar)
        : "memory");
}
__device__ __forceinline__ void send_word_async(unsigned to, unsigned v, unsigned bar) {  // 4 bytes
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(v),
                 "r"(bar)
                 : "memory");
}
__device__ __forceinline__ uint4 shared_load_vector(unsigned from) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}
__device__ __forceinline__ float4 shared_load_floats(unsigned from) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}
__device__ __forceinline__ float2 shared_load_two(unsigned from) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
    return v;
}
__device__ __forceinline__ unsigned shared_load_word(unsigned from) {
    unsigned v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
    return v;
}
__device__ __forceinline__ void shared_store_vector(unsigned to, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
__device__ __forceinline__ void shared_store_word(unsigned to, unsigned v) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}
__device__ __forceinline__ void shared_store_two(unsigned to, uint2 v) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(v.x), "r"(v.y) : "memory");
}
// Copies from global memory that run beside the kernel; a group is what was asked for since the last end of a group.
__device__ __forceinline__ void prefetch_vector(unsigned to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void prefetch_word(unsigned to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void prefetch_end_group(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void prefetch_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// 8 x 8 matrices, see hopper.cuh: rows of the i-th begin at the addresses of lanes 8 i to 8 i + 7.
__device__ __forceinline__ void matrix_pair_load_transposed(unsigned (&r)[2], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void matrix_store_transposed(unsigned address, unsigned r) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(r) : "memory");
}
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float tanh_fast(float x) {  // relative error 2^-11, a quarter of the rounding to bf16
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ----------------------------------------------------------------------------------------------------------------
// How a cluster divides its work

// A chunk is 8 units of a sequence in bf16, 16 bytes: what a warp hands over for one of them, and a row of an 8 x 8
// matrix. Forward, right operands lie chunk by chunk (y_at). Backward they lie in rows of chunks, a row a sequence: a
// chunk lies at its number with some bits flipped by its row, so that neither the 8 rows of a chunk nor 4 chunks of two
// neighbouring rows share banks.
__device__ __forceinline__ int chunk_flip(int row) { return (row & 1) * 4 + (row >> 1 & 3); }

template <int Ctas, int Warps, int Tiles, int Sequences = 8>
struct SlstmCluster {
    static constexpr int CTAS = Ctas, WARPS = Warps, TILES = Tiles;  // blocks; groups of 8 units a block; tiles
    static constexpr int SEQUENCES = Sequences, CELLS = SEQUENCES / 4, APART = 8 / SEQUENCES;  // of a tile; a thread
    static constexpr int ROWS = SEQUENCES * TILES, U = 8 * WARPS, HALF = WARPS / 2;  // sequences; units a block
    static constexpr bool DIVIDED = TILES > 1;  // some warps multiply, others have the units of a tile
    static constexpr bool SPLIT = CTAS > 8;     // eight warps multiply, whether they have units or not
    static constexpr int MULTIPLY = SPLIT ? 8 : WARPS, THREADS = 32 * (DIVIDED ? WARPS * (1 + TILES) : MULTIPLY);
    static constexpr int MANY = 208, FEW = 96;  // registers of a thread that multiplies, that has units
    static_assert(WARPS % 2 == 0 && (CTAS == 1 || CTAS % 2 == 0), "");
    static_assert(!DIVIDED || (WARPS % 4 == 0 && (MANY + TILES * FEW) * 32 * WARPS <= 65536), "");

    // Forward. Sums over the units of the cluster run over groups of 4 chunks = 32 units. The chunks of a row begin
    // with the block's own; slice s holds those of the block with the rank smaller by s. They come in parts, each
    // with its own barrier: part 0 is the block's own, the others are told apart by when they are sent.
    static constexpr int CHUNKS = CTAS * WARPS, GROUPS = (CHUNKS + 3) / 4, STEPS = 2 * GROUPS;
    static constexpr bool BY_SLICE = CTAS > 4, BY_WARP = CTAS > 1 && !BY_SLICE && WARPS > 4;
    static constexpr int PARTS = CTAS == 1 ? 1 : BY_SLICE ? (CTAS + 6) / 4 : BY_WARP ? 3 : 2;
    static __host__ __device__ constexpr int part_begin(int part) {  // its first chunk
        return part == 0                ? 0
               : part >= PARTS          ? CHUNKS
               : part == 1              ? WARPS
               : BY_SLICE               ? (4 * part - 3) * WARPS
                                        : WARPS + (CTAS - 1) * HALF;
    }
    static __device__ int part(int slice, int warp) {
        return slice == 0 ? 0 : BY_SLICE ? (slice + 3) / 4 : BY_WARP ? 1 + warp / HALF : 1;
    }
    static __device__ int chunk(int slice, int warp) {
        if (!BY_WARP || slice == 0) return slice * WARPS + warp;
        return WARPS + (warp / HALF * (CTAS - 1) + slice - 1) * HALF + warp % HALF;
    }
    static __device__ int unit_of_chunk(int chunk, int rank) {  // first unit of the head
        int slice = chunk / WARPS, warp = chunk % WARPS;
        if (BY_WARP && chunk >= WARPS) {
            int rest = chunk - WARPS, second = rest >= (CTAS - 1) * HALF;
            rest -= second * (CTAS - 1) * HALF;
            slice = 1 + rest / HALF;
            warp = second * HALF + rest % HALF;
        }
        return (rank + CTAS - slice) % CTAS * U + 8 * warp;
    }
    static __host__ __device__ constexpr int part_bytes(int part) {  // of a tile
        return (part_begin(part + 1) - part_begin(part)) * SEQUENCES * 16;
    }
    // Barriers: those of y for each slot, tile and part; those of the sums that warps of a tile wait for
    static constexpr int Y_BARRIERS = 2 * TILES * PARTS;
    static __device__ unsigned y_barrier(int slot, int tile, int part) {
        return 8 * ((slot * TILES + tile) * PARTS + part);
    }
    static __device__ unsigned product_barrier(int tile, int warp) { return 8 * (Y_BARRIERS + tile * WARPS + warp); }
    static constexpr int TURNS = 32 / SEQUENCES, SENDS = (CTAS + TURNS - 2) / TURNS;  // messages a lane
    static constexpr int CHAINS = 4;                                 // independent sums a result
    static constexpr int LAST = GROUPS - part_begin(PARTS - 1) / 4;  // groups of the last part
    static constexpr int MAIN = GROUPS - (LAST < 4 ? LAST : 4);      // groups before those multiplied gate by gate
    static constexpr int MOST = 20;                                  // steps of 16 units with R in registers, at most
    static constexpr int HELD = STEPS < MOST ? STEPS : MOST;         // the last ones
    static constexpr int IN_SHARED = STEPS - HELD;                   // the first ones, in shared memory
    // Forward, split: of the four warps that make the sums of half of the units, each takes every fourth group. Of the
    // fragments of R that take the same right operand some are in registers and the others in shared memory, so that
    // neither tensor cores nor shared memory wait for the other.
    static constexpr int QUARTER = GROUPS / 4, QUARTER_STEPS = 2 * QUARTER, SAME_OPERAND = 2 * HALF;
    static constexpr int SPLIT_MOST = 40, SPLIT_ALL = QUARTER_STEPS * SAME_OPERAND;
    static constexpr int SPLIT_HELD = SPLIT_ALL < SPLIT_MOST ? SPLIT_ALL : SPLIT_MOST;
    static constexpr int SPLIT_SHARED = SPLIT ? SPLIT_ALL - SPLIT_HELD : 0;
    static __host__ __device__ constexpr int shared_before(int k) {  // in shared memory, of steps before the k-th
        return SPLIT ? (SPLIT_SHARED * k + QUARTER_STEPS - 1) / QUARTER_STEPS : 0;
    }
    static constexpr int RING = CTAS > 8 ? 4 : 8;                    // tokens on their way
    // Outputs lie by chunks, the sequences of a chunk side by side: what a warp sends to a peer is one piece of 64 or
    // 128 bytes. They change places so that what 8 lanes load shares no banks: 4 chunks of two sequences, or of one.
    static constexpr int CHUNK_BYTES = 16 * SEQUENCES, GROUP_BYTES = 4 * CHUNK_BYTES;
    static __device__ int y_at(int chunk, int sequence) {
        return chunk * CHUNK_BYTES + ((sequence ^ (SEQUENCES == 8 ? chunk % 4 * 2 : chunk / 2 % 2)) << 4);
    }
    static constexpr int Y_TILE = (CHUNKS + 7) / 8 * 8 * CHUNK_BYTES, Y_SLOT = TILES * Y_TILE;
    static constexpr int X_BYTES = 512, DOC_BYTES = 2048;  // of a token; doc_start of 8 sequences, two times 32 tokens
    static constexpr int PRODUCT_BYTES = DIVIDED ? 1024 : SPLIT ? 4 * CELLS * 512 : 0;
    static constexpr int AT_Y = 256, AT_X = AT_Y + 2 * Y_SLOT, AT_DOC = AT_X + TILES * WARPS * RING * X_BYTES;
    static constexpr int AT_PRODUCTS = AT_DOC + TILES * WARPS * DOC_BYTES;
    static constexpr int AT_R = AT_PRODUCTS + TILES * WARPS * PRODUCT_BYTES;
    static constexpr int FORWARD_BYTES = AT_R + (SPLIT ? MULTIPLY * SPLIT_SHARED : WARPS * IN_SHARED * 2) * 512;

    // Backward. A warp takes PANELS panels of 16 units of one block, and sums over the own block's 4 U gates. In a
    // cluster of one block it takes its own 8 units, and half of each panel is zero. A message holds the sums of a
    // panel, two for each cell of a lane, in a cluster of 16 rounded to bf16: there they are many.
    static constexpr int PANELS = CTAS == 1 ? 1 : CTAS * HALF / MULTIPLY, BACK_STEPS = 2 * WARPS;
    static constexpr int FRAGMENTS = PANELS * BACK_STEPS;
    static constexpr bool ROUNDED = CTAS > 8;
    static constexpr int BACK_MOST = SPLIT ? 35 : FRAGMENTS <= 48 ? 32 : 28;
    static constexpr int BACK_HELD = FRAGMENTS <= 32 ? FRAGMENTS : BACK_MOST;
    static constexpr int BACK_SHARED = FRAGMENTS - BACK_HELD;
    // Fragments in shared memory before the n-th
    static __host__ __device__ constexpr int back_before(int n) {
        return SPLIT ? n * BACK_SHARED / FRAGMENTS : n < BACK_SHARED ? n : BACK_SHARED;
    }
    static constexpr int TOGETHER = WARPS > 4 ? 1 : 2;  // panels that are multiplied at the same time
    static constexpr int D_PITCH = 64 * WARPS, D_TILE = 8 * D_PITCH, D_SLOT = TILES * D_TILE;
    static constexpr int SUMS_LANE = CELLS * (ROUNDED ? 4 : 8), SUMS_PANEL = 32 * SUMS_LANE;
    static constexpr int SUMS_TILE = HALF * SUMS_PANEL;
    static constexpr int SUMS_SLICE = TILES * SUMS_TILE, SUMS_SLOT = CTAS == 1 ? 0 : CTAS * SUMS_SLICE;
    // Bit of g by which the halves change places; 3: they do not, where a word holds both
    static constexpr int SUMS_SWAP = CELLS == 1 ? 3 : ROUNDED ? 2 : 1;
    static constexpr int SUMS_EXPECTED = (CTAS - 1) * SUMS_PANEL;     // bytes that a barrier counts
    static __device__ unsigned sums_barrier(int slot, int tile, int panel) {
        return 8 * ((slot * TILES + tile) * HALF + panel);
    }
    static __device__ unsigned dr_barrier(int slot, int tile) { return 8 * (2 * TILES * HALF + slot * TILES + tile); }
    static constexpr int AT_DY = 512, TRACE_BYTES = 768;  // of a token: gates; dy, y_prev
    static constexpr int AT_D = 256, AT_SUMS = AT_D + 2 * D_SLOT, AT_TRACE = AT_SUMS + 2 * SUMS_SLOT;
    static constexpr int BACK_RING = FRAGMENTS > 48 ? 4 : 8;  // R leaves less room
    static constexpr int AT_BACK_DOC = AT_TRACE + TILES * WARPS * BACK_RING * TRACE_BYTES;
    static constexpr int AT_BACK_R = AT_BACK_DOC + TILES * WARPS * DOC_BYTES;
    static constexpr int BACKWARD_BYTES = AT_BACK_R + MULTIPLY * BACK_SHARED * 512;
    static_assert(8 * (Y_BARRIERS + TILES * WARPS) <= AT_Y && 16 * TILES * (HALF + 1) <= AT_D, "");
};

struct SlstmPlace {           // of a thread: unit `first` + g of the head, sequences b0 + CELLS q + e
    int rank, lane, g, q;     // g = lane / 4, q = lane % 4; e = 0 or 1
    int warp, tile;           // its group of 8 units, its tile; one that multiplies does so for all: tile -1
    int group, head, b0;      // tiles of the batch that came before; first sequence
    int first, unit;          // first unit of the warp; own unit
};
template <typename Tile>
__device__ __forceinline__ SlstmPlace slstm_place(const SlstmShape &s, int warp = threadIdx.x / 32) {
    SlstmPlace p;
    int groups = (s.B + Tile::ROWS - 1) / Tile::ROWS, task = blockIdx.x / Tile::CTAS;
    p.rank = cluster_rank();
    p.lane = threadIdx.x % 32;
    p.warp = Tile::DIVIDED ? warp % Tile::WARPS : warp;
    p.tile = Tile::DIVIDED ? warp / Tile::WARPS - 1 : 0;
    asm volatile("" : "+r"(p.lane), "+r"(p.warp), "+r"(p.tile));  // to be kept, not read again in each step
    p.g = p.lane / 4;
    p.q = p.lane % 4;
    p.group = task % groups * Tile::TILES + max(p.tile, 0);
    p.head = task / groups;
    p.b0 = Tile::SEQUENCES * p.group;
    p.first = p.rank * Tile::U + 8 * p.warp;
    p.unit = p.first + p.g;
    return p;
}
// Tiles of a cluster that have sequences
template <typename Tile>
__device__ __forceinline__ int slstm_tiles(const SlstmPlace &p, const SlstmShape &s) {
    return Tile::DIVIDED ? min(Tile::TILES, (s.B - p.b0 + 7) / 8) : 1;
}

// Which sequences begin a document at a token, for 32 tokens in the order in which the kernel goes through them. Lane l
// looks after the l-th: `token` is its number, and what is none of this sequence's, or out of range, never begins one.
struct SlstmResets {
    unsigned any, row;  // bit l: some sequence, the sequence lane % 32, begins a document at the l-th token
};
template <typename Tile>
__device__ __forceinline__ void fetch_resets(unsigned block, const SlstmJob<bf16> &job, int b0, int token) {
#pragma unroll 1
    for (int r = 0; r < Tile::SEQUENCES && b0 + r < job.shape.B; r++)
        if (token > 0 && token < job.shape.T)
            prefetch_word(block + (r * 32 + threadIdx.x % 32) * 4,
                          job.doc_start + (size_t)(b0 + r) * job.shape.T + token);
}
__device__ __forceinline__ SlstmResets read_resets(unsigned block, int token) {
    SlstmResets s = {0, 0};
#pragma unroll 1
    for (int r = 0; r < 8; r++) {
        unsigned word = shared_load_word(block + (r * 32 + threadIdx.x % 32) * 4);
        unsigned begin = __ballot_sync(0xffffffffu, token > 0 && (int)word == token);
        s.any |= begin;
        if (threadIdx.x % 32 == (unsigned)r) s.row = begin;
    }
    return s;
}
// Bit r: sequence r begins a document at the l-th token.
__device__ __forceinline__ unsigned resets_at(const SlstmResets &s, int l) {
    return s.any >> l & 1 ? __ballot_sync(0xffffffffu, s.row >> l & 1) : 0;
}

// ----------------------------------------------------------------------------------------------------------------
// Forward

struct SlstmUnitState {  // m in units of log 2; minus infinity: nothing stored yet
    float c, n, m;
};
__device__ __forceinline__ SlstmUnitState slstm_empty_state() { return {0, 0, -INFINITY}; }

// One step of one unit. Returns y. gates: share of the new input, e = exp(-|r_f|), of which sig(-r_f) is made later, z,
// o. Of I and F one is 1, the other exp of minus the distance of their exponents. o is kept away from 0 by less than
// its error, because the backward pass divides by it.
__device__ __forceinline__ float slstm_unit_step(SlstmUnitState *s, const float (&r)[4], float *gates) {
    const float LOG2E = 1.44269504f;
    float ri = LOG2E * r[0], rf = LOG2E * r[1], e = exp2_fast(-fabsf(rf)), bound = s->m + fminf(rf, 0);
    float log_e = log2_fast(1 + e), distance = (ri - bound) + log_e, E = exp2_fast(-fabsf(distance));
    float I = distance >= 0 ? 1 : E, F = distance >= 0 ? E : 1, kept = F * s->n;
    float z = tanh_fast(r[2]), o = fmaxf(fmaf(0.5f, tanh_fast(0.5f * r[3]), 0.5f), 1.0f / 8192);
    s->m = fmaxf(ri, bound - log_e);
    s->n = kept + I;
    s->c = fmaf(F, s->c, I * z);
    float over_n = reciprocal_fast(s->n);
    gates[0] = slstm_share(I * over_n, kept * over_n);
    gates[1] = e;
    gates[2] = z;
    gates[3] = o;
    return o * s->c * over_n;
}

// Fragments of R for gates 2 m and 2 m + 1 of the block's group of units `to` and 16 units from which they are fed,
// step k of the sum.
template <typename Tile>
__device__ __forceinline__ uint4 slstm_forward_weights(const SlstmJob<bf16> &job, const SlstmPlace &p, int to, int k,
                                                       int m) {
    int d = job.shape.d, chunk = 4 * (k / 2) + p.q, from = Tile::unit_of_chunk(chunk, p.rank) + k % 2 * 4;
    int unit = p.rank * Tile::U + 8 * to + p.g;
    bool valid = chunk < Tile::CHUNKS && from < d && unit < d;  // d is a multiple of 8
    const bf16 *R = job.R + (((size_t)p.head * d + from) * 4 + 2 * m) * d + unit;
    unsigned w[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4 && valid; i++) {  // i % 2: gate, i / 2: units 0, 1 or 2, 3
        const bf16 *at = R + ((size_t)(i / 2) * 8 + i % 2) * d;
        w[i] = __bfloat16_as_ushort(at[0]) | (unsigned)__bfloat16_as_ushort(at[4 * (size_t)d]) << 16;
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// Before the first step: barriers, outputs that enter token 0, y_prev of token 0.
template <typename Tile>
__device__ __forceinline__ void slstm_forward_start(const SlstmJob<bf16> &job, const SlstmPlace &p,
                                                    unsigned char *shared) {
    int T = job.shape.T, NH = job.shape.NH, d = job.shape.d, first = p.b0 - Tile::SEQUENCES * max(p.tile, 0);
    unsigned bars = shared_address(shared);
    for (int k = threadIdx.x; k < (Tile::AT_R - Tile::AT_Y) / 4; k += Tile::THREADS)
        ((unsigned *)(shared + Tile::AT_Y))[k] = 0;
    if (threadIdx.x == 0) {
        for (int k = 0; k < Tile::Y_BARRIERS; k++) barrier_init(bars + 8 * k, k % Tile::PARTS ? 1 : Tile::WARPS);
        for (int k = 0; k < Tile::TILES * Tile::WARPS; k++) barrier_init(bars + Tile::product_barrier(0, k), 1);
        barrier_init_done();
        for (int i = 0; i < Tile::TILES; i++) {  // what enters token 0 is there, what enters token 1 will be sent
            for (int k = 0; k < Tile::WARPS; k++) barrier_arrive(bars + Tile::y_barrier(0, i, 0));
            for (int part = 1; part < Tile::PARTS; part++) {
                barrier_arrive(bars + Tile::y_barrier(0, i, part));
                barrier_arrive_expect(bars + Tile::y_barrier(1, i, part), Tile::part_bytes(part));
            }
        }
    }
    __syncthreads();
    for (int k = threadIdx.x; k < Tile::ROWS * Tile::CHUNKS * 8; k += Tile::THREADS) {
        int sequence = k / (Tile::CHUNKS * 8), chunk = k / 8 % Tile::CHUNKS, b = first + sequence;
        int unit = Tile::unit_of_chunk(chunk, p.rank) + k % 8;
        if (b >= job.shape.B || unit >= d) continue;
        size_t at = (size_t)p.head * d + unit;
        bool fresh = job.doc_start[(size_t)b * T] == 0;
        bf16 y = from_float<bf16>(fresh ? 0.0f : load_cell(job.initial, b, at).y);
        unsigned char *to = shared + Tile::AT_Y + sequence / Tile::SEQUENCES * Tile::Y_TILE;
        ((bf16 *)(to + Tile::y_at(chunk, sequence % Tile::SEQUENCES)))[k % 8] = y;
        if (chunk < Tile::WARPS) job.saved.y_prev[(size_t)b * T * NH * d + at] = y;
    }
}

template <typename Tile>
struct SlstmForward {  // what a thread keeps through all steps. e: one of its two sequences
    static constexpr int SENDS = Tile::SENDS > 0 ? Tile::SENDS : 1;
    SlstmPlace p;
    unsigned bars;                // barriers
    unsigned slots, products;     // the warp's R; sums that other warps have made for this one, of tile 0
    unsigned right;               // right operand of the first of its groups, of tile 0
    uint4 held[Tile::SPLIT ? Tile::SPLIT_HELD : 2 * Tile::HELD];  // R
    // of a warp that has units
    unsigned ring, docs, row, own;                // the warp's pre-activations, doc_start, chunks to write and to send
    unsigned peer_chunk[SENDS], peer_bar[SENDS];  // where the chunk goes
    size_t at;                                    // element of x and gates, of the current token
    bf16 *out;                                    // of the current token
    bool row_valid, own_valid;                    // there is a sequence in row lane % 8; that of the chunk to send
    float bias[4], y[Tile::CELLS];
    SlstmUnitState state[Tile::CELLS];
    unsigned x_now[4];  // pre-activations, two sequences a word
    SlstmResets resets;
    unsigned fresh;  // sequences that begin a document at the next token
};

// R, and where its right operands and its products lie
template <typename Tile>
__device__ __forceinline__ void slstm_forward_load_weights(SlstmForward<Tile> &f, const SlstmJob<bf16> &job) {
    const SlstmPlace &p = f.p;
    f.right = f.bars + Tile::AT_Y + Tile::y_at(p.q, p.g / Tile::APART);
    f.slots = f.bars + Tile::AT_R + p.warp * Tile::IN_SHARED * 1024 + p.lane * 16;
#pragma unroll
    for (int k = 0; k < Tile::HELD; k++)
#pragma unroll
        for (int m = 0; m < 2; m++)
            f.held[2 * k + m] = slstm_forward_weights<Tile>(job, p, p.warp, Tile::IN_SHARED + k, m);
    for (int k = 0; k < Tile::IN_SHARED; k++)
        for (int m = 0; m < 2; m++)
            shared_store_vector(f.slots + k * 1024 + m * 512, slstm_forward_weights<Tile>(job, p, p.warp, k, m));
}

// The same for the `turn`-th of four warps that share the sums of `half` of the block's units
template <typename Tile>
__device__ __forceinline__ void slstm_split_load_weights(SlstmForward<Tile> &f, const SlstmJob<bf16> &job, int half,
                                                         int turn) {
    constexpr int HALF = Tile::HALF, M = Tile::SAME_OPERAND;
    const SlstmPlace &p = f.p;
    f.right = f.bars + Tile::AT_Y + Tile::y_at(p.q, p.g / Tile::APART) + turn * Tile::GROUP_BYTES;
    f.slots = f.bars + Tile::AT_R + (4 * half + turn) * Tile::SPLIT_SHARED * 512 + p.lane * 16;
    f.products = f.bars + Tile::AT_PRODUCTS + (turn * Tile::WARPS + half * HALF) * Tile::CELLS * 512 + p.lane * 16;
    auto weights = [&](int k, int i) {
        return slstm_forward_weights<Tile>(job, p, half * HALF + i / 2, 2 * (k / 2 * 4 + turn) + k % 2, i % 2);
    };
#pragma unroll
    for (int k = 0; k < Tile::QUARTER_STEPS; k++) {
        const int first = Tile::shared_before(k), shared = Tile::shared_before(k + 1) - first;
#pragma unroll
        for (int i = shared; i < M; i++) f.held[k * M - first + i - shared] = weights(k, i);
    }
#pragma unroll 1
    for (int k = 0; k < Tile::QUARTER_STEPS; k++) {
        const int first = Tile::shared_before(k), shared = Tile::shared_before(k + 1) - first;
#pragma unroll 1
        for (int i = 0; i < shared; i++) shared_store_vector(f.slots + (first + i) * 512, weights(k, i));
    }
}

// A thread sends and writes for sequence lane % SEQUENCES of its tile: in turn 0 it writes y, in turn 1 y_prev of the
// next token. The ring it serves for the sequence of row lane % 8, if there is one.
template <typename Tile>
__device__ __forceinline__ void slstm_forward_addresses(SlstmForward<Tile> &f, const SlstmJob<bf16> &job) {
    const SlstmPlace &p = f.p;
    constexpr int SEQUENCES = Tile::SEQUENCES, APART = Tile::APART;
    const int sequence = p.lane % SEQUENCES, turn = p.lane / SEQUENCES;
    const int T = job.shape.T, d = job.shape.d, ring_row = p.lane % 8, warp = p.tile * Tile::WARPS + p.warp;
    const size_t D = (size_t)job.shape.NH * d, head = (size_t)p.head * d + p.first;
    const unsigned tile_y = f.bars + Tile::AT_Y + p.tile * Tile::Y_TILE;
    f.ring = f.bars + Tile::AT_X + warp * Tile::RING * Tile::X_BYTES + p.lane * 16;
    f.docs = f.bars + Tile::AT_DOC + warp * Tile::DOC_BYTES;
    f.row = tile_y + Tile::y_at(p.warp, ring_row / APART);
    f.own = tile_y + Tile::y_at(p.warp, sequence);
#pragma unroll
    for (int k = 0; k < Tile::SENDS; k++) {
        int slice = 1 + turn + Tile::TURNS * k, peer = (p.rank + slice) % Tile::CTAS;
        if (slice >= Tile::CTAS) slice = 1;  // not sent
        f.peer_chunk[k] = peer_address(tile_y + Tile::y_at(Tile::chunk(slice, p.warp), sequence), peer);
        f.peer_bar[k] = peer_address(f.bars + Tile::y_barrier(0, p.tile, Tile::part(slice, p.warp)), peer);
    }
    f.own_valid = p.b0 + sequence < job.shape.B && p.first < d;
    f.row_valid = ring_row % APART == 0 && p.b0 + ring_row / APART < job.shape.B && p.first < d;
    f.out = (turn ? job.saved.y_prev + D : job.y) + (size_t)(p.b0 + sequence) * T * D + head;
    f.at = 4 * ((size_t)(p.b0 + ring_row / APART) * T * D + (size_t)p.head * d) + (size_t)(p.lane / 8) * d + p.first;
}

// Biases and initial states
template <typename Tile>
__device__ __forceinline__ void slstm_forward_load_units(SlstmForward<Tile> &f, const SlstmJob<bf16> &job) {
    const SlstmPlace &p = f.p;
    const int T = job.shape.T, d = job.shape.d;
#pragma unroll
    for (int k = 0; k < 4; k++) f.bias[k] = p.unit < d ? job.bias[(p.head * 4 + k) * d + p.unit] : 0.0f;
#pragma unroll
    for (int e = 0; e < Tile::CELLS; e++) {
        int b = p.b0 + Tile::CELLS * p.q + e;
        f.state[e] = slstm_empty_state();
        if (b >= job.shape.B || p.unit >= d || job.doc_start[(size_t)b * T] == 0) continue;
        SlstmCell cell = load_cell(job.initial, b, (size_t)p.head * d + p.unit);
        if (cell.n != 0) f.state[e] = {cell.c, cell.n, cell.m * 1.44269504f};
    }
}

// The ring of pre-activations: of each token chunks [gate][sequence], a lane looks after one.
template <typename Tile>
__device__ __forceinline__ unsigned slstm_ring_slot(const SlstmForward<Tile> &f, int t) {
    return f.ring + t % Tile::RING * Tile::X_BYTES;
}
template <typename Tile>  // of token t + ahead
__device__ __forceinline__ void slstm_fetch(const SlstmForward<Tile> &f, const SlstmJob<bf16> &job, int t, int ahead) {
    const size_t D = (size_t)job.shape.NH * job.shape.d;
    if (t + ahead < job.shape.T && f.row_valid)
        prefetch_vector(slstm_ring_slot(f, t + ahead), job.x + f.at + (size_t)ahead * 4 * D);
}
template <typename Tile>
__device__ __forceinline__ void slstm_look_ahead(SlstmForward<Tile> &f, const SlstmJob<bf16> &job, int t) {
    if (t % 32 == 0) {
        f.resets = read_resets(f.docs + t / 32 % 2 * 1024, t + 1 + f.p.lane);
        fetch_resets<Tile>(f.docs + (t / 32 + 1) % 2 * 1024, job, f.p.b0, t + 33 + f.p.lane);
    }
    f.fresh = resets_at(f.resets, t % 32);
}

// R y of a tile at token t, of the warp's gates 2 m and 2 m + 1 of a unit. sum: CHAINS sums, to which is added. The
// last groups of chunks are multiplied gate by gate: of the first gates most is made afterwards.
template <typename Tile>
__device__ __forceinline__ void slstm_multiply(const SlstmForward<Tile> &f, int t, int tile,
                                               float (&sum)[2][Tile::CHAINS][4]) {
    constexpr int GROUPS = Tile::GROUPS, MAIN = Tile::MAIN, IN_SHARED = Tile::IN_SHARED;
    auto load = [&](int group) {
#pragma unroll
        for (int part = 0; part < Tile::PARTS; part++)  // of which the first chunk lies in this group
            if (Tile::part_begin(part) / 4 == group)
                barrier_wait(f.bars + Tile::y_barrier(t & 1, tile, part), t >> 1 & 1);
        return shared_load_vector(f.right + (t & 1) * Tile::Y_SLOT + tile * Tile::Y_TILE + group * Tile::GROUP_BYTES);
    };
    auto multiply = [&](int group, int m, const uint4 &v) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int k = 2 * group + h;
            uint4 w = k < IN_SHARED ? shared_load_vector(f.slots + k * 1024 + m * 512)
                                    : f.held[k < IN_SHARED ? 0 : 2 * (k - IN_SHARED) + m];
            mma(sum[m][k % Tile::CHAINS], w, h ? v.z : v.x, h ? v.w : v.y);
        }
    };
#pragma unroll
    for (int group = 0; group < MAIN; group++) {
        uint4 v = load(group);
        multiply(group, 0, v);
        multiply(group, 1, v);
    }
    uint4 v[GROUPS - MAIN];
#pragma unroll
    for (int group = MAIN; group < GROUPS; group++) v[group - MAIN] = load(group);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int group = MAIN; group < GROUPS; group++) multiply(group, m, v[group - MAIN]);
}
template <int CHAINS>
__device__ __forceinline__ float add_chains(const float (&sum)[CHAINS][4], int at) {
    static_assert(CHAINS == 4, "");
    return (sum[0][at] + sum[1][at]) + (sum[2][at] + sum[3][at]);
}

// A quarter of R y at token t, to those who add up the four: gates [turn][group of units][e][lane]
template <typename Tile>
__device__ __forceinline__ void slstm_multiply_quarter(const SlstmForward<Tile> &f, int t) {
    constexpr int M = Tile::SAME_OPERAND, EARLY = 2;  // steps whose R is loaded before the wait
    const unsigned y = f.right + (t & 1) * Tile::Y_SLOT;
    float sum[M][4] = {};
    uint4 early[Tile::shared_before(EARLY) > 0 ? Tile::shared_before(EARLY) : 1];
#pragma unroll
    for (int n = 0; n < Tile::shared_before(EARLY); n++) early[n] = shared_load_vector(f.slots + n * 512);
#pragma unroll
    for (int group = 0; group < Tile::QUARTER; group++) {
#pragma unroll
        for (int part = 0; part < Tile::PARTS; part++)  // that begins in these groups of all quarters
            if (Tile::part_begin(part) / 16 == group)
                barrier_wait(f.bars + Tile::y_barrier(t & 1, 0, part), t >> 1 & 1);
        const uint4 v = shared_load_vector(y + group * 4 * Tile::GROUP_BYTES);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int k = 2 * group + h, first = Tile::shared_before(k), shared = Tile::shared_before(k + 1) - first;
#pragma unroll
            for (int i = 0; i < M; i++) {
                uint4 w = i >= shared ? f.held[i >= shared ? k * M - first + i - shared : 0]
                          : k < EARLY ? early[k < EARLY ? first + i : 0]
                                      : shared_load_vector(f.slots + (first + i) * 512);
                mma(sum[i], w, h ? v.z : v.x, h ? v.w : v.y);
            }
        }
    }
#pragma unroll
    for (int u = 0; u < Tile::HALF; u++)
#pragma unroll
        for (int e = 0; e < Tile::CELLS; e++)
            shared_store_vector(f.products + (u * Tile::CELLS + e) * 512,
                                make_uint4(__float_as_uint(sum[2 * u][e]), __float_as_uint(sum[2 * u][2 + e]),
                                           __float_as_uint(sum[2 * u + 1][e]), __float_as_uint(sum[2 * u + 1][2 + e])));
}
// Waits for the four warps that have made the sums of one half of the units. They will be read before y of the next
// token is complete.
__device__ __forceinline__ void slstm_half_barrier(int half) {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + half) : "memory");
}

// Pre-activations at token t, r[e][gate]
template <typename Tile>
__device__ __forceinline__ void slstm_preactivations(const SlstmForward<Tile> &f, int t, float (&r)[Tile::CELLS][4]) {
    float known[4][2];  // from below
#pragma unroll
    for (int k = 0; k < 4; k++) {
        float2 two = unpack_two(f.x_now[k]);
        known[k][0] = two.x + f.bias[k];
        known[k][1] = two.y + f.bias[k];
    }
    if constexpr (Tile::SPLIT) {
        constexpr int CELLS = Tile::CELLS;
        slstm_multiply_quarter(f, t);
        slstm_half_barrier(f.p.warp >= Tile::HALF);
        const unsigned from = f.bars + Tile::AT_PRODUCTS + f.p.warp * CELLS * 512 + f.p.lane * 16;
        float4 share[CELLS][4];
#pragma unroll
        for (int n = 0; n < 4 * CELLS; n++)
            share[n % CELLS][n / CELLS] =
                shared_load_floats(from + (n / CELLS * Tile::WARPS * CELLS + n % CELLS) * 512);
#pragma unroll
        for (int e = 0; e < CELLS; e++) {
            const float4(&s)[4] = share[e];
            r[e][0] = known[0][e] + ((s[0].x + s[1].x) + (s[2].x + s[3].x));
            r[e][1] = known[1][e] + ((s[0].y + s[1].y) + (s[2].y + s[3].y));
            r[e][2] = known[2][e] + ((s[0].z + s[1].z) + (s[2].z + s[3].z));
            r[e][3] = known[3][e] + ((s[0].w + s[1].w) + (s[2].w + s[3].w));
        }
    } else if constexpr (Tile::DIVIDED) {
        const unsigned from = f.products;
        barrier_wait(f.bars + Tile::product_barrier(f.p.tile, f.p.warp), t & 1);
#pragma unroll
        for (int m = 0; m < 2; m++) {
            uint4 v = shared_load_vector(from + m * 512);
            r[0][2 * m] = known[2 * m][0] + __uint_as_float(v.x);
            r[0][2 * m + 1] = known[2 * m + 1][0] + __uint_as_float(v.z);
            if constexpr (Tile::CELLS > 1) {
                r[1][2 * m] = known[2 * m][1] + __uint_as_float(v.y);
                r[1][2 * m + 1] = known[2 * m + 1][1] + __uint_as_float(v.w);
            }
        }
    } else {
        float sum[2][Tile::CHAINS][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int k = 0; k < Tile::CHAINS * 4; k++)
                sum[m][k / 4][k % 4] = k < 4 ? known[2 * m + k / 2][k % 2] : 0.0f;
        slstm_multiply(f, t, 0, sum);
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (k % 2 < Tile::CELLS) r[k % 2][k / 2] = add_chains(sum[k / 4], k % 4);
    }
}

// A warp that multiplies, through all steps
template <typename Tile>
__device__ __forceinline__ void slstm_forward_products(const SlstmForward<Tile> &f, int T, int tiles) {
#pragma unroll 1
    for (int t = 0; t < T; t++)
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++) {
            float sum[2][Tile::CHAINS][4] = {};
            slstm_multiply(f, t, tile, sum);
            const unsigned to = f.products + tile * Tile::WARPS * Tile::PRODUCT_BYTES;
#pragma unroll
            for (int m = 0; m < 2; m++)
                shared_store_vector(to + m * 512, make_uint4(__float_as_uint(add_chains(sum[m], 0)),
                                                             __float_as_uint(add_chains(sum[m], 1)),
                                                             __float_as_uint(add_chains(sum[m], 2)),
                                                             __float_as_uint(add_chains(sum[m], 3))));
            __syncwarp();  // who reads them will have done so before y of token t + 1 is complete
            if (f.p.lane == 0) barrier_arrive(f.bars + Tile::product_barrier(tile, f.p.warp));
        }
}

template <typename Tile>  // A warp that multiplies for others alone, through all steps
__device__ __forceinline__ void slstm_forward_quarters(const SlstmForward<Tile> &f, int T, int half) {
    cluster_barrier();
#pragma unroll 1
    for (int t = 0; t < T; t++) {
        slstm_multiply_quarter(f, t);
        slstm_half_barrier(half);
    }
}

// y at token t, from which token t + 1 is made: to the block's own rows, from there to the peers and to memory. Where
// t + 1 begins a document, zeros enter it, and y is written here.
template <typename Tile>
__device__ __forceinline__ void slstm_hand_over(SlstmForward<Tile> &f, const SlstmJob<bf16> &job, int t) {
    const SlstmPlace &p = f.p;
    const int T = job.shape.T, d = job.shape.d, slot = t & 1, turn = p.lane / Tile::SEQUENCES;
    const size_t D = (size_t)job.shape.NH * d;
    const unsigned to = (slot ^ 1) * Tile::Y_SLOT;
    unsigned row = f.row + to, own = f.own + to;
    asm volatile("" : "+r"(row), "+r"(own));
    unsigned packed = pack_two(f.y[0], f.y[Tile::CELLS - 1]);  // without a second one, both rows are the same place
    if (f.fresh) {
        int first = Tile::CELLS * p.q;
        asm volatile("" : "+r"(first));  // what only this needs is made here, not kept
#pragma unroll
        for (int e = 0; e < Tile::CELLS; e++) {
            int sequence = first + e, b = p.b0 + sequence;
            if (!(f.fresh >> sequence & 1)) continue;
            if (b < job.shape.B && p.unit < d)
                job.y[((size_t)b * T + t) * D + (size_t)p.head * d + p.unit] = from_float<bf16>(f.y[e]);
            f.state[e] = slstm_empty_state();
            packed &= Tile::CELLS == 1 ? 0 : e ? 0x0000ffffu : 0xffff0000u;
        }
    }
    matrix_store_transposed(row, packed);
    __syncwarp();
    const uint4 chunk = shared_load_vector(own);
    const bool more = t + 1 < T;
    if (p.lane == 0) barrier_arrive(f.bars + Tile::y_barrier(slot ^ 1, p.tile, 0));
#pragma unroll
    for (int k = 0; k < Tile::SENDS; k++)
        if (more && turn + Tile::TURNS * k < Tile::CTAS - 1)
            send_vector(f.peer_chunk[k] + to, chunk, f.peer_bar[k] + Tile::y_barrier(slot ^ 1, 0, 0));
    if (Tile::PARTS > 1 && p.warp == 0 && p.lane == 0) {  // for token t + 2
#pragma unroll
        for (int part = 1; part < Tile::PARTS; part++)
            barrier_arrive_expect(f.bars + Tile::y_barrier(slot, p.tile, part), Tile::part_bytes(part));
    }
    if (turn < 2 && f.own_valid && (turn ? more : !(f.fresh >> p.lane % Tile::SEQUENCES & 1))) *(uint4 *)f.out = chunk;
}

// Writes what the backward pass needs of a token; it takes the place of the pre-activations, and turns round there.
// Then the next token's pre-activations, and the request for those that come into their place.
template <typename Tile>
__device__ __forceinline__ void slstm_save_and_fetch(SlstmForward<Tile> &f, const SlstmJob<bf16> &job, int t,
                                                     const float (&r)[Tile::CELLS][4],
                                                     const float (&gates)[Tile::CELLS][4]) {
    constexpr int LAST = Tile::CELLS - 1;
    const unsigned here = slstm_ring_slot(f, t);
    float sig_minus[Tile::CELLS];
#pragma unroll
    for (int e = 0; e < Tile::CELLS; e++)
        sig_minus[e] = (r[e][1] < 0 ? 1 : gates[e][1]) * reciprocal_fast(1 + gates[e][1]);
    matrices_store_transposed(here, pack_two(gates[0][0], gates[LAST][0]), pack_two(sig_minus[0], sig_minus[LAST]),
                              pack_two(gates[0][2], gates[LAST][2]), pack_two(gates[0][3], gates[LAST][3]));
    prefetch_wait<Tile::RING - 2>();
    __syncwarp();
    ldmatrix_trans(f.x_now, slstm_ring_slot(f, t + 1));
    if (f.row_valid) *(uint4 *)(job.saved.gates + f.at) = shared_load_vector(here);
    slstm_fetch(f, job, t, Tile::RING);
    prefetch_end_group();
}

// A warp that has units, through all steps. All threads of the cluster come by here.
template <typename Tile>
__device__ __forceinline__ void slstm_forward_units(SlstmForward<Tile> &f, const SlstmJob<bf16> &job) {
    const int T = job.shape.T, d = job.shape.d;
    const size_t D = (size_t)job.shape.NH * d;
    fetch_resets<Tile>(f.docs, job, f.p.b0, 1 + f.p.lane);
    for (int t = 0; t < Tile::RING; t++) {
        slstm_fetch(f, job, 0, t);
        prefetch_end_group();
    }
    prefetch_wait<Tile::RING - 1>();
    __syncwarp();
    ldmatrix_trans(f.x_now, slstm_ring_slot(f, 0));
    slstm_look_ahead(f, job, 0);
    // To be kept, not made again in each step
    asm volatile("" : "+r"(f.bars), "+r"(f.own), "+r"(f.right), "+r"(f.ring));
    cluster_barrier();  // the barriers and y of all blocks are set up, and all have read the initial states
    if (Tile::DIVIDED && f.p.b0 >= job.shape.B) return;  // a tile without sequences

#pragma unroll 1
    for (int t = 0; t < T; t++) {
        float r[Tile::CELLS][4], gates[Tile::CELLS][4];
        slstm_preactivations(f, t, r);
#pragma unroll
        for (int e = 0; e < Tile::CELLS; e++) f.y[e] = slstm_unit_step(&f.state[e], r[e], gates[e]);
        slstm_hand_over(f, job, t);
        slstm_save_and_fetch(f, job, t, r, gates);
        f.out += D;
        f.at += 4 * D;
        slstm_look_ahead(f, job, t + 1);
    }
#pragma unroll
    for (int e = 0; e < Tile::CELLS; e++) {
        int b = f.p.b0 + Tile::CELLS * f.p.q + e;
        const SlstmUnitState &s = f.state[e];
        if (b < job.shape.B && f.p.unit < d)
            store_cell(job.final, b, (size_t)f.p.head * d + f.p.unit, {f.y[e], s.c, s.n, s.m * 0.693147181f});
    }
    // A block may leave while its peers still work: it has received all that is ever sent to it.
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    slstm_cluster_forward_kernel(const __grid_constant__ SlstmJob<bf16> job) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char slstm_cluster_shared[];
    SlstmForward<Tile> f;
    const int half = threadIdx.x / 128, turn = half ? 3 - threadIdx.x / 32 % 4 : threadIdx.x / 32;
    f.p = slstm_place<Tile>(job.shape, Tile::SPLIT ? half * Tile::HALF + min(turn, Tile::HALF - 1) : threadIdx.x / 32);
    f.bars = shared_address(slstm_cluster_shared);
    f.products = f.bars + Tile::AT_PRODUCTS + (max(f.p.tile, 0) * Tile::WARPS + f.p.warp) * Tile::PRODUCT_BYTES +
                 f.p.lane * 16;
    slstm_forward_start<Tile>(job, f.p, slstm_cluster_shared);
    if constexpr (Tile::SPLIT) {
        slstm_split_load_weights(f, job, half, turn);
        if (turn < Tile::HALF) {
            slstm_forward_load_units(f, job);
            slstm_forward_addresses(f, job);
            slstm_forward_units(f, job);
        } else {
            slstm_forward_quarters(f, job.shape.T, half);
        }
        return;
    }
    if (Tile::DIVIDED && f.p.tile < 0) {
        registers_grow<Tile::MANY>();
        slstm_forward_load_weights(f, job);
        cluster_barrier();
        slstm_forward_products(f, job.shape.T, slstm_tiles<Tile>(f.p, job.shape));
    } else {
        if (Tile::DIVIDED) registers_shrink<Tile::FEW>();
        else slstm_forward_load_weights(f, job);
        slstm_forward_load_units(f, job);
        slstm_forward_addresses(f, job);
        slstm_forward_units(f, job);
    }
#endif
}

// ----------------------------------------------------------------------------------------------------------------
// Backward

// The warp's i-th panel: part `third` of the units of the block with the rank larger by `slice`, CTAS: of the own one.
struct SlstmPanel {
    int slice, third;
};
template <typename Tile>
__device__ __forceinline__ SlstmPanel slstm_panel(int warp, int i) {
    if (!Tile::SPLIT) return {2 * (i + 1) - warp % 2, warp / 2};
    const int number = Tile::MULTIPLY * i + warp, slice = number / Tile::HALF;
    return {1 + slice, number - slice * Tile::HALF};
}

// Fragment of R^T for the warp's panel i and step k of the sum over the block's gates. Row r of a panel is its unit r,
// but some of rows r and r + 8 change places, so that the receivers' loads share no banks.
template <typename Tile>
__device__ __forceinline__ uint4 slstm_backward_weights(const SlstmJob<bf16> &job, const SlstmPlace &p, int i, int k) {
    int d = job.shape.d, chunk = 4 * (k / 2) + p.q, gate = chunk / Tile::WARPS;
    int to = p.rank * Tile::U + chunk % Tile::WARPS * 8 + k % 2 * 4, swap = p.g >> Tile::SUMS_SWAP & 1;
    const SlstmPanel panel = slstm_panel<Tile>(p.warp, i);
    int from = (p.rank + panel.slice) % Tile::CTAS * Tile::U + panel.third * 16 + p.g;
    unsigned w[4] = {0, 0, 0, 0};
#pragma unroll
    for (int e = 0; e < 4; e++) {  // e % 2: row g or g + 8; e / 2: units 0, 1 or 2, 3
        int unit = Tile::CTAS == 1 ? p.unit : from + 8 * (e % 2 ^ swap);
        if (unit >= d || to >= d || (Tile::CTAS == 1 && e % 2)) continue;
        const bf16 *at = job.R + (((size_t)p.head * d + unit) * 4 + gate) * d + to + e / 2 * 2;
        w[e] = __bfloat16_as_ushort(at[0]) | (unsigned)__bfloat16_as_ushort(at[1]) << 16;
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// Before the first step back: barriers, and a ring in which sequences and units that are not there have o = 1 and
// zeros.
template <typename Tile>
__device__ __forceinline__ void slstm_backward_start(unsigned char *shared) {
    unsigned bars = shared_address(shared);
    for (int k = threadIdx.x; k < (Tile::AT_BACK_R - Tile::AT_TRACE) / 4; k += Tile::THREADS) {
        int at = 4 * k % Tile::TRACE_BYTES;
        bool is_o = 4 * k < Tile::AT_BACK_DOC - Tile::AT_TRACE && at >= 384 && at < Tile::AT_DY;
        ((unsigned *)(shared + Tile::AT_TRACE))[k] = is_o ? 0x3f803f80u : 0;
    }
    if (threadIdx.x == 0 && Tile::CTAS > 1) {
        for (int k = 0; k < 2 * Tile::TILES; k++) barrier_init(bars + Tile::dr_barrier(0, k), Tile::WARPS);
        for (int k = 0; k < 2 * Tile::TILES * Tile::HALF; k++) barrier_init(bars + 8 * k, 2);
        barrier_init_done();
        for (int k = 0; k < 2 * Tile::TILES * Tile::HALF; k++) barrier_arrive_expect(bars + 8 * k, Tile::SUMS_EXPECTED);
    }
    __syncthreads();
}

template <typename Tile>
struct SlstmBackward {  // what a thread keeps through all steps. e: one of its two sequences
    SlstmPlace p;
    unsigned bars, slots;       // barriers; the warp's R
    unsigned d_even, d_odd;     // right operands, even and odd groups, of tile 0
    unsigned sent, sums, bar;   // what is sent here, for the lane; of its panel; the barrier that counts it; of tile 0
    uint4 held[Tile::BACK_HELD];  // of fragments i * BACK_STEPS + k, panel i, step k, those not in shared memory
    // of a warp that has units
    unsigned ring, docs, own;           // what was saved, doc_start, dr of the lane
    size_t at;                          // element of gates and dx, of the current token
    const bf16 *other;                  // dy or y_prev of the current token
    bool row_valid;                     // there is a sequence in row lane % 8
    unsigned saved[4];                  // gates of the token to come, two sequences a word
    float h_initial[Tile::CELLS], dh[Tile::CELLS], dL[Tile::CELLS], dbias[4];
    float dy_back[Tile::CELLS];  // through R, from the token after the current one
    SlstmResets resets;
    unsigned cut;  // sequences into whose token nothing flows back
};

// R, and where its right operands and its products lie. Sums: the messages of a panel lie by lane; one holds two
// sequences of units g and g + 8 of the panel.
template <typename Tile>
__device__ __forceinline__ void slstm_backward_load_weights(SlstmBackward<Tile> &f, const SlstmJob<bf16> &job) {
    constexpr int STEPS = Tile::BACK_STEPS;
    const SlstmPlace &p = f.p;
    const unsigned flip = chunk_flip(p.g);
    f.d_even = f.bars + Tile::AT_D + p.g * Tile::D_PITCH + ((p.q ^ flip) << 4);
    f.d_odd = f.bars + Tile::AT_D + p.g * Tile::D_PITCH + (((4 + p.q) ^ flip) << 4);
    f.slots = f.bars + Tile::AT_BACK_R + p.warp * Tile::BACK_SHARED * 512 + p.lane * 16;
#pragma unroll
    for (int n = 0; n < Tile::FRAGMENTS; n++)
        if (Tile::back_before(n + 1) == Tile::back_before(n))
            f.held[n - Tile::back_before(n)] = slstm_backward_weights<Tile>(job, p, n / STEPS, n % STEPS);
#pragma unroll 1
    for (int n = 0; n < Tile::FRAGMENTS; n++)
        if (Tile::back_before(n + 1) > Tile::back_before(n))
            shared_store_vector(f.slots + Tile::back_before(n) * 512,
                                slstm_backward_weights<Tile>(job, p, n / STEPS, n % STEPS));
}

// Lane l stores and writes gate l / 8 of sequence l % 8 of its tile.
template <typename Tile>
__device__ __forceinline__ void slstm_backward_addresses(SlstmBackward<Tile> &f, const SlstmJob<bf16> &job) {
    const SlstmPlace &p = f.p;
    const int row = p.lane % 8, gate = p.lane / 8, T = job.shape.T, d = job.shape.d, b = p.b0 + row / Tile::APART;
    const int warp = p.tile * Tile::WARPS + p.warp;
    const size_t D = (size_t)job.shape.NH * d, last = ((size_t)b * T + T - 1) * D + (size_t)p.head * d;
    f.ring = f.bars + Tile::AT_TRACE + warp * Tile::BACK_RING * Tile::TRACE_BYTES + p.lane * 16;
    f.docs = f.bars + Tile::AT_BACK_DOC + warp * Tile::DOC_BYTES;
    f.own = f.bars + Tile::AT_D + p.tile * Tile::D_TILE + row * Tile::D_PITCH +
            (((gate * Tile::WARPS + p.warp) ^ chunk_flip(row)) << 4);
    f.row_valid = row % Tile::APART == 0 && b < job.shape.B && p.first < d;
    f.at = 4 * last + (size_t)gate * d + p.first;
    f.other = (gate == 0 ? job.dy : job.saved.y_prev) + last + p.first;
}

// h that entered the first token; gradients that enter behind the last one
template <typename Tile>
__device__ __forceinline__ void slstm_backward_load_units(SlstmBackward<Tile> &f, const SlstmJob<bf16> &job) {
    const SlstmPlace &p = f.p;
#pragma unroll
    for (int e = 0; e < Tile::CELLS; e++) {
        int b = p.b0 + Tile::CELLS * p.q + e;
        SlstmCell cell = {};
        SlstmStateBack entering = {};
        const size_t at = (size_t)p.head * job.shape.d + p.unit;
        if (b < job.shape.B && p.unit < job.shape.d) {
            cell = load_cell(job.initial, b, at);
            entering = slstm_enter_back(job.final, job.dfinal, b, at);
        }
        f.h_initial[e] = cell.n != 0 ? cell.c / cell.n : 0.0f;
        f.dh[e] = entering.dh;
        f.dL[e] = entering.dL;
        f.dy_back[e] = entering.dy;
    }
    for (int m = 0; m < 4; m++) f.dbias[m] = 0;
    f.resets = {0, 0};
}

// The ring of what the forward pass saved. k-th step: token T - 1 - k. Of each token chunks [gate][sequence], then dy
// (lanes below 8) and y_prev (the next 8).
template <typename Tile>
__device__ __forceinline__ unsigned slstm_ring_slot(const SlstmBackward<Tile> &f, int k) {
    return f.ring + k % Tile::BACK_RING * Tile::TRACE_BYTES;
}
template <typename Tile>  // of step k + ahead
__device__ __forceinline__ void slstm_fetch(const SlstmBackward<Tile> &f, const SlstmJob<bf16> &job, int k, int ahead) {
    const ptrdiff_t D = (ptrdiff_t)job.shape.NH * job.shape.d;
    const unsigned to = slstm_ring_slot(f, k + ahead);
    if (k + ahead >= job.shape.T || !f.row_valid) return;
    prefetch_vector(to, job.saved.gates + f.at - ahead * 4 * D);
    if (f.p.lane < 16) prefetch_vector(to + Tile::AT_DY, f.other - ahead * D);
}

// All of a step that can be made before the gradient of y arrives; dy is its part from above.
template <typename Tile>
__device__ __forceinline__ void slstm_prepare(SlstmBackward<Tile> &f, const SlstmJob<bf16> &job, int k,
                                              SlstmBack (&back)[Tile::CELLS], float2 &dy) {
    unsigned now[4], two[2];
    prefetch_wait<Tile::BACK_RING - 2>();
    __syncwarp();
    matrix_pair_load_transposed(two, slstm_ring_slot(f, k) + Tile::AT_DY);
    dy = unpack_two(two[0]);
    const float2 y_prev = unpack_two(two[1]);
#pragma unroll
    for (int m = 0; m < 4; m++) now[m] = f.saved[m];
    ldmatrix_trans(f.saved, slstm_ring_slot(f, k + 1));
#pragma unroll
    for (int e = 0; e < Tile::CELLS; e++) {
        float v[4], o_prev;  // gates; the last one also of the token before
#pragma unroll
        for (int m = 0; m < 4; m++) v[m] = e ? unpack_two(now[m]).y : unpack_two(now[m]).x;
        o_prev = e ? unpack_two(f.saved[3]).y : unpack_two(f.saved[3]).x;
        float h_prev = (e ? y_prev.y : y_prev.x) * reciprocal_fast(o_prev);
        back[e] = slstm_back(v[0], v[1], v[2], v[3], k == job.shape.T - 1 ? f.h_initial[e] : h_prev, f.dL[e]);
        asm volatile(""  // made now, not after the wait
                     : "+f"(back[e].to_i), "+f"(back[e].input_dL), "+f"(back[e].kept_dL), "+f"(back[e].to_z),
                       "+f"(back[e].to_o));
    }
    slstm_fetch(f, job, k, Tile::BACK_RING);
    prefetch_end_group();
}

// The sums that the last step sent here, added in order of the senders
template <typename Tile>
__device__ __forceinline__ void slstm_receive_sums(SlstmBackward<Tile> &f, int k) {
    const int slot = k & 1 ^ 1, half = f.p.warp % 2 ^ (f.p.g >> Tile::SUMS_SWAP & 1);
    const unsigned from = f.sums + slot * Tile::SUMS_SLOT + f.p.tile * Tile::SUMS_TILE +
                          (Tile::CELLS == 2 ? half * (Tile::SUMS_LANE / 2) : 0);
    float2 part[Tile::CTAS];  // two sequences, or two halves
    barrier_wait(f.bar + Tile::sums_barrier(slot, f.p.tile, 0), (k - 1) >> 1 & 1);
#pragma unroll
    for (int s = 0; s < Tile::CTAS; s++)
        part[s] = Tile::ROUNDED ? unpack_two(shared_load_word(from + s * Tile::SUMS_SLICE))
                                : shared_load_two(from + s * Tile::SUMS_SLICE);
#pragma unroll
    for (int s = 1; s < Tile::CTAS; s++) {
        part[0].x += part[s].x;
        part[0].y += part[s].y;
    }
    if (Tile::CELLS == 2) {
        f.dy_back[0] = part[0].x;
        f.dy_back[Tile::CELLS - 1] = part[0].y;
    } else f.dy_back[0] = half ? part[0].y : part[0].x;
}

// dr, to the block's right operands
template <typename Tile>
__device__ __forceinline__ void slstm_make_dr(SlstmBackward<Tile> &f, int k, const SlstmBack (&back)[Tile::CELLS],
                                              float2 dy) {
    constexpr int LAST = Tile::CELLS - 1;
    float dr[Tile::CELLS][4];
#pragma unroll
    for (int e = 0; e < Tile::CELLS; e++) {
        bool cut = f.cut >> (Tile::CELLS * f.p.q + e) & 1;
        slstm_finish_back(back[e], (e ? dy.y : dy.x) + (cut ? 0.0f : f.dy_back[e]), dr[e], &f.dh[e], &f.dL[e]);
#pragma unroll
        for (int m = 0; m < 4; m++) f.dbias[m] += dr[e][m];
    }
    matrices_store_transposed(f.own + (k & 1) * Tile::D_SLOT, pack_two(dr[0][0], dr[LAST][0]),
                              pack_two(dr[0][1], dr[LAST][1]), pack_two(dr[0][2], dr[LAST][2]),
                              pack_two(dr[0][3], dr[LAST][3]));
}

// The sums of the warp's i-th panel to the block that owns the units. slot, tile: of the step
template <typename Tile>
__device__ __forceinline__ void slstm_send_panel(const SlstmBackward<Tile> &f, int i, int slot, int tile,
                                                 const float (&total)[4]) {
    const uint4 sums = make_uint4(__float_as_uint(total[0]), __float_as_uint(total[1]), __float_as_uint(total[2]),
                                  __float_as_uint(total[3]));
    const uint2 two = Tile::ROUNDED ? make_uint2(pack_two(total[0], total[1]), pack_two(total[2], total[3]))
                                    : make_uint2(sums.x, sums.z);
    const unsigned word = pack_two(total[0], total[2]);
    const SlstmPanel panel = slstm_panel<Tile>(f.p.warp, i);
    const unsigned at = slot * Tile::SUMS_SLOT + tile * Tile::SUMS_TILE;
    const unsigned here = Tile::SPLIT ? f.sent + panel.third * Tile::SUMS_PANEL : f.sums;
    const unsigned bar = Tile::SPLIT ? f.bars + Tile::sums_barrier(0, 0, panel.third) : f.bar;
    if (panel.slice == Tile::CTAS) {
        if (Tile::SUMS_LANE == 4) shared_store_word(here + at, word);
        else if (Tile::SUMS_LANE == 8) shared_store_two(here + at, two);
        else shared_store_vector(here + at, sums);
    } else {
        const int next = f.p.rank + panel.slice, peer = next < Tile::CTAS ? next : next - Tile::CTAS;
        const unsigned to = peer_address(here + panel.slice * Tile::SUMS_SLICE, peer) + at;
        const unsigned count = peer_address(bar, peer) + Tile::sums_barrier(slot, tile, 0);
        if (Tile::SUMS_LANE == 4) send_word_async(to, word, count);
        else if (Tile::SUMS_LANE == 8) send_two(to, two, count);
        else send_vector(to, sums, count);
    }
}

// R^T dr of the block's gates, a panel of units after the other. zero: a 0 that the compiler does not know. It lets
// products wait for earlier ones, whose sums are sent meanwhile.
template <typename Tile>
__device__ __forceinline__ void slstm_send_sums(SlstmBackward<Tile> &f, int k, int tile, unsigned zero) {
    constexpr int WARPS = Tile::WARPS, PANELS = Tile::PANELS, STEPS = Tile::BACK_STEPS;
    const int slot = k & 1;
    uint4 v[WARPS];
#pragma unroll
    for (int group = 0; group < WARPS; group++)
        v[group] = shared_load_vector((group % 2 ? f.d_odd : f.d_even) + slot * Tile::D_SLOT + tile * Tile::D_TILE +
                                      group / 2 * 128);
    float total[4];
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++) {
        if (panel > 0 && panel % Tile::TOGETHER == 0) {
            const unsigned wait = __float_as_uint(total[0]) & zero;
            v[0].x |= wait;
            v[0].z |= wait;
            v[1].x |= wait;
            v[1].z |= wait;
        }
        float sum[4][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const int n = panel * STEPS + step, before = Tile::back_before(n);
            const bool held = Tile::back_before(n + 1) == before;
            uint4 w = held ? f.held[held ? n - before : 0] : shared_load_vector(f.slots + before * 512);
            const uint4 &part = v[step / 2];
            mma(sum[step % 4], w, step % 2 ? part.z : part.x, step % 2 ? part.w : part.y);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) total[e] = add_chains(sum, e);
        if constexpr (Tile::CTAS == 1) {
            f.dy_back[0] = total[0];
            f.dy_back[Tile::CELLS - 1] = total[Tile::CELLS - 1];
        } else {
            slstm_send_panel(f, panel, slot, tile, total);
        }
    }
    const SlstmPanel last = slstm_panel<Tile>(f.p.warp, PANELS - 1);
    if (Tile::CTAS > 1 && last.slice == Tile::CTAS) {
        __syncwarp();
        if (f.p.lane == 0) barrier_arrive(f.bars + Tile::sums_barrier(slot, tile, last.third));
    }
}

// Steps whose sums are needed: for the tokens before, and where its gradient is wanted for the initial state
__device__ __forceinline__ int slstm_sends(const SlstmJob<bf16> &job) {
    return job.dinitial.y ? job.shape.T : job.shape.T - 1;
}

// A warp that multiplies, through all steps
template <typename Tile>
__device__ __forceinline__ void slstm_backward_products(SlstmBackward<Tile> &f, int sends, int tiles, unsigned zero) {
#pragma unroll 1
    for (int k = 0; k < sends; k++)
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++) {
            barrier_wait(f.bars + Tile::dr_barrier(k & 1, tile), k >> 1 & 1);
            slstm_send_sums(f, k, tile, zero);
        }
}

// A warp without units in a cluster in which all multiply, through all steps
template <typename Tile>
__device__ __forceinline__ void slstm_backward_help(SlstmBackward<Tile> &f, const SlstmJob<bf16> &job, unsigned zero) {
    const int sends = slstm_sends(job);
    cluster_barrier();
#pragma unroll 1
    for (int k = 0; k < job.shape.T; k++) {
        __syncthreads();  // dr is complete
        if (k < sends) slstm_send_sums(f, k, 0, zero);
    }
}

// Sums of dr over the tokens and the tile's sequences: first the thread's own, then over q.
template <typename Tile>
__device__ __forceinline__ void slstm_store_bias_sums(const SlstmBackward<Tile> &f, const SlstmJob<bf16> &job) {
    const SlstmPlace &p = f.p;
#pragma unroll
    for (int m = 0; m < 4; m++) {
        float sum = f.dbias[m];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (p.q == 0 && p.unit < job.shape.d)
            job.partial[(((size_t)p.group * job.shape.NH + p.head) * 4 + m) * job.shape.d + p.unit] = sum;
    }
}

// Of the initial states
template <typename Tile>
__device__ __forceinline__ void slstm_store_state_gradients(const SlstmBackward<Tile> &f, const SlstmJob<bf16> &job) {
    const SlstmPlace &p = f.p;
#pragma unroll
    for (int e = 0; e < Tile::CELLS; e++) {
        const int b = p.b0 + Tile::CELLS * p.q + e;
        if (b >= job.shape.B || p.unit >= job.shape.d) continue;
        const bool fresh = job.doc_start[(size_t)b * job.shape.T] == 0;
        slstm_leave_back(job.initial, job.dinitial, b, (size_t)p.head * job.shape.d + p.unit,
                         {fresh ? 0.0f : f.dy_back[e], f.dh[e], f.dL[e]});
    }
}

// A warp that has units, through all steps. All threads of the cluster come by here.
template <typename Tile>
__device__ __forceinline__ void slstm_backward_units(SlstmBackward<Tile> &f, const SlstmJob<bf16> &job, unsigned zero) {
    constexpr int CTAS = Tile::CTAS, RING = Tile::BACK_RING;
    const int T = job.shape.T, sends = slstm_sends(job);
    const size_t D = (size_t)job.shape.NH * job.shape.d;
    fetch_resets<Tile>(f.docs, job, f.p.b0, T - f.p.lane);
    for (int k = 0; k < RING; k++) {
        slstm_fetch(f, job, 0, k);
        prefetch_end_group();
    }
    prefetch_wait<RING - 1>();
    __syncwarp();
    ldmatrix_trans(f.saved, slstm_ring_slot(f, 0));
    // To be kept, not made again in each step
    asm volatile("" : "+r"(f.own), "+r"(f.d_even), "+r"(f.d_odd), "+r"(f.sums), "+r"(f.ring), "+r"(f.bar));
    if (CTAS > 1) cluster_barrier();  // the barriers of all blocks are set up
    if (Tile::DIVIDED && f.p.b0 >= job.shape.B) return;  // a tile without sequences

#pragma unroll 1
    for (int k = 0; k < T; k++) {
        if (k % 32 == 0) {
            f.resets = read_resets(f.docs + k / 32 % 2 * 1024, T - k - f.p.lane);
            fetch_resets<Tile>(f.docs + (k / 32 + 1) % 2 * 1024, job, f.p.b0, T - k - 32 - f.p.lane);
        }
        f.cut = resets_at(f.resets, k % 32);
        SlstmBack back[Tile::CELLS];
        float2 dy;
        slstm_prepare(f, job, k, back, dy);
        if (CTAS > 1 && k > 0) slstm_receive_sums(f, k);
        slstm_make_dr(f, k, back, dy);
        if (Tile::DIVIDED) {
            __syncwarp();
            if (f.p.lane == 0) barrier_arrive(f.bars + Tile::dr_barrier(k & 1, f.p.tile));
        } else __syncthreads();  // dr is complete; of two steps ago it was read before the last step's barrier
        if (CTAS > 1 && k > 0 && f.p.warp % 2 == 0 && f.p.lane == 0)  // for the sums of step k + 1
            barrier_arrive_expect(f.bar + Tile::sums_barrier(k & 1 ^ 1, f.p.tile, 0), Tile::SUMS_EXPECTED);
        if (!Tile::DIVIDED && k < sends) slstm_send_sums(f, k, 0, zero);
        if (f.row_valid) *(uint4 *)(job.dx + f.at) = shared_load_vector(f.own + (k & 1) * Tile::D_SLOT);
        f.at -= 4 * D;
        f.other -= D;
    }
    if (job.dinitial.y) {
        if (CTAS > 1) slstm_receive_sums(f, T);
        slstm_store_state_gradients(f, job);
    }
    slstm_store_bias_sums(f, job);
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    slstm_cluster_backward_kernel(const __grid_constant__ SlstmJob<bf16> job) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char slstm_cluster_shared[];
    SlstmBackward<Tile> f;
    const unsigned zero = (unsigned)job.shape.NH >> 31;
    f.p = slstm_place<Tile>(job.shape);
    f.bars = shared_address(slstm_cluster_shared);
    f.bar = f.bars + Tile::sums_barrier(0, 0, f.p.warp / 2);
    f.sent = f.bars + Tile::AT_SUMS + f.p.lane * Tile::SUMS_LANE;
    f.sums = f.sent + f.p.warp / 2 * Tile::SUMS_PANEL;
    slstm_backward_start<Tile>(slstm_cluster_shared);
    if (Tile::SPLIT && f.p.warp >= Tile::WARPS) {
        slstm_backward_load_weights(f, job);
        slstm_backward_help(f, job, zero);
    } else if (Tile::DIVIDED && f.p.tile < 0) {
        registers_grow<Tile::MANY>();
        slstm_backward_load_weights(f, job);
        cluster_barrier();
        slstm_backward_products(f, slstm_sends(job), slstm_tiles<Tile>(f.p, job.shape), zero);
    } else {
        if (Tile::DIVIDED) registers_shrink<Tile::FEW>();
        else slstm_backward_load_weights(f, job);
        slstm_backward_load_units(f, job);
        slstm_backward_addresses(f, job);
        slstm_backward_units(f, job, zero);
    }
#endif
}

// ----------------------------------------------------------------------------------------------------------------
// Launchers

typedef struct {
    int ctas, warps, sequences, rows;  // blocks; groups of 8 units; sequences of a tile, of a cluster
    struct {
        const void *kernel;
        int threads, bytes;  // of a block; its shared memory
        float us;   // microseconds a step on an H100, one block a multiprocessor
    } pass[2];      // forward, backward
} SlstmClusterKernels;

template <typename Tile>
static SlstmClusterKernels slstm_cluster_kernels(float forward_us, float backward_us) {
    return {Tile::CTAS,
            Tile::WARPS,
            Tile::SEQUENCES,
            Tile::ROWS,
            {{(const void *)slstm_cluster_forward_kernel<Tile>, Tile::THREADS, Tile::FORWARD_BYTES, forward_us},
             {(const void *)slstm_cluster_backward_kernel<Tile>, Tile::THREADS, Tile::BACKWARD_BYTES, backward_us}}};
}

enum { SLSTM_CLUSTERS = 12, SLSTM_ANY = -1, SLSTM_NO_CLUSTER = -2 };

static const SlstmClusterKernels *slstm_cluster_table(void) {
    static const SlstmClusterKernels table[SLSTM_CLUSTERS] = {
        slstm_cluster_kernels<SlstmCluster<1, 8, 1>>(0.83f, 0.69f),
        slstm_cluster_kernels<SlstmCluster<4, 4, 1>>(0.62f, 0.58f),
        slstm_cluster_kernels<SlstmCluster<6, 4, 1>>(0.68f, 0.70f),
        slstm_cluster_kernels<SlstmCluster<8, 4, 1>>(0.72f, 0.76f),
        slstm_cluster_kernels<SlstmCluster<6, 4, 3>>(1.42f, 1.42f),
        slstm_cluster_kernels<SlstmCluster<8, 4, 3>>(1.38f, 1.55f),
        slstm_cluster_kernels<SlstmCluster<8, 6, 1>>(1.12f, 1.24f),
        slstm_cluster_kernels<SlstmCluster<16, 4, 1>>(1.19f, 0.95f),
        slstm_cluster_kernels<SlstmCluster<8, 8, 1>>(1.80f, 1.82f),
        slstm_cluster_kernels<SlstmCluster<16, 6, 1, 4>>(1.39f, 1.75f),
        slstm_cluster_kernels<SlstmCluster<6, 4, 1, 4>>(0.54f, 0.71f),
        slstm_cluster_kernels<SlstmCluster<16, 6, 1>>(2.13f, 1.85f),
    };
    return table;
}

// For tests and benchmarks: SLSTM_ANY, SLSTM_NO_CLUSTER, or the only row of the table to be used.
static int slstm_cluster_choice = SLSTM_ANY;

typedef struct {
    const SlstmClusterKernels *kernels;  // NULL: no cluster for this shape, or on this chip
    int pass, tasks, active, shared;     // backward; clusters to run, and at once; bytes of shared memory a block
    float us;                            // estimate for a step of all tasks
} SlstmClusterPlan;

static void slstm_cluster_config(cudaLaunchConfig_t *config, cudaLaunchAttribute *cluster,
                                 const SlstmClusterPlan *plan) {
    *config = {};
    *cluster = {};
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim.x = plan->kernels->ctas;
    cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
    config->gridDim = dim3(plan->tasks * plan->kernels->ctas);
    config->blockDim = dim3(plan->kernels->pass[plan->pass].threads);
    config->dynamicSmemBytes = plan->shared;
    config->attrs = cluster;
    config->numAttrs = 1;
}

// Clusters that run at once; 0 if the kernel's blocks do not fit on this chip.
static int slstm_active_clusters(const SlstmClusterPlan *plan) {
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    const void *kernel = plan->kernels->pass[plan->pass].kernel;
    int device, limit, active = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (plan->shared > limit) return 0;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
    if (plan->kernels->ctas > 8)
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    slstm_cluster_config(&config, &cluster, plan);
    CUDA_CHECK(cudaOccupancyMaxActiveClusters(&active, kernel, &config));
    return active;
}

// The kernels that take least time. Blocks that ask for more than half of the shared memory are alone on their
// multiprocessor; where they are too many, they share it two by two.
static SlstmClusterPlan slstm_cluster_plan(const SlstmShape *s, int backward) {
    enum { ALONE = 116 * 1024, UNKNOWN = -1 };
    const float SHARED = 1.6f;                       // how much longer a step then takes
    static int active[SLSTM_CLUSTERS][2][2], asked;  // [row][pass][alone]
    const SlstmClusterKernels *table = slstm_cluster_table();
    SlstmClusterPlan best = {};
    int device, major;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major < 9 || s->d % 8 || slstm_cluster_choice == SLSTM_NO_CLUSTER) return best;
    if (!asked) memset(active, UNKNOWN, sizeof active);
    asked = 1;
    for (int row = 0; row < SLSTM_CLUSTERS; row++) {
        SlstmClusterPlan plan = {table + row, backward, s->NH * ceil_div(s->B, table[row].rows)};
        int units = 8 * table[row].ctas * table[row].warps, bytes = table[row].pass[backward].bytes;
        if (units < s->d) continue;
        if (slstm_cluster_choice >= 0 && slstm_cluster_choice != row) continue;
        for (int alone = 1; alone >= 0; alone--) {
            plan.shared = alone && bytes < ALONE ? (int)ALONE : bytes;
            int *known = &active[row][backward][alone];
            if (*known == UNKNOWN) *known = slstm_active_clusters(&plan);
            plan.active = *known;
            if (plan.active == 0) continue;
            plan.us = table[row].pass[backward].us * ceil_div(plan.tasks, plan.active) * (alone ? 1.0f : SHARED);
            if (!best.kernels || plan.us < best.us) best = plan;
        }
    }
    return best;
}

static void slstm_cluster_launch(const SlstmClusterPlan *plan, const SlstmJob<bf16> *job, cudaStream_t stream) {
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    void *arguments[] = {(void *)job};
    slstm_cluster_config(&config, &cluster, plan);
    config.stream = stream;
    CUDA_CHECK(cudaLaunchKernelExC(&config, plan->kernels->pass[plan->pass].kernel, arguments));
}

#endif
