/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Guest RAM: blocks, ranges and page entries, and every transition between them. See "Guest RAM" in
 * ARCHITECTURE.md.
 *
 * Threading: one lock, the range lock. Functions marked [locked] want it held by the caller, the
 * others must not have it. It is held for mapping calls only, never while waiting for storage, for
 * the VMM's main loop or for another process.
 *
 * Errors: negative errno. A transition that fails leaves every page readable with either its old
 * contents or, where the caller had said that contents are free, any contents.
 *
 * "Contents are free" means: the guest is about to get something else there (a disk read into the
 * whole of these pages, a discard), so nobody may rely on what they hold now.
 */
#ifndef LATENT_CORE_RAM_H
#define LATENT_CORE_RAM_H

#include "core/entry.h"
#include "os/os.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define RAM_BLOCKS 64
#define RAM_NAME_BYTES 64

/* Why a guest page no longer maps a page of a file. */
enum ram_loss {
	RAM_LOST_COPIED,     /* written: the page is now a private copy */
	RAM_LOST_PRIVATIZED, /* made a private copy without being written, because the file may change */
	RAM_LOST_SETTLED,    /* its contents went to base */
	RAM_LOST_DROPPED,    /* discarded, overwritten, or its RAM block is gone */
};

/* Told, under the range lock, of every guest page that begins or ends to map a page of a file. */
struct ram_observer {
	void (*gained)(void *ctx, uint64_t file_page, uint64_t pages);
	void (*lost)(void *ctx, uint64_t file_page, uint64_t pages, enum ram_loss why);
	void *ctx;
};

struct ram_block {
	char name[RAM_NAME_BYTES];
	uint8_t *hva;
	uint64_t pages;
	int memfd;            /* borrowed */
	uint64_t memfd_offset; /* bytes */
	unsigned marks;       /* enum os_mark: what a new mapping gets */
	struct os_policy policy; /* and an overlay, too */
	_Atomic uint64_t *entries;
	int entries_fd;       /* the shared memory that holds the entries */
	_Atomic uint64_t *origins; /* core/origin.h; whoever has read or written a file writes them, with no lock */
	int origins_fd;
};

/* A longest run of pages in one mapping. */
struct ram_range {
	uint64_t page, pages; /* within the block */
	enum entry_source source;
	unsigned file;        /* with ENTRY_OVERLAY */
	uint64_t file_page;
};

struct ram_counts {
	uint64_t pages, overlay_pages, private_pages;
	uint64_t copied_pages; /* became private by a write; only grows */
	uint64_t maps;       /* mappings that make up guest RAM */
	uint64_t other_maps; /* the rest of the process, when last counted */
	uint64_t budget_maps;
	uint64_t failures;   /* mapping calls that failed */
	uint64_t unmarked;   /* mappings that could not get their madvise marks */
};

/* Masked pages, in pages; all but the first only grow. */
struct ram_mask_counts {
	uint64_t masked_now;
	uint64_t masked;  /* got the flag "needs update" */
	uint64_t made;    /* their contents were made of a word, */
	uint64_t copied;  /* or copied from a file, */
	uint64_t mapped;  /* or the file was mapped there; */
	uint64_t put;     /* or they came from elsewhere; */
	uint64_t dropped; /* or something else came there before anybody looked */
};

/* Pages whose memory was given back, in pages but where it is said; all without "now" only grow. */
struct ram_reclaim_counts {
	uint64_t zeros;    /* they held zeros, */
	uint64_t words;    /* or one word repeated, */
	uint64_t spilled;  /* or went to the store; */
	uint64_t returned; /* and of those: came back when they were touched */
	uint64_t clean;    /* shown of files, in overlays, and went out of the page cache */
	uint64_t spilled_now;     /* of that, and in the store */
	uint64_t spill_bytes_now; /* that the store takes of memory, */
	uint64_t spill_file_bytes_now, spill_file_most_bytes; /* and of a file; most: 0: there is none */
	/* Wanted, and left where they are, because: */
	uint64_t left_touched;  /* somebody wrote them or changed what lies there meanwhile, */
	uint64_t left_reads;    /* a read into them was in flight, */
	uint64_t left_unpacked; /* they pack so badly that it is not worth it, */
	uint64_t left_failed;   /* the store is full or cannot be written, or the kernel did not give them back */
};

struct ram;

