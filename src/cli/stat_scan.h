/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What `latent stat` shows of the memory that a guest uses. */
#ifndef LATENT_CLI_STAT_SCAN_H
#define LATENT_CLI_STAT_SCAN_H

#include "vmdir/stats.h"

struct json_object;

/* Prints nothing if nobody has ever looked. */
void stat_print_scan(const struct vm_stats *stats);
/* The caller's. */
struct json_object *stat_scan_to_json(const struct scan_stats *scan);

#endif
