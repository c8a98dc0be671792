// train_xlstm.cu: the CUDA trainer of xLSTM language models. The same model, flags, files and numbers as train_xlstm.c,
// which is the text to read first; here the layers are kernels (xlstmc/*.cuh, one layer a file) and this file puts them
// together: memory, the three block types, classifier, one CUDA graph a micro-step, and the backend that the training
// loop (xlstmc/trainer.h) drives.
//
//   make && ./train_xlstmcu --model 164m --train 'shards/train_*.bin' --batch 16 --seq-len 2048 --out out/164m
//
// Formats: --precision bf16 (default) keeps activations and the weights that matmuls read in bf16; sums, gates,
// normalisers, states, gradients of weights, master weights and moments are float; between ranks gradients of matrices
// are bf16, too (XLSTM_REDUCE). --precision fp32 keeps all in float, without TF32. Notation: B sequences of T tokens,
// width D, NH heads; rows = B*T. F is the format of activations.
//
// Results do not depend on timing: every sum has a fixed order, so the same command gives the same bits.

#include "xlstmc/adamw.cuh"
#include "xlstmc/blocks4.cuh"
#include "xlstmc/classifier.cuh"
#include "xlstmc/comm_cuda.cuh"
#include "xlstmc/conv.cuh"
#include "xlstmc/cuda_util.cuh"
#include "xlstmc/embedding.cuh"
#include "xlstmc/gated.cuh"
#include "xlstmc/head_norm.cuh"
#include "xlstmc/matmul.cuh"
#include "xlstmc/mlstm.cuh"
#include "xlstmc/norm.cuh"
#include "xlstmc/reshard.cuh"
#include "xlstmc/slstm.cuh"
#include "xlstmc/trainer.h"

enum { MAX_HEAD_DIM = 1024 };    // of the cell kernels
enum { LOGIT_BYTES = 1 << 29 };  // the classifier works on as many rows at once as fill this
enum { ALIGN = 64 };             // elements; where tensors and states begin
static int align_up(int n, int to) { return (n + to - 1) / to * to; }

// ----------------------------------------------------------------------------------------------------------------
// Where tensors and states lie in device memory: first what is read in float, the embedding last, then what matmuls
// read in format F. What is before the embedding is a whole number of ALIGN elements for each rank.
// Tensors that one matmul reads stand without a gap behind each other, as in the table; every other tensor begins at a
// multiple of ALIGN. Gate weights end with zero rows, so that their number is a multiple of 8: matmuls want that, and
// the gradient of a zero row stays zero.

static int gate_rows(int heads) { return align_up(2 * heads, 8); }

static int joins_previous(BlockType type, int slot) {
    if (type == BLOCK_MLSTM) return (slot > M_Q && slot <= M_FGATE) || slot == M_FGATE_BIAS || slot == M_FFN_UP;
    if (type == BLOCK_MLSTM_V1) return slot == V1_FGATE || slot == V1_FGATE_BIAS;
    return 0;
}

typedef enum { PART_SMALL, PART_EMBEDDING, PART_MATMUL, NUM_PARTS } Part;

static Part part_of(const ModelConfig *c, const TensorTable *t, int k) {
    int block = t->tensors[k].block, slot = block < 0 ? 0 : k - t->block_first[block], matmul;
    if (k == t->shell[SHELL_EMBEDDING]) return PART_EMBEDDING;
    if (block < 0) return k == t->shell[SHELL_HEAD] ? PART_MATMUL : PART_SMALL;
    switch (c->block_types[block]) {
        case BLOCK_MLSTM: matmul = (slot >= M_Q && slot <= M_FGATE) || slot == M_OUT_PROJ || slot >= M_FFN_GATE; break;
        case BLOCK_MLSTM_V1: matmul = slot == V1_UP || slot == V1_IGATE || slot == V1_FGATE || slot == V1_DOWN; break;
        default: matmul = (slot >= S_IGATE && slot <= S_RECURRENT) || slot >= S_FFN_UP;
    }
    return matmul ? PART_MATMUL : PART_SMALL;
}

// offsets[tensor] and begins[part], in elements; returns the size of one copy of all tensors.
static size_t device_layout(const ModelConfig *c, const TensorTable *t, size_t *offsets, size_t *begins) {
    size_t at = 0;
    for (int part = 0; part < NUM_PARTS; part++) {
        size_t line = part == PART_EMBEDDING ? ALIGN * (size_t)comm.size : ALIGN;
        begins[part] = at = (at + line - 1) / line * line;
        for (int k = 0; k < t->num_tensors; k++) {
            const TensorSpec *s = &t->tensors[k];
            if (part_of(c, t, k) != part) continue;
            BlockType type = s->block >= 0 ? (BlockType)c->block_types[s->block] : NUM_BLOCK_TYPES;
            int slot = s->block >= 0 ? k - t->block_first[s->block] : 0;
            if (!joins_previous(type, slot)) at = (at + ALIGN - 1) / ALIGN * ALIGN;
            offsets[k] = at;
            at += s->count;
            if ((type == BLOCK_MLSTM && slot == M_FGATE) || (type == BLOCK_MLSTM_V1 && slot == V1_FGATE))
                at = offsets[k - 1] + (size_t)gate_rows(c->num_heads) * (size_t)s->shape[1];
        }
    }
    return (at + ALIGN - 1) / ALIGN * ALIGN;
}

// States of one sequence: all small ones first, then the matrices C, which generation updates in place.
static size_t state_layout(const TensorTable *states, size_t *offsets, size_t *small) {
    size_t at = 0;
    for (int matrices = 0; matrices < 2; matrices++) {
        for (int k = 0; k < states->num_tensors; k++) {
            if ((states->tensors[k].ndim == 3) != matrices) continue;
            offsets[k] = at;
            at += (states->tensors[k].count + ALIGN - 1) / ALIGN * ALIGN;
        }
        if (!matrices) *small = at;
    }
    return at;
}

// ----------------------------------------------------------------------------------------------------------------
// The model

template <typename F>
struct FfnActs {
    F *u;          // [rows, D] normed input
    float *stats;  // [rows, 2]
    F *gate_up;    // [rows, 2U]
    F *act;        // [rows, U]
};

template <typename F>
struct BlockActs {    // what a block keeps for its backward pass
    F *u;             // [rows, D] normed input
    float *stats;     // [rows, 2]
    F *proj;          // mlstm [rows, 2Dk+2Dv]: q k v ogate;  mlstm_v1 [rows, 2I]: branch, z
    F *conv, *ca;     // [rows, I or D] convolution before and after SiLU
    F *qkv;           // mlstm_v1 [rows, 3I]
    float *gates;     // [rows, G] igate, fgate before bias and cap; G = gate_rows(NH)
    F *h;             // [rows, Dv or I or D] cell output
    float *hn_stats;  // [rows, NH, 2]
    F *y;             // [rows, Dv or I] gated, input of the last projection
    MlstmSaved<F> mlstm;
    SlstmSaved<F> slstm;
    F *x_mid;  // [rows, D] residual stream between the cell and the FFN
    FfnActs<F> ffn;
};

// What may differ from one micro-step to the next and yet be the same CUDA graph is read from device memory.
typedef struct {
    int B, T, training, stateful;
    int whole, reduce;  // as in Batch: with --sp; gradients leave
    int first;          // the update's first micro-step, and gradients of weight matrices can be written, not added to
} GraphKey;

// The gradient of a weight matrix, dw[N, K] += dout[rows, N]^T in[rows, K], which nothing waits for before the step's
// end. The scan of an sLSTM leaves much of the GPU idle, so products that come shortly before it run beside it.
template <typename F>
struct WeightProduct {
    float *dw;  // in m->grads
    const F *dout, *in;
    size_t ld_dout, ld_in;
    int rows, N, K;
};
enum { MAX_LATER = 2 };

enum { MAX_GRAPHS = 8 };
typedef struct {
    GraphKey key;
    int runs;  // the first run is an ordinary one: it asks cuBLASLt for its algorithms
    cudaGraphExec_t exec;
} Graph;

template <typename F>
struct Model {
    ModelConfig config;
    TensorTable table, states;
    RunConfig run;
    char *memory;  // the one allocation
    char *window;  // its beginning, which the copies of comm_copies.cuh can reach on other ranks
    size_t window_bytes;
    char *workspace;  // of matmuls, on m->stream and on `side`
    cudaStream_t stream;
    size_t *offsets, total;  // of tensors; elements of one copy
    size_t begins[NUM_PARTS];
    size_t *state_offsets, state_size, state_small;
    Shards shards;          // of params, grads and weights
    int own_moments;        // 1: m and v hold this rank's pieces only, [shards_owned]
    float *params, *grads;  // [shards_padded], which is total with one rank
    bf16 *rounded;          // the same: gradients of PART_EMBEDDING on as they travel, then their sums; NULL: in float
    int fresh, first;       // gradients are those of no micro-step yet; see GraphKey
    int last_of_step;       // 1: gradients are complete with this micro-step, and their norm is wanted
    int direct;             // 1: what products make is complete with them, and goes to `rounded` at once
    float *m, *v;           // the same, or [shards_owned]
    F *weights;             // params in format F (the same memory if F is float)
    UpdateChunk *chunks;    // device
    int num_chunks;
    int *bucket_chunks;  // [num_buckets + 1] the first chunk that begins in a bucket or behind it
    // Several ranks
    cudaStream_t exchange_stream, gradient_stream;  // of the ranks of a sequence; of gradients and weights
    cudaEvent_t worked, exchanged, reduced;
    int quiet;                           // 1: steps are long: see quiet_links
    cudaEvent_t *gathered;               // [num_buckets] with own_moments: a bucket's weights are there
    int under_way;                       // 1: m->stream has not waited for the end of the last exchange
    size_t unsent;                       // buckets whose gradients have not left, the first ones
    size_t unrounded;                    // elements not yet in `rounded`, the first ones
    float *entering, *leaving, *dstate;  // [max_batch][state_size] of this rank's segments: see Sequence
    char *exchange;
    float *folded;  // in it: the pairs that this rank is to fold, in order
    int num_folded;
    int *whole_start;                   // doc_start of the rows that this rank's sLSTMs take, [rows, whole]
    float *stored;                      // [num_state_rows][state_size]
    float *state_in, *state_out;        // [max_batch][state_size]
    float *decode_state, *decode_in;    // [state_size], [state_small]
    int *inputs, *targets, *doc_start;  // [rows] device
    int *decode_token;                  // [1] device
    float *scale;                       // [1] device
    double *sums, *norm_partial;        // [2] loss, squared norm; [norm_partials]
    void *staging;                      // pinned host memory: inputs, targets, doc_start, scale, sums, logits [V]
    F **x;                              // [N+1][rows, D] host array: input of each block, last one's output
    BlockActs<F> *acts;                 // [N]; with recomputation all share the same memory
    F *out;                             // [rows, D] final norm
    float *out_stats, *losses;          // [rows, 2], [rows]
    F *logits;                          // [logit_rows, Vp] one tile of the classifier; Vp = V up to 8
    float *logits_out;                  // [V] decode
    int logit_rows;
    F *dx;                                // [rows, D] gradient of the residual stream
    F *d_wide, *d_mid, *d_mid2, *d_mid3;  // [rows, widest]
    float *dh_dot_h;                      // [rows, NH]
    MlstmScratch<F> mlstm_scratch[2];     // of mlstm and of mlstm_v1 blocks
    SlstmScratch slstm_scratch;
    F *slstm_x;         // [rows, 4D or 2Us] pre-activations of an sLSTM; backward, gradients of its FFN's gate and up
    F *slstm_dx;        // [rows, 4D] gradients of the pre-activations
    cudaStream_t side;  // for what runs beside a scan
    cudaEvent_t fork, join;
    WeightProduct<F> later[MAX_LATER];  // beside the next scan
    int num_later;
    float *partial;  // sums over rows
    int *embedding_scratch;
    Graph graphs[MAX_GRAPHS];
    int num_graphs;
    cudaGraphExec_t decode_graph;
    int decode_runs;
};

typedef struct {  // a batch as the layers see it; the token arrays lie in device memory
    int B, T;
    const int *doc_start;   // [B, T]
    const float *state_in;  // [B][state_size] states before the first token; NULL: fresh
    float *state_out;       // [B][state_size] states after the last; NULL: not wanted
    int decode;             // one token of generation: the mLSTM's recurrent step
    // Sequence parallelism: the T tokens are this rank's segment of sequences of `whole` tokens, 0: they are all. Each
    // block fills state_in with what the segments before have left, and dstate with the gradient of what this one
    // leaves.
    int whole;
    const float *state_first;  // [B][state_size] states before the whole sequence; NULL: fresh
    float *dstate;             // [B][state_size]
    int again;                 // a forward pass done again: what enters is still there
} Sequence;

template <typename F>
static int dim(const Model<F> *m, Dim d) {
    return model_dim(&m->config, d);
}
template <typename F>
static size_t offset_of(const Model<F> *m, int block, int slot) {
    return m->offsets[m->table.block_first[block] + slot];
}
template <typename F>
static const float *param(const Model<F> *m, int block, int slot) {
    return m->params + offset_of(m, block, slot);
}
template <typename F>
static const F *weight(const Model<F> *m, int block, int slot) {
    return m->weights + offset_of(m, block, slot);
}
template <typename F>
static float *grad(const Model<F> *m, int block, int slot) {
    return m->grads + offset_of(m, block, slot);
}
template <typename F>
static float *state_at(const Model<F> *m, int block, int slot, const float *base) {  // NULL stays NULL
    return base ? (float *)base + m->state_offsets[m->states.block_first[block] + slot] : NULL;
}

template <typename F>
static NormShape layernorm_v1(const Model<F> *m) {
    NormShape n = {1, 1, dim(m, DIM_D), 1e-5f};
    return n;
}
template <typename F>
static NormShape rmsnorm(const Model<F> *m) {
    NormShape n = {0, 0, dim(m, DIM_D), (float)m->config.norm_eps};
    return n;
}
template <typename F>
static HeadNormShape head_norm(const Model<F> *m, int width, int v1) {
    HeadNormShape n = {1, v1, m->config.num_heads, width / m->config.num_heads, v1 ? 1e-5f : (float)m->config.norm_eps};
    return n;
}

template <typename F>
static void run_product(Model<F> *m, const WeightProduct<F> *p, cudaStream_t stream) {
    if (m->direct)
        matmul_weights(m->rounded + (p->dw - m->grads), 0, p->dout, p->ld_dout, p->in, p->ld_in, p->rows, p->N, p->K,
                       stream);
    else matmul_weights(p->dw, !m->first, p->dout, p->ld_dout, p->in, p->ld_in, p->rows, p->N, p->K, stream);
}

