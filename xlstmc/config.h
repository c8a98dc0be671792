// config.h: config.json of a model: Hugging Face's keys of model type xlstm, and block_types, mlstm_input_gate and
// out_norm_type for what Hugging Face's class does not have. doc/checkpoint.md lists the keys.
//
// Functions with `why` return 0, or an exit code (EXIT_USAGE, EXIT_DAMAGED) and one line in `why` that names the file
// and says what to do.
#ifndef XLSTMC_CONFIG_H
#define XLSTMC_CONFIG_H

#include "json.h"         // Json, JsonWriter
#include "model.h"        // ModelConfig
#include "safetensors.h"  // file_read_text, explain

enum { MAX_CONFIG_BYTES = 1 << 20, MAX_PATH = 4096 };

// DIR/NAME; 0, or EXIT_USAGE if that is longer than a path can be.
static int path_join(char dst[MAX_PATH], const char *dir, const char *name, char *why, size_t why_size) {
    if (snprintf(dst, MAX_PATH, "%s/%s", dir, name) < MAX_PATH) return 0;
    return explain(EXIT_USAGE, why, why_size, "path too long: %.80s...", dir);
}

typedef struct {
    const Json *root;
    const char *path;
    char *why;
    size_t why_size;
    int code;  // of the first error
} ConfigReader;

// Keeps the first error. EXIT_DAMAGED: not what such a file can say; EXIT_USAGE: a model that we do not have.
PRINTF_LIKE(3, 4)
static void config_error(ConfigReader *r, int code, const char *fmt, ...) {
    char reason[400];
    va_list args;
    if (r->code) return;
    va_start(args, fmt);
    vsnprintf(reason, sizeof reason, fmt, args);
    va_end(args);
    r->code = explain(code, r->why, r->why_size, "%s: %s; %s", r->path, reason,
                      code == EXIT_DAMAGED ? "correct it or get it again" : "use another model");
}

static const Json *config_get(ConfigReader *r, const char *key) {  // NULL if absent or null
    const Json *v = json_get(r->root, key);
    return v && v->type != JSON_NULL ? v : NULL;
}

static int config_int(ConfigReader *r, const char *key, int low, int high, int missing) {
    int64_t value = missing;
    const Json *v = config_get(r, key);
    if (v && !json_get_int(v, low, high, &value))
        config_error(r, EXIT_DAMAGED, "key '%s' must be an integer from %d to %d", key, low, high);
    return (int)value;
}

// A size that Hugging Face writes under two names: both must agree, one must be there.
static int config_size(ConfigReader *r, const char *key, const char *alias, int high) {
    int value = config_int(r, key, 1, high, 0), other = config_int(r, alias, 1, high, value);
    if (value == 0 && other == 0) config_error(r, EXIT_DAMAGED, "key '%s' is missing", key);
    if (value && other != value)
        config_error(r, EXIT_DAMAGED, "keys '%s' and '%s' differ (%d, %d)", key, alias, value, other);
    return other;
}

static double config_real(ConfigReader *r, const char *key, double low, double high, double missing) {
    double value = missing;
    const Json *v = json_get(r->root, key);
    if (v && (!json_get_double(v, &value) || value < low || value > high))
        config_error(r, EXIT_DAMAGED, "key '%s' must be a number from %g to %g", key, low, high);
    return value;
}

static void config_fixed_bool(ConfigReader *r, const char *key, int needed) {
    int value = needed;
    const Json *v = config_get(r, key);
    if (v && (!json_get_bool(v, &value) || value != needed))
        config_error(r, EXIT_USAGE, "key '%s' is not %s, which is all that is supported", key,
                     needed ? "true" : "false");
}

