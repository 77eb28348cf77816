/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Messages of a migration: what is made is read again, and what is wrong is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "migrate/wire.h"
#include "os/os.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PAGES 1000u

static const struct wire_limits limits = { .pages = PAGES, .volumes = 2, .volume_pages = { 0, 50 } };

struct rig {
	struct wire_batch batch;
	_Alignas(8) uint8_t payload[WIRE_PAYLOAD_MAX], unpacked[WIRE_DATA_PAGES_MAX << OS_PAGE_SHIFT];
	char why[SNAPSHOT_WHY_BYTES];
};

static int setup(void **state)
{
	*state = calloc(1, sizeof(struct rig));
	return *state ? 0 : -1;
}

static int teardown(void **state)
{
	free(*state);
	return 0;
}

static struct wire_run run_of(uint64_t page, uint32_t pages, enum wire_kind kind, uint16_t volume, uint64_t value)
{
	return (struct wire_run){ page, pages, (uint16_t)kind, volume, value };
}

static void make_page(uint8_t page[OS_PAGE_BYTES], unsigned seed, bool packable)
{
	for (size_t i = 0; i < OS_PAGE_BYTES; i++)
		page[i] = packable ? (uint8_t)(i / 64 + seed) : (uint8_t)((seed = seed * 1103515245u + 12345u) >> 16);
}

/* Everything that may be said, closed at this level and read again. */
static void round_trip(struct rig *rig, int level, bool packable)
{
	const struct wire_run word = run_of(0, 100, WIRE_WORD, 0, 7), volume = run_of(200, 10, WIRE_VOLUME, 1, 40);
	uint8_t page[OS_PAGE_BYTES];
	struct wire_message message = { WIRE_PAGES, rig->payload, 0 };
	struct wire_pages pages;
	const uint8_t *data;
	struct wire_run run;

	assert_true(wire_add(&rig->batch, &word, NULL));
	assert_true(wire_add(&rig->batch, &volume, NULL));
	for (unsigned i = 0; i < WIRE_DATA_PAGES_MAX; i++) {
		run = run_of(500 + i, 1, WIRE_DATA, 0, 0);
		make_page(page, i, packable);
		assert_true(wire_add(&rig->batch, &run, page));
	}
	assert_false(wire_add(&rig->batch, &run, page));
	message.bytes = wire_close(&rig->batch, level, rig->payload);
	assert_int_equal(rig->batch.runs, 0);
	assert_int_equal(wire_read_pages(&message, &limits, &pages, rig->why), 0);
	assert_int_equal(pages.runs, 3); /* pages that follow each other are one run */
	assert_memory_equal(&pages.run[0], &word, sizeof word);
	assert_memory_equal(&pages.run[1], &volume, sizeof volume);
	assert_int_equal(pages.run[2].pages, WIRE_DATA_PAGES_MAX);
	assert_int_equal(pages.packed_bytes != 0, level && packable);
	assert_int_equal(wire_unpack(&pages, rig->unpacked, &data, rig->why), 0);
	for (unsigned i = 0; i < WIRE_DATA_PAGES_MAX; i++) {
		make_page(page, i, packable);
		assert_memory_equal(data + os_bytes(i), page, sizeof page);
	}
}

static void test_pages_are_read_as_they_were_made(void **state)
{
	round_trip(*state, 0, true);
	round_trip(*state, 1, true);
	round_trip(*state, 1, false);
}

static void test_runs_that_do_not_continue_stay_apart(void **state)
{
	struct rig *rig = *state;
	const struct wire_run runs[] = {
		run_of(0, 1, WIRE_WORD, 0, 0), run_of(1, 1, WIRE_WORD, 0, 1), run_of(3, 1, WIRE_WORD, 0, 1),
		run_of(4, 2, WIRE_VOLUME, 1, 4), run_of(6, 2, WIRE_VOLUME, 1, 5), run_of(8, 1, WIRE_VOLUME, 0, 7),
		run_of(9, 1, WIRE_MISSING, 0, 0),
	};

	for (size_t i = 0; i < sizeof runs / sizeof runs[0]; i++)
		assert_true(wire_add(&rig->batch, &runs[i], NULL));
	assert_int_equal(rig->batch.runs, sizeof runs / sizeof runs[0]);
}

