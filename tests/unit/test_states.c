/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The states of a page: every transition, what the two granularities say about time, sampling, the period. */
#include "activity/order.h"
#include "activity/states.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define SECOND UINT64_C(1000000)
#define SPREAD_GROUPS 4096u

static uint64_t after(const char *looks)
{
	uint64_t entry = 0;

	for (; *looks; looks++)
		entry = activity_next(entry, *looks == 'u' ? SEEN_USED : *looks == 'w' ? SEEN_WRITTEN
					     : *looks == '.' ? SEEN_UNUSED : SEEN_NOTHING, 0);
	return entry;
}

/* All of the table, by the rules that it is made of, and not by itself. */
static void test_each_transition(void **state)
{
	(void)state;
	for (unsigned i = 0; i < ACTIVITIES; i++) {
		const struct activity_state *s = &activity_states[i], *unused = &activity_states[s->next[SEEN_UNUSED]];
		enum activity used = s->next[SEEN_USED], written = s->next[SEEN_WRITTEN];

		/* Each look at which it is not used is counted, up to the last state. */
		assert_int_equal(unused->unused_looks, s->unused_looks == 6 ? 6 : s->unused_looks + 1);
		assert_int_equal(activity_states[used].unused_looks, 0);
		assert_int_equal(activity_states[written].unused_looks, 0);
		assert_true(used != ACTIVITY_NEW && written != ACTIVITY_NEW && s->next[SEEN_UNUSED] != ACTIVITY_NEW);
		/* A page gets no colder by use, and no hotter by lying about. */
		assert_true(i == ACTIVITY_NEW || activity_states[used].class <= s->class);
		assert_true(i == ACTIVITY_NEW || unused->class >= s->class);
		/* Written counts as used twice. */
		assert_int_equal(written, activity_states[used].next[SEEN_USED]);
		assert_true(s->name && *s->name);
	}
}

/* From every state every other one is reached but the first, to which nothing leads back. */
static void test_every_state_is_reached(void **state)
{
	(void)state;
	for (unsigned from = 0; from < ACTIVITIES; from++) {
		bool reached[ACTIVITIES] = { false };

		reached[from] = true;
		for (unsigned round = 0; round < ACTIVITIES; round++)
			for (unsigned i = 0; i < ACTIVITIES; i++)
				for (unsigned seen = 0; reached[i] && seen < SEEN_USES; seen++)
					reached[activity_states[i].next[seen]] = true;
		for (unsigned i = 1; i < ACTIVITIES; i++)
			assert_true(reached[i]);
		assert_true(reached[ACTIVITY_NEW] == (from == ACTIVITY_NEW));
	}
}

static void test_histories(void **state)
{
	static const struct { const char *looks; enum activity now; } cases[] = {
		{ "", ACTIVITY_NEW }, { "??", ACTIVITY_NEW }, { "u", ACTIVITY_WARM }, { "uu", ACTIVITY_WARMER },
		{ "uuu", ACTIVITY_HOT }, { "u?u?u", ACTIVITY_HOT }, { "w", ACTIVITY_WARMER }, { "ww", ACTIVITY_HOT },
		{ "uw", ACTIVITY_HOT }, { ".", ACTIVITY_COOLING }, { "..", ACTIVITY_COOL }, { "...", ACTIVITY_COLD },
		{ "....", ACTIVITY_COLDER }, { ".....", ACTIVITY_COLDEST }, { "......", ACTIVITY_FROZEN },
		{ ".........", ACTIVITY_FROZEN }, { "uuu.", ACTIVITY_SLACK }, { "uuu.u", ACTIVITY_HOT },
		{ "uuu..", ACTIVITY_COOL }, { "uuu...", ACTIVITY_COLD }, { "u.u.u.u", ACTIVITY_WARM },
		{ ".u.u.u.", ACTIVITY_COOLING }, { "......u", ACTIVITY_WARM }, { "......w", ACTIVITY_WARMER },
	};

	(void)state;
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
		if (activity_of(after(cases[i].looks)) != cases[i].now)
			fail_msg("%s: %s, not %s", cases[i].looks, activity_states[activity_of(after(cases[i].looks))].name,
				 activity_states[cases[i].now].name);
}

