// test_math_ranks.h: several ranks against one, part of test_xlstm.c. Run by dev/test/test_ranks.sh as
//   mpirun -np N build/test_xlstm ranks
// Each rank also computes the whole case alone. Compared are loss, logits, all gradients, their norm, the weights after
// an update and carried states, for every way to cut N ranks into groups that share sequences.

enum { RANK_RESETS_BORDER = NUM_RESET_KINDS, RANK_RESETS_BESIDE };  // documents begin at, and around, segment borders

typedef struct {
    ModelCase model;  // B, T: of all ranks
    int sp, rows;     // ranks that share a sequence; sequences of a group
    int resets, gates, ignored, scan;
} RankCase;

static RankCase rank_case(const int *level) {
    static const int lengths[] = {37, 41, 48},
                     resets[] = {RESET_NONE, RESET_RANDOM, RANK_RESETS_BORDER, RANK_RESETS_BESIDE, RESET_EVERY};
    static const int heads[] = {2, 2, 3}, rows[] = {1, 2, 1};
    RankCase c = {plain_model, 1, rows[level[5]], resets[level[3]], level[6], level[8], level[9] == 3};
    for (int k = 0, sp = 1; sp <= comm.size; sp++)
        if (comm.size % sp == 0 && k++ == level[1]) c.sp = sp;
    if (c.sp == 1) c.ignored = 0;  // nothing would be left
    c.model.blocks = all_models[level[0]];
    c.model.zero = level[2];
    c.model.T = lengths[level[4]];
    c.model.heads = heads[level[5]];
    c.model.B = c.rows * comm.size / c.sp;
    c.model.sigmoid = level[7];
    c.model.chunk = level[4] == 1 ? 5 : 16;
    c.model.recompute = level[9] == 1;
    c.model.state_rows = level[9] == 2 ? c.model.B : 0;
    return c;
}

// Gates far out, where the cells saturate: both at +15, both at -15, input open and forget shut.
static void set_gates(int kind) {
    if (kind == 0) return;
    for (int k = 0; k < model.table.num_tensors; k++) {
        const TensorSpec *t = &model.table.tensors[k];
        real *w = model.params + t->offset;
        int slstm = strstr(t->name, "slstm_cell._bias_") != NULL, d = t->shape[0] / 4 / dim(&model, DIM_NH);
        int igate = strstr(t->name, "igate_preact.bias") || strstr(t->name, "igate.bias");
        int fgate = strstr(t->name, "fgate_preact.bias") || strstr(t->name, "fgate.bias");
        for (size_t i = 0; i < t->count && (slstm || igate || fgate); i++) {
            int gate = slstm ? (int)(i / (size_t)d) % 4 : fgate;
            if (gate < 2) w[i] += (kind == 1 || (kind == 3 && gate == 0)) ? 15 : -15;
        }
    }
}

static Data rank_data(const RankCase *c) {
    ResetKind kind = c->resets < NUM_RESET_KINDS ? (ResetKind)c->resets : RESET_RANDOM;
    Data d = random_data(&c->model, kind, 1);
    int T = c->model.T;
    for (int k = 0; k < c->model.B * T; k++) {
        int near_border = 0, at_border = 0;
        for (int p = 0; p < c->sp; p++) {
            int away = k % T - segment_begin(T, c->sp, p);
            at_border |= away == 0;
            near_border |= away == -2 || away == -1 || away == 1 || away == 3;
            if (c->ignored && p == c->sp / 2 && away >= 0 && k % T < segment_begin(T, c->sp, p + 1)) d.targets[k] = -1;
        }
        if (c->resets == RANK_RESETS_BORDER) d.resets[k] = (unsigned char)at_border;
        if (c->resets == RANK_RESETS_BESIDE) d.resets[k] = (unsigned char)near_border;
    }
    return d;
}

static const UpdateConfig rank_update = {1, 0.1, 0.9, 0.95, 1e-2, 0.1, 0.5};

typedef struct {
    double loss, norm;
    double *logits, *grads, *weights, *states;
} RankResult;

// This rank's part of the case, or all of it when the rank is alone.
static void run_ranks(const RankCase *c, uint64_t first_draw, RankResult *r) {
    int T = c->model.T, V, begin = segment_begin(T, comm.sp_size, comm.sp_rank);
    int len = segment_begin(T, comm.sp_size, comm.sp_rank + 1) - begin, row0 = comm.dp_rank * c->rows;
    ModelCase part = c->model;
    part.B = comm.size > 1 ? c->rows : c->model.B;
    part.T = (T + comm.sp_size - 1) / comm.sp_size;
    draw = first_draw;
    build_model(&part);
    random_states(c->model.state_rows);
    set_gates(c->gates);
    draw = first_draw + 1000;
    Data d = rank_data(c);
    V = dim(&model, DIM_V);
    size_t states = (size_t)c->model.state_rows * model.states.total, rows = (size_t)part.B * model.states.total;
    if (states) memmove(model.stored, model.stored + (size_t)row0 * model.states.total, sizeof(real) * rows);
    for (int k = 0; k < part.B * len; k++) {  // the segment to the front of the arrays
        int from = (row0 + k / len) * T + begin + k % len;
        d.inputs[k] = d.inputs[from];
        d.targets[k] = d.targets[from];
        if (d.resets) d.resets[k] = d.resets[from];
    }
    Batch batch = {
        part.B, len, d.inputs, d.targets, d.resets, states ? 0 : -1, NULL, NULL, NULL, comm.sp_size > 1 ? T : 0, 1};
    real *saved = (real *)memcpy(reals(rows, 0), model.stored, sizeof(real) * (states ? rows : 0));
    double evaluated = cpu_evaluate(&batch);
    r->logits = zeros((size_t)part.B * len * V);
    copy_from_real(r->logits, model.logits, (size_t)part.B * len * V);
    if (states) memcpy(model.stored, saved, sizeof(real) * rows);
    cpu_zero_grad();
    r->loss = cpu_forward_backward(&batch, d.scale);
    if (evaluated != r->loss) r->loss = NAN;
    r->states = zeros(rows);
    if (states) copy_from_real(r->states, model.stored, rows);
    comm_sum(&r->loss, 1, "test");
    if (comm.size > 1) cpu_reduce_grads();
    r->norm = cpu_grad_norm();
    cpu_update(&rank_update);
    if (comm.size > 1) cpu_collect(KIND_GRAD);
    r->grads = zeros(model.table.total);
    r->weights = zeros(model.table.total);
    copy_from_real(r->grads, model.grads, model.table.total);
    copy_from_real(r->weights, model.params, model.table.total);
    free(saved);
    data_free(&d);
}

