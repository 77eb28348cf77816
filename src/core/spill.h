/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A store of pages that were taken out of guest RAM (reclaim.c), packed one by one into slots of memory or of a file.
 * Slots of one length lie in slabs of 64 KiB; a slab without a used slot serves any length again, and one in memory is
 * given back. There is no index of slots: a slot's number says where it is. Contents are never wrong: what is read is
 * compared with a sum.
 *
 * Threading: "[m]" wants the caller to hold the mask lock; spill_pack, spill_write and spill_flush are for one thread;
 * the others for any.
 */
#ifndef LATENT_CORE_SPILL_H
#define LATENT_CORE_SPILL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct spill;

/* Once there is a file, what comes goes there. In memory a page that packs badly is not worth its slot; a file takes
 * it as it is. */
enum spill_kind { SPILL_MEMORY, SPILL_FILE, SPILL_KINDS };

struct spill_counts {
	uint64_t slots_now;
	uint64_t bytes_now;  /* of slots in use */
	uint64_t taken_now;  /* of slabs in use: what the store takes */
	uint64_t most_bytes; /* that it may take */
};

int spill_open(struct spill **ret_spill); /* -ENOMEM */
/* [m] `fd` (borrowed) is written from its beginning on, up to `most_bytes`; at most 1 TiB of it. SPILL_MEMORY: a memfd,
 * of which freed slabs are punched. -EALREADY: there is one of this kind; -ENOMEM; -EINVAL: not even one slab. */
int spill_add(struct spill *spill, enum spill_kind kind, int fd, uint64_t most_bytes);
void spill_close(struct spill *spill); /* NULL is allowed */

bool spill_has(const struct spill *spill, enum spill_kind kind); /* [m] */

/* Packs a page; returns the bytes in `packed`, which has room for a page; 0: it is not worth it. */
size_t spill_pack(struct spill *spill, const void *page, uint8_t *packed);
/* [m] A slot for so many bytes. -ENOSPC: the store is full. */
int spill_reserve(struct spill *spill, size_t bytes, uint64_t *ret_slot);
int spill_write(struct spill *spill, uint64_t slot, const uint8_t *packed,
		size_t bytes); /* as os_write_all */
/* What was written to a file is there, and no memory of the host is taken by it any more. -EIO, -ENOSPC: nobody knows
 * what became of slots that were written since the last time; nobody may rely on them. */
int spill_flush(struct spill *spill);
/* A pinned slot will be read soon. */
void spill_expect_read(struct spill *spill, uint64_t slot);
/* -EIO, -EBADMSG (not what was written there); may wait for storage. The slot is pinned, or the mask
 * lock held. */
int spill_read(struct spill *spill, uint64_t slot, void *page);
/* [m] What a pinned slot holds stays there, also when it is freed, until it is unpinned. */
void spill_pin(struct spill *spill, uint64_t slot);
void spill_unpin(struct spill *spill, uint64_t slot);
void spill_free(struct spill *spill, uint64_t slot);                          /* [m] */
void spill_count(const struct spill *spill, enum spill_kind kind, struct spill_counts *ret_counts); /* [m] */

#endif
