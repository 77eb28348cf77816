/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Joins a snapshot with all those that it refers to into a new one, which needs none of them: pages that are in
 * `ram` of others are copied. What refers to disk images goes on doing so.
 */
#ifndef LATENT_SNAPSHOT_FLATTEN_H
#define LATENT_SNAPSHOT_FLATTEN_H

#include "snapshot/store.h"

struct flatten_result {
	struct snapshot_counts pages;
	uint64_t pages_copied_in; /* that were in other snapshots */
	uint64_t bytes_written;
};

/* 0, or a negative errno with a sentence in `why`; then nothing of the new snapshot is left. -EINTR: progress->stop
 * was set. Progress may be looked at from another thread. */
int snapshot_flatten(const char *dir, const char *new_dir, struct source_progress *progress,
		     struct flatten_result *ret_result, char why[SNAPSHOT_WHY_BYTES]);

#endif
