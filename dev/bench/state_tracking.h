// state_tracking.h: tasks whose state every token changes, how a model is trained on them, and how it is judged. The
// program that includes this has included a trainer (train_xlstm.c or train_xlstm.cu) before.
//
// Inputs are tokens, targets the state after each, which is never an input. Sequences begin with FIRST_LEN tokens and
// become longer whenever a batch is solved, up to TRAIN_LEN; judged are positions EVAL_FROM + 1 to EVAL_LEN of fresh
// ones, where only a model that keeps the state itself can be right. sLSTM has recurrent weights and can; mLSTM's
// memory is linear in its inputs and cannot.
#ifndef DEV_BENCH_STATE_TRACKING_H
#define DEV_BENCH_STATE_TRACKING_H

enum { FIRST_LEN = 2, TRAIN_LEN = 40, EVAL_LEN = 256, EVAL_FROM = 199, EVAL_SEQUENCES = 1000, PATIENCE = 1500 };

static int parity_next(int state, int token) { return state ^ token; }

// Arithmetic modulo 5: x + 0 .. x + 4, 2 x, 3 x, 4 x
static int mod5_next(int state, int token) { return (token < 5 ? state + token : state * (token - 3)) % 5; }

// Permutations of five things, 120 states: swaps of neighbours and a rotation. A state is the rank of the permutation
// among all in lexical order.
static int s5_next(int state, int token) {
    int p[5], left[5] = {0, 1, 2, 3, 4}, weight = 24, rank = 0;
    for (int i = 0; i < 5; i++) {
        int at = state / weight;
        p[i] = left[at];
        for (int k = at; k < 4 - i; k++) left[k] = left[k + 1];
        state %= weight;
        if (i < 4) weight /= 4 - i;
    }
    int moved[5];
    for (int i = 0; i < 5; i++) moved[i] = token == 4 ? p[(i + 1) % 5] : p[i];
    if (token < 4) moved[token] = p[token + 1], moved[token + 1] = p[token];
    weight = 24;
    for (int i = 0; i < 5; i++) {
        int smaller = 0;
        for (int k = i + 1; k < 5; k++) smaller += moved[k] < moved[i];
        rank += smaller * weight;
        if (i < 4) weight /= 4 - i;
    }
    return rank;
}

typedef struct {
    const char *name;
    int tokens, states, first;  // kinds of tokens, of states; the state before the first token
    int (*next)(int state, int token);
} StateTask;
static const StateTask STATE_TASKS[] = {
    {"parity", 2, 2, 0, parity_next}, {"mod5", 8, 5, 1, mod5_next}, {"s5", 5, 120, 0, s5_next}};

typedef struct {
    const StateTask *task;
    uint64_t seed;
    int batch, steps;       // sequences a step
    double lr, solved;      // sequences grow where the loss of a token is below `solved` nats
    int to_zero;            // lr falls to 0 over the second half of the steps; else to a tenth over all
    int *inputs, *targets;  // [batch, EVAL_LEN]
    float *logits;          // [batch, EVAL_LEN, V]
} StateRun;

static int state_vocab(const StateTask *t) { return t->tokens > t->states ? t->tokens : t->states; }

// Fills B rows of T tokens and states; `stream` chooses fresh ones.
static void state_batch(const StateRun *r, int B, int T, uint64_t stream) {
    for (int b = 0; b < B; b++)
        for (int t = 0, state = r->task->first; t < T; t++) {
            int token = (int)(rng_uniform(r->seed, RNG_TEST, stream, (uint64_t)b * T + t) * r->task->tokens);
            r->inputs[b * T + t] = token;
            r->targets[b * T + t] = state = r->task->next(state, token);
        }
}

