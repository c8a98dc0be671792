// test_math_mlstm.h: tests of the mLSTM cell, part of test_xlstm.c. The references are written once more here, in
// double whatever `real` is, straight from the definitions: the parallel form and backpropagation through the
// recurrence. They share no code with the trainer.

// ----------------------------------------------------------------------------------------------------------------
// A case and what comes out of it

enum { IN_Q, IN_K, IN_V, IN_I, IN_F, IN_C, IN_N, IN_M, NUM_IN };
static const char *const mlstm_names[NUM_IN] = {"dq", "dk", "dv", "digate", "dfgate", "dC0", "dn0", "dm0"};

typedef struct {
    int B, T, NH, dk, dv, chunk, sigmoid;
    int carried;  // initial states are given
    double eps;
    unsigned char *resets;  // [B, T] or NULL
    double *in[NUM_IN];     // q, k [B, T, NH, dk], v [B, T, NH, dv], gates [B, T, NH], C [B, NH, dk, dv], n, m
    double *dh, *dC, *dn;   // gradients of h and of the final states (dC NULL: none)
} MlstmCase;

typedef struct {
    double *h, *sig;    // [B, T, NH, dv], [B, T, NH]
    double *C, *n, *m;  // final states
    double *d[NUM_IN];  // gradients of the inputs; those of the states only if carried
} MlstmResult;

static size_t mlstm_count(const MlstmCase *c, int which) {
    size_t rows = (size_t)c->B * c->T * c->NH, heads = (size_t)c->B * c->NH;
    size_t counts[NUM_IN] = {rows * c->dk, rows * c->dk,          rows * c->dv,  rows,
                             rows,         heads * c->dk * c->dv, heads * c->dk, heads};
    return counts[which];
}

static MlstmCase mlstm_case(int B, int T, int NH, int dk, int dv, int chunk, int sigmoid, ResetKind resets, int carried,
                            int final_gradient, double eps) {
    MlstmCase c = {B, T, NH, dk, dv, chunk, sigmoid, carried, eps, make_resets(resets, B, T, chunk), {0}, 0, 0, 0};
    static const double mean[NUM_IN] = {0, 0, 0, -0.5, 1.5, 0, 0, 0.2},
                        std[NUM_IN] = {1, 1, 1, 0.8, 1.5, 0.5, 0.5, 0.3};
    for (int k = 0; k < NUM_IN; k++) c.in[k] = normals(mlstm_count(&c, k), mean[k], std[k]);
    if (sigmoid) memset(c.in[IN_M], 0, sizeof(double) * mlstm_count(&c, IN_M));
    c.dh = normals(mlstm_count(&c, IN_V), 0, 1);
    if (final_gradient) {
        c.dC = normals(mlstm_count(&c, IN_C), 0, 1);
        c.dn = normals(mlstm_count(&c, IN_N), 0, 1);
    }
    return c;
}

static void mlstm_case_free(MlstmCase *c) {
    for (int k = 0; k < NUM_IN; k++) free(c->in[k]);
    free(c->resets);
    free(c->dh);
    free(c->dC);
    free(c->dn);
}

static MlstmResult mlstm_result(const MlstmCase *c) {
    MlstmResult r;
    r.h = zeros(mlstm_count(c, IN_V));
    r.sig = zeros(mlstm_count(c, IN_I));
    r.C = zeros(mlstm_count(c, IN_C));
    r.n = zeros(mlstm_count(c, IN_N));
    r.m = zeros(mlstm_count(c, IN_M));
    for (int k = 0; k < NUM_IN; k++) r.d[k] = zeros(mlstm_count(c, k));
    return r;
}

static void mlstm_result_free(MlstmResult *r) {
    double *all[] = {r->h, r->sig, r->C, r->n, r->m};
    for (int k = 0; k < 5; k++) free(all[k]);
    for (int k = 0; k < NUM_IN; k++) free(r->d[k]);
}

// ----------------------------------------------------------------------------------------------------------------
// References, one head of one sequence at a time

typedef struct {  // the inputs of one head; a row of q is q + t * ld_k, of v v + t * ld_v, of the gates i[t * ld]
    int T, dk, dv, sigmoid;
    double scale, eps, m0;
    const double *q, *k, *v, *i, *f, *C0, *n0;
    size_t ld_k, ld_v, ld, at_k, at_v, at, at_C, at_n, at_m;  // at_*: where this head's results belong
    const unsigned char *resets;
} RefHead;

static RefHead ref_head(const MlstmCase *c, int b, int head) {
    RefHead r;
    size_t row = (size_t)b * c->T * c->NH + head, state = (size_t)b * c->NH + head;
    r.T = c->T;
    r.dk = c->dk;
    r.dv = c->dv;
    r.sigmoid = c->sigmoid;
    r.scale = 1 / sqrt(c->dk);
    r.eps = c->eps;
    r.at_k = row * c->dk;
    r.at_v = row * c->dv;
    r.at = row;
    r.at_C = state * c->dk * c->dv;
    r.at_n = state * c->dk;
    r.at_m = state;
    r.q = c->in[IN_Q] + r.at_k;
    r.k = c->in[IN_K] + r.at_k;
    r.v = c->in[IN_V] + r.at_v;
    r.i = c->in[IN_I] + r.at;
    r.f = c->in[IN_F] + r.at;
    r.C0 = c->carried ? c->in[IN_C] + r.at_C : NULL;
    r.n0 = c->in[IN_N] + r.at_n;
    r.m0 = c->carried ? c->in[IN_M][r.at_m] : 0;
    r.ld_k = (size_t)c->NH * c->dk;
    r.ld_v = (size_t)c->NH * c->dv;
    r.ld = c->NH;
    r.resets = c->resets ? c->resets + (size_t)b * c->T : NULL;
    return r;
}

