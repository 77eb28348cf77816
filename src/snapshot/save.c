/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/save.h"

#include "os/os.h"
#include "snapshot/describe.h"
#include "snapshot/disks.h"
#include "snapshot/maker.h"
#include "snapshot/manifest.h"
#include "snapshot/packed.h"
#include "snapshot/parent.h"
#include "snapshot/reader.h"
#include "snapshot/vmm.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

struct save {
	const struct save_options *options;
	struct save_result *result;
	char *why;
	struct manifest manifest;
	struct vmm vmm;
	struct source *source;
	struct snapshot_image image;
	struct active_page *active;
	struct maker maker;
	char overlay[MANIFEST_DISKS][PATH_MAX]; /* new, of the manifest's disks */
	unsigned overlays;      /* made, or begun */
	bool switched;          /* the guest uses them, or may: QEMU has not refused to */
	struct parent *parent;
	struct manifest_volume volume[SNAPSHOT_VOLUMES]; /* the agent's, then the parent's */
	uint32_t volumes;
	struct disk_names names; /* of the manifest's disks */
	struct manifest *kept;   /* with no_disks: has them, as far as they are files that a snapshot can have */
};

static int fail(struct save *s, int r, const char *format, ...) __attribute__((format(printf, 3, 4)));

static int fail(struct save *s, int r, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(s->why, SNAPSHOT_WHY_BYTES, format, args);
	va_end(args);
	return r;
}

/* Not part of the snapshot; but the pause waits for them, too. */
static int list_kept(struct save *s)
{
	char ignored[SNAPSHOT_WHY_BYTES], *why = s->vmm.why;
	struct disk_names names = { 0 };

	s->kept = calloc(1, sizeof *s->kept);
	if (!s->kept)
		return fail(s, -ENOMEM, "no memory for the list of disks");
	s->vmm.why = ignored;
	(void)disks_list(&s->vmm, s->options->cwd, s->kept, &names);
	s->vmm.why = why;
	return 0;
}

static int query(struct save *s)
{
	int r = s->options->no_disks ? list_kept(s) : 0;

	memcpy(s->manifest.qemu_version, s->vmm.version, sizeof s->manifest.qemu_version);
	s->manifest.stood = !s->vmm.ran;
	if (!r && !s->options->no_disks) {
		r = disks_list(&s->vmm, s->options->cwd, &s->manifest, &s->names);
		if (!r && s->names.relative && s->options->cwd_left)
			r = fail(s, -ENOTSUP, "a disk was given by a relative path, and -daemonize left that directory: QEMU "
				 "cannot open it again; start the VM with absolute paths, or use --no-disk");
	}
	if (r)
		return r;
	describe_nodes(s->vmm.qmp, &s->manifest);
	describe_machine(s->vmm.qmp, s->options->run_dir, &s->manifest);
	return 0;
}

/* QEMU stops a guest and then waits until what its disks were written is on storage. What is there by then nobody has to
 * wait for. */
static int sync_disks(struct save *s, struct source_progress *progress)
{
	progress->syncing = true;
	disks_sync(s->kept ? s->kept : &s->manifest, &progress->stop);
	progress->syncing = false;
	return progress->stop ? fail(s, -EINTR, "a signal ended it") : 0;
}

/* ---- the pause ------------------------------------------------------------------------------- */

/* NAME.1.qcow2 beside the disk, or the first such name that is free; taken at once, for another save may want it, too. */
static int open_free_name(const char *old, char path[PATH_MAX])
{
	const char *slash = strrchr(old, '/'), *base = slash ? slash + 1 : old, *dot = strchr(base, '.');
	int stem = (int)(dot && dot > base ? dot - old : (long)strlen(old));

	for (unsigned n = 1; n < 10000; n++) {
		int fd;

		if (snprintf(path, PATH_MAX, "%.*s.%u.qcow2", stem, old, n) >= PATH_MAX)
			return -ENAMETOOLONG;
		fd = open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
		if (fd >= 0 || errno != EEXIST)
			return fd < 0 ? -errno : fd;
	}
	return -EEXIST;
}

