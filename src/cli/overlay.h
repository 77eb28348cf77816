/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Empty qcow2 files over another image. qemu-img makes one for each virtual size, once: ROOT/.overlay-SIZE-FORMAT;
 * from then on a new overlay is a copy of it with another name in it of what lies beneath.
 */
#ifndef LATENT_CLI_OVERLAY_H
#define LATENT_CLI_OVERLAY_H

#include <stdint.h>

/* `root`: the run directory. -EEXIST: `path` is there already; -EIO: qemu-img could not make it; else a negative
 * errno. Nothing is left on failure. */
int overlay_make(const char *root, const char *path, const char *backing, const char *format, uint64_t bytes);

#endif
