// fuzz_files.c: damages valid files in seeded, random ways and lets the readers of data.h, config.h, safetensors.h and
// checkpoint.h loose on them, each input in a process of its own with a time limit.
//
//     make build/fuzz_files && build/fuzz_files [INPUTS] [SEED] [FORMAT]       (default: 2000 inputs a format, seed 1)
//     make SANITIZE=1 BUILD=build/sanitize build/sanitize/fuzz_files          (with AddressSanitizer and UBSan)
//
// An input may be accepted, or refused with exit code 2 or 3 and one line on stderr. A crash, a hang, any other end,
// and a changed checkpoint that is accepted are failures; such an input is kept and its path printed. The last line is
// "N passed, N failed".
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <limits.h>
#include <signal.h>
#include <sys/wait.h>

#include "../../xlstmc/checkpoint.h"
#include "../../xlstmc/data.h"

enum { TIME_LIMIT = 10, LARGEST_INPUT = 1 << 16 };

static char scratch[PATH_MAX], run_dir[PATH_MAX];
static uint64_t seed = 1;

// ---------------------------------------------------------------------------------------------------------------------
// Random choices: a stream for every input

static uint64_t draws;  // of the present input
static uint64_t draw(uint64_t input, uint64_t below) {
    uint32_t r[4];
    rng_block(seed, RNG_TEST, input, draws++, r);
    return ((uint64_t)r[0] << 32 | r[1]) % below;
}

typedef struct {
    unsigned char bytes[LARGEST_INPUT];
    size_t size;
} Bytes;

static void cut_out(Bytes *b, size_t at, size_t n) {
    memmove(b->bytes + at, b->bytes + at + n, b->size - at - n);
    b->size -= n;
}

static void put_in(Bytes *b, size_t at, const void *bytes, size_t n) {
    if (b->size + n > LARGEST_INPUT) return;
    memmove(b->bytes + at + n, b->bytes + at, b->size - at);
    memcpy(b->bytes + at, bytes, n);
    b->size += n;
}

static void mutate_number(Bytes *b, uint64_t input) {  // replaces a run of digits, or a little-endian integer
    static const char *const texts[] = {"0",
                                        "-1",
                                        "1",
                                        "-0",
                                        "2147483647",
                                        "2147483648",
                                        "4294967295",
                                        "4294967296",
                                        "1e308",
                                        "9223372036854775807",
                                        "9223372036854775808",
                                        "18446744073709551615",
                                        "1e-320",
                                        "18446744073709551616",
                                        "0.5",
                                        "1e999",
                                        "NaN",
                                        "null",
                                        "\"1\"",
                                        "[]",
                                        "65536",
                                        "100000001"};
    static const uint64_t values[] = {0,
                                      1,
                                      0x7F,
                                      0x80,
                                      0xFF,
                                      0x7FFF,
                                      0x8000,
                                      0xFFFF,
                                      0x7FFFFFFF,
                                      0x80000000u,
                                      0xFFFFFFFFu,
                                      0x100000000u,
                                      100000000,
                                      100000001,
                                      INT64_MAX,
                                      (uint64_t)INT64_MAX + 1,
                                      UINT64_MAX - 7,
                                      UINT64_MAX};
    size_t at = (size_t)draw(input, b->size), digits = 0;
    if (draw(input, 2)) {
        while (at < b->size && !(b->bytes[at] >= '0' && b->bytes[at] <= '9')) at++;
        while (at + digits < b->size && b->bytes[at + digits] >= '0' && b->bytes[at + digits] <= '9') digits++;
        const char *text = texts[draw(input, sizeof texts / sizeof texts[0])];
        cut_out(b, at, digits);
        put_in(b, at, text, strlen(text));
        return;
    }
    size_t width = (size_t)1 << (1 + draw(input, 3));
    uint64_t value = values[draw(input, sizeof values / sizeof values[0])];
    at = draw(input, 2) ? at / width * width : (size_t)draw(input, 6) * 4;  // often in the header
    for (size_t k = 0; k < width && at + k < b->size; k++) b->bytes[at + k] = (unsigned char)(value >> (8 * k));
}

