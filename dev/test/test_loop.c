// test_loop.c: tests of what the training loop decides by itself: learning rates, the order of samples, the choice of
// tokens, text on the terminal, logs. No model is built; whole runs are tested by test_runs.sh.
//   build and run: make build/test_loop && build/test_loop
#include "../../xlstmc/trainer.h"

static int passed = 0, failed = 0;

PRINTF_LIKE(2, 3)
static void check(int ok, const char *fmt, ...) {
    va_list args;
    if (ok) {
        passed++;
        return;
    }
    failed++;
    printf("FAILED: ");
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
    printf("\n");
}

static int near(double a, double b) { return fabs(a - b) <= 1e-12 * (1 + fabs(b)); }

static Flags flags_of(int argc, const char **argv) {
    Flags f;
    flags_parse(&f, argc, (char **)argv);
    return f;
}

// ----------------------------------------------------------------------------------------------------------------

static void test_schedules(void) {
    const char *names[4] = {"cosine", "linear", "constant", "wsd"};
    double at_600[4] = {0.1 + 0.9 * 0.5 * (1 + cos(3.14159265358979323846 * 500 / 900)), 1 - 0.9 * 500 / 900, 1, 1};
    double at_900[4] = {0.1 + 0.9 * 0.5 * (1 + cos(3.14159265358979323846 * 800 / 900)), 1 - 0.9 * 800 / 900, 1,
                        1 - 0.9 * sqrt(0.5)};
    for (int k = 0; k < 4; k++) {
        const char *argv[] = {"x",    "--lr",       "2",   "--warmup",   "100",   "--steps",
                              "1000", "--final-lr", "0.1", "--schedule", names[k]};
        Flags f = flags_of(11, argv);
        check(near(schedule_lr(&f, 0), 0.02), "%s: first step %g", names[k], schedule_lr(&f, 0));
        check(near(schedule_lr(&f, 99), 2), "%s: end of the warm-up %g", names[k], schedule_lr(&f, 99));
        check(near(schedule_lr(&f, 100), 2), "%s: after the warm-up %g", names[k], schedule_lr(&f, 100));
        check(near(schedule_lr(&f, 600), 2 * at_600[k]), "%s: step 600 %g", names[k], schedule_lr(&f, 600));
        check(near(schedule_lr(&f, 900), 2 * at_900[k]), "%s: step 900 %g", names[k], schedule_lr(&f, 900));
        check(near(schedule_lr(&f, 1000), k == 2 ? 2 : 0.2), "%s: at the end %g", names[k], schedule_lr(&f, 1000));
        f.warmup = 5000;  // longer than the run
        check(near(schedule_lr(&f, 999), 2 * 1000.0 / 5000), "%s: long warm-up %g", names[k], schedule_lr(&f, 999));
        f.warmup = 1000;
        check(isfinite(schedule_lr(&f, 1000)), "%s: nothing after the warm-up", names[k]);
    }
}

// A step of 8 sequences, whoever reads them: the micro-steps of 1, 2 and 4 groups of ranks take the same in the same
// order, and the rows a group keeps states for are its own.
static void test_ranks_order(Trainer *t, const uint64_t *want) {
    int64_t sequences = t->sequences_per_step;
    t->sequences_per_step = 8;
    t->tokens = 16 * 24;  // step 3 of 8 sequences
    for (int groups = 1; groups <= 4; groups *= 2)
        for (t->batch = 1; t->batch * groups <= 8; t->batch *= 2) {
            int64_t at = 24;
            Checkpoint c;
            memset(&c, 0, sizeof c);
            c.batch = t->batch;
            comm.dp_size = groups;
            for (int64_t first = 0; first < 8; first += t->batch * groups)
                for (comm.dp_rank = 0; comm.dp_rank < groups; comm.dp_rank++)
                    for (int row = 0; row < t->batch; row++, at++) {
                        int64_t position = rows_begin(t, first, comm.dp_rank) + row;
                        check(position == at && sample_at(t, (uint64_t)position) == want[at - 18],
                              "%d groups, batch %d: sample %d", groups, t->batch, (int)at);
                        check(state_row_here(&c, (int)(at - 24)) == (int)(first / groups) + row,
                              "%d groups, batch %d: states of row %d", groups, t->batch, (int)at - 24);
                    }
        }
    comm.dp_size = 1;
    comm.dp_rank = 0;
    t->sequences_per_step = sequences;
    t->tokens = 16 * 18;
}

