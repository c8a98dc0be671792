// mlstm_backward.cu: the gradients of the mLSTM cell in five versions from naive to shipped: mlstm_forward.cu, which is
// to be read first, once more, with the roles exchanged.
//
//   make build/mlstm_backward && build/mlstm_backward          all versions: checked, timed, a table at the end
//   build/mlstm_backward 3                                      one of them
//
// The gradient of an output H_t = sum over earlier tokens of weight * (q_t . k_j) v_j has the same form three times
// (doc/math.md 4). With e = dh / den and ds, the gradient of the normaliser:
//
//   output   rows X   pairs with   values Z   walks      weight of a pair, query l and key j <= l   state
//   dV       K        Q            dH         backward   s D (q.k) / den_l                          dC
//   dQ       dH       V            K          forward    s D (dh.v / den_l + ds_l)                  C^T, n
//   dK       V        dH           Q          backward   s D (dh.v / den_l + ds_l)                  dC^T, dn
//
// So every kernel below is a template on this table, and a version runs it three times:
//
//   1 recurrent   C^T forward, dC and dC^T backward in time, each in the registers of a block. Nothing is stored: C is
//                 made again from k and v instead of being kept for T tokens. Three chains of T steps.
//   2 quadratic   As attention's backward pass: pairs only, T / 2 a token, and all scores are made three times.
//   3 chunkwise   Pairs inside chunks of 128 tokens; states C^T, dC, dC^T of every chunk in memory, in float, each
//                 written and read once: 24 dk dv bytes a chunk.
//   4 split       3 on the tensor cores, and only two sets of states, in bf16: C, which the forward pass left, and dC.
//                 dQ, dK and dV each read three inputs and a state again (xlstmc/mlstm.cuh).
//   5 scan        Each of the three carries its own state through the sequence on chip, as the forward pass does. dV
//                 and dK both carry dC, once as it is and once transposed: to compute it twice costs less than to
//                 store it once (xlstmc/mlstm_scan.cuh).
//
// Versions 4 and 5 also make the gates' gradients, out of row sums <q, dq> and <k, dk> and <C, dC> every 128 tokens
// (doc/math.md 4.5, 4.7); 1 to 3 leave them out. The forward pass is done before and not in these times.

#include "mlstm_ladder.cuh"

enum { GRAD_DV, GRAD_DQ, GRAD_DK };

template <int MODE_>
struct Role {
    static constexpr int MODE = MODE_;
    static constexpr bool REVERSE = MODE != GRAD_DQ;     // in time
    static constexpr bool TRANSPOSED = MODE != GRAD_DV;  // the state is C^T, and the normaliser takes part
    static constexpr int A = TRANSPOSED ? DV : DK;       // width of X and of what it is paired with
    static constexpr int W = TRANSPOSED ? DK : DV;       // width of Z and of the output
};

typedef struct {
    const bf16 *x, *y, *z;  // rows of X, of what X is paired with, of Z; of a head, ld_x, ld_y, ld_z apart
    size_t ld_x, ld_y, ld_z;
    bf16 *out;
    size_t ld_out;
    size_t gate;  // of the head's first token in [B, NH, T]
} RoleTensors;

typedef struct {
    MlstmShape s;
    MlstmInput<bf16> in;
    const bf16 *dh;
    bf16 *grad;  // dq, dk, dv, laid out as q, k, v
    MlstmGates g;
    const float *inv_den, *ds;  // [B, NH, T]
    const float *keep, *write;  // [B, NH, T] version 1
    float *states, *vectors;    // [B, NH, NC, A, W], [B, NH, NC, W] version 3
} GradArgs;

template <class R>
__device__ static RoleTensors role_tensors(const GradArgs &p, int bh) {
    const int b = bh / p.s.NH, head = bh % p.s.NH;
    const size_t row = (size_t)b * p.s.T, ld = p.in.ld, ld_h = (size_t)p.s.NH * DV, key = (size_t)p.s.NH * DK;
    const bf16 *q = p.in.q + row * ld + head * DK, *k = p.in.k + row * ld + head * DK,
               *v = p.in.v + row * ld + head * DV, *dh = p.dh + row * ld_h + head * DV;
    bf16 *dq = p.grad + row * ld + head * DK, *dv = p.grad + row * ld + 2 * key + head * DV;
    const size_t gate = (size_t)bh * p.s.T;
    if (R::MODE == GRAD_DV) return RoleTensors{k, q, dh, ld, ld, ld_h, dv, ld, gate};
    if (R::MODE == GRAD_DQ) return RoleTensors{dh, v, k, ld_h, ld, ld, dq, ld, gate};
    return RoleTensors{v, dh, q, ld, ld_h, ld, dq + key, ld, gate};
}

