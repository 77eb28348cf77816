/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/equal.h"

#include "os/os.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

int equal_create(const struct snapshot_image *image, struct equal *ret_equal)
{
	struct equal e = { .image = image, .slot_count = 16, .shift = 60 };

	while (e.slot_count < 2 * image->pages) {
		e.slot_count *= 2;
		e.shift--;
	}
	e.slots = calloc(e.slot_count, sizeof *e.slots); /* what is not used is not touched */
	if (!e.slots)
		return -ENOMEM;
	if (getrandom(&e.factor, sizeof e.factor, GRND_NONBLOCK) != sizeof e.factor)
		e.factor = os_now_us() * 0x9e3779b97f4a7c15u;
	e.factor |= 1;
	*ret_equal = e;
	return 0;
}

void equal_free(struct equal *e)
{
	free(e->slots);
	e->slots = NULL;
}

/* `steps` places after the digest's own. */
static uint64_t *slot(const struct equal *e, uint64_t digest, uint64_t steps)
{
	return &e->slots[((digest * e->factor >> e->shift) + steps) & (e->slot_count - 1)];
}

void equal_add(struct equal *e, uint64_t page)
{
	uint64_t digest = snapshot_page_at(e->image, page)->value, at = 0, other;
	unsigned same = 0;

	while (same < EQUAL_SAME_DIGEST && equal_next(e, digest, &at, &other))
		same++;
	if (same < EQUAL_SAME_DIGEST)
		*slot(e, digest, at) = page + 1; /* where the search has ended: a free one, for half of them are */
}

bool equal_next(const struct equal *e, uint64_t digest, uint64_t *at, uint64_t *ret_page)
{
	uint64_t page;

	for (; (page = *slot(e, digest, *at)); ++*at) {
		if (snapshot_page_at(e->image, page - 1)->value != digest)
			continue;
		*ret_page = page - 1;
		++*at;
		return true;
	}
	return false;
}