// What token t sees in the parallel form: its own document from token `first` on, and the state before it.
//   D_j = exp(F_t - F_j + i_j - m),  old = exp(F_t - F_(first-1) + m_0 - m), m the largest exponent
// Sums of log forget gates grow with T, their differences do not: F is long double.
static double ref_weights(const RefHead *r, int t, const long double *F, double *D, int *first, double *old) {
    int s = t;
    while (s > 0 && !(r->resets && r->resets[s])) s--;
    int fresh = (r->resets && r->resets[s]) || !r->C0;
    long double before = s > 0 ? F[s - 1] : 0, from_old = F[t] - before + (fresh ? 0 : r->m0), m = from_old;
    for (int j = s; j <= t; j++) {
        long double i = r->sigmoid ? ref_log_sigmoid(r->i[j * r->ld]) : r->i[j * r->ld];
        long double e = F[t] - F[j] + i;
        m = e > m ? e : m;
    }
    if (r->sigmoid) m = 0;
    for (int j = s; j <= t; j++) {
        long double i = r->sigmoid ? ref_log_sigmoid(r->i[j * r->ld]) : r->i[j * r->ld];
        D[j] = (double)expl(F[t] - F[j] + i - m);
    }
    *old = fresh ? 0 : (double)expl(from_old - m);
    *first = s;
    return (double)m;
}

// Parallel form: every token looks at all before it. h, sig and the final states.
static void ref_mlstm_parallel(const MlstmCase *c, MlstmResult *out) {
    long double *F = (long double *)xcalloc((size_t)c->T, sizeof(long double));
    double *D = zeros((size_t)c->T), old;
    for (int task = 0; task < c->B * c->NH; task++) {
        RefHead r = ref_head(c, task / c->NH, task % c->NH);
        int first;
        for (int t = 0; t < r.T; t++) F[t] = (t > 0 ? F[t - 1] : 0) + ref_log_sigmoid(r.f[t * r.ld]);
        for (int t = 0; t < r.T; t++) {
            double m = ref_weights(&r, t, F, D, &first, &old), sig = 0, *h = out->h + r.at_v + t * r.ld_v;
            const double *q = r.q + t * r.ld_k;
            for (int a = 0; a < r.dv; a++) h[a] = 0;
            for (int j = first; j <= t; j++) {
                double W = 0;
                for (int a = 0; a < r.dk; a++) W += q[a] * r.k[j * r.ld_k + a];
                W *= r.scale * D[j];
                sig += W;
                for (int a = 0; a < r.dv; a++) h[a] += W * r.v[j * r.ld_v + a];
            }
            for (int a = 0; old > 0 && a < r.dk; a++) {
                double qa = r.scale * old * q[a];
                sig += qa * r.n0[a];
                for (int e = 0; e < r.dv; e++) h[e] += qa * r.C0[a * r.dv + e];
            }
            double den = r.sigmoid ? 1 : fmax(fabs(sig), exp(-m)) + r.eps;
            for (int a = 0; a < r.dv; a++) h[a] /= den;
            out->sig[r.at + t * r.ld] = sig;
        }
        out->m[r.at_m] = ref_weights(&r, r.T - 1, F, D, &first, &old);
        for (int a = 0; a < r.dk; a++) {
            double *C = out->C + r.at_C + a * r.dv, *n = out->n + r.at_n + a;
            *n = old > 0 ? old * r.n0[a] : 0;
            for (int e = 0; e < r.dv; e++) C[e] = old > 0 ? old * r.C0[a * r.dv + e] : 0;
            for (int j = first; j < r.T; j++) {
                double ka = D[j] * r.k[j * r.ld_k + a];
                *n += ka;
                for (int e = 0; e < r.dv; e++) C[e] += ka * r.v[j * r.ld_v + e];
            }
        }
    }
    free(F);
    free(D);
}

typedef struct {       // all that one step of the recurrence leaves behind
    double *C, *n;     // [T+1][dk, dv], [T+1][dk], the first entry is the initial state
    double *I, *F;     // [T]
    double *den, *ds;  // [T]; ds: 0, or -sign(sig) where sig is the denominator
} RefTrace;

static void ref_mlstm_recurrence(const RefHead *r, const RefTrace *s, MlstmResult *out) {
    int dk = r->dk, dv = r->dv;
    double m = r->m0;
    for (int a = 0; a < dk; a++) {
        s->n[a] = r->C0 ? r->n0[a] : 0;
        for (int e = 0; e < dv; e++) s->C[a * dv + e] = r->C0 ? r->C0[a * dv + e] : 0;
    }
    for (int t = 0; t < r->T; t++) {
        double lf = ref_log_sigmoid(r->f[t * r->ld]), i = r->i[t * r->ld], sig = 0;
        const double *q = r->q + t * r->ld_k, *k = r->k + t * r->ld_k, *v = r->v + t * r->ld_v;
        double *C = s->C + (size_t)(t + 1) * dk * dv, *n = s->n + (size_t)(t + 1) * dk;
        double *h = out->h + r->at_v + t * r->ld_v;
        int fresh = r->resets && r->resets[t];
        if (fresh) m = 0;
        double m_new = r->sigmoid ? 0 : fmax(lf + m, i);
        s->I[t] = r->sigmoid ? 1 / (1 + exp(-i)) : exp(i - m_new);
        s->F[t] = fresh ? 0 : exp(lf + (m - m_new));  // lf may be far below the rounding of m
        m = m_new;
        for (int e = 0; e < dv; e++) h[e] = 0;
        for (int a = 0; a < dk; a++) {
            n[a] = s->F[t] * n[a - dk] + s->I[t] * k[a];
            sig += r->scale * q[a] * n[a];
            for (int e = 0; e < dv; e++) {
                C[a * dv + e] = s->F[t] * C[a * dv + e - dk * dv] + s->I[t] * k[a] * v[e];
                h[e] += r->scale * q[a] * C[a * dv + e];
            }
        }
        s->den[t] = r->sigmoid ? 1 : fmax(fabs(sig), exp(-m)) + r->eps;
        s->ds[t] = r->sigmoid || fabs(sig) <= exp(-m) ? 0 : sig > 0 ? -1 : 1;
        for (int e = 0; e < dv; e++) h[e] /= s->den[t];
        out->sig[r->at + t * r->ld] = sig;
    }
    memcpy(out->C + r->at_C, s->C + (size_t)r->T * dk * dv, sizeof(double) * dk * dv);
    memcpy(out->n + r->at_n, s->n + (size_t)r->T * dk, sizeof(double) * dk);
    out->m[r->at_m] = m;
}

