/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "blk/virtio.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <string.h>

#define ID_BYTES 20u
#define SECTOR_BYTES (1u << VIRTIO_SECTOR_SHIFT)

static int broken(const char **ret_why, const char *why)
{
	*ret_why = why;
	return -EPROTO;
}

/* ---- chains ----------------------------------------------------------------------------------- */

struct walk {
	const struct virtio_memory *memory;
	uint64_t table_gpa;
	uint32_t size; /* descriptors in the table */
	bool indirect;
};

static int read_desc(const struct walk *walk, uint32_t index, struct vring_desc *ret_desc,
		     const char **ret_why)
{
	uint64_t gpa;

	if (index >= walk->size)
		return broken(ret_why, "a descriptor is not in its table");
	if (__builtin_add_overflow(walk->table_gpa, (uint64_t)index * sizeof *ret_desc, &gpa) ||
	    walk->memory->read(walk->memory->ctx, gpa, ret_desc, sizeof *ret_desc)) {
		*ret_why = "a descriptor is not in guest memory";
		return -EFAULT;
	}
	return 0;
}

static int add_segment(struct virtio_chain *chain, const struct vring_desc *d, const char **ret_why)
{
	uint64_t end;

	if (!d->len || __builtin_add_overflow(d->addr, d->len, &end))
		return broken(ret_why, "a descriptor is empty, or ends behind all addresses");
	if (chain->count == VIRTIO_SEGMENTS_MAX)
		return broken(ret_why, "a request has too many descriptors");
	if (d->flags & VRING_DESC_F_WRITE) {
		chain->segments[chain->count++] = (struct virtio_segment){ d->addr, d->len };
		return 0;
	}
	if (chain->readable != chain->count)
		return broken(ret_why, "a descriptor to be read follows one to be written");
	chain->segments[chain->count++] = (struct virtio_segment){ d->addr, d->len };
	chain->readable++;
	return 0;
}

/* An indirect table takes the place of the rest of the chain: it may come last only, and only once. */
static int enter_table(struct walk *walk, const struct vring_desc *d, const char **ret_why)
{
	if (walk->indirect || d->flags & VRING_DESC_F_NEXT)
		return broken(ret_why,
			      "an indirect table is within another one, or is not the end of its chain");
	if (!d->len || d->len % sizeof *d || d->len / sizeof *d > UINT16_MAX)
		return broken(ret_why, "an indirect table is not made of descriptors");
	*walk = (struct walk){ walk->memory, d->addr, d->len / (uint32_t)sizeof *d, true };
	return 0;
}

int virtio_read_chain(const struct virtio_memory *memory, uint64_t table_gpa, uint16_t queue_size,
		      uint16_t head, struct virtio_chain *ret_chain, const char **ret_why)
{
	struct walk walk = { memory, table_gpa, queue_size, false };
	struct virtio_chain *chain = ret_chain;
	uint32_t index = head, left = queue_size; /* a longer chain comes by somewhere twice */

	chain->count = chain->readable = 0;
	for (;;) {
		struct vring_desc d;
		int r = read_desc(&walk, index, &d, ret_why);

		if (!r && !left--)
			r = broken(ret_why, "descriptors form a loop");
		if (!r && d.flags & VRING_DESC_F_INDIRECT) {
			r = enter_table(&walk, &d, ret_why);
			index = 0;
			left = walk.size;
			if (!r)
				continue;
		}
		if (!r)
			r = add_segment(chain, &d, ret_why);
		if (r)
			return r;
		if (!(d.flags & VRING_DESC_F_NEXT))
			return 0;
		index = d.next;
	}
}

/* ---- block requests --------------------------------------------------------------------------- */

/* Copies and takes off the first bytes of the readable segments, however they are cut. */
static int take_front(const struct virtio_memory *memory, struct virtio_chain *chain, void *to,
		      uint32_t bytes, uint32_t *first, const char **ret_why)
{
	uint8_t *at = to;

	while (bytes) {
		struct virtio_segment *s = &chain->segments[*first];
		uint32_t n;

		if (*first >= chain->readable)
			return broken(ret_why, "a request is too short");
		n = s->bytes < bytes ? s->bytes : bytes;
		if (memory->read(memory->ctx, s->gpa, at, n)) {
			*ret_why = "a request is not in guest memory";
			return -EFAULT;
		}
		at += n;
		bytes -= n;
		s->gpa += n;
		s->bytes -= n;
		*first += !s->bytes;
	}
	return 0;
}

static int take_status(struct virtio_chain *chain, uint64_t *ret_gpa, const char **ret_why)
{
	struct virtio_segment *s = &chain->segments[chain->count - 1];

	if (chain->readable == chain->count)
		return broken(ret_why, "a request has no place for its status");
	s->bytes--;
	*ret_gpa = s->gpa + s->bytes;
	chain->count -= !s->bytes;
	return 0;
}

static uint64_t sum_bytes(const struct virtio_chain *chain, uint32_t from, uint32_t to)
{
	uint64_t bytes = 0;

	for (uint32_t i = from; i < to; i++)
		bytes += chain->segments[i].bytes;
	return bytes;
}

static bool is_on_disk(const struct virtio_disk *disk, uint64_t sector, uint64_t sectors)
{
	return sector <= disk->sectors && sectors <= disk->sectors - sector;
}

