/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What a snapshot stores of the contents of pages: nothing for one word, nothing for what a parent has or another
 * page of the same snapshot, else the page, once. Makes the metadata on the way. Errors are negative errno
 * values. One thread.
 */
#ifndef LATENT_SNAPSHOT_STORE_H
#define LATENT_SNAPSHOT_STORE_H

#include "snapshot/equal.h"

#include <stdatomic.h>

struct parent;

/* Another thread may look at it, and end the work. */
struct source_progress {
	_Atomic bool syncing; /* what the disks were written is brought to storage */
	_Atomic uint64_t load_now, load_all; /* pages that have to be loaded before anything begins */
	_Atomic uint64_t pages_done, pages_all, bytes_written;
	_Atomic bool stop; /* set it to end the writing with -EINTR */
};

struct store {
	struct snapshot_image *image;
	int ram_fd;
	struct parent *parent;
	struct source_progress *progress;
	struct equal equal;
	/* Pages in memory, not all of them written yet. */
	const uint8_t *now;
	uint64_t now_page, now_pages;
};

/* `ram_fd`: to be read and written; `parent`: NULL, or one that is joined to this image (parent_join). All have to
 * outlive it. */
int store_begin(struct snapshot_image *image, int ram_fd, struct parent *parent, struct source_progress *progress,
		struct store *ret_store);
/* Pages of the image that follow each other. */
int store_pages(struct store *store, uint64_t page, const uint8_t *bytes, uint64_t pages);
void store_end(struct store *store);

/* Is this what page `page` of the file holds? Reads it; false when that fails. */
bool store_proves(int fd, uint64_t page, const uint8_t *bytes);

#endif
