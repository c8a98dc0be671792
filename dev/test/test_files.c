// test_files.c: tests of json.h, crc32c.h, safetensors.h, config.h, data.h and checkpoint.h.
//
//     make build/test_files && build/test_files        (from the root of the repository)
//
// A save is killed at each of its system calls, fails at each, and loses power at each; the disk fills up; files are
// damaged in every way the formats allow. The last line is "N passed, N failed".
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "fault_disk.h"  // open, pwrite, fsync, ... of everything below can be made to fail

#include "../../xlstmc/checkpoint.h"
#include "../../xlstmc/data.h"

#define FIXTURES "dev/test/fixtures"

// ---------------------------------------------------------------------------------------------------------------------
// Runner

static int num_passed, num_failed, case_failed;
static char scratch[PATH_MAX];  // a directory of this run; removed at the end

#define CHECK(ok, ...)                                          \
    do {                                                        \
        if (!(ok)) {                                            \
            case_failed = 1;                                    \
            printf("    %s:%d: %s: ", __FILE__, __LINE__, #ok); \
            printf(__VA_ARGS__);                                \
            printf("\n");                                       \
        }                                                       \
    } while (0)

static void end_case(const char *name) {
    printf("%s  %s\n", case_failed ? "FAILED" : "ok    ", name);
    fflush(stdout);
    if (case_failed) num_failed++;
    else num_passed++;
    case_failed = 0;
}

static void test_path(char dst[PATH_MAX], const char *name) { format_into(dst, PATH_MAX, "%s/%s", scratch, name); }

static void put_file(const char *path, const void *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, size, f) != size || fclose(f)) die(EXIT_RUN, "test: cannot write %s", path);
}

static unsigned char *get_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END)) die(EXIT_RUN, "test: cannot read %s", path);
    *size = (size_t)ftell(f);
    rewind(f);
    unsigned char *bytes = xcalloc(*size + 1, 1);
    if (fread(bytes, 1, *size, f) != *size) die(EXIT_RUN, "test: cannot read %s", path);
    fclose(f);
    return bytes;
}

static int same_file(const char *a, const char *b) {
    size_t na, nb;
    unsigned char *x = get_file(a, &na), *y = get_file(b, &nb);
    int same = na == nb && memcmp(x, y, na) == 0;
    free(x);
    free(y);
    return same;
}

static void remove_tree(const char *path) {
    char command[PATH_MAX + 16];
    format_into(command, sizeof command, "rm -rf '%s'", path);
    if (system(command) != 0) die(EXIT_RUN, "test: cannot remove %s", path);
}

// Runs a function in a child process; returns its exit code (-signal if it was killed) and what it wrote on stderr.
static int in_child(void (*function)(const void *), const void *argument, char *err, size_t err_size) {
    char path[PATH_MAX];
    test_path(path, "stderr");
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        if (!freopen(path, "w", stderr) || setvbuf(stderr, NULL, _IONBF, 0)) _exit(98);
        function(argument);
        fflush(stderr);
        _exit(0);
    }
    int status;
    if (pid < 0 || waitpid(pid, &status, 0) != pid) die(EXIT_RUN, "test: fork: %s", strerror(errno));
    size_t size;
    unsigned char *text = get_file(path, &size);
    if (err) snprintf(err, err_size, "%s", (const char *)text);
    free(text);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

// Sends stderr to nowhere, for notes that a test provokes; returns what unmute() takes.
static int mute(void) {
    int saved = dup(2), null = open("/dev/null", O_WRONLY);
    if (saved < 0 || null < 0 || dup2(null, 2) < 0) die(EXIT_RUN, "test: /dev/null");
    close(null);
    return saved;
}

static void unmute(int saved) {
    dup2(saved, 2);
    close(saved);
}

static int is_one_line(const char *text) { return *text && strchr(text, '\n') == text + strlen(text) - 1; }

// ---------------------------------------------------------------------------------------------------------------------
// json.h

static void test_json_values(void) {
    char why[200];
    const char *text =
        "{\"a\": [1, -2, 3.5e2, true, false, null], \"\\u00e9\\n\\ud83d\\ude00\": \"x\\/\\\"\\\\\", "
        "\"big\": 18446744073709551615, \"o\": {}, \"e\": []}";
    Json *v = json_parse(text, strlen(text), why, sizeof why);
    uint64_t u = 0;
    int64_t i = 0;
    double d = 0;
    int b = 0;
    CHECK(v != NULL, "%s", why);
    if (v) {
        const Json *a = json_get(v, "a");
        CHECK(a && a->type == JSON_ARRAY && a->count == 6, "array");
        CHECK(json_get_int(&a->items[1], -5, 5, &i) && i == -2, "%lld", (long long)i);
        CHECK(!json_get_int(&a->items[1], -1, 5, &i), "out of range was taken");
        CHECK(!json_get_int(&a->items[2], -1000, 1000, &i), "3.5e2 was taken for an integer");
        CHECK(json_get_double(&a->items[2], &d) && d == 350, "%g", d);
        CHECK(json_get_bool(&a->items[3], &b) && b == 1, "bool");
        CHECK(!json_get_bool(&a->items[0], &b), "1 was taken for a bool");
        CHECK(a->items[5].type == JSON_NULL, "null");
        CHECK(json_get_uint(json_get(v, "big"), &u) && u == UINT64_MAX, "%llu", (unsigned long long)u);
        CHECK(!json_get_int(json_get(v, "big"), INT64_MIN, INT64_MAX, &i), "2^64-1 fits no int64");
        const char *s = json_get_string(json_get(v, "\xC3\xA9\n\xF0\x9F\x98\x80"));
        CHECK(s && strcmp(s, "x/\"\\") == 0, "%s", s ? s : "NULL");
        CHECK(!json_get(v, "b") && !json_get(a, "a") && !json_get(NULL, "a"), "a member that is not there");
        json_free(v);
    }
    end_case("json: values, escapes, getters");
}

static void test_json_invalid(void) {
    static const char *const bad[] = {"",
                                      " ",
                                      "{",
                                      "[",
                                      "]",
                                      "[1,]",
                                      "[1 2]",
                                      "{\"a\"}",
                                      "{\"a\":}",
                                      "{\"a\":1,}",
                                      "{a:1}",
                                      "{\"a\":1 \"b\":2}",
                                      "01",
                                      "-",
                                      "+1",
                                      ".5",
                                      "1.",
                                      "1e",
                                      "1e+",
                                      "0x10",
                                      "NaN",
                                      "Infinity",
                                      "-Infinity",
                                      "1e999",
                                      "-1e999",
                                      "nul",
                                      "truefalse",
                                      "tru",
                                      "\"",
                                      "\"\\\"",
                                      "\"\\x\"",
                                      "\"\\u12\"",
                                      "\"\\ud800\"",
                                      "\"\\udc00\"",
                                      "\"\\ud800\\u0041\"",
                                      "\"\\u0000\"",
                                      "\"\n\"",
                                      "\"\xC0\x80\"",
                                      "\"\xED\xA0\x80\"",
                                      "\"\xF5\x80\x80\x80\"",
                                      "\"\xE2\x82\"",
                                      "\"\xFF\"",
                                      "1 2",
                                      "{} x",
                                      "{\"a\":1,\"b\":2,\"a\":3}",
                                      "{\"a\":1,\"\\u0061\":3}",
                                      "// c\n1",
                                      "'a'",
                                      "1111111111111111111111111111111111111111111111111111111111111111111"};
    char why[200];
    for (size_t k = 0; k < sizeof bad / sizeof bad[0]; k++) {
        why[0] = 0;
        Json *v = json_parse(bad[k], strlen(bad[k]), why, sizeof why);
        CHECK(!v && why[0], "'%s' was taken", bad[k]);
        json_free(v);
    }
    static char deep[200001];
    memset(deep, '[', 200000);
    Json *v = json_parse(deep, 200000, why, sizeof why);
    CHECK(!v, "200,000 open brackets were taken");
    size_t many = 3000000;
    char *wide = xcalloc(many, 1);
    memset(wide, ',', many);
    CHECK(!json_parse(wide, many, why, sizeof why) && strstr(why, "more than"), "%s", why);
    free(wide);
    CHECK(!json_parse("[1]\0", 4, why, sizeof why), "a NUL after the document was taken");
    end_case("json: everything that is not JSON is refused");
}

static void test_json_writer(void) {
    JsonWriter w;
    char why[200];
    memset(&w, 0, sizeof w);
    json_begin(&w, NULL, '{');
    json_write_string(&w, "s\"", "a\\b\n\x01\xFF\xC3\xA9");
    json_write_float(&w, "f", 30);
    json_write_float(&w, "g", 1e-6);
    json_write_double(&w, "d", 30);
    json_write_double(&w, "n", NAN);
    json_write_bool(&w, "b", 1);
    json_write_int(&w, "i", INT64_MIN);
    json_write_uint(&w, "u", UINT64_MAX);
    json_begin(&w, "e", '[');
    json_end(&w, ']');
    json_end(&w, '}');
    const char *expected =
        "{\"s\\\"\": \"a\\\\b\\u000a\\u0001\xEF\xBF\xBD\xC3\xA9\", \"f\": 30.0, \"g\": 1e-06, \"d\": 30, "
        "\"n\": null, \"b\": true, \"i\": -9223372036854775808, \"u\": 18446744073709551615, \"e\": []}";
    CHECK(strcmp(w.text, expected) == 0, "%s", w.text);
    Json *v = json_parse(w.text, w.len, why, sizeof why);
    CHECK(v && strcmp(json_get_string(json_get(v, "s\"")), "a\\b\n\x01\xEF\xBF\xBD\xC3\xA9") == 0, "%s", why);
    json_free(v);
    json_writer_free(&w);
    int wrong = 0;
    for (uint64_t k = 0; k < 20000; k++) {
        uint32_t r[4];
        double x, y = 0;
        rng_block(1, RNG_TEST, 0, k, r);
        uint64_t bits = (uint64_t)r[0] << 32 | r[1];
        memcpy(&x, &bits, 8);
        if (!(x - x == 0)) continue;
        json_write_double(&w, NULL, x);
        v = json_parse(w.text, w.len, why, sizeof why);
        wrong += !json_get_double(v, &y) || memcmp(&x, &y, 8) != 0;
        json_free(v);
        json_writer_free(&w);
    }
    CHECK(wrong == 0, "%d of 20,000 random doubles changed", wrong);
    end_case("json: writer; numbers read back bit for bit");
}

// ---------------------------------------------------------------------------------------------------------------------
// crc32c.h, safetensors.h

