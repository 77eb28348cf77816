/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "migrate/have.h"

#include "snapshot/reader.h"

#include <errno.h>
#include <gnutls/crypto.h>
#include <stdlib.h>
#include <string.h>

#define TRIES 8u /* pages of one quick digest that are read for one */

struct place {
	uint64_t digest, page; /* quick; of the file */
	uint32_t snapshot;
	int32_t file; /* of reader_locate */
};

struct have {
	struct reader reader[HAVE_MAX];
	unsigned readers;
	struct place *place; /* by digest */
	uint64_t places;
};

/* What is stored in the snapshot itself, or in another one that it refers to. False: nothing is known of the page, or it
 * comes elsewhere. */
static bool find_place(const struct reader *r, uint64_t page, struct place *place)
{
	const struct snapshot_page *p = snapshot_page_at(&r->image, page), *stored = p;

	if (p->kind == SNAPSHOT_VOLUME && r->manifest.volume[p->volume].role == MANIFEST_RAM &&
	    p->value < r->file[p->volume].origin.pages)
		stored = snapshot_page_at(&r->file[p->volume].origin, p->value);
	if (stored->kind != SNAPSHOT_DATA)
		return false;
	place->digest = stored->value;
	return reader_locate(r, page, &place->file, &place->page);
}

static int add_places(struct have *h, unsigned snapshot, char why[SNAPSHOT_WHY_BYTES])
{
	const struct reader *r = &h->reader[snapshot];
	struct place *longer = realloc(h->place, (h->places + r->image.pages) * sizeof *longer);

	if (!longer)
		return snapshot_fail(why, -ENOMEM, "no memory for the list of its pages");
	h->place = longer;
	for (uint64_t page = 0; page < r->image.pages; page++) {
		struct place *place = &h->place[h->places];

		place->snapshot = snapshot;
		h->places += find_place(r, page, place);
	}
	return 0;
}

static int by_digest(const void *a, const void *b)
{
	const struct place *x = a, *y = b;

	return (x->digest > y->digest) - (x->digest < y->digest);
}

static int open_one(struct have *h, const char *dir, char why[SNAPSHOT_WHY_BYTES])
{
	struct reader *reader = &h->reader[h->readers++];
	int r = reader_open(dir, reader, why);

	if (!r)
		r = reader_need_ram(reader, why);
	if (!r)
		r = reader_open_files(reader, why);
	if (!r)
		r = reader_open_origins(reader, why);
	return r ? r : add_places(h, h->readers - 1, why);
}

int have_open(const char *const *dirs, unsigned count, struct have **ret_have, char why[SNAPSHOT_WHY_BYTES])
{
	struct have *h = calloc(1, sizeof *h);
	int r = 0;

	if (!h)
		return snapshot_fail(why, -ENOMEM, "no memory");
	for (unsigned i = 0; !r && i < count; i++) {
		char words[SNAPSHOT_WHY_BYTES];

		r = open_one(h, dirs[i], words);
		if (r)
			snapshot_fail(why, r, "%.80s: %.160s", dirs[i], words);
	}
	if (r) {
		have_close(h);
		return r;
	}
	if (h->places)
		qsort(h->place, (size_t)h->places, sizeof *h->place, by_digest);
	*ret_have = h;
	return 0;
}

void have_close(struct have *h)
{
	if (!h)
		return;
	for (unsigned i = 0; i < h->readers; i++)
		reader_close(&h->reader[i]);
	free(h->place);
	free(h);
}

size_t have_list(const struct have *h, uint64_t *at, uint64_t *digests, size_t most)
{
	size_t count = 0;

	for (; *at < h->places && count < most; ++*at)
		if (!*at || h->place[*at].digest != h->place[*at - 1].digest)
			digests[count++] = h->place[*at].digest;
	return count;
}

/* The first place of this digest, or where it would be. */
static uint64_t first_of(const struct have *h, uint64_t digest)
{
	uint64_t low = 0, high = h->places;

	while (low < high) {
		uint64_t middle = (low + high) / 2;

		if (h->place[middle].digest < digest)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

bool have_find(const struct have *h, const struct wire_same *same, uint8_t contents[OS_PAGE_BYTES])
{
	uint64_t first = first_of(h, same->digest);
	uint8_t sha256[WIRE_SHA256_BYTES];

	for (uint64_t i = first; i < h->places && i < first + TRIES && h->place[i].digest == same->digest; i++) {
		const struct place *place = &h->place[i];
		int fd = reader_fd(&h->reader[place->snapshot], place->file);

		if (!os_read_all(fd, contents, OS_PAGE_BYTES, os_bytes(place->page)) && have_digest(contents, sha256) &&
		    !memcmp(sha256, same->sha256, sizeof sha256))
			return true;
	}
	return false;
}

bool have_digest(const uint8_t *page, uint8_t sha256[WIRE_SHA256_BYTES])
{
	return !gnutls_hash_fast(GNUTLS_DIG_SHA256, page, OS_PAGE_BYTES, sha256);
}
