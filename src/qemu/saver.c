/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The agent's part of a save: the point in time of guest RAM, and faults that another process serves. See
 * "Save" in ARCHITECTURE.md. All of it runs in the service thread.
 */
#include "qemu/agent.h"

#include "activity/seen.h"
#include "os/os.h"
#include "os/probe.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define UFFD_FEATURES (OS_UFFD_PAGEFAULT_FLAG_WP | OS_UFFD_WP_HUGETLBFS_SHMEM)
#define FREEZE_MS 2000
#define LOCK_MS 500
#define RETURN_PAGES 512u /* at once: 0.1 s if each waits for a disk; others may wait for this thread */
#define COPY_FEATURES (OS_UFFD_PAGEFAULT_FLAG_WP | OS_UFFD_WP_ASYNC)
#define COPY_PAGES 4096u /* looked at with the guest standing, copied under the range lock: milliseconds */
#define KEEP_US 8000000u
#define COPY_FREEZE_MS 5 /* a thread that does not stop sooner is waited for in the pause */
#define ARM_PAGES 16384u /* under the range lock at once: 64 MiB */
#define SETTLE_PAGES 1024u /* looked at with the guest standing: 2 ms at the most */
#define SETTLE_PAUSE_US 1000
#define SETTLE_REQUEST_US 100000

/* KEPT: it is a private copy, protected, and among the copies. RENEW: protected, and to be copied again. */
enum kept { NOT_KEPT, KEPT, RENEW };

static struct {
	int client; /* -1: nobody saves */
	int loader; /* for whom a pager loads all; -1: nobody */
	int returner;      /* for whom what was given back is brought back; -1: nobody */
	uint64_t returned; /* for him, so far */
	int uffd, runs_fd, copies_fd;
	uint64_t total_pages;
	struct control_run *runs;
	uint8_t *copies;
	uint64_t private_runs, copied_pages;
	pthread_mutex_t arm_lock; /* protects the next; behind the range lock */
	uint8_t *armed[RAM_BLOCKS]; /* of each page: it is write-protected */
	uint8_t *kept[RAM_BLOCKS];  /* of each page, enum kept */
	int copies_uffd;            /* protects those, by itself (WP_ASYNC); -1: nothing does */
	int changed_fd;
	uint8_t *changed;           /* of each page of all blocks: protected since the other side has looked */
	uint64_t first[RAM_BLOCKS]; /* of each block in that */
	uint64_t settled_to;        /* pages of all blocks that have been looked at */
	bool moves;                 /* it is a migration: what the guest uses afterwards is not seen here */
	bool taken;                 /* the point in time is over: the other side serves faults */
	_Atomic bool stays;         /* and the guest goes on here, with its disks */
	struct seen *seen;
	enum { WATCH_OFF, WATCH_SOON, WATCH_ON } watch; /* soon: when the guest runs again */
} saver = { .arm_lock = PTHREAD_MUTEX_INITIALIZER, .client = -1, .loader = -1, .returner = -1, .uffd = -1, .runs_fd = -1,
	    .copies_fd = -1, .changed_fd = -1, .copies_uffd = -1 };

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static size_t runs_bytes(void)
{
	return os_bytes((saver.total_pages * sizeof *saver.runs + OS_PAGE_BYTES - 1) >> OS_PAGE_SHIFT);
}

/* ---- begin ------------------------------------------------------------------------------------ */

static int register_run(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	(void)ctx;
	return os_uffd_register_wp(saver.uffd, b->hva + os_bytes(page), os_bytes(pages));
}

/* Both are as long as the worst case needs, and empty. */
static int make_tables(void)
{
	saver.runs_fd = os_memfd_create("latent-save-runs", runs_bytes(), false);
	saver.copies_fd = os_memfd_create("latent-save-copies", os_bytes(saver.total_pages), false);
	if (saver.runs_fd < 0 || saver.copies_fd < 0)
		return -ENOMEM;
	saver.runs = os_view_file(saver.runs_fd, runs_bytes(), true);
	saver.copies = os_view_file(saver.copies_fd, os_bytes(saver.total_pages), true);
	return saver.runs && saver.copies ? 0 : -ENOMEM;
}