// Builds and fills the model with the initial weights of the seed. The one built before is left to the end of the
// process.
static void state_model(const Backend *backend, StateRun *r, const char *blocks, int width, int heads, int bf16) {
    ModelConfig c;
    char why[200];
    model_defaults(&c);
    if (!model_parse_blocks(blocks, &c, why, sizeof why)) die(EXIT_USAGE, "%s", why);
    c.vocab_size = state_vocab(r->task);
    c.hidden_size = width;
    c.num_heads = heads;
    c.ffn_dim = 2 * width;
    TensorTable table = model_table(&c);
    RunConfig run = {r->batch, EVAL_LEN, 0, 1, 0, bf16, 2, 64, 0};
    backend->build(&c, &table, &run);
    float *scratch = (float *)xcalloc(table.total, sizeof(float));
    for (int t = 0; t < table.num_tensors; t++) {
        tensor_init(&c, &table, t, r->seed, scratch);
        backend->write_tensor(KIND_WEIGHT, t, scratch);
    }
    free(scratch);
    r->inputs = (int *)xcalloc((size_t)r->batch * EVAL_LEN, sizeof(int));
    r->targets = (int *)xcalloc((size_t)r->batch * EVAL_LEN, sizeof(int));
    r->logits = (float *)xcalloc((size_t)r->batch * EVAL_LEN * c.vocab_size, sizeof(float));
}

// Returns the length that was reached. Ends early where sequences have not grown for PATIENCE steps.
static int state_train(const Backend *backend, const StateRun *r) {
    Batch batch = {r->batch, FIRST_LEN, r->inputs, r->targets, NULL, -1, NULL, NULL, NULL, 0, 1};
    for (int step = 0, grew = 0; step < r->steps && step - grew < PATIENCE; step++) {
        double tokens = (double)r->batch * batch.T;
        state_batch(r, r->batch, batch.T, (uint64_t)step);
        backend->zero_grad();
        double loss = backend->forward_backward(&batch, 1 / tokens) / tokens;
        if (loss < r->solved && batch.T < TRAIN_LEN) batch.T++, grew = step;
        if (batch.T == TRAIN_LEN) grew = step;
        double norm = backend->grad_norm(), progress = (double)step / r->steps, warmup = fmin(1, (step + 1) / 100.0);
        double rate = r->lr * (r->to_zero ? fmin(warmup, 2 * (1 - progress)) : warmup * (1 - 0.9 * progress));
        UpdateConfig update = {step + 1, rate, 0.9, 0.95, 1e-8, 0.01, norm > 1 ? 1 / norm : 1};
        backend->update(&update);
    }
    return batch.T;
}

// right[t]: share of right answers at position t + 1 of fresh sequences
static void state_judge(const Backend *backend, const StateRun *r, double right[EVAL_LEN]) {
    int V = state_vocab(r->task);
    memset(right, 0, EVAL_LEN * sizeof(double));
    for (int done = 0; done < EVAL_SEQUENCES; done += r->batch) {
        int B = EVAL_SEQUENCES - done < r->batch ? EVAL_SEQUENCES - done : r->batch;
        Batch batch = {B, EVAL_LEN, r->inputs, r->targets, NULL, -1, r->logits, NULL, NULL, 0, 1};
        state_batch(r, B, EVAL_LEN, ((uint64_t)1 << 40) + (uint64_t)done);
        backend->evaluate(&batch);
        for (int row = 0; row < B * EVAL_LEN; row++) {
            int best = 0;
            for (int v = 1; v < V; v++)
                if (r->logits[(size_t)row * V + v] > r->logits[(size_t)row * V + best]) best = v;
            right[row % EVAL_LEN] += best == r->targets[row];
        }
    }
    for (int t = 0; t < EVAL_LEN; t++) right[t] /= EVAL_SEQUENCES;
}

static double state_accuracy(const double right[EVAL_LEN]) {  // at the positions that count
    double sum = 0;
    for (int t = EVAL_FROM; t < EVAL_LEN; t++) sum += right[t];
    return sum / (EVAL_LEN - EVAL_FROM);
}

#endif
