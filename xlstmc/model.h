// model.h: what a model is: its configuration, the presets, and the one table of all its tensors.
// Parameters, gradients, moments, checkpoints, dumps and tests walk that table; nothing else lists tensors.
// Names, shapes and layouts are those of doc/checkpoint.md; initial values and decay rules those of the papers
// (xLSTM arXiv 2405.04517, xLSTM 7B arXiv 2503.13427) and their authors' code.
#ifndef XLSTMC_MODEL_H
#define XLSTMC_MODEL_H

#include <math.h>

#include "rng.h"
#include "util.h"

// ----------------------------------------------------------------------------------------------------------------
// Configuration

enum { MAX_BLOCKS = 1024 };
typedef enum { BLOCK_MLSTM, BLOCK_MLSTM_V1, BLOCK_SLSTM, NUM_BLOCK_TYPES } BlockType;
static const char *const block_type_names[NUM_BLOCK_TYPES] = {"mlstm", "mlstm_v1", "slstm"};

typedef struct {
    int vocab_size;         // V
    int hidden_size;        // D
    int num_blocks;         // N
    int num_heads;          // NH, for every block type
    int ffn_dim;            // U, FFN width of mlstm blocks
    int chunk_size;         // chunk length of the mLSTM kernel
    int sigmoid_gate;       // input gate of mlstm and mlstm_v1: 0 exponential, 1 sigmoid (no normaliser)
    int layernorm_out;      // final norm: 0 RMSNorm (scale w), 1 LayerNorm (scale 1+w, eps 1e-5)
    double qk_dim_factor;   // Dk = int(D * qk_dim_factor)
    double v_dim_factor;    // Dv = int(D * v_dim_factor)
    double norm_eps;        // norms of mlstm blocks and RMSNorm at the end
    double eps;             // added to the denominator of the mLSTM cell
    double gate_soft_cap;   // of the gates of mlstm blocks; mlstm_v1 has none
    double logit_soft_cap;  // 0: none
    unsigned char block_types[MAX_BLOCKS];
} ModelConfig;

// Sizes that tensor shapes are made of.
typedef enum {
    DIM_NONE,
    DIM_ONE,
    DIM_FOUR,
    DIM_V,
    DIM_D,
    DIM_DK,
    DIM_DV,
    DIM_NH,
    DIM_U,
    DIM_I,
    DIM_2I,
    DIM_3I,
    DIM_I_BY_4,
    DIM_US,
    DIM_2US,
    DIM_HEAD,
    DIM_4HEAD,
    DIM_4D
} Dim;

static int round_up(double x, int multiple) { return multiple * (int)ceil(x / multiple); }

static int model_dim(const ModelConfig *c, Dim dim) {
    int inner = 64 * ((2 * c->hidden_size + 63) / 64);         // I: width of mlstm_v1
    int slstm_ffn = 64 * ((13 * c->hidden_size + 639) / 640);  // Us = 64 * ceil(1.3 D / 64), in integers
    switch (dim) {
        case DIM_NONE: return 0;
        case DIM_ONE: return 1;
        case DIM_FOUR: return 4;
        case DIM_V: return c->vocab_size;
        case DIM_D: return c->hidden_size;
        case DIM_DK: return (int)(c->hidden_size * c->qk_dim_factor);
        case DIM_DV: return (int)(c->hidden_size * c->v_dim_factor);
        case DIM_NH: return c->num_heads;
        case DIM_U: return c->ffn_dim;
        case DIM_I: return inner;
        case DIM_2I: return 2 * inner;
        case DIM_3I: return 3 * inner;
        case DIM_I_BY_4: return inner / 4;
        case DIM_US: return slstm_ffn;
        case DIM_2US: return 2 * slstm_ffn;
        case DIM_HEAD: return c->hidden_size / c->num_heads;
        case DIM_4HEAD: return 4 * (c->hidden_size / c->num_heads);
        case DIM_4D: return 4 * c->hidden_size;
    }
    return 0;
}

static int model_default_ffn(int hidden_size) { return round_up(2.667 * hidden_size, 64); }

