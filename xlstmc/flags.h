// flags.h: the command line. One table holds every flag's name, type, default, bounds and help; parsing, --help, the
// log's first line and the record in a checkpoint all walk it. Both trainers have the same flags.
// A bad flag ends the program with one line that names it, exit code 2, before anything else happens.
#ifndef XLSTMC_FLAGS_H
#define XLSTMC_FLAGS_H

#include <getopt.h>

#include "json.h"  // JsonWriter
#include "model.h"
#include "util.h"

enum { MAX_FLAGS = 80 };

typedef struct {
    // model
    const char *model, *load, *blocks, *gate;
    int64_t dim, heads, vocab, ffn, list_models;
    // data
    const char *train, *val;
    int64_t batch, seq_len, tokens_per_step, no_shuffle, reset_docs, eot, carry_state;
    // optimiser
    const char *schedule;
    int64_t steps, warmup, seed;
    double lr, final_lr, weight_decay, beta1, beta2, eps, clip;
    // run
    const char *out, *save_dtype, *dump;
    int64_t save_every, keep, resume, eval_every, eval_batches, sample_every, sample_len;
    // machine
    const char *recompute, *precision;
    int64_t threads, chunk, sp, zero, comm_timeout;
    // generate
    const char *prompt;
    int64_t generate, top_k;
    double temperature, top_p;
    int64_t help;
    unsigned char given[MAX_FLAGS];  // by place in the table: was it on the command line?
} Flags;

typedef enum { FLAG_GROUP, FLAG_TEXT, FLAG_CHOICE, FLAG_INT, FLAG_REAL, FLAG_SWITCH } FlagType;

typedef struct {
    FlagType type;
    const char *name;     // without the dashes; of a group: its title
    const char *metavar;  // what --help shows for the value; of a choice: the words allowed, separated by |
    size_t offset;        // of the value in Flags
    const char *initial;  // the default as one would type it; NULL: none, `help` then says what happens
    double low, high;     // bounds of a number, both allowed
    int recorded;         // 1: shapes the result, so a checkpoint records it and a resumed run reports a change
    const char *help;
} FlagSpec;

#define GROUP(title) \
    { FLAG_GROUP, title, NULL, 0, NULL, 0, 0, 0, NULL }
#define TEXT(field, name, metavar, initial, help) \
    { FLAG_TEXT, name, metavar, offsetof(Flags, field), initial, 0, 0, 0, help }
#define CHOICE(field, name, words, initial, recorded, help) \
    { FLAG_CHOICE, name, words, offsetof(Flags, field), initial, 0, 0, recorded, help }
#define INT(field, name, metavar, initial, low, high, recorded, help) \
    { FLAG_INT, name, metavar, offsetof(Flags, field), initial, low, high, recorded, help }
#define REAL(field, name, metavar, initial, low, high, recorded, help) \
    { FLAG_REAL, name, metavar, offsetof(Flags, field), initial, low, high, recorded, help }
#define SWITCH(field, name, recorded, help) \
    { FLAG_SWITCH, name, NULL, offsetof(Flags, field), NULL, 0, 1, recorded, help }

