/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent stat: the statistics of one VM. */
#include "cli/cli.h"
#include "cli/restore_steps.h"
#include "cli/stat_moving.h"
#include "cli/stat_reclaim.h"
#include "cli/stat_scan.h"
#include "cli/vm_view.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define REFRESH_TIMEOUT_MS 2000
#define DEFAULT_INTERVAL_S 2.0
#define PAGE_BYTES 4096
#define SILENT_MS 1000

enum { OPT_JSON, OPT_WATCH };

static const struct cli_option options[] = {
	[OPT_JSON] = { "json", CLI_FLAG, NULL, "print a JSON object (with --watch one a line)" },
	[OPT_WATCH] = { "watch", CLI_NUMBER_IF_ANY, "SECONDS", "again every 2 or SECONDS seconds" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_stat = {
	.name = "stat",
	.arguments = "NAME [--json] [--watch [SECONDS]]",
	.summary = "Show where the memory of a virtual machine comes from, and what its reads cost",
	.options = options,
	.run = run,
};

/* One word of a text table and of JSON each, by enum miss_reason and enum volume_state. */
static const struct {
	const char *key, *text;
} reasons[MISS_REASONS] = {
	[MISS_MISALIGNED] = { "misaligned", "no whole page, or offset and address differ within it" },
	[MISS_SHORT_RUN] = { "short_run", "run too short to be worth a mapping" },
	[MISS_UNLIKELY] = { "unlikely", "sharing too unlikely" },
	[MISS_BUDGET] = { "budget", "no mappings to spare" },
	[MISS_WRITABLE] = { "writable", "open for writing somewhere" },
	[MISS_NO_LEASE] = { "no_lease", "nothing keeps the file from changing" },
	[MISS_SAVING] = { "saving", "while the VM was saved" },
	[MISS_DETACHED] = { "detached", "detached" },
	[MISS_EXCLUDED] = { "excluded", "a device needs plain RAM" },
	[MISS_END_OF_FILE] = { "end_of_file", "beyond the last whole page" },
	[MISS_KERNEL_IO] = { "kernel_io", "read by io_uring or Linux AIO" },
	[MISS_BUFFER] = { "buffer", "not into guest RAM: metadata, compressed, encrypted" },
	[MISS_FAILED] = { "failed", "mapping or storage failed" },
};
static const struct {
	const char *key, *text;
} states[VOLUME_STATES] = {
	[VOLUME_LEASED] = { "leased", "mapped under a lease" },
	[VOLUME_SEALED] = { "sealed", "mapped: it cannot change" },
	[VOLUME_CACHED] = { "cached", "mapped: a snapshot's pages, as they are loaded" },
	[VOLUME_TRUSTED] = { "trusted", "mapped on your word (--trust-image)" },
	[VOLUME_WRITABLE] = { "writable", "copied: open for writing" },
	[VOLUME_NO_LEASE] = { "no_lease", "copied: nothing keeps it from changing" },
	[VOLUME_DETACHED] = { "detached", "copied: detached" },
	[VOLUME_CLOSED] = { "closed", "not open now" },
};

static const struct {
	const char *key, *text;
} rests[REST_STATES] = {
	[REST_NONE] = { "none", "" },
	[REST_LOADING] = { "loading", "being loaded" },
	[REST_LOADED] = { "loaded", "all was loaded" },
	[REST_STOPPED] = { "stopped", "loading was stopped" },
	[REST_NO_ROOM] = { "no_room", "loading ended: the host's memory is needed for other things" },
	[REST_FAILED] = { "failed", "loading failed: the snapshot, or an image, cannot be read" },
};

struct request {
	const char *name;
	bool json, watch;
	double interval_s;
};

static int parse(const struct cli_command *command, int argc, char **argv, struct request *request);
static int watch(const struct request *request, struct vm_view *view);
static int show(const struct request *request, struct vm_view *view);
static bool refresh(struct vm_view *view, char *why, size_t why_bytes);
static void print_vm(const struct vm_view *view);
static void print_volume(const struct volume_stats *volume);
static void print_misses(const struct volume_stats *volume);
static struct json_object *vm_to_json(const struct vm_view *view, bool refreshed);
static struct json_object *volume_to_json(const struct volume_stats *volume);

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct request request = { .interval_s = DEFAULT_INTERVAL_S };
	struct vm_view view;
	int status = parse(command, argc, argv, &request);

	if (!request.name)
		return status;
	status = vm_view_find(request.name, &view);
	if (status)
		return status;
	status = request.watch ? watch(&request, &view) : show(&request, &view);
	vm_view_close(&view);
	return status;
}

/* Without a name in the request the status is final. */
static int parse(const struct cli_command *command, int argc, char **argv, struct request *request)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	int option;

	while ((option = cli_next_option(&parser)) >= 0) {
		if (option == OPT_JSON)
			request->json = true;
		else
			request->watch = true;
		if (option == OPT_WATCH && parser.value &&
		    !cli_parse_real(parser.value, 0.1, 86400, &request->interval_s))
			return cli_fail(CLI_USAGE,
					"stat: --watch takes seconds from 0.1 to 86400, not "
					"'%.80s'",
					parser.value);
	}
	if (option != CLI_END)
		return cli_end_status(option);
	if (parser.operands != 1)
		return cli_fail(CLI_USAGE, "stat: give the name of one VM (see latent stat --help)");
	request->name = argv[1];
	return CLI_OK;
}