// What --blocks models share: the shell of the xLSTM 7B family.
static void model_defaults(ModelConfig *c) {
    memset(c, 0, sizeof *c);
    c->chunk_size = 64;
    c->qk_dim_factor = 0.5;
    c->v_dim_factor = 1.0;
    c->norm_eps = 1e-6;
    c->eps = 1e-6;
    c->gate_soft_cap = 15;
    c->logit_soft_cap = 30;
}

static int model_has(const ModelConfig *c, BlockType type) {
    for (int b = 0; b < c->num_blocks; b++)
        if (c->block_types[b] == type) return 1;
    return 0;
}

// ----------------------------------------------------------------------------------------------------------------
// Tensor declarations, one list a block type. The enum names a tensor's place in the list. Tensors that are read by
// the same matmul stand next to each other, so that it is one matmul: q, k, v, ogate, igate, fgate; gate and up.

typedef enum {
    INIT_ZERO,
    INIT_ONE,
    INIT_SMALL,      // normal, std sqrt(2/(5D))
    INIT_OUT,        // normal, std (2/N)/sqrt(D): projections back to the residual, D whatever the fan-in
    INIT_CONV,       // uniform in +-1/2 (torch's default for a fan-in of 4)
    INIT_IGATE_10,   // constant -10: input gates start closed
    INIT_IGATE_V1,   // normal, std 0.1
    INIT_FGATE,      // linspace(3, 6, NH), both ends
    INIT_SLSTM_BIAS  // [NH, 4, d]: i, z, o zero; f falls from 5 to -7 along the head, more steeply in deeper blocks
} Init;

typedef struct {
    const char *name;
    Dim shape[3];
    int decay;  // 1: weight decay applies
    Init init;
} TensorDecl;

enum { SHELL_EMBEDDING, SHELL_OUT_NORM, SHELL_HEAD, NUM_SHELL };
static const TensorDecl shell_tensors[] = {
    {"backbone.embeddings.weight", {DIM_V, DIM_D}, 0, INIT_SMALL},
    {"backbone.out_norm.weight", {DIM_D}, 0, INIT_ONE},  // zero for LayerNorm, whose scale is 1 + w
    {"lm_head.weight", {DIM_V, DIM_D}, 1, INIT_SMALL},
};

enum {
    M_NORM,
    M_Q,
    M_K,
    M_V,
    M_OGATE,
    M_IGATE,
    M_FGATE,
    M_IGATE_BIAS,
    M_FGATE_BIAS,
    M_HEAD_NORM,
    M_OUT_PROJ,
    M_NORM_FFN,
    M_FFN_GATE,
    M_FFN_UP,
    M_FFN_DOWN,
    NUM_MLSTM
};
static const TensorDecl mlstm_tensors[] = {
    {"norm_mlstm.weight", {DIM_D}, 0, INIT_ONE},
    {"mlstm_layer.q.weight", {DIM_DK, DIM_D}, 1, INIT_SMALL},
    {"mlstm_layer.k.weight", {DIM_DK, DIM_D}, 1, INIT_SMALL},
    {"mlstm_layer.v.weight", {DIM_DV, DIM_D}, 1, INIT_SMALL},
    {"mlstm_layer.ogate_preact.weight", {DIM_DV, DIM_D}, 1, INIT_ZERO},
    {"mlstm_layer.igate_preact.weight", {DIM_NH, DIM_D}, 1, INIT_ZERO},
    {"mlstm_layer.fgate_preact.weight", {DIM_NH, DIM_D}, 1, INIT_ZERO},
    {"mlstm_layer.igate_preact.bias", {DIM_NH}, 0, INIT_IGATE_10},
    {"mlstm_layer.fgate_preact.bias", {DIM_NH}, 0, INIT_FGATE},
    {"mlstm_layer.multihead_norm.weight", {DIM_DV}, 0, INIT_ONE},
    {"mlstm_layer.out_proj.weight", {DIM_D, DIM_DV}, 1, INIT_OUT},
    {"norm_ffn.weight", {DIM_D}, 0, INIT_ONE},
    {"ffn.proj_up_gate.weight", {DIM_U, DIM_D}, 1, INIT_SMALL},
    {"ffn.proj_up.weight", {DIM_U, DIM_D}, 1, INIT_SMALL},
    {"ffn.proj_down.weight", {DIM_D, DIM_U}, 1, INIT_OUT},
};

