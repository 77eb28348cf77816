/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Packed RAM: what goes in comes out, chunk by chunk, and nothing else does. */
#include "os/os.h"
#include "snapshot/active.h"
#include "snapshot/packed.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define PAGES 500u

struct sample {
	struct snapshot_image image;
	int ram_fd, packed_fd;
	uint64_t packed_bytes;
};

/* Which pages are stored: runs, single ones, a long gap, and the last page. */
static bool is_stored(uint64_t page)
{
	return page < 100 || (page < 200 && page % 3 == 0) || (page > 350 && page < 420) || page == PAGES - 1;
}

static void fill_page(uint64_t page, uint64_t words[512])
{
	for (uint64_t i = 0; i < 512; i++)
		words[i] = page % 2 ? (page * 512 + i) * 0x9e3779b97f4a7c15u : i / 64 + page; /* hard and easy to pack */
}

static void make(struct sample *s, bool any)
{
	const struct snapshot_image layout = { .blocks = 2, .block = { { .name = "pc.ram", .pages = 300 },
								       { .name = "more", .pages = PAGES - 300 } } };
	char why[SNAPSHOT_WHY_BYTES];
	uint64_t words[512];

	assert_int_equal(snapshot_image_create(&layout, &s->image), 0);
	s->ram_fd = os_memfd_create("ram", os_bytes(PAGES), false);
	s->packed_fd = os_memfd_create("packed", 0, false);
	assert_true(s->ram_fd >= 0 && s->packed_fd >= 0);
	for (uint64_t page = 0; any && page < PAGES; page++) {
		if (!is_stored(page))
			continue;
		fill_page(page, words);
		((struct snapshot_page *)s->image.memory)[page] = snapshot_classify(words);
		assert_int_equal(os_write_all(s->ram_fd, words, sizeof words, os_bytes(page)), 0);
	}
	assert_int_equal(packed_write(&s->image, s->ram_fd, s->packed_fd, NULL, &s->packed_bytes, why), 0);
}

static void unmake(struct sample *s)
{
	close(s->ram_fd);
	close(s->packed_fd);
	snapshot_image_free(&s->image);
}

/* Every stored page is in one chunk, at its place and with its contents. */
static void check_chunks(const struct sample *s, const struct packed *p, int fd)
{
	static uint8_t raw[1 << 21], pages[PACKED_CHUNK_MAX_PAGES << OS_PAGE_SHIFT];
	uint64_t page = packed_next_stored(&s->image, 0), words[512];

	for (uint64_t n = 0; n < p->chunks; n++) {
		const struct packed_chunk *c = &p->chunk[n];

		assert_int_equal(c->first, page);
		assert_int_equal(pread(fd, raw, c->bytes, (off_t)c->offset), c->bytes);
		assert_int_equal(packed_unpack(p, n, raw, c->bytes, pages), 0);
		for (uint32_t i = 0; i < c->pages; i++) {
			fill_page(page, words);
			assert_memory_equal(pages + os_bytes(i), words, sizeof words);
			assert_int_equal(packed_find(p, page), n);
			page = packed_next_stored(&s->image, page + 1);
		}
		raw[p->compressed ? c->bytes / 2 : 7] ^= 1; /* in a plain one not every byte counts: gaps */
		assert_int_equal(packed_unpack(p, n, raw, c->bytes, pages), -EBADMSG);
		assert_int_equal(packed_unpack(p, n, raw, c->bytes - 1, pages), -EBADMSG);
	}
	assert_int_equal(page, PAGES);
}

static void comes_out_as_it_went_in(void **state)
{
	char why[SNAPSHOT_WHY_BYTES];
	struct sample s;
	struct packed p;
	uint64_t bad;

	(void)state;
	make(&s, true);
	assert_int_equal(packed_open(s.packed_fd, &s.image, &p, why), 0);
	assert_true(s.packed_bytes < os_bytes(250));
	check_chunks(&s, &p, s.packed_fd);
	assert_int_equal(packed_verify(&p, s.packed_fd, &bad, why), 0);
	assert_int_equal(bad, 0);
	packed_free(&p);
	unmake(&s);
}

static void a_plain_file_has_chunks_too(void **state)
{
	static const uint32_t sizes[] = { 1, PACKED_CHUNK_PAGES, PACKED_CHUNK_MAX_PAGES };
	struct sample s;
	struct packed p;

	(void)state;
	make(&s, true);
	for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
		assert_int_equal(packed_of_plain(&s.image, sizes[i], &p), 0);
		check_chunks(&s, &p, s.ram_fd);
		/* The gap between 198 and 351 is not read along. */
		for (uint64_t n = 0; n < p.chunks; n++)
			assert_true(p.chunk[n].first > 198 || p.chunk[n].offset + p.chunk[n].bytes <= os_bytes(199));
		packed_free(&p);
	}
	unmake(&s);
}

static void nothing_stored(void **state)
{
	char why[SNAPSHOT_WHY_BYTES];
	struct sample s;
	struct packed p;

	(void)state;
	make(&s, false);
	assert_int_equal(packed_open(s.packed_fd, &s.image, &p, why), 0);
	assert_int_equal(p.chunks, 0);
	packed_free(&p);
	assert_int_equal(packed_of_plain(&s.image, 1, &p), 0);
	assert_int_equal(p.chunks, 0);
	packed_free(&p);
	unmake(&s);
}

