/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What of the qcow2 format is needed here. QEMU: docs/interop/qcow2.txt. */
#ifndef LATENT_CLI_QCOW2_H
#define LATENT_CLI_QCOW2_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#define QCOW2_MAGIC 0x514649fbu
#define QCOW2_BACKING_MAX 1023 /* bytes of a name */

/* The beginning of the file, in big endian. */
struct qcow2_header {
	uint32_t magic, version;
	uint64_t backing_offset;
	uint32_t backing_bytes, cluster_bits;
	uint64_t bytes;
} __attribute__((packed));

/*
 * The path of the backing file that an image names, as QEMU finds it from where it was started. False: `image` is no
 * ordinary file or no qcow2 image, it names none, or what it names is not a path (json:, nbd: ...).
 */
bool qcow2_backing(const char *image, char ret_path[PATH_MAX]);

#endif
