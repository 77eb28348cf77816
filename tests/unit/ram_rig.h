/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A rig for tests of core/ram: blocks of "guest RAM" and files to lay over them, and checks that
 * compare entries, counts and the observer with what the kernel shows in /proc/self/maps and
 * pagemap. For one include per executable; no test framework in here: a check returns NULL or what
 * is wrong.
 *
 * Contents are tags: every 64-bit word of a page holds one value. A page of file F, version V, page
 * P has rig_file_tag(F, V, P); the guest writes other tags; zero is a page of zeros.
 */
#ifndef LATENT_TESTS_RAM_RIG_H
#define LATENT_TESTS_RAM_RIG_H

#include "core/ram.h"
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RIG_BLOCKS 2
#define RIG_FILES 2
#define RIG_PAGE_WORDS (OS_PAGE_BYTES / sizeof(uint64_t))
#define RIG_GUARD_PAGES 16 /* unmapped or foreign before, between and behind the blocks */
#define RIG_MEMFD_OFFSET_PAGES 3 /* of every second block: offsets within memfd and block differ */

#define RIG_UNUSED __attribute__((unused)) /* a test need not use all of the rig */

struct rig_vma {
	uintptr_t start, end;
	uint64_t offset;
	unsigned dev_major, dev_minor;
	uint64_t inode;
	bool shared, readable, writable;
};

struct rig_file {
	int fd, fd_rw;
	uint64_t pages;
	unsigned number, version;
	unsigned index; /* in the ram */
	struct rig_vma id; /* only device and inode */
	int32_t *refs;  /* by page of the file: guest pages that map it, says the observer */
	uint64_t lost[4]; /* by enum ram_loss */
	bool underflow;
};

struct rig_block {
	uint8_t *hva;
	uint64_t pages, memfd_offset;
	int memfd;
	struct rig_vma id;
	struct ram_block *ram;
};

struct rig {
	struct ram *ram;
	struct rig_block blocks[RIG_BLOCKS];
	struct rig_file files[RIG_FILES];
	uint8_t *area; /* the reservation that the blocks lie in */
	size_t area_bytes;
	struct os_pagemap *pagemap;
	char *maps;    /* text of /proc/self/maps */
	size_t maps_bytes;
	char why[256];
};

/* ---- tags ----------------------------------------------------------------------------------- */

static inline uint64_t rig_file_tag(unsigned file, unsigned version, uint64_t file_page)
{
	return UINT64_C(0xf11e) << 48 | (uint64_t)file << 40 | (uint64_t)version << 24 | file_page;
}

static inline void rig_write(uint8_t *hva, uint64_t tag)
{
	uint64_t *words = (uint64_t *)(void *)hva;

	for (size_t i = 0; i < RIG_PAGE_WORDS; i++)
		words[i] = tag;
}

/* False if the words of the page differ. */
static inline bool rig_tag_of_words(const uint64_t *words, uint64_t *ret_tag)
{
	for (size_t i = 1; i < RIG_PAGE_WORDS; i++)
		if (words[i] != words[0])
			return false;
	*ret_tag = words[0];
	return true;
}

static RIG_UNUSED bool rig_holds(const uint8_t *hva, uint64_t tag)
{
	uint64_t got;

	return rig_tag_of_words((const uint64_t *)(const void *)hva, &got) && got == tag;
}

static RIG_UNUSED uint8_t *rig_hva(const struct rig *rig, unsigned block, uint64_t page)
{
	return rig->blocks[block].hva + os_bytes(page);
}