static void test_a_full_batch_takes_no_more(void **state)
{
	struct rig *rig = *state;
	uint8_t page[OS_PAGE_BYTES] = { 0 };
	struct wire_run run;

	for (uint32_t i = 0; i < WIRE_RUNS_MAX; i++) {
		run = run_of(2 * i, 1, WIRE_WORD, 0, 0);
		assert_true(wire_add(&rig->batch, &run, NULL));
	}
	run = run_of(3, 1, WIRE_DATA, 0, 0);
	assert_false(wire_add(&rig->batch, &run, page));
	assert_int_equal(rig->batch.data_pages, 0);
	run = run_of(2 * (WIRE_RUNS_MAX - 1) + 1, 1, WIRE_WORD, 0, 0);
	assert_true(wire_add(&rig->batch, &run, NULL)); /* it continues the last one */
}

static void refuse_run(struct rig *rig, struct wire_run run)
{
	struct wire_pages_header h = { .runs = 1, .data_pages = run.kind == WIRE_DATA ? 1 : 0 };
	struct wire_message message = { WIRE_PAGES, rig->payload, sizeof h + sizeof run + os_bytes(h.data_pages) };
	struct wire_pages pages;

	memcpy(rig->payload, &h, sizeof h);
	memcpy(rig->payload + sizeof h, &run, sizeof run);
	rig->why[0] = '\0';
	assert_int_equal(wire_read_pages(&message, &limits, &pages, rig->why), -EPROTO);
	assert_true(rig->why[0]);
}

static void test_wrong_runs_are_refused(void **state)
{
	const struct wire_run wrong[] = {
		{ PAGES, 1, WIRE_WORD, 0, 0 }, { PAGES - 1, 2, WIRE_WORD, 0, 0 }, { UINT64_MAX, 2, WIRE_WORD, 0, 0 },
		{ 0, 0, WIRE_WORD, 0, 0 }, { 0, UINT32_MAX, WIRE_WORD, 0, 0 }, { 0, 1, WIRE_KINDS, 0, 0 },
		{ 0, 1, WIRE_WORD, 1, 0 }, { 0, 1, WIRE_MISSING, 0, 1 }, { 0, 1, WIRE_DATA, 0, 1 },
		{ 0, 2, WIRE_DATA, 0, 0 }, { 0, 1, WIRE_VOLUME, 0, 0 }, { 0, 1, WIRE_VOLUME, 2, 0 },
		{ 0, 1, WIRE_VOLUME, 1, 50 }, { 0, 2, WIRE_VOLUME, 1, 49 }, { 0, 1, WIRE_VOLUME, 1, UINT64_MAX },
	};

	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
		refuse_run(*state, wrong[i]);
}

static void test_contents_must_be_as_long_as_they_say(void **state)
{
	struct rig *rig = *state;
	const struct wire_run run = run_of(0, 1, WIRE_DATA, 0, 0);
	struct wire_message message = { WIRE_PAGES, rig->payload, 0 };
	struct wire_pages pages;
	const uint8_t *data;
	uint8_t page[OS_PAGE_BYTES];
	size_t bytes;

	make_page(page, 1, true);
	assert_true(wire_add(&rig->batch, &run, page));
	bytes = wire_close(&rig->batch, 1, rig->payload);
	for (message.bytes = 0; message.bytes < bytes; message.bytes++)
		assert_int_equal(wire_read_pages(&message, &limits, &pages, rig->why), -EPROTO);
	message.bytes = bytes;
	assert_int_equal(wire_read_pages(&message, &limits, &pages, rig->why), 0);
	rig->payload[bytes - 1] ^= 0xff;
	rig->payload[bytes - 9] ^= 0xff;
	if (wire_unpack(&pages, rig->unpacked, &data, rig->why)) /* zstd need not see it; it must not write beyond */
		assert_true(rig->why[0]);
}

