/* SPDX-License-Identifier: BSD-2-Clause-Patent */
/* Virtqueues: order, wrapping, who is told when, drivers that lie, and devices that die. */
#include "blk/queue.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SIZE 8u

struct rig {
	struct queue queue;
	struct vring_avail *avail;
	struct vring_used *used;
	struct queue_record *record;
	uint16_t offered, heads[SIZE];
};

static int set_up(void **state)
{
	struct rig *r = calloc(1, sizeof *r);

	r->avail = calloc(1, queue_avail_bytes(SIZE));
	r->used = calloc(1, queue_used_bytes(SIZE));
	r->record = calloc(1, queue_record_bytes(SIZE));
	queue_record_init(r->record, SIZE);
	r->queue = (struct queue){ .avail = r->avail, .used = r->used, .size = SIZE };
	assert_int_equal(queue_start(&r->queue, 0, r->heads), 0);
	*state = r;
	return 0;
}

static int tear_down(void **state)
{
	struct rig *r = *state;

	free(r->avail);
	free(r->used);
	free(r->record);
	free(r);
	return 0;
}

static void offer(struct rig *r, uint16_t head)
{
	r->avail->ring[r->offered++ % SIZE] = head;
	r->avail->idx = r->offered;
}

static void assert_taken(struct rig *r, uint16_t expected)
{
	uint16_t head = UINT16_MAX;

	assert_int_equal(queue_take(&r->queue, &head), 1);
	assert_int_equal(head, expected);
}

static void assert_none(struct rig *r)
{
	uint16_t head;

	assert_int_equal(queue_take(&r->queue, &head), 0);
}

static void set_used_event(struct rig *r, uint16_t at) { r->avail->ring[SIZE] = at; }

static uint16_t avail_event(struct rig *r)
{
	uint16_t at;

	memcpy(&at, &r->used->ring[SIZE], sizeof at);
	return at;
}

/* The device's process has died: another one begins with the same memory. */
static int revive(struct rig *r)
{
	r->queue =
		(struct queue){ .avail = r->avail, .used = r->used, .size = SIZE, .record = r->record };
	return queue_start(&r->queue, 0, r->heads);
}

static void requests_pass_in_order_and_indices_wrap(void **state)
{
	struct rig *r = *state;

	for (uint32_t i = 0; i < 3 * 65536 / 2; i++) {
		offer(r, i % SIZE);
		offer(r, (i + 3) % SIZE);
		assert_taken(r, i % SIZE);
		assert_taken(r, (i + 3) % SIZE);
		assert_none(r);
		queue_give_back(&r->queue, (i + 3) % SIZE, i); /* out of order */
		queue_give_back(&r->queue, i % SIZE, 7);
		assert_int_equal(r->used->idx, r->offered);
		assert_int_equal(r->used->ring[(r->offered - 2) % SIZE].id, (i + 3) % SIZE);
		assert_int_equal(r->used->ring[(r->offered - 2) % SIZE].len, i);
		assert_int_equal(r->used->ring[(r->offered - 1) % SIZE].id, i % SIZE);
	}
}

static void a_driver_that_lies_is_caught(void **state)
{
	struct rig *r = *state;
	uint16_t head;

	r->avail->idx = SIZE + 1; /* more than there can be */
	assert_int_equal(queue_take(&r->queue, &head), -EPROTO);
	r->avail->idx = UINT16_MAX; /* backwards */
	assert_int_equal(queue_take(&r->queue, &head), -EPROTO);
	offer(r, SIZE); /* not there */
	assert_int_equal(queue_take(&r->queue, &head), -EPROTO);
	r->offered = 0;
	offer(r, 3);
	offer(r, 3); /* which we have */
	assert_taken(r, 3);
	assert_int_equal(queue_take(&r->queue, &head), -EPROTO);
	queue_give_back(&r->queue, 3, 0);
	assert_taken(r, 3); /* and now we have not */
}

static void drivers_are_told_when_they_want(void **state)
{
	struct rig *r = *state;

	offer(r, 0);
	assert_taken(r, 0);
	assert_false(queue_must_tell(&r->queue)); /* of nothing */
	queue_give_back(&r->queue, 0, 0);
	assert_true(queue_must_tell(&r->queue));
	assert_false(queue_must_tell(&r->queue)); /* once */
	r->avail->flags = VRING_AVAIL_F_NO_INTERRUPT;
	offer(r, 0);
	assert_taken(r, 0);
	queue_give_back(&r->queue, 0, 0);
	assert_false(queue_must_tell(&r->queue));
	queue_want_kicks(&r->queue, false);
	assert_int_equal(r->used->flags, VRING_USED_F_NO_NOTIFY);
	queue_want_kicks(&r->queue, true);
	assert_int_equal(r->used->flags, 0);
}

