/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Does this program load the agent, and is it a QEMU? Runs `VMM -version` once; a yes is remembered
 * in ROOT/.vmms for as long as neither the VMM nor the agent changes, so that later starts cost two
 * calls of stat.
 */
#ifndef LATENT_CLI_PREFLIGHT_H
#define LATENT_CLI_PREFLIGHT_H

#include <stddef.h>

#define PREFLIGHT_VERSION_BYTES 64
#define PREFLIGHT_WHY_BYTES 512

/*
 * `root` is the run directory, or NULL: nothing is remembered then. 0, and the version as the VMM
 * says it ("7.2.22"), or a negative errno and a sentence.
 */
int preflight(const char *vmm_path, const char *agent_path, const char *root,
	      char ret_version[PREFLIGHT_VERSION_BYTES], char why[PREFLIGHT_WHY_BYTES]);

/* "LD_PRELOAD" with the agent first and what is there already behind it. -EINVAL: the path has a
 * blank or a colon, which LD_PRELOAD cannot say. */
int preflight_set_preload(const char *agent_path);

#endif
