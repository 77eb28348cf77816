/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/packed.h"

#include "os/os.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>
#include <zstd.h>

#define LEVEL 1 /* zstd's fastest with its usual effort: a chunk must be there soon, not small */
#define GAP_PAGES 16u /* of a plain `ram`: to read along is cheaper than another request */

_Static_assert(sizeof(struct packed_header) == 56, "the layout is the format");
_Static_assert(sizeof(struct packed_entry) == 16, "the layout is the format");

static const struct snapshot_page *table_of(const struct snapshot_image *image)
{
	return image->memory;
}

uint64_t packed_next_stored(const struct snapshot_image *image, uint64_t page)
{
	const struct snapshot_page *table = table_of(image);

	while (page < image->pages && table[page].kind != SNAPSHOT_DATA)
		page++;
	return page;
}

static uint64_t count_stored(const struct snapshot_image *image)
{
	const struct snapshot_page *table = table_of(image);
	uint64_t count = 0;

	for (uint64_t i = 0; i < image->pages; i++)
		count += table[i].kind == SNAPSHOT_DATA;
	return count;
}

static int read_all(int fd, void *to, size_t bytes, uint64_t offset)
{
	int r = os_read_all(fd, to, bytes, offset);

	return r == -ENODATA ? -EBADMSG : r;
}

/* ---- writing -------------------------------------------------------------------------------- */

struct packer {
	const struct snapshot_image *image;
	int ram_fd, to_fd;
	ZSTD_CCtx *zstd;
	uint8_t *pages, *frame;
	size_t frame_room;
	struct packed_entry *index;
	uint64_t chunks, at; /* at: the end of the file so far */
};

/* The stored pages from `page` on, a chunk of them; `*page` moves on. Runs of them are read in one go. */
static int read_chunk(struct packer *p, uint64_t *page, uint32_t *ret_pages)
{
	const struct snapshot_page *table = table_of(p->image);
	uint32_t pages = 0;

	while (pages < PACKED_CHUNK_PAGES && *page < p->image->pages) {
		uint64_t run = 1;
		int r;

		while (pages + run < PACKED_CHUNK_PAGES && *page + run < p->image->pages &&
		       table[*page + run].kind == SNAPSHOT_DATA)
			run++;
		r = read_all(p->ram_fd, p->pages + os_bytes(pages), os_bytes(run), os_bytes(*page));
		if (r)
			return r;
		pages += (uint32_t)run;
		*page = packed_next_stored(p->image, *page + run);
	}
	*ret_pages = pages;
	return 0;
}

static int write_chunk(struct packer *p, uint32_t pages)
{
	size_t bytes = ZSTD_compressCCtx(p->zstd, p->frame, p->frame_room, p->pages, os_bytes(pages), LEVEL);
	int r;

	if (ZSTD_isError(bytes))
		return -EIO;
	r = os_write_all(p->to_fd, p->frame, bytes, p->at);
	p->index[p->chunks++] = (struct packed_entry){ p->at, (uint32_t)bytes, 0 };
	p->at += bytes;
	return r;
}

static int write_index(struct packer *p, uint64_t stored, uint64_t *ret_bytes)
{
	size_t index_bytes = (size_t)p->chunks * sizeof *p->index;
	struct packed_header header = {
		.magic = PACKED_MAGIC,
		.version = PACKED_VERSION,
		.page_bytes = OS_PAGE_BYTES,
		.chunk_pages = PACKED_CHUNK_PAGES,
		.chunks = p->chunks,
		.stored_pages = stored,
		.index_offset = p->at,
		.checksum = XXH3_64bits(p->index, index_bytes),
	};
	int r = os_write_all(p->to_fd, p->index, index_bytes, p->at);

	*ret_bytes = p->at + index_bytes;
	return r ? r : os_write_all(p->to_fd, &header, sizeof header, 0);
}

