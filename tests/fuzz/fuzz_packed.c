/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A packed RAM that somebody hostile has made. What is believed of its index is within bounds and covers every
 * stored page once; a frame gives either the pages that were saved or none.
 *
 * Input: the first byte says what is made right again (1: the checksum of the index); then patches of a valid file:
 * place (2 bytes), length (1 byte), contents; a place behind its end cuts it.
 */
#include "fuzz.h"

#include "os/os.h"
#include "snapshot/packed.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#define PAGES 200u
#define FILE_MAX 65536u

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("\xff\xff\xff\xff\xff\xff\xff\xff"),
	FUZZ_TEXT("\x00\x00\x00\x00\x01\x00\x00\x00"),
	FUZZ_TEXT("\x28\xb5\x2f\xfd"), /* a frame begins */
	FUZZ_TEXT("\x50\x2a\x4d\x18"), /* one that is skipped */
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "packed", 4096, tokens, false };

static struct snapshot_image image;
static uint8_t good[FILE_MAX], good_pages[PAGES][OS_PAGE_BYTES];
static size_t good_bytes;

static void make_page(uint32_t page, uint8_t bytes[OS_PAGE_BYTES])
{
	for (size_t i = 0; i < OS_PAGE_BYTES; i++)
		bytes[i] = (uint8_t)(i / 128 + page * 7);
}

static void prepare(void)
{
	const struct snapshot_image layout = { .blocks = 1, .block = { { .name = "pc.ram", .pages = PAGES } } };
	int ram = os_memfd_create("ram", os_bytes(PAGES), false), packed = os_memfd_create("packed", 0, false);
	char why[SNAPSHOT_WHY_BYTES];
	uint64_t bytes;

	if (good_bytes)
		return;
	fuzz_require(!snapshot_image_create(&layout, &image));
	for (uint32_t page = 0; page < PAGES; page++) {
		if (page % 5 == 4)
			continue;
		make_page(page, good_pages[page]);
		image.block[0].table[page] = snapshot_classify(good_pages[page]);
		fuzz_require(!os_write_all(ram, good_pages[page], OS_PAGE_BYTES, os_bytes(page)));
	}
	fuzz_require(!packed_write(&image, ram, packed, NULL, &bytes, why) && bytes <= FILE_MAX);
	good_bytes = (size_t)bytes;
	fuzz_require(pread(packed, good, good_bytes, 0) == (ssize_t)good_bytes);
	close(ram);
	close(packed);
}

static size_t patch(struct fuzz_reader *in, uint8_t file[FILE_MAX])
{
	size_t length = good_bytes;

	memcpy(file, good, good_bytes);
	while (in->at < in->end) {
		size_t at = fuzz_number(in, 2) % (good_bytes + 64), n = fuzz_byte(in);
		const uint8_t *bytes = fuzz_bytes(in, &n);

		if (at >= good_bytes)
			length = good_bytes - (at - good_bytes);
		else
			memcpy(file + at, bytes, n < good_bytes - at ? n : good_bytes - at);
	}
	return length;
}

static void repair(uint8_t *file, size_t length)
{
	struct packed_header h;

	memcpy(&h, file, sizeof h);
	if (h.index_offset > length)
		return;
	h.checksum = XXH3_64bits(file + h.index_offset, length - (size_t)h.index_offset);
	memcpy(file, &h, sizeof h);
}

static void check_chunk(const struct packed *p, uint64_t n, const uint8_t *file, size_t length, uint64_t *page)
{
	static uint8_t pages[PACKED_CHUNK_MAX_PAGES << OS_PAGE_SHIFT];
	const struct packed_chunk *c = &p->chunk[n];
	int r;

	fuzz_require(c->pages && c->pages <= PACKED_CHUNK_MAX_PAGES && c->first == *page);
	fuzz_require(c->offset <= length && c->bytes <= length - c->offset);
	r = packed_unpack(p, n, file + c->offset, c->bytes, pages);
	fuzz_require(!r || r == -EBADMSG);
	for (uint32_t i = 0; i < c->pages; i++) {
		fuzz_require(r || !memcmp(pages + os_bytes(i), good_pages[*page], OS_PAGE_BYTES));
		*page = packed_next_stored(&image, *page + 1);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	static uint8_t file[FILE_MAX];
	struct fuzz_reader in = { data + 1, data + bytes };
	char why[SNAPSHOT_WHY_BYTES] = "";
	struct packed packed = { 0 };
	uint64_t page, bad;
	size_t length;
	int fd;

	if (!bytes)
		return 0;
	prepare();
	length = patch(&in, file);
	if (data[0] & 1)
		repair(file, length);
	fd = os_memfd_create("packed", 0, false);
	fuzz_require(!os_write_all(fd, file, length, 0));
	if (packed_open(fd, &image, &packed, why)) {
		fuzz_require(why[0] && memchr(why, '\0', sizeof why) && !packed.chunk);
	} else {
		page = packed_next_stored(&image, 0);
		for (uint64_t i = 0; i < packed.chunks; i++)
			check_chunk(&packed, i, file, length, &page);
		fuzz_require(page == PAGES);
		fuzz_require(!packed_verify(&packed, fd, &bad, why) && bad <= PAGES);
		packed_free(&packed);
	}
	close(fd);
	return 0;
}
