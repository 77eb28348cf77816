/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent save: writes a running VM into a directory; the work is snapshot/'s, here it is shown. */
#include "cli/cli.h"
#include "cli/progress.h"
#include "cli/vm_view.h"
#include "snapshot/save.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096
#define BEFORE_MS 250
#define AFTER_MS 1000
#define WINDOW_MAX_MS 600000

enum { OPT_LIVE, OPT_STOP, OPT_PARENT, OPT_NO_DISK, OPT_COMPRESS, OPT_WINDOW, OPT_LIMIT, OPT_JSON };

static const struct cli_option options[] = {
	[OPT_LIVE] = { "live", CLI_FLAG, NULL, "let the guest run while its RAM is written (the default)" },
	[OPT_STOP] = { "stop", CLI_FLAG, NULL, "let the guest stand until all is written" },
	[OPT_PARENT] = { "parent", CLI_VALUE, "DIR", "another snapshot, which is kept: store only what it has not" },
	[OPT_NO_DISK] = { "no-disk", CLI_FLAG, NULL, "leave the disks as they are, and out of the snapshot" },
	[OPT_COMPRESS] = { "compress", CLI_FLAG, NULL, "store RAM in packed pieces (zstd)" },
	[OPT_WINDOW] = { "window", CLI_VALUE, "MS",
			 "see for so long, before and after the pause, which pages the guest uses (default: 250, 1000)" },
	[OPT_LIMIT] = { "limit", CLI_VALUE, "MIB", "write at most so many MiB of RAM a second" },
	[OPT_JSON] = { "json", CLI_FLAG, NULL, "print the result as a JSON object" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_save = {
	.name = "save",
	.arguments = "[OPTIONS] NAME DIR",
	.summary = "Save a running virtual machine into a directory",
	.details = "The guest stands for milliseconds. Each writable disk gets a new overlay, and what it was\n"
		   "before becomes part of the snapshot. Ctrl-C ends the writing, and the guest goes on.",
	.options = options,
	.run = run,
};

static struct source_progress progress;

static int parse(struct cli_parser *parser, struct save_options *save, bool *ret_json);
static int save_vm(struct vm_view *view, const struct save_options *options_given, bool json);
static void print_text(const struct save_options *save, const struct save_result *result);
static void print_json(const struct save_options *save, const struct save_result *result);

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	struct save_options save = { .before_ms = BEFORE_MS, .after_ms = AFTER_MS };
	struct vm_view view;
	bool json = false;
	int status = parse(&parser, &save, &json);

	if (status != CLI_END)
		return cli_end_status(status);
	if (parser.operands != 2)
		return cli_fail(CLI_USAGE, "save: give a VM's name and a directory that is not there yet (see latent "
					   "save --help)");
	status = vm_view_find(argv[1], &view);
	if (status)
		return status;
	save.name = argv[1];
	save.dir = argv[2];
	status = progress_take_faults();
	if (!status)
		status = save_vm(&view, &save, json);
	vm_view_close(&view);
	return status;
}

static int parse(struct cli_parser *parser, struct save_options *save, bool *ret_json)
{
	bool live = false;
	uint64_t mib, window_ms;
	int option;

	while ((option = cli_next_option(parser)) >= 0) {
		switch (option) {
		case OPT_LIVE:
			live = true;
			break;
		case OPT_STOP:
			save->stop = true;
			break;
		case OPT_PARENT:
			save->parent = parser->value;
			break;
		case OPT_NO_DISK:
			save->no_disks = true;
			break;
		case OPT_COMPRESS:
			save->compress = true;
			break;
		case OPT_LIMIT:
			if (!cli_parse_unsigned(parser->value, 1 << 20, &mib) || !mib) {
				cli_fail(CLI_USAGE, "save: --limit takes a number of MiB a second, from 1, not '%.40s'", parser->value);
				return CLI_WRONG;
			}
			save->limit_bytes_s = mib << 20;
			break;
		case OPT_WINDOW:
			if (!cli_parse_unsigned(parser->value, WINDOW_MAX_MS, &window_ms)) {
				cli_fail(CLI_USAGE, "save: --window takes milliseconds, up to %d, not '%.40s'", WINDOW_MAX_MS,
					 parser->value);
				return CLI_WRONG;
			}
			save->before_ms = save->after_ms = (unsigned)window_ms;
			break;
		case OPT_JSON:
			*ret_json = true;
			break;
		default:
			break;
		}
	}
	if (option == CLI_END && live && save->stop) {
		cli_fail(CLI_USAGE, "save: --live and --stop exclude each other");
		return CLI_WRONG;
	}
	return option;
}

/* ---- the VM -------------------------------------------------------------------------------------- */

/* -daemonize goes to the root. */
static bool has_left(const struct vm_view *view)
{
	char link[32], cwd[sizeof view->stats.cwd];
	ssize_t n;

	snprintf(link, sizeof link, "/proc/%u/cwd", view->stats.pid);
	n = readlink(link, cwd, sizeof cwd - 1);
	cwd[n > 0 ? n : 0] = '\0';
	return strcmp(cwd, view->stats.cwd);
}

/* After a save that has failed: the VM has its disks elsewhere, and nobody else says so. */
static void tell_disks(const struct save_result *result)
{
	for (uint32_t i = 0; i < result->disks; i++) {
		const char *drive = result->disk[i].drive, *now = result->disk[i].now, *before = result->disk[i].before;

		if (result->disks_unsure)
			cli_say("disk %s: QEMU has not said whether the VM writes to %s from now on (its `info block` does); if so, %s lies "
				"beneath that: do not start a VM with it", drive, now, before);
		else
			cli_say("disk %s: the VM writes to %s from now on; %s lies beneath that: do not start a VM with it", drive, now,
				before);
	}
}

static int save_vm(struct vm_view *view, const struct save_options *options_given, bool json)
{
	struct save_options save = *options_given;
	char run_dir[VMDIR_PATH_BYTES], why[SNAPSHOT_WHY_BYTES] = "";
	struct save_result result;
	int r;

	snprintf(run_dir, sizeof run_dir, "%.180s/%.63s", view->root, view->name);
	save.run_dir = run_dir;
	save.cwd = view->stats.cwd;
	save.cwd_left = has_left(view);
	progress_begin_writing(&progress);
	r = snapshot_save(&save, &progress, &result, why);
	progress_end();
	if (r) {
		cli_fail(CLI_NO_ANSWER, "%s was not saved: %s", view->name, why[0] ? why : strerror(-r));
		tell_disks(&result);
		return r == -EEXIST ? CLI_USAGE : CLI_NO_ANSWER;
	}
	(json ? print_json : print_text)(&save, &result);
	return CLI_OK;
}

/* ---- results --------------------------------------------------------------------------------- */

static void print_text(const struct save_options *save, const struct save_result *result)
{
	const struct snapshot_counts *p = &result->pages;
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT], c[CLI_SIZE_TEXT], d[CLI_SIZE_TEXT], e[CLI_SIZE_TEXT], f[CLI_SIZE_TEXT];

	printf("%s is saved in %s; the guest stood for %.1f ms\n", save->name, save->dir,
	       (double)result->pause_us / 1000);
	printf("  RAM %s: stored %s, equal to that %s, in other snapshots %s, on disk images %s, zero or of one word %s\n",
	       cli_size(p->pages * PAGE_BYTES, a), cli_size(p->data * PAGE_BYTES, b), cli_size(p->equal * PAGE_BYTES, c),
	       cli_size(result->pages_in_ram * PAGE_BYTES, d),
	       cli_size((p->volume - result->pages_in_ram) * PAGE_BYTES, e), cli_size(p->word * PAGE_BYTES, f));
	if (save->compress)
		printf("  packed into %s\n", cli_size(result->packed_bytes, a));
	for (uint32_t i = 0; i < result->disks; i++)
		printf("  disk %s: the VM writes to %s from now on; %s belongs to the snapshot\n", result->disk[i].drive,
		       result->disk[i].now, result->disk[i].before);
	printf("  in use when it was saved: %s, of that written %s\n", cli_size(result->active_pages * PAGE_BYTES, a),
	       cli_size(result->active_written_pages * PAGE_BYTES, b));
	if (result->load_us)
		printf("  before that, what it runs from was loaded in %.1f s\n", (double)result->load_us / 1e6);
	printf("  device state %s, disks %u; written in %.1f s, %ju times the guest waited for a page\n",
	       cli_size(result->state_bytes, a), result->disks, (double)result->write_us / 1e6,
	       (uintmax_t)result->source.faults);
}

