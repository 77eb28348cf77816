/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Guest RAM as a map: cells that stand for equally many pages, with what the page entries say of these.
 */
#ifndef LATENT_CLI_HEAT_MAP_H
#define LATENT_CLI_HEAT_MAP_H

#include "activity/states.h"
#include "cli/vm_tables.h"

#include <stddef.h>

/* Where a page's contents are. Unlike in the statistics each page is counted once. */
enum heat_source {
	HEAT_BASE,    /* the VM's own memory, or not touched yet */
	HEAT_OVERLAY, /* a page of a file */
	HEAT_PRIVATE, /* a copy that the guest has written over such a page */
	HEAT_MASKED,  /* to be made when it is touched */
	HEAT_SOURCES
};

extern const char *const heat_source_names[HEAT_SOURCES];

struct heat_cell {
	uint64_t pages[ACTIVITY_CLASSES];
};

struct heat_map {
	uint64_t pages_per_cell; /* a power of two; the last cell of a block may have fewer */
	uint64_t pages;          /* of all blocks */
	uint64_t count[HEAT_SOURCES][ACTIVITY_CLASSES]; /* pages, too */
	struct heat_cell *cell;                         /* of all blocks, one after the other */
	unsigned blocks;
	struct heat_block {
		char name[RAM_NAME_BYTES];
		uint64_t pages;
		size_t first_cell, cells;
	} block[RAM_BLOCKS];
};

/* As fine as `cells_max` allows, but for one cell a block. -ENOMEM, or what reading said. */
int heat_map_make(const struct vm_tables *tables, size_t cells_max, struct heat_map *ret_map);
void heat_map_free(struct heat_map *map);

/* The class that most of its pages have; of two that have as many, the hotter. */
enum activity_class heat_cell_class(const struct heat_cell *cell);
uint64_t heat_class_pages(const struct heat_map *map, enum activity_class class);
uint64_t heat_source_pages(const struct heat_map *map, enum heat_source source);

#endif
