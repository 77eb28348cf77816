/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Saves a running VM into a directory: see "Save" in ARCHITECTURE.md. The device state comes over QMP, RAM from
 * the VM's agent; the guest stands for the device state and the point in time, and runs while its RAM is
 * written.
 */
#ifndef LATENT_SNAPSHOT_SAVE_H
#define LATENT_SNAPSHOT_SAVE_H

#include "snapshot/source.h"

struct save_options {
	const char *run_dir;    /* of the VM */
	const char *name;       /* of the VM */
	const char *cwd;        /* what the VMM's relative paths begin with */
	bool cwd_left;          /* the VMM is elsewhere now (-daemonize), and cannot open them again */
	const char *dir;        /* the snapshot's; must not be there yet */
	unsigned before_ms, after_ms; /* it is seen which pages the guest uses: so long before the pause, and at least
	                               * so long after it (if the guest ran before, and with no `stop`) */
	const char *parent;     /* a snapshot's directory: what it has is not stored again; or NULL */
	bool stop;              /* the guest stands until all is written */
	bool compress;          /* `ram.zst` in place of `ram` */
	bool no_disks;          /* disks are left as they are, and are not part of the snapshot */
	uint64_t limit_bytes_s; /* of writing RAM; 0: none */
};

/* What is done while the guest stands, in this order. */
enum save_pause { SAVE_STOPPED, SAVE_DISKS, SAVE_DEVICES, SAVE_POINT, SAVE_RESUMED, SAVE_PAUSE_STEPS };

struct save_result {
	uint64_t pause_us;       /* the guest stood */
	uint64_t pause_step_us[SAVE_PAUSE_STEPS]; /* of that, until the step was done; 0: it stood before */
	uint64_t point_us;       /* of that, for the point in time of RAM */
	uint64_t load_us;        /* before all that: until a pager had loaded what the VM runs from */
	uint64_t write_us, state_bytes, ram_bytes_written;
	uint64_t packed_bytes;   /* of `ram.zst`, if that was asked for */
	uint64_t active_pages, active_written_pages;
	struct snapshot_counts pages;
	uint64_t pages_in_ram;   /* of those in volumes: in `ram` of other snapshots */
	struct source_counts source;
	uint32_t disks;          /* that the VM writes elsewhere from now on, also when the save has failed after that */
	bool disks_unsure;       /* or may write there: QEMU has not answered when it was told to */
	struct {
		char drive[64], before[256], now[256]; /* paths */
	} disk[16];
};

/* 0, or a negative errno with a sentence in `why`; then nothing of the snapshot is left, and the VM runs as it
 * did, on the new overlays of its disks if there are any in the result. -EINTR: progress->stop was set. Progress may be
 * looked at from another thread. */
int snapshot_save(const struct save_options *options, struct source_progress *progress,
		  struct save_result *ret_result, char why[SNAPSHOT_WHY_BYTES]);

#endif