// dC [dk, dv], dn [dk]: gradient of the final states on entry, of the initial ones on return
static void ref_mlstm_bptt(const RefHead *r, const RefTrace *s, const double *dh, double *dC, double *dn,
                           MlstmResult *out) {
    int dk = r->dk, dv = r->dv;
    for (int t = r->T - 1; t >= 0; t--) {
        const double *q = r->q + t * r->ld_k, *k = r->k + t * r->ld_k, *v = r->v + t * r->ld_v;
        const double *C = s->C + (size_t)(t + 1) * dk * dv, *n = s->n + (size_t)(t + 1) * dk;
        const double *C_old = C - dk * dv, *n_old = n - dk;
        const double *h = out->h + r->at_v + t * r->ld_v, *dht = dh + r->at_v + t * r->ld_v;
        double *dq = out->d[IN_Q] + r->at_k + t * r->ld_k, *dk_ = out->d[IN_K] + r->at_k + t * r->ld_k;
        double *dv_ = out->d[IN_V] + r->at_v + t * r->ld_v, ds = 0, dI = 0, dF = 0;
        for (int e = 0; e < dv; e++) ds += s->ds[t] * dht[e] * h[e] / s->den[t];
        for (int e = 0; e < dv; e++) dv_[e] = 0;
        for (int a = 0; a < dk; a++) {
            dq[a] = r->scale * ds * n[a];
            dn[a] += r->scale * ds * q[a];
            dk_[a] = s->I[t] * dn[a];
            dI += dn[a] * k[a];
            dF += dn[a] * n_old[a];
            dn[a] *= s->F[t];
            for (int e = 0; e < dv; e++) {
                double *d = &dC[a * dv + e], de = dht[e] / s->den[t];
                dq[a] += r->scale * C[a * dv + e] * de;
                *d += r->scale * q[a] * de;
                dk_[a] += s->I[t] * *d * v[e];
                dv_[e] += s->I[t] * *d * k[a];
                dI += *d * k[a] * v[e];
                dF += *d * C_old[a * dv + e];
                *d *= s->F[t];
            }
        }
        // dI/di = I, dF/df = F sig(-f); with the sigmoid gate dI/di = I sig(-i)
        out->d[IN_I][r->at + t * r->ld] = dI * s->I[t] / (r->sigmoid ? 1 + exp(r->i[t * r->ld]) : 1);
        out->d[IN_F][r->at + t * r->ld] = dF * s->F[t] / (1 + exp(r->f[t * r->ld]));
    }
}

// Recurrent form and backpropagation through time (with_gradient). m is held constant, as in doc/math.md.
static void ref_mlstm_recurrent(const MlstmCase *c, MlstmResult *out, int with_gradient) {
    size_t T = c->T, dk = c->dk, dv = c->dv;
    RefTrace s = {zeros((T + 1) * dk * dv), zeros((T + 1) * dk), zeros(T), zeros(T), zeros(T), zeros(T)};
    double *dC = zeros(dk * dv), *dn = zeros(dk);
    for (int task = 0; task < c->B * c->NH; task++) {
        RefHead r = ref_head(c, task / c->NH, task % c->NH);
        ref_mlstm_recurrence(&r, &s, out);
        if (!with_gradient) continue;
        memset(dC, 0, sizeof(double) * dk * dv);
        memset(dn, 0, sizeof(double) * dk);
        if (c->dC) {
            memcpy(dC, c->dC + r.at_C, sizeof(double) * dk * dv);
            memcpy(dn, c->dn + r.at_n, sizeof(double) * dk);
        }
        ref_mlstm_bptt(&r, &s, c->dh, dC, dn, out);
        memcpy(out->d[IN_C] + r.at_C, dC, sizeof(double) * dk * dv);
        memcpy(out->d[IN_N] + r.at_n, dn, sizeof(double) * dk);
        double dm = 0;
        for (size_t a = 0; r.C0 && a < dk * dv; a++) dm += r.C0[a] * dC[a];
        for (size_t a = 0; r.C0 && a < dk; a++) dm += r.n0[a] * dn[a];
        out->d[IN_M][r.at_m] = r.sigmoid ? 0 : dm;
    }
    double *all[] = {s.C, s.n, s.I, s.F, s.den, s.ds, dC, dn};
    for (int k = 0; k < 8; k++) free(all[k]);
}

// ----------------------------------------------------------------------------------------------------------------
// The trainer's cell on a case. Inputs and gradients stand in rows with gaps that hold NaN; outputs start as NaN.

typedef struct {
    MlstmShape shape;
    MlstmInput in;
    MlstmGrad grad;
    MlstmState initial, final, dfinal, dinitial;
    real *rows, *gates, *grad_rows, *grad_gates, *h, *dh, *sig, *states, *state_rows[4];
} MlstmRun;

static MlstmState mlstm_state_rows(const MlstmCase *c, real *rows) {
    size_t dkv = (size_t)c->NH * c->dk * c->dv, dk = (size_t)c->NH * c->dk;
    MlstmState s = {rows, rows + dkv, rows + dkv + dk, dkv + dk + c->NH + 2};
    return s;
}

