/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What text and picture of a map have in common; heat.c has the text, heat_png.c the picture. */
#ifndef LATENT_CLI_HEAT_VIEW_H
#define LATENT_CLI_HEAT_VIEW_H

#include "cli/heat_map.h"

#define HEAT_LINE_BYTES 160
#define HEAT_LEGEND_LINES (1 + ACTIVITY_CLASSES + 1) /* headings, classes, the sum */

struct heat_view {
	const char *name;   /* of the VM */
	uint64_t period_us; /* of the scan; 0: it is off, and the map is as it was then */
	unsigned width;     /* cells in a row */
	const struct heat_map *map;
};

/* How a class looks: a character, a colour of 256, and red, green and blue. */
struct heat_look {
	char sign;
	unsigned char colour, rgb[3];
};

extern const struct heat_look heat_looks[ACTIVITY_CLASSES];
extern const enum activity_class heat_legend_order[ACTIVITY_CLASSES];

/* Two lines that say what is shown. */
void heat_title(const struct heat_view *view, char first[HEAT_LINE_BYTES], char second[HEAT_LINE_BYTES]);
/* A line of the table of classes and sources; lines 1 .. ACTIVITY_CLASSES are those of
 * heat_legend_order. */
void heat_legend(const struct heat_view *view, unsigned line, char text[HEAT_LINE_BYTES]);
uint64_t heat_rows(const struct heat_view *view, const struct heat_block *block);

/* Writes a PNG beside `path` and renames it. A negative errno; -EEXIST: there is something that is no
 * file. */
int heat_write_png(const struct heat_view *view, const char *path);

#endif
