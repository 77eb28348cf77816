/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "core/internal.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PRIVATIZE_SLICE_PAGES 512u
#define ZAP_BATCH 512u
#define ZAP_CLEAN_PAGES 32u /* between private copies: shorter runs would be many, and stay */
#define SCAN_GAP_PAGES 256u /* shorter ones cost less to scan than to leave out */
#define RECONCILE_SLICE_PAGES 16384u /* 64 MiB: 0.3 to 1.1 ms under the lock */

/* ---- life ----------------------------------------------------------------------------------- */

int ram_create(uint64_t budget_maps, struct ram **ret_ram)
{
	struct ram *ram = calloc(1, sizeof *ram);
	int r;

	if (!ram)
		return -ENOMEM;
	r = os_pagemap_open(&ram->pagemap);
	if (r) {
		free(ram);
		return r;
	}
	pthread_mutex_init(&ram->lock, NULL);
	pthread_mutex_init(&ram->mask_lock, NULL);
	pthread_mutex_init(&ram->reclaim.reads_lock, NULL);
	ram->uffd = -1;
	ram->single_uffd = -1;
	ram->counts.budget_maps = budget_maps ? budget_maps : os_max_maps() / 2;
	r = ram_recount_maps(ram);
	if (r)
		ram_destroy(ram);
	else
		*ret_ram = ram;
	return r;
}

void ram_destroy(struct ram *ram)
{
	if (!ram)
		return;
	ram_remove_blocks(ram);
	os_pagemap_close(ram->pagemap);
	pthread_mutex_destroy(&ram->reclaim.reads_lock);
	pthread_mutex_destroy(&ram->mask_lock);
	pthread_mutex_destroy(&ram->lock);
	spill_close(ram->reclaim.spill);
	for (size_t i = 0; i < ENTRY_PAGE_BITS; i++)
		free(ram->words.chunks[i]);
	free(ram);
}

void ram_remove_blocks(struct ram *ram)
{
	ram_lock(ram);
	for (size_t i = 0; i < RAM_BLOCKS; i++)
		ram_remove_block(ram, ram->blocks[i]);
	ram_unlock(ram);
}

static void note_holder(struct ram *ram)
{
#ifndef NDEBUG
	ram->holder = pthread_self();
	ram->held = true;
#else
	(void)ram;
#endif
}

void ram_lock(struct ram *ram)
{
	pthread_mutex_lock(&ram->lock);
	note_holder(ram);
}

bool ram_lock_if_free(struct ram *ram)
{
	if (pthread_mutex_trylock(&ram->lock))
		return false;
	note_holder(ram);
	return true;
}

bool ram_lock_within(struct ram *ram, unsigned timeout_ms)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	if (pthread_mutex_clocklock(&ram->lock, CLOCK_MONOTONIC, &until))
		return false;
	note_holder(ram);
	return true;
}

void ram_unlock(struct ram *ram)
{
#ifndef NDEBUG
	ram->held = false;
#endif
	pthread_mutex_unlock(&ram->lock);
}

/* ---- entries -------------------------------------------------------------------------------- */

static size_t table_bytes(const struct ram_block *b)
{
	return (size_t)b->pages * sizeof *b->entries;
}

static int create_table(const struct ram_block *b, const char *what, int *fd, _Atomic uint64_t **words)
{
	char name[RAM_NAME_BYTES + 16];
	void *table;
	int r;

	snprintf(name, sizeof name, "latent-%s:%s", what, b->name);
	r = os_table_create(name, table_bytes(b), fd, &table);
	if (!r)
		*words = table;
	return r;
}

static int create_tables(struct ram_block *b)
{
	int r = create_table(b, "entries", &b->entries_fd, &b->entries);

	if (r)
		return r;
	r = create_table(b, "origins", &b->origins_fd, &b->origins);
	if (r)
		os_table_destroy(b->entries_fd, (void *)b->entries, table_bytes(b));
	return r;
}

static void destroy_block(struct ram_block *b)
{
	os_table_destroy(b->entries_fd, (void *)b->entries, table_bytes(b));
	os_table_destroy(b->origins_fd, (void *)b->origins, table_bytes(b));
	free(b);
}

uint64_t count_starts(const struct ram_block *b, uint64_t first, uint64_t last)
{
	uint64_t starts = 0;

	for (uint64_t i = first ? first : 1; i <= last && i < b->pages; i++)
		starts += !entry_joins(entry_get(b, i - 1), entry_get(b, i));
	return starts;
}

/* The same, if pages [page, page+pages) were one mapping that begins with entry `head`. */
static uint64_t count_starts_if(const struct ram_block *b, uint64_t page, uint64_t pages, uint64_t head)
{
	uint64_t tail = head, starts = 0;

	if (entry_source(head) == ENTRY_OVERLAY)
		tail = entry_overlay(entry_file(head), entry_file_page(head) + pages - 1);
	if (page)
		starts += !entry_joins(entry_get(b, page - 1), head);
	if (page + pages < b->pages)
		starts += !entry_joins(tail, entry_get(b, page + pages));
	return starts;
}

/* A page that maps its file and has no copy of its own. */
static bool maps_file(uint64_t entry)
{
	return entry_source(entry) == ENTRY_OVERLAY && !entry_is_private(entry);
}

static void tell_lost(struct ram *ram, uint64_t entry, enum ram_loss why)
{
	struct ram_file *f = &ram->files[entry_file(entry)];

	f->mapped_pages--;
	if (f->observer.lost)
		f->observer.lost(f->observer.ctx, entry_file_page(entry), 1, why);
}

