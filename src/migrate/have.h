/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Pages of snapshots that are on the destination: what RAM has of the same contents is not sent. The quick digests
 * that the snapshots' metadata has (XXH3-64) only propose; whether it is so is decided by the SHA-256 of what is read here, each time,
 * so a damaged snapshot, or one that somebody has made, can only be of no use.
 *
 * Functions return 0 or a negative errno, with a sentence in `why`. One thread.
 */
#ifndef LATENT_MIGRATE_HAVE_H
#define LATENT_MIGRATE_HAVE_H

#include "migrate/wire.h"
#include "os/os.h"

#define HAVE_MAX 8u /* snapshots */

struct have;

/* Snapshots that are not packed; their metadata is read, and their files are kept open. */
int have_open(const char *const *dirs, unsigned count, struct have **ret_have, char why[SNAPSHOT_WHY_BYTES]);
void have_close(struct have *have); /* NULL is allowed */

/* The next quick digests from `*at` on, each once; returns how many. `*at`: 0 to begin with. */
size_t have_list(const struct have *have, uint64_t *at, uint64_t *digests, size_t most);
/* Reads a page with these contents; false: there is none. */
bool have_find(const struct have *have, const struct wire_same *same, uint8_t contents[OS_PAGE_BYTES]);

/* The SHA-256 of a page. False: there is none to be had. */
bool have_digest(const uint8_t *page, uint8_t ret_sha256[WIRE_SHA256_BYTES]);

#endif
