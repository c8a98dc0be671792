// mlstm_forward.cu: the mLSTM cell, forward, in five versions from naive to shipped: how its speed was won.
//
//   make build/mlstm_forward && build/mlstm_forward            all versions: checked, timed, a table at the end
//   build/mlstm_forward 3                                       one of them
//
// A head carries a matrix C of dk x dv numbers through T tokens (doc/math.md 3): forget, add k v^T, ask with q. Below
// are B = 32 sequences of T = 2048 tokens, 4 heads of 128/256, bf16. Every input and output moved once is 0.4 GB, 0.13
// ms: that is the floor. C itself, read and written once a token in float, would be 170 times as much.
//
//   1 recurrent   One block a head, C in its registers: memory is read and written once. But the tokens come one after
//                 the other, and each waits for all multiply-adds that C needs, 3 dk dv, none of them on the tensor
//                 cores. The time is T times that, whether there are 128 heads or one.
//   2 quadratic   Unrolled, the output is a weighted sum over all earlier tokens, like attention (3.11 to 3.14): no
//                 chain at all, any number of blocks. All scales follow from the scalar gates, so they are made
//                 beforehand by kernels that touch nothing else (mlstm_gates.cuh), and no row has to look for its
//                 maximum. The price is T / 2 pairs a token instead of one update of C: with plain multiply-adds a loss
//                 at T = 2048, and the longer the worse.
//   3 chunkwise   The middle (3.15, 3.16): pairs inside chunks of 128 tokens, the state from chunk to chunk. Work is
//                 linear in T again, and the chain has T / 128 steps. Plain loops, with which 1 is still faster; the
//                 states lie in memory, in float: 4 dk dv bytes a chunk, written once and read once, more than all
//                 inputs and outputs.
//   4 split       The two steps of 3 on the tensor cores (mma.sync), with states in bf16, and tiles that cp.async
//                 fetches while the tile before is multiplied (xlstmc/mlstm.cuh): for every chip since sm_80. The
//                 products nearly vanish: this is where the parallel form pays. What is left is reading and writing
//                 states, and a chain of small steps.
//   5 scan        No states in memory: C stays on chip, in the accumulators of Hopper's wgmma, whose layout is also
//                 that of a register operand, so that the state can be asked without being moved. Tiles come by TMA,
//                 and one warpgroup makes the weights of the next chunk while two others work on this one
//                 (xlstmc/mlstm_scan.cuh). That is version 1 again, 64 tokens at a time.
//
// Where it goes next, and what was predicted for each step: dev/cuda/NOTES.md. The gradients climb the same ladder in
// mlstm_backward.cu.

#include "mlstm_ladder.cuh"

// ----------------------------------------------------------------------------------------------------------------
// 1: the recurrence (3.4) to (3.7) as it stands. A block a head; a thread has a column of C, all DK rows of it, and
// each warp has all of n, four elements a lane.

static __global__ void __launch_bounds__(DV) recurrent_kernel(MlstmShape s, MlstmInput<bf16> in, const float *keep,
                                                              const float *write, const float *floor, bf16 *h) {
    enum { TILE = 16 };  // tokens fetched at once
    __shared__ __align__(16) float q[TILE][DK], k[TILE][DK], v[TILE][DV];
    const int b = blockIdx.x / s.NH, head = blockIdx.x % s.NH, column = threadIdx.x, lane = threadIdx.x % 32;
    const float scale = rsqrtf((float)DK);
    float C[DK], n[DK / 32];
#pragma unroll
    for (int a = 0; a < DK; a++) C[a] = 0;
    for (int i = 0; i < DK / 32; i++) n[i] = 0;
    for (int t0 = 0; t0 < s.T; t0 += TILE) {
        const size_t first = (size_t)b * s.T + t0, gate = (size_t)blockIdx.x * s.T + t0;
        __syncthreads();  // the last tile has been used
        for (int i = threadIdx.x; i < TILE * DK; i += DV) {
            const size_t at = (first + i / DK) * in.ld + (size_t)head * DK + i % DK;
            q[i / DK][i % DK] = to_float(in.q[at]);
            k[i / DK][i % DK] = to_float(in.k[at]);
        }
        for (int t = 0; t < TILE; t++) v[t][column] = to_float(in.v[(first + t) * in.ld + (size_t)head * DV + column]);
        __syncthreads();
        for (int t = 0; t < TILE; t++) {
            const float f = keep[gate + t], i = write[gate + t], value = i * v[t][column];
            float num = 0, sig = 0;
#pragma unroll
            for (int a = 0; a < DK; a++) {
                C[a] = f * C[a] + k[t][a] * value;
                num += q[t][a] * C[a];
            }
#pragma unroll
            for (int j = 0; j < DK / 32; j++) {
                n[j] = f * n[j] + i * k[t][32 * j + lane];
                sig += q[t][32 * j + lane] * n[j];
            }
            const float den = fmaxf(fabsf(scale * warp_sum(sig)), floor[gate + t]) + s.eps;
            h[((first + t) * s.NH + head) * DV + column] = from_float<bf16>(scale * num / den);
        }
    }
}

