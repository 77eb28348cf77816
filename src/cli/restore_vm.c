/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Checks a snapshot, makes overlays of its disks, and becomes QEMU, whose agent fills guest RAM. Nothing from the
 * snapshot is run or opened by a path that it gives, but for disk images, which are opened read-only and have to
 * have the contents that they had. A packed snapshot, and one on a store elsewhere, come through a pager.
 */
#include "cli/cli.h"
#include "cli/lazy.h"
#include "cli/learned.h"
#include "cli/overlay.h"
#include "cli/restore.h"
#include "os/os.h"
#include "snapshot/active.h"
#include "snapshot/drives.h"
#include "vmdir/props.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#define AHEAD_BYTES (64u << 20) /* of each file */

struct restore {
	const char *dir;
	const struct restore_request *request;
	int dir_fd;
	const struct manifest *manifest;
	struct run_restore vm;
	char root[VMDIR_PATH_BYTES];
	char overlay[MANIFEST_DISKS][PATH_MAX];
	bool used[MANIFEST_DISKS]; /* the line has it */
};

static int open_files(struct restore *r);
static int open_volumes(struct restore *r);
static int check_disks(struct restore *r);
static int make_overlays(struct restore *r);
static int make_line(struct restore *r);
static void give_up(struct restore *r);

static int read_manifest(const char *dir, struct manifest *ret_manifest)
{
	int dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC), r;
	char why[SNAPSHOT_WHY_BYTES];

	if (dir_fd < 0)
		return cli_fail(CLI_NO_IMAGE, "%s cannot be opened: %s", dir, strerror(errno));
	r = manifest_read(dir_fd, ret_manifest, why);
	close(dir_fd);
	return r ? cli_fail(CLI_NO_IMAGE, "%s: %s", dir, why) : CLI_OK;
}

int restore_prepare(struct restore_request *request, struct manifest *ret_manifest)
{
	int status;

	if (getrandom(&request->attempt, sizeof request->attempt, 0) != sizeof request->attempt)
		return cli_fail(CLI_SYSTEM, "no random number for the names of the new disks: %s", strerror(errno));
	status = lazy_is_url(request->dir) ? lazy_open(request->dir, &request->opened, ret_manifest)
					   : read_manifest(request->dir, ret_manifest);
	if (status)
		return status;
	request->manifest = ret_manifest;
	if (request->argc)
		return CLI_OK;
	if (!ret_manifest->machine)
		return cli_fail(CLI_REFUSED, "%s does not say what to run: %s. Give QEMU's command line after --",
				request->dir, ret_manifest->machine_missing[0] ? ret_manifest->machine_missing :
				"it is by an older Latent");
	if (machine_to_argv(ret_manifest->machine, &request->argc, &request->argv))
		return cli_fail(CLI_SYSTEM, "no memory");
	return CLI_OK;
}

