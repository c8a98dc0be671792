// bench_matmul.c: the built-in matrix product of train_xlstm.c against OpenBLAS's sgemm, at the shapes of the models.
// Both take turns, checked against each other first; the best of several runs counts, in GFLOP/s on all threads.
//
//   make build/bench_matmul && build/bench_matmul            needs OpenBLAS (bash scripts/install.sh blas)

#include <cblas.h>  // before the trainer, which is compiled with its built-in product here
#undef I
#undef USE_OPENBLAS
#include "../../train_xlstm.c"

typedef struct {
    const char *what;
    int M, N, K, trans_a, trans_b;
} Shape;

static void product(int use_blas, const Shape *s, const real *a, const real *b, real *c) {
    int lda = s->trans_a ? s->M : s->K, ldb = s->trans_b ? s->K : s->N;
    if (use_blas)
        cblas_sgemm(CblasRowMajor, s->trans_a ? CblasTrans : CblasNoTrans, s->trans_b ? CblasTrans : CblasNoTrans, s->M,
                    s->N, s->K, 1, a, lda, b, ldb, 0, c, s->N);
    else
        gemm(s->M, s->N, s->K, a, s->trans_a ? 1 : lda, s->trans_a ? lda : 1, b, s->trans_b ? 1 : ldb,
             s->trans_b ? ldb : 1, c, s->N, 0);
}

int main(void) {
    const Shape shapes[] = {
        {"D 128: q k v o gates", 2048, 392, 128, 0, 1},    {"D 128: their weight gradient", 392, 128, 2048, 1, 0},
        {"D 128: FFN up", 2048, 768, 128, 0, 1},           {"D 128: FFN down", 2048, 128, 384, 0, 1},
        {"D 512: q k v o gates", 2048, 1544, 512, 0, 1},   {"D 512: input gradient", 2048, 512, 1544, 0, 0},
        {"D 512: weight gradient", 1544, 512, 2048, 1, 0}, {"D 512: FFN up", 2048, 2816, 512, 0, 1},
        {"D 512: FFN down", 2048, 512, 1408, 0, 1},        {"square", 2048, 2048, 2048, 0, 1},
    };
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    openblas_set_num_threads(threads);
    printf("%d threads, GFLOP/s\n| product | M N K | built-in | OpenBLAS | ratio |\n|---|---|---|---|---|\n", threads);
    for (size_t k = 0; k < sizeof shapes / sizeof shapes[0]; k++) {
        const Shape *s = &shapes[k];
        size_t size_a = (size_t)s->M * s->K, size_b = (size_t)s->K * s->N, size_c = (size_t)s->M * s->N;
        real *a = (real *)xcalloc(size_a, sizeof(real)), *b = (real *)xcalloc(size_b, sizeof(real));
        real *c[2] = {(real *)xcalloc(size_c, sizeof(real)), (real *)xcalloc(size_c, sizeof(real))};
        double best[2] = {1e30, 1e30}, error = 0, size = 0;
        for (size_t i = 0; i < size_a; i++) a[i] = (real)rng_normal(1, RNG_TEST, k, i);
        for (size_t i = 0; i < size_b; i++) b[i] = (real)rng_normal(2, RNG_TEST, k, i);
        for (int round = 0; round < 15; round++)
            for (int blas = 0; blas < 2; blas++) {
                double start = now_seconds();
                product(blas, s, a, b, c[blas]);
                best[blas] = fmin(best[blas], now_seconds() - start);
            }
        for (size_t i = 0; i < size_c; i++) {
            error += ((double)c[0][i] - c[1][i]) * ((double)c[0][i] - c[1][i]);
            size += (double)c[1][i] * c[1][i];
        }
        if (sqrt(error / size) > 1e-5) die(EXIT_RUN, "%s: the products differ by %.1e", s->what, sqrt(error / size));
        double flop = 2e-9 * s->M * s->N * s->K;
        printf("| %s | %d %d %d | %.0f | %.0f | %.2f |\n", s->what, s->M, s->N, s->K, flop / best[0], flop / best[1],
               best[1] / best[0]);
        free(a);
        free(b);
        free(c[0]);
        free(c[1]);
    }
    return 0;
}