static size_t changed_bytes(void)
{
	return os_bytes((saver.total_pages + OS_PAGE_BYTES - 1) >> OS_PAGE_SHIFT);
}

static int make_armed(struct agent *a)
{
	uint64_t first = 0;

	saver.settled_to = 0;
	saver.changed_fd = os_memfd_create("latent-save-changed", changed_bytes(), false);
	saver.changed = saver.changed_fd < 0 ? NULL : os_view_file(saver.changed_fd, changed_bytes(), true);
	for (unsigned i = 0; i < RAM_BLOCKS; i++) {
		const struct ram_block *b = ram_block_at(a->ram, i);

		saver.armed[i] = b ? calloc(b->pages, 1) : NULL;
		saver.kept[i] = b ? calloc(b->pages, 1) : NULL;
		if (b && (!saver.armed[i] || !saver.kept[i]))
			return -ENOMEM;
		saver.first[i] = first;
		first += b ? b->pages : 0;
	}
	return saver.changed ? 0 : -ENOMEM;
}

static int count_private(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	(void)b;
	(void)page;
	*(uint64_t *)ctx += pages;
	return 0;
}

/* The kernel would kill the VM for a cgroup's limit. */
static int check_memory(uint64_t private, struct control_reply *p)
{
	uint64_t bytes = os_bytes(private + CONTROL_SAVE_EARLY_PAGES) + runs_bytes() +
			 saver.total_pages * (3 + sizeof(uint16_t));
	uint64_t room = os_memory_room("/proc/self/cgroup", "/sys/fs/cgroup");

	if (bytes <= room)
		return 0;
	snprintf(p->text, sizeof p->text, "the VM's cgroup has %llu MiB of memory left, and a save may take %llu MiB there "
		 "(copies of %llu pages over mapped images, and more): raise its memory limit",
		 (unsigned long long)room >> 20, (unsigned long long)bytes >> 20, (unsigned long long)private);
	return -ENOMEM;
}

static int begin(struct agent *a, struct control_reply *p)
{
	struct ram_counts c;
	uint64_t private = 0;
	int r;

	if (a->ram_given) {
		snprintf(p->text, sizeof p->text, "another process maps guest RAM (vhost-user), and what it writes "
			 "while the VM is saved or moved would be missed: take that device away, and start the VM again");
		return -EBUSY;
	}
	scanner_yield(true);
	reclaimer_yield(true);
	learner_yield(a);
	r = ram_unmask(a->ram); /* two cannot watch one mapping */
	if (r)
		return r;
	ram_get_counts(a->ram, &c);
	saver.total_pages = c.pages;
	r = saver.uffd = os_uffd_open(UFFD_FEATURES);
	if (r >= 0)
		r = make_tables();
	if (!r)
		r = make_armed(a);
	if (!r)
		r = seen_create(a->ram, &saver.seen);
	if (r < 0)
		return r;
	if (scanner_shortest_us())
		seen_add_states(saver.seen);
	ram_lock(a->ram);
	ram_hold(a->ram, true);
	r = ram_for_base(a->ram, register_run, NULL);
	if (!r)
		r = ram_for_private(a->ram, count_private, &private);
	ram_unlock(a->ram);
	return r ? r : check_memory(private, p);
}

/* ---- the point in time ------------------------------------------------------------------------- */

static int block_index(struct agent *a, const struct ram_block *b)
{
	for (unsigned i = 0; i < RAM_BLOCKS; i++)
		if (ram_block_at(a->ram, i) == b)
			return (int)i;
	return -1;
}

static void note_run(struct agent *a, struct ram_block *b, uint64_t page, uint64_t pages)
{
	saver.runs[saver.private_runs] =
		(struct control_run){ (uint64_t)block_index(a, b), page, pages };
}

