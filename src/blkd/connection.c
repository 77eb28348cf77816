/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * A message is handled when none of the connection's requests is under way, and none is taken while one
 * waits: so no message meets a request that still uses what it changes.
 */
#include "blkd/lane.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/vhost.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define F_PROTOCOL_FEATURES (1ull << 30) /* VHOST_USER_F_PROTOCOL_FEATURES */
#define FLAG_VERSION 1u
#define FLAG_REPLY (1u << 2)
#define RECORD_ALIGN 64u
#define BLOCK_BYTES 512u
#define DATA_SEGMENTS 126u     /* with header and status as many as a queue of QEMU's has */
#define PHYSICAL_BLOCK_SHIFT 3 /* 2^3 sectors: 4 KiB */

/* Protocol features: docs/interop/vhost-user.rst. */
enum {
	PROTOCOL_MQ = 1 << 0,
	PROTOCOL_REPLY_ACK = 1 << 3,
	PROTOCOL_CONFIG = 1 << 9,
	PROTOCOL_INFLIGHT = 1 << 12,
	PROTOCOL_MEM_SLOTS = 1 << 15,
	PROTOCOL_FEATURES = PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG | PROTOCOL_INFLIGHT |
			    PROTOCOL_MEM_SLOTS,
};

struct reply {
	uint32_t bytes; /* 0: none, but for an acknowledgement */
	int fd;         /* sent along, then closed; -1 */
	uint8_t payload[VHOST_USER_PAYLOAD_MAX];
};

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* ---- guest memory ------------------------------------------------------------------------------- */

typedef int (*copy_fn)(int fd, void *at, size_t bytes, uint64_t offset);

static int write_from(int fd, void *at, size_t bytes, uint64_t offset)
{
	return os_write_all(fd, at, bytes, offset);
}

static int copy(struct connection *c, uint64_t gpa, uint8_t *at, size_t bytes, copy_fn one)
{
	while (bytes) {
		uint32_t region;
		uint64_t offset, n = memory_find(&c->table, gpa, bytes, &region, &offset);

		if (!n || one(c->fds[region], at, n, offset))
			return -EFAULT;
		gpa += n;
		at += n;
		bytes -= n;
	}
	return 0;
}

int connection_read(struct connection *c, uint64_t gpa, void *to, size_t bytes)
{
	return copy(c, gpa, to, bytes, os_read_all);
}

int connection_write(struct connection *c, uint64_t gpa, const void *from, size_t bytes)
{
	return copy(c, gpa, (uint8_t *)from, bytes, write_from);
}

/* ---- features and configuration ------------------------------------------------------------------ */

static uint64_t offered_features(const struct image *image)
{
	uint64_t f = F_PROTOCOL_FEATURES | 1ull << VIRTIO_F_VERSION_1 |
		     1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << VIRTIO_RING_F_EVENT_IDX |
		     1ull << VIRTIO_BLK_F_SEG_MAX | 1ull << VIRTIO_BLK_F_BLK_SIZE |
		     1ull << VIRTIO_BLK_F_TOPOLOGY | 1ull << VIRTIO_BLK_F_MQ |
		     1ull << VIRTIO_BLK_F_FLUSH;

	return f | (image->readonly ? 1ull << VIRTIO_BLK_F_RO
				    : 1ull << VIRTIO_BLK_F_DISCARD | 1ull << VIRTIO_BLK_F_WRITE_ZEROES);
}

static void fill_config(const struct image *image, struct virtio_blk_config *config)
{
	*config = (struct virtio_blk_config){
		.capacity = image->bytes >> VIRTIO_SECTOR_SHIFT,
		.seg_max = DATA_SEGMENTS,
		.blk_size = BLOCK_BYTES,
		.physical_block_exp = PHYSICAL_BLOCK_SHIFT,
		.num_queues = VHOST_USER_QUEUES_MAX,
		.max_discard_sectors = LANE_RANGE_SECTORS_MAX,
		.max_discard_seg = VIRTIO_RANGES_MAX,
		.discard_sector_alignment = OS_PAGE_BYTES >> VIRTIO_SECTOR_SHIFT,
		.max_write_zeroes_sectors = LANE_RANGE_SECTORS_MAX,
		.max_write_zeroes_seg = VIRTIO_RANGES_MAX,
		.write_zeroes_may_unmap = 1,
	};
}

/* What a front end asks for beyond the structure that we know is zeros. */
static void answer_config(const struct connection *c, const struct vhost_user_message *m,
			  struct reply *reply)
{
	uint8_t config[VHOST_USER_CONFIG_MAX] = { 0 };
	uint32_t head[3] = { m->u.config.offset, m->u.config.bytes, 0 };
	struct virtio_blk_config known;

