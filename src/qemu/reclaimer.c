/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The thread that gives the memory of cold pages back to the host (activity/cold.h). There is none until
 * somebody asks for it; then it stays, and sleeps between the walks. It touches no guest RAM by its
 * address, and is never stopped with the others. See "Reclaim" in ARCHITECTURE.md.
 */
#include "qemu/agent.h"

#include "activity/cold.h"
#include "os/os.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct {
	struct agent *agent;
	pthread_mutex_t lock; /* protects the next; before the range lock */
	pthread_cond_t woken;
	struct reclaim_order order; /* of the walk to come or under way; unused_us is 0: none */
	unsigned files[VM_STATS_VOLUMES]; /* that no other VM reads, as page entries name them */
	size_t file_count;
	bool runs;                  /* the thread */
	bool left;                  /* for good */
	bool yielded;               /* while guest RAM is saved */
	_Atomic bool ended;         /* the walk shall end */
} reclaimer = { .lock = PTHREAD_MUTEX_INITIALIZER, .woken = PTHREAD_COND_INITIALIZER };

/* What the VM takes of the host's memory: its own RAM file, its copies of image pages, and the store in memory. */
static uint64_t memory_bytes(struct agent *a, uint64_t store_bytes)
{
	struct ram_counts c;
	struct stat st;

	ram_get_counts(a->ram, &c);
	return (fstat(a->config.ram_fd, &st) ? 0 : (uint64_t)st.st_blocks * 512) +
	       os_bytes(c.private_pages) + store_bytes;
}

uint64_t reclaimer_publish(struct agent *a)
{
	struct reclaim_stats *to = &a->stats->reclaim;
	struct ram_reclaim_counts c;
	uint64_t bytes;

	ram_get_reclaim_counts(a->ram, &c);
	bytes = memory_bytes(a, c.spill_bytes_now);
	stat_set(&to->memory_bytes_now, bytes);
	stat_set(&to->zeros, c.zeros);
	stat_set(&to->words, c.words);
	stat_set(&to->spilled, c.spilled);
	stat_set(&to->clean, c.clean);
	stat_set(&to->returned, c.returned);
	stat_set(&to->spilled_now, c.spilled_now);
	stat_set(&to->spill_bytes_now, c.spill_bytes_now);
	stat_set(&to->spill_file_bytes_now, c.spill_file_bytes_now);
	stat_set(&to->spill_file_most_bytes_now, c.spill_file_most_bytes);
	stat_set(&to->left_touched, c.left_touched);
	stat_set(&to->left_reads, c.left_reads);
	stat_set(&to->left_unpacked, c.left_unpacked);
	stat_set(&to->left_failed, c.left_failed);
	return bytes;
}

/* Ends when all was looked at, when it is enough (1), or when there is no use in going on: a unit that would
 * take too many mappings is not the last one. */
static int walk_ram(struct agent *a, const struct reclaim_order *order, struct cold_walk *w)
{
	int r = 1;

	while (r == 1 || r == -EDQUOT) {
		if (reclaimer.ended)
			return -ECANCELED;
		if (reclaimer_publish(a) <= order->until_bytes)
			return 1;
		r = cold_step(a->ram, w);
		stat_set(&a->stats->reclaim.looked_now, w->looked);
	}
	return r;
}

static int walk(struct agent *a, const struct reclaim_order *order)
{
	struct cold_walk w = { .unused_us = order->unused_us, .shortest_us = scanner_shortest_us() };
	int r = walk_ram(a, order, &w);

	for (size_t i = 0; (!r || r == -ENOENT) && i < reclaimer.file_count; i++)
		r = cold_drop_file(a->ram, reclaimer.files[i], &w);
	reclaimer_publish(a);
	return r == 1 || r == -ENOENT ? 0 : r; /* ENOENT: the file was given up meanwhile */
}

static struct reclaim_order next_walk(void)
{
	struct reclaim_order order;

	pthread_mutex_lock(&reclaimer.lock);
	while (!reclaimer.order.unused_us)
		pthread_cond_wait(&reclaimer.woken, &reclaimer.lock);
	order = reclaimer.order;
	pthread_mutex_unlock(&reclaimer.lock);
	return order;
}

/* Who sees in the statistics that it has ended can order the next one. */
static void end_walk(struct agent *a, int r)
{
	pthread_mutex_lock(&reclaimer.lock);
	reclaimer.order.unused_us = 0;
	stat_set(&a->stats->reclaim.error_now, (uint64_t)-r);
	stat_add(&a->stats->reclaim.walks, 1);
	pthread_mutex_unlock(&reclaimer.lock);
}

