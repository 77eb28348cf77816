/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "vmdir/pager.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_FDS 16

/* FNV-1a: tells names apart; that they are the same is asked in each request. */
static uint64_t hash_of(const char *text)
{
	uint64_t hash = 0xcbf29ce484222325u;

	for (; *text; text++)
		hash = (hash ^ (unsigned char)*text) * 0x100000001b3u;
	return hash;
}

int pager_path(const char *dir, const char *source, const char *suffix, char ret_path[VMDIR_PATH_BYTES])
{
	int n = snprintf(ret_path, VMDIR_PATH_BYTES, "%s/%016jx%s", dir, (uintmax_t)hash_of(source), suffix);

	return n < VMDIR_PATH_BYTES ? 0 : -ENAMETOOLONG;
}

int pager_starter_init(struct pager_starter *s)
{
	sigset_t none, all;
	int r = posix_spawn_file_actions_init(&s->actions);

	sigemptyset(&none);
	sigfillset(&all);
	if (!r)
		r = posix_spawnattr_init(&s->attributes);
	for (int fd = 0; !r && fd < 3; fd++)
		r = posix_spawn_file_actions_addopen(&s->actions, fd, "/dev/null", O_RDWR, 0);
	if (!r)
		r = posix_spawn_file_actions_addclosefrom_np(&s->actions, 3);
	if (!r)
		r = posix_spawnattr_setsigmask(&s->attributes, &none);
	if (!r)
		r = posix_spawnattr_setsigdefault(&s->attributes, &all);
	if (!r)
		r = posix_spawnattr_setflags(&s->attributes,
					     POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
	return -r;
}

int pager_start(const struct pager_starter *s, const char *program, const char *dir, const char *source)
{
	char *argv[] = { PAGER_PROGRAM, (char *)dir, (char *)source, NULL };
	pid_t pid;
	int r = -posix_spawn(&pid, program, &s->actions, &s->attributes, argv, environ);

	if (!r) /* it has forked and left */
		while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
			;
	return r;
}

int pager_connect(const char *dir, const char *source, unsigned timeout_ms)
{
	char path[VMDIR_PATH_BYTES];
	int r = pager_path(dir, source, ".sock", path);

	return r ? r : vmdir_connect(path, SOCK_SEQPACKET, timeout_ms);
}

int pager_send(int fd, const void *packet, size_t bytes, const int *fds, unsigned count)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(MAX_FDS * sizeof(int))];
	} rights = { .header = { CMSG_LEN(count * sizeof(int)), SOL_SOCKET, SCM_RIGHTS } };
	struct iovec iov = { (void *)packet, bytes };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t n;

	if (count > MAX_FDS)
		return -EINVAL;
	if (count) {
		memcpy(CMSG_DATA(&rights.header), fds, count * sizeof(int));
		message.msg_control = &rights;
		message.msg_controllen = CMSG_SPACE(count * sizeof(int));
	}
	do
		n = sendmsg(fd, &message, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	return n == (ssize_t)bytes ? 0 : n < 0 ? -errno : -EPIPE;
}

static void take(struct cmsghdr *c, int *fds, unsigned room, unsigned *count, bool *too_many)
{
	size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

	if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
		return;
	for (size_t i = 0; i < n; i++) {
		int fd;

		memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
		if (*count < room) {
			fds[(*count)++] = fd;
		} else {
			close(fd);
			*too_many = true;
		}
	}
}

int pager_receive(int fd, void *packet, size_t bytes, int *fds, unsigned *count)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(MAX_FDS * sizeof(int))];
	} rights;
	struct iovec iov = { packet, bytes };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &rights,
				  .msg_controllen = sizeof rights };
	unsigned room = *count;
	bool too_many = false;
	ssize_t n;

	do
		n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	*count = 0;
	if (n < 0)
		return -errno;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
		take(c, fds, room, count, &too_many);
	if (!too_many && !(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
		return (int)n;
	while (*count)
		close(fds[--*count]);
	return -EPROTO;
}
