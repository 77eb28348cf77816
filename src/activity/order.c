/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "activity/order.h"

#include "activity/states.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SKIPPED 256u /* pages that are looked at at once */

struct activity_order {
	enum activity_direction direction;
	size_t tables;
	uint64_t *first; /* where a table's pages begin in `heats`; one more: where they end */
	uint8_t *heats;  /* of each page, and one more; 0: it is not wanted */
	uint64_t left[ACTIVITY_HEATS]; /* pages of this heat that have not come */
	unsigned heat;                 /* that comes now, */
	size_t table;                  /* from here on */
	uint64_t at;
};

_Static_assert(ACTIVITY_HEATS == ACTIVITIES * LONG_STATES && ACTIVITY_HEATS < UINT8_MAX,
	       "heats are bytes");

static const uint8_t by_state[ACTIVITIES] = {
	[ACTIVITY_FROZEN] = 0, [ACTIVITY_COLDEST] = 1, [ACTIVITY_COLDER] = 2, [ACTIVITY_COLD] = 3,
	[ACTIVITY_COOL] = 4,   [ACTIVITY_COOLING] = 5, [ACTIVITY_NEW] = 6,    [ACTIVITY_SLACK] = 7,
	[ACTIVITY_WARM] = 8,   [ACTIVITY_WARMER] = 9,  [ACTIVITY_HOT] = 10,
};

unsigned activity_heat(uint64_t entry)
{
	return by_state[activity_of(entry)] * LONG_STATES + (LONG_STATES - 1 - entry_long(entry));
}

/* The first page from `page` on that is wanted, or the end. Mostly nothing is. */
static uint64_t next_wanted(const struct activity_table *table, uint64_t page)
{
	static const uint8_t none[SKIPPED];

	if (!table->wanted)
		return page;
	while (page + SKIPPED <= table->pages && !memcmp(table->wanted + page, none, SKIPPED))
		page += SKIPPED;
	while (page < table->pages && !table->wanted[page])
		page++;
	return page;
}

static void take_heats(struct activity_order *o, const struct activity_table *table, uint64_t first)
{
	for (uint64_t i = next_wanted(table, 0); i < table->pages; i = next_wanted(table, i + 1)) {
		unsigned heat = activity_heat(__atomic_load_n(&table->entries[i], __ATOMIC_RELAXED));

		o->heats[first + i] = (uint8_t)(heat + 1);
		o->left[heat]++;
	}
}

static void begin_heat(struct activity_order *o, unsigned heat)
{
	o->heat = heat;
	o->table = 0;
	o->at = 0;
}

int activity_order_create(const struct activity_table *tables, size_t count,
			  enum activity_direction direction, struct activity_order **ret_order)
{
	struct activity_order *o = calloc(1, sizeof *o);

	if (!o)
		return -ENOMEM;
	o->direction = direction;
	o->tables = count;
	o->first = calloc(count + 1, sizeof *o->first);
	for (size_t i = 0; o->first && i < count; i++)
		o->first[i + 1] = o->first[i] + tables[i].pages;
	o->heats = o->first ? calloc(o->first[count] + 1, 1) : NULL;
	if (!o->heats) {
		activity_order_destroy(o);
		return -ENOMEM;
	}
	for (size_t i = 0; i < count; i++)
		take_heats(o, &tables[i], o->first[i]);
	begin_heat(o, direction == ACTIVITY_HOTTEST_FIRST ? ACTIVITY_HEATS - 1 : 0);
	*ret_order = o;
	return 0;
}

void activity_order_destroy(struct activity_order *o)
{
	if (!o)
		return;
	free(o->first);
	free(o->heats);
	free(o);
}

/* False: there is none left. */
static bool next_heat(struct activity_order *o)
{
	while (!o->left[o->heat]) {
		if (o->heat == (o->direction == ACTIVITY_HOTTEST_FIRST ? 0 : ACTIVITY_HEATS - 1))
			return false;
		begin_heat(o, o->direction == ACTIVITY_HOTTEST_FIRST ? o->heat - 1 : o->heat + 1);
	}
	return true;
}

/* One of this heat is there, from `at` on. */
static uint64_t find(const struct activity_order *o)
{
	const uint8_t *found = memchr(o->heats + o->at, (int)o->heat + 1, o->first[o->tables] - o->at);

	return (uint64_t)(found - o->heats);
}

bool activity_order_next(struct activity_order *o, struct activity_run *ret_run)
{
	uint64_t begin;

	if (!next_heat(o))
		return false;
	begin = o->at = find(o);
	while (o->first[o->table + 1] <= begin)
		o->table++;
	while (o->at < o->first[o->table + 1] && o->heats[o->at] == o->heat + 1)
		o->at++;
	o->left[o->heat] -= o->at - begin;
	*ret_run = (struct activity_run){ o->table, begin - o->first[o->table], o->at - begin };
	return true;
}
