/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent restore: one VM, which this process becomes, or several in the background. */
#include "cli/cli.h"
#include "cli/guest_clock.h"
#include "cli/lazy.h"
#include "cli/progress.h"
#include "cli/rest.h"
#include "cli/restore.h"
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CLONES_MAX 256
_Static_assert(CLONES_MAX <= REST_VMS, "one process loads the rest for all");

enum { OPT_NAME, OPT_DISKS, OPT_DISKS_FROM, OPT_CLONES, OPT_PAUSED, OPT_NO_REST, OPT_JSON };

static const struct cli_option options[] = {
	[OPT_NAME] = { "name", CLI_VALUE, "NAME", "name of the VM (default: the saved one's)" },
	[OPT_DISKS] = { "disks", CLI_VALUE, "DIR", "where the VM's new overlay disks go (default: the current directory)" },
	[OPT_DISKS_FROM] = { "disks-from", CLI_VALUE, "DIR", "where a copy of the snapshot's disks/ is" },
	[OPT_CLONES] = { "clones", CLI_VALUE, "K", "start K of them, NAME-1 to NAME-K, in the background" },
	[OPT_PAUSED] = { "paused", CLI_FLAG, NULL, "do not let the guest run until `cont`" },
	[OPT_NO_REST] = { "no-rest", CLI_FLAG, NULL, "load nothing but what is touched, when the guest runs" },
	[OPT_JSON] = { "json", CLI_FLAG, NULL, "print the time of each step as JSON" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_restore = {
	.name = "restore",
	.arguments = "[OPTIONS] DIR|URL [-- qemu-system-x86_64 ...]",
	.summary = "Start a virtual machine where a snapshot left it",
	.details = "QEMU's command line is that which the snapshot describes, or the one given. A drive of it that\n"
		   "is a saved disk gets a new overlay, in place of its file; the snapshot itself is never written.",
	.options = options,
	.run = run,
};

struct command {
	struct restore_request request;
	struct manifest manifest;
	char disks_path[PATH_MAX];
	uint64_t clones;
	bool json;
	const char *disks_dir;
};

static int parse(struct cli_parser *parser, struct command *c);
static int parse_operands(struct cli_parser *parser, struct command *c);
static int restore_one(struct command *c);
static int restore_clones(struct command *c);

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv, .stop_at_operand = true };
	static struct command c; /* a manifest is large */
	int status;

	c.request = (struct restore_request){ .report_fd = -1, .begun_us = os_now_us(), .rest = true };
	status = parse(&parser, &c);
	if (status != CLI_END)
		return cli_end_status(status);
	status = parse_operands(&parser, &c);
	if (!status)
		status = progress_take_faults();
	if (!status)
		status = restore_prepare(&c.request, &c.manifest);
	if (!status)
		status = c.clones ? restore_clones(&c) : restore_one(&c);
	machine_free(c.manifest.machine);
	return status;
}

static int wrong(const char *format, const char *value)
{
	cli_fail(CLI_USAGE, format, value);
	return CLI_WRONG;
}

static int parse(struct cli_parser *parser, struct command *c)
{
	int option;

	while ((option = cli_next_option(parser)) >= 0) {
		switch (option) {
		case OPT_NAME:
			if (!vmdir_name_ok(parser->value))
				return wrong("restore: '%.80s' is no name for a VM", parser->value);
			c->request.name = parser->value;
			break;
		case OPT_DISKS:
			c->disks_dir = parser->value;
			break;
		case OPT_DISKS_FROM:
			c->request.disks_from = parser->value;
			break;
		case OPT_CLONES:
			if (!cli_parse_unsigned(parser->value, CLONES_MAX, &c->clones) || !c->clones)
				return wrong("restore: --clones takes a number from 1 to 256, not '%.80s'", parser->value);
			break;
		case OPT_JSON:
			c->json = true;
			break;
		case OPT_NO_REST:
			c->request.rest = false;
			break;
		default:
			c->request.then = RESTORE_THEN_STAND;
		}
	}
	return option;
}