static void test_crc32c(void) {
    unsigned char bytes[4096];
    CHECK(crc32c(0, "123456789", 9) == 0xE3069283u, "%08x", crc32c(0, "123456789", 9));
    for (int k = 0; k < 4096; k++) bytes[k] = (unsigned char)(k * 37 + k / 256);
    for (size_t from = 0; from < 64; from++)
        for (size_t size = 0; size < 80; size++) {
            uint32_t bitwise = ~0u;
            for (size_t k = from; k < from + size; k++) {
                bitwise ^= bytes[k];
                for (int b = 0; b < 8; b++) bitwise = bitwise & 1 ? bitwise >> 1 ^ 0x82F63B78u : bitwise >> 1;
            }
            CHECK(crc32c(0, bytes + from, size) == ~bitwise, "crc32c of %zu bytes at %zu", size, from);
            CHECK(crc32c_tables(~0u, bytes + from, size) == bitwise, "tables, %zu bytes at %zu", size, from);
        }
    CHECK(crc32c(crc32c(0, bytes, 1001), bytes + 1001, 3095) == crc32c(0, bytes, 4096), "in two parts");
    for (size_t cut = 0; cut <= 4096; cut += cut < 64 || cut > 4000 ? 1 : 97)
        CHECK(crc32c_join(crc32c(0, bytes, cut), crc32c(0, bytes + cut, 4096 - cut), 4096 - cut) ==
                  crc32c(0, bytes, 4096),
              "joined from parts of %zu and %zu", cut, 4096 - cut);
    end_case("crc32c: known value, both implementations, any alignment and length, joined from two");
}

static void test_conversions(void) {
    int wrong = 0;
    for (unsigned h = 0; h < 65536; h++) {  // IEEE 754 half, by definition
        unsigned e = h >> 10 & 31, f = h & 1023;
        double value = e == 0 ? f * pow(2, -24) : (1 + f / 1024.0) * pow(2, (int)e - 15);
        float got = float_from_half(h);
        if (e == 31) wrong += f ? got == got : !(got > 1e30f || got < -1e30f);
        else wrong += (double)got != (h >> 15 ? -value : value);
    }
    CHECK(wrong == 0, "%d of 65,536 halves", wrong);
    for (uint64_t k = 0; k < 200000; k++) {  // nearest bf16 by comparing the distances to both neighbours
        uint32_t r[4], bits;
        rng_block(2, RNG_TEST, 0, k, r);
        bits = k % 4 == 0 ? (r[0] & 0xFFFF0000u) | 0x8000u : r[0];  // every fourth is a tie
        float x = float_from_bits(bits);
        if ((bits & 0x7F800000) == 0x7F800000 || (bits & 0x7FFF0000) == 0x7F7F0000) continue;
        double below = float_from_bits(bits & 0xFFFF0000u), above = float_from_bits((bits & 0xFFFF0000u) + 0x10000u);
        double a = fabs(x - below), b = fabs(above - x);
        unsigned low = bits >> 16, nearest = a < b ? low : a > b ? low + 1 : low + (low & 1);
        wrong += bf16_from_float(x) != nearest;
    }
    CHECK(wrong == 0, "%d roundings to bf16", wrong);
    CHECK(bf16_from_float(INFINITY) == 0x7F80 && bf16_from_float(-INFINITY) == 0xFF80, "infinity");
    CHECK((bf16_from_float(float_from_bits(0x7F800001u)) & 0x7FFF) > 0x7F80, "a NaN became an infinity");
    CHECK(bf16_from_float(3.4e38f) == 0x7F80, "overflow");
    end_case("safetensors: F16 all values, BF16 to nearest even");
}

static void test_safetensors_round_trip(void) {
    char path[PATH_MAX], why[1024];
    static float data[700000], back[700000];
    SafeTensor t[4];
    SafeWriter w;
    SafeTensors s;
    test_path(path, "round.safetensors");
    memset(t, 0, sizeof t);
    t[0].name = "z\"name";
    t[0].ndim = 2;
    t[0].shape[0] = 700;
    t[0].shape[1] = 1000;  // more than one buffer
    t[1].name = "scalar";
    t[2].name = "a.empty";
    t[2].ndim = 3;
    t[2].shape[0] = 2;
    t[3].name = "bf16";
    t[3].dtype = DTYPE_BF16;
    t[3].ndim = 1;
    t[3].shape[0] = 5;
    for (int k = 0; k < 700000; k++) data[k] = (float)rng_normal(3, RNG_TEST, 0, (uint64_t)k);
    int code = safetensors_create(&w, path, t, 4, why, sizeof why);
    CHECK(code == 0, "%s", why);
    code = safetensors_append(&w, 3, data, 5, why, sizeof why);  // any order, any pieces
    code |= safetensors_append(&w, 0, data, 1, why, sizeof why);
    code |= safetensors_append(&w, 1, data + 7, 1, why, sizeof why);
    code |= safetensors_append(&w, 0, data + 1, 699999, why, sizeof why);
    code |= safetensors_finish(&w, why, sizeof why);
    CHECK(code == 0 && w.header_bytes % 8 == 0, "%s", why);
    safetensors_release(&w);
    CHECK(safetensors_open(&s, path, why, sizeof why) == 0, "%s", why);
    const SafeTensor *found = safetensors_find(&s, "z\"name");
    CHECK(found && found->ndim == 2 && found->shape[1] == 1000, "header");
    CHECK(safetensors_read(&s, found, 0, 700000, back, why, sizeof why) == 0, "%s", why);
    CHECK(memcmp(back, data, sizeof data) == 0, "F32 values");
    CHECK(safetensors_read(&s, found, 699990, 10, back, why, sizeof why) == 0, "%s", why);
    CHECK(memcmp(back, data + 699990, 40) == 0, "a part of a tensor");
    found = safetensors_find(&s, "scalar");
    CHECK(found && found->ndim == 0 && safetensors_read(&s, found, 0, 1, back, why, sizeof why) == 0 &&
              back[0] == data[7],
          "scalar");
    found = safetensors_find(&s, "a.empty");
    CHECK(found && found->count == 0 && safetensors_read(&s, found, 0, 0, back, why, sizeof why) == 0, "empty tensor");
    CHECK(safetensors_read(&s, safetensors_find(&s, "bf16"), 0, 5, back, why, sizeof why) == 0, "%s", why);
    for (int k = 0; k < 5; k++) CHECK(bf16_from_float(data[k]) == bits_from_float(back[k]) >> 16, "BF16 values");
    CHECK(!safetensors_find(&s, "none"), "a tensor that is not there");
    safetensors_close(&s);
    end_case("safetensors: write and read, any order, scalar, empty, bf16");
}

// Writes 8 + header + `data_bytes` bytes; the length field says `length`, or the header's own if it is negative.
static void put_safetensors(const char *path, const char *header, size_t data_bytes, long long length) {
    size_t n = strlen(header), size = 8 + n + data_bytes;
    unsigned char *bytes = xcalloc(size + 1, 1);
    uint64_t said = length < 0 ? n : (uint64_t)length;
    for (int k = 0; k < 8; k++) bytes[k] = (unsigned char)(said >> (8 * k));
    memcpy(bytes + 8, header, n);
    for (size_t k = 0; k < data_bytes; k++) bytes[8 + n + k] = (unsigned char)k;
    put_file(path, bytes, size);
    free(bytes);
}

static void test_safetensors_headers(void) {
    static const struct {
        const char *header;
        size_t data;
        long long length;
        int code;
        const char *says;
    } cases[] = {
        {"{}", 0, -1, 0, ""},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, -1, 0, ""},
        {"{\"a\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[0,8]}}      ", 8, -1, 0, ""},
        {"{\"b\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[4,12]},"
         "\"a\":{\"dtype\":\"BF16\",\"shape\":[2,1],\"data_offsets\":[0,4]},\"__metadata__\":{\"format\":\"pt\"}}",
         12, -1, 0, ""},
        {"{\"e\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4,4]},"
         "\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
         "\"f\":{\"dtype\":\"F32\",\"shape\":[0,9],\"data_offsets\":[4,4]}}",
         4, -1, 0, ""},
        {"{}", 0, 3, 3, "header"},
        {"{}", 0, 100000001, 3, "header"},
        {"{}", 0, INT64_MAX, 3, "header"},
        {"[]", 0, -1, 3, "begin"},
        {" {}", 0, -1, 3, "begin"},
        {"", 0, -1, 3, "begin"},
        {"{\"a\"", 0, -1, 3, "JSON"},
        {"{}", 1, -1, 3, "no tensor"},
        {"{\"a\":1}", 0, -1, 3, "'a'"},
        {"{\"a\":{}}", 0, -1, 3, "'a'"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 9, -1, 3, "no tensor"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 7, -1, 3, "'a'"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 8, -1, 3, "'a'"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, -1, 3, "'a'"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, -1, 3, "'a'"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", 8, -1, 3, "'a'"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", 8, -1, 3, "'a'"},
        {"{\"a\":{\"dtype\":\"F31\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, -1, 3, "dtype"},
        {"{\"a\":{\"dtype\":7,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, -1, 3, "dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", 8, -1, 3, "'a'"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", 8, -1, 3, "'a'"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, -1, 3, "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[9223372036854775807,3],\"data_offsets\":[0,8]}}", 8, -1, 3, "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[140737488355328,2,131072],\"data_offsets\":[0,0]}}", 0, -1, 3, "shape"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1, -1, 3, "dimensions"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
         "\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[2,6]}}",
         6, -1, 3, "overlap"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
         "\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}",
         4, -1, 3, "overlap"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
         "\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[5,6]}}",
         6, -1, 3, "hole"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[1,5]}}", 5, -1, 3, "hole"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
         "\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}",
         2, -1, 3, "duplicate"},
        {"{\"__metadata__\":{\"a\":1}}", 0, -1, 3, "metadata"},
        {"{\"__metadata__\":[]}", 0, -1, 3, "metadata"}};
    char path[PATH_MAX], why[1024];
    SafeTensors s;
    test_path(path, "header.safetensors");
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        put_safetensors(path, cases[k].header, cases[k].data, cases[k].length);
        why[0] = 0;
        int code = safetensors_open(&s, path, why, sizeof why);
        CHECK(code == cases[k].code, "case %zu: %d, %s", k, code, why);
        CHECK(code == 0 || (strstr(why, path) && strstr(why, cases[k].says) && !strchr(why, '\n')), "case %zu: %s", k,
              why);
        if (code == 0) safetensors_close(&s);
    }
    for (size_t size = 0; size < 9; size++) {
        put_file(path, "\2\0\0\0\0\0\0\0{", size);
        CHECK(safetensors_open(&s, path, why, sizeof why) == EXIT_DAMAGED, "a file of %zu bytes", size);
    }
    CHECK(safetensors_open(&s, scratch, why, sizeof why) == EXIT_USAGE && strstr(why, scratch), "a directory: %s", why);
    remove(path);
    CHECK(safetensors_open(&s, path, why, sizeof why) == EXIT_USAGE && strstr(why, path), "no file: %s", why);
    CHECK(mkfifo(path, 0600) == 0, "mkfifo");
    CHECK(safetensors_open(&s, path, why, sizeof why) == EXIT_USAGE, "a pipe: %s", why);
    remove(path);
    end_case("safetensors: 37 headers, short files, pipe, directory");
}