// Index of the key's value in `choices` (the first is the default).
static int config_choice(ConfigReader *r, const char *key, const char *const *choices, int num_choices) {
    const Json *v = config_get(r, key);
    const char *value = json_get_string(v);
    if (!v) return 0;
    for (int k = 0; value && k < num_choices; k++)
        if (strcmp(value, choices[k]) == 0) return k;
    if (num_choices == 1)
        config_error(r, EXIT_USAGE, "key '%s' is not \"%s\", which is all that is supported", key, choices[0]);
    else config_error(r, EXIT_DAMAGED, "key '%s' must be \"%s\" or \"%s\"", key, choices[0], choices[1]);
    return 0;
}

static void config_blocks(ConfigReader *r, ModelConfig *c) {
    const Json *list = config_get(r, "block_types");
    memset(c->block_types, BLOCK_MLSTM, sizeof c->block_types);
    if (!list) return;
    if (list->type != JSON_ARRAY || list->count != (size_t)c->num_blocks) {
        config_error(r, EXIT_DAMAGED, "key 'block_types' must be a list of %d block types, one a block", c->num_blocks);
        return;
    }
    for (int b = 0; b < c->num_blocks; b++) {
        const char *name = json_get_string(&list->items[b]);
        int type = 0;
        while (name && type < NUM_BLOCK_TYPES && strcmp(name, block_type_names[type]) != 0) type++;
        if (!name || type == NUM_BLOCK_TYPES) {
            config_error(r, EXIT_DAMAGED, "key 'block_types': block %d is none of mlstm, mlstm_v1, slstm", b);
            return;
        }
        c->block_types[b] = (unsigned char)type;
    }
}

// U as Hugging Face and the authors' PyTorch code find it: floor((x + m - 1) / m) * m on the float x = D * factor.
static int ffn_from_factor(double hidden_size, double factor, double m) {
    double y = hidden_size * factor + m - 1;
    return (int)((y - fmod(y, m)) / m * m);
}

// The inverse for config.json. With a factor of (U - m/2) / D this rule and 64 * ceil(x / 64), which others use, both
// give U, whatever the last bit of the product. m = 64 where U allows it, else U itself; U = 1 and 2 leave less room.
static void ffn_to_factor(const ModelConfig *c, double *factor, int *m) {
    int U = c->ffn_dim;
    *m = U % 64 == 0 ? 64 : U;
    *factor = (U <= 2 ? 1 + 0.25 * U : U - 0.5 * *m) / c->hidden_size;
}

static void config_parse(ConfigReader *r, ModelConfig *c) {
    static const char *const model_types[] = {"xlstm"}, *const weight_modes[] = {"single"};
    static const char *const gates[] = {"exp", "sigmoid"}, *const norms[] = {"rmsnorm", "layernorm"};
    model_defaults(c);
    if (r->root->type != JSON_OBJECT) config_error(r, EXIT_DAMAGED, "not a JSON object");
    config_choice(r, "model_type", model_types, 1);
    config_choice(r, "weight_mode", weight_modes, 1);
    config_fixed_bool(r, "use_bias", 0);
    config_fixed_bool(r, "tie_word_embeddings", 0);
    config_fixed_bool(r, "add_out_norm", 1);
    c->vocab_size = config_int(r, "vocab_size", 1, INT32_MAX, 0);
    if (c->vocab_size == 0) config_error(r, EXIT_DAMAGED, "key 'vocab_size' is missing");
    c->hidden_size = config_size(r, "hidden_size", "embedding_dim", 1 << 16);
    c->num_blocks = config_size(r, "num_hidden_layers", "num_blocks", MAX_BLOCKS);
    c->num_heads = config_int(r, "num_heads", 1, 1 << 12, 0);
    if (c->num_heads == 0) config_error(r, EXIT_DAMAGED, "key 'num_heads' is missing");
    c->chunk_size = config_int(r, "chunk_size", 1, 1 << 20, c->chunk_size);
    c->qk_dim_factor = config_real(r, "qk_dim_factor", 1e-6, 64, c->qk_dim_factor);
    c->v_dim_factor = config_real(r, "v_dim_factor", 1e-6, 64, c->v_dim_factor);
    c->norm_eps = config_real(r, "norm_eps", 0, 1, c->norm_eps);
    c->eps = config_real(r, "eps", 0, 1, c->eps);
    c->gate_soft_cap = config_real(r, "gate_soft_cap", 1e-6, 1e6, c->gate_soft_cap);
    c->logit_soft_cap = config_real(r, "output_logit_soft_cap", 0, 1e6, c->logit_soft_cap);
    double factor = config_real(r, "ffn_proj_factor", 0, 1e6, 2.667);
    int multiple = config_int(r, "ffn_round_up_to_multiple_of", 1, 1 << 18, 64);
    if (factor * c->hidden_size > 1 << 18)
        config_error(r, EXIT_DAMAGED, "key 'ffn_proj_factor' makes an FFN of over %d", 1 << 18);
    if (r->code) return;
    c->ffn_dim = ffn_from_factor(c->hidden_size, factor, multiple);
    c->sigmoid_gate = config_choice(r, "mlstm_input_gate", gates, 2);
    c->layernorm_out = config_choice(r, "out_norm_type", norms, 2);
    const char *kernel = json_get_string(config_get(r, "chunkwise_kernel"));
    if (kernel && strstr(kernel, "siging") && !config_get(r, "mlstm_input_gate"))
        config_error(r, EXIT_USAGE, "kernel '%.60s' has sigmoid input gates, but there is no key mlstm_input_gate",
                     kernel);
    config_blocks(r, c);
}

