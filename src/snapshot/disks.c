/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/disks.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define SYNC_BYTES (64ll << 20)

struct listing {
	const char *cwd;
	char *why;
	struct manifest *manifest;
	struct disk_names *names;
};

static const char *text_of(struct json_object *json, const char *key)
{
	struct json_object *value;

	return json_object_object_get_ex(json, key, &value) ? json_object_get_string(value) : "";
}

/* The path of an image, which QEMU calls json:{...} when it was given more than a path. */
static void path_of(struct listing *l, struct json_object *image, char path[MANIFEST_PATH_BYTES])
{
	const char *name = text_of(image, "filename");
	struct json_object *json = strncmp(name, "json:", 5) ? NULL : json_tokener_parse(name + 5), *file;

	if (json && json_object_object_get_ex(json, "file", &file))
		name = text_of(file, "filename");
	l->names->relative = l->names->relative || *name != '/';
	if (snprintf(path, MANIFEST_PATH_BYTES, "%s%s%s", *name == '/' ? "" : l->cwd, *name == '/' ? "" : "/", name) >=
	    MANIFEST_PATH_BYTES)
		path[0] = '\0';
	json_object_put(json);
}

/* Such a node, too, is called json:{...}, with the path of the whole file in it. */
static bool is_part_of_file(struct json_object *image)
{
	const char *name = text_of(image, "filename");
	struct json_object *json = strncmp(name, "json:", 5) ? NULL : json_tokener_parse(name + 5), *node = json;
	bool is = false;

	do
		is = !strcmp(text_of(node, "driver"), "raw") && (json_object_object_get_ex(node, "offset", NULL) ||
								 json_object_object_get_ex(node, "size", NULL));
	while (!is && json_object_object_get_ex(node, "file", &node));
	json_object_put(json);
	return is;
}

static bool is_plain_format(const char *format)
{
	return !strcmp(format, "qcow2") || !strcmp(format, "raw");
}

/* The files of a disk, as query-block's ImageInfo has them. */
static int take_layers(struct listing *l, struct json_object *image, struct manifest_disk *disk)
{
	struct json_object *value;

	if (json_object_object_get_ex(image, "virtual-size", &value))
		disk->bytes = (uint64_t)json_object_get_int64(value);
	do {
		struct manifest_layer *layer = &disk->layer[disk->layers];
		const char *file = layer->volume.path, *format = text_of(image, "format");

		if (disk->layers == MANIFEST_LAYERS)
			return snapshot_fail(l->why, -E2BIG, "the disk %.60s lies over more than %d files: join some "
					     "(block-stream)", disk->drive, MANIFEST_LAYERS);
		path_of(l, image, layer->volume.path);
		if (is_plain_format(format) && access(file, R_OK))
			return snapshot_fail(l->why, -ENOENT, "the disk %.60s has its file %.100s no more (%s): put it back, or "
					     "use --no-disk", disk->drive, file, strerror(errno));
		if (!is_plain_format(format))
			return snapshot_fail(l->why, -ENOTSUP, "the disk %.60s uses %.80s (%.10s): only qcow2 and raw files can "
					     "be part of a snapshot; use --no-disk and save it yourself", disk->drive, file,
					     format);
		if (is_part_of_file(image))
			return snapshot_fail(l->why, -ENOTSUP, "the disk %.60s uses a part of a file (offset=, size=), and only "
					     "whole files can be part of a snapshot: use --no-disk and save it yourself", disk->drive);
		snprintf(layer->format, sizeof layer->format, "%s", format);
		snprintf(layer->file, sizeof layer->file, "disk%u.%u.%s", l->manifest->disks, disk->layers, format);
		disk->layers++;
	} while (json_object_object_get_ex(image, "backing-image", &image));
	return 0;
}

/* One disk of query-block, if it is writable. */
static int take_disk(struct listing *l, struct json_object *device)
{
	struct json_object *inserted, *value;
	uint32_t n = l->manifest->disks;
	struct manifest_disk *disk = &l->manifest->disk[n];
	const char *name = text_of(device, "device");
	int r;

	if (!json_object_object_get_ex(device, "inserted", &inserted))
		return 0;
	if (json_object_object_get_ex(inserted, "ro", &value) && json_object_get_boolean(value))
		return 0;
	if (n == MANIFEST_DISKS)
		return snapshot_fail(l->why, -E2BIG, "more than %d writable disks", MANIFEST_DISKS);
	l->names->is_node[n] = !*name;
	if (!*name)
		name = text_of(inserted, "node-name");
	snprintf(l->names->device[n], sizeof l->names->device[n], "%s", name);
	snprintf(disk->drive, sizeof disk->drive, "%s", name);
	if (!json_object_object_get_ex(inserted, "image", &value))
		return snapshot_fail(l->why, -ENOTSUP, "QEMU says nothing of the files of the disk %.60s: use --no-disk", name);
	r = take_layers(l, value, disk);
	l->manifest->disks += !r;
	return r;
}

int disks_list(struct vmm *vmm, const char *cwd, struct manifest *manifest, struct disk_names *names)
{
	struct listing l = { .cwd = cwd, .why = vmm->why, .manifest = manifest, .names = names };
	struct json_object *devices = NULL;
	int r = vmm_run(vmm, "query-block", NULL, &devices);

	for (size_t i = 0; !r && devices && i < json_object_array_length(devices); i++)
		r = take_disk(&l, json_object_array_get_idx(devices, i));
	json_object_put(devices);
	return r;
}

/* In pieces: nothing ends an fdatasync. That then has only the file's metadata to bring. */
static void sync_file(int fd, const _Atomic bool *stop)
{
	off_t bytes = lseek(fd, 0, SEEK_END);

	for (off_t at = 0; at < bytes && !*stop; at += SYNC_BYTES)
		(void)sync_file_range(fd, at, SYNC_BYTES, SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
	if (!*stop)
		(void)fdatasync(fd);
}

void disks_sync(const struct manifest *manifest, const _Atomic bool *stop)
{
	for (uint32_t i = 0; i < manifest->disks; i++) {
		int fd = open(manifest->disk[i].layer[0].volume.path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

		if (fd >= 0) {
			sync_file(fd, stop);
			close(fd);
		}
	}
}
