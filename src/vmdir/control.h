/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The agent's control socket: `control.sock` in the VM's run directory, SOCK_SEQPACKET, one request
 * and one reply a packet. Only the VM's own user and root are answered (SO_PEERCRED).
 */
#ifndef LATENT_VMDIR_CONTROL_H
#define LATENT_VMDIR_CONTROL_H

#include <stdint.h>

#define CONTROL_MAGIC 0x4c43544cu /* "LTCL" */
#define CONTROL_VERSION 11u

enum control_op {
	CONTROL_REFRESH, /* bring the statistics up to date: copies from pagemap, groups, mappings */
	CONTROL_DETACH,  /* turn overlays of `path` (empty: all) into plain RAM and map it no more */
	/*
	 * A save, in this order, over one connection; its end, by whatever cause, ends the save too.
	 *   LOAD   asked again until `pages` is `pages_all`: what was given back to the host (RECLAIM) comes back; then
	 *          what a pager still has to load of guest RAM comes before all else, but for what is waited for; until
	 *          the connection ends
	 *   BEGIN  guest RAM is held (ram_hold) and registered for write-protection. The reply is followed by
	 *          a struct control_layout with descriptors.
	 *   WATCH  from now on it is noted which pages are touched, and when
	 *   SETTLE asked again until `pages_all` is 0: private copies in overlays, whose writes nobody could note, become
	 *          base, the guest standing for a moment at a time, as far as the budget of mappings allows. A migration's
	 *   ARM    base is write-protected; who writes a page of it goes on, and it is noted. What is protected now and
	 *          was not before is in the table of changed pages. A migration arms again, as often as it likes.
	 *          A save's: private copies are copied out, where it can be seen which of them are written then
	 *   PASS   a migration's, after ARM: what is changed is told now, which takes so long; `path`: microseconds, in
	 *          decimal; 0: not known. If there is a scan, it goes on at that pace until POINT
	 *   POINT  with the guest stopped: private copies are copied out, or those of them that were written since; each
	 *          has its place in the file of copies, which is that of its page among all pages. And base that is not
	 *          protected, or not any more, is. From then on the other side has to serve write faults.
	 *   GIVE   a migration's, before the token is sent: the guest belongs to another host from now on, and is not let
	 *          go on when the connection ends
	 *   END    protection is taken away.
	 */
	CONTROL_SAVE_LOAD,
	CONTROL_SAVE_BEGIN,
	CONTROL_SAVE_WATCH,
	CONTROL_SAVE_SETTLE,
	CONTROL_SAVE_ARM,
	CONTROL_SAVE_PASS,
	CONTROL_SAVE_POINT,
	CONTROL_SAVE_GIVE,
	CONTROL_SAVE_END,
	CONTROL_TAKE, /* a spare gets the name `path`, and its guest runs. -EALREADY: it is none, or no more */
	CONTROL_STOP_REST, /* what the guest has not touched is loaded no more. -EALREADY: nothing was being loaded */
	CONTROL_SCAN, /* look at what the guest uses; `path`: the period in microseconds, in decimal; 0: no more */
	CONTROL_ENTRIES, /* the reply is followed by a struct control_layout without volumes, with the table of each
			  * block's page entries (core/entry.h), which nobody but the agent can write */
	CONTROL_RECLAIM, /* give back the memory of pages that were not used for so long; `path`:
			  * microseconds, in decimal, and, behind a space, that it is enough when the VM
			  * takes so many bytes of memory. The reply comes at once; the statistics tell
			  * how far it is. -EALREADY: it goes on already. 0: it shall end */
	CONTROL_INCOMING, /* another mover brings what a migration to this host still owes: the reply is followed by
			   * an empty struct control_layout with its end of a new channel (vmdir/incoming.h).
			   * -EALREADY: there is one */
	CONTROL_RECLAIM_STORE, /* what is given back goes to the file whose descriptor comes with the request, from now
				* on; `path`: at most so many bytes of it, in decimal. -EALREADY: there is one */
	CONTROL_OPS
};

struct control_request {
	uint32_t magic, version, op, reserved;
	char path[4096]; /* NUL-terminated */
};

struct control_reply {
	uint32_t magic, version;
	int32_t error;         /* 0 or a negative errno */
	uint32_t reserved;
	uint64_t pages;        /* CONTROL_DETACH, SAVE_SETTLE: pages settled; SAVE_POINT: private pages copied; SAVE_LOAD:
				* loaded, */
	uint64_t pages_all;    /* of so many; SAVE_SETTLE: pages that are still to be looked at */
	uint64_t paused_us;    /* CONTROL_DETACH: how long the guest was stopped; SAVE_POINT: its threads */
	uint64_t private_runs; /* CONTROL_SAVE_POINT: in the table of runs */
	char text[512];        /* with error: one sentence with the remedy */
};

/* Pages that the guest may write to while a save goes on, and that are copied for it, at most: between BEGIN and
 * POINT those that become private, in the VM's memory; after that the writer keeps as many in its own. */
#define CONTROL_SAVE_EARLY_PAGES 16384u /* 64 MiB */

/* Follows the reply to SAVE_BEGIN, and that to ENTRIES. */
struct control_layout {
	uint32_t blocks, volumes;
	uint32_t has_cache, cache_file; /* pages are mapped from a pager's cache; cache_file: its index in page entries */
	struct control_block {
		char name[64];
		uint64_t pages, hva, memfd_offset;
	} block[64];
	struct control_volume {
		char path[256]; /* as the VMM opened it */
		uint64_t dev, ino, pages;
		uint32_t file, reserved; /* file: the index in page entries */
	} volume[32];
	/* Files that origins name (core/origin.h), by their numbers there. */
	uint32_t origins, reserved;
	struct control_origin {
		uint64_t dev, ino;
	} origin[32];
};

/* The descriptors of SAVE_BEGIN: these, for each block its memfd, the table of its page entries and that of its pages'
 * origins, and if there is a cache, that (it is whole) and the `pages` of the snapshot that it is of. */
enum control_save_fd {
	CONTROL_FD_UFFD,   /* write faults; addresses are the VMM's */
	CONTROL_FD_RUNS,   /* struct control_run; written by SAVE_POINT */
	CONTROL_FD_COPIES, /* contents of private copies, each where its page is among all pages; written by SAVE_ARM and _POINT */
	CONTROL_FD_SEEN,   /* uint16_t for each page of each block: when it was touched first (activity/seen.h) */
	CONTROL_FD_CHANGED, /* a byte for each page of each block: 1 from SAVE_ARM and SAVE_POINT; the other side's to clear */
	CONTROL_FD_BLOCKS
};
#define CONTROL_FDS_PER_BLOCK 3

struct control_run {
	uint64_t block, page, pages;
};

#endif
