// test_math_tables.h: tests of what a model is made of, part of test_xlstm.c: presets and their parameter counts, names
// and shapes of tensors, initial values, random numbers, block lists.

// The authors' rule, from the names alone: every weight but embeddings, norms, biases, recurrent kernel and skip.
static int decays(const char *name) {
    return strstr(name, "weight") && !strstr(name, "norm") && !strstr(name, "embeddings");
}

// Parameters by the formulas of the papers' models: xLSTM 7B family, and the original blocks.
static double formula_mlstm(double V, double D, double N, double NH, double U) {
    double Dk = D / 2, Dv = D;
    return 2 * V * D + D + N * (2 * D * Dk + 3 * D * Dv + 2 * (NH * D + NH) + Dv + 2 * D + 3 * D * U);
}
static double formula_v1(double V, double D, double num_mlstm, double num_slstm, double NH) {
    double I = 64 * ceil(2 * D / 64), U = 64 * ceil(1.3 * D / 64 - 1e-9);
    double mlstm = D + 3 * I * D + 5 * I + 12 * I + 2 * (3 * I * NH + NH) + 2 * I;
    double slstm = D + 5 * D + 8 * D * D / NH + 4 * D + D + D + 3 * U * D;
    return 2 * V * D + D + num_mlstm * mlstm + num_slstm * slstm;
}

static void test_presets(void) {
    static const struct {
        const char *name;
        double count;
    } known[] = {{"114m", 114034660},         {"164m", 164110224},         {"207m", 207310376},
                 {"406m", 406856896},         {"841m", 841643808},         {"1.4b", 1421232512},
                 {"7b", 6865424896.0},        {"v1-125m", 163806144},      {"v1-125m-7to1", 163690928},
                 {"v1-350m", 409290112},      {"v1-350m-7to1", 408436048}, {"v1-760m", 840427392},
                 {"v1-760m-7to1", 839736144}, {"v1-1.3b", 1422559616},     {"v1-1.3b-7to1", 1420065104}};
    ModelConfig c;
    for (size_t k = 0; k < sizeof known / sizeof known[0]; k++) {
        char why[200] = "";
        double count = 0, formula = 0;
        if (model_preset(known[k].name, &c)) {
            TensorTable t = model_table(&c);
            int slstm = 0;
            for (int b = 0; b < c.num_blocks; b++) slstm += c.block_types[b] == BLOCK_SLSTM;
            count = (double)t.total;
            formula = c.block_types[0] == BLOCK_MLSTM
                          ? formula_mlstm(c.vocab_size, c.hidden_size, c.num_blocks, c.num_heads, c.ffn_dim)
                          : formula_v1(c.vocab_size, c.hidden_size, c.num_blocks - slstm, slstm, c.num_heads);
            table_free(&t);
        }
        check(fabs(count - known[k].count) + fabs(formula - known[k].count), 0,
              "preset %s: %.0f parameters, and by formula", known[k].name, known[k].count);
        check(!model_check(&c, why, sizeof why), 0, "preset %s can be built %s", known[k].name, why);
    }
    check(NUM_PRESETS - 1 - (double)(sizeof known / sizeof known[0]), 0, "every preset but demo was counted");
    check(!model_preset("demo", &c) || c.vocab_size != 256, 0, "preset demo, vocabulary 256");
    check(model_preset("demos", &c) || model_preset("", &c), 0, "unknown presets are unknown");
}

typedef struct {
    const char *name;
    int shape[3];
    int decay;
} Expected;

