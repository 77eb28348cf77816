/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The agent's end of a source that cannot be mapped: see "Sources that cannot be mapped" in ARCHITECTURE.md. The
 * agent owns the userfaultfd until QEMU ends (after its last descriptor missing pages would read as zeros); a
 * pager has a duplicate, and when it is gone, another one is given it, with the cache.
 *
 * The thread takes no lock that somebody who waits for a page may hold, allocates nothing, touches no guest RAM,
 * and is never frozen: others may wait, frozen or not, for what it brings about.
 */
#include "qemu/agent.h"

#include "os/os.h"
#include "os/probe.h"
#include "vmdir/pager.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGER_MS 10000
#define POLL_MS 1000
#define AGAIN_US 20000
#define START_AGAIN_US 500000
#define SAY_US 5000000

static struct {
	struct agent *agent;
	const struct agent_pager *pager; /* of the configuration */
	int uffd;                        /* -1: there is none to be had */
	struct pager_starter starter;
	pthread_mutex_t lock; /* protects the next four; held for a send at the most */
	int connection;
	struct pager_request ram; /* what is watched */
	enum pager_op load;       /* the last that was said of loading ahead */
	bool rest;                /* the guest runs, and the rest is loaded for it */
	_Atomic uint64_t pages_all, pages_present;
	_Atomic bool reported;
} lazy = { .uffd = -1, .connection = -1, .load = PAGER_LOAD_ACTIVE, .lock = PTHREAD_MUTEX_INITIALIZER };

/* ---- reports ---------------------------------------------------------------------------------- */

/* [lock] */
static void note_rest(void)
{
	bool loaded = lazy.reported && lazy.pages_present == lazy.pages_all;

	if (lazy.rest)
		resume_note_rest(lazy.agent, loaded ? REST_LOADED : REST_LOADING, lazy.pages_all, lazy.pages_present);
}

static void take_report(const struct pager_report *report)
{
	struct vm_stats *s = lazy.agent->stats;

	lazy.pages_all = report->pages_all;
	lazy.pages_present = report->pages_present;
	lazy.reported = true;
	pthread_mutex_lock(&lazy.lock);
	note_rest();
	pthread_mutex_unlock(&lazy.lock);
	stat_set(&s->source_pages_all, report->pages_all);
	stat_set(&s->source_pages_now, report->pages_present);
	stat_set(&s->source_bytes, report->bytes_fetched);
	stat_set(&s->source_faults, report->faults);
	stat_set(&s->source_wrong, report->wrong);
	stat_set(&s->source_waiting_now, report->waiting);
	stat_set(&s->source_silent_ms_now, report->silent_ms);
	if (strncmp(s->source_trouble, report->text, sizeof s->source_trouble)) {
		snprintf(s->source_trouble, sizeof s->source_trouble, "%s", report->text);
		if (report->text[0])
			agent_say("%s", report->text);
	}
}

/* The next packet; the pager is the user's own, and yet what it says is checked. */
static int receive(int fd, struct pager_report *report)
{
	unsigned none = 0;
	int n = pager_receive(fd, report, sizeof *report, NULL, &none);

	if (n < 0)
		return n;
	if (n != (int)sizeof *report || report->magic != PAGER_MAGIC || report->version != PAGER_VERSION)
		return n ? -EPROTO : -ECONNRESET;
	report->text[sizeof report->text - 1] = '\0';
	return 0;
}

/* ---- requests --------------------------------------------------------------------------------- */

static int ask(int fd, enum pager_op op, const struct pager_request *ram, const int *fds, unsigned count)
{
	struct pager_request q = *ram;

	q.magic = PAGER_MAGIC;
	q.version = PAGER_VERSION;
	q.op = (uint32_t)op;
	snprintf(q.source, sizeof q.source, "%s", lazy.pager->source);
	return pager_send(fd, &q, sizeof q, fds, count);
}

static int await(int fd, enum pager_op op)
{
	struct pager_report report = { 0 };
	int r;

	do
		r = receive(fd, &report);
	while (!r && report.op != (uint32_t)op);
	if (!r && report.error) {
		agent_say("the pager refuses: %s", report.text);
		r = -EREMOTEIO;
	}
	return r;
}

