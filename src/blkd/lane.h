/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A lane: a process of one thread, bound to one CPU, that serves the connections which its domain gives
 * it. Guest memory is mapped there for the time of a request (window/window.h); for good, only the rings.
 *
 * Everything waits in one io_uring: `struct event` is what a completion leads to. A lane touches nothing
 * that another process of the domain writes.
 *
 *   lane.c         the loop
 *   connection.c   vhost-user: one connection is one device of one VM
 *   virtqueue.c        a queue of it
 *   request.c      a request, from its descriptors to its status
 */
#ifndef LATENT_BLKD_LANE_H
#define LATENT_BLKD_LANE_H

#include "blk/queue.h"
#include "blk/vhost_user.h"
#include "blk/virtio.h"
#include "blkd/image.h"
#include "window/window.h"

#include <liburing.h>

#define LANE_REQUESTS 64u          /* under way at once: each has a slot of the window */
#define LANE_SEGMENTS 256u         /* of one part of a request */
#define LANE_PART_BYTES (1u << 20) /* long requests are done in parts: each fits into a slot */
#define LANE_PEEK_BYTES 512u
#define LANE_CONNECTIONS 64u
#define LANE_RANGE_SECTORS_MAX (1u << 22) /* of one discard: 2 GiB */

struct lane;
struct connection;

/* Embedded in what waits. `res`: of the completion. */
struct event {
	void (*happened)(struct lane *lane, struct event *event, int res);
};

/* What was read of guest memory for a request, so that small structures in a row take one system call. */
struct peek {
	uint64_t gpa;
	uint32_t bytes;
	uint8_t data[LANE_PEEK_BYTES];
};

struct virtqueue {
	struct event kicked;
	struct connection *connection;
	uint16_t index;
	bool has_size, has_rings, enabled, polls, broken;
	bool runs; /* its rings are mapped, and requests are taken */
	uint64_t desc_uva, used_uva, avail_uva;
	uint64_t desc_gpa;
	uint16_t base;         /* of SET_VRING_BASE */
	uint32_t untold;       /* requests given back since the driver was told */
	uint64_t untold_bytes; /* of these */
	int kick, call, error;
	struct ring_view {
		void *area; /* as reserved */
		size_t bytes;
		uint8_t *at;
	} desc, used, avail;
	struct queue queue;
	uint16_t redo[QUEUE_SIZE_MAX], redo_count, redo_next; /* what its predecessor has left */
};

struct connection {
	struct event readable;
	struct lane *lane;
	struct connection *next;
	int fd;
	bool polls, closing;
	uint32_t under_way; /* requests */
	uint64_t features, protocol_features;
	uint64_t served;

	struct memory_table table;
	int fds[MEMORY_REGIONS_MAX]; /* of its regions */

	void *record; /* of requests in flight; NULL */
	size_t record_bytes, record_stride;
	uint16_t record_queues;

	uint32_t queue_end; /* from here on the front end has named none */
	struct virtqueue queues[VHOST_USER_QUEUES_MAX];

	/* The message that is coming in, or waits until no request is under way. */
	uint8_t header[VHOST_USER_HEADER_BYTES], payload[VHOST_USER_PAYLOAD_MAX];
	uint32_t have; /* bytes of both */
	uint32_t message_fds;
	int message_fd[VHOST_USER_FDS_MAX];
	bool message_waits;
};

struct request {
	struct event done;
	struct request *next; /* while it is free */
	struct virtqueue *virtqueue;
	uint16_t head;
	uint8_t status;
	uint32_t range; /* PUNCH, ZERO: the one that is being done */
	uint64_t at;    /* READ, WRITE, ID: bytes done; ZERO by writing: of that range */
	uint32_t limit; /* of a part, in bytes */
	uint32_t part;  /* bytes that are being done */
	bool mapped, by_writing;
	struct virtio_chain chain;
	struct virtio_blk_request blk;
	struct latent_request window;
	struct latent_segment segments[LANE_SEGMENTS];
	struct iovec iov[LANE_SEGMENTS];
};

struct lane {
	int cpu, control;
	const struct image *image;
	const uint8_t *image_view; /* of one in memory; for the kernel's eyes only: it may be cut */
	uint64_t view_bytes;       /* that were copied from there */
	struct event from_domain;
	struct io_uring ring;
	struct window *window;
	struct request *requests, *free;
	uint32_t under_way;
	struct connection *connections;
	bool domain_is_gone;
	bool waits_always[2]; /* the image's file system cannot say that a write, a read would wait */
	struct peek peek;
};

/* What a lane says to its domain, a byte each. */
enum { LANE_READY = 'r', LANE_ENDED = 'e' /* a connection has */ };

/*
 * Serves until the domain is gone. `control`: a SOCK_SEQPACKET socket: each packet from the domain is a
 * byte with a connection's descriptor. Does not come back; exit status 1 if it cannot begin (said on
 * stderr).
 */
_Noreturn void lane_main(int cpu, int control, const struct image *image);

/* ---- of lane.c, for its other files ------------------------------------------------------------- */

/* "latent blkd: SENTENCE" */
void lane_say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Never NULL. Its data, set behind the io_uring_prep_…, is a struct event, or NULL: nobody waits. */
struct io_uring_sqe *lane_sqe(struct lane *lane);
/* The event happens soon, with -ECANCELED, or what it waited for. */
void lane_cancel(struct lane *lane, struct event *event);
/* To the CPU where it runs now: somebody has changed where it may. */
int lane_move(struct lane *lane);
/* The connection has ended, and nothing waits for it any more: it is freed. */
void lane_forget(struct lane *lane, struct connection *c);

/* ---- connection.c ------------------------------------------------------------------------------ */

int connection_new(struct lane *lane, int fd);
/* No more requests; what is under way ends first. May be called at any time, also twice. */
void connection_close(struct connection *c, const char *why);
/* A request has ended, or a poll: what had to wait for that goes on. */
void connection_settle(struct connection *c);
/* Copies guest memory that is not in a ring. -EFAULT. */
int connection_read(struct connection *c, uint64_t gpa, void *to, size_t bytes);
int connection_write(struct connection *c, uint64_t gpa, const void *from, size_t bytes);

/* ---- virtqueue.c ----------------------------------------------------------------------------------- */

/* Maps the rings and goes on where they are, if it has all that it needs and does not run. -EPROTO,
 * -EFAULT, -ENOMEM, `*ret_why` a sentence. */
int virtqueue_start(struct virtqueue *v, const char **ret_why);
void virtqueue_stop(struct virtqueue *v);
/* Stops it until the front end starts it anew: the driver has broken the rules. */
void virtqueue_break(struct virtqueue *v, const char *why);
/* Takes requests while there are any and the lane can do more, up to its share; true if it took all of that. */
bool virtqueue_take(struct virtqueue *v);
/* True if there is none left, and the driver will kick when it has one. */
void virtqueue_tell(struct virtqueue *v);
void virtqueue_poll(struct virtqueue *v);
void virtqueue_unpoll(struct virtqueue *v);

/* ---- request.c --------------------------------------------------------------------------------- */

/* The request that begins with this descriptor. It gives itself back when it is done. */
void request_start(struct request *r, struct virtqueue *v, uint16_t head);

#endif
