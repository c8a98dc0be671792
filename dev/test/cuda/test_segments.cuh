// test_segments.cuh: the states that enter the segments of long sequences (mlstm_segments.cuh) against sums in double.
#ifndef DEV_TEST_CUDA_TEST_SEGMENTS_CUH
#define DEV_TEST_CUDA_TEST_SEGMENTS_CUH

#include "../../../xlstmc/mlstm.cuh"
#include "harness.cuh"

typedef struct {
    int B, T, NH, dk, dv;
    int segment_chunks;
    int initial;  // states are given
    float decay;  // the mean of a chunk's
    int resets;   // a chunk in so many lets nothing through; 0: none
} SegmentCase;

enum { SEGMENT_GUARD = 1024 };  // floats behind the last record

typedef struct {
    MlstmShape s;
    int chunks, count;
    size_t rows, matrix, record, row;               // of a head's C; of a sequence in `segments`, and in a state
    float *y, *z, *kscale, *qscale, *inv_den, *ds;  // [rows, NH, dk], [rows, NH, dv], four of [B, NH, T]
    float *decay, *state;                           // [B, NH, chunks], [B, row]
} SegmentHost;

static float *fill_uniform(size_t n, uint64_t seed, float from, float to) {
    float *x = (float *)xcalloc(n, sizeof(float));
    for (size_t k = 0; k < n; k++) x[k] = from + (to - from) * (float)rng_uniform(seed, RNG_TEST, 0, k);
    return x;
}

static SegmentHost segment_test_host(const SegmentCase *c) {
    SegmentHost x;
    x.s = MlstmShape{c->B, c->T, c->NH, c->dk, c->dv, 0, 0, SCAN_CHUNK};
    x.chunks = ceil_div(c->T, SCAN_CHUNK), x.count = ceil_div(x.chunks, c->segment_chunks);
    x.rows = (size_t)c->B * c->T, x.matrix = (size_t)c->dk * c->dv, x.record = c->NH * (x.matrix + c->dk);
    x.row = x.record + 3;
    x.y = fill_random(x.rows * c->NH * c->dk, 1, 1), round_to<bf16>(x.y, x.rows * c->NH * c->dk);
    x.z = fill_random(x.rows * c->NH * c->dv, 2, 1), round_to<bf16>(x.z, x.rows * c->NH * c->dv);
    float **scales[4] = {&x.kscale, &x.qscale, &x.inv_den, &x.ds};
    for (int k = 0; k < 4; k++) *scales[k] = fill_uniform(x.rows * c->NH, 3 + k, k < 3 ? 0 : -1, 1);
    const size_t n = (size_t)c->B * c->NH * x.chunks;
    x.decay = fill_uniform(n, 7, 2 * c->decay > 1 ? 2 * c->decay - 1 : 0, fminf(1, 2 * c->decay));
    for (size_t k = 0; c->resets && k < n; k++)
        if (rng_uniform(8, RNG_TEST, 0, k) < 1.0 / c->resets) x.decay[k] = 0;
    x.state = fill_random(c->B * x.row, 9, 20);
    return x;
}

static void segment_test_host_free(SegmentHost *x) {
    float *all[] = {x->y, x->z, x->kscale, x->qscale, x->inv_den, x->ds, x->decay, x->state};
    for (float *p : all) free(p);
}

// want [count][B][record]: walks through one head token by token
static void segment_test_head(const SegmentCase *c, const SegmentHost *x, bool reverse, int b, int head, float *want) {
    const size_t bh = (size_t)b * c->NH + head, at_C = head * x->matrix, at_n = c->NH * x->matrix + head * c->dk;
    double *C = (double *)xcalloc(x->matrix + c->dk, sizeof(double)), *n = C + x->matrix;
    for (size_t i = 0; c->initial && i < x->matrix; i++) C[i] = x->state[b * x->row + at_C + i];
    for (int i = 0; c->initial && i < c->dk; i++) n[i] = x->state[b * x->row + at_n + i];
    for (int k = 0; k < x->chunks; k++) {
        const int chunk = reverse ? x->chunks - 1 - k : k, segment = chunk / c->segment_chunks;
        const bool enters =
            reverse ? chunk == x->chunks - 1 || (chunk + 1) % c->segment_chunks == 0 : chunk % c->segment_chunks == 0;
        float *out = want + ((size_t)segment * c->B + b) * x->record;
        for (size_t i = 0; enters && i < x->matrix; i++) out[at_C + i] = (float)C[i];
        for (int i = 0; enters && i < c->dk; i++) out[at_n + i] = (float)n[i];
        for (size_t i = 0; i < x->matrix + c->dk; i++) C[i] *= x->decay[bh * x->chunks + chunk];
        for (int t = chunk * SCAN_CHUNK; t < imin((chunk + 1) * SCAN_CHUNK, c->T); t++) {
            const float *y = x->y + (((size_t)b * c->T + t) * c->NH + head) * c->dk;
            const float *z = x->z + (((size_t)b * c->T + t) * c->NH + head) * c->dv;
            const size_t at = bh * c->T + t;
            const double by = reverse ? (double)x->qscale[at] * x->inv_den[at] : x->kscale[at];
            const double by_n = reverse ? (double)x->qscale[at] * x->ds[at] : x->kscale[at];
            for (int i = 0; i < c->dk; i++) {
                const double yi = by * y[i];
                double *row = C + (size_t)i * c->dv;
                for (int j = 0; j < c->dv; j++) row[j] += yi * z[j];
                n[i] += by_n * y[i];
            }
        }
    }
    free(C);
}

