/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

#define SYS_CACHESTAT 451 /* Linux 6.5 */
/* The kernel may take no more of one request (read_ahead_kb), and forgets the rest. */
#define EXPECT_BYTES 131072u

static const struct {
	unsigned mark;
	int advice, undo;
	bool base_only;
} mark_table[] = {
	{ OS_MARK_DONTFORK, MADV_DONTFORK, MADV_DOFORK, false },
	{ OS_MARK_DONTDUMP, MADV_DONTDUMP, MADV_DODUMP, false },
	{ OS_MARK_HUGEPAGE, MADV_HUGEPAGE, MADV_NOHUGEPAGE, true },
	{ OS_MARK_NOHUGEPAGE, MADV_NOHUGEPAGE, MADV_HUGEPAGE, true },
};
#define MARKS (sizeof mark_table / sizeof mark_table[0])

#define ZAP_RANGES 512u

unsigned os_mark_of_advice(int advice, unsigned *ret_clears)
{
	unsigned sets = 0;

	*ret_clears = 0;
	for (size_t i = 0; i < MARKS; i++) {
		if (mark_table[i].advice == advice)
			sets = mark_table[i].mark;
		if (mark_table[i].undo == advice)
			*ret_clears |= mark_table[i].mark;
	}
	return sets;
}

/*
 * The system calls themselves: the agent interposes the C library's mmap and madvise, and comes
 * here from inside them.
 */
static int map_over(void *hva, size_t bytes, int flags, int fd, uint64_t offset)
{
	long got = syscall(SYS_mmap, hva, bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, offset);

	return got == -1 ? -errno : 0;
}

static int advise(const void *hva, size_t bytes, int advice)
{
	return syscall(SYS_madvise, hva, bytes, advice) ? -errno : 0;
}

int os_set_marks(void *hva, size_t bytes, unsigned marks, bool base)
{
	int r = marks ? os_fault(OS_FAULT_MARK) : 0;

	for (size_t i = 0; !r && i < MARKS; i++) {
		if (!(marks & mark_table[i].mark) || (mark_table[i].base_only && !base))
			continue;
		r = advise(hva, bytes, mark_table[i].advice);
		if (r == -EINVAL) /* a kernel without that feature: the mark has no meaning on it */
			r = 0;
	}
	return r;
}

int os_map_base_over(void *hva, size_t bytes, int fd, uint64_t offset)
{
	int r = os_fault(OS_FAULT_MAP_BASE);

	return r ? r : map_over(hva, bytes, MAP_SHARED, fd, offset);
}

int os_map_file_over(void *hva, size_t bytes, int fd, uint64_t offset)
{
	int r = os_fault(OS_FAULT_MAP_FILE);

	return r ? r : map_over(hva, bytes, MAP_PRIVATE | MAP_NORESERVE, fd, offset);
}

int os_set_policy(void *hva, size_t bytes, const struct os_policy *p)
{
	return syscall(SYS_mbind, hva, bytes, p->mode, p->nodes, p->max_node, 0) ? -errno : 0;
}

bool os_is_mapped(void *hva, size_t bytes)
{
	/* msync says ENOMEM for a hole and does nothing else: MS_ASYNC has had no effect since 2.6.19. */
	return syscall(SYS_msync, hva, bytes, MS_ASYNC) == 0;
}

int os_populate_write(void *hva, size_t bytes)
{
	int r = os_fault(OS_FAULT_POPULATE);

	while (!r) {
		r = advise(hva, bytes, MADV_POPULATE_WRITE);
		if (r == -EINTR || r == -EAGAIN)
			r = 0;
		else
			break;
	}
	return r;
}

int os_zap(void *hva, size_t bytes)
{
	return syscall(SYS_madvise, hva, bytes, MADV_DONTNEED) ? -errno : 0;
}

