/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/digest.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#define KNOWN_MAGIC 0x4947494454415f4cull
#define CHUNK_BYTES (1u << 20)
#define TICK_BYTES (16ull << 20)
#define RACY_S 2 /* what was written so recently may be written again without another time */
#define PATH_BYTES 512

struct known {
	uint64_t magic, dev, ino, bytes;
	struct timespec written, changed;
	struct digest digest;
};

static struct known describe(const struct stat *st)
{
	struct known k;

	memset(&k, 0, sizeof k);
	k.magic = KNOWN_MAGIC;
	k.dev = st->st_dev;
	k.ino = st->st_ino;
	k.bytes = (uint64_t)st->st_size;
	k.written = st->st_mtim;
	k.changed = st->st_ctim;
	return k;
}

int digest_same_file(const struct stat *a, const struct stat *b)
{
	struct known x = describe(a), y = describe(b);

	return !memcmp(&x, &y, sizeof x);
}

static int known_path(const struct digest_reading *reading, const struct stat *st, char path[PATH_BYTES])
{
	return snprintf(path, PATH_BYTES, "%s/%jx-%jx", reading->known_dir, (uintmax_t)st->st_dev, (uintmax_t)st->st_ino) <
	       PATH_BYTES - 16 ? 0 : -ENAMETOOLONG;
}

static int look_up(const struct digest_reading *reading, const struct stat *st, struct digest *digest)
{
	struct known wanted = describe(st), found;
	char path[PATH_BYTES];
	int fd, r;

	if (!reading->known_dir || known_path(reading, st, path))
		return -ENOENT;
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0)
		return -errno;
	r = os_read_all(fd, &found, sizeof found, 0);
	close(fd);
	wanted.digest = found.digest;
	if (r || memcmp(&wanted, &found, sizeof found))
		return -ENOENT;
	*digest = found.digest;
	return 0;
}

/* It is only faster with it. */
static void keep(const struct digest_reading *reading, const struct stat *st, const struct digest *digest)
{
	struct known k = describe(st);
	time_t now_s = time(NULL);
	char path[PATH_BYTES], partial[PATH_BYTES];
	int fd, r;

	if (!reading->known_dir || st->st_mtime + RACY_S > now_s || st->st_ctime + RACY_S > now_s)
		return;
	k.digest = *digest;
	(void)mkdir(reading->known_dir, 0700);
	if (known_path(reading, st, path))
		return;
	snprintf(partial, sizeof partial, "%.490s.%d", path, (int)getpid());
	fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return;
	r = os_write_all(fd, &k, sizeof k, 0);
	close(fd);
	if (r || rename(partial, path))
		(void)unlink(partial);
}

static int read_file(const struct digest_reading *reading, int fd, uint64_t bytes, struct digest *digest)
{
	XXH3_state_t *state = XXH3_createState();
	uint8_t *chunk = malloc(CHUNK_BYTES);
	XXH128_canonical_t canonical;
	int r = state && chunk && XXH3_128bits_reset(state) == XXH_OK ? 0 : -ENOMEM;

	for (uint64_t at = 0, n; !r && at < bytes; at += n) {
		n = bytes - at < CHUNK_BYTES ? bytes - at : CHUNK_BYTES;
		r = os_read_all(fd, chunk, (size_t)n, at);
		if (!r && XXH3_128bits_update(state, chunk, (size_t)n) != XXH_OK)
			r = -ENOMEM;
		if (!r && reading->tick && at % TICK_BYTES == 0)
			r = reading->tick(reading->ctx);
	}
	if (!r) {
		XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state));
		memcpy(digest->bytes, canonical.digest, sizeof digest->bytes);
	}
	free(chunk);
	XXH3_freeState(state);
	return r;
}

int digest_file(const struct digest_reading *reading, int fd, struct digest *ret_digest)
{
	struct digest digest = { { 0 } };
	struct stat before, after;
	off_t bytes;
	int r;

	if (fstat(fd, &before))
		return -errno;
	if (!S_ISREG(before.st_mode) && !S_ISBLK(before.st_mode))
		return -ENOTSUP;
	if (S_ISREG(before.st_mode) && !look_up(reading, &before, ret_digest))
		return 0;
	bytes = lseek(fd, 0, SEEK_END); /* also of a device */
	r = bytes < 0 ? -errno : read_file(reading, fd, (uint64_t)bytes, &digest);
	if (!r && fstat(fd, &after))
		r = -errno;
	if (!r && !digest_same_file(&before, &after))
		r = -ESTALE;
	if (r)
		return r;
	if (S_ISREG(after.st_mode))
		keep(reading, &after, &digest);
	*ret_digest = digest;
	return 0;
}