// Runs the product, or keeps it: then dout and in must stay as they are until run_later.
template <typename F>
static void weight_product(Model<F> *m, int keep, WeightProduct<F> p) {
    if (keep) m->later[m->num_later++] = p;
    else run_product(m, &p, m->stream);
}

// What has been kept, on the side stream. begin_later: from here on it may run; m->stream goes on. end_later: it has.
template <typename F>
static void begin_later(Model<F> *m) {
    if (m->num_later) CUDA_CHECK(cudaEventRecord(m->fork, m->stream));
}
template <typename F>
static void end_later(Model<F> *m) {
    if (!m->num_later) return;
    CUDA_CHECK(cudaStreamWaitEvent(m->side, m->fork, 0));
    for (int k = 0; k < m->num_later; k++) run_product(m, &m->later[k], m->side);
    CUDA_CHECK(cudaEventRecord(m->join, m->side));
    CUDA_CHECK(cudaStreamWaitEvent(m->stream, m->join, 0));
    m->num_later = 0;
}

// ----------------------------------------------------------------------------------------------------------------
// Between the ranks that share a sequence. What they exchange goes over a stream of its own, so that m->stream can do
// other work between begin and end.

template <typename F>
static void exchange_begins(Model<F> *m) {
    CUDA_CHECK(cudaEventRecord(m->worked, m->stream));
    CUDA_CHECK(cudaStreamWaitEvent(m->exchange_stream, m->worked, 0));
    m->under_way = 1;
}
// m->stream goes on once the exchange is done, which it may also leave under way: m->exchange is in use until then.
template <typename F>
static void exchange_ends(Model<F> *m, const char *what) {
    if (!m->under_way) return;
    CUDA_CHECK(cudaEventRecord(m->exchanged, m->exchange_stream));
    CUDA_CHECK(cudaStreamWaitEvent(m->stream, m->exchanged, 0));
    m->under_way = 0;
    // Launches behind a rank that does not come would soon wait, too, without an end.
    if (!device_captures(m->stream)) device_wait(m->exchange_stream, what);
}

// [B][count] floats, rows of state_size, from `from` to the next rank (direction 1) or the one before (-1), and those
// of the other neighbour to `to`.
template <typename F>
static void pass_rows(Model<F> *m, int B, size_t count, const float *from, float *to, int direction, const char *what) {
    int next = comm.sp_rank + direction, before = comm.sp_rank - direction;
    if (next < 0 || next >= comm.sp_size) next = -1;
    if (before < 0 || before >= comm.sp_size) before = -1;
    float *sent = (float *)m->exchange, *received = sent + (size_t)B * count;
    size_t width = count * sizeof(float), pitch = m->state_size * sizeof(float);
    exchange_ends(m, "what came before");
    if (next >= 0)
        CUDA_CHECK(cudaMemcpy2DAsync(sent, width, from, pitch, width, B, cudaMemcpyDeviceToDevice, m->stream));
    exchange_begins(m);
    comm.data->send_recv(COMM_SP, sent, next, received, before, width * B, what, m->exchange_stream);
    exchange_ends(m, what);
    if (before >= 0)
        CUDA_CHECK(cudaMemcpy2DAsync(to, pitch, received, width, width, B, cudaMemcpyDeviceToDevice, m->stream));
}

// The convolution reads up to 3 inputs of the segment before: its halo.
template <typename F>
static void conv_enter(Model<F> *m, int b, int slot, const Sequence *s, const F *x, size_t ld, int C) {
    if (!s->whole || s->again) return;
    float *window = state_at(m, b, slot, s->state_out);
    conv_window(window, x, ld, s->doc_start, m->state_size, s->B, s->T, C, m->stream);
    pass_rows(m, s->B, 3 * (size_t)C, window, state_at(m, b, slot, s->state_in), 1, "halo of the convolution");
}

// dx += what the next segment's use of the last inputs gives; dout, pre: as for conv_backward
template <typename F>
static void conv_leave(Model<F> *m, int b, int slot, const Sequence *s, F *dx, size_t ld_dx, const F *dout,
                       const F *pre, const float *w, int C) {
    if (!s->whole) return;
    float *dwindow = state_at(m, b, slot, s->dstate);
    conv_backward_window(dwindow, dout, pre, w, s->doc_start, m->state_size, s->B, s->T, C, m->stream);
    pass_rows(m, s->B, 3 * (size_t)C, dwindow, dwindow, -1, "gradient of the convolution's halo");
    if (comm.sp_rank < comm.sp_size - 1)
        conv_backward_tail(dx, ld_dx, dwindow, s->doc_start, m->state_size, s->B, s->T, C, m->stream);
}

// ----------------------------------------------------------------------------------------------------------------
// Gated FFN with its norm and residual: out = x + down(act(gate(u)) * up(u)), u = norm(x)

template <typename F>
static void ffn_forward(Model<F> *m, F *out, const F *x, const FfnActs<F> *a, NormShape norm, const float *w_norm,
                        const F *w_up, const F *w_down, int rows, int U, int use_gelu) {
    int D = norm.width;
    norm_forward(a->u, a->stats, x, w_norm, norm, rows, m->stream);
    matmul_forward<F, F>(a->gate_up, 2 * (size_t)U, a->u, D, w_up, NULL, rows, 2 * U, D, m->stream);
    gated_forward(a->act, a->gate_up, rows, U, use_gelu, m->stream);
    matmul_forward(out, D, a->act, U, w_down, x, rows, D, U, m->stream);
}

// m->dx: on entry the gradient of out, on return that of x. d_gate_up [rows, 2U]: scratch; where it is not m->d_wide,
// it stays as it is until the scan that follows, and the gradient of w_up is made beside that.
template <typename F>
static void ffn_backward(Model<F> *m, const F *x, const FfnActs<F> *a, NormShape norm, const float *w_norm,
                         float *dw_norm, const F *w_up, float *dw_up, const F *w_down, float *dw_down, int rows, int U,
                         int use_gelu, F *d_gate_up) {
    int D = norm.width;
    matmul_inputs(m->d_mid, U, 0, m->dx, D, w_down, rows, D, U, m->stream);
    weight_product(m, 0, {dw_down, m->dx, a->act, (size_t)D, (size_t)U, rows, D, U});
    gated_backward(d_gate_up, m->d_mid, a->gate_up, rows, U, use_gelu, m->stream);
    matmul_inputs(m->d_mid2, D, 0, d_gate_up, 2 * (size_t)U, w_up, rows, 2 * U, D, m->stream);
    weight_product(m, d_gate_up != m->d_wide, {dw_up, d_gate_up, a->u, 2 * (size_t)U, (size_t)D, rows, 2 * U, D});
    norm_backward(m->dx, 1, dw_norm, m->d_mid2, x, a->stats, w_norm, norm, rows, m->partial, m->stream);
}

// ----------------------------------------------------------------------------------------------------------------
// The mLSTM cell in its block: shapes, states, input

template <typename F>
static MlstmShape mlstm_shape(const Model<F> *m, int B, int T, int v1) {
    int NH = m->config.num_heads, dk = dim(m, v1 ? DIM_I : DIM_DK) / NH, dv = dim(m, v1 ? DIM_I : DIM_DV) / NH;
    MlstmShape s = {B, T, NH, dk, dv, m->config.sigmoid_gate, (float)m->config.eps, mlstm_chunk<F>(dk, dv, NH * dk)};
    return s;
}

template <typename F>
static const MlstmScratch<F> *mlstm_scratch(const Model<F> *m, int b) {
    return &m->mlstm_scratch[m->config.block_types[b] == BLOCK_MLSTM_V1];
}

template <typename F>
static MlstmState mlstm_state(const Model<F> *m, int b, const float *base) {
    MlstmState s = {state_at(m, b, STATE_C, base), state_at(m, b, STATE_N, base), state_at(m, b, STATE_M, base),
                    m->state_size};
    return s;
}

// What enters these tokens: known on the first rank of a sequence, put together by the others (mlstm_enter_ends)
template <typename F>
static MlstmState mlstm_entering(const Model<F> *m, int b, const Sequence *s) {
    return mlstm_state(m, b, s->whole && comm.sp_rank == 0 ? s->state_first : s->state_in);
}

template <typename F>
static MlstmInput<F> mlstm_input(const Model<F> *m, int b, const BlockActs<F> *a, const Sequence *s) {
    int v1 = m->config.block_types[b] == BLOCK_MLSTM_V1, Dk = dim(m, v1 ? DIM_I : DIM_DK), Dv = dim(m, DIM_DV);
    const F *q = v1 ? a->qkv : a->proj;
    MlstmInput<F> in = {q,
                        q + Dk,
                        q + 2 * Dk,
                        (size_t)(v1 ? 3 * Dk : 2 * Dk + 2 * Dv),
                        a->gates,
                        (size_t)gate_rows(m->config.num_heads),
                        param(m, b, v1 ? (int)V1_IGATE_BIAS : (int)M_IGATE_BIAS),
                        v1 ? 0.0f : (float)m->config.gate_soft_cap,
                        s->doc_start};
    return in;
}

// walked: mlstm_pair_forward has been here
template <typename F>
static void mlstm_cell(Model<F> *m, int b, const Sequence *s, bool walked, BlockActs<F> *a) {
    MlstmShape shape = mlstm_shape(m, s->B, s->T, m->config.block_types[b] == BLOCK_MLSTM_V1);
    MlstmInput<F> in = mlstm_input(m, b, a, s);
    MlstmState final = mlstm_state(m, b, s->state_out);
    const MlstmScratch<F> *scratch = mlstm_scratch(m, b);
    if (s->decode) mlstm_step(shape, in, final, a->h, m->stream);
    else if (walked)
        mlstm_segment_forward(shape, in, mlstm_entering(m, b, s), final, a->h, &a->mlstm, scratch, m->stream);
    else mlstm_forward(shape, in, mlstm_entering(m, b, s), final, a->h, &a->mlstm, scratch, m->stream);
}

// dq, dk, dv [rows, ld] and dgates [rows, ld_gates] from dh
template <typename F>
static void mlstm_cell_back(Model<F> *m, int b, const Sequence *s, BlockActs<F> *a, const F *dh, F *dq, F *dk, F *dv,
                            size_t ld, F *dgates, size_t ld_gates, float *dbias) {
    MlstmShape shape = mlstm_shape(m, s->B, s->T, m->config.block_types[b] == BLOCK_MLSTM_V1);
    MlstmInput<F> in = mlstm_input(m, b, a, s);
    MlstmState initial = mlstm_entering(m, b, s);
    const MlstmScratch<F> *scratch = mlstm_scratch(m, b);
    MlstmState dfinal = mlstm_state(m, b, comm.sp_rank + 1 < comm.sp_size ? s->dstate : NULL);
    if (s->whole)
        mlstm_cell_backward(shape, in, initial, mlstm_state(m, b, s->state_out), dfinal, true, dh, dq, dk, dv, ld,
                            dgates, ld_gates, dbias, &a->mlstm, scratch, m->stream);
    else
        mlstm_backward(shape, in, initial, dh, m->dh_dot_h, dq, dk, dv, ld, dgates, ld_gates, dbias, &a->mlstm, scratch,
                       m->stream);
}

// Segments: what a rank's tokens do to the states that enter is a pair (mlstm_pairs.cuh). Forward, pairs go to all
// ranks behind, which fold them to the states that enter theirs; backward, to all before. Between begin and end there
// is time for other work. Nobody waits for ranks it gets nothing from: those in front of a pass run ahead, by a layer
// at most, and the others find what they need when they come to it. What enters the first rank's segment is known, so
// it passes on the states that leave instead of a pair; and forward the last rank, backward the first makes no pair at
// all.

// Up to as many ranks pass their pairs to all others. What travels then grows with their number, so more ranks double
// the distance from step to step instead (Hillis and Steele 1986). XLSTM_FOLD_BY_GATHER sets it, for tests.
static int fold_by_gather = 8;
static bool pairs_are_scanned(void) { return comm.sp_size > fold_by_gather; }
static bool makes_pair(const Sequence *s) {
    bool between = comm.sp_rank > 0 && comm.sp_rank + 1 < comm.sp_size;
    return s->whole && !s->again && (pairs_are_scanned() || between);
}

template <typename F>
static MlstmShape block_mlstm_shape(const Model<F> *m, int b, const Sequence *s) {
    return mlstm_shape(m, s->B, s->T, m->config.block_types[b] == BLOCK_MLSTM_V1);
}
template <typename F>
static void mlstm_pairs(Model<F> *m, const MlstmShape *shape, float **own, float **all, size_t *size) {
    *size = (size_t)shape->B * mlstm_pair_row(shape);
    *all = (float *)m->exchange;
    *own = *all + (pairs_are_scanned() ? 0 : *size * (size_t)comm.sp_rank);
}
// Doubling distances: `own` covers 1, 2, 4, ... segments up to this one (REVERSE: from this one on), `before` the same
// without this one, which is what is to be folded. The four pairs change places.
template <bool REVERSE, typename F>
static void mlstm_scan_pairs(Model<F> *m, const MlstmShape *shape, const char *what) {
    int P = comm.sp_size, me = comm.sp_rank;
    float *own, *got, *before, *spare, *all;
    size_t size;
    mlstm_pairs(m, shape, &own, &all, &size);
    got = own + size, before = got + size, spare = before + size;
    m->num_folded = 0;
    for (int away = 1; away < P; away *= 2) {
        int right = me + away < P ? me + away : -1, left = me - away < 0 ? -1 : me - away;
        int to = REVERSE ? left : right, from = REVERSE ? right : left;
        comm.data->send_recv(COMM_SP, own, to, got, from, size * sizeof(float), what, m->exchange_stream);
        if (from < 0) continue;
        mlstm_join<REVERSE>(shape, spare, got, own, m->exchange_stream);
        float *joined = spare;
        spare = before;
        if (m->num_folded) {
            mlstm_join<REVERSE>(shape, own, got, before, m->exchange_stream);
            before = own;
        } else {
            before = got;
            got = own;
        }
        own = joined;
        m->num_folded = 1;
    }
    m->folded = before;
}

// Early in a block: there is room for what others pass on.
template <typename F>
static void mlstm_expect(Model<F> *m, const Sequence *s, int direction) {
    if (!s->whole || s->again || pairs_are_scanned() || !comm.data->expect) return;
    exchange_begins(m);
    comm.data->expect(COMM_SP, direction, m->exchange_stream);
}

