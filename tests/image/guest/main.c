/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "guest.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const struct {
	const char *name;
	int (*run)(int argc, char **argv);
	const char *usage;
} commands[] = {
	{ "init", cmd_init, "init                         (as process 1 of the root file system)" },
	{ "serve", cmd_serve, "serve [DEVICE]               answer commands from the host" },
	{ "poweroff", cmd_poweroff,
	  "poweroff                     write everything out, then power off" },
	{ "hash", cmd_hash, "hash FILE... | hash -r DIR... fast 64-bit hashes of files" },
	{ "mem", cmd_mem, "mem hold NAME MIB SEED [KIND] | mem OPERATION NAME ...  (mem.c)" },
	{ "ticks", cmd_ticks, "ticks SECONDS PERIOD_MS      sleep in periods, report the worst gap" },
	{ "beat", cmd_beat, "beat SECONDS PERIOD_MS       print a line per period" },
};

#define N_COMMANDS (sizeof(commands) / sizeof(commands[0]))

int parse_u64(const char *text, uint64_t *ret_value)
{
	char *end = NULL;

	errno = 0;
	unsigned long long value = strtoull(text, &end, 0);
	if (errno != 0 || end == text || *end != '\0' || *text == '-')
		return -EINVAL;
	*ret_value = value;
	return 0;
}

uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int usage(void)
{
	fprintf(stderr, "usage:\n");
	for (size_t i = 0; i < N_COMMANDS; i++)
		fprintf(stderr, "  latent-guest %s\n", commands[i].usage);
	return 2;
}

int main(int argc, char **argv)
{
	const char *name = argc > 1 ? argv[1] : "";

	for (size_t i = 0; i < N_COMMANDS; i++)
		if (strcmp(name, commands[i].name) == 0)
			return commands[i].run(argc - 1, argv + 1);
	return usage();
}
