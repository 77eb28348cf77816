/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Windows: guest memory mapped for the time of a request, on one CPU. include/latent/latent.h says what
 * each function does; `latent_window_NAME` there is `window_NAME` here.
 *
 * A slot is the reach of one page table (2 MiB). Its first page is memory of the process's own, which
 * keeps that table; behind it a request's runs of segments are mapped one after the other. What a slot
 * holds is of one request only:
 *
 *   empty   -> in use    map
 *   in use  -> waiting   done: still mapped, used by nobody
 *   waiting -> in use    map: of what it still maps, nothing is done; otherwise the new mappings take the place of
 *                        the old ones
 *   waiting -> empty     recycle; in use -> empty: hand_over, a map that fails
 *   any     -> lost      it could not be emptied, and is never used again
 */
#ifndef LATENT_WINDOW_WINDOW_H
#define LATENT_WINDOW_WINDOW_H

#include "latent/latent.h"

#include <stdbool.h>
#include <stdint.h>

struct window;

int window_register(int cpu, uint32_t slots, struct window **ret_window);
void window_unregister(struct window *w);
int window_map(struct window *w, struct latent_request *request, int flush);
int window_use(struct window *w, const struct latent_request *request);
int window_done(struct window *w, struct latent_request *request, bool succeeded);
int window_hand_over(struct window *w, struct latent_request *request);
int window_recycle(struct window *w);
int window_move(struct window *w, int cpu);
int window_check(const struct window *w);
void window_stats(const struct window *w, struct latent_window_stats *stats);

/* A run that came lately, or that a slot still maps: map would map it. Says so the second time at the earliest. For
 * who has a better way than a copy for what comes once. */
bool window_comes_again(struct window *w, const struct latent_request *request);

/* From now on runs of at least that many bytes are mapped; 1: all; more than a slot holds: none. For tests and
 * benchmarks. */
void window_set_threshold(struct window *w, uint32_t bytes);

/*
 * threshold.c: the shortest run, in bytes, that is mapped sooner than copied, measured here with a file
 * of its own: a power of two of pages, at most 64. `hva`: 64 pages of a reservation, emptied afterwards;
 * `bounce`: as much memory.
 */
uint32_t window_measure_threshold(uint8_t *hva, uint8_t *bounce);

#endif