static int protect(struct ram_block *b, uint64_t page, uint64_t pages)
{
	uint8_t *hva = b->hva + os_bytes(page);
	int r = os_uffd_protect(saver.uffd, hva, os_bytes(pages), true);

	if (r == -ENOENT || r == -EINVAL) { /* it has become base since the save began */
		r = os_uffd_register_wp(saver.uffd, hva, os_bytes(pages));
		if (!r)
			r = os_uffd_protect(saver.uffd, hva, os_bytes(pages), true);
	}
	return r;
}

/* What of the run is not protected. */
static int arm_run(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	int index = block_index(ctx, b);
	uint8_t *armed = saver.armed[index], *changed = saver.changed + saver.first[index];
	uint64_t end = page + pages;
	int r = 0;

	while (!r && page < end) {
		const uint8_t *bare = memchr(armed + page, 0, end - page);
		uint64_t n = 0;

		page = bare ? (uint64_t)(bare - armed) : end;
		while (page + n < end && !armed[page + n])
			armed[page + n++] = 1;
		memset(changed + page, 1, n);
		r = n ? protect(b, page, n) : 0;
		page += n;
	}
	return r;
}

/* The place of a page's copy. */
static uint8_t *copy_of(unsigned index, uint64_t page)
{
	return saver.copies + os_bytes(saver.first[index] + page);
}

static int keep_run(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	memset(saver.kept[block_index(ctx, b)] + page, KEPT, pages);
	return 0;
}

/* A read of the kernel that is under way would write them unseen: the threads that wait for one are waited for. */
static bool protect_copies(struct agent *a, struct ram_block *b, uint64_t page, uint64_t pages)
{
	int r = saver.copies_uffd < 0 ? -EOPNOTSUPP : agent_freeze(COPY_FREEZE_MS);

	if (!r) {
		/* It is set before the first of them is begun; one that begins later finds the protection. */
		r = a->kernel_io ? -EBUSY : ram_protect_copies(a->ram, b, page, pages, keep_run, a);
		os_thaw();
	}
	return !r;
}

/* [range lock] False: there are none among the pages. */
static bool find_copies(struct agent *a, unsigned index, struct ram_block *b, uint64_t page,
			uint64_t pages)
{
	bool any = false;

	if (!ram_has_overlay(b, page, pages) || ram_update_private(a->ram, b, page, pages))
		return false;
	for (uint64_t i = page; i < page + pages; i++) {
		saver.kept[index][i] = ram_has_copies(b, i, 1);
		any = any || saver.kept[index][i];
	}
	return any;
}

/* Memory for those of the pages that are so, and what of them is swapped out. No lock: what may lie there meanwhile is looked
 * at later. */
static void bring_copies(unsigned index, enum kept which, uint8_t *hva, uint64_t page, uint64_t pages)
{
	const uint8_t *kept = saver.kept[index] + page;

	for (uint64_t i = 0, n; i < pages; i += n ? n : 1) {
		for (n = 0; i + n < pages && kept[i + n] == which; n++)
			;
		if (n) {
			(void)os_populate_write(copy_of(index, page + i), os_bytes(n));
			os_populate_read(hva + os_bytes(page + i), os_bytes(n));
		}
	}
}

/* [range lock] */
static void take_copies(struct agent *a, unsigned index, struct ram_block *b, uint64_t page,
			uint64_t pages)
{
	uint8_t *kept = saver.kept[index];

	memset(kept + page, 0, pages);
	if (!protect_copies(a, b, page, pages))
		memset(kept + page, 0, pages);
	for (uint64_t i = page; i < page + pages; i++)
		if (kept[i])
			memcpy(copy_of(index, i), b->hva + os_bytes(i), OS_PAGE_BYTES);
}

/* Of the block from `page` on, so many at the most. */
static uint64_t pages_left(const struct ram_block *b, uint64_t page, uint64_t most)
{
	if (!b || page >= b->pages)
		return 0;
	return b->pages - page < most ? b->pages - page : most;
}

