/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Masked pages (core/mask.c): what they read as, how they are made, and what else may come there first. */
#include "mask_server.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define PAGES 256
#define FILE_PAGES 512
#define WORD UINT64_C(0x1717171717171717)

static struct {
	struct rig rig;
	struct mask_server server;
} t;

#define RAM (t.rig.ram)
#define BLOCK (t.rig.blocks[0].ram)

static int setup(void **state)
{
	static const uint64_t block_pages[RIG_BLOCKS] = { PAGES, 8 };

	(void)state;
	rig_open(&t.rig, block_pages, FILE_PAGES, 1000);
	return mask_server_start(&t.server, RAM);
}

static int teardown(void **state)
{
	(void)state;
	mask_server_stop(&t.server);
	rig_close(&t.rig);
	close(t.server.uffd); /* after the mappings that it watches */
	return 0;
}

/* ---- help --------------------------------------------------------------------------------------- */

static uint8_t *hva(uint64_t page)
{
	return rig_hva(&t.rig, 0, page);
}

static uint64_t tag(uint64_t file_page)
{
	return rig_file_tag(0, 0, file_page);
}

static uint64_t word_entry(uint64_t word)
{
	uint64_t number;

	ram_lock(RAM);
	assert_int_equal(ram_add_word(RAM, word, &number), 0);
	ram_unlock(RAM);
	return entry_masked(ENTRY_WORDS, number);
}

static int mask(uint64_t page, uint64_t pages, const uint64_t *entries)
{
	int r;

	ram_lock(RAM);
	r = ram_mask(RAM, BLOCK, page, pages, entries);
	ram_unlock(RAM);
	return r;
}

/* Pages of file 0, one after the other. */
static void mask_file(uint64_t page, uint64_t pages, uint64_t file_page)
{
	uint64_t entries[PAGES];

	for (uint64_t i = 0; i < pages; i++)
		entries[i] = entry_masked(t.rig.files[0].index, file_page + i);
	assert_int_equal(mask(page, pages, entries), 0);
}

static struct ram_mask_counts counts(void)
{
	struct ram_mask_counts c;

	ram_get_mask_counts(RAM, &c);
	return c;
}

/* With the mask lock in between: whoever has made a page wakes us before he writes its entry. */
static enum entry_source source(uint64_t page)
{
	(void)counts();
	return entry_source(rig_entry(&t.rig, 0, page));
}

static void check_maps(void)
{
	struct ram_counts c;
	uint64_t maps, splits;
	const char *why;

	ram_get_counts(RAM, &c);
	rig_read_maps(&t.rig);
	why = rig_check_block_maps(&t.rig, 0, &maps, &splits);
	if (why)
		fail_msg("%s", why);
	assert_int_equal(splits, 0);
	assert_int_equal(maps + 1, c.maps); /* and the other block */
}

/* ---- tests --------------------------------------------------------------------------------------- */

static void test_words(void **state)
{
	uint64_t entries[4] = { word_entry(WORD), word_entry(WORD), ENTRY_WATCHED, word_entry(1) };

	(void)state;
	assert_int_equal(mask(10, 4, entries), 0);
	check_maps();
	assert_int_equal(counts().masked_now, 3);
	assert_false(rig_has_memory_beneath(&t.rig, 0, 10));
	assert_true(rig_holds(hva(10), WORD));
	assert_int_equal(source(10), ENTRY_WATCHED);
	assert_int_equal(source(11), ENTRY_MASKED);
	assert_true(rig_holds(hva(12), 0));
	rig_write(hva(13), 77); /* the first access is a store */
	assert_true(rig_holds(hva(13), 77));
	assert_true(rig_holds(hva(11), WORD));
	assert_int_equal(counts().made, 3);
	assert_int_equal(counts().masked_now, 0);
	assert_int_equal(t.server.error, 0);
}

static void test_base_beneath_is_kept(void **state)
{
	uint64_t entries[3] = { word_entry(5), ENTRY_WATCHED, word_entry(6) };

	(void)state;
	rig_write(hva(21), 4711);
	assert_int_equal(mask(20, 3, entries), 0);
	assert_true(rig_holds(hva(21), 4711));
	assert_true(rig_holds(hva(20), 5));
	assert_true(rig_holds(hva(22), 6));
}