/* All 256 values of the bits, also those that no scan writes, with each look and any number of minutes. */
static void test_any_entry(void **state)
{
	(void)state;
	for (unsigned i = 0; i < 256; i++)
		for (unsigned seen = 0; seen <= SEEN_NOTHING; seen++)
			for (unsigned units = 0; units < 40; units++) {
				uint64_t entry = ~ENTRY_ACTIVITY | (uint64_t)i << ENTRY_SHORT_SHIFT;
				uint64_t next = activity_next(entry, (enum seen_use)seen, units);

				assert_int_equal(next & ~ENTRY_ACTIVITY, 0);
				assert_true(entry_short(next) < ACTIVITIES);
				assert_true(entry_long(next) || entry_short(next) == ACTIVITY_NEW);
				assert_true(activity_class_of(entry) < ACTIVITY_CLASSES);
			}
}

static void test_minutes(void **state)
{
	uint64_t entry;

	(void)state;
	assert_int_equal(activity_long_next(0, ACTIVITY_NEW, 5), 0);
	assert_int_equal(activity_long_next(0, ACTIVITY_COOLING, 5), 1); /* it may have been used just before */
	for (unsigned k = 0; k < LONG_STATES; k++) {
		assert_int_equal(activity_long_next(k, ACTIVITY_HOT, 3), 1);
		assert_int_equal(activity_long_next(k, ACTIVITY_WARM, 0), 1);
		if (!k)
			continue;
		assert_int_equal(activity_long_next(k, ACTIVITY_COLD, 0), k);
		assert_int_equal(activity_long_next(k, ACTIVITY_SLACK, 1), k < 15 ? k + 1 : 15);
		assert_int_equal(activity_long_next(k, ACTIVITY_FROZEN, UINT32_MAX), 15);
	}
	entry = after("uuu");
	for (unsigned minute = 0; minute < 20; minute++)
		entry = activity_next(entry, SEEN_UNUSED, 1);
	assert_int_equal(entry_long(entry), 15);
	assert_int_equal(entry_long(activity_next(entry, SEEN_USED, 1)), 1);
}

/* What is said of time is never more than what was looked at. */
static void test_unused_for(void **state)
{
	(void)state;
	assert_int_equal(activity_unused_us(0, 10 * SECOND), 0);
	assert_int_equal(activity_unused_us(after("uuu"), 10 * SECOND), 0);
	assert_int_equal(activity_unused_us(after("u."), 10 * SECOND), 0);
	assert_int_equal(activity_unused_us(after("u..."), 10 * SECOND), 20 * SECOND);
	assert_int_equal(activity_unused_us(after("u.........."), 10 * SECOND), 50 * SECOND);
	assert_int_equal(activity_unused_us(entry_activity(ACTIVITY_FROZEN, 5), 10 * SECOND), 180 * SECOND);
	assert_int_equal(activity_unused_us(entry_activity(ACTIVITY_FROZEN, 2), 60 * SECOND), 300 * SECOND);
	assert_int_equal(activity_longest_us(10 * SECOND), 13 * 60 * SECOND);
	assert_int_equal(activity_longest_us(3600 * SECOND), 5 * 3600 * SECOND);
	for (unsigned i = 0; i < ACTIVITIES; i++)
		for (unsigned k = 0; k < LONG_STATES; k++)
			assert_in_range(activity_unused_us(entry_activity(i, k), 3600 * SECOND), 0,
					activity_longest_us(3600 * SECOND));
}

static void test_used_within(void **state)
{
	(void)state;
	assert_false(activity_used_within(0, 600 * SECOND, 10 * SECOND));
	assert_true(activity_used_within(after("u"), 10 * SECOND, 10 * SECOND));
	assert_false(activity_used_within(after("u."), 10 * SECOND, 10 * SECOND));
	assert_true(activity_used_within(after("u....."), 60 * SECOND, 10 * SECOND));
	assert_false(activity_used_within(after("u......"), 60 * SECOND, 10 * SECOND));
	/* Ten minutes are too many looks: by the minutes. */
	assert_true(activity_used_within(entry_activity(ACTIVITY_FROZEN, 10), 600 * SECOND, 10 * SECOND));
	assert_false(activity_used_within(entry_activity(ACTIVITY_FROZEN, 11), 600 * SECOND, 10 * SECOND));
	/* Less than a period cannot be told from one. */
	assert_true(activity_used_within(after("u"), 10 * SECOND, 60 * SECOND));
	assert_false(activity_used_within(after("u."), 10 * SECOND, 60 * SECOND));
}

