/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "window/window.h"

#include "os/os.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 15, LEAST_PAGES = 2, MOST_PAGES = 64 };

struct bench {
	int fd; /* ROUNDS * MOST_PAGES: each round has pages that no CPU has seen lately */
	uint8_t *hva, *bounce;
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* In the place of the last one, as slots are reused; with the faults that the kernel's I/O meets. */
static void map(struct bench *b, uint32_t pages, uint64_t offset)
{
	if (os_window_map(b->hva, os_bytes(pages), b->fd, offset, true))
		return;
	for (uint32_t i = 0; i < pages; i++)
		(void)*(volatile uint8_t *)(b->hva + os_bytes(i));
}

static void copy(struct bench *b, uint32_t pages, uint64_t offset)
{
	(void)os_read_all(b->fd, b->bounce, os_bytes(pages), offset);
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

static bool fill(struct bench *b)
{
	int r = 0;

	memset(b->bounce, 1, os_bytes(MOST_PAGES));
	for (uint32_t i = 0; !r && i < ROUNDS; i++)
		r = os_write_all(b->fd, b->bounce, os_bytes(MOST_PAGES), os_bytes(i * MOST_PAGES));
	return !r;
}

uint32_t window_measure_threshold(uint8_t *hva, uint8_t *bounce)
{
	struct bench b = { os_memfd_create("latent-window", os_bytes(ROUNDS * MOST_PAGES), false), hva,
			   bounce };
	uint32_t n = MOST_PAGES;

	if (b.fd < 0)
		return (uint32_t)os_bytes(MOST_PAGES);
	if (fill(&b))
		for (n = LEAST_PAGES; n < MOST_PAGES && best_ns(&b, n, map) > best_ns(&b, n, copy);
		     n *= 2)
			;
	(void)os_window_clear(hva, os_bytes(MOST_PAGES));
	close(b.fd);
	return (uint32_t)os_bytes(n);
}
