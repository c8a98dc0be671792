// checkpoint.h: weights, checkpoint directories and dumps. doc/checkpoint.md describes the format.
//
// A checkpoint is complete or not there: it is written to OUT/tmp.PID, every file is flushed to the device, and only
// then the directory gets its name, OUT/step_%08d. manifest.json holds a checksum of every tensor and of every other
// byte, so damage is found before it is loaded. Nothing in a checkpoint tells when, where or by whom it was written:
// the same state gives the same bytes.
//
// Functions with `why` return 0, or an exit code (EXIT_USAGE, EXIT_DAMAGED) and one line in `why` that names the file
// and says what to do; they never end the program, so a run can go on when a save fails.
#ifndef XLSTMC_CHECKPOINT_H
#define XLSTMC_CHECKPOINT_H

#include <dirent.h>
#include <sys/file.h>

#include "backend.h"      // Backend, TensorTable
#include "config.h"       // config_read, config_write, path_join
#include "json.h"         // Json, JsonWriter
#include "safetensors.h"  // SafeTensors, SafeWriter, file_*

enum { MAX_MANIFEST_BYTES = 1 << 28 };

// ----------------------------------------------------------------------------------------------------------------
// Weights

// The name that transformers 4.54 to 4.57 gave to the q, k and v projections; 0 if `name` is none of them.
static int weights_old_name(const char *name, char *dst, size_t size) {
    static const char *const suffixes[3][2] = {{".mlstm_layer.q.weight", ".mlstm_layer.query.weight"},
                                               {".mlstm_layer.k.weight", ".mlstm_layer.key.weight"},
                                               {".mlstm_layer.v.weight", ".mlstm_layer.value.weight"}};
    for (int k = 0; k < 3; k++) {
        size_t len = strlen(name), tail = strlen(suffixes[k][0]);
        if (len < tail || strcmp(name + len - tail, suffixes[k][0]) != 0) continue;
        format_into(dst, size, "%.*s%s", (int)(len - tail), name, suffixes[k][1]);
        return 1;
    }
    return 0;
}

static void format_shape(char dst[128], int ndim, const size_t *shape) {  // [32, 64]
    int at = snprintf(dst, 128, "[");
    for (int k = 0; k < ndim && at < 100; k++)
        at += snprintf(dst + at, 128 - (size_t)at, k ? ", %zu" : "%zu", shape[k]);
    snprintf(dst + at, 128 - (size_t)at, "]");
}

// 1 if `t` is a recurrent kernel [NH, 4d, d] in the layout of the package's "vanilla" backend; ours is [NH, d, 4d].
static int weights_vanilla_kernel(const SafeTensor *t, const TensorSpec *spec) {
    return t->ndim == 3 && spec->ndim == 3 && t->shape[0] == (size_t)spec->shape[0] &&
           t->shape[1] == (size_t)spec->shape[2] && t->shape[2] == (size_t)spec->shape[1] &&
           t->shape[1] == 4 * t->shape[2];
}

static int weights_damaged(const SafeTensors *s, const char *why_not, const char *name, char *why, size_t why_size) {
    return explain(EXIT_DAMAGED, why, why_size,
                   "%s: tensor '%.120s' %s; the directory's config.json and weights must be of one model",
                   s->files[0].path, name, why_not);
}

// Finds the tensor `prefix`name for every entry of the table: shapes and dtypes as asked for, f32_only or any float.
// found: [num_tensors]. A recurrent kernel may have the vanilla layout if config is given. used: [s->num_tensors]
// gets 1.
static int weights_match(const SafeTensors *s, const ModelConfig *config, const TensorTable *table, const char *prefix,
                         const SafeTensor **found, unsigned char *used, char *why, size_t why_size) {
    for (int k = 0; k < table->num_tensors; k++) {
        const TensorSpec *spec = &table->tensors[k];
        char name[160], old[160], asked[128], given[128], reason[300];
        size_t shape[4];
        format_into(name, sizeof name, "%s%s", prefix, spec->name);
        const SafeTensor *t = safetensors_find(s, name);
        if (!t && weights_old_name(name, old, sizeof old)) t = safetensors_find(s, old);
        if (!t) return weights_damaged(s, "is missing", name, why, why_size);
        int same = t->ndim == spec->ndim;
        for (int d = 0; d < spec->ndim; d++) {
            shape[d] = (size_t)spec->shape[d];
            same = same && t->shape[d] == shape[d];
        }
        int kernel = config && spec->block >= 0 && config->block_types[spec->block] == BLOCK_SLSTM &&
                     k == table->block_first[spec->block] + S_RECURRENT;
        if (!same && !(kernel && weights_vanilla_kernel(t, spec))) {
            format_shape(asked, spec->ndim, shape);
            format_shape(given, t->ndim, t->shape);
            snprintf(reason, sizeof reason, "has the shape %s, not %s", given, asked);
            return weights_damaged(s, reason, name, why, why_size);
        }
        if (t->dtype >= NUM_FLOAT_DTYPES) {
            snprintf(reason, sizeof reason, "has the dtype %s; only F32, BF16, F16 and F64 can be read",
                     safe_dtypes[t->dtype].name);
            return weights_damaged(s, reason, name, why, why_size);
        }
        found[k] = t;
        used[t - s->tensors] = 1;
    }
    return 0;
}

static int weights_all_used(const SafeTensors *s, const unsigned char *used, char *why, size_t why_size) {
    for (size_t k = 0; k < s->num_tensors; k++)
        if (!used[k]) return weights_damaged(s, "is no part of the model", s->tensors[k].name, why, why_size);
    return 0;
}

static size_t table_largest(const TensorTable *table) {
    size_t largest = 1;
    for (int k = 0; k < table->num_tensors; k++)
        if (table->tensors[k].count > largest) largest = table->tensors[k].count;
    return largest;
}

// dst[a][c][b] = src[a][b][c], each element `unit` floats.
static void swap_axes(float *dst, const float *src, size_t A, size_t B, size_t C, size_t unit) {
    for (size_t a = 0; a < A; a++)
        for (size_t b = 0; b < B; b++)
            for (size_t c = 0; c < C; c++)
                memcpy(dst + ((a * C + c) * B + b) * unit, src + ((a * B + b) * C + c) * unit, unit * sizeof(float));
}

