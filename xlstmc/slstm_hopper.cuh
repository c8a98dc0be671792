// slstm_hopper.cuh: the sLSTM cell in bf16 on chips that have clusters of thread blocks (compute capability 9.0 and
// newer). One cluster carries one head of a group of 8 or 16 sequences through all time steps.
//
// A warp owns 8 hidden units with all four gates: the states of a unit of a sequence stay in one thread, and the part
// of R that the warp multiplies with in its registers (what does not fit, in shared memory) as left operands of
// mma.sync; the sequences are the 8 columns of the right operand. What a step hands over goes from registers straight
// into the shared memory of the blocks that need it (st.async), and each message counts its bytes at a barrier
// (mbarrier) that the receiver waits for. There is no barrier of the cluster in the loop.
//
// Forward, every block needs the outputs y of all units: an all-gather of bf16. A block begins to multiply with its own
// outputs while those of its peers are on their way. Backward, a block multiplies its part of R^T with its own dr and
// sends fp32 sums to the blocks that own the units; these add them in a fixed order.
//
// All buffers and barriers of the exchange exist twice, for even and odd steps. That is enough: what a block sends in
// step s + 2 depends on everything that its peers sent in step s + 1, and every warp of a peer sent that only after
// it had read all it was sent in step s.
#ifndef XLSTMC_SLSTM_HOPPER_CUH
#define XLSTMC_SLSTM_HOPPER_CUH

#include "hopper.cuh"
#include "mma.cuh"
#include "slstm_cell.cuh"

// ----------------------------------------------------------------------------------------------------------------
// The parts of PTX that only these kernels need

