/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The scanner on a small guest RAM, whose "guest" is this thread: what it touches between two looks is known. Block 0
 * is base, with an overlay in its middle; block 1 is base.
 */
#include "activity/scan.h"
#include "activity/seen.h"
#include "ram_rig.h"

#include "os/probe.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <time.h>

#include <cmocka.h>

#define PAGES 1200u /* more than two groups */
#define OVERLAY_PAGE 600u
#define OVERLAY_PAGES 200u /* more than are settled at once */
#define COPIED_PAGE (OVERLAY_PAGE + 10) /* a private copy */
#define PERIOD_US 20000u
#define HOT_PAGE 100u
#define WARM_PAGE 200u
#define COLD_PAGE 300u
#define RUN_PAGES 40u
#define MASKED_PAGE 900u

static struct rig rig;
static struct scan *scan;
static unsigned freezes;
static bool freeze_fails;

static int freeze(void *ctx)
{
	(void)ctx;
	if (freeze_fails)
		return -ETIMEDOUT;
	freezes++;
	return os_freeze(SIGRTMAX - 4, 1000);
}

static void thaw(void *ctx)
{
	(void)ctx;
	os_thaw();
}

static uint64_t entry_at(uint64_t page) { return ram_activity(rig.blocks[0].ram, page); }
static enum activity_class class_at(uint64_t page) { return activity_class_of(entry_at(page)); }

static void touch(uint64_t page, uint64_t pages)
{
	for (uint64_t i = page; i < page + pages; i++)
		(void)*(volatile uint8_t *)rig_hva(&rig, 0, i);
}

static int set_up_with(bool can_freeze)
{
	static const uint64_t block_pages[RIG_BLOCKS] = { PAGES, 8 };
	struct scan_freezer freezer = { freeze, thaw, NULL };

	freezes = 0;
	freeze_fails = false;
	rig_open(&rig, block_pages, PAGES, UINT64_C(1) << 40);
	for (uint64_t i = 0; i < MASKED_PAGE; i++)
		rig_write(rig_hva(&rig, 0, i), i + 1);
	ram_lock(rig.ram);
	assert_int_equal(ram_map_overlay(rig.ram, rig.blocks[0].ram, OVERLAY_PAGE, OVERLAY_PAGES, rig.files[0].index, 0), 0);
	ram_unlock(rig.ram);
	touch(OVERLAY_PAGE, OVERLAY_PAGES);
	rig_write(rig_hva(&rig, 0, COPIED_PAGE), 77);
	assert_int_equal(scan_create(rig.ram, can_freeze ? &freezer : NULL, &scan), 0);
	scan_set_period(scan, PERIOD_US);
	return 0;
}

static void set_activity(uint64_t page, enum activity state)
{
	ram_lock(rig.ram);
	ram_set_activity(rig.ram, rig.blocks[0].ram, page, entry_activity(state, 1));
	ram_unlock(rig.ram);
}

static int set_up(void **state)
{
	(void)state;
	return set_up_with(true);
}

static int tear_down(void **state)
{
	(void)state;
	scan_destroy(scan);
	rig_close(&rig);
	return 0;
}

static void rest(uint64_t us)
{
	struct timespec t = { (time_t)(us / 1000000), (long)(us % 1000000) * 1000 };

	nanosleep(&t, NULL);
}

static struct scan_report report(void)
{
	struct scan_report r;

	scan_get_report(scan, &r);
	return r;
}

/* One pass from its beginning to its end. */
static void finish_pass(void)
{
	uint64_t passes = report().passes;

	for (unsigned i = 0; report().passes == passes; i++) {
		uint64_t us = scan_step(scan);

		assert_true(i < 100000 && us < 10 * PERIOD_US);
		rest(us);
	}
}

/* The passes that are needed before a look can tell anything: one samples. */
static void begin(void) { finish_pass(); }

/* Between two looks the guest uses what is hot and, every other time, what is warm. */
static void look(unsigned times)
{
	static unsigned turn;

	for (; times; times--) {
		touch(HOT_PAGE, RUN_PAGES);
		if (turn++ % 2)
			touch(WARM_PAGE, RUN_PAGES);
		finish_pass();
	}
}

static void check_classes(void)
{
	for (uint64_t i = 0; i < RUN_PAGES; i++) {
		assert_int_equal(class_at(HOT_PAGE + i), CLASS_HOT);
		assert_true(class_at(WARM_PAGE + i) == CLASS_WARM || class_at(WARM_PAGE + i) == CLASS_COOL);
		assert_true(class_at(COLD_PAGE + i) >= CLASS_COLD);
	}
}

