/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* The parsers of the block backend: what front ends and drivers send, and what must be refused. */
#include "blk/vhost_user.h"
#include "blk/virtio.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <string.h>

#define PAGE 4096u
#define QUEUE 16u

/* ---- guest memory ----------------------------------------------------------------------------- */

static void an_address_is_found_in_its_region(void **state)
{
	/* As a PC has it: beneath and above the hole. Neighbours in the guest, not in files. */
	static const struct memory_region regions[] = {
		{ 0, 16 * PAGE, 0x7f0000000000, 0 },
		{ 16 * PAGE, 4 * PAGE, 0x7f1000000000, 64 * PAGE },
		{ 1ull << 32, 8 * PAGE, 0x7f0000010000, 16 * PAGE },
	};
	struct memory_table t = { 0 };
	const char *why = NULL;
	uint64_t offset;
	uint32_t index;

	(void)state;
	for (int i = 0; i < 3; i++)
		assert_int_equal(memory_add(&t, &regions[i], &why), 0);
	assert_int_equal(memory_find(&t, 5, 100, &index, &offset), 100);
	assert_true(index == 0 && offset == 5);
	assert_int_equal(memory_find(&t, 15 * PAGE + 1, 3 * PAGE, &index, &offset),
			 PAGE - 1); /* up to its end */
	assert_int_equal(memory_find(&t, 16 * PAGE, PAGE, &index, &offset), PAGE);
	assert_true(index == 1 && offset == 64 * PAGE);
	assert_int_equal(memory_find(&t, 20 * PAGE, 1, &index, &offset), 0);
	assert_int_equal(memory_find(&t, UINT64_MAX, 1, &index, &offset), 0);
	assert_int_equal(memory_find(&t, (1ull << 32) + 10, UINT64_MAX, &index, &offset), 8 * PAGE - 10);
	assert_true(memory_find_uva(&t, 0x7f0000010000 + 3, 8 * PAGE - 3, &index, &offset));
	assert_true(index == 2 && offset == 16 * PAGE + 3);
	assert_false(memory_find_uva(&t, 0x7f0000010000 + 3, 8 * PAGE - 2, &index, &offset));
	assert_int_equal(memory_remove(&t, &regions[1], &index), 0);
	assert_int_equal(memory_find(&t, 16 * PAGE, PAGE, &index, &offset), 0);
	assert_int_equal(memory_find(&t, 1ull << 32, 1, &index, &offset), 1);
	assert_int_equal(index, 1);
	assert_int_equal(memory_remove(&t, &regions[1], &index), -ENOENT);
}

static void a_wrong_region_is_refused(void **state)
{
	static const struct memory_region first = { 16 * PAGE, 16 * PAGE, 1 << 30, 0 };
	static const struct memory_region wrong[] = {
		{ PAGE, 0, PAGE, 0 },
		{ 1, PAGE, PAGE, 0 },
		{ 0, PAGE, PAGE, 7 },
		{ 31 * PAGE, 2 * PAGE, 2u << 30, 0 },  /* overlaps for the guest */
		{ 0, PAGE, (1 << 30) + 15 * PAGE, 0 }, /* overlaps for the front end */
		{ UINT64_MAX - PAGE + 1, PAGE, PAGE, 0 },
		{ 0, UINT64_MAX - PAGE + 1, PAGE, 0 },
		{ 0, PAGE, PAGE, (uint64_t)INT64_MAX + 1 - PAGE + PAGE },
	};
	struct memory_table t = { 0 };
	const char *why = NULL;

	(void)state;
	assert_int_equal(memory_add(&t, &first, &why), 0);
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		why = NULL;
		assert_int_equal(memory_add(&t, &wrong[i], &why), -EINVAL);
		assert_non_null(why);
	}
	for (uint64_t i = 1; i < MEMORY_REGIONS_MAX; i++) {
		const struct memory_region r = { (100 + i) * PAGE, PAGE, (100 + i) * PAGE, 0 };

		assert_int_equal(memory_add(&t, &r, &why), 0);
	}
	assert_int_equal(memory_add(&t, &(struct memory_region){ 0, PAGE, PAGE, 0 }, &why), -ENOSPC);
}

/* ---- vhost-user ------------------------------------------------------------------------------- */

static struct vhost_user_message message;
static const char *why_not;

