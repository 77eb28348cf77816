/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What a lane gives up before it serves anybody. */
#ifndef LATENT_BLKD_CONFINE_H
#define LATENT_BLKD_CONFINE_H

struct io_uring;

/*
 * No capabilities and none to come, no new privileges; namespaces of its own for users, mounts, network
 * and IPC, with nothing in its file system, where the kernel allows that; only the system calls that a lane
 * makes; of the io_uring, which is enabled with that, only the operations that a lane submits. One thread.
 * Negative errno when a step fails that every kernel can do.
 */
int confine(struct io_uring *ring);

#endif
