/* SPDX-License-Identifier: BSD-2-Clause-Patent */
#include "blk/queue.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define RECORD_VERSION 1u

size_t queue_avail_bytes(uint16_t size)
{
	return sizeof(struct vring_avail) + size * sizeof(uint16_t) + sizeof(uint16_t);
}

size_t queue_used_bytes(uint16_t size)
{
	return sizeof(struct vring_used) + size * sizeof(struct vring_used_elem) + sizeof(uint16_t);
}

size_t queue_record_bytes(uint16_t size)
{
	return sizeof(struct queue_record) + size * sizeof(struct queue_record_entry);
}

void queue_record_init(struct queue_record *record, uint16_t size)
{
	record->version = RECORD_VERSION;
	record->size = size;
}

/* The event fields: each behind the other side's ring. */
static uint16_t *used_event(const struct queue *q) { return &q->avail->ring[q->size]; }

static uint16_t *avail_event(const struct queue *q) { return (uint16_t *)&q->used->ring[q->size]; }

static uint16_t load(const uint16_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

static void store(uint16_t *at, uint16_t value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }

/* ---- the record: a process may end between any two of these stores ----------------------------- */

static void set_in_flight(struct queue_record_entry *e, uint8_t in_flight)
{
	__atomic_store_n(&e->in_flight, in_flight, __ATOMIC_RELEASE);
}

static void record_taken(struct queue *q, uint16_t head)
{
	struct queue_record_entry *e = &q->record->entries[head];

	e->counter = q->counter++;
	set_in_flight(e, 1);
}

/* Batches are of one: before the used ring says so, and after. */
static void record_giving_back(struct queue *q, uint16_t head)
{
	q->record->entries[head].next = q->record->last_batch_head;
	store(&q->record->last_batch_head, head);
}

static void record_given_back(struct queue *q, uint16_t head)
{
	set_in_flight(&q->record->entries[head], 0);
	store(&q->record->used_index, q->next_used);
}

/* What the used ring has, but the record does not know yet: the process ended in between. */
static int settle_record(struct queue_record *r, uint16_t size, uint16_t used_index)
{
	uint16_t batch = (uint16_t)(used_index - load(&r->used_index)), head = load(&r->last_batch_head);

	if (batch > size)
		return -EPROTO;
	while (batch--) {
		if (head >= size)
			return -EPROTO;
		set_in_flight(&r->entries[head], 0);
		head = r->entries[head].next;
	}
	store(&r->used_index, used_index);
	return 0;
}

/* A copy: the record may change while it is sorted. */
struct pending {
	uint64_t counter;
	uint16_t head;
};

static int by_counter(const void *a, const void *b)
{
	const struct pending *x = a, *y = b;

	return x->counter < y->counter ? -1 : x->counter > y->counter;
}

static int start_from_record(struct queue *q, uint16_t *heads)
{
	struct queue_record *r = q->record;
	struct pending pending[QUEUE_SIZE_MAX];
	uint16_t n = 0;
	int error = r->version == RECORD_VERSION && r->size == q->size ? 0 : -EPROTO;

	if (!error)
		error = settle_record(r, q->size, q->next_used);
	if (error)
		return error;
	for (uint16_t i = 0; i < q->size; i++) {
		if (r->entries[i].in_flight)
			pending[n++] = (struct pending){ r->entries[i].counter, i };
	}
	qsort(pending, n, sizeof *pending, by_counter);
	for (uint16_t i = 0; i < n; i++) {
		heads[i] = pending[i].head;
		q->in_flight[heads[i]] = true;
		q->counter = pending[i].counter + 1;
	}
	q->next_avail = (uint16_t)(q->next_used + n); /* what was taken is given back or in flight */
	return n;
}

/* ---- the rings -------------------------------------------------------------------------------- */

int queue_start(struct queue *q, uint16_t base, uint16_t *heads)
{
	q->next_avail = base;
	q->next_used = load(&q->used->idx);
	q->told_used = q->next_used;
	q->counter = 0;
	memset(q->in_flight, 0, sizeof q->in_flight);
	return q->record ? start_from_record(q, heads) : 0;
}

int queue_take(struct queue *q, uint16_t *ret_head)
{
	uint16_t waiting = (uint16_t)(load(&q->avail->idx) - q->next_avail), head;

	if (!waiting)
		return 0;
	head = load(&q->avail->ring[q->next_avail & (q->size - 1)]);
	if (waiting > q->size || head >= q->size || q->in_flight[head])
		return -EPROTO;
	q->in_flight[head] = true;
	if (q->record)
		record_taken(q, head);
	q->next_avail++;
	*ret_head = head;
	return 1;
}

void queue_give_back(struct queue *q, uint16_t head, uint32_t written)
{
	q->used->ring[q->next_used & (q->size - 1)] = (struct vring_used_elem){ head, written };
	if (q->record)
		record_giving_back(q, head);
	q->in_flight[head] = false; /* first: the driver may offer it again at once */
	store(&q->used->idx, ++q->next_used);
	if (q->record)
		record_given_back(q, head);
}

bool queue_must_tell(struct queue *q)
{
	uint16_t told = q->told_used;

	/* What we have given back is to be seen before we see that nobody waits for it. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	q->told_used = q->next_used;
	if (told == q->next_used)
		return false;
	if (!q->event_index)
		return !(load(&q->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
	return vring_need_event(load(used_event(q)), q->next_used, told);
}

void queue_want_kicks(struct queue *q, bool on)
{
	if (q->event_index && on)
		store(avail_event(q), q->next_avail);
	else if (!q->event_index)
		store(&q->used->flags, on ? 0 : VRING_USED_F_NO_NOTIFY);
	/* The wish is to be seen before we look for the last time. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}
