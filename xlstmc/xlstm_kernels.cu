// xlstm_kernels.cu: build/libxlstm_kernels.so, the mLSTM and sLSTM cells behind a C interface. What the functions take
// and return is in xlstm_kernels.h; here arguments are checked, workspaces laid out, and the launchers called.

#include <initializer_list>

#include "mlstm.cuh"
#include "slstm.cuh"
#include "xlstm_kernels.h"

enum { MAX_HEADS = 65535, MAX_WIDTH = 1024, WORKSPACE_ALIGNMENT = 256 };

const char *xlstm_error(int error) {
    static const char *const words[] = {"no error",
                                        "a pointer that is needed is NULL",
                                        "the format is neither XLSTM_FP32 nor XLSTM_BF16",
                                        "a size is below 1 or too large, or eps or gate_cap is negative",
                                        "a stride is shorter than its row",
                                        "a pointer is not aligned",
                                        "a CUDA call failed; see stderr"};
    return error >= 0 && error < (int)(sizeof words / sizeof *words) ? words[error] : "unknown error";
}

// The launchers end the program through die() when a CUDA call fails. A library must not: its cleanup leaves by an
// exception instead, after die() has printed its line.
struct Failure {};
static void leave_die(void) { throw Failure(); }

template <typename Work>
static int guarded(Work work) {
    die_cleanup = leave_die;
    try {
        work();
    } catch (const Failure &) {
        return XLSTM_FAILED;
    }
    return XLSTM_OK;
}

static bool is_format(int format) { return format == XLSTM_FP32 || format == XLSTM_BF16; }
static bool is_aligned(const void *p, size_t bytes) { return (uintptr_t)p % bytes == 0; }

// Calls work(F()) with F the format's type.
template <typename Work>
static int with_format(int format, Work work) {
    return guarded([&] {
        if (format == XLSTM_BF16) work(bf16());
        else work(0.0f);
    });
}

// ----------------------------------------------------------------------------------------------------------------
// mLSTM

static int mlstm_check(const MlstmProblem *p) {
    if (!p) return XLSTM_NULL_POINTER;
    if (!is_format(p->format)) return XLSTM_BAD_FORMAT;
    if (p->B < 1 || p->T < 1 || p->NH < 1 || p->dk < 1 || p->dv < 1 || p->dk > MAX_WIDTH || p->dv > MAX_WIDTH ||
        (size_t)p->B * p->NH > MAX_HEADS || !(p->eps >= 0) || !(p->gate_cap >= 0))
        return XLSTM_BAD_SHAPE;
    const size_t row = (size_t)p->NH * imax(p->dk, p->dv);
    const bool wide_enough = p->ld >= row && (!p->ld_grad || p->ld_grad >= row) && p->ld_gates >= 2 * (size_t)p->NH;
    return wide_enough ? XLSTM_OK : XLSTM_BAD_STRIDE;
}

template <typename F>
static MlstmShape mlstm_shape(const MlstmProblem *p) {
    // both strides are multiples of 8 where their bits together are
    const int chunk = mlstm_chunk<F>(p->dk, p->dv, p->ld | p->ld_grad);
    return MlstmShape{p->B, p->T, p->NH, p->dk, p->dv, p->sigmoid_gate, p->eps, chunk};
}

template <typename F>
struct MlstmWorkspace {
    MlstmSaved<F> saved;
    MlstmScratch<F> scratch;
    size_t saved_bytes, scratch_bytes;
};

template <typename F>
static MlstmWorkspace<F> mlstm_lay_out(const MlstmShape *s, bool backward, const void *saved, void *scratch) {
    MlstmWorkspace<F> w;
    Arena a = {(char *)saved, 0}, b = {(char *)scratch, 0};
    mlstm_take_saved(&a, s, &w.saved, backward);
    mlstm_take_scratch(&b, s, &w.scratch);
    w.saved_bytes = a.used, w.scratch_bytes = b.used;
    return w;
}

int mlstm_workspace(const MlstmProblem *p, size_t *saved_bytes, size_t *scratch_bytes) {
    const int error = mlstm_check(p);
    if (error) return error;
    if (!saved_bytes || !scratch_bytes) return XLSTM_NULL_POINTER;
    return with_format(p->format, [&](auto zero) {
        typedef decltype(zero) F;
        const MlstmShape s = mlstm_shape<F>(p);
        const MlstmWorkspace<F> w = mlstm_lay_out<F>(&s, p->ld_grad > 0, NULL, NULL);
        *saved_bytes = w.saved_bytes, *scratch_bytes = w.scratch_bytes;
    });
}