/* Every group has its turn, once in as many passes as the table says, and not all at the same pass. */
static void test_sampling(void **state)
{
	(void)state;
	for (unsigned i = 0; i < ACTIVITIES; i++)
		for (unsigned thin = 0; thin <= 3; thin++) {
			unsigned turns = activity_states[i].looks_per_sample << thin, at_pass = 0;

			for (uint64_t group = 0; group < SPREAD_GROUPS; group++) {
				uint64_t page = group * SAMPLE_GROUP_PAGES;
				unsigned times = 0;

				for (uint64_t pass = 100; pass < 100 + turns; pass++)
					times += activity_is_sampled((enum activity)i, page, pass, thin);
				assert_int_equal(times, 1);
				at_pass += activity_is_sampled((enum activity)i, page, 100, thin);
				assert_int_equal(activity_is_sampled((enum activity)i, page, 100, thin),
						 activity_is_sampled((enum activity)i, page + SAMPLE_GROUP_PAGES - 1, 100, thin));
			}
			assert_in_range(at_pass, SPREAD_GROUPS / turns / 2, SPREAD_GROUPS / turns * 3 / 2);
		}
}

static void test_period(void **state)
{
	struct scan_activity quiet = { 10 * SECOND, 10 * SECOND, 100000, 100, 0 }, much = quiet, some = quiet;

	(void)state;
	for (unsigned i = 0; i < 10; i++)
		quiet.period_us = scan_next_period_us(&quiet);
	assert_int_equal(quiet.period_us, 40 * SECOND);
	much.period_us = 40 * SECOND;
	much.changed = 3000;
	assert_int_equal(scan_next_period_us(&much), 10 * SECOND);
	some.period_us = 15 * SECOND;
	some.changed = 1000;
	assert_int_equal(scan_next_period_us(&some), 15 * SECOND);
	quiet.changed = 0;
	quiet.looked = 0; /* no RAM yet */
	assert_int_equal(scan_next_period_us(&quiet), 40 * SECOND);
	/* A migration: as long as its next pass, within what makes sense. */
	quiet.migration_pass_us = 3 * SECOND;
	assert_int_equal(scan_next_period_us(&quiet), 3 * SECOND);
	quiet.migration_pass_us = 1;
	assert_int_equal(scan_next_period_us(&quiet), SCAN_PERIOD_MIN_US);
	quiet.migration_pass_us = 3600 * SECOND;
	assert_int_equal(scan_next_period_us(&quiet), 10 * SECOND);
	/* The user asks for more looks than before. */
	much.shortest_us = SECOND;
	assert_int_equal(scan_next_period_us(&much), SECOND);
	much.shortest_us = 60 * SECOND;
	assert_int_equal(scan_next_period_us(&much), 60 * SECOND);
}

static void test_thin(void **state)
{
	uint64_t present[ACTIVITIES] = { 0 }, gib = 1 << 18;

	(void)state;
	assert_int_equal(scan_thin(present, SECOND), 0);
	present[ACTIVITY_HOT] = gib;
	assert_int_equal(scan_thin(present, 10 * SECOND), 0);
	assert_int_equal(scan_thin(present, SECOND), 0); /* 52 ms */
	present[ACTIVITY_NEW] = gib;
	assert_int_equal(scan_thin(present, 10 * SECOND), 0);
	assert_int_equal(scan_thin(present, SECOND), 3); /* 472 ms */
	present[ACTIVITY_NEW] = 4096 * gib;
	assert_int_equal(scan_thin(present, SECOND), THIN_MAX);
}

/* ---- the order of pages ---------------------------------------------------------------------------------- */

#define ORDER_PAGES 3000u

/* What is used less is colder, whatever the other half of the state says; of what is not used, the longer the colder. */
static void test_heats(void **state)
{
	static const enum activity coldest_first[ACTIVITIES] = {
		ACTIVITY_FROZEN, ACTIVITY_COLDEST, ACTIVITY_COLDER, ACTIVITY_COLD, ACTIVITY_COOL,  ACTIVITY_COOLING,
		ACTIVITY_NEW,    ACTIVITY_SLACK,   ACTIVITY_WARM,   ACTIVITY_WARMER, ACTIVITY_HOT,
	};
	unsigned expected = 0;

	(void)state;
	for (unsigned i = 0; i < ACTIVITIES; i++)
		for (unsigned units = LONG_STATES; units--;)
			assert_int_equal(activity_heat(entry_activity(coldest_first[i], units)), expected++);
	assert_int_equal(expected, ACTIVITY_HEATS);
	for (uint64_t word = 0; word < 16; word++) /* states that only a damaged table has */
		assert_true(activity_heat(word << ENTRY_SHORT_SHIFT | ~ENTRY_ACTIVITY) < ACTIVITY_HEATS);
}

static void fill_entries(uint64_t *entries, uint64_t pages, uint64_t seed)
{
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t z = (i / 7 + seed) * UINT64_C(0x9e3779b97f4a7c15); /* runs of seven pages */

		entries[i] = entry_activity((unsigned)(z >> 40) % ACTIVITIES, (unsigned)(z >> 50) % LONG_STATES) | ENTRY_OVERLAY;
	}
}