static int pack(struct packer *p, const _Atomic bool *stop)
{
	uint64_t page = packed_next_stored(p->image, 0);
	uint32_t pages;
	int r = 0;

	while (!r && page < p->image->pages) {
		r = stop && *stop ? -EINTR : read_chunk(p, &page, &pages);
		if (!r)
			r = write_chunk(p, pages);
	}
	return r;
}

int packed_write(const struct snapshot_image *image, int ram_fd, int to_fd, const _Atomic bool *stop,
		 uint64_t *ret_bytes, char why[SNAPSHOT_WHY_BYTES])
{
	struct packer p = { .image = image, .ram_fd = ram_fd, .to_fd = to_fd, .at = sizeof(struct packed_header) };
	uint64_t stored = count_stored(image);
	uint64_t chunks = (stored + PACKED_CHUNK_PAGES - 1) / PACKED_CHUNK_PAGES;
	int r = -ENOMEM;

	p.frame_room = ZSTD_compressBound(os_bytes(PACKED_CHUNK_PAGES));
	p.frame = malloc(p.frame_room);
	p.pages = malloc(os_bytes(PACKED_CHUNK_PAGES));
	p.index = calloc(chunks ? (size_t)chunks : 1, sizeof *p.index);
	p.zstd = ZSTD_createCCtx();
	if (p.frame && p.pages && p.index && p.zstd) {
		r = pack(&p, stop);
		if (!r)
			r = write_index(&p, stored, ret_bytes);
	}
	if (r)
		snprintf(why, SNAPSHOT_WHY_BYTES, r == -EINTR ? "a signal ended it" : "RAM cannot be packed: %s", strerror(-r));
	ZSTD_freeCCtx(p.zstd);
	free(p.index);
	free(p.pages);
	free(p.frame);
	return r;
}

/* ---- reading the index ------------------------------------------------------------------------ */

int packed_check_header(const struct packed_header *h, const struct snapshot_image *image, uint64_t file_bytes,
			uint64_t *ret_index_bytes, char why[SNAPSHOT_WHY_BYTES])
{
	uint64_t index_bytes;

	if (h->magic != PACKED_MAGIC)
		return snapshot_fail(why, -EBADMSG,
				     SNAPSHOT_PACKED ": no packed RAM of Latent begins like this");
	if (h->version != PACKED_VERSION || h->page_bytes != OS_PAGE_BYTES)
		return snapshot_fail(
			why, -EBADMSG,
			SNAPSHOT_PACKED
			": version %u with pages of %u bytes; this Latent reads version %u with %zu",
			h->version, h->page_bytes, PACKED_VERSION, OS_PAGE_BYTES);
	if (!h->chunk_pages || h->chunk_pages > PACKED_CHUNK_MAX_PAGES)
		return snapshot_fail(why, -EBADMSG,
				     SNAPSHOT_PACKED ": chunks of %u pages; %u are the most",
				     h->chunk_pages, PACKED_CHUNK_MAX_PAGES);
	if (h->stored_pages != count_stored(image))
		return snapshot_fail(why, -EBADMSG,
				     SNAPSHOT_PACKED ": %ju pages, and " SNAPSHOT_PAGES " says %ju",
				     (uintmax_t)h->stored_pages, (uintmax_t)count_stored(image));
	if (h->chunks != (h->stored_pages + h->chunk_pages - 1) / h->chunk_pages)
		return snapshot_fail(why, -EBADMSG,
				     SNAPSHOT_PACKED ": %ju chunks are not what %ju pages need",
				     (uintmax_t)h->chunks, (uintmax_t)h->stored_pages);
	index_bytes = h->chunks * sizeof(struct packed_entry);
	if (h->index_offset < sizeof *h || h->index_offset > file_bytes || index_bytes != file_bytes - h->index_offset)
		return snapshot_fail(
			why, -EBADMSG,
			SNAPSHOT_PACKED
			": %ju bytes long, and its index does not end there: it was cut, or is damaged",
			(uintmax_t)file_bytes);
	*ret_index_bytes = index_bytes;
	return 0;
}