/* Until the VM ends. */
static int watch(const struct request *request, struct vm_view *view)
{
	struct timespec pause = {
		.tv_sec = (time_t)request->interval_s,
		.tv_nsec = (long)((request->interval_s - (double)(time_t)request->interval_s) * 1e9),
	};
	bool terminal = isatty(STDOUT_FILENO) && !request->json;
	int status = CLI_OK;

	while (vm_view_is_live(view)) {
		if (terminal)
			fputs("\033[H\033[J", stdout);
		status = show(request, view);
		if (!terminal && !request->json)
			putchar('\n');
		if (fflush(stdout))
			break;
		nanosleep(&pause, NULL);
	}
	return status;
}

static int show(const struct request *request, struct vm_view *view)
{
	char why[VMDIR_WHY_BYTES];
	bool refreshed = refresh(view, why, sizeof why);
	int style = request->watch ? JSON_C_TO_STRING_PLAIN : JSON_C_TO_STRING_PRETTY;
	struct json_object *json;

	if (request->json) {
		json = vm_to_json(view, refreshed);
		puts(json_object_to_json_string_ext(json, style | JSON_C_TO_STRING_NOSLASHESCAPE));
		json_object_put(json);
	} else {
		print_vm(view);
	}
	if (refreshed)
		return CLI_OK;
	return cli_fail(CLI_NO_ANSWER, "%s: %s; these are its last numbers", view->name, why);
}

static bool refresh(struct vm_view *view, char *why, size_t why_bytes)
{
	struct control_reply reply;
	int r = vm_view_ask(view, CONTROL_REFRESH, NULL, REFRESH_TIMEOUT_MS, &reply);
	int unread = vm_view_update(view);

	if (!r && !reply.error && !unread)
		return true;
	if (unread)
		snprintf(why, why_bytes, "its statistics are spoilt: %s", strerror(-unread));
	else if (!r)
		snprintf(why, why_bytes, "the agent could not bring its numbers up to date: %.400s",
			 reply.text[0] ? reply.text : strerror(-reply.error));
	else if (!view->stats.pid)
		snprintf(why, why_bytes, "the agent has not spoken yet");
	else if (r == -ETIMEDOUT)
		snprintf(why, why_bytes, "the agent does not answer within %d s",
			 REFRESH_TIMEOUT_MS / 1000);
	else
		snprintf(why, why_bytes, "the agent does not answer: %s", strerror(-r));
	return false;
}

static double percent(uint64_t part, uint64_t whole)
{
	return whole ? 100 * (double)part / (double)whole : 0;
}

