/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The source's side of a migration: see "Migration" in ARCHITECTURE.md. Until the token is sent, every failure leaves
 * the VM running as it did; after it, the VM never runs here again, unless the destination says that it did not start, or
 * the ballot does (ballot.h). A link that is cut after it is made again.
 */
#ifndef LATENT_MIGRATE_SEND_H
#define LATENT_MIGRATE_SEND_H

#include "migrate/teller.h"

#include <stdatomic.h>

struct send_options {
	const char *run_dir, *name, *cwd; /* of the VM, as of save_options */
	const char *address;              /* of the destination: link.h */
	const char *keys_dir;             /* TLS; NULL: none */
	const char *host;                 /* whom the destination's certificate names; NULL: the address's */
	unsigned max_downtime_ms;         /* what may be sent while the guest stands */
	uint64_t max_bytes_s;             /* 0: as fast as it goes */
	bool no_postcopy;                 /* all is sent before the switch */
	const char *known_dir;            /* digest.h */
	bool again;                       /* the VM was given away, and who sent its pages has died */
};

enum send_phase { SEND_PREPARING, SEND_CONNECTING, SEND_PASSES, SEND_SWITCHING, SEND_REST, SEND_DONE };

/* Looked at from another thread; `stop` is obeyed until the switch begins, and when the link is cut. */
struct send_progress {
	_Atomic bool stop;
	_Atomic int phase; /* enum send_phase */
	_Atomic bool cut;  /* the destination is looked for again */
	_Atomic uint64_t pass, pages_left, pages_all, bytes_sent, words, volume, same, disks, data, wanted;
};

struct send_result {
	uint64_t passes, bytes_sent, total_us;
	uint64_t downtime_us;   /* from the guest's stop here until the destination said that it runs; 0: not known */
	uint64_t pages_missing; /* at the switch */
	uint64_t pages_wanted;  /* of those, asked for by the destination */
	uint64_t settled_pages, state_bytes;
	uint64_t phase_us[SEND_DONE];  /* how long each enum send_phase took */
	/* Of the downtime: until the devices were saved, until guest RAM was looked at, until all was told, until the
	 * destination had loaded it, until it ran. */
	uint64_t saved_us, point_us, told_us, loaded_us, started_us;
	struct teller_counts told;
};

enum send_end {
	SEND_HERE,    /* the VM runs here, as before */
	SEND_THERE,   /* it runs there; here is nothing left */
	SEND_UNKNOWN, /* it has been given away, and not all of it has been taken: here it stands, and goes on by `again` */
};

/* 0, or a negative errno with a sentence in `why`; -EINTR: progress->stop. `*ret_end` in any case. */
int migrate_send(const struct send_options *options, struct send_progress *progress, struct send_result *ret_result,
		 enum send_end *ret_end, char why[SNAPSHOT_WHY_BYTES]);

#endif