static int take_entries(const struct packed_header *h, const struct packed_entry *index, struct packed *p, char *why)
{
	uint64_t page = packed_next_stored(p->image, 0), left = h->stored_pages;

	for (uint64_t i = 0; i < h->chunks; i++) {
		const struct packed_entry *e = &index[i];
		uint32_t pages = left < h->chunk_pages ? (uint32_t)left : h->chunk_pages;

		if (e->offset < sizeof *h || e->offset > h->index_offset || e->bytes > h->index_offset - e->offset ||
		    !e->bytes || e->bytes > ZSTD_compressBound(os_bytes(pages)))
			return snapshot_fail(why, -EBADMSG,
					     SNAPSHOT_PACKED
					     ": chunk %ju lies outside, or is longer than it can be",
					     (uintmax_t)i);
		p->chunk[i] = (struct packed_chunk){ page, pages, e->bytes, e->offset };
		left -= pages;
		for (uint32_t n = 0; n < pages; n++)
			page = packed_next_stored(p->image, page + 1);
	}
	return 0;
}

int packed_take_index(const struct packed_header *h, const struct packed_entry *index,
		      const struct snapshot_image *image, struct packed *ret_packed, char why[SNAPSHOT_WHY_BYTES])
{
	struct packed p = { .image = image, .compressed = true, .chunks = h->chunks };
	int r;

	if (XXH3_64bits(index, (size_t)h->chunks * sizeof *index) != h->checksum)
		return snapshot_fail(why, -EBADMSG,
				     SNAPSHOT_PACKED
				     ": the checksum of the index is wrong: the file is damaged");
	p.chunk = calloc(p.chunks ? (size_t)p.chunks : 1, sizeof *p.chunk);
	r = p.chunk ? take_entries(h, index, &p, why) : -ENOMEM;
	if (r)
		packed_free(&p);
	else
		*ret_packed = p;
	return r;
}

int packed_open(int fd, const struct snapshot_image *image, struct packed *ret_packed, char why[SNAPSHOT_WHY_BYTES])
{
	struct packed_entry *index = NULL;
	struct packed_header h = { 0 };
	uint64_t index_bytes = 0;
	struct stat st;
	int r;

	snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_PACKED ": cannot be read, or ends too early");
	r = fstat(fd, &st) ? -errno : read_all(fd, &h, sizeof h, 0);
	if (!r)
		r = packed_check_header(&h, image, (uint64_t)st.st_size, &index_bytes, why);
	if (!r) {
		index = malloc(index_bytes ? (size_t)index_bytes : 1);
		r = index ? read_all(fd, index, (size_t)index_bytes, h.index_offset) : -ENOMEM;
	}
	if (!r)
		r = packed_take_index(&h, index, image, ret_packed, why);
	free(index);
	return r;
}

/* ---- a plain `ram` ---------------------------------------------------------------------------- */

/* The chunk that begins at `page`; its end, which is the next one's beginning. */
static uint64_t plain_chunk(const struct snapshot_image *image, uint64_t page, uint32_t chunk_pages,
			    struct packed_chunk *ret_chunk)
{
	uint64_t last = page, next = packed_next_stored(image, page + 1);
	uint32_t pages = 1;

	while (pages < chunk_pages && next < image->pages && next - last <= GAP_PAGES) {
		pages++;
		last = next;
		next = packed_next_stored(image, last + 1);
	}
	*ret_chunk = (struct packed_chunk){ page, pages, (uint32_t)os_bytes(last + 1 - page), os_bytes(page) };
	return next;
}

