/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "activity/scan.h"

#include "os/os.h"
#include "os/probe.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define UNIT_PAGES SAMPLE_GROUP_PAGES
#define SLICES 32u        /* a pass has about so many, more if they would take long */
#define SLICE_US 200u     /* no unit is begun after that, */
#define FEW_RUNS 32u      /* or if there are so many runs to be done with everybody stopped, */
#define SETTLE_PAGES 64u  /* or so many copies to settle; no more are settled at once */
#define FROZEN_RUNS (FEW_RUNS + UNIT_PAGES)
#define SPARED_SLICES 8u  /* that try to stop nobody, after that has failed */
#define REST_US 200u      /* between two slices at least: others want the lock */
#define REST_FACTOR 4u    /* and so many times as long as everybody was stopped: the guest goes on meanwhile */
#define HELD_POLL_US 100000u
#define COUNTING_PASS 1u /* the first: makes all new, and finds out how much there is to sample */
#define WP_FEATURES (OS_UFFD_PAGEFAULT_FLAG_WP | OS_UFFD_WP_HUGETLBFS_SHMEM)

const char *const scan_source_names[SCAN_SOURCES] = { "zap", "zap-frozen", "none" };
static const uint64_t windows_us[SCAN_WINDOWS] = { 10000000, 60000000, 600000000 };

/* What one pass counts. */
struct tally {
	uint64_t pages[ACTIVITIES][LONG_STATES];
	uint64_t present[ACTIVITIES]; /* that can be sampled */
	uint64_t by_source[SCAN_SOURCES];
	uint64_t writes_seen, written;
	uint64_t looked, changed, sampled, refaults, cpu_ns, holds, long_holds, hold_max_us;
	uint64_t hold_max_cpu_us, long_cpu_holds, settled, frozen_us;
	bool around; /* neighbours could not be kept away somewhere */
};

/* What is remembered of a unit: the pass in which it was sampled, and a bit for each page that was write-protected then. */
struct unit_sample {
	uint64_t pass;
	uint64_t protected[UNIT_PAGES / 64];
};

struct scan_block {
	const struct ram_block *block;
	uint64_t pages;
	struct unit_sample *samples;
};

struct unit_page {
	enum scan_source source;
	bool present, copy, due; /* copy: a private one, in memory; due: it is to be sampled */
	bool sees_writes, protected;
};

/* What is to be done with everybody stopped: a zap, or copies to be settled. */
struct frozen_run {
	unsigned slot; /* of the block */
	struct ram_block *block;
	uint64_t page, pages;
	bool settle;
};

struct scan {
	struct ram *ram;
	struct scan_freezer freezer;
	struct os_pagemap *pagemap;
	int uffd;             /* that asks for single pages; -1 */
	bool async;           /* and tells what was written */
	pthread_mutex_t lock; /* protects the next three */
	struct scan_report report;
	uint64_t shortest_us, migration_pass_us;
	enum scan_other other; /* under the range lock, */
	bool anew;             /* as this: `other` has changed */

	/* Of the thread that steps. */
	uint64_t pass;                                   /* its number, from 1 */
	bool runs;                                       /* it is under way */
	uint64_t asked_us, period_us, begun_us, next_us; /* next: when there is more to do */
	uint64_t paced_us;                               /* the migration's pass that the period was made for */
	uint64_t present[ACTIVITIES];                    /* as the last pass has counted them */
	uint64_t units, units_done;
	unsigned slot;              /* of the next unit's block, */
	uint64_t page;              /* and its first page */
	unsigned thin, thin_before; /* before: of the pass before */
	unsigned minutes;           /* that have begun since the pass before, */
	uint64_t minute_us;         /* and when the last one did */
	uint64_t since_us;          /* the first samples */
	struct tally tally;
	struct scan_block blocks[RAM_BLOCKS];
	uint8_t flags[UNIT_PAGES];
	struct unit_page unit[UNIT_PAGES];
	struct frozen_run frozen[FROZEN_RUNS]; /* of the slice */
	size_t frozen_count;
	uint64_t settle_pages, stopped_us; /* of the slice */
	unsigned spared_slices;
	bool due[ACTIVITIES], was_due[ACTIVITIES]; /* of the unit: in this pass, and in the one before */
};

