// state_tracking.c: running parity of random bits on the CPU (state_tracking.h says what is trained and judged).
// Sequences begin short and grow by a token whenever a batch is solved: from length 40 on alone, whether an sLSTM finds
// the solution depends on the seed. state_tracking_gpu.cu has more tasks.
//
//   make build/state_tracking && build/state_tracking            (a table: model x seed, accuracy; some 5 minutes)

#include "../../train_xlstm.c"
#include "state_tracking.h"

int main(int argc, char **argv) {
    const char *blocks[] = {"slstm*2", "mlstm*2", "mlstm,slstm"};
    int steps = argc > 1 ? atoi(argv[1]) : 2500, width = 32, heads = 2;
    double lr = argc > 2 ? atof(argv[2]) : 8e-3, right[EVAL_LEN];
    printf("| model (D %d, %d heads) | seed | accuracy at positions %d to %d |\n|---|---|---|\n", width, heads,
           EVAL_FROM + 1, EVAL_LEN);
    for (int k = 0; k < 3; k++)
        for (int seed = 1; seed <= 3; seed++) {
            StateRun run = {&STATE_TASKS[0], (uint64_t)seed, 64, steps, lr, 0.05, 1, NULL, NULL, NULL};
            memset(&model, 0, sizeof model);
            state_model(&cpu_backend, &run, blocks[k], width, heads, 0);
            state_train(&cpu_backend, &run);
            state_judge(&cpu_backend, &run, right);
            printf("| %s | %d | %.2f %% |\n", blocks[k], seed, 100 * state_accuracy(right));
            fflush(stdout);
            free(run.inputs);
            free(run.targets);
            free(run.logits);
        }
    return 0;
}