	fill_config(c->lane->image, &known);
	memcpy(config, &known, sizeof known);
	memcpy(reply->payload, head, sizeof head);
	memcpy(reply->payload + sizeof head, config + m->u.config.offset, m->u.config.bytes);
	reply->bytes = (uint32_t)sizeof head + m->u.config.bytes;
}

static int take_features(struct connection *c, uint64_t features, const char **ret_why)
{
	if (features & ~offered_features(c->lane->image)) {
		*ret_why = "the front end wants features that were not offered";
		return -EINVAL;
	}
	c->features = features;
	for (uint32_t i = 0; !(features & F_PROTOCOL_FEATURES) && i < VHOST_USER_QUEUES_MAX; i++)
		c->queues[i].enabled = true;
	return 0;
}

/* ---- memory table --------------------------------------------------------------------------------- */

static int check_region(const struct memory_region *r, int fd, const char **ret_why)
{
	struct statfs fs;
	struct stat st;

	*ret_why = "guest memory is not in a file";
	if (fstat(fd, &st) || fstatfs(fd, &fs) || !S_ISREG(st.st_mode))
		return -EINVAL;
	*ret_why = "guest memory ends behind its file";
	if (r->offset + r->bytes > (uint64_t)st.st_size)
		return -EINVAL;
	*ret_why =
		"guest memory is in huge pages of hugetlbfs, which cannot be written with write(2): use "
		"memory-backend-memfd without hugetlb";
	return fs.f_type == HUGETLBFS_MAGIC ? -EINVAL : 0;
}

/* Nor is any of it left in slots that wait. */
static void forget_memory(struct connection *c)
{
	(void)window_recycle(c->lane->window);
	for (uint32_t i = 0; i < c->table.count; i++)
		close_fd(&c->fds[i]);
	c->table.count = 0;
}

/* Rings that run go on, where the new table has them. */
static int restart_rings(struct connection *c, const char **ret_why)
{
	int r = 0;

	for (uint32_t i = 0; !r && i < VHOST_USER_QUEUES_MAX; i++) {
		struct virtqueue *v = &c->queues[i];

		if (!v->runs)
			continue;
		virtqueue_stop(v);
		r = virtqueue_start(v, ret_why);
	}
	return r;
}

static int take_region(struct connection *c, const struct memory_region *region, int *fd,
		       const char **ret_why)
{
	int r = check_region(region, *fd, ret_why);

	if (!r)
		r = memory_add(&c->table, region, ret_why);
	if (r)
		return r;
	c->fds[c->table.count - 1] = *fd;
	*fd = -1;
	return 0;
}

static int take_table(struct connection *c, const struct vhost_user_message *m, const char **ret_why)
{
	int r = 0;

	forget_memory(c);
	for (uint32_t i = 0; !r && i < m->u.memory.count; i++)
		r = take_region(c, &m->u.memory.regions[i], &c->message_fd[i], ret_why);
	return r ? r : restart_rings(c, ret_why);
}

static int drop_region(struct connection *c, const struct memory_region *region, const char **ret_why)
{
	uint32_t i;
	int r = memory_remove(&c->table, region, &i);

	*ret_why = "a memory region is to be removed that is not there";
	if (r)
		return r;
	(void)window_recycle(c->lane->window);
	close_fd(&c->fds[i]);
	memmove(&c->fds[i], &c->fds[i + 1], (c->table.count - i) * sizeof c->fds[0]);
	return restart_rings(c, ret_why);
}

/* ---- the record of requests in flight -------------------------------------------------------------- */

static void forget_record(struct connection *c)
{
	for (uint32_t i = 0; i < VHOST_USER_QUEUES_MAX; i++)
		c->queues[i].queue.record = NULL;
	if (c->record)
		os_unguard_view(c->record);
	os_unview_file(c->record, c->record_bytes);
	c->record = NULL;
}

static size_t record_stride(uint16_t queue_size)
{
	return (queue_record_bytes(queue_size) + RECORD_ALIGN - 1) & ~(size_t)(RECORD_ALIGN - 1);
}

