/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "blk/memory.h"

#include "os/os.h"

#include <errno.h>
#include <string.h>

static bool overlap(uint64_t a, uint64_t b, uint64_t a_bytes, uint64_t b_bytes)
{
	return a < b + b_bytes && b < a + a_bytes;
}

static bool fits(uint64_t at, uint64_t bytes)
{
	uint64_t end;

	return !__builtin_add_overflow(at, bytes, &end) && end <= INT64_MAX;
}

static const char *what_is_wrong(const struct memory_table *t, const struct memory_region *r)
{
	if (!r->bytes)
		return "a memory region is empty";
	if ((r->gpa | r->bytes | r->uva | r->offset) & (OS_PAGE_BYTES - 1))
		return "a memory region is not made of whole pages";
	if (!fits(r->gpa, r->bytes) || !fits(r->uva, r->bytes) || !fits(r->offset, r->bytes))
		return "a memory region ends behind all addresses";
	for (uint32_t i = 0; i < t->count; i++) {
		const struct memory_region *other = &t->regions[i];

		if (overlap(r->gpa, other->gpa, r->bytes, other->bytes) ||
		    overlap(r->uva, other->uva, r->bytes, other->bytes))
			return "two memory regions overlap";
	}
	return NULL;
}

int memory_add(struct memory_table *t, const struct memory_region *region, const char **ret_why)
{
	const char *why = t->count == MEMORY_REGIONS_MAX ? "there are too many memory regions"
							 : what_is_wrong(t, region);

	if (why) {
		*ret_why = why;
		return t->count == MEMORY_REGIONS_MAX ? -ENOSPC : -EINVAL;
	}
	t->regions[t->count++] = *region;
	return 0;
}

int memory_remove(struct memory_table *t, const struct memory_region *region, uint32_t *ret_index)
{
	for (uint32_t i = 0; i < t->count; i++) {
		struct memory_region *r = &t->regions[i];

		if (r->gpa != region->gpa || r->uva != region->uva || r->bytes != region->bytes)
			continue;
		t->count--;
		memmove(r, r + 1, (t->count - i) * sizeof *r);
		*ret_index = i;
		return 0;
	}
	return -ENOENT;
}

uint64_t memory_find(const struct memory_table *t, uint64_t gpa, uint64_t bytes, uint32_t *ret_index,
		     uint64_t *ret_offset)
{
	for (uint32_t i = 0; i < t->count; i++) {
		const struct memory_region *r = &t->regions[i];
		uint64_t left;

		if (gpa < r->gpa || gpa - r->gpa >= r->bytes)
			continue;
		left = r->bytes - (gpa - r->gpa);
		*ret_index = i;
		*ret_offset = r->offset + (gpa - r->gpa);
		return bytes < left ? bytes : left;
	}
	return 0;
}

bool memory_find_uva(const struct memory_table *t, uint64_t uva, uint64_t bytes, uint32_t *ret_index,
		     uint64_t *ret_offset)
{
	for (uint32_t i = 0; i < t->count; i++) {
		const struct memory_region *r = &t->regions[i];

		if (uva < r->uva || uva - r->uva >= r->bytes || bytes > r->bytes - (uva - r->uva))
			continue;
		*ret_index = i;
		*ret_offset = r->offset + (uva - r->uva);
		return true;
	}
	return false;
}
