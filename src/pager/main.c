/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * latent-pager DIR SOURCE: serves the pages of one snapshot to the VMs of one user; started by `latent restore` and
 * by agents. A program of its own: libcurl and what it needs would make every start of `latent` slower.
 *
 * LATENT_PREFETCH=none: nothing is fetched but what is waited for, page by page where the snapshot is not packed.
 * For comparisons.
 */
#include "pager/pager.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* The lock decides who serves; it ends with the process. -EEXIST: somebody else does. */
static int take_lock(const char *path)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	struct stat mine, there;
	int fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600), r = 0;

	if (fd < 0)
		return -errno;
	if (fcntl(fd, F_OFD_SETLK, &lock))
		r = -EEXIST;
	else if (fstat(fd, &mine) || stat(path, &there) || mine.st_ino != there.st_ino)
		r = -EAGAIN; /* its owner was just leaving */
	if (!r)
		return fd;
	close(fd);
	return r;
}

static int listen_at(const char *path)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	int fd;

	if ((size_t)snprintf(at.sun_path, sizeof at.sun_path, "%s", path) >= sizeof at.sun_path)
		return -ENAMETOOLONG;
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	unlink(path); /* of one that was killed: we have its lock */
	if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 64)) {
		int r = -errno;

		close(fd);
		return r;
	}
	return fd;
}

int main(int argc, char **argv)
{
	const char *prefetch = getenv("LATENT_PREFETCH"), *faults = getenv("LATENT_FAULT");
	char lock_path[VMDIR_PATH_BYTES], path[VMDIR_PATH_BYTES];
	int lock, listener;

	if (argc != 3 || pager_path(argv[1], argv[2], ".lock", lock_path) || pager_path(argv[1], argv[2], ".sock", path)) {
		fprintf(stderr, PAGER_PROGRAM ": started by latent restore, not by people\n");
		return 64;
	}
	if (faults && os_fault_parse(faults)) {
		fprintf(stderr, PAGER_PROGRAM ": LATENT_FAULT is not understood: %s\n", faults);
		return 64;
	}
	if (fork()) /* who has started it goes on, and is not its parent */
		_exit(0);
	umask(077);
	signal(SIGPIPE, SIG_IGN); /* OpenSSL writes to sockets as to files */
	while ((lock = take_lock(lock_path)) == -EAGAIN)
		;
	listener = lock < 0 ? lock : listen_at(path);
	if (listener < 0)
		return 1;
	pager_serve(listener, argv[2], prefetch && !strcmp(prefetch, "none"));
	unlink(path);
	unlink(lock_path);
	return 0;
}
