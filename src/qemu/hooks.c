/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Functions of the C library that QEMU calls and the agent stands in front of. Each looks whether
 * the call concerns guest RAM (or a file that is mapped into it) and does what the C library does
 * where it does not. They go to the kernel directly: no hook needs to find the function that it
 * hides, but for sigaction, and none can run before the C library is ready.
 *
 *   mmap, munmap           guest RAM comes and goes
 *   madvise, fallocate     discards (balloon, free page reporting), marks
 *   mbind                  NUMA policies
 *   pread, preadv          reads of disk images: shortcut I/O
 *   pwrite, pwritev        what guest RAM has in common with a disk
 *   posix_fadvise          what QEMU wants dropped from the page cache
 *   open, openat           files that get a writer; device nodes that exclude overlays
 *   sendmsg                guest RAM's descriptor on its way to another process (vhost-user)
 *   mlockall, syscall      memory locking; userfaultfd (post-copy, background snapshots)
 *   ioctl                  KVM_RUN that failed on a page; devices that get guest RAM
 *   io_submit, io_uring_submit   I/O that no thread of QEMU does
 *   sigaction, pthread_sigmask   SIGBUS
 */
/* Else the headers turn mmap into mmap64 and so on, and each name must be what it says. */
#undef _FILE_OFFSET_BITS
#undef _FORTIFY_SOURCE

#include "qemu/agent.h"

#include "os/os.h"
#include "vmdir/compat.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/aio_abi.h>
#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/udmabuf.h>
#include <linux/vfio.h>
#include <linux/vhost.h>
#include <scsi/sg.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HOOK __attribute__((visibility("default")))

