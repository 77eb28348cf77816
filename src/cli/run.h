/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What other commands use of `latent run`. */
#ifndef LATENT_CLI_RUN_H
#define LATENT_CLI_RUN_H

#include "vmdir/agent_config.h"

/* Becomes QEMU, which begins with what was saved; `name` may be NULL. Comes back only on failure, with an exit
 * status, after the sentence was printed. The descriptors of `restore` are inherited. */
int run_restored(const char *name, const struct agent_restore *restore, int argc, char **argv);

#endif