static void mlstm_state_from(const MlstmCase *c, MlstmState s, const double *C, const double *n, const double *m) {
    rows_from(s.C, s.row, C, mlstm_count(c, IN_C), (size_t)c->NH * c->dk * c->dv);
    rows_from(s.n, s.row, n, mlstm_count(c, IN_N), (size_t)c->NH * c->dk);
    if (m) rows_from(s.m, s.row, m, mlstm_count(c, IN_M), c->NH);
}
static void mlstm_state_to(const MlstmCase *c, MlstmState s, double *C, double *n, double *m) {
    rows_to(C, s.C, s.row, mlstm_count(c, IN_C), (size_t)c->NH * c->dk * c->dv);
    rows_to(n, s.n, s.row, mlstm_count(c, IN_N), (size_t)c->NH * c->dk);
    rows_to(m, s.m, s.row, mlstm_count(c, IN_M), c->NH);
}

static MlstmRun mlstm_run(const MlstmCase *c) {
    MlstmRun r;
    size_t rows = (size_t)c->B * c->T, Dk = (size_t)c->NH * c->dk, Dv = (size_t)c->NH * c->dv, NH = c->NH;
    size_t ld = 2 * Dk + Dv + 3, ld_gate = 2 * NH + 1, ld_grad = ld + 2, ld_grad_gate = 2 * NH + 3;
    memset(&r, 0, sizeof r);
    r.shape = (MlstmShape){c->B, c->T, c->NH, c->dk, c->dv, c->chunk, c->sigmoid, (real)c->eps, c->resets};
    r.rows = reals(rows * ld, NAN);
    r.gates = reals(rows * ld_gate, NAN);
    r.grad_rows = reals(rows * ld_grad, NAN);
    r.grad_gates = reals(rows * ld_grad_gate, NAN);
    r.h = reals(rows * Dv, NAN);
    r.dh = reals(rows * Dv, NAN);
    r.sig = reals(rows * NH, NAN);
    r.states = reals(c->B * NH * (mlstm_num_chunks(&r.shape) + 1) * mlstm_state_size(&r.shape), NAN);
    r.in = (MlstmInput){r.rows, r.rows + Dk, r.rows + 2 * Dk, ld, r.gates, r.gates + NH, ld_gate};
    r.grad = (MlstmGrad){r.grad_rows,  r.grad_rows + Dk,  r.grad_rows + 2 * Dk, ld_grad,
                         r.grad_gates, r.grad_gates + NH, ld_grad_gate};
    rows_from(r.rows, ld, c->in[IN_Q], rows * Dk, Dk);
    rows_from(r.rows + Dk, ld, c->in[IN_K], rows * Dk, Dk);
    rows_from(r.rows + 2 * Dk, ld, c->in[IN_V], rows * Dv, Dv);
    rows_from(r.gates, ld_gate, c->in[IN_I], rows * NH, NH);
    rows_from(r.gates + NH, ld_gate, c->in[IN_F], rows * NH, NH);
    copy_to_real(r.dh, c->dh, rows * Dv);
    MlstmState *states[] = {&r.initial, &r.final, &r.dfinal, &r.dinitial};
    for (int k = 0; k < 4; k++) {
        r.state_rows[k] = reals(c->B * (Dk * c->dv + Dk + NH + 2), NAN);
        *states[k] = mlstm_state_rows(c, r.state_rows[k]);
    }
    if (c->carried) mlstm_state_from(c, r.initial, c->in[IN_C], c->in[IN_N], c->in[IN_M]);
    else memset(&r.initial, 0, sizeof r.initial);
    if (c->dC) mlstm_state_from(c, r.dfinal, c->dC, c->dn, NULL);
    else memset(&r.dfinal, 0, sizeof r.dfinal);
    return r;
}

static void mlstm_run_free(MlstmRun *r) {
    real *all[] = {r->rows, r->gates, r->grad_rows, r->grad_gates, r->h, r->dh, r->sig, r->states};
    for (int k = 0; k < 8; k++) free(all[k]);
    for (int k = 0; k < 4; k++) free(r->state_rows[k]);
}

static void mlstm_chunkwise(const MlstmCase *c, MlstmResult *out, int with_gradient) {
    MlstmRun r = mlstm_run(c);
    mlstm_forward(&r.shape, &r.in, r.initial, r.final, r.h, r.sig, r.states);
    copy_from_real(out->h, r.h, mlstm_count(c, IN_V));
    copy_from_real(out->sig, r.sig, mlstm_count(c, IN_I));
    mlstm_state_to(c, r.final, out->C, out->n, out->m);
    if (with_gradient) {
        size_t Dk = (size_t)c->NH * c->dk, Dv = (size_t)c->NH * c->dv;
        MlstmState none = {0};
        mlstm_backward(&r.shape, &r.in, &r.grad, r.dh, r.h, r.sig, r.states, r.dfinal, c->carried ? r.dinitial : none);
        rows_to(out->d[IN_Q], r.grad.dq, r.grad.ld, mlstm_count(c, IN_Q), Dk);
        rows_to(out->d[IN_K], r.grad.dk, r.grad.ld, mlstm_count(c, IN_K), Dk);
        rows_to(out->d[IN_V], r.grad.dv, r.grad.ld, mlstm_count(c, IN_V), Dv);
        rows_to(out->d[IN_I], r.grad.digate, r.grad.ld_gate, mlstm_count(c, IN_I), c->NH);
        rows_to(out->d[IN_F], r.grad.dfgate, r.grad.ld_gate, mlstm_count(c, IN_F), c->NH);
        if (c->carried) mlstm_state_to(c, r.dinitial, out->d[IN_C], out->d[IN_N], out->d[IN_M]);
    }
    mlstm_run_free(&r);
}

// in_place: the final states replace the initial ones in memory, as generation does it
static void mlstm_stepwise(const MlstmCase *c, MlstmResult *out, int in_place) {
    MlstmRun r = mlstm_run(c);
    MlstmState final = in_place && c->carried ? r.initial : r.final;
    mlstm_recurrent(&r.shape, &r.in, r.initial, final, r.h);
    copy_from_real(out->h, r.h, mlstm_count(c, IN_V));
    mlstm_state_to(c, final, out->C, out->n, out->m);
    mlstm_run_free(&r);
}