/* What a restore has left to be made, what was given back, and what is still to come from another host. */
static void print_masked(const struct vm_stats *stats)
{
	uint64_t now = stat_get(&stats->pages_masked_now);
	char a[CLI_SIZE_TEXT];

	if (!stat_get(&stats->pages_masked))
		return;
	printf("  %-34s %9s  %5.1f %%\n", "to be made when it is touched", cli_size(now * PAGE_BYTES, a),
	       percent(now * PAGE_BYTES, stats->ram_bytes));
	printf("  of %ju such pages made %ju, mapped %ju, copied %ju, unpacked %ju, replaced %ju; zero anyway %ju\n",
	       (uintmax_t)stat_get(&stats->pages_masked), (uintmax_t)stat_get(&stats->masked_made),
	       (uintmax_t)stat_get(&stats->masked_mapped), (uintmax_t)stat_get(&stats->masked_copied),
	       (uintmax_t)stat_get(&stats->reclaim.returned), (uintmax_t)stat_get(&stats->masked_dropped),
	       (uintmax_t)stat_get(&stats->pages_never_masked));
}

/* What the guest has not touched comes by itself. */
static void print_rest(const struct vm_stats *stats)
{
	uint64_t all = stat_get(&stats->rest_pages_all_now), now = stat_get(&stats->rest_pages_now);
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT];

	if (stats->rest_state != REST_NONE)
		printf("\nOf the snapshot's RAM %s of %s, %.1f %%, are in memory; %s\n", cli_size(now * PAGE_BYTES, a),
		       cli_size(all * PAGE_BYTES, b), percent(now, all), rests[stats->rest_state].text);
}

static void print_source(const struct vm_stats *stats)
{
	uint64_t all = stat_get(&stats->source_pages_all), now = stat_get(&stats->source_pages_now);
	uint64_t silent_ms = stat_get(&stats->source_silent_ms_now);
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT], c[CLI_SIZE_TEXT];

	printf("\nLoaded from %s\n  %s of %s, %.1f %%; fetched %s; faults served %ju, waiting %ju\n", stats->source,
	       cli_size(now * PAGE_BYTES, a), cli_size(all * PAGE_BYTES, b), percent(now, all),
	       cli_size(stat_get(&stats->source_bytes), c), (uintmax_t)stat_get(&stats->source_faults),
	       (uintmax_t)stat_get(&stats->source_waiting_now));
	if (silent_ms >= SILENT_MS)
		printf("  the store does not answer since %ju s; who waits for a page goes on when it does\n",
		       (uintmax_t)silent_ms / 1000);
	if (stats->source_trouble[0])
		printf("  %s\n", stats->source_trouble);
	if (stat_get(&stats->source_wrong))
		printf("  answers with wrong contents, not used: %ju\n", (uintmax_t)stat_get(&stats->source_wrong));
	if (stat_get(&stats->source_pagers_lost))
		printf("  pagers that were lost and replaced: %ju\n", (uintmax_t)stat_get(&stats->source_pagers_lost));
}

/* Of a VM that came from another host. */
static void print_source_bits(const struct vm_stats *stats)
{
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT], c[CLI_SIZE_TEXT];

	if (stat_get(&stats->source_bits_set))
		printf("  told by their place on images %s; fetched from there %s, not needed yet %s\n",
		       cli_size(stat_get(&stats->source_bits_set) * PAGE_BYTES, a),
		       cli_size(stat_get(&stats->source_bits_fetched) * PAGE_BYTES, b),
		       cli_size(stat_get(&stats->source_bits_now) * PAGE_BYTES, c));
}

