/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The agent's control socket: `control.sock` in the VM's run directory, SOCK_SEQPACKET, one request
 * and one reply a packet. Only the VM's own user and root are answered (SO_PEERCRED).
 */
#ifndef LATENT_VMDIR_CONTROL_H
#define LATENT_VMDIR_CONTROL_H

#include <stdint.h>

#define CONTROL_MAGIC 0x4c43544cu /* "LTCL" */
#define CONTROL_VERSION 1u

enum control_op {
	CONTROL_REFRESH, /* bring the statistics up to date: copies from pagemap, groups, mappings */
	CONTROL_DETACH,  /* turn overlays of `path` (empty: all) into plain RAM and map it no more */
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
	uint64_t pages;        /* CONTROL_DETACH: pages settled */
	uint64_t paused_us;    /* CONTROL_DETACH: how long the guest was stopped */
	char text[512];        /* with error: one sentence with the remedy */
};

#endif