static void *work(void *arg)
{
	struct agent *a = arg;

	os_never_freeze((pid_t)syscall(SYS_gettid));
	for (;;) {
		struct reclaim_order order = next_walk();
		int r = walk(a, &order);

		/* The first was said when it came to be so, the second is wanted. */
		if (r && r != -EBUSY && r != -ECANCELED)
			agent_say("not all of the memory that is cold could be given back: %s",
				  r == -ENOSPC ? "the store is full" : strerror(-r));
		end_walk(a, r);
	}
	return NULL;
}

/* A store in memory as large as guest RAM: its slots are at most three quarters of what went there. */
static int open_store(struct agent *a)
{
	int r = faults_make_pages(a), fd;

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
static void decide(struct agent *a) { ram_reclaim_allow(a->ram, !reclaimer.left && !reclaimer.yielded); }

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
	r = agent_start_thread("latent-reclaim", work, a, true);
	reclaimer.runs = !r;
	return r;
}

static const char *why_not(struct agent *a)
{
	if (!incoming_is_complete(a))
		return "the VM is still coming from another host: memory cannot be given back before all of it is here";
	if (a->kernel_io)
		return "the kernel does I/O to guest RAM by itself (vhost, io_uring or Linux AIO): "
		       "memory cannot be given back";
	if (!a->overlays_allowed || reclaimer.left)
		return "something else needs all of guest RAM as it is: memory cannot be given back "
		       "(see `latent stat`)";
	if (!scanner_shortest_us())
		return "nobody knows which pages are cold: run `latent scan` first";
	return agent_explain_large();
}

static const char *why_not_started(int r)
{
	switch (r) {
	case -EPERM:
		return "it takes a userfaultfd that serves the kernel's faults: run as root, allow "
		       "/dev/userfaultfd, or "
		       "set vm.unprivileged_userfaultfd=1";
	case -EOPNOTSUPP:
		return "the kernel cannot write-protect shared memory (Linux 5.19)";
	default:
		return strerror(-r);
	}
}

/* What of an image the guest has read and dropped itself only its VM would miss, if that is the only one. */
static void list_files(struct agent *a)
{
	struct volume *v;

	reclaimer.file_count = 0;
	for (uint32_t i = 0; (v = volumes_nth(a->volumes, i)); i++)
		if (volume_is_mapped(v) && !volume_is_cache(v) && volume_is_read_alone(v))
			reclaimer.files[reclaimer.file_count++] = volume_index(v);
}

static int begin(struct agent *a, const struct reclaim_order *order)
{
	int r;

	pthread_mutex_lock(&reclaimer.lock);
	r = start(a);
	if (!r && reclaimer.order.unused_us)
		r = -EALREADY;
	if (!r) {
		reclaimer.order = *order;
		list_files(a);
		reclaimer.ended = false;
		stat_set(&a->stats->reclaim.looked_now, 0);
		pthread_cond_signal(&reclaimer.woken);
	}
	pthread_mutex_unlock(&reclaimer.lock);
	return r;
}

void reclaimer_begin(struct agent *a, const struct reclaim_order *order, struct control_reply *p)
{
	const char *why = why_not(a);

	p->error = why ? -EBUSY : begin(a, order);
	if (p->error == -EALREADY)
		snprintf(p->text, sizeof p->text, "memory is being given back already");
	else if (p->error)
		snprintf(p->text, sizeof p->text, "%s", why ? why : why_not_started(p->error));
}

static int give_file(struct agent *a, int fd, uint64_t most_bytes)
{
	struct stat st;
	int r;

	if (fstat(fd, &st) || !S_ISREG(st.st_mode))
		return -EINVAL;
	pthread_mutex_lock(&reclaimer.lock);
	r = start(a);
	if (!r)
		r = ram_reclaim_open(a->ram, fd, most_bytes, false);
	pthread_mutex_unlock(&reclaimer.lock);
	return r;
}

void reclaimer_store(struct agent *a, int fd, uint64_t most_bytes, struct control_reply *p)
{
	const char *why = why_not(a);

	p->error = why ? -EBUSY : give_file(a, fd, most_bytes);
	if (p->error == -EALREADY)
		snprintf(p->text, sizeof p->text,
			 "there is a store in a file already, which is used until the VM ends");
	else if (p->error)
		snprintf(p->text, sizeof p->text, "%s", why ? why : why_not_started(p->error));
}

void reclaimer_end(void) { reclaimer.ended = true; }

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
