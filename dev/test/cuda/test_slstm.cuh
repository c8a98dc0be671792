// test_slstm.cuh: the sLSTM kernels against the CPU: outputs, states, gradients, with resets and carried states, one
// block a head and many, tasks in one pass and in several; the kernels that exchange through L2 and, in bf16, every
// kind of cluster that holds the head.
#ifndef DEV_TEST_CUDA_TEST_SLSTM_CUH
#define DEV_TEST_CUDA_TEST_SLSTM_CUH

#include "../../../xlstmc/slstm.cuh"
#include "harness.cuh"

extern "C" void oracle_slstm(int B, int T, int NH, int d, const unsigned char *resets, const float *x, const float *R,
                             const float *bias, float *const in[4], float *const out[4], float *const dout[4],
                             float *const din[4], const float *dy, float *y, float *y_prev, float *dx, float *dbias);

typedef struct {
    // resets: one token in `resets` begins a document; 0: none. carried: states and their gradients, in and out
    int B, T, NH, d, resets, carried;
} SlstmCase;

typedef struct {
    size_t state, cells, weights;
    float *x, *R, *bias, *in[4], *dy, *dfinal[4];             // inputs, rounded to the format where the kernels want it
    float *y, *y_prev, *final[4], *dx, *dbias, *dinitial[4];  // what the CPU makes of them
    float *dbias_before;
    unsigned char *resets;
    int *doc_start;
} SlstmHost;

template <typename F>
static SlstmHost slstm_host(const SlstmCase *c) {
    SlstmHost h;
    h.state = (size_t)c->B * c->NH * c->d;
    h.cells = h.state * c->T;
    h.weights = (size_t)4 * c->NH * c->d * c->d;
    size_t D = (size_t)c->NH * c->d, tokens = (size_t)c->B * c->T;
    h.x = fill_random(4 * h.cells, 1, 1.0f);
    h.R = fill_random(h.weights, 2, 0.7f / sqrtf((float)c->d));
    h.bias = fill_random(4 * D, 3, 0.5f);
    for (size_t k = 0; k < 4 * D; k++) h.bias[k] += k / c->d % 4 == 1 ? 2.0f : 0.0f;  // forget gates mostly open
    const float scale[4] = {0.4f, 0.7f, 0.1f, 0.3f};
    for (int k = 0; k < 4; k++) h.in[k] = fill_random(h.state, 4 + k, scale[k]);
    for (size_t k = 0; k < h.state; k++) h.in[2][k] += 1.3f;
    for (int k = 0; k < 4; k++) h.dfinal[k] = fill_random(h.state, 11 + k, 1.0f);
    h.dy = fill_random(h.cells, 9, 1.0f);
    round_to<F>(h.x, 4 * h.cells);
    round_to<F>(h.R, h.weights);
    round_to<F>(h.dy, h.cells);

    h.resets = (unsigned char *)xcalloc(tokens, 1);
    h.doc_start = (int *)xcalloc(tokens, sizeof(int));
    for (size_t k = 0; k < tokens; k++) {
        int t = (int)(k % c->T);
        h.resets[k] = c->resets && (k * 7919 + k / c->T * 31) % c->resets == 0;
        h.doc_start[k] = h.resets[k] ? t : t > 0 ? h.doc_start[k - 1] : NO_RESET;
    }
    h.y = (float *)xcalloc(h.cells, sizeof(float));
    h.y_prev = (float *)xcalloc(h.cells, sizeof(float));
    for (int k = 0; k < 4; k++) h.final[k] = (float *)xcalloc(h.state, sizeof(float));
    for (int k = 0; k < 4; k++) h.dinitial[k] = (float *)xcalloc(h.state, sizeof(float));
    h.dx = (float *)xcalloc(4 * h.cells, sizeof(float));
    h.dbias = fill_random(4 * D, 10, 1.0f);
    h.dbias_before = fill_random(4 * D, 10, 1.0f);
    return h;
}

static void slstm_host_free(SlstmHost *h) {
    void *all[] = {h->x,  h->R,     h->bias,         h->dy,     h->y,        h->y_prev,
                   h->dx, h->dbias, h->dbias_before, h->resets, h->doc_start};
    for (size_t k = 0; k < sizeof all / sizeof *all; k++) free(all[k]);
    for (int k = 0; k < 4; k++) {
        free(h->in[k]);
        free(h->final[k]);
        free(h->dfinal[k]);
        free(h->dinitial[k]);
    }
}

