/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/cli.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define AGENT_FILE "latent-qemu.so"

static int wrong(const struct cli_parser *parser, const char *format, const char *word);
static int match(struct cli_parser *parser, const char *word);
static int take_value(struct cli_parser *parser, const struct cli_option *option, const char *given);
static void say(const char *format, va_list args);
static size_t plain_bytes(const char *text);

int cli_next_option(struct cli_parser *parser)
{
	parser->value = NULL;
	while (++parser->next < parser->argc) {
		char *word = parser->argv[parser->next];

		if (!strcmp(word, "--")) {
			parser->next++;
			break;
		}
		if (word[0] == '-' && word[1])
			return match(parser, word);
		if (parser->stop_at_operand)
			break;
		parser->argv[++parser->operands] = word;
	}
	while (!parser->stop_at_operand && parser->next < parser->argc)
		parser->argv[++parser->operands] = parser->argv[parser->next++];
	return CLI_END;
}

int cli_end_status(int ended) { return ended == CLI_DONE ? CLI_OK : CLI_USAGE; }

void cli_print_help(const struct cli_command *command)
{
	printf("usage: latent %s %s\n\n%s.\n", command->name, command->arguments, command->summary);
	if (command->details)
		printf("\n%s\n", command->details);
	printf("\nOptions:\n");
	for (const struct cli_option *option = command->options; option->name; option++) {
		char left[64];

		snprintf(left, sizeof left,
			 option->argument == CLI_FLAG    ? "%s%s"
			 : option->argument == CLI_VALUE ? "%s%s %s"
							 : "%s%s[=%s]",
			 option->name[1] ? "--" : "-", option->name, option->value);
		printf("  %-24s %s\n", left, option->help);
	}
	printf("  %-24s %s\n\nSee latent-%s(1).\n", "--help", "this text", command->name);
}

bool cli_parse_unsigned(const char *text, uint64_t max, uint64_t *ret_value)
{
	unsigned long long value;
	char *end;

	if (text[0] < '0' || text[0] > '9')
		return false;
	errno = 0;
	value = strtoull(text, &end, 10);
	if (errno || *end || value > max)
		return false;
	*ret_value = value;
	return true;
}

bool cli_parse_real(const char *text, double min, double max, double *ret_value)
{
	double value;
	char *end;

	errno = 0;
	value = strtod(text, &end);
	if (errno || end == text || *end || !isfinite(value) || value < min || value > max)
		return false;
	*ret_value = value;
	return true;
}

bool cli_parse_time(const char *text, uint64_t *ret_us)
{
	static const struct {
		const char *name;
		double us;
	} units[] = {
		{ "", 1e6 }, { "s", 1e6 }, { "ms", 1e3 }, { "m", 6e7 }, { "h", 3.6e9 },
	};
	char *end;
	double value = strtod(text, &end);

	if (text[0] < '0' || text[0] > '9' || !isfinite(value))
		return false;
	for (size_t i = 0; i < sizeof units / sizeof units[0]; i++)
		if (!strcmp(end, units[i].name) && value * units[i].us < 1e18) {
			*ret_us = (uint64_t)(value * units[i].us);
			return true;
		}
	return false;
}

bool cli_parse_size(const char *text, uint64_t *ret_bytes)
{
	static const char suffixes[] = "BKMGT";
	const char *suffix = suffixes;
	char *end;
	double value = strtod(text, &end);

	if (text[0] < '0' || text[0] > '9' || !isfinite(value))
		return false;
	if (*end)
		suffix = strchr(suffixes, toupper((unsigned char)*end++));
	if (!suffix || *end)
		return false;
	value *= (double)(1ull << 10 * (suffix - suffixes));
	if (value >= 1e18)
		return false;
	*ret_bytes = (uint64_t)value;
	return true;
}

int cli_fail(int status, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	say(format, args);
	va_end(args);
	return status;
}

void cli_say(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	say(format, args);
	va_end(args);
}

void cli_make_plain(char *text)
{
	while (*text) {
		size_t bytes = plain_bytes(text);

		if (bytes)
			text += bytes;
		else
			*text++ = '?';
	}
}

