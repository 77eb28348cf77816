/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* core/ram: each transition on its own, against what the kernel shows. */
#include "os/probe.h"
#include "ram_rig.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/swap.h>
#include <time.h>

#include <cmocka.h>

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

#define BLOCK_PAGES 64
#define FILE_PAGES 256
#define GUEST_TAG(page) (UINT64_C(0x6e57) << 48 | (page))

static const uint64_t block_pages[RIG_BLOCKS] = { BLOCK_PAGES, BLOCK_PAGES };

static int set_up(void **state)
{
	struct rig *rig = malloc(sizeof *rig);

	rig_open(rig, block_pages, FILE_PAGES, UINT64_C(1) << 40);
	*state = rig;
	return 0;
}

static int tear_down(void **state)
{
	rig_close(*state);
	free(*state);
	return 0;
}

/* Entries, mappings, counts and observer agree, and mappings are as few as they can be. */
static void check(struct rig *rig)
{
	struct rig_sums sums;
	const char *why = rig_check(rig, false, &sums);

	if (why)
		fail_msg("%s", why);
	assert_int_equal(sums.splits, 0);
}

static void check_reconciled(struct rig *rig)
{
	const char *why;

	assert_int_equal(ram_reconcile(rig->ram), 0);
	why = rig_check(rig, true, NULL);
	if (why)
		fail_msg("%s", why);
}

/* The transitions with the lock around them; block 0 unless named. */
static int overlay(struct rig *rig, uint64_t page, uint64_t pages, unsigned file, uint64_t file_page)
{
	int r;

	ram_lock(rig->ram);
	r = ram_map_overlay(rig->ram, rig->blocks[0].ram, page, pages, rig->files[file].index, file_page);
	ram_unlock(rig->ram);
	return r;
}

static int return_base(struct rig *rig, uint64_t page, uint64_t pages)
{
	int r;

	ram_lock(rig->ram);
	r = ram_return_base(rig->ram, rig->blocks[0].ram, page, pages);
	ram_unlock(rig->ram);
	return r;
}

static int discard(struct rig *rig, uint64_t page, uint64_t pages)
{
	int r;

	ram_lock(rig->ram);
	r = ram_discard(rig->ram, rig->blocks[0].ram, page, pages);
	ram_unlock(rig->ram);
	return r;
}

static int privatize(struct rig *rig, unsigned file)
{
	int r;

	r = ram_privatize(rig->ram, rig->files[file].index);
	return r;
}

static int settle(struct rig *rig, uint64_t page, uint64_t pages, uint64_t *settled)
{
	int r;

	ram_lock(rig->ram);
	r = ram_settle(rig->ram, rig->blocks[0].ram, page, pages, settled);
	ram_unlock(rig->ram);
	return r;
}

static int detach(struct rig *rig, unsigned file, uint64_t *settled)
{
	int r;

	ram_lock(rig->ram);
	r = ram_detach(rig->ram, rig->files[file].index, settled);
	ram_unlock(rig->ram);
	return r;
}

static struct ram_counts counts(struct rig *rig)
{
	struct ram_counts c;

	ram_get_counts(rig->ram, &c);
	return c;
}

static void guest_writes(struct rig *rig, uint64_t page, uint64_t pages)
{
	for (uint64_t i = page; i < page + pages; i++)
		rig_write(rig_hva(rig, 0, i), GUEST_TAG(i));
}

static void assert_guest_tags(struct rig *rig, uint64_t page, uint64_t pages)
{
	for (uint64_t i = page; i < page + pages; i++)
		assert_true(rig_holds(rig_hva(rig, 0, i), GUEST_TAG(i)));
}

static void assert_zero(struct rig *rig, uint64_t page, uint64_t pages)
{
	for (uint64_t i = page; i < page + pages; i++)
		assert_true(rig_holds(rig_hva(rig, 0, i), 0));
}

static void assert_file_tags(struct rig *rig, uint64_t page, uint64_t pages, unsigned file, unsigned version,
			     uint64_t file_page)
{
	for (uint64_t i = 0; i < pages; i++)
		assert_true(rig_holds(rig_hva(rig, 0, page + i), rig_file_tag(file, version, file_page + i)));
}

static struct ram_range range_at(struct rig *rig, uint64_t page)
{
	struct ram_range range;

	ram_lock(rig->ram);
	range = ram_range_at(rig->blocks[0].ram, page, BLOCK_PAGES);
	ram_unlock(rig->ram);
	return range;
}

static void assert_no_memory_beneath(struct rig *rig, uint64_t page, uint64_t pages)
{
	for (uint64_t i = page; i < page + pages; i++)
		assert_false(rig_has_memory_beneath(rig, 0, i));
}

/* ---- blocks --------------------------------------------------------------------------------- */

static void test_blocks_come_and_go(void **state)
{
	struct rig *rig = *state;
	struct ram_counts before = counts(rig);

	check(rig);
	assert_int_equal(before.pages, 2 * BLOCK_PAGES);
	assert_int_equal(before.maps, 2);
	assert_int_equal(overlay(rig, 8, 8, 0, 0), 0);

	ram_lock(rig->ram);
	ram_remove_block(rig->ram, rig->blocks[0].ram);
	ram_unlock(rig->ram);
	rig->blocks[0].ram = NULL;
	assert_int_equal(counts(rig).pages, BLOCK_PAGES);
	assert_int_equal(counts(rig).overlay_pages, 0);
	assert_int_equal(rig->files[0].lost[RAM_LOST_DROPPED], 8);
	assert_null(ram_find(rig->ram, rig_hva(rig, 0, 8), 1));
	check(rig);

	rig_map_block(&rig->blocks[0]);
	assert_int_equal(rig_add_block(rig, 0), 0);
	check(rig);
	assert_int_equal(counts(rig).maps, before.maps);
	assert_int_equal(counts(rig).pages, before.pages);
}

static void test_too_many_blocks(void **state)
{
	struct rig *rig = *state;
	struct ram_block *more[RAM_BLOCKS];
	unsigned n = 0;
	int r;

	ram_lock(rig->ram);
	do
		r = ram_add_block(rig->ram, "more", rig->blocks[1].hva, 1, rig->blocks[1].memfd, 0, &more[n]);
	while (!r && ++n < RAM_BLOCKS);
	for (unsigned i = 0; i < n; i++)
		ram_remove_block(rig->ram, more[i]);
	ram_unlock(rig->ram);
	assert_int_equal(r, -ENOSPC);
	assert_int_equal(n, RAM_BLOCKS - RIG_BLOCKS);
	check(rig);
}

static void test_failed_add_leaves_nothing(void **state)
{
	struct rig *rig = *state;
	struct ram_block *block = (struct ram_block *)rig;
	struct ram_counts before = counts(rig), after;

	ram_lock(rig->ram);
	assert_int_not_equal(ram_add_block(rig->ram, "huge", rig->blocks[1].hva, UINT64_C(1) << 50, 0, 0, &block), 0);
	assert_int_not_equal(ram_add_block(rig->ram, "none", rig->blocks[1].hva, 0, 0, 0, &block), 0);
	ram_unlock(rig->ram);
	after = counts(rig);
	assert_ptr_equal(block, rig);
	assert_memory_equal(&before, &after, sizeof before);
}

static void test_find_edges(void **state)
{
	struct rig *rig = *state;
	uint8_t *hva = rig->blocks[0].hva;
	size_t bytes = os_bytes(BLOCK_PAGES);

	assert_ptr_equal(ram_find(rig->ram, hva, 1), rig->blocks[0].ram);
	assert_ptr_equal(ram_find(rig->ram, hva, bytes), rig->blocks[0].ram);
	assert_ptr_equal(ram_find(rig->ram, hva + bytes - 1, 1), rig->blocks[0].ram);
	assert_ptr_equal(ram_find(rig->ram, rig->blocks[1].hva + 5, 100), rig->blocks[1].ram);
	assert_null(ram_find(rig->ram, hva, bytes + 1));
	assert_null(ram_find(rig->ram, hva - 1, 1));
	assert_null(ram_find(rig->ram, hva - 1, 2));
	assert_null(ram_find(rig->ram, hva + bytes, 1));
	assert_null(ram_find(rig->ram, hva + bytes - 1, 2));
	assert_null(ram_find(rig->ram, hva + 1, SIZE_MAX));
	assert_null(ram_find(rig->ram, NULL, 1));
}

