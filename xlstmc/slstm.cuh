// slstm.cuh: the sLSTM cell on the GPU, one persistent kernel a layer and direction (formulas: doc/math.md, section 5).
//
// A head of a group of `rows` sequences is a task; a team of blocks carries a task through all time steps. Each block
// of the team owns `units` hidden units with all four gates: their c, n, m live in registers, and the part of R that it
// multiplies with in registers, what does not fit in shared memory, what does not fit there in L2. What a step hands
// over, the outputs y forward and sums of R^T dr backward, goes through an exchange buffer of 8-byte words, each with 4
// bytes of payload and the number of the step. A word is written and read whole, so a reader that finds the right
// number has the payload: no fences, no counters, one trip through L2. A team of one block keeps the buffer in shared
// memory.
//
// The buffer has two halves for even and odd steps. That is enough: a block sends step s + 1 only after it received all
// of step s, which every peer sent only after it had received all of step s - 1, whose half is now overwritten.
// Numbers count from 1 in each launch, from a buffer of zeros. All blocks must run at once: launches are cooperative.
// Everything else that threads of a block share (y_all, products, dr_all, bias sums) is handed over by __syncthreads.
// racecheck looks for barriers only, so it reports every word of a team of one block, whose buffer is in shared memory.
//
// Bytes a token and unit: forward 4 F in, 6 F out; backward 6 F in, 4 F out (F = 2 or 4). The kernels are
// bound by the latency of a step, not by these.
//
// In bf16, where the GPU has clusters of blocks and one holds the head, the kernels of slstm_hopper.cuh run instead.
#ifndef XLSTMC_SLSTM_CUH
#define XLSTMC_SLSTM_CUH

#include "slstm_cell.cuh"
#include "slstm_hopper.cuh"

typedef struct {  // may be shared by all layers whose kernels do not run at the same time
    uint64_t *exchange;
} SlstmScratch;

enum { SLSTM_THREADS = 256, SLSTM_WARPS = SLSTM_THREADS / 32 };

// How a block of U units and BC sequences divides its work. A pair is a unit of a sequence.
template <typename Format, int Units, int Rows>
struct SlstmTile {
    typedef Format F;
    static constexpr int U = Units, BC = Rows, PAIRS = U * BC;
    static constexpr int SHARE = PAIRS < SLSTM_THREADS ? SLSTM_THREADS / PAIRS : 1;  // threads a pair: lanes l, l + 16
    static constexpr int P = PAIRS * SHARE / SLSTM_THREADS;                          // pairs a thread
    static constexpr int PAYLOAD = 4 / sizeof(F);                                    // outputs a word
    // Fragments of R, 32 x 16 each. A warp holds up to HELD of them in registers: 64 a thread, fewer beside 4 pairs.
    static constexpr int HELD = (P < 4 ? 16 : sizeof(F) == 2 ? 8 : 4) / sizeof(F);
    static constexpr int SLOT = sizeof(F) * 32;  // uint4 a fragment
    // Forward, [4U gates] x [K units]: a warp takes the gates of 8 units (32 rows) and one of SPLITS parts of K.
    static constexpr int PANELS = U / 8, SPLITS = SLSTM_WARPS / PANELS;
    static constexpr int ROW = 4 * U + 4;  // a row of products: + 4 avoids bank conflicts
    // Backward, [K units] x [4U gates]: a warp takes every 8th panel of 32 units, and all of the 4U gates.
    static constexpr int STEPS = 4 * U / 16, HELD_PANELS = HELD / STEPS;
    static constexpr int GATES = 4 * U + 8;  // a row of dr

    static_assert(SHARE == 1 || (SHARE == 2 && U == 16), "both threads of a pair must be in one warp");
    static_assert(PANELS <= SLSTM_WARPS && BC % SLSTM_WARPS == 0, "");

    // The i-th pair of this thread is unit pair % U of sequence pair / U: the same unit for all i. Neighbours in a warp
    // have neighbouring units.
    static __device__ int pair(int i) {
        int tid = threadIdx.x;
        return SHARE == 2 ? tid / 32 * 16 + tid % 16 : i * SLSTM_THREADS + tid;
    }
    static __device__ int share() { return SHARE == 2 ? threadIdx.x % 32 / 16 : 0; }
};

// ----------------------------------------------------------------------------------------------------------------
// Exchange. Addresses are generic: the buffer is in global or in shared memory.

