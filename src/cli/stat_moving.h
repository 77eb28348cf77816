/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The part of `latent stat` that is about a migration that is under way. */
#ifndef LATENT_CLI_STAT_MOVING_H
#define LATENT_CLI_STAT_MOVING_H

#include "cli/vm_view.h"

struct json_object;

void stat_print_moving(const struct vm_view *view);
/* NULL: there is none. */
struct json_object *stat_moving_to_json(const struct vm_view *view);

#endif
