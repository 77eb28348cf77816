/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * All by system calls of its own: the agent interposes the C library's mmap, madvise and open, and
 * must not meet itself here.
 */
#include "os/probe.h"

#include "os/os.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW /* linux/userfaultfd.h of 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

#define PAGEMAP_SOFT_DIRTY (1ull << 55)

static struct os_features features;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* ---- helpers: files of one line ------------------------------------------------------------- */

static int open_raw(const char *path, int flags)
{
	return (int)syscall(SYS_openat, AT_FDCWD, path, flags | O_CLOEXEC);
}

static void close_raw(int fd)
{
	if (fd >= 0)
		syscall(SYS_close, fd);
}

static bool can_open(const char *path, int flags)
{
	int fd = open_raw(path, flags);

	close_raw(fd);
	return fd >= 0;
}

static bool exists(const char *path)
{
	return syscall(SYS_faccessat, AT_FDCWD, path, F_OK) == 0;
}

/* The file's first bytes as a string; false and "" if it cannot be read. */
static bool read_text(const char *path, char *text, size_t text_bytes)
{
	int fd = open_raw(path, O_RDONLY);
	long n = fd < 0 ? -1 : syscall(SYS_read, fd, text, text_bytes - 1);

	close_raw(fd);
	text[n > 0 ? n : 0] = '\0';
	return n > 0;
}

static long read_number(const char *path, long otherwise)
{
	char text[32];

	return read_text(path, text, sizeof text) ? strtol(text, NULL, 10) : otherwise;
}

/* Of "always [madvise] never" the word in brackets. */
static void read_setting(const char *path, char setting[OS_SETTING_BYTES])
{
	char text[128], *from, *to;

	setting[0] = '\0';
	if (!read_text(path, text, sizeof text))
		return;
	from = strchr(text, '[');
	to = from ? strchr(from, ']') : NULL;
	if (!to)
		return;
	*to = '\0';
	snprintf(setting, OS_SETTING_BYTES, "%s", from + 1);
}

/* ---- page tables ---------------------------------------------------------------------------- */

/* A page that has been written carries the bit from its birth, if the kernel knows the bit at all. */
static bool page_is_soft_dirty(int pagemap_fd, const void *page)
{
	off_t at = (off_t)((uintptr_t)page / OS_PAGE_BYTES * sizeof(uint64_t));
	uint64_t word = 0;

	if (syscall(SYS_pread64, pagemap_fd, &word, sizeof word, at) != sizeof word)
		return false;
	return word & PAGEMAP_SOFT_DIRTY;
}

static void probe_page(char *page)
{
	int fd = open_raw("/proc/self/pagemap", O_RDONLY);

	features.populate_read = !syscall(SYS_madvise, page, OS_PAGE_BYTES, MADV_POPULATE_READ);
	features.populate_write = !syscall(SYS_madvise, page, OS_PAGE_BYTES, MADV_POPULATE_WRITE);
	*(volatile char *)page = 1;
	features.pagemap = fd >= 0;
	features.pagemap_scan = fd >= 0 && os_pagemap_has_scan(fd);
	features.soft_dirty = fd >= 0 && page_is_soft_dirty(fd, page);
	close_raw(fd);
}

static void probe_page_tables(void)
{
	long page = syscall(SYS_mmap, NULL, OS_PAGE_BYTES, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, (off_t)0);

	features.page_idle = exists("/sys/kernel/mm/page_idle/bitmap");
	features.damon = exists("/sys/kernel/mm/damon/admin");
	if (page == -1)
		return;
	probe_page((char *)page);
	syscall(SYS_munmap, page, OS_PAGE_BYTES);
}

/* ---- userfaultfd ---------------------------------------------------------------------------- */

/* Asks a new context for its features and closes it. True if `fd` is one. */
static bool take_uffd(int fd)
{
	struct uffdio_api api = { .api = UFFD_API };

	if (fd < 0)
		return false;
	if (!ioctl(fd, UFFDIO_API, &api))
		features.uffd_features |= api.features;
	close_raw(fd);
	return true;
}

static int uffd_from_device(void)
{
	int device = open_raw("/dev/userfaultfd", O_RDWR), fd = -1;

	if (device >= 0)
		fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	close_raw(device);
	return fd;
}

static void probe_userfaultfd(void)
{
	int flags = O_CLOEXEC | O_NONBLOCK;

	features.uffd_syscall = take_uffd(os_uffd_new(flags));
	features.uffd_device = take_uffd(uffd_from_device());
	features.uffd_user_only = take_uffd(os_uffd_new(flags | UFFD_USER_MODE_ONLY));
	features.uffd_sysctl = (int)read_number("/proc/sys/vm/unprivileged_userfaultfd", -1);
}

/* ---- the rest ------------------------------------------------------------------------------- */

static void probe_kernel(void)
{
	struct utsname name;

	if (uname(&name))
		return;
	snprintf(features.kernel_release, sizeof features.kernel_release, "%s", name.release);
	(void)sscanf(name.release, "%u.%u.%u", &features.kernel_major, &features.kernel_minor,
		     &features.kernel_patch);
}

static bool has_capability(unsigned capability)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = { 0 };

	if (syscall(SYS_capget, &header, data))
		return false;
	return data[CAP_TO_INDEX(capability)].effective & CAP_TO_MASK(capability);
}

static void probe_memory(void)
{
	struct sysinfo info;

	features.max_maps = os_max_maps();
	if (!sysinfo(&info))
		features.swap_bytes = (uint64_t)info.totalswap * info.mem_unit;
	read_setting("/sys/kernel/mm/transparent_hugepage/shmem_enabled", features.shmem_thp);
	read_setting("/sys/kernel/mm/transparent_hugepage/enabled", features.thp);
	features.ksm = exists("/sys/kernel/mm/ksm/run");
	features.ksm_runs = read_number("/sys/kernel/mm/ksm/run", 0) == 1;
}

static void probe_all(void)
{
	probe_kernel();
	probe_page_tables();
	probe_userfaultfd();
	probe_memory();
	features.cap_lease = has_capability(CAP_LEASE);
	features.lease_break_s = (int)read_number("/proc/sys/fs/lease-break-time", -1);
	features.kvm_device = can_open("/dev/kvm", O_RDWR);
}

const struct os_features *os_features_get(void)
{
	pthread_once(&once, probe_all);
	return &features;
}
