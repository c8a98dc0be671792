// shards.h: which rank reduces, updates, saves and loads which elements of the flat buffer that holds all tensors.
//
// The buffer is cut into buckets, each bucket into one piece a rank:
//
//   bucket 0                  bucket 1                  ...   the last one is padded
//   | rank 0 | rank 1 | ... | rank 0 | rank 1 | ... |
//
// A bucket is what one reduce-scatter takes, so the gradients of a bucket can be on their way while the backward pass
// is still at work in front of it, and any number of ranks fits any model. With --zero 1 a rank keeps moments only of
// its own pieces, one behind the other.
#ifndef XLSTMC_SHARDS_H
#define XLSTMC_SHARDS_H

#include "util.h"

#ifndef SHARD_BUCKET
#define SHARD_BUCKET ((size_t)1 << 24)  // most elements of a bucket, about; 64 MiB of floats
#endif
static size_t shard_bucket = SHARD_BUCKET;

typedef struct {
    size_t total;        // elements of the buffer that mean something
    size_t piece;        // elements of a rank's part of a bucket
    size_t num_buckets;  // the buffer has num_buckets * ranks * piece elements
    int ranks, rank;
} Shards;

static size_t shards_bucket(const Shards *s) { return s->piece * (size_t)s->ranks; }
MAYBE_UNUSED
static size_t shards_padded(const Shards *s) { return s->num_buckets * shards_bucket(s); }
MAYBE_UNUSED
static size_t shards_owned(const Shards *s) { return s->num_buckets * s->piece; }  // elements a rank owns, padded

// With one rank the buffer is one piece of its own size.
MAYBE_UNUSED
static Shards shards_make(size_t total, int ranks, int rank) {
    const size_t line = 16;  // elements; pieces begin at multiples
    Shards s = {total, total, 1, ranks, rank};
    if (ranks == 1) return s;
    size_t n = (size_t)ranks, pieces = (total + shard_bucket - 1) / shard_bucket * n;
    s.piece = ((total + pieces - 1) / pieces + line - 1) / line * line;
    s.num_buckets = (total + s.piece * n - 1) / (s.piece * n);
    return s;
}

// The elements from `at` on, at most `limit`, that one rank owns: their number; whose they are, and where the first one
// stands among that rank's own.
MAYBE_UNUSED
static size_t shards_run(const Shards *s, size_t at, size_t limit, int *owner, size_t *place) {
    size_t bucket = at / shards_bucket(s), within = at % shards_bucket(s), left = s->piece - within % s->piece;
    *owner = (int)(within / s->piece);
    *place = bucket * s->piece + within % s->piece;
    return left < limit ? left : limit;
}

#endif
