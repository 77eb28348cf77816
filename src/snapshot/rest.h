/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The rest of a snapshot, loaded when the restored guest runs (US20100070678): what is stored for pages
 * of RAM, in `ram` or in the files that it refers to, and is not in the page cache, is read. That is
 * all: nothing is mapped or allocated for the guest, which finds the pages in memory when it touches
 * them, and so do all clones.
 *
 * Errors are negative errno values, with a sentence in `why`. One thread.
 */
#ifndef LATENT_SNAPSHOT_REST_H
#define LATENT_SNAPSHOT_REST_H

#include "snapshot/image.h"

struct rest;

struct rest_progress {
	uint64_t pages_all; /* that have contents of their own, */
	uint64_t pages_now; /* and are in memory */
};

/* Of a snapshot whose RAM is packed, only what is in other files. */
int rest_open(const char *dir, struct rest **ret_rest, char why[SNAPSHOT_WHY_BYTES]);
void rest_close(struct rest *rest); /* NULL is allowed */

/*
 * The pages of the active set first, in their order, then all in the order of RAM, a little at a time and with pauses.
 * `go_on` is asked before each. -EINTR: it said no; -ENOMEM: the host's memory, or the cgroup's, has no
 * room to spare; -EIO and others: storage failed. `*progress` is kept up to date, and counted anew at
 * the end.
 */
int rest_load(struct rest *rest, bool (*go_on)(void *ctx), void *ctx, struct rest_progress *progress);

#endif
