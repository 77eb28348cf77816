/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The pager: one process for each user and snapshot whose RAM cannot be mapped (packed, or on a store elsewhere). It
 * fills a memfd that is laid out as `ram`, the *cache*, which all VMs of the snapshot on this host map; see
 * "Sources that cannot be mapped" in ARCHITECTURE.md. Here: how it is found, started and talked to.
 *
 *   ROOT/.pagers/ID.sock   SOCK_SEQPACKET; ID is a hash of the source's name, which each request repeats
 *   ROOT/.pagers/ID.lock   locked by the one that serves
 *
 * One connection is one VM. Only the user and root are answered (SO_PEERCRED). Nothing here allocates memory, but
 * for pager_starter_init: the agent calls it while other threads of the VMM, which may be in malloc, stand still.
 * Errors are negative errno values.
 */
#ifndef LATENT_VMDIR_PAGER_H
#define LATENT_VMDIR_PAGER_H

#include "vmdir/vmdir.h"

#include <spawn.h>
#include <stdint.h>

#define PAGER_MAGIC 0x4750544cu /* "LTPG" */
#define PAGER_VERSION 2u
#define PAGER_SOURCE_BYTES 1024
#define PAGER_PROGRAM "latent-pager"
#define PAGER_DIR ".pagers"
#define PAGER_BLOCKS 64

enum pager_op {
	PAGER_OPEN,   /* `latent restore`: what the VM begins with. The answer comes with descriptors: enum pager_fd */
	PAGER_ADOPT,  /* an agent whose pager is gone gives its successor cache, pages and index */
	PAGER_WATCH,  /* guest RAM is there; comes with a userfaultfd, whose faults are served from now on */
	/* What is loaded for this VM before somebody waits for it: all, also where LATENT_PREFETCH says nothing shall be; */
	PAGER_LOAD,
	PAGER_LOAD_REST,   /* all, for the guest runs; */
	PAGER_LOAD_ACTIVE, /* the active set, and no more, as from the beginning */
	PAGER_REPORT, /* of the pager, unasked */
	PAGER_OPS
};

enum pager_fd {
	PAGER_FD_CACHE,
	PAGER_FD_PAGES, /* as the snapshot's file */
	PAGER_FD_INDEX, /* the size of `ram.zst` (8 bytes), its header and its index; empty: `ram` is plain */
	PAGER_FDS_ADOPT,
	PAGER_FD_MANIFEST = PAGER_FDS_ADOPT,
	PAGER_FD_STATE,
	PAGER_FDS
};

struct pager_request {
	uint32_t magic, version, op, blocks;
	char source[PAGER_SOURCE_BYTES];
	struct pager_block {
		uint64_t hva, pages, first; /* first: page of the cache */
	} block[PAGER_BLOCKS];
};

struct pager_report {
	uint32_t magic, version, op; /* op: of the request that is answered */
	int32_t error;
	uint64_t pages_all, pages_present, bytes_fetched, faults;
	uint64_t waiting;   /* faults that wait now */
	uint64_t silent_ms; /* the store has been asked, and has not answered for so long */
	uint64_t wrong;     /* answers whose contents were not those that were saved */
	char text[256];     /* with error: one sentence. In a report: what is wrong now, or empty */
};

/* PATH of a file of a source's pager in `dir`. -ENAMETOOLONG. */
int pager_path(const char *dir, const char *source, const char *suffix, char ret_path[VMDIR_PATH_BYTES]);

struct pager_starter {
	posix_spawn_file_actions_t actions;
	posix_spawnattr_t attributes;
};
int pager_starter_init(struct pager_starter *starter);
/* It goes to the background at once; one that is not needed ends by itself. */
int pager_start(const struct pager_starter *starter, const char *program, const char *dir, const char *source);

/* A connection, which blocks for at most `timeout_ms` in each direction; -ECONNREFUSED, -ENOENT: nobody serves. */
int pager_connect(const char *dir, const char *source, unsigned timeout_ms);

int pager_send(int fd, const void *packet, size_t bytes, const int *fds, unsigned count);
/* The bytes of a packet, 0 at the end. Descriptors that came along go to `fds`, close-on-exec, `*count` of at most
 * that many; more are closed, and the packet is refused (-EPROTO). */
int pager_receive(int fd, void *packet, size_t bytes, int *fds, unsigned *count);

#endif