static uint64_t cpu_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* ---- single pages ------------------------------------------------------------------------------- */

static void begin_single(struct scan *s)
{
	bool async = os_features_get()->uffd_features & OS_UFFD_WP_ASYNC;

	s->async = async && os_features_get()->pagemap_scan;
	s->uffd = os_uffd_open_unserved(WP_FEATURES | (async ? OS_UFFD_WP_ASYNC : 0));
	ram_lock(s->ram);
	ram_single_by(s->ram, s->uffd < 0 ? -1 : s->uffd, async);
	ram_unlock(s->ram);
}

/* Only as long as this is so: older kernels let one userfaultfd end the registrations of another. */
static void release_block(struct scan *s, unsigned slot, enum scan_other other)
{
	uint64_t pages = 1;

	for (uint64_t page = 0; pages; page += pages) {
		const struct ram_block *b;

		ram_lock(s->ram);
		b = s->other == other ? ram_block_at(s->ram, slot) : NULL;
		pages = b && page < b->pages ? b->pages - page : 0;
		pages = pages < UNIT_PAGES ? pages : UNIT_PAGES;
		ram_not_single(s->ram, ram_block_at(s->ram, slot), page, pages);
		ram_unlock(s->ram);
	}
}

static void release(struct scan *s, enum scan_other other)
{
	for (unsigned slot = 0; slot < RAM_BLOCKS; slot++)
		release_block(s, slot, other);
}

static void end_single(struct scan *s)
{
	release(s, SCAN_ALONE);
	ram_lock(s->ram);
	ram_single_by(s->ram, -1, false);
	ram_unlock(s->ram);
	if (s->uffd >= 0)
		close(s->uffd);
	s->uffd = -1;
}

void scan_yield(struct scan *s, enum scan_other other)
{
	enum scan_other was;

	ram_lock(s->ram);
	was = s->other;
	s->anew = s->anew || was != other;
	s->other = other;
	ram_unlock(s->ram);
	if (was == SCAN_ALONE)
		release(s, other);
}

/* ---- life --------------------------------------------------------------------------------------- */

int scan_create(struct ram *ram, const struct scan_freezer *freezer, struct scan **ret_scan)
{
	struct scan *s = calloc(1, sizeof *s);
	int r;

	if (!s)
		return -ENOMEM;
	s->ram = ram;
	s->uffd = -1;
	if (freezer)
		s->freezer = *freezer;
	pthread_mutex_init(&s->lock, NULL);
	r = os_pagemap_open(&s->pagemap);
	if (r)
		scan_destroy(s);
	else
		*ret_scan = s;
	return r;
}

void scan_destroy(struct scan *s)
{
	if (!s)
		return;
	if (s->asked_us)
		end_single(s);
	os_pagemap_close(s->pagemap);
	for (size_t i = 0; i < RAM_BLOCKS; i++)
		free(s->blocks[i].samples);
	pthread_mutex_destroy(&s->lock);
	free(s);
}

/* ---- what users set ----------------------------------------------------------------------------- */

void scan_set_period(struct scan *s, uint64_t period_us)
{
	pthread_mutex_lock(&s->lock);
	s->shortest_us = s->report.shortest_us = s->report.period_us = period_us;
	pthread_mutex_unlock(&s->lock);
}

void scan_set_migration_pass(struct scan *s, uint64_t pass_us)
{
	pthread_mutex_lock(&s->lock);
	s->migration_pass_us = pass_us;
	pthread_mutex_unlock(&s->lock);
}

void scan_get_report(struct scan *s, struct scan_report *ret_report)
{
	pthread_mutex_lock(&s->lock);
	*ret_report = s->report;
	pthread_mutex_unlock(&s->lock);
}

