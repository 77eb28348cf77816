/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/hint.h"

#include "os/os.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define RUN_PAGES 64u /* that are read at once */

const struct manifest_layer *hint_layer(const struct manifest *m, uint32_t n, bool *ret_own)
{
	for (uint32_t i = 0; i < m->disks; i++) {
		if (n < m->disk[i].layers) {
			if (ret_own)
				*ret_own = !n;
			return &m->disk[i].layer[n];
		}
		n -= m->disk[i].layers;
	}
	return NULL;
}

/* ---- the source's ---------------------------------------------------------------------------------- */

void hint_number(const struct manifest *m, const struct control_layout *layout, uint64_t there,
		 struct hint_numbers *numbers)
{
	const struct manifest_layer *layer;
	struct stat st;

	memset(numbers, -1, sizeof *numbers);
	for (uint32_t n = 0; n < WIRE_HINT_FILES && (layer = hint_layer(m, n, NULL)); n++) {
		if (!(there >> n & 1) || stat(layer->volume.path, &st))
			continue;
		for (uint32_t i = 0; i < layout->origins; i++)
			if (layout->origin[i].dev == st.st_dev && layout->origin[i].ino == st.st_ino)
				numbers->file[i] = (int32_t)n;
	}
}

/* ---- the destination's ------------------------------------------------------------------------------- */

/* The source says what a disk is called, and nothing else of this host's is its business. */
static bool is_disk_of(DIR *descriptors, const char *path)
{
	const struct dirent *entry;
	struct stat wanted, st;

	if (!descriptors || stat(path, &wanted) || !(S_ISREG(wanted.st_mode) || S_ISBLK(wanted.st_mode)))
		return false;
	rewinddir(descriptors);
	while ((entry = readdir(descriptors)))
		if (!fstatat(dirfd(descriptors), entry->d_name, &st, 0) && st.st_ino == wanted.st_ino && st.st_dev == wanted.st_dev)
			return true;
	return false;
}

/* What another host has written since it was cached here must be read anew: O_DIRECT, or what comes near it. */
static void open_file(struct hint_files *files, uint32_t n, const char *path, bool own)
{
	int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, fd = own ? open(path, flags | O_DIRECT) : -1;

	files->file[n].own = own;
	files->file[n].direct = fd >= 0;
	files->file[n].fd = fd >= 0 ? fd : open(path, flags);
}

int hint_open(const struct manifest *m, pid_t vmm, const char *(*find)(void *ctx, const char *path), void *ctx,
	      struct hint_files *files)
{
	const struct manifest_layer *layer;
	DIR *descriptors;
	char path[32];
	bool own;

	for (uint32_t n = 0; n < WIRE_HINT_FILES; n++)
		files->file[n].fd = -1;
	files->room = aligned_alloc(OS_PAGE_BYTES, RUN_PAGES << OS_PAGE_SHIFT);
	if (!files->room)
		return -ENOMEM;
	snprintf(path, sizeof path, "/proc/%d/fd", (int)vmm);
	descriptors = opendir(path);
	for (uint32_t n = 0; n < WIRE_HINT_FILES && (layer = hint_layer(m, n, &own)); n++)
		if (is_disk_of(descriptors, find(ctx, layer->volume.path)))
			open_file(files, n, find(ctx, layer->volume.path), own);
	if (descriptors)
		closedir(descriptors);
	return 0;
}

void hint_close(struct hint_files *files)
{
	for (uint32_t n = 0; files->room && n < WIRE_HINT_FILES; n++)
		if (files->file[n].fd >= 0)
			close(files->file[n].fd);
	free(files->room);
	files->room = NULL;
}

uint64_t hint_there(const struct hint_files *files)
{
	uint64_t there = 0;

	for (uint32_t n = 0; n < WIRE_HINT_FILES; n++)
		there |= (uint64_t)(files->file[n].fd >= 0) << n;
	return there;
}

static ssize_t read_run(struct hint_files *files, uint32_t n, uint64_t page, size_t pages)
{
	off_t at = (off_t)os_bytes(page);
	int fd = files->file[n].fd;
	ssize_t got = os_fault(OS_FAULT_STORAGE_READ);

	if (got)
		return got;
	if (files->file[n].direct) {
		got = pread(fd, files->room, os_bytes(pages), at);
		if (got >= 0 || errno != EINVAL)
			return got;
		(void)fcntl(fd, F_SETFL, O_NONBLOCK); /* its blocks are larger than pages */
		files->file[n].direct = false;
	}
	if (files->file[n].own)
		(void)posix_fadvise(fd, at, (off_t)os_bytes(pages), POSIX_FADV_DONTNEED);
	return pread(fd, files->room, os_bytes(pages), at);
}

size_t hint_read(struct hint_files *files, const struct wire_hint *hints, size_t count, const uint8_t **ret_contents,
		 size_t *ret_read)
{
	size_t pages = 1;
	ssize_t got;

	while (pages < count && pages < RUN_PAGES && hints[pages].file == hints->file &&
	       hints[pages].file_page == hints->file_page + pages)
		pages++;
	got = read_run(files, hints->file, hints->file_page, pages);
	*ret_read = got > 0 ? (size_t)got >> OS_PAGE_SHIFT : 0;
	*ret_contents = files->room;
	return pages;
}