static void test_file_is_mapped(void **state)
{
	(void)state;
	mask_file(30, 8, 100);
	assert_true(rig_holds(hva(33), tag(103)));
	assert_int_equal(source(30), ENTRY_OVERLAY); /* all of the run */
	assert_int_equal(source(37), ENTRY_OVERLAY);
	assert_int_equal(counts().mapped, 8);
	assert_int_equal(counts().dropped, 0);
	rig_write(hva(34), 9);
	assert_true(rig_holds(hva(34), 9));
	assert_true(rig_holds(hva(35), tag(105)));
	check_maps();
}

static void test_file_is_copied_while_the_lock_is_held(void **state)
{
	(void)state;
	mask_file(30, 8, 100);
	ram_lock(RAM);
	assert_true(rig_holds(hva(33), tag(103))); /* the thread that serves it must not wait for us */
	ram_unlock(RAM);
	assert_int_equal(source(33), ENTRY_WATCHED);
	assert_int_equal(source(34), ENTRY_MASKED);
	assert_int_equal(counts().copied, 1);
	assert_true(rig_holds(hva(35), tag(105)));
	assert_int_equal(counts().mapped, 4); /* 34 to 37 */
	check_maps();
}

static void test_file_given_up_is_copied(void **state)
{
	(void)state;
	mask_file(40, 100, 0);
	assert_int_equal(ram_privatize(RAM, t.rig.files[0].index), 0);
	rig_write_file(&t.rig.files[0], 1);
	for (uint64_t i = 0; i < 100; i++)
		assert_true(rig_holds(hva(40 + i), tag(i)));
	assert_int_equal(counts().copied, 100);
	ram_lock(RAM);
	assert_int_equal(ram_overlay_pages(RAM, t.rig.files[0].index), 0);
	ram_unlock(RAM);
	check_maps();
}

static void test_discard_reads_as_zeros(void **state)
{
	uint64_t word = word_entry(WORD), entries[6] = { word, word, word, word, word, word };

	(void)state;
	assert_int_equal(mask(50, 6, entries), 0);
	assert_true(rig_holds(hva(50), WORD));
	ram_lock(RAM);
	assert_int_equal(ram_discard(RAM, BLOCK, 50, 3), 0);
	ram_unlock(RAM);
	for (uint64_t i = 0; i < 6; i++)
		assert_true(rig_holds(hva(50 + i), i < 3 ? 0 : WORD));
	assert_int_equal(counts().dropped, 2);
	check_maps();
}

static void test_overlay_over_masked(void **state)
{
	uint64_t word = word_entry(WORD), entries[6] = { word, word, word, word, word, word };

	(void)state;
	assert_int_equal(mask(60, 6, entries), 0);
	ram_lock(RAM);
	assert_int_equal(ram_map_overlay(RAM, BLOCK, 62, 2, t.rig.files[0].index, 7), 0);
	ram_unlock(RAM);
	assert_true(rig_holds(hva(61), WORD));
	assert_true(rig_holds(hva(62), tag(7)));
	assert_true(rig_holds(hva(64), WORD));
	check_maps();
	ram_lock(RAM);
	assert_int_equal(ram_return_base(RAM, BLOCK, 62, 2), 0);
	ram_unlock(RAM);
	check_maps();
}

static void test_unmask(void **state)
{
	uint64_t word = word_entry(3), entries[2] = { word, word };

	(void)state;
	mask_file(70, 20, 200);
	assert_int_equal(mask(100, 2, entries), 0);
	assert_true(rig_holds(hva(75), tag(205)));
	assert_int_equal(ram_unmask(RAM), 0);
	assert_int_equal(counts().masked_now, 0);
	for (uint64_t i = 0; i < PAGES; i++)
		assert_true(source(i) == ENTRY_BASE || source(i) == ENTRY_OVERLAY);
	for (uint64_t i = 0; i < 20; i++)
		assert_true(rig_holds(hva(70 + i), tag(200 + i)));
	assert_true(rig_holds(hva(100), 3) && rig_holds(hva(101), 3));
	check_maps();
	mask_file(120, 2, 0); /* and it begins anew */
	assert_true(rig_holds(hva(121), tag(1)));
}

