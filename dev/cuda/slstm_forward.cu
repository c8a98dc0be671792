// slstm_forward.cu: the sLSTM cell, forward, in five versions from naive to shipped: how its speed was won.
//
//   make build/slstm_forward && build/slstm_forward            all versions: checked, timed, a table at the end
//   build/slstm_forward 3                                       one of them
//
// slstm_ladder.cuh has the problem, its check and the times; slstm_backward.cu goes the same way backward.
//
// A step needs the outputs of the step before, of all units of a head: r = x + R y + bias, then gates and states of
// each unit (doc/math.md 5). Nothing can be done for all tokens at once, so what counts is the time of one step. Below
// are B = 16 sequences of T = 1024 tokens, 4 heads of 256 units, bf16. R of a head is 512 KB; a step takes 0.13 GFLOP
// and moves 0.3 MB, nothing for this GPU. All of its time is latency: who waits for whom, and how long.
//
//   1 launches    A kernel a step, a block a head and sequence, a thread a unit. The end of a kernel is the barrier.
//                 Every block reads all of R from L2, in a loop of 256 loads.
//   2 persistent  The same loop in one kernel: a block carries its sequence through all steps, states in registers, y
//                 in shared memory. No launches, nobody waits for anybody. But R comes from L2 in each step, 32 MB for
//                 all blocks, as before; and it is slower than the launches, for a reason that is not known.
//   3 on chip     Blocks own units, not sequences: 128 of them keep their part of R, 16 KB, in shared memory for the
//                 whole sequence. Now y has to travel: through memory, with a barrier of the whole grid in each step.
//   4 words       Tensor cores multiply. No barrier: y travels through L2 in words of 8 bytes, half payload, half the
//                 number of the step, so that the one trip that brings the data also says that they are there
//                 (xlstmc/slstm.cuh; also for chips without clusters).
//   5 clusters    The 8 blocks of a head and 8 sequences are one cluster: y goes from registers into the shared memory
//                 of the peers, which is closer than L2, and a barrier there counts the bytes. R is in registers, and a
//                 block multiplies with its own y while that of the others is on its way (xlstmc/slstm_hopper.cuh).
//
// On one H100 a step takes 26, 44, 7.4, 2.1 and 0.77 us. Versions 4 and 5 also write what the backward pass needs. What
// was predicted for them, and what the backward pass takes, is in dev/cuda/NOTES.md.

#include "slstm_ladder.cuh"

struct State {
    float c, n, m;
};

// Pre-activations r of i, f, z, o; returns y. n is 0 before the first token.
__device__ static float step(State *s, const float (&r)[4]) {
    float stored = s->m + fminf(r[1], 0) - log1pf(expf(-fabsf(r[1])));  // m + log sig(r_f)
    float m = s->n == 0 ? r[0] : fmaxf(r[0], stored), I = expf(r[0] - m), F = s->n == 0 ? 0 : expf(stored - m);
    s->c = F * s->c + I * tanhf(r[2]);
    s->n = F * s->n + I;
    s->m = m;
    return s->c / (s->n * (1 + expf(-r[3])));
}

// x + bias of unit `unit` at token t; with R y, for y [D] in shared memory, R [D, 4, ld] from its unit on
__device__ static void preactivations(float (&r)[4], const Problem &p, int b, int t, int head, int unit) {
    for (int g = 0; g < 4; g++)
        r[g] = to_float(p.x[((((size_t)b * p.T + t) * NH + head) * 4 + g) * D + unit]) +
               p.bias[(head * 4 + g) * D + unit];
}
__device__ static void add_products(float (&r)[4], const float *y, const bf16 *R, int ld) {
#pragma unroll 8
    for (int k = 0; k < D; k++)
        for (int g = 0; g < 4; g++) r[g] += to_float(R[(k * 4 + g) * ld]) * y[k];
}

// ----------------------------------------------------------------------------------------------------------------
// 1 and 2: a block a head and sequence, a thread a unit

__device__ static void block_step(const Problem &p, State *s, float *y, int t) {
    const int head = blockIdx.x, b = blockIdx.y, unit = threadIdx.x;
    float r[4];
    preactivations(r, p, b, t, head, unit);
    add_products(r, y, p.R + (size_t)head * D * 4 * D + unit, D);
    p.y[(((size_t)b * p.T + t) * NH + head) * D + unit] = from_float<bf16>(step(s, r));
}