static void check_contents(void)
{
	for (uint64_t i = 0; i < PAGES; i++) {
		bool overlay = i >= OVERLAY_PAGE && i < OVERLAY_PAGE + OVERLAY_PAGES;
		uint64_t tag = i >= MASKED_PAGE ? 0 : i == COPIED_PAGE ? 77 : overlay ? rig_file_tag(0, 0, i - OVERLAY_PAGE) : i + 1;

		if (!rig_holds(rig_hva(&rig, 0, i), tag))
			fail_msg("page %" PRIu64 " does not hold %" PRIx64, i, tag);
	}
}

/* After three looks; and hot pages stay hot though they are sampled seldom. */
static void test_base(void **state)
{
	(void)state;
	begin();
	look(3);
	check_classes();
	look(20);
	check_classes();
	assert_int_equal(class_at(COLD_PAGE), CLASS_FROZEN);
	assert_int_equal(class_at(MASKED_PAGE), CLASS_FROZEN); /* nothing was ever there */
	check_contents();
}

/* What was hot is found out to be no more, within as many looks as there are between two samples. */
static void test_hot_cools(void **state)
{
	(void)state;
	begin();
	look(3);
	assert_int_equal(class_at(HOT_PAGE), CLASS_HOT);
	for (unsigned i = 0; i < activity_states[ACTIVITY_HOT].looks_per_sample + 3; i++)
		finish_pass();
	assert_true(class_at(HOT_PAGE) >= CLASS_COLD);
}

/* Hot pages cost an eighth of what they would if each look took them out of the page table. */
static void test_hot_is_sampled_seldom(void **state)
{
	uint64_t before;

	(void)state;
	begin();
	look(3);
	before = report().refaults;
	for (unsigned i = 0; i < 32; i++) {
		touch(HOT_PAGE, RUN_PAGES);
		finish_pass();
	}
	assert_in_range(report().refaults - before, 2 * RUN_PAGES, 6 * RUN_PAGES);
}

/* An overlay's clean pages are classified, and the copy among them is neither classified nor lost. */
static void test_overlay(void **state)
{
	uint64_t hot = OVERLAY_PAGE + 4, cold = OVERLAY_PAGE + 40;
	bool single = os_features_get()->uffd_features & OS_UFFD_WP_ASYNC;
	const char *why;

	(void)state;
	begin();
	for (unsigned i = 0; i < 3; i++) {
		touch(hot, 1);
		touch(COPIED_PAGE, 1);
		finish_pass();
	}
	assert_true(freezes > 0);
	assert_int_equal(class_at(hot), CLASS_HOT);
	assert_true(class_at(cold) >= CLASS_COLD);
	assert_int_equal(entry_at(COPIED_PAGE), 0);
	if (single)
		assert_true(class_at(hot + 1) >= CLASS_COLD);
	assert_int_equal(report().granularity_pages[SCAN_CLEAN], single ? 1 : SCAN_AROUND_PAGES);
	assert_int_equal(report().by_source[SCAN_CLEAN], OVERLAY_PAGES - 1);
	assert_int_equal(report().by_source[SCAN_NOTHING], 1);
	check_contents();
	for (unsigned i = 0; i < 30; i++) { /* copies appear while it goes on */
		rig_write(rig_hva(&rig, 0, OVERLAY_PAGE + i), 500 + i);
		finish_pass();
	}
	for (unsigned i = 0; i < 30; i++)
		assert_true(rig_holds(rig_hva(&rig, 0, OVERLAY_PAGE + i), 500 + i));
	assert_int_equal(ram_reconcile(rig.ram), 0);
	why = rig_check(&rig, true, NULL);
	if (why)
		fail_msg("%s", why);
}