static void check_tensors(const char *blocks, const Expected *expected, int count) {
    ModelConfig c;
    char why[200];
    model_defaults(&c);
    c.vocab_size = 11;
    c.hidden_size = 40;
    c.num_heads = 2;
    c.ffn_dim = 24;
    double wrong = !model_parse_blocks(blocks, &c, why, sizeof why);
    TensorTable t = model_table(&c);
    size_t end = 0, total = 0;
    for (int k = 0; k < count; k++) {
        int index = table_find(&t, expected[k].name), ndim = 0;
        if (index < 0) {
            printf("missing: %s\n", expected[k].name);
            wrong++;
            continue;
        }
        const TensorSpec *s = &t.tensors[index];
        while (ndim < 3 && expected[k].shape[ndim]) ndim++;
        int same = s->ndim == ndim && s->decay == expected[k].decay && s->decay == !!decays(s->name);
        for (int a = 0; a < ndim; a++) same = same && s->shape[a] == expected[k].shape[a];
        if (!same) printf("differs: %s\n", expected[k].name);
        wrong += !same;
    }
    for (int k = 0; k < t.num_tensors; k++) {
        wrong += t.tensors[k].offset != end;  // no gaps, table order
        end += t.tensors[k].count;
        total += t.tensors[k].count;
    }
    check(wrong + (t.num_tensors != count) + (total != t.total), 0, "%s: names, shapes, decay of %d tensors", blocks,
          count);
    table_free(&t);
}

#define SHELL                                                                             \
    {"backbone.embeddings.weight", {11, 40}, 0}, {"backbone.out_norm.weight", {40}, 0}, { \
        "lm_head.weight", {11, 40}, 1                                                     \
    }
#define B0 "backbone.blocks.0."
static void test_tensors(void) {  // D = 40, 2 heads, V = 11, U = 24: Dk = 20, I = 128, Us = 64, d = 20
    static const Expected mlstm[] = {SHELL,
                                     {B0 "norm_mlstm.weight", {40}, 0},
                                     {B0 "mlstm_layer.q.weight", {20, 40}, 1},
                                     {B0 "mlstm_layer.k.weight", {20, 40}, 1},
                                     {B0 "mlstm_layer.v.weight", {40, 40}, 1},
                                     {B0 "mlstm_layer.ogate_preact.weight", {40, 40}, 1},
                                     {B0 "mlstm_layer.igate_preact.weight", {2, 40}, 1},
                                     {B0 "mlstm_layer.igate_preact.bias", {2}, 0},
                                     {B0 "mlstm_layer.fgate_preact.weight", {2, 40}, 1},
                                     {B0 "mlstm_layer.fgate_preact.bias", {2}, 0},
                                     {B0 "mlstm_layer.multihead_norm.weight", {40}, 0},
                                     {B0 "mlstm_layer.out_proj.weight", {40, 40}, 1},
                                     {B0 "norm_ffn.weight", {40}, 0},
                                     {B0 "ffn.proj_up_gate.weight", {24, 40}, 1},
                                     {B0 "ffn.proj_up.weight", {24, 40}, 1},
                                     {B0 "ffn.proj_down.weight", {40, 24}, 1}};
    static const Expected v1[] = {SHELL,
                                  {B0 "xlstm_norm.weight", {40}, 0},
                                  {B0 "xlstm.proj_up.weight", {256, 40}, 1},
                                  {B0 "xlstm.conv1d.conv.weight", {128, 1, 4}, 1},
                                  {B0 "xlstm.conv1d.conv.bias", {128}, 0},
                                  {B0 "xlstm.q_proj.weight", {32, 4, 4}, 1},
                                  {B0 "xlstm.k_proj.weight", {32, 4, 4}, 1},
                                  {B0 "xlstm.v_proj.weight", {32, 4, 4}, 1},
                                  {B0 "xlstm.mlstm_cell.igate.weight", {2, 384}, 1},
                                  {B0 "xlstm.mlstm_cell.igate.bias", {2}, 0},
                                  {B0 "xlstm.mlstm_cell.fgate.weight", {2, 384}, 1},
                                  {B0 "xlstm.mlstm_cell.fgate.bias", {2}, 0},
                                  {B0 "xlstm.mlstm_cell.outnorm.weight", {128}, 0},
                                  {B0 "xlstm.learnable_skip", {128}, 0},
                                  {B0 "xlstm.proj_down.weight", {40, 128}, 1}};
    static const Expected slstm[] = {SHELL,
                                     {B0 "xlstm_norm.weight", {40}, 0},
                                     {B0 "ffn_norm.weight", {40}, 0},
                                     {B0 "xlstm.conv1d.conv.weight", {40, 1, 4}, 1},
                                     {B0 "xlstm.conv1d.conv.bias", {40}, 0},
                                     {B0 "xlstm.fgate.weight", {2, 20, 20}, 1},
                                     {B0 "xlstm.igate.weight", {2, 20, 20}, 1},
                                     {B0 "xlstm.zgate.weight", {2, 20, 20}, 1},
                                     {B0 "xlstm.ogate.weight", {2, 20, 20}, 1},
                                     {B0 "xlstm.slstm_cell._recurrent_kernel_", {2, 20, 80}, 0},
                                     {B0 "xlstm.slstm_cell._bias_", {160}, 0},
                                     {B0 "xlstm.group_norm.weight", {40}, 0},
                                     {B0 "ffn.proj_up.weight", {128, 40}, 1},
                                     {B0 "ffn.proj_down.weight", {40, 64}, 1}};
    check_tensors("mlstm", mlstm, sizeof mlstm / sizeof mlstm[0]);
    check_tensors("mlstm_v1", v1, sizeof v1 / sizeof v1[0]);
    check_tensors("slstm", slstm, sizeof slstm / sizeof slstm[0]);
}
#undef SHELL
#undef B0

