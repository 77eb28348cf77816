/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Memory of base given back to the host, while the guest runs; see "Reclaim" in ARCHITECTURE.md. A unit of pages goes
 * through three steps:
 *   begin   under both locks: the unit's mapping is watched, and the wanted pages are write-protected;
 *   pack    with no lock: what they hold goes to the store, and, where that is a file, to the disk. Who writes one of
 *           them waits, until the thread that makes pages takes the page out of the unit (reclaim_touched) and lets him
 *           go on;
 *   take    under both locks: pages that nobody has touched are masked and punched. Who waits then is woken, touches a
 *           page that is not there, and gets it from the store.
 * What shows a file stays as it is mapped; the page cache is told to drop what nobody has in a page table.
 */
#include "core/internal.h"

#include "os/probe.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WORDS_MOST 256u /* distinct words that reclaim may mask: they are never forgotten */
#define PUNCHES_MAX 64u /* under the locks at once */

/* A unit, as the thread that reclaims it sees it with no lock. */
struct unit {
	struct ram *ram;
	struct ram_block *block; /* may be gone: compared only, and used when ram->reclaim.block is the same */
	uint64_t page, pages;
	int memfd;             /* a duplicate; of an overlay: its file */
	uint64_t memfd_offset; /* of the unit's first page */
	bool overlay;
	const void *hva; /* of an overlay */
	bool wanted[RAM_RECLAIM_PAGES];
	uint64_t becomes[RAM_RECLAIM_PAGES]; /* the page's next entry; ENTRY_BASE: it stays */
};

static void lock_both(struct ram *ram)
{
	ram_lock(ram);
	pthread_mutex_lock(&ram->mask_lock);
}

static void unlock_both(struct ram *ram)
{
	pthread_mutex_unlock(&ram->mask_lock);
	ram_unlock(ram);
}

/* ---- from the outside; see internal.h ------------------------------------------------------------ */

void reclaim_leave(struct ram *ram, const struct ram_block *b, uint64_t page, uint64_t pages)
{
	struct ram_reclaim *c = &ram->reclaim;
	uint64_t first, end;

	if (c->block != b)
		return;
	first = page > c->page ? page : c->page;
	end = page + pages < c->page + c->pages ? page + pages : c->page + c->pages;
	/* Not taken already: it may be an overlay by now, and the mask lock not ours. */
	for (; first < end; first++) {
		if (!c->take[first - c->page])
			continue;
		c->take[first - c->page] = false;
		c->counts.left_touched++;
	}
}

void reclaim_touched(struct ram *ram, struct ram_block *b, uint64_t page)
{
	const struct ram_reclaim *c = &ram->reclaim;

	if (c->block != b || page < c->page || page - c->page >= c->pages)
		return;
	/* Also a page that was left before: it may still be protected. */
	reclaim_leave(ram, b, page, 1);
	(void)os_uffd_protect(ram->uffd, page_hva(b, page), OS_PAGE_BYTES, false);
}

/* Of what is still watched; the rest lost it with its mapping. Wakes who waits. */
static void unprotect(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t end)
{
	for (struct ram_range range; page < end; page += range.pages) {
		range = ram_range_at(b, page, end);
		if (range.source == ENTRY_WATCHED)
			(void)os_uffd_protect(ram->uffd, page_hva(b, page), os_bytes(range.pages),
					      false);
	}
}

void reclaim_cancel(struct ram *ram)
{
	struct ram_reclaim *c = &ram->reclaim;

	if (c->block)
		unprotect(ram, c->block, c->page, c->page + c->pages);
	c->block = NULL;
}

/* ---- reads in flight ------------------------------------------------------------------------------ */

void ram_read_begins(struct ram *ram, struct ram_read *read)
{
	struct ram_reclaim *c = &ram->reclaim;

	pthread_mutex_lock(&c->reads_lock);
	read->previous = NULL;
	read->next = c->reads;
	if (c->reads)
		c->reads->previous = read;
	c->reads = read;
	pthread_mutex_unlock(&c->reads_lock);
}

void ram_read_ends(struct ram *ram, struct ram_read *read)
{
	struct ram_reclaim *c = &ram->reclaim;

	pthread_mutex_lock(&c->reads_lock);
	if (read->previous)
		read->previous->next = read->next;
	else
		c->reads = read->next;
	if (read->next)
		read->next->previous = read->previous;
	pthread_mutex_unlock(&c->reads_lock);
}

