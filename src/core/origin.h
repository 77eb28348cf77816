/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The origin of a page: where in a file its contents were when they were last read from there, or written to it. One 64-bit
 * word for each page of guest RAM, in a table beside that of the page entries. A hint, on which nothing depends: neither
 * the guest's writes nor the file's are noted here. The sample tells, as a rule, that the page has been used for something
 * else since; nothing less than a digest of all of it tells that it has not. A word of zero: nothing is known.
 *
 *   63     56 55                               20 19          0
 *  +---------+-----------------------------------+-------------+
 *  | file +1 | page number in the file           | sample      |
 *  +---------+-----------------------------------+-------------+
 */
#ifndef LATENT_CORE_ORIGIN_H
#define LATENT_CORE_ORIGIN_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define ORIGIN_FILES 255u
#define ORIGIN_FILE_SHIFT 56
#define ORIGIN_PAGE_SHIFT 20
#define ORIGIN_PAGE_BITS 36
#define ORIGIN_FILE_PAGES (1ull << ORIGIN_PAGE_BITS)
#define ORIGIN_PAGE_BYTES 4096u
#define ORIGIN_STEP_BYTES 264u /* one word of every fourth cache line or so, each in another place of it */

/* 20 bits of 16 words of a page, which may be written meanwhile. */
static inline uint64_t origin_sample(const uint8_t *page)
{
	uint64_t sum = 0, word;

	for (unsigned at = 0; at < ORIGIN_PAGE_BYTES; at += ORIGIN_STEP_BYTES) {
		memcpy(&word, page + at, sizeof word);
		sum = (sum ^ word) * 0x9e3779b97f4a7c15ull;
	}
	return sum >> (64 - ORIGIN_PAGE_SHIFT);
}

/* `file`: below ORIGIN_FILES; `file_page`: below ORIGIN_FILE_PAGES. */
static inline uint64_t origin_make(unsigned file, uint64_t file_page, const uint8_t *page)
{
	return (uint64_t)(file + 1) << ORIGIN_FILE_SHIFT | file_page << ORIGIN_PAGE_SHIFT | origin_sample(page);
}

static inline uint64_t origin_file_page(uint64_t origin)
{
	return origin >> ORIGIN_PAGE_SHIFT & (ORIGIN_FILE_PAGES - 1);
}

static inline unsigned origin_file(uint64_t origin)
{
	return (unsigned)(origin >> ORIGIN_FILE_SHIFT) - 1;
}

/* It has an origin, and may still hold what was there. */
static inline bool origin_fits(uint64_t origin, const uint8_t *page)
{
	return origin && (origin & ((1ull << ORIGIN_PAGE_SHIFT) - 1)) == origin_sample(page);
}

#endif