__device__ __forceinline__ int cluster_rank(void) {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_barrier(void) {
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ unsigned peer_address(unsigned address, int rank) {  // the same place in another block
    unsigned peer;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
    return peer;
}
// 16 bytes to a peer, counted by the barrier of that peer.
__device__ __forceinline__ void send_vector(unsigned to, uint4 v, unsigned bar) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
        "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(bar)
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
__device__ __forceinline__ void matrix_pair_store_transposed(unsigned address, unsigned r0, unsigned r1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r0), "r"(r1)
                 : "memory");
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
// matrix. Right operands lie in rows of chunks, a row a sequence. A chunk lies at its number with some bits flipped by
// its row, so that neither the 8 rows of a chunk nor 4 chunks of two neighbouring rows share banks.
__device__ __forceinline__ int chunk_flip(int row) { return (row & 1) * 4 + (row >> 1 & 3); }

template <int Ctas, int Warps, int Rows>
struct SlstmCluster {
    static constexpr int CTAS = Ctas, WARPS = Warps, ROWS = Rows;  // blocks a cluster, warps a block, sequences
    static constexpr int THREADS = 32 * WARPS, U = 8 * WARPS;      // U: units a block
    static constexpr int TILES = ROWS / 8, HALF = WARPS / 2;       // tiles of 8 sequences
    static_assert(WARPS % 2 == 0 && (CTAS == 1 || CTAS % 2 == 0) && ROWS % 8 == 0, "");

    // Forward. Sums over the units of the cluster run over groups of 4 chunks = 32 units. The chunks of a row begin
    // with the block's own; slice s holds those of the block with the rank smaller by s. They come in parts, each
    // with its own barrier: part 0 is the block's own, the others are told apart by when they are sent.
    static constexpr int CHUNKS = CTAS * WARPS, GROUPS = (CHUNKS + 3) / 4, STEPS = 2 * GROUPS;
    static constexpr bool BY_SLICE = CTAS > 4, BY_WARP = !BY_SLICE && CTAS > 1 && WARPS > 4;
    static constexpr int PARTS = CTAS == 1 ? 1 : BY_SLICE || BY_WARP ? 3 : 2;
    static __host__ __device__ constexpr int part_begin(int part) {  // its first chunk
        return part == 0               ? 0
               : part == 1             ? WARPS
               : part == 2 && BY_SLICE ? 5 * WARPS
               : part == 2 && BY_WARP  ? WARPS + (CTAS - 1) * HALF
                                       : CHUNKS;
    }
    static __device__ int part(int slice, int warp) {
        return slice == 0 ? 0 : BY_SLICE ? (slice <= 4 ? 1 : 2) : BY_WARP ? 1 + warp / HALF : 1;
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
    static constexpr int SENDS = ((CTAS - 1) * ROWS + 31) / 32;        // messages a lane
    static constexpr int CHAINS = TILES == 1 ? 4 : 2;                  // independent sums a result
    static constexpr int TAIL = TILES == 1 ? 4 : 2;                    // groups at the end, at most, gate by gate
    static constexpr int LAST = GROUPS - part_begin(PARTS - 1) / 4;    // groups of the last part
    static constexpr int MAIN = GROUPS - (LAST < TAIL ? LAST : TAIL);  // groups before these
    static constexpr int HELD = STEPS <= 16  ? STEPS
                                : TILES == 2 ? 14
                                : CTAS == 16 ? 18
                                             : 20;  // steps of 16 units with R in registers
    static constexpr int IN_SHARED = STEPS - HELD;  // the first ones, in shared memory
    static constexpr int RING = 8;                  // tokens on their way
    static constexpr int Y_PITCH = (CHUNKS + 7) / 8 * 128, Y_TILE = 8 * Y_PITCH, Y_SLOT = TILES * Y_TILE;
    static constexpr int X_BYTES = TILES * 512, DOC_BYTES = 2 * ROWS * 128;  // of a token; of two times 32 tokens
    static constexpr int AT_Y = 128, AT_X = AT_Y + 2 * Y_SLOT, AT_DOC = AT_X + RING * WARPS * X_BYTES;
    static constexpr int AT_R = AT_DOC + WARPS * DOC_BYTES;
    static constexpr int FORWARD_BYTES = AT_R + WARPS * IN_SHARED * 2 * 512;

    // Backward. A warp takes PANELS panels of 16 units, each of another block, and sums over the block's 4 U gates. In
    // a cluster of one block it takes its own 8 units, and half of each panel is zero.
    static constexpr int PANELS = CTAS == 1 ? 1 : CTAS / 2, BACK_STEPS = 2 * WARPS, FRAGMENTS = PANELS * BACK_STEPS;
    static constexpr int BACK_HELD = FRAGMENTS <= 32 ? FRAGMENTS : FRAGMENTS <= 48 ? 32 : 28;
    static constexpr int BACK_SHARED = FRAGMENTS - BACK_HELD;
    static constexpr int TOGETHER = TILES == 1 && WARPS > 4 ? 1 : 2;  // panels that are multiplied at the same time
    static constexpr int BACK_CHAINS = TILES == 1 ? 4 : 2;
    static constexpr int D_PITCH = 64 * WARPS, D_TILE = 8 * D_PITCH, D_SLOT = TILES * D_TILE;
    static constexpr int SUMS_TILE = HALF * 512, SUMS_SLICE = TILES * SUMS_TILE;
    static constexpr int SUMS_SLOT = CTAS == 1 ? 0 : CTAS * SUMS_SLICE;
    static constexpr int AT_DY = 512, TRACE_TILE = 768, TRACE_BYTES = TILES * TRACE_TILE;  // gates; dy, y_prev
    static constexpr int AT_D = 128, AT_SUMS = AT_D + 2 * D_SLOT, AT_TRACE = AT_SUMS + 2 * SUMS_SLOT;
    static constexpr int BACK_RING = FRAGMENTS > 48 ? 4 : RING;  // R leaves less room
    static constexpr int AT_BACK_DOC = AT_TRACE + BACK_RING * WARPS * TRACE_BYTES;
    static constexpr int AT_BACK_R = AT_BACK_DOC + WARPS * DOC_BYTES;
    static constexpr int BACKWARD_BYTES = AT_BACK_R + WARPS * BACK_SHARED * 512;
};

struct SlstmPlace {                    // of a thread: unit `first` + g of the head, sequences b0 + 8 tile + 2 q + e
    int rank, lane, warp, g, q;        // g = lane / 4, q = lane % 4; e = 0 or 1
    int group, head, b0, first, unit;  // group of sequences; first unit of the warp; own unit
};
template <typename Tile>
__device__ __forceinline__ SlstmPlace slstm_place(const SlstmShape &s) {
    SlstmPlace p;
    int groups = (s.B + Tile::ROWS - 1) / Tile::ROWS, task = blockIdx.x / Tile::CTAS;
    p.rank = cluster_rank();
    p.lane = threadIdx.x % 32;
    p.warp = threadIdx.x / 32;
    asm volatile("" : "+r"(p.lane), "+r"(p.warp));  // to be kept, not read again in each step
    p.g = p.lane / 4;
    p.q = p.lane % 4;
    p.group = task % groups;
    p.head = task / groups;
    p.b0 = p.group * Tile::ROWS;
    p.first = p.rank * Tile::U + 8 * p.warp;
    p.unit = p.first + p.g;
    return p;
}

// Which sequences begin a document at a token, for 32 tokens in the order in which the kernel goes through them. Lane l
// looks after the l-th: `token` is its number, and what is none of this sequence's, or out of range, never begins one.
struct SlstmResets {
    unsigned any, row;  // bit l: some sequence, the sequence lane % 32, begins a document at the l-th token
};
template <int ROWS>
__device__ __forceinline__ void fetch_resets(unsigned block, const SlstmJob<bf16> &job, int b0, int token) {
#pragma unroll 1
    for (int r = 0; r < ROWS && b0 + r < job.shape.B; r++)
        if (token > 0 && token < job.shape.T)
            prefetch_word(block + (r * 32 + threadIdx.x % 32) * 4,
                          job.doc_start + (size_t)(b0 + r) * job.shape.T + token);
}
template <int ROWS>
__device__ __forceinline__ SlstmResets read_resets(unsigned block, int token) {
    SlstmResets s = {0, 0};
#pragma unroll 1
    for (int r = 0; r < ROWS; r++) {
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

// Fragments of R for a warp's 32 gates and 16 units from which they are fed, step k of the sum, gates 2 m and 2 m + 1.
template <typename Tile>
__device__ __forceinline__ uint4 slstm_forward_weights(const SlstmJob<bf16> &job, const SlstmPlace &p, int k, int m) {
    int d = job.shape.d, chunk = 4 * (k / 2) + p.q, from = Tile::unit_of_chunk(chunk, p.rank) + k % 2 * 4;
    bool valid = chunk < Tile::CHUNKS && from < d && p.unit < d;  // d is a multiple of 8
    const bf16 *R = job.R + (((size_t)p.head * d + from) * 4 + 2 * m) * d + p.unit;
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
    int T = job.shape.T, NH = job.shape.NH, d = job.shape.d;
    unsigned bars = shared_address(shared);
    for (int k = threadIdx.x; k < (Tile::AT_R - Tile::AT_Y) / 4; k += Tile::THREADS)
        ((unsigned *)(shared + Tile::AT_Y))[k] = 0;
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < 2; slot++)
            for (int part = 0; part < Tile::PARTS; part++)
                barrier_init(bars + 8 * (slot * Tile::PARTS + part), part ? 1 : Tile::WARPS);
        barrier_init_done();
        for (int k = 0; k < Tile::WARPS; k++) barrier_arrive(bars);  // what enters token 0 is there
        for (int part = 1; part < Tile::PARTS; part++) {
            barrier_arrive(bars + 8 * part);
            barrier_arrive_expect(bars + 8 * (Tile::PARTS + part),
                                  (Tile::part_begin(part + 1) - Tile::part_begin(part)) * Tile::ROWS * 16);
        }
    }
    __syncthreads();
    for (int k = threadIdx.x; k < Tile::ROWS * Tile::CHUNKS * 8; k += Tile::THREADS) {
        int row = k / (Tile::CHUNKS * 8), chunk = k / 8 % Tile::CHUNKS, b = p.b0 + row;
        int unit = Tile::unit_of_chunk(chunk, p.rank) + k % 8;
        if (b >= job.shape.B || unit >= d) continue;
        size_t at = (size_t)p.head * d + unit;
        bool fresh = job.doc_start[(size_t)b * T] == 0;
        bf16 y = from_float<bf16>(fresh ? 0.0f : load_cell(job.initial, b, at).y);
        unsigned char *to = shared + Tile::AT_Y + row / 8 * Tile::Y_TILE + row % 8 * Tile::Y_PITCH;
        ((bf16 *)(to + ((chunk ^ chunk_flip(row % 8)) << 4)))[k % 8] = y;
        if (chunk < Tile::WARPS) job.saved.y_prev[(size_t)b * T * NH * d + at] = y;
    }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    slstm_cluster_forward_kernel(const __grid_constant__ SlstmJob<bf16> job) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    constexpr int CTAS = Tile::CTAS, WARPS = Tile::WARPS, ROWS = Tile::ROWS, TILES = Tile::TILES, RING = Tile::RING;
    constexpr int GROUPS = Tile::GROUPS, MAIN = Tile::MAIN, PARTS = Tile::PARTS, CHAINS = Tile::CHAINS;
    constexpr int HELD = Tile::HELD, IN_SHARED = Tile::IN_SHARED, SENDS = Tile::SENDS;
    extern __shared__ __align__(128) unsigned char slstm_cluster_shared[];
    const int B = job.shape.B, T = job.shape.T, d = job.shape.d;
    const size_t D = (size_t)job.shape.NH * d;
    const SlstmPlace p = slstm_place<Tile>(job.shape);
    const int lane = p.lane, warp = p.warp, g = p.g, q = p.q;
    const unsigned bars = shared_address(slstm_cluster_shared);
    slstm_forward_start<Tile>(job, p, slstm_cluster_shared);

    uint4 held[HELD][2];
    const unsigned slots = bars + Tile::AT_R + warp * IN_SHARED * 1024 + lane * 16;
#pragma unroll
    for (int k = 0; k < HELD; k++)
#pragma unroll
        for (int m = 0; m < 2; m++) held[k][m] = slstm_forward_weights<Tile>(job, p, IN_SHARED + k, m);
    for (int k = 0; k < IN_SHARED; k++)
        for (int m = 0; m < 2; m++)
            shared_store_vector(slots + k * 1024 + m * 512, slstm_forward_weights<Tile>(job, p, k, m));

    SlstmUnitState state[TILES][2];
    float bias[4];
    bool valid[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int b = p.b0 + 8 * i + 2 * q + e;
            valid[i][e] = b < B && p.unit < d;
            state[i][e] = slstm_empty_state();
            if (!valid[i][e] || job.doc_start[(size_t)b * T] == 0) continue;
            SlstmCell cell = load_cell(job.initial, b, (size_t)p.head * d + p.unit);
            if (cell.n != 0) state[i][e] = {cell.c, cell.n, cell.m * 1.44269504f};
        }
#pragma unroll
    for (int k = 0; k < 4; k++) bias[k] = p.unit < d ? job.bias[(p.head * 4 + k) * d + p.unit] : 0.0f;

    // Addresses. For one sequence, lane % ROWS: the chunk that the warp makes, its places in the peers, and in y (lanes
    // below ROWS) or y_prev of the next token (the next ROWS lanes).
    const int row = lane % ROWS, turn = lane / ROWS, b = p.b0 + row;
    auto chunk_at = [&](int chunk) {
        return bars + Tile::AT_Y + row / 8 * Tile::Y_TILE + row % 8 * Tile::Y_PITCH +
               ((chunk ^ chunk_flip(row % 8)) << 4);
    };
    unsigned own = chunk_at(warp);
    unsigned peer_chunk[SENDS > 0 ? SENDS : 1], peer_bar[SENDS > 0 ? SENDS : 1];
#pragma unroll
    for (int k = 0; k < SENDS; k++) {
        int slice = 1 + turn + k * (32 / ROWS), peer = (p.rank + slice) % CTAS;
        if (slice >= CTAS) slice = 1;  // not sent
        peer_chunk[k] = peer_address(chunk_at(Tile::chunk(slice, warp)), peer);
        peer_bar[k] = peer_address(bars + 8 * Tile::part(slice, warp), peer);
    }
    const bool out_valid = turn < 2 && b < B && p.first < d;
    bf16 *out = (turn ? job.saved.y_prev + D : job.y) + (size_t)b * T * D + (size_t)p.head * d + p.first;
    const unsigned flip = chunk_flip(g);
    unsigned y_even = bars + Tile::AT_Y + g * Tile::Y_PITCH + ((q ^ flip) << 4);
    unsigned y_odd = bars + Tile::AT_Y + g * Tile::Y_PITCH + (((4 + q) ^ flip) << 4);

    // The ring of pre-activations: of each token chunks [gate][sequence], lane l looks after one of a tile.
    const size_t at_gate =
        ((size_t)(p.b0 + lane % 8) * T * D + (size_t)p.head * d) * 4 + (size_t)(lane / 8) * d + p.first;
    const bf16 *x = job.x + at_gate;
    bf16 *gates_out = job.saved.gates + at_gate;
    bool gate_valid[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) gate_valid[i] = p.b0 + 8 * i + lane % 8 < B && p.first < d;
    unsigned ring = bars + Tile::AT_X + warp * Tile::X_BYTES + lane * 16;
    const unsigned docs = bars + Tile::AT_DOC + warp * Tile::DOC_BYTES;
    auto fetch = [&](int t) {  // is called for one token after the other
#pragma unroll
        for (int i = 0; i < TILES; i++)
            if (t < T && gate_valid[i])
                prefetch_vector(ring + t % RING * WARPS * Tile::X_BYTES + i * 512, x + (size_t)8 * i * T * 4 * D);
        x += 4 * D;
        prefetch_end_group();
    };
    unsigned x_now[TILES][4];  // pre-activations, two sequences a word
    auto take = [&](int t) {
#pragma unroll
        for (int i = 0; i < TILES; i++) ldmatrix_trans(x_now[i], ring + t % RING * WARPS * Tile::X_BYTES + i * 512);
    };
    fetch_resets<ROWS>(docs, job, p.b0, 1 + lane);
    for (int t = 0; t < RING; t++) fetch(t);
    prefetch_wait<RING - 1>();
    __syncwarp();
    take(0);
    SlstmResets resets;
    unsigned fresh;  // sequences that begin a document at the next token
    auto look_ahead = [&](int t) {
        if (t % 32 == 0) {
            resets = read_resets<ROWS>(docs + t / 32 % 2 * ROWS * 128, t + 1 + lane);
            fetch_resets<ROWS>(docs + (t / 32 + 1) % 2 * ROWS * 128, job, p.b0, t + 33 + lane);
        }
        fresh = resets_at(resets, t % 32);
    };
    look_ahead(0);
    asm volatile("" : "+r"(own), "+r"(y_even), "+r"(y_odd), "+r"(ring));  // not to be computed again in each step
    cluster_barrier();  // the barriers and y of all blocks are set up, and all have read the initial states

    float y[TILES][2];
#pragma unroll 1
    for (int t = 0; t < T; t++) {
        const int slot = t & 1, parity = t >> 1 & 1;
        const unsigned next = (slot ^ 1) * Tile::Y_SLOT;
        unsigned own_next = own + next;  // where the next token's y goes
        asm volatile("" : "+r"(own_next));
        float sum[TILES][2][CHAINS][4];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int k = 0; k < CHAINS * 4; k++) {
                    float2 two = unpack_two(x_now[i][2 * m + k % 4 / 2]);
                    sum[i][m][k / 4][k % 4] = k < 4 ? (k % 2 ? two.y : two.x) + bias[2 * m + k / 2] : 0.0f;
                }

        auto wait_for = [&](int group) {  // of which part the first chunk lies in this group
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                if (Tile::part_begin(part) / 4 == group) barrier_wait(bars + 8 * (slot * PARTS + part), parity);
        };
        auto load = [&](int group, int i) {
            return shared_load_vector((group % 2 ? y_odd : y_even) + slot * Tile::Y_SLOT + i * Tile::Y_TILE +
                                      group / 2 * 128);
        };
        auto multiply = [&](int group, int m, const uint4(&v)[TILES]) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int k = 2 * group + h;
                uint4 w = k < IN_SHARED ? shared_load_vector(slots + k * 1024 + m * 512)
                                        : held[k < IN_SHARED ? 0 : k - IN_SHARED][m];
#pragma unroll
                for (int i = 0; i < TILES; i++)
                    mma_16x8x16(sum[i][m][k % CHAINS], w, h ? v[i].z : v[i].x, h ? v[i].w : v[i].y);
            }
        };
#pragma unroll
        for (int group = 0; group < MAIN; group++) {
            uint4 v[TILES];
            wait_for(group);
#pragma unroll
            for (int i = 0; i < TILES; i++) v[i] = load(group, i);
            multiply(group, 0, v);
            multiply(group, 1, v);
        }
        uint4 v[GROUPS - MAIN][TILES];  // the rest gate by gate: those of which most is made come first
#pragma unroll
        for (int group = MAIN; group < GROUPS; group++) {
            wait_for(group);
#pragma unroll
            for (int i = 0; i < TILES; i++) v[group - MAIN][i] = load(group, i);
        }
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int group = MAIN; group < GROUPS; group++) multiply(group, m, v[group - MAIN]);

        float gates[TILES][2][4], rf[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float r[4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float(*s)[4] = sum[i][k / 2];
                    int at = k % 2 * 2 + e;
                    r[k] = CHAINS == 4 ? (s[0][at] + s[1][at]) + (s[2 % CHAINS][at] + s[3 % CHAINS][at])
                                       : s[0][at] + s[1][at];
                }
                rf[i][e] = r[1];
                y[i][e] = slstm_unit_step(&state[i][e], r, gates[i][e]);
            }

        // The next token's y: to the block's own rows, from there to the peers.
        const bool more = t + 1 < T;
        unsigned packed[TILES];