__device__ inline void send_word(uint64_t *to, uint32_t payload, uint32_t step) {
    asm volatile("st.relaxed.gpu.b64 [%0], %1;" ::"l"(to), "l"((uint64_t)step << 32 | payload) : "memory");
}
__device__ inline uint64_t peek_word(const uint64_t *from) {
    uint64_t word;
    asm volatile("ld.relaxed.gpu.b64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}
__device__ inline ulonglong2 peek_two_words(const uint64_t *from) {  // each is read whole; the two not at once
    ulonglong2 words;
    asm volatile("ld.relaxed.gpu.v2.b64 {%0, %1}, [%2];" : "=l"(words.x), "=l"(words.y) : "l"(from) : "memory");
    return words;
}
__device__ inline int is_late(uint64_t word, uint32_t step) { return (uint32_t)(word >> 32) != step; }

// Outputs [BC, K] of the team to shared memory [BC, ld], each as soon as it is there. All loads are on their way at
// once and all are repeated while one is late, so that the wait ends one trip through L2 after the last arrival.
template <typename Tile>
__device__ inline void receive_outputs(typename Tile::F *to, int ld, const uint64_t *from, int K, uint32_t step) {
    constexpr int ROWS = Tile::BC / SLSTM_WARPS, COLUMNS = 8 / ROWS, PER = 2 * Tile::PAYLOAD;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = K / PER;
    for (int first = lane; first < width; first += 32 * COLUMNS) {
        ulonglong2 words[ROWS][COLUMNS];
        int late;
        do {
            late = 0;
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++)
                    if (first + 32 * c < width)
                        words[r][c] = peek_two_words(from + 2 * ((warp + SLSTM_WARPS * r) * width + first + 32 * c));
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++)
                    if (first + 32 * c < width) late |= is_late(words[r][c].x, step) | is_late(words[r][c].y, step);
        } while (late);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                if (first + 32 * c < width)
                    *(uint2 *)(to + (warp + SLSTM_WARPS * r) * ld + PER * (first + 32 * c)) =
                        make_uint2((uint32_t)words[r][c].x, (uint32_t)words[r][c].y);
    }
}

// The gradients that the team sent to this thread's pairs, [ctas][BC, U], added in order of the senders (with two
// threads a pair: even ones, then odd ones).
template <typename Tile>
__device__ inline void receive_gradients(float *dy, const uint64_t *from, int ctas, uint32_t step) {
    constexpr int P = Tile::P, SENDERS = 16 / P, SHARE = Tile::SHARE;
#pragma unroll
    for (int i = 0; i < P; i++) dy[i] = 0;
    for (int first = Tile::share(); first < ctas; first += SHARE * SENDERS) {
        uint64_t words[P][SENDERS];
        int late;
        do {
            late = 0;
#pragma unroll
            for (int i = 0; i < P; i++)
#pragma unroll
                for (int k = 0; k < SENDERS; k++)
                    if (first + SHARE * k < ctas)
                        words[i][k] = peek_word(from + (first + SHARE * k) * Tile::PAIRS + Tile::pair(i));
#pragma unroll
            for (int i = 0; i < P; i++)
#pragma unroll
                for (int k = 0; k < SENDERS; k++)
                    if (first + SHARE * k < ctas) late |= is_late(words[i][k], step);
        } while (late);
#pragma unroll
        for (int i = 0; i < P; i++)
#pragma unroll
            for (int k = 0; k < SENDERS; k++)
                if (first + SHARE * k < ctas) dy[i] += __uint_as_float((uint32_t)words[i][k]);
    }
    __syncwarp();
    if (SHARE == 2) dy[0] += __shfl_xor_sync(0xffffffffu, dy[0], 16);
}

// ----------------------------------------------------------------------------------------------------------------
// Products of a warp: 32 rows x BC columns. The left factor comes in fragments of 32 x 16, 16 elements a lane: bf16 as
// mma.sync wants them (two tiles of 16 rows), fp32 one row a lane.

template <typename F>
struct Fragment {
    uint4 part[sizeof(F)];
};

// element(row, k) is called for the lane's elements.
template <typename F, typename Element>
__device__ inline Fragment<F> make_fragment(Element element) {
    int lane = threadIdx.x % 32;
    union {
        F x[16];
        Fragment<F> fragment;
    } u;
#pragma unroll
    for (int e = 0; e < 16; e++)
        if constexpr (sizeof(F) == 2)
            u.x[e] = element(e / 8 * 16 + e / 2 % 2 * 8 + lane / 4, e / 4 % 2 * 8 + lane % 4 * 2 + e % 2);
        else u.x[e] = element(lane, e);
    return u.fragment;
}
template <typename F>
__device__ inline void store_fragment(uint4 *slot, const Fragment<F> &f) {  // slot: [sizeof(F), 32]
#pragma unroll
    for (int k = 0; k < (int)sizeof(F); k++) slot[32 * k + threadIdx.x % 32] = f.part[k];
}
template <typename F>
__device__ inline Fragment<F> load_fragment(const uint4 *slot) {
    Fragment<F> f;
#pragma unroll
    for (int k = 0; k < (int)sizeof(F); k++) f.part[k] = slot[32 * k + threadIdx.x % 32];
    return f;
}

// acc += a times the 16 x BC whose columns start at b, ld apart.
template <int BC>
__device__ inline void multiply(float *acc, const Fragment<bf16> &a, const bf16 *b, int ld) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < BC / 8; n++) {
        const bf16 *column = b + (8 * n + lane / 4) * ld + lane % 4 * 2;
        uint32_t b0 = *(const uint32_t *)column, b1 = *(const uint32_t *)(column + 8);
        mma(*(float(*)[4])(acc + 4 * n), a.part[0], b0, b1);
        mma(*(float(*)[4])(acc + BC / 2 + 4 * n), a.part[1], b0, b1);
    }
}
template <int BC>
__device__ inline void multiply(float *acc, const Fragment<float> &a, const float *b, int ld) {
#pragma unroll
    for (int n = 0; n < BC; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float4 v = *(const float4 *)(b + n * ld + 4 * k);
            acc[n] = fmaf(__uint_as_float(a.part[k].x), v.x, acc[n]);
            acc[n] = fmaf(__uint_as_float(a.part[k].y), v.y, acc[n]);
            acc[n] = fmaf(__uint_as_float(a.part[k].z), v.z, acc[n]);
            acc[n] = fmaf(__uint_as_float(a.part[k].w), v.w, acc[n]);
        }
    asm volatile("" ::: "memory");  // or else the loads of many calls are moved to the front, and registers spill
}
// use(row, column, sum) for each of the lane's BC results.
template <typename F, int BC, typename Use>
__device__ inline void for_each_result(const float *acc, Use use) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < BC; k++)
        if constexpr (sizeof(F) == 2) {
            int tile = k / (BC / 2), n = k % (BC / 2) / 4, e = k % 4;
            use(16 * tile + lane / 4 + e / 2 * 8, 8 * n + lane % 4 * 2 + e % 2, acc[k]);
        } else use(lane, k, acc[k]);
}

