/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * latent-blkd SOCKET IMAGE {raw|qcow2|auto} {rw|ro} LANES [OWNER]: started by `latent blkd`, and by `latent run
 * --blk-domain`, which has looked at the words. A program of its own: liburing and libseccomp would make every
 * start of `latent` slower. OWNER: a descriptor; then it goes to the background when it serves, and ends when the
 * other end is closed.
 *
 * Prints "latent blkd: serving …" to stderr when front ends may connect. Exit statuses as in cli/cli.h.
 */
#include "blkd/domain.h"
#include "blkd/image.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { OK = 0, USAGE = 64, NO_IMAGE = 66, SYSTEM = 71, SOCKET = 73, IN_USE = 74 };

static int fail(int status, const char *format, const char *path, const char *why)
{
	fprintf(stderr, "latent: ");
	fprintf(stderr, format, path, why);
	fputc('\n', stderr);
	return status;
}

/* Does anybody listen there? A socket that nobody serves is what is left of a domain that was killed. */
static bool is_served(const struct sockaddr_un *at)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	bool served =
		fd >= 0 && (!connect(fd, (const struct sockaddr *)at, sizeof *at) || errno == EAGAIN);

	if (fd >= 0)
		close(fd);
	return served;
}

static int listen_at(const char *path, int *ret_listener)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	struct stat st;
	int fd;

	if ((size_t)snprintf(at.sun_path, sizeof at.sun_path, "%s", path) >= sizeof at.sun_path)
		return fail(SOCKET, "the path of a socket has at most 107 bytes: %.120s%s", path, "");
	if (is_served(&at))
		return fail(IN_USE, "%s is in use: somebody serves it%s", path, "");
	if (!lstat(path, &st) && !S_ISSOCK(st.st_mode))
		return fail(SOCKET, "%s is there, and is no socket%s", path, "");
	unlink(path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	umask(077);
	if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 64))
		return fail(SOCKET, "%s cannot be made: %s", path, strerror(errno));
	*ret_listener = fd;
	return OK;
}

/* Unless somebody has put his own there. */
static void remove_socket(const char *path, ino_t ino)
{
	struct stat st;

	if (!stat(path, &st) && st.st_ino == ino)
		unlink(path);
}

struct start {
	const char *image, *socket;
	int ready; /* a pipe that our parent reads; -1: people do */
};

static void say_ready(void *ctx)
{
	struct start *s = ctx;

	if (s->ready < 0)
		fprintf(stderr, "latent blkd: serving %s at %s\n", s->image, s->socket);
	else if (write(s->ready, "", 1) < 0 || close(s->ready))
		fprintf(stderr, "latent: who has started the block domain is gone\n");
}

/* Our parent stays until we serve, and ends as we do if we never do. */
static int go_to_background(void)
{
	int ready[2], status = 0;
	char byte;
	pid_t pid;

	if (pipe2(ready, O_CLOEXEC))
		_exit(fail(SYSTEM, "a pipe cannot be made: %s%s", strerror(errno), ""));
	pid = fork();
	if (pid < 0)
		_exit(fail(SYSTEM, "no process can be started: %s%s", strerror(errno), ""));
	if (!pid) {
		close(ready[0]);
		setsid(); /* what a terminal sends is for the VMM, with which this ends */
		return ready[1];
	}
	close(ready[1]);
	if (read(ready[0], &byte, sizeof byte) == sizeof byte)
		_exit(OK);
	waitpid(pid, &status, 0);
	_exit(WIFEXITED(status) ? WEXITSTATUS(status) : SYSTEM);
}

/* Each queue of a front end takes two or three. */
static void allow_descriptors(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit))
		return;
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
}

int main(int argc, char **argv)
{
	char why[IMAGE_WHY_BYTES];
	struct image image;
	struct start s;
	struct stat st;
	int listener = -1, owner = -1, status, r;

	if (argc < 6 || argc > 7)
		return fail(USAGE, "%s is started by latent blkd, not by people%s", argv[0], "");
	if (argc == 7) {
		owner = (int)strtol(argv[6], NULL, 10);
		if (dup2(owner, 3) < 0)
			return fail(USAGE, "there is no descriptor %s%s", argv[6], "");
		owner = 3;
	}
	close_range(owner < 0 ? 3 : 4, ~0u, 0);
	if (!freopen("/dev/null", "r", stdin))
		close(STDIN_FILENO); /* what a VMM of ours reads there is not for us */
	r = image_open(argv[2], strcmp(argv[3], "auto") ? argv[3] : NULL, !strcmp(argv[4], "ro"), &image,
		       why);
	if (r)
		return fail(r == -EAGAIN ? IN_USE : NO_IMAGE, "%s%s", why, "");
	allow_descriptors();
	status = listen_at(argv[1], &listener);
	if (status)
		return status;
	if (stat(argv[1], &st))
		st.st_ino = 0;
	s = (struct start){ argv[2], argv[1], owner < 0 ? -1 : go_to_background() };
	r = domain_serve(listener, owner, &image, (unsigned)strtoul(argv[5], NULL, 10), say_ready, &s);
	remove_socket(argv[1], st.st_ino);
	return r ? fail(SYSTEM, "%s cannot be served: %s", argv[2],
			r == -ECHILD ? "see above" : strerror(-r))
		 : OK;
}