template <typename F>
static void mlstm_enter_begins(Model<F> *m, int b, const Sequence *s, BlockActs<F> *a) {
    MlstmShape shape = block_mlstm_shape(m, b, s);
    float *own, *all;
    size_t size;
    if (!s->whole || s->again) return;
    mlstm_pairs(m, &shape, &own, &all, &size);
    if (makes_pair(s)) {
        exchange_ends(m, "what came before");
        mlstm_pair_forward(shape, mlstm_input(m, b, a, s), mlstm_pair_state(shape, own), &a->mlstm, mlstm_scratch(m, b),
                           m->stream);
    }
    m->folded = all;
    m->num_folded = 0;
    if (pairs_are_scanned()) {
        exchange_begins(m);
        mlstm_scan_pairs<false>(m, &shape, "scan of mLSTM states");
    } else if (comm.sp_rank > 0) {
        exchange_begins(m);
        comm.data->pass_on(COMM_SP, all, size * sizeof(float), 1, "mLSTM states", m->exchange_stream);
        m->num_folded = comm.sp_rank;
    }
}
template <typename F>
static void mlstm_enter_ends(Model<F> *m, int b, const Sequence *s) {
    MlstmShape shape = block_mlstm_shape(m, b, s);
    MlstmState first = mlstm_state(m, b, s->state_first), enters = mlstm_state(m, b, s->state_in);
    if (!s->whole || s->again) return;
    if (m->num_folded || pairs_are_scanned()) exchange_ends(m, "mLSTM states");
    if (!m->num_folded) return;
    if (!pairs_are_scanned()) {  // what has left the first segment, then pairs
        first = mlstm_pair_state(shape, m->folded);
        m->folded += (size_t)s->B * mlstm_pair_row(&shape);
        m->num_folded--;
    }
    mlstm_fold(&shape, enters, first, m->folded, m->num_folded, m->stream);
}
// Behind mlstm_cell: what leaves the first rank's segment
template <typename F>
static void mlstm_left(Model<F> *m, int b, const Sequence *s) {
    MlstmShape shape = block_mlstm_shape(m, b, s);
    float *own, *all;
    size_t size;
    if (!s->whole || s->again || comm.sp_rank > 0 || pairs_are_scanned()) return;
    mlstm_pairs(m, &shape, &own, &all, &size);
    exchange_begins(m);
    mlstm_fold(&shape, mlstm_pair_state(shape, own), mlstm_state(m, b, s->state_out), NULL, 0, m->exchange_stream);
    comm.data->pass_on(COMM_SP, all, size * sizeof(float), 1, "mLSTM states", m->exchange_stream);
}

template <typename F>
static void mlstm_leave_begins(Model<F> *m, int b, const Sequence *s, BlockActs<F> *a, const F *dh) {
    MlstmShape shape = block_mlstm_shape(m, b, s);
    MlstmState pair = {NULL, NULL, NULL, 0};
    float *own, *all;
    size_t size;
    int next = comm.sp_rank + 1;
    if (!s->whole) return;
    mlstm_pairs(m, &shape, &own, &all, &size);
    if (comm.sp_rank > 0 || pairs_are_scanned()) {
        exchange_ends(m, "what came before");
        pair = mlstm_pair_state(shape, own);
    }
    mlstm_pair_backward(shape, mlstm_input(m, b, a, s), dh, m->dh_dot_h, pair, &a->mlstm, mlstm_scratch(m, b),
                        m->stream);
    exchange_begins(m);
    if (pairs_are_scanned()) {
        mlstm_scan_pairs<true>(m, &shape, "scan of mLSTM gradients");
        return;
    }
    comm.data->pass_on(COMM_SP, all, size * sizeof(float), -1, "mLSTM gradients", m->exchange_stream);
    m->folded = all + (size_t)next * size;
    m->num_folded = comm.sp_size - next;
}
template <typename F>
static void mlstm_leave_ends(Model<F> *m, int b, const Sequence *s) {
    MlstmShape shape = block_mlstm_shape(m, b, s);
    if (!s->whole) return;
    if (m->num_folded || pairs_are_scanned()) exchange_ends(m, "mLSTM gradients");
    if (m->num_folded) mlstm_fold_backward(&shape, mlstm_state(m, b, s->dstate), m->folded, m->num_folded, m->stream);
}

// ----------------------------------------------------------------------------------------------------------------
// Block: mlstm (xLSTM 7B)

template <typename F>
static void mlstm_block_forward(Model<F> *m, int b, const Sequence *s, const F *x, F *out, BlockActs<F> *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), Dk = dim(m, DIM_DK), Dv = dim(m, DIM_DV), P = 2 * Dk + 2 * Dv;
    int G = gate_rows(m->config.num_heads);
    NormShape norm = rmsnorm(m);
    mlstm_expect(m, s, 1);
    norm_forward(a->u, a->stats, x, param(m, b, M_NORM), norm, rows, m->stream);
    // Columns of q k v, and of ogate: these come later where other ranks wait for what k and v make.
    const int first = makes_pair(s) ? 2 * Dk + Dv : P;
    const F *w = weight(m, b, M_Q);
    auto project = [&](int from, int to) {
        matmul_forward<F, F>(a->proj + from, P, a->u, D, w + (size_t)from * D, NULL, rows, to - from, D, m->stream);
    };
    project(0, first);
    // Gates leave in float: their rounding would be felt over long sequences.
    matmul_forward<F, float>(a->gates, G, a->u, D, weight(m, b, M_IGATE), NULL, rows, G, D, m->stream);
    mlstm_enter_begins(m, b, s, a);
    if (first < P) project(first, P);
    mlstm_enter_ends(m, b, s);
    mlstm_cell(m, b, s, makes_pair(s), a);
    mlstm_left(m, b, s);
    head_norm_gate_forward(a->y, a->hn_stats, a->h, param(m, b, M_HEAD_NORM), a->proj + 2 * Dk + Dv, (size_t)P,
                           head_norm(m, Dv, 0), rows, m->stream);
    matmul_forward(a->x_mid, D, a->y, Dv, weight(m, b, M_OUT_PROJ), x, rows, D, Dv, m->stream);
    ffn_forward(m, out, a->x_mid, &a->ffn, norm, param(m, b, M_NORM_FFN), weight(m, b, M_FFN_GATE),
                weight(m, b, M_FFN_DOWN), rows, dim(m, DIM_U), 0);
}

// The gradient of w_q .. w_fgate may be made later: beside the scan of an sLSTM below, which leaves d_wide alone, but
// with recomputation not a->u; in the first block beside the exchange of the embedding's gradient.
template <typename F>
static bool keeps_product(const Model<F> *m, int b) {
    if (m->config.block_types[b] != BLOCK_MLSTM) return false;
    return b == 0 || (m->config.block_types[b - 1] == BLOCK_SLSTM && !m->run.recompute);
}

template <typename F>
static void mlstm_block_backward(Model<F> *m, int b, const Sequence *s, const F *x, BlockActs<F> *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), Dk = dim(m, DIM_DK), Dv = dim(m, DIM_DV), NH = m->config.num_heads;
    int P = 2 * Dk + 2 * Dv, G = gate_rows(NH);
    size_t ld = (size_t)(P + G);  // d_wide: gradients of q k v ogate, and of the gates behind them
    NormShape norm = rmsnorm(m);
    F *dproj = m->d_wide, *dh = m->d_mid2;
    mlstm_expect(m, s, -1);
    ffn_backward(m, a->x_mid, &a->ffn, norm, param(m, b, M_NORM_FFN), grad(m, b, M_NORM_FFN), weight(m, b, M_FFN_GATE),
                 grad(m, b, M_FFN_GATE), weight(m, b, M_FFN_DOWN), grad(m, b, M_FFN_DOWN), rows, dim(m, DIM_U), 0,
                 m->d_wide);
    matmul_inputs(m->d_mid, Dv, 0, m->dx, D, weight(m, b, M_OUT_PROJ), rows, D, Dv, m->stream);
    head_norm_gate_backward(dh, dproj + 2 * Dk + Dv, ld, grad(m, b, M_HEAD_NORM), m->dh_dot_h, m->d_mid, a->h,
                            a->hn_stats, param(m, b, M_HEAD_NORM), a->proj + 2 * Dk + Dv, (size_t)P,
                            head_norm(m, Dv, 0), rows, m->partial, m->stream);
    mlstm_leave_begins(m, b, s, a, dh);
    weight_product(m, 0, {grad(m, b, M_OUT_PROJ), m->dx, a->y, (size_t)D, (size_t)Dv, rows, D, Dv});
    if (G > 2 * NH)
        CUDA_CHECK(cudaMemset2DAsync(dproj + P + 2 * NH, ld * sizeof(F), 0, (G - 2 * NH) * sizeof(F), rows, m->stream));
    mlstm_leave_ends(m, b, s);
    mlstm_cell_back(m, b, s, a, dh, dproj, dproj + Dk, dproj + 2 * Dk, ld, dproj + P, ld, grad(m, b, M_IGATE_BIAS));
    matmul_inputs(m->d_mid, D, 0, dproj, ld, weight(m, b, M_Q), rows, (int)ld, D, m->stream);
    weight_product(m, keeps_product(m, b), {grad(m, b, M_Q), dproj, a->u, ld, (size_t)D, rows, (int)ld, D});
    norm_backward(m->dx, 1, grad(m, b, M_NORM), m->d_mid, x, a->stats, param(m, b, M_NORM), norm, rows, m->partial,
                  m->stream);
}

// ----------------------------------------------------------------------------------------------------------------
// Block: mlstm_v1 (first paper)

// The window of inputs before the first token, where there is one; a copy, since its place receives the next one.
template <typename F>
static const float *conv_window(const Model<F> *m, int b, int slot, const Sequence *s) {
    return state_at(m, b, slot, s->state_in);
}

template <typename F>
static void mlstm_v1_block_forward(Model<F> *m, int b, const Sequence *s, const F *x, F *out, BlockActs<F> *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), I = dim(m, DIM_I), G = gate_rows(m->config.num_heads);
    size_t ld_up = 2 * (size_t)I;
    norm_forward(a->u, a->stats, x, param(m, b, V1_NORM), layernorm_v1(m), rows, m->stream);
    matmul_forward<F, F>(a->proj, ld_up, a->u, D, weight(m, b, V1_UP), NULL, rows, 2 * I, D, m->stream);
    conv_enter(m, b, STATE_CONV, s, a->proj, ld_up, I);
    mlstm_expect(m, s, 1);
    conv_forward(a->conv, a->ca, a->proj, ld_up, param(m, b, V1_CONV), param(m, b, V1_CONV_BIAS), s->doc_start,
                 conv_window(m, b, STATE_CONV, s), state_at(m, b, STATE_CONV, s->state_out), m->state_size, s->B, s->T,
                 I, m->stream);
    blocks4_qkv_forward(a->qkv, a->ca, a->proj, ld_up, param(m, b, V1_Q), param(m, b, V1_K), param(m, b, V1_V), rows, I,
                        m->stream);
    matmul_forward<F, float>(a->gates, G, a->qkv, 3 * (size_t)I, weight(m, b, V1_IGATE), NULL, rows, G, 3 * I,
                             m->stream);
    mlstm_enter_begins(m, b, s, a);
    mlstm_enter_ends(m, b, s);
    mlstm_cell(m, b, s, makes_pair(s), a);
    mlstm_left(m, b, s);
    head_norm_skip_forward(a->y, a->hn_stats, a->h, param(m, b, V1_HEAD_NORM), a->ca, param(m, b, V1_SKIP), a->proj + I,
                           ld_up, head_norm(m, I, 1), rows, m->stream);
    matmul_forward(out, D, a->y, I, weight(m, b, V1_DOWN), x, rows, D, I, m->stream);
}

template <typename F>
static void mlstm_v1_block_backward(Model<F> *m, int b, const Sequence *s, const F *x, BlockActs<F> *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), I = dim(m, DIM_I), NH = m->config.num_heads, G = gate_rows(NH);
    size_t ld_up = 2 * (size_t)I, ld_qkv = 3 * (size_t)I;
    // Scratch: d_wide holds dup [rows, 2I], dqkv [rows, 3I] and dgates [rows, G]; d_mid, d_mid2, d_mid3 are [rows, I].
    F *dup = m->d_wide, *dqkv = dup + (size_t)rows * ld_up, *dgates = dqkv + (size_t)rows * ld_qkv;
    F *dh = m->d_mid2, *dca = m->d_mid3;
    mlstm_expect(m, s, -1);
    matmul_inputs(m->d_mid, I, 0, m->dx, D, weight(m, b, V1_DOWN), rows, D, I, m->stream);
    head_norm_skip_backward(dh, dup + I, ld_up, dca, grad(m, b, V1_HEAD_NORM), grad(m, b, V1_SKIP), m->dh_dot_h,
                            m->d_mid, a->h, a->hn_stats, param(m, b, V1_HEAD_NORM), a->ca, param(m, b, V1_SKIP),
                            a->proj + I, ld_up, head_norm(m, I, 1), rows, m->partial, m->stream);
    if (G > 2 * NH)
        CUDA_CHECK(cudaMemset2DAsync(dgates + 2 * NH, G * sizeof(F), 0, (G - 2 * NH) * sizeof(F), rows, m->stream));
    mlstm_leave_begins(m, b, s, a, dh);
    weight_product(m, 0, {grad(m, b, V1_DOWN), m->dx, a->y, (size_t)D, (size_t)I, rows, D, I});
    mlstm_leave_ends(m, b, s);
    mlstm_cell_back(m, b, s, a, dh, dqkv, dqkv + I, dqkv + 2 * I, ld_qkv, dgates, (size_t)G, grad(m, b, V1_IGATE_BIAS));
    matmul_inputs(dqkv, ld_qkv, 1, dgates, G, weight(m, b, V1_IGATE), rows, G, 3 * I, m->stream);
    weight_product(m, 0, {grad(m, b, V1_IGATE), dgates, a->qkv, (size_t)G, ld_qkv, rows, G, 3 * I});
    blocks4_qkv_backward(dca, dup, ld_up, grad(m, b, V1_Q), grad(m, b, V1_K), grad(m, b, V1_V), dqkv, a->ca, a->proj,
                         ld_up, param(m, b, V1_Q), param(m, b, V1_K), param(m, b, V1_V), rows, I, m->partial,
                         m->stream);
    conv_backward(dup, ld_up, grad(m, b, V1_CONV), grad(m, b, V1_CONV_BIAS), dca, a->conv, a->proj, ld_up,
                  param(m, b, V1_CONV), s->doc_start, conv_window(m, b, STATE_CONV, s), m->state_size, s->B, s->T, I,
                  m->partial, m->stream);
    conv_leave(m, b, STATE_CONV, s, dup, ld_up, dca, a->conv, param(m, b, V1_CONV), I);
    matmul_inputs(m->d_mid, D, 0, dup, ld_up, weight(m, b, V1_UP), rows, 2 * I, D, m->stream);
    weight_product(m, 0, {grad(m, b, V1_UP), dup, a->u, ld_up, (size_t)D, rows, 2 * I, D});
    norm_backward(m->dx, 1, grad(m, b, V1_NORM), m->d_mid, x, a->stats, param(m, b, V1_NORM), layernorm_v1(m), rows,
                  m->partial, m->stream);
}