// R[from, gate, to] of a head, zero where there is no such unit.
template <typename F>
__device__ inline F recurrent_weight(const F *R, int d, int from, int gate, int to) {
    return from < d && to < d ? R[((size_t)from * 4 + gate) * d + to] : from_float<F>(0.0f);
}

struct SlstmPair {
    int b, unit, valid;  // sequence, unit of the head; whether there are such
};
template <typename Tile>
__device__ inline SlstmPair slstm_pair(int i, const SlstmShape &s, int head, int b0) {
    SlstmPair p = {b0 + Tile::pair(i) / Tile::U, (int)blockIdx.x * Tile::U + Tile::pair(i) % Tile::U, 0};
    p.valid = p.b < s.B && p.unit < s.d;
    return p;
}

// ----------------------------------------------------------------------------------------------------------------
// Forward

// exp, log(1 + x) for 0 <= x <= 1, tanh and division. In bf16 mode those of the hardware: absolute errors of 1e-7 in
// numbers whose inputs were rounded to 3 digits.
template <typename F>
__device__ inline float slstm_exp(float x) {
    return sizeof(F) == 2 ? __expf(x) : expf(x);
}
template <typename F>
__device__ inline float slstm_divide(float x, float y) {
    return sizeof(F) == 2 ? __fdividef(x, y) : x / y;
}
template <typename F>
__device__ inline float slstm_log1p(float x) {
    return sizeof(F) == 2 ? __logf(1 + x) : log1pf(x);
}
template <typename F>
__device__ inline float slstm_tanh(float x) {
    return sizeof(F) == 2 ? 1 - __fdividef(2.0f, 1 + __expf(2 * x)) : tanhf(x);
}

// One step of one unit: r are the pre-activations; gates are as they are saved.
template <typename F>
__device__ inline void slstm_step(SlstmCell *s, const float *r, float *gates) {
    float e = slstm_exp<F>(-fabsf(r[1]));
    float lf = (r[1] < 0 ? r[1] : 0) - slstm_log1p<F>(e);  // log sig(r_f)
    float lfm = s->m + lf;
    float m = s->n == 0 ? r[0] : (r[0] > lfm ? r[0] : lfm);
    float I = slstm_exp<F>(r[0] - m), forget = s->n == 0 ? 0 : slstm_exp<F>((s->m - m) + lf), kept = forget * s->n;
    gates[1] = slstm_divide<F>(r[1] < 0 ? 1 : e, 1 + e);
    gates[2] = slstm_tanh<F>(r[2]);
    gates[3] = slstm_divide<F>(1.0f, 1 + slstm_exp<F>(-r[3]));
    s->c = forget * s->c + I * gates[2];
    s->n = kept + I;
    s->m = m;
    s->y = slstm_divide<F>(gates[3] * s->c, s->n);
    gates[0] = slstm_share(slstm_divide<F>(I, s->n), slstm_divide<F>(kept, s->n));
}

// Sends y of the thread's pairs to the team: words [BC, K] in fp32, [BC, K / 2] in bf16, where even units send for two.
template <typename Tile>
__device__ inline void send_outputs(uint64_t *to, const SlstmCell *cell, int K, uint32_t step) {
#pragma unroll
    for (int i = 0; i < Tile::P; i++) {
        int unit = blockIdx.x * Tile::U + Tile::pair(i) % Tile::U, row = Tile::pair(i) / Tile::U;
        if constexpr (Tile::PAYLOAD == 2) {
            float next = __shfl_down_sync(0xffffffffu, cell[i].y, 1);
            uint32_t low = __bfloat16_as_ushort(from_float<bf16>(cell[i].y));
            uint32_t high = __bfloat16_as_ushort(from_float<bf16>(next));
            if (unit % 2 == 0 && Tile::share() == 0) send_word(to + (row * K + unit) / 2, high << 16 | low, step);
        } else if (Tile::share() == 0) send_word(to + row * K + unit, __float_as_uint(cell[i].y), step);
    }
}

// Sums over a warp's part of K, `count` fragments, for its panel: products[column, gate, unit]. y: [BC, ld] from the
// part's first unit on.
template <typename Tile, typename F, typename Weights>
__device__ inline void multiply_outputs(float *products, const F *y, int ld, int count, const Fragment<F> *held,
                                        const uint4 *slots, int resident, Weights weights) {
    float acc[Tile::BC] = {0};
#pragma unroll
    for (int i = 0; i < Tile::HELD; i++)  // by four, without branches between them; those past `count` are zero
        if (i / 4 * 4 < count) multiply<Tile::BC>(acc, held[i], y + 16 * min(i, count - 1), ld);
    for (int i = Tile::HELD; i < count; i++) {
        const uint4 *slot = slots + (i - Tile::HELD) * SLSTM_WARPS * Tile::SLOT;
        multiply<Tile::BC>(acc, i - Tile::HELD < resident ? load_fragment<F>(slot) : weights(i), y + 16 * i, ld);
    }
    for_each_result<F, Tile::BC>(
        acc, [&](int row, int column, float sum) { products[column * Tile::ROW + row / 8 * Tile::U + row % 8] = sum; });
}