static int parse_operands(struct cli_parser *parser, struct command *c)
{
	char **argv = parser->argv;
	int argc = parser->argc, next = parser->next;

	/* An option's -- has been taken: then no directory was given before it. */
	if (next < argc && strcmp(argv[next], "--") && strcmp(argv[next - 1], "--"))
		c->request.dir = argv[next++];
	if (c->request.dir && next < argc && argv[next][0] == '-' && strcmp(argv[next], "--"))
		return cli_fail(CLI_USAGE, "restore: options go before the directory (see latent restore --help)");
	if (!c->request.dir || (next < argc && strcmp(argv[next], "--")) || next + 1 == argc)
		return cli_fail(CLI_USAGE, "restore: give a snapshot's directory or URL, and, if QEMU's command line is to be another "
					   "one, that behind -- (see latent restore --help)");
	if (next < argc) {
		c->request.argc = argc - next - 1;
		c->request.argv = argv + next + 1;
	}
	if (!realpath(c->disks_dir ? c->disks_dir : ".", c->disks_path))
		return cli_fail(CLI_USAGE, "restore: %s, where the new disks would go, cannot be used (%s): make it, or give "
					   "another with --disks", c->disks_dir ? c->disks_dir : ".", strerror(errno));
	c->request.disks_dir = c->disks_path;
	return CLI_OK;
}

static void print_json(struct json_object *json)
{
	puts(json_object_to_json_string_ext(json, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(json);
}

/* The clock of the guest, if its agent can be asked. */
static void set_clock(const char *socket, const char *root, const char *name, unsigned number)
{
	char run_dir[VMDIR_PATH_BYTES], *path;

	if (!socket || vmdir_path(root, name, "", run_dir))
		return;
	run_dir[strlen(run_dir) - 1] = '\0';
	path = run_expand(socket, name, run_dir, number);
	if (path)
		guest_clock_set_aside(path);
	free(path);
}

/* ---- one ------------------------------------------------------------------------------------------ */

/* A pager loads it otherwise. */
static bool rest_is_here(const struct command *c)
{
	return c->request.rest && !lazy_is_url(c->request.dir) && !c->manifest.packed_bytes;
}

/* Beside the VM that this process becomes: prints its times, sets the guest's clock, and loads the rest.
 * If it is killed before that, its new disks are nobody's. */
static void watch(const struct command *c, const char *socket, int report_fd)
{
	struct restored vm = { .report_fd = report_fd, .log_fd = -1 };
	char root[VMDIR_PATH_BYTES], why[VMDIR_WHY_BYTES];
	struct pollfd p = { .fd = report_fd, .events = POLLIN };
	int kind;

	while (poll(&p, 1, -1) < 0 && errno == EINTR) /* a store may be slow, but a QEMU that is gone is told */
		;
	kind = restored_read(&vm);
	if (kind == -EPIPE)
		restore_remove_overlays(&c->manifest, c->disks_path,
					c->request.name ? c->request.name : c->manifest.name, c->request.attempt);
	if (kind != REPORT_READY)
		return;
	if (vm.report.rest)
		vm.report.step_us[RESTORE_REST] = os_now_us();
	if (c->json) {
		print_json(restored_to_json(&vm.report));
		fflush(stdout);
	}
	if (c->request.then == RESTORE_THEN_RUN && !vmdir_root(false, root, why))
		set_clock(socket, root, vm.report.name, 0);
	if (vm.report.rest)
		rest_become(c->request.dir, &report_fd, 1, vm.report.step_us[RESTORE_REST]);
}

/* A grandchild, so that QEMU has no child that it does not know. */
static int start_watcher(struct command *c, const char *socket)
{
	int pair[2];
	pid_t child;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair))
		return cli_fail(CLI_SYSTEM, "no socket: %s", strerror(errno));
	child = fork();
	if (!child) {
		close(pair[1]);
		if (!fork())
			watch(c, socket, pair[0]);
		_exit(0);
	}
	close(pair[0]);
	if (child < 0)
		return cli_fail(CLI_SYSTEM, "no process: %s", strerror(errno));
	(void)waitpid(child, NULL, 0);
	c->request.report_fd = pair[1];
	return CLI_OK;
}

static int restore_one(struct command *c)
{
	char *socket = guest_clock_socket(c->request.argc, c->request.argv);
	bool watched = c->json || socket || rest_is_here(c) || c->manifest.disks;
	int status = watched ? start_watcher(c, socket) : CLI_OK;

	free(socket);
	return status ? status : restore_become(&c->request);
}

/* ---- several ------------------------------------------------------------------------------------- */

struct clones {
	struct command *command;
	char root[VMDIR_PATH_BYTES];
	struct restored vm[CLONES_MAX];
	char name[CLONES_MAX][VMDIR_NAME_BYTES];
	unsigned count, ready;
};

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal)
{
	(void)signal;
	interrupted = 1;
}

