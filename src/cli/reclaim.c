/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent reclaim: gives the memory of cold pages back to the host. The agent does it; here it is asked,
 * and shown. */
#include "cli/reclaim.h"

#include "activity/states.h"
#include "cli/cli.h"
#include "os/os.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ANSWER_TIMEOUT_MS 10000
#define LOOK_MS 50
#define PAGE_BYTES 4096
#define TARGET_PERCENT 1.0
#define FLOOR_MIN_US 1000000ull

#define STORE_LEAST_BYTES (1u << 20)

enum { OPT_COLD_FOR, OPT_TO, OPT_AUTO, OPT_PRESSURE, OPT_STORE, OPT_STORE_MAX, OPT_JSON };

static const struct cli_option options[] = {
	[OPT_COLD_FOR] = { "cold-for", CLI_VALUE, "TIME", "what was not used for so long: 30s, 2m" },
	[OPT_TO] = { "to", CLI_VALUE, "SIZE",
		     "what was not used for longest, until the machine takes no more than SIZE" },
	[OPT_AUTO] = { "auto", CLI_FLAG, NULL,
		       "again and again, while the host's memory is under pressure" },
	[OPT_PRESSURE] = { "pressure", CLI_VALUE, "PERCENT",
			   "with --auto: the pressure that is all right (default: 1)" },
	[OPT_STORE] = { "store", CLI_VALUE, "FILE",
			"what is packed goes to this new file from now on, and not to memory" },
	[OPT_STORE_MAX] = { "store-max", CLI_VALUE, "SIZE",
			    "with --store: at most so much of it (default: as much as the machine has RAM)" },
	[OPT_JSON] = { "json", CLI_FLAG, NULL,
		       "print the result as a JSON object (with --auto one a line)" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_reclaim = {
	.name = "reclaim",
	.arguments = "NAME --cold-for TIME | NAME --to SIZE | NAME --auto [--pressure PERCENT]\n"
		     "                      [--store FILE [--store-max SIZE]]",
	.summary = "Give memory that a virtual machine does not use back to the host",
	.details = "It is packed, and comes back when it is used. `latent scan` has to look which "
		   "memory that is.\n"
		   "Ctrl-C ends it; what was given back by then stays so.",
	.options = options,
	.run = run,
};

struct request {
	const char *name;
	uint64_t cold_for_us, to_bytes;
	const char *store;
	uint64_t store_max_bytes; /* 0: not said */
	bool is_auto, json;
	double pressure_percent; /* 0: not said */
};

struct result {
	struct vm_stats before;
	uint64_t unused_us; /* of the last walk */
	uint64_t begun_us;
};

volatile sig_atomic_t reclaim_interrupted; /* how often */

static int parse(const struct cli_command *command, int argc, char **argv, struct request *request);
static int check_age(const struct vm_view *view, uint64_t cold_for_us);
static int reclaim(struct vm_view *view, const struct request *request);
static void print_text(const struct vm_view *view, const struct result *result);
static void print_json(const struct vm_view *view, const struct result *result);

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct request request = { .name = NULL };
	struct vm_view view;
	int status = parse(command, argc, argv, &request);

	if (!request.name)
		return status;
	status = vm_view_find(request.name, &view);
	if (status)
		return status;
	reclaim_catch_interrupts();
	status = check_age(&view, request.cold_for_us);
	if (!status && request.store)
		status = reclaim_give_store(&view, request.store, request.store_max_bytes);
	if (!status && request.is_auto)
		status = reclaim_auto(
			&view, request.pressure_percent > 0 ? request.pressure_percent : TARGET_PERCENT,
			request.json);
	else if (!status)
		status = reclaim(&view, &request);
	vm_view_close(&view);
	return status;
}

/* Nothing would ever be found. */
static int check_age(const struct vm_view *view, uint64_t cold_for_us)
{
	uint64_t longest_us = reclaim_longest_us(&view->stats);

	if (cold_for_us <= longest_us)
		return CLI_OK;
	return cli_fail(CLI_USAGE,
			"reclaim: nobody remembers for longer than %ju s that a page of %s was not used: give a shorter "
			"--cold-for, or have it scanned at a longer period",
			(uintmax_t)longest_us / 1000000, view->name);
}

static int take_option(struct request *request, int option, const char *value)
{
	switch (option) {
	case OPT_COLD_FOR:
		if (!cli_parse_time(value, &request->cold_for_us) || !request->cold_for_us)
			return cli_fail(CLI_USAGE,
					"reclaim: --cold-for takes a time (30s, 2m), not '%.80s'",
					value);
		break;
	case OPT_TO:
		if (!cli_parse_size(value, &request->to_bytes) || !request->to_bytes)
			return cli_fail(CLI_USAGE,
					"reclaim: --to takes a size (512M, 1.5G), not '%.80s'", value);
		break;
	case OPT_PRESSURE:
		if (!cli_parse_real(value, 0.01, 100, &request->pressure_percent))
			return cli_fail(
				CLI_USAGE,
				"reclaim: --pressure takes percents from 0.01 to 100, not '%.80s'",
				value);
		break;
	case OPT_AUTO:
		request->is_auto = true;
		break;
	case OPT_STORE:
		request->store = value;
		break;
	case OPT_STORE_MAX:
		if (!cli_parse_size(value, &request->store_max_bytes) || request->store_max_bytes < STORE_LEAST_BYTES)
			return cli_fail(CLI_USAGE, "reclaim: --store-max takes a size from 1M on, not '%.80s'", value);
		break;
	default:
		request->json = true;
	}
	return CLI_OK;
}

/* Without a name in the request the status is final. */
static int parse(const struct cli_command *command, int argc, char **argv, struct request *request)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	int option;

	while ((option = cli_next_option(&parser)) >= 0) {
		int status = take_option(request, option, parser.value);

		if (status)
			return status;
	}
	if (option != CLI_END)
		return cli_end_status(option);
	if (parser.operands != 1 || !!request->cold_for_us + !!request->to_bytes + request->is_auto != 1)
		return cli_fail(
			CLI_USAGE,
			"reclaim: give a VM's name, and one of --cold-for, --to and --auto (see latent "
			"reclaim --help)");
	if (request->pressure_percent > 0 && !request->is_auto)
		return cli_fail(CLI_USAGE, "reclaim: --pressure goes with --auto");
	if (request->store_max_bytes && !request->store)
		return cli_fail(CLI_USAGE, "reclaim: --store-max goes with --store");
	request->name = argv[1];
	return CLI_OK;
}

