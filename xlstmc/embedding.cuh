// embedding.cuh: the token embedding.
//   forward x[r] = w[tokens[r]],  backward dw[tokens[r]] += dx[r]
// The backward pass sorts the rows by token (stably, so the order of every sum is fixed) and adds up runs of equal
// tokens. The sorted rows are cut into tiles of equal length, so a token that fills half the batch costs no more than
// others. A run belongs to the tile in which it begins; what it has in later tiles goes through partial sums.
#ifndef XLSTMC_EMBEDDING_CUH
#define XLSTMC_EMBEDDING_CUH

#include "floats.cuh"

enum { EMBEDDING_THREADS = 128, EMBEDDING_TILE = 64, EMBEDDING_AHEAD = 8 };  // sorted rows of a tile; loads in flight
enum { SORT_THREADS = 1024, SORT_DIGIT = 256 };

// A block copies one row. Costs 6 bytes an element in bf16.
template <typename F, int N>
static __global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_forward_kernel(F *__restrict__ x, const int *__restrict__ tokens, const float *__restrict__ w, int D) {
    const float *from = w + (size_t)tokens[blockIdx.x] * D;
    F *to = x + (size_t)blockIdx.x * D;
    for (int c = threadIdx.x * N; c < D; c += EMBEDDING_THREADS * N) {
        float values[N];
        load_group<N == 4>(values, from + c);
        store_group<N == 4>(to + c, values);
    }
}

// x [rows, D], tokens [rows], w [V, D]
template <typename F>
static void embedding_forward(F *x, const int *tokens, const float *w, int rows, int D, cudaStream_t stream) {
    bool quads = quads_aligned(x, D) && quads_aligned(w, D);
    auto kernel = quads ? embedding_forward_kernel<F, 4> : embedding_forward_kernel<F, 1>;
    kernel<<<rows, EMBEDDING_THREADS, 0, stream>>>(x, tokens, w, D);
    LAUNCH_CHECK();
}

// One pass of a stable radix sort, without atomics: block k looks at all rows, counts those whose digit is below k, and
// writes those whose digit is k from there on, in order. in NULL: rows 0 .. rows-1. The digit is token / DIVISOR,
// modulo SORT_DIGIT for the first pass; for the last pass it is whole.
template <int DIVISOR>
static __global__ void __launch_bounds__(SORT_THREADS)
    sort_pass_kernel(int *__restrict__ out, const int *__restrict__ in, const int *__restrict__ tokens, int rows) {
    const unsigned all = 0xffffffffu;
    __shared__ int counts[32];  // of a warp
    int bucket = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, smaller = 0;
    auto digit = [&](int row) { return DIVISOR == 1 ? tokens[row] % SORT_DIGIT : tokens[row] / DIVISOR; };
#pragma unroll 8
    for (int i = threadIdx.x; i < rows; i += SORT_THREADS) smaller += digit(in ? in[i] : i) < bucket;
    smaller = __reduce_add_sync(all, smaller);
    if (lane == 0) counts[warp] = smaller;
    __syncthreads();
    int begin = __reduce_add_sync(all, counts[lane]);
    __syncthreads();  // the counts have been read
    for (int base = 0; base < rows; base += SORT_THREADS) {
        int i = base + threadIdx.x, row = i < rows ? (in ? in[i] : i) : 0, mine = i < rows && digit(row) == bucket;
        unsigned votes = __ballot_sync(all, mine);
        if (lane == 0) counts[warp] = __popc(votes);
        __syncthreads();
        int count = counts[lane], before = __reduce_add_sync(all, lane < warp ? count : 0);
        if (mine) out[begin + before + __popc(votes & ((1u << lane) - 1))] = row;
        begin += __reduce_add_sync(all, count);
        __syncthreads();
    }
}

