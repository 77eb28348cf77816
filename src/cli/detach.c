/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent detach: turns a VM back to plain RAM. The agent does it; here it is asked. */
#include "cli/cli.h"
#include "cli/vm_view.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ANSWER_TIMEOUT_MS 120000
#define PAGE_BYTES 4096

static const struct cli_option options[] = { { NULL, CLI_FLAG, NULL, NULL } };

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_detach = {
	.name = "detach",
	.arguments = "NAME [IMAGE]",
	.summary = "Turn the RAM of a virtual machine, or what it has of an image, into plain RAM",
	.details = "Copies what is mapped, with the guest stopped meanwhile, and maps no more.",
	.options = options,
	.run = run,
};

static int detach(const struct vm_view *view, const char *image);

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	int option = cli_next_option(&parser), status;
	char *image = NULL;
	struct vm_view view;

	if (option != CLI_END)
		return cli_end_status(option);
	if (parser.operands < 1 || parser.operands > 2)
		return cli_fail(CLI_USAGE, "detach: give a VM's name, and at most one image (see latent "
					   "detach --help)");
	status = vm_view_find(argv[1], &view);
	if (status)
		return status;
	/* The agent may have another working directory. */
	if (parser.operands == 2 && !(image = realpath(argv[2], NULL)))
		status = cli_fail(CLI_NO_IMAGE, "the image %s cannot be found: %s", argv[2],
				  strerror(errno));
	if (!status)
		status = detach(&view, image);
	free(image);
	vm_view_close(&view);
	return status;
}

static int detach(const struct vm_view *view, const char *image)
{
	struct control_reply reply;
	char size[CLI_SIZE_TEXT];
	int r = vm_view_ask(view, CONTROL_DETACH, image, ANSWER_TIMEOUT_MS, &reply);
	int status = vm_view_status(view, r, &reply);

	if (status)
		return !r && reply.error == -ENOENT ? CLI_NO_IMAGE : status;
	printf("%s: %ju pages (%s) are plain RAM now; the guest was stopped for %.1f ms\n", view->name,
	       (uintmax_t)reply.pages, cli_size(reply.pages * PAGE_BYTES, size),
	       (double)reply.paused_us / 1000);
	return CLI_OK;
}