/* Whoever may not read the disk may not read this. */
static int reserve_overlay(struct save *s, uint32_t disk)
{
	const char *old = s->manifest.disk[disk].layer[0].volume.path;
	struct stat st;
	int fd, r;

	if (stat(old, &st))
		return fail(s, -errno, "%.200s cannot be looked at: %s", old, strerror(errno));
	fd = open_free_name(old, s->overlay[disk]);
	if (fd < 0)
		return fail(s, fd, "no new overlay of %.180s can be made: %s", old, strerror(-fd));
	s->overlays = disk + 1;
	r = fchmod(fd, (st.st_mode & 0666) | 0600) ? -errno : 0;
	close(fd);
	return r ? fail(s, r, "%.200s cannot be made as private as what lies beneath it", s->overlay[disk]) : 0;
}

/* Over the empty file. qemu-img does not open what lies beneath: the VM has it in use. */
static int create_overlay(struct save *s, const struct manifest_disk *disk, const char *path)
{
	const struct manifest_layer *top = &disk->layer[0];
	char size[24];
	char *argv[] = { "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", (char *)top->volume.path, "-F",
			 (char *)top->format, (char *)path, size, NULL };
	int status = -1, error;
	pid_t pid;

	snprintf(size, sizeof size, "%ju", (uintmax_t)disk->bytes);
	error = posix_spawnp(&pid, argv[0], NULL, NULL, argv, environ);
	if (error)
		return fail(s, -error, "qemu-img cannot be run: %s", strerror(error));
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	return status ? fail(s, -EIO, "qemu-img could not make the overlay %.200s", path) : 0;
}

/* The files stay where they are, beneath the running VM; the snapshot has other names for them. What cannot get
 * one, and is not the VM's own (another owner's, another file system's), is referred to. */
static int link_layers(struct save *s, struct manifest_disk *disk)
{
	for (uint32_t i = 0; i < disk->layers; i++) {
		struct manifest_layer *layer = &disk->layer[i];
		char path[128];

		snprintf(path, sizeof path, SNAPSHOT_DISKS "/%s", layer->file);
		if (!linkat(AT_FDCWD, layer->volume.path, s->maker.dir_fd, path, 0))
			continue;
		if (!i)
			return fail(s, -errno, "%.150s cannot become part of the snapshot (%s): save onto the same file "
				    "system, or use --no-disk", layer->volume.path, strerror(errno));
		layer->file[0] = '\0';
	}
	return 0;
}

/* Before the pause: what is there then needs only to be opened. */
static int make_overlays(struct save *s)
{
	int r = 0;

	for (uint32_t i = 0; !r && i < s->manifest.disks; i++)
		r = link_layers(s, &s->manifest.disk[i]);
	for (uint32_t i = 0; !r && i < s->manifest.disks; i++) {
		r = reserve_overlay(s, i);
		if (!r)
			r = create_overlay(s, &s->manifest.disk[i], s->overlay[i]);
	}
	return r;
}

/* Whatever comes next: with the file that was the disk nobody should start a VM any more. */
static void note_disks(struct save *s, bool unsure)
{
	for (uint32_t i = 0; i < s->manifest.disks; i++) {
		const struct manifest_disk *disk = &s->manifest.disk[i];

		snprintf(s->result->disk[i].drive, sizeof s->result->disk[i].drive, "%s", disk->drive);
		snprintf(s->result->disk[i].before, sizeof s->result->disk[i].before, "%s", disk->layer[0].volume.path);
		snprintf(s->result->disk[i].now, sizeof s->result->disk[i].now, "%.255s", s->overlay[i]);
	}
	s->result->disks = s->manifest.disks;
	s->result->disks_unsure = unsure;
}

/* From this instant on the guest writes to new files; the old ones belong to the snapshot. QEMU may do so also when it has not
 * answered in time. */
