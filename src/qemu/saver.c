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
#define ARM_PAGES 16384u /* under the range lock at once: 64 MiB */

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
	bool taken;                 /* the point in time is over: the other side serves faults */
	struct seen *seen;
	enum { WATCH_OFF, WATCH_SOON, WATCH_ON } watch; /* soon: when the guest runs again */
} saver = { .arm_lock = PTHREAD_MUTEX_INITIALIZER, .client = -1, .loader = -1, .returner = -1, .uffd = -1, .runs_fd = -1, .copies_fd = -1 };

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

static int make_armed(struct agent *a)
{
	for (unsigned i = 0; i < RAM_BLOCKS; i++) {
		const struct ram_block *b = ram_block_at(a->ram, i);

		saver.armed[i] = b ? calloc(b->pages, 1) : NULL;
		if (b && !saver.armed[i])
			return -ENOMEM;
	}
	return 0;
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
	uint64_t bytes = os_bytes(private + CONTROL_SAVE_EARLY_PAGES) + runs_bytes() + saver.total_pages * (1 + sizeof(uint16_t));
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
			 "while the VM is saved would be missed: take that device away, and start the VM again");
		return -EBUSY;
	}
	scanner_yield(true);
	reclaimer_yield(true);
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
	if (!r)
		r = check_memory(private, p);
	/* What the copies will need is allocated before the guest waits for it. */
	if (!r && private)
		(void)os_populate_write(saver.copies, os_bytes(private));
	return r;
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
	uint8_t *armed = saver.armed[block_index(ctx, b)];
	uint64_t end = page + pages;
	int r = 0;

	while (!r && page < end) {
		const uint8_t *bare = memchr(armed + page, 0, end - page);
		uint64_t n = 0;

		page = bare ? (uint64_t)(bare - armed) : end;
		while (page + n < end && !armed[page + n])
			armed[page + n++] = 1;
		r = n ? protect(b, page, n) : 0;
		page += n;
	}
	return r;
}

/* Most of the work, before the guest waits for it. */
static int arm(struct agent *a)
{
	int r = faults_serve_writes(a, saver.uffd);

	if (!r)
		faults_watch_peer(saver.client);

	for (unsigned i = 0; !r && i < RAM_BLOCKS; i++) {
		for (uint64_t page = 0, pages = 1; !r && pages; page += pages) {
			struct ram_block *b;

			ram_lock(a->ram);
			b = ram_block_at(a->ram, i);
			pages = b && page < b->pages ? (b->pages - page < ARM_PAGES ? b->pages - page : ARM_PAGES) : 0;
			pthread_mutex_lock(&saver.arm_lock);
			r = pages ? ram_for_base_of(b, page, pages, arm_run, a) : 0;
			pthread_mutex_unlock(&saver.arm_lock);
			ram_unlock(a->ram);
		}
	}
	return r;
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

static int copy_run(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	memcpy(saver.copies + os_bytes(saver.copied_pages), b->hva + os_bytes(page), os_bytes(pages));
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

	saver.private_runs = saver.copied_pages = 0;
	ram_lock(a->ram);
	begin_us = os_now_us();
	r = agent_freeze(FREEZE_MS);
	if (!r) {
		r = ram_for_private(a->ram, copy_run, a);
		pthread_mutex_lock(&saver.arm_lock);
		if (!r)
			r = ram_for_base(a->ram, arm_run, a);
		saver.taken = true;
		pthread_mutex_unlock(&saver.arm_lock);
		if (!r && !a->kernel_io) /* which may be writing copies just now */
			seen_restart(saver.seen);
		os_thaw();
	}
	*ret_paused_us = os_now_us() - begin_us;
	ram_unlock(a->ram);
	(void)faults_serve_writes(a, -1);
	saver.watch = WATCH_SOON;
	return r;
}

/* ---- what the guest is using ------------------------------------------------------------------- */

uint64_t saver_tick(void)
{
	if (saver.client < 0 || saver.watch == WATCH_OFF)
		return UINT64_MAX;
	if (saver.watch == WATCH_SOON) {
		seen_begin(saver.seen);
		saver.watch = WATCH_ON;
	}
	return seen_look(saver.seen);
}

void saver_arm(struct agent *a, int client, struct control_reply *p)
{
	p->error = client == saver.client ? arm(a) : -EPROTO;
	if (p->error)
		snprintf(p->text, sizeof p->text, "guest RAM cannot be write-protected: %s", strerror(-p->error));
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

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
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
	scanner_yield(false);
	reclaimer_yield(false);
	os_unview_file(saver.runs, runs_bytes());
	os_unview_file(saver.copies, os_bytes(saver.total_pages));
	saver.runs = NULL;
	saver.copies = NULL;
	close_fd(&saver.uffd);
	close_fd(&saver.runs_fd);
	close_fd(&saver.copies_fd);
	for (unsigned i = 0; i < RAM_BLOCKS; i++) {
		free(saver.armed[i]);
		saver.armed[i] = NULL;
	}
	saver.taken = false;
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
}

static int send_layout(struct agent *a, int client)
{
	static struct control_layout layout; /* only this thread */
	const struct agent_restore *restore = &a->config.restore;
	int fds[LAYOUT_FDS] = { saver.uffd, saver.runs_fd, saver.copies_fd, seen_fd(saver.seen) };
	size_t count = CONTROL_FD_BLOCKS;

	memset(&layout, 0, sizeof layout);
	describe(a, &layout);
	for (unsigned i = 0; i < layout.blocks; i++) {
		const struct ram_block *b = ram_block_at(a->ram, i);

		if (!b)
			return -EAGAIN; /* blocks come and go just now */
		fds[count++] = b->memfd;
		fds[count++] = b->entries_fd;
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