// What to keep of a token
template <typename F>
__device__ inline void store_step(const SlstmJob<F> &job, size_t cell, int unit, float y, const float *gates) {
    int d = job.shape.d;
    job.y[cell * d + unit] = from_float<F>(y);
#pragma unroll
    for (int g = 0; g < 4; g++) job.saved.gates[(cell * 4 + g) * d + unit] = from_float<F>(gates[g]);
}

template <typename Tile, typename F = typename Tile::F>
__global__ void __launch_bounds__(SLSTM_THREADS, 1) slstm_forward_kernel(const SlstmJob<F> job) {
    constexpr int P = Tile::P, U = Tile::U, BC = Tile::BC, HELD = Tile::HELD, STRIDE = SLSTM_WARPS * Tile::SLOT;
    extern __shared__ __align__(16) unsigned char slstm_shared[];
    int T = job.shape.T, NH = job.shape.NH, d = job.shape.d, groups = (job.shape.B + BC - 1) / BC;
    int warp = threadIdx.x / 32, K = job.ctas * U, ld = K + 8, half = BC * K / Tile::PAYLOAD;

    uint4 *slots = (uint4 *)slstm_shared;                               // [resident][WARPS, SLOT]
    F *y_all = (F *)(slots + (size_t)job.resident * STRIDE);            // [BC, ld]
    float *products = (float *)(y_all + BC * ld);                       // [SPLITS, BC, ROW]
    uint64_t *exchange = job.exchange + blockIdx.y * 2 * (size_t)half;  // [2][half]
    if (job.ctas == 1) {
        exchange = (uint64_t *)(products + Tile::SPLITS * BC * Tile::ROW);
        for (int k = threadIdx.x; k < 2 * half; k += SLSTM_THREADS) exchange[k] = 0;
        __syncthreads();
    }
    // This warp's part of the product: the gates of 8 units from `unit0` on, `count` times 16 of K from 16 k0 on.
    int panel = warp % Tile::PANELS, split = warp / Tile::PANELS, unit0 = blockIdx.x * U + 8 * panel;
    int k0 = K / 16 * split / Tile::SPLITS, count = K / 16 * (split + 1) / Tile::SPLITS - k0;
    uint32_t step = 0;
    slots += warp * Tile::SLOT;

    for (int task = blockIdx.y; task < NH * groups; task += gridDim.y) {
        int head = task / groups, b0 = task % groups * BC;
        const F *R = job.R + (size_t)head * d * 4 * d;
        auto weights = [&](int i) {  // fragment i < count of this warp
            return make_fragment<F>(
                [&](int row, int k) { return recurrent_weight(R, d, 16 * (k0 + i) + k, row / 8, unit0 + row % 8); });
        };
        Fragment<F> held[HELD];
#pragma unroll
        for (int i = 0; i < HELD; i++) held[i] = i < count ? weights(i) : Fragment<F>{};
        for (int i = HELD; i < count && i - HELD < job.resident; i++)
            store_fragment(slots + (i - HELD) * STRIDE, weights(i));
        __syncwarp();

        SlstmPair pair[P];
        SlstmCell cell[P];
        float bias[4];    // all pairs of a thread have the same unit
        F x_next[P][4];   // of the token after the current one, asked for a whole step before it is needed
        int doc_next[P];  // its doc_start
#pragma unroll
        for (int i = 0; i < P; i++) pair[i] = slstm_pair<Tile>(i, job.shape, head, b0);
        auto index = [&](int i, int t) { return ((size_t)pair[i].b * T + t) * NH + head; };
        auto fetch = [&](int t) {
#pragma unroll
            for (int i = 0; i < P; i++) {
                if (!pair[i].valid) continue;
                doc_next[i] = job.doc_start[(size_t)pair[i].b * T + t];
#pragma unroll
                for (int g = 0; g < 4; g++) x_next[i][g] = job.x[(index(i, t) * 4 + g) * d + pair[i].unit];
            }
        };
        auto hand_over = [&](int t) {  // y enters token t
            step++;
            send_outputs<Tile>(exchange + step % 2 * half, cell, K, step);
#pragma unroll
            for (int i = 0; i < P; i++)
                if (pair[i].valid && Tile::share() == 0)
                    job.saved.y_prev[index(i, t) * d + pair[i].unit] = from_float<F>(cell[i].y);
        };
#pragma unroll
        for (int i = 0; i < P; i++) {
            doc_next[i] = NO_RESET;
#pragma unroll
            for (int g = 0; g < 4; g++) x_next[i][g] = from_float<F>(0.0f);
        }
#pragma unroll
        for (int g = 0; g < 4; g++) bias[g] = pair[0].unit < d ? job.bias[(head * 4 + g) * d + pair[0].unit] : 0;
        fetch(0);
#pragma unroll
        for (int i = 0; i < P; i++) {
            int fresh = !pair[i].valid || doc_next[i] == 0;
            cell[i] = fresh ? SlstmCell{} : load_cell(job.initial, pair[i].b, (size_t)head * d + pair[i].unit);
        }
        hand_over(0);

        for (int t = 0; t < T; t++) {
            F x_now[P][4];
#pragma unroll
            for (int i = 0; i < P; i++)
#pragma unroll
                for (int g = 0; g < 4; g++) x_now[i][g] = x_next[i][g];
            if (t + 1 < T) fetch(t + 1);
            receive_outputs<Tile>(y_all, ld, exchange + step % 2 * half, K, step);
            __syncthreads();  // y_all is complete, and the products of the last step have been read
            multiply_outputs<Tile>(products + split * BC * Tile::ROW + 8 * panel, y_all + 16 * k0, ld, count, held,
                                   slots, job.resident, weights);
            __syncthreads();  // products are complete, and y_all has been read

            float left[P], gates[P][4];  // left: y, which a reset takes out of the cell
#pragma unroll
            for (int i = 0; i < P; i++) {
                const float *sums = products + Tile::pair(i) / U * Tile::ROW + Tile::pair(i) % U;
                float r[4];
#pragma unroll
                for (int g = 0; g < 4; g++) {
                    r[g] = to_float(x_now[i][g]) + bias[g];
#pragma unroll
                    for (int k = 0; k < Tile::SPLITS; k++) r[g] += sums[k * BC * Tile::ROW + g * U];
                }
                slstm_step<F>(&cell[i], r, gates[i]);
                left[i] = cell[i].y;
                if (t + 1 < T && doc_next[i] == t + 1) cell[i] = SlstmCell{};
            }
            if (t + 1 < T) hand_over(t + 1);
#pragma unroll
            for (int i = 0; i < P; i++)
                if (pair[i].valid && Tile::share() == 0) store_step(job, index(i, t), pair[i].unit, left[i], gates[i]);
        }
#pragma unroll
        for (int i = 0; i < P; i++)
            if (pair[i].valid && Tile::share() == 0)
                store_cell(job.final, pair[i].b, (size_t)head * d + pair[i].unit, cell[i]);
    }
}