// Reads DIR/config.json. Keys that do not shape the model are ignored.
static int config_read(const char *dir, ModelConfig *c, char *why, size_t why_size) {
    char path[MAX_PATH], reason[400], *text;
    size_t len;
    int code = path_join(path, dir, "config.json", why, why_size);
    if (code) return code;
    if (access(path, F_OK) != 0)
        return explain(EXIT_USAGE, why, why_size,
                       "cannot read %s: %s; give a directory that holds config.json and model.safetensors, "
                       "such as OUT/step_00001000",
                       path, strerror(errno));
    if ((code = file_read_text(path, MAX_CONFIG_BYTES, &text, &len, why, why_size))) return code;
    Json *root = json_parse(text, len, reason, sizeof reason);
    free(text);
    if (!root) { return explain(EXIT_DAMAGED, why, why_size, "%s is %s; correct it, or get it again", path, reason); }
    ConfigReader r = {root, path, why, why_size, 0};
    config_parse(&r, c);
    if (r.code == 0 && !model_check(c, reason, sizeof reason))
        r.code = explain(EXIT_USAGE, why, why_size, "%s: %s", path, reason);
    json_free(root);
    return r.code;
}

// The text of config.json. A model whose blocks are all mlstm loads with it in transformers; the types matter there:
// a float without a point is refused. bf16: what model.safetensors holds.
static void config_write(const ModelConfig *c, int bf16, JsonWriter *w) {
    double factor;
    int multiple;
    // transformers rounds the widths of its cache up to multiples of 64 and then fails on all others
    int cache = model_dim(c, DIM_DK) % 64 == 0 && model_dim(c, DIM_DV) % 64 == 0;
    ffn_to_factor(c, &factor, &multiple);
    w->indent = 2;
    json_begin(w, NULL, '{');
    json_write_string(w, "model_type", "xlstm");
    json_begin(w, "architectures", '[');
    json_write_string(w, NULL, "xLSTMForCausalLM");
    json_end(w, ']');
    json_write_int(w, "vocab_size", c->vocab_size);
    json_write_int(w, "hidden_size", c->hidden_size);
    json_write_int(w, "embedding_dim", c->hidden_size);
    json_write_int(w, "num_hidden_layers", c->num_blocks);
    json_write_int(w, "num_blocks", c->num_blocks);
    json_write_int(w, "num_heads", c->num_heads);
    json_write_bool(w, "use_bias", 0);
    json_write_bool(w, "tie_word_embeddings", 0);
    json_write_bool(w, "add_out_norm", 1);
    json_write_string(w, "weight_mode", "single");
    json_write_float(w, "norm_eps", c->norm_eps);
    json_write_float(w, "eps", c->eps);
    json_write_bool(w, "norm_reduction_force_float32", 1);
    json_write_float(w, "qk_dim_factor", c->qk_dim_factor);
    json_write_float(w, "v_dim_factor", c->v_dim_factor);
    json_write_float(w, "ffn_proj_factor", factor);
    json_write_int(w, "ffn_round_up_to_multiple_of", multiple);
    json_write_float(w, "gate_soft_cap", c->gate_soft_cap);
    json_write_float(w, "output_logit_soft_cap", c->logit_soft_cap);
    json_write_string(w, "chunkwise_kernel", "chunkwise--native_autograd");
    json_write_string(w, "sequence_kernel", "native_sequence__native");
    json_write_string(w, "step_kernel", "native");
    json_write_string(w, "mode", "inference");
    json_write_int(w, "chunk_size", c->chunk_size);
    json_write_bool(w, "return_last_states", 1);
    json_write_string(w, "autocast_kernel_dtype", "float32");
    json_write_string(w, "inference_state_dtype", "float32");
    json_write_int(w, "max_inference_chunksize", 16384);
    json_write_bool(w, "use_cache", cache);
    json_write_int(w, "bos_token_id", 0);
    json_write_int(w, "eos_token_id", 2);
    json_write_int(w, "pad_token_id", 1);
    json_write_string(w, "dtype", bf16 ? "bfloat16" : "float32");
    json_begin(w, "block_types", '[');
    for (int b = 0; b < c->num_blocks; b++) json_write_string(w, NULL, block_type_names[c->block_types[b]]);
    json_end(w, ']');
    json_write_string(w, "mlstm_input_gate", c->sigmoid_gate ? "sigmoid" : "exp");
    json_write_string(w, "out_norm_type", c->layernorm_out ? "layernorm" : "rmsnorm");
    json_end(w, '}');
    json_append(w, "\n", 1);
}

