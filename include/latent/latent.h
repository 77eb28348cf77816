/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * liblatent: lazy memory for virtual machines, for a VMM of your own. (For stock QEMU there is
 * `latent run`, which needs no code.)
 *
 * A VMM gives guest RAM as a memfd that it has mapped MAP_SHARED, and calls latent_preadv where it
 * would call preadv(2) to read a disk image into guest RAM. From then on the library owns the
 * mappings of guest RAM: the VMM does not mmap, madvise(MADV_DONTNEED) or punch holes there itself.
 *
 * Threading: every function may be called from any thread at any time, unless it says otherwise. No
 * function starts a thread or installs a signal handler. One lock per VM is held for the time of
 * mapping calls, never during I/O on images.
 *
 * Errors: negative errno values; outputs are untouched on failure. Nothing is printed; see
 * latent_options.log.
 *
 * Guest RAM stays whole: a call that fails leaves every page readable, with its old contents or,
 * where the call was to replace them, with any.
 */
#ifndef LATENT_LATENT_H
#define LATENT_LATENT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LATENT_PAGE_BYTES 4096u

/* The version of the library, "MAJOR.MINOR.PATCH". */
const char *latent_version(void);

struct latent_options {
	size_t size;            /* sizeof(struct latent_options): tells the versions apart */
	double share_threshold; /* map when the likelihood of sharing is at least this, 0..1; 0: always */
	uint32_t min_run_pages; /* shortest run of pages to map; 0: by a cost model measured here */
	uint32_t max_maps;      /* mappings that the process may have in all; at most, and if 0, half of
				 * vm.max_map_count */
	int trust_images;       /* map images that neither a lease nor anything else protects */
	const char *tracks_dir; /* directory, mode 0700, of the tracking structures that the user's VMs
				 * share; copied. It need not survive a reboot: /run is a good place */
	int lease_signal;       /* sent to thread lease_tid when a lease breaks: a real-time signal that
				 * this thread blocks and reads (signalfd, sigwaitinfo) */
	pid_t lease_tid;        /* gettid() of that thread */
	void (*log)(void *ctx, const char *text); /* one line, or NULL; one callback per process */
	void *log_ctx;
};

/* The defaults: share_threshold 0.1, everything else 0. */
void latent_options_init(struct latent_options *options);

struct latent_vm;

/* -EINVAL: a size or value that this version does not know; -ENOMEM; what /proc/self/pagemap says. */
int latent_vm_create(const struct latent_options *options, struct latent_vm **ret_vm);

/* Leaves guest RAM mapped as it is, but settles nothing: unmap it or end the process. No other call
 * on the VM may be under way. NULL is allowed. */
void latent_vm_destroy(struct latent_vm *vm);

/* Guest RAM at `hva`, mapped by the caller MAP_SHARED, readable and writable, from `memfd` at
 * `offset`; all multiples of the page size. The descriptor stays the caller's and open.
 * `name` is the block's, at most 63 bytes. -EINVAL, -ENOSPC (64 blocks), -ENOMEM. */
int latent_ram_add(struct latent_vm *vm, const char *name, void *hva, size_t bytes, int memfd,
		   uint64_t offset);

/* The caller unmaps the block afterwards. No latent_preadv into the block may be under way. -ENOENT. */
int latent_ram_remove(struct latent_vm *vm, void *hva);

/* The pages read as zeros afterwards and, where mappings allow, take no memory (balloon, free page
 * reporting). `hva` and
 * `bytes` are multiples of the page size. -EINVAL; -ENOENT: not within one block. */
int latent_ram_discard(struct latent_vm *vm, void *hva, size_t bytes);

/* An madvise(2) mark (MADV_DONTFORK, MADV_DONTDUMP, MADV_HUGEPAGE …) that the caller has set on
 * guest RAM, to be set on new mappings too. */
void latent_ram_marked(struct latent_vm *vm, void *hva, size_t bytes, int advice);

/* preadv(2), with the same result but for errors, which are returned; pages are mapped where that is
 * safe and pays. Contents of the buffers are undefined while it runs, as with preadv. */
