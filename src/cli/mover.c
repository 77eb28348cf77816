/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/mover.h"

#include "cli/cli.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const struct cli_command cli_migrate = {
	.name = "migrate",
	.summary = "Move a running virtual machine to another host",
	.run = mover_run,
};

const struct cli_command cli_receive = {
	.name = "receive",
	.summary = "Wait for a virtual machine that another host moves here",
	.run = mover_run,
};

/* Beside this program, else where it was installed. */
static const char *find_program(char path[PATH_MAX])
{
	ssize_t n = readlink("/proc/self/exe", path, PATH_MAX - sizeof MOVER_PROGRAM);
	char *slash;

	path[n > 0 ? n : 0] = '\0';
	slash = strrchr(path, '/');
	if (slash)
		memcpy(slash + 1, MOVER_PROGRAM, sizeof MOVER_PROGRAM);
	return slash && !access(path, X_OK) ? path : LATENT_MOVER_PATH;
}

int mover_run(const struct cli_command *command, int argc, char **argv)
{
	char **words = calloc((size_t)argc + 2, sizeof *words), path[PATH_MAX];
	const char *program = find_program(path);

	if (!words)
		return cli_fail(CLI_SYSTEM, "no memory");
	words[0] = (char *)(uintptr_t)MOVER_PROGRAM;
	words[1] = (char *)(uintptr_t)command->name;
	for (int i = 1; i < argc; i++)
		words[1 + i] = argv[i];
	execv(program, words);
	free(words);
	return cli_fail(CLI_SYSTEM, "%s cannot be run: %s", program, strerror(errno));
}