static void add(struct json_object *json, const char *key, uint64_t number)
{
	json_object_object_add(json, key, json_object_new_uint64(number));
}

/* [{"step":, "us": since the guest stood}] */
static struct json_object *pause_to_json(const struct save_result *result)
{
	static const char *const names[SAVE_PAUSE_STEPS] = { "stopped", "disks", "devices", "ram",
							     "resumed" };
	struct json_object *steps = json_object_new_array();

	for (int i = 0; i < SAVE_PAUSE_STEPS; i++) {
		struct json_object *step = json_object_new_object();

		json_object_object_add(step, "step", json_object_new_string(names[i]));
		json_object_object_add(step, "us", json_object_new_uint64(result->pause_step_us[i]));
		json_object_array_add(steps, step);
	}
	return steps;
}

static void print_json(const struct save_options *save, const struct save_result *result)
{
	struct json_object *json = json_object_new_object(), *disks = json_object_new_array();

	json_object_object_add(json, "name", json_object_new_string(save->name));
	json_object_object_add(json, "dir", json_object_new_string(save->dir));
	add(json, "pause_us", result->pause_us);
	json_object_object_add(json, "pause_steps", pause_to_json(result));
	add(json, "point_us", result->point_us);
	add(json, "load_us", result->load_us);
	add(json, "write_us", result->write_us);
	add(json, "state_bytes", result->state_bytes);
	add(json, "ram_bytes_written", result->ram_bytes_written);
	add(json, "packed_bytes", result->packed_bytes);
	add(json, "pages", result->pages.pages);
	add(json, "pages_stored", result->pages.data);
	add(json, "pages_equal", result->pages.equal);
	add(json, "pages_on_volumes", result->pages.volume);
	add(json, "pages_in_snapshots", result->pages_in_ram);
	add(json, "pages_zero", result->pages.zero);
	add(json, "pages_of_one_word", result->pages.word);
	add(json, "active_pages", result->active_pages);
	add(json, "active_written_pages", result->active_written_pages);
	add(json, "private_pages", result->source.private_pages);
	add(json, "faults", result->source.faults);
	for (uint32_t i = 0; i < result->disks; i++) {
		struct json_object *disk = json_object_new_object();

		json_object_object_add(disk, "drive", json_object_new_string(result->disk[i].drive));
		json_object_object_add(disk, "now", json_object_new_string(result->disk[i].now));
		json_object_object_add(disk, "before", json_object_new_string(result->disk[i].before));
		json_object_array_add(disks, disk);
	}
	json_object_object_add(json, "disks", disks);
	printf("%s\n", json_object_to_json_string_ext(json, JSON_C_TO_STRING_PLAIN));
	json_object_put(json);
}
