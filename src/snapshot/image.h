/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The files `pages` and `ram` of a snapshot. Errors are negative errno values; -EBADMSG: the file is not what it
 * should be, and `why` says what is wrong where. One thread at a time.
 */
#ifndef LATENT_SNAPSHOT_IMAGE_H
#define LATENT_SNAPSHOT_IMAGE_H

#include "snapshot/format.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SNAPSHOT_WHY_BYTES 256

/* Writes the sentence, and returns `r`. */
int snapshot_fail(char why[SNAPSHOT_WHY_BYTES], int r, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

struct snapshot_image {
	uint32_t blocks, volumes;
	struct {
		char name[SNAPSHOT_NAME_BYTES];
		uint64_t pages;
		uint64_t ram_page;           /* where the block begins in `ram` */
		struct snapshot_page *table; /* of the whole block */
	} block[SNAPSHOT_BLOCKS];
	uint64_t pages;
	uint64_t checksum; /* in the header of the file `pages`; 0: it was neither written nor read */
	void *memory; /* that the tables are in */
	size_t memory_bytes;
};

/* An image of blocks with these names and sizes, all zeros. -ENOMEM. */
int snapshot_image_create(const struct snapshot_image *layout, struct snapshot_image *ret_image);
void snapshot_image_free(struct snapshot_image *image);

/* What the page holds: SNAPSHOT_WORD with the word, or SNAPSHOT_DATA with the digest. */
struct snapshot_page snapshot_classify(const void *page);

/* Notes the checksum in the image: what belongs to this file, and to no other one, has it. */
int snapshot_image_write(struct snapshot_image *image, int fd);
/* Checks all of it before anything is believed. `fd`: the file `pages`. */
int snapshot_image_read(int fd, struct snapshot_image *ret_image, char why[SNAPSHOT_WHY_BYTES]);

/* Pages of each kind; zero: those of SNAPSHOT_WORD that are zero, which are counted there, too. */
struct snapshot_counts {
	uint64_t pages, zero, word, data, equal, volume;
	uint64_t in_volume[SNAPSHOT_VOLUMES]; /* `volume`, one by one */
};
void snapshot_image_count(const struct snapshot_image *image, struct snapshot_counts *ret_counts);

/* The metadata of page number `page` of all blocks. */
static inline struct snapshot_page *snapshot_page_at(const struct snapshot_image *image, uint64_t page)
{
	return (struct snapshot_page *)image->memory + page;
}

/* Compares the contents of `ram` with their digests. `*ret_bad`: pages that differ; the first is named in `why`. */
int snapshot_image_verify(const struct snapshot_image *image, int ram_fd, uint64_t *ret_bad,
			  char why[SNAPSHOT_WHY_BYTES]);

#endif
