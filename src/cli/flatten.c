/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent flatten: makes a snapshot of one that needs others; the work is snapshot/'s, here it is shown. */
#include "cli/cli.h"
#include "cli/progress.h"
#include "snapshot/flatten.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>

#define PAGE_BYTES 4096

enum { OPT_JSON };

static const struct cli_option options[] = {
	[OPT_JSON] = { "json", CLI_FLAG, NULL, "print the result as a JSON object" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_flatten = {
	.name = "flatten",
	.arguments = "[OPTIONS] DIR NEW",
	.summary = "Make a snapshot that needs no other one of one that does",
	.details = "DIR stays as it is. Ctrl-C ends the writing and leaves nothing of NEW.",
	.options = options,
	.run = run,
};

static struct source_progress progress;

static void print_text(const char *dir, const struct flatten_result *result)
{
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT], c[CLI_SIZE_TEXT];

	printf("%s needs no other snapshot: stored %s, of which %s came from others; on disk images %s\n", dir,
	       cli_size(result->pages.data * PAGE_BYTES, a), cli_size(result->pages_copied_in * PAGE_BYTES, b),
	       cli_size(result->pages.volume * PAGE_BYTES, c));
}

static void print_json(const char *dir, const struct flatten_result *result)
{
	struct json_object *json = json_object_new_object();

	json_object_object_add(json, "dir", json_object_new_string(dir));
	json_object_object_add(json, "ram_bytes_written", json_object_new_uint64(result->bytes_written));
	json_object_object_add(json, "pages_stored", json_object_new_uint64(result->pages.data));
	json_object_object_add(json, "pages_equal", json_object_new_uint64(result->pages.equal));
	json_object_object_add(json, "pages_on_volumes", json_object_new_uint64(result->pages.volume));
	json_object_object_add(json, "pages_from_snapshots", json_object_new_uint64(result->pages_copied_in));
	printf("%s\n", json_object_to_json_string_ext(json, JSON_C_TO_STRING_PLAIN));
	json_object_put(json);
}

static int status_of(int error)
{
	switch (error) {
	case -EEXIST:
		return CLI_USAGE;
	case -EBADMSG:
	case -ESTALE:
	case -ENOENT:
		return CLI_NO_IMAGE;
	default:
		return CLI_SYSTEM;
	}
}

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	char why[SNAPSHOT_WHY_BYTES] = "";
	struct flatten_result result;
	bool json = false;
	int option, r;

	while ((option = cli_next_option(&parser)) >= 0)
		json = true;
	if (option != CLI_END)
		return cli_end_status(option);
	if (parser.operands != 2)
		return cli_fail(CLI_USAGE, "flatten: give the directory of a snapshot, and one that is not there yet (see latent "
					   "flatten --help)");
	r = progress_take_faults();
	if (r)
		return r;
	progress_begin_writing(&progress);
	r = snapshot_flatten(argv[1], argv[2], &progress, &result, why);
	progress_end();
	if (r)
		return cli_fail(status_of(r), "%s was not made of %s: %s", argv[2], argv[1], why);
	(json ? print_json : print_text)(argv[2], &result);
	return CLI_OK;
}