/* What a buffer of the read has in the unit stays. Returns its pages. */
static uint64_t leave_buffer(struct ram *ram, const struct iovec *iov)
{
	struct ram_reclaim *c = &ram->reclaim;
	uintptr_t unit = (uintptr_t)page_hva(c->block, c->page), end = unit + os_bytes(c->pages);
	uintptr_t from = (uintptr_t)iov->iov_base, to = from + iov->iov_len;
	uint64_t left = 0;

	from = from > unit ? from : unit;
	to = to < end ? to : end;
	for (; from < to; from = (from | (OS_PAGE_BYTES - 1)) + 1) {
		bool *take = &c->take[(from - unit) >> OS_PAGE_SHIFT];

		left += *take;
		*take = false;
	}
	return left;
}

/*
 * With the mask lock, after the pages were protected: who begins to read later has to fault to get hold
 * of one. A read that has ended by now has written all that it will write, and nothing was taken yet.
 */
static void leave_reads(struct ram *ram)
{
	struct ram_reclaim *c = &ram->reclaim;

	pthread_mutex_lock(&c->reads_lock);
	for (const struct ram_read *read = c->reads; read; read = read->next)
		for (int i = 0; i < read->count; i++)
			c->counts.left_reads += leave_buffer(ram, &read->iov[i]);
	pthread_mutex_unlock(&c->reads_lock);
}

/* ---- begin; under both locks ----------------------------------------------------------------------- */

/* Calls for each longest run of pages that are wanted; ends at the first failure. */
static int protect_wanted(struct unit *u)
{
	struct ram_reclaim *c = &u->ram->reclaim;
	int r = 0;

	for (uint64_t i = 0, end; !r && i < u->pages; i = end + 1) {
		for (end = i; end < u->pages && u->wanted[end]; end++)
			c->take[end] = true;
		if (end > i)
			r = os_uffd_protect(u->ram->uffd, page_hva(u->block, u->page + i),
					    os_bytes(end - i), true);
	}
	return r;
}

static int protect(struct unit *u)
{
	struct ram_reclaim *c = &u->ram->reclaim;
	int r;

	c->block = u->block;
	c->page = u->page;
	c->pages = u->pages;
	memset(c->take, 0, sizeof c->take);
	r = protect_wanted(u);
	if (r)
		reclaim_cancel(u->ram);
	else
		leave_reads(u->ram);
	return r;
}

static bool find_wanted(struct unit *u, ram_wanted wanted, void *ctx)
{
	bool any = false;

	for (uint64_t i = 0; i < u->pages; i++) {
		uint64_t entry =
			atomic_load_explicit(&u->block->entries[u->page + i], memory_order_relaxed);

		u->wanted[i] = entry_source(entry) != ENTRY_MASKED && !entry_is_private(entry) &&
			       wanted(ctx, entry);
		any |= u->wanted[i];
	}
	return any;
}

static int duplicate(struct unit *u, int fd, uint64_t offset)
{
	u->memfd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	u->memfd_offset = offset;
	return u->memfd < 0 ? -errno : 0;
}

static int begin_overlay(struct unit *u, const struct ram_range *range)
{
	u->overlay = true;
	u->hva = page_hva(u->block, u->page);
	return duplicate(u, u->ram->files[range->file].fd, os_bytes(range->file_page));
}

/* Watches the unit and protects what is wanted of it. */
static int begin_watched(struct unit *u)
{
	struct ram *ram = u->ram;
	bool watched = entry_is_watched(entry_get(u->block, u->page));
	int r;

	if (!watched && !within_budget(ram, mask_more_maps(u->block, u->page, u->pages)))
		return -EDQUOT;
	if (!watched)
		ram_not_single(ram, u->block, u->page, u->pages); /* one userfaultfd a mapping */
	r = duplicate(u, u->block->memfd, memfd_at(u->block, u->page));
	if (r)
		return r;
	pthread_mutex_lock(&ram->mask_lock);
	r = mask_watch(ram, u->block, u->page, u->pages);
	if (!r)
		r = protect(u);
	pthread_mutex_unlock(&ram->mask_lock);
	if (r)
		close(u->memfd);
	return r;
}