enum {
    V1_NORM,
    V1_UP,
    V1_CONV,
    V1_CONV_BIAS,
    V1_Q,
    V1_K,
    V1_V,
    V1_IGATE,
    V1_FGATE,
    V1_IGATE_BIAS,
    V1_FGATE_BIAS,
    V1_HEAD_NORM,
    V1_SKIP,
    V1_DOWN,
    NUM_MLSTM_V1
};
static const TensorDecl mlstm_v1_tensors[] = {
    {"xlstm_norm.weight", {DIM_D}, 0, INIT_ZERO},
    {"xlstm.proj_up.weight", {DIM_2I, DIM_D}, 1, INIT_SMALL},
    {"xlstm.conv1d.conv.weight", {DIM_I, DIM_ONE, DIM_FOUR}, 1, INIT_CONV},
    {"xlstm.conv1d.conv.bias", {DIM_I}, 0, INIT_CONV},
    {"xlstm.q_proj.weight", {DIM_I_BY_4, DIM_FOUR, DIM_FOUR}, 1, INIT_SMALL},
    {"xlstm.k_proj.weight", {DIM_I_BY_4, DIM_FOUR, DIM_FOUR}, 1, INIT_SMALL},
    {"xlstm.v_proj.weight", {DIM_I_BY_4, DIM_FOUR, DIM_FOUR}, 1, INIT_SMALL},
    {"xlstm.mlstm_cell.igate.weight", {DIM_NH, DIM_3I}, 1, INIT_ZERO},
    {"xlstm.mlstm_cell.fgate.weight", {DIM_NH, DIM_3I}, 1, INIT_ZERO},
    {"xlstm.mlstm_cell.igate.bias", {DIM_NH}, 0, INIT_IGATE_V1},
    {"xlstm.mlstm_cell.fgate.bias", {DIM_NH}, 0, INIT_FGATE},
    {"xlstm.mlstm_cell.outnorm.weight", {DIM_I}, 0, INIT_ZERO},
    {"xlstm.learnable_skip", {DIM_I}, 0, INIT_ONE},
    {"xlstm.proj_down.weight", {DIM_D, DIM_I}, 1, INIT_OUT},
};

// The authors' package feeds the input gate from the module it calls fgate and the forget gate from igate; the names
// in the file are theirs, the enum says what the tensor does.
enum {
    S_NORM,
    S_CONV,
    S_CONV_BIAS,
    S_IGATE,
    S_FGATE,
    S_ZGATE,
    S_OGATE,
    S_RECURRENT,
    S_BIAS,
    S_GROUP_NORM,
    S_NORM_FFN,
    S_FFN_UP,
    S_FFN_DOWN,
    NUM_SLSTM
};
static const TensorDecl slstm_tensors[] = {
    {"xlstm_norm.weight", {DIM_D}, 0, INIT_ZERO},
    {"xlstm.conv1d.conv.weight", {DIM_D, DIM_ONE, DIM_FOUR}, 1, INIT_CONV},
    {"xlstm.conv1d.conv.bias", {DIM_D}, 0, INIT_CONV},
    {"xlstm.fgate.weight", {DIM_NH, DIM_HEAD, DIM_HEAD}, 1, INIT_SMALL},
    {"xlstm.igate.weight", {DIM_NH, DIM_HEAD, DIM_HEAD}, 1, INIT_SMALL},
    {"xlstm.zgate.weight", {DIM_NH, DIM_HEAD, DIM_HEAD}, 1, INIT_SMALL},
    {"xlstm.ogate.weight", {DIM_NH, DIM_HEAD, DIM_HEAD}, 1, INIT_SMALL},
    {"xlstm.slstm_cell._recurrent_kernel_", {DIM_NH, DIM_HEAD, DIM_4HEAD}, 0, INIT_ZERO},
    {"xlstm.slstm_cell._bias_", {DIM_4D}, 0, INIT_SLSTM_BIAS},
    {"xlstm.group_norm.weight", {DIM_D}, 0, INIT_ZERO},
    {"ffn_norm.weight", {DIM_D}, 0, INIT_ZERO},
    {"ffn.proj_up.weight", {DIM_2US, DIM_D}, 1, INIT_SMALL},
    {"ffn.proj_down.weight", {DIM_D, DIM_US}, 1, INIT_OUT},
};

