/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What the commands have in common. A command is one function in a file of its own; main.c has the
 * table. Results go to stdout, everything else to stderr.
 */
#ifndef LATENT_CLI_CLI_H
#define LATENT_CLI_CLI_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Exit statuses of Latent itself; latent(1) lists them. `latent run` becomes the VMM, whose own
 * statuses these do not collide with. */
enum cli_status {
	CLI_OK = 0,
	CLI_LACKING = 1,      /* doctor: something that Latent needs is missing */
	CLI_USAGE = 64,       /* an unknown option, a missing argument */
	CLI_REFUSED = 65,     /* a command line of QEMU's that Latent cannot serve */
	CLI_NO_IMAGE = 66,    /* an image that is missing or cannot be read */
	CLI_NO_VM = 67,       /* no VM of this name */
	CLI_NO_AGENT = 69,    /* the VMM does not load the agent, or is no QEMU */
	CLI_SYSTEM = 71,      /* the system refused something: memory, descriptors */
	CLI_RUN_DIR = 73,     /* the run directory cannot be used */
	CLI_NAME_IN_USE = 74, /* a live VM has this name */
	CLI_NO_ANSWER = 75,   /* the VM's agent does not answer, or could not do it */
	CLI_NOT_EXECUTABLE = 126,
	CLI_NOT_FOUND = 127,
};

struct cli_command {
	const char *name;
	const char *arguments;            /* "[OPTIONS] NAME" */
	const char *summary;              /* one line */
	const char *details;              /* NULL or what --help says below */
	const struct cli_option *options; /* ends with a NULL name */
	int (*run)(const struct cli_command *command, int argc, char **argv);
};

extern const struct cli_command cli_run, cli_ps, cli_stat, cli_detach, cli_doctor, cli_save, cli_restore, cli_info,
	cli_verify, cli_flatten, cli_spare, cli_stop_rest, cli_scan, cli_heat, cli_top, cli_reclaim, cli_migrate,
	cli_receive, cli_blkd;

/* ---- options -------------------------------------------------------------------------------- */

enum cli_argument { CLI_FLAG, CLI_VALUE, CLI_NUMBER_IF_ANY };

struct cli_option {
	const char *name; /* without the dashes */
	enum cli_argument argument;
	const char *value; /* what --help calls the argument */
	const char *help;
};

/* Goes through argv[1..] once. Options stop at "--" or, with `stop_at_operand`, at the first word
 * that is not one; other words are collected in argv[1..operands]. */
struct cli_parser {
	const struct cli_command *command;
	char **argv;
	int argc, next, operands;
	bool stop_at_operand;
	const char *value; /* of the option just returned, or NULL */
};

#define CLI_END (-1)   /* no more options */
#define CLI_DONE (-2)  /* --help was printed: exit with CLI_OK */
#define CLI_WRONG (-3) /* the sentence was printed: exit with CLI_USAGE */

/* The index of the next option in the command's table, or one of the above. */
int cli_next_option(struct cli_parser *parser);

/* The exit status for what ended the options other than CLI_END. */
int cli_end_status(int ended);

void cli_print_help(const struct cli_command *command);

/* Whole text, within limits; false otherwise. */
bool cli_parse_unsigned(const char *text, uint64_t max, uint64_t *ret_value);
bool cli_parse_real(const char *text, double min, double max, double *ret_value);

/* "10s", "500ms", "2m", "1h"; seconds if there is no unit. */
bool cli_parse_time(const char *text, uint64_t *ret_us);
/* "512M", "1.5G"; bytes if there is no unit. */
bool cli_parse_size(const char *text, uint64_t *ret_bytes);
/* scan.c: a scan period. Prints the sentence and returns an exit status if it is none. */
int cli_parse_period(const char *command, const char *option, const char *text, uint64_t *ret_us);

/* The same, or "off": 0. False, and nothing printed, if it is neither. */
bool cli_parse_period_or_off(const char *text, uint64_t *ret_us);
/* scan.c: has the VM looked at once in this time; 0: no more. 0, or a negative errno with the sentence
 * in `why`. */
struct vm_view;
int cli_ask_scan(const struct vm_view *view, uint64_t period_us, unsigned timeout_ms, char *why,
		 size_t why_bytes);

/* ---- messages -------------------------------------------------------------------------------- */

/* "latent: SENTENCE" to stderr. Returns `status`. */
int cli_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* "latent: SENTENCE" to stderr, and nothing fails. */
void cli_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Text that others have written: control characters, and bytes that are no UTF-8, become '?'. */
void cli_make_plain(char *text);

/* "512 B", "1.5 GiB" */
#define CLI_SIZE_TEXT 16
const char *cli_size(uint64_t bytes, char text[CLI_SIZE_TEXT]);

/* The time since then: "42 s", "3 min", "5.5 h", "12 d" */
const char *cli_age(uint64_t since_unix_s, char text[CLI_SIZE_TEXT]);

/* Where the agent is: $LATENT_AGENT, else beside this program, else where it was installed. */
int cli_agent_path(char *ret_path, size_t bytes);

/* A program of Latent's own: beside this one, else where it was installed. An exit status, after the sentence was
 * printed. */
int cli_find_program(const char *name, const char *installed, char ret_path[PATH_MAX]);

#endif