void os_zap_many(const struct os_range *ranges, size_t count)
{
	struct iovec iov[ZAP_RANGES];
	int self = (int)syscall(SYS_pidfd_open, getpid(), 0);

	while (count) {
		size_t n = count < ZAP_RANGES ? count : ZAP_RANGES;

		for (size_t i = 0; i < n; i++)
			iov[i] = (struct iovec){ ranges[i].hva, ranges[i].bytes };
		/* Any advice for oneself: Linux 6.13. It tells how far it has come, or fails at the first. */
		if (self < 0 || syscall(SYS_process_madvise, self, iov, n, MADV_DONTNEED, 0) < 0)
			for (size_t i = 0; i < n; i++)
				(void)os_zap(ranges[i].hva, ranges[i].bytes);
		ranges += n;
		count -= n;
	}
	if (self >= 0)
		close(self);
}

void os_populate_read(void *hva, size_t bytes)
{
	(void)advise(hva, bytes, MADV_POPULATE_READ);
}

uint64_t os_readable_pages(const void *hva, uint64_t pages)
{
	enum { AT_ONCE = 256 };
	uint8_t bytes[AT_ONCE];
	struct iovec to = { bytes, AT_ONCE }, from[AT_ONCE];
	uint64_t done = 0;

	while (done < pages) {
		uint64_t n = pages - done < AT_ONCE ? pages - done : AT_ONCE;
		ssize_t got;

		for (uint64_t i = 0; i < n; i++)
			from[i] = (struct iovec){ (uint8_t *)hva + os_bytes(done + i), 1 };
		got = process_vm_readv(getpid(), &to, 1, from, n, 0);
		if (got < 0 && errno != EFAULT) /* forbidden: nothing can be said */
			return pages;
		done += got > 0 ? (uint64_t)got : 0;
		if (got != (ssize_t)n)
			break;
	}
	return done;
}

int os_punch_hole(int fd, uint64_t offset, size_t bytes)
{
	int r = os_fault(OS_FAULT_PUNCH);

	if (r)
		return r;
	do
		r = syscall(SYS_fallocate, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset,
			    (off_t)bytes) ? -errno : 0;
	while (r == -EINTR);
	return r;
}

bool os_has_data(int fd, uint64_t offset, size_t bytes)
{
	off_t at = lseek(fd, (off_t)offset, SEEK_DATA);

	if (at < 0)
		return errno != ENXIO;
	return (uint64_t)at < offset + bytes;
}

bool os_next_data(int fd, uint64_t from, uint64_t end, uint64_t *ret_from, uint64_t *ret_to)
{
	off_t data = lseek(fd, (off_t)from, SEEK_DATA), hole;

	if (data < 0 || (uint64_t)data >= end)
		return false;
	hole = lseek(fd, data, SEEK_HOLE);
	*ret_from = (uint64_t)data;
	*ret_to = hole < 0 || (uint64_t)hole > end ? end : (uint64_t)hole;
	return true;
}

void *os_view_file(int fd, size_t bytes, bool writable)
{
	int prot = PROT_READ | (writable ? PROT_WRITE : 0);
	long view = syscall(SYS_mmap, NULL, bytes, prot, MAP_SHARED | MAP_NORESERVE, fd, (off_t)0);

	if (view == -1)
		return NULL;
	advise((void *)view, bytes, MADV_DONTFORK);
	advise((void *)view, bytes, MADV_DONTDUMP);
	return (void *)view;
}

bool os_replace_view(void *view, size_t bytes)
{
	return syscall(SYS_mmap, view, bytes, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, (off_t)0) != -1;
}

void os_unview_file(void *view, size_t bytes)
{
	if (view)
		syscall(SYS_munmap, view, bytes);
}

/* mincore(2) since Linux 5.2 */
bool os_residency_is_told(int fd)
{
	char path[32];
	struct stat st;

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return !fstat(fd, &st) && (geteuid() == st.st_uid || !access(path, W_OK));
}

