/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "blk/vhost_user.h"

#include <errno.h>
#include <string.h>

#define FLAG_VERSION_MASK 3u
#define FLAG_VERSION 1u
#define FLAG_REPLY (1u << 2)
#define FLAG_WANTS_ACK (1u << 3)
#define FLAGS_KNOWN (FLAG_VERSION_MASK | FLAG_REPLY | FLAG_WANTS_ACK)
#define NO_FD (1u << 8) /* of KICK, CALL, ERR */
#define INDEX_MASK 0xffu
#define CONFIG_HEADER_BYTES 12u
#define REGION_BYTES 32u

/* What a payload looks like. */
enum shape {
	SHAPE_NONE,
	SHAPE_NUMBER,
	SHAPE_QUEUE,
	SHAPE_QUEUE_FD,
	SHAPE_RINGS,
	SHAPE_MEMORY,
	SHAPE_REGION,
	SHAPE_CONFIG,
	SHAPE_INFLIGHT
};

static const struct op {
	bool known;
	enum shape shape;
	uint8_t fds; /* besides those that SHAPE_QUEUE_FD and SHAPE_MEMORY count themselves */
} ops[VHU_OPS] = {
	[VHU_GET_FEATURES] = { true, SHAPE_NONE, 0 },
	[VHU_SET_FEATURES] = { true, SHAPE_NUMBER, 0 },
	[VHU_SET_OWNER] = { true, SHAPE_NONE, 0 },
	[VHU_RESET_OWNER] = { true, SHAPE_NONE, 0 },
	[VHU_SET_MEM_TABLE] = { true, SHAPE_MEMORY, 0 },
	[VHU_SET_VRING_NUM] = { true, SHAPE_QUEUE, 0 },
	[VHU_SET_VRING_ADDR] = { true, SHAPE_RINGS, 0 },
	[VHU_SET_VRING_BASE] = { true, SHAPE_QUEUE, 0 },
	[VHU_GET_VRING_BASE] = { true, SHAPE_QUEUE, 0 },
	[VHU_SET_VRING_KICK] = { true, SHAPE_QUEUE_FD, 0 },
	[VHU_SET_VRING_CALL] = { true, SHAPE_QUEUE_FD, 0 },
	[VHU_SET_VRING_ERR] = { true, SHAPE_QUEUE_FD, 0 },
	[VHU_GET_PROTOCOL_FEATURES] = { true, SHAPE_NONE, 0 },
	[VHU_SET_PROTOCOL_FEATURES] = { true, SHAPE_NUMBER, 0 },
	[VHU_GET_QUEUE_NUM] = { true, SHAPE_NONE, 0 },
	[VHU_SET_VRING_ENABLE] = { true, SHAPE_QUEUE, 0 },
	[VHU_SET_BACKEND_REQ_FD] = { true, SHAPE_NONE, 1 },
	[VHU_GET_CONFIG] = { true, SHAPE_CONFIG, 0 },
	[VHU_SET_CONFIG] = { true, SHAPE_CONFIG, 0 },
	[VHU_GET_INFLIGHT_FD] = { true, SHAPE_INFLIGHT, 0 },
	[VHU_SET_INFLIGHT_FD] = { true, SHAPE_INFLIGHT, 1 },
	[VHU_RESET_DEVICE] = { true, SHAPE_NONE, 0 },
	[VHU_GET_MAX_MEM_SLOTS] = { true, SHAPE_NONE, 0 },
	[VHU_ADD_MEM_REG] = { true, SHAPE_REGION, 1 },
	[VHU_REM_MEM_REG] = { true, SHAPE_REGION, 0 },
	[VHU_SET_STATUS] = { true, SHAPE_NUMBER, 0 },
	[VHU_GET_STATUS] = { true, SHAPE_NONE, 0 },
};

/* Bytes may lie anywhere. */
static uint32_t get32(const uint8_t *at)
{
	uint32_t n;

	memcpy(&n, at, sizeof n);
	return n;
}

static uint64_t get64(const uint8_t *at)
{
	uint64_t n;

	memcpy(&n, at, sizeof n);
	return n;
}

static int wrong(const char **ret_why, const char *why)
{
	*ret_why = why;
	return -EPROTO;
}