static void test_sample_order(void) {
    static Trainer t;
    int seen[103] = {0}, in_order = 1, changed = 0;
    uint64_t first_epoch[103];
    t.seq_len = 16;
    t.sequences_per_step = 1;
    t.train.num_samples = 103;
    t.flags.seed = 42;
    for (int k = 0; k < 206; k++) {
        t.tokens = 16 * (uint64_t)k;
        uint64_t sample = sample_at(&t, step_begins(&t));
        seen[sample]++;
        if (k < 103) first_epoch[k] = sample;
        else changed += first_epoch[k - 103] != sample;
        in_order &= sample == (uint64_t)k % 103;
    }
    for (int k = 0; k < 103; k++) check(seen[k] == 2, "sample %d came %d times in two epochs", k, seen[k]);
    check(!in_order && changed > 50, "the second epoch has its own order");
    t.sequences_per_step = 6;  // step 3 of 6 sequences reads what steps 18 .. 23 of one read
    t.tokens = 16 * 18;
    for (int row = 0; row < 6; row++)
        check(sample_at(&t, step_begins(&t) + (uint64_t)row) == first_epoch[18 + row], "row %d of step 3", row);
    test_ranks_order(&t, first_epoch + 18);
    t.flags.no_shuffle = 1;
    check(sample_at(&t, step_begins(&t) + 5) == 23, "in order");
    t.flags.carry_state = 1;  // 6 streams of 17 samples; one sample is left over
    check(sample_at(&t, step_begins(&t)) == 3 && sample_at(&t, step_begins(&t) + 5) == 5 * 17 + 3, "streams at step 3");
    check(!streams_begin(&t), "streams are on their way");
    t.tokens = 16 * 6 * 17;
    check(streams_begin(&t) && sample_at(&t, step_begins(&t) + 5) == 5 * 17, "streams begin again");
}

static void test_sampler(void) {
    float logits[6] = {0.0f, 2.0f, 1.0f, 2.0f, -50.0f, 1.5f};
    int counts[6] = {0};
    double weight[6], sum = 0;
    Sampler s;
    sampler_init(&s, 6, 0, 0, 1);
    check(sampler_pick(&s, logits, 0.99) == 1, "temperature 0: the first of the likeliest");
    sampler_free(&s);
    sampler_init(&s, 6, 0.5, 0, 1);
    for (int k = 0; k < 6; k++) sum += weight[k] = exp(logits[k] / 0.5);
    for (int k = 0; k < 20000; k++) counts[sampler_pick(&s, logits, (k + 0.5) / 20000)]++;
    for (int k = 0; k < 6; k++)
        check(fabs(counts[k] / 20000.0 - weight[k] / sum) < 2e-4, "temperature 0.5: token %d", k);
    check(sampler_pick(&s, logits, 1 - 1e-17) != 4, "u near 1 is no reason for an unlikely token");
    sampler_free(&s);
    sampler_init(&s, 6, 1, 2, 1);
    for (int k = 0; k < 100; k++) {
        int token = sampler_pick(&s, logits, (k + 0.5) / 100);
        check(token == 1 || token == 3, "top-k 2 gave %d", token);
    }
    sampler_free(&s);
    sampler_init(&s, 6, 1, 3, 1e-9);
    check(sampler_pick(&s, logits, 0.999) == 1, "a tiny top-p leaves one token");
    sampler_free(&s);
    sum = 0;
    for (int k = 0; k < 6; k++) sum += weight[k] = exp(logits[k]);
    double p = (2 * weight[1] + 0.5 * weight[5]) / sum;  // ends within token 5: tokens 1, 3 and 5 remain
    for (int top_k = 0; top_k <= 5; top_k += 5) {
        memset(counts, 0, sizeof counts);
        sampler_init(&s, 6, 1, top_k, p);
        for (int k = 0; k < 1000; k++) counts[sampler_pick(&s, logits, (k + 0.5) / 1000)]++;
        int others = counts[0] + counts[2] + counts[4];
        check(others == 0 && counts[1] && counts[3] && counts[5], "top-p with top-k %d", top_k);
        sampler_free(&s);
    }
}

