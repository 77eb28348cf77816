/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * latent restore: checks a snapshot, makes overlays of its disks, and becomes QEMU, whose agent fills guest RAM.
 * Nothing from the snapshot is run or opened by a path that it gives, but for disk images, which are opened
 * read-only and have to have the contents that they had.
 */
#include "cli/capture.h"
#include "cli/cli.h"
#include "cli/lazy.h"
#include "cli/props.h"
#include "cli/run.h"
#include "snapshot/manifest.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OPT_NAME, OPT_DISKS, OPT_DISKS_FROM, OPT_PAUSED };

static const struct cli_option options[] = {
	[OPT_NAME] = { "name", CLI_VALUE, "NAME", "name of the VM (default: QEMU's -name, or vm-PID)" },
	[OPT_DISKS] = { "disks", CLI_VALUE, "DIR", "where the VM's new overlay disks go (default: the current directory)" },
	[OPT_DISKS_FROM] = { "disks-from", CLI_VALUE, "DIR", "where a copy of the snapshot's disks/ is" },
	[OPT_PAUSED] = { "paused", CLI_FLAG, NULL, "do not let the guest run until `cont`" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_restore = {
	.name = "restore",
	.arguments = "[OPTIONS] DIR|URL -- qemu-system-x86_64 ...",
	.summary = "Start a virtual machine where a snapshot left it",
	.details = "Give the command line that the VM was started with. A -drive whose id is that of a saved disk\n"
		   "gets a new overlay of it, in place of its file; the snapshot itself is never written.",
	.options = options,
	.run = run,
};

struct restore {
	const char *dir, *name, *disks_dir, *disks_from;
	char disks_path[PATH_MAX]; /* absolute: -daemonize leaves the current directory */
	bool paused;
	int dir_fd;
	struct manifest manifest;
	struct agent_restore agent;
	unsigned next_virtio, next_none; /* numbers of drives that were given no id */
	char overlay[MANIFEST_DISKS][PATH_MAX];
	unsigned overlays; /* made */
	char **argv;
	int argc;
};

static int parse(struct cli_parser *parser, struct restore *r);
static int open_snapshot(struct restore *r);
static int open_files(struct restore *r);
static int open_volumes(struct restore *r);
static int check_disks(struct restore *r);
static int make_overlays(struct restore *r);
static int make_argv(struct restore *r, int argc, char **argv);
static void give_up(struct restore *r);

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv, .stop_at_operand = true };
	struct restore r = { .dir_fd = -1 };
	int status = parse(&parser, &r), next = parser.next;

	if (status != CLI_END)
		return cli_end_status(status);
	/* An option's -- has been taken: then no directory was given before it. */
	if (next < argc && strcmp(argv[next], "--") && strcmp(argv[next - 1], "--"))
		r.dir = argv[next++];
	if (r.dir && next < argc && argv[next][0] == '-' && strcmp(argv[next], "--"))
		return cli_fail(CLI_USAGE, "restore: options go before the directory (see latent restore --help)");
	if (next < argc && !strcmp(argv[next], "--"))
		next++;
	if (!r.dir || next >= argc)
		return cli_fail(CLI_USAGE, "restore: give a snapshot's directory, and QEMU's command line behind -- (see "
					   "latent restore --help)");
	if (!realpath(r.disks_dir ? r.disks_dir : ".", r.disks_path))
		return cli_fail(CLI_USAGE, "restore: %s, where the new disks would go, cannot be used (%s): make it, or give "
					   "another with --disks", r.disks_dir ? r.disks_dir : ".", strerror(errno));
	status = open_snapshot(&r);
	if (!status)
		status = open_volumes(&r);
	if (!status)
		status = check_disks(&r);
	if (!status)
		status = make_overlays(&r);
	if (!status)
		status = make_argv(&r, argc - next, argv + next);
	if (!status)
		status = run_restored(r.name, &r.agent, r.argc, r.argv);
	give_up(&r); /* a success does not come back */
	return status;
}

static int parse(struct cli_parser *parser, struct restore *r)
{
	int option;

	while ((option = cli_next_option(parser)) >= 0) {
		switch (option) {
		case OPT_NAME:
			if (!vmdir_name_ok(parser->value)) {
				cli_fail(CLI_USAGE, "restore: '%.80s' is no name for a VM", parser->value);
				return CLI_WRONG;
			}
			r->name = parser->value;
			break;
		case OPT_DISKS:
			r->disks_dir = parser->value;
			break;
		case OPT_DISKS_FROM:
			r->disks_from = parser->value;
			break;
		default:
			r->paused = true;
		}
	}
	return option;
}

/* ---- the snapshot's files ---------------------------------------------------------------------- */

/* Inherited by QEMU. */
static int open_file(struct restore *r, const char *name, uint64_t bytes, int32_t *ret_fd)
{
	int fd = openat(r->dir_fd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
	struct stat st;

	*ret_fd = fd;
	if (fd < 0)
		return cli_fail(CLI_NO_IMAGE, "%s/%s cannot be opened: %s", r->dir, name, strerror(errno));
	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || (bytes && (uint64_t)st.st_size != bytes))
		return cli_fail(CLI_NO_IMAGE, "%s/%s is not a file of %ju bytes, as the manifest says", r->dir, name,
				(uintmax_t)bytes);
	return CLI_OK;
}