static int parse(uint32_t op, uint32_t flags, const void *payload, uint32_t bytes, uint32_t fds)
{
	const uint32_t words[] = { op, flags, bytes };
	uint8_t raw[VHOST_USER_HEADER_BYTES];
	struct vhost_user_header header;
	int r;

	memcpy(raw, words, sizeof raw);
	why_not = NULL;
	r = vhost_user_parse_header(raw, &header, &why_not);
	if (!r)
		r = vhost_user_parse(&header, payload, fds, &message, &why_not);
	assert_true(!r == !why_not);
	return r;
}

static void messages_of_front_ends_are_understood(void **state)
{
	static const uint64_t features = 0x140000000;
	static const uint32_t num[] = { 3, 256 };
	static const uint64_t kick = 2, no_call = 1 | 1 << 8;
	static const uint64_t memory[] = { 2,        0,        0xa0000,        0x7f0000000000, 0,
					   0x100000, 0x700000, 0x7f0000100000, 0x100000 };
	static const uint64_t region[] = { 0, 1ull << 32, 1 << 20, 0x7f1000000000, 4 * PAGE };
	static const uint32_t config[3 + 60 / 4] = { 0, 60, 0 };
	static const struct {
		uint64_t bytes, offset;
		uint16_t queues, size;
		uint32_t padding;
	} inflight = { 8192, 0, 4, 128, 0 };

	(void)state;
	assert_int_equal(parse(VHU_GET_FEATURES, 1, NULL, 0, 0), 0);
	assert_int_equal(parse(VHU_SET_FEATURES, 1 | 8, &features, 8, 0), 0);
	assert_true(message.u.number == features && message.wants_ack);
	assert_int_equal(parse(VHU_SET_VRING_NUM, 1, num, 8, 0), 0);
	assert_true(message.u.queue.index == 3 && message.u.queue.number == 256 && !message.wants_ack);
	assert_int_equal(parse(VHU_SET_VRING_KICK, 1, &kick, 8, 1), 0);
	assert_true(message.u.queue.index == 2 && message.fds == 1);
	assert_int_equal(parse(VHU_SET_VRING_CALL, 1, &no_call, 8, 0), 0);
	assert_true(message.u.queue.index == 1 && message.fds == 0);
	assert_int_equal(parse(VHU_SET_MEM_TABLE, 1, memory, sizeof memory, 2), 0);
	assert_true(message.u.memory.count == 2 && message.u.memory.regions[1].offset == 0x100000);
	assert_int_equal(parse(VHU_ADD_MEM_REG, 1, region, sizeof region, 1), 0);
	assert_true(message.u.memory.count == 1 && message.u.memory.regions[0].gpa == 1ull << 32);
	assert_int_equal(parse(VHU_REM_MEM_REG, 1, region, sizeof region, 0), 0);
	assert_int_equal(parse(VHU_REM_MEM_REG, 1, region, sizeof region, 1), 0);
	assert_int_equal(parse(VHU_GET_CONFIG, 1, config, 72, 0), 0);
	assert_int_equal(message.u.config.bytes, 60);
	assert_int_equal(parse(VHU_SET_INFLIGHT_FD, 1, &inflight, sizeof inflight, 1), 0);
	assert_true(message.u.inflight.queues == 4 && message.u.inflight.queue_size == 128);
}

