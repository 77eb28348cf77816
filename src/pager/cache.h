/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The cache of one snapshot: a memfd with the layout of its `ram`, in which a page is either a hole or what was
 * saved. It only grows. VMs map it privately, so what is in it is read by all of them and written by none.
 */
#ifndef LATENT_PAGER_CACHE_H
#define LATENT_PAGER_CACHE_H

#include "pager/store.h"
#include "snapshot/packed.h"

enum chunk_state { CHUNK_ABSENT, CHUNK_WANTED, CHUNK_COMES, CHUNK_PRESENT };

struct cache {
	struct cache *next;
	unsigned users;
	bool own; /* made and filled by this process, from the store; else an agent has given it */
	int fd, pages_fd, index_fd, manifest_fd, state_fd; /* the last two: -1 when an agent gave it */
	struct snapshot_image image;
	struct packed packed;
	const char *object; /* that the chunks are in */
	uint8_t *state;     /* enum chunk_state, of each chunk */
	uint64_t chunks_present, pages_all, pages_present;
	uint64_t *first_wanted, first_count, first_at; /* chunks of the active set, in its order */
	uint64_t window_end, window_bytes; /* of the last demand */
	uint64_t next_chunk; /* where loading in the background goes on afterwards */
};

/* Reads the snapshot's metadata from the store, which it waits for. `single_pages`: of a plain `ram` each page
 * is a chunk. */
int cache_load(struct store *store, bool single_pages, struct cache **ret_cache, char why[STORE_WHY_BYTES]);
/* One that an agent has: takes the three descriptors, also on failure. What is there is found, and not read. */
int cache_adopt(int fd, int pages_fd, int index_fd, bool single_pages, struct cache **ret_cache,
		char why[STORE_WHY_BYTES]);
void cache_free(struct cache *cache); /* NULL is allowed */

bool cache_is_file(const struct cache *cache, int fd);
/* If `adopted` is of the same snapshot as `loaded`, and all that it holds is right (it was in the hands of VMMs): it
 * takes over what `loaded` has more, which is freed. */
bool cache_merge(struct cache *adopted, struct cache *loaded);

#define CACHE_MANIFEST SNAPSHOT_MANIFEST
size_t cache_manifest_bytes(const struct cache *cache);
bool cache_has_manifest(const struct cache *cache, const void *text, size_t bytes);

/* The chunk that page `page` of `ram` is in; false: it is stored nowhere (a zero between stored pages, mapped along),
 * and cache_make_page makes it. */
bool cache_chunk_of(const struct cache *cache, uint64_t page, uint64_t *ret_chunk);
int cache_make_page(struct cache *cache, uint64_t page);

/* What came for a chunk: unpacked, compared with its digests and put in place. -EBADMSG: other contents, of which
 * nothing is kept; -ENOSPC, -ENOMEM. */
int cache_put(struct cache *cache, uint64_t chunk, const void *from, size_t bytes);

/* The next absent chunk to load in the background, of the active set or of the `rest`, too; false: there is none. */
bool cache_next(struct cache *cache, bool rest, uint64_t *ret_chunk);

#endif
