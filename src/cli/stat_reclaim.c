/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/stat_reclaim.h"

#include "cli/cli.h"

#include <json-c/json.h>
#include <stdio.h>

#define PAGE_BYTES 4096

void stat_print_reclaim(const struct vm_stats *stats)
{
	const struct reclaim_stats *c = &stats->reclaim;
	char a[CLI_SIZE_TEXT], b[CLI_SIZE_TEXT], d[CLI_SIZE_TEXT], e[CLI_SIZE_TEXT], f[CLI_SIZE_TEXT];

	if (!stat_get(&c->walks) && !stat_get(&c->looked_now))
		return;
	printf("\nGiven back to the host; the machine takes %s of memory now\n",
	       cli_size(stat_get(&c->memory_bytes_now), a));
	printf("  packed now %s, into %s of memory", cli_size(stat_get(&c->spilled_now) * PAGE_BYTES, a),
	       cli_size(stat_get(&c->spill_bytes_now), b));
	if (stat_get(&c->spill_file_most_bytes_now))
		printf(" and %s of a file of at most %s", cli_size(stat_get(&c->spill_file_bytes_now), d),
		       cli_size(stat_get(&c->spill_file_most_bytes_now), e));
	putchar('\n');
	printf("  so far: zeros %s, of one word %s, packed %s, and of that came back %s; pages of "
	       "images %s\n",
	       cli_size(stat_get(&c->zeros) * PAGE_BYTES, a),
	       cli_size(stat_get(&c->words) * PAGE_BYTES, b),
	       cli_size(stat_get(&c->spilled) * PAGE_BYTES, d),
	       cli_size(stat_get(&c->returned) * PAGE_BYTES, e),
	       cli_size(stat_get(&c->clean) * PAGE_BYTES, f));
	printf("  left where they were: pages used meanwhile %ju, being read into %ju, that do not pack "
	       "%ju, failed %ju\n",
	       (uintmax_t)stat_get(&c->left_touched), (uintmax_t)stat_get(&c->left_reads),
	       (uintmax_t)stat_get(&c->left_unpacked), (uintmax_t)stat_get(&c->left_failed));
}

static void add(struct json_object *json, const char *key, const stat_counter *value)
{
	json_object_object_add(json, key, json_object_new_uint64(stat_get(value)));
}

struct json_object *stat_reclaim_to_json(const struct reclaim_stats *c)
{
	struct json_object *json = json_object_new_object();

	add(json, "memory_bytes_now", &c->memory_bytes_now);
	add(json, "pages_zero", &c->zeros);
	add(json, "pages_of_one_word", &c->words);
	add(json, "pages_packed", &c->spilled);
	add(json, "pages_of_files", &c->clean);
	add(json, "pages_returned", &c->returned);
	add(json, "pages_packed_now", &c->spilled_now);
	add(json, "store_bytes_now", &c->spill_bytes_now);
	add(json, "store_file_bytes_now", &c->spill_file_bytes_now);
	add(json, "store_file_max_bytes_now", &c->spill_file_most_bytes_now);
	add(json, "left_used", &c->left_touched);
	add(json, "left_being_read", &c->left_reads);
	add(json, "left_not_packed", &c->left_unpacked);
	add(json, "left_failed", &c->left_failed);
	add(json, "looked_now", &c->looked_now);
	add(json, "walks", &c->walks);
	add(json, "error_now", &c->error_now);
	return json;
}
