/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* A restored guest's own clock, by its guest agent (qemu-ga), if QEMU's line has a socket for that. */
#ifndef LATENT_CLI_GUEST_CLOCK_H
#define LATENT_CLI_GUEST_CLOCK_H

/* The socket of org.qemu.guest_agent.0, placeholders as they are; to be freed. NULL: there is none. */
char *guest_clock_socket(int argc, char **argv);

/* Tells the agent at the socket what time it is; waits seconds at most, and nobody hears of a failure. */
void guest_clock_set(const char *socket);

/* The same in a process of its own, which nobody waits for. */
void guest_clock_set_aside(const char *socket);

#endif