/* ---- one unit, under the range lock -------------------------------------------------------------- */

static bool is_copy(const struct ram_range *range, uint8_t flags)
{
	return range->source == ENTRY_OVERLAY && !(flags & OS_PAGE_FILE) &&
	       flags & (OS_PAGE_PRESENT | OS_PAGE_SWAPPED);
}

static enum scan_source source_of(const struct scan *s, const struct ram_range *range, bool copy)
{
	if (range->source != ENTRY_OVERLAY)
		return SCAN_BASE;
	return copy || !s->freezer.freeze ? SCAN_NOTHING : SCAN_CLEAN;
}

static bool is_looked_at(const struct scan *s, enum scan_source source)
{
	return source == SCAN_BASE || (source == SCAN_CLEAN && s->other == SCAN_ALONE);
}

/* `sample`: of the unit, in the pass before; NULL: there was none. `i`: the page's place in the unit. */
static enum seen_use see(const struct scan *s, enum activity now, unsigned i,
			 const struct unit_sample *sample)
{
	const struct unit_page *u = &s->unit[i];

	if (!sample || !is_looked_at(s, u->source))
		return SEEN_NOTHING;
	if (!u->present)
		return SEEN_UNUSED;
	if (!s->was_due[now] && !activity_states[now].unused_looks)
		return SEEN_NOTHING;
	/* It was taken away at the last look, or was not there then. */
	return sample->protected[i / 64] >> i % 64 & 1 && !u->protected ? SEEN_WRITTEN : SEEN_USED;
}

/* A page of which nothing can be found out any more is new again, for what was known of it is old. */
static uint64_t look_at_page(struct scan *s, unsigned i, uint64_t before,
			     const struct unit_sample *sample)
{
	enum scan_source source = s->unit[i].source;
	enum seen_use seen = see(s, activity_of(before), i, sample);
	bool anew = source == SCAN_NOTHING || s->pass == COUNTING_PASS;
	uint64_t after = anew ? 0 : activity_next(before, seen, s->minutes);

	s->tally.changed += activity_class_of(after) != activity_class_of(before);
	s->tally.pages[activity_of(after)][entry_long(after)]++;
	s->tally.by_source[source]++;
	if (source != SCAN_NOTHING) {
		s->tally.refaults += seen == SEEN_USED || seen == SEEN_WRITTEN;
		s->tally.written += seen == SEEN_WRITTEN;
		s->tally.writes_seen += s->unit[i].sees_writes;
		s->tally.present[activity_of(after)] += s->unit[i].present;
	}
	return after;
}

/* Writes the entries, and notes for the samples what can be sampled. */
static void look_at_range(struct scan *s, struct ram_block *b, uint64_t first,
			  const struct ram_range *range, const struct unit_sample *sample)
{
	for (uint64_t page = range->page; page < range->page + range->pages; page++) {
		struct unit_page *u = &s->unit[page - first];
		uint64_t before = ram_activity(b, page), after;
		uint8_t flags = s->flags[page - first];

		u->present = flags & OS_PAGE_PRESENT;
		u->copy = u->present && is_copy(range, flags);
		u->source = source_of(s, range, is_copy(range, flags));
		u->sees_writes = s->async && range->source == ENTRY_BASE && s->other == SCAN_ALONE;
		u->protected = u->sees_writes && flags & OS_PAGE_PROTECTED;
		after = look_at_page(s, (unsigned)(page - first), before, sample);
		u->due = is_looked_at(s, u->source) && u->present && s->due[activity_of(after)];
		if (after != before)
			ram_set_activity(s->ram, b, page, after);
	}
	s->tally.looked += range->pages;
}

/* The next run of pages of this source that are due, from `*at` on; pages between them that are not
 * there anyway are no bounds. False: there is none. */
