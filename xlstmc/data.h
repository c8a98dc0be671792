// data.h: training and validation data: token shards (.bin) and plain text (.txt), mapped into memory and cut into
// samples. A file of n tokens holds floor((n-1)/T) samples of T+1 tokens, at multiples of T; no sample crosses a file.
// Sample k is found by arithmetic, so any order and any number of ranks read the same samples.
//
//   .bin        llm.c's shards: 256 int32 (magic, version, count, and in ints that llm.c leaves unused [3] vocabulary
//               and [4] end-of-text id), then uint16 tokens (magic 20240520, version 1) or uint32 (20240801, 7)
//   .txt        bytes, vocabulary 256, nothing inserted
//   raw:FILE    uint16 tokens without a header (nanoGPT)
//
// All are little-endian. Bad data end the program: exit code 2 for what is missing or does not fit the flags, 3 for
// damaged files. A file must not be cut while it is mapped: the kernel would end the program with SIGBUS.
#ifndef XLSTMC_DATA_H
#define XLSTMC_DATA_H

#include <glob.h>
#include <sys/mman.h>

#include "crc32c.h"
#include "json.h"
#include "safetensors.h"  // file_open
#include "util.h"

enum {
    SHARD_MAGIC_16 = 20240520,
    SHARD_VERSION_16 = 1,
    SHARD_MAGIC_32 = 20240801,
    SHARD_VERSION_32 = 7,
    SHARD_MAGIC_EVAL = 20240522,  // llm.c's multiple-choice files: no token stream
    SHARD_HEADER_BYTES = 1024,
    MAX_SHARD_VOCAB = 1 << 24,
    EOT_GPT2 = 50256
};

typedef struct {
    char *path;
    const unsigned char *map;  // the whole file; NULL if it is empty
    uint64_t map_size;
    const unsigned char *tokens;  // [num_tokens] of `width` bytes
    int width;                    // 1, 2 or 4
    uint64_t num_tokens;
    uint64_t first_sample;  // number of samples in the files before
    int vocab;              // as the header says, 0: it does not
    int eot;                // token that opens a document, -1: none
    uint32_t crc;           // of the file; known after dataset_check_tokens()
} DataFile;

typedef struct {
    const char *flag;  // "--train" or "--val", for messages
    int seq_len;       // T
    int num_files;
    DataFile *files;  // sorted by path
    uint64_t num_samples;
    uint64_t num_tokens;
    int all_text;      // 1: every file is text
    int header_vocab;  // the largest vocabulary that a header names, 0: none does
} Dataset;

