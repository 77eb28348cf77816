/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "core/spill.h"

#include "os/os.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define SLAB_BYTES 65536u
#define UNIT_BYTES 256u /* slots are 1 to RAW_CLASS of these long */
#define RAW_CLASS 16u   /* a whole page, as it is */
#define WORTH_CLASS 12u /* in memory: a slot that is longer saves too little */
#define RAW_SLOTS (SLAB_BYTES / OS_PAGE_BYTES)
#define SLOT_BITS 8
#define KIND_SHIFT 32
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

/* The memory, or the file. */
struct part {
	enum spill_kind kind;
	_Atomic int fd; /* -1: there is none; set last, and once */
	struct slab *slabs;
	uint32_t (*sums)[RAW_SLOTS];    /* of whole pages in a file; what is packed has its own */
	uint32_t slabs_max, slabs_used; /* used: those behind were never touched */
	uint32_t lists[RAW_CLASS + 1];  /* slabs with a free slot, by class; 0: without any slot taken */
	struct spill_counts counts;
};

struct spill {
	struct part parts[SPILL_KINDS];
	ZSTD_CCtx *packer;
	pthread_mutex_t unpack_lock; /* protects the next */
	ZSTD_DCtx *unpacker;
};

int spill_open(struct spill **ret_spill)
{
	struct spill *s = calloc(1, sizeof *s);

	if (!s)
		return -ENOMEM;
	for (unsigned i = 0; i < SPILL_KINDS; i++) {
		s->parts[i].kind = (enum spill_kind)i;
		s->parts[i].fd = -1;
	}
	pthread_mutex_init(&s->unpack_lock, NULL);
	s->packer = ZSTD_createCCtx();
	s->unpacker = ZSTD_createDCtx();
	if (!s->packer || !s->unpacker ||
	    ZSTD_isError(ZSTD_CCtx_setParameter(s->packer, ZSTD_c_checksumFlag, 1)) ||
	    ZSTD_isError(ZSTD_CCtx_setParameter(s->packer, ZSTD_c_compressionLevel, LEVEL))) {
		spill_close(s);
		return -ENOMEM;
	}
	*ret_spill = s;
	return 0;
}

/* Tables take memory only where they are touched. */
int spill_add(struct spill *s, enum spill_kind kind, int fd, uint64_t most_bytes)
{
	uint64_t slabs = most_bytes / SLAB_BYTES;
	struct part *p = &s->parts[kind];

	if (p->fd >= 0)
		return -EALREADY;
	if (!slabs)
		return -EINVAL;
	slabs = slabs < SLABS_MAX ? slabs : SLABS_MAX;
	p->slabs = calloc(slabs, sizeof *p->slabs);
	p->sums = kind == SPILL_FILE ? calloc(slabs, sizeof *p->sums) : NULL;
	if (!p->slabs || (kind == SPILL_FILE && !p->sums)) {
		free(p->slabs);
		p->slabs = NULL;
		return -ENOMEM;
	}
	p->slabs_max = (uint32_t)slabs;
	p->counts.most_bytes = slabs * SLAB_BYTES;
	for (unsigned i = 0; i <= RAW_CLASS; i++)
		p->lists[i] = NOBODY;
	if (kind == SPILL_FILE)
		os_expect_random(fd); /* what is read ahead would stay in memory */
	p->fd = fd;
	return 0;
}

bool spill_has(const struct spill *s, enum spill_kind kind) { return s->parts[kind].fd >= 0; }

void spill_close(struct spill *s)
{
	if (!s)
		return;
	ZSTD_freeDCtx(s->unpacker);
	ZSTD_freeCCtx(s->packer);
	pthread_mutex_destroy(&s->unpack_lock);
	for (unsigned i = 0; i < SPILL_KINDS; i++) {
		free(s->parts[i].slabs);
		free(s->parts[i].sums);
	}
	free(s);
}

/* ---- slots; with the mask lock ------------------------------------------------------------------ */