// Distance of a sample from a distribution in units of its sampling error: mean, standard deviation, and the share of
// values within one standard deviation (0.6827 for a normal distribution, 0.5774 for a uniform one).
static double sample_error(const float *x, size_t n, double std, double inside) {
    double mean = 0, square = 0, share = 0;
    for (size_t k = 0; k < n; k++) {
        mean += x[k] / (double)n;
        square += (double)x[k] * x[k] / (double)n;
        share += fabs(x[k]) < std ? 1.0 / (double)n : 0;
    }
    double of_mean = fabs(mean) / (std / sqrt((double)n)),
           of_std = fabs(sqrt(square) / std - 1) * sqrt(2.0 * (double)n);
    return fmax(of_mean, fmax(of_std, fabs(share - inside) / (0.5 / sqrt((double)n))));
}

// What the papers' code does, by name: *std > 0: random; else *constant.
static int expected_init(const char *name, int D, int N, double *std, double *constant, double *inside) {
    *std = *constant = 0;
    *inside = 0.6827;
    if (strstr(name, "conv1d")) {
        *std = 1 / sqrt(12.0);
        *inside = 0.5774;
    } else if (strstr(name, "proj_down") || strstr(name, "out_proj")) *std = 2.0 / N / sqrt(D);
    else if (strstr(name, "mlstm_cell.igate.bias")) *std = 0.1;
    else if (strstr(name, "igate_preact.bias")) *constant = -10;
    else if (strstr(name, "learnable_skip") || strstr(name, "norm_mlstm") || strstr(name, "norm_ffn") ||
             strstr(name, "multihead_norm") || strcmp(name, "backbone.out_norm.weight") == 0)
        *constant = 1;
    else if (strstr(name, "gate_preact") || strstr(name, "mlstm_cell") || strstr(name, "recurrent") ||
             strstr(name, "norm.weight"))
        *constant = 0;
    else if (strstr(name, "weight")) *std = sqrt(2.0 / (5.0 * D));
    return !strstr(name, "fgate_preact.bias") && !strstr(name, "fgate.bias") && !strstr(name, "_bias_");
}

