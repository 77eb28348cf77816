/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/terminal.h"

#include <curses.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <term.h>
#include <unistd.h>

bool terminal_has_256_colours(int fd)
{
	const char *objection = getenv("NO_COLOR");
	int error;

	if (!isatty(fd) || (objection && *objection) || setupterm(NULL, fd, &error) != OK)
		return false;
	return tigetnum("colors") >= 256;
}

unsigned terminal_columns(int fd)
{
	struct winsize size;

	return ioctl(fd, TIOCGWINSZ, &size) ? 0 : size.ws_col;
}