/* With the range lock. 1: there is something to pack, and a duplicate of the memfd. */
static int begin(struct unit *u, unsigned slot, uint64_t count, ram_wanted wanted, void *ctx)
{
	struct ram *ram = u->ram;
	struct ram_range range;
	int r;

	u->block = ram_block_at(ram, slot);
	if (!u->block || u->page >= u->block->pages || !count)
		return -ENOENT;
	count = count < RAM_RECLAIM_PAGES ? count : RAM_RECLAIM_PAGES;
	count = count < u->block->pages - u->page ? count : u->block->pages - u->page;
	range = ram_range_at(u->block, u->page, u->page + count);
	u->pages = range.pages;
	if (!ram->reclaim.allowed || ram->base_held)
		return -EBUSY;
	if (!find_wanted(u, wanted, ctx))
		return 0;
	r = range.source == ENTRY_OVERLAY ? begin_overlay(u, &range) : begin_watched(u);
	return r ? r : 1;
}

/* ---- pack; with no lock ----------------------------------------------------------------------------- */

/* A word that is masked without a number of its own to come; false: there are too many of them. */
static bool find_word(struct ram *ram, uint64_t word, uint64_t *ret_number)
{
	uint64_t count;

	pthread_mutex_lock(&ram->mask_lock);
	count = ram->words.count < WORDS_MOST ? ram->words.count : WORDS_MOST;
	while (count && word_at(&ram->words, count - 1) != word)
		count--;
	*ret_number = count - 1;
	pthread_mutex_unlock(&ram->mask_lock);
	return count;
}

static bool add_word(struct ram *ram, uint64_t word, uint64_t *ret_number)
{
	bool added;

	ram_lock(ram);
	added = ram->words.count < WORDS_MOST && !ram_add_word(ram, word, ret_number);
	ram_unlock(ram);
	return added;
}

static bool is_one_word(const uint64_t *page)
{
	return !memcmp(page, page + 1, OS_PAGE_BYTES - sizeof *page);
}

static void count_one(struct ram *ram, uint64_t *counter)
{
	pthread_mutex_lock(&ram->mask_lock);
	(*counter)++;
	pthread_mutex_unlock(&ram->mask_lock);
}

/* To the store. */
static int spill(struct unit *u, const uint64_t *page, uint64_t *ret_becomes)
{
	struct ram *ram = u->ram;
	struct spill *s = ram->reclaim.spill;
	uint8_t packed[OS_PAGE_BYTES];
	size_t bytes = spill_pack(s, page, packed);
	uint64_t slot;
	int r;

	if (!bytes) {
		count_one(ram, &ram->reclaim.counts.left_unpacked);
		return 0;
	}
	pthread_mutex_lock(&ram->mask_lock);
	r = spill_reserve(s, bytes, &slot);
	pthread_mutex_unlock(&ram->mask_lock);
	if (r)
		return r;
	r = spill_write(s, slot, packed, bytes);
	if (!r) {
		*ret_becomes = entry_masked(ENTRY_SPILL, slot);
		return 0;
	}
	pthread_mutex_lock(&ram->mask_lock);
	spill_free(s, slot);
	pthread_mutex_unlock(&ram->mask_lock);
	return r;
}

static int pack_page(struct unit *u, uint64_t i)
{
	uint64_t page[OS_PAGE_BYTES / sizeof(uint64_t)], number;
	int r = os_read_all(u->memfd, page, sizeof page, u->memfd_offset + os_bytes(i));

	if (r)
		return r;
	if (!is_one_word(page))
		return spill(u, page, &u->becomes[i]);
	if (!page[0])
		u->becomes[i] = ENTRY_WATCHED;
	else if (find_word(u->ram, page[0], &number) || add_word(u->ram, page[0], &number))
		u->becomes[i] = entry_masked(ENTRY_WORDS, number);
	else
		return spill(u, page, &u->becomes[i]);
	return 0;
}

/* The first run from `*page` on that holds anything. */
static bool next_data(const struct unit *u, uint64_t *page, uint64_t *ret_end)
{
	uint64_t from, to;

	if (*page >= u->pages || !os_next_data(u->memfd, u->memfd_offset + os_bytes(*page),
					       u->memfd_offset + os_bytes(u->pages), &from, &to))
		return false;
	*page = (from - u->memfd_offset) >> OS_PAGE_SHIFT;
	*ret_end = (to - u->memfd_offset) >> OS_PAGE_SHIFT;
	return true;
}