// What both passes read
static int mlstm_check_inputs(const MlstmProblem *p, const MlstmTensors *x, const void *saved, const void *scratch) {
    const int error = mlstm_check(p);
    if (error) return error;
    if (!x || !x->q || !x->k || !x->v || !x->gates || !x->bias || !x->doc_start || !saved || !scratch)
        return XLSTM_NULL_POINTER;
    return is_aligned(saved, WORKSPACE_ALIGNMENT) && is_aligned(scratch, WORKSPACE_ALIGNMENT) ? XLSTM_OK
                                                                                              : XLSTM_BAD_ALIGNMENT;
}

template <typename F>
static bool mlstm_pointers_aligned(const MlstmShape *s, std::initializer_list<const void *> pointers) {
    for (const void *p : pointers)
        if (!is_aligned(p, s->chunk == SCAN_CHUNK ? 16 : sizeof(F))) return false;
    return true;
}

static MlstmState mlstm_state(const MlstmShape *s, const float *at) {
    const size_t n = (size_t)s->NH * s->dk, C = n * s->dv;
    float *p = (float *)at;
    return p ? MlstmState{p, p + C, p + C + n, C + n + s->NH} : MlstmState{NULL, NULL, NULL, 0};
}

template <typename F>
static MlstmInput<F> mlstm_input(const MlstmProblem *p, const MlstmTensors *x) {
    return MlstmInput<F>{(const F *)x->q, (const F *)x->k, (const F *)x->v, p->ld,       x->gates,
                         p->ld_gates,     x->bias,         p->gate_cap,     x->doc_start};
}

int mlstm_forward(const MlstmProblem *p, const MlstmTensors *x, void *saved, void *scratch, void *stream) {
    int error = mlstm_check_inputs(p, x, saved, scratch);
    if (!error && !x->h) error = XLSTM_NULL_POINTER;
    if (error) return error;
    const int failed = with_format(p->format, [&](auto zero) {
        typedef decltype(zero) F;
        const MlstmShape s = mlstm_shape<F>(p);
        if (!mlstm_pointers_aligned<F>(&s, {x->q, x->k, x->v, x->h})) {
            error = XLSTM_BAD_ALIGNMENT;
            return;
        }
        const MlstmWorkspace<F> w = mlstm_lay_out<F>(&s, p->ld_grad > 0, saved, scratch);
        mlstm_forward<F>(s, mlstm_input<F>(p, x), mlstm_state(&s, x->initial), mlstm_state(&s, x->final), (F *)x->h,
                         &w.saved, &w.scratch, (cudaStream_t)stream);
    });
    return failed ? failed : error;
}

int mlstm_backward(const MlstmProblem *p, const MlstmTensors *x, const void *saved, void *scratch, void *stream) {
    int error = mlstm_check_inputs(p, x, saved, scratch);
    if (error) return error;
    const bool make_dot = !x->dh_dot_h && !p->sigmoid_gate;
    if (!x->grad_h || !x->grad_q || !x->grad_k || !x->grad_v || !x->grad_gates || !x->grad_bias || (make_dot && !x->h))
        return XLSTM_NULL_POINTER;
    if (!p->ld_grad || p->ld_grad_gates < 2 * (size_t)p->NH) return XLSTM_BAD_STRIDE;
    const int failed = with_format(p->format, [&](auto zero) {
        typedef decltype(zero) F;
        const MlstmShape s = mlstm_shape<F>(p);
        if (!mlstm_pointers_aligned<F>(&s, {x->q, x->k, x->v, x->grad_h, x->grad_q, x->grad_k, x->grad_v}) ||
            !is_aligned(x->grad_gates, sizeof(float)) || (make_dot && !is_aligned(x->h, sizeof(F)))) {
            error = XLSTM_BAD_ALIGNMENT;
            return;
        }
        const MlstmWorkspace<F> w = mlstm_lay_out<F>(&s, p->ld_grad > 0, saved, scratch);
        const F *grad_h = (const F *)x->grad_h;
        mlstm_backward<F>(s, mlstm_input<F>(p, x), mlstm_state(&s, x->initial), grad_h, x->dh_dot_h, (F *)x->grad_q,
                          (F *)x->grad_k, (F *)x->grad_v, p->ld_grad, x->grad_gates, p->ld_grad_gates, x->grad_bias,
                          &w.saved, &w.scratch, (cudaStream_t)stream, (const F *)x->h);
    });
    return failed ? failed : error;
}

// ----------------------------------------------------------------------------------------------------------------
// sLSTM

template <typename F>
struct SlstmWorkspace {
    SlstmSaved<F> saved;
    SlstmScratch scratch;
    float *partial;
    size_t saved_bytes, scratch_bytes;
};

template <typename F>
static SlstmWorkspace<F> slstm_lay_out(const SlstmShape *s, const void *saved, void *scratch) {
    SlstmWorkspace<F> w;
    Arena a = {(char *)saved, 0}, b = {(char *)scratch, 0};
    slstm_take_saved(&a, s, &w.saved);
    slstm_take_scratch<F>(&b, s, &w.scratch);
    w.partial = take<float>(&b, slstm_partial_size(s));
    w.saved_bytes = a.used, w.scratch_bytes = b.used;
    return w;
}