static struct {
	unsigned calls;
	struct ram_block *block[4];
	uint64_t page[4], pages[4];
	int error;
} parts;

static int note_part(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages)
{
	(void)ram;
	parts.block[parts.calls] = block;
	parts.page[parts.calls] = page;
	parts.pages[parts.calls] = pages;
	return parts.calls++ ? 0 : parts.error;
}

static int for_part(struct rig *rig, const uint8_t *hva, size_t bytes)
{
	int r;

	memset(&parts.calls, 0, sizeof parts.calls);
	ram_lock(rig->ram);
	r = ram_for_part(rig->ram, hva, bytes, note_part);
	ram_unlock(rig->ram);
	return r;
}

static void assert_one_part(struct rig *rig, const uint8_t *hva, size_t bytes, uint64_t page, uint64_t pages)
{
	assert_int_equal(for_part(rig, hva, bytes), 0);
	assert_int_equal(parts.calls, 1);
	assert_ptr_equal(parts.block[0], rig->blocks[0].ram);
	assert_int_equal(parts.page[0], page);
	assert_int_equal(parts.pages[0], pages);
}

static void test_for_part_edges(void **state)
{
	struct rig *rig = *state;
	uint8_t *hva = rig->blocks[0].hva;
	const size_t page = OS_PAGE_BYTES, bytes = os_bytes(BLOCK_PAGES);

	parts.error = 0;
	assert_one_part(rig, hva, bytes, 0, BLOCK_PAGES);
	assert_one_part(rig, hva - 2 * page, 3 * page, 0, 1);
	assert_one_part(rig, hva + bytes - page, 2 * page, BLOCK_PAGES - 1, 1);
	assert_one_part(rig, hva + 3 * page, 4 * page, 3, 4);
	for_part(rig, hva - 2 * page, 2 * page);
	assert_int_equal(parts.calls, 0);
	for_part(rig, hva + bytes, page);
	assert_int_equal(parts.calls, 0);
	for_part(rig, hva, 0);
	assert_int_equal(parts.calls, 0);

	/* Both blocks and the gap between them; the first error is returned, the rest still done. */
	parts.error = -EIO;
	assert_int_equal(for_part(rig, rig->area, rig->area_bytes), -EIO);
	assert_int_equal(parts.calls, 2);
	assert_int_equal(parts.pages[1], BLOCK_PAGES);
	parts.error = 0;
}

/* A page that is only partly inside must not be given to a discard. */
static void test_for_part_unaligned(void **state)
{
	struct rig *rig = *state;
	uint8_t *hva = rig->blocks[0].hva;
	const size_t page = OS_PAGE_BYTES;

	assert_one_part(rig, hva + 2 * page - 1, 2 * page, 2, 1);
	assert_one_part(rig, hva + 2 * page, 2 * page + 1, 2, 2);
	assert_one_part(rig, hva + page + 1, 2 * page - 1, 2, 1);
	for_part(rig, hva + page / 2, page);
	assert_int_equal(parts.calls, 0);
	for_part(rig, hva + 1, page - 1);
	assert_int_equal(parts.calls, 0);
}

static int for_file_part(struct rig *rig, uint64_t offset, uint64_t bytes)
{
	int r;

	parts.calls = 0;
	ram_lock(rig->ram);
	r = ram_for_file_part(rig->ram, offset, bytes, note_part);
	ram_unlock(rig->ram);
	return r;
}

/* Block 0 begins with its memfd, block 1 RIG_MEMFD_OFFSET_PAGES further: here, they share one. */
static void test_for_file_part_edges(void **state)
{
	struct rig *rig = *state;
	const uint64_t shift = RIG_MEMFD_OFFSET_PAGES;

	parts.error = 0;
	for_file_part(rig, 0, os_bytes(2));
	assert_int_equal(parts.calls, 1);
	assert_ptr_equal(parts.block[0], rig->blocks[0].ram);
	assert_int_equal(parts.page[0], 0);
	assert_int_equal(parts.pages[0], 2);
	for_file_part(rig, os_bytes(2), os_bytes(4));
	assert_int_equal(parts.calls, 2);
	assert_int_equal(parts.page[0], 2);
	assert_int_equal(parts.pages[0], 4);
	assert_ptr_equal(parts.block[1], rig->blocks[1].ram);
	assert_int_equal(parts.page[1], 0);
	assert_int_equal(parts.pages[1], 2 + 4 - shift);
	/* To the end and beyond, without wrapping around. */
	for_file_part(rig, os_bytes(BLOCK_PAGES), UINT64_MAX);
	assert_int_equal(parts.calls, 1);
	assert_int_equal(parts.page[0], BLOCK_PAGES - shift);
	assert_int_equal(parts.pages[0], shift);
	for_file_part(rig, UINT64_MAX - OS_PAGE_BYTES, UINT64_MAX);
	assert_int_equal(parts.calls, 0);
	for_file_part(rig, os_bytes(BLOCK_PAGES + shift), OS_PAGE_BYTES);
	assert_int_equal(parts.calls, 0);
	for_file_part(rig, 0, 0);
	assert_int_equal(parts.calls, 0);
	/* Only whole pages. */
	for_file_part(rig, 1, 2 * OS_PAGE_BYTES - 2);
	assert_int_equal(parts.calls, 0);
	for_file_part(rig, 1, 2 * OS_PAGE_BYTES);
	assert_int_equal(parts.calls, 1);
	assert_int_equal(parts.page[0], 1);
	assert_int_equal(parts.pages[0], 1);
}

static void test_has_overlay(void **state)
{
	struct rig *rig = *state;
	const struct ram_block *b = rig->blocks[0].ram;

	assert_false(ram_has_overlay(b, 0, BLOCK_PAGES));
	assert_int_equal(overlay(rig, 8, 4, 0, 0), 0);
	assert_true(ram_has_overlay(b, 0, BLOCK_PAGES));
	assert_true(ram_has_overlay(b, 11, 1));
	assert_false(ram_has_overlay(b, 0, 8));
	assert_false(ram_has_overlay(b, 12, BLOCK_PAGES - 12));
	assert_false(ram_has_overlay(b, 9, 0));
}

static void test_remove_all_blocks(void **state)
{
	struct rig *rig = *state;

	assert_int_equal(overlay(rig, 8, 4, 0, 0), 0);
	ram_remove_blocks(rig->ram);
	for (unsigned i = 0; i < RIG_BLOCKS; i++)
		rig->blocks[i].ram = NULL;
	assert_int_equal(counts(rig).pages, 0);
	assert_int_equal(counts(rig).maps, 0);
	assert_int_equal(counts(rig).overlay_pages, 0);
	assert_file_tags(rig, 8, 4, 0, 0, 0); /* what was mapped stays */
	ram_lock(rig->ram);
	for (unsigned i = 0; i < RIG_FILES; i++)
		ram_drop_file(rig->ram, rig->files[i].index);
	ram_unlock(rig->ram);
}

static void test_table_is_sealed(void **state)
{
	struct rig *rig = *state;
	int fd = rig->blocks[0].ram->entries_fd;
	size_t bytes = BLOCK_PAGES * sizeof(uint64_t);
	uint64_t word = 1, *view;

	assert_ptr_equal(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
	assert_int_equal(pwrite(fd, &word, sizeof word, 0), -1);
	assert_int_equal(ftruncate(fd, 0), -1);
	assert_int_equal(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, OS_PAGE_BYTES), -1);

	view = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
	assert_ptr_not_equal(view, MAP_FAILED);
	assert_int_equal(mprotect(view, bytes, PROT_READ | PROT_WRITE), -1);
	assert_int_equal(overlay(rig, 5, 1, 1, 7), 0);
	assert_int_equal(view[5], entry_overlay(rig->files[1].index, 7));
	assert_int_equal(view[4], 0);
	munmap(view, bytes);
}

