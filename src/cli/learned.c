/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/learned.h"

#include "vmdir/vmdir.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define KEPT 32 /* of so many snapshots: 16 MiB each at the most; the oldest ones go */

/* On a disk, if it is to be of use: it is contents, and outlives the host's next start. */
static int find_path(char path[VMDIR_PATH_BYTES])
{
	const char *chosen = getenv("LATENT_CACHE_DIR"), *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
	int length;

	if (chosen && *chosen)
		length = snprintf(path, VMDIR_PATH_BYTES, "%s/learned", chosen);
	else if (!geteuid())
		length = snprintf(path, VMDIR_PATH_BYTES, "/var/cache/latent/learned");
	else if (xdg && *xdg)
		length = snprintf(path, VMDIR_PATH_BYTES, "%s/latent/learned", xdg);
	else
		length = snprintf(path, VMDIR_PATH_BYTES, "%s/.cache/latent/learned", home ? home : "");
	return length < VMDIR_PATH_BYTES && path[0] == '/' ? 0 : -EINVAL;
}

static void make_dirs(char *path)
{
	for (char *slash = path; slash; slash = strchr(slash + 1, '/')) {
		if (slash == path)
			continue;
		*slash = 0;
		(void)mkdir(path, 0700);
		*slash = '/';
	}
	(void)mkdir(path, 0700);
}

/* What is in it becomes guest memory: nobody else may write there. */
static int open_dir(void)
{
	char path[VMDIR_PATH_BYTES];
	struct stat st;
	int fd;

	if (find_path(path))
		return -1;
	make_dirs(path);
	fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW); /* QEMU gets it */
	if (fd >= 0 && (fstat(fd, &st) || st.st_uid != geteuid() || st.st_mode & 077)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static int is_list(const struct dirent *entry) { return entry->d_name[0] != '.'; }

static void forget_oldest(int dir_fd)
{
	struct dirent **entries;
	int count = scandirat(dir_fd, ".", &entries, is_list, NULL), oldest = -1;
	time_t when = 0;
	struct stat st;

	for (int i = 0; i < count; i++)
		if (!fstatat(dir_fd, entries[i]->d_name, &st, AT_SYMLINK_NOFOLLOW) && (oldest < 0 || st.st_mtime < when)) {
			oldest = i;
			when = st.st_mtime;
		}
	if (count >= KEPT && oldest >= 0)
		(void)unlinkat(dir_fd, entries[oldest]->d_name, 0);
	for (int i = 0; i < count; i++)
		free(entries[i]);
	if (count >= 0)
		free(entries);
}

void learned_open(struct agent_restore *restore, bool learns)
{
	struct stat st;
	int dir_fd = fstat(restore->pages_fd, &st) ? -1 : open_dir();

	restore->learned_fd = restore->learn_dir_fd = -1;
	if (dir_fd < 0)
		return;
	snprintf(restore->learn_name, sizeof restore->learn_name, "%jx-%jx-%jx-%jx.%09ld", (uintmax_t)st.st_dev,
		 (uintmax_t)st.st_ino, (uintmax_t)st.st_size, (uintmax_t)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
	restore->learned_fd = openat(dir_fd, restore->learn_name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
	if (restore->learned_fd < 0)
		forget_oldest(dir_fd);
	if (learns)
		restore->learn_dir_fd = dir_fd;
	else
		close(dir_fd);
}
