/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What a mover must know that comes after one that has died: the file `migration` in the VM's run directory.
 */
#ifndef LATENT_MIGRATE_RECORD_H
#define LATENT_MIGRATE_RECORD_H

#include "migrate/ballot.h"

enum record_phase {
	RECORD_BEGUN,     /* source: there is a ballot, */
	RECORD_GIVEN,     /* and the token may have been sent */
	RECORD_TOKEN,     /* destination: the token has come, */
	RECORD_COMMITTED, /* and the guest is its own */
	RECORD_RUNNING,   /* destination: it has been let run */
	RECORD_PHASES
};

struct record {
	uint64_t magic;
	uint32_t phase; /* enum record_phase */
	uint32_t stood; /* the guest did not run when all began: it is never let run */
	uint8_t session[WIRE_SESSION_BYTES];
	struct ballot ballot;
};

/* Negative errno; `why` says it in a sentence. */
int record_write(const char *run_dir, const struct record *record, char why[SNAPSHOT_WHY_BYTES]);
/* -ENOENT: there is none. */
int record_read(const char *run_dir, struct record *ret_record, char why[SNAPSHOT_WHY_BYTES]);
void record_remove(const char *run_dir);

#endif