// ----------------------------------------------------------------------------------------------------------------
// Backward

template <typename F>
struct SlstmTrace {  // what one step back reads, for a pair
    F gates[4], o_prev, y_prev, dy;
    float h_prev;  // of the initial state; other tokens have y_prev / o_prev
    int doc_start;
};

// What the step of token t back reads, for a pair.
template <typename F>
__device__ inline SlstmTrace<F> load_trace(const SlstmJob<F> &job, const SlstmPair &p, int head, int t) {
    int d = job.shape.d;
    size_t token = (size_t)p.b * job.shape.T + t, cell = token * job.shape.NH + head, at = cell * d + p.unit;
    SlstmTrace<F> s;
#pragma unroll
    for (int g = 0; g < 4; g++) s.gates[g] = job.saved.gates[(4 * cell + g) * d + p.unit];
    s.o_prev = from_float<F>(0.0f);
    s.y_prev = job.saved.y_prev[at];
    s.dy = job.dy[at];
    s.h_prev = 0;
    s.doc_start = job.doc_start[token];
    if (t > 0) {
        s.o_prev = job.saved.gates[(4 * (cell - job.shape.NH) + 3) * d + p.unit];
    } else {
        SlstmCell initial = load_cell(job.initial, p.b, (size_t)head * d + p.unit);
        if (initial.n != 0) s.h_prev = initial.c / initial.n;
    }
    return s;
}
template <typename F>
__device__ inline SlstmBack slstm_step_back(const SlstmTrace<F> &s, float dL) {
    float o_prev = to_float(s.o_prev), h_prev = o_prev > 0 ? slstm_divide<F>(to_float(s.y_prev), o_prev) : s.h_prev;
    return slstm_back(to_float(s.gates[0]), to_float(s.gates[1]), to_float(s.gates[2]), to_float(s.gates[3]), h_prev,
                      dL);
}

// Sums of dr over the sequences of the task, to partial[group, head]. sums: [BC, 4U] in shared memory
template <typename Tile, typename F>
__device__ inline void store_bias_sums(const SlstmJob<F> &job, float *sums, const float (*dbias)[4], int group,
                                       int head) {
    constexpr int U = Tile::U;
    __syncthreads();  // sums are in the place of dr, which has been read
#pragma unroll
    for (int i = 0; i < Tile::P; i++)
#pragma unroll
        for (int g = 0; g < 4; g++)
            if (Tile::share() == 0) sums[(Tile::pair(i) / U * 4 + g) * U + Tile::pair(i) % U] = dbias[i][g];
    __syncthreads();
    int column = threadIdx.x, gate = column / U, unit = blockIdx.x * U + column % U, d = job.shape.d;
    if (gate < 4 && unit < d) {
        float sum = 0;
        for (int row = 0; row < Tile::BC; row++) sum += sums[row * 4 * U + column];
        job.partial[(((size_t)group * job.shape.NH + head) * 4 + gate) * d + unit] = sum;
    }
    __syncthreads();
}

