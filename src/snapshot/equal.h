/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Stored pages by the digests of their contents: an open-addressing hash table of page numbers. A digest only
 * proposes: XXH3-64 does not resist who looks for two contents with one digest, and a guest may do just that.
 * Whoever asks proves each proposal by comparing bytes. For the same reason the places in the table depend on
 * a number that is drawn anew for each, and of one digest a few pages are kept at most.
 */
#ifndef LATENT_SNAPSHOT_EQUAL_H
#define LATENT_SNAPSHOT_EQUAL_H

#include "snapshot/image.h"

#define EQUAL_SAME_DIGEST 8         /* pages of one digest that are kept */
#define EQUAL_BYTES_PER_PAGE 32     /* of the table, at most */

struct equal {
	const struct snapshot_image *image; /* whose pages they are: their digests are there */
	uint64_t *slots;                    /* page + 1; 0: free */
	uint64_t slot_count, factor;
	unsigned shift;
};

/* For as many pages as `image` has, which has to outlive it. -ENOMEM. */
int equal_create(const struct snapshot_image *image, struct equal *ret_equal);
void equal_free(struct equal *equal);

/* `page` is of kind SNAPSHOT_DATA, and its digest is in the image. */
void equal_add(struct equal *equal, uint64_t page);

/* The pages with this digest, one call after the other; begin with `*at` = 0. False: there are no more. */
bool equal_next(const struct equal *equal, uint64_t digest, uint64_t *at, uint64_t *ret_page);

#endif
