/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/ballot.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define SUFFIX_BYTES 16
#define NAMED_BYTES 8 /* of the session */

/* OVER: of the destination, which has all pages. */
enum { OVER = BALLOT_DESTINATION + 1, NAMES };

static const char *const suffixes[NAMES] = { [BALLOT_SOURCE] = ".source", [BALLOT_DESTINATION] = ".destination",
					     [OVER] = ".over" };

int ballot_name(const char *disk, const uint8_t session[WIRE_SESSION_BYTES], struct ballot *ret_ballot)
{
	char hex[2 * NAMED_BYTES + 1];

	for (int i = 0; i < NAMED_BYTES; i++)
		snprintf(hex + 2 * i, 3, "%02x", session[i]);
	return snprintf(ret_ballot->path, sizeof ret_ballot->path - SUFFIX_BYTES, "%s.latent-%s", disk, hex) <
	       (int)sizeof ret_ballot->path - SUFFIX_BYTES ? 0 : -ENAMETOOLONG;
}

static void taken_path(const struct ballot *b, int side, char path[BALLOT_PATH_BYTES])
{
	snprintf(path, BALLOT_PATH_BYTES, "%.300s%s", b->path, suffixes[side]);
}

/* The name shall be there after a crash of the storage's host, too. */
static int sync_directory(const struct ballot *b)
{
	char path[BALLOT_PATH_BYTES];
	int fd, r;

	memcpy(path, b->path, sizeof path);
	fd = open(dirname(path), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	r = fd < 0 || fsync(fd) ? -errno : 0;
	if (fd >= 0)
		close(fd);
	return r == -EINVAL ? 0 : r; /* a file system that does not know it */
}

int ballot_make(const struct ballot *b)
{
	int fd = open(b->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);

	if (fd < 0)
		return -errno;
	close(fd);
	return sync_directory(b);
}

/* -EACCES and the like are no answer. */
static int look_for(const char *path)
{
	return !access(path, F_OK) ? 0 : -errno;
}

bool ballot_is_there(const struct ballot *b)
{
	return b->path[0] && !look_for(b->path);
}

int ballot_take(const struct ballot *b, enum ballot_side side)
{
	char ours[BALLOT_PATH_BYTES], others[BALLOT_PATH_BYTES];
	int r;

	if (side == BALLOT_SOURCE && ballot_is_over(b))
		return -EALREADY;
	taken_path(b, side, ours);
	taken_path(b, side == BALLOT_SOURCE ? BALLOT_DESTINATION : BALLOT_SOURCE, others);
	if (!rename(b->path, ours))
		return sync_directory(b);
	if (errno != ENOENT)
		return -errno;
	r = look_for(ours); /* taken before, or just now: a server may have been asked twice */
	if (r == -ENOENT)
		r = look_for(others) ? -errno : -EALREADY;
	return r;
}

void ballot_return(const struct ballot *b)
{
	char path[BALLOT_PATH_BYTES];

	taken_path(b, BALLOT_DESTINATION, path);
	if (b->path[0] && !rename(path, b->path))
		(void)sync_directory(b);
}

void ballot_note_over(const struct ballot *b)
{
	char from[BALLOT_PATH_BYTES], to[BALLOT_PATH_BYTES];

	taken_path(b, BALLOT_DESTINATION, from);
	taken_path(b, OVER, to);
	if (b->path[0] && !rename(from, to))
		(void)sync_directory(b);
}

bool ballot_is_over(const struct ballot *b)
{
	char path[BALLOT_PATH_BYTES];

	taken_path(b, OVER, path);
	return b->path[0] && !look_for(path);
}

void ballot_remove(const struct ballot *b)
{
	char path[BALLOT_PATH_BYTES];

	if (!b->path[0])
		return;
	(void)unlink(b->path);
	for (int name = 0; name < NAMES; name++) {
		taken_path(b, name, path);
		(void)unlink(path);
	}
}