/* Copies in a row become base, where they can be looked at; nothing of them is lost. */
static void test_copies(void **state)
{
	uint64_t first = OVERLAY_PAGE + 20, last = OVERLAY_PAGE + OVERLAY_PAGES - 1;
	const char *why;

	(void)state;
	for (uint64_t i = first; i <= last; i++)
		rig_write(rig_hva(&rig, 0, i), 900 + i);
	begin();
	for (unsigned i = 0; i < 4; i++) {
		touch(first + 4, 1);
		finish_pass();
	}
	assert_int_equal(report().settled, last + 1 - first);
	assert_true(report().frozen_us > 0);
	for (uint64_t i = first; i <= last; i++) {
		assert_int_equal(entry_source(rig_entry(&rig, 0, i)), ENTRY_BASE);
		if (i == first + 4)
			assert_int_equal(class_at(i), CLASS_HOT);
		else
			assert_true(class_at(i) >= CLASS_COLD);
		assert_true(rig_holds(rig_hva(&rig, 0, i), 900 + i));
	}
	assert_int_equal(entry_source(rig_entry(&rig, 0, COPIED_PAGE)), ENTRY_OVERLAY); /* it stands alone */
	assert_int_equal(ram_reconcile(rig.ram), 0);
	why = rig_check(&rig, true, NULL);
	if (why)
		fail_msg("%s", why);
}

/* Copies that cannot be moved stay, with what they hold, and are moved at a later pass. */
static void test_copies_that_fail(void **state)
{
	static const enum os_fault_point points[] = { OS_FAULT_SETTLE_WRITE, OS_FAULT_MAP_BASE };
	uint64_t first = OVERLAY_PAGE + 20, last = OVERLAY_PAGE + 60;

	(void)state;
	for (uint64_t i = first; i <= last; i++)
		rig_write(rig_hva(&rig, 0, i), 900 + i);
	for (size_t p = 0; p < sizeof points / sizeof points[0]; p++) {
		os_fault_arm(points[p], 1, ENOMEM);
		finish_pass();
		assert_int_equal(os_fault_calls(points[p]), 1);
		os_fault_arm(points[p], 0, 0);
		for (uint64_t i = first; i <= last; i++) {
			assert_int_equal(entry_source(rig_entry(&rig, 0, i)), ENTRY_OVERLAY);
			assert_true(rig_holds(rig_hva(&rig, 0, i), 900 + i));
		}
	}
	finish_pass();
	assert_int_equal(report().settled, last + 1 - first);
	for (uint64_t i = first; i <= last; i++)
		assert_true(rig_holds(rig_hva(&rig, 0, i), 900 + i));
}

/* Nobody can be stopped, or it fails: nothing is known of overlays, and base goes on. */
static void test_no_freezing(void **state)
{
	(void)state;
	set_up_with(false);
	begin();
	look(3);
	check_classes();
	assert_int_equal(entry_at(OVERLAY_PAGE), 0);
	assert_int_equal(report().by_source[SCAN_NOTHING], OVERLAY_PAGES);
	check_contents();
	tear_down(NULL);
	set_up_with(true);
	freeze_fails = true;
	begin();
	look(4);
	check_classes(); /* of another group than the overlay's */
	assert_int_equal(entry_at(OVERLAY_PAGE), 0);
	check_contents();
}

/* While guest RAM is held nothing is zapped, and no look is believed that others may have spoilt. */
static void test_held(void **state)
{
	uint64_t was;

	(void)state;
	begin();
	look(3);
	was = entry_at(HOT_PAGE);
	ram_lock(rig.ram);
	ram_hold(rig.ram, true);
	assert_int_equal(ram_zap_base(rig.ram, rig.blocks[0].ram, 0, OVERLAY_PAGE), 0); /* as a save does */
	ram_unlock(rig.ram);
	for (unsigned i = 0; i < 10; i++)
		rest(scan_step(scan));
	assert_true(report().paused);
	assert_int_equal(entry_at(HOT_PAGE), was);
	ram_lock(rig.ram);
	ram_hold(rig.ram, false);
	ram_unlock(rig.ram);
	finish_pass();
	assert_false(report().paused);
	assert_int_equal(entry_at(HOT_PAGE), was); /* it was not there, and that means nothing */
	look(3);
	check_classes();
}

/* A save needs base for a userfaultfd of its own. */
static void test_yield(void **state)
{
	int uffd = os_uffd_open_unserved(OS_UFFD_PAGEFAULT_FLAG_WP | OS_UFFD_WP_HUGETLBFS_SHMEM);
	uint8_t *hva = rig_hva(&rig, 0, 0);

	(void)state;
	if (uffd < 0)
		skip();
	begin();
	look(3);
	assert_int_equal(os_uffd_register_wp(uffd, hva, os_bytes(OVERLAY_PAGE)), -EBUSY);
	scan_yield(scan, SCAN_YIELDS);
	for (unsigned i = 0; i < 5; i++)
		rest(scan_step(scan));
	assert_int_equal(os_uffd_register_wp(uffd, hva, os_bytes(OVERLAY_PAGE)), 0);
	assert_int_equal(os_uffd_unregister(uffd, hva, os_bytes(OVERLAY_PAGE)), 0);
	scan_yield(scan, SCAN_ALONE);
	look(5);
	check_classes();
	close(uffd);
}

