/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/reader.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

/* ---- the snapshot's own files ------------------------------------------------------------------ */

static int open_regular(int dir_fd, const char *name, int flags, uint64_t *ret_bytes)
{
	int fd = openat(dir_fd, name, O_RDONLY | O_NONBLOCK | O_CLOEXEC | flags);
	struct stat st;

	if (fd < 0)
		return -errno;
	if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
		close(fd);
		return -EINVAL;
	}
	*ret_bytes = (uint64_t)st.st_size;
	return fd;
}

/* `m`: the manifest that they must belong to, or NULL. */
static int read_pages(int dir_fd, const struct manifest *m, struct snapshot_image *ret_image, char *why)
{
	uint64_t bytes;
	int fd = open_regular(dir_fd, SNAPSHOT_PAGES, O_NOFOLLOW, &bytes), r;

	if (fd < 0)
		return snapshot_fail(why, fd, SNAPSHOT_PAGES " cannot be opened: %s", strerror(-fd));
	r = m ? manifest_check_pages(m, fd, why) : 0;
	if (!r)
		r = snapshot_image_read(fd, ret_image, why);
	close(fd);
	return r;
}

static int open_ram(struct reader *r, char *why)
{
	uint64_t bytes = 0;

	r->ram_fd = open_regular(r->dir_fd, SNAPSHOT_RAM, O_NOFOLLOW, &bytes);
	if (r->ram_fd < 0)
		return snapshot_fail(why, r->ram_fd, SNAPSHOT_RAM " cannot be opened: %s",
				     strerror(-r->ram_fd));
	if (bytes != r->manifest.ram_bytes || bytes != os_bytes(r->image.pages))
		return snapshot_fail(why, -EBADMSG,
				     SNAPSHOT_RAM " is %ju bytes long, and %zu were expected",
				     (uintmax_t)bytes, os_bytes(r->image.pages));
	return 0;
}

static int open_packed(struct reader *r, char *why)
{
	uint64_t bytes = 0;

	r->packed_fd = open_regular(r->dir_fd, SNAPSHOT_PACKED, O_NOFOLLOW, &bytes);
	if (r->packed_fd < 0)
		return snapshot_fail(why, r->packed_fd, SNAPSHOT_PACKED " cannot be opened: %s",
				     strerror(-r->packed_fd));
	if (bytes != r->manifest.packed_bytes || r->manifest.ram_bytes != os_bytes(r->image.pages))
		return snapshot_fail(
			why, -EBADMSG,
			SNAPSHOT_PACKED " is %ju bytes long, and %ju were expected, of %zu bytes of RAM",
			(uintmax_t)bytes, (uintmax_t)r->manifest.packed_bytes, os_bytes(r->image.pages));
	return 0;
}