template <typename F, typename X>
static void check_slstm(const char *what, const SlstmCase *c, const char *kernels, const X *got, const float *want,
                        size_t n, double fp32, double bf16_tolerance) {
    char name[160];
    snprintf(name, sizeof name, "slstm %s B%d T%d NH%d d%d%s%s%s: %s", format_name<F>(), c->B, c->T, c->NH, c->d,
             c->resets ? " resets" : "", c->carried ? " carried" : "", kernels, what);
    float *host = to_host(got, n);
    check_close(name, host, want, n, tolerance<F>(fp32, bf16_tolerance));
    free(host);
}

// The name of a choice of kernels, NULL: it has none for this shape
static const char *slstm_choice_name(const SlstmShape *shape, int choice) {
    static char name[64];
    if (choice == SLSTM_NO_CLUSTER) return " L2";
    slstm_cluster_choice = choice;
    SlstmClusterPlan forward = slstm_cluster_plan(shape, 0), backward = slstm_cluster_plan(shape, 1);
    if (!forward.kernels && !backward.kernels) return NULL;
    const SlstmClusterKernels *k = forward.kernels ? forward.kernels : backward.kernels;
    snprintf(name, sizeof name, " cluster %dx%dx%d", k->ctas, k->warps, k->rows);
    return name;
}

// Runs the kernels of one choice twice on the same memory: what the first run left behind must not matter, and dx must
// be the same in all bits.
template <typename F>
static void test_slstm_choice(const SlstmCase *c, const SlstmHost *h, int choice) {
    SlstmShape shape = {c->B, c->T, c->NH, c->d};
    const char *kernels = slstm_choice_name(&shape, choice);
    slstm_cluster_choice = choice;
    if (!kernels) return;
    size_t D = (size_t)c->NH * c->d;
    Arena arena = {NULL, 0};
    SlstmSaved<F> saved;
    SlstmScratch scratch;
    for (int pass = 0; pass < 2; pass++) {
        arena.used = 0;
        slstm_take_saved(&arena, &shape, &saved);
        slstm_take_scratch<F>(&arena, &shape, &scratch);
        if (pass == 0) arena.base = (char *)device_poisoned<char>(arena.used);
    }
    F *x = to_device<F>(h->x, 4 * h->cells), *R = to_device<F>(h->R, h->weights), *dy = to_device<F>(h->dy, h->cells);
    F *y = device_poisoned<F>(h->cells), *dx = device_poisoned<F>(4 * h->cells);
    float *bias = to_device<float>(h->bias, 4 * D), *dbias = to_device<float>(h->dbias_before, 4 * D);
    float *in[4], *out[4], *dout[4], *din[4];
    float *partial = device_poisoned<float>(slstm_partial_size(&shape));
    int *doc_start = to_device_int(h->doc_start, (size_t)c->B * c->T);
    for (int k = 0; k < 4; k++) {
        in[k] = to_device<float>(h->in[k], h->state);
        out[k] = device_poisoned<float>(h->state);
        dout[k] = to_device<float>(h->dfinal[k], h->state);
        din[k] = device_poisoned<float>(h->state);
    }
    SlstmState initial = {}, final = {out[0], out[1], out[2], out[3], D}, dfinal = {}, dinitial = {};
    if (c->carried) {
        initial = {in[0], in[1], in[2], in[3], D};
        dfinal = {dout[0], dout[1], dout[2], dout[3], D};
        dinitial = {din[0], din[1], din[2], din[3], D};
    }

    float *first = NULL;
    for (int run = 0; run < 2; run++) {
        CUDA_CHECK(cudaMemcpy(dbias, h->dbias_before, 4 * D * sizeof(float), cudaMemcpyHostToDevice));
        slstm_forward<F>(&shape, x, R, bias, doc_start, initial, final, y, &saved, &scratch, 0);
        slstm_backward<F>(&shape, R, &saved, dy, doc_start, initial, final, dfinal, dinitial, dx, dbias, partial,
                          &scratch, 0);
        if (first) check_slstm<F>("dx of two runs", c, kernels, dx, first, 4 * h->cells, 0, 0);
        free(first);
        first = to_host(dx, 4 * h->cells);
    }
    free(first);

    const char *const names[4] = {"final y", "final c", "final n", "final m"};
    check_slstm<F>("y", c, kernels, y, h->y, h->cells, 4e-7, 5e-3);
    check_slstm<F>("y_prev", c, kernels, saved.y_prev, h->y_prev, h->cells, 4e-7, 5e-3);
    for (int k = 0; k < 4; k++) check_slstm<F>(names[k], c, kernels, out[k], h->final[k], h->state, 3e-7, 8e-4);
    const char *const gradients[4] = {"initial dy", "initial dc", "initial dn", "initial dm"};
    const double limits[4][2] = {{3e-6, 1e-2}, {5.9e-7, 6.5e-3}, {7.6e-7, 8.5e-3}, {7.2e-7, 8.1e-3}};  // fp32, bf16
    for (int k = 0; k < 4 && c->carried; k++)
        check_slstm<F>(gradients[k], c, kernels, din[k], h->dinitial[k], h->state, limits[k][0], limits[k][1]);
    check_slstm<F>("dx", c, kernels, dx, h->dx, 4 * h->cells, 7e-7, 1e-2);
    check_slstm<F>("dbias", c, kernels, dbias, h->dbias, 4 * D, 5e-6, 7.7e-3);

    void *device[] = {arena.base, x, R, dy, y, dx, bias, dbias, partial, doc_start};
    for (size_t k = 0; k < sizeof device / sizeof *device; k++) CUDA_CHECK(cudaFree(device[k]));
    for (int k = 0; k < 4; k++)
        for (float *state : {in[k], out[k], dout[k], din[k]}) CUDA_CHECK(cudaFree(state));
}