// If tensor k is one of an sLSTM block in the vanilla layout, whose kernel is [NH, 4d, d] for our [NH, d, 4d] and whose
// bias is [4, NH, d] for our [NH, 4, d]: fills `ours` from `values` and returns 1. `ours` NULL: only asks.
static int weights_our_layout(const ModelConfig *config, const TensorTable *table, int k,
                              const SafeTensor *const *found, const float *values, float *ours) {
    int block = table->tensors[k].block;
    if (block < 0 || config->block_types[block] != BLOCK_SLSTM) return 0;
    int kernel = table->block_first[block] + S_RECURRENT, bias = table->block_first[block] + S_BIAS;
    if ((k != kernel && k != bias) || !weights_vanilla_kernel(found[kernel], &table->tensors[kernel])) return 0;
    size_t heads = (size_t)config->num_heads, d = (size_t)config->hidden_size / heads;
    if (ours && k == kernel) swap_axes(ours, values, heads, 4 * d, d, 1);
    else if (ours) swap_axes(ours, values, 1, 4, heads, d);
    return 1;
}

// The elements of tensor `index` from `at` on that one rank reads and writes; *owner: which. One rank alone: all.
static size_t tensor_run(const Backend *backend, const TensorSpec *spec, int index, size_t at, int *owner) {
    size_t place;
    *owner = 0;
    if (comm.size == 1) return spec->count - at;
    return shards_run(backend->shards(), backend->place(index) + at, spec->count - at, owner, &place);
}

// Moves the tensors found by weights_match() into the backend; weights must be finite. Each rank reads its share; then
// all have everything, but of moments with --zero 1.
static int weights_move(const SafeTensors *s, const ModelConfig *config, const TensorTable *table,
                        const SafeTensor *const *found, int kind, const Backend *backend, char *why, size_t why_size) {
    float *values = (float *)xcalloc(2 * table_largest(table), sizeof(float)), *ours = values + table_largest(table);
    int code = 0, owner;
    for (int k = 0; k < table->num_tensors && code == 0; k++) {
        const TensorSpec *spec = &table->tensors[k];
        int other_layout = weights_our_layout(config, table, k, found, NULL, NULL);
        if (other_layout) {
            if ((code = safetensors_read(s, found[k], 0, spec->count, values, why, why_size))) break;
            weights_our_layout(config, table, k, found, values, ours);
        }
        for (size_t at = 0, n; at < spec->count && code == 0; at += n) {
            n = tensor_run(backend, spec, k, at, &owner);
            const float *part = other_layout ? ours + at : values;
            if (owner != comm.rank) continue;
            if (!other_layout && (code = safetensors_read(s, found[k], at, n, values, why, why_size))) break;
            for (size_t i = 0; kind == KIND_WEIGHT && i < n && code == 0; i++)
                if ((bits_from_float(part[i]) & 0x7F800000) == 0x7F800000)  // isfinite() lies under -ffast-math
                    code = weights_damaged(s, "holds a NaN or an infinity", spec->name, why, why_size);
            if (code == 0 && n == spec->count) backend->write_tensor(kind, k, part);
            else if (code == 0) backend->write_part(kind, k, at, n, part);
        }
    }
    free(values);
    code = comm_agree(code, why, why_size, "loading");
    if (code == 0 && comm.size > 1) backend->collect(kind);
    return code;
}

// ----------------------------------------------------------------------------------------------------------------
// Manifest: for every file a list of parts "name bytes crc32c" that covers it from its first byte to its last

enum { FILE_CONFIG, FILE_MODEL, FILE_OPTIMIZER, FILE_STATE, FILE_TRAINER, FILE_MANIFEST, NUM_CHECKPOINT_FILES };
static const char *const checkpoint_files[NUM_CHECKPOINT_FILES] = {
    "config.json", "model.safetensors", "optimizer.safetensors", "state.safetensors", "trainer.json", "manifest.json"};

static void manifest_begin(JsonWriter *w, int step) {
    memset(w, 0, sizeof *w);
    w->indent = 2;
    json_begin(w, NULL, '{');
    json_write_string(w, "format", "xlstm.c checkpoint");
    json_write_int(w, "version", 1);
    json_write_int(w, "step", step);
    json_begin(w, "files", '{');
}

static void manifest_part(JsonWriter *w, const char *name, uint64_t bytes, uint32_t crc) {
    char line[256];
    format_into(line, sizeof line, "%s %llu %08x", name, (unsigned long long)bytes, crc);
    json_write_string(w, NULL, line);
}

static void manifest_safetensors(JsonWriter *w, int file, const SafeWriter *written) {
    json_begin(w, checkpoint_files[file], '[');
    manifest_part(w, "header", written->header_bytes, written->header_crc);
    for (size_t k = 0; k < written->num_tensors; k++)
        manifest_part(w, written->tensors[k].name, safe_bytes(&written->tensors[k]), written->crc[k]);
    json_end(w, ']');
}

enum { MANIFEST_TAIL = 27 };  // bytes of the last lines, which hold the checksum of all bytes before them

static void manifest_tail(char dst[MANIFEST_TAIL + 1], const char *text, size_t len) {
    snprintf(dst, MANIFEST_TAIL + 1, ",\n  \"crc32c\": \"%08x\"\n}\n", crc32c(0, text, len));
}

static void manifest_end(JsonWriter *w) {
    char tail[MANIFEST_TAIL + 1];
    json_end(w, '}');
    manifest_tail(tail, w->text, w->len);
    json_append(w, tail, strlen(tail));
}

PRINTF_LIKE(4, 5)
static int checkpoint_damaged(const char *path, char *why, size_t why_size, const char *fmt, ...) {
    char reason[400];
    va_list args;
    va_start(args, fmt);
    vsnprintf(reason, sizeof reason, fmt, args);
    va_end(args);
    return explain(EXIT_DAMAGED, why, why_size, "%s is damaged: %s; use another checkpoint, or a copy of this one",
                   path, reason);
}