/* Writes the entries of one mapping and keeps all counts. */
static void set_entries(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages,
			uint64_t head, enum ram_loss why)
{
	bool overlay = entry_source(head) == ENTRY_OVERLAY;
	uint64_t starts_before = count_starts(b, page, page + pages);

	reclaim_leave(ram, b, page, pages);
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t old = entry_get(b, page + i);

		if (entry_source(old) == ENTRY_OVERLAY) {
			ram->counts.overlay_pages--;
			ram->files[entry_file(old)].overlay_pages--;
		}
		if (entry_is_private(old))
			ram->counts.private_pages--;
		if (maps_file(old))
			tell_lost(ram, old, why);
		if (entry_source(old) == ENTRY_MASKED)
			mask_forget(ram, old);
		entry_set(b, page + i, overlay ? head + (i << ENTRY_PAGE_SHIFT) : head);
	}
	ram->counts.maps += count_starts(b, page, page + pages) - starts_before;
	if (overlay) {
		struct ram_file *f = &ram->files[entry_file(head)];

		ram->counts.overlay_pages += pages;
		f->overlay_pages += pages;
		f->mapped_pages += pages;
		if (f->observer.gained)
			f->observer.gained(f->observer.ctx, entry_file_page(head), pages);
	}
}

static void set_private(struct ram *ram, struct ram_block *b, uint64_t page, enum ram_loss why)
{
	uint64_t entry = entry_get(b, page);

	if (!maps_file(entry))
		return;
	entry_set(b, page, entry | ENTRY_PRIVATE);
	ram->counts.private_pages++;
	ram->counts.copied_pages += why == RAM_LOST_COPIED;
	tell_lost(ram, entry, why);
}

struct ram_range ram_range_at(const struct ram_block *b, uint64_t page, uint64_t end)
{
	uint64_t head = entry_get(b, page), last = page;
	struct ram_range range = { .page = page, .source = entry_is_watched(head) ? ENTRY_WATCHED : entry_source(head) };

	if (range.source == ENTRY_OVERLAY) {
		range.file = entry_file(head);
		range.file_page = entry_file_page(head);
	}
	while (last + 1 < end && entry_joins(entry_get(b, last), entry_get(b, last + 1)))
		last++;
	range.pages = last + 1 - page;
	return range;
}

/* ---- blocks and files ----------------------------------------------------------------------- */

int ram_add_block(struct ram *ram, const char *name, void *hva, uint64_t pages, int memfd,
		  uint64_t memfd_offset, struct ram_block **ret_block)
{
	struct ram_block *b;
	size_t slot = 0;
	int r;

	assert_locked(ram);
	while (slot < RAM_BLOCKS && ram->blocks[slot])
		slot++;
	if (slot == RAM_BLOCKS)
		return -ENOSPC;
	b = calloc(1, sizeof *b);
	if (!b)
		return -ENOMEM;
	snprintf(b->name, sizeof b->name, "%s", name);
	b->hva = hva;
	b->pages = pages;
	b->memfd = memfd;
	b->memfd_offset = memfd_offset;
	r = create_tables(b);
	if (r) {
		free(b);
		return r;
	}
	ram->counts.pages += pages;
	ram->counts.maps++;
	if (ram->counts.other_maps)
		ram->counts.other_maps--; /* it was counted as one of the rest */
	__atomic_store_n(&ram->blocks[slot], b, __ATOMIC_RELEASE);
	if (ret_block)
		*ret_block = b;
	return 0;
}

void ram_remove_block(struct ram *ram, struct ram_block *b)
{
	assert_locked(ram);
	if (!b)
		return;
	pthread_mutex_lock(&ram->mask_lock);
	if (ram->reclaim.block == b)
		reclaim_cancel(ram);
	set_entries(ram, b, 0, b->pages, ENTRY_BASE, RAM_LOST_DROPPED);
	ram->counts.pages -= b->pages;
	ram->counts.maps--;
	for (size_t i = 0; i < RAM_BLOCKS; i++)
		if (ram->blocks[i] == b)
			__atomic_store_n(&ram->blocks[i], NULL, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&ram->mask_lock);
	destroy_block(b);
}

struct ram_block *ram_block_at(struct ram *ram, unsigned n)
{
	return n < RAM_BLOCKS ? __atomic_load_n(&ram->blocks[n], __ATOMIC_ACQUIRE) : NULL;
}

struct ram_block *ram_find(struct ram *ram, const void *hva, size_t bytes)
{
	const uint8_t *at = hva;

	for (size_t i = 0; i < RAM_BLOCKS; i++) {
		struct ram_block *b = __atomic_load_n(&ram->blocks[i], __ATOMIC_ACQUIRE);

		if (b && at >= b->hva && at < b->hva + os_bytes(b->pages) &&
		    bytes <= (size_t)(b->hva + os_bytes(b->pages) - at))
			return b;
	}
	return NULL;
}

int ram_for_part(struct ram *ram, const void *hva, size_t bytes,
		 int (*each)(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages))
{
	const uint8_t *from = hva, *to = from + bytes;
	int r = 0;

	assert_locked(ram);
	for (size_t i = 0; i < RAM_BLOCKS; i++) {
		struct ram_block *b = ram->blocks[i];
		const uint8_t *first, *last;

		if (!b)
			continue;
		first = from > b->hva ? from : b->hva;
		last = to < b->hva + os_bytes(b->pages) ? to : b->hva + os_bytes(b->pages);
		if (first < last) {
			/* Inwards: a page that is only partly meant must not lose the rest. */
			uint64_t page = ((uint64_t)(first - b->hva) + OS_PAGE_BYTES - 1) / OS_PAGE_BYTES;
			uint64_t end = (uint64_t)(last - b->hva) / OS_PAGE_BYTES;
			int one = page < end ? each(ram, b, page, end - page) : 0;

			r = r ? r : one;
		}
	}
	return r;
}

