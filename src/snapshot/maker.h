/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The directory of a snapshot while it is made: called NAME.partial-XXXXXX until everything in it is on the disk.
 * Errors are negative errno values, with a sentence in `why`. One thread.
 */
#ifndef LATENT_SNAPSHOT_MAKER_H
#define LATENT_SNAPSHOT_MAKER_H

#include "snapshot/image.h"

#include <limits.h>

struct maker {
	const char *dir;         /* the name that it shall get */
	char partial[PATH_MAX];  /* and has; empty: it is not made, or complete */
	int dir_fd;
};

/* -EEXIST: there is something of that name. `*maker` may be ended in any case. */
int maker_begin(const char *dir, struct maker *maker, char why[SNAPSHOT_WHY_BYTES]);
/* A new file in it: a descriptor, to be read and written. */
int maker_create(struct maker *maker, const char *name, char why[SNAPSHOT_WHY_BYTES]);
/* Closes it; with `r` == 0 it is on the disk then. Returns `r`, or what failed here. */
int maker_close(int fd, const char *name, int r, char why[SNAPSHOT_WHY_BYTES]);
int maker_write_pages(struct maker *maker, struct snapshot_image *image, char why[SNAPSHOT_WHY_BYTES]);
int maker_complete(struct maker *maker, char why[SNAPSHOT_WHY_BYTES]);
/* Removes what is not complete. */
void maker_end(struct maker *maker);

/* Between two steps: where tests let it fail, or be killed (LATENT_FAULT=save_step:N:…). */
int maker_step(const char *done, char why[SNAPSHOT_WHY_BYTES]);

#endif
