/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "vmdir/moving.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <unistd.h>

#define FILE_NAME "moving"
#define PATH_BYTES 320

static void path_of(const char *run_dir, char path[PATH_BYTES])
{
	snprintf(path, PATH_BYTES, "%.300s/" FILE_NAME, run_dir);
}

int moving_begin(const char *run_dir)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	char path[PATH_BYTES];
	int fd, r;

	path_of(run_dir, path);
	fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return -errno;
	if (!fcntl(fd, F_OFD_SETLK, &lock))
		return fd;
	r = errno == EACCES ? -EAGAIN : -errno;
	close(fd);
	return r;
}

void moving_say(int fd, const struct moving *moving)
{
	struct moving m = *moving;

	m.magic = MOVING_MAGIC;
	m.version = MOVING_VERSION;
	if (fd >= 0 && pwrite(fd, &m, sizeof m, 0) < 0)
		return; /* nothing depends on it */
}

void moving_end(const char *run_dir, int fd)
{
	char path[PATH_BYTES];

	if (fd < 0)
		return;
	path_of(run_dir, path);
	(void)unlink(path);
	close(fd);
}

static bool is_locked(int fd)
{
	struct flock lock = { .l_type = F_RDLCK, .l_whence = SEEK_SET };

	return !fcntl(fd, F_OFD_GETLK, &lock) && lock.l_type != F_UNLCK;
}

int moving_read(const char *run_dir, struct moving *ret_moving)
{
	char path[PATH_BYTES];
	struct moving m;
	ssize_t n;
	int fd;

	path_of(run_dir, path);
	fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC); /* it may be a pipe */
	if (fd < 0)
		return -ENOENT;
	n = is_locked(fd) ? pread(fd, &m, sizeof m, 0) : 0;
	close(fd);
	if (n != (ssize_t)sizeof m || m.magic != MOVING_MAGIC || m.version != MOVING_VERSION || m.side >= MOVING_SIDES ||
	    m.phase >= MOVING_PHASES)
		return -ENOENT;
	*ret_moving = m;
	return 0;
}