#pragma unroll
        for (int i = 0; i < TILES; i++) packed[i] = pack_two(y[i][0], y[i][1]);
        if (fresh) {  // a document begins: its first token gets zeros, and y of this one is written here
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (fresh >> (8 * i + 2 * q + e) & 1) {
                        if (valid[i][e])
                            job.y[((size_t)(p.b0 + 8 * i + 2 * q + e) * T + t) * D + (size_t)p.head * d + p.unit] =
                                from_float<bf16>(y[i][e]);
                        state[i][e] = slstm_empty_state();
                        packed[i] &= e ? 0x0000ffffu : 0xffff0000u;
                    }
        }
        if (TILES == 1) matrix_store_transposed(own_next, packed[0]);
        else matrix_pair_store_transposed(own_next, packed[0], packed[TILES - 1]);
        __syncwarp();
        const uint4 chunk = shared_load_vector(own_next);
        if (lane == 0) barrier_arrive(bars + 8 * (slot ^ 1) * PARTS);
#pragma unroll
        for (int k = 0; k < SENDS; k++)
            if (more && turn + k * (32 / ROWS) < CTAS - 1)
                send_vector(peer_chunk[k] + next, chunk, peer_bar[k] + 8 * (slot ^ 1) * PARTS);
        if (PARTS > 1 && warp == 0 && lane == 0) {  // for token t + 2
#pragma unroll
            for (int part = 1; part < PARTS; part++)
                barrier_arrive_expect(bars + 8 * (slot * PARTS + part),
                                      (Tile::part_begin(part + 1) - Tile::part_begin(part)) * ROWS * 16);
        }

        if (out_valid && (turn ? more : !(fresh >> row & 1))) *(uint4 *)out = chunk;
        out += D;
        // What is saved takes the place of the pre-activations, and turns round there.
        const unsigned here = ring + t % RING * WARPS * Tile::X_BYTES;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int e = 0; e < 2; e++)
                gates[i][e][1] = (rf[i][e] < 0 ? 1 : gates[i][e][1]) * reciprocal_fast(1 + gates[i][e][1]);
            matrices_store_transposed(
                here + i * 512, pack_two(gates[i][0][0], gates[i][1][0]), pack_two(gates[i][0][1], gates[i][1][1]),
                pack_two(gates[i][0][2], gates[i][1][2]), pack_two(gates[i][0][3], gates[i][1][3]));
        }
        prefetch_wait<RING - 2>();
        __syncwarp();
        take(t + 1);