/* `budget_maps`: mappings that the whole process may have; 0: half of vm.max_map_count. */
int ram_create(uint64_t budget_maps, struct ram **ret_ram);
void ram_destroy(struct ram *ram); /* NULL is allowed; leaves the mappings as they are */

/* Forgets all blocks; what was mapped stays mapped, and files may be dropped afterwards. */
void ram_remove_blocks(struct ram *ram);

void ram_lock(struct ram *ram);
void ram_unlock(struct ram *ram);
bool ram_lock_if_free(struct ram *ram);
/* False: somebody has held it all the time. */
bool ram_lock_within(struct ram *ram, unsigned timeout_ms);

/* [locked] Guest RAM at `hva`, mapped by the caller MAP_SHARED from `memfd` (borrowed until the block
 * is removed). */
int ram_add_block(struct ram *ram, const char *name, void *hva, uint64_t pages, int memfd,
		  uint64_t memfd_offset, struct ram_block **ret_block);
/* [locked] The caller unmaps or has unmapped it. */
void ram_remove_block(struct ram *ram, struct ram_block *block);
/* [locked] The block in slot n, 0..RAM_BLOCKS-1, or NULL. */
struct ram_block *ram_block_at(struct ram *ram, unsigned n);
/* The block that holds all of [hva, hva+bytes), or NULL. Needs no lock as long as no block is
 * removed. */
struct ram_block *ram_find(struct ram *ram, const void *hva, size_t bytes);
/* [locked] Calls `each` for every block that [hva, hva+bytes) touches, with the part inside. */
int ram_for_part(struct ram *ram, const void *hva, size_t bytes,
		 int (*each)(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages));
/* [locked] The same for whole pages that map [offset, offset+bytes) of guest RAM's memfd. */
int ram_for_file_part(struct ram *ram, uint64_t offset, uint64_t bytes,
		      int (*each)(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages));

/* [locked] A file that may be mapped; `fd` is borrowed until it is dropped. The file must not change
 * while it is added (see volume/). Returns its index, or -ENOSPC. */
int ram_add_file(struct ram *ram, int fd, uint64_t pages, const struct ram_observer *observer);
/* [locked] What is mapped of it has a userfaultfd of its own, which ram_single leaves alone. */
void ram_file_is_watched(struct ram *ram, unsigned file);
/* [locked] No overlay of it may be left. */
void ram_drop_file(struct ram *ram, unsigned file);

/* [locked] Contents are free. Maps pages of the file there. -EDQUOT: over the budget of mappings;
 * -ERANGE: outside the file or block; -EBUSY: held; else as os_map_file_over. */
int ram_map_overlay(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages,
		    unsigned file, uint64_t file_page);

/*
 * [locked] While held, what base holds now stays readable in its memfd until it is overwritten by a write
 * to guest RAM, which write-protection can see: nothing is punched, no overlay is made (-EBUSY), and a
 * discard writes zeros. For whoever reads base while the guest runs (a save).
 */
void ram_hold(struct ram *ram, bool held);
bool ram_is_held(struct ram *ram); /* [locked] */

/* [locked] Calls `each` for every longest run of base, in order; ends at and returns its first result that is not
 * 0. ram_for_base_of: of a part of one block. */
typedef int (*ram_run)(void *ctx, struct ram_block *block, uint64_t page, uint64_t pages);
int ram_for_base(struct ram *ram, ram_run each, void *ctx);
int ram_for_base_of(struct ram_block *block, uint64_t page, uint64_t pages, ram_run each, void *ctx);
/* [locked] Brings the private flags up to date, all at once, and calls `each` for every run of private copies. */
int ram_for_private(struct ram *ram, ram_run each, void *ctx);
/*
 * So that private copies can be taken before an instant, and in it only those that were written since.
 *
 * ram_watch_copies: [locked] registers overlays with `uffd` (OS_UFFD_WP_ASYNC; borrowed), but for those that something
 *     else watches. As long as they are, the kernel maps no neighbours of a page that is touched in them.
 * ram_protect_copies: [locked; writers stopped, the kernel's too] Protects the private copies among the pages and calls
 *     `each` for every run of them, which may neither allocate nor map. What is protected is flagged as private, also on
 *     failure. -EOPNOTSUPP: not with this kernel.
 * ram_protect_written: the same for those alone that were written since they were protected, or are not. On failure any of
 *     the pages may have been protected without a word.
 * ram_for_written: [locked] as ram_for_private, but `each` is called only for those that were written since they were
 *     protected, or are not.
 * ram_for_copies: [locked] calls `each` for every run of private copies, as the flags are.
 * ram_unwatch_copies: the end of that, a slice at a time. (To close `uffd` ends it, too, but whoever maps or touches
 *     anything waits meanwhile: milliseconds for each GiB.)
 */
