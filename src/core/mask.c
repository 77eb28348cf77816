/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Masked pages: the flag "needs update" of US9529728, as pages of base that are not in the memfd yet, in a mapping
 * that a userfaultfd watches. See "Masked pages" in ARCHITECTURE.md and "ram_watch" in ram.h.
 */
#include "core/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BATCH_PAGES 64u

/* ---- entries; with the mask lock --------------------------------------------------------------- */

static bool names_file(uint64_t entry)
{
	return entry_source(entry) == ENTRY_MASKED && entry_file(entry) < ENTRY_FILES;
}

static bool names_spill(uint64_t entry)
{
	return entry_source(entry) == ENTRY_MASKED && entry_file(entry) == ENTRY_SPILL;
}

static bool names_peer(uint64_t entry)
{
	return entry_source(entry) == ENTRY_MASKED && entry_file(entry) == ENTRY_PEER;
}

static void count_out(struct ram *ram, uint64_t entry)
{
	ram->mask_counts.masked_now--;
	ram->expected -= names_peer(entry);
	if (names_file(entry))
		ram->files[entry_file(entry)].masked_pages--;
	if (names_spill(entry))
		spill_free(ram->reclaim.spill, entry_file_page(entry));
}

/* What the entry names can be read without the lock until it is let go. */
static void pin(struct ram *ram, uint64_t entry)
{
	if (names_spill(entry))
		spill_pin(ram->reclaim.spill, entry_file_page(entry));
}

static void let_go(struct ram *ram, uint64_t entry)
{
	if (names_spill(entry))
		spill_unpin(ram->reclaim.spill, entry_file_page(entry));
}

void mask_forget(struct ram *ram, uint64_t entry)
{
	count_out(ram, entry);
	ram->mask_counts.dropped++;
}

void mask_drop(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	reclaim_leave(ram, b, page, pages);
	for (uint64_t i = page; i < page + pages; i++) {
		uint64_t entry = entry_get(b, i);

		if (entry_source(entry) != ENTRY_MASKED)
			continue;
		mask_forget(ram, entry);
		entry_set(b, i, ENTRY_WATCHED);
	}
}

/* Its contents are there now. */
static void set_made(struct ram *ram, struct ram_block *b, uint64_t page)
{
	uint64_t entry = entry_get(b, page);

	count_out(ram, entry);
	if (names_file(entry))
		ram->mask_counts.copied++;
	else if (names_spill(entry))
		ram->reclaim.counts.returned++;
	else if (names_peer(entry))
		ram->mask_counts.put++;
	else
		ram->mask_counts.made++;
	entry_set(b, page, ENTRY_WATCHED);
}

/* ---- contents ---------------------------------------------------------------------------------- */

uint64_t word_at(const struct ram_words *words, uint64_t number)
{
	unsigned chunk = 63 - (unsigned)__builtin_clzll(number / WORDS_FIRST_CHUNK + 1);

	return words->chunks[chunk][number - WORDS_FIRST_CHUNK * ((1ull << chunk) - 1)];
}

/* What the page will hold; waits for storage, and so wants no lock. */
static int get_contents(struct ram *ram, uint64_t entry, void *page)
{
	uint64_t *word = page;

	if (names_file(entry)) {
		int r = os_fault(OS_FAULT_STORAGE_READ);

		return r ? r : os_read_all(ram->files[entry_file(entry)].fd, page, OS_PAGE_BYTES, os_bytes(entry_file_page(entry)));
	}
	if (names_spill(entry))
		return spill_read(ram->reclaim.spill, entry_file_page(entry), page);
	if (names_peer(entry))
		return -EINPROGRESS;
	for (size_t i = 0; i < OS_PAGE_BYTES / sizeof *word; i++)
		word[i] = word_at(&ram->words, entry_file_page(entry));
	return 0;
}

int mask_read(struct ram *ram, uint64_t entry, void *page) { return get_contents(ram, entry, page); }