// The states that a block carries from token to token, one sequence.
enum { STATE_C, STATE_N, STATE_M, STATE_CONV, NUM_MLSTM_STATES = STATE_CONV, NUM_MLSTM_V1_STATES = STATE_CONV + 1 };
enum { STATE_SY, STATE_SC, STATE_SN, STATE_SM, STATE_SCONV, NUM_SLSTM_STATES };

// ----------------------------------------------------------------------------------------------------------------
// The table

typedef struct {
    char name[96];
    int ndim;
    int shape[4];
    size_t count;   // elements
    size_t offset;  // of the first element in a flat buffer that holds all tensors in table order, without gaps
    int block;      // -1: shell
    int decay;
    Init init;
} TensorSpec;

typedef struct {
    int num_tensors;
    size_t total;  // elements
    TensorSpec *tensors;
    int block_first[MAX_BLOCKS];  // index of a block's first tensor
    int shell[NUM_SHELL];         // indices of the shell's tensors
} TensorTable;

typedef struct {
    const TensorDecl *tensors;
    int num_tensors;
} BlockDecl;

static BlockDecl block_decl(BlockType type) {
    BlockDecl decl[NUM_BLOCK_TYPES] = {
        {mlstm_tensors, NUM_MLSTM}, {mlstm_v1_tensors, NUM_MLSTM_V1}, {slstm_tensors, NUM_SLSTM}};
    return decl[type];
}

static int table_add(TensorTable *t, const char *name, int block, int ndim, const int *shape) {
    TensorSpec *s = &t->tensors[t->num_tensors];
    if (block < 0) format_into(s->name, sizeof s->name, "%s", name);
    else format_into(s->name, sizeof s->name, "backbone.blocks.%d.%s", block, name);
    s->ndim = ndim;
    s->count = 1;
    for (int k = 0; k < ndim; k++) {
        s->shape[k] = shape[k];
        s->count *= (size_t)shape[k];
    }
    s->offset = t->total;
    s->block = block;
    t->total += s->count;
    return t->num_tensors++;
}

static int table_add_decl(TensorTable *t, const ModelConfig *c, const TensorDecl *d, int block) {
    int shape[3], ndim = 0;
    while (ndim < 3 && d->shape[ndim] != DIM_NONE) {
        shape[ndim] = model_dim(c, d->shape[ndim]);
        ndim++;
    }
    int index = table_add(t, d->name, block, ndim, shape);
    t->tensors[index].decay = d->decay;
    t->tensors[index].init = d->init;
    return index;
}

// All parameters of the model. Release with table_free().
static TensorTable model_table(const ModelConfig *c) {
    TensorTable t;
    memset(&t, 0, sizeof t);
    t.tensors = (TensorSpec *)xcalloc((size_t)(NUM_SHELL + 15 * c->num_blocks), sizeof(TensorSpec));
    t.shell[SHELL_EMBEDDING] = table_add_decl(&t, c, &shell_tensors[SHELL_EMBEDDING], -1);
    for (int b = 0; b < c->num_blocks; b++) {
        BlockDecl decl = block_decl((BlockType)c->block_types[b]);
        t.block_first[b] = t.num_tensors;
        for (int k = 0; k < decl.num_tensors; k++) table_add_decl(&t, c, &decl.tensors[k], b);
    }
    t.shell[SHELL_OUT_NORM] = table_add_decl(&t, c, &shell_tensors[SHELL_OUT_NORM], -1);
    if (c->layernorm_out) t.tensors[t.shell[SHELL_OUT_NORM]].init = INIT_ZERO;
    t.shell[SHELL_HEAD] = table_add_decl(&t, c, &shell_tensors[SHELL_HEAD], -1);
    return t;
}

