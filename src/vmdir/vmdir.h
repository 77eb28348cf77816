/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The run-time directory: one root per user, in it one directory per VM.
 *
 *   ROOT/.lock           held for moments, while a VM's directory is claimed or cleaned
 *   ROOT/.vmms           VMMs that are known to load the agent (cli/preflight.c)
 *   ROOT/volumes/        tracking structures, shared by the user's VMs
 *   ROOT/NAME/lock       locked as long as the VM lives
 *   ROOT/NAME/stats      struct vm_stats
 *   ROOT/NAME/vm.json    command line, version of QEMU, time of start
 *   ROOT/NAME/qmp.sock      QMP, for the user's tools
 *   ROOT/NAME/mover.sock    QMP, for `latent save`
 *   ROOT/NAME/control.sock  the agent (vmdir/control.h)
 *
 * Directories have mode 0700, files 0600, and all have one owner; anything else is refused. Sockets are
 * what the umask makes them: nobody else gets into the directory. The lock is
 * an open-file-description lock (fcntl(2), F_OFD_SETLK): the VMM inherits the descriptor, so it
 * survives exec and the fork of -daemonize, and ends with the last process that has it. Whoever asks
 * "does it live" uses F_OFD_GETLK, which takes nothing.
 *
 * Functions return 0 or a negative errno; with one, `why` holds a sentence without a full stop for
 * the user, and other outputs are untouched. They may be called from any thread.
 */
#ifndef LATENT_VMDIR_VMDIR_H
#define LATENT_VMDIR_VMDIR_H

#include <stdbool.h>
#include <stddef.h>

#define VMDIR_PATH_BYTES 256
#define VMDIR_NAME_BYTES 64
#define VMDIR_WHY_BYTES 512

#define VMDIR_LOCK "lock"
#define VMDIR_STATS "stats"
#define VMDIR_JSON "vm.json"
#define VMDIR_QMP "qmp.sock"
#define VMDIR_CONTROL "control.sock"
#define VMDIR_MOVER "mover.sock"
#define VMDIR_VOLUMES "volumes"

/* A VM's directory that this process has claimed. */
struct vmdir {
	char name[VMDIR_NAME_BYTES];
	char path[VMDIR_PATH_BYTES]; /* absolute */
	int lock_fd;                 /* close-on-exec, as is stats_fd */
	int stats_fd;
};

/* [A-Za-z0-9][A-Za-z0-9_.-]{0,62}, and not "volumes". */
bool vmdir_name_ok(const char *name);

/* Finds the root, checks it, and creates it and volumes/ when `create`. -ENOENT: there is none. */
int vmdir_root(bool create, char ret_root[VMDIR_PATH_BYTES], char why[VMDIR_WHY_BYTES]);

/* Creates the directory of a VM, with lock and stats; one that a dead VM left is emptied first.
 * -EEXIST: a live VM has this name. Nothing is left behind on failure. */
int vmdir_claim(const char *root, const char *name, struct vmdir *ret_dir, char why[VMDIR_WHY_BYTES]);

/* Gives a claimed directory up: removes it and closes the descriptors. */
void vmdir_abandon(struct vmdir *dir);

/* Removes a VM's directory with all files in it, the lock last. Only for who holds the lock. */
int vmdir_remove(const char *path);

/* The same for a directory whose lock nobody holds. -EEXIST: somebody does. */
int vmdir_remove_if_dead(const char *path);

/* Gives a live VM's directory another name; for the VM itself. -EEXIST: another live VM has it. */
int vmdir_rename(const char *root, const char *from, const char *to, char why[VMDIR_WHY_BYTES]);

/* PATH of a file in a VM's directory. -ENAMETOOLONG. */
int vmdir_path(const char *root, const char *name, const char *file, char ret_path[VMDIR_PATH_BYTES]);

/* A connection to a UNIX socket of this type; connecting, sending and receiving end after `timeout_ms`. Returns
 * the descriptor, -ETIMEDOUT (the backlog is full) or another negative errno. */
int vmdir_connect(const char *path, int type, unsigned timeout_ms);

/* True while the VM's lock is held. */
bool vmdir_is_live(const char *root, const char *name);

/* Calls `each` for every live VM, in the order of names, and removes what dead ones left. A result
 * other than 0 ends it and is returned. */
int vmdir_for_each(const char *root, int (*each)(void *ctx, const char *name), void *ctx);

#endif
