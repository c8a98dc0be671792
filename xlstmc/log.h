// log.h: what a run tells: log.jsonl (the record: one JSON object a line), a TensorBoard event file, and lines on the
// terminal. Files are written only with --out. A write that fails ends the run with one line (exit code 2): checkpoints
// stay as they are, and --resume goes on from the newest.
#ifndef XLSTMC_LOG_H
#define XLSTMC_LOG_H

#include <unistd.h>

#include "crc32c.h"  // crc32c
#include "json.h"    // JsonWriter, json_parse
#include "util.h"

typedef struct {
    char json_path[4096], events_path[4096];
    FILE *json, *events;                 // NULL without --out
    int tty;                             // standard output is a terminal: the last line is refreshed in place
    int live_len;                        // length of that line, 0: none stands there
    int64_t line_every;                  // steps between lines that stay
    double start, last_line, last_live;  // seconds
    double step_seconds;                 // running mean
    int64_t first_step, last_step;
} Log;

static void log_clear_live(Log *l) {
    if (l->live_len > 0) printf("\r%*s\r", l->live_len, "");
    l->live_len = 0;
}

static void log_failed(Log *l, const char *path) {
    int reason = errno;
    log_clear_live(l);
    die(EXIT_USAGE, "%s: cannot write: %s; make room, then continue with --resume", path, strerror(reason));
}

// ----------------------------------------------------------------------------------------------------------------
// log.jsonl

// Bytes of the whole lines at the start of f that belong to steps up to `step`. What follows was written by a run that
// got further than its last checkpoint; it will be produced again.
static long log_length_up_to(FILE *f, int64_t step) {
    char *line = NULL, why[256];
    size_t capacity = 0;
    ssize_t len;
    long kept = 0;
    while ((len = getline(&line, &capacity, f)) > 0 && line[len - 1] == '\n') {
        Json *v = json_parse(line, (size_t)len, why, sizeof why);
        int64_t at = 0;
        int good = v != NULL;
        if (json_get(v, "step")) good = json_get_int(json_get(v, "step"), 0, INT64_MAX, &at);
        if (json_get(v, "resume")) good = json_get_int(json_get(v, "resume"), 0, INT64_MAX, &at);
        if (v) json_free(v);
        if (!good || at > step) break;
        kept += (long)len;
    }
    free(line);
    return kept;
}

// Opens OUT/log.jsonl for appending after the lines of steps 0 .. step; step < 0: an empty log. 1 if it is empty.
static int log_open_json(Log *l, const char *out, int64_t step) {
    format_into(l->json_path, sizeof l->json_path, "%s/log.jsonl", out);
    l->json = fopen(l->json_path, step < 0 ? "w" : "a+");
    if (!l->json) log_failed(l, l->json_path);
    if (step < 0) return 1;
    rewind(l->json);
    long kept = log_length_up_to(l->json, step);
    if (ferror(l->json) || ftruncate(fileno(l->json), kept) != 0 || fseek(l->json, 0, SEEK_END) != 0)
        log_failed(l, l->json_path);
    return kept == 0;
}

static void log_begin(JsonWriter *w) {
    memset(w, 0, sizeof *w);
    json_begin(w, NULL, '{');
}

// Ends the object in w and writes it as one line. Frees w.
static void log_end(Log *l, JsonWriter *w) {
    json_end(w, '}');
    if (l->json && (fputs(w->text, l->json) < 0 || fputc('\n', l->json) < 0 || fflush(l->json) != 0))
        log_failed(l, l->json_path);
    json_writer_free(w);
}

// Nine digits tell two floats apart; more would only make the log longer.
static void log_number(JsonWriter *w, const char *key, double value) {
    char text[32];
    snprintf(text, sizeof text, "%.9g", value);
    json_write_double(w, key, strtod(text, NULL));
}

// ----------------------------------------------------------------------------------------------------------------
// TensorBoard: records of (u64 length, u32 checksum of it, data, u32 checksum of that), the data a protocol buffer
// message: Event {1: double wall_time, 2: int64 step, 3: string file_version | 5: Summary | 7: SessionLog},
// Summary {1: Value {1: string tag, 2: float simple_value}}, SessionLog {1: enum status, 1 = START}.

typedef struct {
    unsigned char bytes[512];
    size_t len;
} Message;

static void message_varint(Message *m, uint64_t value) {
    for (; value > 127; value >>= 7) m->bytes[m->len++] = (unsigned char)(value | 128);
    m->bytes[m->len++] = (unsigned char)value;
}

static void message_little_endian(Message *m, uint64_t bits, int width) {
    for (int k = 0; k < width; k++) m->bytes[m->len++] = (unsigned char)(bits >> (8 * k));
}

static void message_bytes(Message *m, int field, const void *data, size_t len) {
    message_varint(m, (uint64_t)field << 3 | 2);
    message_varint(m, len);
    memcpy(m->bytes + m->len, data, len);
    m->len += len;
}

static void message_event(Message *m, int64_t step) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    double wall = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    uint64_t bits;
    memcpy(&bits, &wall, 8);
    memset(m, 0, sizeof *m);
    message_varint(m, 1 << 3 | 1);
    message_little_endian(m, bits, 8);
    if (step < 0) return;
    message_varint(m, 2 << 3 | 0);
    message_varint(m, (uint64_t)step);
}