/* ---- files ---------------------------------------------------------------------------------- */

static void test_files(void **state)
{
	struct rig *rig = *state;
	int fd = rig->files[0].fd, first, last = 0;

	ram_lock(rig->ram);
	assert_int_equal(ram_add_file(rig->ram, fd, ENTRY_FILE_PAGES + 1, NULL), -EFBIG);
	first = ram_add_file(rig->ram, fd, 1, NULL);
	assert_true(first >= 0);
	ram_drop_file(rig->ram, (unsigned)first);
	assert_int_equal(ram_add_file(rig->ram, fd, 1, NULL), first);
	while (last >= 0 && last < (int)ENTRY_FILES)
		last = ram_add_file(rig->ram, fd, 1, NULL);
	assert_int_equal(last, -ENOSPC);
	/* The highest index works like the lowest. */
	assert_int_equal(ram_map_overlay(rig->ram, rig->blocks[0].ram, 3, 1, ENTRY_FILES - 1, 0), 0);
	assert_int_equal(ram_mapped_pages(rig->ram, ENTRY_FILES - 1), 1);
	assert_int_equal(ram_mapped_pages(rig->ram, (unsigned)first), 0);
	assert_int_equal(ram_detach(rig->ram, ENTRY_FILES - 1, NULL), 0);
	ram_drop_file(rig->ram, ENTRY_FILES - 1);
	ram_unlock(rig->ram);
	assert_true(rig_holds(rig_hva(rig, 0, 3), rig_file_tag(0, 0, 0)));
	check(rig);
}

/* ---- overlays ------------------------------------------------------------------------------- */

static void test_overlay_whole_block(void **state)
{
	struct rig *rig = *state;

	guest_writes(rig, 0, BLOCK_PAGES);
	assert_int_equal(overlay(rig, 0, BLOCK_PAGES, 1, 10), 0);
	check(rig);
	assert_int_equal(counts(rig).maps, 2);
	assert_file_tags(rig, 0, BLOCK_PAGES, 1, 0, 10);
	assert_no_memory_beneath(rig, 0, BLOCK_PAGES);
}

static void test_overlay_inside(void **state)
{
	struct rig *rig = *state;
	struct ram_range range;

	guest_writes(rig, 0, BLOCK_PAGES);
	assert_int_equal(overlay(rig, 16, 8, 0, 100), 0);
	check(rig);
	assert_int_equal(counts(rig).maps, 4);
	assert_guest_tags(rig, 0, 16);
	assert_file_tags(rig, 16, 8, 0, 0, 100);
	assert_guest_tags(rig, 24, BLOCK_PAGES - 24);
	assert_no_memory_beneath(rig, 16, 8);
	assert_true(rig_has_memory_beneath(rig, 0, 15));
	assert_true(rig_has_memory_beneath(rig, 0, 24));
	range = range_at(rig, 18);
	assert_int_equal(range.pages, 6);
	assert_int_equal(range.source, ENTRY_OVERLAY);
	assert_int_equal(range.file, rig->files[0].index);
	assert_int_equal(range.file_page, 102);
}

static void test_overlay_adjoining_merges(void **state)
{
	struct rig *rig = *state;

	assert_int_equal(overlay(rig, 16, 4, 0, 100), 0);
	assert_int_equal(overlay(rig, 24, 4, 0, 108), 0);
	assert_int_equal(counts(rig).maps, 6);
	assert_int_equal(overlay(rig, 20, 4, 0, 104), 0); /* closes the gap */
	check(rig);
	assert_int_equal(counts(rig).maps, 4);
	assert_int_equal(range_at(rig, 16).pages, 12);
	assert_int_equal(overlay(rig, 28, 4, 0, 113), 0); /* adjoins, but one page further in the file */
	assert_int_equal(overlay(rig, 12, 4, 1, 96), 0);  /* adjoins, of another file */
	check(rig);
	assert_int_equal(counts(rig).maps, 6);
	assert_file_tags(rig, 16, 12, 0, 0, 100);
}

static void test_overlay_over_overlay(void **state)
{
	struct rig *rig = *state;

	assert_int_equal(overlay(rig, 8, 16, 0, 0), 0);
	guest_writes(rig, 12, 2);
	check_reconciled(rig);
	assert_int_equal(overlay(rig, 12, 4, 1, 50), 0);
	assert_int_equal(counts(rig).private_pages, 0);
	assert_int_equal(counts(rig).overlay_pages, 16);
	assert_int_equal(rig->files[0].lost[RAM_LOST_COPIED], 2);
	assert_int_equal(rig->files[0].lost[RAM_LOST_DROPPED], 2);
	assert_file_tags(rig, 8, 4, 0, 0, 0);
	assert_file_tags(rig, 12, 4, 1, 0, 50);
	assert_file_tags(rig, 16, 8, 0, 0, 8);
	assert_null(rig_check(rig, false, NULL));
	/* The same file page again drops private copies, and is one mapping with its neighbours. */
	assert_int_equal(overlay(rig, 12, 4, 0, 4), 0);
	assert_file_tags(rig, 8, 16, 0, 0, 0);
	assert_null(rig_check(rig, false, NULL));
	assert_int_equal(counts(rig).maps, 4);
}

static void test_overlay_out_of_range(void **state)
{
	struct rig *rig = *state;

	assert_int_equal(overlay(rig, 0, 0, 0, 0), -ERANGE);
	assert_int_equal(overlay(rig, 0, BLOCK_PAGES + 1, 0, 0), -ERANGE);
	assert_int_equal(overlay(rig, BLOCK_PAGES, 1, 0, 0), -ERANGE);
	assert_int_equal(overlay(rig, 1, UINT64_MAX, 0, 0), -ERANGE);
	assert_int_equal(overlay(rig, UINT64_MAX, 2, 0, 0), -ERANGE);
	assert_int_equal(overlay(rig, 0, 1, 0, FILE_PAGES), -ERANGE);
	assert_int_equal(overlay(rig, 0, 2, 0, FILE_PAGES - 1), -ERANGE);
	assert_int_equal(overlay(rig, 0, 2, 0, UINT64_MAX), -ERANGE);
	check(rig);
	assert_int_equal(overlay(rig, BLOCK_PAGES - 1, 1, 0, FILE_PAGES - 1), 0);
	check(rig);
}

static void test_budget(void **unused)
{
	struct rig rig;
	struct ram_counts c;

	(void)unused;
	rig_open(&rig, block_pages, FILE_PAGES, 1);
	assert_int_equal(overlay(&rig, 8, 8, 0, 0), -EDQUOT);
	assert_int_equal(overlay(&rig, 0, 8, 0, 0), -EDQUOT);
	/* A whole block needs no mapping more than it has. */
	assert_int_equal(overlay(&rig, 0, BLOCK_PAGES, 0, 0), 0);
	assert_int_equal(overlay(&rig, 0, BLOCK_PAGES, 1, 0), 0);
	assert_int_equal(overlay(&rig, 8, 8, 1, 8), 0);
	assert_int_equal(overlay(&rig, 8, 8, 1, 9), -EDQUOT);
	check(&rig);
	c = counts(&rig);
	assert_int_equal(c.budget_maps, 1);
	assert_int_equal(c.failures, 0);
	rig_close(&rig);

	/* Room for exactly two more. The rest of the process may map something meanwhile (a sanitizer
	 * does): then once more. */
	for (int tries = 0; tries < 20; tries++) {
		uint64_t budget = c.maps + c.other_maps + 2;

		rig_open(&rig, block_pages, FILE_PAGES, budget);
		c = counts(&rig);
		if (c.maps + c.other_maps + 2 == budget)
			break;
		rig_close(&rig);
	}
	assert_int_equal(overlay(&rig, 8, 8, 0, 0), 0);
	assert_int_equal(overlay(&rig, 40, 8, 0, 0), -EDQUOT);
	assert_int_equal(overlay(&rig, 16, 8, 0, 8), 0);  /* merges */
	assert_int_equal(overlay(&rig, 8, 16, 1, 30), 0); /* in place */
	assert_int_equal(overlay(&rig, 8, 8, 0, 0), -EDQUOT);
	assert_int_equal(return_base(&rig, 8, 16), 0);
	assert_int_equal(overlay(&rig, 40, 8, 0, 0), 0);
	check(&rig);
	rig_close(&rig);
}

