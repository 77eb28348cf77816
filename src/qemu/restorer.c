/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The agent's part of a restore: guest RAM begins as a snapshot says. A thread does it while QEMU makes its machine,
 * which does not look at guest RAM; who changes it, or what it comes from, waits (restorer_wait). See "Restore" in
 * ARCHITECTURE.md. Of each page one is chosen:
 *
 *   nothing  it is zero, as base is
 *   copy     its contents go to base now: the guest will write it soon, or it is in use and storage is cold
 *            (then all such pages are read in one piece)
 *   map      it is part of a long run of one file, which is mapped there; nothing is read
 *   mask     a word that is repeated, or a short run: made when it is touched (core/mask.c)
 *
 * Where pages cannot be masked, words are written and short runs are mapped, or read. With a pager the snapshot's RAM
 * is its cache, of which every run is mapped, or read when it is whole (qemu/lazy.c).
 */
#include "qemu/agent.h"

#include "os/os.h"
#include "snapshot/active.h"
#include "snapshot/image.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xxhash.h>

#define GAP_PAGES 32u         /* zeros between stored pages that are mapped along, as the snapshot's holes */
#define MAP_PAGES 16u         /* a run as long as this is mapped at once */
#define WATCHED_GAP_PAGES 64u /* zeros within a range of masked pages: each costs a fault that is served here */
#define CHUNK_PAGES 32u       /* small enough for a processor's cache */
#define AHEAD_GAP_PAGES 8u /* are read along with those around them */
#define SAMPLES 128u

struct fill {
	struct agent *agent;
	struct ram_block *block;
	const struct snapshot_image *image;
	const struct snapshot_page *table; /* of the block */
	uint64_t pages, ram_page;
	struct volume *ram, *volume[AGENT_RESTORE_VOLUMES]; /* NULL: it cannot be mapped, and is read */
	struct active_set active, learned;
	bool masks;         /* pages can be masked, */
	bool mask_ram, mask_volume[AGENT_RESTORE_VOLUMES]; /* if these files cannot change */
	bool *copied;       /* of each page: its contents are in base */
	uint8_t *use;       /* of each page, enum use */
	uint64_t *entries;  /* of the masked range that grows */
	uint64_t first, end; /* that range; end: behind its last masked or copied page. first == end: none */
	uint64_t masked;    /* pages of it */
};

enum use { NOT_IN_USE, IN_USE, IN_USE_WRITTEN };

/* Pages that come from one place of one file. */
struct stretch {
	struct volume *volume;
	bool may_mask;
	int fd;
	uint64_t page, pages, file_page;
};

static bool is_zero(const struct snapshot_page *p)
{
	return p->kind == SNAPSHOT_WORD && !p->value;
}

/* ---- stretches --------------------------------------------------------------------------------- */

static bool follows(const struct fill *f, uint64_t page, const struct snapshot_page *first, uint64_t distance)
{
	const struct snapshot_page *p = &f->table[page];

	if (p->kind != first->kind || f->copied[page])
		return false;
	return p->kind == SNAPSHOT_DATA || (p->volume == first->volume && p->value == first->value + distance);
}

/* The stretch that begins at `page`, which is no SNAPSHOT_WORD. */
static struct stretch stretch_at(const struct fill *f, uint64_t page)
{
	const struct agent_restore *restore = &f->agent->config.restore;
	const struct snapshot_page *first = &f->table[page];
	struct stretch s = { .page = page, .pages = 1 };
	uint64_t end = page + 1, last = page;

