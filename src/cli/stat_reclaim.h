/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The part of `latent stat` that is about memory that was given back. */
#ifndef LATENT_CLI_STAT_RECLAIM_H
#define LATENT_CLI_STAT_RECLAIM_H

#include "vmdir/stats.h"

struct json_object;

void stat_print_reclaim(const struct vm_stats *stats);
struct json_object *stat_reclaim_to_json(const struct reclaim_stats *reclaim);

#endif
