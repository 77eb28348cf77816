/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Presents os/probe.h and os/selftest.h, and tries what only a whole program can: QEMU. */
#include "cli/cli.h"
#include "cli/doctor.h"
#include "cli/preflight.h"
#include "cli/vm_view.h"
#include "os/os.h"
#include "os/probe.h"
#include "os/selftest.h"
#include "vmdir/vmdir.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define QEMU "qemu-system-x86_64"
#define COMMON_MAX_MAPS 65530

static void check_kernel(struct check_list *list, const struct os_features *features);
static void check_rules(struct check_list *list);
static void check_pagemap(struct check_list *list, const struct os_features *features);
static void check_populate(struct check_list *list, const struct os_features *features);
static void check_leases(struct check_list *list, const struct os_features *features);
static void check_userfaultfd(struct check_list *list, const struct os_features *features);
static void check_activity(struct check_list *list, const struct os_features *features);
static void check_max_maps(struct check_list *list, const struct os_features *features);
static void check_huge_pages(struct check_list *list, const struct os_features *features);
static void check_overcommit(struct check_list *list);
static void check_memlock(struct check_list *list);
static void check_kvm(struct check_list *list, const struct os_features *features);
static void check_run_dir(struct check_list *list);
static void check_aio(struct check_list *list);
static void check_qemu(struct check_list *list);
static bool find_program(const char *name, char *path, size_t bytes);

void doctor_check_machine(struct check_list *list)
{
	const struct os_features *features = os_features_get();

	check_kernel(list, features);
	check_rules(list);
	check_pagemap(list, features);
	check_populate(list, features);
	check_leases(list, features);
	check_max_maps(list, features);
	check_userfaultfd(list, features);
	check_activity(list, features);
	check_huge_pages(list, features);
	check_overcommit(list);
	check_memlock(list);
	check_kvm(list, features);
	check_run_dir(list);
	check_aio(list);
	check_qemu(list);
}

static void check_kernel(struct check_list *list, const struct os_features *features)
{
	struct check *check = check_add(list, "kernel",
					"5.15: mapping images; 5.19: write-protection of "
					"guest RAM; 6.7: PAGEMAP_SCAN; 6.8: moving pages");
	unsigned version = features->kernel_major * 1000 + features->kernel_minor;

	if (version < 5015) {
		check_found(check, CHECK_MISSING, "%s, older than 5.15", features->kernel_release);
		check_remedy(check, "use a kernel from 5.15 on; 6.7 or later is best");
	} else if (version < 6007) {
		check_found(check, CHECK_LIMITED, "%s: everything, some of it slower",
			    features->kernel_release);
		check_remedy(check, "a kernel from 6.7 on finds copied pages faster");
	} else {
		check_found(check, CHECK_OK, "%s", features->kernel_release);
	}
}

static void check_rules(struct check_list *list)
{
	struct check *check = check_add(list, "kernel's rules", "telling written pages from clean ones");
	struct os_selftest_result result;
	int r = os_selftest(&result);

	if (r)
		check_found(check, CHECK_LIMITED, "the self-test could not run: %s", strerror(-r));
	else if (!os_selftest_sound(&result))
		check_found(check, CHECK_MISSING,
			    "the self-test failed: this kernel does not keep them");
	else if (result.early_failure_leaves == OS_AFTER_HOLE ||
		 result.late_failure_leaves == OS_AFTER_HOLE)
		check_found(check, CHECK_OK,
			    "kept; a mapping that fails leaves a hole, which is mended");
	else
		check_found(check, CHECK_OK, "kept");
	if (check->status == CHECK_MISSING)
		check_remedy(
			check,
			"run VMs with --no-overlays, and report this kernel with latent doctor --json");
}

static void check_pagemap(struct check_list *list, const struct os_features *features)
{
	struct check *check = check_add(list, "pagemap", "counting and settling copied pages");

	if (features->pagemap_scan) {
		check_found(check, CHECK_OK, "with PAGEMAP_SCAN");
	} else if (features->pagemap) {
		check_found(check, CHECK_LIMITED, "the classic file only: slower on large guests");
		check_remedy(check, "a kernel from 6.7 on");
	} else {
		check_found(check, CHECK_MISSING, "/proc/self/pagemap cannot be opened");
		check_remedy(check, "mount /proc, and a kernel with CONFIG_PROC_PAGE_MONITOR");
	}
}

static void check_populate(struct check_list *list, const struct os_features *features)
{
	struct check *check = check_add(list, "populate", "making private copies before a file changes");

	if (features->populate_read && features->populate_write) {
		check_found(check, CHECK_OK, "MADV_POPULATE_READ and _WRITE");
		return;
	}
	check_found(check, CHECK_MISSING, "no MADV_POPULATE_%s",
		    features->populate_read ? "WRITE" : "READ");
	check_remedy(check, "a kernel from 5.14 on, without a security policy that forbids it");
}