static bool next_due(const struct scan *s, uint64_t pages, enum scan_source source, uint64_t *at,
		     uint64_t *ret_pages)
{
	uint64_t first = *at, last, end;

	while (first < pages && (!s->unit[first].due || s->unit[first].source != source))
		first++;
	if (first == pages)
		return false;
	last = end = first;
	for (;
	     end < pages && s->unit[end].source == source && (s->unit[end].due || !s->unit[end].present);
	     end++)
		if (s->unit[end].due)
			last = end;
	*at = first;
	*ret_pages = last + 1 - first;
	return true;
}

/* The next run of copies from `*at` on that is long enough to be settled; false: there is none. */
static bool next_copies(const struct scan *s, uint64_t pages, uint64_t *at, uint64_t *ret_pages)
{
	uint64_t run = 0, i = *at;

	for (; i < pages && (s->unit[i].copy || run < SCAN_SETTLE_PAGES); i++)
		run = s->unit[i].copy ? run + 1 : 0;
	*at = i - run;
	*ret_pages = run;
	return run >= SCAN_SETTLE_PAGES;
}

/* To be done at the end of the slice, when nobody writes. There is room for all runs of one more unit. */
static void add_frozen(struct scan *s, struct ram_block *b, uint64_t page, uint64_t pages, bool settle)
{
	assert(s->frozen_count < FROZEN_RUNS);
	s->settle_pages += settle ? pages : 0;
	s->frozen[s->frozen_count++] = (struct frozen_run){ s->slot, b, page, pages, settle };
}

/* So that the next look tells of what is sampled in the run whether it was written. Pages that are protected and
 * not due stay so. */
static void protect_run(struct scan *s, struct ram_block *b, uint64_t first, uint64_t at, uint64_t end)
{
	for (uint64_t run = at; at < end; at = run) {
		while (run < end && s->unit[run].sees_writes == s->unit[at].sees_writes)
			run++;
		if (!s->unit[at].sees_writes ||
		    os_pagemap_protect(s->pagemap, b->hva + os_bytes(first + at), run - at))
			continue;
		for (uint64_t i = at; i < run; i++)
			s->unit[i].protected = true;
	}
}

/* Takes what is due out of the page table, or notes it, so that the next look tells. */
static int sample(struct scan *s, struct ram_block *b, uint64_t first, uint64_t pages)
{
	bool alone = s->other == SCAN_ALONE;
	int single = alone ? ram_single(s->ram, b, first, pages) : 0, r = 0;
	uint64_t at, run;

	if (single && single != -EOPNOTSUPP)
		s->tally.around = true;
	for (at = 0; !r && next_due(s, pages, SCAN_BASE, &at, &run); at += run) {
		protect_run(s, b, first, at, at + run);
		r = ram_zap_base(s->ram, b, first + at, run);
		s->tally.sampled += run;
	}
	for (at = 0; next_due(s, pages, SCAN_CLEAN, &at, &run); at += run)
		add_frozen(s, b, first + at, run, false);
	for (at = 0; alone && s->freezer.freeze && next_copies(s, pages, &at, &run); at += run)
		add_frozen(s, b, first + at, run, true);
	return r;
}

/* Some of the copies; a failure leaves them where they are. True: there are more. */
static bool settle_some(struct scan *s, struct frozen_run *run, uint64_t *budget_pages)
{
	uint64_t pages = run->pages < *budget_pages ? run->pages : *budget_pages;

	(void)ram_settle_copies(s->ram, run->block, run->page, pages, &s->tally.settled);
	run->page += pages;
	run->pages -= pages;
	*budget_pages -= pages;
	return run->pages;
}

/* The next look at the unit tells nothing. */
static void forget_sample(struct scan *s, const struct frozen_run *run)
{
	s->blocks[run->slot].samples[run->page / UNIT_PAGES].pass = 0;
}

/* What is private in the run's unit; `known`: a run for whose unit it is known since everybody stands, if any. */
static int update_private(struct scan *s, const struct frozen_run *run, struct frozen_run *known)
{
	uint64_t unit = run->page / UNIT_PAGES, left = run->block->pages - unit * UNIT_PAGES;
	int r;

	if (known->block == run->block && known->page / UNIT_PAGES == unit)
		return 0;
	r = ram_update_private(s->ram, run->block, unit * UNIT_PAGES, left < UNIT_PAGES ? left : UNIT_PAGES);
	if (!r)
		*known = *run;
	return r;
}