int vhost_user_parse_header(const uint8_t bytes[VHOST_USER_HEADER_BYTES],
			    struct vhost_user_header *ret_header, const char **ret_why)
{
	struct vhost_user_header h = { get32(bytes), get32(bytes + 4), get32(bytes + 8) };

	if ((h.flags & FLAG_VERSION_MASK) != FLAG_VERSION || h.flags & ~FLAGS_KNOWN)
		return wrong(ret_why, "the front end speaks another version of vhost-user");
	if (h.flags & FLAG_REPLY)
		return wrong(ret_why, "the front end sends replies to nothing");
	if (h.size > VHOST_USER_PAYLOAD_MAX)
		return wrong(ret_why, "a message is too long");
	*ret_header = h;
	return 0;
}

/* ---- shapes: each has at least the bytes that it reads ----------------------------------------- */

static int parse_queue(const uint8_t *at, struct vhost_user_message *m, const char **ret_why)
{
	uint32_t n = get32(at + 4);

	m->u.queue.index = get32(at);
	m->u.queue.number = n;
	if (m->u.queue.index >= VHOST_USER_QUEUES_MAX)
		return wrong(ret_why, "there is no queue of that number");
	if (m->op == VHU_SET_VRING_NUM && (!n || n > VHOST_USER_QUEUE_MAX || n & (n - 1)))
		return wrong(ret_why, "the size of a queue is not a power of two up to 1024");
	if (m->op == VHU_SET_VRING_BASE && n > UINT16_MAX)
		return wrong(ret_why, "the position in a queue has more than 16 bits");
	if (m->op == VHU_SET_VRING_ENABLE && n > 1)
		return wrong(ret_why, "a queue is neither enabled nor disabled");
	return 0;
}

static int parse_queue_fd(const uint8_t *at, struct vhost_user_message *m, const char **ret_why)
{
	uint64_t n = get64(at);

	m->u.queue.index = (uint32_t)n & INDEX_MASK;
	m->fds = n & NO_FD ? 0 : 1;
	if (n & ~(uint64_t)(INDEX_MASK | NO_FD) || m->u.queue.index >= VHOST_USER_QUEUES_MAX)
		return wrong(ret_why, "there is no queue of that number");
	return 0;
}

static int parse_rings(const uint8_t *at, struct vhost_user_message *m, const char **ret_why)
{
	m->u.rings.index = get32(at);
	m->u.rings.desc = get64(at + 8);
	m->u.rings.used = get64(at + 16);
	m->u.rings.avail = get64(at + 24);
	if (m->u.rings.index >= VHOST_USER_QUEUES_MAX)
		return wrong(ret_why, "there is no queue of that number");
	if (get32(at + 4))
		return wrong(ret_why, "a queue is to be logged, which is not supported");
	if (m->u.rings.desc % 16 || m->u.rings.used % 4 || m->u.rings.avail % 2)
		return wrong(ret_why, "a ring is not aligned");
	return 0;
}

static int parse_region(const uint8_t *at, struct memory_table *t, const char **ret_why)
{
	const struct memory_region r = { get64(at), get64(at + 8), get64(at + 16), get64(at + 24) };

	return memory_add(t, &r, ret_why);
}

static int parse_memory(const uint8_t *at, uint32_t bytes, struct vhost_user_message *m,
			const char **ret_why)
{
	uint32_t count = get32(at);
	int r = 0;

	if (count > VHOST_USER_FDS_MAX || bytes != 8 + count * REGION_BYTES)
		return wrong(ret_why, "a memory table has not as many regions as it says");
	m->fds = count;
	for (uint32_t i = 0; !r && i < count; i++)
		r = parse_region(at + 8 + i * REGION_BYTES, &m->u.memory, ret_why);
	return r;
}

static int parse_config(const uint8_t *at, uint32_t bytes, struct vhost_user_message *m,
			const char **ret_why)
{
	m->u.config.offset = get32(at);
	m->u.config.bytes = get32(at + 4);
	if (m->u.config.offset > VHOST_USER_CONFIG_MAX ||
	    m->u.config.bytes > VHOST_USER_CONFIG_MAX - m->u.config.offset ||
	    m->u.config.bytes != bytes - CONFIG_HEADER_BYTES)
		return wrong(ret_why, "a part of the configuration is not where it can be");
	memcpy(m->u.config.data, at + CONFIG_HEADER_BYTES, m->u.config.bytes);
	return 0;
}

