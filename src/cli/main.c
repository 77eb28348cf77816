/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/cli.h"

#include <stdio.h>
#include <string.h>

static const struct cli_command *const commands[] = {
	&cli_run,   &cli_ps,      &cli_top,    &cli_stat,    &cli_save,    &cli_restore,
	&cli_spare, &cli_info,    &cli_verify, &cli_flatten, &cli_detach,  &cli_stop_rest,
	&cli_scan,  &cli_reclaim, &cli_heat,   &cli_migrate, &cli_receive, &cli_blkd,
	&cli_doctor,
};
#define COMMANDS (sizeof commands / sizeof commands[0])

static int help(int argc, char **argv);
static const struct cli_command *find(const char *name);
static int flush(int status);

int main(int argc, char **argv)
{
	const struct cli_command *command;
	const char *word = argc > 1 ? argv[1] : NULL;

	if (!word)
		return cli_fail(CLI_USAGE, "a command is missing (see latent help)");
	if (!strcmp(word, "help") || !strcmp(word, "--help") || !strcmp(word, "-h"))
		return flush(help(argc - 1, argv + 1));
	if (!strcmp(word, "version") || !strcmp(word, "--version")) {
		printf("latent %s\n", LATENT_VERSION_TEXT);
		return flush(CLI_OK);
	}
	command = find(word);
	if (!command)
		return cli_fail(CLI_USAGE, "'%.80s' is no command (see latent help)", word);
	return flush(command->run(command, argc - 1, argv + 1));
}

static int help(int argc, char **argv)
{
	const struct cli_command *command = argc > 1 ? find(argv[1]) : NULL;

	if (argc > 1 && !command)
		return cli_fail(CLI_USAGE, "'%.80s' is no command (see latent help)", argv[1]);
	if (command && !command->options) { /* another program's */
		char *words[] = { (char *)(uintptr_t)command->name, (char *)(uintptr_t)"--help", NULL };

		return command->run(command, 2, words);
	}
	if (command) {
		cli_print_help(command);
		return CLI_OK;
	}
	printf("usage: latent COMMAND ...\n\nLazy memory for virtual machines.\n\nCommands:\n");
	for (size_t i = 0; i < COMMANDS; i++)
		printf("  %-10s %s\n", commands[i]->name, commands[i]->summary);
	printf("  %-10s %s\n", "help", "This text, or help for a command");
	printf("  %-10s %s\n", "version", "The version of Latent");
	printf("\nEach of the others has --help and a manual page: latent-COMMAND(1).\n");
	return CLI_OK;
}

static const struct cli_command *find(const char *name)
{
	for (size_t i = 0; i < COMMANDS; i++)
		if (!strcmp(commands[i]->name, name))
			return commands[i];
	return NULL;
}

/* A result that could not be written is no result. */
static int flush(int status)
{
	if (fflush(stdout) || ferror(stdout))
		return cli_fail(CLI_SYSTEM, "the output could not be written");
	return status;
}
