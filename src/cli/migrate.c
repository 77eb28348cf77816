/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent migrate: moves a running VM to another host; the work is migrate/'s, here it is shown. */
#include "cli/cli.h"
#include "cli/mover.h"
#include "cli/progress.h"
#include "cli/vm_view.h"
#include "migrate/send.h"
#include "os/os.h"
#include "vmdir/moving.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define DOWNTIME_MS 50
#define DOWNTIME_MAX_MS 60000

enum { OPT_TLS, OPT_PLAIN, OPT_HOST, OPT_DOWNTIME, OPT_RATE, OPT_NO_POSTCOPY, OPT_RESUME, OPT_JSON };

static const struct cli_option options[] = {
	[OPT_TLS] = { "tls", CLI_VALUE, "DIR", "prove who is who by the keys in DIR, and encrypt" },
	[OPT_PLAIN] = { "plain", CLI_FLAG, NULL, "over TCP without keys: whoever hears it has all of the guest's memory" },
	[OPT_HOST] = { "host", CLI_VALUE, "NAME", "whom the certificate must name (default: the host of the address)" },
	[OPT_DOWNTIME] = { "max-downtime", CLI_VALUE, "MS", "how long the guest may stand for pages to be sent (default: 50)" },
	[OPT_RATE] = { "max-rate", CLI_VALUE, "MIB", "send at most so many MiB a second" },
	[OPT_NO_POSTCOPY] = { "no-postcopy", CLI_FLAG, NULL, "send all before the guest runs there" },
	[OPT_RESUME] = { "resume", CLI_FLAG, NULL, "go on with a machine that was given away by a command that was killed" },
	[OPT_JSON] = { "json", CLI_FLAG, NULL, "print the result as a JSON object" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

const struct cli_command mover_migrate = {
	.name = "migrate",
	.arguments = "[OPTIONS] NAME tcp:HOST:PORT|unix:PATH",
	.summary = "Move a running virtual machine to another host, where latent receive waits for it",
	.details = "What the other host can read from a disk image, or make of a pattern, is not sent. Ctrl-C before\n"
		   "the switch leaves the VM as it was.",
	.options = options,
	.run = migrate_run,
};

static struct send_progress progress;

static void show(void *ctx)
{
	static const char *const names[] = { "looking at it", "the other host prepares", "passes", "switch", "the rest", "done" };
	char sent[CLI_SIZE_TEXT], left[CLI_SIZE_TEXT], same[CLI_SIZE_TEXT], disks[CLI_SIZE_TEXT];

	(void)ctx;
	fprintf(stderr, "\r\033[K%s: pass %ju, sent %s, left %s ",
		progress.cut ? "the link is cut; trying again" : names[progress.phase], (uintmax_t)progress.pass,
		cli_size(progress.bytes_sent, sent), cli_size(os_bytes(progress.pages_left), left));
	if (progress.same || progress.disks)
		fprintf(stderr, "(the same there %s, on disks %s) ", cli_size(os_bytes(progress.same), same),
			cli_size(os_bytes(progress.disks), disks));
}

/* For `latent stat`. */
static void tell(void *fd)
{
	static const enum moving_phase phases[] = { MOVING_PREPARES, MOVING_PREPARES, MOVING_PASSES, MOVING_SWITCHES, MOVING_REST,
						    MOVING_REST };
	const struct moving moving = {
		.side = MOVING_AWAY, .phase = phases[progress.phase], .cut = progress.cut, .pass = (uint32_t)progress.pass,
		.bytes = progress.bytes_sent, .pages_all = progress.pages_all, .words = progress.words,
		.volumes = progress.volume, .same = progress.same, .disks = progress.disks, .contents = progress.data,
		.left = progress.pages_left, .wanted = progress.wanted,
	};

	moving_say(*(int *)fd, &moving);
}

static int parse(struct cli_parser *parser, struct send_options *send, bool *ret_plain, bool *ret_json)
{
	uint64_t number;
	int option;

	while ((option = cli_next_option(parser)) >= 0) {
		if (option == OPT_TLS)
			send->keys_dir = parser->value;
		else if (option == OPT_HOST)
			send->host = parser->value;
		*ret_plain = *ret_plain || option == OPT_PLAIN;
		*ret_json = *ret_json || option == OPT_JSON;
		send->again = send->again || option == OPT_RESUME;
		send->no_postcopy = send->no_postcopy || option == OPT_NO_POSTCOPY;
		if (option == OPT_DOWNTIME) {
			if (!cli_parse_unsigned(parser->value, DOWNTIME_MAX_MS, &number)) {
				cli_fail(CLI_USAGE, "migrate: --max-downtime takes milliseconds, up to %d, not '%.40s'",
					 DOWNTIME_MAX_MS, parser->value);
				return CLI_WRONG;
			}
			send->max_downtime_ms = (unsigned)number;
		} else if (option == OPT_RATE) {
			if (!cli_parse_unsigned(parser->value, 1 << 20, &number) || !number) {
				cli_fail(CLI_USAGE, "migrate: --max-rate takes a number of MiB a second, from 1, not '%.40s'",
					 parser->value);
				return CLI_WRONG;
			}
			send->max_bytes_s = number << 20;
		}
	}
	return option;
}

static void add(struct json_object *json, const char *key, uint64_t number)
{
	json_object_object_add(json, key, json_object_new_uint64(number));
}

static void add_times(struct json_object *json, const struct send_result *result)
{
	static const char *const phases[] = { "prepare_us", "connect_us", "passes_us", "switch_us", "rest_us" };

	for (int i = 0; i < SEND_DONE; i++)
		add(json, phases[i], result->phase_us[i]);
	add(json, "downtime_us", result->downtime_us);
	add(json, "downtime_save_us", result->saved_us);
	add(json, "downtime_point_us", result->point_us);
	add(json, "downtime_tell_us", result->told_us);
	add(json, "downtime_load_us", result->loaded_us);
	add(json, "downtime_start_us", result->started_us);
}

static void print_json(const struct send_options *send, const struct send_result *result)
{
	struct json_object *json = json_object_new_object();

	json_object_object_add(json, "name", json_object_new_string(send->name));
	add(json, "bytes_sent", result->bytes_sent);
	add(json, "total_us", result->total_us);
	add_times(json, result);
	add(json, "passes", result->passes);
	add(json, "state_bytes", result->state_bytes);
	add(json, "pages_words", result->told.words);
	add(json, "pages_on_volumes", result->told.volume);
	add(json, "pages_same", result->told.same - result->told.lacked);
	add(json, "pages_on_disks", result->told.hints - result->told.stale);
	add(json, "pages_stale_on_disks", result->told.stale);
	add(json, "pages_sent", result->told.data);
	add(json, "pages_sent_of_volumes", result->told.contents_instead);
	add(json, "pages_missing", result->pages_missing);
	add(json, "pages_wanted", result->pages_wanted);
	add(json, "pages_settled", result->settled_pages);
	printf("%s\n", json_object_to_json_string_ext(json, JSON_C_TO_STRING_PLAIN));
	json_object_put(json);
}

static void print_text(const struct send_options *send, const struct send_result *result)
{
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT], c[CLI_SIZE_TEXT], d[CLI_SIZE_TEXT], e[CLI_SIZE_TEXT], f[CLI_SIZE_TEXT];

	printf("%s runs there; it stood for %.1f ms\n", send->name, (double)result->downtime_us / 1000);
	printf("  sent %s in %.2f s and %ju passes\n", cli_size(result->bytes_sent, a), (double)result->total_us / 1e6,
	       (uintmax_t)result->passes);
	printf("  RAM told as words %s, as places on images %s, as the same content %s, as places on disks %s, "
	       "as contents %s; after the switch %s\n",
	       cli_size(os_bytes(result->told.words), a), cli_size(os_bytes(result->told.volume), b),
	       cli_size(os_bytes(result->told.same - result->told.lacked), e),
	       cli_size(os_bytes(result->told.hints - result->told.stale), f),
	       cli_size(os_bytes(result->told.data), c), cli_size(os_bytes(result->pages_missing), d));
}

static int end(const struct send_options *send, const struct send_result *result, enum send_end where, int r,
	       const char *why, bool json)
{
	if (!r) {
		(json ? print_json : print_text)(send, result);
		return CLI_OK;
	}
	if (where == SEND_UNKNOWN)
		return cli_fail(CLI_NO_ANSWER, "%s was given to the other host, which does not have all of it yet (%s). Here it stands: "
				"go on with `latent migrate --resume`; or make sure that it does not run there before you let it "
				"run here (`cont`)", send->name, why);
	return cli_fail(CLI_NO_ANSWER, "%s was not moved, and runs on here: %s", send->name, why);
}

static int move(struct vm_view *view, struct send_options *send, bool json)
{
	static char run_dir[VMDIR_PATH_BYTES], known[VMDIR_PATH_BYTES]; /* as long as the options are */
	char why[SNAPSHOT_WHY_BYTES] = "";
	struct send_result result;
	enum send_end where;
	int r, fd;

	snprintf(run_dir, sizeof run_dir, "%.180s/%.63s", view->root, view->name);
	snprintf(known, sizeof known, "%.200s/" MOVER_DIGESTS, view->root);
	send->run_dir = run_dir;
	send->known_dir = known;
	send->cwd = view->stats.cwd;
	progress_take_signals(&progress.stop);
	fd = moving_begin(run_dir);
	progress_begin(show, tell, &fd);
	r = migrate_send(send, &progress, &result, &where, why);
	progress_end();
	moving_end(run_dir, fd);
	return end(send, &result, where, r, why[0] ? why : strerror(-r), json);
}

int migrate_run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	struct send_options send = { .max_downtime_ms = DOWNTIME_MS };
	struct vm_view view;
	bool plain = false, json = false;
	int status = parse(&parser, &send, &plain, &json);

	if (status != CLI_END)
		return cli_end_status(status);
	if (parser.operands != 2)
		return cli_fail(CLI_USAGE, "migrate: give a VM's name and where it shall go (see latent migrate --help)");
	send.name = argv[1];
	send.address = argv[2];
	if (!send.keys_dir && !plain && strncmp(send.address, "unix:", 5))
		return cli_fail(CLI_USAGE, "migrate: over TCP, say where the keys are (--tls DIR), or that there are none (--plain)");
	status = progress_take_faults();
	if (!status)
		status = vm_view_find(argv[1], &view);
	if (status)
		return status;
	status = move(&view, &send, json);
	vm_view_close(&view);
	return status;
}
