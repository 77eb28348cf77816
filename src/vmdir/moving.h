/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * How far a migration is: the file `moving` in the VM's run directory, on each side, which the mover writes and keeps
 * locked; `latent stat` reads it. A report, on which nothing depends. Functions return 0 or a negative errno.
 */
#ifndef LATENT_VMDIR_MOVING_H
#define LATENT_VMDIR_MOVING_H

#include <stdint.h>

#define MOVING_MAGIC 0x564d544cu /* "LTMV" */
#define MOVING_VERSION 2u

enum moving_side { MOVING_AWAY, MOVING_HERE, MOVING_SIDES };
enum moving_phase { MOVING_PREPARES, MOVING_PASSES, MOVING_SWITCHES, MOVING_REST, MOVING_PHASES };

struct moving {
	uint32_t magic, version;
	uint32_t side, phase; /* enums */
	uint32_t cut;         /* 1: the link is, and the other side is waited for */
	uint32_t pass;        /* of the source */
	uint64_t bytes;       /* sent, or received */
	/* Pages: of RAM; told as words, as places on images, as the same content, as places on disks, as contents, each time
	 * that they were; to be told, or missing; waited for by the guest. */
	uint64_t pages_all, words, volumes, same, disks, contents, left, wanted;
};

/* Returns the descriptor. -EAGAIN: another mover has it. */
int moving_begin(const char *run_dir);
void moving_say(int fd, const struct moving *moving);
/* The file goes with it. A negative descriptor is allowed. */
void moving_end(const char *run_dir, int fd);

/* -ENOENT: no mover is at work. What comes from the file is checked: sides and phases are such. */
int moving_read(const char *run_dir, struct moving *ret_moving);

#endif