// Final states mean C e^m: they are compared at the reference's m. So a float m that is off by its rounding is no
// error.
static void worst_of_states(Worst *w, const MlstmCase *c, const MlstmResult *a, const MlstmResult *b) {
    size_t count = mlstm_count(c, IN_C), size = (size_t)c->dk * c->dv;
    double *C = zeros(count), *n = zeros(mlstm_count(c, IN_N));
    for (size_t k = 0; k < count; k++) C[k] = a->C[k] * exp(a->m[k / size] - b->m[k / size]);
    for (size_t k = 0; k < mlstm_count(c, IN_N); k++) n[k] = a->n[k] * exp(a->m[k / c->dk] - b->m[k / c->dk]);
    worst_of(w, distance(C, b->C, count), "C");
    worst_of(w, distance(n, b->n, mlstm_count(c, IN_N)), "n");
    if (IS_DOUBLE) worst_of(w, max_distance(a->m, b->m, mlstm_count(c, IN_M), 1), "m");
    free(C);
    free(n);
}

// Some gradients are sums that cancel: dfgate where nothing is remembered (what reaches a gate is the difference of
// <q, dq> and <k, dk>), dq where h = +-v. What is left of them is measured against 5 % of the largest of the gradients.
static void worst_of_gradients(Worst *w, const MlstmCase *c, const MlstmResult *a, const MlstmResult *b) {
    double size = 0;
    for (int k = 0; k < IN_C; k++) size = fmax(size, magnitude(b->d[k], mlstm_count(c, k)));
    for (int k = 0; k < (c->carried ? NUM_IN : IN_C); k++) {
        if (k == IN_M && c->sigmoid) continue;  // m has no meaning there
        worst_of(w, distance_above(a->d[k], b->d[k], mlstm_count(c, k), fmax(0.05 * size, 1e-30)), mlstm_names[k]);
    }
}

// The smallest distance of a row to the kink of the denominator, as |log(|sig| / e^-m)|; its gradient jumps there.
static double mlstm_kink_distance(const MlstmCase *c, const double *sig) {
    double least = INFINITY;
    for (int task = 0; !c->sigmoid && task < c->B * c->NH; task++) {
        RefHead r = ref_head(c, task / c->NH, task % c->NH);
        double m = r.m0;
        for (int t = 0; t < r.T; t++) {
            if (r.resets && r.resets[t]) m = 0;
            m = fmax(ref_log_sigmoid(r.f[t * r.ld]) + m, r.i[t * r.ld]);
            least = fmin(least, fabs(log(fabs(sig[r.at + t * r.ld])) + m));
        }
    }
    return least;
}

// ----------------------------------------------------------------------------------------------------------------
// Tests

static const char *mlstm_describe(const MlstmCase *c, ResetKind resets) {
    static char text[160];
    snprintf(text, sizeof text, "mLSTM %s T%d L%d B%d heads %d dk%d dv%d resets %s%s%s%s", c->sigmoid ? "sig" : "exp",
             c->T, c->chunk, c->B, c->NH, c->dk, c->dv, reset_names[resets], c->carried ? " carried" : "",
             c->dC ? " final-grad" : "", c->eps > 0 ? " eps" : "");
    return text;
}

static const int head_widths[][2] = {{5, 9}, {11, 6}, {3, 4}, {17, 20}, {1, 1}, {9, 33}};

// Chunkwise = recurrent = parallel, and the chunkwise gradients = backpropagation through time.
static void mlstm_compare_forms(MlstmCase *c, ResetKind resets, double tolerance) {
    MlstmResult ref = mlstm_result(c), out = mlstm_result(c), parallel = mlstm_result(c);
    Worst forward = {0, ""}, backward = {0, ""};
    for (int tries = 0; tries < 20; tries++) {  // draw again what is too near to a kink for float
        ref_mlstm_recurrent(c, &ref, 1);
        if (IS_DOUBLE || mlstm_kink_distance(c, ref.sig) > 1e-5) break;
        free(c->in[IN_I]);
        c->in[IN_I] = normals(mlstm_count(c, IN_I), -0.5, 0.8);
    }
    if (IS_DOUBLE || c->T < 300) ref_mlstm_parallel(c, &parallel);
    else ref_mlstm_recurrent(c, &parallel, 0);
    if (IS_DOUBLE) worst_of(&forward, distance(ref.h, parallel.h, mlstm_count(c, IN_V)), "references");
    mlstm_chunkwise(c, &out, 1);
    worst_of(&forward, distance(out.h, parallel.h, mlstm_count(c, IN_V)), "chunkwise h");
    worst_of_states(&forward, c, &out, &parallel);
    worst_of_gradients(&backward, c, &out, &ref);
    for (size_t k = 0; c->resets && k < mlstm_count(c, IN_F); k++)
        if (c->resets[k / c->NH]) worst_of(&backward, out.d[IN_F][k] == 0 ? 0 : 1, "dfgate of a reset is not 0");
    mlstm_stepwise(c, &out, c->T % 2);
    worst_of(&forward, distance(out.h, parallel.h, mlstm_count(c, IN_V)), "recurrent h");
    worst_of_states(&forward, c, &out, &parallel);
    check(forward.error, tolerance, "%s: h, states (%s)", mlstm_describe(c, resets), forward.where);
    check(backward.error, tolerance, "%s: gradients (%s)", mlstm_describe(c, resets), backward.where);
    mlstm_result_free(&ref);
    mlstm_result_free(&out);
    mlstm_result_free(&parallel);
}