/* Nobody has touched it yet. */
static bool is_to_take(struct unit *u, uint64_t i)
{
	struct ram_reclaim *c = &u->ram->reclaim;
	bool take;

	if (!u->wanted[i])
		return false;
	pthread_mutex_lock(&u->ram->mask_lock);
	take = c->block == u->block && c->take[i];
	pthread_mutex_unlock(&u->ram->mask_lock);
	return take;
}

static int pack_pages(struct unit *u)
{
	uint64_t end;
	int r = 0;

	for (uint64_t page = 0; !r && next_data(u, &page, &end); page = end)
		for (uint64_t i = page; !r && i < end; i++) {
			r = is_to_take(u, i) ? pack_page(u, i) : 0;
			if (r)
				count_one(u->ram, &u->ram->reclaim.counts.left_failed);
		}
	return r;
}

static bool names_slot(uint64_t entry)
{
	return entry_source(entry) == ENTRY_MASKED && entry_file(entry) == ENTRY_SPILL;
}

static void free_slot(struct ram *ram, uint64_t entry)
{
	if (names_slot(entry))
		spill_free(ram->reclaim.spill, entry_file_page(entry));
}

/* Nobody knows what became of what was written for this unit: its pages stay. */
static void forget_slots(struct unit *u)
{
	pthread_mutex_lock(&u->ram->mask_lock);
	for (uint64_t i = 0; i < u->pages; i++) {
		if (!names_slot(u->becomes[i]))
			continue;
		free_slot(u->ram, u->becomes[i]);
		u->becomes[i] = ENTRY_BASE;
		u->ram->reclaim.counts.left_failed++;
	}
	pthread_mutex_unlock(&u->ram->mask_lock);
}

/* No page is taken before it is known to be where it shall be. */
static int pack(struct unit *u)
{
	int r = pack_pages(u), flushed = spill_flush(u->ram->reclaim.spill);

	if (flushed)
		forget_slots(u);
	return r ? r : flushed;
}

/* ---- take; under both locks -------------------------------------------------------------------------- */

static void count_taken(struct ram_reclaim_counts *c, uint64_t entry)
{
	if (entry_source(entry) != ENTRY_MASKED)
		c->zeros++;
	else if (entry_file(entry) == ENTRY_SPILL)
		c->spilled++;
	else
		c->words++;
}

static bool may_take(const struct unit *u, uint64_t i)
{
	const struct ram_reclaim *c = &u->ram->reclaim;

	return c->block == u->block && c->allowed && !u->ram->base_held && c->take[i] &&
	       u->becomes[i] != ENTRY_BASE && entry_get(u->block, u->page + i) == ENTRY_WATCHED;
}

/* The punch has made zeros of it, and left it there. It is protected still, so nobody has written it since. */
static int put_back(struct unit *u, uint64_t i)
{
	uint64_t page[OS_PAGE_BYTES / sizeof(uint64_t)];
	int r = 0;

	u->ram->reclaim.counts.left_failed++;
	if (u->becomes[i] == ENTRY_WATCHED) /* it was all zeros */
		return 0;
	r = mask_read(u->ram, u->becomes[i], page);
	return r ? r : os_write_all(u->memfd, page, sizeof page, u->memfd_offset + os_bytes(i));
}

static void note_taken(struct unit *u, uint64_t i)
{
	mask_set(u->ram, u->block, u->page + i, u->becomes[i]);
	count_taken(&u->ram->reclaim.counts, u->becomes[i]);
	u->becomes[i] = ENTRY_BASE;
	u->ram->reclaim.take[i] = false;
}

/*
 * Nobody writes the pages between the steps, nor finds them missing: he would wait for the mask lock. A part of a large
 * folio that cannot be split just then, for somebody holds a page of it, is no hole after the punch.
 */
static int take_run(struct unit *u, uint64_t first, uint64_t end)
{
	uint64_t at = u->memfd_offset + os_bytes(first), from, to;
	int r = os_punch_hole(u->memfd, at, os_bytes(end - first));
	bool left;

	if (r) { /* of all, or of none */
		u->ram->reclaim.counts.left_failed += end - first;
		return r;
	}
	left = os_has_data(u->memfd, at, os_bytes(end - first));
	for (uint64_t i = first; i < end; i++) {
		at = u->memfd_offset + os_bytes(i);
		if (left && os_next_data(u->memfd, at, at + OS_PAGE_BYTES, &from, &to)) {
			int one = put_back(u, i);

			r = r ? r : one;
		} else {
			note_taken(u, i);
		}
	}
	return r;
}

