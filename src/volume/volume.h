/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Shortcut I/O (US9032181): a read from a disk image into guest RAM is not copied but mapped, when
 * the image cannot change beneath the mapping, sharing is likely and the run is long enough. The
 * page cache is the pool that all VMs share.
 *
 * Threading: volumes_read from any number of threads; volume_break, _settle, _release and volumes_tidy
 * from one thread at a time (volume_break of a volume from volume_get: any); none with the range lock
 * held.
 */
#ifndef LATENT_VOLUME_VOLUME_H
#define LATENT_VOLUME_VOLUME_H

#include "core/ram.h"
#include "vmdir/stats.h"

#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>

struct volume_options {
	double share_threshold;    /* 0..1; at 0 the likelihood is not asked */
	uint32_t min_run_pages;    /* 0: by the cost model and the likelihood */
	bool trust_images;         /* map what nothing protects */
	const char *tracks_dir;    /* where the tracking structures are; outlives the volumes */
	int lease_signal;          /* queued to thread lease_tid when a lease breaks, si_fd: see below */
	pid_t lease_tid;
};

struct volumes;
struct volume;

/* `stats` outlives the volumes. */
int volumes_create(struct ram *ram, const struct volume_options *options, struct vm_stats *stats,
		   struct volumes **ret_volumes);
/* The process ends: removes what would be left of it in tracks_dir; nothing else is given up. */
void volumes_abandon(struct volumes *all);
/* The thread that gets the leases' signal from now on, if it was not in the options. */
void volumes_lease_to(struct volumes *all, pid_t tid);
/* Releases leases and descriptors. No overlay may be left: remove or settle the RAM before. */
void volumes_destroy(struct volumes *all);

/* Stops or allows mappings for the VM as a whole; what is mapped stays. */
void volumes_allow(struct volumes *all, bool allowed);

/*
 * preadv(2) of `fd` into buffers of which at least one part lies in guest RAM: the same result, the
 * same errno (as a negative number), the same short counts. Pages that it fully overwrites and that
 * are not mapped anew go back to base where that saves mappings.
 */
ssize_t volumes_read(struct volumes *all, int fd, const struct iovec *iov, int count, off_t offset);

/* [no lock] Contents are free. Maps pages of the file there, whatever it costs and however likely it is that
 * somebody shares them. As ram_map_overlay; -EACCES: the volume is not mapped. */
int volume_map(struct volume *v, struct ram_block *block, uint64_t page, uint64_t pages, uint64_t file_page);

/* The volume of an open file, attached if it was not; NULL: no file, or too many. To be put. */
struct volume *volumes_attach(struct volumes *all, int fd);

/* The same for a pager's cache: it takes no lease, and nobody is expected to change what is there. */
struct volume *volumes_attach_cache(struct volumes *all, int fd);

/* A read that the kernel carries out by itself, after this call: counted for the volume, if `fd` is one. */
void volumes_note_kernel_read(struct volumes *all, int fd, const struct iovec *iov, int count);

/* A write of guest RAM that has been done, as far as `bytes`: where its pages are now is noted (core/origin.h). */
void volumes_note_write(struct volumes *all, int fd, const struct iovec *iov, int count, off_t offset, size_t bytes);

/* A read that does not go to guest RAM: counted for the volume, if `fd` is one. */
void volumes_note_other(struct volumes *all, int fd, uint64_t bytes);

/* Is `fd` a volume that is mapped, and so cannot have changed since it was opened? */
bool volumes_is_mapped(struct volumes *all, int fd);

/* The volume that is this file, or NULL if nothing of it was read since it was opened. Takes no lock; to be
 * put back. Other ways to a volume are for the thread that calls volumes_tidy, or for all when nobody does. */
struct volume *volume_get(struct volumes *all, const struct stat *st);
void volume_put(struct volume *v);

struct volume *volumes_by_path(struct volumes *all, const char *path);
/* The volume with this file index in page entries, or NULL. */
struct volume *volumes_by_index(struct volumes *all, unsigned file);
/* The n-th volume, NULL after the last; closed ones are among them. */
struct volume *volumes_nth(struct volumes *all, uint32_t n); /* n is its number in origins, too */

/*
 * Housekeeping, to be called every few seconds by the thread that breaks, settles and releases: forgets
 * files that this process has open no more and of which nothing is mapped; asks again for a lease of
 * those that had a writer or that nothing protected. Looks through the process's descriptors.
 */
void volumes_tidy(struct volumes *all);
const char *volume_path(const struct volume *v);
/* False: it has no file in core, and no page entry names it. */
bool volume_describe(const struct volume *v, uint64_t *ret_dev, uint64_t *ret_ino, uint64_t *ret_pages,
		     uint32_t *ret_file);
unsigned volume_index(const struct volume *v); /* in core; of one that is mapped */
struct ram *volume_ram(const struct volume *v);
/* Leases that are gone or break without a signal seen (it may have been lost): the first, or NULL. */
struct volume *volumes_broken_lease(struct volumes *all);

/*
 * The three steps of giving a file up, for a writer or for `latent detach`:
 *   break    maps it no more, and makes what is mapped private: the file may then be rewritten, not
 *            yet truncated. The guest goes on. After a failure, call it again.
 *   settle   [range lock held] moves what is mapped to base, private or not. vCPUs and I/O stopped.
 *   release  gives the lease back, so that a waiting writer goes on.
 * Each does nothing when it has been done. `*ret_settled` (may be NULL) grows.
 */
int volume_break(struct volume *v, enum volume_state why);
void volumes_detach(struct volumes *all); /* breaks all volumes for good, those to come too */
/* A writer has changed the file before what is mapped from it was made private, for the process stood still for longer than
 * fs.lease-break-time: what the guest finds in such pages may be what was written. Or it is mapped without a lease, and was
 * cut. Known before volume_break, or as soon as that is done; until volume_tell_overtaken, or until it is mapped anew. For
 * the thread of volumes_tidy. */
bool volume_is_overtaken(struct volume *v);
void volume_tell_overtaken(struct volume *v);
int volume_settle(struct volume *v, uint64_t *ret_settled);
void volume_release(struct volume *v);
/* Before settling: what is swapped out comes back while the guest still runs. */
void volume_swap_in(struct volume *v);

bool volume_is_mapped(struct volume *v);   /* new pages may be mapped from it */
bool volume_is_cache(struct volume *v);    /* of volumes_attach_cache */
bool volume_is_leased(struct volume *v);   /* a lease is held, whole or breaking */
bool volume_lease_breaks(struct volume *v);
/* Guest pages that lie in overlays of it, and those of them that show the file. */
uint64_t volume_overlay_pages(struct volume *v);
uint64_t volume_showing_pages(struct volume *v);
/* Does no other VM of this user read it? False, too, if that is not known. For the thread of volumes_refresh. */
bool volume_is_read_alone(struct volume *v);
/* When it was first broken, on CLOCK_MONOTONIC; 0: never. */
uint64_t volume_broken_us(struct volume *v);

/* Brings the statistics up to date; `deep` also copies on write and groups, from pagemap. */
int volumes_refresh(struct volumes *all, bool deep);

#endif
