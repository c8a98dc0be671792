// test_math_model.h: tests of whole models, part of test_xlstm.c. A model is run through the Backend's functions, as
// the trainer runs it; only logits are read in `real` from inside.

// ----------------------------------------------------------------------------------------------------------------
// A tiny model with random weights

typedef struct {
    const char *blocks;
    int heads, sigmoid, chunk, B, T;
    int state_rows, recompute, threads;
    int shell;  // 0: RMSNorm, cap 30;  1: LayerNorm, no cap;  2: RMSNorm, caps that bite (2; gates 1.5)
    double eps;
    int width;  // 0: model_width
    int zero;
} ModelCase;

static const ModelCase plain_model = {"mlstm,slstm,mlstm_v1", 2, 0, 16, 2, 40, 0, 0, 1, 0, 1e-6, 0, 0};

static void print_to_null(int on) {  // build() prints its memory plan, which says nothing here
    static int saved = -1;
    fflush(stdout);
    if (on) {
        saved = dup(STDOUT_FILENO);
        if (saved < 0 || !freopen("/dev/null", "w", stdout)) exit(1);
    } else {
        if (dup2(saved, STDOUT_FILENO) < 0) exit(1);
        close(saved);
    }
}

static void free_model(void) {
    if (!model.params) return;
    free(model.acts[0].u);  // the first buffer of the arena
    // gradients and moments lie behind the parameters
    void *all[] = {model.x, model.acts, model.params, model.stored, model.history, model.resets};
    for (int k = 0; k < 6; k++) free(all[k]);
    table_free(&model.table);
    table_free(&model.states);
    memset(&model, 0, sizeof model);
}

// Head widths are no multiples of 8: 14 (q, k: 7), 10 (5) and 10 (5); 22 (11) where mlstm_v1, whose inner width is a
// multiple of 64, is to have 3 heads.
static int model_width(const ModelCase *c) {
    if (c->width) return c->width;
    return c->heads == 1 ? 14 : c->heads == 2 ? 20 : strstr(c->blocks, "v1") ? 66 : 30;
}

// Weights of ordinary size everywhere. Only v is small, so that the eps of the norm behind the cell counts: else that
// norm would hide the scale of h, and with T = 1 nearly all gradients of the gates.
static void random_weights(void) {
    for (int k = 0; k < model.table.num_tensors; k++) {
        const TensorSpec *t = &model.table.tensors[k];
        real *w = model.params + t->offset;
        int matrix = t->ndim > 1, fan_in = strstr(t->name, "recurrent") ? t->shape[1] : t->shape[t->ndim - 1];
        int igate = strstr(t->name, "igate") != NULL, fgate = strstr(t->name, "fgate") != NULL;
        double mean = t->init == INIT_ONE ? 1 : igate && !matrix ? -0.5 : fgate && !matrix ? 1.5 : 0;
        double std = !matrix                         ? 0.4
                     : strstr(t->name, "embeddings") ? 1
                     : strstr(t->name, "conv")       ? 0.5
                                                     : 1 / sqrt(fan_in);
        if (strstr(t->name, ".v.") || strstr(t->name, "v_proj")) std *= 0.05;
        if (strstr(t->name, "lm_head")) std *= 3;
        draw++;
        for (size_t i = 0; i < t->count; i++) w[i] = (real)(float)(mean + std * random_normal(i));
    }
}

static void random_states(int rows) {
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < model.states.num_tensors; k++) {
            const TensorSpec *t = &model.states.tensors[k];
            const char *name = strrchr(t->name, '.') + 1;
            int slstm = model.config.block_types[t->block] == BLOCK_SLSTM, m = strcmp(name, "m") == 0;
            double mean = slstm && strcmp(name, "n") == 0 ? 1.5 : 0, std = strcmp(name, "C") == 0 ? 0.05 : 0.2;
            if (m && !slstm && model.config.sigmoid_gate) std = 0;
            draw++;
            real *s = model.stored + (size_t)row * model.states.total + t->offset;
            for (size_t i = 0; i < t->count; i++) s[i] = (real)(float)(mean + std * random_normal(i));
        }
}

static void build_model(const ModelCase *c) {
    ModelConfig config;
    char why[200];
    free_model();
    model_defaults(&config);
    config.vocab_size = 11;
    config.hidden_size = model_width(c);
    config.num_heads = c->heads;
    config.ffn_dim = 24;
    config.sigmoid_gate = c->sigmoid;
    config.eps = c->eps;
    config.norm_eps = 1e-3;
    config.layernorm_out = c->shell == 1;
    if (c->shell > 0) config.logit_soft_cap = c->shell == 1 ? 0 : 2;
    if (c->shell == 2) config.gate_soft_cap = 1.5;
    if (!model_parse_blocks(c->blocks, &config, why, sizeof why) || !model_check(&config, why, sizeof why)) {
        fprintf(stderr, "test model: %s\n", why);
        exit(1);
    }
    TensorTable table = model_table(&config);
    RunConfig run = {c->B, c->T, c->state_rows, 1, c->recompute, 0, c->threads, c->chunk, c->zero};
    print_to_null(1);
    cpu_build(&config, &table, &run);
    print_to_null(0);
    random_weights();
    random_states(c->state_rows);
}