/* ---- a walk -------------------------------------------------------------------------------------- */

static void on_interrupt(int signal)
{
	(void)signal;
	if (reclaim_interrupted < SIG_ATOMIC_MAX)
		reclaim_interrupted++;
}

void reclaim_catch_interrupts(void)
{
	struct sigaction action = { .sa_handler = on_interrupt };

	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
}

uint64_t reclaim_pages(const struct vm_stats *stats)
{
	const struct reclaim_stats *c = &stats->reclaim;

	return stat_get(&c->zeros) + stat_get(&c->words) + stat_get(&c->spilled) + stat_get(&c->clean);
}

/* The scan's period. The VMM may have written anything there. */
static uint64_t shortest_us(const struct vm_stats *stats)
{
	uint64_t us = stat_get(&stats->scan.shortest_us_now);

	us = us > FLOOR_MIN_US / 2 ? us : FLOOR_MIN_US / 2;
	return us < SCAN_PERIOD_MAX_US ? us : SCAN_PERIOD_MAX_US;
}

uint64_t reclaim_floor_us(const struct vm_stats *stats)
{
	return 2 * shortest_us(stats);
}

uint64_t reclaim_longest_us(const struct vm_stats *stats) { return activity_longest_us(shortest_us(stats)); }

static int ask(const struct vm_view *view, uint64_t unused_us, uint64_t until_bytes,
	       char why[RECLAIM_WHY_BYTES])
{
	struct control_reply reply;
	char text[48];
	int r;

	snprintf(text, sizeof text, "%ju %ju", (uintmax_t)unused_us, (uintmax_t)until_bytes);
	r = vm_view_ask(view, CONTROL_RECLAIM, text, ANSWER_TIMEOUT_MS, &reply);
	if (r)
		snprintf(why, RECLAIM_WHY_BYTES, "the agent does not answer: %s", strerror(-r));
	else if (reply.error)
		snprintf(why, RECLAIM_WHY_BYTES, "%s",
			 reply.text[0] ? reply.text : strerror(-reply.error));
	return r ? r : reply.error;
}