static void events_are_told_where_they_were_asked_for(void **state)
{
	struct rig *r = *state;

	r->queue.event_index = true;
	set_used_event(r, 2); /* when the third is given back */
	for (uint16_t i = 0; i < 4; i++) {
		offer(r, i);
		assert_taken(r, i);
		queue_give_back(&r->queue, i, 0);
		assert_int_equal(queue_must_tell(&r->queue), i == 2);
	}
	set_used_event(r, 5);
	for (uint16_t i = 0; i < 4; i++) { /* in one batch that passes it */
		offer(r, i);
		assert_taken(r, i);
		queue_give_back(&r->queue, i, 0);
	}
	assert_true(queue_must_tell(&r->queue));
	queue_want_kicks(&r->queue, true);
	assert_int_equal(avail_event(r), 8);
}

static void a_device_goes_on_from_a_base(void **state)
{
	struct rig *r = *state;

	offer(r, 1);
	offer(r, 2);
	assert_int_equal(queue_start(&r->queue, 1, r->heads), 0);
	assert_taken(r, 2);
	assert_none(r);
}

static void what_was_in_flight_is_done_again_in_its_order(void **state)
{
	struct rig *r = *state;

	assert_int_equal(revive(r), 0);
	for (uint16_t i = 0; i < 5; i++)
		offer(r, 4 - i);
	for (uint16_t i = 0; i < 4; i++)
		assert_taken(r, 4 - i);
	queue_give_back(&r->queue, 3, 0);
	assert_int_equal(revive(r), 3);
	assert_true(r->heads[0] == 4 && r->heads[1] == 2 && r->heads[2] == 1);
	assert_taken(r, 0); /* which nobody had taken */
	assert_none(r);
	queue_give_back(&r->queue, 2, 0);
	queue_give_back(&r->queue, 0, 0);
	assert_int_equal(revive(r), 2);
	assert_true(r->heads[0] == 4 && r->heads[1] == 1);
	queue_give_back(&r->queue, 1, 0);
	queue_give_back(&r->queue, 4, 0);
	assert_int_equal(revive(r), 0);
	assert_none(r);
	assert_int_equal(r->used->idx, 5);
}

/* The process ends between two of the stores of a request that is given back. */
static void a_death_at_any_step_loses_and_repeats_nothing(void **state)
{
	struct rig *r = *state;

	assert_int_equal(revive(r), 0);
	offer(r, 6);
	offer(r, 5);
	assert_taken(r, 6);
	assert_taken(r, 5);
	queue_give_back(&r->queue, 5, 0);
	r->record->used_index = 0; /* before the record knew the new index */
	assert_int_equal(revive(r), 1);
	assert_int_equal(r->heads[0], 6);
	r->record->used_index = 0; /* and before it knew that the request was over */
	r->record->entries[5].in_flight = 1;
	assert_int_equal(revive(r), 1);
	assert_int_equal(r->heads[0], 6);
	assert_int_equal(r->record->used_index, 1);
	r->record->used_index = r->used->idx = 0; /* before the driver knew: it was not done */
	r->record->entries[5].in_flight = 1;
	assert_int_equal(revive(r), 2);
	assert_true(r->heads[0] == 6 && r->heads[1] == 5);
	r->record->entries[5].in_flight = 0; /* before it was noted as taken */
	assert_int_equal(revive(r), 1);
	assert_taken(r, 5);
}

static void a_record_that_lies_is_caught(void **state)
{
	struct rig *r = *state;

	r->record->version = 2;
	assert_int_equal(revive(r), -EPROTO);
	r->record->version = 1;
	r->record->size = 2 * SIZE;
	assert_int_equal(revive(r), -EPROTO);
	r->record->size = SIZE;
	r->record->used_index = 100;
	assert_int_equal(revive(r), -EPROTO);
	r->record->used_index = (uint16_t)-2;
	r->record->last_batch_head = 3;
	r->record->entries[3].next = SIZE;
	assert_int_equal(revive(r), -EPROTO);
	r->record->entries[3].next = 3; /* a loop: it ends all the same */
	assert_int_equal(revive(r), 0);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
	const struct CMUnitTest tests[] = {
		TEST(requests_pass_in_order_and_indices_wrap),
		TEST(a_driver_that_lies_is_caught),
		TEST(drivers_are_told_when_they_want),
		TEST(events_are_told_where_they_were_asked_for),
		TEST(a_device_goes_on_from_a_base),
		TEST(what_was_in_flight_is_done_again_in_its_order),
		TEST(a_death_at_any_step_loses_and_repeats_nothing),
		TEST(a_record_that_lies_is_caught),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