// Splits "name bytes crc32c" in place; 0 if the line is not of that form.
static int manifest_parse_part(char *line, uint64_t *bytes, const char **crc) {
    char *last = strrchr(line, ' '), *end;
    if (!last || strlen(last + 1) != 8) return 0;
    *last = 0;
    *crc = last + 1;
    char *number = strrchr(line, ' ');
    if (!number || number[1] < '0' || number[1] > '9') return 0;
    *number = 0;
    errno = 0;
    *bytes = strtoull(number + 1, &end, 10);
    return errno == 0 && *end == 0;
}

// Compares one file with its parts: every `stride`-th from part *next of this and the following files on.
static int manifest_verify_file(const char *path, const Json *parts, size_t stride, size_t *next, char *why,
                                size_t why_size) {
    char line[256], text[9];
    int fd;
    uint64_t size, at = 0, bytes;
    const char *crc;
    int code = file_open(path, &fd, &size, why, why_size);
    if (code) return checkpoint_damaged(path, why, why_size, "it cannot be read or is missing");
    for (size_t k = 0; parts->type == JSON_ARRAY && k < parts->count && code == 0; k++) {
        const char *part = json_get_string(&parts->items[k]);
        uint32_t now = 0;
        snprintf(line, sizeof line, "%s", part ? part : "");
        if (!manifest_parse_part(line, &bytes, &crc) || bytes > size - at) {
            code = checkpoint_damaged(path, why, why_size, "it has %llu bytes, fewer than manifest.json says",
                                      (unsigned long long)size);
            break;
        }
        if (*next > 0) {  // another rank's
            (*next)--;
            at += bytes;
            continue;
        }
        *next = stride - 1;
        if ((code = file_crc(fd, path, at, bytes, &now, why, why_size))) break;
        snprintf(text, sizeof text, "%08x", now);
        if (strcmp(text, crc) != 0)
            code = checkpoint_damaged(path, why, why_size, "wrong checksum of '%s', bytes %llu to %llu", line,
                                      (unsigned long long)at, (unsigned long long)(at + bytes));
        at += bytes;
    }
    close(fd);
    if (code == 0 && at != size)
        code = checkpoint_damaged(path, why, why_size, "it has %llu bytes, more than the %llu of manifest.json",
                                  (unsigned long long)size, (unsigned long long)at);
    return code;
}

// Verifies DIR against its manifest.json: all files, or only those a model needs. *step: as the manifest says. Of the
// checksums those of parts first, first + stride, ...: ranks share them out.
static int manifest_verify_parts(const char *dir, int only_model, int first, int stride, int *step, char *why,
                                 size_t why_size) {
    char path[MAX_PATH], reason[300], *text, tail[MANIFEST_TAIL + 1];
    size_t len;
    int64_t value, version;
    size_t next = (size_t)first;
    int code = path_join(path, dir, checkpoint_files[FILE_MANIFEST], why, why_size);
    if (code) return code;
    if (file_read_text(path, MAX_MANIFEST_BYTES, &text, &len, why, why_size))
        return checkpoint_damaged(path, why, why_size, "it cannot be read or is missing");
    manifest_tail(tail, text, len > MANIFEST_TAIL ? len - MANIFEST_TAIL : 0);
    if (len <= MANIFEST_TAIL || memcmp(text + len - MANIFEST_TAIL, tail, MANIFEST_TAIL) != 0) {
        free(text);
        return checkpoint_damaged(path, why, why_size, "its own checksum is wrong");
    }
    Json *root = json_parse(text, len, reason, sizeof reason);
    free(text);
    if (!root) return checkpoint_damaged(path, why, why_size, "%s", reason);
    const Json *files = json_get(root, "files");
    if (!json_get_int(json_get(root, "version"), 1, 1, &version) ||
        !json_get_int(json_get(root, "step"), 0, INT32_MAX, &value))
        code = checkpoint_damaged(path, why, why_size, "it is not of version 1, or has no step");
    else *step = (int)value;
    for (int f = 0; f < FILE_MANIFEST && code == 0; f++) {
        const Json *parts = json_get(files, checkpoint_files[f]);
        if (only_model && f != FILE_CONFIG && f != FILE_MODEL) continue;
        if (!parts && f == FILE_STATE) continue;
        if (!parts) code = checkpoint_damaged(path, why, why_size, "it does not list %s", checkpoint_files[f]);
        else if ((code = path_join(path, dir, checkpoint_files[f], why, why_size)) == 0)
            code = manifest_verify_file(path, parts, (size_t)stride, &next, why, why_size);
    }
    json_free(root);
    return code;
}

// The same by all ranks together, each its share; all get the same answer.
static int manifest_verify(const char *dir, int only_model, int *step, char *why, size_t why_size) {
    int code = manifest_verify_parts(dir, only_model, comm.rank, comm.size, step, why, why_size);
    return comm_agree(code, why, why_size, "verifying a checkpoint");
}

// --load: the weights of DIR, one of our checkpoints or a Hugging Face directory, into the backend. The moments stay.
MAYBE_UNUSED
static int weights_load(const char *dir, const ModelConfig *config, const TensorTable *table, const Backend *backend,
                        char *why, size_t why_size) {
    SafeTensors s;
    char path[MAX_PATH];
    int step, code = path_join(path, dir, checkpoint_files[FILE_MANIFEST], why, why_size);
    if (code == 0 && access(path, F_OK) == 0) code = manifest_verify(dir, 1, &step, why, why_size);
    if (code == 0) code = safetensors_open_dir(&s, dir, why, why_size);
    if (code) return code;
    const SafeTensor **found = (const SafeTensor **)xcalloc((size_t)table->num_tensors, sizeof *found);
    unsigned char *used = (unsigned char *)xcalloc(s.num_tensors, 1);
    code = weights_match(&s, config, table, "", found, used, why, why_size);
    if (code == 0) code = weights_all_used(&s, used, why, why_size);
    if (code == 0) code = weights_move(&s, config, table, found, KIND_WEIGHT, backend, why, why_size);
    free(found);
    free(used);
    safetensors_close(&s);
    return code;
}