static const char *model_describe(const ModelCase *c) {
    static char text[200];
    snprintf(text, sizeof text, "%s heads %d %s L%d B%d T%d shell %d%s", c->blocks, c->heads,
             c->sigmoid ? "sig" : "exp", c->chunk, c->B, c->T, c->shell, c->state_rows ? " carried" : "");
    return text;
}

// ----------------------------------------------------------------------------------------------------------------
// A batch with what comes out of it

typedef struct {
    Batch batch;
    int *inputs, *targets;
    unsigned char *resets;
    double scale;
} Data;

static Data random_data(const ModelCase *c, ResetKind resets, int ignore_targets) {
    Data d;
    int count = c->B * c->T;
    d.inputs = (int *)xcalloc((size_t)count, sizeof(int));
    d.targets = (int *)xcalloc((size_t)count, sizeof(int));
    d.resets = make_resets(resets, c->B, c->T, c->chunk);
    d.scale = 1.0 / count;
    draw++;
    for (int k = 0; k < count; k++) {
        d.inputs[k] = random_below(3 * (uint64_t)k, 11);
        d.targets[k] = ignore_targets && k % 3 == 1 ? -1 : random_below(3 * (uint64_t)k + 1, 11);
    }
    Batch batch = {c->B, c->T, d.inputs, d.targets, d.resets, c->state_rows ? 0 : -1, NULL, NULL, NULL, 0, 1};
    d.batch = batch;
    return d;
}

static void data_free(Data *d) {
    free(d->inputs);
    free(d->targets);
    free(d->resets);
}

typedef struct {
    double loss, loss_in_training;
    double *logits, *grads, *states;  // [B, T, V], [table.total], [num_state_rows][states.total] final states
} ModelResult;

// Adds what the batch gives to r->grads; logits and states are those of an evaluation. Stored states are put back.
static void run_model(const Batch *batch, double scale, ModelResult *r) {
    size_t logits = (size_t)batch->B * batch->T * dim(&model, DIM_V);
    size_t states = (size_t)model.run.num_state_rows * model.states.total;
    real *saved = (real *)memcpy(reals(states, 0), model.stored, sizeof(real) * states);
    r->loss = cpu_evaluate(batch);
    r->logits = zeros(logits);
    copy_from_real(r->logits, model.logits, logits);
    r->states = zeros(states);
    copy_from_real(r->states, model.stored, states);
    memcpy(model.stored, saved, sizeof(real) * states);
    cpu_zero_grad();
    r->loss_in_training = cpu_forward_backward(batch, scale);
    memcpy(model.stored, saved, sizeof(real) * states);
    if (!r->grads) r->grads = zeros(model.table.total);
    for (size_t k = 0; k < model.table.total; k++) r->grads[k] += model.grads[k];
    free(saved);
}

static void result_free(ModelResult *r) {
    free(r->logits);
    free(r->grads);
    free(r->states);
    memset(r, 0, sizeof *r);
}

// A tensor's gradient that is nearly nothing against the others is only noise of theirs: measured against 1e-6 of them.
static void worst_of_grads(Worst *w, const double *a, const double *b) {
    double top = 0;
    for (size_t k = 0; k < model.table.total; k++) top = fmax(top, fabs(b[k]));
    for (int k = 0; k < model.table.num_tensors; k++) {
        const TensorSpec *t = &model.table.tensors[k];
        double error = IS_DOUBLE ? max_distance(a + t->offset, b + t->offset, t->count, 1e-6 * top)
                                 : l2_distance(a + t->offset, b + t->offset, t->count, 1e-2 * top);
        worst_of(w, error, t->name);
    }
}

// The same for what OpenBLAS makes differ by rounding: nothing, if it is close.
static double differing_rows(const double *a, const double *b, size_t n) {
    return SAME_BITS ? differing(a, b, n) : l2_distance(a, b, n, 1e-30) <= 1e-5 ? 0 : (double)n;
}

static const char *const all_models[] = {"mlstm", "mlstm_v1", "slstm", "mlstm,slstm,mlstm_v1"};
enum { NUM_MODELS = 4 };

// ----------------------------------------------------------------------------------------------------------------
// Rows of a batch are independent; chunk length, threads and recomputation change nothing