int ram_for_file_part(struct ram *ram, uint64_t offset, uint64_t bytes,
		      int (*each)(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages))
{
	int r = 0;

	assert_locked(ram);
	for (size_t i = 0; i < RAM_BLOCKS; i++) {
		struct ram_block *b = ram->blocks[i];
		uint64_t from, to, end;

		if (!b)
			continue;
		end = b->memfd_offset + os_bytes(b->pages);
		from = offset > b->memfd_offset ? offset : b->memfd_offset;
		to = bytes < end && offset < end - bytes ? offset + bytes : end;
		from = (from + OS_PAGE_BYTES - 1) & ~(uint64_t)(OS_PAGE_BYTES - 1);
		to &= ~(uint64_t)(OS_PAGE_BYTES - 1);
		if (from < to) {
			int one = each(ram, b, (from - b->memfd_offset) >> OS_PAGE_SHIFT, (to - from) >> OS_PAGE_SHIFT);

			r = r ? r : one;
		}
	}
	return r;
}

int ram_add_file(struct ram *ram, int fd, uint64_t pages, const struct ram_observer *observer)
{
	assert_locked(ram);
	if (pages > ENTRY_FILE_PAGES)
		return -EFBIG;
	for (unsigned i = 0; i < ENTRY_FILES; i++) {
		if (ram->files[i].used)
			continue;
		ram->files[i] = (struct ram_file){ .used = true, .fd = fd, .pages = pages };
		if (observer)
			ram->files[i].observer = *observer;
		return (int)i;
	}
	return -ENOSPC;
}

void ram_file_is_watched(struct ram *ram, unsigned file)
{
	assert_locked(ram);
	ram->files[file].watched = true;
}

void ram_drop_file(struct ram *ram, unsigned file)
{
	assert_locked(ram);
	assert(file < ENTRY_FILES && !ram->files[file].overlay_pages && !ram->files[file].masked_pages);
	ram->files[file].used = false;
}

uint64_t ram_overlay_pages(struct ram *ram, unsigned file)
{
	assert_locked(ram);
	return ram->files[file].overlay_pages + ram->files[file].masked_pages;
}

uint64_t ram_mapped_pages(struct ram *ram, unsigned file)
{
	assert_locked(ram);
	return ram->files[file].mapped_pages;
}

/* Does [hva, hva+bytes) hold all of the block? */
static bool holds_block(const void *hva, size_t bytes, const struct ram_block *b)
{
	const uint8_t *from = hva;

	return b && from <= b->hva && (size_t)(b->hva - from) <= bytes &&
	       os_bytes(b->pages) <= bytes - (size_t)(b->hva - from);
}

void ram_remember_advice(struct ram *ram, const void *hva, size_t bytes, int advice)
{
	unsigned clears, sets = os_mark_of_advice(advice, &clears);

	assert_locked(ram);
	for (size_t i = 0; i < RAM_BLOCKS; i++) {
		struct ram_block *b = ram->blocks[i];

		if (holds_block(hva, bytes, b))
			b->marks = (b->marks & ~clears) | sets;
	}
}

void ram_remember_policy(struct ram *ram, const void *hva, size_t bytes, const struct os_policy *policy)
{
	assert_locked(ram);
	for (size_t i = 0; i < RAM_BLOCKS; i++)
		if (holds_block(hva, bytes, ram->blocks[i]))
			ram->blocks[i]->policy = *policy;
}

/* ---- mapping calls that leave memory whole when they fail ------------------------------------ */

/*
 * After a failed mapping call that has left a hole: base must come back, or the guest dies at the
 * next touch. It needs no more mappings than there were before the call, so only a passing lack of
 * kernel memory can stop it; the lock is held meanwhile, for a second at most. True if there was a hole,
 * and base is there now.
 */
static bool fill_hole(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages,
		      enum ram_loss why)
{
	void *hva = page_hva(b, page);
	struct timespec pause = { 0, 1000000 };

	if (os_is_mapped(hva, os_bytes(pages)))
		return false;
	mask_rescue(ram, b, page, pages);
	for (int tries = 0; tries < 1000; tries++) {
		if (!os_map_base_over(hva, os_bytes(pages), b->memfd, memfd_at(b, page))) {
			(void)os_set_marks(hva, os_bytes(pages), b->marks, true);
			break;
		}
		nanosleep(&pause, NULL);
	}
	set_entries(ram, b, page, pages, ENTRY_BASE, why);
	return true;
}

/* Maps base over one range and sets its entries; what is beneath becomes visible. */
static int map_base(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages,
		    enum ram_loss why)
{
	void *hva = page_hva(b, page);
	int r = os_map_base_over(hva, os_bytes(pages), b->memfd, memfd_at(b, page));

	if (r) {
		ram->counts.failures++;
		return fill_hole(ram, b, page, pages, why) ? 0 : r;
	}
	set_entries(ram, b, page, pages, ENTRY_BASE, why);
	if (os_set_marks(hva, os_bytes(pages), b->marks, true))
		ram->counts.unmarked++;
	return 0;
}

static bool has_source(const struct ram_block *b, uint64_t page, uint64_t pages, enum entry_source source)
{
	for (uint64_t i = 0; i < pages; i++)
		if (entry_source(entry_get(b, page + i)) == source)
			return true;
	return false;
}

static bool is_all_overlay(const struct ram_block *b, uint64_t page, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++)
		if (entry_source(entry_get(b, page + i)) != ENTRY_OVERLAY)
			return false;
	return true;
}

static bool base_holds_data(struct ram_block *b, uint64_t page, uint64_t pages)
{
	return os_has_data(b->memfd, memfd_at(b, page), os_bytes(pages));
}

bool within_budget(struct ram *ram, uint64_t more)
{
	struct ram_counts *c = &ram->counts;

	return c->maps + c->other_maps + more <= c->budget_maps;
}

/* ---- transitions ---------------------------------------------------------------------------- */

