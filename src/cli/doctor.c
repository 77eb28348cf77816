/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent doctor: presents what the checks find. */
#include "cli/doctor.h"

#include "cli/cli.h"

#include <json-c/json.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OPT_JSON };

static const struct cli_option options[] = {
	[OPT_JSON] = { "json", CLI_FLAG, NULL, "print a JSON object" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_doctor = {
	.name = "doctor",
	.arguments = "[--json] [IMAGE ...]",
	.summary = "Say what this machine and these images allow, and how to get what is missing",
	.options = options,
	.run = run,
};

static int examine(int images, char **paths, bool json);
static void print_checks(const char *title, const struct check_list *list);
static struct json_object *checks_to_json(const struct check_list *list);
static bool is_lacking(const struct check_list *list);
static void clear(struct check_list *list);

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	bool json = false;
	int option;

	while ((option = cli_next_option(&parser)) >= 0)
		json = true;
	if (option != CLI_END)
		return cli_end_status(option);
	return examine(parser.operands, argv + 1, json);
}

static int examine(int images, char **paths, bool json)
{
	struct json_object *whole = json_object_new_object(), *all = json_object_new_array(), *one;
	struct check_list list = { 0 };
	int status, r;

	doctor_check_machine(&list);
	status = is_lacking(&list) ? CLI_LACKING : CLI_OK;
	if (!json)
		print_checks("This machine", &list);
	json_object_object_add(whole, "checks", checks_to_json(&list));
	json_object_object_add(whole, "images", all);
	clear(&list);

	for (int i = 0; i < images; i++) {
		r = doctor_check_image(&list, paths[i]);
		if (r)
			status = cli_fail(CLI_NO_IMAGE, "the image %s cannot be read: %s", paths[i],
					  strerror(-r));
		else if (is_lacking(&list) && !status)
			status = CLI_LACKING;
		cli_make_plain(paths[i]);
		if (!json && !r)
			print_checks(paths[i], &list);
		one = json_object_new_object();
		json_object_object_add(one, "path", json_object_new_string(paths[i]));
		json_object_object_add(one, "checks", checks_to_json(&list));
		if (r)
			json_object_object_add(one, "error", json_object_new_string(strerror(-r)));
		json_object_array_add(all, one);
		clear(&list);
	}
	if (json)
		puts(json_object_to_json_string_ext(whole, JSON_C_TO_STRING_PRETTY |
								   JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(whole);
	return status;
}

struct check *check_add(struct check_list *list, const char *name, const char *enables)
{
	struct check *items = realloc(list->items, (list->count + 1) * sizeof *items);

	if (!items)
		exit(cli_fail(CLI_SYSTEM, "there is no memory left"));
	list->items = items;
	items[list->count] = (struct check){ .name = name, .enables = enables };
	return &items[list->count++];
}

void check_found(struct check *check, enum check_status status, const char *format, ...)
{
	va_list args;

	check->status = status;
	va_start(args, format);
	vsnprintf(check->found, sizeof check->found, format, args);
	va_end(args);
	cli_make_plain(check->found); /* names and paths are in it, some from an image */
}

void check_remedy(struct check *check, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(check->remedy, sizeof check->remedy, format, args);
	va_end(args);
}

static const char *status_word(enum check_status status)
{
	return status == CHECK_OK ? "ok" : status == CHECK_LIMITED ? "limited" : "missing";
}

static void print_checks(const char *title, const struct check_list *list)
{
	static const char *const marks[] = {
		[CHECK_OK] = "ok", [CHECK_LIMITED] = "LIMITED", [CHECK_MISSING] = "MISSING"
	};

	printf("%s\n", title);
	for (size_t i = 0; i < list->count; i++) {
		const struct check *check = &list->items[i];

		printf("  %-8s %-18s %s\n", marks[check->status], check->name, check->found);
		if (check->status != CHECK_OK)
			printf("  %-8s %-18s for: %s\n", "", "", check->enables);
		if (check->remedy[0])
			printf("  %-8s %-18s do: %s\n", "", "", check->remedy);
	}
	putchar('\n');
}

static struct json_object *checks_to_json(const struct check_list *list)
{
	struct json_object *array = json_object_new_array();

	for (size_t i = 0; i < list->count; i++) {
		const struct check *check = &list->items[i];
		struct json_object *json = json_object_new_object();

		json_object_object_add(json, "name", json_object_new_string(check->name));
		json_object_object_add(json, "status",
				       json_object_new_string(status_word(check->status)));
		json_object_object_add(json, "found", json_object_new_string(check->found));
		json_object_object_add(json, "enables", json_object_new_string(check->enables));
		json_object_object_add(json, "remedy", json_object_new_string(check->remedy));
		json_object_array_add(array, json);
	}
	return array;
}

static bool is_lacking(const struct check_list *list)
{
	for (size_t i = 0; i < list->count; i++)
		if (list->items[i].status == CHECK_MISSING)
			return true;
	return false;
}

static void clear(struct check_list *list)
{
	free(list->items);
	*list = (struct check_list){ 0 };
}
