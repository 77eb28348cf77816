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
#define ACTIVE_VERSION 2u
#define ACTIVE_WRITTEN 1u
#define ACTIVE_LEARNED_PAGES 4096u /* 16 MiB: of what an earlier restore has learned, which each restore brings */
#define ACTIVE_MAX_PAGES 65536u /* 256 MiB: more is no working set that somebody waits for */

struct active_header {
	uint64_t magic;
	uint32_t version, page_bytes;
	uint64_t pages;
	uint64_t checksum; /* XXH3-64 of the records */
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
	uint64_t *digest; /* of each page's contents, which are compared with it by whoever uses them; NULL: there are none */
	uint64_t contents_offset; /* bytes */
};

/* All of it, into an empty file. `ram_fd`: where pages of SNAPSHOT_DATA are, or -1: the list alone; `volume_fd`: of the image's volumes.
 * 0 or a negative errno. */
int active_write(int fd, const struct active_page *list, uint64_t count, const struct snapshot_image *image, int ram_fd,
		 const int volume_fd[SNAPSHOT_VOLUMES]);
/* Checked against the image. -EBADMSG, with a sentence in `why`; -ENOMEM. */
int active_read(int fd, const struct snapshot_image *image, struct active_set *ret_set, char why[SNAPSHOT_WHY_BYTES]);
void active_free(struct active_set *set);

/* Files in the state in which they are now (device, inode, size, times of writing and of change): a name, equal only if all
 * of them are. 0 or a negative errno. */
#define ACTIVE_ID_BYTES 33u
int active_id(const int *fds, uint32_t count, char ret_id[ACTIVE_ID_BYTES]);

#endif