// R^T dr of this block's gates, panel by panel, each sum to the block that owns the unit: to[ctas][..][BC, U], where
// `to` is at this block's part of the first receiver's buffer. dr: [BC, GATES]
template <typename Tile, typename F, int STEPS, typename Weights>
__device__ inline void send_gradients(uint64_t *to, const F *dr, int ctas, uint32_t step,
                                      const Fragment<F> (*held)[STEPS], const uint4 *slots, int stride, int resident,
                                      Weights weights) {
    constexpr int BC = Tile::BC, U = Tile::U, HELD_PANELS = Tile::HELD_PANELS;
    int warp = threadIdx.x / 32, panels = (ctas * U + 31) / 32;
    auto send = [&](int i, const float *acc) {
        for_each_result<F, BC>(acc, [&](int row, int column, float sum) {
            int unit = 32 * (warp + SLSTM_WARPS * i) + row;
            uint64_t *word = to + (size_t)(unit / U) * ctas * BC * U + column * U + unit % U;
            if (unit < ctas * U) send_word(word, __float_as_uint(sum), step);
        });
    };
#pragma unroll
    for (int i = 0; i < HELD_PANELS; i++)
        if (warp + SLSTM_WARPS * i < panels) {
            float acc[BC] = {0};
#pragma unroll
            for (int k = 0; k < STEPS; k++) multiply<BC>(acc, held[i][k], dr + 16 * k, Tile::GATES);
            send(i, acc);
        }
    for (int i = HELD_PANELS; warp + SLSTM_WARPS * i < panels; i++) {
        float acc[BC] = {0};
        for (int k = 0; k < STEPS; k++) {
            int slot = (i - HELD_PANELS) * STEPS + k;
            multiply<BC>(acc, slot < resident ? load_fragment<F>(slots + slot * stride) : weights(i, k), dr + 16 * k,
                         Tile::GATES);
        }
        send(i, acc);
    }
}

template <typename Tile, typename F = typename Tile::F>
__global__ void __launch_bounds__(SLSTM_THREADS, 1) slstm_backward_kernel(const SlstmJob<F> job) {
    constexpr int P = Tile::P, U = Tile::U, BC = Tile::BC, STEPS = Tile::STEPS, HELD_PANELS = Tile::HELD_PANELS;
    extern __shared__ __align__(16) unsigned char slstm_shared[];
    int T = job.shape.T, NH = job.shape.NH, d = job.shape.d, groups = (job.shape.B + BC - 1) / BC, ctas = job.ctas;
    int warp = threadIdx.x / 32, K = ctas * U, half = K * BC * ctas;
    int panels = (K + 31) / 32, stride = min(panels, SLSTM_WARPS) * Tile::SLOT;  // warps past `panels` have no slots

    uint4 *slots = (uint4 *)slstm_shared;                               // [resident][stride]
    F *dr_all = (F *)(slots + (size_t)job.resident * stride);           // [2][BC, GATES]
    uint64_t *exchange = job.exchange + blockIdx.y * 2 * (size_t)half;  // [2][ctas to, ctas from][BC, U]
    if (ctas == 1) {
        exchange = (uint64_t *)(dr_all + 2 * BC * Tile::GATES);
        for (int k = threadIdx.x; k < 2 * half; k += SLSTM_THREADS) exchange[k] = 0;
        __syncthreads();
    }
    uint32_t step = 0;
    slots += warp * Tile::SLOT;

    for (int task = blockIdx.y; task < NH * groups; task += gridDim.y) {
        int head = task / groups, b0 = task % groups * BC;
        const F *R = job.R + (size_t)head * d * 4 * d;
        auto weights = [&](int i, int k) {  // of the warp's i-th panel
            return make_fragment<F>([&](int row, int column) {
                int gate = 16 * k / U, unit = blockIdx.x * U + 16 * k % U + column;
                return recurrent_weight(R, d, 32 * (warp + SLSTM_WARPS * i) + row, gate, unit);
            });
        };
        Fragment<F> held[HELD_PANELS > 0 ? HELD_PANELS : 1][STEPS];
#pragma unroll
        for (int i = 0; i < HELD_PANELS; i++)
#pragma unroll
            for (int k = 0; k < STEPS; k++) held[i][k] = weights(i, k);
        if (warp < panels)
            for (int k = 0; k < job.resident; k++)
                store_fragment(slots + k * stride, weights(HELD_PANELS + k / STEPS, k % STEPS));
        __syncwarp();

        SlstmPair pair[P];
        SlstmTrace<F> next[P];  // of the token to come, asked for a whole step before it is needed
        SlstmStateBack carried[P];  // dy: only that of the final state
        float dbias[P][4] = {0};
        int fresh[P] = {0};  // the token after the current one
#pragma unroll
        for (int i = 0; i < P; i++) {
            pair[i] = slstm_pair<Tile>(i, job.shape, head, b0);
            next[i] = {};  // pairs that are not there: all their gradients are zero
            carried[i] = {};
            if (!pair[i].valid) continue;
            next[i] = load_trace(job, pair[i], head, T - 1);
            carried[i] = slstm_enter_back(job.final, job.dfinal, pair[i].b, (size_t)head * d + pair[i].unit);
        }

        for (int t = T - 1; t >= 0; t--) {
            SlstmBack back[P];
            float dy_here[P], dy[P], dr[P][4];
            int cut[P];
#pragma unroll
            for (int i = 0; i < P; i++) {
                SlstmTrace<F> now = next[i];
                if (t > 0 && pair[i].valid) next[i] = load_trace(job, pair[i], head, t - 1);
                cut[i] = fresh[i];  // nothing flows back from a token that begins a document
                fresh[i] = now.doc_start == t && pair[i].valid;
                dy_here[i] = to_float(now.dy);
                back[i] = slstm_step_back(now, carried[i].dL);
                dy[i] = t < T - 1 ? 0 : carried[i].dy;
            }
            if (t < T - 1)
                receive_gradients<Tile>(dy, exchange + step % 2 * half + (size_t)blockIdx.x * ctas * BC * U, ctas,
                                        step);
            F *dr_now = dr_all + t % 2 * BC * Tile::GATES;
#pragma unroll
            for (int i = 0; i < P; i++) {
                slstm_finish_back(back[i], dy_here[i] + (cut[i] ? 0 : dy[i]), dr[i], &carried[i].dh,
                                  &carried[i].dL);
                F *row = dr_now + Tile::pair(i) / U * Tile::GATES + Tile::pair(i) % U;
#pragma unroll
                for (int g = 0; g < 4; g++) {
                    dbias[i][g] += dr[i][g];
                    row[g * U] = from_float<F>(dr[i][g]);
                }
            }
            if (t > 0 || job.dinitial.y) {
                __syncthreads();  // dr_now is complete; two steps ago it was read before the last step's barrier
                step++;
                uint64_t *to = exchange + step % 2 * half + (size_t)blockIdx.x * BC * U;
                send_gradients<Tile>(to, dr_now, ctas, step, held, slots, stride, job.resident, weights);
            }
#pragma unroll
            for (int i = 0; i < P; i++) {  // beside four pairs dr has no registers
                const F *row = dr_now + Tile::pair(i) / U * Tile::GATES + Tile::pair(i) % U;
#pragma unroll
                for (int g = 0; g < 4; g++)
                    if (pair[i].valid && Tile::share() == 0)
                        job.dx[((((size_t)pair[i].b * T + t) * NH + head) * 4 + g) * d + pair[i].unit] =
                            P < 4 ? from_float<F>(dr[i][g]) : row[g * U];
            }
        }
        if (job.dinitial.y) {
            float dy[P] = {0};
            receive_gradients<Tile>(dy, exchange + step % 2 * half + (size_t)blockIdx.x * ctas * BC * U, ctas, step);
#pragma unroll
            for (int i = 0; i < P; i++)
                if (pair[i].valid && Tile::share() == 0)
                    slstm_leave_back(job.initial, job.dinitial, pair[i].b, (size_t)head * d + pair[i].unit,
                                     {fresh[i] ? 0 : dy[i], carried[i].dh, carried[i].dL});
        }
        store_bias_sums<Tile>(job, (float *)dr_all, dbias, task % groups, head);
    }
}

