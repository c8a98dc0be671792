// test_pairs.cuh: virtual ranks: the segments of a sequence one after the other on one GPU, as ranks of a sequence
// compute them (mlstm_pairs.cuh), against the CPU trainer's whole run in double: outputs, final states, every gradient.
#ifndef DEV_TEST_CUDA_TEST_PAIRS_CUH
#define DEV_TEST_CUDA_TEST_PAIRS_CUH

#include "test_mlstm.cuh"

enum { MAX_VIRTUAL_RANKS = 5 };

template <typename F>
struct VirtualRank {
    MlstmShape shape;
    MlstmInput<F> in;
    int first;  // of its tokens
    MlstmState enter, final, dfinal;
    MlstmSaved<F> saved;
    MlstmScratch<F> scratch;
    char *memory;
};

template <typename F>
static void virtual_rank(VirtualRank<F> *r, const MlstmCase *c, const MlstmDevice<F> *d, const MlstmHost *x, int first,
                         int tokens) {
    memset((void *)r, 0, sizeof *r);
    r->shape = d->shape;
    r->shape.T = tokens;
    r->first = first;
    r->in = d->in;
    r->in.q += first * x->ld, r->in.k += first * x->ld, r->in.v += first * x->ld;
    r->in.gates += first * r->in.ld_gates, r->in.doc_start += first;
    Arena arena = {NULL, 0};
    for (int pass = 0; pass < 2; pass++) {
        float *states = take<float>(&arena, 3 * x->state);
        mlstm_take_saved(&arena, &r->shape, &r->saved);
        mlstm_take_scratch(&arena, &r->shape, &r->scratch);
        if (pass == 1) {
            r->enter = mlstm_test_state(states, c, x->state);
            r->final = mlstm_test_state(states + x->state, c, x->state);
            r->dfinal = mlstm_test_state(states + 2 * x->state, c, x->state);
            continue;
        }
        r->memory = device_poisoned<char>(arena.used);
        arena = Arena{r->memory, 0};
    }
}

// cuts [ranks + 1]: where the segments begin, and the end. all_pairs: every rank makes pairs, as in a scan; else the
// first one passes on its final states, and none makes a pair that nobody folds
template <typename F>
static void test_pairs_case(const MlstmCase *c, const int *cuts, int ranks, int chunk, bool all_pairs) {
    MlstmHost x = mlstm_test_host<F>(c);
    for (int r = 0; r < ranks; r++)  // doc_start as each rank sees it
        for (int t = cuts[r]; t < cuts[r + 1]; t++)
            x.doc_start[t] = x.resets[t] ? t - cuts[r] : t > cuts[r] ? x.doc_start[t - 1] : NO_RESET;
    MlstmDevice<F> d = mlstm_test_device<F>(c, &x, chunk);
    VirtualRank<F> all[MAX_VIRTUAL_RANKS];
    for (int r = 0; r < ranks; r++) virtual_rank(&all[r], c, &d, &x, cuts[r], cuts[r + 1] - cuts[r]);
    const size_t row = mlstm_pair_row(&d.shape);
    float *pairs = device_poisoned<float>(ranks * row);
    auto makes_pair = [&](int r) { return all_pairs || (r > 0 && r + 1 < ranks); };
    auto pair = [&](int r) { return mlstm_pair_state(d.shape, pairs + r * row); };
    const MlstmState none = {NULL, NULL, NULL, 0};
    for (int r = 0; r < ranks; r++)
        if (makes_pair(r)) mlstm_pair_forward<F>(all[r].shape, all[r].in, pair(r), &all[r].saved, &all[r].scratch, 0);
    for (int r = 0; r < ranks; r++) {
        MlstmState enter = r == 0 ? d.initial : all[r].enter, final = r + 1 < ranks ? all[r].final : d.final;
        if (r > 0 && all_pairs) mlstm_fold(&d.shape, enter, d.initial, pairs, r, 0);
        else if (r > 0) mlstm_fold(&d.shape, enter, pair(0), pairs + row, r - 1, 0);
        auto forward = makes_pair(r) ? mlstm_segment_forward<F> : mlstm_forward<F>;
        forward(all[r].shape, all[r].in, enter, final, d.h + all[r].first * x.Dv, &all[r].saved, &all[r].scratch, 0);
        if (r == 0 && !all_pairs) mlstm_fold(&d.shape, pair(0), final, NULL, 0, 0);
    }
    CUDA_CHECK(cudaMemset(pairs, 0xff, ranks * row * sizeof(float)));
    for (int r = 0; r < ranks; r++)
        mlstm_pair_backward<F>(all[r].shape, all[r].in, d.dh + all[r].first * x.Dv, d.dh_dot_h + all[r].first * c->NH,
                               r > 0 || all_pairs ? pair(r) : none, &all[r].saved, &all[r].scratch, 0);
    for (int r = 0; r < ranks; r++) {
        F *wide = d.wide + all[r].first * x.ld, *dq = wide + x.lead;
        const bool last = r + 1 == ranks;
        if (!last) mlstm_fold_backward(&d.shape, all[r].dfinal, pairs + (r + 1) * row, ranks - r - 1, 0);
        mlstm_cell_backward<F>(all[r].shape, all[r].in, r == 0 ? d.initial : all[r].enter,
                               last ? d.final : all[r].final, last ? none : all[r].dfinal, true,
                               d.dh + all[r].first * x.Dv, dq, dq + x.Dk, dq + 2 * x.Dk, x.ld, wide + x.at_gates, x.ld,
                               d.dbias, &all[r].saved, &all[r].scratch, 0);
    }
    printf("%d segments from %d to %d, %s:\n", ranks, cuts[0], cuts[ranks], all_pairs ? "all pairs" : "one way");
    // The bias of gates is as exact as its terms, whose norm counts where most of the sum cancels: 2.9 times at T 300.
    // In fp32 as without segments: what rounding makes of <q, dq> and <k, dk> adds up in it (doc/results.md).
    const double terms = norm_of(x.out[OUT_DGATES], x.rows * x.G), sum = norm_of(x.out[OUT_DBIAS], x.G);
    mlstm_check_all(c, &x, &d, tolerance<F>(1e-5, 1.5e-2 * fmax(1, terms / sum)));
    for (int r = 0; r < ranks; r++) CUDA_CHECK(cudaFree(all[r].memory));
    CUDA_CHECK(cudaFree(pairs));
    mlstm_test_device_free(&d);
    mlstm_test_host_free(&x);
}