/* The next pages of a block; how many, 0: it has no more. */
static uint64_t keep_some(struct agent *a, unsigned index, uint64_t page)
{
	struct ram_block *b;
	uint64_t pages;
	uint8_t *hva;
	bool any;

	ram_lock(a->ram);
	b = saver.kept[index] ? ram_block_at(a->ram, index) : NULL;
	pages = pages_left(b, page, COPY_PAGES);
	any = pages && find_copies(a, index, b, page, pages);
	hva = b ? b->hva : NULL;
	ram_unlock(a->ram);
	if (!any)
		return pages;
	bring_copies(index, KEPT, hva, page, pages);
	ram_lock(a->ram);
	if (ram_block_at(a->ram, index) == b)
		take_copies(a, index, b, page, pages);
	ram_unlock(a->ram);
	return pages;
}

/* Private copies, before the guest waits for it; in the pause only those that it has written meanwhile, and those for which
 * there was no time: the other side waits for the answer, and others for this thread. */
static void keep_copies(struct agent *a, uint64_t until_us)
{
	/* Kernel I/O may be writing copies at any time, and no protection sees it. */
	saver.copies_uffd = a->kernel_io ? -1 : os_uffd_open_unserved(COPY_FEATURES);
	ram_lock(a->ram);
	if (saver.copies_uffd >= 0)
		ram_watch_copies(a->ram, saver.copies_uffd);
	ram_unlock(a->ram);
	for (unsigned i = 0; i < RAM_BLOCKS; i++)
		for (uint64_t page = 0, pages; os_now_us() < until_us && (pages = keep_some(a, i, page)); page += pages)
			;
}

static int renew_run(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	memset(saver.kept[block_index(ctx, b)] + page, RENEW, pages);
	return 0;
}

/* [range lock; everybody stopped] What was written since it was kept is protected again; what is clean leaves the page
 * table, where the pause would have to take it out. */
static void renew(struct agent *a, unsigned index, struct ram_block *b, uint64_t page, uint64_t pages)
{
	if (a->kernel_io || ram_update_private(a->ram, b, page, pages)) /* which may be writing copies just now */
		return;
	if (saver.copies_uffd >= 0 && ram_protect_written(a->ram, b, page, pages, renew_run, a))
		memset(saver.kept[index] + page, NOT_KEPT, pages); /* what was written is not known */
	(void)ram_zap_clean(a->ram, b, page, pages);
}

/* [range lock] Those of the pages that are to be copied again. */
static void copy_renewed(unsigned index, const struct ram_block *b, uint64_t page, uint64_t pages)
{
	uint8_t *kept = saver.kept[index];

	for (uint64_t i = page; i < page + pages; i++) {
		if (kept[i] != RENEW)
			continue;
		memcpy(copy_of(index, i), b->hva + os_bytes(i), OS_PAGE_BYTES);
		kept[i] = KEPT;
	}
}

/* The next pages of a block, once more; how many, 0: it has no more. */
static uint64_t renew_some(struct agent *a, unsigned index, uint64_t page)
{
	struct ram_block *b;
	bool any = false;
	uint64_t pages;
	uint8_t *hva;

	ram_lock(a->ram);
	b = saver.kept[index] ? ram_block_at(a->ram, index) : NULL;
	pages = pages_left(b, page, COPY_PAGES);
	hva = b ? b->hva : NULL;
	if (pages && ram_has_overlay(b, page, pages) && !agent_freeze(COPY_FREEZE_MS)) {
		renew(a, index, b, page, pages);
		os_thaw();
		any = memchr(saver.kept[index] + page, RENEW, pages);
	}
	ram_unlock(a->ram);
	if (!any)
		return pages;
	bring_copies(index, RENEW, hva, page, pages);
	ram_lock(a->ram);
	if (ram_block_at(a->ram, index) == b)
		copy_renewed(index, b, page, pages);
	else
		memset(saver.kept[index] + page, NOT_KEPT, pages);
	ram_unlock(a->ram);
	return pages;
}

/* What was written while all else was done. */
static void renew_copies(struct agent *a, uint64_t until_us)
{
	for (unsigned i = 0; i < RAM_BLOCKS; i++)
		for (uint64_t page = 0, pages; os_now_us() < until_us && (pages = renew_some(a, i, page)); page += pages)
			;
}