static void test_safetensors_index(void) {
    char dir[PATH_MAX], path[PATH_MAX + 64], why[1024];
    static const struct {
        const char *index;
        int code;
        const char *says;
    } cases[] = {
        {"{\"metadata\":{\"total_size\":12},\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":"
         "\"two.safetensors\"}}",
         0, ""},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}}", 3, "'c'"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"one.safetensors\"}}", 3, "'c'"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"two.safetensors\",\"d\":\"one."
         "safetensors\"}}",
         3, "4"},
        {"{\"weight_map\":{\"a\":\"../x/one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"two.safetensors\"}}", 3,
         "'a'"},
        {"{\"weight_map\":{\"a\":\"gone.safetensors\",\"b\":\"two.safetensors\",\"c\":\"two.safetensors\"}}", 2,
         "gone"},
        {"{\"weight_map\":{\"a\":1}}", 3, "'a'"},
        {"{\"weight_map\":{}}", 3, "weight_map"},
        {"{\"weight_map\":[]}", 3, "weight_map"},
        {"{}", 3, "weight_map"},
        {"[", 3, "JSON"}};
    SafeTensors s;
    float back[2];
    test_path(dir, "index");
    mkdir(dir, 0777);
    format_into(path, sizeof path, "%s/one.safetensors", dir);
    put_safetensors(path, "{\"a\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, -1);
    format_into(path, sizeof path, "%s/two.safetensors", dir);
    put_safetensors(path,
                    "{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
                    "\"c\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
                    8, -1);
    format_into(path, sizeof path, "%s/model.safetensors.index.json", dir);
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        put_file(path, cases[k].index, strlen(cases[k].index));
        why[0] = 0;
        int code = safetensors_open_dir(&s, dir, why, sizeof why);
        CHECK(code == cases[k].code, "case %zu: %d, %s", k, code, why);
        CHECK(code == 0 || strstr(why, cases[k].says), "case %zu: %s", k, why);
        if (code) continue;
        CHECK(s.num_tensors == 3 && s.num_files == 2, "%zu tensors", s.num_tensors);
        CHECK(safetensors_read(&s, safetensors_find(&s, "c"), 0, 1, back, why, sizeof why) == 0, "%s", why);
        CHECK(bits_from_float(back[0]) == 0x07060504u, "value of c");
        safetensors_close(&s);
    }
    format_into(path, sizeof path, "%s/one.safetensors", dir);  // the same tensor in two shards
    put_safetensors(path,
                    "{\"a\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,4]},"
                    "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
                    8, -1);
    format_into(path, sizeof path, "%s/model.safetensors.index.json", dir);
    put_file(path, cases[0].index, strlen(cases[0].index));
    CHECK(safetensors_open_dir(&s, dir, why, sizeof why) == EXIT_DAMAGED && strstr(why, "'b'"), "%s", why);
    end_case("safetensors: shards behind an index");
}

// ---------------------------------------------------------------------------------------------------------------------
// config.h

static int read_config_text(const char *text, ModelConfig *c, char *why, size_t why_size) {
    char path[PATH_MAX];
    test_path(path, "config.json");
    put_file(path, text, strlen(text));
    return config_read(scratch, c, why, why_size);
}

static void check_config_round_trip(const ModelConfig *c, const char *what) {
    char why[1024] = "";
    JsonWriter w;
    ModelConfig back;
    memset(&w, 0, sizeof w);
    config_write(c, 0, &w);
    int code = read_config_text(w.text, &back, why, sizeof why);
    CHECK(code == 0 && config_same(c, &back, why, sizeof why) && back.chunk_size == c->chunk_size, "%s: %s", what, why);
    json_writer_free(&w);
}

static void test_config_round_trip(void) {
    char why[1024], what[64];
    ModelConfig c;
    for (int k = 0; k < NUM_PRESETS; k++) {
        CHECK(model_preset(presets[k].name, &c), "preset");
        check_config_round_trip(&c, presets[k].name);
    }
    model_defaults(&c);
    CHECK(model_parse_blocks("mlstm,slstm*2,mlstm_v1", &c, why, sizeof why), "%s", why);
    c.vocab_size = 300;
    c.hidden_size = 48;
    c.num_heads = 2;
    c.ffn_dim = 77;
    c.sigmoid_gate = 1;
    c.layernorm_out = 1;
    c.qk_dim_factor = 0.625;
    c.v_dim_factor = 1.25;
    c.norm_eps = 1.0 / 3;
    c.eps = 0;
    c.gate_soft_cap = 7;
    c.logit_soft_cap = 0;
    c.chunk_size = 7;
    check_config_round_trip(&c, "every key");
    int wrong = 0;
    for (int D = 1; D <= 2000; D += D < 70 ? 1 : 97)  // U must survive the product with a rounded factor
        for (int U = 1; U <= 9000; U += U < 200 ? 1 : U % 64 == 0 ? 31 : 33) {
            double factor, written;
            int multiple;
            char digits[40];
            c.hidden_size = D;
            c.ffn_dim = U;
            ffn_to_factor(&c, &factor, &multiple);
            snprintf(digits, sizeof digits, "%.17g", factor);
            written = strtod(digits, NULL);
            wrong += ffn_from_factor(D, written, multiple) != U;
            if (U > 2) wrong += multiple * (int)ceil(D * written / multiple) != U;
        }
    CHECK(wrong == 0, "%d pairs of D and U", wrong);
    static const int hf[][2] = {{640, 1728},  {768, 2048},   {896, 2432},  {1024, 2752}, {1152, 3072},
                                {1280, 3456}, {1536, 4096},  {1792, 4800}, {2048, 5504}, {2304, 6144},
                                {2560, 6848}, {4096, 10944}, {24, 64}};
    for (size_t k = 0; k < sizeof hf / sizeof hf[0]; k++) {
        snprintf(what, sizeof what, "D = %d", hf[k][0]);
        CHECK(ffn_from_factor(hf[k][0], 2.667, 64) == hf[k][1], "%s: %d", what, ffn_from_factor(hf[k][0], 2.667, 64));
    }
    end_case("config: presets, every key, FFN width by both rounding rules");
}

#define GOOD \
    "\"model_type\": \"xlstm\", \"vocab_size\": 32, \"hidden_size\": 16, \"num_hidden_layers\": 2, \"num_heads\": 2"
static void test_config_bad(void) {
    static const struct {
        const char *text;
        int code;
        const char *says;
    } cases[] = {
        {"{" GOOD "}", 0, ""},
        {"{" GOOD ", \"num_blocks\": null, \"embedding_dim\": 16, \"torch_dtype\": \"float32\", \"zzz\": [{}]}", 0, ""},
        {"{" GOOD ", \"gate_soft_cap\": 15, \"weight_mode\": \"single\", \"tie_word_embeddings\": false}", 0, ""},
        {"{\"vocab_size\": 32, \"embedding_dim\": 16, \"num_blocks\": 2, \"num_heads\": 2}", 0, ""},
        {"", 3, "JSON"},
        {"[]", 3, "object"},
        {"{" GOOD, 3, "JSON"},
        {"{" GOOD ", \"vocab_size\": 3}", 3, "duplicate"},
        {"{\"model_type\": \"llama\"}", 2, "model_type"},
        {"{\"model_type\": 3}", 2, "model_type"},
        {"{}", 3, "vocab_size"},
        {"{\"vocab_size\": 32, \"num_hidden_layers\": 2, \"num_heads\": 2}", 3, "hidden_size"},
        {"{\"vocab_size\": 32, \"hidden_size\": 16, \"num_heads\": 2}", 3, "num_hidden_layers"},
        {"{\"vocab_size\": 32, \"hidden_size\": 16, \"num_hidden_layers\": 2}", 3, "num_heads"},
        {"{\"vocab_size\": \"32\", \"hidden_size\": 16, \"num_hidden_layers\": 2, \"num_heads\": 2}", 3, "vocab_size"},
        {"{\"vocab_size\": 32.5, \"hidden_size\": 16, \"num_hidden_layers\": 2, \"num_heads\": 2}", 3, "vocab_size"},
        {"{\"vocab_size\": -32, \"hidden_size\": 16, \"num_hidden_layers\": 2, \"num_heads\": 2}", 3, "vocab_size"},
        {"{\"vocab_size\": 99999999999999999999, \"hidden_size\": 16, \"num_hidden_layers\": 2, \"num_heads\": 2}", 3,
         "vocab_size"},
        {"{\"vocab_size\": 2000000000, \"hidden_size\": 16, \"num_hidden_layers\": 2, \"num_heads\": 2}", 2, "vocab"},
        {"{\"vocab_size\": 32, \"hidden_size\": 0, \"num_hidden_layers\": 2, \"num_heads\": 2}", 3, "hidden_size"},
        {"{\"vocab_size\": 32, \"hidden_size\": 16, \"num_hidden_layers\": 2000, \"num_heads\": 2}", 3,
         "num_hidden_layers"},
        {"{\"vocab_size\": 32, \"hidden_size\": 16, \"num_hidden_layers\": 2, \"num_heads\": 3}", 2, "heads"},
        {"{\"vocab_size\": 32, \"hidden_size\": 16, \"num_hidden_layers\": 2, \"num_heads\": 0}", 3, "num_heads"},
        {"{" GOOD ", \"embedding_dim\": 32}", 3, "embedding_dim"},
        {"{" GOOD ", \"num_blocks\": 3}", 3, "num_blocks"},
        {"{" GOOD ", \"use_bias\": true}", 2, "use_bias"},
        {"{" GOOD ", \"use_bias\": 0}", 2, "use_bias"},
        {"{" GOOD ", \"tie_word_embeddings\": true}", 2, "tie_word_embeddings"},
        {"{" GOOD ", \"add_out_norm\": false}", 2, "add_out_norm"},
        {"{" GOOD ", \"weight_mode\": \"fused\"}", 2, "weight_mode"},
        {"{" GOOD ", \"norm_eps\": \"1e-6\"}", 3, "norm_eps"},
        {"{" GOOD ", \"norm_eps\": null}", 3, "norm_eps"},
        {"{" GOOD ", \"eps\": -1.0}", 3, "eps"},
        {"{" GOOD ", \"qk_dim_factor\": 1e30}", 3, "qk_dim_factor"},
        {"{" GOOD ", \"qk_dim_factor\": 0.001}", 2, "heads"},
        {"{" GOOD ", \"gate_soft_cap\": 0.0}", 3, "gate_soft_cap"},
        {"{" GOOD ", \"output_logit_soft_cap\": -1.0}", 3, "output_logit_soft_cap"},
        {"{" GOOD ", \"ffn_proj_factor\": 1e6}", 3, "ffn_proj_factor"},
        {"{" GOOD ", \"ffn_proj_factor\": 0.0, \"ffn_round_up_to_multiple_of\": 1}", 2, "ffn"},
        {"{" GOOD ", \"ffn_round_up_to_multiple_of\": 0}", 3, "ffn_round_up"},
        {"{" GOOD ", \"chunk_size\": 0}", 3, "chunk_size"},
        {"{" GOOD ", \"block_types\": \"mlstm\"}", 3, "block_types"},
        {"{" GOOD ", \"block_types\": [\"mlstm\"]}", 3, "block_types"},
        {"{" GOOD ", \"block_types\": [\"mlstm\", \"lstm\"]}", 3, "block 1"},
        {"{" GOOD ", \"block_types\": [\"mlstm\", 2]}", 3, "block 1"},
        {"{" GOOD ", \"mlstm_input_gate\": \"relu\"}", 3, "mlstm_input_gate"},
        {"{" GOOD ", \"out_norm_type\": 1}", 3, "out_norm_type"},
        {"{" GOOD ", \"chunkwise_kernel\": \"chunkwise--native_siging_autograd\"}", 2, "siging"}};
    char path[PATH_MAX], why[1024];
    ModelConfig c;
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        why[0] = 0;
        int code = read_config_text(cases[k].text, &c, why, sizeof why);
        CHECK(code == cases[k].code, "case %zu: %d, %s: %s", k, code, why, cases[k].text);
        CHECK(code == 0 || (strstr(why, "config.json") && strstr(why, cases[k].says)), "case %zu: %s", k, why);
    }
    test_path(path, "config.json");
    size_t large = MAX_CONFIG_BYTES + 1;
    char *spaces = xcalloc(large, 1);
    memset(spaces, ' ', large);
    put_file(path, spaces, large);
    free(spaces);
    CHECK(config_read(scratch, &c, why, sizeof why) == EXIT_DAMAGED, "a config.json of 1 MiB was taken");
    remove(path);
    CHECK(config_read(scratch, &c, why, sizeof why) == EXIT_USAGE && strstr(why, "step_"), "%s", why);
    end_case("config: 48 texts, wrong keys are named");
}

