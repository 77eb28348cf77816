/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * `ram` in pieces that can be fetched one by one: a chunk is a number of stored pages (SNAPSHOT_DATA) that follow
 * each other in `ram`, whatever lies between them. In `ram.zst` each chunk is a zstd frame of its own:
 *
 *   struct packed_header, the frames, and at index_offset an array of struct packed_entry, one for each chunk
 *
 * Which pages a chunk has is not stored: the n-th chunk has the stored pages from number n * chunk_pages on, as
 * `pages` has them. In a plain `ram` a chunk is the stretch from its first page to its last one, cut where
 * the gap between two is not worth reading.
 *
 * Errors are negative errno values; -EBADMSG: the file is not what it should be, and `why` says what is wrong.
 */
#ifndef LATENT_SNAPSHOT_PACKED_H
#define LATENT_SNAPSHOT_PACKED_H

#include "snapshot/image.h"

#include <stdatomic.h>

#define PACKED_MAGIC 0x4d41524b4341504cull /* "LPACKRAM" */
#define PACKED_VERSION 1u
#define PACKED_CHUNK_PAGES 32u /* as written: 128 KiB */
#define PACKED_CHUNK_MAX_PAGES 256u

struct packed_header {
	uint64_t magic;
	uint32_t version, page_bytes;
	uint32_t chunk_pages, reserved;
	uint64_t chunks, stored_pages;
	uint64_t index_offset;
	uint64_t checksum; /* XXH3-64 of the index */
};

struct packed_entry {
	uint64_t offset;
	uint32_t bytes, reserved;
};

struct packed_chunk {
	uint64_t first; /* page of `ram`, */
	uint32_t pages; /* and how many stored ones from there on */
	uint32_t bytes; /* in the file, from `offset` on */
	uint64_t offset;
};

struct packed {
	const struct snapshot_image *image; /* borrowed */
	bool compressed;
	uint64_t chunks;
	struct packed_chunk *chunk;
};

/* Packs `ram_fd` into `to_fd`, which is empty. -EINTR: *stop was set. `*ret_bytes`: of the file. */
int packed_write(const struct snapshot_image *image, int ram_fd, int to_fd, const _Atomic bool *stop,
		 uint64_t *ret_bytes, char why[SNAPSHOT_WHY_BYTES]);

/* Bytes of the index that belongs to this header, after it was found to be one of `image` in a file of
 * `file_bytes`. */
int packed_check_header(const struct packed_header *header, const struct snapshot_image *image, uint64_t file_bytes,
			uint64_t *ret_index_bytes, char why[SNAPSHOT_WHY_BYTES]);
/* `header` was checked. `index` is not kept. */
int packed_take_index(const struct packed_header *header, const struct packed_entry *index,
		      const struct snapshot_image *image, struct packed *ret_packed, char why[SNAPSHOT_WHY_BYTES]);
/* Header and index of a file, read and checked. */
int packed_open(int fd, const struct snapshot_image *image, struct packed *ret_packed, char why[SNAPSHOT_WHY_BYTES]);
/* Of a plain `ram`, chunks of at most `chunk_pages` pages. -ENOMEM. */
int packed_of_plain(const struct snapshot_image *image, uint32_t chunk_pages, struct packed *ret_packed);
void packed_free(struct packed *packed);

/* The chunk that holds a stored page. */
uint64_t packed_find(const struct packed *packed, uint64_t page);
/* The first stored page at or after `page`; image->pages: there is none. */
uint64_t packed_next_stored(const struct snapshot_image *image, uint64_t page);

/*
 * The pages of chunk number `n` from what the file has there, `bytes` of it, one behind the other into `to`
 * (chunk.pages pages). Each is compared with its digest: -EBADMSG, and nothing in `to` may be used.
 */
int packed_unpack(const struct packed *packed, uint64_t n, const void *from, size_t bytes, uint8_t *to);

/* Reads all of a file; as snapshot_image_verify. */
int packed_verify(const struct packed *packed, int fd, uint64_t *ret_bad, char why[SNAPSHOT_WHY_BYTES]);

#endif
