/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Guest threads at full speed while mappings change beneath them. Block 0 has four regions:
 *
 *   base      written and read; zapped all the time
 *   mixed     overlay of file 0, written and read; privatized, reconciled, settled, mapped anew
 *   clean     overlay of file 0, only read; privatized, settled, mapped anew: must never change
 *   churn     nobody's contents: overlays of both files, return, discard, without anyone stopping
 *
 * Each page of the first two has one writer, which knows every word of it. Readers know what a word of
 * a page may be. Only settling, and mapping anew over pages that have a writer, stop the writers (the
 * rules in core/ram.h); readers never stop. While a privatize runs, everything goes on but the mapping
 * of that file.
 *
 * A scan (activity/scan.h) goes on all the time, as fast as it can: it zaps base under the writers, and clean pages of
 * overlays with all threads stopped.
 */
#include "activity/scan.h"
#include "ram_rig.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/resource.h>
#include <time.h>

#include <cmocka.h>

#define RUN_S 3
#define RUN_MOST_S 60 /* on a busy machine, until the scan has done what is checked */
#define WRITERS 2
#define READERS 2
#define REGION_PAGES 64
#define BASE_PAGE 0
#define MIXED_PAGE REGION_PAGES
#define CLEAN_PAGE (2 * REGION_PAGES)
#define CHURN_PAGE (3 * REGION_PAGES)
#define PAGES (4 * REGION_PAGES)
#define GUEST UINT64_C(0x6e57)

static struct rig rig;

static struct {
	_Atomic bool stop, pause; /* pause: changed under gate */
	_Atomic bool scanned;     /* the scan has done what is checked in the end */
	_Atomic bool privatizing; /* set by who wants it, cleared by who has done it */
	unsigned privatized;
	unsigned paused;          /* under gate */
	pthread_mutex_t gate;
	pthread_mutex_t scan_gate; /* the scan, which settles copies, stands still while all is compared */
	pthread_cond_t gate_moved;
	_Atomic uint64_t touched_words, wrong_words, first_wrong, first_wrong_page;
	uint64_t expected[MIXED_PAGE + REGION_PAGES]; /* by the page's writer, or all while it is paused */
	bool written[MIXED_PAGE + REGION_PAGES];      /* since it was mapped */
} run = { .gate = PTHREAD_MUTEX_INITIALIZER, .scan_gate = PTHREAD_MUTEX_INITIALIZER,
	  .gate_moved = PTHREAD_COND_INITIALIZER };

static uint64_t guest_tag(uint64_t page, uint32_t generation) { return GUEST << 48 | page << 32 | generation; }

/* Page N of the block always maps page N of a file: so a word has few values that it may have. */
static uint64_t file_tag(unsigned file, uint64_t page) { return rig_file_tag(file, 0, page); }

static void note_wrong(uint64_t page, uint64_t word)
{
	if (!run.wrong_words++) {
		run.first_wrong = word;
		run.first_wrong_page = page;
	}
}

static uint64_t *words_of(uint64_t page) { return (uint64_t *)(void *)rig_hva(&rig, 0, page); }

/* ---- guest threads -------------------------------------------------------------------------- */

static void pause_here(void)
{
	if (!run.pause)
		return;
	pthread_mutex_lock(&run.gate);
	run.paused++;
	pthread_cond_broadcast(&run.gate_moved);
	while (run.pause)
		pthread_cond_wait(&run.gate_moved, &run.gate);
	run.paused--;
	pthread_cond_broadcast(&run.gate_moved);
	pthread_mutex_unlock(&run.gate);
}

/* Few CPUs: who changes mappings shall not wait for the time slices of those who only touch. */
static void be_nice(void) { (void)setpriority(PRIO_PROCESS, (id_t)gettid(), 10); }

static void check_and_write(uint64_t page, uint32_t generation)
{
	uint64_t *words = words_of(page), next = guest_tag(page, generation);

	for (size_t i = 0; i < RIG_PAGE_WORDS; i++) {
		uint64_t word = __atomic_load_n(&words[i], __ATOMIC_RELAXED);

		if (word != run.expected[page])
			note_wrong(page, word);
		__atomic_store_n(&words[i], next, __ATOMIC_RELAXED);
	}
	run.expected[page] = next;
	run.written[page] = true;
}

static void *write_pages(void *arg)
{
	unsigned me = (unsigned)(uintptr_t)arg;

	be_nice();
	for (uint32_t generation = 1; !run.stop; generation++)
		for (uint64_t page = me; page < CLEAN_PAGE; page += WRITERS) {
			pause_here();
			/* Half of the mixed region stays as it is for a round: clean pages between copies. */
			if (page >= MIXED_PAGE && (page / WRITERS + generation) % 2)
				continue;
			check_and_write(page, generation);
			run.touched_words += RIG_PAGE_WORDS;
		}
	return NULL;
}

