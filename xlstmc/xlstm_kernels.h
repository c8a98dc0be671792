// xlstm_kernels.h: the C interface of build/libxlstm_kernels.so: the mLSTM and sLSTM cells, forward and backward, on
// device memory that the caller owns (formulas: doc/math.md 3 to 5). `make build/libxlstm_kernels.so` builds it.
//
//     MlstmProblem p = {XLSTM_BF16, B, T, NH, dk, dv, 0, 1e-6f, 0, ld, 2 * NH, ld, 2 * NH};
//     size_t saved_bytes, scratch_bytes;
//     int error = mlstm_workspace(&p, &saved_bytes, &scratch_bytes);       // then cudaMalloc saved and scratch
//     MlstmTensors x = {0};
//     x.q = q, x.k = k, x.v = v, x.gates = gates, x.bias = bias, x.doc_start = doc_start, x.h = h;
//     error = mlstm_forward(&p, &x, saved, scratch, stream);
//     x.grad_h = grad_h, x.grad_q = ...
//     error = mlstm_backward(&p, &x, saved, scratch, stream);
//
// All calls. Pointers are to memory of the current device, unless said otherwise; "F" is the format of the problem.
// Strides (ld...) are in elements, from a token's row to the next, over the end of a sequence too.
// Work is queued on `stream` (a cudaStream_t, NULL: the default one) and nothing waits for it; a call allocates nothing
// and may be captured in a CUDA graph once mlstm_workspace or slstm_workspace has run outside of one. Same inputs, same
// bits. `saved` carries from a forward to its backward call and is read-only there; `scratch` holds nothing between
// calls and may serve all calls of one stream. Both are aligned to 256 bytes. One process uses GPUs of one kind only.
//
// All functions return XLSTM_OK or what is wrong with the arguments; then nothing has been queued. XLSTM_FAILED: a CUDA
// call failed, one line on stderr says which.
#ifndef XLSTMC_XLSTM_KERNELS_H
#define XLSTMC_XLSTM_KERNELS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif
#define XLSTM_API __attribute__((visibility("default")))

enum { XLSTM_FP32, XLSTM_BF16 };  // formats
enum {
    XLSTM_OK,
    XLSTM_NULL_POINTER,   // a pointer that is needed is NULL
    XLSTM_BAD_FORMAT,     // not one of the formats
    XLSTM_BAD_SHAPE,      // a size below 1, heads wider than 1024, B * NH above 65535; eps or gate_cap negative
    XLSTM_BAD_STRIDE,     // a stride is shorter than its row
    XLSTM_BAD_ALIGNMENT,  // of a pointer, see below
    XLSTM_FAILED
};

// What an error code means, in words; never NULL. Host memory that stays.
XLSTM_API const char *xlstm_error(int error);

// ----------------------------------------------------------------------------------------------------------------
// mLSTM

typedef struct {
    int format;            // F: of q, k, v, h and their gradients
    int B, T, NH, dk, dv;  // sequences, tokens each, heads, width of a head's q and k, of its v and h
    int sigmoid_gate;      // 0: exponential input gate, h is normalised; 1: sigmoid input gate, h is not
    float eps;             // added to the normaliser
    float gate_cap;        // c: a gate is c tanh((gates + bias) / c); 0: gates + bias
    size_t ld;             // of q, k and v, at least NH * dk and NH * dv: three parts of one matrix, as a rule
    size_t ld_gates;       // at least 2 NH
    size_t ld_grad;        // of grad_q, grad_k and grad_v, as ld; 0: no backward call follows, less is saved
    size_t ld_grad_gates;  // at least 2 NH; without a backward call: anything
} MlstmProblem;

