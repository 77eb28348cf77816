/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "os/selftest.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

/* One page of the window for each rule, so that no check disturbs another. */
enum { UNTOUCHED, READ, WRITTEN, PAGED_OUT, POPULATED, REWRITTEN, PAGES };

enum { OLD_BYTE = 0x5a, NEW_BYTE = 0xa5, OWN_BYTE = 0x11 };

struct bench {
	uint8_t *window; /* PAGES pages: base when made, then an overlay of the file */
	int memfd, file, file_rw;
	struct os_pagemap *pagemap, *classic;
};

/* ---- means ---------------------------------------------------------------------------------- */

static int temporary_file(void)
{
	const char *const dirs[] = { secure_getenv("TMPDIR"), "/tmp", "/var/tmp", "/dev/shm" };

	for (size_t i = 0; i < sizeof dirs / sizeof dirs[0]; i++) {
		int fd = dirs[i] ? open(dirs[i], O_TMPFILE | O_RDWR | O_CLOEXEC, 0600) : -1;

		if (fd >= 0)
			return fd;
	}
	return -1;
}

static int reopen(int fd, int flags)
{
	char path[32];
	int again;

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	again = open(path, flags | O_CLOEXEC);
	return again < 0 ? -errno : again;
}

static int fill_file(int fd, uint8_t byte)
{
	uint8_t *page = malloc(OS_PAGE_BYTES);
	int r = page ? 0 : -ENOMEM;

	if (page)
		memset(page, byte, OS_PAGE_BYTES);
	for (unsigned i = 0; !r && i < PAGES; i++)
		if (pwrite(fd, page, OS_PAGE_BYTES, (off_t)os_bytes(i)) != (ssize_t)OS_PAGE_BYTES)
			r = -EIO;
	free(page);
	return r;
}

static int open_file(struct bench *b, bool *ret_on_disk)
{
	b->file_rw = temporary_file();
	*ret_on_disk = b->file_rw >= 0;
	if (b->file_rw < 0)
		b->file_rw = os_memfd_create("latent-selftest-file", os_bytes(PAGES), false);
	if (b->file_rw < 0)
		return b->file_rw;
	b->file = reopen(b->file_rw, O_RDONLY);
	return b->file < 0 ? b->file : fill_file(b->file_rw, OLD_BYTE);
}

static int open_pagemaps(struct bench *b)
{
	int r = os_pagemap_open(&b->pagemap);

	if (!r)
		r = os_pagemap_open(&b->classic);
	if (!r)
		os_pagemap_use_classic(b->classic);
	return r;
}

