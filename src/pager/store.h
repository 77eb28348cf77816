/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Where a snapshot is: a directory, or a directory of an HTTP(S) or S3-compatible store. Objects are the snapshot's
 * files, called by their names; they do not change. Errors are negative errno values, and store_trouble has the
 * sentence: -ENOENT, -EACCES, -ESTALE (the object is another one than before), -EPROTO (no answer that can
 * be used), -ETIMEDOUT, -EIO. One thread.
 */
#ifndef LATENT_PAGER_STORE_H
#define LATENT_PAGER_STORE_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define STORE_WHY_BYTES 256
#define STORE_POLLED 520u

struct store;

/* http://HOST/PATH, https://HOST/PATH, s3://BUCKET/PREFIX or a directory. Contacts nobody. */
int store_open(const char *source, struct store **ret_store, char why[STORE_WHY_BYTES]);
void store_close(struct store *store); /* NULL is allowed; reads that are under way are dropped, and not told */
bool store_is_far(const struct store *store); /* an answer takes its time */

/* All of an object of at most `max_bytes`, in a new descriptor. Waits, with a limit. */
int store_get(struct store *store, const char *object, uint64_t max_bytes, int *ret_fd);

/* A part of an object. */
struct store_read {
	const char *object;
	uint64_t offset;
	size_t bytes;
	uint8_t *to;
	void (*done)(struct store_read *read, int r); /* all of it is there, or a negative errno */
	/* the store's own */
	struct store_read *next;
	struct store *store;
	void *easy, *headers;
	size_t got;
	int error;
	char etag[128];
	uint64_t range_from, range_total;
};

/* `done` is called by store_wait, never from here. */
int store_start(struct store *store, struct store_read *read);
/* Waits for reads, for `polled` descriptors (at most STORE_POLLED), or for so long; calls `done` of what has ended. */
void store_wait(struct store *store, struct pollfd *polled, unsigned count, int timeout_ms);

/* What went wrong at last, or "". */
const char *store_trouble(const struct store *store);
/* What went wrong was nothing that is needed. */
void store_forgive(struct store *store);
/* For how long it has been asked and has said nothing, in ms; 0: nothing is asked, or it answers. */
uint64_t store_silent_ms(const struct store *store);

#endif