// ---------------------------------------------------------------------------------------------------------------------
// A backend that only remembers

static ModelConfig fake_config;
static TensorTable fake_table, fake_states;
static float *fake_values[4], *fake_rows;  // [kind][table.total], [rows][states.total]
enum { FAKE_ROWS = 3 };

static void fake_read_tensor(int kind, int index, float *dst) {
    const TensorSpec *s = &fake_table.tensors[index];
    memcpy(dst, fake_values[kind] + s->offset, s->count * sizeof(float));
}

static void fake_write_tensor(int kind, int index, const float *src) {
    const TensorSpec *s = &fake_table.tensors[index];
    memcpy(fake_values[kind] + s->offset, src, s->count * sizeof(float));
}

static void fake_read_state(int row, float *dst) {
    memcpy(dst, fake_rows + (size_t)row * fake_states.total, fake_states.total * sizeof(float));
}

static void fake_write_state(int row, const float *src) {
    float *dst = fake_rows + (size_t)row * fake_states.total;
    if (src) memcpy(dst, src, fake_states.total * sizeof(float));
    else memset(dst, 0, fake_states.total * sizeof(float));
}

static Backend fake_backend;

static void fake_free(void) {
    for (int kind = 0; kind < 4; kind++) free(fake_values[kind]);
    free(fake_rows);
    table_free(&fake_table);
    table_free(&fake_states);
}

static void fake_build(const ModelConfig *c) {
    fake_free();
    fake_config = *c;
    fake_table = model_table(&fake_config);
    fake_states = model_state_table(&fake_config);
    for (int kind = 0; kind < 4; kind++) fake_values[kind] = xcalloc(fake_table.total, sizeof(float));
    fake_rows = xcalloc(FAKE_ROWS * fake_states.total, sizeof(float));
    fake_backend.read_tensor = fake_read_tensor;
    fake_backend.write_tensor = fake_write_tensor;
    fake_backend.read_state = fake_read_state;
    fake_backend.write_state = fake_write_state;
}

static void fake_build_blocks(const char *blocks, int dim, int heads, int vocab, int ffn) {
    ModelConfig c;
    char why[200];
    model_defaults(&c);
    if (!model_parse_blocks(blocks, &c, why, sizeof why)) die(EXIT_RUN, "test: %s", why);
    c.hidden_size = dim;
    c.num_heads = heads;
    c.vocab_size = vocab;
    c.ffn_dim = ffn;
    fake_build(&c);
}

static float fake_value(int what, int step, size_t k) {  // any bits, but finite
    uint32_t r[4];
    rng_block((uint64_t)step, RNG_TEST, (uint64_t)what, k, r);
    return float_from_bits((r[0] & 0x7F800000) == 0x7F800000 ? r[0] ^ 0x40000000 : r[0]);
}

static void fake_fill(int step) {  // the state "after `step` updates"
    for (int kind = 0; kind < 4; kind++)
        for (size_t k = 0; k < fake_table.total; k++) fake_values[kind][k] = fake_value(kind, step, k);
    for (size_t k = 0; k < FAKE_ROWS * fake_states.total; k++) fake_rows[k] = fake_value(9, step, k);
}

static int fake_is(int step, int with_states) {  // weights and moments, bit for bit
    for (int kind = 0; kind < 4; kind++)
        for (size_t k = 0; kind != KIND_GRAD && k < fake_table.total; k++)
            if (fake_values[kind][k] != fake_value(kind, step, k)) return 0;
    for (size_t k = 0; with_states && k < FAKE_ROWS * fake_states.total; k++)
        if (fake_rows[k] != fake_value(9, step, k)) return 0;
    return 1;
}

static Checkpoint fake_checkpoint(const char *out) {
    Checkpoint c;
    memset(&c, 0, sizeof c);
    c.out = out;
    c.config = &fake_config;
    c.table = &fake_table;
    c.states = &fake_states;
    c.backend = &fake_backend;
    return c;
}

static void make_out(char out[PATH_MAX], const char *name) {  // a fresh, empty OUT
    test_path(out, name);
    remove_tree(out);
    mkdir(out, 0777);
}

static int save_step(Checkpoint *c, int step, char *why, size_t why_size) {
    char json[64];
    fake_fill(step);
    snprintf(json, sizeof json, "{\"step\": %d}\n", step);
    return checkpoint_save(c, step, json, why, why_size);
}