static void recurrent(Problem *p) {
    const int heads = p->s.B * p->s.NH;
    recurrent_gates_kernel<<<heads, 32>>>(p->s, gate_input(p->in), p->keep, p->write, p->floor);
    LAUNCH_CHECK();
    recurrent_kernel<<<heads, DV>>>(p->s, p->in, p->keep, p->write, p->floor, p->h);
    LAUNCH_CHECK();
}

// ----------------------------------------------------------------------------------------------------------------
// 2 and 3: pairs of tokens. A block takes 64 queries of a head and walks back over tiles of 32 keys: weights into
// shared memory, then each thread, which has one of the DV columns of all 64 rows, adds up weighted values. Version 2
// walks to the sequence's first token, version 3 to the chunk's and then asks the state that entered it.

enum { ROWS = 64, KEYS = 32 };

// states: C [B, NH, NC, DK, DV] entering each chunk, n [B, NH, NC, DK] (version 3)
template <bool CHUNKWISE>
static __global__ void __launch_bounds__(DV)
    pairs_kernel(MlstmShape s, MlstmInput<bf16> in, MlstmGates g, const float *C, const float *n, bf16 *h) {
    __shared__ float weights[KEYS][ROWS], sums[DV / ROWS][ROWS];
    __shared__ bf16 q[DK][ROWS], k[KEYS][DK];
    const int bh = blockIdx.y, b = bh / s.NH, head = bh % s.NH, NC = s.T / MLSTM_CHUNK, row0 = blockIdx.x * ROWS;
    const int chunk = row0 / MLSTM_CHUNK, column = threadIdx.x, l = threadIdx.x % ROWS, part = threadIdx.x / ROWS;
    const size_t first = (size_t)b * s.T, gates = (size_t)bh * s.T;
    const float scale = rsqrtf((float)DK);
    float out[ROWS] = {0}, sum = 0, between = 1;
    for (int i = threadIdx.x; i < ROWS * DK; i += DV)
        q[i % DK][i / DK] = in.q[(first + row0 + i / DK) * in.ld + (size_t)head * DK + i % DK];
    const int last_key = CHUNKWISE ? chunk * MLSTM_CHUNK : 0;
    for (int key0 = row0 + ROWS - KEYS; key0 >= last_key; key0 -= KEYS) {
        const int key_chunk = key0 / MLSTM_CHUNK;
        if (key_chunk < chunk - 1 && key0 % MLSTM_CHUNK == MLSTM_CHUNK - KEYS)  // one more chunk lies in between
            between *= g.decay[(size_t)bh * NC + key_chunk + 1];
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * DK; i += DV)
            k[i / DK][i % DK] = in.k[(first + key0 + i / DK) * in.ld + (size_t)head * DK + i % DK];
        __syncthreads();
        for (int j = part; j < KEYS; j += DV / ROWS) {
            float score = 0;
            for (int a = 0; a < DK; a++) score += to_float(q[a][l]) * to_float(k[j][a]);
            score *= pair_weight(g, gates, row0 + l, key0 + j, key_chunk == chunk, between, scale);
            weights[j][l] = score;
            sum += score;
        }
        __syncthreads();
        for (int j = 0; j < KEYS; j++) {
            const float value = to_float(in.v[(first + key0 + j) * in.ld + (size_t)head * DV + column]);
#pragma unroll
            for (int i = 0; i < ROWS; i++) out[i] += weights[j][i] * value;
        }
    }
    if (CHUNKWISE) {
        __syncthreads();
        C += ((size_t)bh * NC + chunk) * DK * DV, n += ((size_t)bh * NC + chunk) * DK;
        if (part == 0) weights[0][l] = g.qscale[gates + row0 + l];
        for (int a = part; a < DK; a += DV / ROWS) sum += g.qscale[gates + row0 + l] * to_float(q[a][l]) * n[a];
        __syncthreads();
        for (int a = 0; a < DK; a++) {
            const float value = C[a * DV + column];
#pragma unroll
            for (int i = 0; i < ROWS; i++) out[i] += weights[0][i] * to_float(q[a][i]) * value;
        }
    }
    sums[part][l] = sum;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const float sig = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
        const float den = fmaxf(fabsf(sig), g.floor[gates + row0 + i]) + s.eps;
        h[((first + row0 + i) * s.NH + head) * DV + column] = from_float<bf16>(out[i] / den);
    }
}

