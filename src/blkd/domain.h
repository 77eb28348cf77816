/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The domain: accepts front ends, hands each to a lane, and replaces lanes that die. */
#ifndef LATENT_BLKD_DOMAIN_H
#define LATENT_BLKD_DOMAIN_H

#include "blkd/image.h"

#define DOMAIN_LANES_MAX 64u

/* Called when front ends are served from now on. */
typedef void (*domain_ready_fn)(void *ctx);

/*
 * Serves until a signal (SIGTERM, SIGINT, SIGHUP) comes, or the other end of `owner` (-1: there is none) is
 * closed. Lanes are children, the n-th on the n-th CPU that this process may use. A writable image has one
 * front end at a time; another one waits some seconds, for it may be the same one that comes back. `ready`
 * may be NULL. 0; -ECHILD: a lane cannot begin, and has said why on stderr; another negative errno.
 */
int domain_serve(int listener, int owner, const struct image *image, unsigned lanes,
		 domain_ready_fn ready, void *ctx);

#endif