static void show_progress(const struct vm_view *view, uint64_t pages_before)
{
	const struct vm_stats *stats = &view->stats;
	uint64_t looked = stat_get(&stats->reclaim.looked_now) * PAGE_BYTES;
	char size[CLI_SIZE_TEXT];

	fprintf(stderr, "\rlooking through RAM: %3.0f %%, given back %s ",
		stats->ram_bytes ? 100 * (double)looked / (double)stats->ram_bytes : 0,
		cli_size((reclaim_pages(stats) - pages_before) * PAGE_BYTES, size));
}

/* Until its number of walks is another one. */
static int wait_for_end(struct vm_view *view, uint64_t walks, char why[RECLAIM_WHY_BYTES])
{
	uint64_t pages_before = reclaim_pages(&view->stats);
	bool shown = isatty(STDERR_FILENO), ended = false;
	int r = 0;

	while (!r) {
		usleep(LOOK_MS * 1000);
		if (!vm_view_is_live(view)) {
			snprintf(why, RECLAIM_WHY_BYTES, "it has ended");
			r = -ESRCH;
			break;
		}
		r = vm_view_update(view);
		if (r)
			snprintf(why, RECLAIM_WHY_BYTES, "its statistics cannot be read: %s",
				 strerror(-r));
		else if (shown)
			show_progress(view, pages_before);
		if (r || stat_get(&view->stats.reclaim.walks) != walks)
			break;
		if (reclaim_interrupted > 1) { /* whatever the agent does */
			snprintf(why, RECLAIM_WHY_BYTES, "its end was not waited for");
			r = -ECANCELED;
			break;
		}
		if (reclaim_interrupted && !ended)
			r = ask(view, 0, 0, why);
		ended = reclaim_interrupted;
	}
	if (shown)
		fprintf(stderr, "\r\033[K");
	return r;
}

static int result_of_walk(const struct vm_view *view, char why[RECLAIM_WHY_BYTES])
{
	uint64_t error = stat_get(&view->stats.reclaim.error_now);

	if (error == ECANCELED)
		snprintf(why, RECLAIM_WHY_BYTES, "it was ended before all of RAM was looked at");
	else if (error == EBUSY)
		snprintf(why, RECLAIM_WHY_BYTES,
			 "it ended early: guest RAM is being saved, or something needs all of it as "
			 "it is (see `latent stat`)");
	else if (error == ENOSPC)
		snprintf(why, RECLAIM_WHY_BYTES, "the store is full: what is left stays in memory");
	else if (error)
		snprintf(why, RECLAIM_WHY_BYTES, "not all could be given back: %s",
			 error < 4096 ? strerror((int)error) : "?");
	if (error == EBUSY)
		return -EAGAIN;
	return error < 4096 ? -(int)error : -EPROTO;
}

int reclaim_walk(struct vm_view *view, uint64_t unused_us, uint64_t until_bytes,
		 char why[RECLAIM_WHY_BYTES])
{
	uint64_t walks;
	int r;

	if (!vm_view_is_live(view)) { /* another one of its name is not asked instead */
		snprintf(why, RECLAIM_WHY_BYTES, "it has ended");
		return -ESRCH;
	}
	r = vm_view_update(view);
	if (r) {
		snprintf(why, RECLAIM_WHY_BYTES, "its statistics cannot be read: %s", strerror(-r));
		return r;
	}
	walks = stat_get(&view->stats.reclaim.walks);
	r = ask(view, unused_us, until_bytes, why);
	if (!r)
		r = wait_for_end(view, walks, why);
	return r ? r : result_of_walk(view, why);
}

/* ---- --cold-for, --to ------------------------------------------------------------------------------ */

static bool is_reached(const struct vm_view *view, uint64_t to_bytes)
{
	return stat_get(&view->stats.reclaim.memory_bytes_now) <= to_bytes;
}

/* What is coldest first, then what is less so. */
static int walk_to(struct vm_view *view, uint64_t to_bytes, uint64_t *ret_unused_us,
		   char why[RECLAIM_WHY_BYTES])
{
	uint64_t floor_us = reclaim_floor_us(&view->stats), unused_us = reclaim_longest_us(&view->stats);
	int r;

	for (;; unused_us = unused_us / 2 > floor_us ? unused_us / 2 : floor_us) {
		*ret_unused_us = unused_us;
		r = reclaim_walk(view, unused_us, to_bytes, why);
		if (r || unused_us == floor_us || is_reached(view, to_bytes))
			return r;
	}
}

