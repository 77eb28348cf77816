/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The statistics of one VM: a file `stats` in its run-time directory, mapped by the agent (the only
 * writer) and by `latent ps` and `latent stat` (read-only). It is a report and never an input: the
 * agent reads nothing back from it on which guest memory depends.
 *
 * Counters are 64-bit, only grow unless their name ends in `_now`, and are read and written with
 * relaxed atomics. Units are in the names.
 */
#ifndef LATENT_VMDIR_STATS_H
#define LATENT_VMDIR_STATS_H

#include <stdatomic.h>
#include <stdint.h>

#define VM_STATS_MAGIC 0x54534c54u /* "TLST" */
#define VM_STATS_VERSION 11u
#define VM_STATS_VOLUMES 32u
#define VM_STATS_CLASSES 6u
#define VM_STATS_SCAN_SOURCES 3u
#define VM_STATS_WINDOWS 3u /* 10 s, 1 min, 10 min */

typedef _Atomic uint64_t stat_counter;

/* Why bytes that were asked for were copied and not mapped. Order is part of the layout. */
enum miss_reason {
	MISS_MISALIGNED,  /* file offset and guest address differ within the page, or part of a page */
	MISS_SHORT_RUN,   /* fewer contiguous pages than a mapping is worth */
	MISS_UNLIKELY,    /* likelihood of sharing below the threshold */
	MISS_BUDGET,      /* the process has no mappings to spare */
	MISS_WRITABLE,    /* open for writing, by this VM or somebody else, now or a moment ago */
	MISS_NO_LEASE,    /* the file system gives no lease and nothing else protects the file */
	MISS_DETACHED,    /* `latent detach` */
	MISS_SAVING,      /* guest RAM is being saved */
	MISS_EXCLUDED,    /* a device of this VM needs all RAM in one file */
	MISS_END_OF_FILE, /* beyond the last whole page */
	MISS_KERNEL_IO,   /* io_uring or Linux AIO: the kernel reads it by itself */
	MISS_BUFFER,      /* not read into guest RAM: metadata, compressed or encrypted clusters */
	MISS_FAILED,      /* the kernel refused the mapping, or storage failed */
	MISS_REASONS
};

enum volume_state {
	VOLUME_LEASED,   /* mapped under a read lease */
	VOLUME_SEALED,   /* mapped: fs-verity, immutable, or a read-only file system */
	VOLUME_TRUSTED,  /* mapped on the user's word (--trust-image) */
	VOLUME_CACHED,   /* mapped: a pager's cache, which only grows */
	VOLUME_WRITABLE, /* copied: somebody has it open for writing; looked at again from time to time, */
	VOLUME_NO_LEASE, /* and so this: nothing keeps it from changing */
	VOLUME_DETACHED, /* copied: detached by command, for good */
	VOLUME_CLOSED,   /* the VMM has it open no more; the counters stay until the place is needed */
	VOLUME_STATES
};

/* What a restore does, in this order. */
enum restore_step {
	RESTORE_BEGUN,    /* by the command */
	RESTORE_CHECKED,  /* the snapshot, its disks and images are what they should be */
	RESTORE_OVERLAYS, /* each disk has a new one */
	RESTORE_EXEC,     /* the command becomes QEMU */
	RESTORE_RAM,      /* guest RAM is mapped */
	RESTORE_STATE,    /* devices have their state */
	RESTORE_RESUMED,  /* the guest runs */
	RESTORE_REST,     /* what it has not touched yet begins to be loaded */
	RESTORE_STEPS
};

/* Of what a restored VM has not touched yet, by a pager or a process of the restore's. */
enum rest_state {
	REST_NONE, /* nothing is loaded, and never was */
	REST_LOADING,
	REST_LOADED,
	REST_STOPPED, /* by command, or who loaded it was ended */
	REST_NO_ROOM, /* the host's memory, or the cgroup's, is needed for other things */
	REST_FAILED,  /* storage failed, or the snapshot is not there any more */
	REST_STATES
};

struct volume_stats {
	char path[256]; /* as the VMM opened it, NUL-terminated, cut at 255 bytes */
	_Atomic uint64_t dev, ino, pages;
	_Atomic uint32_t state;   /* enum volume_state */
	_Atomic uint32_t readers_now; /* VMs of this user attached to it, this one included */
	_Atomic uint32_t likelihood_permille_now;
	_Atomic uint32_t min_run_pages_now;
	stat_counter reads, bytes_asked, bytes_shortcut, bytes_from_storage;
	stat_counter reads_joined, pages_joined; /* another VM had them in flight */
	stat_counter maps, pages_mapped_now;
	stat_counter pages_one_now, pages_many_now; /* locations mapped once / by many, by all VMs */
	stat_counter copied_one, copied_many;       /* copies on write, by the group at that time */
	stat_counter pages_dropped;                 /* discarded or overwritten */
	stat_counter miss_reads[MISS_REASONS], miss_bytes[MISS_REASONS];
};

