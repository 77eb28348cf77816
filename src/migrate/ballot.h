/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Who runs the guest when the two sides of a migration cannot talk: a file beside a disk, on the storage that both use.
 * The source makes it; the side that renames it first has the guest, and the other one can see that. So it also shows
 * that both sides mean the same storage.
 *
 * No state; any thread. Errors are negative errno values.
 */
#ifndef LATENT_MIGRATE_BALLOT_H
#define LATENT_MIGRATE_BALLOT_H

#include "migrate/wire.h"
#include "snapshot/manifest.h"

#define BALLOT_PATH_BYTES (MANIFEST_PATH_BYTES + 64)

enum ballot_side { BALLOT_SOURCE, BALLOT_DESTINATION };

struct ballot {
	char path[BALLOT_PATH_BYTES]; /* empty: there is none, and nobody but a user can decide */
};

/* Beside this disk. -ENAMETOOLONG. */
int ballot_name(const char *disk, const uint8_t session[WIRE_SESSION_BYTES], struct ballot *ret_ballot);
int ballot_make(const struct ballot *ballot);
bool ballot_is_there(const struct ballot *ballot);
/* 0: the guest is this side's, for good. -EALREADY: it is the other side's. -ENOENT: there is no ballot any more: all
 * was over. Others: the storage cannot be reached, and nothing is decided by this call. */
int ballot_take(const struct ballot *ballot, enum ballot_side side);
/* The destination has taken it, and never let the guest run: the source may take it. */
void ballot_return(const struct ballot *ballot);
/* The destination has taken it, and has all pages by now: the source need not wait for a word. */
void ballot_note_over(const struct ballot *ballot);
bool ballot_is_over(const struct ballot *ballot);
/* When all is over. */
void ballot_remove(const struct ballot *ballot);

#endif
