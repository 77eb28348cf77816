/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What does not go together with guest RAM that comes from several files, as a table. `latent run`
 * looks things up by their names on the command line, the agent when they come by hot-plug.
 * Whatever is not in the table is fine.
 */
#ifndef LATENT_VMDIR_COMPAT_H
#define LATENT_VMDIR_COMPAT_H

#include <stdbool.h>
#include <stddef.h>

/* What a rule is about, and what the name means there. */
enum compat_subject {
	COMPAT_DEVICE,     /* -device, device_add: the driver */
	COMPAT_NETDEV,     /* -netdev, -nic, netdev_add: the type */
	COMPAT_FSDEV,      /* -fsdev, -virtfs: the driver */
	COMPAT_OBJECT,     /* -object, object-add: the QOM type */
	COMPAT_BLOCKDEV,   /* -blockdev, -drive, blockdev-add: the driver, or a file's protocol */
	COMPAT_MACHINE,    /* -machine: the type */
	COMPAT_OVERCOMMIT, /* -overcommit: nothing, only properties */
	COMPAT_MIGRATION,  /* -incoming: the protocol */
	COMPAT_FILE,       /* a device node that the VMM opens while it runs */
	COMPAT_SUBJECTS
};

/* What must not be used. */
#define COMPAT_OVERLAYS (1u << 0) /* files mapped over guest RAM */
#define COMPAT_MASKS (1u << 1)    /* pages that a fault has to bring */

struct compat_rule {
	enum compat_subject subject;
	const char *name;     /* a pattern as in fnmatch(3) */
	const char *property; /* NULL, or: only where this property is set and not off */
	unsigned excludes;
	const char *why; /* the end of a sentence that begins with the name */
};

/* The value of a property of the thing that is looked up, or NULL. */
typedef const char *(*compat_property)(void *ctx, const char *property);

/* The first rule that holds, or NULL. `property` may be NULL: nothing has properties then. */
const struct compat_rule *compat_find(enum compat_subject subject, const char *name,
				      compat_property property, void *ctx);

/* "NAME: why", cut to `bytes`, for a rule found by `name`. */
void compat_sentence(const struct compat_rule *rule, const char *name, char *text, size_t bytes);

#endif
