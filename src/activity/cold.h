/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Gives the memory of pages that have been cold for so long back to the host (core/reclaim.c), by what
 * their entries say. A walk goes through guest RAM in steps, of which each holds the range lock for a
 * fraction of a millisecond at a time. One thread; the scan may go on beside it.
 */
#ifndef LATENT_ACTIVITY_COLD_H
#define LATENT_ACTIVITY_COLD_H

#include "core/ram.h"

struct cold_walk {
	uint64_t unused_us;   /* pages that were not used for so long, or longer; not 0 */
	uint64_t shortest_us; /* as for activity_unused_us */
	unsigned slot;        /* where the walk is; all zero: at the beginning */
	uint64_t page;
	uint64_t looked; /* pages, so far */
};

/* The next unit. 1: there is more to come; 0: that was the last one, and the walk is at the beginning
 * again; else as ram_reclaim, and the next step goes on behind what has failed. */
int cold_step(struct ram *ram, struct cold_walk *walk);

/* What of a file is cached that nobody else needs, but pages of it that are not cold; as ram_reclaim_cache. */
int cold_drop_file(struct ram *ram, unsigned file, struct cold_walk *walk);

#endif
