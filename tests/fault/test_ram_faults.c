/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * core/ram under failing mapping calls: a fixed scenario, again and again, with the first, second,
 * third … call of each fault point failing; with failures that leave holes, as on kernels before
 * 6.12; with two failures in one transition; and with failures of the kernel's own: no mappings left,
 * a file whose mmap fails late, guest memory that can be neither mapped nor written any more.
 * After every operation guest RAM must be whole: see tests/unit/ram_model.h.
 */
#include "../unit/ram_model.h"
#include "os/probe.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <cmocka.h>

#define FILE_PAGES 128
#define NO_BUDGET (UINT64_C(1) << 40)

static const uint64_t block_pages[RIG_BLOCKS] = { 48, 24 };

/* ---- the scenario --------------------------------------------------------------------------- */

enum what { WRITE, OVERLAY, RETURN, DISCARD, PRIVATIZE, SETTLE, DETACH, RECONCILE, ADVISE };

static const struct step {
	enum what what;
	uint64_t page, pages;
	unsigned file;
	uint64_t file_page;
	unsigned block;
} scenario[] = {
	{ .what = ADVISE, .page = MADV_DONTFORK },
	{ .what = WRITE, .page = 0, .pages = 48 },
	{ .what = OVERLAY, .page = 4, .pages = 12, .file = 0, .file_page = 0 },
	{ .what = OVERLAY, .page = 16, .pages = 4, .file = 0, .file_page = 12 }, /* merges */
	{ .what = OVERLAY, .page = 8, .pages = 4, .file = 1, .file_page = 70 },  /* in the middle */
	{ .what = WRITE, .page = 6, .pages = 4 },
	{ .what = RECONCILE },
	{ .what = OVERLAY, .page = 6, .pages = 3, .file = 0, .file_page = 50 }, /* over both, and copies */
	{ .what = OVERLAY, .page = 2, .pages = 20, .file = 1, .file_page = 2, .block = 1 },
	{ .what = WRITE, .page = 5, .pages = 3, .block = 1 },
	{ .what = RETURN, .page = 0, .pages = 7 },
	{ .what = WRITE, .page = 3, .pages = 2 },
	{ .what = DISCARD, .page = 10, .pages = 8 },
	{ .what = DISCARD, .page = 8, .pages = 4, .block = 1 },
	{ .what = OVERLAY, .page = 10, .pages = 30, .file = 0, .file_page = 80 },
	{ .what = SETTLE, .page = 14, .pages = 5 },
	{ .what = WRITE, .page = 12, .pages = 5 },
	{ .what = PRIVATIZE, .file = 1 },
	{ .what = WRITE, .page = 20, .pages = 1, .block = 1 },
	{ .what = DETACH, .file = 1 },
	{ .what = OVERLAY, .page = 0, .pages = 48, .file = 1, .file_page = 0 }, /* the whole block */
	{ .what = WRITE, .page = 47, .pages = 1 },
	{ .what = DISCARD, .page = 20, .pages = 20 },
	{ .what = SETTLE, .page = 0, .pages = 10 },
	{ .what = RECONCILE },
	{ .what = RETURN, .page = 0, .pages = 24, .block = 1 },
	{ .what = DETACH, .file = 0 },
	{ .what = PRIVATIZE, .file = 1 },
	{ .what = DETACH, .file = 1 },
	{ .what = RECONCILE },
	{ .what = WRITE, .page = 0, .pages = 48 },
};
#define STEPS (sizeof scenario / sizeof scenario[0])

static const char *do_step(struct model *m, const struct step *s)
{
	switch (s->what) {
	case WRITE:
		return model_guest_writes(m, s->block, s->page, s->pages);
	case OVERLAY:
		return model_map_overlay(m, s->block, s->page, s->pages, s->file, s->file_page);
	case RETURN:
		return model_return_base(m, s->block, s->page, s->pages);
	case DISCARD:
		return model_discard(m, s->block, s->page, s->pages);
	case PRIVATIZE:
		return model_privatize(m, s->file);
	case SETTLE:
		return model_settle(m, s->block, s->page, s->pages);
	case DETACH:
		return model_detach(m, s->file);
	case RECONCILE:
		return model_reconcile(m);
	case ADVISE:
		return model_advise(m, s->block, (int)s->page);
	}
	return "no such step";
}

static void run_scenario(struct model *m, const char *about)
{
	for (size_t i = 0; i < STEPS; i++) {
		const char *why = do_step(m, &scenario[i]);

		if (why)
			fail_msg("%s: step %zu: %s", about, i, why);
	}
}