static void test_mlstm_forms(void) {
    static const int Ts[] = {1, 2, 3, 31, 32, 33, 64, 65, 200, 256}, chunks[] = {1, 7, 16, 31, 32, 33, 64, 100, 256};
    static const int levels[] = {10, 9, 3, 2, NUM_RESET_KINDS, 2, 2, 2};
    Grid grid = pair_grid(8, levels);
    for (int k = 0; k < grid.count; k++) {
        const int *o = grid.level[k], *width = head_widths[k % 6];
        MlstmCase c = mlstm_case(1 + k % 2, Ts[o[0]], o[2] + 1, width[0], width[1], chunks[o[1]], o[3], (ResetKind)o[4],
                                 o[5], o[6], o[7] ? 1e-6 : 0);
        mlstm_compare_forms(&c, (ResetKind)o[4], IS_DOUBLE ? 1e-12 : 1e-5);
        mlstm_case_free(&c);
    }
    MlstmCase c = mlstm_case(3, 70, 3, 5, 9, 16, 0, RESET_RANDOM, 1, 1, 1e-6);
    MlstmResult one = mlstm_result(&c), three = mlstm_result(&c);
    mlstm_chunkwise(&c, &one, 1);
    use_three_threads(1);
    mlstm_chunkwise(&c, &three, 1);
    use_three_threads(0);
    double different = differing(one.h, three.h, mlstm_count(&c, IN_V));
    for (int k = 0; k < NUM_IN; k++) different += differing(one.d[k], three.d[k], mlstm_count(&c, k));
    check(different, 0, "%s: the same bits with 3 threads", mlstm_describe(&c, RESET_RANDOM));
    mlstm_result_free(&one);
    mlstm_result_free(&three);
    mlstm_case_free(&c);
    for (int sigmoid = 0; sigmoid < 2; sigmoid++) {  // sums of log forget gates far larger than their differences
        c = mlstm_case(1, 256, 2, 8, 10, 256, sigmoid, RESET_NONE, 1, 0, 1e-6);
        for (size_t k = 0; k < mlstm_count(&c, IN_F); k++) c.in[IN_F][k] = k / c.NH < 32 ? -40 : c.in[IN_F][k] + 1;
        mlstm_compare_forms(&c, RESET_NONE, IS_DOUBLE ? 1e-12 : 1e-5);
        mlstm_case_free(&c);
    }
    for (int k = 0; k < 6; k++) {
        static const int long_T[] = {1000, 2048, 4096}, long_chunk[] = {64, 100, 256};
        ResetKind resets = k < 4 ? RESET_NONE : RESET_ADJACENT;
        c = mlstm_case(1, long_T[k % 3], 2, 8, 10, long_chunk[k % 3], k % 2, resets, k < 3, k >= 2, 1e-6);
        mlstm_compare_forms(&c, resets, IS_DOUBLE ? 1e-12 : 1e-4);
        mlstm_case_free(&c);
    }
}

// Gates at the ends of their range. size: 15, the cap of mlstm, or 100 for mlstm_v1, which has none. With e^-m down to
// e^-100 any q.n near 0 would be divided by: q and k are made positive, so that the result is well defined.
static void mlstm_fill_extreme(MlstmCase *c, int pattern, double size) {
    for (size_t k = 0; k < mlstm_count(c, IN_Q); k++) {
        c->in[IN_Q][k] = fabs(c->in[IN_Q][k]);
        c->in[IN_K][k] = fabs(c->in[IN_K][k]);
    }
    for (size_t k = 0; k < mlstm_count(c, IN_N); k++) c->in[IN_N][k] = fabs(c->in[IN_N][k]);
    draw++;
    for (size_t k = 0; k < mlstm_count(c, IN_I); k++) {
        int t = (int)(k / c->NH) % c->T;
        double *i = &c->in[IN_I][k], *f = &c->in[IN_F][k];
        if (pattern < 4) {
            *i = pattern & 1 ? size : -size;
            *f = pattern & 2 ? size : -size;
        } else if (pattern == 4) {
            *i = random_uniform(2 * k) < 0.5 ? size : -size;
            *f = random_uniform(2 * k + 1) < 0.5 ? size : -size;
        } else if (pattern == 5) {  // long runs
            *i = t / 40 % 2 ? size : -size;
            *f = t / 70 % 2 ? size : -size;
        } else {  // anything in the range
            *i = (float)(size * (2 * random_uniform(2 * k) - 1));
            *f = (float)(size * (2 * random_uniform(2 * k + 1) - 1));
        }
    }
}

static void test_mlstm_extreme(void) {
    static const char *const patterns[] = {"i- f-", "i+ f-", "i- f+", "i+ f+", "random +-", "runs", "range"};
    for (int k = 0; k < 28; k++) {
        int pattern = k % 7, sigmoid = k / 7 % 2, chunk = k % 2 ? 64 : 7;
        double size = k < 14 ? 15 : 100;
        Worst w = {0, ""};
        MlstmCase c =
            mlstm_case(1, 300, 2, 6, 5, chunk, sigmoid, k % 3 ? RESET_NONE : RESET_ADJACENT, k % 2, k % 2, 1e-6);
        mlstm_fill_extreme(&c, pattern, size);
        MlstmResult ref = mlstm_result(&c), out = mlstm_result(&c);
        ref_mlstm_recurrent(&c, &ref, 1);
        mlstm_chunkwise(&c, &out, 1);
        worst_of(&w, distance(out.h, ref.h, mlstm_count(&c, IN_V)), "chunkwise h");
        worst_of_states(&w, &c, &out, &ref);
        worst_of_gradients(&w, &c, &out, &ref);
        mlstm_stepwise(&c, &out, 0);
        worst_of(&w, distance(out.h, ref.h, mlstm_count(&c, IN_V)), "recurrent h");
        worst_of_states(&w, &c, &out, &ref);
        check(w.error, IS_DOUBLE ? 1e-12 : 1e-4, "mLSTM %s gates +-%.0f %s L%d (%s)", sigmoid ? "sig" : "exp", size,
              patterns[pattern], chunk, w.where);
        mlstm_result_free(&ref);
        mlstm_result_free(&out);
        mlstm_case_free(&c);
    }
}

