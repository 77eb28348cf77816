/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What the destination has been told of guest RAM, and what is to be told next. Pages are told coldest first, each as
 * the least that says what it holds: a word, a place on a volume that the destination has, or contents. A page that
 * changes after it was told is told again in the next pass.
 *
 * Functions return 0 or a negative errno, with a sentence in `why`. One thread.
 */
#ifndef LATENT_MIGRATE_TELLER_H
#define LATENT_MIGRATE_TELLER_H

#include "migrate/hint.h"
#include "snapshot/source.h"

struct teller;

struct teller_counts {
	uint64_t words, volume, same, hints, data; /* pages told so, each time that they were */
	uint64_t lacked;                           /* of `same`: the destination has not */
	uint64_t stale;                            /* of `hints`: the disk has not */
	uint64_t contents_instead;                 /* of `data`: on a volume that the destination has not */
};

/* Of a source that has begun; all pages are to be told. `there`: bit n is set if the destination has volume n of the
 * source's layout; pages of others are read from their files here. */
int teller_create(struct source *source, uint64_t there, struct teller **ret_teller, char why[SNAPSHOT_WHY_BYTES]);
void teller_destroy(struct teller *teller); /* NULL is allowed */

/* The quick digests of pages that the destination may have (WIRE_HAVE), which become the teller's. */
void teller_had(struct teller *teller, uint64_t *digests, uint64_t count);

/* Places on disks that hints may name. Without it there are no hints. */
void teller_may_hint(struct teller *teller, const struct hint_numbers *numbers);

/* A pass begins, after source_arm: what has changed is to be told again. Returns the pages that are to be told. */
uint64_t teller_collect(struct teller *teller);
/* The guest stands, after source_point: the same, with the copies in overlays. */
int teller_collect_last(struct teller *teller, struct source *source, char why[SNAPSHOT_WHY_BYTES]);

/* Fills the batch with what is next, and the lists of teller_same and teller_hints; if all are empty, all has been told
 * that can be while the guest runs. */
int teller_fill(struct teller *teller, struct wire_batch *batch, char why[SNAPSHOT_WHY_BYTES]);
/* Told since it was asked last: pages that the destination may have. Valid until the next teller_fill. */
const struct wire_same *teller_same(struct teller *teller, size_t *ret_count);
/* The same of pages that a disk may have, in the order of their places there. */
const struct wire_hint *teller_hints(struct teller *teller, size_t *ret_count);
/* But it has not: the page is to be told again, in another way. */
void teller_lack(struct teller *teller, uint64_t page);
void teller_stale(struct teller *teller, uint64_t page); /* of a hint; there is none of this page any more */
/* As teller_fill, without a look at contents: pages that may have any are told as missing, and are told by teller_fill
 * afterwards. */
int teller_fill_missing(struct teller *teller, struct wire_batch *batch, char why[SNAPSHOT_WHY_BYTES]);
/* One page of RAM, whether it was told or not. Only after teller_collect_last. */
int teller_add(struct teller *teller, uint64_t page, struct wire_batch *batch, bool *ret_full,
	       char why[SNAPSHOT_WHY_BYTES]);

/* The destination has been told all, from here or by another one, but for what teller_owe is called for; it has no volume
 * any more. Only after teller_collect_last. */
void teller_forget(struct teller *teller);
void teller_owe(struct teller *teller, uint64_t page, uint64_t pages);

/* Pages that are still to be told. */
uint64_t teller_left(const struct teller *teller);
/* Those of them that the destination has not found, and that the guest has not written since. */
uint64_t teller_lacked(const struct teller *teller);
void teller_get_counts(const struct teller *teller, struct teller_counts *ret_counts);

#endif