static void zap_frozen(struct scan *s, const struct frozen_run *run, struct frozen_run *known)
{
	int r = update_private(s, run, known);

	if (!r)
		r = ram_zap_clean(s->ram, run->block, run->page, run->pages);
	if (r)
		forget_sample(s, run);
	s->tally.sampled += run->pages;
}

/* The block may have gone since an earlier slice, and another one come. */
static bool is_there(const struct scan *s, const struct frozen_run *run)
{
	const struct ram_block *b = ram_block_at(s->ram, run->slot);
	const struct scan_block *known = &s->blocks[run->slot];

	return b && b == run->block && b == known->block && b->pages == known->pages &&
	       run->page + run->pages <= b->pages;
}

/* What is left has copies to settle, in the next slice. */
static void do_frozen_runs(struct scan *s)
{
	struct frozen_run known = { .block = NULL };
	uint64_t budget_pages = SETTLE_PAGES;
	size_t left = 0;

	for (size_t i = 0; i < s->frozen_count; i++) {
		struct frozen_run *run = &s->frozen[i];

		if (!is_there(s, run))
			continue;
		if (!run->settle)
			zap_frozen(s, run, &known);
		else if (!budget_pages || settle_some(s, run, &budget_pages))
			s->frozen[left++] = *run;
	}
	s->frozen_count = left;
}

static void give_up_frozen(struct scan *s)
{
	for (size_t i = 0; i < s->frozen_count; i++)
		if (!s->frozen[i].settle && is_there(s, &s->frozen[i]))
			forget_sample(s, &s->frozen[i]);
	s->frozen_count = 0;
}

/* A thread that waits for storage may keep all others waiting: that is not tried time and again. */
static int freeze(struct scan *s)
{
	int r;

	if (s->spared_slices) {
		s->spared_slices--;
		return -EAGAIN;
	}
	r = s->freezer.freeze(s->freezer.ctx);
	if (r == -EBUSY)
		s->freezer.freeze = NULL;
	if (r)
		s->spared_slices = SPARED_SLICES;
	return r;
}

/* What needs that nobody writes, for all units of a slice at once: to stop everybody takes longer than
 * the work. */
static void do_frozen(struct scan *s)
{
	uint64_t begin_us = os_now_us();

	s->settle_pages = s->stopped_us = 0;
	if (!s->frozen_count)
		return;
	if (freeze(s)) {
		give_up_frozen(s);
		return;
	}
	do_frozen_runs(s);
	s->freezer.thaw(s->freezer.ctx);
	s->stopped_us = os_now_us() - begin_us;
	s->tally.frozen_us += s->stopped_us;
}

static void set_due(struct scan *s, uint64_t page)
{
	for (unsigned i = 0; i < ACTIVITIES; i++) {
		s->was_due[i] = activity_is_sampled((enum activity)i, page, s->pass - 1, s->thin_before);
		s->due[i] = s->pass > COUNTING_PASS &&
			    activity_is_sampled((enum activity)i, page, s->pass, s->thin);
	}
}

static void note_sample(const struct scan *s, uint64_t pages, struct unit_sample *sample)
{
	memset(sample->protected, 0, sizeof sample->protected);
	for (uint64_t i = 0; i < pages; i++)
		sample->protected[i / 64] |= (uint64_t)s->unit[i].protected << i % 64;
	sample->pass = s->pass;
}

