/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "core/spill.h"

#include "os/os.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#define SLAB_BYTES 65536u
#define UNIT_BYTES 256u /* slots are 1 to RAW_CLASS of these long */
#define RAW_CLASS 16u   /* a whole page, as it is */
#define WORTH_CLASS 12u /* in memory: a slot that is longer saves too little */
#define SLOT_BITS 8
#define SLABS_MAX (1u << 24)
#define LEVEL 1
#define NOBODY UINT32_MAX

/* A bit for each slot. */
struct slots {
	uint64_t bits[SLAB_BYTES / UNIT_BYTES / 64];
};

struct slab {
	struct slots taken;
	struct slots freed;      /* of those taken: freed, while a slot of the slab was pinned */
	uint32_t next, previous; /* of a list; see below */
	uint16_t taken_count, freed_count, pins;
	uint8_t class; /* units of a slot; 0: no slot is taken */
	bool listed;
};

struct spill {
	int fd;
	bool in_memory;
	struct slab *slabs;
	uint32_t slabs_max, slabs_used; /* used: those behind were never touched */
	uint32_t lists[RAW_CLASS + 1]; /* slabs with a free slot, by class; 0: slabs without any slot taken */
	struct spill_counts counts;
	ZSTD_CCtx *packer;
	pthread_mutex_t unpack_lock; /* protects the next */
	ZSTD_DCtx *unpacker;
};

int spill_open(int fd, uint64_t most_bytes, bool in_memory, struct spill **ret_spill)
{
	uint64_t slabs = most_bytes / SLAB_BYTES;
	struct spill *s;

	if (!slabs)
		return -EINVAL;
	s = calloc(1, sizeof *s);
	if (!s)
		return -ENOMEM;
	s->fd = fd;
	s->in_memory = in_memory;
	s->slabs_max = slabs < SLABS_MAX ? (uint32_t)slabs : SLABS_MAX;
	s->counts.most_bytes = (uint64_t)s->slabs_max * SLAB_BYTES;
	for (unsigned i = 0; i <= RAW_CLASS; i++)
		s->lists[i] = NOBODY;
	pthread_mutex_init(&s->unpack_lock, NULL);
	s->slabs = calloc(s->slabs_max, sizeof *s->slabs); /* memory only where it is touched */
	s->packer = ZSTD_createCCtx();
	s->unpacker = ZSTD_createDCtx();
	if (!s->slabs || !s->packer || !s->unpacker) {
		spill_close(s);
		return -ENOMEM;
	}
	*ret_spill = s;
	return 0;
}

void spill_close(struct spill *s)
{
	if (!s)
		return;
	ZSTD_freeDCtx(s->unpacker);
	ZSTD_freeCCtx(s->packer);
	pthread_mutex_destroy(&s->unpack_lock);
	free(s->slabs);
	free(s);
}

/* ---- slots; with the mask lock ------------------------------------------------------------------ */

static uint32_t slab_of(uint64_t slot) { return (uint32_t)(slot >> SLOT_BITS); }

static unsigned index_of(uint64_t slot) { return slot & ((1u << SLOT_BITS) - 1); }

static unsigned class_of(size_t bytes) { return (unsigned)((bytes + UNIT_BYTES - 1) / UNIT_BYTES); }

static unsigned slots_of(unsigned class) { return SLAB_BYTES / (class * UNIT_BYTES); }

static bool is_set(const struct slots *s, unsigned i) { return s->bits[i / 64] >> i % 64 & 1; }

static void set(struct slots *s, unsigned i, bool on)
{
	if (on)
		s->bits[i / 64] |= 1ull << i % 64;
	else
		s->bits[i / 64] &= ~(1ull << i % 64);
}

static void unlist(struct spill *s, uint32_t n)
{
	struct slab *slab = &s->slabs[n];

	if (!slab->listed)
		return;
	if (slab->previous == NOBODY)
		s->lists[slab->class] = slab->next;
	else
		s->slabs[slab->previous].next = slab->next;
	if (slab->next != NOBODY)
		s->slabs[slab->next].previous = slab->previous;
	slab->listed = false;
}

static void list(struct spill *s, uint32_t n)
{
	struct slab *slab = &s->slabs[n];

	if (slab->listed)
		return;
	slab->next = s->lists[slab->class];
	slab->previous = NOBODY;
	if (slab->next != NOBODY)
		s->slabs[slab->next].previous = n;
	s->lists[slab->class] = n;
	slab->listed = true;
}

/* Nothing is taken of it any more. */
static void empty(struct spill *s, uint32_t n)
{
	unlist(s, n);
	s->slabs[n].class = 0;
	list(s, n);
	s->counts.taken_now -= SLAB_BYTES;
	if (s->in_memory)
		(void)os_punch_hole(s->fd, (uint64_t)n * SLAB_BYTES,
				    SLAB_BYTES); /* or it is used again as it is */
}

static void give_back(struct spill *s, uint32_t n, unsigned i)
{
	struct slab *slab = &s->slabs[n];

	set(&slab->taken, i, false);
	if (--slab->taken_count)
		list(s, n);
	else
		empty(s, n);
}

