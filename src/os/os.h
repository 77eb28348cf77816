/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * The kernel, as Latent uses it. Nothing above this folder calls mmap, madvise, fallocate, fcntl
 * leases, pagemap or userfaultfd by itself.
 *
 * Errors are negative errno values; outputs are untouched on failure. All functions may be called
 * from any thread unless said otherwise; none takes a lock. Addresses are host virtual addresses
 * (hva) and, like lengths and offsets, multiples of OS_PAGE_BYTES unless said otherwise.
 */
#ifndef LATENT_OS_OS_H
#define LATENT_OS_OS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define OS_PAGE_SHIFT 12
#define OS_PAGE_BYTES ((size_t)1 << OS_PAGE_SHIFT)

static inline size_t os_bytes(uint64_t pages) { return (size_t)(pages << OS_PAGE_SHIFT); }

/* clock.c: CLOCK_MONOTONIC; takes no lock. */
uint64_t os_now_us(void);

/* ---- maps.c: mappings over guest RAM ------------------------------------------------------- */

/* Marks that QEMU and others put on guest RAM with madvise, and that a new mapping has to get. */
enum os_mark {
	OS_MARK_DONTFORK = 1u << 0,
	OS_MARK_DONTDUMP = 1u << 1,
	OS_MARK_HUGEPAGE = 1u << 2,   /* base only: khugepaged must not gather pages of an image */
	OS_MARK_NOHUGEPAGE = 1u << 3, /* base only */
};

/* The mark that this madvise advice sets, or 0; `*ret_clears` is the mark that it takes away. */
unsigned os_mark_of_advice(int advice, unsigned *ret_clears);

/*
 * Maps `bytes` of `fd` from `offset` over [hva, hva+bytes): the VM's own memfd (shared), or a file
 * (private: writes become copies). The new mapping has no marks yet. -ENOMEM (too many mappings, no
 * memory), -EAGAIN, -EACCES, -ENODEV: then the old mapping is whole, or has become a hole (a failure
 * within the file's own mmap; any failure before Linux 6.12): ask os_is_mapped.
 */
int os_map_base_over(void *hva, size_t bytes, int fd, uint64_t offset);
int os_map_file_over(void *hva, size_t bytes, int fd, uint64_t offset);

/* Puts marks on a mapping; those that are for base only are left out unless `base`. */
int os_set_marks(void *hva, size_t bytes, unsigned marks, bool base);

/*
 * A NUMA policy, as mbind(2) takes it. Base keeps it by itself (it belongs to the memfd); the private
 * copies of an overlay follow the policy of the mapping.
 */
#define OS_NODES 1024
struct os_policy {
	int mode;
	unsigned long max_node; /* bits of nodes[] that count, and one, as mbind has it; 0: no policy */
	unsigned long nodes[OS_NODES / (8 * sizeof(unsigned long))];
};

int os_set_policy(void *hva, size_t bytes, const struct os_policy *policy);

/* True if every page of the range belongs to some mapping. */
bool os_is_mapped(void *hva, size_t bytes);

/* Makes every page of a private mapping a private copy, as if each had been written, without
 * changing it and whatever runs beside (MADV_POPULATE_WRITE, Linux 5.14). -EFAULT, -EIO: storage
 * failed; -ENOMEM. */
int os_populate_write(void *hva, size_t bytes);

/* Takes the entries of a shared mapping, or of a private one without copies, out of the page table: what they
 * showed stays where it is (MADV_DONTNEED). os_zap_many: of several, in as few system calls as the kernel allows. */
struct os_range {
	void *hva;
	size_t bytes;
};
int os_zap(void *hva, size_t bytes);
void os_zap_many(const struct os_range *ranges, size_t count);

/* Brings the pages of any mapping in, from a file or from swap (MADV_POPULATE_READ, Linux 5.14). Advice:
 * what fails will be met at the access. */
void os_populate_read(void *hva, size_t bytes);

/* Can the first byte of each page be read? Returns the number of pages before the first that cannot;
 * raises no signal (process_vm_readv). */
