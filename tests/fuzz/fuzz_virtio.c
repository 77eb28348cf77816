/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A hostile driver: descriptors that loop, overflow or lie elsewhere, and guest memory that changes as
 * it is read. What is believed of a request is within the disk and goes the right way, and the changes
 * make no difference.
 *
 * Input: what was agreed on (1 byte), the queue's size as a power of two (1), the head (1), the disk's
 * sectors (2); then guest memory from address 0 on, descriptors first. Behind it there is none.
 */
#include "fuzz.h"

#include "blk/virtio.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <string.h>

#define MEMORY_BYTES 4096u

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("\xff\xff\xff\xff\xff\xff\xff\xff"),
	FUZZ_TEXT("\x10\x00\x00\x00\x01\x00\x01\x00"), /* 16 bytes, then another */
	FUZZ_TEXT("\x00\x02\x00\x00\x03\x00\x02\x00"), /* 512 bytes to be written, then another */
	FUZZ_TEXT("\x01\x00\x00\x00\x02\x00\x00\x00"), /* a byte for the status */
	FUZZ_TEXT("\x40\x00\x00\x00\x04\x00\x00\x00"), /* an indirect table */
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "virtio", 5 + MEMORY_BYTES, tokens, false };

struct guest {
	uint8_t bytes[MEMORY_BYTES], seen[MEMORY_BYTES];
	bool changes, seen_twice;
};

static int read_guest(void *ctx, uint64_t gpa, void *to, size_t bytes)
{
	struct guest *g = ctx;

	if (gpa > MEMORY_BYTES || bytes > MEMORY_BYTES - gpa)
		return -EFAULT;
	memcpy(to, g->bytes + gpa, bytes);
	for (size_t i = 0; i < bytes; i++) {
		g->seen_twice |= g->seen[gpa + i]++ != 0;
		if (g->changes)
			g->bytes[gpa + i] ^= 0x55;
	}
	return 0;
}

struct outcome {
	int error;
	const char *why;
	struct virtio_chain chain;
	struct virtio_blk_request request;
};

static void check_chain(const struct virtio_chain *c)
{
	fuzz_require(c->count && c->count <= VIRTIO_SEGMENTS_MAX && c->readable <= c->count);
	for (uint32_t i = 0; i < c->count; i++)
		fuzz_require(c->segments[i].bytes &&
			     c->segments[i].gpa + c->segments[i].bytes > c->segments[i].gpa);
}

static uint64_t data_bytes(const struct virtio_chain *c, const struct virtio_blk_request *r)
{
	uint64_t bytes = 0;

	for (uint32_t i = r->first; i < r->first + r->count; i++) {
		fuzz_require(c->segments[i].bytes);
		bytes += c->segments[i].bytes;
	}
	return bytes;
}

static void check_request(const struct virtio_disk *disk, const struct virtio_chain *c,
			  const struct virtio_blk_request *r)
{
	bool changes_disk =
		r->op == VIRTIO_BLK_WRITE || r->op == VIRTIO_BLK_PUNCH || r->op == VIRTIO_BLK_ZERO;

	fuzz_require(r->first + r->count <= c->count &&
		     (!r->count || r->first >= c->readable || r->first + r->count <= c->readable));
	fuzz_require(!changes_disk || !disk->readonly);
	switch (r->op) {
	case VIRTIO_BLK_READ:
	case VIRTIO_BLK_WRITE:
		fuzz_require(r->bytes && r->bytes % 512 == 0 && data_bytes(c, r) == r->bytes);
		fuzz_require(r->sector <= disk->sectors && r->bytes / 512 <= disk->sectors - r->sector);
		fuzz_require(r->op == VIRTIO_BLK_READ ? r->first >= c->readable
						      : r->first + r->count <= c->readable);
		break;
	case VIRTIO_BLK_ID:
		fuzz_require(r->bytes <= 20 && data_bytes(c, r) >= r->bytes && r->first >= c->readable);
		break;
	case VIRTIO_BLK_PUNCH:
	case VIRTIO_BLK_ZERO:
		fuzz_require(r->op == VIRTIO_BLK_PUNCH ? disk->discard : disk->write_zeroes);
		fuzz_require(r->ranges && r->ranges <= VIRTIO_RANGES_MAX && !r->count);
		for (uint32_t i = 0; i < r->ranges; i++) {
			fuzz_require(r->range[i].sector <= disk->sectors &&
				     r->range[i].sectors <= disk->range_sectors_max);
			fuzz_require(r->range[i].sectors <= disk->sectors - r->range[i].sector);
			fuzz_require(r->op == VIRTIO_BLK_ZERO || !r->range[i].may_unmap);
		}
		break;
	case VIRTIO_BLK_REFUSE:
		fuzz_require(r->status == VIRTIO_BLK_S_IOERR || r->status == VIRTIO_BLK_S_UNSUPP);
		fuzz_require(!r->count && !r->ranges);
		break;
	case VIRTIO_BLK_SYNC:
		break;
	}
}

static void run(struct guest *g, const struct virtio_disk *disk, uint16_t size, uint16_t head,
		struct outcome *o)
{
	const struct virtio_memory memory = { read_guest, g };

	memset(o, 0, sizeof *o);
	o->error = virtio_read_chain(&memory, 0, size, head, &o->chain, &o->why);
	if (!o->error) {
		check_chain(&o->chain);
		o->error = virtio_blk_parse(&memory, disk, &o->chain, &o->request, &o->why);
	}
	fuzz_require(!o->error == !o->why && (!o->error || o->error == -EPROTO || o->error == -EFAULT));
	if (!o->error)
		check_request(disk, &o->chain, &o->request);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	static struct guest still, moving;
	static struct outcome a, b;
	struct fuzz_reader in = { data, data + bytes };
	uint8_t agreed = fuzz_byte(&in);
	uint16_t size = (uint16_t)(1u << fuzz_byte(&in) % 9), head = fuzz_byte(&in);
	const struct virtio_disk disk = { .sectors = fuzz_number(&in, 2),
					  .readonly = agreed & 1,
					  .discard = agreed & 2,
					  .write_zeroes = agreed & 4,
					  .range_sectors_max = 1024 };
	size_t n = MEMORY_BYTES;
	const uint8_t *memory = fuzz_bytes(&in, &n);

	memset(&still, 0, sizeof still);
	memcpy(still.bytes, memory, n);
	moving = still;
	moving.changes = true;
	run(&still, &disk, size, head, &a);
	run(&moving, &disk, size, head, &b);
	if (!still.seen_twice) /* else one thing lies over another, and the guest gets what it gets */
		fuzz_require(a.error == b.error && !memcmp(&a.chain, &b.chain, sizeof a.chain) &&
			     !memcmp(&a.request, &b.request, sizeof a.request));
	return 0;
}
