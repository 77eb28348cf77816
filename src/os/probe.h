/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What the running kernel offers and this process may use, found by trying, not by version. Probed
 * once, on the first call; takes about a millisecond. Nothing is printed: `latent doctor` does that.
 */
#ifndef LATENT_OS_PROBE_H
#define LATENT_OS_PROBE_H

#include <stdbool.h>
#include <stdint.h>

/* Bits of UFFDIO_API's features, linux/userfaultfd.h; Debian 12's headers lack some. */
enum os_uffd_feature {
	OS_UFFD_PAGEFAULT_FLAG_WP = 1u << 0, /* write-protection of anonymous memory, 5.7 */
	OS_UFFD_EVENT_REMOVE = 1u << 3,
	OS_UFFD_EVENT_UNMAP = 1u << 6,
	OS_UFFD_MISSING_SHMEM = 1u << 5,
	OS_UFFD_THREAD_ID = 1u << 8,
	OS_UFFD_MINOR_SHMEM = 1u << 10,       /* 5.14 */
	OS_UFFD_EXACT_ADDRESS = 1u << 11,     /* 5.18 */
	OS_UFFD_WP_HUGETLBFS_SHMEM = 1u << 12,/* 5.19 */
	OS_UFFD_WP_UNPOPULATED = 1u << 13,    /* 6.4 */
	OS_UFFD_POISON = 1u << 14,            /* 6.6 */
	OS_UFFD_WP_ASYNC = 1u << 15,          /* 6.7 */
	OS_UFFD_MOVE = 1u << 16,              /* 6.8 */
};

#define OS_SETTING_BYTES 24

struct os_features {
	unsigned kernel_major, kernel_minor, kernel_patch;
	char kernel_release[65];

	/* page tables */
	bool pagemap;      /* /proc/self/pagemap can be opened */
	bool pagemap_scan; /* PAGEMAP_SCAN, 6.7 */
	bool soft_dirty;   /* CONFIG_MEM_SOFT_DIRTY */
	bool populate_read, populate_write; /* 5.14 */
	bool page_idle;    /* /sys/kernel/mm/page_idle */
	bool damon;        /* its sysfs interface */

	/* userfaultfd: the first two also serve faults of the kernel (KVM, vhost, system calls) */
	bool uffd_syscall;   /* userfaultfd(2) as it is */
	bool uffd_device;    /* /dev/userfaultfd, 6.1 */
	bool uffd_user_only; /* userfaultfd(2) with UFFD_USER_MODE_ONLY, 5.11 */
	uint64_t uffd_features; /* enum os_uffd_feature; 0 if none can be had */
	int uffd_sysctl;     /* vm.unprivileged_userfaultfd; -1: there is no such file */

	/* memory */
	uint64_t max_maps;   /* vm.max_map_count: mappings of one process */
	uint64_t swap_bytes; /* all swap, used or not; 0: none */
	char shmem_thp[OS_SETTING_BYTES]; /* the setting in force, "never", "advise", …; "" if unknown */
	char thp[OS_SETTING_BYTES];
	bool ksm;            /* there is KSM */
	bool ksm_runs;

	/* files and machine */
	bool cap_lease;      /* leases on files of other users too */
	int lease_break_s;   /* fs.lease-break-time, seconds that a writer waits; -1: unknown */
	bool kvm_device;     /* /dev/kvm can be opened (which proves no working KVM) */
};

/* Never NULL; what could not be found out is false, 0 or empty. Any thread. */
const struct os_features *os_features_get(void);

#endif
