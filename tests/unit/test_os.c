/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* os/: each call's promise, tried on the running kernel. */
#include "os/os.h"
#include "os/probe.h"
#include "os/selftest.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/io_uring.h>
#include <linux/fs.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define SKIPPED 77

/* ---- means ---------------------------------------------------------------------------------- */

static int temporary_file(uint64_t pages)
{
	const char *dir = getenv("TMPDIR");
	int fd = open(dir ? dir : "/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	char page[OS_PAGE_BYTES];

	if (fd < 0)
		fd = memfd_create("test-os", MFD_CLOEXEC);
	for (uint64_t i = 0; i < pages; i++) {
		memset(page, (int)(i % 251 + 1), sizeof page);
		assert_int_equal(pwrite(fd, page, sizeof page, (off_t)os_bytes(i)), sizeof page);
	}
	return fd;
}

static int reopen(int fd, int flags)
{
	char path[32];

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return open(path, flags | O_CLOEXEC);
}

/* A file that nobody has open for writing. */
static int read_only_file(uint64_t pages)
{
	int rw = temporary_file(pages), fd = reopen(rw, O_RDONLY);

	close(rw);
	assert_true(fd >= 0);
	return fd;
}

static uint8_t *anonymous(uint64_t pages)
{
	void *at = mmap(NULL, os_bytes(pages), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert_ptr_not_equal(at, MAP_FAILED);
	return at;
}

static void vm_flags(const void *hva, char flags[512])
{
	FILE *f = fopen("/proc/self/smaps", "re");
	char line[512];
	bool here = false;

	flags[0] = '\0';
	while (f && fgets(line, sizeof line, f)) {
		unsigned long start, end;

		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			here = (uintptr_t)hva >= start && (uintptr_t)hva < end;
		else if (here && !strncmp(line, "VmFlags:", 8))
			snprintf(flags, 512, "%s", line + 8);
	}
	if (f)
		fclose(f);
}

static bool has_flag(const void *hva, const char *flag)
{
	char flags[512];

	vm_flags(hva, flags);
	return strstr(flags, flag);
}

/* Runs `body` in a child, which may change what a process cannot take back. Its exit status. */
static int in_child(int (*body)(int fd), int fd)
{
	int status = 0;
	pid_t pid = fork();

	if (!pid)
		_exit(body(fd));
	assert_true(pid > 0);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 256;
}

/* ---- maps ----------------------------------------------------------------------------------- */

static void test_marks_of_advice(void **state)
{
	unsigned clears = 99;

	(void)state;
	assert_int_equal(os_mark_of_advice(MADV_DONTFORK, &clears), OS_MARK_DONTFORK);
	assert_int_equal(clears, 0);
	assert_int_equal(os_mark_of_advice(MADV_DOFORK, &clears), 0);
	assert_int_equal(clears, OS_MARK_DONTFORK);
	assert_int_equal(os_mark_of_advice(MADV_DODUMP, &clears), 0);
	assert_int_equal(clears, OS_MARK_DONTDUMP);
	assert_int_equal(os_mark_of_advice(MADV_HUGEPAGE, &clears), OS_MARK_HUGEPAGE);
	assert_int_equal(clears, OS_MARK_NOHUGEPAGE);
	assert_int_equal(os_mark_of_advice(MADV_NOHUGEPAGE, &clears), OS_MARK_NOHUGEPAGE);
	assert_int_equal(clears, OS_MARK_HUGEPAGE);
	assert_int_equal(os_mark_of_advice(MADV_DONTNEED, &clears), 0);
	assert_int_equal(clears, 0);
}

static void test_set_marks(void **state)
{
	unsigned all = OS_MARK_DONTFORK | OS_MARK_DONTDUMP | OS_MARK_HUGEPAGE;
	uint8_t *at = anonymous(8);
	int memfd = os_memfd_create("marks", os_bytes(8), false);

	(void)state;
	assert_int_equal(os_map_base_over(at, os_bytes(8), memfd, 0), 0);
	assert_int_equal(os_set_marks(at, os_bytes(4), all, false), 0);
	assert_true(has_flag(at, "dc"));
	assert_true(has_flag(at, "dd"));
	assert_false(has_flag(at, "hg"));
	assert_false(has_flag(at + os_bytes(4), "dc"));
	assert_int_equal(os_set_marks(at, os_bytes(8), all, true), 0);
	assert_true(has_flag(at, "hg"));
	assert_int_equal(os_set_marks(at, os_bytes(8), 0, true), 0);
	assert_true(has_flag(at, "dc"));
	/* A new mapping has none of them. */
	assert_int_equal(os_map_base_over(at, os_bytes(8), memfd, 0), 0);
	assert_false(has_flag(at, "dc"));
	munmap(at, os_bytes(8));
	close(memfd);
}

static void test_map_and_give_back(void **state)
{
	uint8_t *at = anonymous(8);
	int memfd = os_memfd_create("maps", os_bytes(16), false), file = read_only_file(8);

	(void)state;
	assert_int_equal(os_map_base_over(at, os_bytes(8), memfd, os_bytes(4)), 0);
	at[0] = 77;
	assert_true(os_has_data(memfd, os_bytes(4), OS_PAGE_BYTES));
	assert_int_equal(os_map_file_over(at + os_bytes(2), os_bytes(2), file, os_bytes(5)), 0);
	assert_int_equal(at[0], 77);
	assert_int_equal(at[os_bytes(2)], 6);
	at[os_bytes(2)] = 200; /* a copy: the file stays */
	assert_int_equal(os_map_base_over(at + os_bytes(2), os_bytes(2), memfd, os_bytes(6)), 0);
	assert_int_equal(at[os_bytes(2)], 0);
	assert_int_equal(os_map_file_over(at + os_bytes(2), os_bytes(2), file, os_bytes(5)), 0);
	assert_int_equal(at[os_bytes(2)], 6);
	munmap(at, os_bytes(8));
	close(memfd);
	close(file);
}

static void test_failed_map_keeps_the_old_one(void **state)
{
	uint8_t *at = anonymous(3);
	int rw = temporary_file(1), write_only = reopen(rw, O_WRONLY);

	(void)state;
	memset(at, 9, os_bytes(3));
	assert_int_equal(os_map_file_over(at + OS_PAGE_BYTES, OS_PAGE_BYTES, write_only, 0), -EACCES);
	assert_int_equal(os_map_file_over(at + OS_PAGE_BYTES, OS_PAGE_BYTES, -1, 0), -EBADF);
	assert_true(os_is_mapped(at, os_bytes(3)));
	assert_int_equal(at[OS_PAGE_BYTES], 9);
	os_fault_arm(OS_FAULT_MAP_FILE, 1, ENOMEM);
	assert_int_equal(os_map_file_over(at, OS_PAGE_BYTES, rw, 0), -ENOMEM);
	assert_int_equal(os_map_file_over(at, OS_PAGE_BYTES, rw, 0), 0); /* once */
	assert_int_equal(at[0], 1);
	munmap(at, os_bytes(3));
	close(rw);
	close(write_only);
}

static void test_is_mapped(void **state)
{
	uint8_t *at = anonymous(3);

	(void)state;
	assert_true(os_is_mapped(at, os_bytes(3)));
	munmap(at + OS_PAGE_BYTES, OS_PAGE_BYTES);
	assert_false(os_is_mapped(at, os_bytes(3)));
	assert_false(os_is_mapped(at + OS_PAGE_BYTES, OS_PAGE_BYTES));
	assert_true(os_is_mapped(at, OS_PAGE_BYTES));
	assert_true(os_is_mapped(at + os_bytes(2), OS_PAGE_BYTES));
	munmap(at, os_bytes(3));
}

static void test_populate_write(void **state)
{
	uint8_t *at = anonymous(4);
	int rw = temporary_file(4), file = reopen(rw, O_RDONLY);
	uint8_t new_page[OS_PAGE_BYTES];

	(void)state;
	memset(new_page, 99, sizeof new_page);
	assert_int_equal(os_map_file_over(at, os_bytes(4), file, 0), 0);
	assert_int_equal(os_populate_write(at, os_bytes(2)), 0);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(pwrite(rw, new_page, sizeof new_page, (off_t)os_bytes(i)), sizeof new_page);
	assert_int_equal(at[0], 1);
	assert_int_equal(at[os_bytes(1)], 2);
	assert_int_equal(at[os_bytes(2)], 99);
	assert_int_equal(ftruncate(rw, 0), 0);
	assert_int_equal(os_populate_write(at + os_bytes(2), os_bytes(2)), -EFAULT);
	munmap(at, os_bytes(4));
	close(rw);
	close(file);
}

static void test_memfd_data(void **state)
{
	int memfd = os_memfd_create("data", os_bytes(16), false);
	char one = 1;

	(void)state;
	assert_true(memfd >= 0);
	assert_true(fcntl(memfd, F_GETFD) & FD_CLOEXEC);
	assert_false(os_has_data(memfd, 0, os_bytes(16)));
	assert_int_equal(pwrite(memfd, &one, 1, (off_t)os_bytes(5) + 7), 1);
	assert_true(os_has_data(memfd, os_bytes(5), OS_PAGE_BYTES));
	assert_true(os_has_data(memfd, 0, os_bytes(6)));
	assert_false(os_has_data(memfd, 0, os_bytes(5)));
	assert_false(os_has_data(memfd, os_bytes(6), os_bytes(10)));
	assert_false(os_has_data(memfd, os_bytes(16), OS_PAGE_BYTES)); /* behind its end */
	assert_int_equal(os_punch_hole(memfd, os_bytes(4), os_bytes(2)), 0);
	assert_false(os_has_data(memfd, 0, os_bytes(16)));
	close(memfd);
	memfd = os_memfd_create("inherited", OS_PAGE_BYTES, true);
	assert_false(fcntl(memfd, F_GETFD) & FD_CLOEXEC);
	close(memfd);
}

static void test_resident_pages(void **state)
{
	const uint64_t pages = 600; /* more than one mincore call asks for */
	int fd = temporary_file(pages);
	void *view = os_view_file(fd, os_bytes(pages), false);
	char byte;

	(void)state;
	assert_non_null(view);
	assert_true(has_flag(view, "dc"));
	assert_int_equal(os_resident_pages(view, 0, pages), pages);
	assert_int_equal(os_resident_pages(view, os_bytes(10), 3), 3);
	fsync(fd);
	posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM); /* no read-ahead */
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	if (os_resident_pages(view, 0, pages)) {
		print_message("SKIP: this file system keeps its pages\n");
	} else {
		for (uint64_t i = 300; i < 310; i++)
			assert_int_equal(pread(fd, &byte, 1, (off_t)os_bytes(i)), 1);
		assert_in_range(os_resident_pages(view, os_bytes(300), 10), 10, 10);
		assert_int_equal(os_resident_pages(view, 0, 300), 0);
		assert_in_range(os_resident_pages(view, 0, pages), 10, 64);
	}
	os_unview_file(view, os_bytes(pages));
	os_unview_file(NULL, os_bytes(pages));
	assert_null(os_view_file(-1, OS_PAGE_BYTES, false));
	close(fd);
}

static void test_count_maps(void **state)
{
	uint8_t *at = anonymous(300);
	uint64_t before = 0, after = 0;

	(void)state;
	assert_int_equal(os_count_maps(&before), 0);
	assert_int_equal(os_count_maps(&before), 0); /* counting itself may have grown the heap */
	assert_true(before > 5);
	for (unsigned i = 1; i < 300; i += 2)
		mprotect(at + os_bytes(i), OS_PAGE_BYTES, PROT_READ);
	assert_int_equal(os_count_maps(&after), 0);
	/* 300 where there was one, or where a neighbour had merged with it. */
	assert_in_range(after, before + 298, before + 300);
	assert_true(os_max_maps() >= 1000);
	munmap(at, os_bytes(300));
}

/* ---- pagemap -------------------------------------------------------------------------------- */

#define MANY_PAGES 3000 /* more runs than one PAGEMAP_SCAN returns, more words than one read */

struct found {
	uint8_t *base;
	bool private[MANY_PAGES];
	uint64_t runs;
};

static void note_run(void *ctx, uint8_t *hva, uint64_t pages)
{
	struct found *f = ctx;
	uint64_t page = (uint64_t)(hva - f->base) / OS_PAGE_BYTES;

	f->runs++;
	for (uint64_t i = 0; i < pages; i++) {
		assert_true(page + i < MANY_PAGES);
		assert_false(f->private[page + i]);
		f->private[page + i] = true;
	}
}

static void check_runs(struct os_pagemap *pagemap, uint8_t *at, uint64_t first, uint64_t pages, const bool *written)
{
	static struct found f;

	memset(&f, 0, sizeof f);
	f.base = at;
	assert_int_equal(os_pagemap_private_runs(pagemap, at + os_bytes(first), pages, note_run, &f), 0);
	for (uint64_t i = 0; i < MANY_PAGES; i++)
		assert_int_equal(f.private[i], i >= first && i < first + pages && written[i]);
}

static void check_flags(struct os_pagemap *pagemap, uint8_t *at, const bool *written)
{
	static uint8_t flags[MANY_PAGES];

	assert_int_equal(os_pagemap_flags(pagemap, at, MANY_PAGES, flags), 0);
	for (uint64_t i = 0; i < MANY_PAGES; i++) {
		bool private = !(flags[i] & OS_PAGE_FILE) && (flags[i] & (OS_PAGE_PRESENT | OS_PAGE_SWAPPED));

		assert_int_equal(private, written[i]);
	}
}

static void check_both_ways(uint8_t *at, const bool *written)
{
	struct os_pagemap *pagemap;

	assert_int_equal(os_pagemap_open(&pagemap), 0);
	for (int classic = 0; classic < 2; classic++) {
		check_runs(pagemap, at, 0, MANY_PAGES, written);
		check_runs(pagemap, at, 1, MANY_PAGES - 2, written);
		check_runs(pagemap, at, 511, 2, written);
		check_runs(pagemap, at, MANY_PAGES - 1, 1, written);
		check_flags(pagemap, at, written);
		os_pagemap_use_classic(pagemap);
	}
	os_pagemap_close(pagemap);
	os_pagemap_close(NULL);
}

static void test_private_runs(void **state)
{
	static bool written[MANY_PAGES];
	uint8_t *at = anonymous(MANY_PAGES);
	int file = read_only_file(MANY_PAGES);
	volatile uint8_t sum = 0;

	(void)state;
	memset(written, 0, sizeof written);
	assert_int_equal(os_map_file_over(at, os_bytes(MANY_PAGES), file, 0), 0);
	check_both_ways(at, written);
	for (uint64_t i = 0; i < MANY_PAGES; i++) {
		written[i] = i % 3 == 0 || (i > 1000 && i < 1700) || i == MANY_PAGES - 1;
		if (written[i])
			at[os_bytes(i) + i % OS_PAGE_BYTES] = 1;
		else if (i % 2)
			sum = (uint8_t)(sum + at[os_bytes(i)]);
	}
	check_both_ways(at, written);
	munmap(at, os_bytes(MANY_PAGES));
	close(file);
}

/* ---- leases --------------------------------------------------------------------------------- */

static void test_lease_breaks(void **state)
{
	int fd = read_only_file(1), writer;
	int signal_number = SIGRTMIN + 3;
	struct timespec second = { 1, 0 };
	siginfo_t info;
	sigset_t set;

	(void)state;
	sigemptyset(&set);
	sigaddset(&set, signal_number);
	assert_int_equal(pthread_sigmask(SIG_BLOCK, &set, NULL), 0);
	if (os_lease_take(fd, signal_number, gettid()) == -EINVAL) {
		print_message("SKIP: the temporary directory's file system has no leases\n");
		skip();
	}
	assert_true(os_lease_intact(fd) && os_lease_is_held(fd));
	writer = reopen(fd, O_WRONLY | O_NONBLOCK);
	assert_int_equal(writer, -1);
	assert_int_equal(errno, EWOULDBLOCK);
	assert_int_equal(sigtimedwait(&set, &info, &second), signal_number);
	assert_int_equal(info.si_fd, fd);
	assert_true(!os_lease_intact(fd) && os_lease_is_held(fd));
	assert_int_equal(os_lease_release(fd), 0);
	assert_false(os_lease_is_held(fd));
	writer = reopen(fd, O_WRONLY | O_NONBLOCK);
	assert_true(writer >= 0);
	assert_int_equal(os_lease_take(fd, signal_number, gettid()), -EAGAIN);
	assert_false(os_lease_intact(fd));
	close(writer);
	assert_int_equal(os_lease_take(fd, signal_number, gettid()), 0);
	close(fd);
}

static void test_leases_are_shared(void **state)
{
	int fd = read_only_file(1), other = reopen(fd, O_RDONLY);

	(void)state;
	if (os_lease_take(fd, SIGURG, gettid()) == -EINVAL) {
		print_message("SKIP: the temporary directory's file system has no leases\n");
		skip();
	}
	assert_int_equal(os_lease_take(other, SIGURG, gettid()), 0);
	assert_int_equal(os_lease_release(fd), 0);
	assert_true(os_lease_intact(other));
	assert_false(os_lease_intact(fd));
	close(other);
	close(fd);
}

static int take_as_nobody(int fd)
{
	if (setresuid(65534, 65534, 65534))
		return SKIPPED;
	return os_lease_take(fd, SIGURG, gettid()) == -EACCES ? 0 : 1;
}

static void test_lease_of_another_users_file(void **state)
{
	int fd = read_only_file(1);

	(void)state;
	if (geteuid() || !os_features_get()->cap_lease) {
		print_message("SKIP: needs root\n");
		skip();
	}
	assert_int_equal(in_child(take_as_nobody, fd), 0);
	close(fd);
}

/* ---- what else keeps a file from changing ----------------------------------------------------- */

static void test_no_protection(void **state)
{
	int fd = read_only_file(1);

	(void)state;
	assert_int_equal(os_file_protection(fd), OS_PROTECT_NONE);
	close(fd);
}

static void test_immutable(void **state)
{
	int fd = read_only_file(1);
	int flags = FS_IMMUTABLE_FL, none = 0;

	(void)state;
	if (ioctl(fd, FS_IOC_SETFLAGS, &flags)) {
		print_message("SKIP: the immutable attribute cannot be set here (%s)\n", strerror(errno));
		close(fd);
		skip();
	}
	assert_int_equal(os_file_protection(fd), OS_PROTECT_IMMUTABLE);
	assert_int_equal(ioctl(fd, FS_IOC_SETFLAGS, &none), 0);
	assert_int_equal(os_file_protection(fd), OS_PROTECT_NONE);
	close(fd);
}

/* A file in a file system that is mounted on `dir` of a namespace of this process's own. */
static int file_on_own_mount(const char *dir)
{
	char path[64];

	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("latent-test", dir, "tmpfs", 0, "size=1m"))
		return -1;
	snprintf(path, sizeof path, "%s/file", dir);
	return open(path, O_RDWR | O_CREAT, 0600);
}