static void print_vm(const struct vm_view *view)
{
	const struct vm_stats *stats = &view->stats;
	uint64_t base = (stat_get(&stats->pages_base_now) - stat_get(&stats->pages_masked_now)) * PAGE_BYTES;
	uint64_t copies = stat_get(&stats->pages_private_now) * PAGE_BYTES;
	uint64_t mapped = vm_view_clean_pages(stats) * PAGE_BYTES;
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT];

	printf("%s: pid %u, up %s, RAM %s\n", view->name, stats->pid, cli_age(stats->started_unix_s, a),
	       cli_size(stats->ram_bytes, b));
	if (!stats->overlays_allowed && stats->pid)
		printf("maps no images: %s\n", stats->excluded_by);
	if (stats->other_io)
		printf("drives use io_uring or Linux AIO: what they read is copied\n");
	if (stats->message[0])
		printf("last message, %s ago: %s\n", cli_age(stats->message_unix_s, a), stats->message);
	stat_print_moving(view);
	print_rest(stats);
	if (stats->source[0])
		print_source(stats);
	printf("\nMemory by source\n");
	printf("  %-34s %9s  %5.1f %%\n", "its own, or not touched yet", cli_size(base, a),
	       percent(base, stats->ram_bytes));
	printf("  %-34s %9s  %5.1f %%\n", "images", cli_size(mapped, a),
	       percent(mapped, stats->ram_bytes));
	printf("  %-34s %9s  %5.1f %%\n", "copies of image pages", cli_size(copies, a),
	       percent(copies, stats->ram_bytes));
	print_masked(stats);
	print_source_bits(stats);
	printf("  copied on write %ju pages, discarded %ju, settled %ju; mapping calls failed %ju\n",
	       (uintmax_t)stat_get(&stats->pages_copied_on_write),
	       (uintmax_t)stat_get(&stats->pages_discarded), (uintmax_t)stat_get(&stats->pages_settled),
	       (uintmax_t)stat_get(&stats->map_failures));
	stat_print_scan(stats);
	stat_print_reclaim(stats);
	printf("\nMappings: %ju of guest RAM + %ju others, budget %ju, limit of the kernel %ju\n",
	       (uintmax_t)stat_get(&stats->maps_ram_now), (uintmax_t)stat_get(&stats->maps_other_now),
	       (uintmax_t)stat_get(&stats->maps_budget_now),
	       (uintmax_t)stat_get(&stats->maps_limit_now));
	for (uint32_t i = 0; i < stats->volume_count; i++)
		print_volume(&stats->volumes[i]);
}

static void print_volume(const struct volume_stats *volume)
{
	uint64_t asked = stat_get(&volume->bytes_asked), shortcut = stat_get(&volume->bytes_shortcut);
	uint64_t storage = stat_get(&volume->bytes_from_storage);
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT];

	printf("\n%s\n  %s; VMs that have it: %u\n", volume->path, states[volume->state].text,
	       volume->readers_now);
	printf("  asked      %9s in %ju reads\n", cli_size(asked, a),
	       (uintmax_t)stat_get(&volume->reads));
	printf("  shortcut   %9s  %5.1f %%, in %ju mappings\n", cli_size(shortcut, a),
	       percent(shortcut, asked), (uintmax_t)stat_get(&volume->maps));
	printf("  storage    %9s  %5.1f %%\n", cli_size(storage, a), percent(storage, asked));
	printf("  joined     %9s in %ju reads that another VM had in flight\n",
	       cli_size(stat_get(&volume->pages_joined) * PAGE_BYTES, a),
	       (uintmax_t)stat_get(&volume->reads_joined));
	printf("  mapped now %9s here; pages mapped once %ju, by many %ju, by all VMs\n",
	       cli_size(stat_get(&volume->pages_mapped_now) * PAGE_BYTES, a),
	       (uintmax_t)stat_get(&volume->pages_one_now),
	       (uintmax_t)stat_get(&volume->pages_many_now));
	printf("  copied on write: %ju pages mapped once, %ju by many; dropped %s\n",
	       (uintmax_t)stat_get(&volume->copied_one), (uintmax_t)stat_get(&volume->copied_many),
	       cli_size(stat_get(&volume->pages_dropped) * PAGE_BYTES, b));
	printf("  likelihood of sharing %.3f, shortest run to map %u pages\n",
	       volume->likelihood_permille_now / 1000.0, volume->min_run_pages_now);
	print_misses(volume);
}