// dbias += the sums of all groups, in their order; width: 4 NH d
static __global__ void __launch_bounds__(1024)
    slstm_bias_kernel(float *dbias, const float *partial, int groups, size_t width) {
    add_partials_block<32>(dbias, partial, groups, width);
}

// ----------------------------------------------------------------------------------------------------------------
// Launchers

typedef struct {
    const void *kernel;
    int ctas, teams, passes;  // blocks a team; teams at once; tasks that each team works through (0: does not fit)
    int rows, resident;       // sequences a task; fragments a warp in shared memory
    size_t shared, exchange;  // bytes a block; bytes in global memory
} SlstmPlan;

template <typename Tile>
static SlstmPlan slstm_plan_tile(const SlstmShape *s, int backward) {
    typedef typename Tile::F F;
    constexpr int U = Tile::U, BC = Tile::BC;
    SlstmPlan p = {};
    int device, limit, processors, blocks;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    p.kernel = backward ? (const void *)slstm_backward_kernel<Tile> : (const void *)slstm_forward_kernel<Tile>;
    p.ctas = ceil_div(s->d, U);
    p.rows = BC;
    size_t K = (size_t)p.ctas * U, half = backward ? K * BC * p.ctas : K * BC / Tile::PAYLOAD;
    int panels = ceil_div(K, 32), warps = backward && panels < SLSTM_WARPS ? panels : SLSTM_WARPS;
    int fragments = backward ? (ceil_div(panels, SLSTM_WARPS) - Tile::HELD_PANELS) * Tile::STEPS
                             : ceil_div(K / 16, Tile::SPLITS) - Tile::HELD;
    size_t slot = (size_t)warps * Tile::SLOT * sizeof(uint4);
    p.shared = backward ? 2 * BC * Tile::GATES * sizeof(F)
                        : BC * (K + 8) * sizeof(F) + Tile::SPLITS * BC * Tile::ROW * sizeof(float);
    if (p.ctas == 1) p.shared += 2 * half * sizeof(uint64_t);
    if (p.shared > (size_t)limit) return p;
    p.resident = (int)((limit - p.shared) / slot);
    if (p.resident > fragments) p.resident = fragments > 0 ? fragments : 0;
    p.shared += p.resident * slot;

    CUDA_CHECK(cudaFuncSetAttribute(p.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, p.kernel, SLSTM_THREADS, p.shared));
    int tasks = s->NH * ceil_div(s->B, BC);
    p.teams = blocks * processors / p.ctas;
    if (p.teams > tasks) p.teams = tasks;
    if (p.teams > 0) p.passes = ceil_div(tasks, p.teams);
    if (p.ctas > 1) p.exchange = 2 * half * sizeof(uint64_t) * p.teams;
    return p;
}