static const char own_mount[] = "/tmp";

static int on_read_only_file_system(int unused)
{
	int fd = file_on_own_mount(own_mount);

	(void)unused;
	if (fd < 0)
		return SKIPPED;
	if (os_file_protection(fd) != OS_PROTECT_NONE)
		return 1;
	close(fd);
	if (mount(NULL, own_mount, NULL, MS_REMOUNT | MS_RDONLY, NULL))
		return SKIPPED;
	fd = open("/tmp/file", O_RDONLY);
	return os_file_protection(fd) == OS_PROTECT_READONLY ? 0 : 2;
}

/* Mounted read-only here, it can still be written by way of another mount: no protection. */
static int on_read_only_bind_mount(int unused)
{
	int fd = file_on_own_mount(own_mount);

	(void)unused;
	if (fd < 0 || mount(own_mount, "/mnt", NULL, MS_BIND, NULL) ||
	    mount(NULL, "/mnt", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
		return SKIPPED;
	close(fd);
	fd = open("/mnt/file", O_RDONLY);
	if (fd < 0 || open("/tmp/file", O_WRONLY) < 0)
		return SKIPPED;
	return os_file_protection(fd) == OS_PROTECT_NONE ? 0 : 2;
}

static void run_or_skip(int (*body)(int))
{
	int status = in_child(body, -1);

	if (status == SKIPPED) {
		print_message("SKIP: no file system can be mounted here\n");
		skip();
	}
	assert_int_equal(status, 0);
}

static void test_read_only_file_system(void **state)
{
	(void)state;
	run_or_skip(on_read_only_file_system);
}

static void test_read_only_bind_mount(void **state)
{
	(void)state;
	run_or_skip(on_read_only_bind_mount);
}

/* ---- faults on purpose ---------------------------------------------------------------------- */

static void test_fault_counts(void **state)
{
	(void)state;
	os_fault_arm(OS_FAULT_PUNCH, 3, ENOSPC);
	assert_int_equal(os_fault(OS_FAULT_PUNCH), 0);
	assert_int_equal(os_fault(OS_FAULT_PUNCH), 0);
	assert_int_equal(os_fault(OS_FAULT_MARK), 0);
	assert_int_equal(os_fault(OS_FAULT_PUNCH), -ENOSPC);
	assert_int_equal(os_fault(OS_FAULT_PUNCH), 0);
	assert_int_equal(os_fault_calls(OS_FAULT_PUNCH), 4);
	os_fault_arm(OS_FAULT_PUNCH, 0, 0);
	assert_int_equal(os_fault(OS_FAULT_PUNCH), 0);
}

static void test_fault_parse(void **state)
{
	struct timespec from, to;

	(void)state;
	assert_int_equal(os_fault_parse("map_base:1:EAGAIN,settle_write:2:ENOSPC"), 0);
	assert_int_equal(os_fault(OS_FAULT_MAP_BASE), -EAGAIN);
	assert_int_equal(os_fault(OS_FAULT_SETTLE_WRITE), 0);
	assert_int_equal(os_fault(OS_FAULT_SETTLE_WRITE), -ENOSPC);
	assert_int_equal(os_fault_parse("storage_read:delay:30"), 0);
	clock_gettime(CLOCK_MONOTONIC, &from);
	assert_int_equal(os_fault(OS_FAULT_STORAGE_READ), 0);
	clock_gettime(CLOCK_MONOTONIC, &to);
	assert_true((to.tv_sec - from.tv_sec) * 1000 + (to.tv_nsec - from.tv_nsec) / 1000000 >= 29);
	assert_int_equal(os_fault_parse("storage_read:delay:0"), 0);
	assert_int_equal(os_fault_parse(""), 0);
}

/* A process that is to be killed at its second step, and at no other. */
static void test_fault_kills(void **state)
{
	pid_t child = fork();
	int status;

	(void)state;
	if (!child) {
		if (os_fault_parse("save_step:2:KILL") || os_fault(OS_FAULT_SAVE_STEP) || os_fault(OS_FAULT_WRITE))
			_exit(1);
		(void)os_fault(OS_FAULT_SAVE_STEP);
		_exit(2);
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

/* A disk that is full from the second step on. */
static void test_fault_full(void **state)
{
	pid_t child = fork();
	int status;

	(void)state;
	if (!child) {
		bool right = !os_fault_parse("save_step:2:FULL") && !os_fault(OS_FAULT_SAVE_STEP) && !os_fault(OS_FAULT_WRITE) &&
			     !os_fault(OS_FAULT_SAVE_STEP) && os_fault(OS_FAULT_WRITE) == -ENOSPC &&
			     os_fault(OS_FAULT_WRITE) == -ENOSPC && !os_fault(OS_FAULT_SAVE_STEP);

		_exit(!right);
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFEXITED(status) && !WEXITSTATUS(status));
}

static void test_fault_parse_refuses(void **state)
{
	static const char *const wrong[] = {
		"map_file", "map_file:1", "nothing:1:ENOMEM", "map_file:1:EWHAT", ":::", "map_file:1:",
		"map_file::ENOMEM", "map_file:x:ENOMEM", "map_file:1x:ENOMEM", "map_file:-1:ENOMEM",
		"map_file:0:ENOMEM", "storage_read:delay:soon", "storage_read:delay:", "map_file:1:ENOMEM:2",
	};

	(void)state;
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
		if (os_fault_parse(wrong[i]) != -EINVAL)
			fail_msg("\"%s\" is taken for a fault", wrong[i]);
}

/* ---- cgroups ---------------------------------------------------------------------------------- */

static char cgroups[64];

static void put_cgroup(const char *name, const char *text)
{
	char path[160];
	FILE *file;

	snprintf(path, sizeof path, "%s/%s", cgroups, name);
	for (char *slash = path + strlen(cgroups) + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
		*slash = '\0';
		(void)mkdir(path, 0700);
	}
	file = fopen(path, "w");
	assert_non_null(file);
	fputs(text, file);
	fclose(file);
}

static uint64_t room_for(const char *text)
{
	char path[96];

	put_cgroup("of-process", text);
	snprintf(path, sizeof path, "%s/of-process", cgroups);
	return os_memory_room(path, cgroups);
}

/* Trees as the kernel shows them, of both versions: the least room on the way to the root counts. */
static void test_memory_room(void **state)
{
	char command[96];

	(void)state;
	snprintf(cgroups, sizeof cgroups, "/tmp/test_os.XXXXXX");
	assert_non_null(mkdtemp(cgroups));
	assert_true(room_for("") == UINT64_MAX);
	assert_true(room_for("0::/\n") == UINT64_MAX);
	assert_true(room_for("0::/vms/none\n") == UINT64_MAX);
	put_cgroup("vms/a/memory.max", "max\n");
	put_cgroup("vms/a/memory.current", "12345\n");
	assert_true(room_for("0::/vms/a\n") == UINT64_MAX);
	put_cgroup("vms/a/memory.max", "1000000\n");
	assert_int_equal(room_for("0::/vms/a\n"), 1000000 - 12345);
	put_cgroup("vms/memory.max", "600000\n");
	put_cgroup("vms/memory.current", "500000\n");
	assert_int_equal(room_for("0::/vms/a\n"), 100000);
	put_cgroup("vms/memory.stat", "anon 7\nfile 9\nworkingset_inactive_file 5\ninactive_file 30000\nactive_file 20000\n");
	assert_int_equal(room_for("0::/vms/a\n"), 150000);
	put_cgroup("vms/a/memory.max", "12000\n"); /* set below what it has */
	assert_int_equal(room_for("0::/vms/a\n"), 0);
	put_cgroup("memory/one/memory.limit_in_bytes", "9223372036854771712\n");
	put_cgroup("memory/one/memory.usage_in_bytes", "5\n");
	assert_true(room_for("5:cpu:/one\n4:memory:/one\n0::/\n") == UINT64_MAX);
	put_cgroup("memory/one/memory.limit_in_bytes", "7777\n");
	assert_int_equal(room_for("5:cpu:/one\n4:memory:/one\n0::/\n"), 7772);
	assert_true(room_for("0::/../elsewhere\n") == UINT64_MAX);
	assert_true(room_for("nonsense\n::\n0:\n") == UINT64_MAX);
	snprintf(command, sizeof command, "rm -r %s", cgroups);
	assert_int_equal(system(command), 0);
}

static uint64_t spare_of(const char *text)
{
	char path[] = "/tmp/test_os.XXXXXX";
	int fd = mkstemp(path);
	uint64_t spare;

	assert_true(fd >= 0);
	assert_int_equal(write(fd, text, strlen(text)), strlen(text));
	close(fd);
	spare = os_memory_spare(path);
	unlink(path);
	return spare;
}

static void test_memory_spare(void **state)
{
	uint64_t spare = os_memory_spare("/proc/meminfo");

	(void)state;
	assert_true(spare != UINT64_MAX && spare < 1ull << 60);
	assert_int_equal(spare_of("MemTotal:  8000 kB\nMemFree:  7 kB\nMemAvailable:  3000 kB\n"), 2000 << 10);
	assert_int_equal(spare_of("MemTotal:  8000 kB\nMemAvailable:  1000 kB\n"), 0);
	assert_int_equal(spare_of("MemTotal:  8000 kB\nMemAvailable:  10 kB\n"), 0);
	assert_true(spare_of("MemTotal:  8000 kB\n") == UINT64_MAX); /* Linux 3.13 */
	assert_true(spare_of("MemTotal: 99999999999999999999 kB\nMemAvailable: 5 kB\n") == UINT64_MAX);
	assert_true(spare_of("") == UINT64_MAX);
	assert_true(os_memory_spare("/nowhere") == UINT64_MAX);
}

/* ---- probe and self-test -------------------------------------------------------------------- */

static bool kernel_is_at_least(const struct os_features *f, unsigned major, unsigned minor)
{
	return f->kernel_major > major || (f->kernel_major == major && f->kernel_minor >= minor);
}

static void test_probe(void **state)
{
	const struct os_features *f = os_features_get();
	struct utsname name;
	char version[64];

	(void)state;
	assert_ptr_equal(f, os_features_get());
	uname(&name);
	snprintf(version, sizeof version, "%u.%u.", f->kernel_major, f->kernel_minor);
	assert_string_equal(f->kernel_release, name.release);
	assert_memory_equal(name.release, version, strlen(version));
	assert_true(f->pagemap);
	assert_int_equal(f->max_maps, os_max_maps());
	if (kernel_is_at_least(f, 5, 14))
		assert_true(f->populate_read && f->populate_write);
	if (kernel_is_at_least(f, 6, 7))
		assert_true(f->pagemap_scan);
	if (f->uffd_syscall || f->uffd_device || f->uffd_user_only)
		assert_true(f->uffd_features & OS_UFFD_EVENT_REMOVE);
	else
		assert_int_equal(f->uffd_features, 0);
	if (geteuid() == 0 && f->cap_lease)
		assert_true(f->lease_break_s > 0);
	print_message("Linux %s: scan %d, soft-dirty %d, uffd %d/%d/%d features %" PRIx64 ", shmem huge pages \"%s\", "
		      "swap %" PRIu64 " MiB, DAMON %d, page_idle %d, kvm %d\n",
		      f->kernel_release, f->pagemap_scan, f->soft_dirty, f->uffd_syscall, f->uffd_device,
		      f->uffd_user_only, f->uffd_features, f->shmem_thp, f->swap_bytes >> 20, f->damon, f->page_idle,
		      f->kvm_device);
}

static uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static const char *aftermath(enum os_after_failure after)
{
	return after == OS_AFTER_HOLE ? "a hole" : after == OS_AFTER_OLD_MAPPING ? "the old mapping" : "unknown";
}

static void check_leases(const struct os_selftest_result *s)
{
	if (!s->ran_on_disk_file)
		return;
	assert_true(s->lease_taken);
	assert_true(s->lease_refused_while_written);
	assert_true(s->lease_broken_by_open);
}

static void test_selftest(void **state)
{
	struct os_selftest_result s;
	uint64_t from = now_us(), took_us;

	(void)state;
	assert_int_equal(os_selftest(&s), 0);
	took_us = now_us() - from;
	assert_true(os_selftest_sound(&s));
	assert_true(s.rewrite_shows_in_clean);
	assert_int_equal(s.early_failure_leaves, OS_AFTER_OLD_MAPPING);
	assert_int_not_equal(s.late_failure_leaves, OS_AFTER_UNKNOWN);
	check_leases(&s);
	print_message("self-test: %" PRIu64 " us; a mapping call that fails early leaves %s, late %s\n", took_us,
		      aftermath(s.early_failure_leaves), aftermath(s.late_failure_leaves));
}

static uint64_t count_fds(void)
{
	uint64_t n = 0;

	for (int fd = 0; fd < 1024; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

static void test_selftest_leaves_nothing(void **state)
{
	struct os_selftest_result s;
	uint64_t fds = count_fds(), maps = 0, maps_after = 0;

	(void)state;
	assert_int_equal(os_count_maps(&maps), 0);
	for (int i = 0; i < 20; i++)
		assert_int_equal(os_selftest(&s), 0);
	assert_int_equal(os_count_maps(&maps_after), 0);
	assert_int_equal(count_fds(), fds);
	assert_in_range(maps_after, maps - 1, maps + 1);
}

/* Each rule alone makes it unsound. */
static void test_unsound(void **state)
{
	struct os_selftest_result good, bad;
	bool *rules[] = { &bad.untouched_is_clean, &bad.read_is_clean, &bad.written_is_private,
			  &bad.written_then_paged_out_is_private, &bad.scan_agrees, &bad.seek_finds_data,
			  &bad.punched_is_zero, &bad.punched_is_hole, &bad.populate_copies,
			  &bad.populated_survives_rewrite };

	(void)state;
	assert_int_equal(os_selftest(&good), 0);
	for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++) {
		bad = good;
		*rules[i] = false;
		assert_false(os_selftest_sound(&bad));
	}
}

static void test_readable_pages(void **state)
{
	int fd = temporary_file(600);
	uint8_t *at = anonymous(600);

	(void)state;
	assert_int_equal(os_map_file_over(at, os_bytes(600), fd, 0), 0);
	assert_int_equal(os_readable_pages(at, 600), 600);
	assert_int_equal(ftruncate(fd, (off_t)os_bytes(300)), 0);
	assert_int_equal(os_readable_pages(at, 600), 300);
	assert_int_equal(os_readable_pages(at + os_bytes(300), 300), 0);
	munmap(at, os_bytes(600));
	close(fd);
}

/* ---- freeze --------------------------------------------------------------------------------- */

enum { RUNNERS = 6, FREEZES = 200 };

static struct {
	_Atomic uint64_t steps[RUNNERS];
	_Atomic bool end;
	_Atomic bool spare;
	int pipe[2];
	pthread_mutex_t lock;
} frozen;

static void *run_steps(void *arg)
{
	_Atomic uint64_t *steps = arg;

	while (!frozen.end)
		(*steps)++;
	return NULL;
}

static void *run_calls(void *arg)
{
	_Atomic uint64_t *steps = arg;
	char page[OS_PAGE_BYTES];
	int fd = temporary_file(1);

	while (!frozen.end) {
		pthread_mutex_lock(&frozen.lock);
		assert_int_equal(pread(fd, page, sizeof page, 0), sizeof page);
		pthread_mutex_unlock(&frozen.lock);
		(*steps)++;
	}
	close(fd);
	return NULL;
}

static void *run_spare(void *arg)
{
	os_never_freeze((pid_t)syscall(SYS_gettid));
	frozen.spare = true;
	return run_steps(arg);
}

/* Waits in a system call; a signal must not end its wait. */
static void *run_waiter(void *arg)
{
	char byte;

	(void)arg;
	assert_int_equal(read(frozen.pipe[0], &byte, 1), 1);
	return NULL;
}

static void *run_nothing(void *arg)
{
	return arg;
}

static void *run_births(void *arg)
{
	_Atomic uint64_t *steps = arg;
	pthread_t child;

	while (!frozen.end) {
		assert_int_equal(pthread_create(&child, NULL, run_nothing, NULL), 0);
		pthread_join(child, NULL);
		(*steps)++;
	}
	return NULL;
}

static void check_freeze(void)
{
	uint64_t before[RUNNERS], spare_before;
	struct timespec pause = { 0, 200000 };

	assert_int_equal(os_freeze(SIGRTMAX - 4, 5000), 0);
	for (int i = 0; i < RUNNERS; i++)
		before[i] = frozen.steps[i];
	spare_before = frozen.steps[0];
	syscall(SYS_nanosleep, &pause, NULL);
	for (int i = 1; i < RUNNERS; i++)
		if (frozen.steps[i] != before[i]) {
			os_thaw();
			fail_msg("thread %d ran while frozen", i);
		}
	while (frozen.steps[0] == spare_before) /* it runs on, or this never ends */
		syscall(SYS_nanosleep, &pause, NULL);
	os_thaw();
}

static void test_freeze(void **state)
{
	void *(*runs[RUNNERS])(void *) = { run_spare, run_steps, run_calls, run_calls, run_births, run_births };
	pthread_t threads[RUNNERS], waiter;

	(void)state;
	assert_int_equal(pipe(frozen.pipe), 0);
	pthread_mutex_init(&frozen.lock, NULL);
	frozen.end = false;
	for (int i = 0; i < RUNNERS; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, runs[i], &frozen.steps[i]), 0);
	assert_int_equal(pthread_create(&waiter, NULL, run_waiter, NULL), 0);
	while (!frozen.spare)
		usleep(1000);
	for (int i = 0; i < FREEZES; i++)
		check_freeze();
	frozen.end = true;
	assert_int_equal(write(frozen.pipe[1], "x", 1), 1);
	for (int i = 0; i < RUNNERS; i++) {
		pthread_join(threads[i], NULL);
		assert_true(frozen.steps[i] > FREEZES / 2); /* they ran in between */
	}
	pthread_join(waiter, NULL);
	close(frozen.pipe[0]);
	close(frozen.pipe[1]);
}

static void *run_deaf(void *arg)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	return run_steps(arg);
}

/* A thread that cannot be stopped: it is said, and all go on. */
static void test_freeze_in_vain(void **state)
{
	pthread_t deaf, runner;
	uint64_t before;

	(void)state;
	frozen.end = false;
	frozen.steps[0] = frozen.steps[1] = 0;
	assert_int_equal(pthread_create(&deaf, NULL, run_deaf, &frozen.steps[0]), 0);
	assert_int_equal(pthread_create(&runner, NULL, run_steps, &frozen.steps[1]), 0);
	while (!frozen.steps[0] || !frozen.steps[1])
		usleep(1000);
	assert_int_equal(os_freeze(SIGRTMAX - 4, 100), -ETIMEDOUT);
	before = frozen.steps[1];
	while (frozen.steps[1] == before)
		usleep(1000);
	frozen.end = true;
	pthread_join(deaf, NULL);
	pthread_join(runner, NULL);
}

/* A thread of the kernel's among ours, as KVM and vhost have them: it takes no signal, and need not stop. */
static void test_freeze_beside_the_kernel(void **state)
{
	struct io_uring_params params = { .flags = IORING_SETUP_SQPOLL };
	int fd = (int)syscall(SYS_io_uring_setup, 4, &params);
	pthread_t runner;

	(void)state;
	if (fd < 0) {
		print_message("SKIP: there is no io_uring here: %s\n", strerror(errno));
		skip();
	}
	frozen.end = false;
	frozen.steps[0] = 0;
	assert_int_equal(pthread_create(&runner, NULL, run_steps, &frozen.steps[0]), 0);
	while (!frozen.steps[0])
		usleep(1000);
	assert_int_equal(os_freeze(SIGRTMAX - 4, 5000), 0);
	os_thaw();
	frozen.end = true;
	pthread_join(runner, NULL);
	close(fd);
}

static void *run_exempt(void *arg)
{
	os_never_freeze((pid_t)syscall(SYS_gettid));
	return run_deaf(arg);
}

/* It could not be stopped, and it need not. */
static void test_never_frozen(void **state)
{
	struct timespec pause = { 0, 200000 };
	pthread_t exempt;
	uint64_t before;

	(void)state;
	frozen.end = false;
	frozen.steps[0] = 0;
	assert_int_equal(pthread_create(&exempt, NULL, run_exempt, &frozen.steps[0]), 0);
	while (!frozen.steps[0])
		usleep(1000);
	assert_int_equal(os_freeze(SIGRTMAX - 4, 5000), 0);
	before = frozen.steps[0];
	while (frozen.steps[0] == before)
		syscall(SYS_nanosleep, &pause, NULL);
	os_thaw();
	frozen.end = true;
	pthread_join(exempt, NULL);
}

/* ---- pages that are missing --------------------------------------------------------------------- */

struct reader {
	const uint8_t *at;
	_Atomic int found; /* -1: not yet */
};

static void *read_byte(void *arg)
{
	struct reader *r = arg;

	r->found = *(volatile const uint8_t *)r->at;
	return NULL;
}

/* Two private views of one file with holes: who touches a hole waits until it has contents and he is woken; then
 * the other one finds them, too; and what one writes the other does not see. */
static void test_missing_pages(void **state)
{
	int fd = os_memfd_create("cache", 4 * OS_PAGE_BYTES, false), uffd = os_uffd_open(OS_UFFD_MISSING_SHMEM);
	uint8_t page[OS_PAGE_BYTES], *views[2];
	struct reader reader = { .found = -1 };
	uintptr_t addr = 0;
	pthread_t thread;

	(void)state;
	if (uffd < 0) {
		print_message("SKIP: no userfaultfd that serves the kernel's faults\n");
		close(fd);
		skip();
	}
	assert_true(os_memfd_is_fine_grained());
	for (int i = 0; i < 2; i++) {
		views[i] = mmap(NULL, 4 * OS_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
		assert_int_equal(os_uffd_register_missing(uffd, views[i], 4 * OS_PAGE_BYTES), 0);
	}
	reader.at = views[0] + 2 * OS_PAGE_BYTES + 5;
	assert_int_equal(pthread_create(&thread, NULL, read_byte, &reader), 0);
	while (os_uffd_next_fault(uffd, &addr) == 0)
		usleep(1000);
	assert_int_equal(addr, (uintptr_t)views[0] + 2 * OS_PAGE_BYTES);
	memset(page, 0x77, sizeof page);
	assert_int_equal(os_write_all(fd, page, sizeof page, 2 * OS_PAGE_BYTES), 0);
	assert_int_equal(reader.found, -1);
	os_uffd_wake(uffd, (void *)addr, OS_PAGE_BYTES);
	pthread_join(thread, NULL);
	assert_int_equal(reader.found, 0x77);
	views[0][2 * OS_PAGE_BYTES] = 1;
	assert_int_equal(views[1][2 * OS_PAGE_BYTES], 0x77);
	assert_int_equal(os_uffd_next_fault(uffd, &addr), 0);
	for (int i = 0; i < 2; i++)
		munmap(views[i], 4 * OS_PAGE_BYTES);
	close(uffd);
	close(fd);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_marks_of_advice),
		cmocka_unit_test(test_set_marks),
		cmocka_unit_test(test_map_and_give_back),
		cmocka_unit_test(test_failed_map_keeps_the_old_one),
		cmocka_unit_test(test_is_mapped),
		cmocka_unit_test(test_populate_write),
		cmocka_unit_test(test_readable_pages),
		cmocka_unit_test(test_freeze),
		cmocka_unit_test(test_freeze_in_vain),
		cmocka_unit_test(test_freeze_beside_the_kernel),
		cmocka_unit_test(test_never_frozen),
		cmocka_unit_test(test_missing_pages),
		cmocka_unit_test(test_memfd_data),
		cmocka_unit_test(test_resident_pages),
		cmocka_unit_test(test_count_maps),
		cmocka_unit_test(test_private_runs),
		cmocka_unit_test(test_lease_breaks),
		cmocka_unit_test(test_leases_are_shared),
		cmocka_unit_test(test_lease_of_another_users_file),
		cmocka_unit_test(test_no_protection),
		cmocka_unit_test(test_immutable),
		cmocka_unit_test(test_read_only_file_system),
		cmocka_unit_test(test_read_only_bind_mount),
		cmocka_unit_test(test_fault_counts),
		cmocka_unit_test(test_fault_parse),
		cmocka_unit_test(test_fault_kills),
		cmocka_unit_test(test_fault_full),
		cmocka_unit_test(test_fault_parse_refuses),
		cmocka_unit_test(test_memory_room),
		cmocka_unit_test(test_memory_spare),
		cmocka_unit_test(test_probe),
		cmocka_unit_test(test_selftest),
		cmocka_unit_test(test_selftest_leaves_nothing),
		cmocka_unit_test(test_unsound),
	};

	alarm(60);
	return cmocka_run_group_tests_name("os", tests, NULL, NULL) ? 1 : 0;
}
