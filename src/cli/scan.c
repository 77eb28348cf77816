/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent scan: how often the agent of a VM looks at what the guest uses. The agent does it; here it is
 * asked. */
#include "activity/states.h"
#include "cli/cli.h"
#include "cli/vm_view.h"

#include <stdio.h>
#include <string.h>

#define ANSWER_TIMEOUT_MS 10000

enum { OPT_PERIOD };

static const struct cli_option options[] = {
	[OPT_PERIOD] = { "period", CLI_VALUE, "TIME",
			 "look at each page once in this time: 10s, 500ms, 2m" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_scan = {
	.name = "scan",
	.arguments = "NAME --period TIME | NAME off",
	.summary = "Look at which memory a virtual machine uses, once in a time, or no more",
	.details = "`latent stat` shows what is found.",
	.options = options,
	.run = run,
};

static int ask(const struct vm_view *view, uint64_t period_us);

static bool parse_period(const char *text, uint64_t *ret_us)
{
	uint64_t us;

	if (!cli_parse_time(text, &us) || us < SCAN_PERIOD_MIN_US || us > SCAN_PERIOD_MAX_US)
		return false;
	*ret_us = us;
	return true;
}

int cli_parse_period(const char *command, const char *option, const char *text, uint64_t *ret_us)
{
	if (!parse_period(text, ret_us))
		return cli_fail(CLI_USAGE,
				"%s: --%s takes a time from 100ms to 1h (10s, 500ms, 2m), not '%.80s'",
				command, option, text);
	return CLI_OK;
}

bool cli_parse_period_or_off(const char *text, uint64_t *ret_us)
{
	if (strcmp(text, "off"))
		return parse_period(text, ret_us);
	*ret_us = 0;
	return true;
}

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	uint64_t period_us = 0;
	struct vm_view view;
	int option, status;

	while ((option = cli_next_option(&parser)) >= 0) {
		status = cli_parse_period("scan", "period", parser.value, &period_us);
		if (status)
			return status;
	}
	if (option != CLI_END)
		return cli_end_status(option);
	if (parser.operands != (period_us ? 1 : 2) || (!period_us && strcmp(argv[2], "off")))
		return cli_fail(CLI_USAGE, "scan: give a VM's name, and either --period TIME or off "
					   "(see latent scan --help)");
	status = vm_view_find(argv[1], &view);
	if (status)
		return status;
	status = ask(&view, period_us);
	vm_view_close(&view);
	return status;
}

static int ask(const struct vm_view *view, uint64_t period_us)
{
	char why[VMDIR_WHY_BYTES + VMDIR_NAME_BYTES];

	return cli_ask_scan(view, period_us, ANSWER_TIMEOUT_MS, why, sizeof why)
		       ? cli_fail(CLI_NO_ANSWER, "%s", why)
		       : CLI_OK;
}

int cli_ask_scan(const struct vm_view *view, uint64_t period_us, unsigned timeout_ms, char *why,
		 size_t why_bytes)
{
	struct control_reply reply;
	char text[24];
	int r;

	snprintf(text, sizeof text, "%ju", (uintmax_t)period_us);
	r = vm_view_ask(view, CONTROL_SCAN, text, timeout_ms, &reply);
	if (r)
		snprintf(why, why_bytes, "%s: the agent does not answer: %s", view->name, strerror(-r));
	else if (reply.error)
		snprintf(why, why_bytes, "%s: %s", view->name,
			 reply.text[0] ? reply.text : strerror(-reply.error));
	return r ? r : reply.error;
}
