/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The snapshot that a new one is compared with: what is there need not be stored again. A reference goes to the
 * file that has the page, be it the parent's `ram` or another that the parent refers to, so there is no chain
 * to walk. Errors are negative errno values, with a sentence in `why`. One thread.
 */
#ifndef LATENT_SNAPSHOT_PARENT_H
#define LATENT_SNAPSHOT_PARENT_H

#include "snapshot/manifest.h"

struct parent;

/* The parent and all that it refers to must be there, and what they were. */
int parent_open(const char *dir, struct parent **ret_parent, char why[SNAPSHOT_WHY_BYTES]);
void parent_close(struct parent *parent); /* NULL is allowed */

/* For the new snapshot's manifest. */
void parent_describe(const struct parent *parent, struct manifest_parent *ret_parent);

/* The new snapshot's volumes so far, of which `dev` and `ino` are known. Those of the parent's files that are not
 * among them are added, whole, as long as there is room; pages in others are not found. */
void parent_join_volumes(struct parent *parent, struct manifest_volume volume[SNAPSHOT_VOLUMES], uint32_t *volumes);
/* The new snapshot's blocks: pages correspond by the block's name and their number in it. */
void parent_join_blocks(struct parent *parent, const struct snapshot_image *image);

/* Does the parent have these contents (whose digest is `digest`), at the same place or elsewhere? Then
 * `*ret_page` is a reference. The bytes were compared. */
bool parent_find(const struct parent *parent, uint64_t page, uint64_t digest, const uint8_t *bytes,
		 struct snapshot_page *ret_page);

#endif
