/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What there is to know of a terminal before anything is written to it. */
#ifndef LATENT_CLI_TERMINAL_H
#define LATENT_CLI_TERMINAL_H

#include <stdbool.h>

/* It is one, it can show 256 colours, and nobody objects (NO_COLOR). */
bool terminal_has_256_colours(int fd);
/* 0: it is none, or does not say. */
unsigned terminal_columns(int fd);

#endif
