/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What Latent has to know of a QEMU command line: how much RAM, in which block, and what in it does
 * not go together with overlays. QEMU parses the line for itself afterwards; whatever is wrong with
 * it otherwise is for QEMU to say.
 */
#ifndef LATENT_CLI_QEMU_ARGS_H
#define LATENT_CLI_QEMU_ARGS_H

#include <stdint.h>

#define QEMU_ARGS_WHY_BYTES 512

struct qemu_plan {
	uint64_t ram_bytes;
	char block_name[64];   /* stock QEMU's name for the RAM block */
	char guest_name[64];   /* -name, cut; or empty */
	char missing[256];     /* an image that is not there, cut; or empty */
	char missing_of[256];  /* the image whose backing file it is, cut; or empty */
	char aio[16];          /* what a drive uses instead of threads, or empty */
	unsigned excludes;     /* enum of vmdir/compat.h: COMPAT_OVERLAYS, COMPAT_MASKS */
	char excluded_by[160]; /* the sentence for it, or empty */
};

/* Reads a whole file that -readconfig names. NULL: it cannot be read. The caller frees it. */
typedef char *(*qemu_args_read)(void *ctx, const char *path);

/*
 * argv[0] is the VMM. 0, or -ENOMEM, or -EINVAL: Latent cannot serve this line, and `why` says the
 * reason and the remedy in a sentence without a full stop. The plan is untouched then.
 */
int qemu_args_plan(int argc, const char *const *argv, qemu_args_read read, void *ctx,
		   struct qemu_plan *ret_plan, char why[QEMU_ARGS_WHY_BYTES]);

#endif
