/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * lazy_ram.so: guest RAM of stock QEMU that comes on demand from a complete file of it, for LD_PRELOAD. It is what
 * Latent is compared with: the way of Firecracker's snapshots, and of REAP (Ustiugov et al., ASPLOS 2021), each as
 * fast as its idea allows. In the environment:
 *
 *   LAZY_RAM_FILE  the whole of guest RAM; the mapping of that size is the one that is served
 *   LAZY_RAM_SET   pages that are installed first, read from one packed file: uint64_t n, the n numbers of the
 *                  pages in rising order, zeros up to a whole page, contents
 *   LAZY_RAM_LOG   a file that gets a struct touch for each page that was asked for; zeros follow the last
 *
 * The pages are installed while QEMU still starts; the guest does not overtake them, as one thread does both.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096u
#define CHUNK_PAGES 256u /* of the packed file: one is installed while the kernel reads ahead */
#define MESSAGES 16u
#define VISIBLE __attribute__((visibility("default")))

struct touch {
	uint64_t page, time_ns; /* CLOCK_MONOTONIC */
};

static struct {
	uint8_t *hva;
	size_t bytes;
	int uffd, file_fd, set_fd;
	struct touch *log, *log_end;
} lazy = { .file_fd = -1, .set_fd = -1 };

static _Noreturn void die(const char *what)
{
	fprintf(stderr, "lazy_ram: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void read_all(int fd, void *to, size_t bytes, uint64_t at)
{
	for (size_t done = 0; done < bytes;) {
		ssize_t n = pread(fd, (uint8_t *)to + done, bytes - done, (off_t)(at + done));

		if (n <= 0)
			die("a file ends too early");
		done += (size_t)n;
	}
}

/* ---- pages ---- */

static void install(uint64_t page, const void *from, uint64_t pages)
{
	struct uffdio_copy copy = {
		.dst = (uint64_t)(uintptr_t)lazy.hva + page * PAGE_BYTES,
		.src = (uint64_t)(uintptr_t)from,
		.len = pages * PAGE_BYTES,
	};

	/* EEXIST: two threads have asked for one page. */
	if (ioctl(lazy.uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
		die("UFFDIO_COPY");
}

static void install_set(void)
{
	static uint8_t chunk[CHUNK_PAGES * PAGE_BYTES] __attribute__((aligned(PAGE_BYTES)));
	uint64_t count, *page, contents_at;

	(void)posix_fadvise(lazy.set_fd, 0, 0, POSIX_FADV_WILLNEED);
	read_all(lazy.set_fd, &count, sizeof count, 0);
	page = count <= lazy.bytes / PAGE_BYTES ? calloc(count + 1, sizeof *page) : NULL;
	if (!page)
		die("the set of pages");
	read_all(lazy.set_fd, page, count * sizeof *page, sizeof count);
	contents_at = ((1 + count) * sizeof *page + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
	for (uint64_t first = 0; first < count; first += CHUNK_PAGES) {
		uint64_t pages = count - first < CHUNK_PAGES ? count - first : CHUNK_PAGES;

		read_all(lazy.set_fd, chunk, pages * PAGE_BYTES, contents_at + first * PAGE_BYTES);
		for (uint64_t i = 0, end; i < pages; i = end) {
			for (end = i + 1; end < pages && page[first + end] == page[first + i] + (end - i);)
				end++;
			install(page[first + i], chunk + i * PAGE_BYTES, end - i);
		}
	}
	free(page);
}

static void serve_one(uint64_t address)
{
	static uint8_t contents[PAGE_BYTES] __attribute__((aligned(PAGE_BYTES)));
	uint64_t page = (address - (uint64_t)(uintptr_t)lazy.hva) / PAGE_BYTES;

	if (lazy.log != lazy.log_end)
		*lazy.log++ = (struct touch){ page, now_ns() };
	read_all(lazy.file_fd, contents, PAGE_BYTES, page * PAGE_BYTES);
	install(page, contents, 1);
}

static void *serve(void *unused)
{
	struct uffd_msg message[MESSAGES];

	if (lazy.set_fd >= 0)
		install_set();
	for (;;) {
		ssize_t n = read(lazy.uffd, message, sizeof message);

		if (n < 0 && errno != EINTR && errno != EAGAIN)
			die("userfaultfd");
		for (size_t i = 0; n > 0 && i < (size_t)n / sizeof *message; i++)
			if (message[i].event == UFFD_EVENT_PAGEFAULT)
				serve_one(message[i].arg.pagefault.address);
	}
	return unused;
}

/* ---- the mapping ---- */

static int open_named(const char *variable, int flags)
{
	const char *path = getenv(variable);
	int fd = path ? open(path, flags | O_CLOEXEC, 0600) : -1;

	if (path && fd < 0)
		die(path);
	return fd;
}

static void open_log(void)
{
	int fd = open_named("LAZY_RAM_LOG", O_RDWR | O_CREAT | O_TRUNC);
	size_t pages = lazy.bytes / PAGE_BYTES, bytes = pages * sizeof *lazy.log;

	if (fd < 0)
		return;
	if (ftruncate(fd, (off_t)bytes))
		die("the log");
	lazy.log = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (lazy.log == MAP_FAILED)
		die("the log");
	lazy.log_end = lazy.log + pages;
	close(fd);
}

static void start(void *hva)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	sigset_t all, before;
	pthread_t thread;

	lazy.hva = hva;
	range.range.start = (uint64_t)(uintptr_t)hva;
	range.range.len = lazy.bytes;
	lazy.set_fd = open_named("LAZY_RAM_SET", O_RDONLY);
	open_log();
	lazy.uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	if (lazy.uffd < 0 || ioctl(lazy.uffd, UFFDIO_API, &api) || ioctl(lazy.uffd, UFFDIO_REGISTER, &range))
		die("userfaultfd");
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	errno = pthread_create(&thread, NULL, serve, NULL);
	if (errno)
		die("a thread");
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

__attribute__((constructor)) static void open_file(void)
{
	struct stat st;

	lazy.file_fd = open_named("LAZY_RAM_FILE", O_RDONLY);
	if (lazy.file_fd < 0 || fstat(lazy.file_fd, &st))
		return;
	lazy.bytes = (size_t)st.st_size;
}

/* QEMU reserves a place first and puts guest RAM into it. */
VISIBLE void *mmap64(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
	void *hva = (void *)syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);

	if (hva != MAP_FAILED && bytes == lazy.bytes && (flags & MAP_FIXED) && (flags & MAP_ANONYMOUS) &&
	    (protection & PROT_WRITE) && !lazy.hva)
		start(hva);
	return hva;
}