/* System V ABI, x86-64. As syscall(2), which is hooked itself. */
static long raw(long n, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long r;

	__asm__ volatile("syscall"
			 : "=a"(r)
			 : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	if (r < 0 && r > -4096) {
		errno = (int)-r;
		return -1;
	}
	return r;
}

static int fail(int r)
{
	errno = -r;
	return -1;
}

/* ---- mappings --------------------------------------------------------------------------------- */

/* QEMU maps a page of guest RAM anew after a memory error. */
static void *map_again(struct agent *a, void *addr, size_t bytes, int prot, int flags, int fd, off_t offset)
{
	void *at = MAP_FAILED;
	int r;

	restorer_wait();
	ram_lock(a->ram);
	r = ram_for_part(a->ram, addr, bytes, ram_unmask_part); /* a new mapping is not watched */
	if (!r) {
		(void)ram_for_part(a->ram, addr, bytes, ram_return_base);
		at = (void *)raw(SYS_mmap, (long)addr, (long)bytes, prot, flags, fd, offset);
	}
	ram_unlock(a->ram);
	if (r)
		errno = -r;
	return at;
}

static void *map(void *addr, size_t bytes, int prot, int flags, int fd, off_t offset)
{
	struct agent *a = flags & MAP_FIXED ? agent_get() : NULL;
	void *at;

	if (a && ram_find(a->ram, addr, bytes))
		return map_again(a, addr, bytes, prot, flags, fd, offset);
	at = (void *)raw(SYS_mmap, (long)addr, (long)bytes, prot, flags, fd, offset);

	if (at != MAP_FAILED && fd >= 0 && (flags & MAP_TYPE) != MAP_PRIVATE && (prot & PROT_WRITE) &&
	    agent_is_ram(fd))
		agent_ram_mapped(at, bytes, fd, (uint64_t)offset);
	return at;
}

HOOK void *mmap(void *addr, size_t bytes, int prot, int flags, int fd, off_t offset)
{
	return map(addr, bytes, prot, flags, fd, offset);
}

HOOK void *mmap64(void *addr, size_t bytes, int prot, int flags, int fd, off64_t offset)
{
	return map(addr, bytes, prot, flags, fd, offset);
}

HOOK int munmap(void *addr, size_t bytes)
{
	agent_ram_unmapped(addr, bytes);
	return (int)raw(SYS_munmap, (long)addr, (long)bytes, 0, 0, 0, 0);
}

static bool touches_ram(struct ram *ram, const void *hva, size_t bytes)
{
	return ram_find(ram, hva, 1) || (bytes && ram_find(ram, (const uint8_t *)hva + bytes - 1, 1));
}

static bool changes_pages(int advice)
{
	return advice == MADV_DONTNEED || advice == MADV_REMOVE || advice == MADV_POPULATE_WRITE;
}

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* Of guest RAM no page could be missing alone then; see "Huge pages" in docs/activity.md. Advice need not be taken. */
static bool wants_large(int advice) { return advice == MADV_HUGEPAGE || advice == MADV_COLLAPSE; }

HOOK int madvise(void *hva, size_t bytes, int advice)
{
	struct agent *a = agent_get();
	int r;

	bytes = (bytes + OS_PAGE_BYTES - 1) & ~(OS_PAGE_BYTES - 1); /* as the kernel does */
	if (!a || (uintptr_t)hva & (OS_PAGE_BYTES - 1) || !touches_ram(a->ram, hva, bytes))
		return (int)raw(SYS_madvise, (long)hva, (long)bytes, advice, 0, 0, 0);
	if (wants_large(advice))
		return 0;
	if (changes_pages(advice))
		restorer_wait();
	ram_lock(a->ram);
	if (advice == MADV_DONTNEED)
		r = ram_for_part(a->ram, hva, bytes, ram_zap_base);
	else if (advice == MADV_REMOVE)
		r = ram_for_part(a->ram, hva, bytes, ram_discard);
	else
		r = raw(SYS_madvise, (long)hva, (long)bytes, advice, 0, 0, 0) ? -errno : 0;
	if (!r)
		ram_remember_advice(a->ram, hva, bytes, advice);
	ram_unlock(a->ram);
	return r ? fail(r) : 0;
}

/* A hole in guest RAM's memfd: the guest must read zeros there, whatever is mapped over it. */
static int punch_ram(struct agent *a, uint64_t offset, uint64_t bytes, bool *ret_held)
{
	int r;

	restorer_wait();
	ram_lock(a->ram);
	r = ram_for_file_part(a->ram, offset, bytes, ram_discard);
	*ret_held = ram_is_held(a->ram);
	ram_unlock(a->ram);
	if (!r)
		stat_add(&a->stats->pages_discarded, bytes >> OS_PAGE_SHIFT);
	return r;
}

static int allocate(int fd, int mode, off_t offset, off_t bytes)
{
	struct agent *a = agent_get();

	if (a && (mode & FALLOC_FL_PUNCH_HOLE) && offset >= 0 && bytes > 0 && agent_is_ram(fd)) {
		bool held;
		int r = punch_ram(a, (uint64_t)offset, (uint64_t)bytes, &held);

		if (r || held) /* held: the hole would take what is still to be saved */
			return r ? fail(r) : 0;
	}
	return (int)raw(SYS_fallocate, fd, mode, offset, bytes, 0, 0);
}

HOOK int fallocate(int fd, int mode, off_t offset, off_t bytes)
{
	return allocate(fd, mode, offset, bytes);
}

HOOK int fallocate64(int fd, int mode, off64_t offset, off64_t bytes)
{
	return allocate(fd, mode, offset, bytes);
}

/* Of libnuma, where QEMU sets the policy of a memory backend. */
HOOK long mbind(void *hva, unsigned long bytes, int mode, const unsigned long *nodes, unsigned long max_node,
		unsigned flags);

HOOK long mbind(void *hva, unsigned long bytes, int mode, const unsigned long *nodes, unsigned long max_node,
		unsigned flags)
{
	struct os_policy policy = { .mode = mode };
	struct agent *a = agent_get();
	long r = raw(SYS_mbind, (long)hva, (long)bytes, mode, (long)nodes, (long)max_node, flags);

	if (r || !a || max_node > OS_NODES || !touches_ram(a->ram, hva, bytes))
		return r;
	if (nodes && max_node > 1) {
		memcpy(policy.nodes, nodes, (max_node - 1 + 7) / 8);
		policy.max_node = max_node;
	}
	ram_lock(a->ram);
	ram_remember_policy(a->ram, hva, bytes, &policy);
	ram_unlock(a->ram);
	return 0;
}

HOOK int mlockall(int flags)
{
	/* It would make a private copy of every page that is mapped from a file. */
	int r = agent_exclude("mlockall: locked memory");

	return r ? fail(r) : (int)raw(SYS_mlockall, flags, 0, 0, 0, 0, 0);
}

/* ---- reads ------------------------------------------------------------------------------------ */

static bool into_ram(struct agent *a, const struct iovec *iov, int count)
{
	for (int i = 0; i < count; i++)
		if (iov[i].iov_len && ram_find(a->ram, iov[i].iov_base, iov[i].iov_len))
			return true;
	return false;
}

static ssize_t read_vector(int fd, const struct iovec *iov, int count, off_t offset)
{
	struct agent *a = agent_get();
	ssize_t n;

	if (a && count > 0 && count <= 1024 && into_ram(a, iov, count)) {
		struct ram_read read = { .iov = iov, .count = count };

		ram_read_begins(a->ram, &read); /* with O_DIRECT it is a device that writes these pages */
		n = volumes_read(a->volumes, fd, iov, count, offset);
		ram_read_ends(a->ram, &read);
		return n < 0 ? fail((int)n) : n;
	}
	n = raw(SYS_preadv, fd, (long)iov, count, offset, 0, 0);
	if (a && n > 0)
		volumes_note_other(a->volumes, fd, (uint64_t)n);
	return n;
}

static ssize_t read_one(int fd, void *buffer, size_t bytes, off_t offset)
{
	struct iovec iov = { buffer, bytes };

	return read_vector(fd, &iov, 1, offset);
}

HOOK ssize_t preadv(int fd, const struct iovec *iov, int count, off_t offset)
{
	return read_vector(fd, iov, count, offset);
}

HOOK ssize_t preadv64(int fd, const struct iovec *iov, int count, off64_t offset)
{
	return read_vector(fd, iov, count, offset);
}

HOOK ssize_t pread(int fd, void *buffer, size_t bytes, off_t offset)
{
	return read_one(fd, buffer, bytes, offset);
}

HOOK ssize_t pread64(int fd, void *buffer, size_t bytes, off64_t offset)
{
	return read_one(fd, buffer, bytes, offset);
}

/* ---- writes ----------------------------------------------------------------------------------- */

static ssize_t write_vector(int fd, const struct iovec *iov, int count, off_t offset)
{
	struct agent *a = agent_get();
	ssize_t n = raw(SYS_pwritev, fd, (long)iov, count, offset, 0, 0);

	if (a && n > 0 && into_ram(a, iov, count))
		volumes_note_write(a->volumes, fd, iov, count, offset, (size_t)n);
	return n;
}

static ssize_t write_one(int fd, const void *buffer, size_t bytes, off_t offset)
{
	struct iovec iov = { (void *)(uintptr_t)buffer, bytes };

	return write_vector(fd, &iov, 1, offset);
}

HOOK ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t offset)
{
	return write_vector(fd, iov, count, offset);
}

