/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * latent receive: waits for a VM that another host moves here. The VMM is a child in a session of its own, with no
 * input, whose output is kept as `log` in its run directory; it lives on when this command has ended. Its line is
 * the user's, or built from the fields that the manifest may have.
 */
#include "cli/cli.h"
#include "cli/mover.h"
#include "cli/progress.h"
#include "cli/run.h"
#include "cli/vm_view.h"
#include "migrate/receive.h"
#include "os/os.h"
#include "snapshot/drives.h"
#include "vmdir/moving.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define VOLUMES_MAX 64
#define END_MS 5000
#define LOG "log"

enum { OPT_LISTEN, OPT_NAME, OPT_VOLUME, OPT_HAVE, OPT_TLS, OPT_PLAIN, OPT_RESUME, OPT_JSON };

static const struct cli_option options[] = {
	[OPT_LISTEN] = { "listen", CLI_VALUE, "ADDRESS", "tcp:HOST:PORT or unix:PATH (default: tcp:0.0.0.0:4848)" },
	[OPT_NAME] = { "name", CLI_VALUE, "NAME", "what it is called here (default: as there)" },
	[OPT_VOLUME] = { "volume", CLI_VALUE, "PATH=PATH", "a file that has the first path there has the second one here" },
	[OPT_HAVE] = { "have", CLI_VALUE, "SNAPSHOT", "what RAM has in common with this snapshot is not received" },
	[OPT_TLS] = { "tls", CLI_VALUE, "DIR", "prove who is who by the keys in DIR, and encrypt" },
	[OPT_PLAIN] = { "plain", CLI_FLAG, NULL, "over TCP without keys: whoever reaches it can start a VM here" },
	[OPT_RESUME] = { "resume", CLI_VALUE, "NAME", "go on with a VM that came here by a command that was killed" },
	[OPT_JSON] = { "json", CLI_FLAG, NULL, "print the address, and the result, as JSON objects, one a line" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

const struct cli_command mover_receive = {
	.name = "receive",
	.arguments = "[OPTIONS] [-- QEMU ...]",
	.summary = "Wait for a virtual machine that latent migrate moves here",
	.details = "It ends when the machine runs and has all of its memory. Ctrl-C before that ends it, and the machine\n"
		   "runs on where it was.",
	.options = options,
	.run = receive_run,
};

struct command {
	const char *listen, *name, *keys_dir, *resume;
	struct {
		const char *there, *here;
		size_t there_bytes;
	} volume[VOLUMES_MAX];
	unsigned volumes, snapshots;
	const char *snapshot[HAVE_MAX]; /* directories */
	bool plain, json;
	int argc;
	char **argv;
	char root[VMDIR_PATH_BYTES], known_dir[VMDIR_PATH_BYTES];
	int log_fd;
	char run_dir[VMDIR_PATH_BYTES]; /* the VM's; written before `has_vm` is set */
	_Atomic bool has_vm;
	int moving_fd; /* of who tells `latent stat`; below 0: not yet */
};

static struct receive_progress progress;

/* ---- the VMM ---------------------------------------------------------------------------------------- */

static const char *find(void *ctx, const char *path)
{
	const struct command *c = ctx;

	for (unsigned i = 0; i < c->volumes; i++)
		if (strlen(path) == c->volume[i].there_bytes && !strncmp(path, c->volume[i].there, c->volume[i].there_bytes))
			return c->volume[i].here;
	return path;
}

static char *append(char *text, const char *key, const char *value)
{
	char *escaped = props_escape(value), *longer = NULL;

	if (!text || !escaped || asprintf(&longer, "%s%s%s=%s", text, *text ? "," : "", key, escaped) < 0)
		longer = NULL;
	free(escaped);
	free(text);
	return longer;
}

/* A saved disk gets the file that it has here. */
static char *drive_with_file(struct command *c, const struct manifest_disk *disk, const struct drive_word *w, bool node)
{
	const struct manifest_layer *top = &disk->layer[0];
	char *text = append(strdup(""), node ? "driver" : "format", top->format);

	if (node)
		text = append(text, "file.driver", "file");
	text = append(text, node ? "file.filename" : "file", find(c, top->volume.path));
	for (size_t i = 0; i < w->props.count; i++) {
		const char *key = w->props.items[i].key;

		if (strcmp(key, "file") && strcmp(key, "format") && strcmp(key, "driver") && strncmp(key, "file.", 5))
			text = append(text, key, w->props.items[i].value);
	}
	return text;
}

/* The machine's line, with the disks' files. NULL: no memory. */
static char **make_line(struct command *c, const struct manifest *m, int *ret_argc)
{
	const char *names[MANIFEST_DISKS];
	struct drive_line drives = { 0 };
	char **argv = NULL;
	int argc = 0;

	for (uint32_t i = 0; i < m->disks; i++)
		names[i] = m->disk[i].drive;
	if (machine_to_argv(m->machine, &argc, &argv) ||
	    drives_find(argc, (const char *const *)argv, names, m->disks, &drives))
		return NULL;
	for (int i = 0; i + 1 < argc; i++) {
		const struct drive_word *w = &drives.word[i];
		char *text;

		if (w->role != DRIVE_SAVED || w->words != 2)
			continue;
		text = drive_with_file(c, &m->disk[w->disk], w, strstr(argv[i], "blockdev"));
		if (!text)
			return NULL;
		free(argv[i + 1]);
		argv[i + 1] = text;
	}
	drives_free(&drives);
	*ret_argc = argc;
	return argv;
}

/* The same device, with the generation that the guest knows; NULL: it is another device, or there is no memory. */
static char *device_with_generation(const char *value, const char *guid)
{
	struct props props = { 0 };
	char *text = NULL;

	if (!props_parse(&props, value, "driver") && props_get(&props, "driver") && !strcmp(props_get(&props, "driver"), "vmgenid")) {
		text = append(strdup(""), "driver", "vmgenid");
		for (size_t i = 0; i < props.count; i++)
			if (strcmp(props.items[i].key, "driver") && strcmp(props.items[i].key, "guid"))
				text = append(text, props.items[i].key, props.items[i].value);
		text = append(text, "guid", guid);
	}
	props_clear(&props);
	return text;
}

/* A guest that moves is no other one: QEMU shall not draw a new number. */
static void keep_generation(const struct manifest *m, int argc, char **argv)
{
	for (int i = 0; m->generation_id[0] && i + 1 < argc; i++) {
		char *text = strcmp(argv[i], "-device") && strcmp(argv[i], "--device")
			     ? NULL : device_with_generation(argv[i + 1], m->generation_id);

		argv[i + 1] = text ? text : argv[i + 1];
	}
}

static _Noreturn void become(struct command *c, const struct manifest *m, const struct agent_incoming *incoming)
{
	struct run_restore vm = { .name = c->name ? c->name : m->name, .incoming = incoming, .argc = c->argc, .argv = c->argv };
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	signal(SIGINT, SIG_DFL);
	signal(SIGTERM, SIG_DFL);
	if (setsid() < 0 || null < 0 || dup2(null, STDIN_FILENO) < 0 || dup2(c->log_fd, STDOUT_FILENO) < 0 ||
	    dup2(c->log_fd, STDERR_FILENO) < 0)
		_exit(CLI_SYSTEM);
	vm.agent.report_fd = vm.agent.overlays_fd = vm.agent.learned_fd = vm.agent.learn_dir_fd = -1;
	if (!vm.argc)
		vm.argv = make_line(c, m, &vm.argc);
	if (!vm.argv)
		_exit(CLI_SYSTEM);
	keep_generation(m, vm.argc, vm.argv);
	_exit(run_restored(&vm));
}

static int start(void *ctx, const struct manifest *m, const struct agent_incoming *incoming, struct receive_vm *ret_vm,
		 char why[SNAPSHOT_WHY_BYTES])
{
	struct command *c = ctx;
	const char *name = c->name ? c->name : m->name;

	if (!c->argc && !m->machine)
		return snapshot_fail(why, -ENOTSUP, "the machine is not described (%.150s): give QEMU's command line after --",
				     m->machine_missing);
	if (!vmdir_name_ok(name))
		return snapshot_fail(why, -EINVAL, "'%.63s' is no name for a VM here: give it a --name", name);
	if (snprintf(ret_vm->run_dir, sizeof ret_vm->run_dir, "%s/%s", c->root, name) >= (int)sizeof ret_vm->run_dir)
		return snapshot_fail(why, -ENAMETOOLONG, "the path of the run directory is too long");
	ret_vm->pid = fork();
	if (!ret_vm->pid)
		become(c, m, incoming);
	if (ret_vm->pid < 0)
		return snapshot_fail(why, -errno, "no process: %s", strerror(errno));
	ret_vm->pid_fd = (int)syscall(SYS_pidfd_open, ret_vm->pid, 0);
	snprintf(c->run_dir, sizeof c->run_dir, "%.250s", ret_vm->run_dir);
	c->has_vm = true;
	if (ret_vm->pid_fd >= 0)
		return 0;
	(void)kill(ret_vm->pid, SIGKILL);
	(void)waitpid(ret_vm->pid, NULL, 0);
	return snapshot_fail(why, -errno, "no descriptor of QEMU's process: %s", strerror(errno));
}

static bool has_ended(const struct receive_vm *vm, int within_ms)
{
	struct pollfd p = { vm->pid_fd, POLLIN, 0 };

	return poll(&p, 1, within_ms) > 0;
}

static void end(void *ctx, struct receive_vm *vm)
{
	(void)ctx;
	(void)syscall(SYS_pidfd_send_signal, vm->pid_fd, SIGTERM, NULL, 0);
	if (!has_ended(vm, END_MS)) {
		(void)syscall(SYS_pidfd_send_signal, vm->pid_fd, SIGKILL, NULL, 0);
		(void)has_ended(vm, END_MS);
	}
	(void)waitpid(vm->pid, NULL, WNOHANG); /* unless it is no child of ours */
}

/* ---- the command -------------------------------------------------------------------------------------- */

static int add_volume(struct command *c, const char *value)
{
	const char *equals = strchr(value, '=');

	if (c->volumes == VOLUMES_MAX || !equals || equals == value || !equals[1])
		return cli_fail(CLI_USAGE, "receive: --volume takes PATH=PATH, not '%.80s'", value);
	c->volume[c->volumes].there = value;
	c->volume[c->volumes].there_bytes = (size_t)(equals - value);
	c->volume[c->volumes++].here = equals + 1;
	return CLI_OK;
}

static int add_snapshot(struct command *c, const char *dir)
{
	if (c->snapshots == HAVE_MAX)
		return cli_fail(CLI_USAGE, "receive: --have may be given %u times", HAVE_MAX);
	c->snapshot[c->snapshots++] = dir;
	return CLI_OK;
}

static int parse(struct cli_parser *parser, struct command *c)
{
	int option;

	while ((option = cli_next_option(parser)) >= 0) {
		if (option == OPT_LISTEN)
			c->listen = parser->value;
		else if (option == OPT_NAME)
			c->name = parser->value;
		else if (option == OPT_TLS)
			c->keys_dir = parser->value;
		else if (option == OPT_RESUME)
			c->resume = parser->value;
		else if ((option == OPT_VOLUME && add_volume(c, parser->value)) ||
			 (option == OPT_HAVE && add_snapshot(c, parser->value)))
			return CLI_WRONG;
		c->plain = c->plain || option == OPT_PLAIN;
		c->json = c->json || option == OPT_JSON;
	}
	if (option == CLI_END && c->name && !vmdir_name_ok(c->name)) {
		cli_fail(CLI_USAGE, "receive: '%.80s' is no name for a VM", c->name);
		return CLI_WRONG;
	}
	c->argc = parser->argc - parser->next;
	c->argv = parser->argv + parser->next;
	return option;
}

static void say_address(const struct command *c, int listener)
{
	char address[256] = "";

	(void)link_describe(listener, address, sizeof address);
	if (c->json)
		printf("{\"listen\": \"%s\"}\n", address);
	else
		cli_say("waiting for a VM at %s", address);
	fflush(stdout);
}

static void print(const struct command *c, const struct receive_result *r)
{
	struct json_object *json;
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT];

	if (!c->json) {
		printf("%s runs here; received %s in %.2f s, of that %s after it ran\n", c->name ? c->name : r->name,
		       cli_size(r->bytes_received, a), (double)r->total_us / 1e6, cli_size(os_bytes(r->pages_missing), b));
		return;
	}
	json = json_object_new_object();
	json_object_object_add(json, "name", json_object_new_string(c->name ? c->name : r->name));
	json_object_object_add(json, "pid", json_object_new_int64(r->pid));
	json_object_object_add(json, "bytes_received", json_object_new_uint64(r->bytes_received));
	json_object_object_add(json, "load_us", json_object_new_uint64(r->load_us));
	json_object_object_add(json, "pages_words", json_object_new_uint64(r->words));
	json_object_object_add(json, "pages_on_volumes", json_object_new_uint64(r->volume));
	json_object_object_add(json, "pages_same", json_object_new_uint64(r->same));
	json_object_object_add(json, "pages_on_disks", json_object_new_uint64(r->disks));
	json_object_object_add(json, "pages_received", json_object_new_uint64(r->data));
	json_object_object_add(json, "pages_missing", json_object_new_uint64(r->pages_missing));
	json_object_object_add(json, "pages_wanted", json_object_new_uint64(r->pages_wanted));
	printf("%s\n", json_object_to_json_string_ext(json, JSON_C_TO_STRING_PLAIN));
	json_object_put(json);
}

/* Its output gets a name in its run directory. */
static void keep_log(const struct command *c, const char *name)
{
	char path[VMDIR_PATH_BYTES], from[32];

	snprintf(from, sizeof from, "/proc/self/fd/%d", c->log_fd);
	if (!vmdir_path(c->root, name, LOG, path))
		(void)linkat(AT_FDCWD, from, AT_FDCWD, path, AT_SYMLINK_FOLLOW);
}

static void print_log(const struct command *c)
{
	char text[1024];
	ssize_t n = pread(c->log_fd, text, sizeof text - 1, 0);

	text[n > 0 ? n : 0] = '\0';
	if (text[0])
		fprintf(stderr, "%s%s", text, text[strlen(text) - 1] == '\n' ? "" : "\n");
}

static void show(void *ctx)
{
	static const char *const names[] = { "waiting", "the VM is prepared", "passes", "switch", "the rest", "done" };
	char received[CLI_SIZE_TEXT], missing[CLI_SIZE_TEXT];

	(void)ctx;
	if (progress.phase <= RECEIVE_LISTENING)
		return;
	fprintf(stderr, "\r\033[K%s: received %s, missing %s ",
		progress.cut ? "the link is cut; the other host is waited for" : names[progress.phase],
		cli_size(progress.bytes_received, received), cli_size(os_bytes(progress.pages_missing), missing));
}

/* For `latent stat`, as soon as the VM has a directory. */
static void tell(void *ctx)
{
	static const enum moving_phase phases[] = { MOVING_PREPARES, MOVING_PREPARES, MOVING_PASSES, MOVING_SWITCHES, MOVING_REST,
						    MOVING_REST };
	const struct moving moving = {
		.side = MOVING_HERE, .phase = phases[progress.phase], .cut = progress.cut, .bytes = progress.bytes_received,
		.pages_all = progress.pages_all, .words = progress.words, .volumes = progress.volume,
		.same = progress.same, .disks = progress.disks, .contents = progress.data, .left = progress.pages_missing,
		.wanted = progress.wanted,
	};

	struct command *c = ctx;

	if (c->moving_fd < 0 && c->has_vm && progress.phase > RECEIVE_PREPARING)
		c->moving_fd = moving_begin(c->run_dir);
	moving_say(c->moving_fd, &moving);
}

/* The VM is no child of ours. */
static int go_on(struct command *c, const struct receive_options *receive, struct receive_result *ret_result, char *why)
{
	struct receive_vm vm = { .pid_fd = -1 };
	struct vm_view view;
	int r;

	if (vm_view_open(c->root, c->resume, &view))
		return snapshot_fail(why, -ENOENT, "there is no VM %.63s here", c->resume);
	vm.pid = (pid_t)view.stats.pid;
	vm_view_close(&view);
	snprintf(vm.run_dir, sizeof vm.run_dir, "%.180s/%.63s", c->root, c->resume);
	snprintf(c->run_dir, sizeof c->run_dir, "%.250s", vm.run_dir);
	c->has_vm = true;
	vm.pid_fd = (int)syscall(SYS_pidfd_open, vm.pid, 0);
	r = vm.pid_fd < 0 ? snapshot_fail(why, -errno, "the VM %.63s has ended", c->resume) : 0;
	return r ? r : migrate_receive_again(receive, &vm, c->resume, &progress, ret_result, why);
}

static int say_kept(const struct command *c, const struct receive_result *result, const char *why)
{
	const char *name = c->name ? c->name : result->name;

	return cli_fail(CLI_NO_ANSWER, "%s %s, and not all of its memory has come (%s): go on with `latent receive --resume %s`", name,
			result->runs ? "runs here" : "was given to this host", why, name);
}

static int wait_for_vm(struct command *c, int listener, struct link_keys *keys, struct have *have)
{
	struct receive_options receive = { .listener = listener, .keys = keys, .known_dir = c->known_dir, .have = have,
					   .find = find, .start = start, .end = end, .ctx = c };
	char why[SNAPSHOT_WHY_BYTES] = "";
	struct receive_result result = { 0 };
	int r;

	progress_begin(show, tell, c);
	r = c->resume ? go_on(c, &receive, &result, why) : migrate_receive(&receive, &progress, &result, why);
	progress_end();
	moving_end(c->run_dir, c->moving_fd);
	if (!c->resume && (result.runs || result.kept))
		keep_log(c, c->name ? c->name : result.name);
	if (!r) {
		print(c, &result);
		return CLI_OK;
	}
	if (!why[0])
		snprintf(why, sizeof why, "%s", strerror(-r));
	if (result.kept)
		return say_kept(c, &result, why);
	if (!c->resume)
		print_log(c);
	return cli_fail(CLI_NO_ANSWER, "no VM was received: %s", why);
}

int receive_run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv, .stop_at_operand = true };
	struct command c = { .listen = "tcp:0.0.0.0:4848", .moving_fd = -1 };
	struct link_keys *keys = NULL;
	struct have *have = NULL;
	char why[VMDIR_WHY_BYTES];
	int status = parse(&parser, &c), listener;

	if (status != CLI_END)
		return cli_end_status(status);
	if (c.resume && (c.name || c.volumes || c.snapshots || c.argc))
		return cli_fail(CLI_USAGE, "receive: --resume goes with no --name, --volume, --have and command line: "
				"the VM is here");
	if (c.resume && !vmdir_name_ok(c.resume))
		return cli_fail(CLI_USAGE, "receive: '%.80s' is no name for a VM", c.resume);
	if (!c.keys_dir && !c.plain && strncmp(c.listen, "unix:", 5))
		return cli_fail(CLI_USAGE, "receive: over TCP, say where the keys are (--tls DIR), or that there are none (--plain)");
	status = progress_take_faults();
	if (status)
		return status;
	if (vmdir_root(true, c.root, why))
		return cli_fail(CLI_RUN_DIR, "%s", why);
	snprintf(c.known_dir, sizeof c.known_dir, "%.200s/" MOVER_DIGESTS, c.root);
	c.log_fd = os_memfd_create("latent-log", 0, false);
	if (c.keys_dir && link_keys_load(c.keys_dir, true, &keys, why))
		return cli_fail(CLI_USAGE, "%s", why);
	if (c.snapshots && have_open(c.snapshot, c.snapshots, &have, why))
		return cli_fail(CLI_USAGE, "receive: %s", why);
	listener = link_listen(c.listen, why);
	if (listener < 0)
		return cli_fail(CLI_SYSTEM, "%s", why);
	progress_take_signals(&progress.stop);
	say_address(&c, listener);
	status = wait_for_vm(&c, listener, keys, have);
	have_close(have);
	link_keys_free(keys);
	close(listener);
	if (!strncmp(c.listen, "unix:", 5))
		(void)unlink(c.listen + 5);
	return status;
}