static void open_model(struct model *m) { model_open(m, block_pages, FILE_PAGES, NO_BUDGET); }

/* ---- faults by count ------------------------------------------------------------------------ */

/* Runs the scenario with the faults that `arm` sets for n = 1, 2, … until none of them is hit. */
static unsigned run_until_unhit(const char *about, void (*arm)(struct model *m, uint32_t nth))
{
	static struct model m;
	char name[64];
	uint32_t nth = 0;
	uint64_t hit;

	do {
		open_model(&m);
		snprintf(name, sizeof name, "%s, call %u", about, ++nth);
		arm(&m, nth);
		run_scenario(&m, name);
		hit = m.failures_seen;
		model_close(&m);
	} while (hit);
	return nth - 1;
}

static enum os_fault_point armed_point;
static int armed_error;

static void arm_one(struct model *m, uint32_t nth) { model_arm(m, armed_point, nth, armed_error); }

static void arm_hole(struct model *m, uint32_t nth)
{
	(void)m;
	model_arm_hole(nth);
}

static void test_each_point(void **state)
{
	static const char *const names[] = { "map_file", "map_base", "mark", "punch", "populate", "settle_write" };
	static const int errors[] = { ENOMEM, EAGAIN };

	(void)state;
	for (armed_point = OS_FAULT_MAP_FILE; armed_point <= OS_FAULT_SETTLE_WRITE; armed_point++)
		for (size_t e = 0; e < sizeof errors / sizeof errors[0]; e++) {
			unsigned hits;

			armed_error = errors[e];
			hits = run_until_unhit(names[armed_point], arm_one);
			print_message("%s %s: %u calls failed, one at a time\n", names[armed_point],
				      armed_error == ENOMEM ? "ENOMEM" : "EAGAIN", hits);
			assert_true(hits > 0);
		}
}

static void test_each_hole(void **state)
{
	unsigned hits;

	(void)state;
	hits = run_until_unhit("hole", arm_hole);
	print_message("%u mapping calls failed and left a hole, one at a time\n", hits);
	assert_true(hits > 10);
}

/* ---- two faults ----------------------------------------------------------------------------- */

static unsigned count_calls(enum os_fault_point point)
{
	static struct model m;
	unsigned calls;

	open_model(&m);
	os_fault_arm(point, UINT32_MAX, ENOMEM);
	run_scenario(&m, "count");
	calls = os_fault_calls(point);
	model_close(&m);
	return calls;
}

/* `hole` 0: none. */
static void run_with_two(const char *about, uint32_t hole, enum os_fault_point one, uint32_t one_nth,
			 enum os_fault_point other, uint32_t other_nth)
{
	static struct model m;
	char name[96];

	open_model(&m);
	snprintf(name, sizeof name, "%s, calls %u and %u", about, hole ? hole : one_nth, other_nth);
	if (hole)
		model_arm_hole(hole);
	else
		model_arm(&m, one, one_nth, ENOMEM);
	model_arm(&m, other, other_nth, ENOMEM);
	run_scenario(&m, name);
	model_close(&m);
}

static void run_grid(const char *about, enum os_fault_point one, enum os_fault_point other)
{
	unsigned ones = count_calls(one), others = count_calls(other) + 2; /* undoing makes more calls */

	for (uint32_t i = 1; i <= ones; i++)
		for (uint32_t n = 1; n <= others; n++)
			run_with_two(about, 0, one, i, other, n);
	print_message("%s: %u x %u pairs\n", about, ones, others);
}

/* The undoing of a failed settle fails too; a discard that can neither punch nor map. */
static void test_pairs(void **state)
{
	(void)state;
	run_grid("map_base and punch", OS_FAULT_MAP_BASE, OS_FAULT_PUNCH);
	run_grid("settle_write and punch", OS_FAULT_SETTLE_WRITE, OS_FAULT_PUNCH);
}

/* A hole, and an attempt to fill it fails as well. */
static void test_holes_that_resist(void **state)
{
	unsigned holes = count_calls(OS_FAULT_MAP_BASE) + count_calls(OS_FAULT_MAP_FILE);
	unsigned bases = count_calls(OS_FAULT_MAP_BASE) + 1;

	(void)state;
	for (uint32_t hole = 1; hole <= holes; hole++)
		for (uint32_t n = 1; n <= bases; n++)
			run_with_two("hole and map_base", hole, OS_FAULT_MAP_BASE, 0, OS_FAULT_MAP_BASE, n);
	print_message("hole and map_base: %u x %u pairs\n", holes, bases);
}