// ----------------------------------------------------------------------------------------------------------------
// 1: the recurrence. A block a head and output: M = keep M + y (scale z)^T, out = factor x M + border n, token by
// token. A thread has 128 rows of a column of M; where A is 256, two neighbours share a column.

template <class R>
static __global__ void __launch_bounds__(DV) recurrent_kernel(GradArgs p) {
    enum { TILE = 8, HEIGHT = 128, SHARERS = R::A / HEIGHT };
    __shared__ __align__(16) float x[TILE][R::A], y[TILE][R::A], z[TILE][R::W];
    const RoleTensors to = role_tensors<R>(p, blockIdx.x);
    const int column = threadIdx.x / SHARERS, row0 = threadIdx.x % SHARERS * HEIGHT;
    const float s = rsqrtf((float)DK);
    float M[HEIGHT], n = 0;
#pragma unroll
    for (int a = 0; a < HEIGHT; a++) M[a] = 0;
    for (int tile = 0; tile < p.s.T / TILE; tile++) {
        const int t0 = R::REVERSE ? p.s.T - TILE * (tile + 1) : TILE * tile;
        __syncthreads();  // the last tile has been used
        for (int i = threadIdx.x; i < TILE * R::A; i += DV) {
            x[i / R::A][i % R::A] = to_float(to.x[(t0 + i / R::A) * to.ld_x + i % R::A]);
            y[i / R::A][i % R::A] = to_float(to.y[(t0 + i / R::A) * to.ld_y + i % R::A]);
        }
        for (int i = threadIdx.x; i < TILE * R::W; i += DV)
            z[i / R::W][i % R::W] = to_float(to.z[(t0 + i / R::W) * to.ld_z + i % R::W]);
        __syncthreads();
        for (int k = 0; k < TILE; k++) {
            const int t = R::REVERSE ? TILE - 1 - k : k;
            const size_t at = to.gate + t0 + t;
            const float write = p.write[at], e = s * p.inv_den[at], ds = s * p.ds[at], value = z[t][column];
            // dC decays by what the next token, which the walk has behind it, lets through
            const float keep = R::REVERSE ? (t0 + t + 1 < p.s.T ? p.keep[at + 1] : 0) : p.keep[at];
            const float add = (R::REVERSE ? e : write) * value;
            float out = 0;
#pragma unroll
            for (int a = 0; a < HEIGHT; a++) {
                M[a] = keep * M[a] + y[t][row0 + a] * add;
                out += x[t][row0 + a] * M[a];
            }
            if (SHARERS == 2) out += __shfl_xor_sync(0xffffffffu, out, 1);
            n = keep * n + (R::REVERSE ? ds : write) * value;
            out *= R::REVERSE ? write : e;
            if (R::TRANSPOSED) out += (R::REVERSE ? write : ds) * n;
            if (row0 == 0) to.out[(t0 + t) * to.ld_out + column] = from_float<bf16>(out);
        }
    }
}

// ----------------------------------------------------------------------------------------------------------------
// 2 and 3: pairs. A block takes 64 rows of a head and walks through tiles of 16 partners: back in time for dQ, forward
// for the others. A thread has a column of the output; where that is 128 wide, half of the block has half of the rows.

enum { ROWS = 64, PARTNERS = 16 };

