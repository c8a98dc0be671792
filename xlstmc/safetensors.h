// safetensors.h: reads and writes safetensors files: 8 bytes N, N bytes of JSON header, then the tensors' bytes.
// Little-endian, row-major. The reader takes a file only if its header accounts for every byte: offsets without hole or
// overlap to the end of the file, sizes that follow from the shapes. Several files behind a Hugging Face
// model.safetensors.index.json form one set. The writer streams: it never needs a second copy of a model in memory.
//
// Functions with `why` return 0, or an exit code and one line in `why` that names the file: EXIT_USAGE if it is not
// there or cannot be written, EXIT_DAMAGED if its content is wrong.
#ifndef XLSTMC_SAFETENSORS_H
#define XLSTMC_SAFETENSORS_H

#include <assert.h>
#include <fcntl.h>
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

#include "crc32c.h"
#include "json.h"
#include "util.h"

#define SAFE_MAX_COUNT ((uint64_t)1 << 48)  // elements of a tensor: no product with a width overflows
enum { SAFE_MAX_DIMS = 8, SAFE_MAX_FILES = 256, SAFE_MAX_HEADER = 100000000, SAFE_BUFFER = 1 << 20 };

// The first four are read as float; the others are known so that a file that also holds them is understood.
typedef enum { DTYPE_F32, DTYPE_BF16, DTYPE_F16, DTYPE_F64, NUM_FLOAT_DTYPES } DType;
static const struct {
    const char *name;
    size_t width;
} safe_dtypes[] = {{"F32", 4}, {"BF16", 2}, {"F16", 2},     {"F64", 8},     {"I64", 8},    {"U64", 8},
                   {"C64", 8}, {"I32", 4},  {"U32", 4},     {"I16", 2},     {"U16", 2},    {"I8", 1},
                   {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}};
enum { NUM_DTYPES = sizeof safe_dtypes / sizeof safe_dtypes[0] };

typedef struct {
    const char *name;
    int dtype;  // index of safe_dtypes
    int ndim;   // 0: a scalar
    size_t shape[SAFE_MAX_DIMS];
    size_t count;     // elements, may be 0
    uint64_t offset;  // of the first byte in its file
    int file;         // index of SafeTensors.files
} SafeTensor;

typedef struct {
    char *path;
    int fd;
    uint64_t size;
    Json *header;  // holds the tensors' names
} SafeFile;

typedef struct {
    int num_files;
    SafeFile *files;
    size_t num_tensors;
    SafeTensor *tensors;  // sorted by name
} SafeTensors;

static size_t safe_bytes(const SafeTensor *t) { return t->count * safe_dtypes[t->dtype].width; }

// ----------------------------------------------------------------------------------------------------------------
// Plain files

// Puts the reason into `why` (cut if it does not fit) and returns `code`.
PRINTF_LIKE(4, 5)
static int explain(int code, char *why, size_t why_size, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(why, why_size, fmt, args);
    va_end(args);
    return code;
}

// Opens a regular file for reading. A pipe or a terminal is refused: it could make the program wait for ever.
static int file_open(const char *path, int *fd, uint64_t *size, char *why, size_t why_size) {
    struct stat st;
    *size = 0;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd >= 0 && fstat(*fd, &st) == 0 && S_ISREG(st.st_mode)) {
        *size = (uint64_t)st.st_size;
        return 0;
    }
    const char *reason = *fd < 0 ? strerror(errno) : "not a regular file";
    if (*fd >= 0) close(*fd);
    return explain(EXIT_USAGE, why, why_size, "cannot read %s: %s", path, reason);
}

