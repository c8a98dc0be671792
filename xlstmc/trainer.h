// trainer.h: the training loop of both trainers. It owns the flags, the data order, the learning rate, accumulation,
// clipping, the guard against NaN, evaluation, samples, logs, checkpoints and signals; a Backend does the arithmetic.
//
// A run is a pure function of its flags and data: the samples, learning rate and random numbers of a step follow from
// the step's number, so a resumed run needs nothing but weights, moments, (with --carry-state) states and a few
// counters.
#ifndef XLSTMC_TRAINER_H
#define XLSTMC_TRAINER_H

#include <inttypes.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "backend.h"     // Backend, Batch, RunConfig, UpdateConfig
#include "checkpoint.h"  // config_read, weights_load, checkpoint_*, dump_write
#include "comm.h"        // comm, comm_start, comm_sum, comm_agree
#include "data.h"        // Dataset
#include "flags.h"       // Flags
#include "log.h"         // Log
#include "sampler.h"     // Sampler, TokenText

// Set by the Makefile; unknown when compiled by hand.
#ifndef BUILD_FLAGS
#define BUILD_FLAGS ""
#endif
#ifndef BUILD_GIT
#define BUILD_GIT ""
#endif

enum { MAX_SKIPPED_IN_A_ROW = 10 };

typedef struct {            // this rank's tokens of a micro-step; T: its segment
    int *inputs, *targets;  // [B, T]
    unsigned char *resets;  // [B, T] or NULL
    int64_t at;             // their place in the sequence of all training samples, -1: none
} Rows;

typedef struct {
    Flags flags;
    const Backend *backend;
    ModelConfig config;
    TensorTable table, states;
    Checkpoint checkpoint;
    Log log;
    Sampler sampler;
    Dataset train, val;
    int has_val;
    int batch, seq_len;          // B and T of a micro-step of one DP group
    int first, len;              // this rank's segment of a sequence: positions first .. first + len - 1
    int64_t sequences_per_step;  // S
    int eot;                     // --eot, -1: each file has its own
    char resume_dir[4096];       // checkpoint to continue from, "": none
    int locked;                  // this process holds --out
    // Where the run is
    int64_t step;     // steps done; one that was skipped counts, its samples are used up
    uint64_t tokens;  // tokens done: the position in the data
    int64_t skipped, skipped_in_a_row;
    int stop;            // several ranks: they have agreed that one got a signal to stop
    int64_t saved_step;  // -1: nothing saved
    Rows rows, next;     // of this micro-step; of the next one, read while a GPU computes
    float *dump_logits;  // --dump: [B, T of the segment, V]
} Trainer;

// ----------------------------------------------------------------------------------------------------------------
// Pure functions of the step

// Learning rate of the update that follows `step` updates.
static double schedule_lr(const Flags *f, int64_t step) {
    double peak = f->lr, end = f->lr * f->final_lr, at = (double)step, warmup = (double)f->warmup,
           steps = (double)f->steps;
    if (at < warmup) return peak * (at + 1) / warmup;
    if (strcmp(f->schedule, "constant") == 0) return peak;
    double from = warmup;  // where the decay begins
    if (strcmp(f->schedule, "wsd") == 0 && 0.8 * steps > from) from = 0.8 * steps;
    if (at < from) return peak;
    double progress = at < steps ? (at - from) / (steps - from) : 1;
    double left = strcmp(f->schedule, "linear") == 0 ? 1 - progress
                  : strcmp(f->schedule, "wsd") == 0  ? 1 - sqrt(progress)
                                                     : 0.5 * (1 + cos(3.14159265358979323846 * progress));
    return end + (peak - end) * left;
}

// Position of the next step's first sample in the training.
static uint64_t step_begins(const Trainer *t) { return t->tokens / (uint64_t)t->seq_len; }

// The sample at a position of the training: S of them a step, row by row. With --carry-state the samples are cut into S
// equal streams, each read in order; else the position runs through one permutation of all samples after another.
static uint64_t sample_at(const Trainer *t, uint64_t position) {
    uint64_t all = t->train.num_samples, S = (uint64_t)t->sequences_per_step;
    if (t->flags.carry_state) return position % S * (all / S) + position / S % (all / S);
    if (t->flags.no_shuffle) return position % all;
    return rng_permute((uint64_t)t->flags.seed, position / all, all, position % all);
}

// 1 if the streams of --carry-state are at their beginning.
static int streams_begin(const Trainer *t) {
    uint64_t S = (uint64_t)t->sequences_per_step;
    return t->tokens / (uint64_t)t->seq_len / S % (t->train.num_samples / S) == 0;
}

// ----------------------------------------------------------------------------------------------------------------
// Signals: the first SIGINT or SIGTERM lets the step finish, saves and ends with 0; the second ends at once.

static volatile sig_atomic_t stop_signals = 0;

static void on_stop_signal(int number) {
    if (stop_signals++) _exit(128 + number);
}

// Has a signal to stop come? Several ranks must decide alike: they do so in agree_to_stop(), which all of them call.
static int stopping(const Trainer *t) { return comm.size == 1 ? stop_signals != 0 : t->stop; }

static void agree_to_stop(Trainer *t) {
    if (comm.size > 1) t->stop |= comm_any(stop_signals != 0, "agreement on whether to stop");
}

static void catch_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_stop_signal;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

// ----------------------------------------------------------------------------------------------------------------
// Words for people

static void format_count(char *dst, size_t size, double value) {  // 1,234,567
    char digits[64];
    int len = snprintf(digits, sizeof digits, "%.0f", value), at = 0;
    for (int k = 0; k < len && at + 2 < (int)size; k++) {
        dst[at++] = digits[k];
        if ((len - 1 - k) % 3 == 0 && k + 1 < len) dst[at++] = ',';
    }
    dst[at] = 0;
}

// The shortest TYPE*N list of the blocks; cut with "..." if it does not fit.
static void format_blocks(const ModelConfig *c, char *dst, size_t size) {
    size_t at = 0;
    for (int b = 0, end; b < c->num_blocks; b = end) {
        char part[32];
        for (end = b; end < c->num_blocks && c->block_types[end] == c->block_types[b];) end++;
        int len = snprintf(part, sizeof part, "%s%s", b ? "," : "", block_type_names[c->block_types[b]]);
        if (end - b > 1) len += snprintf(part + len, sizeof part - (size_t)len, "*%d", end - b);
        if (at + (size_t)len + 4 > size) {
            strcpy(dst + at, "...");
            return;
        }
        strcpy(dst + at, part);
        at += (size_t)len;
    }
}