// ----------------------------------------------------------------------------------------------------------------
// Block: slstm (first paper)

template <typename F>
static SlstmState slstm_state(const Model<F> *m, int b, const float *base) {
    SlstmState s = {state_at(m, b, STATE_SY, base), state_at(m, b, STATE_SC, base), state_at(m, b, STATE_SN, base),
                    state_at(m, b, STATE_SM, base), m->state_size};
    return s;
}

// Over segments the cell must go token by token anyway, so ranks share out rows and heads instead (reshard.cuh): each
// takes all tokens of some. With more ranks than rows x heads, some take none.
template <typename F>
static Reshard slstm_share(const Model<F> *m, const Sequence *s) {
    return reshard_of(s->B, m->config.num_heads, s->whole, comm.sp_size, comm.sp_rank);
}

// In place, [B, T, NH, width] of this rank's tokens <-> [rows, whole, heads, width] of its rows and heads
template <typename F>
static void slstm_exchange(Model<F> *m, const Reshard *share, F *x, int width, bool to_heads) {
    size_t *send = (size_t *)xcalloc(2 * (size_t)share->ranks, sizeof(size_t)), *recv = send + share->ranks, sent = 0;
    for (int r = 0; r < share->ranks; r++) {
        size_t by_heads = reshard_piece(share, share->rank, r) * width * sizeof(F),
               by_tokens = reshard_piece(share, r, share->rank) * width * sizeof(F);
        send[r] = to_heads ? by_heads : by_tokens;
        recv[r] = to_heads ? by_tokens : by_heads;
        sent += send[r];
    }
    char *ours = m->exchange, *theirs = ours + (sent + 255) / 256 * 256;
    exchange_ends(m, "what came before");
    if (to_heads) reshard<F, true, true>(share, x, ours, width, m->stream);
    else reshard<F, false, true>(share, x, ours, width, m->stream);
    exchange_begins(m);
    comm.data->all_to_all(COMM_SP, ours, send, theirs, recv, "all-to-all of sLSTM heads", m->exchange_stream);
    exchange_ends(m, "all-to-all of sLSTM heads");
    if (to_heads) reshard<F, false, false>(share, x, theirs, width, m->stream);
    else reshard<F, true, false>(share, x, theirs, width, m->stream);
    free(send);
}

static SlstmState slstm_state_from(SlstmState s, const Reshard *share, int d) {  // of a rank's rows and heads
    size_t skip = share->row * s.row + (size_t)share->head * d;
    SlstmState part = {s.y + skip, s.c + skip, s.n + skip, s.m + skip, s.row};
    return s.y ? part : s;
}

// All ranks of a sequence get the final states of all rows and heads.
template <typename F>
static void slstm_gather_final(Model<F> *m, const Reshard *share, SlstmState final, int d) {
    size_t run = (size_t)share->heads * d * sizeof(float), most = ceil_div(share->B, share->groups),
           bytes = 4 * most * run, pitch = final.row * sizeof(float);
    char *ours = m->exchange, *all = ours + bytes;
    exchange_ends(m, "what came before");
    for (int r = -1; r < share->ranks; r++) {  // -1: packs
        Reshard part = reshard_of(share->B, share->NH, share->whole, share->ranks, r < 0 ? share->rank : r);
        SlstmState state = slstm_state_from(final, &part, d);
        float *const values[4] = {state.y, state.c, state.n, state.m};
        for (int k = 0; k < 4 && part.rows > 0; k++) {
            char *packed = (r < 0 ? ours : all + r * bytes) + k * most * run;
            CUDA_CHECK(cudaMemcpy2DAsync(r < 0 ? (void *)packed : values[k], r < 0 ? run : pitch,
                                         r < 0 ? (void *)values[k] : packed, r < 0 ? pitch : run, run, part.rows,
                                         cudaMemcpyDeviceToDevice, m->stream));
        }
        if (r >= 0) continue;
        exchange_begins(m);
        comm.data->all_gather(COMM_SP, ours, all, bytes, "final sLSTM states", m->exchange_stream);
        exchange_ends(m, "final sLSTM states");
    }
}

// a->h from m->slstm_x. In a segment the cell's own buffers hold this rank's rows and heads.
template <typename F>
static void slstm_cell(Model<F> *m, int b, const Sequence *s, BlockActs<F> *a) {
    int NH = m->config.num_heads, d = dim(m, DIM_D) / NH;
    SlstmState initial = slstm_state(m, b, s->whole ? s->state_first : s->state_in),
               final = slstm_state(m, b, s->state_out);
    const F *R = weight(m, b, S_RECURRENT);
    const float *bias = param(m, b, S_BIAS);
    if (!s->whole) {
        SlstmShape shape = {s->B, s->T, NH, d};
        slstm_forward(&shape, m->slstm_x, R, bias, s->doc_start, initial, final, a->h, &a->slstm, &m->slstm_scratch,
                      m->stream);
        return;
    }
    Reshard share = slstm_share(m, s);
    SlstmShape mine = {share.rows, s->whole, share.heads, d};
    slstm_exchange(m, &share, m->slstm_x, 4 * d, true);
    if (share.rows > 0)
        slstm_forward(&mine, m->slstm_x, R + (size_t)share.head * d * 4 * d, bias + (size_t)share.head * 4 * d,
                      m->whole_start, slstm_state_from(initial, &share, d), slstm_state_from(final, &share, d), a->h,
                      &a->slstm, &m->slstm_scratch, m->stream);
    slstm_exchange(m, &share, a->h, d, false);
    if (s->state_out != m->leaving) slstm_gather_final(m, &share, final, d);
}

// dgates [rows, 4D] from dh, which is lost, and the gradients of R and the bias
template <typename F>
static void slstm_cell_back(Model<F> *m, int b, const Sequence *s, BlockActs<F> *a, F *dgates, F *dh) {
    int NH = m->config.num_heads, d = dim(m, DIM_D) / NH;
    SlstmShape shape = {s->B, s->T, NH, d};
    SlstmState initial = slstm_state(m, b, s->whole ? s->state_first : s->state_in);
    const F *R = weight(m, b, S_RECURRENT);
    float *dR = grad(m, b, S_RECURRENT), *dbias = grad(m, b, S_BIAS);
    const int *doc_start = s->whole ? m->whole_start : s->doc_start;
    Reshard share;
    if (s->whole) {
        share = slstm_share(m, s);
        shape = SlstmShape{share.rows, s->whole, share.heads, d};
        initial = slstm_state_from(initial, &share, d);
        R += (size_t)share.head * d * 4 * d, dR += (size_t)share.head * d * 4 * d;
        dbias += (size_t)share.head * 4 * d;
        slstm_exchange(m, &share, dh, d, true);
    }
    begin_later(m);
    if (shape.B > 0)
        slstm_backward(&shape, R, &a->slstm, dh, doc_start, initial, {}, {}, {}, dgates, dbias, m->partial,
                       &m->slstm_scratch, m->stream);
    end_later(m);
    if (shape.B > 0) {
        size_t width = (size_t)shape.NH * d;
        Matrix y_prev = {a->slstm.y_prev, width, 1, d}, dr = {dgates, 4 * width, 0, 4LL * d};
        // dR [NH, d, 4d] += sum over tokens of y_prev^T dr
        matmul_general<F, float>(dR, 4 * (size_t)d, 4LL * d * d, y_prev, dr, dR, 4 * (size_t)d, d, 4 * d,
                                 shape.B * shape.T, shape.NH, m->stream);
    }
    if (s->whole) slstm_exchange(m, &share, dgates, 4 * d, false);
}

template <typename F>
static void slstm_block_forward(Model<F> *m, int b, const Sequence *s, const F *x, F *out, BlockActs<F> *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), NH = m->config.num_heads, d = D / NH;
    norm_forward(a->u, a->stats, x, param(m, b, S_NORM), layernorm_v1(m), rows, m->stream);
    conv_enter(m, b, STATE_SCONV, s, a->u, (size_t)D, D);
    conv_forward(a->conv, a->ca, a->u, (size_t)D, param(m, b, S_CONV), param(m, b, S_CONV_BIAS), s->doc_start,
                 conv_window(m, b, STATE_SCONV, s), state_at(m, b, STATE_SCONV, s->state_out), m->state_size, s->B,
                 s->T, D, m->stream);
    for (int gate = 0; gate < 4; gate++) {  // a d x d matrix a head: one batch of products
        Matrix in = {gate < 2 ? a->ca : a->u, (size_t)D, 0, d};
        Matrix w = {weight(m, b, S_IGATE + gate), (size_t)d, 1, (long long)d * d};
        matmul_general<F, F>(m->slstm_x + (size_t)gate * d, 4 * (size_t)D, 4LL * d, in, w, (F *)NULL, 0, rows, d, d, NH,
                             m->stream);
    }
    slstm_cell(m, b, s, a);
    head_norm_add_forward(a->x_mid, a->hn_stats, a->h, param(m, b, S_GROUP_NORM), x, head_norm(m, D, 1), rows,
                          m->stream);
    ffn_forward(m, out, a->x_mid, &a->ffn, layernorm_v1(m), param(m, b, S_NORM_FFN), weight(m, b, S_FFN_UP),
                weight(m, b, S_FFN_DOWN), rows, dim(m, DIM_US), 1);
}

template <typename F>
static void slstm_block_backward(Model<F> *m, int b, const Sequence *s, const F *x, BlockActs<F> *a) {
    int rows = s->B * s->T, D = dim(m, DIM_D), NH = m->config.num_heads, d = D / NH;
    F *dgates = m->slstm_dx, *dh = m->d_mid, *dca = m->d_mid2, *du = m->d_mid3;
    ffn_backward(m, a->x_mid, &a->ffn, layernorm_v1(m), param(m, b, S_NORM_FFN), grad(m, b, S_NORM_FFN),
                 weight(m, b, S_FFN_UP), grad(m, b, S_FFN_UP), weight(m, b, S_FFN_DOWN), grad(m, b, S_FFN_DOWN), rows,
                 dim(m, DIM_US), 1, m->slstm_x);
    head_norm_backward(dh, grad(m, b, S_GROUP_NORM), m->dx, a->h, a->hn_stats, param(m, b, S_GROUP_NORM),
                       head_norm(m, D, 1), rows, m->partial, m->stream);
    slstm_cell_back(m, b, s, a, dgates, dh);
    for (int gate = 0; gate < 4; gate++) {
        F *dinput = gate < 2 ? dca : du;
        float *dw = grad(m, b, S_IGATE + gate);
        Matrix in = {gate < 2 ? a->ca : a->u, (size_t)D, 0, d},
               w = {weight(m, b, S_IGATE + gate), (size_t)d, 0, (long long)d * d};
        Matrix dg = {dgates + (size_t)gate * d, 4 * (size_t)D, 0, 4LL * d}, dg_t = dg;
        dg_t.trans = 1;
        matmul_general<F, F>(dinput, (size_t)D, d, dg, w, gate % 2 ? dinput : NULL, (size_t)D, rows, d, d, NH,
                             m->stream);
        matmul_general<F, float>(dw, (size_t)d, (long long)d * d, dg_t, in, dw, (size_t)d, d, d, rows, NH, m->stream);
    }
    conv_backward(du, (size_t)D, grad(m, b, S_CONV), grad(m, b, S_CONV_BIAS), dca, a->conv, a->u, (size_t)D,
                  param(m, b, S_CONV), s->doc_start, conv_window(m, b, STATE_SCONV, s), m->state_size, s->B, s->T, D,
                  m->partial, m->stream);
    conv_leave(m, b, STATE_SCONV, s, du, (size_t)D, dca, a->conv, param(m, b, S_CONV), D);
    norm_backward(m->dx, 1, grad(m, b, S_NORM), du, x, a->stats, param(m, b, S_NORM), layernorm_v1(m), rows, m->partial,
                  m->stream);
}

template <typename F>
static void block_forward(Model<F> *m, int b, const Sequence *s) {
    void (*forward[])(Model<F> *, int, const Sequence *, const F *, F *, BlockActs<F> *) = {
        mlstm_block_forward<F>, mlstm_v1_block_forward<F>, slstm_block_forward<F>};
    forward[m->config.block_types[b]](m, b, s, m->x[b], m->x[b + 1], &m->acts[b]);
}

template <typename F>
static void block_backward(Model<F> *m, int b, const Sequence *s) {
    void (*backward[])(Model<F> *, int, const Sequence *, const F *, BlockActs<F> *) = {
        mlstm_block_backward<F>, mlstm_v1_block_backward<F>, slstm_block_backward<F>};
    if (m->run.recompute && b + 1 < m->config.num_blocks) {  // the last one's are still there
        Sequence again = *s;
        again.again = 1;
        block_forward(m, b, &again);
    }
    backward[m->config.block_types[b]](m, b, s, m->x[b], &m->acts[b]);
}

// ----------------------------------------------------------------------------------------------------------------
// Classifier, forward, backward. Everything below model_forward is enqueued without waiting.

// Losses of all rows; with gradients m->d_mid becomes the gradient of the final norm's output. The logits exist only a
// tile of rows at a time and in format F. logits_out [rows, V]: in float, or NULL.
template <typename F>
static void classifier(Model<F> *m, int rows, int training, const int *targets, float *logits_out) {
    int D = dim(m, DIM_D), V = dim(m, DIM_V), Vp = align_up(V, 8);
    size_t head = m->offsets[m->table.shell[SHELL_HEAD]];
    for (int r0 = 0; r0 < rows; r0 += m->logit_rows) {
        int n = imin(m->logit_rows, rows - r0);
        const F *out = m->out + (size_t)r0 * D;
        matmul_forward<F, F>(m->logits, Vp, out, D, m->weights + head, NULL, n, V, D, m->stream);
        classifier_loss(m->logits, (size_t)Vp, m->losses + r0, targets ? targets + r0 : NULL,
                        logits_out ? logits_out + (size_t)r0 * V : NULL, n, V, (float)m->config.logit_soft_cap,
                        m->scale, training, m->stream);
        if (!training) continue;
        matmul_inputs(m->d_mid + (size_t)r0 * D, D, 0, m->logits, Vp, m->weights + head, n, V, D, m->stream);
        matmul_weights(m->grads + head, !m->first || r0 > 0, m->logits, Vp, out, D, n, V, D, m->stream);
    }
}