/* A slab with a free slot; NOBODY: there is none. */
static uint32_t slab_for(struct spill *s, unsigned class)
{
	uint32_t n = s->lists[class];

	if (n != NOBODY)
		return n;
	n = s->lists[0];
	if (n == NOBODY && s->slabs_used < s->slabs_max)
		n = s->slabs_used++;
	if (n == NOBODY)
		return n;
	unlist(s, n);
	s->slabs[n].class = (uint8_t) class;
	list(s, n);
	s->counts.taken_now += SLAB_BYTES;
	return n;
}

int spill_reserve(struct spill *s, size_t bytes, uint64_t *ret_slot)
{
	unsigned class = class_of(bytes), i = 0;
	struct slab *slab;
	uint32_t n;

	assert(class && class <= RAW_CLASS);
	n = slab_for(s, class);
	if (n == NOBODY)
		return -ENOSPC;
	slab = &s->slabs[n];
	while (is_set(&slab->taken, i))
		i++;
	set(&slab->taken, i, true);
	if (++slab->taken_count == slots_of(class))
		unlist(s, n);
	s->counts.slots_now++;
	s->counts.bytes_now += (uint64_t) class * UNIT_BYTES;
	*ret_slot = (uint64_t)n << SLOT_BITS | i;
	return 0;
}

void spill_free(struct spill *s, uint64_t slot)
{
	struct slab *slab = &s->slabs[slab_of(slot)];

	assert(is_set(&slab->taken, index_of(slot)) && !is_set(&slab->freed, index_of(slot)));
	s->counts.slots_now--;
	s->counts.bytes_now -= (uint64_t)slab->class * UNIT_BYTES;
	if (slab->pins) {
		set(&slab->freed, index_of(slot), true);
		slab->freed_count++;
	} else {
		give_back(s, slab_of(slot), index_of(slot));
	}
}

void spill_pin(struct spill *s, uint64_t slot) { s->slabs[slab_of(slot)].pins++; }

void spill_unpin(struct spill *s, uint64_t slot)
{
	struct slab *slab = &s->slabs[slab_of(slot)];

	assert(slab->pins);
	if (--slab->pins)
		return;
	for (unsigned i = 0; slab->freed_count; i++) {
		if (!is_set(&slab->freed, i))
			continue;
		set(&slab->freed, i, false);
		slab->freed_count--;
		give_back(s, slab_of(slot), i);
	}
}

void spill_count(const struct spill *s, struct spill_counts *ret_counts) { *ret_counts = s->counts; }

/* ---- contents ----------------------------------------------------------------------------------- */

/* A packed page is its length, then a frame; a whole one is itself. */
struct header {
	uint16_t bytes;
};

size_t spill_pack(struct spill *s, const void *page, uint8_t *packed)
{
	size_t most = (s->in_memory ? WORTH_CLASS : RAW_CLASS - 1) * UNIT_BYTES - sizeof(struct header);
	size_t bytes = ZSTD_compressCCtx(s->packer, packed + sizeof(struct header), most, page,
					 OS_PAGE_BYTES, LEVEL);
	struct header header = { .bytes = (uint16_t)bytes };

	if (!ZSTD_isError(bytes)) {
		memcpy(packed, &header, sizeof header);
		return sizeof header + bytes;
	}
	if (s->in_memory)
		return 0;
	memcpy(packed, page, OS_PAGE_BYTES);
	return OS_PAGE_BYTES;
}

static uint64_t offset_of(const struct spill *s, uint64_t slot)
{
	return (uint64_t)slab_of(slot) * SLAB_BYTES +
	       (uint64_t)index_of(slot) * s->slabs[slab_of(slot)].class * UNIT_BYTES;
}

/* All of the slot, for a later read of it must not meet the end of the file. */
int spill_write(struct spill *s, uint64_t slot, const uint8_t *packed, size_t bytes)
{
	uint8_t whole[OS_PAGE_BYTES];
	size_t slot_bytes = class_of(bytes) * UNIT_BYTES;

	memcpy(whole, packed, bytes);
	memset(whole + bytes, 0, slot_bytes - bytes);
	return os_write_all(s->fd, whole, slot_bytes, offset_of(s, slot));
}

static int unpack(struct spill *s, const uint8_t *packed, size_t room, void *page)
{
	struct header header;
	size_t bytes;

	memcpy(&header, packed, sizeof header);
	if (header.bytes > room - sizeof header)
		return -EBADMSG;
	pthread_mutex_lock(&s->unpack_lock);
	bytes = ZSTD_decompressDCtx(s->unpacker, page, OS_PAGE_BYTES, packed + sizeof header,
				    header.bytes);
	pthread_mutex_unlock(&s->unpack_lock);
	return bytes == OS_PAGE_BYTES ? 0 : -EBADMSG;
}

int spill_read(struct spill *s, uint64_t slot, void *page)
{
	unsigned class = s->slabs[slab_of(slot)].class;
	uint8_t packed[OS_PAGE_BYTES];
	int r = os_fault(OS_FAULT_STORAGE_READ);

	if (!r)
		r = os_read_all(s->fd, class == RAW_CLASS ? page : packed, class * UNIT_BYTES,
				offset_of(s, slot));
	if (!r && class != RAW_CLASS)
		r = unpack(s, packed, class * UNIT_BYTES, page);
	return r;
}