static void test_init(void) {
    ModelConfig c;
    model_preset("demo", &c);
    c.num_heads = 4;
    char why[200];
    model_parse_blocks("mlstm,slstm,mlstm_v1,slstm", &c, why, sizeof why);
    TensorTable t = model_table(&c);
    Worst random = {0, ""}, constants = {0, ""}, gates = {0, ""};
    double repeated = 0;
    for (int k = 0; k < t.num_tensors; k++) {
        const TensorSpec *s = &t.tensors[k];
        float *x = (float *)xcalloc(s->count, sizeof(float)), *y = (float *)xcalloc(s->count, sizeof(float));
        double std, constant, inside, error = 0;
        tensor_init(&c, &t, k, 42, x);
        tensor_init(&c, &t, k, 43, y);
        if (!expected_init(s->name, c.hidden_size, c.num_blocks, &std, &constant, &inside)) {
            int slstm = strstr(s->name, "_bias_") != NULL, d = c.hidden_size / c.num_heads;
            for (size_t i = 0; i < s->count; i++) {
                int gate = (int)i / d % 4, j = (int)i % d;  // [NH, 4, d]
                double rho = s->block / 3.0, f = 5 - 12 * pow(j / (d - 1.0), 0.3 + 1.3 * rho);
                double expected = slstm ? (gate == 1 ? f : 0) : 3 + (double)i;
                error = fmax(error, fabs(x[i] - expected));
            }
            worst_of(&gates, error, s->name);
        } else if (std > 0) {
            worst_of(&random, sample_error(x, s->count, std, inside), s->name);
            for (size_t i = 0; i < s->count; i++) repeated += x[i] == y[i];
            if (inside < 0.6)
                for (size_t i = 0; i < s->count; i++) worst_of(&constants, fabs(x[i]) <= 0.5 ? 0 : 1, s->name);
        } else {
            for (size_t i = 0; i < s->count; i++) worst_of(&constants, fabs(x[i] - constant), s->name);
        }
        free(x);
        free(y);
    }
    check(random.error, 5, "initial values, random ones: mean, deviation, shape in sampling errors (%s)", random.where);
    check(constants.error, 0, "initial values, constants (%s)", constants.where);
    check(gates.error, 1e-6, "initial values, biases of forget gates: 3 .. 6, sLSTM 5 .. -7 (%s)", gates.where);
    check(repeated, 40, "initial values, another seed: few equal elements (of %zu)", t.total);
    table_free(&t);
    c.layernorm_out = 1;
    t = model_table(&c);
    float norm[128];
    tensor_init(&c, &t, t.shell[SHELL_OUT_NORM], 42, norm);
    check(fabs(norm[0]), 0, "initial values, LayerNorm at the end: scale 1 + 0");
    table_free(&t);
}

static void test_rng(void) {
    static const uint32_t known[3][10] = {
        // counter, key, result: the authors' known answers
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1}};
    for (int k = 0; k < 3; k++) {
        uint32_t out[4];
        philox4x32(known[k], known[k] + 4, out);
        check(memcmp(out, known[k] + 6, sizeof out) != 0, 0, "Philox4x32-10, known answer %d", k);
    }
    static unsigned char seen[70000];
    double wrong = 0, fixed = 0, same = 0;
    int count = 0;
    for (int n = 1; n <= 66000; n = n < 140 ? n + 1 : n * 2 + 1, count++)
        for (uint64_t epoch = 0; epoch < 3; epoch++) {
            memset(seen, 0, sizeof seen);
            for (int k = 0; k < n; k++) {
                uint64_t p = rng_permute(7, epoch, (uint64_t)n, (uint64_t)k);
                if (p >= (uint64_t)n || seen[p]++) wrong++;
                if (n > 10000) {
                    fixed += p == (uint64_t)k;
                    same += p == rng_permute(7, epoch + 1, (uint64_t)n, (uint64_t)k);
                }
            }
        }
    check(wrong, 0, "rng_permute is a permutation, %d sizes x 3 epochs", count);
    check(fmax(fixed, same), 40, "rng_permute moves the elements, differently each epoch");
    double u = 0, z = 0, zz = 0;
    for (uint64_t k = 0; k < 100000; k++) {
        u += rng_uniform(3, RNG_TEST, 5, k) - 0.5;
        double x = rng_normal(3, RNG_TEST, 5, k);
        z += x;
        zz += x * x - 1;
    }
    check(fmax(fabs(u) * sqrt(12.0), fmax(fabs(z), fabs(zz) / sqrt(2.0))) / sqrt(1e5), 4,
          "uniform and normal numbers: moments in sampling errors");
}