template <typename F>
static void test_slstm_case(const SlstmCase *c) {
    SlstmHost h = slstm_host<F>(c);
    oracle_slstm(c->B, c->T, c->NH, c->d, h.resets, h.x, h.R, h.bias, c->carried ? h.in : NULL, h.final,
                 c->carried ? h.dfinal : NULL, c->carried ? h.dinitial : NULL, h.dy, h.y, h.y_prev, h.dx, h.dbias);
    test_slstm_choice<F>(c, &h, SLSTM_NO_CLUSTER);
    for (int row = 0; row < SLSTM_CLUSTERS && sizeof(F) == 2; row++) test_slstm_choice<F>(c, &h, row);
    slstm_cluster_choice = SLSTM_ANY;
    slstm_host_free(&h);
}

// one_block: only heads that one block holds, which exchanges with itself in shared memory, or only the others
static void test_slstm(int one_block) {
    // clang-format off
    static const SlstmCase cases[] = {  // B, T, NH, d, a reset every so many tokens, carried states
        {1, 1, 1, 1, 0, 0},    {3, 2, 2, 5, 0, 1},     {5, 37, 4, 16, 11, 1},  {20, 37, 1, 32, 7, 1},
        {16, 200, 4, 64, 0, 0}, {3, 37, 2, 64, 5, 1},  {1, 2, 1, 100, 0, 1},   {5, 37, 4, 100, 9, 1},
        {16, 200, 4, 192, 50, 1}, {16, 37, 4, 256, 13, 1}, {1, 200, 1, 256, 0, 0}, {20, 37, 2, 512, 17, 1},
        {48, 9, 4, 512, 4, 1}, {300, 7, 4, 256, 3, 1}, {16, 20, 1, 768, 8, 0}, {9, 5, 1, 1024, 3, 1},
        {1, 1, 2, 256, 0, 1},  {7, 33, 3, 8, 6, 1},    {10, 21, 2, 40, 5, 1},  {19, 19, 2, 200, 7, 1},
        {12, 18, 2, 384, 6, 1}, {29, 37, 2, 192, 7, 1}, {61, 35, 1, 256, 5, 1}, {17, 40, 1, 768, 8, 1},
        {2, 8192, 1, 256, 0, 0},
    };
    // clang-format on
    static const SlstmCase small[] = {{3, 5, 2, 64, 3, 1}, {2, 3, 1, 100, 0, 1}, {9, 4, 1, 256, 3, 0}};
    const size_t count = small_tests ? sizeof small / sizeof *small : sizeof cases / sizeof *cases;
    for (size_t k = 0; k < count; k++) {
        const SlstmCase *c = small_tests ? &small[k] : &cases[k];
        if ((c->d <= 64) != one_block) continue;
        test_slstm_case<float>(c);
        test_slstm_case<bf16>(c);
    }
}
static void test_slstm_block(void) { test_slstm(1); }
static void test_slstm_team(void) { test_slstm(0); }

#endif
