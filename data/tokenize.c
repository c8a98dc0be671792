// tokenize.c: turns text files into token shards for train_xlstm and train_xlstmcu. A token is a byte.
//
//     make data/tokenize        (or: cc -O2 -o data/tokenize data/tokenize.c)
//     data/tokenize --out data/my book1.txt book2.txt --val book2.txt
//
// writes data/my_train.bin and data/my_val.bin. A file is a document; inside a file a line holding only <|endoftext|>
// ends one and begins the next. Each document is written as token 256 (end of text, which opens a document) followed by
// its bytes, tokens 0 to 255. Nothing is cleaned, nothing is normalised: what comes out are the bytes that went in.
//
// A shard is llm.c's version 1 format, little-endian: 256 int32 ([0] 20240520, [1] 1, [2] number of tokens, and in ints
// that llm.c leaves unused [3] vocabulary 257, [4] end-of-text token 256), then the tokens as uint16.
// Input is read in pieces, so memory does not grow with it. Shards appear under their names only when all are complete.
// Exit code: 0, 2 for a bad flag, input or place.
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <fcntl.h>
#include <getopt.h>
#include <glob.h>
#include <limits.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../xlstmc/util.h"  // die, xcalloc, xstrdup, format_into

enum {
    SHARD_MAGIC = 20240520,
    SHARD_VERSION = 1,
    HEADER_INTS = 256,
    HEADER_BYTES = HEADER_INTS * 4,
    EOT = 256,
    VOCABULARY = 257,
    BUFFER = 1 << 16
};
static const char SEPARATOR[] = "<|endoftext|>";
#define MAX_SHARD_TOKENS 2147483647LL  // the count is an int32 in llm.c

static volatile sig_atomic_t interrupted = 0;
static void on_signal(int number) { interrupted = number; }

// ---------------------------------------------------------------------------------------------------------------------
// Writing one split (train or val) as one or several shards

typedef struct {
    const char *name;        // "train" or "val", for file names and messages
    const char *prefix;      // of the output files
    long long shard_tokens;  // most tokens a shard
    long long tokens;        // written so far, all shards
    long long documents;
    long long in_shard;  // tokens in the open shard
    int shards;          // begun so far; shard i lies in temporary_name(i) until publish()
    int published;
    FILE *file;       // the open shard, NULL between shards
    char path[4096];  // its temporary name, for messages
    uint8_t buffer[2 * BUFFER];
    size_t buffered;  // bytes in buffer
} Split;

static Split *splits[2];

static void temporary_name(const Split *s, int shard, char *path, size_t size) {
    format_into(path, size, "%s_%s_%06d.bin.tmp.%ld", s->prefix, s->name, shard, (long)getpid());
}

// One shard is PREFIX_train.bin; several are PREFIX_train_000000.bin, ... Both match PREFIX_train*.bin.
static void final_name(const Split *s, int shard, char *path, size_t size) {
    if (s->shards == 1) format_into(path, size, "%s_%s.bin", s->prefix, s->name);
    else format_into(path, size, "%s_%s_%06d.bin", s->prefix, s->name, shard);
}

static void remove_temporaries(void) {
    char path[4096];
    for (int i = 0; i < 2; i++) {
        if (!splits[i]) continue;
        for (int k = splits[i]->published; k < splits[i]->shards; k++) {
            temporary_name(splits[i], k, path, sizeof path);
            unlink(path);
        }
    }
}

static void write_failed(const Split *s) {
    die(EXIT_USAGE, "cannot write %s: %s; give another place with --out PREFIX", s->path, strerror(errno));
}

static void flush_buffer(Split *s) {
    if (s->buffered && fwrite(s->buffer, 1, s->buffered, s->file) != s->buffered) write_failed(s);
    s->buffered = 0;
}

static void open_shard(Split *s) {
    temporary_name(s, s->shards, s->path, sizeof s->path);
    s->file = fopen(s->path, "wb");
    if (!s->file) write_failed(s);
    s->shards++;
    s->in_shard = 0;
    memset(s->buffer, 0, HEADER_BYTES);  // room for the header, which close_shard fills in
    s->buffered = HEADER_BYTES;
}

