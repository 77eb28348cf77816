/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A snapshot that is there, opened to be read: its manifest, its metadata, and the files that its pages are in.
 * Errors are negative errno values, with a sentence in `why`. One thread.
 */
#ifndef LATENT_SNAPSHOT_READER_H
#define LATENT_SNAPSHOT_READER_H

#include "snapshot/manifest.h"

#include <limits.h>

struct reader {
	char path[PATH_MAX]; /* absolute */
	int dir_fd;
	int ram_fd, packed_fd; /* -1: it has the other one */
	struct manifest manifest;
	struct snapshot_image image;
	struct reader_file {
		int fd;                       /* -1: not opened */
		struct snapshot_image origin; /* of another snapshot's `ram`: what that has stored where */
	} file[SNAPSHOT_VOLUMES];             /* of the manifest's volumes */
};

/* `*reader` may be closed in any case. */
int reader_open(const char *dir, struct reader *reader, char why[SNAPSHOT_WHY_BYTES]);
/* -EOPNOTSUPP: its RAM is packed, and pages cannot be read one by one. */
int reader_need_ram(const struct reader *reader, char why[SNAPSHOT_WHY_BYTES]);
/* The files that pages refer to, each of which must be what it was. */
int reader_open_files(struct reader *reader, char why[SNAPSHOT_WHY_BYTES]);
/* What the snapshots that they belong to say of them: with that, pages can be checked one by one. */
int reader_open_origins(struct reader *reader, char why[SNAPSHOT_WHY_BYTES]);
void reader_close(struct reader *reader);

/* Where the contents of a page are; false: it is a page of one word. `*ret_file`: -1 for the snapshot's own `ram`,
 * else the number of the volume. */
bool reader_locate(const struct reader *reader, uint64_t page, int *ret_file, uint64_t *ret_file_page);
int reader_fd(const struct reader *reader, int file);

/* Are these the contents that were stored for the page? (Nothing is known of pages on disk images: true.) */
bool reader_checks(const struct reader *reader, uint64_t page, const uint8_t *bytes);
/* All pages in `ram` of other snapshots. `*ret_bad`: how many differ; the first is named in `why`. */
int reader_verify_origins(const struct reader *reader, uint64_t *ret_bad, char why[SNAPSHOT_WHY_BYTES]);

/* Is the file at `path` the `ram` of a snapshot, or an image? */
enum manifest_role reader_role_of(const char *path);

#endif