static int do_unit(struct scan *s, struct ram_block *b, uint64_t first, uint64_t pages)
{
	struct unit_sample *last = &s->blocks[s->slot].samples[first / UNIT_PAGES];
	bool sampled = last->pass && last->pass == s->pass - 1;
	int r = os_pagemap_flags(s->pagemap, b->hva + os_bytes(first), pages, s->flags);

	last->pass = 0;
	if (r)
		return r;
	set_due(s, first);
	for (uint64_t page = first; page < first + pages;) {
		struct ram_range range = ram_range_at(b, page, first + pages);

		look_at_range(s, b, first, &range, sampled ? last : NULL);
		page += range.pages;
	}
	if (s->pass == COUNTING_PASS)
		return 0;
	r = sample(s, b, first, pages);
	if (!r)
		note_sample(s, pages, last);
	return r;
}

/* ---- slices ------------------------------------------------------------------------------------- */

/* The block in the slot, with room for what is remembered of it. */
static struct ram_block *block_of(struct scan *s, unsigned slot)
{
	struct ram_block *b = ram_block_at(s->ram, slot);
	struct scan_block *known = &s->blocks[slot];

	if (!b || (known->block == b && known->pages == b->pages))
		return b;
	free(known->samples);
	known->samples = calloc(b->pages / UNIT_PAGES + 1, sizeof *known->samples);
	known->block = known->samples ? b : NULL;
	known->pages = b->pages;
	return known->samples ? b : NULL;
}

/* False: the pass is over. */
static bool next_unit(struct scan *s)
{
	while (s->slot < RAM_BLOCKS) {
		struct ram_block *b = block_of(s, s->slot);
		uint64_t pages;

		if (b && s->page < b->pages) {
			pages = b->pages - s->page < UNIT_PAGES ? b->pages - s->page : UNIT_PAGES;
			(void)do_unit(s, b, s->page, pages);
			s->page += pages;
			s->units_done++;
			return true;
		}
		s->slot++;
		s->page = 0;
	}
	return false;
}

static void note_hold(struct tally *t, uint64_t took_us, uint64_t took_cpu_us)
{
	t->holds++;
	t->long_holds += took_us > SCAN_HOLD_MAX_US;
	t->long_cpu_holds += took_cpu_us > SCAN_HOLD_MAX_US;
	t->hold_max_us = took_us > t->hold_max_us ? took_us : t->hold_max_us;
	t->hold_max_cpu_us = took_cpu_us > t->hold_max_cpu_us ? took_cpu_us : t->hold_max_cpu_us;
}

enum slice_end { SLICE_MORE, SLICE_LAST, SLICE_HELD };

static enum slice_end do_units(struct scan *s, uint64_t begin_us)
{
	for (uint64_t units = s->units / SLICES + 1; units; units--) {
		if (os_now_us() - begin_us >= SLICE_US || s->settle_pages >= SETTLE_PAGES ||
		    s->frozen_count >= FEW_RUNS)
			break;
		if (!next_unit(s))
			return SLICE_LAST;
	}
	return SLICE_MORE;
}

/* What an earlier slice has left comes first. */
static enum slice_end do_units_and_frozen(struct scan *s, uint64_t begin_us)
{
	enum slice_end end = s->frozen_count ? SLICE_MORE : do_units(s, begin_us);

	do_frozen(s);
	return s->frozen_count ? SLICE_MORE : end;
}

static enum slice_end do_slice(struct scan *s)
{
	uint64_t begin_us, begin_ns;
	enum slice_end end;

	ram_lock(s->ram);
	begin_us = os_now_us();
	begin_ns = cpu_ns();
	if (s->anew || s->other == SCAN_YIELDS || (s->other == SCAN_ALONE && ram_is_held(s->ram)))
		end = SLICE_HELD;
	else
		end = do_units_and_frozen(s, begin_us);
	s->anew = false;
	begin_ns = cpu_ns() - begin_ns;
	note_hold(&s->tally, os_now_us() - begin_us, begin_ns / 1000);
	ram_unlock(s->ram);
	s->tally.cpu_ns += begin_ns;
	return end;
}

/* ---- passes ------------------------------------------------------------------------------------- */