static int count_entries(const char *dir, const char *prefix) {
    DIR *d = opendir(dir);
    int count = 0;
    for (struct dirent *e; d && (e = readdir(d));) count += strncmp(e->d_name, prefix, strlen(prefix)) == 0;
    if (d) closedir(d);
    return count;
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights

static void test_fixtures(void) {
    DIR *d = opendir(FIXTURES);
    int count = 0;
    CHECK(d != NULL, FIXTURES " is not there; run this from the root of the repository");
    for (struct dirent *e; d && (e = readdir(d));) {
        char dir[PATH_MAX], path[PATH_MAX + 32], why[1024] = "";
        ModelConfig c;
        format_into(dir, sizeof dir, FIXTURES "/%s", e->d_name);
        format_into(path, sizeof path, "%s/config.json", dir);
        if (e->d_name[0] == '.' || access(path, F_OK) != 0) continue;
        int code = config_read(dir, &c, why, sizeof why);
        CHECK(code == 0, "%s", why);
        if (code) continue;
        fake_build(&c);
        CHECK(weights_load(dir, &c, &fake_table, &fake_backend, why, sizeof why) == 0, "%s", why);
        double sum = 0;
        for (size_t k = 0; k < fake_table.total; k++) sum += fabs(fake_values[KIND_WEIGHT][k]);
        CHECK(sum > 0, "%s: all weights are zero", dir);
        check_config_round_trip(&c, dir);
        count++;
    }
    if (d) closedir(d);
    CHECK(count >= 8, "%d directories", count);
    end_case("weights: every directory of the fixtures loads");
}

// Writes a weights file of the fake model; `change` gives the variant.
enum {
    AS_IS,
    OLD_NAMES,
    VANILLA,
    MISSING,
    EXTRA,
    SHAPE,
    RANK,
    INTEGER,
    HAS_NAN,
    HAS_INF,
    BOTH_NAMES,
    HALF,
    DOUBLE,
    NUM_VARIANTS
};

static void put_weights(const char *path, int variant) {
    SafeTensor t[64];
    char names[64][128], why[1024];
    SafeWriter w;
    int n = fake_table.num_tensors, count = 0, source[64];
    float *values = xcalloc(fake_table.total, sizeof(float)), *other = xcalloc(fake_table.total, sizeof(float));
    memset(t, 0, sizeof t);
    for (int k = 0; k < n + 1; k++) {
        const TensorSpec *s = &fake_table.tensors[k % n];
        int is_q = strstr(s->name, ".q.weight") != NULL, is_kernel = strstr(s->name, "_recurrent_kernel_") != NULL;
        if (k == n && variant != EXTRA && variant != BOTH_NAMES) break;
        if (variant == MISSING && k == 2) continue;
        snprintf(names[count], 128, "%s%s", s->name, k == n && variant == EXTRA ? "_more" : "");
        if ((variant == OLD_NAMES && k < n) || k == n) weights_old_name(s->name, names[count], 128);
        if (k == n && variant == BOTH_NAMES) snprintf(names[count], 128, "backbone.blocks.0.mlstm_layer.query.weight");
        t[count].name = names[count];
        t[count].ndim = s->ndim;
        for (int d = 0; d < s->ndim; d++) t[count].shape[d] = (size_t)s->shape[d];
        if (variant == SHAPE && is_q) t[count].shape[0]++;
        if (variant == RANK && is_q) {
            t[count].ndim = 1;
            t[count].shape[0] *= t[count].shape[1];
        }
        if (variant == VANILLA && is_kernel) {
            t[count].shape[1] = (size_t)s->shape[2];
            t[count].shape[2] = (size_t)s->shape[1];
        }
        source[count++] = k % n;
    }
    if (safetensors_create(&w, path, t, (size_t)count, why, sizeof why)) die(EXIT_RUN, "test: %s", why);
    for (int k = 0; k < count; k++) {
        const TensorSpec *s = &fake_table.tensors[source[k]];
        size_t heads = (size_t)fake_config.num_heads, d = (size_t)fake_config.hidden_size / heads;
        for (size_t i = 0; i < s->count + 64 && i < fake_table.total; i++)
            values[i] = fake_value(KIND_WEIGHT, 7, s->offset + i);
        if (variant == HAS_NAN && k == 3) values[s->count - 1] = NAN;
        if (variant == HAS_INF && k == 4) values[0] = -INFINITY;
        memcpy(other, values, s->count * sizeof(float));
        // Element by element, as the formats are described: [h][g*d+out][in] for [h][in][g*d+out], [g][h][j] for
        // [h][g][j].
        if (variant == VANILLA && strstr(s->name, "_recurrent_kernel_"))
            for (size_t h = 0; h < heads; h++)
                for (size_t in = 0; in < d; in++)
                    for (size_t go = 0; go < 4 * d; go++)
                        other[(h * 4 * d + go) * d + in] = values[(h * d + in) * 4 * d + go];
        if (variant == VANILLA && strstr(s->name, "_bias_"))
            for (size_t h = 0; h < heads; h++)
                for (size_t g = 0; g < 4; g++)
                    for (size_t j = 0; j < d; j++) other[(g * heads + h) * d + j] = values[(h * 4 + g) * d + j];
        if (safetensors_append(&w, (size_t)k, other, w.tensors[k].count, why, sizeof why))
            die(EXIT_RUN, "test: %s", why);
    }
    if (safetensors_finish(&w, why, sizeof why)) die(EXIT_RUN, "test: %s", why);
    safetensors_release(&w);
    free(values);
    free(other);
}

// Replaces a dtype in the header of a file by another of the same width, padded to the same length.
static void change_dtype(const char *path, const char *from, const char *to) {
    size_t size;
    unsigned char *bytes = get_file(path, &size);
    char *at = (char *)memmem(bytes, size, from, strlen(from));
    if (!at || strlen(from) != strlen(to)) die(EXIT_RUN, "test: no %s in %s", from, path);
    memcpy(at, to, strlen(to));
    put_file(path, bytes, size);
    free(bytes);
}

static void test_weights(void) {
    static const struct {
        int variant, code;
        const char *says;
    } cases[] = {{AS_IS, 0, ""},
                 {OLD_NAMES, 0, ""},
                 {VANILLA, 0, ""},
                 {MISSING, 3, "missing"},
                 {EXTRA, 3, "no part of the model"},
                 {SHAPE, 3, "has the shape"},
                 {RANK, 3, "has the shape"},
                 {INTEGER, 3, "dtype I32"},
                 {HAS_NAN, 3, "NaN"},
                 {HAS_INF, 3, "infinity"},
                 {BOTH_NAMES, 3, "query"}};
    char dir[PATH_MAX], path[PATH_MAX + 32], why[1024];
    make_out(dir, "weights");
    format_into(path, sizeof path, "%s/model.safetensors", dir);
    fake_build_blocks("mlstm,slstm,mlstm_v1", 12, 3, 10, 20);
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        put_weights(path, cases[k].variant);
        if (cases[k].variant == INTEGER) change_dtype(path, "\"F32\"", "\"I32\"");
        memset(fake_values[KIND_WEIGHT], 0, fake_table.total * sizeof(float));
        why[0] = 0;
        int code = weights_load(dir, &fake_config, &fake_table, &fake_backend, why, sizeof why);
        CHECK(code == cases[k].code, "variant %d: %d %s", cases[k].variant, code, why);
        CHECK(code == 0 || (strstr(why, cases[k].says) && strstr(why, path)), "variant %d: %s", cases[k].variant, why);
        size_t wrong = 0;
        for (size_t i = 0; code == 0 && i < fake_table.total; i++)
            wrong += fake_values[KIND_WEIGHT][i] != fake_value(KIND_WEIGHT, 7, i);
        CHECK(wrong == 0, "variant %d: %zu values", cases[k].variant, wrong);
    }
    remove(path);
    CHECK(
        weights_load(dir, &fake_config, &fake_table, &fake_backend, why, sizeof why) == EXIT_USAGE && strstr(why, path),
        "%s", why);
    end_case("weights: both sLSTM layouts, both names of q k v; what does not fit the model");
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoints

static void test_round_trip(void) {
    for (int bf16 = 0; bf16 < 2; bf16++)
        for (int rows = 0; rows <= FAKE_ROWS; rows += FAKE_ROWS) {
            char out[PATH_MAX], again[PATH_MAX], dir[PATH_MAX], a[2 * PATH_MAX], b[2 * PATH_MAX], why[1024] = "",
                                                                                                  *json = NULL;
            int step;
            fake_build_blocks("slstm,mlstm,mlstm_v1", 16, 4, 10, 20);
            make_out(out, "round");
            make_out(again, "round_again");
            Checkpoint c = fake_checkpoint(out);
            c.save_bf16 = bf16;
            c.num_state_rows = rows;
            CHECK(save_step(&c, 12, why, sizeof why) == 0, "%s", why);
            c.out = again;
            CHECK(save_step(&c, 12, why, sizeof why) == 0, "%s", why);
            uint64_t bytes = 0;
            for (int f = 0; f < NUM_CHECKPOINT_FILES; f++) {
                format_into(a, sizeof a, "%s/step_00000012/%s", out, checkpoint_files[f]);
                format_into(b, sizeof b, "%s/step_00000012/%s", again, checkpoint_files[f]);
                struct stat st;
                if (f == FILE_STATE && rows == 0) {
                    CHECK(access(a, F_OK) != 0, "a state file without states");
                    continue;
                }
                CHECK(same_file(a, b), "%s differs between two saves of the same state", checkpoint_files[f]);
                bytes += stat(a, &st) == 0 ? (uint64_t)st.st_size : 0;
            }
            CHECK(bytes == c.bytes_written, "%llu", (unsigned long long)c.bytes_written);
            CHECK(checkpoint_latest(out, dir, sizeof dir, &step, why, sizeof why) == 0 && step == 12, "%s", why);
            fake_fill(99);
            CHECK(checkpoint_load(&c, dir, &json, why, sizeof why) == 0, "%s", why);
            CHECK(fake_is(12, rows > 0), "the state changed (bf16 %d, rows %d)", bf16, rows);
            CHECK(json && strcmp(json, "{\"step\": 12}\n") == 0, "%s", json ? json : "NULL");
            free(json);
            ModelConfig read;
            CHECK(config_read(dir, &read, why, sizeof why) == 0 && config_same(&read, &fake_config, why, sizeof why),
                  "%s", why);
            CHECK(weights_load(dir, &fake_config, &fake_table, &fake_backend, why, sizeof why) == 0, "%s", why);
            size_t wrong = 0;
            for (size_t k = 0; k < fake_table.total; k++) {
                float was = fake_value(KIND_WEIGHT, 12, k);
                wrong += fake_values[KIND_WEIGHT][k] != (bf16 ? float_from_bits(bf16_from_float(was) << 16) : was);
            }
            CHECK(wrong == 0, "--load: %zu weights", wrong);
        }
    end_case("checkpoint: save and load bit for bit; the same state gives the same bytes; bf16; states");
}

static void test_state_rows(void) {
    char out[PATH_MAX], dir[PATH_MAX], why[1024] = "", *json = NULL;
    int step;
    fake_build_blocks("slstm,mlstm", 8, 2, 10, 20);
    make_out(out, "rows");
    Checkpoint c = fake_checkpoint(out);
    CHECK(save_step(&c, 1, why, sizeof why) == 0, "%s", why);
    c.num_state_rows = FAKE_ROWS;
    CHECK(checkpoint_latest(out, dir, sizeof dir, &step, why, sizeof why) == 0, "%s", why);
    int saved = mute();  // the note that there are none
    CHECK(checkpoint_load(&c, dir, &json, why, sizeof why) == 0, "%s", why);
    unmute(saved);
    free(json);
    float sum = 0;
    for (size_t k = 0; k < FAKE_ROWS * fake_states.total; k++) sum += fabsf(fake_rows[k]);
    CHECK(sum == 0, "states of a run without stored ones are not fresh");
    CHECK(save_step(&c, 2, why, sizeof why) == 0, "%s", why);
    c.num_state_rows = 2;
    CHECK(checkpoint_latest(out, dir, sizeof dir, &step, why, sizeof why) == 0 && step == 2, "%s", why);
    CHECK(checkpoint_load(&c, dir, &json, why, sizeof why) == EXIT_USAGE && strstr(why, "3 streams"), "%s", why);
    end_case("checkpoint: another number of carried streams is refused");
}

static void test_other_model(void) {
    char out[PATH_MAX], dir[PATH_MAX], why[1024] = "", *json = NULL;
    int step;
    ModelConfig other;
    fake_build_blocks("mlstm", 8, 2, 10, 20);
    make_out(out, "other");
    Checkpoint c = fake_checkpoint(out);
    CHECK(save_step(&c, 1, why, sizeof why) == 0, "%s", why);
    CHECK(checkpoint_latest(out, dir, sizeof dir, &step, why, sizeof why) == 0, "%s", why);
    fake_build_blocks("mlstm", 8, 2, 11, 20);
    CHECK(checkpoint_load(&c, dir, &json, why, sizeof why) == EXIT_DAMAGED && strstr(why, "shape"), "%s", why);
    CHECK(config_read(dir, &other, why, sizeof why) == 0 && !config_same(&other, &fake_config, why, sizeof why),
          "same");
    CHECK(strstr(why, "vocab_size is 10 against 11"), "%s", why);
    fake_build_blocks("slstm", 8, 2, 10, 20);
    CHECK(!config_same(&other, &fake_config, why, sizeof why) && strstr(why, "block 0"), "%s", why);
    end_case("checkpoint: another model is refused by name");
}

static void test_keep(void) {
    char out[PATH_MAX], path[2 * PATH_MAX], why[1024] = "";
    fake_build_blocks("mlstm", 4, 1, 4, 4);
    make_out(out, "keep");
    Checkpoint c = fake_checkpoint(out);
    for (int step = 1; step <= 3; step++) CHECK(save_step(&c, step, why, sizeof why) == 0, "%s", why);
    CHECK(count_entries(out, "step_") == 3, "--keep 0 keeps all");
    c.keep = 2;
    CHECK(save_step(&c, 4, why, sizeof why) == 0, "%s", why);
    CHECK(count_entries(out, "step_") == 2 && count_entries(out, "tmp.") == 0, "--keep 2");
    format_into(path, sizeof path, "%s/step_00000003/tokenizer.json", out);
    put_file(path, "{}", 2);
    for (int step = 5; step <= 8; step++) CHECK(save_step(&c, step, why, sizeof why) == 0, "%s", why);
    CHECK(count_entries(out, "step_") == 3 && access(path, F_OK) == 0, "a directory with a user's file was deleted");
    CHECK(checkpoint_holds_run(out), "holds_run");
    // The newest two are damaged: the run falls back to 6 and saves 7 again, then 8. Nothing valid may be deleted for
    // them.
    format_into(path, sizeof path, "%s/step_00000008/optimizer.safetensors", out);
    CHECK(truncate(path, 100) == 0, "truncate");
    c.keep = 1;
    CHECK(save_step(&c, 7, why, sizeof why) == 0, "%s", why);
    CHECK(count_entries(out, "step_00000007") == 1 && count_entries(out, "step_00000008") == 1,
          "7 was deleted in favour of 8");
    CHECK(save_step(&c, 8, why, sizeof why) == 0, "a damaged directory was not replaced: %s", why);
    int step;
    char dir[PATH_MAX];
    CHECK(checkpoint_latest(out, dir, sizeof dir, &step, why, sizeof why) == 0 && step == 8, "%s", why);
    CHECK(save_step(&c, 8, why, sizeof why) == 0 && count_entries(out, "tmp.") == 0, "saving a step again: %s", why);
    make_out(out, "keep");
    CHECK(!checkpoint_holds_run(out), "an empty directory holds no run");
    format_into(path, sizeof path, "%s/log.jsonl", out);
    put_file(path, "{}\n", 3);
    CHECK(checkpoint_holds_run(out), "a log is a run");
    end_case("checkpoint: --keep, users' files, damaged newer steps, saving a step twice");
}

static void latest_on_stderr(const void *out) {
    char dir[PATH_MAX], why[1024];
    int step;
    int code = checkpoint_latest(out, dir, sizeof dir, &step, why, sizeof why);
    if (code) die(code, "%s", why);
    _exit(100 + step);
}

static void test_fallback(void) {
    char out[PATH_MAX], path[2 * PATH_MAX], why[1024] = "", err[4096];
    int step;
    fake_build_blocks("mlstm", 4, 1, 4, 4);
    make_out(out, "fallback");
    Checkpoint c = fake_checkpoint(out);
    CHECK(in_child(latest_on_stderr, out, err, sizeof err) == 99, "an empty directory: step -1");
    for (step = 1; step <= 4; step++) CHECK(save_step(&c, step, why, sizeof why) == 0, "%s", why);
    CHECK(in_child(latest_on_stderr, out, err, sizeof err) == 104 && !err[0], "%s", err);
    format_into(path, sizeof path, "%s/step_00000004/manifest.json", out);
    remove(path);
    CHECK(in_child(latest_on_stderr, out, err, sizeof err) == 103 && is_one_line(err) && strstr(err, path), "%s", err);
    char from[2 * PATH_MAX];
    format_into(from, sizeof from, "%s/step_00000003", out);
    format_into(path, sizeof path, "%s/step_00000009", out);
    CHECK(rename(from, path) == 0, "rename");  // by hand: the name lies about the step
    CHECK(in_child(latest_on_stderr, out, err, sizeof err) == 102 && strstr(err, "step 3"), "%s", err);
    format_into(path, sizeof path, "%s/step_00000002/trainer.json", out);
    put_file(path, "{\"step\": 2}\n\n", 13);
    CHECK(in_child(latest_on_stderr, out, err, sizeof err) == 101 && strstr(err, "more than"), "%s", err);
    format_into(path, sizeof path, "%s/step_00000001/model.safetensors", out);
    CHECK(truncate(path, 1000) == 0, "truncate");
    CHECK(
        in_child(latest_on_stderr, out, err, sizeof err) == EXIT_DAMAGED && strstr(err, "error: ") && strstr(err, path),
        "%s", err);
    format_into(path, sizeof path, "%s/nothing", out);
    CHECK(in_child(latest_on_stderr, path, err, sizeof err) == 99, "no directory: step -1");
    end_case("checkpoint: falls back over damaged ones and says so; only damaged ones: exit 3");
}

static void test_every_bit(void) {
    char out[PATH_MAX], dir[PATH_MAX], path[2 * PATH_MAX], why[1024] = "";
    int step;
    long flips = 0, missed = 0;
    fake_build_blocks("mlstm", 1, 1, 2, 1);
    make_out(out, "bits");
    Checkpoint c = fake_checkpoint(out);
    c.num_state_rows = 1;
    CHECK(save_step(&c, 5, why, sizeof why) == 0, "%s", why);
    format_into(dir, sizeof dir, "%s/step_00000005", out);
    CHECK(manifest_verify(dir, 0, &step, why, sizeof why) == 0 && step == 5, "%s", why);
    for (int f = 0; f < NUM_CHECKPOINT_FILES; f++) {
        format_into(path, sizeof path, "%s/%s", dir, checkpoint_files[f]);
        size_t size;
        unsigned char *bytes = get_file(path, &size);
        int fd = open(path, O_WRONLY);
        for (size_t k = 0; k < size && fd >= 0; k++)
            for (int bit = 0; bit < 8; bit++) {
                unsigned char changed = bytes[k] ^ (unsigned char)(1 << bit);
                if (pwrite(fd, &changed, 1, (off_t)k) != 1) die(EXIT_RUN, "test: pwrite");
                int code = manifest_verify(dir, 0, &step, why, sizeof why);
                if (code != EXIT_DAMAGED || !strstr(why, checkpoint_files[f])) {
                    if (missed++ == 0)
                        printf("    %s, byte %zu, bit %d: %d %s\n", checkpoint_files[f], k, bit, code, why);
                }
                flips++;
                if (pwrite(fd, &bytes[k], 1, (off_t)k) != 1) die(EXIT_RUN, "test: pwrite");
            }
        close(fd);
        free(bytes);
    }
    CHECK(manifest_verify(dir, 0, &step, why, sizeof why) == 0, "%s", why);
    CHECK(missed == 0 && flips > 50000, "%ld of %ld flipped bits were not found", missed, flips);
    printf("    %ld single-bit flips, %ld not found\n", flips, missed);
    end_case("checkpoint: every flipped bit of every file is found and the file named");
}

// ---------------------------------------------------------------------------------------------------------------------
// Saves that are cut short

typedef struct {
    const char *name;
    int steps[2];  // of the checkpoints that are there before, 0: none
    int keep, bf16, rows;
    int damaged;  // step_00000020 is there already, and damaged
} Scenario;

static const Scenario scenarios[] = {
    {"first save", {0, 0}, 0, 0, 0, 0},
    {"with one before, states", {10, 0}, 1, 0, 2, 0},
    {"with two before, keep 2, bf16", {5, 10}, 2, 1, 0, 0},
    {"over a damaged one", {10, 0}, 1, 0, 0, 1},
    {"over a valid one", {10, 20}, 2, 0, 0, 0},
};

typedef struct {
    const Scenario *s;
    const char *out;
    int mode, error;
    long at;
} Cut;

static void scenario_prepare(const Scenario *s, const char *out) {
    char why[1024], path[2 * PATH_MAX];
    remove_tree(out);
    mkdir(out, 0777);
    Checkpoint c = fake_checkpoint(out);
    c.save_bf16 = s->bf16;
    c.num_state_rows = s->rows;
    for (int k = 0; k < 2; k++)
        if (s->steps[k] && save_step(&c, s->steps[k], why, sizeof why)) die(EXIT_RUN, "test: %s", why);
    if (!s->damaged) return;
    if (save_step(&c, 20, why, sizeof why)) die(EXIT_RUN, "test: %s", why);
    format_into(path, sizeof path, "%s/step_00000020/model.safetensors", out);
    if (truncate(path, 700) != 0) die(EXIT_RUN, "test: truncate");
}

// Exit code: 0 the save ended without meeting the fault, 10 it met an error and reported it well, 11 badly, 12 a second
// save did not succeed, 13 the error struck where it may be ignored (while tidying up).
static void cut_save(const void *argument) {
    const Cut *cut = argument;
    char why[1024] = "", tmp[64];
    Checkpoint c = fake_checkpoint(cut->out);
    c.save_bf16 = cut->s->bf16;
    c.num_state_rows = cut->s->rows;
    c.keep = cut->s->keep;
    if (checkpoint_lock(cut->out, why, sizeof why)) _exit(14);
    fake_fill(20);
    fault_begin(cut->mode, cut->at, cut->error);
    int code = checkpoint_save(&c, 20, "{\"step\": 20}\n", why, sizeof why);
    long calls = fault_calls;
    fault_begin(FAULT_OFF, 0, 0);
    if (calls < cut->at) _exit(0);
    snprintf(tmp, sizeof tmp, "tmp.%ld", (long)getpid());
    if (code == 0) {  // the error struck while tidying up: the next save must not stumble over what is left
        c.keep = 0;
        if (checkpoint_save(&c, 25, "{}", why, sizeof why)) {
            fprintf(stderr, "the save after it: %s", why);
            _exit(12);
        }
        char last[2 * PATH_MAX];
        format_into(last, sizeof last, "%s/step_00000025", cut->out);
        checkpoint_remove(last);
        _exit(13);
    }
    if (code != EXIT_USAGE || !strstr(why, strerror(cut->error)) || !strstr(why, cut->out) || strchr(why, '\n')) {
        fprintf(stderr, "%d %s", code, why);
        _exit(11);
    }
    if (count_entries(cut->out, tmp) > 0) {
        fprintf(stderr, "%s is left", tmp);
        _exit(11);
    }
    if (checkpoint_save(&c, 20, "{\"step\": 20}\n", why, sizeof why)) {
        fprintf(stderr, "%s", why);
        _exit(12);
    }
    _exit(10);
}

// The next start: exit code 100 + step found / 5, or what is wrong.
static void start_again(const void *argument) {
    const Cut *cut = argument;
    char why[1024] = "", dir[PATH_MAX], *json = NULL;
    int step;
    Checkpoint c = fake_checkpoint(cut->out);
    c.num_state_rows = cut->s->rows;
    if (checkpoint_lock(cut->out, why, sizeof why)) _exit(20);
    int code = checkpoint_latest(cut->out, dir, sizeof dir, &step, why, sizeof why);
    if (code) _exit(21);
    if (count_entries(cut->out, "tmp.") > 0) _exit(22);
    if (step < 0) _exit(100);
    if (checkpoint_load(&c, dir, &json, why, sizeof why)) _exit(23);
    if (!fake_is(step, c.num_state_rows > 0 && c.num_state_rows == FAKE_ROWS)) _exit(24);
    _exit(100 + step / 5);
}

static void test_cut_saves(void) {
    static const struct {
        const char *name;
        int mode, error;
    } modes[] = {{"killed at", FAULT_KILL, 0},
                 {"killed within", FAULT_TORN, 0},
                 {"power lost at", FAULT_POWER, 0},
                 {"disk full at", FAULT_ERROR, ENOSPC},
                 {"input/output error at", FAULT_ERROR, EIO}};
    char out[PATH_MAX], err[1024], name[200];
    make_out(out, "cut");
    fake_build_blocks("slstm,mlstm", 4, 2, 4, 4);
    for (size_t s = 0; s < sizeof scenarios / sizeof scenarios[0]; s++)
        for (size_t m = 0; m < sizeof modes / sizeof modes[0]; m++) {
            long points = 0, reported = 0;
            for (long at = 1;; at++) {
                Cut cut = {&scenarios[s], out, modes[m].mode, modes[m].error, at};
                scenario_prepare(&scenarios[s], out);
                int code = in_child(cut_save, &cut, err, sizeof err);
                int ended = modes[m].mode == FAULT_ERROR ? code == 10 || code == 13 : code == -SIGKILL;
                CHECK(code == 0 || ended, "call %ld: %d %s", at, code, err);
                int found = in_child(start_again, &cut, err, sizeof err) - 100;
                int before = scenarios[s].steps[1] ? scenarios[s].steps[1] : scenarios[s].steps[0];
                CHECK(found >= before / 5 && (found == 4 || found == before / 5),
                      "call %ld: the next start finds %d %s", at, found, err);
                if (code == 0) CHECK(found == 4, "a save that succeeded is not found");
                if (code == 0 || case_failed) break;
                points++;
                reported += code == 10;
            }
            CHECK(points > 20 && (modes[m].mode != FAULT_ERROR || reported > 20), "only %ld points", points);
            format_into(name, sizeof name, "checkpoint: %s, %s each of %ld system calls: a valid one is found",
                        scenarios[s].name, modes[m].name, points);
            end_case(name);
        }
}

static void limited_save(const void *out) {
    struct rlimit limit = {2000, 2000};
    char why[1024] = "";
    Checkpoint c = fake_checkpoint(out);
    signal(SIGXFSZ, SIG_IGN);
    if (setrlimit(RLIMIT_FSIZE, &limit)) _exit(99);
    int code = save_step(&c, 20, why, sizeof why);
    fprintf(stderr, "%s\n", why);
    _exit(code);
}

static void die_in_save_read(int kind, int index, float *dst) {
    (void)kind;
    (void)dst;
    if (index == 3) die(EXIT_RUN, "the device is gone");
}

static void dying_save(const void *out) {
    char why[1024];
    Checkpoint c = fake_checkpoint(out);
    Backend backend = fake_backend;
    backend.read_tensor = die_in_save_read;
    c.backend = &backend;
    checkpoint_save(&c, 20, "{}", why, sizeof why);
}

static void test_full_disk(void) {
    char out[PATH_MAX], err[1024], why[1024];
    fake_build_blocks("mlstm", 16, 1, 32, 20);
    make_out(out, "full");
    CHECK(in_child(limited_save, out, err, sizeof err) == EXIT_USAGE, "%s", err);
    CHECK(strstr(err, "model.safetensors") && strstr(err, strerror(EFBIG)), "%s", err);
    CHECK(count_entries(out, "tmp.") == 0 && count_entries(out, "step_") == 0, "something was left behind");
    CHECK(in_child(dying_save, out, err, sizeof err) == EXIT_RUN, "%s", err);
    CHECK(count_entries(out, "tmp.") == 0, "die() left a half-written directory");
    if (access("/dev/full", W_OK) == 0) {
        int fd = open("/dev/full", O_WRONLY);
        CHECK(file_write(fd, "/dev/full", 0, "x", 1, why, sizeof why) == EXIT_USAGE && strstr(why, strerror(ENOSPC)),
              "%s", why);
        close(fd);
    }
    end_case("checkpoint: a full disk and a die() leave nothing behind");
}

static void lock_as_nobody(const void *out) {
    char why[1024] = "";
    if (geteuid() == 0 && seteuid(65534) != 0) _exit(99);
    int code = checkpoint_lock(out, why, sizeof why);
    fprintf(stderr, "%s\n", why);
    _exit(code);
}

static void test_lock(void) {
    char out[PATH_MAX], path[2 * PATH_MAX], why[1024] = "", err[1024];
    test_path(out, "locked");
    remove_tree(out);
    format_into(path, sizeof path, "%s/a/b//c/", out);
    CHECK(checkpoint_lock(path, why, sizeof why) == 0 && access(path, F_OK) == 0, "%s", why);
    CHECK(checkpoint_lock(path, why, sizeof why) == EXIT_USAGE && strstr(why, "another process"), "%s", why);
    make_out(out, "leftovers");
    for (int k = 0; k < 2; k++) {
        format_into(path, sizeof path, "%s/tmp.%d%s", out, 100 + k, k ? ".old" : "");
        mkdir(path, 0777);
        format_into(path, sizeof path, "%s/tmp.%d%s/model.safetensors", out, 100 + k, k ? ".old" : "");
        put_file(path, "x", 1);
    }
    format_into(path, sizeof path, "%s/tmp.mine", out);
    mkdir(path, 0777);
    CHECK(checkpoint_lock(out, why, sizeof why) == 0, "%s", why);
    CHECK(count_entries(out, "tmp.1") == 0 && count_entries(out, "tmp.mine") == 1, "leftovers");
    test_path(path, "file");
    put_file(path, "x", 1);
    CHECK(checkpoint_lock(path, why, sizeof why) == EXIT_USAGE && strstr(why, path), "--out is a file: %s", why);
    strcat(path, "/below");
    CHECK(checkpoint_lock(path, why, sizeof why) == EXIT_USAGE && strstr(why, path), "%s", why);
    CHECK(checkpoint_lock("", why, sizeof why) == EXIT_USAGE, "%s", why);
    make_out(out, "readonly");
    CHECK(chmod(out, 0555) == 0 && chmod(scratch, 0755) == 0, "chmod");
    CHECK(in_child(lock_as_nobody, out, err, sizeof err) == EXIT_USAGE && is_one_line(err) &&
              strstr(err, strerror(EACCES)),
          "%s", err);
    strcat(out, "/below");
    CHECK(in_child(lock_as_nobody, out, err, sizeof err) == EXIT_USAGE && is_one_line(err) &&
              strstr(err, strerror(EACCES)),
          "%s", err);
    end_case("checkpoint: lock, second writer, leftovers of dead ones, places that cannot be written");
}

static void test_dump(void) {
    char path[PATH_MAX], out[PATH_MAX], why[1024] = "";
    float logits[2 * 3 * 4], back[64];
    SafeTensors s;
    make_out(out, "dump");
    test_path(path, "dump/d.safetensors");
    fake_build_blocks("mlstm", 4, 1, 4, 4);
    fake_fill(3);
    for (int k = 0; k < 24; k++) logits[k] = (float)k / 7;
    CHECK(dump_write(path, &fake_table, &fake_backend, 1.25, logits, 2, 3, 4, why, sizeof why) == 0, "%s", why);
    CHECK(safetensors_open(&s, path, why, sizeof why) == 0, "%s", why);
    CHECK(s.num_tensors == (size_t)fake_table.num_tensors + 2, "%zu tensors", s.num_tensors);
    const SafeTensor *t = safetensors_find(&s, "loss");
    CHECK(t && t->ndim == 1 && t->shape[0] == 1 && !safetensors_read(&s, t, 0, 1, back, why, sizeof why) &&
              back[0] == 1.25f,
          "loss");
    t = safetensors_find(&s, "logits");
    CHECK(t && t->ndim == 3 && t->shape[2] == 4 && !safetensors_read(&s, t, 0, 24, back, why, sizeof why) &&
              memcmp(back, logits, sizeof logits) == 0,
          "logits");
    t = safetensors_find(&s, "grad.lm_head.weight");
    CHECK(t && t->ndim == 2 && !safetensors_read(&s, t, 0, 16, back, why, sizeof why), "gradient");
    CHECK(back[15] == fake_value(KIND_GRAD, 3, fake_table.total - 1), "gradient");
    safetensors_close(&s);
    CHECK(count_entries(out, "d.") == 1, "a temporary file is left");
    CHECK(dump_write(out, &fake_table, &fake_backend, 1, logits, 2, 3, 4, why, sizeof why) == EXIT_USAGE,
          "a directory");
    test_path(path, "nowhere/d.safetensors");
    CHECK(dump_write(path, &fake_table, &fake_backend, 1, logits, 2, 3, 4, why, sizeof why) == EXIT_USAGE &&
              strstr(why, path),
          "%s", why);
    end_case("dump: loss, logits, gradients; places that cannot be written");
}

// ---------------------------------------------------------------------------------------------------------------------
// data.h

// A shard of `count` tokens 0, 1, 2, ... modulo `modulo`, after a header with these values.
static void put_shard(const char *name, uint32_t magic, uint32_t version, uint32_t said, int vocab, int eot, int count,
                      int width, int modulo) {
    char path[PATH_MAX];
    size_t size = 1024 + (size_t)count * (size_t)width;
    unsigned char *bytes = xcalloc(size, 1);
    uint32_t header[5] = {magic, version, said, (uint32_t)vocab, (uint32_t)eot};
    for (int k = 0; k < 20; k++) bytes[k] = (unsigned char)(header[k / 4] >> (8 * (k % 4)));
    for (int k = 0; k < count; k++)
        for (int b = 0; b < width && b < 4; b++) bytes[1024 + k * width + b] = (unsigned char)((k % modulo) >> (8 * b));
    test_path(path, name);
    put_file(path, bytes, size);
    free(bytes);
}

static void put_text(const char *name, const char *text) {
    char path[PATH_MAX];
    test_path(path, name);
    put_file(path, text, strlen(text));
}

typedef struct {
    const char *globs;
    int seq_len, vocab;
} Open;

static void open_and_check(const void *argument) {
    const Open *o = argument;
    Dataset d;
    if (chdir(scratch)) _exit(99);
    dataset_open(&d, "--train", o->globs, o->seq_len);
    dataset_check_tokens(&d, o->vocab);
    dataset_close(&d);
}

static void test_data_bad(void) {
    static const struct {
        Open open;
        int code;
        const char *says, *also;
    } cases[] = {{{"good.bin", 4, 300}, 0, "", ""},
                 {{"good.bin,text.txt", 4, 300}, 0, "", ""},
                 {{"raw:raw.dat", 4, 300}, 0, "", ""},
                 {{"good7.bin", 4, 300}, 0, "", ""},
                 {{"empty.txt,good.bin", 4, 300}, 0, "note", "empty.txt"},
                 {{"header_only.bin,good.bin", 4, 300}, 0, "note", "header_only.bin"},
                 {{"good*.bin,[t]ext.txt", 4, 300}, 0, "", ""},
                 {{"a[1].txt", 4, 300}, 0, "", ""},
                 {{"missing.bin", 4, 300}, 2, "--train", "missing.bin"},
                 {{"missing*.txt", 4, 300}, 2, "--train", "missing*"},
                 {{"", 4, 300}, 2, "--train", "empty name"},
                 {{"good.bin,", 4, 300}, 2, "--train", "empty name"},
                 {{",good.bin", 4, 300}, 2, "--train", "empty name"},
                 {{"raw:", 4, 300}, 2, "--train", "raw:"},
                 {{".", 4, 300}, 2, "directory", ""},
                 {{"pipe.txt", 4, 300}, 2, "pipe.txt", ""},
                 {{"raw.dat", 4, 300}, 2, "raw:raw.dat", ""},
                 {{"raw:good.bin", 4, 300}, 2, "leave out", ""},
                 {{"raw:odd.dat", 4, 300}, 3, "odd", ""},
                 {{"empty.bin", 4, 300}, 3, "empty.bin", "raw:"},
                 {{"magic.bin", 4, 300}, 3, "magic.bin", "raw:magic.bin"},
                 {{"eval.bin", 4, 300}, 3, "eval.bin", "questions"},
                 {{"stub.bin", 4, 300}, 3, "stub.bin", "header"},
                 {{"version.bin", 4, 300}, 3, "version 2", ""},
                 {{"version7.bin", 4, 300}, 3, "version 1", ""},
                 {{"short.bin", 4, 300}, 3, "short.bin", "promises 51"},
                 {{"long.bin", 4, 300}, 3, "long.bin", "promises 49"},
                 {{"half.bin", 4, 300}, 3, "half.bin", ""},
                 {{"huge.bin", 4, 300}, 3, "promises 4294967295", ""},
                 {{"vocab.bin", 4, 300}, 3, "vocabulary", "-5"},
                 {{"eot.bin", 4, 300}, 3, "end-of-text", "300"},
                 {{"good.bin", 50, 300}, 2, "--seq-len 50", "50"},
                 {{"empty.txt", 4, 300}, 2, "--seq-len 4", ""},
                 {{"header_only.bin", 4, 300}, 2, "--seq-len 4", ""},
                 {{"good.bin", 4, 49}, 2, "token id 49 at position 49", "--vocab"},
                 {{"good.bin,text.txt", 4, 100}, 2, "text.txt", "vocabulary is 100"},
                 {{"good7.bin", 4, 70000}, 2, "token id 70000", "position 70000"}};
    char err[4096], path[PATH_MAX];
    put_shard("good.bin", 20240520, 1, 50, 300, 7, 50, 2, 300);
    put_shard("good7.bin", 20240801, 7, 50, 0, 0, 50, 4, 300);
    put_shard("header_only.bin", 20240520, 1, 0, 0, 0, 0, 2, 300);
    put_shard("magic.bin", 20240521, 1, 50, 0, 0, 50, 2, 300);
    put_shard("eval.bin", 20240522, 1, 50, 0, 0, 50, 2, 300);
    put_shard("version.bin", 20240520, 2, 50, 0, 0, 50, 2, 300);
    put_shard("version7.bin", 20240801, 1, 50, 0, 0, 50, 4, 300);
    put_shard("short.bin", 20240520, 1, 51, 0, 0, 50, 2, 300);
    put_shard("long.bin", 20240520, 1, 49, 0, 0, 50, 2, 300);
    put_shard("half.bin", 20240520, 1, 50, 0, 0, 101, 1, 300);
    put_shard("huge.bin", 20240520, 1, 0xFFFFFFFFu, 0, 0, 50, 2, 300);
    put_shard("vocab.bin", 20240520, 1, 50, -5, 0, 50, 2, 300);
    put_shard("eot.bin", 20240520, 1, 50, 300, 300, 50, 2, 300);
    put_text("stub.bin", "\x88\xd8\x34\x01, cut off in its header");
    put_text("text.txt", "to be or not to be\n");
    put_text("a[1].txt", "a name with brackets\n");
    put_text("empty.txt", "");
    put_text("empty.bin", "");
    put_text("raw.dat", "0\0001\0002\0003\0");
    test_path(path, "raw.dat");
    put_file(path, "\1\0\2\0\3\0\4\0\5\0\6\0", 12);
    test_path(path, "odd.dat");
    put_file(path, "\1\0\2\0\3", 5);
    test_path(path, "pipe.txt");
    CHECK(mkfifo(path, 0600) == 0, "mkfifo");
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        if (cases[k].open.vocab == 70000) put_shard("good7.bin", 20240801, 7, 80000, 0, 0, 80000, 4, 1 << 30);
        int code = in_child(open_and_check, &cases[k].open, err, sizeof err);
        CHECK(code == cases[k].code, "%s: exit code %d: %s", cases[k].open.globs, code, err);
        CHECK(strstr(err, cases[k].says) && strstr(err, cases[k].also), "%s: %s", cases[k].open.globs, err);
        CHECK(code == 0 || is_one_line(err), "%s: %s", cases[k].open.globs, err);
        CHECK(code != 0 || cases[k].says[0] || !err[0], "%s: %s", cases[k].open.globs, err);
    }
    end_case("data: 37 good and bad lists of files; one line, exit code 2 or 3");
}