static void test_model_rows(void) {
    for (int k = 0; k < 2 * NUM_MODELS; k++) {
        static const int order[] = {2, 0, 1};
        ModelCase c = plain_model;
        c.blocks = all_models[k % NUM_MODELS];
        c.sigmoid = k / NUM_MODELS;
        c.B = 3;
        c.state_rows = k % 2 ? 3 : 0;
        build_model(&c);
        Data d = random_data(&c, RESET_RANDOM, 1);
        size_t row = (size_t)c.T * 11;
        ModelResult all = {0}, alone = {0}, permuted = {0};
        run_model(&d.batch, d.scale, &all);
        check(fabs(all.loss - all.loss_in_training), 0, "%s: evaluate and forward_backward give the same loss",
              model_describe(&c));
        double different = 0, loss = 0;
        for (int b = 0; b < 3; b++) {
            Batch one = {1,
                         c.T,
                         d.inputs + b * c.T,
                         d.targets + b * c.T,
                         d.resets + b * c.T,
                         c.state_rows ? b : -1,
                         NULL,
                         NULL,
                         NULL,
                         0,
                         1};
            free(alone.logits);
            free(alone.states);
            run_model(&one, d.scale, &alone);
            loss += alone.loss;
            different += differing_rows(alone.logits, all.logits + b * row, row);
            if (c.state_rows)
                different += differing_rows(alone.states + b * model.states.total, all.states + b * model.states.total,
                                            model.states.total);
        }
        check(different, 0, "%s: rows alone have the same bits as together", model_describe(&c));
        Worst w = {0, ""};
        worst_of(&w, fabs(loss - all.loss) / all.loss, "loss");
        worst_of_grads(&w, alone.grads, all.grads);
        check(w.error, IS_DOUBLE ? 1e-12 : 1e-4, "%s: gradients of rows add up (%s)", model_describe(&c), w.where);
        different = 0;
        if (!c.state_rows) {
            Data p = random_data(&c, RESET_RANDOM, 1);
            for (int b = 0; b < 3; b++)
                for (int t = 0; t < c.T; t++) {
                    int to = b * c.T + t, from = order[b] * c.T + t;
                    p.inputs[to] = d.inputs[from];
                    p.targets[to] = d.targets[from];
                    p.resets[to] = d.resets[from];
                }
            run_model(&p.batch, p.scale, &permuted);
            for (int b = 0; b < 3; b++)
                different += differing_rows(permuted.logits + b * row, all.logits + order[b] * row, row);
            check(different, 0, "%s: rows in another order have the same bits", model_describe(&c));
            worst_of_grads(&w, permuted.grads, all.grads);
            check(w.error, IS_DOUBLE ? 1e-12 : 1e-4, "%s: rows in another order, gradients (%s)", model_describe(&c),
                  w.where);
            data_free(&p);
        }
        result_free(&all);
        result_free(&alone);
        result_free(&permuted);
        data_free(&d);
    }
}

// Runs the same weights and data in two settings of a model.
static void run_variant(const ModelCase *c, uint64_t first_draw, ResetKind resets, ModelResult *r) {
    draw = first_draw;  // weights, states and data are drawn anew, and so the same
    build_model(c);
    Data d = random_data(c, resets, 1);
    run_model(&d.batch, d.scale, r);
    data_free(&d);
}

static void test_model_chunks(void) {
    static const int chunks[] = {1, 7, 16, 33, 100};
    for (int k = 0; k < 2 * 3; k++) {
        ModelCase c = plain_model;
        c.blocks = k % 3 == 0 ? "mlstm" : k % 3 == 1 ? "mlstm_v1" : plain_model.blocks;
        c.sigmoid = k / 3;
        c.chunk = 64;
        c.T = 70;
        c.state_rows = c.B;
        uint64_t first_draw = draw;
        ModelResult base = {0};
        run_variant(&c, first_draw, k % 2 ? RESET_RANDOM : RESET_NONE, &base);
        for (int j = 0; j < 5; j++) {
            ModelResult other = {0};
            Worst w = {0, ""};
            c.chunk = chunks[j];
            run_variant(&c, first_draw, k % 2 ? RESET_RANDOM : RESET_NONE, &other);
            worst_of(&w, fabs(other.loss - base.loss) / base.loss, "loss");
            worst_of(&w, distance(other.logits, base.logits, (size_t)c.B * c.T * 11), "logits");
            worst_of_grads(&w, other.grads, base.grads);
            check(w.error, IS_DOUBLE ? 1e-12 : 1e-4, "%s: as with L64 (%s)", model_describe(&c), w.where);
            result_free(&other);
        }
        result_free(&base);
        draw = first_draw + 1000;
    }
}