static int parse_inflight(const uint8_t *at, struct vhost_user_message *m, const char **ret_why)
{
	uint16_t counts[2];
	uint64_t end;

	m->u.inflight.bytes = get64(at);
	m->u.inflight.offset = get64(at + 8);
	memcpy(counts, at + 16, sizeof counts);
	m->u.inflight.queues = counts[0];
	m->u.inflight.queue_size = counts[1];
	if (!counts[0] || counts[0] > VHOST_USER_QUEUES_MAX || !counts[1] ||
	    counts[1] > VHOST_USER_QUEUE_MAX)
		return wrong(ret_why,
			     "requests in flight are of more queues than there are, or of longer ones");
	if (__builtin_add_overflow(m->u.inflight.bytes, m->u.inflight.offset, &end) || end > INT64_MAX)
		return wrong(ret_why, "the record of requests in flight ends behind all files");
	return 0;
}

static int check_size(enum shape shape, uint32_t bytes, const char **ret_why)
{
	static const struct {
		uint32_t least, most;
	} sizes[] = {
		[SHAPE_NONE] = { 0, VHOST_USER_PAYLOAD_MAX }, /* some send a number of no meaning */
		[SHAPE_NUMBER] = { 8, 8 },
		[SHAPE_QUEUE] = { 8, 8 },
		[SHAPE_QUEUE_FD] = { 8, 8 },
		[SHAPE_RINGS] = { 40, 40 },
		[SHAPE_MEMORY] = { 8, 8 + VHOST_USER_FDS_MAX * REGION_BYTES },
		[SHAPE_REGION] = { 8 + REGION_BYTES, 8 + REGION_BYTES }, /* behind 8 bytes of padding */
		[SHAPE_CONFIG] = { CONFIG_HEADER_BYTES, CONFIG_HEADER_BYTES + VHOST_USER_CONFIG_MAX },
		[SHAPE_INFLIGHT] = { 20, 24 }, /* 24: with the padding of a C structure */
	};

	if (bytes < sizes[shape].least || bytes > sizes[shape].most)
		return wrong(ret_why, "a message has not the length that its kind has");
	return 0;
}

static int parse_shape(enum shape shape, const uint8_t *at, uint32_t bytes, struct vhost_user_message *m,
		       const char **ret_why)
{
	switch (shape) {
	case SHAPE_NONE:
		return 0;
	case SHAPE_NUMBER:
		m->u.number = get64(at);
		return 0;
	case SHAPE_QUEUE:
		return parse_queue(at, m, ret_why);
	case SHAPE_QUEUE_FD:
		return parse_queue_fd(at, m, ret_why);
	case SHAPE_RINGS:
		return parse_rings(at, m, ret_why);
	case SHAPE_MEMORY:
		return parse_memory(at, bytes, m, ret_why);
	case SHAPE_REGION:
		return parse_region(at + 8, &m->u.memory, ret_why);
	case SHAPE_CONFIG:
		return parse_config(at, bytes, m, ret_why);
	case SHAPE_INFLIGHT:
		return parse_inflight(at, m, ret_why);
	}
	return -EPROTO;
}

/* QEMU sends the descriptor of a region along when it takes it away, too; nobody needs it. */
static bool is_right_number_of_fds(const struct vhost_user_message *m, uint32_t fds)
{
	return fds == m->fds || (m->op == VHU_REM_MEM_REG && fds == 1);
}

int vhost_user_parse(const struct vhost_user_header *h, const uint8_t *payload, uint32_t fds,
		     struct vhost_user_message *ret_message, const char **ret_why)
{
	struct vhost_user_message m = { .wants_ack = h->flags & FLAG_WANTS_ACK };
	int r;

	if (h->op >= VHU_OPS || !ops[h->op].known) {
		*ret_why = "the front end asks for something that this device does not have";
		return -EOPNOTSUPP;
	}
	m.op = (enum vhost_user_op)h->op;
	m.fds = ops[m.op].fds;
	r = check_size(ops[m.op].shape, h->size, ret_why);
	if (!r)
		r = parse_shape(ops[m.op].shape, payload, h->size, &m, ret_why);
	if (!r && !is_right_number_of_fds(&m, fds))
		r = wrong(ret_why, "a message has not as many descriptors as its kind has");
	if (!r)
		*ret_message = m;
	return r;
}
