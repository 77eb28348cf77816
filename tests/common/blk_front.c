/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "blk_front.h"

#include "blk/vhost_user.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define QUEUE_BYTES (16u << 10) /* rings of a queue, from gpa 0 on */
#define TABLES (1u << 20)       /* gpa of indirect tables, headers and statuses */
#define TABLE_BYTES 1024u       /* of one request */
#define HEADER_AT 768u          /* in it */
#define STATUS_AT 800u
#define CONFIG_BYTES 60u                              /* as far as QEMU 7.2 knows it */
#define PROTOCOL_KNOWN (1u << 0 | 1u << 9 | 1u << 12) /* queues, configuration, requests in flight */
/* Indirect tables, event index, vhost-user's protocol features, VIRTIO 1, and what is the disk's. */
#define FEATURES_KNOWN (1ull << 28 | 1ull << 29 | 1ull << 30 | 1ull << 32 | 0x7fff)

static uint64_t table_gpa(uint32_t queue, uint16_t head)
{
	return TABLES + (queue * FRONT_QUEUE_SIZE + head) * TABLE_BYTES;
}

/* ---- RAM and rings ----------------------------------------------------------------------------------- */

static void place_queue(struct front *f, uint32_t i)
{
	struct front_queue *q = &f->queue[i];
	uint8_t *at = f->ram + i * QUEUE_BYTES;

	q->desc = (struct vring_desc *)at;
	q->avail = (struct vring_avail *)(at + (4u << 10));
	q->used = (struct vring_used *)(at + (8u << 10));
	q->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	q->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

int front_init(struct front *f, uint64_t ram_bytes, uint32_t queues)
{
	*f = (struct front){ .fd = -1, .record_fd = -1, .ram_bytes = ram_bytes, .queues = queues };
	f->ram_fd = memfd_create("front-ram", MFD_CLOEXEC);
	if (f->ram_fd < 0 || ftruncate(f->ram_fd, (off_t)ram_bytes))
		return -errno;
	f->ram = mmap(NULL, ram_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, f->ram_fd, 0);
	if (f->ram == MAP_FAILED)
		return -errno;
	for (uint32_t i = 0; i < queues; i++)
		place_queue(f, i);
	return 0;
}

void front_disconnect(struct front *f)
{
	if (f->fd >= 0)
		close(f->fd);
	f->fd = -1;
}

void front_free(struct front *f)
{
	front_disconnect(f);
	for (uint32_t i = 0; i < f->queues; i++) {
		close(f->queue[i].kick);
		close(f->queue[i].call);
	}
	if (f->record_fd >= 0)
		close(f->record_fd);
	munmap(f->ram, f->ram_bytes);
	close(f->ram_fd);
}

/* ---- messages ------------------------------------------------------------------------------------------ */

int front_send(struct front *f, uint32_t op, const void *payload, uint32_t bytes, int fd)
{
	uint32_t header[3] = { op, 1, bytes };
	struct iovec iov[2] = { { header, sizeof header }, { (void *)payload, bytes } };
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = { .align = { CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS } };
	struct msghdr message = { .msg_iov = iov, .msg_iovlen = 2 };

	if (fd >= 0) {
		memcpy(CMSG_DATA(&control.align), &fd, sizeof fd);
		message.msg_control = &control;
		message.msg_controllen = sizeof control;
	}
	return sendmsg(f->fd, &message, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

int front_receive(struct front *f, void *reply, uint32_t reply_bytes, int *ret_fd)
{
	uint8_t bytes[VHOST_USER_HEADER_BYTES + VHOST_USER_PAYLOAD_MAX];
	struct iovec iov = { bytes, VHOST_USER_HEADER_BYTES + reply_bytes };
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	struct msghdr message = { .msg_iov = &iov,
				  .msg_iovlen = 1,
				  .msg_control = &control,
				  .msg_controllen = sizeof control };
	ssize_t n = recvmsg(f->fd, &message, MSG_WAITALL | MSG_CMSG_CLOEXEC);

	if (n != (ssize_t)iov.iov_len)
		return n < 0 ? -errno : -EPIPE;
	memcpy(reply, bytes + VHOST_USER_HEADER_BYTES, reply_bytes);
	if (ret_fd && CMSG_FIRSTHDR(&message))
		memcpy(ret_fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof *ret_fd);
	return 0;
}

static int get64(struct front *f, uint32_t op, uint64_t *ret)
{
	int r = front_send(f, op, NULL, 0, -1);

	return r ? r : front_receive(f, ret, sizeof *ret, NULL);
}

static int set64(struct front *f, uint32_t op, uint64_t number)
{
	return front_send(f, op, &number, sizeof number, -1);
}

static int agree(struct front *f)
{
	uint8_t config[12 + CONFIG_BYTES] = { 0 };
	uint32_t bytes = CONFIG_BYTES;
	uint64_t protocol;
	int r = get64(f, VHU_GET_FEATURES, &f->features);

	if (!r)
		r = get64(f, VHU_GET_PROTOCOL_FEATURES, &protocol);
	if (!r)
		r = set64(f, VHU_SET_PROTOCOL_FEATURES, protocol & PROTOCOL_KNOWN);
	if (!r)
		r = front_send(f, VHU_SET_OWNER, NULL, 0, -1);
	memcpy(config + 4, &bytes, sizeof bytes);
	if (!r)
		r = front_send(f, VHU_GET_CONFIG, config, sizeof config, -1);
	if (!r)
		r = front_receive(f, config, sizeof config, NULL);
	memcpy(&f->config, config + 12, CONFIG_BYTES);
	f->features &= FEATURES_KNOWN;
	return r ? r : set64(f, VHU_SET_FEATURES, f->features);
}

static int give_memory(struct front *f)
{
	uint64_t table[5] = { 1, 0, f->ram_bytes, FRONT_UVA, 0 };

	return front_send(f, VHU_SET_MEM_TABLE, table, sizeof table, f->ram_fd);
}

static int give_record(struct front *f)
{
	struct {
		uint64_t bytes, offset;
		uint16_t queues, size;
		uint32_t padding;
	} m = { f->record_bytes, 0, (uint16_t)f->queues, FRONT_QUEUE_SIZE, 0 };
	int r = 0;

	if (f->record_fd < 0) {
		r = front_send(f, VHU_GET_INFLIGHT_FD, &m, sizeof m, -1);
		if (!r)
			r = front_receive(f, &m, sizeof m, &f->record_fd);
		f->record_bytes = m.bytes;
	}
	return r ? r : front_send(f, VHU_SET_INFLIGHT_FD, &m, sizeof m, f->record_fd);
}

static int start_queue(struct front *f, uint32_t i)
{
	struct front_queue *q = &f->queue[i];
	uint32_t pair[2] = { i, FRONT_QUEUE_SIZE };
	uint64_t at = FRONT_UVA + i * QUEUE_BYTES,
		 rings[5] = { i, at, at + (8u << 10), at + (4u << 10), 0 };
	int r = front_send(f, VHU_SET_VRING_NUM, pair, sizeof pair, -1);

	pair[1] = q->used->idx; /* as QEMU does for a back end that has died */
	if (!r)
		r = front_send(f, VHU_SET_VRING_BASE, pair, sizeof pair, -1);
	if (!r)
		r = front_send(f, VHU_SET_VRING_ADDR, rings, sizeof rings, -1);
	if (!r)
		r = front_send(f, VHU_SET_VRING_KICK, &rings[0], sizeof rings[0], q->kick);
	if (!r)
		r = front_send(f, VHU_SET_VRING_CALL, &rings[0], sizeof rings[0], q->call);
	pair[1] = 1;
	return r ? r : front_send(f, VHU_SET_VRING_ENABLE, pair, sizeof pair, -1);
}

int front_connect(struct front *f, const char *path, bool with_record)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	int r;

	snprintf(at.sun_path, sizeof at.sun_path, "%s", path);
	f->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (f->fd < 0 || connect(f->fd, (struct sockaddr *)&at, sizeof at))
		return -errno;
	r = agree(f);
	if (!r)
		r = give_memory(f);
	if (!r && with_record)
		r = give_record(f);
	for (uint32_t i = 0; !r && i < f->queues; i++)
		r = start_queue(f, i);
	return r;
}

/* ---- requests -------------------------------------------------------------------------------------------- */

uint8_t *front_status(struct front *f, uint32_t queue, uint16_t head)
{
	return f->ram + table_gpa(queue, head) + STATUS_AT;
}

void front_request(struct front *f, uint32_t queue, uint16_t head, uint32_t type, uint64_t sector,
		   const struct front_segment *segments, uint32_t count)
{
	bool writes_guest = type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID;
	uint64_t gpa = table_gpa(queue, head);
	struct vring_desc *table = (struct vring_desc *)(f->ram + gpa);
	struct virtio_blk_outhdr header = { .type = type, .sector = sector };

	memcpy(f->ram + gpa + HEADER_AT, &header, sizeof header);
	*front_status(f, queue, head) = 0xff;
	table[0] = (struct vring_desc){ gpa + HEADER_AT, sizeof header, VRING_DESC_F_NEXT, 1 };
	for (uint16_t i = 0; i < count; i++)
		table[1 + i] =
			(struct vring_desc){ segments[i].gpa, segments[i].bytes,
					     VRING_DESC_F_NEXT | (writes_guest ? VRING_DESC_F_WRITE : 0),
					     (uint16_t)(i + 2) };
	table[1 + count] = (struct vring_desc){ gpa + STATUS_AT, 1, VRING_DESC_F_WRITE, 0 };
	f->queue[queue].desc[head] = (struct vring_desc){ gpa, (count + 2) * (uint32_t)sizeof *table,
							  VRING_DESC_F_INDIRECT, 0 };
}

void front_offer(struct front *f, uint32_t queue, uint16_t head)
{
	struct front_queue *q = &f->queue[queue];

	q->avail->ring[q->next % FRONT_QUEUE_SIZE] = head;
	__atomic_store_n(&q->avail->idx, ++q->next, __ATOMIC_RELEASE);
}

void front_kick(struct front *f, uint32_t queue)
{
	struct front_queue *q = &f->queue[queue];
	uint64_t one = 1;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (write(q->kick, &one, sizeof one) < 0)
		return; /* it has been kicked already */
}

static bool is_given_back(const struct front_queue *q)
{
	return __atomic_load_n(&q->used->idx, __ATOMIC_ACQUIRE) != q->seen;
}

/* It asks to be told of the next one, looks again, and sleeps. */
static void sleep_for(struct front_queue *q, int timeout_ms)
{
	struct pollfd polled = { q->call, POLLIN, 0 };
	uint64_t calls;

	q->avail->ring[FRONT_QUEUE_SIZE] = q->seen;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!is_given_back(q) && poll(&polled, 1, timeout_ms) > 0 &&
	    read(q->call, &calls, sizeof calls) < 0)
		return;
}

int front_wait(struct front *f, uint32_t queue, int timeout_ms, uint16_t *ret_head,
	       uint32_t *ret_written)
{
	struct front_queue *q = &f->queue[queue];
	struct vring_used_elem *e;

	for (int ms = 0; !is_given_back(q); ms += 100) {
		if (ms >= timeout_ms)
			return -ETIMEDOUT;
		sleep_for(q, 100);
	}
	e = &q->used->ring[q->seen++ % FRONT_QUEUE_SIZE];
	*ret_head = (uint16_t)e->id;
	if (ret_written)
		*ret_written = e->len;
	return 0;
}

int front_do(struct front *f, uint32_t queue, uint32_t type, uint64_t sector,
	     const struct front_segment *segments, uint32_t count)
{
	uint16_t head;
	int r;

	front_request(f, queue, 0, type, sector, segments, count);
	front_offer(f, queue, 0);
	front_kick(f, queue);
	r = front_wait(f, queue, 20000, &head, NULL);
	return r ? r : *front_status(f, queue, 0);
}
