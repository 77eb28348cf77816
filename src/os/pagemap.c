/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Page tables as the kernel shows them: Documentation/admin-guide/mm/pagemap.rst. PAGEMAP_SCAN came
 * with Linux 6.7; the classic file has one 64-bit word a page.
 */
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CLASSIC_PRESENT (1ull << 63)
#define CLASSIC_SWAPPED (1ull << 62)
#define CLASSIC_FILE (1ull << 61)
#define CLASSIC_PROTECTED (1ull << 57) /* Linux 5.13 */

/* linux/fs.h of 6.7; Debian 12's headers are older. */
struct scan_region {
	uint64_t start, end, categories;
};

struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define SCAN_IOCTL _IOWR('f', 16, struct scan_arg)
#define SCAN_WP_MATCHING (1ull << 0) /* flags */
#define SCAN_CHECK_WPASYNC (1ull << 1)
#define SCAN_WRITTEN (1ull << 1) /* categories */
#define SCAN_FILE (1ull << 2)
#define SCAN_PRESENT (1ull << 3)
#define SCAN_SWAPPED (1ull << 4)

enum { SCAN_REGIONS = 256, CLASSIC_WORDS = 512 };

struct os_pagemap {
	int fd;
	bool classic;
	uint64_t words[CLASSIC_WORDS];
};

bool os_pagemap_has_scan(int fd)
{
	struct scan_arg arg = { .size = sizeof arg };

	return ioctl(fd, SCAN_IOCTL, &arg) >= 0;
}

int os_pagemap_open(struct os_pagemap **ret_pagemap)
{
	struct os_pagemap *p = malloc(sizeof *p);

	if (!p)
		return -ENOMEM;
	p->fd = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (p->fd < 0) {
		int r = -errno;

		free(p);
		return r;
	}
	p->classic = !os_pagemap_has_scan(p->fd);
	*ret_pagemap = p;
	return 0;
}

void os_pagemap_close(struct os_pagemap *p)
{
	if (!p)
		return;
	close(p->fd);
	free(p);
}

void os_pagemap_use_classic(struct os_pagemap *p)
{
	p->classic = true;
}

static int read_words(struct os_pagemap *p, const uint8_t *hva, uint64_t pages)
{
	size_t want = (size_t)pages * sizeof p->words[0];
	off_t at = (off_t)((uintptr_t)hva / OS_PAGE_BYTES * sizeof p->words[0]);
	long got = syscall(SYS_pread64, p->fd, p->words, want, at);

	if (got < 0)
		return -errno;
	return (size_t)got == want ? 0 : -EIO;
}

int os_pagemap_flags(struct os_pagemap *p, const uint8_t *hva, uint64_t pages, uint8_t *flags)
{
	for (uint64_t done = 0; done < pages;) {
		uint64_t n = pages - done < CLASSIC_WORDS ? pages - done : CLASSIC_WORDS;
		int r = read_words(p, hva + os_bytes(done), n);

		if (r)
			return r;
		for (uint64_t i = 0; i < n; i++)
			flags[done + i] =
				(uint8_t)((p->words[i] & CLASSIC_PRESENT ? OS_PAGE_PRESENT : 0) |
					  (p->words[i] & CLASSIC_SWAPPED ? OS_PAGE_SWAPPED : 0) |
					  (p->words[i] & CLASSIC_FILE ? OS_PAGE_FILE : 0) |
					  (p->words[i] & CLASSIC_PROTECTED ? OS_PAGE_PROTECTED : 0));
		done += n;
	}
	return 0;
}