template <class R, bool CHUNKWISE>
static __global__ void __launch_bounds__(DV) pairs_kernel(GradArgs p) {
    enum { GROUPS = DV / R::W, MINE = ROWS / GROUPS };  // rows of a thread
    __shared__ float weights[PARTNERS][ROWS];
    __shared__ bf16 x[R::A][ROWS], y[PARTNERS][R::A];
    const RoleTensors to = role_tensors<R>(p, blockIdx.y);
    const int NC = p.s.T / MLSTM_CHUNK, row0 = blockIdx.x * ROWS, chunk = row0 / MLSTM_CHUNK;
    const int column = threadIdx.x % R::W, mine = threadIdx.x / R::W * MINE;
    const int l = threadIdx.x % ROWS, part = threadIdx.x / ROWS, step = R::REVERSE ? PARTNERS : -PARTNERS;
    const float *decay = p.g.decay + (size_t)blockIdx.y * NC, scale = rsqrtf((float)DK);
    float out[MINE] = {0}, between = 1;
    for (int i = threadIdx.x; i < ROWS * R::A; i += DV)
        x[i % R::A][i / R::A] = to.x[(row0 + i / R::A) * to.ld_x + i % R::A];
    const int begin = R::REVERSE ? row0 : row0 + ROWS - PARTNERS;
    const int first = CHUNKWISE ? chunk * MLSTM_CHUNK : 0, end = CHUNKWISE ? first + MLSTM_CHUNK : p.s.T;
    for (int t0 = begin; t0 >= first && t0 < end; t0 += step) {
        const int partner_chunk = t0 / MLSTM_CHUNK, gap = abs(partner_chunk - chunk);
        if (gap > 1 && t0 % MLSTM_CHUNK == (R::REVERSE ? 0 : MLSTM_CHUNK - PARTNERS))
            between *= decay[partner_chunk + (R::REVERSE ? -1 : 1)];  // one more chunk lies in between
        __syncthreads();
        for (int i = threadIdx.x; i < PARTNERS * R::A; i += DV)
            y[i / R::A][i % R::A] = to.y[(t0 + i / R::A) * to.ld_y + i % R::A];
        __syncthreads();
        for (int j = part; j < PARTNERS; j += DV / ROWS) {
            const int query = R::REVERSE ? t0 + j : row0 + l, key = R::REVERSE ? row0 + l : t0 + j;
            float score = 0;
            for (int a = 0; a < R::A; a++) score += to_float(x[a][l]) * to_float(y[j][a]);
            score *= p.inv_den[to.gate + query];
            if (R::TRANSPOSED) score += p.ds[to.gate + query];
            weights[j][l] = score * pair_weight(p.g, to.gate, query, key, gap == 0, between, scale);
        }
        __syncthreads();
        for (int j = 0; j < PARTNERS; j++) {
            const float value = to_float(to.z[(t0 + j) * to.ld_z + column]);
#pragma unroll
            for (int i = 0; i < MINE; i++) out[i] += weights[j][mine + i] * value;
        }
    }
    if (CHUNKWISE) {
        __syncthreads();
        const size_t at = (size_t)blockIdx.y * NC + chunk, token = to.gate + row0 + l;
        const float *M = p.states + at * R::A * R::W, n = p.vectors[at * R::W + column];
        if (part == 0) {  // what the state's answer and n are multiplied with
            weights[0][l] = R::REVERSE ? p.g.kscale[token] : p.g.qscale[token] * p.inv_den[token];
            weights[1][l] = R::REVERSE ? p.g.kscale[token] : p.g.qscale[token] * p.ds[token];
        }
        __syncthreads();
        for (int a = 0; a < R::A; a++) {
            const float value = M[a * R::W + column];
#pragma unroll
            for (int i = 0; i < MINE; i++) out[i] += weights[0][mine + i] * to_float(x[a][mine + i]) * value;
        }
        for (int i = 0; R::TRANSPOSED && i < MINE; i++) out[i] += weights[1][mine + i] * n;
    }
#pragma unroll
    for (int i = 0; i < MINE; i++) to.out[(row0 + mine + i) * to.ld_out + column] = from_float<bf16>(out[i]);
}

// 3: the states that enter each chunk in the direction of the walk. A block has 8 rows of M, a thread one of its
// columns.
template <class R>
static __global__ void __launch_bounds__(R::W) states_kernel(GradArgs p) {
    enum { HEIGHT = 8 };
    const RoleTensors to = role_tensors<R>(p, blockIdx.y);
    const int NC = p.s.T / MLSTM_CHUNK, a0 = blockIdx.x * HEIGHT, column = threadIdx.x;
    float M[HEIGHT] = {0}, n = 0;
    for (int k = 0; k < NC; k++) {
        const int c = R::REVERSE ? NC - 1 - k : k;
        const size_t at = (size_t)blockIdx.y * NC + c;
        const float keep = p.g.decay[at];
        for (int a = 0; a < HEIGHT; a++) {
            p.states[(at * R::A + a0 + a) * R::W + column] = M[a];
            M[a] *= keep;
        }
        if (a0 == 0) p.vectors[at * R::W + column] = n;
        n *= keep;
        for (int t = c * MLSTM_CHUNK; t < (c + 1) * MLSTM_CHUNK; t++) {
            const size_t gate = to.gate + t;
            const float scale = R::REVERSE ? p.g.qscale[gate] * p.inv_den[gate] : p.g.kscale[gate];
            const float n_scale = R::REVERSE ? p.g.qscale[gate] * p.ds[gate] : p.g.kscale[gate];
            const float value = to_float(to.z[t * to.ld_z + column]);
            const Vec<bf16> y = load_vec(to.y + t * to.ld_y + a0);
#pragma unroll
            for (int a = 0; a < HEIGHT; a++) M[a] += y[a] * scale * value;
            n += n_scale * value;
        }
    }
}