/* Each byte of header and index, one after the other, is another one: refused, with a sentence. */
static void a_damaged_index_is_refused(void **state)
{
	char why[SNAPSHOT_WHY_BYTES];
	struct packed_header header;
	struct sample s;
	struct packed p;
	uint8_t byte;

	(void)state;
	make(&s, true);
	assert_int_equal(pread(s.packed_fd, &header, sizeof header, 0), sizeof header);
	for (uint64_t at = 0; at < s.packed_bytes; at++) {
		bool reserved = at >= offsetof(struct packed_header, reserved) && at < offsetof(struct packed_header, chunks);

		if (at == sizeof header)
			at = header.index_offset;
		assert_int_equal(pread(s.packed_fd, &byte, 1, (off_t)at), 1);
		byte ^= 0x40;
		assert_int_equal(os_write_all(s.packed_fd, &byte, 1, at), 0);
		why[0] = '\0';
		if (packed_open(s.packed_fd, &s.image, &p, why) == 0) {
			assert_true(reserved);
			packed_free(&p);
		} else {
			assert_true(why[0]);
		}
		byte ^= 0x40;
		assert_int_equal(os_write_all(s.packed_fd, &byte, 1, at), 0);
	}
	assert_int_equal(ftruncate(s.packed_fd, (off_t)s.packed_bytes - 1), 0);
	assert_int_equal(packed_open(s.packed_fd, &s.image, &p, why), -EBADMSG);
	unmake(&s);
}

static void verify_finds_a_flipped_bit(void **state)
{
	char why[SNAPSHOT_WHY_BYTES] = "";
	struct sample s;
	struct packed p;
	uint64_t bad = 0;
	uint8_t byte;

	(void)state;
	make(&s, true);
	assert_int_equal(packed_open(s.packed_fd, &s.image, &p, why), 0);
	assert_int_equal(pread(s.packed_fd, &byte, 1, (off_t)p.chunk[2].offset + 40), 1);
	byte ^= 2;
	assert_int_equal(os_write_all(s.packed_fd, &byte, 1, p.chunk[2].offset + 40), 0);
	assert_int_equal(packed_verify(&p, s.packed_fd, &bad, why), 0);
	assert_int_equal(bad, p.chunk[2].pages);
	assert_non_null(strstr(why, "chunk 2"));
	packed_free(&p);
	unmake(&s);
}

static void it_can_be_stopped(void **state)
{
	const _Atomic bool stop = true;
	char why[SNAPSHOT_WHY_BYTES];
	struct sample s;

	(void)state;
	make(&s, true);
	assert_int_equal(packed_write(&s.image, s.ram_fd, s.packed_fd, &stop, &s.packed_bytes, why), -EINTR);
	unmake(&s);
}

/* The list of pages in use: with copies of their contents, and, beside packed RAM, alone. */
static void pages_in_use(void **state)
{
	static const struct active_page list[] = { { 99, ACTIVE_WRITTEN, 1 }, { 3, 0, 2 } };
	const int volumes[SNAPSHOT_VOLUMES] = { 0 };
	char why[SNAPSHOT_WHY_BYTES];
	struct active_set set;
	struct sample s;

	(void)state;
	make(&s, true);
	for (int alone = 0; alone < 2; alone++) {
		int fd = os_memfd_create("active", 0, false);
		struct stat st;

		assert_int_equal(active_write(fd, list, 2, &s.image, alone ? -1 : s.ram_fd, volumes), 0);
		assert_int_equal(active_read(fd, &s.image, &set, why), 0);
		assert_int_equal(set.count, 2);
		assert_memory_equal(set.list, list, sizeof list);
		assert_int_equal(set.contents_offset, alone ? 0 : os_bytes(1));
		for (int i = 0; !alone && i < 2; i++) {
			uint8_t page[OS_PAGE_BYTES];

			assert_int_equal(os_read_all(fd, page, sizeof page, set.contents_offset + os_bytes(i)), 0);
			assert_int_equal(XXH3_64bits(page, sizeof page), set.digest[i]);
		}
		active_free(&set);
		assert_int_equal(fstat(fd, &st), 0);
		assert_int_equal(st.st_size, alone ? sizeof(struct active_header) + sizeof list : os_bytes(3));
		assert_int_equal(ftruncate(fd, st.st_size - 1), 0);
		assert_int_equal(active_read(fd, &s.image, &set, why), -EBADMSG);
		assert_int_equal(ftruncate(fd, (off_t)os_bytes(1)), 0); /* between the two */
		assert_int_equal(active_read(fd, &s.image, &set, why), -EBADMSG);
		close(fd);
	}
	unmake(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(comes_out_as_it_went_in),
		cmocka_unit_test(a_plain_file_has_chunks_too),
		cmocka_unit_test(nothing_stored),
		cmocka_unit_test(a_damaged_index_is_refused),
		cmocka_unit_test(verify_finds_a_flipped_bit),
		cmocka_unit_test(it_can_be_stopped),
		cmocka_unit_test(pages_in_use),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
