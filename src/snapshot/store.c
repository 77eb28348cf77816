/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "snapshot/store.h"

#include "os/os.h"
#include "snapshot/parent.h"

#include <string.h>

int store_begin(struct snapshot_image *image, int ram_fd, struct parent *parent, struct source_progress *progress,
		struct store *ret_store)
{
	struct store s = { .image = image, .ram_fd = ram_fd, .parent = parent, .progress = progress };
	int r = equal_create(image, &s.equal);

	if (!r)
		*ret_store = s;
	return r;
}

void store_end(struct store *s)
{
	equal_free(&s->equal);
}

bool store_proves(int fd, uint64_t page, const uint8_t *bytes)
{
	uint8_t stored[OS_PAGE_BYTES];

	return !os_read_all(fd, stored, sizeof stored, os_bytes(page)) && !memcmp(stored, bytes, sizeof stored);
}

static bool is_stored_as(const struct store *s, uint64_t page, const uint8_t *bytes)
{
	if (page >= s->now_page && page - s->now_page < s->now_pages)
		return !memcmp(s->now + os_bytes(page - s->now_page), bytes, OS_PAGE_BYTES);
	return store_proves(s->ram_fd, page, bytes);
}

static bool find_equal(const struct store *s, uint64_t digest, const uint8_t *bytes, struct snapshot_page *ret_page)
{
	uint64_t page;

	for (uint64_t at = 0; equal_next(&s->equal, digest, &at, &page);) {
		if (!is_stored_as(s, page, bytes))
			continue;
		*ret_page = (struct snapshot_page){ SNAPSHOT_EQUAL, 0, page };
		return true;
	}
	return false;
}

/* What becomes of a page. */
static void decide(struct store *s, uint64_t page, const uint8_t *bytes)
{
	struct snapshot_page *record = snapshot_page_at(s->image, page), is = snapshot_classify(bytes);

	*record = is;
	if (is.kind != SNAPSHOT_DATA || (s->parent && parent_find(s->parent, page, is.value, bytes, record)) ||
	    find_equal(s, is.value, bytes, record))
		return;
	equal_add(&s->equal, page);
}

/* Those with contents go to the file, in as few calls as there are runs of them. */
int store_pages(struct store *s, uint64_t page, const uint8_t *bytes, uint64_t pages)
{
	uint64_t run = 0;
	int r = 0;

	s->now = bytes;
	s->now_page = page;
	s->now_pages = pages;
	for (uint64_t i = 0; !r && i <= pages; i++) {
		if (i < pages) {
			decide(s, page + i, bytes + os_bytes(i));
			if (snapshot_page_at(s->image, page + i)->kind == SNAPSHOT_DATA) {
				run++;
				continue;
			}
		}
		if (run)
			r = os_write_all(s->ram_fd, bytes + os_bytes(i - run), os_bytes(run), os_bytes(page + i - run));
		s->progress->bytes_written += os_bytes(run);
		run = 0;
	}
	s->now_pages = 0;
	s->progress->pages_done += pages;
	return r;
}
