/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The thread that makes masked pages of a rig's guest RAM (core/mask.c) as they are touched. For one include per
 * executable. */
#ifndef LATENT_TESTS_MASK_SERVER_H
#define LATENT_TESTS_MASK_SERVER_H

#include "os/probe.h"
#include "ram_rig.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>

struct mask_server {
	struct ram *ram;
	int uffd, end_fd;
	pthread_t thread;
	_Atomic int error; /* the last of ram_make */
};

static void *mask_server_main(void *arg)
{
	struct mask_server *s = arg;
	struct pollfd p[] = { { .fd = s->uffd, .events = POLLIN }, { .fd = s->end_fd, .events = POLLIN } };
	uintptr_t page;

	os_never_freeze((pid_t)syscall(SYS_gettid)); /* others may wait for it */
	for (;;) {
		(void)poll(p, 2, -1);
		if (p[1].revents)
			return NULL;
		while (os_uffd_next_fault(s->uffd, &page) == 1) {
			int r = ram_make(s->ram, (void *)page);

			if (r) {
				s->error = r;
				os_uffd_wake(s->uffd, (void *)page, OS_PAGE_BYTES); /* it will be asked for again */
			}
		}
	}
}

/* A negative errno: there is no userfaultfd for the kernel's faults. */
static int mask_server_start(struct mask_server *s, struct ram *ram)
{
	*s = (struct mask_server){ .ram = ram, .uffd = os_uffd_open(OS_UFFD_MISSING_SHMEM) };
	if (s->uffd < 0)
		return s->uffd;
	s->end_fd = eventfd(0, EFD_CLOEXEC);
	ram_lock(ram);
	ram_watch(ram, s->uffd);
	ram_unlock(ram);
	if (s->end_fd < 0 || pthread_create(&s->thread, NULL, mask_server_main, s))
		abort();
	return 0;
}

static void mask_server_stop(struct mask_server *s)
{
	uint64_t one = 1;

	if (write(s->end_fd, &one, sizeof one) != sizeof one)
		abort();
	pthread_join(s->thread, NULL);
	close(s->end_fd);
}

#endif
