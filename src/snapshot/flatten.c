/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/flatten.h"

#include "os/os.h"
#include "snapshot/active.h"
#include "snapshot/maker.h"
#include "snapshot/reader.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHUNK_PAGES 256u

struct flatten {
	struct reader from;
	struct maker to;
	struct snapshot_image image; /* the new one's metadata */
	struct manifest manifest;    /* and manifest */
	uint32_t place[SNAPSHOT_VOLUMES]; /* of the old one's volumes that are images, in the new manifest */
	struct store store;
	struct source_progress *progress;
	uint64_t copied_in;
	uint8_t *chunk;
	char *why;
};

static int fail(struct flatten *f, int r, const char *format, ...) __attribute__((format(printf, 3, 4)));

static int fail(struct flatten *f, int r, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(f->why, SNAPSHOT_WHY_BYTES, format, args);
	va_end(args);
	return r;
}

static int step(struct flatten *f, const char *done)
{
	if (f->progress->stop)
		return fail(f, -EINTR, "a signal ended it");
	return maker_step(done, f->why);
}

/* ---- RAM --------------------------------------------------------------------------------------- */

static bool is_on_image(const struct flatten *f, const struct snapshot_page *p)
{
	return p->kind == SNAPSHOT_VOLUME && f->from.manifest.volume[p->volume].role == MANIFEST_IMAGE;
}

/* Pages without contents, and those on images, stay what they are. */
static bool keep(struct flatten *f, uint64_t page)
{
	struct snapshot_page p = *snapshot_page_at(&f->from.image, page);

	if (p.kind != SNAPSHOT_WORD && !is_on_image(f, &p))
		return false;
	if (p.kind == SNAPSHOT_VOLUME)
		p.volume = f->place[p.volume];
	*snapshot_page_at(&f->image, page) = p;
	return true;
}

/* As many pages from `page` on as follow each other in one file. */
static uint64_t run_at(struct flatten *f, uint64_t page, int *ret_file, uint64_t *ret_file_page)
{
	uint64_t n = 0, at;
	int file;

	(void)reader_locate(&f->from, page, ret_file, ret_file_page);
	do
		n++;
	while (n < CHUNK_PAGES && page + n < f->image.pages && reader_locate(&f->from, page + n, &file, &at) &&
	       file == *ret_file && at == *ret_file_page + n);
	return n;
}

static int copy_run(struct flatten *f, uint64_t page, uint64_t pages, int file, uint64_t file_page)
{
	const char *name = file < 0 ? SNAPSHOT_RAM : f->from.manifest.volume[file].path;
	int r = os_read_all(reader_fd(&f->from, file), f->chunk, os_bytes(pages), os_bytes(file_page));

	if (r)
		return fail(f, r, "%.200s cannot be read: %s", name, strerror(-r));
	for (uint64_t i = 0; i < pages; i++)
		if (!reader_checks(&f->from, page + i, f->chunk + os_bytes(i)))
			return fail(f, -EBADMSG, "%.150s: page %ju is not what was stored there: it is damaged", name,
				    (uintmax_t)(file_page + i));
	f->copied_in += file < 0 ? 0 : pages;
	r = store_pages(&f->store, page, f->chunk, pages);
	return r ? fail(f, r, "the contents of RAM cannot be written: %s", strerror(-r)) : 0;
}

static int copy_pages(struct flatten *f)
{
	int r = 0;

	f->progress->pages_all = f->image.pages;
	for (uint64_t page = 0; !r && page < f->image.pages;) {
		uint64_t pages, file_page;
		int file;

		if (keep(f, page)) {
			page++;
			f->progress->pages_done++;
			continue;
		}
		pages = run_at(f, page, &file, &file_page);
		r = copy_run(f, page, pages, file, file_page);
		if (!r && f->progress->stop)
			r = fail(f, -EINTR, "a signal ended it");
		page += pages;
	}
	return r;
}

static int write_ram(struct flatten *f)
{
	int fd = maker_create(&f->to, SNAPSHOT_RAM, f->why), r;

	if (fd < 0)
		return fd;
	r = store_begin(&f->image, fd, NULL, f->progress, &f->store);
	if (r) {
		fail(f, r, "no memory");
	} else {
		r = copy_pages(f);
		store_end(&f->store);
	}
	if (!r && ftruncate(fd, (off_t)os_bytes(f->image.pages)))
		r = fail(f, -errno, "the contents of RAM cannot be written: %s", strerror(errno));
	r = maker_close(fd, SNAPSHOT_RAM, r, f->why);
	if (!r)
		r = step(f, "the contents of RAM are written");
	return r ? r : maker_write_pages(&f->to, &f->image, f->why);
}