template <typename F>
static NormShape out_norm(const Model<F> *m) {
    return m->config.layernorm_out ? layernorm_v1(m) : rmsnorm(m);
}

// Where a block's weights for matmuls begin; behind the last block, the classifier's.
template <typename F>
static size_t block_matmul_begin(const Model<F> *m, int b) {
    if (b == m->config.num_blocks) return m->offsets[m->table.shell[SHELL_HEAD]];
    int k = m->table.block_first[b];
    while (part_of(&m->config, &m->table, k) != PART_MATMUL) k++;
    return m->offsets[k];
}

// With --zero 1 weights arrive while the forward pass is at work: m->stream waits for those before element `end`.
template <typename F>
static void await_weights(const Model<F> *m, size_t end) {
    if (!m->own_moments) return;
    unsigned flags = device_captures(m->stream) ? cudaEventWaitExternal : cudaEventWaitDefault;
    CUDA_CHECK(cudaStreamWaitEvent(m->stream, m->gathered[(end - 1) / shards_bucket(&m->shards)], flags));
}

template <typename F>
static void model_forward(Model<F> *m, const Sequence *s, const int *tokens) {
    int rows = s->B * s->T, last = m->config.num_blocks;
    await_weights(m, m->begins[PART_MATMUL]);
    embedding_forward(m->x[0], tokens, m->params + m->offsets[m->table.shell[SHELL_EMBEDDING]], rows, dim(m, DIM_D),
                      m->stream);
    for (int b = 0; b < last; b++) {
        await_weights(m, block_matmul_begin(m, b + 1));
        block_forward(m, b, s);
    }
    norm_forward(m->out, m->out_stats, m->x[last], m->params + m->offsets[m->table.shell[SHELL_OUT_NORM]], out_norm(m),
                 rows, m->stream);
}

// Sums of squares that make the norm: of several ranks, of each bucket's piece
template <typename F>
static int norm_partials(const Model<F> *m) {
    return comm.size == 1 ? (int)GRAD_NORM_BLOCKS : (int)m->shards.num_buckets * GRAD_NORM_PIECE_BLOCKS;
}

template <typename F>
static Gradients gradients(const Model<F> *m) {
    Gradients g = {m->grads, m->rounded, m->begins[PART_EMBEDDING]};
    return g;
}

// The gradient stream goes on from where m->stream is, and the other way round.
template <typename F>
static void send_begins(Model<F> *m) {
    CUDA_CHECK(cudaEventRecord(m->worked, m->stream));
    CUDA_CHECK(cudaStreamWaitEvent(m->gradient_stream, m->worked, 0));
}
template <typename F>
static void send_ends(Model<F> *m) {
    CUDA_CHECK(cudaEventRecord(m->reduced, m->gradient_stream));
    CUDA_CHECK(cudaStreamWaitEvent(m->stream, m->reduced, 0));
}

// What the end of the backward pass completes is before this element: the embedding, and what the first block has kept
// to make it while the embedding travels.
template <typename F>
static size_t last_gradients(const Model<F> *m) {
    return keeps_product(m, 0) ? offset_of(m, 0, M_OUT_PROJ) : m->begins[PART_MATMUL];
}
template <typename F>
static size_t last_buckets(const Model<F> *m) {
    return (last_gradients(m) + shards_bucket(&m->shards) - 1) / shards_bucket(&m->shards);
}

// The sums of a bucket's gradients over the world, to the owners of its pieces, and of this rank's piece the norm
template <typename F>
static void reduce_bucket(Model<F> *m, size_t k) {
    const Shards *s = &m->shards;
    size_t bytes = m->rounded ? sizeof(bf16) : sizeof(float);
    char *bucket = (m->rounded ? (char *)m->rounded : (char *)m->grads) + k * shards_bucket(s) * bytes;
    comm.data->reduce_scatter(COMM_WORLD, bucket, bucket + s->piece * (size_t)s->rank * bytes, s->piece,
                              m->rounded ? COMM_BF16 : COMM_F32, "reduce-scatter of gradients", m->gradient_stream);
    grad_norm_part(m->norm_partial + k * GRAD_NORM_PIECE_BLOCKS, gradients(m),
                   k * shards_bucket(s) + s->piece * (size_t)s->rank, s->piece, GRAD_NORM_PIECE_BLOCKS,
                   m->gradient_stream);
}
// From the owners to all: buckets first .. end-1, the last one first
template <typename F>
static void gather_buckets(Model<F> *m, size_t first, size_t end) {
    const Shards *s = &m->shards;
    size_t bytes = m->rounded ? sizeof(bf16) : sizeof(float);
    for (size_t k = end; k-- > first;) {
        char *bucket = (m->rounded ? (char *)m->rounded : (char *)m->grads) + k * shards_bucket(s) * bytes;
        comm.data->all_gather(COMM_WORLD, bucket + s->piece * (size_t)s->rank * bytes, bucket, s->piece * bytes,
                              "all-gather of gradients", m->gradient_stream);
    }
}

template <typename F>
static void round_gradients(Model<F> *m, size_t begin, size_t end, cudaStream_t stream) {
    if (m->rounded && begin < end) to_bf16(m->rounded + begin, m->grads + begin, end - begin, stream);
}

// Gradients of matmuls from element `complete` on are what they will be: those that travel in bf16 are rounded, unless
// that is how they were made, and their buckets leave to be summed over the world, while the backward pass goes on.
template <typename F>
static void send_gradients(Model<F> *m, size_t complete, int made_rounded) {
    size_t size = shards_bucket(&m->shards), before = m->unsent;
    if (!m->unsent) return;
    send_begins(m);
    if (!made_rounded) round_gradients(m, complete, m->unrounded, m->gradient_stream);
    m->unrounded = complete;
    if (m->quiet && complete > block_matmul_begin(m, 1)) return;
    while (m->unsent > 0 && (m->unsent - 1) * size >= complete) m->unsent--;
    for (size_t k = before; k-- > m->unsent;) reduce_bucket(m, k);
    if (!m->run.zero) gather_buckets(m, m->unsent, before);
}

// Small tensors travel in float where the others do in bf16, and every rank gets their sums. They are complete before
// the embedding is.
template <typename F>
static void send_small_gradients(Model<F> *m) {
    size_t part = m->begins[PART_EMBEDDING] / (size_t)comm.size, mine = part * (size_t)comm.rank;
    if (!m->unsent || !m->rounded) return;
    send_begins(m);
    comm.data->reduce_scatter(COMM_WORLD, m->grads, m->grads + mine, part, COMM_F32, "reduce-scatter of gradients",
                              m->gradient_stream);
    comm.data->all_gather(COMM_WORLD, m->grads + mine, m->grads, part * sizeof(float), "all-gather of gradients",
                          m->gradient_stream);
}

// The rest has little left to hide behind: one bucket is rounded while another one travels. Without --zero model_update
// gathers them.
template <typename F>
static void send_last_buckets(Model<F> *m, size_t first, size_t end) {
    size_t size = shards_bucket(&m->shards), begin = m->begins[PART_EMBEDDING],
           unrounded = m->direct ? m->begins[PART_MATMUL] : m->unrounded;
    for (size_t k = end; k-- > first;) {
        size_t next = (k + 1) * size;
        round_gradients(m, k * size > begin ? k * size : begin, next < unrounded ? next : unrounded, m->stream);
        send_begins(m);
        reduce_bucket(m, k);
    }
}
// Once the embedding's gradient is complete. The norm of all is there when this is done.
template <typename F>
static void send_last_gradients(Model<F> *m) {
    size_t complete = m->unsent ? m->begins[PART_MATMUL] / shards_bucket(&m->shards) : 0;
    send_last_buckets(m, 0, complete);
    for (int k = 0; k < m->num_later; k++) run_product(m, &m->later[k], m->stream);
    m->num_later = 0;
    send_last_buckets(m, complete, m->unsent);
    if (m->unsent) send_ends(m);
    else if (m->last_of_step) grad_norm_part(m->norm_partial, gradients(m), 0, m->total, GRAD_NORM_BLOCKS, m->stream);
    if (m->last_of_step) grad_norm_squared(m->sums + 1, m->norm_partial, norm_partials(m), m->stream);
}

template <typename F>
static void model_backward(Model<F> *m, const Sequence *s, const int *tokens) {
    int rows = s->B * s->T, last = m->config.num_blocks;
    size_t norm = m->offsets[m->table.shell[SHELL_OUT_NORM]];
    send_gradients(m, m->offsets[m->table.shell[SHELL_HEAD]], 0);  // of the classifier
    norm_backward(m->dx, 0, m->grads + norm, m->d_mid, m->x[last], m->out_stats, m->params + norm, out_norm(m), rows,
                  m->partial, m->stream);
    for (int b = last - 1; b >= 0; b--) {
        block_backward(m, b, s);
        if (b == 0) send_gradients(m, last_gradients(m), m->direct);
        else if (!m->num_later) send_gradients(m, block_matmul_begin(m, b), m->direct);
    }
    send_small_gradients(m);
    embedding_backward(m->grads + m->offsets[m->table.shell[SHELL_EMBEDDING]], m->dx, tokens, rows, dim(m, DIM_D),
                       dim(m, DIM_V), m->embedding_scratch, m->stream);
    send_last_gradients(m);
}

// ----------------------------------------------------------------------------------------------------------------
// A micro-step: its arrays go to the device through pinned memory, then one graph runs all its kernels.

typedef struct {  // pinned host memory
    int *inputs, *targets, *doc_start, *whole_start;
    float *scale, *logits;
    double *sums;
} Staging;

// What an sLSTM's buffers hold at most: in segments, all tokens of a rank's rows and heads
template <typename F>
static SlstmShape slstm_shape_max(const Model<F> *m) {
    int B = m->run.max_batch, T = m->run.max_len, NH = m->config.num_heads;
    SlstmShape s = {B, T, NH, dim(m, DIM_D) / NH};
    if (comm.sp_size == 1) return s;
    Reshard share = reshard_of(B, NH, T * comm.sp_size, comm.sp_size, 0);
    s.B = ceil_div(B, share.groups), s.T = T * comm.sp_size, s.NH = share.heads;
    return s;
}
template <typename F>
static size_t whole_start_size(const Model<F> *m) {
    SlstmShape s = slstm_shape_max(m);
    return comm.sp_size > 1 && model_has(&m->config, BLOCK_SLSTM) ? (size_t)s.B * s.T : 0;
}

template <typename F>
static Staging staging(const Model<F> *m, size_t *bytes) {
    Arena arena = {(char *)m->staging, 0};
    size_t rows = (size_t)m->run.max_batch * m->run.max_len;
    Staging s;
    s.inputs = take<int>(&arena, rows);
    s.targets = take<int>(&arena, rows);
    s.doc_start = take<int>(&arena, rows);
    s.whole_start = take<int>(&arena, whole_start_size(m));
    s.scale = take<float>(&arena, 1);
    s.logits = take<float>(&arena, dim(m, DIM_V));
    s.sums = take<double>(&arena, 2);
    if (bytes) *bytes = arena.used;
    return s;
}

// This rank's segment of the batch's sequences. On the first rank the windows before the sequence enter; all else each
// block puts in its place.
template <typename F>
static void share_sequence(Model<F> *m, Sequence *s, int whole) {
    size_t pitch = m->state_size * sizeof(float), width = m->state_small * sizeof(float);
    s->whole = whole;
    s->state_first = s->state_in;
    if (s->state_first)
        CUDA_CHECK(cudaMemcpy2DAsync(m->entering, pitch, s->state_first, pitch, width, s->B, cudaMemcpyDeviceToDevice,
                                     m->stream));
    else CUDA_CHECK(cudaMemset2DAsync(m->entering, pitch, 0, width, s->B, m->stream));
    s->state_in = m->entering;
    s->dstate = m->dstate;
    if (!s->state_out) s->state_out = m->leaving;
}

// Stored states: every rank of a sequence gets those that the last one's segment has left.
template <typename F>
static void share_final_states(Model<F> *m, const Sequence *s) {
    int last = comm.sp_size - 1;
    exchange_begins(m);
    for (int r = 0; r < last; r++)
        comm.data->send_recv(COMM_SP, s->state_out, comm.sp_rank == last ? r : -1, s->state_out,
                             comm.sp_rank == r ? last : -1, s->B * m->state_size * sizeof(float), "stored states",
                             m->exchange_stream);
    exchange_ends(m, "stored states");
}

template <typename F>
static void enqueue_step(Model<F> *m, const GraphKey *k, float *logits_out) {
    Sequence s = {k->B, k->T, m->doc_start, k->stateful ? m->state_in : NULL, k->stateful ? m->state_out : NULL, 0};
    if (k->whole) share_sequence(m, &s, k->whole);
    m->unsent = k->reduce && comm.size > 1 ? m->shards.num_buckets : 0;
    m->unrounded = m->total;
    m->first = k->first;
    m->direct = k->first && k->reduce && m->rounded;
    model_forward(m, &s, m->inputs);
    await_weights(m, m->total);
    classifier(m, k->B * k->T, k->training, m->targets, logits_out);
    loss_sum(m->sums, m->losses, k->B * k->T, m->stream);
    if (k->training) model_backward(m, &s, m->inputs);
    if (k->whole && k->stateful) share_final_states(m, &s);
    exchange_ends(m, "what is exchanged last");
}

// Runs `enqueue` eagerly the first time, as a captured graph from the second on.
template <typename F, typename Enqueue>
static void run_as_graph(Model<F> *m, cudaGraphExec_t *exec, int *runs, Enqueue enqueue) {
    if ((*runs)++ == 0 || !device_comm.graphs) {
        enqueue();
        return;
    }
    if (!*exec) {
        cudaGraph_t graph;
        CUDA_CHECK(cudaStreamBeginCapture(m->stream, cudaStreamCaptureModeThreadLocal));
        matmul_graph_begins(m->stream);
        enqueue();
        CUDA_CHECK(cudaStreamEndCapture(m->stream, &graph));
        matmul_graph_ends(graph);
        CUDA_CHECK(cudaGraphInstantiateWithFlags(exec, graph, cudaGraphInstantiateFlagUseNodePriority));
        CUDA_CHECK(cudaGraphDestroy(graph));
    }
    CUDA_CHECK(cudaGraphLaunch(*exec, m->stream));
}

