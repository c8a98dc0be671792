// slstm_cell.cuh: what all kernels of the sLSTM share: shapes, states, what the forward pass saves for the backward
// pass, arguments.
#ifndef XLSTMC_SLSTM_CELL_CUH
#define XLSTMC_SLSTM_CELL_CUH

#include "cuda_util.cuh"

typedef struct {
    int B, T, NH, d;
} SlstmShape;

typedef struct {           // states of B sequences, `row` elements apart; y == NULL: zeros, or not wanted
    float *y, *c, *n, *m;  // [B][NH * d]
    size_t row;
} SlstmState;

template <typename F>
struct alignas(sizeof(F) == 2 ? 16 : 8) SlstmRecord {  // of a token and unit
    F gates[4];                                        // I, sig(-r_f), z, o
    float forget, c;  // F in fp32 because gradients are multiplied with it step after step
};

template <typename F>
struct SlstmSaved {          // what the backward pass needs
    SlstmRecord<F> *record;  // [B, T, NH, d]
    float *n;                // [B, T, NH, d]
    F *y_prev;               // [B, T, NH, d]: the output that entered each step
};

template <typename F>
static void slstm_take_saved(Arena *a, const SlstmShape *s, SlstmSaved<F> *saved) {
    size_t cells = (size_t)s->B * s->T * s->NH * s->d;
    saved->record = take<SlstmRecord<F>>(a, cells);
    saved->n = take<float>(a, cells);
    saved->y_prev = take<F>(a, cells);
}

template <typename F>
struct SlstmJob {  // arguments of all kernels
    SlstmShape shape;
    const F *R;            // [NH, d, 4d]
    const int *doc_start;  // [B, T]
    SlstmState initial, final;
    SlstmSaved<F> saved;
    const F *x;         // [B, T, NH, 4, d]
    const float *bias;  // [NH, 4, d]
    F *y;               // [B, T, NH, d]
    const F *dy;        // [B, T, NH, d]
    F *dx;              // [B, T, NH, 4, d]
    float *partial;     // [groups, NH, 4, d] sums of dx
    // of the kernels that exchange through L2
    int ctas, resident;  // blocks a team; fragments of R that a warp has in shared memory
    uint64_t *exchange;  // [teams][2] halves
};

struct SlstmCell {
    float y, c, n, m;
};
__device__ inline SlstmCell load_cell(const SlstmState &from, int b, size_t at) {
    if (!from.y) return SlstmCell{};
    at += b * from.row;
    return {from.y[at], from.c[at], from.n[at], from.m[at]};
}
__device__ inline void store_cell(const SlstmState &to, int b, size_t at, const SlstmCell &s) {
    if (!to.y) return;
    at += b * to.row;
    to.y[at] = s.y;
    to.c[at] = s.c;
    to.n[at] = s.n;
    to.m[at] = s.m;
}

__device__ __forceinline__ void mma_16x8x16(float *c, uint4 a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

#endif