// [rows, NH, width] within rows of `ld`, `lead` columns from the left; what lies between must not be read as zeros
static bf16 *segment_test_tensor(const float *x, size_t rows, size_t width, size_t lead, size_t ld) {
    float *wide = fill_random(rows * ld, 10, 1e4f);
    for (size_t r = 0; r < rows; r++) memcpy(wide + r * ld + lead, x + r * width, width * sizeof(float));
    bf16 *device = to_device<bf16>(wide, rows * ld);
    free(wide);
    return device;
}

typedef struct {
    bf16 *y, *z;
    CUtensorMap y_map, z_map;
    MlstmGates gates;
    float *inv_den, *ds, *state, *segments;
    MlstmState initial;
} SegmentDevice;

static SegmentDevice segment_test_device(const SegmentCase *c, const SegmentHost *x) {
    SegmentDevice d;
    memset((void *)&d, 0, sizeof d);
    const size_t Dk = (size_t)c->NH * c->dk, Dv = (size_t)c->NH * c->dv, tokens = x->rows * c->NH;
    d.y = segment_test_tensor(x->y, x->rows, Dk, 8, Dk + 24);
    d.z = segment_test_tensor(x->z, x->rows, Dv, 16, Dv + 16);
    d.y_map = head_tensor_map(d.y + 8, c->B, c->T, c->NH, c->dk, Dk + 24);
    d.z_map = head_tensor_map(d.z + 16, c->B, c->T, c->NH, c->dv, Dv + 16);
    d.gates.kscale = to_device<float>(x->kscale, tokens), d.gates.qscale = to_device<float>(x->qscale, tokens);
    d.gates.decay = to_device<float>(x->decay, (size_t)c->B * c->NH * x->chunks);
    d.inv_den = to_device<float>(x->inv_den, tokens), d.ds = to_device<float>(x->ds, tokens);
    d.state = to_device<float>(x->state, c->B * x->row);
    d.segments = device_poisoned<float>(x->count * c->B * x->record + SEGMENT_GUARD);
    if (c->initial) d.initial = MlstmState{d.state, d.state + c->NH * x->matrix, NULL, x->row};
    return d;
}

static void segment_test_device_free(SegmentDevice *d) {
    void *all[] = {d->y,       d->z,  d->gates.kscale, d->gates.qscale, d->gates.decay,
                   d->inv_den, d->ds, d->state,        d->segments};
    for (void *p : all) CUDA_CHECK(cudaFree(p));
}

static void segment_test_same(const char *label, const char *part, bool same) {
    char what[200];
    const float one = 1, got = same;
    format_into(what, sizeof what, "%s: %s", label, part);
    check_close(what, &got, &one, 1, 0);
}

template <bool REVERSE>
static void test_segments_case(const SegmentCase *c) {
    SegmentHost x = segment_test_host(c);
    SegmentDevice d = segment_test_device(c, &x);
    const size_t total = x.count * c->B * x.record, matrices = c->NH * x.matrix;
    float *want = (float *)xcalloc(total, sizeof(float)), *got[2];
    for (int b = 0; b < c->B; b++)
        for (int head = 0; head < c->NH; head++) segment_test_head(c, &x, REVERSE, b, head, want);
    for (int run = 0; run < 2; run++) {
        CUDA_CHECK(cudaMemset(d.segments, 0xff, (total + SEGMENT_GUARD) * sizeof(float)));
        segment_sums<REVERSE>(x.s, d.y_map, d.z_map, d.gates, d.inv_den, d.ds, d.segments, x.count, c->segment_chunks,
                              run == 1, 0);  // the last one's sum is overwritten, too
        segments_enter<REVERSE>(x.s, d.gates.decay, d.initial, d.segments, x.count, c->segment_chunks, NULL, NULL, 0);
        got[run] = to_host(d.segments, total + SEGMENT_GUARD);
    }
    char label[120], what[200];
    format_into(label, sizeof label, "segments %s B%d T%d NH%d %d/%d, %d, decay %g%s%s", REVERSE ? "back" : "on", c->B,
                c->T, c->NH, c->dk, c->dv, x.count, c->decay, c->resets ? " resets" : "", c->initial ? " carried" : "");
    for (int k = 0; k < x.count; k++)  // each segment of all sequences alone: they may differ in size
        for (int n = 0; n < 2; n++) {
            const size_t at = k * c->B * x.record + (n ? matrices : 0), count = n ? x.record - matrices : matrices;
            float *a = take_columns(got[0], x.record, at, count, c->B);
            float *b = take_columns(want, x.record, at, count, c->B);
            format_into(what, sizeof what, "%s: %s entering %d", label, n ? "n" : "C", k);
            check_close(what, a, b, c->B * count, n ? 1e-6 : 3e-3);
            free(a), free(b);
        }
    segment_test_same(label, "the same bits again", !memcmp(got[0], got[1], (total + SEGMENT_GUARD) * sizeof(float)));
    bool untouched = true;
    for (int k = 0; k < SEGMENT_GUARD; k++) untouched &= isnan(got[0][total + k]) != 0;
    segment_test_same(label, "nothing behind", untouched);
    free(want), free(got[0]), free(got[1]);
    segment_test_device_free(&d);
    segment_test_host_free(&x);
}

