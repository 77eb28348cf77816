/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/learned.h"

#include "vmdir/vmdir.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define DIR_NAME ".learned"
#define KEPT 64 /* lists of so many snapshots; the oldest ones go */

static int open_dir(void)
{
	char root[VMDIR_PATH_BYTES], why[VMDIR_WHY_BYTES], path[VMDIR_PATH_BYTES];

	if (vmdir_root(true, root, why) || (size_t)snprintf(path, sizeof path, "%s/" DIR_NAME, root) >= sizeof path ||
	    (mkdir(path, 0700) && errno != EEXIST))
		return -1;
	return open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
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