static int switch_disks(struct save *s)
{
	struct json_object *arguments, *actions = json_object_new_array();
	int r;

	for (uint32_t i = 0; i < s->manifest.disks; i++) {
		struct json_object *action = json_object_new_object(), *data = json_object_new_object();
		char node[32];

		snprintf(node, sizeof node, "latent-%llx", (unsigned long long)os_now_us());
		json_object_object_add(data, s->names.is_node[i] ? "node-name" : "device",
				       json_object_new_string(s->names.device[i]));
		if (s->names.is_node[i])
			json_object_object_add(data, "snapshot-node-name", json_object_new_string(node));
		json_object_object_add(data, "snapshot-file", json_object_new_string(s->overlay[i]));
		json_object_object_add(data, "mode", json_object_new_string("existing"));
		json_object_object_add(data, "format", json_object_new_string("qcow2"));
		json_object_object_add(action, "type", json_object_new_string("blockdev-snapshot-sync"));
		json_object_object_add(action, "data", data);
		json_object_array_add(actions, action);
	}
	if (!s->manifest.disks) {
		json_object_put(actions);
		return 0;
	}
	arguments = json_object_new_object();
	json_object_object_add(arguments, "actions", actions);
	r = vmm_run(&s->vmm, "transaction", arguments, NULL);
	s->switched = r != -EREMOTEIO;
	if (s->switched)
		note_disks(s, r);
	return r;
}

static int step(struct save *s, const char *done)
{
	return maker_step(done, s->why);
}

static void note_pause(struct save *s, enum save_pause done)
{
	s->result->pause_step_us[done] = s->vmm.stopped_us ? os_now_us() - s->vmm.stopped_us : 0;
}

static int go_on(struct save *s)
{
	int r = vmm_go_on(&s->vmm);

	if (s->vmm.continued_us)
		s->result->pause_us = s->vmm.continued_us - s->vmm.stopped_us;
	s->result->pause_step_us[SAVE_RESUMED] = s->result->pause_us;
	return r;
}

static int wait_until(struct save *s, uint64_t until_us, const struct source_progress *progress)
{
	while (os_now_us() < until_us) {
		if (progress->stop)
			return fail(s, -EINTR, "a signal ended it");
		usleep(5000);
	}
	return 0;
}

static int watch(struct save *s, const struct source_progress *progress)
{
	int r = source_watch(s->source, s->why);

	return r ? r : wait_until(s, os_now_us() + s->options->before_ms * 1000ull, progress);
}

/* A restored guest goes on from the same instant: what this one touches next is what that one will touch first. */
static int watch_on(struct save *s, int ram_fd, const struct source_progress *progress)
{
	if (!s->vmm.continued_us)
		return 0;
	if (!s->options->compress)
		(void)sync_file_range(ram_fd, 0, 0, SYNC_FILE_RANGE_WRITE); /* begins what will be waited for */
	return wait_until(s, s->vmm.continued_us + s->options->after_ms * 1000ull, progress);
}

static int pause_and_take(struct save *s)
{
	int r = vmm_begin_pause(&s->vmm);

	if (!r)
		r = step(s, "the migration of the device state is started");
	if (!r)
		r = vmm_wait_stopped(&s->vmm);
	note_pause(s, SAVE_STOPPED);
	if (!r)
		r = step(s, "the guest is stopped");
	if (!r)
		r = switch_disks(s);
	note_pause(s, SAVE_DISKS);
	if (!r)
		r = step(s, "the disks are switched");
	if (!r)
		r = vmm_save_devices(&s->vmm, &s->manifest.state_bytes);
	s->result->state_bytes = s->manifest.state_bytes;
	note_pause(s, SAVE_DEVICES);
	if (!r)
		r = step(s, "the device state is there");
	if (!r)
		r = source_point(s->source, &s->result->point_us, s->why);
	note_pause(s, SAVE_POINT);
	return r ? r : step(s, "the point in time is taken");
}

/* ---- files ----------------------------------------------------------------------------------- */