/* ---- other files ------------------------------------------------------------------------------- */

static int copy_range(struct flatten *f, int from, int to, uint64_t begin, uint64_t end)
{
	for (uint64_t at = begin; at < end;) {
		size_t bytes = end - at < os_bytes(CHUNK_PAGES) ? (size_t)(end - at) : os_bytes(CHUNK_PAGES);
		int r = os_read_all(from, f->chunk, bytes, at);

		if (!r)
			r = f->progress->stop ? -EINTR : os_write_all(to, f->chunk, bytes, at);
		if (r)
			return r;
		at += bytes;
	}
	return 0;
}

/* Holes stay holes. */
static int copy_contents(struct flatten *f, int from, int to)
{
	uint64_t begin, end = 0;
	struct stat st;
	int r = fstat(from, &st) ? -errno : 0;

	while (!r && os_next_data(from, end, (uint64_t)st.st_size, &begin, &end))
		r = copy_range(f, from, to, begin, end);
	if (!r && (ftruncate(to, st.st_size) || fchmod(to, st.st_mode & 0777)))
		r = -errno;
	return r;
}

/* `finish`: what is to be changed in the copy, or NULL. */
static int copy_file(struct flatten *f, const char *name, int (*finish)(int fd, const struct snapshot_image *image))
{
	int from = openat(f->from.dir_fd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC), to, r;

	if (from < 0)
		return fail(f, -errno, "%s cannot be opened: %s", name, strerror(errno));
	to = r = maker_create(&f->to, name, f->why);
	if (to >= 0) {
		r = copy_contents(f, from, to);
		if (!r && finish)
			r = finish(to, &f->image);
		if (r)
			fail(f, r, "%s cannot be copied: %s", name, r == -EINTR ? "a signal ended it" : strerror(-r));
		r = maker_close(to, name, r, f->why);
	}
	close(from);
	return r;
}

/* A restore does without, too. Page numbers and contents are those of the old one. */
static int copy_active(struct flatten *f)
{
	if (faccessat(f->from.dir_fd, SNAPSHOT_ACTIVE, F_OK, AT_SYMLINK_NOFOLLOW) && errno == ENOENT)
		return 0;
	return copy_file(f, SNAPSHOT_ACTIVE, active_rebind);
}

