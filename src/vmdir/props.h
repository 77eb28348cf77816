/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The properties of one QEMU option, whichever way it is written: "first,key=value,...", JSON, or a
 * section of a -readconfig file. Values are text; JSON objects become dotted keys, booleans on/off.
 *
 * Functions return 0 or a negative errno: -ENOMEM, -EINVAL for text that QEMU will refuse too.
 */
#ifndef LATENT_VMDIR_PROPS_H
#define LATENT_VMDIR_PROPS_H

#include <stdbool.h>
#include <stddef.h>

struct prop {
	char *key, *value;
};

struct props { /* zero-initialised: empty */
	struct prop *items;
	size_t count;
};

/* `implied`: the key of a first word without '='; NULL: such a word is a switch like any other. */
int props_parse(struct props *props, const char *text, const char *implied);
int props_add(struct props *props, const char *key, const char *value);
/* The last value of a key, or NULL. */
const char *props_get(const struct props *props, const char *key);
void props_clear(struct props *props);

/* A value as it has to be written: its commas twice. To be freed; NULL: no memory. */
char *props_escape(const char *value);

/* Does a word with this option (without its dashes) have a value in the next one? */
bool props_option_has_value(const char *option);

#endif