/* Volumes that no page refers to are not needed to restore it. */
static void take_volumes(struct save *s)
{
	uint32_t place[SNAPSHOT_VOLUMES] = { 0 };

	snapshot_image_count(&s->image, &s->result->pages);
	s->image.volumes = 0;
	for (uint32_t i = 0; i < s->volumes; i++) {
		if (!s->result->pages.in_volume[i])
			continue;
		place[i] = s->image.volumes++;
		s->manifest.volume[place[i]] = s->volume[i];
		if (s->volume[i].role == MANIFEST_RAM)
			s->result->pages_in_ram += s->result->pages.in_volume[i];
	}
	s->manifest.volumes = s->image.volumes;
	for (uint64_t i = 0; i < s->image.pages; i++) {
		struct snapshot_page *page = snapshot_page_at(&s->image, i);

		if (page->kind == SNAPSHOT_VOLUME)
			page->volume = place[page->volume];
	}
}

static int write_ram(struct save *s, struct source_progress *progress)
{
	int fd = maker_create(&s->maker, SNAPSHOT_RAM, s->why), r;

	if (fd < 0)
		return fd;
	r = source_write(s->source, fd, s->parent, s->options->limit_bytes_s, progress, &s->image, s->why);
	if (!r)
		r = watch_on(s, fd, progress);
	if (!r) {
		r = source_list_active(s->source, &s->image, &s->active, &s->result->active_pages);
		if (r)
			fail(s, r, "no memory for the list of active pages");
	}
	if (!r)
		r = step(s, "the contents of RAM are written");
	/* While the agent still knows of this process: if it dies now, the agent lets the guest go on. */
	if (s->options->stop && !r)
		r = go_on(s);
	else if (s->options->stop)
		vmm_undo(&s->vmm);
	/* Guest RAM is let go before the disk is waited for. */
	source_get_counts(s->source, &s->result->source);
	source_end(s->source);
	s->source = NULL;
	if (s->options->compress)
		close(fd); /* it goes again when it is packed */
	else
		r = maker_close(fd, SNAPSHOT_RAM, r, s->why);
	if (!r)
		r = step(s, "guest RAM is let go");
	if (r)
		return r;
	take_volumes(s);
	s->manifest.ram_bytes = os_bytes(s->image.pages);
	return maker_write_pages(&s->maker, &s->image, s->why);
}

static int write_state(struct save *s)
{
	uint64_t bytes = s->manifest.state_bytes;
	void *state = mmap(NULL, bytes ? bytes : 1, PROT_READ, MAP_SHARED, s->vmm.state_fd, 0);
	int fd, r;

	if (state == MAP_FAILED)
		return fail(s, -errno, "the device state cannot be read");
	s->manifest.state_digest = XXH3_64bits(state, bytes);
	s->manifest.pages_digest = s->image.checksum; /* they are written */
	fd = r = maker_create(&s->maker, SNAPSHOT_STATE, s->why);
	if (fd >= 0) {
		r = os_write_all(fd, state, bytes, 0);
		if (r)
			fail(s, r, SNAPSHOT_STATE " cannot be written: %s", strerror(-r));
		r = maker_close(fd, SNAPSHOT_STATE, r, s->why);
	}
	munmap(state, bytes ? bytes : 1);
	return r ? r : step(s, "the device state is written");
}

/* In the image's numbers, which are the manifest's. */
static int open_volumes(struct save *s, int fds[SNAPSHOT_VOLUMES])
{
	int r = 0;

	for (uint32_t i = 0; i < SNAPSHOT_VOLUMES; i++)
		fds[i] = -1;
	for (uint32_t i = 0; !r && i < s->manifest.volumes; i++) {
		fds[i] = open(s->manifest.volume[i].path, O_RDONLY | O_CLOEXEC);
		if (fds[i] < 0)
			r = fail(s, -errno, "%.200s cannot be read: %s", s->manifest.volume[i].path, strerror(errno));
	}
	return r;
}

