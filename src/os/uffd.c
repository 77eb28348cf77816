/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* userfaultfd: Documentation/admin-guide/mm/userfaultfd.rst. */
#include "os/os.h"

#include "os/probe.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW /* linux/userfaultfd.h of 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

int os_uffd_new(int flags)
{
	long r;

	/* Not by syscall(2): the agent stands in front of that, to see what QEMU does. System V ABI, x86-64. */
	__asm__ volatile("syscall" : "=a"(r) : "a"(SYS_userfaultfd), "D"((long)flags) : "rcx", "r11", "memory");
	return (int)r;
}

static int from_device(int flags)
{
	int device = (int)syscall(SYS_openat, AT_FDCWD, "/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int fd = device < 0 ? -errno : ioctl(device, USERFAULTFD_IOC_NEW, flags);

	if (device >= 0 && fd < 0)
		fd = -errno;
	if (device >= 0)
		close(device);
	return fd;
}

/* Takes fd, which may be an error. */
static int with_features(int fd, uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };

	if (fd < 0)
		return -EPERM;
	if (ioctl(fd, UFFDIO_API, &api)) {
		int r = -errno;

		close(fd);
		return r;
	}
	return fd;
}

static int open_any(uint64_t features, bool unserved)
{
	int flags = O_CLOEXEC | O_NONBLOCK, fd = os_fault(OS_FAULT_UFFD);

	if (fd)
		return fd;
	if ((os_features_get()->uffd_features & features) != features)
		return -EOPNOTSUPP;
	fd = os_uffd_new(flags);
	if (fd < 0)
		fd = from_device(flags);
	if (fd < 0 && unserved)
		fd = os_uffd_new(flags | UFFD_USER_MODE_ONLY);
	return with_features(fd, features);
}

int os_uffd_open(uint64_t features) { return open_any(features, false); }

int os_uffd_open_unserved(uint64_t features) { return open_any(features, true); }

static int register_range(int uffd, void *hva, size_t bytes, uint64_t mode)
{
	struct uffdio_register range = { .range = { (uintptr_t)hva, bytes }, .mode = mode };

	return ioctl(uffd, UFFDIO_REGISTER, &range) ? -errno : 0;
}

int os_uffd_register_wp(int uffd, void *hva, size_t bytes)
{
	return register_range(uffd, hva, bytes, UFFDIO_REGISTER_MODE_WP);
}

int os_uffd_register_missing(int uffd, void *hva, size_t bytes)
{
	int r = os_fault(OS_FAULT_REGISTER);

	return r ? r : register_range(uffd, hva, bytes, UFFDIO_REGISTER_MODE_MISSING);
}

int os_uffd_register_missing_wp(int uffd, void *hva, size_t bytes)
{
	int r = os_fault(OS_FAULT_REGISTER);

	return r ? r
		 : register_range(uffd, hva, bytes,
				  UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);
}

int os_uffd_unregister(int uffd, void *hva, size_t bytes)
{
	struct uffdio_range range = { (uintptr_t)hva, bytes };

	return ioctl(uffd, UFFDIO_UNREGISTER, &range) ? -errno : 0;
}

/* The kernel's answer in the request is how much it has done, or why not. */
int os_uffd_copy(int uffd, void *hva, const void *page)
{
	struct uffdio_copy copy = { .dst = (uintptr_t)hva, .src = (uintptr_t)page, .len = OS_PAGE_BYTES };
	int r;

	do
		r = ioctl(uffd, UFFDIO_COPY, &copy) ? -errno : 0;
	while (r == -EAGAIN || r == -EINTR);
	return r;
}

int os_uffd_zero(int uffd, void *hva)
{
	struct uffdio_zeropage zero = { .range = { (uintptr_t)hva, OS_PAGE_BYTES } };
	int r;

	do
		r = ioctl(uffd, UFFDIO_ZEROPAGE, &zero) ? -errno : 0;
	while (r == -EAGAIN || r == -EINTR);
	return r;
}

void os_uffd_wake(int uffd, void *hva, size_t bytes)
{
	struct uffdio_range range = { (uintptr_t)hva, bytes };

	(void)ioctl(uffd, UFFDIO_WAKE, &range);
}

int os_uffd_protect(int uffd, void *hva, size_t bytes, bool on)
{
	struct uffdio_writeprotect wp = {
		.range = { (uintptr_t)hva, bytes },
		.mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
	};
	int r;

	do
		r = ioctl(uffd, UFFDIO_WRITEPROTECT, &wp) ? -errno : 0;
	while (r == -EAGAIN || r == -EINTR);
	return r;
}

int os_uffd_next_fault(int uffd, uintptr_t *ret_addr)
{
	struct uffd_msg message;
	ssize_t n;

	do {
		n = read(uffd, &message, sizeof message);
		if (n < 0)
			return errno == EAGAIN ? 0 : -errno;
		if (n != sizeof message)
			return -EIO;
	} while (message.event != UFFD_EVENT_PAGEFAULT);
	*ret_addr = (uintptr_t)message.arg.pagefault.address & ~(OS_PAGE_BYTES - 1);
	return 1;
}