static int check_layer(struct flatten *f, const struct manifest_layer *layer, const char *name)
{
	int fd = openat(f->from.dir_fd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	struct manifest_volume now;
	int r = fd < 0 ? -errno : manifest_compare(fd, &layer->volume, &now);

	if (fd >= 0)
		close(fd);
	if (r == -ESTALE)
		return fail(f, r, "%.60s has changed: expected are " MANIFEST_EXPECTED, name, (uintmax_t)layer->volume.bytes,
			    (uintmax_t)layer->volume.fingerprint);
	return r ? fail(f, r, "%.60s cannot be read: %s", name, strerror(-r)) : 0;
}

/* A second name for the same file; on another file system a copy, which is another file with the same contents. */
static int take_layer(struct flatten *f, struct manifest_layer *layer)
{
	char name[128];
	int r;

	snprintf(name, sizeof name, SNAPSHOT_DISKS "/%s", layer->file);
	if (!layer->file[0])
		return 0;
	if (!linkat(f->from.dir_fd, name, f->to.dir_fd, name, 0))
		return 0;
	if (errno != EXDEV && errno != EPERM && errno != EMLINK && errno != EOPNOTSUPP)
		return fail(f, -errno, "%s cannot become part of the new snapshot: %s", name, strerror(errno));
	r = copy_file(f, name, NULL);
	if (!r) {
		struct stat st;

		if (fstatat(f->to.dir_fd, name, &st, AT_SYMLINK_NOFOLLOW))
			return fail(f, -errno, "%s cannot be read: %s", name, strerror(errno));
		layer->volume.dev = st.st_dev;
		layer->volume.ino = st.st_ino;
		layer->volume.mtime_ns = (uint64_t)st.st_mtim.tv_sec * 1000000000u + (uint64_t)st.st_mtim.tv_nsec;
	}
	return r;
}

static int for_layers(struct flatten *f, int (*visit)(struct flatten *f, struct manifest_layer *layer))
{
	int r = 0;

	for (uint32_t i = 0; i < f->manifest.disks; i++)
		for (uint32_t j = 0; !r && j < f->manifest.disk[i].layers; j++)
			r = visit(f, &f->manifest.disk[i].layer[j]);
	return r;
}

/* ---- all of it --------------------------------------------------------------------------------- */

static int check_own_layer(struct flatten *f, struct manifest_layer *layer)
{
	char name[128];

	snprintf(name, sizeof name, SNAPSHOT_DISKS "/%s", layer->file);
	return layer->file[0] ? check_layer(f, layer, name) : 0;
}

static int check_state(struct flatten *f)
{
	int fd = openat(f->from.dir_fd, SNAPSHOT_STATE, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC), r;

	if (fd < 0)
		return fail(f, -errno, SNAPSHOT_STATE " cannot be opened: %s", strerror(errno));
	r = manifest_check_state(&f->from.manifest, fd, f->why);
	close(fd);
	return r;
}

/* It must be the old one's, to become the new one's. */
static int check_active(struct flatten *f)
{
	int fd = openat(f->from.dir_fd, SNAPSHOT_ACTIVE, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC), r;
	char words[SNAPSHOT_WHY_BYTES] = SNAPSHOT_ACTIVE ": cannot be read";
	struct active_set set = { 0 };

	if (fd < 0 && errno == ENOENT)
		return 0;
	r = fd < 0 ? -errno : active_read(fd, &f->from.image, &set, words);
	active_free(&set);
	if (fd >= 0)
		close(fd);
	return r ? fail(f, r, "%.150s: remove the file, and nothing but speed is lost", words) : 0;
}

/* What can be wrong with the old one, but for single pages, is found before anything is written. */
static int open_old(struct flatten *f, const char *dir)
{
	int r = reader_open(dir, &f->from, f->why);

	if (!r)
		r = reader_need_ram(&f->from, f->why);
	if (!r)
		r = reader_open_files(&f->from, f->why);
	if (!r)
		r = reader_open_origins(&f->from, f->why);
	if (!r)
		r = check_state(f);
	if (!r)
		r = check_active(f);
	f->manifest = f->from.manifest;
	return r ? r : for_layers(f, check_own_layer);
}

static int prepare(struct flatten *f)
{
	struct manifest *m = &f->manifest;
	int r;

	m->parent = (struct manifest_parent){ .path = "" };
	m->volumes = 0;
	for (uint32_t i = 0; i < f->from.manifest.volumes; i++) {
		if (f->from.manifest.volume[i].role != MANIFEST_IMAGE)
			continue;
		f->place[i] = m->volumes;
		m->volume[m->volumes++] = f->from.manifest.volume[i];
	}
	f->chunk = malloc(os_bytes(CHUNK_PAGES));
	r = f->chunk ? snapshot_image_create(&f->from.image, &f->image) : -ENOMEM;
	f->image.volumes = m->volumes;
	return r ? fail(f, r, "no memory") : 0;
}

static int flatten(struct flatten *f, const char *new_dir)
{
	int r = prepare(f);

	if (!r)
		r = maker_begin(new_dir, &f->to, f->why);
	if (!r)
		r = write_ram(f);
	if (!r)
		r = copy_file(f, SNAPSHOT_STATE, NULL);
	if (!r)
		r = step(f, "the device state is copied");
	if (!r)
		r = copy_active(f);
	if (!r)
		r = for_layers(f, take_layer);
	if (!r)
		r = step(f, "the disks are there");
	f->manifest.pages_digest = f->image.checksum;
	if (!r) {
		r = manifest_write(&f->manifest, f->to.dir_fd);
		if (r)
			fail(f, r, SNAPSHOT_MANIFEST " cannot be written: %s", strerror(-r));
	}
	if (!r)
		r = step(f, "the manifest is written");
	return r ? r : maker_complete(&f->to, f->why);
}

int snapshot_flatten(const char *dir, const char *new_dir, struct source_progress *progress,
		     struct flatten_result *ret_result, char why[SNAPSHOT_WHY_BYTES])
{
	struct flatten *f = calloc(1, sizeof *f);
	int r;

	if (!f) {
		snprintf(why, SNAPSHOT_WHY_BYTES, "no memory");
		return -ENOMEM;
	}
	f->why = why;
	f->progress = progress;
	f->to.dir_fd = -1;
	r = open_old(f, dir);
	if (!r)
		r = flatten(f, new_dir);
	if (!r) {
		ret_result->pages_copied_in = f->copied_in;
		ret_result->bytes_written = progress->bytes_written;
		snapshot_image_count(&f->image, &ret_result->pages);
	}
	maker_end(&f->to);
	reader_close(&f->from);
	snapshot_image_free(&f->image);
	free(f->chunk);
	free(f);
	return r;
}
