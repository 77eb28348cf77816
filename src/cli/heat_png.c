/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The map as a picture: two lines of title, the cells of each block, and a legend. */
#include "cli/heat_view.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <png.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define WIDTH_PX 1024u /* at least */
#define MARGIN_PX 16u
#define DOT_PX 2u              /* of letters */
#define LETTER_PX (6 * DOT_PX) /* 5 dots and a space */
#define LINE_PX (10 * DOT_PX)  /* 7 dots and a space */
#define TITLE_LINES 2u
enum { COLOUR_PAPER = ACTIVITY_CLASSES, COLOUR_INK, COLOURS };

struct picture {
	unsigned width, height; /* pixels */
	uint8_t *pixels;        /* colours */
};

/* ---- letters ------------------------------------------------------------------------------------ */

/* Five columns of seven dots each, the top one in bit 0; small letters look like capitals. */
static const uint8_t letters['_' + 1][5] = {
	['%'] = { 0x23, 0x13, 0x08, 0x64, 0x62 }, ['('] = { 0x00, 0x1c, 0x22, 0x41, 0x00 },
	[')'] = { 0x00, 0x41, 0x22, 0x1c, 0x00 }, [','] = { 0x00, 0x50, 0x30, 0x00, 0x00 },
	['-'] = { 0x08, 0x08, 0x08, 0x08, 0x08 }, ['.'] = { 0x00, 0x60, 0x60, 0x00, 0x00 },
	['/'] = { 0x20, 0x10, 0x08, 0x04, 0x02 }, ['0'] = { 0x3e, 0x51, 0x49, 0x45, 0x3e },
	['1'] = { 0x00, 0x42, 0x7f, 0x40, 0x00 }, ['2'] = { 0x42, 0x61, 0x51, 0x49, 0x46 },
	['3'] = { 0x21, 0x41, 0x45, 0x4b, 0x31 }, ['4'] = { 0x18, 0x14, 0x12, 0x7f, 0x10 },
	['5'] = { 0x27, 0x45, 0x45, 0x45, 0x39 }, ['6'] = { 0x3c, 0x4a, 0x49, 0x49, 0x30 },
	['7'] = { 0x01, 0x71, 0x09, 0x05, 0x03 }, ['8'] = { 0x36, 0x49, 0x49, 0x49, 0x36 },
	['9'] = { 0x06, 0x49, 0x49, 0x29, 0x1e }, [':'] = { 0x00, 0x36, 0x36, 0x00, 0x00 },
	[';'] = { 0x00, 0x56, 0x36, 0x00, 0x00 }, ['A'] = { 0x7e, 0x11, 0x11, 0x11, 0x7e },
	['B'] = { 0x7f, 0x49, 0x49, 0x49, 0x36 }, ['C'] = { 0x3e, 0x41, 0x41, 0x41, 0x22 },
	['D'] = { 0x7f, 0x41, 0x41, 0x22, 0x1c }, ['E'] = { 0x7f, 0x49, 0x49, 0x49, 0x41 },
	['F'] = { 0x7f, 0x09, 0x09, 0x09, 0x01 }, ['G'] = { 0x3e, 0x41, 0x49, 0x49, 0x7a },
	['H'] = { 0x7f, 0x08, 0x08, 0x08, 0x7f }, ['I'] = { 0x00, 0x41, 0x7f, 0x41, 0x00 },
	['J'] = { 0x20, 0x40, 0x41, 0x3f, 0x01 }, ['K'] = { 0x7f, 0x08, 0x14, 0x22, 0x41 },
	['L'] = { 0x7f, 0x40, 0x40, 0x40, 0x40 }, ['M'] = { 0x7f, 0x02, 0x0c, 0x02, 0x7f },
	['N'] = { 0x7f, 0x04, 0x08, 0x10, 0x7f }, ['O'] = { 0x3e, 0x41, 0x41, 0x41, 0x3e },
	['P'] = { 0x7f, 0x09, 0x09, 0x09, 0x06 }, ['Q'] = { 0x3e, 0x41, 0x51, 0x21, 0x5e },
	['R'] = { 0x7f, 0x09, 0x19, 0x29, 0x46 }, ['S'] = { 0x46, 0x49, 0x49, 0x49, 0x31 },
	['T'] = { 0x01, 0x01, 0x7f, 0x01, 0x01 }, ['U'] = { 0x3f, 0x40, 0x40, 0x40, 0x3f },
	['V'] = { 0x1f, 0x20, 0x40, 0x20, 0x1f }, ['W'] = { 0x3f, 0x40, 0x38, 0x40, 0x3f },
	['X'] = { 0x63, 0x14, 0x08, 0x14, 0x63 }, ['Y'] = { 0x07, 0x08, 0x70, 0x08, 0x07 },
	['Z'] = { 0x61, 0x51, 0x49, 0x45, 0x43 }, ['_'] = { 0x40, 0x40, 0x40, 0x40, 0x40 },
};

/* What lies outside of the picture is cut. */
static void fill(struct picture *p, unsigned x, unsigned y, unsigned width, unsigned height,
		 uint8_t colour)
{
	for (unsigned row = y; row < y + height && row < p->height; row++)
		for (unsigned column = x; column < x + width && column < p->width; column++)
			p->pixels[(size_t)row * p->width + column] = colour;
}

static void draw_letter(struct picture *p, unsigned x, unsigned y, unsigned char letter)
{
	if (letter >= 'a' && letter <= 'z')
		letter = (unsigned char)(letter - 'a' + 'A');
	if (letter >= sizeof letters / sizeof letters[0])
		return;
	for (unsigned column = 0; column < 5; column++)
		for (unsigned row = 0; row < 7; row++)
			if (letters[letter][column] >> row & 1)
				fill(p, x + column * DOT_PX, y + row * DOT_PX, DOT_PX, DOT_PX,
				     COLOUR_INK);
}