static int flush_stdout(void) {
    if (fflush(stdout) != 0) die(EXIT_USAGE, "standard output: %s", strerror(errno));
    return 0;
}

static void list_models(void) {
    for (int k = 0; k < NUM_PRESETS; k++) {
        ModelConfig c;
        model_preset(presets[k].name, &c);
        TensorTable table = model_table(&c);
        printf("%-14s %zu\n", presets[k].name, table.total);
        table_free(&table);
    }
}

// ----------------------------------------------------------------------------------------------------------------
// Checks, all before anything is allocated or written

static void check_flags(const Trainer *t) {
    const Flags *f = &t->flags;
    const char *const model_flags[3] = {"model", "load", "blocks"};
    for (int a = 0; a < 3; a++)
        for (int b = a + 1; b < 3; b++)
            if (flag_given(f, model_flags[a]) && flag_given(f, model_flags[b]))
                die(EXIT_USAGE, "--%s and --%s each name a model; give one of them", model_flags[a], model_flags[b]);
    if (comm.size % f->sp != 0)
        die(EXIT_USAGE,
            "--sp %" PRId64
            " does not divide the number of ranks, %d; ranks come from mpirun, e.g. mpirun -np %" PRId64,
            f->sp, comm.size, f->sp);
    if (f->sp > 1 && f->seq_len < 3 * f->sp)
        die(EXIT_USAGE, "--seq-len %" PRId64 " is less than 3 tokens for each of --sp %" PRId64 " ranks", f->seq_len,
            f->sp);
    if (comm.size > 1 && !t->backend->reduce_grads)
        die(EXIT_USAGE, "this program runs as one process; leave out mpirun");
    if (comm.size > 1 && f->generate) die(EXIT_USAGE, "--generate runs as one process; leave out mpirun");
    if (strcmp(t->backend->name, "cpu") == 0 && f->precision && strcmp(f->precision, "fp32") != 0)
        die(EXIT_USAGE, "--precision %s: the CPU trainer computes in fp32 only; leave the flag out", f->precision);
    if (strcmp(t->backend->name, "cpu") != 0 && flag_given(f, "chunk"))
        fprintf(stderr, "note: --chunk %" PRId64 " has no effect: on a GPU the kernels have their own chunk length\n",
                f->chunk);
    if (f->resume && !f->out) die(EXIT_USAGE, "--resume needs --out DIR, the run to continue");
    if (f->generate && f->dump) die(EXIT_USAGE, "--generate and --dump exclude each other; give one of them");
    if (f->generate && !f->load && !f->resume)
        die(EXIT_USAGE, "--generate needs trained weights: --load DIR, or --out DIR --resume");
    if (!f->generate && !f->train)
        die(EXIT_USAGE,
            "--train is missing: name text files (*.txt) or token shards (*.bin), e.g. --train book.txt; see --help");
    if (f->batch * (f->seq_len / f->sp + 1) > INT32_MAX)
        die(EXIT_USAGE,
            "--batch %" PRId64 " x --seq-len %" PRId64
            " are more tokens than a micro-step can hold; lower --batch and set "
            "--tokens-per-step",
            f->batch, f->seq_len);
}

// The nearest directory above `path` that exists, in `parent` [4096]; "." for a relative path without one.
static void nearest_parent(const char *path, char *parent) {
    struct stat info;
    format_into(parent, 4096, "%s", path);
    do {
        size_t len = strlen(parent);
        while (len > 0 && parent[len - 1] == '/') len--;
        while (len > 0 && parent[len - 1] != '/') len--;
        parent[len] = 0;
    } while (parent[0] && stat(parent, &info) != 0 && errno == ENOENT);
    if (!parent[0]) strcpy(parent, ".");
}