static void mutate_once(Bytes *b, uint64_t input) {
    unsigned char junk[64];
    if (b->size == 0) return;
    size_t at = (size_t)draw(input, b->size), n = 1 + (size_t)draw(input, sizeof junk);
    for (size_t k = 0; k < sizeof junk; k++) junk[k] = (unsigned char)draw(input, 256);
    switch (draw(input, 8)) {
        case 0: b->size = at; break;
        case 1:
            for (size_t k = 0; k < n && k < 8; k++) b->bytes[draw(input, b->size)] = junk[k];
            break;
        case 2:
        case 3: mutate_number(b, input); break;
        case 4: b->bytes[at] ^= (unsigned char)(1 << draw(input, 8)); break;
        case 5: put_in(b, b->size, junk, n); break;
        case 6: cut_out(b, at, n < b->size - at ? n : b->size - at); break;
        case 7:
            if (n > b->size - at) n = b->size - at;
            memcpy(junk, b->bytes + at, n);
            put_in(b, (size_t)draw(input, b->size), junk, n);
            break;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// A tiny model whose backend keeps nothing

static ModelConfig config;
static TensorTable table, states;
static float sink;
static void read_tensor(int kind, int index, float *dst) {
    for (size_t k = 0; k < table.tensors[index].count; k++) dst[k] = (float)rng_normal(3, RNG_TEST, (uint64_t)kind, k);
}
static void write_tensor(int kind, int index, const float *src) {
    for (size_t k = 0; k < table.tensors[index].count; k++) sink += src[k] + (float)kind;
}
static void read_state(int row, float *dst) {
    for (size_t k = 0; k < states.total; k++) dst[k] = (float)row;
}
static void write_state(int row, const float *src) {
    for (size_t k = 0; src && k < states.total; k++) sink += src[k] + (float)row;
}
static Backend backend;
static Checkpoint checkpoint;
static char step_dir[PATH_MAX];

static void make_model(void) {
    char why[1024];
    model_defaults(&config);
    if (!model_parse_blocks("mlstm,slstm", &config, why, sizeof why)) die(EXIT_RUN, "fuzz: %s", why);
    config.hidden_size = 4;
    config.num_heads = 2;
    config.vocab_size = 5;
    config.ffn_dim = 6;
    table = model_table(&config);
    states = model_state_table(&config);
    backend.read_tensor = read_tensor;
    backend.write_tensor = write_tensor;
    backend.read_state = read_state;
    backend.write_state = write_state;
    checkpoint.out = run_dir;
    checkpoint.config = &config;
    checkpoint.table = &table;
    checkpoint.states = &states;
    checkpoint.num_state_rows = 2;
    checkpoint.backend = &backend;
}

static void make_checkpoint(void) {
    char why[1024];
    if (checkpoint_lock(run_dir, why, sizeof why) ||
        checkpoint_save(&checkpoint, 3, "{\"step\": 3}\n", why, sizeof why))
        die(EXIT_RUN, "fuzz: %s", why);
    format_into(step_dir, sizeof step_dir, "%s/step_00000003", run_dir);
}

// ---------------------------------------------------------------------------------------------------------------------
// Formats: the file that is damaged and how it is read. A reader returns if it accepts, else it dies.

static void check(int code, const char *why) {
    if (code) die(code, "%s", why);
}

static void read_data(const char *path) {
    Dataset d;
    int in[4], out[4];
    unsigned char resets[4];
    dataset_open(&d, "--train", path, 4);
    dataset_check_tokens(&d, 300);
    for (uint64_t s = 0; s < d.num_samples; s++) dataset_read(&d, s, in, out, resets, -1);
    dataset_close(&d);
}

static void read_safetensors(const char *path) {
    SafeTensors s;
    char why[1024];
    check(safetensors_open(&s, path, why, sizeof why), why);
    for (size_t k = 0; k < s.num_tensors; k++) {
        if (s.tensors[k].dtype >= NUM_FLOAT_DTYPES) continue;
        float *values = (float *)xcalloc(s.tensors[k].count, sizeof(float));
        int code = safetensors_read(&s, &s.tensors[k], 0, s.tensors[k].count, values, why, sizeof why);
        free(values);
        check(code, why);
    }
    safetensors_close(&s);
}

static void read_config(const char *path) {
    ModelConfig c;
    char why[1024];
    (void)path;
    check(config_read(step_dir, &c, why, sizeof why), why);
    TensorTable t = model_table(&c);
    table_free(&t);
}

// Weights of a directory without a manifest, as Hugging Face writes them.
static void read_weights(const char *path) {
    char why[1024];
    (void)path;
    check(weights_load(step_dir, &config, &table, &backend, why, sizeof why), why);
}

static void read_index(const char *path) { read_weights(path); }

static void read_checkpoint(const char *path) {
    char why[1024], dir[PATH_MAX], *json = NULL;
    int step;
    (void)path;
    check(checkpoint_latest(run_dir, dir, sizeof dir, &step, why, sizeof why), why);
    check(checkpoint_load(&checkpoint, dir, &json, why, sizeof why), why);
    free(json);
}

typedef struct {
    const char *name;
    void (*read)(const char *path);
    const char *file;  // of the checkpoint; NULL: one of its own
    int checked;       // 1: no change may be accepted
} Format;

static const Format formats[] = {
    {"shard", read_data, NULL, 0},
    {"safetensors", read_safetensors, "model.safetensors", 0},
    {"config.json", read_config, "config.json", 0},
    {"weights", read_weights, "model.safetensors", 0},
    {"index", read_index, NULL, 0},
    {"manifest", read_checkpoint, "manifest.json", 1},
    {"model", read_checkpoint, "model.safetensors", 1},
    {"optimizer", read_checkpoint, "optimizer.safetensors", 1},
    {"states", read_checkpoint, "state.safetensors", 1},
    {"trainer.json", read_checkpoint, "trainer.json", 1},
};

// Overwrites in place: file systems flush a file that is emptied and written anew, which would take most of the time.
static void put_bytes(const char *path, const Bytes *b) {
    int fd = open(path, O_WRONLY | O_CREAT, 0600);
    if (fd < 0 || write(fd, b->bytes, b->size) != (ssize_t)b->size || ftruncate(fd, (off_t)b->size) || close(fd))
        die(EXIT_RUN, "fuzz: cannot write %s", path);
}

static void get_bytes(const char *path, Bytes *b) {
    FILE *f = fopen(path, "rb");
    if (!f) die(EXIT_RUN, "fuzz: cannot read %s", path);
    b->size = fread(b->bytes, 1, LARGEST_INPUT, f);
    fclose(f);
}

// Fills `b` with the valid file of a format, `path` with where its reader looks for it, and puts what else it needs
// in place.
static void prepare(const Format *f, char path[PATH_MAX], Bytes *b) {
    char other[PATH_MAX + 64], from[PATH_MAX + 64];
    if (f->read != read_checkpoint) {
        format_into(other, sizeof other, "%s/manifest.json", step_dir);
        remove(other);
    }
    if (f->file) {
        format_into(path, PATH_MAX, "%s/%s", step_dir, f->file);
        get_bytes(path, b);
    } else if (f->read == read_data) {
        static const unsigned char header[20] = {0x88, 0xD8, 0x34, 1, 1, 0, 0, 0, 60, 0, 0, 0, 44, 1, 0, 0, 7, 0, 0, 0};
        format_into(path, PATH_MAX, "%s/shard.bin", scratch);
        memcpy(b->bytes, header, sizeof header);
        b->size = 1024 + 120;
        for (int k = 0; k < 60; k++) b->bytes[1024 + 2 * k] = (unsigned char)k;
    } else {  // the weights behind an index
        JsonWriter w;
        memset(&w, 0, sizeof w);
        json_begin(&w, NULL, '{');
        json_begin(&w, "weight_map", '{');
        for (int k = 0; k < table.num_tensors; k++) json_write_string(&w, table.tensors[k].name, "one.safetensors");
        json_end(&w, '}');
        json_end(&w, '}');
        format_into(path, PATH_MAX, "%s/model.safetensors.index.json", step_dir);
        format_into(from, sizeof from, "%s/model.safetensors", step_dir);
        format_into(other, sizeof other, "%s/one.safetensors", step_dir);
        if (rename(from, other)) die(EXIT_RUN, "fuzz: rename");
        memcpy(b->bytes, w.text, w.len);
        b->size = w.len;
        json_writer_free(&w);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

enum { ACCEPTED, REFUSED, CRASHED, HUNG, UNDETECTED, NUM_ENDS };

// Reads the file in a process of its own.
static int run_one(const Format *f, const char *path, FILE *err) {
    char line[8192], last[8192] = "";
    int status, errors = 0;
    rewind(err);
    if (ftruncate(fileno(err), 0)) die(EXIT_RUN, "fuzz: ftruncate");
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fileno(err), 2);
        alarm(TIME_LIMIT);
        f->read(path);
        _exit(0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid) die(EXIT_RUN, "fuzz: fork: %s", strerror(errno));
    if (WIFSIGNALED(status)) return WTERMSIG(status) == SIGALRM ? HUNG : CRASHED;
    if (WEXITSTATUS(status) == 0) return ACCEPTED;
    if (WEXITSTATUS(status) != EXIT_USAGE && WEXITSTATUS(status) != EXIT_DAMAGED) return CRASHED;
    rewind(err);
    while (fgets(last, sizeof last, err)) {
        snprintf(line, sizeof line, "%s", last);
        errors += strncmp(line, "error: ", 7) == 0;
        if (strncmp(line, "error: ", 7) != 0 && strncmp(line, "note: ", 6) != 0) return CRASHED;
    }
    return errors == 1 ? REFUSED : CRASHED;
}

static void fuzz(const Format *f, int inputs, FILE *err, long ends[NUM_ENDS]) {
    static Bytes valid, now;
    char path[PATH_MAX], kept[PATH_MAX + 64];
    valid.size = 0;
    make_checkpoint();
    prepare(f, path, &valid);
    put_bytes(path, &valid);
    if (run_one(f, path, err) != ACCEPTED) die(EXIT_RUN, "fuzz: the undamaged %s is refused", f->name);
    for (int k = 0; k < inputs; k++) {
        uint64_t input = (uint64_t)(f - formats) << 32 | (unsigned)k;
        now = valid;
        draws = 0;
        for (int times = 1 + (int)draw(input, 3); times > 0; times--) mutate_once(&now, input);
        put_bytes(path, &now);
        int end = run_one(f, path, err);
        int changed = now.size != valid.size || memcmp(now.bytes, valid.bytes, now.size) != 0;
        if (end == ACCEPTED && changed && f->checked) end = UNDETECTED;
        ends[end]++;
        if (end == ACCEPTED || end == REFUSED) continue;
        format_into(kept, sizeof kept, "%s/kept_%s_%d", scratch, f->name, k);
        put_bytes(kept, &now);
        printf("%s: input %d of seed %llu: kept as %s\n", f->name, k, (unsigned long long)seed, kept);
    }
}

static void remove_tree(const char *path) {
    char command[PATH_MAX + 16];
    format_into(command, sizeof command, "rm -rf '%s'", path);
    if (system(command) != 0) die(EXIT_RUN, "fuzz: cannot remove %s", path);
}

int main(int argc, char **argv) {
    const char *tmp = getenv("TMPDIR");
    int inputs = argc > 1 ? atoi(argv[1]) : 2000;
    long passed = 0, failed = 0;
    if (argc > 2) seed = strtoull(argv[2], NULL, 10);
    format_into(scratch, sizeof scratch, "%s/fuzz_files.XXXXXX", tmp && *tmp ? tmp : P_tmpdir);
    if (!mkdtemp(scratch)) die(EXIT_RUN, "fuzz: cannot make %s: %s", scratch, strerror(errno));
    FILE *err = tmpfile();
    if (!err) die(EXIT_RUN, "fuzz: no temporary file");
    setvbuf(stdout, NULL, _IOLBF, 0);
    make_model();
    printf("%-14s %8s %10s %12s %8s %6s %11s\n", "format", "inputs", "accepted", "clean error", "crashed", "hung",
           "undetected");
    for (size_t k = 0; k < sizeof formats / sizeof formats[0]; k++) {
        long ends[NUM_ENDS] = {0};
        if (argc > 3 && strcmp(argv[3], formats[k].name) != 0) continue;
        format_into(run_dir, sizeof run_dir, "%.*s/%d", PATH_MAX - 16, scratch, (int)k);
        fuzz(&formats[k], inputs, err, ends);
        remove_tree(run_dir);
        printf("%-14s %8d %10ld %12ld %8ld %6ld %11ld\n", formats[k].name, inputs, ends[ACCEPTED], ends[REFUSED],
               ends[CRASHED], ends[HUNG], ends[UNDETECTED]);
        passed += ends[ACCEPTED] + ends[REFUSED];
        failed += ends[CRASHED] + ends[HUNG] + ends[UNDETECTED];
    }
    fclose(err);
    table_free(&table);
    table_free(&states);
    if (failed == 0) remove_tree(scratch);
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed > 0;
}