static void test_model_bits(void) {
    static const struct {
        int threads, recompute;
        const char *what;
    } variants[] = {{1, 0, "a second run"},
                    {1, 1, "recompute"},
                    {2, 0, "2 threads"},
                    {3, 0, "3 threads"},
                    {2, 1, "2 threads, recompute"}};
    for (int k = 0; k < NUM_MODELS + 1; k++) {
        ModelCase c = plain_model;
        c.blocks = k == 3 ? "mlstm_v1,slstm,mlstm,slstm" : all_models[k % NUM_MODELS];
        c.sigmoid = k / NUM_MODELS;
        c.heads = 3;
        c.width = 66;  // large enough that all threads are used
        c.B = 3;
        c.T = 70;
        c.state_rows = k % 2 ? c.B : 0;
        uint64_t first_draw = draw;
        ModelResult base = {0};
        run_variant(&c, first_draw, RESET_RANDOM, &base);
        for (int j = 0; j < 5; j++) {
            ModelResult other = {0};
            if (!SAME_BITS && variants[j].threads > 1) continue;
            c.threads = variants[j].threads;
            c.recompute = variants[j].recompute;
            run_variant(&c, first_draw, RESET_RANDOM, &other);
            double different = differing(other.logits, base.logits, (size_t)c.B * c.T * 11) +
                               differing(other.grads, base.grads, model.table.total) + !(other.loss == base.loss) +
                               differing(other.states, base.states, (size_t)c.state_rows * model.states.total);
#ifdef _OPENMP
            if (omp_get_max_threads() != c.threads) different = INFINITY;  // the check would check nothing
#endif
            check(different, 0, "%s: the same bits with %s", model_describe(&c), variants[j].what);
            result_free(&other);
        }
        result_free(&base);
        draw = first_draw + 1000;
    }
    use_three_threads(0);
}

// ----------------------------------------------------------------------------------------------------------------
// A sequence in pieces through Batch.state_row; packed documents; generation

// Tensors behind the states of a model of one block: no gradient of theirs flows through a state, so the gradients of
// pieces with truncated backpropagation add up to that of one run.
static int behind_states(const char *name, BlockType type) {
    static const char *const both[] = {"out_norm", "lm_head", "ffn", NULL};
    static const char *const mlstm[] = {".q.", "ogate_preact", "multihead_norm", "out_proj", NULL};
    static const char *const v1[] = {"outnorm", "learnable_skip", "xlstm.proj_down", "q_proj", NULL};
    static const char *const slstm[] = {"group_norm", NULL};
    const char *const *own = type == BLOCK_MLSTM ? mlstm : type == BLOCK_MLSTM_V1 ? v1 : slstm;
    for (int k = 0; both[k]; k++)
        if (strstr(name, both[k])) return 1;
    for (int k = 0; own[k]; k++)
        if (strstr(name, own[k])) return 1;
    return 0;
}

static void model_in_pieces(const ModelCase *c, const Data *d, const int *ends, int count, ModelResult *r) {
    r->logits = zeros((size_t)c->B * c->T * 11);
    for (int p = 0; p < count; p++) {
        int t0 = p ? ends[p - 1] : 0, T = ends[p] - t0;
        ModelResult piece = {0};
        Data s = {{c->B, T, NULL, NULL, NULL, 0, NULL, NULL, NULL, 0, 1}, NULL, NULL, NULL, 0};
        s.inputs = (int *)xcalloc((size_t)c->B * T, sizeof(int));
        s.targets = (int *)xcalloc((size_t)c->B * T, sizeof(int));
        s.resets = d->resets ? (unsigned char *)xcalloc((size_t)c->B * T, 1) : NULL;
        for (int k = 0; k < c->B * T; k++) {
            int from = k / T * c->T + t0 + k % T;
            s.inputs[k] = d->inputs[from];
            s.targets[k] = d->targets[from];
            if (d->resets) s.resets[k] = d->resets[from];
        }
        s.batch.inputs = s.inputs;
        s.batch.targets = s.targets;
        s.batch.resets = s.resets;
        piece.grads = r->grads;
        run_model(&s.batch, d->scale, &piece);
        r->grads = piece.grads;
        r->loss += piece.loss;
        for (int b = 0; b < c->B; b++)
            memcpy(r->logits + ((size_t)b * c->T + t0) * 11, piece.logits + (size_t)b * T * 11,
                   sizeof(double) * T * 11);
        copy_to_real(model.stored, piece.states, (size_t)c->state_rows * model.states.total);
        free(r->states);
        r->states = piece.states;
        free(piece.logits);
        data_free(&s);
    }
}

