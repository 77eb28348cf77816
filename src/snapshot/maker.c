/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/maker.h"

#include "os/os.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int maker_step(const char *done, char why[SNAPSHOT_WHY_BYTES])
{
	int r = os_fault(OS_FAULT_SAVE_STEP);

	return r ? snapshot_fail(why, r, "after the step \"%s\", on purpose: %s", done, strerror(-r))
		 : 0;
}

int maker_begin(const char *dir, struct maker *m, char why[SNAPSHOT_WHY_BYTES])
{
	struct stat st;

	*m = (struct maker){ .dir = dir, .dir_fd = -1 };
	if (!lstat(dir, &st))
		return snapshot_fail(why, -EEXIST, "%.200s is there already", dir);
	if (snprintf(m->partial, sizeof m->partial, "%s.partial-XXXXXX", dir) >= (int)sizeof m->partial) {
		m->partial[0] = '\0';
		return snapshot_fail(why, -ENAMETOOLONG, "the name of the directory is too long");
	}
	if (!mkdtemp(m->partial)) {
		int r = -errno;

		m->partial[0] = '\0';
		return snapshot_fail(why, r, "%.200s cannot be made: %s", dir, strerror(-r));
	}
	m->dir_fd = open(m->partial, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (m->dir_fd < 0 || mkdirat(m->dir_fd, SNAPSHOT_DISKS, 0700))
		return snapshot_fail(why, -errno, "%.200s cannot be used: %s", m->partial,
				     strerror(errno));
	return maker_step("the directory is made", why);
}

int maker_create(struct maker *m, const char *name, char why[SNAPSHOT_WHY_BYTES])
{
	int fd = openat(m->dir_fd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

	return fd < 0 ? snapshot_fail(why, -errno, "%s cannot be made: %s", name, strerror(errno)) : fd;
}

int maker_close(int fd, const char *name, int r, char why[SNAPSHOT_WHY_BYTES])
{
	if (!r && fsync(fd))
		r = snapshot_fail(why, -errno, "%s cannot be written: %s", name, strerror(errno));
	close(fd);
	return r;
}

int maker_write_pages(struct maker *m, struct snapshot_image *image, char why[SNAPSHOT_WHY_BYTES])
{
	int fd = maker_create(m, SNAPSHOT_PAGES, why), r;

	if (fd < 0)
		return fd;
	r = snapshot_image_write(image, fd);
	if (r)
		snapshot_fail(why, r, SNAPSHOT_PAGES " cannot be written: %s", strerror(-r));
	r = maker_close(fd, SNAPSHOT_PAGES, r, why);
	return r ? r : maker_step(SNAPSHOT_PAGES " is written", why);
}

static int sync_directory(int dir_fd, const char *name)
{
	int fd = openat(dir_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC), r;

	if (fd < 0)
		return -errno;
	r = fsync(fd) ? -errno : 0;
	close(fd);
	return r;
}

int maker_complete(struct maker *m, char why[SNAPSHOT_WHY_BYTES])
{
	int r = sync_directory(m->dir_fd, SNAPSHOT_DISKS);

	if (!r)
		r = sync_directory(m->dir_fd, ".");
	if (!r && rename(m->partial, m->dir))
		r = -errno;
	if (r)
		return snapshot_fail(why, r, "%.200s cannot get its name: %s", m->dir, strerror(-r));
	m->partial[0] = '\0';
	(void)sync_directory(m->dir_fd, "..");
	return 0;
}

/* Nobody but this process has made anything in it. */
static void remove_files(int dir_fd, const char *name)
{
	int fd = openat(dir_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);
	const struct dirent *entry;

	if (!dir)
		return;
	while ((entry = readdir(dir)))
		(void)unlinkat(fd, entry->d_name, 0); /* directories stay */
	closedir(dir);
}

void maker_end(struct maker *m)
{
	if (m->partial[0] && m->dir_fd >= 0) {
		remove_files(m->dir_fd, SNAPSHOT_DISKS);
		(void)unlinkat(m->dir_fd, SNAPSHOT_DISKS, AT_REMOVEDIR);
		remove_files(m->dir_fd, ".");
	}
	if (m->partial[0])
		(void)rmdir(m->partial);
	if (m->dir_fd >= 0)
		close(m->dir_fd);
	m->partial[0] = '\0';
	m->dir_fd = -1;
}