uint64_t os_resident_pages(const void *view, uint64_t offset, uint64_t pages)
{
	unsigned char in_core[256];
	uint64_t resident = 0;

	for (uint64_t done = 0; done < pages;) {
		uint64_t n = pages - done < sizeof in_core ? pages - done : sizeof in_core;
		const uint8_t *at = (const uint8_t *)view + offset + os_bytes(done);

		if (syscall(SYS_mincore, at, os_bytes(n), in_core))
			return resident;
		for (uint64_t i = 0; i < n; i++)
			resident += in_core[i] & 1;
		done += n;
	}
	return resident;
}

uint64_t os_cached_pages(int fd, uint64_t offset, uint64_t bytes)
{
	struct {
		uint64_t offset, bytes;
	} range = { offset, bytes };
	struct {
		uint64_t cached, dirty, writeback, evicted, recently_evicted;
	} found;

	return syscall(SYS_CACHESTAT, fd, &range, &found, 0) ? UINT64_MAX : found.cached;
}

void os_drop_cached(int fd, uint64_t offset, uint64_t bytes)
{
	(void)syscall(SYS_fadvise64, fd, (off_t)offset, (off_t)bytes,
		      POSIX_FADV_DONTNEED); /* not by the agent's own hook */
}

void os_drop_cached_around(int fd, uint64_t offset, uint64_t bytes)
{
	uint64_t from = offset & ~(uint64_t)(OS_PAGE_BYTES - 1);

	os_drop_cached(fd, from, ((offset + bytes + OS_PAGE_BYTES - 1) & ~(uint64_t)(OS_PAGE_BYTES - 1)) - from);
}

int os_flush_cached(int fd)
{
	int r = os_fault(OS_FAULT_FLUSH);

	while (!r && sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
						      SYNC_FILE_RANGE_WAIT_AFTER))
		if (errno != EINTR)
			r = -errno;
	if (!r)
		os_drop_cached(fd, 0, 0);
	return r;
}

void os_expect_read(int fd, uint64_t offset, uint64_t bytes)
{
	for (uint64_t done = 0; done < bytes; done += EXPECT_BYTES)
		(void)syscall(SYS_fadvise64, fd, (off_t)(offset + done),
			      (off_t)(bytes - done < EXPECT_BYTES ? bytes - done : EXPECT_BYTES),
			      POSIX_FADV_WILLNEED);
}

void os_expect_random(int fd) { (void)syscall(SYS_fadvise64, fd, (off_t)0, (off_t)0, POSIX_FADV_RANDOM); }

int os_memfd_create(const char *name, uint64_t bytes, bool inherit)
{
	int fd = memfd_create(name, MFD_ALLOW_SEALING | (inherit ? 0 : MFD_CLOEXEC));
	int r;

	if (fd < 0)
		return -errno;
	if (bytes && (ftruncate(fd, (off_t)bytes) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW))) {
		r = -errno;
		close(fd);
		return r;
	}
	return fd;
}

bool os_memfd_is_fine_grained(void)
{
	static const size_t huge_bytes = 2u << 20;
	int fd = os_memfd_create("latent-probe", 2 * huge_bytes, false);
	const uint8_t page[OS_PAGE_BYTES] = { 1 };
	uint64_t from = 0, to = 0;
	bool fine = fd >= 0 && !os_write_all(fd, page, sizeof page, huge_bytes) &&
		    os_next_data(fd, 0, 2 * huge_bytes, &from, &to) && from == huge_bytes && to - from == sizeof page;

	if (fd >= 0)
		close(fd);
	return fine;
}

#ifdef F_SEAL_FUTURE_WRITE
#define TABLE_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)
#else
#define TABLE_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#endif

