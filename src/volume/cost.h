/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * What it costs on this machine to map pages of a file over guest RAM, and to copy them there: two
 * straight lines, measured once in a process, and what a page of memory costs to get.
 */
#ifndef LATENT_VOLUME_COST_H
#define LATENT_VOLUME_COST_H

#include <stdint.h>

struct cost_model {
	double map_us, map_page_us;   /* a mapping of n pages: map_us + n * map_page_us */
	double copy_us, copy_page_us; /* a warm read of n pages */
	double page_us;               /* to get one page of memory: what sharing a page saves at least */
};

/* The model of this machine; measures at the first call, which takes some milliseconds. Thread-safe. */
const struct cost_model *cost_model_get(void);

/*
 * The processor time that a page of memory is worth beyond what it costs to get. A policy, not a measurement: less
 * than KSM spends on a page that it merges (`bench/run density`: its seconds of processor time, and what it saves). With it a
 * known-shared page is mapped alone, until mappings become scarce.
 */
#define COST_PAGE_WORTH_US 10.0

/*
 * The shortest run that is worth a mapping when its pages will be shared with this likelihood: where
 *
 *     map_us + n * map_page_us  <=  copy_us + n * (copy_page_us + likelihood * (page_us + worth))
 *
 * becomes true, at most COST_RUN_SHARED / likelihood (a measurement on a busy machine must not lose what is
 * certainly shared), between 1 and COST_RUN_MAX. The more of the budget of mappings is used, the longer a
 * run has to be: twice from half of it on, four times from three quarters, eight times from seven
 * eighths.
 */
#define COST_RUN_MAX 64
#define COST_RUN_SHARED 4
uint32_t cost_min_run_pages(const struct cost_model *model, double likelihood);
uint32_t cost_under_pressure(uint32_t min_run_pages, uint64_t maps, uint64_t budget_maps);

#endif