template <typename F>
static Graph *find_graph(Model<F> *m, const GraphKey *key) {
    for (int k = 0; k < imin(m->num_graphs, MAX_GRAPHS); k++)
        if (memcmp(&m->graphs[k].key, key, sizeof *key) == 0) return &m->graphs[k];
    Graph *graph = &m->graphs[m->num_graphs++ % MAX_GRAPHS];  // the oldest gives way
    if (graph->exec) CUDA_CHECK(cudaGraphExecDestroy(graph->exec));
    memset(graph, 0, sizeof *graph);
    graph->key = *key;
    return graph;
}

// doc_start [B, T] from resets [B, T] or NULL
static void find_documents(int *doc_start, const unsigned char *resets, int B, int T) {
    for (int b = 0; b < B; b++)
        for (int t = 0, start = NO_RESET; t < T; t++) {
            if (resets && resets[(size_t)b * T + t]) start = t;
            doc_start[(size_t)b * T + t] = start;
        }
}

// doc_start of whole sequences, for the sLSTMs, which take all tokens of some rows: [rows, whole], whose size it
// returns; 0: not needed.
template <typename F>
static size_t find_whole_documents(const Model<F> *m, const Batch *batch, int *whole_start) {
    if (!batch->whole || !model_has(&m->config, BLOCK_SLSTM)) return 0;
    Reshard share = reshard_of(batch->B, m->config.num_heads, batch->whole, comm.sp_size, comm.sp_rank);
    size_t whole = (size_t)batch->whole, count = (size_t)batch->B * m->run.max_len, P = (size_t)comm.sp_size;
    if (!batch->resets) {
        find_documents(whole_start, NULL, share.rows, batch->whole);
        return (size_t)share.rows * whole;
    }
    unsigned char *resets = (unsigned char *)xcalloc((P + 1) * count + whole, 1), *all = resets + count,
                  *row = all + P * count;
    memcpy(resets, batch->resets, (size_t)batch->B * batch->T);
    comm.host->all_gather(COMM_SP, resets, all, count, "all-gather of document resets", NULL);
    for (int b = 0; b < share.rows; b++) {
        for (int r = 0; r < comm.sp_size; r++) {
            int begin = segment_begin(batch->whole, comm.sp_size, r),
                len = segment_begin(batch->whole, comm.sp_size, r + 1) - begin;
            memcpy(row + begin, all + (size_t)r * count + (size_t)(share.row + b) * len, (size_t)len);
        }
        find_documents(whole_start + (size_t)b * whole, row, 1, batch->whole);
    }
    free(resets);
    return (size_t)share.rows * whole;
}

// Before an update's first micro-step. written: those of weight matrices need not be 0.
template <typename F>
static void clear_gradients(Model<F> *m, int written) {
    size_t count = written ? m->begins[PART_MATMUL] : m->total;
    CUDA_CHECK(cudaMemsetAsync(m->grads, 0, count * sizeof(float), m->stream));
    m->fresh = 0;
}

// The sum of the token losses.
template <typename F>
static double run_batch(Model<F> *m, const Batch *batch, int training, double scale) {
    int B = batch->B, T = batch->T;
    size_t rows = (size_t)B * T, row_bytes = m->state_size * sizeof(float);
    Staging host = staging(m, NULL);
    int stateful = batch->state_row >= 0 && m->run.num_state_rows > 0;
    int reduce = training && batch->last_of_step, first = training && m->fresh && !model_has(&m->config, BLOCK_SLSTM);
    m->last_of_step = reduce;
    GraphKey key = {B, T, training, stateful, batch->whole, reduce, first};
    if (training && m->fresh) clear_gradients(m, first);
    memcpy(host.inputs, batch->inputs, rows * sizeof(int));
    memcpy(host.targets, batch->targets, rows * sizeof(int));
    find_documents(host.doc_start, batch->resets, B, T);
    size_t whole_rows = find_whole_documents(m, batch, host.whole_start);
    *host.scale = (float)scale;
    const struct {
        void *device;
        const void *host;
        size_t bytes;
    } copies[] = {{m->inputs, host.inputs, rows * sizeof(int)},
                  {m->targets, host.targets, rows * sizeof(int)},
                  {m->doc_start, host.doc_start, rows * sizeof(int)},
                  {m->whole_start, host.whole_start, whole_rows * sizeof(int)},
                  {m->scale, host.scale, sizeof(float)}};
    for (size_t k = 0; k < sizeof copies / sizeof copies[0]; k++)
        if (copies[k].bytes)
            CUDA_CHECK(
                cudaMemcpyAsync(copies[k].device, copies[k].host, copies[k].bytes, cudaMemcpyHostToDevice, m->stream));
    float *stored = stateful ? m->stored + (size_t)batch->state_row * m->state_size : NULL;
    if (stateful) CUDA_CHECK(cudaMemcpyAsync(m->state_in, stored, B * row_bytes, cudaMemcpyDeviceToDevice, m->stream));
    Graph *graph = batch->logits ? NULL : find_graph(m, &key);
    if (graph) {
        run_as_graph(m, &graph->exec, &graph->runs, [&] { enqueue_step(m, &key, NULL); });
    } else {  // a dump
        float *logits = NULL;
        size_t bytes = rows * dim(m, DIM_V) * sizeof(float);
        if (cudaMalloc((void **)&logits, bytes) != cudaSuccess)
            die(EXIT_USAGE, "the logits of --dump need %.1f GiB more on the GPU; lower --batch or --seq-len",
                (double)bytes / 1073741824.0);
        enqueue_step(m, &key, logits);
        CUDA_CHECK(cudaMemcpyAsync(batch->logits, logits, bytes, cudaMemcpyDeviceToHost, m->stream));
        device_wait(m->stream, "a copy");
        CUDA_CHECK(cudaFree(logits));
    }
    if (stateful) CUDA_CHECK(cudaMemcpyAsync(stored, m->state_out, B * row_bytes, cudaMemcpyDeviceToDevice, m->stream));
    CUDA_CHECK(cudaMemcpyAsync(host.sums, m->sums, 2 * sizeof(double), cudaMemcpyDeviceToHost, m->stream));
    if (batch->meanwhile) batch->meanwhile(batch->meanwhile_arg);
    device_wait(m->stream, "a training step");
    return host.sums[0];
}

template <typename F>
static void decode_token(Model<F> *m, int token, float *logits) {
    Staging host = staging(m, NULL);
    *host.inputs = token;
    CUDA_CHECK(cudaMemcpyAsync(m->decode_token, host.inputs, sizeof(int), cudaMemcpyHostToDevice, m->stream));
    run_as_graph(m, &m->decode_graph, &m->decode_runs, [&] {
        // The small states are read from a copy, for their place receives the next ones; the matrices change in place.
        CUDA_CHECK(cudaMemcpyAsync(m->decode_in, m->decode_state, m->state_small * sizeof(float),
                                   cudaMemcpyDeviceToDevice, m->stream));
        Sequence s = {1, 1, m->doc_start, m->decode_in, m->decode_state, 1};
        model_forward(m, &s, m->decode_token);
        classifier(m, 1, 0, (const int *)NULL, m->logits_out);
    });
    size_t bytes = (size_t)dim(m, DIM_V) * sizeof(float);
    CUDA_CHECK(cudaMemcpyAsync(host.logits, m->logits_out, bytes, cudaMemcpyDeviceToHost, m->stream));
    device_wait(m->stream, "a copy");
    memcpy(logits, host.logits, bytes);
}

// ----------------------------------------------------------------------------------------------------------------
// Memory: one arena; its size is known before anything is allocated

template <typename F>
static void take_ffn(Arena *a, FfnActs<F> *f, size_t rows, size_t D, size_t U) {
    f->u = take<F>(a, rows * D);
    f->stats = take<float>(a, rows * 2);
    f->gate_up = take<F>(a, rows * 2 * U);
    f->act = take<F>(a, rows * U);
}

// Rows of width D in an sLSTM's buffers
template <typename F>
static size_t slstm_rows(const Model<F> *m) {
    SlstmShape s = slstm_shape_max(m);
    size_t rows = (size_t)m->run.max_batch * m->run.max_len, mine = (size_t)s.B * s.T * s.NH;
    size_t NH = m->config.num_heads;
    return rows * NH > mine ? rows : (mine + NH - 1) / NH;
}

template <typename F>
static void take_block(Arena *a, const Model<F> *m, int b, BlockActs<F> *acts) {
    size_t rows = (size_t)m->run.max_batch * m->run.max_len, D = dim(m, DIM_D), I = dim(m, DIM_I);
    size_t Dk = dim(m, DIM_DK), Dv = dim(m, DIM_DV), NH = m->config.num_heads;
    int type = m->config.block_types[b], v1 = type == BLOCK_MLSTM_V1;
    size_t inner = type == BLOCK_MLSTM ? Dv : v1 ? I : D;
    acts->u = take<F>(a, rows * D);
    acts->stats = take<float>(a, rows * 2);
    acts->h = take<F>(a, (type == BLOCK_SLSTM ? slstm_rows(m) : rows) * inner);
    acts->hn_stats = take<float>(a, rows * NH * 2);
    if (type != BLOCK_SLSTM) {
        MlstmShape shape = mlstm_shape(m, m->run.max_batch, m->run.max_len, v1);
        acts->proj = take<F>(a, rows * (v1 ? 2 * I : 2 * Dk + 2 * Dv));
        acts->gates = take<float>(a, rows * gate_rows(m->config.num_heads));
        acts->y = take<F>(a, rows * inner);
        mlstm_take_saved(a, &shape, &acts->mlstm);
    }
    if (type != BLOCK_MLSTM) {
        acts->conv = take<F>(a, rows * inner);
        acts->ca = take<F>(a, rows * inner);
    }
    if (v1) {
        acts->qkv = take<F>(a, rows * 3 * I);
        return;  // no FFN
    }
    acts->x_mid = take<F>(a, rows * D);
    take_ffn(a, &acts->ffn, rows, D, dim(m, type == BLOCK_MLSTM ? DIM_U : DIM_US));
    if (type == BLOCK_SLSTM) {
        SlstmShape shape = slstm_shape_max(m);
        slstm_take_saved(a, &shape, &acts->slstm);
    }
}

// Widths of the backward pass's scratch: of d_wide, and of d_mid and its siblings.
template <typename F>
static void scratch_widths(const Model<F> *m, size_t *wide, size_t *mid) {
    size_t D = dim(m, DIM_D), I = dim(m, DIM_I), U = dim(m, DIM_U), Us = dim(m, DIM_US);
    size_t Dk = dim(m, DIM_DK), Dv = dim(m, DIM_DV), G = gate_rows(m->config.num_heads), P = 2 * Dk + 2 * Dv + G;
    size_t wides[NUM_BLOCK_TYPES] = {P > 2 * U ? P : 2 * U, 5 * I + G, 0};
    size_t mids[NUM_BLOCK_TYPES] = {U > Dv ? U : Dv, I, Us};
    *wide = 0;
    *mid = D;
    for (int type = 0; type < NUM_BLOCK_TYPES; type++) {
        if (!model_has(&m->config, (BlockType)type)) continue;
        if (wides[type] > *wide) *wide = wides[type];
        if (mids[type] > *mid) *mid = mids[type];
    }
}

// Scratch for sums over rows, the most that any layer asks for.
template <typename F>
static size_t partial_floats(const Model<F> *m) {
    int D = dim(m, DIM_D), I = dim(m, DIM_I), widest = imax(imax(D, I), dim(m, DIM_DV)), NH = m->config.num_heads;
    size_t most = (size_t)NORM_PARTS * D, heads = 2 * (size_t)imax(HEAD_NORM_PARTS, NH) * (widest / NH);
    SlstmShape shape = slstm_shape_max(m);
    const size_t others[] = {heads, blocks4_partial_floats(I), conv_partial_floats(imax(D, I)),
                             slstm_partial_size(&shape)};
    for (size_t k = 0; k < sizeof others / sizeof others[0]; k++)
        if (others[k] > most) most = others[k];
    return most;
}

// Of what the ranks of a sequence exchange: the pairs of an mLSTM of all ranks, or the four of a scan; a window there
// and back; an sLSTM's pre-activations there and back, or its final states.
template <typename F>
static size_t exchange_bytes(const Model<F> *m) {
    size_t B = (size_t)m->run.max_batch, D = dim(m, DIM_D), I = dim(m, DIM_I), P = (size_t)comm.sp_size, most = 0;
    for (int type = 0; type < NUM_BLOCK_TYPES; type++) {
        if (!model_has(&m->config, (BlockType)type)) continue;
        MlstmShape shape = mlstm_shape(m, (int)B, m->run.max_len, type == BLOCK_MLSTM_V1);
        size_t pairs = comm.sp_size <= fold_by_gather ? P : 4;
        size_t cell = pairs * B * mlstm_pair_row(&shape) * sizeof(float);
        if (type == BLOCK_SLSTM) {
            size_t packed = 2 * slstm_rows(m) * 4 * D * sizeof(F) + 256, states = (P + 1) * B * 4 * D * sizeof(float);
            cell = packed > states ? packed : states;
        }
        size_t window = 6 * B * (type == BLOCK_MLSTM_V1 ? I : D) * sizeof(float), wants = cell > window ? cell : window;
        if (wants > most) most = wants;
    }
    return most;
}