	if (first->kind == SNAPSHOT_DATA) {
		s.volume = f->ram;
		s.may_mask = f->mask_ram;
		s.fd = restore->ram_fd;
		s.file_page = f->ram_page + page;
	} else if (first->kind == SNAPSHOT_EQUAL) {
		s.volume = f->ram;
		s.may_mask = f->mask_ram;
		s.fd = restore->ram_fd;
		s.file_page = first->value;
	} else {
		s.volume = f->volume[first->volume];
		s.may_mask = f->mask_volume[first->volume];
		s.fd = restore->volume_fd[first->volume];
		s.file_page = first->value;
	}
	for (; end < f->pages; end++) {
		if (follows(f, end, first, end - page))
			last = end;
		else if (first->kind != SNAPSHOT_DATA || !is_zero(&f->table[end]) || end - last >= GAP_PAGES)
			break;
	}
	s.pages = last + 1 - page;
	return s;
}

static int read_stretch(struct fill *f, const struct stretch *s)
{
	int r = os_read_all(s->fd, f->block->hva + os_bytes(s->page), os_bytes(s->pages), os_bytes(s->file_page));

	memset(f->copied + s->page, !r, s->pages * sizeof *f->copied);
	return r;
}

static bool is_lazy(const struct fill *f, const struct stretch *s)
{
	const struct agent_restore *restore = &f->agent->config.restore;

	return restore->pager.active && s->fd == restore->ram_fd;
}

/* The cache is filled while it is mapped. What cannot be mapped so is read when it is whole. */
static int bring_lazily(struct fill *f, const struct stretch *s)
{
	int r = s->volume && lazy_may_map() ? volume_map(s->volume, f->block, s->page, s->pages, s->file_page) : -ENOTSUP;

	if (!r && !lazy_mapped(f->block->hva + os_bytes(s->page), os_bytes(s->pages)))
		return 0;
	lazy_load_all();
	return r ? read_stretch(f, s) : 0;
}

static int bring(struct fill *f, const struct stretch *s)
{
	int r = -ENOTSUP;

	if (is_lazy(f, s))
		return bring_lazily(f, s);
	if (s->volume)
		r = volume_map(s->volume, f->block, s->page, s->pages, s->file_page);
	return r ? read_stretch(f, s) : 0;
}

static void write_words(struct fill *f, uint64_t page)
{
	uint64_t *at = (uint64_t *)(void *)(f->block->hva + os_bytes(page));

	for (size_t i = 0; i < OS_PAGE_BYTES / sizeof *at; i++)
		at[i] = f->table[page].value;
}

/* ---- masked ranges ----------------------------------------------------------------------------- */

/* What could not be masked is brought now. */
static int bring_range(struct fill *f)
{
	int r = 0;

	for (uint64_t page = f->first; !r && page < f->end;) {
		struct stretch s;

		if (f->copied[page] || f->table[page].kind == SNAPSHOT_WORD) {
			if (!f->copied[page] && f->table[page].value)
				write_words(f, page);
			page++;
			continue;
		}
		s = stretch_at(f, page);
		r = bring(f, &s);
		page += s.pages;
	}
	return r;
}

/* [range lock] Somebody may have begun to write one of the files since. */
static bool may_still_mask(const struct fill *f)
{
	bool may = f->masks && (!f->mask_ram || volume_is_mapped(f->ram));

	for (uint32_t i = 0; i < f->agent->config.restore.volumes; i++)
		may = may && (!f->mask_volume[i] || volume_is_mapped(f->volume[i]));
	return may;
}

static int end_range(struct fill *f)
{
	struct ram *ram = f->agent->ram;
	int r = 0;

	if (f->masked) {
		ram_lock(ram);
		r = may_still_mask(f) ? ram_mask(ram, f->block, f->first, f->end - f->first, f->entries) : -EACCES;
		ram_unlock(ram);
		if (r)
			r = bring_range(f);
	}
	f->first = f->end;
	f->masked = 0;
	return r;
}

/* The page joins the range, unless that would be watched for too many zeros. */
static int join_range(struct fill *f, uint64_t page, uint64_t entry)
{
	int r = page - f->end > WATCHED_GAP_PAGES ? end_range(f) : 0;

	if (!f->masked && entry == ENTRY_WATCHED)
		return r; /* nothing before it has to be watched */
	if (!f->masked)
		f->first = f->end = page;
	for (; f->end < page; f->end++)
		f->entries[f->end - f->first] = ENTRY_WATCHED;
	f->entries[f->end++ - f->first] = entry;
	f->masked += entry != ENTRY_WATCHED;
	return r;
}

