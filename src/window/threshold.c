/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "window/window.h"

#include "os/os.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 15, LEAST_PAGES = 2, MOST_PAGES = 64 };

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* Both end where the kernel's I/O would begin: with the pages in the page table, or in a buffer. */
static void map(int fd, uint8_t *to, uint32_t pages) { (void)os_window_map(to, os_bytes(pages), fd, 0, true); }
static void copy(int fd, uint8_t *to, uint32_t pages) { (void)os_read_all(fd, to, os_bytes(pages), 0); }

/* The smallest of several: what it costs without what has disturbed it. */
static uint64_t best_ns(void (*work)(int fd, uint8_t *to, uint32_t pages), int fd, uint8_t *to, uint32_t pages)
{
	uint64_t best = UINT64_MAX;

	for (int i = 0; i < ROUNDS; i++) {
		uint64_t t = now_ns();

		work(fd, to, pages);
		t = now_ns() - t;
		best = t < best ? t : best;
	}
	return best;
}

uint32_t window_measure_threshold(uint8_t *hva, uint8_t *bounce, uint32_t pages)
{
	uint32_t most = pages < MOST_PAGES ? pages : MOST_PAGES, n = LEAST_PAGES;
	int fd = os_memfd_create("latent-window", os_bytes(most), false);

	if (fd < 0)
		return (uint32_t)os_bytes(most);
	memset(bounce, 1, os_bytes(most));
	if (os_write_all(fd, bounce, os_bytes(most), 0))
		n = most;
	while (n < most && best_ns(map, fd, hva, n) > best_ns(copy, fd, bounce, n))
		n++;
	(void)os_window_clear(hva, os_bytes(most));
	close(fd);
	return (uint32_t)os_bytes(n);
}