static int start_clones(struct clones *all)
{
	struct command *c = all->command;
	const char *name = c->request.name ? c->request.name : c->manifest.name;
	int status = CLI_OK;

	for (unsigned i = 0; !status && i < c->clones; i++) {
		struct restore_request request = c->request;

		if (snprintf(all->name[i], sizeof all->name[i], "%s-%u", name, i + 1) >= (int)sizeof all->name[i] ||
		    !vmdir_name_ok(all->name[i]))
			return cli_fail(CLI_USAGE, "restore: '%.60s-%u' is no name for a VM: give one with --name", name, i + 1);
		request.name = all->name[i];
		request.number = i + 1;
		status = restored_start(&request, all->root, &all->vm[i]);
		all->count += !status;
	}
	return status;
}

/* Whoever has ended before it reported has failed. */
static int take_reports(struct clones *all, const struct pollfd *p)
{
	for (unsigned i = 0; i < all->count; i++) {
		char words[512];
		int kind;

		if (p[i].fd < 0 || !p[i].revents)
			continue;
		kind = restored_read(&all->vm[i]);
		if (kind == REPORT_READY)
			all->ready++;
		else if (kind != -EAGAIN) {
			restored_last_words(&all->vm[i], words, sizeof words);
			return cli_fail(CLI_NO_ANSWER, "%s did not start: %s", all->vm[i].name, words);
		}
	}
	return CLI_OK;
}

static int wait_clones(struct clones *all)
{
	int status = CLI_OK;

	while (!status && all->ready < all->count) {
		struct pollfd p[CLONES_MAX];

		for (unsigned i = 0; i < all->count; i++)
			p[i] = (struct pollfd){ .fd = all->vm[i].ready ? -1 : all->vm[i].report_fd, .events = POLLIN };
		if (interrupted)
			return cli_fail(CLI_NO_ANSWER, "interrupted: the clones are ended");
		if (poll(p, all->count, 1000) > 0)
			status = take_reports(all, p);
	}
	return status;
}

static void show_clones(const struct clones *all)
{
	const struct command *c = all->command;
	struct json_object *array = c->json ? json_object_new_array() : NULL;

	for (unsigned i = 0; i < all->count; i++) {
		const struct agent_report *report = &all->vm[i].report;
		bool runs = report->step_us[RESTORE_RESUMED];
		uint64_t done_us = report->step_us[runs ? RESTORE_RESUMED : RESTORE_STATE];

		if (array)
			json_object_array_add(array, restored_to_json(report));
		else
			printf("%s %s: pid %u, %.1f ms\n", report->name, runs ? "runs" : "stands", report->pid,
			       (double)(done_us - report->step_us[RESTORE_BEGUN]) / 1000);
	}
	if (array)
		print_json(array);
}

/* One for all of them. */
static void load_rest(struct clones *all)
{
	uint64_t now_us = os_now_us();
	int sockets[CLONES_MAX];
	unsigned count = 0;

	for (unsigned i = 0; i < all->count; i++) {
		if (!all->vm[i].report.rest)
			continue;
		all->vm[i].report.step_us[RESTORE_REST] = now_us;
		sockets[count++] = all->vm[i].report_fd;
	}
	rest_start(all->command->request.dir, sockets, count, now_us);
}

static void let_go(struct clones *all, const char *socket)
{
	for (unsigned i = 0; i < all->count; i++) {
		restored_keep_log(&all->vm[i], all->root);
		if (all->vm[i].report.step_us[RESTORE_RESUMED])
			set_clock(socket, all->root, all->vm[i].name, i + 1);
		restored_forget(&all->vm[i]);
	}
}

static int restore_clones(struct command *c)
{
	static struct clones all;
	struct sigaction action = { .sa_handler = on_interrupt };
	char why[VMDIR_WHY_BYTES], *socket;
	int status;

	all.command = c;
	if (vmdir_root(true, all.root, why))
		return cli_fail(CLI_RUN_DIR, "%s", why);
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	status = start_clones(&all);
	if (!status)
		status = wait_clones(&all);
	for (unsigned i = 0; status && i < all.count; i++)
		restored_end(&all.vm[i], &c->manifest, c->disks_path);
	if (status)
		return status;
	load_rest(&all);
	show_clones(&all);
	socket = guest_clock_socket(c->request.argc, c->request.argv);
	let_go(&all, socket);
	free(socket);
	return CLI_OK;
}