void ram_watch_copies(struct ram *ram, int uffd);
int ram_protect_copies(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages,
		       ram_run each, void *ctx);
int ram_protect_written(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages, ram_run each,
			void *ctx);
int ram_for_written(struct ram *ram, ram_run each, void *ctx);
int ram_for_copies(struct ram *ram, ram_run each, void *ctx);
void ram_unwatch_copies(struct ram *ram, int uffd);

/* [locked] Contents are free. Gives overlays of the pages back to base; those that were overlays
 * then read as zeros, or hold what they held. */
int ram_return_base(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages);

/* [locked] Takes base's part of the pages out of the page table; nothing is lost. Of an overlay a zap would lose what
 * the guest has written. */
int ram_zap_base(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages);
/* [locked] The same for what is clean of all overlays, but short runs between private copies; writers stopped, and
 * the private flags brought up to date (ram_for_private, ram_for_written) since they stand. Not of files that
 * somebody privatizes meanwhile. */
void ram_zap_clean_overlays(struct ram *ram);

/* [locked] Brings the private flags of the pages up to date. */
int ram_update_private(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages);
/* [locked; the pages' writers stopped, and private flags brought up to date since they stand] Takes what
 * the pages' overlays show of their files out of the page table, and no private copy. -EBUSY: not all, for
 * somebody is privatizing one of the files. */
int ram_zap_clean(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages);

/* [locked] Whether there are any among the pages, as far as is known (ram_update_private). */
bool ram_has_copies(const struct ram_block *block, uint64_t page, uint64_t pages);
/* [locked; the pages' writers stopped] Settles the private copies among the pages, where the budget of
 * mappings allows it. `*ret_settled` grows by them, also on failure. */
int ram_settle_copies(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages,
		      uint64_t *ret_settled);

/*
 * Looking for what the guest uses (activity/scan.h). Where nobody asks for single pages, the kernel maps
 * up to 15 others around a page that is touched, and those look used.
 *
 * ram_single_by: [locked] `uffd` (for write-protection, of which nobody makes use; borrowed; -1: none
 * any more) is what asks for single pages; `overlays`: in overlays, too (WP_ASYNC). ram_single: [locked]
 * single pages from now on, also in what has been mapped anew since. -errno: not there. ram_not_single:
 * [locked] as before. ram_set_activity: [locked] ENTRY_ACTIVITY of the page's entry.
 */
void ram_single_by(struct ram *ram, int uffd, bool overlays);
int ram_single(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages);
void ram_not_single(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages);
void ram_set_activity(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t activity);
uint64_t ram_activity(const struct ram_block *block, uint64_t page); /* any thread */

/* [locked] Would ram_return_base make mappings fewer, or leave their number? */
bool ram_return_saves_maps(const struct ram_block *block, uint64_t page, uint64_t pages);

/* Is any of the pages an overlay? Without the lock the answer may be old. */
bool ram_has_overlay(const struct ram_block *block, uint64_t page, uint64_t pages);

/* [locked] All pages read as zeros afterwards. They take no memory, unless giving part of an overlay
 * back would exceed the budget of mappings: those become private copies full of zeros. */
int ram_discard(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages);