// The states of one sequence, in the same form: names like backbone.blocks.0.C. All start at zero.
MAYBE_UNUSED
static TensorTable model_state_table(const ModelConfig *c) {
    TensorTable t;
    memset(&t, 0, sizeof t);
    t.tensors = (TensorSpec *)xcalloc((size_t)(1 + 5 * c->num_blocks), sizeof(TensorSpec));
    for (int b = 0; b < c->num_blocks; b++) {
        int heads = c->num_heads;
        t.block_first[b] = t.num_tensors;
        if (c->block_types[b] == BLOCK_SLSTM) {
            int shape[1] = {c->hidden_size}, conv[2] = {3, c->hidden_size};
            table_add(&t, "y", b, 1, shape);
            table_add(&t, "c", b, 1, shape);
            table_add(&t, "n", b, 1, shape);
            table_add(&t, "m", b, 1, shape);
            table_add(&t, "conv", b, 2, conv);  // the last three inputs, oldest first
        } else {
            int v1 = c->block_types[b] == BLOCK_MLSTM_V1;
            int dk = model_dim(c, v1 ? DIM_I : DIM_DK) / heads, dv = model_dim(c, v1 ? DIM_I : DIM_DV) / heads;
            int shape_C[3] = {heads, dk, dv}, shape_n[2] = {heads, dk}, shape_m[1] = {heads};
            int conv[2] = {3, model_dim(c, DIM_I)};
            table_add(&t, "C", b, 3, shape_C);
            table_add(&t, "n", b, 2, shape_n);
            table_add(&t, "m", b, 1, shape_m);
            if (v1) table_add(&t, "conv", b, 2, conv);
        }
    }
    return t;
}

MAYBE_UNUSED
static void table_free(TensorTable *t) {
    free(t->tensors);
    memset(t, 0, sizeof *t);
}

MAYBE_UNUSED
static int table_find(const TensorTable *t, const char *name) {  // index, or -1
    for (int k = 0; k < t->num_tensors; k++)
        if (strcmp(t->tensors[k].name, name) == 0) return k;
    return -1;
}

// ----------------------------------------------------------------------------------------------------------------
// Initial values: a pure function of (seed, tensor, element)

MAYBE_UNUSED
static void tensor_init(const ModelConfig *c, const TensorTable *t, int index, uint64_t seed, float *dst) {
    const TensorSpec *s = &t->tensors[index];
    double width = c->hidden_size;
    double small_std = sqrt(2.0 / (5.0 * width)), out_std = 2.0 / c->num_blocks / sqrt(width);
    int heads = c->num_heads, d = c->hidden_size / heads;
    double depth = c->num_blocks > 1 ? (double)s->block / (c->num_blocks - 1) : 0.0;
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (size_t k = 0; k < s->count; k++) {
        double value = 0.0;
        switch (s->init) {
            case INIT_ZERO: break;
            case INIT_ONE: value = 1.0; break;
            case INIT_SMALL: value = small_std * rng_normal(seed, RNG_INIT, (uint64_t)index, k); break;
            case INIT_OUT: value = out_std * rng_normal(seed, RNG_INIT, (uint64_t)index, k); break;
            case INIT_CONV: value = rng_uniform(seed, RNG_INIT, (uint64_t)index, k) - 0.5; break;
            case INIT_IGATE_10: value = -10.0; break;
            case INIT_IGATE_V1: value = 0.1 * rng_normal(seed, RNG_INIT, (uint64_t)index, k); break;
            case INIT_FGATE: value = heads > 1 ? 3.0 + 3.0 * (double)k / (heads - 1) : 3.0; break;
            case INIT_SLSTM_BIAS: {
                int gate = (int)(k / (size_t)d) % 4, j = (int)(k % (size_t)d);
                double along = d > 1 ? (double)j / (d - 1) : 0.0;
                if (gate == 1) value = 5.0 - 12.0 * pow(along, 0.3 + 1.3 * depth);
                break;
            }
        }
        dst[k] = (float)value;
    }
}

// ----------------------------------------------------------------------------------------------------------------
// Presets