static void refuse(struct virtio_blk_request *r, uint8_t status)
{
	r->op = VIRTIO_BLK_REFUSE;
	r->status = status;
	r->first = r->count = r->ranges = 0;
	r->bytes = 0;
}

static void parse_data(const struct virtio_disk *disk, struct virtio_blk_request *r, uint64_t wrong_way)
{
	if (wrong_way || !r->bytes || r->bytes % SECTOR_BYTES ||
	    !is_on_disk(disk, r->sector, r->bytes / SECTOR_BYTES) ||
	    (r->op == VIRTIO_BLK_WRITE && disk->readonly))
		refuse(r, VIRTIO_BLK_S_IOERR);
}

/* 0, or the status of a range that must be refused. */
static uint8_t check_range(const struct virtio_disk *disk, const struct virtio_blk_request *r,
			   const struct virtio_blk_discard_write_zeroes *range)
{
	uint32_t known = r->op == VIRTIO_BLK_ZERO ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;

	if (range->flags & ~known)
		return VIRTIO_BLK_S_UNSUPP;
	if (range->num_sectors > disk->range_sectors_max ||
	    !is_on_disk(disk, range->sector, range->num_sectors))
		return VIRTIO_BLK_S_IOERR;
	return VIRTIO_BLK_S_OK;
}

static int parse_ranges(const struct virtio_memory *memory, const struct virtio_disk *disk,
			struct virtio_chain *chain, struct virtio_blk_request *r, const char **ret_why)
{
	struct virtio_blk_discard_write_zeroes range;
	uint64_t bytes = sum_bytes(chain, r->first, chain->readable), n = bytes / sizeof range;
	uint8_t status = VIRTIO_BLK_S_OK;
	uint32_t at = r->first;

	r->count = 0;
	if (r->op == VIRTIO_BLK_PUNCH ? !disk->discard : !disk->write_zeroes)
		status = VIRTIO_BLK_S_UNSUPP;
	else if (disk->readonly || !n || bytes % sizeof range || n > VIRTIO_RANGES_MAX)
		status = VIRTIO_BLK_S_IOERR;
	while (status == VIRTIO_BLK_S_OK && r->ranges < n) {
		int error = take_front(memory, chain, &range, sizeof range, &at, ret_why);

		if (error)
			return error;
		status = check_range(disk, r, &range);
		r->range[r->ranges++] =
			(struct virtio_range){ range.sector, range.num_sectors, range.flags };
	}
	if (status != VIRTIO_BLK_S_OK)
		refuse(r, status);
	return 0;
}

static bool op_of(uint32_t type, enum virtio_blk_op *ret_op)
{
	static const struct {
		uint32_t type;
		enum virtio_blk_op op;
	} ops[] = {
		{ VIRTIO_BLK_T_IN, VIRTIO_BLK_READ },
		{ VIRTIO_BLK_T_OUT, VIRTIO_BLK_WRITE },
		{ VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_SYNC },
		{ VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_ID },
		{ VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_PUNCH },
		{ VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_ZERO },
	};

	for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++) {
		if (ops[i].type == type) {
			*ret_op = ops[i].op;
			return true;
		}
	}
	return false;
}

/* Data is what is left: that to be read for WRITE, that to be written for READ and ID. */
static void find_data(const struct virtio_chain *chain, uint32_t first, struct virtio_blk_request *r,
		      uint64_t *ret_other)
{
	bool writes_guest = r->op == VIRTIO_BLK_READ || r->op == VIRTIO_BLK_ID;
	uint64_t readable = sum_bytes(chain, first, chain->readable);
	uint64_t writable = sum_bytes(chain, chain->readable, chain->count);

	r->first = writes_guest ? chain->readable : first;
	r->count = (writes_guest ? chain->count : chain->readable) - r->first;
	r->bytes = writes_guest ? writable : readable;
	*ret_other = writes_guest ? readable : writable;
}

int virtio_blk_parse(const struct virtio_memory *memory, const struct virtio_disk *disk,
		     struct virtio_chain *chain, struct virtio_blk_request *ret_request,
		     const char **ret_why)
{
	struct virtio_blk_request *r = ret_request;
	struct virtio_blk_outhdr header;
	uint32_t first = 0;
	uint64_t other;
	int error = take_status(chain, &r->status_gpa, ret_why);

	if (!error)
		error = take_front(memory, chain, &header, sizeof header, &first, ret_why);
	if (error)
		return error;
	r->sector = header.sector;
	r->ranges = 0;
	r->status = VIRTIO_BLK_S_OK;
	if (!op_of(header.type, &r->op)) {
		refuse(r, VIRTIO_BLK_S_UNSUPP);
		return 0;
	}
	find_data(chain, first, r, &other);
	if (r->op == VIRTIO_BLK_READ || r->op == VIRTIO_BLK_WRITE)
		parse_data(disk, r, other);
	else if (r->op == VIRTIO_BLK_PUNCH || r->op == VIRTIO_BLK_ZERO)
		return parse_ranges(memory, disk, chain, r, ret_why);
	else if (r->op == VIRTIO_BLK_ID && r->bytes > ID_BYTES)
		r->bytes = ID_BYTES;
	return 0;
}