/* From page `*i` on, as much as may be done at once; what cannot be taken is forgotten. */
static int take_some(struct unit *u, uint64_t *i)
{
	struct ram *ram = u->ram;
	unsigned punches = 0;
	int r = 0;

	lock_both(ram);
	for (uint64_t end; *i < u->pages && punches < PUNCHES_MAX; *i = end) {
		for (end = *i; end < u->pages && may_take(u, end); end++)
			;
		if (end == *i) {
			end++;
		} else {
			int one = take_run(u, *i, end);

			punches++;
			r = r ? r : one;
		}
		for (uint64_t n = *i; n < end; n++)
			free_slot(ram, u->becomes[n]);
	}
	if (*i == u->pages && ram->reclaim.block == u->block)
		reclaim_cancel(ram);
	unlock_both(ram);
	return r;
}

static int take(struct unit *u)
{
	int r = 0;

	for (uint64_t i = 0; i < u->pages;) {
		int one = take_some(u, &i);

		r = r ? r : one;
	}
	return r;
}

/* ---- overlays; with no lock --------------------------------------------------------------------------- */

/* The mapping stays: who touches a page reads it from the file again. It may be another one by now,
 * which matters to the count alone. */
static void drop_run(struct unit *u, uint64_t first, uint64_t end)
{
	uint64_t before = os_resident_pages(u->hva, os_bytes(first), end - first), after;

	os_drop_cached(u->memfd, u->memfd_offset + os_bytes(first), os_bytes(end - first));
	after = os_resident_pages(u->hva, os_bytes(first), end - first);
	pthread_mutex_lock(&u->ram->mask_lock);
	u->ram->reclaim.counts.clean += before > after ? before - after : 0;
	pthread_mutex_unlock(&u->ram->mask_lock);
}

static void drop(struct unit *u)
{
	for (uint64_t i = 0, end; i < u->pages; i = end + 1) {
		for (end = i; end < u->pages && u->wanted[end]; end++)
			;
		if (end > i)
			drop_run(u, i, end);
	}
}

/* ---- all of it ---------------------------------------------------------------------------------------- */

int ram_reclaim(struct ram *ram, unsigned slot, uint64_t page, uint64_t count, ram_wanted wanted,
		void *ctx, uint64_t *ret_pages)
{
	struct unit u = { .ram = ram, .page = page };
	int r, r2 = 0;

	ram_lock(ram);
	r = begin(&u, slot, count, wanted, ctx);
	ram_unlock(ram);
	if (r != -ENOENT)
		*ret_pages = u.pages;
	if (r <= 0)
		return r;
	r = u.overlay ? 0 : pack(&u);
	if (u.overlay)
		drop(&u);
	else
		r2 = take(&u);
	close(u.memfd);
	return r ? r : r2;
}

/* ---- what is cached of a file -------------------------------------------------------------------------- */

/* A bit for each page of the file that is to stay. */
struct kept {
	int fd; /* a duplicate */
	uint64_t pages;
	uint8_t *bits;
};

static int begin_kept(struct ram *ram, unsigned file, struct kept *k)
{
	int r = 0;

	ram_lock(ram);
	if (!ram->reclaim.allowed || ram->base_held) {
		r = -EBUSY;
	} else if (file >= ENTRY_FILES || !ram->files[file].used) {
		r = -ENOENT;
	} else {
		k->pages = ram->files[file].pages;
		k->fd = fcntl(ram->files[file].fd, F_DUPFD_CLOEXEC, 0);
		r = k->fd < 0 ? -errno : 0;
	}
	ram_unlock(ram);
	k->bits = r ? NULL : calloc(k->pages / 8 + 1, 1);
	if (!r && !k->bits) {
		close(k->fd);
		r = -ENOMEM;
	}
	return r;
}