static uint32_t data_uint(const unsigned char *p, int width) {
    if (width == 1) return p[0];
    if (width == 2) return (uint32_t)p[0] | (uint32_t)p[1] << 8;
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t data_file_samples(const DataFile *f, int seq_len) {
    return f->num_tokens > 0 ? (f->num_tokens - 1) / (uint64_t)seq_len : 0;
}

// ----------------------------------------------------------------------------------------------------------------
// Opening

static void data_add_path(Dataset *d, const char *path, int raw) {
    if ((d->num_files & (d->num_files - 1)) == 0) {  // a power of two: time to double
        d->files = (DataFile *)realloc(d->files, (d->num_files ? 2 * (size_t)d->num_files : 1) * sizeof *d->files);
        if (!d->files) die(EXIT_RUN, "out of memory: %d files of %s", d->num_files, d->flag);
    }
    DataFile *f = &d->files[d->num_files++];
    memset(f, 0, sizeof *f);
    f->path = xstrdup(path);
    f->width = raw ? 2 : 0;  // 0: the name and the header will tell
}

// One item of the list: [raw:]GLOB. A file of exactly that name comes before what the pattern matches.
static void data_add_item(Dataset *d, const char *item, size_t len) {
    char pattern[4096];
    glob_t found;
    int raw = len > 4 && strncmp(item, "raw:", 4) == 0;
    if (len == 0) die(EXIT_USAGE, "%s: an empty name; give files or patterns separated by single commas", d->flag);
    format_into(pattern, sizeof pattern, "%.*s", (int)(len > sizeof pattern ? sizeof pattern : len), item);
    if (access(pattern + 4 * raw, F_OK) == 0) {
        data_add_path(d, pattern + 4 * raw, raw);
        return;
    }
    int code = glob(pattern + 4 * raw, 0, NULL, &found);
    if (code != 0)
        die(EXIT_USAGE, "%s: no file matches '%.*s'; check the path", d->flag, (int)(len > 400 ? 400 : len), item);
    for (size_t k = 0; k < found.gl_pathc; k++) data_add_path(d, found.gl_pathv[k], raw);
    globfree(&found);
}

static int data_compare_path(const void *a, const void *b) {
    return strcmp(((const DataFile *)a)->path, ((const DataFile *)b)->path);
}

static void data_map(const Dataset *d, DataFile *f) {
    char why[4400];
    struct stat st;
    int fd;
    if (stat(f->path, &st) == 0 && S_ISDIR(st.st_mode))
        die(EXIT_USAGE, "%s: %s is a directory; name the files in it, e.g. '%s/*.txt'", d->flag, f->path, f->path);
    int code = file_open(f->path, &fd, &f->map_size, why, sizeof why);
    if (code) die(code, "%s: %s", d->flag, why);
    if (f->map_size > 0) {
        void *map = mmap(NULL, (size_t)f->map_size, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED) die(EXIT_USAGE, "%s: cannot map %s: %s", d->flag, f->path, strerror(errno));
        f->map = (const unsigned char *)map;
    }
    close(fd);
}

// Reads the header of a .bin; dies with exit code 3 if it is no token shard or its count is not that of the file.
static void data_parse_shard(const Dataset *d, DataFile *f) {
    uint32_t magic = f->map_size >= 4 ? data_uint(f->map, 4) : 0;
    if (magic == SHARD_MAGIC_EVAL)
        die(EXIT_DAMAGED, "%s: %s holds llm.c's multiple-choice questions, no tokens to train on; use a token shard",
            d->flag, f->path);
    if (magic != SHARD_MAGIC_16 && magic != SHARD_MAGIC_32)
        die(EXIT_DAMAGED,
            "%s: %s does not begin with the magic number of a token shard; write one with data/tokenize, "
            "or give raw:%s if it is headerless uint16 tokens",
            d->flag, f->path, f->path);
    if (f->map_size < SHARD_HEADER_BYTES)
        die(EXIT_DAMAGED, "%s: %s ends inside its header of %d bytes; make it again", d->flag, f->path,
            SHARD_HEADER_BYTES);
    uint32_t version = data_uint(f->map + 4, 4), count = data_uint(f->map + 8, 4);
    uint32_t known = magic == SHARD_MAGIC_16 ? SHARD_VERSION_16 : SHARD_VERSION_32;
    if (version != known)
        die(EXIT_DAMAGED, "%s: %s is a shard of version %u; only version %u of its kind is known", d->flag, f->path,
            version, known);
    f->width = magic == SHARD_MAGIC_16 ? 2 : 4;
    uint64_t body = f->map_size - SHARD_HEADER_BYTES;
    if (body != (uint64_t)count * (uint64_t)f->width)
        die(EXIT_DAMAGED, "%s: the header of %s promises %u tokens, but %llu bytes follow (%d a token); make it again",
            d->flag, f->path, count, (unsigned long long)body, f->width);
    int32_t vocab = (int32_t)data_uint(f->map + 12, 4), eot = (int32_t)data_uint(f->map + 16, 4);
    if (vocab < 0 || vocab > MAX_SHARD_VOCAB)
        die(EXIT_DAMAGED, "%s: the header of %s names an impossible vocabulary (%d); make it again", d->flag, f->path,
            vocab);
    if (vocab > 0 && (eot < -1 || eot >= vocab))
        die(EXIT_DAMAGED,
            "%s: the header of %s names an end-of-text id (%d) outside of its vocabulary of %d; "
            "make it again",
            d->flag, f->path, eot, vocab);
    f->vocab = vocab;
    f->eot = eot == 0 ? EOT_GPT2 : eot;  // 0: an unused header field; -1: no such token
    f->tokens = f->map + SHARD_HEADER_BYTES;
    f->num_tokens = count;
}

static void data_parse(const Dataset *d, DataFile *f) {
    const char *dot = strrchr(f->path, '.');
    if (f->width == 2) {
        uint32_t magic = f->map_size >= 4 ? data_uint(f->map, 4) : 0;
        if (magic == SHARD_MAGIC_16 || magic == SHARD_MAGIC_32)
            die(EXIT_USAGE, "%s: %s has a shard's header; leave out 'raw:'", d->flag, f->path);
        if (f->map_size % 2 != 0)
            die(EXIT_DAMAGED, "%s: %s has an odd number of bytes, but raw: means two a token", d->flag, f->path);
        f->tokens = f->map;
        f->num_tokens = f->map_size / 2;
        f->eot = EOT_GPT2;
    } else if (dot && strcmp(dot, ".txt") == 0) {
        f->width = 1;
        f->tokens = f->map;
        f->num_tokens = f->map_size;
        f->eot = -1;
    } else if (dot && strcmp(dot, ".bin") == 0) {
        data_parse_shard(d, f);
    } else {
        die(EXIT_USAGE,
            "%s: %s is neither .txt (text) nor .bin (tokens); rename it, or give raw:%s for headerless "
            "uint16 tokens",
            d->flag, f->path, f->path);
    }
}

// Opens all files that the comma-separated patterns match. The tokens are not looked at yet: dataset_check_tokens().
static void dataset_open(Dataset *d, const char *flag, const char *globs, int seq_len) {
    uint64_t longest = 0;
    assert(seq_len >= 1);
    memset(d, 0, sizeof *d);
    d->flag = flag;
    d->seq_len = seq_len;
    d->all_text = 1;
    for (const char *item = globs;; item++) {
        size_t len = strcspn(item, ",");
        data_add_item(d, item, len);
        item += len;
        if (!*item) break;
    }
    qsort(d->files, (size_t)d->num_files, sizeof *d->files, data_compare_path);
    for (int k = 0; k < d->num_files; k++) {
        DataFile *f = &d->files[k];
        data_map(d, f);
        data_parse(d, f);
        f->first_sample = d->num_samples;
        d->num_samples += data_file_samples(f, seq_len);
        d->num_tokens += f->num_tokens;
        if (f->num_tokens > longest) longest = f->num_tokens;
        if (f->width != 1) d->all_text = 0;
        if (f->vocab > d->header_vocab) d->header_vocab = f->vocab;
    }
    if (d->num_samples == 0)
        die(EXIT_USAGE,
            "%s: no file has the %lld tokens that one sample of --seq-len %d needs (the longest has %llu); "
            "lower --seq-len or give more data",
            flag, seq_len + 1LL, seq_len, (unsigned long long)longest);
    for (int k = 0; k < d->num_files; k++)
        if (data_file_samples(&d->files[k], seq_len) == 0)
            note("%s: %s has %llu tokens, too few for a sample of --seq-len %d; it is not used", flag, d->files[k].path,
                 (unsigned long long)d->files[k].num_tokens, seq_len);
}

MAYBE_UNUSED
static void dataset_close(Dataset *d) {
    for (int k = 0; k < d->num_files; k++) {
        if (d->files[k].map) munmap((void *)d->files[k].map, (size_t)d->files[k].map_size);
        free(d->files[k].path);
    }
    free(d->files);
    memset(d, 0, sizeof *d);
}

// ----------------------------------------------------------------------------------------------------------------
// Checking and reading

// Reads every token once: an id outside of the vocabulary ends the program. Takes the checksums on the way.
static void dataset_check_tokens(Dataset *d, int vocab) {
    enum { PIECE = 1 << 16 };  // tokens: stays in cache between the checksum and the maximum
    for (int k = 0; k < d->num_files; k++) {
        DataFile *f = &d->files[k];
        f->crc = crc32c(0, f->map, (size_t)(f->tokens - f->map));
        for (uint64_t at = 0; at < f->num_tokens; at += PIECE) {
            size_t n = f->num_tokens - at < PIECE ? (size_t)(f->num_tokens - at) : (size_t)PIECE;
            const unsigned char *p = f->tokens + at * (uint64_t)f->width;
            uint32_t highest = 0;
            f->crc = crc32c(f->crc, p, n * (size_t)f->width);
            for (size_t i = 0; i < n; i++) {
                uint32_t id = data_uint(p + i * (size_t)f->width, f->width);
                highest = id > highest ? id : highest;
            }
            if (highest < (uint32_t)vocab) continue;
            size_t bad = 0;
            while (data_uint(p + bad * (size_t)f->width, f->width) < (uint32_t)vocab) bad++;
            die(EXIT_USAGE,
                "%s: %s holds token id %u at position %llu, but the vocabulary is %d; raise --vocab, or use "
                "data made for this model",
                d->flag, f->path, data_uint(p + bad * (size_t)f->width, f->width), (unsigned long long)(at + bad),
                vocab);
        }
    }
}

// Sample `sample` (< num_samples): inputs are its first T tokens, targets its last T. resets[t] = 1 where a document
// begins: at an input equal to eot, and at t = 0 of the first sample of a file. eot -1: every file has its own (header
// int [4], 50256 without one, none in text). resets may be NULL. Only positions first .. first + count - 1 are read:
// the segment of a rank.
static void dataset_read_segment(const Dataset *d, uint64_t sample, int first, int count, int *inputs, int *targets,
                                 unsigned char *resets, int eot) {
    assert(sample < d->num_samples && first >= 0 && first + count <= d->seq_len);
    int low = 0, high = d->num_files - 1;  // the last file whose first sample is not behind `sample` has it
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (d->files[middle].first_sample <= sample) low = middle;
        else high = middle - 1;
    }
    const DataFile *f = &d->files[low];
    uint64_t start = (sample - f->first_sample) * (uint64_t)d->seq_len + (uint64_t)first;
    const unsigned char *p = f->tokens + start * (uint64_t)f->width;
    for (int t = 0; t <= count; t++) {
        int token = (int)data_uint(p + (size_t)t * (size_t)f->width, f->width);
        if (t < count) inputs[t] = token;
        if (t > 0) targets[t - 1] = token;
    }
    if (!resets) return;
    if (eot < 0) eot = f->eot;
    for (int t = 0; t < count; t++) resets[t] = inputs[t] == eot;
    if (start == 0) resets[0] = 1;
}

