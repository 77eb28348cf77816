/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What a running VM is, for the manifest: its command line, and the machine type that QEMU made of it. */
#ifndef LATENT_SNAPSHOT_DESCRIBE_H
#define LATENT_SNAPSHOT_DESCRIBE_H

#include "snapshot/manifest.h"
#include "vmdir/qmp.h"

/* A disk of a -blockdev is called by the node that the command line has, also when earlier saves have put overlays
 * over it. */
void describe_nodes(struct qmp *qmp, struct manifest *manifest);

/* Sets `machine`, or `machine_missing`, of a manifest that has its disks. */
void describe_machine(struct qmp *qmp, const char *run_dir, struct manifest *manifest);
/* Sets `generation_id`, if the VM has a vmgenid device. */
void describe_generation(struct qmp *qmp, struct manifest *manifest);

#endif
