/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/record.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define RECORD_MAGIC 0x3152474d544cull
#define RECORD_FILE "migration"
#define PATH_BYTES 320

static void path_of(const char *run_dir, const char *suffix, char path[PATH_BYTES])
{
	snprintf(path, PATH_BYTES, "%.250s/" RECORD_FILE "%s", run_dir, suffix);
}

int record_write(const char *run_dir, const struct record *record, char why[SNAPSHOT_WHY_BYTES])
{
	char path[PATH_BYTES], partial[PATH_BYTES];
	struct record r = *record;
	int fd, error;

	path_of(run_dir, "", path);
	path_of(run_dir, ".partial", partial);
	r.magic = RECORD_MAGIC;
	fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	error = fd < 0 ? -errno : os_write_all(fd, &r, sizeof r, 0);
	if (fd >= 0)
		close(fd);
	if (!error && rename(partial, path))
		error = -errno;
	return error ? snapshot_fail(why, error, "%.200s cannot be written: %s", path, strerror(-error)) : 0;
}

int record_read(const char *run_dir, struct record *ret_record, char why[SNAPSHOT_WHY_BYTES])
{
	char path[PATH_BYTES];
	struct record record;
	int fd, r;

	path_of(run_dir, "", path);
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0)
		return snapshot_fail(why, -errno, "no migration of this VM was cut");
	r = os_read_all(fd, &record, sizeof record, 0);
	close(fd);
	if (r || record.magic != RECORD_MAGIC || record.phase >= RECORD_PHASES ||
	    !memchr(record.ballot.path, '\0', sizeof record.ballot.path))
		return snapshot_fail(why, -EPROTO, "%.200s is of another version of Latent", path);
	*ret_record = record;
	return 0;
}

void record_remove(const char *run_dir)
{
	char path[PATH_BYTES];

	path_of(run_dir, "", path);
	(void)unlink(path);
}