static void test_storage_fails_for_a_while(void **state)
{
	(void)state;
	mask_file(130, 4, 300);
	ram_lock(RAM); /* so that it is copied */
	os_fault_arm(OS_FAULT_STORAGE_READ, 1, EIO);
	assert_true(rig_holds(hva(131), tag(301)));
	ram_unlock(RAM);
	assert_int_equal(t.server.error, -EIO);
}

static void test_failed_mapping_keeps_contents(void **state)
{
	(void)state;
	mask_file(140, 4, 310);
	os_fault_arm(OS_FAULT_MAP_FILE, 1, ENOMEM);
	for (uint64_t i = 0; i < 4; i++)
		assert_true(rig_holds(hva(140 + i), tag(310 + i)));
	check_maps();
}

static void test_refused(void **state)
{
	uint64_t many[1] = { word_entry(1) };

	(void)state;
	os_fault_arm(OS_FAULT_REGISTER, 1, EBUSY);
	assert_int_equal(mask(150, 1, many), -EBUSY);
	assert_int_equal(source(150), ENTRY_BASE);
	ram_lock(RAM);
	ram_hold(RAM, true);
	assert_int_equal(ram_mask(RAM, BLOCK, 150, 1, many), -EBUSY);
	ram_hold(RAM, false);
	ram_unlock(RAM);
	assert_int_equal(counts().masked, 0);
}

/*
 * Zero, repeated words, equal, on a disk, unique: half of each read, a quarter written. The numbers are exact
 * because nothing is mapped in runs that the test does not know: pages of files are masked one by one, each
 * apart from the next in its file.
 */
static void test_known_numbers(void **state)
{
	enum { ZERO, WORDS, EQUAL, DISK, CLASSES, EACH = 40 };
	uint64_t entries[CLASSES * EACH], first = 0;
	struct ram_mask_counts c;

	(void)state;
	for (uint64_t i = 0; i < CLASSES * EACH; i++) {
		uint64_t n = i / CLASSES;

		switch (i % CLASSES) {
		case ZERO:
			entries[i] = ENTRY_WATCHED; /* its backing is of that class already: it never gets the flag */
			break;
		case WORDS:
			entries[i] = word_entry(1000 + n);
			break;
		case EQUAL:
			entries[i] = entry_masked(t.rig.files[0].index, 400);
			break;
		default:
			entries[i] = entry_masked(t.rig.files[1].index, 2 * n);
		}
	}
	assert_int_equal(mask(first, CLASSES * EACH, entries), 0);
	c = counts();
	assert_int_equal(c.masked, 3 * EACH);
	for (uint64_t i = 0; i < CLASSES * EACH / 2; i++) {
		uint64_t n = i / CLASSES;
		uint64_t want[CLASSES] = { 0, 1000 + n, tag(400), rig_file_tag(1, 0, 2 * n) };

		assert_true(rig_holds(hva(first + i), want[i % CLASSES]));
	}
	for (uint64_t i = 0; i < CLASSES * EACH / 4; i++)
		rig_write(hva(first + i), i);
	c = counts();
	assert_int_equal(c.masked_now, 3 * EACH / 2);
	assert_int_equal(c.made, EACH / 2);
	assert_int_equal(c.mapped, 2 * EACH / 2);
	assert_int_equal(c.copied, 0);
	assert_int_equal(c.dropped, 0);
	assert_int_equal(ram_reconcile(RAM), 0);
	assert_int_equal(t.rig.files[0].lost[RAM_LOST_COPIED] + t.rig.files[1].lost[RAM_LOST_COPIED], 2 * EACH / 4);
	for (uint64_t i = 0; i < CLASSES * EACH / 4; i++)
		assert_true(rig_holds(hva(first + i), i));
	check_maps();
}

/* Many threads want the same pages, while others are taken away. */
static _Atomic uint64_t wrong;

static void *reader(void *arg)
{
	(void)arg;
	for (uint64_t i = 0; i < 64; i++)
		if (!rig_holds(hva(i), tag(i)))
			wrong++;
	return NULL;
}

