/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Fast 64-bit hashes of files: four multiply-rotate lanes. They find damage,
 * not adversaries; sha256sum is in the image for when that matters. */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK_BYTES (256u * 1024) /* a multiple of a stripe */
#define LANES 4
#define STRIPE_BYTES (LANES * sizeof(uint64_t))
#define PRIME 0x9e3779b185ebca87u

static int n_failed;

static uint64_t rotate_left(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

static void hash_stripes(uint64_t lanes[LANES], const unsigned char *data, size_t bytes)
{
	uint64_t words[LANES];

	for (size_t at = 0; at < bytes; at += STRIPE_BYTES) {
		memcpy(words, data + at, STRIPE_BYTES);
		for (int i = 0; i < LANES; i++)
			lanes[i] = rotate_left(lanes[i] + words[i] * PRIME, 31) * PRIME;
	}
}

static uint64_t join_lanes(const uint64_t lanes[LANES], uint64_t total_bytes)
{
	uint64_t hash = mix64(total_bytes);

	for (int i = 0; i < LANES; i++)
		hash = mix64(hash ^ lanes[i]);
	return hash;
}

/* Fills the block unless the file ends; bytes read, or -errno. */
static ssize_t read_block(int fd, unsigned char *block)
{
	size_t filled = 0;

	while (filled < BLOCK_BYTES) {
		ssize_t bytes = read(fd, block + filled, BLOCK_BYTES - filled);
		if (bytes < 0)
			return -errno;
		if (bytes == 0)
			break;
		filled += (size_t)bytes;
	}
	return (ssize_t)filled;
}

static int hash_fd(int fd, uint64_t *ret_hash)
{
	static unsigned char block[BLOCK_BYTES];
	uint64_t lanes[LANES] = { 1, 2, 3, 4 };
	uint64_t total_bytes = 0;
	ssize_t bytes;

	while ((bytes = read_block(fd, block)) > 0) {
		size_t padded = ((size_t)bytes + STRIPE_BYTES - 1) / STRIPE_BYTES * STRIPE_BYTES;
		memset(block + bytes, 0, padded - (size_t)bytes);
		hash_stripes(lanes, block, padded);
		total_bytes += (uint64_t)bytes;
	}
	if (bytes < 0)
		return (int)bytes;
	*ret_hash = join_lanes(lanes, total_bytes);
	return 0;
}

static void hash_path(const char *path)
{
	uint64_t hash = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	int error = fd >= 0 ? hash_fd(fd, &hash) : -errno;

	if (fd >= 0)
		close(fd);
	if (error == 0) {
		printf("%016llx  %s\n", (unsigned long long)hash, path);
		return;
	}
	fprintf(stderr, "hash: %s: %s\n", path, strerror(-error));
	n_failed++;
}

static int visit(const char *path, const struct stat *status, int type, struct FTW *ftw)
{
	(void)ftw;
	if (type == FTW_F && S_ISREG(status->st_mode))
		hash_path(path);
	return 0;
}

int cmd_hash(int argc, char **argv)
{
	int recurse = argc > 1 && strcmp(argv[1], "-r") == 0;

	if (argc < 2 + recurse)
		return 2;
	for (int i = 1 + recurse; i < argc; i++) {
		if (!recurse)
			hash_path(argv[i]);
		else if (nftw(argv[i], visit, 32, FTW_PHYS | FTW_MOUNT) != 0)
			n_failed++;
	}
	return n_failed == 0 ? 0 : 1;
}
