/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What a long command shows meanwhile, and how it is ended: a line on a terminal's standard error, and Ctrl-C. One at a
 * time. */
#ifndef LATENT_CLI_PROGRESS_H
#define LATENT_CLI_PROGRESS_H

#include "snapshot/store.h"

/* From here on SIGINT and SIGTERM set `*stop`, and who writes to a pipe without a reader gets an error. */
void progress_take_signals(_Atomic bool *stop);
/* Five times a second until progress_end, by a thread: `show` prints the line, if there is a terminal; `tell` does what is
 * done in any case. NULL: nothing. */
void progress_begin(void (*show)(void *ctx), void (*tell)(void *ctx), void *ctx);
/* The thread has ended when it returns. */
void progress_end(void);

/* Both at once, of what is written into a snapshot. */
void progress_begin_writing(struct source_progress *progress);

/* Faults that a test wants (LATENT_FAULT); an exit status. */
int progress_take_faults(void);

#endif