/* ---- failures of the kernel's own ----------------------------------------------------------- */

/* A file whose own mmap fails: the kernel has torn down the old mapping by then. */
static void test_file_that_cannot_be_mapped(void **state)
{
	static struct model m;
	int fd = socket(AF_UNIX, SOCK_STREAM, 0), file;
	struct ram_counts c;

	(void)state;
	open_model(&m);
	assert_null(model_map_overlay(&m, 0, 8, 8, 0, 0));
	assert_null(model_guest_writes(&m, 0, 9, 1));
	assert_null(model_guest_writes(&m, 0, 20, 1));
	ram_lock(m.rig.ram);
	file = ram_add_file(m.rig.ram, fd, 64, NULL);
	assert_true(file >= 0);
	model_keep_all(&m);
	for (uint64_t i = 4; i < 24; i++) /* contents are free, so base is as good as the old mapping */
		model_goal(&m, 0, i, UINT64_MAX);
	assert_int_equal(ram_map_overlay(m.rig.ram, m.rig.blocks[0].ram, 4, 20, (unsigned)file, 0), -ENODEV);
	ram_drop_file(m.rig.ram, (unsigned)file);
	ram_unlock(m.rig.ram);
	hole_done = true; /* not simulated this time */
	assert_null(model_compare(&m, false));
	ram_get_counts(m.rig.ram, &c);
	assert_int_equal(c.failures, 1);
	print_message("after a late failure: %s\n", c.overlay_pages ? "the old mapping" : "a hole, filled with base");
	model_close(&m);
	close(fd);
}