// order [rows]: rows sorted by token. dx is read once and dw read and written where a run begins: at most 10 bytes an
// element in bf16. partial [tiles, D] receives the sum of the run that continues from the tile before, if any.
template <typename F, int N>
static __global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_backward_kernel(float *__restrict__ dw, float *__restrict__ partial, const F *__restrict__ dx,
                              const int *__restrict__ tokens, const int *__restrict__ order, int rows, int D) {
    __shared__ int row_of[EMBEDDING_TILE], token_of[EMBEDDING_TILE];
    int base = blockIdx.x * EMBEDDING_TILE, count = min(EMBEDDING_TILE, rows - base);
    if (threadIdx.x < count) {
        row_of[threadIdx.x] = order[base + threadIdx.x];
        token_of[threadIdx.x] = tokens[row_of[threadIdx.x]];
    }
    __syncthreads();
    int c = (blockIdx.y * EMBEDDING_THREADS + threadIdx.x) * N;
    if (c >= D) return;
    bool continued = base > 0 && tokens[order[base - 1]] == token_of[0];
    float sum[N] = {};
    for (int i0 = 0; i0 < count; i0 += EMBEDDING_AHEAD) {
        float in[EMBEDDING_AHEAD][N];
#pragma unroll
        for (int j = 0; j < EMBEDDING_AHEAD; j++)
            if (i0 + j < count) load_group<N == 4>(in[j], dx + (size_t)row_of[i0 + j] * D + c);
#pragma unroll
        for (int j = 0; j < EMBEDDING_AHEAD; j++) {
            int i = i0 + j;
            if (i >= count) break;
#pragma unroll
            for (int k = 0; k < N; k++) sum[k] += in[j][k];
            if (i + 1 < count && token_of[i + 1] == token_of[i]) continue;
            if (continued) store_group<N == 4>(partial + (size_t)blockIdx.x * D + c, sum);  // the run ends here
            else add_to_group<N == 4>(dw + (size_t)token_of[i] * D + c, sum);
            continued = false;
#pragma unroll
            for (int k = 0; k < N; k++) sum[k] = 0;
        }
    }
}

// Adds to dw what runs have in the tiles after their first. Block (tile, columns) works if a run that begins in the
// tile before continues here, and follows it to its end.
template <int N>
static __global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_add_kernel(float *__restrict__ dw, const float *__restrict__ partial, const int *__restrict__ tokens,
                         const int *__restrict__ order, int rows, int D) {
    auto token_at = [&](int i) { return tokens[order[i]]; };
    int tile = blockIdx.x + 1, tiles = (rows + EMBEDDING_TILE - 1) / EMBEDDING_TILE, begin = tile * EMBEDDING_TILE;
    int token = token_at(begin);
    if (token_at(begin - 1) != token) return;
    if (tile > 1 && token_at(begin - EMBEDDING_TILE - 1) == token) return;  // it began earlier still
    int end = tile, more;  // the last tile whose first token is this one, plus one
    do {
        int next = end + threadIdx.x;
        more = __syncthreads_count(next < tiles && token_at(next * EMBEDDING_TILE) == token);
        end += more;
    } while (more == EMBEDDING_THREADS);
    int c = (blockIdx.y * EMBEDDING_THREADS + threadIdx.x) * N;
    if (c >= D) return;
    float sum[N] = {};
#pragma unroll 8
    for (int t = tile; t < end; t++) {
        float in[N];
        load_group<N == 4>(in, partial + (size_t)t * D + c);
#pragma unroll
        for (int k = 0; k < N; k++) sum[k] += in[k];
    }
    add_to_group<N == 4>(dw + (size_t)token * D + c, sum);
}

static size_t embedding_order_ints(int rows) { return ((size_t)rows + 63) / 64 * 64; }  // keeps what follows aligned
MAYBE_UNUSED
static size_t embedding_scratch_size(int rows, int D) {  // two orders and the partial sums
    return 2 * embedding_order_ints(rows) + (size_t)ceil_div(rows, EMBEDDING_TILE) * D;
}

// dw [V, D] is added to; dx [rows, D]; tokens [rows]; scratch has embedding_scratch_size(rows, D) elements.
template <typename F>
static void embedding_backward(float *dw, const F *dx, const int *tokens, int rows, int D, int V, int *scratch,
                               cudaStream_t stream) {
    int *by_digit = scratch, *order = scratch + embedding_order_ints(rows);
    float *partial = (float *)(order + embedding_order_ints(rows));
    sort_pass_kernel<1><<<SORT_DIGIT, SORT_THREADS, 0, stream>>>(by_digit, NULL, tokens, rows);
    LAUNCH_CHECK();
    sort_pass_kernel<SORT_DIGIT><<<ceil_div(V, SORT_DIGIT), SORT_THREADS, 0, stream>>>(order, by_digit, tokens, rows);
    LAUNCH_CHECK();
    bool quads = quads_aligned(dw, D) && quads_aligned(dx, D) && quads_aligned(partial, D);
    dim3 blocks(ceil_div(rows, EMBEDDING_TILE), ceil_div(D, EMBEDDING_THREADS * (quads ? 4 : 1)));
    auto kernel = quads ? embedding_backward_kernel<F, 4> : embedding_backward_kernel<F, 1>;
    kernel<<<blocks, EMBEDDING_THREADS, 0, stream>>>(dw, partial, dx, tokens, order, rows, D);
    LAUNCH_CHECK();
    if (--blocks.x == 0) return;  // one tile: no run leaves it
    auto add_kernel = quads ? embedding_add_kernel<4> : embedding_add_kernel<1>;
    add_kernel<<<blocks, EMBEDDING_THREADS, 0, stream>>>(dw, partial, tokens, order, rows, D);
    LAUNCH_CHECK();
}

#endif
