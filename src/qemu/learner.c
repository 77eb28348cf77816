/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What a restored guest asks for in its first second and is not in the active set: see "Learned" in ARCHITECTURE.md.
 * The first restore of a snapshot on this host finds it in the page table, in the order in which it came there, and
 * writes it down, with its contents, for those that come after it.
 */
#include "qemu/agent.h"

#include "os/os.h"
#include "os/probe.h"
#include "snapshot/active.h"
#include "snapshot/image.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOOK_FIRST_US 50000u /* after the guest runs; each later look comes after twice the time: */
#define LOOKS 5u             /* 0.05, 0.1, 0.2, 0.4, 0.8 s */
#define LOOK_PAGES 8192u     /* the range lock is held for so many at once */

enum may { NOT, ASKED_FOR, NEAR }; /* NEAR: it was in the page table before the guest ran */

struct part {
	struct ram_block *block;
	uint64_t pages, ram_page;
	uint8_t *may; /* enum may of each page: as what it may come into the list */
};

static struct {
	pthread_mutex_t lock; /* protects the parts */
	struct part part[RAM_BLOCKS];
	unsigned parts;
	int uffd; /* overlays are registered with it, for nothing else but single pages; -1: they are not */
	/* Of the service thread: */
	unsigned looks;
	uint64_t count;
	struct active_page list[ACTIVE_LEARNED_PAGES];
} learner = { .lock = PTHREAD_MUTEX_INITIALIZER, .uffd = -1 };

/* Else the kernel maps up to 16 pages around each one, and all would be learned. */
void learner_begin(struct agent *a)
{
	pthread_mutex_lock(&learner.lock);
	if (learner.uffd < 0)
		learner.uffd = os_uffd_open_unserved(OS_UFFD_PAGEFAULT_FLAG_WP | OS_UFFD_WP_ASYNC);
	ram_lock(a->ram);
	if (learner.uffd >= 0)
		ram_watch_copies(a->ram, learner.uffd);
	ram_unlock(a->ram);
	pthread_mutex_unlock(&learner.lock);
}

/* [lock] */
static void end_single(struct agent *a)
{
	if (learner.uffd < 0)
		return;
	ram_unwatch_copies(a->ram, learner.uffd);
	close(learner.uffd);
	learner.uffd = -1;
}

void learner_yield(struct agent *a)
{
	pthread_mutex_lock(&learner.lock);
	end_single(a);
	pthread_mutex_unlock(&learner.lock);
}

static void note_there(void *ctx, uint8_t *hva, uint64_t pages)
{
	const struct part *part = ctx;
	uint8_t *may = part->may + ((uint64_t)(hva - part->block->hva) >> OS_PAGE_SHIFT);

	for (uint64_t i = 0; i < pages; i++)
		may[i] = may[i] ? NEAR : NOT;
}

/* What is in the page table before the guest runs is there because the kernel has mapped it around the active set:
 * nobody will see whether it is asked for. */
static int mark_present(struct ram *ram, struct part *part)
{
	struct os_pagemap *pagemap = NULL;
	int r = os_pagemap_open(&pagemap);

	ram_lock(ram);
	if (!r)
		r = os_pagemap_present_runs(pagemap, part->block->hva, part->pages, note_there, part);
	ram_unlock(ram);
	os_pagemap_close(pagemap);
	return r;
}

void learner_watch(struct agent *a, struct ram_block *block, uint64_t ram_page, uint8_t *may)
{
	struct part part = { block, block->pages, ram_page, may };
	bool taken = !mark_present(a->ram, &part);

	pthread_mutex_lock(&learner.lock);
	taken = taken && learner.parts < RAM_BLOCKS && !learner.looks;
	if (taken)
		learner.part[learner.parts++] = part;
	pthread_mutex_unlock(&learner.lock);
	if (!taken)
		free(may);
}

/* Those of the pages that may come into the list as this do so. */
static void list(const struct part *part, uint64_t page, uint64_t pages, enum may as)
{
	for (uint64_t end = page + pages; page < end && learner.count < ACTIVE_LEARNED_PAGES; page++) {
		if (part->may[page] != as)
			continue;
		learner.list[learner.count++] = (struct active_page){ part->ram_page + page, 0, learner.looks };
		part->may[page] = NOT;
	}
}

static void note_present(void *ctx, uint8_t *hva, uint64_t pages)
{
	const struct part *part = ctx;

	list(part, (uint64_t)(hva - part->block->hva) >> OS_PAGE_SHIFT, pages, ASKED_FOR);
}

/* [range lock] */
static bool is_there(const struct agent *a, const struct part *part)
{
	for (unsigned i = 0; i < RAM_BLOCKS; i++)
		if (ram_block_at(a->ram, i) == part->block)
			return part->block->pages == part->pages;
	return false;
}