#pragma unroll
        for (int i = 0; i < TILES; i++)
            if (gate_valid[i]) *(uint4 *)(gates_out + (size_t)8 * i * T * 4 * D) = shared_load_vector(here + i * 512);
        gates_out += 4 * D;
        fetch(t + RING);
        look_ahead(t + 1);
    }
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (valid[i][e])
                store_cell(job.final, p.b0 + 8 * i + 2 * q + e, (size_t)p.head * d + p.unit,
                           {y[i][e], state[i][e].c, state[i][e].n, state[i][e].m * 0.693147181f});
                // A block may leave while its peers still work: it has received all that is ever sent to it.
#endif
}

// ----------------------------------------------------------------------------------------------------------------
// Backward

// Fragment of R^T for the warp's panel i and step k of the sum over the block's gates. Row r of a panel is its unit r,
// but of rows r and r + 8 every other pair changes places, so that the receivers' loads share no banks.
template <typename Tile>
__device__ __forceinline__ uint4 slstm_backward_weights(const SlstmJob<bf16> &job, const SlstmPlace &p, int i, int k) {
    int d = job.shape.d, chunk = 4 * (k / 2) + p.q, gate = chunk / Tile::WARPS;
    int to = p.rank * Tile::U + chunk % Tile::WARPS * 8 + k % 2 * 4, swap = p.g >> 1 & 1;
    int from = (p.rank + 2 * (i + 1) - p.warp % 2) % Tile::CTAS * Tile::U + p.warp / 2 * 16 + p.g;
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
        int at = 4 * k % Tile::TRACE_TILE;
        bool is_o = 4 * k < Tile::AT_BACK_DOC - Tile::AT_TRACE && at >= 384 && at < Tile::AT_DY;
        ((unsigned *)(shared + Tile::AT_TRACE))[k] = is_o ? 0x3f803f80u : 0;
    }
    if (threadIdx.x == 0 && Tile::CTAS > 1) {
        for (int k = 0; k < 2 * Tile::HALF; k++) barrier_init(bars + 8 * k, 2);
        barrier_init_done();
        for (int k = 0; k < 2 * Tile::HALF; k++)
            barrier_arrive_expect(bars + 8 * k, (Tile::CTAS - 1) * Tile::TILES * 512);
    }
    __syncthreads();
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    slstm_cluster_backward_kernel(const __grid_constant__ SlstmJob<bf16> job) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    constexpr int CTAS = Tile::CTAS, WARPS = Tile::WARPS, ROWS = Tile::ROWS, TILES = Tile::TILES, HALF = Tile::HALF;
    constexpr int PANELS = Tile::PANELS, STEPS = Tile::BACK_STEPS, HELD = Tile::BACK_HELD, RING = Tile::BACK_RING;
    constexpr int IN_SHARED = Tile::BACK_SHARED, CHAINS = Tile::BACK_CHAINS;
    extern __shared__ __align__(128) unsigned char slstm_cluster_shared[];
    const int B = job.shape.B, T = job.shape.T, d = job.shape.d;
    const size_t D = (size_t)job.shape.NH * d;
    const SlstmPlace p = slstm_place<Tile>(job.shape);
    const int lane = p.lane, warp = p.warp, g = p.g, q = p.q;
    const unsigned bars = shared_address(slstm_cluster_shared);
    slstm_backward_start<Tile>(slstm_cluster_shared);

    uint4 held[HELD];  // fragment i * STEPS + k is of panel i and step k; the first ones are in shared memory
    const unsigned slots = bars + Tile::AT_BACK_R + warp * IN_SHARED * 512 + lane * 16;