int os_pagemap_protect(struct os_pagemap *p, uint8_t *hva, uint64_t pages)
{
	struct scan_arg arg = {
		.size = sizeof arg,
		.flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
		.start = (uintptr_t)hva,
		.end = (uintptr_t)hva + os_bytes(pages),
		.category_mask = SCAN_WRITTEN,
		.return_mask = SCAN_WRITTEN,
	};

	if (p->classic)
		return -EOPNOTSUPP;
	while (ioctl(p->fd, SCAN_IOCTL, &arg) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

/* What a run is made of: pages that are FILE or not, or either, and in memory or (`swapped`) out of it, and (PAGEMAP_SCAN
 * alone) not protected. */
struct wanted {
	bool file_matters, file, swapped, written;
	bool protect; /* what is found */
};

static bool is_wanted(uint64_t word, const struct wanted *w)
{
	if (w->file_matters && w->file != !!(word & CLASSIC_FILE))
		return false;
	return word & (CLASSIC_PRESENT | (w->swapped ? CLASSIC_SWAPPED : 0));
}

static int runs_classic(struct os_pagemap *p, uint8_t *hva, uint64_t pages, const struct wanted *wanted,
			os_page_run found, void *ctx)
{
	uint64_t run = 0; /* pages of the run that ends before `done` */

	for (uint64_t done = 0; done < pages;) {
		uint64_t n = pages - done < CLASSIC_WORDS ? pages - done : CLASSIC_WORDS;
		int r = read_words(p, hva + os_bytes(done), n);

		if (r)
			return r;
		for (uint64_t i = 0; i < n; i++, done++) {
			if (is_wanted(p->words[i], wanted)) {
				run++;
			} else if (run) {
				found(ctx, hva + os_bytes(done - run), run);
				run = 0;
			}
		}
	}
	if (run)
		found(ctx, hva + os_bytes(pages - run), run);
	return 0;
}

static int runs_scan(struct os_pagemap *p, uint8_t *hva, uint64_t pages, const struct wanted *wanted,
		     os_page_run found, void *ctx)
{
	uint64_t states = SCAN_PRESENT | (wanted->swapped ? SCAN_SWAPPED : 0);
	struct scan_region regions[SCAN_REGIONS];
	struct scan_arg arg = {
		.size = sizeof arg,
		.start = (uintptr_t)hva,
		.end = (uintptr_t)hva + os_bytes(pages),
		.vec = (uintptr_t)regions,
		.vec_len = SCAN_REGIONS,
		.flags = wanted->protect ? SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC : 0,
		.category_inverted = wanted->file_matters && !wanted->file ? SCAN_FILE : 0,
		.category_mask =
			(wanted->file_matters ? SCAN_FILE : 0) | (wanted->written ? SCAN_WRITTEN : 0),
		.category_anyof_mask = states,
		.return_mask = states,
	};

	while (arg.start < arg.end) {
		int count = ioctl(p->fd, SCAN_IOCTL, &arg);

		if (count < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		for (int i = 0; i < count; i++) {
			const struct scan_region *r = &regions[i];

			found(ctx, (uint8_t *)(uintptr_t)r->start, (r->end - r->start) / OS_PAGE_BYTES);
		}
		arg.start = arg.walk_end;
	}
	return 0;
}

static int runs(struct os_pagemap *p, uint8_t *hva, uint64_t pages, const struct wanted *wanted, os_page_run found,
		void *ctx)
{
	return p->classic ? runs_classic(p, hva, pages, wanted, found, ctx) : runs_scan(p, hva, pages, wanted, found, ctx);
}

int os_pagemap_private_runs(struct os_pagemap *p, uint8_t *hva, uint64_t pages, os_page_run found, void *ctx)
{
	return runs(p, hva, pages, &(struct wanted){ .file_matters = true, .file = false, .swapped = true }, found, ctx);
}

int os_pagemap_protect_copies(struct os_pagemap *p, uint8_t *hva, uint64_t pages, os_page_run found,
			      void *ctx)
{
	const struct wanted wanted = { .file_matters = true, .swapped = true, .protect = true };

	return p->classic ? -EOPNOTSUPP : runs(p, hva, pages, &wanted, found, ctx);
}

int os_pagemap_protect_written(struct os_pagemap *p, uint8_t *hva, uint64_t pages, os_page_run found,
			       void *ctx)
{
	const struct wanted wanted = { .file_matters = true, .swapped = true, .written = true, .protect = true };

	return p->classic ? -EOPNOTSUPP : runs(p, hva, pages, &wanted, found, ctx);
}

struct second_look {
	struct os_pagemap *pagemap;
	os_page_run found;
	void *ctx;
	int error;
};

static void look_again(void *ctx, uint8_t *hva, uint64_t pages)
{
	struct second_look *s = ctx;

	if (!s->error)
		s->error = os_pagemap_private_runs(s->pagemap, hva, pages, s->found, s->ctx);
}

/* Whether a page is of a file costs the kernel a look at its struct page: asked only of those that are not protected. */
int os_pagemap_written_copies(struct os_pagemap *p, uint8_t *hva, uint64_t pages, os_page_run found,
			      void *ctx)
{
	struct second_look s = { p, found, ctx, 0 };
	int r;

	if (p->classic)
		return os_pagemap_private_runs(p, hva, pages, found, ctx);
	r = runs_scan(p, hva, pages, &(struct wanted){ .swapped = true, .written = true }, look_again, &s);
	return r ? r : s.error;
}

int os_pagemap_present_runs(struct os_pagemap *p, uint8_t *hva, uint64_t pages, os_page_run found, void *ctx)
{
	return runs(p, hva, pages, &(struct wanted){ .file = true }, found, ctx);
}
