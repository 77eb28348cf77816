/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The image that a domain serves: a raw file or block device, locked as QEMU locks its images. */
#ifndef LATENT_BLKD_IMAGE_H
#define LATENT_BLKD_IMAGE_H

#include <stdbool.h>
#include <stdint.h>

#define IMAGE_WHY_BYTES 512

struct image {
	int fd;
	bool readonly;
	bool in_memory; /* a file of tmpfs: no disk to wait for */
	uint64_t bytes; /* whole sectors */
	char id[21];    /* what a guest sees as its serial number */
};

/*
 * Opens and locks. `format`: "raw", "qcow2", or NULL: raw, unless it begins as a qcow2 image does.
 * -EACCES and what open(2) says; -EAGAIN: somebody else has locked it; -EINVAL: nothing to serve;
 * -EOPNOTSUPP: a format that is not served. `why`: a sentence. The lock is the descriptor's, and that of
 * every process that has inherited it.
 */
int image_open(const char *path, const char *format, bool readonly, struct image *ret_image,
	       char why[IMAGE_WHY_BYTES]);

#endif