uint64_t os_readable_pages(const void *hva, uint64_t pages);

/* Frees [offset, offset+bytes) of a memfd; it then reads as zeros. */
int os_punch_hole(int fd, uint64_t offset, size_t bytes);

/* True if the memfd holds anything in the range (SEEK_DATA: also what is swapped out). Moves the
 * descriptor's file position. */
bool os_has_data(int fd, uint64_t offset, size_t bytes);

/* The first run in [from, end) that holds data; false: there is none. As os_has_data. */
bool os_next_data(int fd, uint64_t from, uint64_t end, uint64_t *ret_from, uint64_t *ret_to);

/* A shared view of a file from its beginning, which children do not inherit and core dumps leave out.
 * NULL on failure. os_unview_file takes NULL. */
void *os_view_file(int fd, size_t bytes, bool writable);
void os_unview_file(void *view, size_t bytes);

/* Puts zeroed private memory in the place of a view; async-signal-safe. */
bool os_replace_view(void *view, size_t bytes);

/* How many pages of [view+offset, +pages) are in the page cache (mincore). The kernel tells the
 * truth only to who owns the file or may write it, os_residency_is_told; else everything seems resident. */
uint64_t os_resident_pages(const void *view, uint64_t offset, uint64_t pages);
bool os_residency_is_told(int fd);
/* How many pages of [offset, offset+bytes) of the file are in the page cache; UINT64_MAX: the kernel does not say (it
 * does from Linux 6.5 on, and of late only to who owns the file or may write it). */
uint64_t os_cached_pages(int fd, uint64_t offset, uint64_t bytes);
/* Advises the kernel to drop from the page cache what is clean there and mapped by nobody. */
void os_drop_cached(int fd, uint64_t offset, uint64_t bytes);
/* The same for all pages that any part of [offset, offset+bytes) is in, which need be no multiples of pages. */
void os_drop_cached_around(int fd, uint64_t offset, uint64_t bytes);
/* What was written to the file is on its storage, as far as the host knows, and then not in the page cache any more.
 * -EIO, -ENOSPC and others, of anything that was written since the last time; then the page cache stays as it is. It is no
 * barrier against a loss of power. */
int os_flush_cached(int fd);
/* It will be read soon. */
void os_expect_read(int fd, uint64_t offset, uint64_t bytes);
/* The file is read here and there: the kernel need not read ahead. */
void os_expect_random(int fd);

/*
 * guard.c: views of files that others may cut, of which nothing but statistics and advice is read.
 * os_absorb_fault, for a SIGBUS handler (async-signal-safe): true if `addr` lies in a guarded view,
 * which is zeroed private memory from then on. -ENOSPC: 4096 are guarded already.
 */
int os_guard_view(void *view, size_t bytes);
void os_unguard_view(void *view);
bool os_absorb_fault(const void *addr);

/* A memfd, its size sealed unless it is 0, not close-on-exec when `inherit`. Returns the descriptor or a negative
 * errno. */
int os_memfd_create(const char *name, uint64_t bytes, bool inherit);

/* Does writing one page of a memfd leave its neighbours holes? Not where huge pages are forced on shared memory. */
bool os_memfd_is_fine_grained(void);

/* Shared memory of this process that others may be given to read: a memfd and a writable view of it,
 * sealed so that nobody else can write it or change its size. */
int os_table_create(const char *name, size_t bytes, int *ret_fd, void **ret_table);
void os_table_destroy(int fd, void *table, size_t bytes);

/* Copies memory into a file, all of it. -EFAULT: the memory could not be read; -ENOSPC, -EIO. */
int os_write_all(int fd, const void *from, size_t bytes, uint64_t offset);

/* -ENODATA: the file ends before that; -EIO. */
int os_read_all(int fd, void *to, size_t bytes, uint64_t offset);
/*
 * cgroup.c: memory that may still be charged to the cgroup of a process and to those above it, after the page
 * cache that the kernel would take back; UINT64_MAX: nothing limits it, or nothing is known. `cgroups`:
 * /proc/PID/cgroup; `root`: where the hierarchies are mounted (/sys/fs/cgroup). Both versions of cgroups.
 */
