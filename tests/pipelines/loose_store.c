/* A file system that is not atomic, for paths with /loose/ in them: rename copies in pieces, and O_EXCL is ignored. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int is_loose(const char *path) { return strstr(path, "/loose/") != NULL; }

int rename(const char *from, const char *to) {
  static int (*real)(const char *, const char *);
  if (!real) real = dlsym(RTLD_NEXT, "rename");
  if (!is_loose(to)) return real(from, to);
  char piece[4096];
  ssize_t count;
  int in = open(from, O_RDONLY), out = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  while ((count = read(in, piece, sizeof piece)) > 0) {
    if (write(out, piece, count) != count) return -1;
    usleep(200);
  }
  close(in);
  close(out);
  return unlink(from);
}

static int open_loosely(const char *name, const char *path, int flags, mode_t mode) {
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, name);
  return real(path, is_loose(path) ? flags & ~O_EXCL : flags, mode);
}

int open(const char *path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = va_arg(more, mode_t);
  va_end(more);
  return open_loosely("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = va_arg(more, mode_t);
  va_end(more);
  return open_loosely("open64", path, flags, mode);
}
