/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent blkd: becomes latent-blkd, which serves an image to virtual machines of any VMM with vhost-user. */
#include "cli/cli.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PROGRAM "latent-blkd"
#define LANES_MAX 64 /* blkd/domain.h */

enum { OPT_SOCKET, OPT_IMAGE, OPT_FORMAT, OPT_READONLY, OPT_LANES };

static const struct cli_option options[] = {
	[OPT_SOCKET] = { "socket", CLI_VALUE, "PATH", "where front ends connect" },
	[OPT_IMAGE] = { "image", CLI_VALUE, "FILE", "a raw image or a block device" },
	[OPT_FORMAT] = { "format", CLI_VALUE, "FORMAT",
			 "raw, also where the image looks like something else" },
	[OPT_READONLY] = { "readonly", CLI_FLAG, NULL,
			   "nobody may write; any number of machines may read" },
	[OPT_LANES] = { "lanes", CLI_VALUE, "N",
			"processes that serve, each on a CPU of its own (default: 1)" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_blkd = {
	.name = "blkd",
	.arguments = "--socket PATH --image FILE [OPTIONS]",
	.summary = "Serve a disk image to virtual machines (vhost-user-blk)",
	.details = "Maps of a machine's memory only its rings, and what requests in flight touch.",
	.options = options,
	.run = run,
};

struct serving {
	const char *socket, *image, *format;
	bool readonly;
	uint64_t lanes;
};

static int parse_option(struct serving *s, int option, const char *value)
{
	switch (option) {
	case OPT_SOCKET:
		s->socket = value;
		return CLI_OK;
	case OPT_IMAGE:
		s->image = value;
		return CLI_OK;
	case OPT_FORMAT:
		s->format = value;
		if (strcmp(value, "raw") && strcmp(value, "qcow2"))
			return cli_fail(CLI_USAGE, "blkd: --format takes raw, not '%.80s'", value);
		return CLI_OK;
	case OPT_LANES:
		if (!cli_parse_unsigned(value, LANES_MAX, &s->lanes) || !s->lanes)
			return cli_fail(CLI_USAGE,
					"blkd: --lanes takes a number from 1 to %d, not '%.80s'",
					LANES_MAX, value);
		return CLI_OK;
	default:
		s->readonly = true;
		return CLI_OK;
	}
}

static int become_server(const struct serving *s)
{
	char path[PATH_MAX], lanes[8];
	int status = cli_find_program(PROGRAM, LATENT_BLKD_PATH, path);

	if (status)
		return status;
	snprintf(lanes, sizeof lanes, "%u", (unsigned)s->lanes);
	execl(path, PROGRAM, s->socket, s->image, s->format, s->readonly ? "ro" : "rw", lanes, NULL);
	return cli_fail(CLI_SYSTEM, "%s cannot be run: %s", path, strerror(errno));
}

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	struct serving s = { .format = "auto", .lanes = 1 };
	int option, status;

	while ((option = cli_next_option(&parser)) >= 0) {
		status = parse_option(&s, option, parser.value);
		if (status)
			return status;
	}
	if (option != CLI_END)
		return cli_end_status(option);
	if (!s.socket || !s.image || parser.operands)
		return cli_fail(
			CLI_USAGE,
			"blkd: give --socket and --image, and no other words (see latent blkd --help)");
	return become_server(&s);
}