// The plan with the fewest passes; of equal ones the first, with the smallest blocks, whose steps take least time. A
// small head is given to one block.
template <typename F>
static SlstmPlan slstm_plan(const SlstmShape *s, int backward) {
    if (s->d <= 16) return slstm_plan_tile<SlstmTile<F, 16, 8>>(s, backward);
    if (s->d <= 32) return slstm_plan_tile<SlstmTile<F, 32, 8>>(s, backward);
    if (s->d <= 64) return slstm_plan_tile<SlstmTile<F, 64, 8>>(s, backward);
    SlstmPlan plans[] = {slstm_plan_tile<SlstmTile<F, 16, 8>>(s, backward),
                         slstm_plan_tile<SlstmTile<F, 32, 16>>(s, backward),
                         slstm_plan_tile<SlstmTile<F, 32, 32>>(s, backward)};
    SlstmPlan best = plans[0];
    for (int k = 1; k < 3; k++)
        if (plans[k].passes && (!best.passes || plans[k].passes < best.passes)) best = plans[k];
    if (!best.passes)
        die(EXIT_USAGE,
            "--heads: an sLSTM head of %d units needs more multiprocessors than this GPU has; use more heads", s->d);
    return best;
}

// Bytes that a launch exchanges at most: fewer sequences than planned may take another tile.
template <typename F>
static size_t slstm_exchange_bytes(const SlstmShape *s, int backward) {
    size_t most = slstm_plan<F>(s, backward).exchange;
    if (s->d <= 64) return most;
    const SlstmPlan plans[] = {slstm_plan_tile<SlstmTile<F, 16, 8>>(s, backward),
                               slstm_plan_tile<SlstmTile<F, 32, 16>>(s, backward),
                               slstm_plan_tile<SlstmTile<F, 32, 32>>(s, backward)};
    for (const SlstmPlan &p : plans)
        if (p.exchange > most) most = p.exchange;
    return most;
}

template <typename F>
static void slstm_take_scratch(Arena *a, const SlstmShape *s, SlstmScratch *scratch) {
    size_t forward = slstm_exchange_bytes<F>(s, 0), backward = slstm_exchange_bytes<F>(s, 1);
    scratch->exchange = take<uint64_t>(a, (forward > backward ? forward : backward) / sizeof(uint64_t));
}

// Elements of `partial` for slstm_backward.
MAYBE_UNUSED
static size_t slstm_partial_size(const SlstmShape *s) { return (size_t)ceil_div(s->B, 4) * 4 * s->NH * s->d; }

// Runs one pass, with clusters if it can. Returns the sequences of a group.
template <typename F>
static int slstm_run(SlstmJob<F> *job, int backward, SlstmScratch *scratch, cudaStream_t stream) {
    if constexpr (sizeof(F) == 2) {
        SlstmClusterPlan clusters = slstm_cluster_plan(&job->shape, backward);
        if (clusters.kernels) {
            slstm_cluster_launch(&clusters, job, stream);
            return clusters.kernels->sequences;
        }
    }
    SlstmPlan plan = slstm_plan<F>(&job->shape, backward);
    job->ctas = plan.ctas;
    job->resident = plan.resident;
    job->exchange = scratch->exchange;
    if (plan.exchange) CUDA_CHECK(cudaMemsetAsync(scratch->exchange, 0, plan.exchange, stream));
    void *arguments[] = {job};
    CUDA_CHECK(cudaLaunchCooperativeKernel(plan.kernel, dim3(plan.ctas, plan.teams), dim3(SLSTM_THREADS), arguments,
                                           plan.shared, stream));
    return plan.rows;
}

// x [B, T, NH, 4, d] pre-activations from the input, before the bias; R [NH, d, 4d]; bias [NH, 4, d]; doc_start [B, T];
// y [B, T, NH, d] out. A token t with doc_start t starts with zero states. `final` may be the memory of `initial`.
template <typename F>
static void slstm_forward(const SlstmShape *s, const F *x, const F *R, const float *bias, const int *doc_start,
                          SlstmState initial, SlstmState final, F *y, SlstmSaved<F> *saved, SlstmScratch *scratch,
                          cudaStream_t stream) {
    SlstmJob<F> job = {};
    job.shape = *s;
    job.R = R;
    job.doc_start = doc_start;
    job.initial = initial;
    job.final = final;
    job.saved = *saved;
    job.x = x;
    job.bias = bias;
    job.y = y;
    slstm_run(&job, 0, scratch, stream);
}

// dy [B, T, NH, d]; dx [B, T, NH, 4, d] out, the gradient of x. dbias [NH, 4, d] is added to. The caller adds y_prev^T
// dx to the gradient of R. `final` is what the forward pass made, dfinal the gradient that enters there, dinitial that
// of `initial`, out; each may be none. partial: slstm_partial_size(s)
template <typename F>
static void slstm_backward(const SlstmShape *s, const F *R, SlstmSaved<F> *saved, const F *dy, const int *doc_start,
                           SlstmState initial, SlstmState final, SlstmState dfinal, SlstmState dinitial, F *dx,
                           float *dbias, float *partial, SlstmScratch *scratch, cudaStream_t stream) {
    SlstmJob<F> job = {};
    job.shape = *s;
    job.R = R;
    job.doc_start = doc_start;
    job.initial = initial;
    job.final = final;
    job.dfinal = dfinal;
    job.dinitial = dinitial;
    job.saved = *saved;
    job.dy = dy;
    job.dx = dx;
    job.partial = partial;
    int rows = slstm_run(&job, 1, scratch, stream);
    const size_t width = (size_t)4 * s->NH * s->d;
    slstm_bias_kernel<<<ceil_div(width, 32), dim3(32, 32), 0, stream>>>(dbias, partial, ceil_div(s->B, rows), width);
    LAUNCH_CHECK();
}

#endif