static int mask_word(struct fill *f, uint64_t page)
{
	uint64_t number;
	int r;

	ram_lock(f->agent->ram);
	r = ram_add_word(f->agent->ram, f->table[page].value, &number);
	ram_unlock(f->agent->ram);
	return r ? r : join_range(f, page, entry_masked(ENTRY_WORDS, number));
}

static int mask_stretch(struct fill *f, const struct stretch *s)
{
	int r = 0;

	for (uint64_t i = 0; !r && i < s->pages; i++) {
		bool zero = is_zero(&f->table[s->page + i]);

		r = join_range(f, s->page + i, zero ? ENTRY_WATCHED : entry_masked(volume_index(s->volume), s->file_page + i));
	}
	return r;
}

static bool is_in_use(const struct fill *f, const struct stretch *s)
{
	for (uint64_t i = 0; i < s->pages; i++)
		if (f->use[s->page + i])
			return true;
	return false;
}

static int place(struct fill *f, const struct stretch *s)
{
	int r;

	if (s->may_mask && s->pages < MAP_PAGES && !is_in_use(f, s))
		return mask_stretch(f, s);
	r = end_range(f);
	return r ? r : bring(f, s);
}

static int fill(struct fill *f)
{
	int r = 0;

	for (uint64_t page = 0; !r && page < f->pages;) {
		struct stretch s;

		if (f->copied[page] || f->table[page].kind == SNAPSHOT_WORD) {
			if (f->copied[page])
				r = join_range(f, page, ENTRY_WATCHED);
			else if (f->table[page].value)
				r = mask_word(f, page);
			page++;
			continue;
		}
		s = stretch_at(f, page);
		r = place(f, &s);
		page += s.pages;
	}
	return r ? r : end_range(f);
}

/* ---- the active set ---------------------------------------------------------------------------- */

static uint64_t whole_pages(int fd)
{
	struct stat st;

	return fstat(fd, &st) ? 0 : (uint64_t)st.st_size >> OS_PAGE_SHIFT;
}

/* The last one may end within a page. */
static uint64_t pages_of(int fd)
{
	struct stat st;

	return fstat(fd, &st) ? 0 : ((uint64_t)st.st_size + OS_PAGE_BYTES - 1) >> OS_PAGE_SHIFT;
}

/* Is what the guest uses of this file out of memory? Sampled; a file that cannot be looked at is not cold. */
static bool is_cold(const struct fill *f, const struct snapshot_image *image, int fd, uint32_t kind, uint32_t volume)
{
	const struct snapshot_page *table = image->memory;
	uint64_t step = f->active.count / SAMPLES + 1, looked = 0, resident = 0, file_pages = whole_pages(fd);
	void *view = file_pages ? os_view_file(fd, os_bytes(file_pages), false) : NULL;

	for (uint64_t i = 0; view && i < f->active.count; i += step) {
		uint64_t page = f->active.list[i].page, at = kind == SNAPSHOT_DATA ? page : table[page].value;

		if (table[page].kind != kind || (kind == SNAPSHOT_VOLUME && table[page].volume != volume) || at >= file_pages)
			continue;
		looked++;
		resident += os_resident_pages(view, os_bytes(at), 1);
	}
	os_unview_file(view, os_bytes(file_pages));
	return looked && resident * 2 < looked;
}

/* Which files' pages in use are out of memory. */
struct cold {
	bool any, ram, volume[AGENT_RESTORE_VOLUMES];
};

static struct cold find_cold(const struct fill *f, const struct snapshot_image *image)
{
	const struct agent_restore *restore = &f->agent->config.restore;
	struct cold cold = { .ram = is_cold(f, image, restore->ram_fd, SNAPSHOT_DATA, 0) };

