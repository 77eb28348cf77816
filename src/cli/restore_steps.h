/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The steps of a restore, for people's tools. */
#ifndef LATENT_CLI_RESTORE_STEPS_H
#define LATENT_CLI_RESTORE_STEPS_H

#include "vmdir/stats.h"

#include <json-c/json.h>

/* [{"step":, "us": since it was begun}], those that were done; times as in struct vm_stats. */
struct json_object *restore_steps_to_json(const uint64_t step_us[RESTORE_STEPS]);

#endif
