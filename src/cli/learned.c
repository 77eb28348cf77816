/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/learned.h"

#include "snapshot/active.h"
#include "vmdir/vmdir.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define KEPT 32 /* of so many snapshots: 16 MiB each at the most; the oldest ones go */
#define BEGUN_S 3600 /* what was begun so long ago is somebody's who was killed */

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
static int is_begun(const struct dirent *entry) { return !strncmp(entry->d_name, ".new-", 5); }

static int compare_ages(const void *a, const void *b)
{
	time_t one = *(const time_t *)a, other = *(const time_t *)b;

	return one < other ? -1 : one > other;
}

/* Of the files of the directory that are chosen, those that were written before the time. */
static void remove_older(int dir_fd, int (*chosen)(const struct dirent *), time_t than)
{
	struct dirent **entries;
	int count = scandirat(dir_fd, ".", &entries, chosen, NULL);
	struct stat st;

	for (int i = 0; i < count; i++) {
		if (!fstatat(dir_fd, entries[i]->d_name, &st, AT_SYMLINK_NOFOLLOW) && st.st_mtime < than)
			(void)unlinkat(dir_fd, entries[i]->d_name, 0);
		free(entries[i]);
	}
	if (count >= 0)
		free(entries);
}

/* When the oldest of those was written that stay; 0: all do. */
static time_t oldest_kept(int dir_fd)
{
	struct dirent **entries;
	int count = scandirat(dir_fd, ".", &entries, is_list, NULL), known = 0;
	time_t *times = count > 0 ? calloc((size_t)count, sizeof *times) : NULL, oldest = 0;
	struct stat st;

	for (int i = 0; i < count; i++) {
		if (times && !fstatat(dir_fd, entries[i]->d_name, &st, AT_SYMLINK_NOFOLLOW))
			times[known++] = st.st_mtime;
		free(entries[i]);
	}
	if (count >= 0)
		free(entries);
	if (known >= KEPT) {
		qsort(times, (size_t)known, sizeof *times, compare_ages);
		oldest = times[known - KEPT + 1];
	}
	free(times);
	return oldest;
}

/* There is room for one more. */
static void clean_up(int dir_fd)
{
	remove_older(dir_fd, is_list, oldest_kept(dir_fd));
	remove_older(dir_fd, is_begun, time(NULL) - BEGUN_S);
}

static int find_name(struct agent_restore *restore)
{
	int fds[AGENT_RESTORE_VOLUMES + 2] = { restore->pages_fd, restore->ram_fd };

	for (uint32_t i = 0; i < restore->volumes; i++)
		fds[2 + i] = restore->volume_fd[i];
	return active_id(fds, restore->volumes + 2, restore->learn_name);
}

void learned_open(struct agent_restore *restore, bool learns)
{
	int dir_fd = find_name(restore) ? -1 : open_dir();

	restore->learned_fd = restore->learn_dir_fd = -1;
	if (dir_fd < 0)
		return;
	restore->learned_fd = openat(dir_fd, restore->learn_name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
	if (restore->learned_fd < 0)
		clean_up(dir_fd);
	if (learns)
		restore->learn_dir_fd = dir_fd;
	else
		close(dir_fd);
}