static uint64_t count_units(struct scan *s)
{
	uint64_t units = 0;

	ram_lock(s->ram);
	for (unsigned slot = 0; slot < RAM_BLOCKS; slot++) {
		const struct ram_block *b = ram_block_at(s->ram, slot);

		units += b ? (b->pages + UNIT_PAGES - 1) / UNIT_PAGES : 0;
	}
	ram_unlock(s->ram);
	return units;
}

static void begin_pass(struct scan *s, uint64_t shortest_us)
{
	uint64_t now = os_now_us();

	s->runs = true;
	s->begun_us = now;
	s->asked_us = shortest_us;
	if (++s->pass == COUNTING_PASS)
		s->minute_us = now;
	if (s->pass == COUNTING_PASS + 1)
		s->since_us = now;
	s->minutes = (unsigned)((now - s->minute_us) / LONG_UNIT_US);
	s->minute_us += s->minutes * LONG_UNIT_US;
	s->units = count_units(s);
	s->units_done = 0;
	s->slot = 0;
	s->page = 0;
	memset(&s->tally, 0, sizeof s->tally);
}

static uint64_t pages_in_use(const struct scan *s, enum scan_window window)
{
	uint64_t pages = 0;

	if (s->pass <= COUNTING_PASS + 1 || os_now_us() - s->since_us < windows_us[window])
		return SCAN_UNKNOWN;
	for (unsigned i = 0; i < ACTIVITIES; i++)
		for (unsigned k = 0; k < LONG_STATES; k++)
			if (activity_used_within(entry_activity(i, k), windows_us[window], s->period_us))
				pages += s->tally.pages[i][k];
	return pages;
}

/* With the lock of the report. */
static void report_pass(struct scan *s)
{
	struct scan_report *to = &s->report;
	const struct tally *t = &s->tally;
	bool async = os_features_get()->uffd_features & OS_UFFD_WP_ASYNC,
	     single = s->uffd >= 0 && !t->around;

	to->passes++;
	memset(to->pages, 0, sizeof to->pages);
	for (unsigned i = 0; i < ACTIVITIES; i++)
		for (unsigned k = 0; k < LONG_STATES; k++)
			to->pages[activity_states[i].class] += t->pages[i][k];
	memcpy(to->by_source, t->by_source, sizeof to->by_source);
	for (unsigned i = 0; i < SCAN_SOURCES; i++)
		to->granularity_pages[i] = single && (i != SCAN_CLEAN || async) ? 1 : SCAN_AROUND_PAGES;
	to->writes_seen = t->writes_seen;
	to->written += t->written;
	for (unsigned i = 0; i < SCAN_WINDOWS; i++)
		to->in_use[i] = pages_in_use(s, (enum scan_window)i);
	to->sampled += t->sampled;
	to->refaults += t->refaults;
	to->settled += t->settled;
	to->frozen_us += t->frozen_us;
	to->cpu_ns += t->cpu_ns;
	to->pass_cpu_ns = t->cpu_ns;
	to->holds += t->holds;
	to->long_holds += t->long_holds;
	to->long_cpu_holds += t->long_cpu_holds;
	if (t->hold_max_us > to->hold_max_us)
		to->hold_max_us = t->hold_max_us;
	if (t->hold_max_cpu_us > to->hold_max_cpu_us)
		to->hold_max_cpu_us = t->hold_max_cpu_us;
	to->paused = false;
}

/* With the lock of the report. */
static void set_period(struct scan *s, uint64_t period_us)
{
	s->period_us = period_us;
	if (s->report.period_us) /* else it was turned off meanwhile */
		s->report.period_us = period_us;
}

static void end_pass(struct scan *s)
{
	struct scan_activity activity = { .shortest_us = s->asked_us, .period_us = s->asked_us };

	if (s->pass > COUNTING_PASS + 1) {
		activity.period_us = s->period_us;
		activity.looked = s->tally.looked;
		activity.changed = s->tally.changed;
	}
	s->runs = false;
	memcpy(s->present, s->tally.present, sizeof s->present);
	pthread_mutex_lock(&s->lock);
	activity.migration_pass_us = s->migration_pass_us;
	if (s->pass > COUNTING_PASS)
		report_pass(s);
	set_period(s, scan_next_period_us(&activity));
	s->thin_before = s->thin;
	s->report.thin = s->thin = scan_thin(s->present, s->period_us);
	pthread_mutex_unlock(&s->lock);
}