static void test_data_samples(void) {
    char path[4][PATH_MAX], globs[4 * PATH_MAX + 64];
    int in[5], out[5];
    unsigned char resets[5];
    Dataset d;
    put_shard("d_b.bin", 20240520, 1, 12, 300, 7, 12, 2, 300);  // tokens 0..11: two samples of 5
    put_shard("d_c.bin", 20240801, 7, 6, 0, 0, 6, 4, 300);      // one sample, no vocabulary: end of text 50256
    put_shard("d_d.bin", 20240520, 1, 6, 400, 0, 6, 2, 300);    // end of text 0, valid because a vocabulary is given
    put_text("d_a.txt", "abcde");                               // 5 bytes: no sample of 5 + 1
    put_text("d_e.txt", "abcdefghijk");                         // two samples
    test_path(path[0], "d_[b-e].*");
    test_path(path[1], "d_a.txt");
    format_into(globs, sizeof globs, "%s,%s", path[0], path[1]);
    int saved = mute();  // the note on d_a.txt
    dataset_open(&d, "--train", globs, 5);
    unmute(saved);
    dataset_check_tokens(&d, 300);
    CHECK(d.num_files == 5 && d.num_samples == 6 && d.num_tokens == 5 + 12 + 6 + 6 + 11, "%d files, %llu samples",
          d.num_files, (unsigned long long)d.num_samples);
    CHECK(strstr(d.files[0].path, "d_a.txt") && strstr(d.files[4].path, "d_e.txt"), "sorted order");
    CHECK(!d.all_text && d.header_vocab == 400, "vocabulary %d", d.header_vocab);
    static const struct {
        int first, eot;
        unsigned char resets[5];
    } expected[6] = {{0, -1, {1, 0, 0, 0, 0}}, {5, -1, {0, 0, 1, 0, 0}},   {0, -1, {1, 0, 0, 0, 0}},
                     {0, -1, {1, 0, 0, 0, 0}}, {'a', -1, {1, 0, 0, 0, 0}}, {'f', -1, {0, 0, 0, 0, 0}}};
    for (int s = 0; s < 6; s++) {
        dataset_read(&d, (uint64_t)s, in, out, resets, -1);
        for (int t = 0; t < 5; t++)
            CHECK(in[t] == expected[s].first + t && out[t] == in[t] + 1 && resets[t] == expected[s].resets[t],
                  "sample %d, t %d: %d %d %d", s, t, in[t], out[t], resets[t]);
    }
    dataset_read(&d, 5, in, out, resets, 'h');
    CHECK(resets[2] == 1 && resets[0] == 0, "--eot holds for text too");
    dataset_read(&d, 1, in, out, resets, 9);
    CHECK(resets[2] == 0 && resets[4] == 1, "--eot comes before the header");
    dataset_read(&d, 1, in, out, NULL, -1);
    dataset_close(&d);

    put_shard("d_f.bin", 20240520, 1, 50300, 0, 0, 50300, 2, 50300);
    put_shard("d_g.bin", 20240520, 1, 6, 300, -1, 6, 2, 300);
    test_path(path[0], "d_f.bin");
    dataset_open(&d, "--train", path[0], 5);
    dataset_read(&d, 50255 / 5, in, out, resets, -1);
    CHECK(in[1] == 50256 && resets[1] == 1 && resets[0] == 0, "50256 ends a text where the header does not say");
    dataset_close(&d);
    test_path(path[0], "d_g.bin");
    dataset_open(&d, "--train", path[0], 5);
    CHECK(d.files[0].eot == -1, "a header may say that there is no end of text");
    dataset_close(&d);
    test_path(path[0], "d_?.txt");
    dataset_open(&d, "--train", path[0], 1);
    CHECK(d.all_text && d.header_vocab == 0 && d.num_samples == 4 + 10, "text, T = 1: %llu",
          (unsigned long long)d.num_samples);
    dataset_close(&d);
    end_case("data: samples, order of files, documents, vocabulary");
}

