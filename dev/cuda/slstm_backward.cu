// slstm_backward.cu: the gradients of the sLSTM cell in five versions from naive to shipped: slstm_forward.cu, which is
// to be read first, once more, backward in time.
//
//   make build/slstm_backward && build/slstm_backward          all versions: checked, timed, a table at the end
//   build/slstm_backward 3                                      one of them
//
// A step back of a unit makes dr, the gradients of its four pre-activations, out of its own dy, its gates and two
// gradients that it carries (slstm_back in xlstmc/slstm_cell.cuh; doc/math.md 5.2). Into dy goes R^T dr of the token
// after, of all units of the head. So what travels is dr, four numbers a unit, where forward one was enough. All
// versions read what the shipped forward pass saved, and leave dR to one matrix product at the end: y_prev^T dx.
//
//   1 launches    A kernel a step, a block a head and sequence, a thread a unit, which multiplies its row of R with dr.
//   2 persistent  The same loop in one kernel, dr in shared memory, R from L2 in each step.
//   3 on chip     A block owns 8 units of a head for all sequences and keeps their rows of R in shared memory. dr goes
//                 through memory to all other blocks, 32 KB a head, with a barrier of the whole grid in each step.
//   4 words       Tensor cores. A block multiplies its own dr by its columns of R, for all units of the head, and sends
//                 sums to the owners of the units, who add them up in a fixed order. They travel through L2 in words of
//                 8 bytes, half payload, half the number of the step (xlstmc/slstm.cuh).
//   5 clusters    The same from registers into the shared memory of the owner (xlstmc/slstm_hopper.cuh).
//
// On one H100 a step takes 139, 136, 11.0, 1.8 and 0.8 us. What was predicted, and why 1 and 2 are so slow, is in
// dev/cuda/NOTES.md.

#include "slstm_ladder.cuh"

struct Back {
    float dh, dL;  // gradients of h and L that the token after has left
};

// dr of one unit at token t, also to dx. from_after: its part of R^T dr of token t + 1
__device__ static void step_back(const Problem &p, Back *s, float from_after, int b, int t, int head, int unit,
                                 float (&dr)[4]) {
    const size_t cell = ((size_t)b * p.T + t) * NH + head;
    const bf16 *gates = p.saved.gates + cell * 4 * D + unit;
    float h_prev = 0;
    if (t > 0) h_prev = to_float(p.saved.y_prev[cell * D + unit]) / to_float((gates - (size_t)NH * 4 * D)[3 * D]);
    const SlstmBack back = slstm_back(to_float(gates[0]), to_float(gates[D]), to_float(gates[2 * D]),
                                      to_float(gates[3 * D]), h_prev, s->dL);
    slstm_finish_back(back, to_float(p.dy[cell * D + unit]) + from_after, dr, &s->dh, &s->dL);
    for (int g = 0; g < 4; g++) p.dx[(cell * 4 + g) * D + unit] = from_float<bf16>(dr[g]);
}

// ----------------------------------------------------------------------------------------------------------------
// 1 and 2: a block a head and sequence, a thread a unit

// dr [4][D] of the token after, in shared memory, is replaced by that of token t
__device__ static void block_step_back(const Problem &p, Back *s, float *dr, int t) {
    const int head = blockIdx.x, b = blockIdx.y, unit = threadIdx.x;
    const bf16 *R = p.R + ((size_t)head * D + unit) * 4 * D;
    float from_after = 0, own[4];
#pragma unroll 8
    for (int k = 0; k < 4 * D; k++) from_after += to_float(R[k]) * dr[k];
    step_back(p, s, from_after, b, t, head, unit, own);
    __syncthreads();  // dr has been read
    for (int g = 0; g < 4; g++) dr[g * D + unit] = to_float(from_float<bf16>(own[g]));
}

static __global__ void launched_kernel(Problem p, int t) {
    __shared__ float dr[4 * D];
    const int head = blockIdx.x, b = blockIdx.y, unit = threadIdx.x;
    const bool last = t == p.T - 1;
    float *states = p.states + ((size_t)b * NH + head) * 3 * D + unit;
    Back s = {0, 0};
    if (!last) s = {states[0], states[D]};
    for (int g = 0; g < 4; g++)
        dr[g * D + unit] =
            last ? 0 : to_float(p.dx[((((size_t)b * p.T + t + 1) * NH + head) * 4 + g) * D + unit]);
    __syncthreads();
    block_step_back(p, &s, dr, t);
    states[0] = s.dh, states[D] = s.dL;
}
static void launched(Problem *p) {
    for (int t = p->T - 1; t >= 0; t--) launched_kernel<<<dim3(NH, B), D>>>(*p, t);
    LAUNCH_CHECK();
}

static __global__ void persistent_kernel(Problem p) {
    __shared__ float dr[4 * D];
    Back s = {0, 0};
    for (int k = threadIdx.x; k < 4 * D; k += D) dr[k] = 0;
    for (int t = p.T - 1; t >= 0; t--) {
        __syncthreads();
        block_step_back(p, &s, dr, t);
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
    __shared__ bf16 R[4 * D * UNITS];
    __shared__ __align__(16) bf16 dr[4 * D * B];
    const int head = blockIdx.y, own = threadIdx.x % UNITS, b = threadIdx.x / UNITS, unit = blockIdx.x * UNITS + own;
    for (int k = threadIdx.x; k < 4 * D * UNITS; k += UNITS * B)
        R[k] = p.R[((size_t)head * D + blockIdx.x * UNITS + k % UNITS) * 4 * D + k / UNITS];
    for (int k = threadIdx.x; k < 4 * D * B; k += UNITS * B) dr[k] = from_float<bf16>(0);
    Back s = {0, 0};
    for (int t = p.T - 1; t >= 0; t--) {
        bf16 *handed = p.handed + ((size_t)(t % 2) * NH + head) * 4 * D * B;
        float from_after = 0, made[4];
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < 4 * D; k++) from_after += to_float(R[k * UNITS + own]) * to_float(dr[k * B + b]);
        step_back(p, &s, from_after, b, t, head, unit, made);
        for (int g = 0; g < 4; g++) handed[(g * D + unit) * B + b] = from_float<bf16>(made[g]);
        cooperative_groups::this_grid().sync();
        for (int k = threadIdx.x; k < 4 * D * B / 8; k += UNITS * B) ((uint4 *)dr)[k] = ((uint4 *)handed)[k];
    }
}
static void on_chip(Problem *p) {
    void *arguments[] = {p};
    CUDA_CHECK(cudaLaunchCooperativeKernel((const void *)on_chip_kernel, dim3(D / UNITS, NH), dim3(UNITS * B),
                                           arguments, 0, 0));
}

// ----------------------------------------------------------------------------------------------------------------
// 4 and 5: the shipped ones

static void shipped(Problem *p, int choice) {
    const SlstmShape shape = {B, p->T, NH, D};
    const SlstmState none = {};
    slstm_cluster_choice = choice;
    slstm_backward<bf16>(&shape, p->R, &p->saved, p->dy, p->doc_start, none, none, none, none, p->dx, p->dbias,
                         p->partial, &p->scratch, 0);
}
static void words(Problem *p) { shipped(p, SLSTM_NO_CLUSTER); }
static void clusters(Problem *p) { shipped(p, SLSTM_ANY); }

static const Version VERSION[VERSIONS] = {
    {"launches", launched}, {"persistent", persistent}, {"on chip", on_chip}, {"words", words}, {"clusters", clusters}};

int main(int argc, char **argv) { return ladder(argc, argv, VERSION, 1); }
