/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What restores of a snapshot on this host asked for in their first second, beside its active set: the first one's agent
 * writes it (qemu/learner.c), the next ones bring it before the guest runs (qemu/restorer.c). REAP (Ustiugov et al.,
 * ASPLOS 2021) records a working set so.
 *
 *   CACHE/learned/ID   a list with contents, as in snapshot/active.h; ID names the files that guest RAM is in, in the state in which they are
 *
 * CACHE: LATENT_CACHE_DIR, or root's /var/cache/latent, or latent/ in a user's XDG_CACHE_HOME.
 */
#ifndef LATENT_CLI_LEARNED_H
#define LATENT_CLI_LEARNED_H

#include "vmdir/agent_config.h"

#include <stdbool.h>

/* Of the snapshot whose files are open, and those of its volumes; `learns`: this VM may be the first one. A help and never needed: what cannot
 * be is left out, without a word. */
void learned_open(struct agent_restore *restore, bool learns);

#endif