#pragma unroll
    for (int k = 0; k < HELD; k++)
        held[k] = slstm_backward_weights<Tile>(job, p, (IN_SHARED + k) / STEPS, (IN_SHARED + k) % STEPS);
    for (int k = 0; k < IN_SHARED; k++)
        shared_store_vector(slots + k * 512, slstm_backward_weights<Tile>(job, p, k / STEPS, k % STEPS));

    // Addresses. dr: what lane l stores and writes to dx is gate l / 8 of sequence l % 8.
    const int row = lane % 8, gate = lane / 8;
    unsigned own = bars + Tile::AT_D + row * Tile::D_PITCH + (((gate * WARPS + warp) ^ chunk_flip(row)) << 4);
    const unsigned flip = chunk_flip(g);
    unsigned d_even = bars + Tile::AT_D + g * Tile::D_PITCH + ((q ^ flip) << 4);
    unsigned d_odd = bars + Tile::AT_D + g * Tile::D_PITCH + (((4 + q) ^ flip) << 4);
    // Sums: a panel's messages lie by lane; a message holds two sequences of units g and g + 8 of the panel.
    unsigned sums = bars + Tile::AT_SUMS + warp / 2 * 512 + lane * 16;
    const unsigned sums_half = 8 * (warp % 2 ^ (g >> 1 & 1));
    unsigned peer_sums[PANELS], peer_bar[PANELS];