/* A packed one, and one on a store elsewhere, come through a pager. */
static int open_snapshot(struct restore *r)
{
	char why[SNAPSHOT_WHY_BYTES], path[PATH_MAX];

	if (lazy_is_url(r->dir))
		return lazy_open(r->dir, &r->agent, &r->manifest);
	r->dir_fd = open(r->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (r->dir_fd < 0)
		return cli_fail(CLI_NO_IMAGE, "%s cannot be opened: %s", r->dir, strerror(errno));
	if (manifest_read(r->dir_fd, &r->manifest, why))
		return cli_fail(CLI_NO_IMAGE, "%s: %s", r->dir, why);
	if (!r->manifest.packed_bytes)
		return open_files(r);
	if (!realpath(r->dir, path))
		return cli_fail(CLI_NO_IMAGE, "%s cannot be found: %s", r->dir, strerror(errno));
	return lazy_open(path, &r->agent, &r->manifest);
}

static int open_files(struct restore *r)
{
	int status = open_file(r, SNAPSHOT_RAM, r->manifest.ram_bytes, &r->agent.ram_fd);

	r->agent.active = 1;
	if (!status)
		status = open_file(r, SNAPSHOT_PAGES, 0, &r->agent.pages_fd);
	if (!status)
		status = open_file(r, SNAPSHOT_STATE, r->manifest.state_bytes, &r->agent.state_fd);
	return status;
}

static int check_contents(const struct manifest_volume *v, int fd, const char *name)
{
	struct manifest_volume now;
	int r = manifest_compare(fd, v, &now);

	if (r && r != -ESTALE)
		return cli_fail(CLI_NO_IMAGE, "%s cannot be read: %s", name, strerror(-r));
	if (r)
		return cli_fail(CLI_NO_IMAGE, "%s is not the image that the VM had: its contents have changed since it "
					      "was saved", name);
	return CLI_OK;
}

static int open_volumes(struct restore *r)
{
	int status = CLI_OK;

	for (uint32_t i = 0; !status && i < r->manifest.volumes; i++) {
		const struct manifest_volume *v = &r->manifest.volume[i];
		int fd = open(v->path, O_RDONLY | O_NONBLOCK);
		struct stat st;

		r->agent.volume_fd[i] = fd;
		r->agent.volumes = i + 1;
		if (fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode))
			status = cli_fail(CLI_NO_IMAGE, "the image %s, which guest RAM refers to, cannot be opened (%s): put it "
					       "back there", v->path, fd < 0 ? strerror(errno) : "no file");
		else
			status = check_contents(v, fd, v->path);
	}
	return status;
}

/* ---- disks ------------------------------------------------------------------------------------- */

/* Where a layer is now; PATH_MAX bytes. */
static int find_layer(struct restore *r, const struct manifest_layer *layer, char *path)
{
	char within[PATH_MAX];

	if (!layer->file[0]) {
		snprintf(path, PATH_MAX, "%s", layer->volume.path);
		return CLI_OK;
	}
	if (r->disks_from)
		snprintf(within, sizeof within, "%.3900s/%s", r->disks_from, layer->file);
	else if (lazy_is_url(r->dir))
		return cli_fail(CLI_NO_IMAGE, "the disk %s is on %.200s: fetch its " SNAPSHOT_DISKS "/ and say where it is with "
				"--disks-from", layer->file, r->dir);
	else
		snprintf(within, sizeof within, "%.3900s/" SNAPSHOT_DISKS "/%s", r->dir, layer->file);
	if (!realpath(within, path))
		return cli_fail(CLI_NO_IMAGE, "%s cannot be found: %s", within, strerror(errno));
	return CLI_OK;
}

static int check_layer(struct restore *r, const struct manifest_layer *layer)
{
	char path[PATH_MAX];
	struct stat st;
	int status = find_layer(r, layer, path), fd;

	if (status)
		return status;
	fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode))
		status = cli_fail(CLI_NO_IMAGE, "%s cannot be opened as a file: %s", path, strerror(errno));
	else
		status = check_contents(&layer->volume, fd, path);
	if (fd >= 0)
		close(fd);
	return status;
}

static int check_disks(struct restore *r)
{
	int status = CLI_OK;

	for (uint32_t i = 0; i < r->manifest.disks; i++)
		for (uint32_t j = 0; !status && j < r->manifest.disk[i].layers; j++)
			status = check_layer(r, &r->manifest.disk[i].layer[j]);
	return status;
}

