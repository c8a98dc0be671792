// state_tracking_gpu.cu: one model, one task, one seed on the GPU in bf16 (state_tracking.h says what is trained and
// judged). state_tracking_gpu.py runs it for all and makes a table and a plot.
//
//   make build/state_tracking_gpu
//   build/state_tracking_gpu TASK BLOCKS SEED STEPS LR SOLVED WIDTH HEADS BATCH
//   build/state_tracking_gpu s5 slstm 1 8000 3e-3 0.1 128 1 128
//
// The last line: the length that was reached in training, then the share of right answers at positions 1 to 256.

#define TESTING
#include "../../train_xlstm.cu"
#include "state_tracking.h"

int main(int argc, char **argv) {
    if (argc != 10) die(EXIT_USAGE, "usage: state_tracking_gpu TASK BLOCKS SEED STEPS LR SOLVED WIDTH HEADS BATCH");
    StateRun run = {};
    for (const StateTask &task : STATE_TASKS)
        if (!strcmp(task.name, argv[1])) run.task = &task;
    if (!run.task) die(EXIT_USAGE, "no task is called '%s'; there are parity, mod5 and s5", argv[1]);
    run.seed = (uint64_t)atoi(argv[3]);
    run.steps = atoi(argv[4]);
    run.lr = atof(argv[5]);
    run.solved = atof(argv[6]);
    run.to_zero = 1;
    run.batch = atoi(argv[9]);
    state_model(&cuda_backend, &run, argv[2], atoi(argv[7]), atoi(argv[8]), 1);
    double right[EVAL_LEN];
    printf("%d", state_train(&cuda_backend, &run));
    state_judge(&cuda_backend, &run, right);
    for (int t = 0; t < EVAL_LEN; t++) printf(" %.4f", right[t]);
    printf("\n");
    return 0;
}
