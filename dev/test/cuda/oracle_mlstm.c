// oracle_mlstm.c: the mLSTM cell of the CPU trainer, compiled in double, for the tests of the CUDA kernels: what they
// are compared with has no rounding of its own.
#define REAL_DOUBLE
#include "../../../train_xlstm.c"

static real *widen(const float *x, size_t n) {
    if (!x) return NULL;
    real *wide = (real *)xcalloc(n, sizeof(real));
    for (size_t k = 0; k < n; k++) wide[k] = x[k];
    return wide;
}

static void narrow(float *dst, real *src, size_t n) {  // and frees src
    for (size_t k = 0; k < n; k++) dst[k] = (float)src[k];
    free(src);
}

// Forward and backward of one window, everything contiguous.
//   size   B, T, NH, dk, dv, 1 for the sigmoid gate
//   in     q, k [B, T, NH, dk], v, dh [B, T, NH, dv], gates [B, T, 2NH] before bias and cap, bias [2NH],
//          states [B, NH dk dv + NH dk + NH]: C, n, m; NULL: zeros
//   out    h [B, T, NH, dv], dh_dot_h [B, T, NH], final states, dq, dk, dv, dgates as gates; dbias [2NH] is added to
void oracle_mlstm(const int size[6], float eps, float cap, const unsigned char *resets, const float *const in[7],
                  float *const out[8]) {
    const int B = size[0], T = size[1], NH = size[2], dk = size[3], dv = size[4], G = 2 * NH;
    const size_t rows = (size_t)B * T, Dk = (size_t)NH * dk, Dv = (size_t)NH * dv, C = Dk * dv, state = C + Dk + NH;
    const size_t in_counts[7] = {rows * Dk, rows * Dk, rows * Dv, rows * Dv, rows * G, G, B * state};
    const size_t out_counts[8] = {rows * Dv, rows * NH, B * state, rows * Dk, rows * Dk, rows * Dv, rows * G, G};
    real *x[7], *y[8];
    for (int k = 0; k < 7; k++) x[k] = widen(in[k], in_counts[k]);
    for (int k = 0; k < 8; k++) y[k] = widen(out[k], out_counts[k]);

    const size_t ld = 2 * Dk + Dv;  // q, k and v side by side: the CPU's functions want one row stride
    real *qkv = (real *)xcalloc(rows * ld, sizeof(real)), *dqkv = (real *)xcalloc(rows * ld, sizeof(real));
    for (size_t r = 0; r < rows; r++) {
        memcpy(qkv + r * ld, x[0] + r * Dk, Dk * sizeof(real));
        memcpy(qkv + r * ld + Dk, x[1] + r * Dk, Dk * sizeof(real));
        memcpy(qkv + r * ld + 2 * Dk, x[2] + r * Dv, Dv * sizeof(real));
    }
    MlstmShape s = {B, T, NH, dk, dv, 64, size[5], eps, resets};
    MlstmState none = {0}, initial = {0}, final = {y[2], y[2] + C, y[2] + C + Dk, state};
    if (x[6]) initial = (MlstmState){x[6], x[6] + C, x[6] + C + Dk, state};
    real *gates = (real *)xcalloc(rows * G, sizeof(real)), *sig = (real *)xcalloc(rows * NH, sizeof(real));
    size_t slots = (size_t)B * NH * (mlstm_num_chunks(&s) + 1);
    real *saved = (real *)xcalloc(slots * mlstm_state_size(&s), sizeof(real));
    gates_forward(gates, x[4], G, x[5], (int)rows, G, cap);
    MlstmInput input = {qkv, qkv + Dk, qkv + 2 * Dk, ld, gates, gates + NH, G};
    MlstmGrad grad = {dqkv, dqkv + Dk, dqkv + 2 * Dk, ld, y[6], y[6] + NH, G};
    mlstm_forward(&s, &input, initial, final, y[0], sig, saved);
    mlstm_backward(&s, &input, &grad, x[3], y[0], sig, saved, none, none);
    gates_backward(y[6], G, gates, (int)rows, G, cap);

    for (size_t r = 0; r < rows; r++) {
        memcpy(y[3] + r * Dk, dqkv + r * ld, Dk * sizeof(real));
        memcpy(y[4] + r * Dk, dqkv + r * ld + Dk, Dk * sizeof(real));
        memcpy(y[5] + r * Dv, dqkv + r * ld + 2 * Dk, Dv * sizeof(real));
        for (int g = 0; g < G; g++) y[7][g] += y[6][r * G + g];
        for (int head = 0; head < NH; head++)
            y[1][r * NH + head] = dot(x[3] + r * Dv + head * dv, y[0] + r * Dv + head * dv, dv);
    }
    for (int k = 0; k < 8; k++) narrow(out[k], y[k], out_counts[k]);
    for (int k = 0; k < 7; k++) free(x[k]);
    free(qkv), free(dqkv), free(gates), free(sig), free(saved);
}