const char *cli_size(uint64_t bytes, char text[CLI_SIZE_TEXT])
{
	static const char *const units[] = { "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
	double value = (double)bytes / 1024;
	size_t unit = 0;

	if (bytes < 1024) {
		snprintf(text, CLI_SIZE_TEXT, "%u B", (unsigned)bytes);
		return text;
	}
	while (value >= 1000 && unit + 1 < sizeof units / sizeof units[0]) {
		value /= 1024;
		unit++;
	}
	snprintf(text, CLI_SIZE_TEXT, value < 10 && unit ? "%.1f %s" : "%.0f %s", value, units[unit]);
	return text;
}

const char *cli_age(uint64_t since_unix_s, char text[CLI_SIZE_TEXT])
{
	uint64_t now_s = (uint64_t)time(NULL);
	double age_s = now_s > since_unix_s ? (double)(now_s - since_unix_s) : 0;

	if (!since_unix_s)
		snprintf(text, CLI_SIZE_TEXT, "-");
	else if (age_s < 120)
		snprintf(text, CLI_SIZE_TEXT, "%.0f s", age_s);
	else if (age_s < 120 * 60)
		snprintf(text, CLI_SIZE_TEXT, "%.0f min", age_s / 60);
	else if (age_s < 48 * 3600)
		snprintf(text, CLI_SIZE_TEXT, "%.1f h", age_s / 3600);
	else
		snprintf(text, CLI_SIZE_TEXT, "%.0f d", age_s / 86400);
	return text;
}

int cli_agent_path(char *ret_path, size_t bytes)
{
	const char *chosen = getenv("LATENT_AGENT");
	ssize_t length;
	char *slash;

	if (chosen && *chosen)
		return snprintf(ret_path, bytes, "%s", chosen) < (int)bytes ? 0 : -ENAMETOOLONG;
	length = readlink("/proc/self/exe", ret_path, bytes);
	if (length > 0 && (size_t)length < bytes) {
		ret_path[length] = 0;
		slash = strrchr(ret_path, '/') + 1;
		if ((size_t)(slash - ret_path) + sizeof AGENT_FILE <= bytes) {
			memcpy(slash, AGENT_FILE, sizeof AGENT_FILE);
			if (!access(ret_path, R_OK))
				return 0;
		}
	}
#ifdef LATENT_AGENT_PATH
	return snprintf(ret_path, bytes, "%s", LATENT_AGENT_PATH) < (int)bytes ? 0 : -ENAMETOOLONG;
#else
	return -ENOENT;
#endif
}

static int wrong(const struct cli_parser *parser, const char *format, const char *word)
{
	const char *name = parser->command->name;
	char what[128];

	snprintf(what, sizeof what, format, word);
	cli_say("%s: %s (see latent %s --help)", name, what, name);
	return CLI_WRONG;
}

/* One or two dashes would be QEMU's habit; here it is two, and the whole name; one before a single letter. */
static int match(struct cli_parser *parser, const char *word)
{
	const struct cli_option *options = parser->command->options;
	const char *equals = strchr(word, '=');
	size_t length = equals ? (size_t)(equals - word) : strlen(word);

	if (!strcmp(word, "--help") || !strcmp(word, "-h")) {
		cli_print_help(parser->command);
		return CLI_DONE;
	}
	for (int i = 0; options[i].name; i++) {
		size_t name = strlen(options[i].name), dashes = name > 1 ? 2 : 1;

		if (length != dashes + name || strncmp(word, "--", dashes) || strncmp(options[i].name, word + dashes, name))
			continue;
		if (take_value(parser, &options[i], equals ? equals + 1 : NULL))
			return CLI_WRONG;
		return i;
	}
	return wrong(parser, "unknown option %.80s", word);
}

static int take_value(struct cli_parser *parser, const struct cli_option *option, const char *given)
{
	const char *following = parser->next + 1 < parser->argc ? parser->argv[parser->next + 1] : NULL;
	double number;

	if (given && option->argument == CLI_FLAG)
		return wrong(parser, "--%s takes no value", option->name);
	parser->value = given;
	if (given || option->argument == CLI_FLAG)
		return 0;
	if (option->argument == CLI_VALUE && !following)
		return wrong(parser, "--%s needs a value", option->name);
	if (option->argument == CLI_VALUE || (following && cli_parse_real(following, 0, 1e9, &number))) {
		parser->value = following;
		parser->next++;
	}
	return 0;
}

/* The length of the character at `text`; 0: none, or one that a terminal may obey. */
static size_t plain_bytes(const char *text)
{
	static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 }; /* by length */
	uint8_t first = (uint8_t)text[0];
	size_t length = first < 0x80   ? 1
			: first < 0xc0 ? 0
			: first < 0xe0 ? 2
			: first < 0xf0 ? 3
			: first < 0xf8 ? 4
				       : 0;
	uint32_t code = length > 1 ? first & (0x7fu >> length) : first;

	for (size_t i = 1; i < length; i++) {
		if ((text[i] & 0xc0) != 0x80)
			return 0; /* the end of the text is none, too */
		code = code << 6 | (text[i] & 0x3fu);
	}
	if (code < 0x20 || (code >= 0x7f && code < 0xa0) || code < least[length] ||
	    (code >= 0xd800 && code < 0xe000) || code > 0x10ffff)
		return 0;
	return length;
}

/* One write, so that lines of several VMs do not mix. */
static void say(const char *format, va_list args)
{
	char line[1024] = "latent: ";
	size_t used = strlen(line);
	int length = vsnprintf(line + used, sizeof line - used - 1, format, args);

	if (length < 0)
		return;
	cli_make_plain(line);
	used = used + (size_t)length < sizeof line - 2 ? used + (size_t)length : sizeof line - 2;
	line[used] = '\n';
	if (write(STDERR_FILENO, line, used + 1) < 0)
		return;
}

int cli_find_program(const char *name, const char *installed, char ret_path[PATH_MAX])
{
	ssize_t n = readlink("/proc/self/exe", ret_path, PATH_MAX - 1);
	char *slash;

	ret_path[n > 0 ? n : 0] = '\0';
	slash = strrchr(ret_path, '/');
	if (slash)
		snprintf(slash + 1, (size_t)(PATH_MAX - (slash + 1 - ret_path)), "%s", name);
	if (slash && !access(ret_path, X_OK))
		return CLI_OK;
	snprintf(ret_path, PATH_MAX, "%s", installed);
	if (!access(ret_path, X_OK))
		return CLI_OK;
	return cli_fail(CLI_SYSTEM, "%s is neither beside latent nor at %s", name, installed);
}