static void refuse_header(uint32_t type, uint32_t bytes, bool from_source)
{
	const struct wire_header h = { .type = type, .bytes = bytes };
	char why[SNAPSHOT_WHY_BYTES] = "";

	assert_int_equal(wire_check_header(&h, from_source, why), -EPROTO);
	assert_true(why[0]);
}

static void test_headers(void **state)
{
	const struct wire_header ping = { .type = WIRE_PING }, odd = { .type = WIRE_PING, .reserved = 1 };
	char why[SNAPSHOT_WHY_BYTES];

	(void)state;
	assert_int_equal(wire_check_header(&ping, true, why), 0);
	assert_int_equal(wire_check_header(&ping, false, why), 0);
	assert_int_equal(wire_check_header(&odd, true, why), -EPROTO);
	refuse_header(WIRE_TYPES, 0, true);
	refuse_header(UINT32_MAX, 0, true);
	refuse_header(WIRE_PING, 1, true);
	refuse_header(WIRE_PAGES, WIRE_PAYLOAD_MAX + 1, true);
	refuse_header(WIRE_PAGES, 100, false); /* only the source has pages */
	refuse_header(WIRE_TOKEN, 0, false);
	refuse_header(WIRE_WANT, 8, true);
	refuse_header(WIRE_RUNNING, 0, true);
}

static void test_hellos(void **state)
{
	struct wire_hello good = { .magic = WIRE_MAGIC, .version = WIRE_VERSION, .page_bytes = OS_PAGE_BYTES }, hello, read;
	struct wire_message message = { WIRE_HELLO, (const uint8_t *)&hello, sizeof hello };
	char why[SNAPSHOT_WHY_BYTES];

	(void)state;
	hello = good;
	assert_int_equal(wire_read_hello(&message, &read, why), 0);
	hello.version++;
	assert_int_equal(wire_read_hello(&message, &read, why), -EPROTO);
	assert_non_null(strstr(why, "version"));
	hello = good;
	hello.page_bytes = 16384;
	assert_int_equal(wire_read_hello(&message, &read, why), -EPROTO);
	hello = good;
	hello.magic++;
	assert_int_equal(wire_read_hello(&message, &read, why), -EPROTO);
	message.type = WIRE_PING;
	assert_int_equal(wire_read_hello(&message, &read, why), -EPROTO);
}

static int read_blocks(const struct snapshot_block *blocks, size_t count, struct snapshot_image *layout)
{
	const struct wire_message message = { WIRE_BLOCKS, (const uint8_t *)blocks, count * sizeof *blocks };
	char why[SNAPSHOT_WHY_BYTES];

	return wire_read_blocks(&message, layout, why);
}

static void test_blocks(void **state)
{
	struct snapshot_block two[2] = { { "pc.ram", 100 }, { "mem1", 50 } };
	struct snapshot_image layout;

	(void)state;
	assert_int_equal(read_blocks(two, 2, &layout), 0);
	assert_int_equal(layout.pages, 150);
	assert_int_equal(layout.block[1].ram_page, 100);
	strcpy(two[1].name, "pc.ram");
	assert_int_equal(read_blocks(two, 2, &layout), -EPROTO);
	memset(two[1].name, 'x', sizeof two[1].name); /* no end */
	assert_int_equal(read_blocks(two, 2, &layout), -EPROTO);
	strcpy(two[1].name, "a\x1b[2J");
	assert_int_equal(read_blocks(two, 2, &layout), -EPROTO);
	strcpy(two[1].name, "mem1");
	two[1].pages = UINT64_MAX;
	assert_int_equal(read_blocks(two, 2, &layout), -EPROTO);
	two[1].pages = 0;
	assert_int_equal(read_blocks(two, 2, &layout), -EPROTO);
	assert_int_equal(read_blocks(two, 0, &layout), -EPROTO);
}

