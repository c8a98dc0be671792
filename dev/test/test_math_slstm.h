// test_math_slstm.h: tests of the sLSTM cell, part of test_xlstm.c. As for the mLSTM, the reference (the recurrence and
// backpropagation through it) is written once more here, in double.

enum { IN_SX, IN_SR, IN_SB, IN_SY, IN_SC, IN_SN, IN_SM, NUM_SIN };
static const char *const slstm_names[NUM_SIN] = {"dx", "dR", "dbias", "dy0", "dc0", "dn0", "dm0"};

typedef struct {
    int B, T, NH, d, carried;
    unsigned char *resets;
    double *in[NUM_SIN];     // x [B, T, NH, 4, d], R [NH, d, 4d], bias [NH, 4, d], states [B, NH, d]
    double *dy, *dfinal[3];  // [B, T, NH, d]; gradients of the final y, c, n [B, NH, d], NULL: none
} SlstmCase;

typedef struct {
    double *y, *final[4];  // final y, c, n, m
    double *d[NUM_SIN];
} SlstmResult;

static size_t slstm_count(const SlstmCase *c, int which) {
    size_t D = (size_t)c->NH * c->d;
    size_t counts[] = {(size_t)c->B * c->T * 4 * D, 4 * D * c->d, 4 * D, c->B * D};
    return counts[which < IN_SY ? which : IN_SY];
}
static size_t slstm_outputs(const SlstmCase *c) { return slstm_count(c, IN_SX) / 4; }

static SlstmCase slstm_case(int B, int T, int NH, int d, ResetKind resets, int carried, int final_gradient) {
    SlstmCase c = {B, T, NH, d, carried, make_resets(resets, B, T, 16), {0}, NULL, {0}};
    static const double std[NUM_SIN] = {1, 0, 0.5, 0.5, 0.7, 0.1, 0.3};
    for (int k = 0; k < NUM_SIN; k++)
        c.in[k] = normals(slstm_count(&c, k), k == IN_SN ? 1.3 : 0, k == IN_SR ? 0.8 / sqrt(d) : std[k]);
    c.dy = normals(slstm_outputs(&c), 0, 1);
    for (int k = 0; final_gradient && k < 3; k++) c.dfinal[k] = normals(slstm_count(&c, IN_SY), 0, 1);
    return c;
}

static void slstm_case_free(SlstmCase *c) {
    for (int k = 0; k < NUM_SIN; k++) free(c->in[k]);
    for (int k = 0; k < 3; k++) free(c->dfinal[k]);
    free(c->dy);
    free(c->resets);
}

static SlstmResult slstm_result(const SlstmCase *c) {
    SlstmResult r;
    r.y = zeros(slstm_outputs(c));
    for (int k = 0; k < 4; k++) r.final[k] = zeros(slstm_count(c, IN_SY));
    for (int k = 0; k < NUM_SIN; k++) r.d[k] = zeros(slstm_count(c, k));
    return r;
}

static void slstm_result_free(SlstmResult *r) {
    free(r->y);
    for (int k = 0; k < 4; k++) free(r->final[k]);
    for (int k = 0; k < NUM_SIN; k++) free(r->d[k]);
}

// The textbook recurrence and backpropagation through it, one head of one sequence. States [2T][d]: entry 2t enters
// token t, 2t+1 leaves it; gates [T][4, d]: I, F, z, o.
typedef struct {
    double *y, *c, *n, *m, *gates;
} RefUnits;

