/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "window/window.h"

#include "os/os.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 15, LEAST_PAGES = 2, MOST_PAGES = 64 };

/* A read of a disk, which is memory here: ROUNDS * MOST_PAGES of each file, so that each round has pages of its own. */
struct bench {
	int guest, disk;
	uint8_t *hva, *bounce;
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* In the place of the last one, as slots are reused. */
static void by_window(struct bench *b, uint32_t pages, uint64_t offset)
{
	if (os_window_map(b->hva, os_bytes(pages), b->guest, offset, true))
		return;
	os_populate_read(b->hva, os_bytes(pages));
	(void)os_read_all(b->disk, b->hva, os_bytes(pages), offset);
}

static void by_copies(struct bench *b, uint32_t pages, uint64_t offset)
{
	(void)os_read_all(b->disk, b->bounce, os_bytes(pages), offset);
	(void)os_write_all(b->guest, b->bounce, os_bytes(pages), offset);
}

/* The smallest of several: what it costs without what has disturbed it. */
static uint64_t best_ns(struct bench *b, uint32_t pages,
			void (*work)(struct bench *b, uint32_t pages, uint64_t offset))
{
	uint64_t best = UINT64_MAX;

	for (uint32_t i = 0; i < ROUNDS; i++) {
		uint64_t t = now_ns();

		work(b, pages, os_bytes(i * MOST_PAGES));
		t = now_ns() - t;
		best = t < best ? t : best;
	}
	return best;
}

static int make_file(const uint8_t *contents)
{
	int fd = os_memfd_create("latent-window", os_bytes(ROUNDS * MOST_PAGES), false), r = fd < 0 ? fd : 0;

	for (uint32_t i = 0; !r && i < ROUNDS; i++)
		r = os_write_all(fd, contents, os_bytes(MOST_PAGES), os_bytes(i * MOST_PAGES));
	if (r && fd >= 0)
		close(fd);
	return r ? r : fd;
}

uint32_t window_measure_threshold(uint8_t *hva, uint8_t *bounce)
{
	struct bench b = { .hva = hva, .bounce = bounce };
	uint32_t n = MOST_PAGES;

	memset(bounce, 1, os_bytes(MOST_PAGES));
	b.guest = make_file(bounce);
	b.disk = make_file(bounce);
	if (b.guest >= 0 && b.disk >= 0)
		for (n = LEAST_PAGES; n < MOST_PAGES && best_ns(&b, n, by_window) > best_ns(&b, n, by_copies);
		     n *= 2)
			;
	(void)os_window_clear(hva, os_bytes(MOST_PAGES));
	if (b.guest >= 0)
		close(b.guest);
	if (b.disk >= 0)
		close(b.disk);
	return (uint32_t)os_bytes(n);
}