static RIG_UNUSED const char *rig_wrong(struct rig *rig, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

static RIG_UNUSED const char *rig_wrong(struct rig *rig, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(rig->why, sizeof rig->why, format, args);
	va_end(args);
	return rig->why;
}

/* ---- /proc/self/maps ------------------------------------------------------------------------ */

static RIG_UNUSED void rig_read_maps(struct rig *rig)
{
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	size_t used = 0;
	ssize_t n;

	if (fd < 0)
		abort();
	while ((n = read(fd, rig->maps + used, rig->maps_bytes - used - 1)) > 0) {
		used += (size_t)n;
		if (used + 1 == rig->maps_bytes)
			abort(); /* the buffer is meant for 100,000 mappings */
	}
	rig->maps[used] = '\0';
	close(fd);
}

/* Parses one line; returns the next one, or NULL. */
static inline const char *rig_parse_vma(const char *line, struct rig_vma *vma)
{
	char *at;

	vma->start = strtoull(line, &at, 16);
	vma->end = strtoull(at + 1, &at, 16);
	vma->readable = at[1] == 'r';
	vma->writable = at[2] == 'w';
	vma->shared = at[4] == 's';
	vma->offset = strtoull(at + 6, &at, 16);
	vma->dev_major = (unsigned)strtoul(at + 1, &at, 16);
	vma->dev_minor = (unsigned)strtoul(at + 1, &at, 16);
	vma->inode = strtoull(at + 1, &at, 10);
	at = strchr(at, '\n');
	return at && at[1] ? at + 1 : NULL;
}

/* Of the text read last, the mapping that holds `hva` or is the next one above. */
static inline bool rig_vma_at(const char **from, uintptr_t hva, struct rig_vma *vma)
{
	while (*from) {
		const char *line = *from;

		*from = rig_parse_vma(line, vma);
		if (vma->end > hva) {
			return true;
		}
	}
	return false;
}

static inline bool rig_same_file(const struct rig_vma *a, const struct rig_vma *b)
{
	return a->dev_major == b->dev_major && a->dev_minor == b->dev_minor && a->inode == b->inode;
}

/* What /proc/self/maps calls a file: other than fstat on some file systems. */
static RIG_UNUSED void rig_identify(struct rig *rig, int fd, struct rig_vma *ret_id)
{
	void *at = mmap(NULL, OS_PAGE_BYTES, PROT_READ, MAP_SHARED, fd, 0);
	const char *from = rig->maps;

	if (at == MAP_FAILED)
		abort();
	rig_read_maps(rig);
	if (!rig_vma_at(&from, (uintptr_t)at, ret_id))
		abort();
	munmap(at, OS_PAGE_BYTES);
}

/* The VmFlags line of the mapping at `hva` ("" if there is none). */
static RIG_UNUSED void rig_vm_flags(const void *hva, char *flags, size_t flags_bytes)
{
	FILE *f = fopen("/proc/self/smaps", "re");
	char line[512];
	bool here = false;

	flags[0] = '\0';
	while (f && fgets(line, sizeof line, f)) {
		unsigned long start, end;

		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			here = (uintptr_t)hva >= start && (uintptr_t)hva < end;
		else if (here && !strncmp(line, "VmFlags:", 8))
			snprintf(flags, flags_bytes, "%s", line + 8);
	}
	if (f)
		fclose(f);
}

/* ---- making and taking down ------------------------------------------------------------------ */

static inline void rig_gained(void *ctx, uint64_t file_page, uint64_t pages)
{
	struct rig_file *f = ctx;

	for (uint64_t i = 0; i < pages; i++)
		f->refs[file_page + i]++;
}

static inline void rig_lost(void *ctx, uint64_t file_page, uint64_t pages, enum ram_loss why)
{
	struct rig_file *f = ctx;

	f->lost[why] += pages;
	for (uint64_t i = 0; i < pages; i++)
		if (f->refs[file_page + i]-- <= 0)
			f->underflow = true;
}

static RIG_UNUSED void rig_write_file(struct rig_file *f, unsigned version)
{
	uint64_t words[RIG_PAGE_WORDS];

	f->version = version;
	for (uint64_t p = 0; p < f->pages; p++) {
		for (size_t i = 0; i < RIG_PAGE_WORDS; i++)
			words[i] = rig_file_tag(f->number, version, p);
		if (pwrite(f->fd_rw, words, sizeof words, (off_t)os_bytes(p)) != sizeof words)
			abort();
	}
}

static inline int rig_reopen(int fd, int flags)
{
	char path[32];

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return open(path, flags | O_CLOEXEC);
}

static inline void rig_add_file(struct rig *rig, struct rig_file *f)
{
	struct ram_observer observer = { rig_gained, rig_lost, f };
	int index;

	ram_lock(rig->ram);
	index = ram_add_file(rig->ram, f->fd, f->pages, &observer);
	ram_unlock(rig->ram);
	if (index < 0)
		abort();
	f->index = (unsigned)index;
}

static inline void rig_open_file(struct rig *rig, unsigned number, uint64_t pages)
{
	struct rig_file *f = &rig->files[number];
	const char *dir = getenv("TMPDIR");

	f->number = number;
	f->pages = pages;
	f->refs = calloc(pages, sizeof *f->refs);
	f->fd_rw = open(dir ? dir : "/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (f->fd_rw < 0) /* a file system without O_TMPFILE */
		f->fd_rw = memfd_create("rig-file", MFD_CLOEXEC);
	rig_write_file(f, 0);
	f->fd = rig_reopen(f->fd_rw, O_RDONLY);
	if (f->fd < 0 || !f->refs)
		abort();
	rig_identify(rig, f->fd, &f->id);
	rig_add_file(rig, f);
}

static RIG_UNUSED void rig_map_block(struct rig_block *b)
{
	if (mmap(b->hva, os_bytes(b->pages), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, b->memfd,
		 (off_t)b->memfd_offset) == MAP_FAILED)
		abort();
}

static RIG_UNUSED int rig_add_block(struct rig *rig, unsigned number)
{
	struct rig_block *b = &rig->blocks[number];
	char name[32];
	int r;

	snprintf(name, sizeof name, "rig-%u", number);
	ram_lock(rig->ram);
	r = ram_add_block(rig->ram, name, b->hva, b->pages, b->memfd, b->memfd_offset, &b->ram);
	ram_unlock(rig->ram);
	return r;
}

static inline void rig_open_block(struct rig *rig, unsigned number, uint8_t *hva, uint64_t pages)
{
	struct rig_block *b = &rig->blocks[number];

	b->hva = hva;
	b->pages = pages;
	b->memfd_offset = number & 1 ? os_bytes(RIG_MEMFD_OFFSET_PAGES) : 0;
	b->memfd = memfd_create("rig-ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (b->memfd < 0 || ftruncate(b->memfd, (off_t)(b->memfd_offset + os_bytes(pages))))
		abort();
	rig_identify(rig, b->memfd, &b->id);
	rig_map_block(b);
	if (rig_add_block(rig, number))
		abort();
}

static RIG_UNUSED void rig_open(struct rig *rig, const uint64_t block_pages[RIG_BLOCKS],
				uint64_t file_pages, uint64_t budget_maps)
{
	uint8_t *at;

	memset(rig, 0, sizeof *rig);
	rig->maps_bytes = 16 << 20;
	rig->maps = malloc(rig->maps_bytes);
	rig->area_bytes = os_bytes(RIG_GUARD_PAGES);
	for (unsigned i = 0; i < RIG_BLOCKS; i++)
		rig->area_bytes += os_bytes(block_pages[i] + RIG_GUARD_PAGES);
	rig->area = mmap(NULL, rig->area_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (!rig->maps || rig->area == MAP_FAILED || os_pagemap_open(&rig->pagemap) ||
	    ram_create(budget_maps, &rig->ram))
		abort();
	at = rig->area + os_bytes(RIG_GUARD_PAGES);
	for (unsigned i = 0; i < RIG_BLOCKS; i++) {
		rig_open_block(rig, i, at, block_pages[i]);
		at += os_bytes(block_pages[i] + RIG_GUARD_PAGES);
	}
	for (unsigned i = 0; i < RIG_FILES; i++)
		rig_open_file(rig, i, file_pages);
	if (ram_recount_maps(rig->ram))
		abort();
}

static RIG_UNUSED void rig_close(struct rig *rig)
{
	ram_destroy(rig->ram);
	munmap(rig->area, rig->area_bytes);
	for (unsigned i = 0; i < RIG_BLOCKS; i++)
		close(rig->blocks[i].memfd);
	for (unsigned i = 0; i < RIG_FILES; i++) {
		close(rig->files[i].fd);
		close(rig->files[i].fd_rw);
		free(rig->files[i].refs);
	}
	os_pagemap_close(rig->pagemap);
	free(rig->maps);
}

/* ---- looking -------------------------------------------------------------------------------- */

static inline uint64_t rig_entry(const struct rig *rig, unsigned block, uint64_t page)
{
	return atomic_load_explicit(&rig->blocks[block].ram->entries[page], memory_order_relaxed) & ~ENTRY_ACTIVITY;
}

static inline struct rig_file *rig_file_of(struct rig *rig, uint64_t entry)
{
	for (unsigned i = 0; i < RIG_FILES; i++)
		if (rig->files[i].index == entry_file(entry))
			return &rig->files[i];
	return NULL;
}

/* True if a private copy is what the kernel shows there. */
static inline bool rig_flags_private(uint8_t flags)
{
	return !(flags & OS_PAGE_FILE) && (flags & (OS_PAGE_PRESENT | OS_PAGE_SWAPPED));
}

static RIG_UNUSED bool rig_kernel_private(const struct rig *rig, unsigned block, uint64_t page)
{
	uint8_t flags = 0;

	if (os_pagemap_flags(rig->pagemap, rig_hva(rig, block, page), 1, &flags))
		abort();
	return rig_flags_private(flags);
}

/* What lies in the memfd at a page of a block, mapped or not, without allocating it. */
static RIG_UNUSED bool rig_beneath(const struct rig *rig, unsigned block, uint64_t page, uint64_t *ret_tag)
{
	const struct rig_block *b = &rig->blocks[block];
	uint64_t words[RIG_PAGE_WORDS];

	if (pread(b->memfd, words, sizeof words, (off_t)(b->memfd_offset + os_bytes(page))) != sizeof words)
		abort();
	return rig_tag_of_words(words, ret_tag);
}

static RIG_UNUSED bool rig_has_memory_beneath(const struct rig *rig, unsigned block, uint64_t page)
{
	const struct rig_block *b = &rig->blocks[block];

	return os_has_data(b->memfd, b->memfd_offset + os_bytes(page), OS_PAGE_BYTES);
}

/* ---- checks --------------------------------------------------------------------------------- */

static inline const char *rig_check_page_map(struct rig *rig, unsigned block, uint64_t page,
					     const struct rig_vma *vma)
{
	const struct rig_block *b = &rig->blocks[block];
	uint64_t entry = rig_entry(rig, block, page);
	uint64_t offset = vma->offset + ((uintptr_t)rig_hva(rig, block, page) - vma->start);
	const struct rig_file *f;

	if (!vma->readable || !vma->writable)
		return rig_wrong(rig, "block %u page %" PRIu64 ": not readable and writable", block, page);
	if (entry_source(entry) != ENTRY_OVERLAY) {
		if (entry_source(entry) == ENTRY_BASE && entry)
			return rig_wrong(rig, "block %u page %" PRIu64 ": base with entry %" PRIx64, block, page,
					 entry);
		if (!vma->shared || !rig_same_file(vma, &b->id) || offset != b->memfd_offset + os_bytes(page))
			return rig_wrong(rig, "block %u page %" PRIu64 ": entry says base, kernel does not", block,
					 page);
		return NULL;
	}
	f = rig_file_of(rig, entry);
	if (!f || vma->shared || !rig_same_file(vma, &f->id) || offset != os_bytes(entry_file_page(entry)))
		return rig_wrong(rig, "block %u page %" PRIu64 ": entry %" PRIx64 ", kernel maps otherwise", block,
				 page, entry);
	return NULL;
}

/*
 * Entries of a block against the mappings of the process. `*ret_maps`: mappings inside the block;
 * `*ret_splits`: of these, boundaries at which the entries do not say that a new mapping begins.
 */
static inline const char *rig_check_block_maps(struct rig *rig, unsigned block, uint64_t *ret_maps,
					       uint64_t *ret_splits)
{
	const struct rig_block *b = &rig->blocks[block];
	uintptr_t hva = (uintptr_t)b->hva, end = hva + os_bytes(b->pages);
	const char *from = rig->maps, *why;
	struct rig_vma vma;

	*ret_maps = *ret_splits = 0;
	while (hva < end) {
		uint64_t first = (hva - (uintptr_t)b->hva) / OS_PAGE_BYTES;

		if (!rig_vma_at(&from, hva, &vma) || vma.start > hva)
			return rig_wrong(rig, "block %u page %" PRIu64 ": a hole", block, first);
		++*ret_maps;
		if (first && entry_joins(rig_entry(rig, block, first - 1), rig_entry(rig, block, first)))
			++*ret_splits;
		for (; hva < vma.end && hva < end; hva += OS_PAGE_BYTES) {
			why = rig_check_page_map(rig, block, (hva - (uintptr_t)b->hva) / OS_PAGE_BYTES, &vma);
			if (why)
				return why;
		}
	}
	return NULL;
}

struct rig_sums {
	uint64_t overlay_pages, private_pages, maps; /* by the entries */
	uint64_t splits; /* mappings that the kernel has beyond `maps` */
};

static inline void rig_sum_entries(struct rig *rig, unsigned block, struct rig_sums *sums, int32_t *const *refs)
{
	const struct rig_block *b = &rig->blocks[block];

	for (uint64_t i = 0; b->ram && i < b->pages; i++) {
		uint64_t entry = rig_entry(rig, block, i);
		const struct rig_file *f = rig_file_of(rig, entry);

		sums->maps += !i || !entry_joins(rig_entry(rig, block, i - 1), entry);
		if (entry_source(entry) != ENTRY_OVERLAY)
			continue;
		sums->overlay_pages++;
		if (entry_is_private(entry))
			sums->private_pages++;
		else if (f)
			refs[f->number][entry_file_page(entry)]--;
	}
}

static inline const char *rig_check_observer(struct rig *rig, struct rig_file *f, const int32_t *rest)
{
	uint64_t mapped = 0, told;

	if (f->underflow)
		return rig_wrong(rig, "file %u: a page was lost more often than gained", f->number);
	for (uint64_t p = 0; p < f->pages; p++) {
		mapped += (uint64_t)f->refs[p];
		if (rest[p])
			return rig_wrong(rig, "file %u page %" PRIu64 ": observer counts %d more than entries",
					 f->number, p, rest[p]);
	}
	ram_lock(rig->ram);
	told = ram_mapped_pages(rig->ram, f->index);
	ram_unlock(rig->ram);
	if (told != mapped)
		return rig_wrong(rig, "file %u: ram_mapped_pages %" PRIu64 ", observer %" PRIu64, f->number, told,
				 mapped);
	return NULL;
}

/* The ram's own counts and the observers' against sums over the entries. */
static inline const char *rig_check_counts(struct rig *rig, struct rig_sums *sums)
{
	int32_t *rest[RIG_FILES];
	struct ram_counts c;
	const char *why = NULL;

	for (unsigned i = 0; i < RIG_FILES; i++) {
		rest[i] = malloc(rig->files[i].pages * sizeof *rest[i]);
		memcpy(rest[i], rig->files[i].refs, rig->files[i].pages * sizeof *rest[i]);
	}
	for (unsigned i = 0; i < RIG_BLOCKS; i++)
		rig_sum_entries(rig, i, sums, rest);
	for (unsigned i = 0; !why && i < RIG_FILES; i++)
		why = rig_check_observer(rig, &rig->files[i], rest[i]);
	for (unsigned i = 0; i < RIG_FILES; i++)
		free(rest[i]);
	ram_get_counts(rig->ram, &c);
	if (!why && (c.overlay_pages != sums->overlay_pages || c.private_pages != sums->private_pages ||
		     c.maps != sums->maps))
		why = rig_wrong(rig,
				"counts: overlay %" PRIu64 " private %" PRIu64 " maps %" PRIu64
				"; by the entries %" PRIu64 " %" PRIu64 " %" PRIu64,
				c.overlay_pages, c.private_pages, c.maps, sums->overlay_pages,
				sums->private_pages, sums->maps);
	return why;
}

/* A page said to be private is; one said to be clean is too if `exact` (right after a reconcile). */
static inline const char *rig_check_private(struct rig *rig, unsigned block, bool exact)
{
	const struct rig_block *b = &rig->blocks[block];
	uint8_t *flags = malloc(b->pages);
	const char *why = NULL;

	if (!flags || os_pagemap_flags(rig->pagemap, b->hva, b->pages, flags))
		abort();
	for (uint64_t i = 0; b->ram && !why && i < b->pages; i++) {
		uint64_t entry = rig_entry(rig, block, i);
		bool truth = rig_flags_private(flags[i]);

		if (entry_source(entry) == ENTRY_OVERLAY &&
		    (entry_is_private(entry) > truth || (exact && entry_is_private(entry) != truth)))
			why = rig_wrong(rig, "block %u page %" PRIu64 ": entry says private=%d, kernel %d", block, i,
					entry_is_private(entry), truth);
	}
	free(flags);
	return why;
}

/* All of the above; `sums` (may be NULL) gets what was counted. */
static RIG_UNUSED const char *rig_check(struct rig *rig, bool reconciled, struct rig_sums *ret_sums)
{
	struct rig_sums sums = { 0 };
	uint64_t maps, splits;
	const char *why;

	rig_read_maps(rig);
	for (unsigned i = 0; i < RIG_BLOCKS; i++) {
		if (!rig->blocks[i].ram)
			continue;
		why = rig_check_block_maps(rig, i, &maps, &splits);
		if (!why)
			why = rig_check_private(rig, i, reconciled);
		if (why)
			return why;
		sums.splits += splits;
	}
	why = rig_check_counts(rig, &sums);
	if (ret_sums)
		*ret_sums = sums;
	return why;
}

#endif
