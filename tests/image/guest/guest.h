/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent-guest: what the tests run inside a guest. One static program:
 * the guest's init, its command server, and the memory and file workloads. */
#ifndef LATENT_GUEST_H
#define LATENT_GUEST_H

#include <stddef.h>
#include <stdint.h>

#define PAGE_BYTES 4096u

/* Each sub-command takes its own arguments (argv[0] is its name) and returns
 * an exit status: 0 right, 1 wrong contents or failure, 2 wrong usage. */
int cmd_init(int argc, char **argv);
int cmd_poweroff(int argc, char **argv);
int cmd_serve(int argc, char **argv);
int cmd_hash(int argc, char **argv);
int cmd_mem(int argc, char **argv);
int cmd_ticks(int argc, char **argv);
int cmd_beat(int argc, char **argv);

/* A number from the command line, decimal or 0x; -EINVAL on anything else. */
int parse_u64(const char *text, uint64_t *ret_value);

uint64_t now_ns(void);

/* A well-mixed 64-bit value of x (the finalizer of splitmix64). */
static inline uint64_t mix64(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

#endif