// F pointers are aligned to an element, to 16 bytes where format, dk, dv, ld and ld_grad allow the kernels for Hopper:
// bf16, multiples of 8, dk <= 256, dv <= 512. Any 16-byte-aligned F pointers are right everywhere.
typedef struct {
    const void *q, *k, *v;  // F [B, T, NH, dk], the same, [B, T, NH, dv]; token stride ld
    const float *gates;     // [B, T, 2 NH], stride ld_gates: pre-activations, input gates of all heads, forget gates
    const float *bias;      // [2 NH] added to them
    const int *doc_start;   // [B, T] where the token's document begins in its sequence; negative: before it
    const float *initial;   // [B, NH dk dv + NH dk + NH]: C [NH, dk, dv], n [NH, dk], m [NH]; NULL: zeros
    float *final;           // the same after the last token; NULL: not wanted. Apart from `initial`
    void *h;                // F [B, T, NH, dv]
    const void *grad_h;     // F [B, T, NH, dv]
    const float *dh_dot_h;  // [B, T, NH] the sums of grad_h * h over dv; NULL: computed from h
    void *grad_q, *grad_k;  // F [B, T, NH, dk], stride ld_grad
    void *grad_v;           // F [B, T, NH, dv], stride ld_grad
    float *grad_gates;      // [B, T, 2 NH], stride ld_grad_gates: of the pre-activations
    float *grad_bias;       // [2 NH]; the gradient is added to it
} MlstmTensors;

// Bytes of `saved` and `scratch` for the calls below, in host memory.
XLSTM_API int mlstm_workspace(const MlstmProblem *p, size_t *saved_bytes, size_t *scratch_bytes);

// Reads q .. initial, writes h, final and saved.
XLSTM_API int mlstm_forward(const MlstmProblem *p, const MlstmTensors *x, void *saved, void *scratch, void *stream);

// Reads q .. initial as the forward call did, grad_h, dh_dot_h (or h; neither with the sigmoid gate), saved; writes the
// gradients (exact, also through the normaliser), adds to grad_bias. No gradient comes in through `final`, none leaves
// through `initial`.
XLSTM_API int mlstm_backward(const MlstmProblem *p, const MlstmTensors *x, const void *saved, void *scratch,
                             void *stream);

// ----------------------------------------------------------------------------------------------------------------
// sLSTM

typedef struct {
    int format;       // F: of x, R, y and their gradients
    int B, T, NH, d;  // sequences, tokens each, heads, units of a head
} SlstmProblem;

// F pointers are aligned to an element; in bf16 with d a multiple of 8 all but R to 16 bytes. Gates in the order i, f,
// z, o.
typedef struct {
    const void *x;         // F [B, T, NH, 4, d] pre-activations of the gates, without bias and recurrence
    const void *R;         // F [NH, d, 4, d] recurrent weights: from unit, gate, to unit
    const float *bias;     // [NH, 4, d]
    const int *doc_start;  // [B, T] as above
    const float *initial;  // [B, 4, NH, d]: y, c, n, m; NULL: zeros
    float *final;          // the same after the last token; NULL: not wanted. May be `initial`
    void *y;               // F [B, T, NH, d]
    const void *grad_y;    // F [B, T, NH, d]
    void *grad_x;          // F [B, T, NH, 4, d]
    float *grad_bias;      // [NH, 4, d]; the gradient is added to it
    const float *grad_final;  // [B, 4, NH, d]: of final y, c, n at fixed m (what stands for m is not read); NULL: zeros
    float *grad_initial;      // the same of `initial`, and of its m; NULL: not wanted
} SlstmTensors;

// Bytes as for the mLSTM. y_prev_at bytes into `saved` the forward call leaves y_prev, F [B, T, NH, d]: the output that
// entered each step. The gradient of R is y_prev^T grad_x, a matrix product that is left to the caller.
XLSTM_API int slstm_workspace(const SlstmProblem *p, size_t *saved_bytes, size_t *scratch_bytes, size_t *y_prev_at);

// Reads x .. initial, writes y, final and saved. Takes the whole GPU: all blocks of a layer must run at once.
XLSTM_API int slstm_forward(const SlstmProblem *p, const SlstmTensors *x, void *saved, void *scratch, void *stream);

// Reads R, doc_start, initial and, with grad_final, final (neither overwritten since), grad_y, grad_final, saved;
// writes grad_x, grad_initial, adds to grad_bias.
XLSTM_API int slstm_backward(const SlstmProblem *p, const SlstmTensors *x, const void *saved, void *scratch,
                             void *stream);

#ifdef __cplusplus
}
#endif
#endif