static void test_many_want_one(void **state)
{
	(void)state;
	for (int round = 0; round < 20; round++) {
		pthread_t threads[4];

		mask_file(0, 64, 0);
		for (int i = 0; i < 4; i++)
			assert_int_equal(pthread_create(&threads[i], NULL, reader, NULL), 0);
		if (round % 2)
			assert_int_equal(ram_unmask_file(RAM, t.rig.files[0].index), 0);
		for (int i = 0; i < 4; i++)
			pthread_join(threads[i], NULL);
		assert_int_equal(ram_unmask(RAM), 0);
		ram_lock(RAM);
		assert_int_equal(ram_discard(RAM, BLOCK, 0, 64), 0);
		ram_unlock(RAM);
	}
	assert_int_equal(wrong, 0);
	check_maps();
}

/* ---- pages that another host has --------------------------------------------------------------------- */

static int expect(uint64_t page, uint64_t pages)
{
	int r;

	ram_lock(RAM);
	r = ram_expect(RAM, BLOCK, page, pages);
	ram_unlock(RAM);
	return r;
}

static bool put(uint64_t page, uint8_t fill)
{
	uint8_t contents[OS_PAGE_BYTES];
	bool done;

	memset(contents, fill, sizeof contents);
	assert_int_equal(ram_put(RAM, hva(page), contents, &done), 0);
	return done;
}

static void *read_first_byte(void *at)
{
	return (void *)(uintptr_t)*(volatile uint8_t *)at;
}

static void test_expected_pages_are_waited_for(void **state)
{
	pthread_t reader;
	void *read;

	(void)state;
	memset(hva(20), 0x11, OS_PAGE_BYTES); /* from an earlier pass */
	assert_int_equal(expect(18, 6), 0);
	assert_int_equal(ram_expected(RAM), 6);
	check_maps();
	assert_int_equal(pthread_create(&reader, NULL, read_first_byte, hva(20)), 0);
	while (t.server.error != -EINPROGRESS)
		usleep(100);
	assert_int_equal(pthread_tryjoin_np(reader, &read), EBUSY);
	assert_true(put(20, 0x22));
	pthread_join(reader, &read);
	assert_int_equal((uintptr_t)read, 0x22);
	assert_false(put(20, 0x33)); /* the guest's own now */
	assert_int_equal(*hva(20), 0x22);
	assert_true(put(18, 0x44));
	assert_int_equal(*hva(18), 0x44);
	assert_int_equal(ram_expected(RAM), 4);
	assert_int_equal(counts().put, 2);
}

/* What the guest has given up, or a disk has been read into, does not come back from the other host. */
static void test_other_contents_are_faster_than_expected_ones(void **state)
{
	(void)state;
	assert_int_equal(expect(30, 8), 0);
	ram_lock(RAM);
	assert_int_equal(ram_discard(RAM, BLOCK, 30, 2), 0);
	assert_int_equal(ram_map_overlay(RAM, BLOCK, 34, 2, t.rig.files[0].index, 7), 0);
	ram_unlock(RAM);
	assert_int_equal(ram_expected(RAM), 4);
	assert_false(put(30, 0x55));
	assert_false(put(35, 0x55));
	assert_true(put(32, 0x55));
	assert_int_equal(*hva(30), 0);
	assert_true(rig_holds(hva(34), tag(7)));
	assert_int_equal(*hva(32), 0x55);
}

static void test_overlays_and_masks_become_expected(void **state)
{
	(void)state;
	ram_lock(RAM);
	assert_int_equal(ram_map_overlay(RAM, BLOCK, 40, 4, t.rig.files[0].index, 1), 0);
	ram_unlock(RAM);
	mask_file(44, 4, 100);
	assert_int_equal(expect(38, 12), 0);
	assert_int_equal(ram_expected(RAM), 12);
	assert_int_equal(counts().masked_now, 12);
	check_maps();
	for (uint64_t i = 38; i < 50; i++)
		assert_true(put(i, (uint8_t)i));
	for (uint64_t i = 38; i < 50; i++)
		assert_int_equal(*hva(i), i);
	assert_int_equal(ram_expected(RAM), 0);
}

static void watch_base(uint64_t page, uint64_t pages)
{
	ram_lock(RAM);
	assert_int_equal(ram_watch_base(RAM, BLOCK, page, pages), 0);
	ram_unlock(RAM);
}