int os_table_create(const char *name, size_t bytes, int *ret_fd, void **ret_table)
{
	int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	void *table = NULL;
	int r = fd < 0 || ftruncate(fd, (off_t)bytes) ? -errno : 0;

	if (!r) {
		table = os_view_file(fd, bytes, true);
		r = table ? 0 : -ENOMEM;
	}
	if (!r && fcntl(fd, F_ADD_SEALS, TABLE_SEALS))
		r = -errno;
	if (r) {
		os_table_destroy(fd, table, bytes);
		return r;
	}
	*ret_fd = fd;
	*ret_table = table;
	return 0;
}

void os_table_destroy(int fd, void *table, size_t bytes)
{
	os_unview_file(table, bytes);
	if (fd >= 0)
		close(fd);
}

int os_write_all(int fd, const void *from, size_t bytes, uint64_t offset)
{
	int r = os_fault(OS_FAULT_WRITE);

	if (r)
		return r;
	for (size_t done = 0; done < bytes;) {
		/* Not pwrite(2): as os_read_all. */
		long n = syscall(SYS_pwrite64, fd, (const uint8_t *)from + done, bytes - done, (off_t)(offset + done));

		if (n > 0)
			done += (size_t)n;
		else if (n == 0)
			return -EIO;
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

int os_read_all(int fd, void *to, size_t bytes, uint64_t offset)
{
	for (size_t done = 0; done < bytes;) {
		/* Not pread(2): the agent stands in front of that, to see what QEMU reads. */
		long n = syscall(SYS_pread64, fd, (uint8_t *)to + done, bytes - done, (off_t)(offset + done));

		if (n > 0)
			done += (size_t)n;
		else if (n == 0)
			return -ENODATA;
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

static int map_fixed(void *hva, size_t bytes, int prot, int flags, int fd, uint64_t offset)
{
	int r = os_fault(OS_FAULT_WINDOW);

	if (r)
		return r;
	return syscall(SYS_mmap, hva, bytes, prot, flags | MAP_FIXED, fd, offset) == -1 ? -errno : 0;
}

void *os_reserve(size_t bytes, size_t align)
{
	size_t all = bytes + align - OS_PAGE_BYTES, before, behind;
	uint8_t *at = mmap(NULL, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		return NULL;
	before = -(uintptr_t)at & (align - 1);
	behind = all - bytes - before;
	if (before)
		munmap(at, before);
	if (behind)
		munmap(at + before + bytes, behind);
	return at + before;
}

void os_unreserve(void *hva, size_t bytes)
{
	if (hva)
		munmap(hva, bytes);
}

/* Not MAP_POPULATE, which looks at each page by itself: a fault brings 16, and is faster by a fifth. */
int os_window_map(void *hva, size_t bytes, int fd, uint64_t offset, bool writable)
{
	return map_fixed(hva, bytes, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, fd, offset);
}

int os_window_memory(void *hva, size_t bytes)
{
	return map_fixed(hva, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			 -1, 0);
}

int os_window_clear(void *hva, size_t bytes)
{
	return map_fixed(hva, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

int os_count_maps(uint64_t *ret_maps)
{
	int fd = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC);
	static const size_t chunk_bytes = 64 << 10;
	uint64_t lines = 0;
	char *chunk;
	ssize_t n;

	if (fd < 0)
		return -errno;
	chunk = malloc(chunk_bytes);
	if (!chunk) {
		close(fd);
		return -ENOMEM;
	}
	while ((n = read(fd, chunk, chunk_bytes)) > 0)
		for (char *at = chunk; (at = memchr(at, '\n', (size_t)(chunk + n - at))); at++)
			lines++;
	n = n < 0 ? -errno : 0;
	free(chunk);
	close(fd);
	if (!n)
		*ret_maps = lines;
	return (int)n;
}

uint64_t os_max_maps(void)
{
	FILE *f = fopen("/proc/sys/vm/max_map_count", "re");
	unsigned long limit = 0;

	if (f) {
		if (fscanf(f, "%lu", &limit) != 1)
			limit = 0;
		fclose(f);
	}
	return limit ? limit : 65530; /* the kernel's default */
}
