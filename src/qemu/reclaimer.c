/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The thread that gives the memory of cold pages back to the host (activity/cold.h). There is none until somebody
 * asks for it; then it stays, and sleeps between the walks. It touches no guest RAM by its address, and is never
 * stopped with the others. See "Reclaim" in ARCHITECTURE.md.
 */
#include "qemu/agent.h"

#include "activity/cold.h"
#include "os/os.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct {
	struct agent *agent;
	pthread_mutex_t lock; /* protects the next; before the range lock */
	pthread_cond_t woken;
	uint64_t unused_us; /* of the walk to come; 0: none */
	bool runs;          /* the thread */
	bool left;          /* for good */
	bool yielded;       /* while guest RAM is saved */
} reclaimer = { .lock = PTHREAD_MUTEX_INITIALIZER, .woken = PTHREAD_COND_INITIALIZER };

static void publish(struct agent *a)
{
	struct reclaim_stats *to = &a->stats->reclaim;
	struct ram_reclaim_counts c;

	ram_get_reclaim_counts(a->ram, &c);
	stat_set(&to->zeros, c.zeros);
	stat_set(&to->words, c.words);
	stat_set(&to->spilled, c.spilled);
	stat_set(&to->returned, c.returned);
	stat_set(&to->spilled_now, c.spilled_now);
	stat_set(&to->spill_bytes_now, c.spill_bytes_now);
	stat_set(&to->left_touched, c.left_touched);
	stat_set(&to->left_reads, c.left_reads);
	stat_set(&to->left_unpacked, c.left_unpacked);
	stat_set(&to->left_failed, c.left_failed);
}

/* Ends when all was looked at, or when there is no use in going on. */
static int walk(struct agent *a, uint64_t unused_us)
{
	struct cold_walk w = { .unused_us = unused_us, .shortest_us = scanner_shortest_us() };
	int r = 1;

	while (r == 1 || r == -EDQUOT) { /* a unit that would take too many mappings is not the last one */
		r = cold_step(a->ram, &w);
		publish(a);
	}
	return r;
}

static uint64_t next_walk(void)
{
	uint64_t unused_us;

	pthread_mutex_lock(&reclaimer.lock);
	while (!reclaimer.unused_us)
		pthread_cond_wait(&reclaimer.woken, &reclaimer.lock);
	unused_us = reclaimer.unused_us;
	pthread_mutex_unlock(&reclaimer.lock);
	return unused_us;
}

static void end_walk(void)
{
	pthread_mutex_lock(&reclaimer.lock);
	reclaimer.unused_us = 0;
	pthread_mutex_unlock(&reclaimer.lock);
}

static void *work(void *arg)
{
	struct agent *a = arg;

	os_never_freeze((pid_t)syscall(SYS_gettid));
	for (;;) {
		uint64_t unused_us = next_walk();
		int r = walk(a, unused_us);

		if (r && r != -EBUSY) /* that was said when it came to be so */
			agent_say("not all of the memory that is cold could be given back: %s", strerror(-r));
		end_walk();
		stat_set(&a->stats->reclaim.error_now, (uint64_t)-r);
		stat_add(&a->stats->reclaim.walks, 1);
	}
	return NULL;
}

static int start_thread(struct agent *a)
{
	sigset_t all, old;
	pthread_t thread;
	int r;

	sigfillset(&all);
	sigdelset(&all, SIGBUS); /* a statistics file that was cut */
	pthread_sigmask(SIG_SETMASK, &all, &old);
	r = -pthread_create(&thread, NULL, work, a);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (r)
		return r;
	pthread_setname_np(thread, "latent-reclaim");
	pthread_detach(thread);
	return 0;
}

/* A store in memory as large as guest RAM: its slots are at most three quarters of what went there. */
static int open_store(struct agent *a)
{
	int r = os_memfd_is_fine_grained() ? faults_make_pages(a) : -EOPNOTSUPP, fd;

	if (r)
		return r;
	fd = os_memfd_create("latent-reclaimed", 0, false);
	if (fd < 0)
		return fd;
	r = ram_reclaim_open(a->ram, fd, a->ram_bytes, true);
	if (r)
		close(fd);
	return r == -EALREADY ? 0 : r;
}

/* With the lock. */
static void decide(struct agent *a)
{
	ram_reclaim_allow(a->ram, !reclaimer.left && !reclaimer.yielded);
}

static int start(struct agent *a)
{
	int r;

	if (reclaimer.runs)
		return 0;
	r = open_store(a);
	if (r)
		return r;
	reclaimer.agent = a;
	decide(a);
	r = start_thread(a);
	reclaimer.runs = !r;
	return r;
}

static const char *why_not(struct agent *a)
{
	if (a->kernel_io)
		return "the kernel does I/O to guest RAM by itself (vhost, io_uring or Linux AIO): memory cannot be given back";
	if (!a->overlays_allowed || reclaimer.left)
		return "something else needs all of guest RAM as it is: memory cannot be given back (see `latent stat`)";
	if (!scanner_shortest_us())
		return "nobody knows which pages are cold: run `latent scan` first";
	return NULL;
}

static const char *why_not_started(int r)
{
	switch (r) {
	case -EPERM:
		return "it takes a userfaultfd that serves the kernel's faults: run as root, allow /dev/userfaultfd, or "
		       "set vm.unprivileged_userfaultfd=1";
	case -EOPNOTSUPP:
		return "the kernel cannot write-protect shared memory (Linux 5.19), or gives it in huge pages only";
	default:
		return strerror(-r);
	}
}

static int begin(struct agent *a, uint64_t unused_us)
{
	int r;

	pthread_mutex_lock(&reclaimer.lock);
	r = start(a);
	if (!r && reclaimer.unused_us)
		r = -EALREADY;
	if (!r) {
		reclaimer.unused_us = unused_us;
		pthread_cond_signal(&reclaimer.woken);
	}
	pthread_mutex_unlock(&reclaimer.lock);
	return r;
}

void reclaimer_begin(struct agent *a, uint64_t unused_us, struct control_reply *p)
{
	const char *why = why_not(a);

	p->error = why ? -EBUSY : begin(a, unused_us);
	if (p->error == -EALREADY)
		snprintf(p->text, sizeof p->text, "memory is being given back already");
	else if (p->error)
		snprintf(p->text, sizeof p->text, "%s", why ? why : why_not_started(p->error));
}

void reclaimer_yield(bool yield)
{
	pthread_mutex_lock(&reclaimer.lock);
	reclaimer.yielded = yield;
	if (reclaimer.runs)
		decide(reclaimer.agent);
	pthread_mutex_unlock(&reclaimer.lock);
}

void reclaimer_leave(void)
{
	pthread_mutex_lock(&reclaimer.lock);
	reclaimer.left = true;
	if (reclaimer.runs)
		decide(reclaimer.agent);
	pthread_mutex_unlock(&reclaimer.lock);
}