/* Of so many pages of the block in the slot at most; returns how many there were. */
static uint64_t keep_some(struct ram *ram, struct kept *k, unsigned file, unsigned slot, uint64_t first,
			  ram_wanted wanted, void *ctx)
{
	const struct ram_block *b;
	uint64_t page = first;

	ram_lock(ram);
	b = ram_block_at(ram, slot);
	for (; b && page < b->pages && page < first + RAM_RECLAIM_PAGES; page++) {
		uint64_t entry = atomic_load_explicit(&b->entries[page], memory_order_relaxed),
			 at = entry_file_page(entry);

		if (entry_source(entry) == ENTRY_OVERLAY && entry_file(entry) == file &&
		    !entry_is_private(entry) && at < k->pages && !wanted(ctx, entry))
			k->bits[at / 8] = (uint8_t)(k->bits[at / 8] | 1u << at % 8);
	}
	ram_unlock(ram);
	return page - first;
}

static bool is_kept(const struct kept *k, uint64_t page) { return k->bits[page / 8] >> page % 8 & 1; }

static uint64_t drop_all_but_kept(const struct kept *k)
{
	uint64_t before = os_cached_pages(k->fd, 0, os_bytes(k->pages)), after;

	for (uint64_t page = 0, end; page < k->pages; page = end + 1) {
		for (end = page; end < k->pages && !is_kept(k, end); end++)
			;
		if (end > page)
			os_drop_cached(k->fd, os_bytes(page), os_bytes(end - page));
	}
	after = os_cached_pages(k->fd, 0, os_bytes(k->pages));
	return before != UINT64_MAX && before > after ? before - after : 0;
}

int ram_reclaim_cache(struct ram *ram, unsigned file, ram_wanted wanted, void *ctx)
{
	struct kept k;
	uint64_t dropped;
	int r = begin_kept(ram, file, &k);

	if (r)
		return r;
	for (unsigned slot = 0; slot < RAM_BLOCKS; slot++)
		for (uint64_t page = 0, pages;
		     (pages = keep_some(ram, &k, file, slot, page, wanted, ctx)); page += pages)
			;
	dropped = drop_all_but_kept(&k);
	pthread_mutex_lock(&ram->mask_lock);
	ram->reclaim.counts.clean += dropped;
	pthread_mutex_unlock(&ram->mask_lock);
	free(k.bits);
	close(k.fd);
	return 0;
}

/* ---- the store's places --------------------------------------------------------------------------------- */

static int open_spill(struct ram *ram)
{
	struct ram_reclaim *c = &ram->reclaim;
	int r = spill_open(&c->spill);

	if (r)
		return r;
	r = mask_watch_writes(ram);
	if (r) {
		spill_close(c->spill);
		c->spill = NULL;
	}
	return r;
}

int ram_reclaim_open(struct ram *ram, int fd, uint64_t most_bytes, bool in_memory)
{
	struct ram_reclaim *c = &ram->reclaim;
	bool first;
	int r = 0;

	lock_both(ram);
	first = !c->spill;
	if (ram->uffd < 0 || !(os_features_get()->uffd_features & OS_UFFD_WP_HUGETLBFS_SHMEM))
		r = -EOPNOTSUPP;
	else if (first)
		r = open_spill(ram);
	if (!r)
		r = spill_add(c->spill, in_memory ? SPILL_MEMORY : SPILL_FILE, fd, most_bytes);
	if (r && first) {
		spill_close(c->spill);
		c->spill = NULL;
	}
	if (!r && first)
		c->allowed = true;
	unlock_both(ram);
	return r;
}

void ram_reclaim_allow(struct ram *ram, bool allowed)
{
	lock_both(ram);
	ram->reclaim.allowed = allowed && ram->reclaim.spill;
	if (!allowed)
		reclaim_cancel(ram);
	unlock_both(ram);
}

void ram_get_reclaim_counts(struct ram *ram, struct ram_reclaim_counts *ret_counts)
{
	struct spill_counts memory = { 0 }, file = { 0 };

	pthread_mutex_lock(&ram->mask_lock);
	*ret_counts = ram->reclaim.counts;
	if (ram->reclaim.spill) {
		spill_count(ram->reclaim.spill, SPILL_MEMORY, &memory);
		spill_count(ram->reclaim.spill, SPILL_FILE, &file);
	}
	pthread_mutex_unlock(&ram->mask_lock);
	ret_counts->spilled_now = memory.slots_now + file.slots_now;
	ret_counts->spill_bytes_now = memory.taken_now;
	ret_counts->spill_file_bytes_now = file.taken_now;
	ret_counts->spill_file_most_bytes = file.most_bytes;
}
