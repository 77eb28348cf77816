/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Snapshots that cannot be mapped: packed ones, and those on a store elsewhere. */
#ifndef LATENT_CLI_LAZY_H
#define LATENT_CLI_LAZY_H

#include "snapshot/manifest.h"
#include "vmdir/agent_config.h"

#include <stdbool.h>

/* http://, https:// or s3:// */
bool lazy_is_url(const char *source);

/* Finds or starts the source's pager (vmdir/pager.h), and fills in what the agent gets, and the manifest. `source`:
 * a URL or an absolute path. Prints the sentence and returns an exit status on failure. */
int lazy_open(const char *source, struct agent_restore *restore, struct manifest *ret_manifest);
/* The descriptors of another VM that this process has inherited. */
void lazy_close(const struct agent_restore *restore);

#endif
