/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent ps: the running VMs. Cleans up after dead ones. */
#include "cli/cli.h"
#include "cli/vm_view.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { OPT_JSON };

static const struct cli_option options[] = {
	[OPT_JSON] = { "json", CLI_FLAG, NULL, "print a JSON array" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_ps = {
	.name = "ps",
	.arguments = "[--json]",
	.summary = "List running virtual machines",
	.options = options,
	.run = run,
};

#define PAGE_BYTES 4096

/* What a line shows, gathered from a VM's statistics. */
struct row {
	const char *name, *state, *excluded_by;
	uint32_t pid;
	uint64_t ram_bytes, mapped_bytes, copied_bytes, asked_bytes, shortcut_bytes;
	uint64_t maps, maps_budget, started_unix_s;
};

static void gather(const struct vm_view *view, struct row *row);
static int print_line(void *ctx, const char *name);
static int add_object(void *ctx, const char *name);

struct list {
	const char *root;
	struct json_object *array; /* NULL: a table */
};

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	char root[VMDIR_PATH_BYTES], why[VMDIR_WHY_BYTES];
	struct list list = { .root = root };
	bool json = false;
	int option, r;

	while ((option = cli_next_option(&parser)) >= 0)
		json = true;
	if (option != CLI_END)
		return cli_end_status(option);
	if (parser.operands)
		return cli_fail(CLI_USAGE, "ps: '%.80s' is too much (see latent ps --help)", argv[1]);

	r = vmdir_root(false, root, why);
	if (r && r != -ENOENT)
		return cli_fail(CLI_RUN_DIR, "%s", why);
	if (json)
		list.array = json_object_new_array();
	else
		printf("%-20s %7s %-8s %9s %9s %9s %8s %13s %8s\n", "NAME", "PID", "STATE", "RAM",
		       "MAPPED", "COPIED", "SHORTCUT", "MAPPINGS", "UP");
	if (!r)
		r = vmdir_for_each(root, json ? add_object : print_line, &list);
	if (json) {
		puts(json_object_to_json_string_ext(list.array, JSON_C_TO_STRING_PRETTY |
									JSON_C_TO_STRING_NOSLASHESCAPE));
		json_object_put(list.array);
	}
	if (r && r != -ENOENT)
		return cli_fail(CLI_RUN_DIR, "the run directory %s cannot be read: %s", root,
				strerror(-r));
	return CLI_OK;
}

static void gather(const struct vm_view *view, struct row *row)
{
	const struct vm_stats *stats = &view->stats;

	*row = (struct row){
		.name = view->name,
		.state = !stats->pid               ? "starting"
			 : stats->is_spare         ? "spare"
			 : stats->overlays_allowed ? "sharing"
						   : "plain",
		.excluded_by = stats->excluded_by,
		.pid = stats->pid,
		.ram_bytes = stats->ram_bytes,
		.mapped_bytes = vm_view_clean_pages(stats) * PAGE_BYTES,
		.copied_bytes = stat_get(&stats->pages_private_now) * PAGE_BYTES,
		.maps = stat_get(&stats->maps_ram_now) + stat_get(&stats->maps_other_now),
		.maps_budget = stat_get(&stats->maps_budget_now),
		.started_unix_s = stats->started_unix_s,
	};
	for (uint32_t i = 0; i < stats->volume_count; i++) {
		row->asked_bytes += stat_get(&stats->volumes[i].bytes_asked);
		row->shortcut_bytes += stat_get(&stats->volumes[i].bytes_shortcut);
	}
}

static int print_line(void *ctx, const char *name)
{
	const struct list *list = ctx;
	char ram[CLI_SIZE_TEXT], mapped[CLI_SIZE_TEXT], copied[CLI_SIZE_TEXT], up[CLI_SIZE_TEXT];
	char pid[16] = "-", percent[16] = "-", maps[32];
	struct vm_view view;
	struct row row;

	if (vm_view_open(list->root, name, &view)) {
		printf("%-20s %7s %-8s\n", name, "-", "unknown");
		return 0;
	}
	gather(&view, &row);
	if (row.pid)
		snprintf(pid, sizeof pid, "%u", row.pid);
	if (row.asked_bytes)
		snprintf(percent, sizeof percent, "%.1f %%",
			 100 * (double)row.shortcut_bytes / (double)row.asked_bytes);
	snprintf(maps, sizeof maps, "%ju/%ju", (uintmax_t)row.maps, (uintmax_t)row.maps_budget);
	printf("%-20s %7s %-8s %9s %9s %9s %8s %13s %8s\n", row.name, pid, row.state,
	       cli_size(row.ram_bytes, ram), cli_size(row.mapped_bytes, mapped),
	       cli_size(row.copied_bytes, copied), percent, maps, cli_age(row.started_unix_s, up));
	vm_view_close(&view);
	return 0;
}

static int add_object(void *ctx, const char *name)
{
	struct list *list = ctx;
	struct json_object *json;
	struct vm_view view;
	struct row row;

	json = json_object_new_object();
	if (vm_view_open(list->root, name, &view)) {
		json_object_object_add(json, "name", json_object_new_string(name));
		json_object_object_add(json, "state", json_object_new_string("unknown"));
		json_object_array_add(list->array, json);
		return 0;
	}
	gather(&view, &row);
	json_object_object_add(json, "name", json_object_new_string(row.name));
	json_object_object_add(json, "pid", json_object_new_int64(row.pid));
	json_object_object_add(json, "state", json_object_new_string(row.state));
	json_object_object_add(json, "excluded_by", json_object_new_string(row.excluded_by));
	json_object_object_add(json, "ram_bytes", json_object_new_uint64(row.ram_bytes));
	json_object_object_add(json, "mapped_bytes", json_object_new_uint64(row.mapped_bytes));
	json_object_object_add(json, "copied_bytes", json_object_new_uint64(row.copied_bytes));
	json_object_object_add(json, "bytes_asked", json_object_new_uint64(row.asked_bytes));
	json_object_object_add(json, "bytes_shortcut", json_object_new_uint64(row.shortcut_bytes));
	json_object_object_add(json, "maps", json_object_new_uint64(row.maps));
	json_object_object_add(json, "maps_budget", json_object_new_uint64(row.maps_budget));
	json_object_object_add(json, "started_unix_s", json_object_new_uint64(row.started_unix_s));
	json_object_array_add(list->array, json);
	vm_view_close(&view);
	return 0;
}
