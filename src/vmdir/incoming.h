/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Between the agent of a VM that is migrated to this host and its mover (`latent receive`): one SOCK_SEQPACKET, of which
 * the VMM inherits its end. The mover fills base through the memfds until the guest runs; for all else it asks. When
 * the guest runs, the agent says which pages are waited for, and the mover sends them. A mover that has died since
 * then is replaced by one that asks for a channel of its own (CONTROL_INCOMING), and finds in the page entries what
 * is still to come.
 *
 * Plain data. Whatever comes is checked by who receives it: the VMM is what a guest breaks out into.
 */
#ifndef LATENT_VMDIR_INCOMING_H
#define LATENT_VMDIR_INCOMING_H

#include <stdint.h>

#define INCOMING_MAGIC 0x4e49544cu /* "LTIN" */
#define INCOMING_RUNS 256u
#define INCOMING_PAGES 16u
#define INCOMING_PAGE_BYTES 4096u

enum incoming_op {
	/* The mover asks; each but PUT is answered by a struct incoming_reply. */
	INCOMING_LAYOUT, /* the reply is followed by a struct control_layout with, for each block, its memfd and the table of
			  * its page entries */
	INCOMING_MAP,    /* runs are pages of a volume from now on */
	INCOMING_BASE,   /* runs are base again, and hold nothing that counts */
	INCOMING_EXPECT, /* runs come later (core/ram.h, ram_expect) */
	INCOMING_PUT,    /* pages that have come */
	INCOMING_RUN,    /* the guest may run from now on. Before that, the end of the channel is the end of the VMM */
	INCOMING_END,    /* no page is expected any more: guest RAM is watched no more */
	/* The agent says: */
	INCOMING_WANTED, /* somebody waits for a page; may be said again */
	INCOMING_OPS
};

struct incoming_run {
	uint64_t page, file_page; /* of the block; of the volume */
	uint32_t block, pages, volume, reserved;
};

struct incoming_request {
	uint32_t magic, op, count, reserved;
	struct incoming_run run[INCOMING_RUNS]; /* as many as `count`; no more are sent */
};

struct incoming_put {
	uint32_t magic, op, count, reserved;
	struct incoming_place {
		uint64_t page;
		uint32_t block, reserved;
	} place[INCOMING_PAGES];
	uint8_t contents[INCOMING_PAGES][INCOMING_PAGE_BYTES]; /* as many as `count` */
};

/* Of an answer, and of INCOMING_WANTED. */
struct incoming_reply {
	uint32_t magic, op;
	int32_t error;  /* 0 or a negative errno */
	uint32_t block; /* INCOMING_WANTED */
	uint64_t page;
	uint64_t expected; /* pages, now */
};

#endif