MAYBE_UNUSED
static void dataset_read(const Dataset *d, uint64_t sample, int *inputs, int *targets, unsigned char *resets, int eot) {
    dataset_read_segment(d, sample, 0, d->seq_len, inputs, targets, resets, eot);
}

// ----------------------------------------------------------------------------------------------------------------
// Fingerprint: an array of "name size checksum", for trainer.json. Folders are left out: data may move.

// After dataset_check_tokens().
static void dataset_write_fingerprint(const Dataset *d, JsonWriter *w, const char *key) {
    json_begin(w, key, '[');
    for (int k = 0; k < d->num_files; k++) {
        const DataFile *f = &d->files[k];
        const char *slash = strrchr(f->path, '/');
        char line[4200];
        format_into(line, sizeof line, "%s %llu %08x", slash ? slash + 1 : f->path, (unsigned long long)f->map_size,
                    f->crc);
        json_write_string(w, NULL, line);
    }
    json_end(w, ']');
}

// 1 if `recorded`, such an array, is of the same data; else 0 and the first difference in `why`.
MAYBE_UNUSED
static int dataset_matches(const Dataset *d, const Json *recorded, char *why, size_t why_size) {
    JsonWriter w;
    memset(&w, 0, sizeof w);
    dataset_write_fingerprint(d, &w, NULL);
    Json *now = json_parse(w.text, w.len, why, why_size);
    int same = recorded && recorded->type == JSON_ARRAY && now && recorded->count == now->count;
    if (!same) snprintf(why, why_size, "%s has another number of files", d->flag);
    for (size_t k = 0; same && k < now->count; k++) {
        const char *was = json_get_string(&recorded->items[k]), *is = json_get_string(&now->items[k]);
        same = was && strcmp(was, is) == 0;
        if (!same)
            snprintf(why, why_size, "%s: '%.200s' was '%.200s' (name, bytes, checksum)", d->flag, is, was ? was : "?");
    }
    json_free(now);
    json_writer_free(&w);
    return same;
}

#endif