static void test_default_budget(void **unused)
{
	struct ram *ram;
	struct ram_counts c;

	(void)unused;
	assert_int_equal(ram_create(0, &ram), 0);
	ram_get_counts(ram, &c);
	assert_int_equal(c.budget_maps, os_max_maps() / 2);
	assert_true(c.other_maps > 5);
	ram_destroy(ram);
	ram_destroy(NULL);
}

/* ---- return, discard ------------------------------------------------------------------------ */

static void test_return_base(void **state)
{
	struct rig *rig = *state;

	guest_writes(rig, 0, BLOCK_PAGES);
	assert_int_equal(overlay(rig, 8, 16, 0, 0), 0);
	guest_writes(rig, 10, 2);
	assert_int_equal(return_base(rig, 4, 8), 0); /* base and the overlay's first half */
	assert_guest_tags(rig, 0, 8);
	assert_zero(rig, 8, 4); /* nothing of before the overlay, nor of the private copies */
	assert_file_tags(rig, 12, 12, 0, 0, 4);
	check(rig);
	assert_int_equal(return_base(rig, 0, BLOCK_PAGES), 0);
	assert_zero(rig, 12, 12);
	assert_int_equal(counts(rig).overlay_pages, 0);
	assert_int_equal(counts(rig).maps, 2);
	check(rig);
}

static void test_return_saves_maps(void **state)
{
	struct rig *rig = *state;
	struct ram_block *b = rig->blocks[0].ram;

	assert_int_equal(overlay(rig, 8, 16, 0, 0), 0);
	ram_lock(rig->ram);
	assert_true(ram_return_saves_maps(b, 8, 16));  /* whole */
	assert_true(ram_return_saves_maps(b, 8, 4));   /* at its edges */
	assert_true(ram_return_saves_maps(b, 20, 4));
	assert_true(ram_return_saves_maps(b, 4, 8));
	assert_false(ram_return_saves_maps(b, 12, 4)); /* in its middle: splits */
	assert_true(ram_return_saves_maps(b, 0, 4));
	assert_true(ram_return_saves_maps(b, 0, BLOCK_PAGES));
	ram_unlock(rig->ram);
}

static void test_discard(void **state)
{
	struct rig *rig = *state;

	guest_writes(rig, 0, BLOCK_PAGES);
	assert_int_equal(overlay(rig, 8, 16, 0, 0), 0);
	guest_writes(rig, 10, 2);
	assert_int_equal(discard(rig, 4, 8), 0);
	assert_no_memory_beneath(rig, 4, 8);
	assert_zero(rig, 4, 8);
	assert_guest_tags(rig, 0, 4);
	assert_file_tags(rig, 12, 12, 0, 0, 4);
	check(rig);
	assert_int_equal(discard(rig, 0, BLOCK_PAGES), 0);
	assert_no_memory_beneath(rig, 0, BLOCK_PAGES);
	assert_zero(rig, 0, BLOCK_PAGES);
	assert_int_equal(counts(rig).overlay_pages, 0);
	assert_int_equal(counts(rig).maps, 2);
	check(rig);
}

/* A punch that fails when an overlay is mapped leaves memory beneath it; nobody may see that again. */
static void test_what_lay_beneath_never_reappears(void **state)
{
	struct rig *rig = *state;
	uint64_t tag = 0;

	guest_writes(rig, 0, BLOCK_PAGES);
	os_fault_arm(OS_FAULT_PUNCH, 1, ENOMEM);
	assert_int_equal(overlay(rig, 8, 16, 0, 0), 0);
	os_fault_arm(OS_FAULT_PUNCH, 0, 0);
	assert_true(rig_beneath(rig, 0, 9, &tag));
	assert_int_equal(tag, GUEST_TAG(9)); /* so the test tests something */
	check(rig);
	assert_int_equal(discard(rig, 8, 8), 0);
	assert_zero(rig, 8, 8);
	assert_int_equal(settle(rig, 16, 8, NULL), 0);
	assert_file_tags(rig, 16, 8, 0, 0, 8);
	check(rig);
}

/* ---- privatize, settle, detach -------------------------------------------------------------- */

static void test_privatize(void **state)
{
	struct rig *rig = *state;

	assert_int_equal(overlay(rig, 0, 16, 0, 20), 0);
	assert_int_equal(overlay(rig, 16, 16, 1, 20), 0);
	assert_int_equal(overlay(rig, 40, 4, 0, 90), 0);
	guest_writes(rig, 2, 1);
	assert_int_equal(privatize(rig, 0), 0);
	assert_int_equal(counts(rig).private_pages, 20);
	assert_int_equal(rig->files[0].lost[RAM_LOST_PRIVATIZED], 20);
	assert_int_equal(rig->files[1].lost[RAM_LOST_PRIVATIZED], 0);
	check_reconciled(rig);
	rig_write_file(&rig->files[0], 1);
	rig_write_file(&rig->files[1], 1);
	assert_file_tags(rig, 0, 2, 0, 0, 20);
	assert_guest_tags(rig, 2, 1);
	assert_file_tags(rig, 3, 13, 0, 0, 23);
	assert_file_tags(rig, 40, 4, 0, 0, 90);
	assert_file_tags(rig, 16, 16, 1, 1, 20); /* clean: the rewrite shows, which is why there are leases */
	assert_int_equal(privatize(rig, 0), 0);  /* again: nothing to do */
	assert_int_equal(counts(rig).private_pages, 20);
	check_reconciled(rig);
}

static void *privatize_first(void *ctx)
{
	assert_int_equal(privatize(ctx, 0), 0);
	return NULL;
}

/* A thread that no freeze stops privatizes with no lock: what it has copied, and not flagged yet, must stay. */
static void test_zap_beside_privatize(void **state)
{
	struct rig *rig = *state;
	struct ram_block *b = rig->blocks[0].ram;
	int zapped, other;
	pthread_t thread;

	assert_int_equal(overlay(rig, 0, 16, 0, 20), 0);
	assert_int_equal(overlay(rig, 16, 16, 1, 20), 0);
	assert_int_equal(os_fault_parse("populate:delay:500"), 0); /* before it copies */
	assert_int_equal(pthread_create(&thread, NULL, privatize_first, rig), 0);
	usleep(200000);
	ram_lock(rig->ram);
	assert_int_equal(ram_update_private(rig->ram, b, 0, 32), 0);
	guest_writes(rig, 2, 1); /* stands for a copy of the other thread's */
	zapped = ram_zap_clean(rig->ram, b, 0, 16);
	other = ram_zap_clean(rig->ram, b, 16, 16);
	ram_zap_clean_overlays(rig->ram);
	ram_unlock(rig->ram);
	pthread_join(thread, NULL);
	assert_int_equal(os_fault_parse("populate:delay:0"), 0);
	assert_int_equal(zapped, -EBUSY);
	assert_int_equal(other, 0);
	assert_guest_tags(rig, 2, 1);
	check_reconciled(rig);
	ram_lock(rig->ram);
	assert_int_equal(ram_zap_clean(rig->ram, b, 0, 16), 0); /* it is over: they are known to be copies */
	ram_unlock(rig->ram);
	assert_guest_tags(rig, 2, 1);
}