static const FlagSpec flag_specs[] = {
    GROUP("Model: one of --model, --load, --blocks"),
    TEXT(model, "model", "PRESET", "demo", "a preset of --list-models"),
    TEXT(load, "load", "DIR", NULL, "weights and sizes of a checkpoint or Hugging Face xLSTM directory"),
    TEXT(blocks, "blocks", "LIST", NULL,
         "own model, e.g. \"mlstm*7,slstm\" or \"(mlstm*7,slstm)*3\"; types: mlstm, mlstm_v1, slstm"),
    INT(dim, "dim", "D", "128", 1, 1 << 16, 0, "width of a --blocks model"),
    INT(heads, "heads", "N", "4", 1, 1 << 12, 0, "heads of a --blocks model"),
    INT(vocab, "vocab", "V", NULL, 2, 1 << 24, 0,
        "vocabulary (default: the loaded model's or named preset's; else 256 if all training files are text, else "
        "what the shards say, else 50304)"),
    INT(ffn, "ffn", "U", NULL, 1, 1 << 18, 0, "feed-forward width of mlstm blocks (default: 64 ceil(2.667 D / 64))"),
    CHOICE(gate, "gate", "exp|sig", "exp", 0, "input gate of mlstm and mlstm_v1 blocks: exponential or sigmoid"),
    SWITCH(list_models, "list-models", 0, "print every preset with its exact parameter count, and exit"),

    GROUP("Data"),
    TEXT(train, "train", "GLOB", NULL,
         "training files: comma-separated patterns; *.txt is read as bytes, *.bin as token shards, raw:FILE as "
         "headerless uint16"),
    TEXT(val, "val", "GLOB", NULL, "validation files (default: none, no evaluation)"),
    INT(batch, "batch", "B", "8", 1, 1 << 20, 0, "sequences a micro-step, of each group of --sp ranks"),
    INT(seq_len, "seq-len", "T", "256", 1, 1 << 26, 1, "tokens a sequence"),
    INT(tokens_per_step, "tokens-per-step", "N", NULL, 1, 2147483647, 1,
        "tokens an update, a multiple of batch x seq-len x groups of --sp ranks; the micro-steps' gradients add up "
        "(default: one micro-step)"),
    SWITCH(no_shuffle, "no-shuffle", 1, "take the samples in order"),
    SWITCH(reset_docs, "reset-docs", 1, "fresh states where a document begins (an end-of-text token, a file)"),
    INT(eot, "eot", "ID", NULL, 0, 1 << 24, 1,
        "end-of-text token (default: what the shard says, else 50256; none in text)"),
    SWITCH(carry_state, "carry-state", 1,
           "keep the states from step to step: truncated backpropagation over long streams; implies --no-shuffle"),

    GROUP("Optimiser: AdamW"),
    INT(steps, "steps", "N", "1000", 0, 99999999, 1, "updates in all"),
    REAL(lr, "lr", "X", "1e-3", 0, 1e6, 1, "learning rate at its peak"),
    INT(warmup, "warmup", "N", "100", 0, 99999999, 1, "steps of linear warm-up"),
    CHOICE(schedule, "schedule", "cosine|linear|constant|wsd", "cosine", 1,
           "learning rate after the warm-up; wsd: constant, then 1-sqrt decay over the last fifth of the steps"),
    REAL(final_lr, "final-lr", "F", "0.1", 0, 1, 1, "learning rate at the end, as a fraction of --lr"),
    REAL(weight_decay, "weight-decay", "X", "0.1", 0, 1e6, 1,
         "on matrices only, not on embedding, norms, biases, recurrent kernels"),
    REAL(beta1, "beta1", "X", "0.9", 0, 0.9999999, 1, "decay of the first moment"),
    REAL(beta2, "beta2", "X", "0.95", 0, 0.9999999, 1, "decay of the second moment"),
    REAL(eps, "eps", "X", "1e-8", 1e-30, 1, 1, "added to the root of the second moment"),
    REAL(clip, "clip", "X", "1", 0, 1e30, 1, "largest gradient norm; 0: no clipping"),
    INT(seed, "seed", "N", "42", 0, 9e15, 1, "of initial weights, sample order and generated text"),

    GROUP("Run (an --...-every of 0 turns it off)"),
    TEXT(out, "out", "DIR", NULL, "checkpoints and logs (default: none, nothing is written)"),
    INT(save_every, "save-every", "N", "500", 0, 99999999, 0,
        "steps between checkpoints; the last step is always saved"),
    CHOICE(save_dtype, "save-dtype", "fp32|bf16", "fp32", 0, "of the weights in model.safetensors"),
    INT(keep, "keep", "N", "0", 0, 99999999, 0, "newest checkpoints to keep; 0: all"),
    SWITCH(resume, "resume", 0, "continue from the newest valid checkpoint in --out; start at step 0 if there is none"),
    INT(eval_every, "eval-every", "N", "100", 0, 99999999, 0, "steps between evaluations on --val"),
    INT(eval_batches, "eval-batches", "N", "20", 0, 99999999, 0,
        "batches an evaluation, evenly spread over --val; 0: all of it"),
    INT(sample_every, "sample-every", "N", "0", 0, 99999999, 0, "steps between samples of generated text"),
    INT(sample_len, "sample-len", "N", "200", 1, 99999999, 0, "tokens of such a sample"),
    TEXT(dump, "dump", "FILE", NULL, "write loss, logits and all gradients of the first step as safetensors, and exit"),
    SWITCH(help, "help", 0, "print this and exit"),

    GROUP("Machine"),
    INT(threads, "threads", "N", NULL, 1, 4096, 0, "CPU threads (default: OMP_NUM_THREADS, else all cores)"),
    INT(chunk, "chunk", "L", NULL, 1, 1 << 20, 0,
        "chunk length of the mLSTM on the CPU (default: the model's chunk_size); on a GPU the kernels have their own"),
    CHOICE(recompute, "recompute", "none|block", "none", 0,
           "block: keep only the blocks' inputs and run each forward again in the backward pass; less memory"),
    CHOICE(precision, "precision", "fp32|bf16", NULL, 0,
           "of the arithmetic (default: fp32 on the CPU, bf16 on the GPU)"),
    INT(sp, "sp", "P", "1", 1, 1 << 16, 0, "ranks (processes of mpirun) that share one sequence"),
    INT(zero, "zero", "0|1", "1", 0, 1, 0, "1: spread the optimiser's moments and its work over the ranks"),
    INT(comm_timeout, "comm-timeout", "S", "600", 1, 1e6, 0, "seconds until a silent rank ends the run"),

    GROUP("Generate"),
    INT(generate, "generate", "N", NULL, 1, 1e12, 0,
        "print --prompt and N tokens, and exit; with --load DIR, or --out DIR --resume"),
    TEXT(prompt, "prompt", "TEXT", NULL, "what generated text starts with (byte models)"),
    REAL(temperature, "temperature", "X", "0.8", 0, 1e6, 0, "0: always the likeliest token"),
    INT(top_k, "top-k", "N", "0", 0, 1 << 24, 0, "choose among the N likeliest tokens; 0: all"),
    REAL(top_p, "top-p", "X", "1", 1e-9, 1, 0,
         "choose among the likeliest tokens that hold this share of the probability"),
};
enum { NUM_FLAGS = sizeof flag_specs / sizeof flag_specs[0] };
#undef GROUP
#undef TEXT
#undef CHOICE
#undef INT
#undef REAL
#undef SWITCH

