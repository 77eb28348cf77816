/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The destination's side of a migration: see "Migration" in ARCHITECTURE.md. Nothing that the source says is run,
 * opened by a path of its own, or believed unchecked: the VMM's line and the volumes' files are the caller's.
 */
#ifndef LATENT_MIGRATE_RECEIVE_H
#define LATENT_MIGRATE_RECEIVE_H

#include "migrate/have.h"
#include "migrate/link.h"
#include "snapshot/manifest.h"
#include "vmdir/agent_config.h"

#include <stdatomic.h>
#include <sys/types.h>

/* The VMM that waits for the guest. */
struct receive_vm {
	pid_t pid;
	int pid_fd;          /* readable when it has ended; -1: not known */
	char run_dir[256];
};

struct receive_options {
	int listener;                 /* of link_listen */
	const struct link_keys *keys; /* NULL: none */
	const char *known_dir;        /* digest.h */
	const struct have *have;      /* NULL: no snapshot's pages are of use */
	/* Where a file of the manifest is here; may be its own path. */
	const char *(*find)(void *ctx, const char *path);
	/* Starts the VMM with this agent configuration, whose descriptors are inherited. 0, or a negative errno with a
	 * sentence. */
	int (*start)(void *ctx, const struct manifest *manifest, const struct agent_incoming *incoming,
		     struct receive_vm *ret_vm, char why[SNAPSHOT_WHY_BYTES]);
	/* It did not come to be: the VMM is to be ended, and nothing of it left. */
	void (*end)(void *ctx, struct receive_vm *vm);
	void *ctx;
};

enum receive_phase { RECEIVE_LISTENING, RECEIVE_PREPARING, RECEIVE_PASSES, RECEIVE_SWITCHING, RECEIVE_REST, RECEIVE_DONE };

/* Looked at from another thread; `stop` is obeyed until the guest runs. */
struct receive_progress {
	_Atomic bool stop;
	_Atomic int phase; /* enum receive_phase */
	_Atomic bool cut;  /* the source is waited for */
	_Atomic uint64_t pages_all, pages_missing, bytes_received, words, volume, same, disks, data, wanted;
};

struct receive_result {
	char name[64];
	pid_t pid;
	uint64_t bytes_received, total_us;
	/* Pages, each time that they were told; same: that were here; disks: that were found on a disk. */
	uint64_t words, volume, same, disks, data;
	uint64_t pages_missing;       /* at the switch */
	uint64_t pages_wanted;        /* of those, waited for by the guest */
	uint64_t load_us;             /* from the source's last word to the guest's resume */
	bool runs;
	bool kept; /* the guest was given to this host: whether it runs already or not, it goes on by migrate_receive_again */
};

/* One migration; comes back when the guest runs and has all its pages. A link that is cut after the source has given the
 * guest away is waited for; the guest runs on meanwhile, as far as it gets. 0, or a negative errno with a sentence in
 * `why`; then, if not ret_result->kept, nothing is left of it. */
int migrate_receive(const struct receive_options *options, struct receive_progress *progress,
		    struct receive_result *ret_result, char why[SNAPSHOT_WHY_BYTES]);
/* The same in the place of a mover that has died after that, for this VM, which is the caller's. `name`: what it is called.
 * `start` is not used. */
int migrate_receive_again(const struct receive_options *options, const struct receive_vm *vm, const char *name,
			  struct receive_progress *progress, struct receive_result *ret_result,
			  char why[SNAPSHOT_WHY_BYTES]);

#endif