static void log_event(Log *l, const Message *m) {
    Message head, tail;
    memset(&head, 0, sizeof head);
    memset(&tail, 0, sizeof tail);
    message_little_endian(&head, m->len, 8);
    uint32_t crc[2] = {crc32c(0, head.bytes, 8), crc32c(0, m->bytes, m->len)};
    message_little_endian(&head, (uint32_t)((crc[0] >> 15 | crc[0] << 17) + 0xa282ead8u), 4);
    message_little_endian(&tail, (uint32_t)((crc[1] >> 15 | crc[1] << 17) + 0xa282ead8u), 4);
    if (fwrite(head.bytes, 1, head.len, l->events) != head.len || fwrite(m->bytes, 1, m->len, l->events) != m->len ||
        fwrite(tail.bytes, 1, tail.len, l->events) != tail.len || fflush(l->events) != 0)
        log_failed(l, l->events_path);
}

// tag: at most 200 characters.
static void log_scalar(Log *l, int64_t step, const char *tag, double value) {
    if (!l->events) return;
    Message event, summary, point;
    float number = (float)value;
    uint32_t bits;
    memcpy(&bits, &number, 4);
    memset(&point, 0, sizeof point);
    memset(&summary, 0, sizeof summary);
    message_bytes(&point, 1, tag, strlen(tag));
    message_varint(&point, 2 << 3 | 5);
    message_little_endian(&point, bits, 4);
    message_bytes(&summary, 1, point.bytes, point.len);
    message_event(&event, step);
    message_bytes(&event, 5, summary.bytes, summary.len);
    log_event(l, &event);
}

// A new file for every start; a START record makes TensorBoard drop what older files hold beyond `step`.
static void log_open_events(Log *l, const char *out, int64_t step) {
    char host[256] = "";
    if (gethostname(host, sizeof host - 1) != 0) strcpy(host, "host");
    format_into(l->events_path, sizeof l->events_path, "%s/events.out.tfevents.%010lld.%s.%ld.v2", out,
                (long long)time(NULL), host, (long)getpid());
    l->events = fopen(l->events_path, "wb");
    if (!l->events) log_failed(l, l->events_path);
    Message event, session;
    message_event(&event, -1);
    message_bytes(&event, 3, "brain.Event:2", 13);
    log_event(l, &event);
    if (step <= 0) return;
    memset(&session, 0, sizeof session);
    message_varint(&session, 1 << 3 | 0);
    message_varint(&session, 1);
    message_event(&event, step + 1);
    message_bytes(&event, 7, session.bytes, session.len);
    log_event(l, &event);
}

// ----------------------------------------------------------------------------------------------------------------
// Terminal

// The smallest of 1, 2, 5, 10, 20, ... that is at least `least`.
static int64_t log_round_interval(int64_t least) {
    int64_t ten = 1;
    while (ten * 10 <= least) ten *= 10;
    return least <= ten ? ten : least <= 2 * ten ? 2 * ten : least <= 5 * ten ? 5 * ten : 10 * ten;
}

// Prepares terminal lines for steps first_step+1 .. last_step.
static void log_start(Log *l, int64_t first_step, int64_t last_step) {
    l->tty = isatty(STDOUT_FILENO);
    l->first_step = first_step;
    l->last_step = last_step;
    l->line_every = log_round_interval((last_step - first_step + 49) / 50);
    l->start = l->last_line = now_seconds();
}

// A line that stays.
PRINTF_LIKE(2, 3)
static void log_line(Log *l, const char *fmt, ...) {
    va_list args;
    log_clear_live(l);
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
    putchar('\n');
    fflush(stdout);
}

static void format_duration(char *dst, size_t size, double seconds) {
    long long s = (long long)(seconds + 0.5);
    if (s >= 3600) snprintf(dst, size, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
    else snprintf(dst, size, "%lld:%02lld", s / 60, s % 60);
}

// "step  10/1000"
static void format_step(const Log *l, int64_t step, char *dst, size_t size) {
    int width = snprintf(dst, size, "%lld", (long long)l->last_step);
    snprintf(dst, size, "step %*lld/%lld", width, (long long)step, (long long)l->last_step);
}

// After `step` updates: a line that stays at the first and last step, every line_every steps and every half minute;
// else, on a terminal, one line that is refreshed. `seconds`: how long the step took.
static void log_step_line(Log *l, int64_t step, double loss, double lr, double norm, double seconds, double tokens) {
    double now = now_seconds();
    int stays =
        step == l->first_step + 1 || step == l->last_step || step % l->line_every == 0 || now - l->last_line > 30;
    l->step_seconds = l->step_seconds > 0 ? 0.9 * l->step_seconds + 0.1 * seconds : seconds;
    if (!stays && (!l->tty || now - l->last_live < 0.1)) return;
    char text[200], eta[32], at[64];
    format_step(l, step, at, sizeof at);
    format_duration(eta, sizeof eta, (now - l->start) / (double)(step - l->first_step) * (double)(l->last_step - step));
    snprintf(text, sizeof text, "%s  loss %.4f  lr %.2e  norm %7.3f  %6.0f ms  %7.0f tok/s  ETA %s", at, loss, lr, norm,
             1e3 * l->step_seconds, tokens / l->step_seconds, eta);
    log_clear_live(l);
    if (stays) {
        puts(text);
        l->last_line = now;
    } else {
        l->live_len = printf("%s", text);
    }
    l->last_live = now;
    fflush(stdout);
}

static void log_close(Log *l) {
    log_clear_live(l);
    if (l->json && fclose(l->json) != 0) log_failed(l, l->json_path);
    if (l->events && fclose(l->events) != 0) log_failed(l, l->events_path);
    l->json = l->events = NULL;
}

#endif
