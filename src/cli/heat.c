/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* latent heat: which memory of a VM is in use, as a map. */
#include "cli/cli.h"
#include "cli/heat_view.h"
#include "cli/terminal.h"

#include <json-c/json.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PAGE_BYTES 4096
#define REFRESH_TIMEOUT_MS 2000
#define ROWS 32
#define WIDTH 64
#define WIDTH_PNG 512
#define WIDTH_MIN 16
#define WIDTH_MAX 1024
#define MARGIN 12 /* what stands beside a row */

enum { OPT_PNG, OPT_JSON, OPT_WIDTH };

static const struct cli_option options[] = {
	[OPT_PNG] = { "png", CLI_VALUE, "FILE", "draw it into a PNG file" },
	[OPT_JSON] = { "json", CLI_FLAG, NULL, "print a JSON object" },
	[OPT_WIDTH] = { "width", CLI_VALUE, "N", "cells in a row, 16 to 1024" },
	{ NULL, CLI_FLAG, NULL, NULL },
};

static int run(const struct cli_command *command, int argc, char **argv);

const struct cli_command cli_heat = {
	.name = "heat",
	.arguments = "NAME [--png FILE] [--json] [--width N]",
	.summary = "Draw which memory a virtual machine uses, as a map",
	.details = "`latent scan NAME --period 10s` has to look at it.",
	.options = options,
	.run = run,
};

struct request {
	const char *name, *png;
	bool json;
	unsigned width; /* 0: as it suits */
};

static int parse(const struct cli_command *command, int argc, char **argv, struct request *request);
static int show(const struct request *request, struct vm_view *vm, const struct vm_tables *tables);
static int draw(const struct request *request, const struct vm_view *vm, const struct vm_tables *tables,
		bool png);
static void print_map(const struct heat_view *view);
static void print_json(const struct heat_view *view, const struct vm_view *vm);

static int run(const struct cli_command *command, int argc, char **argv)
{
	struct request request = { .name = NULL };
	struct control_reply reply;
	struct vm_tables tables;
	struct vm_view vm;
	int status = parse(command, argc, argv, &request);

	if (!request.name)
		return status;
	status = vm_view_find(request.name, &vm);
	if (status)
		return status;
	/* So that it is known which pages are copies by now; not worth a word if it fails. */
	(void)vm_view_ask(&vm, CONTROL_REFRESH, NULL, REFRESH_TIMEOUT_MS, &reply);
	status = vm_tables_open(&vm, &tables);
	if (!status) {
		status = show(&request, &vm, &tables);
		vm_tables_close(&tables);
	}
	vm_view_close(&vm);
	return status;
}

/* Without a name in the request the status is final. */
static int parse(const struct cli_command *command, int argc, char **argv, struct request *request)
{
	struct cli_parser parser = { .command = command, .argc = argc, .argv = argv };
	uint64_t width;
	int option;

	while ((option = cli_next_option(&parser)) >= 0) {
		if (option == OPT_JSON) {
			request->json = true;
		} else if (option == OPT_PNG) {
			request->png = parser.value;
		} else {
			if (!cli_parse_unsigned(parser.value, WIDTH_MAX, &width) || width < WIDTH_MIN)
				return cli_fail(
					CLI_USAGE,
					"heat: --width takes a number from %u to %u, not '%.80s'",
					WIDTH_MIN, WIDTH_MAX, parser.value);
			request->width = (unsigned)width;
		}
	}
	if (option != CLI_END)
		return cli_end_status(option);
	if (parser.operands != 1)
		return cli_fail(CLI_USAGE, "heat: give the name of one VM (see latent heat --help)");
	request->name = argv[1];
	return CLI_OK;
}

static int show(const struct request *request, struct vm_view *vm, const struct vm_tables *tables)
{
	int status = CLI_OK;

	(void)vm_view_update(vm); /* what it said before will do */
	if (!stat_get(&vm->stats.scan.period_us_now) && !stat_get(&vm->stats.scan.passes))
		return cli_fail(
			CLI_NO_ANSWER,
			"%s: nobody looks at what it uses; begin with `latent scan %s --period 10s`",
			vm->name, vm->name);
	if (request->png)
		status = draw(request, vm, tables, true);
	if (!status && (request->json || !request->png))
		status = draw(request, vm, tables, false);
	return status;
}

/* Rows that begin at round addresses. */
static unsigned width_of_terminal(void)
{
	unsigned columns = terminal_columns(STDOUT_FILENO), width = WIDTH_MIN;

	if (!columns)
		return WIDTH;
	while (width < WIDTH_MAX && width * 2 + MARGIN <= columns)
		width *= 2;
	return width;
}

