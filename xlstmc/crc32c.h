// crc32c.h: CRC-32C (Castagnoli polynomial), the checksum of checkpoints, data fingerprints and TensorBoard records.
// It finds every single-bit error and every burst of up to 32 bits.
#ifndef XLSTMC_CRC32C_H
#define XLSTMC_CRC32C_H

#include "util.h"

#if defined(__SSE4_2__) && defined(__x86_64__)
#include <nmmintrin.h>
#define CRC32C_INSTRUCTION 1
#else
#define CRC32C_INSTRUCTION 0
#endif

// Slicing by eight: table[k][b] is the checksum of byte b followed by k zero bytes.
MAYBE_UNUSED
static uint32_t crc32c_tables(uint32_t crc, const unsigned char *p, size_t size) {
    static uint32_t table[8][256];
    static int ready = 0;
    if (!ready) {
        for (uint32_t b = 0; b < 256; b++) {
            uint32_t c = b;
            for (int bit = 0; bit < 8; bit++) c = c & 1 ? (c >> 1) ^ 0x82F63B78u : c >> 1;
            table[0][b] = c;
        }
        for (int k = 1; k < 8; k++)
            for (int b = 0; b < 256; b++) table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 255];
        ready = 1;
    }
    for (; size >= 8; size -= 8, p += 8) {
        crc ^= (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        crc = table[7][crc & 255] ^ table[6][crc >> 8 & 255] ^ table[5][crc >> 16 & 255] ^ table[4][crc >> 24] ^
              table[3][p[4]] ^ table[2][p[5]] ^ table[1][p[6]] ^ table[0][p[7]];
    }
    for (; size > 0; size--, p++) crc = (crc >> 8) ^ table[0][(crc ^ *p) & 255];
    return crc;
}

// Checksum of `size` more bytes after those that gave `crc`; start with 0.
MAYBE_UNUSED
static uint32_t crc32c(uint32_t crc, const void *data, size_t size) {
    const unsigned char *p = (const unsigned char *)data;
    crc = ~crc;
#if CRC32C_INSTRUCTION
    for (; size >= 8; size -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        crc = (uint32_t)_mm_crc32_u64(crc, word);
    }
    for (; size > 0; size--, p++) crc = _mm_crc32_u8(crc, *p);
#else
    crc = crc32c_tables(crc, p, size);
#endif
    return ~crc;
}

// Product of two polynomials over GF(2), modulo the checksum's; the highest bit is the coefficient of x^0.
MAYBE_UNUSED
static uint32_t crc32c_multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = b & 1 ? (b >> 1) ^ 0x82F63B78u : b >> 1;
    }
    return product;
}

// Checksum of two runs of bytes one behind the other, from the checksums of each; `size` bytes in the second. The bytes
// behind multiply what the first left by x^(8 size).
MAYBE_UNUSED
static uint32_t crc32c_join(uint32_t first, uint32_t second, uint64_t size) {
    uint32_t power = 0x80000000u >> 8;  // x^8, squared for every bit of `size`
    for (; size; size >>= 1, power = crc32c_multiply(power, power))
        if (size & 1) first = crc32c_multiply(first, power);
    return first ^ second;
}

#endif
