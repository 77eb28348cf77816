/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The writable disks of a running VM, and the chains of files that they are. */
#ifndef LATENT_SNAPSHOT_DISKS_H
#define LATENT_SNAPSHOT_DISKS_H

#include "snapshot/manifest.h"
#include "snapshot/vmm.h"

/* Of the manifest's disks. */
struct disk_names {
	char device[MANIFEST_DISKS][64]; /* how QMP calls them */
	bool is_node[MANIFEST_DISKS];    /* by the name of a block node */
	bool relative;                   /* one was given by a relative path */
};

/* Fills in the manifest's disks, their files not looked into. `cwd`: what relative paths begin with. Negative errno:
 * `why` of the VMM says what cannot be part of a snapshot. */
int disks_list(struct vmm *vmm, const char *cwd, struct manifest *manifest, struct disk_names *ret_names);
/* What was written to the disks' own files is brought from this host's page cache to storage. It takes as long as that takes,
 * and ends early when `*stop` is set; what fails QEMU will meet, and say. */
void disks_sync(const struct manifest *manifest, const _Atomic bool *stop);

#endif