ssize_t latent_preadv(struct latent_vm *vm, int fd, const struct iovec *iov, int count, off_t offset);

/*
 * Giving an image up, in three steps, because its lease breaks (somebody wants to write it) or
 * because the VMM itself is about to. `path` NULL: all images. -ENOENT: nothing of it was ever read.
 *   privatize  while the guest runs: maps it no more, and turns what is mapped into private copies;
 *              the file may be rewritten afterwards, not yet truncated.
 *   settle     with all vCPUs and I/O into guest RAM stopped: moves these copies to the memfd.
 *   release    gives the lease back: a writer's open goes on.
 */
int latent_image_privatize(struct latent_vm *vm, const char *path);
int latent_image_settle(struct latent_vm *vm, const char *path);
int latent_image_release(struct latent_vm *vm, const char *path);

/* The path of an image whose lease breaks, into `path` (`room` bytes, cut if need be). Call it when
 * the signal came, until it answers 0. 1: there is one; 0: none. */
int latent_image_broken(struct latent_vm *vm, char *path, size_t room);

/* Housekeeping, to be called every few seconds by the thread that gives images up: forgets images that this
 * process has open no more (32 are known at a time), and maps those again whose writer has gone. */
void latent_images_tidy(struct latent_vm *vm);

/* For the VMM's SIGBUS handler (async-signal-safe): 1 if `addr`, the signal's si_addr, lies in a tracking
 * structure that somebody has cut; it has been replaced, and the handler returns. 0: not ours. Without
 * it whoever may write in tracks_dir can end the VMM. */
int latent_absorb_fault(const void *addr);

struct latent_stats {
	size_t size; /* set by the caller: sizeof(struct latent_stats) */
	uint64_t ram_pages, overlay_pages; /* overlay: mapped from files */
	uint64_t private_pages;            /* copies on write inside overlays */
	uint64_t maps, other_maps, budget_maps;
	uint64_t bytes_asked, bytes_shortcut, bytes_from_storage;
};

/* Brings the counts up to date from /proc/self/pagemap: about 10 ms per GiB. One thread at a time. */
int latent_stats_get(struct latent_vm *vm, struct latent_stats *stats);

/* ---- windows ------------------------------------------------------------------------------------
 *
 * For a process beside the VMM that does I/O for its guest (a vhost-user device), and has descriptors of
 * the files that are guest RAM. It need not map guest RAM: a window has the pages of the requests in
 * flight, and no other.
 *
 * A *lane* is what makes windows cheap: a process of one thread, bound to one CPU. When the kernel takes
 * a mapping away, it interrupts every CPU that runs a thread of that address space; a lane has no such
 * other CPU. Best is to bind before fork(2): the child's address space is then never seen elsewhere.
 *
 * For each request: latent_window_map; latent_window_use right before its data is read or written, or
 * given to the kernel to do it; when that is over, latent_window_done. With nothing to do:
 * latent_window_recycle.
 *
 * Give a window's addresses to the kernel for the time of a request only: buffers registered with
 * io_uring keep the pages of the request that was there when they were registered.
 *
 * Threading: a window belongs to the thread that has registered it. After US8924684.
 */
struct latent_window;

#define LATENT_SLOT_PAGES 511u /* of guest memory that one request may touch */
#define LATENT_SLOTS_MAX 1024u

enum latent_flush {
	/* The window is used on the registered CPU only, and no other CPU is interrupted. */
	LATENT_LOCAL_FLUSH = 1,
	/* It is used on any CPU by any thread of the process, and all CPUs that run one are interrupted. */
	LATENT_GLOBAL_FLUSH = 2,
};

/* Bytes of a file that is guest RAM. They need not begin or end with a page. */
struct latent_segment {
	int fd; /* open for reading; where a request writes guest memory, for writing too */
	uint64_t offset;
	size_t bytes;
};

struct latent_request {
	size_t size;                           /* set by the caller: sizeof(struct latent_request) */
	const struct latent_segment *segments; /* the caller's, unchanged until done */
	uint32_t count;                        /* at most 1024 */
	int writes_guest;                      /* 0: guest memory is only read, and mapped so */
	struct iovec *iov;  /* the caller's array of `count`: map puts each segment's place there */
	uint64_t lane, use; /* the library's: zeros at first, then left alone */
};