#pragma unroll
    for (int i = 0; i < PANELS; i++) {
        int slice = 2 * (i + 1) - warp % 2, peer = (p.rank + slice) % CTAS;
        peer_sums[i] = peer_address(sums + slice % CTAS * Tile::SUMS_SLICE, peer);
        peer_bar[i] = peer_address(bars + 8 * (warp / 2), peer);
    }

    // The ring of what the forward pass saved: of each token chunks [gate][sequence], then dy (lanes below 8) and
    // y_prev (the next 8) of 8 sequences.
    const size_t last = ((size_t)(p.b0 + row) * T + T - 1) * D + (size_t)p.head * d,
                 last_gate = 4 * last + gate * (size_t)d;
    const bf16 *gates = job.saved.gates + last_gate + p.first;
    const bf16 *other = (gate == 0 ? job.dy : job.saved.y_prev) + last + p.first;
    bf16 *dx = job.dx + last_gate + p.first;
    bool row_valid[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) row_valid[i] = p.b0 + 8 * i + row < B && p.first < d;
    unsigned ring = bars + Tile::AT_TRACE + warp * Tile::TRACE_BYTES + lane * 16;
    const unsigned docs = bars + Tile::AT_BACK_DOC + warp * Tile::DOC_BYTES;
    auto fetch = [&](int k) {  // of token T - 1 - k; is called for one token after the other
        const unsigned to = ring + k % RING * WARPS * Tile::TRACE_BYTES;
#pragma unroll
        for (int i = 0; i < TILES; i++)
            if (k < T && row_valid[i]) {
                prefetch_vector(to + i * Tile::TRACE_TILE, gates + (size_t)8 * i * T * 4 * D);
                if (gate < 2) prefetch_vector(to + i * Tile::TRACE_TILE + Tile::AT_DY, other + (size_t)8 * i * T * D);
            }
        gates -= 4 * D;
        other -= D;
        prefetch_end_group();
    };
    unsigned now[TILES][4], next[TILES][4];  // gates of two sequences a word
    auto take = [&](int k) {
#pragma unroll
        for (int i = 0; i < TILES; i++)
            ldmatrix_trans(next[i], ring + k % RING * WARPS * Tile::TRACE_BYTES + i * Tile::TRACE_TILE);
    };
    fetch_resets<ROWS>(docs, job, p.b0, T - lane);
    for (int k = 0; k < RING; k++) fetch(k);
    prefetch_wait<RING - 1>();
    __syncwarp();
    take(0);

    float dh[TILES][2], dL[TILES][2], dbias[4] = {0, 0, 0, 0}, dy_back[TILES][2], h_initial[TILES][2];
    SlstmResets resets = {0, 0};
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int b = p.b0 + 8 * i + 2 * q + e;
            SlstmCell cell = {};
            if (b < B && p.unit < d) cell = load_cell(job.initial, b, (size_t)p.head * d + p.unit);
            h_initial[i][e] = cell.n != 0 ? cell.c / cell.n : 0.0f;
            dh[i][e] = dL[i][e] = dy_back[i][e] = 0;
        }
    unsigned bar = bars + 8 * (warp / 2);
    // A 0 that the compiler does not know. It lets products wait for earlier ones, whose sums are sent meanwhile.
    const unsigned zero = (unsigned)job.shape.NH >> 31;
    asm volatile("" : "+r"(own), "+r"(d_even), "+r"(d_odd), "+r"(sums), "+r"(ring), "+r"(bar));  // to be kept
    if (CTAS > 1) cluster_barrier();  // the barriers of all blocks are set up

