/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * latent spare: VMs that are restored but for the last step. `latent spare DIR` keeps some, in the foreground;
 * `latent spare take NAME` takes one. Between the two is nothing but the spare itself: it is found in the run
 * directory, its agent gives it its name and lets it run, and tells the keeper. A spare that is not taken ends
 * with its keeper, however that ends.
 */
#include "cli/cli.h"
#include "cli/guest_clock.h"
#include "cli/progress.h"
#include "cli/rest.h"
#include "cli/restore.h"
#include "cli/vm_view.h"
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

#define SPARES_MAX 64
#define FAILURES_MAX 3 /* in a row */
#define TAKE_MS 10000
#define END_MS 5000
#define MIDDLE "-spare-"

enum { OPT_NAME, OPT_N, OPT_DISKS, OPT_DISKS_FROM, OPT_JSON };

static const struct cli_option options[] = {
	[OPT_NAME] = { "name", CLI_VALUE, "NAME", "what the spares are for (default: the saved VM's name); take: the VM's new name" },
	[OPT_N] = { "n", CLI_VALUE, "K", "keep so many (default: 1)" },
	[OPT_DISKS] = { "disks", CLI_VALUE, "DIR", "where the VMs' new overlay disks go (default: the current directory)" },
	[OPT_DISKS_FROM] = { "disks-from", CLI_VALUE, "DIR", "where a copy of the snapshot's disks/ is" },
	[OPT_JSON] = { "json", CLI_FLAG, NULL, "take: print the time of each step as JSON" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_spare = {
	.name = "spare",
	.arguments = "[OPTIONS] DIR|URL [-- qemu-system-x86_64 ...]\n       latent spare take [OPTIONS] NAME",
	.summary = "Keep restored virtual machines waiting, and take one",
	.details = "Without `take` it keeps K machines of a snapshot restored, which need only be let go, and starts\n"
		   "another one for each that is taken, until Ctrl-C.",
	.options = options,
	.run = run,
};

struct spares {
	struct restore_request request;
	struct manifest manifest;
	char root[VMDIR_PATH_BYTES], disks_path[PATH_MAX];
	const char *name, *disks_dir;
	uint64_t wanted;
	bool json;
	struct restored vm[SPARES_MAX];
	char vm_name[SPARES_MAX][VMDIR_NAME_BYTES];
	bool used[SPARES_MAX];
	unsigned last_number, failures;
	pid_t *taken; /* still children of this process */
	size_t taken_count;
};

static int keep(struct spares *s, struct cli_parser *parser);
static int take(struct spares *s, const char *name);

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal)
{
	(void)signal;
	interrupted = 1;
}

static int wrong(const char *format, const char *value)
{
	cli_fail(CLI_USAGE, format, value);
	return CLI_WRONG;
}

static int parse(struct cli_parser *parser, struct spares *s)
{
	int option;

	while ((option = cli_next_option(parser)) >= 0) {
		switch (option) {
		case OPT_NAME:
			if (!vmdir_name_ok(parser->value))
				return wrong("spare: '%.80s' is no name for a VM", parser->value);
			s->name = parser->value;
			break;
		case OPT_N:
			if (!cli_parse_unsigned(parser->value, SPARES_MAX, &s->wanted) || !s->wanted)
				return wrong("spare: -n takes a number from 1 to 64, not '%.80s'", parser->value);
			break;
		case OPT_DISKS:
			s->disks_dir = parser->value;
			break;
		case OPT_DISKS_FROM:
			s->request.disks_from = parser->value;
			break;
		default:
			s->json = true;
		}
	}
	return option;
}

static int run(const struct cli_command *command, int argc, char **argv)
{
	bool taking = argc > 1 && !strcmp(argv[1], "take");
	struct cli_parser parser = { .command = command, .argc = argc - taking, .argv = argv + taking, .stop_at_operand = true };
	static struct spares s; /* a manifest is large */
	char why[VMDIR_WHY_BYTES];
	int status;

	status = parse(&parser, &s);
	if (status != CLI_END)
		return cli_end_status(status);
	if (vmdir_root(true, s.root, why))
		return cli_fail(CLI_RUN_DIR, "%s", why);
	if (!taking)
		return keep(&s, &parser);
	if (s.wanted || s.disks_dir || s.request.disks_from)
		return cli_fail(CLI_USAGE, "spare take: -n, --disks and --disks-from are for who keeps spares");
	if (parser.next + 1 != parser.argc)
		return cli_fail(CLI_USAGE, "spare take: give the name that the spares are kept for (see latent spare --help)");
	return take(&s, parser.argv[parser.next]);
}

/* ---- keeping ------------------------------------------------------------------------------------- */

/* DIR [OPTIONS] [-- LINE]: options may come behind the directory, too. */
static int parse_keep(struct spares *s, struct cli_parser *parser)
{
	int status;

	if (parser->next >= parser->argc || !strcmp(parser->argv[parser->next - (parser->next > 1)], "--"))
		return cli_fail(CLI_USAGE, "spare: give a snapshot's directory (see latent spare --help)");
	s->request.dir = parser->argv[parser->next];
	status = parse(parser, s);
	if (status != CLI_END)
		return cli_end_status(status);
	if (parser->next < parser->argc && strcmp(parser->argv[parser->next - 1], "--"))
		return cli_fail(CLI_USAGE, "spare: '%.80s' is too much (see latent spare --help)", parser->argv[parser->next]);
	s->request.argc = parser->argc - parser->next;
	s->request.argv = parser->argv + parser->next;
	if (!realpath(s->disks_dir ? s->disks_dir : ".", s->disks_path))
		return cli_fail(CLI_USAGE, "spare: %s, where the new disks would go, cannot be used (%s): make it, or give "
					   "another with --disks", s->disks_dir ? s->disks_dir : ".", strerror(errno));
	s->request.disks_dir = s->disks_path;
	return CLI_OK;
}

/* Neither it nor what it will be called is anybody's. */
static int name_spare(struct spares *s, char name[VMDIR_NAME_BYTES])
{
	const char *base = s->name ? s->name : s->manifest.name;
	char taken[VMDIR_NAME_BYTES];

	do {
		s->last_number++;
		if (snprintf(name, VMDIR_NAME_BYTES, "%s" MIDDLE "%u", base, s->last_number) >= VMDIR_NAME_BYTES ||
		    !vmdir_name_ok(name))
			return cli_fail(CLI_USAGE, "spare: '%.60s' is no name for spares: give a short one with --name", base);
		snprintf(taken, sizeof taken, "%.40s-%u", base, s->last_number);
	} while (vmdir_is_live(s->root, name) || vmdir_is_live(s->root, taken));
	return CLI_OK;
}

static int start(struct spares *s, size_t place)
{
	struct restore_request request = s->request;
	int status = name_spare(s, s->vm_name[place]);

	request.name = s->vm_name[place];
	request.number = s->last_number;
	request.then = RESTORE_THEN_WAIT;
	request.rest = true;
	request.begun_us = os_now_us();
	if (!status)
		status = restored_start(&request, s->root, &s->vm[place]);
	s->used[place] = !status;
	return status;
}

static int fill(struct spares *s)
{
	int status = CLI_OK;

	for (size_t i = 0; !status && i < s->wanted; i++)
		if (!s->used[i])
			status = start(s, i);
	return status;
}

/* Too often in a row: whatever it is, it will not be better the next time. */
static int on_end(struct spares *s, size_t place)
{
	struct restored *vm = &s->vm[place];
	char words[512];

	restored_last_words(vm, words, sizeof words);
	cli_say("the spare %s has ended: %s", vm->name, words);
	s->failures = vm->ready ? 0 : s->failures + 1;
	restored_end(vm, &s->manifest, s->disks_path);
	s->used[place] = false;
	return s->failures == FAILURES_MAX ? CLI_NO_ANSWER : CLI_OK;
}

/* Whoever cannot be remembered stays a zombie when he ends: no harm. */
static void remember_taken(struct spares *s, pid_t pid)
{
	pid_t *more = realloc(s->taken, (s->taken_count + 1) * sizeof *more);

	if (!more)
		return;
	s->taken = more;
	s->taken[s->taken_count++] = pid;
}

static void reap_taken(struct spares *s)
{
	for (size_t i = s->taken_count; i--;)
		if (waitpid(s->taken[i], NULL, WNOHANG))
			s->taken[i] = s->taken[--s->taken_count];
}

static int on_report(struct spares *s, size_t place)
{
	struct restored *vm = &s->vm[place];
	int kind = restored_read(vm);

	if (kind == -EAGAIN)
		return CLI_OK;
	if (kind == -EPIPE)
		return on_end(s, place);
	if (kind == REPORT_READY) {
		s->failures = 0;
		restored_keep_log(vm, s->root);
		printf("%s waits: pid %u, %.1f ms\n", vm->name, vm->report.pid,
		       (double)(vm->report.step_us[RESTORE_STATE] - vm->report.step_us[RESTORE_BEGUN]) / 1000);
	} else {
		printf("%s was taken and is called %s\n", vm->name, vm->report.name);
		remember_taken(s, vm->child);
		if (vm->report.rest)
			rest_start(s->request.dir, &vm->report_fd, 1, os_now_us());
		restored_forget(vm);
		s->used[place] = false;
	}
	return fflush(stdout) ? CLI_SYSTEM : CLI_OK;
}

static int serve(struct spares *s)
{
	struct pollfd p[SPARES_MAX];
	int status = fill(s);

	while (!status && !interrupted) {
		for (size_t i = 0; i < s->wanted; i++)
			p[i] = (struct pollfd){ .fd = s->used[i] ? s->vm[i].report_fd : -1, .events = POLLIN };
		(void)poll(p, s->wanted, 1000);
		for (size_t i = 0; !status && i < s->wanted; i++)
			if (s->used[i] && p[i].revents)
				status = on_report(s, i);
		reap_taken(s);
		if (!status && !interrupted)
			status = fill(s);
	}
	return status;
}

/* False: it was taken in the last moment. */
static bool wait_end(struct restored *vm)
{
	struct pollfd p = { .fd = vm->report_fd, .events = POLLIN };
	int kind = -EAGAIN;

	while (kind != -EPIPE && kind != REPORT_TAKEN && poll(&p, 1, END_MS) > 0)
		kind = restored_read(vm);
	return kind != REPORT_TAKEN;
}

/* No signal: who takes one at this moment shall have it. Its agent decides, and sees that the keeper is gone. */
static void end_all(struct spares *s)
{
	for (size_t i = 0; i < s->wanted; i++)
		if (s->used[i])
			(void)shutdown(s->vm[i].report_fd, SHUT_WR);
	for (size_t i = 0; i < s->wanted; i++) {
		if (!s->used[i])
			continue;
		if (wait_end(&s->vm[i]))
			restored_end(&s->vm[i], &s->manifest, s->disks_path);
		else
			restored_forget(&s->vm[i]);
	}
	free(s->taken);
}

static int keep(struct spares *s, struct cli_parser *parser)
{
	struct sigaction action = { .sa_handler = on_interrupt };
	int status = parse_keep(s, parser);

	s->wanted = s->wanted ? s->wanted : 1;
	if (!status && s->json)
		status = cli_fail(CLI_USAGE, "spare: --json is for `latent spare take`");
	if (!status)
		status = progress_take_faults();
	if (!status)
		status = restore_prepare(&s->request, &s->manifest);
	if (status)
		return status;
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	status = serve(s);
	end_all(s);
	machine_free(s->manifest.machine);
	return status;
}

/* ---- taking -------------------------------------------------------------------------------------- */

struct taking {
	struct spares *s;
	const char *of;
	char old_name[VMDIR_NAME_BYTES], new_name[VMDIR_NAME_BYTES];
	uint64_t begun_us;
	int status;
};

/* "web-spare-3" is one of web's, and will be web-3. */
static bool is_of(const char *name, const char *of)
{
	size_t bytes = strlen(of);

	return !strncmp(name, of, bytes) && !strncmp(name + bytes, MIDDLE, strlen(MIDDLE));
}

/* `latent save` and people read it. */
static void rename_in_json(const char *root, const char *name)
{
	char path[VMDIR_PATH_BYTES], partial[VMDIR_PATH_BYTES + 8];
	struct json_object *json;

	if (vmdir_path(root, name, VMDIR_JSON, path))
		return;
	json = json_object_from_file(path);
	snprintf(partial, sizeof partial, "%s.new", path);
	if (json_object_is_type(json, json_type_object)) {
		json_object_object_add(json, "name", json_object_new_string(name));
		if (!json_object_to_file_ext(partial, json, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE))
			(void)rename(partial, path);
	}
	json_object_put(json);
}

/* A socket in the run directory has moved with it. */
static void set_clock_at(const struct taking *t, const char *socket)
{
	char old[VMDIR_PATH_BYTES], new[VMDIR_PATH_BYTES];

	if (vmdir_path(t->s->root, t->old_name, "", old))
		return;
	if (strncmp(socket, old, strlen(old)))
		guest_clock_set_aside(socket);
	else if (!vmdir_path(t->s->root, t->new_name, socket + strlen(old), new))
		guest_clock_set_aside(new);
}

/* The words of its line that it was started with, for its guest agent. */
static void set_clock(const struct taking *t)
{
	struct json_object *json = NULL, *words = NULL;
	char path[VMDIR_PATH_BYTES], *argv[1024], *socket;
	size_t count;

	if (!vmdir_path(t->s->root, t->new_name, VMDIR_JSON, path))
		json = json_object_from_file(path);
	json_object_object_get_ex(json, "command", &words);
	count = json_object_is_type(words, json_type_array) ? json_object_array_length(words) : 0;
	if (count > sizeof argv / sizeof argv[0])
		count = 0;
	for (size_t i = 0; i < count; i++)
		argv[i] = (char *)json_object_get_string(json_object_array_get_idx(words, i));
	socket = guest_clock_socket((int)count, argv);
	if (socket)
		set_clock_at(t, socket);
	free(socket);
	json_object_put(json);
}

/* Until the guest ran; its statistics say when. */
static uint64_t took_us(const struct taking *t)
{
	uint64_t now_us = os_now_us(), resumed_us = 0;
	struct vm_view view;

	if (!vm_view_open(t->s->root, t->new_name, &view)) {
		resumed_us = stat_get(&view.stats.restore_us[RESTORE_RESUMED]);
		vm_view_close(&view);
	}
	return (resumed_us > t->begun_us && resumed_us < now_us ? resumed_us : now_us) - t->begun_us;
}

static void show(const struct taking *t)
{
	uint64_t us = took_us(t);
	struct json_object *json;

	if (!t->s->json) {
		printf("%s runs: %.1f ms\n", t->new_name, (double)us / 1000);
		return;
	}
	json = json_object_new_object();
	json_object_object_add(json, "name", json_object_new_string(t->new_name));
	json_object_object_add(json, "took_us", json_object_new_uint64(us));
	puts(json_object_to_json_string_ext(json, JSON_C_TO_STRING_PLAIN));
	json_object_put(json);
}

/* 1: it is taken, or nothing can be; 0: look at the next one. */
static int try_one(void *ctx, const char *name)
{
	struct taking *t = ctx;
	struct control_reply reply;
	struct vm_view view;
	int r;

	if (!is_of(name, t->of) || vm_view_open(t->s->root, name, &view))
		return 0;
	if (!view.stats.is_spare) {
		vm_view_close(&view);
		return 0;
	}
	snprintf(t->old_name, sizeof t->old_name, "%s", name);
	if (t->s->name)
		snprintf(t->new_name, sizeof t->new_name, "%s", t->s->name);
	else
		snprintf(t->new_name, sizeof t->new_name, "%.40s-%.20s", t->of, name + strlen(t->of) + strlen(MIDDLE));
	r = vm_view_ask(&view, CONTROL_TAKE, t->new_name, TAKE_MS, &reply);
	vm_view_close(&view);
	if (r || reply.error == -EALREADY)
		return 0; /* somebody else was faster, or it has just ended */
	if (reply.error)
		t->status = cli_fail(reply.error == -EEXIST ? CLI_NAME_IN_USE : CLI_NO_ANSWER, "%s", reply.text);
	else
		t->status = CLI_OK;
	return 1;
}

static int take(struct spares *s, const char *of)
{
	struct taking t = { .s = s, .of = of, .begun_us = os_now_us(), .status = CLI_NO_VM };
	int r = vmdir_for_each(s->root, try_one, &t);

	if (r < 0)
		return cli_fail(CLI_RUN_DIR, "the run directory %s cannot be read: %s", s->root, strerror(-r));
	if (!r)
		return cli_fail(CLI_NO_VM, "no spare of %.80s waits: is `latent spare` running for it, and has it had the "
					   "time to start one?", of);
	if (t.status)
		return t.status;
	show(&t);
	rename_in_json(s->root, t.new_name);
	set_clock(&t);
	return CLI_OK;
}