// ----------------------------------------------------------------------------------------------------------------
// The directory of a run: OUT/lock, OUT/step_%08d/, OUT/tmp.PID/

typedef struct {
    const char *out;  // --out
    const ModelConfig *config;
    const TensorTable *table;
    const TensorTable *states;  // model_state_table(); used if num_state_rows > 0
    int num_state_rows;         // rows of stored states of all ranks, 0: none
    int batch;                  // B: these rows lie in turn with the DP groups, B a time
    const Backend *backend;
    int save_bf16;           // --save-dtype bf16: weights as bf16, the fp32 masters beside the moments
    int keep;                // --keep, 0: all
    uint64_t bytes_written;  // out: size of the last save
} Checkpoint;

static int dir_sync(const char *path) {  // makes names in a directory durable; 0, or -1 and errno
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return -1;
    int failed = fsync(fd) != 0 && errno != EINVAL;  // EINVAL: a file system that has nothing to flush here
    int reason = errno;
    close(fd);
    errno = reason;
    return failed ? -1 : 0;
}

// 1 if the directory holds nothing but files of a checkpoint.
static int checkpoint_only_ours(const char *dir) {
    DIR *d = opendir(dir);
    int ours = d != NULL;
    for (struct dirent *e; d && (e = readdir(d));) {
        int known = strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0;
        for (int f = 0; f < NUM_CHECKPOINT_FILES; f++) known |= strcmp(e->d_name, checkpoint_files[f]) == 0;
        ours &= known;
    }
    if (d) closedir(d);
    return ours;
}

// Removes the files of a checkpoint and their directory. Anything else in it stays, and then so does the directory.
static void checkpoint_remove(const char *dir) {
    char path[MAX_PATH], why[MAX_PATH];
    for (int f = 0; f < NUM_CHECKPOINT_FILES; f++)
        if (path_join(path, dir, checkpoint_files[f], why, sizeof why) == 0) unlink(path);
    rmdir(dir);
}

static char checkpoint_unfinished[MAX_PATH];  // the directory being written, for die()
static void checkpoint_cleanup(void) { checkpoint_remove(checkpoint_unfinished); }

// The number of "step_00001000", -1 if the name is not of that form.
static int checkpoint_step_of(const char *name) {
    size_t digits = strlen(name) > 5 ? strspn(name + 5, "0123456789") : 0;
    if (strncmp(name, "step_", 5) != 0 || digits < 8 || digits > 10 || name[5 + digits] != 0) return -1;
    long long step = strtoll(name + 5, NULL, 10);
    return step <= INT32_MAX && (digits == 8 || name[5] != '0') ? (int)step : -1;
}

static int compare_descending(const void *a, const void *b) {
    int x = *(const int *)a, y = *(const int *)b;
    return (x < y) - (x > y);
}

// Steps of all step_ directories of OUT, newest first, malloced; *count -1 and errno if OUT cannot be read.
static int *checkpoint_list(const char *out, int *count) {
    DIR *d = opendir(out);
    int *steps = NULL, capacity = 0;
    *count = d ? 0 : -1;
    for (struct dirent *e; d && (e = readdir(d));) {
        int step = checkpoint_step_of(e->d_name);
        if (step < 0) continue;
        if (*count == capacity) {
            capacity = 2 * capacity + 16;
            steps = (int *)realloc(steps, (size_t)capacity * sizeof *steps);
            if (!steps) die(EXIT_RUN, "out of memory: %d checkpoints in %s", capacity, out);
        }
        steps[(*count)++] = step;
    }
    if (d) closedir(d);
    if (*count > 1) qsort(steps, (size_t)*count, sizeof *steps, compare_descending);
    return steps;
}

static int checkpoint_step_dir(char dst[MAX_PATH], const char *out, int step, char *why, size_t why_size) {
    char name[32];
    snprintf(name, sizeof name, "step_%08d", step);
    return path_join(dst, out, name, why, why_size);
}

// 1 if OUT holds a run: a checkpoint or a log.
MAYBE_UNUSED
static int checkpoint_holds_run(const char *out) {
    char path[MAX_PATH], why[MAX_PATH];
    int count;
    free(checkpoint_list(out, &count));
    return count > 0 || (path_join(path, out, "log.jsonl", why, sizeof why) == 0 && access(path, F_OK) == 0);
}

// mkdir -p; every new name is made durable. 0, or EXIT_USAGE.
static int checkpoint_make_out(const char *out, char *why, size_t why_size) {
    char path[MAX_PATH], parent[MAX_PATH];
    size_t len = strlen(out);
    if (len == 0 || len >= MAX_PATH)
        return explain(EXIT_USAGE, why, why_size, "--out '%.80s': no path that a directory can have", out);
    for (size_t k = 1; k <= len; k++) {
        if (out[k] != '/' && out[k] != 0) continue;
        snprintf(path, sizeof path, "%.*s", (int)k, out);
        if (mkdir(path, 0777) == 0) {
            char *slash = strrchr(path, '/');
            snprintf(parent, sizeof parent, "%.*s", slash ? (int)(slash - path + 1) : 1, slash ? path : ".");
            if (dir_sync(parent) == 0) continue;
        } else if (errno == EEXIST || (k < len && access(path, F_OK) == 0)) {
            continue;
        }
        return explain(EXIT_USAGE, why, why_size, "--out %s: cannot make the directory %s: %s; name another place", out,
                       path, strerror(errno));
    }
    return 0;
}

// Makes OUT if needed, takes OUT/lock for the rest of the process's life and removes what dead writers left behind.
// Once, before the first save. A second live writer gets EXIT_USAGE.
MAYBE_UNUSED
static int checkpoint_lock(const char *out, char *why, size_t why_size) {
    char path[MAX_PATH];
    int code = checkpoint_make_out(out, why, why_size);
    if (code == 0) code = path_join(path, out, "lock", why, why_size);
    if (code) return code;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB) != 0) {
        int reason = errno;
        if (fd >= 0) close(fd);
        if (fd >= 0 && reason == EWOULDBLOCK)
            return explain(EXIT_USAGE, why, why_size,
                           "--out %s: another process writes there; stop it or name another directory", out);
        return explain(EXIT_USAGE, why, why_size, "--out %s: cannot lock %s: %s; name another place", out, path,
                       strerror(reason));
    }
    DIR *d = opendir(out);
    for (struct dirent *e; d && (e = readdir(d));)  // we hold the lock: whoever wrote these is gone
        if (strncmp(e->d_name, "tmp.", 4) == 0 && e->d_name[4] >= '0' && e->d_name[4] <= '9' &&
            path_join(path, out, e->d_name, why, why_size) == 0)
            checkpoint_remove(path);
    if (d) closedir(d);
    return 0;
}

