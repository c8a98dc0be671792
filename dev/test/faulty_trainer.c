// faulty_trainer.c: the CPU trainer with faults on demand, for test_runs.sh. FAULTS is a comma-separated list of
// KIND@STEP, the step counted from 1 in this process:
//   loss   the loss of that step is NaN       grad   one gradient of that step is infinite
//   state  as loss, and the stored states of --carry-state are NaN too
//   slow   that step takes a minute             die   the last rank ends with an error
// Gradients are reduced in several buckets, though the models of tests are tiny.
//   build and run: make build/faulty_trainer && FAULTS=loss@3 build/faulty_trainer --train ...
#define SHARD_BUCKET ((size_t)4096)
#include "../../train_xlstm.c"

static Backend faulty;
static int step_now = 0;

static int fault_now(const char *kind) {
    const char *list = getenv("FAULTS");
    size_t len = strlen(kind);
    for (const char *at = list; at && *at; at = strchr(at, ','), at += at != NULL)
        if (strncmp(at, kind, len) == 0 && at[len] == '@' && atoi(at + len + 1) == step_now) return 1;
    return 0;
}

static void faulty_zero_grad(void) {
    step_now++;
    cpu_zero_grad();
}

static double faulty_forward_backward(const Batch *batch, double scale) {
    double sum = cpu_forward_backward(batch, scale);
    size_t count = model.table.tensors[0].count;
    for (double end = now_seconds() + 60; fault_now("slow") && now_seconds() < end;) sleep(1);  // a signal wakes it
    if (fault_now("die") && comm.rank == comm.size - 1) die(EXIT_DAMAGED, "a fault on demand");
    if (fault_now("grad")) {
        float *values = (float *)xcalloc(count, sizeof(float));
        values[count - 1] = INFINITY;
        cpu_write_tensor(KIND_GRAD, 0, values);
        free(values);
    }
    if (fault_now("state") && batch->state_row >= 0) {
        float *values = (float *)xcalloc(model.states.total, sizeof(float));
        for (size_t k = 0; k < model.states.total; k++) values[k] = NAN;
        for (int row = 0; row < batch->B; row++) cpu_write_state(batch->state_row + row, values);
        free(values);
    }
    return fault_now("loss") || fault_now("state") ? NAN : sum;
}

int main(int argc, char **argv) {
    faulty = cpu_backend;
    faulty.zero_grad = faulty_zero_grad;
    faulty.forward_backward = faulty_forward_backward;
    return trainer_main(argc, argv, &faulty);
}
