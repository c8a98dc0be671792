// state_tracking.c: can a model follow a state that every token changes? Running parity of random bits: inputs are
// bits, targets the parity so far, which is never an input. Trained on sequences of at most 40 tokens, judged at
// positions 200 to 256 of 1,000 fresh sequences, where only a model that keeps the state itself, not a lookup of
// lengths it has seen, can be right. sLSTM has recurrent weights and can; mLSTM's memory is linear in its inputs and
// cannot. Sequences begin short and grow by a token whenever a batch is solved: from length 40 on alone, whether an
// sLSTM finds the solution depends on the seed.
//
//   make build/state_tracking && build/state_tracking            (a table: model x seed, accuracy; some 5 minutes)

#include "../../train_xlstm.c"

static const double SOLVED = 0.05;  // nats a token; chance is 0.69
enum { FIRST_LEN = 2, TRAIN_LEN = 40, EVAL_LEN = 256, EVAL_FROM = 199, BATCH = 64, EVAL_SEQUENCES = 1000, SEEDS = 3 };

// Fills B rows of T bits and running parities; `stream` and `index` choose fresh bits.
static void parity_batch(int *inputs, int *targets, int B, int T, uint64_t seed, uint64_t stream) {
    for (int b = 0; b < B; b++)
        for (int t = 0, parity = 0; t < T; t++) {
            int bit = rng_uniform(seed, RNG_TEST, stream, (uint64_t)b * T + t) < 0.5;
            inputs[b * T + t] = bit;
            targets[b * T + t] = parity ^= bit;
        }
}

static void train_parity(const Backend *backend, uint64_t seed, int steps, double lr, int *inputs, int *targets) {
    Batch batch = {BATCH, FIRST_LEN, inputs, targets, NULL, -1, NULL, NULL, NULL, 0, 1};
    for (int step = 0; step < steps; step++) {
        double tokens = (double)BATCH * batch.T;
        parity_batch(inputs, targets, BATCH, batch.T, seed, (uint64_t)step);
        backend->zero_grad();
        double loss = backend->forward_backward(&batch, 1 / tokens) / tokens;
        if (loss < SOLVED && batch.T < TRAIN_LEN) batch.T++;
        double norm = backend->grad_norm(), progress = (double)step / steps, warmup = fmin(1, (step + 1) / 100.0);
        UpdateConfig update = {
            step + 1, lr * warmup * (1 - 0.9 * progress), 0.9, 0.95, 1e-8, 0.01, norm > 1 ? 1 / norm : 1};
        backend->update(&update);
    }
}

// Share of right answers at positions EVAL_FROM + 1 .. EVAL_LEN of fresh sequences.
static double accuracy(const Backend *backend, uint64_t seed, int *inputs, int *targets, float *logits) {
    long right = 0, count = 0;
    for (int done = 0; done < EVAL_SEQUENCES; done += BATCH) {
        Batch batch = {
            imin(BATCH, EVAL_SEQUENCES - done), EVAL_LEN, inputs, targets, NULL, -1, logits, NULL, NULL, 0, 1};
        parity_batch(inputs, targets, batch.B, EVAL_LEN, seed, ((uint64_t)1 << 40) + (uint64_t)done);
        backend->evaluate(&batch);
        for (int row = 0; row < batch.B * EVAL_LEN; row++) {
            if (row % EVAL_LEN < EVAL_FROM) continue;
            right += (logits[2 * row + 1] > logits[2 * row]) == targets[row];
            count++;
        }
    }
    return (double)right / (double)count;
}

int main(int argc, char **argv) {
    const char *blocks[] = {"slstm*2", "mlstm*2", "mlstm,slstm"};
    int steps = argc > 1 ? atoi(argv[1]) : 2500, width = 32, heads = 2;
    double lr = argc > 2 ? atof(argv[2]) : 8e-3;
    printf("| model (D %d, %d heads) | seed | accuracy at positions %d to %d |\n|---|---|---|\n", width, heads,
           EVAL_FROM + 1, EVAL_LEN);
    for (int k = 0; k < 3; k++)
        for (int seed = 1; seed <= SEEDS; seed++) {
            ModelConfig c;
            char why[200];
            model_defaults(&c);
            model_parse_blocks(blocks[k], &c, why, sizeof why);
            c.vocab_size = 2;
            c.hidden_size = width;
            c.num_heads = heads;
            c.ffn_dim = 64;
            TensorTable table = model_table(&c);
            RunConfig run = {BATCH, EVAL_LEN, 0, 1, 0, 0, 2, 64, 0};
            memset(&model, 0, sizeof model);  // the models of earlier rounds are left to the end of the process
            cpu_build(&c, &table, &run);
            float *scratch = (float *)xcalloc(table.total, sizeof(float));
            for (int t = 0; t < table.num_tensors; t++) {
                tensor_init(&c, &table, t, (uint64_t)seed, scratch);
                cpu_backend.write_tensor(KIND_WEIGHT, t, scratch);
            }
            int *inputs = (int *)xcalloc(BATCH * EVAL_LEN, sizeof(int)),
                *targets = (int *)xcalloc(BATCH * EVAL_LEN, sizeof(int));
            float *logits = (float *)xcalloc((size_t)BATCH * EVAL_LEN * 2, sizeof(float));
            train_parity(&cpu_backend, (uint64_t)seed, steps, lr, inputs, targets);
            printf("| %s | %d | %.2f %% |\n", blocks[k], seed,
                   100 * accuracy(&cpu_backend, (uint64_t)seed, inputs, targets, logits));
            fflush(stdout);
            free(scratch);
            free(inputs);
            free(targets);
            free(logits);
        }
    return 0;
}