/* All that the last pager knew. The answers are waited for, with no lock: `ram` is a copy. */
static int introduce(int fd, const struct pager_request *ram)
{
	const struct agent_restore *restore = &lazy.agent->config.restore;
	const int fds[PAGER_FDS_ADOPT] = { restore->ram_fd, restore->pages_fd, lazy.pager->index_fd };
	int r = ask(fd, PAGER_ADOPT, ram, fds, PAGER_FDS_ADOPT);

	if (!r)
		r = await(fd, PAGER_ADOPT);
	if (!r && ram->blocks)
		r = ask(fd, PAGER_WATCH, ram, &lazy.uffd, 1);
	if (!r && ram->blocks)
		r = await(fd, PAGER_WATCH);
	return r;
}

/* [lock] Faults that the last pager had read are raised again. */
static void wake_all(void)
{
	for (uint32_t i = 0; i < lazy.ram.blocks; i++)
		os_uffd_wake(lazy.uffd, (void *)(uintptr_t)lazy.ram.block[i].hva, os_bytes(lazy.ram.block[i].pages));
}

/* Others speak to it from now on; before that, what they would have said meanwhile. */
static int connected(int fd, uint32_t known_blocks)
{
	int r = 0;

	pthread_mutex_lock(&lazy.lock);
	if (lazy.ram.blocks != known_blocks)
		r = ask(fd, PAGER_WATCH, &lazy.ram, &lazy.uffd, 1);
	if (!r)
		r = ask(fd, lazy.load, &lazy.ram, NULL, 0);
	if (!r) {
		lazy.connection = fd;
		wake_all();
	}
	pthread_mutex_unlock(&lazy.lock);
	return r;
}

static int try_successor(uint64_t *next_start_us)
{
	int fd = pager_connect(lazy.pager->dir, lazy.pager->source, PAGER_MS), r = fd < 0 ? fd : 0;
	struct pager_request ram;

	if (fd < 0 && os_now_us() >= *next_start_us) {
		*next_start_us = os_now_us() + START_AGAIN_US;
		r = pager_start(&lazy.starter, lazy.pager->program, lazy.pager->dir, lazy.pager->source);
		return r ? r : -EAGAIN;
	}
	if (r)
		return -EAGAIN;
	pthread_mutex_lock(&lazy.lock);
	ram = lazy.ram;
	pthread_mutex_unlock(&lazy.lock);
	r = introduce(fd, &ram);
	if (!r)
		r = connected(fd, ram.blocks);
	if (r)
		close(fd);
	return r;
}

/* The guest's faults wait meanwhile, and nothing is lost. */
static void find_successor(void)
{
	uint64_t next_start_us = 0, next_say_us = 0;
	int r;

	pthread_mutex_lock(&lazy.lock);
	close(lazy.connection);
	lazy.connection = -1;
	pthread_mutex_unlock(&lazy.lock);
	stat_add(&lazy.agent->stats->source_pagers_lost, 1);
	while ((r = try_successor(&next_start_us))) {
		if (r != -EAGAIN && os_now_us() >= next_say_us) {
			agent_say("the pager is gone, and there is no other one yet: %s", strerror(-r));
			next_say_us = os_now_us() + SAY_US;
		}
		usleep(r == -EAGAIN ? AGAIN_US : START_AGAIN_US);
	}
	agent_say("the pager was gone; another one goes on");
}

static void *lazy_main(void *arg)
{
	struct pager_report report = { 0 };

	(void)arg;
	os_never_freeze((pid_t)syscall(SYS_gettid));
	for (;;) {
		struct pollfd p = { .fd = lazy.connection, .events = POLLIN };
		int r = poll(&p, 1, POLL_MS) > 0 ? receive(lazy.connection, &report) : -EAGAIN;

		if (!r && report.error) {
			agent_say("the pager refuses: %s", report.text);
			r = -EREMOTEIO;
		}
		if (!r)
			take_report(&report);
		else if (r != -EAGAIN && r != -EINTR)
			find_successor();
	}
	return NULL;
}

/* ---- what the restorer needs ------------------------------------------------------------------- */