void mask_rescue(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	uint64_t contents[OS_PAGE_BYTES / sizeof(uint64_t)];

	for (uint64_t i = page; i < page + pages; i++)
		if (entry_source(entry_get(b, i)) == ENTRY_MASKED && !get_contents(ram, entry_get(b, i), contents) &&
		    !os_write_all(b->memfd, contents, sizeof contents, memfd_at(b, i)))
			set_made(ram, b, i);
}

/* Puts it there, unless the page has become something else meanwhile. With the mask lock. */
static int put_contents(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t entry, const void *contents)
{
	int r = 0;

	if (entry_get(b, page) != entry)
		return 0;
	r = os_uffd_copy(ram->uffd, page_hva(b, page), contents);
	if (!r)
		set_made(ram, b, page);
	return r;
}

/* ---- a touched page ---------------------------------------------------------------------------- */

/* The masked pages around this one that one mapping of the file would hold. */
static uint64_t masked_run(const struct ram_block *b, uint64_t page, uint64_t *ret_first)
{
	uint64_t first = page, end = page + 1;

	while (first && entry_get(b, first - 1) + (1ull << ENTRY_PAGE_SHIFT) == entry_get(b, first))
		first--;
	while (end < b->pages && entry_get(b, end - 1) + (1ull << ENTRY_PAGE_SHIFT) == entry_get(b, end))
		end++;
	*ret_first = first;
	return end - first;
}

/* With both locks. The pages and their entry are no longer masked, and who waits for one of them goes on. */
static int map_run(struct ram *ram, struct ram_block *b, uint64_t page)
{
	uint64_t first, pages = masked_run(b, page, &first), entry = entry_get(b, first);
	uint64_t dropped = ram->mask_counts.dropped;
	int r = ram->files[entry_file(entry)].copy_only
			? -EACCES : map_overlay(ram, b, first, pages, entry_file(entry), entry_file_page(entry));

	if (r)
		return r;
	ram->mask_counts.dropped = dropped;
	ram->mask_counts.mapped += pages;
	os_uffd_wake(ram->uffd, page_hva(b, first), os_bytes(pages));
	return 0;
}

static int try_to_map(struct ram *ram, struct ram_block *b, uint64_t page)
{
	int r = -EBUSY;

	if (names_file(entry_get(b, page)) && ram_lock_if_free(ram)) {
		r = map_run(ram, b, page);
		ram_unlock(ram);
	}
	return r;
}

static struct ram_block *find_page(struct ram *ram, void *hva, uint64_t *ret_page)
{
	struct ram_block *b = ram_find(ram, hva, OS_PAGE_BYTES);

	if (b)
		*ret_page = (uint64_t)((uint8_t *)hva - b->hva) >> OS_PAGE_SHIFT;
	return b;
}

/* `*ret_entry`: what is to be copied there, pinned, or ENTRY_BASE when there is nothing to do. */
static int begin_page(struct ram *ram, void *hva, uint64_t *ret_entry)
{
	struct ram_block *b;
	uint64_t page, entry;
	int r = 0;

	*ret_entry = ENTRY_BASE;
	pthread_mutex_lock(&ram->mask_lock);
	b = find_page(ram, hva, &page);
	entry = b ? entry_get(b, page) : ENTRY_BASE;
	if (b)
		reclaim_touched(ram, b, page);
	if (entry_source(entry) == ENTRY_WATCHED)
		r = os_uffd_zero(ram->uffd, hva);
	else if (entry_source(entry) == ENTRY_MASKED && try_to_map(ram, b, page))
		*ret_entry = entry_get(b, page); /* not `entry`: a failure may have made it */
	pin(ram, *ret_entry);
	pthread_mutex_unlock(&ram->mask_lock);
	return r == -EEXIST || r == -ENOENT ? 0 : r;
}