uint64_t os_memory_room(const char *cgroups, const char *root);
/* Memory of the host that nobody misses: what is available, page cache included, above an eighth of all. UINT64_MAX:
 * not known. `meminfo`: /proc/meminfo. */
uint64_t os_memory_spare(const char *meminfo);

/*
 * Addresses for later: nobody can touch them, and nobody else is given them. `align`: a power of two of
 * at least a page. NULL: no memory. os_unreserve takes NULL, and what is mapped there by then goes too.
 */
void *os_reserve(size_t bytes, size_t align);
void os_unreserve(void *hva, size_t bytes);
/* Within a reservation, in the place of whatever is there. os_window_map: a part of a file, shared; its
 * pages come into the page table when they are touched, with those around them. os_window_memory: zeroed
 * memory of this process alone. os_window_clear: nothing again. As os_map_base_over when they fail. */
int os_window_map(void *hva, size_t bytes, int fd, uint64_t offset, bool writable);
int os_window_memory(void *hva, size_t bytes);
int os_window_clear(void *hva, size_t bytes);

/* Mappings of this process now, and the limit (vm.max_map_count). */
int os_count_maps(uint64_t *ret_maps);
uint64_t os_max_maps(void);

/* ---- pagemap.c: what the kernel knows about a page ------------------------------------------ */

enum os_page_flag {
	OS_PAGE_PRESENT = 1u << 0,
	OS_PAGE_SWAPPED = 1u << 1, /* swapped out; also the marker of an untouched armed page */
	OS_PAGE_FILE = 1u << 2,    /* a page of a file or of shared memory */
	OS_PAGE_PROTECTED = 1u << 3, /* against writing, by a userfaultfd; also of a page that is not there */
};

struct os_pagemap; /* /proc/self/pagemap; used by one thread at a time */

int os_pagemap_open(struct os_pagemap **ret_pagemap);
void os_pagemap_close(struct os_pagemap *pagemap);

/*
 * Calls `found` for every run of private copies in a private file mapping that is not armed with
 * write-protection: not FILE, and PRESENT or SWAPPED. Uses PAGEMAP_SCAN (Linux 6.7), else the
 * classic file. `found` must not change mappings of the range.
 */
typedef void (*os_page_run)(void *ctx, uint8_t *hva, uint64_t pages);
int os_pagemap_private_runs(struct os_pagemap *pagemap, uint8_t *hva, uint64_t pages, os_page_run found, void *ctx);

/* The same, in mappings that may be registered with OS_UFFD_WP_ASYNC. protect: and they are protected from then on;
 * -EPERM: not registered, -EOPNOTSUPP: no PAGEMAP_SCAN. written: only those that were written since then, or were not
 * protected; without PAGEMAP_SCAN all. protect_written: these, and they are protected. A copy that was swapped out keeps its protection. */
int os_pagemap_protect_written(struct os_pagemap *pagemap, uint8_t *hva, uint64_t pages,
			       os_page_run found, void *ctx);
int os_pagemap_protect_copies(struct os_pagemap *pagemap, uint8_t *hva, uint64_t pages,
			      os_page_run found, void *ctx);
int os_pagemap_written_copies(struct os_pagemap *pagemap, uint8_t *hva, uint64_t pages,
			      os_page_run found, void *ctx);

/* The same for pages that have an entry in the page table: touched since they were mapped or zapped, they or, where
 * nothing keeps the kernel from faulting around, one of their neighbours. Any mapping. */
int os_pagemap_present_runs(struct os_pagemap *pagemap, uint8_t *hva, uint64_t pages, os_page_run found, void *ctx);

/* enum os_page_flag bits of each page into flags[pages]. */
int os_pagemap_flags(struct os_pagemap *pagemap, const uint8_t *hva, uint64_t pages, uint8_t *flags);

/* Write-protects pages of a mapping that is registered for that with OS_UFFD_WP_ASYNC: who writes one goes on at once, and
 * it is OS_PAGE_PROTECTED no more; a zap changes nothing of that. -EPERM: not so registered, or not all of it (then what
 * comes before is protected); -EOPNOTSUPP: no PAGEMAP_SCAN. */