HOOK ssize_t pwritev64(int fd, const struct iovec *iov, int count, off64_t offset)
{
	return write_vector(fd, iov, count, offset);
}

HOOK ssize_t pwrite(int fd, const void *buffer, size_t bytes, off_t offset)
{
	return write_one(fd, buffer, bytes, offset);
}

HOOK ssize_t pwrite64(int fd, const void *buffer, size_t bytes, off64_t offset)
{
	return write_one(fd, buffer, bytes, offset);
}

/* ---- what QEMU drops ---------------------------------------------------------------------------- */

/*
 * When a VM is activated after a migration, QEMU drops what the host has cached of its images, for another
 * machine may have written them. An image that cannot have changed keeps its pages: all guests share them. And after a
 * save, for which QEMU has migrated nowhere, all do: the guest stands until QEMU has read again what it drops.
 */
static int advise_file(int fd, off_t offset, off_t bytes, int advice)
{
	struct agent *a = agent_get();

	if (a && advice == POSIX_FADV_DONTNEED && (saver_stays() || volumes_is_mapped(a->volumes, fd)))
		return 0;
	return raw(SYS_fadvise64, fd, offset, bytes, advice, 0, 0) ? errno : 0;
}

HOOK int posix_fadvise(int fd, off_t offset, off_t bytes, int advice)
{
	return advise_file(fd, offset, bytes, advice);
}

HOOK int posix_fadvise64(int fd, off64_t offset, off64_t bytes, int advice)
{
	return advise_file(fd, offset, bytes, advice);
}

/* What _FORTIFY_SOURCE turns calls into; no header declares them. */
HOOK ssize_t __pread64_chk(int fd, void *buffer, size_t bytes, off64_t offset, size_t room);
HOOK int __open_2(const char *path, int flags);
HOOK int __open64_2(const char *path, int flags);

