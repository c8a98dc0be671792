// reshard.cuh: from all heads of some tokens to all tokens of some heads, and back: what the ranks of a sequence
// exchange around an sLSTM, packed for an all-to-all.
//
// Rank r of the P ranks, r = g * ways + w, takes group g of the rows and part w of the heads, and all tokens of these.
// A packed buffer holds one piece a rank, one behind the other: [rows of the group][tokens][heads of the part][width],
// where the tokens are those that the sender has, or had.
#ifndef XLSTMC_RESHARD_CUH
#define XLSTMC_RESHARD_CUH

#include "cuda_util.cuh"

typedef struct {
    int B, NH, whole;            // sequences, heads, tokens of a whole sequence
    int ranks, rank;             // P, and this one
    int ways, groups;            // parts of the heads, groups of rows
    int T;                       // this rank's tokens
    int row, rows, head, heads;  // what this rank takes, with all tokens
} Reshard;

// Part p of n things cut in `parts`: where it begins, as segment_begin()
static __host__ __device__ inline int part_begin(int n, int parts, int p) { return (int)((long long)n * p / parts); }
// Which part thing i is in
static __host__ __device__ inline int part_of(int n, int parts, int i) {
    return (int)((((long long)i + 1) * parts - 1) / n);
}

MAYBE_UNUSED
static Reshard reshard_of(int B, int NH, int whole, int ranks, int rank) {
    Reshard s = {B, NH, whole, ranks, rank, ranks, 0, 0, 0, 0, 0, 0};
    for (int rest = NH, t; rest; t = s.ways % rest, s.ways = rest, rest = t) {}  // greatest common divisor
    s.groups = ranks / s.ways;
    s.T = part_begin(whole, ranks, rank + 1) - part_begin(whole, ranks, rank);
    s.row = part_begin(B, s.groups, rank / s.ways);
    s.rows = part_begin(B, s.groups, rank / s.ways + 1) - s.row;
    s.heads = NH / s.ways;
    s.head = rank % s.ways * s.heads;
    return s;
}

// Elements of the piece between the tokens of rank `tokens_of` and the rows and heads of rank `heads_of`, for width 1
MAYBE_UNUSED
static size_t reshard_piece(const Reshard *s, int tokens_of, int heads_of) {
    int g = heads_of / s->ways;
    size_t rows = part_begin(s->B, s->groups, g + 1) - part_begin(s->B, s->groups, g);
    return rows * (part_begin(s->whole, s->ranks, tokens_of + 1) - part_begin(s->whole, s->ranks, tokens_of)) *
           s->heads;
}

// BY_TOKENS: x [B, T, NH, width], the pieces are those of all ranks' heads; else x [rows, whole, heads, width], the
// pieces those of all ranks' tokens. PACK: from x, else to x. A thread an element.
template <typename U, bool BY_TOKENS, bool PACK>
static __global__ void reshard_kernel(Reshard s, U *x, U *packed, int width) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, run = (size_t)s.heads * width;
    const size_t count = BY_TOKENS ? (size_t)s.B * s.T * s.NH * width : (size_t)s.rows * s.whole * run;
    if (i >= count) return;
    size_t at;
    if (BY_TOKENS) {
        const int column = (int)(i % ((size_t)s.NH * width)), w = column / (int)run;
        const size_t token = i / ((size_t)s.NH * width);
        const int b = (int)(token / s.T), t = (int)(token % s.T), g = part_of(s.B, s.groups, b),
                  row = part_begin(s.B, s.groups, g), rows = part_begin(s.B, s.groups, g + 1) - row;
        at = ((size_t)row * s.ways + (size_t)w * rows) * s.T * run + ((size_t)(b - row) * s.T + t) * run + column % run;
    } else {
        const size_t token = i / run;
        const int b = (int)(token / s.whole), t = (int)(token % s.whole), r = part_of(s.whole, s.ranks, t),
                  begin = part_begin(s.whole, s.ranks, r), len = part_begin(s.whole, s.ranks, r + 1) - begin;
        at = (size_t)s.rows * begin * run + ((size_t)b * len + t - begin) * run + i % run;
    }
    if (PACK) packed[at] = x[i];
    else x[i] = packed[at];
}

template <typename U, bool BY_TOKENS, bool PACK>
static void reshard_units(const Reshard *s, void *x, void *packed, int width, cudaStream_t stream) {
    size_t count = BY_TOKENS ? (size_t)s->B * s->T * s->NH * width : (size_t)s->rows * s->whole * s->heads * width;
    if (count == 0) return;
    reshard_kernel<U, BY_TOKENS, PACK><<<ceil_div(count, 256), 256, 0, stream>>>(*s, (U *)x, (U *)packed, width);
    LAUNCH_CHECK();
}

template <typename F, bool BY_TOKENS, bool PACK>
static void reshard(const Reshard *s, F *x, void *packed, int width, cudaStream_t stream) {
    int bytes = width * (int)sizeof(F);
    if (bytes % 16 == 0) reshard_units<uint4, BY_TOKENS, PACK>(s, x, packed, bytes / 16, stream);
    else reshard_units<F, BY_TOKENS, PACK>(s, x, packed, width, stream);
}

#endif
