/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Looks at each page of guest RAM once in a period, and writes into its entry what that says (activity/states.h).
 *
 * Whether a page is in use is found out by taking it out of the page table, and looking a period later whether it
 * has come back. That works under KVM and TCG alike, for both fault through the VMM's page table. What can be
 * found out, and how, depends on the mapping (enum scan_source). A page that is sampled costs the guest a fault of 1
 * to 2 us if it is in use, so pages known to be hot are sampled at every eighth pass only, in turn; scan_thin
 * bounds the rest.
 *
 * Where the kernel has write-protection that serves itself (WP_ASYNC, Linux 6.7), what is sampled of base is protected
 * first, which outlives the zap; a page that comes back without it was written. It costs a writer a second fault.
 *
 * A scan goes in slices: scan_step looks at the next few, under the range lock, for a fraction of a millisecond. One
 * thread calls it; the others may be called by any. It is advice: a failure costs knowledge, never contents.
 */
#ifndef LATENT_ACTIVITY_SCAN_H
#define LATENT_ACTIVITY_SCAN_H

#include "activity/states.h"
#include "core/ram.h"

/* How it is found out whether a page is in use, by the page's mapping. */
enum scan_source {
	SCAN_BASE,   /* base: zapped while the guest runs */
	SCAN_CLEAN,  /* pages of a file in an overlay: zapped with all that may write them stopped for a moment */
	SCAN_NOTHING,/* private copies, which a zap would lose; and SCAN_CLEAN where nobody can be stopped. Where somebody
		      * can, runs of SCAN_SETTLE_PAGES copies are moved to base, and are few */
	SCAN_SOURCES
};

extern const char *const scan_source_names[SCAN_SOURCES];

#define SCAN_SETTLE_PAGES 16u

/* Pages that a single touch makes look used, where neighbours cannot be told apart. */
#define SCAN_AROUND_PAGES 16u

#define SCAN_HOLD_MAX_US 2000u /* what a hold shall never exceed */
enum scan_window { SCAN_WINDOW_10S, SCAN_WINDOW_1M, SCAN_WINDOW_10M, SCAN_WINDOWS };
#define SCAN_UNKNOWN UINT64_MAX

/* As of the end of the last pass; times are sums since the scan was made. */
struct scan_report {
	uint64_t period_us;   /* now; 0: off */
	uint64_t shortest_us; /* what was asked for */
	uint64_t passes;      /* that were finished */
	uint64_t pages[ACTIVITY_CLASSES];
	uint64_t by_source[SCAN_SOURCES];
	uint64_t granularity_pages[SCAN_SOURCES]; /* 1, or SCAN_AROUND_PAGES */
	uint64_t writes_seen; /* pages of SCAN_BASE of which it is found out, too, whether they were written */
	uint64_t in_use[SCAN_WINDOWS]; /* pages; SCAN_UNKNOWN: the scan is younger than that */
	uint64_t sampled, refaults; /* pages taken out of the page table; pages that came (back) there, */
	uint64_t written;     /* and of those the ones that are known to have been written */
	uint64_t settled;     /* copies that were moved to base */
	uint64_t frozen_us;   /* for which all that writes guest RAM was stopped */
	uint64_t cpu_ns, pass_cpu_ns; /* pass: of the last one */
	uint64_t hold_max_us, holds, long_holds; /* of the range lock; long: over SCAN_HOLD_MAX_US */
	uint64_t hold_max_cpu_us, long_cpu_holds; /* without the time in which another thread had the processor */
	unsigned thin;        /* see scan_thin */
	bool paused;          /* guest RAM is being saved */
};

/* Stops all that may write guest RAM for a moment; called with the range lock. -EBUSY: that cannot be done, and never
 * will be; NULL functions: the same. */
struct scan_freezer {
	int (*freeze)(void *ctx);
	void (*thaw)(void *ctx);
	void *ctx;
};

struct scan;

/* -ENOMEM, or what pagemap says. */
int scan_create(struct ram *ram, const struct scan_freezer *freezer, struct scan **ret_scan);
void scan_destroy(struct scan *scan); /* NULL is allowed; nobody steps */

/* Looks at each page once in `period_us` from now on, or a few times less often while little changes
 * (scan_next_period_us); all pages are new then. 0: no more, and states stay as they are. Takes effect at the next
 * scan_step, and waits for nothing. */
void scan_set_period(struct scan *scan, uint64_t period_us);
/* The time that the pass of a migration that begins now will take; 0: not known, or there is none any more. The pass of
 * the scan that is under way goes on at the pace that is right from now on. */
void scan_set_migration_pass(struct scan *scan, uint64_t pass_us);

/* Who else needs guest RAM registered with a userfaultfd of his own: of the scan nothing is registered then. */
enum scan_other {
	SCAN_ALONE,  /* nobody */
	SCAN_YIELDS, /* a save: the scan stands still */
	SCAN_BESIDE, /* a migration, whose write-protection lets pages of base come alone: they are looked at, and nothing
		      * else is. Pages of files keep their states */
};
/* From any to any. What was sampled before tells nothing afterwards. Takes the range lock. */
void scan_yield(struct scan *scan, enum scan_other other);

/* Does what is due. Returns the microseconds until there is more; UINT64_MAX: it is off. */
uint64_t scan_step(struct scan *scan);
void scan_get_report(struct scan *scan, struct scan_report *ret_report);

#endif
