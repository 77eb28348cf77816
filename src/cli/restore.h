/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* One VM restored from a snapshot; for `latent restore` and `latent spare`. */
#ifndef LATENT_CLI_RESTORE_H
#define LATENT_CLI_RESTORE_H

#include "cli/run.h"
#include "snapshot/manifest.h"
#include "vmdir/vmdir.h"

#include <json-c/json.h>
#include <sys/types.h>

struct restore_request {
	const char *dir;       /* the snapshot's, or its URL */
	const char *disks_from; /* where its disks are, if not there; or NULL */
	const struct manifest *manifest; /* by restore_prepare, */
	struct agent_restore opened; /* and, of a URL, what came with it, for one VM; the others open it again */
	const char *name;      /* of the VM; NULL: the saved one's, with the process id if that is taken */
	const char *disks_dir; /* where the new overlays go; absolute: -daemonize leaves the current directory */
	unsigned number;       /* of the clone or spare; 0: none */
	uint64_t attempt;      /* random, by restore_prepare: new overlays have it in their names, and nobody else's have */
	enum agent_restore_then then;
	int report_fd;         /* struct agent_report goes there, or -1 */
	bool rest;             /* what the guest has not touched is loaded, too */
	uint64_t begun_us;
	int argc;              /* QEMU's line; 0: the snapshot's */
	char **argv;
};

/* Reads the manifest, and makes `request` have a line of QEMU's. Prints the sentence and returns an exit status on
 * failure; the manifest's machine is the caller's to free. */
int restore_prepare(struct restore_request *request, struct manifest *ret_manifest);

/* Between two steps: where tests let it fail, or be killed (LATENT_FAULT=restore_step:N:…). */
int restore_step(void);

/* Becomes QEMU. Comes back only on failure, with an exit status, after the sentence was printed; nothing is left. */
int restore_become(const struct restore_request *request);

/* The new disks that this attempt has made for the VM; there need not be any. */
void restore_remove_overlays(const struct manifest *manifest, const char *disks_dir, const char *name,
			     uint64_t attempt);

/* ---- VMs in the background --------------------------------------------------------------------- */

struct restored {
	char name[VMDIR_NAME_BYTES];
	uint64_t attempt; /* the request's */
	pid_t child, vmm; /* vmm: 0 until it has reported; another one with -daemonize */
	int report_fd, log_fd;
	bool ready;
	struct agent_report report; /* if ready */
};

/* A child process in a session of its own, with no input, whose output is kept; becomes QEMU. `root`: the run
 * directory. */
int restored_start(struct restore_request *request, const char *root, struct restored *ret_vm);
/* Its socket can be read. The report's kind, or -EPIPE: it has ended. */
int restored_read(struct restored *vm);
/* Its output gets a name in its run directory. */
void restored_keep_log(const struct restored *vm, const char *root);
/* Its last words. */
void restored_last_words(const struct restored *vm, char *text, size_t bytes);
/* Asks QEMU to end, and removes its disks. */
void restored_end(struct restored *vm, const struct manifest *manifest, const char *disks_dir);
/* Forgets it; it lives on. */
void restored_forget(struct restored *vm);

/* {"name":, "pid":, "steps": [{"step":, "us": since it was begun}]} */
struct json_object *restored_to_json(const struct agent_report *report);

#endif
