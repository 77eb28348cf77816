/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* QEMU: blockdev.c (drive_new, drive_add), softmmu/vl.c (QEMU_OPTION_hda and what follows). */
#include "snapshot/drives.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME_BYTES 64
#define PLACES 64 /* of drives that QEMU names itself; more are left without a name */

struct place {
	char interface[16];
	unsigned bus, unit;
};

struct namer {
	unsigned ide_units; /* of one bus */
	struct place taken[PLACES];
	unsigned count;
};

static unsigned units_of(const struct namer *n, const char *interface)
{
	return !strcmp(interface, "ide") ? n->ide_units : !strcmp(interface, "scsi") ? 7 : 0;
}

static bool is_taken(const struct namer *n, const struct place *p)
{
	for (unsigned i = 0; i < n->count; i++)
		if (!strcmp(n->taken[i].interface, p->interface) && n->taken[i].bus == p->bus &&
		    n->taken[i].unit == p->unit)
			return true;
	return false;
}

static unsigned number_of(const struct props *props, const char *key, unsigned otherwise)
{
	const char *text = props_get(props, key);

	return text ? (unsigned)strtoul(text, NULL, 10) : otherwise;
}

/* Where QEMU puts it: where it was told to, or at the first place that is free. */
static struct place place_of(const struct namer *n, const struct props *props)
{
	const char *interface = props_get(props, "if"), *index = props_get(props, "index");
	struct place p = { .bus = number_of(props, "bus", 0), .unit = number_of(props, "unit", 0) };
	unsigned units;

	snprintf(p.interface, sizeof p.interface, "%s", interface ? interface : "ide");
	units = units_of(n, p.interface);
	if (index) {
		unsigned number = number_of(props, "index", 0);

		p.bus = units ? number / units : 0;
		p.unit = units ? number % units : number;
	} else if (!props_get(props, "unit")) {
		while (is_taken(n, &p)) {
			p.unit++;
			if (units && p.unit >= units) {
				p.unit -= units;
				p.bus++;
			}
		}
	}
	return p;
}

static void name_drive(struct namer *n, const struct props *props, char name[NAME_BYTES])
{
	const char *id = props_get(props, "id"), *media = props_get(props, "media"), *kind = "";
	struct place p = place_of(n, props);

	if (n->count < PLACES)
		n->taken[n->count++] = p;
	if (!strcmp(p.interface, "ide") || !strcmp(p.interface, "scsi"))
		kind = media && !strcmp(media, "cdrom") ? "-cd" : "-hd";
	if (id)
		snprintf(name, NAME_BYTES, "%s", id);
	else if (units_of(n, p.interface))
		snprintf(name, NAME_BYTES, "%s%u%s%u", p.interface, p.bus, kind, p.unit);
	else
		snprintf(name, NAME_BYTES, "%s%s%u", p.interface, kind, p.unit);
}

static unsigned find(const char *name, const char *const *saved, unsigned count)
{
	unsigned i = 0;

	while (i < count && strcmp(saved[i], name))
		i++;
	return i;
}

/* "-drive" and "--drive" are one option; "" for a word that is none. */
static const char *option_of(const char *word)
{
	return word[0] != '-' ? "" : word + (word[1] == '-' ? 2 : 1);
}

/* q35 has a bus for each of its IDE disks. */
static void look_at_machine(struct namer *n, int argc, const char *const *argv)
{
	n->ide_units = 2;
	for (int i = 1; i + 1 < argc; i++) {
		const char *option = option_of(argv[i]);

		if ((!strcmp(option, "machine") || !strcmp(option, "M")) && strstr(argv[i + 1], "q35"))
			n->ide_units = 1;
	}
}

/* -hda FILE is -drive index=0,media=disk,file=FILE; so are the others. */
static int add_short(struct props *props, unsigned index, const char *media, const char *file)
{
	char number[16];
	int r;

	snprintf(number, sizeof number, "%u", index);
	r = props_add(props, "index", number);
	if (!r)
		r = props_add(props, "media", media);
	return r ? r : props_add(props, "file", file);
}

static int take_short(struct drive_word *w, const char *word, const char *value)
{
	static const struct {
		const char *option, *media;
		unsigned index;
	} disks[] = { { "hda", "disk", 0 }, { "hdb", "disk", 1 }, { "hdc", "disk", 2 }, { "hdd", "disk", 3 },
		      { "cdrom", "cdrom", 2 } };

	if (word[0] != '-') {
		w->words = 1;
		return add_short(&w->props, 0, "disk", word);
	}
	for (size_t i = 0; value && i < sizeof disks / sizeof disks[0]; i++) {
		if (strcmp(option_of(word), disks[i].option))
			continue;
		w->words = 2;
		return add_short(&w->props, disks[i].index, disks[i].media, value);
	}
	return 0;
}

static int take_word(struct drive_word *w, const char *word, const char *value)
{
	const char *option = option_of(word);
	bool block = !strcmp(option, "blockdev");
	int r;

	if (!value || (strcmp(option, "drive") && !block))
		return take_short(w, word, value);
	r = props_parse(&w->props, value, block ? "driver" : NULL);
	w->words = 2;
	return r == -EINVAL ? 0 : r; /* QEMU will say what is wrong */
}

static bool refers(const struct drive_word *w, const char *node)
{
	const char *file = props_get(&w->props, "file"), *backing = props_get(&w->props, "backing");

	return (file && !strcmp(file, node)) || (backing && !strcmp(backing, node));
}

/* Nodes beneath a saved one, and beneath those. */
static void mark_beneath(struct drive_line *line)
{
	for (bool found = true; found;) {
		found = false;
		for (int i = 0; i < line->count; i++) {
			struct drive_word *w = &line->word[i];
			const char *node = props_get(&w->props, "node-name");

			for (int j = 0; w->role == DRIVE_OTHER && node && j < line->count; j++) {
				const struct drive_word *above = &line->word[j];

				if ((above->role != DRIVE_SAVED && above->role != DRIVE_BENEATH) || !refers(above, node))
					continue;
				w->role = DRIVE_BENEATH;
				found = true;
			}
		}
	}
}

int drives_find(int argc, const char *const *argv, const char *const *saved, unsigned saved_count,
		struct drive_line *ret_line)
{
	struct drive_line line = { calloc((size_t)argc + 1, sizeof *line.word), argc };
	struct namer namer = { 0 };
	int r = line.word ? 0 : -ENOMEM;

	look_at_machine(&namer, argc, argv);
	for (int i = 1; !r && i < argc; i++) {
		struct drive_word *w = &line.word[i];
		char name[NAME_BYTES];
		const char *node;

		r = take_word(w, argv[i], i + 1 < argc ? argv[i + 1] : NULL);
		node = props_get(&w->props, "node-name");
		if (!r && w->words) {
			if (strcmp(option_of(argv[i]), "blockdev"))
				name_drive(&namer, &w->props, name);
			else
				snprintf(name, sizeof name, "%s", node ? node : "");
			w->disk = find(name, saved, saved_count);
			w->role = w->disk < saved_count ? DRIVE_SAVED : DRIVE_OTHER;
			i += w->words - 1;
		} else if (props_option_has_value(option_of(argv[i]))) {
			i++;
		}
	}
	if (!r)
		mark_beneath(&line);
	if (r)
		drives_free(&line);
	else
		*ret_line = line;
	return r;
}

void drives_free(struct drive_line *line)
{
	for (int i = 0; line->word && i < line->count; i++)
		props_clear(&line->word[i].props);
	free(line->word);
	line->word = NULL;
}
