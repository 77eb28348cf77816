/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The images of a VM that is migrated: volumes that its RAM refers to, and what its disks lie over. Both sides know them by
 * all of their contents (digest.h); where they are is each side's own business.
 *
 * Functions return 0 or a negative errno, with a sentence in `why`. One thread.
 */
#ifndef LATENT_MIGRATE_FILES_H
#define LATENT_MIGRATE_FILES_H

#include "migrate/digest.h"
#include "migrate/wire.h"
#include "snapshot/manifest.h"

/* How many there are: first the volumes, then, disk by disk, what lies below its first layer. */
uint32_t files_of(const struct manifest *manifest);

/* The source's: all of them, where the manifest says that they are. At most WIRE_FILES_MAX. */
int files_digest(const struct manifest *manifest, const struct digest_reading *reading, struct digest *ret_digests,
		 char why[SNAPSHOT_WHY_BYTES]);

/* The destination's. */
struct files_options {
	const struct manifest *manifest;
	const struct digest *digests; /* of the source, as many as files_of */
	struct digest_reading reading;
	const char *(*find)(void *ctx, const char *path); /* where a file of the manifest is here */
	void *find_ctx;
};

struct files {
	int32_t volume_fd[SNAPSHOT_VOLUMES]; /* read-only; -1: not there, or another one: its pages are sent */
	uint64_t pages[SNAPSHOT_VOLUMES];    /* 0: as above */
	struct stat stat[SNAPSHOT_VOLUMES];
};

/* Opens volumes. Whatever the result, it is to be closed. */
int files_open(const struct files_options *options, struct files *ret_files, char why[SNAPSHOT_WHY_BYTES]);
/* What the disks lie over must be the same: the guest reads it. */
int files_check_disks(const struct files_options *options, char why[SNAPSHOT_WHY_BYTES]);
/* Again, when somebody keeps the volumes from being written: they have not been, since they were opened. */
int files_check_volumes(const struct files_options *options, const struct files *files, char why[SNAPSHOT_WHY_BYTES]);
void files_close(struct files *files);

#endif
