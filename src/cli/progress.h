/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What a long command shows while it writes a snapshot, and how it is ended: a line on a terminal's standard
 * error, and Ctrl-C. */
#ifndef LATENT_CLI_PROGRESS_H
#define LATENT_CLI_PROGRESS_H

#include "snapshot/store.h"

/* From here on SIGINT and SIGTERM set progress->stop. One at a time. */
void progress_begin(struct source_progress *progress);
void progress_end(void);

/* Faults that a test wants (LATENT_FAULT); an exit status. */
int progress_take_faults(void);

#endif