static int draw(const struct request *request, const struct vm_view *vm, const struct vm_tables *tables,
		bool png)
{
	unsigned width = request->width ? request->width : png ? WIDTH_PNG : width_of_terminal();
	unsigned rows = png && width * 3 / 4 > ROWS ? width * 3 / 4 : ROWS;
	struct heat_map map;
	struct heat_view view = { vm->name, stat_get(&vm->stats.scan.period_us_now), width, &map };
	int r = heat_map_make(tables, (size_t)width * rows, &map);

	if (r)
		return cli_fail(CLI_NO_ANSWER, "%s: its page entries cannot be read: %s", vm->name,
				strerror(-r));
	if (png)
		r = heat_write_png(&view, request->png);
	else if (request->json)
		print_json(&view, vm);
	else
		print_map(&view);
	heat_map_free(&map);
	return r ? cli_fail(CLI_SYSTEM, "%.200s cannot be written: %s", request->png, strerror(-r))
		 : CLI_OK;
}

/* ---- text --------------------------------------------------------------------------------------- */

const struct heat_look heat_looks[ACTIVITY_CLASSES] = {
	[CLASS_NEW] = { '?', 243, { 0x76, 0x76, 0x76 } },
	[CLASS_HOT] = { '#', 196, { 0xff, 0x00, 0x00 } },
	[CLASS_WARM] = { '+', 214, { 0xff, 0xaf, 0x00 } },
	[CLASS_COOL] = { '-', 117, { 0x87, 0xd7, 0xff } },
	[CLASS_COLD] = { '.', 26, { 0x00, 0x5f, 0xd7 } },
	[CLASS_FROZEN] = { ' ', 17, { 0x00, 0x00, 0x5f } },
};

const enum activity_class heat_legend_order[ACTIVITY_CLASSES] = {
	CLASS_HOT, CLASS_WARM, CLASS_COOL, CLASS_COLD, CLASS_FROZEN, CLASS_NEW,
};

uint64_t heat_rows(const struct heat_view *view, const struct heat_block *block)
{
	return (block->cells + view->width - 1) / view->width;
}

void heat_title(const struct heat_view *view, char first[HEAT_LINE_BYTES], char second[HEAT_LINE_BYTES])
{
	char size[CLI_SIZE_TEXT], cell[CLI_SIZE_TEXT], row[CLI_SIZE_TEXT];
	uint64_t per_cell = view->map->pages_per_cell;

	if (view->period_us)
		snprintf(first, HEAT_LINE_BYTES, "%s: %s, looked at every %.1f s", view->name,
			 cli_size(view->map->pages * PAGE_BYTES, size), (double)view->period_us / 1e6);
	else
		snprintf(first, HEAT_LINE_BYTES, "%s: %s, as of when the scan was turned off",
			 view->name, cli_size(view->map->pages * PAGE_BYTES, size));
	snprintf(second, HEAT_LINE_BYTES, "a cell is %s, as most of its pages are; a row %s",
		 cli_size(per_cell * PAGE_BYTES, cell),
		 cli_size(per_cell * PAGE_BYTES * view->width, row));
}

static int add_size(char *text, int used, uint64_t pages)
{
	char size[CLI_SIZE_TEXT];

	return used + snprintf(text + used, (size_t)(HEAT_LINE_BYTES - used), " %9s",
			       pages ? cli_size(pages * PAGE_BYTES, size) : "-");
}

void heat_legend(const struct heat_view *view, unsigned line, char text[HEAT_LINE_BYTES])
{
	const struct heat_map *map = view->map;
	bool is_sum = line > ACTIVITY_CLASSES;
	enum activity_class class = line && !is_sum ? heat_legend_order[line - 1] : CLASS_NEW;
	uint64_t pages = is_sum ? map->pages : heat_class_pages(map, class);
	int used;

	if (!line) {
		used = snprintf(text, HEAT_LINE_BYTES, "%-8s %9s %7s", "", "all", "");
		for (unsigned i = 0; i < HEAT_SOURCES; i++)
			used += snprintf(text + used, (size_t)(HEAT_LINE_BYTES - used), " %9s",
					 heat_source_names[i]);
		return;
	}
	used = snprintf(text, HEAT_LINE_BYTES, "%-8s", is_sum ? "all" : activity_class_names[class]);
	used = add_size(text, used, pages);
	used += snprintf(text + used, (size_t)(HEAT_LINE_BYTES - used), " %5.1f %%",
			 100 * (double)pages / (double)map->pages);
	for (unsigned i = 0; i < HEAT_SOURCES; i++)
		used = add_size(text, used, is_sum ? heat_source_pages(map, i) : map->count[i][class]);
}

