/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The one way in which library code says something: a callback of the host. */
#ifndef LATENT_OS_LOG_H
#define LATENT_OS_LOG_H

typedef void (*os_log_fn)(void *ctx, const char *text);

/* Before other threads use the library; NULL: silent, as at the start. */
void os_log_to(os_log_fn fn, void *ctx);
/* One line without its newline. */
void os_log(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