/* Longer than the slices that privatizing goes by, of two mappings, some copied already. */
static void test_privatize_much(void **unused)
{
	static const uint64_t many[RIG_BLOCKS] = { 1500, 700 };
	struct rig rig;

	(void)unused;
	rig_open(&rig, many, 3000, UINT64_C(1) << 40);
	assert_int_equal(overlay(&rig, 3, 1490, 0, 1), 0);
	ram_lock(rig.ram);
	assert_int_equal(ram_map_overlay(rig.ram, rig.blocks[1].ram, 0, 700, rig.files[0].index, 2000), 0);
	ram_unlock(rig.ram);
	guest_writes(&rig, 500, 30);
	check_reconciled(&rig);
	assert_int_equal(privatize(&rig, 0), 0);
	assert_int_equal(counts(&rig).private_pages, 1490 + 700);
	assert_int_equal(rig.files[0].lost[RAM_LOST_PRIVATIZED], 1490 + 700 - 30);
	rig_write_file(&rig.files[0], 1);
	assert_file_tags(&rig, 3, 497, 0, 0, 1);
	assert_guest_tags(&rig, 500, 30);
	assert_file_tags(&rig, 530, 963, 0, 0, 528);
	for (uint64_t i = 0; i < 700; i++)
		assert_true(rig_holds(rig_hva(&rig, 1, i), rig_file_tag(0, 0, 2000 + i)));
	check_reconciled(&rig);
	rig_close(&rig);
}

static int ignore_run(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	(void)ctx;
	(void)b;
	(void)page;
	(void)pages;
	return 0;
}

static bool is_present(struct rig *rig, uint64_t page)
{
	uint8_t flags;

	assert_int_equal(os_pagemap_flags(rig->pagemap, rig_hva(rig, 0, page), 1, &flags), 0);
	return flags & OS_PAGE_PRESENT;
}

/* What is clean leaves the page table, but for short runs between copies; no copy is lost. */
static void test_zap_clean_overlays(void **unused)
{
	static const uint64_t many[RIG_BLOCKS] = { 400, 1 };
	static const uint64_t copied[] = { 100, 110, 111, 250 };
	struct rig rig;

	(void)unused;
	rig_open(&rig, many, 600, UINT64_C(1) << 40);
	assert_int_equal(overlay(&rig, 0, 300, 0, 0), 0);
	assert_int_equal(overlay(&rig, 300, 8, 0, 500), 0);
	assert_file_tags(&rig, 0, 300, 0, 0, 0);
	assert_file_tags(&rig, 300, 8, 0, 0, 500);
	for (size_t i = 0; i < sizeof copied / sizeof copied[0]; i++)
		guest_writes(&rig, copied[i], 1);
	ram_lock(rig.ram);
	assert_int_equal(ram_for_private(rig.ram, ignore_run, NULL), 0);
	ram_zap_clean_overlays(rig.ram);
	ram_unlock(rig.ram);
	for (uint64_t page = 0; page < 308; page++)
		assert_int_equal(is_present(&rig, page), (page >= 100 && page <= 111) || page == 250);
	for (size_t i = 0; i < sizeof copied / sizeof copied[0]; i++)
		assert_guest_tags(&rig, copied[i], 1);
	assert_file_tags(&rig, 0, 100, 0, 0, 0);
	assert_file_tags(&rig, 101, 9, 0, 0, 101);
	assert_file_tags(&rig, 112, 138, 0, 0, 112);
	assert_file_tags(&rig, 251, 49, 0, 0, 251);
	assert_file_tags(&rig, 300, 8, 0, 0, 500);
	check_reconciled(&rig);
	rig_close(&rig);
}

/* What a save takes of private copies: the first word of each page; and how many, as is said. */
struct copies {
	uint64_t *words;
	uint64_t written, all;
};

static int note_protected(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	struct copies *c = ctx;

	for (uint64_t i = page; i < page + pages; i++)
		c->words[i] = *(uint64_t *)(void *)(b->hva + os_bytes(i));
	return 0;
}

static int note_written(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	struct copies *c = ctx;

	c->written += pages;
	return note_protected(ctx, b, page, pages);
}

static int count_copies(void *ctx, struct ram_block *b, uint64_t page, uint64_t pages)
{
	struct copies *c = ctx;

	(void)b;
	(void)page;
	c->all += pages;
	return 0;
}

/* What was written is found once, and then only what is written after that. */
static void protect_written(struct rig *rig, struct copies *copies)
{
	struct ram_block *b = rig->blocks[0].ram;

	copies->written = 0;
	ram_lock(rig->ram);
	assert_int_equal(ram_protect_written(rig->ram, b, 0, 2000, note_written, copies), 0);
	assert_int_equal(copies->written, 1500 / 4 + 38 + 15);
	assert_int_equal(ram_for_written(rig->ram, note_written, copies), 0);
	assert_int_equal(copies->written, 1500 / 4 + 38 + 15);
	rig_write(rig_hva(rig, 0, 100), 9100);  /* a copy */
	rig_write(rig_hva(rig, 0, 1703), 9703); /* a clean page */
	assert_int_equal(ram_protect_written(rig->ram, b, 0, 1000, note_written, copies), 0);
	assert_int_equal(copies->written, 1500 / 4 + 38 + 15 + 1);
	assert_int_equal(ram_for_written(rig->ram, note_written, copies), 0);
	assert_int_equal(copies->written, 1500 / 4 + 38 + 15 + 2);
	ram_unlock(rig->ram);
	assert_true(copies->words[100] == 9100 && copies->words[1703] == 9703);
}

/* Copies that are taken while the guest runs, and at the instant only those that it has written since. */
static void test_protect_copies(void **unused)
{
	static const uint64_t many[RIG_BLOCKS] = { 2000, 1 };
	static uint64_t words[2000];
	struct copies copies = { .words = words };
	bool async = os_features_get()->pagemap_scan && os_features_get()->uffd_features & OS_UFFD_WP_ASYNC;
	int uffd = async ? os_uffd_open_unserved(OS_UFFD_PAGEFAULT_FLAG_WP | OS_UFFD_WP_ASYNC) : -1;
	struct rig rig;

	(void)unused;
	if (uffd < 0) {
		print_message("SKIP: no write-protection that serves itself here (Linux 6.7)\n");
		skip();
	}
	rig_open(&rig, many, 3000, UINT64_C(1) << 40);
	assert_int_equal(overlay(&rig, 100, 1500, 0, 0), 0);
	assert_int_equal(overlay(&rig, 1700, 100, 1, 0), 0);
	for (uint64_t page = 0; page < 2000; page += 2) /* of base, too, which is none of them */
		guest_writes(&rig, page, 1);
	ram_lock(rig.ram);
	ram_watch_copies(rig.ram, uffd);
	assert_int_equal(ram_protect_copies(rig.ram, rig.blocks[0].ram, 0, 1000, note_protected, &copies), 0);
	assert_int_equal(ram_protect_copies(rig.ram, rig.blocks[0].ram, 1000, 1000, note_protected, &copies), 0);
	ram_unlock(rig.ram);
	for (uint64_t page = 100; page < 1600; page += 4) /* copies again */
		rig_write(rig_hva(&rig, 0, page), 7000 + page);
	for (uint64_t page = 102; page < 1600; page += 40) /* by the kernel */
		assert_int_equal(pread(rig.files[1].fd, rig_hva(&rig, 0, page), OS_PAGE_BYTES, 0), OS_PAGE_BYTES);
	for (uint64_t page = 101; page < 1600; page += 100) /* new copies */
		rig_write(rig_hva(&rig, 0, page), 7000 + page);
	ram_lock(rig.ram);
	assert_int_equal(ram_for_written(rig.ram, note_written, &copies), 0);
	assert_int_equal(ram_for_copies(rig.ram, count_copies, &copies), 0);
	ram_unlock(rig.ram);
	assert_int_equal(copies.written, 1500 / 4 + 38 + 15);
	assert_int_equal(copies.all, 1500 / 2 + 100 / 2 + 15);
	for (uint64_t page = 100; page < 1800; page++)
		if (words[page])
			assert_int_equal(words[page], *(uint64_t *)(void *)rig_hva(&rig, 0, page));
	assert_true(words[100] && words[101] && words[102] && words[104] && words[1798] && !words[103]);
	protect_written(&rig, &copies);
	ram_unwatch_copies(rig.ram, uffd);
	ram_lock(rig.ram);
	copies.written = copies.all = 0;
	assert_int_equal(ram_for_copies(rig.ram, count_copies, &copies), 0);
	assert_int_equal(ram_for_written(rig.ram, note_written, &copies), 0);
	ram_unlock(rig.ram);
	assert_int_equal(copies.written, copies.all); /* nothing of it is left */
	close(uffd);
	check_reconciled(&rig);
	rig_close(&rig);
}