// Tokens t0 .. t1 of a case as a case of its own, continuing from `before` (NULL: as the whole case starts).
static MlstmCase mlstm_slice(const MlstmCase *c, int t0, int t1, const MlstmResult *before) {
    MlstmCase s = *c;
    s.T = t1 - t0;
    s.dC = s.dn = NULL;
    s.resets = c->resets ? (unsigned char *)xcalloc((size_t)c->B * s.T, 1) : NULL;
    for (int b = 0; c->resets && b < c->B; b++) memcpy(s.resets + b * s.T, c->resets + b * c->T + t0, (size_t)s.T);
    const double *tokens[] = {c->in[IN_Q], c->in[IN_K], c->in[IN_V], c->in[IN_I], c->in[IN_F], c->dh};
    double **to[] = {&s.in[IN_Q], &s.in[IN_K], &s.in[IN_V], &s.in[IN_I], &s.in[IN_F], &s.dh};
    for (int k = 0; k < 6; k++) {
        size_t width = mlstm_count(c, k < 5 ? k : IN_V) / ((size_t)c->B * c->T);  // dh is as wide as v
        *to[k] = zeros((size_t)c->B * s.T * width);
        for (int b = 0; b < c->B; b++)
            memcpy(*to[k] + b * s.T * width, tokens[k] + ((size_t)b * c->T + t0) * width, sizeof(double) * s.T * width);
    }
    const double *states[] = {before ? before->C : c->in[IN_C], before ? before->n : c->in[IN_N],
                              before ? before->m : c->in[IN_M]};
    for (int k = IN_C; k < NUM_IN; k++) {
        s.in[k] = zeros(mlstm_count(c, k));
        memcpy(s.in[k], states[k - IN_C], sizeof(double) * mlstm_count(c, k));
    }
    if (before) s.carried = 1;
    return s;
}

static void mlstm_unslice(const MlstmCase *c, double *to, const double *from, int t0, int t1, size_t width) {
    for (int b = 0; b < c->B; b++)
        memcpy(to + ((size_t)b * c->T + t0) * width, from + (size_t)b * (t1 - t0) * width,
               sizeof(double) * (t1 - t0) * width);
}

// Runs the case in pieces that end at ends[0] < ends[1] < ... = T, states passed forwards and their gradients
// backwards.
static void mlstm_in_pieces(const MlstmCase *c, const int *ends, int count, MlstmResult *out, int with_gradient) {
    MlstmCase *piece = (MlstmCase *)xcalloc((size_t)count, sizeof(MlstmCase));
    MlstmResult *result = (MlstmResult *)xcalloc((size_t)count, sizeof(MlstmResult));
    for (int p = 0; p < count; p++) {
        int t0 = p ? ends[p - 1] : 0;
        piece[p] = mlstm_slice(c, t0, ends[p], p ? &result[p - 1] : NULL);
        result[p] = mlstm_result(&piece[p]);
        mlstm_chunkwise(&piece[p], &result[p], 0);
        mlstm_unslice(c, out->h, result[p].h, t0, ends[p], (size_t)c->NH * c->dv);
    }
    size_t dkv = mlstm_count(c, IN_C), dk = mlstm_count(c, IN_N);
    memcpy(out->C, result[count - 1].C, sizeof(double) * dkv);
    memcpy(out->n, result[count - 1].n, sizeof(double) * dk);
    memcpy(out->m, result[count - 1].m, sizeof(double) * mlstm_count(c, IN_M));
    for (int p = count - 1; with_gradient && p >= 0; p--) {
        const double *dC = p == count - 1 ? c->dC : result[p + 1].d[IN_C];
        const double *dn = p == count - 1 ? c->dn : result[p + 1].d[IN_N];
        if (dC) {
            piece[p].dC = (double *)memcpy(zeros(dkv), dC, sizeof(double) * dkv);
            piece[p].dn = (double *)memcpy(zeros(dk), dn, sizeof(double) * dk);
        }
        mlstm_chunkwise(&piece[p], &result[p], 1);
        for (int k = IN_Q; k <= IN_F; k++)
            mlstm_unslice(c, out->d[k], result[p].d[k], p ? ends[p - 1] : 0, ends[p],
                          mlstm_count(c, k) / ((size_t)c->B * c->T));
    }
    for (int k = IN_C; with_gradient && k < NUM_IN; k++)
        memcpy(out->d[k], result[0].d[k], sizeof(double) * mlstm_count(c, k));
    for (int p = 0; p < count; p++) {
        mlstm_case_free(&piece[p]);
        mlstm_result_free(&result[p]);
    }
    free(piece);
    free(result);
}

static void test_mlstm_split(void) {
    for (int k = 0; k < 2 * NUM_SPLITS; k++) {
        int split = k / 2, chunk = k % 3 == 0 ? 16 : k % 3 == 1 ? 7 : 64;
        ResetKind resets = k % 3 == 2 ? RESET_RANDOM : k % 3 == 1 ? RESET_BORDERS : RESET_NONE;
        MlstmCase c = mlstm_case(2, SPLIT_T, 2, 5, 9, chunk, k % 2, resets, k % 4 < 2, k % 5 < 3, 1e-6);
        MlstmResult one = mlstm_result(&c), pieces = mlstm_result(&c);
        Worst w = {0, ""};
        mlstm_chunkwise(&c, &one, 1);
        mlstm_in_pieces(&c, splits[split], split_count(split), &pieces, 1);
        worst_of(&w, distance(pieces.h, one.h, mlstm_count(&c, IN_V)), "h");
        worst_of_states(&w, &c, &pieces, &one);
        worst_of_gradients(&w, &c, &pieces, &one);
        check(w.error, IS_DOUBLE ? 1e-12 : 1e-5, "%s in %d pieces, first of %d (%s)", mlstm_describe(&c, resets),
              split_count(split), splits[split][0], w.where);
        mlstm_result_free(&one);
        mlstm_result_free(&pieces);
        mlstm_case_free(&c);
    }
}