static void unwatch_copies(struct agent *a)
{
	if (saver.copies_uffd >= 0)
		ram_unwatch_copies(a->ram, saver.copies_uffd);
	close_fd(&saver.copies_uffd);
}

/* Most of the work, before the guest waits for it. */
static int arm(struct agent *a)
{
	uint64_t until_us = os_now_us() + KEEP_US;
	int r = faults_serve_writes(a, saver.uffd);

	if (!r)
		faults_watch_peer(saver.client);
	if (!r && !saver.moves)
		keep_copies(a, until_us);
	for (unsigned i = 0; !r && i < RAM_BLOCKS; i++) {
		for (uint64_t page = 0, pages = 1; !r && pages; page += pages) {
			struct ram_block *b;

			ram_lock(a->ram);
			b = ram_block_at(a->ram, i);
			pages = pages_left(b, page, ARM_PAGES);
			pthread_mutex_lock(&saver.arm_lock);
			r = pages ? ram_for_base_of(b, page, pages, arm_run, a) : 0;
			pthread_mutex_unlock(&saver.arm_lock);
			ram_unlock(a->ram);
		}
	}
	if (!r && !saver.moves)
		renew_copies(a, until_us);
	return r;
}

/* The next pages of all blocks, with all threads stopped. False: there are none left. */
static bool settle_next(struct agent *a, uint64_t *settled, int *ret_r)
{
	uint64_t page = saver.settled_to, pages;
	struct ram_block *b = NULL;
	bool stood = false;

	ram_lock(a->ram);
	for (unsigned i = 0; i < RAM_BLOCKS && !b; i++) {
		b = ram_block_at(a->ram, i);
		if (b && page >= b->pages) {
			page -= b->pages;
			b = NULL;
		}
	}
	pages = pages_left(b, page, SETTLE_PAGES);
	*ret_r = b ? ram_update_private(a->ram, b, page, pages) : 0;
	if (b && !*ret_r && ram_has_copies(b, page, pages)) {
		*ret_r = agent_freeze(FREEZE_MS);
		if (!*ret_r) {
			*ret_r = ram_settle_copies(a->ram, b, page, pages, settled);
			os_thaw();
			stood = true;
		}
	}
	ram_unlock(a->ram);
	saver.settled_to += pages;
	if (stood)
		usleep(SETTLE_PAUSE_US); /* the guest's */
	return pages;
}

/* Only for as long as nobody else has to wait for this thread. */
static void settle(struct agent *a, struct control_reply *p)
{
	uint64_t until_us = os_now_us() + SETTLE_REQUEST_US;
	struct volume *v;

	if (saver.settled_to == saver.total_pages)
		saver.settled_to = 0; /* once more */
	if (a->kernel_io) { /* which may be writing copies just now: they are sent in the pause */
		saver.settled_to = saver.total_pages;
		return;
	}
	for (uint32_t i = 0; !saver.settled_to && (v = volumes_nth(a->volumes, i)); i++)
		volume_swap_in(v);
	while (!p->error && os_now_us() < until_us && settle_next(a, &p->pages, &p->error))
		;
	p->pages_all = saver.total_pages - saver.settled_to;
}

void saver_settle(struct agent *a, int client, struct control_reply *p)
{
	saver.moves = client == saver.client;
	if (saver.moves)
		settle(a, p);
	else
		p->error = -EPROTO;
	if (p->error)
		snprintf(p->text, sizeof p->text, "copies of pages of images cannot be moved: %s", strerror(-p->error));
}

/* From the thread that serves faults, before the point in time: the guest goes on, and the page is protected anew. */
void saver_written(struct agent *a, uintptr_t hva)
{
	struct ram_block *b;

	pthread_mutex_lock(&saver.arm_lock);
	b = saver.uffd >= 0 ? ram_find(a->ram, (void *)hva, OS_PAGE_BYTES) : NULL;
	if (b && saver.taken) {
		os_uffd_wake(saver.uffd, (void *)hva, OS_PAGE_BYTES); /* it faults again, for the other side */
	} else if (b) {
		saver.armed[block_index(a, b)][(hva - (uintptr_t)b->hva) >> OS_PAGE_SHIFT] = 0;
		(void)os_uffd_protect(saver.uffd, (void *)hva, OS_PAGE_BYTES, false);
	}
	pthread_mutex_unlock(&saver.arm_lock);
}

