/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/files.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

uint32_t files_of(const struct manifest *m)
{
	uint32_t count = m->volumes;

	for (uint32_t i = 0; i < m->disks; i++)
		count += m->disk[i].layers ? m->disk[i].layers - 1 : 0;
	return count;
}

/* ---- the source's ---------------------------------------------------------------------------------- */

static int digest_path(const struct digest_reading *reading, const char *path, struct digest *digest,
		       char why[SNAPSHOT_WHY_BYTES])
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), r = fd < 0 ? -errno : digest_file(reading, fd, digest);

	if (fd >= 0)
		close(fd);
	return r && r != -EINTR ? snapshot_fail(why, r, "%.200s cannot be read: %s", path, strerror(-r)) : r;
}

int files_digest(const struct manifest *m, const struct digest_reading *reading, struct digest *digests,
		 char why[SNAPSHOT_WHY_BYTES])
{
	int r = 0;

	if (files_of(m) > WIRE_FILES_MAX)
		return snapshot_fail(why, -E2BIG, "the VM has more than %u images", WIRE_FILES_MAX);
	for (uint32_t i = 0; !r && i < m->volumes; i++)
		r = digest_path(reading, m->volume[i].path, digests++, why);
	for (uint32_t i = 0; i < m->disks; i++)
		for (uint32_t layer = 1; !r && layer < m->disk[i].layers; layer++)
			r = digest_path(reading, m->disk[i].layer[layer].volume.path, digests++, why);
	return r;
}

/* ---- the destination's ------------------------------------------------------------------------------- */

/* The result of a tick, which has said why, and is not the file's. */
static bool is_of_tick(const struct files_options *o, int r, const char *why)
{
	return r && o->reading.tick && why[0];
}

static int compare(const struct files_options *o, int fd, const struct digest *wanted)
{
	struct digest found;
	int r = digest_file(&o->reading, fd, &found);

	return r ? r : memcmp(&found, wanted, sizeof found) ? -ESTALE : 0;
}

static int open_volume(const struct files_options *o, uint32_t i, struct files *files, char why[SNAPSHOT_WHY_BYTES])
{
	int fd = open(o->find(o->find_ctx, o->manifest->volume[i].path), O_RDONLY | O_NONBLOCK), r;
	struct stat *st = &files->stat[i];

	if (fd < 0)
		return 0;
	r = fstat(fd, st) || !S_ISREG(st->st_mode) ? -ESTALE : compare(o, fd, &o->digests[i]);
	if (r) {
		close(fd);
		return is_of_tick(o, r, why) ? r : 0;
	}
	files->volume_fd[i] = fd;
	files->pages[i] = ((uint64_t)st->st_size + OS_PAGE_BYTES - 1) >> OS_PAGE_SHIFT;
	return 0;
}

int files_open(const struct files_options *o, struct files *files, char why[SNAPSHOT_WHY_BYTES])
{
	int r = 0;

	memset(files, 0, sizeof *files);
	memset(files->volume_fd, -1, sizeof files->volume_fd);
	why[0] = '\0';
	for (uint32_t i = 0; !r && i < o->manifest->volumes; i++)
		r = open_volume(o, i, files, why);
	return r;
}

static int check_layer(const struct files_options *o, const struct manifest_disk *disk, uint32_t layer,
		       const struct digest *digest, char why[SNAPSHOT_WHY_BYTES])
{
	const char *path = o->find(o->find_ctx, disk->layer[layer].volume.path);
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	int r = fd < 0 ? -errno : compare(o, fd, digest);

	if (fd >= 0)
		close(fd);
	if (!r || is_of_tick(o, r, why))
		return r;
	if (r == -ESTALE)
		return snapshot_fail(why, r, "the disk %.40s lies over %.150s, and here that has other contents: say with "
				     "--volume where the same file is", disk->drive, path);
	return snapshot_fail(why, r, "the disk %.40s lies over %.150s, which cannot be read here: say with --volume where it is "
			     "(%s)", disk->drive, path, strerror(-r));
}

int files_check_disks(const struct files_options *o, char why[SNAPSHOT_WHY_BYTES])
{
	const struct digest *digest = o->digests + o->manifest->volumes;
	int r = 0;

	why[0] = '\0';
	for (uint32_t i = 0; i < o->manifest->disks; i++)
		for (uint32_t layer = 1; !r && layer < o->manifest->disk[i].layers; layer++)
			r = check_layer(o, &o->manifest->disk[i], layer, digest++, why);
	return r;
}

int files_check_volumes(const struct files_options *o, const struct files *files, char why[SNAPSHOT_WHY_BYTES])
{
	for (uint32_t i = 0; i < o->manifest->volumes; i++) {
		struct stat now;

		if (files->volume_fd[i] >= 0 &&
		    (fstat(files->volume_fd[i], &now) || !digest_same_file(&now, &files->stat[i])))
			return snapshot_fail(why, -ESTALE, "%.200s was written while it was looked at",
					     o->find(o->find_ctx, o->manifest->volume[i].path));
	}
	return 0;
}

void files_close(struct files *files)
{
	for (uint32_t i = 0; i < SNAPSHOT_VOLUMES; i++)
		if (files->volume_fd[i] >= 0)
			close(files->volume_fd[i]);
}