static void look(struct agent *a, struct os_pagemap *pagemap, struct part *part)
{
	struct ram_block *b = part->block;
	bool there = true;

	for (uint64_t page = 0; there; page += LOOK_PAGES) {
		ram_lock(a->ram);
		there = is_there(a, part) && page < b->pages;
		if (there)
			(void)os_pagemap_present_runs(pagemap, b->hva + os_bytes(page),
						      b->pages - page < LOOK_PAGES ? b->pages - page : LOOK_PAGES, note_present,
						      part);
		ram_unlock(a->ram);
	}
}

/* With what the snapshot has there: from its files, for the guest may have written its pages since. */
static int write_contents(const struct agent_restore *restore, int fd)
{
	struct snapshot_image image = { 0 };
	char why[SNAPSHOT_WHY_BYTES];
	int r = snapshot_image_read(restore->pages_fd, &image, why);

	if (!r)
		r = active_write(fd, learner.list, learner.count, &image, restore->ram_fd, restore->volume_fd);
	snapshot_image_free(&image);
	return r;
}

/* Nobody has changed them since the restore found them to be what they were. */
static bool are_files_as_found(const struct agent_restore *restore)
{
	int fds[AGENT_RESTORE_VOLUMES + 2] = { restore->pages_fd, restore->ram_fd };
	char id[ACTIVE_ID_BYTES];

	for (uint32_t i = 0; i < restore->volumes; i++)
		fds[2 + i] = restore->volume_fd[i];
	return !active_id(fds, restore->volumes + 2, id) && !strcmp(id, restore->learn_name);
}

/* Under its name when all of it is there. */
static void write_list(const struct agent_restore *restore, int dir_fd)
{
	char name[32];
	int fd;

	snprintf(name, sizeof name, ".new-%d", (int)getpid());
	(void)unlinkat(dir_fd, name, 0); /* of one that was killed */
	fd = openat(dir_fd, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return;
	if (write_contents(restore, fd) || !are_files_as_found(restore) ||
	    renameat(dir_fd, name, dir_fd, restore->learn_name))
		(void)unlinkat(dir_fd, name, 0);
	close(fd);
}

struct job {
	const struct agent_restore *restore;
	int dir_fd;
};

/* Nobody waits for this: the files and the directory may be on storage that does not answer. */
static void *write_main(void *ctx)
{
	pid_t tid = (pid_t)syscall(SYS_gettid);
	struct job *job = ctx;

	os_never_freeze(tid);
	write_list(job->restore, job->dir_fd);
	close(job->dir_fd);
	free(job);
	os_may_freeze(tid);
	return NULL;
}

/* [lock] The list is complete, and stays as it is. */
static void begin_writing(struct agent *a)
{
	struct agent_restore *restore = &a->config.restore;
	struct job *job = learner.count ? malloc(sizeof *job) : NULL;

	if (job)
		*job = (struct job){ restore, restore->learn_dir_fd };
	if (!job || agent_start_thread("latent-learn", write_main, job, false)) {
		free(job);
		close(restore->learn_dir_fd);
	}
	restore->learn_dir_fd = -1;
}

/* [lock] */
static void end(struct agent *a)
{
	end_single(a);
	for (unsigned i = 0; i < learner.parts; i++)
		list(&learner.part[i], 0, learner.part[i].pages, NEAR); /* where there is room */
	while (learner.parts)
		free(learner.part[--learner.parts].may);
	begin_writing(a);
}

/* [lock] When the next look is due. */
static uint64_t look_us(uint64_t resumed_us)
{
	return resumed_us + ((uint64_t)LOOK_FIRST_US << learner.looks);
}

/* [lock] */
static void look_at_all(struct agent *a)
{
	struct os_pagemap *pagemap = NULL;

	learner.looks++;
	if (os_pagemap_open(&pagemap))
		return;
	for (unsigned i = 0; i < learner.parts; i++)
		look(a, pagemap, &learner.part[i]);
	os_pagemap_close(pagemap);
}

uint64_t learner_tick(struct agent *a)
{
	uint64_t resumed_us = stat_get(&a->stats->restore_us[RESTORE_RESUMED]), next_us = UINT64_MAX, now = os_now_us();

	if (!resumed_us || a->config.restore.learn_dir_fd < 0)
		return UINT64_MAX;
	pthread_mutex_lock(&learner.lock);
	if (learner.parts && now >= look_us(resumed_us))
		look_at_all(a);
	if (!learner.parts || learner.looks == LOOKS)
		end(a);
	else
		next_us = look_us(resumed_us);
	pthread_mutex_unlock(&learner.lock);
	return next_us == UINT64_MAX ? next_us : now < next_us ? next_us - now : 0;
}