static int open_snapshot(struct restore *r)
{
	char why[VMDIR_WHY_BYTES];

	if (vmdir_root(true, r->root, why))
		return cli_fail(CLI_RUN_DIR, "%s", why);
	if (lazy_is_url(r->dir))
		return CLI_OK;
	r->dir_fd = open(r->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (r->dir_fd < 0)
		return cli_fail(CLI_NO_IMAGE, "%s cannot be opened: %s", r->dir, strerror(errno));
	return CLI_OK;
}

static int note_checked(struct restore *r)
{
	r->vm.agent.step_us[RESTORE_CHECKED] = os_now_us();
	return CLI_OK;
}

static int become(struct restore *r)
{
	r->vm.agent.step_us[RESTORE_OVERLAYS] = os_now_us();
	r->vm.like = r->manifest->name;
	if (r->manifest->stood && r->vm.agent.then == RESTORE_THEN_RUN)
		r->vm.agent.then = RESTORE_THEN_STAND;
	return run_restored(&r->vm);
}

int restore_step(void)
{
	int r = os_fault(OS_FAULT_RESTORE_STEP);

	return r ? cli_fail(CLI_SYSTEM, "between two steps of the restore, on purpose: %s", strerror(-r))
		 : CLI_OK;
}

int restore_become(const struct restore_request *request)
{
	static int (*const steps[])(struct restore *) = {
		open_snapshot, open_files, open_volumes, check_disks, note_checked, make_overlays, make_line, become,
	};
	struct restore r = { .dir = request->dir, .request = request, .manifest = request->manifest,
			     .dir_fd = -1 };
	int status = CLI_OK;

	r.vm.agent = request->opened;
	r.vm.name = request->name;
	r.vm.number = request->number;
	r.vm.agent.active = 1;
	r.vm.agent.then = request->then;
	r.vm.agent.rest = request->rest;
	r.vm.agent.report_fd = request->report_fd;
	r.vm.agent.overlays_fd = -1;
	r.vm.agent.step_us[RESTORE_BEGUN] = request->begun_us;
	for (size_t i = 0; !status && i < sizeof steps / sizeof steps[0]; i++) {
		status = restore_step();
		if (!status)
			status = steps[i](&r);
	}
	give_up(&r); /* a success does not come back */
	return status;
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

/* A file may say that it is as long as it likes, and QEMU waits until storage has been asked for it. */
static void expect(int fd)
{
	struct stat st;

	if (!fstat(fd, &st))
		os_expect_read(fd, 0, (uint64_t)st.st_size < AHEAD_BYTES ? (uint64_t)st.st_size : AHEAD_BYTES);
}

/* What will be read from its beginning to its end comes from storage while QEMU starts. */
static void read_ahead(struct restore *r)
{
	expect(r->vm.agent.state_fd); /* first: it is checked here */
	expect(r->vm.agent.pages_fd);
	expect(r->vm.agent.active_fd); /* -1: there is none */
}

/* For this VM alone, with a connection of its own. */
static int open_lazily(struct restore *r, const char *source)
{
	static struct manifest again; /* large; as it was prepared: a pager serves one snapshot of a name */
	int status = lazy_open(source, &r->vm.agent, &again);

	machine_free(again.machine);
	return status;
}

static int open_files(struct restore *r)
{
	char path[PATH_MAX], why[SNAPSHOT_WHY_BYTES];
	int status;

	if (lazy_is_url(r->dir) && !r->request->number)
		return CLI_OK; /* opened already */
	if (lazy_is_url(r->dir)) {
		lazy_close(&r->vm.agent); /* it is another one's */
		return open_lazily(r, r->dir);
	}
	if (r->manifest->packed_bytes && !realpath(r->dir, path))
		return cli_fail(CLI_NO_IMAGE, "%s cannot be found: %s", r->dir, strerror(errno));
	if (r->manifest->packed_bytes)
		return open_lazily(r, path);
	status = open_file(r, SNAPSHOT_RAM, r->manifest->ram_bytes, &r->vm.agent.ram_fd);
	if (!status)
		status = open_file(r, SNAPSHOT_PAGES, 0, &r->vm.agent.pages_fd);
	if (!status)
		status = open_file(r, SNAPSHOT_STATE, r->manifest->state_bytes, &r->vm.agent.state_fd);
	/* There need not be any. */
	r->vm.agent.active_fd = openat(r->dir_fd, SNAPSHOT_ACTIVE, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
	if (status)
		return status;
	read_ahead(r);
	if (manifest_check_pages(r->manifest, r->vm.agent.pages_fd, why) ||
	    manifest_check_state(r->manifest, r->vm.agent.state_fd, why))
		return cli_fail(CLI_NO_IMAGE, "%s/%s", r->dir, why);
	return CLI_OK;
}

static int check_contents(const struct manifest_volume *v, int fd, const char *name)
{
	struct manifest_volume now;
	int r = manifest_compare(fd, v, &now);

	if (r && r != -ESTALE)
		return cli_fail(CLI_NO_IMAGE, "%s cannot be read: %s", name, strerror(-r));
	if (r)
		return cli_fail(CLI_NO_IMAGE, "%s has changed since the VM was saved: expected are " MANIFEST_EXPECTED, name,
				(uintmax_t)v->bytes, (uintmax_t)v->fingerprint);
	return CLI_OK;
}

static int open_volumes(struct restore *r)
{
	int status = CLI_OK;

	for (uint32_t i = 0; !status && i < r->manifest->volumes; i++) {
		const struct manifest_volume *v = &r->manifest->volume[i];
		int fd = open(v->path, O_RDONLY | O_NONBLOCK);
		struct stat st;

		r->vm.agent.volume_fd[i] = fd;
		r->vm.agent.volumes = i + 1;
		if (fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode))
			status = cli_fail(CLI_NO_IMAGE, "the %s %s, which guest RAM refers to, cannot be opened (%s): put it back "
					  "there", v->role == MANIFEST_RAM ? "RAM of another snapshot," : "image", v->path,
					  fd < 0 ? strerror(errno) : "no file");
		else
			status = check_contents(v, fd, v->path);
	}
	if (!status && !r->vm.agent.pager.active)
		learned_open(&r->vm.agent, r->request->number <= 1); /* one clone is enough */
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
	if (r->request->disks_from)
		snprintf(within, sizeof within, "%.3900s/%s", r->request->disks_from, layer->file);
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

	for (uint32_t i = 0; i < r->manifest->disks; i++)
		for (uint32_t j = 0; !status && j < r->manifest->disk[i].layers; j++)
			status = check_layer(r, &r->manifest->disk[i].layer[j]);
	return status;
}

/* In the directory of the new disks. Without a process id: an older disk, which may be in use, could have the same. */
static void name_overlay(const struct manifest *m, const char *name, uint32_t disk, uint64_t attempt,
			 char file[AGENT_OVERLAY_BYTES])
{
	snprintf(file, AGENT_OVERLAY_BYTES, "%.63s-%.63s.%016jx.qcow2", name, m->disk[disk].drive, (uintmax_t)attempt);
}

void restore_remove_overlays(const struct manifest *m, const char *disks_dir, const char *name, uint64_t attempt)
{
	for (uint32_t i = 0; i < m->disks; i++) {
		char path[PATH_MAX], file[AGENT_OVERLAY_BYTES];

		name_overlay(m, name, i, attempt, file);
		snprintf(path, sizeof path, "%.3900s/%s", disks_dir, file);
		(void)unlink(path);
	}
}

static int make_overlay(struct restore *r, uint32_t i)
{
	const struct manifest_disk *disk = &r->manifest->disk[i];
	const char *name = r->request->name ? r->request->name : r->manifest->name;
	char backing[PATH_MAX], file[AGENT_OVERLAY_BYTES];
	int status = find_layer(r, &disk->layer[0], backing), made;

	if (status)
		return status;
	name_overlay(r->manifest, name, i, r->request->attempt, file);
	snprintf(r->overlay[i], sizeof r->overlay[i], "%.3900s/%s", r->request->disks_dir, file);
	memcpy(r->vm.agent.overlay[i], file, sizeof file);
	made = overlay_make(r->root, r->overlay[i], backing, disk->layer[0].format, disk->bytes);
	if (made == -EIO)
		return cli_fail(CLI_SYSTEM, "qemu-img could not make an overlay of %ju bytes", (uintmax_t)disk->bytes);
	if (made)
		return cli_fail(CLI_SYSTEM, "the overlay %s could not be made: %s", r->overlay[i], strerror(-made));
	r->vm.agent.overlays = i + 1;
	return CLI_OK;
}

_Static_assert(AGENT_RESTORE_OVERLAYS >= MANIFEST_DISKS, "each disk has an overlay");

/* The agent gets the directory, too: it removes them again if the guest never runs. */
static int make_overlays(struct restore *r)
{
	int status = CLI_OK;

	if (r->manifest->disks) {
		r->vm.agent.overlays_fd = open(r->request->disks_dir, O_PATH | O_DIRECTORY);
		if (r->vm.agent.overlays_fd < 0)
			return cli_fail(CLI_USAGE, "%s cannot be opened: %s", r->request->disks_dir, strerror(errno));
	}
	for (uint32_t i = 0; !status && i < r->manifest->disks; i++)
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

/* What is said of the file, and of those beneath it, is ours to say. */
static bool is_of_file(const char *key)
{
	return !strcmp(key, "file") || !strcmp(key, "format") || !strcmp(key, "driver") || !strcmp(key, "backing") ||
	       !strncmp(key, "file.", 5) || !strncmp(key, "backing.", 8);
}

/* The file of a saved disk is replaced by its overlay; all else is kept as it was written. */
static char *drive_with_overlay(struct restore *r, const struct drive_word *w, bool node)
{
	char *text = strdup(node ? "driver=qcow2,file.driver=file" : "format=qcow2");

	r->used[w->disk] = true;
	text = append(text, "", node ? "file.filename" : "file", r->overlay[w->disk]);
	text = append_layers(r, text, &r->manifest->disk[w->disk]);
	for (size_t i = 0; i < w->props.count; i++)
		if (!is_of_file(w->props.items[i].key))
			text = append(text, "", w->props.items[i].key, w->props.items[i].value);
	return text;
}

/* A VM that begins again is another generation: QEMU draws the number. */
static char *new_generation(const char *value)
{
	struct props props = { 0 };
	const char *driver;
	char *text = NULL;

	if (!props_parse(&props, value, "driver")) {
		driver = props_get(&props, "driver");
		if (driver && !strcmp(driver, "vmgenid"))
			text = strdup("vmgenid");
		for (size_t i = 0; text && i < props.count; i++)
			if (strcmp(props.items[i].key, "driver") && strcmp(props.items[i].key, "guid"))
				text = append(text, "", props.items[i].key, props.items[i].value);
		if (text)
			text = append(text, "", "guid", "auto");
	}
	props_clear(&props);
	return text;
}

static bool is_option(const char *word, const char *option)
{
	return word[0] == '-' && !strcmp(word + 1 + (word[1] == '-'), option);
}

/* Words that are not replaced are copied. */
static int add_word(struct restore *r, const char *word, char *instead)
{
	r->vm.argv[r->vm.argc] = instead ? instead : strdup(word);
	return r->vm.argv[r->vm.argc++] ? 0 : -ENOMEM;
}

static int add_drive(struct restore *r, const struct drive_word *w, const char *option)
{
	bool node = is_option(option, "blockdev");
	char *text = w->role == DRIVE_SAVED ? drive_with_overlay(r, w, node) : NULL;
	int e;

	if (w->role == DRIVE_BENEATH)
		return 0;
	if (!text)
		return -ENOMEM;
	e = add_word(r, node ? "-blockdev" : "-drive", NULL);
	return e ? e : add_word(r, "", text);
}

static int add_words(struct restore *r, const struct drive_line *drives)
{
	char **argv = r->request->argv;
	int argc = r->request->argc, e = 0;

	for (int i = 0; !e && i < argc; i++) {
		const struct drive_word *w = &drives->word[i];

		if (w->role == DRIVE_SAVED || w->role == DRIVE_BENEATH) {
			e = add_drive(r, w, argv[i]);
			i += w->words - 1;
			continue;
		}
		if (is_option(argv[i], "S") && r->vm.agent.then == RESTORE_THEN_RUN)
			r->vm.agent.then = RESTORE_THEN_STAND;
		e = add_word(r, argv[i], NULL);
		if (!e && is_option(argv[i], "device") && i + 1 < argc) {
			i++;
			e = add_word(r, argv[i], new_generation(argv[i]));
		}
	}
	return e;
}

static int make_line(struct restore *r)
{
	const char *saved[MANIFEST_DISKS];
	struct drive_line drives = { 0 };
	int e;

	for (uint32_t i = 0; i < r->manifest->disks; i++)
		saved[i] = r->manifest->disk[i].drive;
	e = drives_find(r->request->argc, (const char *const *)r->request->argv, saved, r->manifest->disks, &drives);
	r->vm.argv = calloc(2 * (size_t)r->request->argc + 2, sizeof *r->vm.argv); /* a bare file becomes two words */
	if (!e && !r->vm.argv)
		e = -ENOMEM;
	if (!e)
		e = add_words(r, &drives);
	drives_free(&drives);
	if (e)
		return cli_fail(CLI_SYSTEM, "no memory");
	for (uint32_t i = 0; i < r->manifest->disks; i++)
		if (!r->used[i])
			return cli_fail(CLI_REFUSED, "no drive on QEMU's command line is %s, which was saved: give the line that "
					"the VM was started with, with id=%s in that disk's -drive", saved[i], saved[i]);
	return CLI_OK;
}

static void give_up(struct restore *r)
{
	for (unsigned i = 0; i < r->vm.agent.overlays; i++)
		unlink(r->overlay[i]);
	machine_free_argv(r->vm.argv);
	if (r->dir_fd >= 0)
		close(r->dir_fd);
}