	cold.any = cold.ram;
	for (uint32_t i = 0; i < image->volumes; i++) {
		cold.volume[i] = is_cold(f, image, restore->volume_fd[i], SNAPSHOT_VOLUME, i);
		cold.any = cold.any || cold.volume[i];
	}
	return cold;
}

static bool is_ours(const struct fill *f, const struct active_page *p)
{
	return p->page >= f->ram_page && p->page - f->ram_page < f->pages;
}

/* Is it to be copied? */
static bool is_cold_page(const struct fill *f, const struct active_page *p, const struct cold *cold)
{
	const struct snapshot_page *is = is_ours(f, p) ? &f->table[p->page - f->ram_page] : NULL;

	if (!is || is->kind == SNAPSHOT_WORD || f->copied[p->page - f->ram_page])
		return false;
	return is->kind == SNAPSHOT_VOLUME ? cold->volume[is->volume] : cold->ram;
}

/* Into the memfd, not by the guest's address: that would clear each page first, and take a fault for it. */
static int write_page_run(struct fill *f, uint64_t page, const uint8_t *contents, uint64_t pages)
{
	const struct ram_block *b = f->block;
	int r = os_write_all(b->memfd, contents, os_bytes(pages), b->memfd_offset + os_bytes(page));

	memset(f->copied + page, !r, pages * sizeof *f->copied);
	if (!r)
		os_populate_read(b->hva + os_bytes(page), os_bytes(pages));
	return r;
}

/* `chunk` has the contents of pages at..at+n of the set. Those to be copied are written, as many at once as follow
 * each other; how many are damaged is added to `wrong`. */
static int copy_chunk(struct fill *f, const struct active_set *set, const uint8_t *chunk, uint64_t at, uint64_t n,
		      const bool *wanted, uint64_t *wrong)
{
	uint64_t first = 0, run = 0; /* the run ends before i */
	int r = 0;

	for (uint64_t i = 0; !r && i < n; i++) {
		bool is = wanted[i] &&
			  XXH3_64bits(chunk + os_bytes(i), OS_PAGE_BYTES) == active_digest(set, at + i, f->image);
		uint64_t page = set->list[at + i].page - f->ram_page;

		*wrong += wanted[i] && !is;
		if (run && (!is || page != first + run)) {
			r = write_page_run(f, first, chunk + os_bytes(i - run), run);
			run = 0;
		}
		first = run ? first : page;
		run += is;
	}
	return r || !run ? r : write_page_run(f, first, chunk + os_bytes(n - run), run);
}

/* All of the set whose file is cold, from one piece of storage. What is damaged or cannot be read there is left to its
 * file; how many pages that is. */
static int copy_cold(struct fill *f, const struct active_set *set, int fd, const struct cold *cold, uint64_t *ret_wrong)
{
	uint8_t *chunk = malloc(os_bytes(CHUNK_PAGES));
	int r = chunk ? 0 : -ENOMEM;

	*ret_wrong = 0;
	for (uint64_t at = 0; !r && at < set->count; at += CHUNK_PAGES) {
		uint64_t n = set->count - at < CHUNK_PAGES ? set->count - at : CHUNK_PAGES;
		bool wanted[CHUNK_PAGES];

		for (uint64_t i = 0; i < n; i++)
			wanted[i] = is_cold_page(f, &set->list[at + i], cold);
		if (os_read_all(fd, chunk, os_bytes(n), set->contents_offset + os_bytes(at))) {
			*ret_wrong += set->count - at;
			break;
		}
		r = copy_chunk(f, set, chunk, at, n, wanted, ret_wrong);
	}
	free(chunk);
	return r;
}

static bool will_be_written(const struct fill *f, uint64_t page)
{
	return f->use[page] == IN_USE_WRITTEN && !is_zero(&f->table[page]);
}