/* All of base is write-protected for somebody else. */
static int protect_base(void)
{
	int uffd = os_uffd_open_unserved(OS_UFFD_PAGEFAULT_FLAG_WP | OS_UFFD_WP_HUGETLBFS_SHMEM);
	static const uint64_t from[] = { 0, OVERLAY_PAGE + OVERLAY_PAGES }, to[] = { OVERLAY_PAGE, PAGES };

	for (unsigned i = 0; uffd >= 0 && i < 2; i++) {
		uint8_t *hva = rig_hva(&rig, 0, from[i]);

		assert_int_equal(os_uffd_register_wp(uffd, hva, os_bytes(to[i] - from[i])), 0);
		assert_int_equal(os_uffd_protect(uffd, hva, os_bytes(to[i] - from[i]), true), 0);
	}
	return uffd;
}

static void check_protected(void)
{
	static uint8_t flags[PAGES];
	struct os_pagemap *pagemap;

	assert_int_equal(os_pagemap_open(&pagemap), 0);
	assert_int_equal(os_pagemap_flags(pagemap, rig_hva(&rig, 0, 0), PAGES, flags), 0);
	os_pagemap_close(pagemap);
	for (uint64_t i = 0; i < PAGES; i++)
		if (i < OVERLAY_PAGE || i >= OVERLAY_PAGE + OVERLAY_PAGES)
			assert_true(flags[i] & OS_PAGE_PROTECTED);
}

/* A migration has protected base, and holds it: base is looked at, stays protected, and nobody is stopped for the rest. */
static void test_beside(void **state)
{
	enum activity overlay;
	unsigned frozen;
	int uffd;

	(void)state;
	begin();
	look(3);
	overlay = activity_of(entry_at(OVERLAY_PAGE + 40));
	scan_yield(scan, SCAN_YIELDS);
	uffd = protect_base();
	if (uffd < 0)
		skip();
	ram_lock(rig.ram);
	ram_hold(rig.ram, true);
	ram_unlock(rig.ram);
	scan_yield(scan, SCAN_BESIDE);
	set_activity(HOT_PAGE, ACTIVITY_FROZEN);
	set_activity(COLD_PAGE, ACTIVITY_HOT);
	frozen = freezes;
	look(16); /* as often as a hot one is sampled, and some */
	assert_int_equal(report().granularity_pages[SCAN_BASE], 1);
	check_classes();
	check_protected();
	assert_int_equal(activity_of(entry_at(OVERLAY_PAGE + 40)), overlay);
	assert_int_equal(freezes, frozen);
	check_contents();
	scan_yield(scan, SCAN_YIELDS);
	close(uffd);
	ram_lock(rig.ram);
	ram_hold(rig.ram, false);
	ram_unlock(rig.ram);
	scan_yield(scan, SCAN_ALONE);
	look(5);
	check_classes();
}

/* Whoever turns it off meanwhile takes nothing away from who has it yield. */
static void test_off_while_it_yields(void **state)
{
	int uffd;

	(void)state;
	begin();
	scan_yield(scan, SCAN_YIELDS);
	uffd = protect_base();
	if (uffd < 0)
		skip();
	scan_set_period(scan, 0);
	assert_int_equal(scan_step(scan), UINT64_MAX);
	check_protected();
	close(uffd);
}

/* The pass under way and those to come go at the pace of a migration, and afterwards as before. */
static void test_pace_of_a_migration(void **state)
{
	const uint64_t long_us = 3600000000u, pass_us = SCAN_PERIOD_MIN_US;

	(void)state;
	begin();
	scan_set_period(scan, long_us);
	(void)scan_step(scan);
	assert_int_equal(report().period_us, long_us);
	scan_set_migration_pass(scan, pass_us);
	for (uint64_t passes = report().passes; report().passes < passes + 3;) {
		uint64_t us = scan_step(scan);

		assert_true(us <= pass_us);
		assert_int_equal(report().period_us, pass_us);
		rest(us);
	}
	assert_int_not_equal(entry_at(HOT_PAGE), 0);
	scan_set_migration_pass(scan, 0);
	(void)scan_step(scan);
	assert_int_equal(report().period_us, long_us);
	assert_int_equal(entry_at(HOT_PAGE), 0); /* it is all new: looks were not as far apart as was asked for */
}

