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

#endif
