/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The output of another program. */
#ifndef LATENT_CLI_CAPTURE_H
#define LATENT_CLI_CAPTURE_H

#include <stddef.h>

/*
 * Runs argv (argv[0] is searched in PATH) with no input and no error output, and gives its output,
 * NUL-terminated, to be freed. `inherit_fd` (or -1) stays open in it, under its number. NULL: it
 * could not be run, did not end within `timeout_s`, wrote more than `max_bytes`, or did not exit
 * with a status of at most `max_status`.
 */
char *capture(const char *const *argv, int inherit_fd, size_t max_bytes, unsigned timeout_s,
	      int max_status);

#endif
