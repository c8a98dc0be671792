// json.h: a small JSON reader (text to tree) and writer, for config.json, safetensors headers, manifests and logs.
// The reader takes RFC 8259 and nothing else, from files that may hold anything: depth and number of values are
// bounded, a duplicate key, a NUL in a string, bad UTF-8 or a number beyond double is refused.
// Numbers are read and written by strtod and printf: the program must stay in the "C" locale.
#ifndef XLSTMC_JSON_H
#define XLSTMC_JSON_H

#include "util.h"

enum { JSON_MAX_DEPTH = 64, JSON_MAX_VALUES = 1 << 20, JSON_MAX_NUMBER = 64 };

typedef enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

typedef struct Json {
    JsonType type;
    int boolean;
    int integral;        // of a number: 1 written without point and exponent and within 64 bits, -1 the same with a '-'
    uint64_t magnitude;  // of such a number
    double number;
    const char *string;
    size_t count;        // elements of an array, members of an object
    struct Json *items;  // [count]; of an object in the order of their keys
    const char **keys;   // [count], sorted
} Json;

// ----------------------------------------------------------------------------------------------------------------
// Reader. The whole tree is one allocation: every value, key and string has its place in it before parsing starts.

typedef struct {
    const char *key;
    Json value;
} JsonMember;

typedef struct {
    const char *text;
    size_t len, pos;
    int depth;
    Json *pool;  // values of closed containers; pool[0] is the root
    const char **keys;
    size_t used_pool, used_keys;
    JsonMember *stack;  // values of containers that are still open
    size_t top;
    char *strings;  // where the next string goes; a decoded string is never longer than its text
    char *why;
    size_t why_size;
} JsonParser;

static int json_fail(JsonParser *p, const char *what) {
    snprintf(p->why, p->why_size, "not valid JSON: %s at byte %zu", what, p->pos);
    return 0;
}

static void json_skip_space(JsonParser *p) {
    while (p->pos < p->len && strchr(" \t\n\r", p->text[p->pos]) && p->text[p->pos]) p->pos++;
}

static int json_peek(const JsonParser *p) { return p->pos < p->len ? (unsigned char)p->text[p->pos] : -1; }

// Length of the valid UTF-8 sequence at s (RFC 3629: no surrogates, no overlong forms), 0 if there is none.
static size_t utf8_length(const unsigned char *s, size_t left) {
    size_t n = s[0] < 0x80                   ? 1
               : s[0] >= 0xC2 && s[0] < 0xE0 ? 2
               : s[0] >= 0xE0 && s[0] < 0xF0 ? 3
               : s[0] >= 0xF0 && s[0] < 0xF5 ? 4
                                             : 0;
    if (n == 0 || n > left) return 0;
    for (size_t k = 1; k < n; k++)
        if ((s[k] & 0xC0) != 0x80) return 0;
    if ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F)) return 0;
    if ((s[0] == 0xF0 && s[1] < 0x90) || (s[0] == 0xF4 && s[1] > 0x8F)) return 0;
    return n;
}

static size_t utf8_encode(unsigned code, char *dst) {
    if (code < 0x80) {
        dst[0] = (char)code;
        return 1;
    }
    size_t n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t k = n - 1; k > 0; k--) {
        dst[k] = (char)(0x80 | (code & 0x3F));
        code >>= 6;
    }
    dst[0] = (char)((0xF00u >> n) | code);
    return n;
}

static int json_hex4(JsonParser *p, unsigned *out) {
    *out = 0;
    for (int k = 0; k < 4; k++) {
        int c = json_peek(p);
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) return json_fail(p, "bad \\u escape");
        *out = *out * 16 + (unsigned)digit;
        p->pos++;
    }
    return 1;
}

