// rdb_text.c: the texts inside an R data base (Rdata.rdb), without R. Called by data/austen.sh.
//
// An R package keeps its data sets in one file, a chain of chunks: the uncompressed length (4 bytes, big-endian) and a
// zlib stream. Uncompressed, a chunk is one R object in R's XDR serialisation. This program writes every chunk that is
// a vector of strings (one string a line of text) as a text file:
//
//     cc -O2 -o rdb_text data/rdb_text.c && ./rdb_text Rdata.rdb DIR
//
// writes DIR/<title>.txt, where the title is the text's first line in small letters, other characters turned into "_".
// Lines are joined by "\n", without white space at their ends and without blank lines at the start and end of the text.
// It needs a C compiler and nothing else, so it carries its own inflate (RFC 1950 and 1951). R's other compressions of
// a data base (bzip2, xz) are refused. Exit code: 0, 2 for a file that cannot be read or written, 3 for a damaged file.
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../xlstmc/util.h"  // die, xcalloc, format_into

#define MAX_FILE (256u << 20)  // far above any text package: a bound before memory is asked for

// ---------------------------------------------------------------------------------------------------------------------
// inflate

#define CODE_BITS 15  // the longest code deflate allows
#define CODES (1 << CODE_BITS)

typedef struct {
    const uint8_t *in;
    size_t in_size, in_pos;
    uint64_t bits;  // bits not used yet, the next one lowest
    int nbits;
    uint8_t *out;
    size_t out_size, out_pos;
    const char *file;
} Inflate;

static void damaged(const Inflate *z, const char *what) {
    die(EXIT_DAMAGED, "%s: damaged near byte %zu: %s", z->file, z->in_pos, what);
}

// Makes n bits available. Beyond the end it gives zeros, which the decoder may peek at but not use up (see drop).
static void fill(Inflate *z, int n) {
    while (z->nbits < n) {
        uint64_t byte = z->in_pos < z->in_size ? z->in[z->in_pos] : 0;
        z->in_pos++;
        z->bits |= byte << z->nbits;
        z->nbits += 8;
    }
}

static void drop(Inflate *z, int n) {
    z->bits >>= n;
    z->nbits -= n;
    // whole bytes still in the buffer were not used: what counts is the position of the last bit that was
    if (z->in_pos - (size_t)(z->nbits / 8) > z->in_size) damaged(z, "the stream ends too early");
}

static unsigned get_bits(Inflate *z, int n) {
    fill(z, n);
    unsigned v = (unsigned)(z->bits & ((1u << n) - 1));
    drop(z, n);
    return v;
}

// Table of a prefix code: the index is the next 15 bits of input, the value symbol*16 + code length, 0 without a code.
// A code of l bits is defined most significant bit first but read lowest bit first, hence the reversal.
static void build_table(const Inflate *z, uint16_t *table, const uint8_t *length, int nsymbols) {
    int count[CODE_BITS + 1] = {0};
    unsigned next[CODE_BITS + 2];
    for (int s = 0; s < nsymbols; s++) count[length[s]]++;
    count[0] = 0;
    unsigned code = 0;
    for (int l = 1; l <= CODE_BITS; l++) {
        code = (code + (unsigned)count[l - 1]) << 1;
        next[l] = code;
        if (code + (unsigned)count[l] > 1u << l) damaged(z, "a prefix code has too many symbols");
    }
    memset(table, 0, CODES * sizeof *table);
    for (int s = 0; s < nsymbols; s++) {
        int l = length[s];
        if (!l) continue;
        unsigned c = next[l]++, reversed = 0;
        for (int i = 0; i < l; i++) reversed |= ((c >> i) & 1) << (l - 1 - i);
        for (unsigned i = reversed; i < CODES; i += 1u << l) table[i] = (uint16_t)(s * 16 + l);
    }
}

static int get_symbol(Inflate *z, const uint16_t *table) {
    fill(z, CODE_BITS);
    unsigned entry = table[z->bits & (CODES - 1)];
    if (!entry) damaged(z, "not a code word");
    drop(z, (int)(entry & 15));
    return (int)(entry >> 4);
}

static void put_byte(Inflate *z, uint8_t byte) {
    if (z->out_pos >= z->out_size) damaged(z, "longer than its length field says");
    z->out[z->out_pos++] = byte;
}

static void stored_block(Inflate *z) {
    drop(z, z->nbits % 8);
    unsigned n = get_bits(z, 16), inverse = get_bits(z, 16);
    if ((n ^ inverse) != 0xffff) damaged(z, "the length of a stored block does not match its copy");
    while (n--) put_byte(z, (uint8_t)get_bits(z, 8));
}