static void test_model_split(void) {
    for (int k = 0; k < NUM_MODELS * NUM_SPLITS; k++) {
        int type = k % NUM_MODELS, split = k / NUM_MODELS, count = split_count(split);
        int reset_there = k % 2;  // every piece begins with a new document: then all gradients add up
        ModelCase c = plain_model;
        c.blocks = all_models[type];
        c.T = SPLIT_T;
        c.state_rows = c.B;
        c.sigmoid = split % 2;
        build_model(&c);
        Data d = random_data(&c, reset_there || split % 3 == 0 ? RESET_RANDOM : RESET_NONE, 1);
        for (int p = 0; reset_there && p < count - 1; p++)
            for (int b = 0; b < c.B; b++) d.resets[b * c.T + splits[split][p]] = 1;
        ModelResult one = {0}, pieces = {0};
        run_model(&d.batch, d.scale, &one);
        model_in_pieces(&c, &d, splits[split], count, &pieces);
        Worst w = {0, ""};
        worst_of(&w, fabs(pieces.loss - one.loss) / one.loss, "loss");
        worst_of(&w, distance(pieces.logits, one.logits, (size_t)c.B * c.T * 11), "logits");
        for (int s = 0; s < c.B * model.states.num_tensors; s++) {
            const TensorSpec *t = &model.states.tensors[s / c.B];
            size_t at = (size_t)(s % c.B) * model.states.total + t->offset;
            worst_of(&w, distance(pieces.states + at, one.states + at, t->count), t->name);
        }
        check(w.error, IS_DOUBLE ? 1e-12 : 1e-4, "%s in %d pieces, first of %d (%s)", model_describe(&c), count,
              splits[split][0], w.where);
        w.error = 0;
        if (reset_there) worst_of_grads(&w, pieces.grads, one.grads);
        for (int t = 0; !reset_there && type < 3 && t < model.table.num_tensors; t++) {
            const TensorSpec *s = &model.table.tensors[t];
            if (behind_states(s->name, (BlockType)type))
                worst_of(&w, distance(pieces.grads + s->offset, one.grads + s->offset, s->count), s->name);
        }
        if (reset_there || type < 3)
            check(w.error, IS_DOUBLE ? 1e-12 : 1e-4, "%s in %d pieces: %s gradients add up (%s)", model_describe(&c),
                  count, reset_there ? "documents end there, all" : "tensors behind the states,", w.where);
        result_free(&one);
        result_free(&pieces);
        data_free(&d);
    }
}

// Documents packed into one row with resets give what they give as rows of their own.
static void test_model_packed(void) {
    static const int starts[] = {0, 1, 2, 5, 21, 37, 38, 70, 100};
    for (int k = 0; k < 2 * NUM_MODELS; k++) {
        ModelCase c = plain_model;
        c.blocks = all_models[k % NUM_MODELS];
        c.sigmoid = k / NUM_MODELS;
        c.B = 1;
        c.T = SPLIT_T;
        c.state_rows = k % 2;  // a stored state must not be seen through the reset at token 0
        build_model(&c);
        Data d = random_data(&c, RESET_FIRST, 0);
        for (int s = 0; s < 8; s++) d.resets[starts[s]] = 1;
        ModelResult packed = {0}, apart = {0};
        run_model(&d.batch, d.scale, &packed);
        Worst w = {0, ""};
        double loss = 0;
        for (int s = 0; s < 8; s++) {
            int t0 = starts[s], T = starts[s + 1] - t0;
            Batch document = {1, T, d.inputs + t0, d.targets + t0, NULL, -1, NULL, NULL, NULL, 0, 1};
            run_model(&document, d.scale, &apart);
            loss += apart.loss;
            worst_of(&w, distance(packed.logits + t0 * 11, apart.logits, (size_t)T * 11), "logits");
            free(apart.logits);
            free(apart.states);
            apart.logits = apart.states = NULL;
        }
        worst_of(&w, fabs(packed.loss - loss) / loss, "loss");
        worst_of_grads(&w, packed.grads, apart.grads);
        check(w.error, IS_DOUBLE ? 1e-12 : 1e-4, "%s: packed documents as documents apart (%s)", model_describe(&c),
              w.where);
        result_free(&packed);
        result_free(&apart);
        data_free(&d);
    }
}

