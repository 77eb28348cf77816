/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A vhost-user front end and the driver of its guest in one: what a VMM with a virtio-blk guest does, for tests and
 * benchmarks. Guest RAM is a memfd; rings, headers and indirect tables lie in its first megabytes, data behind
 * FRONT_DATA. Nothing is checked on behalf of the caller, who may break all rules.
 *
 * One thread. Functions return 0 or a negative errno.
 */
#ifndef LATENT_TESTS_BLK_FRONT_H
#define LATENT_TESTS_BLK_FRONT_H

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>

#define FRONT_QUEUES_MAX 4u
#define FRONT_QUEUE_SIZE 128u
#define FRONT_DATA (4ull << 20)     /* gpa */
#define FRONT_UVA 0x7f0000000000ull /* as which rings are named to the back end: gpa 0 */
#define FRONT_SEGMENTS 32u          /* of data of one request */

struct front_segment {
	uint64_t gpa;
	uint32_t bytes;
};

struct front_queue {
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	int kick, call;
	uint16_t next, seen; /* of avail, of used */
};

struct front {
	int fd, ram_fd, record_fd;
	uint8_t *ram;
	uint64_t ram_bytes, record_bytes;
	uint32_t queues;
	uint64_t features;
	struct virtio_blk_config config;
	struct front_queue queue[FRONT_QUEUES_MAX];
};

/* RAM and rings, connected to nobody. */
int front_init(struct front *f, uint64_t ram_bytes, uint32_t queues);
/* Connects, agrees on what it knows of what is offered, and starts the queues where they are. `with_record`: asks for a
 * record of requests in flight at first, and brings it along later. */
int front_connect(struct front *f, const char *path, bool with_record);
void front_disconnect(struct front *f);
void front_free(struct front *f);

/* A message, with a descriptor unless `fd` is -1; `reply`: of `reply_bytes`, NULL: none comes. */
int front_send(struct front *f, uint32_t op, const void *payload, uint32_t bytes, int fd);
int front_receive(struct front *f, void *reply, uint32_t reply_bytes, int *ret_fd);

/* A request in an indirect table, with descriptor `head` of the ring; front_offer makes it visible, front_kick says
 * so. */
void front_request(struct front *f, uint32_t queue, uint16_t head, uint32_t type, uint64_t sector,
		   const struct front_segment *segments, uint32_t count);
void front_offer(struct front *f, uint32_t queue, uint16_t head);
void front_kick(struct front *f, uint32_t queue);
/* The next one that was given back. -ETIMEDOUT; timeout 0: looks only. */
int front_wait(struct front *f, uint32_t queue, int timeout_ms, uint16_t *ret_head,
	       uint32_t *ret_written);
/* The status byte of a request. */
uint8_t *front_status(struct front *f, uint32_t queue, uint16_t head);

/* All of it in one: the status, or a negative errno. */
int front_do(struct front *f, uint32_t queue, uint32_t type, uint64_t sector,
	     const struct front_segment *segments, uint32_t count);

#endif