/* Masked pages are not used until somebody makes them come; they stay masked under all looks. */
static void test_masked(void **state)
{
	uint64_t entries[16], word;
	struct ram_mask_counts counts;
	int uffd = os_uffd_open_unserved(OS_UFFD_MISSING_SHMEM);

	(void)state;
	if (uffd < 0)
		skip();
	begin();
	ram_lock(rig.ram);
	ram_watch(rig.ram, uffd);
	assert_int_equal(ram_add_word(rig.ram, 0xabcd, &word), 0);
	for (unsigned i = 0; i < 16; i++)
		entries[i] = entry_masked(ENTRY_WORDS, word);
	assert_int_equal(ram_mask(rig.ram, rig.blocks[0].ram, MASKED_PAGE, 16, entries), 0);
	ram_unlock(rig.ram);
	look(2);
	for (unsigned i = 0; i < 8; i++)
		assert_int_equal(ram_make(rig.ram, rig_hva(&rig, 0, MASKED_PAGE + i)), 0);
	for (unsigned i = 0; i < 4; i++) {
		touch(MASKED_PAGE, 8);
		finish_pass();
	}
	ram_get_mask_counts(rig.ram, &counts);
	assert_int_equal(counts.masked_now, 8);
	for (unsigned i = 0; i < 8; i++) {
		assert_int_equal(class_at(MASKED_PAGE + i), CLASS_HOT);
		assert_true(rig_holds(rig_hva(&rig, 0, MASKED_PAGE + i), 0xabcd));
		assert_true(class_at(MASKED_PAGE + 8 + i) >= CLASS_COLD);
	}
	assert_int_equal(ram_unmask(rig.ram), 0);
	look(2);
	scan_set_period(scan, 0);
	(void)scan_step(scan);
	close(uffd);
}

/* Off costs nothing and forgets nothing; RAM that goes and comes is no matter; a new period counts at once. */
static void test_off_and_on(void **state)
{
	uint64_t was;
	struct rig_block *b = &rig.blocks[1];

	(void)state;
	begin();
	look(3);
	was = entry_at(HOT_PAGE);
	scan_set_period(scan, 0);
	assert_true(scan_step(scan) == UINT64_MAX);
	assert_int_equal(report().period_us, 0);
	assert_int_equal(entry_at(HOT_PAGE), was);
	ram_lock(rig.ram);
	ram_remove_block(rig.ram, b->ram);
	ram_unlock(rig.ram);
	scan_set_period(scan, 3600u * 1000000u);
	(void)scan_step(scan);
	scan_set_period(scan, PERIOD_US);
	begin();
	assert_int_equal(entry_at(HOT_PAGE), 0); /* what was known is of another time */
	assert_int_equal(rig_add_block(&rig, 1), 0);
	look(4);
	check_classes();
	check_contents();
}

static void test_report(void **state)
{
	struct scan_report r;
	uint64_t sum = 0;

	(void)state;
	begin();
	look(4);
	r = report();
	for (unsigned i = 0; i < ACTIVITY_CLASSES; i++)
		sum += r.pages[i];
	assert_int_equal(sum, PAGES + 8);
	assert_int_equal(r.by_source[SCAN_BASE] + r.by_source[SCAN_CLEAN] + r.by_source[SCAN_NOTHING], PAGES + 8);
	assert_int_equal(r.pages[CLASS_HOT], RUN_PAGES);
	assert_int_equal(r.passes, 5);
	assert_true(r.in_use[SCAN_WINDOW_10S] == SCAN_UNKNOWN); /* it has not run for so long */
	assert_true(r.cpu_ns > 0 && r.holds > 0 && r.sampled >= r.refaults);
	assert_int_equal(r.granularity_pages[SCAN_BASE], os_uffd_open_unserved(OS_UFFD_WP_HUGETLBFS_SHMEM) >= 0 ? 1 : 16);
}

/* ---- what is written ---------------------------------------------------------------------------------- */

static enum activity state_at(uint64_t page) { return activity_of(entry_at(page)); }

static void write_again(uint64_t page) { rig_write(rig_hva(&rig, 0, page), page + 1); }

static bool sees_writes(void)
{
	return os_features_get()->uffd_features & OS_UFFD_WP_ASYNC && os_features_get()->pagemap_scan;
}