/* `r`: what came of getting its contents. */
static int end_page(struct ram *ram, void *hva, uint64_t entry, const void *contents, int r)
{
	struct ram_block *b;
	uint64_t page;

	pthread_mutex_lock(&ram->mask_lock);
	let_go(ram, entry);
	b = find_page(ram, hva, &page);
	if (b && !r)
		r = put_contents(ram, b, page, entry, contents);
	pthread_mutex_unlock(&ram->mask_lock);
	return r;
}

int ram_make(struct ram *ram, void *hva)
{
	uint64_t contents[OS_PAGE_BYTES / sizeof(uint64_t)], entry;
	int r = begin_page(ram, hva, &entry);

	if (!r && entry_source(entry) == ENTRY_MASKED) {
		r = get_contents(ram, entry, contents);
		r = end_page(ram, hva, entry, contents, r);
	}
	if (!r)
		os_uffd_wake(ram->uffd, hva, OS_PAGE_BYTES);
	return r;
}

/* ---- masking ----------------------------------------------------------------------------------- */

void ram_watch(struct ram *ram, int uffd)
{
	assert_locked(ram);
	ram->uffd = uffd;
}

/* -ENOMEM. */
static int append_word(struct ram_words *w, uint64_t word)
{
	unsigned k = 63 - (unsigned)__builtin_clzll(w->count / WORDS_FIRST_CHUNK + 1);

	if (!w->chunks[k])
		w->chunks[k] = malloc((WORDS_FIRST_CHUNK << k) * sizeof word);
	if (!w->chunks[k])
		return -ENOMEM;
	w->chunks[k][w->count - WORDS_FIRST_CHUNK * ((1ull << k) - 1)] = word;
	w->count++;
	return 0;
}

int ram_add_word(struct ram *ram, uint64_t word, uint64_t *ret_number)
{
	struct ram_words *w = &ram->words;
	int r = 0;

	assert_locked(ram);
	pthread_mutex_lock(&ram->mask_lock);
	if (!w->count || word_at(w, w->count - 1) != word)
		r = append_word(w, word);
	if (!r)
		*ret_number = w->count - 1;
	pthread_mutex_unlock(&ram->mask_lock);
	return r;
}

/* Where memory is reclaimed, all that is watched is watched for writes, too; so it stays one mapping. */
static int watch_pages(struct ram *ram, void *hva, size_t bytes, bool single)
{
	return single || ram->reclaim.spill ? os_uffd_register_missing_wp(ram->uffd, hva, bytes)
					    : os_uffd_register_missing(ram->uffd, hva, bytes);
}

uint64_t mask_more_maps(const struct ram_block *b, uint64_t page, uint64_t pages)
{
	/* Its ends may become beginnings of mappings. */
	bool before = page && !entry_is_watched(entry_get(b, page - 1));
	bool behind = page + pages < b->pages && !entry_is_watched(entry_get(b, page + pages));

	return (uint64_t)before + behind;
}

void mask_set(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t entry)
{
	entry_set(b, page, entry);
	if (entry_source(entry) != ENTRY_MASKED)
		return;
	ram->mask_counts.masked_now++;
	ram->mask_counts.masked++;
	ram->expected += names_peer(entry);
	if (names_file(entry))
		ram->files[entry_file(entry)].masked_pages++;
}

static void set_masked(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages, const uint64_t *entries)
{
	uint64_t starts = count_starts(b, page, page + pages);

	reclaim_leave(ram, b, page, pages);
	for (uint64_t i = 0; i < pages; i++)
		mask_set(ram, b, page + i, entries[i]);
	ram->counts.maps += count_starts(b, page, page + pages) - starts;
}

int ram_mask(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages, const uint64_t *entries)
{
	int r;

	assert_locked(ram);
	if (ram->uffd < 0 || ram->base_held)
		return -EBUSY;
	if (!within_budget(ram, mask_more_maps(b, page, pages)))
		return -EDQUOT;
	ram_not_single(ram, b, page, pages); /* one userfaultfd a mapping */
	pthread_mutex_lock(&ram->mask_lock);
	r = watch_pages(ram, page_hva(b, page), os_bytes(pages), false);
	if (!r)
		set_masked(ram, b, page, pages, entries);
	pthread_mutex_unlock(&ram->mask_lock);
	return r;
}