static int make_record(const struct vhost_user_message *m, struct reply *reply, const char **ret_why)
{
	uint64_t numbers[2] = { 0 };
	uint16_t counts[2] = { m->u.inflight.queues, m->u.inflight.queue_size };
	size_t bytes = record_stride(counts[1]) * counts[0];

	numbers[0] = (bytes + OS_PAGE_BYTES - 1) & ~(OS_PAGE_BYTES - 1);
	*ret_why = "there is no memory for the record of requests in flight";
	reply->fd = os_memfd_create("latent-in-flight", numbers[0], false);
	if (reply->fd < 0)
		return reply->fd;
	memcpy(reply->payload, numbers, sizeof numbers);
	memcpy(reply->payload + sizeof numbers, counts, sizeof counts);
	reply->bytes = 24; /* with the padding of a C structure */
	memset(reply->payload + 20, 0, 4);
	return 0;
}

static int take_record(struct connection *c, const struct vhost_user_message *m, const char **ret_why)
{
	size_t stride = record_stride(m->u.inflight.queue_size), bytes = stride * m->u.inflight.queues;
	struct stat st;
	int r;

	*ret_why = "the record of requests in flight is not the one that was given out";
	if (m->u.inflight.offset || bytes > m->u.inflight.bytes || fstat(c->message_fd[0], &st) ||
	    (uint64_t)st.st_size < bytes)
		return -EINVAL;
	forget_record(c);
	c->record_bytes = bytes;
	c->record = os_view_file(c->message_fd[0], bytes, true);
	if (!c->record)
		return -ENOMEM;
	r = os_guard_view(c->record, bytes);
	if (r)
		return r;
	c->record_stride = stride;
	c->record_queues = m->u.inflight.queues;
	return 0;
}

/* ---- queues ---------------------------------------------------------------------------------------- */

static void set_size(struct virtqueue *v, uint32_t size)
{
	v->queue.size = (uint16_t)size;
	v->has_size = true;
}

static void set_rings(struct virtqueue *v, const struct vhost_user_message *m)
{
	v->desc_uva = m->u.rings.desc;
	v->used_uva = m->u.rings.used;
	v->avail_uva = m->u.rings.avail;
	v->has_rings = true;
}

/* The message's descriptor, which must not block us, or none. */
static void set_fd(struct connection *c, const struct vhost_user_message *m, int *fd)
{
	close_fd(fd);
	if (!m->fds)
		return;
	*fd = c->message_fd[0];
	c->message_fd[0] = -1;
	fcntl(*fd, F_SETFL, O_NONBLOCK | fcntl(*fd, F_GETFL));
}

static void stop_ring(struct virtqueue *v, const struct vhost_user_message *m, struct reply *reply)
{
	uint32_t state[2] = { m->u.queue.index, 0 };

	virtqueue_stop(v);
	v->broken = false;
	state[1] = v->base;
	memcpy(reply->payload, state, sizeof state);
	reply->bytes = sizeof state;
}

/* ---- messages -------------------------------------------------------------------------------------- */

static void answer(struct reply *reply, uint64_t number)
{
	memcpy(reply->payload, &number, sizeof number);
	reply->bytes = sizeof number;
}

static int handle_queue(struct connection *c, const struct vhost_user_message *m, struct reply *reply,
			const char **ret_why)
{
	struct virtqueue *v = &c->queues[m->u.queue.index]; /* u.rings begins with the index, too */
	bool is_setup =
		m->op == VHU_SET_VRING_NUM || m->op == VHU_SET_VRING_ADDR || m->op == VHU_SET_VRING_BASE;

	if (v->index >= c->queue_end)
		c->queue_end = v->index + 1u;
	if (is_setup && v->runs) { /* a front end that forgot to ask for the base */
		virtqueue_stop(v);
		v->broken = false;
	}
	switch (m->op) {
	case VHU_SET_VRING_NUM:
		set_size(v, m->u.queue.number);
		break;
	case VHU_SET_VRING_ADDR:
		set_rings(v, m);
		break;
	case VHU_SET_VRING_BASE:
		v->base = (uint16_t)m->u.queue.number;
		break;
	case VHU_GET_VRING_BASE:
		stop_ring(v, m, reply);
		return 0;
	case VHU_SET_VRING_KICK:
		virtqueue_unpoll(v);
		set_fd(c, m, &v->kick);
		break;
	case VHU_SET_VRING_CALL:
		set_fd(c, m, &v->call);
		break;
	case VHU_SET_VRING_ERR:
		set_fd(c, m, &v->error);
		break;
	default:
		v->enabled = m->u.queue.number;
		if (!v->enabled)
			virtqueue_stop(v);
	}
	return virtqueue_start(v, ret_why);
}