static void test_model_decode(void) {
    for (int k = 0; k < 3 * NUM_MODELS; k++) {
        ModelCase c = plain_model;
        float logits[11];
        c.blocks = all_models[k % NUM_MODELS];
        c.sigmoid = k / NUM_MODELS == 1;
        c.shell = k / NUM_MODELS;
        c.heads = 1 + k % 3;
        c.B = 1;
        c.T = 70;
        build_model(&c);
        Data d = random_data(&c, RESET_NONE, 0);
        ModelResult parallel = {0};
        run_model(&d.batch, d.scale, &parallel);
        double *stepwise = zeros((size_t)c.T * 11), as_float = 0;
        for (int start = 0; start < 2; start++) {  // the second start must forget the first
            cpu_decode_start();
            for (int t = 0; t < c.T; t++) {
                cpu_decode_step(d.inputs[t], logits);
                copy_from_real(stepwise + t * 11, model.logits, 11);
                for (int v = 0; v < 11; v++) as_float = fmax(as_float, fabs(logits[v] - stepwise[t * 11 + v]));
            }
        }
        check(distance(stepwise, parallel.logits, (size_t)c.T * 11), IS_DOUBLE ? 1e-10 : 1e-4,
              "%s: decode_step as the parallel forward pass", model_describe(&c));
        check(as_float, 1e-5, "%s: logits handed out", model_describe(&c));
        free(stepwise);
        result_free(&parallel);
        data_free(&d);
    }
}

// Gates at the end of their range in whole models: biases of +-1000 behind the cap of mlstm, +-100 in mlstm_v1 (no
// cap).
static void test_model_extreme(void) {
    for (int k = 0; k < 16; k++) {
        static const int slots[2][2] = {{M_IGATE_BIAS, M_FGATE_BIAS}, {V1_IGATE_BIAS, V1_FGATE_BIAS}};
        ModelCase c = plain_model;
        int type = k % 2;
        double size = type ? 100 : 1000, not_finite = 0;
        c.blocks = all_models[type];
        c.sigmoid = k >> 3;
        c.T = 300;
        c.state_rows = c.B;
        build_model(&c);
        for (int g = 0; g < 2; g++)
            for (int h = 0; h < c.heads; h++)
                param(&model, 0, slots[type][g])[h] = (real)(k >> (1 + g) & 1 ? size : -size);
        Data d = random_data(&c, RESET_NONE, 0);
        ModelResult r = {0};
        run_model(&d.batch, d.scale, &r);
        for (size_t at = 0; at < model.table.total; at++) not_finite += !isfinite(r.grads[at]);
        for (size_t at = 0; at < c.B * model.states.total; at++) not_finite += !isfinite(r.states[at]);
        check(not_finite + !isfinite(r.loss), 0, "%s: gate biases i %s, f %s: all finite", model_describe(&c),
              k & 2 ? "+" : "-", k & 4 ? "+" : "-");
        result_free(&r);
        data_free(&d);
    }
}

// What crosses the border to the trainer: gradients that add up, logits a tile at a time, tensors and states.
static void test_model_backend(void) {
    ModelCase c = plain_model;
    c.state_rows = 3;
    build_model(&c);
    Data d = random_data(&c, RESET_RANDOM, 1);
    size_t count = (size_t)c.B * c.T * 11, total = model.table.total, state = model.states.total;
    ModelResult base = {0};
    d.batch.state_row = -1;
    run_model(&d.batch, d.scale, &base);
    cpu_forward_backward(&d.batch, d.scale);  // on top of the gradients that run_model left
    double *twice = zeros(total), *half = zeros(total), *logits = zeros(count);
    copy_from_real(twice, model.grads, total);
    for (size_t k = 0; k < total; k++) half[k] = twice[k] / 2;
    Worst w = {0, ""};
    worst_of_grads(&w, half, base.grads);
    check(w.error, IS_DOUBLE ? 1e-12 : 1e-5, "forward_backward adds to the gradients (%s)", w.where);
    float *handed_out = (float *)xcalloc(count, sizeof(float));
    model.logit_rows = 7;  // a large vocabulary's tiles
    d.batch.logits = handed_out;
    cpu_zero_grad();
    double loss = cpu_forward_backward(&d.batch, d.scale);
    for (size_t k = 0; k < count; k++) logits[k] = handed_out[k];
    copy_from_real(twice, model.grads, total);
    w.error = 0;
    worst_of(&w, fabs(loss - base.loss) / base.loss, "loss");
    worst_of_grads(&w, twice, base.grads);
    check(w.error, IS_DOUBLE ? 1e-12 : 1e-5, "the classifier in tiles of 7 rows (%s)", w.where);
    check(max_distance(logits, base.logits, count, 1), 1e-6, "logits handed out");
    double different = 0;
    float *buffer = (float *)xcalloc(total, sizeof(float)), *again = (float *)xcalloc(total, sizeof(float));
    for (int kind = KIND_WEIGHT; kind <= KIND_V; kind++)
        for (int k = 0; k < model.table.num_tensors; k++) {
            size_t n = model.table.tensors[k].count;
            for (size_t i = 0; i < n; i++) buffer[i] = (float)(kind * 1000 + k) + (float)i / 65536;
            cpu_write_tensor(kind, k, buffer);
        }
    for (int kind = KIND_WEIGHT; kind <= KIND_V; kind++)
        for (int k = 0; k < model.table.num_tensors; k++) {
            size_t n = model.table.tensors[k].count;
            cpu_read_tensor(kind, k, again);
            for (size_t i = 0; i < n; i++) different += again[i] != (float)(kind * 1000 + k) + (float)i / 65536;
        }
    check(different, 0, "tensors are read as they were written");
    different = 0;
    for (int row = 0; row < 3; row++) {
        for (size_t i = 0; i < state; i++) buffer[i] = (float)row + (float)i / 65536;
        cpu_write_state(row, row == 1 ? NULL : buffer);
    }
    for (int row = 0; row < 3; row++) {
        cpu_read_state(row, again);
        for (size_t i = 0; i < state; i++) different += again[i] != (row == 1 ? 0 : (float)row + (float)i / 65536);
    }
    check(different, 0, "states are read as they were written; NULL: fresh");
    void *all[] = {twice, half, logits, handed_out, buffer, again};
    for (int k = 0; k < 6; k++) free(all[k]);
    result_free(&base);
    data_free(&d);
}

