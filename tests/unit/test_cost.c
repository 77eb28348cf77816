/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The cost model: its formula, its bounds, and that measuring gives something sensible. */
#include "volume/cost.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

static const struct cost_model usual = { .map_us = 6, .map_page_us = 0.35, .copy_us = 0.2, .copy_page_us = 0.25,
					 .page_us = 2.2 };

static void the_formula(void **state)
{
	(void)state;
	/* (6 - 0.2) / (0.25 + 1 * 12.2 - 0.35) = 0.48 */
	assert_int_equal(cost_min_run_pages(&usual, 1), 1);
	/* 5.8 / (0.25 + 0.25 * 12.2 - 0.35) = 1.97 */
	assert_int_equal(cost_min_run_pages(&usual, 0.25), 2);
	/* 5.8 / (0.25 + 0.1 * 12.2 - 0.35) = 5.18 */
	assert_int_equal(cost_min_run_pages(&usual, 0.1), 6);
	/* Nothing is saved, and mapping costs more by the page: never, that is the longest. */
	assert_int_equal(cost_min_run_pages(&usual, 0), COST_RUN_MAX);
}

static void a_bad_measurement_is_bounded(void **state)
{
	struct cost_model slow = usual;

	(void)state;
	slow.map_us = 500;
	assert_int_equal(cost_min_run_pages(&slow, 1), COST_RUN_SHARED);
	assert_int_equal(cost_min_run_pages(&slow, 0.5), 2 * COST_RUN_SHARED);
	slow.map_us = 0;
	assert_int_equal(cost_min_run_pages(&slow, 1), 1);
}

static void a_full_budget_wants_longer_runs(void **state)
{
	(void)state;
	assert_int_equal(cost_under_pressure(3, 0, 1000), 3);
	assert_int_equal(cost_under_pressure(3, 499, 1000), 3);
	assert_int_equal(cost_under_pressure(3, 500, 1000), 6);
	assert_int_equal(cost_under_pressure(3, 750, 1000), 12);
	assert_int_equal(cost_under_pressure(3, 999, 1000), 24);
	assert_int_equal(cost_under_pressure(3, 5, 0), 24);
}

static void measured(void **state)
{
	const struct cost_model *model = cost_model_get();

	(void)state;
	assert_ptr_equal(model, cost_model_get());
	assert_true(model->map_us >= 0 && model->copy_us >= 0);
	assert_true(model->page_us > 0 && model->copy_page_us > 0);
	print_message("map %.2f us + %.2f a page, copy %.2f + %.2f, a page of memory %.2f\n", model->map_us,
		      model->map_page_us, model->copy_us, model->copy_page_us, model->page_us);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_formula),
		cmocka_unit_test(a_bad_measurement_is_bounded),
		cmocka_unit_test(a_full_budget_wants_longer_runs),
		cmocka_unit_test(measured),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