static void ref_slstm_recurrence(const SlstmCase *c, int b, int head, const RefUnits *s, SlstmResult *out) {
    int d = c->d;
    size_t D = (size_t)c->NH * d, at = (size_t)head * d;
    const double *R = c->in[IN_SR] + 4 * at * d, *bias = c->in[IN_SB] + 4 * at;
    double *state[] = {s->y, s->c, s->n, s->m};
    for (int t = 0; t < c->T; t++) {
        size_t row = (size_t)b * c->T + t;
        const double *y = s->y + (size_t)2 * t * d;
        int fresh = (c->resets && c->resets[row]) || (t == 0 && !c->carried);
        for (int k = 0; k < 4; k++)
            for (int j = 0; j < d; j++) {
                double *enter = state[k] + (size_t)2 * t * d + j;
                *enter = fresh ? 0 : t == 0 ? c->in[IN_SY + k][b * D + at + j] : enter[-d];
            }
        for (int j = 0; j < d; j++) {
            size_t now = (size_t)2 * t * d + j, next = now + d;
            double r[4];
            for (int g = 0; g < 4; g++) {
                r[g] = c->in[IN_SX][(row * D + at) * 4 + g * d + j] + bias[g * d + j];
                for (int i = 0; i < d; i++) r[g] += y[i] * R[(i * 4 + g) * d + j];
            }
            int empty = s->n[now] == 0;
            double lf = ref_log_sigmoid(r[1]), m = empty ? r[0] : fmax(r[0], s->m[now] + lf);
            double I = exp(r[0] - m), F = empty ? 0 : exp(lf + (s->m[now] - m)), z = tanh(r[2]),
                   o = 1 / (1 + exp(-r[3]));
            s->c[next] = F * s->c[now] + I * z;
            s->n[next] = F * s->n[now] + I;
            s->m[next] = m;
            s->y[next] = o * s->c[next] / s->n[next];
            double gates[4] = {I, F, z, o};
            for (int g = 0; g < 4; g++) s->gates[(size_t)t * 4 * d + g * d + j] = gates[g];
            out->y[row * D + at + j] = s->y[next];
        }
    }
    for (int k = 0; k < 4; k++)
        memcpy(out->final[k] + b * D + at, state[k] + (size_t)(2 * c->T - 1) * d, sizeof(double) * d);
}

static void ref_slstm_bptt(const SlstmCase *c, int b, int head, const RefUnits *s, double *work, SlstmResult *out) {
    int d = c->d;
    size_t D = (size_t)c->NH * d, at = (size_t)head * d;
    const double *R = c->in[IN_SR] + 4 * at * d;
    double *dR = out->d[IN_SR] + 4 * at * d, *dbias = out->d[IN_SB] + 4 * at;
    double *dy = work, *dc = dy + d, *dn = dc + d, *dy_old = dn + d, *carried[] = {dy, dc, dn};
    for (int k = 0; k < 3; k++)
        for (int j = 0; j < d; j++) carried[k][j] = c->dfinal[k] ? c->dfinal[k][b * D + at + j] : 0;
    for (int t = c->T - 1; t >= 0; t--) {
        size_t row = (size_t)b * c->T + t;
        const double *y_old = s->y + (size_t)2 * t * d;
        int fresh = c->resets && c->resets[row];
        memset(dy_old, 0, sizeof(double) * d);
        for (int j = 0; j < d; j++) {
            size_t now = (size_t)2 * t * d + j, next = now + d;
            const double *gates = s->gates + (size_t)t * 4 * d + j;
            double I = gates[0], F = gates[d], z = gates[2 * d], o = gates[3 * d], n = s->n[next], cell = s->c[next];
            double g_y = dy[j] + c->dy[row * D + at + j], r_f = c->in[IN_SX][(row * D + at) * 4 + d + j];
            r_f += c->in[IN_SB][4 * at + d + j];
            for (int i = 0; i < d; i++) r_f += y_old[i] * R[(i * 4 + 1) * d + j];
            double g_c = dc[j] + g_y * o / n, g_n = dn[j] - g_y * o * cell / (n * n);
            double dr[4] = {I * (z * g_c + g_n), F * (s->c[now] * g_c + s->n[now] * g_n) / (1 + exp(r_f)),
                            I * (1 - z * z) * g_c, g_y * cell / n * o * (1 - o)};
            dc[j] = F * g_c;
            dn[j] = F * g_n;
            for (int g = 0; g < 4; g++) {
                out->d[IN_SX][(row * D + at) * 4 + g * d + j] = dr[g];
                dbias[g * d + j] += dr[g];
                for (int i = 0; i < d; i++) {
                    dR[(i * 4 + g) * d + j] += y_old[i] * dr[g];
                    dy_old[i] += R[(i * 4 + g) * d + j] * dr[g];
                }
            }
        }
        for (int j = 0; j < d; j++) dy[j] = fresh ? 0 : dy_old[j];
    }
    for (int j = 0; j < d; j++) {
        for (int k = 0; k < 3; k++) out->d[IN_SY + k][b * D + at + j] = carried[k][j];
        out->d[IN_SM][b * D + at + j] =
            c->carried ? c->in[IN_SC][b * D + at + j] * dc[j] + c->in[IN_SN][b * D + at + j] * dn[j] : 0;
    }
}