#pragma unroll 1
    for (int k = 0; k < T; k++) {
        const int t = T - 1 - k, slot = k & 1;
        if (k % 32 == 0) {
            resets = read_resets<ROWS>(docs + k / 32 % 2 * ROWS * 128, T - k - lane);
            fetch_resets<ROWS>(docs + (k / 32 + 1) % 2 * ROWS * 128, job, p.b0, T - k - 32 - lane);
        }
        const unsigned cut = resets_at(resets, k % 32);  // nothing flows back from a token that begins a document
        prefetch_wait<RING - 2>();
        __syncwarp();
        SlstmBack back[TILES][2];
        float2 dy_here[TILES], y_prev[TILES];
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            unsigned two[2];
            matrix_pair_load_transposed(
                two, ring + k % RING * WARPS * Tile::TRACE_BYTES + i * Tile::TRACE_TILE + Tile::AT_DY);
            dy_here[i] = unpack_two(two[0]);
            y_prev[i] = unpack_two(two[1]);
#pragma unroll
            for (int m = 0; m < 4; m++) now[i][m] = next[i][m];
        }
        take(k + 1);
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float v[4], o_prev;  // gates; the last one also of the token before
#pragma unroll
                for (int m = 0; m < 4; m++) v[m] = e ? unpack_two(now[i][m]).y : unpack_two(now[i][m]).x;
                o_prev = e ? unpack_two(next[i][3]).y : unpack_two(next[i][3]).x;
                float h_prev = (e ? y_prev[i].y : y_prev[i].x) * reciprocal_fast(o_prev);
                back[i][e] = slstm_back(v[0], v[1], v[2], v[3], t == 0 ? h_initial[i][e] : h_prev, dL[i][e]);
                asm volatile(""  // made now, not after the wait
                             : "+f"(back[i][e].to_i), "+f"(back[i][e].input_dL), "+f"(back[i][e].kept_dL),
                               "+f"(back[i][e].to_z), "+f"(back[i][e].to_o));
            }
        fetch(k + RING);

        if (CTAS > 1 && k > 0) {
            const unsigned from = sums + (slot ^ 1) * Tile::SUMS_SLOT + sums_half;
            barrier_wait(bar + (slot ^ 1) * 8 * HALF, (k - 1) >> 1 & 1);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                float2 part[CTAS];
#pragma unroll
                for (int s = 0; s < CTAS; s++)
                    part[s] = shared_load_two(from + s * Tile::SUMS_SLICE + i * Tile::SUMS_TILE);
#pragma unroll
                for (int s = 1; s < CTAS; s++) {
                    part[0].x += part[s].x;
                    part[0].y += part[s].y;
                }
                dy_back[i][0] = part[0].x;
                dy_back[i][1] = part[0].y;
            }
        }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            float dr[2][4];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float all = (e ? dy_here[i].y : dy_here[i].x) + (cut >> (8 * i + 2 * q + e) & 1 ? 0.0f : dy_back[i][e]);
                slstm_finish_back(back[i][e], all, dr[e], &dh[i][e], &dL[i][e]);
#pragma unroll
                for (int m = 0; m < 4; m++) dbias[m] += dr[e][m];
            }
            matrices_store_transposed(own + slot * Tile::D_SLOT + i * Tile::D_TILE, pack_two(dr[0][0], dr[1][0]),
                                      pack_two(dr[0][1], dr[1][1]), pack_two(dr[0][2], dr[1][2]),
                                      pack_two(dr[0][3], dr[1][3]));
        }
        __syncthreads();  // dr is complete; of two steps ago it was read before the last step's barrier
        if (CTAS > 1 && k > 0 && warp % 2 == 0 && lane == 0)  // for the sums of step k + 1
            barrier_arrive_expect(bar + (slot ^ 1) * 8 * HALF, (CTAS - 1) * TILES * 512);

        if (t > 0) {
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                uint4 v[WARPS];
#pragma unroll
                for (int group = 0; group < WARPS; group++)
                    v[group] = shared_load_vector((group % 2 ? d_odd : d_even) + slot * Tile::D_SLOT +
                                                  i * Tile::D_TILE + group / 2 * 128);
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
                    float sum[CHAINS][4] = {};
#pragma unroll
                    for (int step = 0; step < STEPS; step++) {
                        const int f = panel * STEPS + step;
                        uint4 w = f < IN_SHARED ? shared_load_vector(slots + f * 512)
                                                : held[f < IN_SHARED ? 0 : f - IN_SHARED];
                        const uint4 &part = v[step / 2];
                        mma_16x8x16(sum[step % CHAINS], w, step % 2 ? part.z : part.x, step % 2 ? part.w : part.y);
                    }
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        total[e] = CHAINS == 4 ? (sum[0][e] + sum[1][e]) + (sum[2 % CHAINS][e] + sum[3 % CHAINS][e])
                                               : sum[0][e] + sum[1][e];
                    if constexpr (CTAS == 1) {
                        dy_back[i][0] = total[0];
                        dy_back[i][1] = total[1];
                    } else {
                        uint4 message = make_uint4(__float_as_uint(total[0]), __float_as_uint(total[1]),
                                                   __float_as_uint(total[2]), __float_as_uint(total[3]));
                        const unsigned at = slot * Tile::SUMS_SLOT + i * Tile::SUMS_TILE;
                        if (panel == PANELS - 1 && warp % 2 == 0) shared_store_vector(sums + at, message);
                        else send_vector(peer_sums[panel] + at, message, peer_bar[panel] + slot * 8 * HALF);
                    }
                }
            }
            if (CTAS > 1 && warp % 2 == 0) {
                __syncwarp();
                if (lane == 0) barrier_arrive(bar + slot * 8 * HALF);
            }
        }