static void test_data_fingerprint(void) {
    char globs[PATH_MAX], why[1024];
    Dataset d;
    JsonWriter w;
    memset(&w, 0, sizeof w);
    put_text("f_1.txt", "first file");
    put_text("f_2.txt", "123456789");
    test_path(globs, "f_*.txt");
    dataset_open(&d, "--train", globs, 4);
    dataset_check_tokens(&d, 256);
    dataset_write_fingerprint(&d, &w, NULL);
    Json *v = json_parse(w.text, w.len, why, sizeof why);
    CHECK(v && v->count == 2 && strcmp(json_get_string(&v->items[1]), "f_2.txt 9 e3069283") == 0, "%s", w.text);
    CHECK(dataset_matches(&d, v, why, sizeof why), "%s", why);
    CHECK(!dataset_matches(&d, NULL, why, sizeof why), "nothing recorded");
    dataset_close(&d);
    put_text("f_2.txt", "123456788");
    dataset_open(&d, "--train", globs, 4);
    dataset_check_tokens(&d, 256);
    CHECK(!dataset_matches(&d, v, why, sizeof why) && strstr(why, "f_2.txt"), "%s", why);
    dataset_close(&d);
    json_free(v);
    json_writer_free(&w);
    put_shard("f_3.bin", 20240520, 1, 40, 300, 7, 40, 2, 300);
    test_path(globs, "f_3.bin");
    size_t size;
    unsigned char *bytes = get_file(globs, &size);
    dataset_open(&d, "--train", globs, 4);
    dataset_check_tokens(&d, 300);
    CHECK(d.files[0].crc == crc32c(0, bytes, size), "checksum of a shard covers its header too");
    dataset_close(&d);
    free(bytes);
    end_case("data: fingerprint; other contents are noticed");
}

// ---------------------------------------------------------------------------------------------------------------------

int main(void) {
    const char *tmp = getenv("TMPDIR");
    char name[PATH_MAX];
    format_into(name, sizeof name, "%s/test_files.XXXXXX", tmp && *tmp ? tmp : P_tmpdir);
    if (!mkdtemp(name) || !realpath(name, scratch)) die(EXIT_RUN, "test: cannot make %s: %s", name, strerror(errno));
    test_json_values();
    test_json_invalid();
    test_json_writer();
    test_crc32c();
    test_conversions();
    test_safetensors_round_trip();
    test_safetensors_headers();
    test_safetensors_index();
    test_config_round_trip();
    test_config_bad();
    test_fixtures();
    test_weights();
    test_round_trip();
    test_state_rows();
    test_other_model();
    test_keep();
    test_fallback();
    test_every_bit();
    test_full_disk();
    test_lock();
    test_dump();
    test_data_bad();
    test_data_samples();
    test_data_fingerprint();
    test_cut_saves();
    fake_free();
    remove_tree(scratch);
    printf("%d passed, %d failed\n", num_passed, num_failed);
    return num_failed > 0;
}