static void print_misses(const struct volume_stats *volume)
{
	bool first = true;

	for (unsigned i = 0; i < MISS_REASONS; i++) {
		uint64_t reads = stat_get(&volume->miss_reads[i]),
			 bytes = stat_get(&volume->miss_bytes[i]);
		char size[CLI_SIZE_TEXT];

		if (!reads && !bytes)
			continue;
		if (first)
			printf("  not shortcut:\n");
		first = false;
		printf("    %9s in %8ju reads  %s\n", cli_size(bytes, size), (uintmax_t)reads,
		       reasons[i].text);
	}
}

static void add_number(struct json_object *json, const char *key, uint64_t value)
{
	json_object_object_add(json, key, json_object_new_uint64(value));
}

static void add_text(struct json_object *json, const char *key, const char *value)
{
	json_object_object_add(json, key, json_object_new_string(value));
}

static void add_source(struct json_object *json, const struct vm_stats *stats)
{
	add_text(json, "source", stats->source);
	add_text(json, "source_trouble", stats->source_trouble);
	add_number(json, "source_pages_all", stat_get(&stats->source_pages_all));
	add_number(json, "source_pages_now", stat_get(&stats->source_pages_now));
	add_number(json, "source_bytes", stat_get(&stats->source_bytes));
	add_number(json, "source_faults", stat_get(&stats->source_faults));
	add_number(json, "source_wrong", stat_get(&stats->source_wrong));
	add_number(json, "source_pagers_lost", stat_get(&stats->source_pagers_lost));
	add_number(json, "source_waiting_now", stat_get(&stats->source_waiting_now));
	add_number(json, "source_silent_ms_now", stat_get(&stats->source_silent_ms_now));
}

/* us: since the beginning of the restore, as in its steps. */
static struct json_object *rest_to_json(const struct vm_stats *stats)
{
	uint64_t end_us = stat_get(&stats->rest_end_us), begun_us = stat_get(&stats->restore_us[RESTORE_BEGUN]);
	struct json_object *json = json_object_new_object();

	add_text(json, "state", rests[stats->rest_state].key);
	add_number(json, "pages_all_now", stat_get(&stats->rest_pages_all_now));
	add_number(json, "pages_now", stat_get(&stats->rest_pages_now));
	if (end_us)
		add_number(json, "end_us", end_us - begun_us);
	return json;
}

/* The names are those of struct vm_stats. */
static struct json_object *vm_to_json(const struct vm_view *view, bool refreshed)
{
	const struct vm_stats *stats = &view->stats;
	struct json_object *json = json_object_new_object(), *volumes = json_object_new_array();
	uint64_t step_us[RESTORE_STEPS];