static void rank_result_free(RankResult *r) {
    free(r->logits);
    free(r->grads);
    free(r->weights);
    free(r->states);
    memset(r, 0, sizeof *r);
}

// The same number on all ranks: the worst.
static double worst_rank(double error) {
    double *all = zeros((size_t)comm.size), worst = 0;
    comm.host->all_gather(COMM_WORLD, &error, all, sizeof error, "test", NULL);
    for (int r = 0; r < comm.size; r++)
        if (!(all[r] <= worst)) worst = all[r];
    free(all);
    return worst;
}

static void compare_ranks(const RankCase *c, uint64_t first_draw) {
    static const Comm one = {0, 1, 0, 1, 0, 1, 0, 1, 600, 0, &comm_self, &comm_self, NULL};
    RankResult alone = {0}, part = {0};
    Worst w = {0, ""};
    Comm world = comm;
    double top = 0, least = c->gates ? 1e-3 : 1e-6;  // gates far out cancel most of some gradients
    comm = one;
    run_ranks(c, first_draw, &alone);
    comm = world;
    fold_by_gather = c->scan ? 2 : 8;
    comm_layout(c->sp);
    run_ranks(c, first_draw, &part);
    int T = c->model.T, V = dim(&model, DIM_V), begin = segment_begin(T, c->sp, comm.sp_rank);
    int len = segment_begin(T, c->sp, comm.sp_rank + 1) - begin, row0 = comm.dp_rank * c->rows;
    worst_of(&w, fabs(part.loss - alone.loss) / (1 + alone.loss), "loss");
    worst_of(&w, fabs(part.norm - alone.norm) / alone.norm, "norm");
    for (int b = 0; b < c->rows; b++) {
        const double *want = alone.logits + ((size_t)(row0 + b) * T + begin) * V;
        worst_of(&w, distance(part.logits + (size_t)b * len * V, want, (size_t)len * V), "logits");
        for (int k = 0; c->model.state_rows && k < model.states.num_tensors; k++) {
            const TensorSpec *t = &model.states.tensors[k];
            worst_of(&w,
                     distance_above(part.states + b * model.states.total + t->offset,
                                    alone.states + (row0 + b) * model.states.total + t->offset, t->count, 1e-3),
                     t->name);
        }
    }
    for (size_t k = 0; k < model.table.total; k++) top = fmax(top, fabs(alone.grads[k]));
    for (int k = 0; k < model.table.num_tensors; k++) {
        const TensorSpec *t = &model.table.tensors[k];
        const double *a = part.grads + t->offset, *b = alone.grads + t->offset;
        worst_of(&w, IS_DOUBLE ? max_distance(a, b, t->count, least * top) : l2_distance(a, b, t->count, 1e-2 * top),
                 t->name);
    }
    worst_of(&w, distance(part.weights, alone.weights, model.table.total), "weights after an update");
    check(worst_rank(w.error), IS_DOUBLE ? 1e-12 : 1e-4, "%d ranks, sp %d, zero %d, resets %d, gates %d%s%s: %s (%s)",
          comm.size, c->sp, c->model.zero, c->resets, c->gates, c->ignored ? ", ignored" : "", c->scan ? ", scan" : "",
          model_describe(&c->model), w.where);
    rank_result_free(&alone);
    rank_result_free(&part);
}

// blocks, sp, zero, resets, T, heads and rows, gates, sigmoid, ignored targets, and one of recompute, carry, scan
static void rank_levels(int *levels) {
    const int all[MAX_OPTIONS] = {NUM_MODELS, 0, 2, 5, 3, 3, 4, 2, 2, 4};
    memcpy(levels, all, sizeof all);
    for (int sp = 1; sp <= comm.size; sp++) levels[1] += comm.size % sp == 0;
}

// Every block type, cut in every way, as in ordinary training: without documents, and with some.
static void test_ranks_plain(void) {
    int levels[MAX_OPTIONS];
    rank_levels(levels);
    for (int k = 0; k < NUM_MODELS * 2 * levels[1]; k++) {
        int scan = 3 * (k % 2);
        int options[] = {k % NUM_MODELS, k / NUM_MODELS / 2, k % 3 == 0, k / NUM_MODELS % 2, 1, k % 3, 0, 0, 0, scan};
        RankCase c = rank_case(options);
        if (c.sp > 1) compare_ranks(&c, draw + 7000 * (uint64_t)k);
    }
    comm_layout(1);
}

// Everything that can differ beside everything else.
static void test_ranks_grid(void) {
    int levels[MAX_OPTIONS];
    rank_levels(levels);
    Grid grid = pair_grid(MAX_OPTIONS, levels);
    for (int k = 0; k < grid.count; k++) {
        RankCase c = rank_case(grid.level[k]);
        compare_ranks(&c, draw + 5000 * (uint64_t)k);
    }
    comm_layout(1);
}