static void text_of(const char *bytes, size_t len, char *dst) {
    TokenText t;
    char piece[TOKEN_TEXT_MAX];
    memset(&t, 0, sizeof t);
    t.vocab = 256;
    *dst = 0;
    for (size_t k = 0; k < len; k++) {
        token_text(&t, (unsigned char)bytes[k], piece);
        strcat(dst, piece);
    }
    token_text_end(&t, piece);
    strcat(dst, piece);
}

static void test_text(void) {
    struct {
        const char *bytes, *shown;
    } cases[] = {
        {"plain\tand\nsimple", "plain\tand\nsimple"},
        {"h\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80", "h\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80"},
        {"\x1b[31m\r\x7f", "\\x1b[31m\\x0d\\x7f"},
        {"\xc2\x9b", "\\xc2\\x9b"},                  // a control character in two bytes
        {"\xff\xc0\xafz", "\\xff\\xc0\\xafz"},       // never UTF-8
        {"\xed\xa0\x80", "\\xed\\xa0\\x80"},         // a surrogate
        {"\xe2\x82z", "\\xe2\\x82z"},                // a character that breaks off
        {"\xf0\x9f\x98", "\\xf0\\x9f\\x98"},         // the text breaks off
        {"\xf0\x9f\xc3\xa4", "\\xf0\\x9f\xc3\xa4"},  // the next character is whole
    };
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        char shown[256];
        text_of(cases[k].bytes, strlen(cases[k].bytes), shown);
        check(strcmp(shown, cases[k].shown) == 0, "text %zu is shown as '%s'", k, shown);
    }
    TokenText t;
    char piece[TOKEN_TEXT_MAX];
    memset(&t, 0, sizeof t);
    t.vocab = 50304;
    token_text(&t, 50256, piece);
    check(strcmp(piece, "50256 ") == 0, "ids are shown as numbers: '%s'", piece);
}

// ----------------------------------------------------------------------------------------------------------------

static void write_file(const char *path, const char *text) {
    FILE *f = fopen(path, "wb");
    if (!f || fputs(text, f) < 0 || fclose(f) != 0) die(EXIT_RUN, "%s: cannot write", path);
}

static long kept_of(const char *path, int64_t step) {
    FILE *f = fopen(path, "rb");
    if (!f) die(EXIT_RUN, "%s: cannot read", path);
    long kept = log_length_up_to(f, step);
    fclose(f);
    return kept;
}

static void test_log_cut(const char *dir) {
    char path[4096];
    format_into(path, sizeof path, "%s/log", dir);
    const char *head = "{\"config\":{}}\n{\"step\":1,\"loss\":2}\n{\"step\":2,\"loss\":2}\n";
    const char *more = "{\"step\":2,\"val_loss\":2}\n{\"resume\":2}\n{\"step\":3}\n{\"step\":4}\n";
    char text[512];
    format_into(text, sizeof text, "%s%s", head, more);
    write_file(path, text);
    check(kept_of(path, 4) == (long)strlen(text), "all lines up to the last step stay");
    check(kept_of(path, 2) == (long)strlen(text) - 22, "lines of later steps go");
    check(kept_of(path, 0) == 14, "the configuration stays");
    format_into(text, sizeof text, "%s{\"step\":3,\"lo", head);
    write_file(path, text);
    check(kept_of(path, 9) == (long)strlen(head), "a torn line goes");
    write_file(path, "");
    check(kept_of(path, 9) == 0, "an empty log");
    remove(path);
}

// Reads the event file back with code of its own: lengths, checksums bit by bit, and the scalars in it.
static uint32_t slow_masked_crc(const unsigned char *p, size_t n) {
    uint32_t c = ~0u;
    for (size_t k = 0; k < n; k++) {
        c ^= p[k];
        for (int bit = 0; bit < 8; bit++) c = c & 1 ? c >> 1 ^ 0x82F63B78u : c >> 1;
    }
    c = ~c;
    return (c >> 15 | c << 17) + 0xa282ead8u;
}

