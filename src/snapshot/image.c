/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/image.h"

#include "os/os.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define MAX_PAGES (1ull << 36) /* 256 TiB */
#define READ_PAGES 256u

_Static_assert(sizeof(struct snapshot_header) == 40, "the layout is the format");
_Static_assert(sizeof(struct snapshot_block) == 72, "the layout is the format");
_Static_assert(sizeof(struct snapshot_page) == 16, "the layout is the format");

int snapshot_fail(char why[SNAPSHOT_WHY_BYTES], int r, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(why, SNAPSHOT_WHY_BYTES, format, args);
	va_end(args);
	return r;
}

/* ---- tables --------------------------------------------------------------------------------- */

static int place_tables(struct snapshot_image *image)
{
	struct snapshot_page *at;

	image->memory_bytes = (size_t)image->pages * sizeof *at;
	image->memory = mmap(NULL, image->memory_bytes ? image->memory_bytes : 1, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (image->memory == MAP_FAILED) {
		image->memory = NULL;
		return -ENOMEM;
	}
	at = image->memory;
	for (uint32_t i = 0; i < image->blocks; at += image->block[i++].pages)
		image->block[i].table = at;
	return 0;
}

static void place_blocks(struct snapshot_image *image)
{
	image->pages = 0;
	for (uint32_t i = 0; i < image->blocks; i++) {
		image->block[i].ram_page = image->pages;
		image->pages += image->block[i].pages;
	}
}

int snapshot_image_create(const struct snapshot_image *layout, struct snapshot_image *ret_image)
{
	struct snapshot_image image = *layout;
	int r;

	image.checksum = 0;
	place_blocks(&image);
	r = place_tables(&image);
	if (!r)
		*ret_image = image;
	return r;
}

void snapshot_image_free(struct snapshot_image *image)
{
	if (image->memory)
		munmap(image->memory, image->memory_bytes ? image->memory_bytes : 1);
	image->memory = NULL;
}

struct snapshot_page snapshot_classify(const void *page)
{
	uint64_t word;

	memcpy(&word, page, sizeof word);
	/* The page equals itself, moved by a word: every word is the first. */
	if (!memcmp(page, (const uint8_t *)page + sizeof word, OS_PAGE_BYTES - sizeof word))
		return (struct snapshot_page){ SNAPSHOT_WORD, 0, word };
	return (struct snapshot_page){ SNAPSHOT_DATA, 0, XXH3_64bits(page, OS_PAGE_BYTES) };
}

/* ---- the file ------------------------------------------------------------------------------- */

static void fill_blocks(const struct snapshot_image *image, struct snapshot_block blocks[SNAPSHOT_BLOCKS])
{
	memset(blocks, 0, SNAPSHOT_BLOCKS * sizeof *blocks);
	for (uint32_t i = 0; i < image->blocks; i++) {
		snprintf(blocks[i].name, sizeof blocks[i].name, "%s", image->block[i].name);
		blocks[i].pages = image->block[i].pages;
	}
}

static uint64_t checksum(const struct snapshot_block *blocks, size_t blocks_bytes, const void *table, size_t bytes)
{
	XXH3_state_t *state = XXH3_createState();
	uint64_t sum;

	if (!state)
		return 0;
	XXH3_64bits_reset(state);
	XXH3_64bits_update(state, blocks, blocks_bytes);
	XXH3_64bits_update(state, table, bytes);
	sum = XXH3_64bits_digest(state);
	XXH3_freeState(state);
	return sum;
}

int snapshot_image_write(struct snapshot_image *image, int fd)
{
	struct snapshot_block blocks[SNAPSHOT_BLOCKS];
	size_t blocks_bytes = image->blocks * sizeof blocks[0];
	struct snapshot_header header = {
		.magic = SNAPSHOT_MAGIC,
		.version = SNAPSHOT_VERSION,
		.page_bytes = OS_PAGE_BYTES,
		.blocks = image->blocks,
		.volumes = image->volumes,
		.pages = image->pages,
	};
	int r;

	fill_blocks(image, blocks);
	header.checksum = image->checksum = checksum(blocks, blocks_bytes, image->memory, image->memory_bytes);
	r = os_write_all(fd, &header, sizeof header, 0);
	if (!r)
		r = os_write_all(fd, blocks, blocks_bytes, sizeof header);
	if (!r)
		r = os_write_all(fd, image->memory, image->memory_bytes, sizeof header + blocks_bytes);
	return r;
}

/* Sizes first: nothing is allocated for a file that is not as long as it says. */
static int check_header(const struct snapshot_header *h, uint64_t file_bytes, char *why)
{
	if (h->magic != SNAPSHOT_MAGIC)
		return snapshot_fail(why, -EBADMSG, "pages: no snapshot of Latent begins like this");
	if (h->version != SNAPSHOT_VERSION)
		return snapshot_fail(why, -EBADMSG,
				     "pages: version %u, and this Latent reads version %u", h->version,
				     SNAPSHOT_VERSION);
	if (h->page_bytes != OS_PAGE_BYTES)
		return snapshot_fail(why, -EBADMSG, "pages: pages of %u bytes, not %zu", h->page_bytes,
				     OS_PAGE_BYTES);
	if (!h->blocks || h->blocks > SNAPSHOT_BLOCKS || h->volumes > SNAPSHOT_VOLUMES)
		return snapshot_fail(why, -EBADMSG,
				     "pages: %u blocks and %u volumes are more than there can be",
				     h->blocks, h->volumes);
	if (h->pages > MAX_PAGES || file_bytes != sizeof *h + h->blocks * sizeof(struct snapshot_block) +
							  h->pages * sizeof(struct snapshot_page))
		return snapshot_fail(why, -EBADMSG,
				     "pages: %ju bytes long, which is not what %ju pages need",
				     (uintmax_t)file_bytes, (uintmax_t)h->pages);
	return 0;
}

static int take_blocks(const struct snapshot_header *h, const struct snapshot_block *blocks,
		       struct snapshot_image *image, char *why)
{
	uint64_t pages = 0;

	image->blocks = h->blocks;
	image->volumes = h->volumes;
	for (uint32_t i = 0; i < h->blocks; i++) {
		if (!memchr(blocks[i].name, '\0', sizeof blocks[i].name) || !blocks[i].pages ||
		    blocks[i].pages > h->pages - pages)
			return snapshot_fail(why, -EBADMSG,
					     "pages: block %u has no name, no size, or too large a one",
					     i);
		pages += blocks[i].pages;
		memcpy(image->block[i].name, blocks[i].name, sizeof image->block[i].name);
		image->block[i].pages = blocks[i].pages;
	}
	if (pages != h->pages)
		return snapshot_fail(why, -EBADMSG, "pages: the blocks have %ju pages, and %ju are said",
				     (uintmax_t)pages, (uintmax_t)h->pages);
	place_blocks(image);
	return 0;
}

/* What others equal is stored itself: a reference leads to contents, and never to another reference. */
static bool is_stored(const struct snapshot_image *image, const struct snapshot_page *page)
{
	return !page->volume && page->value < image->pages &&
	       snapshot_page_at(image, page->value)->kind == SNAPSHOT_DATA;
}

static int check_pages(const struct snapshot_image *image, char *why)
{
	const struct snapshot_page *page = image->memory;

	for (uint64_t i = 0; i < image->pages; i++, page++) {
		if (page->kind >= SNAPSHOT_KINDS)
			return snapshot_fail(why, -EBADMSG,
					     "pages: page %ju is of kind %u, which there is not",
					     (uintmax_t)i, page->kind);
		if (page->kind == SNAPSHOT_VOLUME && (page->volume >= image->volumes || page->value >= MAX_PAGES))
			return snapshot_fail(why, -EBADMSG,
					     "pages: page %ju refers to a place that there is not",
					     (uintmax_t)i);
		if (page->kind == SNAPSHOT_EQUAL && !is_stored(image, page))
			return snapshot_fail(why, -EBADMSG,
					     "pages: page %ju is said to equal one that is not stored",
					     (uintmax_t)i);
	}
	return 0;
}

int snapshot_image_read(int fd, struct snapshot_image *ret_image, char why[SNAPSHOT_WHY_BYTES])
{
	struct snapshot_block blocks[SNAPSHOT_BLOCKS];
	struct snapshot_image image = { 0 };
	struct snapshot_header h = { 0 };
	size_t blocks_bytes;
	struct stat st;
	int r;

	snprintf(why, SNAPSHOT_WHY_BYTES, "pages: cannot be read, or ends too early");
	r = fstat(fd, &st) ? -errno : os_read_all(fd, &h, sizeof h, 0);
	if (!r)
		r = check_header(&h, (uint64_t)st.st_size, why);
	if (r)
		return r == -ENODATA ? -EBADMSG : r;
	blocks_bytes = h.blocks * sizeof blocks[0];
	r = os_read_all(fd, blocks, blocks_bytes, sizeof h);
	if (!r)
		r = take_blocks(&h, blocks, &image, why);
	if (!r)
		r = place_tables(&image);
	if (!r)
		r = os_read_all(fd, image.memory, image.memory_bytes, sizeof h + blocks_bytes);
	if (!r && checksum(blocks, blocks_bytes, image.memory, image.memory_bytes) != h.checksum)
		r = snapshot_fail(why, -EBADMSG, "pages: the checksum is wrong: the file is damaged");
	if (!r)
		r = check_pages(&image, why);
	image.checksum = h.checksum;
	if (r)
		snapshot_image_free(&image);
	else
		*ret_image = image;
	return r == -ENODATA ? -EBADMSG : r;
}

/* ---- looking through it ---------------------------------------------------------------------- */

void snapshot_image_count(const struct snapshot_image *image, struct snapshot_counts *c)
{
	const struct snapshot_page *page = image->memory;

	*c = (struct snapshot_counts){ .pages = image->pages };
	for (uint64_t i = 0; i < image->pages; i++, page++) {
		c->word += page->kind == SNAPSHOT_WORD;
		c->zero += page->kind == SNAPSHOT_WORD && !page->value;
		c->data += page->kind == SNAPSHOT_DATA;
		c->equal += page->kind == SNAPSHOT_EQUAL;
		c->volume += page->kind == SNAPSHOT_VOLUME;
		if (page->kind == SNAPSHOT_VOLUME)
			c->in_volume[page->volume]++;
	}
}

int snapshot_image_verify(const struct snapshot_image *image, int ram_fd, uint64_t *ret_bad,
			  char why[SNAPSHOT_WHY_BYTES])
{
	uint8_t *chunk = malloc(os_bytes(READ_PAGES));
	const struct snapshot_page *table = image->memory;
	uint64_t bad = 0;
	int r = chunk ? 0 : -ENOMEM;

	for (uint64_t at = 0; !r && at < image->pages;) {
		uint64_t n = 0;

		while (at < image->pages && table[at].kind != SNAPSHOT_DATA)
			at++;
		while (n < READ_PAGES && at + n < image->pages && table[at + n].kind == SNAPSHOT_DATA)
			n++;
		r = n ? os_read_all(ram_fd, chunk, os_bytes(n), os_bytes(at)) : 0;
		for (uint64_t i = 0; !r && i < n; i++) {
			if (XXH3_64bits(chunk + os_bytes(i), OS_PAGE_BYTES) == table[at + i].value)
				continue;
			if (!bad++)
				snprintf(why, SNAPSHOT_WHY_BYTES, "ram: page %ju is not what was stored there",
					 (uintmax_t)(at + i));
		}
		at += n;
	}
	if (r)
		snprintf(why, SNAPSHOT_WHY_BYTES, "ram: cannot be read, or ends too early");
	free(chunk);
	*ret_bad = bad;
	return r;
}