static void test_settle(void **state)
{
	struct rig *rig = *state;
	uint64_t settled = 5;

	guest_writes(rig, 0, 8);
	assert_int_equal(overlay(rig, 8, 16, 0, 0), 0);
	assert_int_equal(overlay(rig, 30, 4, 1, 0), 0);
	guest_writes(rig, 12, 2);
	assert_int_equal(settle(rig, 4, 16, &settled), 0);
	assert_int_equal(settled, 5 + 12);
	assert_int_equal(rig->files[0].lost[RAM_LOST_SETTLED], 12);
	check(rig);
	rig_write_file(&rig->files[0], 1); /* settled pages have left the file */
	assert_guest_tags(rig, 0, 8);
	assert_file_tags(rig, 8, 4, 0, 0, 0);
	assert_guest_tags(rig, 12, 2);
	assert_file_tags(rig, 14, 6, 0, 0, 6);
	assert_file_tags(rig, 20, 4, 0, 1, 12);
	assert_int_equal(counts(rig).overlay_pages, 8);
	assert_int_equal(counts(rig).private_pages, 0);
}

static void test_detach(void **state)
{
	struct rig *rig = *state;
	uint64_t settled = 0;

	assert_int_equal(overlay(rig, 8, 16, 0, 0), 0);
	assert_int_equal(overlay(rig, 40, 4, 0, 7), 0);
	assert_int_equal(overlay(rig, 30, 4, 1, 0), 0);
	ram_lock(rig->ram);
	assert_int_equal(ram_map_overlay(rig->ram, rig->blocks[1].ram, 60, 4, rig->files[0].index, 60), 0);
	ram_unlock(rig->ram);
	guest_writes(rig, 41, 1);
	check_reconciled(rig);
	assert_int_equal(detach(rig, 0, &settled), 0);
	assert_int_equal(settled, 24);
	check_reconciled(rig);
	assert_int_equal(counts(rig).overlay_pages, 4);
	ram_lock(rig->ram);
	assert_int_equal(ram_mapped_pages(rig->ram, rig->files[0].index), 0);
	ram_unlock(rig->ram);
	assert_int_equal(ftruncate(rig->files[0].fd_rw, 0), 0); /* now even that does no harm */
	assert_file_tags(rig, 8, 16, 0, 0, 0);
	assert_file_tags(rig, 40, 1, 0, 0, 7);
	assert_guest_tags(rig, 41, 1);
	assert_file_tags(rig, 42, 2, 0, 0, 9);
	assert_file_tags(rig, 30, 4, 1, 0, 0);
	assert_true(rig_holds(rig_hva(rig, 1, 63), rig_file_tag(0, 0, 63)));
}

/* A file that was cut: its pages cannot be had any more. An error, not a signal, and the rest stays. */
static void test_truncated_file_is_an_error(void **state)
{
	struct rig *rig = *state;

	assert_int_equal(overlay(rig, 8, 8, 0, 0), 0);
	assert_int_equal(overlay(rig, 24, 8, 1, 0), 0);
	assert_int_equal(ftruncate(rig->files[0].fd_rw, 0), 0);
	assert_int_equal(privatize(rig, 0), -EFAULT);
	assert_int_equal(settle(rig, 0, BLOCK_PAGES, NULL), -EFAULT);
	assert_no_memory_beneath(rig, 8, 8);
	assert_file_tags(rig, 24, 8, 1, 0, 0);
	check(rig);
	assert_int_equal(range_at(rig, 24).source, ENTRY_BASE);
	assert_int_equal(discard(rig, 8, 8), 0);
	assert_zero(rig, 8, 8);
	check(rig);
}

/* What storage still gives is moved around what it does not. */
static void test_settle_goes_around_lost_pages(void **state)
{
	struct rig *rig = *state;
	uint64_t settled = 0;

	assert_int_equal(overlay(rig, 8, 16, 0, 0), 0);
	assert_int_equal(ftruncate(rig->files[0].fd_rw, (off_t)os_bytes(11)), 0);
	assert_int_equal(settle(rig, 0, BLOCK_PAGES, &settled), -EFAULT);
	assert_int_equal(settled, 11);
	assert_file_tags(rig, 8, 11, 0, 0, 0);
	assert_int_equal(range_at(rig, 18).source, ENTRY_BASE);
	assert_int_equal(range_at(rig, 19).source, ENTRY_OVERLAY);
	assert_int_equal(discard(rig, 19, 5), 0);
	check(rig);
}

/* ---- reconcile ------------------------------------------------------------------------------ */

static void test_reconcile_finds_written_pages_only(void **state)
{
	struct rig *rig = *state;
	uint64_t written = 0;

	assert_int_equal(overlay(rig, 0, 48, 0, 0), 0);
	for (uint64_t i = 0; i < BLOCK_PAGES; i++) {
		if (i % 3 == 0)
			continue; /* untouched, as far as fault-around leaves it so */
		if (i % 3 == 1)
			(void)rig_holds(rig_hva(rig, 0, i), 0);
		else
			rig_write(rig_hva(rig, 0, i), GUEST_TAG(i));
		written += i < 48 && i % 3 == 2;
	}
	check_reconciled(rig);
	assert_int_equal(counts(rig).private_pages, written);
	assert_int_equal(rig->files[0].lost[RAM_LOST_COPIED], written);
	for (uint64_t i = 0; i < BLOCK_PAGES; i++)
		assert_int_equal(entry_is_private(rig_entry(rig, 0, i)), i < 48 && i % 3 == 2);
	/* Every page that is still said to map the file does: a page of the file, of this offset. */
	for (uint64_t i = 0; i < 48; i++)
		if (!entry_is_private(rig_entry(rig, 0, i)))
			assert_true(rig_holds(rig_hva(rig, 0, i), rig_file_tag(0, 0, i)));
	check_reconciled(rig);
}

/* A copy that equals the file is a copy: the file may change under it. */
static void test_reconcile_counts_unchanged_writes(void **state)
{
	struct rig *rig = *state;

	assert_int_equal(overlay(rig, 0, 4, 0, 0), 0);
	rig_write(rig_hva(rig, 0, 2), rig_file_tag(0, 0, 2));
	check_reconciled(rig);
	assert_int_equal(counts(rig).private_pages, 1);
}

/* ---- swap ----------------------------------------------------------------------------------- */

#define SWAP_BYTES (16u << 20)
#define SWAP_HEADER_VERSION_AT 1024
#define SWAP_HEADER_LAST_PAGE_AT 1028

static char swap_path[64];

static int swap_off(void **state)
{
	if (swap_path[0]) {
		swapoff(swap_path);
		unlink(swap_path);
		swap_path[0] = '\0';
	}
	return tear_down(state);
}

/* A small swap file of this test's own; false if this machine lets none be made. */
static bool make_swap(void)
{
	uint8_t *zeros = calloc(1, SWAP_BYTES);
	uint32_t version = 1, last_page = SWAP_BYTES / OS_PAGE_BYTES - 1;
	int fd;
	bool ok;

	snprintf(swap_path, sizeof swap_path, "/var/tmp/latent-swap-XXXXXX");
	fd = zeros ? mkstemp(swap_path) : -1;
	if (fd < 0) {
		free(zeros);
		return false;
	}
	memcpy(zeros + SWAP_HEADER_VERSION_AT, &version, sizeof version);
	memcpy(zeros + SWAP_HEADER_LAST_PAGE_AT, &last_page, sizeof last_page);
	memcpy(zeros + OS_PAGE_BYTES - 10, "SWAPSPACE2", 10);
	ok = write(fd, zeros, SWAP_BYTES) == (ssize_t)SWAP_BYTES && !fsync(fd);
	close(fd);
	free(zeros);
	return ok && !swapon(swap_path, 0);
}

