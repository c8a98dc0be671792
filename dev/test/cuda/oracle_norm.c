// oracle_norm.c: the CPU trainer's norms and gated activations, for test_norm.cuh, test_head_norm.cuh, test_gated.cuh.
#include "../../../train_xlstm.c"

void oracle_norm_forward(float *out, float *stats, const float *x, const float *w, int center, int plus_one, int groups,
                         int width, float eps, int rows) {
    Norm n = {center, plus_one, groups, width, eps};
    norm_forward(out, stats, x, w, &n, rows);
}

void oracle_norm_backward(float *dx, int accumulate, float *dw, const float *dout, const float *x, const float *stats,
                          const float *w, int center, int plus_one, int groups, int width, float eps, int rows) {
    Norm n = {center, plus_one, groups, width, eps};
    float *partial = xcalloc((size_t)MAX_PARTS * groups * width, sizeof(float));
    norm_backward(dx, accumulate, dw, dout, x, stats, w, &n, rows, partial);
    free(partial);
}

void oracle_gated_forward(float *out, const float *gate_up, int rows, int U, int use_gelu) {
    gated_forward(out, gate_up, rows, U, use_gelu);
}

void oracle_gated_backward(float *dgate_up, const float *dout, const float *gate_up, int rows, int U, int use_gelu) {
    gated_backward(dgate_up, dout, gate_up, rows, U, use_gelu);
}

// What follows the head norm in the blocks, from hn [rows, width]; side has the row stride ld.
// mlstm: y = sigmoid(o) * hn
void oracle_gate_forward(float *y, const float *hn, const float *o, size_t ld, int rows, int width) {
    for (size_t r = 0; r < (size_t)rows; r++)
        for (int c = 0; c < width; c++) y[r * width + c] = sigmoid(o[r * ld + c]) * hn[r * width + c];
}

// dhn: in dy, out the gradient of hn
void oracle_gate_backward(float *dhn, float *d_o, size_t ld_do, const float *hn, const float *o, size_t ld, int rows,
                          int width) {
    for (size_t r = 0; r < (size_t)rows; r++)
        for (int c = 0; c < width; c++) {
            float gate = sigmoid(o[r * ld + c]), *dy = &dhn[r * width + c];
            d_o[r * ld_do + c] = *dy * hn[r * width + c] * gate * (1 - gate);
            *dy *= gate;
        }
}

// mlstm_v1: ht = hn + skip * ca, y = ht * silu(z)
void oracle_skip_forward(float *y, const float *hn, const float *ca, const float *skip, const float *z, size_t ld,
                         int rows, int width) {
    for (size_t r = 0; r < (size_t)rows; r++)
        for (int c = 0; c < width; c++) {
            size_t at = r * width + c;
            y[at] = (hn[at] + skip[c] * ca[at]) * silu(z[r * ld + c]);
        }
}

void oracle_skip_backward(float *dhn, float *dz, size_t ld_dz, float *dca, float *dskip, const float *hn,
                          const float *ca, const float *skip, const float *z, size_t ld, int rows, int width) {
    double *sum = xcalloc(width, sizeof(double));
    for (size_t r = 0; r < (size_t)rows; r++)
        for (int c = 0; c < width; c++) {
            size_t at = r * width + c;
            float dy = dhn[at], s = z[r * ld + c];
            dhn[at] = dy * silu(s);
            dz[r * ld_dz + c] = dy * (hn[at] + skip[c] * ca[at]) * silu_grad(s);
            dca[at] = dhn[at] * skip[c];
            sum[c] += dhn[at] * ca[at];
        }
    for (int c = 0; c < width; c++) dskip[c] += (float)sum[c];
    free(sum);
}

// dots[row, head]: sum of dh * h over a head, where nearly everything cancels: all of it in double, from the formulas
void oracle_dh_dot_h(float *dots, const float *dhn, const float *h, const float *w, int center, int plus_one,
                     int groups, int width, float eps, int rows) {
    for (size_t item = 0; item < (size_t)rows * groups; item++) {
        const float *x = h + item * width, *d = dhn + item * width, *scale = w + item % groups * width;
        double mean = 0, square = 0, g_mean = 0, gx_mean = 0, sum = 0;
        for (int c = 0; center && c < width; c++) mean += (double)x[c] / width;
        for (int c = 0; c < width; c++) square += (x[c] - mean) * (x[c] - mean) / width;
        double rstd = 1 / sqrt(square + eps);
        for (int c = 0; c < width; c++) {
            double g = d[c] * ((double)plus_one + scale[c]);
            if (center) g_mean += g / width;
            gx_mean += g * (x[c] - mean) * rstd / width;
        }
        for (int c = 0; c < width; c++)
            sum += rstd * (d[c] * ((double)plus_one + scale[c]) - g_mean - (x[c] - mean) * rstd * gx_mean) * x[c];
        dots[item] = (float)sum;
    }
}