static void close_shard(Split *s) {
    if (!s->file) return;
    flush_buffer(s);
    const int32_t header[5] = {SHARD_MAGIC, SHARD_VERSION, (int32_t)s->in_shard, VOCABULARY, EOT};
    uint8_t bytes[sizeof header];
    for (int i = 0; i < (int)sizeof header; i++) bytes[i] = (uint8_t)((uint32_t)header[i / 4] >> (8 * (i % 4)));
    if (fseek(s->file, 0, SEEK_SET) || fwrite(bytes, 1, sizeof bytes, s->file) != sizeof bytes || fflush(s->file) ||
        fsync(fileno(s->file)))
        write_failed(s);
    FILE *f = s->file;
    s->file = NULL;
    if (fclose(f)) write_failed(s);
}

static void put_token(Split *s, int token) {
    if (s->file && s->in_shard == s->shard_tokens) close_shard(s);
    if (!s->file) open_shard(s);
    if (s->buffered == sizeof s->buffer) flush_buffer(s);
    s->buffer[s->buffered++] = (uint8_t)(token & 255);
    s->buffer[s->buffered++] = (uint8_t)(token >> 8);
    s->in_shard++;
    s->tokens++;
}

// Gives the finished shards their names and makes the names durable.
static void publish(Split *s) {
    char from[4096], to[4096];
    for (int i = 0; i < s->shards; i++) {
        temporary_name(s, i, from, sizeof from);
        final_name(s, i, to, sizeof to);
        if (rename(from, to)) die(EXIT_USAGE, "cannot rename %s to %s: %s", from, to, strerror(errno));
        s->published = i + 1;
    }
    format_into(from, sizeof from, "%s", s->prefix);
    char *slash = strrchr(from, '/');
    if (slash) slash[slash == from] = '\0';
    int dir = open(slash ? from : ".", O_RDONLY);
    if (dir < 0 || fsync(dir) || close(dir))
        die(EXIT_USAGE, "cannot sync the directory of %s: %s", s->prefix, strerror(errno));
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading text: bytes in, tokens out

typedef struct {
    Split *out;
    int in_document;  // the token that opens the document is written
    int line_start;   // at the start of a line, or within a possible separator
    size_t matched;   // bytes of the separator matched since the line's start, +1 for a "\r" behind it
} Text;

static void put_byte(Text *t, int byte) {
    if (!t->in_document) {  // here and not at the separator: an empty document leaves no trace
        put_token(t->out, EOT);
        t->out->documents++;
        t->in_document = 1;
    }
    put_token(t->out, byte);
}

// What looked like a separator was text.
static void put_matched(Text *t) {
    for (size_t i = 0; i < t->matched; i++) put_byte(t, i < sizeof SEPARATOR - 1 ? SEPARATOR[i] : '\r');
    t->matched = 0;
}

static void read_byte(Text *t, int byte) {
    const size_t n = sizeof SEPARATOR - 1;
    if (t->line_start) {
        if (t->matched < n ? byte == SEPARATOR[t->matched] : t->matched == n && byte == '\r') {
            t->matched++;
            return;
        }
        if (t->matched >= n && byte == '\n') {
            t->matched = 0;
            t->in_document = 0;
            return;
        }
        put_matched(t);
    }
    put_byte(t, byte);
    t->line_start = byte == '\n';
}

static void end_of_file(Text *t) {
    if (t->matched >= sizeof SEPARATOR - 1) t->matched = 0;  // a separator on a last line without "\n"
    put_matched(t);
    t->in_document = 0;
    t->line_start = 1;
}

// Streams a file into train, and from byte `cut` on (counted from the file's start) into val.
static void read_text(const char *path, Split *train, Split *val, long long cut) {
    static uint8_t buffer[BUFFER];
    FILE *f = fopen(path, "rb");
    if (!f) die(EXIT_USAGE, "cannot open %s: %s", path, strerror(errno));
    Text t = {cut <= 0 ? val : train, 0, 1, 0};
    long long before = train->tokens + val->tokens, at = 0;
    size_t n;
    while ((n = fread(buffer, 1, sizeof buffer, f)) > 0) {
        if (interrupted) die(128 + (int)interrupted, "interrupted; nothing was written");
        for (size_t i = 0; i < n; i++, at++) {
            if (at >= cut && t.out == train && t.matched == 0) {  // not in the middle of a separator
                t.out = val;
                t.in_document = 0;
            }
            read_byte(&t, buffer[i]);
        }
    }
    if (ferror(f)) die(EXIT_USAGE, "cannot read %s: %s", path, strerror(errno));
    fclose(f);
    end_of_file(&t);
    if (train->tokens + val->tokens == before) die(EXIT_USAGE, "%s holds no text; leave it out", path);
}

// ---------------------------------------------------------------------------------------------------------------------
// Flags

typedef struct {
    const char *out;
    const char *val;  // comma-separated globs, or NULL
    double val_fraction;
    long long shard_tokens;
    int force;
} Options;

enum { OPT_OUT = 1000, OPT_VAL, OPT_VAL_FRACTION, OPT_SHARD_TOKENS, OPT_FORCE, OPT_HELP };

static const struct {
    int id;
    const char *name, *value, *help;
} FLAGS[] = {
    {OPT_OUT, "out", "PREFIX", "required: write PREFIX_train.bin and PREFIX_val.bin (several: _train_000000.bin ...)"},
    {OPT_VAL, "val", "GLOB", "validation files, comma-separated globs; a file that is also an input only validates"},
    {OPT_VAL_FRACTION, "val-fraction", "F", "or: the last F of all input bytes validate, 0 <= F < 1 (default 0: none)"},
    {OPT_SHARD_TOKENS, "shard-tokens", "N", "most tokens a shard (default 100000000 = 200 MB)"},
    {OPT_FORCE, "force", NULL, "replace shards of an earlier run with the same PREFIX"},
    {OPT_HELP, "help", NULL, "this text"},
};
enum { NFLAGS = sizeof FLAGS / sizeof FLAGS[0] };

static void print_help(void) {
    puts(
        "usage: data/tokenize --out PREFIX [flags] FILE...\n\n"
        "Turns text files into shards of byte tokens for train_xlstm (llm.c's format, vocabulary 257). A file is a\n"
        "document; inside a file, a line holding only <|endoftext|> separates documents.\n");
    for (int i = 0; i < NFLAGS; i++)
        printf("  --%-13s %-7s %s\n", FLAGS[i].name, FLAGS[i].value ? FLAGS[i].value : "", FLAGS[i].help);
    puts(
        "\nexamples:\n"
        "  data/tokenize --out data/austen data/austen/*.txt --val data/austen/persuasion.txt\n"
        "  data/tokenize --out data/notes notes.txt --val-fraction 0.1\n"
        "(One small text needs no shards: train_xlstm reads .txt files directly, with vocabulary 256.)");
}

static double parse_number(const char *flag, const char *text, double low, double high, int whole) {
    char *end;
    errno = 0;
    double v = strtod(text, &end);
    int digits_only = strspn(text, whole ? "0123456789" : "0123456789.eE-") == strlen(text);
    if (end == text || *end || errno || !digits_only || !(v >= low && v <= high))
        die(EXIT_USAGE, "--%s %s: give a %snumber from %.10g to %.10g", flag, text, whole ? "whole " : "", low, high);
    return v;
}

static Options parse_flags(int argc, char **argv) {
    Options o = {NULL, NULL, 0, 100000000, 0};
    struct option longopts[NFLAGS + 1];
    memset(longopts, 0, sizeof longopts);
    for (int i = 0; i < NFLAGS; i++) {
        longopts[i].name = FLAGS[i].name;
        longopts[i].has_arg = FLAGS[i].value ? required_argument : no_argument;
        longopts[i].val = FLAGS[i].id;
    }
    opterr = 0;
    int id;
    while ((id = getopt_long(argc, argv, ":", longopts, NULL)) != -1) {
        switch (id) {
            case OPT_OUT: o.out = optarg; break;
            case OPT_VAL: o.val = optarg; break;
            case OPT_VAL_FRACTION: o.val_fraction = parse_number("val-fraction", optarg, 0, 0.999999, 0); break;
            case OPT_SHARD_TOKENS:
                o.shard_tokens = (long long)parse_number("shard-tokens", optarg, 1000, (double)MAX_SHARD_TOKENS, 1);
                break;
            case OPT_FORCE: o.force = 1; break;
            case OPT_HELP: print_help(); exit(0);
            case ':': die(EXIT_USAGE, "%s needs a value; see data/tokenize --help", argv[optind - 1]); break;
            default:
                if (optopt > 0 && optopt < 256) die(EXIT_USAGE, "unknown flag -%c; see data/tokenize --help", optopt);
                die(EXIT_USAGE, "unknown flag or value: %s; see data/tokenize --help", argv[optind - 1]);
        }
    }
    if (!o.out) die(EXIT_USAGE, "--out PREFIX is missing, for example --out data/my; see data/tokenize --help");
    size_t n = strlen(o.out);
    if (n == 0 || o.out[n - 1] == '/')
        die(EXIT_USAGE, "--out %s: name the files' common beginning, for example --out %s%s", o.out, o.out, "text");
    if (o.val && o.val_fraction > 0) die(EXIT_USAGE, "--val and --val-fraction exclude each other: give one of them");
    if (optind == argc) die(EXIT_USAGE, "no input file; usage: data/tokenize --out PREFIX FILE...");
    return o;
}

// ---------------------------------------------------------------------------------------------------------------------
// Inputs and outputs

typedef struct {
    char *path;
    dev_t device;
    ino_t inode;
    long long size;
} Input;

static Input check_input(const char *path) {
    struct stat st;
    if (stat(path, &st)) die(EXIT_USAGE, "cannot open %s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die(EXIT_USAGE, "%s is not a file; name text files, for example %s/*.txt", path, path);
    if (st.st_size == 0) die(EXIT_USAGE, "%s is empty; leave it out", path);
    Input in = {xstrdup(path), st.st_dev, st.st_ino, (long long)st.st_size};
    return in;
}

// Expands comma-separated globs; each must name existing files. Returns the files, their number in *count.
static Input *expand(const char *globs, int *count) {
    char *list = xstrdup(globs);
    glob_t found;
    memset(&found, 0, sizeof found);
    int flags = 0;
    for (char *part = strtok(list, ","); part; part = strtok(NULL, ",")) {
        // without a match the pattern stands for itself: a name with brackets, or check_input says what is missing
        if (glob(part, flags | GLOB_NOCHECK, NULL, &found)) die(EXIT_USAGE, "--val %s: cannot be searched", part);
        flags = GLOB_APPEND;
    }
    if (found.gl_pathc == 0) die(EXIT_USAGE, "--val '%s' names no file", globs);
    Input *files = (Input *)xcalloc(found.gl_pathc, sizeof *files);
    for (size_t i = 0; i < found.gl_pathc; i++) files[i] = check_input(found.gl_pathv[i]);
    *count = (int)found.gl_pathc;
    globfree(&found);
    free(list);
    return files;
}

static int is_ours(const char *path) {
    char name[4096];
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < splits[i]->shards; k++) {
            final_name(splits[i], k, name, sizeof name);
            if (!strcmp(name, path)) return 1;
        }
    return 0;
}

// Shards of an earlier run under the same prefix would be picked up by PREFIX_train*.bin together with ours. Before the
// work they are refused, unless --force; after it (`published`) those are removed that ours did not replace.
static void handle_earlier_shards(const Options *o, int published) {
    static const char *const tails[] = {"_train.bin", "_val.bin", "_train_[0-9][0-9][0-9][0-9][0-9][0-9].bin",
                                        "_val_[0-9][0-9][0-9][0-9][0-9][0-9].bin"};
    char escaped[4096], pattern[4200];  // characters of the prefix that glob() would read as its own
    size_t n = 0;
    for (const char *p = o->out; *p; p++) {
        if (n + 3 > sizeof escaped) die(EXIT_USAGE, "--out %.80s...: too long", o->out);
        if (strchr("*?[\\", *p)) escaped[n++] = '\\';
        escaped[n++] = *p;
    }
    escaped[n] = '\0';
    for (int i = 0; i < 4; i++) {
        format_into(pattern, sizeof pattern, "%s%s", escaped, tails[i]);
        glob_t found;
        int rc = glob(pattern, 0, NULL, &found);
        if (rc == GLOB_NOMATCH) continue;
        if (rc) die(EXIT_USAGE, "--out %s: cannot be searched for earlier shards", o->out);
        if (!o->force)
            die(EXIT_USAGE, "%s exists; give another --out PREFIX, or --force to replace it", found.gl_pathv[0]);
        for (size_t k = 0; published && k < found.gl_pathc; k++)
            if (!is_ours(found.gl_pathv[k]) && unlink(found.gl_pathv[k]))
                die(EXIT_USAGE, "cannot remove the old shard %s: %s", found.gl_pathv[k], strerror(errno));
        globfree(&found);
    }
}

static void report(const Split *s) {
    char first[4096], last[4096];
    if (!s->shards) return;
    final_name(s, 0, first, sizeof first);
    final_name(s, s->shards - 1, last, sizeof last);
    const char *plural = s->documents == 1 ? "" : "s";
    printf("%-5s %lld tokens, %lld document%s: %s", s->name, s->tokens, s->documents, plural, first);
    if (s->shards > 1) printf(" ... %s (%d shards)", last, s->shards);
    putchar('\n');
}

int main(int argc, char **argv) {
    Options o = parse_flags(argc, argv);
    int nval = 0, ninput = argc - optind;
    Input *val = o.val ? expand(o.val, &nval) : NULL;
    Input *inputs = (Input *)xcalloc((size_t)ninput, sizeof *inputs);
    long long bytes = 0;
    for (int i = 0; i < ninput; i++) {
        inputs[i] = check_input(argv[optind + i]);
        bytes += inputs[i].size;
    }
    handle_earlier_shards(&o, 0);
    for (int i = 0; i < 2; i++) {
        splits[i] = (Split *)xcalloc(1, sizeof *splits[i]);
        splits[i]->name = i ? "val" : "train";
        splits[i]->prefix = o.out;
        splits[i]->shard_tokens = o.shard_tokens;
    }
    die_cleanup = remove_temporaries;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART;  // read_text looks at the flag between pieces
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);

    // floor((1-F) bytes) train; the small term undoes the rounding of 1-F, so that F = 0.1 of 1,000 bytes is 100
    long long cut = LLONG_MAX;
    if (o.val_fraction > 0) cut = (long long)((double)bytes * (1.0 - o.val_fraction) + 1e-6);
    for (int i = 0; i < ninput; i++) {
        int held_out = 0;
        for (int k = 0; k < nval; k++) held_out |= val[k].device == inputs[i].device && val[k].inode == inputs[i].inode;
        if (!held_out) read_text(inputs[i].path, splits[0], splits[1], cut);
        cut -= inputs[i].size;
    }
    for (int k = 0; k < nval; k++) read_text(val[k].path, splits[0], splits[1], 0);
    if (!splits[0]->tokens) die(EXIT_USAGE, "nothing is left to train on; name more input files or validate on less");
    if (o.val_fraction > 0 && !splits[1]->tokens)
        die(EXIT_USAGE, "--val-fraction %g of %lld bytes leaves no text; give a larger one", o.val_fraction, bytes);

    for (int i = 0; i < 2; i++) close_shard(splits[i]);
    for (int i = 0; i < 2; i++) publish(splits[i]);
    if (o.force) handle_earlier_shards(&o, 1);
    for (int i = 0; i < 2; i++) report(splits[i]);
    const char *star = splits[0]->shards > 1 ? "_*" : "", *val_star = splits[1]->shards > 1 ? "_*" : "";
    printf("train on it:\n  ./train_xlstm --train '%s_train%s.bin'", o.out, star);
    if (splits[1]->shards) printf(" --val '%s_val%s.bin'", o.out, val_star);
    printf(" --reset-docs --out out/%s\n", strrchr(o.out, '/') ? strrchr(o.out, '/') + 1 : o.out);

    for (int i = 0; i < ninput; i++) free(inputs[i].path);
    for (int k = 0; k < nval; k++) free(val[k].path);
    free(inputs);
    free(val);
    for (int i = 0; i < 2; i++) free(splits[i]);
    return 0;
}