static void wrong_messages_are_refused(void **state)
{
	static const uint32_t num_odd[] = { 0, 100 }, num_queue[] = { 64, 128 }, num_none[] = { 0, 0 };
	static const uint64_t kick = 64, kick_flags = 1ull << 40, region[] = { 0, 0, 0, 0, 0 };
	static const uint64_t memory[] = { 9, 0, 0xa0000, 0x7f0000000000, 0 };
	static const uint32_t config[] = { 200, 100, 0 }, config_wrap[] = { UINT32_MAX, 2, 0 };
	static const uint64_t rings[] = { 0, 8, 0, 0, 0 }, logged[] = { 1ull << 32, 0, 0, 0, 0 };
	static const uint64_t inflight[] = { UINT64_MAX, 1, 1 | 1 << 16 };

	(void)state;
	assert_int_equal(parse(VHU_GET_FEATURES, 2, NULL, 0, 0), -EPROTO);
	assert_int_equal(parse(VHU_GET_FEATURES, 1 | 4, NULL, 0, 0), -EPROTO);
	assert_int_equal(parse(VHU_GET_FEATURES, 1, NULL, VHOST_USER_PAYLOAD_MAX + 1, 0), -EPROTO);
	assert_int_equal(parse(VHU_GET_FEATURES, 1, NULL, 0, 1), -EPROTO);
	assert_int_equal(parse(0, 1, NULL, 0, 0), -EOPNOTSUPP);
	assert_int_equal(parse(VHU_OPS, 1, NULL, 0, 0), -EOPNOTSUPP);
	assert_int_equal(parse(UINT32_MAX, 1, NULL, 0, 0), -EOPNOTSUPP);
	assert_int_equal(parse(VHU_SET_VRING_NUM, 1, num_odd, 8, 0), -EPROTO);
	assert_int_equal(parse(VHU_SET_VRING_NUM, 1, num_none, 8, 0), -EPROTO);
	assert_int_equal(parse(VHU_SET_VRING_NUM, 1, num_queue, 8, 0), -EPROTO);
	assert_int_equal(parse(VHU_SET_VRING_NUM, 1, num_queue, 4, 0), -EPROTO);
	assert_int_equal(parse(VHU_SET_VRING_KICK, 1, &kick, 8, 1), -EPROTO);
	assert_int_equal(parse(VHU_SET_VRING_KICK, 1, &kick_flags, 8, 1), -EPROTO);
	assert_int_equal(parse(VHU_SET_MEM_TABLE, 1, memory, sizeof memory, 1), -EPROTO);
	assert_int_equal(parse(VHU_ADD_MEM_REG, 1, region, sizeof region, 1), -EINVAL);
	assert_int_equal(parse(VHU_GET_CONFIG, 1, config, 112, 0), -EPROTO);
	assert_int_equal(parse(VHU_GET_CONFIG, 1, config_wrap, 14, 0), -EPROTO);
	assert_int_equal(parse(VHU_SET_VRING_ADDR, 1, rings, sizeof rings, 0), -EPROTO);
	assert_int_equal(parse(VHU_SET_VRING_ADDR, 1, logged, sizeof logged, 0), -EPROTO);
	assert_int_equal(parse(VHU_SET_INFLIGHT_FD, 1, inflight, sizeof inflight, 1), -EPROTO);
}

/* ---- virtio ----------------------------------------------------------------------------------- */

/* Two pages: the table of a queue, an indirect one behind it; headers in the second page. */
static union {
	uint8_t bytes[2 * PAGE];
	struct vring_desc table[2 * PAGE / sizeof(struct vring_desc)];
} guest;

#define HEADER_GPA (PAGE + 0u)
#define RANGES_GPA (PAGE + 256u)

static int read_guest(void *ctx, uint64_t gpa, void *to, size_t bytes)
{
	(void)ctx;
	if (gpa > sizeof guest.bytes || bytes > sizeof guest.bytes - gpa)
		return -EFAULT;
	memcpy(to, guest.bytes + gpa, bytes);
	return 0;
}

static const struct virtio_memory memory = { read_guest, NULL };
static const struct virtio_disk disk = {
	.sectors = 1000, .discard = true, .write_zeroes = true, .range_sectors_max = 500
};
static struct virtio_chain chain;
static struct virtio_blk_request request;

static void put(uint32_t at, uint64_t gpa, uint32_t bytes, uint16_t flags, uint16_t next)
{
	guest.table[at] = (struct vring_desc){ gpa, bytes, flags, next };
}

static void put_header(uint32_t type, uint64_t sector)
{
	const struct virtio_blk_outhdr header = { type, 0, sector };

	memset(&guest, 0, sizeof guest);
	memcpy(guest.bytes + HEADER_GPA, &header, sizeof header);
}

static int read_chain(uint16_t head)
{
	int r = virtio_read_chain(&memory, 0, QUEUE, head, &chain, &why_not);

	return r ? r : virtio_blk_parse(&memory, &disk, &chain, &request, &why_not);
}

enum { N = VRING_DESC_F_NEXT, W = VRING_DESC_F_WRITE, I = VRING_DESC_F_INDIRECT };

/* Header, one segment of data, status. */
static int ask(uint32_t type, uint64_t sector, uint64_t data_gpa, uint32_t bytes, uint16_t data_flags)
{
	put_header(type, sector);
	put(5, HEADER_GPA, 16, N, 7);
	put(7, data_gpa, bytes, data_flags | N, 2);
	put(2, PAGE + 100, 1, W, 0);
	return read_chain(5);
}