// The sum over segments alone, as the kernels of mlstm.cuh use it: chunks of MLSTM_CHUNK, any width
template <bool REVERSE>
static void test_segments_enter(int B, int NH, int dk, int dv, int count, int segment_chunks, int initial) {
    const int chunks = count * segment_chunks - segment_chunks / 2, T = chunks * MLSTM_CHUNK - 5;
    const MlstmShape s = {B, T, NH, dk, dv, 0, 0, MLSTM_CHUNK};
    const size_t matrices = (size_t)NH * dk * dv, record = matrices + (size_t)NH * dk, total = count * B * record;
    float *adds = fill_random(total, 1, 1), *state = fill_random(B * (record + 1), 2, 1);
    float *decay = fill_uniform((size_t)B * NH * chunks, 3, 1 - 1.0f / segment_chunks, 1),
          *want = (float *)xcalloc(total, sizeof(float));
    float *segments = to_device<float>(adds, total), *entering = to_device<float>(state, B * (record + 1));
    float *decays = to_device<float>(decay, (size_t)B * NH * chunks);
    const MlstmState given = {entering, entering + matrices, NULL, record + 1}, none = {NULL, NULL, NULL, 0};
    for (int b = 0; b < B; b++)
        for (size_t i = 0; i < record; i++) {
            const size_t head = i < matrices ? i / ((size_t)dk * dv) : (i - matrices) / dk;
            double sum = initial ? state[b * (record + 1) + i] : 0;
            for (int k = 0; k < count; k++) {
                const int segment = REVERSE ? count - 1 - k : k, first = segment * segment_chunks;
                const size_t at = ((size_t)segment * B + b) * record + i;
                want[at] = (float)sum;
                for (int c = first; c < imin(first + segment_chunks, chunks); c++)
                    sum *= decay[((size_t)b * NH + head) * chunks + c];
                sum += adds[at];
            }
        }
    segments_enter<REVERSE>(s, decays, initial ? given : none, segments, count, segment_chunks, NULL, NULL, 0);
    char what[200];
    format_into(what, sizeof what, "segments entered %s B%d NH%d %d/%d, %d of %d%s", REVERSE ? "back" : "on", B, NH, dk,
                dv, count, segment_chunks, initial ? " carried" : "");
    float *got = to_host(segments, total);
    check_close(what, got, want, total, 4e-7);
    free(adds), free(state), free(decay), free(want), free(got);
    CUDA_CHECK(cudaFree(segments)), CUDA_CHECK(cudaFree(entering)), CUDA_CHECK(cudaFree(decays));
}

static void test_segments(void) {
    for (int count : {2, 5, 8, 9, 40})
        for (int initial : {0, 1}) {
            test_segments_enter<false>(2, 3, 7, 13, count, 3, initial);
            test_segments_enter<true>(1, 2, 33, 70, count, 100, initial);
        }
    static const SegmentCase cases[] = {
        // B, T, NH, dk, dv, segment_chunks, initial, decay, resets
        {1, 129, 1, 8, 8, 1, 0, 0.9f, 0},       {2, 700, 3, 16, 40, 3, 1, 0.9f, 0},
        {1, 2001, 2, 64, 128, 9, 0, 0.99f, 0},  {2, 1000, 2, 72, 136, 5, 1, 0.5f, 7},
        {1, 1500, 2, 128, 256, 6, 1, 0.95f, 0}, {2, 900, 1, 104, 512, 4, 0, 0.95f, 5},
        {1, 777, 2, 192, 384, 4, 1, 0.95f, 0},  {1, 900, 1, 168, 72, 4, 0, 0.95f, 0},
        {1, 1000, 2, 256, 512, 5, 1, 0.95f, 9}, {1, 1025, 1, 256, 136, 6, 0, 0.9f, 0},
        {1, 6000, 1, 24, 40, 47, 1, 0.999f, 0},  // decays of more than 32 chunks
        {1, 6000, 1, 24, 40, 47, 1, 0.01f, 0},   // g is soon next to nothing
    };
    for (size_t k = 0; scan_runs_here() && k < sizeof cases / sizeof *cases; k++) {
        test_segments_case<false>(&cases[k]);
        test_segments_case<true>(&cases[k]);
    }
}

#endif