static int handle(struct connection *c, const struct vhost_user_message *m, struct reply *reply,
		  const char **ret_why)
{
	switch (m->op) {
	case VHU_GET_FEATURES:
		answer(reply, offered_features(c->lane->image));
		return 0;
	case VHU_SET_FEATURES:
		return take_features(c, m->u.number, ret_why);
	case VHU_GET_PROTOCOL_FEATURES:
		answer(reply, PROTOCOL_FEATURES);
		return 0;
	case VHU_SET_PROTOCOL_FEATURES:
		*ret_why = "the front end wants protocol features that were not offered";
		c->protocol_features = m->u.number;
		return m->u.number & ~(uint64_t)PROTOCOL_FEATURES ? -EINVAL : 0;
	case VHU_GET_QUEUE_NUM:
		answer(reply, VHOST_USER_QUEUES_MAX);
		return 0;
	case VHU_GET_MAX_MEM_SLOTS:
		answer(reply, MEMORY_REGIONS_MAX);
		return 0;
	case VHU_SET_OWNER:
	case VHU_RESET_OWNER: /* not used any more; to be ignored */
		return 0;
	case VHU_SET_MEM_TABLE:
		return take_table(c, m, ret_why);
	case VHU_ADD_MEM_REG:
		return take_region(c, &m->u.memory.regions[0], &c->message_fd[0], ret_why);
	case VHU_REM_MEM_REG:
		return drop_region(c, &m->u.memory.regions[0], ret_why);
	case VHU_GET_CONFIG:
		answer_config(c, m, reply);
		return 0;
	case VHU_GET_INFLIGHT_FD:
		return make_record(m, reply, ret_why);
	case VHU_SET_INFLIGHT_FD:
		return take_record(c, m, ret_why);
	case VHU_SET_VRING_NUM:
	case VHU_SET_VRING_ADDR:
	case VHU_SET_VRING_BASE:
	case VHU_GET_VRING_BASE:
	case VHU_SET_VRING_KICK:
	case VHU_SET_VRING_CALL:
	case VHU_SET_VRING_ERR:
	case VHU_SET_VRING_ENABLE:
		return handle_queue(c, m, reply, ret_why);
	default:
		*ret_why = "the front end asks for something that was not offered";
		return -EOPNOTSUPP;
	}
}

static int send_reply(struct connection *c, uint32_t op, struct reply *reply)
{
	uint32_t header[3] = { op, FLAG_VERSION | FLAG_REPLY, reply->bytes };
	struct iovec iov[2] = { { header, sizeof header }, { reply->payload, reply->bytes } };
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	struct msghdr message = { .msg_iov = iov, .msg_iovlen = 2 };
	ssize_t n;

	if (reply->fd >= 0) {
		message.msg_control = &control;
		message.msg_controllen = sizeof control;
		control.align = (struct cmsghdr){ CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS };
		memcpy(CMSG_DATA(&control.align), &reply->fd, sizeof(int));
	}
	n = sendmsg(c->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
	close_fd(&reply->fd);
	return n == (ssize_t)(sizeof header + reply->bytes) ? 0 : -EPIPE;
}

static void forget_message(struct connection *c)
{
	for (uint32_t i = 0; i < c->message_fds; i++)
		close_fd(&c->message_fd[i]);
	c->message_fds = c->have = 0;
	c->message_waits = false;
}

/* A message that is wrong ends the connection, unless the front end wants to be told. */
static void handle_message(struct connection *c)
{
	struct vhost_user_header header = { 0 };
	struct vhost_user_message m = { 0 };
	struct reply reply = { .fd = -1 };
	const char *why = "a message cannot be understood";
	int r = vhost_user_parse_header(c->header, &header, &why);
	bool acknowledge;

	if (!r)
		r = vhost_user_parse(&header, c->payload, c->message_fds, &m, &why);
	acknowledge = !r && m.wants_ack && c->protocol_features & PROTOCOL_REPLY_ACK;
	if (!r)
		r = handle(c, &m, &reply, &why);
	if (acknowledge && !reply.bytes)
		answer(&reply, r ? 1 : 0);
	forget_message(c);
	if (reply.bytes && send_reply(c, header.op, &reply))
		connection_close(c, "the front end does not take replies");
	else if (r && acknowledge)
		lane_say("a front end is refused: %s", why);
	else if (r)
		connection_close(c, why);
}

/* ---- receiving ------------------------------------------------------------------------------------- */

static void keep_fds(struct connection *c, struct msghdr *message)
{
	for (struct cmsghdr *m = CMSG_FIRSTHDR(message); m; m = CMSG_NXTHDR(message, m)) {
		size_t count = (m->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		for (size_t i = 0;
		     m->cmsg_level == SOL_SOCKET && m->cmsg_type == SCM_RIGHTS && i < count; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(m) + i * sizeof fd, sizeof fd);
			if (c->message_fds < VHOST_USER_FDS_MAX)
				c->message_fd[c->message_fds++] = fd;
			else
				close(fd);
		}
	}
}

/* As many bytes as the message still lacks. 1: it is whole; 0: not yet; -EPIPE: the end, or an error. */
static int receive(struct connection *c, const char **ret_why)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(VHOST_USER_FDS_MAX * sizeof(int))];
	} control;
	struct vhost_user_header header = { 0 };
	bool in_header = c->have < VHOST_USER_HEADER_BYTES;
	uint32_t end = VHOST_USER_HEADER_BYTES;
	struct iovec iov;
	struct msghdr message = { .msg_iov = &iov,
				  .msg_iovlen = 1,
				  .msg_control = &control,
				  .msg_controllen = sizeof control };
	ssize_t n;

	if (!in_header && vhost_user_parse_header(c->header, &header, ret_why))
		return -EPIPE;
	end += header.size;
	if (c->have == end)
		return 1;
	iov.iov_base =
		in_header ? c->header + c->have : c->payload + (c->have - VHOST_USER_HEADER_BYTES);
	iov.iov_len = end - c->have;
	n = recvmsg(c->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	*ret_why = NULL; /* it has ended, as they do */
	if (n <= 0)
		return -EPIPE;
	keep_fds(c, &message);
	c->have += (uint32_t)n;
	return receive(c, ret_why);
}