typedef struct {
    const char *name;
    int vocab, width, blocks, heads;
    const char *slstm_at;  // comma-separated positions of slstm blocks; NULL: mlstm family, "": mlstm_v1 only
} Preset;

#define V1_7TO1_DEEP "3,5,7,40,42,44"
static const Preset presets[] = {
    {"demo", 256, 128, 4, 4, NULL},      {"114m", 50304, 640, 10, 5, NULL},
    {"164m", 50304, 768, 12, 6, NULL},   {"207m", 50304, 896, 12, 7, NULL},
    {"406m", 50304, 1024, 24, 4, NULL},  {"841m", 50304, 1536, 24, 6, NULL},
    {"1.4b", 50304, 2048, 24, 8, NULL},  {"7b", 50304, 4096, 32, 8, NULL},
    {"v1-125m", 50304, 768, 24, 4, ""},  {"v1-125m-7to1", 50304, 768, 24, 4, "3,20"},
    {"v1-350m", 50304, 1024, 48, 4, ""}, {"v1-350m-7to1", 50304, 1024, 48, 4, V1_7TO1_DEEP},
    {"v1-760m", 50304, 1536, 48, 4, ""}, {"v1-760m-7to1", 50304, 1536, 48, 4, V1_7TO1_DEEP},
    {"v1-1.3b", 50304, 2048, 48, 4, ""}, {"v1-1.3b-7to1", 50304, 2048, 48, 4, V1_7TO1_DEEP},
};
enum { NUM_PRESETS = sizeof presets / sizeof presets[0] };

// Fills the configuration of a preset; 0 if there is none of that name.
MAYBE_UNUSED
static int model_preset(const char *name, ModelConfig *c) {
    for (int k = 0; k < NUM_PRESETS; k++) {
        const Preset *p = &presets[k];
        if (strcmp(p->name, name) != 0) continue;
        model_defaults(c);
        c->vocab_size = p->vocab;
        c->hidden_size = p->width;
        c->num_blocks = p->blocks;
        c->num_heads = p->heads;
        c->ffn_dim = model_default_ffn(p->width);
        if (p->slstm_at) {
            c->layernorm_out = 1;
            c->logit_soft_cap = 0;
            memset(c->block_types, BLOCK_MLSTM_V1, (size_t)p->blocks);
            for (const char *at = p->slstm_at; *at;) {
                char *end;
                c->block_types[strtol(at, &end, 10)] = BLOCK_SLSTM;
                at = *end ? end + 1 : end;
            }
        }
        return 1;
    }
    return 0;
}

// Reads a block list: TYPE[*N] or (LIST)*N, comma-separated, N >= 1. Appends to *count blocks; returns where the
// list ends, or NULL and a reason in `why`.
static const char *parse_block_list(const char *s, unsigned char *types, int *count, int depth, char *why,
                                    size_t why_size) {
    if (depth > 16) {
        snprintf(why, why_size, "more than 16 levels of '('");
        return NULL;
    }
    for (;;) {
        int first = *count, repeat = 1;
        if (*s == '(') {
            s = parse_block_list(s + 1, types, count, depth + 1, why, why_size);
            if (!s) return NULL;
            if (*s != ')') {
                snprintf(why, why_size, "a ')' is missing");
                return NULL;
            }
            s++;
        } else {
            size_t len = strcspn(s, ",*()");
            int type = 0;
            while (type < NUM_BLOCK_TYPES &&
                   !(strlen(block_type_names[type]) == len && strncmp(block_type_names[type], s, len) == 0))
                type++;
            if (type == NUM_BLOCK_TYPES) {
                snprintf(why, why_size, "unknown block type '%.*s' (mlstm, mlstm_v1, slstm)",
                         (int)(len > 40 ? 40 : len), s);
                return NULL;
            }
            if (*count >= MAX_BLOCKS) {
                snprintf(why, why_size, "more than %d blocks", MAX_BLOCKS);
                return NULL;
            }
            types[(*count)++] = (unsigned char)type;
            s += len;
        }
        if (*s == '*') {
            char *end;
            long n = s[1] >= '0' && s[1] <= '9' ? strtol(s + 1, &end, 10) : 0;
            if (n < 1) {
                snprintf(why, why_size, "a repeat count of 1 or more must follow '*'");
                return NULL;
            }
            int length = *count - first;
            if (n > MAX_BLOCKS || first + n * length > MAX_BLOCKS) {
                snprintf(why, why_size, "more than %d blocks", MAX_BLOCKS);
                return NULL;
            }
            repeat = (int)n;
            for (int k = length; k < repeat * length; k++) types[first + k] = types[first + k - length];
            *count = first + repeat * length;
            s = end;
        }
        if (*s != ',') return s;
        s++;
    }
}