static int slstm_check(const SlstmProblem *p) {
    if (!p) return XLSTM_NULL_POINTER;
    if (!is_format(p->format)) return XLSTM_BAD_FORMAT;
    const bool fits = p->B >= 1 && p->T >= 1 && p->NH >= 1 && p->d >= 1 && p->d <= MAX_WIDTH;
    return fits && (size_t)p->B * p->NH <= MAX_HEADS ? XLSTM_OK : XLSTM_BAD_SHAPE;
}

static SlstmShape slstm_shape(const SlstmProblem *p) { return SlstmShape{p->B, p->T, p->NH, p->d}; }

static SlstmState slstm_state(const SlstmShape *s, const float *at) {
    const size_t n = (size_t)s->NH * s->d;
    float *p = (float *)at;
    return p ? SlstmState{p, p + n, p + 2 * n, p + 3 * n, 4 * n} : SlstmState{NULL, NULL, NULL, NULL, 0};
}

int slstm_workspace(const SlstmProblem *p, size_t *saved_bytes, size_t *scratch_bytes, size_t *y_prev_at) {
    const int error = slstm_check(p);
    if (error) return error;
    if (!saved_bytes || !scratch_bytes || !y_prev_at) return XLSTM_NULL_POINTER;
    return with_format(p->format, [&](auto zero) {
        typedef decltype(zero) F;
        const SlstmShape s = slstm_shape(p);
        const SlstmWorkspace<F> w = slstm_lay_out<F>(&s, NULL, NULL);
        Arena gates = {NULL, 0};  // they lie before y_prev
        take<F>(&gates, (size_t)4 * s.B * s.T * s.NH * s.d);
        *saved_bytes = w.saved_bytes, *scratch_bytes = w.scratch_bytes, *y_prev_at = gates.used;
    });
}

static int slstm_check_inputs(const SlstmProblem *p, const SlstmTensors *x, const void *saved, const void *scratch) {
    const int error = slstm_check(p);
    if (error) return error;
    if (!x || !x->R || !x->doc_start || !saved || !scratch) return XLSTM_NULL_POINTER;
    const size_t element = p->format == XLSTM_BF16 ? sizeof(bf16) : sizeof(float);
    const bool clusters = p->format == XLSTM_BF16 && p->d % 8 == 0;  // they move 16 bytes at a time
    const void *const tensors[] = {x->x, x->y, x->grad_y, x->grad_x};
    for (const void *tensor : tensors)
        if (!is_aligned(tensor, clusters ? 16 : element)) return XLSTM_BAD_ALIGNMENT;
    if (!is_aligned(x->R, element)) return XLSTM_BAD_ALIGNMENT;
    return is_aligned(saved, WORKSPACE_ALIGNMENT) && is_aligned(scratch, WORKSPACE_ALIGNMENT) ? XLSTM_OK
                                                                                              : XLSTM_BAD_ALIGNMENT;
}

int slstm_forward(const SlstmProblem *p, const SlstmTensors *x, void *saved, void *scratch, void *stream) {
    const int error = slstm_check_inputs(p, x, saved, scratch);
    if (error) return error;
    if (!x->x || !x->bias || !x->y) return XLSTM_NULL_POINTER;
    return with_format(p->format, [&](auto zero) {
        typedef decltype(zero) F;
        const SlstmShape s = slstm_shape(p);
        SlstmWorkspace<F> w = slstm_lay_out<F>(&s, saved, scratch);
        slstm_forward<F>(&s, (const F *)x->x, (const F *)x->R, x->bias, x->doc_start, slstm_state(&s, x->initial),
                         slstm_state(&s, x->final), (F *)x->y, &w.saved, &w.scratch, (cudaStream_t)stream);
    });
}

int slstm_backward(const SlstmProblem *p, const SlstmTensors *x, const void *saved, void *scratch, void *stream) {
    const int error = slstm_check_inputs(p, x, saved, scratch);
    if (error) return error;
    if (!x->grad_y || !x->grad_x || !x->grad_bias || (x->grad_final && !x->final)) return XLSTM_NULL_POINTER;
    return with_format(p->format, [&](auto zero) {
        typedef decltype(zero) F;
        const SlstmShape s = slstm_shape(p);
        SlstmWorkspace<F> w = slstm_lay_out<F>(&s, saved, scratch);
        slstm_backward<F>(&s, (const F *)x->R, &w.saved, (const F *)x->grad_y, x->doc_start,
                          slstm_state(&s, x->initial), slstm_state(&s, x->final), slstm_state(&s, x->grad_final),
                          slstm_state(&s, x->grad_initial), (F *)x->grad_x, x->grad_bias, w.partial, &w.scratch,
                          (cudaStream_t)stream);
    });
}