/* Pages that will be written soon, in a run that is not worth a mapping: they would be copied anyway. */
static int copy_written(struct fill *f, const struct stretch *s)
{
	int r = 0;

	for (uint64_t i = 0, n; !r && i < s->pages; i += n) {
		struct stretch part = *s;

		for (n = 0; i + n < s->pages && will_be_written(f, s->page + i + n); n++)
			;
		if (n) {
			part.page += i;
			part.file_page += i;
			part.pages = n;
			r = read_stretch(f, &part);
		}
		n += !n;
	}
	return r;
}

static int copy_all_written(struct fill *f)
{
	int r = 0;

	for (uint64_t page = 0; !r && page < f->pages;) {
		struct stretch s;

		if (f->copied[page] || f->table[page].kind == SNAPSHOT_WORD) {
			page++;
			continue;
		}
		s = stretch_at(f, page);
		r = s.pages < MAP_PAGES ? copy_written(f, &s) : 0;
		page += s.pages;
	}
	return r;
}

/* Without one it is empty. */
static void read_active(struct fill *f, const struct snapshot_image *image)
{
	int fd = f->agent->config.restore.active_fd, r;
	char why[SNAPSHOT_WHY_BYTES];

	r = fd < 0 ? 0 : active_read(fd, image, &f->active, why);
	if (r)
		agent_say("the snapshot's active set is not used: %s", r == -EBADMSG ? why : strerror(-r));
	for (uint64_t i = 0; i < f->active.count; i++)
		if (is_ours(f, &f->active.list[i]))
			f->use[f->active.list[i].page - f->ram_page] =
				f->active.list[i].flags & ACTIVE_WRITTEN ? IN_USE_WRITTEN : IN_USE;
}

static int bring_active(struct fill *f, const struct cold *cold)
{
	uint64_t wrong = 0;
	int r = cold->any ? copy_cold(f, &f->active, f->agent->config.restore.active_fd, cold, &wrong) : 0;

	if (wrong)
		agent_say("%llu pages of the snapshot's active set are not what was saved, and come from elsewhere",
			  (unsigned long long)wrong);
	return r;
}

/* ---- what an earlier restore has learned --------------------------------------------------------- */

/* From storage, all at once: runs of pages that are asked for and were not copied, and what is between them. */
static void read_ahead(const struct fill *f)
{
	const struct active_set *learned = &f->learned;

	for (uint64_t i = 0, n; i < learned->count; i += n) {
		const struct active_page *p = &learned->list[i];
		uint64_t first = p->page - f->ram_page, last = first;
		struct stretch s;

		n = 1;
		if (!is_ours(f, p) || f->copied[first] || f->table[first].kind == SNAPSHOT_WORD)
			continue;
		s = stretch_at(f, first);
		while (i + n < learned->count && p[n].page > last + f->ram_page && p[n].page - f->ram_page - last <= AHEAD_GAP_PAGES &&
		       p[n].page - f->ram_page < first + s.pages)
			last = p[n++].page - f->ram_page;
		os_expect_read(s.fd, os_bytes(s.file_page), os_bytes(last + 1 - first));
	}
}

/* They are in use, too. Without a list, or with one that is damaged and will be made anew, there are none. */
static void read_learned(struct fill *f, const struct snapshot_image *image)
{
	int fd = f->agent->config.restore.learned_fd;
	char why[SNAPSHOT_WHY_BYTES];

	if (fd < 0 || active_read(fd, image, &f->learned, why))
		return;
	if (f->learned.count > ACTIVE_LEARNED_PAGES || !f->learned.digest) {
		active_free(&f->learned);
		return;
	}
	for (uint64_t i = 0; i < f->learned.count; i++) {
		uint64_t page = f->learned.list[i].page - f->ram_page;

		if (is_ours(f, &f->learned.list[i]) && f->table[page].kind != SNAPSHOT_WORD && !f->use[page])
			f->use[page] = IN_USE;
	}
}