/* Block 0's memory may be neither mapped, written nor punched any more: all of it fails, for good. */
static void test_memfd_sealed_under_us(void **state)
{
	const struct os_features *kernel = os_features_get();
	static struct model m;

	(void)state;
	/* Before 6.12 the refusal comes after the old mapping is gone, and base, being sealed, cannot come
	 * back: nothing could mend that, and nobody but this test seals guest RAM. */
	if (kernel->kernel_major < 6 || (kernel->kernel_major == 6 && kernel->kernel_minor < 12)) {
		print_message("SKIP: needs Linux 6.12\n");
		skip();
	}
	open_model(&m);
	m.real_failures = m.punch_fails = true;
	for (size_t i = 0; i < STEPS; i++) {
		const char *why = do_step(&m, &scenario[i]);

		if (why)
			fail_msg("step %zu: %s", i, why);
		if (i == 6)
			assert_int_equal(fcntl(m.rig.blocks[0].memfd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
	}
	model_close(&m);
}

/* Settling writes to the memfd, which the limit of file sizes forbids: half of a range is written. */
static void test_short_writes(void **state)
{
	static struct model m;
	struct rlimit old, low;

	(void)state;
	signal(SIGXFSZ, SIG_IGN);
	open_model(&m);
	m.real_failures = true;
	assert_null(model_map_overlay(&m, 0, 0, 40, 0, 0));
	for (uint64_t i = 0; i < 40; i += 3)
		assert_null(model_guest_writes(&m, 0, i, 1));
	getrlimit(RLIMIT_FSIZE, &old);
	low = old;
	low.rlim_cur = os_bytes(20) + 100;
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
	assert_null(model_settle(&m, 0, 0, 40));
	assert_int_equal(entry_source(m.pages[0][0].entry), ENTRY_OVERLAY);
	assert_null(model_detach(&m, 0));
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
	m.real_failures = false;
	assert_null(model_settle(&m, 0, 0, 40));
	model_close(&m);
	signal(SIGXFSZ, SIG_DFL);
}

/* ---- overtaken ------------------------------------------------------------------------------ */

static struct model overtaken;

/* Privatizing holds no lock while it waits for storage: pages may be given back and mapped anew. */
static void overtake(void)
{
	struct ram *ram = overtaken.rig.ram;
	struct ram_block *b = overtaken.rig.blocks[0].ram;

	ram_lock(ram);
	assert_int_equal(ram_return_base(ram, b, 4, 2), 0);
	assert_int_equal(ram_discard(ram, b, 6, 2), 0);
	assert_int_equal(ram_settle(ram, b, 8, 2, NULL), 0);
	assert_int_equal(ram_map_overlay(ram, b, 10, 4, overtaken.rig.files[1].index, 10), 0);
	ram_unlock(ram);
	rig_write(rig_hva(&overtaken.rig, 0, 15), 1);
	assert_int_equal(ram_reconcile(ram), 0);
}

static void test_privatize_is_overtaken(void **state)
{
	struct rig *rig = &overtaken.rig;

	(void)state;
	open_model(&overtaken);
	assert_null(model_map_overlay(&overtaken, 0, 0, 20, 0, 0));
	before_populate = overtake;
	assert_int_equal(ram_privatize(rig->ram, rig->files[0].index), 0);
	assert_null(before_populate);
	/* What is not of the file any more is not called private; all that still is, is private. */
	if (rig_check(rig, false, NULL))
		fail_msg("%s", rig->why);
	for (uint64_t i = 0; i < 20; i++) {
		assert_int_equal(entry_is_private(rig_entry(rig, 0, i)), i < 4 || i >= 14);
		assert_true(rig_holds(rig_hva(rig, 0, i), i == 15		    ? 1
							  : i >= 4 && i < 8   ? 0
							  : i >= 10 && i < 14 ? rig_file_tag(1, 0, i)
									      : rig_file_tag(0, 0, i)));
	}
	assert_int_equal(rig->files[0].lost[RAM_LOST_PRIVATIZED], 9);
	/* Copies were made of the other file's pages too, as if the guest had written there. */
	assert_int_equal(ram_reconcile(rig->ram), 0);
	if (rig_check(rig, true, NULL))
		fail_msg("%s", rig->why);
	model_close(&overtaken);
}

/* ---- no mappings left ----------------------------------------------------------------------- */

struct hog {
	uint8_t *at;
	size_t pages;
	uint64_t mappings; /* that it was made to consist of */
};

/* Takes all mappings that the process may have: every other page gets another protection. */
static bool hog_take_all(struct hog *hog)
{
	hog->pages = os_max_maps() + 16;
	hog->at = mmap(NULL, os_bytes(hog->pages), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (hog->at == MAP_FAILED)
		return false;
	for (size_t i = 1; i < hog->pages; i += 2)
		if (mprotect(hog->at + os_bytes(i), OS_PAGE_BYTES, PROT_READ)) {
			hog->mappings = i;
			return errno == ENOMEM;
		}
	return false;
}

/* Gives pairs of mappings back. */
static void hog_give_back(struct hog *hog, unsigned pairs)
{
	for (; pairs && hog->mappings > 2; pairs--) {
		hog->mappings -= 2;
		mprotect(hog->at + os_bytes(hog->mappings), OS_PAGE_BYTES, PROT_NONE);
	}
}

/* The scenario, with all mappings but a few used up after its first steps. Returns how often the
 * kernel refused. */
static uint64_t run_at_the_limit(unsigned pairs)
{
	static struct model m;
	struct hog hog = { 0 };
	struct ram_counts c;

	open_model(&m);
	m.real_failures = true;
	for (size_t i = 0; i < STEPS; i++) {
		const char *why;

		if (i == 3) {
			assert_true(hog_take_all(&hog));
			hog_give_back(&hog, pairs);
		}
		why = do_step(&m, &scenario[i]);
		if (why) {
			munmap(hog.at, os_bytes(hog.pages));
			fail_msg("%u mappings free, step %zu: %s", 2 * pairs, i, why);
		}
	}
	ram_get_counts(m.rig.ram, &c);
	munmap(hog.at, os_bytes(hog.pages));
	m.real_failures = false;
	assert_null(model_detach(&m, 0)); /* with mappings to be had, all is well again */
	assert_null(model_detach(&m, 1));
	model_close(&m);
	return c.failures;
}

static void test_no_mappings_left(void **state)
{
	static const unsigned levels[] = { 0, 1, 2, 4, 7 };

	(void)state;
	if (os_max_maps() > 80000) { /* the rig's buffer for their names */
		print_message("SKIP: vm.max_map_count is too high to use all mappings up\n");
		skip();
	}
	for (size_t i = 0; i < sizeof levels / sizeof levels[0]; i++) {
		uint64_t failures = run_at_the_limit(levels[i]);

		print_message("%u mappings free: %" PRIu64 " mapping calls failed\n", 2 * levels[i], failures);
		if (!i)
			assert_true(failures > 0);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_each_point),
		cmocka_unit_test(test_each_hole),
		cmocka_unit_test(test_pairs),
		cmocka_unit_test(test_holes_that_resist),
		cmocka_unit_test(test_file_that_cannot_be_mapped),
		cmocka_unit_test(test_memfd_sealed_under_us),
		cmocka_unit_test(test_short_writes),
		cmocka_unit_test(test_privatize_is_overtaken),
		cmocka_unit_test(test_no_mappings_left),
	};

	alarm(300);
	return cmocka_run_group_tests_name("ram_faults", tests, NULL, NULL) ? 1 : 0;
}
