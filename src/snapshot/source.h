/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The RAM of a running VM as it was at one instant, read by another process while the guest goes on: see
 * "Save" in ARCHITECTURE.md. The VM's agent write-protects what base holds at that instant; here write
 * faults are served, by keeping a copy of the page before the guest may write it.
 *
 * Functions return 0 or a negative errno, with a sentence in `why`. One thread; it starts another one, for
 * faults, between source_point and source_end.
 */
#ifndef LATENT_SNAPSHOT_SOURCE_H
#define LATENT_SNAPSHOT_SOURCE_H

#include "snapshot/active.h"
#include "snapshot/store.h"
#include "vmdir/control.h"

#include <stdbool.h>

struct source;

/* Of the agent on the control socket at `path`. If the VM runs from a pager's cache, it waits for as long as it takes
 * until all of that is loaded. -EINTR: progress->stop was set meanwhile. */
int source_open(const char *path, struct source_progress *progress, struct source **ret_source,
		char why[SNAPSHOT_WHY_BYTES]);
/* Asks the agent to hold guest RAM. */
int source_begin(struct source *source, char why[SNAPSHOT_WHY_BYTES]);
/* From now on it is seen which pages the guest uses. */
int source_watch(struct source *source, char why[SNAPSHOT_WHY_BYTES]);
/* For a migration: copies in overlays, whose writes nobody sees, become base as far as possible. It looks at some pages;
 * again, until `*ret_left` is 0, and from then on at all of them once more. `*ret_pages`: that were copies. */
int source_settle(struct source *source, uint64_t *ret_pages, uint64_t *ret_left, char why[SNAPSHOT_WHY_BYTES]);
/* Most of the next step's work, while the guest runs. Again: what was written since is found changed. */
int source_arm(struct source *source, char why[SNAPSHOT_WHY_BYTES]);
/* For a migration: what is changed is told now, which will take so long; 0: not known. What the guest uses is looked at
 * again within that time, if it is at all. */
int source_pass(struct source *source, uint64_t pass_us, char why[SNAPSHOT_WHY_BYTES]);
/* The guest is stopped: this is the instant. `*ret_paused_us`: for how long all of the VMM stood. */
int source_point(struct source *source, uint64_t *ret_paused_us, char why[SNAPSHOT_WHY_BYTES]);

/* The guest belongs to another host: the agent does not let it go on when this process dies. */
int source_give(struct source *source, char why[SNAPSHOT_WHY_BYTES]);

/* The volumes that page entries name, as the agent knows them. */
const struct control_layout *source_layout(const struct source *source);

/* Writes contents to `ram_fd` and makes the metadata, in which volumes are numbered as in the layout, and then as
 * the parent has joined its own. `parent`: NULL for none. `limit_bytes_s`: 0 for as fast as it goes. */
int source_write(struct source *source, int ram_fd, struct parent *parent, uint64_t limit_bytes_s,
		 struct source_progress *progress, struct snapshot_image *ret_image, char why[SNAPSHOT_WHY_BYTES]);

/* The pages that the guest has used and that have contents, in the order of their first touch: those since the
 * point in time before those that were seen only before it. The caller frees the list. -ENOMEM. */
int source_list_active(const struct source *source, const struct snapshot_image *image, struct active_page **ret_list,
		       uint64_t *ret_count);

/*
 * For who tells another host of guest RAM, in place of source_write: what the agent shows, and keeps changing while
 * nothing stands. Belongs to the source. Pages are numbered through all blocks.
 */
struct source_view {
	uint32_t blocks;
	uint64_t pages;
	struct source_block {
		uint64_t first, pages;
		int memfd;               /* base; a hole is zero, and reading it here would fill it */
		uint64_t memfd_offset;
		const uint8_t *base;
		const uint64_t *entries; /* core/entry.h */
		const uint64_t *origins; /* core/origin.h */
		uint8_t *changed;        /* 1 from source_arm and source_point; the caller's to clear */
	} block[SNAPSHOT_BLOCKS];
	int cache_fd;                    /* a pager's cache that pages are mapped from (layout->cache_file); -1: none */
	/* After source_point: */
	const struct control_run *runs;  /* of private copies */
	uint64_t run_count;
	const uint8_t *copies;           /* in the order of all pages: there is something where runs are */
};
void source_get_view(const struct source *source, struct source_view *ret_view);

struct source_counts {
	uint64_t base_pages, private_pages, faults;
};
void source_get_counts(const struct source *source, struct source_counts *ret_counts);

/* Lets guest RAM go, as it is. NULL is allowed. */
void source_end(struct source *source);

#endif