/*
 * Binds the calling thread to `cpu` and prepares `slots` (1 to LATENT_SLOTS_MAX) slots: 4 MiB of
 * addresses each and two pages of memory. A slot holds one request. Measures what mapping and copying
 * cost here (some 3 ms). -EINVAL: no such CPU, or not allowed for this process; -EXDEV: another thread
 * of the process may run elsewhere, the calling one is bound all the same; -ENOMEM. With `cpu` -1
 * nothing is bound, and LATENT_GLOBAL_FLUSH remains.
 */
int latent_window_register(int cpu, uint32_t slots, struct latent_window **ret_window);
/* No request may be in flight. The thread stays bound. NULL is allowed. */
void latent_window_unregister(struct latent_window *window);

/*
 * Gives a request a slot. Long runs of segments are mapped, shorter ones copied (`writes_guest`: by
 * done). A request of one run that is the same pages of the same file as one before is mapped sooner, and takes
 * the slot that still maps them, if there is one. A request that another lane has had is mapped after this one has emptied all slots that wait.
 * -EAGAIN: all slots are in use; -E2BIG: more than LATENT_SLOT_PAGES; -EINVAL; -EBUSY: it has a slot;
 * -EXDEV: the thread is not on its CPU (see use); -EFAULT: a segment that is copied ends behind its file
 * (one that is mapped raises SIGBUS where it is touched, and makes system calls fail with EFAULT);
 * -EOPNOTSUPP: `flush` is local and the window has no CPU; -ENOMEM and what mmap(2) and pread(2) say.
 * The request has no slot then.
 */
int latent_window_map(struct latent_window *window, struct latent_request *request, int flush);

/*
 * 0: the places in `iov` may be used, here and now. -ESTALE: the request has no slot of this window.
 * -EXDEV: the thread is not on the registered CPU. That is counted, and a mistake (debug builds end the
 * process) unless it is the registered thread and somebody has changed where it may run: a cpuset,
 * taskset. Then latent_window_move; mapped requests stay as they are.
 */
int latent_window_use(struct latent_window *window, struct latent_request *request);

/* The request is over: copies what was read for it into the guest, if `succeeded`. Its slot waits for
 * the next one, and stays mapped until then or recycle. -ESTALE; -EFAULT, -EIO: guest memory could not
 * be written (it is over all the same). */
int latent_window_done(struct latent_window *window, struct latent_request *request, int succeeded);

/* Another lane shall do the request: nothing is copied, the slot is emptied at once. Whoever takes it
 * maps it. -ESTALE. */
int latent_window_hand_over(struct latent_window *window, struct latent_request *request);

/* Unmaps what waits in slots not in use. 0, or the first error; what failed is not used again. */
int latent_window_recycle(struct latent_window *window);

/* Binds the thread, which is the registered one, to another CPU. Errors of register. */
int latent_window_move(struct latent_window *window, int cpu);

/* 0: all threads of the process, io_uring's workers included, are bound to the window's CPU. -EXDEV: one
 * is not. */
int latent_window_check(const struct latent_window *window);

struct latent_window_stats {
	size_t size;                       /* set by the caller: sizeof(struct latent_window_stats) */
	uint32_t min_window_bytes;         /* shorter runs are copied: measured at registration */
	uint64_t requests, maps;           /* mapping calls: one for a run of segments */
	uint64_t mapped_pages, peak_pages; /* of guest memory that are mapped now, were at most */
	uint64_t window_bytes, bounce_bytes;
	uint64_t reused;  /* slots in which another request took the place of what waited */
	uint64_t emptied; /* slots: by recycle, by a hand-over, after a map that failed */
	uint64_t handed_over, off_cpu;
	uint64_t kept; /* requests whose pages a slot that waited had still mapped: no mapping call was made */
};
/* -EINVAL: a size that this version does not know. */
int latent_window_stats_get(const struct latent_window *window, struct latent_window_stats *stats);

#ifdef __cplusplus
}
#endif

#endif
