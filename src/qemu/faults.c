/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The thread that serves faults: makes masked pages when they are touched, and lets the guest write pages that a
 * save has protected too early. It touches no guest RAM, takes no lock that a thread of QEMU may have while it waits
 * for a page, and is never stopped with the others (os_never_freeze). See "Masked pages" in ARCHITECTURE.md.
 */
#include "qemu/agent.h"

#include "os/os.h"
#include "os/probe.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AGAIN_MS 500 /* after storage has failed */
#define FAILED_MAX 256u

static struct {
	struct agent *agent;
	int uffd;      /* of masked pages; -1: there are none */
	int wake_fd;   /* eventfd: look at what is polled again */
	bool runs; /* the thread */
	sem_t ready;
	pthread_mutex_t lock; /* protects the next; held while one of its faults is served */
	int write_uffd, peer;
	uintptr_t failed[FAILED_MAX]; /* pages whose contents storage did not give */
	size_t failures;
	int last_error; /* said once */
} faults = { .uffd = -1, .wake_fd = -1, .lock = PTHREAD_MUTEX_INITIALIZER, .write_uffd = -1, .peer = -1 };

static void note_failure(uintptr_t page, int error)
{
	if (error != faults.last_error && error != -EINPROGRESS)
		agent_say("a page that the guest waits for cannot be had (%s); it is tried again until it can", strerror(-error));
	faults.last_error = error;
	if (faults.failures < FAILED_MAX)
		faults.failed[faults.failures++] = page;
	else
		os_uffd_wake(faults.uffd, (void *)page, OS_PAGE_BYTES); /* it will be waited for again at once */
}

static void make(uintptr_t page)
{
	int r = ram_make(faults.agent->ram, (void *)page);

	if (r == -EINPROGRESS)
		incoming_want(faults.agent, page);
	if (r)
		note_failure(page, r);
}

static void try_again(void)
{
	uintptr_t again[FAILED_MAX];
	size_t count = faults.failures;

	memcpy(again, faults.failed, count * sizeof again[0]);
	faults.failures = 0;
	for (size_t i = 0; i < count; i++)
		make(again[i]);
	if (!faults.failures)
		faults.last_error = 0;
}

/* One fault; false: there is none. */
static bool serve_write(void)
{
	uintptr_t page;
	bool more;

	pthread_mutex_lock(&faults.lock);
	more = faults.write_uffd >= 0 && os_uffd_next_fault(faults.write_uffd, &page) == 1;
	if (more)
		saver_written(faults.agent, page);
	pthread_mutex_unlock(&faults.lock);
	return more;
}

static void serve_peer(void)
{
	struct pollfd p = { .events = POLLRDHUP };

	pthread_mutex_lock(&faults.lock);
	p.fd = faults.peer; /* which may be another one by now */
	if (poll(&p, 1, 0) == 1) {
		saver_peer_gone();
		faults.peer = -1;
	}
	pthread_mutex_unlock(&faults.lock);
}

static void forget_wake(void)
{
	uint64_t count;

	(void)!read(faults.wake_fd, &count, sizeof count);
}

enum { POLL_PAGES, POLL_WRITES, POLL_PEER, POLL_WAKE, POLLS };

static void *serve(void *arg)
{
	uintptr_t page;

	(void)arg;
	faults.runs = true;
	os_never_freeze((pid_t)syscall(SYS_gettid));
	sem_post(&faults.ready);
	for (;;) {
		struct pollfd p[POLLS] = {
			[POLL_PAGES] = { .fd = faults.uffd, .events = POLLIN },
			[POLL_WRITES] = { .fd = faults.write_uffd, .events = POLLIN },
			[POLL_PEER] = { .fd = faults.peer, .events = POLLRDHUP },
			[POLL_WAKE] = { .fd = faults.wake_fd, .events = POLLIN },
		};

		(void)poll(p, POLLS, faults.failures ? AGAIN_MS : -1);
		if (p[POLL_WAKE].revents)
			forget_wake();
		if (p[POLL_PEER].revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL))
			serve_peer();
		while (faults.uffd >= 0 && os_uffd_next_fault(faults.uffd, &page) == 1)
			make(page);
		while (serve_write())
			;
		if (faults.failures && !(p[POLL_PAGES].revents & POLLIN))
			try_again();
	}
	return NULL;
}

static void wake(void)
{
	uint64_t one = 1;

	(void)!write(faults.wake_fd, &one, sizeof one);
}

static int start_thread(struct agent *a)
{
	int r;

	if (faults.runs)
		return 0;
	faults.agent = a;
	faults.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (faults.wake_fd < 0)
		return -errno;
	sem_init(&faults.ready, 0, 0);
	r = agent_start_thread("latent-faults", serve, NULL, false);
	if (r) {
		close(faults.wake_fd);
		return r;
	}
	while (sem_wait(&faults.ready) && errno == EINTR)
		;
	return 0;
}

int faults_make_pages(struct agent *a)
{
	int uffd, r;

	if (!os_memfd_is_fine_grained())
		return -EOPNOTSUPP;
	if (faults.uffd >= 0)
		return 0;
	uffd = os_uffd_open(OS_UFFD_MISSING_SHMEM);
	if (uffd < 0)
		return uffd;
	r = start_thread(a);
	if (r) {
		close(uffd);
		return r;
	}
	faults.uffd = uffd;
	wake();
	ram_lock(a->ram);
	ram_watch(a->ram, uffd);
	ram_unlock(a->ram);
	return 0;
}

int faults_serve_writes(struct agent *a, int uffd)
{
	int r = uffd >= 0 ? start_thread(a) : 0;

	if (r)
		return r;
	pthread_mutex_lock(&faults.lock);
	faults.write_uffd = uffd;
	pthread_mutex_unlock(&faults.lock);
	if (faults.runs)
		wake();
	return 0;
}

void faults_watch_peer(int socket)
{
	pthread_mutex_lock(&faults.lock);
	faults.peer = socket;
	pthread_mutex_unlock(&faults.lock);
	if (faults.runs)
		wake();
}
