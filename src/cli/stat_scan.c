/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "cli/stat_scan.h"

#include "activity/scan.h"
#include "cli/cli.h"

#include <json-c/json.h>
#include <stdio.h>

#define PAGE_BYTES 4096

static const struct {
	const char *key, *text;
} windows[SCAN_WINDOWS] = {
	[SCAN_WINDOW_10S] = { "working_set_pages_10s_now", "10 s" },
	[SCAN_WINDOW_1M] = { "working_set_pages_1m_now", "1 min" },
	[SCAN_WINDOW_10M] = { "working_set_pages_10m_now", "10 min" },
};

static const char *const class_texts[ACTIVITY_CLASSES] = {
	[CLASS_NEW] = "not known",
	[CLASS_HOT] = "hot: used at every look",
	[CLASS_WARM] = "warm: used at the last look",
	[CLASS_COOL] = "cool: not used at one look or two",
	[CLASS_COLD] = "cold: not at three to five",
	[CLASS_FROZEN] = "frozen: not at six, or never",
};

static const char *const source_texts[SCAN_SOURCES] = {
	[SCAN_BASE] = "zap while the guest runs",
	[SCAN_CLEAN] = "zap with threads stopped (pages of files)",
	[SCAN_NOTHING] = "none (copies of image pages)",
};

static void print_working_sets(const struct scan_stats *scan)
{
	char size[CLI_SIZE_TEXT];

	printf("  working set over");
	for (unsigned i = 0; i < SCAN_WINDOWS; i++) {
		uint64_t pages = stat_get(&scan->in_use_now[i]);

		printf("%s %s: %s", i ? "," : "", windows[i].text,
		       pages == SCAN_UNKNOWN ? "not known yet" : cli_size(pages * PAGE_BYTES, size));
	}
	printf("\n");
}

static void print_sources(const struct scan_stats *scan)
{
	char size[CLI_SIZE_TEXT];

	for (unsigned i = 0; i < SCAN_SOURCES; i++) {
		uint64_t pages = stat_get(&scan->by_source_now[i]),
			 grain = stat_get(&scan->granularity_now[i]);

		if (!pages)
			continue;
		printf("  seen by %s: %s", source_texts[i], cli_size(pages * PAGE_BYTES, size));
		if (i != SCAN_NOTHING)
			printf(", by %s", grain == 1 ? "single pages" : "groups of up to 16 pages");
		printf("\n");
	}
}

void stat_print_scan(const struct vm_stats *stats)
{
	const struct scan_stats *scan = &stats->scan;
	uint64_t period_us = stat_get(&scan->period_us_now);
	char size[CLI_SIZE_TEXT];

	if (!period_us && !stat_get(&scan->passes))
		return;
	if (period_us)
		printf("\nMemory by activity, looked at every %.1f s%s\n", (double)period_us / 1e6,
		       stat_get(&scan->paused_now) ? "; not while it is being saved" : "");
	else
		printf("\nMemory by activity, as of when the scan was turned off\n");
	for (unsigned i = 0; i < ACTIVITY_CLASSES; i++) {
		uint64_t bytes = stat_get(&scan->pages_now[i]) * PAGE_BYTES;

		printf("  %-34s %9s  %5.1f %%\n", class_texts[i], cli_size(bytes, size),
		       stats->ram_bytes ? 100 * (double)bytes / (double)stats->ram_bytes : 0);
	}
	print_working_sets(scan);
	print_sources(scan);
	if (stat_get(&scan->writes_seen_now))
		printf("  writes are seen in %s (WP_ASYNC); pages found written %ju\n",
		       cli_size(stat_get(&scan->writes_seen_now) * PAGE_BYTES, size), (uintmax_t)stat_get(&scan->written));
	printf("  passes %ju; processor time of the last %.1f ms, of all %.1f s; pages sampled %ju, "
	       "brought back %ju\n",
	       (uintmax_t)stat_get(&scan->passes), (double)stat_get(&scan->pass_cpu_ns_now) / 1e6,
	       (double)stat_get(&scan->cpu_ns) / 1e9, (uintmax_t)stat_get(&scan->sampled),
	       (uintmax_t)stat_get(&scan->refaults));
	printf("  copies of image pages moved to its own memory %ju; the guest stood for %.1f ms in "
	       "all\n",
	       (uintmax_t)stat_get(&scan->settled), (double)stat_get(&scan->frozen_us) / 1e3);
	printf("  longest hold of guest RAM's lock %.2f ms, of processor time %.2f ms; over %u ms %ju "
	       "of %ju\n",
	       (double)stat_get(&scan->hold_max_us) / 1e3,
	       (double)stat_get(&scan->hold_max_cpu_us) / 1e3, SCAN_HOLD_MAX_US / 1000,
	       (uintmax_t)stat_get(&scan->long_holds), (uintmax_t)stat_get(&scan->holds));
}

static void add(struct json_object *json, const char *key, const stat_counter *value)
{
	json_object_object_add(json, key, json_object_new_uint64(stat_get(value)));
}

static struct json_object *sources_to_json(const struct scan_stats *scan)
{
	struct json_object *all = json_object_new_array();

	for (unsigned i = 0; i < SCAN_SOURCES; i++) {
		struct json_object *one = json_object_new_object();

		json_object_object_add(one, "source", json_object_new_string(scan_source_names[i]));
		add(one, "pages_now", &scan->by_source_now[i]);
		if (i != SCAN_NOTHING)
			add(one, "granularity_pages_now", &scan->granularity_now[i]);
		json_object_array_add(all, one);
	}
	return all;
}

struct json_object *stat_scan_to_json(const struct scan_stats *scan)
{
	struct json_object *json = json_object_new_object(), *classes = json_object_new_object();

	add(json, "period_us_now", &scan->period_us_now);
	add(json, "shortest_us_now", &scan->shortest_us_now);
	json_object_object_add(json, "paused_now",
			       json_object_new_boolean(stat_get(&scan->paused_now) != 0));
	for (unsigned i = 0; i < ACTIVITY_CLASSES; i++)
		add(classes, activity_class_names[i], &scan->pages_now[i]);
	json_object_object_add(json, "pages_now", classes);
	for (unsigned i = 0; i < SCAN_WINDOWS; i++) {
		uint64_t pages = stat_get(&scan->in_use_now[i]);
		bool known = stat_get(&scan->passes) && pages != SCAN_UNKNOWN;

		json_object_object_add(json, windows[i].key,
				       known ? json_object_new_uint64(pages) : NULL);
	}
	json_object_object_add(json, "sources", sources_to_json(scan));
	add(json, "passes", &scan->passes);
	add(json, "cpu_ns", &scan->cpu_ns);
	add(json, "pass_cpu_ns_now", &scan->pass_cpu_ns_now);
	add(json, "pages_sampled", &scan->sampled);
	add(json, "pages_brought_back", &scan->refaults);
	add(json, "writes_seen_pages_now", &scan->writes_seen_now);
	add(json, "pages_written", &scan->written);
	add(json, "copies_settled", &scan->settled);
	add(json, "frozen_us", &scan->frozen_us);
	add(json, "thinned_now", &scan->thin_now);
	add(json, "hold_max_us", &scan->hold_max_us);
	add(json, "hold_max_cpu_us", &scan->hold_max_cpu_us);
	add(json, "holds", &scan->holds);
	add(json, "holds_over_2ms", &scan->long_holds);
	add(json, "holds_over_2ms_cpu", &scan->long_cpu_holds);
	return json;
}