template <typename F>
static void take_activations(Arena *a, Model<F> *m) {
    int N = m->config.num_blocks, B = m->run.max_batch, T = m->run.max_len, V = dim(m, DIM_V);
    size_t rows = (size_t)B * T, D = dim(m, DIM_D), NH = m->config.num_heads, wide, mid, shared = a->used,
           end = a->used;
    for (int b = 0; b < N; b++) {
        if (m->run.recompute) a->used = shared;
        take_block(a, m, b, &m->acts[b]);
        if (a->used > end) end = a->used;
    }
    a->used = end;
    for (int b = 0; b <= N; b++) m->x[b] = take<F>(a, rows * D);
    m->out = take<F>(a, rows * D);
    m->out_stats = take<float>(a, rows * 2);
    m->losses = take<float>(a, rows);
    m->logits = take<F>(a, (size_t)m->logit_rows * align_up(V, 8));
    m->logits_out = take<float>(a, V);
    m->inputs = take<int>(a, rows);
    m->targets = take<int>(a, rows);
    m->doc_start = take<int>(a, rows);
    m->decode_token = take<int>(a, 1);
    m->scale = take<float>(a, 1);
    m->sums = take<double>(a, 2);
    if (model_has(&m->config, BLOCK_SLSTM)) {
        SlstmShape shape = slstm_shape_max(m);
        size_t cells = slstm_rows(m) * 4 * D, ffn = rows * 2 * dim(m, DIM_US);
        m->slstm_x = take<F>(a, cells > ffn ? cells : ffn);
        if (m->run.training) m->slstm_dx = take<F>(a, cells);
        m->whole_start = take<int>(a, whole_start_size(m));
        slstm_take_scratch<F>(a, &shape, &m->slstm_scratch);
    }
    for (int v1 = 0; v1 < 2; v1++)
        if (model_has(&m->config, v1 ? BLOCK_MLSTM_V1 : BLOCK_MLSTM)) {
            MlstmShape shape = mlstm_shape(m, B, T, v1);
            mlstm_take_scratch(a, &shape, &m->mlstm_scratch[v1]);
        }
    if (!m->run.training) return;
    scratch_widths(m, &wide, &mid);
    size_t cells = model_has(&m->config, BLOCK_SLSTM) ? slstm_rows(m) : 0;
    m->dx = take<F>(a, rows * D);
    m->d_wide = take<F>(a, rows * wide);
    m->d_mid = take<F>(a, rows * mid > cells * D ? rows * mid : cells * D);
    m->d_mid2 = take<F>(a, rows * mid);
    m->d_mid3 = take<F>(a, rows * mid);
    m->dh_dot_h = take<float>(a, rows * NH);
    m->partial = take<float>(a, partial_floats(m));
    m->embedding_scratch = take<int>(a, embedding_scratch_size((int)rows, (int)D));
    m->norm_partial = take<double>(a, (size_t)norm_partials(m));
}

// One for each stream that multiplies
template <typename F>
static size_t matmul_workspaces(const Model<F> *m) {
    return matmul_workspace_bytes(m->run.training && model_has(&m->config, BLOCK_SLSTM) ? 2 : 1);
}

// 1: gradients of PART_EMBEDDING on travel in bf16. XLSTM_REDUCE
static int reduce_rounded;

// What a rank gets from another one in one reduce-scatter
template <typename F>
static size_t received_bytes(const Model<F> *m) {
    size_t small = m->begins[PART_EMBEDDING] / (size_t)comm.size * sizeof(float);
    size_t piece = m->shards.piece * (reduce_rounded ? sizeof(bf16) : sizeof(float));
    return piece > small ? piece : small;
}

// Everything but the activations: tensors, moments, states. Up to the end of the window all ranks have the same in the
// same places.
template <typename F>
static void take_tensors(Arena *a, Model<F> *m) {
    size_t rows = (size_t)m->run.max_batch, training = m->run.training != 0;
    size_t padded = shards_padded(&m->shards), moments = m->own_moments ? shards_owned(&m->shards) : padded;
    size_t segments = comm.sp_size > 1 ? rows * m->state_size : 0;
    m->window = take<char>(a, copies_head_bytes(received_bytes(m)));
    m->params = take<float>(a, padded);
    m->weights = sizeof(F) == 4 ? (F *)m->params : take<F>(a, padded);
    m->grads = take<float>(a, training * padded);
    m->rounded = training && reduce_rounded ? take<bf16>(a, padded) : NULL;
    m->exchange = take<char>(a, comm.sp_size > 1 ? exchange_bytes(m) : 0);
    m->window_bytes = a->used;
    m->workspace = take<char>(a, matmul_workspaces(m));
    m->m = take<float>(a, training * moments);
    m->v = take<float>(a, training * moments);
    m->entering = take<float>(a, segments);
    m->leaving = take<float>(a, segments);
    m->dstate = take<float>(a, segments);
    m->chunks = take<UpdateChunk>(a, (size_t)m->num_chunks);
    m->stored = take<float>(a, (size_t)m->run.num_state_rows * m->state_size);
    m->state_in = take<float>(a, m->run.num_state_rows ? rows * m->state_size : 0);
    m->state_out = take<float>(a, m->run.num_state_rows ? rows * m->state_size : 0);
    m->decode_state = take<float>(a, m->state_size);
    m->decode_in = take<float>(a, m->state_small);
}

template <typename F>
static size_t planned_bytes(Model<F> *m, size_t *tensors) {
    Arena arena = {NULL, 0};
    take_tensors(&arena, m);
    if (tensors) *tensors = arena.used;
    take_activations(&arena, m);
    return arena.used;
}

// Left for what is allocated beside the plan: code of kernels, graphs, cuBLASLt, the driver. test_xlstm.cu measures it:
// 23 MiB on an H100. The context exists before the free memory is asked for. With several ranks NCCL allocates at its
// first calls, too: some 160 MiB with two.
static size_t slack_bytes(void) { return (size_t)(comm.size > 1 ? 512 : 128) << 20; }

// Ends the program if the plan does not fit, and says what would: a smaller batch, or else a shorter sequence.
template <typename F>
static void check_memory(Model<F> *m, size_t available) {
    const double gib = 1073741824.0;
    size_t wanted = planned_bytes(m, NULL) + slack_bytes();
    int B = m->run.max_batch, T = m->run.max_len, stateful = m->run.num_state_rows > 0, P = comm.sp_size;
    if (wanted <= available) return;
    if (!m->run.training)
        die(EXIT_USAGE, "the model needs %.1f GiB on the GPU, %.1f GiB are free%s", (double)wanted / gib,
            (double)available / gib, sizeof(F) == 4 ? "; try --precision bf16" : "");
    int *sizes[2] = {&m->run.max_batch, &m->run.max_len}, fits[2] = {0, 0};
    for (int k = 0; k < 2 && !fits[0]; k++)  // the batch first; if not even one sequence fits, the length
        for (int low = 0, high = *sizes[k]; high - low > 1;) {
            *sizes[k] = low + (high - low) / 2;
            if (stateful && k == 0) m->run.num_state_rows = m->run.max_batch;
            int fit = planned_bytes(m, NULL) + slack_bytes() <= available;
            if (fit) low = fits[k] = *sizes[k];
            else high = *sizes[k];
            if (k == 0 && high - low <= 1) *sizes[0] = 1;
        }
    const char *recompute = m->run.recompute ? "" : "; --recompute block needs less";
    if (fits[0])
        die(EXIT_USAGE,
            "--batch %d --seq-len %d needs %.1f GiB on the GPU, %.1f GiB are free; --batch %d would fit, with "
            "--tokens-per-step for the rest%s",
            B, T * P, (double)wanted / gib, (double)available / gib, fits[0], recompute);
    if (fits[1])
        die(EXIT_USAGE,
            "--batch %d --seq-len %d needs %.1f GiB on the GPU, %.1f GiB are free; --batch 1 --seq-len %d would fit%s",
            B, T * P, (double)wanted / gib, (double)available / gib, fits[1] * P, recompute);
    die(EXIT_USAGE, "the model needs more than the %.1f GiB that are free on the GPU; choose a smaller --model%s",
        (double)available / gib, recompute);
}

// The pieces that the optimiser works on, in the order of memory; returns their number, `chunks` may be NULL. own:
// those of this rank's shards only; first_of_bucket [num_buckets + 1]: see bucket_chunks, or NULL.
template <typename F>
static int update_chunks(const Model<F> *m, UpdateChunk *chunks, int *first_of_bucket) {
    const Shards *shards = &m->shards;
    int count = 0, owner = 0, own = m->own_moments, num_tensors = m->table.num_tensors;
    size_t bucket = 0;
    for (int pass = 0; pass < NUM_PARTS * num_tensors; pass++) {
        int k = pass % num_tensors;
        const TensorSpec *s = &m->table.tensors[k];
        if (part_of(&m->config, &m->table, k) != pass / num_tensors) continue;
        for (size_t at = 0, n; at < s->count; at += n) {
            size_t place = m->offsets[k] + at, left = s->count - at, moments = place;
            n = left < (size_t)UPDATE_CHUNK ? left : (size_t)UPDATE_CHUNK;
            if (own) n = shards_run(shards, place, n, &owner, &moments);
            if (own && owner != shards->rank) continue;
            while (first_of_bucket && bucket <= place / shards_bucket(shards)) first_of_bucket[bucket++] = count;
            UpdateChunk chunk = {place, moments, (unsigned)n, (float)s->decay};
            if (chunks) chunks[count] = chunk;
            count++;
        }
    }
    while (first_of_bucket && bucket <= shards->num_buckets) first_of_bucket[bucket++] = count;
    return count;
}

// 1: micro-steps are so long that the links between GPUs of one host are better left asleep (comm_copies.cuh):
// gradients leave while the first block's are made, and what segments pass on goes through the host, 30 us more a
// layer. Gradients grow with the parameters, products with parameters times tokens, so tokens decide. XLSTM_QUIET, for
// tests.
enum { QUIET_TOKENS = 65536 };
static int quiet_links(const RunConfig *run) {
    const char *wanted = getenv("XLSTM_QUIET");
    int quiet = wanted ? *wanted == '1' : (size_t)run->max_batch * run->max_len >= QUIET_TOKENS;
    return comm.size > 1 && !comm_any(!quiet, "comparing lengths") && device_copies();
}

static char cuda_device[200];

template <typename F>
static void model_build(Model<F> *m, const ModelConfig *config, const TensorTable *table, const RunConfig *run) {
    const double mib = 1048576.0;
    size_t tensors, free_bytes, all_bytes, pinned;
    m->config = *config;
    m->table = *table;
    m->states = model_state_table(config);
    m->run = *run;
    m->offsets = (size_t *)xcalloc((size_t)table->num_tensors, sizeof(size_t));
    m->state_offsets = (size_t *)xcalloc((size_t)m->states.num_tensors, sizeof(size_t));
    m->total = device_layout(config, table, m->offsets, m->begins);
    m->state_size = state_layout(&m->states, m->state_offsets, &m->state_small);
    m->shards = shards_make(m->total, comm.size, comm.rank);
    m->own_moments = run->zero && comm.size > 1;
    m->num_chunks = update_chunks<F>(m, NULL, NULL);
    m->bucket_chunks = (int *)xcalloc(m->shards.num_buckets + 1, sizeof(int));
    m->x = (F **)xcalloc((size_t)config->num_blocks + 1, sizeof(F *));
    m->acts = (BlockActs<F> *)xcalloc((size_t)config->num_blocks, sizeof(BlockActs<F>));
    size_t rows = (size_t)run->max_batch * run->max_len, fit = LOGIT_BYTES / sizeof(F) / (size_t)dim(m, DIM_V);
    m->logit_rows = (int)(rows < fit ? rows : fit < 128 ? 128 : fit / 128 * 128);
    size_t bytes = planned_bytes(m, &tensors);
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &all_bytes));
    fprintf(run->training ? stdout : stderr,
            "memory      weights%s and states %.1f MiB, activations %.1f MiB of %.1f MiB free\n",
            run->training ? ", gradients, moments" : "", (double)tensors / mib, (double)(bytes - tensors) / mib,
            (double)free_bytes / mib);
    check_memory(m, free_bytes);
    if (cudaMalloc((void **)&m->memory, bytes) != cudaSuccess)
        die(EXIT_USAGE, "%.1f MiB are no longer free on the GPU; does another program use it?", (double)bytes / mib);
    Arena arena = {m->memory, 0};
    take_tensors(&arena, m);
    CUDA_CHECK(cudaMemset(m->memory, 0, arena.used));
    size_t begin = arena.used;
    take_activations(&arena, m);
#ifdef TESTING  // NaN in both formats: a value that is read before it was written is seen in the results
    CUDA_CHECK(cudaMemset(arena.base + begin, 0xff, arena.used - begin));
#else
    (void)begin;
#endif
    // Blocks of a scan go before those of the products beside it, whichever came first, and what ranks exchange before
    // both.
    int low, high;
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&low, &high));
    CUDA_CHECK(cudaStreamCreateWithPriority(&m->stream, cudaStreamNonBlocking, low > high ? low - 1 : low));
    CUDA_CHECK(cudaStreamCreateWithPriority(&m->side, cudaStreamNonBlocking, low));
    CUDA_CHECK(cudaStreamCreateWithPriority(&m->exchange_stream, cudaStreamNonBlocking, high));
    for (cudaEvent_t *event : {&m->fork, &m->join, &m->worked, &m->exchanged, &m->reduced})
        CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    matmul_init(m->workspace, m->side);
    m->staging = NULL;
    staging(m, &pinned);
    CUDA_CHECK(cudaMallocHost(&m->staging, pinned));
    UpdateChunk *chunks = (UpdateChunk *)xcalloc((size_t)m->num_chunks, sizeof(UpdateChunk));
    update_chunks(m, chunks, m->bucket_chunks);
    CUDA_CHECK(cudaMemcpy(m->chunks, chunks, (size_t)m->num_chunks * sizeof(UpdateChunk), cudaMemcpyHostToDevice));
    free(chunks);
    CUDA_CHECK(cudaMemset(m->scale, 0, sizeof(float)));
    CUDA_CHECK(cudaDeviceSynchronize());
    device_share_window(m->window, m->window_bytes, received_bytes(m));
    m->quiet = quiet_links(run);
    if (m->quiet && comm.sp_size > 1) copies_start_slots(exchange_bytes(m));
    // Beside copies there is only summing to do, which has time; kernels of NCCL would keep other ranks waiting.
    CUDA_CHECK(cudaStreamCreateWithPriority(&m->gradient_stream, cudaStreamNonBlocking, device_copies() ? low : high));
    m->gathered = (cudaEvent_t *)xcalloc(m->shards.num_buckets, sizeof(cudaEvent_t));
    for (size_t k = 0; k < m->shards.num_buckets; k++)
        CUDA_CHECK(cudaEventCreateWithFlags(&m->gathered[k], cudaEventDisableTiming));
}

// ----------------------------------------------------------------------------------------------------------------
// Optimiser, and what crosses the backend's border

// It came with the loss of the step's last micro-step.
template <typename F>
static double model_grad_norm(Model<F> *m) {
    assert(m->last_of_step);
    double sum = staging(m, NULL).sums[1];
    comm_sum(&sum, 1, "sum of the gradient's norm");
    return sqrt(sum);
}

