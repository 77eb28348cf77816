/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What a restored guest asks for in its first second and is not in the active set: see "Learned" in ARCHITECTURE.md.
 * The first restore of a snapshot on this host finds it in the page table, in the order in which it came there, and
 * writes it down for those that come after it.
 */
#include "qemu/agent.h"

#include "os/os.h"
#include "snapshot/active.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define LOOK_FIRST_US 50000u /* after the guest runs; each later look comes after twice the time: */
#define LOOKS 5u             /* 0.05, 0.1, 0.2, 0.4, 0.8 s */
#define LOOK_PAGES 8192u     /* the range lock is held for so many at once */
#define LEARN_PAGES 4096u    /* the first so many: 16 MiB that each restore brings */

struct part {
	struct ram_block *block;
	uint64_t ram_page;
	uint8_t *may;
};

static struct {
	pthread_mutex_t lock; /* protects the parts */
	struct part part[RAM_BLOCKS];
	unsigned parts;
	/* Of the service thread: */
	unsigned looks;
	uint64_t count;
	struct active_page list[LEARN_PAGES];
} learner = { .lock = PTHREAD_MUTEX_INITIALIZER };

void learner_watch(struct ram_block *block, uint64_t ram_page, uint8_t *may)
{
	bool room;

	pthread_mutex_lock(&learner.lock);
	room = learner.parts < RAM_BLOCKS;
	if (room)
		learner.part[learner.parts++] = (struct part){ block, ram_page, may };
	pthread_mutex_unlock(&learner.lock);
	if (!room)
		free(may);
}

static void note_present(void *ctx, uint8_t *hva, uint64_t pages)
{
	const struct part *part = ctx;
	uint64_t page = (uint64_t)(hva - part->block->hva) >> OS_PAGE_SHIFT;

	for (uint64_t end = page + pages; page < end && learner.count < LEARN_PAGES; page++) {
		if (part->may[page])
			learner.list[learner.count++] = (struct active_page){ part->ram_page + page, 0, learner.looks };
		part->may[page] = 0;
	}
}

/* [range lock] */
static bool is_there(const struct agent *a, const struct ram_block *block)
{
	for (unsigned i = 0; i < RAM_BLOCKS; i++)
		if (ram_block_at(a->ram, i) == block)
			return true;
	return false;
}

static void look(struct agent *a, struct os_pagemap *pagemap, struct part *part)
{
	struct ram_block *b = part->block;
	bool there = true;

	for (uint64_t page = 0; there; page += LOOK_PAGES) {
		ram_lock(a->ram);
		there = is_there(a, b) && page < b->pages;
		if (there)
			(void)os_pagemap_present_runs(pagemap, b->hva + os_bytes(page),
						      b->pages - page < LOOK_PAGES ? b->pages - page : LOOK_PAGES, note_present,
						      part);
		ram_unlock(a->ram);
	}
}

/* Under its name when all of it is there. */
static void write_list(const struct agent_restore *restore)
{
	char name[32];
	int fd;

	snprintf(name, sizeof name, ".new-%d", (int)getpid());
	fd = openat(restore->learn_dir_fd, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return;
	if (active_write(fd, learner.list, learner.count, NULL, -1, NULL) ||
	    renameat(restore->learn_dir_fd, name, restore->learn_dir_fd, restore->learn_name))
		(void)unlinkat(restore->learn_dir_fd, name, 0);
	close(fd);
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
	uint64_t resumed_us = stat_get(&a->stats->restore_us[RESTORE_RESUMED]), next_us, now = os_now_us();

	pthread_mutex_lock(&learner.lock);
	next_us = resumed_us + ((uint64_t)LOOK_FIRST_US << learner.looks);
	if (resumed_us && learner.parts && now >= next_us) {
		look_at_all(a);
		next_us = resumed_us + ((uint64_t)LOOK_FIRST_US << learner.looks);
		if (learner.looks == LOOKS) {
			write_list(&a->config.restore);
			while (learner.parts)
				free(learner.part[--learner.parts].may);
		}
	}
	next_us = !learner.parts || !resumed_us ? UINT64_MAX : now < next_us ? next_us - now : 0;
	pthread_mutex_unlock(&learner.lock);
	return next_us;
}