// Reads `size` bytes at `offset`.
static int file_read(int fd, const char *path, uint64_t offset, void *dst, size_t size, char *why, size_t why_size) {
    char *p = (char *)dst;
    while (size > 0) {
        ssize_t n = pread(fd, p, size, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            return explain(EXIT_DAMAGED, why, why_size, "cannot read %s: %s", path,
                           n < 0 ? strerror(errno) : "it became shorter meanwhile");
        p += n;
        offset += (uint64_t)n;
        size -= (size_t)n;
    }
    return 0;
}

// Adds the checksum of `size` bytes at `offset` to *crc.
MAYBE_UNUSED
static int file_crc(int fd, const char *path, uint64_t offset, uint64_t size, uint32_t *crc, char *why,
                    size_t why_size) {
    unsigned char *buffer = (unsigned char *)xcalloc(size < SAFE_BUFFER ? (size_t)size : (size_t)SAFE_BUFFER, 1);
    int code = 0;
    while (size > 0 && code == 0) {
        size_t n = size < SAFE_BUFFER ? (size_t)size : (size_t)SAFE_BUFFER;
        code = file_read(fd, path, offset, buffer, n, why, why_size);
        if (code == 0) *crc = crc32c(*crc, buffer, n);
        offset += n;
        size -= n;
    }
    free(buffer);
    return code;
}

// Whole small text file, malloced, with a NUL after it; a file over `limit` bytes is refused.
static int file_read_text(const char *path, uint64_t limit, char **text, size_t *len, char *why, size_t why_size) {
    int fd;
    uint64_t size;
    *text = NULL;
    *len = 0;
    int code = file_open(path, &fd, &size, why, why_size);
    if (code) return code;
    if (size > limit) {
        close(fd);
        return explain(EXIT_DAMAGED, why, why_size, "%s has %llu bytes; at most %llu are expected", path,
                       (unsigned long long)size, (unsigned long long)limit);
    }
    *len = (size_t)size;
    *text = (char *)xcalloc(*len + 1, 1);
    code = file_read(fd, path, 0, *text, *len, why, why_size);
    close(fd);
    if (code) free(*text);
    return code;
}

// Writes `size` bytes at `offset`; 0 or EXIT_USAGE.
static int file_write(int fd, const char *path, uint64_t offset, const void *src, size_t size, char *why,
                      size_t why_size) {
    const char *p = (const char *)src;
    while (size > 0) {
        ssize_t n = pwrite(fd, p, size, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            return explain(EXIT_USAGE, why, why_size, "cannot write %s: %s", path, strerror(n < 0 ? errno : ENOSPC));
        p += n;
        offset += (uint64_t)n;
        size -= (size_t)n;
    }
    return 0;
}

// Flushes to the device and closes; 0 or EXIT_USAGE. The descriptor is closed in any case.
static int file_commit(int fd, const char *path, char *why, size_t why_size) {
    int failed = fsync(fd) != 0, reason = errno;
    if (close(fd) != 0 && !failed) {
        failed = 1;
        reason = errno;
    }
    if (!failed) return 0;
    return explain(EXIT_USAGE, why, why_size, "cannot write %s: %s", path, strerror(reason));
}

static int file_create(const char *path, int *fd, char *why, size_t why_size) {
    *fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (*fd >= 0) return 0;
    return explain(EXIT_USAGE, why, why_size, "cannot create %s: %s", path, strerror(errno));
}

// ----------------------------------------------------------------------------------------------------------------
// Reader

PRINTF_LIKE(4, 5)
static int safe_damaged(const char *path, char *why, size_t why_size, const char *fmt, ...) {
    char reason[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(reason, sizeof reason, fmt, args);
    va_end(args);
    return explain(EXIT_DAMAGED, why, why_size, "%s is no valid safetensors file: %s; get it again from where it came",
                   path, reason);
}

// One entry of the header. Offsets are checked against the data's size here, against each other in safe_check_cover().
static int safe_parse_tensor(const SafeFile *f, uint64_t data_start, const char *name, const Json *entry, SafeTensor *t,
                             char *why, size_t why_size) {
    const Json *shape = json_get(entry, "shape"), *offsets = json_get(entry, "data_offsets");
    const char *dtype = json_get_string(json_get(entry, "dtype"));
    uint64_t begin, end, dim;
    t->name = name;
    if (!dtype || !shape || shape->type != JSON_ARRAY || !offsets || offsets->type != JSON_ARRAY ||
        offsets->count != 2 || !json_get_uint(&offsets->items[0], &begin) || !json_get_uint(&offsets->items[1], &end))
        return safe_damaged(f->path, why, why_size, "tensor '%.80s' lacks dtype, shape or data_offsets", name);
    while (t->dtype < NUM_DTYPES && strcmp(dtype, safe_dtypes[t->dtype].name) != 0) t->dtype++;
    if (t->dtype == NUM_DTYPES)
        return safe_damaged(f->path, why, why_size, "tensor '%.80s' has the unknown dtype '%.20s'", name, dtype);
    if (shape->count > SAFE_MAX_DIMS)
        return safe_damaged(f->path, why, why_size, "tensor '%.80s' has %zu dimensions", name, shape->count);
    uint64_t available = f->size - data_start, count = 1;
    t->ndim = (int)shape->count;
    for (int k = 0; k < t->ndim; k++) {
        if (!json_get_uint(&shape->items[k], &dim) || (dim > 0 && count > SAFE_MAX_COUNT / dim))
            return safe_damaged(f->path, why, why_size, "the shape of tensor '%.80s' is impossible", name);
        count *= dim;
        t->shape[k] = (size_t)dim;
    }
    if (begin > end || end > available || end - begin != count * safe_dtypes[t->dtype].width)
        return safe_damaged(f->path, why, why_size, "data_offsets of tensor '%.80s' do not fit its shape or the file",
                            name);
    t->count = (size_t)count;
    t->offset = data_start + begin;
    return 0;
}

static int safe_compare_offset(const void *a, const void *b) {
    const SafeTensor *x = (const SafeTensor *)a, *y = (const SafeTensor *)b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return (x->count > y->count) - (x->count < y->count);  // empty tensors first
}

static int safe_compare_name(const void *a, const void *b) {
    return strcmp(((const SafeTensor *)a)->name, ((const SafeTensor *)b)->name);
}

// Appends the tensors of one file to s->tensors.
static int safe_parse_header(SafeTensors *s, int file, uint64_t data_start, char *why, size_t why_size) {
    const SafeFile *f = &s->files[file];
    const Json *header = f->header;
    s->tensors = (SafeTensor *)realloc(s->tensors, (s->num_tensors + header->count + 1) * sizeof(SafeTensor));
    if (!s->tensors) die(EXIT_RUN, "out of memory: the header of %s", f->path);
    SafeTensor *first = s->tensors + s->num_tensors;
    size_t count = 0;
    for (size_t k = 0; k < header->count; k++) {
        const Json *entry = &header->items[k];
        if (strcmp(header->keys[k], "__metadata__") == 0) {
            if (entry->type != JSON_OBJECT) return safe_damaged(f->path, why, why_size, "__metadata__ is no object");
            for (size_t m = 0; m < entry->count; m++)
                if (!json_get_string(&entry->items[m]))
                    return safe_damaged(f->path, why, why_size, "__metadata__ holds something else than strings");
            continue;
        }
        memset(&first[count], 0, sizeof first[count]);
        first[count].file = file;
        int code = safe_parse_tensor(f, data_start, header->keys[k], entry, &first[count], why, why_size);
        if (code) return code;
        count++;
    }
    qsort(first, count, sizeof *first, safe_compare_offset);
    uint64_t at = data_start;
    for (size_t k = 0; k < count; k++) {
        if (first[k].offset != at)
            return safe_damaged(f->path, why, why_size, "a hole or an overlap before tensor '%.80s'", first[k].name);
        at += safe_bytes(&first[k]);
    }
    if (at != f->size)
        return safe_damaged(f->path, why, why_size, "%llu bytes belong to no tensor",
                            (unsigned long long)(f->size - at));
    s->num_tensors += count;
    return 0;
}

static int safe_open_file(SafeTensors *s, const char *path, char *why, size_t why_size) {
    SafeFile *f = &s->files[s->num_files];
    unsigned char prefix[8];
    memset(f, 0, sizeof *f);
    int code = file_open(path, &f->fd, &f->size, why, why_size);
    if (code) return code;
    f->path = xstrdup(path);
    s->num_files++;
    if (f->size < 8) return safe_damaged(path, why, why_size, "it has only %d bytes", (int)f->size);
    if ((code = file_read(f->fd, path, 0, prefix, 8, why, why_size))) return code;
    uint64_t length = 0;
    for (int k = 7; k >= 0; k--) length = length << 8 | prefix[k];
    if (length > SAFE_MAX_HEADER || length > f->size - 8)
        return safe_damaged(path, why, why_size, "its header cannot have %llu bytes", (unsigned long long)length);
    char *text = (char *)xcalloc((size_t)length + 1, 1), reason[200];
    if ((code = file_read(f->fd, path, 8, text, (size_t)length, why, why_size)) == 0) {
        if (text[0] != '{') code = safe_damaged(path, why, why_size, "its header does not begin with '{'");
        else if (!(f->header = json_parse(text, (size_t)length, reason, sizeof reason)))
            code = safe_damaged(path, why, why_size, "its header is %s", reason);
    }
    free(text);
    return code ? code : safe_parse_header(s, s->num_files - 1, 8 + length, why, why_size);
}

static void safetensors_close(SafeTensors *s) {
    for (int k = 0; k < s->num_files; k++) {
        close(s->files[k].fd);
        free(s->files[k].path);
        json_free(s->files[k].header);
    }
    free(s->files);
    free(s->tensors);
    memset(s, 0, sizeof *s);
}

// Sorts the tensors of all files; after an error `code` of a part everything is released.
static int safe_open_end(SafeTensors *s, int code, char *why, size_t why_size) {
    if (code == 0) {
        qsort(s->tensors, s->num_tensors, sizeof *s->tensors, safe_compare_name);
        for (size_t k = 1; k < s->num_tensors && code == 0; k++)
            if (strcmp(s->tensors[k].name, s->tensors[k - 1].name) == 0)
                code = safe_damaged(s->files[s->tensors[k].file].path, why, why_size,
                                    "tensor '%.80s' is also in another shard", s->tensors[k].name);
    }
    if (code) safetensors_close(s);
    return code;
}

static void safe_open_begin(SafeTensors *s) {
    memset(s, 0, sizeof *s);
    s->files = (SafeFile *)xcalloc(SAFE_MAX_FILES, sizeof *s->files);
    s->tensors = (SafeTensor *)xcalloc(1, sizeof *s->tensors);
}

// Opens one file. Release with safetensors_close(); after an error there is nothing to release.
static int safetensors_open(SafeTensors *s, const char *path, char *why, size_t why_size) {
    safe_open_begin(s);
    return safe_open_end(s, safe_open_file(s, path, why, why_size), why, why_size);
}

MAYBE_UNUSED
static const SafeTensor *safetensors_find(const SafeTensors *s, const char *name) {  // NULL if there is none
    SafeTensor key;
    key.name = name;
    return (const SafeTensor *)bsearch(&key, s->tensors, s->num_tensors, sizeof key, safe_compare_name);
}

// The shards of an index: {"weight_map": {tensor: file}}. Each file's tensors must be exactly those mapped to it.
static int safe_open_shards(SafeTensors *s, const char *dir, const char *index_path, const Json *map, char *why,
                            size_t why_size) {
    char path[4096];
    if (!map || map->type != JSON_OBJECT || map->count == 0)
        return safe_damaged(index_path, why, why_size, "no weight_map");
    for (size_t k = 0; k < map->count; k++) {
        const char *name = json_get_string(&map->items[k]);
        if (!name || !*name || strchr(name, '/') || strlen(name) > 255 || strlen(dir) + 257 > sizeof path)
            return safe_damaged(index_path, why, why_size, "tensor '%.80s' is mapped to no file of this directory",
                                map->keys[k]);
        format_into(path, sizeof path, "%s/%s", dir, name);
        int known = 0;
        for (int f = 0; f < s->num_files; f++) known |= strcmp(s->files[f].path, path) == 0;
        if (known) continue;
        if (s->num_files == SAFE_MAX_FILES)
            return safe_damaged(index_path, why, why_size, "more than %d shards", SAFE_MAX_FILES);
        int code = safe_open_file(s, path, why, why_size);
        if (code) return code;
    }
    for (size_t k = 0; k < s->num_tensors; k++) {
        const SafeTensor *t = &s->tensors[k];
        const char *file = json_get_string(json_get(map, t->name)), *path_of = s->files[t->file].path;
        if (!file || strcmp(file, strrchr(path_of, '/') + 1) != 0)
            return safe_damaged(index_path, why, why_size, "tensor '%.80s' of %.200s is not mapped to that file",
                                t->name, path_of);
    }
    if (s->num_tensors != map->count)
        return safe_damaged(index_path, why, why_size, "it maps %zu tensors, its files hold %zu", map->count,
                            s->num_tensors);
    return 0;
}

// Opens DIR/model.safetensors, or the shards of DIR/model.safetensors.index.json.
MAYBE_UNUSED
static int safetensors_open_dir(SafeTensors *s, const char *dir, char *why, size_t why_size) {
    char path[4096], index[4096], reason[200], *text;
    size_t len;
    if (strlen(dir) > sizeof path - 64) { return explain(EXIT_USAGE, why, why_size, "path too long: %.80s...", dir); }
    format_into(path, sizeof path, "%s/model.safetensors", dir);
    format_into(index, sizeof index, "%s/model.safetensors.index.json", dir);
    if (access(path, F_OK) == 0 || access(index, F_OK) != 0) return safetensors_open(s, path, why, why_size);
    int code = file_read_text(index, SAFE_MAX_HEADER, &text, &len, why, why_size);
    if (code) return code;
    Json *root = json_parse(text, len, reason, sizeof reason);
    free(text);
    if (!root) return safe_damaged(index, why, why_size, "%s", reason);
    safe_open_begin(s);
    code = safe_open_shards(s, dir, index, json_get(root, "weight_map"), why, why_size);
    json_free(root);
    return safe_open_end(s, code, why, why_size);
}

static float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static float float_from_half(unsigned half) {
    unsigned sign = half >> 15, exponent = half >> 10 & 31, fraction = half & 1023;
    float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                  : exponent == 0 ? ldexpf((float)fraction, -24)
                                  : ldexpf((float)(fraction + 1024), (int)exponent - 25);
    return sign ? -value : value;
}

// bf16 keeps the upper half of a float; rounded to nearest, ties to even.
static unsigned bf16_from_float(float value) {
    uint32_t bits = bits_from_float(value);
    if (value != value) return (bits >> 16) | 0x40;  // stays a NaN
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static uint64_t load_little(const unsigned char *p, size_t width) {
    uint64_t value = 0;
    for (size_t k = width; k-- > 0;) value = value << 8 | p[k];
    return value;
}

static float safe_value(const unsigned char *p, int dtype) {
    if (dtype == DTYPE_F32) return float_from_bits((uint32_t)load_little(p, 4));
    if (dtype == DTYPE_BF16) return float_from_bits((uint32_t)load_little(p, 2) << 16);
    if (dtype == DTYPE_F16) return float_from_half((unsigned)load_little(p, 2));
    uint64_t bits = load_little(p, 8);
    double value;
    memcpy(&value, &bits, 8);
    return (float)value;
}

// Elements first .. first+count-1 of a tensor, as float.
MAYBE_UNUSED
static int safetensors_read(const SafeTensors *s, const SafeTensor *t, size_t first, size_t count, float *dst,
                            char *why, size_t why_size) {
    const SafeFile *f = &s->files[t->file];
    size_t width = safe_dtypes[t->dtype].width;
    assert(first <= t->count && count <= t->count - first);
    if (t->dtype >= NUM_FLOAT_DTYPES)
        return explain(EXIT_DAMAGED, why, why_size, "%s: tensor '%.80s' is %s; only F32, BF16, F16 and F64 can be read",
                       f->path, t->name, safe_dtypes[t->dtype].name);
    unsigned char *buffer = (unsigned char *)xcalloc(count < SAFE_BUFFER / width ? count : SAFE_BUFFER / width, width);
    int code = 0;
    for (size_t done = 0; done < count && code == 0;) {
        size_t n = count - done < SAFE_BUFFER / width ? count - done : SAFE_BUFFER / width;
        code = file_read(f->fd, f->path, t->offset + (first + done) * width, buffer, n * width, why, why_size);
        for (size_t k = 0; k < n && code == 0; k++) dst[done + k] = safe_value(buffer + k * width, t->dtype);
        done += n;
    }
    free(buffer);
    return code;
}

// ----------------------------------------------------------------------------------------------------------------
// Writer

typedef struct {
    char path[4096];
    int fd;
    size_t num_tensors;
    SafeTensor *tensors;  // [num_tensors] as given, with count and offset filled in
    size_t *written;      // [num_tensors] elements so far
    uint32_t *crc;        // [num_tensors] of the bytes so far
    uint32_t header_crc;  // of everything before the first tensor
    uint64_t header_bytes, size;
    unsigned char *buffer;  // of the largest tensor, at most SAFE_BUFFER
} SafeWriter;

static void safetensors_release(SafeWriter *w) {
    free(w->tensors);
    free(w->written);
    free(w->crc);
    free(w->buffer);
    w->tensors = NULL;
    w->written = NULL;
    w->crc = NULL;
    w->buffer = NULL;
}

// Gives up a file after an error of append; the path stays in w->path for whoever removes it.
MAYBE_UNUSED
static void safetensors_abandon(SafeWriter *w) {
    close(w->fd);
    safetensors_release(w);
}

// Everything that is known before the first byte is written: the header, in `json`, and where the tensors will be.
static void safe_plan(SafeWriter *w, JsonWriter *header, const char *path, const SafeTensor *tensors,
                      size_t num_tensors) {
    JsonWriter json;
    memset(&json, 0, sizeof json);
    memset(w, 0, sizeof *w);
    format_into(w->path, sizeof w->path, "%s", path);
    w->num_tensors = num_tensors;
    w->tensors = (SafeTensor *)xcalloc(num_tensors, sizeof *tensors);
    w->written = (size_t *)xcalloc(num_tensors, sizeof *w->written);
    w->crc = (uint32_t *)xcalloc(num_tensors, sizeof *w->crc);
    json_append(&json, "        ", 8);  // room for the length
    json_begin(&json, NULL, '{');
    json_begin(&json, "__metadata__", '{');
    json_write_string(&json, "format", "pt");
    json_end(&json, '}');
    uint64_t at = 0;
    size_t buffer = 1;
    for (size_t k = 0; k < num_tensors; k++) {
        SafeTensor *t = &w->tensors[k];
        *t = tensors[k];
        t->count = 1;
        t->offset = at;
        json_begin(&json, t->name, '{');
        json_write_string(&json, "dtype", safe_dtypes[t->dtype].name);
        json_begin(&json, "shape", '[');
        for (int d = 0; d < t->ndim; d++) {
            t->count *= t->shape[d];
            json_write_uint(&json, NULL, t->shape[d]);
        }
        json_end(&json, ']');
        json_begin(&json, "data_offsets", '[');
        json_write_uint(&json, NULL, at);
        json_write_uint(&json, NULL, at += safe_bytes(t));
        if (safe_bytes(t) > buffer) buffer = safe_bytes(t);
        json_end(&json, ']');
        json_end(&json, '}');
    }
    json_end(&json, '}');
    w->buffer = (unsigned char *)xcalloc(buffer < SAFE_BUFFER ? buffer : (size_t)SAFE_BUFFER, 1);
    while (json.len % 8) json_append(&json, " ", 1);  // tensors begin aligned, for readers that map the file
    for (int k = 0; k < 8; k++) json.text[k] = (char)((json.len - 8) >> (8 * k) & 255);
    for (size_t k = 0; k < num_tensors; k++) w->tensors[k].offset += json.len;
    w->header_bytes = json.len;
    w->size = json.len + at;
    w->header_crc = crc32c(0, json.text, json.len);
    *header = json;
}

// Creates the file and writes its header. Of tensors[] name, dtype (F32 or BF16), ndim and shape count; the names must
// live until the end. Data follow by safetensors_append(), in file order if it can be. After an error nothing is open.
MAYBE_UNUSED
static int safetensors_create(SafeWriter *w, const char *path, const SafeTensor *tensors, size_t num_tensors, char *why,
                              size_t why_size) {
    JsonWriter header;
    safe_plan(w, &header, path, tensors, num_tensors);
    int code = file_create(path, &w->fd, why, why_size);
    if (code == 0) {
        code = file_write(w->fd, path, 0, header.text, header.len, why, why_size);
        if (code) close(w->fd);
    }
    json_writer_free(&header);
    if (code) safetensors_release(w);
    return code;
}

// Opens a file that another process has created with the same tensors, to write parts of it.
MAYBE_UNUSED
static int safetensors_attach(SafeWriter *w, const char *path, const SafeTensor *tensors, size_t num_tensors, char *why,
                              size_t why_size) {
    JsonWriter header;
    safe_plan(w, &header, path, tensors, num_tensors);
    json_writer_free(&header);
    for (int tries = 0; tries < 50; tries++) {  // on a network file system a new name may take seconds to be seen
        w->fd = open(path, O_WRONLY | O_CLOEXEC);
        if (w->fd >= 0) return 0;
        if (errno != ENOENT) break;
        usleep(100000);
    }
    int reason = errno;
    safetensors_release(w);
    return explain(EXIT_USAGE, why, why_size, "cannot write %s: %s; all ranks must see the same --out", path,
                   strerror(reason));
}

// Elements first .. first + count - 1 of tensor `index`; *crc becomes the checksum of their bytes.
static int safetensors_write_part(SafeWriter *w, size_t index, size_t first, const float *values, size_t count,
                                  uint32_t *crc, char *why, size_t why_size) {
    const SafeTensor *t = &w->tensors[index];
    size_t width = safe_dtypes[t->dtype].width;
    assert(t->dtype == DTYPE_F32 || t->dtype == DTYPE_BF16);
    assert(first <= t->count && count <= t->count - first);
    *crc = 0;
    while (count > 0) {
        size_t n = count < SAFE_BUFFER / width ? count : SAFE_BUFFER / width;
        for (size_t k = 0; k < n; k++) {
            uint32_t bits = t->dtype == DTYPE_F32 ? bits_from_float(values[k]) : bf16_from_float(values[k]);
            for (size_t b = 0; b < width; b++) w->buffer[k * width + b] = (unsigned char)(bits >> (8 * b));
        }
        int code = file_write(w->fd, w->path, t->offset + first * width, w->buffer, n * width, why, why_size);
        if (code) return code;
        *crc = crc32c(*crc, w->buffer, n * width);
        first += n;
        values += n;
        count -= n;
    }
    return 0;
}

// The next `count` elements of tensor `index` are in the file, by whomever; `crc` is their checksum. Parts in order.
static void safetensors_count_part(SafeWriter *w, size_t index, size_t count, uint32_t crc) {
    w->crc[index] = crc32c_join(w->crc[index], crc, count * safe_dtypes[w->tensors[index].dtype].width);
    w->written[index] += count;
}

// The next `count` elements of tensor `index`. A tensor's elements come in order; tensors may take turns.
MAYBE_UNUSED
static int safetensors_append(SafeWriter *w, size_t index, const float *values, size_t count, char *why,
                              size_t why_size) {
    uint32_t crc;
    int code = safetensors_write_part(w, index, w->written[index], values, count, &crc, why, why_size);
    if (code == 0) safetensors_count_part(w, index, count, crc);
    return code;
}

// Flushes to the device and closes. crc, tensors and sizes stay readable until safetensors_release().
MAYBE_UNUSED
static int safetensors_finish(SafeWriter *w, char *why, size_t why_size) {
    for (size_t k = 0; k < w->num_tensors; k++) assert(w->written[k] == w->tensors[k].count);
    int code = file_commit(w->fd, w->path, why, why_size);
    if (code) safetensors_release(w);
    return code;
}

#endif
