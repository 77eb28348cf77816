/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The process beside restored VMs that loads the rest of their snapshot: with the lowest priority there
 * is for processor and storage. Each VM's agent has the other end of a socket, and is told how far it
 * is; the process ends when all is loaded, or nobody is there any more. Its own end is no harm to
 * anybody.
 */
#ifndef LATENT_CLI_REST_H
#define LATENT_CLI_REST_H

#include <stdint.h>

#define REST_VMS 256u

/* This process becomes it. Closes all that it has inherited, but for the sockets. */
_Noreturn void rest_become(const char *dir, const int *sockets, unsigned count, uint64_t begun_us);
/* Another process, of no relation to this one, becomes it. Prints a sentence on failure; no harm is
 * done. */
void rest_start(const char *dir, const int *sockets, unsigned count, uint64_t begun_us);

#endif