/* Between them base holds what it held, or zeros, and may be written; afterwards nothing is watched. */
static void test_expected_pages_near_each_other_are_one_mapping(void **state)
{
	struct ram_counts before, after;

	(void)state;
	for (uint64_t i = 100; i < 160; i += 3)
		memset(hva(i), (int)i, OS_PAGE_BYTES);
	ram_lock(RAM);
	assert_int_equal(ram_map_overlay(RAM, BLOCK, 130, 2, t.rig.files[0].index, 9), 0);
	ram_unlock(RAM);
	watch_base(100, 60);
	check_maps();
	ram_get_counts(RAM, &before);
	for (uint64_t i = 101; i < 160; i += 3) /* never where there are contents; once where a file is mapped */
		assert_int_equal(expect(i, 1), 0);
	ram_get_counts(RAM, &after);
	assert_in_range(after.maps, before.maps, before.maps + 1);
	check_maps();
	assert_int_equal(ram_expected(RAM), 20);
	for (uint64_t i = 100; i < 160; i += 3)
		if (i != 130)
			assert_int_equal(*hva(i), i);
	assert_true(rig_holds(hva(130), tag(9)));
	for (uint64_t i = 102; i < 160; i += 6)
		assert_int_equal(*hva(i), 0);
	for (uint64_t i = 105; i < 160; i += 6) {
		*hva(i) = 0x77;
		assert_int_equal(*hva(i), 0x77);
	}
	for (uint64_t i = 101; i < 160; i += 3)
		assert_true(put(i, 0x21));
	assert_int_equal(ram_unmask(RAM), 0);
	for (uint64_t i = 100; i < 160; i++)
		assert_int_equal(*hva(i), i == 130 ? *hva(130) : i % 3 == 1 && i != 130 ? i : i % 3 == 2 ? 0x21 : i % 2 ? 0x77 : 0);
	assert_int_equal(source(140), ENTRY_BASE);
	check_maps();
}

static void test_nothing_ends_the_wait_but_the_page(void **state)
{
	(void)state;
	assert_int_equal(expect(60, 2), 0);
	assert_int_equal(ram_unmask(RAM), -EINPROGRESS);
	assert_int_equal(ram_expected(RAM), 2);
	assert_true(put(60, 1));
	assert_true(put(61, 2));
	assert_int_equal(ram_unmask(RAM), 0);
	assert_int_equal(*hva(61), 2);
	assert_int_equal(source(61), ENTRY_BASE);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_words, setup, teardown),
		cmocka_unit_test_setup_teardown(test_base_beneath_is_kept, setup, teardown),
		cmocka_unit_test_setup_teardown(test_file_is_mapped, setup, teardown),
		cmocka_unit_test_setup_teardown(test_file_is_copied_while_the_lock_is_held, setup, teardown),
		cmocka_unit_test_setup_teardown(test_file_given_up_is_copied, setup, teardown),
		cmocka_unit_test_setup_teardown(test_discard_reads_as_zeros, setup, teardown),
		cmocka_unit_test_setup_teardown(test_overlay_over_masked, setup, teardown),
		cmocka_unit_test_setup_teardown(test_unmask, setup, teardown),
		cmocka_unit_test_setup_teardown(test_storage_fails_for_a_while, setup, teardown),
		cmocka_unit_test_setup_teardown(test_failed_mapping_keeps_contents, setup, teardown),
		cmocka_unit_test_setup_teardown(test_refused, setup, teardown),
		cmocka_unit_test_setup_teardown(test_known_numbers, setup, teardown),
		cmocka_unit_test_setup_teardown(test_many_want_one, setup, teardown),
		cmocka_unit_test_setup_teardown(test_expected_pages_are_waited_for, setup, teardown),
		cmocka_unit_test_setup_teardown(test_other_contents_are_faster_than_expected_ones, setup, teardown),
		cmocka_unit_test_setup_teardown(test_overlays_and_masks_become_expected, setup, teardown),
		cmocka_unit_test_setup_teardown(test_expected_pages_near_each_other_are_one_mapping, setup, teardown),
		cmocka_unit_test_setup_teardown(test_nothing_ends_the_wait_but_the_page, setup, teardown),
	};
	int uffd = os_uffd_open(OS_UFFD_MISSING_SHMEM);

	if (uffd < 0) {
		printf("skipped: no userfaultfd for the kernel's faults (%s)\n", strerror(-uffd));
		return 77;
	}
	close(uffd);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
