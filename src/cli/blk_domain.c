/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/blk_domain.h"

#include "cli/cli.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROGRAM "latent-blkd"

extern char **environ;

int blk_domain_start(const char *image, const char *socket, int *ret_owner)
{
	char path[PATH_MAX], number[16];
	char *argv[] = { PROGRAM, (char *)socket, (char *)image, "auto", "rw", "1", number, NULL };
	int status = cli_find_program(PROGRAM, LATENT_BLKD_PATH, path), owner[2], error, waited = 0;
	pid_t pid;

	if (status)
		return status;
	if (pipe2(owner, O_CLOEXEC) || fcntl(owner[0], F_SETFD, 0))
		return cli_fail(CLI_SYSTEM, "a block domain cannot be started: %s", strerror(errno));
	snprintf(number, sizeof number, "%d", owner[0]);
	error = posix_spawn(&pid, path, NULL, NULL, argv, environ);
	close(owner[0]);
	if (!error && waitpid(pid, &waited, 0) < 0) /* it goes to the background when it serves */
		error = errno;
	if (!error && WIFEXITED(waited) && !WEXITSTATUS(waited) && !fcntl(owner[1], F_SETFD, 0)) {
		*ret_owner = owner[1];
		return CLI_OK;
	}
	close(owner[1]);
	if (error || !WIFEXITED(waited))
		return cli_fail(CLI_SYSTEM, "a block domain cannot be started: %s",
				strerror(error ? error : ECHILD));
	return WEXITSTATUS(waited); /* it has said why */
}
