/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "volume/cost.h"

#include "os/os.h"

#include <math.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SHORT_PAGES = 2, LONG_PAGES = 32, ROUNDS = 9, STRIDE_PAGES = 64, AREA_PAGES = ROUNDS * STRIDE_PAGES };

/* A guess for a machine where nothing can be measured. */
static struct cost_model model = { 6, 0.2, 0.8, 0.25, 1.0 };
static pthread_once_t model_once = PTHREAD_ONCE_INIT;

struct bench {
	int base, file; /* memfds: guest RAM, and a file that is in the page cache */
	uint8_t *ram, *view;
};

static double now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

/* The smallest of several: what the work costs, without what disturbed it. */
static double best_us(struct bench *b, uint64_t pages, void (*work)(struct bench *b, uint64_t at, uint64_t pages))
{
	double best = 1e9;

	for (uint64_t round = 0; round < ROUNDS; round++) {
		double t = now_us();

		work(b, round * STRIDE_PAGES, pages);
		t = now_us() - t;
		best = t < best ? t : best;
	}
	return best;
}

static void touch(struct bench *b, uint64_t at, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++)
		*(volatile uint8_t *)(b->ram + os_bytes(at + i)) = 1;
}

static void copy(struct bench *b, uint64_t at, uint64_t pages)
{
	if (syscall(SYS_pread64, b->file, b->ram + os_bytes(at), os_bytes(pages), os_bytes(at)) < 0)
		return;
}

/* All that a shortcut does, and the guest's first look at the pages. */
static void map(struct bench *b, uint64_t at, uint64_t pages)
{
	uint8_t *hva = b->ram + os_bytes(at);

	(void)os_resident_pages(b->view, os_bytes(at), pages);
	(void)os_map_file_over(hva, os_bytes(pages), b->file, os_bytes(at));
	(void)os_set_marks(hva, os_bytes(pages), OS_MARK_DONTFORK, false);
	if (os_has_data(b->base, os_bytes(at), os_bytes(pages)))
		(void)os_punch_hole(b->base, os_bytes(at), os_bytes(pages));
	for (uint64_t i = 0; i < pages; i++)
		(void)*(volatile uint8_t *)(hva + os_bytes(i));
}

static void back_to_base(struct bench *b)
{
	(void)os_map_base_over(b->ram, os_bytes(AREA_PAGES), b->base, 0);
	(void)os_punch_hole(b->base, 0, os_bytes(AREA_PAGES));
}

/* A line through the costs of two lengths; no part of it is negative. */
static void line(double short_us, double long_us, double *ret_us, double *ret_page_us)
{
	double slope = (long_us - short_us) / (LONG_PAGES - SHORT_PAGES);

	*ret_page_us = slope > 0 ? slope : 0;
	*ret_us = short_us - *ret_page_us * SHORT_PAGES;
	if (*ret_us < 0)
		*ret_us = 0;
}

static void measure_with(struct bench *b)
{
	double short_us, long_us;

	/* The "file" gets pages of its own: those of a hole would cost something else. */
	if (pwrite(b->file, b->ram, os_bytes(AREA_PAGES), 0) != (ssize_t)os_bytes(AREA_PAGES))
		return;
	back_to_base(b);
	model.page_us = best_us(b, LONG_PAGES, touch) / LONG_PAGES;
	touch(b, 0, AREA_PAGES);
	short_us = best_us(b, SHORT_PAGES, copy);
	long_us = best_us(b, LONG_PAGES, copy);
	line(short_us, long_us, &model.copy_us, &model.copy_page_us);
	back_to_base(b);
	short_us = best_us(b, SHORT_PAGES, map);
	back_to_base(b);
	long_us = best_us(b, LONG_PAGES, map);
	line(short_us, long_us, &model.map_us, &model.map_page_us);
}

static void measure(void)
{
	size_t bytes = os_bytes(AREA_PAGES);
	struct bench b = { .base = os_memfd_create("latent-cost-base", bytes, false),
			   .file = os_memfd_create("latent-cost-file", bytes, false) };

	if (b.base >= 0 && b.file >= 0) {
		b.view = os_view_file(b.file, bytes, false);
		b.ram = os_view_file(b.base, bytes, true);
		if (b.view && b.ram && !os_map_base_over(b.ram, bytes, b.base, 0))
			measure_with(&b);
		os_unview_file(b.view, bytes);
		os_unview_file(b.ram, bytes);
	}
	close(b.base);
	close(b.file);
}

const struct cost_model *cost_model_get(void)
{
	pthread_once(&model_once, measure);
	return &model;
}

uint32_t cost_min_run_pages(const struct cost_model *m, double likelihood)
{
	double saved_us = likelihood * (m->page_us + COST_PAGE_WORTH_US);
	double gain_us = m->copy_page_us + saved_us - m->map_page_us;
	double run = gain_us > 0 ? (m->map_us - m->copy_us) / gain_us : COST_RUN_MAX;

	if (run * likelihood > COST_RUN_SHARED)
		run = COST_RUN_SHARED / likelihood;
	if (run >= COST_RUN_MAX)
		return COST_RUN_MAX;
	return run <= 1 ? 1 : (uint32_t)ceil(run);
}

uint32_t cost_under_pressure(uint32_t min_run_pages, uint64_t maps, uint64_t budget_maps)
{
	uint64_t eighths = budget_maps ? maps * 8 / budget_maps : 8;

	return min_run_pages << ((eighths >= 4) + (eighths >= 6) + (eighths >= 7));
}
