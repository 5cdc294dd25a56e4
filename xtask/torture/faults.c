/* Makes calls of the C library fail for what lies below a folder: an instrument of `cargo xtask torture`, which compiles it
 * and loads it into `cm` by LD_PRELOAD. It is part of no program.
 *
 *   CM_FAULT_BELOW   the folder, an absolute path
 *   CM_FAULT_CALL    which call fails: create, open, mkdir, read, write, fsync, rename or unlink (of folders too)
 *   CM_FAULT_AT      which of them, from 1
 *   CM_FAULT_ERRNO   with what
 *   CM_FAULT_STAYS   1: all later ones fail too, as on a disk that is full
 *   CM_FAULT_CLOCK   seconds by which the time of day is turned, and CM_FAULT_CLOCK_AT: behind how many looks at it
 *   CM_FAULT_NOTE    a file that gets `failed PATH` when one fails and, at the end, `calls NAME NUMBER` for each call
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum call { CREATE, OPEN, MKDIR, READ, WRITE, FSYNC, RENAME, UNLINK, CALLS };
static const char *const names[CALLS] = {"create", "open",  "mkdir",  "read",
                                         "write",  "fsync", "rename", "unlink"};

static const char *below, *note;
static long at, seen[CALLS];
static int failing = -1, with, stays;
static long turned, turned_at, looks;

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

static void add_note(const char *text) {
    int file = note == NULL ? -1 : REAL(int, "open", const char *, int, ...)(note, O_WRONLY | O_APPEND | O_CREAT, 0644);
    if (file < 0) return;
    if (REAL(ssize_t, "write", int, const void *, size_t)(file, text, strlen(text)) < 0) abort();
    close(file);
}

__attribute__((constructor)) static void begin(void) {
    const char *call = getenv("CM_FAULT_CALL"), *number = getenv("CM_FAULT_AT"), *error = getenv("CM_FAULT_ERRNO");
    note = getenv("CM_FAULT_NOTE");
    stays = getenv("CM_FAULT_STAYS") != NULL;
    at = number == NULL ? 0 : atol(number);
    with = error == NULL ? EIO : atoi(error);
    for (int i = 0; call != NULL && i < CALLS; i++)
        if (strcmp(names[i], call) == 0) failing = i;
    below = getenv("CM_FAULT_BELOW");
    const char *by = getenv("CM_FAULT_CLOCK"), *behind = getenv("CM_FAULT_CLOCK_AT");
    turned = by == NULL ? 0 : atol(by);
    turned_at = behind == NULL ? 0 : atol(behind);
}

__attribute__((destructor)) static void end(void) {
    char line[64];
    for (int i = 0; i < CALLS; i++) {
        snprintf(line, sizeof line, "calls %s %ld\n", names[i], __atomic_load_n(&seen[i], __ATOMIC_RELAXED));
        add_note(line);
    }
    snprintf(line, sizeof line, "calls clock %ld\n", __atomic_load_n(&looks, __ATOMIC_RELAXED));
    add_note(line);
}

static int is_below(const char *path) {
    char whole[2 * PATH_MAX] = "";
    if (below == NULL || path == NULL) return 0;
    if (path[0] != '/') {
        if (getcwd(whole, PATH_MAX) == NULL) return 0;
        strcat(whole, "/");
    }
    strncat(whole, path, PATH_MAX - 2);
    size_t length = strlen(below);
    return strncmp(whole, below, length) == 0 && (whole[length] == '/' || whole[length] == 0);
}

/* Whether this call is one that fails; errno is set then. */
static int fails(enum call call, const char *path) {
    if (!is_below(path)) return 0;
    long now = __atomic_add_fetch(&seen[call], 1, __ATOMIC_RELAXED);
    if ((int)call != failing || now < at || (now > at && !stays)) return 0;
    char line[PATH_MAX + 16];
    snprintf(line, sizeof line, "failed %s\n", path);
    add_note(line);
    errno = with;
    return 1;
}

static int fails_file(enum call call, int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int kept = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (length < 0) return 0;
    path[length] = 0;
    return fails(call, path);
}

static int opens(const char *name, const char *path, int flags, mode_t mode) {
    int writes = (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0;
    if (fails(writes ? CREATE : OPEN, path)) return -1;
    return REAL(int, name, const char *, int, ...)(path, flags, mode);
}

#define MODE_OF(flags)                                   \
    mode_t mode = 0;                                     \
    if (((flags) & O_CREAT) != 0) {                      \
        va_list more;                                    \
        va_start(more, flags);                           \
        mode = (mode_t)va_arg(more, int);                \
        va_end(more);                                    \
    }

int open(const char *path, int flags, ...) {
    MODE_OF(flags)
    return opens("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE_OF(flags)
    return opens("open64", path, flags, mode);
}

int mkdir(const char *path, mode_t mode) {
    if (fails(MKDIR, path)) return -1;
    return REAL(int, "mkdir", const char *, mode_t)(path, mode);
}

int rename(const char *from, const char *to) {
    if (fails(RENAME, to)) return -1;
    return REAL(int, "rename", const char *, const char *)(from, to);
}

int fsync(int file) {
    if (fails_file(FSYNC, file)) return -1;
    return REAL(int, "fsync", int)(file);
}

int fdatasync(int file) {
    if (fails_file(FSYNC, file)) return -1;
    return REAL(int, "fdatasync", int)(file);
}

ssize_t write(int file, const void *bytes, size_t count) {
    if (fails_file(WRITE, file)) return -1;
    return REAL(ssize_t, "write", int, const void *, size_t)(file, bytes, count);
}

ssize_t read(int file, void *bytes, size_t count) {
    if (fails_file(READ, file)) return -1;
    return REAL(ssize_t, "read", int, void *, size_t)(file, bytes, count);
}

ssize_t pread64(int file, void *bytes, size_t count, off64_t place) {
    if (fails_file(READ, file)) return -1;
    return REAL(ssize_t, "pread64", int, void *, size_t, off64_t)(file, bytes, count, place);
}

int unlink(const char *path) {
    if (fails(UNLINK, path)) return -1;
    return REAL(int, "unlink", const char *)(path);
}

int rmdir(const char *path) {
    if (fails(UNLINK, path)) return -1;
    return REAL(int, "rmdir", const char *)(path);
}

/* What lies in an open folder goes by the folder's path. */
int unlinkat(int folder, const char *path, int flags) {
    if (folder == AT_FDCWD || path[0] == '/' ? fails(UNLINK, path) : fails_file(UNLINK, folder)) return -1;
    return REAL(int, "unlinkat", int, const char *, int)(folder, path, flags);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (real == NULL) real = REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME && result == 0 && __atomic_add_fetch(&looks, 1, __ATOMIC_RELAXED) > turned_at)
        now->tv_sec += turned;
    return result;
}
