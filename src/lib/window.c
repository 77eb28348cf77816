/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "latent/latent.h"

#include "os/os.h"
#include "window/window.h"

#include <errno.h>

#define PUBLIC __attribute__((visibility("default")))

struct latent_window; /* is struct window: nobody outside knows the one or the other */

static struct window *inner(struct latent_window *w) { return (struct window *)w; }

PUBLIC int latent_window_register(int cpu, uint32_t slots, struct latent_window **ret_window)
{
	struct window *w;
	int r = window_register(cpu, slots, &w);

	if (!r)
		*ret_window = (struct latent_window *)w;
	return r;
}

PUBLIC void latent_window_unregister(struct latent_window *w) { window_unregister(inner(w)); }

PUBLIC int latent_window_map(struct latent_window *w, struct latent_request *request, int flush)
{
	return window_map(inner(w), request, flush);
}

PUBLIC int latent_window_use(struct latent_window *w, struct latent_request *request)
{
	return window_use(inner(w), request);
}

PUBLIC int latent_window_done(struct latent_window *w, struct latent_request *request, int succeeded)
{
	return window_done(inner(w), request, succeeded);
}

PUBLIC int latent_window_hand_over(struct latent_window *w, struct latent_request *request)
{
	return window_hand_over(inner(w), request);
}

PUBLIC int latent_window_recycle(struct latent_window *w) { return window_recycle(inner(w)); }

PUBLIC int latent_window_move(struct latent_window *w, int cpu) { return window_move(inner(w), cpu); }

PUBLIC int latent_window_check(const struct latent_window *w)
{
	return window_check((const struct window *)w);
}

PUBLIC int latent_window_stats_get(const struct latent_window *w, struct latent_window_stats *stats)
{
	if (stats->size != sizeof *stats)
		return -EINVAL;
	window_stats((const struct window *)w, stats);
	return 0;
}