static uint64_t swapped_pages(struct rig *rig)
{
	uint8_t flags[BLOCK_PAGES];
	uint64_t n = 0;

	assert_int_equal(os_pagemap_flags(rig->pagemap, rig->blocks[0].hva, BLOCK_PAGES, flags), 0);
	for (unsigned i = 0; i < BLOCK_PAGES; i++)
		n += (flags[i] & OS_PAGE_SWAPPED) && !(flags[i] & OS_PAGE_FILE);
	return n;
}

static void test_reconcile_swapped(void **state)
{
	struct rig *rig = *state;
	struct timespec pause = { 0, 20000000 };
	uint64_t swapped = 0;

	if (!make_swap()) {
		print_message("SKIP: no swap file can be made here (%s)\n", strerror(errno));
		skip();
	}
	assert_int_equal(overlay(rig, 0, BLOCK_PAGES, 0, 0), 0);
	guest_writes(rig, 16, 16);
	for (int tries = 0; tries < 50 && swapped < 16; tries++) {
		madvise(rig->blocks[0].hva, os_bytes(BLOCK_PAGES), MADV_PAGEOUT);
		swapped = swapped_pages(rig);
		nanosleep(&pause, NULL);
	}
	check_reconciled(rig);
	print_message("%" PRIu64 " of 16 pages were swapped out\n", swapped);
	assert_int_equal(counts(rig).private_pages, 16);
	assert_true(swapped > 0);
	assert_guest_tags(rig, 16, 16);
	assert_file_tags(rig, 0, 16, 0, 0, 0);
	/* And settled from swap. */
	madvise(rig->blocks[0].hva, os_bytes(BLOCK_PAGES), MADV_PAGEOUT);
	assert_int_equal(settle(rig, 0, BLOCK_PAGES, NULL), 0);
	assert_guest_tags(rig, 16, 16);
	assert_file_tags(rig, 32, 32, 0, 0, 32);
	check(rig);
}

/* ---- marks ---------------------------------------------------------------------------------- */

static bool has_flag(const void *hva, const char *flag)
{
	char flags[512];

	rig_vm_flags(hva, flags, sizeof flags);
	return strstr(flags, flag);
}

/* As the VMM does it: on the memory itself, and told to the ram. */
static void vmm_advises(struct rig *rig, int advice)
{
	struct rig_block *b = &rig->blocks[0];

	assert_int_equal(madvise(b->hva, os_bytes(b->pages), advice), 0);
	ram_lock(rig->ram);
	ram_remember_advice(rig->ram, b->hva, os_bytes(b->pages), advice);
	ram_unlock(rig->ram);
}

/* ---- source bits --------------------------------------------------------------------------------- */

static void set_source_bits(struct rig *rig, uint64_t page, uint64_t pages)
{
	ram_lock(rig->ram);
	ram_set_source_bits(rig->ram, rig->blocks[0].ram, page, pages);
	ram_unlock(rig->ram);
}

static struct ram_source_counts sources(struct rig *rig)
{
	struct ram_source_counts c;

	assert_int_equal(ram_update_source_bits(rig->ram), 0);
	ram_get_source_counts(rig->ram, &c);
	return c;
}

static bool has_source_bit(struct rig *rig, uint64_t page)
{
	return rig_entry(rig, 0, page) & ENTRY_SOURCE_BIT;
}

/* The kernel maps up to 16 pages around one that is touched: what is farther away has not been fetched. */
static void test_source_bits_go_when_pages_are_fetched(void **state)
{
	struct rig *rig = *state;
	struct ram_source_counts c;

	assert_int_equal(overlay(rig, 0, 60, 0, 0), 0);
	set_source_bits(rig, 0, BLOCK_PAGES); /* base among them has none */
	c = sources(rig);
	assert_true(c.set == 60 && !c.fetched && c.now == 60);
	assert_false(has_source_bit(rig, 60));
	set_source_bits(rig, 3, 5);
	assert_int_equal(sources(rig).set, 60); /* they had it */
	assert_true(rig_holds(rig_hva(rig, 0, 30), rig_file_tag(0, 0, 30)));
	c = sources(rig);
	assert_true(c.fetched >= 1 && c.fetched <= 32 && c.fetched + c.now == 60);
	assert_false(has_source_bit(rig, 30));
	assert_true(has_source_bit(rig, 0) && has_source_bit(rig, 59));
	check_reconciled(rig);
}

static void test_other_contents_have_no_source_bit(void **state)
{
	struct rig *rig = *state;

	assert_int_equal(overlay(rig, 0, 60, 0, 0), 0);
	set_source_bits(rig, 0, 60);
	assert_int_equal(return_base(rig, 0, 2), 0);
	assert_int_equal(overlay(rig, 10, 4, 1, 7), 0);
	assert_int_equal(discard(rig, 50, 3), 0);
	for (uint64_t i = 0; i < 60; i++)
		assert_int_equal(has_source_bit(rig, i), i >= 2 && (i < 10 || i >= 14) && (i < 50 || i >= 53));
	assert_int_equal(sources(rig).now, 60 - 2 - 4 - 3);
	rig_write(rig_hva(rig, 0, 5), GUEST_TAG(5));
	check_reconciled(rig);
	assert_false(has_source_bit(rig, 5));
	assert_true(entry_is_private(rig_entry(rig, 0, 5)));
}

/* They are no part of what an entry says of its mapping. */
static void test_source_bits_hinder_nobody(void **state)
{
	struct rig *rig = *state;

	assert_int_equal(overlay(rig, 0, 16, 0, 20), 0);
	set_source_bits(rig, 4, 6);
	assert_int_equal(overlay(rig, 16, 16, 0, 36), 0); /* joins the others */
	check(rig);
	assert_int_equal(privatize(rig, 0), 0);
	assert_int_equal(counts(rig).private_pages, 32);
	for (uint64_t i = 0; i < 32; i++)
		assert_true(entry_is_private(rig_entry(rig, 0, i)) && !has_source_bit(rig, i));
	check_reconciled(rig);
	rig_write_file(&rig->files[0], 1);
	assert_file_tags(rig, 0, 32, 0, 0, 20);
}

static void test_marks_are_reapplied(void **state)
{
	struct rig *rig = *state;

	vmm_advises(rig, MADV_DONTFORK);
	vmm_advises(rig, MADV_DONTDUMP);
	vmm_advises(rig, MADV_HUGEPAGE);
	assert_int_equal(overlay(rig, 8, 8, 0, 0), 0);
	assert_true(has_flag(rig_hva(rig, 0, 8), "dc"));
	assert_true(has_flag(rig_hva(rig, 0, 8), "dd"));
	assert_false(has_flag(rig_hva(rig, 0, 8), "hg")); /* base only */
	assert_true(has_flag(rig_hva(rig, 0, 7), "hg"));
	check(rig);
	assert_int_equal(return_base(rig, 8, 4), 0);
	assert_int_equal(settle(rig, 12, 2, NULL), 0);
	assert_int_equal(discard(rig, 14, 2), 0);
	for (uint64_t i = 8; i < 16; i++) {
		assert_true(has_flag(rig_hva(rig, 0, i), "dc"));
		assert_true(has_flag(rig_hva(rig, 0, i), "dd"));
		assert_true(has_flag(rig_hva(rig, 0, i), "hg"));
	}
	check(rig); /* one mapping again, as all have the same marks */
	assert_int_equal(counts(rig).maps, 2);
	assert_int_equal(counts(rig).unmarked, 0);

	vmm_advises(rig, MADV_DOFORK);
	vmm_advises(rig, MADV_DODUMP);
	vmm_advises(rig, MADV_NOHUGEPAGE);
	assert_int_equal(overlay(rig, 8, 8, 0, 0), 0);
	assert_int_equal(return_base(rig, 8, 8), 0);
	assert_false(has_flag(rig_hva(rig, 0, 8), "dc"));
	assert_false(has_flag(rig_hva(rig, 0, 8), "dd"));
	assert_false(has_flag(rig_hva(rig, 0, 8), "hg"));
	assert_true(has_flag(rig_hva(rig, 0, 8), "nh"));
	check(rig);
	assert_false(has_flag(rig_hva(rig, 1, 0), "nh")); /* the other block was not meant */
	ram_lock(rig->ram);
	assert_int_equal(rig->blocks[1].ram->marks, 0);
	ram_unlock(rig->ram);
}

