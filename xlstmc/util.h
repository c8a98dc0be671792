// util.h: what every file of the project needs: errors, memory, files, time.
// A user's mistake ends the program with one line on stderr that names the flag or file and says what to do.
#ifndef XLSTMC_UTIL_H
#define XLSTMC_UTIL_H

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__GNUC__)
#define PRINTF_LIKE(fmt, args) __attribute__((format(printf, fmt, args)))
#define MAYBE_UNUSED __attribute__((unused))
#else
#define PRINTF_LIKE(fmt, args)
#define MAYBE_UNUSED
#endif

// Exit codes: 0 done, 1 the run itself failed (diverged, out of memory), 2 bad flag, input or place, 3 damaged file.
enum { EXIT_RUN = 1, EXIT_USAGE = 2, EXIT_DAMAGED = 3 };

// Run by die() before the process ends, so that half-written files do not stay behind. Set by whoever writes them.
static void (*die_cleanup)(void) MAYBE_UNUSED = NULL;
// Takes over the rest of die() where this process is one of several: all of them end. Does not return.
static void (*die_in_world)(int code, const char *line) MAYBE_UNUSED = NULL;

MAYBE_UNUSED static void die_clean_up(void) {
    void (*cleanup)(void) = die_cleanup;
    die_cleanup = NULL;  // it may call die() itself
    if (cleanup) cleanup();
}

PRINTF_LIKE(2, 3) MAYBE_UNUSED static void die(int code, const char *fmt, ...) {
    char line[4096];
    va_list args;
    fflush(stdout);
    va_start(args, fmt);
    vsnprintf(line, sizeof line, fmt, args);
    va_end(args);
    for (char *c = line; *c; c++)
        if ((unsigned char)*c < ' ') *c = '?';  // a file name may hold a line break; the error stays one line
    if (die_in_world) die_in_world(code, line);
    fprintf(stderr, "error: %s\n", line);
    die_clean_up();
    exit(code);
}

// Something a user may want to know, on stderr. Of several processes only one has notes_wanted.
static int notes_wanted MAYBE_UNUSED = 1;
PRINTF_LIKE(1, 2) MAYBE_UNUSED static void note(const char *fmt, ...) {
    va_list args;
    if (!notes_wanted) return;
    fputs("note: ", stderr);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fputc('\n', stderr);
}

// Zeroed memory, aligned to 64 bytes (a cache line, an AVX-512 vector). Never returns NULL; release with free().
// Large buffers ask for huge pages: a step touches all of them, and 4 KiB pages overflow the table of translations.
MAYBE_UNUSED
static void *xcalloc(size_t count, size_t size) {
    const size_t huge_page = (size_t)2 << 20;
    void *p = NULL;
    if (size && count > ((size_t)-1 - 64) / size) die(EXIT_RUN, "%zu x %zu bytes do not fit in memory", count, size);
    size_t bytes = count * size + 64;
    if (posix_memalign(&p, bytes >= huge_page ? huge_page : 64, bytes) != 0)
        die(EXIT_RUN, "out of memory: %.1f MiB wanted; try a smaller --batch, --seq-len or model",
            (double)count * (double)size / 1048576.0);
#ifdef MADV_HUGEPAGE
    if (bytes >= huge_page) madvise(p, bytes, MADV_HUGEPAGE);  // a hint; without it everything works as well
#endif
    memset(p, 0, bytes);
    return p;
}

MAYBE_UNUSED
static char *xstrdup(const char *s) {
    char *p = (char *)xcalloc(strlen(s) + 1, 1);
    strcpy(p, s);
    return p;
}

// Formats into a fixed buffer; a path or message that does not fit is refused instead of cut.
PRINTF_LIKE(3, 4) MAYBE_UNUSED static void format_into(char *dst, size_t size, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(dst, size, fmt, args);
    va_end(args);
    if (n < 0 || (size_t)n >= size) die(EXIT_USAGE, "path or name too long: %.80s...", dst);
}

MAYBE_UNUSED
static double now_seconds(void) {  // monotonic; only differences mean anything
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#endif