static void check_leases(struct check_list *list, const struct os_features *features)
{
	struct check *check =
		check_add(list, "leases", "mapping images that a writer may come to change");

	if (features->cap_lease) {
		check_found(check, CHECK_OK, "on everybody's files; a writer waits up to %d s",
			    features->lease_break_s);
		return;
	}
	check_found(check, CHECK_LIMITED, "on your own files only; a writer waits up to %d s",
		    features->lease_break_s);
	check_remedy(check,
		     "for images of other users: own them, make them immutable (chattr +i) or put "
		     "them on a read-only mount");
}

static void check_max_maps(struct check_list *list, const struct os_features *features)
{
	struct check *check = check_add(list, "vm.max_map_count", "mappings of images in each VM");

	check_found(check, features->max_maps < COMMON_MAX_MAPS ? CHECK_LIMITED : CHECK_OK,
		    "%ju; a VM may use half of it", (uintmax_t)features->max_maps);
	if (features->max_maps < COMMON_MAX_MAPS)
		check_remedy(check, "sysctl vm.max_map_count=%d", COMMON_MAX_MAPS);
}

static void check_userfaultfd(struct check_list *list, const struct os_features *features)
{
	struct check *check = check_add(list, "userfaultfd",
					"latent save; "
					"mapping images does not need it");

	if (features->uffd_syscall || features->uffd_device) {
		check_found(check, CHECK_OK, "for all faults%s",
			    features->uffd_features & OS_UFFD_WP_ASYNC ? ", with WP_ASYNC" : "");
		return;
	}
	check_found(check, CHECK_LIMITED,
		    features->uffd_user_only ? "for faults of user space only" : "not to be had");
	check_remedy(check, "sysctl vm.unprivileged_userfaultfd=1, or give yourself /dev/userfaultfd "
			    "(setfacl -m u:$USER:rw /dev/userfaultfd)");
}

/* What the scan uses (activity/scan.h), and what it could use and does not: docs/activity.md says why. */
static void check_activity(struct check_list *list, const struct os_features *features)
{
	struct check *check =
		check_add(list, "activity", "latent scan: seeing which memory a guest uses");
	bool base = features->uffd_features & OS_UFFD_WP_HUGETLBFS_SHMEM,
	     images = features->uffd_features & OS_UFFD_WP_ASYNC;
	bool writes = images && features->pagemap_scan;
	const char *unused = features->page_idle && features->damon
				     ? "; page_idle (frames, not a VM) and DAMON (regions, not pages) are not used"
			     : features->page_idle ? "; page_idle (frames, not a VM) is not used"
			     : features->damon     ? "; DAMON (regions, not pages) is not used"
						   : "";

	if (base && images) {
		check_found(check, CHECK_OK, "zap and see, by single pages; %s%s",
			    writes ? "writes by WP_ASYNC" : "writes are not told from reads", unused);
		return;
	}
	check_found(check, CHECK_LIMITED, "zap and see, %s; writes are not told from reads%s",
		    base ? "by single pages, and by groups of 16 in images" : "by groups of 16 pages",
		    unused);
	check_remedy(check, base ? "a kernel from 6.7 on"
				 : "a kernel from 5.19 on (better 6.7), and userfaultfd(2)");
}

static void check_huge_pages(struct check_list *list, const struct os_features *features)
{
	struct check *check = check_add(list, "huge pages",
					"reclaim, and restores and migrations that bring pages while the guest runs");
	const char *setting = *features->shmem_thp ? features->shmem_thp : "unknown";

	if (os_memfd_is_fine_grained()) {
		check_found(check, CHECK_OK, "none in guest RAM (shmem_enabled: %s)", setting);
		return;
	}
	check_found(check, CHECK_LIMITED, "forced on shared memory (shmem_enabled: %s): no page of it can be missing alone",
		    setting);
	check_remedy(check, "echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled, and to the files of that name in "
			    "hugepages-*kB");
}

static void check_overcommit(struct check_list *list)
{
	struct check *check = check_add(list, "overcommit", "more guest RAM than the machine has");
	FILE *file = fopen("/proc/sys/vm/overcommit_memory", "re");
	int mode = -1;

	if (!file || fscanf(file, "%d", &mode) != 1)
		mode = -1;
	if (file)
		fclose(file);
	if (mode == 2) {
		check_found(check, CHECK_LIMITED,
			    "vm.overcommit_memory is 2: copies of pages may be refused");
		check_remedy(check, "sysctl vm.overcommit_memory=0");
	} else {
		check_found(check, CHECK_OK, "vm.overcommit_memory is %d", mode);
	}
}

