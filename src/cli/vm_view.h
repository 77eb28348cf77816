/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* A running VM as other commands see it: its statistics, read-only, and its agent's control socket. */
#ifndef LATENT_CLI_VM_VIEW_H
#define LATENT_CLI_VM_VIEW_H

#include "vmdir/control.h"
#include "vmdir/stats.h"
#include "vmdir/vmdir.h"

/*
 * The VMM is what a guest breaks out into, so neither its statistics nor its answers are trusted: they are
 * copied, and checked once. In the copies every text ends and is plain, and every index is within its
 * bounds; numbers may be anything.
 */
struct vm_view {
	char root[VMDIR_PATH_BYTES];
	char name[VMDIR_NAME_BYTES];
	int stats_fd;
	struct vm_stats stats; /* as it was at vm_view_open or the last vm_view_update */
};

/* -ENOENT: no live VM has this name. -EPROTO: its statistics are of another version of Latent. */
int vm_view_open(const char *root, const char *name, struct vm_view *ret_view);
void vm_view_close(struct vm_view *view);

/* False: the VM that was opened has ended, also where another one has its name now. */
bool vm_view_is_live(const struct vm_view *view);

/* Reads the statistics again; the old ones stay on failure. */
int vm_view_update(struct vm_view *view);

/* Opens the VM that a user names; prints the sentence and returns an exit status on failure. */
int vm_view_find(const char *name, struct vm_view *ret_view);

/*
 * Asks the agent. 0 if there is a reply, whatever it says; -ETIMEDOUT, or another negative errno.
 * `path` may be NULL.
 */
int vm_view_ask(const struct vm_view *view, enum control_op op, const char *path, unsigned timeout_ms,
		struct control_reply *ret_reply);

/* The same with a descriptor (borrowed) that the agent shall have. */
int vm_view_give(const struct vm_view *view, enum control_op op, const char *path, int fd, unsigned timeout_ms,
		 struct control_reply *ret_reply);

/* What came of asking, as an exit status; where that is not CLI_OK a sentence was printed. `asked`: what asking has
 * returned; the reply counts where that is 0. */
int vm_view_status(const struct vm_view *view, int asked, const struct control_reply *reply);

/* The same in two steps, for what follows a reply: a connection, and a request and its reply over it. */
int vm_view_connect(const struct vm_view *view, unsigned timeout_ms);
int vm_view_ask_over(int control, enum control_op op, const char *path, struct control_reply *ret_reply);

/* Pages that are mapped from images and not copied. */
uint64_t vm_view_clean_pages(const struct vm_stats *stats);

#endif