int mask_watch(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	uint64_t starts = count_starts(b, page, page + pages);
	int r = watch_pages(ram, page_hva(b, page), os_bytes(pages), false);

	if (r)
		return r;
	for (uint64_t i = page; i < page + pages; i++)
		if (entry_source(entry_get(b, i)) == ENTRY_BASE)
			entry_set(b, i, ENTRY_WATCHED);
	ram->counts.maps += count_starts(b, page, page + pages) - starts;
	return 0;
}

/* With both locks; the pages are in one mapping, which shows no file. */
static int expect_run(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	int r = os_punch_hole(b->memfd, memfd_at(b, page), os_bytes(pages));

	if (!r && os_has_data(b->memfd, memfd_at(b, page), os_bytes(pages)))
		r = -EAGAIN; /* a large folio that could not be split: nobody would wait for its pages */
	if (!r)
		r = mask_watch(ram, b, page, pages);
	for (uint64_t i = page; !r && i < page + pages; i++) {
		mask_drop(ram, b, i, 1);
		mask_set(ram, b, i, entry_masked(ENTRY_PEER, 0));
	}
	return r;
}

int ram_expect(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	struct ram_range range;
	int r;

	assert_locked(ram);
	if (ram->uffd < 0 || ram->base_held)
		return -EBUSY;
	r = ram_return_base(ram, b, page, pages);
	if (!r && !within_budget(ram, mask_more_maps(b, page, pages)))
		r = -EDQUOT;
	for (uint64_t end = page + pages; !r && page < end; page += range.pages) {
		range = ram_range_at(b, page, end);
		if (range.source == ENTRY_BASE)
			ram_not_single(ram, b, page, range.pages); /* one userfaultfd a mapping */
		pthread_mutex_lock(&ram->mask_lock);
		r = expect_run(ram, b, page, range.pages);
		pthread_mutex_unlock(&ram->mask_lock);
	}
	return r;
}

int ram_watch_base(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	struct ram_range range;
	int r = 0;

	assert_locked(ram);
	if (ram->uffd < 0 || ram->base_held)
		return -EBUSY;
	for (uint64_t end = page + pages; !r && page < end; page += range.pages) {
		range = ram_range_at(b, page, end);
		if (range.source != ENTRY_BASE)
			continue;
		if (!within_budget(ram, mask_more_maps(b, page, range.pages)))
			return -EDQUOT;
		ram_not_single(ram, b, page, range.pages); /* one userfaultfd a mapping */
		pthread_mutex_lock(&ram->mask_lock);
		r = mask_watch(ram, b, page, range.pages);
		pthread_mutex_unlock(&ram->mask_lock);
	}
	return r;
}

int ram_put(struct ram *ram, void *hva, const void *contents, bool *ret_put)
{
	struct ram_block *b;
	uint64_t page;
	int r = 0;

	pthread_mutex_lock(&ram->mask_lock);
	b = find_page(ram, hva, &page);
	*ret_put = b && names_peer(entry_get(b, page));
	if (*ret_put)
		r = put_contents(ram, b, page, entry_get(b, page), contents);
	pthread_mutex_unlock(&ram->mask_lock);
	return r;
}

uint64_t ram_expected(struct ram *ram)
{
	uint64_t expected;

	pthread_mutex_lock(&ram->mask_lock);
	expected = ram->expected;
	pthread_mutex_unlock(&ram->mask_lock);
	return expected;
}