static void requests_of_drivers_are_understood(void **state)
{
	(void)state;
	assert_int_equal(ask(VIRTIO_BLK_T_IN, 992, 1ull << 33, 4096, W), 0);
	assert_true(request.op == VIRTIO_BLK_READ && request.sector == 992 && request.bytes == 4096);
	assert_true(request.status_gpa == PAGE + 100 && request.count == 1);
	assert_int_equal(chain.segments[request.first].gpa, 1ull << 33);
	assert_int_equal(ask(VIRTIO_BLK_T_OUT, 0, 1 << 20, 512, 0), 0);
	assert_true(request.op == VIRTIO_BLK_WRITE && request.bytes == 512 && request.count == 1);
	assert_int_equal(chain.segments[request.first].gpa, 1 << 20);
	assert_int_equal(ask(VIRTIO_BLK_T_GET_ID, 0, 1 << 20, 20, W), 0);
	assert_true(request.op == VIRTIO_BLK_ID && request.bytes == 20);
	put_header(VIRTIO_BLK_T_FLUSH, 0);
	put(0, HEADER_GPA, 16, N, 1);
	put(1, PAGE + 100, 1, W, 0);
	assert_int_equal(read_chain(0), 0);
	assert_true(request.op == VIRTIO_BLK_SYNC && !request.count);
}

static void a_request_may_be_cut_anywhere(void **state)
{
	(void)state;
	put_header(VIRTIO_BLK_T_OUT, 8);
	put(0, 16 * QUEUE, 16 * 3, I, 0); /* an indirect table behind the queue's own */
	put(QUEUE, HEADER_GPA, 5, N, 1);
	put(QUEUE + 1, HEADER_GPA + 5, 11 + 1024, N, 2); /* the rest of the header and all data */
	put(QUEUE + 2, PAGE + 2000, 1, W, 0);
	assert_int_equal(read_chain(0), 0);
	assert_true(request.op == VIRTIO_BLK_WRITE && request.sector == 8 && request.bytes == 1024 &&
		    request.count == 1);
	assert_true(chain.segments[request.first].gpa == HEADER_GPA + 16);

	put_header(VIRTIO_BLK_T_IN, 8);
	put(0, HEADER_GPA, 16, N, 1);
	put(1, 3 * PAGE, 513, W, 0); /* data and status */
	assert_int_equal(read_chain(0), 0);
	assert_true(request.op == VIRTIO_BLK_READ && request.bytes == 512 &&
		    request.status_gpa == 3 * PAGE + 512);
}

static void discards_are_understood(void **state)
{
	static const struct virtio_blk_discard_write_zeroes ranges[] = { { 10, 500, 0 }, { 0, 1, 0 } };
	static const struct virtio_blk_discard_write_zeroes unmap = { 10, 5, 1 }, beyond = { 999, 2, 0 },
							    wide = { 0, 501, 0 };

	(void)state;
	for (int zero = 0; zero < 2; zero++) {
		uint32_t type = zero ? VIRTIO_BLK_T_WRITE_ZEROES : VIRTIO_BLK_T_DISCARD;

		put_header(type, 0);
		put(0, HEADER_GPA, 16, N, 1);
		put(1, RANGES_GPA, sizeof ranges, N, 2);
		put(2, PAGE + 100, 1, W, 0);
		memcpy(guest.bytes + RANGES_GPA, ranges, sizeof ranges);
		assert_int_equal(read_chain(0), 0);
		assert_true(request.op == (zero ? VIRTIO_BLK_ZERO : VIRTIO_BLK_PUNCH) &&
			    request.ranges == 2);
		assert_true(request.range[0].sector == 10 && request.range[0].sectors == 500);
		guest.table[1].len = 16;
		memcpy(guest.bytes + RANGES_GPA, &unmap, sizeof unmap);
		assert_int_equal(read_chain(0), 0);
		if (zero)
			assert_true(request.op == VIRTIO_BLK_ZERO && request.range[0].may_unmap);
		else
			assert_true(request.op == VIRTIO_BLK_REFUSE &&
				    request.status == VIRTIO_BLK_S_UNSUPP);
		memcpy(guest.bytes + RANGES_GPA, &beyond, sizeof beyond);
		assert_int_equal(read_chain(0), 0);
		assert_true(request.op == VIRTIO_BLK_REFUSE && request.status == VIRTIO_BLK_S_IOERR);
		memcpy(guest.bytes + RANGES_GPA, &wide, sizeof wide);
		assert_int_equal(read_chain(0), 0);
		assert_true(request.op == VIRTIO_BLK_REFUSE && request.status == VIRTIO_BLK_S_IOERR);
	}
}

