/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/describe.h"

#include "vmdir/vmdir.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COMMAND_MS 10000

#define OVERLAY_NODE "latent-" /* as a save calls what it puts over a node */

struct line {
	int argc;
	const char *argv[1024];
};

static struct json_object *ask(struct qmp *qmp, const char *name, const char *arguments)
{
	const struct qmp_command command = { .name = name, .arguments = json_tokener_parse(arguments),
					     .timeout_ms = COMMAND_MS };
	struct json_object *value = NULL;

	return qmp_run(qmp, &command, &value, NULL) ? NULL : value;
}

static const char *text_of(struct json_object *json, const char *key)
{
	struct json_object *value;

	return json_object_object_get_ex(json, key, &value) ? json_object_get_string(value) : "";
}

static struct json_object *find_node(struct json_object *nodes, const char *key, const char *value, const char *driver)
{
	for (size_t i = 0; i < json_object_array_length(nodes); i++) {
		struct json_object *node = json_object_array_get_idx(nodes, i);

		if (!strcmp(text_of(node, key), value) && (!driver || !strcmp(text_of(node, "drv"), driver)))
			return node;
	}
	return NULL;
}

/* The node over the file that `node` names as its backing. */
static struct json_object *node_beneath(struct json_object *nodes, struct json_object *node)
{
	struct json_object *image, *backing;

	if (!json_object_object_get_ex(node, "image", &image) ||
	    !json_object_object_get_ex(image, "backing-image", &backing))
		return NULL;
	return find_node(nodes, "file", text_of(backing, "filename"), text_of(backing, "format"));
}

static void describe_node(struct json_object *nodes, struct manifest_disk *disk)
{
	struct json_object *node = find_node(nodes, "node-name", disk->drive, NULL);

	for (int i = 0; node && i < MANIFEST_LAYERS; i++) {
		if (strncmp(text_of(node, "node-name"), OVERLAY_NODE, strlen(OVERLAY_NODE))) {
			snprintf(disk->drive, sizeof disk->drive, "%s", text_of(node, "node-name"));
			return;
		}
		node = node_beneath(nodes, node);
	}
}

void describe_nodes(struct qmp *qmp, struct manifest *m)
{
	struct json_object *nodes = NULL;

	for (uint32_t i = 0; i < m->disks; i++) {
		if (strncmp(m->disk[i].drive, OVERLAY_NODE, strlen(OVERLAY_NODE)))
			continue;
		if (!nodes)
			nodes = ask(qmp, "query-named-block-nodes", "{}");
		if (json_object_is_type(nodes, json_type_array))
			describe_node(nodes, &m->disk[i]);
	}
	json_object_put(nodes);
}

/* "pc-q35-7.2-machine": another QEMU's q35 is another machine. */
static void ask_type(struct qmp *qmp, char type[64])
{
	struct json_object *value = ask(qmp, "qom-get", "{\"path\": \"/machine\", \"property\": \"type\"}");
	char *end;

	snprintf(type, 64, "%s", json_object_is_type(value, json_type_string) ? json_object_get_string(value) : "");
	end = strstr(type, "-machine");
	if (end)
		*end = '\0';
	json_object_put(value);
}

/* The words that `latent run` was given, without those that it added. */
static struct json_object *read_line(const char *run_dir, struct line *line)
{
	char path[VMDIR_PATH_BYTES + 16];
	struct json_object *json, *words = NULL, *own = NULL;
	size_t count;

	snprintf(path, sizeof path, "%.240s/" VMDIR_JSON, run_dir);
	json = json_object_from_file(path);
	json_object_object_get_ex(json, "command", &words);
	json_object_object_get_ex(json, "own_words", &own);
	count = json_object_is_type(words, json_type_array) ? json_object_array_length(words) : 0;
	if (!own || count < (size_t)json_object_get_int(own))
		count = 0;
	else
		count -= (size_t)json_object_get_int(own);
	for (size_t i = 0; i < count && i < sizeof line->argv / sizeof line->argv[0]; i++)
		line->argv[line->argc++] = json_object_get_string(json_object_array_get_idx(words, i));
	return json;
}

static bool has_device(const struct line *line, const char *id)
{
	bool found = false;

	for (int i = 1; !found && i + 1 < line->argc; i++) {
		struct props props = { 0 };
		const char *its;

		if (strcmp(line->argv[i], "-device") && strcmp(line->argv[i], "--device"))
			continue;
		if (!props_parse(&props, line->argv[i + 1], "driver")) {
			its = props_get(&props, "id");
			found = its && !strcmp(its, id);
		}
		props_clear(&props);
	}
	return found;
}

/* The line does not say what was plugged in later. */
static void look_for_plugged(struct qmp *qmp, const struct line *line, char why[MACHINE_WHY_BYTES])
{
	struct json_object *list = ask(qmp, "qom-list", "{\"path\": \"/machine/peripheral\"}"), *name, *type;
	size_t count = json_object_is_type(list, json_type_array) ? json_object_array_length(list) : 0;

	for (size_t i = 0; !why[0] && i < count; i++) {
		struct json_object *one = json_object_array_get_idx(list, i);

		if (!json_object_object_get_ex(one, "name", &name) || !json_object_object_get_ex(one, "type", &type) ||
		    strncmp(json_object_get_string(type), "child<", 6))
			continue;
		if (!has_device(line, json_object_get_string(name)))
			snprintf(why, MACHINE_WHY_BYTES, "the device %.60s was plugged in while the VM ran",
				 json_object_get_string(name));
	}
	json_object_put(list);
}

void describe_machine(struct qmp *qmp, const char *run_dir, struct manifest *m)
{
	const char *saved[MANIFEST_DISKS];
	struct line *line = calloc(1, sizeof *line);
	struct json_object *json = line ? read_line(run_dir, line) : NULL;
	char type[64];

	for (uint32_t i = 0; i < m->disks; i++)
		saved[i] = m->disk[i].drive;
	m->machine_missing[0] = '\0';
	if (!line || !line->argc) {
		snprintf(m->machine_missing, sizeof m->machine_missing, "its " VMDIR_JSON " does not tell its command line");
	} else {
		ask_type(qmp, type);
		look_for_plugged(qmp, line, m->machine_missing);
		if (!m->machine_missing[0])
			(void)machine_from_argv(line->argc, line->argv, type, saved, m->disks, &m->machine,
						m->machine_missing);
	}
	json_object_put(json);
	free(line);
}

void describe_generation(struct qmp *qmp, struct manifest *m)
{
	struct json_object *value = ask(qmp, "query-vm-generation-id", "{}");
	const char *guid = json_object_is_type(value, json_type_object) ? text_of(value, "guid") : "";

	if (strlen(guid) + 1 == sizeof m->generation_id)
		memcpy(m->generation_id, guid, sizeof m->generation_id);
	json_object_put(value);
}
