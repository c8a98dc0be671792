// backend.h: what a trainer program implements and the shared training loop (trainer.h) calls.
// train_xlstm.c (CPU) and train_xlstm.cu (CUDA) each fill one Backend; the loop, the flags and the files exist once.
// All tensors cross this border as float in host memory.
#ifndef XLSTMC_BACKEND_H
#define XLSTMC_BACKEND_H

#include "comm.h"    // comm
#include "model.h"   // ModelConfig, TensorTable
#include "shards.h"  // Shards

// One micro-step: B sequences of T tokens.
typedef struct {
    int B, T;            // B <= max_batch, T <= max_len of build()
    const int *inputs;   // [B, T] token ids
    const int *targets;  // [B, T] token ids; -1: ignored
    const unsigned char
        *resets;                // [B, T] 1: a document begins here, all states are fresh before this token; NULL: none
    int state_row;              // >= 0: rows continue from stored states state_row .. state_row+B-1, which are then
                                // replaced by the final ones (truncated backpropagation); -1: rows start fresh
    float *logits;              // [B, T, V] out, after the soft cap; NULL: not wanted
    void (*meanwhile)(void *);  // may be called once while a device computes; NULL: nothing to do
    void *meanwhile_arg;
    int whole;         // with --sp: tokens of the whole sequences, of which T are this rank's segment; else 0
    int last_of_step;  // 1: no gradients follow before reduce_grads(), so their reduction may begin on the way
} Batch;

typedef struct {
    int max_batch, max_len;  // the largest B and T of any Batch
    int num_state_rows;      // rows of stored states (--carry-state), 0: none
    int training;            // 0: no gradients and moments are allocated (generation)
    int recompute;           // 1: keep only each block's input, run its forward again in the backward pass
    int bf16;                // --precision bf16 (GPU)
    int threads;             // CPU threads
    int chunk;               // chunk length of the mLSTM kernel
    int zero;                // 1: moments only of the pieces this rank owns (shards.h)
} RunConfig;

typedef struct {
    int step;  // 1 for the first update (bias correction)
    double lr, beta1, beta2, eps, weight_decay;
    double grad_scale;  // gradients are multiplied by this first (clipping)
} UpdateConfig;

enum { KIND_WEIGHT, KIND_GRAD, KIND_M, KIND_V };  // what read_tensor / write_tensor move

typedef struct {
    const char *name;    // "cpu", "cuda"
    const char *device;  // one line for logs, e.g. "CPU, 2 threads, OpenBLAS"; valid after build()
    // Allocates everything, prints the memory plan first. Weights start at zero.
    void (*build)(const ModelConfig *config, const TensorTable *table, const RunConfig *run);
    // Adds the gradient of scale * (sum of token losses) to the gradients; returns the sum of the token losses (nats).
    double (*forward_backward)(const Batch *batch, double scale);
    // Returns the sum of the token losses; no gradients. Stored states are used only if state_row >= 0.
    double (*evaluate)(const Batch *batch);
    void (*zero_grad)(void);
    double (*grad_norm)(void);                             // L2 norm over all gradients, behind a last_of_step; NaN
                                                           // or Inf if any is
    void (*update)(const UpdateConfig *update);            // AdamW; afterwards every rank has all weights
    void (*decode_start)(void);                            // fresh states for generation, apart from all others
    void (*decode_step)(int token, float *logits);         // logits [V] (after the cap) for the next token
    void (*read_tensor)(int kind, int index, float *dst);  // tensor `index` of the table
    void (*write_tensor)(int kind, int index, const float *src);
    void (*read_state)(int row, float *dst);         // stored states of one row, laid out by model_state_table()
    void (*write_state)(int row, const float *src);  // a NULL src makes the row fresh (all zero)
    // For several ranks; all call them together. NULL in a program that runs as one rank only.
    void (*reduce_grads)(void);     // after the step's last forward_backward: sums the gradients over the world
    void (*collect)(int kind);      // every rank gets all pieces from their owners (not of moments with --zero 1)
    const Shards *(*shards)(void);  // how the flat buffer of tensors is shared out, and
    size_t (*place)(int index);     // where tensor `index` begins in it
    // Elements first .. first + count - 1 of a tensor; of moments with --zero 1 only what this rank owns.
    void (*read_part)(int kind, int index, size_t first, size_t count, float *dst);
    void (*write_part)(int kind, int index, size_t first, size_t count, const float *src);
} Backend;

// The sequence of `whole` tokens is cut into segments that differ by one token at most: where segment p of P begins.
MAYBE_UNUSED
static int segment_begin(int whole, int P, int p) { return (int)((int64_t)whole * p / P); }

#endif