static uint32_t slab_of(uint64_t slot) { return (uint32_t)(slot >> SLOT_BITS) & (SLABS_MAX - 1); }

static struct part *part_of(struct spill *s, uint64_t slot) { return &s->parts[slot >> KIND_SHIFT]; }

/* Of what comes. */
static struct part *part_now(struct spill *s)
{
	return &s->parts[spill_has(s, SPILL_FILE) ? SPILL_FILE : SPILL_MEMORY];
}

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

static void unlist(struct part *p, uint32_t n)
{
	struct slab *slab = &p->slabs[n];

	if (!slab->listed)
		return;
	if (slab->previous == NOBODY)
		p->lists[slab->class] = slab->next;
	else
		p->slabs[slab->previous].next = slab->next;
	if (slab->next != NOBODY)
		p->slabs[slab->next].previous = slab->previous;
	slab->listed = false;
}

static void list(struct part *p, uint32_t n)
{
	struct slab *slab = &p->slabs[n];

	if (slab->listed)
		return;
	slab->next = p->lists[slab->class];
	slab->previous = NOBODY;
	if (slab->next != NOBODY)
		p->slabs[slab->next].previous = n;
	p->lists[slab->class] = n;
	slab->listed = true;
}

/* Nothing is taken of it any more. */
static void empty(struct part *p, uint32_t n)
{
	unlist(p, n);
	p->slabs[n].class = 0;
	list(p, n);
	p->counts.taken_now -= SLAB_BYTES;
	if (p->kind == SPILL_MEMORY)
		(void)os_punch_hole(p->fd, (uint64_t)n * SLAB_BYTES,
				    SLAB_BYTES); /* or it is used again as it is */
}

static void give_back(struct part *p, uint32_t n, unsigned i)
{
	struct slab *slab = &p->slabs[n];

	set(&slab->taken, i, false);
	if (--slab->taken_count)
		list(p, n);
	else
		empty(p, n);
}

/* A slab with a free slot; NOBODY: there is none. */
static uint32_t slab_for(struct part *p, unsigned class)
{
	uint32_t n = p->lists[class];

	if (n != NOBODY)
		return n;
	n = p->lists[0];
	if (n == NOBODY && p->slabs_used < p->slabs_max)
		n = p->slabs_used++;
	if (n == NOBODY)
		return n;
	unlist(p, n);
	p->slabs[n].class = (uint8_t) class;
	list(p, n);
	p->counts.taken_now += SLAB_BYTES;
	return n;
}

int spill_reserve(struct spill *s, size_t bytes, uint64_t *ret_slot)
{
	unsigned class = class_of(bytes), i = 0;
	struct part *p = part_now(s);
	struct slab *slab;
	uint32_t n;

	assert(class && class <= RAW_CLASS);
	n = slab_for(p, class);
	if (n == NOBODY)
		return -ENOSPC;
	slab = &p->slabs[n];
	while (is_set(&slab->taken, i))
		i++;
	set(&slab->taken, i, true);
	if (++slab->taken_count == slots_of(class))
		unlist(p, n);
	p->counts.slots_now++;
	p->counts.bytes_now += (uint64_t) class * UNIT_BYTES;
	*ret_slot = (uint64_t)p->kind << KIND_SHIFT | (uint64_t)n << SLOT_BITS | i;
	return 0;
}

void spill_free(struct spill *s, uint64_t slot)
{
	struct part *p = part_of(s, slot);
	struct slab *slab = &p->slabs[slab_of(slot)];

	assert(is_set(&slab->taken, index_of(slot)) && !is_set(&slab->freed, index_of(slot)));
	p->counts.slots_now--;
	p->counts.bytes_now -= (uint64_t)slab->class * UNIT_BYTES;
	if (slab->pins) {
		set(&slab->freed, index_of(slot), true);
		slab->freed_count++;
	} else {
		give_back(p, slab_of(slot), index_of(slot));
	}
}

void spill_pin(struct spill *s, uint64_t slot) { part_of(s, slot)->slabs[slab_of(slot)].pins++; }