// The newest valid checkpoint of OUT: its path and its step. Every checksum is verified; damaged ones are named on
// stderr. None, or no OUT: step -1. Only damaged ones: EXIT_DAMAGED, since starting afresh would lose the run.
MAYBE_UNUSED
static int checkpoint_latest(const char *out, char *dir, size_t dir_size, int *step, char *why, size_t why_size) {
    char path[MAX_PATH];
    int count = 0, code = 0, said;
    int *steps = comm.rank == 0 ? checkpoint_list(out, &count) : NULL;
    *step = -1;
    if (count < 0 && errno != ENOENT) code = explain(EXIT_USAGE, why, why_size, "--out %s: %s", out, strerror(errno));
    if ((code = comm_agree(code, why, why_size, "looking for a checkpoint"))) return code;
    comm_broadcast(&count, sizeof count, "looking for a checkpoint");
    if (comm.rank != 0) steps = (int *)xcalloc(count > 0 ? (size_t)count : 1, sizeof *steps);
    if (count > 0) comm_broadcast(steps, (size_t)count * sizeof *steps, "looking for a checkpoint");
    for (int k = 0; k < count && *step < 0; k++) {
        code = checkpoint_step_dir(path, out, steps[k], why, why_size);
        if (code == 0) code = manifest_verify(path, 0, &said, why, why_size);
        if (code == 0 && said != steps[k])
            code = checkpoint_damaged(path, why, why_size, "its manifest.json is of step %d", said);
        if (code == 0) {
            *step = steps[k];
            format_into(dir, dir_size, "%s", path);
        } else if (k + 1 < count) {
            note("%s; trying the checkpoint before it", why);
        }
    }
    free(steps);
    return code;
}

// ----------------------------------------------------------------------------------------------------------------
// Saving

typedef struct {
    const char *prefix;  // of the tensors' names in the file
    int kind;            // KIND_WEIGHT, KIND_M, ...
    int dtype;
} TensorGroup;

// Opens a file that all ranks write together: rank 0 makes it, the others join in.
static int shared_create(SafeWriter *w, const char *path, const SafeTensor *tensors, size_t count, char *why,
                         size_t why_size) {
    int code = comm.rank == 0 ? safetensors_create(w, path, tensors, count, why, why_size) : 0, open = comm.rank == 0;
    if ((code = comm_agree(code, why, why_size, "saving"))) return code;
    if (!open) code = safetensors_attach(w, path, tensors, count, why, why_size);
    open = code == 0;
    if ((code = comm_agree(code, why, why_size, "saving")) && open) safetensors_abandon(w);
    return code;
}

// Ends it with the code of this rank's own part. On success *bytes grows, and the manifest has an entry.
static int shared_finish(SafeWriter *w, int code, int file, JsonWriter *manifest, uint64_t *bytes, char *why,
                         size_t why_size) {
    if (code) safetensors_abandon(w);
    else code = safetensors_finish(w, why, why_size);
    int open = code == 0;
    if ((code = comm_agree(code, why, why_size, "saving")) == 0) {
        manifest_safetensors(manifest, file, w);
        *bytes += w->size;
    }
    if (open) safetensors_release(w);
    return code;
}

// This rank's runs of all tensors, and everybody's checksums.
static int write_runs(SafeWriter *w, const TensorTable *table, const Backend *backend, const TensorGroup *groups,
                      int num_groups, char *why, size_t why_size) {
    size_t tensors = (size_t)table->num_tensors, all = tensors * (size_t)num_groups, run = 0, num_runs = 0;
    float *values = (float *)xcalloc(table_largest(table), sizeof(float));
    double *crcs = NULL;  // [num_runs]; a double holds any checksum
    int code = 0, owner;
    for (int pass = 0; pass < 3; pass++) {  // counts the runs; writes; takes the checksums together
        if (pass == 1) crcs = (double *)xcalloc(num_runs, sizeof(double));
        if (pass == 2) {
            if ((code = comm_agree(code, why, why_size, "saving"))) break;
            for (size_t at = 0; at < num_runs; at += 1 << 16)
                comm_sum(crcs + at, num_runs - at < 1 << 16 ? (int)(num_runs - at) : 1 << 16, "saving");
        }
        run = 0;
        for (size_t k = 0; k < all; k++) {
            int index = (int)(k % tensors), kind = groups[k / tensors].kind;
            const TensorSpec *spec = &table->tensors[index];
            for (size_t at = 0, n; at < spec->count; at += n, run++) {
                uint32_t crc;
                n = tensor_run(backend, spec, index, at, &owner);
                if (pass == 0) num_runs++;
                if (pass == 2) safetensors_count_part(w, k, n, (uint32_t)crcs[run]);
                if (pass != 1 || owner != comm.rank || code) continue;
                if (n == spec->count) backend->read_tensor(kind, index, values);
                else backend->read_part(kind, index, at, n, values);
                code = safetensors_write_part(w, k, at, values, n, &crc, why, why_size);
                crcs[run] = crc;
            }
        }
    }
    free(values);
    free(crcs);
    return code;
}

