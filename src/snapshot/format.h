/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A snapshot is a directory:
 *
 *   manifest.json   what it is: written last; the directory gets its name only when it is there
 *   state           QEMU's device state (its migration stream without shared RAM)
 *   pages           metadata of every page, this header's layout
 *   ram             contents of the pages that have any of their own: block by block, each page at its own
 *                   place, holes where there is nothing to store; as it is, it can be mapped over guest RAM
 *   disks/          the disks as they were at that instant
 *
 * `pages`, host byte order: struct snapshot_header, then for each block struct snapshot_block, then for each
 * block an array of struct snapshot_page. docs/snapshot.md describes it all.
 */
#ifndef LATENT_SNAPSHOT_FORMAT_H
#define LATENT_SNAPSHOT_FORMAT_H

#include <stdint.h>

#define SNAPSHOT_MAGIC 0x544150414e53544cull /* "LTSNAPAT" */
#define SNAPSHOT_VERSION 3u
#define SNAPSHOT_BLOCKS 64u
#define SNAPSHOT_VOLUMES 32u
#define SNAPSHOT_NAME_BYTES 64

#define SNAPSHOT_MANIFEST "manifest.json"
#define SNAPSHOT_STATE "state"
#define SNAPSHOT_PAGES "pages"
#define SNAPSHOT_RAM "ram"
#define SNAPSHOT_PACKED "ram.zst" /* in place of `ram`: see snapshot/packed.h */
#define SNAPSHOT_DISKS "disks"

struct snapshot_header {
	uint64_t magic;
	uint32_t version, page_bytes;
	uint32_t blocks, volumes; /* volumes: of the manifest, that pages refer to */
	uint64_t pages;           /* of all blocks */
	uint64_t checksum;        /* XXH3-64 of all that follows */
};

struct snapshot_block {
	char name[SNAPSHOT_NAME_BYTES]; /* stock QEMU's, NUL-terminated */
	uint64_t pages;
};

/* Where the contents of a page are. */
enum snapshot_kind {
	SNAPSHOT_WORD,   /* one 8-byte word, repeated: `value`. Zero: nothing is stored at all */
	SNAPSHOT_DATA,   /* in `ram` at the page's own place; `value` is its XXH3-64 */
	SNAPSHOT_VOLUME, /* the same as page `value` of volume `volume`: a disk image, or another snapshot's `ram` */
	SNAPSHOT_EQUAL,  /* the same as page `value` of `ram`, which is of kind SNAPSHOT_DATA */
	SNAPSHOT_KINDS
};

struct snapshot_page {
	uint32_t kind, volume;
	uint64_t value;
};

#endif