static const char flags_examples[] =
    "  Train a small model on any text; the same line with --resume goes on where it stopped:\n"
    "    %s --train book.txt --out out/book\n"
    "  Hold a file back for validation, and look at samples on the way:\n"
    "    %s --train 'text/*.txt' --val held_out.txt --out out/book --sample-every 200\n"
    "  A preset on token shards, half a million tokens an update:\n"
    "    %s --model 164m --train 'shards/train_*.bin' --val 'shards/val_*.bin' --batch 8 --seq-len 1024 \\\n"
    "        --tokens-per-step 524288 --steps 20000 --lr 3e-3 --out out/164m\n"
    "  An own mix of blocks:\n"
    "    %s --blocks '(mlstm*3,slstm)*2' --dim 256 --train book.txt --out out/hybrid\n"
    "  Let a trained model write:\n"
    "    %s --out out/book --resume --generate 500 --prompt 'It was '\n";

static int flag_index(const char *name) {
    for (int k = 0; k < NUM_FLAGS; k++)
        if (flag_specs[k].type != FLAG_GROUP && strcmp(flag_specs[k].name, name) == 0) return k;
    return -1;
}

// Was the flag on the command line?
static int flag_given(const Flags *f, const char *name) { return f->given[flag_index(name)]; }

static int64_t *flag_int(Flags *f, const FlagSpec *s) { return (int64_t *)((char *)f + s->offset); }
static double *flag_real(Flags *f, const FlagSpec *s) { return (double *)((char *)f + s->offset); }
static const char **flag_text(Flags *f, const FlagSpec *s) { return (const char **)((char *)f + s->offset); }

static int choice_allows(const char *words, const char *word) {
    size_t len = strlen(word);
    for (const char *at = words; at; at = strchr(at, '|')) {
        if (*at == '|') at++;
        if (len && strncmp(at, word, len) == 0 && (at[len] == 0 || at[len] == '|')) return 1;
    }
    return 0;
}

