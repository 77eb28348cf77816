/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Pages that a disk has, too: a place in one of the files of the VM's disks, which may be written at any time, and the SHA-256
 * of what is there if it was not. The destination reads the place, past its page cache if the file is the guest's own, and
 * takes what has that digest. So a hint that is wrong, or has become so, costs time.
 *
 * Files are numbered disk by disk, from the top; the first WIRE_HINT_FILES of them can be named. One thread.
 */
#ifndef LATENT_MIGRATE_HINT_H
#define LATENT_MIGRATE_HINT_H

#include "migrate/wire.h"
#include "snapshot/manifest.h"
#include "vmdir/control.h"

#include <sys/types.h>

/* The n-th file; NULL: there are less. `*ret_own` (may be NULL): the guest writes it. */
const struct manifest_layer *hint_layer(const struct manifest *manifest, uint32_t n, bool *ret_own);

/* The source's: the number of each file that origins name, by the number that it has there; -1: it is none of a disk. */
struct hint_numbers {
	int32_t file[sizeof ((struct control_layout *)0)->origin / sizeof(struct control_origin)];
};
/* `there`: of struct wire_ready. */
void hint_number(const struct manifest *manifest, const struct control_layout *layout, uint64_t there,
		 struct hint_numbers *ret_numbers);

/* The destination's. */
struct hint_files {
	struct {
		int fd; /* -1: not to be had */
		bool own, direct;
	} file[WIRE_HINT_FILES];
	uint8_t *room;
};

/* Opens what can be read, and is open in this VMM: the rest is not there. -ENOMEM; whatever the result, it is to be closed. */
int hint_open(const struct manifest *manifest, pid_t vmm, const char *(*find)(void *ctx, const char *path), void *ctx,
	      struct hint_files *ret_files);
void hint_close(struct hint_files *files); /* one that is all zero, too */
uint64_t hint_there(const struct hint_files *files); /* bit n: file n is open */

/* Reads the pages of those of the hints that continue the first one; returns how many these are. They name files that
 * are there. `*ret_read`: what could be read of them is so many pages, at `*ret_contents`, until the next call. */
size_t hint_read(struct hint_files *files, const struct wire_hint *hints, size_t count, const uint8_t **ret_contents,
		 size_t *ret_read);

#endif