static void test_events(const char *dir) {
    static Log l;
    unsigned char bytes[4096];
    log_open_events(&l, dir, 7);
    log_scalar(&l, 300, "train/loss", 1.5);
    log_close(&l);
    FILE *f = fopen(l.events_path, "rb");
    size_t size = f ? fread(bytes, 1, sizeof bytes, f) : 0, at = 0;
    if (f) fclose(f);
    remove(l.events_path);
    int records = 0, good = 1;
    const unsigned char *data[8];
    size_t len[8];
    while (at + 16 <= size && records < 8) {
        uint64_t n = 0;
        for (int k = 7; k >= 0; k--) n = n << 8 | bytes[at + (size_t)k];
        if (n > size - at - 16) break;
        uint32_t crc[2] = {slow_masked_crc(bytes + at, 8), slow_masked_crc(bytes + at + 12, n)};
        for (int k = 0; k < 4; k++) {
            good &= bytes[at + 8 + (size_t)k] == (crc[0] >> (8 * k) & 255);
            good &= bytes[at + 12 + n + (size_t)k] == (crc[1] >> (8 * k) & 255);
        }
        data[records] = bytes + at + 12;
        len[records++] = n;
        at += n + 16;
    }
    check(records == 3 && at == size, "an event file of three records: %d, %zu of %zu bytes", records, at, size);
    check(good, "checksums of the records");
    if (records != 3) return;
    const unsigned char version[] =
        "\x1a\x0d"
        "brain.Event:2",
                        start[] = {0x10, 8, 0x3a, 2, 8, 1};
    const unsigned char scalar[] = {0x10, 0xac, 2,   0x2a, 19,  0x0a, 17,  0x0a, 10, 't', 'r',  'a',
                                    'i',  'n',  '/', 'l',  'o', 's',  's', 0x15, 0,  0,   0xc0, 0x3f};
    check(len[0] == 9 + 15 && memcmp(data[0] + 9, version, 15) == 0, "the version comes first");
    check(len[1] == 9 + 6 && memcmp(data[1] + 9, start, 6) == 0, "a resumed run drops what is later");
    check(len[2] == 9 + sizeof scalar && memcmp(data[2] + 9, scalar, sizeof scalar) == 0, "the scalar");
}

static void test_formats(void) {
    char text[256];
    ModelConfig c;
    format_count(text, sizeof text, 1234567);
    check(strcmp(text, "1,234,567") == 0, "%s", text);
    format_count(text, sizeof text, 123);
    check(strcmp(text, "123") == 0, "%s", text);
    format_duration(text, sizeof text, 3723.2);
    check(strcmp(text, "1:02:03") == 0, "%s", text);
    format_duration(text, sizeof text, 59.7);
    check(strcmp(text, "1:00") == 0, "%s", text);
    model_preset("v1-125m-7to1", &c);
    format_blocks(&c, text, sizeof text);
    check(strcmp(text, "mlstm_v1*3,slstm,mlstm_v1*16,slstm,mlstm_v1*3") == 0, "%s", text);
    format_blocks(&c, text, 20);
    check(strcmp(text, "mlstm_v1*3,slstm...") == 0, "%s", text);
    check(log_round_interval(0) == 1 && log_round_interval(3) == 5 && log_round_interval(20) == 20 &&
              log_round_interval(51) == 100,
          "intervals of lines");
    check(choice_allows("fp32|bf16", "bf16") && !choice_allows("fp32|bf16", "bf") && !choice_allows("a|b", ""),
          "words of a choice");
}

int main(void) {
    char dir[1024];
    const char *base = getenv("TMPDIR");
    format_into(dir, sizeof dir, "%s/test_loop.XXXXXX", base && *base ? base : P_tmpdir);
    if (!mkdtemp(dir)) die(EXIT_RUN, "%s: %s", dir, strerror(errno));
    test_schedules();
    test_sample_order();
    test_sampler();
    test_text();
    test_log_cut(dir);
    test_events(dir);
    test_formats();
    rmdir(dir);
    printf("test_loop: %d passed, %d failed\n", passed, failed);
    return failed > 0;
}