static void poll_readable(struct connection *c);

static void readable(struct lane *lane, struct event *event, int res)
{
	struct connection *c = (struct connection *)event;
	const char *why = NULL;
	int r;

	(void)lane;
	c->polls = false;
	if (!c->closing) {
		r = res < 0 ? -EPIPE : receive(c, &why);
		c->message_waits = r > 0;
		if (r < 0)
			connection_close(c, why);
	}
	connection_settle(c);
}

static void poll_readable(struct connection *c)
{
	struct io_uring_sqe *sqe = lane_sqe(c->lane);

	c->polls = true;
	io_uring_prep_poll_add(sqe, c->fd, POLLIN);
	io_uring_sqe_set_data(sqe, &c->readable);
}

/* ---- from beginning to end --------------------------------------------------------------------------- */

int connection_new(struct lane *lane, int fd)
{
	struct connection *c = calloc(1, sizeof *c);

	if (!c)
		return -ENOMEM;
	c->fd = fd;
	c->lane = lane;
	c->readable.happened = readable;
	for (uint32_t i = 0; i < VHOST_USER_QUEUES_MAX; i++) {
		struct virtqueue *v = &c->queues[i];

		v->connection = c;
		v->index = (uint16_t)i;
		v->kick = v->call = v->error = -1;
	}
	for (uint32_t i = 0; i < MEMORY_REGIONS_MAX; i++)
		c->fds[i] = -1;
	c->next = lane->connections;
	lane->connections = c;
	poll_readable(c);
	return 0;
}

static bool still_polls(const struct connection *c)
{
	bool polls = c->polls;

	for (uint32_t i = 0; i < VHOST_USER_QUEUES_MAX; i++)
		polls |= c->queues[i].polls;
	return polls;
}

static void end(struct connection *c)
{
	for (uint32_t i = 0; i < VHOST_USER_QUEUES_MAX; i++) {
		struct virtqueue *v = &c->queues[i];

		virtqueue_stop(v);
		close_fd(&v->kick);
		close_fd(&v->call);
		close_fd(&v->error);
	}
	forget_record(c);
	forget_memory(c);
	close(c->fd);
	lane_forget(c->lane, c);
}

void connection_close(struct connection *c, const char *why)
{
	if (c->closing)
		return;
	if (why)
		lane_say("a connection is ended: %s", why);
	c->closing = true;
	forget_message(c);
	if (c->polls)
		lane_cancel(c->lane, &c->readable);
	for (uint32_t i = 0; i < VHOST_USER_QUEUES_MAX; i++)
		virtqueue_unpoll(&c->queues[i]);
}

void connection_settle(struct connection *c)
{
	if (c->under_way)
		return;
	if (c->closing) {
		if (!still_polls(c))
			end(c);
		return;
	}
	if (c->message_waits)
		handle_message(c);
	if (!c->closing && !c->polls)
		poll_readable(c);
	else if (c->closing && !still_polls(c))
		end(c);
}