/* What the guest uses, as of the end of the last pass; see struct scan_report of activity/scan.h. */
struct scan_stats {
	stat_counter period_us_now; /* 0: off */
	stat_counter shortest_us_now; /* the period that was asked for */
	stat_counter paused_now, passes, sampled, refaults, thin_now;
	stat_counter cpu_ns, pass_cpu_ns_now, hold_max_us, hold_max_cpu_us, holds, long_holds, long_cpu_holds, settled,
		frozen_us;
	stat_counter pages_now[VM_STATS_CLASSES], by_source_now[VM_STATS_SCAN_SOURCES];
	stat_counter granularity_now[VM_STATS_SCAN_SOURCES]; /* pages */
	stat_counter writes_seen_now, written; /* pages of which it is seen; pages that were found written */
	stat_counter in_use_now[VM_STATS_WINDOWS];           /* pages; UINT64_MAX: not known */
};

/* Memory that was given back, in pages but where the name says it (core/ram.h, struct
 * ram_reclaim_counts). */
struct reclaim_stats {
	stat_counter zeros, words, spilled, clean, returned, spilled_now, spill_bytes_now;
	stat_counter spill_file_bytes_now, spill_file_most_bytes_now; /* of the store in a file; most: 0: there is none */
	stat_counter left_touched, left_reads, left_unpacked, left_failed;
	stat_counter memory_bytes_now; /* that the VM takes: its own RAM, copies of image pages, and the store in memory */
	stat_counter looked_now; /* in the walk through guest RAM that is under way, or was the last one */
	stat_counter walks; /* that have ended, */
	stat_counter error_now; /* the last one with this errno, or 0 */
};

struct vm_stats {
	uint32_t magic, version;
	char name[64], agent_version[32];
	char cwd[256]; /* where the VMM was started: its relative paths begin there; empty: too long */
	_Atomic uint32_t pid; /* 0 until guest RAM is mapped: the agent has not spoken yet */
	_Atomic uint32_t overlays_allowed;
	char excluded_by[160]; /* the sentence that says why overlays are not used, or empty */
	_Atomic uint32_t other_io; /* drives use io_uring or Linux AIO: their reads are counted, and never mapped */
	_Atomic uint64_t ram_bytes, started_unix_s;
	stat_counter maps_ram_now, maps_other_now, maps_budget_now, maps_limit_now;
	/* All of RAM is base (masked or not) or overlay; private pages are copies inside overlays, and counted there too. */
	stat_counter pages_base_now, pages_overlay_now, pages_private_now;
	/* Pages to be made when they are touched (core/mask.c); all but the first only grow. */
	stat_counter pages_masked_now, pages_masked, masked_made, masked_copied, masked_mapped, masked_dropped;
	stat_counter pages_never_masked;    /* of a restore: zero, as base is already */
	/* That a migration has told by their place on an image: all of them, those that were fetched from there, and those
	 * that nobody has needed yet (core/ram.h, struct ram_source_counts). */
	stat_counter source_bits_set, source_bits_fetched, source_bits_now;
	stat_counter pages_copied_on_write; /* mapped from a file, until the guest wrote to them */
	stat_counter pages_discarded, pages_settled, map_failures;
	stat_counter reconciled_unix_ms; /* when the counts of copies were last brought up to date */
	/* What a source that cannot be mapped is loading; source is empty: there is none. */
	char source[256], source_trouble[256];
	stat_counter source_pages_all, source_pages_now, source_bytes, source_faults, source_wrong, source_pagers_lost;
	stat_counter source_waiting_now, source_silent_ms_now;
	stat_counter restore_us[RESTORE_STEPS]; /* CLOCK_MONOTONIC when it was done; 0: not yet, or no restore */
	_Atomic uint32_t rest_state; /* enum rest_state */
	stat_counter rest_pages_all_now, rest_pages_now; /* that are stored, and in the host's memory */
	stat_counter rest_end_us; /* CLOCK_MONOTONIC; 0: it is still being loaded, or never was */
	_Atomic uint32_t is_spare; /* restored, and waits to be taken */
	char message[256]; /* the last that the agent has said, or empty */
	_Atomic uint64_t message_unix_s;
	_Atomic uint32_t volume_count;
	struct volume_stats volumes[VM_STATS_VOLUMES];
	struct scan_stats scan;
	struct reclaim_stats reclaim;
};

static inline void stat_add(stat_counter *c, uint64_t n)
{
	atomic_fetch_add_explicit(c, n, memory_order_relaxed);
}

static inline void stat_sub(stat_counter *c, uint64_t n)
{
	atomic_fetch_sub_explicit(c, n, memory_order_relaxed);
}

static inline void stat_set(stat_counter *c, uint64_t n)
{
	atomic_store_explicit(c, n, memory_order_relaxed);
}

static inline uint64_t stat_get(const stat_counter *c)
{
	return atomic_load_explicit((stat_counter *)c, memory_order_relaxed);
}

#endif