// 10,000 tokens with gates at the cap: one run, the same in pieces with carried states, and the reference.
static void test_mlstm_long(void) {
    enum { T = 10000 };
    static const int lengths[] = {1, 63, 64, 65, 500, 1307, 2};
    int ends[200], count = 0, end = 0;
    while (end < T) ends[count] = imin(T, end + lengths[count % 7]), end = ends[count++];
    for (int k = 0; k < 8; k++) {
        static const char *const gates[] = {"ordinary", "i+ f+", "random +-", "runs"};
        static const int pattern[] = {-1, 3, 4, 5};
        MlstmCase c = mlstm_case(1, T, 1, 4, 6, 64, k / 4, RESET_NONE, 0, 0, 1e-6);
        if (k % 4 > 0) mlstm_fill_extreme(&c, pattern[k % 4], 15);
        MlstmResult ref = mlstm_result(&c), one = mlstm_result(&c), pieces = mlstm_result(&c);
        Worst right = {0, ""}, same = {0, ""};
        ref_mlstm_recurrent(&c, &ref, 1);
        mlstm_chunkwise(&c, &one, 1);
        mlstm_in_pieces(&c, ends, count, &pieces, 0);
        worst_of(&right, distance(one.h, ref.h, mlstm_count(&c, IN_V)), "h");
        worst_of_states(&right, &c, &one, &ref);
        worst_of_gradients(&right, &c, &one, &ref);
        worst_of(&same, distance(pieces.h, one.h, mlstm_count(&c, IN_V)), "h");
        worst_of_states(&same, &c, &pieces, &one);
        check(right.error, IS_DOUBLE ? 1e-12 : 1e-4, "mLSTM %s %d tokens, gates %s: right (%s)", k < 4 ? "exp" : "sig",
              T, gates[k % 4], right.where);
        check(same.error, IS_DOUBLE ? 1e-12 : 1e-4, "mLSTM %s %d tokens, gates %s: carried over %d pieces (%s)",
              k < 4 ? "exp" : "sig", T, gates[k % 4], count, same.where);
        mlstm_result_free(&ref);
        mlstm_result_free(&one);
        mlstm_result_free(&pieces);
        mlstm_case_free(&c);
    }
}

#ifdef REAL_DOUBLE
typedef struct {
    MlstmCase *c;
    MlstmResult *out;
    const double *m;  // scale of the final states at which their gradients hold; NULL: not yet known
} MlstmLoss;

// sum dh h + dC C + dn n with the final states at the fixed scale m
static double mlstm_loss(void *context, uint64_t *branches) {
    MlstmLoss *x = (MlstmLoss *)context;
    const MlstmCase *c = x->c;
    const MlstmResult *r = x->out;
    long double sum = 0;
    mlstm_chunkwise(c, x->out, 0);
    for (size_t k = 0; k < mlstm_count(c, IN_V); k++) sum += (long double)c->dh[k] * r->h[k];
    size_t size = (size_t)c->dk * c->dv;
    for (size_t k = 0; c->dC && k < mlstm_count(c, IN_C); k++)
        sum += (long double)c->dC[k] * r->C[k] * expl(r->m[k / size] - x->m[k / size]);
    for (size_t k = 0; c->dC && k < mlstm_count(c, IN_N); k++)
        sum += (long double)c->dn[k] * r->n[k] * expl(r->m[k / c->dk] - x->m[k / c->dk]);
    uint64_t hash = 1469598103934665603u;
    for (int task = 0; !c->sigmoid && task < c->B * c->NH; task++) {
        RefHead h = ref_head(c, task / c->NH, task % c->NH);
        double m = h.m0;
        for (int t = 0; t < h.T; t++) {
            if (h.resets && h.resets[t]) m = 0;
            m = fmax(ref_log_sigmoid(h.f[t * h.ld]) + m, h.i[t * h.ld]);
            double sig = r->sig[h.at + t * h.ld];
            hash = (hash ^ (uint64_t)(fabs(sig) <= exp(-m) ? 0 : sig > 0 ? 1 : 2)) * 1099511628211u;
        }
    }
    *branches = hash;
    return (double)sum;
}

static void mlstm_gradient_case(MlstmCase *c, ResetKind resets, double tolerance) {
    MlstmResult base = mlstm_result(c), out = mlstm_result(c);
    Worst w = {0, ""};
    mlstm_chunkwise(c, &base, 1);
    MlstmLoss loss = {c, &out, base.m};
    for (int k = 0; k < (c->carried ? NUM_IN : IN_C); k++) {
        if (k == IN_M && c->sigmoid) continue;
        worst_of(&w, gradient_error(mlstm_loss, &loss, c->in[k], base.d[k], mlstm_count(c, k), 20, 1e-5),
                 mlstm_names[k]);
    }
    check(w.error, tolerance, "%s: finite differences (%s)", mlstm_describe(c, resets), w.where);
    mlstm_result_free(&base);
    mlstm_result_free(&out);
}

static void test_mlstm_gradient(void) {
    static const int Ts[] = {1, 2, 3, 63, 64, 65, 200}, chunks[] = {1, 7, 16, 64},
                     levels[] = {7, 4, 3, 2, NUM_RESET_KINDS, 2, 2};
    Grid grid = pair_grid(7, levels);
    for (int k = 0; k < grid.count; k++) {
        const int *o = grid.level[k], *width = head_widths[k % 6];
        MlstmCase c = mlstm_case(Ts[o[0]] < 64 ? 2 : 1, Ts[o[0]], o[2] + 1, width[0], width[1], chunks[o[1]], o[3],
                                 (ResetKind)o[4], o[5], o[6], 0);
        mlstm_gradient_case(&c, (ResetKind)o[4], 1e-6);
        mlstm_case_free(&c);
    }
    for (int k = 0; k < 2; k++) {  // with eps, m is not quite a constant
        MlstmCase c = mlstm_case(2, 65, 2, 5, 9, 16, 0, k ? RESET_RANDOM : RESET_NONE, 1, 1, 1e-6);
        mlstm_gradient_case(&c, k ? RESET_RANDOM : RESET_NONE, 1e-4);
        mlstm_case_free(&c);
    }
}
#endif