int lazy_begin(struct agent *a)
{
	const struct agent_restore *restore = &a->config.restore;
	const int fds[] = { restore->ram_fd, restore->pages_fd, restore->pager.fd, restore->pager.index_fd };
	int r;

	if (lazy.agent)
		return 0;
	for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
		(void)fcntl(fds[i], F_SETFD, FD_CLOEXEC);
	lazy.pager = &restore->pager;
	lazy.connection = restore->pager.fd;
	lazy.uffd = os_memfd_is_fine_grained() ? os_uffd_open(OS_UFFD_MISSING_SHMEM) : -EOPNOTSUPP;
	snprintf(a->stats->source, sizeof a->stats->source, "%.255s", restore->pager.source);
	r = pager_starter_init(&lazy.starter);
	lazy.agent = a;
	return r ? r : agent_start_thread("latent-lazy", lazy_main, NULL, false);
}

bool lazy_may_map(void)
{
	return lazy.uffd >= 0;
}

int lazy_mapped(void *hva, size_t bytes)
{
	return os_uffd_register_missing(lazy.uffd, hva, bytes);
}

int lazy_watch(const struct ram_block *b, uint64_t first_page)
{
	int r;

	if (lazy.uffd < 0)
		return 0;
	pthread_mutex_lock(&lazy.lock);
	if (lazy.ram.blocks == PAGER_BLOCKS) {
		pthread_mutex_unlock(&lazy.lock);
		return -ENOSPC;
	}
	lazy.ram.block[lazy.ram.blocks++] = (struct pager_block){ (uintptr_t)b->hva, b->pages, first_page };
	/* A connection that is just being lost is found so by the thread, which says it all again. */
	r = lazy.connection < 0 ? 0 : ask(lazy.connection, PAGER_WATCH, &lazy.ram, &lazy.uffd, 1);
	pthread_mutex_unlock(&lazy.lock);
	return r == -EPIPE || r == -ECONNRESET ? 0 : r;
}

/* [lock] A connection that is just being lost is found so by the thread, which says it all again. */
static void load(enum pager_op what)
{
	lazy.load = what;
	if (lazy.connection >= 0)
		(void)ask(lazy.connection, what, &lazy.ram, NULL, 0);
}

void lazy_load_rest(void)
{
	pthread_mutex_lock(&lazy.lock);
	if (lazy.load == PAGER_LOAD_ACTIVE)
		load(PAGER_LOAD_REST);
	lazy.rest = true;
	note_rest();
	pthread_mutex_unlock(&lazy.lock);
}

void lazy_stop_rest(void)
{
	pthread_mutex_lock(&lazy.lock);
	load(PAGER_LOAD_ACTIVE);
	lazy.rest = false;
	pthread_mutex_unlock(&lazy.lock);
}

void lazy_want_all(bool wanted)
{
	enum pager_op what;

	pthread_mutex_lock(&lazy.lock);
	what = wanted ? PAGER_LOAD : lazy.rest ? PAGER_LOAD_REST : PAGER_LOAD_ACTIVE;
	if (lazy.load != what)
		load(what);
	pthread_mutex_unlock(&lazy.lock);
}

void lazy_count(uint64_t *ret_present, uint64_t *ret_all)
{
	*ret_present = lazy.reported ? lazy.pages_present : 0;
	*ret_all = lazy.reported ? lazy.pages_all : 0;
}

void lazy_load_all(void)
{
	uint64_t next_say_us = os_now_us() + SAY_US;

	if (lazy.load != PAGER_LOAD)
		agent_say("all of the snapshot's RAM is loaded before the guest runs: %s", lazy.uffd == -EPERM
			  ? "there is no userfaultfd for it (run as root, allow /dev/userfaultfd, or set "
			    "vm.unprivileged_userfaultfd=1)" : "it cannot be mapped while it is loaded");
	pthread_mutex_lock(&lazy.lock);
	load(PAGER_LOAD);
	pthread_mutex_unlock(&lazy.lock);
	while (!lazy.reported || lazy.pages_present < lazy.pages_all) {
		usleep(AGAIN_US);
		if (os_now_us() < next_say_us)
			continue;
		next_say_us = os_now_us() + SAY_US;
		agent_say("all of the snapshot's RAM is loaded first: %llu of %llu MiB are there",
			  (unsigned long long)lazy.pages_present >> 8, (unsigned long long)lazy.pages_all >> 8);
	}
}