int map_overlay(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages, unsigned file, uint64_t file_page)
{
	struct ram_file *f = &ram->files[file];
	uint64_t head = entry_overlay(file, file_page), before, after;
	bool over_base;
	void *hva;
	int r;

	assert_locked(ram);
	if (!pages || page >= b->pages || pages > b->pages - page || file_page >= f->pages ||
	    pages > f->pages - file_page)
		return -ERANGE;
	if (ram->base_held)
		return -EBUSY;
	hva = page_hva(b, page);
	before = count_starts(b, page, page + pages);
	after = count_starts_if(b, page, pages, head);
	if (after > before && !within_budget(ram, after - before))
		return -EDQUOT;
	over_base = !is_all_overlay(b, page, pages);
	r = os_map_file_over(hva, os_bytes(pages), f->fd, os_bytes(file_page));
	if (r) {
		ram->counts.failures++;
		(void)fill_hole(ram, b, page, pages, RAM_LOST_DROPPED);
		return r;
	}
	set_entries(ram, b, page, pages, head, RAM_LOST_DROPPED);
	if (os_set_marks(hva, os_bytes(pages), b->marks, false) ||
	    (b->policy.max_node && os_set_policy(hva, os_bytes(pages), &b->policy)))
		ram->counts.unmarked++;
	/* Beneath an overlay there is no memory. What is left there after a failure only costs. */
	if (over_base && base_holds_data(b, page, pages))
		(void)os_punch_hole(b->memfd, memfd_at(b, page), os_bytes(pages));
	return 0;
}

int ram_map_overlay(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages, unsigned file, uint64_t file_page)
{
	int r;

	pthread_mutex_lock(&ram->mask_lock);
	r = map_overlay(ram, b, page, pages, file, file_page);
	pthread_mutex_unlock(&ram->mask_lock);
	return r;
}

typedef int (*range_step)(struct ram *ram, struct ram_block *b, const struct ram_range *range, void *ctx);

/* Calls `step` for each overlay in the pages; goes on after a failure and returns the first one. */
static int for_overlays(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages,
			range_step step, void *ctx)
{
	int r = 0;

	for (uint64_t end = page + pages; page < end;) {
		struct ram_range range = ram_range_at(b, page, end);
		int one = range.source == ENTRY_OVERLAY ? step(ram, b, &range, ctx) : 0;

		r = r ? r : one;
		page = range.page + range.pages;
	}
	return r;
}

static int step_return(struct ram *ram, struct ram_block *b, const struct ram_range *range, void *ctx)
{
	(void)ctx;
	return map_base(ram, b, range->page, range->pages, RAM_LOST_DROPPED);
}

int ram_return_base(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	assert_locked(ram);
	return for_overlays(ram, b, page, pages, step_return, NULL);
}

bool ram_return_saves_maps(const struct ram_block *b, uint64_t page, uint64_t pages)
{
	return count_starts_if(b, page, pages, ENTRY_BASE) <= count_starts(b, page, page + pages);
}

bool ram_has_overlay(const struct ram_block *b, uint64_t page, uint64_t pages)
{
	return has_source(b, page, pages, ENTRY_OVERLAY);
}

/* A hole in an overlay makes one mapping three. */
static bool may_return(struct ram *ram, struct ram_block *b, const struct ram_range *range)
{
	uint64_t before = count_starts(b, range->page, range->page + range->pages);
	uint64_t after = count_starts_if(b, range->page, range->pages, ENTRY_BASE);

	return after <= before || within_budget(ram, after - before);
}

/* An overlay that cannot be given back is made zero as the guest itself would do it. */
static int step_discard(struct ram *ram, struct ram_block *b, const struct ram_range *range, void *ctx)
{
	if (!may_return(ram, b, range) || step_return(ram, b, range, ctx))
		memset(page_hva(b, range->page), 0, os_bytes(range->pages));
	return 0;
}

/* The next run of pages in [page, end) that hold data in the memfd; false: none. */
static bool next_data(struct ram_block *b, uint64_t page, uint64_t end, uint64_t *ret_page, uint64_t *ret_pages)
{
	uint64_t from, to;

	if (!os_next_data(b->memfd, memfd_at(b, page), memfd_at(b, end), &from, &to))
		return false;
	*ret_page = (from - b->memfd_offset) >> OS_PAGE_SHIFT;
	*ret_pages = (to - from) >> OS_PAGE_SHIFT;
	return true;
}

/* Zeros as the guest itself would write them, where there is anything else. */
static int zero_base(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	(void)ctx;
	memset(page_hva(b, page), 0, os_bytes(pages));
	return 0;
}

/* Calls `each` for every run of base in the pages, or of data in it; ends at the first result that is not 0. */
static int for_base_of(struct ram_block *b, uint64_t page, uint64_t end, bool data_only, ram_run each, void *ctx)
{
	int r = 0;

	for (struct ram_range range; !r && page < end; page = range.page + range.pages) {
		uint64_t at, pages;

		range = ram_range_at(b, page, end);
		if (range.source != ENTRY_BASE)
			continue;
		if (!data_only) {
			r = each(ctx, b, page, range.pages);
			continue;
		}
		for (at = page; !r && next_data(b, at, page + range.pages, &at, &pages); at += pages)
			r = each(ctx, b, at, pages);
	}
	return r;
}

int ram_for_base_of(struct ram_block *b, uint64_t page, uint64_t pages, ram_run each, void *ctx)
{
	return for_base_of(b, page, page + pages, false, each, ctx);
}

int ram_for_base(struct ram *ram, ram_run each, void *ctx)
{
	int r = 0;

	assert_locked(ram);
	for (size_t i = 0; !r && i < RAM_BLOCKS; i++)
		if (ram->blocks[i])
			r = ram_for_base_of(ram->blocks[i], 0, ram->blocks[i]->pages, each, ctx);
	return r;
}

void ram_hold(struct ram *ram, bool held)
{
	assert_locked(ram);
	ram->base_held = held;
}

bool ram_is_held(struct ram *ram)
{
	assert_locked(ram);
	return ram->base_held;
}