/* Counts twice, and only where it is known: of what was never there at a look nothing is. */
static void test_written(void **state)
{
	const uint64_t read = 32, written = 64, late_read = 96, late_written = 128, never = MASKED_PAGE + 64;

	(void)state;
	begin();
	assert_int_equal(report().writes_seen, sees_writes() ? PAGES + 8 - OVERLAY_PAGES : 0);
	touch(read, 1);
	write_again(written);
	finish_pass();
	assert_int_equal(state_at(read), ACTIVITY_WARM);
	assert_int_equal(state_at(written), sees_writes() ? ACTIVITY_WARMER : ACTIVITY_WARM);
	assert_int_equal(report().written, sees_writes() ? 1 : 0);
	for (unsigned i = 0; i < 3; i++)
		finish_pass();
	assert_true(class_at(late_read) >= CLASS_COLD);
	touch(late_read, 1);
	write_again(late_written);
	touch(never, 1);
	finish_pass();
	assert_int_equal(state_at(late_read), ACTIVITY_WARM);
	assert_int_equal(state_at(late_written), sees_writes() ? ACTIVITY_WARMER : ACTIVITY_WARM);
	assert_int_equal(state_at(never), ACTIVITY_WARM);
	for (unsigned i = 0; i < 3; i++) { /* read before it is written, and by the kernel */
		touch(late_read, 1);
		assert_int_equal(pread(rig.files[0].fd, rig_hva(&rig, 0, late_read), 8, 0), 8);
		touch(read, 1);
		finish_pass();
	}
	assert_int_equal(class_at(late_read), CLASS_HOT);
	assert_int_equal(report().written, sees_writes() ? 3 : 0); /* once it is hot it is looked at seldom */
	write_again(late_read);
	check_contents();
}

/* ---- what a save asks -------------------------------------------------------------------------------- */

/* Pages in use are in the table from the beginning, hottest first; what is seen takes the place of that. */
static void test_seen_by_state(void **state)
{
	static const enum activity states[] = { ACTIVITY_HOT, ACTIVITY_WARMER, ACTIVITY_WARM, ACTIVITY_SLACK };
	enum { STATES = sizeof states / sizeof states[0], APART = 64, TOUCHED = 400 }; /* the kernel maps neighbours */
	const uint16_t *table;
	struct seen *seen;

	(void)state;
	for (uint64_t i = 0; i < STATES; i++)
		set_activity(i * APART, states[i]);
	set_activity(STATES * APART, ACTIVITY_COLD);
	set_activity(TOUCHED, ACTIVITY_SLACK);
	assert_int_equal(seen_create(rig.ram, &seen), 0);
	table = os_view_file(seen_fd(seen), (PAGES + 8) * sizeof *table, false);
	assert_non_null(table);
	seen_add_states(seen);
	for (uint64_t i = 0; i < STATES; i++)
		assert_int_equal(table[i * APART], SEEN_BY_STATE + i);
	assert_int_equal(table[STATES * APART], 0);
	assert_int_equal(table[TOUCHED], SEEN_BY_STATE + STATES - 1);
	seen_begin(seen);
	touch(TOUCHED, 1);
	touch(TOUCHED + 100, 1);
	rest(SEEN_SLICE_US);
	(void)seen_look(seen);
	assert_int_equal(table[TOUCHED], 1);
	assert_int_equal(table[TOUCHED + 100], 1);
	assert_int_equal(table[0], SEEN_BY_STATE);
	ram_lock(rig.ram);
	assert_int_equal(ram_update_private(rig.ram, rig.blocks[0].ram, 0, PAGES), 0);
	seen_restart(seen);
	ram_unlock(rig.ram);
	seen_begin(seen);
	touch(0, 1);
	rest(SEEN_SLICE_US);
	(void)seen_look(seen);
	assert_int_equal(table[0], 1);
	assert_int_equal(table[TOUCHED], SEEN_EARLIER | 1);
	assert_int_equal(table[APART], SEEN_BY_STATE + 1); /* behind what was seen earlier */
	os_unview_file((void *)(uintptr_t)table, (PAGES + 8) * sizeof *table);
	seen_destroy(seen);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_base, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_hot_cools, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_hot_is_sampled_seldom, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_overlay, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_copies, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_copies_that_fail, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_no_freezing, NULL, tear_down),
		cmocka_unit_test_setup_teardown(test_held, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_yield, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_beside, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_off_while_it_yields, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_pace_of_a_migration, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_masked, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_off_and_on, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_report, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_written, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_seen_by_state, set_up, tear_down),
	};

	alarm(120);
	return cmocka_run_group_tests_name("scan", tests, NULL, NULL) ? 1 : 0;
}