HOOK ssize_t __pread64_chk(int fd, void *buffer, size_t bytes, off64_t offset, size_t room)
{
	if (bytes > room)
		__builtin_trap(); /* as _FORTIFY_SOURCE demands */
	return read_one(fd, buffer, bytes, offset);
}

/* ---- files ------------------------------------------------------------------------------------ */

/* Device nodes of the compatibility table. */
static int check_path(const char *path)
{
	const struct compat_rule *rule = compat_find(COMPAT_FILE, path, NULL, NULL);
	char sentence[160];

	if (!rule || !(rule->excludes & COMPAT_OVERLAYS))
		return 0;
	if (!strcmp(path, "/dev/userfaultfd"))
		scanner_leave();
	compat_sentence(rule, path, sentence, sizeof sentence);
	return agent_exclude(sentence);
}

static int open_at(int dir, const char *path, int flags, mode_t mode)
{
	if (agent_get()) {
		int r = strncmp(path, "/dev/", 5) ? 0 : check_path(path);

		if (!r && ((flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC)))
			r = agent_before_write(dir, path);
		if (r)
			return fail(r);
	}
	return (int)raw(SYS_openat, dir, (long)path, flags, (long)mode, 0, 0);
}

static mode_t take_mode(int flags, va_list args)
{
	return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(args, mode_t) : 0;
}

#define HOOK_OPEN(name)                                           \
	HOOK int name(const char *path, int flags, ...)           \
	{                                                         \
		va_list args;                                     \
		mode_t mode;                                      \
                                                                  \
		va_start(args, flags);                            \
		mode = take_mode(flags, args);                    \
		va_end(args);                                     \
		return open_at(AT_FDCWD, path, flags, mode);      \
	}

#define HOOK_OPENAT(name)                                         \
	HOOK int name(int dir, const char *path, int flags, ...)  \
	{                                                         \
		va_list args;                                     \
		mode_t mode;                                      \
                                                                  \
		va_start(args, flags);                            \
		mode = take_mode(flags, args);                    \
		va_end(args);                                     \
		return open_at(dir, path, flags, mode);           \
	}

HOOK_OPEN(open)
HOOK_OPEN(open64)
HOOK_OPENAT(openat)
HOOK_OPENAT(openat64)

HOOK int __open_2(const char *path, int flags)
{
	return open_at(AT_FDCWD, path, flags, 0);
}

HOOK int __open64_2(const char *path, int flags)
{
	return open_at(AT_FDCWD, path, flags, 0);
}

/* ---- other processes, other mechanisms -------------------------------------------------------- */

static bool carries_ram(const struct msghdr *message)
{
	struct msghdr *m = (struct msghdr *)message;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
		size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < count; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
			if (agent_is_ram(fd))
				return true;
		}
	}
	return false;
}

HOOK ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	if (message->msg_controllen && carries_ram(message)) {
		int r = agent_exclude("vhost-user: another process maps guest RAM");

		if (r)
			return fail(r);
		agent_get()->ram_given = true;
	}
	service_before_send(fd, message->msg_iov, message->msg_iovlen);
	return raw(SYS_sendmsg, fd, (long)message, flags, 0, 0, 0);
}

ssize_t agent_send(int fd, const struct msghdr *message)
{
	return raw(SYS_sendmsg, fd, (long)message, MSG_NOSIGNAL, 0, 0, 0);
}