// Reads the two codes of a block with its own codes (dynamic) or sets the fixed ones.
static void read_codes(Inflate *z, int dynamic, uint16_t *literals, uint16_t *distances) {
    static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t length[288 + 32];
    int nliteral = 288, ndistance = 30;
    if (!dynamic) {
        for (int s = 0; s < 288; s++) length[s] = (uint8_t)(s < 144 ? 8 : s < 256 ? 9 : s < 280 ? 7 : 8);
        memset(length + 288, 5, 30);
    } else {
        uint8_t meta[19] = {0};
        nliteral = (int)get_bits(z, 5) + 257;
        ndistance = (int)get_bits(z, 5) + 1;
        int nmeta = (int)get_bits(z, 4) + 4;
        for (int i = 0; i < nmeta; i++) meta[order[i]] = (uint8_t)get_bits(z, 3);
        build_table(z, literals, meta, 19);
        for (int i = 0; i < nliteral + ndistance;) {
            int s = get_symbol(z, literals), repeat = 1, value = s;
            if (s == 16) {
                if (i == 0) damaged(z, "a repeat with nothing before it");
                value = length[i - 1];
                repeat = 3 + (int)get_bits(z, 2);
            } else if (s > 16) {
                value = 0;
                repeat = s == 17 ? 3 + (int)get_bits(z, 3) : 11 + (int)get_bits(z, 7);
            }
            if (i + repeat > nliteral + ndistance) damaged(z, "too many code lengths");
            while (repeat--) length[i++] = (uint8_t)value;
        }
    }
    build_table(z, literals, length, nliteral);
    build_table(z, distances, length + nliteral, ndistance);
}

static void compressed_block(Inflate *z, int dynamic) {
    static uint16_t literals[CODES], distances[CODES];
    read_codes(z, dynamic, literals, distances);
    for (;;) {
        int s = get_symbol(z, literals);
        if (s < 256) {
            put_byte(z, (uint8_t)s);
            continue;
        }
        if (s == 256) return;
        // lengths 3..257 in groups of four a doubling; 285 is 258 by itself (section 3.2.5 of RFC 1951)
        int k = s - 257, length = 258;
        if (k > 28) damaged(z, "a length code that does not exist");
        if (k < 8) length = 3 + k;
        else if (k < 28) length = 3 + ((4 + k % 4) << (k / 4 - 1)) + (int)get_bits(z, k / 4 - 1);
        int d = get_symbol(z, distances), distance = 1 + d;
        if (d > 29) damaged(z, "a distance code that does not exist");
        if (d > 3) distance = 1 + ((2 + d % 2) << (d / 2 - 1)) + (int)get_bits(z, d / 2 - 1);
        if ((size_t)distance > z->out_pos) damaged(z, "a copy from before the start");
        while (length--) put_byte(z, z->out[z->out_pos - (size_t)distance]);
    }
}