// While the last buckets of gradients are gathered, all others are updated.
// With its own moments only, a rank updates its piece of a bucket, and while the next ones are updated and the next
// forward pass has begun, the pieces of this one are gathered (await_weights): those for matmuls in format F only,
// whose float is nobody's but the owner's.
template <typename F>
static void model_update(Model<F> *m, const UpdateConfig *u) {
    AdamwArgs args = {(float)u->lr,
                      (float)u->beta1,
                      (float)u->beta2,
                      (float)u->eps,
                      (float)u->weight_decay,
                      (float)(1 / (1 - pow(u->beta1, u->step))),
                      (float)(1 / (1 - pow(u->beta2, u->step))),
                      (float)u->grad_scale};
    const Shards *s = &m->shards;
    size_t size = shards_bucket(s), mine = s->piece * (size_t)s->rank;
    bf16 *weights = sizeof(F) == 2 ? (bf16 *)m->weights : NULL;
    if (!m->own_moments) {
        int last = comm.size > 1 ? m->bucket_chunks[last_buckets(m)] : 0;  // chunks of the last buckets
        if (last) send_begins(m);
        adamw_update(m->params, weights, m->m, m->v, gradients(m), m->chunks + last, m->num_chunks - last, args,
                     m->stream);
        if (last) {
            gather_buckets(m, 0, last_buckets(m));
            send_ends(m);
        }
        adamw_update(m->params, weights, m->m, m->v, gradients(m), m->chunks, last, args, m->stream);
        return;
    }
    for (size_t k = 0; k < s->num_buckets; k++) {
        int first = m->bucket_chunks[k], count = m->bucket_chunks[k + 1] - first;
        float *bucket = m->params + k * size;
        adamw_update(m->params, weights, m->m, m->v, gradients(m), m->chunks + first, count, args, m->stream);
        send_begins(m);
        if (!weights || k * size < m->begins[PART_MATMUL])
            comm.data->all_gather(COMM_WORLD, bucket + mine, bucket, s->piece * sizeof(float), "all-gather of weights",
                                  m->gradient_stream);
        if (weights && (k + 1) * size > m->begins[PART_MATMUL])
            comm.data->all_gather(COMM_WORLD, weights + k * size + mine, weights + k * size, s->piece * sizeof(bf16),
                                  "all-gather of weights", m->gradient_stream);
        CUDA_CHECK(cudaEventRecord(m->gathered[k], m->gradient_stream));
    }
}

template <typename F>
static float *kind_base(const Model<F> *m, int kind) {
    float *bases[] = {m->params, m->grads, m->m, m->v};
    return bases[kind];
}

// Pieces from their owners to all.
template <typename F>
static void model_collect(Model<F> *m, int kind) {
    const Shards *s = &m->shards;
    const char *const what[] = {"all-gather of weights", "all-gather of gradients", "all-gather of moments",
                                "all-gather of moments"};
    if (m->own_moments && (kind == KIND_M || kind == KIND_V)) return;
    size_t bytes = kind == KIND_GRAD && m->rounded ? sizeof(bf16) : sizeof(float);
    await_weights(m, m->total);
    for (size_t k = 0; k < s->num_buckets; k++) {
        char *base = bytes == sizeof(bf16) ? (char *)m->rounded : (char *)kind_base(m, kind);
        char *bucket = base + k * shards_bucket(s) * bytes;
        comm.data->all_gather(COMM_WORLD, bucket + s->piece * (size_t)s->rank * bytes, bucket, s->piece * bytes,
                              what[kind], m->stream);
    }
    if (kind == KIND_WEIGHT && sizeof(F) == 2) to_bf16((bf16 *)m->weights, m->params, shards_padded(s), m->stream);
    device_wait(m->stream, what[kind]);
}

// Elements first .. first+count-1 of a tensor, one way or the other: dst or src is given. Of moments only those that
// this rank has.
template <typename F>
static void model_move_part(Model<F> *m, int kind, int index, size_t first, size_t count, float *dst,
                            const float *src) {
    int apart = m->own_moments && (kind == KIND_M || kind == KIND_V), owner = m->shards.rank;
    size_t begin = m->offsets[index] + first;
    for (size_t at = 0, n; at < count; at += n) {
        size_t place = begin + at;
        n = count - at;
        if (apart) n = shards_run(&m->shards, begin + at, n, &owner, &place);
        if (owner != m->shards.rank) continue;
        float *device = kind_base(m, kind) + place;
        if (kind == KIND_GRAD && m->rounded && place >= m->begins[PART_EMBEDDING])
            widen_gradients(device, m->rounded + place, n, m->stream);
        if (dst) CUDA_CHECK(cudaMemcpyAsync(dst + at, device, n * sizeof(float), cudaMemcpyDeviceToHost, m->stream));
        else CUDA_CHECK(cudaMemcpyAsync(device, src + at, n * sizeof(float), cudaMemcpyHostToDevice, m->stream));
    }
    if (src && kind == KIND_WEIGHT && sizeof(F) == 2)
        to_bf16((bf16 *)m->weights + begin, m->params + begin, count, m->stream);
    device_wait(m->stream, "a copy");  // src is the caller's
}

template <typename F>
static void model_move_state(Model<F> *m, int row, float *dst, const float *src) {  // one of dst and src is given
    for (int k = 0; k < m->states.num_tensors; k++) {
        const TensorSpec *s = &m->states.tensors[k];
        float *device = m->stored + (size_t)row * m->state_size + m->state_offsets[k];
        size_t bytes = s->count * sizeof(float);
        if (dst) CUDA_CHECK(cudaMemcpyAsync(dst + s->offset, device, bytes, cudaMemcpyDeviceToHost, m->stream));
        else CUDA_CHECK(cudaMemcpyAsync(device, src + s->offset, bytes, cudaMemcpyHostToDevice, m->stream));
    }
    device_wait(m->stream, "a copy");
}

// ----------------------------------------------------------------------------------------------------------------
// The backend: one model, in one of the two formats

static Model<bf16> model_bf16;
static Model<float> model_fp32;
static int use_bf16;
#define WITH_MODEL(call) (use_bf16 ? call(&model_bf16) : call(&model_fp32))

// A GPU that this build has code for, or one line and exit code 2.
static void choose_device(void) {
    int count = 0, driver = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0)
        die(EXIT_USAGE, "the GPU driver is older than CUDA %d.%d, which this program was built with; update the driver",
            CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    if (status != cudaSuccess || count == 0)
        die(EXIT_USAGE, "no GPU found (%s); ./train_xlstm trains on the CPU",
            status == cudaSuccess                   ? "CUDA sees no device"
            : status == cudaErrorInsufficientDriver ? "no NVIDIA driver"
                                                    : cudaGetErrorString(status));
    int device = device_of_rank(count);
    CUDA_CHECK(cudaSetDevice(device));
    cudaDeviceProp p;
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaGetDeviceProperties(&p, device));
    if (p.major < 8)
        die(EXIT_USAGE, "%s is sm_%d%d; the kernels need sm_80 or newer; ./train_xlstm trains on the CPU", p.name,
            p.major, p.minor);
    status = cudaFuncGetAttributes(&attributes, add_partials_kernel<32>);
    if (status == cudaErrorUnsupportedPtxVersion)
        die(EXIT_USAGE, "the GPU driver is too old for this build; update it, or: make clean && make SM=%d%d", p.major,
            p.minor);
    if (status != cudaSuccess)
        die(EXIT_USAGE, "this build has no code for %s (sm_%d%d); build with: make clean && make SM=%d%d", p.name,
            p.major, p.minor, p.major, p.minor);
    format_into(cuda_device, sizeof cuda_device, "%s, sm_%d%d, %s", p.name, p.major, p.minor,
                use_bf16 ? "bf16" : "fp32");
    device_comm_start(device);
}

// What the kernels do not take, in one line that names the flag.
static void check_shapes(const ModelConfig *c, const RunConfig *run) {
    if ((int64_t)run->max_batch * c->num_heads > 65535)
        die(EXIT_USAGE,
            "--batch %d times %d heads: the GPU kernels take at most 65535 in a micro-step; lower --batch and set "
            "--tokens-per-step",
            run->max_batch, c->num_heads);
    const struct {
        BlockType type;
        Dim dim;
    } widths[] = {{BLOCK_MLSTM, DIM_DK}, {BLOCK_MLSTM, DIM_DV}, {BLOCK_MLSTM_V1, DIM_I}, {BLOCK_SLSTM, DIM_D}};
    for (size_t k = 0; k < sizeof widths / sizeof widths[0]; k++) {
        int width = model_dim(c, widths[k].dim) / c->num_heads;
        if (model_has(c, widths[k].type) && width > MAX_HEAD_DIM)
            die(EXIT_USAGE,
                "--heads %d makes heads of width %d in %s blocks; the GPU kernels take at most %d: use more --heads",
                c->num_heads, width, block_type_names[widths[k].type], MAX_HEAD_DIM);
    }
}

// In which format gradients travel between ranks: XLSTM_REDUCE, by default that of activations
static void choose_reduction(void) {
    const char *wanted = getenv("XLSTM_REDUCE");
    int bf16_wanted = wanted ? strcmp(wanted, "bf16") == 0 : use_bf16;
    if (wanted && !bf16_wanted && strcmp(wanted, "fp32") != 0)
        die(EXIT_USAGE, "XLSTM_REDUCE=%s is no format for gradients between ranks; set it to fp32 or bf16", wanted);
    if (bf16_wanted && !use_bf16)
        die(EXIT_USAGE, "XLSTM_REDUCE=bf16 and --precision fp32 exclude each other; give one of them");
    if (comm_any(bf16_wanted, "comparing XLSTM_REDUCE") && comm_any(!bf16_wanted, "comparing XLSTM_REDUCE"))
        die(EXIT_USAGE, "XLSTM_REDUCE is not the same on all ranks; let the launcher hand it to all of them");
    reduce_rounded = bf16_wanted && comm.size > 1;
}

static void cuda_build(const ModelConfig *config, const TensorTable *table, const RunConfig *run) {
    const char *gather = getenv("XLSTM_FOLD_BY_GATHER"), *bucket = getenv("XLSTM_BUCKET");  // for tests
    if (gather) fold_by_gather = atoi(gather);
    if (bucket && atoi(bucket) > 0) shard_bucket = (size_t)atoi(bucket);
    use_bf16 = run->bf16;
    choose_reduction();
    check_shapes(config, run);
    choose_device();
    if (use_bf16) model_build(&model_bf16, config, table, run);
    else model_build(&model_fp32, config, table, run);
}

static double cuda_forward_backward(const Batch *batch, double scale) {
    return use_bf16 ? run_batch(&model_bf16, batch, 1, scale) : run_batch(&model_fp32, batch, 1, scale);
}
static double cuda_evaluate(const Batch *batch) {
    return use_bf16 ? run_batch(&model_bf16, batch, 0, 0) : run_batch(&model_fp32, batch, 0, 0);
}
template <typename F>
static void model_zero_grad(Model<F> *m) {
    m->fresh = 1;  // clear_gradients
}
static void cuda_zero_grad(void) { WITH_MODEL(model_zero_grad); }
static double cuda_grad_norm(void) { return WITH_MODEL(model_grad_norm); }
static void cuda_update(const UpdateConfig *u) {
    if (use_bf16) model_update(&model_bf16, u);
    else model_update(&model_fp32, u);
}
template <typename F>
static void model_decode_start(Model<F> *m) {
    await_weights(m, m->total);
    CUDA_CHECK(cudaMemsetAsync(m->decode_state, 0, m->state_size * sizeof(float), m->stream));
    static const int no_reset = NO_RESET;
    CUDA_CHECK(cudaMemcpyAsync(m->doc_start, &no_reset, sizeof(int), cudaMemcpyHostToDevice, m->stream));
}
static void cuda_decode_start(void) { WITH_MODEL(model_decode_start); }
static void cuda_decode_step(int token, float *logits) {
    if (use_bf16) decode_token(&model_bf16, token, logits);
    else decode_token(&model_fp32, token, logits);
}
static void cuda_move_part(int kind, int index, size_t first, size_t count, float *dst, const float *src) {
    if (use_bf16) model_move_part(&model_bf16, kind, index, first, count, dst, src);
    else model_move_part(&model_fp32, kind, index, first, count, dst, src);
}
static const TensorTable *cuda_table(void) { return use_bf16 ? &model_bf16.table : &model_fp32.table; }
static void cuda_read_part(int kind, int index, size_t first, size_t count, float *dst) {
    cuda_move_part(kind, index, first, count, dst, NULL);
}
static void cuda_write_part(int kind, int index, size_t first, size_t count, const float *src) {
    cuda_move_part(kind, index, first, count, NULL, src);
}
static void cuda_read_tensor(int kind, int index, float *dst) {
    cuda_move_part(kind, index, 0, cuda_table()->tensors[index].count, dst, NULL);
}
static void cuda_write_tensor(int kind, int index, const float *src) {
    cuda_move_part(kind, index, 0, cuda_table()->tensors[index].count, NULL, src);
}
static void cuda_reduce_grads(void) {}  // they have left with the step's last micro-step, which waited for them
static void cuda_collect(int kind) {
    if (use_bf16) model_collect(&model_bf16, kind);
    else model_collect(&model_fp32, kind);
}
static const Shards *cuda_shards(void) { return use_bf16 ? &model_bf16.shards : &model_fp32.shards; }
static size_t cuda_place(int index) { return use_bf16 ? model_bf16.offsets[index] : model_fp32.offsets[index]; }
template <typename F>
static void model_fresh_state(Model<F> *m, int row) {
    CUDA_CHECK(cudaMemsetAsync(m->stored + (size_t)row * m->state_size, 0, m->state_size * sizeof(float), m->stream));
}
static void cuda_read_state(int row, float *dst) {
    if (use_bf16) model_move_state(&model_bf16, row, dst, NULL);
    else model_move_state(&model_fp32, row, dst, NULL);
}
static void cuda_write_state(int row, const float *src) {
    if (!src && use_bf16) model_fresh_state(&model_bf16, row);
    else if (!src) model_fresh_state(&model_fp32, row);
    else if (use_bf16) model_move_state(&model_bf16, row, NULL, src);
    else model_move_state(&model_fp32, row, NULL, src);
}

static const Backend cuda_backend = {
    "cuda",           cuda_device,       cuda_build,      cuda_forward_backward, cuda_evaluate,
    cuda_zero_grad,   cuda_grad_norm,    cuda_update,     cuda_decode_start,     cuda_decode_step,
    cuda_read_tensor, cuda_write_tensor, cuda_read_state, cuda_write_state,      cuda_reduce_grads,
    cuda_collect,     cuda_shards,       cuda_place,      cuda_read_part,        cuda_write_part};

#ifndef TESTING  // the tests include this file and bring their own main
int main(int argc, char **argv) { return trainer_main(argc, argv, &cuda_backend); }
#endif