static int json_escape(JsonParser *p) {  // after the backslash
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    int c = json_peek(p);
    p->pos++;
    const char *at = c > 0 ? strchr(from, c) : NULL;
    if (at) {
        *p->strings++ = to[at - from];
        return 1;
    }
    unsigned code, low;
    if (c != 'u') return json_fail(p, "unknown escape");
    if (!json_hex4(p, &code)) return 0;
    if (code >= 0xD800 && code < 0xE000) {
        if (code >= 0xDC00 || json_peek(p) != '\\') return json_fail(p, "half of a surrogate pair");
        p->pos++;
        if (json_peek(p) != 'u') return json_fail(p, "half of a surrogate pair");
        p->pos++;
        if (!json_hex4(p, &low)) return 0;
        if (low < 0xDC00 || low >= 0xE000) return json_fail(p, "half of a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (code == 0) return json_fail(p, "NUL in a string");
    p->strings += utf8_encode(code, p->strings);
    return 1;
}

static const char *json_parse_string(JsonParser *p) {  // at the opening quote
    const char *start = p->strings;
    p->pos++;
    for (;;) {
        int c = json_peek(p);
        if (c < 0) {
            json_fail(p, "string without end");
            return NULL;
        }
        if (c < 0x20) {
            json_fail(p, "control character in a string");
            return NULL;
        }
        if (c == '"') {
            p->pos++;
            *p->strings++ = 0;
            return start;
        }
        if (c == '\\') {
            p->pos++;
            if (!json_escape(p)) return NULL;
            continue;
        }
        size_t n = utf8_length((const unsigned char *)p->text + p->pos, p->len - p->pos);
        if (n == 0) {
            json_fail(p, "bad UTF-8");
            return NULL;
        }
        memcpy(p->strings, p->text + p->pos, n);
        p->strings += n;
        p->pos += n;
    }
}

static size_t json_digits(JsonParser *p) {
    size_t start = p->pos;
    while (json_peek(p) >= '0' && json_peek(p) <= '9') p->pos++;
    return p->pos - start;
}

static int json_parse_number(JsonParser *p, Json *v) {
    size_t start = p->pos;
    int negative = json_peek(p) == '-', integral = 1;
    if (negative) p->pos++;
    size_t first = p->pos, digits = json_digits(p);
    if (digits == 0 || (digits > 1 && p->text[first] == '0')) return json_fail(p, "bad number");
    if (json_peek(p) == '.') {
        p->pos++;
        integral = 0;
        if (json_digits(p) == 0) return json_fail(p, "bad number");
    }
    if (json_peek(p) == 'e' || json_peek(p) == 'E') {
        p->pos++;
        integral = 0;
        if (json_peek(p) == '+' || json_peek(p) == '-') p->pos++;
        if (json_digits(p) == 0) return json_fail(p, "bad number");
    }
    char buffer[JSON_MAX_NUMBER];
    size_t n = p->pos - start;
    if (n >= sizeof buffer) return json_fail(p, "number too long");
    memcpy(buffer, p->text + start, n);
    buffer[n] = 0;
    v->type = JSON_NUMBER;
    v->number = strtod(buffer, NULL);
    if (!(v->number - v->number == 0)) return json_fail(p, "number too large");
    if (integral) {
        errno = 0;
        v->magnitude = strtoull(buffer + negative, NULL, 10);
        if (errno == 0) v->integral = negative ? -1 : 1;
    }
    return 1;
}

static int json_compare_members(const void *a, const void *b) {
    return strcmp(((const JsonMember *)a)->key, ((const JsonMember *)b)->key);
}

static int json_parse_value(JsonParser *p, Json *v);

// Members lie on the stack until the closing bracket tells how many they are.
static int json_parse_container(JsonParser *p, Json *v, char close) {
    int object = close == '}';
    size_t base = p->top;
    v->type = object ? JSON_OBJECT : JSON_ARRAY;
    if (++p->depth > JSON_MAX_DEPTH) return json_fail(p, "nested too deeply");
    p->pos++;
    json_skip_space(p);
    while (json_peek(p) != close) {
        JsonMember member;
        memset(&member, 0, sizeof member);
        if (object) {
            if (json_peek(p) != '"') return json_fail(p, "a key is missing");
            if (!(member.key = json_parse_string(p))) return 0;
            json_skip_space(p);
            if (json_peek(p) != ':') return json_fail(p, "':' is missing");
            p->pos++;
        }
        if (!json_parse_value(p, &member.value)) return 0;
        p->stack[p->top++] = member;
        json_skip_space(p);
        if (json_peek(p) != ',') {
            if (json_peek(p) != close) return json_fail(p, object ? "',' or '}' is missing" : "',' or ']' is missing");
            break;
        }
        p->pos++;
        json_skip_space(p);
        if (json_peek(p) == close) return json_fail(p, "a value is missing");
    }
    p->pos++;
    p->depth--;
    v->count = p->top - base;
    v->items = p->pool + p->used_pool;
    v->keys = object ? p->keys + p->used_keys : NULL;
    if (object && v->count > 1) qsort(p->stack + base, v->count, sizeof *p->stack, json_compare_members);
    for (size_t k = 0; k < v->count; k++) {
        const JsonMember *m = &p->stack[base + k];
        if (object && k > 0 && strcmp(m->key, m[-1].key) == 0)
            return json_fail(p, "duplicate key in the object that ends");
        p->pool[p->used_pool++] = m->value;
        if (object) p->keys[p->used_keys++] = m->key;
    }
    p->top = base;
    return 1;
}

static int json_parse_value(JsonParser *p, Json *v) {
    static const struct {
        const char *word;
        JsonType type;
        int boolean;
    } literals[] = {{"null", JSON_NULL, 0}, {"true", JSON_BOOL, 1}, {"false", JSON_BOOL, 0}};
    json_skip_space(p);
    int c = json_peek(p);
    if (c == '{') return json_parse_container(p, v, '}');
    if (c == '[') return json_parse_container(p, v, ']');
    if (c == '"') {
        v->type = JSON_STRING;
        return (v->string = json_parse_string(p)) != NULL;
    }
    if (c == '-' || (c >= '0' && c <= '9')) return json_parse_number(p, v);
    for (size_t k = 0; k < sizeof literals / sizeof literals[0]; k++) {
        size_t n = strlen(literals[k].word);
        if (p->len - p->pos < n || memcmp(p->text + p->pos, literals[k].word, n) != 0) continue;
        p->pos += n;
        v->type = literals[k].type;
        v->boolean = literals[k].boolean;
        return 1;
    }
    return json_fail(p, c < 0 ? "unexpected end" : "unexpected character");
}

// Parses one whole document of `len` bytes. NULL and a reason in `why` if it is not JSON or beyond the bounds.
// Release with json_free().
MAYBE_UNUSED
static Json *json_parse(const char *text, size_t len, char *why, size_t why_size) {
    // Every value but the root stands after a ',' or an opening bracket, so these bound the number of values.
    size_t values = 1;
    for (size_t k = 0; k < len; k++) values += text[k] == ',' || text[k] == '[' || text[k] == '{';
    if (values > JSON_MAX_VALUES) {
        snprintf(why, why_size, "more than %d JSON values", JSON_MAX_VALUES);
        return NULL;
    }
    JsonParser p;
    memset(&p, 0, sizeof p);
    p.text = text;
    p.len = len;
    p.why = why;
    p.why_size = why_size;
    p.pool = (Json *)xcalloc(1, values * (sizeof(Json) + sizeof(char *)) + len + 1);
    p.keys = (const char **)(p.pool + values);
    p.strings = (char *)(p.keys + values);
    p.stack = (JsonMember *)xcalloc(values, sizeof *p.stack);
    p.used_pool = 1;
    int ok = json_parse_value(&p, &p.pool[0]);
    if (ok) {
        json_skip_space(&p);
        if (p.pos < p.len) ok = json_fail(&p, "something follows the document");
    }
    free(p.stack);
    if (ok) return p.pool;
    free(p.pool);
    return NULL;
}

MAYBE_UNUSED
static void json_free(Json *root) { free(root); }

// Member of an object; NULL if it is absent or `object` is NULL or no object.
MAYBE_UNUSED
static const Json *json_get(const Json *object, const char *key) {
    if (!object || object->type != JSON_OBJECT) return NULL;
    size_t low = 0, high = object->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        int order = strcmp(key, object->keys[middle]);
        if (order == 0) return &object->items[middle];
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

// Typed getters: 1 and the value, or 0 if v is NULL, of another type or out of range.
MAYBE_UNUSED
static int json_get_uint(const Json *v, uint64_t *out) {
    if (!v || v->type != JSON_NUMBER || v->integral != 1) return 0;
    *out = v->magnitude;
    return 1;
}

MAYBE_UNUSED
static int json_get_int(const Json *v, int64_t low, int64_t high, int64_t *out) {
    if (!v || v->type != JSON_NUMBER || !v->integral || v->magnitude > (uint64_t)INT64_MAX) return 0;
    int64_t value = v->integral * (int64_t)v->magnitude;
    if (value < low || value > high) return 0;
    *out = value;
    return 1;
}

MAYBE_UNUSED
static int json_get_double(const Json *v, double *out) {
    if (!v || v->type != JSON_NUMBER) return 0;
    *out = v->number;
    return 1;
}

MAYBE_UNUSED
static int json_get_bool(const Json *v, int *out) {
    if (!v || v->type != JSON_BOOL) return 0;
    *out = v->boolean;
    return 1;
}

MAYBE_UNUSED
static const char *json_get_string(const Json *v) {  // valid as long as the tree; NULL if v is no string
    return v && v->type == JSON_STRING ? v->string : NULL;
}

// ----------------------------------------------------------------------------------------------------------------
// Writer: appends to a growing buffer. All members of the struct start at zero; indent = 2 gives one value a line, 0
// all on one line. `key` is NULL for the outermost value and inside arrays. The document is text[0 .. len-1].

typedef struct {
    char *text;  // ends with a NUL that does not count
    size_t len, capacity;
    int indent;
    int depth;
    int filled;  // 1: the innermost container has a member already
} JsonWriter;

static void json_append(JsonWriter *w, const char *s, size_t n) {
    if (w->len + n + 1 > w->capacity) {
        size_t capacity = 2 * (w->len + n) + 256;
        char *text = (char *)realloc(w->text, capacity);
        if (!text) die(EXIT_RUN, "out of memory: %zu bytes for JSON text", capacity);
        w->text = text;
        w->capacity = capacity;
    }
    memcpy(w->text + w->len, s, n);
    w->len += n;
    w->text[w->len] = 0;
}

static void json_newline(JsonWriter *w) {
    if (w->indent == 0) return;
    json_append(w, "\n", 1);
    for (int k = 0; k < w->depth * w->indent; k++) json_append(w, " ", 1);
}

static void json_quoted(JsonWriter *w, const char *s) {
    json_append(w, "\"", 1);
    for (size_t left = strlen(s); left > 0;) {
        size_t n = utf8_length((const unsigned char *)s, left);
        char escape[8];
        if (n == 0) {  // a file name may hold any bytes; JSON may not
            json_append(w, "\xEF\xBF\xBD", 3);
            n = 1;
        } else if (*s == '"' || *s == '\\') {
            escape[0] = '\\';
            escape[1] = *s;
            json_append(w, escape, 2);
        } else if ((unsigned char)*s < 0x20) {
            snprintf(escape, sizeof escape, "\\u%04x", (unsigned)*s);
            json_append(w, escape, 6);
        } else {
            json_append(w, s, n);
        }
        s += n;
        left -= n;
    }
    json_append(w, "\"", 1);
}

static void json_prefix(JsonWriter *w, const char *key) {
    if (w->filled) json_append(w, w->indent ? "," : ", ", w->indent ? 1 : 2);
    if (w->depth > 0) json_newline(w);
    w->filled = 1;
    if (!key) return;
    json_quoted(w, key);
    json_append(w, ": ", 2);
}

MAYBE_UNUSED
static void json_begin(JsonWriter *w, const char *key, char bracket) {  // '{' or '['
    json_prefix(w, key);
    json_append(w, &bracket, 1);
    w->depth++;
    w->filled = 0;
}

MAYBE_UNUSED
static void json_end(JsonWriter *w, char bracket) {  // '}' or ']'
    w->depth--;
    if (w->filled) json_newline(w);
    json_append(w, &bracket, 1);
    w->filled = 1;
}

MAYBE_UNUSED
static void json_write_string(JsonWriter *w, const char *key, const char *value) {
    json_prefix(w, key);
    json_quoted(w, value);
}

MAYBE_UNUSED
static void json_write_bool(JsonWriter *w, const char *key, int value) {
    json_prefix(w, key);
    json_append(w, value ? "true" : "false", value ? 4 : 5);
}

MAYBE_UNUSED
static void json_write_int(JsonWriter *w, const char *key, int64_t value) {
    char buffer[32];
    json_prefix(w, key);
    json_append(w, buffer, (size_t)snprintf(buffer, sizeof buffer, "%lld", (long long)value));
}

MAYBE_UNUSED
static void json_write_uint(JsonWriter *w, const char *key, uint64_t value) {
    char buffer[32];
    json_prefix(w, key);
    json_append(w, buffer, (size_t)snprintf(buffer, sizeof buffer, "%llu", (unsigned long long)value));
}

static void json_append_double(JsonWriter *w, double value, int show_point) {
    char buffer[40];
    int n = 0;
    if (!(value - value == 0)) {
        json_append(w, "null", 4);
        return;
    }
    for (int digits = 15; digits <= 17; digits++) {  // 15 always print as typed, 17 always read back
        n = snprintf(buffer, sizeof buffer, "%.*g", digits, value);
        if (strtod(buffer, NULL) == value) break;
    }
    json_append(w, buffer, (size_t)n);
    if (show_point && !strpbrk(buffer, ".e")) json_append(w, ".0", 2);
}

// Text that reads back as the same double, with no more digits than that takes; null if the value is not finite, which
// JSON cannot say.
MAYBE_UNUSED
static void json_write_double(JsonWriter *w, const char *key, double value) {
    json_prefix(w, key);
    json_append_double(w, value, 0);
}

// The same, always with a point or an exponent: readers with strict types then take it for a float.
MAYBE_UNUSED
static void json_write_float(JsonWriter *w, const char *key, double value) {
    json_prefix(w, key);
    json_append_double(w, value, 1);
}

MAYBE_UNUSED
static void json_writer_free(JsonWriter *w) {
    free(w->text);
    memset(w, 0, sizeof *w);
}

#endif
