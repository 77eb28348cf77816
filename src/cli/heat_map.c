/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/heat_map.h"

#include "os/os.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_PAGES 8192u

const char *const heat_source_names[HEAT_SOURCES] = {
	[HEAT_BASE] = "base",
	[HEAT_OVERLAY] = "overlay",
	[HEAT_PRIVATE] = "private",
	[HEAT_MASKED] = "masked",
};

static enum heat_source source_of(uint64_t entry)
{
	switch (entry_source(entry)) {
	case ENTRY_OVERLAY:
		return entry_is_private(entry) ? HEAT_PRIVATE : HEAT_OVERLAY;
	case ENTRY_MASKED:
		return HEAT_MASKED;
	default:
		return HEAT_BASE;
	}
}

static size_t cells_of(uint64_t pages, uint64_t pages_per_cell)
{
	return (size_t)((pages + pages_per_cell - 1) / pages_per_cell);
}

static size_t cells_in_all(const struct vm_tables *tables, uint64_t pages_per_cell)
{
	size_t cells = 0;

	for (unsigned i = 0; i < tables->blocks; i++)
		cells += cells_of(tables->block[i].pages, pages_per_cell);
	return cells;
}

static size_t lay_out(const struct vm_tables *tables, size_t cells_max, struct heat_map *map)
{
	size_t cells = 0;

	map->pages_per_cell = 1;
	while (map->pages_per_cell < ENTRY_FILE_PAGES &&
	       cells_in_all(tables, map->pages_per_cell) > cells_max)
		map->pages_per_cell *= 2;
	map->blocks = tables->blocks;
	for (unsigned i = 0; i < tables->blocks; i++) {
		struct heat_block *b = &map->block[i];

		memcpy(b->name, tables->block[i].name, sizeof b->name);
		b->pages = tables->block[i].pages;
		b->first_cell = cells;
		b->cells = cells_of(b->pages, map->pages_per_cell);
		cells += b->cells;
		map->pages += b->pages;
	}
	return cells;
}

static int count_block(const struct vm_table *table, const struct heat_block *block,
		       struct heat_map *map)
{
	static uint64_t entries[CHUNK_PAGES];

	for (uint64_t page = 0; page < table->pages;) {
		uint64_t n = table->pages - page < CHUNK_PAGES ? table->pages - page : CHUNK_PAGES;
		int r = os_read_all(table->fd, entries, (size_t)n * sizeof *entries,
				    page * sizeof *entries);

		if (r)
			return r;
		for (uint64_t i = 0; i < n; i++, page++) {
			enum activity_class class = activity_class_of(entries[i]);

			map->cell[block->first_cell + page / map->pages_per_cell].pages[class]++;
			map->count[source_of(entries[i])][class]++;
		}
	}
	return 0;
}

int heat_map_make(const struct vm_tables *tables, size_t cells_max, struct heat_map *ret_map)
{
	struct heat_map map = { .pages = 0 };
	size_t cells = lay_out(tables, cells_max, &map);
	int r = 0;

	map.cell = cells ? calloc(cells, sizeof *map.cell) : NULL;
	if (!map.cell)
		return -ENOMEM;
	for (unsigned i = 0; !r && i < tables->blocks; i++)
		r = count_block(&tables->block[i], &map.block[i], &map);
	if (r)
		heat_map_free(&map);
	else
		*ret_map = map;
	return r;
}

void heat_map_free(struct heat_map *map)
{
	free(map->cell);
	map->cell = NULL;
}

enum activity_class heat_cell_class(const struct heat_cell *cell)
{
	static const enum activity_class hottest_first[ACTIVITY_CLASSES] = {
		CLASS_HOT, CLASS_WARM, CLASS_COOL, CLASS_COLD, CLASS_FROZEN, CLASS_NEW,
	};
	enum activity_class best = hottest_first[0];

	for (unsigned i = 1; i < ACTIVITY_CLASSES; i++)
		if (cell->pages[hottest_first[i]] > cell->pages[best])
			best = hottest_first[i];
	return best;
}

uint64_t heat_class_pages(const struct heat_map *map, enum activity_class class)
{
	uint64_t pages = 0;

	for (unsigned i = 0; i < HEAT_SOURCES; i++)
		pages += map->count[i][class];
	return pages;
}

uint64_t heat_source_pages(const struct heat_map *map, enum heat_source source)
{
	uint64_t pages = 0;

	for (unsigned i = 0; i < ACTIVITY_CLASSES; i++)
		pages += map->count[source][i];
	return pages;
}
