/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What other commands use of `latent run`. */
#ifndef LATENT_CLI_RUN_H
#define LATENT_CLI_RUN_H

#include "vmdir/agent_config.h"

struct run_restore {
	const char *name;      /* of the VM, or NULL: */
	const char *like;      /* then this, or, if a VM has it, this and the process id */
	unsigned number;       /* of the clone or spare; 0: it is none */
	struct agent_restore agent; /* its descriptors are inherited */
	const struct agent_incoming *incoming; /* in its place: what comes from another host; or NULL */
	int argc;              /* QEMU's line, with placeholders */
	char **argv;
};

/* Becomes QEMU, which begins with what was saved. Comes back only on failure, with an exit status, after the
 * sentence was printed. */
int run_restored(const struct run_restore *restore);

/* `{name}`, `{run}` (the VM's run directory), `{clone}` and `{clone:x}` (its number, decimal or as two hexadecimal
 * digits) in a word of QEMU's line replaced; number 0: the last two stay. To be freed; NULL: no memory. */
char *run_expand(const char *word, const char *name, const char *run_dir, unsigned number);

#endif
