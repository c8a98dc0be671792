// oracle_slstm.c: the sLSTM cell of the CPU trainer, for the tests of the CUDA kernels.
#include "../../../train_xlstm.c"

// Forward and backward through time, fp32. in, out, dout, din: y, c, n, m [B, NH * d] of the initial and final states
// and of their gradients; in, dout NULL: zeros, din NULL: not wanted. Written: final states, din, y and y_prev [B, T,
// NH, d], dx [B, T, NH, 4, d]; dbias [NH, 4, d] is added to.
void oracle_slstm(int B, int T, int NH, int d, const unsigned char *resets, const float *x, const float *R,
                  const float *bias, float *const in[4], float *const out[4], float *const dout[4], float *const din[4],
                  const float *dy, float *y, float *y_prev, float *dx, float *dbias) {
    SlstmShape s = {B, T, NH, d, resets};
    size_t D = (size_t)NH * d, cells = (size_t)B * T * D;
    SlstmState initial = {0}, dfinal = {0}, dinitial = {0}, final = {out[0], out[1], out[2], out[3], D};
    if (in) initial = (SlstmState){in[0], in[1], in[2], in[3], D};
    if (dout) dfinal = (SlstmState){dout[0], dout[1], dout[2], dout[3], D};
    if (din) dinitial = (SlstmState){din[0], din[1], din[2], din[3], D};
    float *work = (float *)xcalloc(7 * cells + 4 * D * d, sizeof(float));
    float *partial = (float *)xcalloc(4 * D * MAX_PARTS, sizeof(float));
    SlstmSaved saved = {work, work + 4 * cells, work + 5 * cells, work + 6 * cells, y_prev};
    slstm_forward(&s, x, R, bias, initial, final, y, &saved);
    slstm_backward(&s, R, &saved, dy, initial, dfinal, dinitial, dx, work + 7 * cells, dbias, partial);
    free(work);
    free(partial);
}
