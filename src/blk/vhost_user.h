/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * vhost-user messages, as a front end (QEMU, Cloud Hypervisor …) sends them to a block device: the one
 * function that looks at its bytes. Pure: it keeps nothing and reads no socket. Source: QEMU's
 * docs/interop/vhost-user.rst.
 *
 * A message is a header of VHOST_USER_HEADER_BYTES, `size` bytes behind it, and descriptors beside it.
 * Host byte order.
 */
#ifndef LATENT_BLK_VHOST_USER_H
#define LATENT_BLK_VHOST_USER_H

#include "blk/memory.h"

#include <stddef.h>

#define VHOST_USER_HEADER_BYTES 12u
#define VHOST_USER_PAYLOAD_MAX 512u
#define VHOST_USER_FDS_MAX 8u /* beside one message: those of a memory table */
#define VHOST_USER_QUEUES_MAX 64u
#define VHOST_USER_QUEUE_MAX 1024u /* descriptors in a ring */
#define VHOST_USER_CONFIG_MAX 256u

enum vhost_user_op {
	VHU_GET_FEATURES = 1,
	VHU_SET_FEATURES = 2,
	VHU_SET_OWNER = 3,
	VHU_RESET_OWNER = 4,
	VHU_SET_MEM_TABLE = 5,
	VHU_SET_VRING_NUM = 8,
	VHU_SET_VRING_ADDR = 9,
	VHU_SET_VRING_BASE = 10,
	VHU_GET_VRING_BASE = 11,
	VHU_SET_VRING_KICK = 12,
	VHU_SET_VRING_CALL = 13,
	VHU_SET_VRING_ERR = 14,
	VHU_GET_PROTOCOL_FEATURES = 15,
	VHU_SET_PROTOCOL_FEATURES = 16,
	VHU_GET_QUEUE_NUM = 17,
	VHU_SET_VRING_ENABLE = 18,
	VHU_SET_BACKEND_REQ_FD = 21,
	VHU_GET_CONFIG = 24,
	VHU_SET_CONFIG = 25,
	VHU_GET_INFLIGHT_FD = 31,
	VHU_SET_INFLIGHT_FD = 32,
	VHU_RESET_DEVICE = 34,
	VHU_GET_MAX_MEM_SLOTS = 36,
	VHU_ADD_MEM_REG = 37,
	VHU_REM_MEM_REG = 38,
	VHU_SET_STATUS = 39,
	VHU_GET_STATUS = 40,
	VHU_OPS
};

struct vhost_user_header {
	uint32_t op, flags, size;
};

struct vhost_user_message {
	enum vhost_user_op op;
	bool wants_ack; /* the front end waits for a zero or an error, if REPLY_ACK was agreed on */
	uint32_t fds;   /* that belong to it */
	union {
		uint64_t number; /* features, status */
		struct {
			uint32_t index, number; /* less than VHOST_USER_QUEUES_MAX */
		} queue; /* NUM (a power of two), BASE, ENABLE; KICK, CALL, ERR with a descriptor or none
			  */
		struct {
			uint32_t index;
			uint64_t desc, used, avail; /* uva, aligned as virtio wants them */
		} rings;
		struct memory_table memory; /* SET_MEM_TABLE; one region: ADD_MEM_REG, REM_MEM_REG */
		struct {
			uint32_t offset, bytes; /* within VHOST_USER_CONFIG_MAX */
			uint8_t data[VHOST_USER_CONFIG_MAX];
		} config;
		struct {
			uint64_t bytes, offset;
			uint16_t queues,
				queue_size; /* none of them 0, nor beyond what a device may have */
		} inflight;
	} u;
};

/* -EPROTO: not a message of a front end, or too long; `*ret_why` is a sentence. Then the connection is
 * of no use. */
int vhost_user_parse_header(const uint8_t bytes[VHOST_USER_HEADER_BYTES],
			    struct vhost_user_header *ret_header, const char **ret_why);

/*
 * `payload`: header->size bytes; `fds`: how many descriptors came along. -EOPNOTSUPP: an op that this is
 * no device for; -EPROTO, -EINVAL, -ENOSPC: its contents are wrong. `*ret_why`, a sentence, is set with
 * each.
 */
int vhost_user_parse(const struct vhost_user_header *header, const uint8_t *payload, uint32_t fds,
		     struct vhost_user_message *ret_message, const char **ret_why);

#endif
