/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent stop-rest: what a restored VM has not touched is loaded no more. The agent is asked. */
#include "cli/cli.h"
#include "cli/vm_view.h"


#define ANSWER_TIMEOUT_MS 20000

static const struct cli_option options[] = { { NULL, CLI_FLAG, NULL, NULL } };

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_stop_rest = {
	.name = "stop-rest",
	.arguments = "NAME",
	.summary = "Load no more of a restored virtual machine's RAM than it touches",
	.options = options,
	.run = run,
};

static int stop(const struct vm_view *view)
{
	struct control_reply reply;
	int r = vm_view_ask(view, CONTROL_STOP_REST, NULL, ANSWER_TIMEOUT_MS, &reply);

	return vm_view_status(view, r, &reply);
}

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	int option = cli_next_option(&parser), status;
	struct vm_view view;

	if (option != CLI_END)
		return cli_end_status(option);
	if (parser.operands != 1)
		return cli_fail(CLI_USAGE,
				"stop-rest: give the name of one VM (see latent stop-rest --help)");
	status = vm_view_find(argv[1], &view);
	if (status)
		return status;
	status = stop(&view);
	vm_view_close(&view);
	return status;
}