static void ref_slstm(const SlstmCase *c, SlstmResult *out) {
    size_t d = c->d, states = (size_t)2 * c->T * d;
    RefUnits s = {zeros(states), zeros(states), zeros(states), zeros(states), zeros(4 * states)};
    double *work = zeros(4 * d);
    memset(out->d[IN_SR], 0, sizeof(double) * slstm_count(c, IN_SR));
    memset(out->d[IN_SB], 0, sizeof(double) * slstm_count(c, IN_SB));
    for (int task = 0; task < c->B * c->NH; task++) {
        ref_slstm_recurrence(c, task / c->NH, task % c->NH, &s, out);
        ref_slstm_bptt(c, task / c->NH, task % c->NH, &s, work, out);
    }
    double *all[] = {s.y, s.c, s.n, s.m, s.gates, work};
    for (int k = 0; k < 6; k++) free(all[k]);
}

static SlstmState slstm_state_rows(const SlstmCase *c, real *rows) {
    size_t D = (size_t)c->NH * c->d;
    SlstmState s = {rows, rows + D, rows + 2 * D, rows + 3 * D, 4 * D + 3};
    return s;
}

// The trainer's cell. x and the saved gates share memory, as in the model.
static void slstm_cell(const SlstmCase *c, SlstmResult *out, int with_gradient) {
    size_t D = (size_t)c->NH * c->d, rows = (size_t)c->B * c->T, nx = slstm_count(c, IN_SX);
    SlstmShape shape = {c->B, c->T, c->NH, c->d, c->resets};
    real *x = reals(nx, NAN), *R = reals(slstm_count(c, IN_SR), NAN), *bias = reals(4 * D, NAN),
         *y = reals(rows * D, NAN);
    real *saved_rows[4], *state_rows[4];
    for (int k = 0; k < 4; k++) {
        saved_rows[k] = reals(rows * D, NAN);
        state_rows[k] = reals(c->B * (4 * D + 3), NAN);
    }
    SlstmSaved saved = {x, saved_rows[0], saved_rows[1], saved_rows[2], saved_rows[3]};
    SlstmState none = {0}, initial = slstm_state_rows(c, state_rows[0]), final = slstm_state_rows(c, state_rows[1]);
    SlstmState dfinal = slstm_state_rows(c, state_rows[2]), dinitial = slstm_state_rows(c, state_rows[3]);
    copy_to_real(x, c->in[IN_SX], nx);
    copy_to_real(R, c->in[IN_SR], slstm_count(c, IN_SR));
    copy_to_real(bias, c->in[IN_SB], 4 * D);
    for (int k = 0; k < 4; k++) rows_from(state_rows[0] + k * D, initial.row, c->in[IN_SY + k], c->B * D, D);
    for (int k = 0; k < 3 && c->dfinal[0]; k++) rows_from(state_rows[2] + k * D, dfinal.row, c->dfinal[k], c->B * D, D);
    slstm_forward(&shape, x, R, bias, c->carried ? initial : none, final, y, &saved);
    copy_from_real(out->y, y, rows * D);
    for (int k = 0; k < 4; k++) rows_to(out->final[k], state_rows[1] + k * D, final.row, c->B * D, D);
    if (with_gradient) {
        real *dy = reals(rows * D, NAN), *dx = reals(nx, NAN), *dR = reals(slstm_count(c, IN_SR), 0.5);
        real *dbias = reals(4 * D, 0.25), *partial = reals(MAX_PARTS * 4 * D, NAN);
        copy_to_real(dy, c->dy, rows * D);
        slstm_backward(&shape, R, &saved, dy, c->carried ? initial : none, c->dfinal[0] ? dfinal : none,
                       c->carried ? dinitial : none, dx, dR, dbias, partial);
        copy_from_real(out->d[IN_SX], dx, nx);
        copy_from_real(out->d[IN_SR], dR, slstm_count(c, IN_SR));
        copy_from_real(out->d[IN_SB], dbias, 4 * D);
        for (size_t k = 0; k < slstm_count(c, IN_SR); k++) out->d[IN_SR][k] -= 0.5;  // they are added to
        for (size_t k = 0; k < 4 * D; k++) out->d[IN_SB][k] -= 0.25;
        for (int k = 0; k < 4 && c->carried; k++)
            rows_to(out->d[IN_SY + k], state_rows[3] + k * D, dinitial.row, c->B * D, D);
        real *all[] = {dy, dx, dR, dbias, partial};
        for (int k = 0; k < 5; k++) free(all[k]);
    }
    real *all[] = {x, R, bias, y};
    for (int k = 0; k < 4; k++) {
        free(all[k]);
        free(saved_rows[k]);
        free(state_rows[k]);
    }
}

