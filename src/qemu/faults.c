/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The thread that makes masked pages when they are touched. It faults for nobody, takes no lock that a thread of
 * QEMU may have while it waits for a page, and is never stopped with the others (os_freeze). See "Masked pages" in
 * ARCHITECTURE.md.
 */
#include "qemu/agent.h"

#include "os/os.h"
#include "os/probe.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AGAIN_MS 500 /* after storage has failed */
#define FAILED_MAX 256u

static struct {
	struct agent *agent;
	int uffd;
	pid_t tid;
	sem_t ready;
	uintptr_t failed[FAILED_MAX]; /* pages whose contents storage did not give */
	size_t failures;
	int last_error; /* said once */
} faults;

static void note_failure(uintptr_t page, int error)
{
	if (error != faults.last_error)
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

static void *serve(void *arg)
{
	struct pollfd p = { .fd = faults.uffd, .events = POLLIN };
	uintptr_t page;

	(void)arg;
	faults.tid = (pid_t)syscall(SYS_gettid);
	sem_post(&faults.ready);
	for (;;) {
		(void)poll(&p, 1, faults.failures ? AGAIN_MS : -1);
		while (os_uffd_next_fault(faults.uffd, &page) == 1)
			make(page);
		if (faults.failures && !(p.revents & POLLIN))
			try_again();
	}
	return NULL;
}

static int start_thread(void)
{
	sigset_t all, old;
	pthread_t thread;
	int r;

	sem_init(&faults.ready, 0, 0);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	r = -pthread_create(&thread, NULL, serve, NULL);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (r)
		return r;
	pthread_setname_np(thread, "latent-faults");
	pthread_detach(thread);
	while (sem_wait(&faults.ready) && errno == EINTR)
		;
	return 0;
}

int faults_start(struct agent *a)
{
	int r;

	if (faults.tid)
		return 0;
	faults.agent = a;
	r = faults.uffd = os_uffd_open(OS_UFFD_MISSING_SHMEM);
	if (r < 0)
		return r;
	r = start_thread();
	if (r) {
		close(faults.uffd);
		return r;
	}
	ram_lock(a->ram);
	ram_watch(a->ram, faults.uffd);
	ram_unlock(a->ram);
	return 0;
}

pid_t faults_tid(void)
{
	return faults.tid;
}