static bool may_be(uint64_t page, uint64_t word)
{
	bool own = word >> 48 == GUEST && (word >> 32 & 0xffff) == page;

	if (page >= CHURN_PAGE)
		return word == 0 || word == file_tag(0, page) || word == file_tag(1, page);
	if (page >= CLEAN_PAGE)
		return word == file_tag(0, page);
	if (page >= MIXED_PAGE)
		return own || word == file_tag(0, page);
	return own || word == 0; /* base: not written yet */
}

static void *read_pages(void *arg)
{
	uint64_t page = (uint64_t)(uintptr_t)arg * 17;

	be_nice();
	while (!run.stop) {
		const uint64_t *words = words_of(page);

		for (size_t i = 0; i < RIG_PAGE_WORDS; i++) {
			uint64_t word = __atomic_load_n(&words[i], __ATOMIC_RELAXED);

			if (!may_be(page, word))
				note_wrong(page, word);
		}
		run.touched_words += RIG_PAGE_WORDS;
		page = (page + 1) % PAGES;
	}
	return NULL;
}

static void *reconcile_always(void *arg)
{
	struct timespec pause = { 0, 200000 };

	(void)arg;
	while (!run.stop) {
		pause_here();
		if (ram_reconcile(rig.ram))
			run.wrong_words++;
		nanosleep(&pause, NULL);
	}
	return NULL;
}

static int freeze(void *ctx)
{
	(void)ctx;
	return os_freeze(SIGRTMAX - 4, 1000);
}

static void thaw(void *ctx)
{
	(void)ctx;
	os_thaw();
}

/* Under the thread sanitizer a signal waits until its thread calls something: nobody can be stopped. */
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define NO_FREEZING
#endif
#endif
#ifdef NO_FREEZING
static const bool can_freeze = false;
#else
static const bool can_freeze = true;
#endif

#define SCAN_US 1000u /* a period; much less than any user's */

static bool scan_is_enough(const struct scan_report *r)
{
	return r->passes > 10 && r->refaults > 100 && (!can_freeze || (r->by_source[SCAN_CLEAN] && r->settled));
}

static void *scan_always(void *arg)
{
	struct scan_freezer freezer = { freeze, thaw, NULL };
	struct scan *scan;

	os_never_freeze(gettid());
	if (scan_create(rig.ram, can_freeze ? &freezer : NULL, &scan)) {
		run.wrong_words++;
		return NULL;
	}
	scan_set_period(scan, SCAN_US);
	while (!run.stop) {
		struct timespec pause = { 0, SCAN_US * 1000 };
		uint64_t us;

		pthread_mutex_lock(&run.scan_gate);
		us = scan_step(scan);
		pthread_mutex_unlock(&run.scan_gate);
		scan_get_report(scan, arg);
		run.scanned = run.scanned || scan_is_enough(arg);
		if (us < SCAN_US)
			pause.tv_nsec = (long)us * 1000;
		nanosleep(&pause, NULL);
	}
	scan_get_report(scan, arg);
	scan_destroy(scan);
	return NULL;
}

static void *privatize_when_wanted(void *arg)
{
	struct timespec pause = { 0, 100000 };

	(void)arg;
	while (!run.stop) {
		if (run.privatizing) {
			if (ram_privatize(rig.ram, rig.files[0].index))
				run.wrong_words++;
			run.privatized++;
			run.privatizing = false;
		}
		nanosleep(&pause, NULL);
	}
	return NULL;
}

/* ---- what changes beneath them --------------------------------------------------------------- */

#define PAUSABLE (WRITERS + 1)

static void stop_writers(void)
{
	pthread_mutex_lock(&run.gate);
	run.pause = true;
	while (run.paused < PAUSABLE)
		pthread_cond_wait(&run.gate_moved, &run.gate);
	pthread_mutex_unlock(&run.gate);
}

static void let_writers_go(void)
{
	pthread_mutex_lock(&run.gate);
	run.pause = false;
	pthread_cond_broadcast(&run.gate_moved);
	while (run.paused)
		pthread_cond_wait(&run.gate_moved, &run.gate);
	pthread_mutex_unlock(&run.gate);
}

static uint32_t random_below(uint32_t limit)
{
	static uint64_t state = 1;

	state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return (uint32_t)(state >> 33) % limit;
}

struct part {
	uint64_t page, pages;
};

static struct part part_of(uint64_t region)
{
	uint32_t first = random_below(REGION_PAGES);

	return (struct part){ region + first, 1 + random_below(REGION_PAGES - first) };
}

static void zap_base(void)
{
	struct part p = part_of(BASE_PAGE);

	assert_int_equal(madvise(rig_hva(&rig, 0, p.page), os_bytes(p.pages), MADV_DONTNEED), 0);
}

static void map(struct part p, unsigned file)
{
	ram_lock(rig.ram);
	assert_int_equal(ram_map_overlay(rig.ram, rig.blocks[0].ram, p.page, p.pages, rig.files[file].index, p.page), 0);
	ram_unlock(rig.ram);
}

static void settle(struct part p)
{
	ram_lock(rig.ram);
	assert_int_equal(ram_settle(rig.ram, rig.blocks[0].ram, p.page, p.pages, NULL), 0);
	ram_unlock(rig.ram);
}