	add_text(json, "name", view->name);
	json_object_object_add(json, "refreshed", json_object_new_boolean(refreshed));
	add_text(json, "agent_version", stats->agent_version);
	add_number(json, "pid", stats->pid);
	json_object_object_add(json, "overlays_allowed",
			       json_object_new_boolean(stats->overlays_allowed != 0));
	add_text(json, "excluded_by", stats->excluded_by);
	add_text(json, "message", stats->message);
	json_object_object_add(json, "other_io", json_object_new_boolean(stats->other_io != 0));
	add_number(json, "ram_bytes", stats->ram_bytes);
	add_number(json, "started_unix_s", stats->started_unix_s);
	add_number(json, "maps_ram_now", stat_get(&stats->maps_ram_now));
	add_number(json, "maps_other_now", stat_get(&stats->maps_other_now));
	add_number(json, "maps_budget_now", stat_get(&stats->maps_budget_now));
	add_number(json, "maps_limit_now", stat_get(&stats->maps_limit_now));
	add_number(json, "pages_base_now", stat_get(&stats->pages_base_now));
	add_number(json, "pages_overlay_now", stat_get(&stats->pages_overlay_now));
	add_number(json, "pages_private_now", stat_get(&stats->pages_private_now));
	add_number(json, "pages_masked_now", stat_get(&stats->pages_masked_now));
	add_number(json, "pages_masked", stat_get(&stats->pages_masked));
	add_number(json, "masked_made", stat_get(&stats->masked_made));
	add_number(json, "masked_copied", stat_get(&stats->masked_copied));
	add_number(json, "masked_mapped", stat_get(&stats->masked_mapped));
	add_number(json, "masked_dropped", stat_get(&stats->masked_dropped));
	add_number(json, "pages_never_masked", stat_get(&stats->pages_never_masked));
	add_number(json, "source_bits_set", stat_get(&stats->source_bits_set));
	add_number(json, "source_bits_fetched", stat_get(&stats->source_bits_fetched));
	add_number(json, "source_bits_now", stat_get(&stats->source_bits_now));
	add_number(json, "pages_copied_on_write", stat_get(&stats->pages_copied_on_write));
	add_number(json, "pages_discarded", stat_get(&stats->pages_discarded));
	add_number(json, "pages_settled", stat_get(&stats->pages_settled));
	add_number(json, "map_failures", stat_get(&stats->map_failures));
	add_number(json, "reconciled_unix_ms", stat_get(&stats->reconciled_unix_ms));
	for (int i = 0; i < RESTORE_STEPS; i++)
		step_us[i] = stat_get(&stats->restore_us[i]);
	if (step_us[RESTORE_BEGUN])
		json_object_object_add(json, "restore", restore_steps_to_json(step_us));
	if (step_us[RESTORE_BEGUN])
		json_object_object_add(json, "rest", rest_to_json(stats));
	json_object_object_add(json, "scan", stat_scan_to_json(&stats->scan));
	json_object_object_add(json, "reclaim", stat_reclaim_to_json(&stats->reclaim));
	json_object_object_add(json, "migration", stat_moving_to_json(view));
	json_object_object_add(json, "spare", json_object_new_boolean(stats->is_spare != 0));
	if (stats->source[0])
		add_source(json, stats);
	for (uint32_t i = 0; i < stats->volume_count; i++)
		json_object_array_add(volumes, volume_to_json(&stats->volumes[i]));
	json_object_object_add(json, "volumes", volumes);
	return json;
}

static struct json_object *volume_to_json(const struct volume_stats *volume)
{
	struct json_object *json = json_object_new_object(), *misses = json_object_new_object();

	add_text(json, "path", volume->path);
	add_number(json, "dev", volume->dev);
	add_number(json, "ino", volume->ino);
	add_number(json, "pages", volume->pages);
	add_text(json, "state", states[volume->state].key);
	add_number(json, "readers_now", volume->readers_now);
	add_number(json, "likelihood_permille_now", volume->likelihood_permille_now);
	add_number(json, "min_run_pages_now", volume->min_run_pages_now);
	add_number(json, "reads", stat_get(&volume->reads));
	add_number(json, "bytes_asked", stat_get(&volume->bytes_asked));
	add_number(json, "bytes_shortcut", stat_get(&volume->bytes_shortcut));
	add_number(json, "bytes_from_storage", stat_get(&volume->bytes_from_storage));
	add_number(json, "reads_joined", stat_get(&volume->reads_joined));
	add_number(json, "pages_joined", stat_get(&volume->pages_joined));
	add_number(json, "maps", stat_get(&volume->maps));
	add_number(json, "pages_mapped_now", stat_get(&volume->pages_mapped_now));
	add_number(json, "pages_one_now", stat_get(&volume->pages_one_now));
	add_number(json, "pages_many_now", stat_get(&volume->pages_many_now));
	add_number(json, "copied_one", stat_get(&volume->copied_one));
	add_number(json, "copied_many", stat_get(&volume->copied_many));
	add_number(json, "pages_dropped", stat_get(&volume->pages_dropped));
	for (unsigned i = 0; i < MISS_REASONS; i++) {
		struct json_object *miss = json_object_new_object();

		add_number(miss, "reads", stat_get(&volume->miss_reads[i]));
		add_number(miss, "bytes", stat_get(&volume->miss_bytes[i]));
		json_object_object_add(misses, reasons[i].key, miss);
	}
	json_object_object_add(json, "misses", misses);
	return json;
}