/* The line of /proc/self/numa_maps for the mapping that begins there. */
static bool has_policy(const void *hva, const char *policy)
{
	FILE *f = fopen("/proc/self/numa_maps", "re");
	char line[512], want[32];
	bool found = false;

	if (!f) {
		print_message("SKIP: the kernel has no NUMA\n");
		skip();
	}
	snprintf(want, sizeof want, "%lx ", (unsigned long)hva);
	while (!found && fgets(line, sizeof line, f))
		found = !strncmp(line, want, strlen(want)) && strstr(line, policy);
	fclose(f);
	return found;
}

static void test_policy_is_reapplied(void **state)
{
	struct rig *rig = *state;
	struct os_policy policy = { .mode = 2 /* MPOL_BIND */, .max_node = 64, .nodes = { 1 } };
	struct rig_block *b = &rig->blocks[0];

	ram_lock(rig->ram);
	ram_remember_policy(rig->ram, b->hva, os_bytes(b->pages), &policy);
	ram_unlock(rig->ram);
	assert_int_equal(overlay(rig, 8, 8, 0, 0), 0);
	assert_true(has_policy(rig_hva(rig, 0, 8), "bind:0"));
	assert_int_equal(counts(rig).unmarked, 0);
	ram_lock(rig->ram);
	ram_remember_policy(rig->ram, b->hva, os_bytes(b->pages) / 2, &(struct os_policy){ 0 }); /* a part */
	ram_unlock(rig->ram);
	assert_int_equal(overlay(rig, 32, 8, 0, 32), 0);
	assert_true(has_policy(rig_hva(rig, 0, 32), "bind:0"));
	assert_false(has_policy(rig_hva(rig, 1, 0), "bind:0"));
}

static void test_marks_that_fail_are_counted(void **state)
{
	struct rig *rig = *state;

	vmm_advises(rig, MADV_DONTDUMP);
	os_fault_arm(OS_FAULT_MARK, 1, ENOMEM);
	assert_int_equal(overlay(rig, 8, 8, 0, 0), 0);
	assert_int_equal(counts(rig).unmarked, 1);
	assert_file_tags(rig, 8, 8, 0, 0, 0);
	assert_null(rig_check(rig, false, NULL));
	os_fault_arm(OS_FAULT_MARK, 0, 0);
}

/* ---- many of them --------------------------------------------------------------------------- */

static uint32_t next_random(uint32_t *state) { return *state = *state * 1664525 + 1013904223; }

static void random_transition(struct rig *rig, uint32_t *seed)
{
	uint64_t page = (next_random(seed) >> 8) % BLOCK_PAGES;
	uint64_t pages = 1 + (next_random(seed) >> 8) % (BLOCK_PAGES - page > 12 ? 12 : BLOCK_PAGES - page);
	unsigned file = (next_random(seed) >> 16) & 1;
	/* Often where it would merge, sometimes not. */
	uint64_t file_page = page + (next_random(seed) >> 16) % 2 * 5;
	int r = 0;

	switch ((next_random(seed) >> 16) % 8) {
	default:
		r = overlay(rig, page, pages, file, file_page);
		break;
	case 0:
		r = return_base(rig, page, pages);
		break;
	case 1:
		r = discard(rig, page, pages);
		break;
	case 2:
		r = settle(rig, page, pages, NULL);
		break;
	}
	assert_int_equal(r, 0);
}

/* Without private copies, mappings are exactly as many as the entries say, after every step. */
static void test_random_sequences_map_count(void **state)
{
	struct rig *rig = *state;
	uint32_t seed = 1;

	for (int i = 0; i < 4000; i++) {
		random_transition(rig, &seed);
		check(rig);
	}
	assert_int_equal(detach(rig, 0, NULL), 0);
	assert_int_equal(detach(rig, 1, NULL), 0);
	check(rig);
	assert_int_equal(counts(rig).maps, 2);
}

/*
 * With private copies the kernel may keep apart what could be one mapping: two neighbours that were
 * written before they became neighbours. Such splits are few, and a recount sees them.
 */
static void test_random_sequences_with_writes(void **state)
{
	struct rig *rig = *state;
	uint32_t seed = 2;
	uint64_t most = 0;
	struct rig_sums sums = { 0 };
	uint64_t real;

	for (int i = 0; i < 4000; i++) {
		random_transition(rig, &seed);
		for (int n = 0; n < 4; n++)
			guest_writes(rig, (next_random(&seed) >> 8) % BLOCK_PAGES, 1);
		if (i % 16 == 0)
			assert_int_equal(ram_reconcile(rig->ram), 0);
		if (rig_check(rig, i % 16 == 0 && false, &sums))
			fail_msg("%s", rig->why);
		most = sums.splits > most ? sums.splits : most;
	}
	print_message("mappings beyond the count: at most %" PRIu64 " (of about %" PRIu64 ")\n", most, sums.maps);
	assert_int_equal(ram_recount_maps(rig->ram), 0);
	assert_int_equal(os_count_maps(&real), 0);
	/* /proc/self/maps is read with a buffer that may itself be a mapping. */
	assert_in_range(counts(rig).maps + counts(rig).other_maps, real - 1, real + 1);
	check_reconciled(rig);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
		TEST(test_blocks_come_and_go),
		TEST(test_too_many_blocks),
		TEST(test_failed_add_leaves_nothing),
		TEST(test_find_edges),
		TEST(test_for_part_edges),
		TEST(test_for_part_unaligned),
		TEST(test_for_file_part_edges),
		TEST(test_has_overlay),
		TEST(test_remove_all_blocks),
		TEST(test_table_is_sealed),
		TEST(test_files),
		TEST(test_overlay_whole_block),
		TEST(test_overlay_inside),
		TEST(test_overlay_adjoining_merges),
		TEST(test_overlay_over_overlay),
		TEST(test_overlay_out_of_range),
		cmocka_unit_test(test_budget),
		cmocka_unit_test(test_default_budget),
		TEST(test_return_base),
		TEST(test_return_saves_maps),
		TEST(test_discard),
		TEST(test_what_lay_beneath_never_reappears),
		TEST(test_privatize),
		TEST(test_zap_beside_privatize),
		cmocka_unit_test(test_privatize_much),
		cmocka_unit_test(test_zap_clean_overlays),
		cmocka_unit_test(test_protect_copies),
		TEST(test_settle),
		TEST(test_detach),
		TEST(test_truncated_file_is_an_error),
		TEST(test_settle_goes_around_lost_pages),
		TEST(test_reconcile_finds_written_pages_only),
		TEST(test_reconcile_counts_unchanged_writes),
		cmocka_unit_test_setup_teardown(test_reconcile_swapped, set_up, swap_off),
		cmocka_unit_test_setup_teardown(test_source_bits_go_when_pages_are_fetched, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_other_contents_have_no_source_bit, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_source_bits_hinder_nobody, set_up, tear_down),
		TEST(test_marks_are_reapplied),
		TEST(test_policy_is_reapplied),
		TEST(test_marks_that_fail_are_counted),
		TEST(test_random_sequences_map_count),
		TEST(test_random_sequences_with_writes),
#undef TEST
	};

	alarm(60); /* a test that failed with the range lock held hangs in its tear-down */
	return cmocka_run_group_tests_name("ram", tests, NULL, NULL) ? 1 : 0;
}