static void churn(void)
{
	struct part p = part_of(CHURN_PAGE);
	int r = 0;

	if (random_below(2)) {
		map(p, run.privatizing || random_below(2));
		return;
	}
	ram_lock(rig.ram);
	if (random_below(2))
		r = ram_return_base(rig.ram, rig.blocks[0].ram, p.page, p.pages);
	else
		r = ram_discard(rig.ram, rig.blocks[0].ram, p.page, p.pages);
	ram_unlock(rig.ram);
	assert_int_equal(r, 0);
}

static void settle_or_map_mixed(void)
{
	struct part p = part_of(MIXED_PAGE);

	if (run.privatizing || random_below(2)) {
		settle(p);
		return;
	}
	map(p, 0);
	for (uint64_t i = p.page; i < p.page + p.pages; i++) {
		run.expected[i] = file_tag(0, i);
		run.written[i] = false;
	}
}

/* What the writers know they wrote, entries call private; and all else agrees too. */
static void check_all(void)
{
	const char *why;

	pthread_mutex_lock(&run.scan_gate);
	assert_int_equal(ram_reconcile(rig.ram), 0);
	why = rig_check(&rig, true, NULL);
	if (why)
		fail_msg("%s", why);
	pthread_mutex_unlock(&run.scan_gate);
	for (uint64_t i = MIXED_PAGE; i < MIXED_PAGE + REGION_PAGES; i++) {
		uint64_t entry = rig_entry(&rig, 0, i);

		if (run.written[i] && entry_source(entry) == ENTRY_OVERLAY && !entry_is_private(entry))
			fail_msg("page %" PRIu64 " was written and counts as clean", i);
		assert_true(rig_holds(rig_hva(&rig, 0, i), run.expected[i]));
	}
}

static void with_writers_stopped(unsigned round)
{
	stop_writers();
	settle_or_map_mixed();
	if (round % 64 == 0 && !run.privatizing)
		check_all();
	let_writers_go();
}

static void change_mappings(unsigned round)
{
	zap_base();
	churn();
	if (round % 4 == 0 && !run.privatizing)
		map(part_of(CLEAN_PAGE), 0); /* the same contents */
	if (round % 4 == 2)
		settle(part_of(CLEAN_PAGE));
	if (round % 8 == 1)
		run.privatizing = true;
	if (round % 2)
		with_writers_stopped(round / 2);
}

/* ---- the test ------------------------------------------------------------------------------- */

static double now_s(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void set_up_regions(void)
{
	static const uint64_t block_pages[RIG_BLOCKS] = { PAGES, 1 };

	rig_open(&rig, block_pages, PAGES, UINT64_C(1) << 40);
	map((struct part){ MIXED_PAGE, REGION_PAGES }, 0);
	map((struct part){ CLEAN_PAGE, REGION_PAGES }, 0);
	for (uint64_t i = MIXED_PAGE; i < MIXED_PAGE + REGION_PAGES; i++)
		run.expected[i] = file_tag(0, i);
}

static void test_guest_runs_while_mappings_change(void **state)
{
	pthread_t threads[WRITERS + READERS + 3];
	struct scan_report scanned = { 0 };
	unsigned n = 0, rounds = 0;
	double end = now_s() + RUN_S;

	(void)state;
	set_up_regions();
	for (uintptr_t i = 0; i < WRITERS; i++)
		assert_int_equal(pthread_create(&threads[n++], NULL, write_pages, (void *)i), 0);
	for (uintptr_t i = 0; i < READERS; i++)
		assert_int_equal(pthread_create(&threads[n++], NULL, read_pages, (void *)i), 0);
	assert_int_equal(pthread_create(&threads[n++], NULL, reconcile_always, NULL), 0);
	assert_int_equal(pthread_create(&threads[n++], NULL, privatize_when_wanted, NULL), 0);
	assert_int_equal(pthread_create(&threads[n++], NULL, scan_always, &scanned), 0);
	while (now_s() < end || (!run.scanned && now_s() < end + RUN_MOST_S))
		change_mappings(rounds++);
	run.stop = true;
	while (n)
		pthread_join(threads[--n], NULL);
	check_all();
	print_message("%u rounds of changes, %u times privatized, %.1f million words touched, %" PRIu64 " wrong\n",
		      rounds, run.privatized, (double)run.touched_words / 1e6, run.wrong_words);
	if (run.wrong_words)
		fail_msg("first: page %" PRIu64 " held %" PRIx64, run.first_wrong_page, run.first_wrong);
	assert_true(rounds > 10);
	print_message("%" PRIu64 " passes of the scan, %" PRIu64 " pages zapped, %" PRIu64 " came back\n", scanned.passes,
		      scanned.sampled, scanned.refaults);
	assert_true(run.scanned);
	rig_close(&rig);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_guest_runs_while_mappings_change) };

	alarm(120);
	return cmocka_run_group_tests_name("race", tests, NULL, NULL) ? 1 : 0;
}
