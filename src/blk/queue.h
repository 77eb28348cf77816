/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A split virtqueue from the device's side, and the record of requests in flight that outlives the
 * device's process. Rings and record are memory that others write: indices are checked, and read once.
 *
 * One thread. Source: VIRTIO 1.2, 2.7; QEMU's docs/interop/vhost-user.rst, "Inflight I/O tracking".
 */
#ifndef LATENT_BLK_QUEUE_H
#define LATENT_BLK_QUEUE_H

#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QUEUE_SIZE_MAX 1024u

/* The record of one queue, as vhost-user lays it out: a front end keeps it, and gives it to the next
 * one. */
struct queue_record_entry {
	uint8_t in_flight;
	uint8_t padding[5];
	uint16_t next;    /* of the batch that was given back last */
	uint64_t counter; /* requests in the order in which they came */
};

struct queue_record {
	uint64_t features;
	uint16_t version;
	uint16_t size;
	uint16_t last_batch_head;
	uint16_t used_index; /* of the used ring, when the record last agreed with it */
	struct queue_record_entry entries[];
};

struct queue {
	struct vring_avail *avail;   /* written by the driver */
	struct vring_used *used;     /* written by us */
	struct queue_record *record; /* NULL: none was agreed on */
	uint64_t counter;
	uint16_t size;       /* a power of two, at most QUEUE_SIZE_MAX */
	uint16_t next_avail; /* the next entry to be looked at */
	uint16_t next_used;
	uint16_t told_used;             /* up to here the driver was asked for its wish to be told */
	bool event_index;               /* VIRTIO_RING_F_EVENT_IDX was agreed on */
	bool in_flight[QUEUE_SIZE_MAX]; /* heads: what a driver offers twice is refused */
};

size_t queue_avail_bytes(uint16_t size); /* of the rings, their event fields included */
size_t queue_used_bytes(uint16_t size);
size_t queue_record_bytes(uint16_t size);

/* A record of zeros becomes one of this queue. */
void queue_record_init(struct queue_record *record, uint16_t size);

/*
 * Goes on where the rings are: after SET_VRING_BASE `base`, or, with a record, where that says:
 * `heads[size]` are the requests to be done again, in their order; returns how many. -EPROTO: the record
 * is of no such queue, or a list in it does not end.
 */
int queue_start(struct queue *q, uint16_t base, uint16_t *heads);

/* 1: a request, whose first descriptor is `*ret_head`; it is in flight from then on. 0: none. -EPROTO:
 * the driver says that there are more than can be, or offers one that is not there or that we have. */
int queue_take(struct queue *q, uint16_t *ret_head);

/* The request is done; `written`: bytes of guest memory that it has changed. */
void queue_give_back(struct queue *q, uint16_t head, uint32_t written);

/* After some were given back: does the driver want to be told? */
bool queue_must_tell(struct queue *q);

/* Asks the driver to kick when it has more (or, false, not to bother). After true, queue_take once more:
 * a request that came meanwhile brings no kick. */
void queue_want_kicks(struct queue *q, bool on);

#endif