static void test_equal_pages(void **state)
{
	struct wire_same same[2] = { { .page = 0, .digest = 1 }, { .page = PAGES - 1, .digest = 2 } };
	struct wire_message message = { WIRE_SAME, (const uint8_t *)same, sizeof same };
	const struct wire_same *read;
	const uint64_t *digests;
	char why[SNAPSHOT_WHY_BYTES];
	size_t count;

	(void)state;
	assert_int_equal(wire_read_same(&message, PAGES, &read, &count, why), 0);
	assert_int_equal(count, 2);
	assert_memory_equal(read, same, sizeof same);
	same[1].page = PAGES;
	assert_int_equal(wire_read_same(&message, PAGES, &read, &count, why), -EPROTO);
	for (message.bytes = 0; message.bytes < sizeof same; message.bytes++)
		if (message.bytes != sizeof same[0])
			assert_int_equal(wire_read_same(&message, PAGES, &read, &count, why), -EPROTO);
	message.bytes = sizeof(uint64_t) * 3;
	assert_int_equal(wire_read_have(&message, &digests, &count, why), 0);
	assert_int_equal(count, 3);
	message.bytes--;
	assert_int_equal(wire_read_have(&message, &digests, &count, why), -EPROTO);
	refuse_header(WIRE_HAVE, 8, true);
	refuse_header(WIRE_HAVE, 8 * (WIRE_HAVE_MAX + 1), false);
	refuse_header(WIRE_SAME, sizeof same, false);
	refuse_header(WIRE_LACK, 8, true);
}

static void test_hints(void **state)
{
	const struct wire_limits disks = { .pages = PAGES, .disks = 1u << 2 | 1ull << 63 };
	struct wire_hint hint[2] = { { .page = 0, .file_page = WIRE_HINT_PAGES - 1, .file = 2 }, { .page = PAGES - 1, .file = 63 } };
	struct wire_message message = { WIRE_HINT, (const uint8_t *)hint, sizeof hint };
	const struct wire_hint *read;
	char why[SNAPSHOT_WHY_BYTES];
	size_t count;

	(void)state;
	assert_int_equal(wire_read_hints(&message, &disks, &read, &count, why), 0);
	assert_int_equal(count, 2);
	assert_memory_equal(read, hint, sizeof hint);
	hint[1].page = PAGES;
	assert_int_equal(wire_read_hints(&message, &disks, &read, &count, why), -EPROTO);
	hint[1].page = 0;
	for (uint32_t file = 0; file < 70; file++) { /* beyond 63, too */
		hint[1].file = file;
		assert_int_equal(wire_read_hints(&message, &disks, &read, &count, why), file == 2 || file == 63 ? 0 : -EPROTO);
	}
	hint[1].file = UINT32_MAX;
	assert_int_equal(wire_read_hints(&message, &disks, &read, &count, why), -EPROTO);
	hint[1].file = 2;
	hint[1].file_page = WIRE_HINT_PAGES;
	assert_int_equal(wire_read_hints(&message, &disks, &read, &count, why), -EPROTO);
	hint[1].file_page = 0;
	hint[1].reserved = 1;
	assert_int_equal(wire_read_hints(&message, &disks, &read, &count, why), -EPROTO);
	hint[1].reserved = 0;
	for (message.bytes = 0; message.bytes < sizeof hint; message.bytes++)
		if (message.bytes != sizeof hint[0])
			assert_int_equal(wire_read_hints(&message, &disks, &read, &count, why), -EPROTO);
	refuse_header(WIRE_HINT, sizeof hint, false);
	refuse_header(WIRE_HINT, sizeof hint[0] * (WIRE_HINTS_MAX + 1), true);
	refuse_header(WIRE_STALE, 8, true);
}

static void test_wanted_pages_are_in_ram(void **state)
{
	uint64_t wanted[2] = { 0, PAGES - 1 };
	const struct wire_message message = { WIRE_WANT, (const uint8_t *)wanted, sizeof wanted };
	const uint64_t *pages;
	char why[SNAPSHOT_WHY_BYTES];
	size_t count;

	(void)state;
	assert_int_equal(wire_read_wanted(&message, PAGES, &pages, &count, why), 0);
	assert_int_equal(count, 2);
	wanted[1] = PAGES;
	assert_int_equal(wire_read_wanted(&message, PAGES, &pages, &count, why), -EPROTO);
}