int ram_discard(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	int r;

	assert_locked(ram);
	if (ram->base_held) {
		(void)for_base_of(b, page, page + pages, true, zero_base, NULL);
		return for_overlays(ram, b, page, pages, step_discard, NULL);
	}
	/* Punched before base is mapped: what lay beneath an overlay must not be seen again. */
	pthread_mutex_lock(&ram->mask_lock);
	r = os_punch_hole(b->memfd, memfd_at(b, page), os_bytes(pages));
	mask_drop(ram, b, page, pages);
	pthread_mutex_unlock(&ram->mask_lock);
	if (r) {
		memset(page_hva(b, page), 0, os_bytes(pages));
		return 0;
	}
	return for_overlays(ram, b, page, pages, step_discard, NULL);
}

static int for_overlays_of_all(struct ram *ram, range_step step, void *ctx)
{
	int r = 0;

	assert_locked(ram);
	for (size_t i = 0; i < RAM_BLOCKS; i++) {
		struct ram_block *b = ram->blocks[i];
		int one = b ? for_overlays(ram, b, 0, b->pages, step, ctx) : 0;

		r = r ? r : one;
	}
	return r;
}

/* Pages of one overlay; found under the lock, used without it. */
struct piece {
	uint8_t *hva;
	uint64_t page, pages, head; /* head: the entry of the first page, as if it were not private */
};

/* Copies of the guest's own are taken along: nothing shall hang on the private flag being right. */
static bool is_overlay_of(uint64_t entry, unsigned file)
{
	return entry_source(entry) == ENTRY_OVERLAY && entry_file(entry) == file;
}

/* The first piece of `file` in the block at or after piece->page. */
static bool next_piece(struct ram *ram, size_t slot, unsigned file, struct piece *piece)
{
	struct ram_block *b;
	uint64_t page = piece->page, end;

	ram_lock(ram);
	b = ram->blocks[slot];
	while (b && page < b->pages && !is_overlay_of(entry_get(b, page), file))
		page++;
	piece->pages = 0;
	if (b && page < b->pages) {
		piece->page = page;
		piece->hva = page_hva(b, page);
		piece->head = entry_get(b, page) & ~ENTRY_PRIVATE;
		for (end = page + 1; end < b->pages && end < page + PRIVATIZE_SLICE_PAGES; end++)
			if (!entry_joins(entry_get(b, end - 1), entry_get(b, end)))
				break;
		piece->pages = end - page;
	}
	ram_unlock(ram);
	return piece->pages;
}

/* The kernel has copied the pages; those that were dropped meanwhile have other entries now. */
static void mark_piece(struct ram *ram, size_t slot, const struct piece *piece)
{
	struct ram_block *b;

	ram_lock(ram);
	b = ram->blocks[slot];
	for (uint64_t i = 0; b && i < piece->pages && piece->page + i < b->pages; i++)
		if (entry_get(b, piece->page + i) == piece->head + (i << ENTRY_PAGE_SHIFT))
			set_private(ram, b, piece->page + i, RAM_LOST_PRIVATIZED);
	ram_unlock(ram);
}

int ram_privatize(struct ram *ram, unsigned file)
{
	int r = ram_unmask_file(ram, file);

	ram->files[file].privatizing++; /* see may_zap_clean */
	for (size_t slot = 0; slot < RAM_BLOCKS; slot++) {
		struct piece piece = { 0 };

		for (; next_piece(ram, slot, file, &piece); piece.page += piece.pages) {
			int one = os_populate_write(piece.hva, os_bytes(piece.pages));

			if (!one)
				mark_piece(ram, slot, &piece);
			r = r ? r : one;
		}
	}
	ram->files[file].privatizing--;
	return r;
}

/* Copies what the mapping shows into the memfd beneath it. */
static int write_base(struct ram_block *b, uint64_t page, uint64_t pages)
{
	int r = os_fault(OS_FAULT_SETTLE_WRITE);

	return r ? r : os_write_all(b->memfd, page_hva(b, page), os_bytes(pages), memfd_at(b, page));
}

static int settle_range(struct ram *ram, struct ram_block *b, const struct ram_range *range,
			uint64_t *settled);

/* Around a page that storage does not give any more. */
static int settle_halves(struct ram *ram, struct ram_block *b, const struct ram_range *range, uint64_t *settled)
{
	struct ram_range first = *range, second = *range;
	int r, r2;

	first.pages = range->pages / 2;
	second.page += first.pages;
	second.file_page += first.pages;
	second.pages -= first.pages;
	r = settle_range(ram, b, &first, settled);
	r2 = settle_range(ram, b, &second, settled);
	return r ? r : r2;
}

static int settle_range(struct ram *ram, struct ram_block *b, const struct ram_range *range,
			uint64_t *settled)
{
	int r = write_base(b, range->page, range->pages);

	if (!r)
		r = map_base(ram, b, range->page, range->pages, RAM_LOST_SETTLED);
	if (r) /* still an overlay: nothing stays beneath it */
		(void)os_punch_hole(b->memfd, memfd_at(b, range->page), os_bytes(range->pages));
	if (!r && settled)
		*settled += range->pages;
	return r == -EFAULT && range->pages > 1 ? settle_halves(ram, b, range, settled) : r;
}

static int step_settle(struct ram *ram, struct ram_block *b, const struct ram_range *range, void *ctx)
{
	return settle_range(ram, b, range, ctx);
}

int ram_settle(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages, uint64_t *ret_settled)
{
	assert_locked(ram);
	return for_overlays(ram, b, page, pages, step_settle, ret_settled);
}

struct detach {
	unsigned file;
	uint64_t *settled;
};

static int step_detach(struct ram *ram, struct ram_block *b, const struct ram_range *range, void *ctx)
{
	struct detach *d = ctx;

	return range->file == d->file ? settle_range(ram, b, range, d->settled) : 0;
}

int ram_detach(struct ram *ram, unsigned file, uint64_t *ret_settled)
{
	struct detach d = { .file = file, .settled = ret_settled };

	return for_overlays_of_all(ram, step_detach, &d);
}