static int watch_writes_of(struct ram *ram, struct ram_block *b)
{
	struct ram_range range;
	int r = 0;

	for (uint64_t page = 0; !r && page < b->pages; page += range.pages) {
		range = ram_range_at(b, page, b->pages);
		if (range.source == ENTRY_WATCHED)
			r = watch_pages(ram, page_hva(b, page), os_bytes(range.pages), true);
	}
	return r;
}

int mask_watch_writes(struct ram *ram)
{
	int r = 0;

	for (size_t slot = 0; !r && slot < RAM_BLOCKS; slot++)
		if (ram->blocks[slot])
			r = watch_writes_of(ram, ram->blocks[slot]);
	return r;
}

int mask_single(struct ram *ram, void *hva, size_t bytes, bool on)
{
	int r;

	pthread_mutex_lock(&ram->mask_lock);
	r = watch_pages(ram, hva, bytes, on);
	pthread_mutex_unlock(&ram->mask_lock);
	return r;
}

/* ---- making all of it -------------------------------------------------------------------------- */

struct batch {
	struct ram_block *block;
	uint64_t page[BATCH_PAGES], entry[BATCH_PAGES];
	bool failed[BATCH_PAGES];
	size_t count;
	uint8_t *contents;
};

/* Masked pages from `*page` on: of the file, or all (file < 0). False: there are none. */
static bool next_batch(struct ram *ram, size_t slot, uint64_t *page, int file, struct batch *batch)
{
	struct ram_block *b;

	batch->count = 0;
	pthread_mutex_lock(&ram->mask_lock);
	b = batch->block = ram->blocks[slot];
	for (; b && *page < b->pages && batch->count < BATCH_PAGES; (*page)++) {
		uint64_t entry = entry_get(b, *page);

		if (entry_source(entry) != ENTRY_MASKED || (file >= 0 && entry_file(entry) != (unsigned)file))
			continue;
		pin(ram, entry);
		batch->page[batch->count] = *page;
		batch->failed[batch->count] = false;
		batch->entry[batch->count++] = entry;
	}
	pthread_mutex_unlock(&ram->mask_lock);
	return batch->count;
}

static void unpin_batch(struct ram *ram, const struct batch *batch)
{
	for (size_t i = 0; i < batch->count; i++)
		let_go(ram, batch->entry[i]);
}

static int make_batch(struct ram *ram, size_t slot, struct batch *batch)
{
	int r = 0;

	for (size_t i = 0; i < batch->count; i++)
		if (names_spill(batch->entry[i]))
			spill_expect_read(ram->reclaim.spill, entry_file_page(batch->entry[i]));
	for (size_t i = 0; i < batch->count; i++) {
		int one = get_contents(ram, batch->entry[i], batch->contents + os_bytes(i));

		batch->failed[i] = one;
		r = r ? r : one;
	}
	pthread_mutex_lock(&ram->mask_lock);
	unpin_batch(ram, batch);
	for (size_t i = 0; i < batch->count && ram->blocks[slot] == batch->block; i++) {
		int one = batch->failed[i]
				  ? 0
				  : put_contents(ram, batch->block, batch->page[i], batch->entry[i],
						 batch->contents + os_bytes(i));

		r = r ? r : one;
	}
	pthread_mutex_unlock(&ram->mask_lock);
	return r;
}

/* So many pages, or some more. */
static int copy_some(struct ram *ram, int file, uint64_t pages)
{
	struct batch batch = { .contents = malloc(os_bytes(BATCH_PAGES)) };
	int r = batch.contents ? 0 : -ENOMEM;
	uint64_t done = 0;

	for (size_t slot = 0; batch.contents && slot < RAM_BLOCKS; slot++)
		for (uint64_t page = 0; done < pages && next_batch(ram, slot, &page, file, &batch);) {
			int one = make_batch(ram, slot, &batch);

			r = r ? r : one;
			done += batch.count;
		}
	free(batch.contents);
	return r;
}

static int copy_all(struct ram *ram, int file) { return copy_some(ram, file, UINT64_MAX); }

