/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Which words of a QEMU command line are the disks of a snapshot: by the id of a -drive, by the name that QEMU
 * gives to one without (ide0-hd0, virtio1), or by the node-name of a -blockdev.
 */
#ifndef LATENT_SNAPSHOT_DRIVES_H
#define LATENT_SNAPSHOT_DRIVES_H

#include "vmdir/props.h"

enum drive_role {
	DRIVE_NONE,    /* no drive at all */
	DRIVE_SAVED,   /* `disk` of the snapshot */
	DRIVE_BENEATH, /* a -blockdev that only a saved one is made of */
	DRIVE_OTHER,
};

/* For the word of the command line that is the option (or the bare name of a file). */
struct drive_word {
	enum drive_role role;
	unsigned disk;
	int words;          /* the option and its value, or the file alone */
	struct props props; /* as of a -drive, also of -hda and the like; or of a -blockdev */
};

struct drive_line {
	struct drive_word *word; /* one for each word of the line */
	int count;
};

/* `saved`: the names of the snapshot's disks. -ENOMEM. */
int drives_find(int argc, const char *const *argv, const char *const *saved, unsigned saved_count,
		struct drive_line *ret_line);
void drives_free(struct drive_line *line);

#endif
