/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "activity/cold.h"

#include "activity/states.h"

#include <errno.h>

static bool is_cold(void *ctx, uint64_t entry)
{
	const struct cold_walk *walk = ctx;

	return activity_unused_us(entry, walk->shortest_us) >= walk->unused_us;
}

/* Units begin where groups of the scan do: what is cold comes in those. */
static uint64_t to_next_unit(uint64_t page) { return RAM_RECLAIM_PAGES - page % RAM_RECLAIM_PAGES; }

int cold_step(struct ram *ram, struct cold_walk *walk)
{
	uint64_t pages;
	int r;

	while (walk->slot < RAM_BLOCKS) {
		r = ram_reclaim(ram, walk->slot, walk->page, to_next_unit(walk->page), is_cold, walk,
				&pages);
		if (r != -ENOENT) {
			walk->page += pages;
			walk->looked += pages;
			return r ? r : 1;
		}
		walk->slot++;
		walk->page = 0;
	}
	walk->slot = 0;
	return 0;
}

int cold_drop_file(struct ram *ram, unsigned file, struct cold_walk *walk)
{
	return ram_reclaim_cache(ram, file, is_cold, walk);
}
