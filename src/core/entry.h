/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The page entry: one 64-bit word for each page of guest RAM. It names the page's source. The table
 * of a RAM block lies in shared memory; only the owner (the agent, under the range lock) writes it,
 * and anybody who was given the table may read it at any time. A word of zero is a plain base page.
 *
 *   63        52 51                              16 15   12 11    8  7  6  5  4  3  2    0
 *  +------------+---------------------------------+-------+-------+--+--+--+--+--+-------+
 *  | file index | page number in the file         | long  | short |pr|sh|sb|kc|nu| source|
 *  +------------+---------------------------------+-------+-------+--+--+--+--+--+-------+
 *
 *  source  enum entry_source: how the page is mapped
 *  nu      needs update: the contents are still to be made; with ENTRY_MASKED only
 *  kc, sh  not used
 *  sb      source bit: the VM came here, and the page is still where its locator says; nobody has fetched it. An access
 *          does, by the kernel's fault on the mapping; the bit goes when that is seen (ram_update_source_bits), or
 *          when the page gets other contents. With ENTRY_OVERLAY only
 *  pr      private, sticky: the guest has written; a copy of its own   (all)
 *  short, long   how much the page is used, by looks and by minutes: activity/states.h. They say
 *          nothing about the source, and stay with the page when that changes
 *  file index, page number   the locator, for an overlay or a masked page. With the file index
 *          ENTRY_WORDS the page is one 8-byte word repeated, and the page number is the word's; with
 *          ENTRY_SPILL it was taken out of memory, and the page number is its slot in the store; with
 *          ENTRY_PEER another host has it, and the page number is 0
 *
 * Ranges are not stored: a range is a longest run of pages whose entries name one mapping (see
 * entry_joins). So ranges and entries cannot disagree.
 */
#ifndef LATENT_CORE_ENTRY_H
#define LATENT_CORE_ENTRY_H

#include <stdbool.h>
#include <stdint.h>

enum entry_source {
	ENTRY_BASE = 0,    /* MAP_SHARED of the VM's own memfd */
	ENTRY_OVERLAY = 1, /* MAP_PRIVATE of a file */
	/* Base, in a mapping that is watched for pages that are not there yet (mask.c): */
	ENTRY_MASKED = 2,  /* needs update: nothing is there; made from the locator when it is touched */
	ENTRY_WATCHED = 3, /* whatever was to be made there has been, and is in the memfd */
};

#define ENTRY_SOURCE_MASK 0x7ull
#define ENTRY_NEEDS_UPDATE (1ull << 3)
#define ENTRY_SOURCE_BIT (1ull << 5)
#define ENTRY_PRIVATE (1ull << 7)
#define ENTRY_SHORT_SHIFT 8
#define ENTRY_LONG_SHIFT 12
#define ENTRY_ACTIVITY (0xffull << ENTRY_SHORT_SHIFT)
#define ENTRY_FILE_SHIFT 52
#define ENTRY_PAGE_SHIFT 16
#define ENTRY_PAGE_BITS 36
#define ENTRY_WORDS 0xfffu /* no file */
#define ENTRY_SPILL 0xffeu
#define ENTRY_PEER 0xffdu
#define ENTRY_FILES ENTRY_PEER
#define ENTRY_FILE_PAGES (1ull << ENTRY_PAGE_BITS) /* 256 TiB */

static inline uint64_t entry_overlay(unsigned file, uint64_t file_page)
{
	return ENTRY_OVERLAY | (uint64_t)file << ENTRY_FILE_SHIFT | file_page << ENTRY_PAGE_SHIFT;
}

static inline uint64_t entry_masked(unsigned file, uint64_t file_page)
{
	return ENTRY_MASKED | ENTRY_NEEDS_UPDATE | (uint64_t)file << ENTRY_FILE_SHIFT | file_page << ENTRY_PAGE_SHIFT;
}

static inline enum entry_source entry_source(uint64_t entry)
{
	return (enum entry_source)(entry & ENTRY_SOURCE_MASK);
}

static inline unsigned entry_file(uint64_t entry)
{
	return (unsigned)(entry >> ENTRY_FILE_SHIFT);
}

static inline uint64_t entry_file_page(uint64_t entry)
{
	return entry >> ENTRY_PAGE_SHIFT & (ENTRY_FILE_PAGES - 1);
}

/* enum activity, and minutes: activity/states.h. */
static inline unsigned entry_short(uint64_t entry) { return entry >> ENTRY_SHORT_SHIFT & 0xf; }

static inline unsigned entry_long(uint64_t entry) { return entry >> ENTRY_LONG_SHIFT & 0xf; }

static inline uint64_t entry_activity(unsigned short_state, unsigned long_state)
{
	return (uint64_t)short_state << ENTRY_SHORT_SHIFT | (uint64_t)long_state << ENTRY_LONG_SHIFT;
}

static inline bool entry_is_private(uint64_t entry)
{
	return entry & ENTRY_PRIVATE;
}

static inline bool entry_is_watched(uint64_t entry)
{
	return entry_source(entry) == ENTRY_MASKED || entry_source(entry) == ENTRY_WATCHED;
}

/* True if a page with entry `b` that follows one with entry `a` lies in the same mapping. */
static inline bool entry_joins(uint64_t a, uint64_t b)
{
	if (entry_is_watched(a) && entry_is_watched(b))
		return true;
	if (entry_source(a) != entry_source(b))
		return false;
	if (entry_source(a) == ENTRY_BASE)
		return true;
	return entry_file(a) == entry_file(b) && entry_file_page(a) + 1 == entry_file_page(b);
}

#endif