void ram_swap_in(struct ram *ram, unsigned file)
{
	for (size_t slot = 0; slot < RAM_BLOCKS; slot++)
		for (struct piece piece = { 0 }; next_piece(ram, slot, file, &piece); piece.page += piece.pages)
			os_populate_read(piece.hva, os_bytes(piece.pages));
}

bool ram_find_unreadable(struct ram *ram, struct ram_block **ret_block, uint64_t *ret_page)
{
	assert_locked(ram);
	for (size_t i = 0; i < RAM_BLOCKS; i++) {
		struct ram_block *b = ram->blocks[i];
		struct ram_range range = { 0 };

		for (uint64_t page = 0; b && page < b->pages; page = range.page + range.pages) {
			uint64_t readable;

			range = ram_range_at(b, page, b->pages);
			if (range.source != ENTRY_OVERLAY)
				continue;
			readable = os_readable_pages(page_hva(b, page), range.pages);
			if (readable == range.pages)
				continue;
			*ret_block = b;
			*ret_page = page + readable;
			return true;
		}
	}
	return false;
}

/* ---- what the kernel did meanwhile ---------------------------------------------------------- */

struct reconcile {
	struct ram *ram;
	struct ram_block *block;
	uint64_t source_bits; /* that are set still */
	int uffd;             /* with unwatch_slice */
};

static void found_private(void *ctx, uint8_t *hva, uint64_t pages)
{
	struct reconcile *c = ctx;
	uint64_t page = (uint64_t)(hva - c->block->hva) / OS_PAGE_BYTES;

	for (uint64_t i = 0; i < pages; i++)
		set_private(c->ram, c->block, page + i, RAM_LOST_COPIED);
}

/* Calls `look` for all of guest RAM, a slice at a time, each under the lock, until it fails. */
static int for_slices(struct reconcile *c, int (*look)(struct reconcile *c, uint64_t page, uint64_t pages))
{
	int r = 0;

	for (size_t slot = 0; slot < RAM_BLOCKS; slot++) {
		bool more = true;

		for (uint64_t page = 0; !r && more; page += RECONCILE_SLICE_PAGES) {
			ram_lock(c->ram);
			c->block = c->ram->blocks[slot];
			more = c->block && page < c->block->pages;
			if (more)
				r = look(c, page, c->block->pages - page < RECONCILE_SLICE_PAGES ? c->block->pages - page
												 : RECONCILE_SLICE_PAGES);
			ram_unlock(c->ram);
		}
	}
	return r;
}

static int reconcile_slice(struct reconcile *c, uint64_t page, uint64_t pages)
{
	if (!ram_has_overlay(c->block, page, pages))
		return 0;
	return os_pagemap_private_runs(c->ram->pagemap, page_hva(c->block, page), pages, found_private, c);
}

int ram_reconcile(struct ram *ram)
{
	struct reconcile c = { .ram = ram };

	return for_slices(&c, reconcile_slice);
}

/* ---- source bits ------------------------------------------------------------------------------- */

void ram_set_source_bits(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	assert_locked(ram);
	for (uint64_t i = page; i < page + pages; i++) {
		if (!maps_file(entry_get(b, i)) || entry_has_source_bit(b, i))
			continue;
		entry_change(b, i, ENTRY_SOURCE_BIT, ENTRY_SOURCE_BIT);
		ram->sources.set++;
		ram->sources.now++;
	}
}

static void found_fetched(void *ctx, uint8_t *hva, uint64_t pages)
{
	struct reconcile *c = ctx;
	uint64_t page = (uint64_t)(hva - c->block->hva) >> OS_PAGE_SHIFT;

	for (uint64_t i = page; i < page + pages; i++) {
		if (!entry_has_source_bit(c->block, i))
			continue;
		entry_change(c->block, i, ENTRY_SOURCE_BIT, 0);
		c->ram->sources.fetched++;
	}
}

static uint64_t count_source_bits(const struct ram_block *b, uint64_t page, uint64_t pages)
{
	uint64_t count = 0;

	for (uint64_t i = page; i < page + pages; i++)
		count += entry_has_source_bit(b, i);
	return count;
}

static int update_sources_of(struct reconcile *c, uint64_t page, uint64_t pages)
{
	int r = 0;

	if (count_source_bits(c->block, page, pages))
		r = os_pagemap_present_runs(c->ram->pagemap, page_hva(c->block, page), pages, found_fetched, c);
	c->source_bits += count_source_bits(c->block, page, pages);
	return r;
}

int ram_update_source_bits(struct ram *ram)
{
	struct reconcile c = { .ram = ram };
	struct ram_source_counts before;
	int r;

	ram_get_source_counts(ram, &before);
	r = before.now ? for_slices(&c, update_sources_of) : 0;
	if (r || !before.now)
		return r;
	ram_lock(ram);
	ram->sources.now = c.source_bits + (ram->sources.set - before.set); /* (those that were set meanwhile may be counted twice) */
	ram_unlock(ram);
	return 0;
}

void ram_get_source_counts(struct ram *ram, struct ram_source_counts *counts)
{
	ram_lock(ram);
	*counts = ram->sources;
	ram_unlock(ram);
}

typedef int (*pagemap_look)(struct os_pagemap *pagemap, uint8_t *hva, uint64_t pages, os_page_run found,
			    void *ctx);

struct private_runs {
	struct ram *ram;
	pagemap_look look;
	struct ram_block *block;
	ram_run each;
	void *ctx;
	int error;
};