static bool is_wanted(const struct activity_table *table, uint64_t page)
{
	return !table->wanted || table->wanted[page];
}

/* All that are wanted once, in order, each as it was when the order was made. */
static void check_order(struct activity_table *tables, size_t count, enum activity_direction direction)
{
	static uint64_t was[3][ORDER_PAGES];
	static bool came[3][ORDER_PAGES];
	bool hottest_first = direction == ACTIVITY_HOTTEST_FIRST;
	unsigned heat = hottest_first ? ACTIVITY_HEATS : 0;
	uint64_t pages = 0, all = 0, last = 0, runs = 0;
	struct activity_order *order;
	struct activity_run run;

	memset(came, 0, sizeof came);
	for (size_t t = 0; t < count; t++) {
		fill_entries((uint64_t *)(uintptr_t)tables[t].entries, tables[t].pages, t);
		memcpy(was[t], tables[t].entries, tables[t].pages * sizeof was[t][0]);
		for (uint64_t i = 0; i < tables[t].pages; i++)
			all += is_wanted(&tables[t], i);
	}
	assert_int_equal(activity_order_create(tables, count, direction, &order), 0);
	for (size_t t = 0; t < count; t++)
		fill_entries((uint64_t *)(uintptr_t)tables[t].entries, tables[t].pages, 1000 + t);
	for (; activity_order_next(order, &run); runs++) {
		unsigned now = activity_heat(was[run.table][run.page]);
		uint64_t place = run.table * ORDER_PAGES + run.page;

		assert_true(run.pages > 0 && run.table < count && run.page + run.pages <= tables[run.table].pages);
		assert_true(hottest_first ? now <= heat : now >= heat);
		assert_true(now != heat || !runs || place > last); /* of one heat in the order of RAM */
		for (uint64_t i = run.page; i < run.page + run.pages; i++) {
			assert_false(came[run.table][i]);
			assert_true(is_wanted(&tables[run.table], i));
			came[run.table][i] = true;
			assert_int_equal(activity_heat(was[run.table][i]), now);
		}
		heat = now;
		last = place;
		pages += run.pages;
	}
	assert_int_equal(pages, all);
	if (!count || !tables[0].wanted)
		assert_true(runs <= all / 7 + 2 * count); /* runs, and not pages */
	assert_false(activity_order_next(order, &run));
	activity_order_destroy(order);
}

static void test_order(void **state)
{
	static uint64_t entries[3][ORDER_PAGES];
	struct activity_table tables[] = { { entries[0], ORDER_PAGES, NULL }, { entries[1], 0, NULL }, { entries[2], 11, NULL } };

	(void)state;
	for (size_t count = 0; count <= 3; count++) {
		check_order(tables, count, ACTIVITY_COLDEST_FIRST);
		check_order(tables, count, ACTIVITY_HOTTEST_FIRST);
	}
	activity_order_destroy(NULL);
}

/* Few pages, or many of them; the first and the last one, and none. */
static void test_order_of_some(void **state)
{
	static uint64_t entries[3][ORDER_PAGES];
	static uint8_t wanted[ORDER_PAGES];
	struct activity_table tables[] = { { entries[0], ORDER_PAGES, wanted }, { entries[1], 700, wanted }, { entries[2], 11, NULL } };

	(void)state;
	check_order(tables, 3, ACTIVITY_COLDEST_FIRST);
	for (unsigned every = 1; every < 2 * ORDER_PAGES; every *= 3) {
		for (unsigned i = 0; i < ORDER_PAGES; i++)
			wanted[i] = (uint8_t)(i % every ? 0 : 1 + i % 2);
		wanted[ORDER_PAGES - 1] = 1;
		check_order(tables, 3, ACTIVITY_COLDEST_FIRST);
		check_order(tables, 3, ACTIVITY_HOTTEST_FIRST);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_each_transition),
		cmocka_unit_test(test_every_state_is_reached),
		cmocka_unit_test(test_histories),
		cmocka_unit_test(test_any_entry),
		cmocka_unit_test(test_minutes),
		cmocka_unit_test(test_unused_for),
		cmocka_unit_test(test_used_within),
		cmocka_unit_test(test_sampling),
		cmocka_unit_test(test_period),
		cmocka_unit_test(test_thin),
		cmocka_unit_test(test_heats),
		cmocka_unit_test(test_order),
		cmocka_unit_test(test_order_of_some),
	};

	return cmocka_run_group_tests_name("activity", tests, NULL, NULL) ? 1 : 0;
}