int reader_open(const char *dir, struct reader *r, char why[SNAPSHOT_WHY_BYTES])
{
	int e;

	*r = (struct reader){ .dir_fd = -1, .ram_fd = -1, .packed_fd = -1 };
	for (size_t i = 0; i < SNAPSHOT_VOLUMES; i++)
		r->file[i].fd = -1;
	if (!realpath(dir, r->path))
		return snapshot_fail(why, -errno, "it cannot be found: %s", strerror(errno));
	r->dir_fd = open(r->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (r->dir_fd < 0)
		return snapshot_fail(why, -errno, "it cannot be opened as a directory: %s",
				     strerror(errno));
	e = manifest_read(r->dir_fd, &r->manifest, why);
	if (!e)
		e = read_pages(r->dir_fd, &r->manifest, &r->image, why);
	if (!e && r->image.volumes > r->manifest.volumes)
		e = snapshot_fail(why, -EBADMSG,
				  SNAPSHOT_PAGES ": refers to %u files, and the manifest names %u",
				  r->image.volumes, r->manifest.volumes);
	if (!e)
		e = r->manifest.packed_bytes ? open_packed(r, why) : open_ram(r, why);
	return e;
}

int reader_need_ram(const struct reader *r, char why[SNAPSHOT_WHY_BYTES])
{
	return r->ram_fd >= 0
		       ? 0
		       : snapshot_fail(
				 why, -EOPNOTSUPP,
				 "its RAM is packed, and pages of it cannot be read one by one: use "
				 "a snapshot that was saved without --compress");
}

void reader_close(struct reader *r)
{
	snapshot_image_free(&r->image);
	machine_free(r->manifest.machine);
	r->manifest.machine = NULL;
	for (size_t i = 0; i < SNAPSHOT_VOLUMES; i++) {
		snapshot_image_free(&r->file[i].origin);
		if (r->file[i].fd >= 0)
			close(r->file[i].fd);
	}
	if (r->ram_fd >= 0)
		close(r->ram_fd);
	if (r->packed_fd >= 0)
		close(r->packed_fd);
	if (r->dir_fd >= 0)
		close(r->dir_fd);
	r->dir_fd = r->ram_fd = r->packed_fd = -1;
}

/* ---- files that it refers to ------------------------------------------------------------------- */

static int open_file(const struct manifest_volume *v, struct reader_file *file, char *why)
{
	struct manifest_volume now;
	uint64_t bytes;
	int r;

	file->fd = open_regular(AT_FDCWD, v->path, 0, &bytes);
	if (file->fd < 0)
		return snapshot_fail(why, file->fd,
				     "it needs %.180s, which cannot be opened (%s): put it back there",
				     v->path, strerror(-file->fd));
	r = manifest_compare(file->fd, v, &now);
	if (r == -ESTALE)
		return snapshot_fail(why, r, "it needs %.140s as it was: " MANIFEST_EXPECTED, v->path,
				     (uintmax_t)v->bytes, (uintmax_t)v->fingerprint);
	return r ? snapshot_fail(why, r, "%.200s cannot be read: %s", v->path, strerror(-r)) : 0;
}

int reader_open_files(struct reader *r, char why[SNAPSHOT_WHY_BYTES])
{
	int e = 0;

	for (uint32_t i = 0; !e && i < r->manifest.volumes; i++)
		e = open_file(&r->manifest.volume[i], &r->file[i], why);
	return e;
}

/* The directory that a snapshot's `ram` is in; a descriptor. */
static int open_beside(const char *path)
{
	char dir[MANIFEST_PATH_BYTES];
	const char *slash = strrchr(path, '/');
	int fd;

	if (!slash || strcmp(slash + 1, SNAPSHOT_RAM))
		return -ENOENT;
	snprintf(dir, sizeof dir, "%.*s", (int)(slash - path), path);
	fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

static int open_origin(const struct manifest_volume *v, struct reader_file *file, char *why)
{
	char words[SNAPSHOT_WHY_BYTES] = "its directory cannot be opened";
	int dir_fd = open_beside(v->path), r;

	r = dir_fd < 0 ? dir_fd : read_pages(dir_fd, NULL, &file->origin, words);
	if (!r && os_bytes(file->origin.pages) != v->bytes)
		r = snapshot_fail(words, -EBADMSG, SNAPSHOT_PAGES " is of another file");
	if (dir_fd >= 0)
		close(dir_fd);
	return r ? snapshot_fail(why, r, "nothing can be known of the contents of %.120s: %.80s",
				 v->path, words)
		 : 0;
}

int reader_open_origins(struct reader *r, char why[SNAPSHOT_WHY_BYTES])
{
	int e = 0;

	for (uint32_t i = 0; !e && i < r->manifest.volumes; i++)
		if (r->manifest.volume[i].role == MANIFEST_RAM)
			e = open_origin(&r->manifest.volume[i], &r->file[i], why);
	return e;
}

enum manifest_role reader_role_of(const char *path)
{
	struct manifest *m = malloc(sizeof *m);
	char why[SNAPSHOT_WHY_BYTES];
	int dir_fd = open_beside(path);
	bool is_ram = m && dir_fd >= 0 && !manifest_read(dir_fd, m, why);

	if (dir_fd >= 0)
		close(dir_fd);
	free(m);
	return is_ram ? MANIFEST_RAM : MANIFEST_IMAGE;
}

/* ---- pages ------------------------------------------------------------------------------------- */

bool reader_locate(const struct reader *r, uint64_t page, int *ret_file, uint64_t *ret_file_page)
{
	const struct snapshot_page *p = snapshot_page_at(&r->image, page);

	if (p->kind == SNAPSHOT_WORD)
		return false;
	*ret_file = p->kind == SNAPSHOT_VOLUME ? (int)p->volume : -1;
	*ret_file_page = p->kind == SNAPSHOT_DATA ? page : p->value;
	return true;
}

int reader_fd(const struct reader *r, int file)
{
	return file < 0 ? r->ram_fd : r->file[file].fd;
}

bool reader_checks(const struct reader *r, uint64_t page, const uint8_t *bytes)
{
	const struct snapshot_image *image = &r->image;
	struct snapshot_page is, was;
	uint64_t at;
	int file;

	if (!reader_locate(r, page, &file, &at))
		return true;
	if (file >= 0 && r->manifest.volume[file].role != MANIFEST_RAM)
		return true;
	if (file >= 0)
		image = &r->file[file].origin;
	if (at >= image->pages)
		return false;
	was = *snapshot_page_at(image, at);
	is = snapshot_classify(bytes);
	/* A run of pages is mapped with zeros in between, which are holes of the file. */
	return is.kind == was.kind && is.value == was.value && (was.kind == SNAPSHOT_DATA || !was.value);
}

static bool is_in_origin(const struct reader *r, uint64_t page)
{
	const struct snapshot_page *p = snapshot_page_at(&r->image, page);

	return p->kind == SNAPSHOT_VOLUME && r->manifest.volume[p->volume].role == MANIFEST_RAM;
}

int reader_verify_origins(const struct reader *r, uint64_t *ret_bad, char why[SNAPSHOT_WHY_BYTES])
{
	uint8_t bytes[OS_PAGE_BYTES];
	uint64_t bad = 0;

	for (uint64_t page = 0; page < r->image.pages; page++) {
		const struct snapshot_page *p = snapshot_page_at(&r->image, page);
		const char *path = r->manifest.volume[p->volume].path;
		int e;

		if (!is_in_origin(r, page))
			continue;
		e = os_read_all(r->file[p->volume].fd, bytes, sizeof bytes, os_bytes(p->value));
		if (e && e != -ENODATA)
			return snapshot_fail(why, e, "%.200s cannot be read: %s", path, strerror(-e));
		if ((e || !reader_checks(r, page, bytes)) && !bad++)
			snapshot_fail(why, 0, "%.150s: page %ju is not what was stored there", path,
				      (uintmax_t)p->value);
	}
	*ret_bad = bad;
	return 0;
}