// Sets one flag from text; ends the program if the text is not a value of its type. Numbers are read whole: "4k",
// "1e3" for a count, " 7", "nan", "0x10" and values that overflow are refused.
static void flag_set(Flags *f, const FlagSpec *s, const char *text) {
    char *end = NULL;
    const char *digits = s->type == FLAG_INT ? "-0123456789" : "-+.eE0123456789";
    int bounds_shown = s->type == FLAG_INT || s->high < 1e5;
    errno = 0;
    switch (s->type) {
        case FLAG_GROUP: break;
        case FLAG_TEXT:
            if (!*text && s->offset != offsetof(Flags, prompt))
                die(EXIT_USAGE, "--%s needs a value: %s", s->name, s->help);
            *flag_text(f, s) = text;
            break;
        case FLAG_CHOICE:
            if (!choice_allows(s->metavar, text))
                die(EXIT_USAGE, "--%s %s: must be one of %s", s->name, text, s->metavar);
            *flag_text(f, s) = text;
            break;
        case FLAG_SWITCH: *flag_int(f, s) = 1; break;
        case FLAG_INT:
        case FLAG_REAL: {
            double value;
            if (s->type == FLAG_INT) value = (double)(*flag_int(f, s) = strtoll(text, &end, 10));
            else value = *flag_real(f, s) = strtod(text, &end);
            int whole = *text && text[strspn(text, digits)] == 0 && end && *end == 0;
            int underflow = s->type == FLAG_REAL && fabs(value) < 1;  // strtod reports it, but 0 is near enough
            if (!whole || (errno == ERANGE && !underflow))
                die(EXIT_USAGE, "--%s '%s' is not a %s", s->name, text,
                    s->type == FLAG_INT ? "whole number" : "number");
            if (value >= s->low && value <= s->high) break;
            if (bounds_shown) die(EXIT_USAGE, "--%s %s is not in %g .. %.10g", s->name, text, s->low, s->high);
            die(EXIT_USAGE, "--%s %s is out of range; the least is %g", s->name, text, s->low);
        }
    }
}

// Prints words into lines of at most 110 columns that begin at `indent`; '~' is a space that no line ends at.
static void print_filled(const char *text, int indent) {
    int column = indent;
    while (*text) {
        int len = (int)strcspn(text, " ");
        if (column > indent && column + 1 + len > 110) {
            printf("\n%*s", indent, "");
            column = indent;
        }
        if (column > indent) putchar(' ');
        column += len + (column > indent);
        for (int k = 0; k < len; k++) putchar(text[k] == '~' ? ' ' : text[k]);
        text += len;
        while (*text == ' ') text++;
    }
    putchar('\n');
}

static void flags_help(const char *program) {
    printf(
        "Pretrains xLSTM language models. Flags are --name VALUE; of a flag given twice the last "
        "counts.\n\nExamples\n");
    printf(flags_examples, program, program, program, program, program);
    for (int k = 0; k < NUM_FLAGS; k++) {
        const FlagSpec *s = &flag_specs[k];
        if (s->type == FLAG_GROUP) {
            printf("\n%s\n", s->name);
            continue;
        }
        char left[64], right[512];
        format_into(left, sizeof left, "--%s %s", s->name, s->metavar ? s->metavar : "");
        if (s->initial) format_into(right, sizeof right, "%s (default:~%s)", s->help, s->initial);
        else if (s->type == FLAG_SWITCH) format_into(right, sizeof right, "%s (default:~off)", s->help);
        else if (strstr(s->help, "(default")) format_into(right, sizeof right, "%s", s->help);
        else format_into(right, sizeof right, "%s (default:~none)", s->help);
        printf("  %-24s", left);
        if (strlen(left) > 23) printf("\n%26s", "");
        print_filled(right, 26);
    }
    printf("\nExit codes: 0 done, 1 the run failed, 2 bad flag, file or place, 3 damaged file.\n");
}

// Reads the command line into *f. Returns only if every flag is known and every value is well-formed.
static void flags_parse(Flags *f, int argc, char **argv) {
    struct option options[NUM_FLAGS + 1];
    int count = 0;
    memset(f, 0, sizeof *f);
    memset(options, 0, sizeof options);
    for (int k = 0; k < NUM_FLAGS; k++) {
        const FlagSpec *s = &flag_specs[k];
        if (s->initial) flag_set(f, s, s->initial);
        if (s->type == FLAG_GROUP) continue;
        options[count].name = s->name;
        options[count].has_arg = s->type == FLAG_SWITCH ? no_argument : required_argument;
        options[count++].val = 1000 + k;
    }
    opterr = 0;
    optind = 1;
    while (optind < argc) {
        char *arg = argv[optind];
        int code = getopt_long(argc, argv, "+:h", options, NULL);
        if (code == 'h') {
            f->help = 1;
            continue;
        }
        int name_len = (int)strcspn(arg, "=");
        char name[64] = "";
        if (name_len < 64 && strncmp(arg, "--", 2) == 0) format_into(name, sizeof name, "%.*s", name_len - 2, arg + 2);
        int k = name[0] ? flag_index(name) : -1;  // getopt_long takes abbreviations; we want the whole name
        if (arg[0] != '-' || strcmp(arg, "--") == 0)
            die(EXIT_USAGE, "'%s' belongs to no flag; put patterns in quotes, see --help", arg);
        if (k < 0) die(EXIT_USAGE, "unknown flag %.*s; --help lists all", name_len, arg);
        if (code == '?') die(EXIT_USAGE, "--%s takes no value", name);
        const FlagSpec *s = &flag_specs[k];
        int swallowed = code != ':' && optarg && strncmp(optarg, "--", 2) == 0 && flag_index(optarg + 2) >= 0;
        if (code == ':' || swallowed) die(EXIT_USAGE, "--%s needs a value: %s", name, s->help);
        flag_set(f, s, optarg);
        f->given[k] = 1;
    }
}

