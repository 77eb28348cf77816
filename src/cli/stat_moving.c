/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/stat_moving.h"

#include "cli/cli.h"
#include "vmdir/moving.h"

#include <json-c/json.h>
#include <stdio.h>

#define PAGE_BYTES 4096

/* One word of JSON and of text each. */
static const struct {
	const char *key, *text;
} sides[MOVING_SIDES] = {
	[MOVING_AWAY] = { "source", "to another host" },
	[MOVING_HERE] = { "destination", "to this host" },
}, phases[MOVING_PHASES] = {
	[MOVING_PREPARES] = { "prepares", "the other host prepares" },
	[MOVING_PASSES] = { "passes", "pages are told while it runs there" },
	[MOVING_SWITCHES] = { "switch", "the guest stands" },
	[MOVING_REST] = { "rest", "it runs there, and pages are still sent" },
};

static bool read_moving(const struct vm_view *view, struct moving *m)
{
	char run_dir[VMDIR_PATH_BYTES];

	snprintf(run_dir, sizeof run_dir, "%.180s/%.63s", view->root, view->name);
	return !moving_read(run_dir, m);
}

static const char *phase_text(const struct moving *m)
{
	static const char *const here[MOVING_PHASES] = { "the VM is prepared", "pages come while it runs there", "it is about to run",
							 "it runs here, and pages still come" };

	return m->cut ? "the link is cut, and the other host is waited for" : m->side == MOVING_HERE ? here[m->phase]
												    : phases[m->phase].text;
}

void stat_print_moving(const struct vm_view *view)
{
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT], c[CLI_SIZE_TEXT], d[CLI_SIZE_TEXT];
	struct moving m;

	if (!read_moving(view, &m))
		return;
	printf("\nMigration %s: %s\n", sides[m.side].text, phase_text(&m));
	if (m.side == MOVING_AWAY)
		printf("  pass %u, ", m.pass);
	else
		printf("  ");
	printf("%s %s; RAM told as words %s, as places on images %s, ", m.side == MOVING_AWAY ? "sent" : "received",
	       cli_size(m.bytes, a), cli_size(m.words * PAGE_BYTES, b), cli_size(m.volumes * PAGE_BYTES, c));
	printf("as the same content %s, as places on disks %s, as contents %s\n", cli_size(m.same * PAGE_BYTES, a),
	       cli_size(m.disks * PAGE_BYTES, b), cli_size(m.contents * PAGE_BYTES, c));
	printf("  %s %s; pages that were waited for %ju\n", m.side == MOVING_AWAY ? "to be told" : "missing",
	       cli_size(m.left * PAGE_BYTES, d), (uintmax_t)m.wanted);
}

static void add(struct json_object *json, const char *key, uint64_t number)
{
	json_object_object_add(json, key, json_object_new_uint64(number));
}

struct json_object *stat_moving_to_json(const struct vm_view *view)
{
	struct json_object *json;
	struct moving m;

	if (!read_moving(view, &m))
		return NULL;
	json = json_object_new_object();
	json_object_object_add(json, "side", json_object_new_string(sides[m.side].key));
	json_object_object_add(json, "phase", json_object_new_string(phases[m.phase].key));
	json_object_object_add(json, "cut", json_object_new_boolean(m.cut != 0));
	add(json, "pass", m.pass);
	add(json, "bytes", m.bytes);
	add(json, "pages_all_now", m.pages_all);
	add(json, "pages_words", m.words);
	add(json, "pages_on_volumes", m.volumes);
	add(json, "pages_same", m.same);
	add(json, "pages_on_disks", m.disks);
	add(json, "pages_contents", m.contents);
	add(json, "pages_left_now", m.left);
	add(json, "pages_wanted", m.wanted);
	return json;
}