static int forget_run(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	memset(saver.kept[block_index(ctx, b)] + page, 0, pages);
	return 0;
}

/* [everybody stopped] What is not kept, or not as it is now. */
static int copy_run(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	unsigned index = (unsigned)block_index(ctx, b);

	for (uint64_t i = page; i < page + pages; i++)
		if (!saver.kept[index][i])
			memcpy(copy_of(index, i), b->hva + os_bytes(i), OS_PAGE_BYTES);
	saver.copied_pages += pages;
	note_run(ctx, b, page, pages);
	saver.private_runs++;
	return 0;
}

/* The VM is stopped; its main loop may go on, and so all threads stop, too. */
static int take_point(struct agent *a, uint64_t *ret_paused_us)
{
	uint64_t begin_us;
	int r;

	scanner_yield(true);
	saver.private_runs = saver.copied_pages = 0;
	ram_lock(a->ram);
	begin_us = os_now_us();
	r = agent_freeze(FREEZE_MS);
	if (!r) {
		r = ram_for_written(a->ram, forget_run, a);
		if (!r)
			r = ram_for_copies(a->ram, copy_run, a);
		pthread_mutex_lock(&saver.arm_lock);
		if (!r)
			r = ram_for_base(a->ram, arm_run, a);
		saver.taken = true;
		pthread_mutex_unlock(&saver.arm_lock);
		if (!r && !saver.moves && !a->kernel_io) /* which may be writing copies just now */
			seen_restart(saver.seen);
		os_thaw();
	}
	*ret_paused_us = os_now_us() - begin_us;
	ram_unlock(a->ram);
	(void)faults_serve_writes(a, -1);
	saver.watch = saver.moves ? WATCH_OFF : WATCH_SOON;
	saver.stays = !r && !saver.moves;
	return r;
}

/* ---- what the guest is using ------------------------------------------------------------------- */

uint64_t saver_tick(struct agent *a)
{
	if (saver.client < 0 || saver.watch == WATCH_OFF)
		return UINT64_MAX;
	if (saver.watch == WATCH_SOON) {
		seen_begin(saver.seen);
		saver.watch = WATCH_ON;
	} else if (saver.taken) {
		unwatch_copies(a); /* not sooner: it would hold up who lets the guest run */
	}
	return seen_look(saver.seen);
}

bool saver_stays(void)
{
	return saver.stays;
}

void saver_arm(struct agent *a, int client, struct control_reply *p)
{
	p->error = client == saver.client ? arm(a) : -EPROTO;
	if (p->error)
		snprintf(p->text, sizeof p->text, "guest RAM cannot be write-protected: %s", strerror(-p->error));
}

void saver_pass(int client, uint64_t pass_us, struct control_reply *p)
{
	if (client == saver.client && saver.moves)
		scanner_accompany(pass_us);
	else
		p->error = -EPROTO;
}

void saver_watch(int client, struct control_reply *p)
{
	if (client == saver.client)
		saver.watch = WATCH_SOON;
	else
		p->error = -EPROTO;
}

/* ---- the end ----------------------------------------------------------------------------------- */

static int unregister_run(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	(void)ctx;
	(void)os_uffd_unregister(saver.uffd, b->hva + os_bytes(page), os_bytes(pages));
	return 0;
}

/*
 * From the thread that serves faults: the other side is gone. Who waits for it must go on before the service thread
 * comes to it, which may itself be waiting for one of them. All protection ends with the descriptor.
 */
void saver_peer_gone(void)
{
	pthread_mutex_lock(&saver.arm_lock);
	close_fd(&saver.uffd);
	pthread_mutex_unlock(&saver.arm_lock);
}

