/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The file `active` of a snapshot: the pages that the guest was using when it was saved, in the order in which it
 * touched them (US20100070678), with a packed copy of their contents, which a cold restore reads in one piece.
 * Beside a packed `ram` it is the list alone. It is a help and never needed: everything in it is also elsewhere. docs/snapshot.md has the layout.
 */
#ifndef LATENT_SNAPSHOT_ACTIVE_H
#define LATENT_SNAPSHOT_ACTIVE_H

#include "snapshot/image.h"

#define SNAPSHOT_ACTIVE "active"
#define ACTIVE_MAGIC 0x455649544341544cull /* "LTACTIVE" */
#define ACTIVE_VERSION 3u
#define ACTIVE_WRITTEN 1u
#define ACTIVE_LEARNED_PAGES 4096u /* 16 MiB: of what an earlier restore has learned, which each restore brings */
#define ACTIVE_MAX_PAGES 65536u /* 256 MiB: more is no working set that somebody waits for */

struct active_header {
	uint64_t magic;
	uint32_t version, page_bytes;
	uint64_t pages;
	uint64_t checksum; /* XXH3-64 of the records */
	uint64_t pages_checksum; /* that in the header of the `pages` whose numbers these are */
};

/* Behind the header; behind them, if contents follow, the XXH3-64 of each page's contents (8 bytes); behind these, from
 * the next multiple of the page size, the contents, all in the same order. */
struct active_page {
	uint64_t page;  /* its number in `pages` */
	uint32_t flags; /* ACTIVE_WRITTEN */
	uint32_t order; /* the slice of time in which it was touched first; grows */
};

struct active_set {
	struct active_page *list;
	uint64_t count;
	/* Of each page's contents, which are compared by whoever uses them: with active_digest. NULL: there are none. */
	uint64_t *digest;
	uint64_t contents_offset; /* bytes */
};

/* All of it, into an empty file. `image`: as it was written or read. `ram_fd`: where pages of SNAPSHOT_DATA are, or -1:
 * the list alone; `volume_fd`: of the image's volumes. 0 or a negative errno. */
int active_write(int fd, const struct active_page *list, uint64_t count, const struct snapshot_image *image, int ram_fd,
		 const int volume_fd[SNAPSHOT_VOLUMES]);
/* Checked against the image, to which it must belong. -EBADMSG, with a sentence in `why`; -ENOMEM. */
int active_read(int fd, const struct snapshot_image *image, struct active_set *ret_set, char why[SNAPSHOT_WHY_BYTES]);
/* The digest that the contents of number `i` of a set with digests must have: the image's own, if it knows one. */
uint64_t active_digest(const struct active_set *set, uint64_t i, const struct snapshot_image *image);
/* A copy of the file, of an image with the same pages in other places, becomes that one's. 0 or a negative errno. */
int active_rebind(int fd, const struct snapshot_image *image);
void active_free(struct active_set *set);

/* Files in the state in which they are now (device, inode, size, times of writing and of change): a name, equal only if all
 * of them are. 0 or a negative errno. */
#define ACTIVE_ID_BYTES 33u
int active_id(const int *fds, uint32_t count, char ret_id[ACTIVE_ID_BYTES]);

#endif