static int bring_learned(struct fill *f, const struct cold *cold)
{
	const struct agent_restore *restore = &f->agent->config.restore;
	uint64_t wrong = 0;
	int r = 0;

	if (cold->any && f->learned.count) {
		os_expect_read(restore->learned_fd, f->learned.contents_offset, os_bytes(f->learned.count));
		r = copy_cold(f, &f->learned, restore->learned_fd, cold, &wrong);
	}
	if (wrong && restore->learn_dir_fd >= 0) /* the next restore makes it anew */
		(void)unlinkat(restore->learn_dir_fd, restore->learn_name, 0);
	read_ahead(f);
	return r;
}

/* Before the guest runs: what it uses. */
static int bring_in_use(struct fill *f, const struct snapshot_image *image)
{
	struct cold cold = { 0 };
	int r = 0;

	if (f->active.digest) {
		cold = find_cold(f, image);
		r = bring_active(f, &cold);
	}
	if (!r)
		r = bring_learned(f, &cold);
	return r ? r : copy_all_written(f);
}

/* Of a spare there is nothing to learn. */
static bool may_learn(const struct fill *f)
{
	const struct agent_restore *restore = &f->agent->config.restore;

	return f->masks && restore->learn_dir_fd >= 0 && restore->then != RESTORE_THEN_WAIT;
}

/* Pages that nothing brings before the guest runs. */
static void let_learn(const struct fill *f)
{
	uint8_t *may = malloc(f->pages);

	for (uint64_t page = 0; may && page < f->pages; page++)
		may[page] = f->table[page].kind != SNAPSHOT_WORD && !f->use[page] && !f->copied[page];
	if (may)
		learner_watch(f->agent, f->block, f->ram_page, may);
}

/* Pages of one use. Of what a first touch makes (masked pages, a pager's) nothing is brought: that would be waited
 * for. */
static void touch(const struct fill *f, uint64_t page, uint64_t end, enum use use)
{
	while (page < end) {
		struct ram_range range;
		uint8_t *hva = f->block->hva + os_bytes(page);

		ram_lock(f->agent->ram);
		range = ram_range_at(f->block, page, end);
		ram_unlock(f->agent->ram);
		if (range.source == ENTRY_BASE || range.source == ENTRY_OVERLAY) {
			if (use == IN_USE_WRITTEN)
				(void)os_populate_write(hva, os_bytes(range.pages));
			else
				os_populate_read(hva, os_bytes(range.pages));
		}
		page += range.pages;
	}
}

/* What the guest uses gets into its page table before it runs, copies for its writes, too: each would be a fault of
 * a virtual processor. */
static void touch_active(const struct fill *f)
{
	for (uint64_t page = 0, end; page < f->pages; page = end) {
		end = page + 1;
		if (f->use[page] == NOT_IN_USE)
			continue;
		while (end < f->pages && f->use[end] == f->use[page])
			end++;
		touch(f, page, end, f->use[page]);
	}
}

/* ---- all of it --------------------------------------------------------------------------------- */

static void attach(struct fill *f)
{
	const struct agent_restore *restore = &f->agent->config.restore;

	f->masks = f->agent->overlays_allowed && !faults_make_pages(f->agent);
	f->ram = restore->pager.active ? volumes_attach_cache(f->agent->volumes, restore->ram_fd)
				       : volumes_attach(f->agent->volumes, restore->ram_fd);
	/* A hole of the cache is no zero, so it is never read before the pager has brought it. */
	f->mask_ram = f->masks && !restore->pager.active && f->ram && volume_is_mapped(f->ram);
	for (uint32_t i = 0; i < restore->volumes; i++) {
		f->volume[i] = volumes_attach(f->agent->volumes, restore->volume_fd[i]);
		f->mask_volume[i] = f->masks && f->volume[i] && volume_is_mapped(f->volume[i]);
	}
}