static void check_memlock(struct check_list *list)
{
	struct check *check = check_add(list, "locked memory",
					"nothing: Latent locks no memory, and "
					"-overcommit mem-lock=on turns it off");
	struct rlimit limit;
	char size[CLI_SIZE_TEXT];

	if (getrlimit(RLIMIT_MEMLOCK, &limit))
		check_found(check, CHECK_OK, "limit unknown; not needed");
	else
		check_found(check, CHECK_OK, "limit %s; not needed",
			    limit.rlim_cur == RLIM_INFINITY ? "none" : cli_size(limit.rlim_cur, size));
}

static void check_kvm(struct check_list *list, const struct os_features *features)
{
	struct check *check = check_add(list, "KVM", "guests at the processor's speed; TCG works too");

	if (features->kvm_device) {
		check_found(check, CHECK_OK,
			    "/dev/kvm opens; whether an ordinary guest boots on it only a "
			    "try tells");
		return;
	}
	check_found(check, CHECK_LIMITED,
		    access("/dev/kvm", F_OK) ? "there is no /dev/kvm" : "/dev/kvm cannot be opened");
	check_remedy(check, access("/dev/kvm", F_OK)
				    ? "enable virtualization in the firmware, or nested "
				      "virtualization of this VM, and load kvm_intel or kvm_amd"
				    : "join the group kvm: adduser $USER kvm");
}

static void check_run_dir(struct check_list *list)
{
	struct check *check = check_add(list, "run directory", "running VMs under Latent at all");
	char root[VMDIR_PATH_BYTES], why[VMDIR_WHY_BYTES];
	int r = vmdir_root(false, root, why);

	if (!r)
		check_found(check, CHECK_OK, "%s", root);
	else if (r == -ENOENT)
		check_found(check, CHECK_OK, "not there yet; the first VM makes it");
	else
		check_found(check, CHECK_MISSING, "%.250s", why);
	if (check->status == CHECK_MISSING)
		check_remedy(check, "mend it, or choose another one with LATENT_RUNTIME_DIR");
}

/* The first VM whose drives do not use threads. */
static int find_other_io(void *ctx, const char *name)
{
	struct vm_view *found = ctx, view;

	if (vm_view_open(found->root, name, &view))
		return 0;
	if (view.stats.other_io)
		snprintf(found->name, sizeof found->name, "%s", name);
	vm_view_close(&view);
	return found->name[0];
}

static void check_aio(struct check_list *list)
{
	struct check *check = check_add(list, "aio=", "mapping what drives read: aio=threads, QEMU's default");
	struct vm_view found = { .stats_fd = -1 };
	char why[VMDIR_WHY_BYTES];

	if (!vmdir_root(false, found.root, why))
		(void)vmdir_for_each(found.root, find_other_io, &found);
	if (!found.name[0]) {
		check_found(check, CHECK_OK, "no running VM uses io_uring or Linux AIO, whose reads are copied");
		return;
	}
	check_found(check, CHECK_LIMITED, "%s reads by io_uring or Linux AIO: what these drives read is copied", found.name);
	check_remedy(check, "start it without aio=native and aio=io_uring, or with aio=threads");
}

static void check_qemu(struct check_list *list)
{
	struct check *check = check_add(list, "QEMU", "running VMs under Latent at all");
	char path[4096], agent[4096], version[PREFLIGHT_VERSION_BYTES], why[PREFLIGHT_WHY_BYTES];

	if (!find_program(QEMU, path, sizeof path)) {
		check_found(check, CHECK_MISSING, QEMU " is not in PATH");
		check_remedy(check, "apt install qemu-system-x86");
	} else if (cli_agent_path(agent, sizeof agent)) {
		check_found(check, CHECK_MISSING, "the agent latent-qemu.so is not where latent is");
		check_remedy(check, "say where it is with LATENT_AGENT");
	} else if (preflight(path, agent, NULL, version, why)) {
		check_found(check, CHECK_MISSING, "%.250s", why);
		check_remedy(check, "use the QEMU of your distribution");
	} else {
		check_found(check, CHECK_OK, "%.150s, version %s, loads the agent", path, version);
	}
}

static bool find_program(const char *name, char *path, size_t bytes)
{
	const char *at = getenv("PATH");

	for (at = at ? at : "/usr/bin:/bin"; *at;) {
		size_t length = strcspn(at, ":");

		if (length && snprintf(path, bytes, "%.*s/%s", (int)length, at, name) < (int)bytes &&
		    !access(path, X_OK))
			return true;
		at += length + (at[length] == ':');
	}
	return false;
}