/*
 * Masked pages: what they hold is known, and nothing is there until somebody touches them. A userfaultfd tells
 * of that, and a thread that the caller runs makes them: from a word that is repeated, or from a file, which is
 * mapped there if the range lock is free and the budget allows it, and else copied.
 *
 * ram_watch: [locked] `uffd` (OS_UFFD_MISSING_SHMEM; borrowed) is what new masks are registered with.
 * ram_add_word: [locked] the number of a word, for entry_masked(ENTRY_WORDS, number); -ENOMEM.
 * ram_mask: [locked] `entries` of [page, pages): entry_masked, or ENTRY_WATCHED where base already holds what the
 *     page shall hold. All of it has to be base, with nothing in the memfd where pages are to be masked.
 *     -EDQUOT: over the budget of mappings; -EBUSY: something else watches guest RAM. Then nothing was changed.
 * ram_make: the page at `hva` is waited for. Takes the range lock only if it is free, never waits for who has it.
 *     -EIO and others: storage does not give the contents; whoever touched it waits on, until it is tried again.
 * ram_unmask_file: makes all that comes from the file, by copying; it may be rewritten afterwards. May wait for
 *     storage. Needs no lock; the guest may run. Goes on after a failure and returns the first one.
 * ram_unmask: makes everything, by mapping where that is possible, and watches nothing any more.
 * ram_expect: [locked] what these pages hold comes from elsewhere, by ram_put; what is there now is forgotten. Until then
 *     ram_make says -EINPROGRESS of them, and nobody else can make them either: ram_unmask, too, fails so. Errors as of
 *     ram_mask, and of the kernel; then some of the pages are expected.
 * ram_watch_base: [locked] what is base among these pages is watched as expected pages are, and stays what it is: many
 *     expected pages that lie near each other are one mapping then, and not one each. Errors as of ram_mask, and of the
 *     kernel.
 * ram_put: the contents of a page at `hva` have come; whoever waits for it goes on. Needs no lock, touches no guest RAM
 *     by its address, and may be called while the guest runs. `*ret_put`: false if the page was not expected (any more).
 * ram_expected: how many are expected still.
 * ram_unmask_part: [locked] makes these pages and watches them no more, because somebody is about to map their memfd
 *     anew there. May wait for storage. What could not be made stays masked, and must not be mapped anew.
 */
void ram_watch(struct ram *ram, int uffd);
int ram_add_word(struct ram *ram, uint64_t word, uint64_t *ret_number);
int ram_mask(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages, const uint64_t *entries);
int ram_make(struct ram *ram, void *hva);
int ram_unmask_file(struct ram *ram, unsigned file);
int ram_unmask(struct ram *ram);
int ram_expect(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages);
int ram_watch_base(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages);
int ram_put(struct ram *ram, void *hva, const void *contents, bool *ret_put);
uint64_t ram_expected(struct ram *ram);
int ram_unmask_part(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages);
void ram_get_mask_counts(struct ram *ram, struct ram_mask_counts *ret_counts);

/*
 * Reclaim: memory of base is given back to the host, and what was there comes back when somebody touches it. Zeros
 * are forgotten, a repeated word becomes a masked page, everything else is packed into a store and then masked. Of
 * overlays the host drops what it has cached of the file, and nobody has in a page table. The guest runs, and loses
 * nothing; but no thread may have pages of guest RAM pinned for writing that are not told of by ram_read_begins (see
 * "Reclaim" in ARCHITECTURE.md).
 *
 * ram_reclaim_open: where what is taken goes to, for good: memory (a memfd) or a file, once each; the others as in
 *     spill_add. Masks must be possible (ram_watch). -EOPNOTSUPP: not possible, or the kernel cannot write-protect
 *     shared memory (Linux 5.19); -EALREADY; -ENOMEM; -EINVAL. After the first time ram_reclaim is allowed.
 * ram_reclaim_allow: false: nothing is reclaimed from now on, and nothing is when it returns; for who ends all masks
 *     (ram_unmask) and wants it to stay so. What is reclaimed stays.
 * ram_reclaim: of the `count` next pages, RAM_RECLAIM_PAGES at most, from `page` of the block in `slot` on: those
 *     that `wanted` says yes to, and no private copies. `*ret_pages`: so many were looked at; go on behind them. One thread at a time,
 *     which no freeze stops. May wait for storage, with no lock held.
 *     -ENOENT: there is no such page, and `*ret_pages` is untouched; -EBUSY: not allowed, or held, or another userfaultfd
 *     is there; -EDQUOT: over the budget of mappings; -ENOSPC: the store is full; else as os_write_all and
 *     os_flush_cached. What was taken before the failure stays taken; nothing is lost.
 * ram_return_reclaimed: brings back so many pages of the store, about; `*ret_left`: what is still there. For who is about
 *     to end all masks, and has not the time to do it at once. Needs no lock, and may wait for storage. -EIO and others:
 *     some could not be read; they stay.
 * ram_reclaim_cache: the host drops what it has cached of a whole file, but what pages show to which `wanted` does not
 *     say yes, and what anybody has in a page table; so also what nobody shows any more, and what large folios kept from
 *     going with a unit. For a file that nobody else needs. As ram_reclaim; -ENOENT: there is no such file; -ENOMEM.
 * ram_wanted: called with the range lock, with the page's entry, activity included.
 * ram_read_begins, ram_read_ends: around a system call that may pin guest RAM and write it with no page table (a read
 *     with O_DIRECT); any thread, with no lock held. `read` and the vectors stay as they are between the two.
 */
