/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A chain of virtio descriptors, and the block request that it is. Guest memory is read through a
 * callback, each byte at most once, and only what was read is believed: a guest may change it meanwhile.
 * Pure otherwise.
 *
 * Source: Virtual I/O Device (VIRTIO) 1.2, 2.7 (split virtqueues) and 5.2 (block device).
 */
#ifndef LATENT_BLK_VIRTIO_H
#define LATENT_BLK_VIRTIO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VIRTIO_SEGMENTS_MAX 258u /* of a request: 256 of data, its header, its status */
#define VIRTIO_RANGES_MAX 16u    /* of one discard or write-zeroes request */
#define VIRTIO_SECTOR_SHIFT 9

/* Copies guest memory. -EFAULT: it is not all there. */
struct virtio_memory {
	int (*read)(void *ctx, uint64_t gpa, void *to, size_t bytes);
	void *ctx;
};

struct virtio_segment {
	uint64_t gpa;
	uint32_t bytes; /* not 0, and gpa + bytes does not overflow */
};

/* Those that the device reads, then those that it writes. */
struct virtio_chain {
	uint32_t count, readable;
	struct virtio_segment segments[VIRTIO_SEGMENTS_MAX];
};

/*
 * The chain that begins with descriptor `head` of a table of `queue_size` at `table_gpa`, indirect
 * tables included. -EPROTO: the driver has broken the ring (a descriptor that is not there, a loop, too
 * many, none, an empty one, a readable one behind a writable one, an indirect one where none may be);
 * -EFAULT. `*ret_why`: a sentence. The queue must stop.
 */
int virtio_read_chain(const struct virtio_memory *memory, uint64_t table_gpa, uint16_t queue_size,
		      uint16_t head, struct virtio_chain *ret_chain, const char **ret_why);

struct virtio_disk {
	uint64_t sectors;
	bool readonly;
	bool discard, write_zeroes; /* agreed on */
	uint32_t range_sectors_max; /* of one range of them */
};

enum virtio_blk_op {
	VIRTIO_BLK_READ,
	VIRTIO_BLK_WRITE,
	VIRTIO_BLK_SYNC,
	VIRTIO_BLK_ID, /* the first `bytes` of the disk's name, which has 20 */
	VIRTIO_BLK_PUNCH,
	VIRTIO_BLK_ZERO,
	VIRTIO_BLK_REFUSE, /* nothing to do but to write `status` */
};

struct virtio_range {
	uint64_t sector;  /* sector + sectors is within the disk */
	uint32_t sectors; /* may be 0 */
	bool may_unmap;
};

struct virtio_blk_request {
	enum virtio_blk_op op;
	uint8_t status;        /* of VIRTIO_BLK_REFUSE: VIRTIO_BLK_S_IOERR or _UNSUPP */
	uint64_t status_gpa;   /* one byte, the last that the device may write */
	uint64_t sector;       /* READ, WRITE: within the disk, with all of `bytes` */
	uint64_t bytes;        /* of data: READ, WRITE: whole sectors; ID: at most 20 */
	uint32_t first, count; /* data: segments of the chain, which has been cut to that */
	uint32_t ranges;       /* PUNCH, ZERO */
	struct virtio_range range[VIRTIO_RANGES_MAX];
};

/*
 * What a chain asks for. Cuts header and status off its segments. -EPROTO: there is no header, or no
 * place for a status, so it cannot even be refused; -EFAULT: header or ranges are not in guest memory.
 * `*ret_why` with both.
 */
int virtio_blk_parse(const struct virtio_memory *memory, const struct virtio_disk *disk,
		     struct virtio_chain *chain, struct virtio_blk_request *ret_request,
		     const char **ret_why);

#endif
