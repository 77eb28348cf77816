/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* QEMU: docs/devel/qapi-code-gen, util/keyval.c, util/qemu-option.c for what is accepted. */
#include "vmdir/props.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define JSON_DEPTH 16
#define KEY_BYTES 512

static int parse_json(struct props *props, const char *text);
static int add_json(struct props *props, const char *key, struct json_object *json);
static int add_json_array(struct props *props, const char *key, struct json_object *json);
static int parse_word(struct props *props, const char **text, const char *implied);
static int add_switch(struct props *props, const char *word);
static const char *copy_value(const char *from, char *to);

int props_parse(struct props *props, const char *text, const char *implied)
{
	int r = 0;

	if (text[0] == '{')
		return parse_json(props, text);
	while (!r && *text) {
		r = parse_word(props, &text, implied);
		implied = NULL;
	}
	return r;
}

int props_add(struct props *props, const char *key, const char *value)
{
	struct prop *items = realloc(props->items, (props->count + 1) * sizeof *items);
	struct prop item;

	if (!items)
		return -ENOMEM;
	props->items = items;
	item.key = strdup(key);
	item.value = strdup(value);
	if (!item.key || !item.value) {
		free(item.key);
		free(item.value);
		return -ENOMEM;
	}
	items[props->count++] = item;
	return 0;
}

const char *props_get(const struct props *props, const char *key)
{
	for (size_t i = props->count; i--;)
		if (!strcmp(props->items[i].key, key))
			return props->items[i].value;
	return NULL;
}

void props_clear(struct props *props)
{
	for (size_t i = 0; i < props->count; i++) {
		free(props->items[i].key);
		free(props->items[i].value);
	}
	free(props->items);
	*props = (struct props){ 0 };
}

char *props_escape(const char *value)
{
	char *escaped = malloc(2 * strlen(value) + 1), *to = escaped;

	if (!escaped)
		return NULL;
	for (; *value; value++) {
		*to++ = *value;
		if (*value == ',')
			*to++ = ',';
	}
	*to = 0;
	return escaped;
}

/* Of QEMU's options those without a value are few and settled; new ones have had values. */
bool props_option_has_value(const char *option)
{
	static const char *const without[] = {
		"S", "alt-grab", "async-teardown", "audio-help", "ctrl-grab", "curses", "daemonize",
		"enable-fips", "enable-hax", "enable-hvf", "enable-kvm", "enable-sync-profile", "full-screen",
		"h", "help", "mem-prealloc", "no-acpi", "no-fd-bootchk", "no-frame", "no-hpet", "no-kvm",
		"no-kvm-irqchip", "no-quit", "no-reboot", "no-shutdown", "no-user-config", "nodefaults",
		"nographic", "only-migratable", "portrait", "preconfig", "s", "sdl", "semihosting",
		"singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach", "xen-domid-restrict",
	};

	for (size_t i = 0; i < sizeof without / sizeof without[0]; i++)
		if (!strcmp(option, without[i]))
			return false;
	return true;
}

static int parse_json(struct props *props, const char *text)
{
	struct json_tokener *tokener = json_tokener_new_ex(JSON_DEPTH);
	struct json_object *json;
	int r = -EINVAL;

	if (!tokener)
		return -ENOMEM;
	json = json_tokener_parse_ex(tokener, text, -1);
	if (json && json_object_is_type(json, json_type_object))
		r = add_json(props, "", json);
	json_object_put(json);
	json_tokener_free(tokener);
	return r;
}

static int add_json(struct props *props, const char *key, struct json_object *json)
{
	struct json_object_iterator at, end;
	char inner[KEY_BYTES];
	const char *text;
	int r = 0;

	if (json_object_is_type(json, json_type_boolean))
		return props_add(props, key, json_object_get_boolean(json) ? "on" : "off");
	if (json_object_is_type(json, json_type_array))
		return add_json_array(props, key, json);
	if (!json_object_is_type(json, json_type_object)) {
		text = json_object_get_string(json);
		return props_add(props, key, text ? text : "");
	}
	at = json_object_iter_begin(json);
	end = json_object_iter_end(json);
	for (; !r && !json_object_iter_equal(&at, &end); json_object_iter_next(&at)) {
		snprintf(inner, sizeof inner, "%s%s%s", key, *key ? "." : "",
			 json_object_iter_peek_name(&at));
		r = add_json(props, inner, json_object_iter_peek_value(&at));
	}
	return r;
}

static int add_json_array(struct props *props, const char *key, struct json_object *json)
{
	char inner[KEY_BYTES];
	int r = 0;

	for (size_t i = 0; !r && i < json_object_array_length(json); i++) {
		snprintf(inner, sizeof inner, "%s.%zu", key, i);
		r = add_json(props, inner, json_object_array_get_idx(json, i));
	}
	return r;
}

/* One "key=value" or "word" up to a single comma; two commas are one of the value. */
static int parse_word(struct props *props, const char **text, const char *implied)
{
	size_t key_bytes = strcspn(*text, "=,");
	char *value = malloc(strlen(*text) + 1);
	char *key = strndup(*text, key_bytes);
	int r = -ENOMEM;

	if (!value || !key)
		goto out;
	if ((*text)[key_bytes] == '=') {
		*text = copy_value(*text + key_bytes + 1, value);
		r = props_add(props, key, value);
	} else if (implied) {
		*text = copy_value(*text, value);
		r = props_add(props, implied, value);
	} else {
		*text += key_bytes + ((*text)[key_bytes] == ',');
		r = add_switch(props, key);
	}
out:
	free(value);
	free(key);
	return r;
}

/* "blob" is blob=on, and "noblob" is blob=off. */
static int add_switch(struct props *props, const char *word)
{
	if (!strncmp(word, "no", 2)) {
		int r = props_add(props, word + 2, "off");

		if (r)
			return r;
	}
	return props_add(props, word, "on");
}

/* Returns what follows the comma that ends the value. */
static const char *copy_value(const char *from, char *to)
{
	for (; *from; from++) {
		if (*from == ',' && *++from != ',')
			break;
		*to++ = *from;
	}
	*to = 0;
	return from;
}
