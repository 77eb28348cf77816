/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Pages in the order of how much they are used, by their entries: coldest first for who sends them while the guest
 * runs, for what is hot will change again; hottest first for who pushes what the guest waits for. Each page comes once,
 * as it was when the order was made, whatever becomes of its state meanwhile. Takes a byte for each page; of what is not
 * wanted hardly any time.
 *
 * One thread.
 */
#ifndef LATENT_ACTIVITY_ORDER_H
#define LATENT_ACTIVITY_ORDER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A table of page entries (core/entry.h); its owner may change it at any time. */
struct activity_table {
	const uint64_t *entries;
	uint64_t pages;
	const uint8_t *wanted; /* a byte for each page: only those that are not 0 come; NULL: all */
};

/* Pages of one table that are used alike. */
struct activity_run {
	size_t table;
	uint64_t page, pages;
};

enum activity_direction { ACTIVITY_COLDEST_FIRST, ACTIVITY_HOTTEST_FIRST };

struct activity_order;

/* `tables`: neither the array nor what is wanted is needed afterwards. -ENOMEM. */
int activity_order_create(const struct activity_table *tables, size_t count, enum activity_direction direction,
			  struct activity_order **ret_order);
void activity_order_destroy(struct activity_order *order); /* NULL is allowed */
/* False: all that are wanted have come. Among pages that are used alike those with lower numbers come first. */
bool activity_order_next(struct activity_order *order, struct activity_run *ret_run);

/* How much a page is used: 0 .. ACTIVITY_HEATS - 1, the hottest. By the short state, then by the minutes since the page
 * was in use. A page that nobody has looked at stands between those in use and those that are not. */
#define ACTIVITY_HEATS 176u
unsigned activity_heat(uint64_t entry);

#endif
