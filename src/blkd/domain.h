/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The domain: accepts front ends, hands each to a lane, and replaces lanes that die. */
#ifndef LATENT_BLKD_DOMAIN_H
#define LATENT_BLKD_DOMAIN_H

#include "blkd/image.h"

#define DOMAIN_LANES_MAX 64u

/*
 * Serves until a signal (SIGTERM, SIGINT) comes, or the other end of `owner` (-1: there is none) is closed. Lanes are
 * children, the n-th on the n-th CPU that this process may use. A writable image has one front end at a
 * time; another one waits some seconds, for it may be the same one that comes back. 0, or a negative
 * errno when there is not one lane.
 */
int domain_serve(int listener, int owner, const struct image *image, unsigned lanes);

#endif