static int open_window(struct bench *b)
{
	long at = syscall(SYS_mmap, NULL, os_bytes(PAGES), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
			  (off_t)0);

	if (at == -1)
		return -errno;
	b->window = (uint8_t *)at;
	b->memfd = os_memfd_create("latent-selftest", os_bytes(PAGES), false);
	return b->memfd < 0 ? b->memfd : 0;
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

static void close_bench(struct bench *b)
{
	if (b->window)
		syscall(SYS_munmap, b->window, os_bytes(PAGES));
	close_fd(b->memfd);
	close_fd(b->file);
	close_fd(b->file_rw);
	os_pagemap_close(b->pagemap);
	os_pagemap_close(b->classic);
}

static uint8_t *page_at(const struct bench *b, unsigned page)
{
	return b->window + os_bytes(page);
}

static uint8_t first_byte(const struct bench *b, unsigned page)
{
	return *(volatile uint8_t *)page_at(b, page);
}

static bool page_is(const struct bench *b, unsigned page, uint8_t byte)
{
	const uint8_t *at = page_at(b, page);

	for (size_t i = 0; i < OS_PAGE_BYTES; i++)
		if (at[i] != byte)
			return false;
	return true;
}

/* ---- base ----------------------------------------------------------------------------------- */

static int check_base(struct bench *b, struct os_selftest_result *ret)
{
	uint64_t page = WRITTEN;
	int r = os_map_base_over(b->window, os_bytes(PAGES), b->memfd, 0);

	if (r)
		return r;
	memset(page_at(b, WRITTEN), OWN_BYTE, OS_PAGE_BYTES);
	ret->seek_finds_data = os_has_data(b->memfd, os_bytes(page), OS_PAGE_BYTES) &&
			       !os_has_data(b->memfd, 0, os_bytes(page)) &&
			       !os_has_data(b->memfd, os_bytes(page + 1), os_bytes(PAGES - page - 1));
	r = os_punch_hole(b->memfd, os_bytes(page), OS_PAGE_BYTES);
	if (r)
		return r;
	ret->punched_is_hole = !os_has_data(b->memfd, 0, os_bytes(PAGES));
	ret->punched_is_zero = page_is(b, WRITTEN, 0);
	return 0;
}

/* ---- overlays ------------------------------------------------------------------------------- */

struct found_private {
	uint8_t *window;
	bool private[PAGES];
};

static void note_private(void *ctx, uint8_t *hva, uint64_t pages)
{
	struct found_private *found = ctx;
	uint64_t page = (uint64_t)(hva - found->window) / OS_PAGE_BYTES;

	for (uint64_t i = 0; i < pages && page + i < PAGES; i++)
		found->private[page + i] = true;
}

/* Which pages of the window are private copies, by `pagemap`. */
static int find_private(const struct bench *b, struct os_pagemap *pagemap, bool private[PAGES])
{
	struct found_private found = { .window = b->window };
	int r = os_pagemap_private_runs(pagemap, b->window, PAGES, note_private, &found);

	if (!r)
		memcpy(private, found.private, sizeof found.private);
	return r;
}

static int check_clean_and_private(struct bench *b, struct os_selftest_result *ret)
{
	bool private[PAGES], classic[PAGES];
	int r;

	(void)first_byte(b, READ);
	*page_at(b, WRITTEN) = OWN_BYTE;
	*page_at(b, PAGED_OUT) = OWN_BYTE;
	syscall(SYS_madvise, page_at(b, PAGED_OUT), OS_PAGE_BYTES, MADV_PAGEOUT);
	r = os_populate_write(page_at(b, POPULATED), OS_PAGE_BYTES);
	if (!r)
		r = find_private(b, b->pagemap, private);
	if (!r)
		r = find_private(b, b->classic, classic);
	if (r)
		return r;
	ret->untouched_is_clean = !private[UNTOUCHED];
	ret->read_is_clean = !private[READ] && first_byte(b, READ) == OLD_BYTE;
	ret->written_is_private = private[WRITTEN];
	ret->written_then_paged_out_is_private = private[PAGED_OUT];
	ret->populate_copies = private[POPULATED] && page_is(b, POPULATED, OLD_BYTE);
	ret->scan_agrees = !memcmp(private, classic, sizeof private);
	return 0;
}

static int check_rewrite(struct bench *b, struct os_selftest_result *ret)
{
	int r = fill_file(b->file_rw, NEW_BYTE);

	if (r)
		return r;
	ret->populated_survives_rewrite = page_is(b, POPULATED, OLD_BYTE);
	ret->rewrite_shows_in_clean = page_is(b, REWRITTEN, NEW_BYTE);
	return 0;
}

static int check_overlay(struct bench *b, struct os_selftest_result *ret)
{
	int r = os_map_file_over(b->window, os_bytes(PAGES), b->file, 0);

	if (!r)
		r = check_clean_and_private(b, ret);
	return r ? r : check_rewrite(b, ret);
}

/* ---- failing mapping calls ------------------------------------------------------------------ */

/* Maps `fd`, which must fail, over the window's second page. */
static enum os_after_failure after_failure(struct bench *b, int fd)
{
	uint8_t *at = page_at(b, READ);

	if (fd < 0 || !os_map_file_over(at, OS_PAGE_BYTES, fd, 0))
		return OS_AFTER_UNKNOWN;
	return os_is_mapped(at, OS_PAGE_BYTES) ? OS_AFTER_OLD_MAPPING : OS_AFTER_HOLE;
}

static void check_failures(struct bench *b, struct os_selftest_result *ret)
{
	int write_only = reopen(b->file_rw, O_WRONLY); /* refused by its mode */
	/* A socket has an mmap operation, and it always fails: like a file system's that has no memory. */
	int one_that_fails = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	ret->early_failure_leaves = after_failure(b, write_only);
	ret->late_failure_leaves = after_failure(b, one_that_fails);
	close_fd(write_only);
	close_fd(one_that_fails);
}

/* ---- leases --------------------------------------------------------------------------------- */

static void check_break(struct bench *b, struct os_selftest_result *ret)
{
	int writer = reopen(b->file, O_WRONLY | O_NONBLOCK); /* a waiting open says EWOULDBLOCK */

	ret->lease_broken_by_open = writer == -EWOULDBLOCK && !os_lease_intact(b->file);
	close_fd(writer);
}

/* Last: it closes the writer. */
static void check_leases(struct bench *b, struct os_selftest_result *ret)
{
	pid_t tid = (pid_t)syscall(SYS_gettid);

	ret->lease_refused_while_written = os_lease_take(b->file, SIGURG, tid) == -EAGAIN;
	close_fd(b->file_rw);
	b->file_rw = -1;
	ret->lease_taken = !os_lease_take(b->file, SIGURG, tid) && os_lease_intact(b->file);
	if (!ret->lease_taken)
		return;
	check_break(b, ret);
	(void)os_lease_release(b->file);
}

/* ---- all ------------------------------------------------------------------------------------ */

int os_selftest(struct os_selftest_result *ret)
{
	struct bench b = { .memfd = -1, .file = -1, .file_rw = -1 };
	struct os_selftest_result result = { 0 };
	int r = open_window(&b);

	if (!r)
		r = open_file(&b, &result.ran_on_disk_file);
	if (!r)
		r = open_pagemaps(&b);
	if (!r)
		r = check_base(&b, &result);
	if (!r)
		r = check_overlay(&b, &result);
	if (!r) {
		check_failures(&b, &result);
		check_leases(&b, &result);
		*ret = result;
	}
	close_bench(&b);
	return r;
}

bool os_selftest_sound(const struct os_selftest_result *s)
{
	return s->untouched_is_clean && s->read_is_clean && s->written_is_private &&
	       s->written_then_paged_out_is_private && s->scan_agrees && s->seek_finds_data &&
	       s->punched_is_zero && s->punched_is_hole && s->populate_copies &&
	       s->populated_survives_rewrite;
}