#pragma unroll
        for (int i = 0; i < TILES; i++)
            if (row_valid[i])
                *(uint4 *)(dx + (size_t)8 * i * T * 4 * D) =
                    shared_load_vector(own + slot * Tile::D_SLOT + i * Tile::D_TILE);
        dx -= 4 * D;
    }
    // Sums of dr over the tokens and sequences: first the thread's own, then over q.
#pragma unroll
    for (int m = 0; m < 4; m++) {
        dbias[m] += __shfl_xor_sync(0xffffffffu, dbias[m], 1);
        dbias[m] += __shfl_xor_sync(0xffffffffu, dbias[m], 2);
        if (q == 0 && p.unit < d)
            job.partial[(((size_t)p.group * job.shape.NH + p.head) * 4 + m) * d + p.unit] = dbias[m];
    }
#endif
}

// ----------------------------------------------------------------------------------------------------------------
// Launchers

typedef struct {
    int ctas, warps, rows;
    struct {
        const void *kernel;
        int bytes;  // shared memory a block
        float us;   // microseconds a step on an H100, one block a multiprocessor
    } pass[2];      // forward, backward
} SlstmClusterKernels;

template <typename Tile>
static SlstmClusterKernels slstm_cluster_kernels(float forward_us, float backward_us) {
    return {Tile::CTAS,
            Tile::WARPS,
            Tile::ROWS,
            {{(const void *)slstm_cluster_forward_kernel<Tile>, Tile::FORWARD_BYTES, forward_us},
             {(const void *)slstm_cluster_backward_kernel<Tile>, Tile::BACKWARD_BYTES, backward_us}}};
}

enum { SLSTM_CLUSTERS = 7, SLSTM_ANY = -1, SLSTM_NO_CLUSTER = -2 };

static const SlstmClusterKernels *slstm_cluster_table(void) {
    static const SlstmClusterKernels table[SLSTM_CLUSTERS] = {
        slstm_cluster_kernels<SlstmCluster<1, 8, 8>>(0.40f, 0.40f),
        slstm_cluster_kernels<SlstmCluster<4, 4, 8>>(0.58f, 0.55f),
        slstm_cluster_kernels<SlstmCluster<6, 4, 8>>(0.67f, 0.61f),
        slstm_cluster_kernels<SlstmCluster<8, 4, 8>>(0.78f, 0.74f),
        slstm_cluster_kernels<SlstmCluster<4, 8, 16>>(2.09f, 2.11f),
        slstm_cluster_kernels<SlstmCluster<8, 6, 8>>(1.14f, 1.19f),
        slstm_cluster_kernels<SlstmCluster<8, 8, 8>>(1.83f, 1.90f),
    };
    return table;
}

// For tests and benchmarks: SLSTM_ANY, SLSTM_NO_CLUSTER, or the only row of the table to be used.
static int slstm_cluster_choice = SLSTM_ANY;

typedef struct {
    const SlstmClusterKernels *kernels;  // NULL: no cluster for this shape, or on this chip
    int tasks, active, shared;           // clusters to run, and at once; bytes of shared memory a block
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
    config->blockDim = dim3(32 * plan->kernels->warps);
    config->dynamicSmemBytes = plan->shared;
    config->attrs = cluster;
    config->numAttrs = 1;
}

// Clusters that run at once; 0 if the kernel's blocks do not fit on this chip.
static int slstm_active_clusters(const SlstmClusterPlan *plan, int pass) {
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    const void *kernel = plan->kernels->pass[pass].kernel;
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
        SlstmClusterPlan plan = {table + row, s->NH * ceil_div(s->B, table[row].rows)};
        int units = 8 * table[row].ctas * table[row].warps, bytes = table[row].pass[backward].bytes;
        if (units < s->d || (slstm_cluster_choice >= 0 && slstm_cluster_choice != row)) continue;
        for (int alone = 1; alone >= 0; alone--) {
            plan.shared = alone && bytes < ALONE ? (int)ALONE : bytes;
            int *known = &active[row][backward][alone];
            if (*known == UNKNOWN) *known = slstm_active_clusters(&plan, backward);
            plan.active = *known;
            if (plan.active == 0) continue;
            plan.us = table[row].pass[backward].us * ceil_div(plan.tasks, plan.active) * (alone ? 1.0f : SHARED);
            if (!best.kernels || plan.us < best.us) best = plan;
        }
    }
    return best;
}

static void slstm_cluster_launch(const SlstmClusterPlan *plan, int backward, const SlstmJob<bf16> *job,
                                 cudaStream_t stream) {
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    void *arguments[] = {(void *)job};
    slstm_cluster_config(&config, &cluster, plan);
    config.stream = stream;
    CUDA_CHECK(cudaLaunchKernelExC(&config, plan->kernels->pass[backward].kernel, arguments));
}

#endif