static const char *slstm_describe(const SlstmCase *c, ResetKind resets) {
    static char text[160];
    snprintf(text, sizeof text, "sLSTM T%d B%d heads %d d%d resets %s%s%s", c->T, c->B, c->NH, c->d,
             reset_names[resets], c->carried ? " carried" : "", c->dfinal[0] ? " final-grad" : "");
    return text;
}

static void worst_of_slstm(Worst *w, const SlstmCase *c, const SlstmResult *a, const SlstmResult *b) {
    static const char *const finals[] = {"y_T", "c_T", "n_T"};
    size_t count = slstm_count(c, IN_SY);
    double *state = zeros(count);
    worst_of(w, distance(a->y, b->y, slstm_outputs(c)), "y");
    for (int k = 0; k < 3; k++) {  // c and n at the scale m of the reference
        for (size_t j = 0; j < count; j++) state[j] = a->final[k][j] * (k ? exp(a->final[3][j] - b->final[3][j]) : 1);
        worst_of(w, distance(state, b->final[k], count), finals[k]);
    }
    free(state);
    for (int k = 0; k < (c->carried ? NUM_SIN : IN_SY); k++)
        worst_of(w, distance(a->d[k], b->d[k], slstm_count(c, k)), slstm_names[k]);
}

static void slstm_against_reference(const SlstmCase *c, ResetKind resets, double tolerance, const char *what) {
    SlstmResult ref = slstm_result(c), out = slstm_result(c);
    Worst w = {0, ""};
    ref_slstm(c, &ref);
    slstm_cell(c, &out, 1);
    worst_of_slstm(&w, c, &out, &ref);
    check(w.error, tolerance, "%s%s: y, states, gradients (%s)", slstm_describe(c, resets), what, w.where);
    slstm_result_free(&ref);
    slstm_result_free(&out);
}

static void test_slstm_forms(void) {
    static const int Ts[] = {1, 2, 3, 63, 64, 65, 200}, Bs[] = {1, 2, 4, 5, 9}, ds[] = {1, 3, 5, 10, 17};
    static const int levels[] = {7, 5, 5, 3, NUM_RESET_KINDS, 2, 2};
    Grid grid = pair_grid(7, levels);
    for (int k = 0; k < grid.count; k++) {
        const int *o = grid.level[k];
        SlstmCase c = slstm_case(Bs[o[1]], Ts[o[0]], o[3] + 1, ds[o[2]], (ResetKind)o[4], o[5], o[6]);
        slstm_against_reference(&c, (ResetKind)o[4], IS_DOUBLE ? 1e-12 : 1e-5, "");
        slstm_case_free(&c);
    }
    SlstmCase c = slstm_case(9, 70, 3, 5, RESET_RANDOM, 1, 1);
    SlstmResult one = slstm_result(&c), three = slstm_result(&c);
    slstm_cell(&c, &one, 1);
    use_three_threads(1);
    slstm_cell(&c, &three, 1);
    use_three_threads(0);
    double different = differing(one.y, three.y, slstm_outputs(&c));
    for (int k = 0; k < NUM_SIN; k++) different += differing(one.d[k], three.d[k], slstm_count(&c, k));
    check(different, 0, "%s: the same bits with 3 threads", slstm_describe(&c, RESET_RANDOM));
    slstm_result_free(&one);
    slstm_result_free(&three);
    slstm_case_free(&c);
    c = slstm_case(2, 4096, 2, 5, RESET_NONE, 1, 1);
    slstm_against_reference(&c, RESET_NONE, IS_DOUBLE ? 1e-12 : 1e-4, "");
    slstm_case_free(&c);
}