static void test_pairs(void) {
    static const struct {
        MlstmCase c;
        int cuts[MAX_VIRTUAL_RANKS + 1], ranks;
    } cases[] = {
        // B, T, NH, dk, dv, sigmoid, every, carried, odd, f_mean, cap
        {{1, 300, 2, 24, 40, 0, 0, 1, 0, 6, 15}, {0, 150, 300}, 2},
        {{1, 300, 2, 64, 128, 1, 0, 1, 0, 6, 15}, {0, 100, 200, 300}, 3},
        {{1, 301, 3, 16, 16, 0, 40, 0, 0, 6, 0}, {0, 75, 150, 225, 301}, 4},
        {{1, 301, 2, 24, 40, 1, 40, 1, 0, 4, 0}, {0, 3, 130, 256, 298, 301}, 5},
        {{1, 260, 2, 16, 48, 0, 0, 0, 0, -20, 0}, {0, 128, 260}, 2},      // all is forgotten at once
        {{1, 260, 2, 16, 48, 0, 0, 1, 0, 12, 0}, {0, 128, 200, 260}, 3},  // and nothing
        {{1, 385, 2, 7, 13, 0, 64, 1, 1, 6, 15}, {0, 64, 129, 385}, 3},   // documents begin at borders
        {{1, 5000, 1, 128, 256, 0, 0, 1, 0, 6, 15}, {0, 2500, 5000}, 2},  // each segment is walked in parts
        {{1, 5001, 2, 64, 128, 0, 700, 0, 0, 6, 15}, {0, 1667, 3334, 5001}, 3},
    };
    for (int all_pairs = 0; all_pairs < 2; all_pairs++)
        for (auto &k : cases) {
            test_pairs_case<float>(&k.c, k.cuts, k.ranks, MLSTM_CHUNK, all_pairs);
            test_pairs_case<bf16>(&k.c, k.cuts, k.ranks, MLSTM_CHUNK, all_pairs);
            if (!k.c.odd && mlstm_chunk<bf16>(k.c.dk, k.c.dv, 8) == SCAN_CHUNK)
                test_pairs_case<bf16>(&k.c, k.cuts, k.ranks, SCAN_CHUNK, all_pairs);
        }
}

#endif