/* It reads six arguments, whether they were given or not. */
__attribute__((no_sanitize("address"))) HOOK long syscall(long n, ...)
{
	va_list args;
	long a[6];

	va_start(args, n);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(args, long);
	va_end(args);
	if (n == SYS_userfaultfd) {
		int r;

		scanner_leave();
		r = agent_exclude("userfaultfd: QEMU's post-copy or background snapshot");

		if (r)
			return fail(r);
	}
	return raw(n, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* linux/aio_abi.h and liburing.h: what is submitted to the kernel there, it carries out by itself. */
static void note_kernel_read(int fd, const struct iovec *iov, int count)
{
	struct agent *a = agent_get();

	if (a && into_ram(a, iov, count))
		volumes_note_kernel_read(a->volumes, fd, iov, count);
}

static void note_iocb(const struct iocb *block)
{
	struct iovec one = { (void *)(uintptr_t)block->aio_buf, block->aio_nbytes };

	if (block->aio_lio_opcode == IOCB_CMD_PREAD)
		note_kernel_read((int)block->aio_fildes, &one, 1);
	else if (block->aio_lio_opcode == IOCB_CMD_PREADV)
		note_kernel_read((int)block->aio_fildes, one.iov_base, (int)one.iov_len);
}

HOOK int io_submit(void *context, long count, struct iocb **blocks);

HOOK int io_submit(void *context, long count, struct iocb **blocks)
{
	long r;

	agent_note_kernel_io(true);
	for (long i = 0; i < count; i++)
		note_iocb(blocks[i]);
	r = raw(SYS_io_submit, (long)context, count, (long)blocks, 0, 0, 0);
	return r < 0 ? -errno : (int)r;
}

static void note_sqe(const struct io_uring_sqe *sqe)
{
	struct iovec one = { (void *)(uintptr_t)sqe->addr, sqe->len };

	if (sqe->flags & IOSQE_FIXED_FILE)
		return;
	if (sqe->opcode == IORING_OP_READ)
		note_kernel_read(sqe->fd, &one, 1);
	else if (sqe->opcode == IORING_OP_READV)
		note_kernel_read(sqe->fd, one.iov_base, (int)one.iov_len);
}

HOOK int io_uring_submit(struct io_uring *ring)
{
	static int (*real)(struct io_uring *);
	const struct io_uring_sq *sq = &ring->sq;

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "io_uring_submit");
	agent_note_kernel_io(true);
	for (unsigned i = sq->sqe_head; i != sq->sqe_tail; i++)
		note_sqe(&sq->sqes[i & *sq->kring_mask]);
	return real(ring);
}

/* Devices whose descriptors may have come from elsewhere. */
static int check_ioctl(unsigned long request)
{
	static const struct {
		unsigned long request;
		const char *what;
	} table[] = {
		{ VFIO_IOMMU_MAP_DMA, "VFIO: a device reads and writes guest RAM by itself" },
		{ _IO(';', 0x85), "VFIO: a device reads and writes guest RAM by itself" }, /* IOMMU_IOAS_MAP, linux/iommufd.h of 6.2 */
		{ UDMABUF_CREATE, "udmabuf: guest RAM is lent to the GPU" },
		{ UDMABUF_CREATE_LIST, "udmabuf: guest RAM is lent to the GPU" },
		{ VHOST_VDPA_SET_STATUS, "vhost-vdpa: a device reads and writes guest RAM by itself" },
		{ KVM_MEMORY_ENCRYPT_REG_REGION, "memory encryption" },
	};

	for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
		if (table[i].request == request)
			return agent_exclude(table[i].what);
	return 0;
}

HOOK int ioctl(int fd, unsigned long request, ...)
{
	va_list args;
	long arg, r;

	va_start(args, request);
	arg = va_arg(args, long);
	va_end(args);
	r = agent_get() ? check_ioctl(request) : 0;
	if (request == VHOST_SET_OWNER)
		agent_note_kernel_io(false);
	if (request == SG_IO && agent_get())
		reclaimer_leave(); /* a disk that is passed through: it may write pages that it has pinned */
	if (r)
		return fail((int)r);
	r = raw(SYS_ioctl, fd, (long)request, arg, 0, 0, 0);
	if (r < 0 && request == KVM_RUN && errno == EFAULT && agent_get()) {
		agent_explain_kvm_fault();
		errno = EFAULT;
	}
	return (int)r;
}

int hooks_real_sigaction(int signal, const struct sigaction *act, struct sigaction *old)
{
	static int (*real)(int, const struct sigaction *, struct sigaction *);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "sigaction");
	return real(signal, act, old);
}

HOOK int sigaction(int signal, const struct sigaction *act, struct sigaction *old)
{
	return signal == SIGBUS && agent_get() ? agent_set_sigbus(act, old)
					       : hooks_real_sigaction(signal, act, old);
}

/* A thread that has SIGBUS blocked, as QEMU's have under TCG, dies of an unreadable page without a word. One
 * that blocks the other signal cannot be stopped. */
HOOK int pthread_sigmask(int how, const sigset_t *set, sigset_t *old)
{
	static int (*real)(int, const sigset_t *, sigset_t *);
	sigset_t open;

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "pthread_sigmask");
	if (!set || how == SIG_UNBLOCK || !agent_is_configured())
		return real(how, set, old);
	open = *set;
	sigdelset(&open, SIGBUS);
	sigdelset(&open, AGENT_FREEZE_SIGNAL);
	return real(how, &open, old);
}
