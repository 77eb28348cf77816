/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Guest RAM of a VM that is migrated to this host, and its agent (vmdir/incoming.h): what the source tells is put in
 * place. Until the guest runs contents go straight to base; afterwards the agent puts them, where they are still
 * wanted.
 *
 * Functions return 0 or a negative errno, with a sentence in `why`. One thread.
 */
#ifndef LATENT_MIGRATE_GUEST_H
#define LATENT_MIGRATE_GUEST_H

#include "migrate/wire.h"

struct guest;

/* Both ends of a channel; the agent's is inherited by the VMM. A negative errno. */
int guest_pair(int *ret_ours, int *ret_agents);

struct guest_options {
	int channel;
	const struct snapshot_image *layout;  /* of the source */
	const struct wire_limits *limits;     /* volume_pages: 0 for those that are not there */
	const int32_t *volume_fd;
};

/* The VMM has mapped guest RAM, which is as large as the source's, block by block. Takes the channel, also on failure. */
int guest_open(const struct guest_options *options, struct guest **ret_guest, char why[SNAPSHOT_WHY_BYTES]);
/* The same of a guest that was received by another mover, and that perhaps runs: what is missing is what the page entries
 * say. `options->layout`: NULL. */
int guest_open_again(const struct guest_options *options, struct guest **ret_guest, char why[SNAPSHOT_WHY_BYTES]);
uint64_t guest_pages(const struct guest *guest);
void guest_close(struct guest *guest); /* NULL is allowed */

/* A run that was checked (wire_read_pages); `data`: its contents, of WIRE_DATA. */
int guest_take(struct guest *guest, const struct wire_run *run, const uint8_t *data, char why[SNAPSHOT_WHY_BYTES]);
/* A pass is over: what is on volumes is mapped, or read where it cannot be. */
int guest_finish_passes(struct guest *guest, char why[SNAPSHOT_WHY_BYTES]);
/* Pages that were told last as missing, or never, come later: the guest may run. */
int guest_expect(struct guest *guest, uint64_t *ret_missing, char why[SNAPSHOT_WHY_BYTES]);

/* The VM stays also without this mover from now on; another one may follow it. */
int guest_keep(struct guest *guest, char why[SNAPSHOT_WHY_BYTES]);

/* Readable when the agent has something to say. */
int guest_poll_fd(const struct guest *guest);
/* Missing pages that somebody waits for, and that were not given here before. */
size_t guest_wanted(struct guest *guest, uint64_t *pages, size_t most);
/* What was asked of a source that is gone: it is wanted again if somebody still waits for it. */
void guest_forget_wishes(struct guest *guest);
/* The next run of missing pages from `*page` on, which becomes its first; 0: there is none. */
uint64_t guest_missing_run(const struct guest *guest, uint64_t *page);
uint64_t guest_missing(const struct guest *guest);
/* Nothing is missing any more: guest RAM is watched no more. */
int guest_end(struct guest *guest, char why[SNAPSHOT_WHY_BYTES]);

#endif
