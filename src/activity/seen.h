/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Which pages of guest RAM are touched during a time, and in which order: the page tables are emptied, and looked
 * at from time to time for what has come back. See "What the guest is using" in ARCHITECTURE.md.
 *
 * Base can be emptied while the guest runs. An overlay can hold copies that would be lost, and so only the rest of it
 * is emptied, while all that writes guest RAM stands still; copies, and short runs between them, count as touched, for
 * nobody can tell. Faults around a touched page would be seen as touches: in base there are none while it is registered
 * for write-protection, and within an overlay they end where it does. Works under KVM and TCG alike, as both fault
 * through the VMM's page table; but under TCG translated code runs without a look at its pages.
 *
 * One thread; nothing is held but the range lock, for 2 ms at most.
 */
#ifndef LATENT_ACTIVITY_SEEN_H
#define LATENT_ACTIVITY_SEEN_H

#include "core/ram.h"

#include <stdint.h>

#define SEEN_SLICE_US 40000
#define SEEN_EARLIER 0x8000u /* a page that was seen before seen_restart, and not since */
#define SEEN_BY_STATE 0xfff0u /* and those above: not seen, but hot or warm by its entry; the hotter, the less */
#define SEEN_STATES_PAGES 16384u /* so many of these at most: 64 MiB */

struct seen;

/* A table in shared memory, uint16_t for each page, block after block: 0 for not seen, else the slice of time, from
 * 1, or SEEN_BY_STATE. -ENOMEM. */
int seen_create(struct ram *ram, struct seen **ret_seen);
void seen_destroy(struct seen *seen); /* NULL is allowed */
int seen_fd(const struct seen *seen);

/* Before all else, where a scan has looked until now: pages that it has found in use are in the table from the
 * beginning, hottest first. They are what the window is too short to see. */
void seen_add_states(struct seen *seen);
/* Empties base. The next slice begins. */
void seen_begin(struct seen *seen);
/* [range lock; guest RAM's writers stopped, private flags just brought up to date] Empties overlays. What was seen
 * before is marked as earlier; seen_begin follows when the guest runs again. */
void seen_restart(struct seen *seen);
/* Looks, if a slice is over. Returns the microseconds until the next one is. */
uint64_t seen_look(struct seen *seen);

#endif
