/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent reclaim --auto: holds the pressure on the host's memory under a target. */
#include "cli/cli.h"
#include "cli/reclaim.h"

#include "os/os.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PRESSURE "/proc/pressure/memory" /* Documentation/accounting/psi.rst; computed anew every 2 s */
#define STEP_US 2000000ull
#define PAGE_BYTES 4096
#define BACKOFFS_MAX 6u           /* up to 64 steps of rest */
#define REFAULTS_MOST_PER_S 250.0 /* of 20 to 40 us each: a hundredth of a processor */

/* ---- what to do: a function of what was measured ---------------------------------------------------- */

static uint64_t at_most(const struct pressure_control *c, uint64_t us)
{
	return us < c->longest_us ? us : c->longest_us;
}

/* What comes back was given back by the last walk, or by one before, of more age. */
static enum pressure_act back_off(struct pressure_control *c)
{
	c->unused_us = at_most(c, 2 * (c->walked_us > c->unused_us ? c->walked_us : c->unused_us));
	c->backoffs += c->backoffs < BACKOFFS_MAX;
	c->rest = 1u << c->backoffs;
	return PRESSURE_BACK_OFF;
}

enum pressure_act pressure_step(struct pressure_control *c, double percent, double refaults_per_s,
				uint64_t *ret_unused_us)
{
	if (refaults_per_s > c->refaults_most_per_s)
		return back_off(c);
	if (c->rest) {
		c->rest--;
		return PRESSURE_REST;
	}
	if (percent <= c->target_percent) {
		c->unused_us = at_most(c, c->unused_us + c->unused_us / 8);
		return PRESSURE_REST;
	}
	*ret_unused_us = c->walked_us = c->unused_us;
	c->unused_us = c->unused_us / 2 > c->floor_us ? c->unused_us / 2 : c->floor_us;
	c->backoffs -= c->backoffs > 0;
	return PRESSURE_WALK;
}

/* ---- doing it ----------------------------------------------------------------------------------------- */

struct loop {
	struct vm_view *view;
	struct pressure_control control;
	bool json, shown;
	uint64_t returned, at_us; /* as of the last step */
};

/* Of all tasks of the host, the share of time in which some waited for memory, over 10 s. */
static bool read_pressure(double *ret_percent)
{
	FILE *file = fopen(PRESSURE, "re");
	bool ok = file && fscanf(file, "some avg10=%lf", ret_percent) == 1;

	if (file)
		fclose(file);
	return ok;
}

static double refaults_per_s(struct loop *l)
{
	uint64_t returned = stat_get(&l->view->stats.reclaim.returned), now_us = os_now_us();
	double rate = (double)(returned - l->returned) * 1e6 / (double)(now_us - l->at_us + 1);

	l->returned = returned;
	l->at_us = now_us;
	return rate;
}

static const char *const act_names[] = {
	[PRESSURE_REST] = "rest",
	[PRESSURE_WALK] = "reclaim",
	[PRESSURE_BACK_OFF] = "back-off",
};

static void tell(const struct loop *l, enum pressure_act act, double percent, double refaults,
		 uint64_t unused_us)
{
	const struct reclaim_stats *now = &l->view->stats.reclaim;
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT];
	struct json_object *json;

	if (l->json) {
		json = json_object_new_object();
		json_object_object_add(json, "act", json_object_new_string(act_names[act]));
		json_object_object_add(json, "pressure_percent", json_object_new_double(percent));
		json_object_object_add(json, "refaults_per_s", json_object_new_double(refaults));
		json_object_object_add(json, "cold_for_us", json_object_new_uint64(unused_us));
		json_object_object_add(json, "memory_bytes_now",
				       json_object_new_uint64(stat_get(&now->memory_bytes_now)));
		json_object_object_add(json, "pages_packed_now",
				       json_object_new_uint64(stat_get(&now->spilled_now)));
		json_object_object_add(json, "store_bytes_now",
				       json_object_new_uint64(stat_get(&now->spill_bytes_now)));
		json_object_object_add(json, "store_file_bytes_now",
				       json_object_new_uint64(stat_get(&now->spill_file_bytes_now)));
		puts(json_object_to_json_string_ext(json, JSON_C_TO_STRING_PLAIN));
		json_object_put(json);
		return;
	}
	if (!l->shown && act == PRESSURE_REST)
		return;
	printf("%spressure %.2f %%, refaults %.0f/s: %s, %.0f s; %s takes %s, packed %s%s",
	       l->shown ? "\r\033[K" : "", percent, refaults, act_names[act], (double)unused_us / 1e6,
	       l->view->name, cli_size(stat_get(&now->memory_bytes_now), a),
	       cli_size(stat_get(&now->spilled_now) * PAGE_BYTES, b), l->shown ? "" : "\n");
}

/* As reclaim_walk; -EOPNOTSUPP. */
static int step(struct loop *l, char why[RECLAIM_WHY_BYTES])
{
	uint64_t unused_us = l->control.unused_us;
	double percent, refaults;
	enum pressure_act act;
	int r = vm_view_update(l->view);

	if (r) {
		snprintf(why, RECLAIM_WHY_BYTES, "its statistics cannot be read: %s", strerror(-r));
		return r;
	}
	if (!read_pressure(&percent)) {
		snprintf(why, RECLAIM_WHY_BYTES,
			 "the kernel does not tell of pressure on memory (%s): boot it with psi=1",
			 PRESSURE);
		return -EOPNOTSUPP;
	}
	if (!stat_get(&l->view->stats.scan.period_us_now)) {
		snprintf(why, RECLAIM_WHY_BYTES,
			 "nobody knows which pages are cold: run `latent scan` first");
		return -EBUSY;
	}
	refaults = refaults_per_s(l);
	act = pressure_step(&l->control, percent, refaults, &unused_us);
	if (act == PRESSURE_WALK)
		r = reclaim_walk(l->view, unused_us, 0, why);
	if (!r)
		tell(l, act, percent, refaults, unused_us);
	return r;
}

static void rest(void)
{
	for (uint64_t since_us = os_now_us(); !reclaim_interrupted && os_now_us() - since_us < STEP_US;)
		usleep(100000);
}

int reclaim_auto(struct vm_view *view, double target_percent, bool json)
{
	struct loop l = {
		.view = view,
		.control = { .target_percent = target_percent,
			     .refaults_most_per_s = REFAULTS_MOST_PER_S,
			     .floor_us = reclaim_floor_us(&view->stats),
			     .longest_us = reclaim_longest_us(&view->stats),
			     .unused_us = reclaim_longest_us(&view->stats) },
		.json = json,
		.shown = !json && isatty(STDOUT_FILENO),
		.returned = stat_get(&view->stats.reclaim.returned),
		.at_us = os_now_us(),
	};
	char why[RECLAIM_WHY_BYTES];
	int r = 0;

	while (!r && !reclaim_interrupted && vm_view_is_live(view)) {
		r = step(&l, why);
		if (fflush(stdout))
			break;
		if (r == -EALREADY || r == -EAGAIN) /* somebody else's walk, or a save: a later step */
			r = 0;
		if (!r)
			rest();
	}
	if (l.shown)
		putchar('\n');
	if (r && r != -ECANCELED && r != -ESRCH)
		return cli_fail(CLI_NO_ANSWER, "%s: %s", view->name, why);
	return CLI_OK;
}
