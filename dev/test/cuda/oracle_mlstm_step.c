// oracle_mlstm_step.c: the CPU trainer's recurrent mLSTM, for the test of the CUDA decode step.
#include "../../../train_xlstm.c"

// T tokens from the given states on, which are updated in place; gates [B*T, 2NH] before bias and cap
void oracle_mlstm_recurrent(float *h, float *C, float *n, float *m, size_t state_row, const float *q, const float *k,
                            const float *v, size_t ld, const float *gates, const float *bias, float cap, int B, int T,
                            int NH, int dk, int dv, int sigmoid_gate, float eps) {
    MlstmShape shape = {B, T, NH, dk, dv, 64, sigmoid_gate, eps, NULL};
    MlstmState state = {C, n, m, state_row};
    float *capped = (float *)xcalloc((size_t)B * T * 2 * NH, sizeof(float));
    gates_forward(capped, gates, 2 * (size_t)NH, bias, B * T, 2 * NH, cap);
    MlstmInput in = {q, k, v, ld, capped, capped + NH, 2 * (size_t)NH};
    mlstm_recurrent(&shape, &in, state, state, h);
    free(capped);
}
