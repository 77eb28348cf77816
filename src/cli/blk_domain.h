/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* A block domain of a machine's own, for `latent run --blk-domain`. */
#ifndef LATENT_CLI_BLK_DOMAIN_H
#define LATENT_CLI_BLK_DOMAIN_H

#define BLK_DOMAIN_SOCKET "blk.sock" /* in the machine's run directory */

/*
 * Starts latent-blkd, which serves `image` at `socket` from then on, and ends with the last process that has
 * `*ret_owner` open: the VMM inherits it. An exit status, after the sentence was printed.
 */
int blk_domain_start(const char *image, const char *socket, int *ret_owner);

#endif