static void draw_text(struct picture *p, unsigned x, unsigned y, const char *text)
{
	for (; *text; text++, x += LETTER_PX)
		draw_letter(p, x, y, (unsigned char)*text);
}

/* ---- the picture -------------------------------------------------------------------------------- */

static unsigned cell_px(const struct heat_view *view)
{
	return (WIDTH_PX + view->width - 1) / view->width;
}

/* Blocks have names if there are several. */
static unsigned block_px(const struct heat_view *view, const struct heat_block *block)
{
	return (unsigned)heat_rows(view, block) * cell_px(view) + (view->map->blocks > 1 ? LINE_PX : 0);
}

static void measure(const struct heat_view *view, struct picture *p)
{
	p->width = view->width * cell_px(view) + 2 * MARGIN_PX;
	p->height = (TITLE_LINES + HEAT_LEGEND_LINES) * LINE_PX + 4 * MARGIN_PX;
	for (unsigned i = 0; i < view->map->blocks; i++)
		p->height += block_px(view, &view->map->block[i]);
}

static void draw_block(struct picture *p, const struct heat_view *view, const struct heat_block *block,
		       unsigned y)
{
	const struct heat_cell *cell = view->map->cell + block->first_cell;
	unsigned side = cell_px(view);

	if (view->map->blocks > 1) {
		draw_text(p, MARGIN_PX, y, block->name);
		y += LINE_PX;
	}
	for (size_t i = 0; i < block->cells; i++)
		fill(p, MARGIN_PX + (unsigned)(i % view->width) * side,
		     y + (unsigned)(i / view->width) * side, side, side,
		     (uint8_t)heat_cell_class(&cell[i]));
}

static void draw_legend(struct picture *p, const struct heat_view *view, unsigned y)
{
	char text[HEAT_LINE_BYTES];

	for (unsigned line = 0; line < HEAT_LEGEND_LINES; line++, y += LINE_PX) {
		if (line && line <= ACTIVITY_CLASSES)
			fill(p, MARGIN_PX, y, 7 * DOT_PX, 7 * DOT_PX,
			     (uint8_t)heat_legend_order[line - 1]);
		heat_legend(view, line, text);
		draw_text(p, MARGIN_PX + 2 * LETTER_PX, y, text);
	}
}

static void draw(struct picture *p, const struct heat_view *view)
{
	char first[HEAT_LINE_BYTES], second[HEAT_LINE_BYTES];
	unsigned y = MARGIN_PX;

	fill(p, 0, 0, p->width, p->height, COLOUR_PAPER);
	heat_title(view, first, second);
	draw_text(p, MARGIN_PX, y, first);
	draw_text(p, MARGIN_PX, y + LINE_PX, second);
	y += TITLE_LINES * LINE_PX + MARGIN_PX;
	for (unsigned i = 0; i < view->map->blocks; i++) {
		draw_block(p, view, &view->map->block[i], y);
		y += block_px(view, &view->map->block[i]);
	}
	draw_legend(p, view, y + MARGIN_PX);
}

/* ---- the file ----------------------------------------------------------------------------------- */

static int encode(const struct picture *p, FILE *file)
{
	uint8_t colours[COLOURS][3] = {
		[COLOUR_PAPER] = { 0xff, 0xff, 0xff }, [COLOUR_INK] = { 0x20, 0x20, 0x20 }
	};
	png_image image = { .version = PNG_IMAGE_VERSION,
			    .width = p->width,
			    .height = p->height,
			    .format = PNG_FORMAT_RGB_COLORMAP,
			    .colormap_entries = COLOURS };

	for (unsigned i = 0; i < ACTIVITY_CLASSES; i++)
		memcpy(colours[i], heat_looks[i].rgb, sizeof colours[i]);
	errno = 0;
	if (png_image_write_to_stdio(&image, file, 0, p->pixels, 0, colours) && !fflush(file))
		return 0;
	return errno ? -errno : -EIO;
}

/* Takes the descriptor. */
static int write_file(const struct picture *p, int fd)
{
	mode_t mask = umask(0);
	FILE *file = fdopen(fd, "wb");
	int r;

	umask(mask);
	if (!file) {
		close(fd);
		return -ENOMEM;
	}
	r = fchmod(fd, 0666 & ~mask) ? -errno : encode(p, file);
	return fclose(file) && !r ? -errno : r;
}

static int write_beside(const struct picture *p, const char *path)
{
	char partial[PATH_MAX];
	int fd, r;

	if (snprintf(partial, sizeof partial, "%s.XXXXXX", path) >= (int)sizeof partial)
		return -ENAMETOOLONG;
	fd = mkostemp(partial, O_CLOEXEC);
	if (fd < 0)
		return -errno;
	r = write_file(p, fd);
	if (!r && rename(partial, path))
		r = -errno;
	if (r)
		(void)unlink(partial);
	return r;
}

int heat_write_png(const struct heat_view *view, const char *path)
{
	struct picture picture;
	struct stat st;
	int r;

	if (!stat(path, &st) && !S_ISREG(st.st_mode))
		return S_ISDIR(st.st_mode) ? -EISDIR : -EEXIST;
	measure(view, &picture);
	picture.pixels = malloc((size_t)picture.width * picture.height);
	if (!picture.pixels)
		return -ENOMEM;
	draw(&picture, view);
	r = write_beside(&picture, path);
	free(picture.pixels);
	return r;
}
