/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A store of pages that were taken out of guest RAM (reclaim.c), packed one by one into slots of a file
 * or of memory. Slots of one length lie in slabs of 64 KiB; a slab without a used slot serves any length
 * again, and one in memory is given back. There is no index of slots: a slot's number says where it is.
 *
 * Threading: "[m]" wants the caller to hold the mask lock; spill_pack is for one thread; the others for
 * any.
 */
#ifndef LATENT_CORE_SPILL_H
#define LATENT_CORE_SPILL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct spill;

struct spill_counts {
	uint64_t slots_now;
	uint64_t bytes_now;  /* of slots in use */
	uint64_t taken_now;  /* of slabs in use: what the store takes */
	uint64_t most_bytes; /* that it may take */
};

/* `fd` (borrowed) is written from its beginning on, up to `most_bytes`; at most 1 TiB of it.
 * `in_memory`: a memfd, of which freed slabs are punched, and where a page that packs badly is not worth
 * its slot. -ENOMEM; -EINVAL: not even one slab. */
int spill_open(int fd, uint64_t most_bytes, bool in_memory, struct spill **ret_spill);
void spill_close(struct spill *spill); /* NULL is allowed */

/* Packs a page; returns the bytes in `packed`, which has room for a page; 0: it is not worth it. */
size_t spill_pack(struct spill *spill, const void *page, uint8_t *packed);
/* [m] A slot for so many bytes. -ENOSPC: the store is full. */
int spill_reserve(struct spill *spill, size_t bytes, uint64_t *ret_slot);
int spill_write(struct spill *spill, uint64_t slot, const uint8_t *packed,
		size_t bytes); /* as os_write_all */
/* -EIO, -EBADMSG (not what was written there); may wait for storage. The slot is pinned, or the mask
 * lock held. */
int spill_read(struct spill *spill, uint64_t slot, void *page);
/* [m] What a pinned slot holds stays there, also when it is freed, until it is unpinned. */
void spill_pin(struct spill *spill, uint64_t slot);
void spill_unpin(struct spill *spill, uint64_t slot);
void spill_free(struct spill *spill, uint64_t slot);                          /* [m] */
void spill_count(const struct spill *spill, struct spill_counts *ret_counts); /* [m] */

#endif