/* qemu-img is not to open what lies beneath: QEMU is told on its command line where that is. */
static int make_overlay(struct restore *r, uint32_t i)
{
	const struct manifest_disk *disk = &r->manifest.disk[i];
	const char *name = r->name ? r->name : r->manifest.name;
	char backing[PATH_MAX], size[24], *output;
	const char *argv[] = { "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F",
			       disk->layer[0].format, r->overlay[i], size, NULL };
	int status = find_layer(r, &disk->layer[0], backing);

	if (status)
		return status;
	snprintf(size, sizeof size, "%ju", (uintmax_t)disk->bytes);
	snprintf(r->overlay[i], sizeof r->overlay[i], "%.3900s/%.63s-%.63s.%d.qcow2", r->disks_path, name, disk->drive, (int)getpid());
	output = capture(argv, -1, 4096, 30, 0);
	free(output);
	if (!output)
		return cli_fail(CLI_SYSTEM, "qemu-img could not make the overlay %s", r->overlay[i]);
	r->overlays = i + 1;
	return CLI_OK;
}

static int make_overlays(struct restore *r)
{
	int status = CLI_OK;

	for (uint32_t i = 0; !status && i < r->manifest.disks; i++)
		status = make_overlay(r, i);
	return status;
}

/* ---- QEMU's command line ------------------------------------------------------------------------ */

/* text + ",KEY=VALUE"; takes the text, also on failure. */
static char *append(char *text, const char *prefix, const char *key, const char *value)
{
	char *escaped = props_escape(value), *longer = NULL;

	if (!text || !escaped || asprintf(&longer, "%s,%s%s=%s", text, prefix, key, escaped) < 0)
		longer = NULL;
	free(escaped);
	free(text);
	return longer;
}

/* The files beneath, by where they are now and not by what the files say of each other. */
static char *append_layers(struct restore *r, char *text, const struct manifest_disk *disk)
{
	static const char step[] = "backing.";
	char prefix[(sizeof step - 1) * MANIFEST_LAYERS + 1] = "", path[PATH_MAX];

	for (uint32_t i = 0; i < disk->layers; i++) {
		memcpy(prefix + i * (sizeof step - 1), step, sizeof step);
		if (find_layer(r, &disk->layer[i], path))
			break;
		text = append(text, prefix, "driver", disk->layer[i].format);
		text = append(text, prefix, "file.driver", "file");
		text = append(text, prefix, "file.filename", path);
	}
	return text;
}

/* "file=…,format=…" of a saved disk is replaced; all else is kept as it was written. */
static char *drive_with_overlay(struct restore *r, const struct props *props, bool used[MANIFEST_DISKS])
{
	const char *id = props_get(props, "id"), *interface = props_get(props, "if");
	char automatic[32], *text;
	uint32_t disk = 0;

	/* QEMU's own names, for those that have none. */
	if (!id && interface && (!strcmp(interface, "virtio") || !strcmp(interface, "none"))) {
		const char *index = props_get(props, "index");
		unsigned *next = interface[0] == 'v' ? &r->next_virtio : &r->next_none;

		if (index)
			*next = (unsigned)strtoul(index, NULL, 10);
		snprintf(automatic, sizeof automatic, "%s%u", interface, (*next)++);
		id = automatic;
	}
	while (disk < r->manifest.disks && (!id || strcmp(r->manifest.disk[disk].drive, id)))
		disk++;
	if (disk == r->manifest.disks)
		return NULL;
	used[disk] = true;
	text = append(strdup("format=qcow2"), "", "file", r->overlay[disk]);
	text = append_layers(r, text, &r->manifest.disk[disk]);
	for (size_t i = 0; i < props->count; i++)
		if (strcmp(props->items[i].key, "file") && strcmp(props->items[i].key, "format"))
			text = append(text, "", props->items[i].key, props->items[i].value);
	return text;
}

static int replace_drives(struct restore *r, bool used[MANIFEST_DISKS])
{
	for (int i = 1; i + 1 < r->argc; i++) {
		struct props props = { 0 };
		char *text;

		if (strcmp(r->argv[i], "-drive") && strcmp(r->argv[i], "--drive"))
			continue;
		if (!props_parse(&props, r->argv[i + 1], NULL)) {
			text = drive_with_overlay(r, &props, used);
			if (text)
				r->argv[i + 1] = text;
		}
		props_clear(&props);
	}
	return CLI_OK;
}

static int make_argv(struct restore *r, int argc, char **argv)
{
	bool used[MANIFEST_DISKS] = { false };
	int status;

	r->argv = calloc((size_t)argc + 2, sizeof *r->argv);
	if (!r->argv)
		return cli_fail(CLI_SYSTEM, "no memory");
	memcpy(r->argv, argv, (size_t)argc * sizeof *argv);
	r->argc = argc;
	if (r->paused)
		r->argv[r->argc++] = "-S";
	status = replace_drives(r, used);
	for (uint32_t i = 0; !status && i < r->manifest.disks; i++)
		if (!used[i])
			status = cli_fail(CLI_REFUSED, "no -drive on QEMU's command line is %s, which was saved: give the "
						       "line that the VM was started with, with id=%s in that disk's -drive",
					  r->manifest.disk[i].drive, r->manifest.disk[i].drive);
	return status;
}

static void give_up(struct restore *r)
{
	for (unsigned i = 0; i < r->overlays; i++)
		unlink(r->overlay[i]);
	free(r->argv);
	if (r->dir_fd >= 0)
		close(r->dir_fd);
}
