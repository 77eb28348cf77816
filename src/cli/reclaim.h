/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What `latent reclaim` and its --auto have in common. One thread. */
#ifndef LATENT_CLI_RECLAIM_H
#define LATENT_CLI_RECLAIM_H

#include "cli/vm_view.h"

#include <signal.h>

#define RECLAIM_WHY_BYTES 768

/* How often Ctrl-C was: the first ends a walk, the second waits for nothing. reclaim_catch_interrupts: from here on. */
extern volatile sig_atomic_t reclaim_interrupted;
void reclaim_catch_interrupts(void);

/*
 * Has the agent walk once through guest RAM and give back what was not used for so long, until the VM
 * takes no more than `until_bytes` (0: to the end), and waits for that; brings the view up to date. 0,
 * or a negative errno with the sentence in `why`: -EALREADY: another walk is under way; -EAGAIN: a save
 * came between; -EBUSY: not in this VM, as it is; -ECANCELED: somebody has ended it, also by
 * reclaim_interrupted; -ESRCH: the VM has ended. What was given back before that stays so.
 */
int reclaim_walk(struct vm_view *view, uint64_t unused_us, uint64_t until_bytes,
		 char why[RECLAIM_WHY_BYTES]);

/* reclaim_store.c: what is packed goes to a new file at `path` from now on, which is removed at once and is the agent's
 * alone; at most so many bytes. An exit status; the sentence was printed. */
int reclaim_give_store(const struct vm_view *view, const char *path, uint64_t most_bytes);

/* Pages that were given back so far. */
uint64_t reclaim_pages(const struct vm_stats *stats);

/* The least time for which a page must not have been used: two of the shortest scan periods, or 1 s; and the most that
 * anybody remembers: 13 minutes, or five such periods. */
uint64_t reclaim_floor_us(const struct vm_stats *stats);
uint64_t reclaim_longest_us(const struct vm_stats *stats);

/* ---- --auto: reclaim_auto.c ------------------------------------------------------------------------ */

enum pressure_act { PRESSURE_REST, PRESSURE_WALK, PRESSURE_BACK_OFF };

/* How old a page has to be that is given back: the younger, the longer the pressure lasts; and older
 * again when what was given back is used again. */
struct pressure_control {
	double target_percent, refaults_most_per_s;
	uint64_t floor_us;       /* never younger than that, */
	uint64_t longest_us;     /* nor older */
	uint64_t unused_us;      /* of the next walk, */
	uint64_t walked_us;      /* and of the last one; 0: there was none */
	unsigned backoffs, rest; /* rest: steps in which nothing is done */
};

/* A step every two seconds. PRESSURE_WALK: now, and `*ret_unused_us` is how old. */
enum pressure_act pressure_step(struct pressure_control *control, double percent, double refaults_per_s,
				uint64_t *ret_unused_us);

/* Until it is interrupted or the VM ends. An exit status. */
int reclaim_auto(struct vm_view *view, double target_percent, bool json);

#endif
