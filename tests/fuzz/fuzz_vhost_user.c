/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/*
 * Messages of a hostile front end. What is believed of one is within bounds: queues, rings, parts of the
 * configuration; regions of memory that overlap nowhere, and whose every byte is found where it is, and
 * nowhere else.
 *
 * Input: the number of descriptors beside the message (1 byte), its header (12 bytes), what is behind
 * it.
 */
#include "fuzz.h"

#include "blk/vhost_user.h"
#include "os/os.h"

#include <errno.h>
#include <string.h>

static const struct fuzz_token tokens[] = {
	FUZZ_TEXT("\xff\xff\xff\xff\xff\xff\xff\xff"),
	FUZZ_TEXT("\xff\xff\xff\xff\xff\xff\xff\x7f"),
	FUZZ_TEXT("\x00\xf0\xff\xff\xff\xff\xff\x7f"), /* the last page */
	FUZZ_TEXT("\x00\x10\x00\x00\x00\x00\x00\x00"),
	FUZZ_TEXT("\x01\x00\x00\x00\x28\x00\x00\x00"), /* a version, a length */
	FUZZ_TEXT("\x09\x00\x00\x00\x08\x00\x00\x00"),
	{ NULL, 0 },
};

const struct fuzz_target fuzz_target = { "vhost_user", 1024, tokens, false };

static void check_region(const struct memory_table *t, uint32_t i)
{
	const struct memory_region *r = &t->regions[i];
	const uint64_t places[] = { 0, 1, r->bytes / 2, r->bytes - 1 };
	uint32_t index;
	uint64_t offset, n;

	fuzz_require(r->bytes && !((r->gpa | r->bytes | r->uva | r->offset) % OS_PAGE_BYTES));
	fuzz_require(r->gpa + r->bytes > r->gpa && r->uva + r->bytes > r->uva &&
		     r->offset + r->bytes > r->offset);
	for (int k = 0; k < 4; k++) {
		n = memory_find(t, r->gpa + places[k], UINT64_MAX, &index, &offset);
		fuzz_require(n == r->bytes - places[k] && index == i && offset == r->offset + places[k]);
		fuzz_require(memory_find(t, r->gpa + places[k], 1, &index, &offset) == 1 && index == i);
		fuzz_require(memory_find_uva(t, r->uva + places[k], n, &index, &offset) && index == i);
		fuzz_require(offset == r->offset + places[k]);
		fuzz_require(!memory_find_uva(t, r->uva + places[k], n + 1, &index, &offset));
		fuzz_require(!memory_find_uva(t, r->uva + places[k], UINT64_MAX, &index, &offset));
	}
	/* Behind it is another one, or nothing. */
	n = memory_find(t, r->gpa + r->bytes, 1, &index, &offset);
	fuzz_require(!n || (index != i && t->regions[index].gpa == r->gpa + r->bytes));
}

static void check_memory(struct memory_table *t)
{
	uint32_t index;

	for (uint32_t i = 0; i < t->count; i++)
		check_region(t, i);
	while (t->count) {
		const struct memory_region last = t->regions[t->count - 1];

		fuzz_require(!memory_remove(t, &last, &index) && index == t->count);
		fuzz_require(memory_remove(t, &last, &index) == -ENOENT);
	}
}

static void check_message(struct vhost_user_message *m)
{
	switch (m->op) {
	case VHU_SET_VRING_NUM:
		fuzz_require(m->u.queue.number && m->u.queue.number <= VHOST_USER_QUEUE_MAX);
		fuzz_require(!(m->u.queue.number & (m->u.queue.number - 1)) &&
			     m->u.queue.index < VHOST_USER_QUEUES_MAX);
		break;
	case VHU_SET_VRING_BASE:
	case VHU_GET_VRING_BASE:
	case VHU_SET_VRING_ENABLE:
	case VHU_SET_VRING_KICK:
	case VHU_SET_VRING_CALL:
	case VHU_SET_VRING_ERR:
		fuzz_require(m->u.queue.index < VHOST_USER_QUEUES_MAX);
		break;
	case VHU_SET_VRING_ADDR:
		fuzz_require(m->u.rings.index < VHOST_USER_QUEUES_MAX && m->u.rings.desc % 16 == 0);
		break;
	case VHU_SET_MEM_TABLE:
		fuzz_require(m->fds == m->u.memory.count && m->fds <= VHOST_USER_FDS_MAX);
		check_memory(&m->u.memory);
		break;
	case VHU_ADD_MEM_REG:
	case VHU_REM_MEM_REG:
		fuzz_require(m->u.memory.count == 1);
		check_memory(&m->u.memory);
		break;
	case VHU_GET_CONFIG:
	case VHU_SET_CONFIG:
		fuzz_require((uint64_t)m->u.config.offset + m->u.config.bytes <= VHOST_USER_CONFIG_MAX);
		break;
	case VHU_GET_INFLIGHT_FD:
	case VHU_SET_INFLIGHT_FD:
		fuzz_require(m->u.inflight.queues && m->u.inflight.queues <= VHOST_USER_QUEUES_MAX);
		fuzz_require(m->u.inflight.queue_size &&
			     m->u.inflight.queue_size <= VHOST_USER_QUEUE_MAX);
		fuzz_require(m->u.inflight.bytes + m->u.inflight.offset >= m->u.inflight.bytes);
		break;
	default:
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	static uint8_t payload[VHOST_USER_PAYLOAD_MAX];
	static struct vhost_user_message m;
	struct fuzz_reader in = { data, data + bytes };
	uint8_t header_bytes[VHOST_USER_HEADER_BYTES];
	struct vhost_user_header header;
	const char *why = NULL;
	uint32_t fds = fuzz_byte(&in);
	int r;

	for (size_t i = 0; i < sizeof header_bytes; i++)
		header_bytes[i] = fuzz_byte(&in);
	r = vhost_user_parse_header(header_bytes, &header, &why);
	fuzz_require(!r == !why && (!r || r == -EPROTO));
	if (r)
		return 0;
	fuzz_require(header.size <= VHOST_USER_PAYLOAD_MAX);
	for (size_t i = 0; i < header.size; i++)
		payload[i] = fuzz_byte(&in);
	memset(&m, 0xee, sizeof m);
	r = vhost_user_parse(&header, payload, fds, &m, &why);
	fuzz_require(!r == !why);
	if (r) {
		fuzz_require(((uint8_t *)&m)[0] == 0xee && ((uint8_t *)&m)[sizeof m - 1] == 0xee);
		return 0;
	}
	fuzz_require(m.op == header.op && m.fds <= VHOST_USER_FDS_MAX);
	check_message(&m);
	return 0;
}