int os_pagemap_protect(struct os_pagemap *pagemap, uint8_t *hva, uint64_t pages);

/* Does the kernel know PAGEMAP_SCAN? `fd`: a pagemap. */
bool os_pagemap_has_scan(int fd);

/* The classic file even where PAGEMAP_SCAN exists: for the self-test, which compares the two. */
void os_pagemap_use_classic(struct os_pagemap *pagemap);

/* ---- lease.c: files that must not change ---------------------------------------------------- */

enum os_protection {
	OS_PROTECT_NONE,
	OS_PROTECT_VERITY,   /* fs-verity */
	OS_PROTECT_IMMUTABLE,/* the immutable attribute */
	OS_PROTECT_READONLY, /* a file system mounted read-only */
};

/*
 * Takes a read lease on `fd` (opened read-only); on a break, `signal` goes to thread `tid` with
 * si_fd == fd (fcntl(2), F_SETLEASE, F_SETSIG, F_SETOWN_EX). -EAGAIN: somebody has the file open for
 * writing. -EACCES: not the owner and no CAP_LEASE. -EINVAL: the file system has no leases.
 */
int os_lease_take(int fd, int signal, pid_t tid);
int os_lease_release(int fd);
/* True while the lease is held and no writer waits. */
bool os_lease_intact(int fd);
/* True while no writer has been let in: also while one waits, until fs.lease-break-time is over. */
bool os_lease_is_held(int fd);

/* A file system that is known to be this machine's alone. On any other (NFS, SMB, FUSE, 9p, Ceph, a cluster's)
 * neither a lease nor what follows binds other machines, or the server behind it. linux/magic.h, statfs(2). */
bool os_file_is_local(int fd);

/* On a file system whose files are nowhere but in memory (tmpfs, ramfs). */
bool os_file_is_in_memory(int fd);

/* What else keeps a local file from changing, checked in the order of the enum; OS_PROTECT_NONE if
 * nothing does. */
enum os_protection os_file_protection(int fd);

/* ---- uffd.c: faults that user space serves ---------------------------------------------------- */

/*
 * A userfaultfd that serves faults of the kernel too (KVM, vhost, system calls), with `features` (enum
 * os_uffd_feature, os/probe.h). Non-blocking, close-on-exec; ranges belong to the process that has opened it,
 * and any process that was given a duplicate may serve it. Returns the descriptor; -EPERM: it takes root,
 * /dev/userfaultfd, or vm.unprivileged_userfaultfd=1; -EOPNOTSUPP: the kernel lacks a feature.
 */
int os_uffd_open(uint64_t features);
/* For who serves no fault and only wants the kernel to keep something from happening by itself: to be
 * had by everybody, also where the one above is not. */
int os_uffd_open_unserved(uint64_t features);
int os_uffd_new(int flags); /* userfaultfd(2): a descriptor or a negative errno */
/* Whole mappings of shared memory; -EINVAL for those of ordinary files, -EBUSY: another one has it. */
int os_uffd_register_wp(int uffd, void *hva, size_t bytes);
int os_uffd_unregister(int uffd, void *hva, size_t bytes); /* wakes all that wait, and protects nothing */
/* Of a mapping of a memfd, shared (base) or private: where the file has a hole, whoever touches it waits; what the
 * file has is mapped as usual. */
int os_uffd_register_missing(int uffd, void *hva, size_t bytes);
/* Both. Of write-protection, and with nothing protected: a touched page comes alone, without those
 * around it. */
int os_uffd_register_missing_wp(int uffd, void *hva, size_t bytes);
/* Puts a page where there is none; wakes who waits for it. -EEXIST: there is one; -ENOENT: not registered. */
int os_uffd_copy(int uffd, void *hva, const void *page);
int os_uffd_zero(int uffd, void *hva);
void os_uffd_wake(int uffd, void *hva, size_t bytes); /* whoever waits in the range tries again */
/* Addresses are those of the process that has opened it. Taking protection away wakes who waits. */
int os_uffd_protect(int uffd, void *hva, size_t bytes, bool on);
/* 1: a page (its address) is waited for; 0: none now; -ENOSPC and others: it is over. */
int os_uffd_next_fault(int uffd, uintptr_t *ret_addr);