static void test_slstm_extreme(void) {
    for (int k = 0; k < 10; k++) {
        double size = k < 5 ? 15 : 100;
        char what[40];
        SlstmCase c = slstm_case(2, 200, 2, 5, k % 2 ? RESET_RANDOM : RESET_NONE, k % 2, k % 2);
        draw++;
        for (size_t at = 0; at < slstm_count(&c, IN_SX); at++) {
            int gate = (int)(at / c.d) % 4;
            int positive = k % 5 == 4 ? random_uniform(at) < 0.5 : gate == 0 ? k & 1 : k >> 1 & 1;
            if (gate < 2 || k % 5 == 4) c.in[IN_SX][at] = positive ? size : -size;
        }
        snprintf(what, sizeof what, ", gates +-%.0f %s", size, k % 5 == 4 ? "all random" : "");
        slstm_against_reference(&c, k % 2 ? RESET_RANDOM : RESET_NONE, IS_DOUBLE ? 1e-12 : 1e-4, what);
        slstm_case_free(&c);
    }
}

// As mlstm_in_pieces. The initial states of a piece are the final ones of the piece before.
static SlstmCase slstm_slice(const SlstmCase *c, int t0, int t1, const SlstmResult *before) {
    SlstmCase s = *c;
    size_t D = (size_t)c->NH * c->d;
    s.T = t1 - t0;
    s.resets = c->resets ? (unsigned char *)xcalloc((size_t)c->B * s.T, 1) : NULL;
    s.in[IN_SX] = zeros((size_t)c->B * s.T * 4 * D);
    s.dy = zeros((size_t)c->B * s.T * D);
    for (int b = 0; b < c->B; b++) {
        size_t from = (size_t)b * c->T + t0, to = (size_t)b * s.T;
        if (c->resets) memcpy(s.resets + to, c->resets + from, (size_t)s.T);
        memcpy(s.in[IN_SX] + to * 4 * D, c->in[IN_SX] + from * 4 * D, sizeof(double) * s.T * 4 * D);
        memcpy(s.dy + to * D, c->dy + from * D, sizeof(double) * s.T * D);
    }
    for (int k = IN_SR; k < NUM_SIN; k++) {
        size_t n = slstm_count(c, k);
        s.in[k] =
            (double *)memcpy(zeros(n), k >= IN_SY && before ? before->final[k - IN_SY] : c->in[k], sizeof(double) * n);
    }
    for (int k = 0; k < 3; k++) s.dfinal[k] = NULL;
    if (before) s.carried = 1;
    return s;
}

static void slstm_in_pieces(const SlstmCase *c, const int *ends, int count, SlstmResult *out) {
    SlstmCase *piece = (SlstmCase *)xcalloc((size_t)count, sizeof(SlstmCase));
    SlstmResult *result = (SlstmResult *)xcalloc((size_t)count, sizeof(SlstmResult));
    size_t D = (size_t)c->NH * c->d, states = slstm_count(c, IN_SY);
    memset(out->d[IN_SR], 0, sizeof(double) * slstm_count(c, IN_SR));
    memset(out->d[IN_SB], 0, sizeof(double) * slstm_count(c, IN_SB));
    for (int p = 0; p < count; p++) {
        piece[p] = slstm_slice(c, p ? ends[p - 1] : 0, ends[p], p ? &result[p - 1] : NULL);
        result[p] = slstm_result(&piece[p]);
        slstm_cell(&piece[p], &result[p], 0);
    }
    for (int p = count - 1; p >= 0; p--) {
        int t0 = p ? ends[p - 1] : 0, T = piece[p].T;
        for (int k = 0; k < 3; k++) {
            const double *from = p == count - 1 ? c->dfinal[k] : result[p + 1].d[IN_SY + k];
            if (from) piece[p].dfinal[k] = (double *)memcpy(zeros(states), from, sizeof(double) * states);
        }
        slstm_cell(&piece[p], &result[p], 1);
        for (int b = 0; b < c->B; b++) {
            size_t to = ((size_t)b * c->T + t0) * D, from = (size_t)b * T * D;
            memcpy(out->y + to, result[p].y + from, sizeof(double) * T * D);
            memcpy(out->d[IN_SX] + 4 * to, result[p].d[IN_SX] + 4 * from, sizeof(double) * T * 4 * D);
        }
        for (int k = IN_SR; k <= IN_SB; k++)
            for (size_t at = 0; at < slstm_count(c, k); at++) out->d[k][at] += result[p].d[k][at];
    }
    for (int k = 0; k < 4; k++) {
        memcpy(out->final[k], result[count - 1].final[k], sizeof(double) * states);
        memcpy(out->d[IN_SY + k], result[0].d[IN_SY + k], sizeof(double) * states);
    }
    for (int p = 0; p < count; p++) {
        slstm_case_free(&piece[p]);
        slstm_result_free(&result[p]);
    }
    free(piece);
    free(result);
}