// Decompresses the zlib stream at z->in_pos into z->out, checks its checksum and leaves z->in_pos behind it.
static void inflate_stream(Inflate *z) {
    unsigned method = get_bits(z, 8), flags = get_bits(z, 8);
    if ((method & 15) != 8 || (method * 256 + flags) % 31 || (flags & 32))
        damaged(z, "not a zlib stream (bzip2 and xz data bases are not read)");
    int last;
    do {
        last = (int)get_bits(z, 1);
        unsigned type = get_bits(z, 2);
        if (type == 0) stored_block(z);
        else if (type < 3) compressed_block(z, type == 2);
        else damaged(z, "a block type that does not exist");
    } while (!last);
    drop(z, z->nbits % 8);
    uint32_t a = 1, b = 0, sum = 0;
    for (size_t i = 0; i < z->out_pos; i++) {
        a = (a + z->out[i]) % 65521;
        b = (b + a) % 65521;
    }
    for (int i = 0; i < 4; i++) sum = sum << 8 | get_bits(z, 8);
    if (sum != (b << 16 | a)) damaged(z, "wrong checksum");
    if (z->out_pos != z->out_size) damaged(z, "shorter than its length field says");
    z->in_pos -= (size_t)(z->nbits / 8);  // whole bytes read ahead belong to the next chunk
    z->bits = 0;
    z->nbits = 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// R's serialisation, as much of it as a vector of strings needs

typedef struct {
    const uint8_t *data;
    size_t size, pos;
    const char *file;
} Reader;

static const uint8_t *take(Reader *r, size_t n) {
    if (n > r->size - r->pos) die(EXIT_DAMAGED, "%s: damaged: an R object ends too early", r->file);
    r->pos += n;
    return r->data + r->pos - n;
}

static int32_t take_int(Reader *r) {
    const uint8_t *p = take(r, 4);
    return (int32_t)((uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3]);
}

enum { R_STRING = 9, R_STRING_VECTOR = 16, R_LATIN1 = 1 << 14 };  // object types; encoding mark in a string's flags

// Appends one string of the vector as a line to text (room for twice its length + 1) and returns the number of bytes.
static size_t take_line(Reader *r, char *text) {
    int32_t flags = take_int(r), n = take_int(r);
    if ((flags & 255) != R_STRING) die(EXIT_DAMAGED, "%s: damaged: a text line is not a string", r->file);
    if (n < 0) n = 0;  // NA
    const uint8_t *s = take(r, (size_t)n);
    size_t used = 0;
    for (int32_t i = 0; i < n; i++) {
        if ((flags & R_LATIN1) && s[i] >= 128) {  // Latin-1 to UTF-8
            text[used++] = (char)(0xc0 | s[i] >> 6);
            text[used++] = (char)(0x80 | (s[i] & 63));
        } else {
            text[used++] = (char)s[i];
        }
    }
    while (used && isspace((unsigned char)text[used - 1])) used--;
    text[used++] = '\n';
    return used;
}

static void write_text(const char *dir, const char *text, size_t size) {
    char path[4096];
    const char *line_end = (const char *)memchr(text, '\n', size);
    format_into(path, sizeof path, "%s/%.*s.txt", dir, line_end ? (int)(line_end - text) : (int)size, text);
    for (char *p = path + strlen(dir) + 1; p < path + strlen(path) - 4; p++)
        *p = isalnum((unsigned char)*p) ? (char)tolower((unsigned char)*p) : '_';
    FILE *f = fopen(path, "wb");
    if (!f) die(EXIT_USAGE, "cannot write %s: %s", path, strerror(errno));
    size_t written = fwrite(text, 1, size, f);
    if (fclose(f) || written != size) die(EXIT_USAGE, "cannot write %s: %s", path, strerror(errno));
}

// Writes the chunk's text to dir if it is a vector of strings. Returns 1 if it was.
static int write_chunk(Reader *r, const char *dir) {
    if (memcmp(take(r, 2), "X\n", 2)) die(EXIT_DAMAGED, "%s: a chunk is not in R's XDR serialisation", r->file);
    int32_t version = take_int(r);
    if (version != 2 && version != 3)
        die(EXIT_DAMAGED, "%s: serialisation version %d is not 2 or 3", r->file, (int)version);
    take(r, 8);  // the R versions that wrote it and that can read it
    if (version == 3) {
        int32_t n = take_int(r);  // the native encoding's name
        take(r, n < 0 ? 0 : (size_t)n);
    }
    if ((take_int(r) & 255) != R_STRING_VECTOR) return 0;
    int32_t nlines = take_int(r);
    char *text = (char *)xcalloc(r->size, 2);
    size_t size = 0;
    for (int32_t i = 0; i < nlines; i++) size += take_line(r, text + size);  // 8 bytes of header a line: it always fits
    while (size && text[size - 1] == '\n') size--;
    if (size) text[size++] = '\n';
    size_t start = 0;
    while (start < size && text[start] == '\n') start++;
    if (start < size) write_text(dir, text + start, size - start);
    free(text);
    return start < size;
}

static uint8_t *read_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    if (!f) die(EXIT_USAGE, "cannot open %s: %s", path, strerror(errno));
    long end = fseek(f, 0, SEEK_END) ? -1 : ftell(f);
    if (end < 0 || fseek(f, 0, SEEK_SET)) die(EXIT_USAGE, "cannot read %s: %s", path, strerror(errno));
    if ((unsigned long)end > MAX_FILE)
        die(EXIT_DAMAGED, "%s: %ld bytes, too large for a data base of texts", path, end);
    uint8_t *data = (uint8_t *)xcalloc((size_t)end, 1);
    *size = fread(data, 1, (size_t)end, f);
    if (*size != (size_t)end || fclose(f)) die(EXIT_USAGE, "cannot read %s: %s", path, strerror(errno));
    return data;
}

int main(int argc, char **argv) {
    if (argc != 3) die(EXIT_USAGE, "usage: rdb_text Rdata.rdb DIR");
    Inflate z;
    memset(&z, 0, sizeof z);
    z.file = argv[1];
    z.in = read_file(argv[1], &z.in_size);
    int texts = 0;
    while (z.in_pos < z.in_size) {
        uint32_t size = 0;
        for (int i = 0; i < 4; i++) size = size << 8 | get_bits(&z, 8);
        if (size > MAX_FILE) damaged(&z, "a chunk's length is implausible");
        z.out = (uint8_t *)xcalloc(size, 1);
        z.out_size = size;
        z.out_pos = 0;
        inflate_stream(&z);
        Reader r = {z.out, z.out_size, 0, argv[1]};
        texts += write_chunk(&r, argv[2]);
        free(z.out);
    }
    if (!texts) die(EXIT_DAMAGED, "%s: no text in it", argv[1]);
    free((void *)z.in);
    return 0;
}