/* Where base is write-protected it may look private, too: only overlays count. */
static void note_private(void *ctx, uint8_t *hva, uint64_t pages)
{
	struct private_runs *p = ctx;
	struct ram_block *b = p->block;
	uint64_t page = (uint64_t)(hva - b->hva) >> OS_PAGE_SHIFT, end = page + pages;

	while (page < end && !p->error) {
		struct ram_range range = ram_range_at(b, page, end);

		if (range.source == ENTRY_OVERLAY) {
			for (uint64_t i = 0; i < range.pages; i++)
				set_private(p->ram, b, page + i, RAM_LOST_COPIED);
			p->error = p->each(p->ctx, b, page, range.pages);
		}
		page += range.pages;
	}
}

/* The next pages in which there are overlays: base between them is left out where there is much of it. */
static bool next_overlays(const struct ram_block *b, uint64_t *page, uint64_t *ret_pages)
{
	uint64_t first = *page, end;

	while (first < b->pages && entry_source(entry_get(b, first)) != ENTRY_OVERLAY)
		first++;
	end = first;
	for (uint64_t i = first; i < b->pages && i - end < SCAN_GAP_PAGES; i++)
		if (entry_source(entry_get(b, i)) == ENTRY_OVERLAY)
			end = i + 1;
	*page = first;
	*ret_pages = end - first;
	return end > first;
}

static int for_copies_found(struct ram *ram, pagemap_look look, ram_run each, void *ctx)
{
	struct private_runs p = { .ram = ram, .look = look, .each = each, .ctx = ctx };
	int r = 0;

	assert_locked(ram);
	for (size_t i = 0; !r && i < RAM_BLOCKS; i++) {
		p.block = ram->blocks[i];
		for (uint64_t page = 0, pages; !r && p.block && next_overlays(p.block, &page, &pages); page += pages) {
			r = look(ram->pagemap, page_hva(p.block, page), pages, note_private, &p);
			r = r ? r : p.error;
		}
	}
	return r;
}

int ram_for_private(struct ram *ram, ram_run each, void *ctx)
{
	return for_copies_found(ram, os_pagemap_private_runs, each, ctx);
}

int ram_for_written(struct ram *ram, ram_run each, void *ctx)
{
	return for_copies_found(ram, os_pagemap_written_copies, each, ctx);
}

int ram_for_copies(struct ram *ram, ram_run each, void *ctx)
{
	int r = 0;

	assert_locked(ram);
	for (size_t i = 0; !r && i < RAM_BLOCKS; i++) {
		struct ram_block *b = ram->blocks[i];

		for (uint64_t page = 0, n; !r && b && page < b->pages; page += n ? n : 1) {
			for (n = 0; page + n < b->pages && entry_is_private(entry_get(b, page + n)); n++)
				;
			r = n ? each(ctx, b, page, n) : 0;
		}
	}
	return r;
}

static int step_watch_copies(struct ram *ram, struct ram_block *b, const struct ram_range *range,
			     void *uffd)
{
	if (!ram->files[range->file].watched)
		(void)os_uffd_register_wp(*(const int *)uffd, page_hva(b, range->page),
					  os_bytes(range->pages));
	return 0;
}

void ram_watch_copies(struct ram *ram, int uffd)
{
	(void)for_overlays_of_all(ram, step_watch_copies, &uffd);
}

static int step_unwatch_copies(struct ram *ram, struct ram_block *b, const struct ram_range *range,
			       void *uffd)
{
	if (!ram->files[range->file].watched)
		(void)os_uffd_unregister(*(const int *)uffd, page_hva(b, range->page),
					 os_bytes(range->pages));
	return 0;
}

static int unwatch_slice(struct reconcile *c, uint64_t page, uint64_t pages)
{
	return for_overlays(c->ram, c->block, page, pages, step_unwatch_copies, &c->uffd);
}

void ram_unwatch_copies(struct ram *ram, int uffd)
{
	struct reconcile c = { .ram = ram, .uffd = uffd };

	(void)for_slices(&c, unwatch_slice);
}

static int step_protect_copies(struct ram *ram, struct ram_block *b, const struct ram_range *range,
			       void *ctx)
{
	struct private_runs *p = ctx;
	int r = p->look(ram->pagemap, page_hva(b, range->page), range->pages, note_private, p);

	if (r) /* some may be protected all the same: whoever looks for copies must know of them */
		(void)ram_update_private(ram, b, range->page, range->pages);
	if (r == -EPERM && ram->files[range->file].watched) /* by something else */
		return 0;
	return r ? r : p->error;
}

int ram_protect_copies(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages, ram_run each,
		       void *ctx)
{
	struct private_runs p = { ram, os_pagemap_protect_copies, b, each, ctx, 0 };

	assert_locked(ram);
	return for_overlays(ram, b, page, pages, step_protect_copies, &p);
}

int ram_protect_written(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages, ram_run each,
			void *ctx)
{
	struct private_runs p = { ram, os_pagemap_protect_written, b, each, ctx, 0 };

	assert_locked(ram);
	return for_overlays(ram, b, page, pages, step_protect_copies, &p);
}

int ram_zap_base(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	int r = 0;

	assert_locked(ram);
	for (uint64_t end = page + pages; !r && page < end;) {
		struct ram_range range = ram_range_at(b, page, end);

		if (range.source != ENTRY_OVERLAY)
			r = os_zap(page_hva(b, page), os_bytes(range.pages));
		page += range.pages;
	}
	return r;
}

struct zap {
	struct os_range ranges[ZAP_BATCH];
	size_t count;
};

static void zap_clean_run(struct zap *z, const struct ram_block *b, uint64_t page, uint64_t pages)
{
	z->ranges[z->count++] = (struct os_range){ page_hva(b, page), os_bytes(pages) };
	if (z->count == ZAP_BATCH) {
		os_zap_many(z->ranges, z->count);
		z->count = 0;
	}
}

/*
 * Not while somebody privatizes the file: he copies its pages with no lock, in a thread that no freeze stops, so a
 * page that was clean a moment ago may be a copy by now. He says so before he takes the range lock for the first time.
 */
static bool may_zap_clean(const struct ram *ram, unsigned file) { return !ram->files[file].privatizing; }