template <int MODE>
static void gradient(const GradArgs &p, int version) {
    typedef Role<MODE> R;
    const int heads = p.s.B * p.s.NH;
    const dim3 blocks(p.s.T / ROWS, heads);
    if (version == 1) {
        recurrent_kernel<R><<<heads, DV>>>(p);
    } else if (version == 2) {
        pairs_kernel<R, false><<<blocks, DV>>>(p);
    } else {
        states_kernel<R><<<dim3(R::A / 8, heads), R::W>>>(p);
        LAUNCH_CHECK();
        pairs_kernel<R, true><<<blocks, DV>>>(p);
    }
    LAUNCH_CHECK();
}

// ----------------------------------------------------------------------------------------------------------------

// <dh, h> of each row, a block of 32 threads: in the trainer the head norm's backward pass leaves it
static __global__ void row_dots_kernel(float *out, const bf16 *dh, const bf16 *h) {
    float sum = 0;
    for (int c = threadIdx.x; c < DV; c += 32)
        sum += to_float(dh[(size_t)blockIdx.x * DV + c]) * to_float(h[(size_t)blockIdx.x * DV + c]);
    sum = warp_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// The forward pass of versions 4 and 5. The recurrent form needs gates of its own, the others take those of version 4.
static void prepare(Problem *p) {
    const MlstmState none = {NULL, NULL, NULL, 0};
    if (scan_runs_here())
        mlstm_forward<bf16>(scan_shape(p), p->in, none, none, p->h, &p->scan_saved, &p->scan_scratch, 0);
    mlstm_forward<bf16>(p->s, p->in, none, none, p->h, &p->saved, &p->scratch, 0);
    recurrent_gates_kernel<<<p->s.B * p->s.NH, 32>>>(p->s, gate_input(p->in), p->keep, p->write, p->floor);
    LAUNCH_CHECK();
    row_dots_kernel<<<p->s.B * p->s.T * p->s.NH, 32>>>(p->dh_dot_h, p->dh, p->h);
    LAUNCH_CHECK();
    CUDA_CHECK(cudaMemset(p->dbias, 0, 2 * p->s.NH * sizeof(float)));
}

static void run(Problem *p, int version) {
    const MlstmState none = {NULL, NULL, NULL, 0};
    const size_t key = (size_t)p->s.NH * DK, G = 2 * (size_t)p->s.NH;
    bf16 *dq = p->grad, *dk = dq + key, *dv = dk + key;
    if (version == 4) {
        mlstm_backward<bf16>(p->s, p->in, none, p->dh, p->dh_dot_h, dq, dk, dv, p->in.ld, p->dgates, G, p->dbias,
                             &p->saved, &p->scratch, 0);
    } else if (version == 5) {
        mlstm_backward<bf16>(scan_shape(p), p->in, none, p->dh, p->dh_dot_h, dq, dk, dv, p->in.ld, p->dgates, G,
                             p->dbias, &p->scan_saved, &p->scan_scratch, 0);
    } else {
        const MlstmScratch<bf16> *scratch = &p->scratch;
        mlstm_row_factors(&p->s, p->dh_dot_h, &p->saved.gates, scratch->rows, 0);
        const GradArgs args = {
            p->s,    p->in,    p->dh,     p->grad,   p->saved.gates, scratch->rows.inv_den, scratch->rows.ds,
            p->keep, p->write, p->states, p->vectors};
        gradient<GRAD_DV>(args, version);
        gradient<GRAD_DQ>(args, version);
        gradient<GRAD_DK>(args, version);
    }
}

int main(int argc, char **argv) {
    const Ladder ladder = {{"recurrent, states in registers", "quadratic, plain loops", "chunkwise, plain loops",
                            "chunkwise, mma.sync (mlstm.cuh)", "scan, wgmma and TMA (mlstm_scan.cuh)"},
                           run,
                           prepare,
                           true,
                           sizeof(bf16) * (4.0 * DK + 3.0 * DV) + 2 * sizeof(float) + 2 * sizeof(bf16)};
    return ladder_main(&ladder, argc, argv);
}
