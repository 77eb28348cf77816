/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What `latent reclaim --auto` does by what it measures, and the sizes that --to takes. */
#include "cli/cli.h"
#include "cli/reclaim.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#define MINUTES 60000000ull
#define LONGEST_US (13 * MINUTES)

static struct pressure_control control(void)
{
	return (struct pressure_control){ .target_percent = 1,
					  .refaults_most_per_s = 100,
					  .floor_us = 2 * MINUTES,
					  .longest_us = LONGEST_US,
					  .unused_us = LONGEST_US };
}

static void test_younger_while_it_lasts(void **state)
{
	static const uint64_t ages[] = { 13 * MINUTES, 13 * MINUTES / 2, 13 * MINUTES / 4, 2 * MINUTES,
					 2 * MINUTES };
	struct pressure_control c = control();
	uint64_t unused_us = 0;

	(void)state;
	for (size_t i = 0; i < sizeof ages / sizeof ages[0]; i++) {
		assert_int_equal(pressure_step(&c, 1.1, 100, &unused_us), PRESSURE_WALK);
		assert_int_equal(unused_us, ages[i]);
	}
}

static void test_nothing_without_pressure(void **state)
{
	struct pressure_control c = control();
	uint64_t unused_us = 0;

	(void)state;
	c.unused_us = 2 * MINUTES;
	for (int i = 0; i < 1000; i++)
		assert_int_equal(pressure_step(&c, 1.0, 0, &unused_us), PRESSURE_REST);
	assert_int_equal(c.unused_us, LONGEST_US); /* and what is young is safe again */
	assert_int_equal(unused_us, 0);
}

/* Whatever the pressure is. Each time for twice as long, and not for ever. */
static void test_backs_off(void **state)
{
	struct pressure_control c = control();
	unsigned last = 0, most = 0;
	uint64_t unused_us;

	(void)state;
	c.unused_us = 2 * MINUTES;
	for (int i = 0; i < 10; i++) {
		unsigned rests = 0;

		assert_int_equal(pressure_step(&c, 50, 101, &unused_us), PRESSURE_BACK_OFF);
		while (pressure_step(&c, 50, 0, &unused_us) == PRESSURE_REST)
			assert_true(++rests < 100);
		if (!i)
			assert_int_equal(unused_us, 4 * MINUTES);
		c.backoffs++; /* that walk took one back */
		assert_true(rests > last || rests == most);
		last = rests;
		most = rests > most ? rests : most;
	}
	assert_int_equal(most, 64);
	for (int i = 0; i < 100; i++)
		(void)pressure_step(&c, 50, 1000, &unused_us);
	assert_int_equal(c.unused_us, LONGEST_US);
}

/* By then the next walk's age is half of what has just come back. */
static void test_backs_off_from_what_was_walked(void **state)
{
	struct pressure_control c = control();
	uint64_t unused_us;

	(void)state;
	c.unused_us = 6 * MINUTES;
	assert_int_equal(pressure_step(&c, 50, 0, &unused_us), PRESSURE_WALK);
	assert_int_equal(unused_us, 6 * MINUTES);
	assert_int_equal(pressure_step(&c, 50, 101, &unused_us), PRESSURE_BACK_OFF);
	while (pressure_step(&c, 50, 0, &unused_us) == PRESSURE_REST)
		;
	assert_int_equal(unused_us, 12 * MINUTES);
}

/* Nothing is given back that was used within two periods, whatever these are. */
static void test_ages_of_periods(void **state)
{
	static const struct {
		uint64_t shortest_us, floor_us, longest_us;
	} right[] = { { 0, 1000000, 13 * MINUTES },
		      { 100000, 1000000, 13 * MINUTES },
		      { MINUTES, 2 * MINUTES, 13 * MINUTES },
		      { 7 * MINUTES, 14 * MINUTES, 35 * MINUTES },
		      { 60 * MINUTES, 120 * MINUTES, 300 * MINUTES },
		      { UINT64_MAX, 120 * MINUTES, 300 * MINUTES } };
	static struct vm_stats stats;

	(void)state;
	for (size_t i = 0; i < sizeof right / sizeof right[0]; i++) {
		stats.scan.shortest_us_now = right[i].shortest_us;
		assert_int_equal(reclaim_floor_us(&stats), right[i].floor_us);
		assert_int_equal(reclaim_longest_us(&stats), right[i].longest_us);
	}
}

static void test_sizes(void **state)
{
	static const struct {
		const char *text;
		uint64_t bytes;
	} right[] = { { "0", 0 },          { "4096", 4096 },     { "1K", 1024 }, { "512M", 512 << 20 },
		      { "1.5g", 3 << 29 }, { "2T", 2ull << 40 }, { "7b", 7 } };
	static const char *const wrong[] = {
		"",    "M",   "-1",  "+1",   "1X",          "1MM", "1M ",
		" 1M", "nan", "inf", "1e30", "9999999999T", "0x",  "1e400"
	};
	uint64_t bytes = 99;

	(void)state;
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		if (cli_parse_size(wrong[i], &bytes))
			fail_msg("'%s' is %ju", wrong[i], (uintmax_t)bytes);
		assert_int_equal(bytes, 99);
	}
	for (size_t i = 0; i < sizeof right / sizeof right[0]; i++) {
		assert_true(cli_parse_size(right[i].text, &bytes));
		assert_int_equal(bytes, right[i].bytes);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_younger_while_it_lasts),
		cmocka_unit_test(test_nothing_without_pressure),
		cmocka_unit_test(test_backs_off),
		cmocka_unit_test(test_backs_off_from_what_was_walked),
		cmocka_unit_test(test_ages_of_periods),
		cmocka_unit_test(test_sizes),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