void spill_unpin(struct spill *s, uint64_t slot)
{
	struct part *p = part_of(s, slot);
	struct slab *slab = &p->slabs[slab_of(slot)];

	assert(slab->pins);
	if (--slab->pins)
		return;
	for (unsigned i = 0; slab->freed_count; i++) {
		if (!is_set(&slab->freed, i))
			continue;
		set(&slab->freed, i, false);
		slab->freed_count--;
		give_back(p, slab_of(slot), i);
	}
}

void spill_count(const struct spill *s, enum spill_kind kind, struct spill_counts *ret_counts)
{
	*ret_counts = s->parts[kind].counts;
}

/* ---- contents ----------------------------------------------------------------------------------- */

/* A packed page is its length, then a frame with a sum; a whole one is itself. */
struct header {
	uint16_t bytes;
};

size_t spill_pack(struct spill *s, const void *page, uint8_t *packed)
{
	bool in_memory = part_now(s)->kind == SPILL_MEMORY;
	size_t most = (in_memory ? WORTH_CLASS : RAW_CLASS - 1) * UNIT_BYTES - sizeof(struct header);
	size_t bytes =
		ZSTD_compress2(s->packer, packed + sizeof(struct header), most, page, OS_PAGE_BYTES);
	struct header header = { .bytes = (uint16_t)bytes };

	if (!ZSTD_isError(bytes)) {
		memcpy(packed, &header, sizeof header);
		return sizeof header + bytes;
	}
	if (in_memory)
		return 0;
	memcpy(packed, page, OS_PAGE_BYTES);
	return OS_PAGE_BYTES;
}

static uint32_t sum_of(const void *page) { return (uint32_t)XXH3_64bits(page, OS_PAGE_BYTES); }

static uint64_t offset_of(const struct part *p, uint64_t slot)
{
	return (uint64_t)slab_of(slot) * SLAB_BYTES +
	       (uint64_t)index_of(slot) * p->slabs[slab_of(slot)].class * UNIT_BYTES;
}

/* All of the slot, for a later read of it must not meet the end of the file. */
int spill_write(struct spill *s, uint64_t slot, const uint8_t *packed, size_t bytes)
{
	struct part *p = part_of(s, slot);
	uint8_t whole[OS_PAGE_BYTES];
	size_t slot_bytes = class_of(bytes) * UNIT_BYTES;

	memcpy(whole, packed, bytes);
	memset(whole + bytes, 0, slot_bytes - bytes);
	if (slot_bytes == OS_PAGE_BYTES)
		p->sums[slab_of(slot)][index_of(slot)] = sum_of(whole);
	return os_write_all(p->fd, whole, slot_bytes, offset_of(p, slot));
}

int spill_flush(struct spill *s)
{
	return spill_has(s, SPILL_FILE) ? os_flush_cached(s->parts[SPILL_FILE].fd) : 0;
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

void spill_expect_read(struct spill *s, uint64_t slot)
{
	struct part *p = part_of(s, slot);

	if (p->kind == SPILL_FILE)
		os_expect_read(p->fd, offset_of(p, slot), p->slabs[slab_of(slot)].class * UNIT_BYTES);
}

int spill_read(struct spill *s, uint64_t slot, void *page)
{
	struct part *p = part_of(s, slot);
	unsigned class = p->slabs[slab_of(slot)].class;
	uint8_t packed[OS_PAGE_BYTES];
	int r = os_fault(OS_FAULT_STORAGE_READ);

	if (!r)
		r = os_read_all(p->fd, packed, class * UNIT_BYTES, offset_of(p, slot));
	if (r)
		return r;
	if (p->kind == SPILL_FILE)
		os_drop_cached_around(p->fd, offset_of(p, slot), class * UNIT_BYTES);
	if (class != RAW_CLASS)
		return unpack(s, packed, class * UNIT_BYTES, page);
	memcpy(page, packed, sizeof packed);
	return sum_of(page) == p->sums[slab_of(slot)][index_of(slot)] ? 0 : -EBADMSG;
}