static int write_active(struct save *s)
{
	int volumes[SNAPSHOT_VOLUMES], ram = -1, fd = -1, r = open_volumes(s, volumes);

	if (!r && !s->options->compress) { /* a packed one is restored in the order of the list, without the copies */
		ram = openat(s->maker.dir_fd, SNAPSHOT_RAM, O_RDONLY | O_CLOEXEC);
		r = ram < 0 ? fail(s, -errno, SNAPSHOT_RAM " cannot be read") : 0;
	}
	if (!r)
		r = fd = maker_create(&s->maker, SNAPSHOT_ACTIVE, s->why);
	if (fd >= 0) {
		r = active_write(fd, s->active, s->result->active_pages, &s->image, ram, volumes);
		if (r)
			fail(s, r, SNAPSHOT_ACTIVE " cannot be written: %s", strerror(-r));
		r = maker_close(fd, SNAPSHOT_ACTIVE, r, s->why);
	}
	for (uint64_t i = 0; i < s->result->active_pages; i++)
		s->result->active_written_pages += s->active[i].flags & ACTIVE_WRITTEN;
	for (uint32_t i = 0; i < SNAPSHOT_VOLUMES; i++)
		if (volumes[i] >= 0)
			close(volumes[i]);
	if (ram >= 0)
		close(ram);
	return r ? r : step(s, "the active pages are written");
}

/* The guest's pages come in the order in which they are about to change; they are packed in their own. So all of
 * them are in a file first, which nobody has to wait for. */
static int pack_ram(struct save *s, const struct source_progress *progress)
{
	int from = openat(s->maker.dir_fd, SNAPSHOT_RAM, O_RDONLY | O_CLOEXEC), to, r;

	if (from < 0)
		return fail(s, -errno, SNAPSHOT_RAM " cannot be read: %s", strerror(errno));
	to = r = maker_create(&s->maker, SNAPSHOT_PACKED, s->why);
	if (to >= 0) {
		r = packed_write(&s->image, from, to, &progress->stop, &s->manifest.packed_bytes, s->why);
		r = maker_close(to, SNAPSHOT_PACKED, r, s->why);
	}
	close(from);
	(void)unlinkat(s->maker.dir_fd, SNAPSHOT_RAM, 0);
	s->result->packed_bytes = s->manifest.packed_bytes;
	return r ? r : step(s, "RAM is packed");
}

static int identify(struct save *s, struct manifest_volume *v)
{
	int fd = open(v->path, O_RDONLY | O_CLOEXEC), r;

	r = fd < 0 ? -errno : manifest_identify(fd, v);
	if (fd >= 0)
		close(fd);
	return r ? fail(s, r, "%.200s cannot be read: %s", v->path, strerror(-r)) : 0;
}

/* Pages refer to what was mapped or compared, and that must be what is found by its path. */
static int identify_volume(struct save *s, struct manifest_volume *v)
{
	const uint64_t dev = v->dev, ino = v->ino;
	int r = identify(s, v);

	if (!r && (v->dev != dev || v->ino != ino))
		r = fail(s, -ESTALE, "%.150s has been replaced, and RAM refers to the file that was there: put that back",
			 v->path);
	return r;
}

static int identify_layers(struct save *s, struct manifest_disk *disk)
{
	int r = 0;

	for (uint32_t i = 0; !r && i < disk->layers; i++)
		r = identify(s, &disk->layer[i].volume);
	return r;
}

/* The guest does not write it any more, and nobody should. */
static void freeze_disk(const struct manifest_disk *disk)
{
	struct stat st;

	if (!stat(disk->layer[0].volume.path, &st))
		(void)chmod(disk->layer[0].volume.path, st.st_mode & 0555);
}

/* Files that pages may refer to, by their number: the agent's, then what the parent has beside them. */
static void list_volumes(struct save *s, const struct control_layout *layout)
{
	for (uint32_t i = 0; i < layout->volumes; i++) {
		struct manifest_volume *v = &s->volume[i];

		memcpy(v->path, layout->volume[i].path, sizeof v->path);
		v->dev = layout->volume[i].dev;
		v->ino = layout->volume[i].ino;
		v->role = reader_role_of(v->path);
	}
	s->volumes = layout->volumes;
	if (s->parent)
		parent_join_volumes(s->parent, s->volume, &s->volumes);
}

