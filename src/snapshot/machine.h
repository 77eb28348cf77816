/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What a VM was started as, in fields that may be believed whoever has written them: options, devices, properties
 * and forms of values that are in a table (machine.c). Nothing in them names a file, runs a program or opens a
 * port of the host. Disks are called by their names alone; whoever starts the VM gives them their files.
 *
 * Errors are negative errno values; -ENOTSUP, -EBADMSG: `why` says in a sentence what cannot be described, or
 * what is wrong.
 */
#ifndef LATENT_SNAPSHOT_MACHINE_H
#define LATENT_SNAPSHOT_MACHINE_H

#include "vmdir/props.h"

#include <json-c/json.h>

#define MACHINE_OPTIONS 256
#define MACHINE_PROPS 48
#define MACHINE_WHY_BYTES 160

struct machine_option {
	char name[24]; /* without dashes */
	struct props props;
};

struct machine {
	char type[64]; /* with its version: what an alias stands for differs from one QEMU to the next */
	size_t count;
	struct machine_option option[MACHINE_OPTIONS];
};

/*
 * From the command line of a VM whose machine is of this type. `saved`: names of its disks that are saved. What is
 * the host's alone (monitors, displays, the kernel that it booted, ports that are forwarded) is left out, and
 * where a chardev had a path it becomes a socket in the run directory, or null.
 */
int machine_from_argv(int argc, const char *const *argv, const char *type, const char *const *saved,
		      unsigned saved_count, struct machine **ret_machine, char why[MACHINE_WHY_BYTES]);

struct json_object *machine_to_json(const struct machine *machine);
int machine_from_json(struct json_object *json, struct machine **ret_machine, char why[MACHINE_WHY_BYTES]);

/* The command line, argv[0] included, ends with NULL; disks have no files yet. To be freed with
 * machine_free_argv. -ENOMEM. */
int machine_to_argv(const struct machine *machine, int *ret_argc, char ***ret_argv);
void machine_free_argv(char **argv);

void machine_free(struct machine *machine); /* NULL is allowed */

#endif