int ram_unmask_file(struct ram *ram, unsigned file)
{
	uint64_t left;

	pthread_mutex_lock(&ram->mask_lock);
	ram->files[file].copy_only = true;
	left = ram->files[file].masked_pages;
	pthread_mutex_unlock(&ram->mask_lock);
	return left ? copy_all(ram, (int)file) : 0;
}

/* One run at a time under the range lock. */
static void map_all(struct ram *ram)
{
	for (size_t slot = 0; slot < RAM_BLOCKS; slot++) {
		struct batch batch;

		for (uint64_t page = 0; next_batch(ram, slot, &page, -1, &batch);) {
			ram_lock(ram);
			pthread_mutex_lock(&ram->mask_lock);
			for (size_t i = 0; i < batch.count && ram->blocks[slot] == batch.block; i++)
				if (names_file(entry_get(batch.block, batch.page[i])))
					(void)map_run(ram, batch.block, batch.page[i]);
			unpin_batch(ram, &batch);
			pthread_mutex_unlock(&ram->mask_lock);
			ram_unlock(ram);
		}
	}
}

/* A watched range in which nothing is masked any more becomes plain base. */
static int end_watch(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	uint64_t starts = count_starts(b, page, page + pages);
	int r;

	for (uint64_t i = page; i < page + pages; i++)
		if (entry_source(entry_get(b, i)) == ENTRY_MASKED)
			return -EAGAIN;
	reclaim_leave(ram, b, page, pages);
	r = os_uffd_unregister(ram->uffd, page_hva(b, page), os_bytes(pages));
	if (r)
		return r;
	for (uint64_t i = page; i < page + pages; i++)
		entry_set(b, i, ENTRY_BASE);
	ram->counts.maps += count_starts(b, page, page + pages) - starts;
	return 0;
}

static int end_watches(struct ram *ram)
{
	int r = 0;

	ram_lock(ram);
	pthread_mutex_lock(&ram->mask_lock);
	for (size_t slot = 0; slot < RAM_BLOCKS; slot++) {
		struct ram_block *b = ram->blocks[slot];
		struct ram_range range;

		for (uint64_t page = 0; b && page < b->pages; page = range.page + range.pages) {
			int one;

			range = ram_range_at(b, page, b->pages);
			one = range.source == ENTRY_WATCHED ? end_watch(ram, b, page, range.pages) : 0;
			r = r ? r : one;
		}
	}
	pthread_mutex_unlock(&ram->mask_lock);
	ram_unlock(ram);
	return r;
}

int ram_return_reclaimed(struct ram *ram, uint64_t pages, uint64_t *ret_left)
{
	struct ram_reclaim_counts c;
	int r;

	ram_get_reclaim_counts(ram, &c);
	r = c.spilled_now ? copy_some(ram, ENTRY_SPILL, pages) : 0;
	ram_get_reclaim_counts(ram, &c);
	*ret_left = c.spilled_now;
	return r;
}

int ram_unmask(struct ram *ram)
{
	int r;

	map_all(ram);
	r = copy_all(ram, -1);
	return r ? r : end_watches(ram);
}

int ram_unmask_part(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages)
{
	struct ram_range range;
	int r = 0;

	assert_locked(ram);
	pthread_mutex_lock(&ram->mask_lock);
	for (uint64_t i = page; i < page + pages; i += range.pages) {
		int one = 0;

		range = ram_range_at(b, i, page + pages);
		if (range.source != ENTRY_WATCHED)
			continue;
		mask_rescue(ram, b, i, range.pages);
		one = end_watch(ram, b, i, range.pages);
		r = r ? r : one;
	}
	pthread_mutex_unlock(&ram->mask_lock);
	return r;
}

void ram_get_mask_counts(struct ram *ram, struct ram_mask_counts *ret_counts)
{
	pthread_mutex_lock(&ram->mask_lock);
	*ret_counts = ram->mask_counts;
	pthread_mutex_unlock(&ram->mask_lock);
}