static void print_sign(enum activity_class class, bool colours)
{
	if (colours)
		printf("\033[48;5;%um ", heat_looks[class].colour);
	else
		putchar(heat_looks[class].sign);
}

static void print_row(const struct heat_view *view, const struct heat_block *block, uint64_t row,
		      bool colours)
{
	const struct heat_cell *cell = view->map->cell + block->first_cell;
	uint64_t first = row * view->width;
	char at[CLI_SIZE_TEXT];

	printf("%9s %s", cli_size(first * view->map->pages_per_cell * PAGE_BYTES, at),
	       colours ? "" : "|");
	for (uint64_t i = first; i < first + view->width && i < block->cells; i++)
		print_sign(heat_cell_class(&cell[i]), colours);
	puts(colours ? "\033[0m" : "|");
}

static void print_map(const struct heat_view *view)
{
	bool colours = terminal_has_256_colours(STDOUT_FILENO);
	char first[HEAT_LINE_BYTES], second[HEAT_LINE_BYTES];

	heat_title(view, first, second);
	printf("%s; %s\n", first, second);
	for (unsigned i = 0; i < view->map->blocks; i++) {
		const struct heat_block *block = &view->map->block[i];

		if (view->map->blocks > 1)
			printf("%s\n", block->name);
		for (uint64_t row = 0; row < heat_rows(view, block); row++)
			print_row(view, block, row, colours);
	}
	for (unsigned line = 0; line < HEAT_LEGEND_LINES; line++) {
		bool is_class = line && line <= ACTIVITY_CLASSES;

		heat_legend(view, line, first);
		if (is_class)
			print_sign(heat_legend_order[line - 1], colours);
		printf("%s %s\n", !is_class ? " " : colours ? "\033[0m" : "", first);
	}
}

/* ---- JSON --------------------------------------------------------------------------------------- */

static struct json_object *pages_to_json(const uint64_t pages[ACTIVITY_CLASSES])
{
	struct json_object *json = json_object_new_object();

	for (unsigned i = 0; i < ACTIVITY_CLASSES; i++)
		json_object_object_add(json, activity_class_names[i], json_object_new_uint64(pages[i]));
	return json;
}

static struct json_object *cells_to_json(const struct heat_cell *cells, size_t count)
{
	struct json_object *json = json_object_new_array();

	for (size_t i = 0; i < count; i++) {
		struct json_object *cell = json_object_new_array();

		for (unsigned k = 0; k < ACTIVITY_CLASSES; k++)
			json_object_array_add(cell, json_object_new_uint64(cells[i].pages[k]));
		json_object_array_add(json, cell);
	}
	return json;
}

static void print_json(const struct heat_view *view, const struct vm_view *vm)
{
	struct json_object *json = json_object_new_object(), *classes = json_object_new_array(),
			   *sources = json_object_new_object(), *blocks = json_object_new_array();
	const struct heat_map *map = view->map;

	for (unsigned i = 0; i < ACTIVITY_CLASSES; i++)
		json_object_array_add(classes, json_object_new_string(activity_class_names[i]));
	for (unsigned i = 0; i < HEAT_SOURCES; i++)
		json_object_object_add(sources, heat_source_names[i], pages_to_json(map->count[i]));
	for (unsigned i = 0; i < map->blocks; i++) {
		struct json_object *block = json_object_new_object();

		json_object_object_add(block, "name", json_object_new_string(map->block[i].name));
		json_object_object_add(block, "pages", json_object_new_uint64(map->block[i].pages));
		json_object_object_add(
			block, "cells",
			cells_to_json(map->cell + map->block[i].first_cell, map->block[i].cells));
		json_object_array_add(blocks, block);
	}
	json_object_object_add(json, "name", json_object_new_string(view->name));
	json_object_object_add(json, "period_us_now", json_object_new_uint64(view->period_us));
	json_object_object_add(json, "passes", json_object_new_uint64(stat_get(&vm->stats.scan.passes)));
	json_object_object_add(json, "pages", json_object_new_uint64(map->pages));
	json_object_object_add(json, "writes_seen_pages_now",
			       json_object_new_uint64(stat_get(&vm->stats.scan.writes_seen_now)));
	json_object_object_add(json, "pages_now", sources);
	json_object_object_add(json, "pages_per_cell", json_object_new_uint64(map->pages_per_cell));
	json_object_object_add(json, "cell", classes);
	json_object_object_add(json, "blocks", blocks);
	puts(json_object_to_json_string_ext(json, JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(json);
}