// --dump: a file in a directory that is there and writable.
static void check_dump(const char *path) {
    struct stat info;
    if (stat(path, &info) == 0) {
        if (!S_ISREG(info.st_mode)) die(EXIT_USAGE, "--dump %s is not a regular file; name another", path);
        return;
    }
    const char *slash = strrchr(path, '/');
    char folder[4096];
    format_into(folder, sizeof folder, "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
    if (access(folder, W_OK | X_OK) != 0)
        die(EXIT_USAGE, "--dump %s cannot be written: %s: %s", path, folder, strerror(errno));
}

// S, the sequences an update reads: a multiple of the batch times the groups that each read one.
static void resolve_batch(Trainer *t) {
    Flags *f = &t->flags;
    int64_t micro = f->batch * f->seq_len * comm.dp_size;
    char groups[48] = "";
    if (comm.dp_size > 1) format_into(groups, sizeof groups, " x %d groups of ranks", comm.dp_size);
    t->batch = (int)f->batch;
    t->seq_len = (int)f->seq_len;
    t->first = segment_begin(t->seq_len, comm.sp_size, comm.sp_rank);
    t->len = segment_begin(t->seq_len, comm.sp_size, comm.sp_rank + 1) - t->first;
    t->eot = flag_given(f, "eot") ? (int)f->eot : -1;
    if (!flag_given(f, "tokens-per-step")) f->tokens_per_step = micro;
    if (f->tokens_per_step % micro != 0) {
        int64_t below = f->tokens_per_step / micro * micro;
        char nearest[64];
        if (below > 0) format_into(nearest, sizeof nearest, "%" PRId64 " or %" PRId64, below, below + micro);
        else format_into(nearest, sizeof nearest, "%" PRId64, micro);
        die(EXIT_USAGE,
            "--tokens-per-step %" PRId64 " is not a multiple of --batch %" PRId64 " x --seq-len %" PRId64
            "%s = %" PRId64 "; nearest: %s",
            f->tokens_per_step, f->batch, f->seq_len, groups, micro, nearest);
    }
    t->sequences_per_step = f->tokens_per_step / f->seq_len;
    if (f->carry_state) f->no_shuffle = 1;
}

// --out must be a new or empty place, or a run to resume, and writable.
static void check_out(const Trainer *t) {
    const char *out = t->flags.out;
    struct stat info;
    if (!out || comm.rank != 0) return;
    if (stat(out, &info) == 0) {
        if (!S_ISDIR(info.st_mode)) die(EXIT_USAGE, "--out %s is a file; name a directory", out);
        if (!t->flags.resume && checkpoint_holds_run(out))
            die(EXIT_USAGE, "--out %s holds a run; add --resume to continue it, or name another directory", out);
        if (access(out, W_OK | X_OK) != 0) die(EXIT_USAGE, "--out %s: %s", out, strerror(errno));
        return;
    }
    if (errno != ENOENT) die(EXIT_USAGE, "--out %s: %s", out, strerror(errno));
    char parent[4096];
    nearest_parent(out, parent);
    if (access(parent, W_OK | X_OK) != 0)
        die(EXIT_USAGE, "--out %s cannot be made: %s: %s", out, parent, strerror(errno));
}

static void lock_out(Trainer *t) {
    char why[1024] = "";
    if (t->locked || !t->flags.out) return;
    int code = comm.rank == 0 ? checkpoint_lock(t->flags.out, why, sizeof why) : 0;
    code = comm_agree(code, why, sizeof why, "taking --out");
    if (code != 0) die(code, "%s", why);
    t->locked = 1;
}

// --resume: finds the newest valid checkpoint and takes the lock of a run that is to be continued.
static void find_checkpoint(Trainer *t) {
    const Flags *f = &t->flags;
    char why[1024] = "";
    int step = -1, there;
    struct stat info;
    t->saved_step = -1;
    if (!f->resume) return;
    there = stat(f->out, &info) == 0;
    comm_broadcast(&there, sizeof there, "looking for a checkpoint");
    if (there) {
        if (!f->generate && !f->dump) lock_out(t);
        int code = checkpoint_latest(f->out, t->resume_dir, sizeof t->resume_dir, &step, why, sizeof why);
        if (code != 0) die(code, "%s", why);
    }
    if (step >= 0) t->step = t->saved_step = step;
    else t->resume_dir[0] = 0;
    if (step < 0 && f->generate)
        die(EXIT_USAGE, "--out %s holds no checkpoint to generate from; train first, or give --load DIR", f->out);
    if (step < 0) printf("%s holds no checkpoint: starting at step 0\n", f->out);
}

// The flags that shape a model must agree with a model that is already fixed.
static void check_shape_flags(const Flags *f, const ModelConfig *c, const char *model) {
    struct {
        const char *name;
        int64_t asked;
        int has;
    } sizes[] = {{"dim", f->dim, c->hidden_size},
                 {"heads", f->heads, c->num_heads},
                 {"vocab", f->vocab, c->vocab_size},
                 {"ffn", f->ffn, c->ffn_dim}};
    for (size_t k = 0; k < sizeof sizes / sizeof sizes[0]; k++)
        if (flag_given(f, sizes[k].name) && sizes[k].asked != sizes[k].has)
            die(EXIT_USAGE, "--%s %" PRId64 ": %s has %d; leave the flag out", sizes[k].name, sizes[k].asked, model,
                sizes[k].has);
    const char *gate = c->sigmoid_gate ? "sig" : "exp";
    if (flag_given(f, "gate") && strcmp(f->gate, gate) != 0)
        die(EXIT_USAGE, "--gate %s: %s has %s; leave the flag out", f->gate, model, gate);
}

static int vocab_of_data(const Trainer *t) {
    if (t->train.num_files == 0 || t->train.all_text) return 256;
    return t->train.header_vocab > 0 ? t->train.header_vocab : 50304;
}

// The model that --model, --load or --blocks and the flags beside them describe.
static void model_from_flags(const Trainer *t, ModelConfig *c) {
    const Flags *f = &t->flags;
    char why[1024];
    if (f->load) {
        int code = config_read(f->load, c, why, sizeof why);
        if (code != 0) die(code, "%s", why);
        check_shape_flags(f, c, f->load);
        return;
    }
    if (f->blocks) {
        model_defaults(c);
        if (!model_parse_blocks(f->blocks, c, why, sizeof why)) die(EXIT_USAGE, "--blocks %.200s: %s", f->blocks, why);
        c->hidden_size = (int)f->dim;
        c->num_heads = (int)f->heads;
        c->ffn_dim = model_default_ffn(c->hidden_size);
    } else if (!model_preset(f->model, c)) {
        die(EXIT_USAGE, "--model %.100s: there is no such preset; --list-models prints all", f->model);
    } else if (flag_given(f, "dim") || flag_given(f, "heads")) {
        const char *flag = flag_given(f, "dim") ? "dim" : "heads";
        die(EXIT_USAGE, "--%s shapes a --blocks model; the preset %s has its own", flag, f->model);
    }
    if (f->blocks || !flag_given(f, "model")) c->vocab_size = vocab_of_data(t);
    if (flag_given(f, "vocab")) c->vocab_size = (int)f->vocab;
    if (flag_given(f, "ffn")) c->ffn_dim = (int)f->ffn;
    c->sigmoid_gate = strcmp(f->gate, "sig") == 0;
}

// Fills t->config. A resumed run has its checkpoint's model; flags that say otherwise are refused.
static void resolve_model(Trainer *t) {
    const Flags *f = &t->flags;
    ModelConfig asked;
    char why[1024], message[1024];
    const char *name = f->load ? "load" : f->blocks ? "blocks" : "model";
    int named = flag_given(f, name);
    if (t->resume_dir[0]) {
        int code = config_read(t->resume_dir, &t->config, why, sizeof why);
        if (code != 0) die(code, "%s", why);
        check_shape_flags(f, &t->config, t->resume_dir);
    }
    if (named || !t->resume_dir[0]) {
        model_from_flags(t, &asked);
        if (t->resume_dir[0] && !flag_given(f, "vocab") && !f->load) asked.vocab_size = t->config.vocab_size;
        if (!model_check(&asked, message, sizeof message)) die(EXIT_USAGE, "%s", message);
        if (t->resume_dir[0] && !config_same(&asked, &t->config, why, sizeof why))
            die(EXIT_USAGE, "--%s is another model than %s: %s; leave the flag out, or train it in a new --out", name,
                t->resume_dir, why);
        if (!t->resume_dir[0]) t->config = asked;
    }
    if (!model_check(&t->config, message, sizeof message)) die(EXIT_USAGE, "%s", message);
    int bytes = tokens_are_bytes(t->config.vocab_size);
    if (f->prompt && !bytes)
        die(EXIT_USAGE, "--prompt needs a model of bytes (vocabulary 256 or 257); this one's is %d",
            t->config.vocab_size);
    if (t->eot >= t->config.vocab_size)
        die(EXIT_USAGE, "--eot %d is not in the vocabulary of %d; change --eot or --vocab", t->eot,
            t->config.vocab_size);
    t->table = model_table(&t->config);
    t->states = model_state_table(&t->config);
}

static void open_data(Trainer *t) {
    const Flags *f = &t->flags;
    dataset_open(&t->train, "--train", f->train, t->seq_len);
    t->has_val = f->val != NULL && !f->dump;
    if (t->has_val) dataset_open(&t->val, "--val", f->val, t->seq_len);
    if (f->carry_state && t->train.num_samples < (uint64_t)t->sequences_per_step)
        die(EXIT_USAGE,
            "--carry-state cuts the data into %" PRId64 " streams, but there are only %" PRIu64
            " samples of %d tokens; lower --tokens-per-step, --batch or --seq-len",
            t->sequences_per_step, t->train.num_samples, t->seq_len);
}

// ----------------------------------------------------------------------------------------------------------------
// The plan, printed before anything is allocated

static void print_data(const char *title, const Dataset *d) {
    char tokens[64], samples[64];
    format_count(tokens, sizeof tokens, (double)d->num_tokens);
    format_count(samples, sizeof samples, (double)d->num_samples);
    printf("%-11s %d file%s, %s tokens, %s samples of %d\n", title, d->num_files, d->num_files == 1 ? "" : "s", tokens,
           samples, d->seq_len);
}

static void print_model(const Trainer *t) {
    const Flags *f = &t->flags;
    const ModelConfig *c = &t->config;
    char blocks[160], weights[64];
    format_blocks(c, blocks, sizeof blocks);
    format_count(weights, sizeof weights, (double)t->table.total);
    const char *name = t->resume_dir[0] ? t->resume_dir : f->load ? f->load : f->blocks ? "" : f->model;
    printf("%-11s %s%s%s, width %d, %d heads, vocabulary %d%s\n", "model", name, name[0] ? ": " : "", blocks,
           c->hidden_size, c->num_heads, c->vocab_size, c->sigmoid_gate ? ", sigmoid gates" : "");
    printf("%-11s %s in %d tensors, %.1f MFLOP a token\n", "parameters", weights, t->table.num_tensors,
           1e-6 * model_flops_per_token(c, &t->table));
}

static void print_ranks(const Trainer *t) {
    int hosts = 0;
    for (int r = 0, seen; r < comm.size; r++) {
        seen = 0;
        for (int other = 0; other < r; other++) seen |= strcmp(comm.peers[r].host, comm.peers[other].host) == 0;
        hosts += !seen;
    }
    printf("%-11s %d on %d host%s", "ranks", comm.size, hosts, hosts == 1 ? "" : "s");
    if (comm.sp_size > 1)
        printf(", %d group%s of %d that share a sequence", comm.dp_size, comm.dp_size == 1 ? "" : "s", comm.sp_size);
    printf(", moments %s\n", t->flags.zero ? "spread over all" : "on each");
}

static void print_plan(const Trainer *t) {
    const Flags *f = &t->flags;
    char tokens[64], keep[64];
    int64_t micro_steps = t->sequences_per_step / t->batch / comm.dp_size;
    print_model(t);
    print_data("train", &t->train);
    if (t->has_val) print_data("val", &t->val);
    format_count(tokens, sizeof tokens, (double)f->tokens_per_step);
    printf("%-11s %s tokens: %" PRId64 " micro-step%s of %d sequences of %d\n", "step", tokens, micro_steps,
           micro_steps == 1 ? "" : "s", t->batch * comm.dp_size, t->seq_len);
    if (comm.size > 1) print_ranks(t);
    double epochs = (double)f->steps * (double)t->sequences_per_step / (double)t->train.num_samples;
    printf("%-11s steps %" PRId64 " to %" PRId64 " (%.2f epochs in all), %s, lr %g, warm-up %" PRId64 "\n", "plan",
           t->step + 1, f->steps, epochs, f->schedule, f->lr, f->warmup);
    if (!f->out) {
        printf("%-11s none: nothing is written without --out\n", "output");
    } else {
        if (f->keep) format_into(keep, sizeof keep, "the newest %" PRId64 " kept", f->keep);
        else format_into(keep, sizeof keep, "all kept");
        printf("%-11s %s, checkpoints of %.1f MiB, %s\n", "output", f->out,
               (double)t->table.total * 3 * sizeof(float) / 1048576.0, keep);
    }
    fflush(stdout);
}

// ----------------------------------------------------------------------------------------------------------------
// Weights and the record of where a run is

static int num_threads(const Flags *f) {
    if (f->threads) return (int)f->threads;
    const char *variable = getenv("OMP_NUM_THREADS");  // may be a list, one number a nesting level
    long asked = variable ? strtol(variable, NULL, 10) : 0;
    if (asked >= 1 && asked <= 4096) return (int)asked;
#ifdef _OPENMP
    int cores = omp_get_num_procs(), bound = cores < (int)sysconf(_SC_NPROCESSORS_ONLN);  // mpirun gave us our own
    return bound || cores < comm.local_size ? (bound ? cores : 1) : cores / comm.local_size;
#else
    return 1;
#endif
}

static void build_backend(Trainer *t, int max_batch, int max_len, int training) {
    const Flags *f = &t->flags;
    RunConfig run;
    memset(&run, 0, sizeof run);
    run.max_batch = max_batch;
    run.max_len = max_len;
    run.num_state_rows = training && f->carry_state ? (int)t->sequences_per_step / comm.dp_size : 0;
    run.training = training;
    run.recompute = strcmp(f->recompute, "block") == 0;
    run.bf16 = strcmp(t->backend->name, "cpu") != 0 && !(f->precision && strcmp(f->precision, "fp32") == 0);
    run.threads = num_threads(f);
    run.chunk = f->chunk ? (int)f->chunk : t->config.chunk_size;
    run.zero = (int)f->zero;
    t->backend->build(&t->config, &t->table, &run);
    t->checkpoint.out = f->out;
    t->checkpoint.config = &t->config;
    t->checkpoint.table = &t->table;
    t->checkpoint.states = &t->states;
    t->checkpoint.num_state_rows = run.num_state_rows * comm.dp_size;
    t->checkpoint.batch = t->batch;
    t->checkpoint.backend = t->backend;
    t->checkpoint.save_bf16 = strcmp(f->save_dtype, "bf16") == 0;
    t->checkpoint.keep = (int)f->keep;
}

// The text of trainer.json: nothing in it depends on the machine, the clock, the micro-batch or what was looked at on
// the way, so equal runs write equal bytes.
static void trainer_json(const Trainer *t, JsonWriter *w) {
    memset(w, 0, sizeof *w);
    w->indent = 2;
    json_begin(w, NULL, '{');
    json_write_int(w, "step", t->step);
    json_write_uint(w, "tokens", t->tokens);
    json_write_int(w, "skipped", t->skipped);
    json_write_int(w, "skipped_in_a_row", t->skipped_in_a_row);
    json_begin(w, "flags", '{');
    flags_write_json(w, &t->flags, 1);
    json_end(w, '}');
    dataset_write_fingerprint(&t->train, w, "train");
    json_end(w, '}');
}

// Takes over the counters of the checkpoint's trainer.json and reports every flag and file that is not what it was.
// Before anything is allocated: states of --carry-state fit only the same streams.
static void read_trainer_json(Trainer *t) {
    Flags *f = &t->flags;
    char path[4200], why[1024], *text;
    size_t len;
    int64_t step;
    format_into(path, sizeof path, "%s/trainer.json", t->resume_dir);
    int code = file_read_text(path, 1 << 24, &text, &len, why, sizeof why);
    if (code != 0) die(code, "%s", why);
    Json *v = json_parse(text, len, why, sizeof why);
    if (!v) die(EXIT_DAMAGED, "%s: %s", path, why);
    if (!json_get_int(json_get(v, "step"), t->step, t->step, &step) ||
        !json_get_uint(json_get(v, "tokens"), &t->tokens) ||
        !json_get_int(json_get(v, "skipped"), 0, step, &t->skipped) ||
        !json_get_int(json_get(v, "skipped_in_a_row"), 0, step, &t->skipped_in_a_row))
        die(EXIT_DAMAGED, "%s: step, tokens or skipped is missing or wrong; remove %s to continue from the one before",
            path, t->resume_dir);
    const Json *flags = json_get(v, "flags");
    const char *const streams[] = {"seq-len", "tokens-per-step"};
    int carried = 0, differ = 0;
    json_get_bool(json_get(flags, "carry_state"), &carried);
    for (int k = 0; k < NUM_FLAGS; k++) {
        char was[256], now[256];
        if (!flag_specs[k].recorded || !flag_changed(f, k, flags, was, sizeof was)) continue;
        flag_format(f, &flag_specs[k], now, sizeof now);
        for (int s = 0; s < 2 && carried && f->carry_state; s++)
            if (strcmp(flag_specs[k].name, streams[s]) == 0)
                die(EXIT_USAGE, "--%s %s: the states in %s are those of %s; with --carry-state it cannot change",
                    streams[s], now, t->resume_dir, was);
        printf("%-11s --%s: %s in the checkpoint, now %s\n", "changed", flag_specs[k].name, was,
               flag_has_value(f, k) ? now : "not given");
    }
    differ = !dataset_matches(&t->train, json_get(v, "train"), why, sizeof why);
    if (differ) printf("%-11s --train: other data than in the checkpoint: %s\n", "changed", why);
    json_free(v);
    free(text);
}

// Initial, loaded or saved weights into the backend; moments and states too if a run is continued.
static void fill_backend(Trainer *t, int training) {
    char why[1024], *text = NULL;
    int resumed = t->resume_dir[0] != 0, code = 0;
    const char *weights = resumed ? t->resume_dir : t->flags.load;
    if (resumed && training) code = checkpoint_load(&t->checkpoint, t->resume_dir, &text, why, sizeof why);
    else if (weights) code = weights_load(weights, &t->config, &t->table, t->backend, why, sizeof why);
    if (code != 0) die(code, "%s", why);
    free(text);
    if (weights) return;
    size_t largest = 0;
    for (int k = 0; k < t->table.num_tensors; k++)
        if (t->table.tensors[k].count > largest) largest = t->table.tensors[k].count;
    float *values = (float *)xcalloc(largest, sizeof(float));
    for (int k = 0; k < t->table.num_tensors; k++) {
        tensor_init(&t->config, &t->table, k, (uint64_t)t->flags.seed, values);
        t->backend->write_tensor(KIND_WEIGHT, k, values);
    }
    free(values);
}

static void save_checkpoint(Trainer *t) {
    JsonWriter w, line;
    char why[1024];
    if (!t->flags.out || t->saved_step == t->step) return;
    double start = now_seconds();
    trainer_json(t, &w);
    int code = checkpoint_save(&t->checkpoint, (int)t->step, w.text, why, sizeof why);
    json_writer_free(&w);
    if (code != 0) {
        log_clear_live(&t->log);
        die(code, "%s", why);
    }
    t->saved_step = t->step;
    double seconds = now_seconds() - start, mib = (double)t->checkpoint.bytes_written / 1048576.0;
    log_line(&t->log, "saved %s/step_%08" PRId64 " (%.1f MiB in %.2f s)", t->flags.out, t->step, mib, seconds);
    log_begin(&line);
    json_write_int(&line, "step", t->step);
    json_write_uint(&line, "saved_bytes", t->checkpoint.bytes_written);
    log_number(&line, "seconds", seconds);
    log_end(&t->log, &line);
}

// ----------------------------------------------------------------------------------------------------------------
// One step

static void alloc_rows(const Trainer *t, Rows *r) {
    size_t tokens = (size_t)t->batch * (size_t)t->len;
    r->inputs = (int *)xcalloc(tokens, sizeof(int));
    r->targets = (int *)xcalloc(tokens, sizeof(int));
    if (t->flags.reset_docs) r->resets = (unsigned char *)xcalloc(tokens, 1);
    r->at = -1;
}

static void load_row(const Trainer *t, Rows *r, const Dataset *d, uint64_t sample, int row) {
    size_t at = (size_t)row * (size_t)t->len;
    dataset_read_segment(d, sample, t->first, t->len, r->inputs + at, r->targets + at,
                         r->resets ? r->resets + at : NULL, t->eot);
}

static void load_rows(const Trainer *t, Rows *r, int64_t at) {
    for (int row = 0; row < t->batch; row++) load_row(t, r, &t->train, sample_at(t, (uint64_t)(at + row)), row);
    r->at = at;
}

static void load_next(void *trainer) {
    Trainer *t = (Trainer *)trainer;
    load_rows(t, &t->next, t->rows.at + t->batch * comm.dp_size);
}

static Batch batch_of(const Trainer *t, int rows) {
    Batch b;
    memset(&b, 0, sizeof b);
    b.B = rows;
    b.T = t->len;
    b.whole = comm.sp_size > 1 ? t->seq_len : 0;
    b.inputs = t->rows.inputs;
    b.targets = t->rows.targets;
    b.resets = t->rows.resets;
    b.state_row = -1;
    return b;
}

static void fresh_states(Trainer *t) {
    for (int64_t row = 0; row < t->sequences_per_step / comm.dp_size; row++) t->backend->write_state((int)row, NULL);
}

// Where row `first` of a step's micro-step begins for a DP group: each group takes B rows in turn, so that the order of
// samples does not depend on the number of ranks.
static int64_t rows_begin(const Trainer *t, int64_t first, int dp_rank) {
    return (int64_t)step_begins(t) + first + (int64_t)dp_rank * t->batch;
}

// --dump: this rank's logits of a micro-step [B, T of its segment, V] to their place among those of all [S, T, V].
static void place_logits(const Trainer *t, float *logits, int64_t row) {
    size_t V = (size_t)t->config.vocab_size, width = (size_t)t->len * V;
    for (int b = 0; b < t->batch; b++)
        memcpy(logits + ((size_t)(row + b) * (size_t)t->seq_len + (size_t)t->first) * V,
               t->dump_logits + (size_t)b * width, width * sizeof(float));
}

// Forward and backward over the S sequences of the next step; the mean loss. logits [S, T, V] may be NULL. All targets
// count, so 1 / tokens is their weight on every rank, whatever its share.
static double accumulate_gradients(Trainer *t, float *logits) {
    double sum = 0, scale = 1.0 / (double)t->flags.tokens_per_step;
    int64_t together = (int64_t)t->batch * comm.dp_size;
    if (t->flags.carry_state && streams_begin(t)) fresh_states(t);
    t->backend->zero_grad();
    for (int64_t first = 0; first < t->sequences_per_step; first += together) {
        int64_t at = rows_begin(t, first, comm.dp_rank);
        if (t->next.at == at) {
            Rows read = t->next;
            t->next = t->rows;
            t->rows = read;
        } else {
            load_rows(t, &t->rows, at);
        }
        Batch batch = batch_of(t, t->batch);
        batch.meanwhile = load_next;
        batch.meanwhile_arg = t;
        batch.last_of_step = first + together == t->sequences_per_step;
        if (t->flags.carry_state) batch.state_row = (int)(first / comm.dp_size);
        if (logits) batch.logits = t->dump_logits;
        sum += t->backend->forward_backward(&batch, scale);
        if (logits) place_logits(t, logits, at - (int64_t)step_begins(t));
    }
    if (comm.size > 1) t->backend->reduce_grads();
    comm_sum(&sum, 1, "sum of the losses");
    return sum * scale;
}

// One update. A loss or gradient that is not finite leaves weights and moments as they are; the samples count as read.
static void train_step(Trainer *t) {
    const Flags *f = &t->flags;
    double start = now_seconds(), lr = schedule_lr(f, t->step);
    comm.step = t->step + 1;
    double loss = accumulate_gradients(t, NULL), norm = t->backend->grad_norm();
    int finite = isfinite(loss) && isfinite(norm);
    if (finite) {
        UpdateConfig update = {(int)(t->step - t->skipped + 1), lr, f->beta1, f->beta2, f->eps, f->weight_decay, 1.0};
        if (f->clip > 0 && norm > f->clip) update.grad_scale = f->clip / norm;
        t->backend->update(&update);
    } else if (f->carry_state) {
        fresh_states(t);  // they may hold what made the loss infinite
    }
    t->step++;
    t->tokens += (uint64_t)f->tokens_per_step;
    t->skipped += !finite;
    t->skipped_in_a_row = finite ? 0 : t->skipped_in_a_row + 1;
    agree_to_stop(t);
    double seconds = now_seconds() - start;
    JsonWriter line;
    log_begin(&line);
    json_write_int(&line, "step", t->step);
    log_number(&line, "loss", loss);
    log_number(&line, "lr", lr);
    log_number(&line, "grad_norm", norm);
    log_number(&line, "tok_s", (double)f->tokens_per_step / seconds);
    log_number(&line, "ms", 1e3 * seconds);
    json_write_uint(&line, "tokens", t->tokens);
    if (!finite) json_write_bool(&line, "skipped", 1);
    log_end(&t->log, &line);
    log_scalar(&t->log, t->step, "train/loss", loss);
    log_scalar(&t->log, t->step, "train/lr", lr);
    log_scalar(&t->log, t->step, "train/grad_norm", norm);
    log_scalar(&t->log, t->step, "train/tok_s", (double)f->tokens_per_step / seconds);
    log_step_line(&t->log, t->step, loss, lr, norm, seconds, (double)f->tokens_per_step);
    if (!finite)
        log_line(&t->log, "step %" PRId64 ": loss %g, gradient norm %g: update skipped, weights unchanged", t->step,
                 loss, norm);
    if (t->skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW)
        die(EXIT_RUN, "loss or gradient not finite in %d steps in a row, up to step %" PRId64 "; %s; lower --lr",
            MAX_SKIPPED_IN_A_ROW, t->step,
            t->saved_step >= 0 ? "the last checkpoint is kept, --resume continues from it" : "nothing was saved");
}

// ----------------------------------------------------------------------------------------------------------------
// Looking at the model on the way: no effect on training

// Mean loss over samples spread evenly over --val; the DP groups take B of them in turn. A signal ends it without a
// result.
static void evaluate(Trainer *t) {
    const Flags *f = &t->flags;
    uint64_t all = t->val.num_samples, count = (uint64_t)f->eval_batches * (uint64_t)t->batch;
    if (count == 0 || count > all) count = all;
    double start = now_seconds(), sum = 0;
    for (uint64_t step = 0; step < count; step += (uint64_t)t->batch * (uint64_t)comm.dp_size) {
        uint64_t first = step + (uint64_t)t->batch * (uint64_t)comm.dp_rank, left = first < count ? count - first : 0;
        int rows = left < (uint64_t)t->batch ? (int)left : t->batch;
        for (int row = 0; row < rows; row++) {
            uint64_t k = first + (uint64_t)row;
            load_row(t, &t->rows, &t->val, k * (all / count) + k * (all % count) / count, row);
        }
        Batch batch = batch_of(t, rows);
        if (rows > 0) sum += t->backend->evaluate(&batch);
        agree_to_stop(t);
        if (stopping(t)) return;
    }
    comm_sum(&sum, 1, "sum of the validation losses");
    double tokens = (double)count * t->seq_len, seconds = now_seconds() - start;
    JsonWriter line;
    log_begin(&line);
    json_write_int(&line, "step", t->step);
    log_number(&line, "val_loss", sum / tokens);
    log_number(&line, "val_tokens", tokens);
    log_number(&line, "seconds", seconds);
    log_end(&t->log, &line);
    log_scalar(&t->log, t->step, "val/loss", sum / tokens);
    char at[64];
    format_step(&t->log, t->step, at, sizeof at);
    log_line(&t->log, "%s  val loss %.4f  (%.1f s)", at, sum / tokens, seconds);
}

// Writes --prompt and up to `count` tokens to `out`; returns how many came (an end-of-text token ends bytes early).
static int64_t generate(Trainer *t, FILE *out, int64_t count, uint64_t stream) {
    const char *prompt = t->flags.prompt && t->flags.prompt[0] ? t->flags.prompt : NULL;
    int vocab = t->config.vocab_size, live = isatty(fileno(out));
    int start = vocab == 257              ? BYTE_EOT
                : tokens_are_bytes(vocab) ? '\n'
                : t->eot >= 0             ? t->eot
                : vocab > 50256           ? 50256
                                          : 0;
    float *logits = (float *)xcalloc((size_t)vocab, sizeof(float));
    char piece[TOKEN_TEXT_MAX];
    TokenText text;
    memset(&text, 0, sizeof text);
    text.vocab = vocab;
    t->backend->decode_start();
    if (!prompt) t->backend->decode_step(start, logits);
    for (const char *at = prompt; at && *at; at++) {
        if (token_text(&text, (unsigned char)*at, piece)) fputs(piece, out);
        t->backend->decode_step((unsigned char)*at, logits);
    }
    int64_t done = 0;
    while (done < count && !stop_signals) {
        double u = rng_uniform((uint64_t)t->flags.seed, RNG_SAMPLE, stream, (uint64_t)done);
        int token = sampler_pick(&t->sampler, logits, u);
        if (vocab == 257 && token == BYTE_EOT) break;
        if (token_text(&text, token, piece)) fputs(piece, out);
        if (live) fflush(out);
        if (++done < count) t->backend->decode_step(token, logits);
    }
    if (token_text_end(&text, piece)) fputs(piece, out);
    free(logits);
    return done;
}

static void print_sample(Trainer *t) {
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    if (!out) die(EXIT_RUN, "out of memory");
    generate(t, out, t->flags.sample_len, (uint64_t)t->step);
    if (fclose(out) != 0) die(EXIT_RUN, "out of memory");
    log_line(&t->log, "---- sample at step %" PRId64 "\n%s\n----", t->step, text);
    JsonWriter line;
    log_begin(&line);
    json_write_int(&line, "step", t->step);
    json_write_string(&line, "sample", text);
    log_end(&t->log, &line);
    free(text);
}

// ----------------------------------------------------------------------------------------------------------------
// What the program does

// log.jsonl begins with everything that decides the run; a resumed run adds the same under the step it starts from.
static void open_log(Trainer *t) {
    const Flags *f = &t->flags;
    const ModelConfig *c = &t->config;
    char blocks[4096];
    log_start(&t->log, t->step, f->steps);
    if (comm.size > 1) t->log.tty = 0;  // mpirun gives every rank a terminal, whatever it has itself
    if (!f->out || comm.rank != 0) return;
    int64_t resumed = t->resume_dir[0] ? t->step : -1;
    int first = log_open_json(&t->log, f->out, resumed);
    log_open_events(&t->log, f->out, resumed);
    Flags resolved = *f;  // the defaults that were worked out, too
    int on_cpu = strcmp(t->backend->name, "cpu") == 0;
    if (f->load || f->blocks) resolved.model = "";
    if (!f->precision) resolved.precision = on_cpu ? "fp32" : "bf16";
    resolved.given[flag_index("precision")] = 1;
    resolved.dim = c->hidden_size;
    resolved.heads = c->num_heads;
    resolved.vocab = c->vocab_size;
    resolved.ffn = c->ffn_dim;
    resolved.threads = num_threads(f);
    resolved.chunk = !on_cpu ? 0 : f->chunk ? f->chunk : c->chunk_size;  // 0: not written, a GPU does not use it
    if (!on_cpu) resolved.given[flag_index("chunk")] = 0;
    JsonWriter line;
    log_begin(&line);
    if (!first) json_write_int(&line, "resume", t->step);
    json_begin(&line, "config", '{');
    flags_write_json(&line, &resolved, 0);
    json_end(&line, '}');
    format_blocks(c, blocks, sizeof blocks);
    json_begin(&line, "model", '{');
    json_write_string(&line, "blocks", blocks);
    json_write_int(&line, "vocab_size", c->vocab_size);
    json_write_int(&line, "hidden_size", c->hidden_size);
    json_write_int(&line, "num_blocks", c->num_blocks);
    json_write_int(&line, "num_heads", c->num_heads);
    json_write_int(&line, "ffn_dim", c->ffn_dim);
    json_write_int(&line, "chunk_size", c->chunk_size);
    json_write_double(&line, "qk_dim_factor", c->qk_dim_factor);
    json_write_double(&line, "v_dim_factor", c->v_dim_factor);
    json_write_double(&line, "norm_eps", c->norm_eps);
    json_write_double(&line, "eps", c->eps);
    json_write_double(&line, "gate_soft_cap", c->gate_soft_cap);
    json_write_double(&line, "output_logit_soft_cap", c->logit_soft_cap);
    json_write_string(&line, "out_norm", c->layernorm_out ? "layernorm" : "rmsnorm");
    json_write_string(&line, "input_gate", c->sigmoid_gate ? "sigmoid" : "exp");
    json_write_int(&line, "parameters", (int64_t)t->table.total);
    json_end(&line, '}');
    json_write_int(&line, "ranks", comm.size);
    json_write_string(&line, "device", t->backend->device);
    json_write_string(&line, "compiler", __VERSION__);
    json_write_string(&line, "compiler_flags", BUILD_FLAGS);
    json_write_string(&line, "git", BUILD_GIT);
    log_end(&t->log, &line);
}

static int is_due(int64_t every, int64_t step) { return every > 0 && step % every == 0; }

static void train(Trainer *t) {
    const Flags *f = &t->flags;
    if (t->has_val && f->eval_every && !t->resume_dir[0]) evaluate(t);
    while (t->step < f->steps && !stopping(t)) {
        train_step(t);
        int last = t->step == f->steps;
        if (t->has_val && f->eval_every && (last || is_due(f->eval_every, t->step)) && !stopping(t)) evaluate(t);
        if (is_due(f->sample_every, t->step) && !stopping(t) && comm.rank == 0) print_sample(t);
        if (is_due(f->save_every, t->step)) save_checkpoint(t);
    }
    if (!stopping(t) || t->step > 0) save_checkpoint(t);
    char duration[32];
    format_duration(duration, sizeof duration, now_seconds() - t->log.start);
    if (t->step < f->steps)
        log_line(&t->log, "stopped by a signal after step %" PRId64 "%s", t->step,
                 f->out ? "; --resume continues" : "");
    else log_line(&t->log, "done: %" PRId64 " steps, %s", t->step, duration);
}

static void dump(Trainer *t) {
    char why[1024];
    int S = (int)t->sequences_per_step, code = 0;
    size_t V = (size_t)t->config.vocab_size, count = (size_t)S * (size_t)t->seq_len * V;
    float *logits = (float *)xcalloc(count, sizeof(float));
    t->dump_logits = (float *)xcalloc((size_t)t->batch * (size_t)t->len * V, sizeof(float));
    double loss = accumulate_gradients(t, logits);
    comm_merge(logits, count, "gathering logits");
    if (comm.size > 1) t->backend->collect(KIND_GRAD);
    if (comm.rank == 0)
        code = dump_write(t->flags.dump, &t->table, t->backend, loss, logits, S, t->seq_len, t->config.vocab_size, why,
                          sizeof why);
    if (code != 0) die(code, "%s", why);
    free(t->dump_logits);
    printf("%s: loss %.6f, logits [%d, %d, %d] and %d gradients\n", t->flags.dump, loss, S, t->seq_len,
           t->config.vocab_size, t->table.num_tensors);
    free(logits);
}

static void generate_text(Trainer *t) {
    build_backend(t, 1, 1, 0);
    fill_backend(t, 0);
    double start = now_seconds();
    int64_t count = generate(t, stdout, t->flags.generate, 0);
    putchar('\n');
    flush_stdout();
    double seconds = now_seconds() - start;
    fprintf(stderr, "%" PRId64 " tokens in %.2f s, %.1f tokens/s\n", count, seconds, (double)count / seconds);
}

// Ranks on hosts without a common file system may have different files.
static void check_same_data(const Dataset *d) {
    double mine[2] = {(double)d->num_samples, 0}, all[2];
    for (int k = 0; k < d->num_files; k++) mine[1] += d->files[k].crc;
    memcpy(all, mine, sizeof all);
    comm_sum(all, 2, "comparing the ranks' files");
    if (mine[0] * comm.size != all[0] || mine[1] * comm.size != all[1])
        die(EXIT_USAGE, "%s: the ranks see different files; give each host the same ones", d->flag);
}

// Everything from the command line to the last checkpoint; returns the exit code.
static int trainer_run(int argc, char **argv, const Backend *backend) {
    static Trainer trainer;  // zero; too large for some stacks
    Trainer *t = &trainer;
    Flags *f = &t->flags;
    t->backend = backend;
    flags_parse(f, argc, argv);
    if (f->help) {
        flags_help(argv[0]);
        return flush_stdout();
    }
    if (f->list_models) {
        list_models();
        return flush_stdout();
    }
    signal(SIGXFSZ, SIG_IGN);  // a file that may not grow becomes a failed write, with its one line
    comm.timeout = (double)f->comm_timeout;
    check_flags(t);
    comm_layout((int)f->sp);
    resolve_batch(t);
    if (f->dump && comm.rank == 0) check_dump(f->dump);
    if (!f->generate && !f->dump) check_out(t);
    find_checkpoint(t);
    if (!f->generate) open_data(t);
    resolve_model(t);
    if (t->resume_dir[0] && t->step >= f->steps && !f->generate && !f->dump) {
        printf("%s is at step %" PRId64 " of --steps %" PRId64 ": nothing to do\n", t->resume_dir, t->step, f->steps);
        return 0;
    }
    sampler_init(&t->sampler, t->config.vocab_size, f->temperature, f->top_k, f->top_p);
    if (f->generate) {
        generate_text(t);
        return 0;
    }
    dataset_check_tokens(&t->train, t->config.vocab_size);
    if (t->has_val) dataset_check_tokens(&t->val, t->config.vocab_size);
    check_same_data(&t->train);
    if (t->has_val) check_same_data(&t->val);
    print_plan(t);
    if (t->resume_dir[0]) read_trainer_json(t);
    build_backend(t, t->batch, (t->seq_len + comm.sp_size - 1) / comm.sp_size, 1);
    printf("%-11s %s\n", "device", backend->device);
    alloc_rows(t, &t->rows);
    alloc_rows(t, &t->next);
    fill_backend(t, 1);
    if (f->dump) {
        dump(t);
        return 0;
    }
    lock_out(t);
    check_out(t);  // again: another run may have begun there since
    catch_signals();
    open_log(t);
    train(t);
    log_close(&t->log);
    return 0;
}

MAYBE_UNUSED
static int trainer_main(int argc, char **argv, const Backend *backend) {
    comm_start();
    int code = trainer_run(argc, argv, backend);
    comm_finish();
    return code;
}

#endif
