/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Where guest memory is: what a vhost-user front end has told. Pure: nothing is mapped or read here.
 *
 * Three kinds of addresses, all in bytes: `gpa`, the guest's; `uva`, the front end's own (rings are
 * named by it); and offsets into the file that a region's descriptor is.
 */
#ifndef LATENT_BLK_MEMORY_H
#define LATENT_BLK_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

#define MEMORY_REGIONS_MAX 32u

struct memory_region {
	uint64_t gpa, bytes, uva;
	uint64_t offset; /* in the file, of the region's first byte */
};

struct memory_table {
	uint32_t count;
	struct memory_region regions[MEMORY_REGIONS_MAX];
};

/*
 * Adds a region. -EINVAL: it is empty, not of whole pages, an end of it overflows, or it overlaps
 * another one; -ENOSPC.
 * `*ret_why`: a sentence.
 */
int memory_add(struct memory_table *t, const struct memory_region *region, const char **ret_why);
/* -ENOENT: there is no region that begins there and is that long. `*ret_index`: where it was; those
 * behind it move up. */
int memory_remove(struct memory_table *t, const struct memory_region *region, uint32_t *ret_index);

/* The longest part of [gpa, +bytes) from its beginning on that lies in one region; 0: not one byte.
 * `bytes` > 0. */
uint64_t memory_find(const struct memory_table *t, uint64_t gpa, uint64_t bytes, uint32_t *ret_index,
		     uint64_t *ret_offset);
/* All of [uva, +bytes) in one region. */
bool memory_find_uva(const struct memory_table *t, uint64_t uva, uint64_t bytes, uint32_t *ret_index,
		     uint64_t *ret_offset);

#endif