static __global__ void launched_kernel(Problem p, int t) {
    __shared__ float y[D];
    const int head = blockIdx.x, b = blockIdx.y, unit = threadIdx.x;
    float *states = p.states + ((size_t)b * NH + head) * 3 * D + unit;
    State s = {0, 0, 0};
    if (t > 0) s = {states[0], states[D], states[2 * D]};
    y[unit] = t > 0 ? to_float(p.y[(((size_t)b * p.T + t - 1) * NH + head) * D + unit]) : 0;
    __syncthreads();
    block_step(p, &s, y, t);
    states[0] = s.c, states[D] = s.n, states[2 * D] = s.m;
}
static void launched(Problem *p) {
    for (int t = 0; t < p->T; t++) launched_kernel<<<dim3(NH, B), D>>>(*p, t);
    LAUNCH_CHECK();
}

static __global__ void persistent_kernel(Problem p) {
    __shared__ float y[D];
    const int head = blockIdx.x, b = blockIdx.y, unit = threadIdx.x;
    State s = {0, 0, 0};
    y[unit] = 0;
    for (int t = 0; t < p.T; t++) {
        __syncthreads();
        block_step(p, &s, y, t);
        __syncthreads();  // y has been read
        y[unit] = to_float(p.y[(((size_t)b * p.T + t) * NH + head) * D + unit]);
    }
}
static void persistent(Problem *p) {
    persistent_kernel<<<dim3(NH, B), D>>>(*p);
    LAUNCH_CHECK();
}

// ----------------------------------------------------------------------------------------------------------------
// 3: a block owns UNITS units of a head for all sequences, a thread one unit of one of them

enum { UNITS = 8 };

static __global__ void __launch_bounds__(UNITS *B) on_chip_kernel(Problem p) {
    __shared__ bf16 R[D * 4 * UNITS];
    __shared__ float y[B][D + 1];
    const int head = blockIdx.y, own = threadIdx.x % UNITS, b = threadIdx.x / UNITS, unit = blockIdx.x * UNITS + own;
    for (int k = threadIdx.x; k < D * 4 * UNITS; k += UNITS * B)
        R[k] = p.R[((size_t)head * D * 4 + k / UNITS) * D + blockIdx.x * UNITS + k % UNITS];
    for (int k = threadIdx.x; k < B * D; k += UNITS * B) y[k / D][k % D] = 0;
    State s = {0, 0, 0};
    for (int t = 0; t < p.T; t++) {
        bf16 *handed = p.handed + (size_t)(t % 2) * B * NH * D;
        float r[4];
        __syncthreads();
        preactivations(r, p, b, t, head, unit);
        add_products(r, y[b], R + own, UNITS);
        const bf16 out = from_float<bf16>(step(&s, r));
        p.y[(((size_t)b * p.T + t) * NH + head) * D + unit] = out;
        handed[((size_t)b * NH + head) * D + unit] = out;
        cooperative_groups::this_grid().sync();
        for (int k = threadIdx.x; k < B * D; k += UNITS * B)
            y[k / D][k % D] = to_float(handed[((size_t)(k / D) * NH + head) * D + k % D]);
    }
}
static void on_chip(Problem *p) {
    void *arguments[] = {p};
    CUDA_CHECK(cudaLaunchCooperativeKernel((const void *)on_chip_kernel, dim3(D / UNITS, NH), dim3(UNITS * B),
                                           arguments, 0, 0));
}

// ----------------------------------------------------------------------------------------------------------------
// 4 and 5: the shipped ones

static void words(Problem *p) { shipped_forward(p, SLSTM_NO_CLUSTER); }
static void clusters(Problem *p) { shipped_forward(p, SLSTM_ANY); }

static const Version VERSION[VERSIONS] = {
    {"launches", launched}, {"persistent", persistent}, {"on chip", on_chip}, {"words", words}, {"clusters", clusters}};

int main(int argc, char **argv) { return ladder(argc, argv, VERSION, 0); }