static void detach(struct fill *f)
{
	if (f->ram)
		volume_put(f->ram);
	for (uint32_t i = 0; i < f->agent->config.restore.volumes; i++)
		if (f->volume[i])
			volume_put(f->volume[i]);
	active_free(&f->active);
	active_free(&f->learned);
	free(f->copied);
	free(f->use);
	free(f->entries);
}

static int find_block(struct fill *f, const struct snapshot_image *image)
{
	for (uint32_t i = 0; i < image->blocks; i++) {
		if (strcmp(image->block[i].name, f->block->name))
			continue;
		if (image->block[i].pages != f->block->pages) {
			agent_say("the snapshot has %llu MiB of %s, and this VM %llu MiB: give it the same -m",
				  (unsigned long long)image->block[i].pages >> 8, f->block->name,
				  (unsigned long long)f->block->pages >> 8);
			return -EINVAL;
		}
		f->table = image->block[i].table;
		f->pages = image->block[i].pages;
		f->ram_page = image->block[i].ram_page;
		return 0;
	}
	agent_say("the snapshot has no RAM called %s: give it the same machine", f->block->name);
	return -EINVAL;
}

/* Places that the metadata names and their files do not have: such a page could never be had. */
static int check_places(const struct fill *f, const struct snapshot_image *image)
{
	const struct agent_restore *restore = &f->agent->config.restore;
	uint64_t volume_pages[AGENT_RESTORE_VOLUMES] = { 0 };

	if (whole_pages(restore->ram_fd) < image->pages) {
		agent_say("the snapshot's RAM is %llu pages long, and %llu are said", (unsigned long long)whole_pages(restore->ram_fd),
			  (unsigned long long)image->pages);
		return -EBADMSG;
	}
	for (uint32_t i = 0; i < image->volumes; i++)
		volume_pages[i] = pages_of(restore->volume_fd[i]);
	for (uint64_t i = 0; i < f->pages; i++) {
		const struct snapshot_page *p = &f->table[i];
		uint64_t number = f->ram_page + i;

		if (p->kind != SNAPSHOT_VOLUME || p->value < volume_pages[p->volume])
			continue;
		agent_say("page %llu of the snapshot refers to page %llu of a file of %llu", (unsigned long long)number,
			  (unsigned long long)p->value, (unsigned long long)volume_pages[p->volume]);
		return -EBADMSG;
	}
	return 0;
}

/* Pages that are what a fresh memfd holds, and so never need an update. */
static uint64_t count_zero(const struct fill *f)
{
	uint64_t count = 0;

	for (uint64_t page = 0; page < f->pages; page++)
		count += is_zero(&f->table[page]);
	return count;
}

/* What comes after a step; where tests let a restore fail, or be killed (LATENT_FAULT=agent_step:N:…). */
static int after(int r)
{
	return r ? r : os_fault(OS_FAULT_AGENT_STEP);
}

static int fill_block(struct fill *f, const struct snapshot_image *image)
{
	int r = check_places(f, image);
	bool learns;

	if (r)
		return r;
	f->copied = calloc(f->pages, sizeof *f->copied);
	f->use = calloc(f->pages, sizeof *f->use);
	f->entries = malloc(f->pages * sizeof *f->entries);
	if (!f->copied || !f->use || !f->entries)
		return -ENOMEM;
	attach(f);
	read_active(f, image);
	read_learned(f, image);
	learns = !f->learned.count && may_learn(f);
	r = after(bring_in_use(f, image));
	if (!r)
		r = after(fill(f));
	if (!r && learns)
		learner_begin(f->agent);
	stat_add(&f->agent->stats->pages_never_masked, count_zero(f));
	if (!r && !f->agent->config.restore.pager.active)
		touch_active(f);
	if (!r && learns)
		let_learn(f);
	return r;
}

