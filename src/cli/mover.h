/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* `latent migrate` and `latent receive` are a program of their own, latent-mover: what TLS brings along would slow down
 * every start of `latent`. */
#ifndef LATENT_CLI_MOVER_H
#define LATENT_CLI_MOVER_H

#define MOVER_PROGRAM "latent-mover"
#define MOVER_DIGESTS ".digests" /* in the run-time directory: migrate/digest.h */

struct cli_command;

/* mover.c, in latent: becomes the mover, with the same arguments. */
int mover_run(const struct cli_command *command, int argc, char **argv);

/* In the mover. */
int migrate_run(const struct cli_command *command, int argc, char **argv);
int receive_run(const struct cli_command *command, int argc, char **argv);
extern const struct cli_command mover_migrate, mover_receive;

#endif
