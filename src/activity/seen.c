/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "activity/seen.h"

#include "activity/states.h"
#include "os/os.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define ZAP_PAGES 16384u  /* under the range lock at once: 64 MiB */
#define LOOK_PAGES 65536u
#define BUSY_SHARE 4u     /* looking takes no more than this part of a processor */

struct seen {
	struct ram *ram;
	struct os_pagemap *pagemap;
	int fd;
	uint16_t *table;
	size_t bytes;
	uint16_t slice;
	bool overlays; /* they have been emptied, too */
	bool restarted;
	uint64_t next_us;
	uint64_t first[RAM_BLOCKS]; /* where a block's pages begin in the table */
	uint64_t pages[RAM_BLOCKS];
	const struct ram_block *block; /* that is looked at, */
	uint16_t *block_table;
};

int seen_create(struct ram *ram, struct seen **ret_seen)
{
	struct seen *s = calloc(1, sizeof *s);
	uint64_t pages = 0;
	int r;

	if (!s)
		return -ENOMEM;
	s->ram = ram;
	ram_lock(ram);
	for (unsigned i = 0; i < RAM_BLOCKS; i++) {
		const struct ram_block *b = ram_block_at(ram, i);

		s->first[i] = pages;
		s->pages[i] = b ? b->pages : 0;
		pages += s->pages[i];
	}
	ram_unlock(ram);
	s->bytes = os_bytes((pages * sizeof *s->table + OS_PAGE_BYTES - 1) >> OS_PAGE_SHIFT);
	s->fd = os_memfd_create("latent-seen", s->bytes, false);
	r = s->fd < 0 ? s->fd : os_pagemap_open(&s->pagemap);
	s->table = r ? NULL : os_view_file(s->fd, s->bytes, true);
	if (!r && !s->table)
		r = -ENOMEM;
	if (r)
		seen_destroy(s);
	else
		*ret_seen = s;
	return r;
}

void seen_destroy(struct seen *s)
{
	if (!s)
		return;
	os_unview_file(s->table, s->bytes);
	os_pagemap_close(s->pagemap);
	if (s->fd >= 0)
		close(s->fd);
	free(s);
}

int seen_fd(const struct seen *s)
{
	return s->fd;
}

/* The block in a slot, unless it has come or gone since. */
static struct ram_block *block_of(struct seen *s, unsigned slot)
{
	struct ram_block *b = ram_block_at(s->ram, slot);

	return b && b->pages == s->pages[slot] ? b : NULL;
}

/* ---- what states say ----------------------------------------------------------------------------- */

/* The most recently used first. */
static const enum activity in_use[] = { ACTIVITY_HOT, ACTIVITY_WARMER, ACTIVITY_WARM, ACTIVITY_SLACK };

/* Of LOOK_PAGES pages at most; `rank`: in in_use. */
static void add_state(struct seen *s, unsigned slot, uint64_t first, unsigned rank, uint64_t *left)
{
	const struct ram_block *b;
	uint64_t end = first + LOOK_PAGES;

	ram_lock(s->ram);
	b = block_of(s, slot);
	for (uint64_t page = first; b && *left && page < end && page < b->pages; page++) {
		if (activity_of(ram_activity(b, page)) != in_use[rank])
			continue;
		s->table[s->first[slot] + page] = (uint16_t)(SEEN_BY_STATE + rank);
		--*left;
	}
	ram_unlock(s->ram);
}

void seen_add_states(struct seen *s)
{
	uint64_t left = SEEN_STATES_PAGES;

	for (unsigned rank = 0; rank < sizeof in_use / sizeof in_use[0]; rank++)
		for (unsigned slot = 0; slot < RAM_BLOCKS; slot++)
			for (uint64_t page = 0; page < s->pages[slot]; page += LOOK_PAGES)
				add_state(s, slot, page, rank, &left);
}

/* ---- what is touched ------------------------------------------------------------------------------ */

static void begin_again(struct seen *s)
{
	for (size_t i = 0; i < s->bytes / sizeof *s->table; i++)
		if (s->table[i])
			s->table[i] |= SEEN_EARLIER;
	s->slice = 0;
	s->restarted = false;
}

void seen_begin(struct seen *s)
{
	if (s->restarted)
		begin_again(s);
	for (unsigned slot = 0; slot < RAM_BLOCKS; slot++) {
		for (uint64_t page = 0; page < s->pages[slot]; page += ZAP_PAGES) {
			struct ram_block *b;

			ram_lock(s->ram);
			b = block_of(s, slot);
			if (b)
				(void)ram_zap_base(s->ram, b, page, b->pages - page < ZAP_PAGES ? b->pages - page : ZAP_PAGES);
			ram_unlock(s->ram);
		}
	}
	s->slice++;
	s->next_us = os_now_us() + SEEN_SLICE_US;
}

void seen_restart(struct seen *s)
{
	ram_zap_clean_overlays(s->ram);
	s->overlays = s->restarted = true;
	s->next_us = UINT64_MAX;
}

static void note_run(struct seen *s, uint64_t page, uint64_t pages)
{
	uint16_t *at = s->block_table + page;

	for (uint64_t i = 0; i < pages; i++)
		if (!at[i] || at[i] & SEEN_EARLIER)
			at[i] = s->slice;
}

/* What an overlay showed before it was emptied says nothing. */
static void note_present(void *ctx, uint8_t *hva, uint64_t pages)
{
	struct seen *s = ctx;
	uint64_t page = (uint64_t)(hva - s->block->hva) >> OS_PAGE_SHIFT, end = page + pages;

	for (struct ram_range range; page < end; page += range.pages) {
		range = ram_range_at(s->block, page, end);
		if (s->overlays || range.source != ENTRY_OVERLAY)
			note_run(s, page, range.pages);
	}
}

static void look_at(struct seen *s, unsigned slot, uint64_t page)
{
	struct ram_block *b;

	ram_lock(s->ram);
	b = block_of(s, slot);
	if (b) {
		s->block = b;
		s->block_table = s->table + s->first[slot];
		(void)os_pagemap_present_runs(s->pagemap, b->hva + os_bytes(page),
					      b->pages - page < LOOK_PAGES ? b->pages - page : LOOK_PAGES, note_present, s);
	}
	ram_unlock(s->ram);
}

uint64_t seen_look(struct seen *s)
{
	uint64_t begin_us = os_now_us(), took_us;

	if (begin_us < s->next_us)
		return s->next_us - begin_us;
	for (unsigned slot = 0; slot < RAM_BLOCKS; slot++)
		for (uint64_t page = 0; page < s->pages[slot]; page += LOOK_PAGES)
			look_at(s, slot, page);
	if (s->slice < (SEEN_BY_STATE & ~SEEN_EARLIER) - 1)
		s->slice++;
	took_us = os_now_us() - begin_us;
	s->next_us = os_now_us() + (took_us * BUSY_SHARE > SEEN_SLICE_US ? took_us * BUSY_SHARE : SEEN_SLICE_US);
	return s->next_us - os_now_us();
}
