/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent-mover: `latent migrate` and `latent receive` become it. */
#include "cli/cli.h"
#include "cli/mover.h"

#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
	const struct cli_command *const commands[] = { &mover_migrate, &mover_receive };
	int status = CLI_USAGE;

	for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
		if (argc < 2 || strcmp(argv[1], commands[i]->name))
			continue;
		status = commands[i]->run(commands[i], argc - 1, argv + 1);
		return fflush(stdout) ? CLI_SYSTEM : status;
	}
	return cli_fail(CLI_USAGE, MOVER_PROGRAM " is for `latent migrate` and `latent receive`");
}
