/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Objects over HTTP(S), by libcurl; for store.c only. */
#ifndef LATENT_PAGER_HTTP_H
#define LATENT_PAGER_HTTP_H

#include "pager/store.h"

struct http;

bool http_is_url(const char *source);
int http_open(const char *source, struct http **ret_http, char why[STORE_WHY_BYTES]);
void http_close(struct http *http); /* NULL is allowed */
int http_get(struct http *http, const char *object, uint64_t max_bytes, int *ret_fd, char why[STORE_WHY_BYTES]);
int http_start(struct http *http, struct store_read *read);
void http_wait(struct http *http, struct pollfd *polled, unsigned count, int timeout_ms);

/* store.c: a read has ended; something has come from the store. */
void store_ended(struct store *store, struct store_read *read, int r, const char *why);
void store_heard(struct store *store);

#endif
