/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent top: all VMs of the user, what their memory is and what they use of it, again and again. */
#include "cli/cli.h"
#include "cli/top_list.h"

#include <limits.h>
#include <stdio.h>
#include <time.h>

#define DELAY_S 2.0

enum { OPT_BATCH, OPT_ROUNDS, OPT_DELAY };

static const struct cli_option options[] = {
	[OPT_BATCH] = { "b", CLI_FLAG, NULL, "print lines, for a file or a pipe" },
	[OPT_ROUNDS] = { "n", CLI_VALUE, "N", "end after so many rounds" },
	[OPT_DELAY] = { "d", CLI_VALUE, "SECONDS", "from round to round; 2 if it is not given" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_top = {
	.name = "top",
	.arguments = "[-b] [-n N] [-d SECONDS]",
	.summary = "Watch the virtual machines and the memory that they use",
	.details = "Keys: q ends it, h tells the others.",
	.options = options,
	.run = run,
};

struct request {
	bool batch;
	uint64_t rounds; /* 0: without end */
	double delay_s;
};

static int parse(struct cli_parser *parser, struct request *request);
static int print(struct top_list *list, const struct request *request);

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	struct request request = { .delay_s = DELAY_S };
	struct top_list list = { .order = TOP_BY_CPU };
	int status = parse(&parser, &request);

	if (status != CLI_END)
		return status;
	status = request.batch ? print(&list, &request)
			       : top_screen(&list, request.delay_s, request.rounds);
	top_list_free(&list);
	return status;
}

/* CLI_END: go on. */
static int parse(struct cli_parser *parser, struct request *request)
{
	int option;

	while ((option = cli_next_option(parser)) >= 0) {
		if (option == OPT_BATCH)
			request->batch = true;
		if (option == OPT_ROUNDS &&
		    (!cli_parse_unsigned(parser->value, UINT_MAX, &request->rounds) || !request->rounds))
			return cli_fail(CLI_USAGE, "top: -n takes a number from 1 on, not '%.80s'",
					parser->value);
		if (option == OPT_DELAY &&
		    !cli_parse_real(parser->value, TOP_DELAY_MIN_S, TOP_DELAY_MAX_S, &request->delay_s))
			return cli_fail(CLI_USAGE, "top: -d takes seconds from 0.1 to 3600, not '%.80s'",
					parser->value);
	}
	if (option != CLI_END)
		return cli_end_status(option);
	if (parser->operands)
		return cli_fail(CLI_USAGE, "top: '%.80s' is too much (see latent top --help)",
				parser->argv[1]);
	return CLI_END;
}

static void print_round(const struct top_list *list)
{
	struct top_layout layout = top_lay_out(list, UINT_MAX);
	char text[TOP_LINE_BYTES];

	top_summary(list, text);
	puts(text);
	top_line(&layout, NULL, text);
	puts(text);
	for (size_t i = 0; i < list->count; i++) {
		top_line(&layout, &list->vm[i], text);
		puts(text);
	}
}

static int print(struct top_list *list, const struct request *request)
{
	struct timespec pause = {
		.tv_sec = (time_t)request->delay_s,
		.tv_nsec = (long)((request->delay_s - (double)(time_t)request->delay_s) * 1e9),
	};
	char why[VMDIR_WHY_BYTES];

	for (uint64_t round = 0; !request->rounds || round < request->rounds; round++) {
		if (round) {
			putchar('\n');
			nanosleep(&pause, NULL);
		}
		if (top_list_update(list, why))
			return cli_fail(CLI_RUN_DIR, "%s", why);
		print_round(list);
		if (fflush(stdout))
			break; /* main says so */
	}
	return CLI_OK;
}
