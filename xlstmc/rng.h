// rng.h: random numbers without state. Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011) turns (seed, purpose, a, b) into numbers, so any element can be had in any order, on any number of ranks,
// and a resumed run needs nothing but its step number.
#ifndef XLSTMC_RNG_H
#define XLSTMC_RNG_H

#include <math.h>

#include "util.h"

enum { RNG_INIT, RNG_SHUFFLE, RNG_SAMPLE, RNG_TEST };  // purposes: each its own stream

static void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

static void rng_block(uint64_t seed, int purpose, uint64_t a, uint64_t b, uint32_t out[4]) {
    uint32_t counter[4] = {(uint32_t)b, (uint32_t)(b >> 32), (uint32_t)a,
                           (uint32_t)(a >> 32) ^ ((uint32_t)purpose << 24)};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    philox4x32(counter, key, out);
}

static double rng_to_unit(uint32_t hi, uint32_t lo) {  // (0, 1): never 0, so its logarithm exists
    return ((double)(((uint64_t)hi << 20) | (lo >> 12)) + 0.5) * (1.0 / 4503599627370496.0);
}

MAYBE_UNUSED
static double rng_uniform(uint64_t seed, int purpose, uint64_t a, uint64_t b) {
    uint32_t r[4];
    rng_block(seed, purpose, a, b, r);
    return rng_to_unit(r[0], r[1]);
}

MAYBE_UNUSED
static double rng_normal(uint64_t seed, int purpose, uint64_t a, uint64_t b) {  // Box-Muller, one of the pair
    uint32_t r[4];
    rng_block(seed, purpose, a, b, r);
    return sqrt(-2.0 * log(rng_to_unit(r[0], r[1]))) * cos(6.283185307179586 * rng_to_unit(r[2], r[3]));
}

// Position `index` of a permutation of 0 .. n-1 chosen by (seed, epoch): a Feistel network on the next even power of
// two, walked until the value is below n. Stateless: sample k of an epoch costs the same whatever came before.
MAYBE_UNUSED
static uint64_t rng_permute(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t index) {
    int half = 1;
    while (half < 31 && ((uint64_t)1 << (2 * half)) < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1, x = index;
    do {
        uint64_t left = x >> half, right = x & mask;
        for (int round = 0; round < 6; round++) {
            uint32_t r[4];
            rng_block(seed, RNG_SHUFFLE, epoch, right * 8 + (uint64_t)round, r);
            uint64_t next = left ^ (r[0] & mask);
            left = right;
            right = next;
        }
        x = (left << half) | right;
    } while (x >= n);
    return x;
}

#endif