static int config_differs(const char *key, double a, double b, char *why, size_t why_size) {
    return a != b && explain(1, why, why_size, "%s is %g against %g", key, a, b);
}

// 1 if two configurations describe the same function of the same weights, else 0 and the first difference in `why`.
// chunk_size does not count: it orders the same computation differently.
MAYBE_UNUSED
static int config_same(const ModelConfig *a, const ModelConfig *b, char *why, size_t why_size) {
    if (config_differs("vocab_size", a->vocab_size, b->vocab_size, why, why_size) ||
        config_differs("hidden_size", a->hidden_size, b->hidden_size, why, why_size) ||
        config_differs("number of blocks", a->num_blocks, b->num_blocks, why, why_size) ||
        config_differs("num_heads", a->num_heads, b->num_heads, why, why_size) ||
        config_differs("FFN width", a->ffn_dim, b->ffn_dim, why, why_size) ||
        config_differs("sigmoid input gate", a->sigmoid_gate, b->sigmoid_gate, why, why_size) ||
        config_differs("LayerNorm at the end", a->layernorm_out, b->layernorm_out, why, why_size) ||
        config_differs("qk_dim_factor", a->qk_dim_factor, b->qk_dim_factor, why, why_size) ||
        config_differs("v_dim_factor", a->v_dim_factor, b->v_dim_factor, why, why_size) ||
        config_differs("norm_eps", a->norm_eps, b->norm_eps, why, why_size) ||
        config_differs("eps", a->eps, b->eps, why, why_size) ||
        config_differs("gate_soft_cap", a->gate_soft_cap, b->gate_soft_cap, why, why_size) ||
        config_differs("output_logit_soft_cap", a->logit_soft_cap, b->logit_soft_cap, why, why_size))
        return 0;
    for (int k = 0; k < a->num_blocks; k++)
        if (a->block_types[k] != b->block_types[k])
            return explain(0, why, why_size, "block %d is %s against %s", k, block_type_names[a->block_types[k]],
                           block_type_names[b->block_types[k]]);
    return 1;
}

#endif