// Writes one safetensors file with every tensor of the table once for each group, and its part of the manifest. Each
// rank writes what it owns; one run of elements at a time crosses from the backend into one buffer.
static int write_groups(const char *path, const TensorTable *table, const Backend *backend, const TensorGroup *groups,
                        int num_groups, int file, JsonWriter *manifest, uint64_t *bytes, char *why, size_t why_size) {
    enum { NAME = 128 };
    size_t n = (size_t)table->num_tensors, all = n * (size_t)num_groups;
    SafeTensor *tensors = (SafeTensor *)xcalloc(all, sizeof *tensors);
    char *names = (char *)xcalloc(all, NAME);
    SafeWriter w;
    for (size_t k = 0; k < all; k++) {
        const TensorSpec *spec = &table->tensors[k % n];
        format_into(names + k * NAME, NAME, "%s%s", groups[k / n].prefix, spec->name);
        tensors[k].name = names + k * NAME;
        tensors[k].dtype = groups[k / n].dtype;
        tensors[k].ndim = spec->ndim;
        for (int d = 0; d < spec->ndim; d++) tensors[k].shape[d] = (size_t)spec->shape[d];
    }
    int code = shared_create(&w, path, tensors, all, why, why_size);
    if (code == 0) {
        code = write_runs(&w, table, backend, groups, num_groups, why, why_size);
        code = shared_finish(&w, code, file, manifest, bytes, why, why_size);
    }
    free(tensors);
    free(names);
    return code;
}

// Where this rank's backend keeps a row of the stored states, -1: another DP group has it.
static int state_row_here(const Checkpoint *c, int row) {
    int together = c->batch * comm.dp_size;  // rows of a micro-step
    if (comm.dp_size == 1) return row;
    return row % together / c->batch == comm.dp_rank ? row / together * c->batch + row % c->batch : -1;
}

// Stored states of all rows: the tensors of the state table, each with the rows as first axis.
static int write_states(const Checkpoint *c, const char *path, JsonWriter *manifest, uint64_t *bytes, char *why,
                        size_t why_size) {
    const TensorTable *states = c->states;
    size_t n = (size_t)states->num_tensors;
    SafeTensor *tensors = (SafeTensor *)xcalloc(n, sizeof *tensors);
    SafeWriter w;
    for (size_t k = 0; k < n; k++) {
        const TensorSpec *spec = &states->tensors[k];
        tensors[k].name = spec->name;
        tensors[k].dtype = DTYPE_F32;
        tensors[k].ndim = spec->ndim + 1;
        tensors[k].shape[0] = (size_t)c->num_state_rows;
        for (int d = 0; d < spec->ndim; d++) tensors[k].shape[d + 1] = (size_t)spec->shape[d];
    }
    int code = shared_create(&w, path, tensors, n, why, why_size);
    if (code == 0) {
        float *values = (float *)xcalloc(states->total, sizeof(float));
        double *crcs = (double *)xcalloc(n, sizeof(double));
        int failed = 0;
        for (int row = 0; row < c->num_state_rows; row++) {
            int local = state_row_here(c, row), writes = local >= 0 && comm.sp_rank == 0 && !failed;
            if (writes) c->backend->read_state(local, values);
            for (size_t k = 0; k < n; k++) {
                size_t count = states->tensors[k].count;
                uint32_t crc = 0;
                if (writes && !failed)
                    failed = safetensors_write_part(&w, k, (size_t)row * count, values + states->tensors[k].offset,
                                                    count, &crc, why, why_size);
                crcs[k] = crc;
            }
            comm_sum(crcs, (int)n, "saving states");
            for (size_t k = 0; k < n; k++) safetensors_count_part(&w, k, states->tensors[k].count, (uint32_t)crcs[k]);
        }
        free(values);
        free(crcs);
        code = shared_finish(&w, failed, FILE_STATE, manifest, bytes, why, why_size);
    }
    free(tensors);
    return code;
}

// A file of text, by rank 0; its part of the manifest unless `manifest` is NULL.
static int write_text(const char *path, const char *text, size_t len, int file, JsonWriter *manifest, uint64_t *bytes,
                      char *why, size_t why_size) {
    int fd, code = 0;
    if (comm.rank == 0) {
        if ((code = file_create(path, &fd, why, why_size))) return code;
        code = file_write(fd, path, 0, text, len, why, why_size);
        if (code) close(fd);
        else code = file_commit(fd, path, why, why_size);
    }
    if (code) return code;
    *bytes += len;
    if (!manifest) return 0;
    json_begin(manifest, checkpoint_files[file], '[');
    manifest_part(manifest, "all", len, crc32c(0, text, len));
    json_end(manifest, ']');
    return 0;
}

// All files of a checkpoint into the directory `dir`, manifest.json last.
static int checkpoint_write(Checkpoint *c, const char *dir, int step, const char *trainer_json, char *why,
                            size_t why_size) {
    static const TensorGroup moments[3] = {
        {"m.", KIND_M, DTYPE_F32}, {"v.", KIND_V, DTYPE_F32}, {"w.", KIND_WEIGHT, DTYPE_F32}};
    TensorGroup weights = {"", KIND_WEIGHT, c->save_bf16 ? DTYPE_BF16 : DTYPE_F32};
    JsonWriter manifest, config;
    char path[NUM_CHECKPOINT_FILES][MAX_PATH];
    int code = 0;
    for (int f = 0; f < NUM_CHECKPOINT_FILES && code == 0; f++)
        code = path_join(path[f], dir, checkpoint_files[f], why, why_size);
    if (code) return code;
    c->bytes_written = 0;
    memset(&config, 0, sizeof config);
    config_write(c->config, c->save_bf16, &config);
    manifest_begin(&manifest, step);
    code = write_text(path[FILE_CONFIG], config.text, config.len, FILE_CONFIG, &manifest, &c->bytes_written, why,
                      why_size);
    code = comm_agree(code, why, why_size, "saving");
    if (code == 0)
        code = write_groups(path[FILE_MODEL], c->table, c->backend, &weights, 1, FILE_MODEL, &manifest,
                            &c->bytes_written, why, why_size);
    if (code == 0)
        code = write_groups(path[FILE_OPTIMIZER], c->table, c->backend, moments, c->save_bf16 ? 3 : 2, FILE_OPTIMIZER,
                            &manifest, &c->bytes_written, why, why_size);
    if (code == 0 && c->num_state_rows > 0)
        code = write_states(c, path[FILE_STATE], &manifest, &c->bytes_written, why, why_size);
    if (code == 0)
        code = write_text(path[FILE_TRAINER], trainer_json, strlen(trainer_json), FILE_TRAINER, &manifest,
                          &c->bytes_written, why, why_size);
    if (code == 0) {
        manifest_end(&manifest);
        code = write_text(path[FILE_MANIFEST], manifest.text, manifest.len, FILE_MANIFEST, NULL, &c->bytes_written, why,
                          why_size);
    }
    json_writer_free(&config);
    json_writer_free(&manifest);
    if (code == 0 && comm.rank == 0 && dir_sync(dir) != 0)
        code = explain(EXIT_USAGE, why, why_size, "cannot write %s: %s", dir, strerror(errno));
    return code;
}