static uint64_t fill_plain(const struct snapshot_image *image, uint32_t chunk_pages, struct packed_chunk *chunks)
{
	struct packed_chunk one;
	uint64_t count = 0;

	for (uint64_t page = packed_next_stored(image, 0); page < image->pages; count++) {
		page = plain_chunk(image, page, chunk_pages, &one);
		if (chunks)
			chunks[count] = one;
	}
	return count;
}

int packed_of_plain(const struct snapshot_image *image, uint32_t chunk_pages, struct packed *ret_packed)
{
	struct packed p = { .image = image, .chunks = fill_plain(image, chunk_pages, NULL) };

	p.chunk = calloc(p.chunks ? (size_t)p.chunks : 1, sizeof *p.chunk);
	if (!p.chunk)
		return -ENOMEM;
	fill_plain(image, chunk_pages, p.chunk);
	*ret_packed = p;
	return 0;
}

void packed_free(struct packed *p)
{
	free(p->chunk);
	p->chunk = NULL;
	p->chunks = 0;
}

/* ---- chunks ----------------------------------------------------------------------------------- */

uint64_t packed_find(const struct packed *p, uint64_t page)
{
	uint64_t from = 0, to = p->chunks;

	while (to - from > 1) {
		uint64_t middle = from + (to - from) / 2;

		if (p->chunk[middle].first <= page)
			from = middle;
		else
			to = middle;
	}
	return from;
}

static int take_plain(const struct packed *p, const struct packed_chunk *c, const uint8_t *from, size_t bytes, uint8_t *to)
{
	uint64_t page = c->first;

	if (bytes != c->bytes)
		return -EBADMSG;
	for (uint32_t i = 0; i < c->pages; i++) {
		memcpy(to + os_bytes(i), from + os_bytes(page - c->first), OS_PAGE_BYTES);
		page = packed_next_stored(p->image, page + 1);
	}
	return 0;
}

static int check_digests(const struct packed *p, const struct packed_chunk *c, const uint8_t *pages)
{
	uint64_t page = c->first;

	for (uint32_t i = 0; i < c->pages; i++) {
		if (XXH3_64bits(pages + os_bytes(i), OS_PAGE_BYTES) != table_of(p->image)[page].value)
			return -EBADMSG;
		page = packed_next_stored(p->image, page + 1);
	}
	return 0;
}

int packed_unpack(const struct packed *p, uint64_t n, const void *from, size_t bytes, uint8_t *to)
{
	const struct packed_chunk *c = &p->chunk[n];
	int r = 0;

	if (!p->compressed)
		r = take_plain(p, c, from, bytes, to);
	else if (ZSTD_decompress(to, os_bytes(c->pages), from, bytes) != os_bytes(c->pages)) /* errors are no size */
		r = -EBADMSG;
	return r ? r : check_digests(p, c, to);
}

int packed_verify(const struct packed *p, int fd, uint64_t *ret_bad, char why[SNAPSHOT_WHY_BYTES])
{
	uint8_t *frame = malloc(ZSTD_compressBound(os_bytes(PACKED_CHUNK_MAX_PAGES)));
	uint8_t *pages = malloc(os_bytes(PACKED_CHUNK_MAX_PAGES));
	uint64_t bad = 0;
	int r = frame && pages ? 0 : -ENOMEM;

	for (uint64_t i = 0; !r && i < p->chunks; i++) {
		const struct packed_chunk *c = &p->chunk[i];

		r = read_all(fd, frame, c->bytes, c->offset);
		if (!r && packed_unpack(p, i, frame, c->bytes, pages)) {
			if (!bad)
				snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_PACKED ": chunk %ju, of pages from %ju on, is not what was "
					 "stored there", (uintmax_t)i, (uintmax_t)c->first);
			bad += c->pages;
		}
	}
	if (r)
		snprintf(why, SNAPSHOT_WHY_BYTES, SNAPSHOT_PACKED ": cannot be read, or ends too early");
	free(pages);
	free(frame);
	if (!r)
		*ret_bad = bad;
	return r;
}