static int tell_not_reached(const struct vm_view *view, uint64_t to_bytes)
{
	char now[CLI_SIZE_TEXT], to[CLI_SIZE_TEXT];

	return cli_fail(
		CLI_NO_ANSWER,
		"%s takes %s and not %s: it uses the rest, or has not been looked at for long enough",
		view->name, cli_size(stat_get(&view->stats.reclaim.memory_bytes_now), now),
		cli_size(to_bytes, to));
}

static int reclaim(struct vm_view *view, const struct request *request)
{
	struct result result = { .before = view->stats,
				 .unused_us = request->cold_for_us,
				 .begun_us = os_now_us() };
	char why[RECLAIM_WHY_BYTES];
	int r = request->to_bytes ? walk_to(view, request->to_bytes, &result.unused_us, why)
				  : reclaim_walk(view, request->cold_for_us, 0, why);

	if (!r || reclaim_pages(&view->stats) != reclaim_pages(&result.before))
		(request->json ? print_json : print_text)(view, &result);
	if (r)
		return cli_fail(CLI_NO_ANSWER, "%s: %s", view->name, why);
	if (request->to_bytes && !is_reached(view, request->to_bytes))
		return tell_not_reached(view, request->to_bytes);
	return CLI_OK;
}

/* ---- results --------------------------------------------------------------------------------------- */

#define DELTA(field) (stat_get(&view->stats.reclaim.field) - stat_get(&result->before.reclaim.field))

static void print_text(const struct vm_view *view, const struct result *result)
{
	const struct reclaim_stats *now = &view->stats.reclaim;
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT], c[CLI_SIZE_TEXT], d[CLI_SIZE_TEXT], e[CLI_SIZE_TEXT];
	uint64_t file_bytes = stat_get(&now->spill_file_bytes_now);

	printf("%s: given back %s: zeros %s, of one word %s, packed %s, of images %s\n", view->name,
	       cli_size((reclaim_pages(&view->stats) - reclaim_pages(&result->before)) * PAGE_BYTES, a),
	       cli_size(DELTA(zeros) * PAGE_BYTES, b), cli_size(DELTA(words) * PAGE_BYTES, c),
	       cli_size(DELTA(spilled) * PAGE_BYTES, d), cli_size(DELTA(clean) * PAGE_BYTES, e));
	printf("  it takes %s of memory of its own now; %s are packed, in %s of that%s%s\n",
	       cli_size(stat_get(&now->memory_bytes_now), a), cli_size(stat_get(&now->spilled_now) * PAGE_BYTES, b),
	       cli_size(stat_get(&now->spill_bytes_now), c), file_bytes ? ", and of the store's file in " : "",
	       file_bytes ? cli_size(file_bytes, d) : "");
}

static void add(struct json_object *json, const char *key, uint64_t number)
{
	json_object_object_add(json, key, json_object_new_uint64(number));
}

static void print_json(const struct vm_view *view, const struct result *result)
{
	const struct reclaim_stats *now = &view->stats.reclaim;
	struct json_object *json = json_object_new_object();

	json_object_object_add(json, "name", json_object_new_string(view->name));
	add(json, "cold_for_us", result->unused_us);
	add(json, "took_us", os_now_us() - result->begun_us);
	add(json, "pages_zero", DELTA(zeros));
	add(json, "pages_of_one_word", DELTA(words));
	add(json, "pages_packed", DELTA(spilled));
	add(json, "pages_of_files", DELTA(clean));
	add(json, "left_used", DELTA(left_touched));
	add(json, "left_being_read", DELTA(left_reads));
	add(json, "left_not_packed", DELTA(left_unpacked));
	add(json, "left_failed", DELTA(left_failed));
	add(json, "memory_bytes_before", stat_get(&result->before.reclaim.memory_bytes_now));
	add(json, "memory_bytes_now", stat_get(&now->memory_bytes_now));
	add(json, "pages_packed_now", stat_get(&now->spilled_now));
	add(json, "store_bytes_now", stat_get(&now->spill_bytes_now));
	add(json, "store_file_bytes_now", stat_get(&now->spill_file_bytes_now));
	puts(json_object_to_json_string_ext(json, JSON_C_TO_STRING_PLAIN));
	json_object_put(json);
}