// Gives a complete temporary directory its name. A valid checkpoint of that step already there is kept, since it is
// the same; a damaged one (the run fell back behind it) makes room.
static int checkpoint_commit(const char *out, const char *tmp, const char *final, int step, char *why,
                             size_t why_size) {
    char old[MAX_PATH] = "";
    int said, code;
    if (access(final, F_OK) == 0) {
        if (manifest_verify_parts(final, 0, 0, 1, &said, why, why_size) == 0 && said == step) {
            checkpoint_remove(tmp);
            return 0;
        }
        if (snprintf(old, sizeof old, "%s.old", tmp) >= (int)sizeof old)
            return explain(EXIT_USAGE, why, why_size, "path too long: %.80s...", tmp);
        checkpoint_remove(old);
        if (rename(final, old) != 0)
            return explain(EXIT_USAGE, why, why_size, "cannot replace %s: %s; move it away", final, strerror(errno));
    }
    if (rename(tmp, final) != 0) {
        code = explain(EXIT_USAGE, why, why_size, "cannot write %s: %s", final, strerror(errno));
        if (old[0]) (void)!rename(old, final);  // as it was; if that fails too, the checkpoint before it remains
        return code;
    }
    code = dir_sync(out) == 0 ? 0 : explain(EXIT_USAGE, why, why_size, "cannot write %s: %s", out, strerror(errno));
    if (old[0]) checkpoint_remove(old);
    return code;
}

// Deletes all but the newest c->keep checkpoints up to `step`. Later ones are damaged ones that the run fell back
// behind; directories to which somebody added files are not ours to delete. `tmp`: a free name.
static void checkpoint_prune(const Checkpoint *c, int step, const char *tmp) {
    char path[MAX_PATH], why[MAX_PATH];
    int count, kept = 0, *steps = checkpoint_list(c->out, &count);
    for (int k = 0; k < count && c->keep > 0; k++) {
        if (steps[k] > step || ++kept <= c->keep) continue;
        if (checkpoint_step_dir(path, c->out, steps[k], why, sizeof why) != 0 || !checkpoint_only_ours(path)) continue;
        if (rename(path, tmp) == 0) checkpoint_remove(tmp);
        else note("cannot delete %s: %s", path, strerror(errno));
    }
    free(steps);
}

// Writes OUT/step_%08d, then deletes old checkpoints beyond c->keep. `trainer_json` is stored as it is. On an error
// nothing is left behind and the older checkpoints are as they were. checkpoint_lock() must have been called. All ranks
// call it and get the same answer; what is not a tensor, rank 0 does.
MAYBE_UNUSED
static int checkpoint_save(Checkpoint *c, int step, const char *trainer_json, char *why, size_t why_size) {
    char tmp[MAX_PATH], final[MAX_PATH], name[32];
    void (*cleanup_before)(void) = die_cleanup;
    int first = comm.rank == 0;
    snprintf(name, sizeof name, "tmp.%ld", first ? (long)getpid() : (long)comm.peers[0].pid);
    int code = path_join(tmp, c->out, name, why, why_size);
    if (code == 0) code = checkpoint_step_dir(final, c->out, step, why, why_size);
    if (code) return code;
    format_into(checkpoint_unfinished, sizeof checkpoint_unfinished, "%s", tmp);
    if (first) {
        die_cleanup = checkpoint_cleanup;
        checkpoint_remove(tmp);  // what could not be removed after an earlier save
        if (mkdir(tmp, 0777) != 0)
            code = explain(EXIT_USAGE, why, why_size, "cannot make the directory %s: %s", tmp, strerror(errno));
    }
    code = comm_agree(code, why, why_size, "saving");
    if (code == 0) code = checkpoint_write(c, tmp, step, trainer_json, why, why_size);
    if (code == 0 && first) code = checkpoint_commit(c->out, tmp, final, step, why, why_size);
    code = comm_agree(code, why, why_size, "saving");
    if (code && first) checkpoint_remove(tmp);
    die_cleanup = cleanup_before;
    if (code == 0 && first) checkpoint_prune(c, step, tmp);
    return code;
}

// ----------------------------------------------------------------------------------------------------------------
// Loading

// Stored states. A checkpoint without any (the run had no --carry-state before) leaves all rows fresh.
static int load_states(const Checkpoint *c, const char *path, char *why, size_t why_size) {
    const TensorTable *states = c->states;
    SafeTensors s;
    if (access(path, F_OK) != 0) {
        note("%s is not there: all carried states start fresh", path);
        for (int row = 0; row < c->num_state_rows / comm.dp_size; row++) c->backend->write_state(row, NULL);
        return 0;
    }
    int code = safetensors_open(&s, path, why, why_size);
    if (code) return code;
    float *values = (float *)xcalloc(states->total, sizeof(float));
    for (int row = 0; row < c->num_state_rows && code == 0; row++) {
        int local = state_row_here(c, row);
        for (int k = 0; local >= 0 && k < states->num_tensors && code == 0; k++) {
            const TensorSpec *spec = &states->tensors[k];
            const SafeTensor *t = safetensors_find(&s, spec->name);
            int same = t && t->dtype == DTYPE_F32 && t->ndim == spec->ndim + 1;
            for (int d = 0; same && d < spec->ndim; d++) same = t->shape[d + 1] == (size_t)spec->shape[d];
            if (!same) code = weights_damaged(&s, "does not fit the model", spec->name, why, why_size);
            else if (t->shape[0] != (size_t)c->num_state_rows) {
                code = explain(EXIT_USAGE, why, why_size,
                               "%s has the states of %zu streams, this run has %d; give the --tokens-per-step, "
                               "--batch and --seq-len it was saved with",
                               path, t->shape[0], c->num_state_rows);
            } else {
                code = safetensors_read(&s, t, (size_t)row * spec->count, spec->count, values + spec->offset, why,
                                        why_size);
            }
        }
        if (code == 0 && local >= 0) c->backend->write_state(local, values);
    }
    free(values);
    safetensors_close(&s);
    return code;
}