/* What was sampled says nothing any more: the next pass has another number than the one that follows. */
static void break_off(struct scan *s)
{
	s->runs = false;
	s->frozen_count = 0;
	s->pass = s->pass > COUNTING_PASS ? s->pass + 1 : 0;
}

static void note_pause(struct scan *s)
{
	pthread_mutex_lock(&s->lock);
	s->report.paused = true;
	pthread_mutex_unlock(&s->lock);
}

/* A pass is spread over its period; the one that only counts is not. */
static uint64_t rest_us(const struct scan *s, uint64_t units_done)
{
	uint64_t due, now = os_now_us(), least = REST_US;

	if (s->stopped_us * REST_FACTOR > least)
		least = s->stopped_us * REST_FACTOR;
	if (s->pass == COUNTING_PASS || !s->units)
		return least;
	due = s->begun_us + (uint64_t)((double)s->period_us * (double)units_done / (double)s->units);
	return due > now + least ? due - now : least;
}

/* Looks of another period, or from before a time in which nobody looked, do not go with those to come:
 * it is all new. */
static void begin_anew(struct scan *s)
{
	s->runs = false;
	s->frozen_count = 0;
	s->pass = 0;
	s->next_us = 0;
}

static void change_period(struct scan *s, uint64_t shortest_us)
{
	begin_anew(s);
	if (!s->asked_us)
		begin_single(s);
	else if (!shortest_us)
		end_single(s);
	s->period_us = s->asked_us = shortest_us;
}

/* The pass that is under way is as far as it is, and goes on at another pace. What it samples may become less, never
 * more: the next look takes it for what this pass has sampled throughout. */
static void change_pace(struct scan *s, uint64_t migration_pass_us)
{
	const struct scan_activity activity = { .shortest_us = s->asked_us, .period_us = s->asked_us,
						.migration_pass_us = migration_pass_us };
	uint64_t done, units = s->units ? s->units : 1;
	unsigned thin;

	s->paced_us = migration_pass_us;
	if (!migration_pass_us)
		begin_anew(s); /* nobody may take looks of such a pace for those that were asked for */
	done = s->runs ? s->units_done : 0;
	pthread_mutex_lock(&s->lock);
	set_period(s, scan_next_period_us(&activity));
	thin = scan_thin(s->present, s->period_us);
	s->report.thin = s->thin = thin > s->thin ? thin : s->thin;
	pthread_mutex_unlock(&s->lock);
	s->begun_us = os_now_us() - (uint64_t)((double)s->period_us * (double)done / (double)units);
	s->next_us = 0;
}

uint64_t scan_step(struct scan *s)
{
	uint64_t shortest_us, migration_pass_us, rest, now = os_now_us();

	pthread_mutex_lock(&s->lock);
	shortest_us = s->shortest_us;
	migration_pass_us = s->migration_pass_us;
	pthread_mutex_unlock(&s->lock);
	if (s->asked_us != shortest_us)
		change_period(s, shortest_us);
	if (!shortest_us)
		return UINT64_MAX;
	if (s->paced_us != migration_pass_us)
		change_pace(s, migration_pass_us);
	if (now < s->next_us)
		return s->next_us - now;
	if (!s->runs)
		begin_pass(s, shortest_us);
	switch (do_slice(s)) {
	case SLICE_HELD:
		break_off(s);
		note_pause(s);
		rest = HELD_POLL_US;
		break;
	case SLICE_LAST:
		rest = rest_us(s, s->units);
		end_pass(s);
		break;
	default:
		rest = rest_us(s, s->units_done);
	}
	s->next_us = os_now_us() + rest;
	return rest;
}
