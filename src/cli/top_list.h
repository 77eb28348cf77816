/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The VMs that `latent top` shows: what they have, what they do per second, and a line of text for each.
 * One thread. */
#ifndef LATENT_CLI_TOP_LIST_H
#define LATENT_CLI_TOP_LIST_H

#include "vmdir/vmdir.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TOP_UNKNOWN UINT64_MAX
#define TOP_LINE_BYTES 256
#define TOP_NAME_MIN 12 /* columns */

/* Rates are NAN and numbers TOP_UNKNOWN where they are not known (yet). */
struct top_vm {
	char name[VMDIR_NAME_BYTES];
	uint32_t pid; /* 0: it is being started, or of another version of Latent */
	uint64_t ram_bytes;
	uint64_t base_pages, overlay_pages, private_pages, masked_pages; /* each page once */
	uint64_t hot_pages, warm_pages, cold_pages; /* warm: and cool; cold: and frozen */
	uint64_t used_10s_pages, used_1m_pages;     /* working sets */
	double cpu_percent, scan_percent;           /* of one processor */
	double refaults_per_s;
	/* As of when its rates were computed last: */
	uint64_t cpu_us_at, cpu_ticks, pass_us_at, passes, refaults;
};

enum top_order { TOP_BY_CPU, TOP_BY_MEMORY, TOP_BY_PID };

struct top_list {
	char root[VMDIR_PATH_BYTES];
	enum top_order order;
	struct top_vm *vm;
	size_t count;
};

/* Looks at all VMs of the user anew; those that are gone are not there any more. 0, or a negative errno
 * with the sentence in `why`; the list is as it was, then. */
int top_list_update(struct top_list *list, char why[VMDIR_WHY_BYTES]);
void top_list_sort(struct top_list *list);
void top_list_free(struct top_list *list);

/* What has room in so many columns of a terminal. */
struct top_layout {
	unsigned name_columns;
	uint32_t shown; /* a bit for each figure */
};

struct top_layout top_lay_out(const struct top_list *list, unsigned columns);
/* A line about all VMs; the headings, if `vm` is NULL, or a VM's line. */
void top_summary(const struct top_list *list, char text[TOP_LINE_BYTES]);
void top_line(const struct top_layout *layout, const struct top_vm *vm, char text[TOP_LINE_BYTES]);

/* top_screen.c: shows the list on a terminal, `rounds` times (0: until the user ends it). An exit
 * status; after an error the sentence was printed. The terminal is as it was, whatever ends it, but for
 * SIGKILL. */
int top_screen(struct top_list *list, double delay_s, uint64_t rounds);

#define TOP_DELAY_MIN_S 0.1
#define TOP_DELAY_MAX_S 3600.0

#endif