/*
 * Who holds the range lock may be waiting for a page that the other side serves no more (a discard that writes
 * zeros). Closing the last descriptor takes all protection away and wakes him; the other side has closed its own
 * one, or is gone.
 */
static void end(struct agent *a)
{
	faults_watch_peer(-1);
	(void)faults_serve_writes(a, -1);
	if (!ram_lock_within(a->ram, LOCK_MS)) {
		close_fd(&saver.uffd);
		ram_lock(a->ram);
	}
	if (saver.uffd >= 0)
		(void)ram_for_base(a->ram, unregister_run, NULL);
	ram_hold(a->ram, false);
	ram_unlock(a->ram);
	unwatch_copies(a);
	scanner_yield(false);
	reclaimer_yield(false);
	os_unview_file(saver.runs, runs_bytes());
	os_unview_file(saver.copies, os_bytes(saver.total_pages));
	os_unview_file(saver.changed, changed_bytes());
	saver.runs = NULL;
	saver.copies = saver.changed = NULL;
	close_fd(&saver.uffd);
	close_fd(&saver.runs_fd);
	close_fd(&saver.copies_fd);
	close_fd(&saver.changed_fd);
	for (unsigned i = 0; i < RAM_BLOCKS; i++) {
		free(saver.armed[i]);
		free(saver.kept[i]);
		saver.armed[i] = saver.kept[i] = NULL;
	}
	saver.taken = saver.moves = false;
	saver.stays = false;
	seen_destroy(saver.seen);
	saver.seen = NULL;
	saver.watch = WATCH_OFF;
	saver.client = -1;
}

bool saver_is_client(int client)
{
	return client >= 0 && (client == saver.client || client == saver.loader || client == saver.returner);
}

bool saver_client_gone(struct agent *a, int client)
{
	if (client == saver.loader) {
		lazy_want_all(false);
		saver.loader = -1;
	}
	if (client == saver.returner) {
		saver.returner = -1;
		reclaimer_yield(saver.client >= 0);
	}
	if (client != saver.client)
		return false;
	agent_say("a save was broken off; the VM is as it was");
	end(a);
	return true;
}

/* ---- requests ---------------------------------------------------------------------------------- */

static void describe_origins(struct agent *a, struct control_layout *layout)
{
	uint64_t ignored_pages;
	uint32_t ignored_file;
	struct volume *v;

	for (uint32_t i = 0; (v = volumes_nth(a->volumes, i)); i++) {
		(void)volume_describe(v, &layout->origin[i].dev, &layout->origin[i].ino, &ignored_pages, &ignored_file);
		layout->origins = i + 1;
	}
}

static void describe(struct agent *a, struct control_layout *layout)
{
	struct volume *v;

	for (unsigned i = 0; i < RAM_BLOCKS; i++) {
		const struct ram_block *b = ram_block_at(a->ram, i);

		if (!b)
			continue;
		layout->blocks = i + 1;
		layout_describe(b, &layout->block[i]);
	}
	for (uint32_t i = 0; (v = volumes_nth(a->volumes, i)); i++) {
		struct control_volume *to = &layout->volume[layout->volumes];

		if (volume_is_cache(v)) {
			layout->has_cache = volume_overlay_pages(v) > 0;
			layout->cache_file = layout->has_cache ? volume_index(v) : 0;
		} else if (volume_describe(v, &to->dev, &to->ino, &to->pages, &to->file)) {
			snprintf(to->path, sizeof to->path, "%s", volume_path(v));
			layout->volumes++;
		}
	}
	describe_origins(a, layout);
}

static int send_layout(struct agent *a, int client)
{
	static struct control_layout layout; /* only this thread */
	const struct agent_restore *restore = &a->config.restore;
	int fds[LAYOUT_FDS] = { saver.uffd, saver.runs_fd, saver.copies_fd, seen_fd(saver.seen), saver.changed_fd };
	size_t count = CONTROL_FD_BLOCKS;

	memset(&layout, 0, sizeof layout);
	describe(a, &layout);
	for (unsigned i = 0; i < layout.blocks; i++) {
		const struct ram_block *b = ram_block_at(a->ram, i);

		if (!b)
			return -EAGAIN; /* blocks come and go just now */
		fds[count++] = b->memfd;
		fds[count++] = b->entries_fd;
		fds[count++] = b->origins_fd;
	}
	if (layout.has_cache) {
		fds[count++] = restore->ram_fd;
		fds[count++] = restore->pages_fd;
	}
	return layout_send(client, &layout, fds, count);
}