/* ---- freeze.c: all other threads stopped for a moment ---------------------------------------- */

/*
 * Stops every other thread of this process but those of os_never_freeze in a handler of `signal`, which none may
 * block: then none is inside a system call, so nobody has memory under his hands but kernel threads and
 * devices. Until os_thaw the caller may use system calls only: a stopped thread may hold any lock (malloc's,
 * stdio's) that the caller does not hold itself. System calls that were waiting are restarted, or fail with
 * EINTR as after any signal. Threads of the kernel's that work for this process go on. One caller at a time. -ETIMEDOUT: a thread did not stop; all run again.
 */
int os_freeze(int signal, unsigned timeout_ms);
void os_thaw(void);
/* A thread that a freeze never stops: others may wait for what it does, and it touches no guest RAM. Sixteen at most.
 * os_may_freeze: before it ends, for its number may become another thread's. */
void os_never_freeze(pid_t tid);
void os_may_freeze(pid_t tid);

/* ---- cpu.c: where threads run ------------------------------------------------------------------ */

int os_cpu(void); /* of the calling thread, at this moment */
/* The calling thread runs nowhere else from now on. -EINVAL: there is none, or it is not ours. */
int os_bind_to_cpu(int cpu);
/* -EXDEV: a thread of this process, or a worker of io_uring's, is not bound to this CPU alone. */
int os_all_bound_to_cpu(int cpu);

/* ---- fault.c: faults on purpose, for tests -------------------------------------------------- */

enum os_fault_point {
	OS_FAULT_MAP_FILE,
	OS_FAULT_MAP_BASE,
	OS_FAULT_MARK,
	OS_FAULT_PUNCH,
	OS_FAULT_POPULATE,
	OS_FAULT_SETTLE_WRITE,
	OS_FAULT_UFFD,         /* there is no userfaultfd to be had */
	OS_FAULT_REGISTER,     /* of pages to be made when they are touched */
	OS_FAULT_STORAGE_READ, /* the read of a cold block: may be delayed */
	OS_FAULT_WRITE,        /* os_write_all */
	OS_FAULT_FLUSH,        /* os_flush_cached */
	OS_FAULT_SPARE_MEMORY, /* the host has none to spare for what nobody has asked for yet */
	OS_FAULT_WINDOW,       /* a mapping in a reservation, emptied ones included */
	OS_FAULT_SAVE_STEP,    /* between any two steps of a save, or of joining snapshots */
	OS_FAULT_RESTORE_STEP, /* of a restore, until the command becomes QEMU, */
	OS_FAULT_AGENT_STEP,   /* and from then on, until it is told that the guest runs */
	OS_FAULT_PAGER_STEP,   /* of what a pager is asked for */
	OS_FAULT_PAGER_MEMORY, /* a pager has no memory to remember what somebody waits for */
	OS_FAULT_MIGRATE_STEP, /* between any two steps of a migration, on either side */
	OS_FAULT_POINTS
};

/*
 * The call number `nth` (from 1) of a point fails with `error` (positive errno), once; 0 disarms.
 * os_fault_parse takes "point:nth:ERRNO", "point:nth:KILL" (SIGKILL to this process), "point:nth:FULL"
 * (from then on every OS_FAULT_WRITE fails with ENOSPC), or "storage_read:delay:MS" (every call is
 * delayed), comma-separated, as in the environment variable LATENT_FAULT of the VMM, of `latent save`,
 * `flatten`, `restore`, `spare`, `migrate` and `receive`, and of a pager.
 */
void os_fault_arm(enum os_fault_point point, uint32_t nth, int error);
int os_fault_parse(const char *text);
uint32_t os_fault_calls(enum os_fault_point point);
/* 0, or the negative errno that this call must fail with. */
int os_fault(enum os_fault_point point);

#endif
