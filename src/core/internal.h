/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* What ram.c (blocks, ranges, overlays) and mask.c (pages that are made when they are touched) share. */
#ifndef LATENT_CORE_INTERNAL_H
#define LATENT_CORE_INTERNAL_H

#include "core/ram.h"
#include "core/spill.h"
#include "os/os.h"

#include <assert.h>

struct ram_file {
	bool used;
	bool watched;           /* see ram_file_is_watched */
	bool copy_only;         /* masked pages of it are copied from now on, and not mapped */
	_Atomic unsigned privatizing; /* threads that copy its pages just now, with no lock */
	int fd;
	uint64_t pages;
	uint64_t overlay_pages; /* entries that map it, */
	uint64_t mapped_pages;  /* and of those the ones without a copy of their own */
	uint64_t masked_pages;  /* entries that will get their contents from it; under the mask lock */
	struct ram_observer observer;
};

/* Of masked pages of one repeated word. Who has a word's number may read it without a lock: chunk k has
 * twice as many as the one before it, and stays where it is. See word_at in mask.c. */
#define WORDS_FIRST_CHUNK 64u
struct ram_words {
	uint64_t *chunks[ENTRY_PAGE_BITS];
	uint64_t count;
};

/* Of pages whose memory is given back; see reclaim.c. Under the mask lock but what is said. */
struct ram_reclaim {
	struct spill *spill; /* the store; NULL: nothing is reclaimed */
	bool allowed;
	/* The unit under way. Changed under both locks; its pages are all in one watched mapping. */
	struct ram_block *block; /* NULL: none */
	uint64_t page, pages;
	bool take[RAM_RECLAIM_PAGES]; /* protected, and nobody has touched it since */
	struct ram_reclaim_counts counts;
	pthread_mutex_t reads_lock; /* the last lock; protects the next */
	struct ram_read *reads;
};

struct ram {
	pthread_mutex_t lock; /* the range lock: protects everything below but what is said */
#ifndef NDEBUG
	pthread_t holder;
	bool held;
#endif
	struct ram_block *blocks[RAM_BLOCKS]; /* slots are read without the lock by ram_find */
	struct ram_file files[ENTRY_FILES];
	struct ram_counts counts;
	struct ram_source_counts sources;
	bool base_held; /* see ram_hold */
	struct os_pagemap *pagemap; /* used under the lock */
	int single_uffd;            /* see ram_single_by */
	bool single_overlays;

	/*
	 * The mask lock: whoever changes the entry of a page in a watched mapping, or that mapping, has it; behind
	 * the range lock, if he has that one. Nobody touches guest RAM by its address with it, and so the thread
	 * that makes masked pages, which needs it, always goes on.
	 */
	pthread_mutex_t mask_lock;
	int uffd; /* borrowed; -1: pages cannot be masked */
	struct ram_words words;
	struct ram_mask_counts mask_counts;
	struct ram_reclaim reclaim;
	uint64_t expected; /* pages; under the mask lock */
};

static inline void assert_locked(struct ram *ram)
{
#ifndef NDEBUG
	assert(ram->held && pthread_equal(ram->holder, pthread_self()));
#else
	(void)ram;
#endif
}

/* Without the page's activity and its source bit, which are other matters. */
static inline uint64_t entry_get(const struct ram_block *b, uint64_t page)
{
	return atomic_load_explicit(&b->entries[page], memory_order_relaxed) & ~(ENTRY_ACTIVITY | ENTRY_SOURCE_BIT);
}

static inline bool entry_has_source_bit(const struct ram_block *b, uint64_t page)
{
	return atomic_load_explicit(&b->entries[page], memory_order_relaxed) & ENTRY_SOURCE_BIT;
}

/* Sets the bits of `mask`; others may change the rest of the word at the same time. */
static inline void entry_change(struct ram_block *b, uint64_t page, uint64_t mask, uint64_t bits)
{
	uint64_t old = atomic_load_explicit(&b->entries[page], memory_order_relaxed);

	while (!atomic_compare_exchange_weak_explicit(&b->entries[page], &old, (old & ~mask) | bits,
						      memory_order_relaxed, memory_order_relaxed))
		;
}

/* The page's activity stays; its source bit goes. */
static inline void entry_set(struct ram_block *b, uint64_t page, uint64_t entry)
{
	entry_change(b, page, ~ENTRY_ACTIVITY, entry);
}

static inline void *page_hva(const struct ram_block *b, uint64_t page)
{
	return b->hva + os_bytes(page);
}

static inline uint64_t memfd_at(const struct ram_block *b, uint64_t page)
{
	return b->memfd_offset + os_bytes(page);
}

/* ram.c */

/* Mappings that begin at pages first..last; a mapping that begins with the block is not counted. */
uint64_t count_starts(const struct ram_block *b, uint64_t first, uint64_t last);
bool within_budget(struct ram *ram, uint64_t more_maps);
/* [locked, and with the mask lock] ram_map_overlay. */
int map_overlay(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages, unsigned file, uint64_t file_page);

/* mask.c */

/* [locked, and with the mask lock] A watched mapping, from what is base or watched. */
int mask_watch(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages);
/* The same: what is watched for pages that are not there is watched for writes, too, from now on. */
int mask_watch_writes(struct ram *ram);
/* Mappings that mask_watch adds. */
uint64_t mask_more_maps(const struct ram_block *b, uint64_t page, uint64_t pages);
/* With the mask lock: the entry of a page in a watched mapping, which was not masked. */
void mask_set(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t entry);
uint64_t word_at(const struct ram_words *words, uint64_t number);
/* [locked] A watched mapping: see ram_single. */
int mask_single(struct ram *ram, void *hva, size_t bytes, bool on);

/* With the mask lock: */

/* The page's entry is about to become another one: it needs no contents any more. */
void mask_forget(struct ram *ram, uint64_t entry);
/* Masked pages among these read as zeros from now on. */
void mask_drop(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages);
/* What the page of a masked entry holds; may wait for storage. */
int mask_read(struct ram *ram, uint64_t entry, void *page);
/* Writes the contents of masked pages into the memfd; for a range that is mapped no more. */
void mask_rescue(struct ram *ram, struct ram_block *b, uint64_t page, uint64_t pages);

/* reclaim.c */

/* These pages get other contents, another mapping, or another watcher: those of the unit under way stay.
 * With the mask lock; for pages that are not watched, with the range lock alone. */
void reclaim_leave(struct ram *ram, const struct ram_block *b, uint64_t page, uint64_t pages);
/* With the mask lock. Somebody waits for the page: it may be written from now on. */
void reclaim_touched(struct ram *ram, struct ram_block *b, uint64_t page);
/* [locked, and with the mask lock] Nothing of the unit under way is taken. */
void reclaim_cancel(struct ram *ram);

#endif
