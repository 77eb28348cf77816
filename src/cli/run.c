/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * latent run: prepares guest RAM and the run directory, and becomes QEMU. Everything up to execv can
 * fail and leaves nothing behind then; afterwards the directory is the agent's.
 */
#include "cli/blk_domain.h"
#include "cli/cli.h"
#include "cli/preflight.h"
#include "cli/qemu_args.h"
#include "cli/restore.h"
#include "cli/run.h"
#include "os/os.h"
#include "os/probe.h"
#include "os/selftest.h"
#include "vmdir/agent_config.h"
#include "vmdir/compat.h"
#include "vmdir/props.h"
#include "vmdir/stats.h"
#include "vmdir/vmdir.h"
#include "volume/track.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAX_RUN_PAGES 65536
#define MAX_CONFIG_BYTES (1 << 20)
#define WHY_BYTES 512
#define BLK_DEVICE "vhost-user-blk-pci"

enum {
	OPT_NAME,
	OPT_THRESHOLD,
	OPT_MIN_RUN,
	OPT_MAX_MAPS,
	OPT_TRUST,
	OPT_NO_OVERLAYS,
	OPT_VMGENID,
	OPT_BLK_DOMAIN,
	OPT_SCAN
};

static const struct cli_option options[] = {
	[OPT_NAME] = { "name", CLI_VALUE, "NAME", "name of the VM (default: QEMU's -name, or vm-PID)" },
	[OPT_THRESHOLD] = { "share-threshold", CLI_VALUE, "F",
			    "map only where sharing is at least this likely, 0 to 1 (default: 0.1)" },
	[OPT_MIN_RUN] = { "min-run", CLI_VALUE, "PAGES",
			  "shortest run of pages to map (default: measured at start)" },
	[OPT_MAX_MAPS] = { "max-maps", CLI_VALUE, "N",
			   "mappings QEMU may have in all (default: half of vm.max_map_count)" },
	[OPT_TRUST] = { "trust-image", CLI_FLAG, NULL,
			"map images although nothing keeps them from changing" },
	[OPT_NO_OVERLAYS] = { "no-overlays", CLI_FLAG, NULL, "plain RAM: map no images" },
	[OPT_VMGENID] = { "vmgenid", CLI_FLAG, NULL,
			  "give the VM a generation ID, which is new for each clone of it" },
	[OPT_BLK_DOMAIN] = { "blk-domain", CLI_VALUE, "IMAGE",
			     "one more disk, served by a process of its own (see latent blkd); RAM "
			     "stays plain" },
	[OPT_SCAN] = { "scan-period", CLI_VALUE, "TIME",
		       "look which memory is in use, once in this time: 10s (default: not until latent "
		       "scan)" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_run = {
	.name = "run",
	.arguments = "[OPTIONS] -- QEMU [QEMU-OPTIONS]",
	.summary = "Run a virtual machine whose reads map what the host has in memory",
	.details = "Becomes QEMU: same input and output, signals and exit status.",
	.options = options,
	.run = run,
};

struct launch {
	const char *name; /* as the user gave it, or NULL */
	double share_threshold;
	uint64_t min_run_pages, budget_maps, scan_period_us;
	bool trust_images, no_overlays, vmgenid;
	const char *blk_image; /* of a block domain, or NULL */

	const struct run_restore *restore; /* NULL: it boots */

	int argc; /* QEMU's own line */
	char **argv;
	struct qemu_plan plan;

	char *vmm_path;
	char agent_path[4096];
	char vmm_version[PREFLIGHT_VERSION_BYTES];
	char root[VMDIR_PATH_BYTES];
	struct vmdir dir;

	/* All of these go to the VMM. */
	int ram_fd, qmp_agent_fd, qmp_vmm_fd, monitor_fd, config_fd, blk_fd;

	char **vmm_argv;
	size_t vmm_argc, machine_argc; /* machine: the words that say what the VM is, without how it is run */
};

static int parse_options(const struct cli_command *command, struct launch *launch, int argc,
			 char **argv);
static int parse_option(struct launch *launch, int option, const char *value);
static int plan(struct launch *launch);
static int find_vmm(struct launch *launch);
static int check_vmm(struct launch *launch);
static int claim(struct launch *launch);
static int claim_derived(struct launch *launch, char *why);
static int start_blk_domain(struct launch *launch);
static int prepare(struct launch *launch);
static int make_descriptors(struct launch *launch);
static const char *why_no_overlays(const struct launch *launch);
static int make_monitor_config(void);
static int make_agent_config(const struct launch *launch);
static int write_json(const struct launch *launch);
static void begin_stats(const struct launch *launch);
static int make_argv(struct launch *launch);
static char *make_word(const struct launch *launch, const char *word);
static int add_monitors(struct launch *launch);
static int become_vmm(struct launch *launch);
static void give_up(struct launch *launch);
static int write_all(int fd, const void *data, size_t bytes);
static char *read_config(void *ctx, const char *path);

static const struct launch no_launch = {
	.share_threshold = AGENT_SHARE_THRESHOLD,
	.dir = { .lock_fd = -1, .stats_fd = -1 },
	.ram_fd = -1,
	.qmp_agent_fd = -1,
	.qmp_vmm_fd = -1,
	.monitor_fd = -1,
	.config_fd = -1,
};

static int launch_vmm(struct launch *launch)
{
	static int (*const steps[])(struct launch *) = {
		plan, find_vmm, check_vmm, claim, start_blk_domain, prepare, become_vmm,
	};
	int status = CLI_OK;

	for (size_t i = 0; !status && i < sizeof steps / sizeof steps[0]; i++) {
		status = launch->restore ? restore_step() : CLI_OK;
		if (!status)
			status = steps[i](launch);
	}
	give_up(launch); /* a success does not come back */
	return status;
}

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct launch launch = no_launch;
	int status = parse_options(command, &launch, argc, argv);

	return launch.argc ? launch_vmm(&launch) : status;
}

int run_restored(const struct run_restore *restore)
{
	struct launch launch = no_launch;

	launch.name = restore->name;
	launch.restore = restore;
	launch.argc = restore->argc;
	launch.argv = restore->argv;
	return launch_vmm(&launch);
}

/* Without QEMU's line in launch->argc the status is final. */
static int parse_options(const struct cli_command *command, struct launch *launch, int argc, char **argv)
{
	struct cli_parser parser = {
		.command = command,
		.argc = argc,
		.argv = argv,
		.stop_at_operand = true,
	};
	int option, status;

	while ((option = cli_next_option(&parser)) >= 0) {
		status = parse_option(launch, option, parser.value);
		if (status)
			return status;
	}
	if (option != CLI_END)
		return cli_end_status(option);
	if (parser.next >= argc)
		return cli_fail(CLI_USAGE,
				"run: QEMU's command line is missing (see latent run --help)");
	launch->argc = argc - parser.next;
	launch->argv = argv + parser.next;
	return CLI_OK;
}

static uint32_t max_maps(void)
{
	uint64_t maps = os_max_maps() / 2;

	return maps < UINT32_MAX ? (uint32_t)maps : UINT32_MAX;
}

static int parse_option(struct launch *launch, int option, const char *value)
{
	switch (option) {
	case OPT_NAME:
		if (!vmdir_name_ok(value))
			return cli_fail(CLI_USAGE,
					"run: '%.80s' is no name for a VM: up to 63 letters, "
					"digits, '_', '.' and '-', the first a letter or digit, and not "
					"'" VMDIR_VOLUMES "'",
					value);
		launch->name = value;
		return CLI_OK;
	case OPT_THRESHOLD:
		if (!cli_parse_real(value, 0, 1, &launch->share_threshold))
			return cli_fail(CLI_USAGE,
					"run: --share-threshold takes a number from 0 to 1, not "
					"'%.80s'",
					value);
		return CLI_OK;
	case OPT_MIN_RUN:
		if (!cli_parse_unsigned(value, MAX_RUN_PAGES, &launch->min_run_pages) ||
		    !launch->min_run_pages)
			return cli_fail(CLI_USAGE,
					"run: --min-run takes a number of pages from 1 to %d, "
					"not '%.80s'",
					MAX_RUN_PAGES, value);
		return CLI_OK;
	case OPT_MAX_MAPS:
		if (!cli_parse_unsigned(value, max_maps(), &launch->budget_maps) || !launch->budget_maps)
			return cli_fail(CLI_USAGE,
					"run: --max-maps takes a number of mappings up to %u (half of vm.max_map_count; "
					"QEMU needs the rest), not '%.80s'",
					max_maps(), value);
		return CLI_OK;
	case OPT_TRUST:
		launch->trust_images = true;
		return CLI_OK;
	case OPT_SCAN:
		return cli_parse_period("run", "scan-period", value, &launch->scan_period_us);
	case OPT_BLK_DOMAIN:
		launch->blk_image = value;
		return CLI_OK;
	case OPT_VMGENID:
		launch->vmgenid = true;
		return CLI_OK;
	default:
		launch->no_overlays = true;
		return CLI_OK;
	}
}

/* As if the user had added the device himself. */
static void exclude_overlays(struct launch *launch)
{
	const struct compat_rule *rule = compat_find(COMPAT_DEVICE, BLK_DEVICE, NULL, NULL);

	if (!launch->plan.excludes)
		compat_sentence(rule, BLK_DEVICE, launch->plan.excluded_by,
				sizeof launch->plan.excluded_by);
	launch->plan.excludes |= rule->excludes;
}

static int plan(struct launch *launch)
{
	char why[QEMU_ARGS_WHY_BYTES];
	int r = qemu_args_plan(launch->argc, (const char *const *)launch->argv, read_config, NULL,
			       &launch->plan, why);

	if (r == -EINVAL)
		return cli_fail(CLI_REFUSED, "%s", why);
	if (r)
		return cli_fail(CLI_SYSTEM, "QEMU's command line cannot be read: %s", strerror(-r));
	if (launch->plan.missing_of[0])
		return cli_fail(CLI_NO_IMAGE, "there is no image %s, the backing file of %s: put it there, or name another "
					      "one (qemu-img rebase -u)",
				launch->plan.missing, launch->plan.missing_of);
	if (launch->plan.missing[0])
		return cli_fail(CLI_NO_IMAGE, "there is no image %s: make it (qemu-img create), or correct the path",
				launch->plan.missing);
	if (launch->blk_image)
		exclude_overlays(launch);
	return CLI_OK;
}

/* As execvp would find it, and with the shell's exit statuses. */
static int find_vmm(struct launch *launch)
{
	const char *word = launch->argv[0], *path = getenv("PATH");
	struct stat st;
	bool found = false;

	if (strchr(word, '/')) {
		launch->vmm_path = strdup(word);
		found = !access(word, F_OK);
	}
	for (path = path ? path : "/usr/bin:/bin"; *word && !strchr(word, '/') && *path;) {
		size_t length = strcspn(path, ":");

		free(launch->vmm_path);
		if (asprintf(&launch->vmm_path, "%.*s/%s", (int)(length ? length : 1),
			     length ? path : ".", word) < 0)
			launch->vmm_path = NULL;
		if (launch->vmm_path && !access(launch->vmm_path, X_OK)) {
			found = true;
			break;
		}
		path += length + (path[length] == ':');
	}
	if (!found)
		return cli_fail(CLI_NOT_FOUND, "%s: command not found", word);
	if (!launch->vmm_path || access(launch->vmm_path, X_OK))
		return cli_fail(CLI_NOT_EXECUTABLE, "%s cannot be run: %s", word, strerror(errno));
	if (!stat(launch->vmm_path, &st) && S_ISDIR(st.st_mode))
		return cli_fail(CLI_NOT_EXECUTABLE, "%s cannot be run: %s", word, strerror(EISDIR));
	return CLI_OK;
}

static int check_vmm(struct launch *launch)
{
	char why[WHY_BYTES];

	if (cli_agent_path(launch->agent_path, sizeof launch->agent_path))
		return cli_fail(CLI_NO_AGENT,
				"the agent latent-qemu.so is not where latent is: say where "
				"with LATENT_AGENT");
	if (strpbrk(launch->agent_path, ": \t\n"))
		return cli_fail(CLI_NO_AGENT,
				"the agent's path %s has a blank or a colon, which LD_PRELOAD "
				"cannot say: move it",
				launch->agent_path);
	if (vmdir_root(true, launch->root, why))
		return cli_fail(CLI_RUN_DIR, "%s", why);
	if (preflight(launch->vmm_path, launch->agent_path, launch->root, launch->vmm_version, why))
		return cli_fail(CLI_NO_AGENT, "%s", why);
	return CLI_OK;
}

static int claim(struct launch *launch)
{
	char why[VMDIR_WHY_BYTES];
	int r;

	if (launch->name)
		r = vmdir_claim(launch->root, launch->name, &launch->dir, why);
	else
		r = claim_derived(launch, why);
	if (r == -EEXIST)
		return cli_fail(CLI_NAME_IN_USE, "%s", why);
	return r ? cli_fail(CLI_RUN_DIR, "%s", why) : CLI_OK;
}

/* QEMU does not mind two VMs of one -name, so neither may this. */
static int claim_derived(struct launch *launch, char *why)
{
	const char *guest = launch->restore ? launch->restore->like : launch->plan.guest_name;
	char name[VMDIR_NAME_BYTES];
	int r = -EEXIST;

	if (vmdir_name_ok(guest))
		r = vmdir_claim(launch->root, guest, &launch->dir, why);
	if (r != -EEXIST)
		return r;
	snprintf(name, sizeof name, "%.48s-%d", vmdir_name_ok(guest) ? guest : "vm", (int)getpid());
	return vmdir_claim(launch->root, name, &launch->dir, why);
}

static int start_blk_domain(struct launch *launch)
{
	char socket[VMDIR_PATH_BYTES];
	int r = launch->blk_image ? vmdir_path(launch->root, launch->dir.name, BLK_DOMAIN_SOCKET, socket)
				  : 0;

	if (r)
		return cli_fail(CLI_RUN_DIR, "%s: %s", launch->dir.path, strerror(-r));
	return launch->blk_image ? blk_domain_start(launch->blk_image, socket, &launch->blk_fd) : CLI_OK;
}

static int prepare(struct launch *launch)
{
	int r = make_descriptors(launch);

	if (!r)
		r = launch->config_fd = make_agent_config(launch);
	if (r >= 0)
		r = make_argv(launch);
	if (r)
		return cli_fail(CLI_SYSTEM, "guest RAM or the VM's descriptors cannot be made: %s",
				strerror(-r));
	begin_stats(launch);
	r = write_json(launch);
	if (r)
		return cli_fail(CLI_RUN_DIR, "%s/" VMDIR_JSON " cannot be written: %s", launch->dir.path,
				strerror(-r));
	return CLI_OK;
}

/* The VMM inherits them; the agent makes them close-on-exec there. */
static int make_descriptors(struct launch *launch)
{
	char name[sizeof "latent-ram:" + VMDIR_NAME_BYTES];
	int pair[2];

	snprintf(name, sizeof name, "latent-ram:%s", launch->dir.name);
	launch->ram_fd = os_memfd_create(name, launch->plan.ram_bytes, true);
	if (launch->ram_fd < 0)
		return launch->ram_fd;
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		return -errno;
	launch->qmp_agent_fd = pair[0];
	launch->qmp_vmm_fd = pair[1];
	launch->monitor_fd = make_monitor_config();
	if (launch->monitor_fd < 0)
		return launch->monitor_fd;
	if (fcntl(launch->dir.lock_fd, F_SETFD, 0) || fcntl(launch->dir.stats_fd, F_SETFD, 0))
		return -errno;
	return 0;
}

/*
 * The monitors come in a configuration file: with -mon on the command line QEMU would leave out
 * its default monitor, and a user of -nographic would miss it.
 */
static int make_monitor_config(void)
{
	static const char text[] =
		"[mon \"latent-qmp\"]\n  chardev = \"latent-qmp\"\n  mode = \"control\"\n"
		"[mon \"latent-mover\"]\n  chardev = \"latent-mover\"\n  mode = \"control\"\n"
		"[mon \"latent-agent\"]\n  chardev = \"latent-agent\"\n  mode = \"control\"\n";
	int fd = os_memfd_create("latent-monitors", 0, true);
	int r = fd < 0 ? fd : write_all(fd, text, sizeof text - 1);

	if (!r)
		return fd;
	if (fd >= 0)
		close(fd);
	return r;
}

static int make_agent_config(const struct launch *launch)
{
	struct agent_config config = {
		.magic = AGENT_CONFIG_MAGIC,
		.version = AGENT_CONFIG_VERSION,
		.ram_fd = launch->ram_fd,
		.lock_fd = launch->dir.lock_fd,
		.qmp_fd = launch->qmp_agent_fd,
		.qmp_vmm_fd = launch->qmp_vmm_fd,
		.monitor_fd = launch->monitor_fd,
		.stats_fd = launch->dir.stats_fd,
		.share_threshold = launch->share_threshold,
		.min_run_pages = (uint32_t)launch->min_run_pages,
		.budget_maps = (uint32_t)launch->budget_maps,
		.trust_images = launch->trust_images,
		.scan_period_us = launch->scan_period_us,
	};
	int fd, r;

	if (launch->restore)
		config.restore = launch->restore->agent;
	if (launch->restore && launch->restore->incoming)
		config.incoming = *launch->restore->incoming;
	snprintf(config.excluded_by, sizeof config.excluded_by, "%s", why_no_overlays(launch));
	config.overlays_allowed = !config.excluded_by[0];
	snprintf(config.block_name, sizeof config.block_name, "%s", launch->plan.block_name);
	snprintf(config.name, sizeof config.name, "%s", launch->dir.name);
	snprintf(config.run_dir, sizeof config.run_dir, "%s", launch->dir.path);
	/* vmdir_root has checked that it fits. */
	snprintf(config.volumes_dir, sizeof config.volumes_dir, "%.240s/" VMDIR_VOLUMES, launch->root);
	track_sweep(config.volumes_dir);

	fd = os_memfd_create("latent-config", 0, true);
	r = fd < 0 ? fd : write_all(fd, &config, sizeof config);
	if (!r)
		return fd;
	if (fd >= 0)
		close(fd);
	return r;
}

/* Whom the file is about, for `latent ps` before the agent has spoken. */
static void begin_stats(const struct launch *launch)
{
	struct vm_stats *stats =
		mmap(NULL, sizeof *stats, PROT_READ | PROT_WRITE, MAP_SHARED, launch->dir.stats_fd, 0);

	if (stats == MAP_FAILED)
		return;
	stats->version = VM_STATS_VERSION;
	snprintf(stats->name, sizeof stats->name, "%s", launch->dir.name);
	snprintf(stats->agent_version, sizeof stats->agent_version, "%s", LATENT_VERSION_TEXT);
	stat_set(&stats->started_unix_s, (uint64_t)time(NULL));
	if (!getcwd(stats->cwd, sizeof stats->cwd))
		stats->cwd[0] = '\0';
	stats->magic = VM_STATS_MAGIC;
	munmap(stats, sizeof *stats);
}

static int write_json(const struct launch *launch)
{
	struct json_object *json = json_object_new_object(), *words = json_object_new_array();
	char path[VMDIR_PATH_BYTES];
	const char *text;
	int fd = -1, r = -ENOMEM;

	if (!json || !words) {
		json_object_put(words);
		goto out;
	}
	for (size_t i = 0; i < launch->vmm_argc; i++)
		json_object_array_add(words, json_object_new_string(launch->vmm_argv[i]));
	json_object_object_add(json, "name", json_object_new_string(launch->dir.name));
	json_object_object_add(json, "pid", json_object_new_int64(getpid()));
	json_object_object_add(json, "started_unix_s", json_object_new_int64(time(NULL)));
	json_object_object_add(json, "latent_version", json_object_new_string(LATENT_VERSION_TEXT));
	json_object_object_add(json, "qemu", json_object_new_string(launch->vmm_path));
	json_object_object_add(json, "qemu_version", json_object_new_string(launch->vmm_version));
	json_object_object_add(json, "command", words);
	json_object_object_add(json, "own_words", json_object_new_uint64(launch->vmm_argc - launch->machine_argc));
	text = json_object_to_json_string_ext(json,
					      JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE);
	if (!text)
		goto out;
	r = vmdir_path(launch->root, launch->dir.name, VMDIR_JSON, path);
	if (r)
		goto out;
	fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	r = fd < 0 ? -errno : write_all(fd, text, strlen(text));
	if (fd >= 0)
		close(fd);
out:
	json_object_put(json);
	return r;
}

/* An option and its argument. */
static int add_option(struct launch *launch, const char *option, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

static int add_option(struct launch *launch, const char *option, const char *format, ...)
{
	va_list args;
	int length;

	launch->vmm_argv[launch->vmm_argc] = strdup(option);
	if (!launch->vmm_argv[launch->vmm_argc])
		return -ENOMEM;
	va_start(args, format);
	length = vasprintf(&launch->vmm_argv[++launch->vmm_argc], format, args);
	va_end(args);
	if (length < 0)
		return -ENOMEM;
	launch->vmm_argc++;
	return 0;
}

static int add_flag(struct launch *launch, const char *flag)
{
	launch->vmm_argv[launch->vmm_argc] = strdup(flag);
	return launch->vmm_argv[launch->vmm_argc++] ? 0 : -ENOMEM;
}

/* The length of a placeholder at `text`, and what it stands for; 0: there is none. */
static size_t placeholder(const char *text, const char *name, const char *run_dir, unsigned number,
			  char value[VMDIR_PATH_BYTES])
{
	static const char *const words[] = { "{name}", "{run}", "{clone}", "{clone:x}" };
	size_t i = 0;

	while (i < 4 && strncmp(text, words[i], strlen(words[i])))
		i++;
	if (i == 4 || (i > 1 && !number))
		return 0;
	if (i < 2)
		snprintf(value, VMDIR_PATH_BYTES, "%s", i ? run_dir : name);
	else
		snprintf(value, VMDIR_PATH_BYTES, i == 2 ? "%u" : "%02x", number);
	return strlen(words[i]);
}

char *run_expand(const char *word, const char *name, const char *run_dir, unsigned number)
{
	char *text = NULL, value[VMDIR_PATH_BYTES];
	size_t bytes = 0;
	FILE *out = open_memstream(&text, &bytes);

	if (!out)
		return NULL;
	while (*word) {
		size_t length = *word == '{' ? placeholder(word, name, run_dir, number, value) : 0;

		if (length)
			fputs(value, out);
		else
			putc(*word, out);
		word += length ? length : 1;
	}
	return fclose(out) ? NULL : text;
}

/* The line of a restore has placeholders; that of `latent run` is QEMU's own. */
static char *make_word(const struct launch *launch, const char *word)
{
	if (!launch->restore)
		return strdup(word);
	return run_expand(word, launch->dir.name, launch->dir.path, launch->restore->number);
}

static int add_blk_device(struct launch *launch)
{
	char *dir = props_escape(launch->dir.path);
	int r = dir ? 0 : -ENOMEM;

	if (!r)
		r = add_option(launch, "-chardev",
			       "socket,id=latent-blk,path=%s/" BLK_DOMAIN_SOCKET ",reconnect=1", dir);
	if (!r)
		r = add_option(launch, "-device", BLK_DEVICE ",chardev=latent-blk");
	free(dir);
	return r;
}

/* The user's line as it is, and behind it guest RAM and the monitors. */
static int make_argv(struct launch *launch)
{
	static const size_t own_words = 21;
	size_t count = (size_t)launch->argc;
	int r;

	launch->vmm_argv = calloc(count + own_words + 1, sizeof *launch->vmm_argv);
	if (!launch->vmm_argv)
		return -ENOMEM;
	for (; launch->vmm_argc < count; launch->vmm_argc++) {
		launch->vmm_argv[launch->vmm_argc] = make_word(launch, launch->argv[launch->vmm_argc]);
		if (!launch->vmm_argv[launch->vmm_argc])
			return -ENOMEM;
	}
	r = launch->vmgenid ? add_option(launch, "-device", "vmgenid") : 0;
	if (!r && launch->blk_image)
		r = add_blk_device(launch);
	launch->machine_argc = launch->vmm_argc;
	if (r)
		return r;
	r = add_option(launch, "-object",
		       "memory-backend-file,id=%s,size=%ju,mem-path=/proc/self/fd/%d,share=on,"
		       "x-use-canonical-path-for-ramblock-id=off",
		       launch->plan.block_name, (uintmax_t)launch->plan.ram_bytes, launch->ram_fd);
	if (!r)
		r = add_option(launch, "-machine", "memory-backend=%s", launch->plan.block_name);
	if (!r && launch->restore) /* the agent says when and what from, and then when the guest runs */
		r = add_option(launch, "-incoming", "defer");
	if (!r && launch->restore)
		r = add_flag(launch, "-S");
	if (!r)
		r = add_monitors(launch);
	return r;
}

static int add_monitors(struct launch *launch)
{
	char *dir = props_escape(launch->dir.path);
	int r = dir ? 0 : -ENOMEM;

	if (!r)
		r = add_option(launch, "-chardev",
			       "socket,id=latent-qmp,path=%s/" VMDIR_QMP ",server=on,wait=off", dir);
	if (!r)
		r = add_option(launch, "-chardev",
			       "socket,id=latent-mover,path=%s/" VMDIR_MOVER ",server=on,wait=off", dir);
	if (!r)
		r = add_option(launch, "-chardev", "socket,id=latent-agent,fd=%d", launch->qmp_vmm_fd);
	if (!r)
		r = add_option(launch, "-readconfig", "/proc/self/fd/%d", launch->monitor_fd);
	free(dir);
	return r;
}

/* It tries some pages of its own: once is enough. */
static bool is_kernel_sound(void)
{
	static enum { UNKNOWN, SOUND, UNSOUND } known;
	struct os_selftest_result kernel;

	if (!known)
		known = !os_selftest(&kernel) && os_selftest_sound(&kernel) && os_features_get()->populate_write ? SOUND :
														   UNSOUND;
	return known == SOUND;
}

/* The sentence that says why nothing may be mapped into guest RAM, or "". */
static const char *why_no_overlays(const struct launch *launch)
{

	if (launch->plan.excludes & COMPAT_OVERLAYS)
		return launch->plan.excluded_by;
	if (launch->no_overlays)
		return "--no-overlays: plain RAM was asked for";
	if (!is_kernel_sound())
		return "this kernel does not keep a rule that mapping images needs (see latent doctor)";
	return "";
}

/* The agent reads it in a moment. */
static void note_exec(const struct launch *launch)
{
	uint64_t now_us = os_now_us();

	if (launch->restore && pwrite(launch->config_fd, &now_us, sizeof now_us,
				      offsetof(struct agent_config, restore.step_us[RESTORE_EXEC])) < 0)
		cli_say("%s: the time of the start is not noted", launch->dir.name);
}

static int become_vmm(struct launch *launch)
{
	char number[16];
	int error;

	snprintf(number, sizeof number, "%d", launch->config_fd);
	if (preflight_set_preload(launch->agent_path) || setenv(AGENT_CONFIG_ENV, number, 1))
		return cli_fail(CLI_SYSTEM, "the environment for QEMU cannot be made: %s",
				strerror(errno));
	if (launch->plan.aio[0])
		cli_say("%s: what a drive with aio=%s reads is copied: leave it out, or say aio=threads", launch->dir.name,
			launch->plan.aio);
	if (why_no_overlays(launch)[0] && !launch->no_overlays)
		cli_say("%s: %s; its RAM stays plain", launch->dir.name, why_no_overlays(launch));
	note_exec(launch);
	execv(launch->vmm_path, launch->vmm_argv);
	error = errno;
	return cli_fail(error == ENOENT ? CLI_NOT_FOUND : CLI_NOT_EXECUTABLE, "%s cannot be run: %s",
			launch->vmm_path, strerror(error));
}

/* The other descriptors end with this process, which is about to. */
static void give_up(struct launch *launch)
{
	vmdir_abandon(&launch->dir);
	for (size_t i = 0; i < launch->vmm_argc; i++)
		free(launch->vmm_argv[i]);
	free(launch->vmm_argv);
	free(launch->vmm_path);
}

static int write_all(int fd, const void *data, size_t bytes)
{
	const char *at = data;

	while (bytes) {
		ssize_t n = write(fd, at, bytes);

		if (n < 0 && errno != EINTR)
			return -errno;
		if (n > 0) {
			at += n;
			bytes -= (size_t)n;
		}
	}
	return 0;
}

/* Ordinary files only: QEMU has to be able to read it again. */
static char *read_config(void *ctx, const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	char *text = NULL;
	struct stat st;
	ssize_t n;

	(void)ctx;
	if (fd >= 0 && !fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_size <= MAX_CONFIG_BYTES)
		text = malloc((size_t)st.st_size + 1);
	if (text) {
		n = pread(fd, text, (size_t)st.st_size, 0);
		text[n > 0 ? n : 0] = 0;
	}
	if (fd >= 0)
		close(fd);
	return text;
}
