// oracle_misc.c: the CPU trainer's convolution, 4x4 blocks, embedding, classifier and AdamW, for the tests of the CUDA
// kernels.
#include "../../../train_xlstm.c"

static Sequence sequence_of(const unsigned char *resets, unsigned char *history, size_t state_row, int B, int T) {
    Sequence s = {B, T, resets, history, NULL, NULL, state_row, 0, 0, NULL, NULL, NULL};
    count_history(history, resets, B, T);
    return s;
}

void oracle_conv_forward(float *pre, float *out, const float *x, size_t ld, const float *w, const float *bias,
                         const unsigned char *resets, const float *window, float *window_out, size_t state_row, int B,
                         int T, int C) {
    unsigned char *history = (unsigned char *)xcalloc((size_t)B * T, 1);
    Sequence s = sequence_of(resets, history, state_row, B, T);
    conv_forward(pre, out, x, ld, w, bias, window, window_out, C, &s);
    free(history);
}

void oracle_conv_backward(float *dx, size_t ld_dx, float *dw, float *dbias, float *dpre, const float *pre,
                          const float *x, size_t ld, const float *w, const unsigned char *resets, const float *window,
                          size_t state_row, int B, int T, int C) {
    unsigned char *history = (unsigned char *)xcalloc((size_t)B * T, 1);
    float *partial = (float *)xcalloc((size_t)MAX_PARTS * 5 * C, sizeof(float));
    Sequence s = sequence_of(resets, history, state_row, B, T);
    conv_backward(dx, ld_dx, dw, dbias, dpre, pre, x, ld, w, window, C, &s, partial);
    free(partial);
    free(history);
}

void oracle_blocks4_forward(float *out, size_t ld_out, const float *x, size_t ld_x, const float *w, int rows,
                            int width) {
    blocks4_forward(out, ld_out, x, ld_x, w, rows, width);
}

void oracle_blocks4_backward(float *dx, size_t ld_dx, float *dw, const float *dout, size_t ld_dout, const float *x,
                             size_t ld_x, const float *w, int rows, int width) {
    float *partial = (float *)xcalloc((size_t)MAX_PARTS * 4 * width, sizeof(float));
    blocks4_backward(dx, ld_dx, dw, dout, ld_dout, x, ld_x, w, rows, width, partial);
    free(partial);
}

// A model that is nothing but an embedding of width D
static Model embedding_model(TensorSpec *spec, int D) {
    Model m = {0};
    m.config.hidden_size = D;
    m.table.tensors = spec;
    return m;
}

void oracle_embedding_forward(float *x, const int *tokens, const float *w, int rows, int D) {
    TensorSpec spec = {0};
    Model m = embedding_model(&spec, D);
    m.params = (float *)w;
    m.x = &x;
    embedding_forward(&m, tokens, rows);
}

void oracle_embedding_backward(float *dw, const float *dx, const int *tokens, int rows, int D) {
    TensorSpec spec = {0};
    Model m = embedding_model(&spec, D);
    m.grads = dw;
    m.dx = (float *)dx;
    embedding_backward(&m, tokens, rows);
}

float oracle_cross_entropy_row(float *logits, int V, int target, float cap, float scale, int with_grad,
                               float *logits_out) {
    return cross_entropy_row(logits, V, target, cap, scale, with_grad, logits_out);
}

void oracle_update(float *w, float *m, float *v, float *grads, size_t count, int decay, int step, double lr,
                   double beta1, double beta2, double eps, double weight_decay, double grad_scale) {
    UpdateConfig u = {step, lr, beta1, beta2, eps, weight_decay, grad_scale};
    TensorSpec spec = {0};
    Model before = model;
    spec.count = count;
    spec.decay = decay;
    model.table.num_tensors = 1;
    model.table.total = count;
    model.table.tensors = &spec;
    model.run.threads = 1;
    model.params = w, model.m = m, model.v = v, model.grads = grads;
    cpu_update(&u);
    model = before;
}

double oracle_grad_norm(float *grads, size_t total) {
    Model before = model;
    model.table.total = total;
    model.shards = shards_make(total, 1, 0);
    model.run.threads = 1;
    model.grads = grads;
    double norm = cpu_grad_norm();
    model = before;
    return norm;
}
