// bench_slstm.cu: microseconds a time step of the sLSTM kernels in bf16, forward alone and forward with backward: those
// that exchange through L2, every kind of cluster that holds the head, and what the plan chooses.
//
//   bench_slstm [NH,d,B,T ...]      e.g. bench_slstm 4,192,16,1024
//   build:  nvcc -std=c++17 -O2 -arch=native dev/bench/bench_slstm.cu -o build/bench_slstm

#include "../test/cuda/harness.cuh"
#include "../../xlstmc/slstm.cuh"

enum { RUNS = 10 };

static int compare_floats(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

typedef struct {
    SlstmShape shape;
    SlstmSaved<bf16> saved;
    SlstmScratch scratch;
    bf16 *x, *R, *y, *dy, *dx;
    float *bias, *dbias, *partial;
    int *doc_start;
} Buffers;

static void take_buffers(Arena *a, Buffers *u) {
    const SlstmShape *s = &u->shape;
    size_t tokens = (size_t)s->B * s->T, D = (size_t)s->NH * s->d;
    slstm_take_saved(a, s, &u->saved);
    slstm_take_scratch<bf16>(a, s, &u->scratch);
    u->x = take<bf16>(a, 4 * tokens * D);
    u->R = take<bf16>(a, 4 * D * s->d);
    u->y = take<bf16>(a, tokens * D);
    u->dy = take<bf16>(a, tokens * D);
    u->dx = take<bf16>(a, 4 * tokens * D);
    u->bias = take<float>(a, 4 * D);
    u->dbias = take<float>(a, 4 * D);
    u->partial = take<float>(a, slstm_partial_size(s));
    u->doc_start = take<int>(a, tokens);
}

// Random numbers, which repeat after four million: the time to make them would be many times that of the kernels.
static void fill(bf16 *device, size_t n, uint64_t seed, float scale) {
    size_t period = n < 1 << 22 ? n : 1 << 22;
    float *host = fill_random(period, seed, scale);
    bf16 *rounded = to_device<bf16>(host, period);
    for (size_t at = 0; at < n; at += period)
        CUDA_CHECK(cudaMemcpy(device + at, rounded, (n - at < period ? n - at : period) * sizeof(bf16),
                              cudaMemcpyDeviceToDevice));
    CUDA_CHECK(cudaFree(rounded));
    free(host);
}

// Median over the runs of the milliseconds of the forward, or of the forward and backward pass.
static float measure(Buffers *u, int backward) {
    SlstmState none = {};
    float times[RUNS];
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (int run = -2; run < RUNS; run++) {
        CUDA_CHECK(cudaEventRecord(begin, 0));
        slstm_forward(&u->shape, u->x, u->R, u->bias, u->doc_start, none, none, u->y, &u->saved, &u->scratch, 0);
        if (backward)
            slstm_backward(&u->shape, u->R, &u->saved, u->dy, u->doc_start, none, none, none, none, u->dx,
                           u->dbias, u->partial, &u->scratch, 0);
        CUDA_CHECK(cudaEventRecord(end, 0));
        CUDA_CHECK(cudaEventSynchronize(end));
        if (run >= 0) CUDA_CHECK(cudaEventElapsedTime(&times[run], begin, end));
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    qsort(times, RUNS, sizeof(float), compare_floats);
    return (times[RUNS / 2 - 1] + times[RUNS / 2]) / 2;
}

// Clusters: blocks x warps x sequences, at once of all. Otherwise: blocks a head x teams, passes.
static void print_plan(const SlstmClusterPlan *clusters, SlstmPlan plan) {
    const SlstmClusterKernels *k = clusters->kernels;
    char text[64];
    if (k)
        snprintf(text, sizeof text, "%dx%dx%d, %d of %d%s", k->ctas, k->warps, k->rows,
                 clusters->active < clusters->tasks ? clusters->active : clusters->tasks, clusters->tasks,
                 clusters->shared < 114 * 1024 ? ", two a multiprocessor" : "");
    else snprintf(text, sizeof text, "%d x %d, %d", plan.ctas, plan.teams, plan.passes);
    printf(" %-26s", text);
}

static void bench_slstm(const char *shape) {
    Buffers u = {};
    SlstmShape *s = &u.shape;
    if (sscanf(shape, "%d,%d,%d,%d", &s->NH, &s->d, &s->B, &s->T) != 4) die(EXIT_USAGE, "'%s' is not NH,d,B,T", shape);
    Arena arena = {NULL, 0};
    take_buffers(&arena, &u);
    CUDA_CHECK(cudaMalloc((void **)&arena.base, arena.used));
    CUDA_CHECK(cudaMemset(arena.base, 0, arena.used));  // doc_start 0: every sequence begins a document
    arena.used = 0;
    take_buffers(&arena, &u);
    size_t cells = (size_t)s->B * s->T * s->NH * s->d;
    fill(u.x, 4 * cells, 1, 1.0f);
    fill(u.R, (size_t)4 * s->NH * s->d * s->d, 2, 0.7f / sqrtf((float)s->d));
    fill(u.dy, cells, 3, 1.0f);

    printf("NH %d, d %d, B %d, T %d\n", s->NH, s->d, s->B, s->T);
    for (int choice = SLSTM_NO_CLUSTER; choice < SLSTM_CLUSTERS; choice++) {
        slstm_cluster_choice = choice;
        SlstmClusterPlan f = slstm_cluster_plan(s, 0), b = slstm_cluster_plan(s, 1);
        if (choice >= 0 && !f.kernels && !b.kernels) continue;
        if (choice >= 0 && 8 * slstm_cluster_table()[choice].ctas * slstm_cluster_table()[choice].warps > 2 * s->d)
            continue;
        printf("  %-8s", choice == SLSTM_NO_CLUSTER ? "L2" : choice == SLSTM_ANY ? "chosen" : "cluster");
        print_plan(&f, slstm_plan<bf16>(s, 0));
        float forward = 1000 * measure(&u, 0) / s->T;
        printf(" forward %6.3f us |", forward);
        print_plan(&b, slstm_plan<bf16>(s, 1));
        float both = 1000 * measure(&u, 1) / s->T;
        printf(" backward %6.3f us | both %6.3f us\n", both - forward, both);
        fflush(stdout);
    }
    slstm_cluster_choice = SLSTM_ANY;
    CUDA_CHECK(cudaFree(arena.base));
}

int main(int argc, char **argv) {
    static const char *const shapes[] = {"4,192,16,1024", "4,256,16,1024", "1,768,16,1024", "4,256,64,2048"};
    for (int k = 1; k < argc; k++) bench_slstm(argv[k]);
    for (int k = 0; argc == 1 && k < 4; k++) bench_slstm(shapes[k]);
    return 0;
}