static void what_a_disk_cannot_do_is_refused(void **state)
{
	static const struct {
		uint32_t type;
		uint64_t sector;
		uint32_t bytes;
		uint16_t flags;
		uint8_t status;
	} asked[] = {
		{ VIRTIO_BLK_T_IN, 993, 4096, W, VIRTIO_BLK_S_IOERR },
		{ VIRTIO_BLK_T_IN, UINT64_MAX, 512, W, VIRTIO_BLK_S_IOERR },
		{ VIRTIO_BLK_T_IN, UINT64_MAX - 7, 4096, W, VIRTIO_BLK_S_IOERR },
		{ VIRTIO_BLK_T_IN, 0, 513, W, VIRTIO_BLK_S_IOERR },
		{ VIRTIO_BLK_T_IN, 0, 512, 0, VIRTIO_BLK_S_IOERR }, /* the wrong way */
		{ VIRTIO_BLK_T_OUT, 0, 512, W, VIRTIO_BLK_S_IOERR },
		{ 77, 0, 512, W, VIRTIO_BLK_S_UNSUPP },
	};

	(void)state;
	for (size_t i = 0; i < sizeof asked / sizeof asked[0]; i++) {
		assert_int_equal(
			ask(asked[i].type, asked[i].sector, 1 << 20, asked[i].bytes, asked[i].flags), 0);
		assert_true(request.op == VIRTIO_BLK_REFUSE && request.status == asked[i].status);
		assert_int_equal(request.status_gpa, PAGE + 100);
	}
}

static void a_broken_ring_is_seen(void **state)
{
	(void)state;
	assert_int_equal(read_chain(QUEUE), -EPROTO);
	put_header(VIRTIO_BLK_T_IN, 0);
	put(0, HEADER_GPA, 16, N, QUEUE); /* leaves the table */
	assert_int_equal(read_chain(0), -EPROTO);
	put(0, HEADER_GPA, 16, N, 1);
	put(1, 1 << 20, 512, N | W, 1); /* a loop */
	assert_int_equal(read_chain(0), -EPROTO);
	assert_string_equal(why_not, "descriptors form a loop");
	put(1, 1 << 20, 512, W | N, 2);
	put(2, 1 << 21, 512, 0, 0); /* read behind written */
	assert_int_equal(read_chain(0), -EPROTO);
	assert_string_equal(why_not, "a descriptor to be read follows one to be written");
	put(1, 1 << 20, 0, W, 0); /* empty */
	assert_int_equal(read_chain(0), -EPROTO);
	put(1, UINT64_MAX - 10, 512, W, 0); /* overflows */
	assert_int_equal(read_chain(0), -EPROTO);
	put(0, HEADER_GPA, 16, 0, 0); /* no status */
	assert_int_equal(read_chain(0), -EPROTO);
	put(0, HEADER_GPA, 10, N, 1); /* no whole header */
	put(1, 1 << 20, 513, W, 0);
	assert_int_equal(read_chain(0), -EPROTO);
	put(0, 1 << 20, 16, N, 1); /* a header elsewhere */
	assert_int_equal(read_chain(0), -EFAULT);
	put(0, 256, 32, I, 0);
	put(16, 512, 32, I, 0); /* an indirect table in one */
	assert_int_equal(read_chain(0), -EPROTO);
	put(0, 256, 32, I | N, 1);
	assert_int_equal(read_chain(0), -EPROTO);
	put(0, 256, 33, I, 0);
	assert_int_equal(read_chain(0), -EPROTO);
	put(0, UINT64_MAX - 15, 32, I, 0);
	assert_int_equal(read_chain(0), -EFAULT);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(an_address_is_found_in_its_region),
		cmocka_unit_test(a_wrong_region_is_refused),
		cmocka_unit_test(messages_of_front_ends_are_understood),
		cmocka_unit_test(wrong_messages_are_refused),
		cmocka_unit_test(requests_of_drivers_are_understood),
		cmocka_unit_test(a_request_may_be_cut_anywhere),
		cmocka_unit_test(discards_are_understood),
		cmocka_unit_test(what_a_disk_cannot_do_is_refused),
		cmocka_unit_test(a_broken_ring_is_seen),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