// The value as one would type it.
static void flag_format(const Flags *f, const FlagSpec *s, char *dst, size_t size) {
    const char *at = (const char *)f + s->offset;
    switch (s->type) {
        case FLAG_GROUP: break;
        case FLAG_TEXT:
        case FLAG_CHOICE: snprintf(dst, size, "%s", *(const char *const *)at ? *(const char *const *)at : ""); break;
        case FLAG_INT: snprintf(dst, size, "%lld", (long long)*(const int64_t *)at); break;
        case FLAG_REAL: snprintf(dst, size, "%.10g", *(const double *)at); break;
        case FLAG_SWITCH: snprintf(dst, size, "%s", *(const int64_t *)at ? "on" : "off"); break;
    }
}

// The key of a flag in JSON: underscores instead of dashes.
static void flag_key(const FlagSpec *s, char *dst, size_t size) {
    format_into(dst, size, "%s", s->name);
    for (char *at = dst; *at; at++)
        if (*at == '-') *at = '_';
}

// 0: neither a default nor given, so there is no value to write.
static int flag_has_value(const Flags *f, int k) {
    const FlagSpec *s = &flag_specs[k];
    if (s->type == FLAG_GROUP) return 0;
    if (s->type == FLAG_SWITCH || s->initial || f->given[k]) return 1;
    return s->type == FLAG_INT && *(const int64_t *)((const char *)f + s->offset) != 0;  // worked out later
}

// Writes the flags as members of the JSON object that is open in w; only_recorded: those that shape the result.
static void flags_write_json(JsonWriter *w, const Flags *f, int only_recorded) {
    for (int k = 0; k < NUM_FLAGS; k++) {
        const FlagSpec *s = &flag_specs[k];
        const char *at = (const char *)f + s->offset;
        char key[64];
        if (!flag_has_value(f, k) || (only_recorded && !s->recorded)) continue;
        flag_key(s, key, sizeof key);
        switch (s->type) {
            case FLAG_GROUP: break;
            case FLAG_TEXT:
            case FLAG_CHOICE: json_write_string(w, key, *(const char *const *)at); break;
            case FLAG_INT: json_write_int(w, key, *(const int64_t *)at); break;
            case FLAG_REAL: json_write_double(w, key, *(const double *)at); break;
            case FLAG_SWITCH: json_write_bool(w, key, *(const int64_t *)at != 0); break;
        }
    }
}

// Compares flag k with what flags_write_json() wrote; 1 if they differ, and the old value as text in `was`.
static int flag_changed(const Flags *f, int k, const Json *recorded, char *was, size_t was_size) {
    const FlagSpec *s = &flag_specs[k];
    char key[64];
    Flags old;
    memset(&old, 0, sizeof old);
    flag_key(s, key, sizeof key);
    const Json *v = json_get(recorded, key);
    const char *text = json_get_string(v), *now = (const char *)f + s->offset;
    int boolean = 0, known = 0, same = 0;
    switch (s->type) {
        case FLAG_GROUP: return 0;
        case FLAG_TEXT:
        case FLAG_CHOICE:
            known = text != NULL;
            same = known && *(const char *const *)now && strcmp(text, *(const char *const *)now) == 0;
            *flag_text(&old, s) = text;
            break;
        case FLAG_INT:
            known = json_get_int(v, INT64_MIN, INT64_MAX, flag_int(&old, s));
            same = known && *flag_int(&old, s) == *(const int64_t *)now;
            break;
        case FLAG_REAL:
            known = json_get_double(v, flag_real(&old, s));
            same = known && *flag_real(&old, s) == *(const double *)now;
            break;
        case FLAG_SWITCH:
            known = json_get_bool(v, &boolean);
            *flag_int(&old, s) = boolean;
            same = known && (boolean != 0) == (*(const int64_t *)now != 0);
            break;
    }
    if (known) flag_format(&old, s, was, was_size);
    else snprintf(was, was_size, "not given");
    return known ? !same || !flag_has_value(f, k) : flag_has_value(f, k);
}

#endif
