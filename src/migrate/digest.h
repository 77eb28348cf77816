/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What a file that does not change is known by on another host: the XXH3-128 of all of it. It is read once; then it is
 * known by the file's device, inode, size and times, in a directory of the user's own.
 */
#ifndef LATENT_MIGRATE_DIGEST_H
#define LATENT_MIGRATE_DIGEST_H

#include <stdint.h>
#include <sys/stat.h>

#define DIGEST_BYTES 16

struct digest {
	uint8_t bytes[DIGEST_BYTES];
};

struct digest_reading {
	const char *known_dir;       /* made if need be; NULL: nothing is known, nor kept */
	int (*tick)(void *ctx);      /* every 16 MiB or so; a result other than 0 ends it, and is returned. May be NULL */
	void *ctx;
};

/* Of a file, or a block device, which is read each time. -ESTALE: it was written meanwhile; -ENOTSUP: it is neither.
 * Errors of reading, and -ENOMEM. */
int digest_file(const struct digest_reading *reading, int fd, struct digest *ret_digest);

/* It has not been written since, as far as its times say. */
int digest_same_file(const struct stat *a, const struct stat *b);

#endif
