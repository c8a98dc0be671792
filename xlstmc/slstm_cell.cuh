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

// What the backward pass needs. With h = c / n a step is y = o h, h = (1 - a) h_prev + a z, where a = I / n is the
// share of the new input, (1 - a) = F n_prev / n that of what was stored: a = sig(r_i - log sig(r_f) - L_prev), where L
// is the logarithm of n exp(m). Of a and 1 - a the smaller one is saved, so that both are known to the last digit of F.
template <typename F>
struct SlstmSaved {
    F *gates;   // [B, T, NH, 4, d]: a, or -(1 - a) with the sign bit set; sig(-r_f); z; o
    F *y_prev;  // [B, T, NH, d]: the output that entered each step
};

template <typename F>
static void slstm_take_saved(Arena *a, const SlstmShape *s, SlstmSaved<F> *saved) {
    size_t cells = (size_t)s->B * s->T * s->NH * s->d;
    saved->gates = take<F>(a, 4 * cells);
    saved->y_prev = take<F>(a, cells);
}

template <typename F>
struct SlstmJob {  // arguments of all kernels
    SlstmShape shape;
    const F *R;            // [NH, d, 4d]
    const int *doc_start;  // [B, T]
    SlstmState initial, final, dfinal, dinitial;  // the gradients only backward
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

// Shares of the new input and of what was stored, which add up to 1, as one number for gates[0].
__device__ __forceinline__ float slstm_share(float a, float kept) { return a <= kept ? a : -kept; }

// One step back of one unit: dy, the gradient of y, arrives last, so all that can be is made before. dh, dL: gradients
// of h and L that left the step, without y's part. share: as saved; over_o_prev: 1 / o of the token before.
struct SlstmBack {
    float o, to_i, input_dL, kept, kept_dL, sig_minus, to_z, to_o;
};
__device__ __forceinline__ SlstmBack slstm_back(float share, float sig_minus, float z, float o, float h_prev,
                                                float dL) {
    int mostly_new = __float_as_int(share) < 0;
    float small = fabsf(share), large = 1 - small, a = mostly_new ? large : small, rest = z - h_prev;
    SlstmBack s;
    s.o = o;
    s.kept = mostly_new ? small : large;
    s.to_i = a * s.kept * rest;
    s.input_dL = a * dL;
    s.kept_dL = s.kept * dL;
    s.sig_minus = sig_minus;
    s.to_z = a * (1 - z * z);
    s.to_o = (1 - o) * o * fmaf(a, rest, h_prev);
    return s;
}
// dr of the four gates; dh and dL of the states that entered the step.
__device__ __forceinline__ void slstm_finish_back(const SlstmBack &s, float dy, float (&dr)[4], float *dh, float *dL) {
    float all = fmaf(s.o, dy, *dh);
    *dL = fmaf(-s.to_i, all, s.kept_dL);
    *dh = s.kept * all;
    dr[0] = fmaf(s.to_i, all, s.input_dL);
    dr[1] = s.sig_minus * *dL;
    dr[2] = s.to_z * all;
    dr[3] = s.to_o * dy;
}

// From gradients of y, c, n of a final state, at fixed m, to those of y, h and L
struct SlstmStateBack {
    float dy, dh, dL;
};
__device__ inline SlstmStateBack slstm_enter_back(const SlstmState &final, const SlstmState &dfinal, int b, size_t at) {
    SlstmCell s = load_cell(final, b, at), ds = load_cell(dfinal, b, at);
    return {ds.y, ds.c * s.n, ds.c * s.c + ds.n * s.n};
}
// And back, to those of an initial state; dm is exact. Nothing flows into an empty one.
__device__ inline void slstm_leave_back(const SlstmState &initial, const SlstmState &dinitial, int b, size_t at,
                                        const SlstmStateBack &d) {
    SlstmCell s = load_cell(initial, b, at);
    float over_n = s.n != 0 ? 1 / s.n : 0, dc = d.dh * over_n;
    store_cell(dinitial, b, at, {d.dy, dc, (d.dL - s.c * dc) * over_n, d.dL});
}

#endif
