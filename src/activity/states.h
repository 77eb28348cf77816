/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * How much a page is used, as two states in its page entry (core/entry.h): by looks, and by minutes. What a look
 * has found drives them; the transitions are a table (states.c), and docs/activity.md has its diagram. An entry
 * of zero is a page that nobody has looked at.
 *
 * The short state changes at a look, of which there is one in each scan period. The long state is computed from
 * it: the minutes since it last was one of a page in use. Both may be read from the table of entries by anybody, at
 * any time; they outlive whoever looks.
 *
 * Nothing here has state of its own, and all may be called from any thread.
 */
#ifndef LATENT_ACTIVITY_STATES_H
#define LATENT_ACTIVITY_STATES_H

#include "core/entry.h"

#include <stdbool.h>
#include <stdint.h>

/* The short state. */
enum activity {
	ACTIVITY_NEW,      /* no look has told anything yet */
	ACTIVITY_HOT,      /* used at three looks on end */
	ACTIVITY_WARMER,   /* at two, */
	ACTIVITY_WARM,     /* or one */
	ACTIVITY_SLACK,    /* was hot, and not used at the last look */
	ACTIVITY_COOLING,  /* not used at one look, */
	ACTIVITY_COOL,     /* two, */
	ACTIVITY_COLD,     /* three, */
	ACTIVITY_COLDER,   /* four, */
	ACTIVITY_COLDEST,  /* five, */
	ACTIVITY_FROZEN,   /* or six and more */
	ACTIVITIES
};

/* What a look finds; of SEEN_NOTHING nobody learns anything, and the short state stays. */
enum seen_use {
	SEEN_UNUSED,
	SEEN_USED,
	SEEN_WRITTEN, /* counts twice: where only writes are seen, reads are not */
	SEEN_USES,
	SEEN_NOTHING = SEEN_USES
};

/* What people and commands call it. */
enum activity_class {
	CLASS_NEW,
	CLASS_HOT,
	CLASS_WARM,
	CLASS_COOL,
	CLASS_COLD,
	CLASS_FROZEN,
	ACTIVITY_CLASSES
};

struct activity_state {
	const char *name;
	enum activity_class class;
	unsigned unused_looks;         /* on end; 0: in use (or new) */
	unsigned looks_per_sample;     /* a power of two: at every look it is found out anew whether the page is used, or
					* at every eighth, because finding out costs the guest something */
	enum activity next[SEEN_USES]; /* by what was seen */
};

extern const struct activity_state activity_states[ACTIVITIES];
extern const char *const activity_class_names[ACTIVITY_CLASSES];

/* The long state: 0 for a page that nobody has looked at; 1: used in the current minute, or never looked at before
 * it; k: not since k - 1 beginnings of a minute; the last one also longer. */
#define LONG_UNIT_US 60000000ull
#define LONG_STATES 16u

/* The long state after a look that has left `now` as the short one; `units`: minutes that have begun since the look
 * before. */
unsigned activity_long_next(unsigned long_state, enum activity now, unsigned units);

/* The bits of the entry's activity after a look. Unknown states, which only a damaged table has, are new ones. */
uint64_t activity_next(uint64_t entry, enum seen_use seen, unsigned units);

static inline enum activity activity_of(uint64_t entry)
{
	unsigned state = entry_short(entry);

	return state < ACTIVITIES ? (enum activity)state : ACTIVITY_NEW;
}

static inline enum activity_class activity_class_of(uint64_t entry)
{
	return activity_states[activity_of(entry)].class;
}

/* The page was not used for at least so long. `shortest_us`: no two looks had less between them (struct scan_report; 0
 * during a migration, when only minutes count). */
uint64_t activity_unused_us(uint64_t entry, uint64_t shortest_us);

/* The most that activity_unused_us says of any entry. */
uint64_t activity_longest_us(uint64_t shortest_us);

/* Was the page used within the last `window_us`? Looks are counted where six of them are as long as the window, and
 * minutes else. A new page: no. */
bool activity_used_within(uint64_t entry, uint64_t window_us, uint64_t period_us);

/* Is it found out at this pass whether the page is used, for the next look to see? Pages are sampled in groups of
 * 2 MiB, of which each has its turn. thin: only every 2^thin-th time. */
#define SAMPLE_GROUP_PAGES 512u
bool activity_is_sampled(enum activity state, uint64_t page, uint64_t pass, unsigned thin);

/* ---- the period --------------------------------------------------------------------------------- */

#define SCAN_PERIOD_MIN_US 100000ull     /* 0.1 s */
#define SCAN_PERIOD_MAX_US 3600000000ull /* an hour */
#define SCAN_PERIOD_US 10000000ull       /* the default where one is needed */

struct scan_activity {
	uint64_t shortest_us;      /* what the user asked for */
	uint64_t period_us;        /* of the pass that has ended */
	uint64_t looked, changed;  /* pages, in it; changed: of another class than before */
	uint64_t migration_pass_us; /* the time that the next pass of a migration will take; 0: there is none */
};

/*
 * The next pass's period: as asked for while more than 1 in 50 pages changes its class; while less than 1 in 200
 * does, half as long again at each pass, up to four times. During a migration the time of its next pass, so that each
 * of these begins with fresh states; never longer than asked for.
 */
uint64_t scan_next_period_us(const struct scan_activity *activity);

/*
 * How seldom pages have to be sampled, so that the guest does not lose more than a tenth of one processor to it:
 * the smallest `thin` of activity_is_sampled with which it loses less. `present`: pages that would have to be
 * faulted in again, by state.
 */
#define REFAULT_NS 1600u /* of a page; 1000 to 2000, by how busy the machine is */
#define THIN_MAX 10u
unsigned scan_thin(const uint64_t present[ACTIVITIES], uint64_t period_us);

#endif
