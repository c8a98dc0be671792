// sampler.h: from logits to a token (temperature, top-k, top-p), and from tokens to text a terminal can show.
// Random numbers come from the counter-based generator of rng.h, so a seed and a position decide each token.
#ifndef XLSTMC_SAMPLER_H
#define XLSTMC_SAMPLER_H

#include <math.h>

#include "json.h"  // utf8_length
#include "rng.h"   // rng_uniform
#include "util.h"

typedef struct {
    double weight;
    int token;
} Candidate;

typedef struct {
    int vocab;
    double temperature;     // 0: the likeliest token
    int top_k;              // 0: all
    double top_p;           // 1: all
    Candidate *candidates;  // [vocab] scratch
} Sampler;

MAYBE_UNUSED
static void sampler_init(Sampler *s, int vocab, double temperature, int64_t top_k, double top_p) {
    s->vocab = vocab;
    s->temperature = temperature;
    s->top_k = top_k >= vocab ? 0 : (int)top_k;
    s->top_p = top_p;
    s->candidates = (Candidate *)xcalloc((size_t)vocab, sizeof(Candidate));
}

MAYBE_UNUSED
static void sampler_free(Sampler *s) {
    free(s->candidates);
    memset(s, 0, sizeof *s);
}

static int candidate_order(const void *a, const void *b) {  // likeliest first; equals by token, so the order is fixed
    const Candidate *x = (const Candidate *)a, *y = (const Candidate *)b;
    if (x->weight != y->weight) return x->weight < y->weight ? 1 : -1;
    return x->token - y->token;
}

// Chooses a token from logits [vocab] with u uniform in (0, 1). Weights are exp(logit / temperature); top-k keeps the
// k largest, then top-p the shortest run of largest ones whose share of the rest reaches p.
MAYBE_UNUSED
static int sampler_pick(Sampler *s, const float *logits, double u) {
    int best = 0, count = 0;
    for (int k = 1; k < s->vocab; k++)
        if (logits[k] > logits[best]) best = k;
    if (s->temperature <= 0) return best;
    double sum = 0;
    for (int k = 0; k < s->vocab; k++) {
        Candidate c = {exp(((double)logits[k] - logits[best]) / s->temperature), k};
        s->candidates[count++] = c;
        sum += c.weight;
    }
    if (s->top_p < 1 && !s->top_k) {
        // Tokens below (1-p)/vocab hold less than 1-p together, so top-p drops them all: no need to sort them.
        double floor = (1 - s->top_p) / s->vocab * sum;
        int kept = 0;
        for (int k = 0; k < count; k++)
            if (s->candidates[k].weight >= floor) s->candidates[kept++] = s->candidates[k];
        count = kept;
    }
    if (s->top_k || s->top_p < 1) qsort(s->candidates, (size_t)count, sizeof(Candidate), candidate_order);
    if (s->top_k) {
        count = s->top_k;
        sum = 0;
        for (int k = 0; k < count; k++) sum += s->candidates[k].weight;
    }
    if (s->top_p < 1) {
        double target = s->top_p * sum;
        int kept = 0;
        for (sum = 0; kept < count && sum < target; kept++) sum += s->candidates[kept].weight;
        count = kept;
    }
    double left = u * sum;
    for (int k = 0; k < count; k++) {
        left -= s->candidates[k].weight;
        if (left < 0) return s->candidates[k].token;
    }
    return s->candidates[count - 1].token;
}

// ----------------------------------------------------------------------------------------------------------------
// Tokens as text. Vocabularies of 256 are bytes, 257 bytes and an end-of-text token; others are shown as numbers.

enum { BYTE_EOT = 256, TOKEN_TEXT_MAX = 32 };

MAYBE_UNUSED
static int tokens_are_bytes(int vocab) { return vocab == 256 || vocab == 257; }

typedef struct {
    int vocab;
    int num_pending;
    unsigned char pending[4];  // the beginning of a UTF-8 character whose rest may still come
} TokenText;

// Moves what is ready from t->pending to out, as it is or as \xNN; at_end: nothing more will come. Returns its length.
// Control characters other than newline and tab are escaped: a terminal would obey them.
static int token_text_drain(TokenText *t, char *out, int at_end) {
    int written = 0;
    while (t->num_pending > 0) {
        const unsigned char *p = t->pending;
        int length = (int)utf8_length(p, (size_t)t->num_pending);
        int wanted = p[0] < 0xC2 || p[0] > 0xF4 ? 1 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
        int control = (p[0] < 0x20 && p[0] != '\n' && p[0] != '\t') || p[0] == 0x7F || (p[0] == 0xC2 && p[1] < 0xA0);
        if (length == 0 && t->num_pending < wanted && !at_end) break;
        if (length == 0 || control) {
            length = 1;
            written += snprintf(out + written, TOKEN_TEXT_MAX - (size_t)written, "\\x%02x", p[0]);
        } else {
            memcpy(out + written, p, (size_t)length);
            written += length;
        }
        t->num_pending -= length;
        memmove(t->pending, t->pending + length, (size_t)t->num_pending);
    }
    out[written] = 0;
    return written;
}

// The text to print now that `token` has come; out holds TOKEN_TEXT_MAX characters. Returns its length, which is 0
// within a character of several bytes.
MAYBE_UNUSED
static int token_text(TokenText *t, int token, char *out) {
    out[0] = 0;
    if (!tokens_are_bytes(t->vocab)) return snprintf(out, TOKEN_TEXT_MAX, "%d ", token);
    if (token >= BYTE_EOT) return token_text_drain(t, out, 1);
    t->pending[t->num_pending++] = (unsigned char)token;
    return token_text_drain(t, out, 0);
}

MAYBE_UNUSED
static int token_text_end(TokenText *t, char *out) { return token_text_drain(t, out, 1); }

#endif
