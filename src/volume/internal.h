/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What volume.c (files and their leases) and shortcut.c (reads) share. */
#ifndef LATENT_VOLUME_INTERNAL_H
#define LATENT_VOLUME_INTERNAL_H

#include "volume/cost.h"
#include "volume/track.h"
#include "volume/volume.h"

#include <time.h>

struct volumes {
	struct ram *ram;
	struct volume_options options;
	struct vm_stats *stats;
	_Atomic bool allowed;
	_Atomic bool detached; /* all volumes, also those to come */
	pthread_mutex_t attach_lock; /* protects attaching: list[count] and count's growth */
	_Atomic uint32_t count;
	struct volume *list[VM_STATS_VOLUMES];
};

/* Has a writer changed the file before what was mapped from it was private? */
enum overtaken { OVERTAKEN_NO, OVERTAKEN_NOW, OVERTAKEN_TOLD };

struct volume {
	struct volumes *all;
	uint64_t dev, ino;
	int fd;            /* our own, read-only; holds the lease. -1: the file could not be reopened */
	uint64_t pages;    /* whole pages of the file */
	void *view;        /* for residency; NULL where the kernel does not tell us */
	unsigned file;     /* index in core */
	bool has_file, is_regular;
	bool is_cache; /* it only grows, and nobody else writes it */
	bool detached; /* for good, by the user */
	/* Everything above, and view, track and stats, changes only while the volume is closed and nobody
	 * uses it: see volume_get. */
	_Atomic bool closed;
	_Atomic uint32_t users;
	uint64_t next_try_us, try_after_us; /* a lease is asked for again; volumes_tidy's own */
	_Atomic uint32_t state; /* enum volume_state; leaves a mapping state under the range lock only */
	_Atomic bool leased;
	struct timespec changed;      /* ctime, when it was mapped first under the lease */
	_Atomic uint32_t overtaken;   /* enum overtaken */
	_Atomic uint64_t broken_us; /* CLOCK_MONOTONIC; 0: never */
	_Atomic uint64_t next_page;  /* where the last read ended: sequential reads are read ahead, */
	_Atomic uint64_t ahead_page; /* up to here, */
	_Atomic uint64_t streak_pages; /* after so many without a gap */
	struct track *track;        /* NULL: no tracking structure to be had; likelihood is then 0 */
	struct volume_stats *stats;
};

static inline bool state_maps(uint32_t state)
{
	return state == VOLUME_LEASED || state == VOLUME_SEALED || state == VOLUME_TRUSTED || state == VOLUME_CACHED;
}

#endif