static int step_zap_clean(struct ram *ram, struct ram_block *b, const struct ram_range *range, void *ctx)
{
	if (!may_zap_clean(ram, range->file))
		return 0;
	for (uint64_t i = 0, end; i < range->pages; i = end + 1) {
		for (end = i; end < range->pages && !entry_is_private(entry_get(b, range->page + end)); end++)
			;
		if (end - i == range->pages || end - i >= ZAP_CLEAN_PAGES)
			zap_clean_run(ctx, b, range->page + i, end - i);
	}
	return 0;
}

void ram_zap_clean_overlays(struct ram *ram)
{
	struct zap z = { .count = 0 };

	(void)for_overlays_of_all(ram, step_zap_clean, &z);
	os_zap_many(z.ranges, z.count);
}

static void note_copied(void *ctx, uint8_t *hva, uint64_t pages)
{
	struct reconcile *c = ctx;
	uint64_t page = (uint64_t)(hva - c->block->hva) >> OS_PAGE_SHIFT;

	for (uint64_t i = page; i < page + pages; i++)
		if (entry_source(entry_get(c->block, i)) == ENTRY_OVERLAY)
			set_private(c->ram, c->block, i, RAM_LOST_COPIED);
}

static bool is_clean(const struct ram_block *b, uint64_t page) { return maps_file(entry_get(b, page)); }

int ram_update_private(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	struct reconcile c = { .ram = ram, .block = b };

	assert_locked(ram);
	return os_pagemap_private_runs(ram->pagemap, page_hva(b, page), pages, note_copied, &c);
}

int ram_zap_clean(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	uint64_t end = page + pages, last;
	int r = 0;

	assert_locked(ram);
	for (; !r && page < end; page = last) {
		unsigned file = entry_file(entry_get(b, page));

		if (is_clean(b, page) && !may_zap_clean(ram, file))
			return -EBUSY;
		for (last = page; last < end && is_clean(b, last) && entry_file(entry_get(b, last)) == file;)
			last++;
		if (last > page)
			r = os_zap(page_hva(b, page), os_bytes(last - page));
		else
			last++;
	}
	return r;
}

/* The private copies from `page` on, in one mapping. */
static struct ram_range copies_at(const struct ram_block *b, uint64_t page, uint64_t end)
{
	struct ram_range range = ram_range_at(b, page, end);
	uint64_t pages = 0;

	while (pages < range.pages && entry_is_private(entry_get(b, page + pages)))
		pages++;
	range.pages = pages;
	return range;
}

bool ram_has_copies(const struct ram_block *b, uint64_t page, uint64_t pages)
{
	for (uint64_t i = page; i < page + pages; i++)
		if (entry_is_private(b->entries[i]))
			return true;
	return false;
}

int ram_settle_copies(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages,
		      uint64_t *ret_settled)
{
	uint64_t end = page + pages;
	int r;

	assert_locked(ram);
	r = ram_update_private(ram, b, page, pages);
	while (!r && page < end) {
		struct ram_range copies = copies_at(b, page, end);

		if (copies.pages && may_return(ram, b, &copies))
			r = settle_range(ram, b, &copies, ret_settled);
		page += copies.pages ? copies.pages : 1;
	}
	return r;
}

int ram_recount_maps(struct ram *ram)
{
	uint64_t all;
	int r = os_count_maps(&all);

	if (r)
		return r;
	ram_lock(ram);
	ram->counts.other_maps = all > ram->counts.maps ? all - ram->counts.maps : 0;
	ram_unlock(ram);
	return 0;
}

/* ---- activity ------------------------------------------------------------------------------- */

void ram_set_activity(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t activity)
{
	assert_locked(ram);
	entry_change(b, page, ENTRY_ACTIVITY, activity);
}

uint64_t ram_activity(const struct ram_block *b, uint64_t page)
{
	return atomic_load_explicit(&b->entries[page], memory_order_relaxed) & ENTRY_ACTIVITY;
}

void ram_single_by(struct ram *ram, int uffd, bool overlays)
{
	assert_locked(ram);
	ram->single_uffd = uffd;
	ram->single_overlays = overlays;
}

static bool may_single(const struct ram *ram, const struct ram_range *overlay)
{
	return ram->single_overlays && !ram->files[overlay->file].watched;
}

static int single_range(struct ram *ram, struct ram_block *b, const struct ram_range *range)
{
	void *hva = page_hva(b, range->page);

	if (range->source == ENTRY_WATCHED)
		return mask_single(ram, hva, os_bytes(range->pages), true);
	if (range->source == ENTRY_OVERLAY && !may_single(ram, range))
		return ram->single_overlays ? -EBUSY : -EOPNOTSUPP;
	return os_uffd_register_wp(ram->single_uffd, hva, os_bytes(range->pages));
}

int ram_single(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	int r = ram->single_uffd < 0 ? -EOPNOTSUPP : 0;

	assert_locked(ram);
	for (uint64_t end = page + pages; ram->single_uffd >= 0 && page < end;) {
		struct ram_range range = ram_range_at(b, page, end);
		int one = single_range(ram, b, &range);

		r = r ? r : one;
		page += range.pages;
	}
	return r;
}

void ram_not_single(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	assert_locked(ram);
	for (uint64_t end = page + pages; ram->single_uffd >= 0 && page < end;) {
		struct ram_range range = ram_range_at(b, page, end);

		if (range.source == ENTRY_WATCHED)
			(void)mask_single(ram, page_hva(b, page), os_bytes(range.pages), false);
		else if (range.source == ENTRY_BASE || may_single(ram, &range))
			(void)os_uffd_unregister(ram->single_uffd, page_hva(b, page),
						 os_bytes(range.pages));
		page += range.pages;
	}
}

void ram_get_counts(struct ram *ram, struct ram_counts *ret_counts)
{
	ram_lock(ram);
	*ret_counts = ram->counts;
	ram_unlock(ram);
}