#define RAM_RECLAIM_PAGES 512u

struct ram_read {
	const struct iovec *iov;
	int count;
	struct ram_read *next, *previous;
};

typedef bool (*ram_wanted)(void *ctx, uint64_t entry);
int ram_reclaim_open(struct ram *ram, int fd, uint64_t most_bytes, bool in_memory);
void ram_reclaim_allow(struct ram *ram, bool allowed);
int ram_reclaim(struct ram *ram, unsigned slot, uint64_t page, uint64_t count, ram_wanted wanted,
		void *ctx, uint64_t *ret_pages);
int ram_return_reclaimed(struct ram *ram, uint64_t pages, uint64_t *ret_left);
int ram_reclaim_cache(struct ram *ram, unsigned file, ram_wanted wanted, void *ctx);
void ram_read_begins(struct ram *ram, struct ram_read *read);
void ram_read_ends(struct ram *ram, struct ram_read *read);
void ram_get_reclaim_counts(struct ram *ram, struct ram_reclaim_counts *ret_counts);

/* Contents stay. Makes every page of the file's overlays a private copy: from then on the file may be
 * rewritten (but not truncated). Safe while the guest runs. It may wait for storage, so it holds the
 * lock only between its steps; no overlay of the file may be made meanwhile. Goes on after a failure
 * and returns the first one. */
int ram_privatize(struct ram *ram, unsigned file);

/* [locked] Contents stay. Copies overlays of the pages into base and maps base. The writers of these
 * pages must be stopped. `*ret_settled` (may be NULL) grows by the pages that were settled, also on
 * failure. */
int ram_settle(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages,
	       uint64_t *ret_settled);

/* [locked] Settles all overlays of one file in all blocks; vCPUs and I/O stopped. */
int ram_detach(struct ram *ram, unsigned file, uint64_t *ret_settled);

/* Brings copies of the file's overlays back from swap, so that a settle does not wait for them under the
 * lock. Advice; as ram_privatize, it holds the lock only between its steps. */
void ram_swap_in(struct ram *ram, unsigned file);

/* [locked] The first page of an overlay that cannot be read now. Slow: for an error message. */
bool ram_find_unreadable(struct ram *ram, struct ram_block **ret_block, uint64_t *ret_page);

/* Brings the private flags up to date from pagemap, in slices, the lock held for one slice at a
 * time. One thread at a time. */
int ram_reconcile(struct ram *ram);

/* [locked] Marks that the VMM puts on a whole block by madvise: remembered for new mappings. Those of a
 * part are not kept. */
void ram_remember_advice(struct ram *ram, const void *hva, size_t bytes, int advice);

/* [locked] The same for a NUMA policy (mbind) of a whole block; that of a part is not kept. */
void ram_remember_policy(struct ram *ram, const void *hva, size_t bytes, const struct os_policy *policy);

/* Counts the rest of the process's mappings again. Slow with many mappings. */
int ram_recount_maps(struct ram *ram);
void ram_get_counts(struct ram *ram, struct ram_counts *ret_counts);

/*
 * Source bits (entry.h): of pages of overlays that a migration has told by their place alone.
 *
 * ram_set_source_bits: [locked] of these pages, which have just been mapped.
 * ram_update_source_bits: clears those of pages that are in the page table by now: whoever touched them, or a neighbour
 *     that the kernel maps along, has fetched them. Takes the lock, for a slice at a time. Errors of pagemap.
 */
struct ram_source_counts {
	uint64_t set, fetched; /* only grow */
	uint64_t now;          /* as of the last update; the others were written, or got other contents */
};
void ram_set_source_bits(struct ram *ram, struct ram_block *block, uint64_t page, uint64_t pages);
int ram_update_source_bits(struct ram *ram);
void ram_get_source_counts(struct ram *ram, struct ram_source_counts *ret_counts);

/* [locked] The range that holds `page`, cut to [page, end). */
struct ram_range ram_range_at(const struct ram_block *block, uint64_t page, uint64_t end);

/* [locked] The number of pages that are overlays of `file` or will be made from it, and the number of those that
 * show it: overlays without a copy of their own. */
uint64_t ram_overlay_pages(struct ram *ram, unsigned file);
uint64_t ram_mapped_pages(struct ram *ram, unsigned file);

#endif
