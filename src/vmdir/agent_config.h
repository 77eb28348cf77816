/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What `latent run` tells the agent: one fixed struct in a memfd whose number is in the environment
 * variable LATENT_AGENT_FD. Both sides come from one build; a wrong magic, version or size means
 * that they do not, and the agent ends the VMM with a sentence.
 *
 * LATENT_HELLO_FD (a pipe): the agent's constructor writes HELLO_TEXT there. `latent run` uses it,
 * with `-version` as the only argument, to see whether the VMM loads the agent at all.
 */
#ifndef LATENT_VMDIR_AGENT_CONFIG_H
#define LATENT_VMDIR_AGENT_CONFIG_H

#include "vmdir/stats.h"

#include <stdint.h>

#define AGENT_CONFIG_MAGIC 0x4147544cu /* "LTGA" */
#define AGENT_CONFIG_VERSION 6u
#define AGENT_SHARE_THRESHOLD 0.1 /* the default */
#define AGENT_CONFIG_ENV "LATENT_AGENT_FD"
#define AGENT_HELLO_ENV "LATENT_HELLO_FD"
#define AGENT_TEXT_OF(number) #number
#define AGENT_TEXT(number) AGENT_TEXT_OF(number)
#define AGENT_HELLO_TEXT "latent agent " LATENT_VERSION_TEXT " " AGENT_TEXT(AGENT_CONFIG_VERSION) "\n"

#define AGENT_RESTORE_VOLUMES 32
#define AGENT_RESTORE_OVERLAYS 16
#define AGENT_OVERLAY_BYTES 160
#define AGENT_LEARN_BYTES 40

/* When the device state is there, */
enum agent_restore_then {
	RESTORE_THEN_RUN,
	RESTORE_THEN_STAND, /* the guest stands until QEMU's `cont`, */
	RESTORE_THEN_WAIT,  /* or it is a spare: until CONTROL_TAKE, or whoever keeps it is gone, and QEMU quits */
};

/* What guest RAM begins with, and the state that its devices get; see snapshot/format.h. All descriptors are
 * inherited, and read-only, but directories and sockets. */
struct agent_restore {
	uint32_t active;
	int32_t pages_fd, ram_fd, state_fd;
	int32_t active_fd; /* -1: the snapshot has none */
	/* What an earlier restore of it on this host asked for beside the active set, as in snapshot/active.h.
	 * -1: nothing is known; then it is what this one asks for, and becomes that file of learn_dir_fd (-1: it is not). */
	int32_t learned_fd, learn_dir_fd;
	char learn_name[AGENT_LEARN_BYTES]; /* active_id of pages_fd, ram_fd and the volumes: what its contents are from */
	uint32_t volumes;
	int32_t volume_fd[AGENT_RESTORE_VOLUMES]; /* in the order in which pages refer to them */
	struct agent_pager {
		uint32_t active;       /* ram_fd is a cache, and pager_fd the connection to who fills it: vmdir/pager.h */
		int32_t fd, index_fd;
		char program[256], dir[256], source[1024]; /* to find and start another one */
	} pager;
	uint32_t then; /* enum agent_restore_then */
	int32_t report_fd; /* a SOCK_SEQPACKET: struct agent_report goes there; -1: nobody waits */
	uint32_t rest;     /* when the guest runs, the rest is loaded: by a pager, or by who has the other end of report_fd */
	/* New disks, which go again if the guest never runs. */
	int32_t overlays_fd; /* the directory that they are in, or -1 */
	uint32_t overlays;
	char overlay[AGENT_RESTORE_OVERLAYS][AGENT_OVERLAY_BYTES];
	uint64_t step_us[RESTORE_STEPS]; /* as of struct vm_stats; those that come before the agent */
};

enum agent_report_kind {
	REPORT_READY,  /* the guest runs, or stands as it was asked to */
	REPORT_TAKEN,  /* a spare is no longer its keeper's */
	REPORT_FAILED, /* it could not be let run, and stands; `cont` may help */
};

struct agent_report {
	uint32_t kind, pid;
	uint32_t rest; /* the other side shall load the rest, and tell of it */
	char name[64];
	uint64_t step_us[RESTORE_STEPS];
};

/* From who loads the rest, until one end of the socket is closed. */
#define REST_MAGIC 0x5352544cu /* "LTRS" */
struct rest_report {
	uint32_t magic, state; /* enum rest_state */
	uint64_t begun_us, pages_all, pages_now;
};

/* Guest RAM comes from another host; the VMM waits (-incoming defer, -S), and a mover does everything. */
struct agent_incoming {
	uint32_t active;
	int32_t channel_fd; /* the agent's end: vmdir/incoming.h */
	uint32_t volumes;
	int32_t volume_fd[AGENT_RESTORE_VOLUMES]; /* read-only; -1: not there */
};

struct agent_config {
	uint32_t magic, version;
	/* Descriptors that the VMM inherits; the agent makes all of them close-on-exec. */
	int32_t ram_fd;   /* the memfd behind guest RAM */
	int32_t lock_fd;  /* open on `lock` in the run directory, locked: the VM lives while it is open */
	int32_t qmp_fd;   /* the agent's end of its own QMP connection (a socketpair), or -1 */
	int32_t qmp_vmm_fd; /* the VMM's end of it, which the VMM keeps open under this number */
	int32_t monitor_fd; /* the configuration file of the monitors */
	int32_t stats_fd; /* `stats`, read-write, sizeof(struct vm_stats) long */
	double share_threshold;  /* 0..1: map when the likelihood of sharing is at least this */
	uint32_t min_run_pages;  /* shortest run to map; 0: by the cost model */
	uint32_t budget_maps;    /* mappings that the whole process may have; 0: half of the limit */
	uint32_t trust_images;   /* map images that nothing protects */
	uint32_t overlays_allowed;
	uint64_t scan_period_us; /* 0: not until it is asked for */
	struct agent_restore restore;
	struct agent_incoming incoming;
	char excluded_by[160];   /* with overlays_allowed == 0: the sentence that says why */
	char block_name[64];     /* stock QEMU's name of the RAM block: "pc.ram" */
	char name[64];
	char run_dir[256];       /* the VM's directory, absolute */
	char volumes_dir[256];   /* where the tracking structures of this user's VMs are, absolute */
};

#endif