static const char *why_not(int r)
{
	switch (r) {
	case -EPERM:
		return "it takes a userfaultfd that serves the kernel's faults: run as root, allow /dev/userfaultfd, or "
		       "set vm.unprivileged_userfaultfd=1";
	case -EOPNOTSUPP:
		return "the kernel cannot write-protect shared memory (Linux 5.19)";
	case -EBUSY:
		return "something else watches guest RAM (QEMU's post-copy or background snapshot)";
	default:
		return strerror(-r);
	}
}

static bool maps_cache(struct agent *a)
{
	struct volume *v;

	for (uint32_t i = 0; (v = volumes_nth(a->volumes, i)); i++)
		if (volume_is_cache(v) && volume_overlay_pages(v))
			return true;
	return false;
}

/* Some of what was given back; false: all of it is here. */
static bool return_some(struct agent *a, int client, struct control_reply *p)
{
	struct ram_reclaim_counts before;
	uint64_t left;

	if (saver.returner != client)
		saver.returned = 0;
	saver.returner = client;
	reclaimer_yield(true);
	ram_get_reclaim_counts(a->ram, &before);
	p->error = ram_return_reclaimed(a->ram, RETURN_PAGES, &left);
	if (p->error)
		snprintf(p->text, sizeof p->text, "what was given back to the host cannot be read: %s", strerror(-p->error));
	saver.returned += before.spilled_now > left ? before.spilled_now - left : 0;
	p->pages = saver.returned;
	p->pages_all = saver.returned + left;
	return left || p->error;
}

/* Before anything is held: it may take its time. */
void saver_load(struct agent *a, int client, struct control_reply *p)
{
	if (return_some(a, client, p) || !maps_cache(a))
		return;
	lazy_count(&p->pages, &p->pages_all);
	if (!p->pages_all)
		p->pages_all = 1; /* not known yet */
	if (p->pages == p->pages_all)
		return;
	saver.loader = client;
	lazy_want_all(true);
}

/* A snapshot cannot refer to the cache, which has no name; what it stores in place of that must be there. */
static bool is_whole(struct agent *a)
{
	uint64_t present, all;

	lazy_count(&present, &all);
	return !maps_cache(a) || (all && present == all);
}

void saver_begin(struct agent *a, int client, struct control_reply *p)
{
	if (!is_whole(a)) {
		p->error = -EAGAIN;
		snprintf(p->text, sizeof p->text, "not all of the snapshot that it runs from is loaded yet");
		return;
	}
	if (saver.client >= 0) {
		p->error = -EALREADY;
		snprintf(p->text, sizeof p->text, "the VM is being saved already");
		return;
	}
	saver.client = client;
	p->error = begin(a, p);
	if (p->error > 0)
		p->error = 0;
	if (p->error) {
		if (!p->text[0])
			snprintf(p->text, sizeof p->text, "guest RAM cannot be held still: %s", why_not(p->error));
		end(a);
	}
}

void saver_began(struct agent *a, int client)
{
	if (saver.client == client && send_layout(a, client))
		end(a);
}

void saver_point(struct agent *a, int client, struct control_reply *p)
{
	p->error = client == saver.client ? take_point(a, &p->paused_us) : -EPROTO;
	if (p->error)
		snprintf(p->text, sizeof p->text, "the point in time could not be taken: %s", why_not(p->error));
	p->private_runs = saver.private_runs;
	p->pages = saver.copied_pages;
}

void saver_end(struct agent *a, int client, struct control_reply *p)
{
	if (client == saver.client)
		end(a);
	else
		p->error = -EPROTO;
}