// The tensors of all groups of one file into the backend; the file may hold no others.
static int load_groups(const Checkpoint *c, const SafeTensors *s, const TensorGroup *groups, int num_groups, char *why,
                       size_t why_size) {
    const SafeTensor **found = (const SafeTensor **)xcalloc((size_t)c->table->num_tensors, sizeof *found);
    unsigned char *used = (unsigned char *)xcalloc(s->num_tensors, 1);
    int code = 0;
    for (int g = 0; g < num_groups && code == 0; g++) {
        code = weights_match(s, NULL, c->table, groups[g].prefix, found, used, why, why_size);
        if (code == 0) code = weights_move(s, c->config, c->table, found, groups[g].kind, c->backend, why, why_size);
    }
    if (code == 0) code = weights_all_used(s, used, why, why_size);
    free(found);
    free(used);
    return code;
}

// Weights (the fp32 masters), moments and stored states of a directory that checkpoint_latest() found, into the
// backend. *trainer_json: its trainer.json, malloced.
MAYBE_UNUSED
static int checkpoint_load(const Checkpoint *c, const char *dir, char **trainer_json, char *why, size_t why_size) {
    static const TensorGroup groups[3] = {{"m.", KIND_M, 0}, {"v.", KIND_V, 0}, {"w.", KIND_WEIGHT, 0}},
                             weights = {"", KIND_WEIGHT, 0};
    char path[NUM_CHECKPOINT_FILES][MAX_PATH], first[160];
    SafeTensors s;
    size_t len;
    int code = 0;
    for (int f = 0; f < NUM_CHECKPOINT_FILES && code == 0; f++)
        code = path_join(path[f], dir, checkpoint_files[f], why, why_size);
    if (code == 0) code = safetensors_open(&s, path[FILE_OPTIMIZER], why, why_size);
    if (code) return code;
    format_into(first, sizeof first, "w.%s", c->table->tensors[0].name);
    int masters = safetensors_find(&s, first) != NULL;  // the weights themselves are bf16
    code = load_groups(c, &s, groups, masters ? 3 : 2, why, why_size);
    safetensors_close(&s);
    if (code == 0 && !masters && (code = safetensors_open(&s, path[FILE_MODEL], why, why_size)) == 0) {
        code = load_groups(c, &s, &weights, 1, why, why_size);
        safetensors_close(&s);
    }
    if (code == 0 && c->num_state_rows > 0) code = load_states(c, path[FILE_STATE], why, why_size);
    return code ? code : file_read_text(path[FILE_TRAINER], MAX_MANIFEST_BYTES, trainer_json, &len, why, why_size);
}

// ----------------------------------------------------------------------------------------------------------------
// --dump: `loss` [1], `logits` [B, T, V] after the cap, `grad.<tensor>` (unclipped), all F32. Appears only when
// complete.

MAYBE_UNUSED
static int dump_write(const char *path, const TensorTable *table, const Backend *backend, double loss,
                      const float *logits, int B, int T, int V, char *why, size_t why_size) {
    enum { NAME = 128 };
    size_t n = (size_t)table->num_tensors + 2;
    char tmp[MAX_PATH];
    struct stat st;
    SafeWriter w;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode))
        return explain(EXIT_USAGE, why, why_size, "--dump %s: not a regular file; name another", path);
    if (snprintf(tmp, sizeof tmp, "%s.tmp.%ld", path, (long)getpid()) >= (int)sizeof tmp)
        return explain(EXIT_USAGE, why, why_size, "--dump: path too long: %.80s...", path);
    SafeTensor *tensors = (SafeTensor *)xcalloc(n, sizeof *tensors);
    char *names = (char *)xcalloc(n, NAME);
    tensors[0].name = "loss";
    tensors[0].ndim = 1;
    tensors[0].shape[0] = 1;
    tensors[1].name = "logits";
    tensors[1].ndim = 3;
    tensors[1].shape[0] = (size_t)B;
    tensors[1].shape[1] = (size_t)T;
    tensors[1].shape[2] = (size_t)V;
    for (int k = 0; k < table->num_tensors; k++) {
        const TensorSpec *spec = &table->tensors[k];
        SafeTensor *t = &tensors[k + 2];
        format_into(names + (size_t)k * NAME, NAME, "grad.%s", spec->name);
        t->name = names + (size_t)k * NAME;
        t->ndim = spec->ndim;
        for (int d = 0; d < spec->ndim; d++) t->shape[d] = (size_t)spec->shape[d];
    }
    int code = safetensors_create(&w, tmp, tensors, n, why, why_size);
    if (code == 0) {
        float value = (float)loss, *values = (float *)xcalloc(table_largest(table), sizeof(float));
        code = safetensors_append(&w, 0, &value, 1, why, why_size);
        if (code == 0) code = safetensors_append(&w, 1, logits, (size_t)B * (size_t)T * (size_t)V, why, why_size);
        for (int k = 0; k < table->num_tensors && code == 0; k++) {
            backend->read_tensor(KIND_GRAD, k, values);
            code = safetensors_append(&w, (size_t)k + 2, values, table->tensors[k].count, why, why_size);
        }
        free(values);
        if (code) safetensors_abandon(&w);
        else if ((code = safetensors_finish(&w, why, why_size)) == 0) safetensors_release(&w);
        if (code == 0 && rename(tmp, path) != 0)
            code = explain(EXIT_USAGE, why, why_size, "cannot write %s: %s", path, strerror(errno));
        if (code) unlink(tmp);
    }
    free(tensors);
    free(names);
    return code;
}

#endif
