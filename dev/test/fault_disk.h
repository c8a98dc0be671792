// fault_disk.h: system calls that fail on demand. Include it before the code under test: it redefines open, pwrite,
// fsync, close, rename, mkdir, unlink and rmdir there. The fault_at'th call after fault_begin() does, by fault_mode:
//
//   FAULT_KILL    the process is killed instead of the call, as by kill -9
//   FAULT_TORN    a write gets half of its bytes to the file, then as above
//   FAULT_POWER   the power fails: what was not flushed by fsync is lost, data of files and names in directories alike
//   FAULT_ERROR   the call fails with fault_errno
#ifndef FAULT_DISK_H
#define FAULT_DISK_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FAULT_OFF, FAULT_KILL, FAULT_TORN, FAULT_POWER, FAULT_ERROR };
enum { MAX_TRACKED = 64 };

static int fault_mode, fault_errno;
static long fault_at, fault_calls;

// What a power failure would lose. Paths are absolute and without links.
static struct TrackedFile {
    char path[PATH_MAX];
    int fd;       // -1: closed
    int flushed;  // its data
    int named;    // 1: the directory that names it was flushed after it was created
} tracked_files[MAX_TRACKED];
static struct TrackedRename {
    char from[PATH_MAX], to[PATH_MAX];
    int durable;
} tracked_renames[MAX_TRACKED];
static int num_tracked_files, num_tracked_renames;

static void fault_begin(int mode, long at, int error) {
    fault_mode = mode;
    fault_at = at;
    fault_errno = error;
    fault_calls = 0;
    num_tracked_files = num_tracked_renames = 0;
}

// Paths below `from` become paths below `to`.
static void fault_move_paths(const char *from, const char *to) {
    size_t n = strlen(from);
    for (int k = 0; k < num_tracked_files; k++) {
        char *path = tracked_files[k].path, moved[2 * PATH_MAX];
        if (strncmp(path, from, n) != 0 || path[n] != '/') continue;
        snprintf(moved, sizeof moved, "%s%s", to, path + n);
        memcpy(path, moved, PATH_MAX);
    }
}

static void fault_lose_power(void) {
    for (int k = num_tracked_renames - 1; k >= 0; k--) {
        if (tracked_renames[k].durable) continue;
        if (rename(tracked_renames[k].to, tracked_renames[k].from) == 0)
            fault_move_paths(tracked_renames[k].to, tracked_renames[k].from);
    }
    for (int k = 0; k < num_tracked_files; k++) {
        if (!tracked_files[k].flushed && truncate(tracked_files[k].path, 0) != 0 && errno != ENOENT) abort();
        if (!tracked_files[k].named) unlink(tracked_files[k].path);
    }
}

// Counts a call; 1 if it has to fail with errno.
static int fault_here(void) {
    if (fault_mode == FAULT_OFF || ++fault_calls != fault_at) return 0;
    if (fault_mode == FAULT_ERROR) {
        errno = fault_errno;
        return 1;
    }
    if (fault_mode == FAULT_POWER) fault_lose_power();
    raise(SIGKILL);
    return 1;
}

static int fault_open(const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    int mode = flags & O_CREAT ? va_arg(args, int) : 0;
    va_end(args);
    if (flags & O_CREAT && fault_here()) return -1;
    int fd = open(path, flags, mode);
    if (fd >= 0 && flags & O_CREAT && num_tracked_files < MAX_TRACKED) {
        struct TrackedFile *f = &tracked_files[num_tracked_files++];
        snprintf(f->path, sizeof f->path, "%s", path);
        f->fd = fd;
        f->flushed = f->named = 0;
    }
    return fd;
}

static ssize_t fault_pwrite(int fd, const void *bytes, size_t size, off_t offset) {
    if (fault_mode == FAULT_TORN && fault_calls + 1 == fault_at && pwrite(fd, bytes, size / 2, offset) < 0) abort();
    if (fault_here()) return -1;
    for (int k = 0; k < num_tracked_files; k++)
        if (tracked_files[k].fd == fd) tracked_files[k].flushed = 0;
    return pwrite(fd, bytes, size, offset);
}

static int fault_fsync(int fd) {
    char link[64], path[PATH_MAX] = "";
    struct stat st;
    if (fault_here()) return -1;
    for (int k = 0; k < num_tracked_files; k++)
        if (tracked_files[k].fd == fd) tracked_files[k].flushed = 1;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (fstat(fd, &st) == 0 && S_ISDIR(st.st_mode) && readlink(link, path, sizeof path - 1) > 0) {
        size_t n = strlen(path);
        for (int k = 0; k < num_tracked_files; k++) {
            const char *p = tracked_files[k].path;
            if (strncmp(p, path, n) == 0 && p[n] == '/' && !strchr(p + n + 1, '/')) tracked_files[k].named = 1;
        }
        for (int k = 0; k < num_tracked_renames; k++) {
            const char *p = tracked_renames[k].to;
            if (strncmp(p, path, n) == 0 && p[n] == '/' && !strchr(p + n + 1, '/')) tracked_renames[k].durable = 1;
        }
    }
    return fcntl(fd, F_GETFD) < 0 ? -1 : 0;  // the real one takes milliseconds, and what it does is simulated
}

static int fault_close(int fd) {
    int failed = fault_here();
    for (int k = 0; k < num_tracked_files; k++)
        if (tracked_files[k].fd == fd) tracked_files[k].fd = -1;
    int code = close(fd);
    if (!failed) return code;
    errno = fault_errno;
    return -1;
}

static int fault_rename(const char *from, const char *to) {
    if (fault_here()) return -1;
    int code = rename(from, to);
    if (code == 0 && num_tracked_renames < MAX_TRACKED) {
        struct TrackedRename *r = &tracked_renames[num_tracked_renames++];
        snprintf(r->from, sizeof r->from, "%s", from);
        snprintf(r->to, sizeof r->to, "%s", to);
        r->durable = 0;
        fault_move_paths(from, to);
    }
    return code;
}

static int fault_mkdir(const char *path, mode_t mode) { return fault_here() ? -1 : mkdir(path, mode); }
static int fault_unlink(const char *path) { return fault_here() ? -1 : unlink(path); }
static int fault_rmdir(const char *path) { return fault_here() ? -1 : rmdir(path); }

#define open(...) fault_open(__VA_ARGS__)
#define pwrite(fd, bytes, size, offset) fault_pwrite(fd, bytes, size, offset)
#define fsync(fd) fault_fsync(fd)
#define close(fd) fault_close(fd)
#define rename(from, to) fault_rename(from, to)
#define mkdir(path, mode) fault_mkdir(path, mode)
#define unlink(path) fault_unlink(path)
#define rmdir(path) fault_rmdir(path)

#endif