// ----------------------------------------------------------------------------------------------------------------
// Finite differences of whole models

#ifdef REAL_DOUBLE
typedef struct {
    const Batch *batch;
    double scale;
    real *states;
} ModelLoss;

static double model_loss(void *context, uint64_t *branches) {
    const ModelLoss *x = (const ModelLoss *)context;
    const Batch *batch = x->batch;
    int NH = model.config.num_heads, T = batch->T;
    memcpy(model.stored, x->states, sizeof(real) * (size_t)model.run.num_state_rows * model.states.total);
    double loss = x->scale * cpu_evaluate(batch);
    uint64_t hash = 1469598103934665603u;
    for (int b = 0; b < model.config.num_blocks && !model.config.sigmoid_gate; b++) {
        if (model.config.block_types[b] == BLOCK_SLSTM) continue;
        const BlockActs *a = &model.acts[b];
        for (int task = 0; task < batch->B * NH; task++) {
            size_t row = (size_t)(task / NH) * T, head = task % NH;
            const real *m0 = state_at(&model, b, STATE_M, x->states + task / NH * model.states.total);
            double m = model.run.num_state_rows ? m0[head] : 0;
            for (int t = 0; t < T; t++) {
                const real *gates = a->gates + (row + t) * 2 * NH + head;
                double sig = a->sig[(row + t) * NH + head];
                if (batch->resets && batch->resets[row + t]) m = 0;
                m = fmax(ref_log_sigmoid(gates[NH]) + m, gates[0]);
                hash = (hash ^ (uint64_t)(fabs(sig) <= exp(-m) ? 0 : sig > 0 ? 1 : 2)) * 1099511628211u;
            }
        }
    }
    *branches = hash;
    return loss;
}

static void model_gradient_case(const ModelCase *c, ResetKind resets, int ignore_targets, size_t entries,
                                double tolerance) {
    Worst w = {0, ""};
    build_model(c);
    Data d = random_data(c, resets, ignore_targets);
    ModelResult base = {0};
    run_model(&d.batch, d.scale, &base);
    size_t states = (size_t)c->state_rows * model.states.total;
    ModelLoss loss = {&d.batch, d.scale, (real *)memcpy(reals(states, 0), model.stored, sizeof(real) * states)};
    for (int k = 0; k < model.table.num_tensors; k++) {
        const TensorSpec *t = &model.table.tensors[k];
        worst_of(&w,
                 gradient_error(model_loss, &loss, model.params + t->offset, base.grads + t->offset, t->count, entries,
                                1e-5),
                 t->name);
    }
    check(w.error, tolerance, "%s resets %s%s: finite differences (%s)", model_describe(c), reset_names[resets],
          ignore_targets ? " ignored targets" : "", w.where);
    free(loss.states);
    result_free(&base);
    data_free(&d);
}

static void test_model_gradient(void) {
    static const char *const blocks[] = {"mlstm",       "mlstm_v1",       "slstm",
                                         "mlstm,slstm", "slstm,mlstm_v1", "mlstm_v1,mlstm,slstm"};
    static const int Ts[] = {1, 2, 3, 63, 64, 65, 200}, chunks[] = {1, 7, 16, 64};
    static const int levels[] = {7, 6, 4, 3, 2, NUM_RESET_KINDS, 2, 3, 2};
    Grid grid = pair_grid(9, levels);
    for (int k = 0; k < grid.count; k++) {
        const int *o = grid.level[k];
        ModelCase c = {
            blocks[o[1]], o[3] + 1, o[4], chunks[o[2]], Ts[o[0]] < 63 ? 2 : 1, Ts[o[0]], 0, 0, 1, o[7], 0, 0, 0};
        c.state_rows = o[6] ? c.B : 0;
        model_gradient_case(&c, (ResetKind)o[5], o[8], c.T < 63 ? 12 : c.T < 200 ? 6 : 4, 1e-6);
    }
    ModelCase c = plain_model;
    model_gradient_case(&c, RESET_RANDOM, 1, 8, 1e-4);  // with the cell's eps, m is not quite a constant
}
#endif