// 3: the states that enter each chunk (3.16). A block has 8 rows of a head's C, a thread one of its columns.
static __global__ void __launch_bounds__(DV)
    states_kernel(MlstmShape s, MlstmInput<bf16> in, MlstmGates g, float *C, float *n) {
    enum { A = 8 };
    const int bh = blockIdx.y, b = bh / s.NH, head = bh % s.NH, NC = s.T / MLSTM_CHUNK, a0 = blockIdx.x * A;
    float state[A] = {0}, n_state[A] = {0};
    for (int c = 0; c < NC; c++) {
        const size_t at = (size_t)bh * NC + c;
        const float keep = g.decay[at];
        for (int a = 0; a < A; a++) {
            C[(at * DK + a0 + a) * DV + threadIdx.x] = state[a];
            if (threadIdx.x == 0) n[at * DK + a0 + a] = n_state[a];
            state[a] *= keep, n_state[a] *= keep;
        }
        for (int t = c * MLSTM_CHUNK; t < (c + 1) * MLSTM_CHUNK; t++) {
            const size_t token = (size_t)b * s.T + t;
            const float scale = g.kscale[(size_t)bh * s.T + t];
            const float v = to_float(in.v[token * in.ld + (size_t)head * DV + threadIdx.x]);
            const Vec<bf16> k = load_vec(in.k + token * in.ld + (size_t)head * DK + a0);
#pragma unroll
            for (int a = 0; a < A; a++) state[a] += scale * k[a] * v, n_state[a] += scale * k[a];
        }
    }
}

static void pairs(Problem *p, bool chunkwise) {
    const MlstmShape s = p->s;
    const MlstmInput<bf16> in = p->in;
    const MlstmGates *g = &p->saved.gates;
    const dim3 blocks(s.T / ROWS, s.B * s.NH);
    mlstm_gates_forward(&s, in.gates, in.ld_gates, in.bias, in.cap, in.doc_start, NULL, 0, NULL, g, 0);
    if (chunkwise) {
        states_kernel<<<dim3(DK / 8, s.B * s.NH), DV>>>(s, in, *g, p->states, p->vectors);
        LAUNCH_CHECK();
        pairs_kernel<true><<<blocks, DV>>>(s, in, *g, p->states, p->vectors, p->h);
    } else {
        pairs_kernel<false><<<blocks, DV>>>(s, in, *g, NULL, NULL, p->h);
    }
    LAUNCH_CHECK();
}

// ----------------------------------------------------------------------------------------------------------------

static void run(Problem *p, int version) {
    const MlstmState none = {NULL, NULL, NULL, 0};
    if (version == 1) recurrent(p);
    else if (version <= 3) pairs(p, version == 3);
    else if (version == 4) mlstm_forward<bf16>(p->s, p->in, none, none, p->h, &p->saved, &p->scratch, 0);
    else mlstm_forward<bf16>(scan_shape(p), p->in, none, none, p->h, &p->scan_saved, &p->scan_scratch, 0);
}

int main(int argc, char **argv) {
    const Ladder ladder = {{"recurrent, C in registers", "quadratic, plain loops", "chunkwise, plain loops",
                            "chunkwise, mma.sync (mlstm.cuh)", "scan, wgmma and TMA (mlstm_scan.cuh)"},
                           run,
                           [](Problem *) {},
                           false,
                           sizeof(bf16) * (2.0 * DK + 2.0 * DV) + 2 * sizeof(float)};
    return ladder_main(&ladder, argc, argv);
}