static void slstm_split_case(const SlstmCase *c, ResetKind resets, const int *ends, int count, double tolerance) {
    SlstmResult one = slstm_result(c), pieces = slstm_result(c);
    Worst w = {0, ""};
    slstm_cell(c, &one, 1);
    slstm_in_pieces(c, ends, count, &pieces);
    worst_of_slstm(&w, c, &pieces, &one);
    check(w.error, tolerance, "%s in %d pieces, first of %d (%s)", slstm_describe(c, resets), count, ends[0], w.where);
    slstm_result_free(&one);
    slstm_result_free(&pieces);
}

static void test_slstm_split(void) {
    for (int k = 0; k < NUM_SPLITS; k++) {
        ResetKind resets = k % 2 ? RESET_ADJACENT : RESET_NONE;
        SlstmCase c = slstm_case(5, SPLIT_T, 2, 5, resets, k % 3 > 0, k % 4 > 0);
        slstm_split_case(&c, resets, splits[k], split_count(k), IS_DOUBLE ? 1e-12 : 1e-5);
        slstm_case_free(&c);
    }
}

static void test_slstm_long(void) {
    enum { T = 10000 };
    for (int k = 0; k < 3; k++) {
        static const char *const what[] = {"", ", gates +15", ", gates +-15"};
        int ends[] = {1, 4096, 4159, 9999, T};
        SlstmCase c = slstm_case(1, T, 1, 4, RESET_NONE, 0, 0);
        draw++;
        for (size_t at = 0; k > 0 && at < slstm_count(&c, IN_SX); at++)
            if (at / c.d % 4 < 2) c.in[IN_SX][at] = k == 1 || random_uniform(at) < 0.5 ? 15 : -15;
        slstm_against_reference(&c, RESET_NONE, IS_DOUBLE ? 1e-12 : 1e-4, what[k]);
        slstm_split_case(&c, RESET_NONE, ends, 5, IS_DOUBLE ? 1e-12 : 1e-4);
        slstm_case_free(&c);
    }
}

#ifdef REAL_DOUBLE
typedef struct {
    SlstmCase *c;
    SlstmResult *out;
    const double *m;  // scale of the final states at which their gradients hold
} SlstmLoss;

static double slstm_loss(void *context, uint64_t *branches) {
    SlstmLoss *x = (SlstmLoss *)context;
    long double sum = 0;
    slstm_cell(x->c, x->out, 0);
    for (size_t k = 0; k < slstm_outputs(x->c); k++) sum += (long double)x->c->dy[k] * x->out->y[k];
    for (size_t k = 0; x->c->dfinal[0] && k < slstm_count(x->c, IN_SY); k++) {
        long double rescale = expl(x->out->final[3][k] - x->m[k]);
        sum += (long double)x->c->dfinal[0][k] * x->out->final[0][k] +
               rescale * (x->c->dfinal[1][k] * x->out->final[1][k] + x->c->dfinal[2][k] * x->out->final[2][k]);
    }
    *branches = 0;
    return (double)sum;
}

static void test_slstm_gradient(void) {
    static const int Ts[] = {1, 2, 3, 63, 64, 65, 200}, ds[] = {3, 5, 9, 1},
                     levels[] = {7, 4, 3, NUM_RESET_KINDS, 2, 2};
    Grid grid = pair_grid(6, levels);
    for (int k = 0; k < grid.count; k++) {
        const int *o = grid.level[k];
        SlstmCase c = slstm_case(2, Ts[o[0]], o[2] + 1, ds[o[1]], (ResetKind)o[3], o[4], o[5]);
        SlstmResult base = slstm_result(&c), out = slstm_result(&c);
        Worst w = {0, ""};
        slstm_cell(&c, &base, 1);
        SlstmLoss loss = {&c, &out, base.final[3]};
        for (int in = 0; in < (c.carried ? NUM_SIN : IN_SY); in++)
            worst_of(&w, gradient_error(slstm_loss, &loss, c.in[in], base.d[in], slstm_count(&c, in), 20, 1e-5),
                     slstm_names[in]);
        check(w.error, 1e-6, "%s: finite differences (%s)", slstm_describe(&c, (ResetKind)o[3]), w.where);
        slstm_result_free(&base);
        slstm_result_free(&out);
        slstm_case_free(&c);
    }
}
#endif