// ----------------------------------------------------------------------------------------------------------------
// AdamW, the gradient's norm, and overfitting

static void test_adamw(void) {
    ModelCase c = plain_model;
    UpdateConfig u = {0, 0, 0.9, 0.95, 1e-8, 0.1, 0};
    build_model(&c);
    size_t n = model.table.total;
    double *w = zeros(n), *m = zeros(n), *v = zeros(n), *got = zeros(n), norm_error = 0;
    copy_from_real(w, model.params, n);
    for (u.step = 1; u.step <= 5; u.step++) {
        double *g = normals(n, 0.01, 0.3);
        long double sum = 0;  // added up one by one in double it would itself be off by 1e-14
        u.lr = 1e-2 / u.step;
        u.grad_scale = u.step == 3 ? 0.25 : 1;
        copy_to_real(model.grads, g, n);
        for (size_t k = 0; k < n; k++) sum += (long double)g[k] * g[k];
        norm_error = fmax(norm_error, fabs(cpu_grad_norm() / sqrt((double)sum) - 1));
        cpu_update(&u);
        for (int k = 0; k < model.table.num_tensors; k++) {
            const TensorSpec *t = &model.table.tensors[k];
            for (size_t i = t->offset; i < t->offset + t->count; i++) {
                double gi = g[i] * u.grad_scale;
                m[i] = u.beta1 * m[i] + (1 - u.beta1) * gi;
                v[i] = u.beta2 * v[i] + (1 - u.beta2) * gi * gi;
                double m_hat = m[i] / (1 - pow(u.beta1, u.step)), v_hat = v[i] / (1 - pow(u.beta2, u.step));
                w[i] -= u.lr * (m_hat / (sqrt(v_hat) + u.eps) + (decays(t->name) ? u.weight_decay * w[i] : 0));
            }
        }
        free(g);
    }
    const struct {
        const char *name;
        const real *got;
        const double *expected;
    } kinds[] = {{"weights", model.params, w}, {"first moments", model.m, m}, {"second moments", model.v, v}};
    for (int k = 0; k < 3; k++) {
        copy_from_real(got, kinds[k].got, n);
        check(max_distance(got, kinds[k].expected, n, 0), IS_DOUBLE ? 1e-13 : 1e-6, "AdamW, 5 steps: %s",
              kinds[k].name);
    }
    check(norm_error, IS_DOUBLE ? 1e-14 : 1e-7, "gradient norm");
    model.grads[n / 2] = (real)NAN;
    check(!isnan(cpu_grad_norm()), 0, "gradient norm of a NaN is NaN");
    model.grads[n / 2] = (real)INFINITY;
    check(!isinf(cpu_grad_norm()), 0, "gradient norm of an infinity is infinite");
    cpu_zero_grad();
    check(cpu_grad_norm(), 0, "gradient norm after zero_grad");
    double *all[] = {w, m, v, got};
    for (int k = 0; k < 4; k++) free(all[k]);
}

#ifndef REAL_DOUBLE
static void test_overfit(void) {
    for (int k = 0; k < NUM_MODELS + 2; k++) {
        ModelCase c = plain_model;
        UpdateConfig u = {0, 0.01, 0.9, 0.95, 1e-8, 0, 1};
        c.blocks = all_models[k % NUM_MODELS];
        c.sigmoid = k >= NUM_MODELS;
        c.T = 16;
        build_model(&c);
        for (int t = 0; t < model.table.num_tensors; t++)
            tensor_init(&model.config, &model.table, t, 42, model.params + model.table.tensors[t].offset);
        Data d = random_data(&c, RESET_NONE, 0);
        for (int b = 0; b < c.B; b++) d.inputs[b * c.T] = b;  // no two rows that begin alike and go on differently
        double loss = INFINITY, first = 0;
        for (u.step = 1; u.step <= 400 && loss >= 0.01; u.step++) {
            cpu_zero_grad();
            loss = cpu_forward_backward(&d.batch, d.scale) * d.scale;
            if (u.step == 1) first = loss;
            cpu_update(&u);
        }
        check(loss, 0.01, "%s overfits a batch: loss from %.2f in %d steps", model_describe(&c), first, u.step - 1);
        data_free(&d);
    }
}
#endif