static int fill_from_snapshot(struct agent *a, struct ram_block *block)
{
	char why[SNAPSHOT_WHY_BYTES] = "";
	struct snapshot_image image = { 0 };
	struct fill f = { .agent = a, .block = block, .image = &image };
	int r = after(snapshot_image_read(a->config.restore.pages_fd, &image, why));

	if (!r && image.volumes > a->config.restore.volumes)
		r = -EBADMSG;
	if (r) {
		agent_say("the snapshot cannot be used: %s", why[0] ? why : "its manifest does not fit its pages");
		return r;
	}
	r = find_block(&f, &image);
	if (!r && a->config.restore.pager.active)
		r = lazy_begin(a);
	if (!r) {
		r = fill_block(&f, &image);
		if (!r && a->config.restore.pager.active)
			r = lazy_watch(block, f.ram_page);
		if (r)
			agent_say("guest RAM cannot be filled from the snapshot: %s", strerror(-r));
		detach(&f);
	}
	snapshot_image_free(&image);
	return r;
}

/* ---- while QEMU makes its machine ---------------------------------------------------------------- */

static struct {
	pthread_mutex_t lock;
	pthread_cond_t ended;
	unsigned pending; /* blocks that are being filled */
} fills = { .lock = PTHREAD_MUTEX_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER };

struct job {
	struct agent *agent;
	struct ram_block *block;
};

static void end_job(struct job *job)
{
	struct agent *a = job->agent;

	if (fill_from_snapshot(a, job->block)) {
		resume_drop_disks(a);
		_exit(1); /* it has said why; a guest with half of its RAM must not run */
	}
	free(job);
	stat_set(&a->stats->restore_us[RESTORE_RAM], os_now_us());
	pthread_mutex_lock(&fills.lock);
	fills.pending--;
	pthread_cond_broadcast(&fills.ended);
	pthread_mutex_unlock(&fills.lock);
}

static void *fill_main(void *job)
{
	pid_t tid = (pid_t)syscall(SYS_gettid);

	os_never_freeze(tid); /* who freezes has waited for its end */
	end_job(job);
	os_may_freeze(tid);
	return NULL;
}

int restorer_begin(struct agent *a, struct ram_block *block)
{
	struct job *job = malloc(sizeof *job);

	if (!job)
		return -ENOMEM;
	*job = (struct job){ a, block };
	pthread_mutex_lock(&fills.lock);
	fills.pending++;
	pthread_mutex_unlock(&fills.lock);
	if (agent_start_thread("latent-fill", fill_main, job, true))
		end_job(job);
	return 0;
}

void restorer_wait(void)
{
	pthread_mutex_lock(&fills.lock);
	while (fills.pending)
		pthread_cond_wait(&fills.ended, &fills.lock);
	pthread_mutex_unlock(&fills.lock);
}

bool restorer_is_filling(void)
{
	bool is;

	pthread_mutex_lock(&fills.lock);
	is = fills.pending;
	pthread_mutex_unlock(&fills.lock);
	return is;
}

static bool is_file(int fd, const struct stat *file)
{
	struct stat st;

	return fd >= 0 && !fstat(fd, &st) && st.st_ino == file->st_ino && st.st_dev == file->st_dev;
}

bool restorer_uses(const struct agent *a, const struct stat *file)
{
	const struct agent_restore *restore = &a->config.restore;
	bool uses = restorer_is_filling() && is_file(restore->ram_fd, file);

	for (uint32_t i = 0; !uses && restorer_is_filling() && i < restore->volumes; i++)
		uses = is_file(restore->volume_fd[i], file);
	return uses;
}

void restorer_load_state(struct agent *a, struct pause *pause)
{
	char why[256] = "the agent has no monitor";
	int r = pause ? pause_load_state(pause, a->config.restore.state_fd, why, sizeof why) : -ENOTCONN;

	if (r)
		agent_say("the device state cannot be loaded: %s", why);
	if (r && pause)
		pause_quit(pause); /* if it does not by itself: nobody would know what it stands for */
}