static int write_manifest(struct save *s, const struct source_progress *progress)
{
	int r = 0;

	snprintf(s->manifest.name, sizeof s->manifest.name, "%s", s->options->name);
	s->manifest.created_unix_s = (uint64_t)time(NULL);
	if (s->parent)
		parent_describe(s->parent, &s->manifest.parent);
	for (uint32_t i = 0; !r && i < s->manifest.volumes; i++)
		r = identify_volume(s, &s->manifest.volume[i]);
	for (uint32_t i = 0; !r && i < s->manifest.disks; i++) {
		freeze_disk(&s->manifest.disk[i]);
		r = identify_layers(s, &s->manifest.disk[i]);
	}
	if (!r)
		r = write_active(s);
	if (!r && s->options->compress)
		r = pack_ram(s, progress);
	if (!r) {
		r = manifest_write(&s->manifest, s->maker.dir_fd);
		if (r)
			fail(s, r, SNAPSHOT_MANIFEST " cannot be written: %s", strerror(-r));
	}
	return r ? r : step(s, "the manifest is written");
}

/* ---- all of it ------------------------------------------------------------------------------- */

static int connect_agent(struct save *s, struct source_progress *progress)
{
	uint64_t begin_us = os_now_us();
	char path[VMDIR_PATH_BYTES];
	int r;

	snprintf(path, sizeof path, "%.230s/" VMDIR_CONTROL, s->options->run_dir);
	r = source_open(path, progress, &s->source, s->why);
	s->result->load_us = progress->load_now ? os_now_us() - begin_us : 0;
	return r;
}

static int connect_vm(struct save *s, struct source_progress *progress)
{
	int r = vmm_open(s->options->run_dir, &progress->stop, s->why, &s->vmm);

	if (!r)
		r = query(s);
	if (!r)
		r = sync_disks(s, progress); /* most of it, while nothing is held */
	if (!r)
		r = make_overlays(s);
	if (!r)
		r = step(s, "new overlays are made");
	if (r)
		return r;
	r = source_begin(s->source, s->why);
	return r ? r : step(s, "guest RAM is held");
}

static int save(struct save *s, struct source_progress *progress)
{
	uint64_t begin_us;
	int r = s->options->parent ? parent_open(s->options->parent, &s->parent, s->why) : 0;

	if (!r)
		r = maker_begin(s->options->dir, &s->maker, s->why);
	if (!r)
		r = connect_agent(s, progress);
	if (!r)
		r = connect_vm(s, progress);
	if (!r)
		r = watch(s, progress);
	if (!r)
		r = source_arm(s->source, s->why);
	if (!r)
		r = sync_disks(s, progress); /* and what was written since */
	if (!r)
		r = step(s, "what the disks were written is on storage");
	if (r)
		return r;
	r = pause_and_take(s);
	if (!r && !s->options->stop)
		r = go_on(s);
	if (!r)
		r = step(s, s->options->stop ? "all is known" : "the guest goes on");
	if (r) {
		vmm_undo(&s->vmm);
		return r;
	}
	list_volumes(s, source_layout(s->source));
	begin_us = os_now_us();
	r = write_ram(s, progress);
	if (!r)
		r = write_state(s);
	if (!r)
		r = write_manifest(s, progress);
	if (!r)
		r = maker_complete(&s->maker, s->why);
	s->result->write_us = os_now_us() - begin_us;
	s->result->ram_bytes_written = progress->bytes_written;
	return r;
}

int snapshot_save(const struct save_options *options, struct source_progress *progress,
		  struct save_result *ret_result, char why[SNAPSHOT_WHY_BYTES])
{
	struct save *s = calloc(1, sizeof *s);
	int r;

	*ret_result = (struct save_result){ 0 };
	if (!s)
		return -ENOMEM;
	s->options = options;
	s->result = ret_result;
	s->why = why;
	s->maker.dir_fd = s->vmm.state_fd = -1;
	r = save(s, progress);
	source_end(s->source);
	vmm_close(&s->vmm);
	maker_end(&s->maker);
	for (unsigned i = 0; !s->switched && i < s->overlays; i++)
		(void)unlink(s->overlay[i]);
	snapshot_image_free(&s->image);
	free(s->active);
	machine_free(s->manifest.machine);
	parent_close(s->parent);
	free(s->kept);
	free(s);
	return r;
}