static void test_blocks(void) {
    static const struct {
        const char *text, *types;  // one letter a block: m, 1, s
    } good[] = {{"mlstm", "m"},           {"slstm", "s"},
                {"mlstm_v1", "1"},        {"mlstm*3", "mmm"},
                {"mlstm*2,slstm", "mms"}, {"(mlstm*2,slstm)*2", "mmsmms"},
                {"(mlstm)", "m"},         {"slstm,(mlstm_v1,(slstm,mlstm)*2)*2,mlstm", "s1smsm1smsmm"}};
    static const char *const bad[] = {"",
                                      ",",
                                      "mlstm,",
                                      ",mlstm",
                                      "mlstm,,slstm",
                                      "lstm",
                                      "mLSTM",
                                      "mlstm*",
                                      "mlstm*0",
                                      "mlstm*-1",
                                      "mlstm*4k",
                                      "mlstm*1.5",
                                      "mlstm*2*3",
                                      "mlstm*1025",
                                      "(mlstm*600)*2",
                                      "mlstm*99999999999999999999",
                                      "(mlstm",
                                      "mlstm)",
                                      "()",
                                      "()*3",
                                      "mlstm slstm",
                                      "mlstm(slstm)",
                                      "mlstm_v2",
                                      "mlstm*+2",
                                      " mlstm"};
    static const char letters[] = "m1s";
    ModelConfig c;
    char why[200];
    for (size_t k = 0; k < sizeof good / sizeof good[0]; k++) {
        model_defaults(&c);
        int same = model_parse_blocks(good[k].text, &c, why, sizeof why) && c.num_blocks == (int)strlen(good[k].types);
        for (int b = 0; same && b < c.num_blocks; b++) same = letters[c.block_types[b]] == good[k].types[b];
        check(!same, 0, "block list %s", good[k].text);
    }
    for (size_t k = 0; k < sizeof bad / sizeof bad[0]; k++) {
        why[0] = 0;
        int refused = !model_parse_blocks(bad[k], &c, why, sizeof why);
        check(!refused || !why[0], 0, "block list '%s' refused: %s", bad[k], why);
    }
    static const struct {
        const char *blocks;
        int vocab, D, heads, ffn, chunk;
        const char *names;  // what the message must name; NULL: a good model
    } checks[] = {{"mlstm", 11, 40, 2, 24, 64, NULL},      {"mlstm", 1, 40, 2, 24, 64, "--vocab"},
                  {"mlstm", 11, 0, 2, 24, 64, "--dim"},    {"mlstm", 11, -4, 2, 24, 64, "--dim"},
                  {"mlstm", 11, 40, 0, 24, 64, "--heads"}, {"mlstm", 11, 40, 3, 24, 64, "--heads"},
                  {"mlstm", 11, 30, 2, 24, 64, "--heads"}, {"mlstm_v1", 11, 40, 3, 24, 64, "--heads"},
                  {"slstm", 11, 40, 3, 24, 64, "--heads"}, {"mlstm,slstm", 11, 40, 80, 24, 64, "--heads"},
                  {"mlstm", 11, 40, 2, 0, 64, "--ffn"},    {"mlstm", 11, 40, 2, 24, 0, "--chunk"},
                  {"mlstm_v1", 11, 33, 2, 24, 64, NULL},   {"slstm", 11, 33, 3, 24, 1, NULL}};
    for (size_t k = 0; k < sizeof checks / sizeof checks[0]; k++) {
        model_defaults(&c);
        model_parse_blocks(checks[k].blocks, &c, why, sizeof why);
        c.vocab_size = checks[k].vocab;
        c.hidden_size = checks[k].D;
        c.num_heads = checks[k].heads;
        c.ffn_dim = checks[k].ffn;
        c.chunk_size = checks[k].chunk;
        why[0] = 0;
        int good_model = model_check(&c, why, sizeof why);
        int right = checks[k].names ? !good_model && strstr(why, checks[k].names) : good_model;
        check(!right, 0, "model_check %s D%d heads %d: %s", checks[k].blocks, checks[k].D, checks[k].heads, why);
    }
}