// --blocks: fills block_types and num_blocks; 0 and a reason in `why` if the text is not a block list.
MAYBE_UNUSED
static int model_parse_blocks(const char *text, ModelConfig *c, char *why, size_t why_size) {
    int count = 0;
    const char *end = parse_block_list(text, c->block_types, &count, 0, why, why_size);
    if (!end) return 0;
    if (*end) {
        snprintf(why, why_size, "unexpected '%.20s'", end);
        return 0;
    }
    c->num_blocks = count;
    return 1;
}

// ----------------------------------------------------------------------------------------------------------------
// Checks and figures

// 1 if the sizes make a model; else 0 and one line in `why` that names the flag.
MAYBE_UNUSED
static int model_check(const ModelConfig *c, char *why, size_t why_size) {
    struct {
        const char *what;
        int value, low, high;
    } limits[] = {{"--vocab", c->vocab_size, 2, 1 << 24}, {"--dim", c->hidden_size, 1, 1 << 16},
                  {"--heads", c->num_heads, 1, 1 << 12},  {"--blocks", c->num_blocks, 1, MAX_BLOCKS},
                  {"--ffn", c->ffn_dim, 1, 1 << 18},      {"--chunk", c->chunk_size, 1, 1 << 20}};
    for (size_t k = 0; k < sizeof limits / sizeof limits[0]; k++)
        if (limits[k].value < limits[k].low || limits[k].value > limits[k].high) {
            snprintf(why, why_size, "%s %d is not in %d .. %d", limits[k].what, limits[k].value, limits[k].low,
                     limits[k].high);
            return 0;
        }
    struct {
        BlockType type;
        Dim dim;
        const char *what;
    } widths[] = {{BLOCK_MLSTM, DIM_DK, "q/k width"},
                  {BLOCK_MLSTM, DIM_DV, "v width"},
                  {BLOCK_MLSTM_V1, DIM_I, "inner width"},
                  {BLOCK_SLSTM, DIM_D, "--dim"}};
    for (size_t k = 0; k < sizeof widths / sizeof widths[0]; k++) {
        int width = model_dim(c, widths[k].dim);
        if (!model_has(c, widths[k].type)) continue;
        if (width >= c->num_heads && width % c->num_heads == 0) continue;
        snprintf(why, why_size, "--heads %d does not divide the %s %d of %s blocks; choose another --heads or --dim",
                 c->num_heads, widths[k].what, width, block_type_names[widths[k].type]);
        return 0;
    }
    return 1;
}

// Floating-point operations of training on one token: 6 a matmul weight, and the mLSTM cell at chunk length L
// (forward 4 dk dv + 2 L/2 (dk + dv) a head, times 3.47 with its backward; MATH: doc/math.md).
MAYBE_UNUSED
static double model_flops_per_token(const ModelConfig *c, const TensorTable *t) {
    double weights = (double)t->total - (double)c->vocab_size * c->hidden_size, cell = 0;
    for (int b = 0; b < c->num_blocks; b++) {
        if (c->block_types[b] == BLOCK_SLSTM) continue;
        int v1 = c->block_types[b] == BLOCK_MLSTM_V1;
        double dk = (double)model_dim(c, v1 ? DIM_I : DIM_DK) / c->num_heads,
               dv = (double)model_dim(c, v1 ? DIM_I : DIM_DV) / c->num_heads;
        cell += c->num_heads * (4 * dk * dv + c->chunk_size * (dk + dv));
    }
    return 6 * weights + 3.47 * cell;
}

#endif