static void test_missing_pages_are_in_ram(void **state)
{
	struct wire_owed owed[2] = { { 0, PAGES }, { PAGES - 1, 1 } };
	const struct wire_message message = { WIRE_OWED, (const uint8_t *)owed, sizeof owed };
	const struct wire_message odd = { WIRE_OWED, (const uint8_t *)owed, sizeof owed - 8 };
	const struct wire_owed *read;
	char why[SNAPSHOT_WHY_BYTES];
	size_t count;

	(void)state;
	assert_int_equal(wire_read_owed(&message, PAGES, &read, &count, why), 0);
	assert_int_equal(count, 2);
	assert_int_equal(wire_read_owed(&odd, PAGES, &read, &count, why), -EPROTO);
	owed[1].pages = 2;
	assert_int_equal(wire_read_owed(&message, PAGES, &read, &count, why), -EPROTO);
	owed[1] = (struct wire_owed){ 1, UINT64_MAX };
	assert_int_equal(wire_read_owed(&message, PAGES, &read, &count, why), -EPROTO);
	owed[1] = (struct wire_owed){ 1, 0 };
	assert_int_equal(wire_read_owed(&message, PAGES, &read, &count, why), -EPROTO);
}

static void test_files_are_as_many_as_the_manifest_has(void **state)
{
	struct {
		struct wire_files header;
		struct digest digest[2];
	} files = { .header = { .count = 2, .ballot = 1 }, .digest[1].bytes[15] = 7 };
	struct wire_message message = { WIRE_FILES, (const uint8_t *)&files, sizeof files };
	const struct digest *digests;
	char why[SNAPSHOT_WHY_BYTES];
	bool ballot = false;

	(void)state;
	assert_int_equal(wire_read_files(&message, 2, &ballot, &digests, why), 0);
	assert_true(ballot && digests[1].bytes[15] == 7);
	assert_int_equal(wire_read_files(&message, 1, &ballot, &digests, why), -EPROTO);
	files.header.count = 3;
	assert_int_equal(wire_read_files(&message, 3, &ballot, &digests, why), -EPROTO);
	files.header = (struct wire_files){ 2, 2 };
	assert_int_equal(wire_read_files(&message, 2, &ballot, &digests, why), -EPROTO);
	message.bytes = 4;
	assert_int_equal(wire_read_files(&message, 2, &ballot, &digests, why), -EPROTO);
}

static void test_sentences_have_no_control_characters(void **state)
{
	const struct wire_message message = { WIRE_REFUSE, (const uint8_t *)"a\x1b[2Jb", 6 };
	char text[WIRE_TEXT_MAX], why[SNAPSHOT_WHY_BYTES];

	(void)state;
	assert_int_equal(wire_read_text(&message, text, why), 0);
	assert_string_equal(text, "a?[2Jb");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_pages_are_read_as_they_were_made, setup, teardown),
		cmocka_unit_test_setup_teardown(test_runs_that_do_not_continue_stay_apart, setup, teardown),
		cmocka_unit_test_setup_teardown(test_a_full_batch_takes_no_more, setup, teardown),
		cmocka_unit_test_setup_teardown(test_wrong_runs_are_refused, setup, teardown),
		cmocka_unit_test_setup_teardown(test_contents_must_be_as_long_as_they_say, setup, teardown),
		cmocka_unit_test(test_headers),
		cmocka_unit_test(test_hellos),
		cmocka_unit_test(test_blocks),
		cmocka_unit_test(test_equal_pages),
		cmocka_unit_test(test_hints),
		cmocka_unit_test(test_wanted_pages_are_in_ram),
		cmocka_unit_test(test_missing_pages_are_in_ram),
		cmocka_unit_test(test_files_are_as_many_as_the_manifest_has),
		cmocka_unit_test(test_sentences_have_no_control_characters),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
